"""Folders of interactions in the layouts in which recommendation data are published.

Every layout ends in one `Table`: pairs of user and item, counted from 0, each once, sorted. What
was put right on the way (duplicates, test pairs that are trained on, users without items) stands in
its notes. Text is parsed a block of lines at a time with no loop over tokens, so that a file of a
million pairs takes about a second and memory does not grow with anything but the pairs.
"""

import io
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import sparse

from mmforget.errors import DataError
from mmforget.recsys.unpickle import SUFFIXES, load_pickle, opened
from mmforget.rng import derive

logger = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float32]
Pair = tuple[Ints, Ints]

BLOCK = 1 << 24  # bytes of text parsed at a time
DIGITS = 18  # what an int64 holds for certain
HUGE = 10_000_000  # ids from here on must be justified by the number of interactions,
SPARSE = 100  # of which there must be one for so many ids
SHOWN = 12  # names of files listed in an error

USER_COLUMNS = ("userID", "userId", "user_id", "user", "uid")
ITEM_COLUMNS = ("itemID", "itemId", "item_id", "item", "iid", "movieId")
MODALITIES = {"image": "image_feat.npy", "text": "text_feat.npy"}
BLANKS = b" \t\r\n\v\f"
COMMAS = b',"'

LAYOUTS = {
    "lightgcn": "train.txt and test.txt: `user item item ...` a line, ids from 0",
    "lastfm": "data1.txt and test1.txt: `user<TAB>item<TAB>weight`, ids from 1",
    "mmrec": "one <name>.inter with the columns userID, itemID and x_label (0 train, 1 validation, "
    "2 test); image_feat.npy and text_feat.npy if there are",
    "hkuds": "trnMat.pkl and tstMat.pkl, or trn_mat.pkl and tst_mat.pkl: sparse matrices",
    "cure4rec": "train.csv and test.csv with the columns uid and iid, ids from 0",
    "movielens": "u.data, ratings.dat or ratings.csv: ratings without a split",
    "snap": "loc-gowalla_totalCheckins.txt: check-ins without a split, place in the last column",
}
FORMATS = ("auto", *LAYOUTS)

_RATINGS = ("u.data", "ratings.dat", "ratings.csv")
_CHECKINS = ("loc-gowalla_totalCheckins.txt", "Gowalla_totalCheckins.txt")
_MATRICES = (("trnMat.pkl", "tstMat.pkl"), ("trn_mat.pkl", "tst_mat.pkl"))


@dataclass(frozen=True)
class Table:
    """What a folder holds, before any request.

    Attributes:
        users: Number of users.
        items: Number of items.
        train: User and item of each training pair, int64 [n] each; sorted by (user, item), each
            pair once.
        test: The same for pairs that are never trained on.
        val: The same for pairs that tuning may look at; None if the layout has none.
        features: Features of all items by modality: "image" [items, dv], "text" [items, dt].
        format: Which layout was found.
        notes: What was found and put right, for the report.
        user_names: The ids that the files give the users, where they were counted anew.
        item_names: Likewise of the items.
    """

    users: int
    items: int
    train: Pair
    test: Pair
    val: Pair | None
    features: Mapping[str, FloatArray]
    format: str
    notes: tuple[str, ...]
    user_names: Sequence[str] | None = None
    item_names: Sequence[str] | None = None


class Found(NamedTuple):
    """The pairs of one file as they stand in it.

    Attributes:
        path: The file.
        user: User of each pair, int64 [n].
        item: Item of each pair, int64 [n].
        users: One more than the highest user, also where it has no pair.
        items: One more than the highest item.
        notes: What is odd about the file.
        user_place: Where the highest user stands, such as "line 7".
        item_place: Where the highest item stands.
        label: The value of a further column, int64 [n], where the layout has one.
    """

    path: Path
    user: Ints
    item: Ints
    users: int
    items: int
    notes: tuple[str, ...] = ()
    user_place: str = ""
    item_place: str = ""
    label: Ints | None = None


