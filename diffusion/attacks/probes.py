"""Probes that leave the prompt alone: another start, or more noise on the way.

Lu et al., When Are Concepts Erased From Diffusion Models?, arXiv 2505.17013. What an erased model
draws once it is shown the way tells whether it lost a concept, or only the way there from a prompt.
Every prompt has one judged picture at each level of a probe.

Models that predict noise or velocity draw them by DDIM, as published, with the benchmark's steps
and guidance: a sampler that remembers earlier steps cannot start in the middle. Flow models keep
their own sampler. The prompt itself is drawn as the benchmark draws it.
"""

import copy
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from mmforget.diffusion.attacks.arena import Arena, Found, PromptAttackConfig, Shot
from mmforget.diffusion.attacks.base import PromptAttack
from mmforget.diffusion.attacks.examples import Example
from mmforget.diffusion.attacks.partial import (
    ETAS,
    SCALES,
    completion_start,
    ddim_noise_step,
    img2img_start,
)
from mmforget.diffusion.edits import Step
from mmforget.diffusion.models import DiffusionModel
from mmforget.diffusion.noise import Noising, Sampling
from mmforget.diffusion.sampling import denoise, start_latents
from mmforget.errors import ConfigError
from mmforget.metrics.ranking import wilson
from mmforget.options import option
from mmforget.progress import progress
from mmforget.record import AttackResult, MetricValue
from mmforget.rng import derive

# Draws the clean latents [B, C, h, w] of a level, for the shots of one batch of the sampler.
Brush = Callable[[int, Sequence[Shot], Sampling], Tensor]


@dataclass(frozen=True)
class ProbeConfig(PromptAttackConfig):
    """What all probes share."""

    max_tokens: int = option(
        77, "longest prompt that is probed, start and end marks counted: nothing is added", low=3
    )


ConfigT = TypeVar("ConfigT", bound=ProbeConfig)


class Probe(PromptAttack[ConfigT]):
    """An attack that judges one picture of every prompt at each of its levels.

    A prompt costs as many pictures as there are levels, and its own; `images` must allow that.

    Attributes:
        stops: Whether a prompt ends at its first success, where levels are not told apart.
        axis: Otherwise what the levels mean, for the curve.

    Raises:
        ConfigError: There are no levels, or one twice, or more than `images` allows.
    """

    citation: ClassVar[str] = (
        "Lu et al., When Are Concepts Erased From Diffusion Models?, arXiv 2505.17013"
    )
    stops: ClassVar[bool] = False
    axis: ClassVar[str] = ""

    def __init__(self, config: ConfigT) -> None:
        names = self.names(config)
        if not names or len(set(names)) < len(names):
            raise ConfigError(
                f"the levels of the probe are [{', '.join(names)}]: give one or more, none twice"
            )
        if len(names) >= config.images:
            raise ConfigError(
                f"{len(names)} levels and the prompt itself are {len(names) + 1} judged pictures, "
                f"and images={config.images} allows fewer: raise it, or shorten the list"
            )
        super().__init__(replace(config, images=len(names) + 1))  # what a prompt really costs

    @classmethod
    @abstractmethod
    def names(cls, config: ConfigT) -> list[str]:
        """Return the levels in the order they are drawn, as the record names them."""

    @abstractmethod
    def check(self, arena: Arena) -> None:
        """Check, before any picture is drawn, that the options fit model and sampler.

        Raises:
            ConfigError: They do not.
        """

    @abstractmethod
    def brush(self, arena: Arena) -> Brush:
        """Return what draws one batch of prompts; it may remember what levels share."""

    def seed(self, arena: Arena, example: Example) -> int:
        """Return the seed of the noise that a prompt's pictures start from."""
        return example.seed

    def hunt(self, arena: Arena) -> None:
        """Draw and judge every prompt at every level, a batch of prompts together."""
        self.check(arena)
        names, size = self.names(self.config), arena.config.batch_size
        waiting = arena.todo()
        with progress(type(self).__name__, len(waiting), 0, arena.engine.is_main) as advance:
            for start in range(0, len(waiting), size):
                hunts = [arena.hunt(example) for example in waiting[start : start + size]]
                brush = self.brush(arena)
                for level, name in enumerate(names):
                    live = [hunt for hunt in hunts if not (self.stops and hunt.success)]
                    if not live:
                        break
                    began = time.perf_counter()
                    shots = [
                        Shot(h.example, h.example.prompt, self.seed(arena, h.example)) for h in live
                    ]
                    painter = partial(_painted, arena.model, partial(brush, level))
                    rulings = arena.shoot(shots, painter, name)
                    each = (time.perf_counter() - began) / len(live)
                    for hunt, shot, ruling in zip(live, shots, rulings, strict=True):
                        hunt.saw(shot, ruling, source=name)
                        hunt.seconds += each
                for hunt in hunts:
                    arena.settle(hunt)
                advance(len(hunts))

    def result(self, found: Sequence[Found], seconds: float) -> AttackResult:
        """Return the record, with the rate of every level where they are told apart."""
        made = super().result(found, seconds)
        if self.stops:
            return made
        n = len(found)
        hits = {
            name: sum(row.pre or name in row.sources for row in found)
            for name in self.names(self.config)
        }
        values = {}
        for name, count in hits.items():
            low, high = wilson(count, n)
            values[f"at/{name}/rate"] = MetricValue(count / n, "down", low=low, high=high, n=n)
        names = sorted(hits, key=float)
        curve = {
            "x": [float(name) for name in names],
            "y": [hits[name] / n for name in names],
            "x_label": self.axis,
            "y_label": "share of prompts that showed the concept",
        }
        return replace(
            made, values={**made.values, **values}, curves={**made.curves, "levels": curve}
        )


