"""Sweeps that begin at once in one folder, whose launcher fails, or that are interrupted."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from quasar.config.schema import RunConfig
from quasar.errors import QuasarError
from quasar.experiment import run as run_module
from quasar.experiment.sweep import snapshot
from quasar.experiment.sweep.plan import Request, begin, plan, planning
from quasar.results.console import Reporter
from quasar.results.runs import read_run
from quasar.results.wandb.log import run_id
from tests.compose import composed
from tests.in_process import Start


def records(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]


def test_two_configurations_in_one_folder_never_mix(
    start: Start, tmp_path: Path, prompt_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other run begins while this one loads its model, after this one has looked at the empty folder."""
    fixed = ["model=tiny", "drafter=none", "verifier=fp16", "data=specbench", f"data.path={prompt_file}"]
    other = composed(*fixed, "evaluate.fidelity=false", "evaluate.baselines=false", "decode.max_new_tokens=3")
    prepare = run_module.prepare
    begun: list[str] = []

    def overtaken(*arguments: Any) -> Any:
        prepared = prepare(*arguments)
        if not begun:
            begun.append("the other")
            run_module.run(other, tmp_path / "out", ["run.py"], Reporter())
        return prepared

    monkeypatch.setattr(run_module, "prepare", overtaken)
    code, _, err = start("hydra.run.dir=out", "verifier=fp16")
    assert begun
    assert code == 2
    assert "contains a run with another configuration" in err
    stored = read_run(tmp_path / "out")
    assert (stored.status, stored.config["decode"]["max_new_tokens"]) == ("done", 3)
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["tokens_generated"] == 4 * 3  # four turns


def test_runs_of_one_second_have_separate_folders(start: Start, tmp_path: Path) -> None:
    for seed in (0, 1):
        assert start(f"seed={seed}")[0] == 0
    made = list((tmp_path / "outputs/default").iterdir())
    assert len(made) == 2
    assert all(len(folder.name.rpartition("-")[2]) == 6 for folder in made), "no microseconds in the name"


def _copy(folder: str, snapshots: str, barrier: Any, codes: Any) -> None:
    try:
        barrier.wait()
        for _ in range(20):
            target = snapshot._copy(Path(folder), Path(snapshots))
            assert sorted(file.name for file in target.rglob("*.yaml"))[0] == "0.yaml"
        codes.put(0)
    except BaseException as error:
        codes.put(repr(error))


def test_configurations_are_copied_by_several_sweeps_at_once(tmp_path: Path) -> None:
    folders = []
    for kind in range(3):
        (tmp_path / f"conf{kind}").mkdir()
        for number in range(40):
            (tmp_path / f"conf{kind}/{number}.yaml").write_text(f"value: {number} {kind}\n" * 50)
        folders.append(str(tmp_path / f"conf{kind}"))
    context = multiprocessing.get_context("fork")
    barrier, codes = context.Barrier(6), context.Queue()
    for number in range(6):
        context.Process(target=_copy, args=(folders[number % 3], str(tmp_path / "s/.conf"), barrier, codes)).start()
    assert [codes.get(timeout=60) for _ in range(6)] == [0] * 6
    assert len(list((tmp_path / "s/.conf").iterdir())) == 3


