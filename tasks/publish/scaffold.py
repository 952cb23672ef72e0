"""The start of an SGLang integration: a guarded import and a dispatch, in the file of the layer.

What is added is a draft that says so: it compiles, nothing calls it yet, and its docstring lists
what only somebody who knows the layer can write. The file's bytes around it stay as they are.
"""

from __future__ import annotations

import ast
import codecs
import json
import keyword
import re
import shlex
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, count
from pathlib import Path

from tasks import git
from tasks.discover.syntax import MAX_BYTES, Imported, dotted, import_bindings, parse
from tasks.errors import PublishError
from tasks.files import safe_name
from tasks.git import GitError
from tasks.ops.base import FlashInferApi, Json

_WIDTH = 88
"""SGLang's line length."""
_ACCESSORS = (
    ("sglang.srt.runtime_context", "get_server_args"),
    ("sglang.srt.server_args", "get_global_server_args"),
)
"""How SGLang's code reads the server's arguments, newest first."""
_VARIABLES = ("sglang.srt.utils", "get_bool_env_var")
_RETURN = "return"
_IDENTIFIERS = frozenset({"id", "name", "arg", "asname", "rest"})
"""Fields of syntax nodes that hold one."""


class NothingToScaffoldError(PublishError):
    """The layer has the FlashInfer API already; what SGLang lacks is something else."""


@dataclass(frozen=True)
class Switch:
    """What makes SGLang take FlashInfer's path."""

    module: str
    function: str
    """What of it says how the server was started."""
    refusals: tuple[str, ...]
    """Expressions that call the function; where one holds, the present path runs."""
    said: str
    """The server flags, or the variable, as a user gives them."""


@dataclass(frozen=True)
class Scaffold:
    """A layer's file with the import and the dispatch, and the two by themselves."""

    source: bytes
    guard: str
    dispatch: str
    function: str
    """Name of the dispatch."""
    to_do: tuple[str, ...]
    """What a person has to write or decide before it is ready."""


def read_layer(clone: Path, path: str) -> bytes:
    """Return a file of the commit that is checked out in SGLang's clone.

    Raises:
        PublishError: there is no such file; the message names it.
    """
    where = f"SGLang's {path}"
    if not path:
        raise PublishError("the op module names no file of SGLang that would call its API")
    if not (clone / ".git").exists():
        raise PublishError(f"{where}: {clone} is no clone")
    try:
        listed = git.git("ls-tree", "-z", "--full-tree", "HEAD", "--", path, cwd=clone)
        if not listed:
            raise PublishError(f"{where}: is not in commit {git.short_sha(clone)}")
        mode, kind, digest = listed.partition("\t")[0].split()
        if kind != "blob" or mode == "120000":
            raise PublishError(f"{where}: is no file but a {'link' if kind == 'blob' else kind}")
        # A blobless clone fetches what it lacks.
        source = git.run("cat-file", "blob", digest, cwd=clone)
    except GitError as error:
        raise PublishError(f"{where}: cannot be read from {clone} ({error})") from error
    if len(source) > MAX_BYTES:
        raise PublishError(f"{where}: has {len(source)} bytes, too many for a Python module")
    return source


def switch(clone: Path, api: FlashInferApi, op_type: str) -> Switch:
    """Return what selects an API: its server flags, or an environment variable if it has none.

    Raises:
        PublishError: SGLang has no known way to read the server's arguments.
    """
    if not api.server_flags:
        variable = f"SGLANG_ENABLE_FLASHINFER_{re.sub('[^A-Z0-9]', '_', op_type.upper())}"
        module, function = _VARIABLES
        return Switch(module, function, (f'not {function}("{variable}")',), f"{variable}=1")
    for module, function in _ACCESSORS:
        if _is_defined(module, function, clone):
            refusals = tuple(_refusal(f"{function}()", flag) for flag in api.server_flags)
            return Switch(module, function, refusals, " ".join(api.server_flags))
    known = " nor ".join(".".join(accessor) for accessor in _ACCESSORS)
    raise PublishError(f"SGLang's server arguments cannot be read: {clone} has neither {known}")


def _is_defined(module: str, function: str, clone: Path) -> bool:
    try:
        tree = parse(read_layer(clone, f"python/{module.replace('.', '/')}.py"))
    except PublishError:
        return False
    body = tree.body if tree else []
    return any(isinstance(node, ast.FunctionDef) and node.name == function for node in body)


def _refusal(arguments: str, flag: str) -> str:
    """Return the expression that holds where a flag (`--name value`, `--name`) is not given."""
    spelling, *values = shlex.split(flag)
    setting = f"{arguments}.{spelling.removeprefix('--').replace('-', '_')}"
    if not values:
        return f"not {setting}"
    return f"{setting} != {values[0] if values[0].isdecimal() else json.dumps(values[0])}"


