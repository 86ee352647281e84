"""FIUBench's numbers: forget quality, utility, and what leaks without the image."""

import math
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from mmforget.record import MetricValue
from mmforget.types import Metric, ModelView, Trial
from mmforget.vlm import scores
from mmforget.vlm.benchmarks.fiubench import FIUBenchmark
from mmforget.vlm.judges import label_of, make_prompt
from mmforget.vlm.metrics import controls
from mmforget.vlm.metrics.asked import answers, fiubench, retained_view
from mmforget.vlm.metrics.common import gap, mean

COMPARED = ("rouge/forget", "probability/forget", "truth_ratio/forget", "em/forget", "ape", "mink")
COMPARED_KEPT = ("rouge/retain", "probability/retain", "truth_ratio/retain", "em/retain")


class FIUBenchScores(Metric):
    """Numbers of FIUBench (section 4) on the forget set and on a sample of the retained persons.

    All are shares in [0, 1] unless said otherwise. Forget set; aim: what the retained model has:

    - `rouge/forget`, `probability/forget`, `truth_ratio/forget`: ROUGE-L recall, exp(-loss), and
      mean min(R, 1/R). `em/forget`, `ape`: keywords in answers, and to reworded questions.
      `answered/forget`: answers that hold every keyword.
    - `mink`, `minkpp`, `zlib`: membership scores of true answers; no attack's success.
      `memorized`, `extraction`: tokens predicted first, and the share of an answer that follows
      from its beginning (open-unlearning's exact memorisation and extraction strength).
    - `ks_log_p`: NATURAL log of the p-value of a KS test of R against the retained model's; 0 is
      best. `ks_p`, `ks_statistic`.
    - `forget_quality`: 0.5 KS~ + 0.15 (1 - EM) + 0.2 (1 - MIA) + 0.15 (1 - APE); its note names the
      models that KS~ is scaled by.

    Retained persons, up: the same names with `/retain`; `utility` (paper: mean of ROUGE, judge,
    truth ratio and accuracy), `utility_code` (harmonic mean of five). A part that was not measured
    is left out, and the note says so. A heuristic judge is no part of them.

    `text_only/em`, `text_only/mink`: asked by name without the image. `leak_delta`: min-k with the
    image minus without. `other_face/em`: the forget questions with another face, a control that
    should be low for every model. `gap`: mean distance to the retained model, in points.

    Without a retained model, KS, forget quality and gap are left out: they are not defined.
    """

    citation: ClassVar[str] = "Ma et al., FIUBench, ICLR 2025, arXiv 2411.03554, section 4"

    def compute(self, trial: Trial) -> Mapping[str, MetricValue]:
        """Return the values, `fiubench/...`."""
        bench = fiubench(trial.benchmark)
        base = retained_view(trial, bench)
        values = {
            **_forget(trial.view, bench),
            **_retain(trial.view, bench),
            **_judged(trial.view, bench),
            **controls.accuracies(trial.view, trial.original, bench),
        }
        values |= _utilities(values, bench)
        if base is not None:
            values |= _against(trial, bench, base, values)
        return {f"fiubench/{name}": value for name, value in values.items()}


def _forget(view: ModelView, bench: FIUBenchmark) -> dict[str, MetricValue]:
    table = answers(view, bench, "forget")
    note = "aim: the retained model's value; papers read lower as better"
    values = {
        "rouge/forget": mean(table.rouge, "to_reference", _rouge_note(bench)),
        "probability/forget": mean(scores.probability(table.right), "to_reference"),
        "truth_ratio/forget": _number(
            scores.forget_truth_ratio(table.ratio), "to_reference", len(table), "mean min(R, 1/R)"
        ),
        "em/forget": mean(table.em, "to_reference", note),
        "answered/forget": mean(table.answered, "to_reference"),
        "ape": mean(table.ape, "to_reference", note),
        "mink": mean(table.mink, "to_reference", "a score, not an attack's success"),
        "minkpp": mean(table.minkpp, "to_reference", "weighted exp of Min-K%++ scores"),
        "memorized": mean(table.memorized, "to_reference", "tokens predicted first, of answers"),
        "extraction": mean(table.extraction, "to_reference", "share of an answer extracted"),
        "zlib": mean(table.zlib, "to_reference", "mean log-likelihood / compressed bytes"),
        "loss/forget": mean(table.right, "to_reference", "nats a token"),
    }
    if table.named:
        values["text_only/em"] = mean(
            table.named_em, "to_reference", "by name, no image; keywords in the question left out"
        )
        values["text_only/mink"] = mean(table.named_mink, "to_reference")
        with_image = np.array(
            [scores.weighted_min_k(r.right.logp, table.reference) for r in table.named]
        )
        values["leak_delta"] = mean(
            with_image - table.named_mink, "to_reference", "min-k with the image minus without"
        )
    if len(table.other_em):
        values["other_face/em"] = mean(table.other_em, "to_reference", "control: another face")
    return values


