"""MMGCN: one graph network for each kind of feature, whose outputs are averaged."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmforget.recsys.backbones.base import Embedded, Triples
from mmforget.recsys.backbones.features import ItemFeatures
from mmforget.recsys.graph import Graph, csr, product

IMAGE_WIDTH = 256  # images are mapped to it first; text goes in as it is


class MMGCN(Embedded):
    """MMGCN (Wei et al., ACM MM 2019) as in MMRec, with the weights that its port left untrained.

    MMRec's port holds id embeddings and preferences as plain tensors, which no optimiser moves;
    here they are parameters. Its number of layers is always 3, whatever its option says.

    Args:
        graph: All training edges.
        features: Features of items; see `ItemFeatures`.
        dim: Width of the vectors.
        layers: Blocks of each modality, at least 1.
        std: Standard deviation of the initial id embeddings; None: Xavier uniform.
        decay: Weight of the L2 term.
        l2: Form of the L2 term; "mean_squares" counts the users' image preferences too.
    """

    def __init__(
        self,
        graph: Graph,
        features: Mapping[str, Tensor],
        dim: int = 64,
        layers: int = 3,
        std: float | None = None,
        decay: float = 1e-4,
        l2: str = "mean_squares",
    ) -> None:
        super().__init__(graph, dim, dim, std, decay, l2)
        self.features = ItemFeatures(features, graph.items)
        self.modality = nn.ModuleDict(
            {
                name: Modality(
                    graph.users,
                    self.features.width(name),
                    IMAGE_WIDTH if name == "image" else None,
                    dim,
                    layers,
                )
                for name in self.features.names
            }
        )

    def table(self) -> Tensor:
        """Return the mean over modalities, users first, [N, d]."""
        matrices = self._once("mean", lambda: mean_matrices(self.adjacency()))
        ids, device = torch.cat([self.users, self.items]), self.users.device
        parts = [
            network(self.features.on(name, device), ids, matrices)
            for name, network in self.modality.items()
        ]
        return torch.stack(parts).mean(0)

    def mean_squares(self, batch: Triples) -> Tensor:
        """Return the mean squares of the batch's id embeddings, plus of the image preferences."""
        value = super().mean_squares(batch)
        if "image" in self.modality:
            image = self.modality["image"]
            assert isinstance(image, Modality)
            value = value + image.users.square().mean()
        return value


class Modality(nn.Module):
    """The network of one kind of feature: x <- act(G [act(mean(xW)); act(Lx) + id]) in each block.

    Args:
        users: Number of users.
        width: Columns of the feature.
        inner: Width that the feature is mapped to first; None: it is taken as it is.
        dim: Width of the output.
        layers: Blocks.

    Attributes:
        users: What users prefer, in the space of the feature, [U, inner or width].
    """

    def __init__(self, users: int, width: int, inner: int | None, dim: int, layers: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, inner) if inner is not None else nn.Identity()
        inner = width if inner is None else inner
        self.users = nn.Parameter(nn.init.xavier_normal_(torch.empty(users, inner)))
        widths = [inner, *[dim] * (layers - 1)]
        self.spread = nn.ModuleList([nn.Linear(w, w, bias=False) for w in widths])
        self.own = nn.ModuleList([nn.Linear(w, dim) for w in widths])
        self.merge = nn.ModuleList([nn.Linear(w + dim, dim) for w in widths])
        for group in (self.spread, self.own, self.merge):
            for layer in group:
                assert isinstance(layer, nn.Linear)
                nn.init.xavier_normal_(layer.weight)

    def forward(self, features: Tensor, ids: Tensor, matrices: tuple[Tensor, Tensor]) -> Tensor:
        """Return the vectors of all nodes, [N, dim].

        Args:
            features: [I, width].
            ids: Id embeddings of all nodes, [N, dim].
            matrices: Mean over neighbours and its transpose, sparse CSR [N, N].
        """
        x = F.normalize(torch.cat([self.users, self.project(features)]))
        for spread, own, merge in zip(self.spread, self.own, self.merge, strict=True):
            near = F.leaky_relu(product(*matrices, spread(x)))
            mixed = F.leaky_relu(own(x)) + ids
            x = F.leaky_relu(merge(torch.cat([near, mixed], dim=1)))
        return x


def mean_matrices(adjacency: Tensor) -> tuple[Tensor, Tensor]:
    """Return D^-1 A and its transpose A D^-1, with the pattern of a symmetric adjacency.

    Args:
        adjacency: Sparse CSR [N, N]; its values do not matter. Rows without entries stay so.
    """
    rows, columns = adjacency.crow_indices(), adjacency.col_indices()
    degree = (rows[1:] - rows[:-1]).long()
    share = 1.0 / degree.clamp(min=1)
    shape = (len(degree), len(degree))
    straight = csr(rows, columns, share.repeat_interleave(degree), shape, rows.device)
    return straight, csr(rows, columns, share[columns.long()], shape, rows.device)
