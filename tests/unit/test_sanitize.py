"""Rows checked, chosen and written, and `onboard sanitize`, on dumps whose truth is known."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file
from typer.testing import CliRunner, Result

from flows.cli import app
from tasks import files
from tasks.collect import rows as rows_module
from tasks.collect.dumps import CallLog, read_calls
from tasks.collect.live import served_calls
from tasks.collect.phase import collect_calls
from tasks.collect.realism import Extent
from tasks.collect.rows import Form, find, form_of, uuid_of
from tasks.collect.sanitize import open_calls, sanitize, table
from tasks.collect.select import LISTED_CALLS, Candidate, most_diverse
from tasks.collect.session import Session, Traffic
from tasks.collect.store import CallStore
from tasks.collect.targets import ModelKernels, NoTarget, Target, implied, targets
from tasks.collect.write import write_workloads
from tasks.dataset import DefinitionFiles
from tasks.errors import CollectError, InputError
from tasks.manifest import KernelEntry
from tasks.model import parse_config, read_config
from tasks.ops.base import DumpError, KernelSpec, Rejected, Row, Scalar
from tests.bench.synthetic import DECODE, DEFINITIONS, PREFILL, Dumps, digest, write_dumps
from tests.conftest import DATA

CONFIG = DATA / "configs" / "meta-llama--Meta-Llama-3.1-8B.json"
PUBLISHED = DATA / "mini-trace" / "definitions"
LIMIT = 1000


def definition(**changes: Any) -> dict[str, Any]:
    """A definition with an input of every kind."""
    return {
        "name": "thing_n4",
        "op_type": "thing",
        "axes": {
            "batch_size": {"type": "var"},
            "len_indptr": {"type": "var"},
            "n": {"type": "const", "value": 4},
        },
        "constraints": ["len_indptr == batch_size + 1", "batch_size < indptr[-1].item()"],
        "inputs": {
            "x": {"shape": ["batch_size", "n"], "dtype": "bfloat16"},
            "indptr": {"shape": ["len_indptr"], "dtype": "int32"},
            "bias": {"shape": ["n"], "dtype": "bfloat16"},
            "scale": {"shape": None, "dtype": "float32"},
            "k": {"shape": None, "dtype": "int32"},
            "flag": {"shape": None, "dtype": "bool"},
        },
        "outputs": {"y": {"shape": ["batch_size"], "dtype": "float32"}},
        "reference": "def run(): ...",
        **changes,
    }


FORM = form_of(definition(), "test")


def scalars(**values: float) -> dict[str, Scalar]:
    given = {"scale": 0.5, "k": 3, "flag": True, **values}
    return {name: Scalar(value=value, source="test") for name, value in given.items()}


def row(*, axes: Mapping[str, int] | None = None, tensors: Any = None, **given: Any) -> Row:
    return Row(
        axes=axes or {"batch_size": 2, "len_indptr": 3},
        tensors=tensors or {"indptr": np.array([0, 1, 3], dtype=np.int32)},
        scalars=scalars(**given),
        calls=("call",),
    )


def ints(*values: int, dtype: Any = np.int32) -> dict[str, np.ndarray]:
    return {"indptr": np.array(values, dtype=dtype)}


def test_a_good_row_stays_as_it_is() -> None:
    checked = FORM.check(row())
    assert (checked.axes, checked.scalars, checked.calls) == (row().axes, scalars(), ("call",))
    bias = np.zeros(4, dtype=ml_dtypes.bfloat16)
    assert FORM.check(row(tensors={**ints(0, 1, 3), "bias": bias})).tensors["bias"] is bias


def test_scalars_keep_their_type() -> None:
    checked = FORM.check(row(scale=2))
    assert {name: type(scalar.value) for name, scalar in checked.scalars.items()} == {
        "scale": float,
        "k": int,
        "flag": bool,
    }


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (row(axes={"batch_size": 2}), "rows have the axes ['batch_size'], the definition"),
        (row(axes={"batch_size": 2, "len_indptr": 3, "n": 4}), "rows have the axes"),
        (row(axes={"batch_size": 0, "len_indptr": 1}), "axis batch_size is 0, no positive"),
        (row(axes={"batch_size": -2, "len_indptr": 3}), "axis batch_size is -2"),
        (row(axes={"batch_size": 1 << 63, "len_indptr": 3}), "no positive integer"),
        (row(axes={"batch_size": True, "len_indptr": 2}), "axis batch_size is True"),
        (row(axes={"batch_size": 3, "len_indptr": 3}), "does not hold: 3 == 4"),
        (row(tensors=ints(0, 1, 2)), "'batch_size < indptr[-1].item()' does not hold: 2 < 2"),
        (row(tensors=ints(0, 1, 3, 5)), "indptr has shape [4], the definition says [3]"),
        (row(tensors=ints(0, 1, 3, dtype=np.int64)), "indptr is int64, the definition says int32"),
        (row(tensors={"x": np.zeros((2, 4))}), "x is float64, the definition says bfloat16"),
        (
            row(tensors={"bias": np.zeros(4, ml_dtypes.bfloat16)}),
            "input indptr (int32) has no recorded value, neither in the dump nor from a model",
        ),
        (replace(row(), scalars={}), "input scale (float32) has no recorded value"),
        (row(other=3), "the definition has no inputs ['other']"),
        (row(scale=float("nan")), "scalar scale is nan, no float32"),
        (row(scale=float("-inf")), "scalar scale is -inf"),
        (row(scale=1e300), "scalar scale is 1e+300, no float32"),
        (row(scale=10**400), "scalar scale is 1000"),
        (row(scale=True), "scalar scale is True, no float32"),
        (row(k=3.0), "scalar k is 3.0, no int32"),
        (row(k=1 << 31), "scalar k is 2147483648, no int32"),
        (row(k=True), "scalar k is True"),
        (row(flag=1), "scalar flag is 1, no bool"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_what_is_no_row_of_the_definition(bad: Row, reason: str) -> None:
    with pytest.raises(DumpError) as caught:
        FORM.check(bad)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"axes": {"n": {"type": "const"}}}, "const axis n has no value"),
        ({"axes": {}}, "unknown axes"),
        ({"axes": 3}, "field axes"),
        ({"inputs": {"x": {"shape": "n", "dtype": "int32"}}}, "field inputs.x.shape"),
        ({"inputs": None}, "field inputs"),
        ({"reference": None}, "field reference"),
        ({"name": 3}, "field name"),
    ],
)
def test_what_is_no_definition(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(CollectError, match=f"here: .*{problem}"):
        form_of(definition(**changes), "here")


def test_content_is_what_the_kernel_gets() -> None:
    """A scalar counts as the float32 that it becomes, a tensor by its bits, a call not at all."""
    first = uuid_of(FORM, row(scale=1 / 128**0.5))
    assert first == uuid_of(FORM, row(scale=float(np.float32(1 / 128**0.5))))
    assert first == uuid_of(FORM, replace(row(scale=1 / 128**0.5), calls=("other",)))
    others = [row(scale=0.0884), row(k=4, scale=1 / 128**0.5), row(tensors=ints(0, 1, 4))]
    zeros = [np.zeros(4, dtype) for dtype in (ml_dtypes.bfloat16, np.float16)]
    others += [row(tensors={**ints(0, 1, 3), "bias": values}) for values in zeros]
    assert len({first, *(uuid_of(FORM, other) for other in others)}) == 6


def candidate(number: int, axes: Mapping[str, int], batch_size: int) -> Candidate:
    return Candidate(
        uuid=str(number),
        axes=axes,
        scalars={},
        stored=(),
        extent=Extent(batch_size),
        remake=lambda: Row(axes=axes),
        calls=[f"call {number}"],
    )


def sized(sizes: Sequence[tuple[int, int, int]]) -> list[Candidate]:
    return [
        candidate(i, {"batch_size": b, "kv": kv, "num_pages": pages}, b)
        for i, (b, kv, pages) in enumerate(sizes)
    ]


SIZES = st.lists(
    st.tuples(st.integers(1, 12), st.integers(1, 9999), st.integers(1, 9999)),
    min_size=1,
    max_size=60,
)


@given(SIZES, st.integers(1, 30))
def test_every_batch_size_is_represented_as_far_as_there_is_room(
    sizes: list[tuple[int, int, int]], limit: int
) -> None:
    candidates = sized(sizes)
    chosen = most_diverse(candidates, ("batch_size", "kv"), limit)
    assert len(chosen) == min(limit, len(candidates))
    assert [int(c.uuid) for c in chosen] == sorted({int(c.uuid) for c in chosen})
    everything = {b for b, _, _ in sizes}
    assert len({c.axes["batch_size"] for c in chosen}) == min(limit, len(everything))
    # The largest is always among them.
    largest = max(np.log2(1 + b) + np.log2(1 + kv) for b, kv, _ in sizes)
    kept = [np.log2(1 + c.axes["batch_size"]) + np.log2(1 + c.axes["kv"]) for c in chosen]
    assert np.isclose(max(kept), largest)


@given(SIZES, st.integers(1, 30), st.randoms(use_true_random=False))
def test_where_data_lay_does_not_count(
    sizes: list[tuple[int, int, int]], limit: int, chance: Any
) -> None:
    moved = [(b, kv, chance.randint(1, 9999)) for b, kv, _ in sizes]
    chosen = [
        [c.uuid for c in most_diverse(sized(each), ("batch_size", "kv"), limit)]
        for each in (sizes, moved)
    ]
    assert chosen[0] == chosen[1]


def test_the_rest_is_spread_out() -> None:
    # One batch size, KV lengths in three clusters: one of each is kept.
    sizes = [(4, kv, 1) for kv in (10, 11, 12, 500, 510, 520, 9000, 9001)]
    chosen = most_diverse(sized(sizes), ("batch_size", "kv"), 3)
    assert [len(str(c.axes["kv"])) for c in chosen] == [2, 3, 4]
    # No axis that says how much: any, but not more.
    assert len(most_diverse(sized(sizes), (), 3)) == 3


def test_batch_sizes_that_were_kept_up_come_before_those_that_were_passed_through() -> None:
    """A busy server's batches grow to the size that was asked for, and shrink at the end."""
    passed = [(size, 100 + size, 1) for size in range(1, 129)]
    kept_up = [(size, 1000 + step, 1) for size in (1, 8, 32, 64, 128) for step in range(40)]
    chosen = most_diverse(sized([*passed, *kept_up]), ("batch_size", "kv"), 20)
    sizes = [c.extent.batch_size for c in chosen]
    assert {1, 8, 32, 64, 128} <= set(sizes)
    assert len(set(sizes)) == 20


