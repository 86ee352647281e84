"""Batched generation: one latent for each (prompt, seed), whatever the batch or the order."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmforget.diffusion.conditions import Conditions, cat
from mmforget.diffusion.edits import Step
from mmforget.diffusion.models import DiffusionModel
from mmforget.diffusion.noise import Sampling
from mmforget.errors import ConfigError

logger = logging.getLogger(__name__)


class Image(NamedTuple):
    """One image to generate."""

    prompt: str
    seed: int


def start_latents(model: DiffusionModel, seeds: Sequence[int], size: int | None = None) -> Tensor:
    """Return standard normal latents [B, C, h, w], each drawn on the CPU from its own seed.

    `torch.Generator().manual_seed(seed)` and float32, as diffusers pipelines draw them, so that
    the same seed gives the same picture in plain diffusers, on any device and in any batch.

    Raises:
        ConfigError: The size is no multiple of what a latent stands for.
    """
    channels, height, width = model.latent_shape
    if size is not None:
        unit = model.scale_factor * (2 if model.denoiser_name == "transformer" else 1)  # patches
        if size % unit:
            raise ConfigError(f"images of {size} pixels: a multiple of {unit} is needed")
        height = width = size // model.scale_factor
    drawn = [
        torch.randn((1, channels, height, width), generator=torch.Generator().manual_seed(seed))
        for seed in seeds
    ]
    return torch.cat(drawn).to(model.device, model.dtype)


@torch.no_grad()
def denoise(
    model: DiffusionModel,
    latents: Tensor,
    text: Conditions,
    negative: Conditions,
    settings: Sampling,
    start: int = 0,
    stop: int | None = None,
    seeds: Sequence[int] | None = None,
    watch: Callable[[Step, Tensor], None] | None = None,
) -> Tensor:
    """Denoise a batch from one step of the sampler to another.

    The two guided predictions are one pass over 2B rows. Stopping early gives the x_t that
    ESD-like methods train on.

    Args:
        model: The model; its edits act.
        latents: Standard normal noise (start 0), or latents as an earlier call returned them.
        text: Conditions, B rows.
        negative: Conditions of the empty (or negative) prompt, B rows.
        settings: Sampler, steps and guidance.
        start: First step.
        stop: Step before which to stop; None: to the end.
        seeds: Seeds of samplers that draw noise on the way: after the start latents, from the same
            stream, as diffusers does.
        watch: Called after each step with it and the new latents.

    Returns:
        Latents [B, C, h, w]: clean ones, or at the noise level of step `stop`.
    """
    tokens = latents.shape[-1] * latents.shape[-2] // 4
    scheduler = model.noising.sampler(settings, tokens)
    times = scheduler.timesteps
    last = len(times) if stop is None else stop
    edits = model.active_edits()
    for edit in edits:
        text, negative = edit.begin(model, text, negative)
    extra = next((more for e in edits if (more := e.extra(model, text)) is not None), None)
    guided = settings.guidance != 1.0 and not _distilled(model)
    options: dict[str, Any] = {}
    if seeds is not None and _draws(scheduler):
        options["generator"] = [_behind(seed, latents[:1], 1 + start) for seed in seeds]
    if start == 0 and model.noising.kind != "flow":
        latents = latents * scheduler.init_noise_sigma
    if start > 0 and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    for index in range(start, last):
        time = times[index]
        scaled = latents
        if hasattr(scheduler, "scale_model_input"):
            scaled = scheduler.scale_model_input(latents, time)
        step = Step(index, len(times), time, scaled, settings.guidance)
        now = text
        for edit in edits:
            now = edit.before_step(model, step, now)
        if guided:
            parts = [negative, now] + ([extra] if extra is not None else [])
            owner = cat([now] * len(parts))
            found = model.predict(
                scaled.repeat(len(parts), 1, 1, 1), time, cat(parts), owner=owner
            ).chunk(len(parts))
            third = found[2] if extra is not None else None
            chosen = None
            for edit in edits:
                made = edit.guide(step, found[0], found[1], third)
                chosen = made if made is not None else chosen
            if chosen is None:
                chosen = found[0] + settings.guidance * (found[1] - found[0])
        else:
            strength = settings.guidance if _distilled(model) else 1.0
            chosen = model.predict(scaled, time, now, guidance=strength)
        latents = scheduler.step(chosen, time, latents, return_dict=False, **options)[0]
        if watch is not None:
            watch(step, latents)
    return latents


@torch.no_grad()
def generate(
    model: DiffusionModel,
    images: Sequence[Image],
    settings: Sampling,
    negative: str = "",
) -> Iterator[tuple[range, Tensor]]:
    """Yield finished images in order, a batch at a time.

    All prompts are encoded before the first batch, each distinct one once.

    Args:
        model: The model.
        images: Prompts and seeds.
        settings: Sampler, steps, guidance, batch size, image size.
        negative: Negative prompt.

    Yields:
        Places in `images`, and uint8 images [B, 3, H, W] on the CPU.
    """
    if not images:
        return
    place = {prompt: k for k, prompt in enumerate(dict.fromkeys(i.prompt for i in images))}
    text = model.encode(tuple(place))
    empty = model.unconditional(negative)
    for first in range(0, len(images), settings.batch_size):
        rows = range(first, min(first + settings.batch_size, len(images)))
        seeds = [images[i].seed for i in rows]
        latents = denoise(
            model,
            start_latents(model, seeds, settings.size),
            text.rows([place[images[i].prompt] for i in rows]),
            empty.repeat(len(rows)),
            settings,
            seeds=seeds,
        )
        yield rows, model.to_images(latents).cpu()


def _distilled(model: DiffusionModel) -> bool:
    """Return whether guidance is no second pass: FLUX.1-dev reads it, FLUX.1-schnell has none."""
    return model.family == "flux"


def _behind(seed: int, like: Tensor, count: int) -> torch.Generator:
    """Return a seed's generator after its start latents and the noise of earlier steps."""
    made = torch.Generator().manual_seed(seed)
    for _ in range(count):
        torch.randn(like.shape, generator=made)
    return made


def _draws(scheduler: Any) -> bool:
    import inspect

    return "generator" in inspect.signature(scheduler.step).parameters
