"""The source indexes on small trees, hostile ones among them, and their cache."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest

from tasks import files, git
from tasks.discover.constants import Calculator
from tasks.discover.sources import (
    FlashInferIndex,
    SglangIndex,
    Template,
    cached,
    index_flashinfer,
    index_sglang,
    revision,
)
from tasks.discover.values import MAX_ITEMS, UNKNOWN
from tasks.errors import InputError


def write(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


# FlashInfer

TEMPLATE = """
class Var:
    def __init__(self, description=""):
        self.description = description
class Const:
    def __init__(self, description="", abbrev=None, value=None):
        self.abbrev, self.value = abbrev, value
class TraceTemplate:
    def __init__(self, op_type, axes, inputs, outputs, *, name_prefix=None):
        self.op_type = op_type
        self.axes = axes
        self.name_prefix = name_prefix
"""
TEMPLATES = """
import functools
from ..template import Const, TraceTemplate, Var

class Special(TraceTemplate):
    pass

norm_trace = TraceTemplate(
    op_type="rmsnorm", axes={"n": Var(), "hidden_size": Const(abbrev="h")}, inputs={}, outputs={})

@functools.lru_cache
def _make(kind, *, wide=False):
    axes = {"tokens": Var(), "experts": Const(abbrev="e"), "hidden": Const("", "")}
    if wide:
        axes["width"] = Const()
    return Special("moe", axes, {}, {}, name_prefix=f"moe_{kind}{'_wide' if wide else ''}")

_TABLE = {(kind, wide): _make(kind, wide=wide) for kind in ("a", "b") for wide in (False, True)}

def moe_dispatch(**kwargs):
    return _TABLE[kwargs["kind"], False]
moe_dispatch.templates = list(_TABLE.values())[:2] if False else [*_TABLE.values()]
moe_dispatch.templates += [norm_trace]

def silent_dispatch(**kwargs):
    return norm_trace

if made_elsewhere():
    renamed_trace = TraceTemplate("maybe", {}, {}, {})
else:
    renamed_trace = TraceTemplate("or", {}, {}, {})
spoiled_trace = TraceTemplate("spoiled", {"n": Const()}, {}, {})
if made_elsewhere():
    spoiled_trace.axes["m"] = Const()
