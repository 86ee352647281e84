"""Which training pairs a request names: edges, users, items, or the worst-fitting pairs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mmforget.errors import DataError, SplitError, unknown
from mmforget.options import option
from mmforget.recsys.data import Interactions
from mmforget.recsys.formats import Table, read_edges
from mmforget.rng import derive

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

SHOWN = 6  # names listed in an error


@dataclass(frozen=True)
class Request:
    """What is to be forgotten: a random share unless it is named."""

    kind: str = option(
        "edges",
        "edges: single interactions; users, items: all interactions of some; users_items: of both",
        choices=("edges", "users", "items", "users_items"),
    )
    fraction: float = option(
        0.05, "share of edges, users or items that is drawn if none is named", low=0, high=1
    )
    edges: list[str] = option([], "for kind=edges: pairs such as 12:345 (user:item)")
    file: str | None = option(None, "for kind=edges: a file of pairs, user,item a line")
    users: list[str] = option([], "for kind=users: ids as the data name them")
    items: list[str] = option([], "for kind=items: ids as the data name them")
    seed: int = option(0, "seed of the choice", low=0)


@dataclass(frozen=True)
class AdversarialRequest(Request):
    """A request, or the protocol of injected edges that a trained model finds implausible."""

    kind: str = option(
        "edges",
        "as in Request; adversarial: the worst-fitting pairs are added to the training data, and "
        "then forgotten",
        choices=("edges", "adversarial", "users", "items", "users_items"),
    )
    file: str | None = option(
        None, "for kind=edges: pairs to forget; for kind=adversarial: pairs to inject and forget"
    )
    share: float = option(
        1.0, "for kind=adversarial: share of users and items that get an edge", low=0, high=1
    )


def forgotten_pairs(request: Request, train: Interactions, table: Table) -> Bools:
    """Return which training pairs a request names, [n].

    Args:
        request: Of kind edges, users, items or users_items.
        train: All training pairs.
        table: The data set, for the names of users and items.

    Raises:
        SplitError: It names what is not there, or nothing, or everything.
    """
    _only(request)
    if request.kind == "edges":
        chosen = _edges(request, train, table)
    else:
        chosen = np.zeros(len(train), np.bool_)
        for kind, ids, column, names, size in (
            ("users", request.users, train.user, table.user_names, table.users),
            ("items", request.items, train.item, table.item_names, table.items),
        ):
            if kind in request.kind.split("_"):
                named = [_number(kind[:-1], name, names, size) for name in ids]
                chosen |= np.isin(column, _nodes(kind, named, column, request))
    if not chosen.any():
        raise SplitError(
            f"the request forgets nothing: a fraction of {request.fraction} of the {request.kind} "
            f"is none. Raise request.fraction"
        )
    if chosen.all():
        raise SplitError(
            f"the request forgets all {len(train)} training interactions; at least one must be kept"
        )
    return chosen


def _only(request: Request) -> None:
    """Refuse names that the kind would ignore."""
    named = {"edges": bool(request.edges or request.file)}
    named |= {"users": bool(request.users), "items": bool(request.items)}
    for name, given in named.items():
        if given and name not in request.kind.split("_"):
            key = "file or request.edges" if name == "edges" else name
            raise SplitError(f"request.{key} is given, but request.kind={request.kind}")


def _edges(request: Request, train: Interactions, table: Table) -> Bools:
    chosen = np.zeros(len(train), np.bool_)
    if request.edges and request.file:
        raise SplitError("request.edges and request.file are both given; give one of them")
    if not request.edges and not request.file:
        rng = np.random.default_rng(derive(request.seed, "request", "edges"))
        count = max(1, round(request.fraction * len(train))) if request.fraction else 0
        chosen[rng.choice(len(train), count, replace=False)] = True
        return chosen
    pairs = read_edges(Path(request.file)) if request.file else _parsed(request.edges, table)
    chosen[places(pairs, train)] = True
    return chosen


def _parsed(edges: Sequence[str], table: Table) -> tuple[Ints, Ints]:
    users, items = [], []
    for edge in edges:
        user, separator, item = edge.partition(":")
        if not separator:
            raise SplitError(f"request.edges: {edge!r} is no pair. Write user:item, such as 12:345")
        users.append(_number("user", user, table.user_names, table.users))
        items.append(_number("item", item, table.item_names, table.items))
    return np.array(users, np.int64), np.array(items, np.int64)


def places(pairs: tuple[Ints, Ints], train: Interactions) -> Ints:
    """Return the training pairs' indices of some pairs.

    Raises:
        SplitError: One is no training pair.
    """
    user, item = pairs
    keys = train.user * train.items + train.item
    order = np.argsort(keys)
    wanted = user * train.items + item
    place: Ints = order[np.searchsorted(keys[order], wanted).clip(max=len(keys) - 1)]
    inside = (user >= 0) & (item >= 0) & (item < train.items)
    missing = ~(inside & (keys[place] == wanted))
    if missing.any():
        first = zip(user[missing][:SHOWN], item[missing][:SHOWN], strict=True)
        shown = ", ".join(f"{u}:{i}" for u, i in first)
        raise SplitError(
            f"the request names {int(missing.sum())} interactions that are not in the training "
            f"data, such as {shown}; only what was trained on can be forgotten"
        )
    return place


def _nodes(kind: str, named: Sequence[int], column: Ints, request: Request) -> Ints:
    """Return the users or items that a request names, or a random share of those with edges.

    Raises:
        SplitError: One that is named has no training pair.
    """
    active = np.unique(column)
    if not named:
        rng = np.random.default_rng(derive(request.seed, "request", kind))
        count = max(1, round(request.fraction * len(active))) if request.fraction else 0
        drawn: Ints = rng.choice(active, count, replace=False)
        return drawn
    chosen = np.array(named, np.int64)
    idle = chosen[~np.isin(chosen, active)]
    if len(idle):
        raise SplitError(
            f"{kind[:-1]} {', '.join(map(str, idle[:SHOWN].tolist()))} of the request has no "
            f"training interaction, so there is nothing to forget"
        )
    return chosen


def _number(kind: str, name: str, names: Sequence[str] | None, size: int) -> int:
    """Return the number of a user or item by the name that the data give it."""
    if names is not None:
        if name not in names:
            raise SplitError(unknown(f"{kind} in the request:", name, names, "the data folder"))
        return list(names).index(name)
    if not name.isdecimal() or int(name) >= size:
        raise SplitError(f"unknown {kind} in the request: {name!r}. Accepted: 0 to {size - 1}")
    return int(name)


def read_injected(path: Path, table: Table) -> tuple[Ints, Ints]:
    """Return the pairs of a file that are to be injected: new pairs of known users and items.

    Raises:
        DataError: A pair names a user or item that the data do not have.
    """
    user, item = read_edges(path)
    outside = (user < 0) | (user >= table.users) | (item < 0) | (item >= table.items)
    if outside.any():
        raise DataError(
            f"{path} names {int(outside.sum())} pairs outside the {table.users} users and "
            f"{table.items} items of the data, such as {user[outside][0]}:{item[outside][0]}"
        )
    return user, item