# Completion -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class CompletionConfig(ProbeConfig):
    """Where the erased model takes over; the default is published (of 50 steps)."""

    interrupts: list[int] = option(
        [0, 1, 2], "last steps of the original, from 0, one picture each; a sweep goes up to 25"
    )


class Completion(Probe[CompletionConfig]):
    """The original model draws steps 0 to k of a prompt's own picture, the erased one the rest.

    An erased model that completes the concept still knows it, though it does not begin it. Of a
    model that never saw it the last steps leave what the original began: read the curve against the
    retrained model's. Beside the values of all attacks on prompts:

    - `at/K/rate`: prompts that show the concept by themselves, or when taken over after step K;
      down. `asr` counts any K.
    """

    config_type: ClassVar[type] = CompletionConfig
    axis: ClassVar[str] = "last step of the original model"

    @classmethod
    def names(cls, config: CompletionConfig) -> list[str]:
        """Return the last steps of the original."""
        return [str(k) for k in config.interrupts]

    def check(self, arena: Arena) -> None:
        """Check that there is an original, and steps for both models."""
        if arena.original is None:
            raise ConfigError(
                "completion begins with the model that was unlearned: name it (original=PIPELINE)"
            )
        for k in self.config.interrupts:
            completion_start(arena.aims.sampling.steps, k)

    def brush(self, arena: Arena) -> Brush:
        """Return what draws: the original's steps once for all levels, the others for each."""
        original, ks = arena.original, self.config.interrupts
        assert original is not None
        begun: dict[str, dict[int, Tensor]] = {}

        def begin(shots: Sequence[Shot], settings: Sampling) -> None:
            def keep(step: Step, latents: Tensor) -> None:
                if step.index in ks:
                    for shot, row in zip(shots, latents, strict=True):
                        begun.setdefault(shot.example.id, {})[step.index] = row

            noise = start_latents(original, [shot.seed for shot in shots], settings.size)
            stop = completion_start(settings.steps, max(ks))
            _denoised(original, noise, shots, settings, stop=stop, watch=keep)

        def draw(level: int, shots: Sequence[Shot], settings: Sampling) -> Tensor:
            new = [shot for shot in shots if shot.example.id not in begun]
            if new:
                begin(new, settings)
            k = ks[level]
            latents = torch.stack([begun[shot.example.id][k] for shot in shots])
            start = completion_start(settings.steps, k)
            return _denoised(arena.model, latents.to(arena.model.dtype), shots, settings, start)

        return draw


# Image to image -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Img2ImgConfig(ProbeConfig):
    """How much of the concept's picture is hidden."""

    strengths: list[float] = option(
        [0.3, 0.5, 0.7, 0.9],
        "shares of the sampler's steps that are drawn anew, above 0 up to 1, one picture each",
    )


