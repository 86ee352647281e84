"""Speed of vision-language scoring and unlearning: `python -m tests.bench.vlm`.

The plain loop works as the public scripts do, written anew from their description. Loss metrics:
one pair of question and answer at a time, the image encoded for each, logits of all positions.
Generation: one question at a time, and a forward pass that nobody reads before each. NPO under
low-rank adapters: a second model is held and run in every step, logits of all positions. Both sides
share weights, texts and batches and run by turns in one process; each figure is the best of
several. Texts are in tokens and images in pixels on both sides before the clock starts (`encode_s`
is what that takes, once), although the public scripts do both anew for every pair.

A step of NPO is what a run of twice the epochs takes longer, by their number: setting up, and what
is kept of the original, are in the run alone. Peak memory is in bytes of tensors, the model's own
among them. `--size mini` is the mini world's model, `mid` a LLaVA of some 150 M random weights (for
memory on a CPU), `7b` one of LLaVA-1.5-7B's size in bfloat16 (for a GPU).
"""

import argparse
import copy
import json
import math
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from mmforget.context import Context
from mmforget.engine import Engine, Runtime
from mmforget.methods.npo import NPO, NPOConfig
from mmforget.types import Splits
from mmforget.vlm import mini, mini_model
from mmforget.vlm.adapter import VLMAdapter
from mmforget.vlm.chat import IGNORED, Chat, Encoded, Item
from mmforget.vlm.data import Dialogues, check_images
from mmforget.vlm.formats import read_fiubench
from mmforget.vlm.generation import generate
from mmforget.vlm.models import VLM, Lora, open_model
from mmforget.vlm.scoring import Ask, score


class Size(NamedTuple):
    """A model and how much of the work it gets by default.

    Attributes:
        net: Arguments of `mini_model.make_net`; empty: the mini world's own model.
        vocabulary: Rows of the output layer; 0: as many as the tokenizer has.
        dtype: Of the weights.
        asks: Questions.
        tokens: Most tokens of an answer.
        npo: Examples of forget, and of a batch.
    """

    net: dict[str, int]
    vocabulary: int
    dtype: torch.dtype
    asks: int
    tokens: int
    npo: tuple[int, int]


MID = {
    "dim": 768,
    "layers": 14,
    "heads": 12,
    "tower": 384,
    "tower_layers": 6,
    "side": 224,
    "patch": 14,
}
LARGE = {
    "dim": 4096,
    "layers": 32,
    "heads": 32,
    "tower": 1024,
    "tower_layers": 24,
    "side": 336,
    "patch": 14,
}
SIZES = {
    "mini": Size({}, 0, torch.float32, 200, 48, (40, 8)),
    "mid": Size(MID, 32064, torch.float32, 10, 12, (4, 1)),
    "7b": Size(LARGE, 32064, torch.bfloat16, 200, 48, (40, 4)),
}
WINDOW = 2048  # tokens, for the larger sizes
BETA, LR = 0.1, 1e-4
SIDES = ("plain", "ours")


class World(NamedTuple):
    """What is asked of the model."""

    model: VLM
    chat: Chat
    asks: list[Ask]
    answers: list[list[str]]
    forget: list[Item]
    retain: list[Item]


def open_world(given: argparse.Namespace, folder: Path) -> World:
    """Return the model and questions that the arguments name."""
    size = SIZES[given.size]
    device = torch.device(given.device)
    if not size.net:
        mini_model.write_base(folder / "model")
        model = open_model(str(folder / "model"))
    else:
        words = mini_model.read_tokenizer(mini_model.ASSETS / "tokenizer.json")
        small = mini_model.make_net(len(words), 0, side=size.net["side"], patch=size.net["patch"])
        mini_model.write_folder(folder / "model", small, words)  # for its processor
        processor = open_model(str(folder / "model")).processor
        before = torch.get_default_dtype()
        torch.set_default_dtype(size.dtype)
        with device:
            net = mini_model.make_net(size.vocabulary or len(words), 0, **size.net)
        torch.set_default_dtype(before)
        with torch.no_grad():  # so that answers are words
            net.lm_head.weight[len(words) :] = 0
        net.config.text_config.max_position_embeddings = WINDOW
        model = VLM(net, processor, given.size)
    model = model.to(device)
    persons = read_fiubench(folder / "world").persons
    rows = [(person, qa) for person in persons for qa in person.qa][: given.asks or size.asks]
    items = [
        Item(f"{person.id}/{k}", person.image, qa.question, qa.answer)
        for k, (person, qa) in enumerate(rows)
    ]
    count = size.npo[0]
    return World(
        model,
        Chat(model),
        [Ask(item.image, item.question) for item in items],
        [[qa.answer, qa.paraphrased_answer, *qa.wrong[:3]] for _, qa in rows],
        items[:count],
        items[count : 2 * count],
    )


