"""Differences between a config and the default config of its command, and removal of defaults that do not apply."""

from collections.abc import Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, open_dict

from wmtp.config.flatten import flatten
from wmtp.config.moved_targets import FIRST_TOKEN, PRETRAINED_TOKENIZERS, current_target
from wmtp.config.overrides import override_key
from wmtp.config.schema import CONFIG_FOLDER, is_node, iter_nodes, schema, to_plain
from wmtp.config.targets import locate


def changed_keys(config: DictConfig, command: str) -> dict[str, list[Any]]:
    """Return `[default, value]` for each dotted key whose value is not the default. A missing key is None."""
    before, now = default_values(command), flatten(to_plain(config))
    keys = [*now, *(key for key in before if key not in now)]
    return {key: [before.get(key), now.get(key)] for key in keys if before.get(key) != now.get(key)}


def drop_keys_of_replaced_classes(config: DictConfig, overrides: Sequence[str]) -> None:
    """Remove the default keys that a class of torch in the overrides lacks. Keys in the overrides are kept.

    For example, `optimizer._target_=torch.optim.SGD` replaces AdamW, and SGD has no `betas`.
    """
    typed = {override_key(override) for override in overrides}
    for group in ("optimizer", "scheduler"):
        node = config.get(group)
        if f"{group}._target_" not in typed or not is_node(node):
            continue
        try:
            known = {*schema(locate(str(node["_target_"]))), "_target_"}
        except ValueError:
            continue  # another check reports it
        with open_dict(node):
            for key in [key for key in node if key not in known and f"{group}.{key}" not in typed]:
                del node[key]


def complete_tokenizers(config: DictConfig) -> None:
    """Set the key `FIRST_TOKEN` of each tokenizer that lacks it to null, which is its default.

    Therefore a run's config without this key is one of an earlier version, for which the key is false.
    """
    for _, node in iter_nodes(config):
        if current_target(str(node["_target_"])) in PRETRAINED_TOKENIZERS and FIRST_TOKEN not in node:
            with open_dict(node):
                node[FIRST_TOKEN] = None


@cache
def default_values(command: str) -> Mapping[str, Any]:
    """Return the default values of a command by dotted key. This function may be called inside a Hydra job."""
    running = GlobalHydra.instance().hydra
    GlobalHydra.instance().hydra = None
    try:
        with hydra.initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
            return MappingProxyType(flatten(to_plain(hydra.compose(command))))
    finally:
        GlobalHydra.instance().hydra = running
