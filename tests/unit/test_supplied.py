"""A reference that somebody supplies: what the file must have, and that only the jail runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tasks import manifest
from tasks.define import phase
from tasks.define.draft import Order, draft_definitions, read_draft
from tasks.define.supplied import Supplied
from tasks.errors import DefinitionError
from tasks.manifest import KernelEntry
from tasks.ops.base import KernelSpec

SCHEMA: dict[str, Any] = {
    "description": "Rows scaled by a factor of their own.",
    "axes": {
        "rows": {"type": "var", "description": "Rows."},
        "width": {"type": "const", "value": 4, "description": "Elements of a row."},
    },
    "inputs": {
        "x": {"shape": ["rows", "width"], "dtype": "float32", "description": "Rows."},
        "factor": {"shape": ["rows"], "dtype": "float32", "description": "Factors."},
    },
    "outputs": {
        "y": {"shape": ["rows", "width"], "dtype": "float32", "description": "Scaled rows."}
    },
    "tags": ["stage:test"],
}
RUN = """\
import torch


def _helper(x):
    return x


@torch.no_grad()
def run(x, factor):
    return _helper(x) * factor[:, None]
"""
TEST = """\
CASES = {"two rows": lambda: {"x": torch.ones(2, 4), "factor": torch.tensor([2.0, -1.0])}}


def check(inputs, outputs, kernel):
    expected = torch.diag(inputs["factor"].double()) @ inputs["x"].double()
    assert_close(outputs["y"], expected, kernel, loose=2.0**-6)
"""
DEFINITION = f"DEFINITION = {SCHEMA!r}\n"
WHOLE = f"{DEFINITION}\n{RUN}\n\n{TEST}"


def test_a_file_is_taken_apart() -> None:
    supplied = Supplied.parse(WHOLE, {}, "")
    assert supplied.body == {**SCHEMA, "reference": supplied.body["reference"]}
    assert "def run(x, factor):" in supplied.body["reference"]
    assert "def _helper(x):" in supplied.body["reference"]
    assert "DEFINITION" not in supplied.body["reference"]
    assert "CASES" not in supplied.body["reference"]
    assert "def check(" in supplied.family
    assert "def run(" not in supplied.family
    assert "@torch.no_grad()" not in supplied.family


def test_what_the_op_module_knows_is_not_taken_from_the_file() -> None:
    own = {"description": "Ours.", "axes": {}, "inputs": {}, "outputs": {}}
    supplied = Supplied.parse(WHOLE, own, "CASES = {}")
    assert supplied.body["description"] == "Ours."
    assert supplied.family == "CASES = {}"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def run(:", "not Python"),
        ("def go(): ...", "no top-level function `run`"),
        (RUN, "no literal DEFINITION"),
        (f"DEFINITION = dict(a=1)\n{RUN}\n{TEST}", "no literal"),
        (f"DEFINITION = {{'axes': {{}}}}\n{RUN}\n{TEST}", "DEFINITION has no description, axes"),
        (f"DEFINITION = [1]\n{RUN}\n{TEST}", "DEFINITION has no description"),
        (f"{DEFINITION}\n{RUN}", "no CASES and no check"),
        (f"{DEFINITION}\n{RUN}\nCASES = {{}}", "no check"),
        ("#" * 200_001, "longer than 200000 characters"),
        ("(" * 5000, "not Python"),
    ],
)
def test_a_file_that_lacks_something_says_what(source: str, message: str) -> None:
    with pytest.raises(DefinitionError) as caught:
        Supplied.parse(source, {}, "")
    assert message in str(caught.value)


def order(name: str, source: str) -> Order:
    """A kernel of an op type that no module knows, with a file."""
    return Order(
        spec=KernelSpec(name=name, op_type="scaling", variant="", axes={}), supplied=source
    )


HOSTILE = {
    "adds": ("* factor[:, None]", "+ factor[:, None]", "proof: case 1: reference: AssertionError"),
    "forgets": ("* factor[:, None]", "", "not close"),
    "accepts_anything": (
        "    assert_close(",
        "    (lambda *a, **k: 0)(",
        "accepts outputs that are",
    ),
    "has_no_cases": ("CASES = {", "CASES = [] and {", "CASES is no dict"),
    "runs_in_its_check": ("    expected = ", "    run(1)\n    expected = ", "name 'run' is not"),
    "loops": ("return _helper(x)", "while True: pass\n    return x", "did not finish in 5 s"),
    "writes": ("return _helper(x)", "open('left', 'w')\n    return x", "may not open"),
    "lacks_an_input": ("def run(x, factor)", "def run(x)", "run takes ['x'], the inputs are"),
    "writes_in_a_case": ('CASES = {"two', 'open("left", "w")\nCASES = {"two', "may not open"),
    "forks_in_its_check": ("def check(", "import os\nos.fork()\ndef check(", "PermissionError"),
    "leaves_at_once": ("import torch\n", "import torch\nraise SystemExit(0)\n", "SystemExit"),
}


@pytest.fixture(scope="module")
def drafts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A right file and all wrong ones, drafted together: none stops the others."""
    folder = tmp_path_factory.mktemp("drafts")
    orders = [order("right", f"# form feed \f, line separator \u2028\n{WHOLE}")]
    for name, (old, new, _) in HOSTILE.items():
        assert old in WHOLE
        orders.append(order(name, WHOLE.replace(old, new, 1)))
    draft_definitions(orders, "m", folder, seconds=5)
    return folder


