"""UnlearnRec: an encoder, trained once on simulated requests, answers a request in one pass."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from mmforget.context import Context
from mmforget.errors import CollapsedError, ConfigError
from mmforget.methods.base import LossMethod
from mmforget.options import option
from mmforget.recsys.adapter import Pairs, Rows, outputs
from mmforget.recsys.backbones.base import Recommender, Triples
from mmforget.recsys.data import Interactions, Known
from mmforget.recsys.influence_encoder import (
    InfluenceEncoder,
    InfluenceGraph,
    NearIdentity,
    alignment_loss,
    choice,
    contrast_loss,
    unlearning_loss,
)
from mmforget.rng import Draws, generator
from mmforget.training import optimise
from mmforget.types import Batch, Pass, Training, UnlearningMethod

T = TypeVar("T")

JUDGED_USERS = 512  # whose recall is measured after an epoch of pre-training
TOP = 20


@dataclass(frozen=True)
class UnlearnRecConfig:
    """Weights, temperature and rates of the release, but fewer epochs: the best is chosen."""

    epochs: int = option(20, "passes of pre-training over the kept edges; release: 256", low=0)
    lr: float = option(1e-3, "learning rate of pre-training (Adam)", low=0)
    batch_size: int = option(2048, "kept edges in a batch", low=1)
    max_steps_per_epoch: int = option(2500, "an epoch stops after this many steps", low=1)
    request_epochs: int = option(5, "epochs until another request is simulated", low=1)
    drop_rate: float = option(0.1, "share of edges that a simulated request names", low=0, high=1)
    form: str = option(
        "release",
        "encoder: `release` (layers summed, final embeddings withdrawn), `paper` (last layer only)",
        choices=("release", "paper"),
    )
    layers: int = option(3, "propagation steps over the influence graph", low=1)
    eta: float | None = option(None, "initial withdrawal of each node; null: twice lr")
    withdraw_rate: float | None = option(
        None, "factor of what is withdrawn; null: 0.1 for form=release, 1 for form=paper", low=0
    )
    mlp_layers: int = option(2, "layers of the MLP", low=0)
    train_mlp: bool = option(False, "train the MLP in pre-training; the release keeps the identity")
    unlearn_weight: float = option(0.5, "weight of L_u", low=0)
    unlearn_form: str = option(
        "v1", "L_u: `v1` mean softplus of scores, `v2` mean score", choices=("v1", "v2")
    )
    align_weight: float = option(0.02, "weight of L_p, a sum over the batch", low=0)
    align_form: str = option("v2", "L_p: `v2` softmax, `v3` softplus", choices=("v2", "v3"))
    temperature: float = option(10.0, "temperature of L_p", low=1e-3)
    contrast_weight: float = option(1e-3, "weight of L_c; 0 leaves it out", low=0)
    contrast_drop: float = option(0.05, "share of influence edges dropped in L_c", low=0, high=1)
    choose: str = option(
        "gap",
        "which epoch's encoder is kept: `gap`, random negatives score highest above edges of a "
        "request that is never trained on; or `last`",
        choices=("gap", "last"),
    )
    guard: float = option(
        0.5, "an epoch counts only with this share of the original's recall", low=0, high=1
    )
    finetune_epochs: int = option(0, "passes of fine-tuning over retain, for each request", low=0)
    finetune_lr: float = option(1e-3, "learning rate of fine-tuning (Adam)", low=0)
    finetune_unlearn_weight: float = option(0.2, "weight of L_u in fine-tuning", low=0)
    finetune_align_weight: float = option(0.01, "weight of L_p in fine-tuning", low=0)


class UnlearnRec(UnlearningMethod[UnlearnRecConfig]):
    """An influence encoder turns forgotten edges Δ and free embeddings E0 into new ones, E0'.

    It is trained once for an original model, on simulated requests, by
    L_model + w_u·L_u + w_p·L_p + w_c·L_c: the backbone's own loss with E0' on the residual graph,
    low scores of Δ, shares among a batch's items as the original gives them, and a contrast of
    influence layers. A request costs the encoder's L products with the graph of Δ and none with
    the whole graph; `finetune_epochs` passes of L_model + w_u·L_u + w_p·L_p may follow, in which
    E0 and the MLP move. Works for backbones with free embeddings `users` and `items`.

    L_model's L2 term weighs E0' (in the release that of the frozen E0, which changes nothing). The
    release measures its guard, and the gap that chooses an epoch, on test data and on the request
    itself; here both come from training data and a simulated request.
    """

    reads: frozenset[str] = frozenset({"forget", "retain"})  # retain for fine-tuning alone
    modalities = frozenset({"recsys"})
    intent: ClassVar[str] = "removal"
    trains: ClassVar[str] = "free embeddings of users and items"
    holds: ClassVar[str] = "an encoder of the size of the free embeddings, and the final vectors"
    citation: ClassVar[str] = "UnlearnRec, arXiv 2505.22649"
    config_type: ClassVar[type] = UnlearnRecConfig
    prepares: ClassVar[bool] = True

    def __init__(self, config: UnlearnRecConfig) -> None:
        super().__init__(config)
        if not config.finetune_epochs:
            self.reads = frozenset({"forget"})

    def prepare(self, ctx: Context) -> Mapping[str, Tensor]:
        """Return the encoder's weights and the original's final vectors (`final`, [N, d]).

        Raises:
            ConfigError: The backbone has no free embeddings, or `drop_rate` names no edge or all.
            CollapsedError: No epoch kept the share `guard` of recall.
        """
        model, train = ctx.model, ctx.split("train")
        assert isinstance(model, Recommender) and isinstance(train, Interactions)
        free = free_table(model)
        final = model.final().clone()
        if final.shape != free.shape:
            raise ConfigError(
                f"unlearnrec adds what it withdraws from final vectors ({final.shape[1]} wide) to "
                f"free embeddings ({free.shape[1]} wide): it needs a backbone that gives both one "
                f"width, such as lightgcn"
            )
        simulated = Simulated(train, model, self.config, ctx.seed)
        work = Pretraining(self.config, model, final, simulated)
        work.resume = self.resume
        encoder = make_encoder(self.config, free, final)
        found = optimise(ctx.within(encoder, simulated), work)
        return {**{k: v.detach() for k, v in found.state_dict().items()}, "final": final}

    def run(self, ctx: Context) -> nn.Module:
        """Write E0' for the forgotten edges into the model; then fine-tune, if asked for."""
        model, forget = ctx.model, ctx.split("forget")
        assert isinstance(model, Recommender) and isinstance(forget, Interactions)
        ctx.scope("users|items")
        edges = torch.from_numpy(forget.edge[forget.edge >= 0])
        free, final = free_table(model), self.prepared["final"]
        encoder = make_encoder(self.config, free, final)
        encoder.load_state_dict({k: v for k, v in self.prepared.items() if k != "final"})
        with torch.no_grad():
            change = encoder.change(InfluenceGraph(model.graph, edges, free.device))
            table = encoder.updated(free, change)
        if self.config.finetune_epochs:
            work = Finetuning(self.config, model, final, edges)
            work.resume = self.resume
            start = Tuned(free, change, encoder.mlp, self.config.mlp_layers)
            table = optimise(ctx.within(start, ctx.split("retain")), work)().detach()
        with torch.no_grad():
            first = model.graph.users
            ctx.trainable["users"].copy_(table[:first])
            ctx.trainable["items"].copy_(table[first:])
        return model


