"""What all commands of `onboard` share: the app, how errors end, options, tables.

Prefect takes two seconds to import, so each command imports what it needs when it runs.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from pathlib import Path
from typing import Annotated, ParamSpec

import typer

from tasks.errors import InputError, OnboardError

P = ParamSpec("P")
_TABLE_WIDTH = 150

app = typer.Typer(
    help="From a released LLM to its GPU kernels in FlashInfer-Bench.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 a kernel or a check failed, 2 wrong input, 3 something waits: "
    "for upstream, a reviewer, a reference.",
)

Workspace = Annotated[
    Path | None,
    typer.Option(
        "--workspace",
        help="Folder of clones, manifests, outbox [default: ONBOARD_WORKSPACE, ./workspace].",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class _Warnings(logging.Handler):
    """Warnings of the plain modules, as lines on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one."""
        typer.echo(f"onboard: warning: {record.getMessage()}", err=True)


def _terminated(number: int, frame: object) -> None:
    """Leave as Ctrl-C does: with temporary folders and child processes cleaned up."""
    del frame
    raise SystemExit(128 + number)


def reported(command: Callable[P, int]) -> Callable[P, None]:
    """Print a command's error as one line on standard error; exit with its code or its result."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, _terminated)
        log = logging.getLogger("tasks")
        if not log.handlers:
            log.addHandler(_Warnings(logging.WARNING))
        try:
            code = command(*args, **kwargs)
        except OnboardError as error:
            typer.echo(f"onboard: {error}", err=True)
            code = error.exit_code
        raise typer.Exit(code)

    return run


def integers(text: str, option: str) -> tuple[int, ...]:
    """Read a list such as `1,2,8`.

    Raises:
        InputError: it is not one of positive integers.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and 0 < int(part) < 10**6 for part in parts):
        raise InputError(f"{option}: {text!r} is not a list of positive integers like 1,2,8")
    return tuple(dict.fromkeys(int(part) for part in parts))


def newest_manifests(workspace: Path | None) -> list[Path]:
    """Return the newest run manifest of each model in a workspace.

    Raises:
        InputError: there is none.
    """
    from tasks import manifest, settings

    folder = settings.load_settings(workspace).workspace
    paths = sorted(manifest.newest(folder).values())
    if not paths:
        raise InputError(f"{folder}: has no run manifest (onboard_MODEL_DATE.json)")
    return paths


def listed(texts: Iterable[str] | None) -> list[str]:
    """Read an option that takes names, comma-separated or repeated."""
    return [name.strip() for text in texts or () for name in text.split(",") if name.strip()]


def named(texts: Iterable[str] | None, option: str) -> list[str]:
    """Read an option that names definitions.

    Raises:
        InputError: it is given, and names none.
    """
    names = listed(texts)
    if texts and not names:
        raise InputError(f"{option}: names no definition")
    return names


def print_table(title: str, rows: Iterable[Mapping[str, str]]) -> None:
    """Print rows under their keys; a pipe gets whole lines, a narrow terminal wraps them."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=None)
    lines = list(rows)
    for heading in lines[0] if lines else ():
        table.add_column(heading, no_wrap=True)
    for row in lines:
        table.add_row(*(Text(cell) for cell in row.values()))
    console = Console()
    longest = sum(
        max(len(heading), *(len(row[heading]) for row in lines)) + 2
        for heading in (lines[0] if lines else ())
    )
    Console(width=max(console.width, _TABLE_WIDTH, longest)).print(table)
