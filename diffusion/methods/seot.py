"""SEOT: weaken the target's words in the text embedding while an image is being made."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmforget.context import Context
from mmforget.diffusion import attention
from mmforget.diffusion.attention import Maps, Recorder
from mmforget.diffusion.concepts import Erasure
from mmforget.diffusion.conditions import Conditions
from mmforget.diffusion.edits import Edit, Step
from mmforget.diffusion.models import DiffusionModel
from mmforget.errors import ConfigError
from mmforget.options import option
from mmforget.types import UnlearningMethod, full

CITATION = "Li et al., Get What You Want, Not What You Don't, ICLR 2024, arXiv 2402.05375"
# Shares of a token's highest attention above which a pixel belongs to it (published code).
REGION_TARGET, REGION_OTHER = 0.85, 0.95


@dataclass(frozen=True)
class SEOTConfig:
    """Defaults of the published code for generated images."""

    alpha: float = option(1.0, "singular values shrink to s·exp(-alpha·s); 0 keeps them", low=0)
    start: float = option(0.2, "share of the steps after which the words are weakened", low=0)
    stop: float = option(0.4, "share of the steps up to which the embedding is optimised", low=0)
    iterations: int = option(10, "gradient steps on the embedding at each such step", low=0)
    step_size: float = option(
        20.0, "size of a gradient step, times the square root of a ramp from 1 to 0.1", low=0
    )
    retain_weight: float = option(1.0, "weight of holding the other tokens' attention", low=0)
    erase_weight: float = option(0.5, "weight of moving the target tokens' attention", low=0)
    grid: int = option(16, "side of the attention maps compared; else the nearest there is", low=1)


class Suppression(Edit):
    """Soft-weight regularisation and optimisation of a prompt's embedding (Li et al., 3.2-3.3).

    From the share `start` of the steps on, the rows of the target's tokens and of the end mark and
    padding are made anew from their singular values, s → s·exp(-α·s). Before the share `stop` this
    embedding is moved, at every step anew, by gradient steps on
    Σ_other d - erase·Σ_target d, where d is the cosine distance of a token's cross-attention map
    from the original prompt's, and of the self-attention columns of the pixels it rules. Both are
    taken at the same latents (the published code compares with an image of the original prompt
    that is made beside it). Only prompts that name the target change.

    Args:
        words: Names of the targets.
        alpha: See `SEOTConfig`; so are the others.
        start: Share of the steps.
        stop: Share of the steps.
        iterations: Gradient steps.
        step_size: Their size.
        retain_weight: Weight of other tokens.
        erase_weight: Weight of target tokens.
        grid: Side of the maps.
    """

    kind: ClassVar[str] = "seot"
    citation: ClassVar[str] = CITATION

    def __init__(
        self,
        words: Sequence[str],
        alpha: float,
        start: float,
        stop: float,
        iterations: int,
        step_size: float,
        retain_weight: float,
        erase_weight: float,
        grid: int,
    ) -> None:
        super().__init__()
        self.words = list(words)
        self.settings = SEOTConfig(
            alpha=alpha,
            start=start,
            stop=stop,
            iterations=iterations,
            step_size=step_size,
            retain_weight=retain_weight,
            erase_weight=erase_weight,
            grid=grid,
        )
        self.rows: list[int] = []
        self.soft: Tensor | None = None
        self.targets: Tensor | None = None
        self.layers: dict[tuple[int, ...], list[str]] = {}

    def config(self) -> dict[str, Any]:
        """Return the words and the settings."""
        return {"words": self.words, **vars(self.settings)}

    def begin(
        self, model: DiffusionModel, text: Conditions, negative: Conditions
    ) -> tuple[Conditions, Conditions]:
        """Find the prompts that name the target and weaken it in their embeddings."""
        found = positions(model, text.ids, self.words)
        self.rows = torch.nonzero(found.any(dim=1)).flatten().tolist()
        if self.rows:
            chosen = text.rows(self.rows)
            self.targets = found[self.rows]
            ends = lengths(model, chosen.ids)
            self.soft = torch.stack(
                [
                    soften(embeds, torch.nonzero(mask).flatten(), int(count), self.settings.alpha)
                    for embeds, mask, count in zip(chosen.embeds, self.targets, ends, strict=True)
                ]
            )
        return text, negative

    def before_step(self, model: DiffusionModel, step: Step, text: Conditions) -> Conditions:
        """Return the weakened embeddings, optimised if the step is among those that do."""
        chosen = self.settings
        if not self.rows or step.index < chosen.start * step.count:
            return text
        assert self.soft is not None
        embeds = self.soft
        if step.index < chosen.stop * step.count and chosen.iterations > 0:
            embeds = self._optimised(model, step, text.rows(self.rows))
        changed = text.embeds.clone()
        changed[self.rows] = embeds.to(changed.dtype)
        return replace(text, embeds=changed)

    def _optimised(self, model: DiffusionModel, step: Step, text: Conditions) -> Tensor:
        """Return embeddings after the gradient steps of one denoising step, [R, T, D]."""
        chosen = self.settings
        assert self.soft is not None and self.targets is not None
        ramp = 1.0 - 0.9 * step.index / max(1, step.count - 1)
        size = chosen.step_size * ramp**0.5
        with torch.inference_mode(False):
            latents, time = step.latents[self.rows].clone(), step.time.clone()
            place = tuple(latents.shape[-2:])
            if place not in self.layers:
                self.layers[place] = near_layers(
                    model, latents[:1], time, text.rows([0]), chosen.grid
                )
            real = words_of(lengths(model, text.ids), text.ids.shape[1])
            with torch.no_grad(), maps_of(model, self.layers[place]) as maps:
                model.predict(latents, time, text)
                cross, own = summaries(maps)
            embeds = full(self.soft).clone()
            for _ in range(chosen.iterations):
                embeds = embeds.detach().requires_grad_(True)
                with torch.enable_grad(), maps_of(model, self.layers[place]) as maps:
                    now = replace(text, embeds=embeds.to(text.embeds.dtype))
                    model.predict(latents, time, now)
                    loss = attention_loss(
                        (cross, own),
                        summaries(maps),
                        real & ~self.targets,
                        self.targets,
                        chosen.retain_weight,
                        chosen.erase_weight,
                    )
                    (gradient,) = torch.autograd.grad(loss.sum(), [embeds])
                embeds = embeds.detach() - size * gradient
        return embeds


class SEOT(UnlearningMethod[SEOTConfig]):
    """Weaken the erased concepts' words at sampling; no weight changes.

    An image costs 11 passes, 10 of them with gradients, at a fifth of its steps. It cannot resist
    a paraphrase: prompts that do not name the concept in its own words are left as they are.
    """

    reads: frozenset[str] = frozenset()
    modalities = frozenset({"diffusion"})
    intent: ClassVar[str] = "suppression"
    trains: ClassVar[str] = "nothing"
    holds: ClassVar[str] = "at sampling: attention maps of a 16x16 grid, with their gradients"
    citation: ClassVar[str] = CITATION
    config_type: ClassVar[type] = SEOTConfig

    def run(self, ctx: Context) -> nn.Module:
        """Add the edit."""
        model = ctx.model
        assert isinstance(model, DiffusionModel)
        attention.layers(model)
        edit = Suppression(spoken(model, ctx.target), **vars(self.config))
        model.add_edit(f"seot_{len(model.edits)}", edit)
        return model


def spoken(model: DiffusionModel, target: Erasure) -> list[str]:
    """Return the names of the erased concepts, each found in a prompt of its own.

    Raises:
        ConfigError: A concept's prompts never name it word for word, so nothing would happen.
    """
    for concept in target.concepts:
        if not positions(model, model.tokens(concept.prompts), [concept.name]).any():
            raise ConfigError(
                f"seot changes prompts that name the concept, and none of its prompts, such as "
                f"{concept.prompts[0]!r}, holds the words {concept.name!r}; give the concept the "
                f"name that its prompts use, or take another method"
            )
    return [concept.name for concept in target.concepts]


def positions(model: DiffusionModel, ids: Tensor, words: Sequence[str]) -> Tensor:
    """Return which tokens spell one of the words, booleans [B, T].

    Args:
        model: Its first tokenizer made the ids.
        ids: Token ids, int64 [B, T].
        words: Names, each of one or more tokens.
    """
    found = torch.zeros_like(ids, dtype=torch.bool)
    for word in words:
        spelt = model.tokenizer(word, add_special_tokens=False)["input_ids"]
        pattern = torch.tensor(spelt, device=ids.device)
        here = (ids.unfold(1, len(pattern), 1) == pattern).all(dim=-1)
        for k in range(len(pattern)):
            found[:, k : k + here.shape[1]] |= here
    return found


def lengths(model: DiffusionModel, ids: Tensor) -> Tensor:
    """Return the tokens of each prompt, its start and end marks included, [B]."""
    end: int = model.tokenizer.eos_token_id
    return (ids == end).int().argmax(dim=1) + 1


def words_of(counts: Tensor, window: int) -> Tensor:
    """Return which positions lie between the marks, booleans [B, T], of prompts' lengths [B]."""
    place = torch.arange(window, device=counts.device)
    return (place > 0) & (place < counts[:, None] - 1)


