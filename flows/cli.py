"""The command line: `onboard`, with the commands that run the pipeline.

Prefect takes two seconds to import, so each command imports what it needs when it runs.
"""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows import define, evaluate, explore, publish, sanitize
from flows import validate as validate_command
from flows.command import (
    AsJson,
    Workspace,
    app,
    integers,
    named,
    newest_manifests,
    print_table,
    reported,
)
from tasks.errors import InputError

if TYPE_CHECKING:
    from flows.report import Report
    from tasks.collect.request import CollectRequest
    from tasks.request import OnboardRequest

explore.register(app)
define.register(app)
validate_command.register(app)
sanitize.register(app)
evaluate.register(app)
publish.register(app)


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
    sglang_pr: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[KERNEL=]URL",
            help="An SGLang pull request to wait for; KERNEL is a definition or an op type. "
            "Repeatable.",
        ),
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
        sglang_pr=tuple(sglang_pr or ()),
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
        from flows.outcome import came_to
        from flows.report import Report
        from tasks import manifest
        from tasks.settings import load_settings
        from tasks.step import phase_seconds

        started_server = time.monotonic()
        typer.echo(f"Onboarding {request.model_name} in {request.workspace}")
        with Progress(request.workspace, request.model_name, Console()):
            state = onboard_model(request, return_state=True)
        result = came_to(state, Outcome)
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
    from tasks.manifest import Route

    rows = [report.row(entry) for entry in report.run.kernels]
    for row in rows:
        del row["op type"]  # lines are long, and names begin with it or say it
    print_table(f"Kernels of {report.run.model_slug}", rows)
    _print_what_waits(report)
    for entry in report.run.kernels:
        if entry.route is Route.REQUEST_KERNEL and entry.fi_issue_url:
            typer.echo(f"requested: {entry.definition_name}: {entry.fi_issue_url}")
        if entry.fi_trace_template_request_url:
            url = entry.fi_trace_template_request_url
            typer.echo(f"template requested: {entry.definition_name}: {url}")
    for item in report.not_produced:
        typer.echo(f"not produced: {item}")
    _print_end(report)


def _print_what_waits(report: Report) -> None:
    from flows.report import REFUSED, printed
    from tasks.manifest import NEEDS_REFERENCE

    for entry in report.run.kernels:
        name, state = entry.definition_name, report.run.state(entry)
        if entry.error:
            typer.secho(f"failed: {entry.error}", fg="red")
        elif state == NEEDS_REFERENCE:
            typer.echo(f"needs a reference: {name}: {report.reason(entry)}")
        elif state in REFUSED:
            what = state.replace("_", " ")
            typer.secho(f"{what}: {name}: {report.reason(entry, printed)}", fg="yellow")
        elif state == "waiting":
            typer.echo(f"waiting: {name} {report.summary(entry).removeprefix('waits ')}")


def _print_end(report: Report) -> None:
    typer.echo(f"Report: {report.counts}")
    typer.echo(f"Manifest: {report.path}")


def _dry_run(request: OnboardRequest) -> int:
    """Take the inventory in a temporary folder and say what a run would do."""
    from flows.rehearsal import rehearse
    from flows.report import Report
    from tasks.request import check_names, remaining_steps

    with tempfile.TemporaryDirectory(prefix="onboard-dry-run-") as folder:
        run, path = rehearse(request, Path(folder), typer.echo)
    check_names(request, run)
    report = Report(run, path)
    _print_report(report)
    typer.echo("Would do:")
    for entry in run.kernels:
        steps = remaining_steps(run, entry, request)
        if steps:
            typer.echo(f"  {entry.definition_name}: {', '.join(step.value for step in steps)}")
    return 0


