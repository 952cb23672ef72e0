"""The draft of an SGLang integration: on SGLang's own files, on odd ones, and as a pull request."""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks import files, manifest, ops
from tasks.errors import PublishError
from tasks.git import git
from tasks.manifest import KernelEntry, RunManifest, Upstream
from tasks.ops.base import FlashInferApi, Json, KernelSpec, const_axes
from tasks.publish.outbox import Outbox
from tasks.publish.render import Subject
from tasks.publish.scaffold import (
    NothingToScaffoldError,
    Scaffold,
    Switch,
    read_layer,
    scaffold,
    switch,
)
from tasks.publish.sglang import of_another_model, sglang_by_hand, sglang_pull_request
from tasks.repos import clone
from tests.conftest import DATA
from tests.unit.test_repos import commit

SAMPLER = "python/sglang/srt/layers/sampler.py"
API = FlashInferApi("flashinfer.sampling.top_k", ("top_k",), server_flags=("--backend flashinfer",))
DEFINITION: Json = {
    "name": "top_k_v8",
    "inputs": {
        "probs": {"shape": ["batch", "vocab"], "dtype": "float32"},
        "k": {"shape": None, "dtype": "int32"},
        "seed": {"shape": ["batch"], "dtype": "int64", "optional": True},
        "scale": {"shape": None, "dtype": "bfloat16"},
    },
    "outputs": {"samples": {"shape": ["batch"], "dtype": "int64"}},
}
FLAG = Switch("sglang.args", "get_args", ('get_args().backend != "flashinfer"',), "--backend x")
SIGNATURE = """def dispatch_top_k(
    probs: torch.Tensor,
    k: int,
    seed: torch.Tensor | None,
    scale: float,
) -> torch.Tensor | None:
"""


def add(source: bytes, api: FlashInferApi = API, definition: Json = DEFINITION) -> Scaffold:
    return scaffold(source, "layer.py", api, definition, FLAG)


def kept(source: bytes, edited: bytes) -> bool:
    """Whether every line is there still, in its order; the last one may have got an end."""
    lines = iter(edited.splitlines(keepends=True))
    *first, last = source.splitlines(keepends=True) or [b""]
    return all(line in lines for line in first) and any(x.startswith(last) for x in lines)


# SGLang's own files


def kernels() -> Iterator[tuple[KernelSpec, FlashInferApi, Json]]:
    """Yield a kernel of every variant of every op type that FlashInfer runs."""
    for file in sorted((DATA / "mini-trace" / "definitions").rglob("*.json")):
        published = json.loads(file.read_text())
        module = ops.registry().get(published["op_type"])
        if module is None:
            continue
        spec = module.spec_of(published)
        api = module.provider(spec)
        if isinstance(api, FlashInferApi):
            yield spec, api, {"name": spec.name, **module.definition(spec)}


EVERY = {(spec.op_type, spec.variant): (api, made) for spec, api, made in kernels()}


def test_every_api_has_a_kernel_here() -> None:
    known = {api.path for module in ops.registry().values() for api in module.apis}
    assert {api.path for api, _ in EVERY.values()} == known


@pytest.mark.parametrize("kind", EVERY, ids="-".join)
def test_every_layer_of_sglang(kind: tuple[str, str], cloned: Path) -> None:
    """Of SGLang 0.5.17; where it has the API, under a name that it does not have."""
    api, definition = EVERY[kind]
    source = read_layer(cloned / "sglang", api.sglang_layer)
    selected = switch(cloned / "sglang", api, kind[0])
    try:
        made = scaffold(source, api.sglang_layer, api, definition, selected)
    except NothingToScaffoldError as error:
        line = int(re.search(r"in line (\d+)", str(error))[1])  # type: ignore[index]
        statement = b"".join(source.splitlines()[line - 1 : line + 12]).decode()
        assert api.path.rpartition(".")[2] in statement
        other = replace(api, path=f"{api.path}_of_tomorrow")
        made = scaffold(source, api.sglang_layer, other, definition, selected)
        api = other
    ast.parse(made.source)
    assert kept(source, made.source)
    # Both as they were said to be, the import before the module's first class or function.
    text = made.source.decode()
    assert text.count(made.guard) == text.count(made.dispatch) == 1
    assert text.endswith(f"\n\n\n{made.dispatch}")
    assert list(definition["inputs"]) == [
        arg.arg
        for arg in ast.parse(made.dispatch).body[0].args.args  # type: ignore[attr-defined]
    ]
    with pytest.raises(NothingToScaffoldError, match="already"):
        scaffold(made.source, api.sglang_layer, api, definition, selected)


