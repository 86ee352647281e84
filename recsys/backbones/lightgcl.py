"""LightGCL: LightGCN with a contrast against a low-rank view of the graph."""

import torch
from torch import Tensor

from mmforget.recsys.backbones.base import Triples, attach, attached
from mmforget.recsys.backbones.lightgcn import LightGCN
from mmforget.recsys.graph import Graph, propagated_sum, symmetric_product
from mmforget.recsys.losses import svd_contrast

SMALL = 512  # users or items up to which the decomposition is exact
SPARE, TURNS = 8, 4  # further columns and power iterations that make a sketch nearly exact


class LightGCL(LightGCN):
    """LightGCL (Cai et al., arXiv 2302.08191): layers are summed, E0 included.

    The view replaces the normalised user-item block by its best rank-q approximation, in which
    every user meets every item. It is made of the kept edges and again when they change: a
    decomposition of the old graph would remember what is forgotten.

    Args:
        graph: All training edges.
        dim: Width of the vectors.
        layers: Propagation steps L, at least 1.
        std: Standard deviation of the initial values; None: Xavier uniform.
        decay: Weight of the L2 term.
        l2: Form of the L2 term; see `Embedded`.
        ssl_weight: Weight of the contrast, of users plus items; 0 leaves it out.
        temperature: τ of the contrast.
        rank: q.
    """

    def __init__(
        self,
        graph: Graph,
        dim: int = 64,
        layers: int = 2,
        std: float | None = None,
        decay: float = 1e-7,
        l2: str = "all_parameters",
        ssl_weight: float = 0.2,
        temperature: float = 0.2,
        rank: int = 5,
    ) -> None:
        super().__init__(graph, dim, layers, std, decay, l2, combine="sum")
        self.ssl_weight = ssl_weight
        self.temperature = temperature
        self.rank = rank

    def forward(self, nodes: Tensor) -> Tensor:
        """Return the final vectors of some nodes, [M] -> [M, d]; differentiable."""
        if not self.ssl_weight:
            return super().forward(nodes)
        main, prefix = self.summed()  # the contrast needs all rows
        return attach(main.index_select(0, nodes), main, prefix)

    def summed(self) -> tuple[Tensor, Tensor]:
        """Return the sums of layers 0..L and 0..L-1, each [N, d], with L products."""
        start, adjacency = self.start(), self.adjacency()
        prefix = propagated_sum(adjacency, start, self.layers - 1)
        return start + symmetric_product(adjacency, prefix), prefix

    def view(self, prefix: Tensor) -> Tensor:
        """Return E0 plus the low-rank block applied to layers 0..L-1, users first, [N, d].

        Applied as (U S)(Vᵀ E): the block itself is never made.

        Args:
            prefix: The sum of layers 0..L-1, [N, d].
        """
        left, size, right = self.decomposition()
        users, items = torch.split(prefix, [self.graph.users, self.graph.items])
        user = (left * size) @ (right.T @ items)
        item = (right * size) @ (left.T @ users)
        return self.start() + torch.cat([user, item])

    def decomposition(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return U [users, q], S [q] and V [items, q] of the block of the kept edges."""
        return self._once("svd", lambda: truncated_svd(self.graph, self.kept, self.rank))

    def auxiliary(self, batch: Triples) -> dict[str, Tensor]:
        """Return the L2 term and the contrast of users, and of chosen items and negatives."""
        terms = super().auxiliary(batch)
        if not self.ssl_weight:
            return terms
        main, prefix = attached(batch) or self.summed()
        view, users = self.view(prefix), self.graph.users
        items = torch.cat([batch.item, batch.negative.reshape(-1)])
        value = svd_contrast(view[:users], main[:users], batch.user, self.temperature)
        value = value + svd_contrast(view[users:], main[users:], items, self.temperature)
        terms["ssl"] = self.ssl_weight * value
        return terms


def truncated_svd(graph: Graph, kept: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest singular triplets of the normalised user-item block.

    Exact where there are at most 512 users or items; otherwise a randomised sketch under a fixed
    seed, with more columns and power iterations than the published one (q columns, 2 iterations).

    Args:
        graph: All training edges.
        kept: Which of them count, bool [E].
        rank: q; at most as many as users and items allow.

    Returns:
        U [users, q], S [q], V [items, q], on the device of `kept`.
    """
    block, _ = graph.block(kept.cpu())
    least = min(graph.users, graph.items)
    rank = min(rank, least)
    if least <= SMALL:
        left, size, turned = torch.linalg.svd(block.to_dense().double(), full_matrices=False)
        right = turned.T
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            wide = min(rank + SPARE, least)
            left, size, right = torch.svd_lowrank(block.to_sparse(), q=wide, niter=TURNS)
    found = (left[:, :rank], size[:rank], right[:, :rank])
    return tuple(part.float().to(kept.device) for part in found)
