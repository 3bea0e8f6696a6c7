"""Removal of a preset's values that are for another option of a config group than the one that the user chose."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf, open_dict

from wmtp.config.flatten import flatten
from wmtp.config.groups import group_options, is_group
from wmtp.config.schema import CONFIG_FOLDER

EXPERIMENT = "experiment@_global_"
"""Key of the override that chooses a preset."""
STAGE = "pretrain"
"""The config group whose option follows from that of `algo`."""
ABSENT, NOTHING_IN_COMMON = object(), object()


def drop_preset_values(command: str, overrides: Sequence[str], composed: DictConfig) -> list[str]:
    """Remove values of the preset from a composed config, and return a message for each group of removed values.

    If the user chose another option of a config group than the preset, a value of the preset for this group is removed
    if the two options differ in its key. If the class of stage 1 is another one, all values for stage 1 are removed.
    Values that the user typed are never removed.

    This function must be called while Hydra is initialized.

    Args:
        command: name of the command.
        overrides: the overrides in Hydra's syntax from which the config was composed.
        composed: the composed config with Hydra's settings. It is changed.
    """
    chosen = dict(override.split("=", 1) for override in overrides if "=" in override)
    preset = chosen.get(EXPERIMENT, "").strip("'\"")
    typed = {group for group in chosen if is_group(group)}
    if not typed or preset not in group_options("experiment"):
        return []
    groups = set(preset_keys(preset)) & {*typed, STAGE}
    if not groups:
        return []
    options_before, before = preset_options(command, preset)
    options = dict(composed.hydra.runtime.choices)
    others = [override for override in overrides if not override.startswith(f"{EXPERIMENT}=")]
    without = _compose_options(command, options, others)
    notes = []
    for group in sorted(groups):
        is_other_class = _target(without[group]) != _target(before[group])
        if options[group] == options_before[group] or (group == STAGE and not is_other_class):
            continue
        dropped: list[str] = []
        old = NOTHING_IN_COMMON if group == STAGE else before[group]
        values = keep_common(_plain(composed[group]), without[group], old, group, dropped)
        with open_dict(composed):
            composed[group] = values
        if dropped:
            option = "none" if without[group] is None else options[group]
            notes.append(
                f"experiment={preset} sets {', '.join(dropped)} for {group}={options_before[group]}; "
                f"{'this is' if len(dropped) == 1 else 'these are'} not used with {group}={option}"
            )
    return notes


def keep_common(values: Any, chosen: Any, before: Any, key: str, dropped: list[str]) -> Any:
    """Return the values of the chosen option, with those values of a preset for which both options are the same.

    Args:
        values: the values of the chosen option, changed by the preset.
        chosen: the values of the chosen option.
        before: the values of the preset's option.
        key: dotted key of the values.
        dropped: list to which the keys of all other values of the preset are appended.
    """
    if isinstance(values, Mapping) and isinstance(chosen, Mapping):
        old = before if isinstance(before, Mapping) else dict.fromkeys(values, before)
        names = dict.fromkeys([*chosen, *values])
        merged = {
            name: keep_common(
                values.get(name, ABSENT), chosen.get(name, ABSENT), old.get(name, ABSENT), f"{key}.{name}", dropped
            )
            for name in names
        }
        return {name: value for name, value in merged.items() if value is not ABSENT}
    if values == chosen or values is ABSENT:
        return chosen
    if chosen == before:
        return values
    dropped += flatten({key: values}) if chosen is None else [key]
    return chosen


@cache
def preset_options(command: str, preset: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the option of each config group in a preset, and the config that consists of only these options."""
    composed = hydra.compose(command, [f"{EXPERIMENT}={preset}"], return_hydra_config=True)
    options = dict(composed.hydra.runtime.choices)
    return options, _compose_options(command, options, [])


def preset_keys(preset: str) -> Iterator[str]:
    """Yield the keys at the top level of a preset, and those of the presets on which it is based."""
    content = _plain(OmegaConf.load(CONFIG_FOLDER / "experiment" / f"{preset}.yaml"))
    for default in content.get("defaults", []):
        if isinstance(default, str) and default.startswith("/experiment/"):
            yield from preset_keys(default.removeprefix("/experiment/").partition("@")[0])
    yield from map(str, content)


def _compose_options(command: str, options: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return the config with the given options of config groups and with overrides, as dictionaries and lists."""
    typed = {override.partition("=")[0] for override in overrides}
    choices = {group: option for group, option in options.items() if is_group(group) and group not in typed}
    if choices.get(STAGE) == options.get("algo"):  # it follows from algo, also without an override
        del choices[STAGE]
    known = [f"{group}={option}" for group, option in choices.items() if option in group_options(group)]
    config: dict[str, Any] = _plain(hydra.compose(command, [*known, *overrides]))
    return config


def _plain(value: Any) -> Any:
    """Return a config value as dictionaries and lists, with interpolations as text."""
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _target(node: Any) -> Any:
    """Return the path of the class of a config node, or None if there is no node."""
    return node.get("_target_") if isinstance(node, Mapping) else None
