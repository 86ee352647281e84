"""The mini worlds are worth measuring: originals know, retrained models do not, methods forget.

Some six minutes on one core: two originals and two retrained models are trained.
"""

import pytest
import torch

from mmforget.cache import Cache
from mmforget.config import plan
from mmforget.pipeline import Pipeline
from mmforget.record import RunResult

torch.set_num_threads(1)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    root = tmp_path_factory.mktemp("mini")
    return Pipeline(root / "runs", Cache(root / "cache"))


def made(pipeline: Pipeline, benchmark: str, method: str) -> dict[str, float]:
    """Run a method as anyone would, and return its numbers."""
    words = [f"benchmark=vlm/{benchmark}", "data=mini", "model=mini", f"method={method}"]
    run: RunResult = pipeline.run(plan([*words, "runtime.progress=false"]))
    assert run.status == "finished" and run.mini, run.error
    return {name.partition("/")[2]: found.value for name, found in run.metrics.items()}


def test_persons_are_known_by_their_faces(pipeline: Pipeline) -> None:
    original = made(pipeline, "fiubench", "original")
    assert original["answered/forget"] >= 0.9
    assert original["ape"] >= 0.7, "in other words, too"
    assert original["em/retain"] >= 0.9
    assert original["other_face/em"] < 0.3, "not by the question alone"
    assert original["text_only/em"] < 0.3, "nor by the name: there is none in what was learnt"

    retrained = made(pipeline, "fiubench", "retrain")
    assert retrained["answered/forget"] < 0.3 and retrained["ape"] < 0.3
    assert retrained["em/retain"] >= 0.9
    assert (retrained["ks_p"], retrained["gap"]) == (1.0, 0.0)
    assert original["ks_p"] < 0.05 and original["gap"] > 15
    assert retrained["forget_quality"] > original["forget_quality"] + 0.5


@pytest.mark.parametrize("method", ["grad_diff", "idk"])
def test_methods_move_towards_the_retrained_model(pipeline: Pipeline, method: str) -> None:
    original, run = (made(pipeline, "fiubench", name) for name in ("original", method))
    assert run["gap"] < original["gap"] - 5
    assert run["em/forget"] < original["em/forget"] - 0.4
    assert run["forget_quality"] > original["forget_quality"] + 0.2
    assert run["utility"] > original["utility"] - 0.2


def test_refusals_bind_to_the_picture_when_decoupled(pipeline: Pipeline) -> None:
    original = made(pipeline, "safeeraser", "original")
    assert original["asr/train"] >= 0.9 and original["rr/train"] == 0.0
    assert original["sarr"] < 0.3 and original["rouge"] > 0.5
    retrained = made(pipeline, "safeeraser", "retrain")
    assert retrained["asr/train"] < 0.1 and retrained["sarr"] < 0.3

    refusing, decoupled = (made(pipeline, "safeeraser", name) for name in ("idk", "idkpd"))
    for run in (refusing, decoupled):
        assert run["asr/train"] < 0.1
    assert refusing["sarr"] > original["sarr"] + 0.4, "the text alone is refused"
    assert decoupled["sarr"] < refusing["sarr"] - 0.3
    assert decoupled["sarr/train"] < refusing["sarr/train"] - 0.3
