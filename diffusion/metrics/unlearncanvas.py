"""UA, IRA and CRA: what two classifiers see in the answer set."""

import math
from collections.abc import Mapping
from itertools import product
from typing import ClassVar

from mmforget.diffusion import canvas
from mmforget.diffusion.benchmarks.unlearncanvas import UnlearnCanvas
from mmforget.diffusion.canvas import PHOTOS
from mmforget.diffusion.metrics import generated
from mmforget.errors import ConfigError
from mmforget.record import MetricValue
from mmforget.types import Metric, ModelView, Trial


class CanvasScores(Metric):
    """Unlearning accuracy and what is retained (UnlearnCanvas, section 4), fractions in [0, 1].

    - `canvas/UA`: 1 - accuracy of the target, up. `canvas/IRA`: mean accuracy of the other classes
      of its kind, up. `canvas/CRA`: mean accuracy of the other kind over all answers, up. For a
      pair `canvas/SC`, `canvas/OC` and `canvas/UP` in place of IRA and CRA.
    - `canvas/gap`: mean distance of these to the retrained model's, in points, down; left out
      without a retrained model. A high UA alone is no success: a model that paints noise has it.
    - `canvas/style/NAME`, `canvas/object/NAME`: accuracy by class; direction: to the retrained.
    - `sequence/K/...`: after the K-th request of a sequence, UA of every target so far and the mean
      accuracy of all that nobody asked to forget.

    For a sequence UA, IRA and CRA are means over its targets, all judged after the last request;
    IRA and CRA then leave out every target.
    """

    citation: ClassVar[str] = "Zhang et al., UnlearnCanvas, arXiv 2402.11846, section 4"

    def compute(self, trial: Trial) -> Mapping[str, MetricValue]:
        """Return the values."""
        bench = trial.benchmark
        if not isinstance(bench, UnlearnCanvas):
            raise ConfigError(
                "metric diffusion/unlearncanvas needs benchmark=diffusion/unlearncanvas"
            )
        own = _scores(trial.view, bench)
        reference = None if trial.retrained is None else _scores(trial.retrained, bench)
        note = _convention(bench)
        values = {
            f"canvas/{name}": MetricValue(value, "up", n=len(bench.orders()), note=note)
            for name, value in own.items()
            if "/" not in name
        }
        values |= {
            f"canvas/{name}": MetricValue(value, "to_reference")
            for name, value in own.items()
            if "/" in name
        }
        if reference is not None:
            gaps = [abs(own[n] - reference[n]) for n in own if "/" not in n]
            gap = 100.0 * sum(gaps) / len(gaps)
            values["canvas/gap"] = MetricValue(
                gap, "down", 0.0, note="mean of UA, IRA, CRA; points"
            )
        return values | self._sequence(trial, bench)

    def _sequence(self, trial: Trial, bench: UnlearnCanvas) -> dict[str, MetricValue]:
        """Return what is forgotten and kept after each request of a sequence."""
        if not trial.steps:
            return {}
        steps = [
            (str(target.scored()), answers(view, bench))
            for target, view in zip(bench.targets, trial.steps, strict=True)
        ]
        values = {}
        for k, step in enumerate(canvas.sequential(steps, bench.config.photos), start=1):
            for target, value in step.ua.items():
                values[f"sequence/{k}/UA/{target}"] = MetricValue(value, "up")
            values[f"sequence/{k}/retain"] = MetricValue(step.retain, "up")
        return values


def answers(view: ModelView, bench: UnlearnCanvas) -> canvas.Answers:
    """Return the answer set of a model and what both classifiers took it for."""

    def look(own: ModelView) -> canvas.Answers:
        orders = bench.orders()
        style, name = bench.classifiers
        seen: tuple[list[str], list[str]] = ([], [])
        for batch in generated.batches(own, bench, orders):
            for labels, classifier in zip(seen, (style, name), strict=True):
                labels += classifier.predict(batch).label
        keys = [canvas.parse_answer_name(order.name) for order in orders]
        return canvas.Answers(
            style=[key[0] for key in keys],
            object=[key[1] for key in keys],
            seed=[key[2] for key in keys],
            predicted_style=seen[0],
            predicted_object=seen[1],
            styles=bench.themes,
            objects=bench.objects,
            seeds=tuple(bench.config.seeds),
        )

    return view.memo("canvas answers", look)


def _scores(view: ModelView, bench: UnlearnCanvas) -> dict[str, float]:
    """Return UA, IRA, CRA (pair: UA, SC, OC, UP) and the accuracy of every class."""
    table, photos = answers(view, bench), bench.config.photos
    found = canvas.ua_ira_cra(table, bench.targets[-1].scored(), photos)
    classes = {
        **{f"style/{name}": value for name, value in found.style_accuracy.items()},
        **{f"object/{name}": value for name, value in found.object_accuracy.items()},
    }
    if len(bench.targets) == 1:
        return {**found.values, **classes}
    # A sequence: the other classes are those that no request named.
    named = {str(target.scored()): target.kind for target in bench.targets}
    mean: dict[str, list[float]] = {"UA": [], "IRA": [], "CRA": []}
    kept = {
        "style": [v for k, v in found.style_accuracy.items() if k not in named],
        "object": [v for k, v in found.object_accuracy.items() if k not in named],
    }
    for name, kind in named.items():
        other = "object" if kind == "style" else "style"
        mean["UA"].append(1.0 - classes[f"{kind}/{name}"])
        mean["IRA"].append(_mean(kept[kind]))
        mean["CRA"].append(_mean(kept[other]))
    return {**{name: _mean(values) for name, values in mean.items()}, **classes}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _convention(bench: UnlearnCanvas) -> str:
    settings = bench.sampling
    photos = "photos counted as a style" if bench.config.photos else "photos left out"
    pairs = len(list(product(bench.themes, bench.objects)))
    assert PHOTOS in bench.themes
    return (
        f"{pairs} pairs x {len(bench.config.seeds)} seeds, {settings.sampler} {settings.steps} "
        f"steps, guidance {settings.guidance:g}, a CPU seed an image; {photos}"
    )
