"""What generated code can reach from the sandbox, at every level of isolation that this machine offers."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from quasar.errors import QuasarError, RequestError
from quasar.evaluation import sandbox
from quasar.evaluation.sandbox import LEVELS, Level, active_level, passes, required_isolation, works
from tests.compose import composed_run

SECRET = "QUASAR_TEST_SECRET"


@pytest.fixture(params=LEVELS, ids=lambda level: "+".join(level.parts) or "guards")
def level(request: pytest.FixtureRequest) -> Level:
    if request.param.isolated and not works(request.param):
        pytest.skip("this machine does not offer it")
    return request.param


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(100)",
        "x = bytearray(2 << 30)",
        "import socket; socket.create_connection(('127.0.0.1', 9), timeout=1)",
        "import socket; socket.getaddrinfo('localhost', 80)",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.system('true')",
        "import os; os.fork()",
        "raise SystemExit(0)",
        "import os; os._exit(0)",
        "import os; os._exit(57)",
        "def broken(:",
    ],
)
def test_the_sandbox_stops(program: str) -> None:
    assert not passes(program, seconds=2)


def test_the_sandbox_keeps_writing_in_its_folder(tmp_path: Path) -> None:
    outside = tmp_path / "precious"
    outside.write_text("kept")
    assert not passes(f"open({str(outside)!r}, 'w').write('gone')")
    assert not passes(f"import os; os.remove({str(outside)!r})")
    assert outside.read_text() == "kept"
    fine = "open('here', 'w').write('fine'); assert open('here').read() == 'fine'; import os; os.remove('here')"
    # Only a private file system has a bound on its size; without one, nothing can be written.
    assert passes(fine) is ("namespaces" in active_level().parts)


def test_answers_are_graded_at_every_level(level: Level) -> None:
    program = "import math, re, collections, itertools, functools, heapq, typing, dataclasses, random, string, json\n"
    program += "def double(x):\n    return 2 * x\n"
    assert passes(program, "assert double(2) == 4", level=level)
    assert not passes(program, "assert double(2) == 5", level=level)
    assert not passes(f"{program}\n1 / 0", "assert double(2) == 4", level=level)


FILE, FOLDER = "OUTSIDE/precious", "OUTSIDE"
ESCAPES = {
    "bytes path": f"open(os.fsencode('{FILE}'), 'wb').write(b'gone')",
    "os.open": f"os.write(os.open('{FILE}', os.O_WRONLY | os.O_TRUNC), b'gone')",
    "dir_fd": f"os.write(os.open('precious', os.O_WRONLY | os.O_TRUNC, dir_fd=os.open('{FOLDER}', os.O_RDONLY)), b'x')",
    "dir_fd remove": f"os.remove('precious', dir_fd=os.open('{FOLDER}', os.O_RDONLY))",
    "bytes remove": f"os.remove(os.fsencode('{FILE}'))",
    "link": f"os.link('{FILE}', 'own'); open('own', 'w').write('gone')",
    "link target": f"open('own', 'w').write('x'); os.link('own', '{FOLDER}/new')",
    "symlink": f"os.symlink('{FILE}', 'own'); open('own', 'w').write('gone')",
    "symlink target": f"os.symlink('own', '{FOLDER}/new')",
    "rename": f"os.rename('{FILE}', 'own')",
    "rename target": f"open('own', 'w').write('gone'); os.rename('own', '{FILE}')",
    "replace target": f"open('own', 'w').write('gone'); os.replace('own', '{FILE}')",
    "truncate": f"os.truncate('{FILE}', 0)",
    "ftruncate": f"os.ftruncate(os.open('{FILE}', os.O_RDWR), 0)",
    "chmod": f"os.chmod('{FILE}', 0o777)",
    "fchmod": f"os.fchmod(os.open('{FILE}', os.O_RDONLY), 0o777)",
    "chown": f"os.chown('{FILE}', 1, 1)",
    "utime": f"os.utime('{FILE}', (1, 1))",
    "setxattr": f"os.setxattr('{FILE}', 'user.x', b'1')",
    "mkfifo": f"os.mkfifo('{FOLDER}/new')",
    "mknod": f"os.mknod('{FOLDER}/new')",
    "mkdir": f"os.mkdir('{FOLDER}/new')",
    "rmdir": f"os.rmdir('{FOLDER}/empty')",
    "sqlite3": f"import sqlite3; c = sqlite3.connect('{FOLDER}/new'); c.execute('create table t(x)'); c.commit()",
    "_posixsubprocess": f"""
import _posixsubprocess
r, w = os.pipe()
_posixsubprocess.fork_exec([b'/bin/sh', b'-c', b'echo gone > {FILE}'], [b'/bin/sh'], True, (w,), None, None, -1, -1,
    -1, -1, -1, -1, r, w, False, False, -1, None, None, None, -1, None, False)
