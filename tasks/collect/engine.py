"""SGLang's offline Engine with its traffic, in one process: `python -m tasks.collect.engine ORDER`.

It is told what to do in a file and says how it goes in files beside it (`Order`); whoever started
it drains the dumps meanwhile. Nothing here decides anything.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from tasks import files
from tasks.collect.session import Progress, Served, Traffic
from tasks.collect.traffic import Limits, drive, output_tokens, sampling_params, waves
from tasks.errors import CollectError, first_problem

_POLL_SECONDS = 0.1


class Order(BaseModel):
    """What an engine process is to do."""

    model_config = ConfigDict(extra="forbid")

    arguments: tuple[str, ...]
    """SGLang's server arguments, the model's included."""
    traffic: Traffic
    limits: Limits
    model_folder: Path | None
    """Where the model's tokenizer is, if it is on this host."""
    served: Path
    """How far it is, a `Progress`; it goes on where this says."""
    ready: Path
    """Made when the engine is up."""
    go: Path
    """Traffic begins when this is there."""


def run(order: Order) -> None:
    """Start the engine, send the traffic, stop."""
    from sglang import Engine  # type: ignore[import-not-found,unused-ignore]
    from sglang.srt.server_args import (  # type: ignore[import-not-found,unused-ignore]
        prepare_server_args,
    )

    engine = Engine(server_args=prepare_server_args(list(order.arguments)))
    try:
        order.ready.touch()
        while not order.go.exists():
            time.sleep(_POLL_SECONDS)
        engine.loop.run_until_complete(_serve(engine, order))
    finally:
        engine.shutdown()


async def _serve(engine: Any, order: Order) -> None:
    async def generate(input_ids: list[int], max_new_tokens: int) -> int:
        answer = await engine.async_generate(
            input_ids=input_ids,
            sampling_params=sampling_params(order.traffic, max_new_tokens),
        )
        return output_tokens(answer)

    planned = waves(order.traffic, order.limits, order.model_folder)
    await drive(
        planned,
        generate,
        traffic=order.traffic,
        before=read_served(order.served).done,
        on_progress=partial(save_served, order.served),
    )


def read_served(path: Path) -> Progress:
    """Return how far a session is; nothing served where there is no such file.

    Raises:
        CollectError: the file is damaged.
    """
    if not path.exists():
        return Progress()
    try:
        return Progress.model_validate_json(path.read_bytes())
    except ValidationError as error:
        field, reason = first_problem(error)
        raise CollectError(
            f"{path}: field {field or 'all'}: {reason} (remove it to send all the traffic again)"
        ) from error


def save_served(path: Path, now: Served) -> None:
    """Record how far a session is."""
    files.write_text(path, read_served(path).followed_by(now).model_dump_json())


if __name__ == "__main__":
    run(Order.model_validate_json(Path(sys.argv[1]).read_bytes()))
