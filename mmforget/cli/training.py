"""What the training scripts of the modalities share: `python -m mmforget.<modality>.train`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
import yaml

from mmforget.cache import Cache
from mmforget.cli.base import aligned, say, say_json
from mmforget.config import Plan, plan
from mmforget.engine import Engine
from mmforget.errors import ConfigError
from mmforget.record import Cost, write_text
from mmforget.types import ModelView
from mmforget.workbench import Bench, Workbench

Out = Annotated[Path, typer.Option(metavar="DIR", help="Where the model is written.")]
Retrain = Annotated[bool, typer.Option("--retrain", help="Train on the retain set, from scratch.")]


@dataclass(frozen=True)
class Trained:
    """A model trained by a benchmark's recipe.

    Attributes:
        recipe: The checked words.
        engine: Devices and processes.
        bench: The opened benchmark.
        view: The model and its per-example numbers.
        cost: What training took, now or when it was done.
        label: "original" or "retrained".
    """

    recipe: Plan
    engine: Engine
    bench: Bench
    view: ModelView
    cost: Cost
    label: str


def script() -> typer.Typer:
    """Return the application of one training script."""
    return typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)


def train_model(
    modality: str,
    words: Sequence[str],
    retrain: bool,
    cache: Path | None,
    config_dir: Path | None,
) -> Trained:
    """Train what the words name, or load it: weights go through the cache.

    Raises:
        ConfigError: The words name a benchmark of another modality.
    """
    # 1. What to train: the words, checked against the benchmark's schemas.
    recipe = plan(["method=original", *words], config_dir)
    if recipe.modality != modality:
        raise ConfigError(f"{recipe.benchmark} is no {modality} benchmark. See: mmforget list")

    # 2. Where and on what: devices and processes, then the data with the request applied.
    engine = Engine(recipe.runtime)
    workbench = Workbench(engine, Cache(cache))
    bench = workbench.bench(recipe)

    # 3. Train, on all training data or without what is to be forgotten.
    label = "retrained" if retrain else "original"
    data = bench.splits.retain if retrain else bench.splits.train
    model, cost, _ = workbench.trained(bench, recipe, data, recipe.seeds.train, label)
    view = workbench.view(bench, model, recipe.seeds.evaluate)
    return Trained(recipe, engine, bench, view, cost, label)


def write_model(
    made: Trained, out: Path, kind: str, numbers: Mapping[str, float], as_json: bool
) -> None:
    """Write the model, `config.yaml` and `metrics.json`, and say what came out.

    Args:
        made: What was trained.
        out: Folder; made if needed.
        kind: What the numbers are, their key in `metrics.json`: "accuracy", "ranking".
        numbers: Name -> value.
        as_json: Print JSON.
    """
    if made.engine.is_main:
        out.mkdir(parents=True, exist_ok=True)
        made.bench.benchmark.export(made.view.model, out)
        write_text(out / "config.yaml", yaml.safe_dump(made.recipe.resolved(), sort_keys=False))
        content = {"trained_on": made.label, kind: dict(numbers), "wall_s": made.cost.wall_s}
        write_text(out / "metrics.json", json.dumps(content, indent=1))
    made.engine.barrier()
    if as_json:
        say_json({"out": str(out), "trained_on": made.label, kind: dict(numbers)})
    else:
        say(aligned([(name, f"{value:.4f}") for name, value in numbers.items()]))
        say(f"trained in {made.cost.wall_s:.1f} s, {made.cost.steps} steps")
        say(f"model: {out}")
