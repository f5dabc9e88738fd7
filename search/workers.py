"""An elastic pool: Ray workers score candidates and fine-tune finalists, the driver holds the search.

A worker has the model, the data and the compiled programs, and nothing of the search's state, so that any of them can
do any piece of work, again if need be: one that dies is replaced, and what it was at is done by another. Work is cut
into the pieces that one device would do one after the other, and every result is put where it would have been: neither
the number of workers nor the order in which they finish, nor their death, changes a bit. Where the devices of workers
are not of one kind, results depend on who did what.

P. Moritz et al.: "Ray: a distributed framework for emerging AI applications", OSDI 2018.
"""

from __future__ import annotations

import importlib
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import numpy as np

from treesurgeon.engine import TreesurgeonError
from treesurgeon.engine.errors import first_line
from treesurgeon.models.errors import ModelError
from treesurgeon.search.chunking import chunks
from treesurgeon.search.config import RunError
from treesurgeon.search.evaluate import Evaluator, Keep, race
from treesurgeon.search.finalists import Pick, Refined, appraise, refine
from treesurgeon.search.hosts import versions
from treesurgeon.search.setting import Setting
from treesurgeon.search.subject import Subject
from treesurgeon.search.sweep import Part, Sweep

PATIENCE = 60  # seconds without a worker before the driver says so
LATE, LATE_SECONDS = 3, 5  # a piece that takes so many times as long as most, and so long, is done twice
DEATHS = 5  # in a row, besides one for each worker, without a result in between, before it gives up
START, LOST = -1, object()


@dataclass(frozen=True)
class Job:
    """A piece of work: a worker's method and its arguments."""

    method: str
    given: tuple[Any, ...]


@dataclass(frozen=True)
class Given:
    """A piece of work that a worker is at."""

    worker: Any
    round: int
    number: int
    result: Any
    since: float


class Worker:
    """What runs on a Ray worker: one device, with all that a piece of work needs."""

    def __init__(
        self,
        setting: Setting,
        subject: Sequence[Any],
        evaluator: Callable[[Setting], Evaluator],
        sweep: Callable[[Setting], Sweep],
    ):
        spec, variables, classes, momenta = subject
        module, variables = spec.build(allow_import=True), jax.tree.map(jax.numpy.asarray, variables)
        opened = Subject(spec, module, variables, classes, momenta)
        self._setting = replace(setting, subject=opened)
        self._make_evaluator, self._make_sweep = evaluator, sweep

    @cached_property
    def _evaluator(self) -> Evaluator:
        return self._make_evaluator(self._setting)

    @cached_property
    def _sweep(self) -> Sweep:
        return self._make_sweep(self._setting)

    def versions(self) -> dict[str, str]:
        """Of what results depend on."""
        return versions()

    def calibrate(self, masks: Any) -> tuple[int, Any]:
        """How often programs were compiled, and what a piece of candidates needs besides its masks."""
        found = jax.tree.map(np.asarray, self._evaluator.calibrated(masks))
        return self._evaluator.compiled, found

    def score(self, masks: Any, b: int, factors: np.ndarray, where: list[tuple[int, int]], *extras: Any) -> Any:
        """A piece of candidates on one batch.

        Args:
            masks: theirs, stacked.
            b: the batch.
            factors: one for each, see `evaluate.race`.
            where: for each, which of the extras is its own, and which row of it.
            extras: what `calibrate` returned for whole pieces.
        """
        rows = [jax.tree.map(lambda leaf, row=row: leaf[row], extras[piece]) for piece, row in where]
        extra = jax.tree.map(lambda *each: np.stack(each), *rows) if rows else ({}, {})
        found = self._evaluator.show(masks, extra, b, factors)
        return self._evaluator.compiled, found

    def sweep(self, part: int, leaves: list[np.ndarray]) -> np.ndarray:
        """The logits of a piece of changes; the leaves' first row is what they are changes of."""
        rows = np.arange(1, len(leaves[0]))
        return self._sweep.answers(self._sweep.parts[part], leaves, [rows])[0]

    def appraise(self, pick: Pick, epochs: int) -> float:
        """The loss of a candidate for the finalists; see `finalists.appraise`."""
        return appraise(self._setting, pick, epochs)[0]

    def refine(self, name: str, pick: Pick, measured: Mapping[str, float]) -> Refined:
        """A finalist; see `finalists.refine`."""
        return refine(self._setting, name, pick, measured)


