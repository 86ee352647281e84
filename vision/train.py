"""Train the original classifier of a face benchmark, or the one that never saw the forget set.

    python -m mmforget.vision.train benchmark=vision/mufac --out models/original
    accelerate launch -m mmforget.vision.train benchmark=vision/mufac --out retrained --retrain

Reads the same words as `mmforget run` and trains by the benchmark's recipe, which the words can
change (`benchmark.training.lr=0.05`). Weights go through the cache: what was trained before, here
or by a run, is loaded, and a killed training goes on where it stopped.
"""

from mmforget.cli.base import CacheDir, ConfigDir, Json, Words, verb
from mmforget.cli.training import Out, Retrain, script, train_model, write_model
from mmforget.metrics.common import predictions

app = script()


@verb("train", "python -m mmforget.vision.train benchmark=vision/mufac --out models/original", app)
def train(
    out: Out,
    words: Words = None,
    retrain: Retrain = False,
    cache: CacheDir = None,
    config_dir: ConfigDir = None,
    json_output: Json = False,
) -> None:
    """Train a face benchmark's classifier; write weights, config and accuracy per split."""
    made = train_model("vision", words or [], retrain, cache, config_dir)
    # Every split once, all processes together.
    accuracy = {
        split: float(predictions(made.view, split).correctness.mean())
        for split in made.bench.splits.names()
    }
    write_model(made, out, "accuracy", accuracy, json_output)


if __name__ == "__main__":
    app()
