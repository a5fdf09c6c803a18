"""Experiments: arms become jobs, repetitions become rows, and results are written only where they may be committed."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from quasar.config.schema import CONF
from quasar.errors import RequestError
from quasar.experiment import reproduce as reproduction
from quasar.experiment.main import main
from quasar.results.agreement import agreements
from quasar.results.collect import all_runs
from quasar.results.console import Reporter
from quasar.results.estimates import groups
from quasar.results.excerpts import refreshed, table_cell
from quasar.results.figures import FIGURES
from quasar.results.figures.memory_wall import PASS_FIGURES
from quasar.results.metrics import named
from quasar.results.pass_tables import PASS_TABLES
from quasar.results.provenance import read_provenance
from quasar.results.publish import PASSES, RESULTS, TABLE, read_published_passes, redraw, shortcomings
from quasar.results.quantities import QUANTITIES
from quasar.results.rows import read_rows
from quasar.results.runs import read_config
from tests.in_process import reproduced

TINY = (
    *("model=tiny", "threads=1", "calibration.prompts=2", "decode.max_new_tokens=8", "data.limit=1"),
    *("drafter.num_tokens=3", "hydra.sweeper.only=[fp16,'int8, 8-bit head','fp16, T = 1']"),
)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a tiny repetition of main_table leaves."""
    return reproduced("main_table", TINY, tmp_path_factory.mktemp("experiments"))


@pytest.mark.parametrize("name", reproduction.experiment_names())
@pytest.mark.parametrize("group", ["drafter", "verifier"])
def test_every_arm_names_its_drafter_and_its_verifier(name: str, group: str) -> None:
    """An arm must not get the program's default, which its name does not tell and which may change."""
    experiment = yaml.safe_load((CONF / "experiment" / f"{name}.yaml").read_text(encoding="utf-8"))
    if any(f"override /{group}" in entry for entry in experiment.get("defaults", []) if isinstance(entry, dict)):
        return
    sweeper = experiment["hydra"]["sweeper"]
    if group in sweeper.get("params", {}):
        return
    assert sweeper["arms"]
    for arm, overrides in sweeper["arms"].items():
        assert any(override.startswith(f"{group}=") for override in overrides), arm


@pytest.mark.parametrize("name", reproduction.experiment_names())
def test_every_experiment_names_quantities_and_figures_that_exist(name: str) -> None:
    spec = reproduction.load_experiment(name).publish
    quantities = [*(entry for names in spec.tables.values() for entry in names), *spec.by_family]
    assert quantities or spec.pass_tables
    assert set(quantities) <= set(QUANTITIES)
    assert set(spec.figures) <= {figure.name for figure in FIGURES}
    assert set(spec.pass_tables) <= set(PASS_TABLES)
    assert set(spec.pass_figures) <= {figure.name for figure in PASS_FIGURES}
    assert spec.prompts is not None


def test_arms_are_crossed_with_the_grid_except_for_the_keys_that_they_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own/experiment").mkdir(parents=True)
    (tmp_path / "own/experiment/mine.yaml").write_text(
        "# @package _global_\n"
        "name: mine\n"
        "hydra:\n"
        "  mode: MULTIRUN\n"
        "  sweeper:\n"
        "    params: {decode: 'greedy,sampling', seed: '1,2'}\n"
        "    arms: {one: [verifier=fp16], long one: [verifier=int8, decode=greedy, seed=5]}\n"
    )

    def listed(*overrides: str, code: int = 0) -> str:
        arguments = ["--config-dir", "own", "experiment=mine", "sweep.dry_run=true", *overrides]
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
        assert main() == code
        printed = capfd.readouterr()
        return printed.out if code == 0 else printed.err

    printed = listed()
    assert "5 jobs: 5 to begin" in printed
    assert "multirun/mine/" in printed.replace("\n", "")
    assert [printed.count(text) for text in ("arm='one'", "arm='long one'", "seed=5", "seed=1")] == [4, 1, 1, 2]
    # The command line takes precedence over both.
    printed = listed("seed=7")
    assert "3 jobs: 3 to begin" in printed
    assert "seed=5" not in printed
    assert "1 jobs: 1 to begin" in listed("hydra.sweeper.only=['long one']")
    assert "there is no arm 'two'; choose from 'one', 'long one'" in listed("hydra.sweeper.only=[two]", code=2)