import time
time.sleep(0.3)
""",
    "posix_spawn": f"os.posix_spawn('/bin/sh', ['sh', '-c', 'echo gone > {FILE}'], {{}}); os.wait()",
    "execv": f"os.execv('/bin/sh', ['sh', '-c', 'echo gone > {FILE}'])",
    "ctypes": f"import ctypes; ctypes.CDLL(None).truncate(b'{FILE}', 0)",
    "ctypes remove": f"import ctypes; ctypes.CDLL(None).unlink(b'{FILE}')",
    "mount": f"import ctypes; ctypes.CDLL(None).mount(b'/', b'{FOLDER}/empty', None, 4096, None)",
    "edited hook": f"""
import gc, types
for found in gc.get_objects():
    if isinstance(found, types.FunctionType) and found.__name__ in ('refuse', 'hook'):
        found.__code__ = (lambda event, arguments: None).__code__
open('{FILE}', 'w').write('gone')
""",
    "edited hook by traceback": f"""
import builtins
builtins.isinstance = lambda *args: False
try:
    os.remove('{FILE}')
except PermissionError as error:
    frame = error.__traceback__.tb_next.tb_frame
    frame.f_globals.clear()
open('{FILE}', 'w').write('gone')
""",
    "evil path": f"""
class Evil:
    count = 0
    def __fspath__(self):
        Evil.count += 1
        return 'own' if Evil.count == 1 else '{FILE}'
os.open(Evil(), os.O_WRONLY | os.O_TRUNC)
""",
    "proc root": f"open('/proc/self/root{FILE}', 'w').write('gone')",
    "proc parent": f"open(f'/proc/{{os.getppid()}}/cwd/../../{FILE}', 'w').write('gone')",
    "dup of a descriptor": f"open(os.open('{FILE}', os.O_WRONLY), 'w').write('gone')",
}


ISOLATED = [level for level in LEVELS if level.isolated]
GUARDS = Level(())


def attempted(codes: list[str]) -> str:
    """A program that goes on after each attempt, whether it fails or not."""
    return f"""
import os
for code in {codes!r}:
    try:
        exec(code, {{"os": os}})
    except BaseException:
        pass
"""


def require(level: Level) -> None:
    if level.isolated and not works(level):
        pytest.skip("this machine does not offer it")


# The guards end the process at the first attempt, so each one takes a process of its own.
@pytest.mark.parametrize(
    ("level", "escapes"),
    [*((level, [*ESCAPES]) for level in ISOLATED), *((GUARDS, [name]) for name in ESCAPES)],
    ids=[*("+".join(level.parts) for level in ISOLATED), *(f"guards {name}" for name in ESCAPES)],
)
def test_nothing_outside_is_changed(level: Level, escapes: list[str], tmp_path: Path) -> None:
    require(level)
    (tmp_path / "empty").mkdir()
    file = tmp_path / "precious"
    file.write_text("kept")
    file.chmod(0o600)
    before = (file.stat().st_ino, file.stat().st_uid, file.stat().st_mtime_ns, file.stat().st_nlink)
    codes = [ESCAPES[name].replace("OUTSIDE", str(tmp_path)) for name in escapes]
    # Only what happens outside matters: a program may well go on in its own folder.
    reached_its_end = passes(attempted(codes), level=level)
    assert reached_its_end or not level.isolated
    assert file.read_text() == "kept"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert (file.stat().st_ino, file.stat().st_uid, file.stat().st_mtime_ns, file.stat().st_nlink) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "precious"]
    assert not os.listxattr(file)


READINGS = {
    "open": "open(PATH, 'rb').read()",
    "os.open": "os.read(os.open(PATH, os.O_RDONLY), 100)",
    "dir_fd": "os.read(os.open(os.path.basename(PATH), 0, dir_fd=os.open(os.path.dirname(PATH), os.O_RDONLY)), 9)",
    "bytes": "open(os.fsencode(PATH), 'rb').read()",
    "mmap": "__import__('mmap').mmap(os.open(PATH, os.O_RDONLY), 0, prot=1)[:]",
    "ctypes": "__import__('ctypes').CDLL(None).open(PATH.encode(), 0) >= 0 or 1 / 0",
}


@pytest.mark.parametrize(
    ("level", "readings"),
    [*((level, [*READINGS]) for level in ISOLATED), *((GUARDS, [name]) for name in READINGS)],
    ids=[*("+".join(level.parts) for level in ISOLATED), *(f"guards {name}" for name in READINGS)],
)
@pytest.mark.parametrize("kind", ["file", "environment"])
def test_nothing_outside_is_read(level: Level, readings: list[str], kind: str, tmp_path: Path) -> None:
    require(level)
    (tmp_path / "secret").write_text("secret")
    path = tmp_path / "secret" if kind == "file" else f"/proc/{os.getpid()}/environ"
    codes = [READINGS[name].replace("PATH", repr(str(path))) for name in readings]
    program = f"""
