"""Reading dumped FlashInfer calls: recorded ones, every kind of damage, and hostile files."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.collect.dumps import CallLog, DumpedCall, known_reads, pickled, read_calls
from tasks.collect.dumps.records import _parameters
from tasks.collect.dumps.tensors import SafetensorsFile
from tasks.ops.base import Call, DumpError
from tests.conftest import DATA

Json = dict[str, Any]
PLAN = "BatchDecodeWithPagedKVCacheWrapper.plan"
SIGNATURE = (
    "(self, indptr: torch.Tensor, indices: torch.Tensor, num_qo_heads: int = 32, "
    "*deprecated_positional_args: Any, window: Optional[int] = None) -> None"
)


def unpack(archive: str, folder: Path) -> Path:
    with tarfile.open(DATA / "dumps_h200" / f"{archive}.tar.xz") as packed:
        packed.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack("llama_calls", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack("graph_replays", tmp_path_factory.mktemp("graph"))


def record(**changes: Any) -> Json:
    """The last record of a dumped plan, as FlashInfer writes it."""
    return {
        "function_name": PLAN,
        "process_id": 7,
        "input_metadata": {"arg_0": {"type": "W", "repr": "<W at 0x1>"}, "arg_3": 8},
        "tensor_info": {"input_tensor_keys": ["arg_1", "arg_2"]},
        "tensor_details": {
            "arg_1": {"shape": [3], "dtype": "torch.int32"},
            "arg_2": {"shape": [4], "dtype": "torch.int32"},
        },
        "tensor_format": "safetensors",
        "function_signature": SIGNATURE,
        "versions": {"torch": "2.11.0", "flashinfer": "0.6.15"},
        "execution_status": "completed",
        "graph_capture": False,
        "self_id": 140195891080096,
    } | changes


ARRAYS = {"arg_1": np.array([0, 1, 4], np.int32), "arg_2": np.array([9, 8, 7, 6], np.int32)}


def safetensors_bytes(header: object, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def packed(arrays: dict[str, np.ndarray], codes: dict[str, str] | None = None) -> bytes:
    """A safetensors file, written without the library."""
    header, data = {}, b""
    for key, value in arrays.items():
        raw = value.tobytes()
        header[key] = {
            "dtype": (codes or {}).get(key, "I32"),
            "shape": list(value.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    return safetensors_bytes(header, data)


def dump(
    root: Path, metadata: Json | bytes | None = None, *, call: int = 1, stamp: str = "000"
) -> Path:
    """Write a dump folder whose record is the given one."""
    told = record() if metadata is None else metadata
    folder = root / f"20261120_180224_{stamp}_pid7_{PLAN}_call{call:04d}"
    folder.mkdir(parents=True)
    (folder / "inputs.safetensors").write_bytes(packed(ARRAYS))
    line = told if isinstance(told, bytes) else (json.dumps(told) + "\n").encode()
    (folder / "metadata.jsonl").write_bytes(line)
    return folder


def only(root: Path, **options: Any) -> DumpedCall:
    log = read_calls(root, **options)
    assert not log.unreadable
    (call,) = log.calls
    return call


def test_recorded_calls_satisfy_the_contract(llama: Path) -> None:
    log = read_calls(llama)
    calls: Sequence[Call] = log.calls
    assert len(calls) == 12
    assert not log.unreadable
    plan = next(c for c in calls if c.name == PLAN)
    assert plan.process == "llama:1293"
    assert plan.id.startswith("llama/2026")
    raw = json.loads((llama / plan.id / "metadata.jsonl").read_text().splitlines()[-1])
    assert plan.self_id == raw["self_id"]
    assert not plan.captured
    assert {k: plan.values[k] for k in ("num_qo_heads", "num_kv_heads", "head_dim")} == {
        "num_qo_heads": raw["input_metadata"]["arg_4"],
        "num_kv_heads": raw["input_metadata"]["arg_5"],
        "head_dim": raw["input_metadata"]["arg_6"],
    }
    assert "self" not in plan.values
    indptr = plan.tensors["indptr"]
    assert (indptr.dtype, indptr.shape) == ("int32", tuple(indptr.load().shape))
    norm = next(c for c in calls if c.name == "rmsnorm")
    assert norm.self_id is None
    assert norm.tensors["input"].dtype == "bfloat16"


def test_reading_needs_no_torch(llama: Path) -> None:
    from tasks import sandbox

    code = (
        "import sys; from pathlib import Path; from tasks.collect.dumps import read_calls; "
        f"[t for c in read_calls(Path({str(llama)!r})).calls for t in c.tensors]; "
        "sys.exit('torch' in sys.modules)"
    )
    assert sandbox.run_python(["-c", code], timeout=60, memory_gb=8, cwd=llama).ok


def test_data_is_that_of_the_file(llama: Path) -> None:
    from safetensors import safe_open

    compared = 0
    for call in read_calls(llama).calls:
        path = llama / call.id / "inputs.safetensors"
        if path.exists():
            with safe_open(path, "numpy") as stored:
                for tensor in call.tensors.values():
                    assert np.array_equal(tensor.load(), stored.get_tensor(tensor.key))
                    compared += 1
    assert compared > 15


@pytest.mark.parametrize(
    ("kind", "code", "name"),
    [
        (ml_dtypes.bfloat16, "BF16", "bfloat16"),
        (ml_dtypes.float8_e4m3fn, "F8_E4M3", "float8_e4m3fn"),
        (ml_dtypes.float8_e5m2, "F8_E5M2", "float8_e5m2"),
        (np.float32, "F32", "float32"),
        (np.bool_, "BOOL", "bool"),
        (np.int64, "I64", "int64"),
    ],
)
@pytest.mark.parametrize("shape", [(), (0,), (2, 3), (1000, 5)])
def test_every_data_type_comes_back(
    tmp_path: Path, kind: Any, code: str, name: str, shape: tuple[int, ...]
) -> None:
    values = (np.arange(np.prod(shape, dtype=int)) % 7).astype(kind).reshape(shape)
    path = tmp_path / "inputs.safetensors"
    path.write_bytes(packed({"before": ARRAYS["arg_1"], "x": values}, {"x": code}))
    loaded = SafetensorsFile(str(path)).load("x", shape, name)
    assert loaded.dtype == values.dtype
    assert loaded.tobytes() == values.tobytes()
    assert loaded.shape == shape


def test_names_of_parameters(tmp_path: Path) -> None:
    details = {"shape": [1], "dtype": "torch.bfloat16"}
    keys = ["arg_1", "arg_2__0", "arg_2__key_0", "arg_9", "kwarg_window__2__value_0", "kwarg_w"]
    changed = record(
        tensor_info={"input_tensor_keys": keys}, tensor_details=dict.fromkeys(keys, details)
    )
    dump(tmp_path, changed)
    assert sorted(only(tmp_path).tensors) == sorted(
        ["indptr", "indices__0", "indices__key_0", "arg_9", "window__2__value_0", "w"]
    )


@pytest.mark.parametrize(
    ("signature", "names"),
    [
        (SIGNATURE, ("self", "indptr", "indices", "num_qo_heads")),
        ("(a, /, b, *, c) -> Tuple[int, int]", ("a", "b")),
        ("()", ()),
        ("(a: Union[int, Tuple[int, int]] = (1, 2), b: str = 'x, (y', **kwargs)", ("a", "b")),
        # Defaults that are no Python, from FlashInfer's MoE and quantisation.
        (
            "(x: int = <WeightLayout.MajorK: 0>, y: Optional[int] = <unset, read (A)*>, z=None)",
            ("x", "y", "z"),
        ),
    ],
)
def test_positional_parameters(signature: str, names: tuple[str, ...]) -> None:
    assert _parameters(signature) == names


def test_order_is_that_of_the_calls(tmp_path: Path) -> None:
    """A plan and a run of one millisecond: their numbers count per function."""
    run = PLAN.replace(".plan", ".run")
    for stamp, name, call in [
        *(("005", run, 64), ("005", PLAN, 17), ("004", run, 9999), ("004", run, 10000)),
        ("003", "rmsnorm", 3),
    ]:
        folder = tmp_path / f"20261120_180224_{stamp}_pid7_{name}_call{call:04d}"
        folder.mkdir()
        (folder / "metadata.jsonl").write_text(json.dumps(record(function_name=name)))
    assert [call.id[16:] for call in read_calls(tmp_path).calls] == [
        "003_pid7_rmsnorm_call0003",
        f"004_pid7_{run}_call9999",
        f"004_pid7_{run}_call10000",
        f"005_pid7_{PLAN}_call0017",
        f"005_pid7_{run}_call0064",
    ]


def test_unfinished_calls_count_only_where_kernels_cannot_run(tmp_path: Path) -> None:
    dump(tmp_path, record(execution_status="inputs_saved"))
    assert read_calls(tmp_path).unreadable == {"the call did not complete (inputs_saved)": 1}
    assert only(tmp_path, incomplete=True).tensors["indices"].load().tolist() == [9, 8, 7, 6]


def test_the_last_line_counts(tmp_path: Path) -> None:
    folder = dump(tmp_path, record(execution_status="inputs_saved"))
    with (folder / "metadata.jsonl").open("a") as lines:
        lines.write(json.dumps(record()) + "\n\n")
    assert only(tmp_path).name == PLAN


def test_replays_of_a_captured_call_are_calls(graph: Path) -> None:
    """Seen on an H200: what returns no tensor stays `inputs_saved` (here `fused_add_rmsnorm`)."""
    log = read_calls(graph)
    captured = [call for call in log.calls if call.captured]
    assert [(c.name, c.id.rpartition("/")[2]) for c in captured] == [
        *[("rmsnorm", f"flush_000{n}") for n in (1, 2, 3)],
        *[("fused_add_rmsnorm", f"flush_000{n}") for n in (1, 2, 3)],
    ]
    assert [c.name for c in log.calls if not c.captured] == [PLAN]
    assert log.unreadable == {
        "the call was captured into a CUDA graph and no replay of it was dumped": 1
    }
    contents = {c.tensors["input"].load().tobytes() for c in captured if c.name == "rmsnorm"}
    assert len(contents) == 3
    assert all("/graph_flushes/flush_" in c.id for c in captured)
    assert {c.process for c in captured} == {"graph:1726"}


def test_replays_without_their_call(graph: Path, tmp_path: Path) -> None:
    """FlashInfer makes a deleted folder anew at the next replay, without what the call was."""
    shutil.copytree(graph, tmp_path / "d")
    (root,) = (tmp_path / "d").rglob("*_rmsnorm_call0006")
    (root / "metadata.jsonl").unlink()
    (root / "graph_flushes" / "flush_0001" / "metadata.jsonl").write_text(
        '{"execution_status": "inputs_saved", "graph_capture_flushed": true}\n'
    )
    before, after = read_calls(graph), read_calls(tmp_path / "d")
    assert len(after.calls) == len(before.calls) - 1
    assert after.unreadable - before.unreadable == {
        "metadata.jsonl cannot be read (not there)": 1,
        "metadata.jsonl is not of the expected form": 1,
    }


FORM = "not of the expected form"
RECORDS: dict[str, tuple[Json | bytes, str]] = {
    "empty": (b"", "truncated"),
    "blank": (b"\n\n", "truncated"),
    "half a line": (json.dumps(record()).encode()[:300], "truncated"),
    "half a second line": (json.dumps(record()).encode() + b'\n{"function_na', "truncated"),
    "no object": (b"[1, 2]", FORM),
    "number": (b"1e999", FORM),
    "another object": (b'{"a": 1}', FORM),
    "latin-1": ('{"a": "\xe9"}'.encode("latin-1"), "not UTF-8"),
    "deep": (b"[" * 100_000, "truncated"),
    "long number": (b'{"a": ' + b"9" * 5000 + b"}", "truncated"),
    "gigantic": (b'{"a": "' + b"x" * (1 << 21) + b'"}', "too large"),
    "key twice": (json.dumps(record()).encode()[:-1] + b', "self_id": 3}', "a key twice"),
    "lone surrogate": (record(input_metadata={"arg_3": "\ud800"}), FORM),
    "other function": (record(function_name="rmsnorm"), "another call"),
    "other process": (record(process_id=8), "another call"),
    "process is text": (record(process_id="7"), "another call"),
    "status is a list": (record(execution_status=["completed"]), "unknown status"),
    "failed": (record(execution_status="failed"), "unknown status"),
    "captured is text": (record(graph_capture="yes"), FORM),
    "captured": (record(graph_capture=True), "captured into a CUDA graph"),
    "signature": (record(function_signature="(a, ((b)"), "cannot be parsed"),
    "signature quotes": (record(function_signature="(a='x)"), "cannot be parsed"),
    "signature missing": (record(function_signature="<unavailable>"), "cannot be parsed"),
    "signature is a number": (record(function_signature=3), FORM),
    "self_id negative": (record(self_id=-1), "self_id"),
    "self_id huge": (record(self_id=1 << 70), "self_id"),
    "self_id text": (record(self_id="140195"), "self_id"),
    "self_id true": (record(self_id=True), "self_id"),
    "format": (record(tensor_format="numpy"), "neither safetensors nor torch"),
    "versions": (record(versions=["torch"]), FORM),
    "versions nested": (record(versions={"torch": [1]}), FORM),
    "no details": (record(tensor_details={}), FORM),
    "keys are a number": (record(tensor_info={"input_tensor_keys": 3}), FORM),
    "keys are numbers": (record(tensor_info={"input_tensor_keys": [3]}), FORM),
    "values are a list": (record(input_metadata=[1]), FORM),
    "value of no argument": (record(input_metadata={"../x": 1}), FORM),
    "value of a long name": (record(input_metadata={"kwarg_" + "x" * 999: 1}), FORM),
    "one parameter twice": (record(input_metadata={"kwarg_indptr": 1}), "for one parameter"),
}


@pytest.mark.parametrize("kind", RECORDS)
def test_damaged_record_is_a_counted_reason(tmp_path: Path, kind: str) -> None:
    metadata, reason = RECORDS[kind]
    dump(tmp_path, metadata)
    dump(tmp_path, call=2)
    log = read_calls(tmp_path)
    assert len(log.calls) == 1
    assert [count for text, count in log.unreadable.items() if reason in text] == [1]


@pytest.mark.parametrize(
    ("detail", "reason"),
    [
        ({"shape": [-1], "dtype": "torch.int32"}, "shape is impossible"),
        ({"shape": [1 << 60], "dtype": "torch.int32"}, "shape is impossible"),
        ({"shape": [1 << 30, 1 << 30], "dtype": "torch.int32"}, "shape is impossible"),
        ({"shape": [1.5], "dtype": "torch.int32"}, "shape is impossible"),
        ({"shape": [True], "dtype": "torch.int32"}, "shape is impossible"),
        ({"shape": [1] * 99, "dtype": "torch.int32"}, "shape is impossible"),
        ({"shape": [[1]], "dtype": "torch.int32"}, "shape is impossible"),
        ({"shape": None, "dtype": "torch.int32"}, FORM),
        ({"shape": [3], "dtype": "int32"}, "not one of torch's"),
        ({"shape": [3], "dtype": 32}, FORM),
        ([], FORM),
    ],
)
def test_impossible_tensor_is_a_counted_reason(tmp_path: Path, detail: Any, reason: str) -> None:
    details = record()["tensor_details"] | {"arg_1": detail}
    dump(tmp_path, record(tensor_details=details))
    log = read_calls(tmp_path)
    assert not log.calls
    assert reason in str(dict(log.unreadable))


def entry(**changes: Any) -> Json:
    return {"dtype": "I32", "shape": [3], "data_offsets": [0, 12]} | changes


GOOD = safetensors_bytes({"arg_1": entry()}, ARRAYS["arg_1"].tobytes())
FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "truncated"),
    "no header": (GOOD[:40], "truncated"),
    "no data": (GOOD[:-1], "truncated"),
    "header length": (b"\xff" * 8 + GOOD[8:], "truncated"),
    "no json": (struct.pack("<Q", 4) + b"nope", "header is damaged"),
    "a list": (safetensors_bytes([1], b""), "header is damaged"),
    "deep": (struct.pack("<Q", 50_000) + b"[" * 50_000, "header is damaged"),
    "other tensors": (safetensors_bytes({"arg_7": entry()}, bytes(12)), "not in the file"),
    "offsets backwards": (
        safetensors_bytes({"arg_1": entry(data_offsets=[12, 0])}, bytes(12)),
        "damaged",
    ),
    "offsets negative": (
        safetensors_bytes({"arg_1": entry(data_offsets=[-12, 0])}, bytes(12)),
        "damaged",
    ),
    "offsets beyond": (
        safetensors_bytes({"arg_1": entry(data_offsets=[4, 16])}, bytes(12)),
        "truncated",
    ),
    "offsets text": (safetensors_bytes({"arg_1": entry(data_offsets="0")}, bytes(12)), "damaged"),
    "too few bytes": (
        safetensors_bytes({"arg_1": entry(data_offsets=[0, 8])}, bytes(12)),
        "damaged",
    ),
    "unknown type": (safetensors_bytes({"arg_1": entry(dtype="I3")}, bytes(12)), "not known"),
    "other type": (safetensors_bytes({"arg_1": entry(dtype="F32")}, bytes(12)), "float32"),
    "other shape": (safetensors_bytes({"arg_1": entry(shape=[1, 3])}, bytes(12)), r"\(1, 3\)"),
    "negative shape": (safetensors_bytes({"arg_1": entry(shape=[-3])}, bytes(12)), "damaged"),
}


@pytest.mark.parametrize("kind", FILES)
def test_damaged_tensor_file_is_a_reason_of_its_call(tmp_path: Path, kind: str) -> None:
    data, reason = FILES[kind]
    (dump(tmp_path) / "inputs.safetensors").write_bytes(data)
    with pytest.raises(DumpError, match=f"arg_1 cannot be read .*{reason}"):
        only(tmp_path).tensors["indptr"].load()


def test_missing_tensor_file_is_a_reason_of_its_call(tmp_path: Path) -> None:
    (dump(tmp_path) / "inputs.safetensors").unlink()
    with pytest.raises(DumpError, match="No such file"):
        only(tmp_path).tensors["indptr"].load()


def _link(path: Path) -> None:
    elsewhere = path.parent.parent / ("." + path.name)
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def test_links_and_pipes_are_not_followed(tmp_path: Path) -> None:
    for name in ("metadata", "tensors", "pipe", "folder"):
        dump(tmp_path, call=len(name))
    metadata, tensors, pipe, folder = (
        tmp_path / f"20261120_180224_000_pid7_{PLAN}_call{len(name):04d}"
        for name in ("metadata", "tensors", "pipe", "folder")
    )
    _link(metadata / "metadata.jsonl")
    _link(tensors / "inputs.safetensors")
    (pipe / "metadata.jsonl").unlink()
    os.mkfifo(pipe / "metadata.jsonl")
    _link(folder)
    (tmp_path / "up").symlink_to("/")
    log = read_calls(tmp_path)
    assert log.unreadable == {"a symbolic link": 3, "not a regular file": 1}
    with pytest.raises(DumpError, match="a symbolic link"):
        log.calls[0].tensors["indptr"].load()


def test_what_is_no_dump_is_counted(tmp_path: Path) -> None:
    dump(tmp_path / "session" / "rank")
    for name in ("readme.txt", "session.jsonl", "server.log"):
        (tmp_path / name).write_text("x")
    (tmp_path / "2026_rmsnorm_call0001").mkdir()
    (tmp_path / "..._call1").mkdir()
    (tmp_path / os.fsdecode(b"\xff")).mkdir()
    (tmp_path / "/".join("abcdefghijkl")).mkdir(parents=True)
    log = read_calls(tmp_path)
    assert len(log.calls) == 1
    assert log.unreadable == {
        "not a dump of FlashInfer's (a foreign file)": 2,
        "the folder's name is not that of a dump": 1,
        "a name that is not text": 1,
        "folders too deep within each other": 1,
    }


def test_a_copied_folder_is_one_call(graph: Path, tmp_path: Path) -> None:
    """Of eager calls and of replays; what is left of the folders does not matter."""
    shutil.copytree(graph, tmp_path / "dumps")
    whole = read_calls(tmp_path / "dumps")
    assert any("flush" in call.id for call in whole.calls)
    for place in ("dumps/zz/copy", "dumps/copy of dumps"):
        shutil.copytree(graph, tmp_path / place)
    log = read_calls(tmp_path / "dumps")
    kept = [call.id.rpartition("graph/2")[2] for call in log.calls]
    assert kept == [call.id.rpartition("graph/2")[2] for call in whole.calls]
    (copies,) = [count for reason, count in log.unreadable.items() if "copy of a call" in reason]
    assert copies == 2 * len(whole.calls)


def test_ranks_may_have_folders_of_the_same_name(tmp_path: Path) -> None:
    """Processes in containers may have the same id, and call at the same time."""
    for rank in ("0", "1", "backup/0", "backup/1"):
        told = record(self_id=int(rank[-1]), dump_dir=f"dumps/{rank[-1]}")
        dump(tmp_path / rank, told)
    log = read_calls(tmp_path)
    assert sorted(call.self_id or 0 for call in log.calls) == [0, 1]
    assert list(log.unreadable.values()) == [2]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


def check_log(root: Path) -> CallLog:
    """Read whatever is there; what comes back can be printed and stored."""
    log = read_calls(root)
    for call in log.calls:
        json.dumps([call.id, call.values, call.versions], ensure_ascii=False).encode()
        for tensor in call.tensors.values():
            with suppress(DumpError):
                assert tensor.load().shape == tensor.shape
    return log


def _fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@settings(max_examples=60)
@given(st.sampled_from(sorted(record())), JSON)
def test_any_value_in_a_record_is_a_call_or_a_reason(
    tmp_path_factory: pytest.TempPathFactory, key: str, value: Any
) -> None:
    root = _fresh(tmp_path_factory)
    dump(root, record(**{key: value}))
    log = check_log(root)
    assert len(log.calls) + sum(log.unreadable.values()) == 1


@settings(max_examples=60)
@given(st.sampled_from(["metadata.jsonl", "inputs.safetensors"]), st.data())
def test_any_damaged_bytes_are_a_call_or_a_reason(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    root = _fresh(tmp_path_factory)
    path = dump(root) / name
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(0, len(content) - 1))
        content[where] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    log = check_log(root)
    assert len(log.calls) + sum(log.unreadable.values()) == 1


READS = {PLAN: ["indptr", "indices"]}


class _Evil:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.trace}",)


def _zip_pickle(path: Path, content: object) -> None:
    """What torch.save writes, but with any pickle in it."""
    stream = io.BytesIO()
    pickle.dump(content, stream, protocol=2)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", stream.getvalue())
        archive.writestr("archive/version", "3\n")


@pytest.mark.bench_extra
def test_torch_dumps_are_read_in_one_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    base = torch.arange(20, dtype=torch.int32)
    good = {"arg_1": base[:3], "arg_2": base[::5], "kwarg_kv": torch.ones(4)}

    def former(content: object) -> bytes:
        """One pickle and no archive."""
        stream = io.BytesIO()
        torch.save(content, stream, _use_new_zipfile_serialization=False)
        return stream.getvalue()

    contents: list[tuple[object, str]] = [
        (good, ""),
        (b"no archive", "cannot be read"),
        (_Evil(tmp_path / "owned"), "cannot be read"),
        (former(good), ""),
        (former(good)[:-8], "cannot be read"),
        (former(_Evil(tmp_path / "owned")), "cannot be read"),
        ([1], "no tensors by name"),
        ({"arg_1": good["arg_1"]}, "no tensor arg_2"),
        (good | {"arg_2": base[:9]}, "another shape or dtype"),
        (good | {"arg_2": base[::5].long()}, "another shape or dtype"),
        (good, ""),
    ]
    for number, (content, _) in enumerate(contents):
        folder = dump(tmp_path / "d", record(tensor_format="torch"), call=number + 1)
        (folder / "inputs.safetensors").unlink()
        if isinstance(content, bytes):
            (folder / "inputs.pt").write_bytes(content)
        elif isinstance(content, _Evil):
            _zip_pickle(folder / "inputs.pt", content)
        else:
            torch.save(content, folder / "inputs.pt")
    runs = []
    run_python = pickled.sandbox.run_python
    monkeypatch.setattr(
        pickled.sandbox, "run_python", lambda *a, **k: runs.append(a) or run_python(*a, **k)
    )
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(pickled.tempfile, "tempdir", str(temporary))
    log = read_calls(tmp_path / "d", reads=READS)
    assert (len(log.calls), runs) == (len(contents), [])
    for call, (_, reason) in zip(log.calls, contents, strict=True):
        if reason:
            with pytest.raises(DumpError, match=reason):
                call.tensors["indices"].load()
        else:
            assert call.tensors["indices"].load().tolist() == [0, 5, 10, 15]
            assert call.tensors["indptr"].load().tolist() == [0, 1, 2]
    assert len(runs) == 1
    assert not (tmp_path / "owned").exists()
    assert list(temporary.iterdir())
    del log, call
    assert not list(temporary.iterdir())


def torch_dump(root: Path, call: int = 1) -> Path:
    folder = dump(root, record(tensor_format="torch"), call=call)
    (folder / "inputs.pt").write_bytes(b"x")
    return folder


def test_torch_dumps_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch_dump(tmp_path)
    monkeypatch.setattr(pickled.importlib.util, "find_spec", lambda name: None)
    call = only(tmp_path, reads=READS)
    assert call.tensors["indices"].shape == (4,)
    with pytest.raises(DumpError, match="torch, which is not installed"):
        call.tensors["indices"].load()


def replace_reader(monkeypatch: pytest.MonkeyPatch, dies_at: str) -> None:
    """Replace the child that reads torch dumps: no file at hand crashes torch."""

    def read_until(arguments: Sequence[str], **options: Any) -> pickled.sandbox.Outcome:
        folder = Path(arguments[-1])
        for request in json.loads((folder / "requests.json").read_text()):
            if dies_at in request["path"]:
                return pickled.sandbox.Outcome(False, "killed by SIGSEGV")
            (folder / request["out"]).write_bytes(packed(ARRAYS))
            with (folder / pickled.RESULTS).open("a") as results:
                results.write('""\n')
        return pickled.sandbox.Outcome(True, "")

    monkeypatch.setattr(pickled.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(pickled.sandbox, "run_python", read_until)


def test_a_torch_dump_that_kills_its_reader_costs_only_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2, 3):
        torch_dump(tmp_path, number)
    replace_reader(monkeypatch, dies_at="call0002")
    first, second, third = (c.tensors["indices"] for c in read_calls(tmp_path, reads=READS).calls)
    assert third.load().tolist() == first.load().tolist() == [9, 8, 7, 6]
    with pytest.raises(DumpError, match="its reader died"):
        second.load()


def test_tensors_that_no_row_needs_are_not_converted(tmp_path: Path) -> None:
    torch_dump(tmp_path)
    with pytest.raises(DumpError, match="no row needs it"):
        only(tmp_path, reads={}).tensors["indices"].load()


def test_what_op_modules_read_is_known_by_dumped_name() -> None:
    from tasks import ops

    reads = known_reads()
    for module in ops.registry().values():
        for api in module.apis:
            for name in api.dumps:
                assert set(api.reads) <= set(reads[name])
