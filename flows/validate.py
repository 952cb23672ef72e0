"""`onboard validate`: check a dataset folder as a maintainer would, without a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from flows.command import AsJson, listed, reported


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(validate)


@reported
def validate(
    *,
    dataset: Annotated[Path, typer.Option(help="Folder of the dataset; nothing is changed.")],
    only: Annotated[
        list[str] | None, typer.Option(help="Definition names, comma-separated or repeated.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Check a dataset's definitions, workloads, blobs, solutions and traces; call none of them."""
    from tasks.validate.dataset import validate as check

    names = listed(only)
    report = check(dataset, names)
    if as_json:
        typer.echo(json.dumps(report.as_json(), indent=2, ensure_ascii=False))
    else:
        for line in report.lines():
            typer.echo(line)
    return 1 if report.errors else 0
