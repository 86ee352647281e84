"""MGCN: LightGCN beside features that behaviour purifies and a graph of similar items spreads."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmforget.errors import ConfigError
from mmforget.recsys.backbones.base import Embedded, Triples, attach, attached
from mmforget.recsys.backbones.features import ItemFeatures, item_graph
from mmforget.recsys.graph import Graph, product, propagated_mean
from mmforget.recsys.losses import CONTRASTS, type_contrast


class MGCN(Embedded):
    """MGCN (Yu et al., arXiv 2308.03588) as in MMRec; one kind of feature is enough.

    Items that lost all their edges leave the item graphs (`Recommender.withdrawn`).

    Args:
        graph: All training edges.
        features: Features of items; see `ItemFeatures`.
        dim: Width of the vectors.
        layers: Propagation steps over the user-item graph.
        hops: Propagation steps over the graphs of similar items.
        neighbours: Nearest items of each item, itself included.
        std: Standard deviation of the initial values; None: Xavier uniform.
        decay: Weight of the L2 term.
        l2: Form of the L2 term; see `Embedded`. The reference divides by the configured batch size,
            here by that of the batch, which differs in an epoch's last batch alone.
        ssl_weight: Weight of the contrast of content and side part, of users plus items.
        temperature: τ of the contrast.
        contrast: Form of the contrast; see `losses.contrast`.
        train_features: Whether the model trains features of its own, which begin as those given.

    Raises:
        ConfigError: There is no such contrast.
    """

    def __init__(
        self,
        graph: Graph,
        features: Mapping[str, Tensor],
        dim: int = 64,
        layers: int = 2,
        hops: int = 1,
        neighbours: int = 10,
        std: float | None = None,
        decay: float = 1e-4,
        l2: str = "final_half_squared",
        ssl_weight: float = 0.01,
        temperature: float = 0.2,
        contrast: str = "batch",
        train_features: bool = True,
    ) -> None:
        super().__init__(graph, dim, dim, std, decay, l2)
        if contrast not in CONTRASTS:
            raise ConfigError(f"contrast={contrast!r} is unknown; accepted: {', '.join(CONTRASTS)}")
        self.layers = layers
        self.hops = hops
        self.neighbours = neighbours
        self.ssl_weight = ssl_weight
        self.temperature = temperature
        self.contrast = contrast
        self.features = ItemFeatures(features, graph.items)
        names = self.features.names

        def gates() -> nn.ModuleDict:
            return nn.ModuleDict({name: nn.Linear(dim, dim) for name in names})

        self.project = nn.ModuleDict(
            {name: nn.Linear(self.features.width(name), dim) for name in names}
        )
        self.purify, self.prefer = gates(), gates()
        self.query = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, 1, bias=False))
        self.raw = nn.ParameterDict()
        if train_features:
            cpu = torch.device("cpu")
            for name in names:
                self.raw[name] = nn.Parameter(self.features.on(name, cpu).float().clone())

    def table(self) -> Tensor:
        """Return content plus side part, users first, [N, d]."""
        content, side = self.parts()
        return content + side

    def forward(self, nodes: Tensor) -> Tensor:
        """Return the final vectors of some nodes, [M] -> [M, d]; differentiable."""
        content, side = self.parts()
        return attach((content + side).index_select(0, nodes), content, side)

    def parts(self) -> tuple[Tensor, Tensor]:
        """Return what the user-item graph says (LightGCN) and what features add, each [N, d]."""
        content = propagated_mean(
            self.adjacency(), torch.cat([self.users, self.items]), self.layers
        )
        views = torch.stack([self.modality(name) for name in self.features.names])
        weights = self.query(views).softmax(0)
        common = (weights * views).sum(0)
        side = common
        for name, view in zip(self.features.names, views.unbind(), strict=True):
            side = side + self.prefer[name](content).sigmoid() * (view - common)
        return content, side / (len(views) + 1)

    def modality(self, name: str) -> Tensor:
        """Return the vectors of all nodes by one kind of feature, [N, d]."""
        raw = self.raw[name] if name in self.raw else self.features.on(name, self.items.device)
        item = self.items * self.purify[name](self.project[name](raw)).sigmoid()
        near = self._once(f"near_{name}", lambda: self.item_graph(name))
        for _ in range(self.hops):
            item = product(near[0], near[1], item)
        block = self._once("block", lambda: self.graph.block(self.kept))
        return torch.cat([product(*block, item), item])

    def item_graph(self, name: str) -> tuple[Tensor, ...]:
        """Return the graph of similar items without withdrawn ones, and its transpose."""
        device = self.kept.device
        near, found = self.features.neighbours(name, self.neighbours, device)
        return item_graph(near.to(device), found.float().to(device), self.withdrawn())

    def auxiliary(self, batch: Triples) -> dict[str, Tensor]:
        """Return the L2 term and the contrast of side part and content."""
        terms = super().auxiliary(batch)
        if not self.ssl_weight:
            return terms
        content, side = attached(batch) or self.parts()
        value = type_contrast(
            side, content, self.graph.users, batch.user, batch.item, self.temperature, self.contrast
        )
        terms["ssl"] = self.ssl_weight * value
        return terms
