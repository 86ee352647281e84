"""`check` and `doctor`: whether a run can be made, and whether this machine can make it."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import typer

from mmforget.cli.base import (
    USER_ERROR,
    CacheDir,
    ConfigDir,
    ConfigFile,
    Json,
    Plugins,
    Runs,
    Words,
    aligned,
    say,
    say_json,
    verb,
)
from mmforget.errors import ConfigError
from mmforget.registry import BENCHMARKS, METHODS, load_plugins

if TYPE_CHECKING:
    from mmforget.config import Plan

FLOAT = 4


@dataclass(frozen=True)
class Estimate:
    """What a run holds in memory, activations and data left out.

    Attributes:
        parameters: Weights of the model.
        trained: Those of them that the method trains; all if only the data tell which.
        bytes: Original, student, gradients, optimiser state, and one more copy of the model if
            the method keeps anything.
    """

    parameters: int
    trained: int
    bytes: int


@verb("check", "mmforget check benchmark=vision/mufac method=npo,scrub seed=0,1")
def check(
    words: Words = None,
    config: ConfigFile = None,
    plugin: Plugins = None,
    config_dir: ConfigDir = None,
    json: Json = False,
) -> None:
    """Check every run of a command, and make none.

    Composes and validates each config, builds its model without memory, and estimates what the run
    will hold; no data and no weights are read.
    """
    load_plugins(tuple(plugin or ()))
    from mmforget.api import plans

    made = plans(words or [], config=config, config_dir=config_dir)
    estimates = _estimates(made)
    if json:
        for plan, estimate in zip(made, estimates, strict=True):
            size = None if estimate is None else vars(estimate)
            say_json({"config": plan.resolved(), "estimate": size})
        return
    head = ("benchmark", "method", "seeds", "attacks", "presets", "weights", "memory (estimate)")
    rows = [_row(plan, estimate) for plan, estimate in zip(made, estimates, strict=True)]
    say(aligned([head, *rows]))
    parts = ("benchmark", "data", "model", "request")
    models = {
        repr([plan.benchmark, plan.seeds.train, *(plan.sections[part] for part in parts)])
        for plan in made
    }
    say(f"{len(made)} runs, {len(models)} original models; nothing was run")
    say("memory: weights, gradients, optimiser state and frozen copies; no activations, no data")


@verb("doctor", "mmforget doctor")
def doctor(runs: Runs = Path("runs"), cache: CacheDir = None, json: Json = False) -> None:
    """Look at what a run needs of this machine."""
    from mmforget import environment

    checks = environment.doctor(cache, runs)
    if json:
        say_json([vars(check) for check in checks])
    else:
        say(aligned([("ok" if c.ok else "BROKEN", c.name, _advice(c)) for c in checks]))
    if not all(check.ok for check in checks):
        raise typer.Exit(USER_ERROR)


def _advice(check: Any) -> str:
    return f"{check.detail} ({check.hint})" if check.hint else str(check.detail)


def _row(plan: "Plan", estimate: Estimate | None) -> tuple[str, ...]:
    seeds = plan.seeds
    weights, memory = "unknown", "unknown"
    if estimate is not None:
        share = estimate.trained / max(1, estimate.parameters)
        weights = f"{estimate.parameters / 1e6:.2f} M, {share:.0%} trained"
        memory = f"{estimate.bytes / 2**20:.0f} MiB"
    return (
        plan.benchmark,
        plan.method,
        f"{seeds.train}/{seeds.unlearn}/{seeds.evaluate}",
        ",".join(plan.attacks) or "none",
        ",".join(plan.presets) or "none",
        weights,
        memory,
    )


def _estimates(plans: "Sequence[Plan]") -> list[Estimate | None]:
    """Return the estimate of each plan; faults that only a model shows are collected.

    Raises:
        ConfigError: Models that cannot be built, scopes that match nothing.
    """
    found: list[Estimate | None] = []
    faults: list[str] = []
    for plan in plans:
        try:
            found.append(_estimate(plan))
        except ConfigError as error:
            faults += [fault for fault in error.faults if fault not in faults]
    if faults:
        raise ConfigError(faults)
    return found


def _estimate(plan: "Plan") -> Estimate | None:
    """Return what a plan's models hold, measured on a model without memory, or None."""
    import torch

    config, data, model, request = (
        plan.sections[name] for name in ("benchmark", "data", "model", "request")
    )
    # Starting weights would be read, or downloaded; they do not change the sizes.
    start = {"pretrained": False, "checkpoint": None}
    model = replace(model, **{f.name: start[f.name] for f in fields(model) if f.name in start})
    with TemporaryDirectory() as store:  # a mini model leaves its folder, or a lock, there
        benchmark = BENCHMARKS.get(plan.benchmark)(config, data, model, request, Path(store))
        try:
            with torch.device("meta"):
                built = benchmark.build(0)
        except (RuntimeError, ValueError, AttributeError):  # it has to see data or weights
            return None
    weights = sum(p.numel() for p in built.parameters())
    method = METHODS.get(plan.method)(plan.sections["method"])
    recipe = (
        benchmark.training if method.intent == "reference" else getattr(method, "training", None)
    )
    trained, states = weights, 0
    if recipe is not None:
        states = 2 if recipe.optimizer != "sgd" else int(recipe.momentum > 0)
        if hasattr(benchmark, "adapter"):  # some make it only when they have read their data
            chosen = benchmark.adapter.parameters(built, recipe.scope)
            trained = sum(p.numel() for p in chosen.values())
    copies = 2 + (method.holds != "nothing")
    return Estimate(weights, trained, FLOAT * (weights * copies + trained * (1 + states)))
