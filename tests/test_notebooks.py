"""The notebooks execute on the committed results and on a small sweep of their own, and are stored reproducibly."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from quasar.errors import QuasarError
from quasar.results.notebooks import execute, overview, show
from quasar.results.rows import write_rows
from tests.synthetic import MAIN, experiment_rows, synthetic_provenance

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def outputs(notebook: Path) -> list[dict[str, object]]:
    cells = json.loads(notebook.read_text())["cells"]
    return [output["data"] for cell in cells for output in cell.get("outputs", []) if "data" in output]


def named_results(notebook: Path) -> list[Path]:
    """The folders of results that a notebook reads by default."""
    return [ROOT / "experiments" / name for name in re.findall(r"\.\./experiments/(\w+)", notebook.read_text())]


def test_there_are_four() -> None:
    assert [file.stem for file in NOTEBOOKS] == [
        "01_main_table",
        "02_pruning_vs_quantization",
        "03_acceptance_inflation",
        "04_drafters",
    ]
    for notebook in NOTEBOOKS:
        for folder in named_results(notebook):
            assert (ROOT / "conf" / "experiment" / f"{folder.name}.yaml").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.stem)
def test_it_executes_on_the_committed_results(notebook: Path, tmp_path: Path) -> None:
    missing = [folder.name for folder in named_results(notebook) if not (folder / "results.parquet").is_file()]
    if missing:
        pytest.skip(f"experiments/{', '.join(missing)} has no committed results")
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    copy = Path(shutil.copy(notebook, tmp_path / "notebooks"))
    execute(copy)
    assert outputs(copy)


@pytest.mark.slow
def test_they_execute_on_a_fresh_sweep(tmp_path: Path) -> None:
    command = [sys.executable, "run.py", "-m", "model=tiny", "data=builtin", "data.limit=1", "threads=1"]
    command += [
        "verifier=fp16,int8",
        "drafter=ngram,none",
        "decode.max_new_tokens=8",
        f"hydra.sweep.dir={tmp_path}/sweep",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    for notebook in NOTEBOOKS:
        copy = Path(shutil.copy(notebook, tmp_path))
        execute(copy, tmp_path / "sweep")
        assert "tiny: random weights" in str(outputs(copy)[0])


def test_the_same_results_give_the_same_bytes(tmp_path: Path) -> None:
    rows = experiment_rows(MAIN[:3], ("math", "chat"), prompts=2)
    write_rows(rows, tmp_path / "results.parquet")
    synthetic_provenance().write(tmp_path / "environment.json")
    copy = Path(shutil.copy(NOTEBOOKS[2], tmp_path))
    execute(copy, tmp_path)
    first = copy.read_bytes()
    found = outputs(copy)
    assert sum("image/png" in data for data in found) == 2
    assert all("text/html" in data or "image/png" in data or "text/plain" in data for data in found)
    execute(copy, tmp_path)
    assert copy.read_bytes() == first


def test_a_failing_cell_is_an_error_and_leaves_the_file_unchanged(tmp_path: Path) -> None:
    copy = Path(shutil.copy(NOTEBOOKS[0], tmp_path))
    before = copy.read_bytes()
    (tmp_path / "empty").mkdir()
    with pytest.raises(QuasarError, match=r"01_main_table\.ipynb: RequestError: .*contains no runs"):
        execute(copy, tmp_path / "empty")
    assert copy.read_bytes() == before


def test_tables_and_figures_say_what_is_missing() -> None:
    rows = experiment_rows(MAIN[:3], ("math", "chat"), prompts=2)
    table = overview(rows, ["reference_text_speedup", "task_accuracy"])
    assert list(table.index) == [arm.name for arm in MAIN[:3]]
    assert table["accuracy"].tolist() == ["-"] * 3
    assert table.iloc[1, -2].endswith("x)")
    assert show("draft_length", rows, synthetic_provenance()).startswith("This figure cannot be drawn")
