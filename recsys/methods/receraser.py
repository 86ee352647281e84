"""RecEraser: shards of like pairs, and an attention that puts their embeddings together."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.func import functional_call

from mmforget.context import Context
from mmforget.errors import ConfigError
from mmforget.methods.base import LossMethod
from mmforget.options import option
from mmforget.recsys.adapter import Pairs, outputs, rows_of
from mmforget.recsys.backbones.base import Recommender
from mmforget.recsys.backbones.mf import MatrixFactorisation
from mmforget.recsys.data import Interactions, Known
from mmforget.recsys.methods.shards import fresh_shard, pairs_of, train_shard
from mmforget.recsys.partition import balanced_kmeans, by_interactions, first_centroids, hashed
from mmforget.rng import Draws, derive, generator
from mmforget.training import optimise
from mmforget.types import Batch, Pass, Training, UnlearningMethod

logger = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RecEraserConfig:
    """Defaults of the published code; the aggregation's learning rate and batch are LightGCN's."""

    shards: int = option(10, "shards k", low=2)
    partition: str = option(
        "inbp",
        "pairs by their user's and item's vectors (inbp), users by theirs (ubp), or pairs by a "
        "hash of their ids (random): the only one that deleted pairs do not enter",
        choices=("inbp", "ubp", "random"),
    )
    vectors: str = option(
        "final",
        "pre-trained vectors for inbp and ubp: the original's final vectors, or its free tables",
        choices=("final", "free"),
    )
    rounds: int = option(50, "rounds T of inbp and ubp; they stop when nothing changes", low=1)
    slack: float = option(1.2, "a shard takes elements while it holds fewer than slack·n/k", low=1)
    reference: bool = option(
        False, "centroids of inbp and ubp collapse to one number, as in the published code"
    )
    negatives: str = option(
        "shard",
        "negatives are items of the shard that the user did not choose: in the shard, or in any "
        "(global, the published code; shards then know of each other's pairs)",
        choices=("shard", "global"),
    )
    aggregation_epochs: int = option(50, "passes of the attention over the retain set", low=0)
    aggregation_lr: float = option(1e-3, "learning rate of the attention (Adam)", low=0)
    aggregation_batch_size: int = option(1024, "pairs in a batch of the attention", low=1)
    attention_size: int | None = option(None, "width of the attention; null: half the dim", low=1)
    keep: float = option(0.7, "share of a user's vector kept by dropout", low=0.01, high=1)
    transfer_l2: float = option(
        1e-5, "weight of half the squared transfer matrices (published for MF only)", low=0
    )


class RecEraser(UnlearningMethod[RecEraserConfig]):
    """Train k shards of the pairs, retrain the touched ones, and learn to put them together.

    Per shard m a node's vector is moved to t_m = W_m·e_m + b_m, and the aggregated one is
    Σ a_m·t_m with a = softmax_m(h·relu(W·t_m + b)), separately for users and items. The attention
    is trained by BPR with the shards frozen. What is aggregated are the free tables; a graph
    backbone then propagates them over the whole retained graph. The result is a plain model of the
    benchmark's own kind.

    A request retrains the shards that hold forgotten pairs, on what is left of them, and the
    attention. With `partition=random` the result is, bit for bit on one thread, that of training
    without the forgotten pairs. With `inbp` and `ubp` it is so only for the given partition:
    vectors of the original, which learned the forgotten pairs, decided which shard each retained
    pair belongs to, and that is not taken back. With `negatives=global` shards that are not touched
    also keep never having drawn a forgotten pair as a negative.
    """

    reads: frozenset[str] = frozenset({"forget", "retain"})
    modalities = frozenset({"recsys"})
    intent: ClassVar[str] = "removal"
    trains: ClassVar[str] = "tables of the touched shards, and the attention over all shards"
    holds: ClassVar[str] = "two tables for every shard, and the shard of every pair"
    citation: ClassVar[str] = (
        "Chen et al., Recommendation Unlearning, WWW 2022, arXiv 2201.06820; code: "
        "github.com/chenchongthu/Recommendation-Unlearning"
    )
    config_type: ClassVar[type] = RecEraserConfig
    prepares: ClassVar[bool] = True

    def prepare(self, ctx: Context) -> Mapping[str, Tensor]:
        """Partition and train all shards.

        Returns:
            `shard`: the shard of each edge of the graph, int64 [E], -1 for none; `users` [k, U, d]
            and `items` [k, I, d]: the shards' tables.

        Raises:
            ConfigError: The backbone has more than two free tables, or there are more shards than
                elements.
        """
        train = pairs_of(ctx, "train")
        assert isinstance(ctx.model, Recommender)
        tables_of(ctx.model)
        labels = self._partition(ctx, ctx.model, train)
        edges = np.full(len(ctx.model.graph), -1, np.int64)
        edges[train.edge] = labels
        tables = [self._shard(ctx, m, train, labels) for m in range(self.config.shards)]
        users, items = (torch.stack(side) for side in zip(*tables, strict=True))
        return {"shard": torch.from_numpy(edges), "users": users, "items": items}

    def run(self, ctx: Context) -> nn.Module:
        """Retrain the touched shards and the attention; write what it gives into the model."""
        model, config = ctx.model, self.config
        forget, retain = pairs_of(ctx, "forget"), pairs_of(ctx, "retain")
        assert isinstance(model, Recommender)
        shard = self.prepared["shard"].cpu().numpy()
        users, items = self.prepared["users"].clone(), self.prepared["items"].clone()
        gone = shard[forget.edge[forget.edge >= 0]]
        labels, touched = shard[retain.edge], np.unique(gone[gone >= 0]).tolist()
        logger.info("%d of %d shards hold forgotten pairs", len(touched), config.shards)
        for m in touched:
            users[m], items[m] = self._shard(ctx, m, retain, labels)
        size = config.attention_size or max(1, users.shape[2] // 2)
        attention = ShardAttention(
            config.shards, users.shape[2], size, derive(ctx.seed, "attention")
        ).to(users.device)
        work = Aggregation(config)
        work.resume = None if self.resume is None else self.resume / "aggregation"
        aggregated = Aggregated(model, users, items, attention)
        optimise(ctx.within(aggregated, retain), work)
        written = ctx.scope("users|items")
        with torch.no_grad():
            found = aggregated.tables()
            written["users"].copy_(found[0])
            written["items"].copy_(found[1])
        return model

    def _partition(self, ctx: Context, model: Recommender, train: Interactions) -> Ints:
        """Return the shard of each pair, int64 [n]."""
        config = self.config
        if config.partition == "random":
            return hashed(derive(ctx.seed, "shards"), config.shards, train.user, train.item)
        if config.vectors == "final":
            users, items = model.final().tensor_split([model.graph.users])
        else:
            users, items = (table.detach() for table in tables_of(model))
        p, q = (side.double().cpu().numpy() for side in (users, items))
        if config.partition == "ubp":
            active, row = np.unique(train.user, return_inverse=True)
            start = first_centroids(ctx.seed, len(active), config.shards)
            found = balanced_kmeans(
                p[active], start, config.rounds, config.slack, scalar=config.reference
            )
            labels: Ints = found.labels[row]
            return labels
        start = first_centroids(ctx.seed, len(train), config.shards)
        bound = (config.rounds, config.slack, config.reference)
        return by_interactions(train.user, train.item, p, q, start, *bound).labels

    def _shard(
        self, ctx: Context, shard: int, data: Interactions, labels: Ints
    ) -> tuple[Tensor, Tensor]:
        """Train a shard on those of some pairs that are labelled with it; return its tables."""
        rows = np.flatnonzero(labels == shard)
        part = data.select(rows)  # type: ignore[arg-type]
        if len(part):
            known = data if self.config.negatives == "global" else part
            part = Interactions(
                part.user,
                part.item,
                part.items,
                part.edge,
                Listed(known.user, known.item, part.items, np.unique(part.item)),
                part.by_user,
            )
        trained = train_shard(ctx, fresh_shard(ctx, shard), part, shard, resume=self.resume)
        users, items = tables_of(trained)
        return users.detach().clone(), items.detach().clone()


class Listed(Known):
    """Known pairs of which negatives are drawn from a list of items.

    Args:
        user: User of each known pair, [n].
        item: Item of each known pair, [n].
        items: Number of items of the data set.
        listed: Items that can be drawn, sorted, each once; not empty.
    """

    def __init__(self, user: Ints, item: Ints, items: int, listed: Ints) -> None:
        super().__init__(user, item, items)
        self._listed = torch.from_numpy(listed)
        place = np.searchsorted(listed, item).clip(max=len(listed) - 1)
        on = listed[place] == item
        self._places = Known(user[on], place[on], len(listed))

    def negatives(self, user: Tensor, draws: Draws, count: int = 1) -> Tensor:
        """Return listed items not known of each user, int64 [B, count]; see `Known.negatives`."""
        return self._listed.to(user.device)[self._places.negatives(user, draws, count)]


class ShardAttention(nn.Module):
    """The transfer matrices and attention by which RecEraser aggregates shards (section 3.4).

    Args:
        count: Shards k.
        dim: Width d of the vectors.
        size: Width of the attention.
        seed: Seed of the initial values.
    """

    def __init__(self, count: int, dim: int, size: int, seed: int) -> None:
        super().__init__()
        rng = generator(seed, "initial")
        bound = (6.0 / (dim + dim)) ** 0.5
        self.transfer = nn.Parameter(
            torch.empty(count, dim, dim).uniform_(-bound, bound, generator=rng)
        )
        self.shift = nn.Parameter(torch.zeros(count, dim))
        self.users = _Scorer(dim, size, rng)
        self.items = _Scorer(dim, size, rng)

    def forward(self, shards: Tensor, side: str) -> tuple[Tensor, Tensor]:
        """Aggregate the shards' vectors of some nodes.

        Args:
            shards: [k, M, d].
            side: "users" or "items": whose attention.

        Returns:
            Aggregated vectors [M, d] and the shards' shares [M, k].
        """
        moved = torch.baddbmm(self.shift[:, None], shards, self.transfer)
        share = (self.users if side == "users" else self.items)(moved).softmax(dim=0)
        return torch.einsum("km,kmd->md", share, moved), share.T


class _Scorer(nn.Module):
    """h·relu(W·t + b) of every shard and node."""

    def __init__(self, dim: int, size: int, rng: torch.Generator) -> None:
        super().__init__()
        std = (2.0 / (dim + size)) ** 0.5
        self.weight = nn.Parameter(torch.empty(dim, size))
        nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std, generator=rng)
        self.bias = nn.Parameter(torch.zeros(size))
        self.head = nn.Parameter(torch.full((size,), 0.01))

    def forward(self, moved: Tensor) -> Tensor:
        found: Tensor = torch.relu(moved @ self.weight + self.bias) @ self.head
        return found


class Aggregated(Recommender):
    """A backbone whose free tables are what an attention makes of frozen shard tables.

    Args:
        model: The backbone, on the retained graph; its own tables are not used and not changed.
        users: The shards' tables of users, [k, U, d].
        items: The shards' tables of items, [k, I, d].
        attention: What is trained.
    """

    users: Tensor
    items: Tensor

    def __init__(
        self, model: Recommender, users: Tensor, items: Tensor, attention: ShardAttention
    ) -> None:
        super().__init__(model.graph)
        self.model = model
        self.attention = attention
        self.register_buffer("users", users, persistent=False)
        self.register_buffer("items", items, persistent=False)
        self.kept = model.kept.clone()

    def tables(self) -> tuple[Tensor, Tensor]:
        """Return the aggregated free tables, [U, d] and [I, d]; differentiable."""
        users, _ = self.attention(self.users, "users")
        items, _ = self.attention(self.items, "items")
        return users, items

    def table(self) -> Tensor:
        """Return the backbone's final vectors with the aggregated tables, [N, d]."""
        return self.forward(torch.arange(self.graph.nodes, device=self.users.device))

    def forward(self, nodes: Tensor) -> Tensor:
        """Return the final vectors of some nodes, [M] -> [M, d]; differentiable."""
        if type(self.model) is MatrixFactorisation:  # nothing is propagated: only these rows count
            some, place = torch.unique(nodes, return_inverse=True)
            first = int((some < self.graph.users).sum())
            users, _ = self.attention(self.users[:, some[:first]], "users")
            items, _ = self.attention(self.items[:, some[first:] - self.graph.users], "items")
            return torch.cat([users, items])[place]
        users, items = self.tables()
        swapped = {"users": users, "items": items}
        found: Tensor = functional_call(self.model, swapped, (nodes,))
        return found