import os
read = []
for code in {codes!r}:
    try:
        eval(code)
        read.append(code)
    except BaseException:
        pass
"""
    assert passes(program, "assert read == [], read", level=level) or not level.isolated
    assert not passes(program, "assert read != []", level=level)


def test_the_environment_is_empty(level: Level, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRET, "secret")
    # GOMP_SPINCOUNT is set by the package itself when it is imported inside.
    names = {"PATH", "HOME", "OPENBLAS_NUM_THREADS", "LC_CTYPE", "PWD", "GOMP_SPINCOUNT"}
    assert passes("import os\nnames = set(os.environ)", f"assert names <= {names!r}, names", level=level)


def test_no_other_process_is_reached(level: Level) -> None:
    program = f"import os, signal\nos.kill({os.getpid()}, signal.SIGUSR2)"
    assert not passes(program, level=level)  # SIGUSR2 would end this test
    assert not passes(
        f"import resource\nresource.prlimit({os.getpid()}, resource.RLIMIT_NOFILE, (64, 64))", level=level
    )


def test_no_connection_is_made(level: Level) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.settimeout(0.2)
        port = server.getsockname()[1]
        assert not passes(f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=1)", level=level)
        with pytest.raises(TimeoutError):
            server.accept()


def test_the_disk_has_a_bound(level: Level) -> None:
    program = "for n in range(64):\n    open(f'file{n}', 'wb').write(bytes(1 << 19))"
    assert not passes(program, level=level)


@pytest.mark.parametrize(
    "program",
    [
        "import threading\nfor _ in range(10000): threading.Thread(target=threading.Event().wait, daemon=True).start()",
        "os.fork()\nos.fork()",
        "x = []\nwhile True: x.append(bytes(1 << 20))",
        "open('x', 'wb').write(bytes(2 << 20))",
    ],
)
def test_resources_are_limited(program: str, level: Level) -> None:
    assert not passes(f"import os\n{program}", level=level, seconds=3)


def test_the_level_is_named() -> None:
    assert str(Level(("namespaces", "landlock", "seccomp"))) == (
        "namespaces (user, mount, network, pid), Landlock, seccomp"
    )
    assert "guards" in str(Level(()))


def test_a_machine_without_isolation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "active_level", lambda: GUARDS)
    with pytest.raises(RequestError, match=r"evaluate\.accuracy=true: .*evaluate\.unsafe_code=true"):
        required_isolation(composed_run("evaluate.accuracy=true").evaluate)
    allowed = composed_run("evaluate.accuracy=true", "evaluate.unsafe_code=true").evaluate
    assert required_isolation(allowed) == str(GUARDS)
    assert required_isolation(composed_run().evaluate) is None


def test_a_sandbox_that_cannot_be_set_up_is_no_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quasar.evaluation.sandbox._BOOT", "import sys; print('no memory', file=sys.stderr)")
    with pytest.raises(QuasarError, match=r"could not be set up: no memory"):
        passes("pass")


ROOT = Path(__file__).parents[1]
RUN = [
    "model=tiny",
    "drafter=none",
    "verifier=fp16",
    "decode.max_new_tokens=4",
    "evaluate.baselines=false",
    "threads=1",
]
RUN += ["evaluate.fidelity=false", "evaluate.accuracy=true", "data.path=code.jsonl", "data=specbench"]


def run(folder: Path, code: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    row = {"question_id": 1, "turns": ["def one():\n    pass\n"], "test": "assert one() == 1"}
    (folder / "code.jsonl").write_text(json.dumps(row) + "\n")
    command = [sys.executable, "-c", code, *RUN, "hydra.run.dir=out", *overrides]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=300
    )


START = "import sys; from quasar.experiment.main import main; sys.exit(main())"
WITHOUT = "from quasar.evaluation import sandbox; sandbox.active_level = lambda: sandbox.Level(()); "


def test_the_level_is_told_where_accuracy_is(tmp_path: Path) -> None:
    done = run(tmp_path, START)
    assert done.returncode == 0, done.stderr
    level = str(active_level())
    assert json.loads((tmp_path / "out/environment.json").read_text())["sandbox"] == level
    said = " ".join(done.stdout.split())
    assert f"generated code is isolated by {level}" in said
    assert f"Task accuracy: task 0/1; generated code was isolated by {level}." in said.replace("code 0/1", "task 0/1")


def test_a_run_without_isolation_is_refused_unless_it_is_asked_for(tmp_path: Path) -> None:
    refused = run(tmp_path, WITHOUT + START)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: evaluate.accuracy=true: ")
    assert not list(tmp_path.glob("out/*"))
    assert run(tmp_path, WITHOUT + START, "evaluate.unsafe_code=true").returncode == 0
    environment = json.loads((tmp_path / "out/environment.json").read_text())
    assert environment["sandbox"] == "guards inside the interpreter only"