def test_the_reject_table_is_bounded() -> None:
    reasons = Counter({f"{n} is not {n + 1}": 1 for n in range(500)}) + Counter({"often": 7})
    shown = table(reasons)
    assert len(shown) == 51
    assert next(iter(shown.items())) == ("often", 7)
    assert shown["other reasons"] == 451
    assert sum(shown.values()) == 507


# What follows is on dumps whose truth is known.


@pytest.fixture(scope="session")
def dumped(tmp_path_factory: pytest.TempPathFactory) -> Dumps:
    return write_dumps(tmp_path_factory.mktemp("synthetic"), 260)


@pytest.fixture(scope="session")
def synthetic(dumped: Dumps) -> CallLog:
    return read_calls(dumped.root)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A dataset with the published definitions of the synthetic calls, and some others."""
    wanted = ("gqa_paged", "rmsnorm", "sampling", "gemm")
    for path in sorted(PUBLISHED.glob("*/*.json")):
        if path.parent.name in wanted and ("h32_kv8" in path.name or path.parent.name != wanted[0]):
            files.write_bytes(
                tmp_path / "definitions" / path.parent.name / path.name, path.read_bytes()
            )
    return tmp_path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["sanitize", *map(str, arguments)])


def as_json(result: Result) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def workloads(dataset: Path, name: str) -> list[dict[str, Any]]:
    (path,) = dataset.glob(f"workloads/*/{name}.jsonl")
    return [json.loads(line)["workload"] for line in path.read_text().splitlines()]


def found_in(dataset: Path, name: str) -> list[tuple[Any, ...]]:
    """Return a definition's rows as `Dumps.truth` has them."""
    order = ("qo_indptr", "kv_indptr", "kv_indices")
    found = []
    for workload in workloads(dataset, name):
        inputs, hashes = workload["inputs"], []
        for key in order:
            if key in inputs:
                with safe_open(dataset / inputs[key]["path"], "numpy") as blob:
                    hashes.append(digest(blob.get_tensor(inputs[key]["tensor_key"])))
        found.append((tuple(sorted(workload["axes"].items())), *hashes))
    return found


