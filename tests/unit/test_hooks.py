"""What pre-commit's hooks would say, by what the hooks of the same names really say."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import pytest

from tasks.coverage_doc import PATH, CoverageDocument
from tasks.errors import InputError
from tasks.publish.hooks import CONFIG, hook_problems, unknown_hooks
from tests.conftest import DATA
from tests.unit.test_repos import commit

DOCUMENT = (DATA / "flashinfer-bench" / PATH).read_text()
# As FlashInfer-Bench has them.
HOOKS = """
repos:
  - repo: https://github.com/pre-commit/pre-commit-hooks
    rev: v5.0.0
    hooks:
      - id: check-added-large-files
      - id: check-case-conflict
      - id: check-merge-conflict
      - id: check-symlinks
      - id: end-of-file-fixer
      - id: mixed-line-ending
      - id: requirements-txt-fixer
      - id: trailing-whitespace
  - repo: https://github.com/Lucas-C/pre-commit-hooks
    rev: v1.5.5
    hooks:
      - id: remove-tabs
      - id: remove-crlf
  - repo: https://github.com/psf/black-pre-commit-mirror
    rev: 25.1.0
    hooks:
      - id: black
  - repo: https://github.com/pycqa/isort
    rev: 6.0.1
    hooks:
      - id: isort
        args: ["--profile=black"]
  - repo: https://github.com/google/yamlfmt
    rev: v0.16.0
    hooks:
      - id: yamlfmt
  - repo: https://github.com/ComPWA/taplo-pre-commit
    rev: v0.9.3
    hooks:
      - id: taplo-format
        args: ["--option", "column_width=100"]
