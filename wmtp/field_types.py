"""Annotated types for constructor parameters. They define the range of valid config values."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

Positive = Annotated[int, Field(ge=1)]
"""An integer that is at least 1."""
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""A finite number above 0."""
Ratio = Annotated[float, Field(ge=0, le=1)]
"""A number from 0 to 1."""


def _must_exist(path: Path) -> Path:
    if not path.exists():
        raise ValueError(f"does not exist; relative paths start at {Path.cwd()}")
    return path


ExistingPath = Annotated[Path, AfterValidator(_must_exist)]
"""The path of an existing file or folder."""
