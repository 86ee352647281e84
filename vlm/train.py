r"""Train the original model of a benchmark (its stage 1), or the one that never saw the forget set.

    python -m mmforget.vlm.train benchmark=vlm/fiubench data=mini --out models/original
    accelerate launch -m mmforget.vlm.train benchmark=vlm/fiubench data=local data.root=FIUBENCH \
        model=pretrained model.path=xtuner/llava-phi-3-mini-hf model.dtype=bfloat16 --out models/o

The folder is one of `save_pretrained` (`AutoModelForImageTextToText.from_pretrained`), which
`model.path=` reads back. Weights go through the cache: what was trained before is loaded, and a
killed training goes on where it stopped.
"""

from mmforget.cli.base import CacheDir, ConfigDir, Json, Words, verb
from mmforget.cli.training import Out, Retrain, script, train_model, write_model

app = script()


@verb("train", "python -m mmforget.vlm.train benchmark=vlm/fiubench --out o", app)
def train(
    out: Out,
    words: Words = None,
    retrain: Retrain = False,
    cache: CacheDir = None,
    config_dir: ConfigDir = None,
    json_output: Json = False,
) -> None:
    """Train a benchmark's model; write it, its config and the loss per answer token."""
    made = train_model("vlm", words or [], retrain, cache, config_dir)
    numbers = {}
    for split in ("forget", "holdout", "test"):
        found = made.view.numbers(split)
        numbers[split] = float((found["loss"] / found["tokens"]).mean())
    write_model(made, out, "loss", numbers, json_output)


if __name__ == "__main__":
    app()
