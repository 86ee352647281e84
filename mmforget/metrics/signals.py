"""What a classifier says about an example, and the membership signals made of it.

A multi-label model is a set of independent two-way classifiers, so single-label and multi-label
predictions share one form: probabilities of H heads with C classes each, H = 1 or C = 2.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, softmax

from mmforget.errors import CollapsedError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Numbers = Mapping[str, NDArray[Any]]

# Floors inside logarithms, as published: Song and Mittal's entropies, and LiRA's confidence.
_LOG_FLOOR = 1e-30
_PHI_FLOOR = 1e-45


def entropy(probs: ArrayLike) -> Floats:
    """Return Shannon entropy in nats, [..., C] -> [...]."""
    p = np.asarray(probs, dtype=np.float64)
    return _total(-p * _log(p))


def modified_entropy(probs: ArrayLike, labels: ArrayLike, reference: bool = False) -> Floats:
    """Return -(1-p_y) log p_y - Σ_{j≠y} p_j log(1-p_j), [..., C] and [...] -> [...].

    Small when the model is sure and right, large when it is sure and wrong (Song and Mittal,
    USENIX Security 2021, equation 8).

    Args:
        probs: Class probabilities.
        labels: True classes.
        reference: The tensor form published with SalUn, for probs [N, C]: it takes log p where
            log(1-p) is meant, and treats every class that occurs among the labels as the true
            class of every row.
    """
    p = np.asarray(probs, dtype=np.float64)
    y = np.asarray(labels, dtype=np.int64)
    if reference:
        seen = np.isin(np.arange(p.shape[-1]), y)
        return _total(-np.where(seen, 1 - p, p) * np.where(p > 0, _log(p), np.log(_LOG_FLOOR)))
    true = y[..., None] == np.arange(p.shape[-1])
    return _total(-np.where(true, (1 - p) * _log(p), p * _log(1 - p)))


@dataclass(frozen=True)
class Predictions:
    """Predicted probabilities and true labels of N examples.

    Attributes:
        probs: [N, H, C] in float64, each head summing to 1.
        label: [N, H] in 0..C-1.
    """

    probs: Floats
    label: Ints

    @classmethod
    def of(cls, logits: ArrayLike, label: ArrayLike) -> "Predictions":
        """Make them from logits [N, C] with labels [N], or logits [N, A] with 0/1 labels [N, A].

        Raises:
            CollapsedError: A logit is NaN or infinite.
        """
        z = np.asarray(logits, dtype=np.float64)
        if not np.isfinite(z).all():
            raise CollapsedError("the model's logits are not finite, so it predicts nothing")
        y = np.asarray(label)
        if y.ndim == 1:
            return cls(softmax(z, axis=-1)[:, None], y.astype(np.int64)[:, None])
        return cls(np.stack([expit(-z), expit(z)], axis=-1), y.astype(np.int64))

    @classmethod
    def read(cls, numbers: Numbers) -> "Predictions":
        """Make them from a split's recorded arrays `logits` and `label`."""
        return cls.of(numbers["logits"], numbers["label"])

    @classmethod
    def of_probs(cls, probs: ArrayLike, label: ArrayLike) -> "Predictions":
        """Make them from class probabilities [N, C] and labels [N]."""
        p = np.asarray(probs, dtype=np.float64)
        return cls(p[:, None], np.asarray(label, dtype=np.int64)[:, None])

    def __len__(self) -> int:
        return len(self.probs)

    def __getitem__(self, rows: Any) -> "Predictions":
        return Predictions(self.probs[rows], self.label[rows])

    @property
    def multi_label(self) -> bool:
        """Whether there are several heads."""
        return bool(self.probs.shape[1] > 1)

    @property
    def vector(self) -> Floats:
        """Class probabilities [N, C]; multi-label: probability of each attribute, [N, A]."""
        return self.probs[..., 1] if self.multi_label else self.probs[:, 0]

    @property
    def predicted(self) -> Ints:
        """Most probable class of each head, [N, H]; at p = 0.5 an attribute counts as absent."""
        return np.asarray(self.probs.argmax(axis=-1))

    @property
    def hits(self) -> NDArray[np.bool_]:
        """Whether each head is right, [N, H]."""
        return np.asarray(self.predicted == self.label)

    @property
    def correctness(self) -> Floats:
        """Share of heads that are right, [N]; 0 or 1 for single-label."""
        return np.asarray(self.hits.mean(axis=1))

    @property
    def confidence(self) -> Floats:
        """Probability of the true label (multi-label: of the whole true label vector), [N]."""
        return _product(self._true)

    @property
    def entropy(self) -> Floats:
        """Entropy, summed over heads, [N], nats."""
        return _total(entropy(self.probs))

    @property
    def modified_entropy(self) -> Floats:
        """Modified entropy, summed over heads, [N]."""
        return _total(modified_entropy(self.probs, self.label))

    @property
    def phi(self) -> Floats:
        """Logit-scaled confidence log p_y - log(1 - p_y), [N], within ±103.62.

        The sum over the wrong classes is taken as such: 1 - p_y would lose all digits near 1
        (Carlini et al., arXiv 2112.03570, section IV; floor 1e-45 in both logarithms).
        """
        off = np.arange(self.probs.shape[-1]) != self.label[..., None]
        wrong = np.minimum(np.where(off, self.probs, 0.0).sum(axis=-1), 1.0)
        with np.errstate(divide="ignore"):  # a head that is surely wrong: log1p(-1) = -inf
            joint = -np.expm1(np.log1p(-wrong).sum(axis=-1))
        return np.asarray(np.log(self.confidence + _PHI_FLOOR) - np.log(joint + _PHI_FLOOR))

    @property
    def _true(self) -> Floats:
        return np.take_along_axis(self.probs, self.label[..., None], axis=-1)[..., 0]


def member_signals(numbers: Numbers) -> dict[str, Floats]:
    """Return the signals of metric attacks, each [N], all with LARGER = more member-like.

    Args:
        numbers: Recorded arrays of a split: `loss`, `logits`, `label`.
    """
    predictions = Predictions.read(numbers)
    return {
        "loss": -np.asarray(numbers["loss"], dtype=np.float64),
        "confidence": predictions.confidence,
        "entropy": -predictions.entropy,
        "modified_entropy": -predictions.modified_entropy,
    }


def _log(p: Floats) -> Floats:
    return np.log(np.maximum(p, _LOG_FLOOR))


def _total(values: Floats) -> Floats:
    return np.asarray(values.sum(axis=-1))


def _product(values: Floats) -> Floats:
    return np.asarray(values.prod(axis=-1))
