"""LightGCN: linear propagation over the user-item graph."""

import torch
from torch import Tensor

from mmforget.errors import ConfigError
from mmforget.recsys.backbones.mf import MatrixFactorisation
from mmforget.recsys.graph import Graph, propagated_sum

COMBINED = ("mean", "sum")
FEW = 4  # the last hop computes single rows where a batch has fewer than a FEW-th of the nodes


class LightGCN(MatrixFactorisation):
    """LightGCN (He et al., arXiv 2002.02126): the mean of Â^l E0 over l = 0..L.

    Args:
        graph: All training edges.
        dim: Width of the vectors.
        layers: Propagation steps L.
        std: Standard deviation of the initial values; None: Xavier uniform.
        decay: Weight of the L2 term.
        l2: Form of the L2 term; see `Embedded`.
        combine: "mean" of the layers, or their "sum" as UnlearnRec's LightGCN: scores are then
            (L + 1)² as large.
        layer0: Whether E0 itself is one of the layers.

    Raises:
        ConfigError: No layer is left, or there is no such combination.
    """

    def __init__(
        self,
        graph: Graph,
        dim: int = 64,
        layers: int = 3,
        std: float | None = 0.1,
        decay: float = 1e-4,
        l2: str = "half_squared",
        combine: str = "mean",
        layer0: bool = True,
    ) -> None:
        super().__init__(graph, dim, std, decay, l2)
        if combine not in COMBINED:
            raise ConfigError(f"combine={combine!r} is unknown; accepted: {', '.join(COMBINED)}")
        if layers < 1 and not layer0:
            raise ConfigError("layer0=false needs layers >= 1: no layer would be left")
        self.layers = layers
        self.first = 0 if layer0 else 1
        self.scale = 1.0 if combine == "sum" else 1.0 / (layers + 1 - self.first)

    def start(self) -> Tensor:
        """Return E0, users first, [N, d]; differentiable."""
        return torch.cat([self.users, self.items])

    def table(self) -> Tensor:
        """Return the propagated vectors, users first, [N, d]."""
        return self.scale * propagated_sum(self.adjacency(), self.start(), self.layers, self.first)

    def forward(self, nodes: Tensor) -> Tensor:
        """Return the propagated vectors of some nodes, [M] -> [M, d]; differentiable."""
        if FEW * len(nodes) >= self.graph.nodes:
            return self.table().index_select(0, nodes)
        wanted, place = torch.unique(nodes, return_inverse=True)
        found = propagated_sum(self.adjacency(), self.start(), self.layers, self.first, wanted)
        return self.scale * found.index_select(0, place)
