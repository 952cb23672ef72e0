"""What a flow came to, whether it failed or not."""

from __future__ import annotations

from typing import Any, TypeVar

from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed
from pydantic import BaseModel

from tasks.errors import OnboardError

M = TypeVar("M", bound=BaseModel)


class PartlyFailedError(OnboardError):
    """Something failed, and the rest came to something all the same.

    Prefect raises a failed run's data where the run ends: it has to be an exception.
    """

    def __init__(self, message: str, came_to: BaseModel) -> None:
        super().__init__(message)
        self.came_to = came_to


def ended(message: str, came_to: M, *, failed: bool) -> State[M]:
    """Return a flow's final state."""
    if failed:
        return Failed(message=message, data=PartlyFailedError(message, came_to))
    return Completed(message=message, data=came_to)


def came_to(state: State[Any], kind: type[M]) -> M:
    """Return what a flow came to.

    Args:
        state: its final state.
        kind: of what it comes to.

    Raises:
        OnboardError: it came to nothing; its own error, if that is one of ours.
    """
    result = state.result(raise_on_failure=False)
    if isinstance(result, PartlyFailedError):
        result = result.came_to
    if isinstance(result, OnboardError):
        raise result
    if not isinstance(result, kind):
        raise OnboardError(f"the run ended {state.name}: {state.message}")
    return result


def reason_of(error: Exception) -> str:
    """Return why something failed, in its own words."""
    known = isinstance(error, OnboardError)
    return str(error) if known else f"unexpected {type(error).__name__}: {error}"
