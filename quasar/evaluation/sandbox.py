"""Runs generated Python in separate processes with limited time, memory, files and calls, without a network.

The answer and its test run in two processes: the answer never sees the test, and the test sees nothing of the answer
but plain values. Both are isolated by what the kernel offers; `active_level` finds out once what that is. Without any
isolation by the kernel there remain guards inside the interpreter. They stop mistakes of a model, such as files written
to wrong places, but no code that knows them.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quasar.config.schema import EvaluateConfig
from quasar.errors import QuasarError, RequestError
from quasar.evaluation.isolated.worker import JOB, PASSED, READY

SETUP_SECONDS = 60.0
ELAPSED_PER_CPU_SECOND = 4
"""A busy machine may not make a correct answer wrong, so elapsed time is limited less strictly than CPU time."""

_BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from quasar.evaluation.isolated.worker import main; main()"
_ROOT = str(Path(__file__).parents[2])


@dataclass(frozen=True)
class Level:
    """What isolates generated code: parts of `quasar.evaluation.isolated.kernel`; none means guards only."""

    parts: tuple[str, ...]

    @property
    def isolated(self) -> bool:
        return bool(self.parts)

    def __str__(self) -> str:
        names = {"namespaces": "namespaces (user, mount, network, pid)", "landlock": "Landlock", "seccomp": "seccomp"}
        return ", ".join(names[part] for part in self.parts) or "guards inside the interpreter only"


LEVELS = (
    Level(("namespaces", "landlock", "seccomp")),
    Level(("namespaces", "seccomp")),
    Level(("landlock", "seccomp")),
    Level(()),
)
"""From the strongest to the weakest. Each needs seccomp: without it, nothing bounds the number of processes of root."""


@functools.cache
def active_level() -> Level:
    """Return the strongest level that this machine offers. Each is tried out: it has to prevent what it promises."""
    return next(level for level in LEVELS if not level.isolated or works(level))


def required_isolation(evaluate: EvaluateConfig) -> str | None:
    """Describe what isolates generated code; None if ``evaluate.accuracy`` is false, so that none is executed.

    Raises RequestError if the kernel isolates nothing and ``evaluate.unsafe_code`` is false.
    """
    if not evaluate.accuracy:
        return None
    level = active_level()
    if not level.isolated and not evaluate.unsafe_code:
        raise RequestError(
            "evaluate.accuracy=true: this machine's kernel offers neither user namespaces nor Landlock with seccomp, "
            "so generated code would run with your rights; run it in a container of its own and pass "
            "evaluate.unsafe_code=true, or pass evaluate.accuracy=false"
        )
    return str(level)


def works(level: Level) -> bool:
    """Whether the level can be set up here and prevents reads and writes of a file, connections, and more."""
    with tempfile.TemporaryDirectory(prefix="quasar-sandbox-") as folder, socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        file = Path(folder, "outside")
        file.write_text("outside")
        forbidden = {
            "file": str(file),
            "environment": f"/proc/{os.getpid()}/environ",
            "port": str(server.getsockname()[1]),
        }
        work = Path(folder, "work")
        work.mkdir()
        job = {"role": "probe", "forbidden": forbidden, "parts": level.parts, "seconds": 20, "megabytes": 512}
        process = _start(work, job, subprocess.DEVNULL, subprocess.DEVNULL, subprocess.DEVNULL)
        try:
            return process.wait(SETUP_SECONDS) == PASSED
        except subprocess.TimeoutExpired:
            return False
        finally:
            _stop(process)


def passes(
    program: str,
    test: str = "",
    context: str = "",
    wanted: Sequence[str] = (),
    trusts: bool = False,
    seconds: int = 5,
    megabytes: int = 512,
    level: Level | None = None,
) -> bool:
    """Whether a Python program runs to its end and then passes a test, which raises an exception if it does not.

    test: Python code that uses the names that the program defines
    context: trusted Python code whose names the test uses too; they take precedence, except for ``wanted``
    trusts: whether objects of the program's classes may decide comparisons, for tasks that ask for a class
    seconds: CPU time; the elapsed time is limited to `ELAPSED_PER_CPU_SECOND` times as much
    level: None for `active_level`

    Raises QuasarError if the sandbox cannot be set up, so that no answer is called wrong for that reason.
    """
    parts = (active_level() if level is None else level).parts
    limits = {"parts": parts, "seconds": seconds, "megabytes": megabytes}
    answer_job = {"role": "answer", "program": program, **limits}
    test_job = {"role": "test", "test": test, "context": context, "wanted": [*wanted], "trusts": trusts, **limits}
    with contextlib.ExitStack() as stack:
        folders = [Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="quasar-sandbox-"))) for _ in range(2)]
        requests, results = os.pipe(), os.pipe()
        try:
            answer = _start(folders[0], answer_job, requests[0], results[1], subprocess.DEVNULL)
            stack.callback(_stop, answer)
            tester = _start(folders[1], test_job, results[0], requests[1], subprocess.PIPE)
            stack.callback(_stop, tester)
        finally:
            for end in (*requests, *results):
                os.close(end)
        _wait_until_ready(tester, parts)
        try:
            return tester.wait(seconds * ELAPSED_PER_CPU_SECOND) == PASSED
        except subprocess.TimeoutExpired:
            return False


def _wait_until_ready(tester: subprocess.Popen[bytes], parts: Sequence[str]) -> None:
    """Wait until both processes are isolated and the answer is about to start."""
    assert tester.stderr is not None
    deadline = time.monotonic() + SETUP_SECONDS
    said = b""
    while said != READY:
        left = max(deadline - time.monotonic(), 0)
        ready, _, _ = select.select([tester.stderr], [], [], left)
        chunk = os.read(tester.stderr.fileno(), 4096) if ready else b""
        if not chunk:
            reason = said.decode(errors="replace").strip().splitlines() or ["no message"]
            raise QuasarError(
                f"the sandbox for generated code ({Level(tuple(parts))}) could not be set up: {reason[-1]}; "
                "pass evaluate.accuracy=false to do without it"
            )
        said += chunk


def _start(folder: Path, job: dict[str, object], stdin: int, stdout: int, stderr: int) -> subprocess.Popen[bytes]:
    folder.joinpath(JOB).write_text(json.dumps(job), encoding="utf-8")
    return subprocess.Popen(
        [sys.executable, "-I", "-B", "-X", "utf8", "-c", _BOOT, _ROOT, str(folder)],
        cwd=folder,
        env={"PATH": os.defpath, "HOME": str(folder), "OPENBLAS_NUM_THREADS": "1"},
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
    )


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Kill the process with all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stderr is not None:
        process.stderr.close()
