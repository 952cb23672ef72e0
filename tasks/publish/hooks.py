"""What a repository's pre-commit hooks would say of a text, as far as that can be known.

The hooks themselves are not run: they are programs of others, named by a file of others and fetched
when they run, and we hold tokens. What the standard hooks want of a text is a line or two each, and
is looked at here; what other hooks want is not known.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tasks.errors import InputError, first_problem
from tasks.git import git, run

CONFIG = ".pre-commit-config.yaml"
_END = re.compile(r"\r\n|\n|\r")
_LINES = re.compile(r"[^\n]*\n|[^\n]+")
_NAMED_END = {"lf": "\n", "crlf": "\r\n", "cr": "\r"}
_SPACE = " \t\r\x0b\x0c"
"""What the hooks take for it; a no-break space is none."""
_KINDS = {
    ".json": ("json",),
    ".md": ("markdown",),
    ".mdx": ("mdx",),
    ".py": ("python",),
    ".toml": ("toml",),
    ".yaml": ("yaml",),
    ".yml": ("yaml",),
}
"""What pre-commit calls a file besides `file` and `text`, by its name's end."""
_OF_KIND = {
    "black": "python",
    "check-ast": "python",
    "check-json": "json",
    "check-toml": "toml",
    "check-yaml": "yaml",
    "debug-statements": "python",
    "isort": "python",
    "mypy": "python",
    "requirements-txt-fixer": "requirements",
    "ruff": "python",
    "ruff-check": "python",
    "ruff-format": "python",
    "taplo-format": "toml",
    "taplo-lint": "toml",
    "yamlfmt": "yaml",
}
"""The one kind of file that a hook looks at."""
_OF_NO_EDIT = {
    "check-added-large-files",
    "check-case-conflict",
    "check-merge-conflict",
    "check-symlinks",
    "destroyed-symlinks",
    "no-commit-to-branch",
}
"""Hooks that look at new files, at merges, or at no file."""

_MODEL = ConfigDict(extra="ignore")


class _Hook(BaseModel):
    model_config = _MODEL

    id: str
    args: list[str] = Field(default=[])
    files: str = ""
    exclude: str = "^$"
    types: list[str] = Field(default=[])
    types_or: list[str] = Field(default=[])
    exclude_types: list[str] = Field(default=[])


class _Repository(BaseModel):
    model_config = _MODEL

    hooks: list[_Hook]


class _Config(BaseModel):
    model_config = _MODEL

    repos: list[_Repository]
    files: str = ""
    exclude: str = "^$"


@dataclass(frozen=True)
class _Edited:
    """A file's text."""

    path: PurePosixPath
    text: str

    @property
    def lines(self) -> Iterator[tuple[int, str]]:
        return enumerate(_LINES.findall(self.text), 1)


Wrong = Iterator[tuple[int, str, str]]
"""Number, text and fault of a line; number 0 and no text for what is wrong with the whole."""
Check = Callable[[_Edited, str], Wrong]
"""Given the file and the hook's arguments."""


def _end_of_file(edited: _Edited, _args: str) -> Wrong:
    stripped = edited.text.rstrip("\r\n")
    if edited.text and (not stripped or not _END.fullmatch(edited.text[len(stripped) :])):
        yield 0, "", "does not end with one line end"


def _trailing_space(edited: _Edited, args: str) -> Wrong:
    given = re.findall(r"--markdown-linebreak-ext[= ](\S+)", args)
    kinds = {kind.lstrip(".") for kinds in given for kind in kinds.split(",")}
    breaks = not kinds.isdisjoint({"*", edited.path.suffix.lstrip(".")})
    for number, line in edited.lines:
        bare = line.removesuffix("\n").removesuffix("\r") if line.endswith("\n") else line
        kept = bare.rstrip(_SPACE)
        if bare != kept and not (breaks and kept and bare == f"{kept}  "):
            yield number, line, "has spaces at its end"


def _line_ends(edited: _Edited, args: str) -> Wrong:
    given = re.search(r"(?:--fix|-f)[= ](crlf|lf|cr)\b", args)
    found = set(_END.findall(edited.text))
    if given and found - {_NAMED_END[given[1]]}:
        yield 0, "", f"has other line ends than {given[1].upper()}"
    elif not given and len(found) > 1:
        yield 0, "", "has line ends of more than one kind"


