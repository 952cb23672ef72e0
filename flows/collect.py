"""Phase 3 by itself: `collect-workloads`, and the command `onboard collect`.

The sessions of a model side by side, as many as there are GPUs for; then every definition's rows
and baseline. A session that is complete is not served again, and one that failed costs only the
definitions that it was to serve.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from prefect import flow, get_run_logger
from prefect.artifacts import create_table_artifact
from prefect.client.schemas.objects import State
from prefect.futures import wait
from pydantic import BaseModel

from flows.dispatch import check_crashes
from flows.outcome import ended, reason_of
from tasks import manifest, settings
from tasks.collect import live
from tasks.collect.place import Outcome
from tasks.collect.plan import Plan
from tasks.collect.request import CollectRequest
from tasks.collect.task import (
    collect,
    collect_session,
    evaluate_baseline,
    stopped_with_us,
)
from tasks.discover.hub import fetch_config
from tasks.discover.sources import SglangIndex, cached, index_sglang, revision
from tasks.errors import InputError
from tasks.manifest import RunManifest
from tasks.model import ModelConfig, read_config
from tasks.settings import REPOSITORY
from tasks.step import artifact_key, only_shown


class Collection(BaseModel):
    """What collection came to, by definition."""

    sessions: list[str] = []
    """The sessions that are complete."""
    rows: dict[str, int] = {}
    failed: dict[str, str] = {}
    """Why a session is not complete, there are no rows, or their baseline did not pass."""
    not_collected: dict[str, str]
    """Why no session of this model shows it."""

    @property
    def counts(self) -> str:
        """How many of each."""
        had = f"{len(self.rows)} definitions have workloads" if self.rows else ""
        served = f"{len(self.sessions)} sessions are complete"
        return (
            f"{had or served}, {len(self.failed)} failed, "
            f"{len(self.not_collected)} cannot be collected from this model"
        )


class ServedSessions(NamedTuple):
    """What the sessions of a model came to."""

    outcomes: list[Outcome]
    failed: dict[str, str]
    """Session -> why it is not complete."""
    not_collected: dict[str, str]


@flow(
    name="collect-workloads",
    flow_run_name="collect {request.model_slug}",
    description=(
        "Serve a model on GPUs and turn the FlashInfer calls that it makes into workloads: its "
        "sessions first, then the rows and the baseline of every definition. Running it again "
        "goes on with what is not done."
    ),
)
def collect_workloads(request: CollectRequest) -> State[Collection]:
    """Collect for the requested definitions; the final state's data is the `Collection`.

    Args:
        request: what to collect, and how to serve the model.
    """
    check_crashes(request.manifest.parent)
    served = serve_sessions(request)
    run = manifest.load(request.manifest)
    found = Collection(
        sessions=[outcome.session.id for outcome in served.outcomes],
        failed=served.failed if request.sessions_only else {},
        not_collected=served.not_collected,
    )
    for entry in () if request.sessions_only else request.chosen(run):
        name = entry.definition_name
        if name in served.not_collected:
            continue
        try:
            found.rows[name] = collect_and_evaluate(request, name)
        except Exception as error:  # a definition's failure stops no other
            found.failed[name] = reason_of(error)
            manifest.record_error(request.manifest, name, found.failed[name])
    why = next((f"; {name}: {reason}" for name, reason in found.failed.items()), "")
    return ended(found.counts + why, found, failed=bool(found.failed))


def serve_sessions(request: CollectRequest) -> ServedSessions:
    """Plan the sessions and serve them, side by side as far as there are GPUs.

    One that fails says so in its own folder; the definitions that it was to show say it again.
    """
    plan, config = plan_sessions(request)
    log = get_run_logger()
    for name, reason in plan.not_collected.items():
        log.info("%s: nothing to collect: %s", name, reason)
    with stopped_with_us():
        futures = []
        for session in plan.sessions:
            futures.append(
                collect_session.submit(
                    request.manifest, session, config, keep_dumps=request.keep_dumps
                )
            )
            if session.nodes > 1:
                futures[-1].wait()  # the hosts have to be at the same one, and share an address
        wait(futures)
    outcomes, failed = [], {}
    for session, future in zip(plan.sessions, futures, strict=True):
        if future.state.is_completed():
            outcomes.append(Outcome.model_validate(future.result()))
        else:
            failed[session.id] = str(future.state.message)
    if outcomes:
        show_sessions(manifest.load(request.manifest).model_slug, outcomes)
    return ServedSessions(outcomes, failed, plan.not_collected)


def collect_and_evaluate(request: CollectRequest, name: str) -> int:
    """Do what follows the sessions for one definition; return how many rows it has."""
    rows = collect(request.manifest, name, None, request.max_workloads)
    evaluate_baseline(request.manifest, name, skip=request.skip_evaluation)
    return rows


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
        if request.model_path is not None and not REPOSITORY.fullmatch(served):
            raise InputError(
                f"--model-path: {served} is neither a folder with config.json nor a repository"
            )
        config = fetch_config(served, options, cache / "hub")
    tree = live.installed_sglang(options.collect.python) or options.clone("sglang")
    if not tree.is_dir():
        raise InputError(
            f"{tree}: SGLang is not installed (collect.python) and phase 0 has not cloned it"
        )
    name = revision(tree, "sglang", "sglang_kernel")
    flags = cached(cache / "sources", SglangIndex, name, lambda: index_sglang(tree)).flags
    if not flags:
        raise InputError(f"{tree}: no server flag of SGLang can be read there")
    model, known = read_config(config), _known_config(run, cache / "hub")
    plan = live.plan_collection(
        request, run, model, flags, options.gpu_memory_gb, known=known, sglang=name
    )
    return plan, config


def _known_config(run: RunManifest, cache: Path) -> ModelConfig | None:
    """Return the config of the manifest's model, if it was fetched once."""
    from huggingface_hub import try_to_load_from_cache

    if run.hf_repo_id is None:
        return None
    found = try_to_load_from_cache(run.hf_repo_id, "config.json", cache_dir=cache)
    if not isinstance(found, str):  # not asked for yet, or known not to be there
        return None
    return read_config(Path(found), f"{run.hf_repo_id}/config.json")


def show_sessions(slug: str, outcomes: list[Outcome]) -> None:
    """Show what sessions came to, as an artifact."""
    key = artifact_key("sessions", slug)
    table: list[dict[str, Any]] = [dict(row) for row in live.session_table(outcomes)]
    with only_shown():
        create_table_artifact(key=key, table=table, description="Serving sessions")
