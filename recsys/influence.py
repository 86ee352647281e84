"""Influence functions for recommenders: what the final vectors owe to the forgotten pairs.

With L the summed loss that a model minimises and H its Hessian, forgetting moves the weights by
H⁻¹g, where g is the gradient that disappears with the request. IFRU, SCIF and GIF differ in loss,
g, weights and solver; all of that is here once.

Scores are inner products of final vectors, and these are linear in the free tables. So nothing is
differentiated twice: a product with H is one propagation forwards, sparse sums over the pairs, and
one propagation backwards, whatever the backbone.
"""

import copy
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mmforget.context import Context
from mmforget.errors import CollapsedError, ConfigError
from mmforget.metrics.ranking import Ranking
from mmforget.options import option
from mmforget.recsys.backbones.base import Recommender
from mmforget.recsys.data import Interactions, Known, joined
from mmforget.recsys.graph import Graph, csr
from mmforget.rng import Draws

logger = logging.getLogger(__name__)

LINEAR = 1e-3  # relative difference up to which a backbone counts as linear (float32)
DIVERGED = 1e4  # growth of the residual at which a fixed-point iteration is given up
POWER = 12  # steps of power iteration
MARGIN = 1.2  # by which its estimate, always too small, is raised

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class InfluenceConfig:
    """What all influence methods share: weights, curvature, solver."""

    negatives: int = option(1, "negatives of each pair, drawn once and kept", low=1)
    rows: str = option(
        "all",
        "free rows that may change: users or users and items of forgotten pairs (touched), also "
        "those next to them in the graph, or all",
        choices=("users", "touched", "neighbours", "all"),
    )
    quantile: float = option(
        0.4, "for rows=neighbours: keep those whose share is above this quantile", low=0, high=1
    )
    curvature: str = option(
        "gauss_newton",
        "gauss_newton is never negative; hessian adds the second derivative of the inner product, "
        "which makes it indefinite where pairs fit badly",
        choices=("gauss_newton", "hessian"),
    )
    damping: float = option(
        0.1, "λ on the diagonal of the SUMMED curvature: IFRU's mean form has λ/n", low=0
    )
    solver: str = option(
        "cg", "conjugate gradients, or LiSSA's fixed-point iteration", choices=("cg", "lissa")
    )
    iterations: int = option(100, "products with the curvature at most", low=1)
    tolerance: float = option(1e-3, "relative residual at which the solver stops", low=0)
    scale: float | None = option(
        None, "for lissa: bound of the largest eigenvalue; null measures it", low=1e-12
    )
    share: float = option(
        1.0, "share of the training pairs behind the curvature: a fixed choice", low=0, high=1
    )


class Examples(NamedTuple):
    """Pairs whose losses are summed, with what they are compared with.

    Attributes:
        user: int64 [n].
        item: The item of the pair, then its negatives, int64 [n, m].
        label: Targets of the pointwise loss in [0, 1], [n, m].
    """

    user: Tensor
    item: Tensor
    label: Tensor

    def where(self, chosen: Tensor) -> "Examples":
        """Return some of the examples, by bool [n] or indices."""
        return Examples(self.user[chosen], self.item[chosen], self.label[chosen])

    def plus(self, others: "Examples") -> "Examples":
        """Return these examples, then the others."""
        return Examples(*(torch.cat(parts) for parts in zip(self, others, strict=True)))

    def columns(self, first: int, last: int) -> "Examples":
        """Return the items of some columns, each as an example of its own."""
        item, label = self.item[:, first:last], self.label[:, first:last]
        user = self.user[:, None].expand_as(item)
        return Examples(user.reshape(-1), item.reshape(-1, 1), label.reshape(-1, 1))


def examples_of(data: Interactions, known: Known, draws: Draws, negatives: int) -> Examples:
    """Return the pairs of a data set with negatives drawn once; labels 1 and 0.

    Args:
        data: The pairs.
        known: Pairs that are never drawn.
        draws: Holds as many as there are pairs.
        negatives: Drawn for each pair.
    """
    user = torch.from_numpy(data.user)
    drawn = known.negatives(user, draws, negatives)
    item = torch.cat([torch.from_numpy(data.item)[:, None].to(drawn.device), drawn], dim=1)
    label = torch.zeros(item.shape, device=item.device)
    label[:, 0] = 1.0
    return Examples(user.to(item.device), item, label)


