"""Compile every Triton kernel ahead of time for one compute capability and print what became of it as JSON; exit
code 77 where that is impossible. Run as ``python -m tests.triton_compile 90 [candidates]``."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from quasar_kernels.triton.activation import gated_mul_kernel
from quasar_kernels.triton.attention import MERGE_ELEMENTS, attention_launch, block_attention_kernel, merge_kernel
from quasar_kernels.triton.linear_bf16 import linear_bf16_kernel
from quasar_kernels.triton.linear_fp8 import linear_fp8_kernel
from quasar_kernels.triton.linear_w4 import linear_w4_kernel
from quasar_kernels.triton.linear_w8_groups import linear_w8_groups_kernel
from quasar_kernels.triton.linear_w8a8 import linear_w8a8_kernel
from quasar_kernels.triton.norm import add_scaled_kernel, rms_norm_kernel
from quasar_kernels.triton.quantize import quantize_tokens_fp8_kernel, quantize_tokens_kernel
from quasar_kernels.triton.rotary import rotary_quantize_kernel, rotary_write_kernel
from quasar_kernels.triton.slots import slot_constants
from quasar_kernels.triton.tuning import Shape, Tiling, candidates, default_tiling
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
PROCESSORS = 132  # of an H100
DOWN, GATE_UP = (4096, 12288), (24576, 4096)  # of Qwen3-8B
SMALL = (576, 1536)  # of SmolLM2-135M
FP8 = 89  # the first compute capability with it
GROUP_SIZE = 128
NOT_DIVISIBLE = (
    *("rows", "start", "block_mask", "counters", "width", "heads", "kv_heads", "splits", "stripes", "capacity"),
)
"""Arguments that need not be multiples of 16."""


@dataclass(frozen=True)
class Case:
    """A kernel with argument types, compile-time values and launch options. kind: the op and its dtype"""

    name: str
    kind: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]


def main() -> None:
    if not (TOOLS / "cuobjdump").exists():
        print("Triton came without NVIDIA's tools")
        sys.exit(77)
    architecture = int(sys.argv[1])
    facts: dict[str, Any] = {}
    tuned = architecture == 90 and "candidates" in sys.argv[2:]
    for case in [*products(architecture, tuned), *group_products(), *attentions(), *elementwise(architecture)]:
        assert case.name not in facts, case.name
        facts[case.name] = {"kind": case.kind, **examine(compile_kernel(case, architecture))}
    print(json.dumps(facts))


def products(architecture: int, tuned: bool) -> Iterator[Case]:
    """The default tilings of large and small shapes at every size of tile, and with ``tuned`` what tuning for 9.0 may
    choose."""
    kinds = ("w8a8", "w8a16", "w4a16 bf16", "w4a16 fp16", "w4a8", "bf16", *(("fp8",) if architecture >= FP8 else ()))
    for kind in kinds:
        op = f"linear_{kind.split()[0]}"
        cases = [(6, DOWN), (32, SMALL), (64, GATE_UP)]
        if architecture == 90:
            cases += [(6, GATE_UP), (6, SMALL), (32, GATE_UP)]
        for rows, (outputs, inputs) in cases:
            shape = _shape(op, rows, outputs, inputs)
            name = f"{kind} {rows} x {outputs} x {inputs}"
            yield product(name, kind, shape, default_tiling(shape, PROCESSORS))
        # Float16 has the same tilings as bfloat16.
        for rows, (outputs, inputs) in (
            ((6, DOWN), (32, GATE_UP)) if tuned and architecture == 90 and "fp16" not in kind else ()
        ):
            shape = _shape(op, rows, outputs, inputs)
            for tiling in candidates(shape, PROCESSORS)[1:]:
                name = f"{kind} {rows} x {outputs} x {inputs}, candidate {tiling}"
                yield product(name, kind, shape, tiling)
    for rows in (6, 32):
        shape = Shape("linear_w8a8", rows, *DOWN, group_size=64)
        tiling = default_tiling(shape, PROCESSORS)
        yield product(f"w8a8 in groups, {rows} rows", "w8a8", shape, tiling)
    for kind in ("w4a16 bf16", "w4a8"):
        shape = _shape(f"linear_{kind.split()[0]}", 6, *DOWN)
        tiling = default_tiling(shape, PROCESSORS)
        yield product(f"{kind}, asymmetric", kind, shape, tiling, {"HAS_ZEROS": True})


def group_products() -> Iterator[Case]:
    """int8 weights in groups: of Q8_0, and of Q6_K and Q5_K with numbers that groups share."""
    types = {"x": "*bf16", "values": "*i8", "scales": "*fp16", "scale_factors": "*i8", "minimums": "*fp16"}
    types |= {"minimum_factors": "*i8", "bias": "*bf16", "out": "*bf16", "counters": "*i32", "partials": "*fp32"}
    types |= {"rows": "i32", "outputs": "i32", "inputs": "i32"}
    for rows in (6, 32):
        for group_size, shared, minimums in ((32, 0, False), (16, 16, False), (32, 8, True)):
            tiling = default_tiling(Shape("linear_w8a16", rows, *DOWN, group_size), PROCESSORS)
            constants = {**tiling.sizes, **tiling.by_groups(group_size), "WIDE": False, "HAS_BIAS": True}
            constants |= {"SCALE_SHARED": shared, "MINIMUM_SHARED": shared, "HAS_MINIMUMS": minimums}
            name = f"w8a16 in groups of {group_size}, {rows} rows"
            name += ", minimums" if minimums else ""
            yield Case(name, "w8a16 in groups", linear_w8_groups_kernel, types, constants, tiling.options)


def product(name: str, kind: str, shape: Shape, tiling: Tiling, changes: dict[str, Any] | None = None) -> Case:
    common = {"bias": "*bf16", "out": "*bf16", "counters": "*i32", "partials": "*fp32"}
    common |= {"rows": "i32", "outputs": "i32", "inputs": "i32"}
    w4 = {"values": "*u8", "scales": "*fp16", "zeros": "*i8", "x_scales": "*fp32", "unit": "fp32"}
    w8 = {"tokens": "*i8", "token_scales": "*fp32", "values": "*i8", "scales": "*fp32"}
    sizes, options = tiling.sizes, tiling.options
    even = tiling.by_inputs(shape.inputs)
    if kind == "w8a8":
        constants = {**sizes, **even, "HAS_BIAS": True, "GROUP": shape.group_size}
        types = common | w8 | {"partials": "*fp32" if shape.group_size else "*i32"}
        return Case(name, kind, linear_w8a8_kernel, types, constants, options)
    if kind == "fp8":
        types = {**common, "tokens": "*fp8e4nv", "token_scales": "*fp32", "values": "*fp8e4nv", "scales": "*fp32"}
        return Case(name, kind, linear_fp8_kernel, types, {**sizes, **even, "HAS_BIAS": True, "WIDE": False}, options)
    if kind in ("bf16", "w8a16"):
        types = {**common, "x": "*bf16", "values": "*i8" if kind == "w8a16" else "*bf16", "scales": "*fp32"}
        constants = {**sizes, **even, "SCALED": kind == "w8a16", "HAS_BIAS": True, "WIDE": False}
        return Case(name, kind, linear_bf16_kernel, types, constants, options)
    dtype = {"w4a16 bf16": "*bf16", "w4a16 fp16": "*fp16", "w4a8": "*i8"}[kind]
    flags = {"INT8": kind == "w4a8", "HAS_ZEROS": False, "HAS_BIAS": True, "ASSEMBLY": True}
    constants = {**sizes, **tiling.by_groups(shape.group_size), **flags, **(changes or {})}
    types = {**common, **w4, "x": dtype, "out": "*fp16" if kind == "w4a16 fp16" else "*bf16"}
    return Case(name, kind, linear_w4_kernel, types, constants, options)


def attentions() -> Iterator[Case]:
    """Head dimensions and groups of SmolLM2, Qwen3-0.6B, Qwen3-8B and Gemma 2 and 3, at one to many rows."""
    types = {"start": "*i64", "capacity": "i32", "q": "*bf16"}
    types |= {"block_mask": "*i64", "partial": "*fp32", "statistics": "*fp32", "scale": "fp32", "softcap": "fp32"}
    types |= {"rows": "i32", "heads": "i32", "splits": "i32", "window": "i32"}
    for bits, group, head_dim in itertools.product((16, 8, 4), (2, 3, 4), (64, 128, 256)):
        if (group, head_dim) not in ((3, 64), (2, 128), (4, 128), (2, 256)):
            continue
        for rows in (1, 8):
            constants, options = attention_launch(rows, group, head_dim, bits)
            constants |= {"WIDE": False, "CAPPED": head_dim == 256, "WINDOWED": head_dim == 256}
            name = f"attention of {rows} rows, group {group}, head dimension {head_dim}, {bits}-bit cache"
            kind = "attention" if bits == 16 else "attention over codes"
            yield Case(name, kind, block_attention_kernel, types | slots_of(bits), constants, options)
    merge = {"partial": "*fp32", "statistics": "*fp32", "out": "*bf16", "stripes": "i32", "width": "i32"}
    for splits, head_dim in ((32, 64), (16, 128)):
        constants = {"SPLITS": splits, "PADDED": splits, "HEAD_DIM": head_dim, "BLOCK": MERGE_ELEMENTS}
        yield Case(f"merge of {splits} splits", "merge", merge_kernel, merge, constants, {"num_warps": 4})


def slots_of(bits: int) -> dict[str, str]:
    """Types of keys and values and of their scales; those of floats are stood in for by the floats."""
    codes, scales = {16: ("*bf16", "*bf16"), 8: ("*i8", "*fp32"), 4: ("*u8", "*fp16")}[bits]
    return {"keys": codes, "values": codes, "key_scales": scales, "value_scales": scales}


def elementwise(architecture: int) -> Iterator[Case]:
    rotary = {"keys": "*bf16", "values": "*bf16", "start": "*i64", "head_stride": "i32", "eps": "fp32"}
    rotary |= {"qkv": "*bf16", "cos": "*fp32", "sin": "*fp32", "queries": "*bf16", "heads": "i32", "kv_heads": "i32"}
    for norm, whole in ((True, False), (True, True), (False, False)):
        weight = "*bf16" if norm else "*fp32"  # the cosines stand in for a norm that is not there
        types = {**rotary, "q_norm": weight, "k_norm": weight}
        constants = {"HEAD_DIM": 128, "HALF": 64, "NORM": norm, "ONE_PLUS": False, "WHOLE": whole}
        yield Case(
            f"rotary, norm {norm}, whole {whole}", "rotary", rotary_write_kernel, types, constants, {"num_warps": 1}
        )
        for bits, head_dim in itertools.product((8, 4), (64, 96, 128)):
            own = types | slots_of(bits) | {"capacity": "i32"}
            constants = {"NORM": norm, "ONE_PLUS": False, "WHOLE": whole, **slot_constants(head_dim, bits)}
            name = f"rotary, norm {norm}, whole {whole}, head dimension {head_dim}, {bits}-bit cache"
            yield Case(name, "rotary", rotary_quantize_kernel, own, constants, {"num_warps": 1})
    for quantize in (True, False):
        out, scales = ("*i8", "*fp32") if quantize else ("*bf16", "*bf16")
        for add in (True, False):
            types = dict.fromkeys(("x", "residual", "total", "weight"), "*bf16")
            types |= {"out": out, "scales": scales, "eps": "fp32", "width": "i32"}
            for group in (4096, GROUP_SIZE) if quantize else (4096,):
                constants = {"ONE_PLUS": quantize, "ADD": add, "QUANTIZE": quantize, "BLOCK": 4096, "GROUP": group}
                name = f"norm, add {add}, quantize {quantize} by {group}"
                yield Case(name, "norm", rms_norm_kernel, types, constants, {"num_warps": 8})
        types = {"gate_up": "*bf16", "out": out, "scales": scales, "width": "i32"}
        block, warps = (16384, {"num_warps": 16}) if quantize else (1024, {"num_warps": 4})
        for group in (block, GROUP_SIZE) if quantize else (block,):
            for gelu in (False, True):
                constants = {"GELU": gelu, "QUANTIZE": quantize, "BLOCK": block, "GROUP": group}
                name = f"{'gelu' if gelu else 'silu'}, quantize {quantize} by {group}"
                yield Case(name, "gates", gated_mul_kernel, types, constants, warps)
    types = {"x": "*bf16", "update": "*bf16", "out": "*bf16", "factor": "fp32", "size": "i32"}
    yield Case("add scaled", "add", add_scaled_kernel, types, {"BLOCK": 1024}, {"num_warps": 4})
    types = {"x": "*bf16", "out": "*i8", "scales": "*fp32", "width": "i32"}
    for group in (16384, GROUP_SIZE):
        constants = {"BLOCK": 16384, "GROUP": group}
        yield Case(f"quantize by {group}", "quantize", quantize_tokens_kernel, types, constants, {"num_warps": 16})
    if architecture >= FP8:
        types = {"x": "*bf16", "out": "*fp8e4nv", "scales": "*fp32", "width": "i32"}
        yield Case(
            "quantize to FP8", "quantize", quantize_tokens_fp8_kernel, types, {"BLOCK": 16384}, {"num_warps": 16}
        )


def compile_kernel(case: Case, architecture: int) -> Any:
    kernel, types, constants = case.kernel, case.types, case.constants
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    divisible = [
        index
        for index, name in enumerate(kernel.arg_names)
        if name in types and types[name] != "fp32" and name not in NOT_DIVISIBLE
    ]
    attributes = {(index,): [["tt.divisibility", 16]] for index in divisible}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=case.options)


def examine(compiled: Any) -> dict[str, Any]:
    ptx = compiled.asm["ptx"]
    return {
        "stack_bytes": _stack_bytes(compiled.asm["cubin"]),
        "shared_bytes": compiled.metadata.shared,
        "tensor_core_instructions": sorted(set(re.findall(r"(?:wg)?mma\.\S*", ptx))),
        "wide_asynchronous_copies": len(re.findall(r"cp\.async\.cg\.shared\.global.*\b0x10\b", ptx)),
        "narrow_asynchronous_copies": len(re.findall(r"cp\.async\.ca\.shared\.global", ptx)),
        "shared_stores_in_loop": _shared_stores_in_loop(ptx),
    }


def _stack_bytes(cubin: bytes) -> int:
    """Bytes of local memory per thread, which hold spilled registers: the kernels use no other stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    match = re.search(r"STACK:(\d+)", usage)
    assert match is not None, usage
    return int(match[1])


def _shared_stores_in_loop(ptx: str) -> int:
    """Stores to shared memory between a loop's label and the branch back to it, around tensor-core instructions."""
    count = 0
    for label in re.findall(r"^(\$L__BB\d+_\d+):", ptx, re.MULTILINE):
        begin = ptx.index(f"{label}:")
        end = ptx.rfind(f"bra \t{label};")
        body = ptx[begin:end] if end > begin else ""
        if "mma." in body:
            count += len(re.findall(r"\bst\.shared", body))
    return count


def _shape(op: str, rows: int, outputs: int, inputs: int) -> Shape:
    group_size = GROUP_SIZE if inputs % GROUP_SIZE == 0 else GROUP_SIZE // 2
    return Shape(op, rows, outputs, inputs, group_size if "w4" in op else 0)


if __name__ == "__main__":
    main()
