"""The coverage document of FlashInfer-Bench, `docs/model_coverage.mdx`.

A table of all models, then one section per model with tables of its definitions and a count under
each. Edits touch only the section and the summary row of the model they are about, and only the
cells that change; everything else stays byte for byte, whatever its line ends.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from tasks import files
from tasks.errors import InputError

PATH = "docs/model_coverage.mdx"
Status = Literal["✅", "🟡", "❌", "—"]
"""Workloads collected, definition only, missing, and a module that no definition is mapped to."""
Kind = Literal["count", "duplicate", "name", "status", "summary"]

_PRESENT = ("✅", "🟡")
_LINES = re.compile(r"[^\n]*\n|[^\n]+")
_PIPE = re.compile(r"(?<!\\)\|")
_RULE = re.compile(r":?-+:?")
_FENCE = re.compile(r" {0,3}(```+|~~~+)")
_HEADING = re.compile(r"(##|###) +(.+?)(?: +#+)?\s*")
_COUNT = re.compile(
    r"(?P<head>\s*\*\*Coverage\*\*: *)(?P<present>\d+)(?P<of> */ *)(?P<total>\d+|\?)"
)
_SUMMARY = {"✅": "✅ Fully covered", "🟡": "🟡 Partial", "❌": "❌ Not covered"}
_TUNED = re.compile(
    r"-(?:instruct|base|chat|it|hf|thinking|fp8|nvfp4|mxfp4|fp4|int8|int4|awq|gptq|bf16"
    # Dates: YYYY-MM-DD, YYYYMMDD, YYMM and MMDD.
    r"|20\d\d-\d\d-\d\d|20\d{6}|2\d(?:0[1-9]|1[0-2])|(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01]))"
    r"(?=-|$)"
)
_MOST_ALIASES = 16


def model_slug(name: str) -> str:
    """Return a model's slug: its repository's base name in lower case, without what is tuning.

    `Qwen/Qwen3-235B-A22B-Instruct-2507-FP8` is `qwen3-235b-a22b`.
    """
    return _TUNED.sub("", name.rsplit("/", 1)[-1].lower())


def status_of(*, defined: bool, collected: bool) -> Status:
    """Return the mark of a definition by what the dataset has of it."""
    if not defined:
        return "❌"
    return "✅" if collected else "🟡"


def dataset_statuses(
    wanted: Mapping[str, str], published: Mapping[str, str], collected: Collection[str]
) -> dict[str, tuple[str, Status]]:
    """Return what `CoverageDocument.refresh` takes, by what the dataset has.

    Args:
        wanted: definition name -> op type of what the model needs.
        published: definition name -> op type of what the dataset defines; its op type holds.
        collected: names of the definitions with workloads.
    """
    return {
        name: (
            published.get(name, op_type),
            status_of(defined=name in published, collected=name in collected),
        )
        for name, op_type in wanted.items()
    }


def key(text: str) -> str:
    """Reduce a name to its letters and digits, for comparing."""
    return re.sub(r"[\W_]+", "", text.casefold())


def _aliases(heading: str) -> set[str]:
    """Return the models that a heading with slashes names: `Llama 3.1 / 3.3 70B` is two."""
    words = [word.split("/") for word in re.sub(r"\s*/\s*", "/", heading).split()]
    names = itertools.islice(itertools.product(*words), _MOST_ALIASES)
    return {key(" ".join(name)) for name in names}


def _check_text(value: str, what: str, forbidden: str) -> None:
    if (
        not value
        or value != value.strip()
        or not value.isprintable()
        or set(value) & set(forbidden)
    ):
        raise InputError(f"{PATH}: {what} {value!r} would break the document's tables")


@dataclass(frozen=True)
class CoverageRow:
    """One row of a model's tables."""

    model: str
    name: str
    is_definition: bool
    """Whether the name is a definition's (set as code), not a module described in words."""
    op_type: str
    op_label: str
    """The cell as it is written: `gqa_paged TP=4`, `moe (TRT-LLM FP4, EP=2)`."""
    tp: int | None
    ep: int | None
    status: str
    """One of `Status`; the cell's text where it begins with none of them."""
    subsection: str | None
    line: int
    """Counted from one."""


