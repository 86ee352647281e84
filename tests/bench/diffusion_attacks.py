"""Speed of text_grad against a plain loop: `python -m tests.bench.diffusion_attacks --threads 2`.

The plain loop works as the public UnlearnDiffAtk code does, written anew from its description: one
prompt after the other; a step draws a one-hot row for each token, multiplies it with the table of
embeddings, joins the pieces of the sequence, takes `torch.optim.Adam` on the rows and projects them
by a bisection that reads every sum back; after each stage one picture, its prompt and the empty one
encoded anew, two UNet calls a step, judged alone. What the public code wastes besides is left out
of it: models are loaded once, weights get no gradients, and a prompt ends at its first success.

Both sides attack one model, erased by UCE, with the same prompts, pictures, budget and judge, and
draw noise and tokens from the same generators of each prompt. They run by turns in one process,
once before the clock starts. In float64, where the plain bisection goes on to 1e-12, both must find
the same texts stage by stage: `equal texts`. The defaults keep the published share of gradients and
pictures, 40 steps to a picture of 50: 8 to 10.

`--pipeline FOLDER` takes any Stable Diffusion folder, `--size sd15` random weights of that size and
a vocabulary of 49,408 (for a GPU; brightness is the judge), and without both it is the mini world.
"""

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from mmforget.context import Context
from mmforget.diffusion import mini
from mmforget.diffusion.adapter import DiffusionAdapter
from mmforget.diffusion.answers import read, write_image
from mmforget.diffusion.attacks.arena import Aims, Arena, Found, Shot
from mmforget.diffusion.attacks.asr import Outcome, Rate, rates
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


class Brightness:
    """A judge that needs no weights: the lighter half is positive."""

    name = "brightness"

    def judge(self, images: Tensor) -> Verdict:
        """Return the verdict."""
        score = images.double().mean(dim=(1, 2, 3)) / 255
        return Verdict(score > 0.5, score.float(), [""] * len(images), [{}] * len(images))


@dataclass(frozen=True)
class World:
    """What both sides attack.

    Attributes:
        model: The erased model.
        examples: Prompts.
        pictures: Folder of their target pictures.
        judge: Judge of all pictures.
        sampling: How pictures are drawn.
        engine: Where the project runs.
    """

    model: DiffusionModel
    examples: Sequence[Example]
    pictures: Path
    judge: Judge
    sampling: Sampling
    engine: Engine


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
    """An arena that notes the texts it is asked to draw."""

    def shoot(self, shots: Sequence[Shot], *more: Any) -> Any:
        """Draw and judge pictures; see `Arena.shoot`."""
        for shot in shots:
            self.said.setdefault(shot.example.id, []).append(shot.text)
        return super().shoot(shots, *more)

    @property
    def said(self) -> dict[str, list[str]]:
        """Texts by the prompt's id, that of the prompt itself first."""
        return self.__dict__.setdefault("_said", {})


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
    return Noted(world.model, None, aims, config, None, world.engine, SEED)


