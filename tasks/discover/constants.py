"""A calculator for the constant part of Python sources: tables, and the calls that fill them.

FlashInfer's trace templates are made by dictionaries, comprehensions and small factory functions.
What they come to is computed here from the syntax tree; nothing is imported or run. Only the Python
that they are written in is followed: no loop, no `try`, no condition on what a real call is given.
All that such code names is `UNKNOWN` from then on. Two things are taken on trust: functions of
other packages change nothing that they are given, and an object's attributes are plain ones.

A tree is data of unknown origin: the work, the depth and the size of every value are bounded.
"""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from tasks.discover.syntax import Imported, dotted, import_bindings
from tasks.discover.values import (
    MAX_ITEMS,
    MAX_TEXT,
    SCALARS,
    UNKNOWN,
    Class,
    Function,
    Record,
    Scope,
    bounded,
    is_key,
    size,
    spoil,
)

MAX_STEPS = 1_500_000
"""And words of memory. FlashInfer's templates take 500 000."""
_MAX_DEPTH = 25

_CACHES = frozenset({"cache", "lru_cache"})
"""Decorators that a function is followed through."""
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
_PLAIN = (*SCALARS, list, tuple, dict)
_BUILTINS: Mapping[str, Callable[..., Any]] = {
    "list": list,
    "tuple": tuple,
    "dict": lambda given=None, **more: {**(given or {}), **more},
    "range": lambda *bounds: list(range(*bounds)[: MAX_ITEMS + 1]),
}


class _ExhaustedError(Exception):
    """The tree asks for more work than any real one."""


class _UnknownError(Exception):
    """An expression depends on what is not known."""


