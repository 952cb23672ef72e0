"""Asking somebody for the reference that a kernel lacks: a paused run with a form in the UI.

Only a deployment's run can be suspended: its process ends, and another one starts it from the top
when it is resumed. What was given is then handed out again for every pause that is over.
"""

from __future__ import annotations

from http import HTTPStatus
from itertools import count
from pathlib import Path
from uuid import UUID

from prefect import get_client, get_run_logger, suspend_flow_run
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.exceptions import PrefectHTTPStatusError
from prefect.input import Keyset, RunInput, keyset_from_base_key
from prefect.runtime import deployment, flow_run
from pydantic import Field

from tasks import manifest
from tasks.define.phase import supply_reference
from tasks.errors import DefinitionError
from tasks.manifest import NEEDS_REFERENCE
from tasks.step import step

_WAIT_SECONDS = 30 * 24 * 3600
"""After that the run fails; the next one of the model asks again."""


class ReferenceInput(RunInput):
    """What the form asks for."""

    reference: str = Field(
        description=(
            "Source of a Python file with a top-level `run`, the PyTorch reference, whose "
            "parameters are the definition's inputs. For an op type without a module also a "
            "literal `DEFINITION` (description, axes, inputs, outputs), and `CASES` and `check`, "
            "an independent computation to prove it with."
        )
    )

    @classmethod
    def save(cls, keyset: Keyset, flow_run_id: UUID | None = None) -> None:
        """Save the form, unless it is saved already."""
        try:
            super().save(keyset, flow_run_id)
        except PrefectHTTPStatusError as error:
            if error.response.status_code != HTTPStatus.CONFLICT:
                raise


@step(2, "supply-reference", "Prove the reference that somebody gave, and stage the definition.")
def supply(path: Path, name: str, source: str) -> str:
    """Take a reference; return why it was refused, nothing if it was not."""
    try:
        supply_reference(path, name, source)
    except DefinitionError as error:
        return str(error)
    entry = manifest.load(path).kernel(name)
    if entry.phase2_status == NEEDS_REFERENCE:
        return "; ".join(entry.phase2_notes or ("it lacks a reference still",))
    return ""


def ask_for_reference(path: Path, name: str) -> bool:
    """Have the reference given in the UI, again until one is accepted; return whether it was.

    Embedded nobody can be asked, and nobody is asked twice at a time.
    """
    if not deployment.id:
        return False
    if flow_run.run_count == 1 and _is_asked(path, name):
        get_run_logger().info("%s: another run waits for its reference", name)
        return False
    notes = manifest.load(path).kernel(name).phase2_notes or []
    text = f"**{name}** has no reference. {' '.join(notes)}"
    for attempt in count(1):
        form, key = ReferenceInput.with_initial_data(description=text), f"reference-{attempt}"
        # Prefect saves it once the run is suspended, when the process may already have been ended.
        form.save(keyset_from_base_key(f"suspended-{key}"))
        given = suspend_flow_run(wait_for_input=form, timeout=_WAIT_SECONDS, key=key)
        refused = supply(path, name, given.reference)
        if not refused:
            break
        get_run_logger().warning("%s: the reference was refused: %s", name, refused)
        text = f"**{name}**: the reference was refused: {refused}"
    return True


def _is_asked(path: Path, name: str) -> bool:
    paused = FlowRunFilter(
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.PAUSED])),
        deployment_id=FlowRunFilterDeploymentId(any_=[deployment.id]),
    )
    with get_client(sync_client=True) as client:
        found = client.read_flow_runs(flow_run_filter=paused)
    asked = {(str(run.parameters.get("path")), run.parameters.get("name")) for run in found}
    return (str(path), name) in asked
