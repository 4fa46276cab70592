"""The web page's client: it stops the server when nobody reads on, and what goes wrong is a sentence."""

import http.server
import threading

import pytest

from llava_mini_fast.testing.serving import until
from llava_mini_fast.web import Endpoint

pytest.importorskip("openai", reason="the extra `web` is not installed")

CHUNK = (
    b'data: {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "m",'
    b' "choices": [{"index": 0, "delta": {"content": "Red"}}]}\n\n'
)


@pytest.fixture
def broken():
    """broken(rest) -> the address of a server that streams one word, then `rest`, then breaks off."""
    servers = []

    def run(rest):
        class Broken(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Content-Length", "100000")
                self.end_headers()
                self.wfile.write(CHUNK + rest)

            def log_message(self, *_):
                pass

        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Broken))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/v1"

    yield run
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.slow
def test_a_closed_answer_stops_the_server(server):
    endpoint, written = Endpoint(f"{server.url}/v1"), [server.metric("vllm:generation_tokens_total")]
    for whole in (False, True):
        answer = endpoint.answer(None, "Hello", [])
        assert next(answer)
        if whole:
            assert list(answer)
        answer.close()
        until(server.idle)
        written.append(server.metric("vllm:generation_tokens_total"))
    closed, ended = written[1] - written[0], written[2] - written[1]
    assert 0 < closed < ended


def test_a_server_that_is_not_there_is_a_sentence():
    with pytest.raises(ValueError, match="does not answer; start it with llava-mini serve"):
        list(Endpoint("http://127.0.0.1:9/v1").answer(None, "Hello", []))


@pytest.mark.parametrize(
    ("rest", "said"),
    [
        (b"", "broke off"),
        (b'data: {"error": {"message": "The engine is dead.", "type": "x", "code": 500}}\n\n', "The engine is dead."),
    ],
)
def test_a_server_that_breaks_off_is_a_sentence(broken, rest, said):
    answer = Endpoint(broken(rest), model="m").answer(None, "Hello", [])
    assert next(answer) == "Red"
    with pytest.raises(ValueError, match=said):
        next(answer)
