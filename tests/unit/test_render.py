"""What is asked of upstream: the texts, whose they are, and what a definition says of them."""

from __future__ import annotations

import datetime as dt
import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.report import Report
from tasks import manifest, ops
from tasks.errors import PublishError
from tasks.git import git
from tasks.manifest import KernelEntry, RunManifest
from tasks.model import Serving, read_config
from tasks.ops.base import KernelSpec
from tasks.publish import render, requested
from tasks.publish import task as steps
from tasks.publish.markdown import cell, code, fenced, prose
from tasks.publish.outbox import Outbox
from tasks.publish.render import Subject
from tasks.publish.sites import Site, sglang_site
from tests.conftest import DATA
from tests.unit.test_repos import commit

DECODE, PREFILL = "lightning_attn_decode_h8_d128", "lightning_attn_prefill_h8_d128"
FILE = "python/sglang/kernels/ops/attention/linear/lightning_attn.py"
HOSTILE = "a|b `c` \n| x | <!-- onboard:k:dataset --> --> <img src=x> @someone ](http://x) ``` \\"
SECRET = "hf_" + "abcdEFGH" * 4
API = "flashinfer.norm.rmsnorm"


def lightning() -> list[KernelSpec]:
    model = read_config(DATA / "configs" / "MiniMaxAI--MiniMax-M1-80k.json")
    found = ops.op_module("lightning_attn").required(model, Serving(8, 1, "test", (1,)))
    return [spec for spec in found if isinstance(spec, KernelSpec)]


def entry_of(spec: KernelSpec, **fields: Any) -> dict[str, Any]:
    return {
        "definition_name": spec.name,
        "op_type": spec.op_type,
        "phase1_status": "new",
        "fi_status": "fi_missing",
        "fi_trace_template": False,
        "sgl_status": "n/a",
        "spec": spec.model_dump(mode="json"),
        "evidence": [
            *spec.origin,
            "FlashInfer 0a1b2c3: no linear attention; of 84 APIs none named like 'lightning'",
            f"SGLang 4d5e6f7: {FILE}",
        ],
        **fields,
    }


def norm(name: str, **fields: Any) -> dict[str, Any]:
    width = int(name.rpartition("h")[2])
    spec = KernelSpec(
        name=name,
        op_type="rmsnorm",
        variant="rmsnorm",
        axes={"hidden_size": width},
        constants={"eps": 1e-6},
    )
    found = f"FlashInfer 0a1b2c3: {API} at flashinfer/norm/__init__.py:114, without a"
    return entry_of(
        spec,
        **{
            "fi_status": "fi_supported",
            "sgl_status": "sgl_integrated",
            "evidence": [f"{found} trace template"],
        }
        | fields,
    )


def write(workspace: Path, *kernels: dict[str, Any], slug: str = "minimax-m1", **top: Any) -> Path:
    run = {
        "model_slug": slug,
        "hf_repo_id": "MiniMaxAI/MiniMax-M1-80k",
        "date": "2026-01-01",
        "repo_shas": {"sglang": "4d5e6f7", "flashinfer": "0a1b2c3"},
        "kernels": list(kernels),
        **top,
    }
    path = workspace / manifest.file_name(slug, dt.date(2026, 1, 1))
    path.write_text(json.dumps(run))
    return path


def subject(path: Path, name: str) -> Subject:
    return steps._subject(path, name)[0]


def issue(url: str | None) -> tuple[dict[str, Any], str]:
    assert url is not None
    _, head, body = Path(url.removeprefix("file://")).read_text().split("---\n", 2)
    return yaml.safe_load(head), body


