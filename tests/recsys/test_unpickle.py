import gzip
import lzma
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import sparse

from mmforget.errors import DataError
from mmforget.recsys.unpickle import load_pickle

# As Python 2 wrote a float32 array [[1, 2], [3, 4]]: protocol 0, bytes as text, old module names.
PYTHON_2 = (
    b"cnumpy.core.multiarray\n_reconstruct\np0\n(cnumpy\nndarray\np1\n(I0\ntp2\nS'b'\np3\ntp4\nRp5\n"
    b"(I1\n(I2\nI2\ntp6\ncnumpy\ndtype\np7\n(S'f4'\np8\nI0\nI1\ntp9\nRp10\n(I3\nS'<'\np11\nNNNI-1\n"
    b"I-1\nI0\ntp12\nbI00\n"
    b"S'\\x00\\x00\\x80?\\x00\\x00\\x00@\\x00\\x00@@\\x00\\x00\\x80@'\np13\ntp14\nb."
)


class Call:
    """Pickled as a call of anything."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def _stored(folder: Path, content: Any, protocol: int = 4) -> Path:
    path = folder / "file.pkl"
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
    return path


def test_python_2_arrays(tmp_path: Path) -> None:
    found = load_pickle(_stored(tmp_path, PYTHON_2))
    assert type(found) is np.ndarray and found.dtype == np.float32
    assert found.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    found[0, 0] = 5  # an own copy, not a view of the file


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_of_all_protocols(protocol: int, tmp_path: Path) -> None:
    arrays = [
        np.arange(6, dtype=np.int32).reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.array([1.5, -2.0], dtype=">f4"),
        np.array([True, False]),
        np.array(["a", "bcd"]),
        np.empty((0, 4)),
        np.array(3.0),
        np.arange(10)[::2],
    ]
    content = {"arrays": arrays, "scalar": np.float32(2.5), 7: ("x", [1, None, b"\xff"])}
    found = load_pickle(_stored(tmp_path, content, protocol))
    for array, original in zip(found["arrays"], arrays, strict=True):
        assert type(array) is np.ndarray and array.dtype == original.dtype
        assert array.shape == original.shape and (array == original).all()
    assert found["scalar"] == np.float32(2.5) and type(found["scalar"]) is np.float32
    assert found[7] == ("x", [1, None, b"\xff"])


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("form", ["coo", "csr", "csc"])
@pytest.mark.parametrize("kind", ["matrix", "array"])
def test_sparse_matrices(protocol: int, form: str, kind: str, tmp_path: Path) -> None:
    dense = np.array([[0, 2.0, 0], [1, 0, 0]])
    made = getattr(sparse, f"{form}_{kind}")(dense)
    found, numbers = load_pickle(_stored(tmp_path, (made, [[1], [2]]), protocol))
    assert found.format == form and (found.toarray() == dense).all() and numbers == [[1], [2]]


def _old_state(tmp_path: Path, form: str, state: dict[str, Any]) -> Path:
    """Write a matrix as scipy before 1.8 did: module scipy.sparse.coo, attributes row and col."""
    head = f"ccopy_reg\n_reconstructor\n(cscipy.sparse.{form}\n{form}_matrix\n".encode()
    body = pickle.dumps(state, 0).removesuffix(b".")
    return _stored(tmp_path, head + b"c__builtin__\nobject\nNtR" + body + b"b.")


def test_matrices_of_old_scipy(tmp_path: Path) -> None:
    state = {"_shape": (2, 3), "row": np.array([0, 1]), "col": np.array([2, 0])}
    found = load_pickle(_old_state(tmp_path, "coo", state | {"data": np.array([1.0, 4.0])}))
    assert found.toarray().tolist() == [[0, 0, 1], [4, 0, 0]]


@pytest.mark.parametrize(
    ("form", "state"),
    [
        ("coo", {"row": np.array([0, 2]), "col": np.array([0, 0])}),
        ("coo", {"row": np.array([0, -1]), "col": np.array([0, 0])}),
        ("coo", {"row": np.array([0]), "col": np.array([0, 0])}),
        ("csr", {"indptr": np.array([0, 1, 2]), "indices": np.array([0, 10**6])}),
        ("csr", {"indptr": np.array([0, 1, 10**6]), "indices": np.array([0, 1])}),
        ("csc", {"indptr": np.array([0, 1, 1, 2]), "indices": np.array([0, 2])}),
        ("csr", {"indptr": np.array([0, 1, 2])}),
    ],
)
def test_matrices_with_false_indices_are_refused(
    form: str, state: dict[str, Any], tmp_path: Path
) -> None:
    content = {"_shape": (2, 3), "data": np.ones(2)} | state
    with pytest.raises(DataError, match="damaged"):
        load_pickle(_old_state(tmp_path, form, content))


@pytest.mark.parametrize(
    ("content", "asked"),
    [
        (Call(os.system, "touch ran"), f"{os.system.__module__}.system"),
        (Call(eval, "open('ran', 'w')"), "builtins.eval"),
        (Call(getattr, "text", "join"), "builtins.getattr"),
        (Call(np.load, "ran"), r"numpy.*load"),
        (Path("x"), "pathlib"),
        (b"cnumpy\nndarray.__class__\n.", "numpy.ndarray.__class__"),
        (b"\x80\x04\x8c\x05numpy\x8c\x0bndarray.sum\x93.", "numpy.ndarray.sum"),
        ([sparse.coo_matrix(np.eye(2)), Call(os.getcwd)], "getcwd"),
        (np.array([Call(os.getcwd)], dtype=object), "getcwd"),
        (sparse.dok_matrix(np.eye(2)), "dok_matrix"),
    ],
)
def test_anything_else_is_named_and_not_run(
    content: Any, asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"was not opened: its pickle asks for .*{asked}"):
        load_pickle(_stored(tmp_path, content))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_file_cut_anywhere_is_an_error(protocol: int, tmp_path: Path) -> None:
    whole = pickle.dumps((sparse.coo_matrix(np.eye(3)), [[1, 2], [0, 1]]), protocol)
    for length in range(len(whole)):
        with pytest.raises(DataError, match="damaged or cut short"):
            load_pickle(_stored(tmp_path, whole[:length]))


def test_compressed_files(tmp_path: Path) -> None:
    whole = pickle.dumps(list(range(5000)))
    for suffix, pack in ((".xz", lzma.compress), (".gz", gzip.compress)):
        path = tmp_path / f"file.pkl{suffix}"
        path.write_bytes(pack(whole))
        assert load_pickle(path) == list(range(5000))
        path.write_bytes(pack(whole)[:-40])
        with pytest.raises(DataError, match="cannot be read"):
            load_pickle(path)
        path.write_bytes(whole)
        with pytest.raises(DataError, match="cannot be read"):
            load_pickle(path)
    with pytest.raises(DataError, match="cannot be read"):
        load_pickle(tmp_path / "absent.pkl")


def test_object_arrays_in_npy_files(tmp_path: Path) -> None:
    path = tmp_path / "pos_dict.npy"
    np.save(path, np.array({3: [1, 2], 4: np.ones((1, 2))}, dtype=object))
    found = load_pickle(path).item()
    assert found[3] == [1, 2] and type(found[4]) is np.ndarray and found[4].shape == (1, 2)
    np.save(path, np.arange(4).reshape(2, 2))
    assert load_pickle(path).tolist() == [[0, 1], [2, 3]]
    np.save(path, np.array([Call(os.getcwd)], dtype=object))
    with pytest.raises(DataError, match="getcwd"):
        load_pickle(path)


def test_objects_keep_their_places(tmp_path: Path) -> None:
    inner = np.arange(3)
    content = np.empty((2, 2), dtype=object)
    content[0, 0], content[0, 1], content[1, 0] = [1, 2], inner, "text"
    for array in (content, np.asfortranarray(content)):
        found = load_pickle(_stored(tmp_path, array))
        assert found.shape == (2, 2) and found[0, 0] == [1, 2] and found[1, 1] is None
        assert type(found[0, 1]) is np.ndarray and found[1, 0] == "text"


def test_a_list_that_holds_itself(tmp_path: Path) -> None:
    content: list[Any] = [np.arange(2)]
    content.append(content)
    found = load_pickle(_stored(tmp_path, content))
    assert found[1] is found and found[0].tolist() == [0, 1]


@pytest.mark.parametrize(
    "content",
    [
        np.zeros(2, dtype=[("a", "i4"), ("b", "O")]),
        np.array(["2020-01-01"], dtype="M8[D]"),
        b"cnumpy\nndarray\n)R.",  # an array that is never filled
        b"cscipy.sparse.coo\ncoo_matrix\n)R.",
        PYTHON_2.replace(b"(I2\nI2\n", b"(I2\nI9\n"),  # more numbers than bytes
        PYTHON_2.replace(b"S'f4'", b"S'O8'"),  # addresses for objects
        PYTHON_2.replace(b"S'f4'", b"S'f4,O'"),
        PYTHON_2.replace(b"NNNI-1", b"N(S'a'\nt(dNI-1"),  # a layout behind numpy's back
        b"c_codecs\nencode\n(Va\nVrot13\ntR.",
        b"ccopy_reg\n_reconstructor\n(cnumpy\nndarray\nc__builtin__\nobject\nNtR.",
        b"Pname\n.",
        b"not a pickle",
        b"",
        b"[" * 5 + b"(" + b"]" * 100000 + b".",
    ],
)
def test_what_could_fool_numpy_is_an_error(content: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="damaged or cut short"):
        load_pickle(_stored(tmp_path, content))


def test_lists_nested_beyond_the_stack(tmp_path: Path) -> None:
    deep = b"]" * (2 * sys.getrecursionlimit()) + b"a" * (2 * sys.getrecursionlimit() - 1) + b"."
    with pytest.raises(DataError, match="RecursionError"):
        load_pickle(_stored(tmp_path, deep))