@dataclass(frozen=True)
class Finding:
    """Something in the document that does not agree with the rest of it."""

    kind: Kind
    model: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{PATH}:{self.line}: {self.model}: {self.message}"


@dataclass(frozen=True)
class CoverageCheck:
    """What an update would change, and what is wrong now."""

    diff: str
    """A unified diff, empty where nothing would change."""
    findings: list[Finding]


@dataclass
class _Table:
    """A table by the indexes of its lines and columns."""

    columns: tuple[int, ...]
    subsection: str | None
    lines: list[int]
    """Header, rule, then the rows."""
    count: int | None = None


@dataclass
class _Section:
    heading: str
    start: int
    tables: list[_Table] = field(default_factory=list)


def _spans(line: str) -> list[tuple[int, int]]:
    """Return where the cells of a table's line are, with their padding; nothing for other lines."""
    text = line.rstrip()
    pipes = [match.start() for match in _PIPE.finditer(text)]
    if not pipes or text[: pipes[0]].strip("\ufeff \t"):
        return []
    ends = [*pipes[1:], *([len(text)] if pipes[-1] != len(text) - 1 else [])]
    return list(zip([pipe + 1 for pipe in pipes], ends, strict=False))


@functools.lru_cache(maxsize=4096)  # every edit reads all tables again, most of them unchanged
def _cells(line: str) -> tuple[str, ...]:
    return tuple(line[start:end].strip() for start, end in _spans(line))


def _cell(line: str, column: int) -> str:
    cells = _cells(line)
    return cells[column] if column < len(cells) else ""


def _degree(label: str, which: str) -> int | None:
    found = re.search(rf"\b{which}=([0-9]{{1,4}})\b", label)
    return int(found[1]) if found else None


def _status(cell: str) -> str:
    return next((status for status in get_args(Status) if cell.startswith(status)), cell)


def _op_type(label: str) -> str:
    found = re.match(r"\w+", label)
    return found[0] if found else label


def _overall(rows: Iterable[CoverageRow]) -> Status:
    """Return a model's mark in the summary."""
    statuses = [row.status for row in rows]
    if statuses and all(status == "✅" for status in statuses):
        return "✅"
    return "🟡" if any(status in _PRESENT for status in statuses) else "❌"


def _recount(rows: Iterable[CoverageRow]) -> tuple[int, int]:
    """Return how many of a table's definitions are present, and how many there are."""
    statuses = {row.name: row.status for row in rows if row.is_definition and row.status != "—"}
    return sum(status in _PRESENT for status in statuses.values()), len(statuses)