def table(body: str, heading: str) -> list[list[str]]:
    """Return the cells of the table below a line."""
    lines = body[body.index(heading) :].splitlines()
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if line.startswith("|")]
    return [[text.strip() for text in row] for row in rows]


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A workspace with a clone of an SGLang that has the kernel."""
    source = "import torch\n\n\ndef _lightning_step():\n    pass\n\n\ndef lightning_attention():\n"
    commit(tmp_path / "sglang", FILE, f"{source}    pass\n")
    return tmp_path


def stage(workspace: Path, spec: KernelSpec, **fields: Any) -> Path:
    body = ops.op_module(spec.op_type).definition(spec)
    file = workspace / "flashinfer-trace" / "definitions" / spec.op_type / f"{spec.name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"name": spec.name, "op_type": spec.op_type, **body, **fields}))
    return file


@pytest.fixture(autouse=True)
def _no_prefect(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps are called as plain functions; only their logger is Prefect's."""
    import logging

    monkeypatch.setattr(steps, "get_run_logger", lambda: logging.getLogger("test"))


def request_kernel(path: Path, name: str) -> str:
    return str(steps.request_kernel.fn(path, name))


def request_template(path: Path, name: str) -> str:
    return str(steps.request_template.fn(path, name))


def test_kernel_request_of_lightning_attention(workspace: Path) -> None:
    specs = {spec.name: spec for spec in lightning()}
    path = write(workspace, *(entry_of(spec) for spec in specs.values()))
    staged = stage(workspace, specs[PREFILL])
    url = request_kernel(path, PREFILL)
    assert manifest.load(path).kernel(PREFILL).fi_issue_url == url
    head, body = issue(url)
    assert head["repository"] == "flashinfer-ai/flashinfer"
    # The model needs two kernels of this op type: their issues can be told apart.
    assert head["title"] == f"Kernel request: lightning_attn for MiniMax-M1-80k ({PREFILL})"
    assert head["labels"] == "enhancement, kernel-request"
    for said in (
        "| Model | MiniMax-M1-80k (MiniMaxAI/MiniMax-M1-80k) |",
        "| Op type | `lightning_attn` |",
        f"| Definition | `{PREFILL}` |",
        f"`definitions/lightning_attn/{PREFILL}.json`",
        f"SGLang: `{FILE}:8` at 4d5e6f7",
        f"https://github.com/sgl-project/sglang/blob/4d5e6f7/{FILE}#L8",
        "https://huggingface.co/MiniMaxAI/MiniMax-M1-80k",
        "- Dataset: pull request to follow",
        "- [ ] A kernel",
        "`@flashinfer_api(trace=...)`",
        "- [ ] A unit test",
        "none named like 'lightning'",
    ):
        assert said in body
    definition = json.loads(staged.read_text())
    rows = table(body, "### Parameters")
    for name, axis in definition["axes"].items():
        value = str(axis["value"]) if axis["type"] == "const" else "variable"
        assert [f"`{name}`", value, cell(axis["description"])] in rows
    for role in ("input", "output"):
        for name, spec in definition[f"{role}s"].items():
            shape = ", ".join(spec["shape"] or ()) or "scalar"
            meaning = cell(spec["description"])
            assert [f"`{name}` ({role})", cell(shape), spec["dtype"], meaning] in rows
    assert definition["reference"].rstrip() in body
    assert "There is none yet" not in body
    assert str(workspace) not in staged.read_text()
    assert str(workspace) not in body


def test_the_only_kernel_of_its_op_type_has_the_plain_title(workspace: Path) -> None:
    path = write(workspace, entry_of(lightning()[0]))
    name = lightning()[0].name
    assert render.kernel_request(subject(path, name)).title == (
        "Kernel request: lightning_attn for MiniMax-M1-80k"
    )


