"""Python text in a dataset: it is compiled here and never run."""

from __future__ import annotations

import ast
import warnings

from tasks import syntax


def parsed(source: str) -> ast.Module | str:
    """Return the syntax tree of Python text that compiles, or why it does not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = syntax.parse(source)
            compile(source, "<dataset>", "exec", dont_inherit=True)
        except SyntaxError as error:
            return f"is not Python (line {error.lineno}: {error.msg})"
        except (ValueError, RecursionError, MemoryError) as error:
            return f"is not Python ({error})"
    return tree


def takes(function: ast.FunctionDef, count: int) -> bool:
    """Say whether a function can be called with that many positional arguments."""
    arguments = function.args
    most = len(arguments.posonlyargs) + len(arguments.args)
    least = most - len(arguments.defaults)
    required_keywords = any(default is None for default in arguments.kw_defaults)
    return least <= count and (count <= most or bool(arguments.vararg)) and not required_keywords
