"""The real coverage document: edits touch only what they are about."""

from __future__ import annotations

import difflib

import pytest

from tasks.coverage_doc import CoverageDocument
from tasks.errors import InputError
from tests.conftest import DATA

TEXT = (DATA / "flashinfer-bench" / "docs" / "model_coverage.mdx").read_text()


def changed(text: str) -> list[str]:
    lines = difflib.unified_diff(TEXT.splitlines(), text.splitlines(), n=0, lineterm="")
    return [line for line in lines if line[0] in "+-" and line[:3] not in ("+++", "---")]


def test_reading_and_writing_changes_no_byte() -> None:
    assert CoverageDocument.parse(TEXT).render() == TEXT


def test_every_section_is_found_by_its_slug() -> None:
    document = CoverageDocument.parse(TEXT)
    assert document.model("qwen3-30b-a3b") == "Qwen3 30B A3B"
    assert document.model("nope", "Qwen3-235B-A22B") == "Qwen3 235B A22B"
    assert document.model("qwen3") is None


def test_marking_a_known_row_changes_the_row_and_the_counts_only() -> None:
    document = CoverageDocument.parse(TEXT)
    document.mark("Qwen3 30B A3B", "fused_add_rmsnorm_h2048", "rmsnorm", "❌")
    assert changed(document.render()) == [
        "-| `fused_add_rmsnorm_h2048` | rmsnorm | ✅ |",
        "+| `fused_add_rmsnorm_h2048` | rmsnorm | ❌ |",
        "-**Coverage**: 14 / 14 referenced definitions present. MoE kernels added (not yet mapped "
        "in `models.ts`).",
        "+**Coverage**: 13 / 14 referenced definitions present. MoE kernels added (not yet mapped "
        "in `models.ts`).",
    ]
    document.mark("Qwen3 30B A3B", "fused_add_rmsnorm_h2048", "rmsnorm", "✅")
    assert document.render() == TEXT


def test_a_new_row_is_counted_in_both_numbers() -> None:
    document = CoverageDocument.parse(TEXT)
    document.mark("Qwen3 30B A3B", "rmsnorm_h999", "rmsnorm", "🟡")
    rest = "referenced definitions present. MoE kernels added (not yet mapped in `models.ts`)."
    expected = TEXT.replace(
        f"\n\n**Coverage**: 14 / 14 {rest}",
        f"\n| `rmsnorm_h999` | rmsnorm | 🟡 |\n\n**Coverage**: 15 / 15 {rest}",
    )
    assert expected != TEXT
    assert document.render() == expected


def test_a_new_model_gets_a_summary_row_and_a_section() -> None:
    document = CoverageDocument.parse(TEXT)
    document.add_model("MiniMax-M1", "Lightning Attn + MoE")
    document.mark("MiniMax-M1", "rmsnorm_h6144", "rmsnorm", "✅")
    lines = changed(document.render())
    assert all(line.startswith("+") for line in lines)
    assert lines[0] == "+| MiniMax-M1 | Lightning Attn + MoE | ✅ Fully covered |"
    assert "+**Coverage**: 1 / 1 definitions present." in lines
    assert document.model("minimax-m1") == "MiniMax-M1"
    again = CoverageDocument.parse(document.render())
    assert again.statuses("MiniMax-M1") == {"rmsnorm_h6144": "✅"}


def test_unknown_documents_and_sections() -> None:
    with pytest.raises(InputError, match="has no summary table"):
        CoverageDocument.parse("# Something else\n")
    with pytest.raises(InputError, match="has no section 'Nope'"):
        CoverageDocument.parse(TEXT).mark("Nope", "a", "b", "✅")
