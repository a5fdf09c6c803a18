"""What a run and a sweep refuse before they begin, and the text of config.yaml."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from quasar.config.hash import config_hash
from quasar.config.rules import settled, warnings_about
from quasar.config.text import command_line, config_yaml
from quasar.errors import RequestError
from quasar.experiment.main import main
from quasar.model.devices import check_machine
from tests.compose import composed, composed_run

Start = Callable[..., tuple[int, str]]


@pytest.fixture
def start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], prompt_file: Path
) -> Start:
    """``run.py`` with the tiny model in this process; the exit code and what it printed on standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QUASAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("quasar.results.environment.copy_bandwidth", lambda _: 1e10)

    def started(*overrides: str) -> tuple[int, str]:
        fixed = ["model=tiny", "verifier=fp16", "data=specbench", f"data.path={prompt_file}", "drafter=ngram"]
        fixed += ["threads=1", "decode.max_new_tokens=6", "evaluate.baselines=false", "evaluate.fidelity=false"]
        named = {override.split("=")[0] for override in overrides}
        fixed = [override for override in fixed if override.split("=")[0] not in named]
        removed = tuple(f"{override[1:]}." for override in overrides if override.startswith("~"))
        fixed = [override for override in fixed if not override.startswith(removed)]
        monkeypatch.setattr(sys, "argv", ["run.py", *overrides, *fixed])
        capfd.readouterr()
        code = main()
        return code, capfd.readouterr().err

    return started


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["hydra.run.dir=''"], "hydra.run.dir='': must be the path of a folder"),
        (["verifier=[fp16,int4]"], "verifier must be one file of conf/verifier"),
        (["verifier.name=int8"], "verifier.name=int8: must be fp16"),
        (["~seed"], "seed is not set"),
        (["~evaluate"], "evaluate is not set"),
        (["~logger"], "logger must be one file"),
        (["threads=10000"], "threads=10000: this process may use"),
        (["sweep.dry_run=true"], "sweep.dry_run=true: lists the jobs of a sweep"),
        (["-m", "hydra.sweeper.max_batch_size=-1"], "hydra.sweeper.max_batch_size=-1: must be at least 1"),
        (["-m", "hydra.sweeper.max_batch_size=0"], "hydra.sweeper.max_batch_size=0: must be at least 1"),
        (["-m", "hydra.sweeper.max_batch_size=true"], "hydra.sweeper.max_batch_size=true: must be at least 1"),
        (["-m", "hydra.sweeper.max_batch_size=1.5"], "hydra.sweeper.max_batch_size=1.5: must be at least 1"),
        (["-m", "hydra.sweeper.params=[seed]"], "hydra.sweeper.params=['seed']: must be a mapping"),
        (["-m", "hydra.sweep.dir=''"], "hydra.sweep.dir='': must be the path of a folder"),
        (["-m", "hydra.sweep.subdir=x"], "hydra.sweep.subdir=x: the folders of jobs are numbered"),
        (["-m", "~sweep"], "sweep is not set"),
        (["-m", "drafter.num_tokens=2,true"], "drafter.num_tokens=true: input should be a valid integer"),
        (["-m", "+decode.unknown=1,2"], "decode.unknown=1: decode has no key 'unknown'"),
    ],
)
def test_wrong_requests_end_with_one_line_and_no_folder(
    start: Start, tmp_path: Path, overrides: list[str], message: str
) -> None:
    code, error = start(*overrides)
    assert code == 2
    assert message in error
    assert "Traceback" not in error
    assert not list(tmp_path.rglob("generations.jsonl"))
    assert not list(tmp_path.rglob("sweep.json"))


def test_an_unknown_level_of_cpu_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = composed_run("threads=1")
    check_machine(settings.threads)
    monkeypatch.setenv("QUASAR_CPU_LEVEL", "nosuch")
    with pytest.raises(RequestError, match=r"QUASAR_CPU_LEVEL=nosuch: no level of CPU kernels here; .*torch"):
        check_machine(settings.threads)


def test_more_threads_than_cpus_are_refused() -> None:
    available = len(os.sched_getaffinity(0))
    check_machine(available)
    with pytest.raises(RequestError, match=f"use at most {available}, or null"):
        check_machine(available + 1)


STOPS = ["\n", "\n\n###", "a: b", "# no", "\u2028", "\x85", "\t", "é🙂", "7e6789", "1e3", "true", "${", "\\n"]


def test_any_stop_text_makes_a_config_that_yaml_reads_back() -> None:
    config = composed()
    config.decode.stop = [stop for stop in STOPS if stop != "${"]
    command = ["run.py", *(f"decode.stop=['{stop}']" for stop in STOPS), "data.path=\udcff"]
    text = config_yaml(config, command)
    assert yaml.safe_load(text) == settled(config)
    assert text.splitlines()[0] == f"# config hash: {config_hash(config)}"
    lines = [line for line in text.splitlines() if line.startswith("#")]
    assert len(lines) == 2
    assert "'7e6789'" in text


def test_the_command_line_is_one_line_that_a_shell_reads_back() -> None:
    arguments = ["run.py", "decode.stop=['\n']", "name=it's", "a b", "x=\\n\n", "data.path=/\udcff"]
    line = command_line(arguments)
    assert line.isprintable()
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True)
    assert [os.fsdecode(part) for part in done.stdout.split(b"\0")[:-1]] == arguments


def test_a_run_with_a_line_break_in_a_stop_text_is_done_once(start: Start, tmp_path: Path) -> None:
    (code, error), folder = start('decode.stop=["\n"]', "hydra.run.dir=out"), tmp_path / "out"
    assert code == 0, error
    assert yaml.safe_load((folder / "config.yaml").read_text())["decode"]["stop"] == ["\n"]
    assert json.loads((folder / "status.json").read_text())["status"] == "done"
    assert start("-m", 'decode.stop=["\n"]', "hydra.sweep.dir=s")[0] == 0
    before = (tmp_path / "s" / "0" / "generations.jsonl").stat().st_mtime_ns
    assert start("-m", 'decode.stop=["\n"]', "hydra.sweep.dir=s", "resume=true")[0] == 0
    assert (tmp_path / "s" / "0" / "generations.jsonl").stat().st_mtime_ns == before


def test_equal_settings_are_one_configuration_however_they_are_written() -> None:
    assert config_hash(composed("decode.temperature=1")) == config_hash(composed("decode.temperature=1.0"))
    assert config_hash(composed("seed='5'")) == config_hash(composed("seed=5"))
    assert config_hash(composed("drafter=suffix_automaton", "drafter.length_factor=3")) == config_hash(
        composed("drafter=suffix_automaton", "drafter.length_factor=3.0")
    )


def test_a_backslash_and_an_n_are_said_to_be_no_line_break() -> None:
    (warning,) = warnings_about(composed_run(r"decode.stop=['\n', x]"))
    assert r"decode.stop has the text \n, in which a backslash and a letter are two characters" in warning
    assert warnings_about(composed_run("decode.stop=['\n', x]")) == []
