"""From a run manifest to planned sessions, and from served sessions to one kernel's calls."""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Collection
from pathlib import Path

from tasks.collect.dumps import CallLog
from tasks.collect.place import Outcome, outcomes, unfinished
from tasks.collect.plan import Plan, plan_sessions
from tasks.collect.request import CollectRequest
from tasks.collect.session import Session
from tasks.collect.targets import ModelKernels
from tasks.collect.traffic import limits_of, read_sharegpt
from tasks.errors import CollectError, InputError
from tasks.manifest import RunManifest
from tasks.model import ModelConfig
from tasks.ops.base import KernelSpec

_SECONDS = 60
_NAMED = 3
"""Kernels that a message names."""
_WHERE = """\
import importlib.util
spec = importlib.util.find_spec("sglang")
print(next(iter(spec.submodule_search_locations)) if spec else "")
"""


def plan_collection(
    request: CollectRequest,
    run: RunManifest,
    model: ModelConfig,
    flags: Collection[str],
    gpu_memory_gb: float,
    *,
    known: ModelConfig | None = None,
    sglang: str = "",
) -> Plan:
    """Plan the sessions that a request needs.

    Args:
        request: what the user asked for.
        run: its manifest.
        model: the model's config.
        flags: the server flags of the SGLang that will run.
        gpu_memory_gb: memory of one GPU.
        known: the config that the manifest was made from, where that is at hand.
        sglang: what names the SGLang that will run.

    Raises:
        InputError: a definition is not the manifest's, the model is another than its, it is not
            known what to serve, the file of prompts cannot be read, or the model's context has no
            room for any request.
        CollectError: SGLang lacks a flag that a session needs.
    """
    if request.dataset_path is not None:
        read_sharegpt(request.dataset_path)  # before anything is started for it
    specs = [KernelSpec.model_validate(entry.spec) for entry in request.chosen(run)]
    if request.model_path is not None or request.config is not None:
        check_model(model, run, known)
    _check_lengths(request, model)
    plan = plan_sessions(specs, model, request.wish(run), flags, gpu_memory_gb)
    sessions = [session.model_copy(update={"sglang": sglang}) for session in plan.sessions]
    return plan.model_copy(update={"sessions": sessions})


def check_model(model: ModelConfig, run: RunManifest, known: ModelConfig | None) -> None:
    """Check that a model that is to be served instead of the manifest's own is the same.

    Other weights of it are: quantized ones, or dummies. Where the manifest's own config is not at
    hand, one of the kernels has to be the model's.

    Raises:
        InputError: it is another; the message has both values.
    """
    meant = run.hf_repo_id or run.model_slug
    sides = [("architecture", model.architecture, run.architecture)]
    if known is not None:
        sides += [
            (fact, getattr(model, fact), getattr(known, fact))
            for fact in ("architecture", "hidden_size", "num_layers", "vocab_size")
        ]
    for fact, served, own in sides:
        if own is not None and served != own:
            raise InputError(
                f"--model-path, --config: {model.source} has {fact} {served}, and {meant}, which "
                f"the manifest is of, {own}"
            )
    kernels = ModelKernels(model)
    specs = [KernelSpec.model_validate(entry.spec) for entry in run.kernels if entry.spec]
    if specs and not any(kernels.like(spec) for spec in specs):
        names = ", ".join(spec.name for spec in specs[:_NAMED])
        raise InputError(
            f"--model-path, --config: {model.source} has none of the kernels that the manifest has "
            f"of {meant} ({names})"
        )


def _check_lengths(request: CollectRequest, model: ModelConfig) -> None:
    limits = limits_of(model)
    asked = request.traffic.lengths if request.dataset_kind == "random" else ()
    if asked and not any(limits.fit(length.isl, length.osl) for length in asked):
        shown = ", ".join(f"{length.isl} + {length.osl}" for length in asked)
        raise InputError(
            f"--isl, --osl: {shown} tokens do not fit the model's context "
            f"({limits.context_length}, some of it SGLang's own)"
        )


def installed_sglang(python: Path | None) -> Path | None:
    """Return the folder that holds the installed `sglang` package, without importing it.

    Args:
        python: the interpreter it is installed for; this one if not given.

    Raises:
        InputError: the interpreter does not run.
    """
    if python is None:
        spec = importlib.util.find_spec("sglang")
        places = list(spec.submodule_search_locations or ()) if spec else []
        return Path(places[0]).parent if places else None
    try:
        answer = subprocess.run(
            [str(python), "-c", _WHERE],
            capture_output=True,
            text=True,
            check=True,
            timeout=_SECONDS,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise InputError(f"collect.python: {python} does not run ({error})") from error
    place = answer.stdout.strip()
    return Path(place).parent if place else None


def served_calls(sessions: Path, name: str) -> tuple[CallLog, list[Session]]:
    """Return the calls of the complete sessions that served a definition, and those sessions.

    Raises:
        CollectError: no session that was to show it is complete, or none of its calls was seen;
            the text says why.
    """
    served = [
        (place, found) for place, found in outcomes(sessions) if name in found.session.expects
    ]
    left = [(session, why) for session, why in unfinished(sessions) if name in session.expects]
    if left and not served:
        reasons = "; ".join(
            f"session {session.id} "
            + (f"failed: {why}" if why else "is not complete; onboard collect goes on with it")
            for session, why in left
        )
        raise CollectError(f"{name}: {reasons}")
    if not served:
        raise CollectError(
            f"{name}: there are no calls to collect from; serve the model on a GPU (onboard "
            "collect, or collect.serve), give a folder of recorded calls with --dumps, or go on "
            "without workloads with --skip-workload"
        )
    showing = [(place, found) for place, found in served if name not in found.missing]
    if not showing:
        reasons = "; ".join(
            f"session {found.session.id}: {found.missing[name]}" for _, found in served
        )
        raise CollectError(f"{name}: {reasons}")
    log = CallLog()
    for place, _ in showing:
        part = place.calls()
        log.calls.extend(part.calls)
        log.unreadable.update(part.unreadable)
    return log, [found.session for _, found in showing]


def session_table(found: list[Outcome]) -> list[dict[str, str]]:
    """Return what sessions came to, a row each."""
    return [
        {
            "session": outcome.session.id,
            "definitions": str(len(outcome.session.definitions)),
            "launches": str(outcome.launches),
            "requests": f"{outcome.served.requests} ({outcome.served.failed} failed)",
            "tokens/s": f"{outcome.tokens_per_second:.0f}",
            "waves not sent": str(sum(outcome.not_sent.values())),
            "calls": str(sum(outcome.fired.values())),
            "not dumped": str(sum(outcome.notices.values())),
            "thinned": str(outcome.thinned),
            "pauses": str(outcome.pauses),
            "most on disk": f"{outcome.peak_mb:.0f} MB",
            "seconds": f"{outcome.served.seconds:.0f}",
        }
        for outcome in found
    ]
