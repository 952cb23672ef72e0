"""`step`: a Prefect task as this project makes them, in one place.

Every step is tagged with its phase, keeps its result as JSON, and is not repeated within a flow
run: the cache key is the step's name, its inputs and the run's id. Prefect's default key has the
task's source instead of its name, so a run that waited over a redeployment would repeat what it had
done; without either, two steps with equal inputs would take each other's results. A new run asks
the manifest instead.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from prefect import Task, get_run_logger, task
from prefect.cache_policies import INPUTS, NO_CACHE, RUN_ID, CachePolicy
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import TaskRunContext

P = ParamSpec("P")
R = TypeVar("R")


def _name(context: TaskRunContext, _: dict[str, Any]) -> str:
    return context.task.name


_ONCE_PER_RUN = CachePolicy.from_cache_key_fn(_name) + INPUTS + RUN_ID

_spans: defaultdict[int, list[tuple[float, float]]] = defaultdict(list)


def step(
    phase: int,
    name: str,
    description: str,
    *,
    run_name: str | None = None,
    once: bool = True,
    retries: int = 0,
    worth_retrying: Callable[[BaseException], bool] | None = None,
) -> Callable[[Callable[P, R]], Task[P, R]]:
    """Make a function a Prefect task of a phase.

    Args:
        phase: 0 to 4.
        name: as the UI shows it.
        description: one line for the operator.
        run_name: template of the task run's name.
        once: whether a retried flow run takes the kept result instead of repeating it.
        retries: how often it is tried again after a failure.
        worth_retrying: which failures are; all if not given.
    """

    def condition(_: Task[..., Any], __: TaskRun, state: State[Any]) -> bool:
        error = state.result(raise_on_failure=False)
        return worth_retrying is None or (
            isinstance(error, BaseException) and worth_retrying(error)
        )

    def decorate(function: Callable[P, R]) -> Task[P, R]:
        @wraps(function)
        def timed(*args: P.args, **kwargs: P.kwargs) -> R:
            start = time.monotonic()
            try:
                return function(*args, **kwargs)
            finally:
                _spans[phase].append((start, time.monotonic()))

        return task(
            name=name,
            description=description,
            task_run_name=run_name,
            tags=[f"phase:{phase}"],
            cache_policy=_ONCE_PER_RUN if once else NO_CACHE,
            persist_result=once,
            result_serializer="json",
            retries=retries,
            retry_condition_fn=condition if retries else None,
        )(timed)

    return decorate


def artifact_key(*parts: str) -> str:
    """Return an artifact's key made of names: Prefect takes lower-case letters, digits, dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")


@contextmanager
def only_shown() -> Iterator[None]:
    """Let the block fail, which only shows something: its trouble is logged and ends no work."""
    try:
        yield
    except Exception as error:  # the server is away, has lost its database, ...
        get_run_logger().warning("not shown: %s: %s", type(error).__name__, error)


def phase_seconds() -> dict[int, float]:
    """Return the wall-clock seconds this process spent in each phase's steps, overlaps once."""
    seconds = {}
    for phase, spans in sorted(_spans.items()):
        total = end = 0.0
        for start, stop in sorted(spans):
            total += max(0.0, stop - max(start, end))
            end = max(end, stop)
        seconds[phase] = total
    return seconds
