"""Random labels (RL) and Amnesiac unlearning: learn wrong targets for the forget set."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from mmforget.context import Context
from mmforget.methods.base import LossMethod
from mmforget.options import option
from mmforget.types import Batch, Pass, Training


@dataclass(frozen=True)
class RandomLabelConfig(Training):
    """Defaults of Fan et al. (arXiv 2310.12508): SGD, 10 epochs, forget then retain."""

    epochs: int = option(10, "passes over forget and retain", low=0)
    lr: float = option(1e-2, "learning rate", low=0)
    momentum: float = option(0.9, "momentum of SGD", low=0, high=1)
    weight_decay: float = option(5e-4, "weight decay", low=0)
    order: str = option(
        "sequential",
        "`sequential`: all of forget, then all of retain; `union`: both shuffled together",
        choices=("sequential", "union"),
    )
    exclude_true: bool = option(False, "never draw the true label (Amnesiac: true)")


class RandomLabel(LossMethod[RandomLabelConfig]):
    """Minimise the loss on the forget set with targets drawn anew in every epoch, and on retain.

    A wrong target may have another length than the true one (a refusal), so each loss is a mean
    over examples of an example's mean over its own units. `order=union exclude_true=true` is
    Amnesiac unlearning (Graves et al., AAAI 2021, arXiv 2010.10981).
    """

    reads: frozenset[str] = frozenset({"forget", "retain"})
    intent: ClassVar[str] = "removal"
    citation: ClassVar[str] = "Golatkar et al., Eternal Sunshine of the Spotless Net, CVPR 2020"
    config_type: ClassVar[type] = RandomLabelConfig

    def passes(self, epoch: int) -> Sequence[Pass]:
        """Forget then retain, so that the last steps are retain steps; or both in one."""
        if self.config.order == "union":
            return (Pass("union", anchor="union"),)
        return (Pass("forget", anchor="forget"), Pass("retain", anchor="retain"))

    def loss(self, ctx: Context, forget: Batch | None, retain: Batch | None) -> dict[str, Tensor]:
        """Return the terms `forget`, with wrong targets, and `retain`, with true ones."""
        terms = {}
        if forget is not None:
            draws = forget.draws("relabel")
            wrong = ctx.adapter.relabel(forget.data, draws, self.config.exclude_true)
            relabelled = replace(forget, data=wrong, units=ctx.adapter.units(wrong))
            terms["forget"] = _example_mean(ctx, relabelled)
        if retain is not None:
            terms["retain"] = _example_mean(ctx, retain)
        return terms


def _example_mean(ctx: Context, batch: Batch) -> Tensor:
    return ctx.mean(ctx.forward(batch).loss / batch.units, batch)
