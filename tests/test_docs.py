"""What the README and the documentation show runs as it stands there, prints what they say, and names what there is."""

import contextlib
import io
import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tyro

from treesurgeon import engine, models, search
from treesurgeon.search.compare import Comparison
from treesurgeon.search.config import Config
from treesurgeon.search.depth import Depth
from treesurgeon.search.exporting import Export
from treesurgeon.search.insight import Insight
from treesurgeon.search.inspecting import Inspection
from treesurgeon.search.pool import Pool
from treesurgeon.search.verify import Verification

ROOT = Path(__file__).parents[1]
SITE = ROOT / "docs/pages"
PAGES = {str(path.relative_to(ROOT)): path for path in (ROOT / "README.md", *sorted(SITE.rglob("*.md")))}
COMMANDS = {
    "search": Config,
    "inspect": Inspection,
    "depth": Depth,
    "insight": Insight,
    "compare": Comparison,
    "export": Export,
    "verify": Verification,
}
BLOCK = re.compile(r"^(?:<!-- (?P<note>slow) -->\n)?```(?P<kind>\w+)(?P<rest>[^\n]*)\n(?P<text>.*?)^```$", re.M | re.S)


def blocks(page: Path) -> list[SimpleNamespace]:
    """The fenced blocks of a page; `shown` is the output that follows a block at once."""
    text = page.read_text()
    found = [SimpleNamespace(**m.groupdict(), span=m.span(), shown=None) for m in BLOCK.finditer(text)]
    for block, after in itertools.pairwise(found):
        if after.kind == "text" and not text[block.span[1] : after.span[0]].strip():
            block.shown = after.text
    return found


def commands(block) -> list[list[str]]:
    """The calls of `treesurgeon` in a block for a shell."""
    lines = block.text.replace("\\\n", " ").splitlines()
    calls = [shlex.split(line, comments=True) for line in lines if line.startswith("treesurgeon ")]
    return [call[1:] for call in calls]


def agrees(printed: str, shown: str) -> bool:
    """Whether output is what a page shows, where `…` stands for anything."""
    pattern = ".*".join(re.escape(part) for part in shown.strip().split("…"))
    return bool(re.fullmatch(pattern, printed.strip(), re.S))


def walk(page: Path, slow: bool) -> None:
    """Go through a page as its reader would, in the directory at hand."""
    names: dict = {"__name__": page.stem}
    for block in blocks(page):
        if block.note and not slow:
            continue
        if title := re.search(r'title="([^"]+)"', block.rest):
            Path(title[1]).write_text(block.text)
        elif block.kind == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(block.text, str(page), "exec", dont_inherit=True), names)
            assert block.shown is None or agrees(out.getvalue(), block.shown), out.getvalue()
        elif block.kind == "sh" and slow:
            for call in commands(block):
                done = subprocess.run(
                    [sys.executable, "-m", "treesurgeon.search.cli", *call], capture_output=True, text=True
                )
                assert done.returncode == 0, done.stderr
                assert block.shown is None or agrees(done.stdout, block.shown), done.stdout


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """An empty directory to work in; what is imported from it is forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.delitem(sys.modules, "mine", raising=False)  # of another test
    before, rules = set(sys.modules), dict(engine.rules.base._RULES)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    engine.rules.base._RULES.clear()
    engine.rules.base._RULES.update(rules)


def with_code(kinds: tuple[str, ...], noted: bool) -> list[str]:
    return [n for n, p in PAGES.items() if any(b.kind in kinds and bool(b.note) == noted for b in blocks(p))]


@pytest.mark.parametrize("name", [name for name in with_code(("python",), False) if name != "README.md"])
def test_examples_run(name, desk):
    walk(PAGES[name], slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", with_code(("python",), True))
def test_whole_tutorials_run(name, desk):
    walk(PAGES[name], slow=True)


def test_readme_examples_run(desk):
    """As above, with a selected model in the place of the demo's."""
    spec, x = engine.ModelSpec("mlp", (8, 8, 1), {"widths": [4]}), np.zeros((1, 8, 8, 1), np.float32)
    engine.save("runs/demo/selected", spec, spec.build().init(jax.random.key(0), x), engine.Plan())
    names: dict = {"x": x}
    for block in blocks(PAGES["README.md"]):
        if block.kind == "python":
            exec(compile(block.text, "README.md", "exec", dont_inherit=True), names)
    assert names["logits"].shape == (1, 10)
    assert names["better"].shape == (1, 10)


@pytest.mark.parametrize("name", with_code(("sh",), False) + with_code(("sh",), True))
def test_commands_are_the_parsers(name):
    makefile = (ROOT / "Makefile").read_text()
    for block in blocks(PAGES[name]):
        if block.kind != "sh":
            continue
        for target in re.findall(r"^make ([a-z-]+)", block.text, re.M):
            assert re.search(rf"^{target}:", makefile, re.M), target
        for command, *rest in commands(block):
            if command == "report":
                assert len(rest) == 1
                continue
            given = [word for word in rest if word not in ("--json", "--quiet") or command != "search"]
            tyro.cli(COMMANDS[command], args=given, config=(tyro.conf.OmitArgPrefixes,))


def test_a_flag_that_is_not_there_is_found(capsys):
    block = SimpleNamespace(text="treesurgeon search --model m --checkpoint c --data digits --mcas 0.5  # typo\n")
    ((_, *rest),) = commands(block)
    with pytest.raises(SystemExit):
        tyro.cli(Config, args=rest)


@pytest.mark.parametrize("package", [engine, models, search], ids=["engine", "models", "search"])
def test_the_reference_has_all_that_is_public(package):
    name = package.__name__.rpartition(".")[2]
    text = (SITE / f"reference/{name}.md").read_text()
    listed = re.findall(rf"^::: treesurgeon\.{name}\.(?:(\w+)|(\w+)\.\2)$", text, re.M)
    assert sorted(one or both for one, both in listed) == sorted(package.__all__)


def test_mentioned_flags_exist():
    """Flags in running text, of any command."""
    fields = {f.replace("_", "-") for command in COMMANDS.values() for f in command.__dataclass_fields__}
    fields |= {f.replace("_", "-") for f in Pool.__dataclass_fields__}
    fields |= {"json", "quiet", "help", "config", "print-config"}
    for name, page in PAGES.items():
        prose = BLOCK.sub("", page.read_text())
        for flag in re.findall(r"`--(?:no-)?([a-z][a-z-]*)", prose):
            assert flag in fields, f"{name}: --{flag}"


@pytest.mark.slow
def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--config-file", "docs/mkdocs.yml"]
    subprocess.run([*command, "--site-dir", str(tmp_path / "site")], cwd=ROOT, check=True)
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 10
    for page in pages:
        html = page.read_text()
        loaded = re.findall(r'<(?:script|img|iframe)[^>]+src="([^"]+)"', html)
        loaded += [href for rel, href in re.findall(r'<link[^>]*rel="?(\w+)"?[^>]*href="([^"]+)"', html)]
        loaded += re.findall(r"@import[^;]+|url\((?:https?:)?//[^)]+\)", html)
        assert not [address for address in loaded if "//" in address], page
