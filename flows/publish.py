"""`onboard publish`: phase 4 by itself, and its checklist."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.command import AsJson, Workspace, named, newest_manifests, print_table, reported
from tasks.errors import InputError, OnboardError

if TYPE_CHECKING:
    from tasks.manifest import KernelEntry, RunManifest
    from tasks.publish.base import Checklist
    from tasks.request import OnboardRequest, Step


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(publish)


@reported
def publish(
    *,
    manifest: Annotated[
        Path | None, typer.Option(help="Run manifest [default: each model's newest].")
    ] = None,
    definitions: Annotated[
        list[str] | None,
        typer.Option(help="Definitions, comma-separated or repeated [default: all complete ones]."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Go through the checklists; open nothing.")
    ] = False,
    as_json: AsJson = False,
    workspace: Workspace = None,
) -> int:
    """Open the pull requests of what is complete, and what is to be asked upstream (phase 4).

    Those of definitions that are named are brought up to date if they are open already.
    """
    names = named(definitions, "--definitions")
    paths = [manifest.absolute()] if manifest else newest_manifests(workspace)
    work, damaged = _Work.found(paths, names)
    for folder in {part.path.parent for part in work if part.pairs}:
        _update_document(folder)
    code = _check(work, as_json=as_json) if check else _publish(work, as_json=as_json)
    for error in damaged:
        typer.echo(f"onboard: {error}", err=True)
    return max(code, 1 if damaged else 0)


class _Work:
    """What to publish of a run."""

    def __init__(self, path: Path, run: RunManifest, names: Sequence[str]) -> None:
        from tasks.request import parse_request

        self.path, self.run, self.names = path, run, names
        self.request: OnboardRequest = parse_request(
            model_name=run.model_slug,
            hf_repo_id=run.hf_repo_id,
            workspace=path.parent,
            phases=(4,),
            renew=tuple(e.definition_name for e in run.kernels if e.definition_name in names),
        )
        self.entries: list[KernelEntry] = [
            entry
            for entry in run.kernels
            if (entry.definition_name in names if names else self.steps(entry))
        ]

    def steps(self, entry: KernelEntry) -> tuple[Step, ...]:
        """Return what is left to do for a kernel."""
        from tasks.request import remaining_steps

        return remaining_steps(self.run, entry, self.request)

    @property
    def pairs(self) -> list[KernelEntry]:
        """The kernels with a pair of pull requests to open; those that somebody named."""
        from tasks.request import Step

        if self.names:
            return self.entries
        return [entry for entry in self.entries if Step.PUBLISH_COVERAGE in self.steps(entry)]

    @classmethod
    def found(
        cls, paths: Sequence[Path], names: Sequence[str]
    ) -> tuple[list[_Work], list[OnboardError]]:
        """Return what there is to publish of some runs, and why there is nothing of others.

        Raises:
            InputError: the only manifest is damaged, or none has one of the names.
        """
        from tasks import manifest as manifests

        work, damaged = [], []
        for path in paths:
            try:
                work.append(cls(path, manifests.load(path), names))
            except OnboardError as error:
                if len(paths) == 1:
                    raise
                damaged.append(error)
        known = {entry.definition_name for part in work for entry in part.entries}
        unknown = [name for name in names if name not in known]
        if unknown:
            where = ", ".join(str(path) for path in paths)
            raise InputError(f"--definitions: {where} has no kernel named {', '.join(unknown)}")
        return work, damaged


def _check(work: Sequence[_Work], *, as_json: bool) -> int:
    checked = {
        part.path: {entry.definition_name: list(_checklists(part, entry)) for entry in part.pairs}
        for part in work
    }
    if as_json:
        typer.echo(json.dumps([_shown(path, lists) for path, lists in checked.items()], indent=2))
    else:
        _print(checked)
    lists = [found for of in checked.values() for both in of.values() for found in both]
    return 1 if any(found.failed for found in lists) else 0


def _checklists(part: _Work, entry: KernelEntry) -> Iterator[Checklist]:
    """Yield the checklists of a definition's pair of pull requests."""
    from tasks import settings
    from tasks.publish import checklist, render
    from tasks.publish.publishers import sends_to_github, sends_to_hub
    from tasks.publish.render import Subject
    from tasks.publish.requested import is_public
    from tasks.request import Step

    options = settings.load_settings(part.path.parent)
    subject = Subject.of(part.run, entry, options)
    try:
        dataset = checklist.check_dataset(subject)
    except OnboardError as error:
        yield _not_ready(entry, "dataset", "files", f"cannot be read: {error}")
        return
    yield dataset
    if dataset.failed:
        return
    opened = part.run.pull_requests(entry.definition_name).flashinfer_trace_pr or ""
    if Step.PUBLISH_DATASET in part.steps(entry):
        opened = ""
    upstream = sends_to_github(options) and (is_public(opened) or sends_to_hub(options))
    with tempfile.TemporaryDirectory(prefix="onboard-coverage-") as folder:
        edited = Path(folder, "model_coverage.mdx")
        clone = options.clone("flashinfer_bench")
        try:
            post, branch = render.coverage_pull_request(subject, clone, opened, edited)
            yield checklist.check_coverage(subject, post, branch, opened, upstream=upstream)
        except OnboardError as error:
            yield _not_ready(entry, "coverage", "document", f"cannot be edited: {error}")


