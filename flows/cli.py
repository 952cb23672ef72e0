"""The command line: `onboard`, with the commands that run the pipeline.

Prefect takes two seconds to import, so each command imports what it needs when it runs.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows import define, explore
from flows import validate as validate_command
from flows.command import AsJson, Workspace, app, print_table, reported
from tasks.errors import InputError, OnboardError

if TYPE_CHECKING:
    from flows.report import Report
    from tasks.request import OnboardRequest

explore.register(app)
define.register(app)
validate_command.register(app)


@app.command("run")
@reported
def run_model(
    *,
    model_name: Annotated[str, typer.Option(help="Model slug, e.g. qwen3-30b-a3b.")],
    hf_repo_id: Annotated[str | None, typer.Option(help="Hugging Face repository id.")] = None,
    config: Annotated[Path | None, typer.Option(help="Use this config.json.")] = None,
    phases: Annotated[str, typer.Option(help="Phases to run, comma-separated.")] = "0,1,2,3,4",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be done; write nothing here.")
    ] = False,
    skip_workload: Annotated[
        bool, typer.Option("--skip-workload", help="Do not collect workloads (no GPU needed).")
    ] = False,
    no_submit_prs: Annotated[
        bool, typer.Option("--no-submit-prs", help="Stop before publishing (phase 4).")
    ] = False,
    dumps: Annotated[
        Path | None, typer.Option(help="Collect from this folder of recorded FlashInfer dumps.")
    ] = None,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Forget what an earlier run recorded.")
    ] = False,
    workspace: Workspace = None,
    ui: Annotated[
        bool, typer.Option("--ui", help="Keep the Prefect UI up at the end, until Ctrl-C.")
    ] = False,
) -> int:
    """Onboard one model, or go on where an earlier run of it stopped."""
    from tasks import settings
    from tasks.request import parse_request

    options = settings.load_settings(workspace)
    request = parse_request(
        model_name=model_name,
        hf_repo_id=hf_repo_id,
        config=config.absolute() if config else None,
        workspace=options.workspace,
        phases=_phases(phases),
        skip_workload=skip_workload,
        submit_prs=not no_submit_prs,
        refresh=refresh,
        dumps=dumps.absolute() if dumps else None,
    )
    _preflight(request)
    return _dry_run(request) if dry_run else _run(request, ui)


def _phases(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"--phases: {text!r} is not a list like 0,1,2") from error


def _preflight(request: OnboardRequest) -> None:
    """Find what is plainly wrong before anything is started."""
    from tasks import manifest, model

    if request.config:
        model.read_config(request.config)
    path = manifest.latest(request.workspace, request.model_name)
    if path:
        manifest.check_same_model(manifest.load(path), path, request.model_name, request.hf_repo_id)


def _run(request: OnboardRequest, ui: bool) -> int:
    import time

    from rich.console import Console

    from flows.embedded import prefect_server
    from flows.progress import Progress

    started = time.monotonic()
    with prefect_server(request.workspace) as url:
        from flows.onboard import Outcome, onboard_model
        from flows.report import Report
        from tasks import manifest
        from tasks.settings import load_settings
        from tasks.step import phase_seconds

        started_server = time.monotonic()
        typer.echo(f"Onboarding {request.model_name} in {request.workspace}")
        with Progress(request.workspace, request.model_name, Console()):
            state = onboard_model(request, return_state=True)
        result = state.result(raise_on_failure=False)
        if isinstance(result, OnboardError):
            raise result
        if not isinstance(result, Outcome):
            raise OnboardError(f"the run ended {state.name}: {state.message}")
        report = Report(manifest.load(result.manifest), result.manifest)
        _print_report(report)
        worked = len(result.worked_on)
        typer.echo(
            f"Work: {worked} of {len(report.run.kernels)} kernels had something left to do"
            if worked
            else "Work: nothing was left to do, nothing was done twice"
        )
        spent = ", ".join(f"phase {n} {s:.1f} s" for n, s in phase_seconds().items())
        typer.echo(
            f"Time: server {started_server - started:.1f} s, {spent}, "
            f"in all {time.monotonic() - started:.1f} s"
        )
        typer.echo(f"Outbox: {load_settings(request.workspace).outbox}")
        if ui:
            typer.echo(f"Prefect UI: {url.removesuffix('/api')} (Ctrl-C to end)")
            _until_interrupted()
    return report.exit_code


def _until_interrupted() -> None:
    import signal

    try:
        signal.pause()
    except KeyboardInterrupt:
        return


def _print_report(report: Report) -> None:
    from tasks.manifest import NEEDS_REFERENCE, Route

    rows = [report.row(entry) for entry in report.run.kernels]
    for row in rows:
        del row["op type"]  # lines are long, and names begin with it or say it
    print_table(f"Kernels of {report.run.model_slug}", rows)
    for entry in report.run.kernels:
        if entry.error:
            typer.secho(f"failed: {entry.error}", fg="red")
        elif report.run.state(entry) == NEEDS_REFERENCE:
            typer.echo(f"needs a reference: {entry.definition_name}: {report.reason(entry)}")
        elif report.run.state(entry) == "waiting":
            typer.echo(f"waiting: {entry.definition_name} for {entry.sglang_pr_url}")
        elif entry.route is Route.REQUEST_KERNEL and entry.fi_issue_url:
            typer.echo(f"requested: {entry.definition_name}: {entry.fi_issue_url}")
        if entry.fi_trace_template_request_url:
            url = entry.fi_trace_template_request_url
            typer.echo(f"template requested: {entry.definition_name}: {url}")
    for item in report.not_produced:
        typer.echo(f"not produced: {item}")
    typer.echo(f"Report: {report.counts}")
    typer.echo(f"Manifest: {report.path}")


def _dry_run(request: OnboardRequest) -> int:
    """Take the inventory in a temporary folder and say what a run would do."""
    from flows.rehearsal import rehearse
    from flows.report import Report
    from tasks.request import remaining_steps

    with tempfile.TemporaryDirectory(prefix="onboard-dry-run-") as folder:
        run, path = rehearse(request, Path(folder), typer.echo)
    report = Report(run, path)
    _print_report(report)
    typer.echo("Would do:")
    for entry in run.kernels:
        steps = remaining_steps(run, entry, request)
        if steps:
            typer.echo(f"  {entry.definition_name}: {', '.join(step.value for step in steps)}")
    return 0


@app.command()
@reported
def status(
    manifest_file: Annotated[
        Path | None,
        typer.Argument(
            metavar="[MANIFEST]", help="A run manifest [default: all in the workspace]."
        ),
    ] = None,
    as_json: AsJson = False,
    workspace: Workspace = None,
) -> int:
    """Show where every kernel of a run stands; the exit code is the run's."""
    from flows.report import Report
    from tasks import manifest, settings

    paths = [manifest_file] if manifest_file else []
    if not paths:
        folder = settings.load_settings(workspace).workspace
        paths = sorted(folder.glob("onboard_*.json"))
        if not paths:
            raise InputError(f"{folder}: has no run manifest (onboard_*.json)")
    reports = [Report(manifest.load(path), path) for path in paths]
    if as_json:
        shown = [
            {
                "manifest": str(report.path),
                "model_slug": report.run.model_slug,
                "states": dict(report.states),
                "kernels": [
                    {**row, "links": report.links(entry), "error": entry.error}
                    for row, entry in zip(report.inventory(), report.run.kernels, strict=True)
                ],
            }
            for report in reports
        ]
        typer.echo(json.dumps(shown, indent=2))
    else:
        for report in reports:
            _print_report(report)
    codes = {report.exit_code for report in reports}
    return 1 if 1 in codes else max(codes)


@app.command()
@reported
def server(
    workspace: Workspace = None,
    port: Annotated[int, typer.Option(help="Port of the UI and the API, on loopback.")] = 4200,
) -> int:
    """Serve the Prefect UI, and the flows as deployments to start, schedule and retry there."""
    from flows.embedded import prefect_server
    from tasks import settings

    folder = settings.load_settings(workspace).workspace
    with prefect_server(folder, port=port) as url:
        from flows.served import serve_flows

        typer.echo(f"Prefect UI: {url.removesuffix('/api')} (workspace {folder}, Ctrl-C to end)")
        serve_flows(folder)
    return 0


@app.command()
@reported
def sample(
    workspace: Annotated[Path, typer.Option("--workspace", help="Folder to create.")] = Path(
        "demo"
    ),
) -> int:
    """Write the demo workspace: real inputs as local git remotes."""
    from tasks.repos.sample import make_sample

    made = make_sample(workspace.absolute(), lambda line: typer.echo(f"sample: {line}"))
    typer.echo(f"sample: {workspace} {'is ready' if made else 'is already there'}")
    return 0


def main() -> None:
    """Run the command line."""
    sys.exit(app())
