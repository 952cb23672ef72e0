"""Regenerating definitions from their const axes, and comparing them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from tasks import ops
from tasks.define.agree import Agreement, Reason, agree
from tasks.define.compare import Difference, differences
from tasks.errors import DefinitionError, InputError
from tests.conftest import DATA
from tests.unit.test_ops import LAST_PAGE_LEN_TOO_LONG, PUBLISHED

Json = dict[str, Any]
GOOD = PUBLISHED["rmsnorm_h2048"]


def test_a_definition_does_not_differ_from_itself() -> None:
    assert list(differences(GOOD, deepcopy(GOOD))) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda d: d["axes"].update(hidden_size={"type": "const", "value": 7}),
            Difference("axes.hidden_size", 2048, 7),
        ),
        (
            lambda d: d["axes"].update(more={"type": "var"}),
            Difference("axes.more", None, "var"),
        ),
        (
            lambda d: d["inputs"]["weight"].update(dtype="float16"),
            Difference("inputs.weight.dtype", "bfloat16", "float16"),
        ),
        (
            lambda d: d["inputs"]["weight"].update(shape=["batch_size"]),
            Difference("inputs.weight.shape", ["hidden_size"], ["batch_size"]),
        ),
        (
            lambda d: d.update(inputs=dict(reversed(d["inputs"].items()))),
            Difference("inputs", ["hidden_states", "weight"], ["weight", "hidden_states"]),
        ),
        (
            lambda d: d["outputs"].pop("output"),
            Difference("outputs", ["output"], []),
        ),
        (
            lambda d: d["inputs"]["weight"].update(optional=True),
            Difference("inputs.weight.optional", False, True),
        ),
        (
            lambda d: d.update(constraints=["hidden_size > 0"]),
            Difference("constraints", [], ["hidden_size > 0"]),
        ),
        (
            lambda d: d.update(tags=["fi_api:flashinfer.other"]),
            Difference("tags.fi_api", "fi_api:flashinfer.norm.rmsnorm", "fi_api:flashinfer.other"),
        ),
    ],
)
def test_each_field_that_differs_is_named(
    change: Callable[[Json], Any], expected: Difference
) -> None:
    other = deepcopy(GOOD)
    change(other)
    assert list(differences(GOOD, other)) == [expected]


def test_prose_order_of_axes_and_model_tags_do_not_count() -> None:
    other = deepcopy(GOOD)
    other["description"] = "Other words."
    other["axes"] = dict(reversed(other["axes"].items()))
    other["tags"] = [*other["tags"], "model:another"]
    other["inputs"]["weight"]["description"] = "Other words."
    assert list(differences(GOOD, other)) == []


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_the_spec_of_every_published_definition_has_its_name(name: str) -> None:
    definition = PUBLISHED[name]
    module = ops.op_module(definition["op_type"])
    spec = module.spec_of(definition)
    assert spec.name == name
    assert spec.op_type == definition["op_type"]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gqa_paged_decode_h32_kv8_d128_ps1", {"name": "attention"}, "not a name of op type"),
        (
            "gqa_paged_decode_h32_kv8_d128_ps1",
            {"name": "gqa_paged_decode_h16_kv8_d128_ps1"},
            "the name says {'num_qo_heads': 16}",
        ),
        ("rmsnorm_h2048", {"reference": "def run(): ..."}, "its reference states no EPS"),
        (
            "moe_fp8_block_scale_renorm_topk8_e128_h2048_i768",
            {"name": "moe_fp8_block_scale_other_topk8_e128_h2048_i768"},
            "routing 'other'",
        ),
    ],
)
def test_a_definition_that_says_too_little_has_no_spec(
    name: str, change: Json, message: str
) -> None:
    definition = {**PUBLISHED[name], **change}
    with pytest.raises(DefinitionError) as caught:
        ops.op_module(definition["op_type"]).spec_of(definition)
    assert message in str(caught.value)


@pytest.fixture(scope="module")
def published() -> Agreement:
    return agree(DATA / "mini-trace")


@pytest.mark.bench_extra
def test_all_but_six_published_definitions_are_regenerated(published: Agreement) -> None:
    assert published.total == 156
    assert published.equal == 150
    unequal = {
        item.definition for item in published.differences if item.reason == Reason.LAST_PAGE.value
    }
    assert unequal == LAST_PAGE_LEN_TOO_LONG
    assert published.by_op_type == {
        "dsa_paged": "3/3",
        "gdn": "9/9",
        "gemm": "32/32",
        "gqa_paged": "31/37",
        "gqa_ragged": "9/9",
        "mamba_ssu": "2/2",
        "mla_paged": "6/6",
        "mla_ragged": "2/2",
        "moe": "19/19",
        "rmsnorm": "15/15",
        "rope": "1/1",
        "sampling": "21/21",
    }


@pytest.mark.bench_extra
def test_every_difference_has_one_of_the_known_reasons(published: Agreement) -> None:
    assert {item.reason for item in published.differences} == {
        Reason.LAST_PAGE.value,
        Reason.UNSTATED.value,
        Reason.FORMER_API.value,
        Reason.ALIAS.value,
        Reason.NO_API.value,
    }


@pytest.fixture
def some(tmp_path: Path) -> Path:
    """A dataset of three definitions."""
    for name in ("rmsnorm_h2048", "gemm_n6144_k4096", "gqa_paged_decode_h32_kv8_d128_ps1"):
        source = next((DATA / "mini-trace" / "definitions").rglob(f"{name}.json"))
        target = tmp_path / "definitions" / source.parent.name / source.name
        target.parent.mkdir(parents=True)
        shutil.copy(source, target)
    return tmp_path


@pytest.mark.bench_extra
def test_what_is_wrong_with_a_dataset_is_in_the_answer(some: Path) -> None:
    norm = some / "definitions" / "rmsnorm" / "rmsnorm_h2048.json"
    changed = json.loads(norm.read_text())
    changed["inputs"]["weight"]["dtype"] = "float32"
    norm.write_text(json.dumps(changed))
    (some / "definitions" / "gemm" / "gemm_n6144_k4096.json").write_text("{")
    foreign = some / "definitions" / "kda" / "kda_h8.json"
    foreign.parent.mkdir()
    foreign.write_text(json.dumps({**GOOD, "name": "kda_h8", "op_type": "kda"}))
    found = agree(some)
    assert (found.equal, found.total) == (1, 4)
    assert [(d.definition, d.field, d.ours, d.theirs, d.reason) for d in found.differences] == [
        ("gemm_n6144_k4096", "definition", None, "gemm_n6144_k4096", Reason.NOT_READABLE.value),
        ("kda_h8", "definition", None, "kda_h8", Reason.NOT_REGENERATED.value),
        (
            "rmsnorm_h2048",
            "inputs.weight.dtype",
            "bfloat16",
            "float32",
            Reason.UNEXPLAINED.value,
        ),
    ]
    assert "is not JSON" in found.differences[0].detail
    assert "op type 'kda' has no module" in found.differences[1].detail


@pytest.mark.bench_extra
def test_every_damage_is_one_definition_less(some: Path) -> None:
    definitions = some / "definitions"
    norm = definitions / "rmsnorm" / "rmsnorm_h2048.json"
    gemm = json.loads((definitions / "gemm" / "gemm_n6144_k4096.json").read_text())

    def put(name: str, **changes: Any) -> None:
        path = definitions / "gemm" / f"{name}.json"
        path.write_text(json.dumps({**gemm, "name": name, **changes}))

    put("gemm_n1_k4096", constraints=[1])
    put("gemm_n2_k4096", tags=5)
    put("gemm_n3_k4096", op_type="rmsnorm")
    put("gemm_n4_k4096")  # its axes say 6144
    var = {**gemm["axes"], "N": {"type": "var"}}
    put("gemm_n5_k4096", axes=var)
    shutil.copy(norm, definitions / "gemm" / norm.name)
    (definitions / "gemm" / "gemm_n6_k1.json").symlink_to("nowhere")
    found = agree(some)
    assert (found.equal, found.total) == (3, 10)
    told = {item.definition: (item.field, item.reason) for item in found.differences}
    assert told == {
        "gemm_n1_k4096": ("definition", Reason.NOT_READABLE.value),
        "gemm_n2_k4096": ("definition", Reason.NOT_READABLE.value),
        "gemm_n3_k4096": ("definition", Reason.NOT_READABLE.value),
        "gemm_n4_k4096": ("definition", Reason.CONTRADICTS.value),
        "gemm_n5_k4096": ("axes.N", Reason.UNEXPLAINED.value),
        "gemm_n6_k1": ("definition", Reason.NOT_READABLE.value),
        "rmsnorm_h2048": ("definition", Reason.NOT_READABLE.value),
    }


def test_a_folder_that_is_no_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no definitions/ folder"):
        agree(tmp_path)
    (tmp_path / "definitions").mkdir()
    with pytest.raises(InputError, match="has no definitions"):
        agree(tmp_path)
