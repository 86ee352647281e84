"""Erased stable diffusion (ESD): unlearn a concept by guidance away from it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmforget.context import Context
from mmforget.diffusion.methods.distill import (
    ROWS,
    SAMPLERS,
    Pairs,
    Points,
    Prompted,
    PromptTraining,
    draw_stops,
    model_of,
    points,
    predictions,
    squared,
    step_rng,
    text_of,
)
from mmforget.diffusion.models import DiffusionModel
from mmforget.diffusion.noise import Sampling
from mmforget.diffusion.sampling import start_latents
from mmforget.options import option
from mmforget.types import Batch


@dataclass(frozen=True)
class ESDConfig(PromptTraining):
    """Defaults of the paper's code, which UnlearnCanvas uses.

    Today's scripts: form=current eta=2 lr=5e-5 steps=200 time=step x_t=original, for SDXL
    form=current eta=1 lr=2e-4 steps=200 time=step x_t=original guidance=2 sampler=euler. Names and
    styles: scope=esd-x; what is everywhere (nudity): scope=esd-u.
    """

    eta: float = option(1.0, "negative guidance η, as `form` counts it", low=0)
    form: str = option(
        "paper",
        "how η is counted: `paper`: target e0 - η(ec - e0); `current` (scripts of 2024 on): "
        "ec - η(ec - e0), one more for the same target",
        choices=("paper", "current"),
    )
    prompt: str = option(
        "text",
        "what names the concept: its short prompt, its bare name, or full prompts in turn",
        choices=("text", "name", "prompts"),
    )
    erase_from: str = option(
        "concept",
        "whose pictures lose the concept: its own prompt's, or (`anchor`) those of the request's "
        "anchor, as the scripts' --erase_from: e_anchor - η(ec - e0), η alike in both forms",
        choices=("concept", "anchor"),
    )
    guidance: float = option(3.0, "classifier-free guidance of partial denoising", low=0)
    denoise_steps: int = option(50, "steps of the sampler that x_t is a state of", low=1)
    sampler: str = option("ddim", "sampler (flow models have their own)", choices=SAMPLERS)
    x_t: str = option(
        "student",
        "which model denoises: the one in training (paper), or the original (today's scripts)",
        choices=("student", "original"),
    )
    time: str = option(
        "bin",
        "t: uniform in the training times next to the sampler's (paper), or its own (`step`)",
        choices=("bin", "step"),
    )
    times: int = option(
        1,
        "times taken of every path: a step's pairs are batch_size x times, at few more passes",
        low=1,
    )
    size: int | None = option(None, "side of images, pixels; null: the pipeline's own", low=8)
    lora_rank: int | None = option(
        None, "train low-rank adapters of this rank on the scope's layers; null: weights", low=1
    )
    lora_alpha: float | None = option(None, "alpha of the adapters; null: their rank", low=0)


class ESD(Prompted[ESDConfig]):
    """Minimise |e_θ(x_t, c) - (e0* - η(ec* - e0*))|² (eq. 6-8), * being the original model.

    x_t is made by denoising with the concept's prompt up to a random step. A step makes one
    partial denoising for all its pairs, one pass of the original and one of the student; all
    pairs share their times. Predictions may be noise, velocity or flow: the target is linear.
    """

    trains: ClassVar[str] = "weights in `scope`, or low-rank adapters on its layers"
    citation: ClassVar[str] = (
        "Gandikota et al., Erasing Concepts from Diffusion Models, ICCV 2023, arXiv 2303.07345"
    )
    config_type: ClassVar[type] = ESDConfig

    def setup(self, ctx: Context) -> None:
        """Choose the weights or add adapters; keep the original."""
        config = self.config
        if config.lora_rank is None:
            super().setup(ctx)
        else:
            self.adapt(ctx, "esd", config.scope, config.lora_rank, config.lora_alpha)
        self.eta = paper_eta(config.eta, config.form, config.erase_from)

    def loss(self, ctx: Context, batch: Batch) -> dict[str, Tensor]:
        """Return the term `forget`."""
        config, model, pairs = self.config, model_of(ctx), batch.data
        assert isinstance(pairs, Pairs)
        anchored = config.erase_from == "anchor"
        texts = [
            text_of(ctx.target.concepts[concept], turn, config.prompt)
            for concept, turn in zip(pairs.concept, pairs.turn, strict=True)
        ]
        concepts = [text for text, _ in texts]
        named = [anchor for _, anchor in texts] if anchored else concepts
        with ctx.engine.autocast():
            made = self._points(ctx, model, named, batch) if config.x_t == "student" else None
            with self.original(ctx) as original:
                if made is None:
                    made = self._points(ctx, original, named, batch)
                asked = [
                    original.unconditional().repeat(len(made.t)),
                    original.encode(concepts * config.times),
                ]
                if anchored:
                    asked.append(original.encode(named * config.times))
                e0, ec, *base = predictions(original, made, asked)
                target = esd_target(e0, ec, self.eta, base[0] if base else None)
            pred = model.predict(made.latents, made.t, model.encode(named * config.times))
        error = squared(pred, target).reshape(config.times, -1).mean(dim=0)
        return {"forget": ctx.mean(error, batch)}

    @torch.no_grad()
    def _points(
        self, ctx: Context, model: DiffusionModel, texts: Sequence[str], batch: Batch
    ) -> Points:
        """Return x_t of the step: for each of its times a row for each text."""
        config = self.config
        settings = Sampling(
            config.sampler, config.denoise_steps, config.guidance, ROWS, config.size
        )
        seeds = batch.draws("noise").integers(2**62).tolist()
        noise = start_latents(model, seeds, config.size)
        stops = draw_stops(len(texts), config.times, settings, step_rng(ctx, "times"))
        return points(model, model.encode(texts), noise, stops, settings, config.time)


def esd_target(e0: Tensor, ec: Tensor, eta: float, base: Tensor | None = None) -> Tensor:
    """Return base - η(ec - e0), whatever its shape; the paper's form, where base is e0 (eq. 7).

    Args:
        e0: The original's unconditional prediction.
        ec: Its prediction for the concept.
        eta: η as the paper counts it; see `paper_eta`.
        base: What is steered away from the concept: the prediction for another prompt that the
            concept is erased from. None: e0.
    """
    return (e0 if base is None else base) - eta * (ec - e0)


def paper_eta(eta: float, form: str, erase_from: str = "concept") -> float:
    """Return η in the paper's convention.

    Today's scripts steer from `ec`: ec - η(ec - e0) = e0 - (η - 1)(ec - e0). Where they erase a
    concept from another prompt, that prompt's prediction is the base and both forms agree.
    """
    return eta - 1.0 if form == "current" and erase_from == "concept" else eta
