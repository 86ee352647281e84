"""Distances between sets of images, as maths on their features: FID, KID and CMMD.

A value means something only beside the features it was computed from: see `convention`.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mmforget.errors import DataError
from mmforget.rng import generator

BLOCK = 2048  # rows of a kernel matrix held at a time

FORMULAS = {
    "fid": "FID, covariances with N-1",
    "kid": "KID, (x·y/d + 1)^3, unbiased",
    "cmmd": "CMMD, RBF sigma 10 on L2-normalised features, biased, x1000",
}


def convention(metric: str, features: str, first: int, second: int) -> str:
    """Return a line that says what a distance was computed from.

    Args:
        metric: "fid", "kid" or "cmmd".
        features: Name of the extractor.
        first: Images in the first set.
        second: Images in the second.
    """
    return f"{FORMULAS[metric]}; features: {features}; {first} and {second} images"


class Moments:
    """Mean and covariance of features that come in batches, in float64.

    A set of images never has to be in memory: 2048 features take 32 MiB, however many the images.
    Sums are merged about the batches' own means (Chan et al. 1979), so that nothing cancels.
    """

    def __init__(self) -> None:
        self.n = 0
        self._mean: Tensor | None = None
        self._scatter: Tensor | None = None

    def update(self, features: Tensor) -> "Moments":
        """Add a batch of features [B, D] and return itself.

        Raises:
            DataError: They are no finite matrix of the width seen before.
        """
        rows = _rows(features, "features")
        if self._mean is not None and rows.shape[1] != len(self._mean):
            raise DataError(f"features are {rows.shape[1]} wide, earlier ones {len(self._mean)}")
        if len(rows):
            mean = rows.mean(dim=0)
            centred = rows - mean
            self._merge(len(rows), mean, centred.T @ centred)
        return self

    def merge(self, other: "Moments") -> "Moments":
        """Add what another one has seen and return itself."""
        if other._mean is not None and other._scatter is not None:
            if self._mean is not None and len(self._mean) != len(other._mean):
                raise DataError(f"features {len(other._mean)} and {len(self._mean)} wide")
            self._merge(other.n, other._mean, other._scatter)
        return self

    @property
    def mean(self) -> Tensor:
        """Mean, float64 [D]."""
        if self._mean is None:
            raise DataError("there are no features: the set has no images")
        return self._mean

    @property
    def covariance(self) -> Tensor:
        """Covariance with N-1, float64 [D, D]."""
        if self._scatter is None or self.n < 2:
            raise DataError(f"a covariance needs 2 images or more; the set has {self.n}")
        return self._scatter / (self.n - 1)

    def _merge(self, n: int, mean: Tensor, scatter: Tensor) -> None:
        if self._mean is None or self._scatter is None:
            self.n, self._mean, self._scatter = n, mean, scatter.clone()
            return
        total = self.n + n
        shift = mean.to(self._mean.device) - self._mean
        self._scatter += scatter.to(shift.device)
        self._scatter += torch.outer(shift, shift) * (self.n * n / total)
        self._mean = self._mean + shift * (n / total)
        self.n = total


def fid(first: Moments, second: Moments) -> float:
    """Return the Fréchet distance of two sets' moments (Heusel et al., NeurIPS 2017)."""
    return frechet(first.mean, first.covariance, second.mean, second.covariance)


