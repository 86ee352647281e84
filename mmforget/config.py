"""From command-line words or a YAML file to a checked plan of one run.

Hydra's compose API merges YAML groups (`configs/`) and overrides; nothing else of Hydra is used.
A YAML value names a registry entry and never a callable; the entry's dataclass is the schema, so
unknown keys and wrong types are found before anything is loaded, all of them in one message.

Order of precedence, later wins: schema defaults, `mini/<benchmark>` (for data=mini), the preset
of benchmark and method, named groups (`runtime=`, `tracker=`), and the words typed.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.resources import files
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

from mmforget.engine import Runtime
from mmforget.errors import ConfigError, unknown
from mmforget.record import Seeds
from mmforget.registry import ATTACKS, BENCHMARKS, METHODS, METRICS
from mmforget.schema import instantiate
from mmforget.types import Attack, Benchmark, UnlearningMethod

SELECTORS = ("benchmark", "method", "data", "model")
GROUPS = ("runtime", "tracker", "preset")
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
    `attack=a,b` is a list of attacks of one run, not a sweep.

    Raises:
        ConfigError: A word that is no override, or an unknown suite.
    """
    parsed = _parse(_unsuite(words, config_dir))
    choices: list[list[str]] = []
    for override in _last_wins(parsed):
        line = override.input_line or ""
        if override.is_sweep_override() and override.key_or_group != "attack":
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
    named = {o.key_or_group: _name(o) for o in parsed if _selects(o)}
    if "benchmark" not in named:
        raise ConfigError("no benchmark named. Say benchmark=NAME. See: mmforget list benchmarks")
    if "method" not in named:
        raise ConfigError("no method named. Say method=NAME. See: mmforget list methods")
    benchmark = BENCHMARKS.resolve(named["benchmark"])
    modality = benchmark.partition("/")[0]
    method = METHODS.resolve(named["method"], modality)
    attacks = next((_attack_names(o) for o in parsed if o.key_or_group == "attack"), None)
    base: dict[str, Any] = {"benchmark": {"name": benchmark}, "method": {"name": method}}
    if "data" in named:
        base["data"] = {"source": named["data"]}
    if "model" in named:
        base["model"] = {"name": named["model"]}
    source = named.get("data") or _value(parsed, "data.source") or "mini"
    groups, presets = _groups(named, benchmark, method, source, config_dir)
    values = [o for o in parsed if not _selects(o) and o.key_or_group != "attack"]
    merged = _compose(base, groups, values, config_dir)
    merged.setdefault("data", {}).setdefault("source", source)
    if attacks is not None:
        tuned = merged.get("attack", {})
        merged["attack"] = {name: {} for name in attacks} | _known_attacks(tuned, attacks, modality)
    made = from_mapping(merged)
    return replace(made, presets=presets, overrides=tuple(words))


def from_mapping(values: Mapping[str, Any]) -> Plan:
    """Return the checked plan of a resolved config, such as a run's `config.yaml`.

    Raises:
        ConfigError: Every fault at once.
    """
    found = []
    for key in values:
        if key not in (*SECTIONS, "seed", "presets"):
            found.append(unknown("key", key, (*SECTIONS, "seed"), "mmforget run --help"))
    benchmark = BENCHMARKS.resolve(str(_section(values, "benchmark").get("name")))
    modality = benchmark.partition("/")[0]
    method = METHODS.resolve(str(_section(values, "method").get("name")), modality)
    bench: type[Benchmark] = BENCHMARKS.get(benchmark)
    chosen: type[UnlearningMethod[Any]] = METHODS.get(method)
    if chosen.modalities is not None and modality not in chosen.modalities:
        raise ConfigError(
            f"method {method} serves {', '.join(sorted(chosen.modalities))}; {benchmark} is "
            f"{modality}. See: mmforget list methods"
        )
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
    named = values.get("attack", {name: {} for name in bench.attacks})
    attacks = {}
    for name, section in named.items():
        full = ATTACKS.resolve(name, modality)
        attack: type[Attack[Any]] = ATTACKS.get(full)
        attacks[full] = _collect(found, attack.config_type, section or {}, f"attack.{name}")
    metrics = tuple(
        METRICS.resolve(name, modality) for name in values.get("metrics", bench.metrics)
    )
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
    return from_mapping(_compose(values, [], parsed, None))


def presets_for(method: str) -> list[str]:
    """Return the shipped presets of a method, such as `vision/mufac/scrub`."""
    root = Path(str(files("mmforget.configs"))) / "preset"
    short = method.rpartition("/")[2]
    found = sorted(root.rglob(f"{short}.yaml")) if root.is_dir() else []
    return [str(path.relative_to(root).with_suffix("")) for path in found]


