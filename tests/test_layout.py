"""The house's one direction of dependencies, and its one door to JAX's internals."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [path for package in ("engine", "search", "models") for path in sorted((ROOT / package).rglob("*.py"))]


def imports(path: Path) -> set[str]:
    """The modules that a file imports, and what it takes from them: `a.b` and `a.b.c`."""
    out = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            out |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            out |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return out


def test_there_is_something_to_look_at():
    assert len(FILES) > 30


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_dependencies_run_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    allowed = {"engine": {"engine"}, "models": {"models"}, "search": {"search", "engine", "models"}}[package]
    for name in imports(path):
        first, *rest = name.split(".")
        assert first not in ("engine", "search", "models"), f"{name}: import it as treesurgeon.{first}"
        if first == "treesurgeon" and rest:
            assert rest[0] in allowed, f"{package} may not import {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_two_files_touch_jax_internals_and_two_know_flax(path):
    where = str(path.relative_to(ROOT))
    for name in imports(path):
        assert not name.startswith("jax._src"), f"{where} imports {name}"
        if where not in ("engine/jaxprs.py", "engine/primitives.py"):
            assert not name.startswith(("jax.extend", "jax.interpreters")), f"{where} imports {name}"
        if where.startswith("engine/") and where not in ("engine/flax.py", "engine/checkpoint.py"):
            assert not name.startswith("flax"), f"{where} imports {name}"


def test_modules_are_read_in_a_sitting():
    long = {str(path.relative_to(ROOT)): lines for path in FILES if (lines := len(path.read_text().splitlines())) > 450}
    assert not long


def test_what_takes_seconds_to_import_is_imported_where_it_is_used():
    slow = {"ray", "scipy.optimize", "scipy.stats", "sklearn", "tensorflow", "tensorflow_datasets", "torch"}
    program = f"import sys, treesurgeon.search.cli; print({slow} & sys.modules.keys() or 'none')"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "none"
