"""Golden vectors, most of them made by reference implementations, against the code that runs.

`python -m pytest tests/parity --golden DIR` checks every `*.json` below DIR. A family without an
adapter is a failure, unless its area is listed below as not built yet.
"""

import importlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

# Families whose code does not exist yet, by area (the folder of the file). This list only shrinks.
NOT_BUILT: Mapping[str, Sequence[str]] = {
    "diffusion_attacks": (
        "unbranding_bsu",
        "unbranding_clip_gate",
        "unbranding_expected_label",
        "unbranding_vlm_agreement",
    ),
    "language": (
        "concept_vector_intrinsic",
        "cut",
        "expert_attribution",
        "fila_init",
        "flat",
        "gp_cr_wa",
        "inverted_hinge",
        "pdu",
        "randomized_smoothing_quadratic",
        "rocr_rank_one_update",
        "router_anchor_loss",
        "uld_logit_difference",
        "whp_generic_logits",
    ),
    "vlm_others": (
        "medforget_chip_core",
        "medforget_hierarchy",
        "medforget_reconstruction_gain",
        "medforget_reconstruction_prompts",
        "medforget_scoring",
        "mmubench_cdis_fluency",
        "mmubench_string_metrics",
        "offside_classification",
        "offside_generation",
        "offside_losses",
        "offside_split_rule",
        "siu_dmk_loss",
        "unlok_blackbox_success",
        "unlok_delta_accuracy",
        "unlok_head_projection_attack",
        "unlok_layer_losses",
        "unlok_pd2_attack",
        "unlok_prefix_prompts",
        "unlok_probability_delta_attack",
        "unlok_rewrite_score",
        "unlok_sequence_losses",
    ),
}

HERE = Path(__file__).parent
MODULES = [path.stem for path in sorted(HERE.glob("[!_]*.py")) if not path.stem.startswith("test")]
ADAPTERS: dict[str, Callable[[dict[str, Any]], Mapping[str, Any]]] = {}
for _module in MODULES:
    for _family, _adapter in importlib.import_module(f"tests.parity.{_module}").ADAPTERS.items():
        assert _family not in ADAPTERS, f"{_family} has two adapters"
        ADAPTERS[_family] = _adapter


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "vector" in metafunc.fixturenames:
        root = metafunc.config.getoption("--golden")
        files = [path for path in sorted(root.rglob("*.json")) if not _not_built(path)]
        names = [path.relative_to(root).with_suffix("").as_posix() for path in files]
        metafunc.parametrize("vector", files, ids=names)


def _not_built(path: Path) -> bool:
    family = json.loads(path.read_text())["family"]
    area = path.parent.name
    if area in NOT_BUILT:
        return family in NOT_BUILT[area]
    return family not in ADAPTERS and any(family in names for names in NOT_BUILT.values())


def test_golden(vector: Path) -> None:
    content = json.loads(vector.read_text())
    family = content["family"]
    adapter = ADAPTERS.get(f"{vector.parent.name}/{family}", ADAPTERS.get(family))
    assert adapter is not None, f"no adapter for the family {family!r} in {HERE}"
    tolerance = content["tolerance"]
    found = adapter(content["inputs"])
    faults = list(differences(found, content["outputs"], tolerance["rtol"], tolerance["atol"]))
    assert not faults, f"{len(faults)} values differ: " + "; ".join(faults[:8])


def test_there_are_vectors(pytestconfig: pytest.Config) -> None:
    root = pytestconfig.getoption("--golden")
    assert any(root.rglob("*.json")), f"no golden vectors below {root}"


def differences(
    found: Any, wanted: Any, rtol: float, atol: float, path: str = "outputs"
) -> list[str]:
    """Return where two values differ: numbers by tolerance, all else exactly.

    An adapter may return more keys than a vector holds. Numbers that JSON cannot hold are strings.
    """
    if hasattr(found, "tolist"):
        found = found.tolist()
    if isinstance(wanted, dict):
        if not isinstance(found, Mapping) or wanted.keys() - found.keys():
            given = sorted(found) if isinstance(found, Mapping) else found
            return [f"{path}: wanted keys {sorted(wanted)}, found {given}"]
        pairs = [(found[key], value, f"{path}.{key}") for key, value in wanted.items()]
        return [fault for a, b, at in pairs for fault in differences(a, b, rtol, atol, at)]
    if isinstance(wanted, list):
        if not isinstance(found, (list, tuple)) or len(found) != len(wanted):
            return [f"{path}: wanted a list of {len(wanted)}, found {found!r:.80}"]
        rows = zip(found, wanted, range(len(wanted)), strict=True)
        return [f for a, b, i in rows for f in differences(a, b, rtol, atol, f"{path}[{i}]")]
    if isinstance(found, float) and wanted in ("inf", "-inf", "nan"):
        wanted = float(wanted)
    if _number(found) and _number(wanted):
        near = found == wanted or (math.isnan(found) and math.isnan(wanted))
        if math.isfinite(found) and math.isfinite(wanted):
            near = abs(found - wanted) <= atol + rtol * abs(wanted)
    else:
        near = type(found) is type(wanted) and found == wanted
    return [] if near else [f"{path}: wanted {wanted!r}, found {found!r}"]


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (1.0 + 3e-6, 1.0),
        (float("nan"), 1.0),
        (float("inf"), "-inf"),
        (1.0, "inf"),
        (1, True),
        ("a", "b"),
        ([1.0], [1.0, 2.0]),
        ({"a": 1.0}, {"a": 1.0, "b": 2.0}),
        ([["x", "z"]], [["x", "y"]]),
        (None, 0.0),
    ],
)
def test_a_wrong_value_is_seen(found: Any, wanted: Any) -> None:
    assert differences(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (1.0 + 1e-6, 1.0),
        (float("inf"), "inf"),
        (float("nan"), "nan"),
        (2, 2.0),
        ((True, None, "x"), [True, None, "x"]),
        ({"a": 1.0, "more": 3.0}, {"a": 1.0}),
    ],
)
def test_a_right_value_passes(found: Any, wanted: Any) -> None:
    assert not differences(found, wanted, rtol=1e-6, atol=1e-6)
