"""UnlearnRec: forget random, injected, or a user's or item's interactions of a recommender."""

import hashlib
import json
import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from mmforget.errors import ConfigError, SplitError
from mmforget.record import load_arrays, save_arrays
from mmforget.recsys import mini
from mmforget.recsys.adversarial import implausible_edges
from mmforget.recsys.backbones.base import Recommender
from mmforget.recsys.backbones.build import build_backbone
from mmforget.recsys.benchmarks.base import Bools, Ints, RecommenderBenchmark
from mmforget.recsys.data import Interactions, Known
from mmforget.recsys.formats import Table
from mmforget.recsys.graph import Graph
from mmforget.recsys.requests import (
    AdversarialRequest,
    forgotten_pairs,
    places,
    read_injected,
)
from mmforget.rng import derive

logger = logging.getLogger(__name__)


class UnlearnRecBenchmark(RecommenderBenchmark):
    """The protocol of UnlearnRec (arXiv 2505.22649).

    `request.kind=adversarial` is its test of effectiveness: a model trained on the clean data names
    for every user the lowest-scored item and for every item the lowest-scored user (a random share
    of them), these pairs are added to the training data, and then exactly they are forgotten. The
    injected pairs are stored beside the mini worlds, keyed by data, model and recipe.
    """

    name: ClassVar[str] = "recsys/unlearnrec"
    citation: ClassVar[str] = "UnlearnRec, arXiv 2505.22649"
    request_type: ClassVar[type] = AdversarialRequest

    def request_kind(self) -> str:
        """Return what is forgotten; injected pairs are edges."""
        return "edges" if self.request.kind == "adversarial" else super().request_kind()

    def request_mask(self, train: Interactions, table: Table) -> Bools:
        """Return which training pairs are forgotten; see `RecommenderBenchmark.request_mask`."""
        if self.request.kind != "adversarial":
            return forgotten_pairs(self.request, train, table)
        chosen = np.zeros(len(train), np.bool_)
        chosen[places(self._injected, train)] = True
        return chosen

    def inject(self, table: Table) -> Table:
        """Return the data with the implausible pairs added, for `request.kind=adversarial`."""
        if self.request.kind != "adversarial":
            return table
        if self.request.users or self.request.items or self.request.edges:
            raise SplitError("request.kind=adversarial names its pairs itself, or by request.file")
        if self.request.file:
            user, item = read_injected(Path(self.request.file), table)
        else:
            user, item = self._implausible(table)
        seen = Known(*self._every(table), table.items)
        fresh = ~seen.holds(torch.from_numpy(user), torch.from_numpy(item)).numpy()
        if not fresh.any():
            raise SplitError("every injected pair is already in the data; nothing can be injected")
        self._injected = (user[fresh], item[fresh])
        users = np.concatenate([table.train[0], user[fresh]])
        items = np.concatenate([table.train[1], item[fresh]])
        order = np.lexsort((items, users))
        note = f"{int(fresh.sum())} implausible pairs were injected into the training data"
        return replace(table, train=(users[order], items[order]), notes=(*table.notes, note))

    def _implausible(self, table: Table) -> tuple[Ints, Ints]:
        """Return the pairs that a model of the clean data finds worst; computed once, stored."""
        recipe = {
            "training": self.training.recipe(),
            "model": asdict(self.model),
            "sampling": self.config.sampling,
            "negatives": self.config.negatives,
            "share": self.request.share,
            "seed": self.request.seed,
        }
        digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode())
        for column in self._every(table):
            digest.update(column.tobytes())
        path = self.store / "adversarial" / f"{digest.hexdigest()[:32]}.npz"
        if not path.is_file():
            user, item = self._worst(table)
            save_arrays(path, {"": {"user": user, "item": item}})
        found = load_arrays(path)[""]
        return found["user"], found["item"]

    def _worst(self, table: Table) -> tuple[Ints, Ints]:
        engine = self.engine
        assert engine is not None, "a benchmark is opened by a workbench, which sets its engine"
        if engine.world > 1:
            raise ConfigError(
                "request.kind=adversarial trains a model to name its pairs; run it once on one "
                "process, and several will find the stored pairs"
            )
        logger.info("training a model on the clean data, which names the pairs to inject")
        edge = np.arange(len(table.train[0]), dtype=np.int64)
        clean = Interactions(*table.train, table.items, edge)
        graph = Graph(table.users, table.items, *table.train)
        features = self._features(table)
        seed = derive(self.request.seed, "adversarial")
        model = build_backbone(self.model, graph, features, seed)
        trained = self.train(engine, engine.place(model), clean, seed, None)
        assert isinstance(trained, Recommender)
        known = Known(*self._every(table), table.items)
        return implausible_edges(
            trained.final(), known, table.users, table.items, self.request.share, seed
        )

    @classmethod
    def write_mini(cls, folder: Path, seed: int) -> None:
        """Write the mini world; see `mini.write_unlearnrec`."""
        mini.write_unlearnrec(folder, seed)
