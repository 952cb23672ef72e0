"""Baselines pass on every workload, or the reason is told; flashinfer-bench is a stub here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flows.cli import app
from tasks.collect import evaluate as evaluation
from tasks.collect.baseline import write_baseline
from tasks.collect.evaluate import Effort, evaluate, evaluate_all
from tasks.collect.lease import lease
from tasks.dataset import DefinitionFiles
from tasks.errors import CollectError, DefinitionError, InputError
from tests.conftest import DATA

MINI = DATA / "mini-trace"
ONE, TWO = "gemm_n4096_k4096", "gemm_n6144_k4096"
NORM = "rmsnorm_h4096"
Json = dict[str, Any]

STUB = '''\
"""Writes traces as flashinfer-bench 0.1.2 does, of what script.json says; records its calls."""
import argparse, json, os, pathlib, sys, time

HERE = pathlib.Path(__file__).resolve().parents[2]
BAD = {"RUNTIME_ERROR": "Traceback (most recent call last):\\n  x\\nRuntimeError: no kernel\\n"}


def trace(row, solution, status):
    line = json.loads((HERE / "line.json").read_text())
    found = line["evaluation"]
    found["status"] = status
    if status != "PASSED":
        del found["performance"]
    if status == "INCORRECT_NUMERICAL":
        found["correctness"] = {"max_relative_error": "NaN", "max_absolute_error": 12.5}
    elif status != "PASSED":
        del found["correctness"]
        found["log"] = BAD.get(status, "")
    line |= {"definition": row["definition"], "workload": row["workload"], "solution": solution}
    return json.dumps(line)


def cli():
    parser = argparse.ArgumentParser()
    run = parser.add_subparsers(required=True).add_parser("run")
    run.add_argument("--local", type=pathlib.Path)
    run.add_argument("--timeout", type=int)
    for option in ("--warmup-runs", "--iterations", "--num-trials"):
        run.add_argument(option)
    run.add_argument("--definitions", nargs="+")
    args = parser.parse_args()
    files = sorted(str(p.relative_to(args.local)) for p in args.local.rglob("*") if p.is_file())
    with (HERE / "calls.jsonl").open("a") as calls:
        times = [args.warmup_runs, args.iterations, args.num_trials]
        call = [args.definitions, args.timeout, files, dict(os.environ), times]
        calls.write(json.dumps(call) + "\\n")
    script = json.loads((HERE / "script.json").read_text())
    seen = set()
    for path in sorted(args.local.glob("solutions/*/*/*/*.json")):
        name = json.loads(path.read_text())["name"]
        if name in seen:
            raise ValueError(f"Duplicate solution name: {name}")
        seen.add(name)
    for name in args.definitions:
        [path] = args.local.glob(f"workloads/*/{name}.jsonl")
        [solution] = args.local.glob(f"solutions/baseline/*/{name}/*.json")
        lines = []
        for index, text in enumerate(path.read_text().splitlines()):
            row = json.loads(text)
            act = script.get(name, {}).get(str(index), "PASSED")
            if act == "drop":
                uuid = row["workload"]["uuid"]
                print(f"ERROR worker failed while running reference workload={uuid}: no memory")
                print(f"ERROR Failed to run workload {uuid}: No healthy workers")
            elif act == "silent":
                pass
            elif act == "crash" or (act == "crash if shared" and len(args.definitions) > 1):
                sys.exit("CUDA error: an illegal memory access was encountered")
            elif act == "hang":
                if os.fork() == 0:
                    (HERE / "pid").write_text(str(os.getpid()))
                    time.sleep(600)
                time.sleep(600)
            elif act.startswith("raw "):
                lines.append(act[4:])
            else:
                lines.append(trace(row, solution.stem, "PASSED" if "crash" in act else act))
        if lines:
            out = args.local / "traces" / path.parent.name / path.name
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text("".join(f"{line}\\n" for line in lines))
'''


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Two published definitions with a baseline of the same name, and three workloads each."""
    root = tmp_path / "dataset"
    for name in (ONE, TWO):
        place = DefinitionFiles("gemm", name)
        for path in (place.definition, place.workloads):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(MINI / path, root / path)
        shutil.copytree(MINI / place.solutions, root / place.solutions)
        lines = (root / place.workloads).read_text().splitlines(keepends=True)
        (root / place.workloads).write_text("".join(lines[:3]))
    return root


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Install the stub with a script: definition -> number of a workload -> what comes of it."""
    stub = tmp_path / "stub"
    (stub / "flashinfer_bench" / "cli").mkdir(parents=True)
    (stub / "flashinfer_bench" / "__init__.py").touch()
    (stub / "flashinfer_bench" / "cli" / "__init__.py").touch()
    (stub / "flashinfer_bench" / "cli" / "main.py").write_text(STUB)
    traces = (MINI / DefinitionFiles("gemm", ONE).traces).read_text()
    (stub / "line.json").write_text(traces.splitlines()[0])
    monkeypatch.setenv("PYTHONPATH", str(stub))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setenv("ONBOARD_COLLECT__LEASE_DIR", str(tmp_path / "leases"))
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("FLASHINFER_WORKSPACE_BASE", "/cache")
    monkeypatch.setenv("FLASHINFER_LOGLEVEL", "10")
    monkeypatch.setattr(evaluation, "unavailable", lambda: "")

    def script(acts: dict[str, dict[int, str]] | None = None) -> Path:
        (stub / "script.json").write_text(json.dumps(acts or {}))
        return stub

    return script


def calls(stub: Path) -> list[Any]:
    return [json.loads(line) for line in (stub / "calls.jsonl").read_text().splitlines()]


def add(dataset: Path, op_type: str, name: str) -> DefinitionFiles:
    """Add a published definition with one workload; no file of it depends on the row's inputs."""
    place = DefinitionFiles(op_type, name)
    for path in (place.definition, place.workloads):
        (dataset / path).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(MINI / place.definition, dataset / place.definition)
    workload = {"uuid": name, "axes": {}, "inputs": {}}
    (dataset / place.workloads).write_text(json.dumps({"definition": name, "workload": workload}))
    return place


