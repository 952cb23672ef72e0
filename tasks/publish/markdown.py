"""Foreign text in markdown: what others wrote stays text, and breaks out of nothing.

Model names, evidence and definitions come from configs, source trees and manifests of others. In a
body they may form no table column, no code fence, no HTML, no mention, and no marker of ours.
"""

from __future__ import annotations

import re
from typing import Any

_CREDENTIALS = re.compile(
    r"(?<=://)[^/\s@]+@|\bhf_[A-Za-z0-9]{20,}|\bgh[opusr]_[A-Za-z0-9]{20,}"
    r"|\bgithub_pat_[A-Za-z0-9_]{20,}"
)
_RUN_OF_BACKTICKS = re.compile(r"`{3,}")
_PLAIN = re.compile(r"[^`|<\\]+")


def without_credentials(text: str) -> str:
    """Remove what looks like a token, and the user part of URLs."""
    return _CREDENTIALS.sub("", text)


def one_line(value: Any) -> str:
    """Return a value's text on one line."""
    return " ".join(without_credentials(str(value)).split())


def prose(value: Any) -> str:
    """Return a value as text inside a line of prose."""
    text = one_line(value)
    text = text.replace("\\", "\\\\").replace("`", "\\`").replace("](", "]\\(")
    return text.replace("<", "&lt;").replace("@", "@\N{ZERO WIDTH SPACE}")


def cell(value: Any) -> str:
    """Return a value as text inside a table's cell."""
    return prose(value).replace("|", "\\|")


def code(value: Any) -> str:
    """Return a value as a code span, in prose or a table; as text if it could end the span."""
    text = one_line(value)
    return f"`{text}`" if _PLAIN.fullmatch(text) else cell(text)


def fenced(text: str, language: str) -> str:
    """Return a code block that its content cannot end."""
    runs = [len(run) for run in _RUN_OF_BACKTICKS.findall(text)]
    fence = "`" * (max([2, *runs]) + 1)
    shown = without_credentials(text).replace("<!-- onboard:", "<!-- onboard -")
    return f"{fence}{language}\n{shown.rstrip()}\n{fence}"


FILTERS = {"prose": prose, "cell": cell, "code": code, "fenced": fenced}
