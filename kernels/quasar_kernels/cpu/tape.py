"""Records calls of the library once, and replays all of them in one call.

A kernel takes a few microseconds, and running the interpreter between two kernels would take longer. Recording runs
Python code in which every operation is a call of the library, but does not execute the calls. A replay executes them on
the current content of the same memory. A tape is to a CPU what a CUDA graph is to a GPU.
"""

from __future__ import annotations

import ctypes
import struct
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from quasar_kernels.cpu.functions import FUNCTIONS, Signature
from quasar_kernels.cpu.library import Library


class NotRecordableError(Exception):
    """Raised if the code calls an operation that is not in the library. The message names the operation."""


class Tape:
    """The calls that ``run`` makes, for up to ``max_rows`` rows.

    run: works on tensors of ``max_rows`` rows that stay in place, and returns new tensors, `results`. Only the number
        of rows may vary from replay to replay
    memory: the memory of the results and of all intermediate tensors

    Raises NotRecordableError if ``run`` does anything other than calling the library.
    """

    def __init__(self, library: Library, max_rows: int, run: Callable[[], tuple[Tensor, ...]]) -> None:
        self._library, self._max_rows = library, max_rows
        recorder = _Recorder(library, max_rows)
        with recorder.intercepting():
            self.results = run()
        self.memory = tuple(recorder.blocks)
        self._slots = [slots for slots, _, _ in recorder.calls]
        self._calls = (_Call * len(recorder.calls))(
            *[_Call(function, ctypes.addressof(slots), rows) for slots, function, rows in recorder.calls]
        )

    def replay(self, rows: int) -> None:
        """Execute the calls for the first ``rows`` rows. Raises ValueError if this is more than was recorded."""
        if not 0 < rows <= self._max_rows:
            raise ValueError(f"{rows} rows: recorded for 1 to {self._max_rows}")
        self._library.replay(ctypes.addressof(self._calls), len(self._calls), rows)


class _Call(ctypes.Structure):
    """The structure `Call` of replay.cpp."""

    _fields_ = (("invoke", ctypes.c_void_p), ("slots", ctypes.c_void_p), ("rows_slot", ctypes.c_int64))


class _Recorder(TorchDispatchMode):
    """Records calls of the library, serves `torch.empty` from its own memory, and refuses every other operation.

    Memory is used again once the tensor in it has been deleted. The order of calls is the same in every replay, so this
    is as safe as in the recorded run. A view of such a tensor cannot outlive it, because making a view is an operation.
    """

    def __init__(self, library: Library, max_rows: int) -> None:
        super().__init__()
        self._library, self._max_rows = library, max_rows
        self.calls: list[tuple[ctypes.Array[ctypes.c_uint64], int, int]] = []
        self.blocks: list[Tensor] = []
        self._free: list[Tensor] = []

    @contextmanager
    def intercepting(self) -> Iterator[None]:
        """Record calls of the library instead of executing them."""
        functions = {name: getattr(self._library, name) for name in FUNCTIONS}
        try:
            for name, signature in FUNCTIONS.items():
                setattr(self._library, name, self._noting(name, signature))
            with self:
                yield
        finally:
            for name, function in functions.items():
                setattr(self._library, name, function)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Tensor:
        if func is not torch.ops.aten.empty.memory_format:
            raise NotRecordableError(str(func))
        return self._empty(args[0], (kwargs or {}).get("dtype") or torch.get_default_dtype())

    def _noting(self, name: str, signature: Signature) -> Callable[..., None]:
        function, place = self._library.replayed(name), signature.rows

        def note(*arguments: int | float | None) -> None:
            if place is None:
                raise NotRecordableError(f"{name}, which does not work on rows")
            if arguments[place] != self._max_rows:
                raise NotRecordableError(f"{name} of {arguments[place]} rows instead of {self._max_rows}")
            words = [_word(value, kind) for value, kind in zip(arguments, signature.arguments, strict=True)]
            self.calls.append(((ctypes.c_uint64 * len(words))(*words), function, place))

        return note

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        fitting = [index for index, block in enumerate(self._free) if block.nbytes >= size]
        if fitting:
            block = self._free.pop(min(fitting, key=lambda index: self._free[index].nbytes))
        else:
            block = torch.empty(size, dtype=torch.uint8)
            self.blocks.append(block)
        tensor = block[:size].view(dtype).view(shape)
        weakref.finalize(tensor, self._free.append, block)
        return tensor


def _word(value: int | float | None, kind: type) -> int:
    """Return an argument as the 64 bits that replay.cpp reads."""
    if kind is ctypes.c_float:
        assert value is not None
        return int(struct.unpack("<I", struct.pack("<f", value))[0])
    return int(value or 0) & 0xFFFF_FFFF_FFFF_FFFF
