"""The ways to isolate a program on this machine, and the choice among them."""

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
from wmtp.sandbox.process import Exchange, Process, SandboxFailure
from wmtp.sandbox.seccomp import system_call_filter

Choice = Literal["auto", "bubblewrap", "unshare", "none"]
FIRST_USER, NUM_USERS = 1_900_000_000, 200_000_000
"""Users that no account and no container manager has: each sandbox that root starts draws one."""
OPEN_FILES = 64
PROBE_SECONDS = 60.0
SCRIPT = Path(__file__).with_name("init.py").read_text(encoding="utf-8")


class Isolation(ABC):
    """A way to start a program. `as_root`: with root's rights at first, instead of in a user namespace."""

    name: str
    is_filtered = True
    makes_namespaces = False

    def __init__(self, as_root: bool) -> None:
        self.as_root = as_root

    @abstractmethod
    def prefix(self, limits: Limits, maker: int) -> list[str]:
        """The command line that goes before the launcher's."""

    def start(self, command: list[str], limits: Limits) -> Process:
        """Start a command; its `wait_until_ready` says when isolation and limits stand.

        Raises:
            SandboxFailure: no process could be started.
        """
        return Process(lambda launcher, maker: self._command(command, limits, launcher, maker))

    def _command(self, command: list[str], limits: Limits, launcher: int, maker: int) -> list[str]:
        setup = {
            "status": launcher,
            "namespaces": self.makes_namespaces,
            "user": FIRST_USER + secrets.randbelow(NUM_USERS) if self.as_root else None,
            "limits": self._resource_limits(limits),
            "filter": system_call_filter().hex() if self.is_filtered else "",
            "command": command,
            "environment": ENVIRONMENT,
            "folder_bytes": limits.folder_bytes,
            **(asdict(layout()) if self.makes_namespaces else {}),
        }
        return [*self.prefix(limits, maker), *python("-c", SCRIPT, json.dumps(setup))]

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
    """The program `bwrap`."""

    name = "bubblewrap"

    def prefix(self, limits: Limits, maker: int) -> list[str]:
        """Bubblewrap's own command line."""
        visible = layout()
        rights = (
            ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
            if self.as_root
            else ["--unshare-user", "--uid", "1000", "--gid", "1000", "--cap-drop", "ALL"]
        )
        return [
            shutil.which("bwrap") or "bwrap", *rights,
            "--die-with-parent", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts",
            "--unshare-cgroup-try", "--hostname", "sandbox", "--info-fd", str(maker),
            *(word for path in visible.folders for word in ("--perms", "0755", "--dir", path)),
            *(word for path in visible.binds for word in ("--ro-bind", path, path)),
            *(word for path in visible.hidden for word in ("--tmpfs", path, "--remount-ro", path)),
            *(word for path in visible.devices for word in ("--dev-bind", path, path)),
            *(word for target, path in visible.links for word in ("--symlink", target, path)),
            "--proc", "/proc", "--remount-ro", "/proc",
            "--perms", "1777", "--size", str(limits.folder_bytes), "--tmpfs", "/tmp",
            "--remount-ro", "/", "--chdir", "/tmp", "--",
        ]  # fmt: skip


class Unshare(Isolation):
    """Namespaces that the launcher makes itself, by unshare(2), mount(2) and pivot_root(2)."""

    name = "unshare"
    makes_namespaces = True

    def prefix(self, limits: Limits, maker: int) -> list[str]:
        """Nothing: the launcher does it."""
        return []


class NoIsolation(Isolation):
    """No protection: limits on time, memory, file sizes and output only."""

    name = "none"
    is_filtered = False

    def __init__(self) -> None:
        super().__init__(as_root=False)

    def prefix(self, limits: Limits, maker: int) -> list[str]:
        """Nothing."""
        return []

    def _resource_limits(self, limits: Limits) -> dict[str, tuple[int, int]]:
        kept = super()._resource_limits(limits)
        del kept["NPROC"]  # it would count all processes of this user
        del kept["MSGQUEUE"]
        if sys.platform == "darwin":
            del kept["AS"]  # its kernel refuses any
        return kept


@cache
def find_isolation(choice: Choice = "auto") -> Isolation:
    """The isolation of that name, or the first that works here, tried by running a program in it.

    Raises:
        SandboxUnavailable: none works; says what was tried, why it failed and what helps.
    """
    if choice == "none":
        return NoIsolation()
    kinds = [kind for kind in (Bubblewrap, Unshare) if choice in ("auto", kind.name)]
    if sys.platform != "linux":
        raise _unavailable(f"sandboxes need Linux, this is {platform.system()}: run wmtp in a Linux container")
    tried = []
    for kind in kinds:
        if kind is Bubblewrap and not shutil.which("bwrap"):
            tried.append("bubblewrap: not installed (its program bwrap is not on the PATH)")
            continue
        for as_root in (True, False) if os.geteuid() == 0 else (False,):
            isolation = kind(as_root)
            problem = _problem(isolation)
            if problem is None:
                return isolation
            tried.append(f"{kind.name}{' with the rights of root' if as_root else ' in a user namespace'}: {problem}")
    raise _unavailable(*tried)


def _problem(isolation: Isolation) -> str | None:
    """Why an isolation keeps its promises not, as far as a program in it can tell; None where it does."""
    limits = Limits()
    script = Path(self_test.__file__).read_text(encoding="utf-8")
    secret = Path(__file__).resolve()
    try:
        with (
            isolation.start(python("-c", script, str(secret), str(limits.processes)), limits) as process,
            Exchange(process) as exchange,
        ):
            process.wait_until_ready()
            for _ in exchange.turns(time.monotonic() + PROBE_SECONDS):
                if process.ended:
                    break
            said = (bytes(process.inbox) + bytes(process.noise)).decode(errors="replace").strip()
            return None if said == self_test.GOOD else said or "a program in it says nothing"
    except SandboxFailure as failure:
        return str(failure)


def _unavailable(*tried: str) -> SandboxUnavailable:
    return SandboxUnavailable(
        "\n".join(
            [
                "Programs that a model wrote cannot be run in isolation on this machine; none was run.",
                *(f"  {line}" for line in tried),
                "What helps: install bubblewrap (apt install bubblewrap); where user namespaces are off, let an "
                "administrator set kernel.unprivileged_userns_clone=1, user.max_user_namespaces=10000 or "
                "kernel.apparmor_restrict_unprivileged_userns=0; in a container, start it with --privileged, or with "
                "--security-opt seccomp=unconfined and systempaths=unconfined; use Linux 5.14 or newer.",
                "evaluation.sandbox=none runs the programs without protection: they can do all that you can.",
            ]
        )
    )
