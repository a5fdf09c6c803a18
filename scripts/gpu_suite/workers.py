"""Runs work in separate processes, so that kernels compile in parallel and a crash affects only one process."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

import torch

Job = TypeVar("Job")
Result = TypeVar("Result")

MOST_PROCESSES = 12


def in_processes(
    work: Callable[[Job], Result],
    jobs: Sequence[Job],
    failed: Callable[[Job, Exception], Result],
    device: torch.device,
    most: int = MOST_PROCESSES,
    seconds: float = float("inf"),
) -> Iterator[Result]:
    """Return ``work`` of every job, in order; ``failed`` if a job raised, its process died, or it took too long.

    A process takes one job: an illegal access breaks everything that its process does with the device later.
    On a CPU the jobs run in this process, because a dry run gains nothing from others.
    """
    if device.type == "cpu":
        for job in jobs:
            try:
                yield work(job)
            except Exception as error:
                yield failed(job, error)
        return
    pool = _Pool(work, jobs, failed, min(most, len(jobs), os.cpu_count() or 1), time.monotonic() + seconds)
    try:
        yield from pool.results()
    finally:
        pool.kill()


class _Pool(Generic[Job, Result]):
    def __init__(
        self,
        work: Callable[[Job], Result],
        jobs: Sequence[Job],
        failed: Callable[[Job, Exception], Result],
        most: int,
        deadline: float,
    ) -> None:
        self._work, self._jobs, self._failed, self._most, self._deadline = work, jobs, failed, most, deadline
        self._running: dict[Connection, tuple[int, BaseProcess]] = {}
        self._done: dict[int, Result] = {}
        self._started = 0

    def results(self) -> Iterator[Result]:
        for index in range(len(self._jobs)):
            while index not in self._done:
                self._advance()
            yield self._done.pop(index)

    def kill(self) -> None:
        for _, process in self._running.values():
            process.kill()

    def _advance(self) -> None:
        """Start as many jobs as allowed, and wait for a process to end."""
        left = self._deadline - time.monotonic()
        while left > 0 and self._started < len(self._jobs) and len(self._running) < self._most:
            self._start(self._started)
            self._started += 1
        ready = wait(list(self._running), timeout=None if left == float("inf") else max(left, 0)) if left > 0 else []
        for connection in ready:
            assert isinstance(connection, Connection)
            index, process = self._running.pop(connection)
            self._done[index] = self._received(index, connection, process)
        if not ready:
            self._give_up()

    def _start(self, index: int) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_serve, args=(theirs, self._work, self._jobs[index]), daemon=True)
        process.start()
        theirs.close()  # else the end of the process would not be seen
        self._running[ours] = index, process

    def _received(self, index: int, connection: Connection, process: BaseProcess) -> Result:
        try:
            succeeded, value = connection.recv()
        except EOFError:
            process.join()
            succeeded, value = False, f"its process ended with exit code {process.exitcode}"
        if succeeded:
            result: Result = value
            return result
        return self._failed(self._jobs[index], RuntimeError(value))

    def _give_up(self) -> None:
        self.kill()
        self._running.clear()
        for index in range(len(self._jobs)):
            self._done.setdefault(index, self._failed(self._jobs[index], TimeoutError("the time was up")))


def _serve(connection: Connection, work: Callable[[Any], object], job: object) -> None:
    try:
        answer = True, work(job)
    except Exception as error:
        answer = False, f"{type(error).__name__}: {error}"
    connection.send(answer)
