"""The zoo's digits_cnn with half of its layers, for tests to which their number does not matter."""

from dataclasses import replace
from functools import partial

import pytest

from treesurgeon.models import presets


@pytest.fixture(scope="module", autouse=True)
def fewer_layers():
    """What is traced and compiled is most of what a small search takes."""
    preset = presets.get("digits_cnn")
    factory = partial(preset.factory, stages=((16,), (48,)), residual=(0, 48))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(presets, "ZOO", {**presets.ZOO, preset.name: replace(preset, factory=factory)})
        yield
