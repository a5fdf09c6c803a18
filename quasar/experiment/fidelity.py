"""`quasar fidelity`: compares any two verifiers on the same text, without a drafter."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from quasar.cache import code_version
from quasar.config.inputs import expanded, kind_of, read_text
from quasar.config.schema import DataConfig, RunConfig
from quasar.errors import RequestError
from quasar.evaluation.comparison import WINDOW, Comparison, compare, windows
from quasar.evaluation.conversation import conversation
from quasar.evaluation.fidelity import Trajectories, Trajectory, trajectory_of
from quasar.evaluation.prompts import Prompt, load_prompts, prompt_set_hash
from quasar.experiment.standalone import Standalone, build_alone
from quasar.results.comparison import Compared, Table
from quasar.results.console import Reporter
from quasar.results.files import write_json


@dataclass(frozen=True)
class Request:
    """What to compare.

    a, b: overrides of the two verifiers, such as ``verifier=packed verifier.path=FILE``
    common: overrides of both
    text: a plain text, or prompts as Spec-Bench JSONL; None for the prompts that the configuration of A names
    output: JSON file of the results
    """

    a: str
    b: str
    common: Sequence[str] = ()
    text: str | None = None
    output: Path | None = None


def measure_fidelity(request: Request, reporter: Reporter) -> Table:
    """Build both verifiers, compare them on every text, print the table and write the JSON file.

    A plain text is read in windows. For prompts the text is A's greedy answers, of ``decode.max_new_tokens`` tokens at
    most, so that KL(A || B) is measured where A itself would go.

    Raises RequestError if the two models do not share a tokenizer and vocabulary.
    """
    if request.output is not None and not request.output.parent.is_dir():
        raise RequestError(f"--json={request.output}: {request.output.parent} is no folder; create it first")
    source = _Prompts(None) if request.text is None else _source(expanded(request.text, "--text"))
    a, b = (build_alone(overrides, request.common, source.prompts, reporter) for overrides in (request.a, request.b))
    texts = source.texts(a)
    compared = []
    with reporter.progress("comparing") as advance:
        for done, text in enumerate(texts):
            advance(done, len(texts))
            compared.append(Compared(text.family, _compared(a, b, text.trajectories())))
        advance(len(texts), len(texts))
    table = Table([text for text in compared if text.comparison.kl])
    where = f"{source.sentence(a)}, {table.tokens} tokens"
    reporter.header({"A": a.sentence(), "B": b.sentence(), "text": where})
    reporter.table("", ["", "value", "95 % interval"], table.rows())
    if request.output is not None:
        described = {"a": a.to_json(), "b": b.to_json(), "text": where, "code_version": code_version()}
        write_json(request.output, {**described, **table.to_json()})
        reporter.line(f"wrote {request.output}")
    return table


@dataclass(frozen=True)
class _Text:
    """A text to compare on. trajectories: decodes or cuts it into parts that are teacher-forced one by one."""

    family: str
    trajectories: Callable[[], list[Trajectory]]


class _Prompts:
    """Prompts, which A answers. path: Spec-Bench JSONL; None for the prompts of the configuration."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def prompts(self, settings: RunConfig) -> list[Prompt]:
        """Return the prompts, which calibration text must not overlap."""
        if self._path is None:
            return load_prompts(settings.data)
        return load_prompts(DataConfig("specbench", str(self._path), settings.data.limit), key="--text")

    def texts(self, a: Standalone) -> list[_Text]:
        return [_Text(prompt.family, partial(_answered, a, prompt)) for prompt in self.prompts(a.settings)]

    def sentence(self, a: Standalone) -> str:
        found, place = self.prompts(a.settings), self._path or f"data={a.settings.data.name}"
        limit, digest = a.settings.decode.max_new_tokens, prompt_set_hash(found)[:12]
        return f"A's greedy answers, at most {limit} tokens, to {len(found)} prompts from {place} ({digest})"


class _PlainText:
    """A file with plain text, which is read in windows."""

    def __init__(self, path: Path) -> None:
        self._path, self._content = path, read_text(path)

    def prompts(self, settings: RunConfig) -> list[Prompt]:
        return [Prompt("text", "text", (self._content,), (), str(self._path))]

    def texts(self, a: Standalone) -> list[_Text]:
        tokens, beginning = a.tokenizer.encode(self._content), a.tokenizer.beginning
        # A model without a first token of its own takes the text's first token as context.
        needed = 1 if beginning else 2
        if len(tokens) < needed:
            raise RequestError(f"--text={self._path}: has {len(tokens)} tokens, but needs {needed} to score one")
        found = windows(tokens, beginning)
        return [_Text("text", lambda window=window: [window]) for window in found]  # type: ignore[misc]

    def sentence(self, a: Standalone) -> str:
        digest = hashlib.sha256(self._content.encode()).hexdigest()[:12]
        return f"{self._path} ({digest}), in windows of {WINDOW} tokens whose second half is scored"


def _source(path: Path) -> _Prompts | _PlainText:
    prompts = kind_of(path, "--text") == "folder" or path.suffix.lower() == ".jsonl"
    return _Prompts(path) if prompts else _PlainText(path)


def _answered(a: Standalone, prompt: Prompt) -> list[Trajectory]:
    """Return A's greedy answer to every turn. The ones of the reference are cached for all runs."""
    verifier, length, stop = a.verifier, a.settings.decode.max_new_tokens, a.tokenizer.stop_tokens
    cached = Trajectories(a.checkpoint.identity, verifier.device, verifier.dtype)

    def answered(tokens: list[int], key: str) -> Trajectory:
        if verifier.is_reference:
            return cached.get(verifier, tokens, length, stop)
        return trajectory_of(verifier, tokens, length, stop)

    return conversation(prompt, a.tokenizer, verifier.context_length, answered)


def _compared(a: Standalone, b: Standalone, trajectories: Sequence[Trajectory]) -> Comparison:
    found = Comparison([], [], [], [], [], [])
    for trajectory in trajectories:
        tokens = [*trajectory.prompt, *trajectory.answer]
        if len(tokens) > b.verifier.context_length:
            raise RequestError(
                f"a text has {len(tokens)} tokens, but the context window of B is {b.verifier.context_length}; choose "
                "shorter prompts, or a smaller decode.max_new_tokens"
            )
        if a.tokenizer.spell(tokens) != b.tokenizer.spell(tokens):
            raise RequestError(
                f"the tokenizers of {a.overrides!r} and {b.overrides!r} give the same token ids different texts; only "
                "models with the same tokens can be compared token by token"
            )
        found += compare(a.verifier, b.verifier, trajectory)
    return found
