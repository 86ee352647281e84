"""The mini worlds: published layouts, seeds, and that they are worth measuring."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from mmforget.engine import Engine, Runtime
from mmforget.recsys import mini
from mmforget.recsys.adapter import RankingAdapter
from mmforget.recsys.backbones.lightgcn import LightGCN
from mmforget.recsys.data import Interactions
from mmforget.recsys.formats import Table, read_table
from mmforget.recsys.graph import Graph
from mmforget.recsys.training import Ranking
from mmforget.rng import derive
from mmforget.training import fit
from mmforget.types import Training

torch.set_num_threads(1)

RECIPE = Training(epochs=25, lr=0.03, optimizer="adam", batch_size=2048)
K = 20


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(folder.iterdir())
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.parametrize(
    ("write", "names"),
    [
        (mini.write_unlearnrec, ["test.txt", "train.txt"]),
        (mini.write_mmrec_mini, ["image_feat.npy", "mini.inter", "text_feat.npy"]),
    ],
)
def test_a_seed_gives_the_same_bytes(
    write: Callable[[Path, int], None], names: list[str], tmp_path: Path
) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write(tmp_path / name, seed)
    first, again, other = (_hashes(tmp_path / name) for name in "abc")
    assert list(first) == names and first == again
    assert all(first[name] != other[name] for name in names)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_worlds_are_clean_and_of_the_size_they_say(seed: int, tmp_path: Path) -> None:
    mini.write_unlearnrec(tmp_path / "lightgcn", seed)
    mini.write_mmrec_mini(tmp_path / "mmrec", seed)
    for layout in ("lightgcn", "mmrec"):
        table = read_table(tmp_path / layout)
        assert (table.format, table.users, table.items, table.notes) == (layout, 600, 800, ())
        parts = [len(part[0]) for part in (table.train, table.val, table.test) if part is not None]
        assert abs(sum(parts) - 20_000) < 300
        shares = [0.8, 0.2] if layout == "lightgcn" else [0.8, 0.1, 0.1]
        assert np.abs(np.array(parts) / sum(parts) - shares).max() < 0.005
        degrees = np.sort(np.bincount(table.train[1], minlength=800))[::-1]
        assert degrees[:80].sum() > 0.25 * degrees.sum()  # a tenth of the items
    assert {name: values.shape for name, values in table.features.items()} == {
        "image": (800, 32),
        "text": (800, 24),
    }


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_features_tell_the_genre_but_not_surely(seed: int, tmp_path: Path) -> None:
    mini.write_mmrec_mini(tmp_path, seed)
    world = mini.draw_world(np.random.default_rng(derive(seed, "mmrec")))
    genre = world.genres.argmax(1)
    for values in read_table(tmp_path).features.values():
        unit = values / np.linalg.norm(values, axis=1, keepdims=True)
        near = unit @ unit.T
        np.fill_diagonal(near, -2)
        same = genre[np.argsort(-near, axis=1)[:, :10]] == genre[:, None]
        chance = (genre[:, None] == genre).mean()
        assert 0.6 < same.mean() < 0.95 and chance < 0.1


def _scores(table: Table, edges: Any, seed: int) -> Any:
    """Return the scores of a small LightGCN trained on some of the training pairs, [U, I]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        graph = Graph(table.users, table.items, *table.train)
        model = LightGCN(graph, dim=32, layers=2, decay=1e-3)
    user, item = table.train
    model.keep(torch.from_numpy(edges))
    data = Interactions(user[edges], item[edges], table.items, edges)
    engine = Engine(Runtime(device="cpu", threads=1, progress=False))
    fit(engine, model, RankingAdapter(), data, RECIPE, seed, None, method=Ranking(RECIPE))
    rows = model.final().numpy()
    return rows[: table.users] @ rows[table.users :].T


def _recall(scores: Any, table: Table) -> float:
    """Return Recall@20 over all items but the user's training items, by definition."""
    scores = scores.copy()
    scores[table.train] = -np.inf
    top = np.argsort(-scores, axis=1, kind="stable")[:, :K]
    wanted = np.zeros(scores.shape, np.bool_)
    wanted[table.test] = True
    counts = wanted.sum(1)
    hits = np.take_along_axis(wanted, top, axis=1).sum(1)
    return float((hits[counts > 0] / counts[counts > 0]).mean())


def _told_apart(scores: Any, forgotten: Any, unseen: Any) -> tuple[float, float]:
    """Return the AUC of forgotten against unseen pairs, by score and by BPR loss."""
    rng = np.random.default_rng(0)
    score, loss = [], []
    for user, item in (forgotten, unseen):
        others = scores[user[:, None], rng.integers(scores.shape[1], size=(len(user), 20))]
        score.append(scores[user, item])
        loss.append(np.logaddexp(0, others - scores[user, item][:, None]).mean(1))
    member = np.repeat([1, 0], [len(part) for part in score])
    by_score = roc_auc_score(member, np.concatenate(score))
    return float(by_score), float(roc_auc_score(member, -np.concatenate(loss)))


@pytest.mark.parametrize(
    "seed", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_a_model_beats_popularity_and_remembers_what_it_was_trained_on(
    seed: int, tmp_path: Path
) -> None:
    mini.write_unlearnrec(tmp_path, seed)
    table = read_table(tmp_path)
    user, item = table.train
    edges = np.arange(len(user))
    gone = np.random.default_rng(seed).random(len(user)) < 0.05
    original = _scores(table, edges, seed)
    retrained = _scores(table, edges[~gone], seed)

    popularity = np.bincount(item, minlength=table.items).astype(np.float64)
    base = _recall(np.tile(popularity, (table.users, 1)), table)
    assert _recall(original, table) > 1.5 * base > 0.1
    assert _recall(retrained, table) > 1.5 * base

    forgotten = (user[gone], item[gone])
    for auc in _told_apart(original, forgotten, table.test):
        assert auc > 0.7
    for auc in _told_apart(retrained, forgotten, table.test):
        assert abs(auc - 0.5) < 0.05
