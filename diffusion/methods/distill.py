"""What methods share that train on prompts alone: the loop, and noisy latents on the way to images.

A step sees B (concept, noise) pairs. Its latents x_t come from partial denoising with a prompt of
the concept; the model is matched to a target made of the original model's predictions at x_t.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from mmforget.context import Context
from mmforget.diffusion.adapter import DiffusionAdapter
from mmforget.diffusion.concepts import Concept, Erasure
from mmforget.diffusion.conditions import Conditions, cat
from mmforget.diffusion.methods.low_rank import LowRank, adapted
from mmforget.diffusion.models import DiffusionModel
from mmforget.diffusion.noise import Sampling
from mmforget.diffusion.sampling import denoise
from mmforget.methods.base import LossMethod
from mmforget.options import option
from mmforget.rng import Draws, derive, generator
from mmforget.training import optimise
from mmforget.types import Batch, Pass, Training, UnlearningMethod, full

ConfigT = TypeVar("ConfigT", bound="PromptTraining")

ROWS = 16  # latents denoised together; more are denoised one part after the other
SAMPLERS = ("ddim", "euler")  # those that need no memory of earlier steps


@dataclass(frozen=True)
class PromptTraining:
    """One optimisation over prompts: how long, how fast, of which weights."""

    steps: int = option(1000, "optimiser steps", low=0)
    lr: float = option(1e-5, "learning rate", low=0)
    optimizer: str = option("adam", "optimiser", choices=("sgd", "adam", "adamw"))
    weight_decay: float = option(0.0, "weight decay (decoupled for adamw)", low=0)
    batch_size: int = option(1, "pairs of concept and noise in an effective batch", low=1)
    clip_norm: float | None = option(None, "clip the global gradient norm", low=0)
    scope: str = option("esd-x", "parameters to train: a scope's name, or a regex")


class Pairs(NamedTuple):
    """The rows of a step that are held here.

    Attributes:
        concept: Which concept of the request, B of them; all come equally often.
        turn: A number for each, which says which of its texts or images is used.
        device: Where they are computed.
    """

    concept: tuple[int, ...]
    turn: tuple[int, ...]
    device: torch.device


class Turns:
    """The rows of a whole run as a data set: every concept in turn; the loop shuffles them.

    Args:
        size: Rows.
        concepts: Number of concepts.
    """

    def __init__(self, size: int, concepts: int) -> None:
        self.concepts = concepts
        self.ids = [str(i) for i in range(size)]
        self.digests = self.ids

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, indices: Sequence[int]) -> list[tuple[int, int]]:
        """Return (concept, turn) of each row."""
        return [(i % self.concepts, i // self.concepts) for i in indices]


class PairAdapter(DiffusionAdapter):
    """The modality's adapter for batches of `Turns`, which hold no images.

    Args:
        inner: The modality's own.
    """

    def __init__(self, inner: DiffusionAdapter) -> None:
        super().__init__(inner.noising, inner.scale)

    def prepare(self, raw: Any, draws: Draws, train: bool) -> Any:
        """Return the rows as they are, `Pairs`; methods draw by `batch.draws`."""
        concept, turn = zip(*raw, strict=True)
        return Pairs(concept, turn, draws.device)

    def units(self, data: Any) -> Tensor:
        """Return ones, [B]: a row counts once."""
        return torch.ones(len(data.concept), device=data.device)


class Prompted(UnlearningMethod[ConfigT]):
    """A method that trains on prompts of the request, without images of its own.

    A subclass writes `loss`, and the other hooks where it needs them; losses, seeds, step
    checkpoints and costs are those of `mmforget.training.optimise`.

    Attributes:
        edit: Low-rank adapters that are trained in place of weights; None: weights are.
    """

    reads: frozenset[str] = frozenset()
    modalities = frozenset({"diffusion"})
    intent: ClassVar[str] = "removal"
    holds: ClassVar[str] = "a frozen copy of the original model; with adapters, none"

    def __init__(self, config: ConfigT) -> None:
        super().__init__(config)
        self.edit: LowRank | None = None
        self._copy: DiffusionModel | None = None

    def setup(self, ctx: Context) -> None:
        """Choose what is trained and keep the original; `ctx.model` is θ0, in evaluation mode."""
        ctx.scope(self.config.scope)
        self.keep(ctx)

    @abstractmethod
    def loss(self, ctx: Context, batch: Batch) -> dict[str, Tensor]:
        """Return the loss of one micro-batch (`batch.data`: `Pairs`) as named terms.

        Scale them by `ctx.mean` (values of rows) or `ctx.once`.
        """

    def after_backward(self, ctx: Context) -> None:
        """Mask or project gradients, which are summed over processes by now."""
        return None

    def after_step(self, ctx: Context) -> None:
        """Correct weights after a step."""
        return None

    def state(self) -> dict[str, Any]:
        """Return what a step checkpoint must keep besides model and optimiser."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` returned; called after `setup`."""
        return None

    @property
    def training(self) -> Training:
        """The loop's settings."""
        config = self.config
        return Training(
            lr=config.lr,
            optimizer=config.optimizer,
            weight_decay=config.weight_decay,
            batch_size=config.batch_size,
            clip_norm=config.clip_norm,
            scope="pipeline",  # `setup` chooses
        )

    def count(self) -> int:
        """Return the optimiser steps of a run."""
        return self.config.steps

    def run(self, ctx: Context) -> nn.Module:
        """Optimise; a killed run goes on from its last step checkpoint in `resume`."""
        target: Erasure = ctx.target
        rows = Turns(self.count() * self.config.batch_size, len(target.concepts))
        inner = ctx.within(ctx.model, rows)
        assert isinstance(ctx.adapter, DiffusionAdapter)
        inner.adapter = PairAdapter(ctx.adapter)
        loop = _Loop(self)
        loop.resume = self.resume
        made = optimise(inner, loop)
        ctx.trainable = inner.trainable
        return made

    def keep(self, ctx: Context) -> None:
        """Keep the model as it is now, as what `original` gives."""
        made = ctx.frozen_copy()
        assert isinstance(made, DiffusionModel)
        self._copy = made

    def adapt(self, ctx: Context, name: str, scope: str, rank: int, alpha: float | None) -> None:
        """Add low-rank adapters to the layers of a scope and train them alone.

        Raises:
            ConfigError: The scope holds no layer that takes them.
        """
        model = model_of(ctx)
        layers = adapted(model, scope)
        self.edit = LowRank.fresh(model, layers, rank, derive(ctx.seed, name), alpha)
        free = next(n for n in _names(name) if n not in model.edits)
        model.add_edit(free, self.edit)
        ctx.scope(rf"edits\.{free}\..*")

    @contextmanager
    def original(self, ctx: Context) -> Iterator[DiffusionModel]:
        """Give the model as it was when it was kept, in a block without gradients.

        Where adapters are trained it is the same model with them switched off.
        """
        with torch.no_grad():
            if self.edit is not None:
                with self.edit.off():
                    yield model_of(ctx)
                return
            assert self._copy is not None, "setup did not keep the original"
            yield self._copy


