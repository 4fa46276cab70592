"""Servers on the tiny checkpoint."""

import pytest

from llava_mini_fast.testing.serving import Server


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
