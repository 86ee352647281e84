"""The user-item graph: all training edges, which of them are kept, and products with its matrix.

A request takes edges away, never adds any. So the edges of a data set are fixed (`Graph`, shared by
every model and copy), a model holds one boolean an edge, and the normalised adjacency is rebuilt
from both without sorting anything.
"""

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

Ints = npt.NDArray[np.int64]


class Graph:
    """The training edges of a data set, without duplicates; immutable and shared by copies.

    Nodes are users first, then items: item i is node `users + i`.

    Args:
        users: Number of users.
        items: Number of items.
        user: User of each edge, [E].
        item: Item of each edge, [E]; edges must be sorted by (user, item), each once.

    Attributes:
        by_item: Edges in the order (item, user), int64 [E].
        degree_user: Edges of each user, int64 [U].
        degree_item: Edges of each item, int64 [I].
    """

    def __init__(self, users: int, items: int, user: Ints, item: Ints) -> None:
        keys = user.astype(np.int64) * items + item
        if len(keys) and not (np.diff(keys) > 0).all():
            raise ValueError("edges must be sorted by (user, item), each once")
        self.users = users
        self.items = items
        self.user = torch.from_numpy(np.ascontiguousarray(user, np.int64))
        self.item = torch.from_numpy(np.ascontiguousarray(item, np.int64))
        # A stable sort by item of edges sorted by user: the rows of the items' half.
        self.by_item = torch.argsort(self.item, stable=True)
        self.degree_user = torch.bincount(self.user, minlength=users)
        self.degree_item = torch.bincount(self.item, minlength=items)
        # The sparsity pattern with every edge kept, made once: [N + 1] rows and [2E] columns.
        self._rows = _pointers(torch.cat([self.degree_user, self.degree_item]))
        self._columns = torch.cat([self.item + users, self.user[self.by_item]]).int()
        self._moved: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}
        self._ends = (self.user.int(), self.item.int())

    def __len__(self) -> int:
        return len(self.user)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Graph":
        return self

    @property
    def nodes(self) -> int:
        """Users and items together."""
        return self.users + self.items

    def degrees(self, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the kept edges of each user and of each item, int64 [U] and [I].

        Args:
            kept: Which edges count, bool [E], on the CPU; None: all.
        """
        if kept is None:
            return self.degree_user, self.degree_item
        found = []
        for mask, size in ((kept, self.degree_user), (kept[self.by_item], self.degree_item)):
            # Edges of a node lie together, so a running sum counts them.
            total = _pointers(mask)[_pointers(size).long()]
            found.append((total[1:] - total[:-1]).long())
        return found[0], found[1]

    def weights(self, kept: Tensor | None = None) -> Tensor:
        """Return 1/sqrt(deg u · deg i) of each edge, by the kept degrees; 0 where it is not kept.

        Args:
            kept: Which edges count, bool [E], on the CPU; None: all.

        Returns:
            float32 [E].
        """
        user, item = (
            degree.double().rsqrt().masked_fill_(degree == 0, 0.0) for degree in self.degrees(kept)
        )
        ends = user.index_select(0, self._ends[0]), item.index_select(0, self._ends[1])
        value = (ends[0] * ends[1]).float()
        return value if kept is None else value.mul_(kept)

    def adjacency(self, kept: Tensor | None = None) -> Tensor:
        """Return Â = D^-1/2 A D^-1/2 of the kept edges, with 0^-1/2 := 0.

        Args:
            kept: Which edges count, bool [E]; None: all.

        Returns:
            Symmetric sparse CSR [N, N], float32 with int32 indices, on the device of `kept`. Edges
            that are not kept have no entry.
        """
        device = torch.device("cpu") if kept is None else kept.device
        on = None if kept is None or bool(kept.all()) else kept.cpu()
        value = self.weights(on)
        values = torch.cat([value, value[self.by_item]])
        columns, rows = self._columns, self._rows
        if on is not None:
            stays = torch.cat([on, on[self.by_item]])
            columns, values = columns[stays], values[stays]
            rows = _pointers(torch.cat(self.degrees(on)))
        return csr(rows, columns, values, (self.nodes, self.nodes), device)

    def weighted(self, value: Tensor, turned: Tensor | None = None) -> Tensor:
        """Return a matrix with the pattern of all edges and any values: views of the graph.

        No index is touched, so that a view with dropped edges (weight 0) costs little to make.

        Args:
            value: Value of each entry (user, item), float32 [E].
            turned: Value of each entry (item, user), [E], in the order of edges; None: as `value`.

        Returns:
            Sparse CSR [N, N] with 2E entries, on the device of `value`.
        """
        device = value.device
        if device not in self._moved:
            pattern = self._rows, self._columns, self.by_item
            self._moved[device] = tuple(part.to(device) for part in pattern)  # type: ignore[assignment]
        rows, columns, order = self._moved[device]
        values = torch.cat([value, (value if turned is None else turned)[order]])
        return csr(rows, columns, values, (self.nodes, self.nodes), device)

    def block(self, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the block of users and items of `adjacency`, and its transpose.

        Args:
            kept: Which edges count, bool [E]; None: all.

        Returns:
            Sparse CSR [U, I] and [I, U], float32 with int32 indices, on the device of `kept`.
        """
        device = torch.device("cpu") if kept is None else kept.device
        on = torch.ones(len(self), dtype=torch.bool) if kept is None else kept.cpu()
        value, turned = self.weights(on), self.by_item[on[self.by_item]]
        user, item = (_pointers(degree) for degree in self.degrees(on))
        straight = csr(user, self.item[on], value[on], (self.users, self.items), device)
        return straight, csr(
            item, self.user[turned], value[turned], (self.items, self.users), device
        )


def _pointers(counts: Tensor) -> Tensor:
    """Return row pointers of rows of these sizes, int32 [n + 1]."""
    found = torch.zeros(len(counts) + 1, dtype=torch.int32)
    torch.cumsum(counts, 0, dtype=torch.int32, out=found[1:])
    return found


def csr(
    rows: Tensor,
    columns: Tensor,
    values: Tensor,
    shape: tuple[int, int],
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return a sparse CSR matrix with int32 indices.

    Args:
        rows: Row pointers, [rows + 1].
        columns: Column of each entry, [nnz].
        values: Value of each entry, [nnz].
        shape: Shape of the matrix.
        device: Where it is put.
    """
    with warnings.catch_warnings():
        # Once a process torch says that sparse CSR is in beta: nothing a user could act on.
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(
            rows.int(), columns.int(), values, size=shape, device=device, check_invariants=False
        )


def sparse_product(matrix: Tensor, x: Tensor) -> Tensor:
    """Return `matrix @ x`, without gradients.

    On a CPU by the kernel of `embedding_bag`, which sums weighted rows and fetches them ahead: 3
    times (Gowalla) to 10 times (lastfm) as fast as torch's sparse product with d = 64.

    Args:
        matrix: Sparse CSR [N, M].
        x: Dense [M, d].
    """
    if x.device.type != "cpu":
        return matrix @ x
    return _sum_rows(matrix.crow_indices(), matrix.col_indices(), matrix.values(), x)


def _sum_rows(rows: Tensor, columns: Tensor, values: Tensor, x: Tensor) -> Tensor:
    if not len(columns):
        return x.new_zeros(len(rows) - 1, x.shape[1])
    return F.embedding_bag(
        columns,
        x.contiguous(),
        rows,
        mode="sum",
        per_sample_weights=values.to(x.dtype),
        include_last_offset=True,
    )


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: Tensor, transposed: Tensor, x: Tensor) -> Tensor:
        ctx.matrix, ctx.transposed = matrix, transposed
        return sparse_product(matrix, x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor]:
        return None, None, product(ctx.transposed, ctx.matrix, grads[0])


def product(matrix: Tensor, transposed: Tensor, x: Tensor) -> Tensor:
    """Return `matrix @ x`; its backward is a product with `transposed`. Differentiable twice.

    Args:
        matrix: Sparse CSR [N, M], a constant.
        transposed: Its transpose, sparse CSR [M, N].
        x: Dense [M, d].
    """
    found: Tensor = _Product.apply(matrix, transposed, x)
    return found


def symmetric_product(matrix: Tensor, x: Tensor) -> Tensor:
    """Return `matrix @ x` for a symmetric sparse matrix; its backward is the same product.

    Autograd's own backward would transpose the matrix each time. Differentiable twice.

    Args:
        matrix: Sparse CSR [N, N], symmetric, a constant.
        x: Dense [N, d].
    """
    return product(matrix, matrix, x)


class _Propagation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        matrix: Tensor,
        transposed: Tensor,
        x: Tensor,
        layers: int,
        first: int,
        nodes: Tensor | None,
    ) -> Tensor:
        ctx.saved = (matrix, transposed, layers, first, nodes, len(x))
        return _horner(matrix, x, layers, first, nodes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor, None, None, None]:
        matrix, transposed, layers, first, nodes, size = ctx.saved
        (grad,) = grads
        if nodes is not None:
            grad = grad.new_zeros(size, grad.shape[1]).index_add_(0, nodes, grad)
        grad = propagated_sum(transposed, grad, layers, first, transposed=matrix)
        return None, None, grad, None, None, None


def _horner(matrix: Tensor, x: Tensor, layers: int, first: int, nodes: Tensor | None) -> Tensor:
    total = x
    for hop in range(layers, 0, -1):
        if nodes is not None and hop == 1:
            total = rows_product(matrix, total, nodes)
        else:
            total = sparse_product(matrix, total)
        # x enters after every hop but the last `first` ones: each hop left adds one power of Â.
        if hop > first:
            total += x if nodes is None or hop > 1 else x.index_select(0, nodes)
    if layers:
        return total
    return x.clone() if nodes is None else x.index_select(0, nodes)


def rows_product(matrix: Tensor, x: Tensor, nodes: Tensor) -> Tensor:
    """Return `(matrix @ x)[nodes]` computing these rows only, without gradients, [M, d].

    Args:
        matrix: Sparse CSR [N, N].
        x: Dense [N, d].
        nodes: Rows, int64 [M].
    """
    rows = matrix.crow_indices()
    starts = rows[nodes]
    counts = rows[nodes + 1] - starts
    pointers = counts.new_zeros(len(nodes) + 1)
    torch.cumsum(counts, 0, dtype=counts.dtype, out=pointers[1:])
    total = int(pointers[-1])
    place = torch.repeat_interleave(starts - pointers[:-1], counts.long(), output_size=total)
    place += torch.arange(total, dtype=place.dtype, device=place.device)
    columns = matrix.col_indices().index_select(0, place)
    values = matrix.values().index_select(0, place)
    if x.device.type == "cpu":
        return _sum_rows(pointers, columns, values, x)
    return csr(pointers, columns, values, (len(nodes), len(x)), x.device) @ x


def propagated_sum(
    matrix: Tensor,
    x: Tensor,
    layers: int,
    first: int = 0,
    nodes: Tensor | None = None,
    transposed: Tensor | None = None,
) -> Tensor:
    """Return the sum over l = first..L of Â^l x, [N, d], in Horner's form: L products, no stack.

    One autograd node, whose backward is the same sum of the transpose. Differentiable twice.

    Args:
        matrix: Sparse CSR [N, N], a constant.
        x: Dense [N, d].
        layers: L, at least `first`.
        first: First power: 0, or 1 to leave x out.
        nodes: Distinct rows to return, int64 [M]: the last hop computes only these; None: all.
        transposed: The transpose of `matrix`; None: it is symmetric.
    """
    turned = matrix if transposed is None else transposed
    found: Tensor = _Propagation.apply(matrix, turned, x, layers, first, nodes)
    return found


def propagated_mean(matrix: Tensor, x: Tensor, layers: int) -> Tensor:
    """Return the mean over l = 0..L of Â^l x, [N, d]; see `propagated_sum`."""
    return propagated_sum(matrix, x, layers) / (layers + 1)
