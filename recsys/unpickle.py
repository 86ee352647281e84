"""Pickles of published data, read without running what they ask for.

A pickle is a program: opening one with `pickle.load` runs whatever its author wrote. Recommendation
data are published as pickles all the same. Here the names that a pickle may use are a fixed list of
numpy and scipy.sparse constructors, and even for these own ones stand in, which check types, sizes
and indices: the originals trust what they are given and can be made to read foreign memory.
"""

import gzip
import lzma
import pickle
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np
import numpy.typing as npt
from scipy import sparse

from mmforget.errors import DataError

Array = npt.NDArray[Any]

SUFFIXES = (".xz", ".gz")
NPY = b"\x93NUMPY"
KINDS = "biufcSUO"  # of arrays: numbers, strings and objects, no records


class _RefusedError(Exception):
    """A pickle asked for a name that is not on the list."""


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file, compressed or not by its suffix (.xz, .gz), for reading bytes.

    Raises:
        DataError: The file cannot be read, or what it was compressed from is cut short.
    """
    try:
        if path.suffix == ".xz":
            with lzma.open(path) as stream:
                yield stream
        elif path.suffix == ".gz":
            with gzip.open(path) as packed:
                yield packed  # type: ignore[misc]
        else:
            with path.open("rb") as plain:
                yield plain
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}. Copy it anew") from error


def load_pickle(path: Path) -> Any:
    """Read a pickle of numbers, strings, lists, dicts, numpy arrays and sparse matrices.

    Args:
        path: The file, plain or as .xz or .gz; also an .npy file of objects. Pickles of Python 2,
            and of numpy and scipy under their old module names, are read.

    Returns:
        What was pickled; matrices in the form they were in (COO, CSR, CSC).

    Raises:
        DataError: The pickle asks for anything else, such as code; or it is damaged or cut short.
    """
    with opened(path) as stream:
        try:
            start = stream.read(len(NPY))
            if start == NPY:
                return _npy(stream)
            stream.seek(0)
            return _load(stream)
        except _RefusedError as error:
            raise DataError(
                f"{path} was not opened: its pickle asks for {error}. Read are numbers, strings, "
                f"lists, dicts, numpy arrays and scipy.sparse matrices (COO, CSR, CSC); anything "
                f"else could run code"
            ) from error
        except MemoryError:
            raise
        except Exception as error:  # a damaged pickle can raise nearly anything
            if isinstance(error, OSError | EOFError | lzma.LZMAError | zlib.error) and (
                path.suffix in SUFFIXES
            ):
                raise
            raise DataError(
                f"{path} is no pickle, or is damaged or cut short "
                f"({type(error).__name__}: {error}). Copy it anew"
            ) from error


def _load(stream: IO[bytes]) -> Any:
    return _settled(_Unpickler(stream, encoding="latin1").load(), set())


def _npy(stream: IO[bytes]) -> Any:
    """Read an .npy file from behind its first bytes; objects through the same narrow door."""
    stream.seek(0)
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0
    if version != (1, 0):
        read = np.lib.format.read_array_header_2_0
    _, _, dtype = read(stream)
    if dtype.hasobject:
        return _load(stream)
    stream.seek(0)
    return np.lib.format.read_array(stream, allow_pickle=False)


class _Type:
    """Stands for `numpy.dtype` while a pickle is read."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = str(code)
        self.order = "|"

    def __setstate__(self, state: Any) -> None:
        _, order, *layout = state
        if any(part is not None for part in layout[:3]):
            raise ValueError("arrays of records are not read here")
        self.order = str(order)

    def real(self) -> np.dtype[Any]:
        found = np.dtype(self.code)
        if found.kind not in KINDS or found.subdtype is not None:
            raise ValueError(f"arrays of {found} are not read here")
        return found if self.order == "|" else found.newbyteorder(self.order)  # type: ignore[arg-type]


class _Array:
    """Stands for `numpy.ndarray` while a pickle is read."""

    value: Array | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, content = state
        self.value = _filled(content, kind, shape, "F" if fortran else "C")


class _Matrix:
    """Stands for a class of scipy.sparse while a pickle is read."""

    form: ClassVar[str]
    state: dict[str, Any] | None = None

    def __setstate__(self, state: Any) -> None:
        self.state = dict(state)

    def real(self) -> Any:
        """Return the matrix, made by scipy's constructor and checked index by index."""
        if self.state is None:
            raise ValueError("a matrix without content")
        state = {name: _settled(part, set()) for name, part in self.state.items()}
        rows, columns = state["_shape"] if "_shape" in state else state["shape"]
        shape = (int(rows), int(columns))
        if self.form == "coo":
            # scipy wrote `row` and `col` until 1.12, one tuple since.
            places = state["coords"] if "coords" in state else (state["row"], state["col"])
            return sparse.coo_matrix((state["data"], tuple(places)), shape=shape)
        make = sparse.csr_matrix if self.form == "csr" else sparse.csc_matrix
        found = make((state["data"], state["indices"], state["indptr"]), shape=shape)
        found.check_format(full_check=True)
        return found