class Aggregation(LossMethod[RecEraserConfig]):
    """Trains the attention of an `Aggregated` (`ctx.model`) by BPR; all tables are frozen."""

    reads: frozenset[str] = frozenset({"retain"})
    intent: ClassVar[str] = "removal"
    citation: ClassVar[str] = RecEraser.citation
    config_type: ClassVar[type] = RecEraserConfig

    @property
    def training(self) -> Training:
        """Adam at a constant rate on the attention alone."""
        config = self.config
        return Training(
            epochs=config.aggregation_epochs,
            lr=config.aggregation_lr,
            optimizer="adam",
            batch_size=config.aggregation_batch_size,
            scope=r"attention\..*",
        )

    def passes(self, epoch: int) -> Sequence[Pass]:
        """One pass over the retain set."""
        return (Pass("aggregate", anchor="retain"),)

    def loss(self, ctx: Context, forget: Batch | None, retain: Batch | None) -> dict[str, Tensor]:
        """Return BPR with dropout on the users' vectors, and the L2 term."""
        if retain is None:
            return {}
        model, config = ctx.model, self.config
        assert isinstance(model, Aggregated) and isinstance(retain.data, Pairs)
        with ctx.engine.autocast():
            rows = rows_of(model, retain.data)
            if config.keep < 1.0:
                chance = retain.draws("dropout").uniform(rows.user.shape[1])
                rows = rows._replace(user=rows.user * (chance < config.keep) / config.keep)
            loss = outputs(rows).loss
        terms = {"retain": ctx.unit_mean(loss, retain)}
        if config.transfer_l2:
            norm = 0.5 * model.attention.transfer.square().sum()
            terms["transfer_l2"] = config.transfer_l2 * ctx.once(norm, retain)
        return terms


def tables_of(model: Recommender) -> tuple[nn.Parameter, nn.Parameter]:
    """Return the free tables of users and items, if they are all that a recommender learns.

    Raises:
        ConfigError: It learns something else, which shards could not be aggregated without.
    """
    named = dict(model.named_parameters())
    if set(named) != {"users", "items"} or named["users"].shape[1:] != named["items"].shape[1:]:
        raise ConfigError(
            f"receraser aggregates the tables `users` and `items`, and {type(model).__name__} "
            f"learns {', '.join(sorted(named)[:6])}. Accepted: mf, lightgcn, sgl, simgcl, "
            f"lightgcl; sisa works for every backbone"
        )
    return named["users"], named["items"]
