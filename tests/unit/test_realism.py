"""How real workloads look, and what is flagged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.collect.dumps import read_calls
from tasks.collect.realism import (
    Extent,
    Realism,
    distribution,
    extent_of,
    plot,
    realism,
)
from tasks.collect.sanitize import sanitize
from tests.unit.test_collect import DECODE, definition_of, qwen


def extent(batch_size: int, *lengths: int) -> Extent:
    return Extent(batch_size, np.array(lengths, dtype=np.int64))


def int32(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def test_kv_lengths_are_tokens_not_pages() -> None:
    tensors = {"kv_indptr": int32(0, 2, 2, 3), "kv_last_page_len": int32(7, 0, 64)}
    found = extent_of(("len_indptr",), 64, {"len_indptr": 4}, tensors)
    assert found.kv_lengths is not None
    assert (found.batch_size, found.kv_lengths.tolist()) == (3, [71, 0, 64])
    tensors = {"kv_indptr": int32(0, 2, 2, 3), "qo_indptr": int32(0, 5, 5, 6)}
    found = extent_of(("total_q", "len_indptr"), 1, {"len_indptr": 4, "total_q": 6}, tensors)
    assert found.kv_lengths is not None
    assert found.query_lengths is not None
    assert found.kv_lengths.tolist() == [2, 0, 1]
    assert found.query_lengths.tolist() == [5, 0, 1]


@pytest.mark.parametrize(
    ("axes", "batch_size"),
    [
        ({"seq_len": 7}, 7),
        ({"seq_len": 7, "batch_size": 3}, 3),
        ({"total_q": 7, "len_indptr": 3}, 2),
        ({}, 1),
    ],
)
def test_batch_size(axes: dict[str, int], batch_size: int) -> None:
    found = extent_of(tuple(axes), 1, axes, {})
    assert (found.batch_size, found.kv_lengths, found.query_lengths) == (batch_size, None, None)


@given(st.lists(st.integers(0, 1 << 40), min_size=1, max_size=60))
def test_distribution_is_that_of_the_sorted_sizes(sizes: list[int]) -> None:
    found, ordered = distribution(sizes), sorted(sizes)
    assert found is not None
    assert (found.count, found.distinct) == (len(sizes), len(set(sizes)))
    for name, percent in (("smallest", 0), ("p10", 10), ("median", 50), ("p90", 90)):
        rank = max(1, -(-percent * len(sizes) // 100))
        assert found.percentiles[name] == ordered[rank - 1]
    assert found.percentiles["largest"] == ordered[-1]
    assert sum(found.histogram.values()) == len(sizes)
    for edge, count in found.histogram.items():
        assert count == sum(edge <= size < max(1, 2 * edge) for size in sizes)


def test_nothing_has_no_distribution() -> None:
    assert distribution([]) is None
    empty = realism("d", [], [])
    assert empty.warnings == []
    assert "| batch sizes" not in empty.markdown()


@pytest.mark.parametrize(
    ("kept", "flags"),
    [
        ([extent(1, 1000), extent(2, 300, 9)], []),
        ([extent(1, 128), extent(2, 3, 9)], ["uniform tiny contexts"]),
        ([extent(1, 129), extent(2, 3, 9)], []),
        ([extent(1, 500), extent(2, 500, 500)], ["uniform contexts"]),
        ([extent(1, 5), extent(2, 5, 5)], ["uniform tiny contexts", "uniform contexts"]),
        ([extent(4, 5, 900, 3, 3)] * 2, ["one batch size"]),
        ([extent(1, 900)], ["one batch size"]),
        ([Extent(1), Extent(3)], []),
        ([Extent(3), Extent(3)], ["one batch size"]),
    ],
)
def test_what_looks_made_up_is_flagged(kept: list[Extent], flags: list[str]) -> None:
    # Only what is kept counts, whatever else was seen.
    report = realism("d", kept, [*kept, extent(64, *range(1000, 1064))])
    assert [warning.partition(":")[0] for warning in report.warnings] == flags


@pytest.fixture(scope="module")
def report(dumps: Path) -> Realism:
    _, collected = sanitize(qwen(DECODE), definition_of(qwen(DECODE)), read_calls(dumps), 20)
    return collected.realism


def test_report_of_a_true_run(report: Realism) -> None:
    # Batch sizes and lengths that the traffic of the recorded run had.
    assert (report.kept.rows, report.distinct.rows, report.warnings) == (20, 88, [])
    kept, distinct = report.kept.batch_sizes, report.distinct.batch_sizes
    assert kept is not None
    assert distinct is not None
    assert kept.distinct == min(20, distinct.distinct)
    assert distinct.percentiles["largest"] == 63
    text = report.markdown()
    assert f"#### {DECODE}" in text
    assert "| batch sizes, kept | 20 | 1 |" in text
    assert "| KV lengths, all distinct | 88 |" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1


def test_plot() -> None:
    kept = [extent(1, 900), extent(2, 30, 5)]
    reports = [
        realism("gqa_paged_decode", kept, kept),
        realism("rmsnorm_h4096", [Extent(3)], [Extent(9)]),
    ]
    drawn = plot(reports)
    assert drawn.startswith(b"\x89PNG\r\n")
    assert drawn == plot(reports)
    with pytest.raises(ValueError, match="nothing to plot"):
        plot([])
