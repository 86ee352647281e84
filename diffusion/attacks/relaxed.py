"""Optimisers over prompt tokens: relaxed one-hot rows, hard prompts, and Adam a prompt at a time.

UnlearnDiffAtk (Zhang et al., ECCV 2024, arXiv 2310.11868) moves a row of weights over the
vocabulary for each adversarial token: it draws a token of the row, takes the gradient on the
one-hot as if the draw was not there, steps, and projects the row back on the simplex. PEZ (Wen et
al., NeurIPS 2023, arXiv 2302.03668), which P4D builds on, moves a point in the space of token
embeddings by the gradient at the token nearest to it. Everything here is batched over prompts,
tokens and vocabulary, and waits for the device at most once a call.
"""

import math
from collections.abc import Sequence
from functools import reduce

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mmforget.errors import ConfigError, DataError
from mmforget.types import full

ON_SIMPLEX = 1e-5  # a row is on it if its clipped entries sum to 1 within this


def _precise(values: Tensor) -> torch.dtype:
    """Return the type to sum a vocabulary in: float64, except on a device that has none."""
    return torch.float32 if values.device.type == "mps" else torch.float64


def project_simplex(rows: Tensor, xi: float | None = None) -> Tensor:
    """Return the nearest rows of entries of at least 0 that sum to 1.

    The exact projection max(a - τ, 0), from one sort and one cumulated sum (Held et al., 1974;
    Duchi et al., ICML 2008). As in the published code, a row that is on the simplex already (its
    entries clipped to [0, 1] sum to 1 within 1e-5) is clipped and not moved. Sums are float64, as
    float32 steps of τ add up to more than 1e-5 over a vocabulary of 49408.

    Args:
        rows: [..., V], any finite numbers; half precision becomes float32.
        xi: None: exact. Otherwise bisect for τ as the published code does, and stop where it stops,
            at a bracket of at most `xi` (1e-5 there), so that entries are off by up to that.

    Raises:
        ConfigError: `xi` is not positive.
    """
    wide = full(rows) if xi is not None else full(rows).to(_precise(rows))
    clipped = wide.clamp(0, 1)
    on = (clipped.sum(dim=-1, keepdim=True) - 1).abs() <= ON_SIMPLEX
    shift = _exact_shift(wide) if xi is None else _bisected_shift(wide, xi)
    return torch.where(on, clipped, (wide - shift).clamp(0, 1)).to(full(rows).dtype)


def _exact_shift(rows: Tensor) -> Tensor:
    """Return τ with Σ max(a - τ, 0) = 1 for each row, [..., 1]."""
    falling = _falling(rows)
    excess = falling.cumsum(dim=-1) - 1
    count = torch.arange(1, rows.shape[-1] + 1, device=rows.device, dtype=rows.dtype)
    # The positive entries are the largest ones; at least one, whatever rounding or NaN say.
    kept = (falling * count > excess).sum(dim=-1, keepdim=True).clamp(min=1)
    return excess.gather(-1, kept - 1) / kept


def _falling(rows: Tensor) -> Tensor:
    """Return each row from its largest entry down; NumPy sorts a vocabulary ten times as fast."""
    if rows.device.type != "cpu":
        return rows.sort(dim=-1, descending=True).values
    return torch.from_numpy(np.sort(rows.detach().numpy(), axis=-1)).flip(-1)


def _bisected_shift(rows: Tensor, xi: float) -> Tensor:
    """Return τ for each row as the published bisection finds it, [..., 1].

    Sums have the type of the rows, as there: a sum that float32 rounds to 1 ends it early.
    """
    if xi <= 0:
        raise ConfigError(f"bisection stops at a bracket of xi={xi}: give a positive number")
    low = (rows.amin(dim=-1, keepdim=True) - 1).to(_precise(rows))
    high = rows.amax(dim=-1, keepdim=True).to(low)
    shift = (low + high) / 2
    widest = float((high - low).max()) if rows.numel() else 0.0
    for _ in range(math.ceil(math.log2(max(1.0, widest / xi)))):
        # A row whose bracket is small enough keeps its last midpoint.
        shift = torch.where(high - low > xi, (low + high) / 2, shift)
        over = (rows - shift.to(rows)).clamp(0, 1).sum(dim=-1, keepdim=True) - 1
        low = torch.where(over >= 0, shift, low)
        high = torch.where(over <= 0, shift, high)
    return shift.to(rows)


