"""What has to hold before a pull request is opened, with what a session on an H200 really left."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr
from typer.testing import CliRunner

from flows.cli import app
from tasks import manifest, ops
from tasks.coverage_doc import PATH, CoverageDocument
from tasks.define.reference_test import render as render_test
from tasks.define.staged import fingerprint, prove_again
from tasks.errors import DefinitionError, PublishError
from tasks.git import AUTHOR, git
from tasks.ops.base import KernelSpec
from tasks.publish import checklist, render
from tasks.publish.base import (
    BODY_LIMIT,
    Branch,
    Checklist,
    ChecklistError,
    Finding,
    Post,
    marker,
    text_of,
)
from tasks.publish.checklist import check_coverage, check_dataset
from tasks.publish.markdown import fit, fits, scrubbed, width
from tasks.publish.render import Subject
from tasks.settings import load_settings
from tasks.validate import bench
from tests.conftest import DATA
from tests.unit.test_repos import commit

NAME, OP_TYPE = "gqa_paged_decode_h8_kv2_d128_ps1", "gqa_paged"
DATASET = "flashinfer-trace"
DEFINITION = f"{DATASET}/definitions/{OP_TYPE}/{NAME}.json"
TEST = f"{DATASET}/tests/references/test_{NAME}.py"
ROWS = f"{DATASET}/workloads/{OP_TYPE}/{NAME}.jsonl"
BLOBS = f"{DATASET}/blob/workloads/{OP_TYPE}/{NAME}"
SOLUTIONS = f"{DATASET}/solutions/baseline/{OP_TYPE}/{NAME}"
TRACES = f"{DATASET}/traces/baseline/{OP_TYPE}/{NAME}.jsonl"
COLLECTED = f"collected/llama/{NAME}.json"
LOG = "collected/llama/sessions/tp1-ep1-ps1-paged-prefill-e3eb36f7/attempt-1/server.log"
MANIFEST = "onboard_llama_20261121.json"
OF_ALL = {"names", "definition", "tags", "reference test", "provenance", "file sizes"}
OF_ROWS = {"workloads", "blobs", "baseline", "traces", "collection log", "diversity"}
SECRET = "hf_" + "abcdEFGH" * 4


def _edit(path: Path, change: Callable[[Any], object]) -> None:
    """Change a JSON file that may be a hard link."""
    value = json.loads(path.read_text())
    change(value)
    path.unlink()
    path.write_text(json.dumps(value))


def _edit_lines(path: Path, change: Callable[[list[Any]], object]) -> None:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    change(lines)
    path.unlink()
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with what one session left of one definition, as phases 2 and 3 leave it."""
    root = tmp_path_factory.mktemp("served") / "workspace"
    with tarfile.open(DATA / "h200" / "served.tar.xz") as archive:
        archive.extractall(root, filter="data")
    entry = manifest.load(root / MANIFEST).kernels[0]
    test = render_test(KernelSpec.model_validate(entry.spec))
    (root / TEST).parent.mkdir(parents=True)
    (root / TEST).write_text(test)
    proved = fingerprint(json.loads((root / DEFINITION).read_text()), test)
    manifest.update_kernel(root / MANIFEST, NAME, phase2_fingerprint=proved)
    commit(root / "flashinfer-bench", PATH, (DATA / "flashinfer-bench" / PATH).read_text())
    return root


@pytest.fixture
def workspace(served: Path, tmp_path: Path) -> Path:
    shutil.copytree(served, tmp_path / "workspace", copy_function=os.link)
    return tmp_path / "workspace"


