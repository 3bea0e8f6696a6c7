"""Isolation methods for untrusted programs, and the selection of a method that works on this machine."""

import json
import os
import platform
import secrets
import shutil
import sys
import time
from abc import ABC, abstractmethod
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Literal

from wmtp.errors import SandboxUnavailable
from wmtp.sandbox import self_test
from wmtp.sandbox.limits import Limits
from wmtp.sandbox.mounts import ENVIRONMENT, layout, python
from wmtp.sandbox.process import PipeLoop, Process, SandboxFailure
from wmtp.sandbox.seccomp import system_call_filter

Choice = Literal["auto", "bubblewrap", "unshare", "none"]
FIRST_USER, NUM_USERS = 1_900_000_000, 200_000_000
"""First number and size of a range of user ids that accounts and container managers do not use. If root starts a
sandbox, the sandbox gets a random user id from this range."""
OPEN_FILES = 64
"""Maximum number of open files of a process."""
SELF_TEST_TIMEOUT_S = 60.0
INIT_SCRIPT = Path(__file__).with_name("init.py").read_text(encoding="utf-8")
"""Source code of the script that runs first in every sandbox."""


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

    def start(self, command: list[str], limits: Limits) -> Process:
        """Start a command. Its isolation and limits are in force when `Process.wait_until_ready` returns.

        Raises:
            SandboxFailure: no process could be started.
        """
        return Process(lambda init_fd, namespace_fd: self._command(command, limits, init_fd, namespace_fd))

    def _command(self, command: list[str], limits: Limits, init_fd: int, namespace_fd: int) -> list[str]:
        setup = {
            "status": init_fd,
            "namespaces": self.makes_namespaces,
            "user": FIRST_USER + secrets.randbelow(NUM_USERS) if self.as_root else None,
            "limits": self._resource_limits(limits),
            "filter": system_call_filter().hex() if self.is_filtered else "",
            "command": command,
            "environment": ENVIRONMENT,
            "folder_bytes": limits.folder_bytes,
            **(asdict(layout()) if self.makes_namespaces else {}),
        }
        return [*self.prefix(limits, namespace_fd), *python("-c", INIT_SCRIPT, json.dumps(setup))]

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


class NoIsolation(Isolation):
    """Execution without isolation. Only time, memory, file sizes, open files and output are limited."""

    name = "none"
    is_filtered = False

    def __init__(self) -> None:
        super().__init__(as_root=False)

    def prefix(self, limits: Limits, namespace_fd: int) -> list[str]:
        """Return an empty list, because no other program creates namespaces."""
        return []

    def _resource_limits(self, limits: Limits) -> dict[str, tuple[int, int]]:
        resource_limits = super()._resource_limits(limits)
        del resource_limits["NPROC"]  # the kernel would count all processes of the user
        del resource_limits["MSGQUEUE"]
        if sys.platform == "darwin":
            del resource_limits["AS"]  # the kernel of macOS does not support it
        return resource_limits


@cache
def find_isolation(choice: Choice = "auto") -> Isolation:
    """Return the isolation method with the name `choice`, if its self-test passes.

    If `choice` is "auto", return the first method whose self-test passes. The method "none" has no self-test.

    Raises:
        SandboxUnavailable: no self-test passed. The message lists the tried methods, their errors, and remedies.
    """
    if choice == "none":
        return NoIsolation()
    classes = [cls for cls in (Bubblewrap, Unshare) if choice in ("auto", cls.name)]
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
            isolation.start(python("-c", script, str(secret), str(limits.processes)), limits) as process,
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
