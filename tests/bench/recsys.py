"""Speed of recsys against a plain loop: `python -m tests.bench.recsys --data lastfm`.

The plain loop works as the public LightGCN code does, written anew from its description: a COO
matrix with int64 indices under autograd, all layers stacked and averaged, one Python loop over
sampled triples with rejection, and an evaluation that propagates again for every 100 users and
goes through Python lists for masks and labels. Both sides start from the same vectors and see the
same pairs, batch size and optimiser, in one process and by turns, so that other work on the machine
hits both; each figure is the best of several. Peak memory is taken in a process of its own for each
side, above what is resident once the data are read.
"""

import argparse
import copy
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmforget.context import Context
from mmforget.engine import Engine, Runtime
from mmforget.recsys.adapter import RankingAdapter
from mmforget.recsys.backbones.lightgcn import LightGCN
from mmforget.recsys.data import Interactions, joined
from mmforget.recsys.formats import FORMATS, Table, read_table
from mmforget.recsys.graph import Graph
from mmforget.recsys.methods.unlearnrec import UnlearnRec, UnlearnRecConfig
from mmforget.recsys.ranking import Ranked, rank
from mmforget.recsys.training import Ranking
from mmforget.training import fit
from mmforget.types import Batch, Splits, Training

DIM, LAYERS, DECAY, BATCH, LR, K = 64, 3, 1e-4, 2048, 1e-3, 20
EVAL_BATCH = 100  # users for which the plain evaluation propagates anew
SIDES = ("plain", "ours")
# users, items, training pairs, test pairs of the published sets
SIZES = {"lastfm": (1892, 4489, 42135, 10533), "gowalla": (29858, 40981, 810128, 217242)}


class PlainData:
    """The pairs as the plain loop holds them: an array of items for each user."""

    def __init__(self, table: Table, size: int) -> None:
        self.users, self.items, self.size = table.users, table.items, size
        self.positives = _by_user(table.users, *table.train)
        tested = _by_user(table.users, *table.test)
        self.tested = {u: items.tolist() for u, items in enumerate(tested) if len(items)}

    def sample(self, seed: int) -> Tensor:
        """Return the triples of an epoch, [n, 3]: users uniformly, one loop over them."""
        rng = np.random.RandomState(seed)
        triples = []
        for user in rng.randint(0, self.users, self.size):
            liked = self.positives[user]
            if len(liked) == 0:
                continue
            item = liked[rng.randint(0, len(liked))]
            while True:
                other = rng.randint(0, self.items)
                if other not in liked:
                    break
            triples.append([user, item, other])
        return torch.from_numpy(np.array(triples))


class PlainLightGCN(nn.Module):
    """Propagates with a sparse COO matrix; all layers are stacked and averaged."""

    def __init__(self, table: Table, start: Tensor) -> None:
        super().__init__()
        self.user = nn.Embedding(table.users, DIM, _weight=start[: table.users].clone())
        self.item = nn.Embedding(table.items, DIM, _weight=start[table.users :].clone())
        user, item = (torch.from_numpy(column) for column in table.train)
        nodes = len(start)
        rows = torch.cat([user, item + table.users])
        columns = torch.cat([item + table.users, user])
        scale = torch.bincount(rows, minlength=nodes).float().rsqrt()
        scale[torch.isinf(scale)] = 0.0
        index, value = torch.stack([rows, columns]), scale[rows] * scale[columns]
        matrix = torch.sparse_coo_tensor(index, value, (nodes, nodes)).coalesce()
        self.register_buffer("matrix", matrix, persistent=False)

    def vectors(self) -> tuple[Tensor, Tensor]:
        """Return the final vectors of users and items."""
        layer = torch.cat([self.user.weight, self.item.weight])
        layers = [layer]
        for _ in range(LAYERS):
            layer = torch.sparse.mm(self.matrix, layer)
            layers.append(layer)
        final = torch.stack(layers, dim=1).mean(dim=1)
        count = len(self.user.weight)
        return final[:count], final[count:]

    def loss(self, user: Tensor, item: Tensor, other: Tensor) -> Tensor:
        """Return BPR and half the squared norms of the free vectors of a batch."""
        users, items = self.vectors()
        chosen = (users[user] * items[item]).sum(1)
        rejected = (users[user] * items[other]).sum(1)
        free = (self.user(user), self.item(item), self.item(other))
        norms = sum((part.norm(2).pow(2) for part in free), torch.zeros((), device=user.device))
        return F.softplus(rejected - chosen).mean() + DECAY * 0.5 * norms / len(user)


