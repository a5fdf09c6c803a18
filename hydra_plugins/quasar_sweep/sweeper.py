"""The sweeper behind ``python run.py -m``: plans, resumes, launches and reports a grid of jobs."""

from __future__ import annotations

import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import ConfigCompositionException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, read_write

from quasar.config.checks import shown
from quasar.config.hash import config_hash
from quasar.config.rules import check, require_count, require_path
from quasar.config.schema import RunConfig
from quasar.errors import QuasarError, RequestError, actionable, report, storage_error
from quasar.experiment.entry import INTERRUPTED
from quasar.experiment.sweep.ending import SweepEnded
from quasar.experiment.sweep.plan import Job, Request, begin, newest_sweep, plan, planning, summary_line
from quasar.experiment.sweep.report import print_interrupted, print_outcome, print_plan
from quasar.experiment.sweep.snapshot import freeze
from quasar.results.console import Reporter
from quasar.results.runs import is_locked, read_run
from quasar.results.store import write_status

ONE_AT_A_TIME = (
    "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
    "hydra_plugins.quasar_sweep.launchers.LocalLauncher",
    "hydra_plugins.quasar_sweep.launchers.SlurmLauncher",
)
"""Launchers whose jobs do not share cores; a cluster gives each its own."""


class ResumableSweeper(BasicSweeper):
    """Hydra's grid of overrides, with jobs that are known by their configuration's hash.

    Jobs that are done are left out, others continue where they were (`quasar.experiment.sweep.plan`); all jobs read the
    configuration as it was at submission; if a job fails or is killed, the others go on. Ends with `SweepEnded` if
    not every job is done.
    """

    def __init__(
        self,
        max_batch_size: int | None,
        params: dict[str, str] | None = None,
        arms: Mapping[str, Sequence[str]] | None = None,
        only: Sequence[str] | None = None,
    ) -> None:
        """See conf/hydra/sweeper/resumable.yaml."""
        super().__init__(max_batch_size, params)
        self.arms = {str(name): tuple(overrides) for name, overrides in (arms or {}).items()}
        self.only = None if only is None else list(map(str, only))

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._context, self._config, self._task_function = hydra_context, config, task_function

    def sweep(self, arguments: list[str]) -> None:
        """Carry out the sweep that the command line's overrides span."""
        try:
            code = self._sweep(arguments)
        except QuasarError as error:
            code = report(error)
        except OSError as error:
            code = report(storage_error(error.filename or self._config.hydra.sweep.dir, error))
        if code:
            # Hydra calls this only if nothing is raised.
            self._context.callbacks.on_multirun_end(config=self._config)
            raise SweepEnded(code)

    def _sweep(self, arguments: list[str]) -> int:
        reporter = Reporter()
        self._check_own_settings()
        with tempfile.TemporaryDirectory(prefix="quasar-") as temporary:
            freeze(self._context.config_loader, Path(temporary))
            requests = self._requests(arguments)
            settings = requests[0].settings
            root = self._choose_folder(arguments, [request.config_hash for request in requests], settings.resume)
            if settings.sweep.dry_run:
                print_plan(self._plan(requests, root, settings, reporter), root, reporter)
                return 0
            launcher = self._make_launcher(root, settings.sweep.allow_parallel)
            with planning(root):
                jobs = self._plan(requests, root, settings, reporter)
                begin(jobs, root, sys.argv)
            freeze(self._context.config_loader, root)
        reporter.line(f"sweep {root}, {summary_line(jobs)}")
        try:
            codes = self._launch(launcher, [job for job in jobs if job.launches], root)
        except KeyboardInterrupt:
            left = [read_run(root / job.folder) for job in jobs if job.action != "same"]
            print_interrupted(left, root, reporter)
            return INTERRUPTED
        runs = [read_run(root / job.folder) for job in jobs if job.action != "same"]
        print_outcome(runs, root, reporter)
        # The sweep that runs a job elsewhere also reports it.
        return max(codes) if codes else int(any(run.status in ("failed", "partial") for run in runs))

    def _plan(self, requests: Sequence[Request], root: Path, settings: RunConfig, reporter: Reporter) -> list[Job]:
        """Plan the jobs. ``settings``: those of the first job, for the keys that belong to the sweep."""
        from quasar.experiment.sweep.inputs import refuse_other_inputs  # loads torch, which --help does not need

        any_code = settings.sweep.any_code
        jobs = plan(requests, root, settings.resume, any_code)
        refuse_other_inputs(jobs, root, any_code, reporter)
        return jobs

    def _check_own_settings(self) -> None:
        """Raise RequestError for a wrong value of the keys below ``hydra`` that a sweep reads."""
        hydra = self._config.hydra
        remedy = "at least 1 (an integer), or null: the launcher gets all jobs at a time"
        require_count("hydra.sweeper.max_batch_size", self.max_batch_size, remedy)
        if self.params is not None and not isinstance(self.params, Mapping):
            raise RequestError(
                f"hydra.sweeper.params={shown(self.params)}: must be a mapping of keys to values, or null"
            )
        require_path("hydra.sweep.dir", hydra.sweep.dir)
        for override in self._config.hydra.overrides.hydra:
            if override.startswith("hydra.sweep.subdir="):
                raise RequestError(f"{override}: the folders of jobs are numbered; set hydra.sweep.dir instead")
        if "parallel" in hydra.launcher:
            require_count("hydra.launcher.parallel", hydra.launcher.parallel or 0, "at least 1 (an integer)")

    def _requests(self, arguments: list[str]) -> list[Request]:
        """Every job of the grid, composed and checked, so that a wrong value is told before any job starts."""
        requests = []
        for job in self._grid(arguments):
            try:
                config = self._context.config_loader.load_sweep_config(self._config, list(job))
            except ConfigCompositionException as error:
                raise RequestError(f"{error} (in the job {' '.join(job)})") from None
            choices = config.hydra.runtime.choices
            with read_write(config):
                OmegaConf.set_struct(config, False)
                del config["hydra"]
            try:
                settings = check(config, choices)
            except RequestError as error:
                raise RequestError(f"{error} (in the job {' '.join(job)})") from None
            requests.append(Request(tuple(filter(_of_job, job)), config_hash(config), settings))
        return requests

    def _grid(self, arguments: list[str]) -> list[Sequence[str]]:
        """The overrides of every job: the grid of the command line and the parameters, crossed with the arms.

        The command line takes precedence over an arm, and an arm over the parameters: a key that one of them sets is
        not swept for the values of another.
        """
        parser = OverridesParser.create(config_loader=self._context.config_loader)

        def without(overrides: Sequence[str], others: Sequence[str]) -> list[str]:
            taken = {override.key_or_group for override in parser.parse_overrides(list(others))}
            parsed = parser.parse_overrides(list(overrides))
            return [
                line for line, override in zip(overrides, parsed, strict=True) if override.key_or_group not in taken
            ]

        unknown = [name for name in self.only or () if name not in self.arms]
        if unknown:
            raise RequestError(
                f"hydra.sweeper.only: there is no arm {unknown[0]!r}; choose from {', '.join(map(repr, self.arms))}"
            )
        arms = {name: self.arms[name] for name in self.only} if self.only else self.arms
        jobs: list[Sequence[str]] = []
        for name, chosen in arms.items() or [("", ())]:
            arm = without(chosen, arguments)
            label = [f"arm='{name}'"] if name else []
            lines = [*without(self._parse_config(), [*chosen, *arguments]), *label, *arm, *arguments]
            (grid,) = self.split_arguments(parser.parse_overrides(lines), None)
            jobs += grid
        return jobs

    def _choose_folder(self, arguments: Sequence[str], hashes: Sequence[str], resume: bool) -> Path:
        """The sweep's folder: a new one, or with ``resume=true`` on the command line the newest that has these jobs."""
        root = Path(self._config.hydra.sweep.dir)
        chosen = any(override.startswith("hydra.sweep.dir=") for override in self._config.hydra.overrides.hydra)
        if resume and not chosen and any(argument.startswith("resume=") for argument in arguments):
            root = newest_sweep(root, hashes) or root
        return root.absolute()

    def _make_launcher(self, root: Path, allow_parallel: bool) -> Launcher:
        """The configured launcher, for jobs in ``root``.

        Raises RequestError if it runs jobs side by side, or if it is not installed.
        """
        from hydra.core.plugins import Plugins

        hydra = self._config.hydra
        name = hydra.runtime.choices["hydra/launcher"]
        one_at_a_time = hydra.launcher._target_ in ONE_AT_A_TIME and hydra.launcher.get("parallel", 1) == 1
        if not (one_at_a_time or allow_parallel):
            raise RequestError(
                f"hydra/launcher={name} runs several jobs at a time on the same cores: their timings would not be "
                "comparable. Use basic, slurm, or slurm_local with hydra.launcher.parallel=1; where timings do not "
                "matter, sweep.allow_parallel=true"
            )
        with read_write(hydra.sweep):
            hydra.sweep.dir = str(root)
        try:
            return Plugins.instance().instantiate_launcher(
                hydra_context=self._context, task_function=self._task_function, config=self._config
            )
        except (ImportError, RuntimeError) as error:
            raise RequestError(f"hydra/launcher={name}: {error}; is its plugin installed?") from None

    def _launch(self, launcher: Launcher, jobs: Sequence[Job], root: Path) -> list[int]:
        """Run the jobs; the exit code of each. An error of the launcher counts for the jobs that have no result."""
        codes: list[int] = []
        size = self.max_batch_size or max(len(jobs), 1)
        for batch in (jobs[start : start + size] for start in range(0, len(jobs), size)):
            overrides = [_with_folder(job, root) for job in batch]
            try:
                returned = list(launcher.launch(overrides, initial_job_idx=len(codes)))
                fault = None
            except Exception as error:
                report(error)
                returned, fault = [JobReturn()] * len(batch), _text(error)
            codes += [_settle(job, root, result, fault) for job, result in zip(batch, returned, strict=True)]
        return codes


