"""The settings that a study searches: ranges in Hydra's syntax, as distributions of Optuna."""

from collections.abc import Mapping

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, RangeSweep
from hydra.errors import HydraException
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from wmtp.errors import InputError
from wmtp.report.grouping import format_value

FORMS = "write choice(a, b), interval(low, high), tag(log, interval(low, high)) or range(start, stop, step)"


def parse_space(space: Mapping[str, str]) -> dict[str, BaseDistribution]:
    """Return the distribution of each setting.

    Raises:
        InputError: a range is not in Hydra's syntax, or its limits are not valid.

    >>> parse_space({"optimizer.lr": "tag(log, interval(1e-3, 1e-2))"})
    {'optimizer.lr': FloatDistribution(high=0.01, log=True, low=0.001, step=None)}
    """
    return {key: _distribution(key, text) for key, text in space.items()}


def first_value(key: str, text: str) -> object:
    """Return a value in the range of a setting: the first choice, or the lower limit."""
    distribution = _distribution(key, text)
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[0]
    assert isinstance(distribution, FloatDistribution)
    return distribution.low


def last_value(key: str, text: str) -> object:
    """Return another value in the range of a setting than `first_value`: the last choice, or the middle."""
    distribution = _distribution(key, text)
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[-1]
    assert isinstance(distribution, FloatDistribution)
    return (distribution.low + distribution.high) / 2


def is_in_range(key: str, text: str, value: str) -> bool:
    """Return whether a value, as text, is in the range of a setting.

    >>> is_in_range("algo.beta", "choice(0.5, 1)", "1.0"), is_in_range("algo.beta", "interval(0.5, 1)", "2")
    (True, False)
    """
    distribution = _distribution(key, text)
    if isinstance(distribution, CategoricalDistribution):
        return any(_is_equal(format_value(choice), value) for choice in distribution.choices)
    assert isinstance(distribution, FloatDistribution)
    number = _to_number(value)
    return number is not None and distribution.low <= number <= distribution.high


def _is_equal(text: str, other: str) -> bool:
    number = _to_number(text)
    return text == other or (number is not None and number == _to_number(other))


def _to_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _distribution(key: str, text: str) -> BaseDistribution:
    try:
        override = OverridesParser.create().parse_override(f"{key}={text}")
        value = override.value() if override.is_sweep_override() else None
        if isinstance(value, ChoiceSweep):
            return CategoricalDistribution([_plain(choice) for choice in value.list])
        if isinstance(value, IntervalSweep):
            assert value.start is not None
            assert value.end is not None
            return FloatDistribution(value.start, value.end, log="log" in value.tags)
        if isinstance(value, RangeSweep):
            return CategoricalDistribution(list(value.range()))
    except (HydraException, ValueError) as error:
        raise InputError(f"{key}={text}: {' '.join(str(error).split())}; {FORMS}") from error
    raise InputError(f"{key}={text}: has only one value; {FORMS}")


def _plain(choice: object) -> str | int | float | bool | None:
    """Return a choice as a value that Optuna can store."""
    return choice if isinstance(choice, bool | int | float) or choice is None else str(choice)
