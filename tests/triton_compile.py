"""Compile the Triton kernels ahead of time and print what became of them as JSON; exit code 77 where that is
impossible. Run as ``python -m tests.triton_compile``."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.triton.activation import silu_mul_kernel
from kernels.triton.attention import block_attention_kernel, merge_kernel
from kernels.triton.linear_bf16 import linear_bf16_kernel
from kernels.triton.linear_w4 import linear_w4_kernel
from kernels.triton.linear_w8a8 import linear_w8a8_kernel
from kernels.triton.norm import rms_norm_kernel
from kernels.triton.rotary import rotary_write_kernel
from kernels.triton.tuning import Shape, default_tiling

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ROWS, OUTPUTS, INPUTS, GROUP_SIZE = 6, 4096, 12288, 128  # the down projection of Qwen3-8B
NOT_DIVISIBLE = ("rows", "start", "block_mask", "counters", "width", "heads", "kv_heads", "splits")
"""Arguments that need not be multiples of 16, as the launcher would find them."""


def main() -> None:
    if not (TOOLS / "cuobjdump").exists():
        print("Triton came without NVIDIA's tools")
        sys.exit(77)
    facts = {}
    for architecture in (80, 89, 90):
        for name, (kernel, types, constants, options) in kernels().items():
            if architecture == 90 or constants.keys() & {"BLOCK_M", "BLOCK_SLOTS"}:
                constants["DEPENDENT"] = architecture == 90
                compiled = compile_kernel(kernel, types, constants, architecture, options)
                facts[f"{name} sm_{architecture}"] = {"architecture": architecture, **examine(compiled)}
    print(json.dumps(facts))


def kernels() -> dict[str, tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """Kernel, argument types, compile-time values and launch options by name."""
    product = {"bias": "*bf16", "out": "*bf16", "counters": "*i32"}
    sizes = {"rows": "i32", "outputs": "i32", "inputs": "i32"}
    w4 = {"values": "*u8", "scales": "*fp16", "zeros": "*i8", "x_scales": "*fp32", "partials": "*fp32", "unit": "fp32"}
    w8 = {"tokens": "*i8", "token_scales": "*fp32", "values": "*i8", "scales": "*fp32", "partials": "*i32"}
    group = {"GROUP": GROUP_SIZE, "HAS_ZEROS": False, "HAS_BIAS": True, "ASSEMBLY": True}
    cache = {"keys": "*bf16", "values": "*bf16", "start": "*i64", "head_stride": "i32"}
    attention = {"q": "*bf16", "block_mask": "*i1", "partial": "*fp32", "statistics": "*fp32", "scale": "fp32"}
    counts = {"rows": "i32", "heads": "i32", "splits": "i32"}
    rotary = {"qkv": "*bf16", "cos": "*fp32", "sin": "*fp32", "q_norm": "*bf16", "k_norm": "*bf16", "queries": "*bf16"}
    norm = {"x": "*bf16", "residual": "*bf16", "total": "*bf16", "weight": "*bf16", "out": "*i8", "scales": "*fp32"}
    heads = {"eps": "fp32", "heads": "i32", "kv_heads": "i32"}
    return {
        "w8a8": (
            linear_w8a8_kernel,
            {**product, **sizes, **w8},
            {"HAS_BIAS": True, "EVEN_K": True, **blocks("linear_w8a8")},
            launch("linear_w8a8"),
        ),
        "w4a16": (
            linear_w4_kernel,
            {**product, **sizes, **w4, "x": "*bf16"},
            {**group, "INT8": False, **blocks("linear_w4a16")},
            launch("linear_w4a16"),
        ),
        "w4a16 float16": (
            linear_w4_kernel,
            {**product, **sizes, **w4, "x": "*fp16", "out": "*fp16"},
            {**group, "INT8": False, **blocks("linear_w4a16")},
            launch("linear_w4a16"),
        ),
        "w4a8": (
            linear_w4_kernel,
            {**product, **sizes, **w4, "x": "*i8"},
            {**group, "INT8": True, "HAS_ZEROS": True, **blocks("linear_w4a8")},
            launch("linear_w4a8"),
        ),
        "bf16": (
            linear_bf16_kernel,
            {**product, **sizes, "x": "*bf16", "values": "*bf16", "scales": "*fp32", "partials": "*fp32"},
            {"SCALED": False, "HAS_BIAS": True, "EVEN_K": True, "WIDE": False, **blocks("linear_bf16")},
            launch("linear_bf16"),
        ),
        "w8a16": (
            linear_bf16_kernel,
            {**product, **sizes, "x": "*bf16", "values": "*i8", "scales": "*fp32", "partials": "*fp32"},
            {"SCALED": True, "HAS_BIAS": True, "EVEN_K": True, "WIDE": False, **blocks("linear_w8a16")},
            launch("linear_w8a16"),
        ),
        "attention": (
            block_attention_kernel,
            {**cache, **attention, **counts},
            {"GROUP": 4, "HEAD_DIM": 128, "WIDE": False, "BLOCK_ROWS": 32, "BLOCK_SLOTS": 64, "BLOCK_DIM": 128},
            {"num_warps": 4, "num_stages": 2},
        ),
        "merge": (
            merge_kernel,
            {"partial": "*fp32", "statistics": "*fp32", "out": "*bf16", "stripes": "i32", "width": "i32"},
            {"SPLITS": 16, "HEAD_DIM": 128, "BLOCK": 512},
            {"num_warps": 4},
        ),
        "rotary": (
            rotary_write_kernel,
            {**cache, **rotary, **heads},
            {"HEAD_DIM": 128, "HALF": 64, "NORM": True},
            {"num_warps": 1},
        ),
        "norm": (
            rms_norm_kernel,
            {**norm, "eps": "fp32", "width": "i32"},
            {"ADD": True, "QUANTIZE": True, "BLOCK": 4096, "GROUP": 4096},
            {"num_warps": 8},
        ),
        "norm by group": (
            rms_norm_kernel,
            {**norm, "eps": "fp32", "width": "i32"},
            {"ADD": True, "QUANTIZE": True, "BLOCK": 4096, "GROUP": GROUP_SIZE},
            {"num_warps": 8},
        ),
        "silu": (
            silu_mul_kernel,
            {"gate_up": "*bf16", "out": "*i8", "scales": "*fp32", "width": "i32"},
            {"QUANTIZE": True, "BLOCK": 16384, "GROUP": 16384},
            {"num_warps": 16},
        ),
        "silu by group": (
            silu_mul_kernel,
            {"gate_up": "*bf16", "out": "*i8", "scales": "*fp32", "width": "i32"},
            {"QUANTIZE": True, "BLOCK": 16384, "GROUP": GROUP_SIZE},
            {"num_warps": 16},
        ),
    }


def blocks(op: str) -> dict[str, int]:
    """Compile-time sizes of a product's default tiling on an H100."""
    tiling = default_tiling(_shape(op), processors=132)
    sizes = {"BLOCK_M": tiling.block_m, "BLOCK_N": tiling.block_n, "SPLIT_K": tiling.split_k, "PREFETCH": tiling.stages}
    return sizes | ({"GROUPS": tiling.block_k // GROUP_SIZE} if "w4" in op else {"BLOCK_K": tiling.block_k})


def launch(op: str) -> dict[str, int]:
    tiling = default_tiling(_shape(op), processors=132)
    return {"num_warps": tiling.warps, "num_stages": tiling.stages}


def compile_kernel(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], architecture: int, options: dict[str, int]
) -> Any:
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    divisible = [
        index
        for index, name in enumerate(kernel.arg_names)
        if name in types and types[name] != "fp32" and name not in NOT_DIVISIBLE
    ]
    attributes = {(index,): [["tt.divisibility", 16]] for index in divisible}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def examine(compiled: Any) -> dict[str, Any]:
    ptx = compiled.asm["ptx"]
    return {
        "stack_bytes": _stack_bytes(compiled.asm["cubin"]),
        "shared_bytes": compiled.metadata.shared,
        "tensor_core_instructions": sorted(set(re.findall(r"(?:wg)?mma\.\S*", ptx))),
        "wide_asynchronous_copies": len(re.findall(r"cp\.async\.cg\.shared\.global.*\b0x10\b", ptx)),
        "waits_for_the_kernel_before": "griddepcontrol.wait" in ptx,
        "accesses_before_waiting": bool(re.search(r"\b(ld|st|atom)\.global|cp\.async", _before_wait(ptx))),
        "prefetches_before_waiting": "prefetch.global.L2" in _before_wait(ptx),
        "shared_stores_in_loop": _shared_stores_in_loop(ptx),
    }


def _before_wait(ptx: str) -> str:
    return ptx.split("griddepcontrol.wait")[0] if "griddepcontrol.wait" in ptx else ""


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


def _shape(op: str) -> Shape:
    return Shape(op, ROWS, OUTPUTS, INPUTS, GROUP_SIZE if "w4" in op else 0)


if __name__ == "__main__":
    main()
