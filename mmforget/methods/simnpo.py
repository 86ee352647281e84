"""SimNPO: negative preference optimisation without a reference model."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from mmforget.context import Context
from mmforget.methods.base import LossMethod
from mmforget.options import option
from mmforget.types import Batch, Training


@dataclass(frozen=True)
class SimNPOConfig(Training):
    """Defaults of Fan et al. for TOFU forget10: beta 4.5, forget weight 0.125."""

    epochs: int = option(10, "passes over the forget set", low=0)
    lr: float = option(1e-5, "learning rate", low=0)
    optimizer: str = option("adamw", "optimiser", choices=("sgd", "adam", "adamw"))
    batch_size: int = option(32, "examples in an effective batch", low=1)
    beta: float = option(4.5, "inverse temperature", low=1e-6)
    delta: float = option(0.0, "margin that an example's mean loss over its units should exceed")
    paper_margin: bool = option(
        False, "subtract the margin outside beta (the paper) and not inside (its code)"
    )
    forget_weight: float = option(0.125, "weight of the forget term", low=0)
    retain_weight: float = option(1.0, "weight of the retain term; 0 leaves it out", low=0)


class SimNPO(LossMethod[SimNPOConfig]):
    """Minimise -(2/β)·mean log σ(β·(l - δ)) on D_f, l the mean loss over an example's units.

    The paper writes β·l - δ (eq. 4); its code, and the default here, β·(l - δ).
    """

    reads: frozenset[str] = frozenset({"forget", "retain"})
    intent: ClassVar[str] = "removal"
    citation: ClassVar[str] = "Fan et al., Simplicity Prevails, arXiv 2410.07163"
    config_type: ClassVar[type] = SimNPOConfig

    def loss(self, ctx: Context, forget: Batch | None, retain: Batch | None) -> dict[str, Tensor]:
        """Return the terms `forget` and `retain`."""
        config, terms = self.config, {}
        if forget is not None:
            mean_loss = ctx.forward(forget).loss / forget.units
            margin = config.delta if config.paper_margin else config.beta * config.delta
            push = -2.0 / config.beta * F.logsigmoid(config.beta * mean_loss - margin)
            terms["forget"] = config.forget_weight * ctx.mean(push, forget)
        if retain is not None and config.retain_weight > 0:
            hold = ctx.unit_mean(ctx.forward(retain).loss, retain)
            terms["retain"] = config.retain_weight * hold
        return terms