def plain_epoch(
    net: PlainLightGCN, optimizer: torch.optim.Optimizer, triples: Tensor, device: torch.device
) -> None:
    """Take the steps of one epoch over sampled triples."""
    net.train()
    triples = triples[torch.randperm(len(triples))].to(device)
    for first in range(0, len(triples), BATCH):
        user, item, other = triples[first : first + BATCH].unbind(1)
        optimizer.zero_grad()
        loss = net.loss(user, item, other)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        loss.item()


@torch.no_grad()
def plain_evaluation(
    net: PlainLightGCN, data: PlainData, count: int | None, device: torch.device
) -> tuple[float, float]:
    """Return Recall@20 and NDCG@20 over the first `count` test users (None: all)."""
    net.eval()
    tested = list(data.tested)[:count]
    recall = ndcg = 0.0
    for start in range(0, len(tested), EVAL_BATCH):
        some = tested[start : start + EVAL_BATCH]
        users, items = net.vectors()
        rating = torch.sigmoid(users[torch.tensor(some, device=device)] @ items.T)
        rows, columns = [], []
        for row, user in enumerate(some):
            rows.extend([row] * len(data.positives[user]))
            columns.extend(data.positives[user].tolist())
        rating[rows, columns] = -1024.0
        top = rating.topk(K).indices.cpu().numpy()
        for user, found in zip(some, top, strict=True):
            truth = data.tested[user]
            hits = np.array([float(item in truth) for item in found])
            recall += float(hits.sum()) / len(truth)
            gains = 1.0 / np.log2(np.arange(2, K + 2))
            ndcg += float((hits * gains).sum() / gains[: min(K, len(truth))].sum())
    return recall / len(tested), ndcg / len(tested)


class Clocked(Engine):
    """The engine, which counts the seconds that batches take to make."""

    loading = 0.0

    def load(self, *args: Any, **kwargs: Any) -> list[dict[str, Batch]]:
        """Prepare one effective batch; see `Engine.load`."""
        begin = time.perf_counter()
        found = super().load(*args, **kwargs)
        self.loading += time.perf_counter() - begin
        return found


class Turns(Ranking):
    """Our training, which between two epochs hands over to someone else, and times its own.

    Attributes:
        seconds: Of each epoch.
        sampling: Those of them that its batches took.
    """

    def __init__(self, recipe: Training, between: Callable[[Context], None], engine: Clocked):
        super().__init__(recipe)
        self.between = between
        self.engine = engine
        self.seconds: list[float] = []
        self.sampling: list[float] = []

    def setup(self, ctx: Context) -> None:
        """Start the clock."""
        sync(self.engine.device)
        self.since, self.engine.loading = time.perf_counter(), 0.0

    def after_epoch(self, ctx: Context) -> None:
        """Stop the clock while the other side works."""
        sync(self.engine.device)
        self.seconds.append(time.perf_counter() - self.since)
        self.sampling.append(self.engine.loading)
        self.between(ctx)
        self.setup(ctx)


class Part(Interactions):
    """All pairs, of which an epoch draws only some: for epochs that would take an hour."""

    def __init__(self, whole: Interactions, size: int) -> None:
        super().__init__(whole.user, whole.item, whole.items, whole.edge, by_user=True)
        self.size = size

    def __len__(self) -> int:
        return self.size


class Reached(Exception):
    """Training has reached the wanted recall."""


