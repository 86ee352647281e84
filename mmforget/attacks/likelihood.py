"""Membership scores calibrated per example by shadow models: LiRA, RMIA and their cheap forms.

Signals are arrays [N, M]: N examples, M shadow models; a NaN is a model that does not count for
that example. Larger signals and larger scores mean more member-like.
"""

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import norm

from mmforget.metrics.signals import Floats

_SIGMA_FLOOR = 1e-30


def lira_online(
    target: ArrayLike,
    inside: ArrayLike,
    outside: ArrayLike,
    fixed_variance: bool = False,
    reference: bool = False,
) -> Floats:
    """Return log N(φ; μ_in, σ_in) - log N(φ; μ_out, σ_out), [N] (arXiv 2112.03570, section V).

    Centres are medians over shadow models.

    Args:
        target: φ of each example under the attacked model, [N].
        inside: φ under models trained with the example, [N, M].
        outside: φ under models trained without it, [N, K].
        fixed_variance: One σ_in and one σ_out for all examples; better below about 64 models.
        reference: With `fixed_variance`, the published σ: over the whole matrix, so that the
            spread between examples counts as spread between models. Default: around each
            example's own centre.
    """
    phi = np.asarray(target, dtype=np.float64)
    densities = [
        norm.logpdf(phi, *gaussian(signals, fixed_variance, reference))
        for signals in (inside, outside)
    ]
    return np.asarray(densities[0] - densities[1])


def lira_offline(target: ArrayLike, outside: ArrayLike, fixed_variance: bool = False) -> Floats:
    """Return -log(1 - Φ((φ - μ_out) / σ_out)), [N]: one-sided, from models without x only.

    The published score is Φ itself, which is `1 - exp(-score)` and equals 1 in floating point
    from 8 σ on; the logarithm keeps those examples apart.

    Args:
        target: φ under the attacked model, [N].
        outside: φ under models trained without the example, [N, K].
        fixed_variance: One σ_out for all examples, around each one's own centre.
    """
    centre, spread = gaussian(outside, fixed_variance)
    return np.asarray(-norm.logsf((np.asarray(target, dtype=np.float64) - centre) / spread))


def gaussian(
    signals: ArrayLike, fixed_variance: bool, reference: bool = False
) -> tuple[Floats, Floats]:
    """Return the median over models and the standard deviation (ddof 0), [N, M] -> [N] each.

    Arguments as for `lira_online`.
    """
    values = np.asarray(signals, dtype=np.float64)
    centre = np.nanmedian(values, axis=1)
    if not fixed_variance:
        spread = np.nanstd(values, axis=1)
    elif reference:
        spread = np.full(len(values), np.nanstd(values))
    else:
        residual = values - np.nanmean(values, axis=1, keepdims=True)
        spread = np.full(len(values), math.sqrt(float(np.nanmean(residual**2))))
    return np.asarray(centre), np.asarray(spread + _SIGMA_FLOOR)


def calibrated(target: ArrayLike, outside: ArrayLike, inside: ArrayLike | None = None) -> Floats:
    """Return φ - median_out, or with `inside` φ - (median_in + median_out) / 2, [N]."""
    difficulty = np.nanmedian(np.asarray(outside, dtype=np.float64), axis=1)
    if inside is not None:
        difficulty = (difficulty + np.nanmedian(np.asarray(inside, dtype=np.float64), axis=1)) / 2
    return np.asarray(np.asarray(target, dtype=np.float64) - difficulty)


def rmia(
    target: ArrayLike,
    expected: ArrayLike,
    population: ArrayLike,
    population_expected: ArrayLike,
    gamma: float = 2.0,
) -> Floats:
    """Return Pr_z[ratio_x / ratio_z > γ], ratio = p_θ / p, [N] in [0, 1] (arXiv 2312.03262).

    Args:
        target: Confidence in the true class of each x under the attacked model, p_θ(x), [N].
        expected: p(x) from `expected_online` or `expected_offline`, [N].
        population: p_θ(z) of the comparison points, [Z].
        population_expected: p(z), [Z]. TDDBench takes the online form even in offline attacks.
        gamma: Threshold, strict.
    """
    x, z = _ratio(target, expected), _ratio(population, population_expected)
    return np.asarray(np.searchsorted(np.sort(gamma * z), x, side="left") / len(z))


def expected_online(inside: ArrayLike, outside: ArrayLike) -> Floats:
    """Return p(x), the mean of the mean confidences with and without x, [N, M] twice -> [N]."""
    return (_mean(inside) + _mean(outside)) / 2


def expected_offline(outside: ArrayLike, scale: float) -> Floats:
    """Return p(x) guessed from models without x: ((1 + a)·mean + 1 - a) / 2, [N, K] -> [N].

    Args:
        outside: Confidences under models trained without x.
        scale: a in [0, 1]; published: .3 for CIFAR-10, .6 for CIFAR-100, 1 for ImageNet.
    """
    return ((1 + scale) * _mean(outside) + 1 - scale) / 2


def _mean(confidence: ArrayLike) -> Floats:
    return np.asarray(np.nanmean(np.asarray(confidence, dtype=np.float64), axis=1))


def _ratio(target: ArrayLike, expected: ArrayLike) -> Floats:
    return np.asarray(target, dtype=np.float64) / np.maximum(expected, 1e-300)
