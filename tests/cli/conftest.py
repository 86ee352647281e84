import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmforget.registry import REGISTRIES, load_plugins


@pytest.fixture(scope="module", autouse=True)
def _toy_modality() -> Iterator[None]:
    """Register the toy modality for one module's tests and leave the registries as they were."""
    with pytest.MonkeyPatch.context() as patch:
        for registry in REGISTRIES.values():
            patch.setattr(registry, "_targets", dict(registry._targets))
        load_plugins((Path(__file__).with_name("toy_plugin.py"),))
        yield
    sys.modules.pop("mmforget_plugin_toy_plugin", None)
