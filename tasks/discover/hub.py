"""Fetch a model's `config.json` from the Hugging Face Hub."""

from __future__ import annotations

import logging
from pathlib import Path

from tasks.errors import ConfigError, InputError
from tasks.settings import Settings


def fetch_config(repo_id: str, settings: Settings, cache: Path) -> Path:
    """Download `config.json` of a model repository into `cache` and return its path.

    Raises:
        InputError: `repo_id` is not a repository id.
        ConfigError: the repository or the file does not exist, is private, or the Hub cannot be
            reached; the message says how to go on with a local file.
    """
    from httpx import HTTPError
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    # Its retries are warnings; what comes of them is our error.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    token = settings.hf_token.get_secret_value() if settings.hf_token else None
    otherwise = "give the file itself with --config FILE"
    try:
        return Path(
            hf_hub_download(
                repo_id, "config.json", token=token, endpoint=settings.hf_endpoint, cache_dir=cache
            )
        )
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
            f"{repo_id}: the Hub cannot be reached and config.json is not in its cache; {otherwise}"
        ) from error
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"{repo_id}: no such model on the Hub, or it is private (ONBOARD_HF_TOKEN); {otherwise}"
        ) from error
    except EntryNotFoundError as error:
        raise ConfigError(f"{repo_id}: has no config.json; {otherwise}") from error
    except (HTTPError, OSError) as error:
        raise ConfigError(
            f"{repo_id}: config.json cannot be fetched ({type(error).__name__}); {otherwise}"
        ) from error
