"""What loss methods may ask of a recommender: pairs, sampled negatives, and their scores."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmforget.errors import ConfigError
from mmforget.recsys.backbones.base import Recommender
from mmforget.recsys.data import Interactions
from mmforget.rng import Draws
from mmforget.types import Outputs, Splits, frozen_copy, full


class Pairs(NamedTuple):
    """A prepared batch.

    Attributes:
        user: int64 [B].
        item: The item the user chose, int64 [B].
        negative: Items the user is not known to have chosen, int64 [B, n].
    """

    user: Tensor
    item: Tensor
    negative: Tensor


class RankingAdapter:
    """`types.Adapter` for recommenders that score by the inner product of two vectors.

    The loss of a pair is BPR, the mean over its negatives of softplus(s_neg - s_pos); `pred` holds
    the scores of the chosen item and the negatives, [B, 1 + n]. What a backbone adds to it while
    training (L2, contrast) belongs to `training.Ranking`, not to a pair.

    Args:
        negatives: Negatives of each pair.
    """

    random = True  # negatives

    def __init__(self, negatives: int = 1) -> None:
        self.negatives = negatives

    def prepare(self, raw: dict[str, Any], draws: Draws, train: bool) -> Pairs:
        """Draw negatives; and, where the data set says so, the pairs themselves while training."""
        source: Interactions = raw["source"]
        user, item = raw["user"], raw["item"]
        if train and source.by_user:
            user, item = source.redraw(draws)
        user, item = user.to(draws.device), item.to(draws.device)
        return Pairs(user, item, source.known.negatives(user, draws, self.negatives))

    def units(self, data: Pairs) -> Tensor:
        """Return ones, [B]: a pair has one loss."""
        return torch.ones(len(data.user), device=data.user.device)

    def forward(self, model: nn.Module, data: Pairs) -> Outputs:
        """Return BPR losses [B] and scores [B, 1 + n] of the chosen item and the negatives."""
        return outputs(rows_of(model, data))

    def divergence(self, student: Outputs, teacher: Outputs, temperature: float = 1.0) -> Tensor:
        """Return KL(teacher || student) over the choice among a pair's items, times T², [B]."""
        s = F.log_softmax(student.pred / temperature, dim=1)
        t = F.log_softmax(teacher.pred / temperature, dim=1)
        return F.kl_div(s, t, reduction="none", log_target=True).sum(1) * temperature**2

    def relabel(self, data: Pairs, draws: Draws, exclude_true: bool = True) -> Pairs:
        """Return the batch with another item as the chosen one: it changes place with a negative.

        Which negative is drawn; without `exclude_true` the chosen item may stay.
        """
        items = torch.cat([data.item[:, None], data.negative], dim=1)
        low = 1 if exclude_true else 0
        pick = (draws.integers(items.shape[1] - low) + low)[:, None]
        chosen = items.gather(1, pick)
        items = items.scatter(1, pick, data.item[:, None])
        return Pairs(data.user, chosen[:, 0], items[:, 1:])

    def frozen(self, model: nn.Module, trainable: Mapping[str, nn.Parameter]) -> nn.Module:
        """Return a copy."""
        return frozen_copy(model)

    def shards(self, model: nn.Module) -> Sequence[nn.Module] | None:
        """Return None: scores are looked up in tables of the model."""
        return None

    def parameters(self, model: nn.Module, scope: str) -> dict[str, nn.Parameter]:
        """Return parameters by scope: all, head (item table), users, items, or a regex (fullmatch).

        Raises:
            ConfigError: The scope matches nothing.
        """
        named = dict(model.named_parameters())
        if scope == "all":
            return named
        wanted = {"head": r".*items?\b.*", "items": r".*items?\b.*", "users": r".*users?\b.*"}
        try:
            chosen = {n: p for n, p in named.items() if re.fullmatch(wanted.get(scope, scope), n)}
        except re.error as error:
            raise ConfigError(f"scope {scope!r} is no regular expression: {error}") from error
        if not chosen:
            raise ConfigError(
                f"scope {scope!r} matches no parameter. Accepted: all, head, users, items, or a "
                f"regular expression for whole names, such as {', '.join(list(named)[:4])}"
            )
        return chosen

    def apply_request(self, model: nn.Module, splits: Splits) -> None:
        """Take the forgotten edges out of the graph that the model propagates over."""
        assert isinstance(model, Recommender) and isinstance(splits.forget, Interactions)
        edges = splits.forget.edge
        model.drop(torch.from_numpy(edges[edges >= 0]))

    def record(self, model: nn.Module, data: Pairs) -> dict[str, Tensor]:
        """Return loss, score and negative_score (mean over negatives), user and item, each [B]."""
        found = self.forward(model, data)
        scores = full(found.pred)
        return {
            "loss": full(found.loss),
            "score": scores[:, 0],
            "negative_score": scores[:, 1:].mean(1),
            "user": data.user,
            "item": data.item,
        }


class Rows(NamedTuple):
    """Final vectors of a batch: user and item [B, d], negative [B, n, d]."""

    user: Tensor
    item: Tensor
    negative: Tensor


def rows_of(model: nn.Module, data: Pairs) -> Rows:
    """Return the final vectors of a batch's nodes: one propagation, or none for a frozen model."""
    users: int = model.graph.users  # type: ignore[union-attr, assignment]
    nodes = torch.cat([data.user, data.item + users, data.negative.reshape(-1) + users])
    found = model(nodes) if torch.is_grad_enabled() else model.final()[nodes]  # type: ignore[operator]
    size = len(data.user)
    negative = found[2 * size :].view(size, -1, found.shape[1])
    return Rows(found[:size], found[size : 2 * size], negative)


def outputs(rows: Rows) -> Outputs:
    """Return BPR losses [B] and scores [B, 1 + n] of a batch's final vectors."""
    chosen = (rows.user * rows.item).sum(-1, keepdim=True)
    # Not a batched matrix product: that takes three times as long for one negative.
    others = (rows.negative * rows.user[:, None]).sum(-1)
    return Outputs(F.softplus(others - chosen).mean(1), torch.cat([chosen, others], dim=1))
