"""From command-line words or a YAML file to a checked plan of one run.

Hydra's compose API merges YAML groups (`configs/`) and overrides; nothing else of Hydra is used.
A YAML value names a registry entry and never a callable; the entry's dataclass is the schema, so
unknown keys and wrong types are found before anything is loaded, all of them in one message.

A field of the request may be written without its section: `split=forget5`.

Order of precedence, later wins: schema defaults, `mini/<benchmark>` (for data=mini), the preset
of benchmark and method, named groups (`runtime=`, `tracker=`), and the words typed.
"""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mmforget.catalogue import config_file, config_names, config_root
from mmforget.engine import Runtime
from mmforget.errors import ConfigError, unknown
from mmforget.record import Seeds
from mmforget.registry import ATTACKS, BENCHMARKS, METHODS, METRICS, Registry
from mmforget.schema import instantiate
from mmforget.types import Attack, Benchmark, UnlearningMethod

SELECTORS = ("benchmark", "method", "data", "model")
GROUPS = ("runtime", "tracker", "preset")
LISTS = ("attack", "metrics")  # a comma list of these is one run's list and no sweep
SECTIONS = (*SELECTORS, "request", "attack", "metrics", "reference", "seeds", "runtime")


@dataclass(frozen=True)
class Plan:
    """One run, checked: every name exists and every value has the right type and range.

    Attributes:
        benchmark: Registry name; likewise `method`.
        sections: Config instances: benchmark, data, model, request, method.
        attacks: Attack registry name -> config instance.
        metrics: Registry names of metrics.
        seeds: Training, unlearning and evaluation seeds.
        reference: Whether the retrained model is made.
        runtime: How to run.
        presets: YAML files that set values, for the record.
    """

    benchmark: str
    method: str
    sections: Mapping[str, Any]
    attacks: Mapping[str, Any]
    metrics: tuple[str, ...]
    seeds: Seeds
    reference: bool
    runtime: Runtime
    presets: tuple[str, ...] = ()
    overrides: tuple[str, ...] = field(default=(), compare=False)

    @property
    def modality(self) -> str:
        """The benchmark's modality."""
        return self.benchmark.partition("/")[0]

    def resolved(self) -> dict[str, Any]:
        """Return the whole config as plain values; `from_mapping` takes it back."""
        names = {"benchmark": self.benchmark, "method": self.method}
        sections = {
            name: ({"name": names[name]} if name in names else {}) | asdict(section)
            for name, section in self.sections.items()
        }
        return {
            **sections,
            "attack": {name: asdict(config) for name, config in self.attacks.items()},
            "metrics": list(self.metrics),
            "reference": self.reference,
            "seeds": asdict(self.seeds),
            "runtime": asdict(self.runtime),
            "presets": list(self.presets),
        }

    def with_method(self, method: str) -> "Plan":
        """Return the same plan for a method without options, at its default config.

        The unlearning seed is set to 0, because rows made so do not depend on it.
        """
        cls = METHODS.get(method)
        sections = {**self.sections, "method": cls.config_type()}
        seeds = replace(self.seeds, unlearn=0)
        return replace(self, method=method, sections=sections, seeds=seeds, presets=())


def expand(words: Sequence[str], config_dir: Path | None = None) -> list[list[str]]:
    """Return the plain override lists of a sweep: one for each combination of comma lists.

    `suite=NAME` stands for the words listed in `configs/suite/NAME.yaml`, before the others.
    `attack=a,b` and `metrics=a,b` are lists of one run, not sweeps.

    Raises:
        ConfigError: A word that is no override, or an unknown suite.
    """
    parsed = _parse(_unsuite(words, config_dir))
    choices: list[list[str]] = []
    for override in _last_wins(parsed):
        line = override.input_line or ""
        if override.is_sweep_override() and override.key_or_group not in LISTS:
            if not override.is_choice_sweep():
                raise ConfigError(f"{line}: sweeps are comma lists, such as seed=0,1,2")
            key = override.get_key_element()
            choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            choices.append([line])
    return [list(combination) for combination in itertools.product(*choices)]


