"""Many devices, many processes, workers that come and go: none of them changes what a search finds."""

import importlib.util
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from ownmodel import own_model
from smallrun import small_config

from treesurgeon.search import RunError, pipeline
from treesurgeon.search.evaluate import race
from treesurgeon.search.mesh import choose_shape, groups, make_mesh, parse_shape
from treesurgeon.search.pool import Pool
from treesurgeon.search.setting import fingerprint
from treesurgeon.search.workers import Crew

MODEL = """
from flax import linen as nn


class Tiny(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Dense(8, name="stem")(x.reshape(x.shape[0], -1)))
        x = x + nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(nn.Dense(8, name="deep")(x)))
        return nn.Dense(3, name="head")(nn.relu(nn.Dense(8, name="hidden")(x)))
"""
SMALL = (
    "--data npz:data.npz --fitted-split train --population 6 --generations 3 --search-images 160 --chunk 2 "
    "--calibration-images 16 --refit-images 32 --finalists 2 --epochs 1 --protect none --no-certify"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a model, its checkpoint and data."""
    return furnished(tmp_path_factory.mktemp("user"), MODEL)


def furnished(home: Path, model: str) -> Path:
    own_model(home, model, (4, 4, 1))
    rng = np.random.default_rng(0)
    y = np.arange(480) % 3
    x = (rng.normal(size=(480, 4, 4, 1)) + y[:, None, None, None] / 2).astype(np.float32)
    np.savez(home / "data.npz", x_train=x[:64], y_train=y[:64], x_test=x[64:], y_test=y[64:])
    return home


def environment(devices: int) -> dict[str, str]:
    """That of a process with so many devices; compiled as it is for users, not as fast as it can be (conftest.py)."""
    flags = re.sub(r"--xla_(force_host|cpu_use_fusion)\S+", "", os.environ.get("XLA_FLAGS", ""))
    here = {"XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}", "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **here}


def start(place: Path, out: str, *more: str, devices: int = 1, room: int | None = None):
    arguments = f"search --model mine:Tiny --checkpoint checkpoint --out {out} {SMALL}".split()
    return subprocess.Popen(
        [sys.executable, "-m", "treesurgeon.search.cli", *arguments, *more],
        cwd=place,
        env=environment(devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=room and (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))),
    )


def ended(process) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=1500)
    return process.returncode, out, err


def contents(out: Path) -> dict:
    """What a run found, bit for bit."""
    manifest = json.loads((out / "selected/manifest.json").read_text())
    return {
        "variables": fingerprint(ocp.load(str(out / "selected/variables"))),
        "manifest": {k: v for k, v in manifest.items() if k != "files"},
        "tables": [(out / name).read_text() for name in ("candidates.csv", "front.csv", "sensitivity.csv")],
    }


@pytest.fixture(scope="module")
def serial(place):
    """What one device finds."""
    code, _, err = ended(start(place, "serial"))
    assert code == 0, err
    return contents(place / "serial")


def several(place: Path, out: str, count: int, *more: str):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{free.getsockname()[1]}"
    shared = ("--distributed", "--coordinator", where, "--processes", str(count), *more)
    return [start(place, out, *shared, "--process", str(i)) for i in range(count)]


# --- devices of one host --------------------------------------------------------------------------------------------


def scores(devices: int, model: str, reconstruct: str, *shapes: str) -> list[dict]:
    command = [sys.executable, str(Path(__file__).parent / "devices.py"), model, reconstruct, *shapes]
    done = subprocess.run(command, env=environment(devices), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("model", "reconstruct", "shapes"),
    [
        ("mlp", "maps", ("1x1", "4x2", "4x2s")),
        pytest.param("mlp", "kernels", ("1x1", "2x4", "2x4s"), marks=pytest.mark.slow),
        pytest.param("digits_cnn", "maps", ("1x1", "4x2s"), marks=pytest.mark.slow),
        pytest.param("mlp", "none", ("1x1", "8x1", "1x8", "3x2", "3x2s"), marks=pytest.mark.slow),
    ],
)
def test_devices_find_what_one_finds_bit_for_bit(model, reconstruct, shapes):
    alone, *others = scores(8, model, reconstruct, *shapes)
    assert alone["compiled"] == 2
    assert alone["sweep compiled"] == 1
    assert min(alone["seen"]) < max(alone["seen"])  # racing dropped some
    for found in others:
        assert found | {"shape": "1x1"} == alone


def test_shapes_are_the_fastest():
    assert choose_shape(1, 2, 4) == (1, 1)
    assert choose_shape(8, 2, 4) == (2, 4)
    assert choose_shape(8, 16, 4) == (8, 1)  # along candidates, if that is as fast: racing spares them batches
    assert choose_shape(6, 2, 4) == (3, 2)


@pytest.mark.parametrize("text", ["4", "0x2", "4x-1", "axb", ""])
def test_shapes_that_are_none(text):
    with pytest.raises(RunError, match="expected CxD"):
        parse_shape(text)


def test_a_mesh_takes_no_more_devices_than_there_are():
    with pytest.raises(RunError, match=f"takes 1000 devices, and there are {jax.device_count()}"):
        make_mesh((500, 2))


def test_pieces_fill_the_mesh():
    pieces = [np.array([0, 1]), np.array([2, 3]), np.array([4, 4])]
    assert [each.tolist() for each in groups(pieces, 2)] == [[0, 1, 2, 3], [4, 4, 4, 4]]


def test_batches_shown_at_once_are_judged_one_by_one():
    rng = np.random.default_rng(0)
    total, weights = 7, np.ones((5, 3), np.float32)
    weights[-1, 2] = 0
    truth = rng.random((total, 15)).astype(np.float32)

    def score(columns):
        def found(pieces, b, factors):
            at = np.minimum(np.arange(b * 3, (b + columns) * 3), 14)
            for rows in pieces:
                yield truth[rows][:, at], truth[rows][:, at] > 0.5, -truth[rows][:, at], factors[rows]

        return found

    def keep(losses):
        mean = np.nanmean(losses, 1)
        return mean <= np.median(mean) + 0.05

    alone = race(score(1), total, weights, 2, 1, keep)
    for columns in (2, 3, 5, 8):
        for one, other in zip(alone, race(score(columns), total, weights, 2, columns, keep), strict=True):
            np.testing.assert_array_equal(one, other)
    assert 0 < np.isnan(alone[0]).sum() < alone[0].size
    np.testing.assert_array_equal(race(score(2), total, weights, 2, 2, None, 3)[0][:, :9], truth[:, :9])


@pytest.mark.slow
def test_a_run_on_eight_devices_is_the_run_on_one(place, serial):
    code, out, err = ended(start(place, "devices", devices=8))
    assert code == 0, err
    assert "8 devices: 4 along candidates, 2 along images" in out
    assert contents(place / "devices") == serial
    code, out, err = ended(start(place, "fewer", "--mesh", "3x1", devices=8))
    assert code == 0, err
    assert "3 devices: 3 along candidates, 1 along images" in out
    assert contents(place / "fewer") == serial


@pytest.mark.slow
def test_a_run_with_a_split_model_is_the_run_with_copies(tmp_path):
    wide = furnished(tmp_path, MODEL.replace("nn.Dense(8", "nn.Dense(64"))
    code, out, err = ended(start(wide, "copies", "--criterion", "activation"))
    assert code == 0, err
    code, out, err = ended(start(wide, "split", "--criterion", "activation", "--shard", "always", devices=8))
    assert code == 0, err
    assert re.search(r"the model \(0\.0 MB\) is split over 8 devices, 0\.0 MB on each", out)
    assert contents(wide / "split") == contents(wide / "copies")
    code, _, err = ended(start(wide, "alone", "--shard", "always"))
    assert code == 2
    assert "--shard always: there is one device" in err
    assert not (wide / "alone").exists()


# --- hosts ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_processes_find_what_one_finds(place, serial, count):
    outs = [ended(process) for process in several(place, f"processes{count}", count)]
    assert [code for code, _, _ in outs] == [0] * count, outs
    assert f"{count} processes with {count} devices" in outs[0][1]
    assert "saved" in outs[0][1]
    assert not any("mine:Tiny" in out for _, out, _ in outs[1:])  # process 0 alone talks
    assert contents(place / f"processes{count}") == serial


@pytest.mark.slow
def test_processes_and_devices_find_where_candidates_end(place):
    more = "--truncations", "1"
    code, out, err = ended(start(place, "ends", *more))
    assert code == 0, err
    assert "candidates may end at" in out, out
    one = contents(place / "ends")
    ends = [row.rsplit(",", 1)[1] for row in one["tables"][0].splitlines()[1:]]
    assert "" in ends
    assert len(set(ends)) == 2
    assert [code for code, _, _ in map(ended, several(place, "ends-processes", 2, *more))] == [0, 0]
    assert contents(place / "ends-processes") == one
    code, _, err = ended(start(place, "ends-devices", "--mesh", "2x2", "--shard", "always", *more, devices=4))
    assert code == 0, err
    assert contents(place / "ends-devices") == one


@pytest.mark.slow
def test_where_a_process_ends_all_do_and_the_run_goes_on(place, serial):
    first, second = several(place, "lost", 2)
    for line in first.stdout:
        if line.startswith("generation   1/"):
            break
    first.kill()
    code, _, err = ended(second)
    assert code not in (0, None)
    assert "cannot reach the others any more" in err or "another task died" in err
    ended(first)
    code, out, err = ended(start(place, "lost"))  # on one process now
    assert code == 0, err
    assert "resumed after generation" in out
    assert contents(place / "lost") == serial


@pytest.mark.slow
def test_where_one_cannot_write_all_say_so_and_the_run_goes_on(place, serial):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{free.getsockname()[1]}"
    shared = ("--distributed", "--coordinator", where, "--processes", "2")
    full = start(place, "full", *shared, "--process", "0", room=3000)  # bytes of a file: less than a generation takes
    other = start(place, "full", *shared, "--process", "1")
    for code, _, err in map(ended, (full, other)):
        assert code == 2, err
        assert "cannot be written" in err
    code, _, err = ended(start(place, "full"))
    assert code == 0, err
    assert contents(place / "full") == serial


@pytest.mark.slow
def test_processes_that_differ_are_refused(place):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{free.getsockname()[1]}"
    shared = ("--distributed", "--coordinator", where, "--processes", "2")
    one = start(place, "differ", *shared, "--process", "0")
    other = start(place, "differ", *shared, "--process", "1", "--seed", "1")
    for code, _, err in map(ended, (one, other)):
        assert code == 2
        assert "seed = 0" in err
        assert "seed = 1" in err
    assert not (place / "differ").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ray": "local", "distributed": True}, "neither --distributed"),
        ({"process": 0}, "add it"),
        ({"workers": 2}, "with --ray"),
        ({"ray": "local", "shard": "always"}, "each of its workers has one device"),
        ({"shard": "sometimes"}, "expected one of auto, always, never"),
        ({"ray": "local", "workers": 0}, "1 or more"),
    ],
)
def test_what_does_not_go_together(given, message):
    with pytest.raises(RunError, match=message):
        Pool(**given).check()


# --- workers that come and go ---------------------------------------------------------------------------------------


@pytest.fixture
def cluster():
    """A Ray cluster of two nodes on this machine."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    yield made
    ray.shutdown()  # a test may have joined it itself
    made.shutdown()


def ray_workers() -> list[int]:
    """Process numbers of the workers that this process's cluster runs."""
    psutil = pytest.importorskip("psutil")
    out = []
    for each in psutil.Process().children(recursive=True):
        try:
            if "".join(each.cmdline()).startswith("ray::Worker"):
                out.append(each.pid)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):  # it has ended meanwhile
            continue
    return out


