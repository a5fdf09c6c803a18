"""examples/: the package, the sweep from Python and the notebook work as they are, without an installation."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import nbformat
import pytest

from quasar.results.collect import all_runs

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
PACKAGE = EXAMPLES / "my_drafter_package"


def module_of(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def environment() -> dict[str, str]:
    paths = [str(PACKAGE), str(ROOT), str(ROOT / "kernels")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def test_the_tests_of_the_package_pass(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-c", os.devnull]
    done = subprocess.run(
        [*command, str(PACKAGE / "tests")], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert "5 passed" in done.stdout


def test_a_run_finds_the_package_by_its_search_path(tmp_path: Path) -> None:
    choices = ["model=tiny", "drafter=my_lookup", "drafter.num_tokens=2", "data.limit=1", "threads=1"]
    quick = ["decode.max_new_tokens=8", "evaluate.baselines=false", "evaluate.fidelity=false", "hydra.run.dir=out"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), "hydra.searchpath=[pkg://my_drafter.conf]", *choices, *quick],
        cwd=tmp_path,
        env={**environment(), "QUASAR_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["drafter"] == "my_lookup"


def test_the_sweep_from_python_leaves_ordinary_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUASAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("quasar.results.environment.copy_bandwidth", lambda _: 1e10)
    quick = [
        "model=tiny",
        "data.limit=1",
        "decode.max_new_tokens=6",
        "evaluate.fidelity=false",
        "evaluate.baselines=false",
        "threads=1",
    ]
    rows = module_of(EXAMPLES / "sweep_from_python.py").sweep(tmp_path / "runs", ("none", "ngram"), ("int8",), quick)
    assert [(row["drafter"], row["verifier"]) for row in rows] == [("none", "int8"), ("ngram", "int8")]
    assert rows[0]["mean_acceptance_length"] == 1
    assert [run.status for run in all_runs(tmp_path / "runs")] == ["done", "done"]


def test_the_notebook_runs_without_its_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUASAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("quasar.results.environment.copy_bandwidth", lambda _: 1e10)
    notebook = nbformat.read(EXAMPLES / "quasar_on_colab.ipynb", as_version=4)
    nbformat.validate(notebook)
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    assert 'REPOSITORY = ""' in cells[0]
    names: dict[str, object] = {}
    for source in cells:
        if "OVERRIDES = [" in source:
            source = source.replace(
                '"model=smollm2_135m"',
                '"model=tiny", "decode.max_new_tokens=6", "evaluate.baselines=false", "threads=1"',
            )
            assert "model=tiny" in source
        exec(compile(source, "notebook", "exec"), names)
    assert len(names["rows"]) == 4  # type: ignore[arg-type]
    assert (tmp_path / "figure.png").stat().st_size > 5000
