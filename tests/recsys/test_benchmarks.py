"""Benchmarks on folders in the published layouts: splits, injected pairs, checkpoints, a run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmforget.cache import Cache
from mmforget.config import plan
from mmforget.errors import DataError, SplitError
from mmforget.pipeline import Pipeline
from mmforget.recsys.backbones.base import Recommender
from mmforget.recsys.data import Interactions
from mmforget.types import Splits
from mmforget.workbench import Bench, Workbench

USERS, ITEMS = 40, 60
BASE = ["data=local", "runtime.device=cpu", "runtime.threads=1", "runtime.progress=false"]
BASE += ["benchmark.training.epochs=30", "benchmark.training.lr=0.02", "model.dim=8"]
BASE += ["benchmark.training.batch_size=128"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two tastes, in LightGCN's text layout; user 39 has no test items."""
    rng = np.random.default_rng(3)
    taste = rng.random((USERS, ITEMS)) < np.where(
        np.arange(USERS)[:, None] % 2 == np.arange(ITEMS) % 2, 0.5, 0.03
    )
    tested = taste & (rng.random(taste.shape) < 0.2)
    tested[39] = False
    root = tmp_path / "data"
    root.mkdir()
    for name, chosen in (("train", taste & ~tested), ("test", tested)):
        lines = [" ".join(map(str, [u, *np.nonzero(row)[0]])) for u, row in enumerate(chosen)]
        (root / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return root


def opened(tmp_path: Path, folder: Path, *words: str) -> tuple[Workbench, Bench, Any]:
    recipe = plan(
        ["benchmark=recsys/unlearnrec", "method=original", f"data.root={folder}", *BASE, *words]
    )
    made = Pipeline(tmp_path / "runs", Cache(tmp_path / "cache"))
    workbench = made.workbench(recipe)
    return workbench, workbench.bench(recipe), recipe


def pairs(data: Any) -> set[tuple[int, int]]:
    assert isinstance(data, Interactions)
    return set(zip(data.user.tolist(), data.item.tolist(), strict=True))


def check_parts(splits: Splits) -> None:
    forget, retain, train = pairs(splits.forget), pairs(splits.retain), pairs(splits.train)
    assert forget | retain == train and not forget & retain
    assert not train & (pairs(splits.test) | pairs(splits.holdout))
    assert splits.val is not None and not pairs(splits.val) & train
    graph = set(zip(splits.train.user.tolist(), splits.train.item.tolist(), strict=True))  # type: ignore[attr-defined]
    assert graph == train
    # A pair that is trained on or tested is never a negative of the forget set or of test.
    for split in (splits.forget, splits.test):
        known = split.known  # type: ignore[attr-defined]
        for user, item in list(train)[:50]:
            assert bool(known.holds(torch.tensor([user]), torch.tensor([item])))


def test_edges(tmp_path: Path, folder: Path) -> None:
    splits = opened(tmp_path, folder)[1].splits
    check_parts(splits)
    assert len(splits.forget) == round(0.05 * len(splits.train))
    askers = {user for user, _ in pairs(splits.forget)}
    assert {user for user, _ in pairs(splits.holdout)} <= askers


def test_users_keep_their_test_pairs_out_of_utility(tmp_path: Path, folder: Path) -> None:
    splits = opened(tmp_path, folder, "request={kind: users, users: [3, 8]}")[1].splits
    check_parts(splits)
    assert {user for user, _ in pairs(splits.forget)} == {3, 8}
    assert {user for user, _ in pairs(splits.holdout)} == {3, 8}
    assert not {user for user, _ in pairs(splits.test)} & {3, 8}


def test_items(tmp_path: Path, folder: Path) -> None:
    splits = opened(tmp_path, folder, "request={kind: items, fraction: 0.1}")[1].splits
    check_parts(splits)
    gone = {item for _, item in pairs(splits.forget)}
    assert len(gone) == 6 and gone >= {item for _, item in pairs(splits.holdout)}
    assert not gone & {item for _, item in pairs(splits.test)}


def test_a_user_without_test_pairs_gives_a_holdout_of_the_others(
    tmp_path: Path, folder: Path
) -> None:
    splits = opened(tmp_path, folder, "request={kind: users, users: [39]}")[1].splits
    assert pairs(splits.holdout) == pairs(splits.test)


def test_validation_leaves_everyone_a_pair_and_can_be_switched_off(
    tmp_path: Path, folder: Path
) -> None:
    splits = opened(tmp_path, folder)[1].splits
    whole = opened(tmp_path, folder, "benchmark.val_fraction=0")[1].splits
    assert whole.val is None and splits.val is not None
    assert pairs(splits.val) | pairs(splits.train) == pairs(whole.train)
    assert 0.05 < len(splits.val) / len(whole.train) < 0.15
    assert {u for u, _ in pairs(splits.train)} == {u for u, _ in pairs(whole.train)}


def test_implausible_pairs_are_injected_and_forgotten(tmp_path: Path, folder: Path) -> None:
    clean = opened(tmp_path, folder)[1].splits
    workbench, bench, recipe = opened(tmp_path, folder, "request={kind: adversarial, share: 0.5}")
    check_parts(bench.splits)
    injected = pairs(bench.splits.forget)
    assert pairs(bench.splits.retain) == pairs(clean.train)
    assert 20 <= len(injected) <= 50
    assert any("injected" in note for note in bench.notes)
    crossing = [(user + item) % 2 for user, item in injected]
    assert np.mean(crossing) > 0.9, "implausible pairs cross the two tastes"
    again = opened(tmp_path, folder, "request={kind: adversarial, share: 0.5}")[1]
    assert pairs(again.splits.forget) == injected
    model, _, _ = workbench.trained(bench, recipe, bench.splits.train, 0, "original")
    assert isinstance(model, Recommender) and bool(model.kept.all())
    model, _, _ = workbench.trained(bench, recipe, bench.splits.retain, 0, "retrained")
    assert isinstance(model, Recommender) and int(model.kept.sum()) == len(bench.splits.retain)


def test_checkpoints_come_back_with_their_graph(tmp_path: Path, folder: Path) -> None:
    workbench, bench, recipe = opened(tmp_path, folder)
    model, _, key = workbench.trained(bench, recipe, bench.splits.retain, 0, "retrained")
    assert isinstance(model, Recommender)
    path = next((tmp_path / "cache").rglob(f"{key}*/model.safetensors"))
    again = bench.benchmark.rebuild(path, model)
    assert isinstance(again, Recommender)
    assert torch.equal(again.final(), model.final()) and torch.equal(again.kept, model.kept)
    # gusye1234/LightGCN-PyTorch's names, without a graph: the forgotten pairs are taken out of it.
    state = {"embedding_user.weight": model.users, "embedding_item.weight": model.items}
    foreign = tmp_path / "lgn.pth.tar.pt"
    torch.save({name: value.detach() for name, value in state.items()}, foreign)
    third = bench.benchmark.rebuild(foreign, model)
    assert isinstance(third, Recommender) and torch.equal(third.final(), model.final())


def test_a_run_ends_to_end(tmp_path: Path, folder: Path) -> None:
    words = ["benchmark=recsys/unlearnrec", "method=grad_diff", f"data.root={folder}", *BASE]
    words += ["method.lr=0.01", "method.optimizer=adam", "method.epochs=2"]
    made = Pipeline(tmp_path / "runs", Cache(tmp_path / "cache")).run(plan(words))
    assert made.status == "finished", made.error
    for name in ("recall@20/test", "recall@20/forget", "mi_bf/probability", "gap/average"):
        assert np.isfinite(made.metrics[name].value), name
    assert set(made.attacks) == {"recsys/membership", "recsys/reconstruct", "relearn"}


def test_the_mini_world_is_worth_measuring(tmp_path: Path) -> None:
    words = ["benchmark=recsys/unlearnrec", "data=mini", "attack=none", "runtime.progress=false"]
    pipeline = Pipeline(tmp_path / "runs", Cache(tmp_path / "cache"))
    made = pipeline.run(plan([*words, "method=grad_diff"]))
    assert made.mini
    original = pipeline.run(plan([*words, "method=original"]))

    def value(name: str) -> float:
        return original.metrics[name].value

    assert value("recall@20/test") > 1.5 * value("popularity/recall@20")
    assert value("gap/membership") > 70, "it has memorised what it is to forget"
    reference = original.metrics["gap/membership"].reference
    assert reference is not None and 45 < reference < 55, "which retraining has not"
    assert made.metrics["gap/average"].value < 0.5 * value("gap/average")
    kept = made.metrics["recall@20/test"]
    assert kept.reference is not None and kept.value > 0.9 * kept.reference


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        opened(tmp_path, tmp_path / "nothing")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError):
        opened(tmp_path, empty)


def test_forgetting_everything_is_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(SplitError, match="forgets all"):
        opened(tmp_path, folder, "request.fraction=1.0")
