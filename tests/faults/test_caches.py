"""Damaged and read-only caches: whatever lies in them, a run says so once and gives the same result."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from quasar_kernels import cpu
from quasar_kernels.cpu import build, library
from quasar_kernels.cpu.levels import available_levels

from quasar.cache import Store, json_store
from quasar.results.baselines import Baseline, SharedBaselines
from tests.in_process import Start
from tests.selection import fast
from tests.test_cache import Counting

CPU = torch.device("cpu")
KINDS = {
    "calibration": ["verifier=int8", "calibration.prompts=2"],
    "layerskip": ["drafter=layerskip", "drafter.method=search", "drafter.search_sets=2", "calibration.prompts=2"],
    "trajectories": ["evaluate.fidelity=true"],
    "verifiers": ["verifier=int8", "calibration.prompts=2"],
}
needs_kernels = pytest.mark.skipif(
    not available_levels() or shutil.which("g++") is None, reason="no AVX2, or no compiler"
)


def tokens(folder: Path) -> list[Any]:
    lines = [json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]
    return [[turn["token_ids"] for turn in line["turns"]] for line in lines]


def forced(folder: Path) -> list[Any]:
    lines = [json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]
    return [[(answer["token_ids"], answer["kl"]) for answer in line["fidelity"]] for line in lines]


def damaged(content: bytes, how: str) -> bytes:
    if how == "flipped":
        middle = 3 * len(content) // 4
        return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    return {"cut": content[: len(content) // 2], "empty": b"", "garbage": b"\xff\xfe not a file" * 50}[how]


@pytest.mark.parametrize("how", fast(["flipped", "cut", "empty", "garbage"], "flipped"))
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_entry_is_named_once_and_made_again(start: Start, tmp_path: Path, kind: str, how: str) -> None:
    assert start("hydra.run.dir=whole", *KINDS[kind])[0] == 0
    if kind == "calibration":
        # Otherwise the prepared weights are found, and nothing reads the statistics.
        shutil.rmtree(tmp_path / "cache/verifiers")
    found = next(folder for folder in (tmp_path / "cache").iterdir() if folder.name == kind)
    files = [file for file in found.iterdir() if file.suffix not in (".lock", ".card")]
    assert files
    files[0].write_bytes(damaged(files[0].read_bytes(), how))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert start("hydra.run.dir=again", *KINDS[kind])[0] == 0
        named = [str(warning.message) for warning in caught if str(files[0]) in str(warning.message)]
    assert len(named) == 1, named
    assert "is damaged" in named[0]
    assert tokens(tmp_path / "again") == tokens(tmp_path / "whole")
    assert forced(tmp_path / "again") == forced(tmp_path / "whole")


@pytest.mark.parametrize("fault", ["lock", "save"])
def test_what_cannot_be_written_is_kept_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    monkeypatch.setattr("quasar.cache.cache_folder", lambda: tmp_path / fault)
    answers: Store[list[int]] = json_store("answers")

    def refused(*_: object, **__: object) -> None:
        raise OSError(30, os.strerror(30))

    monkeypatch.setattr("quasar.cache.FileLock.acquire" if fault == "lock" else "quasar.cache._sha256", refused)
    make = Counting()
    with pytest.warns(RuntimeWarning, match="is not writable"):
        first = answers.get({}, CPU, torch.float32, make)
    first.append(7)  # must not change what is kept
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert answers.get({}, CPU, torch.float32, make) == [1]
    assert make.calls == 1


def test_leftovers_of_a_killed_writer_are_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quasar.cache.cache_folder", lambda: tmp_path)
    answers: Store[list[int]] = json_store("answers")
    answers.get({}, CPU, torch.float32, Counting())
    (content,) = (tmp_path / "answers").glob("*.json")
    content.unlink()
    (content.parent / f"{content.stem}.123.json").write_text("[1")
    (content.parent / f"{content.stem}.123.card").write_text("{")
    answers.get({}, CPU, torch.float32, Counting())
    assert sorted(file.suffix for file in content.parent.iterdir() if file.suffix != ".lock") == [".card", ".json"]
    assert not list(content.parent.glob("*.123.*"))


@pytest.fixture
def unloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The state before the first use of a kernel, with an empty cache and quick builds; the cache's folder."""
    monkeypatch.setenv("QUASAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("QUASAR_CPU_LEVEL", raising=False)
    monkeypatch.setattr(build, "FLAGS", tuple("-O0" if flag == "-O2" else flag for flag in build.FLAGS))
    # A compiler that makes a small library with the same functions would be another program; one level is enough.
    monkeypatch.setattr("quasar_kernels.cpu.library.chosen_levels", lambda name=None: available_levels()[-1:])
    forget()
    yield tmp_path / "cache/kernels"
    forget()


def forget() -> None:
    library.backend.cache_clear()
    library._loaded.cache_clear()
    build._temporary_folder.cache_clear()


LOAD = "import ctypes, sys; ctypes.CDLL(sys.argv[1]).quasar_first_maxima"


@needs_kernels
def test_a_damaged_kernel_library_is_compiled_again(unloaded: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cpu.backend() is not None
    (built,) = unloaded.glob("*.so")
    whole = built.read_bytes()
    scratch = built.with_suffix(".whole")
    scratch.write_bytes(whole)
    compiled = build._compile
    calls: list[Path] = []

    def counted(compiler: list[str], level: Any, target: Path) -> None:
        # The compiler gives the same library again; copying it saves the time.
        calls.append(target)
        target.unlink(missing_ok=True)
        target.write_bytes(scratch.read_bytes())

    build._compile = counted
    try:
        for number, how in enumerate(["cut", "garbage", "flipped", "empty"], start=1):
            # A new file: the old one may still be mapped by this process.
            built.unlink()
            built.write_bytes(damaged(whole, how))
            forget()
            with pytest.warns(RuntimeWarning, match=f"{built.name} is damaged; it is compiled again"):
                assert cpu.backend() is not None
            assert len(calls) == number
            assert built.read_bytes() == whole
            forget()
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert cpu.backend() is not None
    finally:
        build._compile = compiled


@needs_kernels
def test_kernels_of_another_key_are_not_loaded(tmp_path: Path) -> None:
    from quasar_kernels.cpu.seal import is_whole, seal

    file = tmp_path / "amx-0123-4567.so"
    file.write_bytes(b"\x7fELF" + bytes(100))
    seal(file, file.stem)
    assert is_whole(file, file.stem)
    assert not is_whole(file, "avx2-0123-4567")
    file.write_bytes(b"\x7fELF" + bytes(100))
    assert not is_whole(file, file.stem)


@needs_kernels
def test_a_read_only_cache_compiles_for_this_process(unloaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(30, os.strerror(30))

    monkeypatch.setattr(build, "FileLock", refused)
    with pytest.warns(RuntimeWarning, match="Read-only file system.*compiled for this process only"):
        assert cpu.backend() is not None
    assert not list(unloaded.glob("*.so"))
    assert library.kernel_level()[0] == available_levels()[-1].name


@needs_kernels
def test_leftovers_of_a_killed_build_are_swept(unloaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    level = available_levels()[-1]
    killed = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from quasar_kernels.cpu import build, levels; import os\n"
            f"build.FLAGS = {build.FLAGS!r}\n"
            "build._run = lambda command: b'' if '--version' in command else os._exit(9)\n"
            f"build.library_path(next(level for level in levels.LEVELS if level.name == {level.name!r}))",
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "QUASAR_CACHE": str(unloaded.parent)},
    )
    assert killed.wait() == 9
    monkeypatch.setattr(build, "_run", lambda command: b"")
    monkeypatch.setattr(build, "seal", lambda library, key: library.write_bytes(b"new"))
    assert [entry for entry in unloaded.iterdir() if entry.is_dir()]
    build.library_path(level)
    assert not [entry for entry in unloaded.iterdir() if entry.is_dir()]


def test_the_level_and_its_reason_are_recorded_and_printed(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUASAR_CPU_LEVEL", "torch")
    library.backend.cache_clear()
    try:
        code, out, _ = start("hydra.run.dir=out")
    finally:
        monkeypatch.undo()
        library.backend.cache_clear()
    assert code == 0
    environment = json.loads((tmp_path / "out/environment.json").read_text())
    assert (environment["kernels"], environment["kernels_reason"]) == ("torch", "QUASAR_CPU_LEVEL=torch")
    (line,) = [line for line in out.splitlines() if line.startswith("device ")]
    assert line.endswith("1 threads, no kernels (QUASAR_CPU_LEVEL=torch)")


def test_a_level_that_cannot_be_used_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = available_levels()
    if len(levels) < 2:
        pytest.skip("no two levels")

    def broken(level: Any) -> Path:
        if level == levels[0]:
            raise build.BuildError("g++ knows no tiles")
        return Path("library")

    monkeypatch.setattr(library, "chosen_levels", lambda name=None: levels[:2])
    monkeypatch.setattr(library, "library_path", broken)
    monkeypatch.setattr(library, "Library", lambda path, level: type("Loaded", (), {"level": level})())
    forget()
    try:
        with pytest.warns(RuntimeWarning, match=f"of level {levels[0].name} are off, those of level {levels[1].name}"):
            assert library.kernel_level() == (levels[1].name, f"{levels[0].name} is off: g++ knows no tiles")
    finally:
        forget()


def test_a_changed_baseline_is_decoded_again(tmp_path: Path) -> None:
    def shared() -> SharedBaselines:
        return SharedBaselines(tmp_path, {"verifier": "int4"}, "cpu")

    assert shared().measured("1/0", [1], lambda: Baseline([3], 1, 5.0, "here")).decode_ms == 5.0
    (file,) = tmp_path.glob("*.jsonl")
    file.write_text(file.read_text().replace("5.0", "1.0"))
    with pytest.warns(RuntimeWarning, match="a baseline was changed after it was written"):
        again = shared().measured("1/0", [1], lambda: Baseline([3], 1, 6.0, "here"))
    assert again.decode_ms == 6.0


def test_a_damaged_converted_model_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from quasar.model import sources

    monkeypatch.setattr(sources, "cache_folder", lambda: tmp_path / "cache")
    made: list[Path] = []

    def dequantize(gguf: Path, folder: Path, *_: object) -> None:
        made.append(folder)
        (folder / "model.safetensors").write_bytes(b"weights")
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(sources, "_dequantize", dequantize)
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    source = sources.ModelSource(name="path", source="path", path=str(file))
    folder = sources.locate(source).folder
    assert folder is not None
    assert sources.locate(source).folder == folder
    assert len(made) == 1
    leftover = folder.with_name(f"{folder.name}.killed")
    leftover.mkdir()
    (folder / "model.safetensors").write_bytes(b"weighty")
    with pytest.warns(RuntimeWarning, match=r"is damaged \(model.safetensors\); it is made again"):
        assert sources.locate(source).folder == folder
    assert len(made) == 2
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert not leftover.exists()
