"""MMRecUn: forgotten pairs are ranked below random ones, kept pairs above them."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmforget.context import Context
from mmforget.errors import CollapsedError
from mmforget.methods.base import LossMethod
from mmforget.options import option
from mmforget.recsys.adapter import Pairs, Rows, outputs, rows_of
from mmforget.recsys.backbones.base import Recommender, Triples
from mmforget.recsys.data import Interactions
from mmforget.recsys.losses import reverse_bpr
from mmforget.rng import Draws
from mmforget.types import Batch, Pass, Training

logger = logging.getLogger(__name__)

NEGATIVES = 10  # a pair is compared with when asking whether to stop


@dataclass(frozen=True)
class MMRecUnConfig(Training):
    """A few epochs of MMRec's training; the paper's weight and schedule are not public."""

    epochs: int = option(10, "passes over the retain set at most", low=0)
    lr: float = option(1e-3, "learning rate", low=0)
    optimizer: str = option("adam", "optimiser", choices=("sgd", "adam", "adamw"))
    batch_size: int = option(2048, "kept pairs in an effective batch", low=1)
    forget_batch_size: int | None = option(
        None, "forgotten pairs in an effective batch; null: as many as kept ones", low=1
    )
    alpha: float = option(
        0.5, "weight of reverse BPR; the rest is BPR's and the backbone's own terms'", low=0, high=1
    )
    reduction: str = option(
        "mean", "of a batch's pairs: with sum larger parts weigh more", choices=("mean", "sum")
    )
    stop: str = option(
        "validation",
        "after an epoch stop if forgotten pairs win against random ones no more often than "
        "validation pairs do, or if these have got worse; unseen: no more often than random ones "
        "do; never",
        choices=("validation", "unseen", "never"),
    )
    tolerance: float = option(
        0.05, "for stop=validation: loss of the share of wins that is accepted", low=0, high=1
    )


class MMRecUn(LossMethod[MMRecUnConfig]):
    """Minimise α·mean softplus(s_ui - s_uj) on D_f + (1 - α)·(BPR on D_r + the backbone's terms).

    Reverse BPR ranks a forgotten item below one that was drawn. Its gradient fades as soon as that
    is so, unlike that of ascending on BPR. Each step sees a batch of D_r and one of D_f, cycled as
    needed, with one propagation for both.

    The optimum of the first term lies far below a model that never saw D_f: pairs that a user
    would like anyway belong above random ones. So it must be stopped. The sign is the share of
    pairs that score above random items of their user. If validation pairs, unseen and liked, win
    as often as forgotten ones, these are as if unseen. If validation pairs lose more than
    `tolerance`, the epoch is taken back and the run ends.
    """

    reads: frozenset[str] = frozenset({"forget", "retain"})
    modalities = frozenset({"recsys"})
    intent: ClassVar[str] = "removal"
    holds: ClassVar[str] = "with stop=validation a copy of the weights"
    citation: ClassVar[str] = (
        "Sinha et al., Multi-Modal Recommendation Unlearning (MMRecUn), AAAI 2025, arXiv 2405.15328"
    )
    config_type: ClassVar[type] = MMRecUnConfig

    def __init__(self, config: MMRecUnConfig) -> None:
        super().__init__(config)
        if config.stop == "validation":
            self.reads = self.reads | {"val"}

    def setup(self, ctx: Context) -> None:
        """Draw what pairs are compared with, and look whether there is anything to do."""
        self.stopped = False
        self.watched: dict[str, Pairs] = {}
        self.kept: dict[str, Tensor] = {}
        if self.config.stop == "never":
            return
        names = ["forget"]
        if self.config.stop == "validation":
            if ctx.has_split("val"):
                names.append("val")
            else:
                logger.warning("%s: there is no validation set, so stop=unseen", ctx.label)
        for name in names:
            data = ctx.split(name)
            assert isinstance(data, Interactions)
            rows = data.take(range(len(data)))
            draws = Draws(ctx.seed, "stop", name, total=len(data), device=ctx.engine.device)
            user, item = rows["user"].to(draws.device), rows["item"].to(draws.device)
            self.watched[name] = Pairs(user, item, data.known.negatives(user, draws, NEGATIVES))
        wins = self._wins(ctx)
        self.before = wins.get("val", 0.0)
        self.stopped = wins["forget"] <= wins.get("val", 0.5)
        self._keep(ctx)

    def passes(self, epoch: int) -> Sequence[Pass]:
        """One pass over the retain set with forgotten pairs beside it; none once stopped."""
        if self.stopped:
            return ()
        size = self.config.forget_batch_size
        return (Pass("joint", anchor="retain", partner="forget", partner_batch_size=size),)

    def loss(self, ctx: Context, forget: Batch | None, retain: Batch | None) -> dict[str, Tensor]:
        """Return `forget`, `retain` and the backbone's terms, from one propagation."""
        model, terms = ctx.model, {}
        assert isinstance(model, Recommender)
        parts = [batch for batch in (forget, retain) if batch is not None]
        with ctx.engine.autocast():
            rows = iter(_rows(model, [batch.data for batch in parts]))
            if forget is not None:
                scores = outputs(next(rows)).pred
                push = reverse_bpr(scores[:, :1], scores[:, 1:]).mean(1)
                terms["forget"] = self._scaled(forget, self.config.alpha) * ctx.mean(push, forget)
            if retain is not None:
                found = next(rows)
                scale = self._scaled(retain, 1 - self.config.alpha)
                terms["retain"] = scale * ctx.unit_mean(outputs(found).loss, retain)
                pairs: Pairs = retain.data
                extra = model.auxiliary(Triples(*pairs, *found, size=retain.total))
                for name, value in extra.items():
                    terms[f"retain_{name}"] = scale * ctx.once(value, retain)
        return terms

    def after_epoch(self, ctx: Context) -> None:
        """Stop if forgotten pairs are as if unseen, or if the validation set suffers."""
        if not self.watched:
            return
        wins = self._wins(ctx)
        if "val" in wins and wins["val"] < self.before - self.config.tolerance:
            with torch.no_grad():
                for name, weight in ctx.model.named_parameters():
                    weight.copy_(self.kept[name])
            self.stopped = True
            logger.warning(
                "%s: epoch %d cost validation pairs %.1f %% of their wins and was taken back, with "
                "forgotten pairs at %.1f %%; lower method.alpha or method.lr, or raise "
                "method.tolerance",
                ctx.label,
                ctx.epoch,
                100 * (self.before - wins["val"]),
                100 * wins["forget"],
            )
            return
        self.stopped = wins["forget"] <= wins.get("val", 0.5)
        self._keep(ctx)

    def state(self) -> dict[str, Any]:
        """Return whether it has stopped and what a bad epoch would be taken back to."""
        if not self.watched:
            return {}
        return {"stopped": self.stopped, "before": self.before, "kept": self.kept}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` returned."""
        if self.watched:
            self.stopped, self.before = state["stopped"], state["before"]
            self.kept = state["kept"]

    def _scaled(self, batch: Batch, weight: float) -> float:
        return weight * batch.total if self.config.reduction == "sum" else weight

    def _keep(self, ctx: Context) -> None:
        self.kept = {}
        if "val" in self.watched and not self.stopped:
            weights = ctx.model.named_parameters()
            self.kept = {name: weight.detach().clone() for name, weight in weights}

    def _wins(self, ctx: Context) -> dict[str, float]:
        """Return for each watched split how often a pair scores above a random one; ties half.

        Raises:
            CollapsedError: A score is not finite.
        """
        model, mode = ctx.model, ctx.model.training
        assert isinstance(model, Recommender)
        model.eval()
        found = {}
        with torch.no_grad():
            # Not `final`: what it keeps goes by version counters, and fused optimisers move none.
            table, users = model.table(), model.graph.users
            for name, (user, item, negative) in self.watched.items():
                nodes = torch.cat([item[:, None], negative], dim=1) + users
                scores = (table[nodes] @ table[user][:, :, None])[:, :, 0]
                if not bool(torch.isfinite(scores).all()):
                    raise CollapsedError("scores are not finite; lower method.lr")
                above = (scores[:, :1] - scores[:, 1:]).sign()
                found[name] = float((above + 1).mean()) / 2
        model.train(mode)
        return found


def _rows(model: Recommender, parts: Sequence[Pairs]) -> list[Rows]:
    """Return the final vectors of several batches, from one propagation."""
    if len({part.negative.shape[1] for part in parts}) > 1:  # no adapter here does this
        return [rows_of(model, part) for part in parts]
    joint = rows_of(model, Pairs(*(torch.cat(column) for column in zip(*parts, strict=True))))
    sizes = [len(part.user) for part in parts]
    cuts = (torch.split(column, sizes) for column in joint)
    return [Rows(*cut) for cut in zip(*cuts, strict=True)]
