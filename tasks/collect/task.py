"""Phase 3's Prefect tasks."""

from __future__ import annotations

import base64
import contextvars
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast
from uuid import UUID

from prefect import get_run_logger
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    update_progress_artifact,
)
from prefect.blocks.system import Secret
from pydantic import SecretStr

from tasks import manifest, settings
from tasks.collect.engine import read_served
from tasks.collect.evaluate import effort_of, evaluate, leased_gpu
from tasks.collect.live import served_calls
from tasks.collect.phase import collect_calls, plot_beside
from tasks.collect.place import Outcome, Place
from tasks.collect.realism import Realism
from tasks.collect.sanitize import open_calls
from tasks.collect.serve import Host, SessionError, serve_session
from tasks.collect.session import Session
from tasks.manifest import DONE
from tasks.model import read_config
from tasks.step import artifact_key, only_shown, step

_RETRIES = 12
"""More than the adjustments that a session goes through before it gives up."""
_PROGRESS_SECONDS = 5
_stopping = threading.Event()


@contextmanager
def stopped_with_us() -> Iterator[None]:
    """Have the sessions that this process serves end where the block is interrupted.

    They run in threads of their own, which an interrupt of the main one does not reach.
    """
    _stopping.clear()
    try:
        yield
    except BaseException:
        _stopping.set()
        raise


def _may_go_better(error: BaseException) -> bool:
    return isinstance(error, SessionError) and error.again


@step(
    3,
    "collect session",
    "Serve the model on leased GPUs and keep what FlashInfer dumps; out of memory, ask for less.",
    run_name="collect {session.id}",
    retries=_RETRIES,
    worth_retrying=_may_go_better,
)
def collect_session(
    path: Path, session: Session, config: Path, *, keep_dumps: bool = False
) -> Outcome:
    """Serve one session, or find that it is complete; return what it came to.

    Args:
        path: the run manifest.
        session: what to start and send.
        config: the model's config.json.
        keep_dumps: whether to keep what FlashInfer dumped.

    Raises:
        SessionError: the launch failed; Prefect tries again where that may go better.
    """
    log = get_run_logger()
    options, slug = settings.load_settings(path.parent), manifest.load(path).model_slug
    sessions = options.sessions(slug)
    host = Host(options.collect, options.hf_token or _kept_token(), keep_dumps, _stopping)
    with _progress_shown(slug, session, Place.of(sessions, session)):
        return serve_session(session, read_config(config), sessions, host, log.info)


def _kept_token() -> SecretStr | None:
    """Return the Hub's token that the Prefect server keeps, if it keeps one."""
    try:
        kept = cast("Secret[str]", Secret.load(settings.HF_TOKEN_BLOCK))
    except ValueError:  # there is no such block
        return None
    return SecretStr(kept.get())


class _Progress:
    """A progress artifact, in whole percent; made when it can be shown for the first time."""

    def __init__(self, key: str, description: str) -> None:
        self._key, self._description = key, description
        self._id: UUID | None = None
        self._shown: int | None = None

    def show(self, share: float) -> None:
        """Show it if it has changed."""
        percent = min(100, int(100 * share))
        if percent == self._shown:
            return
        if self._id is None:
            made = create_progress_artifact(percent, self._key, self._description)
            self._id = cast("UUID", made)  # a coroutine only where there is an event loop
        else:
            update_progress_artifact(self._id, percent)
        self._shown = percent


@contextmanager
def _progress_shown(slug: str, session: Session, place: Place) -> Iterator[None]:
    """Show in an artifact, while the block runs, how much of a session's traffic was answered."""
    progress = _Progress(
        artifact_key("progress", slug, place.root.name),
        f"Requests answered of {session.traffic.requests} in session {session.id}",
    )
    over = threading.Event()

    def follow() -> None:
        while True:
            with only_shown():
                progress.show(read_served(place.served).requests / session.traffic.requests)
            if over.wait(_PROGRESS_SECONDS):
                return

    # The artifact is this task run's, which a thread does not know by itself.
    run = contextvars.copy_context().run
    follower = threading.Thread(target=run, args=(follow,), daemon=True)
    follower.start()
    try:
        yield
    finally:
        over.set()
    follower.join()
    with only_shown():
        progress.show(1)


@step(3, "collect", "Turn recorded FlashInfer calls into workload rows.")
def collect(path: Path, name: str, dumps: Path | None, max_workloads: int | None = None) -> int:
    """Collect one definition's workloads into the dataset; return how many.

    Args:
        path: the run manifest.
        name: the definition.
        dumps: a folder of recorded dumps; without it, the sessions that were served.
        max_workloads: how many rows at most, instead of the settings' number.

    Raises:
        CollectError: there is nothing to collect from, or no call makes a row.
    """
    log = get_run_logger()
    run = manifest.load(path)
    entry = run.kernel(name)
    options = settings.load_settings(path.parent)
    if dumps is None:
        calls, sessions = served_calls(options.sessions(run.model_slug), name)
    else:
        calls, sessions = open_calls(dumps), []
    dataset = options.clone("flashinfer_trace")
    provenance = options.provenance(run.model_slug, name)
    limit = max_workloads or options.collect.max_workloads
    collected = collect_calls(entry, calls, dataset, provenance, limit, sessions=sessions)
    log.info(
        "%s: %d workloads of %d distinct in %d calls, %d calls not used",
        *(name, collected.rows, collected.distinct, collected.calls),
        sum(collected.rejected.values()),
    )
    for warning in collected.realism.warnings:
        log.warning("%s: %s", name, warning)
    _show(name, plot_beside(provenance), collected.realism)
    manifest.update_kernel(path, name, workload_entries=collected.rows)
    return collected.rows


@step(3, "evaluate baseline", "Run the baseline on the collected workloads, on a leased GPU.")
def evaluate_baseline(path: Path, name: str, *, skip: bool = False) -> str:
    """Evaluate one definition's baseline and record phase 3 as done; return what came of it.

    Args:
        path: the run manifest.
        name: the definition.
        skip: record that it was not evaluated.

    Raises:
        CollectError: a workload did not pass, or there are none.
    """
    log = get_run_logger()
    run = manifest.load(path)
    options = settings.load_settings(path.parent)
    if skip:
        outcome = "not evaluated (as asked)"
    else:
        with leased_gpu(options.collect, log.info, name) as gpu:
            outcome = evaluate(
                options.clone("flashinfer_trace"),
                run.kernel(name).op_type,
                name,
                effort=effort_of(options.collect),
                kept=options.provenance(run.model_slug, name).parent / "failed",
                gpu=gpu,
            )
    log.info("%s: baseline %s", name, outcome)
    manifest.update_kernel(path, name, phase3_status=DONE, baseline_status=outcome)
    return outcome


def _show(name: str, picture: Path, found: Realism) -> None:
    """Show how real a definition's rows look, as an artifact.

    The picture is in the text: the UI shows PNGs so, and serves no files.
    """
    image = base64.b64encode(picture.read_bytes()).decode()
    with only_shown():
        create_markdown_artifact(
            key=artifact_key("realism", name),
            markdown=f"![Batch sizes and KV lengths](data:image/png;base64,{image})\n\n"
            f"{found.markdown()}",
            description="How real the collected workloads look",
        )