class Shape(NamedTuple):
    """How the columns of a text file stand.

    Attributes:
        separators: What separates fields beside blanks; several in a row count as one.
        header: Whether the first line names the columns.
        width: Fields of each line; None: as many as in the first.
        item: Column of the item, without a header; the user is in column 0.
        first: The lowest id there may be; ids are given back counted from 0.
        label: Name of a further column to read.
    """

    separators: bytes = b""
    header: bool = False
    width: int | None = None
    item: int = 1
    first: int = 0
    label: str | None = None


def read_table(
    root: Path, format: str = "auto", test_fraction: float = 0.2, split_seed: int = 0
) -> Table:
    """Read a folder of interactions; each file may be compressed (.xz, .gz).

    Args:
        root: The folder.
        format: One of `FORMATS`; auto looks at the names of the files.
        test_fraction: Share of each user's pairs that is test, in layouts without a split.
        split_seed: Seed of that choice.

    Raises:
        DataError: The folder is in no known layout, or a file is not as its layout says.
    """
    if format == "auto":
        format = _detected(root)
    elif format not in LAYOUTS:
        raise DataError(f"unknown layout {format!r}. Accepted: {', '.join(FORMATS)}")
    if format in ("movielens", "snap"):
        return _divided(root, format, test_fraction, split_seed)
    return _READERS[format](root)


def write_lightgcn(folder: Path, table: Table) -> None:
    """Write `train.txt` and `test.txt`: a line `user item item ...` for each user with items.

    Reading them gives the table back, except for items without any pair behind the last one with
    pairs: the layout has no place for these. A last user without pairs gets a line of its own.

    Args:
        folder: Where to; made if needed.
        table: What to write; features are left out.

    Raises:
        DataError: The table has a validation set, which this layout cannot hold.
    """
    if table.val is not None:
        raise DataError("the LightGCN layout has no validation set; write the MMRec layout")
    folder.mkdir(parents=True, exist_ok=True)
    for name, (user, item) in (("train.txt", table.train), ("test.txt", table.test)):
        owners, starts = np.unique(user, return_index=True)
        lists = np.split(item, starts[1:]) if len(user) else []
        lines = [
            f"{owner} {' '.join(map(str, items.tolist()))}\n"
            for owner, items in zip(owners.tolist(), lists, strict=True)
        ]
        if name == "train.txt" and table.users - 1 not in owners:
            lines.append(f"{table.users - 1}\n")
        (folder / name).write_text("".join(lines), encoding="ascii")


