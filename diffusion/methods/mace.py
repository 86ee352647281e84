"""MACE: refine keys and values in closed form, a low-rank change a concept, and fuse them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmforget.context import Context
from mmforget.diffusion.attention import layers, recorded
from mmforget.diffusion.attention_losses import summed_norms
from mmforget.diffusion.closed_form import CHUNK, READERS, Ridge, wide
from mmforget.diffusion.concepts import Concept, Erasure
from mmforget.diffusion.conditions import Conditions, cat
from mmforget.diffusion.models import DiffusionModel
from mmforget.diffusion.noise import Sampling
from mmforget.diffusion.sampling import denoise, start_latents
from mmforget.errors import ConfigError
from mmforget.options import option
from mmforget.progress import progress
from mmforget.rng import derive, generator
from mmforget.training import StepLog
from mmforget.types import UnlearningMethod

MASK_TIMES = (0.2, 0.3, 0.4)  # of the training times; where the low-rank changes are trained


@dataclass(frozen=True)
class MACEConfig:
    """Published for faces: 50 steps at 1e-4; for nudity: 120 steps at 1e-5."""

    steps: int = option(50, "optimiser steps a concept; 0 leaves the refinement alone", low=0)
    lr: float = option(1e-4, "learning rate (AdamW)", low=0)
    batch_size: int = option(1, "images a step", low=1)
    rank: int = option(1, "rank of a concept's change", low=1)
    images: int = option(8, "images of a concept to train on, generated from its prompts", low=1)
    image_steps: int = option(50, "denoising steps of these images", low=1)
    guidance: float = option(7.5, "their classifier-free guidance", low=0)
    image_size: int | None = option(None, "their side, pixels; null takes the pipeline's", low=8)
    mask: str = option(
        "full",
        "where attention is taken away: everywhere (styles), or where the original model attends "
        "to the concept (objects; published: Grounded-SAM)",
        choices=("full", "attention"),
    )
    mask_threshold: float = option(
        0.5, "the attention mask holds where attention, scaled to [0, 1], is larger", low=0, high=1
    )
    lamb: float = option(
        0.1, "weight of ‖W' - W‖²; published 0, whose statistics of COCO leave no freedom", low=0
    )
    preserve_scale: float = option(
        0.1, "weight of a preserved token beside a concept's; published 1e-4, of COCO", low=0
    )


@dataclass(frozen=True)
class Marked:
    """Prompts of a concept, with the places of its tokens.

    Attributes:
        text: Conditions of the prompts, P rows.
        tokens: Which tokens name the concept, bool [P, T].
        old: For each prompt the places of its other tokens.
        new: Their places in the anchor's prompt, aligned.
    """

    text: Conditions
    tokens: Tensor
    old: tuple[tuple[int, ...], ...]
    new: tuple[tuple[int, ...], ...]


class MACE(UnlearningMethod[MACEConfig]):
    """Three stages on `attn2.to_k` and `attn2.to_v` of a UNet.

    1. In closed form, every token of a concept's prompts but the concept's own is given the output
       it has in the anchor's prompt, so that nothing around the name tells of it any more.
    2. For each concept alone, a low-rank change of these layers is trained to take attention away
       from the concept's tokens (sum over layers of the norm of their probabilities, inside a
       mask), on images that the original model made, at times drawn by `importance`.
    3. In closed form, one change is fitted to what each concept's change does to its prompts.

    Both fits hold the outputs of the original for the texts to preserve, the retain prompts and
    the empty prompt. Grounded-SAM's masks are not here: `mask=attention` finds the object by the
    original model's own cross-attention.
    """

    reads: frozenset[str] = frozenset()
    modalities = frozenset({"diffusion"})
    intent: ClassVar[str] = "removal"
    trains: ClassVar[str] = "keys and values of cross-attention"
    holds: ClassVar[str] = "these layers twice, a low-rank change and a few latents a concept"
    citation: ClassVar[str] = (
        "Lu et al., MACE: Mass Concept Erasure in Diffusion Models, CVPR 2024, arXiv 2403.06135"
    )
    config_type: ClassVar[type] = MACEConfig

    def run(self, ctx: Context) -> nn.Module:
        """Refine, train each concept's change, fuse."""
        model, target, config = ctx.model, ctx.target, self.config
        assert isinstance(model, DiffusionModel) and isinstance(target, Erasure)
        layers(model)  # refuses transformers
        model.eval()
        weights = ctx.scope(READERS["unet"])
        marked = [mark(model, concept) for concept in target.concepts]
        anchors = [embeddings(model, concept.anchors) for concept in target.concepts]
        own = [wide(found.text.embeds) for found in marked]
        kept = list(dict.fromkeys(("", *target.preserve, *target.retain)))
        held = embeddings(model, kept).flatten(0, 1)
        gram = config.preserve_scale * (held.T @ held)
        original = [weight.detach().clone() for weight in weights.values()]
        pictures = [
            self._pictures(ctx, model, found, k) if config.steps else None
            for k, found in enumerate(marked)
        ]

        old = torch.cat([_chosen(e, f.old) for e, f in zip(own, marked, strict=True)])
        new = torch.cat([_chosen(e, f.new) for e, f in zip(anchors, marked, strict=True)])
        ridge = Ridge(old, 1.0, config.lamb)
        ridge.hold_gram(gram)
        moved = cross(old, new)
        with torch.no_grad():
            for weight in weights.values():
                base = wide(weight)
                weight.copy_(refit(base, base @ moved, base @ gram, gram, ridge))
        if not config.steps:
            return model

        model.requires_grad_(False)
        changes = []
        log, total = StepLog(ctx.engine), config.steps * len(marked)
        ctx.steps = total
        shown = ctx.engine.is_main and ctx.engine.runtime.progress
        with progress(ctx.label, total, shown=shown) as advance:
            for k, (found, made) in enumerate(zip(marked, pictures, strict=True)):
                assert made is not None
                change = Change(model, list(weights), config.rank, derive(ctx.seed, "mace", k))
                for loss in self._train(ctx, model, change, found, made, k):
                    ctx.step += 1
                    ctx.engine.meter.steps += 1
                    ctx.engine.meter.examples_seen += config.batch_size
                    last = ctx.step == total
                    terms = {"attention": loss / ctx.engine.world}  # processes do the same
                    advance(1, log.add(ctx.step, terms, config.lr, last=last))
                changes.append(change)

        ridge = Ridge(torch.cat([rows.flatten(0, 1) for rows in own]), 1.0, config.lamb)
        ridge.hold_gram(gram)
        grams = [rows.flatten(0, 1).T @ rows.flatten(0, 1) for rows in own]
        with torch.no_grad():
            for place, (weight, begun) in enumerate(zip(weights.values(), original, strict=True)):
                base = wide(weight)
                pull = torch.zeros_like(base)
                for change, of in zip(changes, grams, strict=True):
                    pull += wide(change.up[place]) @ (wide(change.down[place]) @ of)
                weight.copy_(refit(base, pull, wide(begun) @ gram, gram, ridge))
        return model

    def _pictures(
        self, ctx: Context, model: DiffusionModel, found: Marked, place: int
    ) -> tuple[Tensor, Tensor | None]:
        """Return latents that the model makes of a concept's prompts in turn, and their masks."""
        config = self.config
        settings = Sampling(
            sampler="ddim",
            steps=config.image_steps,
            guidance=config.guidance,
            size=config.image_size,
        )
        seeds = [derive(ctx.seed, "mace", "image", place, k) for k in range(config.images)]
        empty = model.unconditional()
        latents: list[Tensor] = []
        masks: list[Tensor] = []
        for first in range(0, config.images, settings.batch_size):
            part = seeds[first : first + settings.batch_size]
            rows = [(first + k) % len(found.text) for k in range(len(part))]
            text = found.text.rows(rows)
            with ctx.engine.autocast():
                start = start_latents(model, part, settings.size)
                clean = denoise(model, start, text, empty.repeat(len(part)), settings, seeds=part)
                latents.append(clean)
                if config.mask == "attention":
                    noise = _noise(clean, generator(ctx.seed, "mace", "mask", place, first))
                    tokens = found.tokens[rows]
                    masks.append(
                        attention_mask(model, clean, noise, text, tokens, config.mask_threshold)
                    )
        return torch.cat(latents), torch.cat(masks) if masks else None

    def _train(
        self,
        ctx: Context,
        model: DiffusionModel,
        change: "Change",
        found: Marked,
        pictures: tuple[Tensor, Tensor | None],
        place: int,
    ) -> Iterator[Tensor]:
        """Train a concept's change; yield each step's loss."""
        config = self.config
        latents, masks = pictures
        odds = importance(torch.arange(model.noising.steps))
        optimizer = ctx.engine.prepare(torch.optim.AdamW(change.parameters(), lr=config.lr))
        with change.on(model), recorded(model) as maps:
            for step in range(config.steps):
                rng = generator(ctx.seed, "mace", place, step)
                count = config.batch_size
                images = torch.randint(len(latents), (count,), generator=rng)
                t = torch.multinomial(odds, count, replacement=True, generator=rng)
                t, rows = t.to(latents.device), images % len(found.text)
                clean = latents[images.to(latents.device)]
                noised = model.noising.add(clean, _noise(clean, rng), t)
                maps.clear()
                with ctx.engine.autocast():
                    model.predict(noised, t, found.text.rows(rows))
                mask = None if masks is None else masks[images.to(masks.device)]
                loss = summed_norms(maps.probs.values(), found.tokens[rows], mask).mean()
                optimizer.zero_grad()
                ctx.engine.accelerator.backward(loss)
                optimizer.step()
                yield loss.detach()


