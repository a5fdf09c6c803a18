"""The two processes of the sandbox: one executes an answer, the other one its test."""

from __future__ import annotations

import json
import os
import resource
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from quasar.evaluation.isolated import guards, kernel
from quasar.evaluation.isolated.wire import EndedError, Peer

PASSED, FAILED, NOT_STARTED = 57, 1, 3
READY = b"r"
TEMPORARY = "/tmp"  # nosec B108
"""A folder of the process's own namespace, which no other process sees."""
JOB = "job.json"


def main() -> None:
    """Isolate this process and do the job that the file job.json of its folder describes."""
    _, _, folder = sys.argv
    job = json.loads(Path(folder, JOB).read_text(encoding="utf-8"))
    del sys.path[0]  # the program's own packages are not for the answer
    reader, writer = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    status = os.dup(2)
    try:
        _isolate(folder, job["parts"], job["seconds"], job["megabytes"])
    except OSError as error:
        os.write(status, str(error).encode())
        os._exit(NOT_STARTED)
    if job["role"] == "probe":
        os._exit(FAILED if _escaped(job["forbidden"]) else PASSED)
    role = {"answer": _execute_answer, "test": _execute_test}[job["role"]]
    passed = False
    try:
        passed = role(job, reader, writer, status)
    except BaseException:
        # Every exception means the same, also SystemExit: the answer did not pass.
        passed = False
    os._exit(PASSED if passed else FAILED)


def _isolate(folder: str, parts: Sequence[str], seconds: int, megabytes: int) -> None:
    readable, writable = kernel.readable_paths(), []
    if "namespaces" in parts:
        kernel.enter_namespaces(folder, readable)
        writable = ["/work", TEMPORARY]
        os.environ["HOME"] = "/work"
        # Threads are counted per user, in a user namespace apart from those outside; seccomp refuses processes.
        resource.setrlimit(resource.RLIMIT_NPROC, (64, 64))
    if "landlock" in parts:
        kernel.restrict_files(readable, writable)
    kernel.hide_memory()
    for limit, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, megabytes << 20),
        (resource.RLIMIT_FSIZE, 1 << 20),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(nowhere, descriptor)
    os.close(nowhere)
    if "seccomp" in parts:
        kernel.refuse_calls()
    if parts:
        guards.raise_for_commands()
    else:
        guards.install(readable)


def _escaped(forbidden: dict[str, str]) -> bool:
    """Try what the isolation has to prevent. A kernel may accept all calls above and yet enforce nothing."""
    import socket

    def connect() -> None:
        socket.create_connection(("127.0.0.1", int(forbidden["port"])), timeout=5).close()

    attempts = [
        lambda: os.close(os.open(forbidden["file"], os.O_RDONLY)),
        lambda: os.close(os.open(forbidden["file"], os.O_WRONLY)),
        lambda: os.chmod(forbidden["file"], 0o600),
        lambda: os.truncate(forbidden["file"], 0),
        lambda: os.close(os.open(forbidden["environment"], os.O_RDONLY)),
        connect,
    ]
    for attempt in attempts:
        try:
            attempt()
        except OSError:
            continue
        return True
    return False


def _execute_answer(job: dict[str, Any], reader: BinaryIO, writer: BinaryIO, status: int) -> bool:
    """Execute the program, tell which names it defines, and answer requests until the test ends."""
    os.close(status)
    peer = Peer(reader, writer, serves=True, trusts=False)
    peer.send("ready")
    program = _module("program")
    _execute(job["program"], "program", program)
    names: dict[str, Any] = {}
    for name, value in list(vars(program).items()):
        if isinstance(value, types.ModuleType) or name.startswith("__"):
            continue
        if _is_error(value):
            names[name] = ["error", value.__name__, [base.__name__ for base in value.__mro__[1:-1]]]
        elif callable(value):
            peer.objects[name] = value
            names[name] = ["object"]
        else:
            names[name] = ["value", peer.encode(value)]
    peer.send(names)
    while True:
        peer.answer(peer.receive())


def _execute_test(job: dict[str, Any], reader: BinaryIO, writer: BinaryIO, status: int) -> bool:
    """Execute the test with the names of the answer in place, which are called in the answer's process."""
    peer = Peer(reader, writer, serves=False, trusts=job["trusts"])
    try:
        if peer.receive() != "ready":
            os._exit(NOT_STARTED)
    except EndedError:
        os._exit(NOT_STARTED)
    os.write(status, READY)
    names = peer.receive()
    module = _module("__main__")
    _execute(job["context"], "context", module)
    peer.errors |= {name: value for name, value in vars(module).items() if _is_error(value)}
    for name, (kind, *content) in names.items():
        # Classes are always those of the answer, which works with their objects.
        given = vars(module).get(name)
        if given is not None and name not in job["wanted"] and not (isinstance(given, type) and kind == "object"):
            continue
        if kind == "error":
            vars(module)[name] = peer.error_class(*content)
        else:
            vars(module)[name] = peer.remote(name) if kind == "object" else peer.decode(*content)
    _execute(job["test"], "test", module)
    return True


def _execute(source: str, name: str, module: types.ModuleType) -> None:
    """Execute code that nobody has read. It is what this process is isolated for."""
    code = compile(source, name, "exec")
    exec(code, module.__dict__)  # nosec B102


def _is_error(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, BaseException)


def _module(name: str) -> types.ModuleType:
    """An empty module that is found under its name, which dataclasses, for one, rely on."""
    sys.modules[name] = types.ModuleType(name)
    return sys.modules[name]