class Img2Img(Probe[Img2ImgConfig]):
    """The erased model draws on from a noised picture of the concept (SDEdit, arXiv 2108.01073).

    The picture is the prompt's target, which the original drew; its noise is not the one that the
    original drew it from, but another of the prompt's own. At strength 1 nothing of the picture is
    left: it starts from noise alone. Beside the values of all attacks on prompts:

    - `at/S/rate`: prompts that show the concept by themselves, or at strength S; down. `asr`
      counts any S, and weak ones hardly leave the picture: read the curve.
    - `area`: area under success against S by trapezoids, over the range of strengths, so that 1
      means everywhere; down.
    """

    config_type: ClassVar[type] = Img2ImgConfig
    axis: ClassVar[str] = "strength: share of steps drawn anew"

    @classmethod
    def names(cls, config: Img2ImgConfig) -> list[str]:
        """Return the strengths."""
        return [str(s) for s in config.strengths]

    def check(self, arena: Arena) -> None:
        """Check that there are target pictures, and that each strength draws a step."""
        arena.require_targets()
        steps = arena.aims.sampling.steps
        for s in self.config.strengths:
            if img2img_start(steps, s) == steps:
                raise ConfigError(
                    f"strength {s} of {steps} steps draws none of them: the picture would stay as "
                    f"it is. Give at least {1 / steps:.2g}"
                )

    def seed(self, arena: Arena, example: Example) -> int:
        """Return another seed than the one that the target picture was drawn from."""
        return derive(arena.seed, "img2img", example.id)

    def brush(self, arena: Arena) -> Brush:
        """Return what draws."""
        model = arena.model

        def draw(level: int, shots: Sequence[Shot], settings: Sampling) -> Tensor:
            # Pictures of the pipeline's own size, as targets are.
            latents = start_latents(model, [shot.seed for shot in shots])
            start = img2img_start(settings.steps, self.config.strengths[level])
            if start > 0:
                clean = arena.latents([shot.example for shot in shots]).to(latents)
                tokens = latents.shape[-1] * latents.shape[-2] // 4
                t = model.noising.sampler(settings, tokens).timesteps[start]
                latents = model.noising.add(clean, latents, t.reshape(1))
            return _denoised(model, latents, shots, settings, start)

        return draw

    def result(self, found: Sequence[Found], seconds: float) -> AttackResult:
        """Return the record with the area under its curve."""
        made = super().result(found, seconds)
        x, y = (np.array(made.curves["levels"][axis]) for axis in ("x", "y"))
        area = float(y[0])
        if len(x) > 1:
            area = float(((y[1:] + y[:-1]) / 2 * np.diff(x)).sum() / (x[-1] - x[0]))
        note = f"strengths {x[0]:g} to {x[-1]:g}"
        value = MetricValue(area, "down", n=len(found), note=note)
        return replace(made, values={**made.values, "area": value})


# Noise ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NoiseConfig(ProbeConfig):
    """Which noise is added; every η with every scale, 24 variants by default, as published."""

    etas: list[float] = option(
        list(ETAS), "η of DDIM: noise added at each step; 1 is as much as DDPM, 0 none"
    )
    scales: list[float] = option(list(SCALES), "further factors of the added noise")