@pytest.mark.slow
def test_workers_that_die_change_nothing(place, serial, cluster):
    process = start(place, "rayed", "--ray", cluster.address, "--workers", "2")
    lines, killed = [], 0
    assert process.stdout
    for line in process.stdout:
        lines.append(line)
        if line.startswith(("4 single changes", "generation   1/", "generation   2/")):
            alive = ray_workers()
            assert alive
            os.kill(alive[killed % len(alive)], signal.SIGKILL)
            killed += 1
            if killed == 2:  # a node leaves, another one comes
                cluster.add_node(num_cpus=1)
                cluster.remove_node(next(iter(cluster.worker_nodes)))
    code, _, err = ended(process)
    assert code == 0, err
    assert "2 Ray workers\n" in lines
    assert lines.count("a Ray worker died; it is replaced, and its work done again\n") >= killed == 3
    assert contents(place / "rayed") == serial


@pytest.mark.slow
def test_workers_choose_criteria_halve_a_shortlist_and_learn_from_the_dense_model_alike(tmp_path, cluster):
    np.savez(tmp_path / "more.npz", x=np.random.default_rng(1).random((200, 8, 8, 1)).astype(np.float32))
    more = {"unlabelled": f"npz:{tmp_path / 'more.npz'}", "search_images": 150, "distill": 0.5}
    found = {}
    for name, pool in {"here": Pool(), "there": Pool(ray=cluster.address, workers=2)}.items():
        (tmp_path / name).mkdir()
        given = {"criteria": ("l2", "activation"), "shortlist": 6, "finalists": 1, "epochs": 2, "baselines": False}
        said = []
        outcome = pipeline.run(small_config(tmp_path / name, macs=0.5, **given, **more), said.append, pool)
        halves = [line for line in said if "go on (--shortlist)" in line]
        assert len(halves) == 2
        found[name] = halves, [line for line in said if "are ranked by" in line], outcome.lines
    assert found["here"] == found["there"]