class Simulated:
    """Kept pairs of simulated requests: `types.Dataset`, whose pairs change with `epoch`.

    Each `request_epochs` epochs another random share of the edges is named, and the others are what
    an epoch walks through (a random choice of them if they are too many). One more request is
    drawn, by which epochs are judged.

    Args:
        train: All training pairs.
        model: The original; edges that it does not propagate over are left out.
        config: Rates and sizes.
        seed: Seed of the choices.

    Attributes:
        epoch: The running epoch, to be set before an epoch's pairs are read.

    Raises:
        ConfigError: `drop_rate` names no edge, or every edge.
    """

    def __init__(
        self, train: Interactions, model: Recommender, config: UnlearnRecConfig, seed: int
    ) -> None:
        edge = np.where(train.edge >= 0, train.edge, 0)
        self._rows = np.nonzero((train.edge >= 0) & model.kept.cpu().numpy()[edge])[0]
        self._train, self._seed, self._every = train.sampled(False), seed, config.request_epochs
        self._dropped = round(config.drop_rate * len(self._rows))
        left = len(self._rows) - self._dropped
        if not self._dropped or not left:
            raise ConfigError(
                f"method.drop_rate={config.drop_rate} of {len(self._rows)} training edges names "
                f"{self._dropped}; a simulated request needs an edge and leaves one"
            )
        self._size = min(left, config.max_steps_per_epoch * config.batch_size)
        self._epoch = self._request = -1
        self.epoch = 0

    def request(self, name: str | int) -> tuple[Tensor, Interactions]:
        """Return the edges of a simulated request, and all other pairs in their stored order."""
        rng = generator(self._seed, "simulated", name)
        order = torch.randperm(len(self._rows), generator=rng).numpy()
        dropped = self._train.edge[self._rows[order[: self._dropped]]]
        kept = self._rows[np.sort(order[self._dropped :])]
        return torch.from_numpy(dropped), self._train.select(kept)

    def current(self) -> tuple[int, Tensor, Interactions]:
        """Return the number of the epoch's request, its edges, and all other pairs."""
        number = self.epoch // self._every
        if number != self._request:
            self._request, (self._edges, self._left) = number, self.request(number)
        return number, self._edges, self._left

    def part(self) -> Interactions:
        """Return the pairs that the epoch walks through."""
        if self._epoch != self.epoch:
            self._part = self.current()[2]
            if self._size < len(self._part):
                rng = generator(self._seed, "simulated", "part", self.epoch)
                some = torch.randperm(len(self._part), generator=rng)[: self._size]
                self._part = self._part.select(some.tolist())
            self._epoch = self.epoch
        return self._part

    @property
    def ids(self) -> Sequence[str]:
        """Ids of the epoch's pairs."""
        return self.part().ids

    @property
    def digests(self) -> Sequence[str]:
        """The ids: a pair's content is its name."""
        return self.ids

    def __len__(self) -> int:
        return self._size

    def take(self, indices: Sequence[int]) -> dict[str, Any]:
        """Return pairs of the running epoch; see `Interactions.take`."""
        return self.part().take(indices)