class Crew:
    """The workers, as the driver sees them."""

    def __init__(self, address: str, count: int | None, say: Callable[[str], None]):
        """Join the cluster; workers are hired by `hire`.

        Raises:
            RunError: Ray is not installed, or the cluster is not there.
        """
        self.ray, self._say = _ray(), say
        if not self.ray.is_initialized():
            where = {"include_dashboard": False} if address == "local" else {"address": address}
            try:
                host, _, port = address.rpartition(":")
                if host and "/" not in host:  # Ray itself tries for many minutes
                    socket.create_connection((host, int(port)), timeout=10).close()
                self.ray.init(log_to_driver=False, **where)
            except Exception as error:
                raise RunError(
                    f"--ray {address}: no cluster there, or it did not start ({first_line(error)})"
                ) from error
        room = self.ray.cluster_resources()
        self._needs = {"num_gpus": 1, "num_cpus": 1} if room.get("GPU") else {"num_cpus": 1}
        self.count = count or int(room.get("GPU") or max(room.get("CPU", 1) // 2, 1))
        self._hired: Callable[[], Any] | None = None
        self._idle: deque[Any] = deque()
        self._busy: dict[Any, Given] = {}  # by what will be its outcome
        self._starting = self._round = self._deaths = 0
        self.died = self.redone = 0

    def hire(
        self, setting: Setting, evaluator: Callable[[Setting], Evaluator], sweep: Callable[[Setting], Sweep]
    ) -> None:
        """Start the workers; each gets the model and the data once.

        Args:
            setting: the run's.
            evaluator, sweep: how to make them of a setting.
        """
        subject, ray = setting.subject, self.ray
        model = (subject.spec, jax.tree.map(np.asarray, subject.variables), subject.num_classes, dict(subject.momenta))
        bare = replace(
            setting, subject=None, original=None
        )  # a module's functions cannot always be sent: it is built there
        given = [ray.put(each) for each in (bare, model, evaluator, sweep)]
        settings = {k: v for k, v in os.environ.items() if k.startswith("JAX_") or k in ("XLA_FLAGS", "PYTHONPATH")}
        kind = ray.remote(**self._needs)(Worker).options(runtime_env={"env_vars": settings})
        self._hired = lambda: kind.remote(*given)
        for _ in range(self.count):
            self._replace()

    def done(self, jobs: Sequence[Job], fetch: bool = True) -> Iterator[Any]:
        """The results of jobs, in their order, whoever does them.

        Where workers have nothing left to do and one is late, another one does the same: what comes first counts.

        Args:
            jobs: what to do.
            fetch: whether to bring results here; otherwise they are pairs, of which the second stays where it is, and
                what comes is a reference to it.
        """
        self._round += 1
        waiting, results, at = deque(range(len(jobs))), {}, 0
        missing, took = set(waiting), []
        while at < len(jobs):
            waiting += self._late(missing - set(waiting), took)
            while waiting and self._idle:
                number = waiting.popleft()
                if number not in missing:  # it was late, and has come after all
                    continue
                job, worker = jobs[number], self._idle.popleft()
                method = getattr(worker, job.method)
                sent = [method.remote(*job.given)] if fetch else method.options(num_returns=2).remote(*job.given)
                self._busy[sent[0]] = Given(worker, self._round, number, sent[-1], time.monotonic())
            patience = LATE_SECONDS if self._idle else PATIENCE
            ready, _ = self.ray.wait(list(self._busy), timeout=patience, fetch_local=False)
            if not ready and not self._idle and len(self._busy) == self._starting:
                self._say("waiting for a Ray worker: the cluster has no room for one yet, or it takes long to start")
            for outcome in ready:
                given = self._busy.pop(outcome)
                self._starting -= given.number == START
                try:
                    value = self._result(outcome)
                except self.ray.exceptions.ObjectLostError:  # what it was given; the worker itself is fine
                    self._idle.append(given.worker)
                    raise
                wanted = given.round == self._round and given.number in missing  # else given up, or done twice
                if value is LOST:
                    if wanted and given.number not in waiting:
                        waiting.appendleft(given.number)
                    continue
                self._idle.append(given.worker)
                if given.number == START:
                    self._check(value)
                elif wanted:
                    results[given.number] = value if fetch else given.result
                    missing.discard(given.number)
                    took.append(time.monotonic() - given.since)
            while at in results:
                yield results.pop(at)
                at += 1

    def _late(self, missing: set[int], took: Sequence[float]) -> list[int]:
        """Pieces of this round that a worker is late with: idle ones should do them as well."""
        if not self._idle or not took:
            return []
        longest = max(LATE * float(np.median(took)), LATE_SECONDS)
        since: dict[int, float] = {}  # the latest time, so that what was given away again is given time again
        for given in self._busy.values():
            if given.round == self._round and given.number in missing:
                since[given.number] = max(given.since, since.get(given.number, 0))
        late = [number for number, start in since.items() if time.monotonic() - start > longest][: len(self._idle)]
        if late:
            self.redone += len(late)
            self._say("a Ray worker is much slower than the others; what it is at is done by another one as well")
        return late

    def _result(self, outcome: Any) -> Any:
        """What a worker returned, or LOST if it died: then another one takes its place."""
        errors = self.ray.exceptions
        try:
            value = self.ray.get(outcome)
        except errors.RayTaskError as error:
            if isinstance(error.cause, errors.ObjectLostError):
                raise error.cause from error
            if isinstance(error.cause, TreesurgeonError | ModelError):
                raise RunError(f"a Ray worker: {error.cause}") from error
            raise
        except errors.RayActorError as error:
            self.died += 1
            self._deaths += 1
            if self._deaths > DEATHS + self.count:
                raise RunError(f"Ray workers keep dying: {str(error).strip().splitlines()[-1][:300]}") from error
            self._say("a Ray worker died; it is replaced, and its work done again")
            self._replace()
            return LOST
        self._deaths = 0
        return value

    def _replace(self) -> None:
        assert self._hired
        worker = self._hired()
        self._starting += 1
        self._busy[worker.versions.remote()] = Given(worker, 0, START, None, time.monotonic())

    def _check(self, theirs: Mapping[str, str]) -> None:
        ours = versions()
        skip = ("device", "devices of a process")  # the driver may well have none of the devices that do the work
        differ = [
            f"{name}: here {mine}, there {theirs[name]}"
            for name, mine in ours.items()
            if name not in skip and mine != theirs[name]
        ]
        if differ:
            raise RunError(f"Ray workers have other versions ({'; '.join(differ)}): install the same ones there")


class RemoteEvaluator:
    """`Evaluator`'s interface, the work being done by a crew."""

    def __init__(self, crew: Crew, data: Any, chunk: int):
        self.crew, self.data, self.chunk = crew, data, chunk
        self.count = int(np.asarray(data.weights).sum())
        self.compiled = 0  # by the worker that compiled most often

    def __call__(
        self, masks: Any, keep: Keep | None = None, limit: int | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As `Evaluator.__call__`."""
        masks = jax.tree.map(np.asarray, masks)
        total = len(jax.tree.leaves(masks)[0])

        def rows(at: np.ndarray) -> Any:
            return jax.tree.map(lambda leaf: leaf[at], masks)

        pieces = [Job("calibrate", (rows(at),)) for at in chunks(np.arange(total), self.chunk)]
        while True:
            extras = list(self.crew.done(pieces, fetch=False))
            try:
                return self._race(rows, total, extras, keep, limit)
            except self.crew.ray.exceptions.ObjectLostError:  # with the machine that it was on: the same again
                continue

    def _race(
        self, rows: Callable[[np.ndarray], Any], total: int, extras: list[Any], keep: Keep | None, limit: int | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:

        def score(pieces: list[np.ndarray], b: int, factors: np.ndarray) -> Iterator[Any]:
            jobs = []
            for at in pieces:
                own = sorted({int(row) // self.chunk for row in at})
                where = [(own.index(int(row) // self.chunk), int(row) % self.chunk) for row in at]
                jobs.append(Job("score", (rows(at), b, factors[at], where, *(extras[i] for i in own))))
            for compiled, found in self.crew.done(jobs):
                self.compiled = max(self.compiled, compiled)
                yield found

        return race(score, total, np.asarray(self.data.weights), self.chunk, 1, keep, limit)


class RemoteSweep(Sweep):
    """A sweep whose answers a crew computes."""

    def __init__(self, crew: Crew, *given: Any, **options: Any):
        super().__init__(*given, **options)
        self.crew = crew

    def answers(self, part: Part, leaves: list[np.ndarray], pieces: list[np.ndarray]) -> list[np.ndarray]:
        """As `Sweep.answers`."""
        number = self.parts.index(part)
        start = np.zeros(1, int)
        jobs = [Job("sweep", (number, [leaf[np.concatenate([start, at])] for leaf in leaves])) for at in pieces]
        return list(self.crew.done(jobs))


def _ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise RunError("--ray needs the package ray: pip install 'treesurgeon[ray]'") from error
