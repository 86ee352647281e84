"""UCE: give the erased texts the outputs of other texts, in closed form."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmforget.context import Context
from mmforget.diffusion.closed_form import READERS, Ridge, Rows, Site, projected, sites, write
from mmforget.diffusion.concepts import Concept, Erasure
from mmforget.diffusion.models import DiffusionModel
from mmforget.diffusion.noise import Sampling
from mmforget.errors import ConfigError
from mmforget.options import option
from mmforget.progress import progress
from mmforget.rng import derive
from mmforget.types import UnlearningMethod

logger = logging.getLogger(__name__)

BY = ("painting by {}", "art by {}", "artwork by {}", "picture by {}", "style of {}")
OF = ("image of {}", "photo of {}", "portrait of {}", "picture of {}", "painting of {}")

# (model, concept, attributes, seed) -> share of its images that show each attribute most.
Measure = Callable[[DiffusionModel, Concept, Sequence[str], int], Sequence[float]]


@dataclass(frozen=True)
class FitConfig:
    """What every closed-form edit needs to know; defaults of the current UCE script."""

    texts: str = option(
        "name",
        "what is erased: each concept's bare name, its short text, or all its prompts (then retain "
        "prompts are held beside the texts to preserve)",
        choices=("name", "text", "prompts"),
    )
    expand: bool = option(
        False, "erase five templates beside each text: painting by (styles), image of (others), ..."
    )
    technique: str = option(
        "replace",
        "target: the anchor's output, or that without its part along the old output (tensor)",
        choices=("replace", "tensor"),
    )
    erase_scale: float = option(1.0, "weight of erased texts", low=0)
    preserve_scale: float | None = option(
        1.0, "weight of preserved texts; null: 1/(number of them), at least 0.1", low=0
    )
    preserve_empty: bool = option(False, "hold the empty prompt too")
    lamb: float = option(0.5, "weight of ‖W' - W‖²", low=0)


@dataclass(frozen=True)
class UCEConfig(FitConfig):
    """Defaults of the current script; `debias` generates images and measures them."""

    mode: str = option(
        "erase",
        "erase: the anchor takes the concept's place; moderate: the empty prompt does; debias: "
        "attributes are added until images show them in the desired ratios",
        choices=("erase", "moderate", "debias"),
    )
    embeddings: str = option(
        "last_token",
        "last_token: the embedding at the last real token; sequence: all from there to the end, "
        "aligned, and all of preserved texts (original code, UnlearnCanvas)",
        choices=("last_token", "sequence"),
    )
    attributes: list[str] = option([], "debias: attributes, such as [male person, female person]")
    ratios: list[float] = option([], "debias: desired shares, summing to 1; empty: equal ones")
    step_size: float = option(
        0.1,
        "debias: share of the gap added a round; the published code never applies it (1)",
        low=0,
    )
    rounds: int = option(30, "debias: rounds at most", low=1)
    tolerance: float = option(0.05, "debias: a concept is done when no gap is larger", low=0)
    images: int = option(10, "debias: images a concept and round", low=1)
    image_steps: int = option(20, "debias: denoising steps", low=1)
    guidance: float = option(7.5, "debias: classifier-free guidance", low=0)
    image_size: int | None = option(None, "debias: side of images, pixels", low=8)
    clip_model: str = option("ViT-B-32", "debias: the open_clip model that measures")
    clip_weights: str | None = option(None, "debias: file of its weights")


class UCE(UnlearningMethod[UCEConfig]):
    """W' = (λW + Σ w·v*·cᵀ + Σ w·W·p·pᵀ)·(λI + Σ w·c·cᵀ + Σ w·p·pᵀ)⁻¹ for keys and values.

    c are embeddings of erased texts, v* = W·g the outputs of their anchors by the original W, p
    embeddings of preserved texts. In SD and SDXL W are `attn2.to_k` and `attn2.to_v`; in FLUX the
    embedders of text (`context_embedder`, at the last T5 token) and of pooled text
    (`time_text_embed.text_embedder.linear_1`), whose biases stay out of it. SD3 is edited at the
    same two layers, at the last token of CLIP and of T5: that is this project's own extension.

    `debias` takes v* = W·(c + Σ k·a) over attributes a, starts every round from the original W
    and adds to k the gap between desired and measured ratios (`measure`, CLIP by default).
    """

    reads: frozenset[str] = frozenset()
    modalities = frozenset({"diffusion"})
    intent: ClassVar[str] = "removal"
    trains: ClassVar[str] = "keys and values of cross-attention (SD3, FLUX: text embedders)"
    holds: ClassVar[str] = "one float64 matrix of the text width; debias: the edited layers twice"
    citation: ClassVar[str] = (
        "Gandikota et al., Unified Concept Editing in Diffusion Models, WACV 2024, "
        "arXiv 2308.14761; code: github.com/rohitgandikota/unified-concept-editing"
    )
    config_type: ClassVar[type] = UCEConfig

    def __init__(self, config: UCEConfig) -> None:
        super().__init__(config)
        self.measure: Measure | None = None  # debias: set it to measure by something else than CLIP

    def run(self, ctx: Context) -> nn.Module:
        """Edit the layers that read text."""
        model, target, config = ctx.model, ctx.target, self.config
        assert isinstance(model, DiffusionModel) and isinstance(target, Erasure)
        measure = self._checked(model)
        kept = preserved(target, config)
        weights = ctx.scope(READERS[model.denoiser_name])
        if config.mode != "debias":
            pairs = pairs_of(target, config, moderate=config.mode == "moderate")
            texts = [text for pair in pairs for text in pair] + kept
            for site in sites(model, weights, texts, config.embeddings):
                edit(site.weights, site.rows, pairs, kept, config)
            return model
        assert measure is not None
        concepts = target.concepts
        names = [c.name if config.texts == "name" else c.text for c in concepts]
        texts = names + config.attributes + kept
        found = sites(model, weights, texts, config.embeddings)
        desired = torch.tensor(
            config.ratios or [1 / len(config.attributes)] * len(config.attributes)
        )

        shown = ctx.engine.is_main and ctx.engine.runtime.progress
        with progress(ctx.label, config.rounds, shown=shown) as advance:

            def gaps(turn: int) -> Tensor:
                shares = [
                    measure(model, c, config.attributes, derive(ctx.seed, "uce", turn, k))
                    for k, c in enumerate(concepts)
                ]
                gap = desired - torch.tensor(shares)
                logger.info("round %d: largest gap of ratios %.3f", turn, gap.abs().max())
                advance(1, f"gap {gap.abs().max():.3f}")
                return gap

            debias(found, names, kept, gaps, config)
        return model

    def _checked(self, model: DiffusionModel) -> Measure | None:
        """Return how ratios are measured; None if they are not.

        Raises:
            ConfigError: Settings of debiasing without it, or it without what it needs.
        """
        config = self.config
        if config.mode != "debias":
            if config.attributes or config.ratios:
                raise ConfigError(
                    f"method.attributes and method.ratios are for method.mode=debias, and the mode "
                    f"is {config.mode}"
                )
            return None
        if config.texts == "prompts" or config.expand or config.technique == "tensor":
            raise ConfigError(
                "method.mode=debias changes one text a concept by attributes: it takes "
                "method.texts=name or text, expand=false and technique=replace"
            )
        if len(config.attributes) < 2:
            raise ConfigError(
                f"method.mode=debias balances two attributes or more and method.attributes is "
                f"{config.attributes}; give them, such as [male person, female person]"
            )
        ratios = config.ratios
        if ratios and (len(ratios) != len(config.attributes) or abs(sum(ratios) - 1) > 1e-6):
            raise ConfigError(
                f"method.ratios={ratios}: give one share for each of {len(config.attributes)} "
                f"attributes, summing to 1, or none for equal shares"
            )
        if self.measure is not None:
            return self.measure
        if config.clip_weights is None:
            raise ConfigError(
                "method.mode=debias measures generated images: give method.clip_weights, a file of "
                f"weights of the open_clip model {config.clip_model}, or set `measure` of the "
                "method to a function of your own"
            )
        return clip_measure(config, model)


def pairs_of(target: Erasure, config: FitConfig, moderate: bool = False) -> list[tuple[str, str]]:
    """Return the texts to erase, each with the one whose outputs it gets; no pair twice.

    Raises:
        ConfigError: Templates were asked for full prompts.
    """
    if config.expand and config.texts == "prompts":
        raise ConfigError(
            "method.expand puts a text into templates, and full prompts do not fit there; say "
            "method.texts=name or text, or method.expand=false"
        )
    pairs: list[tuple[str, str]] = []
    for concept in target.concepts:
        if config.texts == "prompts":
            own = list(zip(concept.prompts, concept.anchors, strict=True))
        else:
            text = concept.name if config.texts == "name" else concept.text
            own = [(text, concept.anchor)]
            if config.expand:
                templates = BY if concept.kind == "style" else OF
                anchor = concept.anchor  # the empty prompt has nothing to put into a template
                own += [(t.format(text), t.format(anchor) if anchor else "") for t in templates]
        pairs += [(old, "" if moderate else new) for old, new in own]
    return list(dict.fromkeys(pairs))


def preserved(target: Erasure, config: FitConfig) -> list[str]:
    """Return the texts whose outputs are held, each once."""
    texts = [""] if config.preserve_empty else []
    texts += [*target.preserve, *(target.retain if config.texts == "prompts" else ())]
    return list(dict.fromkeys(texts))


def hold(ridge: Ridge, rows: Rows, preserve: Sequence[str], scale: float | None) -> None:
    """Add preserved texts to the equations, a few hundred rows at a time."""
    weight = max(0.1, 1 / max(len(preserve), 1)) if scale is None else scale
    waiting: list[Tensor] = []
    for k, text in enumerate(preserve, 1):
        waiting.append(rows.whole(text))
        if k == len(preserve) or sum(map(len, waiting)) > 512:
            ridge.hold(torch.cat(waiting), weight)
            waiting = []


def edit(
    weights: Sequence[Tensor],
    rows: Rows,
    pairs: Sequence[tuple[str, str]],
    preserve: Sequence[str],
    config: FitConfig,
) -> None:
    """Edit layers in place so that each pair's first text gets the outputs of its second.

    Args:
        weights: W of layers that read the same rows, [out, d] each.
        rows: Embeddings of all texts.
        pairs: Erased texts and their anchors; their order does not matter.
        preserve: Texts whose outputs are held.
        config: Scales, λ and technique.
    """
    aligned = [rows.aligned(pair) for pair in pairs]
    keys = torch.cat([old for old, _ in aligned])
    guides = torch.cat([new for _, new in aligned])
    apply(weights, keys, guides, [len(old) for old, _ in aligned], rows, preserve, config)


def apply(
    weights: Sequence[Tensor],
    keys: Tensor,
    guides: Tensor,
    sizes: Sequence[int],
    rows: Rows,
    preserve: Sequence[str],
    config: FitConfig,
) -> None:
    """Edit layers in place so that keys get the outputs of guides.

    Args:
        weights: W of layers that read the same rows, [out, d] each.
        keys: [n, d].
        guides: [n, d].
        sizes: Rows of each erased text, summing to n; `tensor` projects a text's rows together.
        rows: Embeddings of the preserved texts.
        preserve: Texts whose outputs are held.
        config: Scales, λ and technique.
    """
    ridge = Ridge(keys, config.erase_scale, config.lamb)
    hold(ridge, rows, preserve, config.preserve_scale)
    solved = ridge.rows()
    if config.technique == "replace":
        write(weights, solved, guides - keys)
        return
    group = torch.repeat_interleave(torch.tensor(sizes)).to(keys.device)
    for weight in weights:
        write([weight], solved, projected(weight, keys, guides, group))


def debias(
    found: Sequence[Site],
    concepts: Sequence[str],
    preserve: Sequence[str],
    gaps: Callable[[int], Tensor],
    config: UCEConfig,
) -> Tensor:
    """Edit layers in place, round by round, until the gaps of ratios are small.

    Args:
        found: The layers.
        concepts: Texts of the C concepts.
        preserve: Texts whose outputs are held.
        gaps: Returns desired minus measured ratios of the model as it is, [C, attributes], for a
            round; called before each.
        config: Attributes, step size, rounds, tolerance, scales and λ.

    Returns:
        The coefficients k, [C, attributes].
    """
    plans = []
    for site in found:
        groups = [site.rows.aligned([c, *config.attributes]) for c in concepts]
        ridge = Ridge(torch.cat([group[0] for group in groups]), config.erase_scale, config.lamb)
        hold(ridge, site.rows, preserve, config.preserve_scale)
        # Nothing but k changes between rounds: one factorisation serves them all.
        original = [weight.detach().clone() for weight in site.weights]
        plans.append((site.weights, original, ridge.rows(), [g[1:] for g in groups]))
    total = torch.zeros(len(concepts), len(config.attributes), dtype=torch.float64)
    for turn in range(config.rounds):
        gap = gaps(turn).double()
        gap = gap * (gap.abs() >= config.tolerance).any(dim=1, keepdim=True)
        if not gap.any():
            break
        total += config.step_size * gap
        for weights, original, solved, attributes in plans:
            shifts = [
                sum((k * rows for k, rows in zip(row, of, strict=True)), torch.zeros_like(of[0]))
                for row, of in zip(total.tolist(), attributes, strict=True)
            ]
            write(weights, solved, torch.cat(shifts), start=original)
    return total


def clip_measure(config: UCEConfig, model: DiffusionModel) -> Measure:
    """Return a measure by CLIP: the share of images closest to "This is a photo of {attribute}.".

    Images are generated from the concept's short text.

    Raises:
        MissingDependencyError: open_clip is not installed.
        CheckpointError: The weights cannot be read or do not fit.
    """
    from mmforget.diffusion.features import OpenClip
    from mmforget.diffusion.sampling import Image, generate

    assert config.clip_weights is not None
    clip = OpenClip(config.clip_model, config.clip_weights, device=model.device)
    settings = Sampling(
        sampler="ddim", steps=config.image_steps, guidance=config.guidance, size=config.image_size
    )

    def measure(
        model: DiffusionModel, concept: Concept, attributes: Sequence[str], seed: int
    ) -> list[float]:
        names = clip.texts([f"This is a photo of {attribute}." for attribute in attributes])
        wanted = [Image(concept.text, derive(seed, k)) for k in range(config.images)]
        votes = torch.cat(
            [
                (clip(images) @ names.T).argmax(dim=1)
                for _, images in generate(model, wanted, settings)
            ]
        )
        shares: list[float] = torch.bincount(votes, minlength=len(attributes)).double().tolist()
        return [share / len(wanted) for share in shares]

    return measure