def test_rows_hold_every_prompt_arm_and_repetition(published: Path) -> None:
    rows = read_rows(published / RESULTS)
    assert sorted(set(rows["arm"])) == ["fp16", "fp16, T = 1", "int8, 8-bit head"]
    assert list(rows.groupby("arm").size()) == [5 * 2, 5, 5 * 2]  # prompts, repetitions
    assert not rows.duplicated(["arm", "question", "repetition"]).any()
    sampled = rows[rows["temperature"] == 1]
    assert sampled[["kl", "text_ms", "match_self"]].isna().all(axis=None)
    assert (sampled[["ar_same_ms", "ar_ref_ms"]] > 0).all(axis=None)
    greedy = rows[rows["temperature"] == 0]
    # The first repetition compares logits, every one is timed.
    assert (greedy["kl"].notna() == (greedy["repetition"] == 0)).all()
    assert (greedy[["text_ms", "text_ar_same_ms", "text_ar_ref_ms", "ar_ref_ms"]].astype(float) > 0).all(axis=None)
    both = greedy.pivot(index=["arm", "question"], columns="repetition", values=["tokens", "text_ms"])
    assert (both["tokens", 0] == both["tokens", 1]).all()
    assert (both["text_ms", 0] != both["text_ms", 1]).any()


def test_estimates_from_rows_equal_the_runs_summaries(published: Path) -> None:
    rows = read_rows(published / RESULTS)
    compared = 0
    for run in all_runs(published.parent):
        (group,) = [group for group in groups(rows) if group.arm == run.config["arm"]]
        for name in (
            *("reference_text_speedup", "speedup_vs_ar_ref", "speedup_vs_ar_same", "mean_acceptance_length"),
            *("mean_acceptance_length_ref", "kl_to_reference", "top1_agreement", "acceptance_rate", "step_ms"),
            *("exact_match_length", "tokens_per_second"),
        ):
            found = QUANTITIES[name].of(group.rows, rows)
            assert (None if found is None else found.value) == pytest.approx(run.summary[name]), name
            compared += found is not None
        bounds = QUANTITIES["speedup_vs_ar_ref"].of(group.rows, rows)
        assert bounds is not None
        assert run.summary["speedup_ci95"] == pytest.approx([bounds.low, bounds.high])
    assert compared == 2 * 11 + 6


def test_a_repetition_with_fewer_prompts_is_not_written_to_the_committed_results(published: Path) -> None:
    assert not (published.parents[4] / "experiments").exists()
    table = (published / TABLE).read_text()
    assert "5 of 80 declared prompts" in table
    assert "2 repetitions" in table
    for text in ("| fp16 | 0 |", "| int8, 8-bit head | 0 |", "| fp16, T = 1 | 1 |", "random weights", "BCa bootstrap"):
        assert text in table
    experiment = reproduction.load_experiment("main_table")
    rows, provenance = read_rows(published / RESULTS), read_provenance(published / "environment.json")
    reasons = shortcomings(rows, None, provenance, experiment)
    assert "80 prompts are declared for every arm, but fp16 has 5, fp16, T = 1 has 5, int8, 8-bit head has 5" in reasons
    fewer = dataclasses.replace(experiment, publish=dataclasses.replace(experiment.publish, prompts=5))
    clean = dataclasses.replace(provenance, git_commit="c", git_dirty=False)
    assert shortcomings(rows, None, clean, dataclasses.replace(fewer, repetitions=3)) == [
        "3 repetitions are declared, but there are 2"
    ]
    dirty = dataclasses.replace(provenance, git_commit="c", git_dirty=True)
    assert shortcomings(rows, None, dirty, fewer) == ["the code had uncommitted changes"]


def test_redrawing_gives_the_same_bytes(published: Path) -> None:
    spec = reproduction.load_experiment("main_table").publish
    before = {file.name: file.read_bytes() for file in published.iterdir()}
    redraw(published, spec, complete=False)
    assert {file.name: file.read_bytes() for file in published.iterdir()} == before
    assert {"speedup_by_task.pdf", "speedup_by_task.svg", "speedup_by_task.png", "step.pdf"} <= set(before)


