"""Conversion of nested mappings to a single mapping with dotted keys."""

from collections.abc import Iterator, Mapping, Sequence
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


def merge_absent_parts(changed: Mapping[str, Sequence[Any]]) -> dict[str, tuple[Any, Any]]:
    """Merge the rows of a part of the config that the defaults or the run do not have at all into one row.

    >>> merge_absent_parts({"seed": [0, 1], "pretrain.lr": [None, 0.1], "pretrain.loss": [None, "reward"]})
    {'seed': (0, 1), 'pretrain': (None, '2 settings, see the full config')}
    """
    parts: dict[str, list[str]] = {}
    for key in changed:
        parts.setdefault(key.partition(".")[0], []).append(key)
    merged: dict[str, tuple[Any, Any]] = {}
    for part, keys in parts.items():
        columns = [[changed[key][side] for key in keys] for side in (0, 1)]
        absent = [all(value is None for value in column) for column in columns]
        if len(keys) > 1 and any(absent):
            count = f"{len(keys)} settings, see the full config"
            merged[part] = (None if absent[0] else count, None if absent[1] else count)
        else:
            merged |= {key: (changed[key][0], changed[key][1]) for key in keys}
    return merged