def plain_losses(world: World) -> list[list[float]]:
    """Return losses per token, one pair at a time."""
    found = []
    for ask, texts in zip(world.asks, world.answers, strict=True):
        found.append([])
        for text in texts:
            row = world.chat.encode(Item("", ask.image, ask.question, text))
            inputs = world.chat.collate([row], world.model.device)
            with torch.no_grad():
                loss = world.model.net(**inputs, labels=_labels([row], inputs)).loss
            found[-1].append(float(loss))
    return found


def our_losses(world: World, batch: int) -> list[list[float]]:
    """Return losses per token as mmforget does, and with them all other scores."""
    scores = score(world.model, world.chat, world.asks, world.answers, batch_size=batch)
    return [[each.loss for each in row] for row in scores]


def plain_texts(world: World, tokens: int) -> list[str]:
    """Answer one question at a time, with a forward pass before each that nobody reads."""
    found = []
    for ask in world.asks:
        inputs = world.chat.collate([world.chat.prompt(*ask)], world.model.device)
        with torch.no_grad():
            world.model.net(**inputs)
            ids = world.model.net.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        found.append(world.chat.decode(ids[0, inputs["input_ids"].shape[1] :].tolist()))
    return found


def our_texts(world: World, tokens: int, batch: int) -> list[str]:
    """Answer as mmforget does."""
    made = generate(world.model, world.chat, world.asks, max_new_tokens=tokens, batch_size=batch)
    return [row[0] for row in made]


def plain_npo(model: VLM, world: World, lora: Lora, batch: int, epochs: int, retain: bool) -> float:
    """Run NPO with a second model; return seconds."""
    chat, device = world.chat, model.device

    def losses(net: VLM, rows: Sequence[Encoded]) -> torch.Tensor:
        inputs = chat.collate(rows, device)
        logits = net.net(**inputs).logits.float()
        labels = _labels(rows, inputs)[:, 1:]
        each = F.cross_entropy(
            logits[:, :-1].transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
        )
        return each.sum(1)

    forget, kept = ([chat.encode(item) for item in part] for part in (world.forget, world.retain))
    start = _now(device)
    original = copy.deepcopy(model).eval().requires_grad_(False)
    weights = list(model.attach(lora).values())
    optimizer = torch.optim.AdamW(weights, lr=LR)
    model.train()
    for _ in range(epochs):
        for first in range(0, len(forget), batch):
            rows = forget[first : first + batch]
            with torch.no_grad():
                before = losses(original, rows)
            gain = losses(model, rows) - before
            loss = (-2 / BETA * F.logsigmoid(BETA * gain)).mean()
            if retain:
                rows = kept[first : first + batch]
                count = sum(len(row.ids) - row.start for row in rows)
                loss = loss + losses(model, rows).sum() / count
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return _now(device) - start


def our_npo(
    model: VLM,
    world: World,
    lora: Lora,
    batch: int,
    epochs: int,
    retain: bool,
    runtime: Runtime,
) -> float:
    """Run NPO as mmforget does; return seconds."""
    paths = sorted({item.image for item in (*world.forget, *world.retain) if item.image})
    images = check_images(paths)
    forget, kept = (Dialogues(part, world.chat, images) for part in (world.forget, world.retain))
    forget.lengths(), kept.lengths()  # encoded before the clock starts
    config = NPOConfig(
        epochs=epochs,
        batch_size=batch,
        lr=LR,
        beta=BETA,
        scope="lora",
        retain_weight=float(retain),
    )
    start = _now(model.device)
    ctx = Context(
        engine=Engine(runtime),
        adapter=VLMAdapter(world.chat, (), lora),
        model=model,
        splits=Splits(forget, kept, kept, kept, kept),
        reads=NPO.reads,
        label="npo",
        seed=0,
    )
    NPO(config).run(ctx)
    return _now(model.device) - start


