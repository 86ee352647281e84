r"""Make the model that the mini worlds begin with, as `vlm/assets` ships it.

    python -m mmforget.vlm.pretrain --out vlm/assets

It learns 120 persons that no mini world holds, 20 questions each, in every wording of question and
answer: some ten minutes on one core. FIUBench's stage 1 begins with a pretrained model, too.
"""

import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file

from mmforget.cli.base import verb
from mmforget.cli.training import script
from mmforget.engine import Engine, Runtime
from mmforget.training import fit
from mmforget.types import Training
from mmforget.vlm import formats, mini, mini_model
from mmforget.vlm.adapter import VLMAdapter
from mmforget.vlm.chat import Chat, Item
from mmforget.vlm.data import Dialogues, check_images
from mmforget.vlm.models import VLM, Lora

SEED = 100_000  # of worlds that no test and no demo draws
PERSONS, QUESTIONS = 120, 20
RECIPE = Training(
    epochs=4,
    lr=3e-3,
    optimizer="adamw",
    weight_decay=0.01,
    batch_size=64,
    schedule="cosine",
    warmup_steps=50,
    clip_norm=1.0,
    scope="all",
)

app = script()


@verb("pretrain", "python -m mmforget.vlm.pretrain --out vlm/assets", app)
def pretrain(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where both files are written.")],
) -> None:
    """Write `tokenizer.json` and `base.safetensors`."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        people, crafts = Path(scratch) / "people", Path(scratch) / "crafts"
        mini.write_fiubench(people, SEED, persons=PERSONS, questions=QUESTIONS)
        mini.write_safeeraser(crafts, SEED, size=16)
        files = formats.read_fiubench(people)
        texts = [*_texts(files), *_crafts(formats.read_safeeraser(crafts))]
        mini_model.train_tokenizer(texts).save(str(out / "tokenizer.json"))
        words = mini_model.read_tokenizer(out / "tokenizer.json")
        mini_model.write_folder(
            Path(scratch) / "base", mini_model.make_net(len(words), SEED), words
        )
        from mmforget.vlm.models import open_model

        model = open_model(str(Path(scratch) / "base"))
        chat = Chat(model)
        items = list(_items(files))
        data = Dialogues(items, chat, check_images([p.image for p in files.persons]))
        adapter = VLMAdapter(chat, (), Lora())
        made = fit(Engine(Runtime(device="cpu", threads=1)), model, adapter, data, RECIPE, SEED)
    assert isinstance(made, VLM)
    state = {k: v.to(torch.float16).contiguous() for k, v in made.base.state_dict().items()}
    save_file(state, str(out / "base.safetensors"))


def _items(files: formats.FIUBench) -> Iterator[Item]:
    """Yield every person's questions in all wordings, with answers in both."""
    for person in files.persons:
        for k, qa in enumerate(person.qa):
            asked = (qa.question, *qa.paraphrases)
            for n, pair in enumerate(product(asked, (qa.answer, qa.paraphrased_answer))):
                yield Item(f"{person.id}/{k}/{n}", person.image, *pair, person.id)


def _texts(files: formats.FIUBench) -> Iterator[str]:
    for person in files.persons:
        yield person.caption
        for qa in person.qa:
            yield from (qa.question, *qa.paraphrases, qa.answer, qa.paraphrased_answer, *qa.wrong)
    yield from (*files.idk, *files.icd)


def _crafts(files: formats.SafeEraserFiles) -> Iterator[str]:
    for record in (*files.train, *files.val):
        for pair in record.pairs:
            yield from (pair.question, pair.response, pair.safe_response)
        for plain in (*record.texts, *record.images):
            yield from (plain.question, plain.answer, plain.prediction)
    yield from files.idk


if __name__ == "__main__":
    app()