@app.command("collect")
@reported
def collect(
    *,
    manifest: Annotated[Path, typer.Option(help="Run manifest; its folder is the workspace.")],
    definitions: Annotated[
        list[str] | None,
        typer.Option(help="Definitions, comma-separated or repeated [default: all without rows]."),
    ] = None,
    batch_sizes: Annotated[
        str, typer.Option(help="Requests at a time, wave by wave.")
    ] = "1,8,32,64,128",
    dataset_kind: Annotated[str, typer.Option(help="Prompts: random or sharegpt.")] = "random",
    dataset_path: Annotated[Path | None, typer.Option(help="ShareGPT-format file.")] = None,
    isl: Annotated[
        int | None, typer.Option(help="Input length in tokens [default: 1024 and 8192].")
    ] = None,
    osl: Annotated[int | None, typer.Option(help="Output length [default: 1024].")] = None,
    random_range_ratio: Annotated[
        float, typer.Option(help="Shortest random length, as a share of the longest.")
    ] = 0.5,
    rounds: Annotated[int, typer.Option(help="Times each wave is sent.")] = 2,
    seed: Annotated[int, typer.Option(help="The same seed gives the same requests.")] = 0,
    model_path: Annotated[
        str | None, typer.Option(help="Folder or repository to serve [default: the manifest's].")
    ] = None,
    server_flag: Annotated[
        list[str] | None,
        typer.Option(help="More server arguments, e.g. --server-flag='--load-format dummy'."),
    ] = None,
    server_env: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE for the server's environment.")
    ] = None,
    nnodes: Annotated[int, typer.Option(help="Hosts that serve the model together.")] = 1,
    node_rank: Annotated[int, typer.Option(help="Which of them this one is.")] = 0,
    dist_init_addr: Annotated[str, typer.Option(help="host:port of the first of them.")] = "",
    all_layers: Annotated[
        bool, typer.Option("--all-layers", help="Record norms, sampling, MoE with every layer.")
    ] = False,
    record_runs: Annotated[
        bool, typer.Option("--record-runs", help="Record attention's runs beside its plans.")
    ] = False,
    keep_dumps: Annotated[
        bool, typer.Option("--keep-dumps", help="Keep what FlashInfer dumped.")
    ] = False,
    max_workloads: Annotated[int | None, typer.Option(help="Rows per definition at most.")] = None,
    skip_evaluation: Annotated[
        bool, typer.Option("--skip-evaluation", help="Do not evaluate the baselines.")
    ] = False,
    sessions_only: Annotated[
        bool, typer.Option("--sessions-only", help="Serve and record; make no rows yet.")
    ] = False,
    plan_only: Annotated[
        bool, typer.Option("--plan-only", help="Print the sessions; start nothing.")
    ] = False,
    as_json: AsJson = False,
) -> int:
    """Serve a model on this host's GPUs and collect workloads from its calls (phase 3)."""
    from tasks.collect.request import parse_request

    names = tuple(named(definitions, "--definitions"))
    if model_path is not None and Path(model_path).is_dir():
        model_path = str(Path(model_path).absolute())
    request = parse_request(
        manifest=manifest.absolute(),
        definitions=names,
        batch_sizes=integers(batch_sizes, "--batch-sizes"),
        dataset_kind=dataset_kind,
        dataset_path=dataset_path.absolute() if dataset_path else None,
        isl=isl,
        osl=osl,
        random_range_ratio=random_range_ratio,
        rounds=rounds,
        seed=seed,
        model_path=model_path,
        server_flags=tuple(server_flag or ()),
        server_env=_variables(server_env or ()),
        nnodes=nnodes,
        node_rank=node_rank,
        dist_init_addr=dist_init_addr,
        all_layers=all_layers,
        record_runs=record_runs,
        keep_dumps=keep_dumps,
        max_workloads=max_workloads,
        skip_evaluation=skip_evaluation,
        sessions_only=sessions_only,
    )
    return _plan_only(request, as_json) if plan_only else _collect(request, as_json)


def _variables(texts: Sequence[str]) -> dict[str, str]:
    """Read NAME=VALUE texts.

    Raises:
        InputError: one is not of this form.
    """
    pairs = [text.partition("=") for text in texts]
    for name, equals, _ in pairs:
        if not equals or not name.isidentifier():
            raise InputError(f"--server-env: {name!r} is not NAME=VALUE")
    return {name: value for name, _, value in pairs}


