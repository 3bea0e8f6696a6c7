"""What a config changes of what the command would compose by itself."""

from collections.abc import Iterator
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from wmtp.config import CONFIG_FOLDER


def changes(config: DictConfig, command: str) -> dict[str, list[Any]]:
    """By dotted key, the default and the value of whatever differs; None where a key is not there."""
    before, now = (dict(_flat(OmegaConf.to_container(c, resolve=True))) for c in (default_config(command), config))
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


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and the values that are no dictionaries; an empty one counts as a value."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else str(name))
    else:
        yield key, value