def sample_rows(rows: Tensor, uniform: Tensor) -> Tensor:
    """Return an index drawn from each row by the inverse of its distribution function, [...].

    Equal uniforms give equal draws, so prompts with generators of their own can share a batch.
    An index of probability 0 is never drawn, however sums are rounded.

    Args:
        rows: Probabilities up to a factor, [..., V], at least 0.
        uniform: Numbers in [0, 1), [...].

    Raises:
        DataError: The shapes do not fit, or a row has no positive entry or one that is not finite.
    """
    if rows.shape[:-1] != uniform.shape or not rows.shape[-1]:
        raise DataError(
            f"rows {list(rows.shape)} and uniform numbers {list(uniform.shape)} do not fit: give "
            f"one number for each row"
        )
    positive = rows > 0
    reached = full(rows).to(_precise(rows)).cumsum(dim=-1).where(positive, 0)
    total = reached.amax(dim=-1, keepdim=True)
    if not bool((torch.isfinite(total) & (total > 0)).all()):
        raise DataError(
            "rows to draw from need a positive entry and only finite ones; project them on the "
            "simplex first, and look for a loss that is not finite"
        )
    below = torch.nextafter(total, torch.zeros_like(total))
    wanted = torch.minimum(uniform.to(total)[..., None] * total, below)
    return (reached > wanted).to(torch.uint8).argmax(dim=-1)  # of equal ones argmax is the first


def clamped(upstream: Tensor) -> Tensor:
    """Return the gradient on relaxed rows, given the one on the drawn one-hot rows.

    The published straight-through estimator passes the gradient through the draw, clipped to
    [-1, 1] (hardtanh).

    Args:
        upstream: [..., V].
    """
    return upstream.clamp(-1, 1)


def straight_through(*parts: tuple[Tensor, Tensor]) -> Tensor:
    """Return the gradient on relaxed rows, [..., V], given that on the drawn tokens' embeddings.

    The embedding of a one-hot row h is h·E, so its gradient g becomes g·Eᵀ on h, which `clamped`
    passes on. Encoders that read the same tokens by tables of their own (SDXL) add up before that.

    Args:
        parts: For each table the gradient [..., D] and the table [V, D]; D may differ, V may not.

    Raises:
        ConfigError: There is no part, or the tables differ in length.
    """
    if len({len(table) for _, table in parts}) != 1:
        raise ConfigError(
            f"gradients on {[len(table) for _, table in parts]} tokens do not add up: give one or "
            f"more pairs (gradient, table) over the same vocabulary"
        )
    return clamped(reduce(torch.add, (full(grad) @ full(table).T for grad, table in parts)))


