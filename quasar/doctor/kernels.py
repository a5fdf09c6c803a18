"""Checks of the compiled kernels: the processor's level, the compiler, and every op against PyTorch's operations."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from quasar.doctor.finding import Finding

_SLOW = "a run uses PyTorch's operations, which are several times slower"


def cpu() -> Iterator[Finding]:
    from quasar_kernels.cpu import kernel_level
    from quasar_kernels.cpu.levels import LEVEL_VARIABLE, NO_KERNELS, available_levels

    usable = ", ".join(level.name for level in available_levels()) or "none"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            level, reason = kernel_level()
    except ValueError as error:
        yield Finding("CPU kernels", "fails", str(error), f"unset {LEVEL_VARIABLE}")
        return
    found = f"{reason}; this processor has the levels {usable}"
    if level == NO_KERNELS:
        remedy = "install g++ or clang++" if usable != "none" else "use an x86 processor with AVX2, or a GPU"
        yield Finding("CPU kernels", "falls back", f"off, {_SLOW} ({found})", remedy)
    elif " is off: " in reason:
        yield Finding("CPU kernels", "falls back", f"{level} ({found})", "install a newer g++ or clang++")
    else:
        yield Finding("CPU kernels", "works", f"{level} ({found})")


def compiler() -> Iterator[Finding]:
    from quasar_kernels.cpu.build import BuildError
    from quasar_kernels.cpu.build import compiler as find

    try:
        command, version = find()
    except BuildError as error:
        yield Finding("compiler", "falls back", f"{error}; kernels that are already compiled are used", "")
        return
    yield Finding("compiler", "works", f"{' '.join(command)}: {version.decode(errors='replace').splitlines()[0]}")


def ops() -> Iterator[Finding]:
    import torch
    from quasar_kernels.selfcheck import compare_kernels

    for name in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        compared = list(compare_kernels(torch.device(name)))
        subject = f"{name.upper()} ops"
        wrong = [found for found in compared if not found.correct]
        without = [found.op for found in compared if found.correct and found.error is None]
        for found in wrong:
            problem = found.failure or f"differs from PyTorch's result by {found.error:.2g} of a row's largest value"
            remedy = "QUASAR_CPU_LEVEL=torch computes without kernels" if name == "cpu" else "device=cpu avoids it"
            yield Finding(subject, "fails", f"{found.op}: {problem}", f"{remedy}; please report it")
        right = len(compared) - len(wrong) - len(without)
        if right:
            yield Finding(subject, "works", f"{right} of {len(compared)} kernels agree with PyTorch's operations")
        if without:
            yield Finding(subject, "falls back", f"PyTorch's operations compute {', '.join(without)}")
