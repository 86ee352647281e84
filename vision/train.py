"""Train the original classifier of a face benchmark, or the one that never saw the forget set.

    python -m mmforget.vision.train benchmark=vision/mufac --out models/original
    accelerate launch -m mmforget.vision.train benchmark=vision/mufac --out retrained --retrain

Reads the same words as `mmforget run` and trains by the benchmark's recipe, which the words can
change (`benchmark.training.lr=0.05`). Weights go through the cache: what was trained before, here
or by a run, is loaded, and a killed training goes on where it stopped.
"""

import json
from pathlib import Path
from typing import Annotated

import typer
import yaml

from mmforget.cache import Cache
from mmforget.checkpoint import save_model
from mmforget.cli.base import CacheDir, ConfigDir, Json, Words, aligned, say, say_json, verb
from mmforget.config import plan
from mmforget.engine import Engine
from mmforget.errors import ConfigError
from mmforget.metrics.common import predictions
from mmforget.record import write_text
from mmforget.workbench import Workbench

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)


@verb("train", "python -m mmforget.vision.train benchmark=vision/mufac --out models/original", app)
def train(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the model is written.")],
    words: Words = None,
    retrain: Annotated[
        bool, typer.Option("--retrain", help="Train on the retain set, from scratch.")
    ] = False,
    cache: CacheDir = None,
    config_dir: ConfigDir = None,
    json_output: Json = False,
) -> None:
    """Train a face benchmark's classifier; write weights, config and accuracy per split."""
    # 1. What to train: the words, checked against the benchmark's schemas.
    recipe = plan(["method=original", *(words or [])], config_dir)
    if recipe.modality != "vision":
        raise ConfigError(f"{recipe.benchmark} is no vision benchmark. See: mmforget list")

    # 2. Where and on what: devices and processes, then the data with the request applied.
    engine = Engine(recipe.runtime)
    workbench = Workbench(engine, Cache(cache))
    bench = workbench.bench(recipe)

    # 3. Train, on all training data or without what is to be forgotten.
    label = "retrained" if retrain else "original"
    data = bench.splits.retain if retrain else bench.splits.train
    model, cost, _ = workbench.trained(bench, recipe, data, recipe.seeds.train, label)

    # 4. Look at every split once, all processes together.
    view = workbench.view(bench, model, recipe.seeds.evaluate)
    accuracy = {
        split: float(predictions(view, split).correctness.mean()) for split in bench.splits.names()
    }

    # 5. Write what `mmforget eval` and `model.checkpoint=` read back.
    if engine.is_main:
        save_model(model, out / "model.safetensors")
        write_text(out / "config.yaml", yaml.safe_dump(recipe.resolved(), sort_keys=False))
        found = {"trained_on": label, "accuracy": accuracy, "wall_s": cost.wall_s}
        write_text(out / "metrics.json", json.dumps(found, indent=1))
    engine.barrier()
    if json_output:
        say_json({"out": str(out), "trained_on": label, "accuracy": accuracy})
    else:
        say(aligned([(split, f"{value:.3f}") for split, value in accuracy.items()]))
        say(f"model: {out / 'model.safetensors'}")


if __name__ == "__main__":
    app()