partly_trace = TraceTemplate("partly", {"n": made_elsewhere()}, {}, {})
"""


def flashinfer_tree(root: Path, **files: str) -> Path:
    return write(
        root,
        {
            "flashinfer/__init__.py": "from .norm import rmsnorm as rmsnorm\n",
            "flashinfer/trace/__init__.py": "",
            "flashinfer/trace/template.py": TEMPLATE,
            "flashinfer/trace/templates/__init__.py": "",
            "flashinfer/trace/templates/all.py": TEMPLATES,
            "flashinfer/norm.py": (
                "from .api_logging import flashinfer_api\n"
                "from .trace.templates.all import norm_trace\n"
                "@flashinfer_api(trace=norm_trace)\ndef rmsnorm(x): ...\n"
            ),
            **{name.replace("__", "/") + ".py": text for name, text in files.items()},
        },
    )


def test_templates_through_tables_and_factories(tmp_path: Path) -> None:
    decorated = "@flashinfer_api(trace={})\ndef {}(): ...\n"
    root = flashinfer_tree(
        tmp_path,
        flashinfer__moe=(
            "from .api_logging import flashinfer_api, flashinfer_experimental_api as trial\n"
            "from .trace.templates import all as t\n"
            "try:\n    from .trace.templates.all import norm_trace as either\n"
            "except ImportError:\n    from .other import norm_trace as either\n"
            "own = t.norm_trace\n"
            "if True:\n"
            "    @flashinfer_api(trace=t.moe_dispatch)\n    def published(): ...\n"
            "try:\n    @trial(trace=t.silent_dispatch)\n    def silent(): ...\n"
            "except ImportError:\n    pass\n"
            + decorated.format("own", "local")
            + decorated.format("either", "fallback")
            + decorated.format("t.renamed_trace", "renamed")
            + decorated.format("t.spoiled_trace", "spoiled")
            + decorated.format("t.partly_trace", "partly")
            + decorated.format("made_at_run_time()", "unknown")
            + decorated.format("None", "none")
            + "@flashinfer_api\ndef bare(): ...\n"
            "@flashinfer_api()\ndef called(): ...\n"
            "# @flashinfer_api\ndef commented_out(): ...\n"
            "class Wrapper:\n    @flashinfer_api\n    def run(self): ...\n"
        ),
    )
    apis = index_flashinfer(root).apis
    norm = Template("rmsnorm", "rmsnorm", "rmsnorm_h{hidden_size}")
    known = {
        "flashinfer.norm.rmsnorm": [norm],
        "published": [
            Template("moe", "moe_a", "moe_a_e{experts}"),
            Template("moe", "moe_a_wide", "moe_a_wide_e{experts}_width{width}"),
            Template("moe", "moe_b", "moe_b_e{experts}"),
            Template("moe", "moe_b_wide", "moe_b_wide_e{experts}_width{width}"),
            norm,
        ],
        "local": [norm],
    }
    unknown = {"silent", "fallback", "renamed", "spoiled", "partly", "unknown"}
    others = {"none", "bare", "called", "Wrapper.run", *unknown}
    found = {path.rpartition("moe.")[2]: api for path, api in apis.items()}
    assert {path: api.templates for path, api in found.items() if path not in others} == known
    assert not any(found[path].templates for path in others)
    assert {path for path, api in found.items() if api.has_template} == set(known) | unknown
    assert found["silent"].decorator == "flashinfer_experimental_api"
    assert found["Wrapper.run"].dump == "Wrapper.run"


def test_public_path_is_the_shortest_without_private_parts(tmp_path: Path) -> None:
    decorated = "@flashinfer_api\ndef {}(): ...\n"
    root = write(
        tmp_path,
        {
            "flashinfer/__init__.py": (
                "import contextlib\nwith contextlib.suppress(ImportError):\n"
                "    from .ops import top as renamed\n"
                "def __getattr__(name):\n    if name in {'lazy'}: ...\n"
            ),
            "flashinfer/ops/__init__.py": "from ._core import *\n",
            "flashinfer/ops/_core.py": (
                decorated.format("top") + decorated.format("starred") + "from .._far import moved\n"
            ),
            "flashinfer/_far.py": decorated.format("moved") + decorated.format("lazy"),
            "flashinfer/shim.py": "from .ops._core import (  # for old code\n    starred,\n)\n",
            "flashinfer/user.py": "from flashinfer.ops import moved\nmoved()\n",
            "tests/norm/test_far.py": "def test(): moved(); not_starred()\n",
            "tests/helper.py": "starred()\n",
        },
    )
    index = index_flashinfer(root)
    assert {path: api.public for path, api in index.apis.items()} == {
        "flashinfer._far.lazy": "flashinfer.lazy",
        "flashinfer._far.moved": "flashinfer.ops.moved",
        "flashinfer.ops._core.starred": "flashinfer.ops.starred",
        "flashinfer.ops._core.top": "flashinfer.renamed",
    }
    assert index.resolve("flashinfer.shim.starred") == "flashinfer.ops._core.starred"
    assert index.resolve("flashinfer.user.moved") == "flashinfer._far.moved"
    assert index.resolve("flashinfer.ops.unknown") == "flashinfer.ops.unknown"
    tests = {path.rpartition(".")[2]: api.tests for path, api in index.apis.items()}
    assert tests == {"lazy": [], "moved": ["tests/norm/test_far.py"], "starred": [], "top": []}


def test_dump_names_follow_the_logging_code(tmp_path: Path) -> None:
    method = "    @flashinfer_api\n    def run(self): ...\n"
    root = write(
        tmp_path,
        {
            "flashinfer/api_logging.py": (
                "def flashinfer_api(f):\n"
                "    if 'Planner' in class_name or class_name in ['Layer']: ...\n"
            ),
            "flashinfer/a.py": "".join(
                f"class {name}:\n{method}" for name in ("MyPlanner", "Layer", "Layers", "Wrapper")
            ),
        },
    )
    dumps = {path.split(".")[2]: api.dump for path, api in index_flashinfer(root).apis.items()}
    assert dumps == {
        "MyPlanner": "MyPlanner.run",
        "Layer": "Layer.run",
        "Layers": "run",
        "Wrapper": "run",
    }


def test_modules_that_import_everything_from_each_other(tmp_path: Path) -> None:
    names = [f"m{n}" for n in range(12)]
    stars = "".join(f"from .{name} import *\n" for name in names)
    root = flashinfer_tree(
        tmp_path, **{f"flashinfer__{n}": f"# flashinfer_api\n{stars}" for n in names}
    )
    write(root, {"flashinfer/__init__.py": stars})
    assert set(index_flashinfer(root).apis) == {"flashinfer.norm.rmsnorm"}


# The calculator


def calculated(text: str, name: str = "x") -> object:
    calculator = Calculator(lambda module: (ast.parse(text), False) if module == "m" else None)
    scope = calculator.module("m")
    assert scope is not None
    return calculator.value(ast.Name(id=name, ctx=ast.Load()), scope)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("x = {**{'a': 1}, 'b': 2}", {"a": 1, "b": 2}),
        ("x = [f'{a}{b}' for a in ('k',) for b in (1, 2) if not b == 1]", ["k2"]),
        ("x = {a: b for a, b in {'k': 1}.items()}", {"k": 1}),
        ("x = dict(a=1); x.update({'b': 2}); del x['a']; x['c'] = 3", {"b": 2, "c": 3}),
        ("def f(a, b=2, *, c=3): return [a, b, c]\nx = f(1, c=5)", [1, 2, 5]),
        ("b = 1\ndef f(a=b): return a\nb = 2\nx = f()", 1),
        ("def f(t): t['b'] = t.pop('a', 0)\nx = {'a': 1}\nf(x)", {"b": 1}),
        ("x = '_'.join(['A'.lower(), 'b'])", "a_b"),
        ("x = [1]\ny = x\nx += [9]", [1, 9]),
        ("x = {'a': [1]}.get('b', 7) if not () else 0", 7),
        ("def f(n): return f(n - 1) if n else 0\nx = f(9)", 0),
        ("x = 'head' in ('tail', 'head') and 3", 3),
        ("x = [f'n{i}' for i in range(3 - 1)]", ["n0", "n1"]),
        ("class C:\n  def __init__(s, n): s.n = n\nclass D(C): pass\nx = D(4).n", 4),
        ("def f(): pass\nf.t = [1]\nx = f.t", [1]),
        ("if 1 != 2:\n  x = 'one'\nelse:\n  x = 'two'", "one"),
    ],
)
def test_constants(text: str, value: object) -> None:
    assert calculated(text) == value


@pytest.mark.parametrize(
    "text",
    [
        # Which branch ran, or how often a body did, only a running program knows.
        "x = 'one'\nif unknown: x = 'two'",
        "if unknown: x = 'one'\nelse: x = 'two'",
        "x = 'one' if unknown else 'two'",
        "x = unknown or 'two'",
        "try: x = 1\nexcept E: x = 2",
        "x = 1\ntry: pass\nexcept E as x: pass",
        "x = 1\nwith unknown as x: pass",
        "x = 1\nwhile unknown: x = 2",
        "x = 1\nwhile unknown: x += 1",
        "x = 1\nmatch unknown:\n  case 1: x = 2",
        "x = 1\nmatch unknown:\n  case [x]: pass",
        "x = 1\nfor i in (1, 2):\n  if i == 2: break\n  x = i",
        "x = 1\nfor i in (1, 2):\n  if i == 2: continue\n  x = i",
        "for x in (1, 2): pass",
        "x = 1\nif unknown:\n  import x",
        "x = 1\nif unknown:\n  def x(): ...",
        "x = 1\nfrom elsewhere import *",
        "x = 1\n[x := 2 for _ in (1,)]",
        "x = 1\ndef f():\n  global x\n  x = 2\nf()",
        # A value that has an unknown part, or is changed by what is not followed.
        "x = [1, 2, 3][1:]",
        "x = {unknown: 1, 'a': 2}",
        "x = {'a': 1, **unknown}",
        "x = [1, *unknown]",
        "x = [i for i in (1, 2) if unknown]",
        "x = [i for i in unknown]",
        "x = f'{unknown}'",
        "x = f'{1:03}'",
        "x = {'a': 1}\nif unknown: x['b'] = 2",
        "x = {'a': 1}\nif unknown: x.update(b=2)",
        "x = {'a': 1}\nx.update(b=2)",
        "x = {'a': 1}\nx[unknown] = 2",
        "x = {'a': 1}\ny = x\nfor k in unknown: y[k] = 2",
        "x = {'a': 1}\nfor t in [x]: t['b'] = 2",
        "x = {'a': {}}\nx = x['a']\nif unknown:\n  y = x\n  y['b'] = 2",
        "x = {}\ndef f(): x['a'] = 1\nif unknown: f()",
        "x = {}\ndef f(t): t['a'] = 1\nif unknown: f(x)",
        "x = []\nx.append(1)",
        "x = [1]\ny = x\ny += [2]",
        "x = [1]\nx *= 2",
        # What a function returns.
        "def f():\n  if unknown: return 1\n  return 2\nx = f()",
        "def f():\n  while unknown: return 1\nx = f()",
        "x = {}\ndef f():\n  if unknown: return\n  x['a'] = 1\nf()",
        "def f():\n  yield 1\nx = f()",
        "def f(): raise E\nx = f()",
        "async def f(): return 1\nx = f()",
        "@unknown\ndef f(): return 1\nx = f()",
        "def f(*a): return a\nx = f(1)",
        "def f(a, b=2): return b\nx = f(**unknown)",
        "x = lambda: 1",
        # Classes whose constructor is not followed.
        "@unknown\nclass C:\n  def __init__(s): s.n = 1\nx = C().n",
        "class C(unknown):\n  n = 1\nx = C().n",
        "class C:\n  def __init__(s): s.n = 1\nc = C()\nif unknown: c.n = 2\nx = c.n",
        "class C:\n  def __init__(s): s.n = 1\nc = C()\nc.change()\nx = c.n",
    ],
)
def test_what_is_not_followed_is_unknown(text: str) -> None:
    assert calculated(text) is UNKNOWN


TABLE = "d = {" + "".join(f"{i}: {i}, " for i in range(MAX_ITEMS)) + "}\n"


@pytest.mark.parametrize(
    "text",
    [
        "x = [i for i in range(10**9)]",
        "x = [(a, b) for a in range(100) for b in range(100)]",
        "x = {(a, b): 0 for a in range(100) for b in range(100)}",
        "x = {" + "".join(f"{i}: 0, " for i in range(MAX_ITEMS + 1)) + "}",
        TABLE + "x = {**d, 'a': 1}",
        TABLE + "x = dict(d, a=1)",
        TABLE + "x = d; x['a'] = 1",
        TABLE + "x = [*d, 0]",
        "x = [1]\n" + "x = x + x\n" * 200,
        "x = [1]\n" + "x += x\n" * 200,
        "x = 'ab'\n" + "x = f'{x}{x}'\n" * 200,
        f"a = '{'a' * 1000}'\nx = ''.join([a for _ in range(100)])",
        "x = " + "9" * 30,
    ],
)
def test_values_are_bounded(text: str) -> None:
    assert calculated(text) is UNKNOWN


def test_a_copy_counts_by_its_size() -> None:
    """The copies of 400 tables would take 2 000 000 words: the module is given up."""
    assert calculated(TABLE + "y = [{**d}]\nx = 1") == 1
    assert calculated(TABLE + "y = [" + "{**d}, " * 400 + "]\nx = 1") is UNKNOWN
    assert calculated(TABLE + "y = [{**d} for _ in range(400)]\nx = 1") is UNKNOWN


@pytest.mark.parametrize(
    "text",
    [
        "x = ()\n" + "x = (x, x)\n" * 200 + "y = {x: 1}\nx = x == x",
        "x = []\n" + "x = [x, x]\n" * 200 + "if unknown: x.append(1)",
        "x = 3\n" + "x = x - -x\n" * 200,
        "def f(): return [f() for _ in range(1000)]\nx = f()",
        "def f(): return f()\nx = f()",
        "def f(): return [f, g]\ndef g(): return [f, g]\nif unknown: f(); g()\nx = 1",
        "x = [i for a in range(5000) for b in range(5000) for i in range(5000)]",
        "x = " + "(" * 150 + "1" + ",)" * 150,
        "import a as x\n" + "x = x.aaaaaaaaaaaaaaaaaaaaaaaa\n" * 20_000,
        # Small tuples of large ones, spoiled again and again.
        "x = (*range(5000),)\n"
        + "x = (*[x for _ in range(5000)],)\n" * 3
        + "x = (x,)\n"
        + "if unknown: x.a()\n" * 10_000,
    ],
)
def test_hostile_constants_end(text: str) -> None:
    calculated(text)


# SGLang


def places(index: SglangIndex) -> dict[str, list[str]]:
    return {origin: [str(site) for site in sites] for origin, sites in index.sites.items()}


def sglang_tree(root: Path, files: dict[str, str | bytes]) -> Path:
    (root / "python/sglang/srt/models").mkdir(parents=True)
    return write(root, files)


def test_origin_decides_and_not_the_name(tmp_path: Path) -> None:
    root = sglang_tree(
        tmp_path,
        {
            "python/sglang/srt/own.py": (
                "from sglang.kernels import rmsnorm  # not flashinfer\nrmsnorm()\n"
            ),
            "python/sglang/srt/lazy.py": (
                "def LazyImport(a, b): ...\n"
                "sample = LazyImport('flashinfer.sampling', 'top_k')\n"
                "def f():\n    return sample()\n"
            ),
            "python/sglang/srt/module.py": "import flashinfer.norm as n\nn.rmsnorm(1)\n",
            "python/sglang/srt/branches.py": (
                "try:\n    from flashinfer.a import f\n"
                "except ImportError:\n    from sgl_kernel import f\nf()\n"
            ),
            "sgl-kernel/python/sgl_kernel/a.py": (
                "import flashinfer.norm as _n\ndef f(x):\n    return _n.gemma(x)\n"
            ),
            "python/sglang/srt/bom.py": "\ufefffrom flashinfer import g\ng()\n",
            "python/sglang/srt/broken.py": "from flashinfer import (\n",
        },
    )
    assert places(index_sglang(root)) == {
        "flashinfer.sampling.top_k": ["python/sglang/srt/lazy.py:4"],
        "flashinfer.norm.rmsnorm": ["python/sglang/srt/module.py:2"],
        "flashinfer.a.f": ["python/sglang/srt/branches.py:5"],
        "flashinfer.g": ["python/sglang/srt/bom.py:2"],
        "flashinfer.norm.gemma": [
            "python/sglang/srt/branches.py:5 via sgl-kernel/python/sgl_kernel/a.py:3"
        ],
    }


SCOPES = """\
import importlib
from sglang.own import rmsnorm
def one():
    from flashinfer.norm import rmsnorm
    return rmsnorm(1)
