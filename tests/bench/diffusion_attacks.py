"""Speed of text_grad against a plain loop: `python -m tests.bench.diffusion_attacks --threads 2`.

The plain loop works as the public UnlearnDiffAtk code does, written anew from its description: one
prompt after the other; a step draws a one-hot row for each token, multiplies it with the table of
embeddings, joins the pieces of the sequence, moves the rows by `torch.optim.Adam` and projects each
by a bisection that reads every sum back; after each stage one picture, its prompt and the empty one
encoded anew, two UNet calls a step, judged alone. Other waste of the public code is left out: here
models are loaded once, weights get no gradients, and a prompt ends at its first success.

Both sides attack one model, erased by UCE, with the same prompts, pictures, budget and judge, and
draw noise and tokens from the same generators of each prompt. They run by turns in one process,
once before the clock starts; each figure is the best of several. `equal texts` counts the prompts
for which both judged the same texts, stage by stage, in float64 and with the plain bisection going
on to 1e-12; float32 and the published 1e-5 part some prompts' ways. The defaults keep the published
share of gradients and pictures: 40 steps to a picture of 50, here 8 to 10.

`--pipeline FOLDER` takes a Stable Diffusion 1.x or 2.x folder, `--size sd15` random weights and
49,408 tokens of that size (for a GPU), both judged by brightness, which never succeeds: a prompt
then costs its whole budget. Without both it is the mini world and its style classifier.
"""

import argparse
import copy
import json
import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from mmforget.context import Context
from mmforget.diffusion import mini
from mmforget.diffusion.adapter import DiffusionAdapter
from mmforget.diffusion.answers import read, write_image
from mmforget.diffusion.attacks.arena import Aims, Arena, Ruling, Shot
from mmforget.diffusion.attacks.asr import Outcome, rates
from mmforget.diffusion.attacks.base import outcome
from mmforget.diffusion.attacks.examples import Example, read_examples
from mmforget.diffusion.attacks.gradient import GradientConfig
from mmforget.diffusion.attacks.relaxed import project_simplex, timesteps
from mmforget.diffusion.attacks.text_grad import TextGrad
from mmforget.diffusion.concepts import Concept, Erasure
from mmforget.diffusion.judges import ClassifierJudge, Judge, Verdict
from mmforget.diffusion.methods.uce import UCE, UCEConfig
from mmforget.diffusion.models import DiffusionModel, from_pipe, open_pipeline
from mmforget.diffusion.noise import Sampling
from mmforget.diffusion.sampling import Image, generate
from mmforget.engine import Engine, Runtime
from mmforget.rng import generator
from mmforget.types import Dataset, Splits
from tests.bench.diffusion import plain_images, sd15, timed

STYLE, ANCHOR = "Van Gogh", "Photo"
KEPT = ("Crayon", "Mosaic", "Neon Lines", "Pencil Drawing", "Pop Art")
GUIDANCE = 4.0  # of the mini world's prompts
VOCABULARY = 49408  # tokens of CLIP
BATCHES = (1, 8, 32)
SEED = 0
XI = 1e-5  # bracket at which the published bisection stops
EXACT = 1e-12  # the same where both sides must agree
# Of the mini world, and of large models: prompts, stages, and prompts of the check in float64.
BUDGETS = {True: (32, 6, 8), False: (8, 2, 0)}
FULL = "out of memory"


class Brightness:
    """A judge that needs no weights and finds nothing: only white pictures are positive."""

    name = "brightness"

    def judge(self, images: Tensor) -> Verdict:
        """Return the verdict."""
        score = images.double().mean(dim=(1, 2, 3)) / 255
        return Verdict(score == 1, score.float(), [""] * len(images), [{}] * len(images))


