"""From plain values to checked config dataclasses, with every fault in one message."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mmforget.errors import ConfigError, unknown
from mmforget.options import default_of, faults

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
    found = _unknown_keys(config_type, values, path)
    schema = writable(config_type)
    for key, value in values.items():
        if any(fault.startswith(f"unknown key '{path}.{key}") for fault in found):
            continue
        try:
            schema = OmegaConf.merge(schema, {key: value})  # type: ignore[assignment]
        except OmegaConfBaseException as error:
            place = f"{path}.{error.full_key or key}"
            found.append(f"{place}: {str(error).strip().splitlines()[0]}")
    made = OmegaConf.to_object(schema)
    found += faults(made, path)
    if found:
        raise ConfigError(found)
    return made  # type: ignore[return-value]


def _unknown_keys(config_type: Any, values: Mapping[str, Any], path: str) -> list[str]:
    """Return a fault for every key, nested ones included, that a config dataclass does not have."""
    found = []
    known = {item.name: item for item in fields(config_type)}
    for key, value in values.items():
        if key not in known:
            names = [f"{path}.{name}" for name in known]
            found.append(unknown("key", f"{path}.{key}", names, "mmforget show"))
            continue
        default = default_of(known[key])
        if is_dataclass(default) and isinstance(value, Mapping):
            found += _unknown_keys(default, value, f"{path}.{key}")
    return found


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