class Objective:
    """L_model + w_u·L_u + w_p·L_p of a recommender whose free embeddings are given.

    Args:
        model: The recommender, on the residual graph; its own weights stay as they are.
        final: Final vectors of the original, [N, d].
        config: Forms and temperature.
        unlearn_weight: w_u.
        align_weight: w_p.
    """

    def __init__(
        self,
        model: Recommender,
        final: Tensor,
        config: UnlearnRecConfig,
        unlearn_weight: float,
        align_weight: float,
    ) -> None:
        self.model = model
        self.final = final
        self.config = config
        self.unlearn_weight = unlearn_weight
        self.align_weight = align_weight

    def terms(
        self, ctx: Context, retain: Batch, table: Tensor, user: Tensor, item: Tensor
    ) -> dict[str, Tensor]:
        """Return the weighted terms, with one propagation beside those of the backbone's own.

        Args:
            ctx: The running optimisation.
            retain: A batch of kept pairs.
            table: The free embeddings E0', [N, d].
            user: User of each forgotten edge, int64 [n].
            item: Item of each forgotten edge, int64 [n].
        """
        data, config = retain.data, self.config
        assert isinstance(data, Pairs)
        first = self.model.graph.users

        def compute(model: Recommender) -> tuple[Rows, Tensor, dict[str, Tensor]]:
            final = model.table()
            found = (final[data.user], final[data.item + first], final[data.negative + first])
            extra = model.auxiliary(Triples(*data, *found, size=retain.total))
            return Rows(*found), (final[user] * final[item + first]).sum(1), extra

        with ctx.engine.autocast():
            rows, scores, extra = with_tables(self.model, table, compute)
            terms = {"retain": ctx.unit_mean(outputs(rows).loss, retain)}
            terms |= {f"retain_{k}": ctx.once(v, retain) for k, v in extra.items()}
            if self.unlearn_weight and len(scores):
                push = unlearning_loss(scores, config.unlearn_form)
                terms["forget"] = self.unlearn_weight * ctx.once(push, retain)
            if self.align_weight:
                new = choice(rows.user, rows.item, config.temperature, config.align_form)
                with torch.no_grad():
                    pair = (self.final[data.user], self.final[data.item + first])
                    old = choice(*pair, config.temperature, config.align_form)
                # A sum over examples: parts add up without a count.
                hold = alignment_loss(new, old) * retain.weight
                terms["retain_align"] = self.align_weight * hold
        return terms


