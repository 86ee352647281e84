"""What the recommender benchmarks share: data, requests, splits, training, report."""

import hashlib
import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mmforget.checkpoint import fit_state, read_state, state_sha
from mmforget.engine import Engine
from mmforget.errors import SplitError
from mmforget.options import option
from mmforget.record import MetricValue, RunResult
from mmforget.recsys import mini, report
from mmforget.recsys.adapter import RankingAdapter
from mmforget.recsys.backbones.base import Recommender
from mmforget.recsys.backbones.build import ModelConfig, build_backbone, foreign_state
from mmforget.recsys.backbones.sharded import ShardedRecommender, shards_in
from mmforget.recsys.data import Interactions, Known, joined
from mmforget.recsys.formats import FORMATS, Table, read_table
from mmforget.recsys.graph import Graph
from mmforget.recsys.training import Ranking
from mmforget.report.section import Section
from mmforget.rng import derive
from mmforget.sources import local_folder, mini_world
from mmforget.training import fit
from mmforget.types import Benchmark, Dataset, Splits, Training, Trial

logger = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class DataConfig:
    """Where the interactions come from."""

    source: str = option(
        "mini", "mini: a world generated here; local: a folder", choices=("mini", "local")
    )
    root: str | None = option(None, "folder in a published layout, for source=local")
    format: str = option("auto", "its layout; auto looks at the files", choices=FORMATS)
    seed: int = option(0, "which mini world is drawn", low=0)
    test_fraction: float = option(
        0.2,
        "share of each user's pairs that is test, where the data have no split",
        low=0,
        high=0.9,
    )
    split_seed: int = option(0, "seed of that choice, and of the validation split", low=0)


@dataclass(frozen=True)
class RecommenderConfig:
    """Options of the recommender benchmarks; training as gusye1234/LightGCN-PyTorch publishes it.

    Published recipes without a validation set choose by the test set. Here a share of the training
    pairs is held out for tuning unless the data bring such a set; `val_fraction=0` gives numbers
    that can stand beside published ones.
    """

    training: Training = option(
        Training(epochs=200, lr=1e-3, optimizer="adam", batch_size=2048), "training recipe"
    )
    sampling: str = option(
        "interaction",
        "examples of an epoch: each pair once, or as many draws of a user and one of its pairs",
        choices=("interaction", "user"),
    )
    negatives: int = option(1, "negatives of each pair", low=1)
    val_fraction: float = option(
        0.1, "share of each user's training pairs held out for tuning", low=0, high=0.5
    )
    ks: list[int] = option([10, 20, 50], "cut-offs of the ranking metrics; 20 is always computed")
    mask: str = option(
        "train",
        "what is left out of a user's ranking on test and val: all training pairs, or only the "
        "kept ones (a system that forgot cannot mask what it does not know)",
        choices=("train", "kept"),
    )
    catalogue: str = option(
        "keep",
        "whether items that lost all their pairs can be recommended; `drop` forgets them for free",
        choices=("keep", "drop"),
    )


