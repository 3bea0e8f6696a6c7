"""Run a program as `__main__`: a script that reads the program from standard input.

The input is the length of the source in bytes, a newline, the source, and then the program's own standard input.
"""

import _sitebuiltins
import builtins
import os
import sys
from typing import Any


def _read(length: int) -> bytes:
    """Read exactly `length` bytes of standard input, without buffering."""
    parts = b""
    while len(parts) < length:
        part = os.read(0, length - len(parts))
        if not part:
            raise EOFError
        parts += part
    return parts


def _read_length() -> int:
    digits = b""
    while (byte := _read(1)) != b"\n":
        digits += byte
    return int(digits)


def main() -> None:
    """Read the program and execute it in place of this script."""
    source = _read(_read_length()).decode()
    for name in ("exit", "quit"):  # missing, because the interpreter runs without `site`
        setattr(builtins, name, _sitebuiltins.Quitter(name, "Ctrl-D"))
    sys.argv = ["program.py"]
    namespace: dict[str, Any] = sys.modules["__main__"].__dict__
    for name in [name for name in namespace if not name.startswith("__")]:
        del namespace[name]
    exec(compile(source, "program.py", "exec", dont_inherit=True), namespace)


if __name__ == "__main__":
    main()
