"""Generated prompt files: each is read as it was meant or refused in one line; none hangs, ends in a traceback or is
read as something else."""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from quasar.config.schema import DataConfig
from quasar.errors import RequestError
from quasar.evaluation.prompts import Prompt, load_prompts

ROOT = Path(__file__).parents[2]
SEEDS = range(4)
HANG_SECONDS = 10
Rows = list[dict[str, Any]]
PIECES = (
    "word",
    "Wörter",
    "\u2028",
    "\u2029",
    "\x85",
    "\v",
    "\f",
    "\x1c",
    "\r",
    "\n",
    "\t",
    "🙂",
    '"',
    "\\",
    "é",
    " ",
    "1",
)


def rows_of(seed: int) -> Rows:
    draw = random.Random(seed)

    def text() -> str:
        return "x" + "".join(draw.choices(PIECES, k=draw.randint(1, 12)))

    rows: Rows = []
    for number in range(3):
        identity = draw.choice([number, f"id-{number}", f"HumanEval/{number}"])
        row: dict[str, Any] = {"question_id": identity, "turns": [text() for _ in range(draw.randint(1, 3))]}
        row |= draw.choice([{}, {"category": "math"}, {"category": text()}, {"category": None}])
        row |= draw.choice([{}, {"reference": [text()]}, {"reference": text()}, {"reference": None}])
        row |= draw.choice([{}, {"test": "assert f() == 1"}, {"test": "def check(f):\n    f()", "entry_point": "f"}])
        rows.append(row)
    return rows


def written(rows: Rows, escape: bool = False) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=escape) + "\n" for row in rows).encode()


def meant(rows: Rows, file: Path) -> list[tuple[object, ...]]:
    """What a reader has to find, told without the reader."""
    found = []
    for row in rows:
        reference = row.get("reference") or []
        test = row.get("test")
        if test and row.get("entry_point"):
            test = f"{test}\n\ncheck({row['entry_point']})"
        family = row.get("category") or file.stem
        references = (reference,) if isinstance(reference, str) else tuple(reference)
        found.append((str(row["question_id"]), family, tuple(row["turns"]), references, test))
    return found


def read(path: Path) -> list[Prompt]:
    with hangs_refused():
        return load_prompts(DataConfig(name="specbench", path=str(path), limit=None))


def told(prompts: list[Prompt]) -> list[tuple[object, ...]]:
    return [(prompt.key, prompt.family, prompt.turns, prompt.reference, prompt.test) for prompt in prompts]


@contextmanager
def hangs_refused() -> Iterator[None]:
    def fail(*_: object) -> None:
        raise AssertionError(f"still reading after {HANG_SECONDS} s")

    before = signal.signal(signal.SIGALRM, fail)
    left, _ = signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)  # the timer may be pytest's already
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left)
        signal.signal(signal.SIGALRM, before)


SAME: dict[str, Callable[[Rows], bytes]] = {
    "as written": written,
    "escaped": lambda rows: written(rows, escape=True),
    "no last newline": lambda rows: written(rows)[:-1],
    "CRLF": lambda rows: written(rows).replace(b"\n", b"\r\n"),
    "blank lines": lambda rows: b"\n  \n" + written(rows).replace(b"\n", b"\n\t\n"),
    "byte order mark": lambda rows: codecs.BOM_UTF8 + written(rows),
    "spaces around": lambda rows: b"".join(b"  " + line + b"  \n" for line in written(rows).split(b"\n")[:-1]),
    "keys in another order": lambda rows: written([dict(reversed(row.items())) for row in rows]),
    "further keys": lambda rows: written([{**row, "source": "x", "difficulty": [1, {"a": None}]} for row in rows]),
}


def changed(**values: Any) -> Callable[[Rows], bytes]:
    return lambda rows: written([rows[0], {**rows[1], **values}, rows[2]])


def without(key: str) -> Callable[[Rows], bytes]:
    return lambda rows: written([rows[0], {k: v for k, v in rows[1].items() if k != key}, rows[2]])


def line(text: str | bytes) -> Callable[[Rows], bytes]:
    content = text if isinstance(text, bytes) else text.encode()
    return lambda rows: written(rows[:1]) + content + b"\n" + written(rows[2:])


