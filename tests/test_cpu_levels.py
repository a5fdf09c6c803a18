"""The choice of the ISA level of the CPU kernels, and their compilation."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shutil
import stat
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import quasar_kernels
import torch
from quasar_kernels import Int8Weight, cpu
from quasar_kernels.cpu import build, levels, library
from quasar_kernels.cpu.levels import LEVEL_VARIABLE, Level, available_levels

from tests import definitions

LEVELS = [level.name for level in available_levels()]


@pytest.fixture
def unloaded() -> Iterator[None]:
    """Restore the state before the first use of a kernel, before and after the test."""
    library.backend.cache_clear()
    library._loaded.cache_clear()
    yield
    library.backend.cache_clear()
    library._loaded.cache_clear()


def test_levels_by_name(monkeypatch: pytest.MonkeyPatch, unloaded: None) -> None:
    for name in LEVELS:
        cpu.use_level(name)
        found = cpu.backend()
        assert found is None or found.level.name == name
    cpu.use_level("torch")
    assert cpu.backend() is None
    with pytest.raises(ValueError, match=r"avx9: no level of CPU kernels here; this processor has .*torch"):
        cpu.use_level("avx9")
    cpu.use_level(None)
    monkeypatch.setenv(LEVEL_VARIABLE, "torch")
    library.backend.cache_clear()
    assert cpu.backend() is None
    monkeypatch.setenv(LEVEL_VARIABLE, "sse")
    library.backend.cache_clear()
    with pytest.raises(ValueError, match="QUASAR_CPU_LEVEL=sse"):
        cpu.backend()


def cpuinfo(tmp_path: Path, features: str) -> Path:
    path = tmp_path / "cpuinfo"
    path.write_text(f"processor\t: 0\nflags\t\t: {features}\n")
    return path


ALL_FEATURES = "avx2 fma f16c avx512f avx512bw avx512vl avx512dq avx512_vnni avx512_bf16 amx_tile amx_int8 amx_bf16"


@pytest.mark.parametrize(
    ("features", "permitted", "expected"),
    [
        (ALL_FEATURES, True, ["amx", "avx512bf16", "avx512", "avx2"]),
        (ALL_FEATURES, False, ["avx512bf16", "avx512", "avx2"]),
        (ALL_FEATURES.partition(" amx")[0], True, ["avx512bf16", "avx512", "avx2"]),
        ("sse4_2 avx avx2 fma f16c", True, ["avx2"]),
        ("sse4_2 avx", True, []),
    ],
)
def test_levels_of_a_processor(
    features: str, permitted: bool, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(LEVEL_VARIABLE, raising=False)
    monkeypatch.setattr(levels, "CPUINFO", cpuinfo(tmp_path, features))
    monkeypatch.setattr(levels.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(levels, "_tiles_permitted", lambda: permitted)
    assert [level.name for level in levels.chosen_levels()] == expected


@pytest.mark.skipif(shutil.which("g++") is None or shutil.which("objdump") is None, reason="no g++ with objdump")
def test_products_of_the_best_level_use_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUASAR_CACHE", str(tmp_path))
    amx = levels.LEVELS[0]
    try:
        path = build.library_path(amx)
    except build.BuildError as error:
        pytest.skip(f"this compiler knows no tiles: {error}")
    listing = subprocess.run(["objdump", "-d", str(path)], capture_output=True, text=True, check=True).stdout
    for instruction in ("ldtilecfg", "tileloadd", "tdpbsud", "tdpbf16ps", "tilestored", "tilerelease"):
        assert instruction in listing


@pytest.mark.skipif(len(LEVELS) < 3 or shutil.which("g++") is None, reason="no two levels, or no g++")
def test_a_compiler_that_does_not_know_the_best_level_compiles_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unloaded: None
) -> None:
    best, second, *_ = levels.chosen_levels()
    newest = next(flag for flag in best.flags if flag not in second.flags)
    old = tmp_path / "old"
    old.write_text(
        f'#!/bin/sh\ncase "$*" in *{newest}*) echo "error: {newest}?" >&2; exit 1;; esac\nexec g++ -O0 "$@"\n'
    )
    old.chmod(old.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(old))
    monkeypatch.setenv("QUASAR_CACHE", str(tmp_path / "cache"))
    found = cpu.backend()
    assert found is not None
    assert found.level == second


@pytest.mark.skipif(not LEVELS, reason="no AVX2")
@pytest.mark.parametrize("broken", ["none", "failing"])
def test_without_a_compiler(broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unloaded: None) -> None:
    monkeypatch.setenv("QUASAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    if broken == "failing":
        monkeypatch.setenv("CXX", "/bin/false")
    values, scales = torch.arange(64 * 96).remainder(255).sub(127).to(torch.int8).view(64, 96), torch.rand(64) + 0.01
    x = torch.randn(3, 96, dtype=torch.bfloat16)
    expected = definitions.linear_w8a8(*definitions.quantized(x), x.dtype, values, scales)
    reason = "no C\\+\\+ compiler found" if broken == "none" else "/bin/false failed"
    with pytest.warns(RuntimeWarning, match=f"CPU kernels are off, PyTorch's operations are used: {reason}"):
        weight = Int8Weight(values, scales)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(quasar_kernels.linear_w8a8(x, weight), expected)


def _first_use(level: Level, cache: str, results: multiprocessing.Queue[str]) -> None:
    os.environ["QUASAR_CACHE"] = cache
    path = build.library_path(level)
    ctypes.CDLL(str(path))
    results.put(str(path))


@pytest.mark.skipif(not LEVELS or shutil.which("g++") is None, reason="no AVX2, or no g++")
def test_processes_that_start_at_once_compile_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, log = tmp_path / "compiler", tmp_path / "log"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexec {shutil.which("g++")} "$@"\n')
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(build, "FLAGS", tuple("-O0" if flag == "-O2" else flag for flag in build.FLAGS))
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[str] = context.Queue()
    level = available_levels()[-1]
    processes = [context.Process(target=_first_use, args=(level, str(tmp_path / "c"), results)) for _ in range(4)]
    for process in processes:
        process.start()
    paths = {results.get(timeout=120) for _ in processes}
    for process in processes:
        process.join()
    assert len(paths) == 1
    assert sum("-shared" in line for line in log.read_text().splitlines()) == 1
    assert {path.suffix for path in (tmp_path / "c" / "kernels").iterdir()} <= {".so", ".lock"}
