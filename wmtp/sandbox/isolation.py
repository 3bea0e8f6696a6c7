"""Isolation methods for untrusted programs, and the selection of a method that works on this machine."""

import marshal
import os
import platform
import secrets
import shutil
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, Protocol

from wmtp.errors import SandboxUnavailable
from wmtp.sandbox import self_test
from wmtp.sandbox.limits import Limits
from wmtp.sandbox.mounts import layout, python
from wmtp.sandbox.process import PipeLoop, Process, SandboxFailure
from wmtp.sandbox.seccomp import system_call_filter
from wmtp.sandbox.starting import ForkServer, SpawnedProcess

Choice = Literal["auto", "bubblewrap", "unshare", "none"]
FIRST_USER, NUM_USERS = 1_900_000_000, 200_000_000
"""First number and size of a range of user ids that accounts and container managers do not use. If root starts a
sandbox, the sandbox gets a random user id from this range."""
FOLDER = "/tmp"
"""The writable folder of a sandbox, in which programs start."""
OPEN_FILES = 64
"""Maximum number of open files of a process."""
SELF_TEST_TIMEOUT_S = 60.0
INIT_CODE = marshal.dumps(compile(Path(__file__).with_name("init.py").read_text(encoding="utf-8"), "init.py", "exec"))
"""Code of the script that runs first in every sandbox."""
START_INIT = "import marshal, sys; exec(marshal.loads(bytes.fromhex(sys.argv.pop(1))))"


class Start(Protocol):
    """A function that starts a program in a new sandbox."""

    def __call__(self, program: bytes, stdin: bytes | None = None) -> Process:
        """Start a program. Its isolation and limits are in force when `Process.wait_until_ready` returns.

        Args:
            program: what `packed` returns.
            stdin: the content of its standard input, which is then a regular file. If it is None, the standard input
                is a pipe.

        Raises:
            SandboxFailure: no process could be started.
        """


def packed(script: str, *arguments: str) -> bytes:
    """Return a script and its arguments in the form that init.py reads."""
    return marshal.dumps((compile(script, "<string>", "exec", dont_inherit=True), arguments))


class Isolation(ABC):
    """A method to start programs in isolation.

    If `as_root` is true, root starts the sandbox, and root privileges are dropped before the program starts. Otherwise
    the sandbox uses a user namespace.
    """

    name: str
    is_filtered = True
    """True if system calls are filtered."""
    makes_namespaces = False
    """True if init.py creates the namespaces."""

    def __init__(self, as_root: bool) -> None:
        self.as_root = as_root

    @abstractmethod
    def prefix(self, limits: Limits, namespace_fd: int) -> list[str]:
        """Return the words of the command line that precede the command that runs init.py.

        Args:
            limits: limits of the program.
            namespace_fd: file descriptor to which the program that creates the namespaces writes the process id of its
                child.
        """

    @contextmanager
    def starter(self, limits: Limits) -> Iterator[Start]:
        """Yield a function that starts programs with the given limits. Nothing that one leaves reaches the next one."""
        yield partial(SpawnedProcess, partial(self._command, limits, FOLDER))

    def _command(self, limits: Limits, folder: str, program: int, status: int, namespace_fd: int) -> list[str]:
        setup = {**self._setup(limits), "folder": folder, "program": program, "status": status}
        return [*self.prefix(limits, namespace_fd), *_init_command(setup)]

    def _setup(self, limits: Limits) -> dict[str, Any]:
        """Return the part of init.py's argument that does not depend on the program."""
        return {
            "namespaces": self.makes_namespaces,
            "user": FIRST_USER + secrets.randbelow(NUM_USERS) if self.as_root else None,
            "limits": self._resource_limits(limits),
            "filter": system_call_filter() if self.is_filtered else b"",
            "folder": FOLDER,
            "folder_bytes": limits.folder_bytes,
            **(asdict(layout()) if self.makes_namespaces else {}),
        }

    def _resource_limits(self, limits: Limits) -> dict[str, tuple[int, int]]:
        memory, file = limits.memory_mib * 2**20, limits.file_kib * 1024
        return {
            "AS": (memory, memory),
            "CPU": (limits.cpu_seconds, limits.cpu_seconds + 1),
            "NPROC": (limits.processes, limits.processes),
            "FSIZE": (file, file),
            "NOFILE": (OPEN_FILES, OPEN_FILES),
            "MSGQUEUE": (0, 0),
            "CORE": (0, 0),
        }


class Bubblewrap(Isolation):
    """Isolation by the program bubblewrap (`bwrap`)."""

    name = "bubblewrap"

    def prefix(self, limits: Limits, namespace_fd: int) -> list[str]:
        """Return the command line that starts bubblewrap."""
        paths = layout()
        privileges = (
            ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
            if self.as_root
            else ["--unshare-user", "--uid", "1000", "--gid", "1000", "--cap-drop", "ALL"]
        )
        return [
            shutil.which("bwrap") or "bwrap", *privileges,
            "--die-with-parent", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts",
            "--unshare-cgroup-try", "--hostname", "sandbox", "--info-fd", str(namespace_fd),
            *(word for path in paths.folders for word in ("--perms", "0755", "--dir", path)),
            *(word for path in paths.binds for word in ("--ro-bind", path, path)),
            *(word for path in paths.hidden for word in ("--tmpfs", path, "--remount-ro", path)),
            *(word for path in paths.devices for word in ("--dev-bind", path, path)),
            *(word for target, path in paths.links for word in ("--symlink", target, path)),
            "--proc", "/proc", "--remount-ro", "/proc",
            "--perms", "1777", "--size", str(limits.folder_bytes), "--tmpfs", "/tmp",
            "--remount-ro", "/", "--chdir", "/tmp", "--",
        ]  # fmt: skip


