"""Membership inference as the unlearning literature reports it, each by its published rule.

They differ in sign, in data and in target; every docstring states which. None is calibrated per
example: a population attack overstates privacy, so see `lira` and `ulira` too.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedShuffleSplit, cross_val_score
from sklearn.svm import SVC

from mmforget.metrics.signals import Floats, Predictions, modified_entropy

Feature = Callable[[Predictions], Floats]


@dataclass(frozen=True)
class SimpleMIA:
    """What `simple_mia` found.

    Attributes:
        forget: The forget losses used, shuffled and cut.
        accuracies: Attack accuracy of each of the 10 splits.
    """

    forget: Floats
    accuracies: Floats

    @property
    def accuracy(self) -> float:
        """Mean attack accuracy; 0.5 is guessing."""
        return float(self.accuracies.mean())

    @property
    def forgetting_score(self) -> float:
        """Distance to guessing, |accuracy - 0.5|, in [0, 0.5], 0 best."""
        return abs(self.accuracy - 0.5)


def simple_mia(
    forget: ArrayLike,
    unseen: ArrayLike,
    *,
    shuffle_seed: int = 42,
    splits: int = 10,
    cv_seed: int = 0,
    test_size: float = 0.1,
) -> SimpleMIA:
    """Attack by logistic regression on the loss (MUFAC, arXiv 2311.02240; NeurIPS 2023 kit).

    Forget losses are shuffled by the legacy generator of the published code and cut to the number
    of unseen ones; unseen losses are never cut. The attack accuracy is cross-validated.

    Args:
        forget: Losses of the forget set, [P]; members.
        unseen: Losses of data never trained on, [Q].
        shuffle_seed: Seed of the shuffle.
        splits: Number of stratified random splits.
        cv_seed: Seed of the splits.
        test_size: Share of the data in each test part.

    Raises:
        ValueError: Losses are not finite, or too few for a split.
    """
    members = np.array(forget, dtype=np.float64)
    others = np.asarray(unseen, dtype=np.float64)
    np.random.RandomState(shuffle_seed).shuffle(members)
    members = members[: len(others)]
    scores = cross_val_score(
        LogisticRegression(),
        np.concatenate([others, members])[:, None],
        np.repeat([0, 1], [len(others), len(members)]),
        cv=StratifiedShuffleSplit(n_splits=splits, test_size=test_size, random_state=cv_seed),
        scoring="accuracy",
    )
    return SimpleMIA(members, np.asarray(scores))


def nomus(test_accuracy: ArrayLike, mia_accuracy: ArrayLike, weight: float = 0.5) -> Floats:
    """Return weight·accuracy + (1 - weight)·(1 - 2·|MIA - 0.5|), in [0, 1] (arXiv 2311.02240).

    Args:
        test_accuracy: Test accuracy in [0, 1].
        mia_accuracy: Accuracy of `simple_mia` in [0, 1].
        weight: Weight of utility, λ of the paper.
    """
    distance = np.abs(np.asarray(mia_accuracy, dtype=np.float64) - 0.5)
    return np.asarray(weight * np.asarray(test_accuracy) + (1 - weight) * (1 - 2 * distance))


def average_gap(
    method: dict[str, float], retrained: dict[str, float]
) -> tuple[dict[str, float], float]:
    """Return each |method - retrained|, and their mean (SalUn, arXiv 2310.12508, table 1).

    Args:
        method: UA, RA, TA and MIA in percent; run time is no part of it.
        retrained: The same numbers of the retrained model.
    """
    gaps = {name: abs(value - retrained[name]) for name, value in method.items()}
    return gaps, sum(gaps.values()) / len(gaps)


SVC_FEATURES: dict[str, Feature] = {
    "correctness": lambda p: p.correctness,
    "confidence": lambda p: p.confidence,
    "entropy": lambda p: p.entropy,
    "m_entropy": lambda p: p.modified_entropy,
    "prob": lambda p: p.vector,
}


def svc_mia(
    retain: Predictions,
    test: Predictions,
    forget: Predictions,
    features: tuple[str, ...] = ("confidence",),
    reference: bool = False,
) -> dict[str, float]:
    """Return the share of the forget set that an SVC takes for NON-members, by feature.

    The SVC (rbf, C = 3, gamma = 1 / number of features) learns retain (members) against test
    (non-members). High means forgotten, but the target is the retrained model's value, not 1.
    Published as "MIA" of SalUn, in percent, for the feature `confidence` (arXiv 2310.12508).

    Args:
        retain: Members, [N]; the published code takes as many as there are test examples.
        test: Non-members.
        forget: The examples under attack.
        features: Keys of `SVC_FEATURES`; `prob` is the whole probability vector.
        reference: Use the published form of the modified entropy, which has a fault
            (see `modified_entropy`); single-label only.
    """
    rates = {}
    for name in features:
        feature = SVC_FEATURES[name]
        if reference and name == "m_entropy":
            feature = _published_m_entropy
        members, others, attacked = (_columns(feature(p)) for p in (retain, test, forget))
        attack = SVC(C=3, gamma="auto", kernel="rbf")
        rates[name] = 1 - _member_rate(attack, members, others, attacked)
    return rates


def entropy_mia(
    retain: Predictions, test: Predictions, forget: Predictions, balanced: bool = False
) -> float:
    """Return the share of the forget set taken for MEMBERS by an attack on the entropy.

    Low means forgotten: the opposite sign of `svc_mia`. Bad Teacher (arXiv 2205.08096) uses an
    SVC; the SSD repository a logistic regression with balanced class weights, which a retain set
    much larger than the test set needs.

    Args:
        retain: Members.
        test: Non-members.
        forget: The examples under attack.
        balanced: Use the balanced logistic regression.
    """
    attack = (
        LogisticRegression(class_weight="balanced")
        if balanced
        else SVC(C=3, gamma="auto", kernel="rbf")
    )
    return _member_rate(attack, *(_columns(p.entropy) for p in (retain, test, forget)))


@dataclass(frozen=True)
class ThresholdMIA:
    """What a threshold attack found: recall of members and of non-members, in [0, 1]."""

    member_recall: float
    nonmember_recall: float

    @property
    def accuracy(self) -> float:
        """Balanced accuracy."""
        return (self.member_recall + self.nonmember_recall) / 2


def threshold_mia(
    shadow_members: Predictions,
    shadow_others: Predictions,
    members: Predictions,
    others: Predictions,
) -> dict[str, ThresholdMIA]:
    """Attack with one threshold per class, chosen on a shadow model (Song and Mittal, 2021).

    `correctness` needs no threshold: right means member. Single-label only.

    Args:
        shadow_members: Training data of the shadow model, as it sees them.
        shadow_others: Data it never saw.
        members: Members under attack, as the target model sees them.
        others: Non-members under attack.
    """
    found = {
        "correctness": ThresholdMIA(
            float(members.correctness.mean()), float(1 - others.correctness.mean())
        )
    }
    signals: dict[str, Feature] = {
        "confidence": lambda p: p.confidence,
        "entropy": lambda p: -p.entropy,
        "m_entropy": lambda p: -p.modified_entropy,
    }
    for name, signal in signals.items():
        thresholds = _class_thresholds(shadow_members, shadow_others, signal)
        above, below = (signal(p) >= thresholds[p.label[:, 0]] for p in (members, others))
        found[name] = ThresholdMIA(float(above.mean()), float(1 - below.mean()))
    return found


def _class_thresholds(members: Predictions, others: Predictions, signal: Feature) -> Floats:
    """Return, per class, the shadow value of best balanced accuracy; of equals the first, [C]."""
    inside, outside = signal(members), signal(others)
    thresholds = np.zeros(members.probs.shape[-1])
    for label in range(len(thresholds)):
        a, b = inside[members.label[:, 0] == label], outside[others.label[:, 0] == label]
        values = np.concatenate([a, b])
        if len(a) and len(b):
            kept = (len(a) - np.searchsorted(np.sort(a), values)) / len(a)
            refused = np.searchsorted(np.sort(b), values) / len(b)
            thresholds[label] = values[np.argmax(kept + refused)]
    return thresholds


def _published_m_entropy(p: Predictions) -> Floats:
    return modified_entropy(p.probs[:, 0], p.label[:, 0], reference=True)


def _columns(values: Floats) -> Floats:
    return values.reshape(len(values), -1)


def _member_rate(
    attack: SVC | LogisticRegression, members: Floats, others: Floats, attacked: Floats
) -> float:
    """Fit members (1) against others (0); return the share of `attacked` predicted 1."""
    labels = np.repeat([1, 0], [len(members), len(others)])
    attack.fit(np.concatenate([members, others]), labels)
    return float(attack.predict(attacked).mean())
