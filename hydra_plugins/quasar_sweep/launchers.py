"""Launchers through submitit, whose jobs fail one by one: SLURM's queue, and processes of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus
from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import BaseSubmititLauncher

from quasar.errors import QuasarError
from quasar.results.console import Reporter

POLL_SECONDS = 1.0
QUEUE_SECONDS = 5.0
# How often in a row the queue must not know a job that has left no result: results may be late on a shared disk.
MISSED_POLLS = 3
LOG_LINES = 20


class _SubmititLauncher(BaseSubmititLauncher):
    """What both launchers share: building submitit's executor, and turning its jobs into Hydra's returns."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Run the jobs; a return for each, FAILED for those that were killed.

        Raises QuasarError where the jobs cannot be submitted.
        """
        # Jobs import the same code, wherever they start.
        os.environ["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, sys.path))
        parameters = [
            (list(overrides), "hydra.sweep.dir", initial_job_idx + index, str(index), Singleton.get_state())
            for index, overrides in enumerate(job_overrides)
        ]
        try:
            executor = self._executor()
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
            raise _not_submitted(self._EXECUTOR, error) from None
        return self._run(executor, parameters)

    def _run(self, executor: Any, parameters: list[tuple[Any, ...]]) -> list[JobReturn]:
        raise NotImplementedError

    def _executor(self) -> Any:
        import submitit

        folder = Path(self.params["submitit_folder"])
        start, own = {"folder": folder}, dict(self.params)
        del own["submitit_folder"]
        if "max_num_timeout" in own:
            start[f"{self._EXECUTOR}_max_num_timeout"] = own.pop("max_num_timeout")
        shared = set(BaseQueueConf.__dataclass_fields__)
        executor = submitit.AutoExecutor(cluster=self._EXECUTOR, **start)
        executor.update_parameters(
            **{key if key in shared else f"{self._EXECUTOR}_{key}": value for key, value in own.items()}
        )
        return executor


class SlurmLauncher(_SubmititLauncher):
    """One job array of the cluster's queue. Jobs that time out or are preempted are queued again, and continue."""

    _EXECUTOR = "slurm"

    def _run(self, executor: Any, parameters: list[tuple[Any, ...]]) -> list[JobReturn]:
        reporter = Reporter()
        try:
            jobs = executor.map_array(self, *zip(*parameters, strict=True))
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
            raise _not_submitted(self._EXECUTOR, error) from None
        array = jobs[0].job_id.split("_")[0]
        reporter.line(f"submitted {len(jobs)} jobs as {array}, logs in {jobs[0].paths.folder.parent}")
        try:
            with reporter.live("jobs") as update:
                return _wait(jobs, lambda done, note: update(done, len(jobs), note))
        except KeyboardInterrupt:
            reporter.line(f"the jobs go on; scancel {array} ends them")
            raise


class LocalLauncher(_SubmititLauncher):
    """Processes of this machine, one after the other; ``parallel`` of them at a time if timings do not matter."""

    _EXECUTOR = "local"

    def __init__(self, parallel: int = 1, **params: Any) -> None:
        super().__init__(**params)
        self.parallel = parallel

    def _run(self, executor: Any, parameters: list[tuple[Any, ...]]) -> list[JobReturn]:
        returns: list[JobReturn] = []
        with Reporter().live("jobs") as update:
            for start in range(0, len(parameters), self.parallel):
                try:
                    jobs = [executor.submit(self, *each) for each in parameters[start : start + self.parallel]]
                except (OSError, RuntimeError) as error:
                    raise _not_submitted(self._EXECUTOR, error) from None
                for job in jobs:
                    job.wait()
                    returns.append(_returned(job, "its process was killed"))
                    update(len(returns), len(parameters), "")
        return returns


def _not_submitted(cluster: str, error: Exception) -> QuasarError:
    """The error of jobs that could not be submitted, with the words of the command that failed (sbatch)."""
    words = getattr(error, "stderr", None) or str(error)
    text = words.decode(errors="replace") if isinstance(words, bytes) else words
    launcher = {"slurm": "slurm", "local": "slurm_local"}[cluster]
    return QuasarError(f"hydra/launcher={launcher}: the jobs could not be submitted: {' '.join(text.split())}")


def _wait(jobs: Sequence[Any], progress: Callable[[int, str], None]) -> list[JobReturn]:
    """Wait until every job has left a result or the queue no longer knows it.

    submitit asks sacct, which knows nothing if the cluster has no accounting, and would wait forever.
    """
    returns: dict[int, JobReturn] = {}
    missed = dict.fromkeys(range(len(jobs)), 0)
    array = jobs[0].job_id.split("_")[0]
    asked, queued = 0.0, None
    while True:
        fresh = time.monotonic() - asked >= QUEUE_SECONDS
        if fresh:
            asked, queued = time.monotonic(), _queued(array)
        for index, job in enumerate(jobs):
            if fresh and queued is not None:
                missed[index] = 0 if job.job_id in queued else missed[index] + 1
            if index not in returns and (job.paths.result_pickle.exists() or missed[index] >= MISSED_POLLS):
                returns[index] = _returned(job, _fate(job.job_id))
        states = ", ".join(f"{count} {state}" for state, count in Counter((queued or {}).values()).items())
        progress(len(returns), "the queue does not answer" if queued is None else states)
        if len(returns) == len(jobs):
            return [returns[index] for index in range(len(jobs))]
        time.sleep(POLL_SECONDS)


def _queued(array: str) -> dict[str, str] | None:
    """The array's jobs that wait or run, and their states; None if the queue does not answer."""
    command = ["squeue", "--noheader", "--array", "--format=%i|%T|%r", f"--jobs={array}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if answer.returncode and "Invalid job id" not in answer.stderr:
        return None
    rows = [line.split("|") for line in answer.stdout.splitlines()]
    return {job: state.lower() + (f" ({reason})" if reason != "None" else "") for job, state, reason in rows}


def _fate(job_id: str) -> str:
    """What the cluster reports about a job that left no result."""
    try:
        answer = subprocess.run(["scontrol", "--oneliner", "show", "job", job_id], capture_output=True, text=True)
    except OSError:
        return "the queue no longer knows it"
    facts = dict(word.split("=", 1) for word in answer.stdout.split() if "=" in word)
    told = [f"{name} {facts[name]}" for name in ("JobState", "Reason", "ExitCode") if name in facts]
    return f"SLURM job {job_id}: {', '.join(told)}" if told else f"the queue no longer knows SLURM job {job_id}"


def _returned(job: Any, fate: str) -> JobReturn:
    """What the job returned, or a failed return with what is known about its end."""
    from submitit.core.utils import pickle_load

    if not job.paths.result_pickle.exists():
        return _failed(f"the job ended without a result: {fate}", job)
    outcome, result = pickle_load(job.paths.result_pickle)
    if outcome == "success":
        assert isinstance(result, JobReturn)
        return result
    return _failed(str(result), job)


def _failed(message: str, job: Any) -> JobReturn:
    lines = [
        f"{message}",
        "the end of its output:",
        *_log_tail(job.paths.stderr),
        *_log_tail(job.paths.stdout),
        message,
    ]
    failed = JobReturn(status=JobStatus.FAILED)
    failed.return_value = QuasarError("\n".join(lines))
    return failed


def _log_tail(file: Path) -> Iterator[str]:
    try:
        yield from file.read_text(errors="replace").splitlines()[-LOG_LINES:]
    except OSError:
        return