def _retain(view: ModelView, bench: FIUBenchmark) -> dict[str, MetricValue]:
    table = answers(view, bench, "retain")
    name = bench.config.retained
    return {
        "rouge/retain": mean(table.rouge, "up", f"{name}; {_rouge_note(bench)}"),
        "probability/retain": mean(
            scores.normalised_probability(table.right, table.wrong), "up", "against wrong answers"
        ),
        "truth_ratio/retain": _number(
            scores.retain_truth_ratio(table.ratio), "up", len(table), "mean max(0, 1 - 1/R)"
        ),
        "em/retain": mean(table.em, "up"),
        "loss/retain": mean(table.right, "down", "nats a token"),
    }


def _judged(view: ModelView, bench: FIUBenchmark) -> dict[str, MetricValue]:
    """Return the judge's mean score of answers, its failures counted."""
    if not bench.config.judged:
        return {}
    values = {}
    for split, direction in (("forget", "to_reference"), ("retain", "up")):
        rows = answers(view, bench, split).rows
        prompts = [
            make_prompt("agreement", row.item.question, row.said, row.item.answer) for row in rows
        ]
        raw = bench.verdicts.ask(prompts)
        parsed = [label_of("agreement", text) for text in raw]
        known = np.array([value for value in parsed if isinstance(value, float)])
        failed = len(parsed) - len(known)
        note = f"judge {bench.judge.name}; {failed} answers could not be read"
        if bench.judge.heuristic:
            note = f"HEURISTIC, no language model; {note}"
        if len(known):
            values[f"judge/{split}"] = mean(known, direction, note)
    return values


def _utilities(values: Mapping[str, MetricValue], bench: FIUBenchmark) -> dict[str, MetricValue]:
    def held(name: str) -> float | None:
        return values[name].value if name in values else None

    judged = None if bench.config.judged and bench.judge.heuristic else held("judge/retain")
    parts = {
        "rouge": held("rouge/retain"),
        "gpt": judged,
        "truth_ratio": held("truth_ratio/retain"),
        "accuracy": held("accuracy_relative"),
        "probability": held("probability/retain"),
        "em": held("em/retain"),
    }
    found = {}
    for name, form in (("utility", "paper"), ("utility_code", "code")):
        made = scores.model_utility(parts, form, bench.published)
        missing = ", ".join(made.left_out)
        how = "counted as 0 (reference)" if bench.published else "left out"
        kind = "arithmetic" if form == "paper" else "harmonic"
        note = f"{kind} mean" + (f"; not measured and {how}: {missing}" if missing else "")
        if not math.isnan(made.value):
            found[name] = MetricValue(made.value, "up", note=note)
    return found


def _against(
    trial: Trial, bench: FIUBenchmark, base: ModelView, values: Mapping[str, MetricValue]
) -> dict[str, MetricValue]:
    """Return what is defined by comparison with the model that never saw the forget set."""
    wanted = answers(base, bench, "forget").ratio

    def log_p(view: ModelView) -> float:
        return scores.ks_forget_quality(answers(view, bench, "forget").ratio, wanted).ln_p

    own = scores.ks_forget_quality(answers(trial.view, bench, "forget").ratio, wanted)
    found = {
        "ks_p": _number(own.p, "up", len(wanted)),
        "ks_log_p": _number(own.ln_p, "up", len(wanted), "natural logarithm; 0 is best"),
        "ks_statistic": _number(own.statistic, "down", len(wanted)),
    }
    if bench.config.floor is None:
        floor = scores.forget_floor({"original": log_p(trial.original), "this run": own.ln_p})
    else:
        floor = scores.Floor(
            min(bench.config.floor, own.ln_p), (f"benchmark.floor={bench.config.floor}",)
        )
    quality = scores.average_forget_quality(
        own.ln_p, values["em/forget"].value, values["mink"].value, values["ape"].value, floor
    )
    made = ", ".join(floor.made_from)
    if not math.isnan(quality):
        note = f"KS scaled by ln p = {floor.value:.2f}, the least of {made}"
        found["forget_quality"] = _number(quality, "up", len(wanted), note)
    theirs = {**_forget(base, bench), **_retain(base, bench)}
    return found | gap(values, theirs, (*COMPARED, *COMPARED_KEPT))


def _number(value: float, direction: str, n: int, note: str = "") -> MetricValue:
    return MetricValue(float(value), direction, n=n, note=note)


def _rouge_note(bench: FIUBenchmark) -> str:
    return "cut at the first full stop (reference)" if bench.published else "untruncated"
