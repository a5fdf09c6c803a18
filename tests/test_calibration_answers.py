"""calibration.answers: calibration text that continues with what the reference itself writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quasar.errors import RequestError
from quasar.experiment.calibration_text import calibration_text
from quasar.experiment.reference import locate_reference
from quasar.experiment.standalone import build_alone, settings_of
from quasar.quantization.statistics import Calibration
from quasar.results.console import Reporter

COMMON = ["model=tiny", "threads=1", "calibration.prompts=3", "calibration.max_tokens=20"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quasar.cache.cache_folder", lambda: tmp_path / "cache")


def text(*overrides: str) -> Calibration | None:
    settings = settings_of([*COMMON, *overrides])
    return calibration_text(settings, [], locate_reference(settings, Reporter()), Reporter())()


def sequences(*overrides: str) -> list[list[int]]:
    found = text(*overrides)
    assert found is not None
    return [sequence.tolist() for sequence in found.sequences]


def test_answers_are_the_reference_argmax_token_by_token() -> None:
    """The definition runs the model over the whole text for every token, without a cache."""
    settings = settings_of(["verifier.dtype=float32", *COMMON])
    located = locate_reference(settings, Reporter())
    model = located.load(torch.float32, Reporter())
    stop = located.tokenizer.stop_tokens
    expected = []
    for prompt in sequences("verifier.dtype=float32"):
        tokens = list(prompt)
        while len(tokens) < len(prompt) + 6 and not (len(tokens) > len(prompt) and tokens[-1] in stop):
            tokens.append(int(model(torch.tensor(tokens))[-1].argmax()))
        expected.append(tokens)
    assert sequences("verifier.dtype=float32", "calibration.answers=6") == expected
    assert len(expected) == 3


def test_without_answers_the_text_is_the_prompts() -> None:
    found = text("calibration.answers=0")
    assert found is not None
    assert all(len(sequence) <= 20 for sequence in found.sequences)
    assert text("calibration.answers=5", "calibration.prompts=0") is None


def test_texts_of_other_lengths_and_precisions_have_their_own_keys() -> None:
    keys = [found.key for found in map(text, ("calibration.answers=0", "calibration.answers=4")) if found is not None]
    assert keys[0]["tokens"] != keys[1]["tokens"]
    assert keys[0]["model"] == keys[1]["model"]


def test_answers_are_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = sequences("calibration.answers=4")
    monkeypatch.setattr("quasar.experiment.calibration_text.trajectory_of", lambda *given: pytest.fail("again"))
    assert sequences("calibration.answers=4") == first
    assert [longer[:20] for longer in first] == [shorter[:20] for shorter in sequences("calibration.answers=0")]


def test_a_quantizer_measures_the_answers_too() -> None:
    """The reference is loaded again for the answers, and the model that is quantized stays as it was until then."""
    built = [
        build_alone(f"verifier=int4 calibration.answers={length}", COMMON, lambda settings: [], Reporter())
        for length in (0, 8)
    ]
    tokens = torch.arange(30)
    plain, answered = (each.verifier.teacher_forced(tokens, 0) for each in built)
    assert not torch.equal(plain, answered)
    assert torch.corrcoef(torch.stack([plain.float().flatten(), answered.float().flatten()]))[0, 1] > 0.9


def test_a_wrong_number_is_refused() -> None:
    with pytest.raises(RequestError, match=r"calibration\.answers=-1: must be at least 0"):
        settings_of(["calibration.answers=-1"])
