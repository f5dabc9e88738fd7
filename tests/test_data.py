"""Sources and roles: what is read, how it is divided, and every dataset that cannot serve."""

import dataclasses
import hashlib
import json
import multiprocessing
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from treesurgeon.engine import TreesurgeonError
from treesurgeon.search import digits
from treesurgeon.search.data import ROLES, DataError, _apportion, open_source, split_roles
from treesurgeon.search.records import images_again

CIFAR = Path(__file__).resolve().parents[1].parent / "shared/data/tfds/cifar10_jpeg/1.0.0"


def sizes(roles):
    return [len(getattr(roles, role)) for role in ROLES]


def arrays(n=100, classes=5, shape=(4, 4, 3), seed=0):
    """Images that all differ, and labels in which every class comes equally often."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, *shape), np.uint8), np.arange(n) % classes


@pytest.fixture
def npz(tmp_path):
    def write(**named):
        if not named:
            x, y = arrays(140)
            named = {"x_train": x[:40], "y_train": y[:40], "x_test": x[40:], "y_test": y[40:]}
        np.savez(tmp_path / "data.npz", **named)
        return open_source(f"npz:{tmp_path / 'data.npz'}")

    return write


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory):
    return digits.prepare(tmp_path_factory.mktemp("tfds")).parents[1]


# The digits.


def test_digits_hold_scikit_learns_images_once(digits_dir):
    images, labels = load_digits(return_X_y=True)
    expected = sorted(
        (int(label), (image / 16).astype(np.float32).tobytes()) for image, label in zip(images, labels, strict=True)
    )
    source = open_source("digits", digits_dir)
    got = []
    for split, size in source.splits.items():
        read = source.read_images(split, np.arange(size))
        assert read.shape == (size, 8, 8, 1)
        labelled = zip(read, source.read_labels(split), strict=True)
        got += [(int(label), image.tobytes()) for image, label in labelled]
    assert sorted(got) == expected
    assert set(source.splits) == {"train", "test"}
    assert source.splits["train"] == pytest.approx(0.6 * 1797, abs=6)
    for split in source.splits:  # every class in proportion
        share = np.bincount(source.read_labels(split)) / np.bincount(labels)
        np.testing.assert_allclose(share, 0.6 if split == "train" else 0.4, atol=0.005)


def test_digits_are_prepared_once(digits_dir):
    info = digits_dir / "scikit_digits/1.0.0/dataset_info.json"
    before = info.stat().st_mtime_ns
    assert digits.prepare(digits_dir) == info.parent
    assert info.stat().st_mtime_ns == before
    assert [p.name for p in digits_dir.iterdir()] == ["scikit_digits"]


def test_digits_replace_what_a_killed_run_left(digits_dir, tmp_path):
    final = tmp_path / "scikit_digits/1.0.0"
    shutil.copytree(digits_dir / "scikit_digits/1.0.0", final)
    (final / "dataset_info.json").unlink()
    (tmp_path / ".preparing-old").mkdir()
    assert digits.prepare(tmp_path) == final
    assert open_source("digits", tmp_path).splits == open_source("digits", digits_dir).splits


def test_two_processes_may_prepare_digits_at_once(tmp_path):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        paths = pool.map(digits.prepare, [tmp_path, tmp_path])
    assert paths[0] == paths[1]
    assert open_source("digits", tmp_path).splits["train"] > 1000
    assert [p.name for p in tmp_path.iterdir()] == ["scikit_digits"]


def test_digits_open_by_name_and_by_directory(digits_dir):
    by_name = open_source("tfds:scikit_digits", digits_dir)
    by_path = open_source(f"tfds-dir:{digits_dir}/scikit_digits/1.0.0")
    roles = [split_roles(source, ("train",)) for source in (open_source("digits", digits_dir), by_name, by_path)]
    assert roles[0].fingerprints == roles[1].fingerprints == roles[2].fingerprints
    assert roles[0].train.images.shape[1:] == (8, 8, 1)
    assert roles[0].train.images.max() == 1
    assert roles[0].label_names == tuple("0123456789")


# Roles.


def test_roles_are_disjoint_stratified_and_complete(npz):
    roles = split_roles(npz(), ("train",))
    assert sizes(roles) == [40, 40, 20, 40]
    assert roles.clean
    assert roles.train.origin == ("train",)
    for role in ROLES[1:]:
        split = getattr(roles, role)
        assert split.origin == ("test",)
        assert len(set(np.bincount(split.labels))) == 1
    clean = np.concatenate([getattr(roles, role).indices for role in ROLES[1:]])
    assert sorted(clean) == list(range(100))
    assert sorted(roles.train.indices) == list(range(40))


def test_images_are_scaled_normalised_and_stay_with_their_labels(npz):
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    roles = split_roles(npz(), ("train",), mean=mean, std=std)
    x, y = arrays(140)
    for role in ROLES:
        split = getattr(roles, role)
        at = split.indices + (0 if role == "train" else 40)
        np.testing.assert_array_equal(split.labels, y[at])
        np.testing.assert_allclose(split.images, (x[at] / 255 - mean) / std, rtol=1e-5, atol=1e-6)
        assert split.images.dtype == np.float32
        assert split.labels.dtype == np.int32


def test_an_image_that_is_stored_twice_has_one_role(npz):
    x, y = arrays(140)
    again = {"x_train": x[:40], "y_train": y[:40], "x_test": np.r_[x[:20], x[40:]], "y_test": np.r_[y[:20], y[40:]]}
    roles = split_roles(npz(**again), ("train",))
    assert len(roles.train) == 40
    digests = np.concatenate([getattr(roles, role).digests for role in ROLES])
    assert len(np.unique(digests)) == len(digests) == 140
    assert sum(roles.twice.values()) == 20
    assert split_roles(npz(), ("train",)).twice == {}
    same = split_roles(npz(**{**again, "x_test": x[:40], "y_test": y[:40]}), ("train",))
    assert (len(same.search) + len(same.certify) + len(same.test), same.clean) == (40, False)
    assert same.doubt == "all images of test are, pixel for pixel, images of train or search or certify"


def test_what_is_judged_counts_an_image_once(npz):
    x, y = arrays(100)
    roles = split_roles(
        npz(x_train=x[:40], y_train=y[:40], x_test=np.r_[x[40:], x[40:]], y_test=np.r_[y[40:], y[40:]]), ("train",)
    )
    digests = np.concatenate([getattr(roles, role).digests for role in ROLES])
    assert len(np.unique(digests)) == len(digests) == 100
    assert sum(roles.twice.values()) == 60
    assert roles.clean


def test_what_a_cap_leaves_out_of_train_was_fitted_all_the_same(npz):
    x, y = arrays(400)
    source = npz(x_train=x[:300], y_train=y[:300], x_test=np.r_[x[:100], x[300:]], y_test=np.r_[y[:100], y[300:]])
    roles = split_roles(source, ("train",), caps={"train": 30})
    fitted = {image.tobytes() for image in x[:300]}
    judged = [source.read_images("test", getattr(roles, role).indices) for role in ROLES[1:]]
    assert len(roles.train) == 30
    assert not fitted & {image.tobytes() for images in judged for image in images}
    assert sum(map(len, judged)) == 100
    assert sum(roles.twice.values()) == 100


def test_one_copy_that_a_cap_hides_is_found_in_memory(npz):
    x, y = arrays(400)
    source = npz(x_train=x[:300], y_train=y[:300], x_test=np.r_[x[:1], x[300:]], y_test=np.r_[y[:1], y[300:]])
    roles = split_roles(source, ("train",), caps={"train": 5})
    assert x[0].tobytes() not in {image.tobytes() for image in source.read_images("train", roles.train.indices)}
    assert sum(roles.twice.values()) == 1


def test_the_images_of_a_run_are_found_again_where_some_are_stored_twice(npz):
    x, y = arrays(300)
    source = npz(x=np.r_[x, x[:60]], y=np.r_[y, y[:60]])
    roles = split_roles(source, (), seed=3)
    assert sum(roles.twice.values()) > 20
    manifest = {
        "data": {"fitted": [], "spec": source.spec, "images": {role: len(getattr(roles, role)) for role in ROLES}},
        "model": {"input_shape": [4, 4, 3]},
        "normalisation": {"mean": [0.0], "std": [1.0]},
        "labels": list("01234"),
        "seed": 3,
    }
    for role in ROLES:
        assert images_again(manifest, role, source.spec, "").fingerprint == roles.fingerprints[role]


@pytest.mark.parametrize("factor", [1, 255])
def test_bytes_and_numbers_are_not_mixed(npz, factor):
    x, y = arrays(140)
    source = npz(x_train=x[:40], y_train=y[:40], x_test=x[40:] / 255 * factor, y_test=y[40:])
    if factor == 1:
        assert split_roles(source, ("train",)).test.images.max() <= 1
        return
    with pytest.raises(DataError, match=r"split 'test': expected images in 0 to 1, as those of split 'train' are"):
        split_roles(source, ("train",))


def test_prefixes_are_mixed(npz):
    x, _ = arrays(1000)
    roles = split_roles(npz(x=x, y=np.repeat(np.arange(5), 200)), None)
    assert np.bincount(roles.search.labels[:50], minlength=5).min() > 2


def test_same_seed_same_roles_other_seed_others(npz):
    one, two, three = (split_roles(npz(), ("train",), seed=seed) for seed in (3, 3, 4))
    assert one.fingerprints == two.fingerprints
    np.testing.assert_array_equal(one.test.images, two.test.images)
    assert one.fingerprints["test"] != three.fingerprints["test"]
    assert one.fingerprints["train"] == three.fingerprints["train"]  # all of the split, whatever the seed


def test_the_split_is_the_same_on_every_machine_and_version(npz):
    roles = split_roles(npz(), ("train",), seed=0)
    expected = [75, 40, 25, 56, 48, 93, 63, 99, 31, 59, 95, 53, 1, 74, 32, 16, 94, 47, 62, 97]
    assert roles.certify.indices.tolist() == expected


def test_fingerprint_is_of_the_stored_images_in_the_datasets_order(npz):
    plain = split_roles(npz(), ("train",))
    assert plain.fingerprints == split_roles(npz(), ("train",), mean=(0.3,), std=(2.0,)).fingerprints
    x, y = arrays(140)
    order = np.sort(plain.search.indices) + 40
    digest = hashlib.sha256(b"uint8 (4, 4, 3)" + x[order].tobytes() + y[order].astype("<i4").tobytes())
    assert plain.search.fingerprint == digest.hexdigest()
    x[order[0], 0, 0, 0] ^= 1
    changed = split_roles(npz(x_train=x[:40], y_train=y[:40], x_test=x[40:], y_test=y[40:]), ("train",)).fingerprints
    assert [role for role in ROLES if changed[role] != plain.fingerprints[role]] == ["search"]


@pytest.mark.parametrize(("fitted", "clean"), [(None, False), ((), True)])
def test_without_a_fitted_split_all_roles_come_from_everything(npz, fitted, clean):
    roles = split_roles(npz(), fitted)
    assert roles.clean is clean
    # Of the 28 images of each class half are for training; of the rest 0.4, 0.2, 0.4.
    assert sizes(roles) == [5 * n for n in (14, 6, 3, 5)]
    every = np.concatenate([getattr(roles, role).indices for role in ROLES])
    assert sorted(every) == list(range(140))
    assert roles.train.origin == ("train", "test")
    x, _ = arrays(140)
    np.testing.assert_allclose(roles.test.images, x[roles.test.indices] / 255, rtol=1e-6)


def test_clean_roles_may_come_from_several_splits(npz):
    x, y = arrays(100)
    source = npz(x_train=x[:40], y_train=y[:40], x_val=x[40:60], y_val=y[40:60], x_test=x[60:], y_test=y[60:])
    roles = split_roles(source, ("train",))
    assert roles.test.origin == ("val", "test")
    np.testing.assert_allclose(roles.test.images, x[40:][roles.test.indices] / 255, rtol=1e-6)
    assert split_roles(source, ("train", "val")).train.origin == ("train", "val")


def test_shares_are_as_asked(npz):
    shares = (0.1, 0.1, 0.5, 0.3)
    assert sizes(split_roles(npz(), (), shares=shares)) == [5 * n for n in (3, 3, 14, 8)]
    # Where train has a split of its own, the others share the rest as 1 : 5 : 3.
    roles = split_roles(npz(), ("train",), shares=shares)
    assert sizes(roles)[0] == sizes(split_roles(npz(), ("train",)))[0]
    assert sizes(roles)[1:] == [10, 55, 35]


def test_caps_shrink_one_role_and_change_no_other(npz):
    free, capped = (split_roles(npz(), ("train",), caps=caps) for caps in (None, {"train": 12, "search": 5}))
    assert sizes(capped) == [12, 5, 20, 40]
    assert np.bincount(capped.search.labels).tolist() == [1] * 5
    assert sorted(np.bincount(capped.train.labels)) == [2, 2, 2, 3, 3]
    for role in ("certify", "test"):
        assert free.fingerprints[role] == capped.fingerprints[role]
    assert set(capped.search.indices) < set(free.search.indices)


@pytest.mark.parametrize("total", [4, 5, 7, 100, 1001])
@pytest.mark.parametrize("weights", [(1, 1, 1, 1), (0.5, 0.2, 0.1, 0.2), (1e-6, 1, 1, 1), (1e-6, 1e-6, 1e-6, 1)])
def test_apportion_is_whole_positive_and_within_one(total, weights):
    got = np.array(_apportion(total, weights))
    quota = total * np.array(weights) / np.sum(weights)
    assert got.sum() == total
    assert got.min() >= 1
    if quota.min() >= 1:
        assert np.abs(got - quota).max() < 1


def test_grayscale_gets_a_channel(npz):
    x, y = arrays(40, 2, (6, 5))
    roles = split_roles(npz(x=x, y=y), None, input_shape=(6, 5, 1))
    assert roles.train.images.shape == (20, 6, 5, 1)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floating_point_images_are_taken_as_they_are(npz, dtype):
    x = np.linspace(-2, 3, 40 * 12).reshape(40, 2, 2, 3).astype(dtype)
    roles = split_roles(npz(x=x, y=np.arange(40)[:, None] % 2), None, mean=(1.0,), std=(2.0,))
    np.testing.assert_allclose(roles.train.images, (x[roles.train.indices] - 1.0) / 2, rtol=1e-3, atol=1e-3)


# What cannot serve. Each row: the arrays of an npz, the arguments of split_roles, what the error says.

X, Y = arrays(100)
BAD = {
    "labels too large": (
        {"x": X, "y": Y},
        {"num_classes": 4},
        r"split 'all': expected labels 0 to 3, since the model has 4 .*, got 4 at index 4 \(20 of 100",
    ),
    "images of words": (
        {"x": np.full((100, 4, 4, 3), "a"), "y": Y},
        {},
        "expected images of dtype uint8 .* convert them",
    ),
    "images of nothing": (
        {"x": np.zeros((100, 0, 4, 3)), "y": Y},
        {"input_shape": (4, 4, 3)},
        r"expected images \[4, 4, 3\], as the model takes them, got \[0, 4, 3\]",
    ),
    "labels negative": ({"x": X, "y": Y - 1}, {}, r"got -1 at index 0 \(20 of 100.*Labels start at 0: relabel"),
    "labels whole but floating": (
        {"x": X, "y": Y * 1.0},
        None,
        r"whole numbers, stored as floating-point ones: pass --task classification",
    ),
    "labels one-hot": (
        {"x": X, "y": np.eye(5, dtype=int)[Y]},
        None,
        r"rows with a single 1: pass --task classification if they are classes, or --task multilabel",
    ),
    "labels are dates": (
        {"x": X, "y": Y.astype("datetime64[D]")},
        {},
        r"one integer label per image, got datetime64",
    ),
    "another shape": (
        {"x": X, "y": Y},
        {"input_shape": (8, 8, 3)},
        r"expected images \[8, 8, 3\], as the model takes them, got \[4, 4, 3\]",
    ),
    "another number of channels": ({"x": X[..., 0], "y": Y}, {"input_shape": (4, 4, 3)}, r"got \[4, 4, 1\]"),
    "flat images": (
        {"x": X.reshape(100, -1), "y": Y},
        None,
        r"images x \[N, H, W, C\] or \[N, H, W\].*got \[100, 48\]",
    ),
    "whole-number pixels": (
        {"x": X.astype(int), "y": Y},
        {},
        r"uint8 \(0 to 255\) or floating point, got int64",
    ),
    "bytes as floats": (
        {"x": X * np.float32(1), "y": Y},
        {"mean": (0.5,), "std": (0.25,)},
        r"in 0 to 1, which are normalised .*, got values from \d+ to 2\d\d; store them as uint8, or divide by 255",
    ),
    "normalised already": (
        {"x": (X / 255 - 0.5) / 0.25, "y": Y},
        {"mean": (0.5,), "std": (0.25,)},
        r"got values from -\S+ to \S+; pass --mean 0 --std 1 if",
    ),
    "NaN": (
        {"x": np.where(np.arange(100)[:, None, None, None] == 7, np.nan, X), "y": Y},
        {},
        r"split 'all': .*NaN or infinity in image 7 \(1 of",
    ),
    "empty split": (
        {"x_train": X, "y_train": Y, "x_test": X[:0], "y_test": Y[:0]},
        {"fitted": ("train",)},
        r"nothing is left to judge it on",
    ),
    "empty fitted split": (
        {"x_train": X[:0], "y_train": Y[:0], "x_test": X, "y_test": Y},
        {"fitted": ("train",)},
        r"split 'train' is empty",
    ),
    "no images": ({"x": X[:0], "y": Y[:0]}, {}, r"has no images \(splits: \{'all': 0\}\)"),
    "unknown fitted split": (
        {"x": X, "y": Y},
        {"fitted": ("train",)},
        r"no split 'train'.*the dataset has all \(100\).*--fitted-split none if",
    ),
    "nothing clean": (
        {"x": X, "y": Y},
        {"fitted": ("all",)},
        r"fitted on every split there is \(all \(100\)\)",
    ),
    "too few of a class": (
        {"x": X[:13], "y": np.repeat(np.arange(4), (4, 4, 2, 3))},
        {},
        r"class '2' has 2 images in all, expected at least one for each of train, search, certify",
    ),
    "cap too small": ({"x": X, "y": Y}, {"caps": {"search": 4}}, r"cap on search of at least 5, .*got 4"),
    "cap of no role": ({"x": X, "y": Y}, {"caps": {"val": 4}}, r"expected caps .*got \{'val': 4\}"),
    "shares": ({"x": X, "y": Y}, {"shares": (0.5, 0.5, 0.5, 0.5)}, r"--shares above 0 .* sum 1, got 0.5 0.5 0.5 0.5"),
    "three shares": ({"x": X, "y": Y}, {"shares": (0.5, 0.25, 0.25)}, r"--shares above 0 of train, search"),
    "not a number": ({"x": X, "y": Y}, {"shares": (float("nan"), 0.25, 0.25, 0.25)}, r"--shares above 0"),
    "seed": ({"x": X, "y": Y}, {"seed": -1}, r"seed of at least 0, got -1"),
    "mean": (
        {"x": X, "y": Y},
        {"mean": (0.5, 0.5)},
        r"--mean and --std of 1 or 3 finite numbers.*\[0.5, 0.5\]",
    ),
    "std": ({"x": X, "y": Y}, {"std": (0.0,)}, r"--std above 0"),
    "lengths differ": ({"x": X, "y": Y[:-1]}, None, r"got \[100, 4, 4, 3\] and \[99\]"),
    "labels missing": ({"x_train": X, "y_train": Y, "x_test": X}, None, r"missing: y_test"),
    "names unknown": ({"images": X, "labels": Y}, None, r"expected arrays x_train, .*got images, labels"),
    "pickled": (
        {"x": X, "y": np.array([{}] * 100, dtype=object)},
        None,
        r"cannot be read as npz \(ValueError: Object arrays cannot be loaded when allow_pickle=False\); write it",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_refused_with_a_reason(npz, case):
    named, arguments, match = BAD[case]
    if arguments is None:  # it does not even open
        with pytest.raises(DataError, match=match) as caught:
            npz(**named)
    else:
        source = npz(**named)
        with pytest.raises(DataError, match=match) as caught:
            split_roles(source, **{"fitted": None, **arguments})
    assert isinstance(caught.value, TreesurgeonError)
    assert "data.npz" in str(caught.value)
    assert len(str(caught.value).splitlines()) < 25


def test_images_of_several_shapes_are_refused():
    ragged = {"a": np.zeros((4, 4, 3), np.uint8), "b": np.zeros((5, 4, 3), np.uint8)}
    source = dataclasses.replace(
        _plain_source(), read_images=lambda split, indices: np.repeat(ragged[split][None], len(indices), 0)
    )
    with pytest.raises(DataError, match=r"split 'b': expected images \[4, 4, 3\].*got \[5, 4, 3\]"):
        split_roles(source, None)


def _plain_source():
    from treesurgeon.search.data import Source

    return Source("plain", {"a": 10, "b": 10}, ("0",), lambda split: np.zeros(10, int), lambda s, i: X[i])


def test_damaged_npz(tmp_path, npz):
    npz()
    path = tmp_path / "data.npz"
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"not a zip", whole[:200] + b"\xff" * 400 + whole[600:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"cannot be read as npz .*np\.savez\(path, x_train="):
            open_source(f"npz:{path}")
    np.save(tmp_path / "one.npy", X)
    with pytest.raises(DataError, match=r"a single \.npy array"):
        open_source(f"npz:{tmp_path}/one.npy")
    with pytest.raises(DataError, match=r"got no such file: .*absent\.npz"):
        open_source(f"npz:{tmp_path}/absent.npz")


@pytest.mark.parametrize("spec", ["", "mnist", "tfds:", "http://x", "npz", "digits:3"])
def test_unknown_specs(spec):
    with pytest.raises(DataError, match=r"expected digits, tfds:NAME, tfds-dir:PATH, npz:PATH or folder:PATH"):
        open_source(spec)


def test_a_dataset_that_is_not_prepared_is_an_error_at_once(digits_dir, tmp_path):
    start = time.monotonic()
    with pytest.raises(DataError, match=r"(?s)holds scikit_digits.*tfds build mnist --file_format=array_record"):
        open_source("tfds:mnist", digits_dir)
    with pytest.raises(DataError, match=r"holds no dataset"):
        open_source("tfds:mnist:3.0.1", tmp_path / "nothing")
    assert time.monotonic() - start < 5
    with pytest.raises(DataError, match=r"one without it at .*did you mean .*scikit_digits/1\.0\.0\?"):
        open_source(f"tfds-dir:{digits_dir}")
    with pytest.raises(DataError, match=r"got no such directory"):
        open_source(f"tfds-dir:{tmp_path}/nothing")


def test_versions_and_configs_are_found(digits_dir, tmp_path):
    prepared = digits_dir / "scikit_digits/1.0.0"
    for version in ("9.0.0", "10.0.0"):
        shutil.copytree(prepared, tmp_path / "scikit_digits" / version)
        info = json.loads((prepared / "dataset_info.json").read_text()) | {
            "description": version,
            "version": version,
        }
        (tmp_path / "scikit_digits" / version / "dataset_info.json").write_text(json.dumps(info))
    shutil.copytree(prepared, tmp_path / "with_config/small/1.0.0")
    from treesurgeon.search.sources import _find_prepared

    assert _find_prepared("", "scikit_digits", tmp_path).name == "10.0.0"
    assert _find_prepared("", "scikit_digits:9.0.0", tmp_path).name == "9.0.0"
    assert _find_prepared("", "with_config/small", tmp_path).name == "1.0.0"
    with pytest.raises(DataError, match=r"name a config, one of tfds:with_config/small"):
        open_source("tfds:with_config", tmp_path)


def test_damaged_tfds_directories(digits_dir, tmp_path):
    prepared = digits_dir / "scikit_digits/1.0.0"
    info = json.loads((prepared / "dataset_info.json").read_text())

    shutil.copytree(prepared, tmp_path / "a/1.0.0")
    (tmp_path / "a/1.0.0/dataset_info.json").write_text("{")
    with pytest.raises(DataError, match=r"a/1\.0\.0 cannot be opened \(.*prepare it again"):
        open_source(f"tfds-dir:{tmp_path}/a/1.0.0")

    shutil.copytree(prepared, tmp_path / "b/1.0.0")
    (tmp_path / "b/1.0.0/dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    with pytest.raises(DataError, match=r"(?s)got tfrecord; run\n.*tfds convert_format --dataset_dir="):
        open_source(f"tfds-dir:{tmp_path}/b/1.0.0")

    shutil.copytree(prepared, tmp_path / "c/1.0.0")
    for shard in (tmp_path / "c/1.0.0").glob("*test.array_record*"):
        shard.write_bytes(b"\x00" * 100)
    source = open_source(f"tfds-dir:{tmp_path}/c/1.0.0")
    with pytest.raises(DataError, match=r"records 0 to 718 of split 'test' cannot be read \("):
        split_roles(source, ("train",))


@pytest.mark.skipif(not CIFAR.exists(), reason="needs the shared CIFAR data")
def test_cifar_by_directory():
    import tensorflow_datasets as tfds

    source = open_source(f"tfds-dir:{CIFAR}")
    assert source.splits == {"train": 50_000, "test": 5_000}
    assert source.label_names[:2] == ("airplane", "automobile")
    # Everything from `test`, which is quick to read; the checkpoint of another model, say.
    source = dataclasses.replace(source, splits={"test": 5_000})
    caps = {"train": 100, "search": 60, "certify": 10, "test": 10}
    roles = split_roles(source, (), caps=caps, input_shape=(32, 32, 3), num_classes=10)
    assert sizes(roles) == [100, 60, 10, 10]
    assert np.bincount(roles.search.labels).tolist() == [6] * 10
    records = tfds.builder_from_directory(CIFAR).as_data_source("test")
    first = records[int(roles.search.indices[0])]
    assert first["label"] == roles.search.labels[0]
    np.testing.assert_allclose(roles.search.images[0], first["image"] / 255, rtol=1e-6)


def test_other_data_than_a_runs_is_named(npz):
    """A selected model's manifest says where its images came from."""
    source = npz(x=X, y=Y)
    manifest = {
        "data": {"fitted": ["train"], "spec": "digits"},
        "model": {"input_shape": [4, 4, 3]},
        "normalisation": {"mean": [0.0], "std": [1.0]},
        "labels": list("01234"),
    }
    with pytest.raises(DataError, match=r"no split 'train', which the run on digits took .*has all: pass the same"):
        images_again(manifest, "test", source.spec, "")
