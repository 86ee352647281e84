"""A small world for tests of methods: 90 users, 120 items, 6 tastes; trains in about a second."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mmforget.context import Context
from mmforget.engine import Engine, Runtime
from mmforget.recsys.adapter import RankingAdapter
from mmforget.recsys.backbones.lightgcn import LightGCN
from mmforget.recsys.data import Interactions, joined
from mmforget.recsys.graph import Graph
from mmforget.recsys.training import Ranking
from mmforget.training import fit
from mmforget.types import Dataset, Splits, Training, UnlearningMethod

USERS, ITEMS, TASTES = 90, 120, 6
RECIPE = Training(epochs=60, lr=0.02, optimizer="adam", batch_size=256)


@dataclass
class World:
    """Splits, a model builder and a trainer, put together as a benchmark does it."""

    splits: Splits
    graph: Graph
    adapter: RankingAdapter
    engine: Engine
    make: Callable[[Graph], nn.Module]

    def build(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make(self.graph)

    def train(
        self, model: nn.Module, data: Dataset, seed: int, state: Path | None = None
    ) -> nn.Module:
        assert isinstance(data, Interactions)
        model.keep(torch.from_numpy(data.edge))  # type: ignore[operator]
        method = Ranking(RECIPE)
        return fit(self.engine, model, self.adapter, data, RECIPE, seed, state, method=method)

    def context(self, model: nn.Module, method: UnlearningMethod[Any], seed: int = 0) -> Context:
        """Return the context of a run on a copy of `model` from which the request was taken."""
        import copy

        student = copy.deepcopy(model)
        self.adapter.apply_request(student, self.splits)
        return Context(
            engine=self.engine,
            adapter=self.adapter,
            model=student,
            splits=self.splits,
            reads=method.reads,
            label="test",
            seed=seed,
            fresh_model=self.fresh,
            train=self.train,
        )

    def preparing(self, model: nn.Module, seed: int = 0) -> Context:
        """Return the context in which a method prepares: it reads `train` only."""
        import copy

        return Context(
            engine=self.engine,
            adapter=self.adapter,
            model=copy.deepcopy(model),
            splits=self.splits,
            reads=frozenset({"train"}),
            label="test",
            seed=seed,
            fresh_model=self.build,
            train=self.train,
        )

    def fresh(self, seed: int) -> nn.Module:
        made = self.build(seed)
        self.adapter.apply_request(made, self.splits)
        return made


def make_world(
    make: Callable[[Graph], nn.Module] = lambda graph: LightGCN(graph, dim=16, layers=2),
    forget: float = 0.1,
    seed: int = 0,
    whole_users: int = 0,
) -> World:
    """Return a world in which a share of edges, or all edges of some users, is forgotten."""
    rng = np.random.default_rng(seed)
    taste_u, taste_i = rng.integers(TASTES, size=USERS), rng.integers(TASTES, size=ITEMS)
    liking = np.where(taste_u[:, None] == taste_i, 0.6, 0.03)
    user, item = np.nonzero(rng.random((USERS, ITEMS)) < liking)
    place = rng.permutation(len(user))
    tested = np.sort(place[: len(user) // 5])
    trained = np.sort(place[len(user) // 5 :])
    graph = Graph(USERS, ITEMS, user[trained], item[trained])
    edge = np.arange(len(trained))
    train = Interactions(user[trained], item[trained], ITEMS, edge)
    if whole_users:
        gone = np.isin(train.user, rng.choice(USERS, whole_users, replace=False))
    else:
        gone = np.isin(edge, rng.permutation(len(edge))[: round(forget * len(edge))])
    every = joined([train], ITEMS)
    forgotten = Interactions(train.user[gone], train.item[gone], ITEMS, edge[gone], known=every)
    retain = train.select(np.nonzero(~gone)[0].tolist())
    unseen = Interactions(user[tested], item[tested], ITEMS)
    seen = joined([train, unseen], ITEMS)
    test = Interactions(user[tested], item[tested], ITEMS, known=seen)
    splits = Splits(forget=forgotten, retain=retain, train=train, holdout=test, test=test)
    engine = Engine(Runtime(device="cpu", threads=1, progress=False))
    return World(splits, graph, RankingAdapter(), engine, make)
