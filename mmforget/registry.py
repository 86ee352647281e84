"""Typed registries with lazy targets, so that listing names imports neither torch nor Hydra.

A built-in entry is one line in a table, `"npo": "mmforget.methods.npo:NPO"`, imported when first
used. A plugin registers by decorator (`@METHODS.register("mine")`) from a module named by the
entry-point group `mmforget.plugins` or from a loose file (`--plugin FILE.py`).
"""

import importlib
import importlib.metadata
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from mmforget.errors import ConfigError, MissingDependencyError, MMForgetError, unknown

if TYPE_CHECKING:
    from mmforget.types import Attack, Benchmark, Metric, Opened, UnlearningMethod

logger = logging.getLogger(__name__)

T = TypeVar("T")
C = TypeVar("C", bound=type)

MODALITIES = ("vision", "diffusion", "vlm", "recsys")

# Optional packages, and the extra that brings each: names the extra when an import fails.
EXTRAS = {
    "diffusers": "diffusion",
    "imagehash": "vision",
    "lpips": "diffusion",
    "nudenet": "diffusion",
    "open_clip": "diffusion",
    "peft": "diffusion",
    "PIL": "vision",
    "pyarrow": "diffusion",
    "rouge_score": "vlm",
    "timm": "vision",
    "torchvision": "vision",
    "transformers": "diffusion",
}


class Registry(Generic[T]):
    """Names of one kind of component, each bound to a class or to where that class lives.

    Names are snake_case; an entry that serves one modality only is `modality/name`.
    """

    def __init__(self, kind: str, table: dict[str, str]) -> None:
        self.kind = kind
        self._targets: dict[str, str | T] = dict(table)

    def register(self, name: str) -> Callable[[C], C]:
        """Return a decorator that registers a class; a name taken twice is an error."""

        def decorate(cls: C) -> C:
            taken, here = self._targets.get(name), _place(cls)
            # The same place again is a module that is reloaded, or a notebook cell run twice.
            if taken is not None and here != (taken if isinstance(taken, str) else _place(taken)):
                raise ConfigError(f"{self.kind} {name!r} is registered twice: {taken} and {here}")
            self._targets[name] = cast(T, cls)
            return cls

        return decorate

    def extend(self, table: Mapping[str, str]) -> None:
        """Add lazy entries; a name taken twice is an error."""
        for name, target in table.items():
            if self._targets.setdefault(name, target) != target:
                raise ConfigError(f"{self.kind} {name!r} is registered twice")

    def names(self, pattern: str = "*") -> list[str]:
        """Return the sorted names that match a shell wildcard, importing nothing."""
        return sorted(
            name
            for name in self._targets
            if fnmatchcase(name, pattern) or fnmatchcase(name.rpartition("/")[2], pattern)
        )

    def target(self, name: str) -> str | T:
        """Return what a name is bound to, importing nothing: a class, or where it lives."""
        return self._targets[name]

    def resolve(self, name: str, modality: str | None = None) -> str:
        """Return the full name for `name`, looking in `modality` first.

        Raises:
            ConfigError: No such name.
        """
        for candidate in (f"{modality}/{name}", name):
            if candidate in self._targets:
                return candidate
        see = f"mmforget list {self.kind}s"
        raise ConfigError(unknown(self.kind, name, self._targets, see))

    def get(self, name: str, modality: str | None = None) -> T:
        """Return the class registered under `name`, importing it when it is still lazy.

        Raises:
            ConfigError: No such name.
            MissingDependencyError: The entry needs an optional package.
        """
        full = self.resolve(name, modality)
        target = self._targets[full]
        if isinstance(target, str):
            module, _, attribute = target.partition(":")
            try:
                target = getattr(importlib.import_module(module), attribute)
            except ModuleNotFoundError as error:
                missing = (error.name or "").partition(".")[0]
                if missing in EXTRAS:
                    raise MissingDependencyError(missing, EXTRAS[missing]) from error
                raise
            self._targets[full] = target
        return target

    def __contains__(self, name: object) -> bool:
        return name in self._targets

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())


