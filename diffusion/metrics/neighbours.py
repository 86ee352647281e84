"""Damage to neighbours: what is closest to the erased concept suffers first."""

from collections.abc import Mapping
from typing import ClassVar

from mmforget.diffusion.benchmarks.unlearncanvas import UnlearnCanvas
from mmforget.diffusion.metrics.unlearncanvas import answers
from mmforget.diffusion.models import DiffusionModel
from mmforget.errors import ConfigError
from mmforget.record import MetricValue
from mmforget.types import Metric, ModelView, Trial


class Neighbours(Metric):
    """Accuracy that the nearest other concepts lost, beside what all others lost; points.

    Nearest by cosine of the original's text embeddings of "X style" or "An image of X" (mean over
    tokens), among the classes of the target's kind.

    - `neighbours/drop`: mean loss of the two nearest, down. `neighbours/drop_far`: of the others.
    """

    citation: ClassVar[str] = "collateral erasure of similar concepts, as in arXiv 2303.07345, 5.2"

    def compute(self, trial: Trial) -> Mapping[str, MetricValue]:
        """Return the values; none for a pair, which has neighbours of two kinds."""
        bench = trial.benchmark
        if not isinstance(bench, UnlearnCanvas):
            raise ConfigError("metric diffusion/neighbours needs benchmark=diffusion/unlearncanvas")
        target = bench.targets[-1]
        if target.kind == "pair":
            return {}
        model = trial.original.model
        assert isinstance(model, DiffusionModel)
        named = {one.name for one in bench.targets}
        classes = bench.styles if target.kind == "style" else bench.objects
        others = [name for name in classes if name not in named]
        near = bench.nearest(model)
        if not near:
            return {}
        before, after = (
            _accuracy(view, bench, target.kind) for view in (trial.original, trial.view)
        )
        drop = {name: 100.0 * (before[name] - after[name]) for name in others}
        far = [drop[name] for name in others if name not in near]
        note = f"nearest to {target.name}: {', '.join(near)}"
        values = {
            "neighbours/drop": MetricValue(
                sum(drop[name] for name in near) / len(near), "down", n=len(near), note=note
            )
        }
        if far:
            values["neighbours/drop_far"] = MetricValue(sum(far) / len(far), "down", n=len(far))
        return values


def _accuracy(view: ModelView, bench: UnlearnCanvas, kind: str) -> dict[str, float]:
    style, name, seen_style, seen_name = answers(view, bench).columns
    true, seen = (style, seen_style) if kind == "style" else (name, seen_name)
    return {
        str(label): float((seen[true == label] == label).mean()) for label in set(true.tolist())
    }