@dataclass(frozen=True)
class World:
    """What both sides attack.

    Attributes:
        model: The erased model.
        placed: The same, with a copy of its weights, as the project's engine places it.
        examples: Prompts.
        pictures: Folder of their target pictures.
        judge: Judge of all pictures.
        sampling: How pictures are drawn.
        engine: Where the project runs.
    """

    model: DiffusionModel
    placed: DiffusionModel
    examples: Sequence[Example]
    pictures: Path
    judge: Judge
    sampling: Sampling
    engine: Engine

    def first(self, count: int) -> "World":
        """Return the same with fewer prompts."""
        return replace(self, examples=self.examples[:count])


class Run(NamedTuple):
    """What one side found.

    Attributes:
        texts: The text of every judged picture, by the prompt's id.
        outcomes: Of each prompt.
        steps: Gradient steps of all.
        judged: Judged pictures of all, those of the prompts themselves included.
        drawn: How many of them were drawn.
    """

    texts: Mapping[str, Sequence[str]]
    outcomes: Sequence[Outcome]
    steps: int
    judged: int
    drawn: int


# The plain loop ----------------------------------------------------------------------------------


class Choose(torch.autograd.Function):
    """One-hot rows of drawn tokens; backwards the gradient passes, clipped to [-1, 1]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ids: Tensor) -> Tensor:
        """Return one-hot rows."""
        return functional.one_hot(ids, rows.shape[-1]).to(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        """Return the gradient on the rows."""
        return grads[0].clamp(-1, 1), None


def multinomial(row: Tensor, uniform: float) -> Tensor:
    """Draw an index by one uniform number, as ours does; `torch.multinomial` takes one for each."""
    reached = row.double().cumsum(dim=0)
    return torch.searchsorted(reached, uniform * reached[-1], right=True).clamp(max=len(row) - 1)


def bisected(row: Tensor, xi: float) -> Tensor:
    """Project a row on the simplex by bisection, with a read-back for every sum."""
    clipped = row.clamp(0, 1)
    if abs(clipped.sum().item() - 1) <= XI:
        return clipped
    low, high = row.min().item() - 1, row.max().item()
    shift = (low + high) / 2
    while high - low > xi:
        shift = (low + high) / 2
        over = (row - shift).clamp(0, 1).sum().item() - 1
        if over == 0:
            break
        low, high = (shift, high) if over > 0 else (low, shift)
    return (row - shift).clamp(0, 1)


class PlainPrompt:
    """One prompt, and the relaxed tokens before it.

    Args:
        world: Where.
        example: The prompt.
        config: Tokens and steps.
        xi: Where bisection stops.
    """

    def __init__(
        self, world: World, example: Example, config: GradientConfig, xi: float = XI
    ) -> None:
        self.world, self.example, self.config, self.xi = world, example, config, xi
        model = world.model
        self.encoder: Any = model.text_encoder
        self.layer = self.encoder.get_input_embeddings()
        words = len(model.tokenizer)
        self.table = self.layer.weight.detach()[:words]
        self.ids = model.tokens([example.prompt]).to(model.device)
        self.length = int((self.ids[0] == model.tokenizer.eos_token_id).nonzero()[0]) - 1
        shape = (1, config.tokens, words)
        self.rows = torch.full(shape, 1 / words, device=model.device, dtype=model.dtype)
        self.rows.requires_grad_(True)
        self.adam = torch.optim.Adam([self.rows], lr=config.lr, weight_decay=config.weight_decay)
        picture = read(world.pictures, [f"{example.id}.png"]).to(model.device, model.dtype)
        self.clean = model.to_latents(picture / 127.5 - 1.0).float()
        self.whole = functional.one_hot(self.ids, words).to(self.table) @ self.table
        self.times = timesteps(model.noising.steps, config.stages)

    def joined(self, whole: Tensor, adversarial: Tensor) -> Tensor:
        """Put tokens before the prompt's, and leave as many places after it out."""
        count, first = self.config.tokens, 1 + self.length
        return torch.cat(
            [whole[:, :1], adversarial, whole[:, 1:first], whole[:, first + count :]], dim=1
        )

    def text(self, one_hot: Tensor) -> Tensor:
        """Return the text encoder's states of the attacked prompt."""
        rows = self.joined(self.whole, one_hot @ self.table)
        ids = self.joined(self.ids, one_hot.argmax(dim=-1))
        hook = self.layer.register_forward_hook(lambda *_: rows)
        try:
            found: Tensor = self.encoder(ids)[0]
        finally:
            hook.remove()
        return found

    def stage(self, at: int) -> None:
        """Take the gradient steps of one time of the schedule."""
        model, config = self.world.model, self.config
        named = (SEED, "attack", self.example.id)
        noises, tokens = (generator(*named, kind, at) for kind in ("noise", "tokens"))
        t = torch.tensor(self.times[at], device=model.device)
        shape = (config.iterations, config.tokens)
        uniform = torch.rand(shape, generator=tokens, dtype=torch.float64)
        image, level = model.noising.levels(t, self.clean)
        for i in range(config.iterations):
            noise = torch.randn(self.clean.shape, generator=noises).to(model.device)
            noised = (image * self.clean + level * noise).to(model.dtype)
            drawn = [multinomial(r, u.item()) for r, u in zip(self.rows[0], uniform[i])]  # noqa: B905
            one_hot = Choose.apply(self.rows, torch.stack(drawn)[None])
            text = self.text(one_hot)
            pred = model.denoiser(noised, t, encoder_hidden_states=text, return_dict=False)[0]
            loss = functional.mse_loss(pred, noise.to(pred))
            self.adam.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.adam.step()
            with torch.no_grad():
                for k in range(config.tokens):
                    self.rows[0, k] = bisected(self.rows[0, k], self.xi)

    def proposal(self) -> str:
        """Return the text of the most likely tokens before the prompt."""
        tokenizer = self.world.model.tokenizer
        ids = self.joined(self.ids, self.rows.argmax(dim=-1))[0].tolist()
        marks = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        return " ".join(tokenizer.decode([i for i in ids if i not in marks]).split())

    def judge(self, text: str) -> bool:
        """Draw and judge one picture."""
        guidance = self.example.guidance
        settings = self.world.sampling
        if guidance is not None:
            settings = replace(settings, guidance=guidance)
        image = plain_images(self.world.model, [Image(text, self.example.seed)], settings)
        return bool(self.world.judge.judge(image).positive[0])