class Ours:
    """The pairs, the graph and the recipe as a benchmark of the project holds them."""

    def __init__(self, table: Table, given: argparse.Namespace) -> None:
        self.table = table
        self.engine = Clocked(Runtime(device=given.device, threads=given.threads, progress=False))
        self.adapter = RankingAdapter()
        self.graph = Graph(table.users, table.items, *table.train)
        edge = np.arange(len(self.graph))
        self.train = Interactions(*table.train, table.items, edge).sampled(by_user=True)
        self.drawn = Part(self.train, drawn(table, given))
        self.test = Interactions(*table.test, table.items)
        self.known = joined([self.train], table.items)

    def model(self, seed: int = 0) -> LightGCN:
        """Return a fresh model."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = LightGCN(self.graph, DIM, LAYERS, decay=DECAY)
        made = self.engine.place(made)  # type: ignore[assignment]
        return made

    def fit(
        self, model: nn.Module, epochs: int, between: Callable[[Context], None], data: Interactions
    ) -> Turns:
        """Train; return what was timed."""
        recipe = Training(epochs=epochs, lr=LR, optimizer="adam", batch_size=BATCH)
        method = Turns(recipe, between, self.engine)
        fit(self.engine, model, self.adapter, data, recipe, 0, method=method)
        return method

    @torch.no_grad()
    def evaluate(self, model: LightGCN, count: int | None = None) -> Ranked:
        """Propagate and rank, for the first `count` test users (None: all)."""
        return rank(model.table(), self.table.users, self.first(count), self.known, (K,))

    def first(self, count: int | None) -> Interactions:
        """Return the test pairs of the first users that have any."""
        wanted = np.unique(self.test.user)[:count]
        return self.test.select(np.flatnonzero(np.isin(self.test.user, wanted)).tolist())


def compare(table: Table, given: argparse.Namespace) -> dict[str, Any]:
    """Return seconds and quality of both sides, trained by turns."""
    ours = Ours(table, given)
    device = ours.engine.device
    model, data = ours.model(), PlainData(table, len(ours.drawn))
    plain = PlainLightGCN(table, start(model)).to(device)
    optimizer = torch.optim.Adam(plain.parameters(), lr=LR)
    spent: dict[str, list[float]] = {"sample": [], "step": []}

    def plain_turn(ctx: Context) -> None:
        triples: list[Tensor] = []
        spent["sample"].append(timed(lambda: triples.append(data.sample(ctx.epoch)), device))
        steps = partial(plain_epoch, plain, optimizer, triples[0], device)
        spent["step"].append(timed(steps, device))

    trained = ours.fit(model, given.epochs, plain_turn, ours.drawn)
    count = given.eval_users
    judged: list[tuple[float, float]] = []
    evaluations: dict[str, list[float]] = {"plain": [], "ours": []}
    for _ in range(given.repeats):
        evaluations["ours"].append(timed(partial(ours.evaluate, model, count), device))
        work = partial(plain_evaluation, plain, data, count, device)
        evaluations["plain"].append(timed(lambda: judged.append(work()), device))  # noqa: B023
    with torch.no_grad():  # all users, by the same ranking: neither side judges itself
        final = torch.cat(plain.vectors())
    theirs = rank(final, table.users, ours.test, ours.known, (K,))
    own = ours.evaluate(model)
    check = rank(final, table.users, ours.first(count), ours.known, (K,))
    both = check.mean("recall", K), judged[0][0]
    if abs(both[0] - both[1]) > 2e-3:  # sigmoids may tie where scores do not
        raise AssertionError(f"two evaluations of one model differ: {both}")
    steps = [a - b for a, b in zip(trained.seconds, trained.sampling, strict=True)]
    pairs = {
        "epoch_s": (min(map(sum, zip(*spent.values(), strict=True))), min(trained.seconds)),
        "epoch_sampling_s": (min(spent["sample"]), min(trained.sampling)),
        "epoch_steps_s": (min(spent["step"]), min(steps)),
        "evaluation_s": (min(evaluations["plain"]), min(evaluations["ours"])),
        f"recall@{K}": (theirs.mean("recall", K), own.mean("recall", K)),
        f"ndcg@{K}": (theirs.mean("ndcg", K), own.mean("ndcg", K)),
    }
    return {name: dict(zip(SIDES, values, strict=True)) for name, values in pairs.items()}


def start(model: LightGCN) -> Tensor:
    """Return a model's free vectors, users first, on the CPU."""
    return torch.cat([model.users, model.items]).detach().cpu()


