"""Runs a whole program as `__main__`: a script that reads the length of the source, the source, and leaves the rest
of standard input to it."""

import _sitebuiltins
import builtins
import os
import sys
from typing import Any


def _read(length: int) -> bytes:
    """Exactly so many bytes, and none further."""
    parts = b""
    while len(parts) < length:
        part = os.read(0, length - len(parts))
        if not part:
            raise EOFError
        parts += part
    return parts


def _header() -> int:
    digits = b""
    while (byte := _read(1)) != b"\n":
        digits += byte
    return int(digits)


def main() -> None:
    """Become the program."""
    source = _read(_header()).decode()
    for name in ("exit", "quit"):  # which Python without `site` lacks
        setattr(builtins, name, _sitebuiltins.Quitter(name, "Ctrl-D"))
    sys.argv = ["program.py"]
    namespace: dict[str, Any] = sys.modules["__main__"].__dict__
    for name in [name for name in namespace if not name.startswith("__")]:
        del namespace[name]
    exec(compile(source, "program.py", "exec", dont_inherit=True), namespace)


if __name__ == "__main__":
    main()