def test_sweeps_that_begin_at_once_share_no_job_folder(tmp_path: Path) -> None:
    settings = RunConfig()
    root = tmp_path / "s"

    def sweep(number: int) -> None:
        with planning(root):
            jobs = plan([Request((f"seed={number}",), f"hash{number}", settings)], root, True, False)
            begin(jobs, root, ["run.py"])

    threads = [threading.Thread(target=sweep, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    jobs = json.loads((root / "sweep.json").read_text())["jobs"]
    assert len(jobs) == len({job["folder"] for job in jobs}) == 8


class _Refusing:
    """An executor like submitit's whose sbatch refuses the jobs."""

    def map_array(self, *_: object) -> None:
        raise subprocess.CalledProcessError(
            1, ["sbatch"], stderr="sbatch: error: invalid partition specified: nowhere\nsbatch: error: failed"
        )


def test_a_launcher_that_fails_shows_its_words_and_settles_every_job(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hydra_plugins.quasar_sweep import launchers

    monkeypatch.setattr(launchers.SlurmLauncher, "_executor", lambda self: _Refusing())
    code, out, err = start("-m", "hydra/launcher=slurm", "hydra.sweep.dir=s", "seed=0,1")
    assert code == 1
    assert "the jobs could not be submitted: sbatch: error: invalid partition specified: nowhere" in err
    assert "cannot be written" not in err
    assert err.count("invalid partition") == 1
    for job in "01":
        stored = read_run(tmp_path / "s" / job)
        assert stored.status == "failed"
        assert "invalid partition specified: nowhere" in str(stored.error)
    assert "0 of 2 jobs done" in out


def test_a_cluster_that_is_not_there_is_told(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hydra_plugins.quasar_sweep import launchers

    def missing(launcher: object) -> None:
        raise RuntimeError('Could not detect "srun", are you indeed on a slurm cluster?')

    monkeypatch.setattr(launchers.SlurmLauncher, "_executor", missing)
    code, _, err = start("-m", "hydra/launcher=slurm", "hydra.sweep.dir=s", "seed=0,1")
    assert (code, 'Could not detect "srun"' in err) == (1, True)
    assert [read_run(tmp_path / "s" / job).status for job in "01"] == ["failed"] * 2


def test_a_cancelled_job_without_a_folder_is_settled(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hydra.core.utils import JobReturn, JobStatus

    from hydra_plugins.quasar_sweep import launchers

    def cancelled(launcher: object, executor: object, parameters: list[Any]) -> list[JobReturn]:
        failed = JobReturn(status=JobStatus.FAILED)
        failed.return_value = QuasarError("SLURM job 7: JobState CANCELLED")
        return [failed] * len(parameters)

    monkeypatch.setattr(launchers.SlurmLauncher, "_executor", lambda self: None)
    monkeypatch.setattr(launchers.SlurmLauncher, "_run", cancelled)
    code, out, _ = start("-m", "hydra/launcher=slurm", "hydra.sweep.dir=s", "seed=0,1")
    assert code == 1
    assert [str(read_run(tmp_path / "s" / job).error) for job in "01"] == ["SLURM job 7: JobState CANCELLED"] * 2
    assert "2 jobs failed" in out


def test_an_interrupted_sweep_says_what_is_left(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append = run_module.RunFolder.append
    appended = []

    def interrupted(folder: Any, record: Any) -> Any:
        appended.append(record)
        if len(appended) == 5:
            raise KeyboardInterrupt
        return append(folder, record)

    with monkeypatch.context() as patch:
        patch.setattr(run_module.RunFolder, "append", interrupted)
        code, out, _ = start("-m", "hydra.sweep.dir=s", "seed=0,1,2,3")
    assert code == 130
    assert "was interrupted: 1 of 4 jobs done, 1 to continue, 2 not begun" in out
    assert "pass resume=true to the same command to continue it" in out
    assert start("-m", "hydra.sweep.dir=s", "seed=0,1,2,3")[0] == 0


def test_a_job_that_another_sweep_has_begun_is_left_to_it(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from filelock import FileLock

    from quasar.results.store import LOCK

    monkeypatch.setattr("quasar.results.store.LOCK_SECONDS", 0.0)
    prepare = run_module.prepare
    held: list[FileLock] = []

    def overtaken(*arguments: Any) -> Any:
        held.append(FileLock(tmp_path / "s/0" / LOCK))
        held[-1].acquire()
        return prepare(*arguments)

    monkeypatch.setattr(run_module, "prepare", overtaken)
    code, out, _ = start("-m", "hydra.sweep.dir=s", "seed=0")
    held[0].release()
    assert (code, "job 0: running elsewhere" in out) == (0, True)


def test_changed_prompts_are_refused_by_a_sweep_too(start: Start, tmp_path: Path, prompt_file: Path) -> None:
    assert start("-m", "hydra.sweep.dir=s", "seed=0,1")[0] == 0
    before = {file: file.read_bytes() for file in (tmp_path / "s").rglob("*.json*")}
    prompt_file.write_text(prompt_file.read_text().replace("say it again", "say it twice"))
    for more in ([], ["sweep.dry_run=true"], ["sweep.any_code=true"]):
        code, _, err = start("-m", "hydra.sweep.dir=s", "seed=0,1", *more)
        assert (code, "a difference in prompts (2)" in err) == (2, True), err
    assert {file: file.read_bytes() for file in (tmp_path / "s").rglob("*.json*")} == before


def test_an_unfinished_job_is_never_continued_by_other_code(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = "drafter._target_=tests.sabotage.FailingDrafter"
    assert start("-m", "hydra.sweep.dir=s", failing)[0] == 1
    for module in ("quasar.experiment.sweep.plan", "quasar.results.store", "quasar.experiment.inputs"):
        monkeypatch.setattr(f"{module}.code_version", lambda: "0123456789ab")
    start("-m", "hydra.sweep.dir=s", failing, "sweep.any_code=true")
    environment = json.loads((tmp_path / "s/0/environment.json").read_text())
    assert {attempt["inputs"]["code_version"] for attempt in environment["attempts"]} == {"0123456789ab"}
    assert {record["attempt"] for record in records(tmp_path / "s/0")} == {1}


def test_sweeps_with_the_same_relative_path_have_other_ids_in_wandb(start: Start, tmp_path: Path) -> None:
    found = []
    for parent in ("a", "b"):
        assert start("-m", f"hydra.sweep.dir={parent}/s", "seed=0")[0] == 0
        found.append(run_id(read_run(tmp_path / parent / "s/0")))
        assert run_id(read_run(tmp_path / parent / "s/0")) == found[-1]
    assert found[0] != found[1]
    assert start("-m", "hydra.sweep.dir=a/s", "seed=0,1")[0] == 0
    (tmp_path / "a/s").rename(tmp_path / "moved")
    assert run_id(read_run(tmp_path / "moved/0")) == found[0]
