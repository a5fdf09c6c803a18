"""Figures of runs: they show the table's values, are the same at every redraw, and refuse what cannot be compared."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from quasar.results.figures.runs import FIGURES, draw_all, labels, pareto_front

from quasar.errors import RequestError
from quasar.results.figures import style


def runs(**others: object) -> pd.DataFrame:
    """Two finished runs with every metric that a figure needs."""
    columns: dict[str, object] = {
        "run": ["0", "1"],
        "status": "done",
        "code_version": "abc",
        "machine": "here",
        "model": "tiny",
        "model_origin": "random weights, seed 0",
        "weights_on_grid": 0.5,
        "prompts": 5,
        "verifier": ["int8", "pruned"],
        "drafter": "ngram",
        "kl_to_reference": [0.01, 0.5],
        "mean_acceptance_length": [1.5, 2.5],
        "mean_acceptance_length_ref": [1.4, 1.1],
        "bytes_per_step": [2e6, 1.5e6],
        "reference_text_speedup": [1.6, 1.2],
        "reference_text_speedup_ci95_low": [1.5, 1.1],
        "reference_text_speedup_ci95_high": [1.7, 1.3],
        "acceptance_by_position": [[0.8, 0.6], [0.5]],
        "draft_ms": [0.1, 0.2],
        "verify_ms": [2.0, 3.0],
        "overhead_ms": [0.3, 0.1],
    }
    return pd.DataFrame({**columns, **others})


def drawn(name: str) -> list[tuple[list[float], list[float]]]:
    """The (x, y) values of the lines of a figure."""
    figure = next(figure for figure in FIGURES if figure.name == name)
    with style.canvas("title", ["footer"], 2.4) as (_, axes):
        figure.draw(axes, runs(label=["int8", "pruned"]))
        return [(list(map(float, line.get_xdata())), list(map(float, line.get_ydata()))) for line in axes.lines]


def test_figures_show_the_values_of_the_table() -> None:
    inflation = drawn("inflation")
    for kl, free, forced in ((0.01, 1.5, 1.4), (0.5, 2.5, 1.1)):
        assert ([kl], [free]) in inflation
        assert ([kl], [forced]) in inflation
    assert ([1.5, 2.0], [0.5, 0.01]) in drawn("pareto")
    # The fastest is the highest row.
    assert [line for line in drawn("speedup") if line[1] == [1.0]] == [([1.6], [1.0])]
    assert ([1.5, 1.7], [1.0, 1.0]) in drawn("speedup")
    assert ([1.0, 2.0], [0.8, 0.6]) in drawn("positions")


def test_redrawing_gives_the_same_bytes(tmp_path: Path) -> None:
    first, again = draw_all(runs(), tmp_path / "first"), draw_all(runs(), tmp_path / "again")
    assert [file.name for file in first] == [
        f"{figure.name}.{form}" for figure in FIGURES for form in ("pdf", "svg", "png")
    ]
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in again]


def test_a_figure_ends_in_its_origin(tmp_path: Path) -> None:
    draw_all(runs(), tmp_path)
    text = " ".join((tmp_path / "pareto.svg").read_text().split())
    for part in ("code abc", "here", "random weights, seed 0", "50% of its weights", "n = 5 prompts"):
        assert part in text


def test_only_what_was_measured_is_drawn(tmp_path: Path) -> None:
    table = runs(kl_to_reference=[None, None], draft_ms=[0.1, None]).drop(columns="reference_text_speedup")
    files = draw_all(table, tmp_path)
    assert [file.stem for file in files[::3]] == ["positions", "step"]
    assert "pruned" not in (tmp_path / "step.svg").read_text()
    nothing = table.drop(columns=["acceptance_by_position", "verify_ms"])
    with pytest.raises(RequestError, match=r"no figure can be drawn: .*inflation: kl_to_reference, "):
        draw_all(nothing, tmp_path)


def test_the_reference_has_no_place_on_a_logarithmic_axis(tmp_path: Path) -> None:
    files = draw_all(runs(kl_to_reference=[0.0, 0.0]), tmp_path)
    assert [file.stem for file in files[::3]] == ["speedup", "positions", "step"]
    draw_all(runs(kl_to_reference=[0.0, 0.5]), tmp_path)
    text = (tmp_path / "pareto.svg").read_text()
    assert "pruned" in text
    assert "int8" not in text


def test_runs_of_an_earlier_version_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="do not say their model_origin: an earlier version"):
        draw_all(runs().drop(columns="model_origin"), tmp_path)


@pytest.mark.parametrize(
    ("others", "reason"),
    [
        ({"status": ["done", "partial"]}, r"1 of 2 runs are not done: 1 \(partial\); finish"),
        ({"code_version": ["abc", "def"]}, "several code versions: abc; def; draw each"),
        ({"code_version": "abc + def"}, r"several code versions: abc \+ def"),
        ({"machine": ["here", "there"]}, "several machines: here; there"),
        ({"model_origin": ["a", "b"]}, "several model origins: a; b"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(others: dict[str, object], reason: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=reason):
        draw_all(runs(**others), tmp_path)
    assert not list(tmp_path.iterdir())


def test_labels_name_the_options_in_which_runs_of_a_pair_differ() -> None:
    options = {"verifier.ratio": [None, 0.1], "verifier.method": ["rtn", "width"]}
    assert labels(runs(**options)) == ["int8", "pruned"]
    options["verifier.ratio"] = [0.3, 0.1]
    assert labels(runs(verifier="pruned", **options)) == [
        "pruned, ratio=0.3, method=rtn",
        "pruned, ratio=0.1, method=width",
    ]
    assert labels(runs(drafter=["ngram", "none"])) == ["int8, ngram", "pruned, none"]


def test_the_front_holds_what_no_other_beats_in_both() -> None:
    assert pareto_front([1, 2, 3], [5, 7, 4]) == [0, 2]
    assert pareto_front([3, 1, 1], [1, 2, 3]) == [1, 0]
    assert pareto_front([], []) == []
