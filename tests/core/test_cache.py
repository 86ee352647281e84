import errno
import hashlib
import json
import logging
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from mmforget.cache import Cache, canonical, key_of
from mmforget.errors import ConfigError, ResourceError

INPUTS: dict[str, Any] = {"benchmark": "vision/mufac", "seed": 3, "lr": 1e-3}


def build(cache: Cache, inputs: dict[str, Any] = INPUTS, text: str = "weights") -> Path:
    with cache.building("original", inputs) as place:
        assert not place.ready
        (place.payload / "model.bin").write_text(text)
        (place.payload / "sub").mkdir()
        (place.payload / "sub" / "log.txt").write_text("log")
        return place.commit()


def run_python(script: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def test_canonical_is_one_text_per_value() -> None:
    value = {"b": (1, 2.5), "a": Path("x") / "y", "ü": [None, True, {"n": -0.0}]}
    assert canonical(value) == '{"a":"x/y","b":[1,2.5],"\\u00fc":[null,true,{"n":-0.0}]}'
    assert canonical({"a": 1, "b": 2}) == canonical({"b": 2, "a": 1})
    assert canonical(0.1 + 0.2) == "0.30000000000000004"
    assert canonical(1) != canonical(1.0)
    # SHA-256 of the text {"a":1}, by any other tool.
    assert key_of({"a": 1}) == "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"a": {"b": [0, float("nan")]}}, r"nan \(at a\.b\[1\]\)"),
        ({"a": float("inf")}, "inf"),
        ({"a": {1: 2}}, "keys that are no text"),
        ({"a": {1, 2}}, "a set"),
        ({"a": b"x"}, "a bytes"),
        (object(), "a object"),
    ],
)
def test_canonical_refuses_what_json_has_not(value: Any, place: str) -> None:
    with pytest.raises(ConfigError, match=place):
        canonical(value)


def test_entry_is_found_after_commit_only(cache: Cache) -> None:
    assert cache.lookup("original", INPUTS) is None
    with cache.building("original", INPUTS) as place:
        (place.payload / "model.bin").write_text("weights")
        assert cache.lookup("original", INPUTS) is None
        path = place.commit()
    assert path == cache.root / "original" / path.name[:2] / key_of(INPUTS)
    assert cache.lookup("original", dict(reversed(INPUTS.items()))) == path
    assert cache.lookup("original", INPUTS | {"seed": 4}) is None
    assert cache.lookup("retrained", INPUTS) is None
    assert not place.scratch.exists()
    with cache.building("original", INPUTS) as again:
        assert again.ready
        assert again.path == path
    assert (path / "model.bin").read_text() == "weights"


def test_entry_json_describes_the_files(cache: Cache) -> None:
    path = build(cache)
    content = json.loads((path / "entry.json").read_text())
    assert content["inputs"] == INPUTS
    assert set(content["files"]) == {"model.bin", "sub/log.txt"}
    assert content["files"]["sub/log.txt"] == {
        "bytes": 3,
        "sha256": hashlib.sha256(b"log").hexdigest(),
    }
    (entry,) = cache.entries()
    assert (entry.kind, entry.key, entry.path, entry.bytes) == ("original", path.name, path, 10)