class Pretraining(LossMethod[UnlearnRecConfig]):
    """Trains an encoder (`ctx.model`) on simulated requests; returns that of the best epoch.

    Args:
        config: The method's.
        model: The original; frozen.
        final: Its final vectors, [N, d].
        simulated: The pairs of `ctx`, and the requests.
    """

    reads: frozenset[str] = frozenset({"retain"})
    intent: ClassVar[str] = "removal"
    citation: ClassVar[str] = UnlearnRec.citation
    config_type: ClassVar[type] = UnlearnRecConfig

    def __init__(
        self, config: UnlearnRecConfig, model: Recommender, final: Tensor, simulated: Simulated
    ) -> None:
        super().__init__(config)
        self.model = model.requires_grad_(False).train()
        self.free = free_table(model)
        self.simulated = simulated
        weights = (config.unlearn_weight, config.align_weight)
        self.objective = Objective(self.model, final, config, *weights)
        self.best: dict[str, Tensor] = {}
        self.gap = -float("inf")
        self._shown = -1

    @property
    def training(self) -> Training:
        """Adam at a constant rate on all that the encoder learns."""
        config = self.config
        return Training(
            epochs=config.epochs, lr=config.lr, optimizer="adam", batch_size=config.batch_size
        )

    def setup(self, ctx: Context) -> None:
        """Draw the request that judges, and measure the original on it."""
        self.judge = Judge(self.model, self.simulated, ctx.seed)
        self.recall = self.judge.recall(self.judge.final(self.free))

    def passes(self, epoch: int) -> Sequence[Pass]:
        """One pass over the kept edges of the epoch's simulated request."""
        self.simulated.epoch = epoch
        return (Pass("pretrain", anchor="retain"),)

    def loss(self, ctx: Context, forget: Batch | None, retain: Batch | None) -> dict[str, Tensor]:
        """Return L_model (`retain`...), L_u (`forget`), L_p and L_c."""
        if retain is None:
            return {}
        encoder, graph, config = ctx.model, self.model.graph, self.config
        assert isinstance(encoder, InfluenceEncoder)
        self._show()
        influence = self.influence
        if not config.contrast_weight:
            table = encoder(influence, self.free)
            return self.objective.terms(ctx, retain, table, *self.edges)
        hops = encoder.hops(influence)
        table = encoder.updated(self.free, encoder.change_of(influence, hops))
        terms = self.objective.terms(ctx, retain, table, *self.edges)
        user, item = torch.unique(retain.data.user), torch.unique(retain.data.item)
        groups = (user, item + graph.users)
        own = encoder.h0[influence.nodes]
        contrast = contrast_loss(influence, own, hops, groups, config.contrast_drop)
        return terms | {"contrast": config.contrast_weight * ctx.once(contrast, retain)}

    def after_epoch(self, ctx: Context) -> None:
        """Keep the encoder if random negatives lie higher above unseen forgotten edges than ever.

        Only if enough recall is left.
        """
        if self.config.choose == "last":
            return
        assert isinstance(ctx.model, InfluenceEncoder)
        with torch.no_grad():
            final = self.judge.final(ctx.model(self.judge.influence, self.free))
        gap = self.judge.gap(final)
        if gap > self.gap and self.judge.recall(final) >= self.config.guard * self.recall:
            self.gap = gap
            self.best = {k: v.detach().clone() for k, v in ctx.model.state_dict().items()}

    def finish(self, ctx: Context) -> nn.Module:
        """Return the chosen encoder.

        Raises:
            CollapsedError: No epoch may be chosen.
        """
        if self.config.choose == "gap" and self.config.epochs:
            if not self.best:
                raise CollapsedError(
                    f"after every epoch the encoder left less than {self.config.guard} of the "
                    f"original's recall ({self.recall:.4f}); lower method.unlearn_weight or "
                    f"method.lr, or raise method.align_weight"
                )
            ctx.model.load_state_dict(self.best)
        return ctx.model

    def state(self) -> dict[str, Any]:
        """Return the best encoder so far and its gap."""
        return {"best": self.best, "gap": self.gap if self.best else None}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take them back."""
        if state["best"]:
            self.best, self.gap = state["best"], state["gap"]

    def _show(self) -> None:
        """Put the model on the residual graph of the epoch's request."""
        number, edges, left = self.simulated.current()
        if number == self._shown:
            return
        self._shown = number
        graph, device = self.model.graph, self.free.device
        self.model.keep(torch.from_numpy(left.edge))
        self.influence = InfluenceGraph(graph, edges, device)
        self.edges = (graph.user[edges].to(device), graph.item[edges].to(device))


