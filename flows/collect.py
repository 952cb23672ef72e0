"""Phase 3 by itself: `collect-workloads`, and the command `onboard collect`.

The sessions of a model side by side, as many as there are GPUs for; then every definition's rows
and baseline. A session that is complete is not served again, and one that failed costs only the
definitions that it was to serve.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.client.schemas.objects import State
from prefect.futures import wait
from prefect.states import Completed, Failed

from tasks import files, manifest, settings
from tasks.collect import live
from tasks.collect.place import Outcome
from tasks.collect.plan import Plan
from tasks.collect.realism import Realism, plot
from tasks.collect.request import CollectRequest
from tasks.collect.task import collect, collect_session
from tasks.discover.hub import fetch_config
from tasks.discover.sources import SglangIndex, cached, index_sglang, revision
from tasks.errors import InputError
from tasks.model import read_config


@flow(
    name="collect-workloads",
    flow_run_name="collect {request.manifest.stem}",
    description=(
        "Serve a model on GPUs and turn the FlashInfer calls that it makes into workloads: its "
        "sessions first, then the rows and the baseline of every definition. Running it again "
        "goes on with what is not done."
    ),
)
def collect_workloads(request: CollectRequest) -> State[dict[str, int]]:
    """Collect for the requested definitions; the final state's data is name -> workloads.

    Args:
        request: what to collect, and how to serve the model.
    """
    outcomes, failed, passed_over = serve_sessions(request)
    run = manifest.load(request.manifest)
    rows: dict[str, int] = {}
    for entry in request.chosen(run):
        name = entry.definition_name
        if name in passed_over:
            continue
        state = collect(request.manifest, name, None, request.max_workloads, return_state=True)
        if state.is_completed():
            rows[name] = state.result()
        else:
            failed[name] = str(state.message)
            manifest.record_error(request.manifest, name, str(state.message))
    report(run.model_slug, request.manifest.parent, list(rows), outcomes)
    counts = (
        f"{len(rows)} definitions have workloads, {len(failed)} failed, "
        f"{len(passed_over)} cannot be collected from this checkpoint"
    )
    if failed:
        return Failed(message=counts, data=rows)
    return Completed(message=counts, data=rows)


def serve_sessions(
    request: CollectRequest,
) -> tuple[list[Outcome], dict[str, str], dict[str, str]]:
    """Plan and serve the sessions.

    Returns:
        What the sessions came to; why others failed, by name; definitions that no session of this
        model shows, and why.
    """
    plan, config = plan_sessions(request)
    log = get_run_logger()
    for name, reason in plan.not_collected.items():
        log.info("%s: nothing to collect: %s", name, reason)
    futures = [
        collect_session.submit(request.manifest, session, config, keep_dumps=request.keep_dumps)
        for session in plan.sessions
    ]
    wait(futures)
    outcomes: list[Outcome] = []
    failed: dict[str, str] = {}
    for session, future in zip(plan.sessions, futures, strict=True):
        if future.state.is_completed():
            outcomes.append(Outcome.model_validate(future.result()))
        else:
            failed[session.id] = str(future.state.message)
    return outcomes, failed, plan.not_collected


def plan_sessions(request: CollectRequest) -> tuple[Plan, Path]:
    """Return the sessions that a request needs, and the model's config.json.

    Raises:
        InputError: SGLang is neither installed nor cloned, or the request is wrong.
    """
    run = manifest.load(request.manifest)
    options = settings.load_settings(request.manifest.parent)
    cache = options.workspace / ".cache"
    served = request.wish(run).model
    config = request.config or Path(served) / "config.json"
    if not config.is_file():
        config = fetch_config(served, options, cache / "hub")
    tree = live.installed_sglang(options.collect.python) or options.clone("sglang")
    if not tree.is_dir():
        raise InputError(
            f"{tree}: SGLang is not installed (collect.python) and phase 0 has not cloned it"
        )
    name = revision(tree, "sglang", "sglang_kernel")
    flags = cached(cache / "sources", SglangIndex, name, lambda: index_sglang(tree)).flags
    return live.plan_collection(request, run, read_config(config), flags), config


def report(slug: str, workspace: Path, names: list[str], outcomes: list[Outcome]) -> None:
    """Show sessions and how real the rows look, as artifacts."""
    key = "".join(c if c.isalnum() else "-" for c in slug.lower()).strip("-")
    if outcomes:
        table: list[dict[str, Any]] = [dict(row) for row in live.session_table(outcomes)]
        create_table_artifact(key=f"sessions-{key}", table=table, description="Serving sessions")
    options = settings.load_settings(workspace)
    found = [
        Realism.model_validate(
            files.read_json_object(options.provenance(slug, name), "the provenance")["provenance"][
                "realism"
            ]
        )
        for name in names
    ]
    if found:
        image = base64.b64encode(plot(found)).decode()
        text = "\n\n".join(item.markdown() for item in found)
        create_markdown_artifact(
            key=f"realism-{key}",
            markdown=f"![batch sizes and KV lengths](data:image/png;base64,{image})\n\n{text}",
            description="How real the collected workloads look",
        )