class RecommenderBenchmark(Benchmark):
    """A benchmark of pairs of user and item.

    A subclass says what is forgotten (`request_mask`) and which mini world it has.

    Users forgotten whole: test is the pairs of the other users, holdout those of the forgotten.
    Items forgotten whole: likewise by items. Single pairs: test is all test pairs, holdout those of
    the users who asked. Where that leaves no holdout, it is all test pairs.

    Attributes:
        mini_name: Name of its mini world below the store.
        engine: Set by the workbench before `splits`.
    """

    data_type: ClassVar[type] = DataConfig
    model_type: ClassVar[type] = ModelConfig
    config_type: ClassVar[type] = RecommenderConfig
    metrics: ClassVar[tuple[str, ...]] = (
        "recsys/ranking",
        "recsys/mi",
        "recsys/gap",
        "recsys/groups",
        "cost",
    )
    attacks: ClassVar[tuple[str, ...]] = ("recsys/membership", "recsys/reconstruct", "relearn")
    headline: ClassVar[tuple[str, ...]] = (
        "recall@20/test",
        "ndcg@20/test",
        "recall@20/forget",
        "mi_bf/probability",
        "mi_ng/probability",
        "gap/average",
    )
    distance: ClassVar[str] = "gap/average"
    mini_name: ClassVar[str] = "lightgcn"

    def __init__(self, config: Any, data: Any, model: Any, request: Any, store: Path) -> None:
        super().__init__(config, data, model, request, store)
        self.adapter = RankingAdapter(config.negatives)

    @abstractmethod
    def request_mask(self, train: Interactions, table: Table) -> Bools:
        """Return which training pairs are forgotten, [n].

        Raises:
            SplitError: The request names what is not there, nothing, or everything.
        """

    @classmethod
    @abstractmethod
    def write_mini(cls, folder: Path, seed: int) -> None:
        """Write the mini world of a seed into `folder`, in the published layout."""

    def inject(self, table: Table) -> Table:
        """Return the data set that is trained on; some protocols add pairs to it."""
        return table

    def splits(self) -> Splits:
        """Read the data and apply the request; see `Benchmark.splits`."""
        table = self.inject(self._held_out(self._table()))
        for note in table.notes:
            logger.info("%s", note)
        self.notes = table.notes
        self.table = table
        user, item = table.train
        edge = np.arange(len(user), dtype=np.int64)
        self.graph = Graph(table.users, table.items, user, item)
        train = Interactions(user, item, table.items, edge)
        gone = self.request_mask(train, table)
        self._retained = torch.from_numpy(~gone)
        retain = train.select(np.nonzero(~gone)[0])  # type: ignore[arg-type]
        known = joined([train], table.items)
        forget = Interactions(user[gone], item[gone], table.items, edge[gone], known)
        seen = Known(*self._every(table), table.items)
        holdout, test = self._unseen(table.test, forget, retain, seen, "test")
        val = None
        if table.val is not None and len(table.val[0]):
            val = self._unseen(table.val, forget, retain, seen, "val")[1]
        return Splits(
            forget=forget, retain=retain, train=train, holdout=holdout, test=test, val=val
        )

    def fingerprint(self) -> Mapping[str, Any]:
        """Return the training pairs, sampling, architecture and features; after `splits`."""
        digest = hashlib.sha256(f"{self.table.users}x{self.table.items}".encode())
        for column in self.table.train:
            digest.update(column.tobytes())
        for name, values in sorted(self.table.features.items()):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(values).tobytes())
        model = asdict(self.model)
        if self.model.checkpoint is not None:
            model["checkpoint"] = state_sha(self.build(0))
        return {
            "data": digest.hexdigest(),
            "sampling": self.config.sampling,
            "negatives": self.config.negatives,
            "model": model,
        }

    def build(self, seed: int) -> nn.Module:
        """Return a freshly initialised recommender on the graph of all training pairs."""
        model = build_backbone(self.model, self.graph, self._features(self.table), seed)
        if self.model.checkpoint is not None:
            every = torch.ones(len(self.graph), dtype=torch.bool)
            self._load(model, Path(self.model.checkpoint).expanduser(), every)
        return model

    def rebuild(self, path: Path, start: nn.Module) -> nn.Module:
        """Return the model of a checkpoint: a plain one, or shards whose scores are averaged.

        Checkpoints of other code bases hold no graph: the forgotten pairs are then taken out of it.
        """
        model = self.build(0)
        assert isinstance(model, Recommender)
        count = shards_in(read_state(path))
        if count:
            model = ShardedRecommender.like(model, count)
        self._load(model, path, self._retained)
        return model

    def train(
        self, engine: Engine, model: nn.Module, data: Dataset, seed: int, state: Path | None
    ) -> nn.Module:
        """Train on some pairs with the backbone's published loss; the graph holds these pairs."""
        assert isinstance(model, Recommender) and isinstance(data, Interactions)
        model.keep(torch.from_numpy(data.edge))
        data = data.sampled(self.config.sampling == "user")
        method = Ranking(self.training)
        return fit(engine, model, self.adapter, data, self.training, seed, state, method=method)

    def collapsed(self, metrics: Mapping[str, MetricValue]) -> str | None:
        """Return why the utility is gone: the most popular items would do as well."""
        recall, floor = metrics.get("recall@20/test"), metrics.get("popularity/recall@20")
        if recall is None or floor is None or recall.value > floor.value:
            return None
        return (
            f"Recall@20 on test {recall.value:.4f} does not beat a ranking by popularity "
            f"({floor.value:.4f})"
        )

    def samples(self, trial: Trial, folder: Path) -> None:
        """Write score histograms and ranking by user group; see `report.write`."""
        report.write(trial, folder)

    @classmethod
    def sections(cls, runs: Sequence[RunResult]) -> Sequence[Section]:
        """Return the sections only recommenders have."""
        return report.sections(runs)

    def candidates(self, retain: Interactions) -> Bools | None:
        """Return which items can be recommended, [I]; None: all."""
        if self.config.catalogue == "keep":
            return None
        had, has = np.zeros(self.table.items, np.bool_), np.zeros(self.table.items, np.bool_)
        had[self.table.train[1]] = True
        has[retain.item] = True
        return has | ~had

    def _unseen(
        self,
        pairs: tuple[Ints, Ints],
        forget: Interactions,
        retain: Interactions,
        seen: Known,
        name: str,
    ) -> tuple[Interactions, Interactions]:
        """Return the unseen pairs that match the forget set, and those that measure utility."""
        user, item = pairs
        kind = self.request_kind()
        asked = np.zeros(len(user), np.bool_)
        if kind in ("users", "users_items"):
            asked |= ~np.isin(user, retain.user) & np.isin(user, forget.user)
        if kind in ("items", "users_items"):
            asked |= ~np.isin(item, retain.item) & np.isin(item, forget.item)
        matched = asked if kind != "edges" else np.isin(user, forget.user)
        useful = ~asked
        if not useful.any():
            raise SplitError(f"the request leaves no {name} pairs of users and items that are kept")
        if not matched.any():
            logger.warning("no %s pairs match the forget set; all of them are the holdout", name)
            matched = useful
        made = [
            Interactions(user[rows], item[rows], self.table.items, known=seen)
            for rows in (matched, useful)
        ]
        return made[0], made[1]

    def request_kind(self) -> str:
        """Return what is forgotten: edges, users, items or users_items."""
        kind: str = self.request.kind
        return kind

    def _features(self, table: Table) -> Mapping[str, Tensor]:
        return {
            name: torch.from_numpy(np.array(values, np.float32))
            for name, values in table.features.items()
        }

    def _every(self, table: Table) -> tuple[Ints, Ints]:
        parts = [table.train, table.test, *([table.val] if table.val is not None else [])]
        return (
            np.concatenate([part[0] for part in parts]),
            np.concatenate([part[1] for part in parts]),
        )

    def _held_out(self, table: Table) -> Table:
        """Hold a share of each user's training pairs out, unless the data have a validation set."""
        if table.val is not None or not self.config.val_fraction:
            return table
        user, item = table.train
        rng = np.random.default_rng(derive(self.data.split_seed, "validation"))
        order = np.lexsort((rng.random(len(user)), user))
        counts = np.bincount(user, minlength=table.users)
        place = np.arange(len(user)) - np.repeat(np.cumsum(counts) - counts, counts)
        wanted = np.floor(self.config.val_fraction * counts + rng.random(len(counts)))
        wanted = np.minimum(wanted, np.maximum(counts - 1, 0))
        held = np.zeros(len(user), np.bool_)
        held[order] = place < np.repeat(wanted, counts)
        if not held.any():
            return table
        note = f"{int(held.sum())} training pairs are held out for validation"
        return replace(
            table,
            train=(user[~held], item[~held]),
            val=(user[held], item[held]),
            notes=(*table.notes, note),
        )

    def _load(self, model: nn.Module, path: Path, kept: Tensor) -> None:
        """Load weights; `kept` are the edges of a checkpoint that says nothing of them."""
        state = dict(foreign_state(read_state(path)))
        if not shards_in(state):
            state.setdefault("kept", kept)
        fit_state(model, state, path)

    def _table(self) -> Table:
        data = self.data
        if data.source == "local":
            root = local_folder(data.root, self.name)
        else:
            world = f"{self.mini_name}-v{mini.VERSION}-s{data.seed}"
            root = mini_world(self.store / "mini" / world, self.write_mini, data.seed)
        return read_table(root, data.format, data.test_fraction, data.split_seed)