def test_the_definition_says_where_the_kernel_was_requested_once(workspace: Path) -> None:
    spec = next(spec for spec in lightning() if spec.name == DECODE)
    path = write(workspace, entry_of(spec))
    staged = stage(workspace, spec)
    plain = json.loads(staged.read_text())
    for _ in range(2):
        request_kernel(path, DECODE)
        described = json.loads(staged.read_text())
        sentence = f"Kernel request: outbox/issues/{DECODE}.kernel-request.md."
        assert described == plain | {"description": f"{plain['description']} {sentence}"}
    assert len(git("log", "--format=%s", cwd=workspace / "outbox").splitlines()) == 1

    # It was filed by hand since: kept, and said in place of the other address.
    filed = "https://github.com/flashinfer-ai/flashinfer/issues/999"
    manifest.update_kernel(path, DECODE, fi_issue_url=filed)
    assert request_kernel(path, DECODE) == filed
    text = json.loads(staged.read_text())["description"]
    assert text == f"{plain['description']} Kernel request: {filed}."
    # The request itself does not quote the sentence.
    assert "Kernel request: http" not in render.kernel_request(subject(path, DECODE)).body


@pytest.mark.parametrize(
    "before",
    [
        "",
        "Does a thing.",
        "Kernel request: outbox/issues/a.kernel-request.md.",
        "Kernel request: a.",
    ],
)
def test_with_request_is_idempotent(before: str) -> None:
    once = requested.with_request(before, "https://x.y/issues/1")
    assert requested.with_request(once, "https://x.y/issues/1") == once
    assert requested.with_request(once, "https://x.y/2").count("://") == 1
    assert once.endswith("Kernel request: https://x.y/issues/1.")
    assert requested.without_request(once) == requested.without_request(before)


def test_public_address(tmp_path: Path) -> None:
    inside = (tmp_path / "outbox" / "issues" / "k v.md").as_uri()
    assert requested.public_address(inside, tmp_path) == "outbox/issues/k v.md"
    moved = "file:///home/somebody/old/outbox/issues/k.md"
    assert requested.public_address(moved, tmp_path) == "outbox/issues/k.md"
    assert requested.public_address("https://x.y/1", tmp_path) == "https://x.y/1"


def test_another_model_gets_the_same_issue_and_its_text_stays(workspace: Path) -> None:
    spec = lightning()[0]
    first = write(workspace, entry_of(spec))
    second = write(workspace, entry_of(spec), slug="other", hf_repo_id="somebody/other")
    url = request_kernel(first, spec.name)
    text = issue(url)
    assert request_kernel(second, spec.name) == url
    assert request_kernel(first, spec.name) == url
    assert issue(url) == text
    assert len(git("log", "--format=%s", cwd=workspace / "outbox").splitlines()) == 1


def test_template_request(workspace: Path) -> None:
    path = write(workspace, norm("rmsnorm_h512"))
    spec = KernelSpec.model_validate(manifest.load(path).kernels[0].spec)
    definition = json.loads(stage(workspace, spec).read_text())
    url = request_template(path, "rmsnorm_h512")
    assert manifest.load(path).kernel("rmsnorm_h512").fi_trace_template_request_url == url
    head, body = issue(url)
    assert Path(url).name == f"{API}.template-request.md"
    assert head["title"] == f"trace: add @flashinfer_api(trace=...) for {API}"
    assert head["labels"] == "enhancement, flashinfer-trace"
    assert "`flashinfer/norm/__init__.py:114` (FlashInfer 0a1b2c3)" in body
    assert "`definitions/rmsnorm/rmsnorm_h512.json`" in body
    quoted = re.search(r"<details>.*```json\n(.*?)\n```\n\n</details>", body, re.DOTALL)
    assert quoted
    assert json.loads(quoted[1]) == definition
    for said in ("TraceTemplate", "fi_trace(...)", "trace tests pass"):
        assert said in body
    assert f"<!-- onboard:{API}:template-request -->" in body


