"""Matrix factorisation: the tables themselves are the final vectors."""

import torch
from torch import Tensor

from mmforget.recsys.backbones.base import Embedded
from mmforget.recsys.graph import Graph


class MatrixFactorisation(Embedded):
    """BPR-MF (Rendle et al., arXiv 1205.2618): two embedding tables, nothing propagated.

    Args:
        graph: All training edges; its edges only say which pairs are known.
        dim: Width of the vectors.
        std: Standard deviation of the initial values; None: Xavier uniform.
        decay: Weight of the L2 term.
        l2: Form of the L2 term; see `Embedded`.
    """

    def __init__(
        self,
        graph: Graph,
        dim: int = 64,
        std: float | None = 0.1,
        decay: float = 1e-4,
        l2: str = "half_squared",
    ) -> None:
        super().__init__(graph, dim, dim, std, decay, l2)

    def table(self) -> Tensor:
        """Return the embeddings, users first, [N, d]."""
        return torch.cat([self.users, self.items])

    def forward(self, nodes: Tensor) -> Tensor:
        """Return the embeddings of some nodes, [M] -> [M, d]; differentiable."""
        return self.by_type(
            nodes,
            lambda user: self.users.index_select(0, user),
            lambda item: self.items.index_select(0, item),
        )
