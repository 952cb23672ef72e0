"""Make all that a Prefect server needs for the product; run again, it changes what differs.

    python deployments/bootstrap.py        (`make deploy`)

Work pools from `deployments/pools/`, their limits, queues, the deployments of `prefect.yaml`, the
Hub's token as a Secret block, and automations. The server is that of `PREFECT_API_URL`, or of the
Prefect profile.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from prefect import get_client
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.blocks.system import Secret
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState, SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectNotFound

from tasks.manifest import KernelState, title_of
from tasks.settings import HF_TOKEN_BLOCK

ROOT = Path(__file__).resolve().parents[1]
NOTIFY = "gpu-failures"
_OURS = [{"prefect.resource.id": "prefect.tag.onboard", "prefect.resource.role": "tag"}]
_GPU = [{"prefect.resource.id": "prefect.tag.gpu", "prefect.resource.role": "tag"}]
_FLOW_RUN = {"prefect.resource.id": "prefect.flow-run.*"}
_SETTLED = timedelta(seconds=20)
"""A process worker reports a killed run twice, some seconds apart: the second report would crash a
run that was started again at once."""


def main(
    *,
    home: Annotated[
        Path, typer.Option(envvar="ONBOARD_HOME", help="Folder that control and GPU workers share.")
    ] = Path("/srv/onboard"),
    worker_image: Annotated[
        str, typer.Option(envvar="WORKER_IMAGE", help="Image of the gpu pool's containers.")
    ] = "onboard-worker:latest",
    gpus: Annotated[
        bool, typer.Option(help="Whether containers see GPUs; --no-gpus is for trying things out.")
    ] = True,
    gpu_runs: Annotated[
        int, typer.Option(min=1, help="Runs at a time on all GPU hosts together.")
    ] = 100,
    control_runs: Annotated[
        int, typer.Option(min=2, help="Runs at a time that need no GPU; models and kernels.")
    ] = 32,
    lost_after: Annotated[
        float,
        typer.Option(
            min=1.5,
            metavar="MINUTES",
            help="A run without heartbeats (one a minute) for so long has lost its host. More than "
            "the server may be away.",
        ),
    ] = 15.0,
    gpu_variable: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Other default of a variable of the gpu pool; VALUE may be JSON.",
        ),
    ] = None,
    control_variable: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="The same of the control pool.")
    ] = None,
    only_pools: Annotated[
        bool, typer.Option("--only-pools", help="Make no deployments, blocks or automations.")
    ] = False,
) -> None:
    """Make pools, limits, deployments, blocks and automations on the Prefect server."""
    with get_client(sync_client=True) as client:
        gpu = {"image": worker_image, **({} if gpus else {"device_requests": []})}
        gpu |= variables(gpu_variable or ())
        control = variables(control_variable or ())
        make_pool(client, "gpu", "docker", template(home, "gpu", gpu), gpu_runs)
        make_pool(client, "control", "process", template(home, "control", control), control_runs)
        # A model waits for its kernels: they have a queue of their own, and models a part of the
        # pool only, or models alone could fill it. The night waits for neither.
        make_queue(client, "control", "default", max(1, control_runs // 4))
        make_queue(client, "control", "kernels", None)
        make_queue(client, "control", "schedules", 2)
    if only_pools:
        return
    deploy()
    keep_token(os.environ.get("HF_TOKEN"))
    lost = timedelta(minutes=lost_after)
    for automation in automations(lost, os.environ.get("ONBOARD_NOTIFY_URL")):
        keep(automation)


def variables(texts: Sequence[str]) -> dict[str, Any]:
    """Read NAME=VALUE texts; a value is JSON, or else the text that it is."""
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise typer.BadParameter(f"{text!r} is not NAME=VALUE")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def template(home: Path, pool: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return a pool's base job template with other defaults of its variables.

    Args:
        home: what stands for `/srv/onboard` on the workers' hosts.
        pool: name of the pool, and of its file.
        defaults: variable -> its default.
    """
    text = (ROOT / "deployments" / "pools" / f"{pool}.json").read_text()
    found: dict[str, Any] = json.loads(text.replace("/srv/onboard/", f"{home}/"))
    known = found["variables"]["properties"]
    for name, value in defaults.items():
        if name not in known:
            raise typer.BadParameter(f"{name}: pool {pool} has {', '.join(known)}")
        both = isinstance(value, dict) and isinstance(known[name]["default"], dict)
        known[name]["default"] = {**known[name]["default"], **value} if both else value
    return found


