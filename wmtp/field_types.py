"""Types with value ranges for constructor signatures. Config values are checked against them."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

Positive = Annotated[int, Field(ge=1)]
"""Integer of at least 1."""
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""Finite number above 0."""
Ratio = Annotated[float, Field(ge=0, le=1)]
"""Number from 0 to 1."""


def _must_exist(path: Path) -> Path:
    if not path.exists():
        raise ValueError(f"does not exist; relative paths start at {Path.cwd()}")
    return path


ExistingPath = Annotated[Path, AfterValidator(_must_exist)]
"""Path of an existing file or folder."""
