"""The `shardtool` command."""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from shardtool import __version__
from shardtool.cli import console, conversions, judging, translating
from shardtool.errors import BUG, Interrupted, ShardtoolError, UsageError, refused_by_the_system

INTERRUPTED = 130  # typer's exit code after a KeyboardInterrupt

COMMANDS = conversions.COMMANDS | translating.COMMANDS | judging.COMMANDS
PLANS = conversions.PLANS | translating.PLANS
PLAN = "plan"


def _version(value: bool) -> None:
    if value:
        sys.stdout.write(f"shardtool {__version__}\n")
        raise typer.Exit


def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="The version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Tracebacks on errors.")] = False,
) -> None:
    """Convert, reshard and verify checkpoints between Hugging Face and Megatron-core."""
    console.SETTINGS.debug = debug


def application(arguments: Sequence[str]) -> typer.Typer:
    """The application. typer makes all options of all commands before it looks at the arguments, which takes longer
    than some of them: where the arguments begin with a command's name, the application has that one only.
    """
    name, below = (*arguments[:2], "", "")[:2]
    app = typer.Typer(
        name="shardtool",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        help="Convert, reshard, translate and verify checkpoints between Hugging Face and Megatron-core.",
    )
    app.callback()(main)
    for command, function in {name: COMMANDS[name]}.items() if name in COMMANDS else COMMANDS.items():
        if name != PLAN:
            app.command(command)(function)
    if name not in COMMANDS:
        dry = typer.Typer(no_args_is_help=True, help="What a conversion would do: the same arguments, nothing written.")
        for command, function in {below: PLANS[below]}.items() if name == PLAN and below in PLANS else PLANS.items():
            dry.command(command)(function)
        app.add_typer(dry, name=PLAN)
    return app


def run(arguments: list[str] | None = None) -> None:
    """The entry point: exit 0 done or same, 1 the checkpoint is wrong or differs, 2 wrong usage or environment."""
    given = sys.argv[1:] if arguments is None else arguments
    console.SETTINGS.reset()
    console.SETTINGS.json = "--json" in given  # for an error before the options are read
    failed: ShardtoolError | None = None
    try:
        code = application(given)(given, standalone_mode=False, prog_name="shardtool")
    except ShardtoolError as error:
        if console.SETTINGS.debug:
            raise
        _report(error)
        failed, code = error, error.exit_code
    except OSError as error:
        if console.SETTINGS.debug:
            raise
        _report(refused_by_the_system(error))
        code = 2
    except Exception as error:
        if console.SETTINGS.debug:
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            sys.stderr.write(str(error) + "\n")
        else:
            _report(_usage(error))
        code = 2
    if code == INTERRUPTED and not isinstance(failed, Interrupted):
        sys.stderr.write("interrupted\n")
    raise SystemExit(code or 0)


def _usage(error: Exception) -> ShardtoolError:
    """An error of typer's (their classes are click's, or typer's own since it has a copy of click), or a bug here."""
    if not hasattr(error, "format_message"):
        return ShardtoolError(f"{type(error).__name__}: {error}", hint=BUG)
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "shardtool"
    what = error.format_message().rstrip(".")
    return UsageError(what[:1].lower() + what[1:], hint=f"{command} --help")


def _report(error: ShardtoolError) -> None:
    sys.stderr.write(f"{error}\n" if isinstance(error, Interrupted) else f"error: {error}\n")
    if console.SETTINGS.json and not console.SETTINGS.answered:  # a result says itself what is wrong
        sys.stdout.write(json_module.dumps(error.as_dict(), indent=2) + "\n")