def uuids(dataset: Path, name: str) -> list[str]:
    text = (dataset / DefinitionFiles("gemm", name).workloads).read_text()
    return [json.loads(line)["workload"]["uuid"] for line in text.splitlines()]


def traces(dataset: Path, name: str) -> Path:
    return dataset / DefinitionFiles("gemm", name).traces


def test_passed_traces_come_into_the_dataset(dataset: Path, bench: Callable[..., Path]) -> None:
    stub = bench()
    traces(dataset, ONE).parent.mkdir(parents=True)
    traces(dataset, ONE).write_text("of earlier rows\n")
    assert evaluate(dataset, "gemm", ONE, effort=Effort(row_seconds=7)) == "PASSED on 3 workloads"
    written = [json.loads(line) for line in traces(dataset, ONE).read_text().splitlines()]
    assert [trace["workload"]["uuid"] for trace in written] == uuids(dataset, ONE)
    [(definitions, timeout, files, environment, _)] = calls(stub)
    assert (definitions, timeout) == ([ONE], 7)
    assert files == sorted(
        [
            f"definitions/gemm/{ONE}.json",
            f"solutions/baseline/gemm/{ONE}/torch_linear_73342c.json",
            f"workloads/gemm/{ONE}.jsonl",
        ]
    )
    assert environment["CUDA_VISIBLE_DEVICES"] == "3"
    assert environment["FLASHINFER_WORKSPACE_BASE"] == "/cache"
    assert not {"HF_TOKEN", "FLASHINFER_LOGLEVEL"} & set(environment)