@pytest.mark.parametrize("damage", ["missing", "short", "mark", "torn"])
def test_damaged_entry_is_set_aside_with_one_warning(
    cache: Cache, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = build(cache)
    if damage == "missing":
        (path / "sub" / "log.txt").unlink()
    elif damage == "short":
        (path / "model.bin").write_text("weight")
    elif damage == "mark":
        (path / "entry.json").unlink()
    else:
        (path / "entry.json").write_text('{"kind": "orig')
    with caplog.at_level(logging.WARNING):
        assert cache.lookup("original", INPUTS) is None
        assert cache.lookup("original", INPUTS) is None
    assert len(caplog.records) == 1
    assert "damaged" in caplog.text
    assert [p.name.startswith(".broken-") for p in path.parent.iterdir()] == [True]
    assert build(cache) == path
    assert cache.lookup("original", INPUTS) == path


def test_building_makes_a_damaged_entry_anew(cache: Cache) -> None:
    path = build(cache)
    (path / "model.bin").write_text("")
    assert build(cache) == path
    assert (path / "model.bin").read_text() == "weights"


def test_verify_finds_changed_content_of_equal_size(cache: Cache) -> None:
    sound, changed = build(cache), build(cache, INPUTS | {"seed": 9})
    assert cache.verify() == []
    (changed / "model.bin").write_text("WEIGHTS")
    assert cache.lookup("original", INPUTS | {"seed": 9}) == changed
    (fault,) = cache.verify()
    assert str(changed) in fault
    assert "model.bin" in fault
    assert cache.lookup("original", INPUTS | {"seed": 9}) is None
    assert cache.lookup("original", INPUTS) == sound


@pytest.mark.parametrize("resumable", [True, False])
def test_failed_build_leaves_only_what_can_go_on(cache: Cache, resumable: bool) -> None:
    with pytest.raises(RuntimeError), cache.building("original", INPUTS) as place:
        (place.payload / "model.bin").write_text("half")
        if resumable:
            place.state.mkdir()
            (place.state / "state.json").write_text("{}")
        raise RuntimeError
    assert place.scratch.exists() == resumable
    assert cache.lookup("original", INPUTS) is None
    with cache.building("original", INPUTS) as again:
        assert again.scratch == place.scratch
        assert list(again.payload.iterdir()) == []
        assert (again.state / "state.json").exists() == resumable
        again.commit()
    assert not place.scratch.exists()


def test_killed_at_any_file_operation(tmp_path: Path) -> None:
    """A build killed before its n-th file operation, for every n, leaves all or nothing."""
    script = """
        import os, signal, sys
        from pathlib import Path
        from mmforget.cache import Cache
        from mmforget.cache import read_entry

        def build(cache):
            with cache.building("original", {"a": 1}) as place:
                if not place.ready:
                    (place.payload / "model.bin").write_text("weights" * 1000)
                    place.state.mkdir(exist_ok=True)
                    (place.state / "state.json").write_text("{}")
                    place.commit()

        def killed(root, n):
            seen = 0
            def hook(event, arguments):
                nonlocal seen
                touches = any(str(root) in str(a) for a in arguments[:1])
                if touches and event in WATCHED:
                    seen += 1
                    if seen == n:
                        os.kill(os.getpid(), signal.SIGKILL)
            sys.addaudithook(hook)
            build(Cache(root))
            os._exit(0)

        WATCHED = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}
        finished, n, status = [], 0, -1
        while status != 0:
            n += 1
            root = Path(sys.argv[1]) / str(n)
            pid = os.fork()
            if pid == 0:
                killed(root, n)
            status = os.waitpid(pid, 0)[1]
            cache = Cache(root)
            path = cache.lookup("original", {"a": 1})
            assert path is None or cache.verify() == [], n
            assert path is not None or cache.entries() == [], n
            finished.append(path is not None)
            build(cache)
            assert cache.verify() == [] and len(cache.entries()) == 1, n
            assert not list(root.rglob(".work-*")) and not list(root.rglob(".broken-*")), n
        assert finished == sorted(finished), finished
        print(n, sum(finished))
    """
    process = run_python(script, tmp_path)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    moments, finished = map(int, out.split())
    assert moments > 15
    assert 1 < finished < moments  # killed on both sides of the rename


def test_second_process_waits_and_finds_it_ready(tmp_path: Path) -> None:
    script = """
        import logging, sys, time
        from pathlib import Path
        from mmforget import cache
        logging.basicConfig(level=logging.INFO)
        cache.PATIENCE_S = 0.2
        with cache.Cache(Path(sys.argv[1])).building("original", {"a": 1}) as place:
            print("ready" if place.ready else "building", flush=True)
            if not place.ready:
                time.sleep(float(sys.argv[2]))
                (place.payload / "x").write_text("x")
                place.commit()
    """
    first = run_python(script, tmp_path, 1.5)
    assert first.stdout is not None
    assert first.stdout.readline() == "building\n"
    second = run_python(script, tmp_path, 0)
    out, err = second.communicate(timeout=30)
    first.communicate(timeout=30)
    assert out == "ready\n"
    assert err.count("waiting for another process") == 1
    assert f"pid {first.pid}" in err


def test_lock_of_a_killed_builder_is_free(tmp_path: Path) -> None:
    script = """
        import sys, time
        from pathlib import Path
        from mmforget.cache import Cache
        with Cache(Path(sys.argv[1])).building("original", {"a": 1}) as place:
            place.state.mkdir()
            (place.state / "step").write_text("500")
            print("building", flush=True)
            time.sleep(60)
    """
    process = run_python(script, tmp_path)
    assert process.stdout is not None
    process.stdout.readline()
    cache = Cache(tmp_path)
    assert cache.prune() == 0  # locked: its working folder stays
    process.kill()
    process.communicate()
    with cache.building("original", {"a": 1}) as place:
        assert (place.state / "step").read_text() == "500"


def test_full_disk_leaves_nothing(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ResourceError, match="no space left"):
            build(cache)
    with pytest.raises(ResourceError), cache.building("original", INPUTS):
        full()
    assert cache.lookup("original", INPUTS) is None
    assert [p for p in cache.root.rglob("*") if p.is_file() and p.suffix != ".lock"] == []
    build(cache)


def test_other_errors_pass_unchanged(cache: Cache) -> None:
    with pytest.raises(FileNotFoundError), cache.building("original", INPUTS):
        (cache.root / "nothing").read_text()


def test_unwritable_root(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        cache = Cache(root)
        assert cache.lookup("original", INPUTS) is None
        with pytest.raises(ConfigError, match="MMFORGET_CACHE"), cache.building("a", INPUTS):
            pass


def test_root_from_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMFORGET_CACHE", str(tmp_path))
    assert Cache().root == tmp_path
    assert Cache(tmp_path / "other").root == tmp_path / "other"
    monkeypatch.delenv("MMFORGET_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Cache().root == tmp_path / ".cache" / "mmforget"


@pytest.mark.parametrize("kind", ["a/b", "", "locks", "..", ".x"])
def test_kind_is_a_plain_name(cache: Cache, kind: str) -> None:
    with pytest.raises(ConfigError, match="kind"):
        cache.lookup(kind, INPUTS)


def aged(cache: Cache, seed: int, age_s: float, kind: str = "original") -> Path:
    with cache.building(kind, {"seed": seed}) as place:
        (place.payload / "x").write_bytes(b"0" * 100)
        path = place.commit()
    then = time.time() - age_s
    os.utime(path / "entry.json", (then, then))
    return path


def test_prune(cache: Cache) -> None:
    old, used, new = (aged(cache, i, age) for i, age in enumerate((900, 600, 0)))
    shadow = aged(cache, 9, 900, "shadow")
    assert cache.prune() == 0
    assert len(cache.entries()) == 4
    cache.lookup("original", {"seed": 1})  # a look-up counts as use
    assert cache.prune(kinds={"original"}, older_than_s=500) >= 100
    assert (old.exists(), used.exists(), new.exists(), shadow.exists()) == (False, True, True, True)
    assert cache.prune(keep_bytes=250) >= 100
    assert (used.exists(), new.exists(), shadow.exists()) == (True, True, False)
    with cache.building("original", {"seed": 2}):
        cache.prune(keep_bytes=0)
        assert (used.exists(), new.exists()) == (False, True)  # the locked one stays
    cache.prune(kinds=["original"])
    assert cache.entries() == []


def test_prune_removes_left_overs(cache: Cache) -> None:
    path = build(cache)
    (path / "model.bin").unlink()
    cache.lookup("original", INPUTS)
    with pytest.raises(RuntimeError), cache.building("original", INPUTS) as place:
        place.state.mkdir()
        (place.state / "x").write_text("12345")
        raise RuntimeError
    assert cache.prune(older_than_s=1000) == 0
    assert cache.prune(kinds=["shadow"]) == 0
    assert cache.prune() > 5
    assert list(path.parent.iterdir()) == []
