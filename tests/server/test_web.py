"""The web page in headless Chromium, over a real server: ask, see the answer stream, ask again, upload a bad file."""

import itertools
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from llava_mini_fast.testing.serving import picture, until
from llava_mini_fast.web import page

pytest.importorskip("gradio", reason="the extra `web` is not installed")
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
if not (shutil.which("chromium") and shutil.which("chromedriver")):
    pytest.skip("there is no chromium with its driver (Debian: chromium, chromium-driver)", allow_module_level=True)

pytestmark = pytest.mark.slow
PATIENCE = 60
ANSWERS = "[...document.querySelectorAll('#chat .bot.message')].map(answer => answer.innerText.trim())"


@pytest.fixture(scope="module")
def url(server, checkpoint, tmp_path_factory):
    """Of the page, which asks the server about the tiny checkpoint."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        Path(sys.executable).with_name("llava-mini"), "web", "--endpoint", f"{server.url}/v1", "--port", str(port),
        "--model", str(checkpoint("llama31")),
    ]  # fmt: skip
    log = tmp_path_factory.mktemp("web") / "log"
    with log.open("wb") as out:
        child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    end = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=5).close()
            break
        except OSError:
            assert child.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.3)
    yield f"http://127.0.0.1:{port}"
    child.kill()
    child.wait()


@pytest.fixture
def chromium():
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--window-size=1300,1200",
    ):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture
def browser(chromium, url):
    """At the page."""
    chromium.get(url)
    return chromium


def find(browser, css):
    """The element, once it is there."""
    from selenium.webdriver.support.wait import WebDriverWait

    return WebDriverWait(browser, PATIENCE).until(lambda b: b.find_elements("css selector", css))[0]


def upload(browser, path):
    find(browser, "#medium input[type=file]").send_keys(str(path))


def ask(browser, text):
    from selenium.webdriver.common.keys import Keys

    box = find(browser, "#question textarea")
    box.clear()
    box.send_keys(text)
    box.send_keys(Keys.ENTER)


def answers(browser):
    """The texts of the chat's answers."""
    return browser.execute_script(f"return {ANSWERS}")


def watch_answers(browser):
    """From now on the page notes down what its answers look like at every change, and when the last one was."""
    browser.execute_script(
        "window.seen = []; window.changed = Date.now();"
        f"new MutationObserver(() => {{window.seen.push({ANSWERS}.join()); window.changed = Date.now()}})"
        ".observe(document.querySelector('#chat'), {subtree: true, childList: true, characterData: true})"
    )


def settled(browser, server, number):
    """Whether so many answers are there, whole: the page may be behind the server."""
    quiet = browser.execute_script("return Date.now() - window.changed") > 2000
    return quiet and server.idle() and len(answers(browser)) == number


def test_ask_stream_and_ask_again(browser, server, tmp_path):
    path = tmp_path / "picture.png"
    picture(1).save(path)
    upload(browser, path)
    until(lambda: browser.find_elements("css selector", "#picture img"))
    watch_answers(browser)
    ask(browser, "What is this?")
    until(lambda: settled(browser, server, 1))
    shown = browser.execute_script("return window.seen")
    assert len({len(text) for text in shown if text}) > 2, "the answer did not come in pieces"
    assert find(browser, "#question textarea").get_attribute("value") == ""
    before = server.metric("llava_mini_cache_misses_total")
    ask(browser, "Where is it?")
    until(lambda: settled(browser, server, 2))
    assert server.metric("llava_mini_cache_misses_total") == before
    find(browser, "#new").click()
    until(lambda: not answers(browser))


class Talker:
    """An endpoint whose answer never ends."""

    def __init__(self):
        self.talking = 0

    def answer(self, path, question, history):
        self.talking += 1
        try:
            for count in itertools.count(1):
                yield f"{question} " * count
                time.sleep(0.1)
        finally:
            self.talking -= 1


@pytest.fixture
def talker():
    return Talker()


@pytest.fixture
def talking(chromium, talker):
    """A browser at a page that asks the talker."""
    blocks = page(talker)
    _, url, _ = blocks.queue().launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    chromium.get(url)
    yield chromium
    blocks.close()


@pytest.mark.parametrize("how", ["button", "file"])
def test_a_new_chat_stops_the_answer_of_the_old_one(talking, talker, tmp_path, how):
    path = tmp_path / "picture.png"
    picture(4).save(path)
    ask(talking, "old")
    until(lambda: any(answers(talking)))
    if how == "button":
        find(talking, "#new").click()
    else:
        upload(talking, path)
    until(lambda: not talker.talking and not answers(talking))
    time.sleep(1)
    assert not answers(talking), "the old answer went on in the new chat"
    ask(talking, "new")
    until(lambda: any(answers(talking)))
    assert len(answers(talking)) == 1 and "old" not in answers(talking)[0]


def test_stop_keeps_what_has_come_and_the_chat_goes_on(talking, talker):
    ask(talking, "old")
    until(lambda: any(answers(talking)))
    find(talking, "#stop").click()
    until(lambda: not talker.talking)
    time.sleep(1)
    (kept,) = answers(talking)
    ask(talking, "new")
    until(lambda: len(answers(talking)) == 2 and "new" in answers(talking)[1])
    assert answers(talking)[0] == kept


def test_two_people_are_answered_at_the_same_time(talking, talker):
    url = talking.current_url
    ask(talking, "one")
    until(lambda: any(answers(talking)))
    talking.switch_to.new_window("tab")
    talking.get(url)
    ask(talking, "two")
    until(lambda: any(answers(talking)))
    assert talker.talking == 2


def test_a_bad_file_is_a_sentence_and_the_next_good_one_is_answered(browser, tmp_path):
    bad, good = tmp_path / "bad.png", tmp_path / "good.png"
    bad.write_bytes(b"I am no picture")
    picture(2).save(good)
    upload(browser, bad)
    said = until(lambda: find(browser, "#status").text)
    assert "picture" in said and "/" not in said.replace("picture or clip", "")
    find(browser, "#medium button[aria-label='Remove this file'], #medium .icon-button, #medium button").click()
    until(lambda: browser.find_elements("css selector", "#medium input[type=file]"))
    upload(browser, good)
    until(lambda: browser.find_elements("css selector", "#picture img"))
    ask(browser, "What is this?")
    until(lambda: answers(browser))


@pytest.mark.parametrize(("name", "shown"), [("shapes", "#picture img"), ("moving", "#clip video")])
def test_example_buttons(browser, name, shown):
    find(browser, f"#try-{name}").click()
    until(lambda: browser.find_elements("css selector", shown))
    ask(browser, "What is this?")
    until(lambda: any(answers(browser)))


def test_the_heat_map_is_drawn(browser, tmp_path):
    path = tmp_path / "picture.png"
    picture(3).save(path)
    upload(browser, path)
    until(lambda: browser.find_elements("css selector", "#picture img"))
    find(browser, "#look").click()
    until(lambda: browser.find_elements("css selector", "#map img"))