class Pointwise:
    """Binary cross-entropy of every item with its label, summed: IFRU's and SCIF's task."""

    @staticmethod
    def slope(scores: Tensor, label: Tensor) -> Tensor:
        """Return the derivative of the loss by each score, [n, m]."""
        return torch.sigmoid(scores) - label

    @staticmethod
    def bend(scores: Tensor, change: Tensor) -> Tensor:
        """Return the product of the second derivative by the scores with a change of them."""
        p = torch.sigmoid(scores)
        return p * (1 - p) * change


class Pairwise:
    """BPR: the mean over negatives of softplus(s_neg - s_pos); labels are not read."""

    @staticmethod
    def slope(scores: Tensor, label: Tensor) -> Tensor:
        """Return the derivative of the loss by each score, [n, m]."""
        pull = torch.sigmoid(scores[:, 1:] - scores[:, :1]) / (scores.shape[1] - 1)
        return torch.cat([-pull.sum(1, keepdim=True), pull], dim=1)

    @staticmethod
    def bend(scores: Tensor, change: Tensor) -> Tensor:
        """Return the product of the second derivative by the scores with a change of them."""
        p = torch.sigmoid(scores[:, 1:] - scores[:, :1])
        pull = p * (1 - p) / (scores.shape[1] - 1) * (change[:, 1:] - change[:, :1])
        return torch.cat([-pull.sum(1, keepdim=True), pull], dim=1)


Loss = type[Pointwise] | type[Pairwise]
LOSSES: Mapping[str, Loss] = {"bce": Pointwise, "bpr": Pairwise}


class Vectors:
    """The final vectors of a model as a linear map P of its free tables E, both ways.

    Backbones: those whose only parameters are `users` and `items` and whose `table` is linear in
    them (mf, lightgcn, sgl, simgcl, lightgcl). Contrastive terms are no part of any loss here:
    they are random, and an influence function needs a fixed one. The L2 term is.

    Args:
        model: Put into evaluation mode; its weights and graph must not change afterwards.
        propagated: False takes the free tables for the final vectors.

    Attributes:
        free: E, users first, [N, d].
        final: PE, [N, d].
        decay: Weight of half the squared norms of an example's free rows.

    Raises:
        ConfigError: The backbone is none of these.
    """

    def __init__(self, model: Recommender, propagated: bool = True) -> None:
        named = dict(model.named_parameters())
        if set(named) != {"users", "items"}:
            raise ConfigError(
                f"influence methods need a model whose only parameters are the tables users and "
                f"items (mf, lightgcn, sgl, simgcl, lightgcl); this one has "
                f"{', '.join(list(named)[:6])}"
            )
        model.eval()
        free = (named["users"].requires_grad_(), named["items"].requires_grad_())
        self.graph = model.graph
        self.free = torch.cat(free).detach()
        self.decay = float(getattr(model, "decay", 0.0))
        self._free = free
        with torch.enable_grad():
            # P and its transpose are kept as autograd graphs, which hold no table.
            self._table = model.table() if propagated else torch.cat(free)
            self._seed = torch.zeros_like(self._table, requires_grad=True)
            pulled = torch.autograd.grad(self._table, free, self._seed, create_graph=True)
            self._pulled = torch.cat(pulled)
        self.final = self._table.detach()
        gap = float((self.push(self.free) - self.final).norm())
        if gap > LINEAR * float(self.final.norm()):
            raise ConfigError(
                "influence methods need final vectors that are linear in the free tables (mf, "
                "lightgcn, sgl, simgcl, lightgcl); those of this backbone are not"
            )

    def push(self, free: Tensor) -> Tensor:
        """Return P·free, [N, d]."""
        found: Tensor = torch.autograd.grad(self._pulled, self._seed, free, retain_graph=True)[0]
        return found

    def pull(self, final: Tensor) -> Tensor:
        """Return Pᵀ·final, [N, d]."""
        return torch.cat(torch.autograd.grad(self._table, self._free, final, retain_graph=True))


