"""A script that runs a program as the module `__main__`.

Its arguments are the source code of the program, and two names of files, which may be empty. If the program opens these
files, it gets standard input and standard output.
"""

import _sitebuiltins
import builtins
import os
import sys


def main() -> None:
    """Execute the program as the module `__main__`, in place of this script."""
    source, *names = sys.argv[1:]
    for name, device in zip(names, ("/dev/stdin", "/dev/stdout"), strict=True):
        if name and not os.path.lexists(name):
            os.symlink(device, name)  # noqa: PTH211
    for name in ("exit", "quit"):  # missing, because the interpreter runs without `site`
        setattr(builtins, name, _sitebuiltins.Quitter(name, "Ctrl-D"))
    sys.argv = ["program.py"]
    namespace = sys.modules["__main__"].__dict__
    for name in [name for name in namespace if not name.startswith("__")]:
        del namespace[name]
    namespace["__doc__"] = None
    exec(compile(source, "program.py", "exec", dont_inherit=True), namespace)


if __name__ == "__main__":
    main()
