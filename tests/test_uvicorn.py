"""The ticket's two programs, and the lifespan, under a real uvicorn."""

import signal
import socket
from urllib.parse import urlsplit

import httpx
import pytest

from tests.slowness import within
from tests.uvicorn import uvicorn


def test_the_view_sees_what_a_request_started_receiver_set():
    with uvicorn("tests.projects.receiver_sets") as server:
        with httpx.Client(base_url=server.url) as client:  # keeps its connection alive
            answers = [client.get("/").text for _ in range(3)]
    assert answers == ["request_id_value"] * 3


def test_a_request_finished_receiver_sees_what_the_view_set():
    with uvicorn("tests.projects.view_sets") as server:
        with httpx.Client(base_url=server.url) as client:
            for _ in range(3):
                assert client.get("/").text == "ok"
            assert client.get("/log").json() == ["close connection"] * 3


# Promise 16: lifespan


def test_the_server_refuses_to_start_and_says_which_resource_failed():
    with uvicorn("tests.projects.lifespan", POOL_FAILS="yes") as server:
        assert server.process.wait(within(20)) != 0
        server.wait_for(
            r"no database there.*tests\.projects\.lifespan\.pool \(.*lifespan\.py:\d+\)"
        )
        server.wait_for("Application startup failed")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_shutdown_waits_for_the_teardown_of_an_open_request(number):
    with uvicorn("tests.projects.lifespan", "--timeout-graceful-shutdown", "1") as server:
        server.wait_for("pool set up")
        address = urlsplit(server.url)
        with socket.create_connection((address.hostname, address.port), 10) as stream:
            stream.sendall(b"GET /stream HTTP/1.1\r\nHost: localhost\r\n\r\n")
            received = b""
            while b"pool" not in received:
                received += stream.recv(1000)
            server.stop(number)
    torn_down = [line for line in server.lines if line.endswith("torn down")]
    assert torn_down == ["db torn down", "pool torn down"]


def test_without_lifespan_support_the_pool_is_opened_once_all_the_same():
    with uvicorn("tests.projects.lifespan", "--lifespan", "off") as server:
        with httpx.Client(base_url=server.url) as client:
            assert [client.get("/").text for _ in range(3)] == ["pool"] * 3
        server.stop(signal.SIGINT)
    assert server.lines.count("pool set up") == 1
    assert server.lines.count("db torn down") == 3
    assert server.lines.count("pool torn down") == 1  # when the event loop cancels its tasks
