"""Attack classes in a world where what a model remembers is known: they must find it, or not.

A model of this world is the set of examples it remembers. It gives an example the logit
difference φ = the example's own ease + `GAIN` if remembered + noise of the model.
"""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest

from mmforget.attacks.challenge import Challenge, ChallengeConfig
from mmforget.attacks.lira import LiRA, LiRAConfig
from mmforget.attacks.membership import Membership, MembershipConfig
from mmforget.attacks.rmia import RMIA, RMIAConfig
from mmforget.attacks.shadows import forget_rows, half, rounds
from mmforget.attacks.ulira import ULiRA, ULiRAConfig
from mmforget.record import Cost
from mmforget.registry import ATTACKS
from mmforget.rng import derive
from mmforget.types import Budget, ModelView, Splits, Trial

FORGET, RETAIN, UNSEEN = 80, 120, 80
GAIN = 4.0


class Ids:
    """A data set of which only the ids matter."""

    def __init__(self, ids):
        self.ids = self.digests = list(ids)

    def __len__(self):
        return len(self.ids)


@dataclass(frozen=True)
class Model:
    remembers: frozenset
    seed: int


def make_splits():
    names = {
        "forget": [f"train-{i}" for i in range(1, 2 * FORGET, 2)],  # scattered over the train set
        "holdout": [f"holdout-{i}" for i in range(UNSEEN)],
        "test": [f"test-{i}" for i in range(UNSEEN)],
    }
    train = [f"train-{i}" for i in range(FORGET + RETAIN)]
    names["retain"] = sorted(set(train) - set(names["forget"]))
    return Splits(**{name: Ids(ids) for name, ids in names.items()}, train=Ids(train))


SPLITS = make_splits()
FORGOTTEN = frozenset(SPLITS.forget.ids)
EVERYTHING = frozenset(SPLITS.train.ids)


def predict(model, data):
    ease = [np.random.default_rng(derive(0, "ease", i)).normal(-1, 2) for i in data.ids]
    noise = np.random.default_rng(derive(model.seed, *data.ids[:1])).normal(0, 0.5, len(data))
    phi = np.array(ease) + GAIN * np.array([i in model.remembers for i in data.ids]) + noise
    label = np.arange(len(data)) % 2
    logits = np.where(label[:, None] == np.arange(2), phi[:, None], 0.0)
    return {"loss": np.logaddexp(0, -phi), "logits": logits, "label": label}


def view(model):
    return ModelView(lambda: model, predict, SPLITS)


class Lab:
    """Trains and unlearns models of this world; `method` says what is left after unlearning."""

    def __init__(self, method):
        self.method = method
        self.trained = []
        self.engine = SimpleNamespace(share=lambda value: value)

    def view(self, model):
        return view(model)

    def shadow(self, keep, seed):
        self.trained.append(len(keep))
        return Model(frozenset(SPLITS.train.ids[i] for i in keep), seed)

    def unlearn(self, model, forget, keep, seed):
        ids = SPLITS.train.ids
        assert model.remembers >= {ids[i] for i in (*forget, *keep)}
        left = self.method(model.remembers, frozenset(ids[i] for i in forget))
        return Model(left, seed)


def nothing(remembers, forget):
    return remembers


def perfectly(remembers, forget):
    return remembers - forget


def trial(method, retrained=True):
    return Trial(
        view=view(Model(method(EVERYTHING, FORGOTTEN), seed=1)),
        original=view(Model(EVERYTHING, seed=2)),
        retrained=view(Model(EVERYTHING - FORGOTTEN, seed=3)) if retrained else None,
        splits=SPLITS,
        seed=0,
        cost=Cost(),
        cost_reference=None,
        benchmark=None,
        lab=Lab(method),
    )


def attack(made, given, **budget):
    return made.run(given, Budget(**budget) if budget else made.budget())


def test_all_attacks_are_registered_with_a_budget():
    for name in ("membership", "lira", "ulira", "rmia", "challenge"):
        made = ATTACKS.get(name)
        budget = made(made.config_type()).budget()
        assert (budget.queries, budget.steps, budget.models, budget.seconds) != (None,) * 4
        assert made.access == "grey"
        assert made.citation


def test_halves_are_balanced_and_extend_one_series():
    held = np.stack([half(101, model, seed=0) for model in range(8)])
    assert (held.sum(axis=0) == 4).all()
    assert set(held.sum(axis=1)) == {50, 51}
    assert not (held[0] == held[2]).all()


def test_rounds_come_in_pairs_and_stop_when_time_is_spent():
    given = trial(nothing)
    assert list(rounds(given, 9, None)) == list(range(8))
    assert list(rounds(given, 20, seconds=0.0)) == list(range(6))


