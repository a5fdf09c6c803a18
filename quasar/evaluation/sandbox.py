"""Runs generated Python in a separate process with limited time and memory, without network, in a temporary folder.

This protects a run against mistakes of a model, such as endless loops, huge lists or files written to wrong places. It
does not protect against an attacker: run untrusted models in a container.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile

PASSED = 57
"""Exit code after the last line of the program. A program that exits early returns another code and fails."""

_BOOT = """
import ctypes, os, resource, sys
seconds, megabytes = int(sys.argv[1]), int(sys.argv[2])
program = sys.stdin.read()
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
libc = ctypes.CDLL(None)
if libc.unshare(CLONE_NEWNET) != 0:
    libc.unshare(CLONE_NEWUSER | CLONE_NEWNET)
folder = os.path.realpath(os.getcwd()) + os.sep

REFUSED = ("socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.kill", "ctypes.")

def refuse(event, arguments):
    if event.startswith(REFUSED):
        raise PermissionError(event)
    if event == "open" and isinstance(arguments[0], str):
        writes = arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        if writes and not os.path.realpath(arguments[0]).startswith(folder):
            raise PermissionError(arguments[0])
    if event in ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "shutil.rmtree"):
        if not os.path.realpath(os.fspath(arguments[0])).startswith(folder):
            raise PermissionError(arguments[0])

leave = os._exit
sys.addaudithook(refuse)
try:
    exec(compile(program, "program", "exec"), {"__name__": "__main__"})
except BaseException:
    leave(1)
leave(int(sys.argv[3]))
"""


def passes(program: str, seconds: int = 5, megabytes: int = 512) -> bool:
    """Whether a Python program runs to its end without an exception within ``seconds`` of elapsed and of CPU time."""
    with tempfile.TemporaryDirectory(prefix="quasar-sandbox-") as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _BOOT, str(seconds), str(megabytes), str(PASSED)],
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder, "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        try:
            process.communicate(program, timeout=seconds)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        return process.returncode == PASSED
