"""The command line: each command calls one function of a layer below, and prints what it gives.

Nothing but typer is imported before a command runs, so that `--help` and what needs no torch stay quick.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import typer

from harness.cli import (
    alarms,
    listing,
    measuring,
    mutants,
    plan,
    planning,
    running,
    specs,
    survey,
    theory,
    tiny,
    validation,
)

DEBUG = "--debug"
USAGE, SOFTWARE, CONFIG, INTERRUPTED, PIPE = 4, 70, 78, 130, 141
"""Usage as in pytest; a bug of the harness; an unusable spec, baseline, run file, adapter or output; Ctrl-C;
a reader of the output that is gone, as the shell tells it: never 0, which could hide what a gate says."""

app = typer.Typer(
    add_completion=False,
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Conformance and benchmarks for mixture-of-experts language models. "
    f"Any command takes {DEBUG}: a traceback in the place of a sentence.",
)
for part in (
    theory,
    planning,
    specs,
    running,
    mutants,
    alarms,
    survey,
    listing,
    measuring,
    tiny,
    plan,
    validation,
):
    part.add_to(app)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit: every error that is the user's is one sentence, never a traceback."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = DEBUG in given
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this process
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115  # for good
    try:
        sys.exit(_run([word for word in given if word != DEBUG] or ["--help"]))
    except BrokenPipeError:  # the reader, for instance `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(PIPE)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(_say("interrupted", INTERRUPTED))
    except Exception as error:
        message = getattr(error, "format_message", None)  # of click, which typer brings with it
        if message is not None:
            sys.exit(_say(message(), USAGE))
        if debug:
            raise
        if isinstance(error, _users()):
            sys.exit(_say(str(error), CONFIG))
        if isinstance(error, OSError) and error.strerror:
            sys.exit(_say(f"{error.filename or 'the output'}: cannot be used: {error.strerror}", CONFIG))
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        sys.exit(_say(f"a bug of the harness, {what}; {DEBUG} shows the traceback", SOFTWARE))


def _run(arguments: list[str]) -> int:
    command = typer.main.get_command(app)
    try:
        # not command.main(): it would end a broken pipe in 1, which is to say that a property failed
        with command.make_context("moe-harness", arguments) as context:
            command.invoke(context)
        code = 0
    except typer.Exit as ending:
        code = ending.exit_code
    sys.stdout.flush()  # here, where an output that is full or gone can still be told
    return code


def _users() -> tuple[type[Exception], ...]:
    """What a layer raises when something that it was given cannot be used."""
    from harness.implementations.registry import AdapterError
    from harness.results.baseline import BaselineError
    from harness.results.runfile import RunFileError
    from harness.spec import SpecError

    return (SpecError, AdapterError, BaselineError, RunFileError, *_of_loaded())


def _of_loaded() -> Iterator[type[Exception]]:
    """The same of modules that import torch: nothing of theirs was raised unless they are loaded."""
    for module, name in (
        ("harness.implementations.protocols", "Unsupported"),
        ("harness.benchmark.workload", "WorkloadError"),
    ):
        if module in sys.modules:
            yield getattr(sys.modules[module], name)


def _say(sentence: str, code: int) -> int:
    sys.stdout.flush()
    print(f"moe-harness: {sentence}", file=sys.stderr)
    return code
