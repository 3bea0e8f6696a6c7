"""The first process of a sandbox, a script: makes the namespaces if told to, sets the limits, becomes the program.

It gets one argument of JSON: see `isolation.py`. Through the descriptor `status` it says "." when all is set, or
what went wrong. Everything here happens before the first untrusted instruction.
"""
# importing pathlib would take longer than all of this
# ruff: noqa: PTH102, PTH103, PTH106, PTH112, PTH120, PTH123, PTH211

import contextlib
import ctypes
import json
import os
import resource
import signal
import struct
import sys
from typing import Any

CLONE_FLAGS = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000
"""New mount, cgroup, uts, ipc, pid and network namespaces."""
CLONE_NEWUSER = 0x10000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 0x1000, 0x4000, 0x40000
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV = 1, 2, 4
MNT_DETACH = 2
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, MODE_FILTER = 1, 22, 24, 38, 2
NUM_CAPABILITIES, CAPABILITY_VERSION = 64, 0x20080522
OLD_ROOT = "/.old"
NUM_FILES = 1024
"""How many files and folders the writable folder may hold."""

Setup = dict[str, Any]


def call(name: str, *arguments: Any) -> None:
    """Call a function of the C library; raises OSError where it fails."""
    library = ctypes.CDLL(None, use_errno=True)
    converted = [ctypes.c_long(argument) if isinstance(argument, int) else argument for argument in arguments]
    if getattr(library, name)(*converted) < 0:
        number = ctypes.get_errno()
        shown = ", ".join(repr(argument) for argument in arguments)
        raise OSError(number, f"{name}({shown}): {os.strerror(number)}")


def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    """Mount `source` at `target`."""
    call("mount", source.encode(), target.encode(), kind and kind.encode(), flags, options.encode())


def restrict_mount(path: str, attributes: int, flags: int = AT_RECURSIVE) -> None:
    """Add attributes to a mount; those that it has stay."""
    structure = struct.pack("QQQQ", attributes, 0, 0, 0)
    call("syscall", SYS_MOUNT_SETATTR, AT_FDCWD, path.encode(), flags, structure, len(structure))


def make_namespaces(setup: Setup) -> None:
    """Leave the machine's namespaces; without root's rights, in a user namespace that gives them over the new ones."""
    user, group = os.getuid(), os.getgid()
    call("unshare", CLONE_FLAGS | (0 if setup["user"] is not None else CLONE_NEWUSER))
    if setup["user"] is None:
        for name, content in (("setgroups", "deny"), ("uid_map", f"1000 {user} 1"), ("gid_map", f"1000 {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(content)


def die_with_parent() -> None:
    """Let the kernel kill this process when its parent ends."""
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)


def stand_by_until_end(child: int) -> None:
    """Reap children until this one ends, then end as it did. The first process of a pid namespace takes all along."""
    os.closerange(0, 256)
    while True:
        ended, status = os.wait()
        if ended == child:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


def fork_and_stand_by(status: int | None = None) -> None:
    """Go on as a child; the parent stands by. With `status`, the parent first says the child's number.

    The child waits for the parent's word, so that nothing is said before the number, and so that it cannot
    miss a parent that ends before it asks to die with it.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        if status is not None:
            os.write(status, json.dumps({"child-pid": child}).encode())
        os.write(writing, b".")
        stand_by_until_end(child)
    os.close(writing)
    die_with_parent()
    if os.read(reading, 1) != b".":
        os._exit(1)
    os.close(reading)


def show(source: str, target: str, attributes: int) -> None:
    """Make a file or folder of the old root visible at the same place of the new one."""
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o444))
    mount(source, target, None, MS_BIND | MS_REC)
    restrict_mount(target, attributes)


def change_root(setup: Setup) -> None:
    """Give this mount namespace a root of its own, with nothing in it but what the layout names."""
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1m")
    os.mkdir(f"/tmp{OLD_ROOT}")
    call("pivot_root", b"/tmp", f"/tmp{OLD_ROOT}".encode())
    os.chdir("/")
    read_only = ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV
    for path in setup["binds"]:
        show(OLD_ROOT + path, path, read_only)
    for path in setup["devices"]:
        show(OLD_ROOT + path, path, ATTR_NOSUID)
    for target, path in setup["links"]:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.symlink(target, path)
    for path in setup["hidden"]:
        mount("tmpfs", path, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=4k")
        restrict_mount(path, read_only)
    os.mkdir("/proc")
    mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)  # only while the old one is still there
    restrict_mount("/proc", read_only)
    os.mkdir("/tmp")
    size = f"mode=1777,size={setup['folder_bytes']},nr_inodes={NUM_FILES}"
    mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, size)
    call("umount2", OLD_ROOT.encode(), MNT_DETACH)
    os.rmdir(OLD_ROOT)
    restrict_mount("/", read_only, flags=0)


def drop_rights(setup: Setup) -> None:
    """Give up root for a user of this sandbox alone, since limits on processes count by user and do not bind root."""
    if setup["user"] is not None:
        if setup["namespaces"]:
            for capability in range(NUM_CAPABILITIES):
                try:
                    call("prctl", PR_CAPBSET_DROP, capability)
                except OSError:  # this kernel knows fewer
                    break
        for descriptor in (0, 1, 2):
            os.fchmod(descriptor, 0o666)  # or /dev/stdin could not be opened
        os.setgroups([])
        os.setresgid(setup["user"], setup["user"], setup["user"])
        os.setresuid(setup["user"], setup["user"], setup["user"])
    if setup["filter"]:
        call("capset", struct.pack("Ii", CAPABILITY_VERSION, 0), struct.pack("6I", *[0] * 6))


def filter_system_calls(program: bytes) -> None:
    """Install a filter that no process of this sandbox can take off."""
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    buffer = ctypes.create_string_buffer(program, len(program))
    call("prctl", PR_SET_SECCOMP, MODE_FILTER, struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer)))


def main(setup: Setup) -> None:
    """Do all this in order, then become the program."""
    status = setup["status"]
    try:
        os.set_inheritable(status, False)
        if setup["namespaces"]:
            make_namespaces(setup)
            die_with_parent()
            fork_and_stand_by(status)
            change_root(setup)
            fork_and_stand_by()
        os.chdir("/tmp")
        for name, limit in setup["limits"].items():
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), tuple(limit))
        drop_rights(setup)
        if setup["filter"]:
            filter_system_calls(bytes.fromhex(setup["filter"]))
        for descriptor in range(3, 256):
            if descriptor != status:
                with contextlib.suppress(OSError):  # none of that number
                    os.close(descriptor)
        with open(setup["command"][0], "rb"):  # what cannot be read could not be run either, too late to say so
            pass
        os.write(status, b".")
        os.execve(setup["command"][0], setup["command"], setup["environment"])
    except BaseException as error:  # noqa: BLE001 - nobody else could say it
        os.write(status, f"{type(error).__name__}: {error}".encode())
        os._exit(1)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