@pytest.mark.slow
def test_a_slow_worker_holds_nothing_up(place, serial, cluster):
    process = start(place, "slowed", "--ray", cluster.address, "--workers", "2")
    lines, stopped = [], []
    assert process.stdout
    try:
        for line in process.stdout:
            lines.append(line)
            if line.startswith("generation   1/"):
                stopped = ray_workers()[:1]
                os.kill(stopped[0], signal.SIGSTOP)  # infinitely slow
        code, _, err = ended(process)
    finally:
        for each in stopped:
            os.kill(each, signal.SIGKILL)
    assert code == 0, err
    assert any(line.startswith("a Ray worker is much slower than the others") for line in lines)
    assert not any("died" in line for line in lines)
    assert contents(place / "slowed") == serial


@pytest.mark.slow
def test_a_worker_that_cannot_start_is_told(place, cluster, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    broken = MODEL.replace("class Tiny", "import sys\nassert 'default_worker' not in sys.argv[0]\n\n\nclass Tiny")
    (elsewhere / "mine.py").write_text(broken)
    for name in ("checkpoint", "data.npz"):
        (elsewhere / name).symlink_to(place / name)
    code, _, err = ended(start(elsewhere, "out", "--ray", cluster.address, "--workers", "1"))
    assert code == 2
    assert "Ray workers keep dying" in err


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray():
    with pytest.raises(RunError, match="treesurgeon\\[ray\\]"):
        Crew("local", None, print)


@pytest.mark.slow
def test_no_cluster_there():
    pytest.importorskip("ray")
    with pytest.raises(RunError, match="no cluster there"):
        Crew("127.0.0.1:1", None, print)
