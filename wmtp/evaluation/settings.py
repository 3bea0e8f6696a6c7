"""Settings of the commands `evaluate` and `generate`."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from wmtp.field_types import OutputPath, Positive
from wmtp.runtime.processes import num_cores
from wmtp.sandbox.isolation import Choice
from wmtp.sandbox.limits import Limits


def _as_list(value: object) -> object:
    """Return a list that contains only the value if it is a number or text. Otherwise, return the value unchanged."""
    return [value] if isinstance(value, int | float | str) and not isinstance(value, bool) else value


Seed = Annotated[int, Field(ge=0, lt=2**63)]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Settings of an evaluation: its problems, the number of samples for each problem, and the isolation of programs.

    If `split` is None, the test split is evaluated, or, if the data set is a benchmark on which the model was not
    trained, all its splits.
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
        """The number of programs that run at the same time: `workers`, or if it is None, the number of cores."""
        return self.workers or num_cores()


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """The keys of the config file evaluate.yaml."""

    checkpoint: dict[Literal["path"], str]
    data: Any = None
    evaluation: Any
    generation: Any
    hardware: Any
    batch_size: Positive
    cache_dir: OutputPath


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """The keys of the config file generate.yaml."""

    checkpoint: dict[Literal["path"], str]
    prompt: Annotated[str, Field(min_length=1)]
    n: Positive
    seed: Seed
    context: Positive | None
    generation: Any
    hardware: Any
    cache_dir: OutputPath