class Sums:
    """Sums over the pairs of examples as sparse products, by user and by item.

    Args:
        graph: For the numbers of users and items.
        examples: Their pairs, m an example.
    """

    def __init__(self, graph: Graph, examples: Examples) -> None:
        self.users, self.items = graph.users, graph.items
        self.shape = examples.item.shape
        user = examples.user[:, None].expand(self.shape).reshape(-1)
        item = examples.item.reshape(-1)
        self.by_user = torch.argsort(user, stable=True)
        self.by_item = torch.argsort(item, stable=True)
        self.place = torch.argsort(self.by_user)
        counts = (
            torch.bincount(user, minlength=self.users),
            torch.bincount(item, minlength=self.items),
        )
        self.count = torch.cat(counts)  # pairs of each node, [N]
        zero = user.new_zeros(1)
        self._user_rows = torch.cat([zero, counts[0].cumsum(0)]).int()
        self._item_rows = torch.cat([zero, counts[1].cumsum(0)]).int()
        self._items = item[self.by_user].int()
        self._users = user[self.by_item].int()

    def scores(self, left: Tensor, right: Tensor) -> Tensor:
        """Return left[user]·right[item] of each pair, [n, m], from [U, d] and [I, d]."""
        if not len(self._items):
            return left.new_zeros(self.shape)
        empty = left.new_zeros(len(self._items))
        pattern = csr(self._user_rows, self._items, empty, (self.users, self.items), left.device)
        found: Tensor = torch.sparse.sampled_addmm(pattern, left, right.T, beta=0.0)
        return found.values()[self.place].view(self.shape)

    def spread(self, weight: Tensor, vectors: Tensor) -> Tensor:
        """Return, for each node, the weighted sum of the vectors at the other ends, [N, d].

        Args:
            weight: Of each pair, [n, m].
            vectors: [N, d], users first.
        """
        flat, users, items = weight.reshape(-1), self.users, self.items
        device = vectors.device
        by_user = csr(self._user_rows, self._items, flat[self.by_user], (users, items), device)
        by_item = csr(self._item_rows, self._users, flat[self.by_item], (items, users), device)
        return torch.cat([by_user @ vectors[users:], by_item @ vectors[:users]])


def gradient(vectors: Vectors, examples: Examples, loss: Loss) -> Tensor:
    """Return the gradient of the summed loss, its L2 term included, by the free tables, [N, d]."""
    sums, users, final = Sums(vectors.graph, examples), vectors.graph.users, vectors.final
    label = examples.label.to(final.dtype)
    slope = loss.slope(sums.scores(final[:users], final[users:]), label)
    found = vectors.pull(sums.spread(slope, final))
    return found + vectors.decay * _norms(sums, examples, users)[:, None] * vectors.free


class Curvature:
    """Products with the second derivative of a summed loss, restricted to some free rows.

    Args:
        vectors: The model.
        examples: What is summed; those that no chosen row reaches are left out.
        loss: The loss of an example.
        rows: Free rows, int64 [k].
        exact: The Hessian; otherwise Gauss-Newton, which leaves out the second derivative of the
            inner product.
        scale: Factor of the examples' part, for a sum over a sample of them.
    """

    def __init__(
        self,
        vectors: Vectors,
        examples: Examples,
        loss: Loss,
        rows: Tensor,
        exact: bool = False,
        scale: float = 1.0,
    ) -> None:
        self.vectors, self.loss, self.rows, self.scale = vectors, loss, rows, scale
        self.users = vectors.graph.users
        if len(rows) < len(vectors.free):
            mark = torch.zeros_like(vectors.free[:, :1]).index_fill_(0, rows, 1.0)
            near = vectors.push(mark.expand_as(vectors.free).contiguous())[:, 0] != 0
            examples = examples.where(
                near[examples.user] | near[self.users + examples.item].any(dim=1)
            )
        self.sums = Sums(vectors.graph, examples)
        final = vectors.final
        self.scores = self.sums.scores(final[: self.users], final[self.users :])
        self.slope = loss.slope(self.scores, examples.label.to(final.dtype)) if exact else None
        norms = _norms(self.sums, examples, self.users)
        self.ridge = (scale * vectors.decay * norms[rows])[:, None]

    def __call__(self, direction: Tensor) -> Tensor:
        """Return the product with a direction, [k, d] -> [k, d]."""
        final, users = self.vectors.final, self.users
        free = torch.zeros_like(final).index_copy_(0, self.rows, direction)
        change = self.vectors.push(free)
        left = torch.cat([change[:users], final[:users]], dim=1)
        right = torch.cat([final[users:], change[users:]], dim=1)
        weight = self.loss.bend(self.scores, self.sums.scores(left, right))
        found = self.sums.spread(weight, final)
        if self.slope is not None:
            found += self.sums.spread(self.slope, change)
        return self.scale * self.vectors.pull(found)[self.rows] + self.ridge * direction


