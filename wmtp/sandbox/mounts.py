"""File system and environment variables of a sandbox.

The file system contains only the Python interpreter, its libraries and a few devices.
"""

import os
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePath

ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "PYTHONIOENCODING": "utf-8",
    "PYTHONINTMAXSTRDIGITS": "0",  # contest programs print longer integers; the time limit remains
}
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
LIBRARIES = ("/usr/lib", "/usr/lib32", "/usr/lib64", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache")
LINKS = (
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
)
PACKAGES = ("site-packages", "dist-packages")
"""Names of the folders that contain installed packages. These folders are hidden in the sandbox."""


@dataclass(frozen=True)
class Layout:
    """The paths that exist in the file system of a sandbox."""

    binds: tuple[str, ...]
    """Files and folders of the machine that are mounted read-only in the sandbox, at the same paths."""
    links: tuple[tuple[str, str], ...]
    """Symbolic links, each as a pair (target, path of the link)."""
    hidden: tuple[str, ...]
    """Folders that appear empty in the sandbox."""
    devices: tuple[str, ...] = DEVICES

    @property
    def folders(self) -> list[str]:
        """The folders that contain the paths of the layout. Each folder comes after its own parent folder."""
        paths = (*self.binds, *self.devices, *(path for _, path in self.links))
        return sorted({str(folder) for path in paths for folder in PurePath(path).parents} - {"/"})


def interpreter() -> str:
    """Return the real path of the Python interpreter.

    In a virtual environment, return the path of its base interpreter.
    """
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def python(*arguments: str) -> list[str]:
    """Return a command line that runs Python with the given arguments.

    Python does not import `site`, does not write bytecode files, and does not add the current folder to `sys.path`. The
    option `-I` is not used, because Python would then ignore PYTHONHASHSEED.
    """
    return [interpreter(), "-B", "-P", "-s", "-S", *arguments]


@cache
def layout() -> Layout:
    """Return the layout of a sandbox on this machine, with all paths that the Python interpreter needs."""
    prefix = os.path.realpath(sys.base_prefix)
    binds: list[str] = []
    links = list(LINKS)
    for path in (*LIBRARIES, f"{prefix}/lib", f"{prefix}/lib64", interpreter()):
        if Path(path).is_symlink():
            links.append((str(Path(path).readlink()), path))
        elif Path(path).exists() and not any(f"{path}/".startswith(f"{bound}/") for bound in binds):
            binds.append(path)
    libraries = Path(prefix, "lib")
    hidden = [path for name in PACKAGES for path in libraries.glob(f"python3*/{name}") if path.is_dir()]
    return Layout(tuple(binds), tuple(links), tuple(str(path) for path in hidden if not path.is_symlink()))
