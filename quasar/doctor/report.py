"""Carries out all checks and prints what they find."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from quasar.doctor import kernels, machine, services, storage
from quasar.doctor.finding import Finding
from quasar.errors import first_line
from quasar.results.console import Reporter

STYLES = {"works": "green", "falls back": "yellow", "fails": "bold red"}
CHECKS: tuple[Callable[[], Iterable[Finding]], ...] = (
    machine.python,
    machine.torch_and_gpu,
    kernels.cpu,
    kernels.compiler,
    kernels.ops,
    machine.memory,
    machine.load,
    storage.disks,
    storage.cache,
    services.hub,
    services.wandb,
    services.slurm,
)


def doctor(reporter: Reporter) -> bool:
    """Print a line for every finding, with the remedy if something is missing; return whether a run would work."""
    failures = 0
    for finding in findings():
        label = f"{finding.state:<12}{finding.subject:<14}"
        reporter.paragraph(finding.found, label, STYLES[finding.state])
        if finding.remedy:
            reporter.paragraph(finding.remedy, f"{'':<{len(label)}}-> ")
        failures += finding.state == "fails"
    reporter.line()
    reporter.line("a run works here" if not failures else f"a run does not work here: {failures} checks fail")
    return not failures


def findings() -> Iterator[Finding]:
    """Carry out the checks one after the other. A check that raises fails, and the others still run."""
    for check in CHECKS:
        try:
            yield from check()
        except Exception as error:  # a broken installation may raise anything
            name = check.__name__.replace("_", " ")
            yield Finding(name, "fails", f"{type(error).__name__}: {first_line(error)}", "install the package again")
