"""VBPR: matrix factorisation whose item vectors are half free, half made of features."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmforget.recsys.backbones.base import Embedded, Triples
from mmforget.recsys.backbones.features import ItemFeatures
from mmforget.recsys.graph import Graph


class VBPR(Embedded):
    """VBPR (He and McAuley, arXiv 1510.01784) as in MMRec, without biases.

    An item is [free vector; linear map of text and image], 2·dim wide, as a user's free vector.

    Args:
        graph: All training edges; its edges only say which pairs are known.
        features: Features of items; see `ItemFeatures`.
        dim: Width of the free item vectors.
        std: Standard deviation of the initial values; None: Xavier uniform.
        decay: Weight of the L2 term.
        l2: Form of the L2 term over the whole vectors; see `Embedded`.
    """

    def __init__(
        self,
        graph: Graph,
        features: Mapping[str, Tensor],
        dim: int = 64,
        std: float | None = None,
        decay: float = 1e-4,
        l2: str = "norm",
    ) -> None:
        super().__init__(graph, 2 * dim, dim, std, decay, l2)
        self.features = ItemFeatures(features, graph.items)
        self.order = self.features.names[::-1]  # text before image
        self.linear = nn.Linear(sum(self.features.width(name) for name in self.order), dim)
        nn.init.xavier_normal_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def table(self) -> Tensor:
        """Return the users' vectors and the items' two halves, [N, 2·dim]."""
        every = torch.arange(self.graph.items, device=self.items.device)
        return torch.cat([self.users, self.item_rows(every)])

    def forward(self, nodes: Tensor) -> Tensor:
        """Return the final vectors of some nodes, [M] -> [M, 2·dim]; differentiable."""
        return self.by_type(nodes, lambda user: self.users.index_select(0, user), self.item_rows)

    def item_rows(self, item: Tensor) -> Tensor:
        """Return final vectors of items, mapping the features of each item once, [n, 2·dim]."""
        wanted, place = torch.unique(item, return_inverse=True)
        device = self.items.device
        raw = [self.features.on(name, device).index_select(0, wanted) for name in self.order]
        rows = [self.items.index_select(0, wanted), self.linear(torch.cat(raw, dim=1))]
        return torch.cat(rows, dim=1).index_select(0, place)

    def first_rows(self, batch: Triples) -> tuple[Tensor, Tensor, Tensor]:
        """Return the whole vectors: nothing is propagated, and features count in the L2 term."""
        return batch.user_row, batch.item_row, batch.negative_row
