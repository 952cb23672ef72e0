"""The scheduler's process: requests come in as JSON lines, answers go out as JSON lines.

It batches as SGLang does: new requests are prefilled as soon as there is room, then all that run
get a token per step. It ends when its parent does.
"""

# ruff: noqa: G004
# It logs as SGLang does.

import json
import logging
import os
import queue
import random
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from sglang.srt.faults import fault, happened

logger = logging.getLogger(__name__)

_DEFAULT_POOL = 65_536
_DECODE_LOG_INTERVAL = 40
_CACHED_PROMPTS = 256
_WARM_UP = 7
_OUT_OF_MEMORY = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total "
    "capacity of 139.81 GiB of which 11.06 GiB is free. Including non-PyTorch memory, this "
    "process has 128.74 GiB memory in use. Of the allocated memory 127.50 GiB is allocated by "
    "PyTorch, and 312.00 MiB is reserved by PyTorch but unallocated."
)
_NO_ROOM = (
    "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static. "
    "Current value: mem_fraction_static=0.5"
)


class Pool:
    """Token slots by page; slot 0 and its page are for padding, as in SGLang."""

    def __init__(self, tokens: int, page_size: int) -> None:
        self.page_size = page_size
        self.free = list(range(1, tokens // page_size + 1))
        # Pages freed in any order come back in any order.
        random.Random(0).shuffle(self.free)
        self.holders: Counter[int] = Counter()

    def take(self) -> int:
        """Return a free page."""
        page = self.free.pop()
        self.holders[page] = 1
        return page

    def hold(self, pages: list[int]) -> None:
        """Share pages with one more holder."""
        self.holders.update(pages)

    def drop(self, pages: list[int]) -> None:
        """Give pages up; those without a holder are free."""
        self.holders.subtract(pages)
        self.free += [page for page in pages if not self.holders[page]]


@dataclass(eq=False)
class Request:
    """A request and where its tokens are."""

    rid: int
    input_ids: list[int]
    max_new_tokens: int
    params: dict[str, Any]
    pages: list[int] = field(default_factory=list)
    length: int = 0
    prefix: int = 0
    output: list[int] = field(default_factory=list)

    def grow(self, tokens: int, pool: Pool) -> None:
        """Make room for tokens."""
        self.length += tokens
        while len(self.pages) * pool.page_size < self.length:
            self.pages.append(pool.take())

    def slots(self, tokens: int, pool: Pool) -> list[int]:
        """Return the slots of the first tokens."""
        size = pool.page_size
        return [self.pages[i // size] * size + i % size for i in range(tokens)]


class Cache:
    """Prompts whose tokens are kept: SGLang's radix cache, without the tree."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.prompts: list[tuple[list[int], list[int]]] = []

    def match(self, ids: list[int]) -> list[int]:
        """Return the pages of the longest cached prefix; a token at least is left to compute."""
        best: list[int] = []
        for known, pages in self.prompts:
            differ = (i for i, pair in enumerate(zip(known, ids, strict=False)) if len({*pair}) > 1)
            common = next(differ, min(len(known), len(ids)))
            whole = min(common, len(ids) - 1) // self.pool.page_size
            best = pages[:whole] if whole > len(best) else best
        return best

    def add(self, request: Request) -> None:
        """Keep a prompt's full pages."""
        pages = request.pages[: len(request.input_ids) // self.pool.page_size]
        self.pool.hold(pages)
        self.prompts.append((request.input_ids, pages))
        if len(self.prompts) > _CACHED_PROMPTS:
            self.pool.drop(self.prompts.pop(0)[1])

    def clear(self) -> None:
        """Forget everything."""
        for _, pages in self.prompts:
            self.pool.drop(pages)
        self.prompts.clear()


class Scheduler:
    """Runs requests in batches."""

    def __init__(self, args: dict[str, Any], model: Any, answers: TextIO) -> None:
        self.args = args
        self.model = model
        self.answers = answers
        self.tokens = args["max_total_tokens"] or _DEFAULT_POOL
        self.pool = Pool(self.tokens, args["page_size"])
        self.cache = None if args["disable_radix_cache"] else Cache(self.pool)
        self.most = args["max_running_requests"] or 256
        self.arriving: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.dice = random.Random(args["random_seed"] or 0)
        self.done = 0
        self.steps = 0
        self.tic = time.perf_counter()

    def receive(self) -> None:
        """Take requests in until there are no more (in a thread of its own)."""
        served = os.environ.get("FAKE_SGLANG_SERVED")
        for line in sys.stdin:
            asked = json.loads(line)
            params = asked["params"]
            if served:
                said = {"input_ids": asked["input_ids"], "sampling_params": params}
                with Path(served).open("a") as stream:
                    stream.write(json.dumps(said) + "\n")
            ids, longest = asked["input_ids"], params["max_new_tokens"]
            self.arriving.put(Request(asked["rid"], ids, longest, params))
        self.arriving.put(None)

    def run(self) -> None:
        """Serve until the parent is gone."""
        while self._arrived():
            batch = self._admitted()
            if batch:
                self._prefill(batch)
            elif self.running:
                self._decode()
            for request in [r for r in self.running if len(r.output) >= r.max_new_tokens]:
                self._finish(request)

    def _arrived(self) -> bool:
        """Take in what has come; wait for it if there is nothing else to do."""
        while not self.arriving.empty() or not (self.waiting or self.running):
            request = self.arriving.get()
            if request is None:
                return False
            self.waiting.append(request)
        return True

    def _admitted(self) -> list[Request]:
        """Take requests from the queue as far as there is room for them."""
        batch: list[Request] = []
        budget = self.args["chunked_prefill_size"]
        while self.waiting and len(self.running) + len(batch) < self.most:
            request = self.waiting[0]
            if batch and sum(r.length - r.prefix for r in batch) + len(request.input_ids) > budget:
                break
            if not self._has_room(request, batch):
                break
            self.waiting.pop(0)
            if self.cache:
                request.pages = list(self.cache.match(request.input_ids))
                self.pool.hold(request.pages)
                request.prefix = request.length = len(request.pages) * self.pool.page_size
            request.grow(len(request.input_ids) - request.prefix, self.pool)
            batch.append(request)
        return batch

    def _has_room(self, request: Request, batch: list[Request]) -> bool:
        size = self.pool.page_size
        wanted = -(-(len(request.input_ids) + request.max_new_tokens) // size)
        for other in (*self.running, *batch):
            whole = -(-(len(other.input_ids) + other.max_new_tokens) // size)
            wanted += whole - len(other.pages)
        if wanted > len(self.pool.free) and self.cache:
            self.cache.clear()
        return wanted <= len(self.pool.free)

    def warm_up(self) -> None:
        """Call kernels for nobody, as SGLang does to tune them before it is ready."""
        request = Request(-1, [0] * _WARM_UP, 2, {"temperature": 1.0, "top_k": 50, "top_p": 0.9})
        request.grow(_WARM_UP, self.pool)
        self.model.extend([request], self.pool)
        request.grow(1, self.pool)
        self.model.decode([request], self.pool)
        self.pool.drop(request.pages)

    def _prefill(self, batch: list[Request]) -> None:
        new = sum(r.length - r.prefix for r in batch)
        self.model.extend(batch, self.pool)
        self._note("prefill", batch)
        logger.info(
            f"Prefill batch, #new-seq: {len(batch)}, #new-token: {new}, "
            f"#cached-token: {sum(r.prefix for r in batch)}, token usage: {self._usage():.2f}, "
            f"#running-req: {len(self.running)}, #queue-req: {len(self.waiting)}, "
            "#pending-token: 0, cuda graph: False, input throughput (token/s): 0.00"
        )
        for request in batch:
            if self.cache:
                self.cache.add(request)
            request.output.append(self._token())
        self.running += batch

    def _decode(self) -> None:
        for request in self.running:
            request.grow(1, self.pool)
        self.model.decode(self.running, self.pool)
        self._note("decode", self.running)
        for request in self.running:
            request.output.append(self._token())
        self.steps += 1
        if self.steps % _DECODE_LOG_INTERVAL == 0:
            now = time.perf_counter()
            speed = len(self.running) * _DECODE_LOG_INTERVAL / (now - self.tic)
            self.tic = now
            logger.info(
                f"Decode batch, #running-req: {len(self.running)}, "
                f"#token: {sum(r.length for r in self.running)}, "
                f"token usage: {self._usage():.2f}, cuda graph: False, "
                f"gen throughput (token/s): {speed:.2f}, #queue-req: {len(self.waiting)}"
            )

    def _finish(self, request: Request) -> None:
        self.running.remove(request)
        self.pool.drop(request.pages)
        answer = {
            "rid": request.rid,
            "text": "",
            "output_ids": request.output,
            "meta_info": {
                "id": str(request.rid),
                "finish_reason": {"type": "length", "length": request.max_new_tokens},
                "prompt_tokens": len(request.input_ids),
                "completion_tokens": len(request.output),
                "cached_tokens": request.prefix,
            },
        }
        print(json.dumps(answer), file=self.answers, flush=True)
        self.done += 1
        limit = fault("crash_after")
        if limit is not None and self.done >= int(limit):
            happened()
            os.kill(os.getpid(), signal.SIGKILL)
        while (limit := fault("hold_after")) is not None and self.done >= int(limit):
            time.sleep(0.1)

    def _note(self, phase: str, batch: list[Request]) -> None:
        """Write down a step whose kernels have been called."""
        if place := os.environ.get("FAKE_SGLANG_STEPS"):
            step = {
                "phase": phase,
                "cached": [r.prefix for r in batch],
                "lengths": [r.length for r in batch],
                "slots": [r.slots(r.length, self.pool) for r in batch],
            }
            with Path(place).open("a") as stream:
                stream.write(json.dumps(step) + "\n")

    def _usage(self) -> float:
        return 1 - len(self.pool.free) * self.pool.page_size / self.tokens

    def _token(self) -> int:
        return self.dice.randrange(10, self.model.vocab_size)


def _fail_to_start(args: dict[str, Any]) -> None:
    """Run out of memory, if that is asked for."""
    most = fault("oom_until_tokens")
    short = most is not None and (args["max_total_tokens"] or sys.maxsize) > int(most)
    for failed, text in ((short, _OUT_OF_MEMORY), (fault("no_room") is not None, _NO_ROOM)):
        if failed:
            happened()
            logger.error(
                "Scheduler hit an exception: Traceback (most recent call last):\n"
                '  File "/opt/sglang/srt/managers/scheduler.py", line 4934, in '
                f"run_scheduler_process\n    scheduler = Scheduler(\n{text}\n"
            )
            sys.exit(1)


def main() -> None:
    """Serve the process that started this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    args = json.loads(sys.argv[1])
    # What libraries print goes to the log.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    logging.basicConfig(
        level=args["log_level"].upper(),
        format="[%(asctime)s] %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
    )
    logger.info("Load weight begin. avail mem=139.00 GB")
    _fail_to_start(args)
    from sglang.srt.model_runner import ModelRunner

    model = ModelRunner(args)
    logger.info(f"Load weight end. elapsed=0.00 s, type={model.architecture}, avail mem=139.00 GB")
    scheduler = Scheduler(args, model, answers)
    model.allocate(scheduler.tokens)
    logger.info(
        f"max_total_num_tokens={scheduler.tokens}, "
        f"chunked_prefill_size={args['chunked_prefill_size']}, max_prefill_tokens=16384, "
        f"max_running_requests={scheduler.most}, context_len={model.context_length}, "
        "available_gpu_mem=100.00 GB"
    )
    if fault("warm_up") is not None:
        scheduler.warm_up()
    print("ready", file=answers, flush=True)
    threading.Thread(target=scheduler.receive, daemon=True).start()
    scheduler.run()


if __name__ == "__main__":
    main()
