"""Weighted multi-token prediction."""

import sys
from importlib.util import find_spec

if sys.argv[0] == "-m" and find_spec("hydra") is None:  # `python -m wmtp.…` with another Python than that of .venv
    print(
        f"{sys.executable} does not have the packages that wmtp needs. Run `source .venv/bin/activate` first; "
        "scripts/train creates .venv.",
        file=sys.stderr,
    )
    sys.exit(2)