def _norms(sums: Sums, examples: Examples, users: int) -> Tensor:
    """Return how often each node's squared norm is in the L2 term, [N]: a user once an example."""
    count = sums.count.clone()
    count[:users] = torch.bincount(examples.user, minlength=users)
    return count


class Solution(NamedTuple):
    """What a solver found.

    Attributes:
        x: [k, d].
        residual: Norm of (H + λ)x - g over that of g.
        steps: Products with H.
    """

    x: Tensor
    residual: float
    steps: int


def conjugate_gradients(
    product: Product, g: Tensor, damping: float, iterations: int, tolerance: float
) -> Solution:
    """Solve (H + λ)x = g for positive H + λ.

    Args:
        product: Multiplies by H.
        g: Right side, of any shape.
        damping: λ.
        iterations: Products at most.
        tolerance: Relative residual at which it stops.

    Raises:
        CollapsedError: H + λ is not positive along a direction, or g or H is not finite.
    """
    x, residual, direction = torch.zeros_like(g), g.clone(), g.clone()
    size = start = _size(g) ** 2
    steps = 0
    while steps < iterations and size > tolerance**2 * start:
        found = product(direction) + damping * direction
        bend = _dot(direction, found)
        steps += 1
        if not math.isfinite(bend):
            raise CollapsedError("the curvature is not finite: the model's weights are not")
        if bend <= 0:
            raise CollapsedError(
                f"the damped curvature is not positive after {steps} steps, so it has no minimum; "
                f"raise method.damping, or set method.curvature=gauss_newton"
            )
        x.add_(direction, alpha=size / bend)
        residual.sub_(found, alpha=size / bend)
        size, last = _dot(residual, residual), size
        direction.mul_(size / last).add_(residual)
    return Solution(x, math.sqrt(size / start) if start else 0.0, steps)


def lissa(
    product: Product,
    g: Tensor,
    damping: float,
    iterations: int,
    tolerance: float,
    scale: float | None = None,
) -> Solution:
    """Solve (H + λ)x = g by x ← x + (g - (H + λ)x) / scale.

    With s = scale·x this is GIF's s ← g + (1 - damp)·s - Hs/scale, whose damp is λ/scale.

    Args:
        product: Multiplies by H.
        g: Right side, of any shape.
        damping: λ.
        iterations: Products at most, those of measuring `scale` not counted.
        tolerance: Relative residual at which it stops.
        scale: At least half the largest eigenvalue of H + λ, or it diverges; None measures it.

    Raises:
        CollapsedError: It diverged, or g is not finite.
    """
    start = size = _size(g)
    if start == 0:
        return Solution(torch.zeros_like(g), 0.0, 0)
    steps = taken = 0
    if scale is None:
        scale, steps = largest(product, g, damping)
    x, residual = torch.zeros_like(g), g.clone()
    while taken < iterations and size > tolerance * start:
        x.add_(residual, alpha=1.0 / scale)
        residual = g - product(x) - damping * x
        size = math.sqrt(_dot(residual, residual))
        taken += 1
        if not size <= DIVERGED * start:
            raise CollapsedError(
                f"LiSSA diverged after {taken} steps with scale={scale:.3g}; raise method.scale, "
                f"or set it to null, which measures the largest eigenvalue"
            )
    return Solution(x, size / start, steps + taken)


