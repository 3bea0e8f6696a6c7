"""A filter that refuses the system calls with which an unprivileged program could bypass its limits.

New namespaces would let a program mount file systems without a size limit. Unmapped shared memory, message queues,
memory files and extended attributes do not count towards any limit. Only local sockets are allowed, because other
sockets are useless without a network. The remaining refused system calls are not needed by Python programs, and they
would only enlarge the attack surface of the kernel.
"""

import errno
import platform
import socket
import struct
from typing import NamedTuple

from wmtp.errors import SandboxUnavailable

LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000, 0x80000000
NEW_NAMESPACES = 0x7E020000
"""All flags of the system call clone(2) that create a namespace."""
X32 = 0x40000000
"""Bit that is set in the number of each system call of the x32 interface."""
CLONE3 = 435  # a filter cannot read its flags, which are in memory; libraries fall back to clone
SHARED_NUMBERS = (425, 426, 427, 428, 429, 430, 431, 432, 433, 438, 442, 447, 463)
"""Numbers of the refused system calls that have the same number on both architectures: io_uring_*, open_tree … fspick,
pidfd_getfd, mount_setattr, memfd_secret, setxattrat."""


class Machine(NamedTuple):
    """The numbers that the filter needs for one processor architecture.

    `audit` identifies the architecture. The other numbers are those of system calls.
    """

    audit: int
    clone: int
    socket: int
    refused: tuple[int, ...]


# unshare setns mount umount2 pivot_root chroot ptrace keyctl add_key request_key bpf perf_event_open userfaultfd
# shmget msgget semget mq_open memfd_create process_vm_readv process_vm_writev
# setxattr lsetxattr fsetxattr
MACHINES = {
    "x86_64": Machine(0xC000003E, 56, 41, (
        272, 308, 165, 166, 155, 161, 101, 250, 248, 249, 321, 298, 323, 29, 68, 64, 240, 319, 310, 311,
        188, 189, 190,
    )),
    "aarch64": Machine(0xC00000B7, 220, 198, (
        97, 268, 40, 39, 41, 51, 117, 219, 217, 218, 280, 241, 282, 194, 186, 190, 180, 279, 270, 271,
        5, 6, 7,
    )),
}  # fmt: skip


def _instruction(code: int, operand: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, operand)


def system_call_filter() -> bytes:
    """Return the filter as a classic BPF program, which is the format that seccomp needs.

    Raises:
        SandboxUnavailable: the system call numbers of this machine's architecture are unknown.
    """
    machine = MACHINES.get(platform.machine())
    if machine is None:
        known = " and ".join(MACHINES)
        raise SandboxUnavailable(f"the filter of system calls supports {known}, not {platform.machine()}")
    refuse = _instruction(RETURN, REFUSE | errno.EPERM)
    unknown = _instruction(RETURN, REFUSE | errno.ENOSYS)
    allow = _instruction(RETURN, ALLOW)
    program = [
        _instruction(LOAD, ARCHITECTURE),
        _instruction(EQUAL, machine.audit, if_true=1),
        _instruction(RETURN, KILL),
        _instruction(LOAD, NUMBER),
        _instruction(AT_LEAST, X32, if_false=1),
        unknown,
        _instruction(EQUAL, CLONE3, if_false=1),
        unknown,
    ]
    for number in (*machine.refused, *SHARED_NUMBERS):
        program += [_instruction(EQUAL, number, if_false=1), refuse]
    program += [
        _instruction(EQUAL, machine.clone, if_false=4),
        _instruction(LOAD, FIRST_ARGUMENT),
        _instruction(ANY_BIT, NEW_NAMESPACES, if_false=1),
        refuse,
        allow,
        _instruction(EQUAL, machine.socket, if_false=3),
        _instruction(LOAD, FIRST_ARGUMENT),
        _instruction(EQUAL, socket.AF_UNIX, if_true=1),
        _instruction(RETURN, REFUSE | errno.ENETUNREACH),
        allow,
    ]
    return b"".join(program)