WRONG: dict[str, tuple[Callable[[Rows], bytes], str]] = {
    "UTF-16": (lambda rows: written(rows).decode().encode("utf-16"), r"file\.jsonl:1: is UTF-16 text; .*iconv"),
    "UTF-32": (lambda rows: written(rows).decode().encode("utf-32"), r"file\.jsonl:1: is UTF-32 text; .*iconv"),
    "UTF-16 without mark": (lambda rows: written(rows, True).decode().encode("utf-16-le"), r":1: contains NUL bytes"),
    "Latin-1": (line('{"question_id": 9, "turns": ["é"]}'.encode("latin-1")), r":2: .*UTF-8.*0xe9.*iconv"),
    "cut in a character": (line('{"question_id": 9, "turns": ["é'.encode()[:-1]), r":2: .*UTF-8"),
    "gzip": (lambda rows: gzip.compress(written(rows)), r"gzip; decompress it first \(gunzip\)"),
    "bzip2": (lambda rows: bz2.compress(written(rows)), r"bzip2; decompress it first"),
    "xz": (lambda rows: lzma.compress(written(rows)), r"xz; decompress it first"),
    "zip": (lambda rows: b"PK\x03\x04" + written(rows), r"zip; decompress it first"),
    "companion of macOS": (lambda rows: b"\x00\x05\x16\x07\x00\x02" + bytes(90), r"companion file of macOS"),
    "empty": (lambda rows: b"", r"contain no prompt"),
    "only blank lines": (lambda rows: b"\n \n\r\n", r"contain no prompt"),
    "only a byte order mark": (lambda rows: codecs.BOM_UTF8, r"contain no prompt"),
    "deep lists": (line("[" * 200_000), r":2: is nested too deeply"),
    "deep objects": (line('{"a":' * 100_000 + "1" + "}" * 100_000), r":2: is nested too deeply"),
    "deep turns": (line('{"question_id": 9, "turns": ' + "[" * 99_999 + "]" * 99_999 + "}"), r":2: is nested too deep"),
    "cut line": (lambda rows: written(rows)[:-20], r":3: not valid JSON"),
    "an array over lines": (lambda rows: json.dumps(rows, indent=1).encode(), r":1: not valid JSON"),
    "an array on a line": (lambda rows: json.dumps(rows).encode(), r":1: must be a JSON object"),
    "two objects on a line": (line('{"question_id": 9, "turns": ["a"]} {}'), r":2: not valid JSON"),
    "comment": (line("// comment"), r":2: not valid JSON"),
    "single quotes": (line("{'question_id': 9, 'turns': ['a']}"), r":2: not valid JSON"),
    "a raw control character": (line('{"question_id": 9, "turns": ["a\tb"]}'), r":2: not valid JSON"),
    "a mark inside": (line(codecs.BOM_UTF8 + b'{"question_id": 9, "turns": ["a"]}'), r":2: not valid JSON"),
    "NaN": (line('{"question_id": NaN, "turns": ["a"]}'), r":2: .*NaN"),
    "infinite": (line('{"question_id": 1e999, "turns": ["a"]}'), r":2: .*1e999"),
    "many digits": (line('{"question_id": ' + "1" * 5000 + ', "turns": ["a"]}'), r":2: .*5000 digits"),
    "a key twice": (line('{"question_id": 9, "turns": ["a"], "turns": ["b"]}'), r":2: .*'turns' occurs twice"),
    "half a surrogate pair": (line('{"question_id": 9, "turns": ["\\ud800"]}'), r":2: .*surrogate"),
    "null": (line("null"), r":2: must be a JSON object"),
    "a number": (line("3"), r":2: must be a JSON object"),
    "no id": (without("question_id"), r":2: needs the keys question_id"),
    "no turns": (without("turns"), r":2: needs the keys question_id and turns"),
    "id null": (changed(question_id=None), r":2: question_id must be"),
    "id true": (changed(question_id=True), r":2: question_id must be"),
    "id a float": (changed(question_id=1.5), r":2: question_id must be"),
    "id a list": (changed(question_id=[1]), r":2: question_id must be"),
    "id empty": (changed(question_id=" "), r":2: question_id must be"),
    "ids equal": (lambda rows: written([rows[0], *rows]), r":2: question_id .* occurs 2 times, first at .*:1"),
    "ids equal as text": (
        lambda rows: written([{"question_id": 7, "turns": ["a"]}, {"question_id": "7", "turns": ["b"]}]),
        r":2: question_id 7 occurs 2 times",
    ),
    "turns a text": (changed(turns="text"), r":2: turns must be a list"),
    "turns empty": (changed(turns=[]), r":2: turns must be a list"),
    "turns null": (changed(turns=None), r":2: turns must be a list"),
    "turns of numbers": (changed(turns=["a", 1]), r":2: turns must be a list"),
    "turns of messages": (changed(turns=[{"role": "user", "content": "a"}]), r":2: turns must be a list"),
    "a blank turn": (changed(turns=["a", " \n"]), r":2: turns must be a list"),
    "category a number": (changed(category=3), r":2: category must be"),
    "reference a number": (changed(reference=3), r":2: reference must be"),
    "reference of numbers": (changed(reference=[3]), r":2: reference must be"),
    "reference an object": (changed(reference={"a": "b"}), r":2: reference must be"),
    "test a list": (changed(test=["assert True"]), r":2: test must be"),
    "test no Python": (changed(test="assert ("), r":2: test is not valid Python"),
    "test too deep": (changed(test="(" * 5000 + ")" * 5000), r":2: test is not valid Python"),
    "test with NUL": (changed(test="a\0b"), r":2: test is not valid Python"),
    "entry point no name": (changed(test="pass", entry_point="f(); g"), r":2: entry_point must be"),
    "entry point a number": (changed(test="pass", entry_point=1), r":2: entry_point must be"),
    "misspelled reference": (
        lambda rows: written([rows[0], {"question_id": 9, "turns": ["a"], "references": ["b"]}]),
        r":2: the key 'references' is not known; write reference",
    ),
    "misspelled category": (
        lambda rows: written([rows[0], {"question_id": 9, "turns": ["a"], "Category": "b"}]),
        r":2: the key 'Category' is not known; write category",
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_spellings_of_one_content_are_read_alike(name: str, tmp_path: Path) -> None:
    for seed in SEEDS:
        rows = rows_of(seed)
        file = tmp_path / "file.jsonl"
        file.write_bytes(SAME[name](rows))
        assert told(read(file)) == meant(rows, file)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    change, message = WRONG[name]
    for seed in SEEDS:
        file = tmp_path / "file.jsonl"
        file.write_bytes(change(rows_of(seed)))
        with pytest.raises(RequestError, match=message) as refused:
            read(file)
        assert str(file) in str(refused.value)
        assert "\n" not in str(refused.value)
        assert len(str(refused.value)) < 600


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Flip, cut, repeat or insert some bytes."""
    for _ in range(draw.randint(1, 3)):
        at, to = sorted(draw.sample(range(len(content)), 2)) if len(content) > 2 else (0, 0)
        content = draw.choice(
            [
                content[:at] + bytes([content[at] ^ (1 << draw.randrange(8))]) + content[at + 1 :] if content else b"",
                content[:at] + content[min(to, at + 4) :],
                content[:at],
                content[:to] + content[at:],
                content[:at] + draw.choice([b"\n", b"\0", b'"', b"{", b"]", b"\xff", "\u2028".encode()]) + content[at:],
            ]
        )
    return content


def plainly_read(file: Path) -> list[tuple[object, ...]]:
    """The content as the json module alone understands it; raises any exception for a file that it does not."""
    return meant([json.loads(text) for text in file.read_bytes().decode().split("\n") if text.strip(" \t\r")], file)


def test_damaged_files_are_refused_or_read_as_they_are(tmp_path: Path) -> None:
    accepted, refusals = 0, []
    file = tmp_path / "file.jsonl"
    for seed in range(300):
        file.write_bytes(damaged(written(rows_of(seed)), random.Random(seed)))
        try:
            found = told(read(file))
        except RequestError as error:
            refusals.append(str(error))
        else:
            assert found == plainly_read(file)
            accepted += 1
    assert all(str(file) in refusal and "\n" not in refusal for refusal in refusals)
    assert 10 < accepted < 250


def test_what_is_no_regular_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)
        server.bind("socket.jsonl")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    (tmp_path / "gone.jsonl").symlink_to("nothing")
    for name, message in {
        "pipe.jsonl": "is a pipe",
        "socket.jsonl": "is a socket",
        "loop.jsonl": "cannot be read",
        "gone.jsonl": "no such file",
        "/dev/zero": "is a device",
        "/dev/null": "is a device",
        "x" * 5000: "cannot be read",
        "a\0b": "data.path",
        "~nobody-of-that-name/file": "data.path=~nobody",
    }.items():
        with pytest.raises(RequestError, match=message):
            read(Path(name))


def test_folders_are_read_without_companions(tmp_path: Path) -> None:
    rows = rows_of(0)
    (tmp_path / "a.jsonl").write_bytes(written(rows))
    (tmp_path / "._a.jsonl").write_bytes(b"\x00\x05\x16\x07" + bytes(90))
    (tmp_path / "B.JSONL").write_bytes(written(rows))
    (tmp_path / "notes.txt").write_text("notes")
    assert sorted({prompt.family for prompt in read(tmp_path)}) == ["B", "a"]
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(written(rows)))
    with pytest.raises(RequestError, match=r"c\.jsonl\.gz is compressed"):
        read(tmp_path)
    (tmp_path / "c.jsonl.gz").unlink()
    (tmp_path / "d.jsonl").mkdir()
    with pytest.raises(RequestError, match=r"d\.jsonl: is a folder"):
        read(tmp_path)
    (tmp_path / "d.jsonl").rmdir()
    os.mkfifo(tmp_path / "e.jsonl")
    with pytest.raises(RequestError, match=r"e\.jsonl: is a pipe"):
        read(tmp_path)


def test_a_pipe_ends_the_program_with_one_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), "model=tiny", "data=specbench", "data.path=pipe", "hydra.run.dir=out"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.strip().split("\n") == ["error: data.path=pipe: is a pipe; pass a regular file or a folder"]
