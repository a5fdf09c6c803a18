"""Reads benchmarks from their Hugging Face datasets and converts their rows to the Spec-Bench form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quasar.config.schema import DataConfig, HubDataset
from quasar.errors import RequestError

if TYPE_CHECKING:
    from datasets import Dataset

Row = dict[str, Any]
"""One row of a dataset, or of a Spec-Bench file: column names and their values."""

_READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}


def benchmark_rows(data: DataConfig) -> Iterator[tuple[str, Row]]:
    """Yield the place and the Spec-Bench form of the first ``data.limit`` rows.

    The rows come from ``data.path`` if it is set, otherwise from ``data.hub`` through the cache of ``datasets``. The
    form has the keys ``question_id``, ``turns``, ``reference`` and what grades an answer. ``question_id`` is the row's
    number in its split, from 0.

    Raises RequestError if the dataset is not available or lacks a column; the message names the remedy.
    """
    form = _FORMS.get(data.name)
    if form is None:
        raise RequestError(f"data.name={data.name}: data.hub is read for one of {', '.join(_FORMS)} only")
    assert data.hub is not None
    if data.path is None:
        origin, dataset = f"{data.hub.repo}@{str(data.hub.revision)[:8]}", _from_hub(data.name, data.hub)
    else:
        origin, dataset = data.path, _from_path(Path(data.path).expanduser(), data.hub)
    missing = [column for column in form.columns if column not in dataset.column_names]
    if missing:
        raise RequestError(
            f"{origin}: data={data.name} needs the columns {', '.join(form.columns)}; {', '.join(missing)} not found"
        )
    # Only these rows are converted: a split may hold tens of thousands.
    count = len(dataset) if data.limit is None else min(data.limit, len(dataset))
    for number, row in enumerate(dataset.select(range(count))):
        yield f"{origin}:{number}", {"question_id": number, **form.convert(row)}


@dataclass(frozen=True)
class _Form:
    """The columns that a benchmark's rows must have, and how one becomes a row of a Spec-Bench file."""

    columns: tuple[str, ...]
    convert: Callable[[Row], Row]


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


_FORMS = {
    "mt_bench": _Form(("prompt", "reference"), _mt_bench),
    "humaneval": _Form(("prompt", "canonical_solution", "test", "entry_point"), _humaneval),
    "gsm8k": _Form(("question", "answer"), _gsm8k),
    "alpaca": _Form(("instruction", "input", "output"), _alpaca),
    "cnn_dm": _Form(("article", "highlights"), _cnn_dm),
}


def _from_hub(name: str, hub: HubDataset) -> Dataset:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    try:
        dataset = load_dataset(hub.repo, hub.subset, split=hub.split, revision=hub.revision)
    except (OSError, ValueError, DatasetsError, HfHubHTTPError) as error:
        raise _not_had(name, hub, _first_line(error)) from None
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


def _from_path(path: Path, hub: HubDataset) -> Dataset:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    files = _data_files(path, hub)
    reader = _READERS[files[0].suffix]
    try:
        return load_dataset(reader, data_files=[str(file) for file in files], split="train")
    except (OSError, ValueError, DatasetsError) as error:
        raise RequestError(f"data.path={path}: cannot be read as {reader} ({_first_line(error)})") from None


def _data_files(path: Path, hub: HubDataset) -> list[Path]:
    """The file itself, or the split's files in a folder laid out as the dataset's repository or flat."""
    if path.is_file():
        if path.suffix not in _READERS:
            raise RequestError(f"data.path={path}: must be one of {', '.join(_READERS)}, or a folder of them")
        return [path]
    if not path.is_dir():
        raise RequestError(f"data.path={path}: no such file or folder; pass a parquet or JSONL file or their folder")
    root = path / hub.subset if hub.subset and (path / hub.subset).is_dir() else path
    for suffix in _READERS:
        files = sorted(root.rglob(f"*{suffix}"))
        if files:
            return [file for file in files if file.name.startswith(hub.split)] or files
    raise RequestError(f"data.path={path}: no *{', *'.join(_READERS)} file there")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
