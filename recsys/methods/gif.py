"""Graph influence function (GIF): a Newton-like step that counts what neighbours lose."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from mmforget.context import Context
from mmforget.options import option
from mmforget.recsys.influence import InfluenceConfig, Problem
from mmforget.types import UnlearningMethod


@dataclass(frozen=True)
class GIFConfig(InfluenceConfig):
    """All rows, and the loss that originals minimise; `solver=lissa` is the published one."""

    loss: str = option("bpr", "bpr: what originals minimise; bce", choices=("bce", "bpr"))


class GIF(UnlearningMethod[GIFConfig]):
    """θ ← θ + (H + λ)⁻¹v over all weights, v the gradient that the request takes from the loss.

    v = Σ_forget ∇l(old graph) + Σ_affected [∇l(old graph) - ∇l(new graph)], where a kept pair is
    affected if the request changes its final vectors: within the backbone's hops of a removed
    edge. The published iteration s ← v + (1 - damp)·s - Hs/scale has the fixed point
    scale·(H + damp·scale)⁻¹v, so its damp·scale is `damping` here.

    Negatives are drawn once: H and v belong to one fixed loss. Contrastive terms are left out of
    both, so for backbones that have them the original minimises another loss than this.
    """

    reads: frozenset[str] = frozenset({"forget", "retain"})
    modalities = frozenset({"recsys"})
    intent: ClassVar[str] = "removal"
    trains: ClassVar[str] = "all free rows"
    holds: ClassVar[str] = "two copies of the model, and a few numbers for every training pair"
    citation: ClassVar[str] = (
        "Wu et al., GIF: A General Graph Unlearning Strategy via Influence Function, WWW 2023, "
        "arXiv 2304.02835"
    )
    config_type: ClassVar[type] = GIFConfig

    def run(self, ctx: Context) -> nn.Module:
        """Find the step and take it."""
        problem = Problem(ctx, self.config, self.config.loss)
        problem.apply(problem.solve(problem.removed() + problem.spilled()))
        return ctx.model