def frechet(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """Return |m_a - m_b|² + Tr(S_a + S_b - 2 (S_a S_b)^(1/2)), at least 0.

    The trace of the root is the sum of the singular values of S_a^(1/2) S_b^(1/2), whose factors
    come from eigenvalues: all is real, and sets with fewer images than features are no exception.

    Args:
        mean_a: [D].
        cov_a: Positive semi-definite, [D, D].
        mean_b: [D].
        cov_b: Positive semi-definite, [D, D].
    """
    mean_a, mean_b = mean_a.double(), mean_b.double().to(mean_a.device)
    cov_a, cov_b = cov_a.double(), cov_b.double().to(cov_a.device)
    cross = torch.linalg.svdvals(_root(cov_a).T @ _root(cov_b)).sum()
    squared = (mean_a - mean_b).square().sum()
    return max(float(squared + cov_a.trace() + cov_b.trace() - 2 * cross), 0.0)


def _root(covariance: Tensor) -> Tensor:
    """Return R [D, rank] with R Rᵀ = the covariance."""
    values, vectors = torch.linalg.eigh(covariance)
    # What is below the rounding of the largest is noise, whose root would not be small.
    floor = values[-1].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
    keep = values > floor
    root: Tensor = vectors[:, keep] * values[keep].sqrt()
    return root


class Kid(NamedTuple):
    """A kernel distance.

    Attributes:
        value: The distance; near 0 for equal sets and then often negative, being unbiased.
        std: Its standard deviation over subsets; NaN without subsets.
    """

    value: float
    std: float


def kid(
    first: Tensor, second: Tensor, subsets: int = 0, subset_size: int = 1000, seed: int = 0
) -> Kid:
    """Return the kernel distance (Binkowski et al., ICLR 2018): unbiased MMD², (x·y/d + 1)³.

    Args:
        first: Features [N, D].
        second: Features [M, D].
        subsets: 0: one value of all images. Else the mean over this many random subsets of each
            set, as common implementations report (100 of 1,000).
        subset_size: Images in a subset.
        seed: Decides the subsets.

    Raises:
        DataError: A set has under 2 images, or fewer than a subset.
    """
    a, b = _pair(first, second, least=subset_size if subsets else 2)
    if not subsets:
        return Kid(_unbiased(a, b), float("nan"))
    values = []
    for number in range(subsets):
        draw = generator(seed, "kid", number)
        places = [torch.randperm(len(x), generator=draw)[:subset_size].to(x.device) for x in (a, b)]
        values.append(_unbiased(a[places[0]], b[places[1]]))
    found = torch.tensor(values, dtype=torch.float64)
    return Kid(float(found.mean()), float(found.std(correction=0)))


def cmmd(first: Tensor, second: Tensor, normalise: bool = True) -> float:
    """Return the CLIP distance (Jayasumana et al., CVPR 2024): biased MMD², RBF sigma 10, x1000.

    Args:
        first: CLIP embeddings [N, D], published with ViT-L/14 at 336 pixels.
        second: CLIP embeddings [M, D].
        normalise: Whether embeddings are first divided by their length, as published.

    Raises:
        DataError: A set is empty.
    """
    a, b = _pair(first, second, least=1)
    if normalise:
        a, b = (torch.nn.functional.normalize(x, dim=1) for x in (a, b))

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        squares = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1) - 2 * (x @ y.T)
        # The kernel less 1: the ones cancel between the means, and small distances keep digits.
        return torch.expm1(squares.clamp(min=0) / (-2 * 10.0**2))

    means = [_sum(kernel, x, y) / (len(x) * len(y)) for x, y in ((a, a), (b, b), (a, b))]
    return 1000 * (means[0] + means[1] - 2 * means[2])


def _unbiased(a: Tensor, b: Tensor) -> float:
    width = a.shape[1]

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / width + 1) ** 3

    def within(x: Tensor) -> float:
        diagonal = float((x.square().sum(dim=1) / width + 1).pow(3).sum())
        return (_sum(kernel, x, x) - diagonal) / (len(x) * (len(x) - 1))

    return within(a) + within(b) - 2 * _sum(kernel, a, b) / (len(a) * len(b))


def _sum(kernel: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> float:
    """Return the sum of a kernel matrix, of which one block at a time exists."""
    return sum(float(kernel(x, y).sum()) for x in _blocks(a) for y in _blocks(b))


def _blocks(rows: Tensor) -> Iterator[Tensor]:
    for start in range(0, len(rows), BLOCK):
        yield rows[start : start + BLOCK]


def _pair(first: Tensor, second: Tensor, least: int) -> tuple[Tensor, Tensor]:
    a, b = _rows(first, "first set"), _rows(second, "second set")
    b = b.to(a.device)
    if a.shape[1] != b.shape[1]:
        raise DataError(f"the sets' features are {a.shape[1]} and {b.shape[1]} wide")
    if min(len(a), len(b)) < least:
        raise DataError(f"the sets have {len(a)} and {len(b)} images; needed are {least} each")
    return a, b


def _rows(features: Tensor, name: str) -> Tensor:
    if features.ndim != 2:
        raise DataError(f"{name}: expected [N, D], found {list(features.shape)}")
    rows = features.detach().double()
    if not bool(torch.isfinite(rows).all()):
        raise DataError(f"{name}: there are values that are not finite (NaN images?)")
    return rows
