import copy
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from mmforget.recsys.graph import (
    Graph,
    csr,
    product,
    propagated_mean,
    propagated_sum,
    rows_product,
    sparse_product,
    symmetric_product,
)

USERS, ITEMS = 7, 9


def make_graph(seed: int = 0, density: float = 0.3) -> Graph:
    """Return a random graph in which the last user and the first item have no edge."""
    on = np.random.default_rng(seed).random((USERS, ITEMS)) < density
    on[-1], on[:, 0] = False, False
    return Graph(USERS, ITEMS, *np.nonzero(on))


def dense(graph: Graph, kept: Tensor | None = None) -> Tensor:
    on = torch.ones(len(graph), dtype=torch.bool) if kept is None else kept
    matrix = torch.zeros(graph.nodes, graph.nodes, dtype=torch.float64)
    user, item = graph.user[on], graph.item[on] + graph.users
    matrix[user, item] = 1.0
    matrix = matrix + matrix.T
    scale = matrix.sum(1).clamp(min=1e-30).rsqrt() * (matrix.sum(1) > 0)
    return scale[:, None] * matrix * scale


def powers(matrix: Tensor, layers: int, first: int = 0) -> Tensor:
    found = [torch.linalg.matrix_power(matrix, hop) for hop in range(first, layers + 1)]
    return torch.stack(found).sum(0)


def some_kept(graph: Graph, seed: int = 1) -> Tensor:
    kept = torch.rand(len(graph), generator=torch.Generator().manual_seed(seed)) < 0.6
    kept[graph.item == int(graph.item[0])] = False  # an item loses everything
    return kept


def test_edges_must_be_sorted_and_single() -> None:
    for user, item in (([0, 0], [1, 1]), ([0, 0], [2, 1]), ([1, 0], [0, 0])):
        with pytest.raises(ValueError, match="sorted"):
            Graph(3, 3, np.array(user), np.array(item))


@pytest.mark.parametrize("all_kept", [True, False])
def test_adjacency_is_the_closed_form(all_kept: bool) -> None:
    graph = make_graph()
    kept = None if all_kept else some_kept(graph)
    found = graph.adjacency(kept)
    assert found.col_indices().dtype == found.crow_indices().dtype == torch.int32
    assert found.values().numel() == 2 * (len(graph) if kept is None else int(kept.sum()))
    torch.testing.assert_close(found.to_dense().double(), dense(graph, kept))
    assert found.to_dense()[USERS - 1].abs().sum() == 0  # no NaN where there is no edge
    block, turned = graph.block(kept)
    assert torch.equal(block.to_dense(), found.to_dense()[:USERS, USERS:])
    assert torch.equal(turned.to_dense(), block.to_dense().T)


def test_dropping_edges_is_rebuilding_the_graph() -> None:
    graph = make_graph()
    kept = some_kept(graph)
    rebuilt = Graph(USERS, ITEMS, graph.user[kept].numpy(), graph.item[kept].numpy())
    ours, theirs = graph.adjacency(kept), rebuilt.adjacency()
    for part in ("crow_indices", "col_indices", "values"):
        assert torch.equal(getattr(ours, part)(), getattr(theirs, part)())
    assert torch.equal(graph.degrees(kept)[0], rebuilt.degree_user)
    assert torch.equal(graph.degrees(kept)[1], rebuilt.degree_item)
    view = graph.weighted(graph.weights(kept))
    assert torch.equal(view.to_dense(), theirs.to_dense())
    assert view.values().numel() == 2 * len(graph)


def test_a_view_may_have_two_directions() -> None:
    graph = make_graph()
    straight, turned = torch.rand(2, len(graph)).unbind()
    found = graph.weighted(straight, turned).to_dense()
    assert torch.equal(found[graph.user, USERS + graph.item], straight)
    assert torch.equal(found[USERS + graph.item, graph.user], turned)


def test_a_graph_without_edges_propagates_nothing() -> None:
    graph = Graph(2, 3, np.zeros(0, np.int64), np.zeros(0, np.int64))
    x = torch.randn(5, 4, requires_grad=True)
    propagated_mean(graph.adjacency(), x, 3).sum().backward()
    torch.testing.assert_close(propagated_mean(graph.adjacency(), x, 3), x / 4)
    torch.testing.assert_close(x.grad, torch.full_like(x, 0.25))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 5, 64])
