"""Metric classes on hand-made numbers: values, directions, references, degenerate cases."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from mmforget.metrics.accuracy import Accuracy
from mmforget.metrics.average_gap import AverageGap
from mmforget.metrics.cost import CostMetric
from mmforget.metrics.divergence import ZRF, Agreement, Divergence
from mmforget.metrics.forgetting import Forgetting
from mmforget.metrics.mia import simple_mia
from mmforget.metrics.probes import Probes
from mmforget.metrics.representation import Representation
from mmforget.record import Cost
from mmforget.registry import METRICS
from mmforget.types import ModelView, Splits, Trial

SIZES = {"forget": 30, "retain": 60, "holdout": 30, "test": 40}


class Ids:
    """A data set of which only the ids matter."""

    def __init__(self, name, ids):
        self.name = name
        self.ids = list(ids)
        self.digests = self.ids

    def __len__(self):
        return len(self.ids)

    def take(self, indices):
        raise AssertionError("metrics read stored numbers, not data")


def splits():
    sets = {name: Ids(name, (f"{name}-{i}" for i in range(n))) for name, n in SIZES.items()}
    return Splits(**sets, train=Ids("train", [*sets["forget"].ids, *sets["retain"].ids]))


def view(numbers):
    return ModelView(lambda: None, lambda model, data: numbers[data.name], splits())


def trial(numbers, retrained=None, original=None, **other):
    fields = {
        "view": view(numbers),
        "original": view(numbers if original is None else original),
        "retrained": None if retrained is None else view(retrained),
        "splits": splits(),
        "seed": 0,
        "cost": Cost(wall_s=60.0, device_s=50.0, peak_bytes=10, trainable=7),
        "cost_reference": None if retrained is None else Cost(wall_s=600.0, device_s=500.0),
        "benchmark": None,
        "lab": None,
    }
    return Trial(**(fields | other))


def classified(logits, label, **more):
    """Numbers of one split: cross-entropy of the given logits, and whatever else."""
    z, y = np.asarray(logits, dtype=np.float32), np.asarray(label)
    if y.ndim == 1:
        loss = np.logaddexp.reduce(z, axis=1) - z[np.arange(len(z)), y]
    else:
        loss = np.logaddexp(0, np.where(y > 0.5, -z, z)).mean(axis=1)
    return {"loss": loss, "logits": z, "label": y, **more}


def predicting(shares, classes=3, sharpness=4.0, **more):
    """Numbers of every split: of each, this share of examples is classified right."""
    numbers = {}
    for name, n in SIZES.items():
        label = np.arange(n) % classes
        chosen = np.where(np.arange(n) < round(shares[name] * n), label, (label + 1) % classes)
        z = sharpness * np.eye(classes)[chosen] + 0.5 * np.eye(classes)[label]
        numbers[name] = classified(z, label, **{key: make(name, n) for key, make in more.items()})
    return numbers


GOOD = {"forget": 0.9, "retain": 1.0, "holdout": 0.5, "test": 0.5}
REFERENCE = {"forget": 0.5, "retain": 1.0, "holdout": 0.5, "test": 0.55}


def test_all_metrics_are_registered_and_documented():
    classes = [Accuracy, Forgetting, AverageGap, Divergence, Agreement, ZRF, Representation]
    for metric in [*classes, Probes, CostMetric]:
        assert metric in [METRICS.get(name) for name in METRICS]
        assert metric.citation
        assert "`" in metric.__doc__


def test_accuracy_values_directions_and_references():
    values = Accuracy().compute(trial(predicting(GOOD), predicting(REFERENCE)))
    assert values["accuracy/forget"].value == pytest.approx(0.9)
    assert values["accuracy/forget"].reference == pytest.approx(0.5)
    assert values["accuracy/forget"].direction == "to_reference"
    assert values["accuracy/retain"].direction == values["accuracy/test"].direction == "up"
    found = values["accuracy/test"]
    assert found.n == 40
    assert found.low < found.value < found.high
    assert values["accuracy/test_top2"].value == 1  # the true class is always second at least
    assert values["accuracy/constant_predictor"].value == pytest.approx(14 / 40)
    assert not values["accuracy/test"].note


def test_accuracy_of_a_collapsed_model_says_so():
    numbers = predicting(GOOD)
    numbers["test"] = classified(np.tile([2.0, 0.0, 0.0], (40, 1)), np.arange(40) % 3)
    values = Accuracy().compute(trial(numbers))
    assert "collapsed" in values["accuracy/test"].note
    assert values["accuracy/test"].value == values["accuracy/constant_predictor"].value
    assert values["accuracy/test"].reference is None


def test_accuracy_of_one_forgotten_class_is_no_collapse():
    numbers = predicting(GOOD)
    numbers["forget"] = classified(np.tile([2.0, 0.0, 0.0], (30, 1)), np.zeros(30, dtype=int))
    values = Accuracy().compute(trial(numbers))
    assert values["accuracy/forget"].value == 1
    assert not values["accuracy/forget"].note


def test_accuracy_of_attributes():
    label = np.stack([np.arange(40) % 2, np.ones(40)], axis=1).astype(np.float32)
    logits = np.stack([np.ones(40), np.ones(40)], axis=1)  # the first attribute half right
    part = classified(logits, label)
    values = Accuracy().compute(trial({name: part for name in SIZES}))
    assert values["accuracy/test"].value == pytest.approx(0.75)
    assert values["accuracy/test_attribute0"].value == pytest.approx(0.5)
    assert values["accuracy/test_attribute1"].value == 1
    assert values["accuracy/constant_predictor"].value == pytest.approx(0.75)
    assert "collapsed" in values["accuracy/test"].note
    assert "accuracy/test_top2" not in values


def test_forgetting_is_the_published_attack_and_its_score():
    numbers, reference = predicting(GOOD), predicting(REFERENCE)
    values = Forgetting().compute(trial(numbers, reference))
    expected = simple_mia(numbers["forget"]["loss"], numbers["holdout"]["loss"])
    assert expected.accuracy > 0.6
    assert values["forgetting/mia_accuracy"].value == expected.accuracy
    assert values["forgetting/score"].value == pytest.approx(expected.accuracy - 0.5)
    nomus = 0.5 * 0.5 + 0.5 * (1 - 2 * expected.forgetting_score)
    assert values["forgetting/nomus"].value == pytest.approx(nomus)
    assert values["forgetting/score"].reference < values["forgetting/score"].value


@pytest.mark.parametrize("fault", ["few", "infinite"])
def test_forgetting_that_is_not_defined_says_so(fault):
    numbers = predicting(GOOD)
    if fault == "few":
        numbers["forget"] = {key: array[:5] for key, array in numbers["forget"].items()}
    else:
        numbers["forget"]["loss"][0] = np.inf
    for value in Forgetting().compute(trial(numbers)).values():
        assert math.isnan(value.value)
        assert "not defined" in value.note
        assert value.reference is None


def test_average_gap_is_in_percent_and_needs_the_retrained_model():
    values = AverageGap().compute(trial(predicting(GOOD), predicting(REFERENCE)))
    assert values["gap/ua"].value == pytest.approx(10)
    assert values["gap/ua"].reference == pytest.approx(50)
    assert values["gap/ra"].value == 100
    assert values["gap/ta"].value == pytest.approx(50)
    assert values["gap/mia"].value < values["gap/mia"].reference  # retrain looks less a member
    gaps = [values[f"gap/{name}"].gap for name in ("ua", "ra", "ta", "mia")]
    assert values["gap/average"].value == pytest.approx(np.mean(gaps))
    assert values["gap/rte_minutes"].value == 1
    assert values["gap/rte_minutes"].reference == 10
    alone = AverageGap().compute(trial(predicting(GOOD)))
    assert "gap/average" not in alone
    assert alone["gap/mia"].reference is None


def test_divergence_and_agreement_of_equal_and_of_opposite_models():
    good = predicting(GOOD)
    same = trial(good, good)
    assert all(value.value == 0 for value in Divergence().compute(same).values())
    assert all(value.value == 1 for value in Agreement().compute(same).values())
    label = np.zeros(30, dtype=int)
    numbers, reference = predicting(GOOD), predicting(GOOD)
    numbers["forget"] = classified(np.tile([50.0, -50.0, -50.0], (30, 1)), label)
    reference["forget"] = classified(np.tile([-50.0, 50.0, -50.0], (30, 1)), label)
    values = Divergence().compute(trial(numbers, reference))
    assert values["divergence/js_forget"].value == pytest.approx(math.log(2))
    assert values["divergence/activation_forget"].value == pytest.approx(math.sqrt(2))
    assert values["divergence/js_retain"].value == 0
    assert Agreement().compute(trial(numbers, reference))["agreement/forget"].value == 0
    assert Divergence().compute(trial(good)) == {}
    assert Agreement().compute(trial(good)) == {}


def test_divergence_of_attributes_is_their_mean():
    label = np.ones((30, 2), dtype=np.float32)
    numbers = {name: classified(np.full((30, 2), 50.0), label) for name in SIZES}
    reference = {name: classified(np.tile([50.0, -50.0], (30, 1)), label) for name in SIZES}
    values = Divergence().compute(trial(numbers, reference))
    assert values["divergence/js_test"].value == pytest.approx(math.log(2) / 2)
    assert values["divergence/activation_test"].value == pytest.approx(1)
    assert Agreement().compute(trial(numbers, reference))["agreement/test"].value == 0.5


def test_zrf_is_one_for_a_model_that_knows_nothing():
    flat = predicting(GOOD, sharpness=0.0)
    for part in flat.values():
        part["logits"][:] = 0
    built = []
    lab = SimpleNamespace(view=lambda model: view(flat))
    benchmark = SimpleNamespace(build=lambda seed: built.append(seed))
    values = ZRF().compute(trial(flat, predicting(GOOD), lab=lab, benchmark=benchmark))
    assert values["zrf/forget"].value == pytest.approx(1)
    assert values["zrf/forget"].reference < 0.95
    assert values["zrf/published"].reference > values["zrf/forget"].reference
    assert len(built) == 1


def features(scale=1.0, seed=0, dimensions=8):
    rng = np.random.default_rng(seed)
    return lambda name, n: scale * rng.normal(size=(n, dimensions)).astype(np.float32)


def test_representation_compares_with_both_models():
    original = predicting(GOOD, features=features())
    turned = {
        name: part | {"features": 2 * part["features"][:, ::-1] + 1}
        for name, part in original.items()
    }
    retrained = predicting(GOOD, features=features(seed=1))
    values = Representation().compute(trial(turned, retrained, original))
    assert values["representation/cka_forget_to_original"].value == pytest.approx(1)
    assert values["representation/cka_unbiased_test_to_original"].value == pytest.approx(1)
    found = values["representation/cka_forget_to_retrained"]
    assert found.value < 0.6
    assert found.value == pytest.approx(values["representation/cka_forget_to_original"].reference)
    assert found.n == 30
    alone = Representation().compute(trial(turned, None, original))
    assert not [name for name in alone if name.endswith("to_retrained")]


def test_representation_of_few_examples_or_dead_features():
    wide = predicting(GOOD, features=features(dimensions=50))
    value = Representation().compute(trial(wide))["representation/cka_forget_to_original"]
    assert "biased upwards" in value.note
    dead = predicting(GOOD, features=features(scale=0.0))
    values = Representation().compute(trial(dead))
    assert all(math.isnan(value.value) for value in values.values())


def separable(spread, groups=3, photos=1):
    """Features that tell groups apart by `spread`: classes, or people with photos in a row."""
    rng = np.random.default_rng(0)

    def make(name, n):
        centre = np.eye(12)[np.arange(n) // photos % groups]
        return (spread * centre + rng.normal(scale=0.3, size=(n, 12))).astype(np.float32)

    return make


def people(name, n):
    return np.array([f"{name}-{i // 3 % 9}" for i in range(n)])


def test_probes_find_what_features_hold():
    values = Probes().compute(
        trial(predicting(GOOD, features=separable(3.0)), predicting(GOOD, features=separable(0.0)))
    )
    for probe in ("knn", "linear"):
        for name in (f"{probe}_forget", f"{probe}_test", f"{probe}_residual"):
            assert values[f"probes/{name}"].value == 1, name
            assert values[f"probes/{name}"].reference < 0.7, name
    assert values["probes/knn_test"].direction == "up"
    assert values["probes/knn_forget"].direction == "to_reference"


def test_identity_probes_recognise_people_on_new_photographs():
    known = predicting(GOOD, features=separable(3.0, groups=9, photos=3), identity=people)
    unknown = predicting(GOOD, features=separable(0.0), identity=people)
    values = Probes().compute(trial(known, unknown))
    for probe in ("knn", "linear"):
        for split in ("forget", "holdout"):
            value = values[f"probes/identity_{probe}_{split}"]
            assert value.value == 1
            assert value.reference < 0.5
            assert "chance 0.111" in value.note
            assert value.n == 8 + 3  # one of three photographs of eight people, three of six


def test_probes_without_people_with_repeats_or_with_attributes():
    alone = predicting(GOOD, features=separable(1.0))
    assert not [name for name in Probes().compute(trial(alone)) if "identity" in name]
    singles = predicting(GOOD, features=separable(1.0), identity=lambda name, n: np.arange(n))
    assert not [name for name in Probes().compute(trial(singles)) if "identity" in name]
    label = np.stack([np.arange(60) % 2, np.ones(60)], axis=1).astype(np.float32)
    x = np.stack([label[:, 0], np.ones(60)], axis=1) - 0.5
    numbers = {
        name: classified(np.ones((n, 2)), label[:n], features=x[:n]) for name, n in SIZES.items()
    }
    values = Probes().compute(trial(numbers))
    assert values["probes/knn_forget"].value == values["probes/linear_residual"].value == 1


def test_cost_and_speedup():
    values = CostMetric().compute(trial({}, {}))
    assert values["cost/wall_s"].value == 60
    assert values["cost/wall_s"].reference == 600
    assert values["cost/trainable"].value == 7
    assert values["cost/speedup"].value == 10
    assert "cost/speedup" not in CostMetric().compute(trial({}))
    idle = CostMetric().compute(trial({}, {}, cost=Cost()))
    assert math.isnan(idle["cost/speedup"].value)