def collect(dumped: Dumps, dataset: Path, *more: object) -> Result:
    where = ("--dump-dir", dumped.root, "--dataset", dataset, "--model-config", CONFIG)
    return run(*where, "--json", *more)


def test_every_true_workload_is_found_and_none_twice(dumped: Dumps, dataset: Path) -> None:
    result = collect(dumped, dataset, "--max-workloads", LIMIT)
    assert result.exit_code == 0, result.output
    assert dumped.truth.keys() == set(DEFINITIONS.values())
    for name, truth in dumped.truth.items():
        found = found_in(dataset, name)
        assert set(found) == truth
        assert len(found) == len(truth)
    told = {item["definition"]: item for item in as_json(result)["definitions"]}
    decode = told[DEFINITIONS[DECODE]]
    plans = [f for f in dumped.root.iterdir() if f"{DECODE}.plan" in f.name]
    assert (decode["calls"], decode["kept"], decode["rejected"]) == (
        len(plans),
        len(dumped.truth[DEFINITIONS[DECODE]]),
        {},
    )
    scale = decode["provenance"]["scalars"]["sm_scale"]
    assert (round(scale["value"], 12), "head_dim" in scale["source"]) == (0.088388347648, True)
    # Definitions of other sizes are listed, with the numbers.
    assert told["rmsnorm_h512"]["kept"] == 0
    assert list(told["rmsnorm_h512"]["rejected"]) == [
        "rmsnorm: hidden_size is 4096, the definition has 512"
    ]
    assert not [name for name in told if name.startswith("gemm")]


def test_rows_that_are_there_stay_whatever_is_chosen(dumped: Dumps, dataset: Path) -> None:
    name = DEFINITIONS[DECODE]

    def kept(limit: int, *more: object) -> list[str]:
        assert collect(dumped, dataset, "--max-workloads", limit, *more).exit_code == 0
        return [workload["uuid"] for workload in workloads(dataset, name)]

    first = kept(7)
    assert len(first) == 7
    assert kept(2)[:7] == first
    everything = kept(LIMIT)
    assert set(first) < set(everything)
    assert kept(2) == everything
    assert len(kept(2, "--replace")) == 2


def test_rows_are_the_same_every_time(dumped: Dumps, dataset: Path) -> None:
    assert collect(dumped, dataset, "--max-workloads", 5).exit_code == 0
    first = tree(dataset)
    result = collect(dumped, dataset, "--max-workloads", 5)
    assert tree(dataset) == first
    assert {item.get("added", 0) for item in as_json(result)["definitions"]} == {0}
    assert collect(dumped, dataset, "--max-workloads", 5, "--replace").exit_code == 0
    assert tree(dataset) == first
    blobs = {p.name for p in dataset.glob("blob/**/*.safetensors")}
    named = {
        Path(given["path"]).name
        for name in DEFINITIONS.values()
        for workload in workloads(dataset, name)
        for given in workload["inputs"].values()
        if given["type"] == "safetensors"
    }
    assert blobs == named
    # Other rows join those that are there, and --replace drops them.
    assert collect(dumped, dataset, "--max-workloads", 8).exit_code == 0
    more = {row["uuid"] for row in workloads(dataset, DEFINITIONS[DECODE])}
    assert more > {json.loads(line)["workload"]["uuid"] for line in _lines(first, DECODE)}
    assert collect(dumped, dataset, "--max-workloads", 5, "--replace").exit_code == 0
    assert tree(dataset) == first


