"""A faulty network on the loopback: an HTTP proxy in front of a real server, with faults that a test orders."""

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
"""Bodies up to here are never flipped."""


class BrokenError(Exception):
    """A connection ended in the middle of a message."""


@dataclass
class Head:
    """What comes before the body of a request or an answer, as it was sent."""

    raw: bytes
    method: str
    fields: dict[str, str]
    status: int = 0

    @property
    def length(self) -> int | None:
        """Bytes of the body; None where it comes in chunks or ends with the connection."""
        if self.status and (self.method == "HEAD" or self.status in (204, 304) or self.status < 200):
            return 0
        if "content-length" in self.fields:
            return int(self.fields["content-length"])
        return None if self.status or "transfer-encoding" in self.fields else 0


class Stream:
    """What comes over a connection, read as HTTP needs it."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self._rest = connection, b""

    def _fill(self) -> None:
        block = self.connection.recv(BLOCK)
        if not block:
            raise BrokenError
        self._rest += block

    def until(self, mark: bytes) -> bytes:
        """The bytes up to and with a mark. Raises BrokenError at the end of the connection."""
        while mark not in self._rest:
            self._fill()
        found, _, self._rest = self._rest.partition(mark)
        return found + mark

    def head(self, asked: str = "") -> Head:
        """The head of a request, or of the answer to a request with the method `asked`."""
        raw = self.until(b"\r\n\r\n")
        first, *lines = raw.decode("latin-1").rstrip().split("\r\n")
        fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        words = first.split(" ")
        return Head(raw, asked or words[0], fields, int(words[1]) if asked else 0)

    def body(self, head: Head) -> Iterator[tuple[bytes, bool]]:
        """A body's bytes as they come, and whether they are data (or what frames chunks)."""
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
    """Hands requests on to the server at a URL and does the faults that were ordered, each so many times.

    Requests go on as they came, Host included, so that their signatures hold. Use it in a `with` block.
    """

    def __init__(self, target: str) -> None:
        parts = urlsplit(target)
        assert parts.hostname is not None and parts.port is not None
        self._target = (parts.hostname, parts.port)
        self._server = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        self.dead = False
        """Whether connections are closed without a word."""
        self.delay = 0.0
        """Seconds before each request is handed on."""
        self.requests: Counter[str] = Counter()
        """Requests that came, by method."""
        self.done: Counter[str] = Counter()
        """Faults done, by the name of what ordered them; "dead" counts the connections that were refused."""
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
        """Close the connection in the middle of the next `n` requests, or of the answer to one without a body."""
        self._order("drop", n, methods)

    def stall(self, seconds: float, n: int = 1, methods: tuple[str, ...] = ()) -> None:
        """Hand nothing on for so long in the middle of the next `n` requests, or of the answers."""
        self._stall_seconds = seconds
        self._order("stall", n, methods)

    def answer(self, status: int = 503, n: int = 1, methods: tuple[str, ...] = ()) -> None:
        """Answer the next `n` requests with a status instead of handing them on."""
        self._status = status
        self._order("answer", n, methods)

    def flip(self, n: int = 1, methods: tuple[str, ...] = ("PUT",)) -> None:
        """Flip a bit in the middle of the next `n` bodies of more than 1 KiB; with GET, of the answers' bodies."""
        self._order("flip", n, methods)

    def _order(self, fault: str, n: int, methods: tuple[str, ...]) -> None:
        with self._lock:
            self._orders[fault], self._methods[fault] = n, methods

    def _is_due(self, fault: str, head: Head) -> bool:
        """Whether a fault is to be done to this message now; it is counted if so."""
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
        """All requests of one connection."""
        with client, contextlib.suppress(OSError, BrokenError):
            requests = Stream(client)
            while not self.dead and self._exchange(requests, requests.head()):
                pass
            self.done["dead"] += self.dead

    def _exchange(self, requests: Stream, head: Head) -> bool:
        """One request and its answer; whether the connection goes on."""
        with self._lock:
            self.requests[head.method] += 1
        time.sleep(self.delay)
        waits = head.fields.get("expect", "").lower() == "100-continue"
        if self._is_due("answer", head):
            for _ in requests.body(head) if not waits else ():
                pass  # what was sent and not read would take the answer away
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
                if not self._hand_on(head, requests, server):
                    return False
                reply = answers.head(head.method)
            requests.connection.sendall(reply.raw)
            has_bodies = head.length != 0
            is_whole = self._hand_on(reply, answers, requests.connection, spared=has_bodies)
        return is_whole and reply.length is not None and reply.fields.get("connection", "").lower() != "close"

    def _hand_on(self, head: Head, source: Stream, target: socket.socket, spared: bool = False) -> bool:
        """Hand a body on, with the faults that are due unless it is spared; whether all of it went on."""
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
