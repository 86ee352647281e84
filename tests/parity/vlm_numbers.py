"""Golden vectors of the numbers of VLM unlearning benchmarks, mapped to the functions that run."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from mmforget.vlm import eraser_scores, scores, text_scores
from mmforget.vlm.chat import IGNORED

Vector = dict[str, Any]


def scored(logits: torch.Tensor, labels: torch.Tensor) -> scores.TokenScores:
    """Return scores of the labels [T] that are not -100; the logits [T, V] at t predict t + 1."""
    places = (labels != IGNORED).nonzero().flatten()
    return scores.TokenScores.of(logits[places - 1], labels[places])


def _aggregate_forget_quality(inputs: Vector) -> Vector:
    floor = scores.Floor(inputs["log_p_floor"], ("given",))
    columns = [inputs[name] for name in ("log_p", "exact_memorization", "mia", "ape")]
    return {
        "ks_normalized": [scores.normalised_log_p(p, floor) for p in inputs["log_p"]],
        "average": [
            scores.average_forget_quality(*row, floor, inputs["weights"])
            for row in zip(*columns, strict=True)
        ],
    }


def _sides(inputs: Vector) -> list[tuple[Any, Any]]:
    sides = (inputs["unlearned"], inputs["retain_model"])
    return [(side["paraphrased"], side["perturbed"]) for side in sides]


def _clear_forget_quality(inputs: Vector) -> Vector:
    published = scores.clear_forget_quality(*_sides(inputs), reference=True)
    intended = scores.clear_forget_quality(*_sides(inputs))
    return {
        "reference_p_value": published.p,
        "reference_js": published.js,
        "per_sample_p_value": intended.p,
        "per_sample_js": intended.js,
    }


def _ks_forget_quality(inputs: Vector) -> Vector:
    ours, theirs = (scores.truth_ratio(*side) for side in _sides(inputs))
    found = scores.ks_forget_quality(ours, theirs)
    return {
        "p_value": found.p,
        "statistic": found.statistic,
        "ln_p": found.ln_p,
        "log10_p": found.log10_p,
        "unlearned_truth_ratio": ours,
        "retain_truth_ratio": theirs,
    }


def _mink(inputs: Vector) -> Vector:
    assert tuple(inputs["ratios"]) == scores.RATIOS
    assert tuple(inputs["weights"]) == scores.RATIO_WEIGHTS
    found = scored(torch.tensor(inputs["logits"]), torch.tensor(inputs["labels"]))
    mean = -found.loss
    return {
        "reference_weighted_mink": scores.weighted_min_k(found.logp, reference=True),
        "reference_weighted_minkpp": scores.weighted_min_k_pp(found, reference=True),
        "log_likelihood_mean": mean,
        "zlib_ratio": scores.zlib_ratio(mean, inputs["answer_text_for_zlib"]),
        "token_log_probs_used": found.logp[1:],
        "plain_min_k_all_tokens_mean_logprob": {
            name: scores.min_k(found.logp, float(name)) for name in ("0.2", "0.4")
        },
    }


def _model_utility(inputs: Vector) -> Vector:
    forget, retain = inputs["forget"], inputs["retain"]
    forget_ratio = scores.truth_ratio(forget["para"], forget["pert"])
    retain_ratio = scores.truth_ratio(retain["para"], retain["pert"])
    parts = {
        "rouge": np.mean(retain["rouge"]),
        "probability": scores.normalised_probability(retain["gt"], retain["pert"]).mean(),
        "truth_ratio": scores.retain_truth_ratio(retain_ratio),
        "gpt": np.mean(inputs["retain_gpt_scores"]),
        "em": np.mean(inputs["retain_keyword_em"]),
        "accuracy": inputs["mme_pope_accuracy"],
    }
    measured = {name: float(value) for name, value in parts.items()}
    shipped = {name: value for name, value in measured.items() if name not in ("gpt", "em")}
    return {
        "reference_with_gpt_and_em": {
            "ROUGE Forget": float(np.mean(forget["rouge"])),
            "Prob. Forget": float(scores.probability(forget["gt"]).mean()),
            "Truth Ratio Forget": scores.forget_truth_ratio(forget_ratio),
            "ROUGE Retain": measured["rouge"],
            "Prob. Retain": measured["probability"],
            "Truth Ratio Retain": measured["truth_ratio"],
            "GPT Retain": measured["gpt"],
            "EM Retain": measured["em"],
            "Model Utility": scores.model_utility(measured, "code").value,
        },
        "reference_model_utility_when_gpt_and_em_not_run": scores.model_utility(
            shipped, "code", reference=True
        ).value,
        "hmean_without_missing": scores.model_utility(shipped, "code").value,
        "paper_average": scores.model_utility(measured, "paper").value,
    }


def _perturbation_losses(inputs: Vector) -> Vector:
    right = scored(torch.tensor(inputs["correct_logits"]), torch.tensor(inputs["correct_labels"]))
    wrong = [
        scored(torch.tensor(logits), torch.tensor(labels))
        for logits, labels in zip(
            inputs["perturbed_logits"], inputs["perturbed_labels"], strict=True
        )
    ]
    quirk = scores.reference_loss(right.logp)
    quirks = [scores.reference_loss(one.logp) for one in wrong]
    losses = [scores.per_token_loss(one.logp) for one in wrong]
    return {
        "reference_correct_per_token": quirk,
        "reference_perturbed_per_token": quirks,
        # The log files of the reference hold 1/R.
        "reference_logged_truth_ratio": 1 / float(scores.truth_ratio([quirk], [quirks])[0]),
        "corrected_correct_per_token": [right.loss],
        "corrected_perturbed_per_token": losses,
        "corrected_ratio": scores.truth_ratio([right.loss], [losses]),
    }


def _truth_ratio(inputs: Vector) -> Vector:
    losses = inputs["paraphrased_loss_per_token"], inputs["perturbed_loss_per_token"]
    ratio = scores.truth_ratio(*losses)
    return {
        "per_sample_ratio": ratio,
        "forget_truth_ratio": scores.forget_truth_ratio(ratio),
        "retain_truth_ratio": scores.retain_truth_ratio(ratio),
        "arithmetic_mean_inverse_ratio": scores.inverse_arithmetic_ratio(*losses),
    }


def _judge_score_parse(inputs: Vector) -> Vector:
    found = text_scores.judge_scores(inputs["judge_outputs"], inputs["generations"], reference=True)
    return {"scores": found.scores}


def _keyword_em_ape(inputs: Vector) -> Vector:
    keywords = inputs["keywords"]
    em = text_scores.keyword_scores(keywords, inputs["generations_original_question"])
    ape = text_scores.ape_scores(keywords, inputs["generations_paraphrased_questions"])
    return {
        "exact_memorization_per_sample": em,
        "exact_memorization": text_scores.mean_known(em),
        "ape_per_generation": ape,
        "ape": text_scores.mean_known(ape),
    }


def _mllmu_tasks(inputs: Vector) -> Vector:
    options, told = inputs["options"], inputs["choice_responses"]
    cloze = [[pair[name] for pair in inputs["cloze"]] for name in ("answer", "response")]
    texts = inputs["generation"]
    return {
        "choice_letters": [text_scores.first_letter(text, options) for text in told],
        "choice_accuracy": text_scores.choice_accuracy(inputs["choice_answers"], told, options),
        "cloze_accuracy": text_scores.cloze_accuracy(*cloze),
        "rouge_f": [
            {
                kind: text_scores.rouge(pair["reference"], pair["response"], kind).f
                for kind in text_scores.ROUGE_KINDS
            }
            for pair in texts
        ],
    }


def _mme(inputs: Vector) -> Vector:
    labels, answers = (
        [[pair[side] for pair in image] for image in inputs["images"]] for side in (0, 1)
    )
    return {
        parser: text_scores.mme_score(labels, answers, parser)._asdict()
        for parser in text_scores.PARSERS
    }


def _pope(inputs: Vector) -> Vector:
    labels, answers = inputs["ground_truth"], inputs["predictions"]
    published = text_scores.reference_pope([""] * len(labels), labels, answers)
    return {
        "parsed": [text_scores.first4(text) for text in answers],
        **text_scores.pope_score(labels, answers)._asdict(),
        "reference_reported_score": published.returned,
    }


def _rouge_l_recall(inputs: Vector) -> Vector:
    right, texts = inputs["references"], inputs["raw_generations"]
    whole = [
        text_scores.rouge(one, text, stemmer=inputs["use_stemmer"])
        for one, text in zip(right, texts, strict=True)
    ]
    return {
        "reference_truncated_generations": [text_scores.reference_cut(text) for text in texts],
        "reference_rougeL_recall": text_scores.rouge_recalls(right, texts, reference=True),
        "reference_rouge1_recall": text_scores.rouge_recalls(
            right, texts, "rouge1", reference=True
        ),
        "untruncated_rougeL_recall": text_scores.rouge_recalls(right, texts),
        "untruncated_rouge1_recall": text_scores.rouge_recalls(right, texts, "rouge1"),
        "untruncated_rougeL_f1": [score.f for score in whole],
        "untruncated_rougeL_precision": [score.precision for score in whole],
    }


def _stored(output: str) -> str | None:
    return None if output == "exception" else output


def _safeeraser_asr_rr_sarr(inputs: Vector) -> Vector:
    answers = [answer for pair in inputs["pairs"] for answer in pair["responses"]]
    safety = [_stored(answer["judge_safety"]) for answer in answers]
    refusal = [_stored(answer["judge_refusal"]) for answer in answers]
    normal = [_stored(pair["safe_image"]["judge_normal"]) for pair in inputs["pairs"]]
    asr = eraser_scores.attack_success(safety, reference=True)
    rr = eraser_scores.refusal_rate(refusal, reference=True)
    sarr = eraser_scores.safe_answer_refusal(normal, reference=True)
    return {
        "reference": {
            "total_asr_queries": asr.n,
            "unsafe_count": asr.hits,
            "unsafe_rate": asr.value,
            "total_rr_queries": rr.n,
            "refuse_count": rr.hits,
            "refuse_rate": rr.value,
            "total_sd_rr_queries": sarr.n,
            "sd_refuse_count": sarr.hits,
            "sd_refuse_rate": sarr.value,
        },
        "sarr_over_valid_judgements": eraser_scores.safe_answer_refusal(normal).value,
    }


def _safeeraser_retain_rouge_gpt(inputs: Vector) -> Vector:
    outputs, targets = inputs["model_outputs"], inputs["reference_predictions"]
    recall = eraser_scores.retain_rouge(outputs, targets)
    published = eraser_scores.retain_rouge(outputs, targets, reference=True)
    judged = text_scores.judge_scores(inputs["judge_outputs"], labelled=False, reference=True)
    pairs = zip(targets, outputs, strict=True)
    return {
        "reference": {
            "average_rougeL": text_scores.mean_known(published),
            "average_gpt_score": judged.mean,
        },
        "rougeL_recall_of_reference": recall,
        "rougeL_f1": [text_scores.rouge(target, output).f for target, output in pairs],
    }


ADAPTERS: dict[str, Callable[[Vector], Vector]] = {
    "aggregate_forget_quality": _aggregate_forget_quality,
    "clear_forget_quality": _clear_forget_quality,
    "judge_score_parse": _judge_score_parse,
    "keyword_em_ape": _keyword_em_ape,
    "ks_forget_quality": _ks_forget_quality,
    "mink": _mink,
    "mllmu_tasks": _mllmu_tasks,
    "mme": _mme,
    "vlm/model_utility": _model_utility,
    "perturbation_losses": _perturbation_losses,
    "pope": _pope,
    "rouge_l_recall": _rouge_l_recall,
    "safeeraser_asr_rr_sarr": _safeeraser_asr_rr_sarr,
    "safeeraser_retain_rouge_gpt": _safeeraser_retain_rouge_gpt,
    "vlm/truth_ratio": _truth_ratio,
}