def request(table: Table, given: argparse.Namespace) -> dict[str, float]:
    """Return the time of an UnlearnRec request, and of retraining to the same recall.

    Recall@20 on test of the unlearned model decides how long retraining goes on: the shortest
    training that is as good. Evaluation between epochs is not counted.
    """
    ours = Ours(table, given)
    device = ours.engine.device
    rng = np.random.default_rng(0)
    gone = np.zeros(len(ours.train), np.bool_)
    gone[rng.choice(len(gone), max(1, round(given.share * len(gone))), replace=False)] = True
    forget = ours.train.select(np.flatnonzero(gone).tolist())
    retain = ours.train.select(np.flatnonzero(~gone).tolist())
    test = ours.test
    splits = Splits(forget=forget, retain=retain, train=ours.train, holdout=test, test=test)
    original = ours.model()
    trained = sum(ours.fit(original, given.epochs, lambda ctx: None, ours.train).seconds)
    method = UnlearnRec(UnlearnRecConfig(epochs=given.prepare_epochs))

    def context(model: nn.Module, reads: frozenset[str]) -> Context:
        return Context(
            engine=ours.engine,
            adapter=ours.adapter,
            model=model,
            splits=splits,
            reads=reads,
            label="bench",
            seed=0,
        )

    def prepare() -> None:
        ctx = context(copy.deepcopy(original), frozenset({"train"}))
        method.prepared = method.prepare(ctx)

    prepared = timed(prepare, device)
    students = [copy.deepcopy(original) for _ in range(given.repeats)]

    def answer(student: LightGCN) -> None:
        ours.adapter.apply_request(student, splits)
        method.run(context(student, method.reads)).eval()
        student.final()  # it can rank again

    spent = [timed(partial(answer, student), device) for student in students]
    before, wanted = (ours.evaluate(m).mean("recall", K) for m in (original, students[0]))
    retrained = ours.model()
    retrained.keep(torch.from_numpy(retain.edge).to(device))
    best = [0.0]

    def judge(ctx: Context) -> None:
        best[0] = max(best[0], ours.evaluate(retrained).mean("recall", K))
        if best[0] >= wanted:
            raise Reached

    recipe = Training(epochs=given.retrain_epochs, lr=LR, optimizer="adam", batch_size=BATCH)
    work = Turns(recipe, judge, ours.engine)
    try:
        fit(ours.engine, retrained, ours.adapter, retain, recipe, 0, method=work)
        reached = False
    except Reached:
        reached = True
    retraining = sum(work.seconds)
    return {
        "original_training_s": trained,
        "original_recall": before,
        "prepare_s": prepared,
        "request_s": min(spent),
        "unlearned_recall": wanted,
        "retrain_s": retraining,
        "retrain_epochs": len(work.seconds),
        "retrain_recall": best[0],
        "retrain_reached": float(reached),
        "request_ratio": retraining / min(spent),
    }


def peak(table: Table, given: argparse.Namespace, side: str) -> int:
    """Return peak bytes of one epoch and one evaluation of a side, above what is resident now."""
    engine = Engine(Runtime(device=given.device, threads=given.threads, progress=False))
    with engine.metered() as meter:
        ours = Ours(table, given)
        model = ours.model()
        if side == "ours":
            ours.fit(model, 1, lambda ctx: None, ours.drawn)
            ours.evaluate(model, given.eval_users)
        else:
            data = PlainData(table, len(ours.drawn))
            plain = PlainLightGCN(table, start(model)).to(engine.device)
            optimizer = torch.optim.Adam(plain.parameters(), lr=LR)
            plain_epoch(plain, optimizer, data.sample(0), engine.device)
            plain_evaluation(plain, data, given.eval_users, engine.device)
    return meter.peak_bytes


def measured_apart(side: str) -> int:
    """Return what `peak` finds in a process of its own, under the words of this one."""
    words = [sys.executable, "-m", "tests.bench.recsys", *sys.argv[1:], "--peak", side]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.split()[-1])


def drawn(table: Table, given: argparse.Namespace) -> int:
    """Return the examples of an epoch: as many as pairs, or those of `--steps` steps."""
    size = len(table.train[0])
    return size if given.steps is None else min(size, given.steps * BATCH)