def plan(words: Sequence[str], config_dir: Path | None = None) -> Plan:
    """Return the checked plan of one run from override words without sweeps.

    Raises:
        ConfigError: Every fault at once.
    """
    parsed = list(_last_wins(_parse(words)))
    named = {o.key_or_group: str(o.value()) for o in parsed if _selects(o)}
    benchmark, method = _entries(named)
    parsed = list(_last_wins(_requested(parsed, benchmark)))
    base: dict[str, Any] = {"benchmark": {"name": benchmark}, "method": {"name": method}}
    if "data" in named:
        base["data"] = {"source": named["data"]}
    if "model" in named:
        base["model"] = {"name": named["model"]}
    source = named.get("data") or _value(parsed, "data.source") or "mini"
    groups, presets = _groups(named, benchmark, method, source, config_dir)
    merged = _compose(base, groups, parsed, config_dir)
    merged.setdefault("data", {}).setdefault("source", source)
    return replace(_listed(merged, parsed, None), presets=presets, overrides=tuple(words))


def from_mapping(values: Mapping[str, Any]) -> Plan:
    """Return the checked plan of a resolved config, such as a run's `config.yaml`.

    Raises:
        ConfigError: Every fault at once.
    """
    found = []
    for key in values:
        if key not in (*SECTIONS, "seed", "presets"):
            found.append(unknown("key", key, (*SECTIONS, "seed"), "mmforget run --help"))
    benchmark, method = _entries(values)
    modality = benchmark.partition("/")[0]
    bench: type[Benchmark] = BENCHMARKS.get(benchmark)
    chosen: type[UnlearningMethod[Any]] = METHODS.get(method)
    types = {
        "benchmark": bench.config_type,
        "data": bench.data_type,
        "model": bench.model_type,
        "request": bench.request_type,
        "method": chosen.config_type,
    }
    sections = {}
    for name, config_type in types.items():
        section = {
            k: v for k, v in _section(values, name).items() if k != "name" or name == "model"
        }
        sections[name] = _collect(found, config_type, section, name)
    attacks = {}
    for name, section in _section(
        {"attack": dict.fromkeys(bench.attacks), **values}, "attack"
    ).items():
        full = _resolve(found, ATTACKS, name, modality)
        if full is not None:
            attack: type[Attack[Any]] = ATTACKS.get(full)
            attacks[full] = _collect(found, attack.config_type, section or {}, f"attack.{name}")
    asked = [_resolve(found, METRICS, m, modality) for m in values.get("metrics", bench.metrics)]
    metrics = tuple(name for name in asked if name is not None)
    seed_values = dict(_section(values, "seeds"))
    if "seed" in values:
        seed_values["unlearn"] = values["seed"]
    seeds = _collect(found, Seeds, seed_values, "seeds")
    runtime = _collect(found, Runtime, _section(values, "runtime"), "runtime")
    reference = values.get("reference", True)
    if not isinstance(reference, bool):
        found.append(f"reference={reference!r}: true or false")
    if found:
        raise ConfigError(found)
    return Plan(
        benchmark=benchmark,
        method=method,
        sections=sections,
        attacks=attacks,
        metrics=metrics,
        seeds=seeds,
        reference=reference,
        runtime=runtime,
        presets=tuple(values.get("presets", ())),
    )


def load_config(path: Path, words: Sequence[str] = ()) -> Plan:
    """Return the plan of a resolved config file, with override words on top.

    Raises:
        ConfigError: No such file, no YAML mapping, or faults in it.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}. Give a run's config.yaml") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path} is no YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path} holds no mapping. Give a run's config.yaml")
    parsed = list(_last_wins(_parse(words)))
    for override in parsed:
        if _selects(override):
            raise ConfigError(f"{override.input_line}: --config fixes it; change single keys only")
    known = list(_section(values, "attack")) if "attack" in values else None
    values["attack"] = {**_mini_attacks(values), **_section(values, "attack")}
    return _listed(_compose(literal(values), [], parsed, None), parsed, known)


def _mini_attacks(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that attacks have on a benchmark's mini world, if a config is of one."""
    name, source = _section(values, "benchmark").get("name"), _section(values, "data").get("source")
    path = config_file("mini", str(name)) if source == "mini" else None
    if path is None:
        return {}
    return dict(_section(yaml.safe_load(path.read_text()), "attack"))


