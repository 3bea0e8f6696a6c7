"""Nested mappings as one level of dotted keys."""

from collections.abc import Iterator, Mapping
from typing import Any


def flatten(settings: Mapping[Any, Any]) -> dict[str, Any]:
    """Return every value that is not a mapping under its dotted key; an empty mapping counts as a value.

    >>> flatten({"algo": {"beta": 0.9, "of": {}}, "seed": 1})
    {'algo.beta': 0.9, 'algo.of': {}, 'seed': 1}
    """
    return dict(_leaves(settings, ""))


def _leaves(settings: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value