class Calculator:
    """Computes values of a package's modules.

    Args:
        load: returns a module's tree and whether it is a package, None where there is none.
    """

    def __init__(self, load: Callable[[str], tuple[ast.Module, bool] | None]) -> None:
        self._load = load
        self._modules: dict[str, Scope | None] = {}
        self._steps = 0
        self._depth = 0

    def value(self, expression: ast.expr, scope: Scope) -> Any:
        """Compute an expression of a module; UNKNOWN where it cannot be."""
        try:
            return self._value(expression, scope)
        except (_ExhaustedError, RecursionError):
            return UNKNOWN

    def module(self, name: str) -> Scope | None:
        """Return a module's names, None for one outside the package."""
        if name not in self._modules:
            self._modules[name] = None
            loaded = self._load(name)
            if loaded is not None:
                tree, is_package = loaded
                scope = self._modules[name] = Scope(name, is_package)
                try:
                    self._run(tree.body, scope)
                except (_ExhaustedError, RecursionError):
                    scope.names.clear()
        return self._modules[name]

    def _tick(self, words: int = 0) -> None:
        self._steps += 1 + words
        if self._steps > MAX_STEPS:
            raise _ExhaustedError

    # Statements

    def _run(self, body: list[ast.stmt], scope: Scope) -> bool:
        """Run statements; return whether they ended in a `return` or `raise`."""
        for node in body:
            self._tick()
            try:
                if scope.returned:  # Perhaps: by code that is not followed.
                    self._forget(node, scope)
                elif self._statement(node, scope):
                    return True
            except _UnknownError:
                self._forget(node, scope)
        return False

    def _statement(self, node: ast.stmt, scope: Scope) -> bool:  # noqa: C901, PLR0912 - a case per kind
        match node:
            case ast.FunctionDef():
                scope.names[node.name] = self._function(node, scope)
            case ast.ClassDef():
                scope.names[node.name] = self._class(node, scope)
            case ast.Import() | ast.ImportFrom():
                for name, origin in import_bindings(node, scope.module, scope.is_package).items():
                    for hidden in scope.names if name.startswith("*") else ():
                        scope.forget(hidden)
                    scope.names[name] = origin
            case ast.Assign():
                value = self._value(node.value, scope)
                for target in node.targets:
                    self._assign(target, value, scope)
            case ast.AnnAssign(value=ast.expr() as expression):
                self._assign(node.target, self._value(expression, scope), scope)
            case ast.AugAssign(op=ast.Add()):
                before, more = self._value(node.target, scope), self._value(node.value, scope)
                both = isinstance(before, list) and isinstance(more, list)
                after = [*before, *more] if both else UNKNOWN
                self._tick(spoil(before, 0))  # For the others who have it.
                self._assign(node.target, after, scope)
            case ast.Expr():
                self._value(node.value, scope)
            case ast.Delete(targets=[ast.Subscript() as target]):
                owner, key = self._value(target.value, scope), self._value(target.slice, scope)
                self._method(owner, "pop", [key, None])
            case ast.Return():
                scope.returned.append(self._value(node.value, scope) if node.value else None)
                return True
            case ast.Raise():
                return True
            case ast.If():
                is_true = _truth(self._value(node.test, scope))
                return self._run(node.body if is_true else node.orelse, scope)
            case ast.Pass() | ast.Assert() | ast.AnnAssign():
                pass
            case _:
                raise _UnknownError
        return False

    def _forget(self, node: ast.AST, scope: Scope, seen: frozenset[int] = frozenset()) -> None:
        """Make unknown all that code which is not followed names: it may change or bind it.

        Args:
            node: the code.
            scope: where it stands.
            seen: the functions it was called from.
        """
        parts, called = [node], set()
        for part in parts:
            self._tick()
            if not isinstance(part, _DEFINITIONS):
                parts += ast.iter_child_nodes(part)
            if isinstance(part, ast.Call):
                called.add(part.func)
            elif isinstance(part, ast.Return | ast.Yield | ast.YieldFrom):
                scope.returned.append(UNKNOWN)
            elif isinstance(part, ast.Name | ast.Attribute) and dotted(part):
                value = self._value(part, scope)
                if isinstance(value, Function) and part in called and id(value) not in seen:
                    for statement in value.node.body:
                        self._forget(statement, value.scope.inner({}), seen | {id(value)})
                self._tick(spoil(value))
        for part in parts:
            if isinstance(part, ast.Name) and not isinstance(part.ctx, ast.Load):
                scope.forget(part.id)
            # A definition, an import, a handler, a pattern; `global`.
            bound = [getattr(part, key, None) for key in ("name", "asname", "rest")]
            for name in (*bound, *getattr(part, "names", ())):
                if isinstance(name, str):
                    scope.forget(name.partition(".")[0])

    def _assign(self, target: ast.expr, value: Any, scope: Scope) -> None:
        match target:
            case ast.Name():
                scope.names[target.id] = value
            case ast.Tuple() if isinstance(value, list | tuple) and len(value) == len(target.elts):
                for part, item in zip(target.elts, value, strict=True):
                    self._assign(part, item, scope)
            case ast.Attribute():
                owner = self._value(target.value, scope)
                if isinstance(owner, Record | Function):
                    owner.attributes[target.attr] = value
            case ast.Subscript():
                owner, key = self._value(target.value, scope), self._value(target.slice, scope)
                self._method(owner, "update", [{key: value} if is_key(key) else UNKNOWN])
            case _:
                self._forget(target, scope)

    # Expressions

    def _value(self, node: ast.expr, scope: Scope) -> Any:
        try:
            value = self._compute(node, scope)
        except _UnknownError:
            self._forget(node, scope)
            value = UNKNOWN
        words = size(value)
        self._tick(words)
        return bounded(value) if words or isinstance(value, int) else value

    def _compute(self, node: ast.expr, scope: Scope) -> Any:  # noqa: C901, PLR0911, PLR0912 - likewise
        match node:
            case ast.Constant(value=value) if isinstance(value, SCALARS):
                return value
            case ast.Name():
                return self._resolved(scope.find(node.id, _BUILTINS.get(node.id, UNKNOWN)))
            case ast.Attribute():
                return self._attribute(self._value(node.value, scope), node.attr)
            case ast.Call():
                return self._call(node, scope)
            case ast.List() | ast.Tuple():
                items = self._elements(node.elts, scope)
                return items if isinstance(node, ast.List) else tuple(items)
            case ast.ListComp() | ast.GeneratorExp():
                inner = scope.inner({})
                return [self._value(node.elt, inner) for _ in self._loop(node.generators, inner)]
            case ast.Dict():
                return self._dict(zip(node.keys, node.values, strict=True), scope)
            case ast.DictComp():
                inner = scope.inner({})
                pairs = ((node.key, node.value) for _ in self._loop(node.generators, inner))
                return self._dict(pairs, inner)
            case ast.JoinedStr():
                return _joined("", [self._text(part, scope) for part in node.values])
            case ast.Subscript():
                owner = self._value(node.value, scope)
                return self._method(owner, "get", [self._value(node.slice, scope), UNKNOWN])
            case ast.IfExp():
                is_true = _truth(self._value(node.test, scope))
                return self._value(node.body if is_true else node.orelse, scope)
            case ast.BoolOp(values=[*firsts, last]):
                for part in firsts:
                    value = self._value(part, scope)
                    if _truth(value) is isinstance(node.op, ast.Or):
                        return value
                return self._value(last, scope)
            case ast.UnaryOp(op=ast.Not()):
                return not _truth(self._value(node.operand, scope))
            case ast.BinOp():
                return _binary(
                    node.op, self._value(node.left, scope), self._value(node.right, scope)
                )
            case ast.Compare(ops=[kind], comparators=[other]):
                return _binary(kind, self._value(node.left, scope), self._value(other, scope))
        raise _UnknownError

    def _resolved(self, value: Any) -> Any:
        """Follow an import to the value it names."""
        for _ in range(_MAX_DEPTH):
            if not isinstance(value, Imported) or value.name is None:
                return value
            module = self.module(value.module)
            if module is None or value.name not in module.names:
                return Imported(f"{value.module}.{value.name}", None)
            value = module.names[value.name]
        return UNKNOWN

    def _attribute(self, owner: Any, name: str) -> Any:
        if isinstance(owner, Record | Function):
            return owner.attributes.get(name, UNKNOWN)
        is_module = isinstance(owner, Imported)
        return self._resolved(Imported(owner.module, name)) if is_module else UNKNOWN

    def _elements(self, nodes: list[ast.expr], scope: Scope) -> list[Any]:
        items: list[Any] = []
        for node in nodes:
            if isinstance(node, ast.Starred):
                items += _known(self._value(node.value, scope), list, tuple, dict)
            else:
                items.append(self._value(node, scope))
        return items

    def _dict(self, pairs: Iterable[tuple[ast.expr | None, ast.expr]], scope: Scope) -> Any:
        made: dict[Any, Any] = {}
        for key_node, node in pairs:
            key = None if key_node is None else self._value(key_node, scope)
            value = self._value(node, scope)
            if key_node is None:
                made |= _known(value, dict)
            elif is_key(key):
                made[key] = value
            else:
                raise _UnknownError
        return made

    def _loop(self, generators: list[ast.comprehension], scope: Scope) -> Iterator[None]:
        """Bind a comprehension's names to each of its items in turn."""
        first, *rest = generators
        made = 0
        for item in list(_known(self._value(first.iter, scope), list, tuple, dict)):
            self._assign(first.target, item, scope)
            if all(_truth(self._value(test, scope)) for test in first.ifs):
                for _ in self._loop(rest, scope) if rest else (None,):
                    made += 1
                    if made > MAX_ITEMS:
                        raise _UnknownError
                    yield

    def _text(self, node: ast.expr, scope: Scope) -> Any:
        """Compute a part of an f-string."""
        if not isinstance(node, ast.FormattedValue):
            return self._value(node, scope)
        value = self._value(node.value, scope)
        plain = node.conversion == -1 and node.format_spec is None
        return str(value) if plain and isinstance(value, SCALARS) else UNKNOWN

    # Calls

    def _call(self, node: ast.Call, scope: Scope) -> Any:
        match node.func:
            case ast.Attribute(value=inner, attr=name):
                owner = self._value(inner, scope)
                callee = self._attribute(owner, name)
            case _:
                owner, name, callee = UNKNOWN, "", self._value(node.func, scope)
        given = self._elements(node.args, scope)
        keywords = {k.arg or "**": self._value(k.value, scope) for k in node.keywords}
        if "**" in keywords:
            raise _UnknownError
        if isinstance(callee, Function):
            return self._call_function(callee, given, keywords)
        if isinstance(callee, Class):
            made = Record(callee)
            if isinstance(callee.initializer, Function):
                self._call_function(callee.initializer, [made, *given], keywords)
            return made
        if callable(callee):
            known = all(isinstance(item, _PLAIN) for item in given)
            with contextlib.suppress(TypeError, ValueError, OverflowError):
                return callee(*given, **keywords) if known else UNKNOWN
            return UNKNOWN
        return self._method(owner, name, [*given, UNKNOWN] if keywords else given)

    def _method(self, owner: Any, name: str, given: list[Any]) -> Any:
        """Call a method of a text or a dictionary; any other may change its owner."""
        match owner, name, given:
            case str(), "lower", []:
                return owner.lower()
            case str(), "join", [list() | tuple() as parts]:
                return _joined(owner, parts)
            case dict(), "values" | "items", []:
                return list(getattr(owner, name)())
            case dict(), "get" | "pop", [key, default] if is_key(key):
                return getattr(owner, name)(key, default)
            case dict(), "update", [dict() as more]:
                return owner.update(more)
        if name != "get":
            self._tick(spoil(owner, 0 if isinstance(owner, list | dict) else 3))
        return UNKNOWN

    def _class(self, node: ast.ClassDef, scope: Scope) -> Any:
        """Return a class; UNKNOWN for one with decorators, several bases or a metaclass."""
        if node.decorator_list or node.keywords or len(node.bases) > 1:
            return UNKNOWN
        base = self._value(node.bases[0], scope) if node.bases else None
        own = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        inherited = base.initializer if isinstance(base, Class) else None
        return Class(node.name, self._function(own[-1], scope) if own else inherited)

    def _function(self, node: ast.FunctionDef, scope: Scope) -> Any:
        """Return a function; UNKNOWN for one with a decorator that is no cache."""
        for decorator in node.decorator_list:
            called = decorator.func if isinstance(decorator, ast.Call) else decorator
            if (dotted(called) or "").rpartition(".")[2] not in _CACHES:
                return UNKNOWN
        arguments = node.args
        plain = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
        only = [a.arg for a in arguments.kwonlyargs]
        rest = [a.arg for a in (arguments.vararg, arguments.kwarg) if a]
        names = dict.fromkeys([*plain, *only, *rest], UNKNOWN)
        for name, default in (
            *zip(plain[::-1], arguments.defaults[::-1], strict=False),
            *zip(only, arguments.kw_defaults, strict=True),
        ):
            names[name] = self._value(default, scope) if default else UNKNOWN
        return Function(node, scope, plain, names)

    def _call_function(self, function: Function, given: list[Any], named: dict[str, Any]) -> Any:
        bound = dict(zip(function.plain, given, strict=False)) | named
        names = {name: bound.get(name, default) for name, default in function.names.items()}
        if self._depth >= _MAX_DEPTH:
            self._tick(spoil(list(names.values())))
            return UNKNOWN
        self._depth += 1
        try:
            scope = function.scope.inner(names)
            ended = self._run(function.node.body, scope)
            return scope.returned[0] if scope.returned else UNKNOWN if ended else None
        finally:
            self._depth -= 1


def _known(value: Any, *kinds: type) -> Any:
    if not isinstance(value, kinds):
        raise _UnknownError
    return value


def _truth(value: Any) -> bool:
    return bool(_known(value, *_PLAIN))


def _binary(kind: ast.operator | ast.cmpop, left: Any, right: Any) -> Any:
    match kind, left, right:
        case ast.Add(), list(), list():
            return [*left, *right]
        case ast.Sub(), int(), int():
            return left - right
        case ast.Eq() | ast.NotEq(), _, _ if is_key(left) and is_key(right):
            return (left == right) is isinstance(kind, ast.Eq)
        case ast.In(), _, list() | tuple() | dict() if all(map(is_key, [left, *right])):
            return left in right
    return UNKNOWN


def _joined(separator: str, parts: list[Any] | tuple[Any, ...]) -> Any:
    known = all(isinstance(part, str) for part in parts)
    known = known and sum(len(separator) + len(part) for part in parts) <= MAX_TEXT
    return separator.join(parts) if known else UNKNOWN