"""
FILE = PurePosixPath(PATH)


def made(folder: Path, hooks: str, text: str = DOCUMENT) -> Path:
    clone = folder / "clone"
    commit(clone, PATH, text)
    if hooks:
        commit(clone, CONFIG, hooks)
    return clone


def one(hook: str) -> str:
    return f"repos: [{{repo: local, hooks: [{hook}]}}]"


def of(folder: Path, hook: str, text: str, before: str = "") -> list[str]:
    """Return the faults that one hook finds, without what is said of all."""
    problems = hook_problems(made(folder, one(hook), before), FILE, text)
    return [problem.partition(f": {PATH}")[2] for problem in problems]


def test_an_edited_document_is_clean(tmp_path: Path) -> None:
    clone = made(tmp_path, HOOKS)
    document = CoverageDocument.parse(DOCUMENT)
    document.mark("MiniMax M2", "gemm_n512_k3072", "gemm", "✅")
    document.add_model("A new one", "GQA + Dense")
    assert document.render() != DOCUMENT
    assert hook_problems(clone, FILE, document.render()) == []
    assert unknown_hooks(clone, FILE) == []


def test_what_is_wrong_is_said_with_its_hook_and_line(tmp_path: Path) -> None:
    clone = made(tmp_path, HOOKS)
    lines = DOCUMENT.splitlines(keepends=True)
    lines[2] = lines[2].replace("\n", " \t\r\n")
    assert hook_problems(clone, FILE, "".join(lines).rstrip("\n")) == [
        f"end-of-file-fixer: {PATH} does not end with one line end",
        f"mixed-line-ending: {PATH} has line ends of more than one kind",
        f"trailing-whitespace: {PATH}:3 has spaces at its end",
        f"remove-tabs: {PATH}:3 has a tab",
        f"remove-crlf: {PATH}:3 ends with CRLF",
    ]


@pytest.mark.parametrize("hooks", ["", "# none\n", "repos: []\n"])
def test_without_hooks_nothing_is_wrong(tmp_path: Path, hooks: str) -> None:
    clone = made(tmp_path, hooks)
    assert hook_problems(clone, FILE, "a \t\r\nb") == unknown_hooks(clone, FILE) == []


@pytest.mark.parametrize(
    ("hook", "good", "bad"),
    [
        ("{id: end-of-file-fixer}", ["", "a\n", "a\r\n", "a\r", " \n"], ["a", "\n", "a\n\n"]),
        ("{id: end-of-file-fixer}", [], ["a\n\r", "a\r\n\r\n", "a\r\r\n"]),
        (
            "{id: trailing-whitespace}",
            ["a\n", "a\r\n", "a\u00a0\n"],
            ["a \n", "a\t", "  \r\n", "a\r"],
        ),
        ("{id: trailing-whitespace}", [], ["a\r\r\n", "a\x0b\n", "a  \n"]),
        (
            "{id: trailing-whitespace, args: [--markdown-linebreak-ext=md, "
            "'--markdown-linebreak-ext=mdx,x']}",
            ["a  \n", "a\n"],
            ["a \n", "a   \n", "  \n"],
        ),
        ("{id: trailing-whitespace, args: [--markdown-linebreak-ext=md]}", [], ["a  \n"]),
        ("{id: mixed-line-ending}", ["a\nb\n", "a\r\nb\r\n", "a"], ["a\r\nb\n", "a\rb\n"]),
        ("{id: mixed-line-ending, args: [--fix=lf]}", ["a\n"], ["a\r\n", "a\r", "a\r\nb\n"]),
        ("{id: mixed-line-ending, args: ['-f', crlf]}", ["a\r\n"], ["a\n", "a\r"]),
        ("{id: mixed-line-ending, args: [--fix=no]}", ["a\r\n"], ["a\r\nb\n"]),
        ("{id: remove-tabs}", ["a b\n"], ["a\tb\n"]),
        ("{id: remove-crlf}", ["a\n", "a\r"], ["a\nb\r\n"]),
        # They look at new files, or at merges.
        ("{id: check-added-large-files}", ["a" * 600_000], []),
        ("{id: check-merge-conflict}", ["Heading\n=======\n"], []),
    ],
)
def test_each_hook(tmp_path: Path, hook: str, good: list[str], bad: list[str]) -> None:
    clone = made(tmp_path, one(hook), "")
    assert {text: hook_problems(clone, FILE, text) for text in good} == {t: [] for t in good}
    for text in bad:
        assert len(hook_problems(clone, FILE, text)) == 1, repr(text)


def test_what_was_there_before_is_not_held_against_the_edit(tmp_path: Path) -> None:
    hook = "{id: trailing-whitespace}"
    before = "a \nb\nc \n"
    assert of(tmp_path / "1", hook, f"new\n{before}", before) == []
    twice = of(tmp_path / "2", hook, f"{before}a \nd \n", before)
    assert twice == [":4 has spaces at its end", ":5 has spaces at its end"]
    assert of(tmp_path / "3", "{id: end-of-file-fixer}", "a\nb", "a") == []


@pytest.mark.parametrize(
    ("selection", "looks"),
    [
        ("files: ^docs/", True),
        ("files: '[.]py$'", False),
        ("exclude: ^docs/", False),
        ("exclude: ^src/", True),
        ("types: [text]", True),
        ("types: [python]", False),
        ("types_or: [python, mdx]", True),
        ("types_or: [python, markdown]", False),
        ("exclude_types: [mdx]", False),
    ],
)
def test_hooks_that_look_at_other_files(tmp_path: Path, selection: str, looks: bool) -> None:
    hook = f"{{id: remove-tabs, {selection}}}"
    assert bool(of(tmp_path, hook, "\t\n")) is looks


@pytest.mark.parametrize("top", ["exclude: ^docs/", "files: ^src/"])
def test_a_repository_that_leaves_files_out(tmp_path: Path, top: str) -> None:
    clone = made(tmp_path, f"{top}\n{one('{id: remove-tabs}')}")
    assert hook_problems(clone, FILE, "\t\n") == []


def test_hooks_of_which_nothing_is_known(tmp_path: Path) -> None:
    hooks = "{id: black}, {id: prettier}, {id: codespell, exclude: docs}, {id: remove-tabs}"
    clone = made(tmp_path, one(hooks))
    assert unknown_hooks(clone, FILE) == ["prettier"]
    assert unknown_hooks(clone, PurePosixPath("src/a.py")) == ["black", "prettier", "codespell"]


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        ("repos: [", "is not YAML"),
        ("- a\n", "is no mapping"),
        ("repos: [{hooks: [{args: []}]}]", r"field repos\.0\.hooks\.0\.id: Field required"),
        (one("{id: remove-tabs, files: '('}"), r"'\(' is no pattern"),
        ("repos: !!python/object:os.system {}", "is not YAML"),
    ],
)
def test_a_damaged_configuration_is_an_error(tmp_path: Path, hooks: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as told:
        hook_problems(made(tmp_path, hooks), FILE, DOCUMENT)
    assert CONFIG in str(told.value)