def test_server_flags_are_settings_of_sglang(cloned: Path) -> None:
    tree = ast.parse(read_layer(cloned / "sglang", "python/sglang/srt/server_args.py"))
    (arguments,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "ServerArgs")
    fields = {ast.unparse(n.target) for n in arguments.body if isinstance(n, ast.AnnAssign)}
    for api, _ in EVERY.values():
        selected = switch(cloned / "sglang", api, "op")
        if api.server_flags:
            assert selected.function == "get_server_args"
            used = {re.search(r"\(\)\.(\w+)", text)[1] for text in selected.refusals}  # type: ignore[index]
            assert used <= fields
            assert len(used) == len(api.server_flags)


def test_the_demos_layer(cloned: Path) -> None:
    api, definition = EVERY["sampling", "top_k_sampling_from_probs"]
    source = read_layer(cloned / "sglang", SAMPLER)
    selected = switch(cloned / "sglang", api, "sampling")
    made = scaffold(source, SAMPLER, api, definition, selected)
    after = made.source.decode().partition("    is_npu,\n)\n")[2]
    assert after.startswith(f"\n{made.guard}\nif is_cuda():\n")
    assert made.guard == (
        "try:\n    from flashinfer.sampling import top_k_sampling_from_probs\n"
        "except ImportError:\n    top_k_sampling_from_probs = None\n"
    )
    # The layer imports the accessor, and torch.
    assert "import" not in made.dispatch
    assert 'if get_server_args().sampling_backend != "flashinfer":\n' in made.dispatch


def test_an_own_function_of_the_same_name(cloned: Path) -> None:
    api, definition = EVERY["rope", "neox"]
    source = read_layer(cloned / "sglang", api.sglang_layer)
    selected = switch(cloned / "sglang", api, "rope")
    made = scaffold(source, api.sglang_layer, api, definition, selected)
    name = "flashinfer_apply_rope_with_cos_sin_cache_inplace"
    assert f"    {name} = None\n" in made.guard
    assert f"return {name}(\n" in made.dispatch
    assert 'not get_bool_env_var("SGLANG_ENABLE_FLASHINFER_ROPE")' in made.dispatch
    own = b"from sglang.kernels.ops.attention.rope import apply_rope_with_cos_sin_cache_inplace"
    assert made.source.count(own) == source.count(own) == 1


# Odd files: where the import goes

BODY = b"x = 1\n"
PLACES = {
    "empty": (b"", b""),
    "comments": (b"#!/usr/bin/python\n# -*- coding: latin-1 -*-\n# \xe9\n", b""),
    "no imports": (b"# coding: latin-1\n# \xe9\n", BODY),
    "docstring": (b'"""Only\na docstring."""\n', b""),
    "future": (b'"""D."""\nfrom __future__ import annotations\n', BODY),
    "late docstring": (b"from __future__ import annotations\n", b'"""Of a layer."""\n' + BODY),
    "type checking": (b"import a\n", b"if TYPE_CHECKING:\n    import b\n"),
    "in parentheses": (b"from a import (\n    b,  # why\n    c,\n)\n", BODY),
    "backslash": (b"from a import b, \\\n    c\n", BODY),
    "semicolon": (b"import a; y = (\n  1,\n)\n", BODY),
    "late import": (b"import a\nlog = a.b()\nfrom c import d\n", BODY),
    "decorated": (b"# first\n", b"@f\n@g\nclass A: ...\n"),
    "no end of line": (b"import torch", b""),
    "no end of the last line": (b"import torch\n", b"x = 1"),
    "blank lines": (b"import torch\n", b"\n\n\n\nx = 1\n\n\n\n"),
    "byte-order mark": (b"\xef\xbb\xbfimport torch\n", BODY),
    "only a mark": (b"\xef\xbb\xbf", b""),
    "form feed": (b"import torch\n\x0c\n", BODY),
}


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("place", PLACES)
def test_places(place: str, newline: bytes) -> None:
    before, after = (part.replace(b"\n", newline) for part in PLACES[place])
    source = before + after
    made = add(source).source
    compile(made, "layer.py", "exec", dont_inherit=True)
    assert kept(source, made)
    if place != "form feed":  # which is not the end of a line
        assert made.startswith(before)
    assert made.index(b"try:") < (made.rindex(after.strip()) if after.strip() else len(made))
    if newline not in source:
        newline = b"\n"
    ends = source in (b"", b"\xef\xbb\xbf") or source.endswith(newline)
    assert made.endswith(newline) == ends
    ending = made if ends else made + newline
    assert set(re.findall(rb"\r\n|\r|\n", ending)) == {newline}
    assert made.startswith(b"\xef\xbb\xbf") == source.startswith(b"\xef\xbb\xbf")
    assert b"\xef\xbb\xbf" not in made[1:]
    with pytest.raises(NothingToScaffoldError):
        add(made)