def plain_attack(world: World, config: GradientConfig, xi: float = XI) -> Run:
    """Attack one prompt after the other."""
    texts: dict[str, list[str]] = {}
    outcomes, steps = [], 0
    for example in world.examples:
        begin = time.perf_counter()
        said = texts[example.id] = [example.prompt]
        prompt = PlainPrompt(world, example, config, xi)
        shows = [prompt.judge(example.prompt)]
        for at in range(config.stages):
            if shows[-1]:
                break
            prompt.stage(at)
            steps += config.iterations
            said.append(prompt.proposal())
            shows.append(prompt.judge(said[-1]))
        outcomes.append(Outcome.of(example.id, shows, time.perf_counter() - begin))
    pictures = sum(one.images for one in outcomes)
    return Run(texts, outcomes, steps, pictures, pictures)


# The project -------------------------------------------------------------------------------------


class Noted(Arena):
    """An arena that notes the texts it is asked to draw.

    Attributes:
        said: Those of each prompt, by its id; its own text first.
    """

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.said: dict[str, list[str]] = {example.id: [] for example in self.examples}

    def shoot(self, shots: Sequence[Shot], *more: Any) -> list[Ruling]:
        """Draw and judge pictures; see `Arena.shoot`."""
        for shot in shots:
            self.said[shot.example.id].append(shot.text)
        return super().shoot(shots, *more)


