"""From plain values to checked config dataclasses, with every fault in one message."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mmforget.errors import ConfigError, unknown
from mmforget.options import faults

ConfigT = TypeVar("ConfigT")


def instantiate(config_type: type[ConfigT], values: Mapping[str, Any], path: str) -> ConfigT:
    """Return a config dataclass filled from plain values, types converted and checked.

    Args:
        config_type: A frozen dataclass made with `mmforget.options.option`.
        values: What to set; the rest keeps its default.
        path: Dotted place in the whole config, for the messages.

    Raises:
        ConfigError: Unknown keys, values of the wrong type or out of range; all of them at once.
    """
    schema = writable(config_type)
    found = []
    for key, value in values.items():
        names = [item.name for item in fields(config_type)]  # type: ignore[arg-type]
        if key not in names:
            found.append(unknown("key", f"{path}.{key}", [f"{path}.{n}" for n in names], "show"))
            continue
        try:
            schema = OmegaConf.merge(schema, {key: value})  # type: ignore[assignment]
        except OmegaConfBaseException as error:
            reason = str(error).strip().splitlines()[0]
            found.append(f"{error.full_key and path + '.' + error.full_key}: {reason}")
    if found:
        raise ConfigError(found)
    made = OmegaConf.to_object(schema)
    found = faults(made, path)
    if found:
        raise ConfigError(found)
    return made  # type: ignore[return-value]


def writable(config_type: type) -> DictConfig:
    """Return the OmegaConf node of a frozen dataclass: keys and types fixed, values not."""
    node = OmegaConf.structured(config_type)
    _unlock(node)
    return node  # type: ignore[no-any-return]


def _unlock(node: Any) -> None:
    OmegaConf.set_readonly(node, False)
    if isinstance(node, DictConfig) and not OmegaConf.is_missing(node, "") and not node._is_none():
        for key in node:
            child = node._get_node(key)
            if isinstance(child, DictConfig):
                _unlock(child)