class Finetuning(LossMethod[UnlearnRecConfig]):
    """Moves E0 and the MLP of a `Tuned` (`ctx.model`) after a request; nothing else changes.

    Args:
        config: The method's.
        model: The recommender on the residual graph.
        final: Final vectors of the original, [N, d].
        edges: The forgotten edges, int64 [n].
    """

    reads: frozenset[str] = frozenset({"retain"})
    intent: ClassVar[str] = "removal"
    citation: ClassVar[str] = UnlearnRec.citation
    config_type: ClassVar[type] = UnlearnRecConfig

    def __init__(
        self, config: UnlearnRecConfig, model: Recommender, final: Tensor, edges: Tensor
    ) -> None:
        super().__init__(config)
        weights = (config.finetune_unlearn_weight, config.finetune_align_weight)
        self.objective = Objective(model, final, config, *weights)
        graph, device = model.graph, final.device
        self.edges = (graph.user[edges].to(device), graph.item[edges].to(device))

    @property
    def training(self) -> Training:
        """Adam at a constant rate."""
        config = self.config
        return Training(
            epochs=config.finetune_epochs,
            lr=config.finetune_lr,
            optimizer="adam",
            batch_size=config.batch_size,
        )

    def passes(self, epoch: int) -> Sequence[Pass]:
        """One pass over the retain set."""
        return (Pass("finetune", anchor="retain"),)

    def loss(self, ctx: Context, forget: Batch | None, retain: Batch | None) -> dict[str, Tensor]:
        """Return L_model (`retain`...), L_u (`forget`) and L_p."""
        if retain is None:
            return {}
        return self.objective.terms(ctx, retain, ctx.model(), *self.edges)


class Tuned(nn.Module):
    """E0 + MLP(ΔE) as a function of E0 and the MLP: what fine-tuning moves.

    Args:
        free: E0, [N, d].
        change: ΔE of the request, [N, d]; fixed, because H0 and η are.
        mlp: The encoder's MLP, copied; gets weights of its own if it has none.
        layers: Its layers.
    """

    change: Tensor

    def __init__(self, free: Tensor, change: Tensor, mlp: NearIdentity, layers: int) -> None:
        super().__init__()
        self.free = nn.Parameter(free.clone())
        self.register_buffer("change", change, persistent=False)
        self.mlp = NearIdentity(free.shape[1], layers, trained=True).to(free.device)
        self.mlp.load_state_dict(mlp.state_dict(), strict=False)

    def forward(self) -> Tensor:
        """Return E0', [N, d]."""
        found: Tensor = self.free + self.mlp(self.change)
        return found


