"""What frozen features still tell: nearest neighbours and a new linear head."""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mmforget.metrics.common import both, with_interval
from mmforget.metrics.ranking import Interval, wilson
from mmforget.metrics.signals import Floats, Numbers
from mmforget.record import MetricValue
from mmforget.rng import derive
from mmforget.types import Metric, ModelView, Trial

Labels = NDArray[Any]
Probe = Callable[[Floats, Labels, Floats], Labels]

_STEPS = 100  # L-BFGS iterations: one budget for all models
_PEOPLE = 100  # identities in an identity probe, drawn at random if there are more


def knn_predict(train: ArrayLike, labels: ArrayLike, queries: ArrayLike, k: int = 5) -> Labels:
    """Return labels voted by the k nearest by cosine; ties go to the smallest label.

    Protocol of arXiv 2503.06991 (k = 5, uniform votes, frozen features).

    Args:
        train: Features, [N, D].
        labels: [N], or [N, A] with a vote for each column.
        queries: Features, [M, D].
        k: Neighbours; all of them when N < k.

    Returns:
        [M] or [M, A].
    """
    known = np.asarray(train)
    votes = KNeighborsClassifier(n_neighbors=min(k, len(known)), metric="cosine")
    return np.asarray(votes.fit(known, np.asarray(labels)).predict(np.asarray(queries)))


def knn_leave_one_out(features: ArrayLike, labels: ArrayLike, k: int = 5) -> Labels:
    """Return the label voted by the k nearest OTHER examples, for every example, [N] or [N, A]."""
    known, target = np.asarray(features), np.asarray(labels)
    votes = KNeighborsClassifier(n_neighbors=min(k, len(known) - 1), metric="cosine")
    neighbours = votes.fit(known, target).kneighbors(return_distance=False)
    columns = target.reshape(len(target), -1)
    chosen = [_vote(column[neighbours]) for column in columns.T]
    return np.stack(chosen, axis=1).reshape(target.shape)


def linear_predict(train: ArrayLike, labels: ArrayLike, queries: ArrayLike) -> Labels:
    """Return labels predicted by a new linear head on standardised features, [M] or [M, A].

    Multinomial logistic regression (L2, C = 1, at most 100 L-BFGS steps); one for each column of
    multi-label targets. A target that is constant in training is predicted as that constant.

    Args:
        train: Features, [N, D].
        labels: [N] or [N, A].
        queries: Features, [M, D].
    """
    known, target, asked = np.asarray(train), np.asarray(labels), np.asarray(queries)
    columns = []
    for column in target.reshape(len(target), -1).T:
        if (column == column[0]).all():
            columns.append(np.full(len(asked), column[0]))
            continue
        head = make_pipeline(StandardScaler(), LogisticRegression(max_iter=_STEPS))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the budget is part of the probe
            columns.append(head.fit(known, column).predict(asked))
    return np.stack(columns, axis=1).reshape(len(asked), *target.shape[1:])


