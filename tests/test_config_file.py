"""`treesurgeon search --config FILE`: what the file says, what flags say, and what is refused."""

import dataclasses
from importlib.metadata import version

import pytest

from treesurgeon.search import Config, RunError
from treesurgeon.search.cli import main
from treesurgeon.search.config_file import named_in, read, write

TOML = """
model = "digits_cnn"
data = "digits"
macs = 1
max-train = 300
protect = ["none", "conv1"]
mean = [0, 0.5]
chunk = 4
certify = false
"""
YAML = """
model: digits_cnn
data: digits
macs: 1
max-train: 300
protect: [none, conv1]
mean: [0, 0.5]
chunk: 4
certify: false
"""


@pytest.mark.parametrize(("name", "text"), [("run.toml", TOML), ("run.yaml", YAML)])
def test_flags_come_before_the_file_and_the_file_before_the_defaults(tmp_path, capsys, name, text):
    path = tmp_path / name
    path.write_text(text)
    main(["search", "--config", str(path), "--checkpoint", 'a "b" é', "--macs", "0.5", "--certify", "--print-config"])
    (tmp_path / "out.toml").write_text(capsys.readouterr().out)
    assert Config(**read(tmp_path / "out.toml")) == Config(
        "digits_cnn", 'a "b" é', "digits", macs=0.5, max_train=300, protect=("none", "conv1"), mean=(0, 0.5), chunk=4
    )


def test_every_option_is_read_back(tmp_path):
    config = Config("m", "c", "d", latency=1e-7, source_labels=("a\\b", "c\nd"), multiple=8, head="fit", delta=0.1)
    (tmp_path / "x.toml").write_text(write(config))
    assert Config(**read(tmp_path / "x.toml")) == config
    assert {f.name for f in dataclasses.fields(Config)} >= read(tmp_path / "x.toml").keys()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epslon = 0.1", "no option 'epslon'; did you mean epsilon?"),
        ("zzzzzz = 1", "no option 'zzzzzz'; there are model, checkpoint, data"),
        ("[search]\nmacs = 1", "no option 'search'; did you mean"),
        ("macs = 'half'", "macs = 'half': expected a number"),
        ("certify = 1", "certify = 1: expected true or false"),
        ("seed = 1.5", "seed = 1.5: expected a whole number"),
        ("seed = true", "seed = True: expected a whole number"),
        ("mean = 0.5", "mean = 0.5: expected a list of such: a number"),
        ("mean = ['a']", r"mean = \['a'\]: expected a list of such: a number"),
        ("head = 'keeep'", "head = 'keeep': expected one of auto, keep, fit"),
        ("model = ", "not TOML: "),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, text, message):
    path = tmp_path / "x.toml"
    path.write_text(text)
    with pytest.raises(RunError, match=rf"--config .*x.toml: {message}"):
        read(path)


def test_files_that_cannot_be_read(tmp_path, capsys):
    (tmp_path / "x.yaml").write_text("a: [1")
    (tmp_path / "y.yaml").write_text("- 1")
    (tmp_path / "z.json").write_text("{}")
    (tmp_path / "w.toml").write_bytes(b"\xff")
    for name, message in {
        "x.yaml": "not YAML: while parsing",
        "y.yaml": "expected options by name, got a list",
        "z.json": "expected a .toml, .yaml or .yml file",
        "w.toml": "cannot be read",
        "v.toml": "cannot be read: .*No such file",
    }.items():
        with pytest.raises(RunError, match=message):
            read(tmp_path / name)
    with pytest.raises(SystemExit) as caught:
        main(["search", f"--config={tmp_path}/z.json", "--model", "mlp", "--checkpoint", "c", "--data", "digits"])
    assert caught.value.code == 2
    assert "expected a .toml" in capsys.readouterr().err
    assert named_in(["search", "--config"]) is None


def test_the_version_is_said(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"treesurgeon {version('treesurgeon')}\n"
