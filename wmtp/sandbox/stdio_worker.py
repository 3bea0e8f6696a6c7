"""A script that reads a program from standard input and runs it as the module `__main__`.

Standard input contains the length of the program's source code in bytes, a newline, the source code, and then the
standard input of the program itself.
"""

import _sitebuiltins
import builtins
import os
import sys
from typing import Any


def _read(length: int) -> bytes:
    """Read exactly `length` bytes of standard input, without buffering.

    Raises:
        EOFError: standard input contains fewer bytes.
    """
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
    """Read the program and execute it as the module `__main__`, in place of this script."""
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
