"""A calculator for the constant part of Python sources: tables, and the calls that fill them.

FlashInfer's trace templates are made by dictionaries, comprehensions and small factory functions.
What they come to is computed here from the syntax tree; nothing is imported or run. What cannot be
known without running (a tensor, an argument of a real call) is `UNKNOWN`, and a choice that depends
on it keeps all its outcomes.

A tree is data of unknown origin: the work, the depth and the size of every value are bounded.
"""

from __future__ import annotations

import ast
import contextlib
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tasks.discover.values import (
    MAX_ITEMS,
    MAX_TEXT,
    SCALARS,
    UNKNOWN,
    Class,
    Function,
    Imported,
    Record,
    Scope,
    are_keys,
    bounded,
    choice,
    import_bindings,
    is_key,
    truth,
)

MAX_STEPS = 2_000_000
"""FlashInfer's templates take 150 000."""
_MAX_DEPTH = 25

_BINARY: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.BitOr: operator.or_,
}
_JOINED: Mapping[type[ast.operator], tuple[type, ...]] = {
    ast.Add: (str, list, tuple),
    ast.BitOr: (dict,),
}
_COMPARE: Mapping[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_METHODS: Mapping[type, frozenset[str]] = {
    str: frozenset(
        {"lower", "upper", "strip", "split", "startswith", "endswith"}
        | {"replace", "join", "removeprefix", "removesuffix"}
    ),
    dict: frozenset({"items", "keys", "values", "get", "copy", "update", "pop", "setdefault"}),
    list: frozenset({"append", "extend", "insert", "copy", "remove"}),
}


def _unique(items: Any = ()) -> list[Any]:
    return list(dict.fromkeys(items))


_BUILTINS: Mapping[str, Callable[..., Any]] = {
    "list": list,
    "tuple": tuple,
    "set": _unique,
    "frozenset": _unique,
    "len": len,
    "str": str,
    "int": int,
    "bool": bool,
    "zip": lambda *items: list(zip(*items, strict=False)),
    "enumerate": lambda items, start=0: list(enumerate(items, start)),
    "sorted": sorted,
    "reversed": lambda items: list(reversed(items)),
    "range": lambda *bounds: list(range(*bounds)[:MAX_ITEMS]),
}
_HASHING = (_unique, sorted)
"""What compares or hashes the items it is given."""


class _ExhaustedError(Exception):
    """The tree asks for more work than any real one."""


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

    def called(self, function: Function) -> Any:
        """Compute what a function returns when nothing is known about its arguments."""
        try:
            return self._call_function(function, None, None)
        except (_ExhaustedError, RecursionError):
            return UNKNOWN

    def module(self, name: str) -> Scope | None:
        """Return a module's names, None for one outside the package or under computation."""
        if name not in self._modules:
            self._modules[name] = None
            loaded = self._load(name)
            if loaded is not None:
                tree, is_package = loaded
                scope = self._modules[name] = Scope(name, is_package)
                # Where it gives up, what was computed before stays known.
                with contextlib.suppress(_ExhaustedError, RecursionError):
                    self._run(tree.body, scope, [])
        return self._modules[name]

    # Statements

    def _run(self, body: list[ast.stmt], scope: Scope, returned: list[Any]) -> bool:
        """Run statements; return whether they certainly ended in a `return` or `raise`."""
        return any(self._statement(node, scope, returned) for node in body)

    def _statement(self, node: ast.stmt, scope: Scope, returned: list[Any]) -> bool:  # noqa: C901, PLR0911, PLR0912 - a case per kind
        self._tick()
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                scope.names[node.name] = Function(node, scope)
            case ast.ClassDef():
                bases = tuple(self._value(base, scope) for base in node.bases)
                scope.names[node.name] = Class(node, scope, bases)
            case ast.Import() | ast.ImportFrom():
                for name, origin in import_bindings(node, scope.module, scope.is_package).items():
                    if name.startswith("*"):
                        star = self.module(origin.module)
                        names = star.names if star else {}
                        scope.names |= {n: v for n, v in names.items() if not n.startswith("_")}
                    else:
                        scope.names[name] = origin
            case ast.Assign():
                value = self._value(node.value, scope)
                for target in node.targets:
                    self._assign(target, value, scope)
            case ast.AnnAssign(value=ast.expr() as expression):
                self._assign(node.target, self._value(expression, scope), scope)
            case ast.AugAssign():
                self._augment(node, scope)
            case ast.Expr():
                self._value(node.value, scope)
            case ast.Delete():
                for target in node.targets:
                    if isinstance(target, ast.Subscript):
                        self._delete(target, scope)
            case ast.Return():
                returned.append(self._value(node.value, scope) if node.value else None)
                return True
            case ast.Raise():
                return True
            case ast.If():
                is_true = truth(self._value(node.test, scope))
                if is_true is None:
                    # Both branches may run; each may change what the names mean.
                    ended = [self._run(b, scope, returned) for b in (node.body, node.orelse)]
                    return all(ended)
                return self._run(node.body if is_true else node.orelse, scope, returned)
            case ast.For():
                for item in self._items(self._value(node.iter, scope)):
                    self._assign(node.target, item, scope)
                    if self._run(node.body, scope, returned):
                        return True
            case ast.With() | ast.AsyncWith():
                return self._run(node.body, scope, returned)
            case ast.Try():
                return self._run([*node.body, *node.orelse, *node.finalbody], scope, returned)
        return False

    def _tick(self, value: Any = None) -> None:
        """Count a step, and one for every few items that it handles at once."""
        self._steps += 1 + (len(value) // 8 if isinstance(value, list | tuple | dict) else 0)
        if self._steps > MAX_STEPS:
            raise _ExhaustedError

    def _assign(self, target: ast.expr, value: Any, scope: Scope) -> None:
        match target:
            case ast.Name():
                scope.names[target.id] = value
            case ast.Tuple() | ast.List():
                items = list(self._items(value))
                if len(items) != len(target.elts):
                    items = [UNKNOWN] * len(target.elts)
                for part, item in zip(target.elts, items, strict=True):
                    self._assign(part, item, scope)
            case ast.Attribute():
                owner = self._value(target.value, scope)
                if isinstance(owner, Record | Function):
                    owner.attributes[target.attr] = value
            case ast.Subscript():
                owner, key = self._value(target.value, scope), self._value(target.slice, scope)
                if isinstance(owner, dict) and is_key(key) and len(owner) < MAX_ITEMS:
                    owner[key] = value

    def _augment(self, node: ast.AugAssign, scope: Scope) -> None:
        before, more = self._value(node.target, scope), self._value(node.value, scope)
        if isinstance(before, list) and isinstance(node.op, ast.Add):
            before.extend(list(self._items(more))[: MAX_ITEMS - len(before)])
        else:
            self._assign(node.target, self._binary(node.op, before, more), scope)

    def _delete(self, target: ast.Subscript, scope: Scope) -> None:
        owner, key = self._value(target.value, scope), self._value(target.slice, scope)
        if isinstance(owner, dict) and is_key(key):
            owner.pop(key, None)

    # Expressions

    def _value(self, node: ast.expr, scope: Scope) -> Any:  # noqa: C901, PLR0911, PLR0912 - likewise
        self._tick()
        match node:
            case ast.Constant():
                return bounded(node.value) if isinstance(node.value, SCALARS) else UNKNOWN
            case ast.Name():
                return self._resolved(scope.find(node.id))
            case ast.Attribute():
                return self._attribute(self._value(node.value, scope), node.attr)
            case ast.Call():
                return self._call(node, scope)
            case ast.Dict():
                return self._dict(node, scope)
            case ast.List() | ast.Tuple() | ast.Set():
                items = self._elements(node.elts, scope)
                return tuple(items) if isinstance(node, ast.Tuple) else items
            case ast.ListComp() | ast.SetComp() | ast.GeneratorExp():
                inner = Scope(scope.module, scope.is_package, outer=scope)
                return [self._value(node.elt, inner) for _ in self._loop(node.generators, inner)]
            case ast.DictComp():
                return self._dict_comprehension(node, scope)
            case ast.JoinedStr():
                return self._text(node, scope)
            case ast.Subscript():
                return self._subscript(node, scope)
            case ast.IfExp():
                is_true = truth(self._value(node.test, scope))
                if is_true is None:
                    return choice(self._value(n, scope) for n in (node.body, node.orelse))
                return self._value(node.body if is_true else node.orelse, scope)
            case ast.BoolOp():
                return self._logical(node, scope)
            case ast.UnaryOp(op=ast.Not()):
                is_true = truth(self._value(node.operand, scope))
                return UNKNOWN if is_true is None else not is_true
            case ast.UnaryOp(op=ast.USub()):
                value = self._value(node.operand, scope)
                return -value if isinstance(value, int | float) else UNKNOWN
            case ast.BinOp():
                left, right = self._value(node.left, scope), self._value(node.right, scope)
                return self._binary(node.op, left, right)
            case ast.Compare():
                return self._compare(node, scope)
            case ast.Lambda():
                return Function(node, scope)
        return UNKNOWN

    def _resolved(self, value: Any) -> Any:
        """Follow an import to the value it names."""
        for _ in range(_MAX_DEPTH):
            if not isinstance(value, Imported) or value.name is None:
                return value
            module = self.module(value.module)
            if module is not None and value.name in module.names:
                value = module.names[value.name]
            else:
                inner = f"{value.module}.{value.name}"
                return Imported(inner, None)
        return UNKNOWN

    def _attribute(self, owner: Any, name: str) -> Any:
        if isinstance(owner, Record | Function):
            return owner.attributes.get(name, UNKNOWN)
        if isinstance(owner, Imported):
            return self._resolved(Imported(owner.module, name))
        return UNKNOWN

    def _elements(self, nodes: list[ast.expr], scope: Scope) -> list[Any]:
        items: list[Any] = []
        for node in nodes:
            if isinstance(node, ast.Starred):
                items.extend(self._items(self._value(node.value, scope)))
            else:
                items.append(self._value(node, scope))
        return items[:MAX_ITEMS]

    def _items(self, value: Any) -> Iterator[Any]:
        """Iterate what can be iterated; anything else is empty."""
        if isinstance(value, list | tuple | dict):
            for item in list(value):
                self._tick()
                yield item

    def _dict(self, node: ast.Dict, scope: Scope) -> dict[Any, Any]:
        made: dict[Any, Any] = {}
        for key_node, value_node in zip(node.keys, node.values, strict=True):
            value = self._value(value_node, scope)
            if key_node is None:
                made |= value if isinstance(value, dict) else {}
            else:
                key = self._value(key_node, scope)
                if is_key(key):
                    made[key] = value
        return made

    def _dict_comprehension(self, node: ast.DictComp, scope: Scope) -> dict[Any, Any]:
        made: dict[Any, Any] = {}
        inner = Scope(scope.module, scope.is_package, outer=scope)
        for _ in self._loop(node.generators, inner):
            key = self._value(node.key, inner)
            if is_key(key):
                made[key] = self._value(node.value, inner)
        return made

    def _loop(self, generators: list[ast.comprehension], scope: Scope) -> Iterator[None]:
        """Bind a comprehension's names to each of its items in turn."""
        first, *rest = generators
        for item in self._items(self._value(first.iter, scope)):
            self._assign(first.target, item, scope)
            if any(truth(self._value(test, scope)) is False for test in first.ifs):
                continue
            if rest:
                yield from self._loop(rest, scope)
            else:
                yield None

    def _text(self, node: ast.JoinedStr, scope: Scope) -> Any:
        text = ""
        for part in node.values:
            if isinstance(part, ast.FormattedValue):
                value = self._value(part.value, scope)
                known = isinstance(value, SCALARS) and part.format_spec is None
                # An unknown part shows as what would be put there.
                text += str(value) if known else f"{{{ast.unparse(part.value)[:60]}}}"
            elif isinstance(part, ast.Constant):
                text += str(part.value)
            if len(text) > MAX_TEXT:
                return UNKNOWN
        return text

    def _subscript(self, node: ast.Subscript, scope: Scope) -> Any:
        owner, key = self._value(node.value, scope), self._value(node.slice, scope)
        if isinstance(owner, dict):
            if is_key(key):
                return owner.get(key, UNKNOWN)
            return choice(owner.values())
        if isinstance(owner, list | tuple):
            if isinstance(key, int):
                return owner[key] if -len(owner) <= key < len(owner) else UNKNOWN
            return choice(owner)
        return UNKNOWN

    def _logical(self, node: ast.BoolOp, scope: Scope) -> Any:
        ends_on = isinstance(node.op, ast.Or)
        possible = []
        for part in node.values:
            value = self._value(part, scope)
            is_true = truth(value)
            if is_true is None or is_true is ends_on or part is node.values[-1]:
                possible.append(value)
            if is_true is ends_on:
                break
        return choice(possible)

    def _binary(self, kind: ast.operator, left: Any, right: Any) -> Any:
        compute = _BINARY.get(type(kind))
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        joined = type(left) is type(right) and type(left) in _JOINED.get(type(kind), ())
        if compute is None or not (numbers or joined):
            return UNKNOWN
        self._tick(left)
        try:
            return bounded(compute(left, right))
        except (ArithmeticError, TypeError):
            return UNKNOWN

    def _compare(self, node: ast.Compare, scope: Scope) -> Any:
        if len(node.ops) != 1:
            return UNKNOWN
        left, right = self._value(node.left, scope), self._value(node.comparators[0], scope)
        kind = node.ops[0]
        if isinstance(kind, ast.Is | ast.IsNot):
            known = truth(left) is not None and truth(right) is not None
            return (left is right) is isinstance(kind, ast.Is) if known else UNKNOWN
        if isinstance(kind, ast.In | ast.NotIn):
            self._tick(right)
            text = isinstance(left, str) and isinstance(right, str)
            known = text or (is_key(left) and are_keys(right))
            return (left in right) is isinstance(kind, ast.In) if known else UNKNOWN
        try:
            return _COMPARE[type(kind)](left, right) if are_keys((left, right)) else UNKNOWN
        except TypeError:
            return UNKNOWN

    # Calls

    def _call(self, node: ast.Call, scope: Scope) -> Any:
        if isinstance(node.func, ast.Attribute):
            owner = self._value(node.func.value, scope)
            if type(owner) in _METHODS:
                return self._method(owner, node, scope)
            callee = self._attribute(owner, node.func.attr)
        else:
            callee = self._value(node.func, scope)
        positional = self._elements(node.args, scope)
        keywords: dict[str, Any] = {}
        for keyword in node.keywords:
            value = self._value(keyword.value, scope)
            if keyword.arg is not None:
                keywords[keyword.arg] = value
            elif isinstance(value, dict):
                keywords |= {key: item for key, item in value.items() if isinstance(key, str)}
        if isinstance(callee, Function):
            return self._call_function(callee, positional, keywords)
        if isinstance(callee, Class):
            return self._make(callee, positional, keywords)
        if isinstance(node.func, ast.Name) and (callee is UNKNOWN or node.func.id == "cast"):
            return self._builtin(node.func.id, positional, keywords)
        if isinstance(callee, Imported):
            return Record(callee.module.rpartition(".")[2], keywords, None)
        return UNKNOWN

    def _builtin(self, name: str, positional: list[Any], keywords: dict[str, Any]) -> Any:
        """Call a built-in, or make a record of an unknown class."""
        match name, positional:
            case "cast", [_, value]:
                return value
            case "isinstance", [Record(bases=frozenset() as bases), Class() as kind]:
                return kind.node.name in bases
            case "getattr", [owner, str(attribute), *default]:
                value = self._attribute(owner, attribute)
                return default[0] if value is UNKNOWN and default else value
            case "dict", [] | [dict()]:
                return {**(positional[0] if positional else {}), **keywords}
        function = _BUILTINS.get(name)
        return self._plain(function, positional) if function else Record(name, keywords, None)

    def _plain(self, function: Callable[..., Any], positional: list[Any]) -> Any:
        """Call a function on known values."""
        for item in positional:
            self._tick(item)
            if not isinstance(item, (*SCALARS, list, tuple, dict)):
                return UNKNOWN
            if function in _HASHING and not are_keys(item):
                return UNKNOWN
        try:
            return bounded(function(*positional))
        except (TypeError, ValueError, OverflowError):
            return UNKNOWN

    def _method(self, owner: Any, node: ast.Call, scope: Scope) -> Any:
        """Call a method of a text, list or dict."""
        assert isinstance(node.func, ast.Attribute)  # noqa: S101 - the caller looked
        name, positional = node.func.attr, self._elements(node.args, scope)
        keywords = {k.arg: self._value(k.value, scope) for k in node.keywords if k.arg}
        self._tick(owner)
        if name not in _METHODS[type(owner)] or not self._may_call(owner, name, positional):
            return choice(owner.values()) if isinstance(owner, dict) and name == "get" else UNKNOWN
        try:
            value = getattr(owner, name)(*positional, **keywords)
        except (TypeError, ValueError, KeyError, IndexError):
            return UNKNOWN
        return list(value) if name in ("items", "keys", "values") else bounded(value)

    def _may_call(self, owner: Any, name: str, positional: list[Any]) -> bool:
        """Whether a method's arguments are known, and its work and result bounded."""
        if isinstance(owner, str):
            parts = positional[0] if name == "join" and positional else positional
            if not isinstance(parts, list | tuple) or not all(isinstance(p, str) for p in parts):
                return False
            return (len(owner) + 1) * (sum(map(len, parts)) + len(parts) + 1) < MAX_TEXT * 100
        if len(owner) >= MAX_ITEMS:
            return False
        if name in ("extend", "update"):
            return all(type(item) is type(owner) for item in positional)
        if name in ("get", "pop", "setdefault", "remove"):
            return all(map(is_key, positional[:1])) and (name != "remove" or are_keys(owner))
        return True

    def _make(self, kind: Class, positional: list[Any], keywords: dict[str, Any]) -> Record:
        """Make a record: an object is what its constructor was given."""
        names, initializer = _lineage(kind)
        if initializer is None:
            fields = [
                node.target.id
                for node in kind.node.body
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
            ]
            given = dict(zip(fields, positional, strict=False)) | keywords
            return Record(kind.node.name, given, names)
        scope = self._bound(initializer, [UNKNOWN, *positional], keywords)
        attributes = dict(scope.names)
        rest = initializer.node.args.kwarg
        if rest is not None:
            attributes |= attributes.pop(rest.arg) or {}
        return Record(kind.node.name, attributes, names)

    def _call_function(
        self, function: Function, positional: list[Any] | None, keywords: dict[str, Any] | None
    ) -> Any:
        if self._depth >= _MAX_DEPTH:
            return UNKNOWN
        self._depth += 1
        try:
            scope = self._bound(function, positional, keywords)
            if isinstance(function.node, ast.Lambda):
                return self._value(function.node.body, scope)
            returned: list[Any] = []
            self._run(function.node.body, scope, returned)
            return choice(returned) if returned else None
        finally:
            self._depth -= 1

    def _bound(
        self, function: Function, positional: list[Any] | None, keywords: dict[str, Any] | None
    ) -> Scope:
        """Bind a call's arguments; without any, every parameter is unknown."""
        scope = Scope(function.scope.module, function.scope.is_package, outer=function.scope)
        arguments = function.node.args
        plain = [*arguments.posonlyargs, *arguments.args]
        named = [*plain, *arguments.kwonlyargs]
        scope.names = dict.fromkeys((a.arg for a in named), UNKNOWN)
        for rest in filter(None, (arguments.vararg, arguments.kwarg)):
            scope.names[rest.arg] = UNKNOWN
        if positional is None or keywords is None:
            return scope
        defaults = dict(zip([a.arg for a in plain][::-1], arguments.defaults[::-1], strict=False))
        for parameter, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
            if default is not None:
                defaults[parameter.arg] = default
        for name, default in defaults.items():
            scope.names[name] = self._value(default, function.scope)
        scope.names |= dict(zip((a.arg for a in plain), positional, strict=False))
        known = {a.arg for a in named}
        scope.names |= {name: value for name, value in keywords.items() if name in known}
        if arguments.vararg is not None:
            scope.names[arguments.vararg.arg] = tuple(positional[len(plain) :])
        if arguments.kwarg is not None:
            others = {name: value for name, value in keywords.items() if name not in known}
            scope.names[arguments.kwarg.arg] = others
        return scope


def _lineage(kind: Class) -> tuple[frozenset[str], Function | None]:
    """Return the names of a class and its bases, and the nearest constructor among them."""
    names: set[str] = set()
    initializer: Function | None = None
    pending = [kind]
    while pending and len(names) < _MAX_DEPTH:
        current = pending.pop(0)
        names.add(current.node.name)
        for node in current.node.body:
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                initializer = initializer or Function(node, current.scope)
        pending += [base for base in current.bases if isinstance(base, Class)]
    return frozenset(names), initializer
