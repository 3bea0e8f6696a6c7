"""A faulty network on the loopback: an HTTP proxy in front of a real server, which injects faults for a test."""

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
"""Largest size of bodies, in bytes, that are never flipped."""


class BrokenError(Exception):
    """A connection ended in the middle of a message."""


@dataclass
class Head:
    """The head of a request or an answer: everything before the body."""

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
        self.connection, self._rest = connection, b""

    def _fill(self) -> None:
        block = self.connection.recv(BLOCK)
        if not block:
            raise BrokenError
        self._rest += block

    def until(self, mark: bytes) -> bytes:
        """Return the bytes up to and including `mark`. Raises BrokenError at the end of the connection."""
        while mark not in self._rest:
            self._fill()
        found, _, self._rest = self._rest.partition(mark)
        return found + mark

    def head(self, asked: str = "") -> Head:
        """Return the head of a request, or of the answer to a request with the method `asked`."""
        raw = self.until(b"\r\n\r\n")
        first, *lines = raw.decode("latin-1").rstrip().split("\r\n")
        fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        words = first.split(" ")
        return Head(raw, asked or words[0], fields, int(words[1]) if asked else 0)

    def body(self, head: Head) -> Iterator[tuple[bytes, bool]]:
        """Yield the bytes of a body as they arrive, and whether they are data or the framing of chunks."""
        if head.length is not None:
            yield from self._data(head.length)
        elif "chunked" in head.fields.get("transfer-encoding", ""):
            size = 1
            while size:
                line = self.until(b"\r\n")
                yield line, False
                size = int(line.split(b";")[0], 16)
                yield from self._data(size)
                while size == 0 and line != b"\r\n":
                    line = self.until(b"\r\n")
                    yield line, False
                if size:
                    yield self.until(b"\r\n"), False
        else:
            with contextlib.suppress(BrokenError):
                while True:
                    yield from self._data(1)

    def _data(self, left: int) -> Iterator[tuple[bytes, bool]]:
        while left:
            if not self._rest:
                self._fill()
            block, self._rest = self._rest[:left], self._rest[left:]
            left -= len(block)
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
        """Whether all connections are closed without an answer."""
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
        """Close the connection in the middle of the next `n` requests, or of the answer to a request without a body."""
        self._order("drop", n, methods)

    def stall(self, seconds: float, n: int = 1, methods: tuple[str, ...] = ()) -> None:
        """Pause for `seconds` in the middle of the next `n` requests, or of their answers."""
        self._stall_seconds = seconds
        self._order("stall", n, methods)

    def answer(self, status: int = 503, n: int = 1, methods: tuple[str, ...] = ()) -> None:
        """Answer the next `n` requests with `status` instead of forwarding them."""
        self._status = status
        self._order("answer", n, methods)

    def flip(self, n: int = 1, methods: tuple[str, ...] = ("PUT",)) -> None:
        """Flip a bit in the middle of the next `n` bodies above 1 KiB; for GET, of the answers' bodies."""
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
        waits = head.fields.get("expect", "").lower() == "100-continue"
        if self._is_due("answer", head):
            for _ in requests.body(head) if not waits else ():
                pass  # unread data would reset the connection before the answer is read
            answer = f"HTTP/1.1 {self._status} Fault\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            requests.connection.sendall(answer.encode())
            return False
        with socket.create_connection(self._target) as server:
            answers = Stream(server)
            server.sendall(head.raw)
            reply = answers.head(head.method) if waits else None
            if reply:
                requests.connection.sendall(reply.raw)
            if reply is None or reply.status == 100:
                if not self._forward(head, requests, server):
                    return False
                reply = answers.head(head.method)
            requests.connection.sendall(reply.raw)
            has_bodies = head.length != 0
            is_whole = self._forward(reply, answers, requests.connection, spared=has_bodies)
        return is_whole and reply.length is not None and reply.fields.get("connection", "").lower() != "close"

    def _forward(self, head: Head, source: Stream, target: socket.socket, spared: bool = False) -> bool:
        """Forward a body, with faults unless `spared`, and return whether all of it was forwarded."""
        length, passed, is_open = head.length, 0, head.length != 0 and not spared
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