class Probes(Metric):
    """Accuracy of k-NN (k = 5, cosine) and of a new linear head on frozen features.

    - `probes/<knn|linear>_<forget|test>`: fitted on retain. What the features offer without the
      forget labels.
    - `probes/<knn|linear>_residual`: fitted on retain and forget with true labels, evaluated on
      forget (k-NN: without the example itself). High where the retrained model's is lower means
      that the features still hold the forget set apart.
    - `probes/identity_<knn|linear>_<forget|holdout>`: where people are recorded, how often a
      person is recognised on photographs kept out of the fit: of each person with two photographs
      or more, half are known and half are asked for (k-NN with k = 1; at most 100 people, drawn
      by seed). `holdout` shows what the features do for people nobody trained on.

    Direction: closer to the retrained model, whose features go through the same fit; test: up.
    Lower is not better. Intervals: Wilson 95 %, examples only, not the fit.

    Pitfalls: age or attribute accuracy says nothing about identity, so look at the identity
    probes. `linear_residual` is accuracy on its own training data: only its gap to the retrained
    model means something.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"features", "label"})
    citation: ClassVar[str] = "Kim et al., Are We Truly Forgetting?, arXiv 2503.06991"

    def compute(self, trial: Trial) -> Mapping[str, MetricValue]:
        """Return the values; identity probes only where `identity` is recorded."""
        key = ("probes", trial.seed)
        accuracies = partial(_accuracies, seed=trial.seed)
        own, reference = both(trial, lambda view: view.memo(key, accuracies))
        values = {}
        for name, (hits, note) in own.items():
            direction = "up" if name.endswith("_test") else "to_reference"
            theirs = None if reference is None else float(reference[name][0].mean())
            found = Interval(float(hits.mean()), *wilson(float(hits.sum()), len(hits)))
            values[f"probes/{name}"] = with_interval(found, direction, theirs, len(hits), note)
        return values


def _accuracies(view: ModelView, seed: int) -> dict[str, tuple[Floats, str]]:
    """Return hits of each probe, [M] in [0, 1], and its note."""
    forget, retain, test = (view.numbers(split) for split in ("forget", "retain", "test"))
    x, y = _features(retain), retain["label"]
    found = {}
    for name, probe in (("knn", knn_predict), ("linear", linear_predict)):
        for split, part in (("forget", forget), ("test", test)):
            found[f"{name}_{split}"] = _hits(probe(x, y, _features(part)), part["label"]), ""
    everything = np.concatenate([x, _features(forget)])
    labels = np.concatenate([y, forget["label"]])
    n = len(forget["label"])
    residual = {
        "knn": knn_leave_one_out(everything, labels)[-n:],
        "linear": linear_predict(everything, labels, _features(forget)),
    }
    for name, predicted in residual.items():
        found[f"{name}_residual"] = _hits(predicted, forget["label"]), ""
    if "identity" in forget:
        for split in ("forget", "holdout"):
            found |= _identity(view.numbers(split), split, seed)
    return found


def _identity(numbers: Numbers, split: str, seed: int) -> dict[str, tuple[Floats, str]]:
    """Return hits of recognising people on photographs kept out; empty with under two people."""
    rng = np.random.default_rng(derive(seed, "identity", split))
    _, person, photos = np.unique(numbers["identity"], return_inverse=True, return_counts=True)
    people = rng.permutation(np.flatnonzero(photos >= 2))[:_PEOPLE]
    if len(people) < 2:
        return {}
    rows = rng.permutation(np.flatnonzero(np.isin(person, people)))
    rows = rows[np.argsort(person[rows], kind="stable")]
    counts = photos[person[rows]]
    first = np.concatenate([[True], person[rows][1:] != person[rows][:-1]])
    place = np.arange(len(rows)) - np.maximum.accumulate(np.where(first, np.arange(len(rows)), 0))
    known, asked = rows[place < (counts + 1) // 2], rows[place >= (counts + 1) // 2]
    x = _features(numbers)
    note = f"chance {1 / len(people):.3f}: {len(people)} people"
    predicted = {
        "knn": knn_predict(x[known], person[known], x[asked], k=1),
        "linear": linear_predict(x[known], person[known], x[asked]),
    }
    return {
        f"identity_{name}_{split}": (_hits(labels, person[asked]), note)
        for name, labels in predicted.items()
    }


def _features(numbers: Numbers) -> Floats:
    return np.asarray(numbers["features"]).reshape(len(numbers["features"]), -1)


def _hits(predicted: Labels, labels: Labels) -> Floats:
    """Return the share of targets that are right, by example, [M]."""
    return np.asarray((predicted == labels).reshape(len(labels), -1).mean(axis=1))


def _vote(labels: Labels) -> Labels:
    """Return the most frequent label of each row, the smallest of equals, [M, k] -> [M]."""
    distinct, index = np.unique(labels, return_inverse=True)
    rows = index.reshape(labels.shape) + len(distinct) * np.arange(len(labels))[:, None]
    counts = np.bincount(rows.ravel(), minlength=labels.shape[0] * len(distinct))
    return np.asarray(distinct[counts.reshape(len(labels), -1).argmax(axis=1)])