class _Coo(_Matrix):
    form = "coo"


class _Csr(_Matrix):
    form = "csr"


class _Csc(_Matrix):
    form = "csc"


def _filled(content: Any, kind: Any, shape: Any, order: str = "C") -> Array:
    """Return an array out of its bytes or its list of objects; stands for `_frombuffer`."""
    if not isinstance(kind, _Type):
        raise ValueError("an array without a type")
    dtype = kind.real()
    if dtype.hasobject:
        flat = np.empty(len(content), dtype)
        for place, part in enumerate(content):  # an assignment at once would unpack lists
            flat[place] = part
        return flat.reshape(shape)  # objects are listed row by row, whatever the order says
    # Python 2 wrote bytes as text, which is read as latin1.
    raw = content.encode("latin1") if isinstance(content, str) else bytes(content)
    found: Array = np.frombuffer(raw, dtype).copy()
    return found.reshape(shape, order="F" if order == "F" else "C")


def _empty(*_: Any) -> _Array:
    """Stand for `_reconstruct`, which makes the array that a state then fills."""
    return _Array()


def _scalar(kind: Any, content: Any) -> Any:
    """Stand for `scalar`, which makes single numbers."""
    found = _filled(content, kind, (1,))
    if found.dtype.hasobject:
        raise ValueError("a single object is not read here")
    return found[0]


def _encoded(text: str, encoding: str) -> bytes:
    """Stand for `_codecs.encode`, by which protocols 0 to 2 hold bytes."""
    if encoding != "latin1":
        raise ValueError(f"bytes in the encoding {encoding!r} are not read here")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """Stand for `bytes`, by which protocols 0 to 2 hold empty ones."""
    return b""


def _made(kind: Any, *_: Any) -> _Matrix:
    """Stand for `copyreg._reconstructor`, by which protocols 0 and 1 make objects."""
    if kind not in (_Coo, _Csr, _Csc):
        raise ValueError("an object that is no matrix")
    found: _Matrix = kind()
    return found


def _names() -> dict[tuple[str, str], Callable[..., Any]]:
    """Return all that a pickle may name, under the old and the new names of modules."""
    names: dict[tuple[str, str], Callable[..., Any]] = {
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Type,
        ("_codecs", "encode"): _encoded,
    }
    for core in ("numpy.core", "numpy._core"):
        names[f"{core}.multiarray", "_reconstruct"] = _empty
        names[f"{core}.multiarray", "scalar"] = _scalar
        names[f"{core}.numeric", "_frombuffer"] = _filled
    for form, kind in (("coo", _Coo), ("csr", _Csr), ("csc", _Csc)):
        for module in (f"scipy.sparse.{form}", f"scipy.sparse._{form}", "scipy.sparse"):
            for ending in ("matrix", "array"):
                names[module, f"{form}_{ending}"] = kind
    for module in ("copyreg", "copy_reg"):
        names[module, "_reconstructor"] = _made
    for module in ("builtins", "__builtin__"):
        names[module, "object"] = object
        names[module, "bytes"] = _no_bytes
    return names


class _Unpickler(pickle.Unpickler):
    """An unpickler that knows a fixed list of names, and none by its dots."""

    allowed: ClassVar[dict[tuple[str, str], Callable[..., Any]]] = _names()

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a name.

        Raises:
            _RefusedError: It is not on the list.
        """
        if (module, name) not in self.allowed:
            raise _RefusedError(f"{module}.{name}")
        return self.allowed[module, name]


def _settled(value: Any, seen: set[int]) -> Any:
    """Return a value with real arrays and matrices in the place of what stood for them.

    Args:
        value: What was unpickled; lists, dicts and arrays of objects change in place.
        seen: Ids of containers that were already walked through: a pickle can hold itself.
    """
    if isinstance(value, _Matrix):
        return value.real()
    if isinstance(value, _Array):
        if value.value is None:
            raise ValueError("an array without content")
        value = value.value
    if isinstance(value, tuple):
        return tuple([_settled(part, seen) for part in value])
    if id(value) in seen or not isinstance(value, list | dict | np.ndarray):
        return value
    seen.add(id(value))
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            flat = value.reshape(-1)
            for place, part in enumerate(flat.tolist()):
                flat[place] = _settled(part, seen)
        return value
    pairs = enumerate(value) if isinstance(value, list) else list(value.items())
    for key, part in pairs:
        if not isinstance(part, int | str | float):
            value[key] = _settled(part, seen)
    return value
