"""Divides a matmul into programs: by a fixed default per class of shapes, or by the fastest tiling that was tried.

Choices found by `tune` are kept in ``triton/<GPU>.json`` of the cache folder, one per op,
N, K, group size and number of rows in steps of a tile.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from quasar_kernels.folder import cache_folder
from quasar_kernels.triton.device import multiprocessors

MAX_ROWS = 64
"""Largest number of rows for these kernels. Larger blocks are compute-bound, and cuBLAS computes them."""
INPUTS_MULTIPLE = 16
"""K must be a multiple of it, because reads of 16 bytes must not cross the end of a row."""
ACTIVATION_DTYPES = (torch.bfloat16, torch.float16, torch.int8)
"""Dtypes of the rows that the matmuls take; int8 is for quantized rows."""
FEWEST_ITERATIONS = 4
"""Smallest number of iterations of a split of K. With fewer, most of the time is spent filling the pipeline."""


@dataclass(frozen=True)
class Tiling:
    """block_k counts elements of K per iteration; split_k programs share the K of a tile."""

    block_m: int
    block_n: int
    block_k: int
    split_k: int = 1
    warps: int = 4
    stages: int = 4

    def grid(self, rows: int, outputs: int) -> tuple[int, int, int]:
        """Return the numbers of blocks of N, splits of K, and blocks of M."""
        return _blocks(outputs, self.block_n), self.split_k, _blocks(rows, self.block_m)

    @property
    def sizes(self) -> dict[str, int]:
        """The compile-time sizes by their names in the kernels, without those along K."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "SPLIT_K": self.split_k}

    def by_inputs(self, inputs: int) -> dict[str, int]:
        """Return the compile-time sizes along K of the kernels that count inputs."""
        return {"BLOCK_K": self.block_k, "EVEN_K": inputs % self.block_k == 0}

    def by_groups(self, group_size: int) -> dict[str, int]:
        """Return the compile-time sizes along K of the kernels that count groups of inputs."""
        return {"GROUP": group_size, "GROUPS": self.block_k // group_size}

    @property
    def options(self) -> dict[str, int]:
        """The launch options by their names in Triton."""
        return {"num_warps": self.warps, "num_stages": self.stages}

    def workspace(self, rows: int, outputs: int) -> tuple[int, int]:
        """Return the numbers of tiles and of partial sums that split-K needs memory for; 0 without split-K."""
        if self.split_k == 1:
            return 0, 0
        columns, _, row_blocks = self.grid(rows, outputs)
        tiles = columns * row_blocks
        return tiles, tiles * self.split_k * self.block_m * self.block_n


@dataclass(frozen=True)
class Shape:
    """A matmul to tune. op: its name in `quasar_kernels.ops`; group_size: that of the weight, 0 without groups."""

    op: str
    rows: int
    outputs: int
    inputs: int
    group_size: int = 0

    @property
    def block_m(self) -> int:
        return 16 if self.rows <= 16 else 32 if self.rows <= 32 else 64

    @property
    def key(self) -> str:
        group = f" g{self.group_size}" if self.group_size else ""
        return f"{self.op} n{self.outputs} k{self.inputs}{group} m{self.block_m}"


@functools.lru_cache(maxsize=4096)
def tiling_for(shape: Shape, device: torch.device) -> Tiling:
    """Return the tuned tiling if there is one, otherwise the default."""
    return _table(cache_file(device)).get(shape.key) or default_tiling(shape, multiprocessors(device))


def default_tiling(shape: Shape, processors: int) -> Tiling:
    """Return a tiling with enough programs for every multiprocessor and with reads of at least 64 bytes per row."""
    if shape.group_size:
        # Nearly two programs per multiprocessor hide the instructions for unpacking better than one.
        # In wider blocks the scales move between threads through shared memory in every iteration.
        programs, block_n = 7 * processors // 4, 64
        block_k = _groups_per_iteration(shape) * shape.group_size
    else:
        programs, block_n = 3 * processors // 4, 64 if shape.outputs >= 64 * processors else 32
        longest = 256 if shape.op in ("linear_w8a8", "linear_fp8") else 128
        block_k = next((size for size in (256, 128, 64) if size <= longest and shape.inputs % size == 0), 128)
    tiles = _blocks(shape.outputs, block_n) * _blocks(shape.rows, shape.block_m)
    iterations = _blocks(shape.inputs, block_k)
    split_k = 1
    while tiles * split_k < programs and iterations // (2 * split_k) >= FEWEST_ITERATIONS:
        split_k *= 2
    # Four warps would spill registers there.
    warps = 8 if shape.op in ("linear_w4a8", "linear_w8a16") and shape.block_m == 32 else 4
    return Tiling(shape.block_m, block_n, block_k, split_k, warps)


def candidates(shape: Shape, processors: int) -> list[Tiling]:
    """Return the default and its neighbours, the default first."""
    base = default_tiling(shape, processors)
    changes = [
        {"split_k": max(1, base.split_k // 2)},
        {"split_k": base.split_k * 2},
        {"block_n": base.block_n // 2, "warps": 4},  # with more warps, a thread would load less than 16 bytes
        {"stages": base.stages + 1},
    ]
    if shape.group_size:
        changes.append({"warps": 8})
        if shape.block_m == 16:  # more rows would spill registers
            changes.append({"block_n": base.block_n * 2})
    else:
        changes += [{"block_n": base.block_n * 2}, {"block_n": base.block_n * 2, "warps": 8}]
        if shape.inputs % (2 * base.block_k) == 0:
            changes.append({"block_k": 2 * base.block_k, "stages": 3})
    unique = dict.fromkeys([base, *(dataclasses.replace(base, **change) for change in changes)])
    return [tiling for tiling in unique if tiling.block_n >= 16 and 2 * tiling.block_n * tiling.block_m <= 32768]


def tune(shape: Shape, device: torch.device, milliseconds: Callable[[Tiling], float]) -> Tiling:
    """Time every candidate and store the fastest.

    milliseconds: runs a tiling and returns its time; it may raise if the tiling does not fit the device
    """
    timed: list[tuple[float, Tiling]] = []
    for tiling in candidates(shape, multiprocessors(device)):
        try:
            timed.append((milliseconds(tiling), tiling))
        except Exception as error:  # Triton's errors for a tiling that does not fit have no common type
            if "out of resource" not in str(error).lower():
                raise
    best = min(timed, key=lambda pair: pair[0])[1]
    file = cache_file(device)
    _table(file)[shape.key] = best
    _write(file)
    tiling_for.cache_clear()
    return best


def cache_file(device: torch.device) -> Path:
    """Return the file with the choices for a GPU model."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    return cache_folder() / "triton" / f"{re.sub(r'[^A-Za-z0-9]+', '-', name).lower()}.json"


@functools.cache
def _table(file: Path) -> dict[str, Tiling]:
    """Read the tilings of a file. The file is the key, because ``cuda`` and ``cuda:0`` are different devices."""
    return _read(file)


def _read(file: Path) -> dict[str, Tiling]:
    """The choices in a file. A damaged file is ignored with a warning, and replaced by the next `tune`."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        if raw["checksum"] != _checksum(raw["tilings"]):
            raise ValueError("its checksum does not fit")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"cache: {file} is damaged ({error}); default tilings are used until it is tuned again"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return {}
    return dict(_entries(raw["tilings"]))


def _checksum(tilings: dict[str, dict[str, int]]) -> str:
    return hashlib.sha256(json.dumps(tilings, sort_keys=True).encode()).hexdigest()


def _entries(raw: dict[str, dict[str, int]]) -> Iterator[tuple[str, Tiling]]:
    for key, fields in raw.items():
        try:
            yield key, Tiling(**fields)
        except TypeError:  # written by another version
            continue


def _write(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}")
    # Another process may have tuned other shapes in the meantime.
    table = _read(file) | _table(file)
    tilings = {key: dataclasses.asdict(tiling) for key, tiling in sorted(table.items())}
    content = {"checksum": _checksum(tilings), "tilings": tilings}
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(file)


def _groups_per_iteration(shape: Shape) -> int:
    """Return the number of groups that make 64 bytes of a row, out of the numbers that divide the groups of a row."""
    inputs = 64 if shape.op == "linear_w8a16" else 128
    wanted = max(1, inputs // shape.group_size)
    groups = shape.inputs // shape.group_size
    return next(count for count in (4, 2, 1) if count <= wanted and groups % count == 0)


def _blocks(size: int, block: int) -> int:
    return -(-size // block)
