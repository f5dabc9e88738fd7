"""What the README shows runs as it stands there."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_engine_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    names: dict = {}
    for example in [block for block in blocks if "engine." in block and "load" not in block]:
        exec(compile(example, str(README), "exec"), names)
    assert names["better"].shape == (1, 10)


def test_make_targets_exist():
    makefile = README.with_name("Makefile").read_text()
    for target in re.findall(r"make ([a-z-]+)", README.read_text()):
        assert re.search(rf"^{target}:", makefile, re.M), target