def make_pool(
    client: SyncPrefectClient, name: str, kind: str, base: dict[str, Any], limit: int
) -> None:
    """Make a work pool, or have it be as it should."""
    try:
        client.read_work_pool(name)
    except ObjectNotFound:
        client.create_work_pool(
            WorkPoolCreate(name=name, type=kind, base_job_template=base, concurrency_limit=limit)
        )
        say(f"work pool {name}: made, {limit} runs at a time")
        return
    client.update_work_pool(name, WorkPoolUpdate(base_job_template=base, concurrency_limit=limit))
    say(f"work pool {name}: up to date, {limit} runs at a time")


def make_queue(client: SyncPrefectClient, pool: str, name: str, limit: int | None) -> None:
    """Make a queue of a pool with a limit of its own, or have it be as it should."""
    queues = {queue.name: queue for queue in client.read_work_queues(work_pool_name=pool)}
    queue = queues.get(name) or client.create_work_queue(name=name, work_pool_name=pool)
    client.update_work_queue(queue.id, concurrency_limit=limit)
    say(f"queue {pool}/{name}: {limit or 'as many runs as the pool has'}")


def deploy() -> None:
    """Deploy what `prefect.yaml` has."""
    command = ("--no-prompt", "deploy", "--all", "--prefect-file", str(ROOT / "prefect.yaml"))
    done = subprocess.run(
        [sys.executable, "-m", "prefect", *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"prefect deploy failed:\n{done.stdout}{done.stderr}")
    say("deployments: as prefect.yaml has them")


def keep_token(token: str | None) -> None:
    """Keep the Hub's token for those who serve models; its value is shown nowhere."""
    if token is None:
        say(f"secret {HF_TOKEN_BLOCK}: left as it is (HF_TOKEN is not set)")
        return
    Secret(value=token).save(HF_TOKEN_BLOCK, overwrite=True)
    say(f"secret {HF_TOKEN_BLOCK}: kept")


def automations(lost: timedelta, notify: str | None) -> Iterator[AutomationCore]:
    """Yield the automations.

    Args:
        lost: how long heartbeats stay away from a run whose host is gone.
        notify: URL that is sent a message when a GPU run failed; without it nobody is told.
    """
    yield AutomationCore(
        name="start crashed runs again",
        description="The run itself says how often is enough (collect.crashes).",
        trigger=EventTrigger(
            after={"prefect.flow-run.Crashed"},
            expect={f"prefect.flow-run.{name}" for name in _GOES_ON},
            match=_FLOW_RUN,
            match_related=_OURS,
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=_SETTLED,
        ),
        actions=[ChangeFlowRunState(state=StateType.SCHEDULED, name="AwaitingRetry")],
    )
    yield AutomationCore(
        name="crash runs whose host is gone",
        description="Their heartbeats have stayed away.",
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat", "prefect.flow-run.Running"},
            expect={
                "prefect.flow-run.heartbeat",
                *(f"prefect.flow-run.{name}" for name in _ENDS),
            },
            match=_FLOW_RUN,
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=lost,
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED, message="no heartbeat: its host or container is gone"
            )
        ],
    )
    if notify is None:
        say("automation: nobody is told of failed GPU runs (ONBOARD_NOTIFY_URL is not set)")
        return
    block = CustomWebhookNotificationBlock(
        name=NOTIFY, url=notify, json_data={"text": "{{subject}}\n{{body}}"}
    )
    yield AutomationCore(
        name="tell of failed GPU runs",
        trigger=EventTrigger(
            expect={"prefect.flow-run.Failed"},
            match=_FLOW_RUN,
            match_related=_GPU,
            posture=Posture.Reactive,
            threshold=1,
        ),
        actions=[
            SendNotification(
                block_document_id=block.save(NOTIFY, overwrite=True),
                subject="GPU run {{ flow_run.name }} failed",
                body="{{ flow_run.state.message }}\n{{ (flow_run|ui_url) or flow_run.id }}",
            )
        ],
    )


_GOES_ON = ("AwaitingRetry", "Scheduled", "Pending", "Running")
# Events bear the names of states; that in which a kernel's run ends has a name of its own.
_ENDS = (
    *("Completed", "Failed", "Crashed", "Cancelled", "Suspended", "Paused", "AwaitingRetry"),
    *(title_of(state) for state in get_args(KernelState)),
)


def keep(automation: AutomationCore) -> None:
    """Make an automation, or have the one of its name be as it should."""
    with get_client(sync_client=True) as client:
        known = client.read_automations_by_name(automation.name)
        for one in known[1:]:
            client.delete_automation(one.id)
        if known:
            client.update_automation(known[0].id, automation)
        else:
            client.create_automation(automation)
    say(f"automation: {automation.name}")


def say(line: str) -> None:
    """Tell the operator."""
    typer.echo(f"deploy: {line}")


if __name__ == "__main__":
    typer.run(main)