def literal(value: Any) -> Any:
    """Return a value in which `${` is text to OmegaConf, not the start of an interpolation."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    if isinstance(value, Mapping):
        return {key: literal(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [literal(item) for item in value]
    return value


def _parse(words: Iterable[str]) -> list[Override]:
    found, parsed = [], []
    parser = OverridesParser.create()
    for word in words:
        try:
            (override,) = parser.parse_overrides([word])
        except HydraException as error:
            found.append(f"{word!r}: {str(error).splitlines()[0]}. Write key=value")
            continue
        if override.is_delete():
            found.append(f"{word!r}: keys cannot be deleted. Write key=value")
        parsed.append(override)
    if found:
        raise ConfigError(found)
    return parsed


def _last_wins(parsed: Iterable[Override]) -> Iterable[Override]:
    """Return overrides, earlier ones of a key dropped: so a suite's words can be changed."""
    return {override.key_or_group: override for override in parsed}.values()


def _requested(parsed: Iterable[Override], benchmark: str) -> Iterable[Override]:
    """Return overrides with `split=forget5` written out: a field of the request may stand alone."""
    known = {item.name for item in fields(BENCHMARKS.get(benchmark).request_type)}
    for override in parsed:
        if override.key_or_group in known - {*SECTIONS, *GROUPS, "seed"}:
            (override,) = _parse([f"request.{(override.input_line or '').lstrip('+')}"])
        yield override


def _selects(override: Override) -> bool:
    """Return whether an override names an entry (`method=npo`) and is no value (`method.lr=1`)."""
    return override.key_or_group in (*SELECTORS, *GROUPS) and isinstance(override.value(), str)


def _names(override: Override) -> list[str]:
    """Return the names of `attack=a,b`, `attack=[a,b]`, `attack=a` or `attack=none`."""
    if override.is_sweep_override():
        if not override.is_choice_sweep():
            raise ConfigError(f"{override.input_line}: a comma list of names is needed")
        return [str(name) for name in override.sweep_iterator()]
    value = override.value()
    if isinstance(value, list):
        return [str(name) for name in value]
    return [] if value in (None, "none") else [str(value)]


def _resolve(
    found: list[str], registry: Registry[Any], name: object, modality: str | None
) -> str | None:
    try:
        return registry.resolve(str(name), modality)
    except ConfigError as error:
        found.extend(error.faults)
        return None


def _entries(values: Mapping[str, Any]) -> tuple[str, str]:
    """Return the full names of benchmark and method; a method must serve the modality."""
    benchmark, method = (_section(values, kind).get("name") for kind in ("benchmark", "method"))
    found: list[str] = []
    full = None
    if benchmark is None:
        found.append("no benchmark named. Say benchmark=NAME. See: mmforget list benchmarks")
    else:
        full = _resolve(found, BENCHMARKS, benchmark, None)
    chosen = None
    if method is None:
        found.append("no method named. Say method=NAME. See: mmforget list methods")
    elif full is not None or not METHODS.names(str(method)):
        chosen = _resolve(found, METHODS, method, full and full.partition("/")[0])
    if full is None or chosen is None:
        raise ConfigError(found)
    served = METHODS.get(chosen).modalities
    modality = full.partition("/")[0]
    if served is not None and modality not in served:
        raise ConfigError(
            f"method {chosen} serves {', '.join(sorted(served))}; {full} is {modality}. "
            f"See: mmforget list methods"
        )
    return full, chosen


def _listed(
    merged: dict[str, Any], parsed: Sequence[Override], attacks: Sequence[str] | None
) -> Plan:
    """Return the plan of a merged config, with the attacks and metrics that were typed.

    Args:
        merged: The config; `attack` may hold values of attacks that are not among the chosen.
        parsed: The words typed.
        attacks: The attacks if none are typed; None: those of the benchmark's protocol.
    """
    lists = {o.key_or_group: _names(o) for o in parsed if o.key_or_group in LISTS}
    benchmark, _ = _entries(merged)
    modality = benchmark.partition("/")[0]
    default = BENCHMARKS.get(benchmark).attacks if attacks is None else attacks
    found: list[str] = []
    chosen = [_resolve(found, ATTACKS, name, modality) for name in lists.get("attack", default)]
    tuned: dict[str, Any] = {}
    for name, section in _section(merged, "attack").items():
        full = _resolve(found, ATTACKS, name, modality)
        typed = any(str(o.key_or_group).startswith(f"attack.{name}.") for o in parsed)
        if full is not None and typed and full not in chosen:
            named = ",".join(name for name in chosen if name) or "none"
            found.append(f"attack.{name} is set, but attack={named} leaves it out")
        elif full is not None:
            tuned[full] = {**tuned.get(full, {}), **(section or {})}  # of both its names
    values = {**merged, "attack": {name: tuned.get(name) for name in chosen if name is not None}}
    if "metrics" in lists:
        values["metrics"] = lists["metrics"]
    try:
        made = from_mapping(values)
    except ConfigError as error:
        raise ConfigError([*found, *error.faults]) from error
    if found:
        raise ConfigError(found)
    return made