def largest(product: Product, like: Tensor, damping: float) -> tuple[float, int]:
    """Return a bound of the largest eigenvalue of H + λ, and the products it cost.

    Power iteration from a fixed vector, raised by a fifth: it approaches from below, and LiSSA
    converges from half the true value on.
    """
    x = Draws(0, "largest", total=len(like), device=like.device).normal(*like.shape[1:])
    x = x.to(like.dtype)
    size = 0.0
    for _ in range(POWER):
        x = x / x.norm()
        x = product(x) + damping * x
        size = math.sqrt(_dot(x, x))
        if not math.isfinite(size) or size == 0.0:
            raise CollapsedError("the curvature is zero or not finite; raise method.damping")
    return MARGIN * size, POWER


def adam(
    product: Product,
    g: Tensor,
    *,
    lr: float,
    iterations: int,
    tolerance: float,
    patience: int,
    quality: Callable[[Tensor], float] | None,
) -> Solution:
    """Minimise xᵀHx/2 - gᵀx by Adam from zero: IFRU's published solver.

    With `quality` the x of the best quality is returned, whatever its residual: the published
    rule stops by validation AUC, that is by utility and not by what was forgotten.

    Args:
        product: Multiplies by H.
        g: Right side, of any shape.
        lr: Step length: about what each entry of x moves in a step.
        iterations: Products at most.
        tolerance: Without `quality`: relative residual at which it stops.
        patience: With `quality`: steps in a row without a better one after which it stops.
        quality: How good an x is, larger is better.

    Raises:
        CollapsedError: It diverged, or g is not finite.
    """
    x = torch.zeros_like(g)
    optimizer = torch.optim.Adam([x], lr=lr)
    start = _size(g)
    best, top, waited = Solution(x.clone(), 1.0, 0), -math.inf, 0
    size, steps = start, 0
    while steps < iterations and (quality is not None or size > tolerance * start):
        x.grad = product(x) - g
        size = math.sqrt(_dot(x.grad, x.grad))
        if not math.isfinite(size):
            raise CollapsedError(f"Adam diverged after {steps} steps; lower method.lr")
        optimizer.step()
        steps += 1
        if quality is not None:
            found = quality(x)
            waited = 0 if found > top else waited + 1
            if found > top:
                top, best = found, Solution(x.clone(), math.nan, steps)
            if waited > patience:
                break
    if quality is None:
        return Solution(x, size / start if start else 0.0, steps)
    off = product(best.x) - g
    return Solution(best.x, math.sqrt(_dot(off, off)) / start if start else 0.0, steps)


def _size(g: Tensor) -> float:
    """Return the norm of a right side, refusing one that is not finite."""
    found = math.sqrt(_dot(g, g))
    if not math.isfinite(found):
        raise CollapsedError(
            "the gradient of the request is not finite: the model's scores are not"
        )
    return found


def _dot(one: Tensor, other: Tensor) -> float:
    return float(torch.dot(one.reshape(-1).double(), other.reshape(-1).double()))


