"""`list` and `show`: what exists, and everything one entry says of itself."""

import ast
import importlib.util
import inspect
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from mmforget.catalogue import config_file, config_names, presets_of
from mmforget.cli.base import ConfigDir, Json, Plugins, aligned, say, say_json, verb
from mmforget.errors import ConfigError, unknown
from mmforget.registry import BENCHMARKS, METHODS, REGISTRIES, load_plugins

FILES = ("presets", "suites")
KINDS = (*REGISTRIES, *FILES)

Kind = Annotated[str | None, typer.Argument(metavar="[KIND]", help=", ".join(KINDS))]
Pattern = Annotated[str, typer.Argument(metavar="[PATTERN]", help="Shell wildcard on names.")]
Name = Annotated[
    str, typer.Argument(metavar="KIND/NAME", help="Such as method/npo or benchmark/vision/mufac.")
]


@verb("list", "mmforget list methods 'vision/*'")
def list_entries(
    kind: Kind = None,
    pattern: Pattern = "*",
    plugin: Plugins = None,
    config_dir: ConfigDir = None,
    json: Json = False,
) -> None:
    """List methods, benchmarks, metrics, attacks, presets."""
    load_plugins(tuple(plugin or ()))
    kinds = KINDS if kind is None else (_kind(kind),)
    found = {each: _entries(each, pattern, config_dir) for each in kinds}
    if not any(found.values()):
        raise ConfigError(f"nothing matches {pattern!r}. See: mmforget list {kind or ''}".rstrip())
    if json:
        say_json({k: [{"name": n, "summary": s} for n, s in rows] for k, rows in found.items()})
    elif kind is not None:
        say(aligned(found[kinds[0]]))
    else:
        say("\n\n".join(f"{k}\n{aligned(rows, '  ')}" for k, rows in found.items() if rows))


@verb("show", "mmforget show method/npo")
def show(
    name: Name, plugin: Plugins = None, config_dir: ConfigDir = None, json: Json = False
) -> None:
    """Show one entry: options, citation, an example."""
    load_plugins(tuple(plugin or ()))
    kind, full = _find(name, config_dir)
    content = _file(kind, full, config_dir) if kind in FILES else _component(kind, full)
    if json:
        say_json(content)
    else:
        say(_page(content))


def _kind(word: str) -> str:
    """Return a kind given in singular or plural.

    Raises:
        ConfigError: There is no such kind.
    """
    for kind in KINDS:
        if word in (kind, kind.removesuffix("s")):
            return kind
    raise ConfigError(unknown("kind", word, KINDS, "mmforget list --help"))


def _entries(kind: str, pattern: str, config_dir: Path | None) -> list[tuple[str, str]]:
    if kind in FILES:
        names = config_names(kind.removesuffix("s"), config_dir)
        return [(name, _comment(kind, name, config_dir)) for name in names if _fits(name, pattern)]
    registry = REGISTRIES[kind]
    return [(name, _summary(registry.target(name))) for name in registry.names(pattern)]


def _fits(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name.rpartition("/")[2], pattern)


def _find(name: str, config_dir: Path | None) -> tuple[str, str]:
    """Return kind and full name of what `KIND/NAME` or a bare name means."""
    head, _, rest = name.partition("/")
    if head in KINDS or f"{head}s" in KINDS:
        kind = _kind(head)
        if kind not in FILES:
            return kind, REGISTRIES[kind].resolve(rest)
        known = config_names(kind.removesuffix("s"), config_dir)
        if rest in known:
            return kind, rest
        raise ConfigError(unknown(kind.removesuffix("s"), rest, known, f"mmforget list {kind}"))
    found = [(kind, name) for kind, registry in REGISTRIES.items() if name in registry]
    if len(found) == 1:
        return found[0]
    every = [f"{kind[:-1]}/{entry}" for kind, registry in REGISTRIES.items() for entry in registry]
    raise ConfigError(unknown("entry", name, every, "mmforget list"))


def _summary(target: Any) -> str:
    """Return the first line of a class's docstring; a lazy one is read, not imported."""
    if not isinstance(target, str):
        return _first(inspect.getdoc(target))
    module, _, name = target.partition(":")
    return _first(_docstrings(module).get(name))