def generated(size: str) -> Table:
    """Return a random graph of a published set's size, its items of very unequal popularity."""
    users, items, trained, tested = SIZES[size]
    rng = np.random.default_rng(0)
    liking, popular = rng.lognormal(0, 0.8, users), rng.lognormal(0, 1.5, items)
    keys = np.empty(0, np.int64)
    while len(keys) < trained + tested:
        user = rng.choice(users, trained + tested, p=liking / liking.sum())
        item = rng.choice(items, trained + tested, p=popular / popular.sum())
        keys = np.unique(np.concatenate([keys, user.astype(np.int64) * items + item]))
    keys = rng.permutation(keys)[: trained + tested]
    parts = (np.sort(keys[:trained]), np.sort(keys[trained:]))
    train, test = ((part // items, part % items) for part in parts)
    return Table(
        users=users,
        items=items,
        train=train,
        test=test,
        val=None,
        features={},
        format="generated",
        notes=(),
    )


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Return the wall time of one run, seconds."""
    sync(device)
    begin = time.perf_counter()
    work()
    sync(device)
    return time.perf_counter() - begin


def sync(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _by_user(users: int, user: Any, item: Any) -> list[Any]:
    order = np.argsort(user, kind="stable")
    return np.split(item[order], np.cumsum(np.bincount(user, minlength=users))[:-1])


def main() -> None:
    """Print the figures as a table and as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of interactions; none: a random graph")
    parser.add_argument("--format", default="auto", choices=FORMATS)
    parser.add_argument("--size", default="lastfm", choices=SIZES, help="of the random graph")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=5, help="epochs of both sides")
    parser.add_argument("--steps", type=int, help="end every epoch after n steps, on both sides")
    parser.add_argument("--repeats", type=int, default=3, help="of evaluations and requests")
    parser.add_argument("--eval-users", type=int, help="time evaluation on the first n test users")
    parser.add_argument("--request", action="store_true", help="UnlearnRec against retraining")
    parser.add_argument("--share", type=float, default=0.05, help="edges of the request")
    parser.add_argument("--prepare-epochs", type=int, default=20)
    parser.add_argument("--retrain-epochs", type=int, default=200, help="retraining gives up then")
    parser.add_argument("--peak", choices=SIDES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    warnings.filterwarnings("ignore", message="Sparse")
    table = read_table(given.data, given.format) if given.data else generated(given.size)
    if given.peak:
        print(peak(table, given, given.peak))
        return
    device = torch.device(given.device)
    machine = platform.processor() or platform.machine()
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    name = given.data.name if given.data else f"random graph of the size of {given.size}"
    sizes = f"{table.users} x {table.items}, {len(table.train[0])}/{len(table.test[0])} pairs"
    print(f"machine: {machine}, {os.cpu_count()} cores, torch {torch.__version__}")
    print(f"data: {name}, {sizes}; {given.threads} threads, batch {BATCH}, d {DIM}, L {LAYERS}")
    if given.request:
        found: dict[str, Any] = dict(request(table, given))
        for key, value in found.items():
            print(f"{key:20s} {value:12.4f}")
        if not found["retrain_reached"]:
            print(f"retraining did not reach the recall within {given.retrain_epochs} epochs")
    else:
        found = compare(table, given)
        peaks = {side: measured_apart(side) / 2**20 for side in SIDES}
        found["peak_mib"] = peaks
        tested = len(np.unique(table.test[0]))
        said = tested if given.eval_users is None else min(given.eval_users, tested)
        steps = -(-drawn(table, given) // BATCH)
        whole = -(-len(table.train[0]) // BATCH)
        print(f"epochs: {given.epochs}, each {steps} of its {whole} steps")
        print(f"evaluation: first {said} of {tested} test users; quality: all of them")
        print(f"{'':20s} {'plain':>12s} {'ours':>12s} {'ratio':>8s}")
        for key, values in found.items():
            ratio = values["plain"] / values["ours"]
            print(f"{key:20s} {values['plain']:12.4f} {values['ours']:12.4f} {ratio:8.2f}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
