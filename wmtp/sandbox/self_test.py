"""Self-test of a sandbox. This script runs inside the sandbox and prints the guarantees that the sandbox violates.

The arguments of the script are the path of a file that must not be visible in the sandbox, and the maximum number of
processes.
"""

# ruff: noqa: PTH110, PTH123

import os
import signal
import socket
import sys

PASSED = "isolated"
"""Output of the script if the sandbox violates no guarantee."""


def find_violations(hidden: str, num_processes: int) -> list[str]:
    """Return a description of each guarantee that the sandbox violates. The list is empty if the sandbox is isolated.

    Args:
        hidden: path of a file that must not be visible in the sandbox.
        num_processes: maximum number of processes.
    """
    found = []
    if os.path.exists(hidden):
        found.append(f"{hidden} is visible")
    for folder in ("/", "/dev", "/proc"):
        if os.access(folder, os.W_OK):
            found.append(f"{folder} is writable")
    with open("/proc/net/dev") as file:
        if interfaces := [line.split(":")[0].strip() for line in file if ":" in line and "lo:" not in line]:
            found.append(f"network interfaces: {', '.join(interfaces)}")
    try:
        socket.socket().close()
        found.append("sockets can be created")
    except OSError:
        pass
    with open("/proc/self/status") as file:
        status = dict(line.split(":", 1) for line in file)
    for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        if int(status[name], 16):
            found.append(f"{name} is{status[name].rstrip()}")
    children: list[int] = []
    try:
        while len(children) < num_processes:
            child = os.fork()
            if not child:
                signal.pause()
            children.append(child)
        found.append(f"a program can start more than {num_processes} processes")
    except OSError:
        pass
    if not children:
        found.append(
            "a program cannot start processes, because the limit counts those outside the sandbox (before Linux 5.14)"
        )
    for child in children:
        os.kill(child, signal.SIGKILL)
    return found


if __name__ == "__main__":
    print("; ".join(find_violations(sys.argv[1], int(sys.argv[2]))) or PASSED)