def test_an_op_module_says_what_evaluating_it_costs(
    dataset: Path, bench: Callable[..., Path]
) -> None:
    """Definitions that cost the same share a process; what is asked for comes first."""
    stub = bench()
    drawn = add(dataset, "sampling", "top_k_top_p_sampling_from_probs_v151936")
    ragged = add(dataset, "gqa_ragged", "gqa_ragged_prefill_causal_h32_kv4_d128")
    paged = add(dataset, "gqa_paged", "gqa_paged_prefill_causal_h32_kv4_d128_ps1")
    decode = add(dataset, "gqa_paged", "gqa_paged_decode_h32_kv4_d128_ps1")
    one = DefinitionFiles("gemm", ONE)
    everything = [drawn, ragged, paged, decode, one]
    assert all(result.passed for result in evaluate_all(dataset, everything))
    slow, default = ["1", "3", "1"], [None, None, None]
    assert [(call[0], call[1], call[4]) for call in calls(stub)] == [
        ([drawn.name], 3600, default),
        ([ragged.name, paged.name], 300, slow),
        ([decode.name, ONE], 300, default),
    ]
    (stub / "calls.jsonl").unlink()
    evaluate_all(dataset, [ragged], effort=Effort(row_seconds=9, iterations=20))
    assert [(call[1], call[4]) for call in calls(stub)] == [(9, ["1", "20", "1"])]


def test_outcome_says_device_versions_and_times(dataset: Path, bench: Callable[..., Path]) -> None:
    bench()
    [result] = evaluate_all(dataset, [DefinitionFiles("gemm", ONE)], gpu="1")
    assert result.passed
    assert (result.hardware, result.versions["cuda"]) == ("NVIDIA B200", "12.8")
    assert result.latency_ms == 0.01877511268924133
    assert result.speedup == 1.006326391070923
    assert json.loads(json.dumps(result.as_json()))["statuses"] == {"PASSED": 3}