def _lines(files_there: Mapping[str, bytes], kernel: str) -> list[bytes]:
    path = f"workloads/gqa_paged/{DEFINITIONS[kernel]}.jsonl"
    return files_there[path].splitlines()


def test_a_drained_store_gives_the_same_rows(
    dumped: Dumps, synthetic: CallLog, dataset: Path, tmp_path: Path
) -> None:
    assert collect(dumped, dataset).exit_code == 0
    first = tree(dataset)
    for folder in ("workloads", "blob"):
        files_there = sorted((dataset / folder).rglob("*"), reverse=True)
        for path in files_there:
            path.rmdir() if path.is_dir() else path.unlink()
    session = tmp_path / "session"
    with CallStore(session / "calls.sqlite") as store:
        store.add(synthetic.calls)
    result = run("--dump-dir", session, "--dataset", dataset, "--model-config", CONFIG)
    assert result.exit_code == 0, result.output
    for path in session.iterdir():
        path.unlink()
    assert tree(dataset) == first


def test_scalars_that_nobody_states_reject_the_rows(dumped: Dumps, dataset: Path) -> None:
    name = DEFINITIONS[DECODE]
    result = run("--dump-dir", dumped.root, "--dataset", dataset, "--definitions", name)
    assert result.exit_code == 1
    assert "neither in the dump nor from a model config" in result.output
    assert not (dataset / "workloads").exists()
    # A model without such a kernel states nothing either.
    assert "(give --model-config)" in result.output
    config = DATA / "configs" / "Qwen--Qwen3-30B-A3B.json"
    where = ("--dump-dir", dumped.root, "--dataset", dataset)
    other = run(*where, "--definitions", name, "--model-config", config)
    assert other.exit_code == 1
    assert f"nor from a model config ({config} has no such kernel)" in other.output
    assert "give --model-config" not in other.output
    # That is advice for the rest too, but for kernels that the model has.
    norm = run(*where, "--definitions", "rmsnorm_h512", "--model-config", config, "--json")
    assert "has no such kernel" not in norm.output


def test_a_folder_without_calls_is_named(dataset: Path, tmp_path: Path) -> None:
    """It is said what was expected, and what was found."""
    folder = tmp_path / "dumps"
    folder.mkdir()
    result = run("--dump-dir", folder, "--dataset", dataset)
    assert result.exit_code == 2
    assert f"{folder}: no dumped call was found (it is empty); expected" in result.output
    assert "_call0001 with metadata.jsonl in it" in result.output
    for number in range(7):
        (folder / f"other{number}" / "empty").mkdir(parents=True)
    shown = "other0, other1, other2, other3, other4, ..."
    result = run("--dump-dir", folder, "--dataset", dataset)
    assert f"no dumped call was found (only {shown}); expected" in result.output


