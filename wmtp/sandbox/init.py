"""The script that runs first in a sandbox: it creates namespaces if required, sets limits, and executes the program.

The only argument of this script is a dictionary in the hexadecimal form of its `marshal` encoding, which `isolation.py`
creates. The script executes the program in its own interpreter, because starting another one would take longer than
creating the sandbox. All code of this script runs before the first instruction of the untrusted program.

If the dictionary has the key `control`, the script is a server: for each request on this socket, it forks a child,
which creates new namespaces and executes one program in them. The server itself never reads what belongs to a program.

The script writes to the status descriptor of a program: a zero byte when the sandbox is ready, or an error message if
it cannot be created. A server's child also writes the exit code of the program.
"""
# Only modules that load quickly are imported; json, pathlib, signal, socket and typing would take longer than the rest.
# ruff: noqa: PTH102, PTH103, PTH106, PTH112, PTH120, PTH123, PTH211

import _socket
import ctypes
import gc
import marshal
import os
import resource
import struct
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import CodeType
    from typing import Any

    Setup = dict[str, Any]
    """Type of the argument of this script."""

C_LIBRARY = ctypes.CDLL(None, use_errno=True)
CLONE_FLAGS = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000
"""Flags that create new mount, cgroup, uts, ipc, pid and network namespaces."""
CLONE_NEWUSER = 0x10000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 0x1000, 0x4000, 0x40000
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV = 1, 2, 4
MNT_DETACH = 2
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 24, 38
MODE_FILTER, SIGKILL = 2, 9
NUM_CAPABILITIES, CAPABILITY_VERSION = 64, 0x20080522
OLD_ROOT = "/.old"
NUM_FILES = 1024
"""Maximum number of files and folders in the writable folder of the sandbox."""
PRELOADED = ("ast", "bisect", "collections", "heapq", "itertools", "json", "math", "typing")
"""Modules that a server imports, so that its children, which probably use them, need not. None of them has a state."""
NUM_DESCRIPTORS = 5
"""Number of file descriptors in a request: the program, its standard input, output and error, and its status."""


def call(name: str, *arguments: "Any") -> None:
    """Call a function of the C library.

    Raises:
        OSError: the function returned a negative value.
    """
    converted = [ctypes.c_long(argument) if isinstance(argument, int) else argument for argument in arguments]
    if getattr(C_LIBRARY, name)(*converted) < 0:
        number = ctypes.get_errno()
        arguments_text = ", ".join(repr(argument) for argument in arguments)
        raise OSError(number, f"{name}({arguments_text}): {os.strerror(number)}")


def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    """Mount a file system, or bind-mount a file or folder."""
    call("mount", source.encode(), target.encode(), kind and kind.encode(), flags, options.encode())


def restrict_mount(path: str, attributes: int, flags: int = AT_RECURSIVE) -> None:
    """Add attributes, for example "read-only", to the mount at a path. Its other attributes do not change."""
    structure = struct.pack("QQQQ", attributes, 0, 0, 0)
    call("syscall", SYS_MOUNT_SETATTR, AT_FDCWD, path.encode(), flags, structure, len(structure))


