"""How real workloads look: which batch sizes, how long the sequences; and what looks made up."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TINY = 128
"""A context of so many tokens is tiny: less than most system prompts."""
_OFFSETS = ("qo_indptr", "cu_seqlens")
"""Inputs that say where each sequence's queries begin."""
_WIDTH, _HEIGHT = 10.0, 2.6
_PERCENTILES = {"smallest": 0, "p10": 10, "median": 50, "p90": 90, "largest": 100}


@dataclass(frozen=True, slots=True)
class Extent:
    """How large one workload is."""

    batch_size: int
    kv_lengths: np.ndarray | None = None
    """Tokens of KV of each sequence, [batch_size] int64; None where the kernel has no paged or
    ragged KV."""
    query_lengths: np.ndarray | None = None
    """Query tokens of each sequence, [batch_size] int64; None where each has one or it is not
    known."""


def extent_of(
    variable: Sequence[str],
    page_size: int,
    axes: Mapping[str, int],
    tensors: Mapping[str, np.ndarray],
) -> Extent:
    """Return the extent of a workload.

    Args:
        variable: the definition's var axes in its order.
        page_size: tokens in a page of the KV cache; 1 where there are no pages.
        axes: the workload's var axes.
        tensors: its stored inputs.
    """
    if "batch_size" in axes:
        batch_size = axes["batch_size"]
    elif "len_indptr" in axes:
        batch_size = axes["len_indptr"] - 1
    else:
        batch_size = axes[variable[0]] if variable else 1
    queries = next((tensors[name] for name in _OFFSETS if name in tensors), None)
    return Extent(
        batch_size=batch_size,
        kv_lengths=_kv_lengths(page_size, tensors),
        query_lengths=None if queries is None else np.diff(queries.astype(np.int64)),
    )


def _kv_lengths(page_size: int, tensors: Mapping[str, np.ndarray]) -> np.ndarray | None:
    offsets, last = tensors.get("kv_indptr"), tensors.get("kv_last_page_len")
    if offsets is None:
        return None
    pages = np.diff(offsets.astype(np.int64))
    if last is None or last.shape != pages.shape:
        return pages * page_size
    return np.where(pages > 0, (pages - 1) * page_size + last, 0)


class Distribution(BaseModel):
    """How often which size was seen."""

    model_config = ConfigDict(frozen=True)

    count: int
    distinct: int
    percentiles: dict[str, int]
    """`smallest`, `p10`, `median`, `p90`, `largest`."""
    histogram: dict[int, int]
    """Lower end of a bin -> how many sizes are in it; a bin ends at twice its lower end."""


def distribution(sizes: Iterable[int]) -> Distribution | None:
    """Describe sizes; None if there are none."""
    counts = Counter(sizes)
    if not counts:
        return None
    ordered = sorted(counts)
    reached = list(accumulate(counts[size] for size in ordered))
    total = reached[-1]
    histogram: Counter[int] = Counter()
    for size in ordered:
        histogram[1 << (size.bit_length() - 1) if size > 0 else 0] += counts[size]
    return Distribution(
        count=total,
        distinct=len(ordered),
        percentiles={
            # The smallest size that at least so many percent of all do not exceed.
            name: next(
                size for size, n in zip(ordered, reached, strict=True) if n * 100 >= p * total
            )
            for name, p in _PERCENTILES.items()
        },
        histogram=dict(histogram),
    )


class Sizes(BaseModel):
    """The distributions of some workloads."""

    model_config = ConfigDict(frozen=True)

    rows: int
    batch_sizes: Distribution | None
    kv_lengths: Distribution | None
    """Over all sequences of all workloads."""
    query_lengths: Distribution | None


def sizes_of(extents: Sequence[Extent]) -> Sizes:
    """Describe workloads."""

    def lengths(name: str) -> Distribution | None:
        found = [values for e in extents if (values := getattr(e, name)) is not None]
        return distribution(np.concatenate(found).tolist()) if found else None

    return Sizes(
        rows=len(extents),
        batch_sizes=distribution(e.batch_size for e in extents),
        kv_lengths=lengths("kv_lengths"),
        query_lengths=lengths("query_lengths"),
    )