def our_attack(world: World, config: GradientConfig) -> Run:
    """Attack as mmforget does."""
    world.model._memo.clear()
    arena = arena_of(world, config)
    TextGrad(config).hunt(arena)
    found: list[Found] = arena.finish()
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
        folder: For pictures and the mini pipeline.
        dtype: Of all weights.
    """
    sampling = Sampling("ddim", given.steps, GUIDANCE, given.picture_batch)
    mini.write_prompts(folder / "prompts", SEED)
    table = read_examples(folder / "prompts" / f"{STYLE.replace(' ', '_')}.csv")
    count = max(given.prompts, *BATCHES)
    examples = [
        replace(table[k % len(table)], id=str(k), seed=table[k % len(table)].seed + k)
        for k in range(count)
    ]
    if given.pipeline:
        model = open_pipeline(given.pipeline)
    elif given.size == "sd15":
        model = from_pipe(big())
    else:
        mini.write_original(folder / "pipeline", SEED)
        model = open_pipeline(str(folder / "pipeline"))
    made = model.requires_grad_(False).to(torch.device(given.device), dtype)
    assert isinstance(made, DiffusionModel)
    judge: Judge = Brightness()
    if given.size == "mini" and not given.pipeline:
        from mmforget.diffusion import mini_model

        style = STYLE.replace(" ", "_")
        judge = ClassifierJudge(mini_model.load_classifiers(given.device)[0], style)
    pictures = folder / "pictures"
    pictures.mkdir(exist_ok=True)
    images = [Image(example.prompt, example.seed) for example in examples]
    for rows, pixels in generate(made, images, sampling):
        for k, image in zip(rows, pixels, strict=True):
            write_image(pictures / f"{k}.png", image)
    engine = Engine(Runtime(device=given.device, threads=given.threads, progress=False))
    erase(made, [example.prompt for example in table], engine)
    return World(made, examples, pictures, judge, sampling, engine)


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


def big() -> Any:
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
    pipe.text_encoder.resize_token_embeddings(VOCABULARY)
    return pipe


# Figures -----------------------------------------------------------------------------------------


def compare(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return all figures."""
    device = torch.device(given.device)
    if given.threads:
        torch.set_num_threads(given.threads)
    world = make_world(given, folder, torch.float32)
    config = GradientConfig(
        tokens=given.tokens,
        stages=given.stages,
        iterations=given.iterations,
        images=given.stages + 1,
        batch_size=given.batch,
    )
    found: dict[str, Any] = {"vocabulary": len(world.model.tokenizer), "judge": world.judge.name}
    found |= whole(replace(world, examples=world.examples[: given.prompts]), config, given, device)
    found["gradient_steps_per_s"] = gradients(world, config, given, device)
    found["pictures_per_s"] = pictures(world, given, device)
    found["projection_us_per_prompt"] = projection(world, config, given, device)
    if given.check and device.type == "cpu":
        (folder / "wide").mkdir()
        wide = make_world(given, folder / "wide", torch.float64)
        found["equal_texts"] = equal(replace(wide, examples=wide.examples[: given.check]), config)
    if device.type == "cuda":
        found["card"] = torch.cuda.get_device_name(device)
    return found


