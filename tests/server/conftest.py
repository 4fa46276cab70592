"""Servers on the tiny checkpoint."""

import http.server
import threading

import pytest

from llava_mini_fast.testing.serving import Server, picture, png


@pytest.fixture
def start(checkpoint, tmp_path):
    """start(*flags, of="llama31", **more) -> a server of the test's own; `of=None` is the demo model, `more` as `Server`'s."""
    servers = []

    def run(*flags, of="llama31", **more):
        log = tmp_path / f"server-{len(servers)}.log"
        servers.append(Server(of and checkpoint(of), log, *flags, **more))
        return servers[-1].wait()

    yield run
    for server in servers:
        server.stop()


@pytest.fixture(scope="package")
def server(checkpoint, tmp_path_factory):
    """One server for all tests that don't harm it."""
    running = Server(checkpoint("llama31"), tmp_path_factory.mktemp("server") / "log").wait()
    yield running
    running.stop()


@pytest.fixture
def host():
    """A web server on this machine with one picture, a.png; host.asked are the paths that it was asked for."""

    class Pictures(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            host.asked.append(self.path)
            blob = png(picture(2))
            self.send_response(200 if self.path == "/a.png" else 404)
            self.send_header("Content-Length", str(len(blob)))
            self.end_headers()
            self.wfile.write(blob)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pictures) as host:
        host.asked = []
        threading.Thread(target=host.serve_forever, daemon=True).start()
        yield host
        host.shutdown()
