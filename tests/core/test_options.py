import math
from dataclasses import dataclass, field, fields, replace

import pytest

from mmforget.errors import ConfigError, unknown
from mmforget.options import default_of, faults, option


@dataclass(frozen=True)
class Inner:
    rate: float = option(0.5, "a share", low=0, high=1)


@dataclass(frozen=True)
class Config:
    kind: str = option("sgd", "optimiser", choices=("sgd", "adam"))
    maybe: str | None = option(None, "optional", choices=("a", "b"))
    steps: int | None = option(None, "steps", low=1)
    flag: bool = option(True, "a switch", low=5)
    places: list[int] = option([1, 2], "epochs")
    table: dict[str, int] = option({"a": 1}, "a table")
    inner: Inner = field(default_factory=Inner)


def test_defaults_are_sound_and_not_shared() -> None:
    assert faults(Config()) == []
    Config().places.append(3)
    Config().table["b"] = 2
    assert Config().places == [1, 2]
    assert Config().table == {"a": 1}
    found = {item.name: default_of(item) for item in fields(Config)}
    assert found["kind"] == "sgd"
    assert found["places"] == [1, 2]
    assert found["inner"] == Inner()
    assert fields(Config)[0].metadata["help"] == "optimiser"


@pytest.mark.parametrize("value", [0.0, 1.0, 0, 1])
def test_ends_of_a_range_are_in_it(value: float) -> None:
    assert faults(Inner(value)) == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-1e-9, "method.rate=-1e-09 is too small: at least 0"),
        (1.01, "method.rate=1.01 is too large: at most 1"),
        (-math.inf, "method.rate=-inf is too small: at least 0"),
    ],
)
def test_out_of_range(value: float, message: str) -> None:
    assert faults(Inner(value), "method") == [message]


def test_nan_is_never_in_a_range() -> None:
    assert len(faults(Inner(math.nan))) == 2


def test_every_fault_is_found_with_its_place() -> None:
    config = replace(Config(), kind="adm", maybe="c", steps=0, inner=Inner(2.0))
    found = faults(config, "method")
    assert len(found) == 4
    assert "method.kind: 'adm'" in found[0]
    assert "Close: adam" in found[0]
    assert "method.maybe" in found[1]
    assert "Accepted: a, b" in found[1]
    assert found[2].startswith("method.steps=0")
    assert found[3].startswith("method.inner.rate=2.0")
    error = ConfigError(found)
    assert error.faults == tuple(found)
    assert str(error).startswith("4 faults")
    assert all(fault in str(error) for fault in found)
    assert str(ConfigError(found[:1])) == found[0]


def test_unknown_suggests_full_and_short_names() -> None:
    names = ["npo", "simnpo", "diffusion/esd", "recsys/unlearnrec"]
    assert unknown("method", "nqo", names, "x") == "unknown method 'nqo'. Close: npo. See: x"
    assert "diffusion/esd" in unknown("method", "esdd", names, "x")
    assert "Accepted: diffusion/esd, npo" in unknown("method", "zzzzzz", names, "x")
