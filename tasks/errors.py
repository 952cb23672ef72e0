"""Errors a user can act on.

Every message names the file, field or value at fault and what to do about it; it is safe to print
(no token, no traceback). `exit_code` is what the command line returns for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


def first_problem(error: ValidationError, *below: str | int) -> tuple[str, str]:
    """Return the field that a model refuses first, dotted, and why.

    Args:
        error: what pydantic raised.
        below: where the model stands in the file.
    """
    first = error.errors()[0]
    field = ".".join(str(part) for part in (*below, *first["loc"]))
    return field, first["msg"].removeprefix("Value error, ")


class OnboardError(Exception):
    """Base of all errors whose message is meant for the user."""

    exit_code = 1


class InputError(OnboardError):
    """Something the user gave is wrong: an argument, a file, a remote, a workspace."""

    exit_code = 2


class ConfigError(InputError):
    """A model's `config.json` is missing, damaged, or says something impossible."""


class ManifestError(InputError):
    """A run manifest is damaged, foreign, or belongs to another model."""


class RemoteError(InputError):
    """A git remote cannot be reached and there is no clone to fall back on."""


class DefinitionError(OnboardError):
    """A kernel definition could not be built, or does not hold."""


class CollectError(OnboardError):
    """Workloads could not be collected for a kernel."""


class PublishError(OnboardError):
    """A pull request or issue could not be prepared."""