class Problem:
    """One request as an influence problem: both graphs, the examples, the rows that may change.

    Args:
        ctx: The run; its model propagates over the kept edges already.
        config: Of the method.
        loss: A key of `LOSSES`.
        reference: Rows as IFRU's code selects them: forgotten nodes stay only if their own share
            is above the quantile.

    Attributes:
        old: The original over the graph it was trained on.
        new: The same weights over the graph without the forgotten edges.
        forget: What leaves the loss. With BPR forgotten pairs together with their negatives; with
            cross-entropy the pairs alone: that a user did not choose an item remains true.
        retain: What stays in it.
        kept: Kept pairs with their own negatives, [n, 1 + negatives].
        rows: Free rows that may change, int64 [k].
    """

    def __init__(
        self, ctx: Context, config: InfluenceConfig, loss: str, reference: bool = False
    ) -> None:
        model, forget, retain = ctx.model, ctx.split("forget"), ctx.split("retain")
        assert isinstance(model, Recommender)
        assert isinstance(forget, Interactions) and isinstance(retain, Interactions)
        self.ctx, self.config, self.loss = ctx, config, LOSSES[loss]
        before, after = copy.deepcopy(model), copy.deepcopy(model)
        gone = torch.from_numpy(forget.edge[forget.edge >= 0])
        before.keep(torch.cat([model.kept.nonzero()[:, 0].cpu(), gone]))
        self.before = before
        self.old, self.new = Vectors(before), Vectors(after)
        known = joined([forget, retain], forget.items)
        device = self.old.free.device

        def drawn(data: Interactions, name: str) -> Examples:
            draws = Draws(ctx.seed, "influence", name, total=len(data), device=device)
            return examples_of(data, known, draws, config.negatives)

        self.forget, self.kept = drawn(forget, "forget"), drawn(retain, "retain")
        self.retain = self.kept
        if loss == "bce":
            size = 1 + config.negatives
            others = self.forget.columns(1, size)
            self.retain = self.kept.columns(0, size).plus(others)
            self.forget = self.forget.columns(0, 1)
        self.rows = selected_rows(
            before, self.forget, config.rows, config.quantile, forgotten=not reference
        )
        ctx.engine.meter.examples_seen += len(forget) + len(retain)

    @property
    def train(self) -> Examples:
        """All examples, forgotten ones first."""
        return self.forget.plus(self.retain)

    def removed(self) -> Tensor:
        """Return the gradient of the forgotten pairs, under the old graph, [k, d]."""
        return gradient(self.old, self.forget, self.loss)[self.rows]

    def spilled(self) -> Tensor:
        """Return the gradient of the kept pairs under the old graph less the new one, [k, d].

        Only pairs whose final vectors the request changes have any: none without propagation.
        """
        users = self.old.graph.users
        moved = (self.old.final != self.new.final).any(dim=1)
        touched = self.retain.where(
            moved[self.retain.user] | moved[users + self.retain.item].any(dim=1)
        )
        if not len(touched.user):
            return torch.zeros_like(self.old.free[self.rows])
        old, new = (gradient(side, touched, self.loss) for side in (self.old, self.new))
        return (old - new)[self.rows]

    def curvature(self, exact: bool | None = None, propagated: bool = True) -> Curvature:
        """Return the curvature of the summed loss on all training pairs, under the old graph.

        Args:
            exact: The Hessian; None: as the config says.
            propagated: False: that of the free tables as final vectors, as IFRU's code has it.
        """
        exact = self.config.curvature == "hessian" if exact is None else exact
        examples, scale = self.train, 1.0
        if self.config.share < 1.0:
            size = len(examples.user)
            count = max(1, round(self.config.share * size))
            chance = Draws(self.ctx.seed, "influence", "share", total=size).uniform()
            chosen = chance.argsort()[:count].to(examples.user.device)
            examples, scale = examples.where(chosen), size / count
        vectors = self.old if propagated else Vectors(self.before, propagated=False)
        return Curvature(vectors, examples, self.loss, self.rows, exact, scale)

    def solve(self, g: Tensor) -> Solution:
        """Return (H + λ)⁻¹g by the solver of the config, [k, d]."""
        config = self.config
        product, common = self.curvature(), (config.damping, config.iterations, config.tolerance)
        if config.solver == "cg":
            found = conjugate_gradients(product, g, *common)
        else:
            found = lissa(product, g, *common, scale=config.scale)
        if found.residual > config.tolerance:
            logger.warning(
                "%s: the solver stopped after %d products at a relative residual of %.2g (wanted "
                "%.2g); raise method.iterations or method.damping",
                self.ctx.label,
                found.steps,
                found.residual,
                config.tolerance,
            )
        return found

    def published(self, g: Tensor, lr: float, steps: int, patience: int) -> Solution:
        """Return IFRU's published solution of H_mean·p = g, divided by n: [k, d].

        Adam on p, undamped, with the Hessian of the unpropagated tables; the p of the best
        validation AUC if there is a validation set, otherwise that of the last step.

        Args:
            g: The gradient that disappears.
            lr: Of Adam on p; weights move by about lr/n a step, so it is one for large n.
            steps: At most.
            patience: Steps without a better AUC after which it stops.
        """
        size = self.train.item.numel()
        product = self.curvature(exact=True, propagated=False)
        ctx, quality = self.ctx, None
        if ctx.has_split("val"):
            val = ctx.split("val")
            assert isinstance(val, Interactions)
            draws = Draws(ctx.seed, "influence", "val", total=len(val), device=g.device)
            held_out = examples_of(val, val.known, draws, 1)
            quality = self._quality(held_out, size)
        found = adam(
            lambda p: product(p) / size,
            g,
            lr=lr,
            iterations=steps,
            tolerance=self.config.tolerance,
            patience=patience,
            quality=quality,
        )
        return found._replace(x=found.x / size)

    def _quality(self, examples: Examples, size: int) -> Callable[[Tensor], float]:
        """Return the AUC of held-out pairs against negatives, as a function of p."""
        users, vectors = self.new.graph.users, self.new
        sums = Sums(vectors.graph, examples)

        def auc(p: Tensor) -> float:
            free = vectors.free.index_add(0, self.rows, p, alpha=1.0 / size)
            final = vectors.push(free)
            scores = sums.scores(final[:users], final[users:]).cpu().numpy()
            return Ranking.of(scores[:, 0], scores[:, 1:].ravel()).auc

        return auc

    def apply(self, found: Solution) -> None:
        """Add a step to the free rows of the run's model.

        Raises:
            CollapsedError: The step is not finite.
        """
        ctx, model = self.ctx, self.ctx.model
        ctx.engine.meter.steps += found.steps
        ctx.engine.meter.examples_seen += found.steps * len(self.train.user)
        if not bool(torch.isfinite(found.x).all()):
            raise CollapsedError("the influence step is not finite; raise method.damping")
        users = self.old.graph.users
        is_user = self.rows < users
        assert isinstance(model, Recommender)
        with torch.no_grad():
            model.get_parameter("users").index_add_(0, self.rows[is_user], found.x[is_user])
            model.get_parameter("items").index_add_(
                0, self.rows[~is_user] - users, found.x[~is_user]
            )


