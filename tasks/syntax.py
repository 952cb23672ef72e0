"""`ast.parse` for a process with threads.

Before Python 3.11.8 and 3.12.2 all threads count the depth of their trees in one place
(python/cpython#106905): where two parse at once, Prefect's own among them, a tree that is right is
given up with a SystemError. It is parsed again then.
"""

from __future__ import annotations

import ast

from tenacity import retry, retry_if_exception_type, stop_after_attempt

_again = retry(
    retry=retry_if_exception_type(SystemError), stop=stop_after_attempt(10), reraise=True
)


@_again
def parse(source: str | bytes) -> ast.Module:
    """Return the syntax tree of a module's text; see `ast.parse` for what it raises."""
    return ast.parse(source)


@_again
def parse_expression(source: str) -> ast.Expression:
    """Return the syntax tree of an expression; see `ast.parse` for what it raises."""
    return ast.parse(source, mode="eval")
