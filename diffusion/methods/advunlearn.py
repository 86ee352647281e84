"""AdvUnlearn: train the text encoder to erase a concept against an adversarial prefix."""

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmforget.context import Context
from mmforget.diffusion.adversarial import adversarial_prefix, encode_placed, random_tokens
from mmforget.diffusion.attacks.layouts import LOCATIONS, adversarial_count
from mmforget.diffusion.conditions import Conditions, cat
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
from mmforget.diffusion.methods.esd import esd_target
from mmforget.diffusion.models import ENCODERS, DiffusionModel
from mmforget.diffusion.noise import Sampling
from mmforget.diffusion.sampling import start_latents
from mmforget.errors import ConfigError
from mmforget.options import option
from mmforget.rng import derive, generator
from mmforget.types import Batch


@dataclass(frozen=True)
class AdvUnlearnConfig(PromptTraining):
    """Defaults of the published code; retain weight and variant of its README."""

    scope: str = option(
        "text:12",
        "text:N trains the first N layers of the first text encoder and its final norm; others too",
    )
    warmup: int = option(200, "first steps, of plain ESD without an attack", low=0)
    eta: float = option(1.0, "negative guidance η, as the paper of ESD counts it", low=0)
    prompt: str = option(
        "name",
        "what names the concept: its bare name, its short prompt, or full prompts in turn",
        choices=("name", "text", "prompts"),
    )
    tokens: int = option(1, "adversarial tokens", low=1)
    location: str = option(
        "prefix_k",
        "where they stand; `replace` and `add` are its replace_k and add",
        choices=tuple(LOCATIONS),
    )
    attack_steps: int = option(30, "steps of the attack", low=0)
    attack_lr: float = option(1e-3, "learning rate of the attack's Adam", low=0)
    attack: str = option(
        "adam",
        "the attack: adam, or fast_at, Adam on the gradient's sign",
        choices=("adam", "fast_at"),
    )
    attack_start: str = option(
        "latest",
        "where an attack starts: the concept's last prefix, or random tokens",
        choices=("latest", "random"),
    )
    attack_every: int = option(1, "steps that use the same prefix", low=1)
    attack_paths: int | None = option(
        None,
        "denoising paths whose points an attack sees; null: a path for each of its steps, as "
        "published; 1 costs a fraction",
        low=1,
    )
    retain: str = option(
        "reg",
        "retain term: in every step (reg), or in steps of its own in between, which double the "
        "number of steps (iter)",
        choices=("reg", "iter"),
    )
    retain_weight: float = option(0.3, "weight of the retain term in a step of reg", low=0)
    retain_batch_size: int = option(5, "retain prompts of a step", low=1)
    guidance: float = option(3.0, "classifier-free guidance of partial denoising", low=0)
    denoise_steps: int = option(50, "steps of the sampler that x_t is a state of", low=1)
    sampler: str = option("ddim", "sampler (flow models have their own)", choices=SAMPLERS)
    size: int | None = option(None, "side of images, pixels; null: the pipeline's own", low=8)
    reference: bool = option(
        False,
        "the attack as the published code runs it: its gradients add up over its steps, and its "
        "last step is lost",
    )