def write_mmrec(folder: Path, table: Table, name: str = "data") -> None:
    """Write `<name>.inter`, and `image_feat.npy` and `text_feat.npy` where there are features.

    Args:
        folder: Where to; made if needed.
        table: What to write.
        name: Name of the data set. MMRec itself wants that of the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    none: Pair = (np.empty(0, np.int64), np.empty(0, np.int64))
    parts = (table.train, table.val or none, table.test)
    lines = ["userID\titemID\tx_label\n"]
    for label, (user, item) in enumerate(parts):
        pairs = zip(user.tolist(), item.tolist(), strict=True)
        lines += [f"{u}\t{i}\t{label}\n" for u, i in pairs]
    (folder / f"{name}.inter").write_text("".join(lines), encoding="ascii")
    for modality, values in table.features.items():
        np.save(folder / MODALITIES[modality], np.ascontiguousarray(values), allow_pickle=False)


def read_edges(path: Path) -> Pair:
    """Read the pairs of a request.

    Args:
        path: Text with a pair a line, separated by comma, tab or blank, with or without a header
            that names the columns (further columns are passed over); or a pickle of (COO matrix,
            [users, items]), as UnlearnRec stores injected edges.

    Returns:
        User and item of each pair, int64 [n], sorted, each once: a pair that is dropped twice
        would leave an edge of weight -1 behind.

    Raises:
        DataError: The file is not of this kind, is damaged, or holds no pair.
    """
    bare = path.with_suffix("") if path.suffix in SUFFIXES else path
    found = _pickled_edges(path) if bare.suffix in (".pkl", ".pk") else _listed(path)
    user, item, repeated = _unique(found.user, found.item)
    if not len(user):
        raise DataError(f"{path} holds no pair")
    if repeated:
        logger.info("%s: %s counted once", path, _many(repeated, "duplicate pair"))
    return user, item


def read_pretrained(
    root: Path, users: int | None = None, items: int | None = None
) -> dict[str, FloatArray]:
    """Read the vectors by which RecEraser partitions: `user_pretrain.pk`, `item_pretrain.pk`.

    Args:
        root: The folder that holds one of them, or both.
        users: Number of users that there must be vectors of; None: as many as there are.
        items: Likewise of items. One row more is left out, as in the published file of ML-1M.

    Returns:
        "user" [users, d] and "item" [items, d], float32, those that there are.

    Raises:
        DataError: Neither is there, or one is no matrix of numbers, or has too few rows.
    """
    found = {}
    for name, wanted in (("user", users), ("item", items)):
        path = _file(root, f"{name}_pretrain.pk")
        if path is not None:
            found[name], notes = _rows(load_pickle(path), path, wanted, name)
            for note in notes:
                logger.info("%s", note)
    if not found:
        raise DataError(f"{root} holds neither user_pretrain.pk nor item_pretrain.pk")
    return found


def read_shards(path: Path) -> list[Ints]:
    """Read a partition as RecEraser stores it.

    Args:
        path: `C_type-T_num-K.pk`, a dict user -> items a shard; or `C_U_*`, `C_I_*`, a list of
            users or items a shard.

    Returns:
        One array a shard: pairs [n, 2], or users or items [n], in the stored order.

    Raises:
        DataError: It is neither.
    """
    stored = load_pickle(path)
    if not isinstance(stored, list | tuple) or not stored:
        raise DataError(f"{path} is no list of shards, but {type(stored).__name__}")
    shards = []
    for number, shard in enumerate(stored):
        try:
            if isinstance(shard, dict):
                user = np.repeat(
                    np.array(list(shard), np.int64),
                    np.array([len(items) for items in shard.values()], np.int64),
                )
                lists = [np.asarray(items, np.int64) for items in shard.values()]
                item = np.concatenate(lists) if lists else np.empty(0, np.int64)
                shards.append(np.stack([user, item], axis=1))
            else:
                shards.append(np.asarray(shard, np.int64).reshape(len(shard)))
        except (TypeError, ValueError) as error:
            raise DataError(f"{path}: shard {number} is no list of ids ({error})") from error
    return shards


def _detected(root: Path) -> str:
    """Return the layout that the files of a folder have by their names."""
    has: dict[str, bool] = {
        "lightgcn": _has(root, "train.txt") and _has(root, "test.txt"),
        "lastfm": _has(root, "data1.txt") and _has(root, "test1.txt"),
        "mmrec": bool(_inters(root)),
        "hkuds": any(_has(root, train) and _has(root, test) for train, test in _MATRICES),
        "cure4rec": _has(root, "train.csv") and _has(root, "test.csv"),
    }
    found = [name for name, there in has.items() if there]
    if not found:  # ratings often lie beside the split that was made of them
        found = [
            name
            for name, files in (("movielens", _RATINGS), ("snap", _CHECKINS))
            if any(_has(root, file) for file in files)
        ]
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(
            f"{root} holds several layouts: {', '.join(found)}. Say which with data.format="
        )
    layouts = "\n".join(f"  - {name}: {files}" for name, files in LAYOUTS.items())
    raise DataError(
        f"{root} is in no known layout; it holds {_holds(root)}. Accepted, each file plain, .xz or "
        f".gz:\n{layouts}"
    )


def _holds(root: Path) -> str:
    names = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (", ".join(names[:SHOWN]) or "nothing") + more


def _file(root: Path, name: str) -> Path | None:
    """Return a file of a folder, plain or else compressed."""
    for suffix in ("", *SUFFIXES):
        if (root / (name + suffix)).is_file():
            return root / (name + suffix)
    return None


def _has(root: Path, name: str) -> bool:
    return _file(root, name) is not None


def _needed(root: Path, *names: str) -> Path:
    """Return the first of these files that there is."""
    for name in names:
        path = _file(root, name)
        if path is not None:
            return path
    raise DataError(f"{root} holds no {' or '.join(names)} (plain, .xz or .gz), but {_holds(root)}")


def _inters(root: Path) -> list[Path]:
    return sorted(path for suffix in ("", *SUFFIXES) for path in root.glob(f"*.inter{suffix}"))


def _lightgcn(root: Path) -> Table:
    train, test = (_adjacency(_needed(root, name)) for name in ("train.txt", "test.txt"))
    return _table("lightgcn", train, test)


def _lastfm(root: Path) -> Table:
    shape = Shape(width=3, first=1)
    train, test = (_columns(_needed(root, name), shape) for name in ("data1.txt", "test1.txt"))
    return _table("lastfm", train, test)


def _cure4rec(root: Path) -> Table:
    shape = Shape(COMMAS, header=True)
    train, test = (_columns(_needed(root, name), shape) for name in ("train.csv", "test.csv"))
    return _table("cure4rec", train, test)


def _mmrec(root: Path) -> Table:
    paths = _inters(root)
    if len(paths) != 1:
        raise DataError(
            f"{root} holds {len(paths)} files *.inter; the MMRec layout has one. It holds "
            f"{_holds(root)}"
        )
    every = _columns(paths[0], Shape(header=True, label="x_label"))
    label = every.label
    assert label is not None
    wrong = label[(label < 0) | (label > 2)]
    if len(wrong):
        raise DataError(
            f"{paths[0]}: {_many(len(wrong), 'line')} with an x_label such as {wrong[0]}; accepted "
            f"are 0 (train), 1 (validation) and 2 (test)"
        )
    train, val, test = (
        every._replace(user=every.user[label == part], item=every.item[label == part])
        for part in (0, 1, 2)
    )
    return _table("mmrec", train, test, val if len(val.user) else None, root)


def _hkuds(root: Path) -> Table:
    names = next(names for names in _MATRICES if _has(root, names[0]) or names is _MATRICES[-1])
    train, test = (_matrix(_needed(root, name)) for name in names)
    path = _file(root, "valMat.pkl") or _file(root, "val_mat.pkl")
    return _table("hkuds", train, test, None if path is None else _matrix(path))


_READERS: dict[str, Callable[[Path], Table]] = {
    "lightgcn": _lightgcn,
    "lastfm": _lastfm,
    "mmrec": _mmrec,
    "hkuds": _hkuds,
    "cure4rec": _cure4rec,
}


def _divided(root: Path, format: str, test_fraction: float, split_seed: int) -> Table:
    """Read a file without a split: count users and items anew, and draw test pairs."""
    path = _needed(root, *(_RATINGS if format == "movielens" else _CHECKINS))
    if format == "snap":
        shape = Shape(width=5, item=-1)
    elif path.name.startswith("ratings.csv"):
        shape = Shape(COMMAS, header=True)
    else:
        shape = Shape(b":" if path.name.startswith("ratings.dat") else b"", width=4)
    found = _columns(path, shape)
    user_ids, user = np.unique(found.user, return_inverse=True)
    item_ids, item = np.unique(found.item, return_inverse=True)
    user, item, repeated = _unique(user.ravel(), item.ravel())
    chosen = _drawn(user, len(user_ids), test_fraction, split_seed)
    notes = [
        f"{path.name} has no published split: {_many(int(chosen.sum()), 'pair')}, "
        f"{test_fraction:g} of each user's, were drawn as test with split_seed={split_seed}"
    ]
    if format == "movielens":
        notes.append("every rating counts as an interaction, whatever its value")
    if repeated:
        notes.append(f"{_many(repeated, 'duplicate pair')} counted once")
    sizes = (len(user_ids), len(item_ids))
    train = Found(path, user[~chosen], item[~chosen], *sizes, notes=tuple(notes))
    table = _table(format, train, Found(path, user[chosen], item[chosen], *sizes))
    return replace(
        table,
        user_names=list(map(str, user_ids.tolist())),
        item_names=list(map(str, item_ids.tolist())),
    )


def _drawn(user: Ints, users: int, fraction: float, seed: int) -> Bools:
    """Return which pairs are test: a share of each user's, at random, one at least being left."""
    rng = np.random.default_rng(derive(seed, "test"))
    order = np.lexsort((rng.random(len(user)), user))
    counts = np.bincount(user, minlength=users)
    place = np.arange(len(user)) - np.repeat(np.cumsum(counts) - counts, counts)
    # Rounded at random: a user of three pairs would never be tested otherwise.
    wanted = np.minimum(np.floor(fraction * counts + rng.random(users)), counts - 1)
    chosen = np.zeros(len(user), np.bool_)
    chosen[order] = place < np.repeat(wanted, counts)
    return chosen


