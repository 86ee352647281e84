"""Training of recommenders: BPR plus what the backbone's published loss adds to it."""

from torch import Tensor

from mmforget.context import Context
from mmforget.recsys.adapter import Pairs, outputs, rows_of
from mmforget.recsys.backbones.base import Recommender, Triples
from mmforget.training import Supervised
from mmforget.types import Batch


def ranking_terms(ctx: Context, retain: Batch, prefix: str = "retain") -> dict[str, Tensor]:
    """Return BPR and the backbone's auxiliary terms on a batch, with one propagation for both.

    Args:
        ctx: The running optimisation.
        retain: A prepared batch.
        prefix: Beginning of the terms' names.
    """
    data = retain.data
    assert isinstance(data, Pairs) and isinstance(ctx.model, Recommender)
    with ctx.engine.autocast():
        rows = rows_of(ctx.model, data)
        loss = outputs(rows).loss
        extra = ctx.model.auxiliary(Triples(*data, *rows, size=retain.total))
    terms = {prefix: ctx.unit_mean(loss, retain)}
    return terms | {f"{prefix}_{name}": ctx.once(value, retain) for name, value in extra.items()}


class Ranking(Supervised):
    """`Supervised` with the backbone's own regularisers: trains originals and references."""

    def loss(self, ctx: Context, forget: Batch | None, retain: Batch | None) -> dict[str, Tensor]:
        """Return BPR of the retain batch and the backbone's terms."""
        return {} if retain is None else ranking_terms(ctx, retain)