def _not_ready(entry: KernelEntry, kind: str, item: str, why: str) -> Checklist:
    from tasks.publish.base import Checklist, Finding

    return Checklist(entry.definition_name, kind, (Finding(item, ok=False, message=why),))


def _shown(path: Path, lists: dict[str, list[Checklist]]) -> dict[str, Any]:
    definitions = [
        {
            "definition": name,
            "ready": not any(found.failed for found in both),
            **{
                found.kind: [
                    {
                        "item": item.item,
                        "ok": item.ok,
                        "blocks": item.blocks,
                        "message": item.message,
                    }
                    for item in found.findings
                ]
                for found in both
            },
        }
        for name, both in lists.items()
    ]
    return {"manifest": str(path), "definitions": definitions}


def _print(checked: dict[Path, dict[str, list[Checklist]]]) -> None:
    ready = 0
    for lists in checked.values():
        for name, both in lists.items():
            failed = any(found.failed for found in both)
            ready += not failed
            typer.echo(f"{name}: {'not ready' if failed else 'ready'}")
            for found in both:
                for item in found.findings:
                    mark = "x" if item.ok else "!" if item.blocks else "?"
                    line = f"  [{mark}] {found.kind}, {item.item}: {item.message}"
                    typer.secho(line, fg="red" if item.failed else None if item.ok else "yellow")
    number = sum(map(len, checked.values()))
    typer.echo(
        f"{ready} of {number} definitions may be published" if number else "nothing to publish"
    )


def _update_document(workspace: Path) -> None:
    """Bring the clone with the coverage document up to date, or say why it is not."""
    from tasks import settings
    from tasks.repos import clone

    options, name = settings.load_settings(workspace), "flashinfer_bench"
    try:
        found = clone.update(name, options.remotes.flashinfer_bench, options.clone(name))
        warning = found.warning
    except OnboardError as error:
        warning = str(error)
    if warning:
        typer.echo(f"onboard: warning: {warning}", err=True)


def _publish(work: Sequence[_Work], *, as_json: bool) -> int:
    from rich.console import Console

    from flows.embedded import prefect_server

    if not any(part.entries for part in work):
        typer.echo("[]" if as_json else "nothing to publish")
        return 0
    rows: list[dict[str, str]] = []
    wrong = []
    with prefect_server(work[0].path.parent):
        from flows.progress import log_lines

        with log_lines(Console(stderr=True)):
            for part in work:
                try:
                    _publish_run(part)
                    rows += _became(part)
                except OnboardError as error:  # of its manifest
                    wrong.append(str(error))
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    else:
        print_table("Published", [{k: v for k, v in row.items() if k != "error"} for row in rows])
        for row in rows:
            if row["error"]:
                typer.secho(f"failed: {row['error']}", fg="red")
    for text in wrong:
        typer.echo(f"onboard: {text}", err=True)
    return 1 if wrong or any(row["error"] for row in rows) else 0


def _publish_run(part: _Work) -> None:
    """Publish what there is of a run; what fails is in its manifest then, and stops no other."""
    from prefect import tags

    from flows.kernel import onboard_kernel
    from tasks import manifest

    for entry in part.entries:
        name = entry.definition_name
        manifest.update_kernel(part.path, name)  # an earlier error is forgotten
        with tags(f"model:{part.run.model_slug}", f"kernel:{name}"):
            onboard_kernel(part.request, part.path, name, return_state=True)


def _became(part: _Work) -> Iterator[dict[str, str]]:
    """Yield what has become of the kernels of a run."""
    from tasks import manifest

    run = manifest.load(part.path)
    for entry in part.entries:
        now = run.kernel(entry.definition_name)
        links = run.links(now)
        pair = {kind: links.pop(kind, "-") for kind in ("dataset", "coverage")}
        error = now.error or ""
        if not error and not part.steps(entry) and "-" in pair.values():
            error = f"{entry.definition_name}: there is nothing to publish of it yet"
        yield {
            "definition": entry.definition_name,
            "state": run.state(now),
            **pair,
            "requests": ", ".join(links.values()) or "-",
            "error": error,
        }
