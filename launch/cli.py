"""The `atoll` command.

Only what every command needs is imported at the top: help and schema answer without loading torch.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from launch.data_command import app as data_app
from launch.schedule_command import app as schedule_app
from trainer.config.overrides import split_arguments
from trainer.config.problems import ConfigError

app = typer.Typer(
    name="atoll",
    help="Train large models across islands of accelerators.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data")
app.add_typer(schedule_app)

Arguments = Annotated[
    list[str],
    typer.Argument(
        metavar="FILE|KEY=VALUE",
        help="YAML files, merged left to right, and settings laid over them, such as train.steps=50.",
    ),
]
Ranks = Annotated[
    int | None,
    typer.Option(
        min=1, help="How many processes; by default what the configuration or the machine says.", metavar="N"
    ),
]


@app.command()
def train(
    arguments: Arguments,
    ranks: Ranks = None,
    log_ranks: Annotated[
        str,
        typer.Option(help="Ranks shown on the console, such as 0,3 or all; each rank has a log file anyway."),
    ] = "0",
    max_restarts: Annotated[
        int, typer.Option(min=0, help="How often to start all ranks again after a failure.")
    ] = 0,
) -> None:
    """Train on this machine: start the ranks, follow them, end with their exit code."""
    files, overrides = _files_and_overrides(arguments)
    from trainer.config.rules import resolve
    from trainer.config.run import load_config, local_ranks

    config = load_config(files, overrides)
    count = local_ranks(config, ranks, 0 if config.run.device == "cpu" else _gpus())
    resolve(config, count)  # every rule is checked here, before there are processes to be stopped again

    from launch.local import run_local
    from launch.logs import parse_ranks

    try:
        shown = parse_ranks(log_ranks, count)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--log-ranks") from None
    logs = Path(config.run.directory) / "logs"
    raise typer.Exit(run_local(arguments, count, logs, shown, max_restarts=max_restarts))


@app.command()
def check(
    arguments: Arguments,
    ranks: Ranks = None,
    rank: Annotated[
        int | None, typer.Option(min=0, help="Also build this rank, on a back end that only pretends.", metavar="R")
    ] = None,
) -> None:
    """Show what a configuration comes to: resolved values, mesh, parameters and memory per rank."""
    _files_and_overrides(arguments)
    from trainer.check import report

    print(report(arguments, ranks, rank))


@app.command()
def schema() -> None:
    """Print the JSON schema of the configuration, from which editors complete and check keys."""
    from trainer.config.run import RunConfig
    from trainer.config.schema import editor_schema

    print(editor_schema(RunConfig), end="")


@app.command()
def version() -> None:
    """Print the version of atoll, Python and torch."""
    import importlib.metadata
    import platform

    versions = {name: importlib.metadata.version(name) for name in ("atoll", "torch")}
    print(f"atoll {versions['atoll']} (Python {platform.python_version()}, torch {versions['torch']})")


def main() -> None:
    """Console entry point: a refused configuration is printed plainly and ends with code 2."""
    try:
        app(prog_name="atoll")
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def _files_and_overrides(arguments: list[str]) -> tuple[list[Path], list[str]]:
    files, overrides = split_arguments(arguments)
    if not files:
        raise typer.BadParameter("name at least one YAML file, such as examples/quickstart.yaml")
    return files, overrides


def _gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
