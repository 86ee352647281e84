"""How alike two models are: output distributions and representations, on the same examples."""

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import rel_entr

from mmforget.metrics.signals import Floats


def js_divergence(p: ArrayLike, q: ArrayLike, reference: bool = False) -> Floats:
    """Return Jensen-Shannon divergences in nats, [N, ..., C] twice -> [N, ...], in [0, ln 2].

    Args:
        p: Probabilities.
        q: Probabilities.
        reference: The form published with Bad Teacher (arXiv 2205.08096): KL arguments reversed
            (KL(m‖p) for KL(p‖m)) and the mean, not the sum, over classes. It is C times or more
            too small, and infinite where a probability is zero.
    """
    a, b = np.asarray(p, dtype=np.float64), np.asarray(q, dtype=np.float64)
    middle = (a + b) / 2
    if reference:
        return np.asarray((rel_entr(middle, a) + rel_entr(middle, b)).mean(axis=-1) / 2)
    return np.asarray((rel_entr(a, middle) + rel_entr(b, middle)).sum(axis=-1) / 2)


def zrf(p: ArrayLike, random: ArrayLike, reference: bool = False) -> float:
    """Return ZRF = 1 - mean JS divergence to a randomly initialised model (arXiv 2205.08096).

    Args:
        p: Probabilities on the forget set.
        random: Those of the random model.
        reference: Use the published JS divergence, which presses ZRF towards 1.
    """
    return float(1 - js_divergence(p, random, reference).mean())


def activation_distance(p: ArrayLike, q: ArrayLike) -> Floats:
    """Return ‖p - q‖₂ of probability vectors, [N, ...] twice -> [N] (arXiv 2205.08096)."""
    difference = np.asarray(p, dtype=np.float64) - np.asarray(q, dtype=np.float64)
    return np.asarray(np.linalg.norm(difference.reshape(len(difference), -1), axis=1))


def linear_cka(x: ArrayLike, y: ArrayLike) -> float:
    """Return linear CKA of two sets of features of the same examples, in [0, 1].

    ‖Ycᵀ Xc‖_F² / (‖Xcᵀ Xc‖_F ‖Ycᵀ Yc‖_F) (Kornblith et al., arXiv 1905.00414, equation 3). It is
    biased upwards when there are fewer examples than features.

    Args:
        x: [N, D].
        y: [N, E].

    Returns:
        NaN when a representation is constant over the examples.
    """
    a, b = _centred(x), _centred(y)
    if len(a) < max(a.shape[1], b.shape[1]):
        k, m = a @ a.T, b @ b.T
        return _ratio(_dot(k, m), _dot(k, k), _dot(m, m))
    cross, k, m = a.T @ b, a.T @ a, b.T @ b
    return _ratio(_dot(cross, cross), _dot(k, k), _dot(m, m))


def rbf_cka(x: ArrayLike, y: ArrayLike) -> float:
    """Return CKA with Gaussian kernels exp(-d² / (2σ²)), σ² the median non-zero d², in [0, 1].

    Builds two [N, N] matrices. Arguments and NaN as for `linear_cka`.
    """
    k, m = _doubly_centred(_rbf(x)), _doubly_centred(_rbf(y))
    return _ratio(_dot(k, m), _dot(k, k), _dot(m, m))


def unbiased_cka(x: ArrayLike, y: ArrayLike, batch: int = 512) -> float:
    """Return linear CKA from unbiased HSIC, averaged over minibatches, at most 1.

    HSIC₁ of Song et al. (JMLR 2012, equation 5), summed over batches before the ratio is taken
    (Nguyen et al., arXiv 2010.15327): near 0 for unrelated features whatever N, where the biased
    form is not; it may fall below 0.

    Args:
        x: [N, D].
        y: [N, E].
        batch: Fewest examples in a minibatch; each takes every k-th example.

    Returns:
        NaN when N < 4 or a representation is constant.
    """
    a, b = _centred(x), _centred(y)
    if len(a) < 4:
        return math.nan
    cross = own_x = own_y = 0.0
    stride = max(1, len(a) // max(batch, 4))
    for start in range(stride):
        k, m = (_hollow(part[start::stride] @ part[start::stride].T) for part in (a, b))
        cross += _hsic1(k, m)
        own_x += _hsic1(k, k)
        own_y += _hsic1(m, m)
    return _ratio(cross, own_x, own_y)


def _centred(x: ArrayLike) -> Floats:
    features = np.asarray(x, dtype=np.float64)
    features = features.reshape(len(features), -1)
    return np.asarray(features - features.mean(axis=0))


def _ratio(cross: float, own_x: float, own_y: float) -> float:
    scale = math.sqrt(max(own_x, 0.0)) * math.sqrt(max(own_y, 0.0))
    return cross / scale if scale > 0 else math.nan


def _dot(a: Floats, b: Floats) -> float:
    return float(np.vdot(a, b))


def _rbf(x: ArrayLike) -> Floats:
    features = _centred(x)
    gram = features @ features.T
    squares = np.diag(gram)
    distance = np.maximum(squares[:, None] + squares - 2 * gram, 0.0)
    np.fill_diagonal(distance, 0.0)
    apart = distance[distance > 0]
    return np.exp(-distance / (2 * np.median(apart))) if apart.size else np.ones_like(distance)


def _doubly_centred(kernel: Floats) -> Floats:
    rows = kernel.mean(axis=0)
    return np.asarray(kernel - rows - rows[:, None] + rows.mean())


def _hollow(kernel: Floats) -> Floats:
    np.fill_diagonal(kernel, 0.0)
    return kernel


def _hsic1(k: Floats, m: Floats) -> float:
    """Return unbiased HSIC of two kernels with zero diagonals, [n, n] each."""
    n = len(k)
    sums_k, sums_m = k.sum(axis=0), m.sum(axis=0)
    total = _dot(k, m) + sums_k.sum() * sums_m.sum() / ((n - 1) * (n - 2))
    return float((total - 2 * sums_k @ sums_m / (n - 2)) / (n * (n - 3)))
