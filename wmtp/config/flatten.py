"""Conversion of nested mappings to a single mapping with dotted keys."""

from collections.abc import Iterator, Mapping
from typing import Any


def flatten(settings: Mapping[Any, Any]) -> dict[str, Any]:
    """Return one dictionary in which dots join the keys of nested mappings. Empty mappings are kept as values.

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
