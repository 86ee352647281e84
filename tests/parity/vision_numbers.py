"""Golden vectors of metrics and attacks on numbers, mapped to the functions that run."""

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.special import softmax

from mmforget.attacks.challenge import challenge_epsilons, final_score, forget_score, top_bucket
from mmforget.attacks.likelihood import (
    calibrated,
    expected_offline,
    expected_online,
    lira_offline,
    lira_online,
    rmia,
)
from mmforget.metrics.mia import (
    SVC_FEATURES,
    average_gap,
    entropy_mia,
    nomus,
    simple_mia,
    svc_mia,
    threshold_mia,
)
from mmforget.metrics.probes import knn_predict
from mmforget.metrics.ranking import Ranking
from mmforget.metrics.signals import Predictions, entropy, modified_entropy
from mmforget.metrics.similarity import (
    activation_distance,
    js_divergence,
    linear_cka,
    rbf_cka,
    zrf,
)

Vector = dict[str, Any]


def _nomus(inputs: Vector) -> Vector:
    attack = np.array(inputs["mia_accuracy"])
    return {
        "forgetting_score": np.abs(attack - 0.5),
        "nomus": nomus(inputs["test_accuracy"], attack),
    }


def _simple_mia(inputs: Vector) -> Vector:
    found = simple_mia(
        inputs["forget_losses"],
        inputs["unseen_losses"],
        shuffle_seed=inputs["shuffle_seed"],
        splits=inputs["n_splits"],
        cv_seed=inputs["cv_random_state"],
        test_size=inputs["cv_test_size"],
    )
    return {
        "used_forget_losses": found.forget,
        "per_split_accuracy": found.accuracies,
        "mia_accuracy": found.accuracy,
        "forgetting_score": found.forgetting_score,
    }


def _svc_mia(inputs: Vector) -> Vector:
    rates = svc_mia(
        Predictions.of(inputs["shadow_train_logits_retain"], inputs["shadow_train_labels"]),
        Predictions.of(inputs["shadow_test_logits_test"], inputs["shadow_test_labels"]),
        Predictions.of(inputs["target_logits_forget"], inputs["target_labels"]),
        features=tuple(SVC_FEATURES),
        reference=True,
    )
    return {**rates, "mia_reported_percent": 100 * rates["confidence"]}


def _modified_entropy(inputs: Vector) -> Vector:
    probs, labels = np.array(inputs["probs"]), np.array(inputs["labels"])
    return {
        "entropy": entropy(probs),
        "m_entropy_correct": modified_entropy(probs, labels),
        "m_entropy_published_buggy": modified_entropy(probs, labels, reference=True),
    }


def _threshold_mia(inputs: Vector) -> Vector:
    parts = [
        Predictions.of_probs(inputs[name]["probs"], inputs[name]["labels"])
        for name in ("shadow_train", "shadow_test", "target_train", "target_test")
    ]
    return {
        name: {
            "member_recall": found.member_recall,
            "nonmember_recall": found.nonmember_recall,
            "attack_accuracy": found.accuracy,
        }
        for name, found in threshold_mia(*parts).items()
    }


def _average_gap(inputs: Vector) -> Vector:
    retrained = inputs["retrain"]
    if "methods" in inputs:
        rows = inputs["methods"].items()
        return {"average_gap": {name: average_gap(row, retrained)[1] for name, row in rows}}
    gaps, mean = average_gap(inputs["method"], retrained)
    return {"gaps": gaps, "average_gap": mean}


def _entropy_mia(inputs: Vector) -> Vector:
    parts = []
    for name in ("retain_probs", "test_probs", "forget_probs"):
        probs = np.array(inputs[name])
        parts.append(Predictions.of_probs(probs, np.zeros(len(probs))))  # entropy takes no label
    return {
        "mia_svc_member_rate": entropy_mia(*parts),
        "mia_balanced_logreg_member_rate": entropy_mia(*parts, balanced=True),
    }


def _logit_scaled_confidence(inputs: Vector) -> Vector:
    found = Predictions.of(inputs["logits"], inputs["labels"])
    return {"true_class_probability": found.confidence, "logit_scaled_confidence": found.phi}


