"""SGL: LightGCN with a contrast of two views of the graph that each lack some edges."""

import torch
from torch import Tensor

from mmforget.errors import ConfigError
from mmforget.recsys.backbones.base import Triples
from mmforget.recsys.backbones.lightgcn import LightGCN
from mmforget.recsys.graph import Graph, propagated_sum
from mmforget.recsys.losses import CONTRASTS, type_contrast
from mmforget.rng import derive

VIEWS = ("step", "epoch")
DROPS = ("edges", "entries")


class SGL(LightGCN):
    """SGL with edge dropout, SGL-ED (Wu et al., arXiv 2010.10783).

    Args:
        graph: All training edges.
        dim: Width of the vectors.
        layers: Propagation steps L, of the views too.
        std: Standard deviation of the initial values; None: Xavier uniform.
        decay: Weight of the L2 term.
        l2: Form of the L2 term; see `Embedded`.
        combine: "mean" or "sum" of the layers.
        layer0: Whether E0 is one of the layers.
        ssl_weight: Weight of the contrast, of users plus items; 0 leaves it out.
        temperature: τ of the contrast.
        drop_rate: Share of the edges that a view lacks.
        drop: "edges": edges go, both directions together, and the rest is normalised anew (paper);
            "entries": each direction goes by itself and what stays is divided by 1 - rate, degrees
            as they were (UnlearnRec): the view is not symmetric.
        views: New views at each "step" (UnlearnRec), or once an "epoch" (paper): when as many
            examples went by as edges are kept. The weights then hold a buffer `drawn` that says
            where in an epoch they were, so that a killed training goes on with the same views.
        contrast: Form of the contrast; see `losses.contrast`. "sum" is divided by the batch size,
            as BPR, which the paper sums as well, is a mean here.

    Raises:
        ConfigError: An option names what there is not.
    """

    drawn: Tensor

    def __init__(
        self,
        graph: Graph,
        dim: int = 64,
        layers: int = 3,
        std: float | None = None,
        decay: float = 1e-4,
        l2: str = "half_squared",
        combine: str = "mean",
        layer0: bool = True,
        ssl_weight: float = 0.1,
        temperature: float = 0.2,
        drop_rate: float = 0.1,
        drop: str = "edges",
        views: str = "step",
        contrast: str = "unique",
    ) -> None:
        super().__init__(graph, dim, layers, std, decay, l2, combine, layer0)
        for name, value, accepted in (
            ("drop", drop, DROPS),
            ("views", views, VIEWS),
            ("contrast", contrast, CONTRASTS),
        ):
            if value not in accepted:
                raise ConfigError(f"{name}={value!r} is unknown; accepted: {', '.join(accepted)}")
        self.ssl_weight = ssl_weight
        self.temperature = temperature
        self.drop_rate = drop_rate
        self.drop_form = drop
        self.views = views
        self.contrast = contrast
        if views == "epoch":
            # A seed, epochs begun, and the examples of the current one.
            start = torch.stack([torch.randint(2**62, ()), torch.tensor(0), torch.tensor(0)])
            self.register_buffer("drawn", start)

    def auxiliary(self, batch: Triples) -> dict[str, Tensor]:
        """Return the L2 term and the contrast of the two views over users and chosen items."""
        terms = super().auxiliary(batch)
        if not self.ssl_weight:
            return terms
        start = self.start()
        first, second = (
            propagated_sum(matrix, start, self.layers, self.first, transposed=transposed)
            for matrix, transposed in self.dropped_views(len(batch.user))
        )
        value = type_contrast(
            first, second, self.graph.users, batch.user, batch.item, self.temperature, self.contrast
        )
        terms["ssl"] = self.ssl_weight * value
        return terms

    def dropped_views(self, examples: int) -> list[tuple[Tensor, Tensor]]:
        """Return two views of the graph, each with its transpose, sparse CSR [N, N].

        Args:
            examples: Examples that are trained on with them.
        """
        if self.views == "step":
            return [self._view(None), self._view(None)]
        seed, epoch, seen = self.drawn.tolist()
        processes = 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            processes = torch.distributed.get_world_size()
        if seen == 0:
            epoch += 1
        seen += examples * processes
        left = 0 if seen >= int(self.kept.sum()) else seen
        self.drawn.copy_(torch.tensor([seed, epoch, left]))

        def make() -> list[tuple[Tensor, Tensor]]:
            return [
                self._view(torch.Generator().manual_seed(derive(seed, "view", epoch, number)))
                for number in range(2)
            ]

        return self._once("views", make, (seed, epoch))

    def _view(self, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        kept, device = self.kept.cpu(), self.kept.device

        def stays() -> Tensor:
            return torch.rand(len(self.graph), generator=generator) >= self.drop_rate

        if self.drop_form == "edges":
            matrix = self.graph.weighted(self.graph.weights(kept & stays()).to(device))
            return matrix, matrix
        value = self.graph.weights(kept) / (1.0 - self.drop_rate)
        straight, turned = (value * stays()).to(device), (value * stays()).to(device)
        return self.graph.weighted(straight, turned), self.graph.weighted(turned, straight)