@pytest.fixture(autouse=True)
def _no_torch(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """What takes torch to say of a dataset is tested with the validator."""
    if not request.node.get_closest_marker("bench_extra"):
        said = {"reference_build": "not run", "flashinfer_bench": {"version": None, "models": ""}}
        monkeypatch.setattr(bench, "ask", lambda *_: said)


def subject(workspace: Path) -> Subject:
    run = manifest.load(workspace / MANIFEST)
    return Subject.of(run, run.kernels[0], load_settings(workspace))


def edit_entry(workspace: Path, **fields: Any) -> None:
    manifest.update_kernel(workspace / MANIFEST, NAME, **fields)


def failed(found: Checklist) -> dict[str, str]:
    return {item.item: item.message for item in found.failed}


def warned(found: Checklist) -> dict[str, str]:
    return {item.item: item.message for item in found.findings if not item.ok and not item.blocks}


def alone(workspace: Path, **fields: Any) -> None:
    """Make it a kernel that FlashInfer lacks."""
    edit_entry(workspace, fi_status="fi_missing", sgl_status="n/a", **fields)
    for folder in ("workloads", "blob", "solutions", "traces"):
        shutil.rmtree(workspace / DATASET / folder)
    shutil.rmtree(workspace / "collected")
    _edit(workspace / DEFINITION, lambda value: value["tags"].remove("status:verified"))
    _edit(workspace / DEFINITION, lambda value: value["tags"].append("status:unverified"))


def test_all_items_hold_of_what_a_session_left(workspace: Path) -> None:
    found = check_dataset(subject(workspace)).require()
    assert {item.item for item in found.findings} == OF_ALL | OF_ROWS
    assert all(item.ok for item in found.findings)
    said = {item.item: item.message for item in found.findings}
    assert said["workloads"] == f"12 rows of {NAME}"
    assert said["traces"] == "all 12 PASSED"
    assert said["reference test"] == "green in 2 cases, when the definition was made"
    assert said["diversity"] == "12 batch sizes (1 to 32), 113 KV lengths (265 to 522)"
    assert "12 evaluations" in found.validation[0]
    assert "The server is fired up and ready to roll!" in found.log
    assert "----- launch 1: served -----" in found.log


def test_the_definition_of_a_kernel_that_flashinfer_lacks(workspace: Path) -> None:
    alone(workspace)
    found = check_dataset(subject(workspace)).require()
    assert {item.item for item in found.findings} == OF_ALL | {"nothing else"}
    assert not found.log
    (workspace / SOLUTIONS).mkdir(parents=True)
    (workspace / SOLUTIONS / "flashinfer_wrapper_1.json").write_text("{}")
    assert "nothing else" in failed(check_dataset(subject(workspace)))


def test_a_kernel_that_waits_has_nothing_to_publish(workspace: Path) -> None:
    edit_entry(workspace, sgl_status="sgl_missing", sglang_pr_url="https://x.y/1")
    with pytest.raises(ChecklistError, match="is waiting: there is nothing to publish of it yet"):
        check_dataset(subject(workspace)).require()


def _tag(change: Callable[[list[str]], object]) -> Callable[[Path], None]:
    return lambda root: _edit(root / DEFINITION, lambda value: change(value["tags"]))


def _drop(path: str) -> Callable[[Path], None]:
    return lambda root: (root / path).unlink()


def _blob(root: Path) -> Path:
    return min((root / BLOBS).iterdir())


def _solution(change: Callable[[Any], object]) -> Callable[[Path], None]:
    return lambda root: _edit(next((root / SOLUTIONS).iterdir()), change)


def _realism(**fields: Any) -> Callable[[Path], None]:
    def change(value: Any) -> None:
        value["provenance"]["realism"] |= fields

    return lambda root: _edit(root / COLLECTED, change)


def _copied_reference(root: Path) -> None:
    reference = json.loads((root / DEFINITION).read_text())["reference"]
    source = f"{reference}\nimport flashinfer\n"
    _edit(root / DEFINITION, lambda value: value.update(reference=source))
    _solution(lambda value: value["sources"][0].update(content=f"# ours\n{source}"))(root)


def _unlinked_trace(lines: list[Any]) -> None:
    lines[3]["evaluation"]["status"] = "RUNTIME_ERROR"


DAMAGE: dict[str, tuple[str, str, Callable[[Path], None]]] = {
    "no definition": ("definition", "is not staged; run onboard define", _drop(DEFINITION)),
    "no JSON": ("definition", "not JSON", lambda r: _rewrite(r / DEFINITION, "{")),
    "no outputs": (
        "definition",
        "outputs",
        lambda r: _edit(r / DEFINITION, lambda value: value.pop("outputs")),
    ),
    "unverified": ("tags", "lacks status:verified", _tag(lambda t: t.remove("status:verified"))),
    "two states": ("tags", "status:unverified", _tag(lambda t: t.append("status:unverified"))),
    "no API": ("tags", "lacks fi_api:...", _tag(lambda t: t.pop(3))),
    "no model": ("tags", "model:llama", _tag(lambda t: t.remove("model:llama"))),
    "no tp": ("tags", "lacks tp:1", _tag(lambda t: t.remove("tp:1"))),
    "no test": ("reference test", "is not staged", _drop(TEST)),
    "test that is no Python": (
        "reference test",
        "run onboard define again",
        lambda r: _rewrite(r / TEST, "def"),
    ),
    "no SHA": ("provenance", "SGLang's commit", lambda r: _unset(r, "repo_shas", "sglang")),
    "no versions": (
        "provenance",
        "no versions",
        lambda r: edit_entry(r, phase2_versions=None),
    ),
    "no rows": ("workloads", "has no rows; run onboard collect", _drop(ROWS)),
    "another definition's row": (
        "workloads",
        "the path says",
        lambda r: _edit_lines(r / ROWS, lambda lines: lines[0].update(definition="other")),
    ),
    "a row less than was collected": (
        "workloads",
        "lacks the collected rows",
        lambda r: _edit_lines(r / ROWS, lambda lines: lines.pop()),
    ),
    "missing blob": ("blobs", "which is not there", lambda r: _blob(r).unlink()),
    "orphan": (
        "blobs",
        "no row names",
        lambda r: shutil.copy(_blob(r), r / BLOBS / f"{NAME}_x.safetensors"),
    ),
    "blob elsewhere": (
        "blobs",
        "which is not there",
        lambda r: _edit_lines(
            r / ROWS,
            lambda lines: lines[0]["workload"]["inputs"]["kv_indptr"].update(
                path="./blob/../../etc/passwd"
            ),
        ),
    ),
    "half a blob": (
        "workloads",
        "truncated",
        lambda r: _rewrite(_blob(r), _blob(r).read_bytes()[:-8]),
    ),
    "no baseline": ("baseline", "is empty", lambda r: shutil.rmtree(r / SOLUTIONS)),
    "baseline of another name": (
        "baseline",
        "",
        lambda r: next((r / SOLUTIONS).iterdir()).rename(r / SOLUTIONS / "torch_1.json"),
    ),
    "baseline without FlashInfer": (
        "baseline",
        "does not import flashinfer",
        _solution(
            lambda value: value["sources"][0].update(
                content="def run(q, k_cache, v_cache, kv_indptr, kv_indices, sm_scale):\n    pass\n"
            )
        ),
    ),
    "the reference as baseline": ("baseline", "is the reference itself", _copied_reference),
    "failed trace": (
        "traces",
        "1 x RUNTIME_ERROR of 12",
        lambda r: _edit_lines(r / TRACES, _unlinked_trace),
    ),
    "row without trace": (
        "traces",
        "have no trace",
        lambda r: _edit_lines(r / TRACES, lambda lines: lines.pop()),
    ),
    "lost traces": ("traces", "is not staged", _drop(TRACES)),
    "damaged traces": ("traces", "line 1 is not JSON", lambda r: _rewrite(r / TRACES, "{\n")),
    "no provenance": ("collection log", "nothing says where", _drop(COLLECTED)),
    "no log": (
        "collection log",
        "are gone",
        lambda r: shutil.rmtree(r / "collected" / "llama" / "sessions"),
    ),
    "tiny contexts": ("diversity", "uniform", _realism(warnings=["uniform tiny contexts: none"])),
}


def _rewrite(path: Path, content: str | bytes) -> None:
    path.unlink()
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def _unset(root: Path, *keys: str) -> None:
    def change(value: Any) -> None:
        for key in keys[:-1]:
            value = value[key]
        value[keys[-1]] = None

    _edit(root / MANIFEST, change)


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_does_not_hold_is_not_opened_and_says_why(
    workspace: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checklist, "prove_again", lambda *_: ["a case"])
    item, message, change = DAMAGE[damage]
    change(workspace)
    found = check_dataset(subject(workspace))
    assert message in failed(found)[item]
    assert not found.validation
    with pytest.raises(ChecklistError, match=item) as caught:
        found.require()
    assert isinstance(caught.value, PublishError)
    assert NAME in str(caught.value)


def test_a_blob_that_the_hub_does_not_take(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = _blob(workspace)
    data = blob.read_bytes()
    blob.unlink()
    with blob.open("wb") as stream:  # sparse: no bytes are written
        stream.write(data)
        stream.truncate(checklist.LARGEST_FILE + 1)
    assert blob.name in failed(check_dataset(subject(workspace)))["file sizes"]


def test_links_are_refused(workspace: Path) -> None:
    blob = _blob(workspace)
    blob.unlink()
    blob.symlink_to("/etc/passwd")
    assert "is a symbolic link" in failed(check_dataset(subject(workspace)))["names"]
    shutil.rmtree(workspace / BLOBS)
    (workspace / BLOBS).symlink_to("/etc")
    assert "leads out of" in failed(check_dataset(subject(workspace)))["names"]


def test_a_baseline_that_could_not_be_evaluated_only_warns(workspace: Path) -> None:
    (workspace / TRACES).unlink()
    edit_entry(workspace, baseline_status="not evaluated (no GPU here)")
    found = check_dataset(subject(workspace)).require()
    assert "not evaluated (no GPU here)" in warned(found)["traces"]
    post, _ = render.dataset_pull_request(subject(workspace), found)
    assert "- [ ] traces: not evaluated (no GPU here)" in post.body
    assert "- [x] blobs: 12 blobs" in post.body


def test_rows_of_calls_that_somebody_recorded_only_warn(workspace: Path) -> None:
    _edit(workspace / COLLECTED, lambda value: value["provenance"].update(sessions=[]))
    shutil.rmtree(workspace / "collected" / "llama" / "sessions")
    found = check_dataset(subject(workspace)).require()
    assert "169 calls that somebody recorded" in warned(found)["collection log"]
    assert not found.log
    post, _ = render.dataset_pull_request(subject(workspace), found)
    assert "## SGLang Collection Log" in post.body
    assert "there is no log of SGLang" in post.body


def test_the_only_way_in_which_a_kernel_is_called_need_not_be_diverse(workspace: Path) -> None:
    one = json.loads((workspace / COLLECTED).read_text())["provenance"]["realism"]["distinct"]
    _realism(warnings=["one batch size: all 1 rows have 4"], distinct=one | {"rows": 1})(workspace)
    assert "one batch size" in warned(check_dataset(subject(workspace)).require())["diversity"]


def test_a_staged_definition_that_is_not_what_was_proved_is_proved_again(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[KernelSpec] = []

    def again(definition: Any, test: str, spec: KernelSpec) -> list[str]:
        asked.append(spec)
        if "wrong" in definition["reference"]:
            raise DefinitionError("proof: one sequence: it is wrong")
        return ["one sequence"]

    monkeypatch.setattr(checklist, "prove_again", again)
    _edit(workspace / DEFINITION, lambda value: value.update(description="Said in other words."))
    check_dataset(subject(workspace)).require()
    assert not asked  # what is described is the same
    _edit(workspace / DEFINITION, lambda value: value.update(reference=value["reference"] + "\n"))
    found = check_dataset(subject(workspace)).require()
    assert [spec.name for spec in asked] == [NAME]
    assert "run again for this pull request" in found.reference_test
    _edit(
        workspace / DEFINITION, lambda value: value.update(reference=value["reference"] + "#wrong")
    )
    said = failed(check_dataset(subject(workspace)))["reference test"]
    assert "is not green: proof: one sequence: it is wrong" in said
    edit_entry(workspace, spec=None)
    assert (
        "nothing records that it passed"
        in failed(check_dataset(subject(workspace)))["reference test"]
    )


@pytest.mark.bench_extra
def test_proving_again_runs_the_staged_reference_in_the_jail(served: Path) -> None:
    definition = json.loads((served / DEFINITION).read_text())
    test = (served / TEST).read_text()
    spec = KernelSpec.model_validate(manifest.load(served / MANIFEST).kernels[0].spec)
    assert prove_again(definition, test, spec) == ["one sequence", "several sequences"]
    wrong = definition["reference"].replace("def run(", "def run_(") + (
        "\n\ndef run(*args):\n    output, lse = run_(*args)\n    return output + 1, lse\n"
    )
    with pytest.raises(DefinitionError, match="proof: one sequence"):
        prove_again(definition | {"reference": wrong}, test, spec)
    thief = f"open({str(served / 'stolen')!r}, 'w')\n{test}"
    with pytest.raises(DefinitionError, match="not of the form that phase 2 writes"):
        prove_again(definition, thief, spec)
    family = ops.op_module(OP_TYPE).reference_test + f"\nopen({str(served / 'stolen')!r}, 'w')"
    with pytest.raises(DefinitionError):
        prove_again(definition, render_test(spec, family), spec)
    assert not (served / "stolen").exists()


# The coverage document.


def coverage(workspace: Path, dataset_pr: str, **options: Any) -> tuple[Checklist, Branch, Post]:
    about = subject(workspace)
    clone, edited = workspace / "flashinfer-bench", workspace / "edited.mdx"
    post, branch = render.coverage_pull_request(about, clone, dataset_pr, edited)
    return check_coverage(about, post, branch, dataset_pr, **options), branch, post


URL = "https://huggingface.co/datasets/flashinfer-ai/flashinfer-trace/discussions/7"


def test_coverage_holds(workspace: Path) -> None:
    found, branch, post = coverage(workspace, URL, upstream=True)
    assert all(item.ok for item in found.require().findings)
    assert list(branch.files) == [PurePosixPath(PATH)]
    assert URL in post.body
    early, _, post = coverage(workspace, "")
    assert list(warned(early.require())) == ["dataset pull request"]
    assert "Dataset pull request: to follow" in post.body


def test_a_link_into_the_outbox_is_no_link_upstream(workspace: Path) -> None:
    url = (workspace / "outbox" / "pull-requests" / f"{NAME}.dataset.md").as_uri()
    found, branch, post = coverage(workspace, url)
    assert not found.failed
    assert str(workspace) not in post.body + branch.message
    found, _, _ = coverage(workspace, url, upstream=True)
    assert "nobody upstream finds it" in failed(found)["dataset pull request"]


def test_the_kernel_request_is_linked_where_there_has_to_be_one(workspace: Path) -> None:
    alone(workspace)
    assert "was not requested" in failed(coverage(workspace, URL)[0])["kernel request"]
    edit_entry(workspace, fi_issue_url="https://github.com/flashinfer-ai/flashinfer/issues/9")
    assert not coverage(workspace, URL)[0].failed


def test_edits_that_are_more_than_a_row(workspace: Path) -> None:
    about = subject(workspace)
    _, branch, post = coverage(workspace, URL)
    edited = branch.files[PurePosixPath(PATH)]
    good = edited.read_text()

    def said(text: str, **more: Path) -> dict[str, str]:
        edited.write_text(text)
        changed = {**branch.files, **{PurePosixPath(name): path for name, path in more.items()}}
        other = Branch(branch.name, branch.clone, branch.message, changed)
        return failed(check_coverage(about, post, other, URL))

    assert said(good) == {}
    assert "may change docs/model_coverage.mdx only" in said(good, README=edited)["single file"]
    assert (
        "its row is 🟡, not ✅"
        in said(good.replace(f"`{NAME}` | {OP_TYPE} | ✅", f"`{NAME}` | {OP_TYPE} | 🟡"))["row"]
    )
    document = CoverageDocument.parse(good)
    heading, other = next((row.model, row.name) for row in document.rows() if row.status == "❌")
    document.mark(heading, other, OP_TYPE, "✅")
    assert f"changes the rows of {other}" in said(document.render())["row"]
    counted = good.replace("**Coverage**: 1 / 1", "**Coverage**: 2 / 2")
    assert counted != good
    assert "says 2 / 2" in said(counted)["counts"]
    assert "document" in said("nothing of it\n")
    assert "is not there" in said((DATA / "flashinfer-bench" / PATH).read_text())["row"]


def test_an_edit_that_the_repositorys_hooks_would_change(workspace: Path) -> None:
    clone = workspace / "flashinfer-bench"
    hooks = "repos: [{repo: https://x.y/hooks, rev: v5, hooks: [{id: trailing-whitespace}]}]\n"
    (clone / ".pre-commit-config.yaml").write_text(hooks)
    git("add", ".pre-commit-config.yaml", cwd=clone)
    git("commit", "--quiet", "--message", "Hooks", cwd=clone, env=AUTHOR)
    _, branch, post = coverage(workspace, URL)
    edited = branch.files[PurePosixPath(PATH)]
    assert not check_coverage(subject(workspace), post, branch, URL).failed
    lines = edited.read_text().splitlines(keepends=True)
    row = next(number for number, line in enumerate(lines) if NAME in line)
    lines[row] = lines[row].rstrip("\n") + "  \n"
    edited.write_text("".join(lines))
    told = failed(check_coverage(subject(workspace), post, branch, URL))["clean"]
    assert f"trailing-whitespace: {PATH}:{row + 1}" in told


# The log.


def test_the_log_is_published_whole_and_scrubbed(workspace: Path) -> None:
    log = workspace / LOG
    told = f"see {workspace}/onboard.toml with {SECRET}, api_key='open-sesame', s3cr3t-of-ours"
    _rewrite(log, log.read_text() + f"\x1b[1;33mwarned\x1b[0m\n{told} in /home/me/x\n")
    about = subject(workspace)
    about = Subject(**{**vars(about), "secrets": (SecretStr("s3cr3t-of-ours"),)})
    found = check_dataset(about).require()
    post, branch = render.dataset_pull_request(about, found)
    text = text_of(post)
    assert post.attached == ""
    assert "see WORKSPACE/onboard.toml with , api_key=***,  in ~/x" in text
    assert "\nwarned\n" in text
    for leak in (SECRET, "open-sesame", "s3cr3t-of-ours", str(workspace), "/tmp/ws", "/home/me"):
        assert leak not in text
    for line in ("model_path='MODEL'", "Decode batch", "fired up and ready to roll"):
        assert line in text
    assert width(text) <= BODY_LIMIT
    assert not any(path.parts[0] == "logs" for path in branch.files)


def test_a_log_too_long_for_the_site_is_attached(workspace: Path) -> None:
    log = workspace / LOG
    lines = [f"[2026-11-21 15:49:24] Decode batch {number} ✅" for number in range(4000)]
    _rewrite(log, log.read_text() + "\n".join(lines) + "\n")
    found = check_dataset(subject(workspace)).require()
    post, branch = render.dataset_pull_request(subject(workspace), found)
    attached = PurePosixPath("logs", OP_TYPE, f"{NAME}.log")
    assert post.attached == str(attached)
    assert branch.files[attached].read_text().count("Decode batch") >= 4000
    text = text_of(post)
    assert 0.99 * BODY_LIMIT < width(text) <= BODY_LIMIT
    assert f"left out here; the whole log is `{attached}` in this pull request" in text
    assert "===== session tp1-ep1-ps1-paged-prefill =====" in text
    assert "Decode batch 3999" in text
    assert "Decode batch 1500 " not in text
    assert text.endswith(f"{marker(NAME, 'dataset')}\n")
    assert text.count("<details>") == text.count("</details>") == 1


TEXTS = st.text(st.sampled_from("ab\n`<!- onboard:🟡✅\t"), max_size=300)


@given(TEXTS, TEXTS, st.integers(0, 700))
def test_a_text_is_never_longer_than_the_site_takes(body: str, log: str, limit: int) -> None:
    if width(body.rstrip()) > limit:
        with pytest.raises(ValueError, match="characters long"):
            fit(body, log, limit, "link")
        return
    text = fit(body, log, limit, "link")
    assert width(text) <= limit
    assert text.startswith(body.rstrip())
    added = text[len(body.rstrip()) :]
    assert "<!-- onboard:" not in added
    assert fits(body, log, limit) == (
        "left out here" not in added and (not log.strip() or bool(added))
    )
    fences = [
        line for line in added.splitlines() if line.startswith("```") or line.endswith("```text")
    ]
    if added:
        assert added.startswith("\n\n<details>\n<summary>Log, ")
        assert added.endswith("</details>")
        assert fences


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"Authorization: Bearer {SECRET}", "Authorization: ***"),
        (
            "ServerArgs(api_key='x', admin_api_key=None, tp_size=1)",
            "ServerArgs(api_key=***, admin_api_key=None, tp_size=1)",
        ),
        ('{"hf_token": "x", "a": 1}', '{"hf_token": ***, "a": 1}'),
        (
            "max_total_num_tokens=525, tokenizer_path='x'",
            "max_total_num_tokens=525, tokenizer_path='x'",
        ),
        ("https://me:word@host/x", "https://host/x"),
        ("in /root/.cache and /home/some.one, /Users/x/y", "in ~/.cache and ~, ~/y"),
        ("/rooted and /srv/model/a, /srv/model2", "/rooted and MODEL/a, /srv/model2"),
        ("a\x1b[2Kb\x00c\x07\td", "abc\td"),
    ],
)
def test_scrubbed(text: str, shown: str) -> None:
    assert scrubbed(text, (), {"/srv/model": "MODEL"}) == shown


