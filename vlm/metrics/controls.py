"""Accuracy on POPE and MME, where the user has them: a model should answer as before."""

from collections.abc import Mapping, Sequence

from mmforget.record import MetricValue
from mmforget.types import ModelView
from mmforget.vlm.benchmarks.fiubench import FIUBenchmark
from mmforget.vlm.generation import generate
from mmforget.vlm.models import VLM
from mmforget.vlm.scoring import Ask
from mmforget.vlm.text_scores import (
    control_accuracy,
    mme_score,
    mme_totals,
    pope_score,
    reference_pope,
)

TOKENS = 8  # of an answer that begins with yes or no


def accuracies(view: ModelView, original: ModelView, bench: FIUBenchmark) -> dict[str, MetricValue]:
    """Return `accuracy` over the controls, it relative to the original's, and each control's own.

    Nothing if no control is named: a missing one is missing, not 0.
    """
    config = bench.config.controls
    if not bench.pope and not bench.mme:
        return {}
    own, before = (_controls(each, bench) for each in (view, original))
    shares = {name: value for name, value in own.items() if name in ("pope", "mme")}
    found = control_accuracy(shares, {name: before[name] for name in shares})
    parsed = f"answers read by {config.parser}"
    values = {
        "accuracy": MetricValue(found.raw, "up", note=f"mean over {', '.join(shares)}; {parsed}"),
        "accuracy_relative": MetricValue(found.relative, "up", note="over the original's"),
    }
    return values | {name: MetricValue(value, "up", note=parsed) for name, value in own.items()}


def _controls(view: ModelView, bench: FIUBenchmark) -> Mapping[str, float]:
    return view.memo("vlm controls", lambda own: _measured(own, bench))


def _measured(view: ModelView, bench: FIUBenchmark) -> dict[str, float]:
    config = bench.config.controls
    found: dict[str, float] = {}
    model = view.model
    assert isinstance(model, VLM)

    def say(asks: Sequence[Ask]) -> list[str]:
        said = generate(
            model,
            bench.chat,
            asks,
            max_new_tokens=TOKENS,
            batch_size=bench.config.eval_rows,
            shared=bench.config.shared_prefix,
            autocast=bench.autocast,
        )
        return [each[0] for each in said]

    if bench.pope:
        told = say([Ask(question.image, question.text) for question in bench.pope])
        labels = [question.label for question in bench.pope]
        score = pope_score(labels, told, config.parser)
        found |= {"pope": score.accuracy, "pope_f1": score.f1, "pope_yes": score.yes_ratio}
        if bench.published:
            script = reference_pope([question.text for question in bench.pope], labels, told)
            found |= {"pope_printed": script.printed, "pope_returned": script.returned}
    if bench.mme:
        images = bench.mme
        told = say([Ask(row.image, text) for row in images for text in row.questions])
        pairs = list(zip(told[::2], told[1::2], strict=True))
        tasks = {
            task: mme_score(
                [row.labels for row in images if row.task == task],
                [pair for row, pair in zip(images, pairs, strict=True) if row.task == task],
                config.parser,
            )
            for task in dict.fromkeys(row.task for row in images)
        }
        totals = mme_totals(tasks)
        found["mme"] = totals.accuracy
        found |= {f"mme/{task}": score.score for task, score in tasks.items()}
    return found