class _Loop(LossMethod[Any]):
    """The shared training loop's view of a prompt method."""

    reads: frozenset[str] = frozenset({"retain"})
    intent: ClassVar[str] = "removal"
    citation: ClassVar[str] = ""
    config_type: ClassVar[type] = PromptTraining

    def __init__(self, method: Prompted[Any]) -> None:
        super().__init__(method.config)
        self.method = method

    @property
    def training(self) -> Training:
        return self.method.training

    def setup(self, ctx: Context) -> None:
        self.method.setup(ctx)

    def passes(self, epoch: int) -> Sequence[Pass]:
        return (Pass("prompts", anchor="retain"),)

    def loss(self, ctx: Context, forget: Batch | None, retain: Batch | None) -> dict[str, Tensor]:
        return {} if retain is None else self.method.loss(ctx, retain)

    def after_backward(self, ctx: Context) -> None:
        self.method.after_backward(ctx)

    def after_step(self, ctx: Context, optimizer: Any) -> None:
        # Fused optimisers write unseen by autograd, and `encode` remembers texts by versions.
        torch.autograd.graph.increment_version(list(ctx.trainable.values()))
        self.method.after_step(ctx)

    def state(self) -> dict[str, Any]:
        return self.method.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self.method.load_state(state)


class Points(NamedTuple):
    """Points on denoising paths.

    Attributes:
        latents: x_t as the model takes it, [R, C, h, w].
        t: Time steps [R].
    """

    latents: Tensor
    t: Tensor


class Stop(NamedTuple):
    """Where on which path a point lies.

    Attributes:
        path: Row of the start noise.
        step: Step of the sampler before which the path is left.
        chance: In [0, 1): where in the step's bin of training times the time is drawn.
    """

    path: int
    step: int
    chance: float


@torch.no_grad()
def points(
    model: DiffusionModel,
    text: Conditions,
    noise: Tensor,
    stops: Sequence[Stop],
    settings: Sampling,
    time: str = "bin",
    negative: Conditions | None = None,
) -> Points:
    """Return x_t at points of denoising paths; paths advance together, each to its last point.

    Args:
        model: The model that denoises.
        text: Conditions of the paths, P rows.
        noise: Standard normal start of each path, [P, C, h, w].
        stops: R points.
        settings: Sampler (`SAMPLERS`), steps, guidance; paths above its batch size go in parts.
        time: "step": t is the sampler's; "bin": uniform in the one of `steps` equal bins of
            training times that holds it, as ESD's first code draws it.
        negative: One row, the other half of guidance; None: the model's unconditional.
    """
    latents: dict[int, Tensor] = {}
    negative = model.unconditional() if negative is None else negative
    for first in range(0, len(noise), settings.batch_size):
        rows = list(range(len(noise)))[first : first + settings.batch_size]
        latents.update(_walk(model, text, negative, noise, stops, settings, rows))
    reached = _times(model, noise, settings)[[stop.step for stop in stops]]
    if time == "bin":
        reached = _in_bins(model, settings.steps, reached, [stop.chance for stop in stops])
    return Points(torch.stack([latents[k] for k in range(len(stops))]), reached.to(noise.device))


