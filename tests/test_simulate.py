"""Simulated decoding against real decoding with the model, step by step, and the tables of its results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from quasar.decoding.acceptance import Greedy
from quasar.decoding.draft import MAX_ROWS, Draft
from quasar.decoding.loop import Generation, decode
from quasar.decoding.sampling import Sampling
from quasar.decoding.stopping import Limits
from quasar.drafters._pass_cost import PassCost
from quasar.drafters.base import Drafter
from quasar.drafters.lookahead import LookaheadDrafter
from quasar.drafters.mixture import MixtureDrafter
from quasar.drafters.ngram import NgramDrafter
from quasar.drafters.none import NoneDrafter
from quasar.drafters.recycling import RecyclingDrafter
from quasar.drafters.suffix_automaton import SuffixAutomatonDrafter
from quasar.errors import RequestError
from quasar.evaluation.recording import TOP, RecordedVerifier, Rows
from quasar.experiment import reproduce as reproduction
from quasar.experiment import simulate as simulation
from quasar.experiment.simulate import Request, simulate
from quasar.model.loading import random_transformer, tiny_config
from quasar.results.console import Reporter
from quasar.results.provenance import Provenance, read_provenance
from quasar.results.rows import read_rows
from quasar.results.simulation import SIMULATION, Simulated, simulation_document
from quasar.verifiers.base import Setup, Verifier
from quasar.verifiers.fp16 import FP16Verifier

VOCABULARY = 48
COST = PassCost((1, MAX_ROWS), (1,), ((1.0, 1.0 + 0.03 * (MAX_ROWS - 1)),))


def priced(drafter: MixtureDrafter | RecyclingDrafter) -> Drafter:
    drafter.use(COST)
    return drafter


DRAFTERS: dict[str, Callable[[], Drafter]] = {
    "ngram": NgramDrafter,
    "suffix_automaton": SuffixAutomatonDrafter,
    "recycling": lambda: priced(RecyclingDrafter()),
    "mixture": lambda: priced(MixtureDrafter()),
    "mixture, session": lambda: priced(MixtureDrafter(memory="session")),
}


def fp16() -> FP16Verifier:
    model = random_transformer(tiny_config(vocab_size=VOCABULARY, num_layers=2), 3, torch.bfloat16)
    return FP16Verifier(model, Setup())


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, VOCABULARY, (12,), generator=generator).tolist() for _ in range(3)]


def decoded(drafter: Drafter, verifier: Verifier, length: int = 60) -> list[Generation]:
    limits = Limits(length, 2048, frozenset())
    drafter.start([])
    return [decode(prompt, drafter, verifier, Greedy(), Sampling(), limits, torch.Generator()) for prompt in prompts()]


def counts(generation: Generation) -> tuple[list[int], ...]:
    return generation.tokens, generation.drafted, generation.accepted, generation.emitted


@pytest.mark.parametrize("name", DRAFTERS)
def test_simulated_steps_are_those_of_a_run(name: str, tmp_path: Path) -> None:
    """Rows that are recorded, rows that are new, and rows that an earlier process has recorded give the same steps."""
    expected = decoded(DRAFTERS[name](), fp16())
    recorded = RecordedVerifier(tmp_path, fp16)
    decoded(NoneDrafter(), recorded)
    before = recorded.computed
    found = decoded(DRAFTERS[name](), recorded)
    recorded.save()

    def no_model() -> Verifier:
        raise AssertionError("every row is recorded")

    again = decoded(DRAFTERS[name](), RecordedVerifier(tmp_path, no_model))
    assert recorded.computed > before
    for one, other, third in zip(expected, found, again, strict=True):
        assert counts(other) == counts(third) == counts(one)
    assert sum(sum(one.accepted) for one in expected) > 20
    assert any(one.accepted != one.drafted for one in expected)


def test_a_recorded_pass_has_the_most_likely_tokens_of_every_row(tmp_path: Path) -> None:
    """A tree whose branches leave the answer, against a pass of the model itself."""
    prompt, draft = torch.tensor(prompts()[0]), Draft([1, 2, 3, 4], [-1, 0, -1, 2])
    recorded, verifier = RecordedVerifier(tmp_path, fp16), fp16()
    for one in (recorded, verifier):
        last = one.prefill(prompt).argmax()[0]
        one.verify(last, Draft())
        one.keep([])
    expected, found = verifier.verify(5, draft), recorded.verify(5, draft)
    for row in range(5):
        top = found.logits[row].topk(TOP)
        assert top.values.tolist() == pytest.approx(expected.logits[row].float().topk(TOP).values.tolist(), rel=1e-6)
        assert expected.logits[row][top.indices].float().tolist() == pytest.approx(top.values.tolist(), rel=1e-6)
        assert bool((top.values.diff() < 0).all())
        assert int(found.logits[row].isfinite().sum()) == TOP
    assert found.argmax() == expected.argmax()
    computed = recorded.computed
    # The same sequences in other trees: rows are found by the tokens before them, wherever they are in the draft.
    for tokens, parents, rows in (([3, 1, 4, 2], [-1, -1, 0, 1], [0, 3, 1, 4, 2]), ([3, 4], [-1, 0], [0, 3, 4])):
        other = recorded.verify(5, Draft(tokens, parents))
        assert recorded.computed == computed
        assert other.logits.equal(found.logits[rows])


def test_equal_logits_keep_their_order() -> None:
    rows = Rows()
    logits = torch.full((VOCABULARY,), -1.0)
    logits[[3, 7, 9]] = 2.0
    rows.add(-1, -1, 3, logits)
    assert rows.best == [3]
    assert rows.top[0] == logits.topk(TOP).indices.tolist()
    assert rows.logits[0][0] == 2.0
    assert all(np.diff(rows.logits[0]) < 0)


def test_scratch_rows_and_damaged_recordings_are_refused(tmp_path: Path) -> None:
    recorded = RecordedVerifier(tmp_path, fp16)
    with pytest.raises(RequestError, match="scratch rows, which are not recorded"):
        decoded(LookaheadDrafter(window=3), recorded)
    decoded(NoneDrafter(), recorded)
    recorded.save()
    for file in tmp_path.glob("*.npz"):
        file.write_bytes(b"nothing")
    with pytest.raises(RequestError, match=r"\.npz: not a recording"):
        decoded(NoneDrafter(), RecordedVerifier(tmp_path, fp16))


COMMON = ["model=tiny", "verifier=fp16", "data.limit=1", "decode.max_new_tokens=16", "threads=1", "device=cpu"]


def test_the_command_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    drafters = ["drafter=none", "drafter=ngram decode.draft_tokens=3", "drafter=ngram decode.draft_tokens=auto"]
    request = Request(drafters, [0.1, 0.0], COMMON, output=tmp_path / "out")
    rows = simulate(request, Reporter())
    assert len(rows) == 2 * 3 * 5
    none = rows[rows.drafter == "drafter=none"]
    assert (none.emitted == none.time).all()  # one token per pass, a pass of one row takes 1
    fixed = rows[rows.drafter == drafters[1]]
    assert np.allclose(fixed.time, fixed.steps + fixed.slope * fixed.drafted)
    assert np.allclose(fixed.oracle_time, fixed.steps + fixed.slope * fixed.accepted)
    assert (rows.emitted == rows.steps + rows.accepted).all()
    assert rows.groupby("question").emitted.nunique().max() == 1  # the answers are the same
    monkeypatch.setattr(simulation, "build_alone", None)  # every row is recorded
    assert simulate(request, Reporter()).equals(rows)
    written = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert written == ["environment.json", "simulation.parquet", "table.md"]
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    others = simulate(Request(drafters[:1], [0.0], COMMON, skip=1), Reporter())
    assert len(others) == 5
    assert not set(others.question) & set(rows.question)


def test_recordings_belong_to_the_code_that_made_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for versions, code in ((1, "the first"), (1, "the first"), (2, "the second")):
        monkeypatch.setattr("quasar.cache.code_version", lambda code=code: code)
        simulate(Request(["drafter=none"], [0.0], COMMON), Reporter())
        assert len(list(simulation.RECORDINGS.iterdir())) == versions


def test_tables_are_means_over_families() -> None:
    columns = [field.name for field in fields(Simulated)]
    values = [
        ["a", 0.1, "code", "1", 10, 20, 30, 10, 13.0, 11.0],
        ["a", 0.1, "math", "2", 10, 10, 0, 0, 10.0, 10.0],
        ["b", 0.1, "code", "1", 5, 20, 50, 15, 10.0, 6.5],
        ["b", 0.1, "math", "2", 10, 10, 10, 0, 11.0, 10.0],
    ]
    origin = Provenance(
        *("v", "c" * 40, False, ("2026-01-01",), "m", "cpu", 1, "2", "tiny", "random", None, ("p",), 2, (1,), (9,)),
        *(False, 2),
    )
    text = simulation_document(pd.DataFrame(values, columns=columns), origin)
    a, b = 0.5 * (20 / 13 + 1), 0.5 * (2 + 10 / 11)
    lines = [[cell.strip().split(" (")[0] for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert ["a", f"{a:.3f}", "1.000", "1.50", "2.50", f"{21 / 23:.0%}"] in lines
    assert ["b", f"{b:.3f}", f"{b / a:.3f}", "2.50", "5.00", f"{16.5 / 21:.0%}"] in lines
    assert ["b", "2.00", "0.91"] in lines
    assert "commit cccccccccc" in text


@pytest.mark.parametrize("folder", reproduction.simulated_folders(), ids=lambda folder: folder.name)
def test_committed_tables_are_those_of_their_results(folder: Path) -> None:
    rows, provenance = read_rows(folder / SIMULATION), read_provenance(folder / "environment.json")
    assert (folder / "table.md").read_text(encoding="utf-8") == simulation_document(rows, provenance)
    assert provenance.git_commit
    assert not provenance.git_dirty


@pytest.mark.parametrize(
    ("drafter", "common", "message"),
    [
        ("drafter=ngram verifier=int8", [], "only drafter"),
        ("drafter=layerskip", [], "layerskip"),
        ("drafter=ngram", ["decode.temperature=1"], "greedy"),
        ("ngram", [], "no override"),
    ],
)
def test_what_cannot_be_simulated_is_refused(
    drafter: str, common: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match=message):
        simulate(Request([drafter], [0.1], [*COMMON, *common]), Reporter())
