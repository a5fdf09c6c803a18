"""Work in processes of its own: kernels compile side by side, and a crash of the device's context stays there."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

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
) -> Iterator[Result]:
    """``work`` of every job, in order; ``failed`` for a job that raised or whose process died.

    In this process where the device is a CPU: a dry run has nothing to gain from others.
    """
    if device.type == "cpu":
        for job in jobs:
            try:
                yield work(job)
            except Exception as error:
                yield failed(job, error)
        return
    count = min(most, len(jobs), os.cpu_count() or 1)
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(work, job) for job in jobs]
        for job, future in zip(jobs, futures, strict=True):
            try:
                yield future.result()
            except Exception as error:
                yield failed(job, error)
