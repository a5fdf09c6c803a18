"""The commands ``quasar models``: list and fetch models."""

from __future__ import annotations

from typing import Annotated

import typer
from hydra import compose, initialize_config_dir
from hydra.errors import MissingConfigException

from quasar.cli.errors import reported_errors
from quasar.config.rules import check_model
from quasar.config.schema import CONF, ModelSource, register
from quasar.errors import RequestError
from quasar.results.console import Reporter

commands = typer.Typer(no_args_is_help=True, help="The models in conf/model.")


@commands.command()
def fetch(
    name: Annotated[str, typer.Argument(help="a file in conf/model, without .yaml")],
    path: Annotated[str | None, typer.Option(help="a folder or GGUF file to use instead of the model's source")] = None,
) -> None:
    """Download and prepare a model before its first run."""
    reporter = Reporter()
    with reported_errors():
        source = model_source(name, path)
        from quasar.model.sources import locate

        with reporter.stages() as stage:
            checkpoint = locate(source, stage)
    reporter.line(f"{name}: {checkpoint.origin}")
    reporter.line(f"in {checkpoint.folder}")


@commands.command("list")
def list_models() -> None:
    """List every model in conf/model and its source."""
    reporter = Reporter()
    with reported_errors():
        for name in model_names():
            source = model_source(name)
            reporter.line(f"{name:<16} {source.repo or source.source}")


def model_names() -> list[str]:
    return sorted(file.stem for file in (CONF / "model").glob("*.yaml"))


def model_source(name: str, path: str | None = None) -> ModelSource:
    """Return the model node of the configuration. Raises RequestError for an unknown name."""
    register()
    overrides = [f"model={name}"] + ([f"model.path={path}"] if path else [])
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose("config", overrides=overrides)
    except MissingConfigException:
        raise RequestError(f"model {name!r} is not in conf/model; choose one of {', '.join(model_names())}") from None
    return check_model(config.model)