def unified_diff(before: str, after: str) -> str:
    """Return the difference between two states of the document, as `git diff` would show it."""
    lines = difflib.unified_diff(
        _LINES.findall(before), _LINES.findall(after), f"a/{PATH}", f"b/{PATH}"
    )
    return "".join(
        line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines
    )


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
        document = cls(_LINES.findall(text))
        document._summary()
        return document

    @classmethod
    def read(cls, path: Path) -> CoverageDocument:
        """Read the document's file; its bytes are kept as they are.

        Raises:
            InputError: it cannot be read, is not UTF-8, or is not of the known form.
        """
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: is not a regular file")
        try:
            return cls.parse(path.read_bytes().decode())
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: is not UTF-8 text (byte {error.start})") from error

    def render(self) -> str:
        """Return the text."""
        return "".join(self.lines)

    def write(self, path: Path) -> None:
        """Write the document atomically.

        Raises:
            InputError: the file cannot be written.
        """
        files.write_text(path, self.render())

    # Reading.

    def _visible(self) -> Iterator[tuple[int, str]]:
        """Yield the lines outside code fences, with their indexes."""
        fence = ""
        for index, line in enumerate(self.lines):
            found = _FENCE.match(line)
            if not fence and found:
                fence = found[1]
            elif fence and line.strip().startswith(fence) and not line.strip(f" \t\r\n{fence[0]}"):
                fence = ""
            elif not fence:
                yield index, line

    def _tables(self, *wanted: str) -> Iterator[_Section]:
        """Yield the sections, each with its tables that have the wanted columns."""
        section = _Section("", 0)
        subsection: str | None = None
        table: _Table | None = None
        last = -1
        for index, line in self._visible():
            heading = _HEADING.fullmatch(line.lstrip("\ufeff"))
            cells = _cells(line)
            names = [cell.lower() for cell in cells]
            if heading and heading[1] == "##":
                yield section
                section, subsection = _Section(heading[2], index), None
            elif heading:
                subsection = heading[2]
            elif cells and table and index == last + 1:
                table.lines.append(index)
                last = index
                continue
            elif all(name in names for name in wanted) and self._is_rule(index + 1, len(cells)):
                columns = tuple(names.index(name) for name in wanted)
                table, last = _Table(columns, subsection, [index]), index
                section.tables.append(table)
                continue
            elif section.tables and section.tables[-1].count is None and _COUNT.match(line):
                section.tables[-1].count = index
            table = None
        yield section

    def _is_rule(self, index: int, columns: int) -> bool:
        cells = _cells(self.lines[index]) if index < len(self.lines) else ()
        return len(cells) == columns and all(_RULE.fullmatch(cell) for cell in cells)

    def _summary(self) -> _Table:
        for section in self._tables("model", "architecture", "coverage"):
            if section.tables:
                return section.tables[0]
        raise InputError(f"{PATH}: has no summary table (| Model | Architecture | Coverage |)")

    def _sections(self) -> list[_Section]:
        """Return the models' sections: those with a table of definitions or a summary row."""
        summary = self._summary()
        listed = {key(_cell(self.lines[i], summary.columns[0])) for i in summary.lines[2:]}
        return [
            section
            for section in self._tables("definition", "op type", "status")
            if section.heading and (section.tables or key(section.heading) in listed)
        ]

    def _table_rows(self, section: _Section, table: _Table) -> Iterator[CoverageRow]:
        for index in table.lines[2:]:
            name, label, status = (_cell(self.lines[index], c) for c in table.columns)
            code = re.fullmatch(r"`([^`]+)`", name)
            yield CoverageRow(
                model=section.heading,
                name=code[1] if code else name,
                is_definition=bool(code),
                op_type=_op_type(label),
                op_label=label,
                tp=_degree(label, "TP"),
                ep=_degree(label, "EP"),
                status=_status(status),
                subsection=table.subsection,
                line=index + 1,
            )

    def _section_rows(self, section: _Section) -> list[CoverageRow]:
        return [row for table in section.tables for row in self._table_rows(section, table)]

    def models(self) -> list[str]:
        """Return the headings of the models' sections, in order."""
        return [section.heading for section in self._sections()]

    def rows(self, heading: str | None = None) -> list[CoverageRow]:
        """Return all rows, or those of one model.

        Raises:
            InputError: no section, or more than one, is of that model.
        """
        sections = self._sections() if heading is None else [self._section(heading)]
        return [row for section in sections for row in self._section_rows(section)]

    def statuses(self, heading: str) -> dict[str, str]:
        """Return definition name -> status for a model's section."""
        return {row.name: row.status for row in self.rows(heading) if row.is_definition}

    # Finding a model.

    def _search(self, name: str) -> list[str]:
        """Return the headings a name means, by the closest way of matching that finds any."""
        slug = model_slug(name).removeprefix("meta-")
        unversioned = re.sub(r"-v[0-9]+(\.[0-9]+)*$", "", slug)
        headings = self.models()
        ways = (
            [heading for heading in headings if heading == name],
            [heading for heading in headings if key(heading) == key(name)],
            [heading for heading in headings if key(heading) == key(slug)],
            [heading for heading in headings if key(slug) in _aliases(heading)],
            [heading for heading in headings if key(heading) == key(unversioned)],
        )
        return next((found for found in ways if found), []) if key(name) else []

    def model(self, *names: str) -> str | None:
        """Return the heading of a model's section, None if it has none.

        Args:
            names: what the model is known by: heading, slug or repository id.

        Raises:
            InputError: a name means more than one section.
        """
        for name in names:
            found = self._search(name)
            if len(found) > 1:
                raise InputError(
                    f"{PATH}: {name!r} is ambiguous: {', '.join(map(repr, found))} match"
                )
            if found:
                return found[0]
        return None

    def find(self, name: str) -> str:
        """Return the heading of a model's section by heading, slug or repository id.

        Raises:
            InputError: none or more than one matches; the message names close ones.
        """
        heading = self.model(name)
        if heading is None:
            slugs = {model_slug(h).replace(" ", "-"): h for h in self.models()}
            near = difflib.get_close_matches(model_slug(name).replace(" ", "-"), slugs, cutoff=0.5)
            hint = f"; close: {', '.join(repr(slugs[slug]) for slug in near)}" if near else ""
            raise InputError(f"{PATH}: has no section {name!r}{hint}")
        return heading

    def _section(self, name: str) -> _Section:
        heading = self.find(name)
        return next(section for section in self._sections() if section.heading == heading)

    # Editing.

    @property
    def _eol(self) -> str:
        return "\r\n" if self.lines and self.lines[0].endswith("\r\n") else "\n"

    def _set_cell(self, table: _Table, index: int, column: int, content: str) -> None:
        start, end = _spans(self.lines[index])[column]
        cell = self._fit(table, column, self.lines[index][start:end], content)
        self.lines[index] = self.lines[index][:start] + cell + self.lines[index][end:]

    def _fit(self, table: _Table, column: int, cell: str, content: str) -> str:
        """Pad new content as its cell was; to the column's width where that is aligned."""
        left = cell[: len(cell) - len(cell.lstrip())] or " "
        right = cell[len(cell.rstrip()) :] or " "
        widths = set()
        for index in table.lines:
            spans = _spans(self.lines[index])
            widths.add(spans[column][1] - spans[column][0] if column < len(spans) else 0)
        has_rows = len(table.lines) > 2  # a header and its rule alone are no sign of alignment
        if has_rows and len(widths) == 1:
            return f"{left}{content}".ljust(len(cell) - 1) + right[-1]
        return f"{left}{content}{right}"

    def _insert_row(self, table: _Table, after: int, contents: Mapping[int, str]) -> None:
        """Insert a row below a line of a table, in the style of its rows."""
        model = self.lines[after if after in table.lines[2:] else table.lines[0]]
        row = model.lstrip("\ufeff").rstrip("\r\n")
        for column, (start, end) in reversed(list(enumerate(_spans(row)))):
            cell = self._fit(table, column, row[start:end], contents.get(column, ""))
            row = row[:start] + cell + row[end:]
        if self.lines[after].endswith("\n"):
            self.lines.insert(after + 1, row + self._eol)
        else:  # The file ends here, without a line end; it goes on doing so.
            self.lines[after] += self._eol
            self.lines.insert(after + 1, row)

    def add_model(self, heading: str, architecture: str) -> None:
        """Append a summary row and an empty section for a model.

        Raises:
            InputError: it has a section already, or a text would break the document.
        """
        _check_text(heading, "model", "|`<>{}#")
        _check_text(architecture, "architecture", "|`<>{}")
        known = self.model(heading)
        if known or key(heading) in ("", "summary"):
            raise InputError(f"{PATH}: cannot add {heading!r}: it has {known or 'Summary'!r}")
        summary = self._summary()
        cells = (heading, architecture, _SUMMARY["❌"])
        row = dict(zip(summary.columns, cells, strict=True))
        self._insert_row(summary, max(summary.lines[1:]), row)
        last = next((line.strip() for line in reversed(self.lines) if line.strip()), "")
        before, after = ("\n", "\n---\n") if last == "---" else ("\n---\n\n", "")
        if not self.lines[-1].endswith("\n"):
            self.lines[-1] += self._eol
        section = (
            f"{before}## {heading}\n\n**Architecture**: {architecture}\n\n"
            "| Definition | Op Type | Status |\n|-----------|---------|:------:|\n"
            f"\n**Coverage**: 0 / 0 definitions present.\n{after}"
        )
        self.lines += [line.replace("\n", self._eol) for line in _LINES.findall(section)]

    def mark(self, name: str, definition: str, op_type: str, status: Status) -> None:
        """Set a definition's status in a model's section, adding its row if there is none.

        Where that changes anything, the section's counts and the model's summary are brought in
        line.

        Args:
            name: the model, by heading, slug or repository id.
            definition: the definition, or the words a module without one is described by.
            op_type: what a new row says; it goes where the rows of that type are.
            status: the mark.

        Raises:
            InputError: no such section, or a text would break the table.
        """
        if self._mark(name, definition, op_type, status):
            self.recount(name)

    def _mark(self, name: str, definition: str, op_type: str, status: Status) -> bool:
        _check_text(definition, "definition", "|`")
        _check_text(op_type, "op type", "|`<>{}")
        if status not in get_args(Status):
            raise InputError(f"{PATH}: status {status!r} is none of {', '.join(get_args(Status))}")
        section = self._section(name)
        if not section.tables:
            raise InputError(f"{PATH}: section {section.heading!r} has no table of definitions")
        found = changed = False
        for table in section.tables:
            for row in self._table_rows(section, table):
                if row.name == definition:
                    found = True
                    if row.status != status:
                        self._set_cell(table, row.line - 1, table.columns[2], status)
                        changed = True
        if not found:
            table = section.tables[0]
            same = [
                row for row in self._table_rows(section, table) if row.op_type == _op_type(op_type)
            ]
            after = same[-1].line - 1 if same else max(table.lines[1:])
            shown = definition if status == "—" else f"`{definition}`"
            cells = (shown, op_type, status)
            self._insert_row(table, after, dict(zip(table.columns, cells, strict=True)))
        return changed or not found

    def recount(self, name: str) -> None:
        """Bring a model's counts and its summary row in line with its tables.

        Raises:
            InputError: no section, or more than one, is of that model.
        """
        self._recount_section(self._section(name))

    def _recount_section(self, section: _Section) -> None:
        for table in section.tables:
            count = _COUNT.match(self.lines[table.count]) if table.count is not None else None
            if count and table.count is not None:
                present, total = _recount(self._table_rows(section, table))
                # A total nobody knows yet stays unknown.
                shown = "?" if count["total"] == "?" else total
                line = self.lines[table.count]
                text = f"{count['head']}{present}{count['of']}{shown}"
                self.lines[table.count] = text + line[count.end() :]
        summary = self._summary()
        overall = _overall(self._section_rows(section))
        for index in self._summary_lines(summary, section.heading):
            if _status(_cell(self.lines[index], summary.columns[2])) != overall:
                self._set_cell(summary, index, summary.columns[2], _SUMMARY[overall])

    def _summary_lines(self, summary: _Table, heading: str) -> list[int]:
        return [
            index
            for index in summary.lines[2:]
            if key(_cell(self.lines[index], summary.columns[0])) == key(heading)
        ]

    def refresh(self, name: str, definitions: Mapping[str, tuple[str, Status]]) -> list[str]:
        """Bring a model's section in line with what the dataset has.

        Rows of other definitions stay as they are; counts and summary are made right.

        Args:
            name: the model, by heading, slug or repository id.
            definitions: name -> (op type, status), see `dataset_statuses`.

        Returns:
            The definitions whose rows were changed or added.

        Raises:
            InputError: no such section, or a text would break the table; nothing is changed then.
        """
        before = list(self.lines)
        try:
            changed = [
                definition
                for definition, (op_type, status) in definitions.items()
                if self._mark(name, definition, op_type, status)
            ]
            self.recount(name)
        except InputError:
            self.lines = before
            raise
        return changed

    # Checking.

    def check(
        self, name: str | None = None, definitions: Mapping[str, tuple[str, Status]] | None = None
    ) -> CoverageCheck:
        """Say what a refresh would change, and what does not agree now; nothing is changed.

        Args:
            name: one model, by heading, slug or repository id; None is the whole document.
            definitions: as for `refresh`, of that one model.

        Raises:
            InputError: as `refresh`.
        """
        after = CoverageDocument(list(self.lines))
        if name is None:
            for section in after._sections():
                after._recount_section(section)
        else:
            after.refresh(name, definitions or {})
        return CoverageCheck(unified_diff(self.render(), after.render()), self.findings(name))

    def findings(self, name: str | None = None) -> list[Finding]:
        """Return what in one model's parts, or in the whole document, does not agree.

        Raises:
            InputError: no section, or more than one, is of that model.
        """
        sections = self._sections() if name is None else [self._section(name)]
        found = [finding for section in sections for finding in self._section_findings(section)]
        if name is None:
            found += self._document_findings(sections)
        return sorted(found, key=lambda finding: (finding.line, finding.kind, finding.message))

    def _section_findings(self, section: _Section) -> Iterator[Finding]:
        model = section.heading
        for table in section.tables:
            rows = list(self._table_rows(section, table))
            yield from self._table_findings(model, rows)
            line = self.lines[table.count] if table.count is not None else ""
            count = _COUNT.match(line)
            present, total = _recount(rows)
            if count is None or table.count is None:
                yield Finding(
                    "count", model, table.lines[0] + 1, "its table has no **Coverage** line"
                )
            elif int(count["present"]) != present or count["total"] not in ("?", str(total)):
                yield Finding(
                    "count",
                    model,
                    table.count + 1,
                    f"says {count['present']} / {count['total']}, its table has "
                    f"{present} / {total}",
                )
        yield from self._status_findings(section)
        yield from self._summary_findings(section)

    @staticmethod
    def _table_findings(model: str, rows: list[CoverageRow]) -> Iterator[Finding]:
        first: dict[str, CoverageRow] = {}
        for row in rows:
            if row.status not in get_args(Status):
                message = f"{row.name}: status {row.status!r} is none of {get_args(Status)}"
                yield Finding("status", model, row.line, message)
            earlier = first.setdefault("".join(row.name.split()), row)
            if earlier is not row and earlier.name == row.name:
                message = f"{row.name}: listed already in line {earlier.line}"
                yield Finding("duplicate", model, row.line, message)
            elif earlier.name != row.name:
                message = f"{row.name!r} and {earlier.name!r} differ only by spaces"
                yield Finding("name", model, row.line, message)

    def _status_findings(self, section: _Section) -> Iterator[Finding]:
        """Yield the definitions that one section marks in different ways."""
        first: dict[str, CoverageRow] = {}
        for row in self._section_rows(section):
            earlier = first.setdefault(row.name, row)
            if row.is_definition and earlier.status != row.status:
                message = f"{row.name}: {row.status} here, {earlier.status} in line {earlier.line}"
                yield Finding("status", section.heading, row.line, message)

    def _summary_findings(self, section: _Section) -> Iterator[Finding]:
        model, summary = section.heading, self._summary()
        lines = self._summary_lines(summary, model)
        if not lines:
            yield Finding("summary", model, section.start + 1, "has no row in the summary")
        overall = _overall(self._section_rows(section))
        for index in lines:
            name = _cell(self.lines[index], summary.columns[0])
            says = _cell(self.lines[index], summary.columns[2])
            if index != lines[0]:
                message = f"is in the summary already, in line {lines[0] + 1}"
                yield Finding("duplicate", model, index + 1, message)
            if name != model:
                spaces = "".join(name.split()) == "".join(model.split())
                how = "differs only by spaces from" if spaces else "is not written as"
                message = f"{name!r} in the summary {how} the section's heading"
                yield Finding("name", model, index + 1, message)
            if _status(says) != overall:
                message = f"the summary says {says!r}, its section is {_SUMMARY[overall]!r}"
                yield Finding("summary", model, index + 1, message)

    def _document_findings(self, sections: list[_Section]) -> Iterator[Finding]:
        headings = Counter(key(section.heading) for section in sections)
        first: dict[str, int] = {}
        for section in sections:
            line = first.setdefault(key(section.heading), section.start + 1)
            if line != section.start + 1:
                message = f"has a section already, in line {line}"
                yield Finding("duplicate", section.heading, section.start + 1, message)
        summary = self._summary()
        for index in summary.lines[2:]:
            name = _cell(self.lines[index], summary.columns[0])
            if key(name) not in headings:
                yield Finding("summary", name, index + 1, "has no section")
