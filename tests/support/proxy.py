"""A faulty network for tests: an HTTP proxy on the loopback that injects faults between a client and a real server."""

import contextlib
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self
from urllib.parse import urlsplit

BLOCK = 65536
SMALL = 1024
"""Largest size in bytes of a body in which no bit is flipped."""


class BrokenError(Exception):
    """A connection ended in the middle of a message."""


@dataclass
class Head:
    """The head of a request or a response: everything before the body."""

    raw: bytes
    method: str
    fields: dict[str, str]
    status: int = 0

    @property
    def length(self) -> int | None:
        """Length of the body in bytes; None if it is chunked or ends with the connection."""
        if self.status and (self.method == "HEAD" or self.status in (204, 304) or self.status < 200):
            return 0
        if "content-length" in self.fields:
            return int(self.fields["content-length"])
        return None if self.status or "transfer-encoding" in self.fields else 0


class Stream:
    """A reader of HTTP messages from a connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self._buffer = connection, b""

    def _fill(self) -> None:
        block = self.connection.recv(BLOCK)
        if not block:
            raise BrokenError
        self._buffer += block

    def read_until(self, delimiter: bytes) -> bytes:
        """Return the bytes up to and including `delimiter`. Raises BrokenError at the end of the connection."""
        while delimiter not in self._buffer:
            self._fill()
        found, _, self._buffer = self._buffer.partition(delimiter)
        return found + delimiter

    def head(self, request_method: str = "") -> Head:
        """Return the head of a request or, if `request_method` is given, of the response to such a request."""
        raw = self.read_until(b"\r\n\r\n")
        first, *lines = raw.decode("latin-1").rstrip().split("\r\n")
        fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        words = first.split(" ")
        return Head(raw, request_method or words[0], fields, int(words[1]) if request_method else 0)

    def body(self, head: Head) -> Iterator[tuple[bytes, bool]]:
        """Yield the bytes of a body as they arrive, and whether they are data or the framing of chunks."""
        if head.length is not None:
            yield from self._data(head.length)
        elif "chunked" in head.fields.get("transfer-encoding", ""):
            size = 1
            while size:
                line = self.read_until(b"\r\n")
                yield line, False
                size = int(line.split(b";")[0], 16)
                yield from self._data(size)
                while size == 0 and line != b"\r\n":
                    line = self.read_until(b"\r\n")
                    yield line, False
                if size:
                    yield self.read_until(b"\r\n"), False
        else:
            with contextlib.suppress(BrokenError):
                while True:
                    yield from self._data(1)

    def _data(self, remaining: int) -> Iterator[tuple[bytes, bool]]:
        while remaining:
            if not self._buffer:
                self._fill()
            block, self._buffer = self._buffer[:remaining], self._buffer[remaining:]
            remaining -= len(block)
            yield block, True


class FaultyProxy:
    """A proxy that forwards requests to the server at a URL, and injects each requested fault `n` times.

    Requests are forwarded unchanged, including Host, so that their signatures stay valid. Use it in a `with` block.
    """

    def __init__(self, target: str) -> None:
        parts = urlsplit(target)
        assert parts.hostname is not None and parts.port is not None
        self._target = (parts.hostname, parts.port)
        self._server = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        self.dead = False
        """Whether all connections are closed without a response."""
        self.delay = 0.0
        """Delay in seconds before each request is forwarded."""
        self.requests: Counter[str] = Counter()
        """Number of requests received, by method."""
        self.done: Counter[str] = Counter()
        """Number of injected faults, by the name of the method; "dead" counts refused connections."""
        self._orders: Counter[str] = Counter()
        self._methods: dict[str, tuple[str, ...]] = {}
        self._stall_seconds, self._status = 0.0, 503
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.dead = True
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()

    def drop(self, n: int = 1, methods: tuple[str, ...] = ()) -> None:
        """Close the connection in the middle of the next `n` requests.

        If a request has no body, the connection is closed in the middle of its response.
        """
        self._order("drop", n, methods)

    def stall(self, seconds: float, n: int = 1, methods: tuple[str, ...] = ()) -> None:
        """Pause for `seconds` in the middle of the next `n` requests, or of their responses."""
        self._stall_seconds = seconds
        self._order("stall", n, methods)

    def answer(self, status: int = 503, n: int = 1, methods: tuple[str, ...] = ()) -> None:
        """Answer the next `n` requests with `status` instead of forwarding them."""
        self._status = status
        self._order("answer", n, methods)

    def flip(self, n: int = 1, methods: tuple[str, ...] = ("PUT",)) -> None:
        """Flip a bit in the middle of the next `n` bodies above 1 KiB; for GET, of the responses' bodies."""
        self._order("flip", n, methods)

    def _order(self, fault: str, n: int, methods: tuple[str, ...]) -> None:
        with self._lock:
            self._orders[fault], self._methods[fault] = n, methods

    def _is_due(self, fault: str, head: Head) -> bool:
        """Return whether to inject a fault into this message, and count it if so."""
        with self._lock:
            methods = self._methods.get(fault, ())
            is_due = self._orders[fault] > 0 and (not methods or head.method in methods)
            self._orders[fault] -= is_due
            self.done[fault] += is_due
            return is_due

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = self._server.accept()[0]
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        """Forward all requests of one connection."""
        with client, contextlib.suppress(OSError, BrokenError):
            requests = Stream(client)
            while not self.dead and self._exchange(requests, requests.head()):
                pass
            self.done["dead"] += self.dead

    def _exchange(self, requests: Stream, head: Head) -> bool:
        """Forward one request and its answer, and return whether the connection stays open."""
        with self._lock:
            self.requests[head.method] += 1
        time.sleep(self.delay)
        expects_continue = head.fields.get("expect", "").lower() == "100-continue"
        if self._is_due("answer", head):
            for _ in requests.body(head) if not expects_continue else ():
                pass  # unread data would reset the connection before the answer is read
            answer = f"HTTP/1.1 {self._status} Fault\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            requests.connection.sendall(answer.encode())
            return False
        with socket.create_connection(self._target) as server:
            answers = Stream(server)
            server.sendall(head.raw)
            response = answers.head(head.method) if expects_continue else None
            if response:
                requests.connection.sendall(response.raw)
            if response is None or response.status == 100:
                if not self._forward(head, requests, server):
                    return False
                response = answers.head(head.method)
            requests.connection.sendall(response.raw)
            has_bodies = head.length != 0
            is_complete = self._forward(response, answers, requests.connection, without_faults=has_bodies)
        return is_complete and response.length is not None and response.fields.get("connection", "").lower() != "close"

    def _forward(self, head: Head, source: Stream, target: socket.socket, without_faults: bool = False) -> bool:
        """Forward a body, with faults unless `without_faults`, and return whether all of it was forwarded."""
        length, passed, is_open = head.length, 0, head.length != 0 and not without_faults
        for block, is_data in source.body(head):
            middle = max((length or 0) // 2 - passed, 0)
            if is_open and is_data and middle < len(block):
                is_open = False
                target.sendall(block[:middle])
                block = block[middle:]
                if self._is_due("stall", head):
                    time.sleep(self._stall_seconds)
                if self._is_due("drop", head):
                    return False
                if (length is None or length > SMALL) and self._is_due("flip", head):
                    block = bytes([block[0] ^ 1]) + block[1:]
            target.sendall(block)
            passed += len(block)
            if self.dead:
                return False
        return True