def test_one_template_request_for_all_kernels_of_an_api(workspace: Path) -> None:
    """Many at once, of two models: one file, one commit, the text of whoever was first."""
    names = [f"rmsnorm_h{width}" for width in (128, 256, 512, 1024)]
    paths = [
        write(workspace, *(norm(name) for name in names), slug=slug) for slug in ("one", "two")
    ]
    urls: list[str] = []
    threads = [
        threading.Thread(target=lambda p=path, n=name: urls.append(request_template(p, n)))
        for path in paths
        for name in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(urls) == 8
    assert len(set(urls)) == 1
    text = issue(urls[0])
    for path in paths:
        for name in names:
            assert request_template(path, name) == urls[0]
            assert manifest.load(path).kernel(name).fi_trace_template_request_url == urls[0]
    assert issue(urls[0]) == text
    assert len(git("log", "--format=%s", cwd=workspace / "outbox").splitlines()) == 1


def test_the_api_is_found_without_an_op_module(workspace: Path) -> None:
    bare = norm("rmsnorm_h512") | {"spec": None, "op_type": "unheard_of"}
    path = write(workspace, bare)
    post = render.template_request(subject(path, "rmsnorm_h512"))
    assert post.key == API
    assert "There is none yet" in post.body
    path = write(workspace, bare | {"evidence": None})
    with pytest.raises(PublishError, match="which FlashInfer API runs it is not known"):
        render.template_request(subject(path, "rmsnorm_h512"))


def test_a_kernel_nobody_has_described_is_requested_all_the_same(workspace: Path) -> None:
    bare = entry_of(lightning()[0], evidence=None, phase2_status="needs_reference")
    path = write(workspace, bare | {"spec": None, "op_type": "unheard_of"})
    head, body = issue(request_kernel(path, bare["definition_name"]))
    assert head["title"] == "Kernel request: unheard_of for MiniMax-M1-80k"
    assert "There is none yet. Needed is a PyTorch `run()`" in body
    assert "- [ ] A reference (PyTorch)" in body
    assert "Not known yet: no op module describes `unheard_of`" in body
    assert "SGLang: has no implementation" in body
    assert not (workspace / "flashinfer-trace").exists()


def test_the_request_is_brought_up_to_date_when_the_reference_is_there(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, spec = ops.op_module("lightning_attn"), lightning()[0]
    known = module.definition(spec)
    bare = {key: value for key, value in known.items() if key != "reference"}
    monkeypatch.setattr(type(module), "definition", lambda self, spec: dict(bare))
    path = write(workspace, entry_of(spec))
    url = request_kernel(path, spec.name)
    body = issue(url)[1]
    assert "There is none yet" in body
    assert "| `num_heads` | 8 |" in body
    assert "no reference yet" in render.template_request(_with_api(subject(path, spec.name))).body
    stage(workspace, spec, reference=known["reference"])
    assert request_kernel(path, spec.name) == url
    assert "There is none yet" not in issue(url)[1]


def _with_api(of: Subject) -> Subject:
    of.entry.evidence = [f"FlashInfer 0a1b2c3: {API} at flashinfer/norm/__init__.py:114, without"]
    return of


def test_hostile_text_stays_text(workspace: Path) -> None:
    spec = lightning()[0]
    token = f"see https://user:{SECRET}@example.org/x and {SECRET}"
    path = write(
        workspace,
        entry_of(spec, evidence=[HOSTILE, token, f"SGLang 1: {FILE}:12{HOSTILE}"]),
        hf_repo_id=f"x/{HOSTILE}",
        model_class=HOSTILE,
    )
    stage(
        workspace,
        spec,
        description=HOSTILE,
        axes={HOSTILE: {"type": "const", "value": 1, "description": HOSTILE}},
        inputs={"x": {"shape": [HOSTILE], "dtype": HOSTILE}},
        reference=f"# {HOSTILE}\n```\n````\n## not a heading\n",
    )
    kernel = render.kernel_request(subject(path, spec.name))
    template = render.template_request(_with_hostile_api(subject(path, spec.name)))
    for post in (kernel, template):
        assert "\n" not in post.title
        assert "<!-- onboard" not in post.body.replace("<!-- onboard -", "")
        assert "<img" not in outside_code(post.body)
        assert "@someone" not in outside_code(post.body)
        assert "<!--" not in outside_code(post.body)
        assert SECRET not in post.title + post.body
        assert "user:" not in post.body
    parameters = kernel.body[
        kernel.body.index("### Parameters") : kernel.body.index("### Reference")
    ]
    rows = table(parameters, "### Parameters")
    assert {len(row) for row in rows} == {3, 4}
    assert len(rows) == 3 + 2 + 1 + len(json.loads(json.dumps(spec_outputs(spec))))
    assert "\n## not a heading" not in outside_code(kernel.body)
    assert outside_code(kernel.body).count("\n### ") == 5
    head, body = issue(Outbox(workspace / "outbox").open_issue(kernel))
    assert head["title"] == kernel.title
    assert body.count("<!-- onboard:") == 1


def _with_hostile_api(of: Subject) -> Subject:
    of.entry.evidence = [*(of.entry.evidence or ()), *(_with_api(of).entry.evidence or ()), HOSTILE]
    return of


def spec_outputs(spec: KernelSpec) -> dict[str, Any]:
    return dict(ops.op_module(spec.op_type).definition(spec)["outputs"])


def outside_code(body: str) -> str:
    """Return a body without its fenced blocks."""
    return re.sub(r"^(`{3,})\w+\n.*?\n\1$", "", body, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("text", [HOSTILE, "|", "\\|", "\\\\|", "`|`", "a\r\n|---|", SECRET])
def test_a_cell_is_one_cell(text: str) -> None:
    for shown in (cell(text), code(text)):
        bare = re.sub(r"\\.", "", shown)
        assert "|" not in bare
        assert "\n" not in shown
        assert SECRET not in shown


def test_ordinary_text_is_left_as_it_is() -> None:
    text = "num_heads = num_attention_heads (64) / tp 8: a[0], `b`"
    assert prose(text) == text.replace("`", "\\`")
    assert code("num_heads") == "`num_heads`"
    assert fenced("x = 1\n", "python") == "```python\nx = 1\n```"


def test_foreign_text_makes_no_link() -> None:
    assert prose("[docs](http://a.b)") == "[docs]\\(http://a.b)"
    assert prose("[docs]: http://a.b") == "[docs]\\: http://a.b"


def test_sglang_site(workspace: Path) -> None:
    clone = workspace / "sglang"
    found = sglang_site(["SGLang 4d5e6f7: called at a/b.py:7"], FILE, "lightning", clone)
    assert found == Site("a/b.py", 7)
    assert sglang_site([], FILE, "Lightning", clone) == Site(FILE, 8)
    assert sglang_site([], FILE, "nothing_like_it", clone) == Site(FILE)
    assert sglang_site([], FILE, "lightning", workspace / "none") == Site(FILE)
    assert sglang_site([f"SGLang 1: {FILE}"], "", "lightning", clone) == Site(FILE, 8)
    assert sglang_site(["config.json: a.py:3", "SGLang 1: no call of x"], "", "", clone) is None
    assert sglang_site([], "../../../etc/passwd.py", "root", clone) == Site(
        "../../../etc/passwd.py"
    )


def test_report_of_a_kernel_that_needs_a_reference(tmp_path: Path) -> None:
    entry = KernelEntry.model_validate(
        entry_of(
            lightning()[0],
            phase2_status="needs_reference",
            phase2_notes=["nobody has | written it"],
            fi_issue_url="https://x.y/1",
        )
    )
    run = RunManifest(model_slug="m", hf_repo_id=None, date=dt.date(2026, 1, 1), kernels=[entry])
    report = Report(run, tmp_path / "onboard_m_20260101.json")
    assert report.row(entry)["state"] == "needs_reference"
    assert report.exit_code == 3
    text = report.markdown()
    assert "| needs_reference |" in text
    assert f"--only {entry.definition_name} --reference FILE.py`" in text
    assert "nobody has | written it" in text
    assert "[kernel request](https://x.y/1)" in text
    entry.error = "it broke"
    assert report.exit_code == 1
    assert report.reason(entry) == "it broke"