def arena_of(world: World, config: GradientConfig) -> Noted:
    """Return where the project attacks."""
    aims = Aims(
        examples=world.examples,
        judge=lambda example: world.judge,
        sampling=world.sampling,
        targets=world.sampling,
        pictures=world.pictures,
        pairs=(),
        store=world.pictures,
    )
    return Noted(world.placed, None, aims, config, None, world.engine, SEED)


def our_attack(world: World, config: GradientConfig) -> Run:
    """Attack as mmforget does."""
    world.placed._memo.clear()
    arena = arena_of(world, config)
    TextGrad(config).hunt(arena)
    found = arena.finish()
    return Run(
        arena.said,
        [outcome(row) for row in found],
        sum(row.steps for row in found),
        sum(row.images for row in found),
        arena.queries,
    )


# Worlds ------------------------------------------------------------------------------------------


def make_world(given: argparse.Namespace, folder: Path, dtype: torch.dtype) -> World:
    """Return an erased model, prompts, and pictures that the original draws of them.

    Args:
        given: What the command line says.
        folder: For tables, pictures and the mini pipeline.
        dtype: Of all weights.
    """
    name, device = STYLE.replace(" ", "_"), torch.device(given.device)
    judge: Judge = Brightness()
    if given.pipeline:
        model = open_pipeline(given.pipeline)
    elif given.size == "sd15":
        model = from_pipe(large())
    else:
        from mmforget.diffusion import mini_model

        mini.write_original(folder / "pipeline", SEED)
        model = open_pipeline(str(folder / "pipeline"))
        judge = ClassifierJudge(mini_model.load_classifiers(device)[0], name)
    model = model.requires_grad_(False).to(device, dtype)
    mini.write_prompts(folder / "prompts", SEED)
    table = read_examples(folder / "prompts" / f"{name}.csv")
    examples = []
    for k in range(max(given.prompts, *BATCHES)):  # the table again and again, with other seeds
        row = table[k % len(table)]
        examples.append(replace(row, id=str(k), seed=row.seed + k // len(table), row=k))
    sampling = Sampling("ddim", given.steps, GUIDANCE, given.picture_batch)
    (folder / "pictures").mkdir()
    images = [Image(example.prompt, example.seed) for example in examples]
    for rows, pixels in generate(model, images, sampling):
        for k, image in zip(rows, pixels, strict=True):
            write_image(folder / "pictures" / f"{k}.png", image)
    engine = Engine(Runtime(device=given.device, threads=given.threads, progress=False))
    erase(model, [example.prompt for example in table], engine)
    placed: Any = engine.place(copy.deepcopy(model))
    return World(model, placed, examples, folder / "pictures", judge, sampling, engine)


def erase(model: DiffusionModel, prompts: Sequence[str], engine: Engine) -> None:
    """Let the style's prompts draw photos: UCE on whole prompts, a moment's work."""
    anchors = tuple(prompt.replace(STYLE, ANCHOR) for prompt in prompts)
    retain = tuple(prompt.replace(STYLE, kept) for kept in KEPT for prompt in prompts)
    concept = Concept(STYLE, "style", f"{STYLE} style", ANCHOR, tuple(prompts), anchors)
    none: Dataset = None  # type: ignore[assignment]
    ctx = Context(
        engine=engine,
        adapter=DiffusionAdapter(model.noising, model.scale_latents),
        model=model,
        splits=Splits(none, none, none, none, none),
        reads=frozenset(),
        label="uce",
        seed=SEED,
        target=Erasure((concept,), KEPT, retain),
    )
    UCE(UCEConfig(texts="prompts")).run(ctx)


def large() -> Any:
    """Return a pipeline of Stable Diffusion 1.5's size with a vocabulary of CLIP's length.

    Tokens beyond the mini tokenizer's are names that no text is read as; an attack can choose them.
    """
    from transformers import CLIPTokenizer

    pipe = sd15()
    known = json.loads(pipe.tokenizer.backend_tokenizer.to_str())["model"]
    vocab = dict(known["vocab"])
    vocab |= {f"<{index}>": index for index in range(len(vocab), VOCABULARY)}
    merges: Any = [tuple(pair) for pair in known["merges"]]
    window = pipe.tokenizer.model_max_length
    pipe.tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=window)
    pipe.text_encoder.resize_token_embeddings(VOCABULARY, mean_resizing=False)
    return pipe


# Figures -----------------------------------------------------------------------------------------

Ways = Mapping[str, tuple[Callable[[], Any], float]]  # work, and how much of it that is


def compare(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return all figures."""
    device = torch.device(given.device)
    (folder / "world").mkdir()
    world = make_world(given, folder / "world", torch.float32)
    config = GradientConfig(
        tokens=given.tokens,
        stages=given.stages,
        iterations=given.iterations,
        images=given.stages + 1,
        batch_size=given.batch,
    )
    found: dict[str, Any] = {
        "judge": world.judge.name,
        "vocabulary": len(world.model.tokenizer),
        **whole(world.first(given.prompts), config, given.repeats),
        "gradient_steps_per_s": gradients(world, config, given.repeats),
        "pictures_per_s": pictures(world, given.repeats),
        "projections_per_s": projections(world, config, given.repeats),
    }
    if device.type == "cuda":
        found["peak_GiB"] = peaks(world, config)
        found["card"] = torch.cuda.get_device_name(device)
    elif given.check:
        (folder / "wide").mkdir()
        wide = make_world(given, folder / "wide", torch.float64).first(given.check)
        runs = plain_attack(wide, config, EXACT), our_attack(wide, config)
        found["equal_texts"] = [agreed(*runs), len(wide.examples)]
    return found


def whole(world: World, config: GradientConfig, repeats: int) -> dict[str, Any]:
    """Attack all prompts on both sides, by turns."""
    short = replace(config, stages=1)
    plain_attack(world.first(1), short)
    our_attack(world, short)
    sides = {
        "plain": lambda: plain_attack(world, config),
        "ours": lambda: our_attack(world, config),
    }
    runs: dict[str, Run] = {}
    seconds = {name: float("inf") for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            made: list[Run] = []
            spent = timed(lambda: made.append(side()), world.engine.device)  # noqa: B023
            seconds[name], runs[name] = min(seconds[name], spent), made[0]
    count = len(world.examples)
    shares = {name: rates(run.outcomes, count) for name, run in runs.items()}
    return {
        "seconds": seconds,
        "prompts_per_minute": {name: 60 * count / spent for name, spent in seconds.items()},
        "pre_asr": {name: share.pre._asdict() for name, share in shares.items()},
        "asr": {name: share.asr._asdict() for name, share in shares.items()},
        "gradient_steps": {name: run.steps for name, run in runs.items()},
        "judged_pictures": {name: run.judged for name, run in runs.items()},
        "drawn_pictures": {name: run.drawn for name, run in runs.items()},
        "equal_texts_float32": [agreed(runs["plain"], runs["ours"]), count],
    }


def agreed(plain: Run, ours: Run) -> int:
    """Return for how many prompts both sides judged the same texts, stage by stage."""
    return sum(list(ours.texts[name]) == list(said) for name, said in plain.texts.items())


def gradients(world: World, config: GradientConfig, repeats: int) -> dict[str, float | str]:
    """Return gradient steps a second, those of each prompt counted: plain, and by batches."""
    plain = PlainPrompt(world, world.examples[0], config)
    ways = {"plain": (lambda: plain.stage(0), float(config.iterations))}
    for name, (size, precision) in batches(world).items():
        ways[name] = (stage(world, config, size, precision), float(size * config.iterations))
    return best(ways, repeats, world.engine.device)


def batches(world: World) -> dict[str, tuple[int, str]]:
    """Return batch sizes and precisions of the project's gradient steps, by what to call them."""
    found = {str(size): (size, "no") for size in BATCHES}
    if world.engine.device.type == "cuda":
        found |= {f"{size} bf16": (size, "bf16") for size in BATCHES}
    return found


def stage(
    world: World, config: GradientConfig, size: int, precision: str = "no"
) -> Callable[[], None]:
    """Return the project's gradient steps of one stage, on a batch of prompts."""
    runtime = replace(world.engine.runtime, precision=precision)
    part = replace(world.first(size), engine=Engine(runtime))
    wide = replace(config, batch_size=size)
    search = TextGrad(wide).search(arena_of(part, wide))
    slots = range(size)

    def work() -> None:
        for slot, example in zip(slots, part.examples, strict=True):
            search.open(slot, example)
        search.stage(slots)

    return work


def peaks(world: World, config: GradientConfig) -> dict[str, float | str]:
    """Return the peak memory of a stage of gradient steps by batches, GiB."""
    found: dict[str, float | str] = {}
    for name, (size, precision) in batches(world).items():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            stage(world, replace(config, iterations=1), size, precision)()
            found[name] = torch.cuda.max_memory_allocated() / 2**30
        except torch.OutOfMemoryError:
            found[name] = FULL
    return found


def pictures(world: World, repeats: int) -> dict[str, float | str]:
    """Return pictures a second: plain, and by batches; one by one it is one pass a step."""
    images = [Image(e.prompt, e.seed) for e in world.examples[: max(BATCHES)]]
    few = images[:4]

    def draw(some: Sequence[Image], size: int) -> None:
        world.placed._memo.clear()
        for _ in generate(world.placed, some, replace(world.sampling, batch_size=size)):
            pass

    ways: dict[str, tuple[Callable[[], Any], float]] = {
        "plain": (lambda: plain_images(world.model, few, world.sampling), len(few))
    }
    for size in BATCHES:
        some = few if size == 1 else images[:size]
        ways[str(size)] = (partial(draw, some, size), len(some))
    return best(ways, repeats, world.engine.device)


def projections(world: World, config: GradientConfig, repeats: int) -> dict[str, float | str]:
    """Return projections a second of a prompt's rows after a step: plain bisection, and exact."""
    count, words = config.batch_size, len(world.model.tokenizer)
    noise = torch.randn(count, config.tokens, words, generator=torch.Generator().manual_seed(SEED))
    rows = (1 / words + config.lr * noise).to(world.model.device)
    ways: Ways = {
        "plain": (lambda: [bisected(row, XI) for row in rows[0]], 1),
        "ours": (lambda: project_simplex(rows), count),
    }
    return best(ways, repeats, world.engine.device)


def best(ways: Ways, repeats: int, device: torch.device) -> dict[str, float | str]:
    """Return the best rate of each way, run by turns after one turn to warm up."""
    found: dict[str, float | str] = {}
    for turn in range(1 + repeats):
        for name, (work, amount) in ways.items():
            known = found.get(name, 0.0)
            if isinstance(known, str):
                continue
            try:
                spent = timed(work, device)
            except torch.OutOfMemoryError:
                found[name] = FULL
                torch.cuda.empty_cache()
            else:
                found[name] = max(known, amount / spent) if turn else 0.0
    return found


# Output ------------------------------------------------------------------------------------------


def table(found: Mapping[str, Any], given: argparse.Namespace) -> str:
    """Return the figures as text."""
    lines = [
        f"{given.prompts} prompts, at most {given.stages} stages of {given.iterations} steps and a "
        f"picture of {given.steps}; judge: {found['judge']}",
        _line("", "plain", "mmforget", "ratio"),
    ]

    def compared(title: str, plain: Any, ours: Any) -> None:
        ratio = "" if isinstance(ours, str) else f"{ours / plain:.1f}"
        lines.append(_line(title, _figure(plain), _figure(ours), ratio))

    speed = found["prompts_per_minute"]
    compared("prompts a minute", speed["plain"], speed["ours"])
    for key, title in (("pre_asr", "success before the attack"), ("asr", "ASR")):
        shown = [_share(found[key][side]) for side in ("plain", "ours")]
        lines.append(_line(f"{title}, Wilson 95 %", *shown))
    for key in ("gradient_steps", "judged_pictures", "drawn_pictures"):
        shown = [str(found[key][side]) for side in ("plain", "ours")]
        lines.append(_line(key.replace("_", " "), *shown))
    speed = found["gradient_steps_per_s"]
    for name in [name for name in speed if name != "plain"]:
        compared(f"gradient steps a second, batch {name}", speed["plain"], speed[name])
    speed = found["pictures_per_s"]
    for name in [name for name in speed if name != "plain"]:
        compared(f"pictures a second, batch {name}", speed["plain"], speed[name])
    lines += ["", _line("each measure alone", "without", "with", "ratio")]
    last = str(max(BATCHES))
    steps, drawn = found["gradient_steps_per_s"], found["pictures_per_s"]
    compared(f"batching: gradient steps a second, 1 and {last}", steps["1"], steps[last])
    compared(f"batching: pictures a second, 1 and {last}", drawn["1"], drawn[last])
    compared("guidance in one pass: pictures a second", drawn["plain"], drawn["1"])
    speed = found["projections_per_s"]
    compared("exact projection, all rows at once, a second", speed["plain"], speed["ours"])
    judged, made = found["judged_pictures"]["ours"], found["drawn_pictures"]["ours"]
    compared("equal texts drawn once: pictures drawn", judged, made)
    lines.append("")
    for name, size in found.get("peak_GiB", {}).items():
        lines.append(f"peak memory of gradient steps, batch {name}: {_figure(size)} GiB")
    if "equal_texts" in found:
        lines.append("equal texts: {} of {} (float64)".format(*found["equal_texts"]))
    lines.append("equal texts: {} of {} (float32)".format(*found["equal_texts_float32"]))
    return "\n".join(lines)


def _line(title: str, *cells: str) -> str:
    return (
        f"{title:<50}"
        + "".join(f"{cell:>18}" for cell in cells[:2])
        + "".join(f"{cell:>8}" for cell in cells[2:])
    )


def _figure(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _share(share: Mapping[str, float]) -> str:
    return f"{share['value']:.2f} [{share['low']:.2f}, {share['high']:.2f}]"


def main() -> None:
    """Print the figures as a table or as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipeline", help="Stable Diffusion folder")
    parser.add_argument("--size", choices=("mini", "sd15"), default="mini")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompts", type=int, help="prompts (32; large models: 8)")
    parser.add_argument("--stages", type=int, help="stages of a prompt (6; large models: 2)")
    parser.add_argument("--iterations", type=int, default=8, help="gradient steps of a stage")
    parser.add_argument("--tokens", type=int, default=3, help="adversarial tokens")
    parser.add_argument("--steps", type=int, default=10, help="denoising steps of a picture")
    parser.add_argument("--batch", type=int, default=32, help="prompts attacked together")
    parser.add_argument("--picture-batch", type=int, default=32, help="pictures drawn together")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument(
        "--check", type=int, help="prompts of the check in float64, on the CPU (8; 0)"
    )
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    given = parser.parse_args()
    budget = BUDGETS[given.size == "mini" and given.pipeline is None]
    for name, value in zip(("prompts", "stages", "check"), budget, strict=True):
        if getattr(given, name) is None:
            setattr(given, name, value)
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        found = compare(given, Path(folder))
    machine = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
    if given.json:
        print(json.dumps({**machine, **vars(given), **found}, indent=1))
        return
    print(", ".join([*machine.values(), found.get("card", f"{given.threads} threads")]))
    print(table(found, given))


if __name__ == "__main__":
    main()
