"""Replaying a recorded acceptance trace."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from quasar.decoding.acceptance import Greedy
from quasar.decoding.draft import Context, Draft
from quasar.decoding.loop import decode
from quasar.decoding.sampling import Sampling
from quasar.decoding.scores import Scores
from quasar.decoding.stopping import Limits
from quasar.drafters._adaptive_length import AdaptiveLength
from quasar.drafters._pass_cost import PassCost
from quasar.drafters.base import Drafter
from quasar.drafters.chain import ChainDrafter
from quasar.drafters.replay import ReplayDrafter
from quasar.errors import RequestError
from quasar.experiment.main import main
from quasar.model.transformer import Transformer
from quasar.results.schema import SCHEMA_VERSION, VERSION_KEY, PromptRecord
from quasar.results.trace import read_trace
from quasar.verifiers.base import Setup
from quasar.verifiers.fp16 import FP16Verifier
from tests.records import turn


def write_trace(file: Path, *turns: tuple[int, list[int], list[int]]) -> Path:
    """Write a line per turn of (prompt tokens, drafted, accepted)."""
    records = [
        PromptRecord(str(number), "chat", [turn(drafted, accepted, tokens)])
        for number, (tokens, drafted, accepted) in enumerate(turns)
    ]
    file.write_text("".join(json.dumps(record.to_json()) + "\n" for record in records))
    return file


def test_decoding_follows_the_trace_whatever_the_verifier_says(tiny: Transformer, tmp_path: Path) -> None:
    """Also checks the cache: it must hold as many tokens as the recorded acceptance lets it."""
    trace = write_trace(tmp_path / "trace.jsonl", (50, [5], [5]), (6, [5, 0, 3, 2], [4, 0, 1, 0]))
    drafter = ReplayDrafter(trace=trace)
    verifier = FP16Verifier(tiny, Setup())
    limits = Limits(max_new_tokens=1 + 5 + 1 + 2 + 1 + 5, context_length=4096, stop_tokens=frozenset())
    prompt = [1, 2, 3, 4, 5]
    generation = decode(prompt, drafter, verifier, drafter.rule, Sampling(), limits, torch.Generator())
    assert generation.drafted == [5, 0, 3, 2, 4]  # the turn begins again, cut to the room that is left
    assert generation.accepted == [4, 0, 1, 0, 4]
    assert generation.emitted == [5, 1, 2, 1, 5]
    assert generation.context == [5, 10, 11, 13, 14]
    assert verifier.cache.length == 5 + 15 - 1


def test_the_bonus_token_is_the_verifiers_after_the_accepted_ones(tmp_path: Path) -> None:
    drafter = ReplayDrafter(trace=write_trace(tmp_path / "trace.jsonl", (3, [2], [1])))
    drafter.begin(torch.tensor([1, 2, 3]))
    context = Context([1, 2, 3, 9], 3, Sampling(), torch.Generator())
    draft = drafter.propose(context, 8)
    assert draft == Draft.chain([9, 9])
    logits = torch.tensor([[0.0, 1, 2, 9], [0, 9, 0, 0], [9, 0, 0, 0]])
    accepted = drafter.rule.accept(draft, Scores(logits), context)
    assert (accepted.path, accepted.bonus) == ([0], 1)
    alone = Draft(), Scores(logits[:1]), context
    assert drafter.rule.accept(*alone) == Greedy().accept(*alone)


def test_whole_run_is_labelled_simulated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], prompt_file: Path
) -> None:
    """The trace of a real run as input; the summary and the report say what the figures are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QUASAR_CACHE", str(tmp_path / "cache"))

    def start(*overrides: str) -> tuple[int, str]:
        common = ["model=tiny", "verifier=fp16", "data=specbench", f"data.path={prompt_file}", "threads=1"]
        common.append("decode.max_new_tokens=12")
        monkeypatch.setattr(sys, "argv", ["run.py", *common, *overrides])
        return main(), capfd.readouterr().out

    code, _ = start("drafter=ngram", "hydra.run.dir=recorded", "evaluate.baselines=false", "evaluate.fidelity=false")
    assert code == 0
    code, out = start("drafter=replay", "drafter.trace=recorded/generations.jsonl", "hydra.run.dir=replayed")
    assert code == 0
    recorded, replayed = (json.loads(Path(name, "summary.json").read_text()) for name in ("recorded", "replayed"))
    assert (recorded["simulated"], replayed["simulated"]) == (False, True)
    assert replayed["mean_acceptance_length"] == pytest.approx(recorded["mean_acceptance_length"], rel=0.3)
    for text_metric in (
        "exact_match_to_self",
        "exact_match_to_reference",
        "kl_to_reference",
        "distinct_4gram_ratio",
        "mean_acceptance_length_ref",
    ):
        assert replayed[text_metric] is None
    assert "SIMULATED" in out
    assert "(simulated acceptance)" in out


