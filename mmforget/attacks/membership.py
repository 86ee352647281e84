"""Population membership attacks: one rule for all examples, no shadow models."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from mmforget.attacks.shadows import roc, separation
from mmforget.metrics.signals import Floats, Ints, Numbers, Predictions, member_signals
from mmforget.options import option
from mmforget.record import AttackResult, MetricValue
from mmforget.rng import derive
from mmforget.types import Attack, Budget, ModelView, Trial

Scores = dict[str, tuple[Floats, Floats]]


@dataclass(frozen=True)
class MembershipConfig:
    """What the attack may spend and how it cross-validates."""

    queries: int | None = option(None, "forward passes; fewer examples than this are drawn", low=20)
    folds: int = option(5, "folds of the learned attacks", low=2)
    svc_examples: int = option(2000, "examples a side for the SVC; its cost is quadratic", low=10)
    resamples: int = option(1000, "bootstrap resamples of each interval", low=100)


class Membership(Attack[MembershipConfig]):
    """Tell the forget set from unseen data by what the unlearned model says about each example.

    Members are the forget set, non-members the holdout set. Signals, all with larger = more
    member-like: `loss` (negated), `confidence` of the true label, `entropy` and
    `modified_entropy` (negated); and two learned ones with cross-validated scores: `simple_lr`, a
    logistic regression on the loss, and `svc`, an SVC (C = 3, rbf) on correctness, confidence,
    both entropies and the probabilities.

    Values per signal: `<signal>/auc`, `balanced_accuracy` (best threshold on the same scores, so
    never below 0.5), `tpr@0.01`, `tpr@0.001` (true-positive rate at that false-positive rate; NaN
    where there are too few non-members for it), with bootstrap 95 % intervals. Direction: closer
    to the retrained model, which is the reference. A signal AUC well below 0.5 shows
    over-forgetting, which the learned attacks turn into one above 0.5.

    Pitfalls: population attacks overstate privacy (Carlini et al., arXiv 2112.03570); see `lira`
    and `ulira`. Where forget and holdout are different people, even the retrained model is
    separable. Scores pooled over folds are pessimistic: on noise, a learned AUC may fall a little
    below 0.5.
    """

    access: ClassVar[str] = "grey"
    needs: ClassVar[frozenset[str]] = frozenset({"loss", "logits"})
    citation: ClassVar[str] = "Yeom et al., arXiv 1709.01604; Song and Mittal, arXiv 2003.10595"
    config_type: ClassVar[type] = MembershipConfig

    def budget(self) -> Budget:
        """No steps and no shadow models; queries as configured."""
        return Budget(queries=self.config.queries, steps=0, models=0)

    def run(self, trial: Trial, budget: Budget) -> AttackResult:
        """Attack the model under test, and the retrained one for reference."""
        start = time.monotonic()
        rows = [
            _rows(len(trial.splits.get(split)), budget.queries, derive(trial.seed, split))
            for split in ("forget", "holdout")
        ]
        found = self._scores(trial.view, rows, trial.seed)
        retrained: Scores = {}
        if trial.retrained is not None:
            retrained = self._scores(trial.retrained, rows, trial.seed)
        values: dict[str, MetricValue] = {}
        for name, (members, others) in found.items():
            values |= separation(
                name, members, others, trial.seed, retrained.get(name), self.config.resamples
            )
        targets: dict[str, np.ndarray[Any, Any]] = {}
        for i, split in enumerate(("forget", "holdout")):
            targets[f"{split}_ids"] = np.array(trial.splits.get(split).ids)[rows[i]]
            targets |= {
                f"{split}_{name}": pair[i]
                for name, pair in found.items()
                if len(pair[i]) == len(rows[i])
            }
        return AttackResult(
            access=self.access,
            values=values,
            queries=len(rows[0]) + len(rows[1]),
            seconds=time.monotonic() - start,
            curves={f"roc/{name}": roc(*pair) for name, pair in found.items()},
            targets=targets,
        )

    def _scores(self, view: ModelView, rows: list[Ints], seed: int) -> Scores:
        """Return the scores of members and non-members by signal."""
        parts = [
            {key: np.asarray(array)[chosen] for key, array in view.numbers(split).items()}
            for split, chosen in zip(("forget", "holdout"), rows, strict=True)
        ]
        members, others = (member_signals(part) for part in parts)
        scores = {name: (members[name], others[name]) for name in members}
        folds = min(self.config.folds, *(len(chosen) for chosen in rows))
        if folds >= 2:
            losses = ((-members["loss"])[:, None], (-others["loss"])[:, None])
            regression = LogisticRegression(class_weight="balanced")
            scores["simple_lr"] = _learned(regression, losses, folds, seed)
            limit = self.config.svc_examples
            # The usual tolerance of 1e-3 lets rounding of the inputs decide the order of scores.
            machine = SVC(C=3, gamma="auto", kernel="rbf", class_weight="balanced", tol=1e-8)
            features = [_softmax_features(part)[:limit] for part in parts]
            scores["svc"] = _learned(machine, features, folds, seed)
        return scores


def _rows(size: int, queries: int | None, seed: int) -> Ints:
    """Return which examples to ask about: all, or a random choice of at most queries / 2."""
    order = np.random.default_rng(seed).permutation(size)
    return order if queries is None else order[: queries // 2]


def _softmax_features(numbers: Numbers) -> Floats:
    p = Predictions.read(numbers)
    columns = [p.correctness, p.confidence, p.entropy, p.modified_entropy]
    return np.concatenate([np.stack(columns, axis=1), p.vector], axis=1)


def _learned(
    attack: SVC | LogisticRegression, features: Iterable[Floats], folds: int, seed: int
) -> tuple[Floats, Floats]:
    """Return cross-validated decision values of members and non-members; larger = member."""
    members, others = features
    x = np.concatenate([members, others])
    y = np.repeat([1, 0], [len(members), len(others)])
    split = StratifiedKFold(folds, shuffle=True, random_state=derive(seed, "folds") % 2**32)
    model = make_pipeline(StandardScaler(), attack)
    values = cross_val_predict(model, x, y, cv=split, method="decision_function")
    values = np.round(values, 6)  # what the solver does not tell apart is a tie
    return values[: len(members)], values[len(members) :]