def make_namespaces(setup: "Setup") -> None:
    """Create new namespaces for this process.

    If the sandbox is not started as root, also create a user namespace, which gives the privileges to configure the
    other namespaces.
    """
    user, group = os.getuid(), os.getgid()
    call("unshare", CLONE_FLAGS | (0 if setup["user"] is not None else CLONE_NEWUSER))
    if setup["user"] is None:
        for name, content in (("setgroups", "deny"), ("uid_map", f"1000 {user} 1"), ("gid_map", f"1000 {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(content)


def kill_on_parent_death() -> None:
    """Make the kernel kill this process when its parent ends."""
    call("prctl", PR_SET_PDEATHSIG, SIGKILL)


def close_all_except(first: int, kept: int | None) -> None:
    """Close all file descriptors from `first` on, except `kept`."""
    os.closerange(first, 256 if kept is None else kept)
    if kept is not None:
        os.closerange(kept + 1, 256)


def wait_and_exit_like(child: int, status: int | None) -> None:
    """Wait until a child process ends, write its exit code to `status` if it is given, and exit with the same code.

    If this process is the first one of a pid namespace, it also reaps orphaned processes while it waits, and the kernel
    kills all other processes of the namespace when it exits.
    """
    close_all_except(0, status)
    while True:
        ended, result = os.wait()
        if ended == child:
            code = os.waitstatus_to_exitcode(result)
            code = code if code >= 0 else 128 - code
            if status is not None:
                os.write(status, b"\n%d" % code)
            os._exit(code)


def fork_and_wait(status: int | None = None) -> None:
    """Fork, and return only in the child. The parent waits for the child and exits with the child's exit code.

    The child waits for a byte from the parent. If the parent ended before `kill_on_parent_death` took effect, the child
    does not receive the byte and exits.

    Args:
        status: file descriptor to which the parent writes the process id of the child, before the child continues, and
            later its exit code. If it is None, nothing is written.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        if status is not None:
            os.write(status, b'{"child-pid": %d}' % child)
        os.write(writing, b".")
        wait_and_exit_like(child, status)
    os.close(writing)
    kill_on_parent_death()
    if os.read(reading, 1) != b".":
        os._exit(1)
    os.close(reading)


def bind_mount(source: str, target: str, attributes: int) -> None:
    """Bind-mount the file or folder `source` at `target`, and add attributes to this mount."""
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o444))
    mount(source, target, None, MS_BIND | MS_REC)
    restrict_mount(target, attributes)


def change_root(setup: "Setup") -> None:
    """Replace the root of this mount namespace by a new root.

    The new root contains only the paths that are listed in `setup`, /proc, and the writable folder /tmp.
    """
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1m")
    os.mkdir(f"/tmp{OLD_ROOT}")
    call("pivot_root", b"/tmp", f"/tmp{OLD_ROOT}".encode())
    os.chdir("/")
    read_only = ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV
    for path in setup["binds"]:
        bind_mount(OLD_ROOT + path, path, read_only)
    for path in setup["devices"]:
        bind_mount(OLD_ROOT + path, path, ATTR_NOSUID)
    for target, path in setup["links"]:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.symlink(target, path)
    for path in setup["hidden"]:
        mount("tmpfs", path, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=4k")
        restrict_mount(path, read_only)
    os.mkdir("/proc")
    mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)  # possible only while the old /proc is mounted
    restrict_mount("/proc", read_only)
    os.mkdir("/tmp")
    size = f"mode=1777,size={setup['folder_bytes']},nr_inodes={NUM_FILES}"
    mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, size)
    call("umount2", OLD_ROOT.encode(), MNT_DETACH)
    os.rmdir(OLD_ROOT)
    restrict_mount("/", read_only, flags=0)


def drop_privileges(setup: "Setup") -> None:
    """Change from root to the user id of this sandbox, and drop all capabilities. Without isolation, do nothing.

    Each sandbox that root starts has its own user id, because the kernel counts processes per user and does not limit
    root.
    """
    if setup["user"] is not None:
        if setup["namespaces"]:
            for capability in range(NUM_CAPABILITIES):
                try:
                    call("prctl", PR_CAPBSET_DROP, capability)
                except OSError:  # this kernel has fewer capabilities
                    break
        for descriptor in (0, 1, 2):
            os.fchmod(descriptor, 0o666)  # otherwise /dev/stdin could not be opened
        os.setgroups([])
        os.setresgid(setup["user"], setup["user"], setup["user"])
        os.setresuid(setup["user"], setup["user"], setup["user"])
    if setup["filter"]:
        call("capset", struct.pack("Ii", CAPABILITY_VERSION, 0), struct.pack("6I", *[0] * 6))
        call("prctl", PR_SET_DUMPABLE, 1)  # otherwise its own /proc/self/fd would be closed to the program


def filter_system_calls(program: bytes) -> None:
    """Install a filter of system calls that no process of this sandbox can remove.

    `program` is the filter in the format that `seccomp.py` creates.
    """
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    buffer = ctypes.create_string_buffer(program, len(program))
    call("prctl", PR_SET_SECCOMP, MODE_FILTER, struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer)))


def serve(setup: "Setup") -> tuple[int, int]:
    """Fork a child for each request, and return only in the children. Exit when the other side closes the socket.

    A child gets a user id of its own (see `drop_privileges`), and a session of its own, because a program may send a
    signal to its process group.

    Returns:
        The file descriptors of the program and of its status.
    """
    for name in PRELOADED:
        __import__(name)
    gc.freeze()  # collections in the children would copy the memory that they share with the server
    server, connection = os.getpid(), _socket.socket(fileno=setup["control"])
    while True:
        _, messages, _, _ = connection.recvmsg(1, _socket.CMSG_SPACE(4 * NUM_DESCRIPTORS))
        if not messages:
            os._exit(0)
        program, *standard, status = struct.unpack(f"{NUM_DESCRIPTORS}i", messages[0][2])
        if not os.fork():
            break
        for descriptor in (program, *standard, status):
            os.close(descriptor)
        if setup["user"] is not None:
            setup["user"] += 1
        while reap_child():
            pass
    kill_on_parent_death()
    if os.getppid() != server:
        os._exit(1)
    os.setsid()
    connection.close()
    for number, descriptor in enumerate(standard):
        os.dup2(descriptor, number)
    open_standard_streams()
    return program, status


def reap_child() -> bool:
    """Reap one child that has ended, and return whether there was one."""
    try:
        return os.waitpid(-1, os.WNOHANG) != (0, 0)
    except ChildProcessError:
        return False


def open_standard_streams() -> None:
    """Replace the objects of the standard streams by new ones, as Python creates them when it starts.

    The objects of the server remember properties of its own streams, for example that they are seekable.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        old, mode = getattr(sys, name), "w" if number else "r"
        buffering = 1 if name == "stderr" else -1
        stream: "Any" = os.fdopen(number, mode, buffering, old.encoding, old.errors, "\n", False)
        stream.buffer.raw.name = old.name
        stream.mode = mode
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def isolate(setup: "Setup", status: int) -> None:
    """Create the namespaces if required, and restrict this process as the setup says."""
    if setup["namespaces"]:
        make_namespaces(setup)
        kill_on_parent_death()
        fork_and_wait(status)
        change_root(setup)
        fork_and_wait()
    os.chdir(setup["folder"])
    for name, limit in setup["limits"].items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), limit)
    bytearray(2**20)  # fails if the limit of memory is too small for anything, while an error can still be reported
    drop_privileges(setup)
    if setup["filter"]:
        filter_system_calls(setup["filter"])


def main(setup: "Setup") -> "CodeType":
    """Set up the sandbox, and return the code of the program. Its arguments become those of this process."""
    program, status = serve(setup) if "control" in setup else (setup["program"], setup["status"])
    try:
        isolate(setup, status)
        os.environ.pop("PWD", None)  # bubblewrap sets it
        with open(program, "rb") as file:
            code, sys.argv[1:] = marshal.load(file)
        close_all_except(3, status)
        os.write(status, b"\0")
        os.close(status)
    except BaseException as error:  # noqa: BLE001 - reported through `status`
        os.write(status, f"{type(error).__name__}: {error}".encode())
        os._exit(1)
    return code  # type: ignore[no-any-return]


if __name__ == "__main__":
    exec(main(marshal.loads(bytes.fromhex(sys.argv[1]))))