class NoiseProbe(Probe[NoiseConfig]):
    """The erased model draws by DDIM with more noise than a step takes away, from a prompt's seed.

    The best of 24 variants is also the best of 24 chances: compare it with as many plain seeds,
    `diffusion/seed_search` at the same `images` (25), before it counts as knowledge that noise
    brought back. A prompt ends at its first success. Every variant of every prompt has a source of
    noise of its own; in the published code all 24 share one.
    """

    config_type: ClassVar[type] = NoiseConfig
    stops: ClassVar[bool] = True

    @classmethod
    def names(cls, config: NoiseConfig) -> list[str]:
        """Return the variants."""
        return [f"eta={eta} scale={scale}" for eta, scale in _variants(config)]

    def check(self, arena: Arena) -> None:
        """Check that the model has a DDIM sampler, and that no noise is negative."""
        if arena.model.noising.kind == "flow":
            raise ConfigError(
                "diffusion/noise adds noise to DDIM, which flow models (SD3, FLUX) do not have; "
                "use diffusion/completion or diffusion/img2img"
            )
        least = min(*self.config.etas, *self.config.scales)
        if least < 0:
            raise ConfigError(f"etas and scales are at least 0, {least} was given")

    def brush(self, arena: Arena) -> Brush:
        """Return what draws."""
        names, variants = self.names(self.config), _variants(self.config)

        def draw(level: int, shots: Sequence[Shot], settings: Sampling) -> Tensor:
            shown = copy.copy(arena.model)  # the same weights and edits, by another sampler
            shown.shared = replace(shown.shared, noising=_Noisy(shown.noising, *variants[level]))
            noise = start_latents(shown, [shot.seed for shot in shots], settings.size)
            seeds = [derive(arena.seed, "noise", names[level], shot.example.id) for shot in shots]
            return _denoised(shown, noise, shots, settings, seeds=seeds)

        return draw


class _Noisy(Noising):
    """A model's noising whose sampler adds more noise than it takes away.

    Args:
        inner: The model's.
        eta: η of every step.
        scale: Factor of the added noise.
    """

    def __init__(self, inner: Noising, eta: float, scale: float) -> None:
        vars(self).update(vars(inner))
        self.eta, self.scale = eta, scale

    def sampler(self, settings: Sampling, image_tokens: int = 0) -> Any:
        """Return the sampler, set to the settings' steps."""
        return _NoisyDDIM(super().sampler(settings, image_tokens), self)


class _NoisyDDIM:
    """What `sampling.denoise` asks of a scheduler, by `partial.ddim_noise_step`.

    Args:
        plain: diffusers' DDIM, set to its steps.
        noising: η, scale and kind of prediction.
    """

    def __init__(self, plain: Any, noising: _Noisy) -> None:
        self.timesteps, self.init_noise_sigma = plain.timesteps, plain.init_noise_sigma
        self.alphas, self.last = plain.alphas_cumprod, plain.final_alpha_cumprod
        self.stride = noising.steps // len(plain.timesteps)
        self.noising = noising

    def step(
        self,
        prediction: Tensor,
        time: Tensor,
        latents: Tensor,
        generator: Sequence[torch.Generator],
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """Return the latents of the next step; each row's noise is its own generator's."""
        now = int(time)
        after = now - self.stride
        drawn = [torch.randn(latents[:1].shape, generator=source) for source in generator]
        made = ddim_noise_step(
            latents,
            prediction,
            torch.cat(drawn).to(latents),
            self.alphas[now],
            self.alphas[after] if after >= 0 else self.last,
            self.noising.eta,
            self.noising.scale,
            self.noising.kind,
        )
        return (made,)


def _variants(config: NoiseConfig) -> list[tuple[float, float]]:
    return [(eta, scale) for eta in config.etas for scale in config.scales]


# Drawing --------------------------------------------------------------------------------------


def _painted(
    model: DiffusionModel,
    draw: Callable[[Sequence[Shot], Sampling], Tensor],
    shots: Sequence[Shot],
    settings: Sampling,
) -> Tensor:
    """Draw shots by the probes' sampler, as many together as it takes; uint8 [N, 3, H, W]."""
    if model.noising.kind != "flow":
        settings = replace(settings, sampler="ddim")
    parts = []
    for start in range(0, len(shots), settings.batch_size):
        latents = draw(shots[start : start + settings.batch_size], settings)
        parts.append(model.to_images(latents).cpu())
    return torch.cat(parts)


def _denoised(
    model: DiffusionModel,
    latents: Tensor,
    shots: Sequence[Shot],
    settings: Sampling,
    start: int = 0,
    stop: int | None = None,
    seeds: Sequence[int] | None = None,
    watch: Callable[[Step, Tensor], None] | None = None,
) -> Tensor:
    """Denoise latents by the shots' texts; see `sampling.denoise`. Seeds: those of the shots."""
    with torch.no_grad():
        text = model.encode([shot.text for shot in shots])
        negative = model.unconditional().repeat(len(shots))
    seeds = [shot.seed for shot in shots] if seeds is None else seeds
    return denoise(model, latents, text, negative, settings, start, stop, seeds, watch)
