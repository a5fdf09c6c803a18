"""`quasar list` and `quasar doctor`: what they say about the configuration and about the machine."""

from __future__ import annotations

import subprocess
import sys
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from quasar_kernels import selfcheck
from quasar_kernels.cpu.levels import LEVEL_VARIABLE
from quasar_kernels.dispatch import Kernel
from quasar_kernels.ops import LAYER_OPS, MATMULS, silu_mul
from typer.testing import CliRunner

from quasar.cli import app
from quasar.config.schema import CONF
from quasar.doctor import kernels, machine, report, services, storage
from quasar.doctor.finding import Finding
from quasar.errors import RequestError
from quasar.experiment.catalogue import GROUPS, entries, first_sentence
from quasar.experiment.reference import require_device
from quasar.results.load import Sample
from tests.compose import composed_run


def test_every_file_of_every_group_is_listed_with_its_sentence() -> None:
    done = CliRunner().invoke(app, ["list"])
    assert done.exit_code == 0, done.output
    for group in GROUPS:
        for file in (CONF / group).glob("*.yaml"):
            sentence = first_sentence(file)
            assert file.read_text().replace("\n# ", " ").find(sentence) > 0, "it is in the file's comment"
            assert any(line.split()[:1] == [file.stem] and line.endswith(sentence) for line in done.output.splitlines())


def test_the_output_of_drafters_and_verifiers_is_said() -> None:
    drafters = {entry.name: entry for entry in entries("drafter")}
    verifiers = {entry.name: entry for entry in entries("verifier")}
    assert {name for name, entry in drafters.items() if entry.output == "simulated"} == {"replay"}
    assert {name for name, entry in verifiers.items() if entry.output == "exact"} == {"fp16"}
    assert {entry.devices for entry in (*drafters.values(), *verifiers.values())} == {("cpu", "cuda")}
    one = CliRunner().invoke(app, ["list", "verifier"]).output
    assert "fp16        cpu cuda exact     The reference: the model as it was trained." in one
    assert "drafter=" not in one
    wrong = CliRunner().invoke(app, ["list", "verifiers"])
    assert (wrong.exit_code, "choose among drafter, verifier, model, data, experiment" in wrong.output) == (2, True)


