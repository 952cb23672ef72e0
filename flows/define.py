"""`onboard define`: phase 2 by itself, and how its definitions agree with published ones."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.command import AsJson, named, print_table, reported
from tasks.errors import InputError

if TYPE_CHECKING:
    from tasks.define.agree import Agreement
    from tasks.define.phase import Result
    from tasks.manifest import KernelEntry


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(define)


@reported
def define(
    *,
    manifest: Annotated[
        Path | None,
        typer.Option(help="Run manifest: define what is new (or --crosscheck), record it there."),
    ] = None,
    inventory: Annotated[
        Path | None, typer.Option(help="Output of `onboard inventory --json`: define what is new.")
    ] = None,
    dataset: Annotated[
        Path | None, typer.Option(help="Folder of the dataset to write definitions and tests into.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Definition names, comma-separated or repeated.")
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(help="Python file with the reference that a kernel lacks; with --only NAME."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Draft and prove; write nothing.")
    ] = False,
    agree: Annotated[
        Path | None,
        typer.Option(help="Instead: regenerate all definitions of this dataset and compare."),
    ] = None,
    crosscheck: Annotated[
        Path | None,
        typer.Option(help="Instead: compare definitions that FlashInfer dumped in a serving run."),
    ] = None,
    dumps: Annotated[
        Path | None, typer.Option(help="The dumped calls of that run, for --crosscheck.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Write definitions and their reference tests, each proved, without a GPU (phase 2)."""
    modes = {"--inventory": inventory, "--agree": agree, "--crosscheck": crosscheck}
    if crosscheck is None:
        modes["--manifest"] = manifest
    given = [option for option, value in modes.items() if value is not None]
    if len(given) != 1:
        raise InputError(f"give one of {', '.join(modes)}; {' and '.join(given) or 'none'} given")
    if agree is not None:
        return _agree(agree, as_json=as_json)
    if crosscheck is not None:
        if dumps is None:
            raise InputError("--crosscheck: needs --dumps, the dumped calls of the same run")
        return _crosscheck(crosscheck, dumps, manifest, as_json=as_json)
    if dataset is None:
        raise InputError("--dataset: missing; where should the definitions go?")
    names = named(only, "--only")
    if dataset.exists() and not dataset.is_dir():
        raise InputError(f"--dataset: {dataset} is no folder")
    if reference is not None and len(names) != 1:
        raise InputError("--reference: is for one kernel; name it with --only")
    return _define(
        manifest=manifest,
        inventory=inventory,
        dataset=dataset,
        names=names,
        reference=reference,
        dry_run=dry_run,
        as_json=as_json,
    )


def _define(
    *,
    manifest: Path | None,
    inventory: Path | None,
    dataset: Path,
    names: Sequence[str],
    reference: Path | None,
    dry_run: bool,
    as_json: bool,
) -> int:
    from tasks import files
    from tasks import manifest as manifests
    from tasks.define import phase

    entries: list[KernelEntry]
    if manifest is not None:
        run = manifests.load(manifest)
        slug, entries, where = run.model_slug, phase.kernels_to_define(run), str(manifest)
        done = len(run.kernels) - len(entries)
    else:
        where = str(inventory)
        found = files.read_json_object(Path(where), "the inventory")
        slug, entries = phase.kernels_of_inventory(found, where, dataset)
        done = len(found["kernels"]) - len(entries)
    entries = phase.chosen(entries, names, where)
    supplied = None if reference is None else files.read_text(reference, "the reference")
    with tempfile.TemporaryDirectory(prefix="onboard-define-") as folder:
        drafts = Path(folder)
        results = phase.draft_all(entries, slug, drafts, supplied)
        if not dry_run:
            for result in results:
                phase.stage(result, drafts, dataset, manifest)
    if as_json:
        shown = {
            "model_slug": slug,
            "dataset": str(dataset),
            "dry_run": dry_run,
            "there_already": done,
            "kernels": [result.as_json() for result in results],
        }
        typer.echo(json.dumps(shown, indent=2, ensure_ascii=False))
    else:
        _print(results, slug, dataset, dry_run=dry_run)
        if done:
            typer.echo(f"{done} more are there already")
    states = {result.state for result in results}
    return 1 if "failed" in states else 3 if manifests.NEEDS_REFERENCE in states else 0


def _print(results: Sequence[Result], slug: str, dataset: Path, *, dry_run: bool) -> None:
    rows = [
        {
            "definition": result.name,
            "op type": result.op_type,
            "state": result.state,
            "made by": result.draft.method.replace("_", " ") if result.draft else "",
            "proved in": f"{len(result.draft.proof)} cases" if result.draft else "",
        }
        for result in results
    ]
    print_table(f"Definitions of {slug}", rows)
    for result in results:
        notes = result.draft.notes if result.draft else [result.error]
        for note in notes:
            typer.echo(f"{result.name}: {note.removeprefix(f'{result.name}: ')}")
    defined = sum(result.draft is not None for result in results)
    what = "dry run, nothing written" if dry_run else f"written to {dataset}"
    what = what if defined else "nothing written"
    typer.echo(f"{defined} of {len(results)} defined; {what}")


def _agree(root: Path, *, as_json: bool) -> int:
    from tasks.define.agree import agree

    found = agree(root)
    if as_json:
        typer.echo(json.dumps(found.model_dump(mode="json"), indent=2, ensure_ascii=False))
    else:
        _print_agreement(found)
    return 0


def _print_agreement(found: Agreement) -> None:
    for item in found.differences:
        detail = f" ({item.detail})" if item.detail else ""
        typer.echo(
            f"{item.definition}: {item.field}: ours {item.ours}, theirs {item.theirs}: "
            f"{item.reason}{detail}"
        )
    counts = ", ".join(f"{op_type} {count}" for op_type, count in found.by_op_type.items())
    typer.echo(f"{found.equal} of {found.total} equal: {counts}")


def _crosscheck(traces: Path, dumps: Path, manifest: Path | None, *, as_json: bool) -> int:
    from tasks.collect.dumps import read_calls
    from tasks.define.crosscheck import crosscheck, record

    if not dumps.is_dir():
        raise InputError(f"--dumps: {dumps} is no folder")
    found = crosscheck(traces, read_calls(dumps).calls)
    if manifest is not None:
        record(found, manifest)
    if as_json:
        typer.echo(json.dumps(found.model_dump(mode="json"), indent=2, ensure_ascii=False))
    else:
        for verdict in found.verdicts:
            typer.echo(verdict.line())
        typer.echo(
            f"{found.agree} agree, {found.disagree} disagree, {found.not_compared} not compared"
        )
    return 1 if found.disagree else 0
