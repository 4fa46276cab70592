"""Bodies of requests are bounded before they are in memory."""

import http.client
import json

import pytest

from llava_mini_fast.server.bodies import DEFAULT, VARIABLE, Bounded

fastapi = pytest.importorskip("fastapi", reason="the server is vLLM's")
from fastapi.testclient import TestClient  # noqa: E402


@pytest.fixture
def client(monkeypatch):
    """Of an application that says how long a body's list is, and takes 100 bytes."""
    monkeypatch.setenv(VARIABLE, "100")
    app = fastapi.FastAPI()

    @app.post("/")
    def length(numbers: list[int]) -> int:
        return len(numbers)

    app.add_middleware(Bounded)
    return TestClient(app, headers={"content-type": "application/json"})


def test_bodies_up_to_the_limit_pass(client):
    assert client.post("/", content=b"[1, 2]" + b" " * 94).json() == 2


def test_a_longer_body_is_refused(client):
    answer = client.post("/", content=b"[1, 2]" + b" " * 95)
    assert answer.status_code == 413
    assert answer.json()["error"]["message"] == "The request is larger than the 100 bytes that this server takes."


def test_a_body_without_a_length_is_cut_off(client):
    pieces = (b" " * 10 for _ in range(50))
    assert client.post("/", content=pieces).status_code == 400


@pytest.mark.parametrize("text", ["0", "-1", "many", ""])
def test_a_wrong_setting_is_a_sentence(monkeypatch, text):
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(ValueError, match="LLAVA_MINI_MAX_BODY_BYTES must be a positive number"):
        Bounded(None)


def test_no_limit(monkeypatch):
    monkeypatch.setenv(VARIABLE, "none")
    assert Bounded(None).most is None


def test_the_server_refuses_before_a_body_is_sent(server):
    """The real one: only headers are sent."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", str(DEFAULT + 1))
    connection.endheaders()
    answer = connection.getresponse()
    assert answer.status == 413 and "larger than" in json.loads(answer.read())["error"]["message"]
