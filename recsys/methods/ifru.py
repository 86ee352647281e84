"""Influence-function recommendation unlearning (IFRU)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from mmforget.context import Context
from mmforget.options import option
from mmforget.recsys.influence import InfluenceConfig, Problem
from mmforget.types import UnlearningMethod


@dataclass(frozen=True)
class IFRUConfig(InfluenceConfig):
    """Zhang et al.'s rows, with a solver that looks at the residual."""

    loss: str = option(
        "bpr", "bpr: what originals minimise; bce: the authors'", choices=("bce", "bpr")
    )
    rows: str = option(
        "neighbours",
        "free rows that may change: users or users and items of forgotten pairs (touched), also "
        "those next to them in the graph, or all",
        choices=("users", "touched", "neighbours", "all"),
    )
    reference: bool = option(
        False,
        "solve as published (with loss=bce): Adam on the undamped Hessian of the unpropagated "
        "tables, stopped by validation AUC; forgotten nodes change only if their weight is above "
        "the quantile",
    )
    lr: float = option(1e4, "for reference: of Adam; weights move by lr/n a step", low=0)
    steps: int = option(5000, "for reference: steps of Adam at most", low=1)
    patience: int = option(10, "for reference: steps without a better AUC", low=0)


class IFRU(UnlearningMethod[IFRUConfig]):
    """θ ← θ + (H + λ)⁻¹g with g the gradient of the forgotten pairs and of what they spill over.

    g = Σ_forget ∇l(old graph) + Σ_retain [∇l(old graph) - ∇l(new graph)]: the second sum is over
    pairs whose final vectors the request changes, and empty without propagation. H belongs to the
    loss on all training pairs under the old graph. Only rows near the request change.

    An influence function presumes that the weights minimise the loss. The authors train and forget
    with cross-entropy (`loss=bce`). Originals here minimise BPR and, for some backbones,
    contrastive terms. Cross-entropy is then far from its minimum: on a graph the spill-over sum
    outweighs what is forgotten, and scores of forgotten pairs rise above those of merely dropping
    the edges. So the default is BPR, less the random terms.

    A pair that the original fits perfectly has no gradient and hence no influence to take back:
    models that memorise (matrix factorisation with wide tables) forget little.
    """

    reads: frozenset[str] = frozenset({"forget", "retain"})
    modalities = frozenset({"recsys"})
    intent: ClassVar[str] = "removal"
    trains: ClassVar[str] = "free rows near the request"
    holds: ClassVar[str] = "two copies of the model, and a few numbers for every training pair"
    citation: ClassVar[str] = (
        "Zhang et al., Recommendation Unlearning via Influence Function, arXiv 2307.02147"
    )
    config_type: ClassVar[type] = IFRUConfig

    def __init__(self, config: IFRUConfig) -> None:
        super().__init__(config)
        if config.reference:
            self.reads = self.reads | {"val"}

    def run(self, ctx: Context) -> nn.Module:
        """Find the step and take it."""
        config = self.config
        problem = Problem(ctx, config, config.loss, config.reference)
        g = problem.removed() + problem.spilled()
        if config.reference:
            found = problem.published(g, config.lr, config.steps, config.patience)
        else:
            found = problem.solve(g)
        problem.apply(found)
        return ctx.model
