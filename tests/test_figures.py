"""Figures of an experiment: they show its estimates, are the same at every redraw, and say why one cannot be drawn."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from quasar.errors import RequestError
from quasar.results.figures import FIGURES, draw, draw_all, named, picture, style
from quasar.results.figures.arms import Arms, in_common_setting, largest
from quasar.results.figures.fidelity import pareto_front
from quasar.results.figures.interaction import interactions
from quasar.results.figures.marks import Name, name_points, ratio_ticks, spread
from quasar.results.figures.speed import analytic_optimum
from quasar.results.intervals import Estimate
from quasar.results.quantities import QUANTITIES, conditional_acceptance
from tests.synthetic import LENGTHS, MAIN, MATRIX, STRENGTHS, SyntheticArm, experiment_rows, synthetic_provenance

FAMILIES = ("math", "chat")
ARMS = MAIN[:4]
"""Autoregressive decoding, and an n-gram drafter with three verifiers."""


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    return experiment_rows(ARMS, FAMILIES, prompts=4)


def of(rows: pd.DataFrame, arm: SyntheticArm, quantity: str, family: str | None = None) -> Estimate:
    """The estimate of a quantity, as a table would show it."""
    own = rows[rows["arm"] == arm.name]
    found = QUANTITIES[quantity].of(own if family is None else own[own["family"] == family], rows)
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    return found


def lines(drawn: style.Picture, panel: int = 0) -> list[list[tuple[float, float]]]:
    """The points of every line of a panel."""
    return [
        [(round(float(x), 9), round(float(y), 9)) for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)]
        for line in drawn.axes[panel].lines
    ]


def texts(drawn: style.Picture) -> str:
    """All words of a figure, joined by spaces."""
    found = [text.get_text() for text in drawn.findobj(lambda artist: hasattr(artist, "get_text"))]
    return " ".join(" ".join(found).split())


def at(*points: tuple[float, float]) -> list[tuple[float, float]]:
    return [(round(x, 9), round(y, 9)) for x, y in points]


def test_points_and_intervals_are_the_estimates(rows: pd.DataFrame) -> None:
    found = lines(picture("inflation", rows, synthetic_provenance()))
    for arm in ARMS[2:]:
        kl, free, forced = (
            of(rows, arm, name) for name in ("kl_to_reference", "mean_acceptance_length", "mean_acceptance_length_ref")
        )
        for length in (free, forced):
            assert at((kl.value, length.value)) in found
            assert at((kl.value, length.low), (kl.value, length.high)) in found
            assert at((kl.low, length.value), (kl.high, length.value)) in found
    assert len([line for line in found if len(line) == 1]) == 4, "the reference's KL is 0, which has no place there"


def test_speedups_of_tasks_are_those_of_their_prompts(rows: pd.DataFrame) -> None:
    heights = {point[1] for line in lines(picture("speedup_by_task", rows, synthetic_provenance())) for point in line}
    for arm in ARMS[1:]:
        for family in FAMILIES:
            found = of(rows, arm, "reference_text_speedup", family)
            assert {round(value, 9) for value in (found.value, found.low, found.high)} <= heights
        for mean in ("reference_text_speedup", "reference_text_speedup_by_family"):
            assert round(of(rows, arm, mean).value, 9) in heights


def test_sampled_arms_have_a_panel_with_their_free_running_speedups(rows: pd.DataFrame) -> None:
    greedy = [arm.name for arm in ARMS[2:3]]  # slower than the last, so that its panel alone would be lower
    sampled = rows[rows["arm"].isin(greedy)].assign(temperature=1.0, text_ms=None, text_ar_ref_ms=None)
    sampled["arm"] += ", T = 1"
    both = pd.concat([rows, sampled], ignore_index=True)
    drawn = picture("speedup_by_task", both, synthetic_provenance())
    upper, lower = drawn.axes
    low, high = upper.get_ylim()
    assert (low, high) == lower.get_ylim()
    assert all(low <= height <= high for axes in drawn.axes for line in axes.lines[:-1] for height in line.get_ydata())
    heights = {round(float(value), 9) for line in lower.lines for value in line.get_ydata()}
    for name in greedy:
        found = sampled[sampled["arm"] == f"{name}, T = 1"]
        for mean in ("speedup_vs_ar_ref", "speedup_vs_ar_ref_by_family"):
            assert round(QUANTITIES[mean].of(found, both).value, 9) in heights
        free = QUANTITIES["speedup_vs_ar_ref"]
        alone = [free.of(found[found["family"] == family], both).value for family in FAMILIES]
        mean_of_families = QUANTITIES["speedup_vs_ar_ref_by_family"].of(found, both).value
        assert mean_of_families == pytest.approx(sum(alone) / len(alone))
    names = [text.get_text() for text in drawn.axes[0].get_legend().get_texts()]
    assert names == [arm.name for arm in ARMS[1:]]


def test_the_fastest_arm_is_the_highest_row(rows: pd.DataFrame) -> None:
    drawn = picture("speedup", rows, synthetic_provenance())
    names = [label.get_text() for label in drawn.axes[0].get_yticklabels()]
    assert names == ["n-gram + int4", "n-gram + int8 (paper)", "n-gram + fp16"]
    best = of(rows, ARMS[3], "reference_text_speedup")
    assert at((best.value, -0.15)) in lines(drawn)


def test_the_bars_of_a_gain_multiply_to_the_speedup(rows: pd.DataFrame) -> None:
    bars = picture("waterfall", rows, synthetic_provenance()).axes[0].patches
    first, second, third, both = bars[:4]
    assert first.get_x() == 1
    for before, after in ((first, second), (second, third)):
        assert after.get_x() == pytest.approx(before.get_x() + before.get_width())
    assert both.get_width() == pytest.approx(of(rows, ARMS[2], "reference_text_speedup").value - 1)
    assert third.get_x() + third.get_width() == pytest.approx(1 + both.get_width())


def test_positions_are_conditional_on_the_position_before(rows: pd.DataFrame) -> None:
    found = lines(picture("positions", rows, synthetic_provenance()))
    own = rows[rows["arm"] == ARMS[1].name]
    shares = [
        sum(counts[place] for counts in own["accepted_by_position"])
        / sum(counts[place] for counts in own["reached_by_position"])
        for place in range(5)
    ]
    assert at(*enumerate(shares, start=1)) in found
    estimate = conditional_acceptance(2).of(own)
    assert estimate is not None
    assert estimate.value == pytest.approx(shares[1])


def test_break_even_is_where_the_acceptance_length_equals_the_need(rows: pd.DataFrame) -> None:
    for arm in ARMS[1:]:
        needed, reached, speedup = (
            of(rows, arm, name).value
            for name in ("break_even_acceptance_length", "mean_acceptance_length_ref", "reference_text_speedup")
        )
        assert reached / needed == pytest.approx(speedup)
        assert at((needed, reached)) in lines(picture("break_even", rows, synthetic_provenance()))


def test_draft_lengths_show_every_length_and_auto() -> None:
    rows = experiment_rows([replace(arm, acceptance=arm.acceptance) for arm in LENGTHS[:7]], FAMILIES, prompts=3)
    drawn = picture("draft_length", rows, synthetic_provenance())
    curve = next(line for line in lines(drawn) if len(line) == 6)
    assert [x for x, _ in curve] == [1, 2, 3, 5, 8, 12]
    assert curve[2][1] == pytest.approx(of(rows, LENGTHS[2], "reference_text_speedup").value)
    assert "auto" in texts(drawn)


def test_the_analytic_optimum_weighs_expected_tokens_against_the_time_of_a_step() -> None:
    rows = experiment_rows(
        [replace(arm, acceptance=(0.45,) * len(arm.acceptance)) for arm in LENGTHS[:7]], FAMILIES, prompts=3
    )
    arms = Arms(rows)
    lengths = [arm for arm in arms.all if arm.draft_tokens.isdigit()]
    # (1 - 0.45^(γ+1)) / 0.55 tokens in 1 + 0.03 γ: 1.41, 1.56, 1.60, 1.57, 1.46, 1.34 for γ = 1, 2, 3, 5, 8, 12.
    assert analytic_optimum(arms, lengths) == 3
    assert analytic_optimum(arms, lengths[1:]) is None
    drawn = picture("draft_length", rows, synthetic_provenance())
    triangles = [line.get_xdata() for line in drawn.axes[0].lines if line.get_marker() == "^"]
    assert triangles == [[3]]


def test_an_interaction_is_framed_and_none_is_invented() -> None:
    chosen = [arm for arm in MATRIX if arm.drafter in ("ngram", "layerskip") and arm.verifier != "pruned"]
    rows = experiment_rows(chosen, FAMILIES, prompts=6)
    arms = Arms(rows)
    cells = {cell.arm.name: cell for cell in interactions(arms, arms.all, "reference_text_speedup")}
    assert cells["int4, layerskip"].significant
    assert cells["int4, layerskip"].deviation.value < 1
    # Two drafters and three verifiers: the slowdown of 1.2 of one cell is shared by its row and its column.
    assert cells["int4, layerskip"].deviation.value == pytest.approx(1.2 ** (-1 / 2 * 2 / 3), rel=0.03)
    total = sum(math.log(cell.deviation.value) for cell in cells.values())
    assert total == pytest.approx(0, abs=1e-9)
    forced = interactions(arms, arms.all, "mean_acceptance_length_ref")
    assert not any(cell.significant for cell in forced)
    drawn = picture("matrices", rows, synthetic_provenance())
    frames = [patch for patch in drawn.axes[0].patches if patch.get_linewidth() == 1.2]
    assert len(frames) == sum(cell.significant for cell in cells.values())


def test_cells_of_exactness_say_how_many_outputs_are_equal_and_where_others_part() -> None:
    arms = [replace(ARMS[1], divergent=0.5), replace(ARMS[1], drafter="lookahead"), ARMS[2]]
    rows = experiment_rows(arms, FAMILIES, prompts=4, repetitions=1)
    drawn = picture("exactness", rows, synthetic_provenance())
    differing = rows["first_divergence"].dropna().astype(int)
    count = 4 * len(FAMILIES)
    assert len(differing)
    cells = [text.get_text() for text in drawn.axes[0].texts]
    assert cells == [
        f"{count - len(differing)} of {count}\nfrom {differing.min()}",
        f"{count} of {count}",
        f"{count} of {count}",
    ]
    unequal, equal, other = (patch.get_facecolor() for patch in drawn.axes[0].patches)
    assert equal == other != unequal
    assert f"{3 * count - len(differing)} of {3 * count} outputs, {rows['tokens'].sum()} tokens in all" in texts(drawn)


def test_parts_of_a_step_add_up(rows: pd.DataFrame) -> None:
    bars = picture("step", rows, synthetic_provenance()).axes[0].patches
    count = len(ARMS)
    fastest = of(rows, ARMS[3], "step_ms")
    assert sum(bar.get_width() for bar in bars[::count][:3]) == pytest.approx(fastest.value)


def test_the_front_holds_what_no_other_beats_in_both() -> None:
    assert pareto_front([1, 2, 3], [5, 7, 4]) == [0, 2]
    assert pareto_front([3, 1, 1], [1, 2, 3]) == [1, 0]
    assert pareto_front([], []) == []


def test_pruned_verifiers_are_joined_with_those_of_equal_bytes() -> None:
    arms = [arm for arm in STRENGTHS if arm.name in ("pruned 50 %", "int8 8-bit head", "bnb NF4")]
    rows = experiment_rows(arms, FAMILIES, prompts=3)
    dotted = [
        line for line in picture("pareto", rows, synthetic_provenance()).axes[0].lines if line.get_linestyle() == ":"
    ]
    assert len(dotted) == 1
    assert sorted(float(y) for y in dotted[0].get_ydata()) == pytest.approx(
        sorted(of(rows, arm, "kl_to_reference").value for arm in arms[:2])
    )


def test_redrawing_gives_the_same_bytes(rows: pd.DataFrame, tmp_path: Path) -> None:
    names = ["inflation", "waterfall"]
    first, again = (draw(names, rows, synthetic_provenance(), tmp_path / folder) for folder in ("first", "again"))
    assert [file.name for file in first] == [f"{name}.{form}" for name in names for form in style.FORMATS]
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in again]
    # Rows that were stored and read again give the same figure.
    rows.to_parquet(tmp_path / "results.parquet")
    stored = draw(names, pd.read_parquet(tmp_path / "results.parquet"), synthetic_provenance(), tmp_path / "stored")
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in stored]


def test_a_figure_ends_in_its_origin_and_answers_its_question(rows: pd.DataFrame) -> None:
    provenance = synthetic_provenance(prompts=8)
    words = texts(picture("pareto", rows, provenance))
    for sentence in provenance.sentences():
        assert sentence in words
    assert named("pareto").title in words


def test_a_notebook_shows_a_figure_as_a_picture(rows: pd.DataFrame) -> None:
    drawn = picture("step", rows, synthetic_provenance())
    assert drawn._repr_png_().startswith(b"\x89PNG")
    assert drawn._repr_png_() == drawn._repr_png_()


def test_what_was_not_measured_is_absent(rows: pd.DataFrame, tmp_path: Path) -> None:
    unmeasured = rows.copy()
    unmeasured.loc[unmeasured["arm"] == ARMS[3].name, ["kl", "scored"]] = None
    words = texts(picture("inflation", unmeasured, synthetic_provenance()))
    assert ARMS[2].name in words
    assert ARMS[3].name not in words
    timed = ["text_ms", "text_ar_same_ms", "text_ar_ref_ms", "kl"]
    files = draw_all(unmeasured.assign(**dict.fromkeys(timed)), synthetic_provenance(), tmp_path)
    assert [file.stem for file in files[::3]] == ["step", "exactness", "positions"]


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("speedup", {"text_ms": None}, "speedup: no row has text_ms"),
        ("inflation", {"kl": 0.0}, "inflation: every verifier's KL is 0"),
        ("draft_length", {}, "draft_length: no arm of the kind that it shows has speedup"),
        ("draft_length", {"draft_tokens": "3"}, "with several fixed draft lengths"),
        ("matrices", {}, "matrices: it needs at least two drafters"),
        ("speedup_by_task", {"family": "one"}, "the prompts are of one task family"),
        ("waterfall", {"verifier": "int8"}, "waterfall: no arm of the kind that it shows has "),
        ("sunrise", {}, "figure 'sunrise' does not exist; choose one of speedup, "),
    ],
)
def test_a_figure_that_cannot_be_drawn_says_why(
    rows: pd.DataFrame, name: str, change: dict[str, object], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=reason):
        draw([name], rows.assign(**change), synthetic_provenance(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_no_figure_at_all_is_an_error_with_every_reason(rows: pd.DataFrame, tmp_path: Path) -> None:
    bare = rows[["arm", "verifier", "drafter", "temperature", "max_new_tokens", "draft_tokens", "weight_bytes"]]
    with pytest.raises(RequestError, match="no figure can be drawn: speedup: no row has text_ms, ") as error:
        draw_all(bare.assign(family="one"), synthetic_provenance(), tmp_path)
    assert all(f"{figure.name}: " in str(error.value) for figure in FIGURES)


def test_only_arms_of_one_setting_are_compared() -> None:
    arms = Arms(experiment_rows([*ARMS, replace(ARMS[1], temperature=1.0)], FAMILIES, prompts=2, repetitions=1))
    kept, note = in_common_setting(arms.all)
    assert [arm.plain_name for arm in kept] == [arm.name for arm in ARMS]
    assert note == "T = 0, at most 128 tokens"
    assert [arm.name for arm in arms.all if arm.plain_name == "n-gram + fp16"] == [
        "n-gram + fp16, T = 0",
        "n-gram + fp16, T = 1",
    ]
    some, left_out = largest(arms.all, 2, lambda arm: arm.weight_bytes)
    assert [arm.plain_name for arm in some] == ["AR", "n-gram + fp16"]
    assert left_out == "the 2 fastest of 5 arms"


def test_arms_that_share_verifier_and_drafter_look_different() -> None:
    again = [replace(ARMS[2], name="another"), replace(ARMS[2], name="smaller", megabytes=100)]
    arms = Arms(experiment_rows([*ARMS, *again], FAMILIES, prompts=1, repetitions=1)).all
    assert len({arm.look for arm in arms}) == len(arms)
    assert arms[2].look.fill == "full"
    assert style.verifier_family("bnb_nf4") == "bnb"


def test_ticks_of_ratios_are_round_and_include_one() -> None:
    assert ratio_ticks(0.8, 1.7) == [0.8, 1.0, 1.2, 1.4, 1.6]
    assert ratio_ticks(0.97, 1.21) == [1.0, 1.05, 1.1, 1.15, 1.2]
    assert ratio_ticks(0.9, 4.2) == [1, 2, 3, 4]


def test_names_at_ends_are_moved_apart() -> None:
    assert spread([0, 1, 10], 3) == [-1, 2, 10]
    assert spread([0, 0, 1, 1], 2) == [-2.5, -0.5, 1.5, 3.5]
    assert spread([], 2) == []


def test_names_of_crowded_points_stay_inside_of_the_axes() -> None:
    """A figure may end where its axes do, and would cut a name that goes on."""
    drawn = Figure(figsize=(3.3, 2.9))
    canvas = FigureCanvasAgg(drawn)
    axes = drawn.subplots()
    axes.set(xlim=(0, 270), ylim=(1.0, 2.1))
    points = [(230.0 + 3 * number, 1.05 + 0.03 * (number % 5)) for number in range(10)]
    for x, y in points:
        axes.plot([x, x], [y - 0.05, y + 0.05])
    name_points(axes, [Name(f"depth {number} % and more", *place, "#000000") for number, place in enumerate(points)])
    drawn.draw_without_rendering()
    written = [text for text in axes.findobj(Annotation) if text.get_text()]
    assert len(written) == len(points)
    inside = axes.get_window_extent()
    for text in written:
        box = text.get_window_extent(canvas.get_renderer())
        assert inside.x0 <= box.x0, text.get_text()
        assert box.x1 <= inside.x1, text.get_text()
