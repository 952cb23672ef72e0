"""What a session's requests are, and how they are sent."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.collect.session import Lengths, Served, Traffic
from tasks.collect.traffic import (
    FIRST_TOKEN,
    HttpClient,
    Limits,
    Request,
    RequestError,
    TrafficError,
    Wave,
    drive,
    output_tokens,
    read_sharegpt,
    sampling_params,
    waves,
)
from tasks.errors import InputError

LIMITS = Limits(vocab_size=1000, context_length=None)
SMALL = Traffic(lengths=(Lengths(isl=32, osl=8),), batch_sizes=(4, 1), rounds=2)


def quiet(_: Served) -> None:
    pass


def same(one: Wave, other: Wave) -> bool:
    return [(r.input_ids, r.max_new_tokens) for r in one.requests] == [
        (r.input_ids, r.max_new_tokens) for r in other.requests
    ]


# What is sent


def test_every_pair_of_lengths_comes_with_every_batch_size_small_ones_first() -> None:
    traffic = SMALL.model_copy(update={"lengths": (Lengths(isl=4, osl=2), Lengths(isl=9, osl=3))})
    planned = list(waves(traffic, LIMITS))
    assert [(w.index, w.batch_size, len(w.requests)) for w in planned] == [
        (0, 1, 2),
        (1, 4, 8),
        (2, 1, 2),
        (3, 4, 8),
    ]
    assert max(len(r.tokens) for r in planned[1].requests) <= 4


@given(
    isl=st.integers(1, 200),
    osl=st.integers(1, 50),
    ratio=st.floats(0.01, 1),
    shared=st.floats(0, 0.99),
    seed=st.integers(-(2**63), 2**63),
)
def test_requests_are_as_long_as_asked_and_of_ordinary_tokens(
    isl: int, osl: int, ratio: float, shared: float, seed: int
) -> None:
    traffic = Traffic(
        lengths=(Lengths(isl=isl, osl=osl),),
        batch_sizes=(8,),
        random_range_ratio=ratio,
        shared_prefix=shared,
        seed=seed,
    )
    (wave,) = waves(traffic, LIMITS)
    for request in wave.requests:
        assert max(1, round(ratio * isl)) <= len(request.tokens) <= isl
        assert max(1, round(ratio * osl)) <= request.max_new_tokens <= osl
        assert request.tokens.min() >= FIRST_TOKEN
        assert request.tokens.max() < LIMITS.vocab_size
    (again,) = waves(traffic, LIMITS)
    assert same(wave, again)


def test_a_wave_is_the_same_whatever_came_before_it() -> None:
    last = list(waves(SMALL, LIMITS))[-1]
    longer = SMALL.model_copy(update={"batch_sizes": (2, 4)})
    assert same(last, list(waves(longer, LIMITS))[-1])
    other = SMALL.model_copy(update={"seed": 1})
    assert not same(last, list(waves(other, LIMITS))[-1])


def test_requests_of_a_group_share_their_prefix_and_no_more() -> None:
    traffic = SMALL.model_copy(
        update={
            "shared_prefix": 0.5,
            "random_range_ratio": 1.0,
            "batch_sizes": (16,),
            "lengths": (Lengths(isl=64, osl=1),),
        }
    )
    (wave,) = waves(traffic, LIMITS)
    prefixes = [tuple(r.input_ids[:32]) for r in wave.requests]
    assert len(wave.requests) == 32
    assert sorted(prefixes.count(p) for p in set(prefixes)) == [8, 8, 8, 8]
    assert len({tuple(r.input_ids[32:]) for r in wave.requests}) == 32


def test_requests_that_do_not_fit_are_left_out_and_never_cut() -> None:
    traffic = SMALL.model_copy(update={"lengths": (Lengths(isl=32, osl=8), Lengths(isl=33, osl=8))})
    planned = list(waves(traffic, Limits(vocab_size=1000, context_length=48)))
    assert [len(w.requests) for w in planned] == [2, 8, 0, 0]
    assert planned[2].not_sent == (
        "requests of 33 + 8 tokens are longer than the server takes (48, 8 of them its own)"
    )


def test_a_vocabulary_without_ordinary_tokens_is_refused() -> None:
    with pytest.raises(InputError, match="vocab_size: 10, expected more than 10"):
        list(waves(SMALL, Limits(vocab_size=10, context_length=None)))


# Conversations


def sharegpt(path: Path, entries: object) -> Traffic:
    path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
    return SMALL.model_copy(update={"kind": "sharegpt", "dataset": path})


def talk(question: str, answer: str) -> dict[str, object]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": "x", "conversations": turns}


def test_conversations_are_as_long_as_their_texts_without_a_tokenizer(tmp_path: Path) -> None:
    entries = [talk("a" * 40, "b" * 9), talk("c" * 21, "d" * 400), {"conversations": []}]
    planned = list(waves(sharegpt(tmp_path / "talk.json", entries), LIMITS))
    assert [len(w.requests) for w in planned] == [2, 8]
    # Characters by four, rounded up; answers no longer than `osl`.
    lengths = {(len(r.tokens), r.max_new_tokens) for w in planned for r in w.requests}
    assert lengths == {(10, 3), (6, 8)}
    assert same(planned[1], list(waves(sharegpt(tmp_path / "talk.json", entries), LIMITS))[1])


def test_conversations_that_are_too_long_are_not_sent(tmp_path: Path) -> None:
    entries = [talk("a" * 40, "b" * 9), talk("c" * 4000, "d"), talk("", "e"), talk("f", "")]
    traffic = sharegpt(tmp_path / "talk.json", entries)
    planned = list(waves(traffic, Limits(vocab_size=1000, context_length=64)))
    assert {len(r.tokens) for w in planned for r in w.requests} == {10}
    (none, _) = waves(traffic, Limits(vocab_size=1000, context_length=16))
    assert none.not_sent.endswith("no conversation fits the server's limits")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("{}", "is a JSON dict, expected a list"),
        ([], "no entry has a question and an answer"),
        ([talk("a", "b"), 3], r"\[1\].conversations is missing"),
        ([{"conversations": "hello"}], r"\[0\].conversations is a JSON str, expected list"),
        ([{"conversations": [1, 2]}], r"\[0\].conversations\[0\].value is missing"),
        ([talk("a", 3)], r"\[0\].conversations\[1\].value is a JSON int"),  # type: ignore[arg-type]
        ([talk("\ud800", "b")], r"\[0\].conversations\[0\].value is not Unicode text"),
    ],
)
def test_a_damaged_file_is_refused_with_the_place(
    tmp_path: Path, content: object, said: str
) -> None:
    traffic = sharegpt(tmp_path / "talk.json", content)
    with pytest.raises(InputError, match=said) as error:
        list(waves(traffic, LIMITS))
    assert "talk.json" in str(error.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none.json"):
        read_sharegpt(tmp_path / "none.json")
    with pytest.raises(InputError, match="dataset: expected"):
        list(waves(SMALL.model_copy(update={"kind": "sharegpt"}), LIMITS))


# How it is sent


def wave(index: int, size: int, count: int) -> Wave:
    tokens = np.arange(10, 14, dtype=np.int32)
    return Wave(index, size, [Request(tokens, n + 1) for n in range(count)])


class Recorder:
    """A server that notes what is in flight, and fails the requests it is told to."""

    def __init__(self, fails: Callable[[int], bool] = lambda n: False) -> None:
        self.fails, self.sent, self.flying, self.seen = fails, 0, 0, list[int]()

    async def __call__(self, input_ids: list[int], max_new_tokens: int) -> int:
        self.sent, self.flying = self.sent + 1, self.flying + 1
        number = self.sent
        for _ in range(max_new_tokens):
            self.seen.append(self.flying)
            await asyncio.sleep(0)
        self.flying -= 1
        if self.fails(number):
            raise RequestError("boom\nmore of it")
        return max_new_tokens


def test_as_many_requests_are_in_flight_as_the_batch_size_says() -> None:
    server = Recorder()
    served = asyncio.run(drive([wave(0, 4, 12)], server, traffic=SMALL, on_progress=quiet))
    assert (served.requests, served.failed, served.waves_done) == (12, 0, 1)
    assert served.output_tokens == sum(range(1, 13))
    # A new one starts as soon as one is done: only the last ones leave places empty.
    full = len(server.seen) - server.seen[::-1].index(4)
    assert max(server.seen) == 4
    assert all(n == 4 for n in server.seen[server.seen.index(4) : full])


def test_a_retry_goes_on_behind_the_waves_that_are_done() -> None:
    told: list[int] = []
    before = Served(requests=7, output_tokens=70, seconds=1.0, waves_done=1, errors={"old": 1})
    server = Recorder()
    served = asyncio.run(
        drive(
            [wave(0, 1, 5), wave(1, 2, 3), wave(2, 2, 2)],
            server,
            traffic=SMALL,
            before=before,
            on_progress=lambda s: told.append(s.waves_done),
        )
    )
    assert server.sent == 5
    assert (served.requests, served.waves_done, served.errors) == (12, 3, {"old": 1})
    assert served.seconds >= 1.0
    assert before.requests == 7
    assert told[-1] == 3


def test_few_failures_are_counted_and_many_stop_the_wave_at_once() -> None:
    traffic = SMALL.model_copy(update={"failures": 0.25})
    server = Recorder(lambda n: n in {2, 5})
    served = asyncio.run(drive([wave(0, 2, 8)], server, traffic=traffic, on_progress=quiet))
    assert (served.requests, served.failed, served.errors) == (8, 2, {"boom": 2})
    told: list[Served] = []
    server = Recorder(lambda n: True)
    with pytest.raises(TrafficError, match=r"3 of 100 requests failed.*at most 2% may.*boom"):
        asyncio.run(drive([wave(0, 2, 100)], server, traffic=SMALL, on_progress=told.append))
    assert server.sent <= 5
    assert told[-1].failed == 3


def test_errors_of_a_thousand_kinds_stay_a_short_list() -> None:
    async def generate(input_ids: list[int], max_new_tokens: int) -> int:
        raise ValueError(f"request {max_new_tokens} " + "x" * 1000)

    traffic = SMALL.model_copy(update={"failures": 1.0})
    served = asyncio.run(drive([wave(0, 9, 300)], generate, traffic=traffic, on_progress=quiet))
    assert sum(served.errors.values()) == served.failed == 300
    assert len(served.errors) == 51
    assert max(map(len, served.errors)) == 200


def test_waves_that_cannot_be_sent_are_counted_and_all_of_them_are_an_error() -> None:
    lost = Wave(0, 1, not_sent="too long")
    served = asyncio.run(drive([lost, wave(1, 1, 1)], Recorder(), traffic=SMALL, on_progress=quiet))
    assert served.errors == {"a wave was not sent: too long": 1}
    assert served.waves_done == 2
    with pytest.raises(TrafficError, match="no request can be sent: too long"):
        asyncio.run(drive([lost], Recorder(), traffic=SMALL, on_progress=quiet))


def test_a_cancel_reaches_the_requests_in_flight() -> None:
    ended: list[int] = []

    async def generate(input_ids: list[int], max_new_tokens: int) -> int:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(max_new_tokens)
        return 0

    async def run() -> None:
        task = asyncio.create_task(
            drive([wave(0, 3, 9)], generate, traffic=SMALL, on_progress=quiet)
        )
        for _ in range(20):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert sorted(ended) == [1, 2, 3]


# SGLang's HTTP API


def client(handler: Callable[[httpx.Request], httpx.Response]) -> HttpClient:
    made = HttpClient(1, SMALL, answer_seconds=5)
    made._client = httpx.AsyncClient(
        base_url="http://127.0.0.1:1", transport=httpx.MockTransport(handler)
    )
    return made


def ask(handler: Callable[[httpx.Request], httpx.Response]) -> int:
    async def run() -> int:
        async with client(handler) as made:
            return await made.generate([10, 11], 7)

    return asyncio.run(run())


def test_a_request_is_sent_as_sglang_wants_it() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        assert request.url == "http://127.0.0.1:1/generate"
        assert json.loads(request.content) == {
            "input_ids": [10, 11],
            "sampling_params": sampling_params(SMALL, 7),
            "stream": False,
        }
        meta = {"completion_tokens": 7, "finish_reason": {"type": "length", "length": 7}}
        return httpx.Response(200, json={"output_ids": [1] * 7, "meta_info": meta})

    assert ask(handler) == 7
    assert sampling_params(SMALL, 7) == {
        "max_new_tokens": 7,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 0.9,
        "ignore_eos": True,
    }


def refuse(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("refused")


def stall(request: httpx.Request) -> httpx.Response:
    raise httpx.ReadTimeout("")


@pytest.mark.parametrize(
    ("handler", "said"),
    [
        (refuse, r"the connection failed \(refused\)"),
        (stall, "no answer within 5 s"),
        (
            lambda _: httpx.Response(400, json={"error": {"message": "too long"}}),
            "HTTP 400: too long",
        ),
        (lambda _: httpx.Response(500, text="Internal Server Error"), "HTTP 500: Internal"),
        (lambda _: httpx.Response(502), "HTTP 502: Bad Gateway"),
        (lambda _: httpx.Response(200, text="<html>"), "the answer is not JSON"),
        (lambda _: httpx.Response(200, json=[]), "the answer has no meta_info"),
        (
            lambda _: httpx.Response(200, json={"meta_info": {"completion_tokens": "many"}}),
            "completion_tokens of the answer is 'many'",
        ),
    ],
)
def test_a_failed_request_says_why(
    handler: Callable[[httpx.Request], httpx.Response], said: str
) -> None:
    with pytest.raises(RequestError, match=said):
        ask(handler)


def test_an_aborted_request_is_a_failed_one() -> None:
    reason = {"type": "abort", "message": "no room"}
    with pytest.raises(RequestError, match="aborted: no room"):
        output_tokens({"meta_info": {"completion_tokens": 0, "finish_reason": reason}})
