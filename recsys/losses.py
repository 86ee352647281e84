"""What recommenders minimise: BPR forwards and backwards, contrast of two views, forms of L2."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mmforget.errors import ConfigError

CONTRASTS = ("unique", "batch", "all", "sum")
CELLS = 16_000_000  # scores held at once: 64 MB


def bpr(positive: Tensor, negative: Tensor) -> Tensor:
    """Return softplus(s_neg - s_pos) = -log σ(s_pos - s_neg), elementwise (arXiv 1205.2618).

    Args:
        positive: Scores of the chosen items, any shape.
        negative: Scores of other items, of a shape that broadcasts with it.
    """
    return F.softplus(negative - positive)


def reverse_bpr(positive: Tensor, negative: Tensor) -> Tensor:
    """Return softplus(s_pos - s_neg): ranks the chosen item below the other (arXiv 2405.15328).

    Bounded below, and its gradient σ(s_pos - s_neg) fades once the chosen item is the lower one,
    unlike gradient ascent on BPR.

    Args:
        positive: Scores of the items to forget, any shape.
        negative: Scores of other items, of a shape that broadcasts with it.
    """
    return bpr(negative, positive)


def half_squared(*rows: Tensor) -> Tensor:
    """Return ½·Σ|row|² / B, the L2 term of LightGCN-PyTorch.

    Args:
        rows: Vectors of a batch, the first [B, d], others [B, d] or [B, n, d].
    """
    return 0.5 * _squares(rows) / len(rows[0])


def embedding_norm(*rows: Tensor) -> Tensor:
    """Return Σ‖rows‖_F / B: norms that are NOT squared, MMRec's EmbLoss.

    It shrinks with the batch as 1/√B, so a weight belongs to a batch size.

    Args:
        rows: Vectors of a batch, the first [B, d], others [B, d] or [B, n, d].
    """
    return torch.stack([torch.linalg.vector_norm(part) for part in rows]).sum() / len(rows[0])


def squared(tensors: Iterable[Tensor]) -> Tensor:
    """Return the sum of all squares, the L2 term of UnlearnRec and LightGCL: a sum, no mean."""
    return _squares(tensors)


def _squares(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack([part.square().sum() for part in tensors]).sum()


class _Partition(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, others: Tensor, size: int) -> Tensor:
        parts = [(part @ others.T).logsumexp(1) for part in torch.split(anchor, size)]
        found = torch.cat(parts)
        ctx.save_for_backward(anchor, others, found)
        ctx.size = size
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        anchor, others, found = ctx.saved_tensors
        to_anchor, to_others = torch.empty_like(anchor), torch.zeros_like(others)
        for start in range(0, len(anchor), ctx.size):
            rows = slice(start, start + ctx.size)
            share = (anchor[rows] @ others.T).sub_(found[rows, None]).exp_().mul_(grad[rows, None])
            to_anchor[rows] = share @ others
            to_others.addmm_(share.T, anchor[rows])
        return to_anchor, to_others, None


def log_partition(anchor: Tensor, others: Tensor, temperature: float) -> Tensor:
    """Return log Σ_k exp(a·o_k / τ) of each anchor, [B], without overflow.

    Where all scores would take more than 64 MB they are made in blocks, and again for the backward;
    second derivatives are then not to be had.

    Args:
        anchor: [B, d].
        others: [M, d].
        temperature: τ.
    """
    anchor = anchor / temperature
    size = max(1, CELLS // max(len(others), 1))
    if len(anchor) <= size:
        return (anchor @ others.T).logsumexp(1)
    found: Tensor = _Partition.apply(anchor, others, size)
    return found


def infonce(
    anchor: Tensor, others: Tensor, positive: Tensor | None = None, temperature: float = 0.2
) -> Tensor:
    """Return -log( exp(a·p/τ) / Σ_k exp(a·o_k/τ) ) of each anchor, cosine similarities, [B].

    The positive is one of `others`, so it stands in the denominator too.

    Args:
        anchor: Vectors of one view, [B, d]; rows of zeros are allowed.
        others: Vectors of the other view, [M, d].
        positive: Row of each anchor's positive among `others`, int64 [B]; None: its own row.
        temperature: τ.
    """
    anchor, others = F.normalize(anchor, dim=1), F.normalize(others, dim=1)
    matched = others if positive is None else others.index_select(0, positive)
    return log_partition(anchor, others, temperature) - (anchor * matched).sum(1) / temperature


def contrast(
    first: Tensor, second: Tensor, nodes: Tensor, temperature: float, form: str = "unique"
) -> Tensor:
    """Return the contrast of two views of the nodes of one type, a scalar.

    What public code calls InfoNCE differs in the denominator and the reduction:

    - `unique`: a batch's nodes once each, denominator over them, mean (SimGCL, SELFRec);
    - `batch`: repeats kept, denominator over the batch with its repeats, mean (UnlearnRec's SGL,
      MGCN);
    - `all`: repeats kept, denominator over all nodes of the type, mean (UnlearnRec's `infoNCE`);
    - `sum`: a batch's nodes once each, denominator over all nodes, SUM (SGL, arXiv 2010.10783,
      eq. 10, whose BPR is a sum as well).

    Args:
        first: All nodes of the type in one view, [M, d].
        second: The same in the other view, [M, d].
        nodes: Nodes of the batch, int64 [B].
        temperature: τ.
        form: One of the above.

    Raises:
        ConfigError: There is no such form.
    """
    if form not in CONTRASTS:
        raise ConfigError(f"contrast={form!r} is unknown; accepted: {', '.join(CONTRASTS)}")
    if form == "batch":
        anchor, others = first.index_select(0, nodes), second.index_select(0, nodes)
        return infonce(anchor, others, None, temperature).mean()
    # Repeats of a node have equal values: each is computed once.
    unique, place = torch.unique(nodes, return_inverse=True)
    anchor = first.index_select(0, unique)
    if form == "unique":
        return infonce(anchor, second.index_select(0, unique), None, temperature).mean()
    values = infonce(anchor, second, unique, temperature)
    return values.sum() if form == "sum" else values.index_select(0, place).mean()


def type_contrast(
    first: Tensor,
    second: Tensor,
    users: int,
    user: Tensor,
    item: Tensor,
    temperature: float,
    form: str,
) -> Tensor:
    """Return the contrast of a batch's users plus that of its items, a scalar.

    Args:
        first: All nodes in one view, users first, [N, d].
        second: The same in the other view, [N, d].
        users: Number of users.
        user: Users of the batch, int64 [B].
        item: Items of the batch, int64 [B].
        temperature: τ.
        form: As in `contrast`; "sum" is divided by B, as BPR is a mean here.
    """
    value = contrast(first[:users], second[:users], user, temperature, form)
    value = value + contrast(first[users:], second[users:], item, temperature, form)
    return value / len(user) if form == "sum" else value


def svd_contrast(view: Tensor, main: Tensor, nodes: Tensor, temperature: float) -> Tensor:
    """Return LightGCL's contrast of the nodes of one type (arXiv 2302.08191), a scalar.

    mean log(Σ_k exp(g·e_k/τ) + 1e-8) - mean clamp(g·e/τ, -5, 5): inner products, NOT cosines, all
    nodes in the denominator, and the positive is bounded, so the loss may be negative.

    Args:
        view: All nodes of the type in the SVD view, [M, d].
        main: The same after propagation, [M, d].
        nodes: Nodes of the batch with repeats, int64 [B].
        temperature: τ.
    """
    unique, place = torch.unique(nodes, return_inverse=True)  # repeats have equal values
    anchor = view.index_select(0, unique)
    total = log_partition(anchor, main, temperature)
    floor = torch.full_like(total, math.log(1e-8))
    matched = (anchor * main.index_select(0, unique)).sum(1) / temperature
    values = torch.logaddexp(total, floor) - matched.clamp(-5.0, 5.0)
    return values.index_select(0, place).mean()