def scaffold(
    source: bytes, path: str, api: FlashInferApi, definition: Json, selected: Switch
) -> Scaffold:
    """Add the guarded import of an API, and a dispatch to it, to a module.

    Args:
        source: the module.
        path: where it is in SGLang's repository.
        api: what is to be called.
        definition: the kernel's `name`, `inputs` and `outputs`, which the dispatch has too.
        selected: what selects the API.

    Raises:
        NothingToScaffoldError: the module has the API already.
        PublishError: it cannot be parsed, or the inputs can be no parameters.
    """
    layer = _Module(source, path)
    module, _, symbol = api.path.rpartition(".")
    line = layer.line_of(symbol)
    if line:
        raise NothingToScaffoldError(
            f"SGLang's {path} has {api.path} already, in line {line}: what keeps SGLang from "
            "calling it for this model is no missing import"
        )
    types = _types(definition, layer)
    taken = layer.identifiers | {*types, selected.function}
    bound = _free(symbol, taken)
    function = _free(f"dispatch_{_snake(symbol)}", taken)
    to_do = _to_do(api, symbol, selected)
    guard = _guard(module, symbol, bound)
    if "torch" not in layer.identifiers:
        guard = f"import torch\n\n{guard}"
    known = layer.imports(selected.function, Imported(selected.module, selected.function))
    parts = (
        _signature(function, types),
        _docstring(symbol, definition, to_do),
        "" if known else f"{_import(selected.module, selected.function, indent=4)}\n\n",
        *(_leave(refusal) for refusal in (f"{bound} is None", *selected.refusals)),
        _call(api, bound, [name for name in types if name != _RETURN]),
    )
    dispatch = "".join(parts)
    return Scaffold(layer.with_both(guard, dispatch), guard, dispatch, function, to_do)


def _to_do(api: FlashInferApi, symbol: str, selected: Switch) -> tuple[str, ...]:
    arguments = (
        f"make and plan a {symbol} for the batch, and return what its {api.method} does"
        if api.method
        else f"pass {symbol} what it takes: the parameters here are the definition's inputs"
    )
    return (
        "call it where the present path begins, and go on there where it returns None",
        arguments,
        f"decide what selects it; now it is {selected.said}",
    )


def _types(definition: Json, layer: _Module) -> dict[str, str]:
    """Return the types of the dispatch's parameters, in order, and of what it returns.

    Raises:
        PublishError: the definition has none, or one that Python would not take.
    """
    name, inputs = definition.get("name"), definition.get("inputs") or {}
    outputs = ["torch.Tensor"] * len(definition.get("outputs") or ())
    if not inputs or not outputs:
        raise PublishError(f"{name}: the definition has no inputs or no outputs to dispatch")
    for wanted in inputs:
        if not (wanted.isidentifier() and wanted.isascii()) or keyword.iskeyword(wanted):
            raise PublishError(f"{name}: input {wanted!r} is no name of a Python parameter")
    returned = outputs[0] if len(outputs) == 1 else f"tuple[{', '.join(outputs)}]"
    types = {wanted: _type_of(spec) for wanted, spec in inputs.items()}
    types[_RETURN] = f"{returned} | None"
    if "torch" in layer.identifiers and not layer.imports("torch", Imported("torch", None)):
        # Where it is not imported as a matter of course, it may stand for nothing: not evaluated.
        return {wanted: f'"{kind}"' for wanted, kind in types.items()}
    return types


def _type_of(spec: Json) -> str:
    if spec.get("shape") is not None:
        kind = "torch.Tensor"
    else:
        dtype = str(spec.get("dtype"))
        kind = "bool" if dtype.startswith("bool") else "int" if "int" in dtype else "float"
    return f"{kind} | None" if spec.get("optional") else kind


def _snake(name: str) -> str:
    """Return a class's name as a function's."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def _free(wanted: str, taken: Iterable[str]) -> str:
    """Return a name that is not taken, as near to the wanted one as can be."""
    numbered = (f"flashinfer_{wanted}_{number}" for number in count(2))
    names = chain((wanted, f"flashinfer_{wanted}"), numbered)
    return next(name for name in names if name not in taken)


# What is added, formatted as SGLang's formatter would.


def _import(module: str, name: str, bound: str = "", indent: int = 0) -> str:
    space = " " * indent
    item = name if bound in ("", name) else f"{name} as {bound}"
    line = f"{space}from {module} import {item}"
    if len(line) <= _WIDTH:
        return line
    return f"{space}from {module} import (\n{space}    {item},\n{space})"


def _guard(module: str, symbol: str, bound: str) -> str:
    imported = _import(module, symbol, bound, indent=4)
    return f"try:\n{imported}\nexcept ImportError:\n    {bound} = None\n"


def _signature(function: str, types: Mapping[str, str]) -> str:
    listed = "".join(f"    {name}: {kind},\n" for name, kind in types.items() if name != _RETURN)
    return f"def {function}(\n{listed}) -> {types[_RETURN]}:\n"


def _docstring(symbol: str, definition: Json, to_do: Iterable[str]) -> str:
    name = safe_name(str(definition["name"]), "the definition's name")
    points = [
        textwrap.fill(f"- {item}{end}", _WIDTH, initial_indent="    ", subsequent_indent="      ")
        for item, end in zip(to_do, (";", "; and", "."), strict=True)
    ]
    return "\n".join(
        [
            f'    """Run FlashInfer\'s {symbol}, or return None.',
            "",
            "    None: the present path is to run. This is a draft that nothing calls yet. Before",
            "    it is ready, somebody who knows this layer has to",
            *points,
            "",
            "    Inputs and outputs are those of the FlashInfer-Bench definition",
            f"    {name}.",
            '    """\n',
        ]
    )