PIECES = (
    "import torch",
    "import torch.nn as nn",
    "import a; b = '''\n'''",
    "from a import (\n    b,\n    c as top_k,\n)",
    "from a import *",
    "if True:\n    import torch\nelse:\n    torch = None",
    "try:\n    from b import c\nexcept ImportError:\n    c = None",
    "def dispatch_top_k(): return 'é'",
    "class A:\n    def f(self):\n        from a import top_k\n",
    "@f\ndef g():\n\tpass",
    "# a comment",
    "",
    "   ",
    "x = [\n    1,\n\n]",
    "y = 1; z = '''\n\n'''; import q",
    "'a string'",
    "flashinfer_top_k = flashinfer_dispatch_top_k = 1",
)


@given(
    st.sampled_from(
        ['"""D."""', "#!x", "# coding: utf-8", "from __future__ import annotations", ""]
    ),
    st.lists(st.sampled_from(PIECES), max_size=8),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
)
def test_any_module(first: str, pieces: list[str], newline: str, ends: bool) -> None:
    text = "\n".join([first, *pieces]) + "\n" * ends
    source = text.replace("\n", newline).encode()
    names = {n.id for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Name)}
    made = add(source)
    assert kept(source, made.source)
    tree = ast.parse(made.source)
    # Nothing that was there is bound anew.
    *_, guard = (n for n in tree.body if isinstance(n, ast.Try) and "flashinfer." in ast.unparse(n))
    bound = guard.handlers[0].body[0].targets[0].id  # type: ignore[attr-defined]
    assert bound not in names
    functions = [n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    assert functions.count(made.function) == 1
    with pytest.raises(NothingToScaffoldError):
        add(made.source)


@pytest.mark.parametrize(
    "line",
    [
        "from flashinfer.sampling import top_k",
        "from flashinfer import top_k as other",
        "import flashinfer\nflashinfer.sampling.top_k()",
        "from flashinfer import sampling as s\ndef f(): return s.top_k",
        "def f():\n    from flashinfer.other import (\n        a,\n        top_k,\n    )",
    ],
)
def test_a_module_that_has_it(line: str) -> None:
    with pytest.raises(
        NothingToScaffoldError, match=r"layer.py has flashinfer.sampling.top_k alre"
    ):
        add(f"import torch\n{line}\n".encode())


@pytest.mark.parametrize(
    "line",
    [
        "from .flashinfer import top_k",
        "from sgl_kernel import top_k",
        "import flashinfer\nx.top_k()",
        "# from flashinfer.sampling import top_k",
    ],
)
def test_a_module_that_has_something_else(line: str) -> None:
    assert add(f"import torch\n{line}\n".encode()).guard


@pytest.mark.parametrize("source", [b"def f(:\n", b"\0", b"\xff\xfe", b"(" * 5000])
def test_what_is_no_python(source: bytes) -> None:
    with pytest.raises(PublishError, match="SGLang's layer.py: "):
        add(source)


def test_what_would_not_compile() -> None:
    with pytest.raises(PublishError, match="SGLang's layer.py: cannot be added to"):
        add(b"import a\nreturn 1\n")


@pytest.mark.parametrize("name", ["a b", "class", "q)", "1", "é", "", '"""'])
def test_inputs_that_are_no_parameters(name: str) -> None:
    inputs = {name: {"shape": None, "dtype": "int32"}}
    with pytest.raises(PublishError, match="top_k_v8: input .* is no name of a Python parameter"):
        add(b"", definition=DEFINITION | {"inputs": inputs})


@pytest.mark.parametrize("field", ["inputs", "outputs"])
def test_a_definition_without_tensors(field: str) -> None:
    with pytest.raises(PublishError, match="top_k_v8: the definition has no inputs"):
        add(b"", definition=DEFINITION | {field: {}})


def test_types_without_torch() -> None:
    assert add(b"import torch.nn\n").dispatch.startswith(SIGNATURE)
    assert add(b"import a\n").guard.startswith("import torch\n\ntry:")
    absent = add(b"try:\n    import torch\nexcept ImportError:\n    torch = None\n")
    assert absent.guard.startswith("try:")
    assert '    seed: "torch.Tensor | None",\n' in absent.dispatch


# What the draft does when it is called


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stand-ins for what the layer imports; none of them is installed here."""
    arguments = SimpleNamespace(backend="flashinfer")
    torch, package, args = (ModuleType(n) for n in ("torch", "sglang", "sglang.args"))
    torch.Tensor = list  # type: ignore[attr-defined]
    args.get_args = lambda: arguments  # type: ignore[attr-defined]
    for module in (torch, package, args):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    return arguments


def give_flashinfer(monkeypatch: pytest.MonkeyPatch, **functions: Any) -> None:
    sampling = ModuleType("flashinfer.sampling")
    vars(sampling).update(functions)
    monkeypatch.setitem(sys.modules, "flashinfer", ModuleType("flashinfer"))
    monkeypatch.setitem(sys.modules, "flashinfer.sampling", sampling)


def loaded(made: Scaffold) -> Any:
    scope: dict[str, Any] = {}
    exec(compile(made.source, "layer.py", "exec", dont_inherit=True), scope)
    return scope[made.function]


ARGUMENTS = {"probs": [1], "k": 2, "seed": None, "scale": 0.5}


def test_dispatch(modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    made = add(b"import torch\n")
    assert loaded(made)(**ARGUMENTS) is None
    give_flashinfer(monkeypatch, top_k=lambda **given: given)
    assert loaded(made)(**ARGUMENTS) == ARGUMENTS
    modules.backend = "pytorch"
    assert loaded(made)(**ARGUMENTS) is None


def test_a_wrapper_is_not_pretended_to_run(
    modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = add(
        b"import torch\n", replace(API, path="flashinfer.sampling.TopKWrapper", method="run")
    )
    assert made.function == "dispatch_top_k_wrapper"
    assert loaded(made)(**ARGUMENTS) is None
    give_flashinfer(monkeypatch, TopKWrapper=object)
    with pytest.raises(NotImplementedError, match="TopKWrapper is not planned yet"):
        loaded(made)(**ARGUMENTS)


# The clone


@pytest.fixture
def sglang(tmp_path: Path) -> Path:
    upstream = tmp_path / "upstream"
    commit(upstream, SAMPLER, "import torch\n")
    (upstream / "link.py").symlink_to(SAMPLER)
    commit(upstream, "python/sglang/srt/server_args.py", "def get_global_server_args(): ...\n")
    clone.update("sglang", str(upstream), tmp_path / "sglang")
    return tmp_path / "sglang"


def test_a_layer_is_read_as_committed(sglang: Path) -> None:
    (sglang / SAMPLER).write_text("edited by somebody\n")
    assert read_layer(sglang, SAMPLER) == b"import torch\n"


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("python/sglang/srt/layers/gone.py", r"gone\.py: is not in commit [0-9a-f]{7}"),
        ("python/sglang/srt/layers", "layers: is no file but a tree"),
        ("link.py", "link.py: is no file but a link"),
        ("../upstream/" + SAMPLER, "cannot be read"),
        ("", "the op module names no file"),
    ],
)
def test_layers_that_are_not_there(path: str, why: str, sglang: Path) -> None:
    with pytest.raises(PublishError, match=why):
        read_layer(sglang, path)


def test_no_clone(tmp_path: Path) -> None:
    with pytest.raises(PublishError, match=f"sampler.py: {tmp_path / 'none'} is no clone"):
        read_layer(tmp_path / "none", SAMPLER)


def test_a_blobless_clone_fetches_the_layer(sglang: Path, tmp_path: Path) -> None:
    url = (tmp_path / "upstream").as_uri()
    for name in ("lean", "alone"):
        git("clone", "--quiet", "--no-checkout", "--filter=blob:none", url, str(tmp_path / name))
    assert read_layer(tmp_path / "lean", SAMPLER) == b"import torch\n"
    (tmp_path / "upstream").rename(tmp_path / "gone")
    with pytest.raises(PublishError, match=r"sampler\.py: cannot be read from"):
        read_layer(tmp_path / "alone", SAMPLER)


def test_an_older_and_another_sglang(sglang: Path) -> None:
    flags = ("--backend flashinfer", "--top-k 1", "--no-cache")
    found = switch(sglang, replace(API, server_flags=flags), "sampling")
    assert (found.module, found.function) == ("sglang.srt.server_args", "get_global_server_args")
    assert found.refusals == (
        'get_global_server_args().backend != "flashinfer"',
        "get_global_server_args().top_k != 1",
        "not get_global_server_args().no_cache",
    )
    (sglang / ".git" / "HEAD").unlink()
    with pytest.raises(PublishError, match="SGLang's server arguments cannot be read"):
        switch(sglang, API, "sampling")


# The pull request


def waiting(variant: str, **fields: Any) -> KernelEntry:
    family, _, name = variant.partition("/")
    api, definition = EVERY[family, name]
    module = ops.op_module(family)
    spec = module.spec_of({**definition, "op_type": family})
    assert const_axes(definition) == spec.axes
    return KernelEntry.model_validate(
        {
            "definition_name": spec.name,
            "op_type": family,
            "phase1_status": "new",
            "fi_status": "fi_supported",
            "sgl_status": "sgl_missing",
            "spec": spec.model_dump(mode="json"),
            "evidence": [f"SGLang 57c7ccf: no call of {api.path}"],
        }
        | fields
    )


TOP_K, TOP_P = "sampling/top_k_sampling_from_probs", "sampling/top_p_sampling_from_probs"


def subject(cloned: Path, *kernels: KernelEntry, of: int = 0) -> Subject:
    run = RunManifest.model_validate(
        {"model_slug": "m", "hf_repo_id": "somebody/M", "date": "2026-01-01"}
        | {"kernels": list(kernels), "repo_shas": {"sglang": "57c7ccf"}}
    )
    nowhere = cloned / "nowhere"
    return Subject(run, run.kernels[of], nowhere, nowhere, cloned, cloned / "sglang")


def test_what_another_model_has_asked_for_is_asked_for_once(cloned: Path, tmp_path: Path) -> None:
    url = "https://github.com/sgl-project/sglang/pull/7"
    one = replace(subject(cloned, waiting(TOP_K)), workspace=tmp_path)

    def found(**fields: Any) -> str | None:
        other = waiting(TOP_K).model_copy(update={"sglang_pr_url": url, **fields})
        run = one.manifest.model_copy(update={"model_slug": "n", "kernels": [other]})
        path = tmp_path / manifest.file_name("n", run.date)
        files.write_json(path, manifest.dump(run))
        return of_another_model(one)

    assert of_another_model(one) is None
    assert found() == url
    assert found(sglang_pr_url="file:///outbox/pull-requests/sampling.n.sglang.md") is None
    assert found(sgl_status="sgl_integrated") is None
    assert found(spec=waiting(TOP_P).spec) is None
    (tmp_path / "onboard_damaged_20260101.json").write_text("{")
    assert found() == url
    path = tmp_path / manifest.file_name("n", one.manifest.date)
    manifest.update(path, lambda run: setattr(run, "upstream", {url: Upstream(state="rejected")}))
    assert of_another_model(one) is None


def test_one_draft_for_the_kernels_of_an_op_type(cloned: Path, tmp_path: Path) -> None:
    kernels = (
        waiting(TOP_K),
        waiting("rmsnorm/rmsnorm"),
        waiting(TOP_P),
        waiting("sampling/top_k_top_p_sampling_from_probs", sgl_status="sgl_integrated"),
    )
    outbox = Outbox(tmp_path / "outbox")
    urls = set()
    for of in (0, 2):
        folder = tmp_path / f"edited-{of}"
        post, branch = sglang_pull_request(subject(cloned, *kernels, of=of), folder)
        urls.add(outbox.open_pull_request(post, branch))
    assert post.draft
    assert post.key == "sampling.m"
    assert post.title == "feat: integrate FlashInfer sampling for M"
    assert branch.name == "feat/flashinfer-sampling-integration-m"
    remote = tmp_path / "outbox" / "remotes" / "sglang.git"
    assert git("diff", "--name-only", "main", branch.name, cwd=remote) == SAMPLER
    assert git("rev-list", "--count", f"main..{branch.name}", cwd=remote) == "1"
    source = git("show", f"{branch.name}:{SAMPLER}", cwd=remote)
    ast.parse(source)
    for entry in (kernels[0], kernels[2]):
        api = entry.definition_name.rpartition("_")[0]
        assert f"    from flashinfer.sampling import {api}\n" in source
        assert f"`{entry.definition_name}`" in post.body
        assert f"level-10 dump of a short run contains `{api}`" in post.body
        assert f"return flashinfer.sampling.{api}(" in post.body  # how the baseline calls it
    assert "Nothing calls the dispatch yet" in post.body
    assert "rmsnorm" not in post.body
    (url,) = urls
    text = Path(url.removeprefix("file://")).read_text()
    assert "\ndraft: " in text
    assert text.endswith("<!-- onboard:sampling.m:sglang -->\n")
    assert not re.search(r"\n{3}(?!def )", post.body.replace("\n\n\ndef run", ""))


def test_what_somebody_named_a_pull_request_for_is_left_out(cloned: Path, tmp_path: Path) -> None:
    kernels = (waiting(TOP_K), waiting(TOP_P))
    elsewhere = {kernels[0].definition_name}
    post, branch = sglang_pull_request(subject(cloned, *kernels, of=1), tmp_path, elsewhere)
    assert "top_k" not in post.body
    (edited,) = branch.files.values()
    assert b"flashinfer.sampling import top_p_sampling_from_probs" in edited.read_bytes()


def test_a_sibling_that_cannot_be_begun_stops_no_other(
    cloned: Path, sglang: Path, tmp_path: Path
) -> None:
    """It is said in the draft; its own run fails."""
    kernels = waiting("rmsnorm/rmsnorm"), waiting("rmsnorm/fused_add_rmsnorm")
    layer = EVERY["rmsnorm", "rmsnorm"][0].sglang_layer
    commit(tmp_path / "upstream", layer, "from flashinfer.norm import rmsnorm\n")
    clone.update("sglang", str(tmp_path / "upstream"), sglang)
    for of in (0, 1):
        one = replace(subject(cloned, *kernels, of=of), sglang=sglang)
        post, _ = sglang_pull_request(one, tmp_path / "edited")
        assert f"`{kernels[0].definition_name}`: SGLang's {layer} has" in post.body
        assert "### `flashinfer.norm.fused_add_rmsnorm` in" in post.body
        assert str(cloned) not in post.body
    commit(tmp_path / "upstream", layer, "def broken(:\n")
    clone.update("sglang", str(tmp_path / "upstream"), sglang)
    with pytest.raises(PublishError, match=f"{layer}: is no Python module"):
        sglang_pull_request(one, tmp_path / "edited")


def test_nothing_to_begin(cloned: Path, tmp_path: Path) -> None:
    """SGLang has the call, and does not make it for this model: a person has to see why."""
    refused = waiting("gqa_paged/decode")
    one = subject(cloned, refused, waiting("gqa_paged/prefill"))
    with pytest.raises(
        NothingToScaffoldError, match=r"Decode\w+ already.*; .*Prefill\w+ alre"
    ) as e:
        sglang_pull_request(one, tmp_path)
    assert not list(tmp_path.iterdir())
    post = sglang_by_hand(one, str(e.value))
    assert post == sglang_by_hand(replace(one, entry=one.manifest.kernels[1]), str(e.value))
    assert not post.draft
    assert "is no missing import" in post.body
    assert "```" not in post.body


def test_a_kernel_that_no_api_runs(cloned: Path, tmp_path: Path) -> None:
    unknown = KernelEntry(definition_name="x", op_type="unknown", phase1_status="new")
    with pytest.raises(PublishError, match="x: has no FlashInfer API"):
        sglang_pull_request(subject(cloned, unknown), tmp_path)
