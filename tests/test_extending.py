"""Drafters and verifiers of other packages: they pass the importable checks and run through ``_target_``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quasar.config.build import build
from quasar.config.schema import CONF
from quasar.decoding.draft import Context, Draft
from quasar.decoding.sampling import Sampling
from quasar.drafters.base import Drafter
from quasar.drafters.ngram import NgramDrafter
from quasar.model.transformer import Transformer
from quasar.testing import check_drafter, check_verifier, tiny_checkpoint, tiny_model, tiny_setup
from quasar.verifiers.base import Setup
from quasar.verifiers.fp16 import FP16Verifier
from tests.compose import composed_run

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "docs" / "examples"


def names(group: str, *but: str) -> list[str]:
    return sorted({file.stem for file in (CONF / group).glob("*.yaml")} - set(but))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quasar.cache.cache_folder", lambda: tmp_path / "cache")


@pytest.mark.parametrize("name", names("drafter", "replay"))  # which needs a recorded run
def test_every_drafter_passes(name: str) -> None:
    small = ["drafter.search_tokens=4"] if name == "layerskip" else []
    check_drafter(build("drafter", composed_run(f"drafter={name}", *small).drafter))


@pytest.mark.parametrize("name", names("verifier", "packed"))  # which needs a separate checkpoint
def test_every_verifier_passes(name: str) -> None:
    check_verifier(build("verifier", composed_run(f"verifier={name}").verifier, tiny_model(), tiny_setup()))


def test_a_verifier_around_transformers_passes_and_agrees_with_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from transformers_verifier import TransformersVerifier  # type: ignore[import-not-found]

    folder = tiny_checkpoint(tmp_path / "model")
    theirs = TransformersVerifier(tiny_model(), Setup(folder=folder))
    check_verifier(theirs)
    from quasar.model.loading import load_transformer

    ours = FP16Verifier(load_transformer(folder, torch.float32), Setup())
    tokens = torch.tensor([3, 1, 4, 1, 5])
    assert torch.allclose(ours.prefill(tokens).logits, theirs.prefill(tokens).logits, atol=1e-4)
    check_drafter(NgramDrafter(), theirs)


def test_the_drafter_of_the_tutorial_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from repeat import RepeatDrafter  # type: ignore[import-not-found]

    check_drafter(RepeatDrafter(num_tokens=3))
    context = Context([1, 5], 2, Sampling(), torch.Generator())
    assert RepeatDrafter(num_tokens=3).propose(context, budget=2).tokens == [5, 5]


class Deep(Drafter):
    """Ignores its budget."""

    def propose(self, context: Context, budget: int) -> Draft:
        return Draft.chain([1] * (budget + 1))


class Talkative(Drafter):
    """Notes more than one value per step."""

    def propose(self, context: Context, budget: int) -> Draft:
        return Draft()

    def notes(self) -> dict[str, list[int | float | str]]:
        return {"words": [1] * 1000}


@pytest.mark.parametrize(
    ("drafter", "message"), [(Deep(), "tokens deep for a budget of"), (Talkative(), "1000 values for")]
)
def test_a_faulty_drafter_is_told_what_is_wrong(drafter: Drafter, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_drafter(drafter)


class Forgetful(FP16Verifier):
    """Keeps every row of a pass, whatever was accepted."""

    def __init__(self, model: Transformer, setup: Setup) -> None:
        super().__init__(model, setup)
        self._rows = 0

    def verify(self, last, draft):
        self._rows = draft.rows
        return super().verify(last, draft)

    def keep(self, path) -> None:
        self.cache.commit(range(self._rows))


def test_a_faulty_verifier_is_told_what_is_wrong() -> None:
    with pytest.raises(AssertionError, match="verify after a draft was cut: logits differ"):
        check_verifier(Forgetful(tiny_model(), Setup()))


# The example of the documentation, in a separate package. Its name there sorts before every other choice.
DRAFTER = (EXAMPLES / "repeat.py").read_text(encoding="utf-8")
VERIFIER = '''
from quasar.verifiers.fp16 import FP16Verifier


class HalvedVerifier(FP16Verifier):
    """The model with its last layer's update halved."""

    label = "halved model"
    is_reference = False

    def __init__(self, model, setup):
        model.blocks[-1].mlp.down.weight.data.mul_(0.5)
        super().__init__(model, setup)
'''


def test_another_packages_drafter_and_verifier_run_through_their_targets(tmp_path: Path) -> None:
    package = tmp_path / "elsewhere"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "drafting.py").write_text(DRAFTER)
    (package / "verifying.py").write_text(VERIFIER)
    for group, target in (("drafter", "drafting.RepeatDrafter"), ("verifier", "verifying.HalvedVerifier")):
        (tmp_path / "conf" / group).mkdir(parents=True)
        own = "num_tokens: 2\n" if group == "drafter" else "dtype: auto\n"
        (tmp_path / "conf" / group / "a_own.yaml").write_text(f"_target_: elsewhere.{target}\nname: a_own\n{own}")
    command = [sys.executable, str(ROOT / "run.py"), f"--config-dir={tmp_path / 'conf'}", "hydra.run.dir=out"]
    choices = ["model=tiny", "drafter=a_own", "drafter.num_tokens=3", "verifier=a_own", "data.limit=1", "threads=1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run(
        [*command, *choices, "decode.max_new_tokens=8"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "lossless with respect to the halved model" in done.stdout
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["drafter"], summary["verifier"]) == ("a_own", "a_own")
    assert summary["kl_to_reference"] > 0