@pytest.mark.parametrize("decorated", ["drafter", "chain", "auto", "chain and auto"])
def test_decorators_keep_the_replayed_acceptance(decorated: str, tiny: Transformer, tmp_path: Path) -> None:
    """The verifier itself would accept none of these drafts."""
    trace = write_trace(tmp_path / "trace.jsonl", (5, [3], [2]))
    drafter: Drafter = ReplayDrafter(trace=trace)
    if "chain" in decorated:
        drafter = ChainDrafter([{"name": "replay", "trace": str(trace)}])
    if "auto" in decorated:
        drafter = AdaptiveLength(drafter, PassCost([1, 9], [100], [[10.0, 10.0]]), clock=lambda: 0.0)
    verifier = FP16Verifier(tiny, Setup())
    assert drafter.rule is not None
    limits = Limits(max_new_tokens=1 + 4 * 3, context_length=4096, stop_tokens=frozenset())
    generation = decode([1, 2, 3, 4, 5], drafter, verifier, drafter.rule, Sampling(), limits, torch.Generator())
    assert generation.drafted == [3, 3, 3, 2]  # the last one is cut to the room that is left
    assert generation.accepted == [2] * 4
    assert generation.emitted == [3] * 4


def test_a_chain_replays_only_the_drafts_of_its_replaying_member(tmp_path: Path) -> None:
    """N-gram has a draft for the repeated text, of which the greedy rule decides; replay has one elsewhere."""
    trace = write_trace(tmp_path / "trace.jsonl", (3, [2], [2]))
    chain = ChainDrafter(["ngram", {"name": "replay", "trace": str(trace)}])
    assert chain.rule is not None
    rejecting = torch.zeros(16, 10)
    rejecting[:, 0] = 1.0
    for prompt, accepted in (([1, 2, 3, 1, 2], 0), ([5, 6, 7], 2)):
        chain.begin(torch.tensor(prompt))
        context = Context([*prompt, 3], len(prompt), Sampling(), torch.Generator())
        draft = chain.propose(context, 2)
        assert len(draft)
        found = chain.rule.accept(draft, Scores(rejecting[: len(draft) + 1]), context)
        assert len(found.path) == accepted


WITHOUT_TURNS = json.dumps(PromptRecord("1", "chat", []).to_json()) + "\n"
UNFINISHED = json.dumps({VERSION_KEY: SCHEMA_VERSION, "question_id": 1}) + "\n"
LENGTHS = json.dumps(PromptRecord("1", "chat", [turn([1], [1])]).to_json()).replace('"accepted": [1]', '"accepted": []')


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"missing\.jsonl: cannot be read .*generations\.jsonl"),
        ("", "contains no decoding step"),
        (WITHOUT_TURNS, "contains no decoding step"),
        (WITHOUT_TURNS + "not json\n", "line 2: not a line of generations.jsonl"),
        (
            f'{{"schema_version": {SCHEMA_VERSION}, "question_id": 1}}\n',
            "line 1: not a line of generations.jsonl .*turns",
        ),
        ('{"question_id": 1, "turns": []}\n', "line 1: not a line of generations.jsonl .*no schema_version"),
        ("[1]\n", "line 1: not a line of generations.jsonl .*not a JSON object"),
        (WITHOUT_TURNS.replace("[]", "[3]", 1), "line 1: not a line of generations.jsonl .*Turn is not a JSON object"),
        (WITHOUT_TURNS.rstrip(), "line 1: not a line of generations.jsonl .*incomplete or damaged"),
        (LENGTHS + "\n", "differ in length"),
    ],
)
def test_bad_traces_are_refused(tmp_path: Path, content: str | None, message: str) -> None:
    file = tmp_path / "missing.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(RequestError, match=message):
        read_trace(file)


def test_replay_without_a_trace_is_refused() -> None:
    with pytest.raises(RequestError, match=r"drafter\.trace=FILE"):
        ReplayDrafter()