def _place(cls: Any) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def load_plugins(files: tuple[Path, ...] = ()) -> list[str]:
    """Import installed plugins and loose plugin files; return the names of those that loaded.

    A broken installed plugin costs one warning, never the work of others. A file that was named
    by hand is an error, because its user is waiting for what it registers.
    """
    loaded = []
    for entry in importlib.metadata.entry_points(group="mmforget.plugins"):
        try:
            entry.load()
        except Exception as error:  # a stranger's module may raise anything: warn, name it, go on
            logger.warning("plugin %s is broken and was left out: %s", entry.name, error)
        else:
            loaded.append(entry.name)
    for file in files:
        loaded.append(_load_file(file))
    return loaded


def _load_file(file: Path) -> str:
    if not file.is_file():
        raise ConfigError(f"--plugin {file}: no such file. Give a Python file that registers")
    name = f"mmforget_plugin_{file.stem}"
    known = sys.modules.get(name)
    if known is not None and getattr(known, "__file__", None) == str(file.resolve()):
        return file.stem
    spec = importlib.util.spec_from_file_location(name, file.resolve())
    if spec is None or spec.loader is None:
        raise ConfigError(f"--plugin {file}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except MMForgetError:
        del sys.modules[name]
        raise
    except Exception as error:  # whatever the file raises, its author needs to see it in one line
        del sys.modules[name]
        raise ConfigError(f"--plugin {file}: {type(error).__name__}: {error}") from error
    return file.stem


_M = "mmforget.methods"
_A = "mmforget.attacks"
_S = "mmforget.metrics"

METHODS: "Registry[type[UnlearningMethod[Any]]]" = Registry(
    "method",
    {
        "original": f"{_M}.original:Original",
        "retrain": f"{_M}.retrain:Retrain",
        "finetune": f"{_M}.finetune:Finetune",
        "grad_ascent": f"{_M}.grad_ascent:GradAscent",
        "grad_diff": f"{_M}.grad_diff:GradDiff",
        "kl_retain": f"{_M}.kl_retain:KLRetain",
        "random_label": f"{_M}.random_label:RandomLabel",
        "dpo": f"{_M}.dpo:DPO",
        "idk": f"{_M}.idk:IDK",
        "npo": f"{_M}.npo:NPO",
        "simnpo": f"{_M}.simnpo:SimNPO",
        "scrub": f"{_M}.scrub:Scrub",
        "bad_teacher": f"{_M}.bad_teacher:BadTeacher",
        "l1_sparse": f"{_M}.l1_sparse:L1Sparse",
        "salun": f"{_M}.salun:SalUn",
        "task_vector": f"{_M}.task_vector:TaskVector",
        "sam": f"{_M}.sam:SAM",
    },
)
BENCHMARKS: "Registry[type[Benchmark]]" = Registry("benchmark", {})
METRICS: "Registry[type[Metric]]" = Registry(
    "metric",
    {
        "accuracy": f"{_S}.accuracy:Accuracy",
        "forgetting": f"{_S}.forgetting:Forgetting",
        "average_gap": f"{_S}.average_gap:AverageGap",
        "divergence": f"{_S}.divergence:Divergence",
        "agreement": f"{_S}.divergence:Agreement",
        "zrf": f"{_S}.divergence:ZRF",
        "representation": f"{_S}.representation:Representation",
        "probes": f"{_S}.probes:Probes",
        "cost": f"{_S}.cost:CostMetric",
    },
)
ATTACKS: "Registry[type[Attack[Any]]]" = Registry(
    "attack",
    {
        "membership": f"{_A}.membership:Membership",
        "lira": f"{_A}.lira:LiRA",
        "ulira": f"{_A}.ulira:ULiRA",
        "rmia": f"{_A}.rmia:RMIA",
        "challenge": f"{_A}.challenge:Challenge",
        "relearn": f"{_A}.relearn:Relearn",
    },
)
# What a modality makes of `mmforget attack PATH ...` where no benchmark is named: a function of the
# path and the words that returns an `Opened`, or None if the path is nothing it knows.
OPENERS: "Registry[Callable[[Path, Sequence[str]], Opened | None]]" = Registry("opener", {})
REGISTRIES: dict[str, Registry[Any]] = {
    "methods": METHODS,
    "benchmarks": BENCHMARKS,
    "metrics": METRICS,
    "attacks": ATTACKS,
}

# Each modality package lists its own entries in its __init__, as tables of lazy targets.
for _modality in MODALITIES:
    _entries: dict[str, dict[str, str]] = importlib.import_module(f"mmforget.{_modality}").ENTRIES
    for _kind, _table in _entries.items():
        (OPENERS if _kind == "openers" else REGISTRIES[_kind]).extend(_table)
