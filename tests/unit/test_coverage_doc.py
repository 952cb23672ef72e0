"""The real coverage document: read completely, and edited only where an edit is about."""

from __future__ import annotations

import difflib
import json
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.coverage_doc import (
    CoverageDocument,
    Status,
    dataset_statuses,
    model_slug,
    unified_diff,
)
from tasks.errors import InputError
from tests.conftest import DATA

TEXT = (DATA / "flashinfer-bench" / "docs" / "model_coverage.mdx").read_text()
ORACLE: dict[str, dict[str, Any]] = json.loads((DATA / "coverage_oracle.json").read_text())
MODELS = sorted(ORACLE)
REST = "referenced definitions present. MoE kernels added (not yet mapped in `models.ts`)."


def parsed(text: str = TEXT) -> CoverageDocument:
    return CoverageDocument.parse(text)


def changed(text: str, before: str = TEXT) -> list[str]:
    lines = difflib.unified_diff(before.splitlines(), text.splitlines(), n=0, lineterm="")
    return [line for line in lines if line[0] in "+-" and line[:3] not in ("+++", "---")]


# Reading


def test_every_row_is_read() -> None:
    rows = [
        [
            *(row.model, row.name, row.is_definition, row.op_type, row.op_label, row.status),
            *(row.tp, row.ep, row.subsection, row.line),
        ]
        for row in parsed().rows()
    ]
    assert rows == [[heading, *row] for heading, model in ORACLE.items() for row in model["rows"]]
    assert len(rows) == 377
    assert Counter(row[5] for row in rows) == {"✅": 156, "🟡": 105, "❌": 103, "—": 13}


def test_every_model_is_read() -> None:
    assert parsed().models() == list(ORACLE)
    assert len(ORACLE) == 28


@pytest.mark.parametrize(
    ("name", "heading"),
    [
        ("qwen3-30b-a3b", "Qwen3 30B A3B"),
        ("Qwen/Qwen3-235B-A22B-Instruct-2507-FP8", "Qwen3 235B A22B"),
        ("deepseek-ai/DeepSeek-V3-0324", "DeepSeek V3 / R1"),
        ("deepseek-r1", "DeepSeek V3 / R1"),
        ("DeepSeek V3/R1", "DeepSeek V3 / R1"),
        ("meta-llama/Llama-3.3-70B-Instruct", "Llama 3.1 / 3.3 70B"),
        ("meta-llama/Meta-Llama-3.1-8B", "Llama 3.1 8B"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "Mistral 7B v0.3"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "Mixtral 8x7B"),
        ("google/gemma-3-27b-it", "Gemma 3 27B"),
        ("glm46", "GLM-4.6"),
    ],
)
def test_a_model_is_found_by_heading_slug_and_repository(name: str, heading: str) -> None:
    assert parsed().find(name) == heading


@pytest.mark.parametrize("heading", MODELS)
def test_every_model_is_found_by_its_names(heading: str) -> None:
    slug = heading.lower().replace(" / ", "-").replace(" ", "-")
    for name in (heading, slug, ORACLE[heading]["summary_name"]):
        assert parsed().find(name) == heading


def test_missing_models() -> None:
    document = parsed()
    assert document.model("qwen3", "", "///", "mistralai/Mistral-7B-v0.2") is None
    assert document.model("nope", "Qwen3-235B-A22B") == "Qwen3 235B A22B"
    with pytest.raises(InputError, match=r"model_coverage.mdx: has no section 'phi4'.*'Phi-4 14B'"):
        document.find("phi4")


def test_an_ambiguous_model() -> None:
    document = parsed(TEXT + "\n## Qwen3-14B\n\n| Definition | Op Type | Status |\n|-|-|-|\n")
    with pytest.raises(InputError, match="'qwen3-14b' is ambiguous: 'Qwen3 14B', 'Qwen3-14B'"):
        document.mark("qwen3-14b", "a", "gemm", "✅")
    assert document.find("Qwen3-14B") == "Qwen3-14B"


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("Qwen/Qwen3-235B-A22B-Instruct-2507-FP8", "qwen3-235b-a22b"),
        ("Qwen/Qwen3-30B-A3B", "qwen3-30b-a3b"),
        ("deepseek-ai/DeepSeek-R1-0528", "deepseek-r1"),
        ("moonshotai/Kimi-K2-Base", "kimi-k2"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b-v0.3"),
        ("openai/gpt-oss-20b", "gpt-oss-20b"),
        ("x/Model-2048", "model-2048"),
    ],
)
def test_slugs(name: str, slug: str) -> None:
    assert model_slug(name) == slug


