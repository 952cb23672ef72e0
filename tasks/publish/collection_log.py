"""The log of a collection: what the sessions that showed a definition's calls left on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tasks.collect.logs import LogFollower
from tasks.collect.place import Outcome, Place, outcomes

_SHOWN_VARIABLES = ("FLASHINFER_", "SGLANG_")
"""Others may be anybody's secrets; their names are shown alone."""


def collection_log(sessions: Path, name: str) -> str:
    """Return the whole log of a definition's sessions: what each was, and SGLang's of every launch.

    Nothing of it is scrubbed yet.

    Args:
        sessions: the folder of the model's sessions.
        name: the definition.

    Raises:
        CollectError: a log cannot be read.
    """
    shown = (
        "\n".join(_session(place, outcome))
        for place, outcome in outcomes(sessions)
        if name in outcome.session.expects and name not in outcome.missing
    )
    return "\n\n".join(shown)


def _session(place: Place, outcome: Outcome) -> Iterator[str]:
    session, served, traffic = outcome.session, outcome.served, outcome.session.traffic
    lengths = ", ".join(f"{pair.isl} + {pair.osl}" for pair in traffic.lengths)
    yield f"===== session {session.id} ====="
    yield (
        f"model {session.model}, tp={session.tp}, ep={session.ep}, page size {session.page_size}, "
        f"{session.mode.replace('_', ' ')}, GPU {', '.join(outcome.gpus)}"
    )
    yield f"flags: {' '.join(session.flags)}"
    for variable, value in session.env.items():
        shown = variable.startswith(_SHOWN_VARIABLES)
        yield f"environment: {variable}{f'={value}' if shown else ''}"
    yield (
        f"traffic: {traffic.kind}, {lengths} tokens, batch sizes "
        f"{', '.join(map(str, traffic.batch_sizes))}, {traffic.rounds} rounds"
    )
    yield (
        f"served: {served.requests} requests, {served.failed} failed, {served.output_tokens} "
        f"tokens in {served.seconds:.0f} s"
    )
    for recorded, calls in sorted(outcome.fired.items()):
        yield f"recorded: {calls} calls of {recorded}"
    for package, versions in outcome.versions.items():
        yield f"version: {package} {', '.join(versions)}"
    yield from (f"note: {note}" for note in outcome.notes)
    for number, attempt in enumerate(place.attempts(), start=1):
        ended = f"failed: {attempt.failure.reason}" if attempt.failure else "served"
        yield f"\n----- launch {number}: {ended} -----"
        yield from LogFollower(place.logs(number) / "server.log").lines()