class Realism(BaseModel):
    """The workloads of one definition: those kept, and all distinct ones that were seen."""

    model_config = ConfigDict(frozen=True)

    definition: str
    kept: Sizes
    distinct: Sizes
    warnings: list[str]
    """What looks made up in the rows that were kept."""

    def markdown(self) -> str:
        """Return a table, and the warnings below it."""
        heads = ["", "rows", *_PERCENTILES, "different"]
        lines = [
            f"#### {self.definition}",
            "",
            f"| {' | '.join(heads)} |",
            f"|---|{'---:|' * (len(heads) - 1)}",
        ]
        for group, sizes in (("kept", self.kept), ("all distinct", self.distinct)):
            for what in ("batch_sizes", "kv_lengths", "query_lengths"):
                found: Distribution | None = getattr(sizes, what)
                if found is not None:
                    cells = [sizes.rows, *found.percentiles.values(), found.distinct]
                    label = f"{what.replace('_', ' ').replace('kv', 'KV')}, {group}"
                    lines.append(f"| {label} | {' | '.join(map(str, cells))} |")
        lines += [""] if self.warnings else []
        lines += [f"- **{warning}**" for warning in self.warnings]
        return "\n".join(lines) + "\n"


def realism(definition: str, kept: Sequence[Extent], distinct: Sequence[Extent]) -> Realism:
    """Describe a definition's workloads, and say what looks made up.

    Args:
        definition: its name.
        kept: the rows that go into the dataset.
        distinct: all distinct workloads they were chosen from.
    """
    sizes = sizes_of(kept)
    return Realism(
        definition=definition, kept=sizes, distinct=sizes_of(distinct), warnings=_warnings(sizes)
    )


def _warnings(sizes: Sizes) -> list[str]:
    found = []
    kv, batches = sizes.kv_lengths, sizes.batch_sizes
    if kv is not None and kv.percentiles["largest"] <= TINY:
        found.append(
            f"uniform tiny contexts: none of the {kv.count} sequences has more than {TINY} tokens "
            f"of KV (the longest has {kv.percentiles['largest']})"
        )
    if kv is not None and kv.distinct == 1 and kv.count > 1:
        found.append(
            f"uniform contexts: all {kv.count} sequences have "
            f"{kv.percentiles['largest']} tokens of KV"
        )
    if batches is not None and batches.distinct == 1:
        found.append(
            f"one batch size: all {batches.count} rows have {batches.percentiles['largest']}"
        )
    return found


def plot(reports: Sequence[Realism]) -> bytes:
    """Return a PNG with the distributions of some definitions, one line of plots for each.

    Equal reports give equal bytes, with the same version of matplotlib.

    Raises:
        ValueError: there is no report.
    """
    if not reports:
        raise ValueError("nothing to plot")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, _HEIGHT * len(reports)), dpi=100, layout="constrained")
    axes = figure.subplots(len(reports), 2, squeeze=False)
    for (left, right), report in zip(axes, reports, strict=True):
        left.set_title(report.definition, fontsize=9, loc="left")
        kept, distinct = report.kept, report.distinct
        _bars(left, "batch size", "rows", kept.batch_sizes, distinct.batch_sizes)
        if distinct.kv_lengths is not None:
            _bars(right, "KV tokens", "sequences", kept.kv_lengths, distinct.kv_lengths)
        else:
            right.set_axis_off()
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def _bars(
    axes: Axes, what: str, counted: str, kept: Distribution | None, distinct: Distribution | None
) -> None:
    """Draw two histograms beside each other, as shares, for they count very different numbers."""
    groups: list[tuple[str, Distribution | None]] = [("kept", kept), ("all distinct", distinct)]
    bins = sorted({edge for _, found in groups if found for edge in found.histogram})
    for shift, (label, found) in enumerate(groups):
        shares = [100 * found.histogram.get(edge, 0) / found.count if found else 0 for edge in bins]
        places = [index + 0.4 * (shift - 0.5) for index in range(len(bins))]
        axes.bar(places, shares, 0.4, label=f"{label} ({found.count if found else 0})")
    names: list[Any] = [f"{edge}-{2 * edge - 1}" if edge > 1 else str(edge) for edge in bins]
    axes.set_xticks(range(len(bins)), names, fontsize=7, rotation=30)
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlabel(what, fontsize=8)
    axes.set_ylabel(f"% of {counted}", fontsize=8)
    axes.legend(fontsize=7)
