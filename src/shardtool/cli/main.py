"""The `shardtool` command."""

from __future__ import annotations

import json as json_module
import sys
from typing import Annotated

import typer

from shardtool import __version__
from shardtool.cli import console, conversions, judging
from shardtool.errors import ShardtoolError

app = typer.Typer(
    name="shardtool",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Convert, reshard and verify checkpoints between Hugging Face and Megatron-core.",
)


def _version(value: bool) -> None:
    if value:
        sys.stdout.write(f"shardtool {__version__}\n")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="The version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Tracebacks on errors.")] = False,
) -> None:
    """Convert, reshard and verify checkpoints between Hugging Face and Megatron-core."""
    console.SETTINGS.debug = debug


conversions.register(app)
judging.register(app)


def run(arguments: list[str] | None = None) -> None:
    """The entry point: exit 0 done or same, 1 the checkpoint is wrong or differs, 2 wrong usage or environment."""
    console.SETTINGS.json = console.SETTINGS.quiet = console.SETTINGS.verbose = console.SETTINGS.debug = False
    try:
        app(arguments, standalone_mode=True)
    except ShardtoolError as error:
        if console.SETTINGS.debug:
            raise
        _report(error)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; nothing was left behind\n")
        raise SystemExit(130) from None
    except OSError as error:
        if console.SETTINGS.debug:
            raise
        _report(
            ShardtoolError(f"the system refused: {error.strerror or error}", where=str(error.filename or "") or None)
        )
        raise SystemExit(2) from None


def _report(error: ShardtoolError) -> None:
    sys.stderr.write(f"error: {error}\n")
    if console.SETTINGS.json:
        sys.stdout.write(json_module.dumps(error.as_dict(), indent=2) + "\n")