def whole(
    world: World, config: GradientConfig, given: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Attack all prompts on both sides, by turns."""
    runs: dict[str, Run] = {}
    sides: dict[str, Callable[[], Run]] = {
        "plain": lambda: plain_attack(world, config),
        "ours": lambda: our_attack(world, config),
    }
    few = replace(world, examples=world.examples[:1])
    plain_attack(few, replace(config, stages=1))
    our_attack(few, replace(config, stages=1))
    seconds = {name: float("inf") for name in sides}
    for _ in range(given.repeats):
        for name, side in sides.items():
            made: list[Run] = []
            spent = timed(lambda: made.append(side()), device)  # noqa: B023
            seconds[name], runs[name] = min(seconds[name], spent), made[0]
    count = len(world.examples)
    made_rates = {name: rates(run.outcomes, count) for name, run in runs.items()}
    return {
        "seconds": seconds,
        "prompts_per_minute": {name: 60 * count / spent for name, spent in seconds.items()},
        "asr": {name: _rate(rate.asr) for name, rate in made_rates.items()},
        "pre_asr": {name: _rate(rate.pre) for name, rate in made_rates.items()},
        "steps": {name: run.steps for name, run in runs.items()},
        "judged": {name: run.judged for name, run in runs.items()},
        "drawn": {name: run.drawn for name, run in runs.items()},
        "same_texts_float32": _same(runs["plain"], runs["ours"]),
    }


def gradients(
    world: World, config: GradientConfig, given: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Return gradient steps a second (of one prompt each), and peak memory on a GPU."""
    found: dict[str, Any] = {}
    plain = PlainPrompt(world, world.examples[0], config)
    plain.stage(0)
    ways: dict[str, tuple[Callable[[], Any], int]] = {"plain": (lambda: plain.stage(0), 1)}
    precisions = ("no", "bf16") if device.type == "cuda" else ("no",)
    for precision in precisions:
        runtime = replace(world.engine.runtime, precision=precision)
        for size in BATCHES:
            wide = replace(config, batch_size=size)
            other = replace(world, engine=Engine(runtime), examples=world.examples[:size])
            arena = arena_of(other, wide)
            search = TextGrad(wide).search(arena)
            for slot, example in enumerate(other.examples):
                search.open(slot, example)
            slots = list(range(size))
            name = f"{size}" if precision == "no" else f"{size} {precision}"

            def work(search: Any = search, slots: list[int] = slots) -> None:
                search.at = [0] * len(search.at)
                search.stage(slots)

            ways[name] = (work, size)
    for turn in range(1 + given.repeats):
        for name, (work, size) in ways.items():
            if found.get(name) == OOM:
                continue
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            try:
                spent = timed(work, device)
            except torch.OutOfMemoryError:
                found[name] = OOM
                torch.cuda.empty_cache()
                continue
            if turn:  # the first is to warm up
                speed = size * config.iterations / spent
                found[name] = max(found.get(name, 0.0), speed)
            if device.type == "cuda":
                found[f"{name} peak_GiB"] = torch.cuda.max_memory_allocated(device) / 2**30
    return found


OOM = "out of memory"


def pictures(world: World, given: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Return pictures a second: plain, one by one in one pass a step, and in batches."""
    images = [Image(e.prompt, e.seed) for e in world.examples[: max(BATCHES)]]
    few = images[: 8 if device.type == "cpu" else 2]

    def ours(size: int) -> None:
        world.model._memo.clear()
        some = few if size == 1 else images
        for _ in generate(world.model, some, replace(world.sampling, batch_size=size)):
            pass

    ways: dict[str, tuple[Callable[[], Any], int]] = {
        "plain": (lambda: plain_images(world.model, few, world.sampling), len(few))
    }
    for size in BATCHES:
        ways[str(size)] = (lambda size=size: ours(size), len(few) if size == 1 else len(images))  # type: ignore[misc]
    found: dict[str, float] = {}
    for _ in range(given.repeats):
        for name, (work, count) in ways.items():
            found[name] = max(found.get(name, 0.0), count / timed(work, device))
    return found


def projection(
    world: World, config: GradientConfig, given: argparse.Namespace, device: torch.device
) -> dict[str, float]:
    """Return microseconds a prompt for the projection of its rows after a step of Adam."""
    count, words = config.batch_size, len(world.model.tokenizer)
    rng = torch.Generator().manual_seed(SEED)
    moved = 1 / words + config.lr * torch.randn(count, config.tokens, words, generator=rng).sign()
    rows = moved.to(device)
    ways = {
        "plain": lambda: [bisected(row, XI) for row in rows.flatten(0, 1)],
        "ours": lambda: project_simplex(rows),
    }
    found = {name: float("inf") for name in ways}
    for _ in range(1 + given.repeats):
        for name, work in ways.items():
            found[name] = min(found[name], 1e6 * timed(work, device) / count)
    return found


def equal(world: World, config: GradientConfig) -> str:
    """Return for how many prompts both sides judged the same texts, stage by stage."""
    plain, ours = plain_attack(world, config, EXACT), our_attack(world, config)
    return f"{_same(plain, ours)} of {len(world.examples)}"


def _same(plain: Run, ours: Run) -> int:
    return sum(list(ours.texts[name]) == list(said) for name, said in plain.texts.items())


def _rate(rate: Rate) -> dict[str, float]:
    return {"value": rate.value, "low": rate.low, "high": rate.high, "n": rate.n}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipeline")
    parser.add_argument("--size", choices=("mini", "sd15"), default="mini")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--stages", type=int, default=6)
    parser.add_argument("--iterations", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--picture-batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--check", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = compare(given, Path(folder))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