def test_forget_rows_point_into_the_training_data():
    rows = forget_rows(SPLITS)
    assert [SPLITS.train.ids[row] for row in rows] == SPLITS.forget.ids


def test_membership_finds_what_was_not_forgotten():
    result = attack(Membership(MembershipConfig()), trial(nothing))
    for name in ("loss", "confidence", "modified_entropy", "simple_lr", "svc"):
        value = result.values[f"{name}/auc"]
        assert value.value > 0.8, name
        assert 0.3 < value.reference < 0.65, name
        assert value.low < value.value < value.high
        assert value.direction == "to_reference"
    assert result.values["loss/balanced_accuracy"].value > 0.75
    assert result.queries == FORGET + UNSEEN
    curve = result.curves["roc/loss"]
    assert curve["x_scale"] == "log"
    assert len(curve["x"]) == len(curve["y"]) <= 200
    assert result.targets["forget_loss"].shape == (FORGET,)
    assert set(result.targets["forget_ids"]) == FORGOTTEN


def test_membership_fails_where_all_is_forgotten():
    result = attack(Membership(MembershipConfig()), trial(perfectly))
    for name in ("loss", "confidence", "entropy", "modified_entropy"):
        value = result.values[f"{name}/auc"]
        assert value.low < 0.5 < value.high, name
    assert result.values["svc/auc"].value < 0.65


def test_membership_says_which_rates_mean_nothing():
    values = attack(Membership(MembershipConfig()), trial(nothing)).values
    for rate in ("tpr@0.01", "tpr@0.001"):
        value = values[f"loss/{rate}"]  # 80 non-members cannot show 1 %
        assert math.isnan(value.value)
        assert "80 non-members" in value.note
        assert value.low is None


def test_membership_sees_over_forgetting_in_learned_attacks():
    given = trial(perfectly)
    numbers = given.view.numbers("forget")
    numbers["loss"] = numbers["loss"] + 10
    values = attack(Membership(MembershipConfig()), given).values
    assert values["loss/auc"].value < 0.1
    assert values["simple_lr/auc"].value > 0.9


def test_membership_keeps_to_its_queries():
    result = attack(Membership(MembershipConfig(queries=60)), trial(nothing))
    assert result.queries == 60
    assert result.values["loss/auc"].n == 60
    assert len(result.targets["forget_ids"]) == 30


def test_membership_without_a_retrained_model_has_no_reference():
    values = attack(Membership(MembershipConfig()), trial(nothing, retrained=False)).values
    assert all(value.reference is None for value in values.values())


def test_membership_and_lira_take_attributes():
    def attributes(model, data):
        found = predict(model, data)
        phi = np.take_along_axis(found["logits"], found["label"][:, None], axis=1)
        label = np.stack([found["label"], 1 - found["label"]], axis=1).astype(np.float32)
        return {"loss": found["loss"], "logits": phi * (2 * label - 1), "label": label}

    lab = Lab(nothing)
    lab.view = lambda model: ModelView(lambda: model, attributes, SPLITS)
    fields = {"lab": lab, "view": lab.view(Model(EVERYTHING, 1)), "retrained": None}
    given = SimpleNamespace(**(vars(trial(nothing)) | fields))
    values = attack(Membership(MembershipConfig()), given).values
    for name in ("confidence", "modified_entropy", "svc"):
        assert values[f"{name}/auc"].value > 0.8, name
    assert attack(LiRA(LiRAConfig(models=6)), given).values["offline/auc"].value > 0.9


@pytest.mark.parametrize("fixed", [None, False])
def test_lira_finds_what_was_not_forgotten(fixed):
    given = trial(nothing)
    result = attack(LiRA(LiRAConfig(fixed_variance=fixed)), given)
    for game in ("offline", "calibrated", "online"):
        assert result.values[f"{game}/auc"].value > 0.97, game
    assert 0.4 < result.values["offline/auc"].reference < 0.6
    assert result.values["online/auc"].reference == 0.5
    assert given.lab.trained == [100] * 16
    assert result.targets["forget_phi"].shape == (FORGET, 16)
    loss = attack(Membership(MembershipConfig()), trial(nothing)).values["loss/auc"]
    assert result.values["calibrated/auc"].value > loss.value  # knows each example's own ease


def test_lira_fails_where_all_is_forgotten():
    values = attack(LiRA(LiRAConfig()), trial(perfectly)).values
    for game in ("offline", "calibrated", "online"):
        assert values[f"{game}/auc"].low < 0.5 < values[f"{game}/auc"].high, game


