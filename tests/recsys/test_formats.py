import gzip
import io
import logging
import lzma
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import sparse

from mmforget.errors import DataError
from mmforget.recsys import formats
from mmforget.recsys.formats import (
    Table,
    read_edges,
    read_pretrained,
    read_shards,
    read_table,
    write_lightgcn,
    write_mmrec,
)

PACK: dict[str, Callable[[bytes], bytes]] = {
    "": lambda raw: raw,
    ".xz": lzma.compress,
    ".gz": gzip.compress,
}

TRAIN = "0 4 1\n1 2\n3 0 1 2\n"
TEST = "0 2\n3 3\n"


def _folder(root: Path, suffix: str = "", **files: str | bytes) -> Path:
    """Write files; `train_txt` is train.txt."""
    root.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        stem, _, ending = name.rpartition("_")
        raw = content.encode() if isinstance(content, str) else content
        (root / f"{stem}.{ending}{suffix}").write_bytes(PACK[suffix](raw))
    return root


def _npy(values: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


def _pairs(part: tuple[Any, Any] | None) -> list[tuple[int, int]]:
    assert part is not None
    assert part[0].dtype == part[1].dtype == np.int64
    return list(zip(part[0].tolist(), part[1].tolist(), strict=True))


TRAINED = [(0, 1), (0, 4), (1, 2), (3, 0), (3, 1), (3, 2)]
TESTED = [(0, 2), (3, 3)]


def _dense(pairs: list[tuple[int, int]], value: float = 1.0) -> Any:
    user, item = np.array(pairs).T
    return sparse.coo_matrix((np.full(len(pairs), value), (user, item)), shape=(4, 5))


def _csv(pairs: list[tuple[int, int]]) -> str:
    return "uid,iid,val\n" + "".join(f"{u},{i},1\n" for u, i in reversed(pairs))


def _triples(pairs: list[tuple[int, int]]) -> str:
    return "".join(f"{u + 1}\t{i + 1}\t3.2466e+05\n" for u, i in pairs)


def _inter() -> str:
    rows = [(u, i, 0) for u, i in TRAINED] + [(u, i, 2) for u, i in TESTED]
    lines = [f"{u}\t{i}\t5.0\t2014-07-04\t{label}\n" for u, i, label in rows[::-1]]
    return "userID\titemID\trating\ttimestamp\tx_label\n" + "".join(lines)


SAME: dict[str, dict[str, str | bytes]] = {
    "lightgcn": {"train_txt": TRAIN, "test_txt": TEST},
    "lastfm": {"data1_txt": _triples(TRAINED), "test1_txt": _triples(TESTED)},
    "mmrec": {"baby_inter": _inter()},
    "hkuds": {
        "trnMat_pkl": pickle.dumps(_dense(TRAINED, 3.0)),
        "tstMat_pkl": pickle.dumps(_dense(TESTED).tocsr()),
    },
    "cure4rec": {"train_csv": _csv(TRAINED), "test_csv": _csv(TESTED), "ratings_csv": "uid,iid\n"},
}


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("layout", SAME)
def test_layouts_hold_the_same_table(layout: str, suffix: str, tmp_path: Path) -> None:
    root = _folder(tmp_path, suffix, **SAME[layout])
    found = read_table(root)
    assert (found.users, found.items, found.format) == (4, 5, layout)
    assert _pairs(found.train) == TRAINED and _pairs(found.test) == TESTED
    assert found.val is None and found.features == {} and found.user_names is None
    assert {"1 user without training items", "2 users without test items"} < set(found.notes)
    assert "1 test item never in the training data" in found.notes
    again = read_table(root, layout)
    assert _pairs(again.train) == TRAINED and again.notes == found.notes


def test_blocks_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    keys = np.unique(rng.integers(0, 200 * 3000, 5000))
    table = Table(200, 3000, (keys // 3000, keys % 3000), TINY.test, None, {}, "", ())
    write_lightgcn(tmp_path / "adjacency", table)
    write_mmrec(tmp_path / "columns", replace(table, val=TINY.test, test=TINY.test))
    for size in (1, 7, 1000, 1 << 24):
        monkeypatch.setattr(formats, "BLOCK", size)
        if size > 1:
            found = read_table(tmp_path / "adjacency")
            assert (found.train[0] == keys // 3000).all() and (found.train[1] == keys % 3000).all()
        _folder(tmp_path / "wrong", train_txt="\ufeff0 1\n2 3\n4 5 x7 8\n", test_txt="0 1")
        with pytest.raises(DataError, match=r"train.txt line 3: 'x7' is no whole number"):
            read_table(tmp_path / "wrong")


TINY = Table(
    users=4,
    items=5,
    train=(np.array([0, 0, 1]), np.array([1, 4, 2])),
    test=(np.array([0]), np.array([3])),
    val=None,
    features={},
    format="",
    notes=(),
)


def test_written_tables_are_read_back(tmp_path: Path) -> None:
    write_lightgcn(tmp_path / "a", TINY)
    found = read_table(tmp_path / "a")
    assert (found.users, found.items) == (4, 5)  # users 2 and 3 have no pair at all
    assert _pairs(found.train) == _pairs(TINY.train) and _pairs(found.test) == _pairs(TINY.test)
    with pytest.raises(DataError, match="no validation set"):
        write_lightgcn(tmp_path / "b", replace(TINY, val=TINY.test))
    rng = np.random.default_rng(0)
    features = {name: rng.random((5, 3)).astype(np.float32) for name in ("image", "text")}
    val = (np.array([3]), np.array([0]))
    write_mmrec(tmp_path / "c", replace(TINY, val=val, features=features), "mini")
    found = read_table(tmp_path / "c")
    assert _pairs(found.val) == [(3, 0)] and _pairs(found.train) == _pairs(TINY.train)
    assert list(found.features) == ["image", "text"]
    assert all((found.features[name] == features[name]).all() for name in features)


def test_duplicates_and_overlap_are_counted(tmp_path: Path) -> None:
    test = "0 2 4 2\n\n0 2 \n3 1 3\n"
    root = _folder(tmp_path, train_txt="0 4 1 4\n1 2\n0 1\n3 0 1 2\n", test_txt=test)
    found = read_table(root)
    assert _pairs(found.train) == TRAINED and _pairs(found.test) == TESTED
    assert found.notes[:3] == (
        "2 duplicate training pairs counted once",
        "2 duplicate test pairs counted once",
        "2 test pairs left out: in the training data as well",
    )


def test_validation_is_apart_from_training_and_test(tmp_path: Path) -> None:
    root = _folder(tmp_path, **SAME["hkuds"])
    val = _dense([(0, 1), (0, 2), (2, 0)]).tocsc()
    for name in ("valMat.pkl", "val_mat.pkl"):
        (root / name).write_bytes(pickle.dumps(val))
        found = read_table(root)
        assert _pairs(found.val) == [(2, 0)] and _pairs(found.test) == TESTED
        assert "1 validation pair left out: in the training data as well" in found.notes
        assert "1 validation pair left out: in the test data as well" in found.notes
        (root / name).unlink()


def test_matrices_are_made_binary(tmp_path: Path) -> None:
    matrix = _dense(TRAINED)
    matrix.data[:3] = [0.0, 5.0, -1.0]
    stored = {"trn_mat_pkl": pickle.dumps(matrix), "tst_mat_pkl": pickle.dumps(_dense(TESTED))}
    found = read_table(_folder(tmp_path, **stored))
    assert _pairs(found.train) == TRAINED[1:]
    assert "2 entries of trn_mat.pkl other than 1 count as 1" in found.notes
    (tmp_path / "trn_mat.pkl").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(DataError, match="holds list; a sparse matrix is needed"):
        read_table(tmp_path)


def test_lines_with_a_user_alone(tmp_path: Path) -> None:
    root = _folder(tmp_path, train_txt="0 1\n1 0 \n", test_txt="0 0\n1 \n5\n\n")
    found = read_table(root)
    assert found.users == 6 and _pairs(found.test) == [(0, 0)]
    assert found.notes[0] == "2 lines of test.txt with a user and no items"


def test_line_ends_and_byte_order_mark(tmp_path: Path) -> None:
    root = _folder(tmp_path, train_txt="\ufeff0 4 1\r\n1 2\r\n3 0\t1  2", test_txt="0 2\r\n3 3")
    assert _pairs(read_table(root).train) == TRAINED


BAD: list[tuple[str, dict[str, str | bytes], str]] = [
    ("negative", {"train_txt": "0 1\n1 -2\n", "test_txt": TEST}, "train.txt line 2: item -2; ids"),
    ("negative user", {"train_txt": "0 1\n\n-1 2\n", "test_txt": TEST}, "line 3: user -1; ids"),
    ("huge", {"train_txt": "0 1\n1 20000000\n", "test_txt": TEST}, "train.txt line 2: item 20000"),
    ("huge user", {"train_txt": TRAIN, "test_txt": "20000000 1\n"}, "test.txt line 1: user 20000"),
    ("far", {"train_txt": f"0 {10**25}\n", "test_txt": TEST}, "at most 18 digits"),
    ("word", {"train_txt": "0 1\n1 2 two\n", "test_txt": TEST}, "line 2: 'two' is no whole number"),
    ("float", {"train_txt": "0 1.5\n", "test_txt": TEST}, "line 1: '1.5' is no whole number"),
    ("joined", {"train_txt": "0 1-2\n", "test_txt": TEST}, "line 1: '1-2' is no whole number"),
    ("sign", {"train_txt": "0 -\n", "test_txt": TEST}, "line 1: '-' is no whole number"),
    ("binary", {"train_txt": b"0 \xff\x00\n", "test_txt": TEST}, "line 1: .* is no whole number"),
    ("empty", {"train_txt": TRAIN, "test_txt": ""}, "test.txt is empty"),
    ("blank", {"train_txt": TRAIN, "test_txt": "\n\n"}, "test.txt leaves no test pair of the 0"),
    ("all shared", {"train_txt": TRAIN, "test_txt": "0 1 4\n"}, "leaves no test pair of the 2"),
    ("zero", {"data1_txt": "1\t1\t1\n0\t2\t1\n", "test1_txt": "1\t1\t2\n"}, "line 2: user 0; ids"),
    ("two", {"data1_txt": "1\t2\n", "test1_txt": "1\t1\t2\n"}, "line 1 has 2 fields instead of 3"),
    ("names", {"train_csv": "u,i\n0,1\n", "test_csv": "uid,iid\n"}, "has the columns u, i; there"),
    ("short", {"train_csv": "uid,iid,val\n0,1,1\n0,1\n", "test_csv": "uid,iid\n"}, "line 3 has 2"),
    ("header", {"train_csv": "uid,iid\n0,1\n", "test_csv": "uid,iid\n"}, "test.csv holds no pair"),
    (
        "label",
        {"a_inter": "userID\titemID\tx_label\n0\t0\t3\n"},
        "1 line with an x_label such as 3",
    ),
    ("no label", {"a_inter": "userID\titemID\n0\t0\n"}, "there must be x_label"),
    ("two inter", {"a_inter": _inter(), "b_inter": _inter()}, "holds 2 files"),
    ("several", {**SAME["lightgcn"], **SAME["hkuds"]}, "several layouts: lightgcn, hkuds"),
    ("code", {"trnMat_pkl": b"cos\nsystem\n(S'x'\ntR.", "tstMat_pkl": b""}, "asks for os.system"),
    ("cut", {**SAME["hkuds"], "trnMat_pkl": pickle.dumps(_dense(TRAINED))[:-9]}, "cut short"),
    ("unknown", {"train_txt": TRAIN, "notes_md": ""}, "it holds notes.md, train.txt. Accepted"),
    ("nothing", {}, "it holds nothing"),
    ("snap", {"loc-gowalla_totalCheckins_txt": "0 2010-10-19T23:55:27Z 30.2 -97.7\n"}, "4 fields"),
]


@pytest.mark.parametrize(("files", "message"), [row[1:] for row in BAD], ids=[r[0] for r in BAD])
def test_bad_folders(files: dict[str, str | bytes], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_table(_folder(tmp_path, **files))


def test_an_unknown_folder_is_told_all_layouts(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_table(_folder(tmp_path, readme_md="x"))
    assert all(f"- {name}: " in str(caught.value) for name in formats.LAYOUTS)
    with pytest.raises(DataError, match=r"unknown layout 'ml'\. Accepted: auto, lightgcn"):
        read_table(tmp_path, "ml")
    with pytest.raises(DataError, match=r"no train.txt \(plain, .xz or .gz\), but readme.md"):
        read_table(tmp_path, "lightgcn")


def test_huge_ids_are_measured_by_the_interactions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = _folder(tmp_path, train_txt="0 1 2 3\n1 499\n", test_txt="1 5\n")
    monkeypatch.setattr(formats, "HUGE", 100)
    assert read_table(root).items == 500  # 5 pairs justify 500 ids
    _folder(tmp_path, train_txt="0 1 2 3\n1 500\n")
    with pytest.raises(DataError, match=r"line 2: item 500 would make .* counted from 0"):
        read_table(root)


@pytest.mark.parametrize("suffix", [".xz", ".gz"])
def test_a_compressed_file_cut_short(suffix: str, tmp_path: Path) -> None:
    root = _folder(tmp_path, suffix, **SAME["lightgcn"])
    whole = (root / f"train.txt{suffix}").read_bytes()
    for length in (0, 5, len(whole) // 2, len(whole) - 1):
        (root / f"train.txt{suffix}").write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"cannot be read|is empty"):
            read_table(root)


def _with_features(root: Path, values: Any, suffix: str = "") -> Path:
    _folder(root, **SAME["mmrec"])
    return _folder(
        root, suffix, image_feat_npy=values if isinstance(values, bytes) else _npy(values)
    )


@pytest.mark.parametrize("suffix", PACK)
def test_features_belong_to_items(suffix: str, tmp_path: Path) -> None:
    values = np.arange(21, dtype=np.float64).reshape(7, 3)
    for rows, note in (
        (5, None),
        (6, f"image_feat.npy{suffix} has one row more than items, as in published files; left out"),
        (7, f"the last 2 rows of image_feat.npy{suffix} belong to no item with pairs; left out"),
    ):
        found = read_table(_with_features(tmp_path, values[:rows], suffix))
        assert list(found.features) == ["image"] and found.features["image"].dtype == np.float32
        assert (found.features["image"] == values[:5]).all()
        assert (note in found.notes) if note else not any("row" in n for n in found.notes)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.ones((4, 3)), "image_feat.npy has 4 rows for 5 items; each item needs one"),
        (np.ones(5), r"float64 of shape \(5,\); needed are numbers of shape \[items, d\]"),
        (np.array([["a"]] * 5), "of shape"),
        (np.array([[1.0]] * 4 + [[np.nan]]), r"row 4 holds numbers that are not finite \(1 such"),
        (np.array([[{}]] * 5, dtype=object), "no .npy file of numbers"),
        (_npy(np.ones((5, 300)))[:-8], "no .npy file of numbers, or is cut short"),
        (b"", "no .npy file of numbers"),
        (pickle.dumps(np.ones(3)), "no .npy file of numbers"),
    ],
)
def test_bad_features(values: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_table(_with_features(tmp_path, values))
    packed = values if isinstance(values, bytes) else _npy(values)
    (tmp_path / "image_feat.npy").unlink()
    with pytest.raises(DataError, match=message.replace("npy has", "npy.gz has")):
        read_table(_with_features(tmp_path, packed, ".gz"))


RATED = [(10, 700, 5), (10, 20, 1), (10, 30, 4), (10, 41, 2), (3, 20, 3), (3, 30, 5), (77, 700, 2)]


@pytest.mark.parametrize(
    ("name", "line", "head"),
    [
        ("u_data", "{}\t{}\t{}\t881250949\n", ""),
        ("ratings_dat", "{}::{}::{}::978300760\n", ""),
        ("ratings_csv", "{},{},{}.5,964982703\n", "userId,movieId,rating,timestamp\n"),
        ("ratings_csv", '"{}","{}","{}"\n', '"uid","iid","val"\n'),
        (
            "loc-gowalla_totalCheckins_txt",
            "{0}\t2010-10-19T23:55:27Z\t30.2359\t-97.7951\t{1}\n",
            "",
        ),
    ],
)
def test_ratings_are_counted_anew_and_divided(
    name: str, line: str, head: str, tmp_path: Path
) -> None:
    rows = [*RATED, RATED[0]]
    root = _folder(tmp_path, **{name: head + "".join(line.format(*row) for row in rows)})
    found = read_table(root, test_fraction=0.5)
    assert found.format == ("snap" if name.startswith("loc") else "movielens")
    assert found.user_names == ["3", "10", "77"]
    assert found.item_names == ["20", "30", "41", "700"]
    both = sorted(_pairs(found.train) + _pairs(found.test))
    assert both == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (1, 3), (2, 3)]
    assert np.bincount(found.test[0], minlength=3).tolist() == [1, 2, 0]
    assert "no published split: 3 pairs, 0.5 of each user's, were drawn" in found.notes[0]
    assert "1 duplicate pair counted once" in found.notes


def test_the_drawn_split_follows_its_seed_and_fraction(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    keys = rng.choice(300 * 200, 6000, replace=False)
    lines = [f"{key // 200 + 1}\t{key % 200 + 1}\t5\t0\n" for key in keys.tolist()]
    root = _folder(tmp_path, u_data="".join(lines))
    first, again = read_table(root), read_table(root)
    other = read_table(root, split_seed=1)
    assert _pairs(first.test) == _pairs(again.test) != _pairs(other.test)
    assert not set(_pairs(first.test)) & set(_pairs(first.train))
    counts = np.bincount(keys // 200)
    tested = np.bincount(first.test[0], minlength=len(counts))
    assert (np.abs(tested - 0.2 * counts) < 1).all() and abs(tested.sum() - 1200) < 30
    assert abs(len(read_table(root, test_fraction=0.4).test[0]) - 2400) < 30
    assert (np.bincount(read_table(root, test_fraction=0.9).train[0]) > 0).all()
    with pytest.raises(DataError, match="leaves no test pair"):
        read_table(root, test_fraction=0.0)


@pytest.mark.parametrize(
    "content",
    [
        "user,item\n5,2\n1,7\n5,2\n",
        "5,2\n1,7\n1,7",
        "5\t2\n1\t7\n",
        "5 2\n\n1 7\n",
        "5:2\n1:7\n",
        "uid,iid,val,tag\n5,2,4,891352984\n1,7,3,891352984\n",
        '\ufeff"itemID","userID"\r\n"2","5"\r\n"7","1"\r\n',
        "5\t2\t3.2466e+05\n1\t7\t1\n",
    ],
)
@pytest.mark.parametrize("suffix", PACK)
def test_lists_of_edges(content: str, suffix: str, tmp_path: Path) -> None:
    _folder(tmp_path, suffix, edges_csv=content)
    assert _pairs(read_edges(tmp_path / f"edges.csv{suffix}")) == [(1, 7), (5, 2)]


def test_injected_edges_are_counted_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    edges = [[2, 0, 2, 3], [1, 4, 1, 0]]
    for content in ((_dense(TRAINED), edges), [_dense(TRAINED).tocsr(), np.array(edges)]):
        path = tmp_path / "adv_0.5_mat.pkl"
        path.write_bytes(pickle.dumps(content, 2))
        with caplog.at_level(logging.INFO):
            assert _pairs(read_edges(path)) == [(0, 4), (2, 1), (3, 0)]
        assert "1 duplicate pair counted once" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("e_csv", "user,item\n1,-2\n", "line 2: item -2"),
        ("e_csv", "user,item\n", "holds no pair"),
        ("e_csv", "", "is empty"),
        ("e_csv", "1\n2\n", "line 1 has 1 field instead of 2"),
        ("e_csv", "1,2\n3\n", "line 2 has 1 field instead of 2"),
        ("e_csv", "a,b\n1,2\n", "has the columns a, b; there must be userID or userId"),
        ("e_csv", "user,item\n1,x\n", "line 2: 'x' is no whole number"),
        ("e_pkl", pickle.dumps(_dense(TRAINED)), "is no pair of a matrix and"),
        ("e_pkl", pickle.dumps(([1], [[1], [2]])), "is no pair of a matrix and"),
        ("e_pkl", pickle.dumps((_dense(TRAINED), [[1], [2, 3]])), "1 users .* and 2 items"),
        ("e_pkl", pickle.dumps((_dense(TRAINED), [[1.5], [2.0]])), "whole numbers of both"),
        ("e_pkl", pickle.dumps((_dense(TRAINED), [[1, 4], [2, 0]])), "pair 4:0 is outside"),
        ("e_pkl", pickle.dumps((_dense(TRAINED), [[-1], [2]])), "pair -1:2 is outside"),
        ("e_pkl", pickle.dumps((_dense(TRAINED), [[], []])), "holds no pair"),
    ],
)
def test_bad_lists_of_edges(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    _folder(tmp_path, **{name: content})
    with pytest.raises(DataError, match=message):
        read_edges(tmp_path / name.replace("_", "."))


def test_pretrained_vectors(tmp_path: Path) -> None:
    user, item = np.ones((4, 2), np.float32), np.arange(12, dtype=np.float32).reshape(6, 2)
    _folder(tmp_path, ".xz", item_pretrain_pk=pickle.dumps(item, 0))
    assert list(read_pretrained(tmp_path)) == ["item"]
    _folder(tmp_path, user_pretrain_pk=pickle.dumps(user, 2))
    found = read_pretrained(tmp_path, 4, 5)
    assert found["user"].shape == (4, 2) and (found["item"] == item[:5]).all()
    with pytest.raises(DataError, match=r"user_pretrain\.pk has 4 rows for 5 users"):
        read_pretrained(tmp_path, 5, 5)
    with pytest.raises(DataError, match="holds neither"):
        read_pretrained(tmp_path / "absent")


def test_shards(tmp_path: Path) -> None:
    path = tmp_path / "C_type-1_num-3.pk"
    path.write_bytes(pickle.dumps([{4: [1, 2], 0: [7]}, {}, {1: []}], 0))
    assert [shard.tolist() for shard in read_shards(path)] == [[[4, 1], [4, 2], [0, 7]], [], []]
    assert all(shard.shape[1:] == (2,) for shard in read_shards(path))
    path.write_bytes(pickle.dumps([[3, 1], [2]], 0))
    assert [shard.tolist() for shard in read_shards(path)] == [[3, 1], [2]]
    for content, message in (({}, "no list of shards, but dict"), ([["x"]], "shard 0 is no list")):
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(DataError, match=message):
            read_shards(path)


real = pytest.mark.skipif("MMFORGET_REAL_DATA" not in os.environ, reason="MMFORGET_REAL_DATA unset")


@real
@pytest.mark.parametrize(
    ("name", "layout", "sizes", "notes"),
    [
        ("gowalla", "lightgcn", (29858, 40981, 810128, 217242), ()),
        (
            "lastfm",
            "lastfm",
            (1892, 4489, 42135, 10533),
            (
                "14 users without training items",
                "34 users without test items",
                "13 test items never in the training data",
            ),
        ),
        ("ml-100k-cure4rec", "cure4rec", (943, 1349, 79045, 20242), ()),
        (
            "ml-1m-receraser",
            "lightgcn",
            (6040, 3706, 720152, 200041),
            (
                "6 users without test items",
                "38 test items never in the training data",
                "11 items in neither training nor test data",
            ),
        ),
    ],
)
def test_published_folders(
    name: str, layout: str, sizes: tuple[int, ...], notes: tuple[str, ...]
) -> None:
    found = read_table(Path(os.environ["MMFORGET_REAL_DATA"]) / "recsys" / name)
    counted = (found.users, found.items, len(found.train[0]), len(found.test[0]))
    assert counted == sizes and found.format == layout and found.notes == notes


@real
def test_published_partitions_and_requests() -> None:
    root = Path(os.environ["MMFORGET_REAL_DATA"]) / "recsys"
    shards = read_shards(root / "ml-1m-receraser" / "C_U_type-2_num-10.pk")
    assert list(map(len, shards)) == [542, 725, 237, 273, 638, 725, 725, 725, 725, 725]
    assert (np.sort(np.concatenate(shards)) == np.arange(6040)).all()
    assert read_pretrained(root / "ml-1m-receraser", items=3706)["item"].shape == (3706, 64)
    for name, rows in (("core", 18565), ("edge", 951)):
        user, _ = read_edges(root / "ml-100k-cure4rec" / f"{name}_data_5pct.csv.gz")
        assert len(user) == rows and len(np.unique(user)) == 47
    raw = read_table(root / "ml-100k-cure4rec", "movielens")
    assert (raw.users, raw.items, len(raw.train[0]) + len(raw.test[0])) == (943, 1349, 99287)