def suites() -> list[str]:
    """Return the shipped suites."""
    root = Path(str(files("mmforget.configs"))) / "suite"
    return [str(p.relative_to(root).with_suffix("")) for p in sorted(root.rglob("*.yaml"))]


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


def _selects(override: Override) -> bool:
    """Return whether an override names an entry (`method=npo`) and is no value (`method.lr=1`)."""
    return override.key_or_group in (*SELECTORS, *GROUPS) and isinstance(override.value(), str)


def _name(override: Override) -> str:
    return str(override.value())


def _attack_names(override: Override) -> list[str]:
    if override.is_sweep_override():
        return [str(name) for name in override.sweep_string_iterator()]
    value = override.value()
    if isinstance(value, list):
        return [str(name) for name in value]
    return [] if value in (None, "none") else [str(value)]


def _known_attacks(tuned: Any, attacks: Sequence[str], modality: str) -> dict[str, Any]:
    for name in tuned:
        if name not in attacks:
            raise ConfigError(f"attack.{name} is set, but attack={','.join(attacks)} leaves it out")
    return dict(tuned)


def _value(parsed: Iterable[Override], key: str) -> str | None:
    return next((str(o.value()) for o in parsed if o.key_or_group == key), None)


def _groups(
    named: Mapping[str, str], benchmark: str, method: str, source: str, config_dir: Path | None
) -> tuple[list[str], tuple[str, ...]]:
    """Return Hydra's group choices of a run, and the names of those that set values."""
    chosen = []
    if source == "mini" and _exists(f"mini/{benchmark}", config_dir):
        chosen.append(f"mini={benchmark}")
    preset = named.get("preset")
    if preset is None:
        place = f"{benchmark}/mini" if source == "mini" else benchmark
        auto = f"{place}/{method.rpartition('/')[2]}"
        preset = auto if _exists(f"preset/{auto}", config_dir) else "none"
    elif preset != "none" and not _exists(f"preset/{preset}", config_dir):
        raise ConfigError(unknown("preset", preset, presets_for("*"), "mmforget list presets"))
    if preset != "none":
        chosen.append(f"preset={preset}")
    for group in ("runtime", "tracker"):
        if group in named:
            if not _exists(f"{group}/{named[group]}", config_dir):
                root = Path(str(files("mmforget.configs"))) / group
                names = [path.stem for path in root.glob("*.yaml")]
                raise ConfigError(unknown(group, named[group], names, "mmforget run --help"))
            chosen.append(f"{group}={named[group]}")
    return [f"+{choice}" for choice in chosen], tuple(chosen)


def _exists(name: str, config_dir: Path | None) -> bool:
    roots = [Path(str(files("mmforget.configs")))] + ([config_dir] if config_dir else [])
    return any((root / f"{name}.yaml").is_file() for root in roots)


def _compose(
    base: Mapping[str, Any],
    groups: Sequence[str],
    values: Sequence[Override],
    config_dir: Path | None,
) -> dict[str, Any]:
    """Merge names, groups and overrides with Hydra; every key is added or replaced."""
    from hydra.core.config_store import ConfigStore

    package = "pkg://mmforget.configs"
    node = {**base, "hydra": {"searchpath": [package]}}
    ConfigStore.instance().store(name="mmforget_run", node=node)
    words = [f"++{(override.input_line or '').lstrip('+')}" for override in values]
    place = config_dir.resolve() if config_dir else Path(str(files("mmforget.configs"))).resolve()
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
    roots = ([config_dir] if config_dir else []) + [Path(str(files("mmforget.configs")))]
    for root in roots:
        path = root / "suite" / f"{name}.yaml"
        if path.is_file():
            content = yaml.safe_load(path.read_text())
            return [str(word) for word in content["words"]] + rest
    raise ConfigError(unknown("suite", name, suites(), "mmforget list suites"))


def _section(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = values.get(name) or {}
    if isinstance(section, str) and name in ("benchmark", "method"):
        return {"name": section}
    if not isinstance(section, Mapping):
        raise ConfigError(f"{name}={section!r}: a mapping of keys is needed, such as {name}.key=…")
    return dict(section)


def _collect(found: list[str], config_type: type, section: Mapping[str, Any], name: str) -> Any:
    try:
        return instantiate(config_type, section, name)
    except ConfigError as error:
        found.extend(error.faults)
        return config_type()
