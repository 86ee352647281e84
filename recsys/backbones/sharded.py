"""Several recommenders, each trained on its own shard of the pairs, whose scores are averaged."""

import copy
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmforget.recsys.backbones.base import Recommender, Triples


class ShardedRecommender(Recommender):
    """The mean of k recommenders' scores, as SISA predicts (Bourtoule et al., arXiv 1912.03817).

    Scores and not vectors are averaged: the spaces of shards are not aligned. The final vectors are
    those of all shards side by side, divided by sqrt(k), so that an inner product is the mean of
    the shards' scores.

    Args:
        shards: Recommenders of one graph and one width; each propagates over its own kept edges.

    Attributes:
        kept: The edges that some shard propagates over, bool [E].
    """

    shards: nn.ModuleList

    def __init__(self, shards: Sequence[Recommender]) -> None:
        super().__init__(shards[0].graph)
        self.shards = nn.ModuleList(shards)
        self.unite()

    @classmethod
    def like(cls, model: Recommender, count: int) -> "ShardedRecommender":
        """Return `count` shards that are copies of one recommender, to load weights into."""
        return cls([copy.deepcopy(model) for _ in range(count)])

    def members(self) -> list[Recommender]:
        """Return the shards."""
        found = list(self.shards)
        assert all(isinstance(shard, Recommender) for shard in found)
        return found  # type: ignore[return-value]

    def table(self) -> Tensor:
        """Return the shards' final vectors side by side over sqrt(k), users first, [N, k·d]."""
        return self._joined([shard.table() for shard in self.members()])

    def forward(self, nodes: Tensor) -> Tensor:
        """Return the final vectors of some nodes, [M] -> [M, k·d]; differentiable."""
        return self._joined([shard(nodes) for shard in self.members()])

    def auxiliary(self, batch: Triples) -> dict[str, Tensor]:
        """Return the mean over shards of what each one's published loss adds to BPR."""
        members, root = self.members(), math.sqrt(len(self.shards))
        rows = (batch.user_row, batch.item_row, batch.negative_row)
        parts = [(row * root).chunk(len(members), dim=-1) for row in rows]
        total: dict[str, Tensor] = {}
        for shard, user, item, negative in zip(members, *parts, strict=True):
            own = batch._replace(user_row=user, item_row=item, negative_row=negative)
            for name, value in shard.auxiliary(own).items():
                total[name] = total.get(name, 0.0) + value / len(members)
        return total

    def keep(self, edges: Tensor) -> None:
        """Propagate over these edges only: indices, int64 [n].

        A shard keeps those of them that it has; one that no shard has goes to every shard.
        """
        wanted = torch.zeros_like(self.kept)
        wanted[edges.to(wanted.device)] = True
        new = wanted & ~self.kept
        for shard in self.members():
            shard.keep(((shard.kept & wanted) | new).nonzero()[:, 0])
        self.unite()

    def drop(self, edges: Tensor) -> None:
        """Take these edges out of every shard's graph: indices, int64 [n]."""
        for shard in self.members():
            shard.drop(edges)
        self.unite()

    def unite(self) -> None:
        """Set `kept` from the shards; call it after changing their edges one by one."""
        self.kept.copy_(torch.stack([shard.kept for shard in self.members()]).any(0))

    def _joined(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts), dim=1) / math.sqrt(len(parts))

    def _graph_key(self) -> tuple[Any, ...]:
        keys = [shard._graph_key() for shard in self.members()]
        return (*super()._graph_key(), *keys)


def shards_in(state: Mapping[str, Tensor]) -> int:
    """Return how many shards the names of a checkpoint's tensors speak of; 0: a plain model."""
    found = (re.match(r"shards\.(\d+)\.", name) for name in state)
    return max((int(match[1]) + 1 for match in found if match), default=0)
