"""The requests of a session, and sending them.

The same traffic makes the same requests, wave by wave, so that a retry goes on behind the waves
that are done. Prompts are random token ids, or those of a ShareGPT-format file: as the model's own
tokenizer (`tokenizer.json`) has them where the model's folder and the `tokenizers` package are at
hand, else random ids, as many as the text has characters by four.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import numpy as np
from pydantic import BaseModel, ConfigDict

from tasks.collect.session import NOT_SENT, Lengths, Served, Traffic
from tasks.errors import CollectError, InputError
from tasks.files import read_text
from tasks.model import ModelConfig

FIRST_TOKEN = 10
"""Smallest random token id: those below are mostly special ones."""
_SPARE = 8
"""Tokens of its context that SGLang 0.5.17 keeps for itself, rounded up."""
_GROUP = 8
"""Requests that share a prefix. Several groups, so that the cache holds several prefixes and a hit
is not the same pages for everyone."""
_CHARACTERS_PER_TOKEN = 4
_TEXTS = 50
"""Different error texts that are told apart."""
_LONGEST_TEXT = 200
_PROGRESS_SECONDS = 1.0
_ANSWER_SECONDS = 3600.0
_CONNECT_SECONDS = 30.0

Generate = Callable[[list[int], int], Awaitable[int]]
"""Sends a prompt (token ids, longest answer) and returns how many tokens the answer has."""


class TrafficError(CollectError):
    """Too many requests failed, or none could be sent."""


class RequestError(Exception):
    """One request failed; the text says why."""


class Limits(BaseModel):
    """What the server takes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vocab_size: int
    context_length: int | None
    """Tokens that a request may have, answer included: the model's context or the whole KV pool,
    whichever is smaller. None where neither is known."""

    def fit(self, prompt: int, answer: int) -> bool:
        """Whether a request of these lengths is served whole."""
        return self.context_length is None or prompt + answer + _SPARE <= self.context_length


def limits_of(model: ModelConfig, pool: int | None = None) -> Limits:
    """Return what a server of this model takes.

    Args:
        model: the model's config.
        pool: tokens that its KV pool is capped at, if it is.
    """
    length = model.fields.size("max_position_embeddings", "max_sequence_length")
    known = [n for n in (length, pool) if n is not None]
    return Limits(vocab_size=model.vocab_size, context_length=min(known) if known else None)


@dataclass(frozen=True)
class Request:
    """A prompt, and how many tokens are generated for it."""

    tokens: np.ndarray
    """int32 [length]."""
    max_new_tokens: int

    @property
    def input_ids(self) -> list[int]:
        """The prompt as JSON has it."""
        ids: list[int] = self.tokens.tolist()
        return ids


@dataclass(frozen=True)
class Wave:
    """Requests of one kind, `batch_size` of which are in flight at a time."""

    index: int
    batch_size: int
    requests: Sequence[Request] = ()
    not_sent: str = ""
    """Why there are no requests: the server could not take them whole, and nothing is cut."""


def waves(traffic: Traffic, limits: Limits, model: Path | None = None) -> Iterator[Wave]:
    """Yield all waves of a session: for every pair of lengths, small batches first.

    Args:
        traffic: what to send.
        limits: what the server takes. A wave whose longest request may be longer is not cut: it
            comes without requests, and with the reason.
        model: the model's folder, if it is on this host: its tokenizer is taken for texts.

    Raises:
        InputError: the vocabulary is too small, or the ShareGPT-format file or the tokenizer
            cannot be read; the message names the file, and the entry and the field in it.
    """
    if limits.vocab_size <= FIRST_TOKEN:
        raise InputError(f"vocab_size: {limits.vocab_size}, expected more than {FIRST_TOKEN}")
    if traffic.kind == "sharegpt":
        yield from _told(traffic, limits, model)
        return
    for index, (lengths, size) in enumerate(product(traffic.lengths, sorted(traffic.batch_sizes))):
        if limits.fit(lengths.isl, lengths.osl):
            requests = _random(traffic, lengths, size, index, limits.vocab_size)
            yield Wave(index, size, requests)
        else:
            yield Wave(
                index,
                size,
                not_sent=f"requests of {lengths.isl} + {lengths.osl} tokens are longer than the "
                f"server takes ({limits.context_length}, {_SPARE} of them its own)",
            )


