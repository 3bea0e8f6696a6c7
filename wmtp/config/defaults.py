"""What a config changes of what the command would compose by itself."""

from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from wmtp.config.flatten import flat
from wmtp.config.schema import CONFIG_FOLDER, plain


def changes(config: DictConfig, command: str) -> dict[str, list[Any]]:
    """By dotted key, the default and the value of whatever differs; None where a key is not there."""
    before, now = (flat(plain(each)) for each in (default_config(command), config))
    keys = [*now, *(key for key in before if key not in now)]
    return {key: [before.get(key), now.get(key)] for key in keys if before.get(key) != now.get(key)}


def default_config(command: str) -> DictConfig:
    """A command's config without any override; also inside one of Hydra's jobs."""
    running = GlobalHydra.instance().hydra
    GlobalHydra.instance().hydra = None
    try:
        with hydra.initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
            return hydra.compose(command)
    finally:
        GlobalHydra.instance().hydra = running