def _of_job(override: str) -> bool:
    """Whether an override belongs to a job; the others belong to the sweep."""
    return not override.startswith(("resume=", "sweep.dry_run=", "sweep.any_code="))


def _settle(job: Job, root: Path, returned: JobReturn, fault: str | None) -> int:
    """A job's exit code, after its folder says how it ended even where the job itself could not."""
    folder = root / job.folder
    stored = read_run(folder)
    if stored.status == "done":
        return 0
    if stored.status == "failed":
        return _exit_code(returned)
    if is_locked(folder):
        # The sweep whose process works on the job reports it.
        left_to_it = returned.status == JobStatus.COMPLETED and returned.return_value == 0
        return 0 if left_to_it else _exit_code(returned)
    if returned.status == JobStatus.FAILED:
        fault = _text(returned._return_value)
    try:
        # A job that never started has no folder yet.
        folder.mkdir(parents=True, exist_ok=True)
        write_status(folder, "failed", fault or "the job ended without a result", job.request.config_hash)
    except OSError as error:
        # The other jobs are settled nevertheless.
        report(storage_error(folder, error))
    return 1


def _text(error: Exception) -> str:
    """The message of an error that the user can act on, else its traceback."""
    known = actionable(error)
    return "".join(traceback.format_exception(error)) if known is None else str(known)


def _exit_code(returned: JobReturn) -> int:
    """What the job returned where it did, else 1; a job that is not done has none of 0."""
    value = returned.return_value if returned.status == JobStatus.COMPLETED else None
    return value if isinstance(value, int) and value else 1


def _with_folder(job: Job, root: Path) -> list[str]:
    quoted = str(root).replace("\\", "\\\\").replace("'", "\\'")
    return [
        *job.request.overrides,
        f"hydra.sweep.dir='{quoted}'",
        f"hydra.sweep.subdir='{job.folder}'",
        "resume=true",
    ]
