"""Guards inside the interpreter, for machines whose kernel isolates nothing. They do not stop code that knows them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

_ALLOWED_EVENTS = frozenset(
    {
        *("compile", "exec", "marshal.loads", "marshal.load", "code.__new__", "import", "open"),
        *("os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.putenv", "os.unsetenv", "glob.glob", "glob.glob/2"),
        *("builtins.id", "builtins.input", "builtins.input/result", "builtins.breakpoint", "object.__getattr__"),
        *("object.__setattr__", "object.__delattr__", "sys._getframe", "sys.excepthook", "sys.unraisablehook"),
        *("sys._current_frames", "sys.set_int_max_str_digits", "tempfile.mkstemp", "tempfile.mkdtemp", "time.sleep"),
        *("_thread.start_new_thread", "_thread.start_joinable_thread", "array.__new__", "pickle.find_class"),
        *("cpython.run_command", "sys.monitoring.register_callback", "re.compile", "function.__new__"),
    }
)
_REFUSED_MODULES = frozenset(
    {
        *("_posixsubprocess", "_socket", "_sqlite3", "_ctypes", "mmap", "fcntl", "_multiprocessing", "_curses"),
        *("_testcapi", "_testinternalcapi", "_xxsubinterpreters", "_interpreters", "resource", "gc", "syslog"),
    }
)
_WITHOUT_EVENT = ("mkfifo", "mknod", "memfd_create", "setuid", "setgid", "nice", "chroot", "abort", "pidfd_open")


def raise_for_commands() -> None:
    """Let ``os.system`` raise where no process can be started; it would only return a code that nobody looks at."""

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event == "os.system":
            raise PermissionError(event)

    sys.addaudithook(hook)


def install(readable: Sequence[str]) -> None:
    """End the process at the first forbidden event: any write, any read outside ``readable``, processes, network.

    The process ends instead of raising, because the traceback of an exception would hand over the hook's own frame.
    The hook uses nothing that the guarded code can replace: no attribute of a module and no name of ``builtins``.
    """
    prefixes, files = tuple(f"{path}/" for path in readable), frozenset(readable)
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    leave, kind, text, binary, number, empty = os._exit, type, str, bytes, int, None
    allowed, modules = _ALLOWED_EVENTS, _REFUSED_MODULES

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event not in allowed:
            leave(1)
        if event == "import" and (kind(arguments[0]) is not text or arguments[0] in modules):
            leave(1)
        if event == "open":
            path, mode, flags = arguments
            if kind(path) is number and mode is not empty:
                return
            if kind(path) is binary:
                path = binary.decode(path, "latin-1")  # type: ignore[arg-type]
            if kind(path) is not text or kind(flags) is not number or flags & writes:  # type: ignore[operator]
                leave(1)
            relative = not text.startswith(path, "/")  # type: ignore[arg-type]
            # os.open, which has no mode, may resolve a relative path in another folder.
            if ".." in path or (relative and mode is empty):  # type: ignore[operator]
                leave(1)
            if not relative and path not in files and not text.startswith(path, prefixes):  # type: ignore[arg-type]
                leave(1)

    # Modules that are loaded already cause no event when they are imported again.
    for name in [*_REFUSED_MODULES, "subprocess", "socket", "sqlite3", "ctypes", "gc"]:
        sys.modules.pop(name, None)
    for module in (os, sys.modules["posix"]):
        for name in _WITHOUT_EVENT:
            if hasattr(module, name):
                delattr(module, name)
    sys.addaudithook(hook)
