"""Where a search runs: devices, hosts, workers. Nothing of this changes what it finds, or is part of what it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from treesurgeon.search.config import RunError

Shard = Literal["auto", "always", "never"]


@dataclass(frozen=True)
class Pool:
    """The machines of a search. By default all devices of this one."""

    mesh: str = ""
    """CxD: devices along candidates times devices along batches of images. Default: the fastest for all there are."""
    shard: Shard = "auto"
    """Whether the model is split over the devices of the mesh while candidates are scored, each layer gathered when it
    is needed; otherwise each has a copy. Default: where copies do not fit."""
    distributed: bool = False
    """Run on several hosts, or as several processes: the same command is started on each. --out has to be a directory
    that all of them see."""
    coordinator: str | None = None
    """HOST:PORT of process 0. Default, with the next two: as SLURM, a TPU pod or Open MPI says."""
    processes: int | None = None
    """How many processes there are."""
    process: int | None = None
    """Which of them this is, from 0."""
    ray: str = ""
    """Score candidates and fine-tune finalists on workers of a Ray cluster, which may come and go: its address, `auto`,
    or `local` for one on this machine. Needs treesurgeon[ray]."""
    workers: int | None = None
    """Ray workers. Default: one for each GPU of the cluster, or where there are none for each two CPUs."""

    memory_images: float | None = None
    """GiB of images of a role (float32) that are held in memory. Of larger ones images are read and decoded as they are
    needed, by processes of their own, from tfds:, tfds-dir: and folder: data. Default: a sixteenth of the memory."""

    @property
    def hold(self) -> int | None:
        """The same in bytes."""
        return None if self.memory_images is None else int(self.memory_images * 2**30)

    def check(self) -> None:
        """Refuse what does not go together."""
        if self.ray and (self.distributed or self.mesh):
            raise RunError("--ray goes with neither --distributed nor --mesh: each of its workers has one device")
        if self.shard not in get_args(Shard):
            raise RunError(f"--shard {self.shard}: expected one of {', '.join(get_args(Shard))}")
        if self.ray and self.shard == "always":
            raise RunError("--shard always does not go with --ray: each of its workers has one device")
        if not self.distributed and (self.coordinator, self.processes, self.process) != (None, None, None):
            raise RunError("--coordinator, --processes and --process are for --distributed: add it")
        if self.memory_images is not None and not self.memory_images >= 0:
            raise RunError(f"--memory-images {self.memory_images}: expected GiB, 0 or more")
        if self.workers is not None and (not self.ray or self.workers < 1):
            raise RunError(f"--workers {self.workers}: expected 1 or more, with --ray")
