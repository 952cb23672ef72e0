"""A dataset is checked as a maintainer would; it does no harm, whatever is in it."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from typer.testing import CliRunner

from flows.cli import app
from tasks import sandbox
from tasks.constraints import holds
from tasks.errors import InputError
from tasks.validate import bench
from tasks.validate.dataset import validate
from tasks.validate.findings import Findings, Report
from tests.conftest import DATA

MINI = DATA / "mini-trace"
GEMM, GQA = "gemm_n4096_k4096", "gqa_ragged_prefill_causal_h32_kv8_d128"
GEMM_FILE, GQA_FILE = f"definitions/gemm/{GEMM}.json", f"definitions/gqa_ragged/{GQA}.json"
GEMM_ROWS, GQA_ROWS = f"workloads/gemm/{GEMM}.jsonl", f"workloads/gqa_ragged/{GQA}.jsonl"
SOLUTION = f"solutions/baseline/gemm/{GEMM}/torch_linear_73342c.json"
TRACES = f"traces/baseline/gemm/{GEMM}.jsonl"
TEST = f"tests/references/test_{GEMM}.py"
BLOBS = f"blob/workloads/gqa_ragged/{GQA}"
BLOB = f"{BLOBS}/{GQA}_one.safetensors"
BIAS_OUT_OF_ORDER = {
    f"trtllm_{kind}_moe_topk1_{experts}_h5120_i8192"
    for kind in ("fp4_block_scale", "fp8_per_tensor_scale")
    for experts in ("e16", "e128")
}
"""Published with routing_bias last among the inputs and second among run's parameters."""


def gqa_row() -> dict[str, Any]:
    blob = {"type": "safetensors", "path": f"./{BLOB}"}
    inputs: dict[str, Any] = {name: {"type": "random"} for name in "qkv"}
    inputs |= {name: blob | {"tensor_key": name} for name in ("qo_indptr", "kv_indptr")}
    inputs["sm_scale"] = {"type": "scalar", "value": 0.088}
    axes = {"len_indptr": 3, "total_q": 7, "total_kv": 9}
    workload = {"uuid": "one", "axes": axes, "inputs": inputs}
    return {"definition": GQA, "workload": workload, "solution": None, "evaluation": None}


def write_rows(path: Path, *rows: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def write_blob(path: Path, q: Any = (0, 3, 7), kv: Any = (0, 4, 9), dtype: str = "int32") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"qo_indptr": np.array(q, dtype), "kv_indptr": np.array(kv, dtype)}, path)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("good")
    for file in (GEMM_FILE, GQA_FILE, GEMM_ROWS, SOLUTION, TRACES):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(MINI / file, root / file)
    (root / TEST).parent.mkdir(parents=True)
    (root / TEST).write_text("def test_it():\n    assert True\n")
    write_rows(root / GQA_ROWS, gqa_row())
    write_blob(root / BLOB)
    return root


@pytest.fixture
def root(good: Path, tmp_path: Path) -> Path:
    return shutil.copytree(good, tmp_path / "dataset", symlinks=True)


@pytest.fixture
def no_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "ask", lambda *_: {})


