"""Reads benchmarks from their Hugging Face datasets and converts their rows to the Spec-Bench form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quasar.config.inputs import expanded, is_companion, json_lines, kind_of, parsed_json, read_text
from quasar.config.schema import DataConfig, HubDataset
from quasar.errors import RequestError, first_line

if TYPE_CHECKING:
    from datasets import Dataset

Row = dict[str, Any]
"""One row of a dataset, or of a Spec-Bench file: column names and their values."""

_SUFFIXES = (".parquet", ".jsonl", ".json")
NOT_FETCHED = "FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE USING SPECDEC_BENCH"
"""How a turn of SPEED-Bench begins whose text belongs to another dataset."""


def benchmark_rows(data: DataConfig) -> Iterator[tuple[str, Row]]:
    """Yield the place and the Spec-Bench form of the first ``data.limit`` rows, or of all of a set with categories.

    The rows come from ``data.path`` if it is set, otherwise from ``data.hub`` through the cache of ``datasets``. The
    form has the keys ``question_id``, ``turns``, ``reference`` and what grades an answer. ``question_id`` is the row's
    number in its split, from 0, unless the dataset has one. The place of a row of a JSONL file is the file and the
    line; otherwise it ends in the row's number.

    Raises RequestError if the dataset is not available, lacks a column or has a value of another type; the message
    names the place and the remedy.
    """
    form = _FORMS.get(data.name)
    if form is None:
        raise RequestError(f"data.name={data.name}: data.hub is read for one of {', '.join(_FORMS)} only")
    assert data.hub is not None
    if data.path is None:
        rows = _dataset_rows(_from_hub(data.name, data.hub), f"{data.hub.repo}@{str(data.hub.revision)[:8]}")
    else:
        rows = _path_rows(expanded(data.path, "data.path"), data.hub)
    # Only these rows are read and converted: a split may hold tens of thousands.
    for number, (place, row) in enumerate(rows if form.has_categories else islice(rows, data.limit)):
        yield place, {"question_id": number, **form.converted(row, place, data.name)}


@dataclass(frozen=True)
class _Form:
    """The columns that a benchmark's rows must have, and how one becomes a row of a Spec-Bench file.

    kind: type of the columns; None if ``convert`` and `quasar.evaluation.prompts` check them
    has_categories: whether the rows are of several task families, of which ``data.limit`` takes the first ones each
    """

    columns: tuple[str, ...]
    convert: Callable[[Row], Row]
    kind: type | None = str
    has_categories: bool = False

    def converted(self, row: Any, place: str, name: str) -> Row:
        if not isinstance(row, dict):
            raise RequestError(f"{place}: must be a JSON object, found {row!r:.80}")
        missing = [column for column in self.columns if column not in row]
        if missing:
            raise RequestError(
                f"{place}: data={name} needs the columns {', '.join(self.columns)}; {', '.join(missing)} not found"
            )
        for column in self.columns:
            if self.kind is not None and not isinstance(row[column], self.kind):
                kind = "a text" if self.kind is str else "a list of texts"
                raise RequestError(f"{place}: the column {column} must be {kind}, found {row[column]!r:.80}")
        return self.convert(row)


def _mt_bench(row: Row) -> Row:
    return {"turns": row["prompt"], "reference": row["reference"]}


def _humaneval(row: Row) -> Row:
    # The code starts on a line of its own, because grading looks for it at the start of a line.
    turn = "Complete the code I provided.\n\n" + row["prompt"].lstrip("\n")
    reference = [row["canonical_solution"]]
    return {"turns": [turn], "reference": reference, "test": row["test"], "entry_point": row["entry_point"]}


def _gsm8k(row: Row) -> Row:
    return {"turns": [row["question"]], "reference": [row["answer"]]}


def _alpaca(row: Row) -> Row:
    turn = f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]
    return {"turns": [turn], "reference": [row["output"]]}


def _cnn_dm(row: Row) -> Row:
    return {"turns": [f"Summarize: {row['article']}"], "reference": [row["highlights"]]}


def _speed_bench(row: Row) -> Row:
    """Keep the columns of Spec-Bench, which are a part of SPEED-Bench's."""
    turns = row["turns"]
    if isinstance(turns, list) and any(isinstance(turn, str) and turn.startswith(NOT_FETCHED) for turn in turns):
        raise RequestError(
            f"question {row['question_id']} of SPEED-Bench has no text yet: the dataset names its sources only. Fetch "
            "them with prepare_data.py of NVIDIA's specdec_bench, and pass its folder as data.path"
        )
    if not isinstance(row["category"], str):
        raise RequestError(f"question {row['question_id']}: category must be a text, found {row['category']!r:.80}")
    return {key: row[key] for key in ("question_id", "category", "turns")}


