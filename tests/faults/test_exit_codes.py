"""Whatever goes wrong, a run ends with the promised exit code and says what happened, where, and what to do."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from quasar.experiment import run as run_module
from quasar.experiment.decoder import PromptDecoder
from quasar.results.runs import read_run
from tests.in_process import Start, disk_full_after
from tests.selection import fast

ROOT = Path(__file__).parents[2]


def test_an_unexpected_error_exits_with_1_and_its_traceback(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("sabotage")

    monkeypatch.setattr(PromptDecoder, "decode_prompt", broken)
    code, _, err = start("hydra.run.dir=out")
    assert code == 1
    assert err.rstrip().endswith("ZeroDivisionError: sabotage")
    status = json.loads((tmp_path / "out/status.json").read_text())
    assert status["status"] == "failed"
    assert "Traceback" in status["error"]


@pytest.mark.parametrize("below", ["", "/x/y"])
@pytest.mark.parametrize("key", ["hydra.run.dir", "output_dir"])
def test_a_file_in_the_way_is_named(start: Start, tmp_path: Path, key: str, below: str) -> None:
    (tmp_path / "taken").write_text("something else")
    code, _, err = start(f"{key}={tmp_path / 'taken'}{below}")
    (line,) = err.strip().splitlines()
    assert code == 1
    assert line.startswith(f"error: {tmp_path / 'taken'}")
    assert "a file is in the way; remove it or choose another folder (hydra.run.dir" in line
    assert (tmp_path / "taken").read_text() == "something else"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_a_forbidden_folder_is_named(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), "lock")

    monkeypatch.setattr("quasar.results.store.FileLock.acquire", refused)
    code, _, err = start("hydra.run.dir=out")
    (line,) = err.strip().splitlines()
    assert code == 1
    assert line.startswith(f"error: {tmp_path / 'out'}: {os.strerror(number)}; choose a folder that you may write to")


def test_a_forbidden_folder_is_told_before_the_model_is_loaded(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("out").mkdir()
    monkeypatch.setattr("quasar.results.store.os.access", lambda *_: False)
    monkeypatch.setattr(run_module, "prepare", lambda *_: pytest.fail("the model was loaded"))
    code, _, err = start("hydra.run.dir=out")
    assert code == 1
    assert "out: Permission denied; choose a folder that you may write to" in err


@pytest.mark.parametrize("writes", fast(range(7), 1, 5))
def test_a_full_disk_is_named_and_the_status_says_failed(start: Start, tmp_path: Path, writes: int) -> None:
    """From the n-th write to disk on there is no room for another file or line."""
    with disk_full_after(writes):
        code, _, err = start("hydra.run.dir=out")
    (line,) = err.strip().splitlines()
    assert code == 1
    assert line.startswith(f"error: {tmp_path / 'out'}/")
    assert "No space left on device; free some space there" in line
    stored = read_run(tmp_path / "out")
    assert stored.status == ("failed" if writes > 2 else "partial" if writes else "pending")
    assert stored.status != "failed" or "No space left on device" in str(stored.error)
    assert start("hydra.run.dir=out")[0] == 0
    assert read_run(tmp_path / "out").prompts == 3


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("only root may mount a file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("free", [4, 8, 12])
def test_a_disk_that_is_really_full(start: Start, small_disk: Path, free: int) -> None:
    (small_disk / "filler").write_bytes(bytes((64 - 4 - free) * 1024))
    code, _, err = start(f"hydra.run.dir={small_disk}/out")
    (line,) = err.strip().splitlines()
    assert code == 1
    assert f"error: {small_disk}/out" in line
    assert "free some space there" in line
    assert read_run(small_disk / "out").status != "running"
    (small_disk / "filler").unlink()
    assert start(f"hydra.run.dir={small_disk}/out")[0] == 0


def test_a_wrong_request_still_exits_with_2(start: Start) -> None:
    for wrong in ("verifier=int3", "nothing=1", "decode.temperature=warm", "="):
        code, _, err = start("hydra.run.dir=out", wrong)
        assert (code, "Traceback" in err) == (2, False), (wrong, err)


def test_a_wrong_request_leaves_a_finished_run_alone(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure before a run begins must not mark the finished run of that folder as failed."""
    assert start("hydra.run.dir=out")[0] == 0

    def broken(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(run_module, "prepare", broken)
    assert start("hydra.run.dir=out")[0] == 1
    assert read_run(tmp_path / "out").status == "done"
    assert start("hydra.run.dir=out", "seed=1")[0] == 2
    assert read_run(tmp_path / "out").status == "done"


GUARDED = """
import os, signal, sys, time
from quasar.experiment.entry import guarded
def interrupt(): os.kill(os.getpid(), signal.SIGINT); time.sleep(1)
def program():
    {body}
sys.exit(guarded(program))
"""


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("interrupt()", 130),
        # An extension module turns the interrupt into another error while it is imported.
        ("\n    try: interrupt()\n    except KeyboardInterrupt: raise ImportError('a module') from None", 130),
        ("\n    try: interrupt()\n    except KeyboardInterrupt: return 1", 130),
        ("\n    try: interrupt()\n    finally: interrupt()", 130),
        ("import atexit; atexit.register(interrupt); interrupt()", 130),
        ("return 0", 0),
        ("return 2", 2),
    ],
)
def test_an_interrupt_always_exits_with_130(body: str, code: int) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", GUARDED.format(body=body)],
        cwd=ROOT,
        capture_output=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert ended.returncode == code, ended.stderr


def test_help_into_a_closed_pipe_is_quiet() -> None:
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), errors) == (0, b"")


def test_a_closed_output_ends_a_run_as_failed(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from quasar.results.console import Reporter, _Console

    def closed(reporter: Reporter, text: str = "", style: str | None = None) -> None:
        try:
            raise BrokenPipeError
        except BrokenPipeError:
            _Console().on_broken_pipe()

    monkeypatch.setattr("quasar.experiment.header.Reporter.header", lambda reporter, entries: closed(reporter))
    code, _, err = start("hydra.run.dir=out")
    assert (code, err.strip()) == (1, "error: standard output was closed; the same command continues the run")
    assert read_run(tmp_path / "out").status == "failed"