def edit(file: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Return what changes a JSON file, or the first of its lines."""

    def damage(root: Path) -> None:
        lines = [(root / file).read_text()]
        if file.endswith("l"):
            lines = lines[0].splitlines()
        value = json.loads(lines[0])
        change(value)
        (root / file).write_text("\n".join([json.dumps(value), *lines[1:]]))

    return damage


def put(file: str, *keys: str, value: Any) -> Callable[[Path], None]:
    def change(target: dict[str, Any]) -> None:
        for key in keys[:-1]:
            target = target[key]
        target[keys[-1]] = value

    return edit(file, change)


def row(*keys: str, value: Any) -> Callable[[Path], None]:
    return put(GQA_ROWS, "workload", *keys, value=value)


def write(file: str, data: bytes) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(data)

    return damage


def link(file: str, target: str) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        shutil.move(root / file, root / ".moved")
        (root / file).symlink_to(target)

    return damage


def move(file: str, target: str) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        (root / target).parent.mkdir(parents=True, exist_ok=True)
        (root / file).rename(root / target)

    return damage


def sparse(file: str) -> Callable[[Path], None]:
    return lambda root: os.truncate(root / file, 1 << 30)


def cut(file: str, size: int) -> Callable[[Path], None]:
    return lambda root: os.truncate(root / file, (root / file).stat().st_size - size)


def header(entries: object) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


def tensors(**changes: Any) -> bytes:
    entry = {"dtype": "I32", "shape": [3], "data_offsets": [0, 12]}
    return header({"qo_indptr": entry | changes, "kv_indptr": entry | {"data_offsets": [12, 24]}})


ONE_PATH = ("inputs", "qo_indptr", "path")
DEEP = b'{"name": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
BIG = 1 << 62
ERRORS: dict[str, tuple[Callable[[Path], None], str, str, str]] = {
    # layout and files
    "other name": (put(GEMM_FILE, "name", value="x"), GEMM_FILE, "name", "'x', but the path"),
    "other op type": (put(GEMM_FILE, "op_type", value="x"), GEMM_FILE, "op_type", "'x', but"),
    "name twice": (
        lambda root: shutil.copytree(root / "definitions/gemm", root / "definitions/zzz"),
        f"definitions/zzz/{GEMM}.json",
        "name",
        f"{GEMM_FILE} has the same name",
    ),
    "unsafe name": (
        write("definitions/gemm/a b.json", b"{}"),
        "definitions/gemm/a b.json",
        "",
        "is not a valid name",
    ),
    "wrong folder": (
        move(GEMM_ROWS, f"workloads/rope/{GEMM}.jsonl"),
        f"workloads/rope/{GEMM}.jsonl",
        "",
        "the definition's op type is 'gemm'",
    ),
    "stray rows": (
        write("workloads/gemm/x.jsonl", b""),
        "workloads/gemm/x.jsonl",
        "",
        "there is no such definition",
    ),
    "link": (link(GEMM_FILE, "/etc/passwd"), GEMM_FILE, "", "is a symbolic link, refused"),
    "linked folder": (link("blob", "/etc"), "blob", "", "is a symbolic link, refused"),
    "linked blob": (link(BLOB, "../x"), BLOB, "", "is a symbolic link, refused"),
    "fifo": (
        lambda root: os.mkfifo(root / f"{GEMM_FILE}.json"),
        f"{GEMM_FILE}.json",
        "",
        "regular",
    ),
    "sparse": (sparse(GEMM_FILE), GEMM_FILE, "", "is 1073741824 bytes long"),
    "sparse rows": (sparse(GQA_ROWS), GQA_ROWS, "", "is 1073741824 bytes long"),
    "many rows": (write(GQA_ROWS, b"\n" * 200_000), GQA_ROWS, "", "has more than 100000 lines"),
    "no text": (write(GEMM_FILE, b"\xff"), GEMM_FILE, "", "is not UTF-8 text (byte 0)"),
    "no json": (write(GEMM_FILE, b"{"), GEMM_FILE, "", "is not JSON"),
    "no object": (write(GEMM_FILE, b"[]"), GEMM_FILE, "", "is a JSON list, expected an object"),
    "deep": (write(GEMM_FILE, DEEP), GEMM_FILE, "", "is nested too deeply"),
    "key twice": (write(GEMM_FILE, b'{"a": 1, "a": 2}'), GEMM_FILE, "", "key 'a' appears twice"),
    "surrogate": (write(GEMM_FILE, b'{"a": "\\ud800"}'), GEMM_FILE, "", "not Unicode text"),
    # definition
    "no axes": (put(GEMM_FILE, "axes", value=[]), GEMM_FILE, "axes", "not an object"),
    "axis": (put(GEMM_FILE, "axes", "N", value=3), GEMM_FILE, "axes.N", "not an object"),
    "const": (put(GEMM_FILE, "axes", "N", "value", value=-1), GEMM_FILE, "axes.N", "positive"),
    "shape": (
        put(GEMM_FILE, "inputs", "A", "shape", value=["Z"]),
        GEMM_FILE,
        "inputs.A",
        "axis 'Z', not declared",
    ),
    "shape of lists": (
        put(GEMM_FILE, "inputs", "A", "shape", value=[[]]),
        GEMM_FILE,
        "inputs.A.shape",
        "a list of axes",
    ),
    "dtype": (put(GEMM_FILE, "inputs", "A", "dtype", value="f"), GEMM_FILE, "inputs.A", "'f'"),
    "no reference": (put(GEMM_FILE, "reference", value=""), GEMM_FILE, "reference", "empty"),
    "arity": (
        put(GEMM_FILE, "reference", value="def run(A): ..."),
        GEMM_FILE,
        "reference",
        "run takes ['A'], the inputs are ['A', 'B']",
    ),
    "syntax": (put(GEMM_FILE, "reference", value="def"), GEMM_FILE, "reference", "not Python"),
    "compile": (
        put(GEMM_FILE, "reference", value="return 1\ndef run(A, B): ..."),
        GEMM_FILE,
        "reference",
        "'return' outside function",
    ),
    "parentheses": (put(GEMM_FILE, "reference", value="(" * 9999), GEMM_FILE, "reference", "Pyth"),
    "constraint": (
        put(GEMM_FILE, "constraints", value=["M == Z"]),
        GEMM_FILE,
        "constraints.0",
        "uses Z, not declared",
    ),
    "constraint syntax": (
        put(GEMM_FILE, "constraints", value=["M ="]),
        GEMM_FILE,
        "constraints",
        "is no expression",
    ),
    "test": (write(TEST, b"def"), TEST, "", "is not Python (line 1"),
    # rows
    "row": (write(GQA_ROWS, b"{}\n"), GQA_ROWS, "line 1: workload", "missing"),
    "row json": (write(GQA_ROWS, b"\n{]\n"), GQA_ROWS, "line 2", "is not JSON"),
    "no rows": (write(GQA_ROWS, b"\n"), GQA_ROWS, "", "has no rows"),
    "row of": (put(GQA_ROWS, "definition", value=GEMM), GQA_ROWS, "line 1: definition", "but the"),
    "solved row": (put(GQA_ROWS, "solution", value="x"), GQA_ROWS, "line 1: solution", "has none"),
    "uuid twice": (
        lambda root: write_rows(root / GQA_ROWS, gqa_row(), gqa_row()),
        GQA_ROWS,
        "line 2: workload.uuid",
        "'one' appears twice",
    ),
    "axis missing": (
        row("axes", value={"len_indptr": 3, "total_q": 7}),
        GQA_ROWS,
        "line 1: workload.axes.total_kv",
        "missing",
    ),
    "axis extra": (row("axes", "z", value=1), GQA_ROWS, "line 1: workload.axes.z", "no variable"),
    "axis 0": (row("axes", "total_q", value=0), GQA_ROWS, "line 1: workload.axes.total_q", "0 is"),
    "axis bool": (
        row("axes", "total_q", value=True),
        GQA_ROWS,
        "line 1: workload.axes.total_q",
        "True is no positive integer",
    ),
    "axis float": (
        row("axes", "total_q", value=7.0),
        GQA_ROWS,
        "line 1: workload.axes.total_q",
        "7.0 is no positive integer",
    ),
    "input missing": (
        edit(GQA_ROWS, lambda value: value["workload"]["inputs"].pop("v")),
        GQA_ROWS,
        "line 1: workload.inputs.v",
        "missing",
    ),
    "input extra": (
        row("inputs", "z", value={"type": "random"}),
        GQA_ROWS,
        "line 1: workload.inputs.z",
        "is no input",
    ),
    "input type": (
        row("inputs", "v", value={"type": "exec"}),
        GQA_ROWS,
        "line 1: workload.inputs.v.type",
        "'exec' is not random",
    ),
    "input scalar": (
        row("inputs", "v", value={"type": "scalar", "value": 1.0}),
        GQA_ROWS,
        "line 1: workload.inputs.v.type",
        "the definition says a tensor",
    ),
    "random scalar": (
        row("inputs", "sm_scale", value={"type": "random"}),
        GQA_ROWS,
        "line 1: workload.inputs.sm_scale.type",
        "the definition says a scalar",
    ),
    "int scalar": (
        row("inputs", "sm_scale", "value", value=1),
        GQA_ROWS,
        "line 1: workload.inputs.sm_scale.value",
        "1 is no float",
    ),
    "nan": (
        row("inputs", "sm_scale", "value", value=float("nan")),
        GQA_ROWS,
        "line 1: workload.inputs.sm_scale.value",
        "not finite",
    ),
    # blobs
    "absolute": (row(*ONE_PATH, value="/etc/x.safetensors"), GQA_ROWS, "line 1: ", "is no safet"),
    "escape": (
        row(*ONE_PATH, value=f"{BLOBS}/../x.safetensors"),
        GQA_ROWS,
        "line 1: workload.inputs.qo_indptr.path",
        "is no safetensors file of",
    ),
    "other's blob": (
        row(*ONE_PATH, value=f"blob/workloads/gemm/{GEMM}/x.safetensors"),
        GQA_ROWS,
        "line 1: workload.inputs.qo_indptr.path",
        f"is no safetensors file of {BLOBS}/",
    ),
    "linked row blob": (link(BLOB, "../x"), GQA_ROWS, "line 1: ", "does not exist"),
    "blob missing": (
        lambda root: (root / BLOB).unlink(),
        GQA_ROWS,
        "line 1: workload.inputs.qo_indptr.path",
        f"{BLOB}: does not exist",
    ),
    "orphan": (
        lambda root: write_blob(root / BLOBS / "y.safetensors"),
        f"{BLOBS}/y.safetensors",
        "",
        "orphan blob",
    ),
    "key": (
        row("inputs", "qo_indptr", "tensor_key", value="z"),
        GQA_ROWS,
        "line 1: workload.inputs.qo_indptr.tensor_key",
        "'z' is not in",
    ),
    "blob dtype": (
        lambda root: write_blob(root / BLOB, dtype="int64"),
        GQA_ROWS,
        "line 1: workload.inputs.qo_indptr",
        "dtype I64, should be int32",
    ),
    "blob shape": (
        lambda root: write_blob(root / BLOB, q=(0, 7)),
        GQA_ROWS,
        "line 1: workload.inputs.qo_indptr",
        "shape [2], should be [3]",
    ),
    "indptr": (
        lambda root: write_blob(root / BLOB, q=(0, 3, 8)),
        GQA_ROWS,
        "line 1: workload",
        "'total_q == qo_indptr[-1].item()' does not hold",
    ),
    "lfs": (write(BLOB, b"version https://git-lfs"), GQA_ROWS, "line 1: ", "Git LFS pointer"),
    "no blob": (write(BLOB, b"abc"), GQA_ROWS, "line 1: ", "is 3 bytes long"),
    "truncated": (cut(BLOB, 1), GQA_ROWS, "line 1: ", "is truncated: its tensors end"),
    "huge header": (write(BLOB, struct.pack("<Q", BIG)), GQA_ROWS, "line 1: ", f"be {BIG} bytes"),
    "cut header": (write(BLOB, struct.pack("<Q", 99)), GQA_ROWS, "line 1: ", "a header of 99"),
    "deep header": (
        write(BLOB, struct.pack("<Q", len(DEEP)) + DEEP),
        GQA_ROWS,
        "line 1: ",
        "its header is nested too deeply",
    ),
    "header list": (write(BLOB, header([])), GQA_ROWS, "line 1: ", "is a JSON list"),
    "header entry": (write(BLOB, header({"x": 1})), GQA_ROWS, "line 1: ", "x: no dtype"),
    "header dtype": (write(BLOB, tensors(dtype="Z")), GQA_ROWS, "line 1: ", "dtype 'Z'"),
    "header shape": (write(BLOB, tensors(shape=[-3])), GQA_ROWS, "line 1: ", "natural numbers"),
    "offsets": (write(BLOB, tensors(data_offsets=[0, 8])), GQA_ROWS, "line 1: ", "8 bytes are"),
    "overlap": (write(BLOB, tensors(data_offsets=[12, 24])), GQA_ROWS, "line 1: ", "overlap"),
    "more bytes": (write(BLOB, tensors() + b"\0" * 25), GQA_ROWS, "line 1: ", "has 1 bytes after"),
    # solutions and traces
    "solution of": (put(SOLUTION, "definition", value=GQA), SOLUTION, "definition", "but the path"),
    "author": (put(SOLUTION, "author", value="me"), SOLUTION, "author", "'me', but the path says"),
    "no spec": (put(SOLUTION, "spec", value=None), SOLUTION, "spec.entry_point", "missing"),
    "no sources": (put(SOLUTION, "sources", value=[1]), SOLUTION, "sources", "not a list of files"),
    "entry file": (
        put(SOLUTION, "spec", "entry_point", value="x.py::run"),
        SOLUTION,
        "spec.entry_point",
        "'x.py' is not among the sources",
    ),
    "entry function": (
        put(SOLUTION, "spec", "entry_point", value="main.py::walk"),
        SOLUTION,
        "spec.entry_point",
        "no function named walk",
    ),
    "destination": (
        put(SOLUTION, "spec", "destination_passing_style", value=True),
        SOLUTION,
        "spec.entry_point",
        "run cannot be called with the definition's 3 inputs and outputs",
    ),
    "solution syntax": (
        put(SOLUTION, "sources", value=[{"path": "main.py", "content": "def"}]),
        SOLUTION,
        "sources.0.content",
        "main.py: is not Python",
    ),
    "trace json": (write(TRACES, b"{"), TRACES, "line 1", "is not JSON"),
    "trace of": (put(TRACES, "definition", value=GQA), TRACES, "line 1: definition", "but the"),
    "trace row": (
        put(TRACES, "workload", "uuid", value="z"),
        TRACES,
        "line 1: workload.uuid",
        "'z' is no row of the workloads",
    ),
    "trace solution": (put(TRACES, "solution", value="z"), TRACES, "line 1: solution", "'z' is no"),
    "evaluation": (
        put(TRACES, "evaluation", value=0),
        TRACES,
        "line 1: evaluation.status",
        "missing, or not a string",
    ),
}
WARNINGS: dict[str, tuple[Callable[[Path], None], str, str, str]] = {
    "foreign": (write("definitions/x.txt", b""), "definitions/x.txt", "", "not part of"),
    "foreign folder": (write("reports/x.json", b""), "reports", "", "not part of"),
    "too deep": (write("blob/1/2/3/4/5/6/7/x", b""), "blob/1/2/3/4/5/6", "", "not part of"),
    "other's test": (
        write("tests/references/test_x.py", b""),
        "tests/references/test_x.py",
        "",
        "there is no such definition",
    ),
    "no test": (lambda root: (root / TEST).unlink(), TEST, "", "no reference test"),
    "description": (
        put(GEMM_FILE, "description", value=""),
        GEMM_FILE,
        "description",
        "missing description",
    ),
    "status": (put(GEMM_FILE, "tags", value=[]), GEMM_FILE, "tags", "one status: tag"),
    "api": (
        put(GQA_FILE, "tags", value=["status:verified"]),
        GQA_FILE,
        "tags",
        "no fi_api: tag",
    ),
    "no workloads": (
        lambda root: shutil.rmtree(root / "workloads/gqa_ragged"),
        GQA_FILE,
        "",
        "no workload file found",
    ),
    "no baseline": (lambda root: (root / SOLUTION).unlink(), GEMM_FILE, "", "no baseline solution"),
    "duplicate": (
        lambda root: write_rows(
            root / GQA_ROWS,
            gqa_row(),
            gqa_row() | {"workload": gqa_row()["workload"] | {"uuid": "two"}},
        ),
        GQA_ROWS,
        "line 2: workload",
        "the same as line 1",
    ),
    "memory": (
        put(GEMM_ROWS, "workload", "axes", "M", value=1 << 40),
        GEMM_ROWS,
        "line 1: workload.axes",
        "more than 288 GB",
    ),
    "failed": (
        put(TRACES, "evaluation", "status", value="INCORRECT_NUMERICAL"),
        TRACES,
        "evaluation.status",
        "evaluations are not PASSED: INCORRECT_NUMERICAL",
    ),
}


def said(findings: list[Any], file: str, field: str, message: str) -> bool:
    return any(
        found.file == file and found.field.startswith(field) and message in found.message
        for found in findings
    )


@pytest.mark.usefixtures("no_bench")
@pytest.mark.parametrize("damage", ERRORS)
def test_damage_is_an_error_that_names_file_and_field(root: Path, damage: str) -> None:
    harm, *expected = ERRORS[damage]
    harm(root)
    found = validate(root).errors
    assert said(found, *expected), found


@pytest.mark.usefixtures("no_bench")
@pytest.mark.parametrize("lack", WARNINGS)
def test_what_should_be_better_is_a_warning(root: Path, lack: str) -> None:
    change, *expected = WARNINGS[lack]
    assert not said(validate(root).warnings, *expected)
    change(root)
    found = validate(root)
    assert said(found.warnings, *expected), found.warnings


def test_mini_trace() -> None:
    found = validate(MINI)
    assert found.definitions == 156
    assert {e.definition for e in found.errors} == BIAS_OUT_OF_ORDER
    assert {(e.field, e.message[:9]) for e in found.errors} == {("reference", "run takes")}
    assert len(found.errors) == 4
    assert Counter(w.message for w in found.warnings) == {
        "missing description": 585,
        "no reference test": 156,
        "no baseline solution": 118,
        "no workload file found": 105,
        "no fi_api: tag": 3,
    }
    counts = found.checks["counts"]
    assert (counts["rows"], counts["solutions"], counts["evaluations"]) == (356, 4, 172)


def add_gemm(root: Path, name: str, module: str) -> str:
    """Add a definition whose reference's module begins with other text; return its file."""
    definition = json.loads((root / GEMM_FILE).read_text())
    reference = module + "\n" + definition["reference"]
    file = f"definitions/gemm/{name}.json"
    (root / file).write_text(json.dumps(definition | {"name": name, "reference": reference}))
    return file


@pytest.mark.bench_extra
def test_a_reference_that_does_not_build_is_an_error(root: Path, tmp_path: Path) -> None:
    modules = {
        "writes": (f"open({str(root / 'left')!r}, 'w')", "PermissionError"),
        "loops": ("while True: ...", "did not finish in 10 s"),
        "exits": ("import os; os._exit(0)", "ended with exit status 0 without an answer"),
        "raises": ("raise SystemExit", "SystemExit"),
        "connects": ("import socket; socket.socket()", "PermissionError"),
        "starts": ("import os; os.fork()", "PermissionError"),
        "imports": ("import nothing_such", "No module named 'nothing_such'"),
    }
    files = {name: add_gemm(root, name, module) for name, (module, _) in modules.items()}
    put(GQA_FILE, "reference", value="import torch\ndef run(A): ...\nrun = 1")(root)
    before = sorted(tmp_path.rglob("*"))
    found = validate(root)
    for name, (_, message) in modules.items():
        assert said(found.errors, files[name], "reference", "does not build: "), name
        assert said(found.errors, files[name], "reference", message), name
    assert said(found.errors, GQA_FILE, "reference", "does not build: defines no function named")
    assert {e.definition for e in found.errors} == {*modules, GQA}
    assert found.checks["reference_build"] == f"1 built, {len(modules) + 1} failed"
    assert sorted(tmp_path.rglob("*")) == before


FAKE_DATA = """
class Model:
    @staticmethod
    def model_validate_json(text): ...
Definition = Trace = Solution = Model
"""
FAKE_MAIN = """
import json, os, sys
from pathlib import Path
options = dict(zip(sys.argv[2::2], sys.argv[3::2]))
if "--disable-gpu" in sys.argv:
    options = dict(zip(sys.argv[2:8:2], sys.argv[3:8:2]))
definitions = {}
for file in Path(options["--dataset"]).glob("definitions/*/*.json"):
    messages = [{"level": "warning", "message": "seen by both"}]
    try:
        if "--disable-gpu" not in sys.argv:
            Path(os.environ["FIB_CACHE_PATH"], "cache").mkdir(exist_ok=True)
            Path.home().joinpath("at_home").touch()
            assert options["--checks"] == "layout,definition"
            exec(json.loads(file.read_text())["reference"], {})
    except Exception as error:
        messages.append({"level": "error", "message": f"{type(error).__name__}: {error}"})
    definitions[file.stem] = {"definition": {"messages": messages}}
folder = Path(options["--output-folder"])
folder.mkdir(parents=True)
(folder / "report.json").write_text(json.dumps({"definitions": definitions}))
"""


@pytest.fixture
def fake_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A FlashInfer-Bench whose `validate` runs modules without a jail; children import it."""
    package = tmp_path / "fake" / "flashinfer_bench"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(FAKE_MAIN)
    (package / "data" / "__init__.py").write_text(FAKE_DATA)
    (package / "data" / "validate.py").touch()
    monkeypatch.setattr(sandbox, "_ROOT", f"{package.parent}:{sandbox._ROOT}")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    return package


@pytest.mark.bench_extra
def test_flashinfer_bench_builds_confined_what_has_passed_the_jail(
    root: Path, tmp_path: Path, fake_bench: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    unjailed = "import os, socket\nif os.environ: "  # it is not fooled by the jail
    add_gemm(root, "writes", f"{unjailed}open({str(home / 'left')!r}, 'w')")
    add_gemm(root, "removes", f"{unjailed}os.unlink({str(root / GEMM_FILE)!r})")
    add_gemm(root, "connects", f"{unjailed}socket.socket()")
    add_gemm(root, "fails", "raise ValueError('in the jail')")
    before = sorted(tmp_path.rglob("*"))
    found = validate(root)
    assert {e.definition for e in found.errors} == {"writes", "removes", "connects", "fails"}
    for name in ("writes", "removes", "connects"):
        (error,) = (e for e in found.errors if e.definition == name)
        assert error.message.startswith("flashinfer-bench validate: PermissionError: "), error
    assert said(found.errors, "definitions/gemm/fails.json", "reference", "in the jail")
    assert sum("seen by both" in w.message for w in found.warnings) == 6
    done = found.checks["flashinfer_bench"]
    assert done["validate"] == "0 errors, 6 warnings"
    assert done["validate_build"] == "3 errors, 5 warnings"
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.bench_extra
@pytest.mark.parametrize("part", ["__main__.py", "data/validate.py"])
def test_a_flashinfer_bench_without_validate_is_a_note(
    root: Path, fake_bench: Path, part: str
) -> None:
    (fake_bench / part).unlink()
    found = validate(root)
    assert found.errors == []
    assert found.checks["flashinfer_bench"]["validate"] == "not there"
    assert found.checks["reference_build"] == "2 built, 0 failed"


@pytest.mark.bench_extra
def test_a_report_that_is_no_file_is_a_note(root: Path, fake_bench: Path) -> None:
    main = FAKE_MAIN.replace("(folder", "os.mkfifo(folder / 'a.json')\n(folder")
    (fake_bench / "__main__.py").write_text(main)
    done = validate(root).checks["flashinfer_bench"]
    assert done["validate"] == "failed: its report is not a regular file"


@pytest.mark.bench_extra
def test_models_see_what_our_checks_do_not(root: Path) -> None:
    put(GEMM_FILE, "axes", "N", "description", value=[1])(root)
    put(GQA_ROWS, "workload", "uuid", value=7)(root)
    put(SOLUTION, "spec", "language", value="cobol")(root)
    put(TRACES, "evaluation", "environment", value={})(root)
    found = validate(root)
    assert found.checks["flashinfer_bench"]["models"].startswith("applied to ")
    models = "flashinfer_bench.data."
    assert said(found.errors, GEMM_FILE, "axes.N", f"{models}Definition: Input should be")
    assert said(found.errors, SOLUTION, "spec.language", f"{models}Solution: Input should be")
    assert said(found.errors, TRACES, "line 1: evaluation.environment", f"{models}Trace: Field")
    # One error a place: what we have said of a row the model need not say again.
    assert [e.message for e in found.errors if e.file == GQA_ROWS] == ["missing, or not a string"]


def test_a_child_that_fails_is_a_note(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_MEMORY_GB", 0.01)
    found = validate(root)
    assert found.errors == []
    assert "not applied: the child process" in found.checks["flashinfer_bench"]["models"]
    assert "not run: the child process" in found.checks["reference_build"]


@pytest.mark.parametrize("package", ["torch", "pyseccomp"])
def test_references_that_cannot_be_built_are_a_note(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    (tmp_path / f"{package}.py").write_text("raise ImportError('not there')")
    monkeypatch.setattr(sandbox, "_ROOT", f"{tmp_path}:{sandbox._ROOT}")
    found = validate(root)
    assert found.errors == []
    assert found.checks["reference_build"].startswith("not run: ")


def test_findings_of_flashinfer_bench_are_merged_once() -> None:
    findings = Findings()
    findings.warn("d", "f", "axes.M", "missing description")
    messages = [
        {"level": "warning", "message": "missing description: axes.M"},
        {"level": "info", "message": "fine"},
        {"level": "error", "message": "bad"},
    ]
    checks = {"status": "error", "layout": None, "definition": {"messages": messages}}
    bench.merge(bench.UpstreamReport.model_validate({"definitions": {"d": checks}}), findings)
    assert len(findings.warnings) == 1
    assert said(findings.errors, "", "definition", "flashinfer-bench validate: bad")


@pytest.mark.usefixtures("no_bench")
def test_optional_inputs_may_be_absent(root: Path) -> None:
    put(GQA_FILE, "inputs", "v", "optional", value=True)(root)
    edit(GQA_ROWS, lambda value: value["workload"]["inputs"].pop("v"))(root)
    found = validate(root)
    assert found.errors == []
    assert said(found.warnings, GQA_ROWS, "line 1: workload.inputs.v", "random values")


@pytest.mark.usefixtures("no_bench")
def test_without_the_build_nothing_is_run_or_written(root: Path, tmp_path: Path) -> None:
    evil = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    source = json.loads((root / GEMM_FILE).read_text())["reference"]
    put(GEMM_FILE, "reference", value=evil + source)(root)
    put(GEMM_FILE, "constraints", value=[evil.strip()])(root)
    (root / TEST).write_text(evil)
    before = sorted(root.rglob("*"))
    validate(root)
    assert not (tmp_path / "ran").exists()
    assert sorted(root.rglob("*")) == before


@pytest.mark.usefixtures("no_bench")
def test_command(root: Path) -> None:
    run = CliRunner().invoke
    good = run(app, ["validate", "--dataset", str(root)])
    assert good.exit_code == 0
    assert "2 definitions, 2 without errors; 0 errors" in good.output
    assert f"{GEMM}:\n  warning: {GEMM_FILE}: axes.M, axes.N" in good.output
    (root / BLOB).unlink()
    bad = run(app, ["validate", "--dataset", str(root), "--json"])
    assert bad.exit_code == 1
    shown = json.loads(bad.output)
    assert shown["definitions"] == 2
    assert {"definition", "file", "field", "message"} == set(shown["errors"][0])
    one = run(app, ["validate", "--dataset", str(root), "--only", GEMM, "--json"])
    assert one.exit_code == 0
    assert json.loads(one.output)["definitions"] == 1


def test_what_is_no_dataset_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no definitions/ folder"):
        validate(tmp_path)
    with pytest.raises(InputError, match="no definition named nothing"):
        validate(root, ["nothing"])
    assert CliRunner().invoke(app, ["validate", "--dataset", str(tmp_path)]).exit_code == 2


def test_hostile_names_are_fit_to_print() -> None:
    findings = Findings()
    findings.error("d", "f", "", "\x1b[2J\nred\udc80" + "x" * 10_000)
    (line, _) = [*Report(1, findings.errors, [], {}).lines()][1:]
    assert line.isprintable()
    assert len(line) < 600


@pytest.mark.parametrize(
    ("constraint", "answer"),
    [
        ("a == b + 1", True),
        ("a % b == 1", True),
        ("x[-1].item() == a", True),
        ("x[0].item() > 0", False),
        ("x.shape[-1] == 2 * b", True),
        ("a // 0 == 1", None),
        ("y[-1].item() == a", None),
        ("a == b == 1", None),
        ("open('x')", None),
        ("len(x) == 1", None),
        ("x[5].item() == 1", None),
        ("x.shape[7] == 1", None),
        ("x in a", None),
    ],
)
def test_constraints(constraint: str, answer: bool | None) -> None:
    vector = (0, 1, 2, 3)

    def element(name: str, index: int) -> int | None:
        return vector[index] if name == "x" and -4 <= index < 4 else None

    shapes = {"x": (4,)}
    assert holds(constraint, {"a": 3, "b": 2}, shapes.get, element) is answer


@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "workload",
                        "axes",
                        "inputs",
                        "uuid",
                        "type",
                        "path",
                        "M",
                        "A",
                        "value",
                        "name",
                    ]
                ),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    )
)
def test_no_json_makes_it_fail(good: Path, tmp_path_factory: Any, value: Any) -> None:
    root = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(good, root, dirs_exist_ok=True)
    write_rows(
        root / GQA_ROWS,
        {"definition": GQA, "workload": value},
        {"workload": {"uuid": "a", "axes": value, "inputs": {"q": value}}},
    )
    write_rows(root / SOLUTION, {"spec": value, "sources": value})
    write_rows(root / TRACES, {"workload": value, "evaluation": value})
    write_rows(root / GQA_FILE.replace(GQA, "x"), {"name": value, "axes": value, "inputs": value})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "ask", lambda *_: {})
        assert validate(root).errors
    shutil.rmtree(root)