class Judge:
    """Measures encoders on a request that is never trained on, and on kept training edges.

    Args:
        model: The original; copied.
        simulated: Draws the request.
        seed: Seed of random pairs and users.

    Attributes:
        influence: The influence graph of the request.
    """

    def __init__(self, model: Recommender, simulated: Simulated, seed: int) -> None:
        self.model = copy.deepcopy(model).eval()
        graph, device = model.graph, model.kept.device
        edges, kept = simulated.request("judged")
        self.model.keep(torch.from_numpy(kept.edge))
        self.influence = InfluenceGraph(graph, edges, device)
        self.dropped = (graph.user[edges].to(device), graph.item[edges].to(device))
        draws = Draws(seed, "judged", total=len(edges))
        every = Known(graph.user.numpy(), graph.item.numpy(), graph.items)
        user = draws.integers(graph.users)
        self.random = (user.to(device), every.negatives(user, draws)[:, 0].to(device))
        self.known = Known(kept.user, kept.item, graph.items)
        degree = torch.bincount(torch.from_numpy(kept.user), minlength=graph.users)
        some = degree.nonzero()[:, 0]
        order = torch.randperm(len(some), generator=generator(seed, "judged", "users"))
        self.users = some[order[:JUDGED_USERS]].to(device)
        self.degree = degree.to(device)[self.users]

    @torch.no_grad()
    def final(self, table: Tensor) -> Tensor:
        """Return final vectors on the residual graph with these free embeddings, [N, d]."""
        return with_tables(self.model, table, lambda model: model.table())

    def gap(self, final: Tensor) -> float:
        """Return the mean score of random pairs minus that of the request's edges."""
        return float(self._mean(final, *self.random) - self._mean(final, *self.dropped))

    def recall(self, final: Tensor) -> float:
        """Return the mean over users of kept edges among the top 20, of at most 20."""
        items = final[self.model.graph.users :]
        top = (final[self.users] @ items.T).topk(min(TOP, len(items)), sorted=False).indices
        hits = self.known.holds(self.users[:, None], top).float().sum(1)
        return float((hits / self.degree.clamp(max=TOP)).mean())

    def _mean(self, final: Tensor, user: Tensor, item: Tensor) -> Tensor:
        return (final[user] * final[item + self.model.graph.users]).sum(1).mean()


def make_encoder(config: UnlearnRecConfig, free: Tensor, final: Tensor) -> InfluenceEncoder:
    """Return an untrained encoder for a model's free embeddings and final vectors, [N, d] each."""
    return InfluenceEncoder(
        free if config.form == "paper" else final,
        layers=config.layers,
        eta=2.0 * config.lr if config.eta is None else config.eta,
        form=config.form,
        withdraw_rate=config.withdraw_rate,
        mlp_layers=config.mlp_layers,
        train_mlp=config.train_mlp,
    ).to(final.device)


def free_table(model: Recommender) -> Tensor:
    """Return a copy of the free embeddings, users first, [N, d], without gradients.

    Raises:
        ConfigError: The backbone has no tables `users` and `items` of one width.
    """
    named = dict(model.named_parameters())
    users, items = named.get("users"), named.get("items")
    if users is None or items is None or users.shape[1:] != items.shape[1:]:
        raise ConfigError(
            f"unlearnrec writes new free embeddings, and {type(model).__name__} has no tables "
            f"`users` and `items` of one width. Accepted: mf, lightgcn, sgl, simgcl, lightgcl"
        )
    return torch.cat([users.detach(), items.detach()])


def with_tables(model: Recommender, table: Tensor, compute: Callable[[Recommender], T]) -> T:
    """Return `compute(model)` while the free embeddings are these; gradients flow into them.

    Args:
        model: Unchanged afterwards.
        table: Free embeddings, users first, [N, d].
        compute: May call anything of the model but `final`, which keeps what it computed.
    """
    first = model.graph.users
    swapped = {"model.users": table[:first], "model.items": table[first:]}
    found: T = functional_call(_Call(model, compute), swapped, ())
    return found


class _Call(nn.Module):
    def __init__(self, model: Recommender, compute: Callable[[Recommender], Any]) -> None:
        super().__init__()
        self.model = model
        self.compute = compute

    def forward(self) -> Any:
        return self.compute(self.model)