class Unshare(Isolation):
    """Isolation by namespaces that init.py creates with unshare(2), mount(2) and pivot_root(2)."""

    name = "unshare"
    makes_namespaces = True

    def prefix(self, limits: Limits, namespace_fd: int) -> list[str]:
        """Return an empty list, because init.py creates the namespaces."""
        return []

    @contextmanager
    def starter(self, limits: Limits) -> Iterator[Start]:
        """Yield a function that forks programs from one server, which is faster than one command for each program."""
        with ForkServer(lambda control: _init_command({**self._setup(limits), "control": control})) as server:
            yield server.start


class NoIsolation(Isolation):
    """Execution without isolation. Only time, memory, file sizes, open files and output are limited."""

    name = "none"
    is_filtered = False

    def __init__(self) -> None:
        super().__init__(as_root=False)

    def prefix(self, limits: Limits, namespace_fd: int) -> list[str]:
        """Return an empty list, because no other program creates namespaces."""
        return []

    @contextmanager
    def starter(self, limits: Limits) -> Iterator[Start]:
        """Yield a function that starts programs with a temporary folder as current folder."""
        with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            yield partial(SpawnedProcess, partial(self._command, limits, folder))

    def _resource_limits(self, limits: Limits) -> dict[str, tuple[int, int]]:
        resource_limits = super()._resource_limits(limits)
        del resource_limits["NPROC"]  # the kernel would count all processes of the user
        del resource_limits["MSGQUEUE"]
        if sys.platform == "darwin":
            del resource_limits["AS"]  # the kernel of macOS does not support it
        return resource_limits


def _init_command(setup: dict[str, Any]) -> list[str]:
    return python("-c", START_INIT, INIT_CODE.hex(), marshal.dumps(setup).hex())


@cache
def find_isolation(choice: Choice = "auto") -> Isolation:
    """Return the isolation method with the name `choice`, if its self-test passes.

    If `choice` is "auto", return the first method whose self-test passes: `Unshare`, which is the faster one, or
    `Bubblewrap`, which some systems allow to create namespaces although they do not allow it to other programs. The
    method "none" has no self-test.

    Raises:
        SandboxUnavailable: no self-test passed. The message lists the tried methods, their errors, and remedies.
    """
    if choice == "none":
        return NoIsolation()
    classes = [cls for cls in (Unshare, Bubblewrap) if choice in ("auto", cls.name)]
    if sys.platform != "linux":
        raise _unavailable(f"sandboxes need Linux, this is {platform.system()}: run wmtp in a Linux container")
    failures = []
    for cls in classes:
        if cls is Bubblewrap and not shutil.which("bwrap"):
            failures.append("bubblewrap: not installed (its program bwrap is not on the PATH)")
            continue
        for as_root in (True, False) if os.geteuid() == 0 else (False,):
            isolation = cls(as_root)
            problem = _self_test_error(isolation)
            if problem is None:
                return isolation
            failures.append(f"{cls.name}{' with root privileges' if as_root else ' in a user namespace'}: {problem}")
    raise _unavailable(*failures)


def _self_test_error(isolation: Isolation) -> str | None:
    """Run the self-test with an isolation method. Return an error message, or None if the self-test passed."""
    limits = Limits()
    script = Path(self_test.__file__).read_text(encoding="utf-8")
    secret = Path(__file__).resolve()
    try:
        with (
            isolation.starter(limits) as start,
            start(packed(script, str(secret), str(limits.processes))) as process,
            PipeLoop(process) as pipe_loop,
        ):
            process.wait_until_ready()
            for _ in pipe_loop.steps(time.monotonic() + SELF_TEST_TIMEOUT_S):
                if process.output_ended:
                    break
            output = (bytes(process.stdout_data) + bytes(process.stderr_data)).decode(errors="replace").strip()
            return None if output == self_test.PASSED else output or "the self-test has no output"
    except SandboxFailure as failure:
        return str(failure)


def _unavailable(*tried: str) -> SandboxUnavailable:
    return SandboxUnavailable(
        "\n".join(
            [
                "Programs written by a model cannot be run in isolation on this machine; none was run.",
                *(f"  {line}" for line in tried),
                "Remedies: install bubblewrap (apt install bubblewrap); if user namespaces are disabled, ask an "
                "administrator to set kernel.unprivileged_userns_clone=1, user.max_user_namespaces=10000 or "
                "kernel.apparmor_restrict_unprivileged_userns=0; start a container with --privileged, or with "
                "--security-opt seccomp=unconfined and systempaths=unconfined; use Linux 5.14 or newer.",
                "evaluation.sandbox=none runs the programs unprotected: they can do everything that you can.",
            ]
        )
    )
