"""SISA: disjoint shards with a model each; a request retrains the shards that hold its pairs."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mmforget.context import Context
from mmforget.options import option
from mmforget.recsys.backbones.base import Recommender
from mmforget.recsys.backbones.sharded import ShardedRecommender
from mmforget.recsys.data import Interactions
from mmforget.recsys.methods.shards import below, fresh_shard, pairs_of, state_of, train_shard
from mmforget.recsys.partition import hashed
from mmforget.rng import Draws, derive
from mmforget.types import UnlearningMethod

logger = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SISAConfig:
    """Ten shards, as RecEraser's comparison has it; no slices."""

    shards: int = option(10, "shards k, each with a model of its own", low=2)
    by: str = option(
        "interactions",
        "what a shard holds: single pairs, or users with all their pairs",
        choices=("interactions", "users"),
    )
    slices: int = option(
        1, "slices R of a shard, learned one after the other with a checkpoint between", low=1
    )


class SISA(UnlearningMethod[SISAConfig]):
    """Train k models on disjoint shards; score by their mean; retrain only the touched shards.

    A pair's shard and slice are a hash of the seed and its ids, so forgetting x gives, bit for bit
    on one thread, what preparing without x gives: exact unlearning, on condition of the seed. The
    original model is not used; it serves comparison only, and utility is that of k small models.

    With R slices a shard's model learns slice 1, then slices 1 and 2, and so on, each stage with
    the optimiser anew. A stage is the benchmark's recipe in which an epoch draws the share 2/(R+1)
    of the pairs, at random with replacement, so that preparing costs as much as without slices; a
    request goes on from the checkpoint before the first slice that it touches.

    Shards know nothing of each other: a pair of another shard can be drawn as a negative, and a
    graph backbone propagates over the shard's edges alone.
    """

    reads: frozenset[str] = frozenset({"forget", "retain"})
    modalities = frozenset({"recsys"})
    intent: ClassVar[str] = "removal"
    trains: ClassVar[str] = "all weights of the touched shards' models"
    holds: ClassVar[str] = "a model for every shard and slice"
    citation: ClassVar[str] = (
        "Bourtoule et al., Machine Unlearning, IEEE S&P 2021, arXiv 1912.03817"
    )
    config_type: ClassVar[type] = SISAConfig
    prepares: ClassVar[bool] = True

    def prepare(self, ctx: Context) -> Mapping[str, Tensor]:
        """Return the weights of every shard after each of its slices."""
        train = pairs_of(ctx, "train")
        places = self._places(train, ctx.seed)
        made: dict[str, Tensor] = {}
        for shard in range(self.config.shards):
            for stage, model in self._stages(ctx, shard, train, places, 0):
                made |= state_of(model, _prefix(shard, stage))
        return made

    def run(self, ctx: Context) -> nn.Module:
        """Retrain the shards that hold forgotten pairs, from the first slice that does."""
        config = self.config
        forget, retain = pairs_of(ctx, "forget"), pairs_of(ctx, "retain")
        gone, places = self._places(forget, ctx.seed), self._places(retain, ctx.seed)
        first = np.full(config.shards, config.slices)
        np.minimum.at(first, gone.shard, gone.slice)
        touched = np.flatnonzero(first < config.slices).tolist()
        logger.info("%d of %d shards hold forgotten pairs", len(touched), config.shards)
        assert isinstance(ctx.model, Recommender)
        made = ShardedRecommender.like(ctx.model, config.shards)
        for shard, target in enumerate(made.members()):
            state = below(self.prepared, _prefix(shard, config.slices - 1))
            for _, model in self._stages(ctx, shard, retain, places, int(first[shard])):
                state = dict(model.state_dict())
            target.load_state_dict(state)
        made.unite()
        shards = {f"shards.{shard}." for shard in touched}
        ctx.trainable = {
            name: weight
            for name, weight in made.named_parameters()
            if any(name.startswith(shard) for shard in shards)
        }
        return made

    def _stages(
        self, ctx: Context, shard: int, data: Interactions, places: "Places", first: int
    ) -> Iterator[tuple[int, Recommender]]:
        """Train a shard from a slice on; yield each stage with the model after it."""
        slices = self.config.slices
        if first == slices:
            return
        model = fresh_shard(ctx, shard)
        if first:
            model.load_state_dict(below(self.prepared, _prefix(shard, first - 1)))
        for stage in range(first, slices):
            rows = np.flatnonzero((places.shard == shard) & (places.slice <= stage))
            part = data.select(rows)  # type: ignore[arg-type]
            if slices > 1 and len(part):
                part = Shortened(part, 2.0 / (slices + 1))
            model = train_shard(ctx, model, part, shard, stage, self.resume)
            yield stage, model

    def _places(self, data: Interactions, seed: int) -> "Places":
        """Return where pairs belong, by their ids."""
        ids = (data.user,) if self.config.by == "users" else (data.user, data.item)
        slices = hashed(derive(seed, "slices"), self.config.slices, *ids)
        return Places(hashed(derive(seed, "shards"), self.config.shards, *ids), slices)


class Places(NamedTuple):
    """Shard and slice of each pair, int64 [n] each."""

    shard: Ints
    slice: Ints


class Shortened(Interactions):
    """Pairs of which an epoch draws a share: a recipe's epochs become fewer passes.

    Args:
        data: The pairs; all their edges count as training edges.
        share: Examples of an epoch, as a share of the pairs; at least one is drawn.
    """

    def __init__(self, data: Interactions, share: float) -> None:
        super().__init__(data.user, data.item, data.items, data.edge, data.known, by_user=True)
        self._share = share
        self._uniform_users = data.by_user

    def __len__(self) -> int:
        return max(1, round(self._share * len(self.user)))

    def sampled(self, by_user: bool) -> "Shortened":
        """Return the same pairs; `by_user`: draw a user first, otherwise pairs uniformly."""
        found = Shortened(self, self._share)
        found._uniform_users = by_user
        return found

    def redraw(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """Return as many pairs as `draws` holds, drawn with replacement."""
        if self._uniform_users:
            return super().redraw(draws)
        rows = draws.integers(len(self.user)).cpu()
        return torch.from_numpy(self.user)[rows], torch.from_numpy(self.item)[rows]


def _prefix(shard: int, stage: int) -> str:
    return f"shards.{shard}.slices.{stage}."