@cache
def _docstrings(module: str) -> dict[str, str | None]:
    """Return the docstring of each class of a module, by parsing its source."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        return {}
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    return {node.name: ast.get_docstring(node) for node in classes}


def _first(text: str | None) -> str:
    return (text or "").partition("\n\n")[0].replace("\n", " ")


def _comment(kind: str, name: str, config_dir: Path | None) -> str:
    """Return the first comment of a YAML file that says something."""
    path = config_file(kind.removesuffix("s"), name, config_dir)
    lines = path.read_text().splitlines() if path else []
    said = (line.lstrip("# ") for line in lines if line.startswith("#"))
    return next((line for line in said if line and not line.startswith("@package")), "")


def _file(kind: str, name: str, config_dir: Path | None) -> dict[str, Any]:
    path = config_file(kind.removesuffix("s"), name, config_dir)
    assert path is not None  # _find looked it up
    word = "suite" if kind == "suites" else "preset"
    example = f"mmforget run {word}={name}"
    if kind == "presets":
        benchmark, _, method = name.rpartition("/")
        example = f"mmforget run benchmark={benchmark.removesuffix('/mini')} method={method}"
        example += f" preset={name}"
    return {"kind": word, "name": name, "text": path.read_text(), "example": example}


def _component(kind: str, name: str) -> dict[str, Any]:
    cls = REGISTRIES[kind].get(name)
    describe = {
        "methods": _method,
        "benchmarks": _benchmark,
        "attacks": _attack,
        "metrics": _metric,
    }[kind]
    return {
        "kind": kind.removesuffix("s"),
        "name": name,
        "description": inspect.getdoc(cls) or "",
        "citation": cls.citation,
        **describe(name, cls),
    }


def _method(name: str, cls: Any) -> dict[str, Any]:
    served = cls.modalities
    return {
        "intent": cls.intent,
        "reads": sorted(cls.reads),
        "trains": cls.trains,
        "holds": cls.holds,
        "modalities": sorted(served) if served is not None else ["all"],
        "options": list(_options(cls.config_type, "method")),
        "presets": presets_of(name),
        "example": f"mmforget run benchmark={_some_benchmark(served)} method={_short(name)}",
    }


def _benchmark(name: str, cls: Any) -> dict[str, Any]:
    modality = name.partition("/")[0]
    serving = [m for m in METHODS.names() if "/" not in m or m.startswith(f"{modality}/")]
    sections = {
        "benchmark": cls.config_type,
        "data": cls.data_type,
        "model": cls.model_type,
        "request": cls.request_type,
    }
    return {
        "metrics": list(cls.metrics),
        "attacks": list(cls.attacks),
        "headline": list(cls.headline),
        "distance": cls.distance,
        "options": [o for place, schema in sections.items() for o in _options(schema, place)],
        "methods": [_short(method) for method in serving],
        "presets": [preset for preset in config_names("preset") if preset.startswith(f"{name}/")],
        "example": f"mmforget run benchmark={name} method=finetune",
    }


def _attack(name: str, cls: Any) -> dict[str, Any]:
    budget = asdict(cls(cls.config_type()).budget())
    short = _short(name)
    modality = {name.partition("/")[0]} if "/" in name else None
    benchmark = _some_benchmark(modality)
    return {
        "access": cls.access,
        "needs": sorted(cls.needs),
        "budget": {key: value for key, value in budget.items() if value is not None},
        "options": list(_options(cls.config_type, f"attack.{short}")),
        "example": f"mmforget run benchmark={benchmark} method=finetune attack={short}",
    }


def _metric(name: str, cls: Any) -> dict[str, Any]:
    modality = {name.partition("/")[0]} if "/" in name else None
    benchmark = _some_benchmark(modality)
    return {
        "needs": sorted(cls.needs),
        "example": f"mmforget run benchmark={benchmark} method=finetune metrics={_short(name)}",
    }


def _short(name: str) -> str:
    return name.rpartition("/")[2]


def _some_benchmark(modalities: "frozenset[str] | set[str] | None") -> str:
    names = [b for b in BENCHMARKS if modalities is None or b.partition("/")[0] in modalities]
    return "vision/mufac" if "vision/mufac" in names else next(iter(names), "NAME")


def _options(schema: type, place: str) -> Iterator[dict[str, Any]]:
    """Yield the options of a config dataclass, those of nested ones by dotted keys."""
    yield from _values(schema(), place)


def _values(config: Any, place: str) -> Iterator[dict[str, Any]]:
    hints = get_type_hints(type(config))
    for item in fields(config):
        value, key = getattr(config, item.name), f"{place}.{item.name}"
        if is_dataclass(value):
            yield from _values(value, key)
            continue
        hint = hints[item.name]
        plain = isinstance(hint, type) and not hasattr(hint, "__args__")
        yield {
            "key": key,
            "type": hint.__name__ if plain else str(hint).replace("typing.", ""),
            "default": value,
            "choices": item.metadata.get("choices"),
            "low": item.metadata.get("low"),
            "high": item.metadata.get("high"),
            "help": item.metadata.get("help", ""),
        }


def _accepts(option: dict[str, Any]) -> str:
    low, high = option["low"], option["high"]
    if option["choices"]:
        return " | ".join(option["choices"])
    if low is not None and high is not None:
        return f"{low} to {high}"
    return f">= {low}" if low is not None else f"<= {high}" if high is not None else ""


def _shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value) if value == "" else str(value)


def _page(content: dict[str, Any]) -> str:
    """Return an entry as text: what it is, what it says of itself, its options, an example."""
    parts = [f"{content['kind']} {content['name']}"]
    parts += [content[key].rstrip() for key in ("description", "text") if content.get(key)]
    facts = [
        (key, _listed(value))
        for key, value in content.items()
        if key not in ("kind", "name", "description", "text", "options", "example")
    ]
    if facts:
        parts.append(aligned(facts))
    if content.get("options"):
        head = ("option", "type", "default", "accepts", "meaning")
        rows = [
            (o["key"], o["type"], _shown(o["default"]), _accepts(o), o["help"])
            for o in content["options"]
        ]
        parts.append(aligned([head, *rows]))
    return "\n\n".join([*parts, f"example: {content['example']}"])


def _listed(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(value) or "none"
    return str(value).replace("\n", " ")