def _challenge_epsilon(inputs: Vector) -> Vector:
    unlearned, retrained = np.array(inputs["unlearned_confs"]), np.array(inputs["retrained_confs"])
    epsilons = challenge_epsilons(
        unlearned,
        retrained,
        delta=inputs["delta"],
        cap=inputs["epsilon_cap"],
        per_unit=inputs["thresholds_per_unit"],
    )
    score = forget_score(epsilons, len(unlearned), inputs["bucket_size"])
    return {
        "epsilons": epsilons,
        "max_epsilon": top_bucket(len(unlearned)),
        "forget_score": score,
        "final_score": final_score(
            score,
            retain=(inputs["retain_acc_unlearned"], inputs["retain_acc_retrained"]),
            test=(inputs["test_acc_unlearned"], inputs["test_acc_retrained"]),
        ),
    }


def _lira(inputs: Vector) -> Vector:
    target, inside, outside, membership = (
        np.array(inputs[name])
        for name in ("target_signal", "in_signals", "out_signals", "membership")
    )
    scores = {
        "lira_online": lira_online(target, inside, outside),
        "lira_online_fixed_variance": lira_online(
            target, inside, outside, fixed_variance=True, reference=True
        ),
        "lira_offline_one_sided": -np.expm1(-lira_offline(target, outside)),
        "calibrated_out": calibrated(target, outside),
        "calibrated_in_out": calibrated(target, outside, inside),
    }
    return {f"{name}_score": score for name, score in scores.items()} | {
        "auc": {name: _auc(score, membership) for name, score in scores.items()}
    }


def _rmia(inputs: Vector) -> Vector:
    x, x_in, x_out = (np.array(inputs[f"{name}_confidence"]) for name in ("target", "in", "out"))
    z, z_in, z_out = (
        np.array(inputs[f"population_{name}_confidence"]) for name in ("target", "in", "out")
    )
    membership, gamma = np.array(inputs["membership"]), inputs["gamma"]
    expected_z = expected_online(z_in, z_out)  # in the published code for the offline form too
    online = rmia(x, expected_online(x_in, x_out), z, expected_z, gamma)
    offline = rmia(x, expected_offline(x_out, inputs["offline_a"]), z, expected_z, gamma)
    return {
        "online_score": online,
        "online_auc": _auc(online, membership),
        "offline_score": offline,
        "offline_auc": _auc(offline, membership),
    }


def _cka(inputs: Vector) -> Vector:
    x, y = np.array(inputs["X"]), np.array(inputs["Y"])
    return {
        "linear_cka": linear_cka(x, y),
        "linear_cka_self": linear_cka(x, x),
        "kernel_cka_rbf_median": rbf_cka(x, y),
    }


def _knn_transfer(inputs: Vector) -> Vector:
    predicted = knn_predict(
        inputs["train_features"], inputs["train_labels"], inputs["test_features"], inputs["k"]
    )
    accuracy = float((predicted == np.array(inputs["test_labels"])).mean())
    # These vectors store 8 decimals and compare at 1e-9.
    return {"accuracy": round(accuracy, 8), "predictions": predicted}


def bad_teacher_metrics(inputs: Vector) -> Vector:
    """Return the metric outputs of the `bad_teacher` family; its losses are a method's."""
    student, random = (
        softmax(np.array(inputs[name], dtype=np.float64), axis=1)
        for name in ("student_logits", "bad_teacher_logits")
    )
    return {
        "reference_jsdiv": float(js_divergence(student, random, reference=True).mean()),
        "zrf_reference": zrf(student, random, reference=True),
        "textbook_js_divergence": float(js_divergence(student, random).mean()),
        "activation_distance": float(activation_distance(student, random).mean()),
    }


def _auc(scores: Any, membership: Any) -> float:
    return Ranking.of(scores[membership == 1], scores[membership == 0]).auc


ADAPTERS: dict[str, Callable[[Vector], Vector]] = {
    "nomus": _nomus,
    "simple_mia": _simple_mia,
    "svc_mia_forget_efficacy": _svc_mia,
    "modified_entropy": _modified_entropy,
    "threshold_mia": _threshold_mia,
    "average_gap": _average_gap,
    "entropy_mia": _entropy_mia,
    "logit_scaled_confidence": _logit_scaled_confidence,
    "challenge_epsilon": _challenge_epsilon,
    "lira": _lira,
    "rmia": _rmia,
    "cka": _cka,
    "knn_transfer": _knn_transfer,
}
