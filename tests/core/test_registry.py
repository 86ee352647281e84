import importlib.metadata
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mmforget import registry
from mmforget.errors import ConfigError, MissingDependencyError
from mmforget.registry import REGISTRIES, Registry, load_plugins


@pytest.fixture
def methods() -> Registry[Any]:
    table = {"npo": "collections:OrderedDict", "diffusion/esd": "fractions:Fraction"}
    return Registry("method", table)


@pytest.fixture
def known(methods: Registry[Any], monkeypatch: pytest.MonkeyPatch) -> Registry[Any]:
    monkeypatch.setattr(registry, "METHODS", methods)
    return methods


def test_listing_imports_neither_torch_nor_hydra() -> None:
    code = (
        "import sys, mmforget.registry as r; r.METHODS.names(); "
        "print(sorted({'torch', 'hydra', 'omegaconf', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_lazy_entry_is_imported_when_used(methods: Registry[Any]) -> None:
    from collections import OrderedDict

    assert methods.get("npo") is OrderedDict
    assert methods.get("npo") is OrderedDict


def test_modality_comes_first(methods: Registry[Any]) -> None:
    assert methods.resolve("esd", "diffusion") == "diffusion/esd"
    assert methods.resolve("diffusion/esd") == "diffusion/esd"
    assert methods.resolve("npo", "diffusion") == "npo"
    methods.extend({"diffusion/npo": "decimal:Decimal"})
    assert methods.resolve("npo", "diffusion") == "diffusion/npo"
    assert methods.resolve("npo", "vision") == "npo"
    with pytest.raises(ConfigError, match=r"unknown method 'esd'\. Close: diffusion/esd"):
        methods.get("esd", "vision")


def test_did_you_mean(methods: Registry[Any]) -> None:
    with pytest.raises(ConfigError) as raised:
        methods.get("nqo")
    assert str(raised.value) == "unknown method 'nqo'. Close: npo. See: mmforget list methods"


def test_wildcards(methods: Registry[Any]) -> None:
    assert methods.names() == ["diffusion/esd", "npo"]
    assert list(methods) == methods.names()
    assert methods.names("diffusion/*") == ["diffusion/esd"]
    assert methods.names("e*") == ["diffusion/esd"]
    assert methods.names("n?o") == ["npo"]
    assert methods.names("x*") == []
    assert "npo" in methods
    assert "esd" not in methods


def test_duplicates(methods: Registry[Any]) -> None:
    with pytest.raises(ConfigError, match="registered twice"):
        methods.register("npo")(type("Other", (), {}))
    with pytest.raises(ConfigError, match="registered twice"):
        methods.extend({"npo": "decimal:Decimal"})
    methods.extend({"npo": "collections:OrderedDict"})

    def cell() -> type:
        class Mine:
            pass

        return methods.register("mine")(Mine)

    first = cell()
    again = cell()  # a notebook cell that is run twice
    assert first is not again
    assert methods.get("mine") is again
    with pytest.raises(ConfigError, match="registered twice"):
        methods.register("mine")(type("Other", (), {}))


def test_missing_package_names_its_extra(
    methods: Registry[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(registry.EXTRAS, "no_such_package", "vision")
    (tmp_path / "needs_extra.py").write_text("import no_such_package.sub\n")
    (tmp_path / "needs_other.py").write_text("import no_such_package_either\n")
    methods.extend({"a": "needs_extra:A", "b": "needs_other:B"})
    with pytest.raises(MissingDependencyError, match=r"pip install 'mmforget\[vision\]'"):
        methods.get("a")
    with pytest.raises(ModuleNotFoundError, match="no_such_package_either"):
        methods.get("b")


def test_every_target_is_well_formed() -> None:
    for kind in REGISTRIES.values():
        for name, target in kind._targets.items():
            place = target if isinstance(target, str) else registry._place(target)
            module, _, attribute = place.partition(":")
            assert module and attribute.isidentifier(), name
            assert name == name.lower() and name.count("/") <= 1, name


def write(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.write_text(text)
    return file


GOOD = """
from mmforget import registry
@registry.METHODS.register("mine")
class Mine:
    pass
"""


def test_plugin_file(tmp_path: Path, known: Registry[Any]) -> None:
    file = write(tmp_path, "good_plugin.py", GOOD)
    assert load_plugins((file,)) == ["good_plugin"]
    first = known.get("mine")
    assert load_plugins((file,)) == ["good_plugin"]  # loaded once
    assert known.get("mine") is first
    assert load_plugins((write(tmp_path, "other.py", ""),)) == ["other"]
    del sys.modules["mmforget_plugin_good_plugin"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def (", "SyntaxError"),
        ("import no_such_module_at_all", "ModuleNotFoundError"),
        (GOOD.replace('"mine"', '"npo"'), "registered twice"),
    ],
)
def test_broken_plugin_file_is_an_error(
    tmp_path: Path, known: Registry[Any], text: str, message: str
) -> None:
    file = write(tmp_path, "broken_plugin.py", text)
    with pytest.raises(ConfigError, match=message):
        load_plugins((file,))
    assert "mmforget_plugin_broken_plugin" not in sys.modules
    with pytest.raises(ConfigError, match=message):  # it does not count as loaded
        load_plugins((file,))


def test_mended_plugin_file_loads(tmp_path: Path, known: Registry[Any]) -> None:
    file = write(tmp_path, "mended_plugin.py", GOOD + "1 / 0\n")
    with pytest.raises(ConfigError, match="ZeroDivisionError"):
        load_plugins((file,))
    file.write_text(GOOD + "# the mended file has another size\n")
    assert load_plugins((file,)) == ["mended_plugin"]
    assert known.get("mine").__module__ == "mmforget_plugin_mended_plugin"
    del sys.modules["mmforget_plugin_mended_plugin"]


def test_plugin_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_plugins((tmp_path / "absent.py",))
    with pytest.raises(ConfigError, match="not a Python file"):
        load_plugins((write(tmp_path, "plugin.txt", ""),))


def test_broken_installed_plugin_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    write(tmp_path, "broken_installed.py", "raise RuntimeError('too old')")
    write(tmp_path, "good_installed.py", "")
    group = "mmforget.plugins"
    points = [
        importlib.metadata.EntryPoint("broken", "broken_installed", group),
        importlib.metadata.EntryPoint("good", "good_installed", group),
    ]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points)
    with caplog.at_level(logging.WARNING):
        assert load_plugins() == ["good"]
    assert len(caplog.records) == 1
    assert "broken" in caplog.text
    assert "too old" in caplog.text