FAILURES = {
    "numerical": (
        {1: "INCORRECT_NUMERICAL"},
        "1 x INCORRECT_NUMERICAL; 3 workloads",
        [1],
        "max absolute error 12.5, max relative error nan",
    ),
    "runtime": (
        {0: "RUNTIME_ERROR", 2: "RUNTIME_ERROR"},
        "2 x RUNTIME_ERROR",
        [0, 2],
        "RuntimeError: no kernel",
    ),
    "no log": ({0: "INCORRECT_SHAPE"}, "1 x INCORRECT_SHAPE", [0], "no reason given"),
    "reference": ({2: "drop"}, "1 x NO_TRACE", [2], ": no memory;"),
    "missing": ({2: "silent"}, "1 x NO_TRACE", [2], "wrote no trace of it"),
    "no traces": (dict.fromkeys(range(3), "silent"), "3 x NO_TRACE", [0, 1, 2], "wrote no trace"),
    "crash": ({1: "crash"}, "3 x NO_TRACE", [0, 1, 2], "exit status 1: CUDA error: an illegal"),
    "no json": ({0: "raw {"}, "1 x MALFORMED, 1 x NO_TRACE", [0], "line 1: Invalid JSON"),
    "no object": ({0: "raw [1]"}, "1 x MALFORMED", [0], "line 1: "),
    "workload": ({0: 'raw {"definition": "x"}'}, "1 x MALFORMED", [0], "line 1: workload: Field"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_every_workload_must_pass(
    dataset: Path, bench: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    acts, counted, failed, reason = FAILURES[kind]
    bench({ONE: acts})
    kept = tmp_path / "kept"
    before = {p: p.read_bytes() for p in dataset.rglob("*") if p.is_file()}
    with pytest.raises(CollectError) as error:
        evaluate(dataset, "gemm", ONE, kept=kept)
    text = str(error.value)
    assert text.startswith(f"{ONE}: the baseline did not pass (")
    for part in (counted, reason, str(kept), *(uuids(dataset, ONE)[i] for i in failed)):
        assert part in text
    assert {p: p.read_bytes() for p in dataset.rglob("*") if p.is_file()} == before
    written = (
        0 if counted.startswith("3 x") else 3 - ("drop" in acts.values()) - (kind == "missing")
    )
    assert len((kept / f"{ONE}.traces.jsonl").read_text().splitlines()) == written
    assert (kept / f"{ONE}.log").is_file()

    bench()
    evaluate(dataset, "gemm", ONE, kept=kept)
    assert list(kept.iterdir()) == []


def test_foreign_traces_do_not_count(dataset: Path, bench: Callable[..., Path]) -> None:
    foreign = (MINI / DefinitionFiles("gemm", TWO).traces).read_text().splitlines()[0]
    bench({ONE: {0: f"raw {foreign}"}})
    with pytest.raises(CollectError, match="no workload or baseline of this definition"):
        evaluate(dataset, "gemm", ONE)


def test_hanging_evaluation_is_killed(
    dataset: Path, bench: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = bench({ONE: {1: "hang"}})
    monkeypatch.setattr(evaluation, "_START_SECONDS", -4.5)
    with pytest.raises(CollectError, match="3 x NO_TRACE.*did not finish in 2 s"):
        evaluate(dataset, "gemm", ONE, effort=Effort(row_seconds=1))
    pid = int((stub / "pid").read_text())
    state = Path(f"/proc/{pid}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def rename(dataset: Path, name: str) -> None:
    """Give a definition's baseline a name of its own."""
    [path] = (dataset / DefinitionFiles("gemm", name).solutions).iterdir()
    solution = json.loads(path.read_text()) | {"name": f"of_{name}"}
    path.unlink()
    path.with_stem(f"of_{name}").write_text(json.dumps(solution))


BOTH = [DefinitionFiles("gemm", TWO), DefinitionFiles("gemm", ONE)]


def test_one_process_for_all_definitions(dataset: Path, bench: Callable[..., Path]) -> None:
    stub = bench({ONE: {0: "RUNTIME_ERROR"}})
    rename(dataset, ONE)
    two, one = evaluate_all(dataset, BOTH)
    assert [call[0] for call in calls(stub)] == [[TWO, ONE]]
    assert two.passed
    assert not one.passed
    assert traces(dataset, TWO).is_file()
    assert not traces(dataset, ONE).exists()


def test_baselines_of_the_same_name_are_kept_apart(
    dataset: Path, bench: Callable[..., Path]
) -> None:
    stub = bench()
    assert all(result.passed for result in evaluate_all(dataset, BOTH))
    assert [call[0] for call in calls(stub)] == [[TWO], [ONE]]


@pytest.mark.parametrize("act", ["crash", "crash if shared"])
def test_a_crash_is_charged_to_who_causes_it(
    dataset: Path, bench: Callable[..., Path], act: str
) -> None:
    stub = bench({TWO: {1: act}})
    rename(dataset, ONE)
    two, one = evaluate_all(dataset, BOTH)
    assert [call[0] for call in calls(stub)] == [[TWO, ONE], [TWO], [ONE]]
    assert one.passed
    assert two.passed == (act != "crash")


def test_missing_baseline_is_written_first(dataset: Path, bench: Callable[..., Path]) -> None:
    bench()
    place = DefinitionFiles("rmsnorm", NORM)
    for path in (place.definition, place.workloads):
        (dataset / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(MINI / path, dataset / path)
    lines = (dataset / place.workloads).read_text().splitlines(keepends=True)
    (dataset / place.workloads).write_text(lines[0])
    assert evaluate(dataset, "rmsnorm", NORM) == "PASSED on 1 workloads"
    [solution] = (dataset / place.solutions).iterdir()
    assert "flashinfer.norm.rmsnorm" in solution.read_text()


def test_kernel_without_a_baseline_is_not_evaluated(
    dataset: Path, bench: Callable[..., Path]
) -> None:
    bench()
    shutil.rmtree(dataset / "solutions")
    assert evaluate(dataset, "gemm", ONE) == "not evaluated (the kernel has no baseline)"


def test_definitions_with_the_same_wrapper_get_baselines_of_their_own(tmp_path: Path) -> None:
    from tasks import ops

    definitions = [
        json.loads((MINI / f"definitions/rmsnorm/{name}.json").read_text())
        for name in (NORM, "rmsnorm_h7168")
    ]
    specs = [ops.op_module("rmsnorm").spec_of(definition) for definition in definitions]
    same = [spec.model_copy(update={"constants": specs[0].constants}) for spec in specs]
    names = [write_baseline(tmp_path, spec) for spec in (*same, same[0])]
    assert names[0] == names[2] != names[1]
    assert len(list((tmp_path / "solutions").rglob("*.json"))) == 2


def put_row(dataset: Path, **changes: Any) -> None:
    path = dataset / DefinitionFiles("gemm", ONE).workloads
    lines = path.read_text().splitlines()
    row = json.loads(lines[1])
    row["workload"] |= changes
    path.write_text("\n".join([lines[0], json.dumps(row), lines[2]]))


ROWS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no uuid": (lambda root: put_row(root, uuid=None), "line 2: workload.uuid"),
    "twice": (lambda root: put_row(root, uuid=uuids(root, ONE)[0]), "line 2: .* is there twice"),
    "outside": (
        lambda root: put_row(root, inputs={"A": {"type": "safetensors", "path": "/etc/passwd"}}),
        "line 2: input A: '/etc/passwd' is no file of this",
    ),
    "empty": (
        lambda root: (root / DefinitionFiles("gemm", ONE).workloads).write_text("\n"),
        "there are no workloads",
    ),
}


@pytest.mark.parametrize("kind", ROWS)
def test_damaged_rows(dataset: Path, bench: Callable[..., Path], kind: str) -> None:
    bench()
    damage, reason = ROWS[kind]
    damage(dataset)
    with pytest.raises(CollectError, match=reason):
        evaluate(dataset, "gemm", ONE)


def test_links_are_refused(dataset: Path, bench: Callable[..., Path], tmp_path: Path) -> None:
    bench()
    place = DefinitionFiles("gemm", ONE)
    shutil.move(dataset / place.workloads, tmp_path / "rows")
    (dataset / place.workloads).symlink_to(tmp_path / "rows")
    with pytest.raises(DefinitionError, match="symbolic link"):
        evaluate(dataset, "gemm", ONE)
    shutil.move(dataset / "solutions", tmp_path / "solutions")
    (dataset / "solutions").symlink_to(tmp_path / "solutions")
    with pytest.raises(InputError, match="leads out of"):
        evaluate(dataset, "gemm", ONE)


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("", ""),
        ("\n warming up \n", "warming up"),
        (
            "Traceback:\n  f()\ntorch.OutOfMemoryError: CUDA out\nbye",
            "torch.OutOfMemoryError: CUDA out",
        ),
        ("x" * 1000, "x" * 300),
    ],
)
def test_excerpt_of_a_log(log: str, expected: str) -> None:
    assert evaluation.excerpt(log) == expected


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["evaluate", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_command_prints_a_table(dataset: Path, bench: Callable[..., Path]) -> None:
    bench({TWO: {0: "INCORRECT_NUMERICAL"}})
    code, out, _ = run("--dataset", str(dataset), "--definitions", ONE)
    assert code == 0
    assert "1 of 1 definitions passed" in out
    code, out, _ = run("--dataset", str(dataset))
    assert code == 1
    assert "max absolute error 12.5" in out
    assert "on NVIDIA B200: 1 of 2 definitions passed" in out


def test_command_prints_json(dataset: Path, bench: Callable[..., Path]) -> None:
    bench({TWO: {0: "INCORRECT_NUMERICAL"}})
    code, out, _ = run("--dataset", str(dataset), "--definitions", f"{TWO},{ONE}", "--json")
    one, two = json.loads(out)
    assert code == 1
    assert (one["definition"], one["passed"]) == (ONE, True)
    assert two["failures"][0]["uuid"] == uuids(dataset, TWO)[0]


def test_command_without_a_gpu(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    code, out, err = run("--dataset", str(dataset))
    assert (code, out) == (1, "")
    assert err == "onboard: nothing was evaluated: no CUDA device on this host\n"


@pytest.mark.parametrize(
    ("names", "reason"),
    [([], "has no definitions/ folder"), ([ONE, "none"], "has no none"), ([NORM], "no workloads")],
)
def test_wrong_input(dataset: Path, tmp_path: Path, names: list[str], reason: str) -> None:
    place = DefinitionFiles("rmsnorm", NORM)
    (dataset / place.definition).parent.mkdir()
    shutil.copy(MINI / place.definition, dataset / place.definition)
    root = dataset if names else tmp_path
    code, _, err = run("--dataset", str(root), *(f"--definitions={name}" for name in names))
    assert code == 2
    assert reason in err


@pytest.mark.parametrize("taken", [False, True])
def test_the_command_evaluates_on_a_gpu_of_its_own(
    dataset: Path,
    bench: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    taken: bool,
) -> None:
    stub = bench()
    monkeypatch.setenv("ONBOARD_COLLECT__LEASE_SECONDS", "0.01")
    held = ("3", "5") if taken else ("3",)
    with lease(tmp_path / "leases", held, len(held), on_wait=print, session="of another"):
        code, out, err = run("--dataset", str(dataset), "--definitions", ONE)
    if taken:
        assert code == 1
        assert "of another" in err
        assert not (stub / "calls.jsonl").exists()
    else:
        assert code == 0, out
        assert calls(stub)[0][3]["CUDA_VISIBLE_DEVICES"] == "5"


REAL = """
from flashinfer_bench.bench import benchmark
from flashinfer_bench.cli.main import cli
from flashinfer_bench.data import Correctness, Environment, Evaluation, Performance

class Runner:
    made = 0

    def __init__(self, *args, **kwargs):
        pass

    def run_workload(self, definition, workload, solutions, config, root):
        Runner.made += 1
        error = Correctness(max_absolute_error=float("inf"), max_relative_error=float("nan"))
        common = {
            "environment": Environment(hardware="test", libs={"torch": "1"}),
            "timestamp": "now",
            "log": f"\\u2028 limit {config.timeout_seconds}",
        }
        time = Performance(latency_ms=0.5, reference_latency_ms=1, speedup_factor=2)
        if Runner.made == 5:
            raise RuntimeError("No healthy persistent workers available")
        made = {"status": "PASSED", "correctness": Correctness(), "performance": time}
        if Runner.made == 4:
            made = {"status": "INCORRECT_NUMERICAL", "correctness": error}
        if Runner.made == 6:
            made = {"status": "RUNTIME_ERROR"}
        return {solution.name: Evaluation(**made, **common) for solution in solutions}

    def close(self):
        pass

benchmark.PersistentRunner = Runner
cli()
"""


@pytest.mark.bench_extra
def test_real_command_line_data_models_and_layout(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of flashinfer-bench but what needs a GPU: options, loading the copy, writing traces."""
    monkeypatch.setattr(evaluation, "_COMMAND", REAL)
    monkeypatch.setattr(evaluation, "unavailable", lambda: "")
    rename(dataset, TWO)
    one, two = evaluate_all(dataset, BOTH[::-1], effort=Effort(row_seconds=7))
    assert one.passed, one
    assert (one.hardware, one.latency_ms, one.speedup) == ("test", 0.5, 2.0)
    # The fifth workload has no trace, so its definition is evaluated again, by itself.
    assert two.passed, two
    monkeypatch.setattr(evaluation, "_COMMAND", REAL.replace("made = 0", "made = 3"))
    [two] = evaluate_all(dataset, BOTH[:1], effort=Effort(row_seconds=7))
    first, second, third = uuids(dataset, TWO)
    assert {(failure.uuid, failure.status, failure.reason) for failure in two.failures} == {
        (first, "INCORRECT_NUMERICAL", "max absolute error inf, max relative error nan"),
        (second, "NO_TRACE", "No healthy persistent workers available"),
        (third, "RUNTIME_ERROR", "limit 7"),
    }