def test_lira_without_a_retrained_model_plays_one_game():
    values = attack(LiRA(LiRAConfig(models=6)), trial(nothing, retrained=False)).values
    assert "online/auc" not in values
    assert values["offline/auc"].reference is None


def test_budget_limits_the_shadow_models():
    given = trial(nothing)
    attack(LiRA(LiRAConfig()), given, models=8)
    assert len(given.lab.trained) == 8


def test_rmia_finds_what_was_not_forgotten():
    result = attack(RMIA(RMIAConfig(gamma=1.2)), trial(nothing))
    assert result.values["offline/auc"].value > 0.9
    assert 0.4 < result.values["offline/auc"].reference < 0.6
    assert result.queries == FORGET + 2 * UNSEEN


def test_rmia_fails_where_all_is_forgotten():
    value = attack(RMIA(RMIAConfig(gamma=1.2)), trial(perfectly)).values["offline/auc"]
    assert value.low < 0.5 < value.high


def test_ulira_finds_a_method_that_forgets_nothing():
    result = attack(ULiRA(ULiRAConfig()), trial(nothing))
    values = result.values
    assert values["shadow_accuracy"].value > 0.97
    assert values["accuracy"].value > 0.95
    assert values["accuracy"].reference == 0.5
    assert values["member_rate"].value > 0.95
    assert values["member_rate"].reference < 0.05
    assert values["shadow/auc"].value > 0.99
    assert "roc/shadow" in result.curves


def test_ulira_finds_nothing_in_a_perfect_method():
    values = attack(ULiRA(ULiRAConfig(models=16)), trial(perfectly)).values
    for name in ("shadow_accuracy", "accuracy", "shadow/auc"):
        assert values[name].value == pytest.approx(0.5, abs=0.07), name


def test_ulira_sees_a_trace_that_no_population_attack_sees():
    # Forgotten examples end a little LOWER than examples never seen: over-forgetting by example.
    class Pushed(Lab):
        def unlearn(self, model, forget, keep, seed):
            done = super().unlearn(model, forget, keep, seed)
            return PushedModel(done.remembers, seed, frozenset(SPLITS.train.ids[i] for i in forget))

    @dataclass(frozen=True)
    class PushedModel(Model):
        pushed: frozenset

    def pushed_view(model):
        def numbers(model, data):
            found = predict(model, data)
            low = np.array([i in getattr(model, "pushed", ()) for i in data.ids])
            found["logits"] = np.where(
                (found["logits"] != 0) & low[:, None], found["logits"] - 1.5, found["logits"]
            )
            return found

        return ModelView(lambda: model, numbers, SPLITS)

    lab = Pushed(perfectly)
    lab.view = pushed_view
    target = pushed_view(PushedModel(EVERYTHING - FORGOTTEN, 1, FORGOTTEN))
    given = SimpleNamespace(**(vars(trial(perfectly)) | {"lab": lab, "view": target}))
    values = attack(ULiRA(ULiRAConfig()), given).values
    assert values["shadow_accuracy"].value > 0.8
    assert values["accuracy"].value > 0.8


def test_ulira_without_a_retrained_model_judges_the_method_only():
    values = attack(ULiRA(ULiRAConfig(models=6)), trial(nothing, retrained=False)).values
    assert "accuracy" not in values
    assert values["member_rate"].reference is None


def test_challenge_tells_a_method_that_forgets_nothing_from_retraining():
    given = trial(nothing)
    result = attack(Challenge(ChallengeConfig()), given)
    assert result.values["forget_score"].value < 0.02
    floor = result.values["half/forget_score"]
    assert floor.value < 0.05 < floor.reference
    assert len(given.lab.trained) == 16  # retrained models; all unlearning starts at the original
    assert result.targets["epsilon"].shape == (FORGET,)


def test_challenge_cannot_tell_a_perfect_method_from_retraining():
    values = attack(Challenge(ChallengeConfig(models=32)), trial(perfectly)).values
    floor = values["half/forget_score"]
    assert floor.value == pytest.approx(floor.reference, abs=0.1)
    assert floor.reference < 0.6  # the floor itself is far from 1
    ratio = values["final_score"].value / values["forget_score"].value
    assert ratio == pytest.approx(1, abs=0.1)


def test_challenge_can_start_each_unlearning_at_its_own_original():
    given = trial(perfectly)
    attack(Challenge(ChallengeConfig(models=8, fresh_originals=True)), given)
    assert sorted(given.lab.trained) == [RETAIN] * 8 + [FORGET + RETAIN] * 8