def test_the_product_is_the_product(dtype: torch.dtype, width: int) -> None:
    graph = make_graph()
    matrix = graph.adjacency(some_kept(graph))
    x = torch.randn(graph.nodes, width, dtype=dtype)
    wanted = matrix.to_dense().to(dtype) @ x
    torch.testing.assert_close(sparse_product(matrix, x), wanted)
    torch.testing.assert_close(sparse_product(matrix, x.T.contiguous().T), wanted)  # strided
    nodes = torch.tensor([USERS - 1, 3, 12, 0])
    torch.testing.assert_close(rows_product(matrix, x, nodes), wanted[nodes])


@pytest.mark.parametrize("layers, first", [(0, 0), (1, 0), (1, 1), (2, 1), (3, 0), (4, 1)])
@pytest.mark.parametrize("nodes", [None, [2, 0, 15, USERS - 1]])
def test_propagation_and_its_gradient_are_closed_forms(
    layers: int, first: int, nodes: list[int] | None
) -> None:
    graph = make_graph()
    rows = slice(None) if nodes is None else torch.tensor(nodes)
    chosen = None if nodes is None else torch.tensor(nodes)
    x = torch.randn(graph.nodes, 6, requires_grad=True)
    wanted = powers(dense(graph), layers, first).float()
    found = propagated_sum(graph.adjacency(), x, layers, first, chosen)
    torch.testing.assert_close(found, (wanted @ x)[rows])
    weight = torch.randn_like(found)
    (ours,) = torch.autograd.grad((found * weight).sum(), x)
    (theirs,) = torch.autograd.grad(((wanted @ x)[rows] * weight).sum(), x)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(x, x.detach().clone())  # nothing was added in place


def test_a_propagation_over_a_directed_graph_has_the_transpose_as_its_gradient() -> None:
    graph = make_graph()
    straight, turned = torch.rand(2, len(graph)).unbind()
    matrix, back = graph.weighted(straight, turned), graph.weighted(turned, straight)
    x = torch.randn(graph.nodes, 3, requires_grad=True)
    found = propagated_sum(matrix, x, 3, transposed=back)
    wanted = powers(matrix.to_dense(), 3)
    torch.testing.assert_close(found, wanted @ x)
    weight = torch.randn_like(found)
    (ours,) = torch.autograd.grad((found * weight).sum(), x)
    torch.testing.assert_close(ours, wanted.T @ weight)


def test_second_derivatives_go_through_products() -> None:
    graph = make_graph(density=0.5)
    kept = some_kept(graph)

    def double(matrix: Tensor) -> Tensor:
        rows, columns = matrix.crow_indices(), matrix.col_indices()
        return csr(rows, columns, matrix.values().double(), tuple(matrix.shape))

    matrix = double(graph.adjacency(kept))
    block, turned = (double(part) for part in graph.block(kept))
    x = torch.randn(graph.nodes, 2, dtype=torch.float64, requires_grad=True)
    y = torch.randn(ITEMS, 2, dtype=torch.float64, requires_grad=True)
    nodes = torch.tensor([1, 9, 4])
    for function, at in (
        (lambda t: symmetric_product(matrix, t).pow(3), x),
        (lambda t: propagated_sum(matrix, t, 2).pow(3), x),
        (lambda t: propagated_sum(matrix, t, 2, 1, nodes).pow(3), x),
        (lambda t: product(block, turned, t).pow(3), y),
    ):
        assert torch.autograd.gradcheck(function, at)
        assert torch.autograd.gradgradcheck(function, at)


def test_a_hessian_vector_product_is_the_dense_one() -> None:
    graph = make_graph(density=0.5)
    matrix, wanted = graph.adjacency(), dense(graph).float()
    x, v = torch.randn(2, graph.nodes, 3).unbind()

    def loss(final: Tensor) -> Tensor:
        return torch.nn.functional.softplus(final[:USERS] @ final[USERS:].T).sum()

    _, ours = torch.autograd.functional.vhp(lambda t: loss(propagated_mean(matrix, t, 2)), x, v)
    theirs = torch.autograd.functional.vhp(lambda t: loss(powers(wanted, 2) @ t / 3), x, v)[1]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_copies_share_the_graph() -> None:
    graph = make_graph()
    assert copy.deepcopy({"graph": graph})["graph"] is graph


def test_making_a_matrix_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_graph().adjacency()
