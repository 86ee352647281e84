"""Similarity of features to those of the retrained and of the original model."""

from collections.abc import Mapping
from typing import ClassVar

from mmforget.metrics.signals import Floats
from mmforget.metrics.similarity import linear_cka, unbiased_cka
from mmforget.record import MetricValue
from mmforget.types import Metric, ModelView, Trial

_SPLITS = ("forget", "retain", "test")
_AMPLE = 10  # examples per feature from which the bias of linear CKA is small


class Representation(Metric):
    """Linear CKA of the features before the head, on the same examples.

    - `representation/cka_<split>_to_retrained`: up, target 1, or better the CKA of two retrained
      models of different seeds. Left out without a retrained model.
    - `representation/cka_<split>_to_original`: closer to the retrained model's own value. Near 1
      on forget, when the retrained model's is lower, means that only the head was changed.
    - `representation/cka_unbiased_...`: the same from unbiased HSIC over minibatches of 512 or
      more, which is comparable between sets of different size; it may be below 0.

    Pitfalls: the biased form is well above 0 even for unrelated features unless there are many
    more examples than features; a note says so below ten to one. A ruined network can have low CKA
    to everything. NaN when features are constant.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"features"})
    citation: ClassVar[str] = "Kim et al., Are We Truly Forgetting?, arXiv 2503.06991"

    def compute(self, trial: Trial) -> Mapping[str, MetricValue]:
        """Return the values."""
        values = {}
        for split in _SPLITS:
            own, original = _features(trial.view, split), _features(trial.original, split)
            theirs = None if trial.retrained is None else _features(trial.retrained, split)
            n, note = len(own), ""
            if n < _AMPLE * own.shape[1]:
                note = f"biased upwards: {n} examples, {own.shape[1]} features"
            for form, cka in (("cka", linear_cka), ("cka_unbiased", unbiased_cka)):
                remark = note if form == "cka" else ""
                values[f"representation/{form}_{split}_to_original"] = MetricValue(
                    cka(own, original),
                    "to_reference",
                    None if theirs is None else cka(theirs, original),
                    n=n,
                    note=remark,
                )
                if theirs is not None:
                    values[f"representation/{form}_{split}_to_retrained"] = MetricValue(
                        cka(own, theirs), "up", 1.0, n=n, note=remark
                    )
        return values


def _features(view: ModelView, split: str) -> Floats:
    features: Floats = view.numbers(split)["features"]
    return features.reshape(len(features), -1)