def test_the_first_sentence_of_a_comment(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(
        "# @package _global_\n# Lookahead (Fu et al. 2024), version 1.5: a b\n# c. And more.\nname: x\n# Not this.\n"
    )
    assert first_sentence(file) == "Lookahead (Fu et al. 2024), version 1.5: a b c."


def test_a_component_is_refused_on_a_device_that_it_does_not_work_on(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = composed_run("model=tiny", "verifier=int8")
    require_device(settings, torch.device("cpu"))
    monkeypatch.setattr("quasar.verifiers.int8.Int8Verifier.devices", ("cuda",))
    with pytest.raises(RequestError, match=r"verifier=int8: does not work on device=cpu, only on cuda"):
        require_device(settings, torch.device("cpu"))


def test_help_and_list_of_models_load_no_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "from quasar.cli import app; app(['--help'])"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert "--install-completion" in done.stdout
    assert " torch\n" not in done.stderr


def test_every_op_is_compared_and_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    found = list(selfcheck.compare_kernels(device))
    assert [entry.op for entry in found] == [op.name for op in (*MATMULS, *LAYER_OPS)]
    assert all(entry.correct for entry in found)
    right = silu_mul.OP.cpu
    assert right is not None
    for wrong, error in (
        (lambda library, x: right.run(library, x) * 1.1, pytest.approx(0.1, abs=0.02)),
        (lambda library, x: right.run(library, x) / 0, float("inf")),
    ):
        changed = object.__new__(type(silu_mul.OP))
        changed.__dict__.update({**vars(silu_mul.OP), "cpu": Kernel(right.supports, wrong)})
        monkeypatch.setattr(selfcheck, "LAYER_OPS", (changed,))
        monkeypatch.setattr(selfcheck, "MATMULS", ())
        (entry,) = selfcheck.compare_kernels(device)
        assert entry.error == error
        assert not entry.correct
        (finding,) = kernels.ops()
        assert finding.state == "fails"
        assert "silu_mul: differs from PyTorch's result by" in finding.found


def test_a_kernel_that_raises_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    first = MATMULS[0]

    def broken(*arguments: object) -> None:
        raise MemoryError("no memory")

    changed = object.__new__(type(first))
    changed.__dict__.update({**vars(first), "cpu": Kernel(lambda *arguments: True, broken)})
    monkeypatch.setattr(selfcheck, "MATMULS", (changed, *MATMULS[1:]))
    monkeypatch.setattr(selfcheck, "backend", lambda: object())
    found = list(selfcheck.compare_kernels(torch.device("cpu")))
    assert found[0].failure == "MemoryError: no memory"
    assert len(found) == len(MATMULS) + len(LAYER_OPS)


def test_without_kernels_the_doctor_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LEVEL_VARIABLE, "avx99")
    (finding,) = kernels.cpu()
    assert (finding.state, finding.remedy) == ("fails", f"unset {LEVEL_VARIABLE}")
    monkeypatch.setenv(LEVEL_VARIABLE, "torch")
    monkeypatch.setattr("quasar_kernels.cpu.kernel_level", lambda: ("torch", f"{LEVEL_VARIABLE}=torch"))
    (finding,) = kernels.cpu()
    assert finding.state == "falls back"
    assert "several times slower" in finding.found
    monkeypatch.setattr(selfcheck, "backend", lambda: None)
    (without,) = kernels.ops()
    assert without.state == "falls back"
    assert without.found.startswith("PyTorch's operations compute linear_w8a8, ")


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    (finding,) = kernels.compiler()
    assert finding.state == "falls back"
    assert "install g++ or clang++" in finding.found


@pytest.mark.parametrize(("available", "state"), [(8_000_000, "works"), (2_000_000, "falls back"), (500_000, "fails")])
def test_memory(available: int, state: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "meminfo"
    file.write_text(f"MemTotal:       16000000 kB\nMemFree: 1 kB\nMemAvailable:    {available} kB\n")
    monkeypatch.setattr(machine, "_MEMINFO", file)
    (finding,) = machine.memory()
    assert finding.state == state
    assert finding.found == f"{available * 1024 / 1e9:.1f} of 16.4 GB available"


def test_what_others_do_to_the_times() -> None:
    begin = Sample(at=10.0, busy=100.0, steal=5.0, own=50.0, load_average=0.1)
    end = Sample(at=12.0, busy=103.1, steal=5.4, own=50.5, load_average=1.7)
    finding = machine._load(begin, end, cores=4)
    # (3.1 - 0.5 + 0.4) s in 2 s are 1.5 cores.
    assert finding.found.startswith("load average 1.70; 2.5 of 4 cores are free")
    assert finding.state == "falls back"
    calm = Sample(at=12.0, busy=100.8, steal=5.0, own=50.5, load_average=0.1)
    assert machine._load(begin, calm, cores=4).state == "works"


@pytest.mark.parametrize(("free", "state"), [(9e9, "works"), (1e9, "falls back"), (1e8, "fails")])
def test_disks(free: float, state: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QUASAR_CACHE", str(tmp_path / "not" / "yet"))
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda place: type("Usage", (), {"free": free}))
    found = list(storage.disks())
    assert [finding.state for finding in found] == [state, state]
    assert all(bool(finding.remedy) is (state != "works") for finding in found)


def test_folders_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QUASAR_CACHE", str(tmp_path))
    monkeypatch.setattr(storage.os, "access", lambda place, mode: False)
    assert [finding.state for finding in storage.disks()] == ["fails", "works"]
    assert [finding.state for finding in storage.cache()] == ["falls back"]


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (None, "works"),
        (urllib.error.HTTPError("", 404, "", None, None), "works"),  # type: ignore[arg-type]
        (urllib.error.URLError("no route to host"), "falls back"),
        (TimeoutError("timed out"), "falls back"),
    ],
)
def test_the_hub(error: Exception | None, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Answer:
        def __enter__(self) -> None: ...
        def __exit__(self, *arguments: object) -> None: ...

    def opened(request: object, timeout: float) -> Answer:
        assert timeout <= 5
        if error is not None:
            raise error
        return Answer()

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(services.urllib.request, "urlopen", opened)
    (finding,) = services.hub()
    assert finding.state == state
    if state != "works":
        assert str(getattr(error, "reason", error)) in finding.found
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (finding,) = services.hub()
    assert "HF_HUB_OFFLINE" in finding.found


def test_wandb_and_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert next(iter(services.wandb())).state == "works"
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert next(iter(services.wandb())).state == "falls back"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert next(iter(services.slurm())).found.startswith("no sbatch and no sinfo")
    for name, content in (("sbatch", ""), ("sinfo", "echo gpu; echo cpu; echo gpu")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{content}\n")
        (tmp_path / name).chmod(0o755)
    assert next(iter(services.slurm())).found == "hydra/launcher=slurm submits to the partitions gpu, cpu"
    (tmp_path / "sinfo").write_text("#!/bin/sh\necho 'no controller' >&2\nexit 1\n")
    assert next(iter(services.slurm())).state == "falls back"


def test_the_exit_code_says_whether_a_run_would_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def good() -> Iterator[Finding]:
        yield Finding("memory", "falls back", "little " * 20, "buy " * 20)

    def raising() -> Iterator[Finding]:
        raise ImportError("no module named torch")

    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(report, "CHECKS", (good,))
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 0
    lines = done.output.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("falls back  memory        little little")
    assert lines[1].startswith(" " * 26 + "little")
    assert any(line.startswith(" " * 26 + "-> buy") for line in lines)
    assert lines[-1] == "a run works here"

    monkeypatch.setattr(report, "CHECKS", (raising, good))
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 1
    assert done.output.startswith("fails       raising       ImportError: no module named torch")
    assert "falls back  memory" in done.output, "the other checks still run"


def test_this_machine_is_examined() -> None:
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 0, done.output
    for subject in ("Python", "PyTorch", "GPU", "CPU kernels", "compiler", "CPU ops", "memory", "load", "hub"):
        assert any(line[12:].startswith(subject) for line in done.output.splitlines()), subject
    assert f"works       Python        {sys.version_info[0]}.{sys.version_info[1]}." in done.output


@pytest.mark.parametrize("command", [["list"], ["models", "list"]])
def test_output_that_nobody_reads_ends_a_command_quietly(command: list[str]) -> None:
    code = f"from quasar.cli import app; app({command!r})"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, "")