def _tabs(edited: _Edited, _args: str) -> Wrong:
    for number, line in edited.lines:
        if "\t" in line:
            yield number, line, "has a tab"


def _carriage_returns(edited: _Edited, _args: str) -> Wrong:
    for number, line in edited.lines:
        if line.endswith("\r\n"):
            yield number, line, "ends with CRLF"


_CHECKS: Mapping[str, Check] = {
    "end-of-file-fixer": _end_of_file,
    "mixed-line-ending": _line_ends,
    "remove-crlf": _carriage_returns,
    "remove-tabs": _tabs,
    "trailing-whitespace": _trailing_space,
}


def hook_problems(clone: Path, path: PurePosixPath, text: str) -> list[str]:
    """Return what the hooks that are known would have changed or refused of an edited file.

    What the commit that is checked out has already is not held against the edit.

    Args:
        clone: a clone; without hooks there are no problems.
        path: the file in it.
        text: what the file is to contain.

    Raises:
        InputError: the hooks' configuration is damaged.
    """
    before, after = _Edited(path, _committed(clone, path)), _Edited(path, text)
    return [
        f"{hook.id}: {path}{f':{number}' if number else ''} {fault}"
        for hook in _hooks(clone, path)
        if hook.id in _CHECKS
        for number, fault in _new(_CHECKS[hook.id], before, after, " ".join(hook.args))
    ]


def unknown_hooks(clone: Path, path: PurePosixPath) -> list[str]:
    """Return the hooks that may look at a file, and of which nothing is known here.

    Args:
        clone: a clone.
        path: the file in it.

    Raises:
        InputError: the hooks' configuration is damaged.
    """
    return [
        hook.id
        for hook in _hooks(clone, path)
        if hook.id not in _CHECKS
        and hook.id not in _OF_NO_EDIT
        and _OF_KIND.get(hook.id, "file") in _tags(path)
    ]


def _new(check: Check, before: _Edited, after: _Edited, args: str) -> Iterator[tuple[int, str]]:
    """Yield what is wrong after an edit, and was not before."""
    known = Counter(line for _, line, _ in check(before, args))
    for number, line, fault in check(after, args):
        if not known[line]:
            yield number, fault
        known[line] -= known[line] > 0


def _committed(clone: Path, path: PurePosixPath) -> str:
    """Return a file as it is in the commit that is checked out; empty if there is none."""
    if not git("ls-tree", "HEAD", "--", f":(literal){path}", cwd=clone):
        return ""
    return run("cat-file", "blob", f"HEAD:{path}", cwd=clone).decode(errors="replace")


def _hooks(clone: Path, path: PurePosixPath) -> list[_Hook]:
    """Return the hooks that look at a file."""
    config = _config(clone)
    try:
        if not _selected(config, path):
            return []
        hooks = [hook for repository in config.repos for hook in repository.hooks]
        return [hook for hook in hooks if _selected(hook, path) and _of_types(hook, path)]
    except re.error as error:
        raise InputError(f"{clone / CONFIG}: {error.pattern!r} is no pattern ({error})") from error


def _config(clone: Path) -> _Config:
    text = _committed(clone, PurePosixPath(CONFIG))
    try:
        loaded: Any = yaml.safe_load(text) or {"repos": []}
        if not isinstance(loaded, dict):
            raise InputError(f"{clone / CONFIG}: is no mapping")
        return _Config.model_validate(loaded)
    except ValidationError as error:
        field, reason = first_problem(error)
        raise InputError(f"{clone / CONFIG}: field {field}: {reason}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise InputError(f"{clone / CONFIG}: is not YAML ({type(error).__name__})") from error


def _selected(by: _Config | _Hook, path: PurePosixPath) -> bool:
    name = str(path)
    return bool(re.search(by.files, name)) and not re.search(by.exclude, name)


def _tags(path: PurePosixPath) -> set[str]:
    return {"file", "text", "non-executable", *_KINDS.get(path.suffix, ())}


def _of_types(hook: _Hook, path: PurePosixPath) -> bool:
    tags = _tags(path)
    return (
        tags.issuperset(hook.types)
        and (not hook.types_or or not tags.isdisjoint(hook.types_or))
        and tags.isdisjoint(hook.exclude_types)
    )
