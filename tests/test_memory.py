"""Runs, sweeps, generations and interrupted runs in one process: none of them keeps memory or files open."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from quasar.decoding.acceptance import rule_for
from quasar.decoding.draft import StepResult
from quasar.decoding.loop import decode
from quasar.decoding.sampling import Sampling
from quasar.decoding.stopping import Limits
from quasar.drafters.ngram import NgramDrafter
from quasar.experiment.decoder import PromptDecoder
from quasar.experiment.memory import release_memory
from quasar.model.sources import Checkpoint
from quasar.model.tokenizer import load_tokenizer
from quasar.testing import tiny_model
from quasar.verifiers.base import Setup
from quasar.verifiers.fp16 import FP16Verifier
from tests.in_process import Start, starter

INTERRUPTED = 130
# fmt: off
_MALLOC_COUNTS = (
    "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
)
# fmt: on


class _MallocInformation(ctypes.Structure):
    """glibc's ``struct mallinfo2``; ``uordblks`` and ``hblkhd`` are the allocated bytes below and in own mappings."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in _MALLOC_COUNTS)


class Held(NamedTuple):
    """What the process holds. malloc: bytes; blocks: allocated by the interpreter; files: open descriptors"""

    malloc: int
    blocks: int
    files: int

    @classmethod
    def now(cls) -> Held:
        libc = ctypes.CDLL(None)
        if not hasattr(libc, "mallinfo2"):
            pytest.skip("glibc alone tells how many bytes are allocated")
        libc.mallinfo2.restype = _MallocInformation
        gc.collect()
        found = libc.mallinfo2()
        files = len(os.listdir("/proc/self/fd"))
        return cls(found.uordblks + found.hblkhd, sys.getallocatedblocks(), files)


@pytest.fixture
def start(
    tmp_path: Path, prompt_file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Start:
    return starter(tmp_path, prompt_file, monkeypatch, capfd, tokens=4)


@pytest.fixture
def interrupting(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """While the list is not empty, Ctrl-C comes in the middle of every prompt after the first."""
    active: list[bool] = []
    decoded, whole = [], PromptDecoder.decode_prompt

    def decode_prompt(decoder: PromptDecoder, prompt: object, on_step: Callable, repetition: int = 0) -> object:
        def interrupt(step: StepResult) -> None:
            raise KeyboardInterrupt

        decoded.append(prompt)
        return whole(decoder, prompt, interrupt if active and len(decoded) % 2 == 0 else on_step, repetition)

    monkeypatch.setattr(PromptDecoder, "decode_prompt", decode_prompt)
    return active


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def generate(count: int) -> None:
    """Decode this many different prompts with one verifier."""
    verifier, drafter, generator = FP16Verifier(tiny_model(), Setup()), NgramDrafter(), torch.Generator()
    limits = Limits(8, verifier.context_length, frozenset())
    for number in range(count):
        generator.manual_seed(number)
        prompt = torch.randint(0, 64, (5 + number % 30,), generator=generator).tolist()
        decode(prompt, drafter, verifier, rule_for(Sampling()), Sampling(), limits, generator)


def test_runs_and_interrupted_runs_keep_nothing(start: Start, tmp_path: Path, interrupting: list[bool]) -> None:
    def jobs(first: int, count: int) -> None:
        for number in range(first, first + count):
            assert start("drafter=ngram", "verifier=int8", f"hydra.run.dir=done/{number}")[0] == 0
            interrupting.append(True)
            assert start("drafter=ngram", f"hydra.run.dir=interrupted/{number}")[0] == INTERRUPTED
            interrupting.clear()

    jobs(0, 1)
    before = Held.now()
    jobs(1, 2)
    after = Held.now()
    assert after.files == before.files
    assert after.malloc - before.malloc < 100_000
    assert after.blocks - before.blocks < 2000


def test_generations_keep_nothing() -> None:
    generate(20)
    before = Held.now()
    generate(60)
    after = Held.now()
    assert after.files == before.files
    assert after.malloc - before.malloc < 50_000
    assert after.blocks - before.blocks < 500


def test_a_tokenizer_keeps_no_words() -> None:
    """The library never frees its cache of words, so that it must be off."""

    def use(first: int) -> None:
        tokenizer = load_tokenizer(Checkpoint("tiny", None, "random weights"))
        words = " ".join(f"word{number}" for number in range(first, first + 2000))
        assert tokenizer.decode(tokenizer.encode(words)) == words

    use(0)
    before = Held.now()
    for number in range(1, 5):
        use(2000 * number)
    # With the cache, each of them keeps 2000 words: more than a megabyte in all.
    assert Held.now().malloc - before.malloc < 100_000


def test_freed_memory_goes_back_to_the_system() -> None:
    """glibc keeps freed blocks that lie below one in use."""
    blocks = [ctypes.create_string_buffer(b"x" * 60_000) for _ in range(1000)]
    last = blocks.pop()
    del blocks
    gc.collect()
    before = resident_bytes()
    release_memory()
    assert before - resident_bytes() > 40_000_000
    assert last.raw.startswith(b"x")


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
def test_hundreds_of_jobs_and_thousands_of_generations_stay_within_a_percent(
    start: Start, interrupting: list[bool]
) -> None:
    def work(first: int, jobs: int, generations: int) -> None:
        for number in range(first, first + jobs):
            sweep = ["-m", "drafter=ngram,lookahead", "verifier=fp16,int8", f"hydra.sweep.dir=sweeps/{number}"]
            assert start(*sweep)[0] == 0
            interrupting.append(True)
            assert start("drafter=ngram", f"hydra.run.dir=interrupted/{number}")[0] == INTERRUPTED
            interrupting.clear()
        generate(generations)
        release_memory()

    work(0, 5, 200)
    before, resident = Held.now(), resident_bytes()
    work(5, 50, 5000)
    after = Held.now()
    assert after.files == before.files
    assert resident_bytes() < 1.01 * resident
    assert after.malloc - before.malloc < 0.01 * resident
