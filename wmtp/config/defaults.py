"""Differences between a config and the default config of its command."""

from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from wmtp.config.flatten import flatten
from wmtp.config.schema import CONFIG_FOLDER, to_plain


def changed_keys(config: DictConfig, command: str) -> dict[str, list[Any]]:
    """Return `[default, value]` for each dotted key whose value is not the default. A missing key is None."""
    before, now = (flatten(to_plain(each)) for each in (default_config(command), config))
    keys = [*now, *(key for key in before if key not in now)]
    return {key: [before.get(key), now.get(key)] for key in keys if before.get(key) != now.get(key)}


def default_config(command: str) -> DictConfig:
    """Compose the config of a command without overrides. This function may be called inside a Hydra job."""
    running = GlobalHydra.instance().hydra
    GlobalHydra.instance().hydra = None
    try:
        with hydra.initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
            return hydra.compose(command)
    finally:
        GlobalHydra.instance().hydra = running