def _plan_only(request: CollectRequest, as_json: bool) -> int:
    from flows.collect import plan_sessions
    from tasks import model
    from tasks.collect.plan import estimate, shown

    plan, path = plan_sessions(request)
    config = model.read_config(path)
    one_by_one = plan.launches_one_by_one(len(request.batch_sizes))
    if as_json:
        found = {
            "sessions": [shown(session, config) for session in plan.sessions],
            "not_collected": plan.not_collected,
            "launches": len(plan.sessions),
            "launches_one_by_one": one_by_one,
        }
        typer.echo(json.dumps(found, indent=2))
        return 0
    for session in plan.sessions:
        expected = estimate(session, config)
        kind = f"{session.gpu} " if session.gpu else ""
        typer.echo(f"{session.id}: {session.mode.replace('_', ' ')}, {session.tp} {kind}GPU(s)")
        for warning in session.warnings:
            typer.secho(f"  warning: {warning}", fg="yellow")
        typer.echo(f"  flags: {shlex.join(session.flags)}")
        for name, value in session.env.items():
            typer.echo(f"  env: {name}={value}")
        for name, calls in expected.calls.items():
            typer.echo(f"  records: {name}, about {calls} calls")
        typer.echo(
            f"  estimate: {expected.seconds / 60:.0f} min, {expected.recorded_mb:.0f} MB recorded"
        )
        for reason, waves in expected.not_sent.items():
            typer.echo(f"  not sent: {waves} waves: {reason}")
        for name in session.definitions:
            typer.echo(f"  {name}")
    for name, reason in plan.not_collected.items():
        typer.echo(f"not collected: {name}: {reason}")
    if not plan.sessions and not plan.not_collected:
        typer.echo("nothing to collect: name definitions that have workloads with --definitions")
        return 0
    typer.echo(
        f"{len(plan.sessions)} launches; one per definition and batch size would be {one_by_one}"
    )
    return 0


def _collect(request: CollectRequest, as_json: bool) -> int:
    from rich.console import Console

    from flows.embedded import prefect_server

    with prefect_server(request.manifest.parent):
        from flows.collect import Collection, collect_workloads
        from flows.outcome import came_to
        from flows.progress import log_lines

        with log_lines(Console(stderr=True)):
            state = collect_workloads(request, return_state=True)
        found = came_to(state, Collection)
    if as_json:
        typer.echo(json.dumps(found.model_dump(), indent=2))
        return 1 if found.failed else 0
    rows = [{"definition": name, "rows": str(n)} for name, n in found.rows.items()]
    print_table("Workloads", rows)
    for name, reason in found.failed.items():
        typer.echo(f"failed: {name}: {reason.removeprefix(f'{name}: ')}")
    for name, reason in found.not_collected.items():
        typer.echo(f"not collected: {name}: {reason}")
    typer.echo(found.counts)
    return 1 if found.failed else 0


@app.command()
@reported
def status(
    manifest_file: Annotated[
        Path | None,
        typer.Argument(
            metavar="[MANIFEST]",
            help="A run manifest [default: the newest of each model in the workspace].",
        ),
    ] = None,
    ask: Annotated[
        bool, typer.Option("--ask", help="First ask GitHub and the Hub what has become of it all.")
    ] = False,
    as_json: AsJson = False,
    workspace: Workspace = None,
) -> int:
    """Show where every kernel stands, and what was published; the exit code is the run's."""
    from flows.report import Report
    from tasks import manifest

    paths = [manifest_file] if manifest_file else newest_manifests(workspace)
    if ask:
        _ask(paths)
    reports = [Report(manifest.load(path), path) for path in paths]
    if as_json:
        typer.echo(json.dumps([report.data() for report in reports], indent=2))
    else:
        for report in reports:
            _print_status(report)
    codes = {report.exit_code for report in reports}
    return 1 if 1 in codes else max(codes)


def _print_status(report: Report) -> None:
    from flows.report import REFUSED, printed

    print_table(f"Kernels of {report.run.model_slug}", report.status())
    _print_what_waits(report)
    for entry in report.run.kernels:
        if report.run.state(entry) not in REFUSED:  # these have been quoted
            for kind, words in report.words(entry).items():
                typer.echo(f"said: {entry.definition_name}: {kind}: {printed(words)}")
    _print_end(report)


def _ask(paths: Sequence[Path]) -> None:
    from tasks import manifest, settings
    from tasks.publish import watch
    from tasks.publish.publishers import Publishers

    for path in paths:
        options = settings.load_settings(path.absolute().parent)
        found = watch.look(manifest.load(path), watch.Sites(Publishers.of(options).state_of))
        manifest.record_upstream(path, found.told)
        for reason in found.failed.values():
            typer.echo(f"onboard: warning: {reason}", err=True)
        if found.not_asked:
            where = ", ".join(found.not_asked)
            typer.echo(f"onboard: warning: no token to ask with: {where}", err=True)


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