def selected_rows(
    model: Recommender, forget: Examples, rows: str, quantile: float, forgotten: bool = True
) -> Tensor:
    """Return the free rows that a request may change, sorted, int64 [k].

    `neighbours` gives a node the weight 1/degree · Σ (forgotten pairs / degree) over the touched
    nodes next to it, itself included, degrees counting the node itself (IFRU's 1-hop rule), and
    takes those above a quantile of all weights that are not zero.

    Args:
        model: Propagates over the graph before the request.
        forget: Forgotten pairs; their negatives count for nothing.
        rows: users, touched, neighbours or all.
        quantile: Of the neighbours' weights.
        forgotten: Whether touched nodes are chosen whatever their weight; in IFRU's code they
            are not.
    """
    graph, device = model.graph, forget.user.device
    if rows == "all":
        return torch.arange(graph.nodes, device=device)
    user, item = forget.user, forget.item[:, 0] + graph.users
    if rows == "users":
        item = item[:0]
    touched = torch.bincount(torch.cat([user, item]), minlength=graph.nodes)
    if rows in ("users", "touched"):
        return touched.nonzero()[:, 0]
    on = model.kept.cpu()
    one, other = graph.user[on].to(device), (graph.item[on] + graph.users).to(device)
    degree = 1.0 + torch.bincount(torch.cat([one, other]), minlength=graph.nodes).double()
    share = touched / degree
    weight = share.index_add(0, one, share[other]).index_add(0, other, share[one]) / degree
    reached = weight > 0
    # `quantile` of torch refuses more than 2²⁴ numbers.
    ordered = weight[reached].sort().values
    at = quantile * (len(ordered) - 1)
    low = ordered[math.floor(at)]
    bound = low + (at - math.floor(at)) * (ordered[math.ceil(at)] - low)
    chosen = weight > bound
    if forgotten:
        chosen |= touched > 0
    return chosen.nonzero()[:, 0]