def test_a_body_that_is_too_long_is_an_error_and_a_title_is_cut() -> None:
    post = Post("k", "dataset", "a/b", "t", "x" * BODY_LIMIT)
    with pytest.raises(PublishError, match="k: the text of its dataset is 65536 characters long"):
        text_of(post)
    assert not Finding("a", ok=False, message="", blocks=False).failed


# The command.


@pytest.fixture
def two(workspace: Path) -> Iterator[Path]:
    """A run with a second definition that lacks everything."""

    def add(value: Any) -> None:
        value["kernels"].append(value["kernels"][0] | {"definition_name": "other_one"})

    _edit(workspace / MANIFEST, add)
    return workspace


def check(workspace: Path, *more: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["publish", "--check", "--workspace", str(workspace), *more])
    return result.exit_code, result.stdout


def test_the_command_checks_every_definition_and_opens_nothing(two: Path) -> None:

    def there() -> list[Path]:
        found = (path for path in two.rglob("*") if path.suffix != ".lock")
        return sorted(path for path in found if ".git" not in path.parts)

    before = there()
    code, printed = check(two)
    assert code == 1
    assert f"{NAME}: ready" in printed
    assert "[x] dataset, traces: all 12 PASSED" in printed
    assert "[?] coverage, dataset pull request: " in printed
    assert "other_one: not ready" in printed
    assert "[!] dataset, definition: " in printed
    assert "1 of 2 definitions may be published" in printed
    assert there() == before
    code, printed = check(two, "--definitions", NAME, "--json")
    assert code == 0
    (run,) = json.loads(printed)
    (definition,) = run["definitions"]
    assert definition["definition"] == NAME
    assert definition["ready"] is True
    assert {item["item"] for item in definition["dataset"]} == OF_ALL | OF_ROWS
    assert definition["coverage"][0].keys() == {"item", "ok", "blocks", "message"}


def test_the_command_names_what_is_wrong_with_its_input(workspace: Path, tmp_path: Path) -> None:
    assert check(workspace, "--definitions", "nobody")[0] == 2
    assert check(workspace, "--definitions", " , ")[0] == 2
    assert check(tmp_path / "empty")[0] == 2
    manifest.record_pull_request(
        workspace / MANIFEST, NAME, flashinfer_trace_pr=URL, flashinfer_bench_pr=URL
    )
    assert check(workspace) == (0, "nothing to publish\n")
    result = CliRunner().invoke(app, ["publish", "--manifest", str(workspace / MANIFEST)])
    assert (result.exit_code, result.stdout) == (0, "nothing to publish\n")
