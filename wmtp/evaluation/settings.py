"""Settings of the commands `evaluate` and `generate`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from wmtp.field_types import Positive
from wmtp.runtime.processes import num_cores
from wmtp.sandbox.isolation import Choice
from wmtp.sandbox.limits import Limits


def _as_list(value: object) -> object:
    """Return an integer as a list with one element, and any other value unchanged."""
    return [value] if isinstance(value, int) and not isinstance(value, bool) else value


Seed = Annotated[int, Field(ge=0, lt=2**63)]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The problems of an evaluation, the number of samples for each, and the isolation of their programs.

    If `split` is None, the test split is used, or all splits of a data set that is a benchmark.
    """

    n: Positive = 1
    k: Annotated[tuple[Positive, ...], Field(min_length=1), BeforeValidator(_as_list)] = (1,)
    split: Literal["train", "validation", "test", "all"] | None = None
    limit: Positive | None = None
    seed: Seed = 0
    sandbox: Choice = "auto"
    workers: Positive | None = None
    limits: Limits

    @property
    def num_workers(self) -> int:
        """The number of programs that run at the same time: `workers`, by default the number of cores."""
        return self.workers or num_cores()


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """The keys of evaluate.yaml."""

    checkpoint: dict[Literal["path"], str]
    data: Any = None
    evaluation: Any
    generation: Any
    hardware: Any
    batch_size: Positive
    cache_dir: Path


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """The keys of generate.yaml."""

    checkpoint: dict[Literal["path"], str]
    prompt: Annotated[str, Field(min_length=1)]
    n: Positive
    seed: Seed
    context: Positive | None
    generation: Any
    hardware: Any
    cache_dir: Path
