r"""Train the original pipeline of a benchmark, or the one that never saw the forget set.

    python -m mmforget.diffusion.train benchmark=diffusion/unlearncanvas data=mini --out models/o
    accelerate launch -m mmforget.diffusion.train benchmark=diffusion/unlearncanvas data=local \
        data.root=UNLEARNCANVAS model=pipeline model.pipeline=SD15 benchmark.training.epochs=10 \
        --out models/style50

The folder is a diffusers pipeline (`DiffusionPipeline.from_pretrained`), which `model.pipeline=`
reads back. Weights go through the cache: what was trained before is loaded, and a killed training
goes on where it stopped. `--ship FILE` writes what `diffusion/assets/original.safetensors` is.
"""

from pathlib import Path
from typing import Annotated

import typer

from mmforget.cli.base import CacheDir, ConfigDir, Json, Words, verb
from mmforget.cli.training import Out, Retrain, script, train_model, write_model
from mmforget.diffusion.benchmarks.base import DiffusionBenchmark
from mmforget.diffusion.mini_model import ship_original
from mmforget.diffusion.models import DiffusionModel

app = script()


@verb("train", "python -m mmforget.diffusion.train benchmark=diffusion/unlearncanvas --out o", app)
def train(
    out: Out,
    words: Words = None,
    retrain: Retrain = False,
    cache: CacheDir = None,
    config_dir: ConfigDir = None,
    json_output: Json = False,
    ship: Annotated[
        Path | None, typer.Option(help="Also write weights as the package ships them (mini).")
    ] = None,
) -> None:
    """Train a benchmark's pipeline; write it, its config and the noise-prediction loss."""
    made = train_model("diffusion", words or [], retrain, cache, config_dir)
    # At one drawn time an image, the same for every model: comparable, not a likelihood.
    splits = [name for name in made.bench.splits.names() if name != "retain"]
    loss = {split: float(made.view.numbers(split)["loss"].mean()) for split in splits}
    write_model(made, out, "loss", loss, json_output)
    if ship is not None and made.engine.is_main:
        bench, model = made.bench.benchmark, made.view.model
        assert isinstance(bench, DiffusionBenchmark) and isinstance(model, DiffusionModel)
        recipe = bench.recipe_text(made.bench.splits.train, made.recipe.seeds.train)
        ship_original(model, recipe, ship)


if __name__ == "__main__":
    app()
