"""`test_laws.py` again in float64, in processes of their own with x64 on; slow, but for what fuzz puts to them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import zoo
from subjects import SLOW
from test_laws import SUBJECTS, TWICE

SHARDS = 4
LATER = SLOW | {name for i, name in enumerate(zoo.ODD) if i % 12}


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(SHARDS))
@pytest.mark.parametrize("slow", [False, True])
def test_laws_in_float64(shard, slow):
    tests = Path(__file__).parent
    wanted = []
    for name in [name for name in SUBJECTS if (name.removesuffix("-train") in LATER) == slow][shard::SHARDS]:
        wanted.append(f"{tests}/test_laws.py::test_laws[{name}]")
        if name in TWICE:
            wanted.append(f"{tests}/test_laws.py::test_narrowing_twice_is_narrowing_once[{name}]")
    if shard == 0:
        wanted.append(f"{tests}/test_laws.py::test_precision_of_the_process")
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"JAX_ENABLE_X64": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *wanted]
    done = subprocess.run(command, cwd=tests.parent, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert f"{len(wanted)} passed" in done.stdout
