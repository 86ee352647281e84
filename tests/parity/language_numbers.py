"""Golden vectors of language-model audits, mapped to the functions that run."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from mmforget.vlm import scores, text_scores
from mmforget.vlm.scores import TokenScores
from tests.parity.vlm_numbers import scored

Vector = dict[str, Any]


def _answers(inputs: Vector) -> list[TokenScores]:
    """Return the scores of each row of a batch, in double precision."""
    logits = torch.tensor(inputs["logits"], dtype=torch.float64)
    rows = zip(logits, torch.tensor(inputs["labels"]), strict=True)
    return [scored(*row) for row in rows]


def _exact_memorization(inputs: Vector) -> Vector:
    found = [scores.exact_memorization(one.hit, reference=True) for one in _answers(inputs)]
    return {"per_item": found, "mean": float(np.mean(found))}


def _extraction_strength(inputs: Vector) -> Vector:
    found = [scores.extraction_strength(one.hit, reference=True) for one in _answers(inputs)]
    return {"per_item": found, "mean": float(np.mean(found))}


def _probability(inputs: Vector) -> Vector:
    losses = [one.loss for one in _answers(inputs)]
    found = scores.probability(losses)
    return {"avg_loss": losses, "prob": found, "mean": float(found.mean())}


def _min_k(inputs: Vector) -> Vector:
    logits = torch.tensor(inputs["logits"], dtype=torch.float64)
    found = TokenScores.of(logits, torch.tensor(inputs["tokens"]))
    z, raw = found.normalised(), found.normalised(0.0)
    ours: Vector = {}
    for ratio in (0.05, 0.2, 0.4):  # as open-unlearning prints it: large for a non-member
        ours[f"min_k_{ratio}"] = -scores.min_k(found.logp, ratio)
        ours[f"min_k_pp_{ratio}"] = -scores.min_k(z, ratio)
    return {
        "open_unlearning": ours,
        "muse": {
            f"Min-{percent}%": -scores.min_k(found.logp, percent / 100, at_least_one=False)
            for percent in (20, 30, 40, 50)
        },
        "rwku": {f"mink++_{ratio}": scores.min_k(raw, ratio) for ratio in (0.2, 0.5, 1.0)},
        "mean_nll": found.loss,
    }


def _zlib(inputs: Vector) -> Vector:
    score = scores.zlib_ratio(inputs["avg_loss"], inputs["text"])
    return {"score": score, "zlib_bytes": round(inputs["avg_loss"] / score)}


def _truth_ratio(inputs: Vector) -> Vector:
    losses = inputs["correct_avg_loss"], inputs["wrong_avg_losses"]
    ratio = scores.truth_ratio(*losses)
    geometric = 1 / ratio
    arithmetic = scores.inverse_arithmetic_ratio(*losses)
    share = scores.truth_probability(*losses)
    return {
        "closer_to_1_better": {"agg": scores.forget_truth_ratio(ratio), "per_item": geometric},
        "true_better": {"agg": scores.retain_truth_ratio(ratio), "per_item": geometric},
        "prob_mean": {"agg": float(share.mean()), "per_item": share},
        "tofu_model_utility_variant": {
            "forget": scores.forget_truth_ratio(arithmetic),
            "non_forget": scores.retain_truth_ratio(1 / arithmetic),
            "per_item": arithmetic,
        },
        "probability_w_options": float(scores.normalised_probability(*losses).mean()),
    }


def _forget_quality_ks(inputs: Vector) -> Vector:
    ours, theirs = (
        scores.truth_ratio(inputs[f"{who}_paraphrase_loss"], inputs[f"{who}_perturbed_losses"])
        for who in ("unlearned", "retain")
    )
    found = scores.ks_forget_quality(ours, theirs)
    return {
        "tofu_p": found.p,
        "tofu_statistic": found.statistic,
        "open_unlearning_p": scores.ks_forget_quality(1 / ours, 1 / theirs).p,
    }


def _model_utility(inputs: Vector) -> Vector:
    return {
        "harmonic_mean": scores.harmonic_mean(inputs["nine_values"]),
        "harmonic_mean_with_zero": scores.harmonic_mean(inputs["nine_values_with_zero"]),
    }


def _privleak(inputs: Vector) -> Vector:
    unlearned, retrained = (
        scores.memorization_auc(inputs[f"forget_scores_{who}"], inputs["holdout_scores"])
        for who in ("unlearned", "retrained")
    )
    leak = scores.privleak(unlearned, retrained)
    return {
        "auc_unlearned": unlearned,
        "auc_retrained": retrained,
        "privleak": leak,
        "privleak_default_reference": scores.privleak(unlearned, 0.5),
        "rel_diff": scores.auc_difference(unlearned, retrained),
        "muse_auc_unlearned": 1 - unlearned,
        "muse_auc_retrained": 1 - retrained,
        "muse_privleak": leak,
    }


def _verbmem_rouge(inputs: Vector) -> Vector:
    def both(stemmer: bool) -> Vector:
        found = {
            kind: text_scores.rouge(inputs["reference"], inputs["generation"], kind, stemmer)
            for kind in ("rougeL", "rouge1")
        }
        return {
            f"{kind}_{name}": getattr(score, name)
            for kind, score in found.items()
            for name in ("f", "recall")
        }

    return {"muse_no_stemmer": both(False), "open_unlearning_stemmer": both(True)}


ADAPTERS: dict[str, Callable[[Vector], Vector]] = {
    "exact_memorization": _exact_memorization,
    "extraction_strength": _extraction_strength,
    "forget_quality_ks": _forget_quality_ks,
    "min_k": _min_k,
    "language/model_utility": _model_utility,
    "privleak": _privleak,
    "probability": _probability,
    "language/truth_ratio": _truth_ratio,
    "verbmem_rouge": _verbmem_rouge,
    "zlib": _zlib,
}
