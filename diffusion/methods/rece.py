"""RECE: erase, find in closed form what still calls the concept, and erase that too."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmforget.context import Context
from mmforget.diffusion.closed_form import READERS, Inverse, Site, sites, wide
from mmforget.diffusion.concepts import Erasure
from mmforget.diffusion.methods.uce import FitConfig, apply, edit, pairs_of, preserved
from mmforget.diffusion.models import DiffusionModel
from mmforget.options import option
from mmforget.types import UnlearningMethod

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RECEConfig(FitConfig):
    """Defaults for styles and objects; published for nudity: regular 0.1 and 3 rounds."""

    preserve_scale: float | None = option(
        0.1, "weight of preserved texts; null: 1/(number of them), at least 0.1", low=0
    )
    preserve_empty: bool = option(True, "hold the empty prompt too")
    lamb: float = option(0.1, "weight of ‖W' - W‖²", low=0)
    rounds: int = option(1, "rounds after the first edit; each finds and erases embeddings", low=0)
    regular: float = option(
        1e-3, "λ of the adversarial embedding; smaller erases more and harms more", low=0
    )


class RECE(UnlearningMethod[RECEConfig]):
    """A UCE edit, then rounds of: c' = argmin Σ ‖W'·c' - W·c‖² + λ‖c'‖², and a UCE edit of c'.

    W are the original layers, W' the edited ones, c all positions of a text's embedding (the
    pooled embedding where a layer reads that). Each round maps c' to the embedding of the anchor
    by the weights it starts from, position by position.
    """

    reads: frozenset[str] = frozenset()
    modalities = frozenset({"diffusion"})
    intent: ClassVar[str] = "removal"
    trains: ClassVar[str] = "keys and values of cross-attention (SD3, FLUX: text embedders)"
    holds: ClassVar[str] = "the edited layers twice"
    citation: ClassVar[str] = (
        "Gong et al., Reliable and Efficient Concept Erasure of Text-to-Image Diffusion Models, "
        "ECCV 2024, arXiv 2407.12383; code: github.com/CharlesGong12/RECE"
    )
    config_type: ClassVar[type] = RECEConfig

    def run(self, ctx: Context) -> nn.Module:
        """Edit, then find and edit again."""
        model, target = ctx.model, ctx.target
        assert isinstance(model, DiffusionModel) and isinstance(target, Erasure)
        pairs, kept = pairs_of(target, self.config), preserved(target, self.config)
        weights = ctx.scope(READERS[model.denoiser_name])
        texts = [text for pair in pairs for text in pair] + kept
        for site in sites(model, weights, texts, "sequence"):
            self._erase(site, pairs, kept)
        return model

    def _erase(self, site: Site, pairs: Sequence[tuple[str, str]], kept: Sequence[str]) -> None:
        config, rows = self.config, site.rows
        original = [weight.detach().clone() for weight in site.weights]
        edit(site.weights, rows, pairs, kept, config)
        concepts = torch.cat([rows.whole(old) for old, _ in pairs])
        guides = torch.cat([rows.whole(new) for _, new in pairs])
        sizes = [len(rows.whole(old)) for old, _ in pairs]
        for turn in range(config.rounds):
            found = adversarial(site.weights, original, concepts, config.regular)
            moved = (found - concepts).norm() / concepts.norm()
            logger.info("round %d: embeddings moved by %.3f of their norm", turn + 1, moved)
            apply(site.weights, found, guides, sizes, rows, kept, config)


@torch.no_grad()
def adversarial(
    edited: Sequence[Tensor], original: Sequence[Tensor], embeddings: Tensor, regular: float
) -> Tensor:
    """Return c' = (λI + Σ W'ᵀW')⁻¹ (Σ W'ᵀW)·c for every row c, float64 [n, d].

    Args:
        edited: W', [out, d] each.
        original: W, in their shapes.
        embeddings: [n, d].
        regular: λ; 0 takes the shortest c'.
    """
    rows = wide(embeddings)
    dim = rows.shape[1]
    gram, cross = rows.new_zeros(dim, dim), rows.new_zeros(dim, dim)
    for new, old in zip(edited, original, strict=True):
        wide_new = wide(new)
        gram.addmm_(wide_new.T, wide_new)
        cross.addmm_(wide_new.T, wide(old))
    return Inverse(gram, regular).solve(cross @ rows.T).T