def two(x):
    return rmsnorm(x)
def three(gemma):
    gemma()
    def inner():
        from flashinfer.norm import gemma
        gemma()
class Layer:
    def __init__(self):
        from flashinfer.mamba import update
        self.kernel = update
        self.norm = importlib.import_module("flashinfer.norm").layernorm
    def update(self, update): update()
def four():
    import flashinfer
    flashinfer.comm.reduce(getattr(flashinfer.comm, "plan"))
from flashinfer.sampling import top_p as exported
"""


def test_a_name_means_what_its_scope_says(tmp_path: Path) -> None:
    root = sglang_tree(tmp_path, {"python/sglang/srt/a.py": SCOPES})
    sites = {
        origin: [(site.line, site.kind) for site in found]
        for origin, found in index_sglang(root).sites.items()
    }
    assert sites == {
        "flashinfer.norm.rmsnorm": [(5, "call")],
        "flashinfer.norm.gemma": [(12, "call")],
        "flashinfer.mamba.update": [(16, "mention")],
        "flashinfer.norm.layernorm": [(17, "mention")],
        "flashinfer.comm.reduce": [(21, "call")],
        "flashinfer.comm.plan": [(21, "mention")],
        "flashinfer.sampling.top_p": [(22, "import")],
    }


def test_sglang_kernel_is_followed_through_helpers_exports_and_aliases(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "sglang/srt/models/m.py": "from .base import A\nEntryClass = [A]\n",
            "sglang/srt/layer.py": (
                "import sgl_kernel\nfrom sgl_kernel import public, renamed\n"
                "public()\nrenamed()\nsgl_kernel.b.own()\n"
            ),
            "sgl_kernel/__init__.py": "from sgl_kernel.b import public\n",
            "sgl_kernel/b.py": (
                "import flashinfer\n"
                "def helper(x): return flashinfer.norm.f(x)\n"
                "def public(x):\n    return helper(x)\n"
                "def own(x): return x\n"
                "renamed = public\n"
            ),
            "sgl_kernel/other.py": "def public(x): ...\n",
        },
    )
    index = index_sglang(root)
    assert places(index) == {
        "flashinfer.norm.f": [
            "sglang/srt/layer.py:3 via sgl_kernel/b.py:2",
            "sglang/srt/layer.py:4 via sgl_kernel/b.py:2",
        ]
    }
    assert index.architectures == {"A": "sglang/srt/models/m.py"}


def test_models_flags_and_backends(tmp_path: Path) -> None:
    srt = "python/sglang/srt"
    root = sglang_tree(
        tmp_path,
        {
            f"{srt}/layers/__init__.py": "",
            f"{srt}/layers/norm.py": "",
            f"{srt}/layers/attention/fast.py": "",
            f"{srt}/models/a.py": (
                "from sglang.srt.layers.norm import Norm\nfrom sglang.srt.layers import norm\n"
                "class B: ...\nEntryClass = [A, B]\n"
            ),
            f"{srt}/models/c.py": "EntryClass = C\n",
            f"{srt}/models/nested/d.py": "EntryClass = NotRead\n",
            f"{srt}/models/registry.py": "print(module.EntryClass)\n",
            f"{srt}/registry.py": (
                "@register_attention_backend('fast')\ndef make(runner):\n"
                "    from sglang.srt.layers.attention.fast import Fast\n    return Fast(runner)\n"
            ),
            f"{srt}/arg_groups/fields/exec_.py": (
                "from sglang.srt.arg_groups.choices import KINDS\n"
                "class Exec:\n"
                "    tp_size: A[int, Arg(help='', aliases=['--tensor-parallel-size'])] = 1\n"
                "    kind: A[str, Arg(choices=KINDS, cli_name='--the-kind')] = 'x'\n"
                "    mode: A[Optional[Literal['p', 'q']], 'help ' 'text'] = None\n"
                "    hidden: A[bool, Arg(no_cli=True)] = False\n"
                "    internal: A[int, NS('x')] = 0\n"
                "    plain: int = 0\n"
            ),
            f"{srt}/arg_groups/choices.py": "BASE = ['a']\nKINDS = [*BASE, 'b'] + ['c']\n",
            f"{srt}/server_args.py": (
                "class ServerArgs:\n    bare: int = 0\n"
                "    def add_cli_args(parser):\n"
                "        parser.add_argument('--bare', type=int)\n"
                "        parser.add_argument('--old', action=DeprecatedAction, new_flag='--new')\n"
                "        parser.add_argument(name)\n"
            ),
        },
    )
    index = index_sglang(root)
    assert index.architectures == {
        "A": f"{srt}/models/a.py",
        "B": f"{srt}/models/a.py",
        "C": f"{srt}/models/c.py",
    }
    assert index.model_layers[f"{srt}/models/a.py"] == [f"{srt}/layers/norm.py"]
    assert index.attention_backends == {"fast": [f"{srt}/layers/attention/fast.py"]}
    assert {name: flag.choices for name, flag in index.flags.items()} == {
        "--tp-size": [],
        "--tensor-parallel-size": [],
        "--the-kind": ["a", "b", "c"],
        "--mode": ["p", "q"],
        "--bare": [],
        "--old": [],
    }
    assert (index.flags["--old"].deprecated, index.flags["--old"].instead) == (True, "--new")


# Hostile trees


def test_what_is_no_python_is_passed_over(tmp_path: Path) -> None:
    outside = write(tmp_path / "outside", {"evil.py": "@flashinfer_api\ndef evil(): ...\n"})
    junk: dict[str, str | bytes] = {
        "binary.py": b"\x00\xff flashinfer_api",
        "latin.py": b"# flashinfer_api \xe9\n",
        "unclosed.py": "flashinfer_api(",
        "parentheses.py": "flashinfer_api" + "(" * 5000,
        "unary.py": "flashinfer_api = " + "-" * 50_000 + "1",
        "attributes.py": "from flashinfer import x\nx" + ".flashinfer_api" * 20_000 + "()",
        "sum.py": "flashinfer_api = " + "+".join(["1"] * 20_000),
        "number.py": "flashinfer_api = " + "9" * 50_000,
        "elif.py": "if flashinfer_api: ...\n" + "elif x: ...\n" * 5_000,
        **{
            f"deep{n}.py": "from flashinfer import f\n@flashinfer_api\ndef broken():\n"
            "    f(" + "-" * n + "1)\nif f: ...\n" + "elif f: ...\n" * n
            for n in (300, 700, 1_000, 1_500, 2_500)
        },
        "huge.py": b"#flashinfer_api\n" * 600_000,
        "odd\nname \u00e9.py": "@flashinfer_api\ndef odd(): ...\n",
    }
    root = flashinfer_tree(tmp_path / "fi")
    write(root / "flashinfer", junk)
    srt = sglang_tree(tmp_path / "sg", {}) / "python/sglang/srt"
    write(
        srt, junk | {"models/ok.py": "EntryClass = Ok\n", "a.py": "from flashinfer import f\nf()"}
    )
    for folder in (root / "flashinfer", srt):
        (folder / "folder.py").mkdir()
        (folder / "link.py").symlink_to(outside / "evil.py")
        (folder / "linked").symlink_to(outside, target_is_directory=True)
        (folder / "loop").symlink_to(folder, target_is_directory=True)
        (folder / "broken.py").symlink_to("nowhere")
        os.mkfifo(folder / "pipe.py")
        Path(os.fsdecode(os.fsencode(folder) + b"/\xff.py")).write_text("flashinfer_api")
    apis = index_flashinfer(root)
    names = {path.rpartition(".")[2] for path in apis.apis}
    assert names - {"broken"} == {"rmsnorm", "odd"}
    assert FlashInferIndex.model_validate_json(apis.model_dump_json()) == apis
    index = index_sglang(tmp_path / "sg")
    found = places(index)["flashinfer.f"]
    assert "python/sglang/srt/a.py:2" in found
    assert all("/deep" in place for place in found if "/a.py" not in place)
    assert index.architectures == {"Ok": "python/sglang/srt/models/ok.py"}


def test_a_package_that_is_a_link_out_of_the_tree_is_not_read(tmp_path: Path) -> None:
    flashinfer_tree(tmp_path / "elsewhere")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/flashinfer").symlink_to(tmp_path / "elsewhere/flashinfer")
    with pytest.raises(InputError, match="no @flashinfer_api"):
        index_flashinfer(tmp_path / "tree")


def test_not_a_checkout(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is it an SGLang checkout"):
        index_sglang(tmp_path)
    with pytest.raises(InputError, match="is it a FlashInfer checkout"):
        index_flashinfer(tmp_path)


# The cache


def test_cached_indexes_come_back_equal(tmp_path: Path) -> None:
    flashinfer = index_flashinfer(flashinfer_tree(tmp_path / "fi"))
    root = sglang_tree(
        tmp_path / "sg", {"python/sglang/srt/a.py": "import flashinfer as f\nf.norm.g()\n"}
    )
    sglang = index_sglang(root)
    cache = tmp_path / "cache"
    for _ in range(2):
        assert cached(cache, FlashInferIndex, "abc1234", lambda: flashinfer) == flashinfer
        assert cached(cache, SglangIndex, "abc1234", lambda: sglang) == sglang
    assert len(list(cache.iterdir())) == 2


DAMAGE = ["", "{", "[]", "null", '{"version": 0}', '{"version": 1, "apis": 3}', "[" * 100_000]


@pytest.mark.parametrize("damage", [*DAMAGE, b"\xff\xfe", "truncated", "foreign"])
def test_damaged_cache_is_rebuilt(tmp_path: Path, damage: str | bytes) -> None:
    built = []

    def build() -> FlashInferIndex:
        built.append(1)
        return FlashInferIndex(apis={}, exports={"a": "b"})

    for _ in range(2):
        assert cached(tmp_path, FlashInferIndex, "abc1234", build).exports == {"a": "b"}
    assert len(built) == 1
    (path,) = tmp_path.iterdir()
    text = path.read_text()
    version = FlashInferIndex.model_fields["version"].default
    whole = {
        "truncated": text[: len(text) // 2],
        "foreign": text.replace(f'"version":{version}', f'"version":{version + 1}'),
    }
    content = whole.get(damage, damage) if isinstance(damage, str) else damage
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert cached(tmp_path, FlashInferIndex, "abc1234", build).exports == {"a": "b"}
    assert len(built) == 2
    assert path.read_text() == text


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    index = FlashInferIndex(apis={}, exports={})
    assert cached(tmp_path / "file", FlashInferIndex, "abc1234", lambda: index) is index
    with pytest.raises(InputError, match="valid name"):
        cached(tmp_path, FlashInferIndex, "../escape", lambda: index)


def test_revision(tmp_path: Path) -> None:
    for name in ("flashinfer_python-0.7.2.post1", "other-1.0"):
        (tmp_path / f"{name}.dist-info").mkdir()
    assert revision(tmp_path, "flashinfer_python", "sglang_kernel") == "0.7.2.post1"
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang" / "a.py").write_text("1")
    before = revision(tmp_path, "sglang")
    (tmp_path / "sglang" / "b.py").write_text("")
    assert before.startswith("tree-")
    assert revision(tmp_path, "sglang") not in (before, "0.7.2.post1")
    (tmp_path / "sglang-0.5.23.dist-info").mkdir()
    assert revision(tmp_path, "sglang", "sglang_kernel") == "0.5.23"
    (tmp_path / "sglang_kernel-0.4.5.dist-info").mkdir()
    both = revision(tmp_path, "sglang", "sglang_kernel")
    assert both == files.safe_name("0.5.23-sglang_kernel-0.4.5", "revision")


def test_revision_of_a_checkout_with_local_edits(tmp_path: Path) -> None:
    write(tmp_path, {"a.py": "1\n", "a.txt": "1\n", ".gitignore": "built.py\n"})
    git.git("init", "-q", cwd=tmp_path)
    git.git("add", ".", cwd=tmp_path)
    git.git("commit", "-qm", "one", cwd=tmp_path, env=git.AUTHOR)
    committed = git.short_sha(tmp_path)
    write(tmp_path, {"a.txt": "2\n", "built.py": "1\n"})
    assert revision(tmp_path, "flashinfer_python") == committed
    seen = {committed}
    for name, text in (("a.py", "2\n"), ("a.py", "3\n"), ("new.py", "1\n"), ("new.py", "22\n")):
        write(tmp_path, {name: text})
        edited = revision(tmp_path, "flashinfer_python")
        assert edited.startswith(f"{committed}-")
        assert edited == revision(tmp_path, "flashinfer_python")
        assert edited not in seen
        seen.add(edited)
    git.git("config", "core.fsmonitor", "touch ran; false", cwd=tmp_path)
    git.git("config", "diff.external", "touch ran; false", cwd=tmp_path)
    assert revision(tmp_path, "flashinfer_python") == edited
    assert not (tmp_path / "ran").exists()
