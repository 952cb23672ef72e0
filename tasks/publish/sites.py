"""Where SGLang implements what FlashInfer lacks: the file, and the line in it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tasks import git, syntax
from tasks.git import GitError

_SITE = re.compile(r"(?P<file>[\w./-]+\.(?:py|cu|cuh|cpp|h))(?::(?P<line>\d+))?", re.ASCII)


@dataclass(frozen=True)
class Site:
    """A place in SGLang's repository."""

    file: str
    line: int | None = None

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file

    def url(self, sha: str | None) -> str:
        """Return its page on GitHub."""
        anchor = f"#L{self.line}" if self.line else ""
        revision = sha if sha and re.fullmatch(r"[0-9a-f]{7,40}", sha) else "main"
        return f"https://github.com/sgl-project/sglang/blob/{revision}/{self.file}{anchor}"


def sglang_site(evidence: Iterable[str], file: str, keyword: str, clone: Path) -> Site | None:
    """Return where SGLang implements a kernel: as the evidence says, or as its source does.

    Args:
        evidence: the manifest's reasons; those about SGLang begin with its name.
        file: what the op module names, relative to the repository; empty if nothing.
        keyword: a word in the name of what implements it.
        clone: SGLang's clone, if there is one.
    """
    said = [
        Site(match["file"], int(match["line"]) if match["line"] else None)
        for line in evidence
        if line.startswith("SGLang ")
        for match in _SITE.finditer(line)
    ]
    exact = next((site for site in said if site.line), None)
    if exact or not (file or said):
        return exact
    file = file or said[0].file
    return Site(file, _line_of(file, keyword, clone))


def _line_of(file: str, keyword: str, clone: Path) -> int | None:
    """Return the line of the first public function or class whose name has the keyword."""
    if not keyword or not (clone / ".git").exists():
        return None
    try:
        tree = syntax.parse(git.run("show", f"HEAD:{file}", cwd=clone))
    except (GitError, SyntaxError, ValueError, RecursionError):
        return None
    named = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and keyword.lower() in node.name.lower()
    ]
    named.sort(key=lambda node: (node.name.startswith("_"), node.lineno))
    return named[0].lineno if named else None