_FORMS = {
    "mt_bench": _Form(("prompt", "reference"), _mt_bench, list),
    "humaneval": _Form(("prompt", "canonical_solution", "test", "entry_point"), _humaneval),
    "gsm8k": _Form(("question", "answer"), _gsm8k),
    "alpaca": _Form(("instruction", "input", "output"), _alpaca),
    "cnn_dm": _Form(("article", "highlights"), _cnn_dm),
    "speed_bench": _Form(("question_id", "category", "turns"), _speed_bench, None, True),
}


def _from_hub(name: str, hub: HubDataset) -> Dataset:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    try:
        dataset = load_dataset(hub.repo, hub.subset, split=hub.split, revision=hub.revision)
    except (OSError, ValueError, DatasetsError, HfHubHTTPError) as error:
        raise _not_had(name, hub, first_line(error)) from None
    # Without a connection, `datasets` takes whichever revision its cache holds; the folder is named by the commit.
    cached = {Path(file["filename"]).parent.name for file in dataset.cache_files}
    if len(hub.revision) == 40 and cached != {hub.revision}:
        raise _not_had(name, hub, f"the cache holds revision {', '.join(sorted(cached))}")
    return dataset


def _not_had(name: str, hub: HubDataset, reason: str) -> RequestError:
    return RequestError(
        f"data={name}: {hub.repo} at revision {hub.revision} is neither reachable on the Hugging Face hub nor in the "
        f"cache of `datasets` ({reason}). Connect once, or pass data.path=FILE_OR_FOLDER with a copy of the dataset "
        "(parquet or JSONL), or use Spec-Bench JSONL: data=specbench data.path=FILE_OR_FOLDER"
    )


def _dataset_rows(dataset: Dataset, origin: str) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(dataset):
        yield f"{origin}:{number}", row


def _path_rows(path: Path, hub: HubDataset) -> Iterator[tuple[str, Any]]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    files = _data_files(path, hub)
    if files[0].suffix == ".parquet":
        try:
            # Local files have no revision.
            names = list(map(str, files))
            dataset = load_dataset("parquet", data_files=names, split="train")  # nosec B615
        except (OSError, ValueError, DatasetsError) as error:
            raise RequestError(f"data.path={path}: cannot be read as parquet ({first_line(error)})") from None
        yield from _dataset_rows(dataset, str(path))
    for file in files:
        if file.suffix == ".json" and (text := read_text(file)).lstrip().startswith("["):
            rows = parsed_json(text, str(file))
            yield from ((f"{file}:{number}", row) for number, row in enumerate(rows))
        elif file.suffix != ".parquet":
            yield from json_lines(file)


def _data_files(path: Path, hub: HubDataset) -> list[Path]:
    """The file itself, or the split's files in a folder laid out as the dataset's repository or flat."""
    if kind_of(path, "data.path") == "file":
        if path.suffix not in _SUFFIXES:
            raise RequestError(f"data.path={path}: must be one of {', '.join(_SUFFIXES)}, or a folder of them")
        return [path]
    root = path / hub.subset if hub.subset and (path / hub.subset).is_dir() else path
    for suffix in _SUFFIXES:
        files = sorted(file for file in root.rglob(f"*{suffix}") if not is_companion(file))
        if files:
            chosen = [file for file in files if file.name.startswith(hub.split)] or files
            for file in chosen:
                if kind_of(file, "data.path") != "file":
                    raise RequestError(f"data.path={path}: {file} is a folder, no {suffix} file; rename or move it")
            return chosen
    raise RequestError(f"data.path={path}: no *{', *'.join(_SUFFIXES)} file there")