def _table(
    format: str, train: Found, test: Found, val: Found | None = None, root: Path | None = None
) -> Table:
    """Put parts together: sizes over all files, each pair once and in one part only, features."""
    parts = {"training": train, "test": test} | ({} if val is None else {"validation": val})
    _no_huge(parts.values())
    users = max(part.users for part in parts.values())
    items = max(part.items for part in parts.values())
    notes = list(dict.fromkeys(note for part in parts.values() for note in part.notes))
    pairs: dict[str, Pair] = {}
    for name, part in parts.items():
        user, item, repeated = _unique(part.user, part.item)
        if repeated:
            notes.append(f"{_many(repeated, f'duplicate {name} pair')} counted once")
        for earlier, (other_user, other_item) in pairs.items():
            shared = _inside(user * items + item, other_user * items + other_item)
            if shared.any():
                said = _many(int(shared.sum()), f"{name} pair")
                notes.append(f"{said} left out: in the {earlier} data as well")
                user, item = user[~shared], item[~shared]
        if not len(user):
            raise DataError(
                f"{part.path} leaves no {name} pair of the {len(part.user)} it names; each part of "
                f"the data needs one that is in no other"
            )
        pairs[name] = (user, item)
    notes += _gaps(users, items, pairs["training"], pairs["test"])
    features: dict[str, FloatArray] = {}
    for modality, file in MODALITIES.items():
        path = None if root is None else _file(root, file)
        if path is not None:
            features[modality], said_of_rows = _rows(_array(path), path, items, "item")
            notes += said_of_rows
    return Table(
        users=users,
        items=items,
        train=pairs["training"],
        test=pairs["test"],
        val=pairs.get("validation"),
        features=features,
        format=format,
        notes=tuple(notes),
    )


