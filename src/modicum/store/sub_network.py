"""A saved adapter with another sub-network active: the same numbers, another configuration."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

from modicum.errors import ConfigError
from modicum.store.atomic import write_folder

if TYPE_CHECKING:
    from pathlib import Path

    from modicum.adapters.elastic import SubNetwork

_CONFIG = "adapter_config.json"


def with_sub_network(adapter: Path, target: Path, sub_network: SubNetwork | None) -> None:
    """Writes the PEFT folder `adapter` to `target`, where `sub_network` is active on loading; None: all of it.

    Raises:
        ConfigError: `adapter` holds no elastic adapter, or `target` exists.
    """
    file = adapter / _CONFIG
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if "sub_network" not in config:
        raise ConfigError(f"{adapter} holds no adapter with sub-networks")
    if target.exists():
        raise ConfigError(f"{target} exists already; choose another folder")
    config["sub_network"] = None if sub_network is None else sub_network.as_dict()

    def fill(folder: Path) -> None:
        for source in adapter.iterdir():
            if source.is_file():
                shutil.copyfile(source, folder / source.name)
        (folder / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")

    write_folder(target, fill)