def _leave(condition: str) -> str:
    return f"    if {condition}:\n        return None\n"


def _call(api: FlashInferApi, bound: str, inputs: Iterable[str]) -> str:
    if api.method:
        return f'    raise NotImplementedError("{bound} is not planned yet")\n'
    passed = "".join(f"        {name}={name},\n" for name in inputs)
    return f"    return {bound}(\n{passed}    )\n"


class _Module:
    """A module's source as bytes, and what its syntax says."""

    def __init__(self, source: bytes, path: str) -> None:
        tree = parse(source)
        if tree is None:
            raise PublishError(f"SGLang's {path}: is no Python module that can be parsed")
        self._source, self._path, self._tree = source, path, tree

    @cached_property
    def identifiers(self) -> frozenset[str]:
        """Every name in the module, in whichever scope."""
        found = {
            value
            for node in ast.walk(self._tree)
            for field, value in ast.iter_fields(node)
            if field in _IDENTIFIERS and isinstance(value, str)
        }
        # `import a.b` binds `a`.
        return frozenset(name.partition(".")[0] for name in found)

    def line_of(self, symbol: str) -> int | None:
        """Return where the module imports something from FlashInfer, or reaches it by a module."""
        modules = set()
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0):
                for name, origin in import_bindings(node, "", False).items():
                    if origin.module.partition(".")[0] == "flashinfer":
                        if origin.name == symbol:
                            return node.lineno
                        modules.add(name)
        reached = (
            node.lineno
            for node in ast.walk(self._tree)
            if isinstance(node, ast.Attribute)
            and node.attr == symbol
            and (dotted(node) or "").partition(".")[0] in modules
        )
        return next(reached, None)

    def imports(self, name: str, origin: Imported) -> bool:
        """Whether the module imports something under a name, wherever it is imported itself."""
        return any(
            import_bindings(node, "", False).get(name) == origin
            for node in self._tree.body
            if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0)
        )

    def with_both(self, guard: str, dispatch: str) -> bytes:
        """Return the source with a text after its imports and one at its end.

        Raises:
            PublishError: it would not compile.
        """
        mark = codecs.BOM_UTF8 if self._source.startswith(codecs.BOM_UTF8) else b""
        lines = self._source.removeprefix(mark).splitlines(keepends=True)
        endings = Counter(line[len(line.rstrip(b"\r\n")) :] for line in lines[:-1] or lines)
        newline = endings.most_common(1)[0][0] if endings else b""
        newline = newline or b"\n"
        ends = not lines or lines[-1].endswith((b"\n", b"\r"))
        if not ends:
            lines[-1] += newline
        at = self._after_imports(len(lines))
        before, after = lines[:at], lines[at:]
        added = guard.splitlines()
        if before:
            added.insert(0, "")
        if after and after[0].strip():
            added.append("")
        edited = [*before, *(line.encode() + newline for line in added), *after]
        blank = next((n for n, line in enumerate(reversed(edited)) if line.strip()), 0)
        edited += [newline] * max(0, 2 - blank)
        edited += [line.encode() + newline for line in dispatch.splitlines()]
        source = mark + b"".join(edited)
        self._check(source)
        return source if ends else source.removesuffix(newline)

    def _after_imports(self, lines: int) -> int:
        """Return the number of lines up to the end of the last import, or of what must be first."""
        body = self._tree.body
        if not body:
            return lines
        imports = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
        if imports:
            at = imports[-1].end_lineno or 0
        elif ast.get_docstring(self._tree, clean=False) is not None:
            at = body[0].end_lineno or 0
        else:
            decorators = getattr(body[0], "decorator_list", ())
            at = min(node.lineno for node in (body[0], *decorators)) - 1
        for node in body:
            # A statement may begin behind a semicolon and go on in the next line.
            if node.lineno <= at:
                at = max(at, node.end_lineno or 0)
        return at

    def _check(self, source: bytes) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                compile(source, self._path, "exec", dont_inherit=True)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise PublishError(f"SGLang's {self._path}: cannot be added to ({error})") from error
