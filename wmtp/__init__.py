"""Weighted multi-token prediction. For notebooks: `from wmtp import compare, load_runs`."""

import sys
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wmtp.api import ComparisonFrames, Runs, compare, load_runs

__all__ = ["ComparisonFrames", "Runs", "compare", "load_runs"]

if sys.argv[0] == "-m" and find_spec("hydra") is None:  # `python -m wmtp.…` with another Python than that of .venv
    print(
        f"{sys.executable} does not have the packages that wmtp needs. Run `source .venv/bin/activate` first; "
        "scripts/train creates .venv.",
        file=sys.stderr,
    )
    sys.exit(2)


class _Package(ModuleType):
    """The package, whose attribute `compare` is always the function of `wmtp.api`.

    The command `wmtp.compare` has the same name. Python assigns each imported submodule to an attribute of its package.
    Without this class, `from wmtp import compare` would return the module if it was imported before. The module itself
    can be imported as usual: `from wmtp.compare import main`.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name == "compare" and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    """Return a public name of `wmtp.api`, which is imported only now because it imports pandas."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from wmtp import api

    return getattr(api, name)


sys.modules[__name__].__class__ = _Package
