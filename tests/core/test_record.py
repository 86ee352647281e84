import errno
import json
import math
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmforget.errors import DataError, ResourceError
from mmforget.record import (
    SCHEMA,
    AttackResult,
    Cost,
    MetricValue,
    RunResult,
    Seeds,
    find_runs,
    from_json,
    load_arrays,
    load_run,
    save_arrays,
    to_json,
    write_text,
    writing,
)


def result(**changes: Any) -> RunResult:
    curve = {"x": [0.0, 1.0], "y": [0.0, math.inf], "x_label": "FPR", "y_label": "TPR"}
    base = RunResult(
        id="vision/mufac/npo/0123456789ab-s0",
        status="finished",
        benchmark="vision/mufac",
        modality="vision",
        method="npo",
        seeds=Seeds(1, 2, 3),
        mini=True,
        request={"kind": "identity", "sizes": {"forget": 3}, "ids_sha": "ab"},
        parents={"original": "x", "retrained": None},
        metrics={
            "accuracy/test": MetricValue(0.1 + 0.2, "up", 0.25, 0.2, 0.4, 100, "ü"),
            "undefined": MetricValue(math.nan, "to_reference", math.inf, -math.inf),
        },
        attacks={
            "loss": AttackResult(
                "grey",
                {"loss/auc": MetricValue(0.5, "to_reference")},
                queries=10,
                seconds=1e-7,
                budget={"queries": None},
                curves={"roc/loss": curve},
                targets={"score": np.arange(3)},
            )
        },
        cost=Cost(1.5, 2.5, 1 << 40, 7, 8, 9),
        environment={"python": "3.11", "dirty": None},
        config={"method": {"beta": 0.1, "milestones": []}, "data": {"float": "text"}},
        notes=["a note"],
    )
    return replace(base, **changes)


def test_round_trip_is_exact() -> None:
    before = result()
    text = to_json(before)
    after = from_json(text, Path("folder"))
    assert to_json(after) == text
    assert after.folder == Path("folder")
    value = after.metrics["accuracy/test"]
    assert value == before.metrics["accuracy/test"]
    assert value.gap == abs(0.1 + 0.2 - 0.25)
    undefined = after.metrics["undefined"]
    assert math.isnan(undefined.value)
    assert (undefined.reference, undefined.low) == (math.inf, -math.inf)
    assert after.attacks["loss"].curves == before.attacks["loss"].curves
    assert after.attacks["loss"].targets == {}
    assert after.seeds == Seeds(1, 2, 3)
    assert after.cost == before.cost
    assert after.config == before.config
    del before.metrics["undefined"], after.metrics["undefined"]  # NaN equals nothing
    assert after == before


def test_text_is_strict_json_without_a_folder() -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    content = json.loads(to_json(result(folder=Path("/x"))), parse_constant=refuse)
    assert "folder" not in content
    assert content["schema"] == SCHEMA
    assert content["metrics"]["undefined"]["value"] == {"float": "nan"}


def test_numpy_numbers_and_paths_are_stored_plainly() -> None:
    config = {"n": np.int64(3), "x": np.float32(0.5), "bad": np.float64("nan"), "p": Path("a/b")}
    after = from_json(to_json(result(config=config)))
    assert {k: after.config[k] for k in ("n", "x", "p")} == {"n": 3, "x": 0.5, "p": "a/b"}
    assert math.isnan(after.config["bad"])


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "{}", '{"schema": 1}', '{"schema": "x"}', "\x00\xff"]
)
def test_other_text_is_no_record(text: str) -> None:
    with pytest.raises(DataError, match=r"run\.json"):
        from_json(text, Path("here"))


@pytest.mark.parametrize(
    ("key", "value"), [("metrics", []), ("cost", {"x": 1}), ("seeds", None), ("more", 1)]
)
def test_damaged_records(key: str, value: Any) -> None:
    content = json.loads(to_json(result()))
    with pytest.raises(DataError, match="no run record"):
        from_json(json.dumps(content | {key: value}))


def test_newer_schema() -> None:
    content = json.loads(to_json(result())) | {"schema": SCHEMA + 1}
    with pytest.raises(DataError, match="newer"):
        from_json(json.dumps(content))


def test_direction_is_checked_and_gap_needs_a_reference() -> None:
    with pytest.raises(ValueError, match="sideways"):
        MetricValue(1.0, "sideways")
    assert MetricValue(1.0, "up").gap is None
    assert MetricValue(0.25, "up", 1.0).gap == 0.75


def test_run_folders(tmp_path: Path) -> None:
    for name in ("b/x", "a/y"):
        write_text(tmp_path / name / "run.json", to_json(result(id=name)))
    assert [run.id for run in find_runs([tmp_path])] == ["a/y", "b/x"]
    assert [run.id for run in find_runs([tmp_path / "b" / "x"])] == ["b/x"]
    assert load_run(tmp_path / "a" / "y").folder == tmp_path / "a" / "y"
    with pytest.raises(DataError, match=r"no run\.json"):
        load_run(tmp_path)
    (tmp_path / "run.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="no run record"):
        load_run(tmp_path)


def test_arrays(tmp_path: Path) -> None:
    groups = {
        "forget": {"ids": np.array(["a", "ü"]), "loss": np.array([1.5, np.nan], np.float32)},
        "a/b": {"logits": np.zeros((0, 3))},
    }
    path = tmp_path / "predictions.npz"
    save_arrays(path, groups)
    loaded = load_arrays(path)
    assert {k: set(v) for k, v in loaded.items()} == {k: set(v) for k, v in groups.items()}
    for group, part in groups.items():
        for name, array in part.items():
            assert loaded[group][name].dtype == array.dtype
            np.testing.assert_array_equal(loaded[group][name], array)
    assert [p.name for p in tmp_path.iterdir()] == ["predictions.npz"]
    run = result(folder=tmp_path)
    assert list(run.predictions()) == ["forget", "a/b"]


def test_targets_of_an_attack(tmp_path: Path) -> None:
    save_arrays(tmp_path / "attacks" / "diffusion.x.npz", {"": {"score": np.arange(3)}})
    found = result(folder=tmp_path).targets("diffusion/x")
    assert found["score"].tolist() == [0, 1, 2]


def test_arrays_of_objects_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="x"):
        save_arrays(tmp_path / "a.npz", {"g": {"x": np.array([object()])}})
    assert list(tmp_path.iterdir()) == []


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), writing(path) as temporary:
        temporary.write_text("half")
        assert temporary.suffix == ".txt"
        assert path.read_text() == "old"
        raise RuntimeError
    assert path.read_text() == "old"
    assert len(list(path.parent.iterdir())) == 1
    write_text(path, "näu")
    assert path.read_bytes() == "näu".encode()


def test_files_have_the_usual_permissions(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "x")
    (tmp_path / "b.txt").write_text("x")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a.txt", "b.txt")]
    assert modes[0] == modes[1]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def full(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ResourceError, match=r"no space left while writing .*a\.txt"):
            write_text(path, "new")
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_other_disk_errors_pass(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((NotADirectoryError, FileExistsError)):
        write_text(tmp_path / "file" / "a.txt", "x")
