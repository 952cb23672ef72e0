"""What the Hugging Face Hub knows: a model's `config.json`, and which models there are."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.errors import ConfigError, InputError, OnboardError
from tasks.settings import REPOSITORY, Settings

_PROBE_SECONDS = 3
_QUANTISATION = "hf_quant_config.json"
_LISTED = 30


class HubError(OnboardError):
    """The Hub cannot be asked now; nothing needs it to go on."""


def _token(settings: Settings) -> str | None:
    return settings.hf_token.get_secret_value() if settings.hf_token else None


@dataclass(frozen=True)
class HubModel:
    """A model repository as the Hub lists it."""

    repo_id: str
    architectures: tuple[str, ...]
    created: str | None
    """The day, where the Hub says."""


class Hub:
    """Listings of the Hub, all of them within one limit of time."""

    def __init__(self, settings: Settings, seconds: float = 20) -> None:
        self._settings = settings
        self._deadline = time.monotonic() + seconds
        self._reached = False

    def trending(self) -> list[HubModel]:
        """Return the text-generation models that are trending, most trending first.

        Raises:
            HubError: it cannot be reached, or does not answer in time or in its own form.
        """
        return self._models(pipeline_tag="text-generation", sort="trending_score")

    def find(self, architecture: str, *queries: str) -> str | None:
        """Return the most downloaded model whose config names an architecture.

        Args:
            architecture: the class, as in `config.json`.
            queries: what to search for besides it, until there is a model.

        Raises:
            HubError: as `trending`.
        """
        for query in (architecture, *queries):
            for model in self._models(search=query, sort="downloads"):
                if architecture in model.architectures:
                    return model.repo_id
        return None

    def _models(self, **query: Any) -> list[HubModel]:
        from huggingface_hub import HfApi, get_session

        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        api = HfApi(endpoint=self._settings.hf_endpoint, token=_token(self._settings))

        def ask() -> list[HubModel]:
            if not self._reached:
                # The client retries for minutes, and waits without end, where nobody answers.
                get_session().head(api.endpoint, timeout=_PROBE_SECONDS)
                self._reached = True
            listed = api.list_models(**query, limit=_LISTED, fetch_config=True)
            return [_model(found) for found in listed if REPOSITORY.fullmatch(str(found.id))]

        try:
            return _within(self._deadline - time.monotonic(), ask)
        # Whatever its client trips over: the Hub is one source among others.
        except Exception as error:
            self._deadline = 0
            raise HubError(
                f"the Hugging Face Hub was not asked ({type(error).__name__})"
            ) from error


def _model(found: Any) -> HubModel:
    config = found.config if isinstance(found.config, dict) else {}
    names = config.get("architectures")
    return HubModel(
        repo_id=found.id,
        architectures=tuple(name for name in names if isinstance(name, str))
        if isinstance(names, list)
        else (),
        created=f"{found.created_at:%Y-%m-%d}" if found.created_at else None,
    )


def _within(seconds: float, ask: Callable[[], list[HubModel]]) -> list[HubModel]:
    """Return what `ask` returns, waiting for it no longer than given.

    Raises:
        TimeoutError: it took longer; its thread is left behind and stops no exit.
    """
    answers: list[list[HubModel]] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            answers.append(ask())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    if seconds > 0:
        thread.start()
        thread.join(seconds)
    if errors:
        raise errors[0]
    if not answers:
        raise TimeoutError
    return answers[0]


def _download(repo_id: str, name: str, settings: Settings, cache: Path) -> Path:
    from huggingface_hub import hf_hub_download

    # Its retries are warnings; what comes of them is our error. (Importing it sets the level.)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    return Path(
        hf_hub_download(
            repo_id,
            name,
            token=_token(settings),
            endpoint=settings.hf_endpoint,
            cache_dir=cache,
        )
    )


def fetch_config(repo_id: str, settings: Settings, cache: Path) -> Path:
    """Download `config.json` of a model repository into `cache` and return its path.

    Beside it lies `hf_quant_config.json`, where the repository has one.

    Raises:
        InputError: `repo_id` is not a repository id.
        ConfigError: the repository or the file does not exist, is private, or the Hub cannot be
            reached; the message says how to go on with a local file.
    """
    from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    otherwise = "give the file itself with --config FILE"
    try:
        path = _download(repo_id, "config.json", settings, cache)
        try:
            _download(repo_id, _QUANTISATION, settings, cache)
        except LocalEntryNotFoundError:
            # Nobody answers (a kind of the next): what was answered before must do.
            known = try_to_load_from_cache(repo_id, _QUANTISATION, cache_dir=cache)
            if known is not _CACHED_NO_EXIST:
                raise
        except EntryNotFoundError:
            pass  # most repositories have none
    except HFValidationError as error:
        raise InputError(
            f"--hf-repo-id: {repo_id!r} is not a Hugging Face repository id"
        ) from error
    except GatedRepoError as error:
        raise ConfigError(
            f"{repo_id}: gated on the Hub; accept its terms, set ONBOARD_HF_TOKEN, or {otherwise}"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ConfigError(
            f"{repo_id}: the Hub cannot be reached and its files are not all in the cache; "
            f"{otherwise}"
        ) from error
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"{repo_id}: no such model on the Hub, or it is private (ONBOARD_HF_TOKEN); {otherwise}"
        ) from error
    except EntryNotFoundError as error:
        raise ConfigError(f"{repo_id}: has no config.json; {otherwise}") from error
    # Which library its HTTP errors are of depends on the client's release.
    except Exception as error:
        raise ConfigError(
            f"{repo_id}: config.json cannot be fetched ({type(error).__name__}); {otherwise}"
        ) from error
    return path