def compare(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return all figures."""
    size = SIZES[given.size]
    world = open_world(given, folder)
    model, batch = world.model, given.batch
    found: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "questions": len(world.asks),
        "answers": sum(map(len, world.answers)),
    }
    start = time.perf_counter()
    for ask, texts in zip(world.asks, world.answers, strict=True):
        for text in texts:
            row = world.chat.encode(Item("", ask.image, ask.question, text))
    found["encode_s"] = time.perf_counter() - start
    found["tokens of the last row"] = len(row.ids)
    device = model.device

    if "loss" in given.parts:
        found["losses_s"], made = best(
            {
                "plain": lambda: timed(lambda: plain_losses(world), device),
                "ours": lambda: timed(lambda: our_losses(world, batch), device),
            },
            given.repeats,
        )
        gaps = np.abs(np.array(made["plain"]) - np.array(made["ours"]))
        found["largest difference of losses"] = float(gaps.max())
    if "generation" in given.parts:
        tokens = given.tokens or size.tokens
        found["generation_s"], made = best(
            {
                "plain": lambda: timed(lambda: plain_texts(world, tokens), device),
                "ours": lambda: timed(lambda: our_texts(world, tokens, batch), device),
            },
            given.repeats,
        )
        pairs = list(zip(made["plain"], made["ours"], strict=True))
        found["share of equal answers"] = sum(one == two for one, two in pairs) / len(pairs)
        found["words of an answer"] = sum(len(one.split()) for one, _ in pairs) / len(pairs)
    if {"npo", "memory"} & set(given.parts):
        for name, retain in (("npo", False), ("npo with retain term", True)):
            found |= {f"{name}, {k}": v for k, v in unlearning(given, world, retain).items()}
    return found


def unlearning(given: argparse.Namespace, world: World, retain: bool) -> dict[str, Any]:
    """Return figures of NPO: seconds of a run and of a step, and peak memory."""
    runtime = Runtime(device=given.device, threads=given.threads, progress=False)
    lora = Lora(rank=given.rank, alpha=2.0 * given.rank, dropout=0.0)
    examples, batch = SIZES[given.size].npo
    found: dict[str, Any] = {}

    def run(side: str, model: VLM, epochs: int) -> float:
        if side == "plain":
            return plain_npo(model, world, lora, batch, epochs, retain)
        return our_npo(model, world, lora, batch, epochs, retain, runtime)

    def fresh(side: str, epochs: int) -> tuple[float, None]:
        return run(side, copy.deepcopy(world.model), epochs), None

    if "npo" in given.parts:
        short, long = (
            best({side: partial(fresh, side, epochs) for side in SIDES}, given.repeats)[0]
            for epochs in (given.epochs, 2 * given.epochs)
        )
        steps = given.epochs * math.ceil(examples / batch)
        found["run_s"] = _compared({side: short[side] for side in SIDES})
        found["step_s"] = _compared({side: (long[side] - short[side]) / steps for side in SIDES})
    if "memory" in given.parts:
        peaks = {}
        for side in SIDES:
            model = copy.deepcopy(world.model)
            peaks[side] = peak(partial(run, side, model, 1), model)
        found["peak_MiB"] = _compared(peaks)
    return found


def _compared(values: dict[str, float]) -> dict[str, float]:
    return {**values, "ours/plain": values["ours"] / values["plain"]}


def peak(work: Callable[[], Any], model: VLM) -> float:
    """Return the most bytes of tensors held at once during some work, MiB; the model among them.

    On a CPU the allocator's events are summed, as its own peak also holds code and buffers.
    """
    weights = sum(parameter.nbytes for parameter in model.parameters())
    if model.device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return (torch.cuda.max_memory_allocated() - before + weights) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return (max(held) + weights) / 2**20


def best(
    sides: dict[str, Callable[[], tuple[float, Any]]], repeats: int
) -> tuple[dict[str, float], dict[str, Any]]:
    """Return the least seconds of each side, run by turns, with their ratio; and what they made."""
    seconds, made = dict.fromkeys(sides, float("inf")), {}
    for _ in range(repeats):
        for name, work in sides.items():
            taken, made[name] = work()
            seconds[name] = min(seconds[name], taken)
    return {**seconds, "ratio": seconds["plain"] / seconds["ours"]}, made


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Return the wall seconds of some work, and what it made."""
    start = _now(device)
    made = work()
    return _now(device) - start, made


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _labels(rows: Sequence[Encoded], inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return ids [B, T], and -100 before answers and behind rows."""
    labels = inputs["input_ids"].clone()
    for k, row in enumerate(rows):
        labels[k, : row.start] = IGNORED
        labels[k, len(row.ids) :] = IGNORED
    return labels


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=tuple(SIZES), default="mini")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--asks", type=int, default=0, help="questions; 0: as the size says")
    parser.add_argument("--tokens", type=int, default=0, help="of an answer; 0: as the size says")
    parser.add_argument("--batch", type=int, default=256, help="answers at a time")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--epochs", type=int, default=5, help="of NPO")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=("loss", "generation", "npo", "memory"),
        default=("loss", "generation", "npo", "memory"),
    )
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mini.write_fiubench(folder / "world", 0, persons=20, questions=10)
        found = compare(given, folder)
    machine = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
    print(json.dumps({**machine, **vars(given), **found}, indent=1))


if __name__ == "__main__":
    main()
