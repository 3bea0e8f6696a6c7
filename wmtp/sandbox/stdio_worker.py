"""A script that runs a program as the module `__main__`. The only argument is the source code of the program."""

import _sitebuiltins
import builtins
import sys


def main() -> None:
    """Execute the program as the module `__main__`, in place of this script."""
    source = sys.argv[1]
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
