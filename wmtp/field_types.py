"""Types with ranges for constructor signatures, against which the config is checked."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

Positive = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Ratio = Annotated[float, Field(ge=0, le=1)]


def _must_exist(path: Path) -> Path:
    if not path.exists():
        raise ValueError(f"does not exist; relative paths start at {Path.cwd()}")
    return path


ExistingPath = Annotated[Path, AfterValidator(_must_exist)]