def _gaps(users: int, items: int, train: Pair, test: Pair) -> list[str]:
    """Return notes on users and items that the training or test data do not show."""
    shown = [
        np.bincount(column, minlength=size) > 0
        for part in (train, test)
        for column, size in zip(part, (users, items), strict=True)
    ]
    trained_users, trained_items, tested_users, tested_items = shown
    cases = (
        (~trained_users, "user", "without training items"),
        (~tested_users, "user", "without test items"),
        (tested_items & ~trained_items, "test item", "never in the training data"),
        (~tested_items & ~trained_items, "item", "in neither training nor test data"),
    )
    return [f"{_many(int(case.sum()), noun)} {what}" for case, noun, what in cases if case.any()]


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _unique(user: Ints, item: Ints) -> tuple[Ints, Ints, int]:
    """Return pairs sorted, each once, and how many were left out for that."""
    order = np.lexsort((item, user))
    user, item = user[order], item[order]
    fresh = np.ones(len(user), np.bool_)
    fresh[1:] = (user[1:] != user[:-1]) | (item[1:] != item[:-1])
    return user[fresh], item[fresh], int((~fresh).sum())


def _inside(keys: Ints, known: Ints) -> Bools:
    """Return which keys are among the known ones, which are sorted."""
    place = np.searchsorted(known, keys).clip(max=max(len(known) - 1, 0))
    found: Bools = known[place] == keys if len(known) else np.zeros(len(keys), np.bool_)
    return found