def _dice(traffic: Traffic, index: int) -> np.random.Generator:
    """Return a wave's own random numbers: it does not matter which waves came before."""
    return np.random.default_rng([abs(traffic.seed), int(traffic.seed < 0), index])


def _random(
    traffic: Traffic, lengths: Lengths, size: int, index: int, vocab_size: int
) -> list[Request]:
    """Make the requests of a wave of random tokens."""
    dice = _dice(traffic, index)
    count = traffic.rounds * size
    ratio = traffic.random_range_ratio

    def drawn(longest: int) -> list[int]:
        values = dice.integers(max(1, round(ratio * longest)), longest, count, endpoint=True)
        return [int(value) for value in values]

    def tokens(shape: int | tuple[int, int]) -> np.ndarray:
        return dice.integers(FIRST_TOKEN, vocab_size, shape, dtype=np.int32)

    groups = -(-count // _GROUP)
    prefixes = tokens((groups, int(traffic.shared_prefix * lengths.isl)))
    requests = []
    for number, (prompt, answer) in enumerate(
        zip(drawn(lengths.isl), drawn(lengths.osl), strict=True)
    ):
        # Neighbours are of different groups: a prefix comes again when it has been computed.
        shared = prefixes[number % groups][: int(traffic.shared_prefix * prompt)]
        requests.append(Request(np.concatenate([shared, tokens(prompt - len(shared))]), answer))
    return requests


# Conversations


@dataclass
class _Conversations:
    """The first question and answer of every conversation of a file, and their tokens."""

    texts: list[tuple[str, str]]
    tokenize: Callable[[str], np.ndarray] | None
    longest: int
    limits: Limits
    known: dict[int, Request | None] = field(default_factory=dict)

    def request(self, number: int) -> Request | None:
        """Return a conversation as a request; None if the server cannot take it whole."""
        if number not in self.known:
            self.known[number] = self._made(number)
        return self.known[number]

    def _made(self, number: int) -> Request | None:
        question, answer = (self._tokens(text, number) for text in self.texts[number])
        length = min(len(answer), self.longest)
        fits = self.limits.fit(len(question), length) and min(len(question), length) > 0
        return Request(question, length) if fits and self._in_vocabulary(question) else None

    def _in_vocabulary(self, tokens: np.ndarray) -> bool:
        return bool((tokens < self.limits.vocab_size).all())

    def _tokens(self, text: str, number: int) -> np.ndarray:
        if self.tokenize:
            return self.tokenize(text)
        length = -(-len(text) // _CHARACTERS_PER_TOKEN)
        dice = np.random.default_rng(number)
        return dice.integers(FIRST_TOKEN, self.limits.vocab_size, length, dtype=np.int32)


def _told(traffic: Traffic, limits: Limits, model: Path | None) -> Iterator[Wave]:
    """Yield waves of a file's conversations, in an order of their own each.

    A file with fewer conversations than a wave has requests is gone through again.
    """
    if traffic.dataset is None:
        raise InputError("dataset: expected a ShareGPT-format file for traffic of kind sharegpt")
    texts = read_sharegpt(traffic.dataset)
    longest = traffic.lengths[0].osl
    told = _Conversations(texts, _tokenizer(model), longest, limits)
    for index, size in enumerate(sorted(traffic.batch_sizes)):
        order = _dice(traffic, index).permutation(len(texts))
        fitting = _cycled(told, [int(number) for number in order], traffic.rounds * size)
        reason = "" if fitting else f"{traffic.dataset}: no conversation fits the server's limits"
        yield Wave(index, size, fitting, reason)


def _cycled(told: _Conversations, order: Sequence[int], count: int) -> list[Request]:
    """Return the first `count` conversations that fit, going round if they are fewer."""
    fitting: list[Request] = []
    for number in order:
        if len(fitting) == count:
            break
        request = told.request(number)
        if request is not None:
            fitting.append(request)
    return [fitting[i % len(fitting)] for i in range(count)] if fitting else []


def read_sharegpt(path: Path) -> list[tuple[str, str]]:
    """Read the first question and answer of every conversation that has both.

    Args:
        path: JSON, a list of `{"conversations": [{"from": ..., "value": ...}, ...]}`.

    Raises:
        InputError: it is something else; the message names the entry and the field.
    """
    text = read_text(path, "ShareGPT-format file")
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: ShareGPT-format file is not JSON ({error})") from error
    if not isinstance(entries, list):
        raise InputError(f"{path}: is a JSON {type(entries).__name__}, expected a list")
    found = []
    for index, entry in enumerate(entries):
        turns = _field(path, f"[{index}]", entry, "conversations", list)
        if len(turns) >= 2:
            found.append((_value(path, index, turns, 0), _value(path, index, turns, 1)))
    if not found:
        raise InputError(f"{path}: no entry has a question and an answer")
    return found


def _value(path: Path, index: int, turns: list[Any], turn: int) -> str:
    place = f"[{index}].conversations[{turn}]"
    text: str = _field(path, place, turns[turn], "value", str)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{path}: {place}.value is not Unicode text") from error
    return text


def _field(path: Path, place: str, entry: Any, name: str, kind: type) -> Any:
    value = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(value, kind):
        found = "missing" if value is None else f"a JSON {type(value).__name__}"
        raise InputError(f"{path}: {place}.{name} is {found}, expected {kind.__name__}")
    return value


def _tokenizer(model: Path | None) -> Callable[[str], np.ndarray] | None:
    """Return what makes token ids (int32) of texts, if it is at hand."""
    file = model / "tokenizer.json" if model else None
    if file is None or not file.is_file() or importlib.util.find_spec("tokenizers") is None:
        return None
    from tokenizers import (  # type: ignore[import-not-found,import-untyped,unused-ignore]
        Tokenizer,
    )

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises nothing more specific
        raise InputError(f"{file}: cannot be read as a tokenizer ({error})") from error
    return lambda text: np.asarray(tokenizer.encode(text).ids, dtype=np.int32)


# Sending


def sampling_params(traffic: Traffic, max_new_tokens: int) -> dict[str, int | float | bool]:
    """Return a request's `sampling_params`, as the Engine and the HTTP API take them."""
    return {
        "max_new_tokens": max_new_tokens,
        "temperature": traffic.temperature,
        "top_k": traffic.top_k,
        "top_p": traffic.top_p,
        "ignore_eos": True,
    }


async def drive(
    planned: Iterable[Wave],
    generate: Generate,
    *,
    traffic: Traffic,
    before: Served | None = None,
    on_progress: Callable[[Served], None],
) -> Served:
    """Send the waves one after the other, each with its batch size of requests in flight.

    Args:
        planned: all waves of the session; those that `before` says are done are passed over.
        generate: sends one request; what it raises counts as that request's failure.
        traffic: says what share of a wave's requests may fail.
        before: what earlier launches came to; counts go on from there.
        on_progress: told how far it is about once a second and after every wave.

    Returns:
        What all launches together came to. A wave that was not sent is counted among the errors.

    Raises:
        TrafficError: more requests of a wave failed than may, or no wave could be sent.
    """
    driver = _Driver(
        generate=generate,
        share=traffic.failures,
        served=(before or Served()).model_copy(deep=True),
        tell=on_progress,
    )
    return await driver.run(planned)


@dataclass
class _Driver:
    generate: Generate
    share: float
    served: Served
    tell: Callable[[Served], None]
    told: float = field(default_factory=time.monotonic)
    clock: float = field(default_factory=time.monotonic)

    async def run(self, planned: Iterable[Wave]) -> Served:
        reasons: list[str] = []
        sent = self.served.waves_done
        for wave in planned:
            if wave.index < self.served.waves_done:
                continue
            if wave.not_sent:
                reasons.append(wave.not_sent)
                self._count(f"{NOT_SENT}{wave.not_sent}")
            else:
                await self._send(wave)
                sent += 1
            self.served.waves_done = wave.index + 1
            self._report(now=True)
        if reasons and not sent:
            raise TrafficError(f"no request can be sent: {'; '.join(dict.fromkeys(reasons))}")
        return self.served

    async def _send(self, wave: Wave) -> None:
        """Send a wave: as many workers as requests in flight, each with one at a time."""
        requests = iter(wave.requests)
        failed: list[str] = []

        async def work() -> None:
            for request in requests:
                error = await self._one(request)
                if error is not None:
                    failed.append(error)
                if len(failed) > self.share * len(wave.requests):
                    raise TrafficError(self._too_many(wave, failed))

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(wave.batch_size, len(wave.requests))):
                    group.create_task(work())
        except ExceptionGroup as several:
            self._report(now=True)
            raise several.exceptions[0] from None

    async def _one(self, request: Request) -> str | None:
        """Send one request and count it; return the first line of its error."""
        error = None
        try:
            tokens = await self.generate(request.input_ids, request.max_new_tokens)
        except Exception as raised:  # whatever a client or an engine raises
            error = _first_line(raised)
            self.served.failed += 1
            self._count(error)
        else:
            self.served.output_tokens += tokens
        self.served.requests += 1
        self._report()
        return error

    def _too_many(self, wave: Wave, failed: Sequence[str]) -> str:
        return (
            f"wave {wave.index + 1} (batch size {wave.batch_size}): {len(failed)} of "
            f"{len(wave.requests)} requests failed, at most {self.share:.0%} may; the last: "
            f"{failed[-1]}"
        )

    def _count(self, text: str) -> None:
        errors = self.served.errors
        known = text in errors or len(errors) < _TEXTS
        key = text if known else "other errors"
        errors[key] = errors.get(key, 0) + 1

    def _report(self, *, now: bool = False) -> None:
        time_is = time.monotonic()
        self.served.seconds += time_is - self.clock
        self.clock = time_is
        if now or time_is - self.told >= _PROGRESS_SECONDS:
            self.told = time_is
            self.tell(self.served)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:_LONGEST_TEXT]


