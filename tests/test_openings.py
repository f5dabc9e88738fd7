"""The register of opened images: whole splits, overlaps, resumed runs, and records from before there were digests."""

import json

import numpy as np

from treesurgeon.search import open_source, openings, split_roles
from treesurgeon.search.certificate import Certificate, Step
from treesurgeon.search.conclusion import _outcome
from treesurgeon.search.openings import Opened, claim_opening, opened_before, opened_elsewhere, record_opening
from treesurgeon.search.selection import Finalist, Verdict


def test_certify_is_opened_once(tmp_path):
    register = tmp_path / "runs/openings.jsonl"
    assert claim_opening(register, "abc", "1", "one", [1, 2]) is None
    assert claim_opening(register, "abc", "1", "one", [1, 2]) is None  # resumed
    assert claim_opening(register, "abc", "2", "two", [1, 2]) == Opened(("one",), 2, 2)
    assert claim_opening(register, "def", "2", "two", [3, 4]) is None
    assert [json.loads(line)["certify"] for line in register.read_text().splitlines()] == ["abc", "def"]


def test_overlaps_are_found_and_counted(tmp_path):
    register = tmp_path / "openings.jsonl"
    large = 2**64 - 1
    assert claim_opening(register, "a", "1", "one", [5, large, 7]) is None
    assert claim_opening(register, "b", "2", "two", [8, 9]) is None
    found = claim_opening(register, "c", "3", "three", [large, 1, 2, 9])
    assert found == Opened(("one", "two"), 2, 4)
    assert str(found) == "2 of these 4 images were opened before, by one and two"
    assert len(register.read_text().splitlines()) == 2  # what was refused was not opened
    assert claim_opening(register, "d", "1", "one", [5, 6]) is None  # its own images


def test_what_is_recorded_all_the_same_counts(tmp_path):
    register = tmp_path / "openings.jsonl"
    record_opening(register, "a", "1", "one", [1])
    record_opening(register, "b", "2", "two", [1, 2])
    record_opening(register, "b", "2", "two", [1, 2])
    assert len(register.read_text().splitlines()) == 2
    assert opened_before(register, "c", "3", [2, 3]) == Opened(("two",), 1, 2)


def test_of_two_runs_at_the_same_moment_the_first_one_claims(tmp_path, monkeypatch):
    """Another one records between the look and the record of this one."""
    register, calls = tmp_path / "openings.jsonl", []

    def slow(*given):
        if not calls:
            calls.append(given)
            record_opening(register, "b", "2", "two", [2, 3])
        record_opening(*given)

    monkeypatch.setattr(openings, "record_opening", slow)
    for _ in range(2):  # repeated as well
        assert claim_opening(register, "a", "1", "one", [1, 2]) == Opened(("two",), 1, 2)
    assert claim_opening(register, "b", "2", "two", [2, 3]) is None


def test_that_dense_stays_is_no_certified_claim():
    verdict = Verdict(Finalist("dense", {}, 0.1, 0.1), True, {}, "")
    for name, passed in (("dense", False), ("v1", True)):
        step = Step("v1", 1, 0, 0.1, (0.01, 0.02), (0.5, 0.5), passed)
        found = _outcome(verdict, Certificate(True, name, True, (step,), 10, 0.05, ""), False)
        assert (found["passed"], found["certified"]) == (True, passed)


def test_what_others_opened_is_known_before_anything_is_tested(tmp_path):
    register = tmp_path / "openings.jsonl"
    assert opened_elsewhere(register, "a", "one", [1, 2]) is None
    record_opening(register, "a", "1", "one", [1, 2])
    assert opened_elsewhere(register, "a", "one", [1, 2]) is None  # itself
    assert opened_elsewhere(register, "b", "two", [2, 3]) == Opened(("one",), 1, 2)


def test_old_records_are_known_by_their_fingerprint(tmp_path):
    register = tmp_path / "openings.jsonl"
    register.write_text(json.dumps({"certify": "abc", "run": "1", "where": "old"}) + "\n")
    found = claim_opening(register, "abc", "2", "new", [1, 2, 3])
    assert str(found) == "these images were opened before, by old"
    assert claim_opening(register, "abc", "1", "old", [1, 2, 3]) is None
    assert claim_opening(register, "def", "2", "new", [1, 2, 3]) is None


def test_digests_are_those_of_the_images_whatever_the_seed_and_the_normalisation(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (300, 4, 4, 1), np.uint8), np.arange(300) % 3
    np.savez(tmp_path / "a.npz", x_train=x[:240], y_train=y[:240], x_test=x[240:], y_test=y[240:])
    source = open_source(f"npz:{tmp_path / 'a.npz'}")
    roles = [split_roles(source, ("train",), seed=seed, mean=(mean,)) for seed, mean in ((0, 0.0), (1, 0.5))]
    by_image = {}
    for split in (part for r in roles for part in (r.train, r.search, r.certify, r.test)):
        assert len(split.digests) == len(split)
        for origin, index, digest in zip([split.origin] * len(split), split.indices, split.digests, strict=True):
            at = int(index) if origin == ("train",) else 240 + int(index)
            assert by_image.setdefault(at, digest) == digest
    assert len(set(by_image.values())) == len(by_image) == 300
