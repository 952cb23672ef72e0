"""What a validation found: errors, warnings, and which checks ran."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

_LONGEST = 500


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    definition: str
    """Name of the definition it belongs to; empty if it belongs to none."""
    file: str
    """Relative to the dataset; empty if another validator did not say."""
    field: str
    """Field in the file, after `line N: ` in JSON lines; empty if it is the whole file."""
    message: str


def printable(text: str) -> str:
    """Make text from a file fit to print: one line, no control characters or lone surrogates."""
    line = "".join(c if c.isprintable() else " " for c in text[: 2 * _LONGEST])
    line = " ".join(line.split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."


@dataclass
class Findings:
    """Collects findings."""

    errors: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)
    _wrong: set[tuple[str, str]] = field(default_factory=set)

    def error(self, definition: str, file: object, where: str, message: str) -> None:
        """Add an error."""
        found = _finding(definition, file, where, message)
        self.errors.append(found)
        self._wrong |= {(found.file, ""), (found.file, found.field.partition(":")[0])}

    def warn(self, definition: str, file: object, where: str, message: str) -> None:
        """Add a warning."""
        self.warnings.append(_finding(definition, file, where, message))

    def error_at(self, file: str, line: int | None) -> bool:
        """Say whether there is an error in a file already, or in one line of it."""
        return (file, "" if line is None else f"line {line}") in self._wrong


def _finding(definition: str, file: object, where: str, message: str) -> Finding:
    return Finding(*(printable(text) for text in (definition, str(file), where, message)))


@dataclass
class Report:
    """The result of a validation."""

    definitions: int
    errors: list[Finding]
    warnings: list[Finding]
    checks: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Return what is printed: findings by definition, those of one kind on one line."""
        shown: dict[tuple[str, str, str, str], list[str]] = {}
        for level, findings in (("error", self.errors), ("warning", self.warnings)):
            for found in findings:
                key = (found.definition, level, found.file, found.message)
                shown.setdefault(key, []).append(found.field)
        lines, heading = [], None
        for (definition, level, file, message), fields in sorted(shown.items()):
            if definition != heading:
                heading = definition
                lines.append(f"{definition or '(no definition)'}:")
            named = ", ".join(name for name in fields if name)
            parts = [part for part in (file, named, message) if part]
            lines.append(f"  {level}: {': '.join(parts)}")
        failed = Counter(found.definition for found in self.errors)
        lines.append(
            f"{self.definitions} definitions, {self.definitions - len(failed.keys() - {''})} "
            f"without errors; {len(self.errors)} errors, {len(self.warnings)} warnings"
        )
        return lines
