"""Receler: bottleneck erasers behind cross-attention, trained against adversarial prompts."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmforget.context import Context
from mmforget.diffusion import attention
from mmforget.diffusion.attention import Maps
from mmforget.diffusion.conditions import Conditions
from mmforget.diffusion.edits import Edit
from mmforget.diffusion.methods.distill import (
    ROWS,
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
)
from mmforget.diffusion.models import DiffusionModel
from mmforget.diffusion.noise import Sampling
from mmforget.diffusion.sampling import start_latents
from mmforget.errors import CheckpointError, ConfigError
from mmforget.options import option
from mmforget.rng import derive, generator
from mmforget.types import Batch, full

CITATION = "Huang et al., Receler, ECCV 2024, arXiv 2311.17717"
FILLER = "a"  # a word of one token, whose embedding the adversarial one replaces


@dataclass(frozen=True)
class RecelerConfig(PromptTraining):
    """Defaults of the published code for SD 1.4."""

    steps: int = option(500, "optimiser steps", low=0)
    lr: float = option(3e-4, "learning rate", low=0)
    scope: str = option(
        "attn2", "cross-attention layers with an eraser: all (`attn2`), or a regex for their names"
    )
    rank: int = option(128, "width of the bottleneck", low=1)
    eta: float = option(1.0, "negative guidance: the target is e0 - eta·(ec - e0)", low=0)
    prompt: str = option(
        "name",
        "what names the concept: its bare name or its short prompt",
        choices=("name", "text"),
    )
    adversarial_tokens: int = option(16, "learnable embeddings after the concept's tokens", low=0)
    adversarial_steps: int = option(50, "steps on them before each step of the erasers", low=0)
    adversarial_lr: float = option(0.1, "their learning rate (Adam)", low=0)
    adversarial_decay: float = option(0.1, "their weight decay (L2 in Adam)", low=0)
    inject: str = option(
        "encoded",
        "where they enter: behind the text encoder (encoded: the published code), or in the first "
        "text encoder's token embedding (token)",
        choices=("encoded", "token"),
    )
    mask_weight: float = option(0.1, "weight of the erasers' output off the concept", low=0)
    threshold: float = option(
        0.1, "attention to the concept, from 0 to 1 over the image, that is on it", low=0, high=1
    )
    grid: int = option(16, "side of the attention maps of the mask; else the nearest", low=1)
    denoise_steps: int = option(50, "DDIM steps, a random number of which makes x_t", low=1)
    guidance: float = option(3.0, "classifier-free guidance on the way to x_t", low=0)


class Erasers(Edit):
    """Adds W2·gelu(W1·o) to the output o of cross-attention layers (Huang et al., section 3.2).

    Args:
        widths: Channels of each layer by its name in the UNet.
        rank: Width of the bottleneck.

    Attributes:
        on: Whether they act.
        outputs: Where the erasers' outputs [B, Q, d] of a pass are kept, by layer; None: nowhere.
    """

    kind: ClassVar[str] = "receler"
    citation: ClassVar[str] = CITATION

    def __init__(self, widths: Mapping[str, int], rank: int) -> None:
        super().__init__()
        self.widths, self.rank = dict(widths), rank
        self.stack = nn.ModuleList(
            nn.Sequential(nn.Linear(width, rank), nn.GELU(), nn.Linear(rank, width))
            for width in widths.values()
        )
        self.on = True
        self.outputs: dict[str, Tensor] | None = None
        self.handles: list[Any] = []

    @torch.no_grad()
    def start(self, seed: int) -> None:
        """Draw the first layers (PyTorch's own rule) and zero the last, so that nothing changes."""
        for place, eraser in enumerate(self.stack):
            assert isinstance(eraser, nn.Sequential)
            first, last = eraser[0], eraser[2]
            assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
            bound, draw = first.in_features**-0.5, generator(seed, "receler", place)
            first.weight.uniform_(-bound, bound, generator=draw)
            first.bias.uniform_(-bound, bound, generator=draw)
            last.weight.zero_()
            last.bias.zero_()

    def config(self) -> dict[str, Any]:
        """Return the layers' widths and the rank."""
        return {"widths": self.widths, "rank": self.rank}

    def attach(self, model: DiffusionModel) -> None:
        """Hook the attention layers.

        Raises:
            CheckpointError: The model has no such layers.
        """
        found = dict(model.denoiser.named_modules())
        missing = [name for name in self.widths if name not in found]
        if missing:
            raise CheckpointError(
                f"the erasers are of another model: this {model.family} denoiser has no layer "
                f"{missing[0]!r} ({len(missing)} of {len(self.widths)} are missing)"
            )
        self.handles = [
            found[name].register_forward_hook(self._hook(name, eraser))
            for name, eraser in zip(self.widths, self.stack, strict=True)
        ]

    def detach(self, model: DiffusionModel) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    @contextmanager
    def off(self) -> Iterator[None]:
        """Run the block without them."""
        self.on = False
        try:
            yield
        finally:
            self.on = True

    @contextmanager
    def kept(self) -> Iterator[dict[str, Tensor]]:
        """Keep the erasers' outputs of the passes inside the block."""
        self.outputs = {}
        try:
            yield self.outputs
        finally:
            self.outputs = None

    def _hook(self, name: str, eraser: nn.Module) -> Any:
        def add(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            if not self.on:
                return output
            weight = eraser[0].weight  # type: ignore[index]
            made: Tensor = eraser(output.to(weight.dtype))
            if self.outputs is not None:
                self.outputs[name] = made
            return output + made.to(output.dtype)

        return add


class Receler(Prompted[RecelerConfig]):
    """Train erasers to e0* - η(ec* - e0*) on the prompt's worst continuation, off no other place.

    A step makes x_t, moves the adversarial embeddings so that the erased model predicts ec* again
    (`adversarial_steps` passes with gradients), and then makes one step of the erasers on that
    prompt, plus `mask_weight` times the mean square of their outputs where the original does not
    look at the concept (Huang et al., section 3.3-3.4). The embeddings of a concept live on from
    step to step. In the published code they are written to a temporary copy and never enter the
    prompt; here they do.
    """

    intent: ClassVar[str] = "suppression"
    trains: ClassVar[str] = "bottleneck adapters behind each cross-attention layer"
    holds: ClassVar[str] = "nothing"
    citation: ClassVar[str] = CITATION
    config_type: ClassVar[type] = RecelerConfig

    def setup(self, ctx: Context) -> None:
        """Add the erasers, train them alone, and draw the adversarial embeddings.

        Raises:
            ConfigError: The model is no UNet, no layer is chosen, or a prompt has no room left.
        """
        config, model = self.config, model_of(ctx)
        layers = attention.layers(model)
        if config.scope != "attn2":
            chosen = {id(parameter) for parameter in ctx.scope(config.scope).values()}
            layers = {
                name: layer
                for name, layer in layers.items()
                if any(id(parameter) in chosen for parameter in layer.parameters())
            }
        if not layers:
            raise ConfigError(f"scope {config.scope!r} holds no cross-attention layer: try attn2")
        self.texts = [getattr(concept, config.prompt) for concept in ctx.target.concepts]
        self.lengths = [model.count_tokens(text) for text in self.texts]
        room = model.window - max(self.lengths)
        if config.adversarial_tokens > room:
            raise ConfigError(
                f"adversarial_tokens={config.adversarial_tokens}: the text encoder's window leaves "
                f"{room} behind the longest concept; take at most that many"
            )
        widths = {name: layer.to_out[0].out_features for name, layer in layers.items()}  # type: ignore[union-attr,index]
        self.erasers = Erasers(widths, config.rank)
        self.erasers.start(derive(ctx.seed, "receler"))
        place = f"receler_{len(model.edits)}"
        model.add_edit(place, self.erasers)
        ctx.scope(rf"edits\.{place}\..*")
        if config.inject == "token":
            width = first_embedding(model).weight.shape[1]
        else:
            width = model.encode([""]).embeds.shape[2]
        shape = (config.adversarial_tokens, int(width))
        self.attacks = [
            torch.rand(shape, generator=generator(ctx.seed, "receler", "tokens", k))
            .to(model.device)
            .requires_grad_()
            for k in range(len(self.texts))
        ]
        self.attackers = [
            torch.optim.Adam(
                [attack], lr=config.adversarial_lr, weight_decay=config.adversarial_decay
            )
            for attack in self.attacks
        ]

    def state(self) -> dict[str, Any]:
        """Return the adversarial embeddings and their optimisers."""
        return {
            "attacks": [attack.detach() for attack in self.attacks],
            "attackers": [attacker.state_dict() for attacker in self.attackers],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take them back."""
        with torch.no_grad():
            for attack, kept in zip(self.attacks, state["attacks"], strict=True):
                attack.copy_(kept)
        for attacker, kept in zip(self.attackers, state["attackers"], strict=True):
            attacker.load_state_dict(kept)

    def loss(self, ctx: Context, batch: Batch) -> dict[str, Tensor]:
        """Return the terms `forget` and `retain`."""
        config, model, pairs = self.config, model_of(ctx), batch.data
        assert isinstance(pairs, Pairs)
        text = model.encode([self.texts[k] for k in pairs.concept])
        count = len(text)
        settings = Sampling("ddim", config.denoise_steps, config.guidance, ROWS)
        noise = start_latents(model, batch.draws("noise").integers(2**62).tolist())
        stops = draw_stops(count, 1, settings, step_rng(ctx, "receler time"))
        with ctx.engine.autocast():
            at = points(model, text, noise, stops, settings, "bin")
            with self.erasers.off(), torch.no_grad(), attention.recorded(model) as maps:
                e0, ec = predictions(model, at, [model.unconditional().repeat(count), text])
            e0, ec = full(e0), full(ec)
            words = torch.zeros(count, text.embeds.shape[1], device=ec.device)
            for row, k in enumerate(pairs.concept):
                words[row, 1 : 1 + self.lengths[k]] = 1.0
            on = concept_mask(maps, words, config.grid, config.threshold)
            del maps
            self._attack(ctx, batch, at, text, ec)
            with self.erasers.kept() as outputs:
                with torch.no_grad():
                    now = self._worst(model, text, pairs.concept)
                pred = model.predict(at.latents, at.t, now)
            error = squared(pred, e0 - config.eta * (ec - e0))
            terms = {"forget": ctx.mean(error, batch)}
            if config.mask_weight > 0:
                strayed = off_mask(outputs, on, tuple(at.latents.shape[-2:]))
                terms["retain"] = config.mask_weight * ctx.mean(strayed, batch)
        return terms

    def _attack(
        self, ctx: Context, batch: Batch, at: Points, text: Conditions, wanted: Tensor
    ) -> None:
        """Move the adversarial embeddings so that the erased model predicts `wanted`."""
        config, model, pairs = self.config, model_of(ctx), batch.data
        if config.adversarial_tokens == 0:
            return
        for _ in range(config.adversarial_steps):
            now = self._worst(model, text, pairs.concept)
            error = squared(model.predict(at.latents, at.t, now), wanted)
            # Summed over processes, so that all of them hold the same embeddings.
            gradients = ctx.gradients(ctx.mean(error, batch), self.attacks)
            for attack, attacker, gradient in zip(
                self.attacks, self.attackers, gradients, strict=True
            ):
                if gradient.any():  # concepts that are not in this step keep theirs
                    attack.grad = gradient
                    attacker.step()

    def _worst(
        self, model: DiffusionModel, text: Conditions, concepts: Sequence[int]
    ) -> Conditions:
        """Return the prompts with the adversarial embeddings behind the concept, B rows."""
        count = self.config.adversarial_tokens
        if count == 0:
            return text
        if self.config.inject == "encoded":
            embeds = text.embeds.clone()
            for row, k in enumerate(concepts):
                start = 1 + self.lengths[k]
                embeds[row, start : start + count] = self.attacks[k].to(embeds.dtype)
            return Conditions(embeds, text.pooled, text.ids, text.prompts)
        used = sorted(set(concepts))
        prompts = [self.texts[k] + f" {FILLER}" * count for k in used]
        vectors = [self.attacks[k] for k in used]
        with injected(model, [1 + self.lengths[k] for k in used], vectors):
            made, pooled, ids = model._encode(prompts)  # `encode` would keep it
        return Conditions(made, pooled, ids, tuple(prompts)).rows([used.index(k) for k in concepts])


@contextmanager
def injected(
    model: DiffusionModel, starts: Sequence[int], vectors: Sequence[Tensor]
) -> Iterator[None]:
    """Put vectors in the place of token embeddings of the first text encoder.

    Args:
        model: It encodes one prompt for each start inside the block.
        starts: Position of the first replaced token of each prompt.
        vectors: [K, D] for each prompt; gradients flow to them.
    """

    def replace(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        made = output.clone()
        for row, (start, vector) in enumerate(zip(starts, vectors, strict=True)):
            made[row, start : start + len(vector)] = vector.to(made.dtype)
        return made

    handle = first_embedding(model).register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def first_embedding(model: DiffusionModel) -> nn.Embedding:
    """Return the token embedding of the first text encoder."""
    found = model.text_encoders["text_encoder"].get_input_embeddings()  # type: ignore[operator]
    assert isinstance(found, nn.Embedding)
    return found


def concept_mask(maps: Maps, words: Tensor, side: int, threshold: float) -> Tensor:
    """Return where the original looks at the concept, booleans [B, s, s].

    Attention to the concept's tokens on the grid nearest to `side`, scaled to [0, 1] over the
    image, at least `threshold`.

    Args:
        maps: Cross-attention of 2B rows, of which the last B are for the concepts' prompts.
        words: 1 at the concept's tokens, [B, T].
        side: Side of the grid.
        threshold: In [0, 1].
    """
    sides = {round(p.shape[2] ** 0.5) for p in maps.probs.values()}
    nearest = min(sides, key=lambda found: (abs(found - side), found))
    probs = full(maps.mean(nearest)[-len(words) :])
    seen = (probs * words[:, None]).sum(dim=2) / words.sum(dim=1, keepdim=True)
    low, high = seen.amin(dim=1, keepdim=True), seen.amax(dim=1, keepdim=True)
    on = (seen - low) / (high - low).clamp_min(1e-12) >= threshold
    return on.reshape(-1, nearest, nearest)


def off_mask(outputs: Mapping[str, Tensor], on: Tensor, latents: tuple[int, ...]) -> Tensor:
    """Return the mean squared output of the erasers off the mask, mean over layers, [B].

    Args:
        outputs: [B, Q, d] of each layer.
        on: Booleans [B, s, s].
        latents: Height and width of the latents, of which every grid is a fraction.
    """
    found = []
    for output in outputs.values():
        ratio = (output.shape[1] / (latents[0] * latents[1])) ** 0.5
        grid = (round(latents[0] * ratio), round(latents[1] * ratio))
        off = F.interpolate((~on)[:, None].float(), grid).flatten(1)
        power = full(output).square().mean(dim=2)
        found.append((power * off).sum(dim=1) / off.sum(dim=1).clamp_min(1.0))
    return torch.stack(found).mean(dim=0)
