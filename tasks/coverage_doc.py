"""The coverage document of FlashInfer-Bench, `docs/model_coverage.mdx`.

A table of all models, then one section per model with a table of its definitions and a count. Edits
touch only the lines they are about; everything else stays byte for byte.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from tasks.errors import InputError

PATH = "docs/model_coverage.mdx"
Status = Literal["✅", "🟡", "❌"]
_PRESENT = ("✅", "🟡")
_ROW = re.compile(r"\| `(?P<name>[^`]+)` \| (?P<op>[^|]*) \| (?P<status>[^|]*) \|")
_COUNT = re.compile(r"(\*\*Coverage\*\*: )(\d+)( / )(\d+|\?)")
_SUMMARY = {"full": "✅ Fully covered", "some": "🟡 Partial", "none": "❌ Not covered"}
_HEADER = "| Definition | Op Type | Status |\n|-----------|---------|:------:|\n"


def _key(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


@dataclass
class CoverageDocument:
    """The document as lines, with their line ends."""

    lines: list[str]

    @classmethod
    def parse(cls, text: str) -> CoverageDocument:
        """Read the document.

        Raises:
            InputError: it has no summary table.
        """
        document = cls(text.splitlines(keepends=True))
        if not any(line.startswith("| Model | Architecture |") for line in document.lines):
            raise InputError(f"{PATH}: has no summary table (| Model | Architecture | Coverage |)")
        return document

    def render(self) -> str:
        """Return the text."""
        return "".join(self.lines)

    def model(self, *names: str) -> str | None:
        """Return the heading of the section for a model known by any of `names`."""
        wanted = {_key(name) for name in names}
        for line in self.lines:
            if line.startswith("## ") and _key(line[3:]) in wanted:
                return line[3:].strip()
        return None

    def _section(self, heading: str) -> range:
        start = next(
            (i for i, line in enumerate(self.lines) if line.strip() == f"## {heading}"), None
        )
        if start is None:
            raise InputError(f"{PATH}: has no section {heading!r}")
        end = next(
            (i for i in range(start + 1, len(self.lines)) if self.lines[i].startswith("## ")),
            len(self.lines),
        )
        return range(start, end)

    def _rows(self, heading: str) -> Iterator[tuple[int, re.Match[str]]]:
        for index in self._section(heading):
            row = _ROW.match(self.lines[index])
            if row:
                yield index, row

    def statuses(self, heading: str) -> dict[str, str]:
        """Return definition name -> status for a model's section."""
        return {row["name"]: row["status"].strip() for _, row in self._rows(heading)}

    def add_model(self, heading: str, architecture: str) -> None:
        """Append a summary row and an empty section for a model."""
        summary = max(
            (i for i, line in enumerate(self.lines) if self._is_summary_row(i, line)), default=None
        )
        if summary is None:
            raise InputError(f"{PATH}: the summary table has no rows")
        self.lines.insert(summary + 1, f"| {heading} | {architecture} | {_SUMMARY['none']} |\n")
        if self.lines and not self.lines[-1].endswith("\n"):
            self.lines[-1] += "\n"
        last = next((line.strip() for line in reversed(self.lines) if line.strip()), "")
        rule = "\n" if last == "---" else "\n---\n\n"
        section = (
            f"{rule}## {heading}\n\n**Architecture**: {architecture}\n\n{_HEADER}"
            "\n**Coverage**: 0 / 0 definitions present.\n"
        )
        self.lines += section.splitlines(keepends=True)

    def _is_summary_row(self, index: int, line: str) -> bool:
        first_section = next(
            (
                i
                for i, text in enumerate(self.lines)
                if text.startswith("## ") and text.strip() != "## Summary"
            ),
            len(self.lines),
        )
        return index < first_section and line.startswith("| ") and line.count("|") == 4

    def mark(self, heading: str, name: str, op_type: str, status: Status) -> None:
        """Set a definition's status in a model's section, adding its row if there is none.

        The section's count and the model's summary are brought in line.
        """
        for index, row in self._rows(heading):
            if row["name"] == name:
                before = row["status"].strip()
                line = self.lines[index]
                start, end = row.span("status")
                self.lines[index] = f"{line[:start]}{status}{line[end:]}"
                self._count(heading, (status in _PRESENT) - (before in _PRESENT), 0)
                break
        else:
            self.lines.insert(self._insertion(heading), f"| `{name}` | {op_type} | {status} |\n")
            self._count(heading, int(status in _PRESENT), 1)
        self._summarise(heading)

    def _insertion(self, heading: str) -> int:
        rows = [i for i in self._section(heading) if self.lines[i].startswith("|")]
        if not rows:
            raise InputError(f"{PATH}: section {heading!r} has no table")
        return rows[-1] + 1

    def _count(self, heading: str, present: int, total: int) -> None:
        for index in self._section(heading):
            found = _COUNT.search(self.lines[index])
            if found:
                known = found[4] if found[4] == "?" else str(int(found[4]) + total)
                changed = f"{found[1]}{int(found[2]) + present}{found[3]}{known}"
                self.lines[index] = self.lines[index].replace(found[0], changed, 1)
                return

    def _summarise(self, heading: str) -> None:
        statuses = list(self.statuses(heading).values())
        covered = "some"
        if all(status == "✅" for status in statuses):
            covered = "full"
        elif not any(status in _PRESENT for status in statuses):
            covered = "none"
        for index, line in enumerate(self.lines):
            if self._is_summary_row(index, line):
                cells = line.split("|")
                if _key(cells[1]) == _key(heading):
                    cells[3] = f" {_SUMMARY[covered]} "
                    self.lines[index] = "|".join(cells)
                    return