def output_tokens(answer: object) -> int:
    """Return how many tokens SGLang's answer to a request has, from its `meta_info`.

    Raises:
        RequestError: it does not say, or the request was aborted.
    """
    meta = answer.get("meta_info") if isinstance(answer, dict) else None
    if not isinstance(meta, dict):
        raise RequestError("the answer has no meta_info")
    reason = meta.get("finish_reason")
    if isinstance(reason, dict) and reason.get("type") == "abort":
        raise RequestError(f"aborted: {reason.get('message')}")
    tokens = meta.get("completion_tokens")
    if type(tokens) is not int or tokens < 0:
        raise RequestError(f"meta_info.completion_tokens of the answer is {tokens!r}")
    return tokens


class HttpClient:
    """SGLang's native HTTP API on this host.

    A request is never repeated: the server may be working on it, and traffic would double.
    """

    def __init__(
        self, port: int, traffic: Traffic, *, answer_seconds: float = _ANSWER_SECONDS
    ) -> None:
        """Make a client.

        Args:
            port: the server's, on the loopback interface.
            traffic: says how tokens are sampled.
            answer_seconds: how long an answer may take; requests wait in the server's queue too.
        """
        self._traffic = traffic
        self._seconds = answer_seconds
        self._client = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}",
            trust_env=False,  # no proxy
            timeout=httpx.Timeout(answer_seconds, connect=_CONNECT_SECONDS),
            # A kept connection may be one that the server is just closing; a new one costs nothing.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        )

    async def __aenter__(self) -> Self:
        await self._client.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._client.__aexit__(kind, error, trace)

    async def generate(self, input_ids: list[int], max_new_tokens: int) -> int:
        """Send one request and return how many tokens its answer has.

        Raises:
            RequestError: it failed.
        """
        body = {
            "input_ids": input_ids,
            "sampling_params": sampling_params(self._traffic, max_new_tokens),
            "stream": False,
        }
        try:
            answer = await self._client.post("/generate", json=body)
        except httpx.TimeoutException as error:
            raise RequestError(f"no answer within {self._seconds:.0f} s") from error
        except httpx.HTTPError as error:
            raise RequestError(
                f"the connection failed ({error or type(error).__name__})"
            ) from error
        if answer.status_code != httpx.codes.OK:
            raise RequestError(f"HTTP {answer.status_code}: {_said(answer)}")
        try:
            return output_tokens(answer.json())
        except ValueError as error:
            raise RequestError("the answer is not JSON") from error


def _said(answer: httpx.Response) -> str:
    """Return the message of an error's answer."""
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return answer.text.strip() or answer.reason_phrase
