"""C++ kernels for x86 processors, compiled on first use.

`backend` returns the compiled library, or None if the machine has no compiler or no AVX2. Its matmuls take the packed
weights of `quasar_kernels.cpu.packing`.
"""

from quasar_kernels.cpu.library import Library, backend, kernel_level, use_level
from quasar_kernels.cpu.packing import PackedWeight, pack_dense, pack_group_int8, pack_int4, pack_int8
from quasar_kernels.cpu.tape import NotRecordableError, Tape

__all__ = [
    "Library",
    "NotRecordableError",
    "PackedWeight",
    "Tape",
    "backend",
    "kernel_level",
    "pack_dense",
    "pack_group_int8",
    "pack_int4",
    "pack_int8",
    "use_level",
]