class AdvUnlearn(Prompted[AdvUnlearnConfig]):
    """ESD on c_adv, the concept behind the prefix that best brings it back (eq. 5-7).

    c_adv = argmin |e_θ(x_t, prefix + c) - e*(x_t, c)|²; then θ minimises
    |e_θ(x_t, c_adv) - (e0* - η(ec* - e0*))|² + w·|e_θ(x_t, r) - e*(x_t, r)|² over retain prompts r.
    One concept a step. x_t is denoised by the model in training with the original encoder's
    conditions, as published.
    """

    trains: ClassVar[str] = "layers of the first text encoder"
    holds: ClassVar[str] = "frozen copies of the text encoders (of the model, if more is trained)"
    citation: ClassVar[str] = (
        "Zhang et al., Defensive Unlearning with Adversarial Training for Robust Concept Erasure "
        "in Diffusion Models, NeurIPS 2024, arXiv 2405.15234"
    )
    config_type: ClassVar[type] = AdvUnlearnConfig

    def setup(self, ctx: Context) -> None:
        """Choose the layers; keep the original.

        Raises:
            ConfigError: The request names no prompts to retain.
        """
        config, model = self.config, model_of(ctx)
        self.prefixes: dict[int, Tensor] = {}  # the last one of each concept
        self.window = -1  # the one that `prefixes` is up to date for
        self.settings = Sampling(
            config.sampler, config.denoise_steps, config.guidance, ROWS, config.size
        )
        self.retains = config.retain == "iter" or config.retain_weight > 0
        if self.retains and not ctx.target.retain:
            raise ConfigError(
                "advunlearn holds the model in place by prompts to retain, and this request has "
                "none; name some (request.retain), or set method.retain=reg method.retain_weight=0"
            )
        ctx.scope(config.scope)
        if model.edits or not all(name.startswith(ENCODERS) for name in ctx.trainable):
            self.keep(ctx)
            return
        # What is not trained serves as its own original.
        encoders = {
            name: copy.deepcopy(encoder).eval().requires_grad_(False)
            for name, encoder in model.text_encoders.items()
        }
        self._copy = DiffusionModel(model.shared, {model.denoiser_name: model.denoiser, **encoders})

    def count(self) -> int:
        """Return the optimiser steps of a run, those on retain prompts included."""
        return self.config.steps * (2 if self.config.retain == "iter" else 1)

    def loss(self, ctx: Context, batch: Batch) -> dict[str, Tensor]:
        """Return the terms `forget` and `retain`; with `iter` one of them, in turn."""
        config, model, pairs = self.config, model_of(ctx), batch.data
        assert isinstance(pairs, Pairs)
        erases, retains, turn = True, self.retains, ctx.step
        if config.retain == "iter":
            turn, place = divmod(ctx.step, 2)
            erases, retains = place == 0, place == 1
        prompt, prefix = self._concept(ctx, turn, attacks=erases)
        count = len(pairs.concept) if erases else 0
        kept = self._retained(ctx) if retains else []
        seeds = batch.draws("noise").integers(2**62).tolist()[:count]
        seeds += [derive(ctx.seed, "retain", ctx.step, i) for i in range(len(kept))]
        with ctx.engine.autocast():
            with self.original(ctx) as original:
                asked = original.encode([prompt] * count + kept)
                stops = draw_stops(len(seeds), 1, self.settings, step_rng(ctx, "times"))
                start = start_latents(model, seeds, config.size)
                empty = original.unconditional()
                at = points(model, asked, start, stops, self.settings, negative=empty)
                # One pass: e0 of the concept's rows, then every row under its own prompt.
                both = Points(
                    torch.cat([at.latents[:count], at.latents]), torch.cat([at.t[:count], at.t])
                )
                texts = cat([empty.repeat(count), asked])
                (found,) = predictions(original, both, [texts])
                e0, ec, hold = found.tensor_split([count, 2 * count])
                target = torch.cat([esd_target(e0, ec, config.eta), hold])
            parts = []
            if erases and prefix is not None:
                placed = encode_placed(model, [prompt], prefix, config.location)
                parts.append(placed.repeat(count))
            elif erases:
                parts.append(model.encode([prompt] * count))
            if kept:
                parts.append(model.encode(kept))
            (pred,) = predictions(model, at, [cat(parts)])
        error = squared(pred, target)
        terms = {}
        if erases:
            terms["forget"] = ctx.mean(error[:count], batch)
        if kept:
            weight = config.retain_weight if config.retain == "reg" else 1.0
            terms["retain"] = weight * ctx.once(error[count:].mean(), batch)
        return terms

    def state(self) -> dict[str, Any]:
        """Return the prefixes."""
        return {"prefixes": self.prefixes, "window": self.window}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take the prefixes back."""
        self.prefixes = dict(state["prefixes"])
        self.window = state["window"]

    def _concept(self, ctx: Context, turn: int, attacks: bool) -> tuple[str, Tensor | None]:
        """Return the prompt of a turn and its prefix, which is looked for when it is due.

        Args:
            ctx: The context.
            turn: Index of the erasing step.
            attacks: Whether the prefix is needed.
        """
        config, concepts = self.config, ctx.target.concepts
        window = turn // config.attack_every
        rng = generator(ctx.seed, "concept", window)
        k = int(torch.randint(len(concepts), (), generator=rng))
        prompt, _ = text_of(concepts[k], window, config.prompt)
        if turn < config.warmup or not attacks:
            return prompt, None
        if self.window != window:
            last = self.prefixes.get(k) if config.attack_start == "latest" else None
            self.prefixes[k] = self._attack(ctx, prompt, last)
            self.window = window
        return prompt, self.prefixes[k]

    def _attack(self, ctx: Context, prompt: str, start: Tensor | None) -> Tensor:
        """Return the prefix [k, D] that best brings a prompt's original prediction back."""
        config, model = self.config, model_of(ctx)
        rng = step_rng(ctx, "attack")
        if start is None:
            count = adversarial_count(config.location, model.count_tokens(prompt), config.tokens)
            start = random_tokens(model, count, rng)
        start = start.to(model.device)
        if config.attack_steps == 0:
            return start
        paths = min(config.attack_paths or config.attack_steps, config.attack_steps)
        stops = draw_stops(paths, config.attack_steps, self.settings, rng, shared=False)
        seeds = [derive(ctx.seed, "attack", ctx.step, i) for i in range(paths)]
        with ctx.engine.autocast():
            with self.original(ctx) as original:
                asked = original.encode([prompt])
                noise = start_latents(model, seeds, config.size)
                empty = original.unconditional()
                text = asked.repeat(paths)
                at = points(model, text, noise, stops, self.settings, negative=empty)
                parts = zip(torch.split(at.latents, ROWS), torch.split(at.t, ROWS), strict=True)
                wanted = torch.cat([original.predict(x, t, asked.repeat(len(t))) for x, t in parts])

            def objective(step: int, text: Conditions) -> Tensor:
                pred = model.predict(at.latents[step : step + 1], at.t[step : step + 1], text)
                return squared(pred, wanted[step : step + 1]).mean()

            return adversarial_prefix(
                model,
                [prompt],
                start,
                objective,
                steps=config.attack_steps,
                lr=config.attack_lr,
                sign=config.attack == "fast_at",
                reference=config.reference,
                location=config.location,
            )

    def _retained(self, ctx: Context) -> list[str]:
        """Return the retain prompts of the running step."""
        pool = ctx.target.retain
        chosen = torch.randperm(len(pool), generator=step_rng(ctx, "retain")).tolist()
        return [pool[i] for i in chosen[: self.config.retain_batch_size]]