def soften(embeds: Tensor, targets: Tensor, count: int, alpha: float) -> Tensor:
    """Return a prompt's embeddings with the target's singular values weakened, [T, D].

    The rows of the targets, of the end mark and of the padding form one matrix; its singular
    values become s·exp(-alpha·s), and the rows are put back (Li et al., eq. 4).

    Args:
        embeds: [T, D].
        targets: Positions of the target's tokens, [N].
        count: Tokens of the prompt with start and end marks.
        alpha: 0 changes nothing.
    """
    rows = torch.cat([targets, torch.arange(count - 1, len(embeds), device=targets.device)])
    made = embeds.clone()
    with torch.autocast(embeds.device.type, enabled=False):
        left, values, right = torch.linalg.svd(full(embeds[rows]), full_matrices=False)
        made[rows] = ((left * (values * torch.exp(-alpha * values))) @ right).to(made.dtype)
    return made


def attention_loss(
    original: tuple[Tensor, Tensor],
    current: tuple[Tensor, Tensor],
    others: Tensor,
    targets: Tensor,
    retain_weight: float,
    erase_weight: float,
) -> Tensor:
    """Return retain·Σ_others d - erase·Σ_targets d for each prompt, [R].

    Args:
        original: Cross-attention [R, Q, T] and self-attention [R, Q, Q] of the original prompts.
        current: The same of the embeddings under way, with gradients.
        others: Tokens to hold, booleans [R, T].
        targets: Tokens to move, booleans [R, T].
        retain_weight: Weight of the first.
        erase_weight: Weight of the second.
    """
    weight = retain_weight * others.float() - erase_weight * targets.float()
    cross, own = original
    bound = torch.where(targets, REGION_TARGET, REGION_OTHER)[:, None]
    region = cross >= bound * cross.amax(dim=1, keepdim=True)
    ruled = (region * weight[:, None]).sum(dim=2)
    loss = (weight * (1.0 - F.cosine_similarity(cross, current[0], dim=1))).sum(dim=1)
    return loss + (ruled * (1.0 - F.cosine_similarity(own, current[1], dim=1))).sum(dim=1)


