"""Foreign text in markdown: what others wrote stays text, and breaks out of nothing.

Model names, evidence and definitions come from configs, source trees and manifests of others. In a
body they may form no table column, no code fence, no HTML, no mention, and no marker of ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

_CREDENTIALS = re.compile(
    r"(?<=://)[^/\s@]+@|\bhf_[A-Za-z0-9]{20,}|\bgh[opusr]_[A-Za-z0-9]{20,}"
    r"|\bgithub_pat_[A-Za-z0-9_]{20,}|\bsk-[A-Za-z0-9_-]{20,}|\bAKIA[0-9A-Z]{16}\b"
    r"|\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]+"
)
_NAMED_SECRET = re.compile(
    r"(?P<name>\b[\w-]*(?:api[_-]?key|access[_-]?key|password|passwd|secret|auth[_-]?token"
    r"|access[_-]?token|hf[_-]?token|github[_-]?token|Authorization)[\"']?\s*[=:]\s*)"
    r"(?!None\b)(?:(?:Bearer|Basic)\s+)?(?:'[^'\n]*'|\"[^\"\n]*\"|[^\s,;)}\]]+)",
    re.IGNORECASE,
)
_HOME = re.compile(r"/(?:home|Users)/[^/\s'\":,;)\]]+|/root(?=[/\s'\":,;)\]]|$)")
_TERMINAL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[@-_]|[\x00-\x08\x0b-\x1f\x7f\ufffe\uffff]")
_SHORTEST_SECRET = 6
_RUN_OF_BACKTICKS = re.compile(r"`{3,}")
_PLAIN = re.compile(r"[^`|<\\]+")


def without_credentials(text: str) -> str:
    """Remove what looks like a token, and the user part of URLs."""
    return _CREDENTIALS.sub("", text)


def scrubbed(text: str, secrets: Iterable[str], places: Mapping[str, str]) -> str:
    """Return a log fit to publish: no credentials, home folders or terminal codes.

    Args:
        text: the log.
        secrets: what must not be in it, whatever it looks like.
        places: folders of this machine -> what they are called instead.
    """
    for secret in secrets:
        if len(secret) >= _SHORTEST_SECRET:
            text = text.replace(secret, "")
    for place, name in sorted(places.items(), key=lambda item: -len(item[0])):
        text = re.sub(rf"{re.escape(place)}(?![\w.-])", name.replace("\\", r"\\"), text)
    text = without_credentials(_NAMED_SECRET.sub(r"\g<name>***", text))
    return _TERMINAL.sub("", _HOME.sub("~", text))


def one_line(value: Any) -> str:
    """Return a value's text on one line."""
    return " ".join(without_credentials(str(value)).split())


def prose(value: Any) -> str:
    """Return a value as text inside a line of prose."""
    text = one_line(value)
    text = text.replace("\\", "\\\\").replace("`", "\\`")
    text = text.replace("](", "]\\(").replace("]:", "]\\:")
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
    shown = _without_markers(without_credentials(text))
    return f"{fence}{language}\n{shown.rstrip()}\n{fence}"


def width(text: str) -> int:
    """Return how long a site counts a text to be: in UTF-16 code units."""
    return len(text) + sum(character > "\uffff" for character in text)


def fits(body: str, log: str, limit: int) -> bool:
    """Return whether there is room for a body and the whole of its log."""
    return width(body.rstrip()) + width(_folded(log)) <= limit


def fit(body: str, log: str, limit: int, link: str) -> str:
    """Return a body that ends with its log: all of it, or of its head and tail what fits.

    Args:
        body: the text before it.
        log: the log; there may be none.
        limit: how long (`width`) the whole may be.
        link: where the whole log is, said in place of what is left out.

    Raises:
        ValueError: the body alone is longer.
    """
    body = body.rstrip()
    if fits(body, log, limit):
        return body + _folded(log)
    if width(body) > limit:
        raise ValueError(f"is {width(body)} characters long, and the site takes {limit}")
    log = _without_markers(without_credentials(log))
    cut = f"[... left out here{f'; {link}' if link else ''} ...]"
    room = limit - width(body) - width(_folded(cut))
    while room > 0:
        text = body + _folded(f"{_first(log, room // 2)}\n{cut}\n{_last(log, room // 2)}")
        excess = width(text) - limit
        if excess <= 0:
            return text
        room -= excess
    return body


def _folded(log: str) -> str:
    """Return a log as it follows a body; nothing if there is none."""
    if not log.strip():
        return ""
    summary = f"<summary>Log, {len(log.splitlines())} lines</summary>"
    return f"\n\n<details>\n{summary}\n\n{fenced(log, 'text')}\n\n</details>"


def _first(text: str, room: int) -> str:
    """Return the first lines that there is room for, or the beginning of the only one."""
    piece = _decoded(text[:room].encode("utf-16-le", "surrogatepass")[: 2 * room])
    return piece.rpartition("\n")[0] or piece


def _last(text: str, room: int) -> str:
    """Return the last lines that there is room for, or the end of the only one."""
    data = text[-room:].encode("utf-16-le", "surrogatepass") if room else b""
    piece = _decoded(data[max(0, len(data) - 2 * room) :])
    return piece.partition("\n")[2] or piece


def _decoded(data: bytes) -> str:
    """Return text without the halves of characters."""
    return data.decode("utf-16-le", "ignore")


def _without_markers(text: str) -> str:
    return text.replace("<!-- onboard:", "<!-- onboard -")


FILTERS = {"prose": prose, "cell": cell, "code": code, "fenced": fenced}