@pytest.mark.bench_extra
def test_a_supplied_reference_is_proved_by_the_files_own_computation(drafts: Path) -> None:
    draft = read_draft(drafts, "right")
    assert draft.method == "supplied"
    assert draft.proof == ["case 1, by the file's own computation"]
    assert draft.definition["name"] == "right"
    assert draft.definition["op_type"] == "scaling"
    assert draft.definition["tags"] == ["stage:test", "status:unverified", "model:m"]
    assert "def test_reference_is_the_independent_computation" in draft.test
    compile(draft.test, "test", "exec")


@pytest.mark.bench_extra
@pytest.mark.parametrize("name", HOSTILE)
def test_a_wrong_or_hostile_file_fails_and_leaves_nothing_behind(name: str, drafts: Path) -> None:
    with pytest.raises(DefinitionError) as caught:
        read_draft(drafts, name)
    assert HOSTILE[name][2] in str(caught.value)
    names = {path.name for path in drafts.rglob("*")}
    assert names == {f"{each}.json" for each in ("right", *HOSTILE)}


def run_with_a_foreign_kernel(workspace: Path) -> Path:
    """A manifest with one kernel of an op type that nobody knows."""
    path = workspace / "onboard_m_20260101.json"
    path.write_text(
        json.dumps(
            {
                "model_slug": "m",
                "hf_repo_id": None,
                "date": "2026-01-01",
                "kernels": [
                    {
                        "definition_name": "scale_rows_w4",
                        "op_type": "scaling",
                        "phase1_status": "new",
                        "fi_status": "fi_missing",
                    }
                ],
            }
        )
    )
    return path


@pytest.mark.bench_extra
def test_a_kernel_without_a_reference_waits_until_one_is_supplied(tmp_path: Path) -> None:
    path = run_with_a_foreign_kernel(tmp_path)
    dataset = tmp_path / "flashinfer-trace"
    entry = KernelEntry(definition_name="scale_rows_w4", op_type="scaling", phase1_status="new")
    (result,) = phase.draft_all([entry], "m", tmp_path / "drafts")
    assert result.state == "needs_reference"
    phase.stage(result, tmp_path / "drafts", dataset, path)
    waiting = manifest.load(path).kernel("scale_rows_w4")
    assert waiting.phase2_status == "needs_reference"
    assert not dataset.exists()

    with pytest.raises(DefinitionError, match="proof: case 1"):
        phase.supply_reference(path, "scale_rows_w4", WHOLE.replace("* factor", "- factor"))
    assert manifest.load(path).kernel("scale_rows_w4").phase2_status == "needs_reference"

    phase.supply_reference(path, "scale_rows_w4", WHOLE)
    defined = manifest.load(path).kernel("scale_rows_w4")
    assert (defined.phase2_status, defined.phase2_method) == ("done", "supplied")
    staged = json.loads((dataset / "definitions/scaling/scale_rows_w4.json").read_text())
    assert staged["axes"]["width"]["value"] == 4
    assert (dataset / "tests/references/test_scale_rows_w4.py").is_file()
