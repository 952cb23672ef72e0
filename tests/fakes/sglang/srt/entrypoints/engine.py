"""The offline Engine, and what it has in common with the server: the scheduler's process."""

# ruff: noqa: G004
# It logs as SGLang does.

import asyncio
import atexit
import dataclasses
import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from typing import Any

from sglang.srt.faults import fault, happened
from sglang.srt.server_args import ServerArgs

logger = logging.getLogger(__name__)

_DEAF = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); "
    "time.sleep(600)"
)


class Scheduler:
    """The scheduler's process, seen from the one that was launched."""

    def __init__(self, server_args: ServerArgs) -> None:
        logger.info(f"{server_args=}")
        if fault("orphan") is not None:
            _start_orphan()
        arguments = json.dumps(dataclasses.asdict(server_args))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sglang.srt.managers.scheduler", arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._numbers = itertools.count()
        self._waiting: dict[int, Future[dict[str, Any]]] = {}
        self._lock = threading.Lock()
        self._closing = False
        assert self.process.stdout is not None
        if not self.process.stdout.readline():
            raise RuntimeError(
                "Rank 0 scheduler died during initialization "
                f"(exit code: {self.process.wait()}). "
                "If exit code is -9 (SIGKILL), a common cause is the OS OOM killer. "
                "Run `dmesg -T | grep -i oom` to check."
            )
        threading.Thread(target=self._receive, daemon=True).start()

    def ask(self, input_ids: list[int], params: dict[str, Any]) -> "Future[dict[str, Any]]":
        """Send a request."""
        answer: Future[dict[str, Any]] = Future()
        with self._lock:
            number = next(self._numbers)
            share = float(fault("fail_requests") or 0)
            if int((number + 1) * share) > int(number * share):
                answer.set_exception(ValueError("The request failed"))
                return answer
            self._waiting[number] = answer
            request = {"rid": number, "input_ids": input_ids, "params": params}
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        return answer

    def close(self) -> None:
        """End the process."""
        self._closing = True
        self.process.kill()
        self.process.wait()

    def _receive(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            answer = json.loads(line)
            self._waiting.pop(answer.pop("rid")).set_result(answer)
        status = self.process.wait()
        if not self._closing:
            logger.error(
                f"Subprocess scheduler_0 (pid={self.process.pid}) crashed with exit code {status}. "
                "Triggering SIGQUIT for cleanup..."
            )
            logger.error(
                f"SIGQUIT received. signum={int(signal.SIGQUIT)}, frame=None. "
                "It usually means one child failed."
            )
            os.kill(os.getpid(), signal.SIGKILL)


def _start_orphan() -> None:
    happened()
    orphan = subprocess.Popen(
        [sys.executable, "-c", _DEAF], stdout=subprocess.PIPE, start_new_session=True
    )
    assert orphan.stdout is not None
    orphan.stdout.readline()
    logger.info(f"orphan: pid {orphan.pid}")


def hang_if_asked() -> None:
    """Never return, if this is the fault that is asked for."""
    if fault("hang_start") is not None:
        happened()
        while True:
            time.sleep(1)


class Engine:
    """SGLang's offline Engine."""

    def __init__(self, server_args: ServerArgs) -> None:
        self.server_args = server_args
        hang_if_asked()
        self._scheduler = Scheduler(server_args)
        atexit.register(self.shutdown)
        try:
            self.loop = asyncio.get_running_loop()
        except RuntimeError:
            self.loop = asyncio.new_event_loop()
            asyncio.set_event_loop(self.loop)

    async def async_generate(
        self,
        prompt: str | None = None,
        sampling_params: dict[str, Any] | None = None,
        input_ids: list[int] | None = None,
    ) -> dict[str, Any]:
        """Generate for one prompt of token ids."""
        assert prompt is None
        assert input_ids is not None
        answer = self._scheduler.ask(input_ids, sampling_params or {})
        return await asyncio.wrap_future(answer)

    def shutdown(self) -> None:
        """End the scheduler."""
        self._scheduler.close()
