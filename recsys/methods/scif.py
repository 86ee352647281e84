"""Selective and collaborative influence function (SCIF): forgotten pairs get their user's mean."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmforget.context import Context
from mmforget.options import option
from mmforget.recsys.influence import Examples, InfluenceConfig, Pointwise, Problem, gradient
from mmforget.types import UnlearningMethod


@dataclass(frozen=True)
class SCIFConfig(InfluenceConfig):
    """Li et al.'s rows (the users who ask) and loss (pointwise)."""

    rows: str = option(
        "users",
        "free rows that may change: users of forgotten pairs (paper), their items too (touched, "
        "IFRU's port), also those next to them in the graph, or all",
        choices=("users", "touched", "neighbours", "all"),
    )
    damping: float = option(
        3.0, "λ on the diagonal of the SUMMED curvature: the mean form has λ/n", low=0
    )
    stationary: bool = option(
        True,
        "presume that the original minimises the loss; false: the step also takes what is left "
        "of its gradient (published: originals there are trained on this loss)",
    )
    reference: bool = option(
        False,
        "as in IFRU's port: Adam on the undamped Hessian of the unpropagated tables, stopped by "
        "validation AUC, and the left-over gradient, whatever `stationary`, with the sign that "
        "climbs",
    )
    lr: float = option(1e4, "for reference: of Adam; weights move by lr/n a step", low=0)
    steps: int = option(5000, "for reference: steps of Adam at most", low=1)
    patience: int = option(10, "for reference: steps without a better AUC", low=0)


class SCIF(UnlearningMethod[SCIFConfig]):
    """θ ← θ + (H + λ)⁻¹g with g = Σ_forget [∇l(true label) - ∇l(mean label)] - Σ_train ∇l.

    Instead of vanishing, a forgotten pair's label becomes the mean label of its user over kept
    pairs and their negatives (of its item, if the user keeps none). The loss is binary
    cross-entropy. On a graph the new loss is that of kept pairs and of forgotten ones with mean
    labels, both without the forgotten edges.

    The last sum is zero for a model that minimises this loss. Originals here minimise BPR: it then
    carries them from one loss to the other, which costs far more utility than forgetting does, so
    `stationary` leaves it out. Their scores are not calibrated for cross-entropy either: the
    step needs a larger damping than with BPR.

    The port in IFRU's repository adds the last sum instead of taking it away, which moves up the
    training loss; `reference` does so.
    """

    reads: frozenset[str] = frozenset({"forget", "retain"})
    modalities = frozenset({"recsys"})
    intent: ClassVar[str] = "removal"
    trains: ClassVar[str] = "free rows of the users who ask"
    holds: ClassVar[str] = "two copies of the model, and a few numbers for every training pair"
    citation: ClassVar[str] = (
        "Li et al., Selective and Collaborative Influence Function for Efficient Recommendation "
        "Unlearning, arXiv 2304.10199; port: github.com/baiyimeng/IFRU"
    )
    config_type: ClassVar[type] = SCIFConfig

    def __init__(self, config: SCIFConfig) -> None:
        super().__init__(config)
        if config.reference:
            self.reads = self.reads | {"val"}

    def run(self, ctx: Context) -> nn.Module:
        """Find the step and take it."""
        config = self.config
        problem = Problem(ctx, config, "bce")
        replaced = mean_labelled(problem.forget, problem.kept)
        kept = gradient(problem.new, replaced, Pointwise)[problem.rows]
        g = problem.removed() - kept + problem.spilled()
        if config.reference or not config.stationary:
            left = gradient(problem.old, problem.train, Pointwise)[problem.rows]
            g = g + left if config.reference else g - left
        if config.reference:
            found = problem.published(g, config.lr, config.steps, config.patience)
        else:
            found = problem.solve(g)
        problem.apply(found)
        return ctx.model


def mean_labelled(forget: Examples, retain: Examples) -> Examples:
    """Return forgotten examples with the label of each pair replaced by a mean over kept ones.

    The mean of the user's labels, negatives included; of the item's, if the user keeps no pair;
    of all, if the item has none either. Negatives keep their label.

    Args:
        forget: Forgotten examples, of n.
        retain: Kept examples, with their negatives.
    """
    label, item = retain.label, retain.item
    user = retain.user[:, None].expand_as(item)

    def means(where: Tensor, wanted: Tensor, otherwise: Tensor) -> Tensor:
        size = int(torch.cat([where.reshape(-1), wanted]).max()) + 1
        count = torch.bincount(where.reshape(-1), minlength=size)
        total = torch.bincount(where.reshape(-1), label.reshape(-1), minlength=size)
        mean = total / count.clamp(min=1)
        return torch.where(count[wanted] > 0, mean[wanted].to(label.dtype), otherwise)

    overall = label.mean().expand(len(forget.user))
    by_item = means(item, forget.item[:, 0], overall)
    by_user = means(user, forget.user, by_item)
    return forget._replace(label=torch.cat([by_user[:, None], forget.label[:, 1:]], dim=1))