class RowAdam:
    """Adam over rows (prompts) that have step counts of their own.

    Each row goes as under a `torch.optim.Adam` of its own, started when the row was last reset: a
    slot of a batch can be given to another prompt while the others go on.

    Args:
        like: The rows, [P, ...]; gives shape, type (half precision becomes float32) and device.
        lr: Learning rate.
        weight_decay: Added to the gradient times the values (L2, as UnlearnDiffAtk has it), or with
            `decoupled` taken off the values times `lr` (AdamW, as P4D has it).
        betas: Decay of the running mean of the gradient and of its square, in [0, 1).
        eps: Added to the root of the latter.
        decoupled: See `weight_decay`.
        sign: Step on the gradient's sign (AdvUnlearn's `fast_at`).

    Raises:
        ConfigError: A number is out of range.
    """

    def __init__(
        self,
        like: Tensor,
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        decoupled: bool = False,
        sign: bool = False,
    ) -> None:
        if min(lr, weight_decay, eps) < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ConfigError(
                f"lr={lr}, weight_decay={weight_decay}, eps={eps} and betas={betas}: the first "
                f"three are at least 0, betas in [0, 1)"
            )
        self.lr, self.weight_decay, self.betas, self.eps = lr, weight_decay, betas, eps
        self.decoupled, self.sign = decoupled, sign
        self._mean = torch.zeros_like(full(like.detach()))
        self._square = torch.zeros_like(self._mean)
        # Held by the CPU: their powers need float64, and no step has to wait for the device.
        self._steps = torch.zeros(len(like), dtype=torch.float64)

    @torch.no_grad()
    def step(
        self, values: Tensor, grad: Tensor, rows: Sequence[int] | Tensor | None = None
    ) -> Tensor:
        """Return the values after one step; the ones given stay as they are.

        Args:
            values: [R, ...].
            grad: Gradient of what is minimised, [R, ...].
            rows: Which of the P rows they are, all different, on the CPU; None: all, in order.

        Raises:
            ConfigError: The shapes do not fit the rows.
        """
        here = torch.arange(len(self._steps)) if rows is None else _places(rows)
        shape = (len(here), *self._mean.shape[1:])
        if values.shape != shape or grad.shape != shape:
            raise ConfigError(
                f"values {list(values.shape)} and gradients {list(grad.shape)} of {len(here)} rows "
                f"must both be {list(shape)}"
            )
        there = here.to(self._mean.device)
        now, slope = values.to(self._mean), grad.to(self._mean)
        if self.sign:
            slope = slope.sign()
        if self.decoupled:
            now = now * (1 - self.lr * self.weight_decay)
        else:
            slope = slope + self.weight_decay * now
        first, second = self.betas
        mean = self._mean[there].lerp_(slope, 1 - first)
        square = self._square[there].mul_(second).addcmul_(slope, slope, value=1 - second)
        self._mean[there], self._square[there] = mean, square
        self._steps[here] += 1
        count = self._steps[here].reshape(-1, *[1] * (values.ndim - 1))
        size = (self.lr / (1 - first**count)).to(mean)
        root = (1 - second**count).sqrt().to(mean)
        return (now - size * mean / (square.sqrt() / root + self.eps)).to(values.dtype)

    def reset(self, rows: Sequence[int] | Tensor) -> None:
        """Forget what rows have been through, for slots that were given to other prompts.

        Args:
            rows: Which of the P rows, on the CPU.
        """
        here = _places(rows)
        there = here.to(self._mean.device)
        self._mean[there], self._square[there], self._steps[here] = 0.0, 0.0, 0.0


def _places(rows: Sequence[int] | Tensor) -> Tensor:
    return torch.as_tensor(rows, dtype=torch.int64)


class Vocabulary:
    """The token embeddings of an encoder, and their directions, computed once.

    Args:
        table: [V, D].
    """

    def __init__(self, table: Tensor) -> None:
        self.table = table.detach()
        self.unit = functional.normalize(full(self.table), dim=-1)


@torch.no_grad()
def nearest_tokens(embeds: Tensor, vocabulary: Vocabulary | Tensor) -> Tensor:
    """Return the ids of the tokens whose embeddings have the largest cosine with points, [...].

    Not the ones at the smallest distance, which are others. Of equal ones the first.

    Args:
        embeds: [..., D].
        vocabulary: A `Vocabulary`, or its table [V, D], whose rows are then normalised anew.
    """
    known = vocabulary if isinstance(vocabulary, Vocabulary) else Vocabulary(vocabulary)
    cosine = functional.normalize(full(embeds), dim=-1) @ known.unit.T
    return cosine.argmax(dim=-1)


def timesteps(total: int = 1000, count: int = 50) -> list[int]:
    """Return the diffusion steps that an attack goes through, least noise first.

    From T//n//2 on in strides of T//n: 10, 30, ..., 990 for 50 of 1000.

    Args:
        total: T, steps of the training schedule.
        count: n, from 1 to T.

    Raises:
        ConfigError: There are not that many steps.
    """
    if not 1 <= count <= total:
        raise ConfigError(f"{count} timesteps of {total}: give from 1 to {total}")
    stride = total // count
    return list(range(stride // 2, total, stride))[:count]
