"""Log-likelihoods and text for task suites; the model of the lm-evaluation-harness only if that is installed."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from quasar.cli import app
from quasar.errors import RequestError
from quasar.experiment.likelihood import Pair, Sampled, log_likelihood
from quasar.model.loading import random_transformer
from quasar.results.console import Reporter
from quasar.testing import tiny_model
from quasar.verifiers.base import Setup
from quasar.verifiers.fp16 import FP16Verifier

needs_harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="the extra eval is not installed")
TINY = {"model": "tiny", "verifier": "fp16", "verifier.dtype": "float32", "threads": 1}
OVERRIDES = [f"{key}={value}" for key, value in TINY.items()]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUASAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("quasar.results.environment.copy_bandwidth", lambda _: 1e10)


@pytest.fixture
def verifier() -> FP16Verifier:
    return FP16Verifier(tiny_model(), Setup())


def in_float64(verifier: FP16Verifier, tokens: list[int], last: int) -> tuple[float, bool]:
    """Sum the log-probabilities of the last tokens with one pass per token and a softmax written out, in float64."""
    model = random_transformer(verifier.model.config, 0, torch.float64)
    judge, total, greedy = FP16Verifier(model, Setup()), 0.0, True
    for end in range(len(tokens) - last, len(tokens)):
        logits = judge.prefill(torch.tensor(tokens[:end])).logits[-1].tolist()
        total += logits[tokens[end]] - math.log(math.fsum(map(math.exp, logits)))
        greedy = greedy and logits.index(max(logits)) == tokens[end]
    return total, greedy


def test_log_likelihood_is_that_of_the_model_in_float64(verifier: FP16Verifier) -> None:
    for context, continuation in (([3], [1]), ([3, 1, 4, 1, 5], [9, 2, 6]), ([7] * 20, [7, 7])):
        found = log_likelihood(verifier, context, continuation)
        expected = in_float64(verifier, context + continuation, len(continuation))
        assert found == (pytest.approx(expected[0], abs=1e-4), expected[1])


def test_the_greedy_continuation_is_greedy(verifier: FP16Verifier) -> None:
    context = [3, 1, 4]
    best = [int(verifier.prefill(torch.tensor(context)).logits[-1].argmax())]
    best.append(int(verifier.prefill(torch.tensor(context + best)).logits[-1].argmax()))
    assert log_likelihood(verifier, context, best)[1]
    assert not log_likelihood(verifier, context, [best[0], (best[1] + 1) % 64])[1]


def test_a_long_context_loses_its_beginning(verifier: FP16Verifier) -> None:
    verifier.context_length = 6
    context, continuation = [3, 1, 4, 1, 5, 9, 2], [6, 5]
    # Six tokens are read, and the last of these seven is only predicted.
    found = log_likelihood(verifier, context, continuation)
    expected = in_float64(verifier, (context + continuation)[-7:], 2)
    assert found[0] == pytest.approx(expected[0], abs=1e-4)
    assert found[0] != pytest.approx(in_float64(verifier, context + continuation, 2)[0], abs=1e-4)
    with pytest.raises(RequestError, match="a continuation of 7 tokens does not fit the context window of 6"):
        log_likelihood(verifier, [1], [2] * 7)
    with pytest.raises(RequestError, match="at least one token each"):
        log_likelihood(verifier, [], [2])


def test_text_does_not_depend_on_the_drafter_and_ends_at_a_stop_string() -> None:
    prompt = list(b"again and again and again")
    texts = {}
    for drafter in ("none", "ngram"):
        pair = Pair.built([*OVERRIDES, f"drafter={drafter}"], Reporter())
        tokens = pair.generate(prompt, [], 24, Sampled())
        assert len(tokens) == 24
        texts[drafter] = tokens
        stop = pair.parts.tokenizer.decode(tokens[5:7])
        assert stop in pair.parts.tokenizer.decode(pair.generate(prompt, [stop], 24, Sampled()))
        assert len(pair.generate(prompt, [stop], 24, Sampled())) <= 7
    assert texts["none"] == texts["ngram"]


def test_the_end_of_a_long_prompt_is_read() -> None:
    pair = Pair.built([*OVERRIDES, "drafter=none"], Reporter())
    window = pair.parts.verifier.context_length
    prompt = [number % 200 for number in range(window + 50)]
    whole = pair.generate(prompt, [], 8, Sampled())
    assert whole == pair.generate(prompt[-(window - 8) :], [], 8, Sampled())
    with pytest.raises(RequestError, match=f"{window} new tokens leave no room for a prompt"):
        pair.generate(prompt, [], window, Sampled())


def test_samples_of_one_prompt_differ() -> None:
    pair = Pair.built([*OVERRIDES, "drafter=ngram"], Reporter())
    drawn = {tuple(pair.generate([5, 6, 7], [], 8, Sampled(1.0, top_k=50))) for _ in range(4)}
    assert len(drawn) > 1


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="the extra eval is installed")
def test_without_the_harness_the_command_says_how_to_install_it() -> None:
    done = CliRunner().invoke(app, ["lm-eval", "--model", "quasar"])
    assert done.exit_code == 2
    assert "the lm-evaluation-harness is not installed; pip install 'quasar-speculative[eval]'" in done.output


@pytest.fixture
def model() -> Any:
    from quasar.experiment.harness import QuasarLM

    return QuasarLM(**TINY, drafter="ngram")


def in_float64_of(model: Any, tokens: list[int], last: int) -> float:
    return in_float64(model._verifier, tokens, last)[0]


def requests(*arguments: tuple) -> list[Any]:
    return [SimpleNamespace(args=entry) for entry in arguments]


@needs_harness
def test_log_likelihoods_of_the_harness(model: Any) -> None:
    found = model.loglikelihood(requests(("one two ", "three"), ("", "four")))
    encode = model._pair.parts.tokenizer.encode
    scored = [(encode("one two"), encode(" three")), ([model.prefix_token_id], encode("four"))]
    assert found == [log_likelihood(model._verifier, *pair) for pair in scored]


@needs_harness
def test_a_rolling_log_likelihood_predicts_every_token_once(model: Any) -> None:
    model._verifier.context_length = 8
    text = "twenty letters of it"
    (found,) = model.loglikelihood_rolling(requests((text,)))
    tokens = [model.prefix_token_id, *model._pair.parts.tokenizer.encode(text)]
    assert len(tokens) == 21
    # Windows of eight tokens that are read and the first and last one that they predict: the last one sees as much as
    # it can, and predicts the four that are left.
    windows = [(0, 1, 9), (8, 9, 17), (12, 17, 21)]
    expected = [in_float64_of(model, tokens[begin:end], end - first) for begin, first, end in windows]
    assert found == pytest.approx(sum(expected), abs=1e-3)


@needs_harness
def test_text_of_the_harness_is_cut_at_the_stop_string(model: Any) -> None:
    (whole,) = model.generate_until(requests(("again and again", {"until": [], "max_gen_toks": 16})))
    assert len(whole) > 1
    stop = whole[-1]
    (cut,) = model.generate_until(requests(("again and again", {"until": [stop], "max_gen_toks": 16})))
    assert cut == whole.split(stop)[0]


@needs_harness
def test_what_would_change_the_text_silently_is_refused(model: Any) -> None:
    from quasar.experiment.harness import QuasarLM

    for options in ({"num_beams": 4}, {"repetition_penalty": 1.2}):
        with pytest.raises(RequestError, match=r"generation_kwargs: .* is not supported"):
            model.generate_until(requests(("a", {"until": [], "max_gen_toks": 2, **options})))
    model.generate_until(requests(("a", {"until": [], "max_gen_toks": 2, "num_beams": 1})))
    with pytest.raises(RequestError, match="--batch_size 8: must be 1"):
        QuasarLM(**TINY, batch_size=8)


@needs_harness
def test_a_task_of_a_local_file_runs_through_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    rows = [
        {"question": "1 + 1 =", "choices": ["2", "3"], "answer": 0},
        {"question": "a", "choices": ["b", "c"], "answer": 1},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "local.yaml").write_text(
        "task: local\n"
        "dataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tmp_path}/rows.jsonl\n"
        "test_split: test\n"
        "output_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\n'
        'doc_to_choice: "{{choices}}"\n'
        'doc_to_target: "{{answer}}"\n'
        "metric_list:\n  - metric: acc\n"
    )
    arguments = ",".join(f"{key}={value}" for key, value in {**TINY, "drafter": "ngram"}.items())
    command = ["lm-eval", "--model", "quasar", "--model_args", arguments, "--tasks", "local"]
    done = CliRunner().invoke(
        app, [*command, "--include_path", str(tmp_path), "--output_path", str(tmp_path / "results")]
    )
    assert done.exit_code == 0, done.output
    (file,) = (tmp_path / "results").rglob("results_*.json")
    results = json.loads(file.read_text())
    assert results["config"]["model"] == "quasar"
    assert results["config"]["verifier"] == "fp16"
    assert results["results"]["local"]["acc,none"] in (0.0, 0.5, 1.0)
