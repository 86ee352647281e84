"""SimGCL: LightGCN with a contrast of two propagations that noise disturbs."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from mmforget.errors import ConfigError
from mmforget.recsys.backbones.base import Triples
from mmforget.recsys.backbones.lightgcn import LightGCN
from mmforget.recsys.graph import Graph, symmetric_product
from mmforget.recsys.losses import CONTRASTS, type_contrast


class SimGCL(LightGCN):
    """SimGCL (Yu et al., arXiv 2112.08679): no graph is changed; E0 is left out of the mean.

    Args:
        graph: All training edges.
        dim: Width of the vectors.
        layers: Propagation steps L, of the views too.
        std: Standard deviation of the initial values; None: Xavier uniform.
        decay: Weight of the L2 term.
        l2: Form of the L2 term; see `Embedded`.
        combine: "mean" or "sum" of the layers.
        layer0: Whether E0 is one of the layers, of the views too.
        ssl_weight: Weight of the contrast, of users plus items; 0 leaves it out.
        temperature: τ of the contrast.
        noise: ε, the length of what is added to each vector after each hop.
        contrast: Form of the contrast; see `losses.contrast`. "sum" is divided by the batch size.

    Raises:
        ConfigError: An option names what there is not.
    """

    def __init__(
        self,
        graph: Graph,
        dim: int = 64,
        layers: int = 3,
        std: float | None = None,
        decay: float = 1e-4,
        l2: str = "half_squared",
        combine: str = "mean",
        layer0: bool = False,
        ssl_weight: float = 0.5,
        temperature: float = 0.2,
        noise: float = 0.1,
        contrast: str = "unique",
    ) -> None:
        super().__init__(graph, dim, layers, std, decay, l2, combine, layer0)
        if contrast not in CONTRASTS:
            raise ConfigError(f"contrast={contrast!r} is unknown; accepted: {', '.join(CONTRASTS)}")
        self.ssl_weight = ssl_weight
        self.temperature = temperature
        self.noise = noise
        self.contrast = contrast

    def auxiliary(self, batch: Triples) -> dict[str, Tensor]:
        """Return the L2 term and the contrast of two disturbed views over users and items."""
        terms = super().auxiliary(batch)
        if not self.ssl_weight:
            return terms
        start = self.start()
        first, second = self.view(start), self.view(start)
        value = type_contrast(
            first, second, self.graph.users, batch.user, batch.item, self.temperature, self.contrast
        )
        terms["ssl"] = self.ssl_weight * value
        return terms

    def view(self, start: Tensor) -> Tensor:
        """Return one disturbed propagation of E0, [N, d]; noise from torch's global generator."""
        draws = (torch.rand_like(start) for _ in range(self.layers))
        layers = perturbed_layers(self.adjacency(), start, draws, self.noise)
        parts = layers if self.first else [start, *layers]
        return torch.stack(parts).sum(0) * self.scale


def perturbed_layers(
    matrix: Tensor, start: Tensor, draws: Iterable[Tensor], noise: float
) -> list[Tensor]:
    """Return h_l = Âh + ε·sign(Âh)⊙n/‖n‖ by row, h = h_{l-1}, for l = 1..L, each [N, d].

    The noise stays in the orthant of the vector that it disturbs (eq. 5).

    Args:
        matrix: Â, symmetric sparse CSR [N, N].
        start: h_0, [N, d].
        draws: Uniform noise of each layer, [N, d], not negative.
        noise: ε.
    """
    found, now = [], start
    for drawn in draws:
        now = symmetric_product(matrix, now)
        now = now + noise * now.detach().sign() * F.normalize(drawn, dim=1)
        found.append(now)
    return found
