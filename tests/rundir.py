"""A complete run's directory made up in a moment, by the writers that a search uses; its names may be hostile."""

import json

import numpy as np

from treesurgeon.search import report
from treesurgeon.search.certificate import Step, wilson
from treesurgeon.search.conclusion import certificate_rows
from treesurgeon.search.strips import strip

HOSTILE = "</script><img src=x onerror=alert(1)>&\"'"


def make_run(
    path, *, extra="", groups=8, blocks=3, candidates=40, seed=0, epochs=5, status="passed", budget=None, transfer=False
):
    """Write one, with `extra` at the end of every name and text; `transfer`: with baselines, a new head and depths."""
    rng = np.random.default_rng(seed)
    sizes = [16 * 2 ** (3 * i // groups) for i in range(groups)]
    report.write_table(
        path / "groups.csv",
        report.GROUP_COLUMNS,
        [
            {
                "group": f"layer{i}/conv{extra}",
                "size": n,
                "widths": range_(n),
                "blocks": [i] if 0 < i < blocks else [],
            }
            for i, n in enumerate(sizes)
        ],
    )
    rows = [{"block": f"layer{i}{extra}", "searched": i > 0, "leaves": [f"layer{i}/conv"]} for i in range(blocks)]
    report.write_table(path / "blocks.csv", report.BLOCK_COLUMNS, rows)
    pins = [{"axis": f"params/head/bias[{i}]{extra}", "reason": f"an axis of the output{extra}"} for i in range(3)]
    report.write_table(path / "pinned.csv", report.PIN_COLUMNS, pins)
    for generation in range(4):
        report.write_generation(
            path / "candidates.csv",
            generation,
            [candidate(rng, sizes, blocks, over=budget is not None and i % 3 == 0) for i in range(candidates // 4)],
        )
    report.write_sensitivity(
        path / "sensitivity.csv",
        [
            {"kind": "group", "name": f"layer{i}/conv{extra}", "kept": kept, "rise": (1 - kept / n) / (i + 1)}
            for i, n in enumerate(sizes)
            for kept in range_(n)
        ]
        + [{"kind": "block", "name": f"layer{i}{extra}", "kept": 0, "rise": np.inf} for i in range(1, blocks)],
    )
    names = [f"v{i}{extra}" for i in (1, 2, 3)]
    picked = "dense" if status == "nothing smaller passed" else names[0]
    results = [result("dense", 300_000, 9e6, 0.99, 0.95, 0.947, picked)]
    results += [result(n, 200_000 // 2**i, 6e6 / 2**i, 0.99 - i / 50, 0.94, 0.935, picked) for i, n in enumerate(names)]
    baselines = [f"dense fine-tuned{extra}", f"linear probe{extra}"] if transfer else []
    results += [result(name, 300_000, 9e6, 0.99, 0.96, 0.955, picked) for name in baselines]
    report.write_table(path / "results.csv", report.RESULT_COLUMNS, results)
    front = [{"variant": n, "reason": f"passes{extra}", "description": f"conv 16→8{extra}"} for n in names]
    if status == "not certified":
        front = [{**row, "cv_difference": 0.012, "cv_low": -0.005, "cv_high": 0.03} for row in front]
    report.write_front(path / "front.csv", front)
    curves = [
        {
            "variant": name,
            "epoch": epoch,
            "train_loss": 0.6 / epoch if epoch else None,
            "search_loss": 0.3 + 0.05 * abs(epoch - 2 - i),
            "search_error": 0.06,
            "best": epoch == 2,
        }
        for i, name in enumerate(names)
        for epoch in range(epochs + 1 if epochs else 0)
    ]
    report.write_table(path / "curves.csv", report.CURVE_COLUMNS, curves)
    opened = status != "not certified"
    steps = [
        Step(names[0], 3, 2, 0.002, (0.01, 0.02), (0.01, 0.001), status == "passed"),
        Step(names[1], 9, 2, 0.014, (0.01, 0.02), (0.31, 0.04), False),
    ]
    steps = steps[: 2 if status == "passed" else 1] if opened else []
    report.write_table(path / "certificate.csv", report.CERTIFICATE_COLUMNS, certificate_rows(steps))
    (path / "selected").mkdir()
    manifest = {
        "metric": "accuracy",
        "selected": picked,
        "verdict": {"sentence": f"Certified, as it were.{extra}", "passed": True, "certified": status == "passed"},
        "certificate": {
            "valid": opened,
            "passed": status in ("passed", "nothing smaller passed"),
            "selected": picked,
            "count": 500,
            "delta": 0.05,
            "sentence": f"It passes, or why not.{extra}",
        },
        "plan": {"keep": {f"layer{groups - 1}/conv{extra}": list(range(20))}, "drop": [f"layer1{extra}"]},
        "data": {
            "spec": f"digits{extra}",
            "clean": True,
            "fitted": ["train"],
            "images": dict.fromkeys(("train", "search", "certify", "test"), 500),
            "fingerprints": {role: role * 12 for role in ("train", "search", "certify", "test")},
        },
        "labels": [f"cat{extra}", f"hat{extra}"],
        "normalisation": {"mean": [0.5], "std": [0.25]},
        "seed": 0,
    }
    remarks = {name: {"remark": f"{name}; ahead of v1 by so much{extra}"} for name in baselines}
    told = f"On test 2 baselines are better.{extra}" if transfer else ""
    manifest["baselines"] = {"sentence": told, "found": remarks, "level": 0.95}
    if transfer:
        manifest["head"] = {"carried": [f"cat{extra}"], "fitted": [f"hat{extra}"]}
        (path / "shift.json").write_text(json.dumps({"sentence": f"domain shift: the inputs are shifted{extra}"}))
        depths = [
            {"point": f"layer{i}{extra}", "features": 8, "params": 1000 * i, "macs": 10_000 * i, "penalty": 0.1}
            | {"train_accuracy": 0.9, "search_accuracy": share, "gap": 0.9 - share}
            for i, share in enumerate((0.5, 0.8, 0.7), 1)
        ]
        report.write_depth(path / "depth.csv", depths)
        (path / "selective").mkdir()
        images = np.linspace(0, 1, 2 * 8 * 8).reshape(2, 8, 8, 1)
        (path / "selective/0.png").write_bytes(strip(images, images[..., 0]))
        (path / "selective/1.jpg").write_bytes(strip(np.tile(images, (1, 10, 10, 3))))
        units = [
            {"group": f"layer{i}/conv{extra}", "unit": i, "selectivity": 0.875, "class": f"hat{extra}", "maps": i == 0}
            | {"top_images": [3, 7], "top_labels": [1, 0]}
            for i in (0, 1)
        ]
        report.write_table(path / "selective.csv", report.SELECTIVE_COLUMNS, units)
        report.write_table(
            path / "formats.csv",
            report.FORMAT_COLUMNS,
            [
                {"format": name, "bytes": 500_000, "dense_bytes": 1_250_000, "latency": 2.0, "dense_latency": 5.0}
                | {"repeats": 20, "batch": 32, "device": f"cpu{extra}"}
                for name in ("stablehlo", "onnx")
            ],
        )
    (path / "selected/manifest.json").write_text(json.dumps(manifest))
    config = {"model": f"digits_cnn{extra}", "checkpoint": "c0ffee", "data": {"train": "…"}, "macs": budget, "seed": 0}
    (path / "config.json").write_text(json.dumps({**config, "protect": ["first-stage"], "mean": []}))
    (path / "environment.json").write_text(json.dumps({"python": "3.11", "jax": f"0.10{extra}", "device": "cpu"}))
    return path


def range_(size):
    """The widths of a group."""
    return [size * eighths // 8 for eighths in range(8, 0, -1)]


def candidate(rng, sizes, blocks, over):
    """A row of candidates.csv; one that is over the budget has no score."""
    levels, bits = rng.integers(0, 8, len(sizes)), rng.integers(0, 2, blocks - 1)
    kept = [range_(n)[level] for n, level in zip(sizes, levels, strict=True)]
    share = sum(kept) / sum(sizes)
    error = 0.04 + 0.6 * (1 - share) ** 2 * rng.random()
    return {
        "loss": np.inf if over else 3 * error,
        "error": 1.0 if over else error,
        "violation": 0.5 if over else 0.0,
        "params": int(300_000 * share**2),
        "macs": int(9_000_000 * share),
        "activation_bytes": int(80_000 * share),
        "kept": kept,
        "genome": [*levels, *bits],
    }


def result(name, params, macs, train, search, test, selected):
    """A row of results.csv."""
    row = {"variant": name, "selected": name == selected, "params": params, "macs": int(macs), "bytes": 4 * params}
    row |= {"activation_bytes": int(macs / 100), "gap": train - search, "wrong": 1 - search}
    for split, share in (("train", train), ("search", search), ("test", test)):
        low, high = wilson(share, 500)
        row |= {split: share, f"{split}_low": low, f"{split}_high": high, f"{split}_images": 500}
    return row
