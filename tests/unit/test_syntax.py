"""Parsing where other threads parse too."""

from __future__ import annotations

import ast

import pytest

from tasks import syntax


def test_what_another_thread_has_spoilt_is_parsed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    parse, spoilt = ast.parse, [SystemError("AST constructor recursion depth mismatch")] * 3

    def spoiling(*arguments: str, **options: str) -> ast.AST:
        if spoilt:
            raise spoilt.pop()
        return parse(*arguments, **options)

    monkeypatch.setattr(ast, "parse", spoiling)
    assert ast.unparse(syntax.parse("x = 1")) == "x = 1"
    spoilt.append(SystemError())
    assert ast.unparse(syntax.parse_expression("a + b")) == "a + b"


def test_what_is_not_python_is_said_at_once() -> None:
    with pytest.raises(SyntaxError):
        syntax.parse("x =")
