"""`onboard status`: all that is open, merged and refused on one screen, and in JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from github import Auth, Github
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from typer.testing import CliRunner

from flows.cli import app
from flows.report import Report
from tasks import files, manifest
from tasks.manifest import RunManifest
from tests.fakes.github import GitHub

HUB, GITHUB = "https://huggingface.co/datasets/a/b/discussions", "https://github.com/a/b"
WORDS = "Not \x1b[31mlike\x1b[0m this.\nSee \x9b31m<b>@you</b> | ](javascript:alert(1)) \u202e"
NEW = {"op_type": "gemm", "phase1_status": "new", "phase2_status": "done"}
KERNELS: list[dict[str, Any]] = [
    {"definition_name": "old", "op_type": "gemm", "phase1_status": "existing"},
    {**NEW, "definition_name": "landed", "sgl_status": "sgl_integrated"},
    {**NEW, "definition_name": "refused", "sgl_status": "sgl_integrated"},
    {**NEW, "definition_name": "wanting", "sgl_status": "sgl_integrated"},
    {
        **NEW,
        "definition_name": "lacks",
        "fi_status": "fi_missing",
        "fi_issue_url": f"{GITHUB}/issues/4",
        "fi_trace_template_request_url": "file:///w/outbox/issues/t.md",
    },
    {
        **NEW,
        "definition_name": "waits",
        "sgl_status": "sgl_missing",
        "sglang_pr_url": f"{GITHUB}/pull/9",
    },
]
PULLS = {
    name: {"flashinfer_trace_pr": f"{HUB}/{n}", "flashinfer_bench_pr": f"{GITHUB}/pull/{n}"}
    for n, name in enumerate(("landed", "refused", "wanting"), 1)
}
UPSTREAM: dict[str, Any] = {
    f"{HUB}/1": {"state": "merged", "said": "Thanks!"},
    f"{GITHUB}/pull/1": {"state": "merged"},
    f"{HUB}/2": {"state": "rejected", "said": WORDS},
    f"{HUB}/3": {"state": "open"},
    f"{GITHUB}/pull/3": {"state": "changes_requested", "said": "Mark it 🟡."},
    f"{GITHUB}/issues/4": {"state": "rejected", "said": "We will not."},
    f"{GITHUB}/pull/9": {"state": "draft", "said": "Soon."},
}


def write(workspace: Path, **fields: Any) -> Path:
    head = {"model_slug": "m", "hf_repo_id": "a/M", "date": "2026-11-21", "kernels": KERNELS}
    run = RunManifest.model_validate({**head, "phase4": PULLS, "upstream": UPSTREAM, **fields})
    path = workspace / manifest.file_name(run.model_slug, run.date)
    files.write_json(path, manifest.dump(run))
    return path


def status(*options: Any, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["status", *map(str, options)])
    assert done.exit_code == code, done.output
    return done.output


def test_one_screen(tmp_path: Path) -> None:
    path = write(tmp_path)
    shown = status("--workspace", tmp_path, code=3)
    rows = [re.split(r" {2,}", line.strip()) for line in shown.splitlines()[2:7]]
    assert rows == [
        ["landed", "merged", "#1 merged", "#1 merged", "-"],
        ["refused", "rejected", "#2 rejected", "#2 unknown", "-"],
        ["wanting", "changes_requested", "#3 open", "#3 changes requested", "-"],
        ["lacks", "defined", "-", "-", "kernel request: #4 rejected, template request: manual"],
        ["waits", "waiting", "-", "-", "SGLang: #9 draft"],
    ]
    assert shown.splitlines()[7:] == [
        f"rejected: refused: dataset {HUB}/2 was closed without being merged (Not [31mlike [0m "
        "this. See 31m<b>@you</b> | ](javascript:alert(1))): reopen it there to go on with it",
        f"changes requested: wanting: coverage {GITHUB}/pull/3 is to be changed (Mark it 🟡.): "
        "push what is wanted to its branch, or stage it and "
        "`onboard publish --definitions wanting`",
        f"waiting: waits for {GITHUB}/pull/9",
        "said: lacks: kernel request: We will not.",
        "said: waits: SGLang: Soon.",
        "Report: 1 changes_requested, 1 defined, 1 existing, 1 merged, 1 rejected, 1 waiting",
        f"Manifest: {path}",
    ]


def test_json_has_everything(tmp_path: Path) -> None:
    write(tmp_path)
    (shown,) = json.loads(status("--workspace", tmp_path, "--json", code=3))
    assert shown["states"]["merged"] == 1
    kernels = {kernel["definition"]: kernel for kernel in shown["kernels"]}
    assert kernels.keys() == {entry["definition_name"] for entry in KERNELS}
    assert kernels["refused"]["upstream"] == {"dataset": UPSTREAM[f"{HUB}/2"]}
    assert kernels["refused"]["links"] == {
        "dataset": f"{HUB}/2",
        "coverage": f"{GITHUB}/pull/2",
    }
    assert kernels["lacks"]["upstream"]["template request"] == {"state": "manual"}


def test_the_newest_of_each_model(tmp_path: Path) -> None:
    write(tmp_path)
    assert "failed" in status(write(tmp_path, kernels=[{**KERNELS[1], "error": "x"}]), code=1)
    newest = write(tmp_path, date="2026-11-22", kernels=[KERNELS[1]])
    other = write(tmp_path, model_slug="n", kernels=[KERNELS[1]])
    (tmp_path / "onboard_notes.json").write_text("{")
    shown = status("--workspace", tmp_path)
    assert re.findall(r"Manifest: (.*)", shown) == [str(newest), str(other)]


@pytest.mark.parametrize(
    ("became", "state", "code", "goes_on"),
    [
        ("merged", "waiting", 3, f"waiting: waits for sources that have what is merged: {GITHUB}"),
        ("rejected", "rejected", 3, "reopen it there, or name another one with --sglang-pr"),
        ("changes_requested", "waiting", 3, "said: waits: SGLang: Why?"),
    ],
)
def test_what_sglang_says(tmp_path: Path, became: str, state: str, code: int, goes_on: str) -> None:
    upstream = {f"{GITHUB}/pull/9": {"state": became, "said": "Why?"}}
    shown = status(write(tmp_path, kernels=KERNELS[-1:], upstream=upstream), code=code)
    assert f"Report: 1 {state}" in shown
    assert goes_on in shown


def test_the_sites_are_asked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with GitHub(tmp_path / "hub") as github:
        repository = github.repository("a/b", {"README.md": b"#\n"})
        monkeypatch.setenv("ONBOARD_GITHUB_TOKEN", github.user("me"))
        options = {"publish": {"github_url": github.api}}
        files.write_text(tmp_path / "onboard.toml", tomli_w.dumps(options))
        lacks = {**KERNELS[4], "fi_issue_url": f"{github.url}/a/b/issues/1"}
        path = write(tmp_path, kernels=[lacks, KERNELS[1]], upstream=None)
        shown = status(path, "--ask")
        assert "onboard: warning: a/b: is not there" in shown
        assert f"warning: no token to ask with: {HUB}/1" in shown
        assert f"warning: {GITHUB}/pull/1: is no pull request or issue at {github.url}" in shown
        assert "kernel request: #1 unknown" in shown
        client = Github(base_url=github.api, auth=Auth.Token(github.user("me")))
        client.get_repo("a/b").create_issue("Please")
        github.close(repository, 1, "Done.")
        assert "kernel request: #1 closed" in status(path, "--ask")
        assert "kernel request: #1 closed" in status(path)


@given(st.text(max_size=60).map(lambda text: text + WORDS))
def test_reviewers_words_stay_words(words: str) -> None:
    upstream = {url: {**known, "said": words} for url, known in UPSTREAM.items()}
    run = RunManifest.model_validate(
        {
            "model_slug": "m",
            "hf_repo_id": None,
            "date": "2026-11-21",
            "kernels": KERNELS,
            "phase4": PULLS,
            "upstream": upstream,
        }
    )
    report = Report(run, Path("/w/onboard_m_20261121.json"))
    read = MarkdownIt("commonmark").enable("table")
    read.validateLink = lambda url: True  # type: ignore[method-assign]
    for text in (report.markdown(), *map(report.page, run.kernels)):
        tokens = [t for token in read.parse(text) for t in (token, *(token.children or ()))]
        assert not {t.type for t in tokens} & {"html_block", "html_inline", "image"}
        links = {str(t.attrs["href"]) for t in tokens if t.type == "link_open"}
        assert links <= upstream.keys() | {f"{GITHUB}/pull/2"}
    for entry in run.kernels:
        assert report.summary(entry).isprintable()
    for row in report.table():
        assert {row["dataset PR"], row["coverage PR"]} & {
            "-",
            "#1 merged",
            "#2 rejected",
            "#3 open",
        }
