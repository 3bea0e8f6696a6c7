"""Tests of two helpers of other tests: the faulty network and the guard that ends servers."""

import http.client
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from tests.support.proxy import FaultyProxy

BODY = bytes(range(256)) * 400


class Echo(BaseHTTPRequestHandler):
    """Answers a PUT with its body and a GET with BODY; the path /chunks is answered in chunks."""

    protocol_version = "HTTP/1.1"
    hosts: list[str] = []  # noqa: RUF012 - shared by all requests, for the tests to read

    def do_PUT(self) -> None:
        self.hosts.append(self.headers["Host"])
        self.reply(self.rfile.read(int(self.headers["Content-Length"])))

    def do_GET(self) -> None:
        self.reply(BODY)

    def reply(self, body: bytes) -> None:
        self.send_response(200)
        if self.path == "/chunks":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for part in (body[:1000], body[1000:]):
                self.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
            self.wfile.write(b"0\r\n\r\n")
        else:
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def proxy() -> Iterator[FaultyProxy]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        with FaultyProxy(f"http://127.0.0.1:{server.server_port}") as faulty:
            yield faulty
        server.shutdown()


def send(proxy: FaultyProxy, method: str = "PUT", path: str = "/", body: bytes = BODY) -> bytes:
    data = body if method == "PUT" else None
    request = urllib.request.Request(proxy.url + path, data, method=method)
    with urllib.request.urlopen(request, timeout=10) as answer:
        return bytes(answer.read())


@pytest.mark.parametrize("path", ["/", "/chunks"])
@pytest.mark.parametrize("method", ["PUT", "GET"])
def test_without_faults_requests_pass_unchanged(proxy: FaultyProxy, method: str, path: str) -> None:
    for _ in range(3):
        assert send(proxy, method, path) == BODY
    assert proxy.requests == {method: 3} and proxy.done.total() == 0
    assert method == "GET" or Echo.hosts[-1] == proxy.url.removeprefix("http://")


def test_several_requests_use_one_connection(proxy: FaultyProxy) -> None:
    connection = http.client.HTTPConnection(proxy.url.removeprefix("http://"), timeout=10)
    for body in (BODY, b"", BODY[:10]):
        connection.request("PUT", "/", body)
        assert connection.getresponse().read() == body
    connection.close()


def test_the_given_number_of_requests_get_the_error(proxy: FaultyProxy) -> None:
    proxy.answer(503, 2, ("PUT",))
    assert send(proxy, "GET") == BODY
    for _ in range(2):
        with pytest.raises(urllib.error.HTTPError, match="503"):
            send(proxy)
    assert send(proxy) == BODY and proxy.done["answer"] == 2


def test_a_drop_closes_the_connection_in_the_middle(proxy: FaultyProxy) -> None:
    proxy.drop(2)
    with pytest.raises((urllib.error.URLError, ConnectionError, http.client.HTTPException)):
        send(proxy)
    with pytest.raises(http.client.IncompleteRead) as cut:
        send(proxy, "GET")
    assert len(cut.value.partial) == len(BODY) // 2
    assert send(proxy) == BODY and proxy.done["drop"] == 2


def test_a_flip_changes_one_bit_of_a_large_body(proxy: FaultyProxy) -> None:
    proxy.flip(1)
    assert send(proxy, "GET") == BODY and send(proxy, body=BODY[:1024]) == BODY[:1024]
    changed = [(a, b) for a, b in zip(BODY, send(proxy), strict=True) if a != b]
    assert len(changed) == 1 and (changed[0][0] ^ changed[0][1]).bit_count() == 1
    assert send(proxy) == BODY and proxy.done["flip"] == 1
    proxy.flip(1, ("GET",))
    assert send(proxy) == BODY and send(proxy, "GET", "/chunks") != BODY


def test_a_stall_delays_one_request_and_a_delay_every_request(proxy: FaultyProxy) -> None:
    def seconds() -> float:
        start = time.monotonic()
        assert send(proxy) == BODY
        return time.monotonic() - start

    proxy.stall(0.5)
    assert seconds() >= 0.5 and proxy.done["stall"] == 1
    assert seconds() < 0.4
    proxy.delay = 0.5
    assert seconds() >= 0.5


def test_a_dead_server_does_not_answer(proxy: FaultyProxy) -> None:
    proxy.dead = True
    with pytest.raises((urllib.error.URLError, ConnectionError, http.client.HTTPException)):
        send(proxy)
    assert proxy.requests.total() <= 1
    proxy.dead = False
    assert send(proxy) == BODY


STARTER = """
import sys, time
from pathlib import Path
from tests.support.servers import Server
folder = Path(sys.argv[1])
command = [sys.executable, "-c", "import subprocess; subprocess.run(['sleep', '60'])"]
server = Server(command, {}, folder, lambda: True)
server.start()
if sys.argv[2] == "naive":
    server.guard.kill()
print(server.process.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["guarded", "naive"])
def test_servers_do_not_outlive_killed_tests(tmp_path: Path, variant: str) -> None:
    root = Path(__file__).parents[2]
    tests = subprocess.Popen(
        [sys.executable, "-c", STARTER, str(tmp_path), variant], stdout=subprocess.PIPE, text=True, cwd=root
    )
    assert tests.stdout is not None
    group = int(tests.stdout.readline())
    deadline = time.monotonic() + 10
    while not psutil.Process(group).children():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    processes = [psutil.Process(group), *psutil.Process(group).children()]
    tests.kill()
    tests.communicate()
    psutil.wait_procs(processes, timeout=5 if variant == "guarded" else 0.5)
    remaining = [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    if variant == "naive":
        os.killpg(group, signal.SIGKILL)
    assert bool(remaining) == (variant == "naive")
