"""What every recommender is: a graph with kept edges, and one final vector a node."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from mmforget.errors import ConfigError
from mmforget.recsys.graph import Graph
from mmforget.recsys.losses import embedding_norm, half_squared, squared

Made = TypeVar("Made")
L2_FORMS = ("half_squared", "norm", "final_half_squared", "mean_squares", "all_parameters")


class Recommender(nn.Module, ABC):
    """Scores a pair by the inner product of the final vectors of its two nodes.

    A subclass has parameters and writes `table`; where only some rows are needed and that is
    cheaper, also `forward`; and `auxiliary` for what its published loss adds to BPR.

    In evaluation mode weights must be changed in place by operations autograd sees (`copy_`), never
    through `.data` or a fused optimiser: the final vectors are kept until a version counter moves.

    Args:
        graph: All training edges of the data set; shared, never changed.

    Attributes:
        kept: Which edges this model propagates over, bool [E]; saved with the weights.
    """

    kept: Tensor

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph
        self.register_buffer("kept", torch.ones(len(graph), dtype=torch.bool))
        self._made: dict[str, tuple[Any, Any]] = {}

    @abstractmethod
    def table(self) -> Tensor:
        """Return the final vectors of all nodes, users first, [N, d]; differentiable."""

    def forward(self, nodes: Tensor) -> Tensor:
        """Return the final vectors of some nodes (with repeats), [M] -> [M, d]; differentiable."""
        return self.table()[nodes]

    def auxiliary(self, batch: "Triples") -> dict[str, Tensor]:
        """Return what the published training loss adds to BPR, as named, weighted scalars.

        Means over the batch held here, without the BPR term; empty if there is nothing. May draw
        (edge dropping, noise) from torch's global generator, which the training loop seeds.
        """
        return {}

    def final(self) -> Tensor:
        """Return the final vectors of all nodes without gradients, [N, d]; computed once.

        Kept until a weight, a kept edge or the device changes; not while training, because a fused
        optimiser moves weights without a version counter.
        """
        if self.training:
            with torch.inference_mode(False), torch.no_grad():
                return self.table().detach()
        weights = tuple((p.data_ptr(), p._version) for p in self.parameters())
        return self._once("final", lambda: self.table().detach(), weights)

    def train(self, mode: bool = True) -> "Recommender":
        """Set training or evaluation mode, and forget the final vectors."""
        self._made.pop("final", None)
        super().train(mode)
        return self

    def adjacency(self) -> Tensor:
        """Return the normalised adjacency of the kept edges; see `Graph.adjacency`."""
        return self._once("adjacency", lambda: self.graph.adjacency(self.kept))

    def keep(self, edges: Tensor) -> None:
        """Propagate over these edges only: indices into the graph, int64 [n]."""
        kept = torch.zeros_like(self.kept)
        kept[edges.to(kept.device)] = True
        self.kept.copy_(kept)

    def drop(self, edges: Tensor) -> None:
        """Take these edges out of the graph: indices, int64 [n]."""
        self.kept[edges.to(self.kept.device)] = False

    def withdrawn(self) -> Tensor:
        """Return the items that had edges and have none any more, bool [I].

        A backbone with an item-item graph leaves them out of it, or their features would go on
        being spread to their neighbours.
        """
        on = self.kept.cpu()
        left = torch.bincount(self.graph.item[on], minlength=self.graph.items)
        return ((left == 0) & (self.graph.degree_item > 0)).to(self.kept.device)

    def _graph_key(self) -> tuple[Any, ...]:
        return (self.kept.data_ptr(), self.kept._version, self.kept.device)

    def _once(self, name: str, make: Callable[[], Made], key: Any = None) -> Made:
        """Return what `make` made, without gradients, until a kept edge, the device or `key` moves.

        Args:
            name: What it is.
            make: Makes it from the kept edges.
            key: What else it is made of.
        """
        key = (key, self._graph_key())
        if name not in self._made or self._made[name][0] != key:
            # Not an inference tensor: losses multiply it with tensors that need gradients.
            with torch.inference_mode(False), torch.no_grad():
                self._made[name] = (key, make())
        found: Made = self._made[name][1]
        return found

    def __getstate__(self) -> dict[str, Any]:
        """Leave what was computed out of copies: it would be kept twice."""
        return {**self.__dict__, "_made": {}}


class Triples(NamedTuple):
    """A training batch with the final vectors already computed for its BPR term.

    Attributes:
        user: int64 [B].
        item: int64 [B].
        negative: int64 [B, n].
        user_row: Final vectors, [B, d].
        item_row: Final vectors, [B, d].
        negative_row: Final vectors, [B, n, d].
        size: Examples of the effective batch over all processes and micro-batches.
    """

    user: Tensor
    item: Tensor
    negative: Tensor
    user_row: Tensor
    item_row: Tensor
    negative_row: Tensor
    size: int


class Embedded(Recommender):
    """A recommender with a free table of vectors for users and one for items.

    Args:
        graph: All training edges.
        user_dim: Width of the users' table.
        item_dim: Width of the items' table.
        std: Standard deviation of the normal initial values; None: Xavier uniform.
        decay: Weight of the L2 term; 0 leaves it out.
        l2: What that term is, a sum over the batch's user, item and negatives, with repeats:
            `half_squared`: half the squared layer-0 vectors per example (LightGCN-PyTorch); `norm`:
            Frobenius norms, not squared, over the batch size (MMRec); `final_half_squared`: as the
            first, of final vectors (MGCN); `mean_squares`: means over elements (MMGCN);
            `all_parameters`: squares of every weight, no mean (UnlearnRec, LightGCL). Equal weights
            do not make them comparable.

    Raises:
        ConfigError: There is no such form of L2.
    """

    def __init__(
        self,
        graph: Graph,
        user_dim: int,
        item_dim: int,
        std: float | None,
        decay: float,
        l2: str,
    ) -> None:
        super().__init__(graph)
        if l2 not in L2_FORMS:
            raise ConfigError(f"l2={l2!r} is unknown; accepted: {', '.join(L2_FORMS)}")
        self.decay = decay
        self.l2 = l2
        self.users = nn.Parameter(torch.empty(graph.users, user_dim))
        self.items = nn.Parameter(torch.empty(graph.items, item_dim))
        for table in (self.users, self.items):
            if std is None:
                nn.init.xavier_uniform_(table)
            else:
                nn.init.normal_(table, std=std)

    def auxiliary(self, batch: "Triples") -> dict[str, Tensor]:
        """Return the L2 term; see `Recommender.auxiliary`."""
        if not self.decay:
            return {}
        if self.l2 == "all_parameters":
            value = squared(self.parameters())
        elif self.l2 == "final_half_squared":
            value = half_squared(batch.user_row, batch.item_row, batch.negative_row)
        elif self.l2 == "mean_squares":
            value = self.mean_squares(batch)
        else:
            form = half_squared if self.l2 == "half_squared" else embedding_norm
            value = form(*self.first_rows(batch))
        return {"l2": self.decay * value}

    def first_rows(self, batch: "Triples") -> tuple[Tensor, Tensor, Tensor]:
        """Return the layer-0 vectors of a batch: user and item [B, d], negative [B, n, d]."""
        size = len(batch.user)
        # One gather for both kinds of items: each costs a gradient as large as the table.
        items = self.items.index_select(0, torch.cat([batch.item, batch.negative.reshape(-1)]))
        negative = items[size:].view(size, -1, items.shape[1])
        return self.users.index_select(0, batch.user), items[:size], negative

    def mean_squares(self, batch: "Triples") -> Tensor:
        """Return the mean square of the users' numbers plus that of the items' and negatives'."""
        user, item, negative = self.first_rows(batch)
        items = torch.cat([item[:, None], negative], dim=1)
        return user.square().mean() + items.square().mean()

    def by_type(
        self, nodes: Tensor, users: Callable[[Tensor], Tensor], items: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Return rows of nodes of both types without joining the tables, [M] -> [M, d].

        Args:
            nodes: Users and items as nodes, int64 [M], in any order.
            users: Rows of users, by their ids.
            items: Rows of items, by their ids.
        """
        is_user = nodes < self.graph.users
        own, other = is_user.nonzero()[:, 0], (~is_user).nonzero()[:, 0]
        rows = torch.cat([users(nodes[own]), items(nodes[other] - self.graph.users)])
        place = torch.empty_like(nodes)
        place[torch.cat([own, other])] = torch.arange(len(nodes), device=nodes.device)
        return rows.index_select(0, place)


def attach(rows: Tensor, *parts: Tensor) -> Tensor:
    """Return the rows a `forward` found, with what `auxiliary` would have to compute again.

    It lives exactly as long as the rows: nothing stale can be met, and no graph is held by a model.
    """
    rows.computed = parts  # type: ignore[attr-defined]
    return rows


def attached(batch: Triples) -> tuple[Tensor, ...] | None:
    """Return what `attach` left on the rows that a batch's vectors were cut from, or None."""
    found: tuple[Tensor, ...] | None = getattr(batch.user_row._base, "computed", None)
    return found