def test_tables_in_code_fences_are_text() -> None:
    fenced = (
        "```md\n## Not a model\n| Definition | Op Type | Status |\n|-|-|-|\n| `a` | b | ✅ |\n```\n"
    )
    assert parsed(TEXT.replace("## Qwen3 14B", fenced + "## Qwen3 14B")).models() == list(ORACLE)


@pytest.mark.parametrize("content", [b"# Something else\n", b"", b"\xff", None])
def test_unknown_documents(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "x.mdx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError):
        CoverageDocument.read(path)


# Changing nothing

VARIANTS = {
    "as it is": TEXT,
    "CRLF": TEXT.replace("\n", "\r\n"),
    "no final newline": TEXT.rstrip("\n-"),
    "byte-order mark": "\ufeff" + TEXT,
    "odd Unicode": TEXT.replace("Qwen3", "Qwen3\u2028\x0b\x85\x0c \u202e"),
    "mixed line ends": TEXT.replace("❌ |\n", "❌ |\r\n"),
}


@pytest.mark.parametrize("text", VARIANTS.values(), ids=VARIANTS)
def test_what_changes_nothing_changes_no_byte(text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.mdx"
    path.write_bytes(text.encode())
    document = CoverageDocument.read(path)
    assert len(document.rows()) == 377
    for row in document.rows():
        if row.status in get_args(Status):
            document.mark(row.model, row.name, row.op_type, row.status)  # type: ignore[arg-type]
    document.write(path)
    assert path.read_bytes() == text.encode()


@given(st.text(), st.text())
def test_any_text_around_the_table_is_kept(before: str, after: str) -> None:
    text = f"{before}\n\n| Model | Architecture | Coverage |\n|-|-|-|\n| A | B | ❌ |\n{after}"
    try:
        document = parsed(text)
    except InputError:
        assert "~~~" in before or "```" in before  # Then the table is code.
        return
    assert document.render() == text
    assert document.check().diff == ""


# Editing


@given(
    st.sampled_from(MODELS),
    st.sampled_from(sorted({row[0] for model in ORACLE.values() for row in model["rows"]})),
    st.sampled_from(["gemm", "gqa_paged", "new_type"]),
    st.sampled_from(get_args(Status)),
    st.sampled_from(sorted(set(VARIANTS) - {"odd Unicode"})),
)
def test_an_edit_touches_its_model_only(
    heading: str, name: str, op_type: str, status: Status, variant: str
) -> None:
    text = VARIANTS[variant]
    document = parsed(text)
    others = [row for row in document.rows() if row.model != heading]
    document.mark(heading, name, op_type, status)
    after = parsed(document.render())
    assert after.statuses(heading).get(name, status) == status
    assert [
        (r.model, r.name, r.op_label, r.status) for r in after.rows() if r.model != heading
    ] == [(r.model, r.name, r.op_label, r.status) for r in others]
    before, now = text.split("## "), document.render().split("## ")
    section = next(
        i for i, part in enumerate(before) if part.startswith((f"{heading}\n", f"{heading}\r"))
    )
    sub = heading == "Mixtral 8x22B"  # Its section has a part of its own, split off by `### `.
    kept = [i for i in range(2, len(before)) if i != section and not (sub and i == section + 1)]
    assert [before[i] for i in kept] == [now[i] for i in kept]
    summary = changed(now[1], before[1])
    assert len(summary) in (0, 2)
    assert all(ORACLE[heading]["summary_name"] in line for line in summary)
    assert document.check(heading).diff == "" or document.render() == text


def test_marking_a_row_counts_again() -> None:
    document = parsed()
    document.mark("Qwen3 30B A3B", "fused_add_rmsnorm_h2048", "rmsnorm", "❌")
    assert changed(document.render()) == [
        "-| `fused_add_rmsnorm_h2048` | rmsnorm | ✅ |",
        "+| `fused_add_rmsnorm_h2048` | rmsnorm | ❌ |",
        f"-**Coverage**: 14 / 14 {REST}",
        f"+**Coverage**: 17 / 18 {REST}",  # It had left out the four MoE rows below the others.
    ]


def test_a_new_row_goes_to_those_of_its_type() -> None:
    document = parsed()
    document.mark("llama-3.1-8b", "rmsnorm_h999", "rmsnorm TP=2", "❌")
    document.mark("llama-3.1-8b", "new_h1", "new_type", "🟡")
    document.mark("llama-3.1-8b", "Some module", "new_type", "—")
    expected = TEXT
    for old, new in (
        (
            "| Llama 3.1 8B | GQA + Dense | ✅ Fully covered |",
            "| Llama 3.1 8B | GQA + Dense | 🟡 Partial |",
        ),
        (
            "| `fused_add_rmsnorm_h4096` | rmsnorm | ✅ |\n",
            "| `fused_add_rmsnorm_h4096` | rmsnorm | ✅ |\n"
            "| `rmsnorm_h999` | rmsnorm TP=2 | ❌ |\n",
        ),
        (
            "\n\n**Coverage**: 14 / 14 definitions present. Fully covered.",
            "\n| `new_h1` | new_type | 🟡 |\n| Some module | new_type | — |"
            "\n\n**Coverage**: 15 / 16 definitions present. Fully covered.",
        ),
    ):
        expected = expected.replace(old, new, 1)
    assert document.render() == expected
    names = [row.name for row in document.rows("llama-3.1-8b")]
    assert names[1:4] == ["fused_add_rmsnorm_h4096", "rmsnorm_h999", "gemm_n6144_k4096"]


def test_a_definition_in_two_tables_of_a_section_is_marked_in_both() -> None:
    document = parsed()
    document.mark("Mixtral 8x22B", "gqa_paged_prefill_causal_h24_kv4_d128_ps64", "gqa_paged", "❌")
    assert changed(document.render())[2:4] == [
        "-**Coverage**: 3 / 13 referenced definitions present. TP=2 prefill + decode definitions "
        "added. Missing: rmsnorm, remaining GQA variants, GEMM, and sampling definitions.",
        "+**Coverage**: 1 / 13 referenced definitions present. TP=2 prefill + decode definitions "
        "added. Missing: rmsnorm, remaining GQA variants, GEMM, and sampling definitions.",
    ]
    assert "**Coverage**: 2 / 3 TP=2 attention definitions present" in document.render()


def test_an_unknown_total_stays_unknown() -> None:
    document = parsed()
    document.mark("GLM-4.6", "rmsnorm_h4096", "rmsnorm", "✅")
    assert "| `rmsnorm_h4096` | rmsnorm | ✅ |\n| `fused_add_rmsnorm_h4096`" in document.render()
    assert "**Coverage**: 1 / ? definitions present. Architecture requires" in document.render()


ALIGNED = (
    "| Model | Architecture | Coverage      |\r\n| ----- | ------------ | ------------- |\r\n"
    "| A     | B            | ❌ Not covered |\r\n\r\n## A\r\n\r\n"
    "| Definition | Op Type | Status |\r\n| ---------- | ------- | ------ |\r\n"
    "| `a`        | gemm    | ❌      |"
)


def test_an_aligned_table_stays_aligned() -> None:
    document = parsed(ALIGNED)
    document.mark("A", "b", "moe", "✅")
    assert changed(document.render(), ALIGNED) == [
        "-| A     | B            | ❌ Not covered |",
        "+| A     | B            | 🟡 Partial     |",
        "+| `b`        | moe     | ✅      |",
    ]
    assert document.render().endswith("❌      |\r\n| `b`        | moe     | ✅      |")


@pytest.mark.parametrize("variant", sorted(set(VARIANTS) - {"odd Unicode"}))
def test_a_new_model_gets_a_summary_row_and_a_section(variant: str) -> None:
    text = VARIANTS[variant]
    document = parsed(text)
    document.add_model("MiniMax-M1", "Lightning Attn + MoE")
    document.mark("minimax-m1", "rmsnorm_h6144", "rmsnorm", "✅")
    lines = changed(document.render(), text)
    assert all(line.startswith("+") for line in lines)
    assert lines[0] == "+| MiniMax-M1 | Lightning Attn + MoE | ✅ Fully covered |"
    assert "+**Coverage**: 1 / 1 definitions present." in lines
    again = parsed(document.render())
    assert again.models() == [*ORACLE, "MiniMax-M1"]
    assert again.statuses("MiniMax-M1") == {"rmsnorm_h6144": "✅"}
    assert again.findings("MiniMax-M1") == []


@pytest.mark.parametrize("name", ["a|b", "a\nb", "a\rb", "a`b", "", " a", "a\u2028b", "a\x00"])
def test_names_that_would_break_the_table_are_refused(name: str) -> None:
    document = parsed()
    for edit in (
        lambda: document.add_model(name, "GQA"),
        lambda: document.add_model("New", name),
        lambda: document.mark("Qwen3 14B", name, "gemm", "✅"),
        lambda: document.mark("Qwen3 14B", "gemm_n1", name, "✅"),
        lambda: document.refresh("Qwen3 14B", {"gemm_n1": ("gemm", "✅"), name: ("gemm", "✅")}),
    ):
        with pytest.raises(InputError, match="would break the document"):
            edit()
    assert document.render() == TEXT


def test_other_wrong_edits() -> None:
    document = parsed()
    with pytest.raises(InputError, match="has no section 'Nope'"):
        document.mark("Nope", "a", "b", "✅")
    with pytest.raises(InputError, match="status 'done' is none of"):
        document.mark("Qwen3 14B", "a", "b", "done")  # type: ignore[arg-type]
    for heading in ("Qwen3-14B", "Summary"):
        with pytest.raises(InputError, match="cannot add"):
            document.add_model(heading, "GQA")
    assert document.render() == TEXT


# Refreshing and checking


def test_refresh_follows_the_dataset() -> None:
    rows = parsed().rows("Llama 3.2 3B")
    wanted = {row.name: row.op_type for row in rows} | {"gqa_new": "gqa_ragged"}
    published = {name: op_type for name, op_type in wanted.items() if "rmsnorm" not in name}
    collected = {name for name in wanted if "gqa" in name or "gemm" in name}
    document = parsed()
    done = document.refresh("llama-3.2-3b", dataset_statuses(wanted, published, collected))
    statuses = document.statuses("Llama 3.2 3B")
    assert statuses["rmsnorm_h3072"] == "❌"
    assert statuses["gemm_n5120_k3072"] == statuses["gqa_new"] == "✅"
    assert statuses["top_k_sampling_from_probs_v128256"] == "🟡"
    assert set(done) == {name for name in wanted if "paged" not in name and "d128" not in name}
    assert "**Coverage**: 13 / 15 definitions present. GQA ragged" in document.render()
    assert document.findings("llama-3.2-3b") == []
    assert document.refresh("llama-3.2-3b", dataset_statuses(wanted, published, collected)) == []


def test_check_says_what_a_refresh_would_change_and_changes_nothing() -> None:
    document = parsed()
    check = document.check("qwen3-14b", {"rmsnorm_h5120": ("rmsnorm", "✅")})
    assert document.render() == TEXT
    assert check.findings == []
    assert check.diff.splitlines()[:2] == [
        "--- a/docs/model_coverage.mdx",
        "+++ b/docs/model_coverage.mdx",
    ]
    assert [line for line in check.diff.splitlines()[2:] if line[0] in "+-"] == [
        "-| `rmsnorm_h5120` | rmsnorm | 🟡 |",
        "+| `rmsnorm_h5120` | rmsnorm | ✅ |",
    ]
    assert document.check("qwen3-14b").diff == ""


def test_the_real_documents_findings() -> None:
    check = parsed().check()
    found = [(finding.kind, finding.model) for finding in check.findings]
    numeric = {h: m for h, m in ORACLE.items() if "?" not in m["coverage"]}
    wrong = [heading for heading, model in numeric.items() if model["coverage"] != model["recount"]]
    assert len(wrong) == 12
    assert [model for kind, model in found if kind == "count"] == wrong
    assert [item for item in found if item[0] != "count"] == [
        ("name", "DeepSeek V3 / R1"),
        ("summary", "DeepSeek V3 / R1"),
        ("name", "Llama 3.1 / 3.3 70B"),
    ]
    assert "'DeepSeek V3/R1' in the summary differs only by spaces" in str(check.findings[0])
    assert check.diff.count("\n-") == 12 + 1  # The counts, and a summary row.


def test_findings_in_a_damaged_document() -> None:
    row = "| `rmsnorm_h4096` | rmsnorm | ✅ |\n"
    text = TEXT.replace(
        f"{row}| `fused", f"{row}{row}| `rmsnorm _h4096` | rmsnorm | ok |\n| `fused", 1
    )
    text = text.replace("| Qwen3 14B | GQA + Dense |", "| Qwen3  14B | GQA + Dense |")
    text = text.replace("| Gemma 3 27B | GQA + Dense | 🟡 Partial |", "| Gone | x | ❌ |")
    document = parsed(text)
    found = {(f.kind, f.model) for f in document.findings()} - {
        (f.kind, f.model) for f in parsed().findings()
    }
    assert found == {
        ("duplicate", "Llama 3.1 8B"),
        ("name", "Llama 3.1 8B"),
        ("status", "Llama 3.1 8B"),
        ("count", "Llama 3.1 8B"),
        ("summary", "Llama 3.1 8B"),
        ("name", "Qwen3 14B"),
        ("summary", "Gemma 3 27B"),
        ("summary", "Gone"),
    }


def test_a_difference_at_the_files_end() -> None:
    assert unified_diff("a", "b\n").splitlines()[3:] == [
        "-a",
        "\\ No newline at end of file",
        "+b",
    ]
