"""The pull requests of SGLang that a user names, and which kernels they are for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.errors import InputError
from tasks.manifest import KernelEntry, PullRequests, RunManifest
from tasks.request import OnboardRequest, Step, check_names, parse_request, remaining_steps

URL = "https://github.com/sgl-project/sglang/pull/"
TOP_K, TOP_P, NORM = "top_k_sampling_from_probs_v8", "top_p_sampling_from_probs_v8", "rmsnorm_h8"


def request(*sglang_pr: str) -> OnboardRequest:
    return parse_request(model_name="m", workspace=".", sglang_pr=sglang_pr)


def waiting(name: str, op_type: str = "sampling", **fields: Any) -> KernelEntry:
    found = {"phase1_status": "new", "fi_status": "fi_supported", "sgl_status": "sgl_missing"}
    return KernelEntry.model_validate(
        {"definition_name": name, "op_type": op_type, "phase2_status": "done", **found, **fields}
    )


def run(*kernels: KernelEntry) -> RunManifest:
    return RunManifest(model_slug="m", hf_repo_id=None, date="2026-01-01", kernels=list(kernels))


def test_the_nearest_name_decides() -> None:
    asked = request(f"{TOP_K}={URL}1", f"sampling={URL}2", f"{URL}3/")
    kernels = waiting(TOP_K), waiting(TOP_P), waiting(NORM, "rmsnorm")
    assert [asked.sglang_pr_of(kernel) for kernel in kernels] == [f"{URL}{n}" for n in (1, 2, 3)]
    assert request(f"sampling={URL}2").sglang_pr_of(kernels[2]) is None
    assert request().sglang_pr_of(kernels[0]) is None


def test_forms_are_one() -> None:
    asked = request("https://GitHub.com/sgl-project/sglang/pull/7/", f"{URL}7")
    assert asked.sglang_pr == (f"{URL}7",)
    # As the UI sends it, and as a run of a deployment gets it.
    assert OnboardRequest.model_validate(asked.model_dump(mode="json")) == asked
    assert request("https://github.com/somebodys/sglang/pull/1").sglang_pr_of(waiting(TOP_K))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "12345",
        "http://github.com/sgl-project/sglang/pull/1",
        "https://github.com.evil.org/sgl-project/sglang/pull/1",
        "https://evil.org/github.com/sglang/pull/1",
        "https://github.com/sgl-project/sglang/pull/0",
        "https://github.com/sgl-project/sglang/pull/1/files",
        "https://github.com/sgl-project/sglang/pull/1?x=1",
        "https://github.com/sgl-project/sglang/pull/1#top",
        "https://github.com/sgl-project/sglang/pull/1\n",
        "https://github.com/sgl-project/sglang/pull/\u0661",
        "https://github.com/sgl-project/sglang/issues/1",
        "https://github.com/sglang/pull/1",
        "https://github.com/../sglang/pull/1",
        "javascript:alert(1)",
        "=https://github.com/sgl-project/sglang/pull/1",
        "a b=https://github.com/sgl-project/sglang/pull/1",
        "a=b=https://github.com/sgl-project/sglang/pull/1",
    ],
)
def test_what_is_no_pull_request(text: str) -> None:
    with pytest.raises(InputError, match=r"--sglang-pr: .* is not \[KERNEL=\]URL"):
        request(text)


def test_it_is_at_the_github_that_is_configured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONBOARD_PUBLISH__GITHUB_URL", "https://git.acme.com/api/v3")
    url = "https://git.acme.com/inference/sglang/pull/7"
    asked = parse_request(model_name="m", workspace=tmp_path, sglang_pr=(url,))
    assert asked.sglang_pr == (url,)
    with pytest.raises(InputError, match=r"\(https://git.acme.com/OWNER/REPOSITORY/pull/NUMBER\)"):
        request(f"{URL}1")


def test_a_token_in_a_url_is_not_repeated() -> None:
    with pytest.raises(InputError) as caught:
        request("sampling=https://me:s3cret@github.com/sgl-project/sglang/pull/1")
    assert "s3cret" not in str(caught.value)
    assert "me:" not in str(caught.value)


def test_two_for_the_same_kernels() -> None:
    with pytest.raises(InputError, match=f"--sglang-pr: {URL}1 and {URL}2 are both for sampling"):
        request(f"sampling={URL}1", f"sampling={URL}2")


@given(st.text())
def test_any_text(text: str) -> None:
    try:
        asked = request(text)
    except InputError:
        return
    assert asked.sglang_pr[0].startswith(URL[: len("https://github.com/")])


def test_a_name_that_the_model_does_not_have() -> None:
    found = run(waiting(TOP_K), waiting(NORM, "rmsnorm"))
    check_names(request(f"{TOP_K}={URL}1", f"rmsnorm={URL}2", f"{URL}3"), found)
    with pytest.raises(
        InputError, match=f"--sglang-pr: '{TOP_P}' is no kernel and no op type of m"
    ):
        check_names(request(f"{TOP_P}={URL}1"), found)


@pytest.mark.parametrize(
    ("recorded", "named", "prepares"),
    [
        (None, (), True),
        (None, (f"{URL}1",), True),
        (f"{URL}1", (f"{URL}1",), False),
        (f"{URL}1", (), False),
        # Somebody has opened another one since; it takes the place of the draft.
        ("file:///outbox/pull-requests/sampling.m.sglang.md", (f"sampling={URL}1",), True),
        ("file:///outbox/pull-requests/sampling.m.sglang.md", (f"rmsnorm={URL}1",), False),
    ],
)
def test_when_it_is_recorded(recorded: str | None, named: tuple[str, ...], prepares: bool) -> None:
    entry = waiting(TOP_K, sglang_pr_url=recorded)
    steps = remaining_steps(run(entry), entry, request(*named))
    assert (Step.PREPARE_SGLANG in steps) == prepares


OUTBOX = "file:///w/outbox/"
LACKING = {"fi_status": "fi_missing", "sgl_status": "n/a"}
HUB, GITHUB = "ONBOARD_HF_TOKEN", "ONBOARD_GITHUB_TOKEN"
R, S, PD, PC = (
    Step.REQUEST_KERNEL,
    Step.PREPARE_SGLANG,
    Step.PUBLISH_DATASET,
    Step.PUBLISH_COVERAGE,
)


@pytest.mark.parametrize(
    ("tokens", "request_url", "pair", "steps"),
    [
        ((), "x", ("x", "x"), ()),
        ((), None, (None, None), (R, PD, PC)),
        ((HUB, GITHUB), "https://a/1", ("https://a/2", "https://a/3"), ()),
        ((HUB, GITHUB), "x", ("x", "x"), (R, PD, PC)),
        ((HUB, GITHUB), "https://a/1", ("https://a/2", "x"), (PC,)),
        # Both link the request, the coverage's links the dataset's: what is linked goes first.
        ((GITHUB,), "x", ("https://a/2", "x"), (R, PD, PC)),
        ((GITHUB,), "https://a/1", ("x", "x"), ()),
        ((HUB,), "x", ("x", "x"), (PD, PC)),
        ((HUB,), "x", ("https://a/2", "x"), ()),
        (("ONBOARD_PUBLISH__TO", HUB, GITHUB), "x", ("x", "x"), ()),
    ],
)
def test_what_is_in_the_outbox_is_done_until_there_is_a_token(
    tokens: tuple[str, ...],
    request_url: str | None,
    pair: tuple[str | None, str | None],
    steps: tuple[Step, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in tokens:
        monkeypatch.setenv(name, "outbox")

    def url(text: str | None) -> str | None:
        return f"{OUTBOX}pull-requests/x.md" if text == "x" else text

    entry = waiting("k", "gdn", **LACKING, fi_issue_url=url(request_url))
    found = run(entry)
    dataset, coverage = map(url, pair)
    found.phase4["k"] = PullRequests(flashinfer_trace_pr=dataset, flashinfer_bench_pr=coverage)
    asked = OnboardRequest(model_name="m", workspace=tmp_path, phases=(4,))
    assert remaining_steps(found, entry, asked) == steps


def test_what_is_open_is_published_again_when_it_is_named(tmp_path: Path) -> None:
    entry = waiting("k", "gdn", **LACKING, fi_issue_url="https://a/1")
    found = run(entry)
    urls = {"flashinfer_trace_pr": "https://a/2", "flashinfer_bench_pr": "https://a/3"}
    found.phase4["k"] = PullRequests(**urls)
    for names, steps in (((), ()), (("other",), ()), (("k",), (PD, PC))):
        asked = OnboardRequest(model_name="m", workspace=tmp_path, renew=names)
        assert remaining_steps(found, entry, asked) == steps
    with pytest.raises(InputError, match="^renew: 'other' is no kernel of m"):
        check_names(OnboardRequest(model_name="m", workspace=tmp_path, renew=("other",)), found)


@pytest.mark.parametrize(
    ("url", "token", "steps"),
    [
        (None, False, (S,)),
        (f"{OUTBOX}pull-requests/x.sglang.md", False, ()),
        (f"{OUTBOX}pull-requests/x.sglang.md", True, (S,)),
        (f"{OUTBOX}by-hand/x.sglang.md", True, ()),
        (f"{URL}1", True, ()),
    ],
)
def test_what_a_person_has_to_write_is_not_sent(
    url: str | None,
    token: bool,
    steps: tuple[Step, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if token:
        monkeypatch.setenv(GITHUB, "t")
    entry = waiting(TOP_K, sglang_pr_url=url)
    for phases in ((4,), (3,), (0, 1, 2, 3, 4)):
        asked = OnboardRequest(model_name="m", workspace=tmp_path, phases=phases)
        assert remaining_steps(run(entry), entry, asked) == steps
        silent = asked.model_copy(update={"submit_prs": False})
        assert remaining_steps(run(entry), entry, silent) == ()


def test_nothing_is_asked_for_before_phase_2_has_seen_the_kernel(tmp_path: Path) -> None:
    asked = OnboardRequest(model_name="m", workspace=tmp_path, phases=(4,))
    for status, steps in ((None, ()), ("needs_reference", (R,)), ("done", (R, PD, PC))):
        entry = waiting("k", "gdn", **LACKING, phase2_status=status)
        assert remaining_steps(run(entry), entry, asked) == steps
        silent = asked.model_copy(update={"submit_prs": False})
        assert remaining_steps(run(entry), entry, silent) == ()
