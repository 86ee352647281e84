"""Config fields that carry their own help, choices and range.

A component's config is a frozen dataclass whose fields are made with `option`. The same field
serves the schema (`mmforget show`), the check (`validate`) and the code that reads it.
"""

from dataclasses import MISSING, Field, field, fields, is_dataclass
from typing import Any

from mmforget.errors import unknown


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    low: float | None = None,
    high: float | None = None,
) -> Any:
    """Return a dataclass field with a default, a help line and what it accepts.

    Args:
        default: The default; a list or dict is copied for each instance.
        help: One line: meaning, unit, source.
        choices: Accepted strings.
        low: Smallest accepted number, inclusive.
        high: Largest accepted number, inclusive.
    """
    metadata = {"help": help, "choices": choices, "low": low, "high": high}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def default_of(item: "Field[Any]") -> Any:
    """Return a field's default value."""
    return item.default_factory() if item.default_factory is not MISSING else item.default


def faults(config: Any, path: str = "") -> list[str]:
    """Return every fault of a config dataclass: values outside their choices or range.

    Args:
        config: The dataclass instance, nested ones included.
        path: Its dotted place, such as "method", for the messages.
    """
    found = []
    for item in fields(config):
        value, name = getattr(config, item.name), f"{path}.{item.name}".lstrip(".")
        if is_dataclass(value):
            found += faults(value, name)
            continue
        choices = item.metadata.get("choices")
        low, high = item.metadata.get("low"), item.metadata.get("high")
        if choices and value is not None and value not in choices:
            found.append(unknown(f"value for {name}:", str(value), choices, "mmforget show"))
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if low is not None and not value >= low:
                found.append(f"{name}={value} is too small: at least {low}")
            if high is not None and not value <= high:
                found.append(f"{name}={value} is too large: at most {high}")
    return found