class Change(nn.Module):
    """A low-rank change up·down of linear layers; up starts at zero.

    Args:
        model: Whose layers.
        names: Their weights' names.
        rank: r; `down` is drawn with standard deviation 1/r.
        seed: Seed of the draw.

    Attributes:
        names: The layers.
        down: [r, d] each.
        up: [out, r] each.
    """

    def __init__(self, model: DiffusionModel, names: Sequence[str], rank: int, seed: int) -> None:
        super().__init__()
        self.names = [name.removesuffix(".weight") for name in names]
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        rng = generator(seed, "change")
        for name in self.names:
            weight = model.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            like = torch.zeros(weight.shape[0], rank, device=weight.device)
            drawn = torch.randn(rank, weight.shape[1], generator=rng) / rank
            self.down.append(nn.Parameter(drawn.to(like)))
            self.up.append(nn.Parameter(like))

    @contextmanager
    def on(self, model: DiffusionModel) -> Iterator[None]:
        """Add the change to the layers' outputs inside the block."""

        def hook(place: int) -> object:
            def add(layer: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
                down, up = self.down[place], self.up[place]
                low = functional.linear(given[0].to(down.dtype), down)
                return out + functional.linear(low, up).to(out.dtype)

            return add

        handles = [
            model.get_submodule(name).register_forward_hook(hook(k))  # type: ignore[arg-type]
            for k, name in enumerate(self.names)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def importance(t: Tensor) -> Tensor:
    """Return σ(0.05·(t - 200)) - σ(0.05·(t - 400)), how often a time is drawn, float64 [B]."""
    times = t.double()
    return torch.sigmoid(0.05 * (times - 200)) - torch.sigmoid(0.05 * (times - 400))


def cross(old: Tensor, new: Tensor) -> Tensor:
    """Return Σ (new - old)·oldᵀ, float64 [d, d], of embeddings [..., d]."""
    rows = old.flatten(0, -2)
    return (new.flatten(0, -2) - rows).T @ rows


def refit(weight: Tensor, pull: Tensor, kept: Tensor, gram: Tensor, ridge: Ridge) -> Tensor:
    """Return W' = W + (pull + kept - W·gram)·A⁻¹, float64 [out, d] (eq. 3 and 9).

    Args:
        weight: W, float64 [out, d].
        pull: Σ (v* - W·k)·kᵀ over the tokens that change, [out, d].
        kept: Σ w·v·pᵀ over preserved tokens p with outputs v, [out, d].
        gram: Σ w·p·pᵀ, [d, d].
        ridge: A = λI + Σ k·kᵀ + gram.
    """
    return weight + ridge.right(pull + kept - weight @ gram)


def embeddings(model: DiffusionModel, texts: Sequence[str]) -> Tensor:
    """Return the sequences that attention reads, float64 [N, T, d]."""
    return wide(_encode(model, texts).embeds)


def mark(model: DiffusionModel, concept: Concept) -> Marked:
    """Return a concept's prompts with the places of the tokens that its anchor's do not have.

    Raises:
        ConfigError: A prompt has no such token.
    """
    text = _encode(model, concept.prompts)
    length = text.embeds.shape[1]
    window = int(model.tokenizer.model_max_length)

    def ids(texts: Sequence[str]) -> list[list[int]]:
        found: list[list[int]] = model.tokenizer(list(texts), truncation=True, max_length=window)[
            "input_ids"
        ]
        return found

    tokens = torch.zeros(len(text), length, dtype=torch.bool)
    old, new = [], []
    for k, (ours, theirs) in enumerate(
        zip(ids(concept.prompts), ids(concept.anchors), strict=True)
    ):
        first, stop, other = difference(ours, theirs)
        if first == stop:
            raise ConfigError(
                f"the prompt {concept.prompts[k]!r} names nothing of {concept.name!r} that its "
                f"anchor's {concept.anchors[k]!r} does not; give it an anchor without the concept"
            )
        tokens[k, first:stop] = True
        after = length - max(stop, other)
        old.append((*range(first), *range(stop, stop + after)))
        new.append((*range(first), *range(other, other + after)))
    return Marked(text, tokens.to(text.embeds.device), tuple(old), tuple(new))


def difference(ours: Sequence[int], theirs: Sequence[int]) -> tuple[int, int, int]:
    """Return the part of `ours` that is not in `theirs`, and where the latter go on after it.

    Both are cut at their longest common beginning, then at their longest common end.

    Returns:
        First place and the one after the last in `ours`; the place after the part in `theirs`.
    """
    short = min(len(ours), len(theirs))
    first = next((k for k in range(short) if ours[k] != theirs[k]), short)
    rest = short - first
    pairs = zip(reversed(ours), reversed(theirs), strict=False)
    same = next((k for k, (a, b) in enumerate(pairs) if a != b or k == rest), rest)
    return first, len(ours) - same, len(theirs) - same


@torch.no_grad()
def attention_mask(
    model: DiffusionModel,
    clean: Tensor,
    noise: Tensor,
    text: Conditions,
    tokens: Tensor,
    threshold: float,
) -> Tensor:
    """Return where a model attends to a concept, float32 [B, H, W] of 0 and 1.

    Attention to the concept's tokens, averaged over heads, layers and three times, is scaled to
    [0, 1] in each image.

    Args:
        model: A UNet model.
        clean: Latents [B, C, H, W].
        noise: Noise to add, in their shape.
        text: Conditions, B rows.
        tokens: The concept's tokens, bool [B, T].
        threshold: The mask is 1 where attention is larger.
    """
    height, width = clean.shape[-2:]
    total = torch.zeros(len(clean), 1, height, width, device=clean.device)
    with recorded(model) as maps:
        for share in MASK_TIMES:
            t = torch.full((len(clean),), int(share * model.noising.steps), device=clean.device)
            maps.clear()
            model.predict(model.noising.add(clean, noise, t), t, text)
            for probs in maps.probs.values():
                seen = (probs.float() * tokens[:, None, None, :]).sum(dim=-1).mean(dim=1)
                scale = (height * width / seen.shape[1]) ** 0.5
                grid = seen.reshape(len(seen), 1, round(height / scale), round(width / scale))
                total += functional.interpolate(grid, (height, width), mode="bilinear")
    low, high = total.amin(dim=(2, 3), keepdim=True), total.amax(dim=(2, 3), keepdim=True)
    scaled = (total - low) / (high - low).clamp_min(torch.finfo(total.dtype).tiny)
    return (scaled > threshold)[:, 0].float()


@torch.no_grad()
def _encode(model: DiffusionModel, texts: Sequence[str]) -> Conditions:
    return cat([model.encode(texts[k : k + CHUNK]) for k in range(0, len(texts), CHUNK)])


def _chosen(rows: Tensor, places: Sequence[Sequence[int]]) -> Tensor:
    """Return some places of each text, [N, d] of [P, T, d]."""
    return torch.cat([row[list(at)] for row, at in zip(rows, places, strict=True)])


def _noise(like: Tensor, rng: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=rng).to(like)