def near_layers(
    model: DiffusionModel, latents: Tensor, time: Tensor, text: Conditions, side: int
) -> list[str]:
    """Return the attention layers, both kinds, of the grid nearest to side x side.

    A plain pass tells their grids, so that no other layer's maps are ever made.
    """
    sizes: dict[str, int] = {}

    def note(name: str) -> Any:
        def look(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            sizes[name] = output.shape[1]

        return look

    found = {**attention.layers(model, "attn1"), **attention.layers(model, "attn2")}
    handles = [layer.register_forward_hook(note(name)) for name, layer in found.items()]
    try:
        with torch.no_grad():
            model.predict(latents, time, text)
    finally:
        for handle in handles:
            handle.remove()
    nearest = min(set(sizes.values()), key=lambda size: (abs(size**0.5 - side), size))
    return [name for name, size in sizes.items() if size == nearest]


@contextmanager
def maps_of(model: DiffusionModel, names: Sequence[str]) -> Iterator[Maps]:
    """Record the attention maps of these layers; the others stay fused."""
    maps = Maps()
    found = {**attention.layers(model, "attn1"), **attention.layers(model, "attn2")}
    before = {name: found[name].processor for name in names}
    for name in names:
        found[name].processor = Recorder(name, maps, lambda name: True)  # type: ignore[assignment]
    try:
        yield maps
    finally:
        for name in names:
            found[name].processor = before[name]


def summaries(maps: Maps) -> tuple[Tensor, Tensor]:
    """Return mean cross-attention [R, Q, T] and self-attention [R, Q, Q] of layers of one grid."""
    made = []
    for kind in ("attn2", "attn1"):
        probs = [full(p).mean(dim=1) for name, p in maps.probs.items() if name.endswith(kind)]
        made.append(torch.stack(probs).mean(dim=0))
    return made[0], made[1]