def _value(parsed: Iterable[Override], key: str) -> str | None:
    return next((str(o.value()) for o in parsed if o.key_or_group == key), None)


def _groups(
    named: Mapping[str, str], benchmark: str, method: str, source: str, config_dir: Path | None
) -> tuple[list[str], tuple[str, ...]]:
    """Return Hydra's group choices of a run, and the names of those that set values."""
    chosen = []
    if source == "mini" and config_file("mini", benchmark, config_dir):
        chosen.append(f"mini={benchmark}")
    preset = named.get("preset")
    if preset is None:
        place = f"{benchmark}/mini" if source == "mini" else benchmark
        auto = f"{place}/{method.rpartition('/')[2]}"
        preset = auto if config_file("preset", auto, config_dir) else "none"
    elif preset != "none" and not config_file("preset", preset, config_dir):
        names = config_names("preset", config_dir)
        raise ConfigError(unknown("preset", preset, names, "mmforget list presets"))
    if preset != "none":
        chosen.append(f"preset={preset}")
    for group in ("runtime", "tracker"):
        if group in named:
            if not config_file(group, named[group], config_dir):
                names = config_names(group, config_dir)
                raise ConfigError(unknown(group, named[group], names, "mmforget run --help"))
            chosen.append(f"{group}={named[group]}")
    return [f"+{choice}" for choice in chosen], tuple(chosen)


def _compose(
    base: Mapping[str, Any],
    groups: Sequence[str],
    values: Sequence[Override],
    config_dir: Path | None,
) -> dict[str, Any]:
    """Merge names, groups and overrides with Hydra; every key is added or replaced."""
    from hydra.core.config_store import ConfigStore

    package = "pkg://mmforget.configs"
    node = {"request": {}, **base, "hydra": {"searchpath": [package]}}
    ConfigStore.instance().store(name="mmforget_run", node=node)
    typed = [o for o in values if not _selects(o) and o.key_or_group not in LISTS]
    words = []
    for override in typed:
        if override.key_or_group == "request" and isinstance(override.value(), dict):
            words.append("~request")  # a whole request replaces a mini world's, it is not merged
        words.append(f"++{(override.input_line or '').lstrip('+')}")
    place = config_dir.resolve() if config_dir else config_root()
    if not place.is_dir():
        raise ConfigError(f"--config-dir {config_dir}: no such folder")
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(place), version_base="1.3"):
            composed = compose("mmforget_run", overrides=[*groups, *words])
        merged = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(str(error).strip().splitlines()[0]) from error
    assert isinstance(merged, dict)
    return {str(key): value for key, value in merged.items() if key != "hydra"}


def _unsuite(words: Sequence[str], config_dir: Path | None) -> list[str]:
    named = [word for word in words if word.startswith("suite=")]
    rest = [word for word in words if not word.startswith("suite=")]
    if not named:
        return rest
    name = named[-1].partition("=")[2]
    path = config_file("suite", name, config_dir)
    if path is None:
        names = config_names("suite", config_dir)
        raise ConfigError(unknown("suite", name, names, "mmforget list suites"))
    return [str(word) for word in yaml.safe_load(path.read_text())["words"]] + rest


def _section(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = values.get(name) or {}
    if isinstance(section, str) and name in ("benchmark", "method"):
        return {"name": section}
    if not isinstance(section, Mapping):
        raise ConfigError(f"{name}={section!r}: a mapping of keys is needed, such as {name}.key=…")
    return dict(section)


def _collect(found: list[str], config_type: type, section: Mapping[str, Any], name: str) -> Any:
    try:
        return instantiate(config_type, literal(section), name)
    except ConfigError as error:
        found.extend(error.faults)
        return config_type()