def _no_huge(parts: Iterable[Found]) -> None:
    """Refuse ids that would make tables absurdly larger than the data.

    Raises:
        DataError: There is one; the message says where.
    """
    parts = list(parts)
    limit = max(HUGE, SPARSE * sum(len(part.user) for part in parts))
    for part in parts:
        for kind, size, place in (
            ("user", part.users, part.user_place),
            ("item", part.items, part.item_place),
        ):
            if size > limit:
                raise DataError(
                    f"{part.path} {place}: {kind} {size - 1} would make a table of {size} {kind}s "
                    f"for {len(part.user)} pairs; ids must be counted from 0 without gaps"
                )


def _blocks(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield a text file in blocks of whole lines, each with the number of its first line.

    Raises:
        DataError: The file is empty or cannot be read.
    """
    number, rest = 1, b""
    with opened(path) as stream:
        while chunk := stream.read(BLOCK):
            whole, newline, rest = (rest + chunk).rpartition(b"\n")
            if newline:
                yield number, _unmarked(number, whole + newline)
                number += whole.count(b"\n") + 1
    if rest:
        yield number, _unmarked(number, rest)
    elif number == 1:
        raise DataError(f"{path} is empty")


def _unmarked(number: int, block: bytes) -> bytes:
    """Take the byte-order mark, which some editors write, from the first line."""
    return block.removeprefix(b"\xef\xbb\xbf") if number == 1 else block


class _Tokens:
    """The fields of a block of lines.

    Attributes:
        line: Number of each field's line in the file, int64 [n].
        head: Whether each field is the first of its line, bool [n].
    """

    def __init__(self, path: Path, number: int, block: bytes, separators: bytes = b"") -> None:
        self.path = path
        self.bytes = np.frombuffer(block, np.uint8)
        blank = np.zeros(256, np.bool_)
        blank[list(BLANKS + separators)] = True
        inside = np.zeros(len(block) + 2, np.int8)
        inside[1:-1] = ~blank[self.bytes]
        change = np.diff(inside)
        self.start = np.flatnonzero(change == 1)
        self.stop = np.flatnonzero(change == -1)
        self.line = number + np.searchsorted(np.flatnonzero(self.bytes == 10), self.start)
        self.head = np.ones(len(self.line), np.bool_)
        self.head[1:] = self.line[1:] != self.line[:-1]

    def text(self, place: int) -> str:
        """Return a field as it stands."""
        return bytes(self.bytes[self.start[place] : self.stop[place]]).decode(errors="replace")

    def numbers(self, chosen: Ints) -> Ints:
        """Return some fields, given by their places, as whole numbers.

        Raises:
            DataError: One is none.
        """
        start, stop = self.start[chosen], self.stop[chosen]
        below = self.bytes[start] == ord("-")
        start = start + below
        length = stop - start
        wrong = (length < 1) | (length > DIGITS)
        value = np.zeros(len(chosen), np.int64)
        for k in range(min(int(length.max(initial=0)), DIGITS)):
            more = k < length
            digit = self.bytes[np.where(more, start + k, 0)] - np.uint8(ord("0"))
            wrong |= more & (digit > 9)
            value = np.where(more, value * 10 + digit, value)
        if wrong.any():
            place = int(chosen[wrong.argmax()])
            raise DataError(
                f"{self.path} line {self.line[place]}: {self.text(place)[:40]!r} is no whole "
                f"number of at most {DIGITS} digits"
            )
        return np.where(below, -value, value)


class _Ids:
    """The ids of one column of a file, collected block by block; the highest with its line."""

    def __init__(self, path: Path, kind: str, first: int = 0) -> None:
        self.path, self.kind, self.first = path, kind, first
        self.parts: list[Ints] = []
        self.size = 0
        self.place = ""

    def add(self, values: Ints, line: Ints) -> Ints:
        """Keep the ids of a block, counted from 0, and return them.

        Raises:
            DataError: One is below the first that there may be.
        """
        values = values - self.first
        if len(values):
            low, high = int(values.argmin()), int(values.argmax())
            if values[low] < 0:
                raise DataError(
                    f"{self.path} line {line[low]}: {self.kind} {values[low] + self.first}; ids "
                    f"start at {self.first}"
                )
            if values[high] >= self.size:
                self.size, self.place = int(values[high]) + 1, f"line {line[high]}"
        self.parts.append(values)
        return values

    def all(self) -> Ints:
        """Return the ids of all blocks, int64 [n]."""
        return np.concatenate([np.empty(0, np.int64), *self.parts])


def _adjacency(path: Path) -> Found:
    """Read lines `user item item ...`; a user may have none, and several lines."""
    users, items = _Ids(path, "user"), _Ids(path, "item")
    owners, lone = [], 0
    for number, block in _blocks(path):
        tokens = _Tokens(path, number, block)
        values, head = tokens.numbers(np.arange(len(tokens.line))), tokens.head
        user = users.add(values[head], tokens.line[head])
        items.add(values[~head], tokens.line[~head])
        counts = np.diff(np.append(np.flatnonzero(head), len(head))) - 1
        owners.append(np.repeat(user, counts))
        lone += int((counts == 0).sum())
    notes = (f"{_many(lone, 'line')} of {path.name} with a user and no items",) if lone else ()
    user = np.concatenate([np.empty(0, np.int64), *owners])
    return Found(path, user, items.all(), users.size, items.size, notes, users.place, items.place)


def _columns(path: Path, shape: Shape) -> Found:
    """Read a file of a pair a line."""
    users, items = _Ids(path, "user", shape.first), _Ids(path, "item", shape.first)
    labels: list[Ints] = []
    width, columns = shape.width, [0, shape.item]
    for number, block in _blocks(path):
        if shape.header and number == 1:
            top, _, block = block.partition(b"\n")
            width, columns = _header(path, top, shape)
            number = 2
        tokens = _Tokens(path, number, block, shape.separators)
        starts = np.flatnonzero(tokens.head)
        counts = np.diff(np.append(starts, len(tokens.head)))
        if width is None and len(counts):
            width = max(int(counts[0]), 2)
        wrong = counts != width
        if wrong.any():
            place = int(wrong.argmax())
            said = _many(int(counts[place]), "field")
            raise DataError(
                f"{path} line {tokens.line[starts[place]]} has {said} instead of {width}"
            )
        line = tokens.line[tokens.head]
        for ids, column in zip((users, items), columns, strict=False):
            ids.add(tokens.numbers(starts + column % (width or 1)), line)
        if shape.label is not None:
            labels.append(tokens.numbers(starts + columns[2]))
    label = None if shape.label is None else np.concatenate([np.empty(0, np.int64), *labels])
    user, item = users.all(), items.all()
    if not len(user):
        raise DataError(f"{path} holds no pair")
    return Found(path, user, item, users.size, items.size, (), users.place, items.place, label)


def _header(path: Path, top: bytes, shape: Shape) -> tuple[int, list[int]]:
    """Return how many columns a header names, and the places of user, item and label.

    Raises:
        DataError: One of them is not there.
    """
    tokens = _Tokens(path, 1, top, shape.separators)
    names = [tokens.text(place) for place in range(len(tokens.line))]
    wanted = [USER_COLUMNS, ITEM_COLUMNS, *([(shape.label,)] if shape.label else [])]
    places = []
    for accepted in wanted:
        place = next((names.index(name) for name in accepted if name in names), None)
        if place is None:
            raise DataError(
                f"{path} has the columns {', '.join(names)[:200] or 'none'}; there must be "
                f"{' or '.join(accepted)}"
            )
        places.append(place)
    return len(names), places


def _listed(path: Path) -> Found:
    """Read a hand-made list of pairs, with or without a header."""
    _, block = next(_blocks(path))
    separators = COMMAS + b";:"
    tokens = _Tokens(path, 1, block.partition(b"\n")[0], separators)
    named = bool(len(tokens.line)) and not tokens.text(0).lstrip("-").isdecimal()
    return _columns(path, Shape(separators, header=named))


def _pickled_edges(path: Path) -> Found:
    """Read a pickle of (COO matrix, [users, items])."""
    stored = load_pickle(path)
    try:
        matrix, (users, items) = stored
        user, item = (np.asarray(column).reshape(len(column)) for column in (users, items))
        rows, columns = matrix.shape
    except (TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path} is no pair of a matrix and [users, items] ({error})") from error
    numbers = all(column.dtype.kind in "iu" or not len(column) for column in (user, item))
    if len(user) != len(item) or not numbers:
        raise DataError(
            f"{path}: {len(user)} users ({user.dtype}) and {len(item)} items ({item.dtype}); as "
            f"many whole numbers of both are needed"
        )
    user, item = user.astype(np.int64), item.astype(np.int64)
    outside = (user < 0) | (user >= rows) | (item < 0) | (item >= columns)
    if outside.any():
        place = int(outside.argmax())
        raise DataError(
            f"{path}: pair {user[place]}:{item[place]} is outside its matrix of {rows} x {columns}"
        )
    return Found(path, user, item, rows, columns)


def _matrix(path: Path) -> Found:
    """Read a sparse matrix: every entry but 0 is a pair."""
    stored = load_pickle(path)
    if not sparse.issparse(stored):
        raise DataError(f"{path} holds {type(stored).__name__}; a sparse matrix is needed")
    matrix: Any = stored.tocoo()  # type: ignore[attr-defined]
    on = matrix.data != 0
    others = int((matrix.data[on] != 1).sum())
    entries = "entry" if others == 1 else "entries"
    notes = (f"{others} {entries} of {path.name} other than 1 count as 1",) if others else ()
    user, item = matrix.row[on].astype(np.int64), matrix.col[on].astype(np.int64)
    users, items = matrix.shape
    place = f"of shape {users} x {items}"
    return Found(path, user, item, users, items, notes, place, place)


def _array(path: Path) -> Any:
    """Read an .npy file without objects; a plain one stays on disk until it is used.

    Raises:
        DataError: It is none, or is cut short.
    """
    try:
        if path.suffix not in SUFFIXES:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        with opened(path) as stream:
            raw = stream.read()
        return np.load(io.BytesIO(raw), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{path} is no .npy file of numbers, or is cut short: {error}") from error


def _rows(values: Any, path: Path, wanted: int | None, noun: str) -> tuple[FloatArray, list[str]]:
    """Return one row of numbers for each user or item, and what is to be said of it.

    Raises:
        DataError: There are too few rows, or something else than finite numbers.
    """
    if not isinstance(values, np.ndarray) or values.ndim != 2 or values.dtype.kind not in "fiu":
        found = (
            f"{values.dtype} of shape {values.shape}"
            if isinstance(values, np.ndarray)
            else type(values).__name__
        )
        raise DataError(f"{path} holds {found}; needed are numbers of shape [{noun}s, d]")
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        raise DataError(
            f"{path} row {int(finite.argmin())} holds numbers that are not finite "
            f"({_many(int((~finite).sum()), 'such row')})"
        )
    more = 0 if wanted is None else len(values) - wanted
    if more < 0:
        raise DataError(
            f"{path} has {_many(len(values), 'row')} for {_many(wanted or 0, noun)}; each {noun} "
            f"needs one, in the order of ids"
        )
    notes = []
    if more == 1:
        notes = [f"{path.name} has one row more than {noun}s, as in published files; left out"]
    elif more:
        notes = [f"the last {more} rows of {path.name} belong to no {noun} with pairs; left out"]
    return values[:wanted].astype(np.float32, copy=False), notes
