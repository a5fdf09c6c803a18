"""Recorded passes: a verifier's most likely tokens after every sequence that it has been asked about.

`RecordedVerifier` takes the place of a verifier in the decode loop and computes only rows that are not recorded yet. A
row of a pass depends on the sequence before it alone, so that a recorded row equals the one of a new pass bit for bit.
The rows along the greedy answer are the same for all drafters, and many rejected ones are common: the first drafter
that is simulated takes as long as a run, and later ones take only the rows that nobody has drafted before.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from quasar.decoding.draft import Draft
from quasar.decoding.scores import Scores
from quasar.errors import RequestError
from quasar.verifiers.base import Verifier

TOP = 8
"""Recorded tokens per row."""
_NONE = -1
"""Parent and token of the row that follows the prompt."""


class Rows:
    """The recorded rows of one prompt, as a tree of the sequences of tokens after the prompt.

    Row 0 follows the prompt itself. Row n > 0 follows the sequence of row ``parents[n]`` and then ``tokens[n]``.

    best: the argmax of the logits after it. Where several tokens have the largest logit, ``top`` may begin with another
    top: the `TOP` most likely tokens, in the order in which ``topk`` has returned them
    logits: their logits, strictly descending: of equal ones all but the first are lowered to the next number of float32
    """

    def __init__(self) -> None:
        self.parents: list[int] = []
        self.tokens: list[int] = []
        self.best: list[int] = []
        self.top: list[list[int]] = []
        self.logits: list[list[float]] = []
        self._places: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self.parents)

    def find(self, parent: int, token: int) -> int | None:
        """Return the row after the sequence of row ``parent`` and ``token``; None if it is not recorded."""
        return self._places.get((parent, token))

    def add(self, parent: int, token: int, best: int, logits: Tensor) -> int:
        """Record a row, logits [V] with the argmax ``best``. Returns its number."""
        found = logits.topk(min(TOP, len(logits)))
        self._append(parent, token, best, found.indices.tolist(), _strictly_descending(found.values.tolist()))
        return len(self) - 1

    def save(self, file: Path) -> None:
        scratch = file.with_name(f"{file.name}.{os.getpid()}")
        with scratch.open("wb") as stream:
            np.savez_compressed(
                stream,
                parents=np.array(self.parents, dtype=np.int32),
                tokens=np.array(self.tokens, dtype=np.int32),
                best=np.array(self.best, dtype=np.int32),
                top=np.array(self.top, dtype=np.int32),
                logits=np.array(self.logits, dtype=np.float32),
            )
        scratch.replace(file)

    @staticmethod
    def load(file: Path) -> Rows:
        """Read what `save` wrote. Raises RequestError if it is damaged."""
        rows = Rows()
        try:
            with np.load(file) as content:
                columns = [content[name].tolist() for name in ("parents", "tokens", "best", "top", "logits")]
        except (OSError, ValueError, KeyError) as error:
            raise RequestError(f"{file}: not a recording ({error}); delete it, and it is recorded again") from None
        for row in zip(*columns, strict=True):
            rows._append(*row)
        return rows

    def _append(self, parent: int, token: int, best: int, top: list[int], logits: list[float]) -> None:
        self._places[parent, token] = len(self)
        self.parents.append(parent)
        self.tokens.append(token)
        self.best.append(best)
        self.top.append(top)
        self.logits.append(logits)


class RecordedVerifier(Verifier):
    """Answers from recorded passes. Rows that are not recorded are computed by the verifier itself and recorded.

    The logits that a drafter observes are those of the `TOP` most likely tokens; all others are minus infinity. Scratch
    rows are refused, and so is everything else that needs the weights.

    folder: the recordings of this verifier, one file per prompt
    load: builds the verifier, once a row is missing
    """

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, folder: Path, load: Callable[[], Verifier]) -> None:
        self._folder, self._load = folder, load
        self._verifier: Verifier | None = None
        facts = folder / "verifier.json"
        if not facts.is_file():
            verifier = self._built
            vocabulary = verifier.prefill(torch.tensor([0])).logits.shape[-1]
            described = {
                "label": verifier.label,
                "is_reference": verifier.is_reference,
                "context_length": verifier.context_length,
                "vocabulary": vocabulary,
            }
            folder.mkdir(parents=True, exist_ok=True)
            facts.write_text(json.dumps(described) + "\n")
        content = json.loads(facts.read_text())
        self.label, self.is_reference = content["label"], content["is_reference"]
        self.context_length, self._vocabulary = content["context_length"], content["vocabulary"]
        self.computed = 0
        """Rows that were not recorded before."""
        self._rows, self._file, self._saved = Rows(), folder, 0
        self._context: list[int] = []
        self._cached: list[int] = []
        self._here, self._last, self._draft = 0, 0, Draft()
        self._found: list[int] = []
        self._passed = False

    def prefill(self, tokens: Tensor) -> Scores:
        """Read the recording of a prompt."""
        self.save()
        self._context = tokens.tolist()
        digest = hashlib.sha256(json.dumps(self._context).encode()).hexdigest()[:16]
        self._file = self._folder / f"{digest}.npz"
        self._rows = Rows.load(self._file) if self._file.is_file() else Rows()
        self._saved = len(self._rows)
        self._here = 0
        if not len(self._rows):
            scores = self._read()
            self._record(_NONE, _NONE, scores.argmax()[0], scores.logits[0])
        return self._scores([0])

    def verify(self, last: int, draft: Draft) -> Scores:
        if draft.scratch is not None:
            raise RequestError("the drafter has scratch rows, which are not recorded; it can be run, not simulated")
        self._last, self._draft, self._passed = last, draft, False
        self._found = self._recorded(last, draft)
        return self._scores(self._found)

    def keep(self, path: Sequence[int]) -> None:
        if self._passed:
            self._built.keep(path)
            self._cached += [self._last, *(self._draft.tokens[node] for node in path)]
        self._here = self._found[path[-1] + 1 if path else 0]
        self._context += [self._last, *(self._draft.tokens[node] for node in path)]

    def teacher_forced(self, tokens: Tensor, first: int) -> Tensor:
        raise RequestError("a recording has no logits of whole texts; run the verifier itself")

    def save(self) -> None:
        """Write the rows that were computed for the present prompt."""
        if len(self._rows) > self._saved:
            self._rows.save(self._file)
            self._saved = len(self._rows)

    @property
    def _built(self) -> Verifier:
        if self._verifier is None:
            self._verifier = self._load()
        return self._verifier

    def _recorded(self, last: int, draft: Draft) -> list[int]:
        """Return the row of the last token and of every draft token. A pass computes them if one is missing."""
        scores: Scores | None = None
        found: list[int] = []
        for row, token in enumerate([last, *draft.tokens]):
            parent = self._here if row == 0 else found[draft.parents[row - 1] + 1]
            known = self._rows.find(parent, token)
            if known is None:
                if scores is None:
                    scores = self._pass(last, draft)
                known = self._record(parent, token, scores.argmax()[row], scores.logits[row])
            found.append(known)
        return found

    def _record(self, parent: int, token: int, best: int, logits: Tensor) -> int:
        self.computed += 1
        return self._rows.add(parent, token, best, logits)

    def _pass(self, last: int, draft: Draft) -> Scores:
        """Run the verifier on a draft after the present context."""
        if not self._cached or self._cached != self._context[: len(self._cached)]:
            self._read()
        elif len(self._cached) < len(self._context):
            first, *rest = self._context[len(self._cached) :]
            self._built.verify(first, Draft.chain(rest))
            self._built.keep(range(len(rest)))
            self._cached = list(self._context)
        scores = self._built.verify(last, draft)
        scores.require_finite()
        self._passed = True
        return scores

    def _read(self) -> Scores:
        """Read the whole context with the verifier."""
        self._cached = list(self._context)
        return self._built.prefill(torch.tensor(self._context))

    def _scores(self, rows: Sequence[int]) -> Scores:
        logits = torch.full((len(rows), self._vocabulary), -torch.inf)
        top = torch.tensor([self._rows.top[row] for row in rows])
        logits.scatter_(1, top, torch.tensor([self._rows.logits[row] for row in rows]))
        return Scores(logits, found=lambda: [self._rows.best[row] for row in rows])


def _strictly_descending(values: Sequence[float]) -> list[float]:
    found: list[float] = []
    for value in np.array(values, dtype=np.float32):
        below = np.nextafter(np.float32(found[-1]), np.float32(-np.inf)) if found else np.float32(np.inf)
        found.append(float(min(value, below)))
    return found
