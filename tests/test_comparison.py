"""`quasar fidelity`: the comparison of two verifiers against slow definitions, and the command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from quasar.cli import app
from quasar.errors import QuasarError, RequestError
from quasar.evaluation.comparison import Comparison, compare, likelihood, windows
from quasar.evaluation.fidelity import Trajectory
from quasar.experiment.fidelity import _PlainText
from quasar.experiment.standalone import settings_of, split
from quasar.model.loading import random_transformer, tiny_config
from quasar.results.comparison import Compared, Table
from quasar.verifiers.base import Setup
from quasar.verifiers.fp16 import FP16Verifier
from quasar.verifiers.pruned import PrunedVerifier

TEXT = Trajectory([5, 900, 17], [901, 3, 902, 44], [], [])


def model(vocab_size: int = 1000):
    return random_transformer(tiny_config(vocab_size=vocab_size), 0, torch.bfloat16)


def reference() -> FP16Verifier:
    return FP16Verifier(model(), Setup())


def damaged() -> PrunedVerifier:
    return PrunedVerifier(model(), Setup(), method="depth", layers=[2])


def test_a_comparison_is_that_of_the_probabilities_token_by_token() -> None:
    a, b = reference(), damaged()
    found = compare(a, b, TEXT)
    tokens = torch.tensor([*TEXT.prompt, *TEXT.answer])
    for step, token in enumerate(TEXT.answer):
        # Ids above 256 are no bfloat16 numbers, so a target in the dtype of the logits would be another token.
        p, q = (v.teacher_forced(tokens[:-1], 2)[step].double().softmax(-1) for v in (a, b))
        assert found.kl[step] == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-4)
        assert found.agrees[step] == bool(p.argmax() == q.argmax())
        assert found.a_loss[step] == pytest.approx(-math.log(p[token]), rel=1e-5)
        assert found.b_loss[step] == pytest.approx(-math.log(q[token]), rel=1e-5)
        assert found.a_right[step] == bool(p.argmax() == token)
        assert found.b_right[step] == bool(q.argmax() == token)


def test_the_likelihood_of_more_rows_than_are_compared_at_a_time() -> None:
    logits = torch.randn(150, 40)
    tokens = torch.randint(0, 40, (150,)).tolist()
    loss, right = likelihood(logits, tokens)
    assert loss == pytest.approx(
        [-float(row.log_softmax(-1)[token]) for row, token in zip(logits, tokens, strict=True)]
    )
    assert right == [int(row.argmax()) == token for row, token in zip(logits, tokens, strict=True)]


def test_other_vocabularies_and_broken_logits_are_refused() -> None:
    other = FP16Verifier(model(vocab_size=960), Setup())
    with pytest.raises(RequestError, match="1000 and 960 tokens"):
        compare(reference(), other, TEXT)
    broken = model()
    broken.norm.weight.data.fill_(float("nan"))
    with pytest.raises(QuasarError, match="logits of B, the reference, are NaN"):
        compare(reference(), FP16Verifier(broken, Setup()), TEXT)


@pytest.mark.parametrize("length", [2, 7, 8, 9, 12, 13, 40])
def test_windows_score_every_token_but_the_first_once_with_at_least_half_a_window_before_it(length: int) -> None:
    found = list(windows(range(length), size=8))
    assert [token for window in found for token in window.answer] == list(range(1, length))
    for window in found[1:]:
        assert len(window.prompt) == 4
        assert window.prompt[-1] + 1 == window.answer[0]
    assert max(len(window.prompt) + len(window.answer) for window in found) <= 8


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 12, 13, 40])
def test_windows_of_a_model_with_a_first_token_begin_with_it_and_score_every_token(length: int) -> None:
    found = list(windows(range(length), beginning=[99], size=8))
    assert [token for window in found for token in window.answer] == list(range(length))
    assert found[0].prompt == [99]
    for window in found[1:]:
        assert window.prompt == [99, *range(window.answer[0] - 3, window.answer[0])]
    assert max(len(window.prompt) + len(window.answer) for window in found) <= 8


@pytest.mark.parametrize(("beginning", "needed"), [([], 2), ([99], 1)])
def test_a_text_of_one_token_suffices_where_the_model_has_a_first_token(
    beginning: list[int], needed: int, tmp_path: Path
) -> None:
    file = tmp_path / "text.txt"
    model: Any = SimpleNamespace(tokenizer=SimpleNamespace(encode=lambda text: [*text.encode()], beginning=beginning))
    for length in (needed, needed - 1):
        file.write_text("a" * length)
        texts = _PlainText(file)
        if length == needed:
            assert sum(len(window.answer) for text in texts.texts(model) for window in text.trajectories()) == 1
        else:
            with pytest.raises(RequestError, match=f"has {length} tokens, but needs {needed}"):
                texts.texts(model)


def test_the_quantities_are_totals_over_all_tokens() -> None:
    first = Comparison([0.1, 0.3], [True, False], [1.0, 2.0], [1.5, 2.5], [True, True], [True, False])
    second = Comparison([0.2], [False], [3.0], [1.0], [False], [True])
    table = Table([Compared("chat", first), Compared("chat", second)])
    values = {name: estimate.value for name, estimate in table.estimates.items()}
    assert values == pytest.approx(
        {
            "kl": 0.2,
            "top1_agreement": 1 / 3,
            "flips_to_wrong": 1 / 3,
            "flips_to_right": 1 / 3,
            "perplexity_a": math.exp(2),
            "perplexity_b": math.exp(5 / 3),
            "perplexity_ratio": math.exp(-1 / 3),
        }
    )
    assert table.kl_largest == 0.3
    assert table.to_json()["kl"]["value"] == values["kl"]
    assert (table.to_json()["texts"], table.to_json()["tokens"]) == (2, 3)


def run(*arguments: str):
    return CliRunner().invoke(app, ["fidelity", *arguments])


def test_the_command_compares_two_verifiers_on_a_text(tmp_path: Path) -> None:
    text, output = tmp_path / "text.txt", tmp_path / "found.json"
    text.write_text("A verifier checks what a drafter has guessed. " * 40)
    done = run(
        "verifier=fp16", "verifier=int8 verifier.method=rtn", "model=tiny", "--text", str(text), "--json", str(output)
    )
    assert done.exit_code == 0, done.output
    found = json.loads(output.read_text())
    assert found["tokens"] == 46 * 40 - 1
    assert found["texts"] == 7
    assert found["b"]["verifier"]["method"] == "rtn"
    assert 0 < found["kl"]["low"] < found["kl"]["value"] < found["kl"]["high"]
    assert max(len(line) for line in done.output.splitlines() if line.startswith(("+", "|"))) <= 80


def test_the_command_lets_a_answer_the_prompts(prompt_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "found.json"
    same = run(
        "verifier=fp16",
        "verifier=fp16",
        "model=tiny",
        "decode.max_new_tokens=6",
        "--text",
        str(prompt_file),
        "--json",
        str(output),
    )
    assert same.exit_code == 0, same.output
    found = json.loads(output.read_text())
    assert found["texts"] == 3
    assert found["tokens"] <= 4 * 6
    assert found["kl"]["value"] == 0
    assert found["top1_agreement"]["value"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("verifier=int9", "verifier=fp16", "model=tiny"), "verifier/int9"),
        (("verifier=fp16 verifier.foo=1", "verifier=fp16", "model=tiny"), "verifier.foo"),
        (("int8", "verifier=fp16", "model=tiny"), "'int8' in 'int8' is no override"),
        (("verifier=fp16 'model=tiny", "verifier=fp16"), "No closing quotation"),
        (("verifier=fp16", "verifier=fp16", "model=tiny", "--text", "nothing"), "nothing: no such file or folder"),
        (("verifier=fp16", "verifier=fp16", "model=tiny", "--json", "no/folder"), "no is no folder"),
    ],
)
def test_a_wrong_request_is_one_line_that_names_it(arguments: tuple[str, ...], message: str) -> None:
    refused = run(*arguments)
    assert refused.exit_code == 2
    assert message in refused.output
    assert "Traceback" not in refused.output


def test_overrides_are_split_as_a_shell_does() -> None:
    assert split("verifier=packed verifier.path='a b'") == ["verifier=packed", "verifier.path=a b"]
    assert settings_of(["model=tiny", "verifier=int8", "verifier.method=rtn"]).verifier["method"] == "rtn"