def test_a_second_attempt_decodes_nothing(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(published.parents[4])
    monkeypatch.setattr("quasar.experiment.run.prepare", None)
    before = (published / RESULTS).read_bytes()
    assert reproduction.reproduce("main_table", TINY, None, Reporter()).resolve() == published.resolve()
    assert (published / RESULTS).read_bytes() == before


def test_the_order_of_the_arms_is_drawn_per_turn_and_repetition(published: Path) -> None:
    """Each of the three comes first somewhere, so that a drifting machine favours none."""
    from quasar.experiment.decoder import PromptDecoder

    (config,) = [read_config(run.folder / "config.yaml") for run in all_runs(published.parent)][:1]
    decoder = PromptDecoder(OmegaConf.create(config), None, None, None)  # type: ignore[arg-type]
    names = ["pair", "ar_same", "ar_ref"]
    orders = [decoder._drawn_order(names, f"math/{number}") for number in range(30)]
    assert {order[0] for order in orders} == set(names)
    assert orders[3] == decoder._drawn_order(names, "math/3")
    assert any(order != decoder._drawn_order(names, f"math/{number} #1") for number, order in enumerate(orders))


def test_agreement_compares_intervals(published: Path) -> None:
    rows = read_rows(published / RESULTS)
    found = agreements(rows, rows, ["reference_text_speedup"])
    assert [entry.overlaps for entry in found] == [True] * len(found)
    slower = rows.assign(text_ms=rows["text_ms"] * 100)
    assert {entry.overlaps for entry in agreements(rows, slower, ["reference_text_speedup"])} == {False}


def test_an_unknown_experiment_is_refused() -> None:
    with pytest.raises(RequestError, match=r"experiment=nosuch: not in conf/experiment; choose one of .*main_table"):
        reproduction.load_experiment("nosuch")


@pytest.mark.parametrize("folder", reproduction.committed_folders(), ids=lambda folder: folder.name)
def test_committed_tables_and_figures_are_those_of_their_results(folder: Path, tmp_path: Path) -> None:
    experiment = reproduction.load_experiment(folder.name)
    rows, provenance = read_rows(folder / RESULTS), read_provenance(folder / "environment.json")
    assert shortcomings(rows, read_published_passes(folder), provenance, experiment) == []
    for name in (RESULTS, PASSES, "environment.json"):
        if (folder / name).exists():
            (tmp_path / name).write_bytes((folder / name).read_bytes())
    for file in redraw(tmp_path, experiment.publish):
        if file.suffix in (".md", ".svg"):
            assert file.read_text(encoding="utf-8") == (folder / file.name).read_text(encoding="utf-8"), file.name


@pytest.mark.parametrize("file", reproduction.readmes(), ids=str)
def test_tables_in_readmes_are_those_of_the_results(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert refreshed(text, Path()) == text
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        assert (file.parent / picture).is_file(), picture


def test_a_table_is_copied_into_its_place(tmp_path: Path) -> None:
    (tmp_path / "table.md").write_text("# x\n\n## Speed\n\n| a |\n| --- |\n| 1 |\n\n## Other\n\n| b |\n")
    text = "before\n<!-- table: table.md, Speed -->\nold\n<!-- end -->\nafter\n"
    copied = "before\n<!-- table: table.md, Speed -->\n\n| a |\n| --- |\n| 1 |\n\n<!-- end -->\nafter\n"
    assert refreshed(text, tmp_path) == copied
    assert refreshed(copied, tmp_path) == copied
    with pytest.raises(RequestError, match="has no section 'Nothing'"):
        refreshed(text.replace("Speed", "Nothing"), tmp_path)
    with pytest.raises(RequestError, match=r"none\.md: cannot be read"):
        refreshed(text.replace("table.md", "none.md"), tmp_path)


def test_a_cell_is_copied_into_its_place(tmp_path: Path) -> None:
    folder = tmp_path / "experiments" / "speed"
    folder.mkdir(parents=True)
    quantities = "| arm | KL |\n| --- | ---: |\n| int4, 8-bit head | 0.14 (0.13 to 0.15) |"
    (folder / "table.md").write_text(f"# x\n\n{quantities}\n\n| arm | KL |\n| --- | --- |\n| x | 2 |\n")
    text = (
        "| KL <!-- cell: speed; int4, 8-bit head; KL -->old<!-- end --> | <!-- cell: speed; x; KL --><!-- end --> |\n"
    )
    copied = text.replace("old", "0.14 (0.13 to 0.15)").replace("x; KL -->", "x; KL -->2")
    assert refreshed(text, tmp_path) == copied
    assert refreshed(copied, tmp_path) == copied
    with pytest.raises(RequestError, match="has no arm 'x' with a column 'τ'"):
        refreshed(text.replace("x; KL", "x; τ"), tmp_path)


def test_a_cell_of_an_arm_with_several_rows_is_named_by_its_second_column_too(tmp_path: Path) -> None:
    folder = tmp_path / "experiments" / "length"
    folder.mkdir(parents=True)
    rows = "| int8 | 3 | 1.4 |\n| int8 | auto | 1.5 |"
    (folder / "table.md").write_text(f"| arm | draft tokens | τ |\n| --- | --- | --- |\n{rows}\n")
    assert table_cell(tmp_path, "length", "int8, draft tokens auto", "τ") == "1.5"
    assert table_cell(tmp_path, "length", "int8", "τ") == "1.4"
    with pytest.raises(RequestError, match="has no arm 'int8, draft tokens 4'"):
        table_cell(tmp_path, "length", "int8, draft tokens 4", "τ")


def test_metrics_and_quantities_of_one_name_have_one_format() -> None:
    for name, quantity in QUANTITIES.items():
        try:
            metric = named(name)
        except KeyError:
            continue
        assert metric.text(0.256) == quantity.form(0.256) or quantity.form(0.256).endswith("%"), name