def test_a_store_that_is_none_is_named(dataset: Path, tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "session", tmp_path / "elsewhere.sqlite"
    folder.mkdir()
    store = folder / "calls.sqlite"
    store.touch()
    result = run("--dump-dir", folder, "--dataset", dataset)
    assert (result.exit_code, store.stat().st_size) == (2, 0)
    assert f"{store}: is empty: the session that made it drained no call" in result.output
    CallStore(elsewhere).close()
    content = elsewhere.read_bytes()
    for target in (elsewhere, tmp_path / "nowhere"):
        store.unlink()
        store.symlink_to(target)
        result = run("--dump-dir", folder, "--dataset", dataset)
        assert result.exit_code == 1
        assert f"{store}: a symbolic link; give the folder" in result.output
    assert elsewhere.read_bytes() == content
    assert not (tmp_path / "nowhere").exists()
    store.unlink()
    store.write_bytes(content[: len(content) // 2])
    result = run("--dump-dir", folder, "--dataset", dataset)
    assert result.exit_code == 1
    assert str(store) in result.output
    assert "Traceback" not in result.output


def test_table_for_people(dumped: Dumps, dataset: Path) -> None:
    where = ("--dump-dir", dumped.root, "--dataset", dataset, "--model-config", CONFIG)
    result = run(*where, "--max-workloads", 3)
    assert result.exit_code == 0
    (line,) = [line for line in result.stdout.splitlines() if f" {DEFINITIONS[DECODE]} " in line]
    distinct = str(len(dumped.truth[DEFINITIONS[DECODE]]))
    assert line.split() == [DEFINITIONS[DECODE], distinct, distinct, "3", "3", "0"]
    # Definitions that the calls are not of share a line, unless they were asked for.
    for kernel in ("rmsnorm", "fused_add_rmsnorm"):
        others = f" x {kernel}: hidden_size is 4096, the definitions have others"
        (line,) = [line for line in result.stdout.splitlines() if others in line]
        assert re.match(r"rmsnorm, \d+ definitions: 0 rows \(", line)
    assert "rmsnorm_h512" not in result.stdout
    named = run(*where, "--definitions", "rmsnorm_h512,rmsnorm_h128")
    assert "rmsnorm_h512: 0 rows (" in named.stdout
    assert "rmsnorm_h128: 0 rows (" in named.stdout
    assert f"{dumped.written} calls; 15 rows kept for 5 of " in result.stdout


WRONG: dict[str, tuple[Callable[[Path], list[object]], str]] = {
    "no dumps": (lambda p: ["--dump-dir", p / "no", "--dataset", p], "--dump-dir: .* is no folder"),
    "no dataset": (lambda p: ["--dump-dir", p, "--dataset", p / "no"], "--dataset: .* no folder"),
    "no definitions": (
        lambda p: ["--dump-dir", p, "--dataset", p / "definitions"],
        "has no definitions/ folder",
    ),
    "unknown name": (
        lambda p: ["--dump-dir", p, "--dataset", p, "--definitions", "rmsnorm_h4096,nope"],
        "no definition named nope",
    ),
    "empty name": (
        lambda p: ["--dump-dir", p, "--dataset", p, "--definitions", ","],
        "names no definition",
    ),
    "both": (
        lambda p: [
            *("--dump-dir", p, "--dataset", p),
            *("--definitions", "a", "--derive-definitions"),
        ],
        "not both",
    ),
    "no slug": (
        lambda p: ["--dump-dir", p, "--dataset", p, "--derive-definitions"],
        "--model-name: missing",
    ),
    "bad slug": (
        lambda p: [
            *("--dump-dir", p, "--dataset", p),
            *("--derive-definitions", "--model-name", "../x"),
        ],
        "--model-name: '../x' is not a valid name",
    ),
    "no config": (
        lambda p: ["--dump-dir", p, "--dataset", p, "--model-config", p / "none.json"],
        "none.json",
    ),
    "no rows wanted": (
        lambda p: ["--dump-dir", p, "--dataset", p, "--max-workloads", 0],
        "max-workloads",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_input(dataset: Path, kind: str) -> None:
    arguments, message = WRONG[kind]
    before = tree(dataset)
    result = run(*arguments(dataset))
    assert result.exit_code == 2, result.output
    assert re.search(message, result.output), result.output
    assert tree(dataset) == before


def test_nothing_heavy_is_imported(dumped: Dumps, dataset: Path) -> None:
    code = (
        "import sys\nfrom flows.cli import app\n"
        "try: app(sys.argv[1:])\nexcept SystemExit as end: assert end.code == 0, end.code\n"
        "heavy = {'prefect', 'torch', 'matplotlib', 'pydantic_settings'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    where = ["--dump-dir", dumped.root, "--dataset", dataset, "--model-config", CONFIG]
    command = [sys.executable, "-c", code, "sanitize", *map(str, where)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_damaged_definitions_do_not_stop_the_others(dumped: Dumps, dataset: Path) -> None:
    folder = dataset / "definitions" / "rmsnorm"
    (folder / "rmsnorm_h5120.json").write_text("{nope")
    moved = json.loads((folder / "rmsnorm_h512.json").read_text())
    (folder / "rmsnorm_h7.json").write_text(json.dumps(moved))
    (folder / "strange.json").write_text(json.dumps({**moved, "name": "strange"}))
    (folder / "link.json").symlink_to(folder / "rmsnorm_h512.json")
    result = collect(dumped, dataset)
    assert result.exit_code == 1
    errors = {d["definition"]: d["error"] for d in as_json(result)["definitions"] if "error" in d}
    assert errors.keys() == {"rmsnorm_h5120", "rmsnorm_h7", "strange"}
    assert "is not JSON" in errors["rmsnorm_h5120"]
    assert "its path says rmsnorm/rmsnorm_h7" in errors["rmsnorm_h7"]
    assert "not a name of op type 'rmsnorm'" in errors["strange"]
    result = collect(dumped, dataset, "--definitions", "rmsnorm_h5120", "--definitions", "strange")
    assert result.exit_code == 1


def test_a_kernel_without_a_call_says_so(dataset: Path) -> None:
    (name, *_) = sorted(path.stem for path in (dataset / "definitions" / "gemm").iterdir())
    (found,) = targets(dataset, [name], (), None)
    assert isinstance(found, NoTarget)
    assert "has no FlashInfer call to collect" in found.error


def test_scalars_come_from_the_model_at_any_parallelism(dataset: Path) -> None:
    model = ModelKernels(read_config(CONFIG))
    (found,) = targets(dataset, [DEFINITIONS[DECODE]], (), model)
    assert isinstance(found, Target)
    assert found.spec.tp == (1,)
    assert found.spec.scalars["sm_scale"].value == pytest.approx(128**-0.5)
    sharded = found.spec.model_copy(
        update={
            "name": "gqa_paged_decode_h8_kv2_d128_ps64",
            "axes": {**found.spec.axes, "num_qo_heads": 8, "num_kv_heads": 2, "page_size": 64},
        }
    )
    like = model.like(sharded)
    assert like is not None
    assert (like.tp, like.scalars.keys()) == ((4,), {"sm_scale"})


def test_scalars_in_which_kernels_of_one_name_differ_are_left_out() -> None:
    class Twice(ModelKernels):
        def _required(self, module: Any, pages: Any) -> Any:
            for value in (0.1, 0.2):
                scale = {"sm_scale": Scalar(value=value, source="a layer")}
                more = {"k": Scalar(value=1, source="both")}
                yield KernelSpec(
                    name="n", op_type="rmsnorm", variant="", axes={}, scalars={**scale, **more}
                )

    model = Twice(parse_config(json.loads(CONFIG.read_text()), "config.json"))
    like = model.like(KernelSpec(name="n", op_type="rmsnorm", variant="", axes={}))
    assert like is not None
    assert set(like.scalars) == {"k"}


@pytest.mark.bench_extra
def test_definitions_that_calls_imply_are_written_proved_and_collected_for(
    own_dumps: Path, tmp_path: Path
) -> None:
    dataset = tmp_path / "dataset"
    dataset.mkdir()
    arguments = ("--dump-dir", own_dumps, "--dataset", dataset, "--derive-definitions", "--json")
    result = run(*arguments, "--model-name", "qwen3-30b-a3b")
    assert result.exit_code == 0, result.output
    derived = {item["definition_name"]: item for item in as_json(result)["derived"]}
    assert derived.keys() == {"fused_add_rmsnorm_h2048", "rmsnorm_h2048"}
    assert all(item["state"] == "defined" and item["proof"] for item in derived.values())
    made = json.loads((dataset / "definitions/rmsnorm/rmsnorm_h2048.json").read_text())
    assert {"model:qwen3-30b-a3b", "fi_api:flashinfer.norm.rmsnorm"} <= set(made["tags"])
    assert (dataset / "tests/references/test_rmsnorm_h2048.py").exists()
    assert len(workloads(dataset, "rmsnorm_h2048")) == 1
    # They are there now: nothing is derived again, and the same rows are found.
    before = tree(dataset)
    result = run(*arguments, "--model-name", "other")
    assert (result.exit_code, as_json(result)["derived"]) == (0, [])
    assert tree(dataset) == before


def test_a_definition_that_would_have_no_rows_is_not_derived(dumped: Dumps, tmp_path: Path) -> None:
    calls = [call for call in read_calls(dumped.root).calls if f"{DECODE}.plan" in call.name]
    (without,) = implied(calls, tmp_path, None)
    assert without.spec.name == DEFINITIONS[DECODE]
    assert list(without.rejected.values()) == [len(calls)]
    assert "from a model config" in next(iter(without.rejected))
    (known,) = implied(calls, tmp_path, ModelKernels(read_config(CONFIG)))
    assert (known.rejected, known.spec.tp) == ({}, (1,))


# Writing.


class Thing:
    """An op module whose rows are given."""

    placement: frozenset[str] = frozenset()

    def __init__(self, *given: Row | Rejected) -> None:
        self.given = given

    def rows(self, spec: KernelSpec, calls: Sequence[Any]) -> Any:
        return iter(self.given)


SPEC = KernelSpec(name="thing_n4", op_type="thing", variant="", axes={"n": 4})
PLACE = DefinitionFiles("thing", "thing_n4")


def candidates(monkeypatch: pytest.MonkeyPatch, *given: Row | Rejected) -> list[Candidate]:
    monkeypatch.setattr(rows_module.ops, "op_module", lambda op_type: Thing(*given))
    return find(SPEC, FORM, CallLog()).candidates


def test_ranks_and_repetitions_merge_and_no_tensor_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def remade() -> Row:
        made.append(1)
        return row()

    many = [replace(row(), calls=(f"call {n}",), remake=remade) for n in range(LISTED_CALLS + 30)]
    refused = [Rejected("x", "too odd"), Rejected("y", "too odd")]
    zero = row(axes={"batch_size": 0, "len_indptr": 1})
    monkeypatch.setattr(rows_module.ops, "op_module", lambda _: Thing(*many, *refused, zero))
    found = find(SPEC, FORM, CallLog())
    (only,) = found.candidates
    assert (found.calls, only.count) == (LISTED_CALLS + 30, LISTED_CALLS + 30)
    assert only.calls == [f"call {n}" for n in range(LISTED_CALLS)]
    assert found.rejected == {"too odd": 2, "axis batch_size is 0, no positive integer": 1}
    assert not any(isinstance(getattr(only, name), np.ndarray) for name in only.__slots__)
    assert not made
    assert only.remake().tensors["indptr"].tolist() == [0, 1, 3]


def test_every_kind_of_tensor_is_written_bit_by_bit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Every second element: not contiguous in memory.
    bias = np.arange(8).astype(ml_dtypes.bfloat16)[::2]
    chosen = candidates(monkeypatch, row(tensors={**ints(0, 1, 3), "bias": bias}))
    written = write_workloads(tmp_path, definition(), chosen)
    assert (written.rows, written.added, written.changed) == (1, 1, True)
    (path,) = tmp_path.glob("blob/**/*.safetensors")
    with safe_open(path, "numpy") as blob:
        assert blob.get_slice("bias").get_dtype() == "BF16"
        assert blob.get_tensor("bias").tolist() == [0, 2, 4, 6]
        assert blob.get_tensor("indptr").tolist() == [0, 1, 3]
    (workload,) = workloads(tmp_path, "thing_n4")
    assert workload["inputs"] == {
        "x": {"type": "random"},
        **{
            name: {
                "type": "safetensors",
                "path": f"./{PLACE.blob(chosen[0].uuid)}",
                "tensor_key": name,
            }
            for name in ("indptr", "bias")
        },
        "scale": {"type": "scalar", "value": 0.5},
        "k": {"type": "scalar", "value": 3},
        "flag": {"type": "scalar", "value": True},
    }


def foreign(dataset: Path, uuid: str, offsets: Sequence[int], **changes: Any) -> None:
    """Add a row as FlashInfer-Bench writes them: its blob is called otherwise."""
    blob = dataset / PLACE.blobs / f"thing_n4_{uuid.replace('-', '')}.safetensors"
    blob.parent.mkdir(parents=True, exist_ok=True)
    save_file({"p": np.array(offsets, dtype=np.int32)}, blob)
    where = {"path": f"./{PLACE.blobs / blob.name}", "tensor_key": "p"}
    inputs = {
        "x": {"type": "random"},
        "indptr": {"type": "safetensors", **where},
        "bias": {"type": "random"},
        "scale": {"type": "scalar", "value": 0.5},
        "k": {"type": "scalar", "value": 3},
        "flag": {"type": "scalar", "value": True},
        **changes,
    }
    axes = {"len_indptr": len(offsets), "batch_size": len(offsets) - 1}
    line = {"definition": "thing_n4", "workload": {"uuid": uuid, "axes": axes, "inputs": inputs}}
    path = dataset / PLACE.workloads
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        stream.write(json.dumps(line) + "\n")


OTHER = "081bfbea-34fb-478e-8dee-24856affe5b8"


def test_a_row_of_another_tool_is_the_same_by_its_content(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    foreign(tmp_path, OTHER, [0, 1, 3])
    traces = tmp_path / PLACE.traces
    files.write_text(traces, "{}\n")
    before = tree(tmp_path)
    same, other = candidates(monkeypatch, row(), row(tensors=ints(0, 2, 3)))
    written = write_workloads(tmp_path, definition(), [same])
    assert (written.uuids, written.added, written.changed) == ({same.uuid: OTHER}, 0, False)
    assert tree(tmp_path) == before
    # Another one joins it; the traces were of other rows.
    written = write_workloads(tmp_path, definition(), [same, other])
    assert (written.rows, written.added, written.changed) == (2, 1, True)
    assert not traces.exists()
    assert [w["uuid"] for w in workloads(tmp_path, "thing_n4")] == [OTHER, other.uuid]
    assert len(list((tmp_path / PLACE.blobs).iterdir())) == 2
    # Replaced, it is ours.
    written = write_workloads(tmp_path, definition(), [same], replace=True)
    assert [w["uuid"] for w in workloads(tmp_path, "thing_n4")] == [same.uuid]
    assert [p.name for p in (tmp_path / PLACE.blobs).iterdir()] == [PLACE.blob(same.uuid).name]


UNREADABLE: dict[str, Callable[[Path], object]] = {
    "gone": lambda blob: blob.unlink(),
    "empty": lambda blob: blob.write_bytes(b""),
    "pointer": lambda blob: blob.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
    "truncated": lambda blob: blob.write_bytes(blob.read_bytes()[:-1]),
    "other key": lambda blob: save_file({"q": np.zeros(3, np.int32)}, blob),
    "link": lambda blob: (blob.rename(blob.with_name("x")), blob.symlink_to(blob.with_name("x"))),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_rows_with_unreadable_blobs_stay(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    foreign(tmp_path, OTHER, [0, 1, 3])
    (blob,) = (tmp_path / PLACE.blobs).iterdir()
    UNREADABLE[kind](blob)
    line = (tmp_path / PLACE.workloads).read_text()
    (same,) = candidates(monkeypatch, row())
    written = write_workloads(tmp_path, definition(), [same])
    assert written.uuids == {same.uuid: same.uuid}
    assert (tmp_path / PLACE.workloads).read_text().startswith(line)
    assert blob.is_symlink() == (kind == "link")
    assert blob.exists() == (kind not in ("gone", "link"))


@pytest.mark.parametrize(
    "path", ["../../x.safetensors", "/etc/passwd", f"./{PLACE.blobs}/../x", "x.safetensors"]
)
def test_blobs_elsewhere_are_not_opened(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str
) -> None:
    outside = {"type": "safetensors", "path": path, "tensor_key": "p"}
    foreign(tmp_path, OTHER, [0, 1, 3], indptr=outside)
    monkeypatch.setattr("tasks.collect.write.deserialize", lambda data: pytest.fail("was opened"))
    (same,) = candidates(monkeypatch, row())
    assert write_workloads(tmp_path, definition(), [same]).rows == 2


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{nope", "line 2: Invalid JSON"),
        ("[]", "line 2: Input should be an object"),
        ('{"workload": {"uuid": 3, "axes": {}, "inputs": {}}}', "line 2: workload.uuid"),
        ('{"workload": {"uuid": "x", "axes": {}, "inputs": {"a": 3}}}', "workload.inputs.a"),
    ],
)
def test_a_damaged_row_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: str, problem: str
) -> None:
    foreign(tmp_path, OTHER, [0, 1, 3])
    with (tmp_path / PLACE.workloads).open("a") as stream:
        stream.write(line + "\n")
    before = tree(tmp_path)
    chosen = candidates(monkeypatch, row(tensors=ints(0, 2, 3)))
    with pytest.raises(CollectError, match=problem):
        write_workloads(tmp_path, definition(), chosen)
    assert tree(tmp_path) == before


class KilledError(BaseException):
    pass


def test_killed_between_blobs_and_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whenever it ends, every row has its blob; the next run removes what is left over."""
    first, second = candidates(monkeypatch, row(), row(tensors=ints(0, 2, 3)))
    write_workloads(tmp_path, definition(), [first])
    files.write_text(tmp_path / PLACE.traces, "{}\n")
    before = (tmp_path / PLACE.workloads).read_bytes()

    def killed(*_: Any) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_text", killed)
        with pytest.raises(KilledError):
            write_workloads(tmp_path, definition(), [second], replace=True)
    assert (tmp_path / PLACE.workloads).read_bytes() == before
    assert (tmp_path / PLACE.blob(first.uuid)).exists()
    assert not (tmp_path / PLACE.traces).exists()
    write_workloads(tmp_path, definition(), [second], replace=True)
    assert [p.name for p in (tmp_path / PLACE.blobs).iterdir()] == [PLACE.blob(second.uuid).name]


def test_a_lost_blob_of_ours_is_written_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    chosen = candidates(monkeypatch, row())
    write_workloads(tmp_path, definition(), chosen)
    before = tree(tmp_path)
    (tmp_path / PLACE.blob(chosen[0].uuid)).unlink()
    assert not write_workloads(tmp_path, definition(), chosen).changed
    assert tree(tmp_path) == before


def test_dumps_that_change_meanwhile_are_no_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def gone() -> Row:
        raise DumpError("tensor indptr cannot be read")

    for remake in (lambda: row(tensors=ints(0, 2, 3)), gone):
        chosen = candidates(monkeypatch, replace(row(), remake=remake))
        with pytest.raises(CollectError, match="thing_n4: the dump of call call changed"):
            write_workloads(tmp_path, definition(), chosen)
    assert tree(tmp_path) == {}


def test_links_out_of_the_dataset_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    dataset, outside = tmp_path / "dataset", tmp_path / "outside"
    outside.mkdir()
    (dataset / "blob").mkdir(parents=True)
    (dataset / "blob" / "workloads").symlink_to(outside)
    with pytest.raises(InputError, match="leads out of"):
        write_workloads(dataset, definition(), candidates(monkeypatch, row()))
    assert tree(outside) == {}


# For a run.


def entry_of(name: str, scalars: Mapping[str, Scalar]) -> KernelEntry:
    source = next(PUBLISHED.glob(f"*/{name}.json"))
    axes = json.loads(source.read_text())["axes"]
    spec = KernelSpec(
        name=name,
        op_type=source.parent.name,
        variant="decode",
        axes={a: each["value"] for a, each in axes.items() if each["type"] == "const"},
        tp=(1,),
        scalars=dict(scalars),
    )
    described = spec.model_dump(mode="json")
    return KernelEntry(
        definition_name=name, op_type=spec.op_type, phase1_status="new", spec=described
    )


def test_provenance_says_what_rows_were_made_of(
    dumped: Dumps, synthetic: CallLog, dataset: Path, tmp_path: Path
) -> None:
    name = DEFINITIONS[DECODE]
    entry = entry_of(name, {"sm_scale": Scalar(value=0.125, source="a test")})
    session = Session(
        id="decode-tp1",
        model="meta-llama/Llama-3.1-8B",
        tp=1,
        tp_choices=(1,),
        ep=1,
        page_size=1,
        mode="decode",
        flags=("--attention-backend", "flashinfer"),
        env={},
        record=(f"{DECODE}.plan",),
        expects={name: (f"{DECODE}.plan",)},
        traffic=Traffic(),
    )
    path = tmp_path / "provenance.json"
    collected = collect_calls(entry, synthetic, dataset, path, 4, sessions=[session])
    told = json.loads(path.read_text())
    provenance = told["provenance"]
    assert provenance["sessions"][0]["id"] == "decode-tp1"
    assert provenance["sessions"][0]["model"] == "meta-llama/Llama-3.1-8B"
    assert (provenance["tp"], provenance["versions"]["flashinfer"]) == ([1], ["0.6.15.post1"])
    assert provenance["scalars"]["sm_scale"] == {"value": 0.125, "source": "a test"}
    assert (told["rows"], told["distinct"]) == (4, len(dumped.truth[name]))
    rows = workloads(dataset, name)
    assert [row["uuid"] for row in rows] == list(provenance["workloads"])
    for seen in provenance["workloads"].values():
        assert seen["count"] == 1
        (call,) = [call for call in seen["calls"] if ".plan_" in call]
        assert (dumped.root / call).is_dir()
    assert provenance["realism"]["kept"]["rows"] == 4
    assert list((dataset / "solutions" / "baseline" / "gqa_paged" / name).iterdir())
    again = collect_calls(entry, open_calls(dumped.root), dataset, tmp_path / "second.json", 4)
    assert again.provenance["workloads"] == collected.provenance["workloads"]
    assert again.provenance["sessions"] == []


def test_nothing_to_collect_from(dataset: Path, tmp_path: Path) -> None:
    entry = entry_of(DEFINITIONS[DECODE], {})
    with pytest.raises(CollectError, match="no calls to collect from.* --dumps.* --skip-workload"):
        served_calls(tmp_path, entry.definition_name)
    with pytest.raises(CollectError, match="its API was never called; APIs seen: none"):
        collect_calls(entry, CallLog(), dataset, tmp_path / "p.json", 4)
    assert not (tmp_path / "p.json").exists()


def test_kernels_are_told_apart_by_what_they_attend_to(synthetic: CallLog, dumped: Dumps) -> None:
    """Decode plans are no prefill rows, and the other way round."""
    for kernel, variant in ((DECODE, "decode"), (PREFILL, "prefill")):
        name = DEFINITIONS[kernel]
        spec = entry_of(name, {"sm_scale": Scalar(value=0.1, source="")}).spec
        path = next(PUBLISHED.glob(f"*/{name}.json"))
        given = json.loads(path.read_text())
        of = KernelSpec.model_validate({**(spec or {}), "variant": variant})
        _, collected = sanitize(of, given, synthetic, LIMIT)
        assert collected.distinct == len(dumped.truth[name])
        assert isinstance(form_of(given, name), Form)
