"""The command line: one file per verb.

Nothing heavy (torch, lightning, pydantic, numpy, rich) is imported before a verb runs, so that ``--help`` answers at
once. Whatever goes wrong through the user's doing ends as one line on stderr and exit code 2.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

from tissuehint.cli import bank, compare, data, demo, doctor, evaluate, methods, predict, report, run, segment, view
from tissuehint.failures import DEBUG_VARIABLE, FAILED, INTERRUPTED, describe

__all__ = ["app", "main"]

app = typer.Typer(
    name="tissuehint",
    help="Cheap pathology hints (image tags, a few points, tissue percentages) in, dense tissue maps out.",
    epilog="Start with: tissuehint demo",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from tissuehint import __version__

        typer.echo(f"tissuehint {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def tissuehint(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Cheap pathology hints (image tags, a few points, tissue percentages) in, dense tissue maps out."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.command("demo")(demo.demo)
app.command("run")(run.run)
app.command("compare", context_settings={"ignore_unknown_options": True})(compare.compare)
app.add_typer(data.app, name="data")
app.add_typer(bank.app, name="bank")
app.command("methods")(methods.methods)
app.command("predict")(predict.predict)
app.command("segment")(segment.segment)
app.command("evaluate")(evaluate.evaluate)
app.command("view")(view.view)
app.command("report")(report.report)
app.command("doctor")(doctor.doctor)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        arguments: words after ``tissuehint``; None takes those of the process.

    Returns:
        Exit code: 0 done; 2 the input was refused, or part of it; 130 interrupted; 1 a defect of tissuehint.
    """
    debug = bool(os.environ.get(DEBUG_VARIABLE))
    with warnings.catch_warnings():
        if not debug:
            # warnings of the libraries below are for developers; our own are for users
            warnings.simplefilter("ignore")
            warnings.filterwarnings("default", module="tissuehint")
            warnings.showwarning = _warned
        try:
            words = None if arguments is None else list(arguments)
            code = app(args=words, prog_name="tissuehint", standalone_mode=False)
            sys.stdout.flush()  # a full disk behind a redirected output is told here, not at exit
        except (Exception, KeyboardInterrupt, SystemExit) as error:
            return _failed(error, debug)
    if code == INTERRUPTED:
        return _said("interrupted; files that were written are whole, run the same command again", INTERRUPTED)
    return code if isinstance(code, int) else 0


def _failed(error: BaseException, debug: bool) -> int:
    _drop_output_that_cannot_be_written()
    failure = describe(error)
    if failure is None and isinstance(error, SystemExit):
        raise error  # a closed pipe, say: nobody is left to read a message
    if debug or failure is None:
        import traceback

        traceback.print_exception(error)
    if failure is None:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return _said(f"this is a defect of tissuehint, please report the lines above ({text[:200]})", FAILED)
    return _said(failure.line, failure.code)


def _drop_output_that_cannot_be_written() -> None:
    """Let Python's own flush at exit succeed, which would add lines of its own to ours."""
    try:
        sys.stdout.flush()
    except OSError:
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, sys.stdout.fileno())
        os.close(sink)


def _warned(message: Warning | str, *place: object, **others: object) -> None:
    """One line, without the place in the code."""
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


def _said(line: str, code: int) -> int:
    print(f"error: {line}", file=sys.stderr)
    return code
