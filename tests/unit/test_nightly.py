"""Which of the models that a night finds are onboarded, and what it shows of the others."""

from __future__ import annotations

import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.nightly import Night, NightlyRequest, choose, markdown, onboarding
from tasks.discover.candidates import Candidate, Discovery
from tasks.discover.hub import Hub, HubError
from tasks.settings import Settings
from tests.conftest import listening

WORKSPACE = Path("/nowhere")


def candidate(repo_id: str | None, **fields: str) -> Candidate:
    known = {"status": "candidate", "priority": 1, "sources": ("hub",), "reason": "trending"}
    return Candidate.model_validate({**known, "hf_repo_id": repo_id, **fields})


def night(most: int = 5, **fields: bool) -> NightlyRequest:
    return NightlyRequest.model_validate({"workspace": WORKSPACE, "most": most, **fields})


def test_the_first_of_a_name_is_onboarded_and_the_others_say_why_not() -> None:
    found = [
        candidate("org-a/Model"),
        candidate(None, status="needs_repo_id", architecture="NamelessForCausalLM"),
        candidate("org-b/MODEL"),
        candidate("../../escape"),
        candidate("acme/with space"),
        candidate("acme/\N{SNOWMAN}"),
        candidate("acme/Other"),
        candidate("acme/Third"),
        candidate("acme/Known", status="tracked"),
    ]
    wanted, left = choose(found, night(most=2))
    assert wanted == {"model": found[0], "other": found[6]}
    assert [(c.hf_repo_id, c.reason.removeprefix("trending; ")) for c in left] == [
        (None, "nobody knows its repository"),
        ("org-b/MODEL", "org-a/Model has the same name"),
        (
            "../../escape",
            "--hf-repo-id: '../../escape' is not a Hugging Face repository id (owner/name)",
        ),
        ("acme/with space", left[3].reason.removeprefix("trending; ")),
        ("acme/\N{SNOWMAN}", left[4].reason.removeprefix("trending; ")),
        ("acme/Third", "2 are enough for a night"),
    ]
    assert all("is not a valid name" in c.reason for c in left[3:5])


def test_what_the_night_was_asked_for_is_asked_of_every_model() -> None:
    asked = onboarding(candidate("acme/Model"), night(skip_workload=True, submit_prs=False))
    assert (asked.model_name, asked.hf_repo_id) == ("model", "acme/Model")
    assert (asked.workspace, asked.skip_workload, asked.submit_prs) == (WORKSPACE, True, False)


NAMES = st.none() | st.text(max_size=20) | st.from_regex(r"[ab]/[AaB.]{1,3}", fullmatch=True)


@given(st.lists(NAMES, max_size=12), st.integers(0, 8))
def test_every_candidate_is_onboarded_or_left(names: list[str | None], most: int) -> None:
    found = [candidate(name, reason=name or "x") for name in names]
    wanted, left = choose(found, night(most=most))
    assert len(wanted) + len(left) == len(found)
    assert len(wanted) <= most
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9._-]*", slug) for slug in wanted)
    # Whatever it is called, it has one row, and no more columns than the others.
    shown = Discovery(since="2026-11-01", candidates=found, excluded={}, warnings=["a|b\n<c>"])
    text = markdown(shown, wanted, Night(started=dict.fromkeys(wanted, "id"), left=left))
    _, onboarded, others = text.split("\n\n|")
    for table, rows, columns in ((onboarded, len(wanted), 5), (others, len(left), 4)):
        lines = table.strip().splitlines()[2:]
        assert len(lines) == rows
        assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} <= {columns + 1}


@pytest.fixture
def ailing_hub() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(500)

        def do_HEAD(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with listening(Handler) as url:
        yield url


def test_a_hub_that_ails_is_given_up_in_time(ailing_hub: str, tmp_path: Path) -> None:
    with pytest.raises(HubError, match="was not asked"):
        Hub(Settings(workspace=tmp_path, hf_endpoint=ailing_hub), seconds=0.5).trending()
