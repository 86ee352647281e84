"""The YAML files of `configs/` by group and name; imports neither torch nor Hydra."""

from importlib.resources import files
from pathlib import Path


def config_root() -> Path:
    """Return the folder of the shipped YAML files."""
    return Path(str(files("mmforget.configs"))).resolve()


def config_names(group: str, config_dir: Path | None = None) -> list[str]:
    """Return the names in a group, such as `vision/demo` in `suite`, sorted.

    Args:
        group: A folder of `configs/`: mini, preset, runtime, suite, tracker.
        config_dir: A user's own folder of the same layout.
    """
    found = set()
    for root in [config_root(), *([config_dir] if config_dir else [])]:
        folder = root / group
        found |= {p.relative_to(folder).with_suffix("").as_posix() for p in folder.rglob("*.yaml")}
    return sorted(found)


def config_file(group: str, name: str, config_dir: Path | None = None) -> Path | None:
    """Return the file of a name, the user's own first; None if there is none."""
    for root in [*([config_dir] if config_dir else []), config_root()]:
        path = root / group / f"{name}.yaml"
        if path.is_file():
            return path
    return None


def presets_of(method: str) -> list[str]:
    """Return the shipped presets of a method, such as `vision/mufac/scrub`."""
    short = method.rpartition("/")[2]
    return [name for name in config_names("preset") if name.rpartition("/")[2] == short]
