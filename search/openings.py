"""The register of `certify` images that were opened: a claim from images that were looked at before does not hold.

`certify-openings.jsonl` lies beside the runs of a directory, one JSON record for each run that opened images: the
fingerprint of the whole split, the run, where it is, and 8 bytes for each image, so that another split that overlaps
with it (another seed, another cut of the data) is found as well. Records without these bytes, from before there were
any, are known by their fingerprint alone.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from treesurgeon.search.config import RunError

REGISTER = "certify-openings.jsonl"


@dataclass(frozen=True)
class Opened:
    """Images that other runs opened before.

    Attributes:
        where: the directories of those runs.
        shared: how many of the images.
        count: of how many.
    """

    where: tuple[str, ...]
    shared: int
    count: int

    def __str__(self) -> str:
        runs = " and ".join(self.where)
        if self.shared == self.count:
            return f"these images were opened before, by {runs}"
        return f"{self.shared:,} of these {self.count:,} images were opened before, by {runs}"


def claim_opening(
    register: Path, fingerprint: str, identity: str, where: str, digests: Iterable[int] = ()
) -> Opened | None:
    """Record that a run opens these images; or what other runs have opened of them, and then nothing is recorded.

    Args:
        register: the file.
        fingerprint: of the images and labels.
        identity: of the run and what it tests: one that is resumed, or repeated with the same finalists, may open again
            what it has opened.
        where: its directory.
        digests: of each image, see `data.Split`.
    """
    digests = list(digests)
    before = opened_before(register, fingerprint, identity, digests)
    if before is None:
        record_opening(register, fingerprint, identity, where, digests)
        before = opened_before(register, fingerprint, identity, digests)  # another run may have come in between
    return before


def opened_before(register: Path, fingerprint: str, identity: str, digests: Iterable[int] = ()) -> Opened | None:
    """What other runs have opened of these images; None if nothing, or if this run opened them first."""
    records = _read(register)
    own = (i for i, record in enumerate(records) if record["certify"] == fingerprint and record["run"] == identity)
    earlier = records[: next(own, len(records))]
    return _shared([record for record in earlier if record["run"] != identity], fingerprint, digests)


def opened_elsewhere(register: Path, fingerprint: str, where: str, digests: Iterable[int] = ()) -> Opened | None:
    """What runs in other directories have opened of these images, before it is known what this one will test."""
    return _shared([record for record in _read(register) if record["where"] != where], fingerprint, digests)


def _shared(records: Iterable[Mapping[str, Any]], fingerprint: str, digests: Iterable[int]) -> Opened | None:
    ours = np.fromiter(digests, np.uint64)
    seen, where = np.zeros(len(ours), bool), []
    for record in records:
        same = np.full(len(ours), True) if record["certify"] == fingerprint else np.isin(ours, _digests(record))
        if record["certify"] == fingerprint or same.any():
            seen |= same
            where.append(str(record["where"]))
    return Opened(tuple(dict.fromkeys(where)), int(seen.sum()), len(ours)) if where else None


def record_opening(register: Path, fingerprint: str, identity: str, where: str, digests: Iterable[int] = ()) -> None:
    """Record that a run opens these images, whoever opened them before; once for each run."""
    if any(record["certify"] == fingerprint and record["run"] == identity for record in _read(register)):
        return
    packed = base64.b64encode(np.sort(np.fromiter(digests, np.uint64)).astype("<u8").tobytes()).decode()
    register.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"certify": fingerprint, "run": identity, "where": where, "images": packed}) + "\n"
    with register.open("ab", buffering=0) as file:  # whole lines, in one order for all who write
        file.write(line.encode())


def _read(register: Path) -> list[dict[str, Any]]:
    if not register.exists():
        return []
    try:
        records = [json.loads(line) for line in register.read_text().splitlines()]
        for record in records:
            _ = (record["certify"], record["run"], record["where"], _digests(record))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{register}, the register of images that were opened, cannot be read ({error!r}): bring back a copy of "
            "it; without it no run beside it can be certified"
        ) from error
    return records


def _digests(record: Mapping[str, Any]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(record.get("images", "")), "<u8")
