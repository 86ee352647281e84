r"""Train the original recommender of a benchmark, or the one that never saw the forget set.

    python -m mmforget.recsys.train benchmark=recsys/unlearnrec --out models/original
    python -m mmforget.recsys.train benchmark=recsys/unlearnrec data=local data.root=lastfm \
        model=lightgcn benchmark.training.epochs=20 --out models/lastfm

Reads the same words as `mmforget run` and trains by the benchmark's recipe, which the words can
change. Weights go through the cache: what was trained before, here or by a run, is loaded, and a
killed training goes on where it stopped.
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
from mmforget.record import write_text
from mmforget.recsys.metrics.ranking import HEADLINE_K, split_ranking
from mmforget.workbench import Workbench

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)


@verb("train", "python -m mmforget.recsys.train benchmark=recsys/unlearnrec --out models/o", app)
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
    """Train a benchmark's recommender; write weights, config and ranking metrics per split."""
    # 1. What to train: the words, checked against the benchmark's schemas.
    recipe = plan(["method=original", *(words or [])], config_dir)
    if recipe.modality != "recsys":
        raise ConfigError(f"{recipe.benchmark} is no recsys benchmark. See: mmforget list")

    # 2. Where and on what: devices and processes, then the data with the request applied.
    engine = Engine(recipe.runtime)
    workbench = Workbench(engine, Cache(cache))
    bench = workbench.bench(recipe)

    # 3. Train, on all training data or without what is to be forgotten.
    label = "retrained" if retrain else "original"
    data = bench.splits.retain if retrain else bench.splits.train
    model, cost, _ = workbench.trained(bench, recipe, data, recipe.seeds.train, label)

    # 4. Rank all items for every user of the unseen splits, with one propagation.
    view = workbench.view(bench, model, recipe.seeds.evaluate)
    ranking = {}
    for split in (name for name in ("val", "test") if name in bench.splits.names()):
        found = split_ranking(view, bench.benchmark, bench.splits, split)
        for name in ("recall", "ndcg", "precision", "map"):
            ranking[f"{name}@{HEADLINE_K}/{split}"] = found.mean(name, HEADLINE_K)

    # 5. Write what `mmforget eval` and `model.checkpoint=` read back.
    if engine.is_main:
        save_model(model, out / "model.safetensors")
        write_text(out / "config.yaml", yaml.safe_dump(recipe.resolved(), sort_keys=False))
        content = {"trained_on": label, "ranking": ranking, "wall_s": cost.wall_s}
        write_text(out / "metrics.json", json.dumps(content, indent=1))
    engine.barrier()
    if json_output:
        say_json({"out": str(out), "trained_on": label, "ranking": ranking})
    else:
        say(aligned([(name, f"{value:.4f}") for name, value in ranking.items()]))
        say(f"trained in {cost.wall_s:.1f} s, {cost.steps} steps")
        say(f"model: {out / 'model.safetensors'}")


if __name__ == "__main__":
    app()