def draw_stops(
    paths: int, times: int, settings: Sampling, rng: torch.Generator, shared: bool = True
) -> list[Stop]:
    """Draw points uniformly over the steps of a sampler.

    Args:
        paths: P.
        times: How many times are drawn.
        settings: Its steps.
        rng: Source of the draws.
        shared: Every path stops at every time: P·times points, a time's together. False: path
            k mod P stops at time k.
    """
    steps = torch.randint(settings.steps, (times,), generator=rng).tolist()
    chances = torch.rand(times, generator=rng).tolist()
    pairs = list(zip(steps, chances, strict=True))
    if shared:
        return [Stop(path, *pair) for pair in pairs for path in range(paths)]
    return [Stop(k % paths, *pair) for k, pair in enumerate(pairs)]


def predictions(model: DiffusionModel, at: Points, texts: Sequence[Conditions]) -> list[Tensor]:
    """Return a model's predictions for several conditions by one pass, each [R, C, h, w].

    Args:
        model: The model.
        at: R points.
        texts: Conditions of R rows each.
    """
    count = len(texts)
    both = model.predict(at.latents.repeat(count, 1, 1, 1), at.t.repeat(count), cat(texts))
    return list(both.chunk(count))


def squared(pred: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error of each row, [R], in float32."""
    return (full(pred) - full(target)).square().flatten(1).mean(dim=1)


def text_of(concept: Concept, turn: int, prompt: str) -> tuple[str, str]:
    """Return a text that names a concept and the same with its anchor.

    Args:
        concept: The concept.
        turn: Which of its prompts.
        prompt: "text" (its short prompt), "name" (its bare name) or "prompts" (a full prompt).
    """
    if prompt == "prompts":
        place = turn % len(concept.prompts)
        return concept.prompts[place], concept.anchors[place]
    return (concept.name if prompt == "name" else concept.text), concept.anchor


def model_of(ctx: Context) -> DiffusionModel:
    """Return the context's model."""
    assert isinstance(ctx.model, DiffusionModel)
    return ctx.model


def step_rng(ctx: Context, name: str) -> torch.Generator:
    """Return the source of what all rows of the running step have in common."""
    return generator(ctx.seed, name, ctx.step)


def _walk(
    model: DiffusionModel,
    text: Conditions,
    negative: Conditions,
    noise: Tensor,
    stops: Sequence[Stop],
    settings: Sampling,
    alive: list[int],
) -> Iterator[tuple[int, Tensor]]:
    """Denoise some paths together; yield each of their points by its place in `stops`."""
    now, at = noise[alive], 0
    for step in sorted({stop.step for stop in stops if stop.path in alive}):
        going = [p for p in alive if any(s.path == p and s.step >= step for s in stops)]
        now = now[[alive.index(path) for path in going]]
        alive = going
        base = negative.repeat(len(alive))
        there = denoise(model, now, text.rows(alive), base, settings, start=at, stop=step)
        scheduler = model.noising.sampler(settings, _tokens(noise))
        scaled = there
        if hasattr(scheduler, "scale_model_input"):
            scaled = scheduler.scale_model_input(there, scheduler.timesteps[step])
        for place, stop in enumerate(stops):
            if stop.step == step and stop.path in alive:
                yield place, scaled[alive.index(stop.path)]
        if step > 0:  # the start noise gets the sampler's scale as a path leaves step 0
            now, at = there, step


def _times(model: DiffusionModel, noise: Tensor, settings: Sampling) -> Tensor:
    times: Tensor = model.noising.sampler(settings, _tokens(noise)).timesteps
    return times if times.dtype == torch.int64 else times.float()


def _tokens(noise: Tensor) -> int:
    return noise.shape[-1] * noise.shape[-2] // 4


def _in_bins(model: DiffusionModel, steps: int, times: Tensor, chances: Sequence[float]) -> Tensor:
    """Return times drawn in those of `steps` bins of training times that hold given times, [R]."""
    total = model.noising.steps
    place = (times.double() * steps / total).long().clamp(max=steps - 1)
    low, high = ((k * total / steps).round() for k in (place, place + 1))
    drawn = low + torch.tensor(chances, dtype=torch.float64) * (high - low)
    return drawn.float() if model.noising.kind == "flow" else drawn.long()


def _names(first: str) -> Iterator[str]:
    yield first
    count = 2
    while True:
        yield f"{first}_{count}"
        count += 1
