"""mla_paged and mla_ragged: multi-head latent attention (DeepSeek-V2 and what follows it).

Decode and incremental prefill attend to the compressed cache itself: one latent vector (`ckv`) and
one rotary key (`kpe`) per token, shared by all query heads (mla_paged). A prefill without a cached
prefix computes each head's own keys and values first (mla_ragged). SGLang takes the second path
where it can (sglang/srt/models/deepseek_common/attention_backend_handler.py:
_handle_attention_backend), unless told not to.

Query heads are sharded by tp, which must divide them (sglang/srt/models/deepseek_v2.py:
`assert num_heads % attn_tp_size == 0`); the latent cache is not sharded.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal

import numpy as np

from tasks.model import Fields, ModelConfig, Serving
from tasks.ops.base import (
    Call,
    DumpError,
    FlashInferApi,
    Json,
    KernelSpec,
    MetaTensor,
    NotProduced,
    OpModule,
    Rejected,
    Row,
    Scalar,
    TemplateCall,
    const,
    const_axes,
    register,
    scalar,
    tensor,
    var,
)
from tasks.ops.gqa import (
    ATTEND_TEST,
    FLAGS,
    HIDE_TEST,
    PAGED_TEST,
    RAGGED_TEST,
    ragged_baseline,
    ragged_extent,
    wrapper_api,
)
from tasks.ops.plans import (
    RAGGED,
    Evidence,
    check_causal,
    check_decode,
    check_plan,
    check_reach,
    check_run,
    check_tensors,
    lengths,
    may_be_causal,
    offsets,
    paged_row,
    planned,
    ragged_row,
    rows_of_plans,
    shown,
    tables,
)

_LAYER = "python/sglang/srt/layers/attention/flashinfer_mla_backend.py"
_NO_RAGGED = "--flashinfer-mla-disable-ragged"
_PAGED = "BatchMLAPagedAttentionWrapper"
_PAGED_READS = ("qo_indptr", "kv_indptr", "kv_indices", "kv_len_arr")

_HEADER = """\
import math

import torch


@torch.no_grad()
def run({arguments}):
"""

_PAGED_BODY = """\
    {rows}, num_qo_heads, head_dim_ckv = q_nope.shape
    _, page_size, head_dim_kpe = kpe_cache.shape
    assert num_qo_heads == {heads}
    assert head_dim_ckv == {ckv}
    assert head_dim_kpe == {kpe}
    assert page_size == {page_size}

    output = torch.zeros_like(q_nope)
    lse = torch.full(q_nope.shape[:2], -float("inf"), dtype=torch.float32, device=q_nope.device)
    for b in range(kv_indptr.shape[0] - 1):
        first_page, end_page = int(kv_indptr[b]), int(kv_indptr[b + 1])
        first, end = {span}
        if first_page >= end_page or first >= end:
            continue
        pages = kv_indices[first_page:end_page].to(torch.long)
        ckv = ckv_cache[pages].to(torch.float32).reshape(-1, head_dim_ckv)
        kpe = kpe_cache[pages].to(torch.float32).reshape(-1, head_dim_kpe)
"""

_LAST_PAGE = """\
        length = (pages.shape[0] - 1) * page_size + int(kv_last_page_len[b])
        ckv, kpe = ckv[:length], kpe[:length]
"""

_PAGED_LOGITS = """\
        logits = torch.einsum("qhd,kd->qhk", q_nope[first:end].to(torch.float32), ckv)
        logits += torch.einsum("qhd,kd->qhk", q_pe[first:end].to(torch.float32), kpe)
        logits *= sm_scale
"""

_RAGGED_BODY = """\
    total_q, num_qo_heads, qk_dim = q.shape
    total_kv, num_kv_heads, vo_dim = v.shape
    assert num_qo_heads == {heads}
    assert num_kv_heads == {heads}
    assert qk_dim == {qk}
    assert vo_dim == {vo}

    output = q.new_zeros(total_q, num_qo_heads, vo_dim)
    lse = torch.full(q.shape[:2], -float("inf"), dtype=torch.float32, device=q.device)
    for b in range(qo_indptr.shape[0] - 1):
        first, end = int(qo_indptr[b]), int(qo_indptr[b + 1])
        first_kv, end_kv = int(kv_indptr[b]), int(kv_indptr[b + 1])
        if first >= end or first_kv >= end_kv:
            continue
        k_b, v_b = k[first_kv:end_kv].to(torch.float32), v[first_kv:end_kv].to(torch.float32)
        logits = torch.einsum("qhd,khd->qhk", q[first:end].to(torch.float32), k_b) * sm_scale
"""

_CAUSAL = """\
        queries, keys = logits.shape[0], logits.shape[2]
        visible = torch.ones(queries, keys, dtype=torch.bool, device=logits.device)
        logits = logits.masked_fill(~visible.tril(keys - queries)[:, None, :], -float("inf"))
"""

_ATTEND = """\
        lse[first:end] = torch.logsumexp(logits, dim=-1) / math.log(2.0)
        weights = torch.nan_to_num(torch.softmax(logits, dim=-1))
        output[first:end] = torch.einsum("{contraction}", weights, {values}).to(output.dtype)
    return output, lse
"""

_PAGED_BASELINE = """\
import flashinfer
import torch

_state = {{}}


def _wrapper(device):
    if device not in _state:
        workspace = torch.empty(128 * 1024 * 1024, dtype=torch.uint8, device=device)
        _state[device] = flashinfer.mla.BatchMLAPagedAttentionWrapper(workspace)
    return _state[device]


def run({arguments}):
    wrapper = _wrapper(q_nope.device)
    wrapper.plan(
        {queries},
        kv_indptr,
        kv_indices,
        {lengths},
        num_heads=q_nope.shape[1],
        head_dim_ckv=q_nope.shape[2],
        head_dim_kpe=q_pe.shape[2],
        page_size=ckv_cache.shape[1],
        causal={causal},
        sm_scale=float(sm_scale),
        q_data_type=q_nope.dtype,
        kv_data_type=ckv_cache.dtype,
    )
    return wrapper.run(q_nope, q_pe, ckv_cache, kpe_cache, return_lse=True)
"""

LATENT_TEST = '''\
def latent(inputs):
    """Return queries, keys and values of the ordinary attention that this is.

    All query heads share one key and value head. The key is the whole cached vector, the value its
    compressed part.
    """
    q = torch.cat([inputs["q_nope"], inputs["q_pe"]], dim=-1)
    k = torch.cat([inputs["ckv_cache"], inputs["kpe_cache"]], dim=-1).flatten(0, 1)[:, None]
    return q, k, k[..., : CONST["head_dim_ckv"]]
'''
"""In reference tests: latent attention as ordinary attention."""

_PAGED_TEST = """\
def check(inputs, outputs, kernel):
    assert_attention(outputs, attend_all(inputs, *latent(inputs)), kernel)
"""

LATENT_AXES = {
    "num_qo_heads": "Query heads of one rank.",
    "head_dim_ckv": "Dimension of the compressed keys and values (kv_lora_rank).",
    "head_dim_kpe": "Dimension of the rotary part of the key (qk_rope_head_dim).",
    "page_size": "Tokens in one page of the cache.",
}
"""The const axes of attention over the latent cache, described."""
_PLAN_NAMES = {axis: axis for axis in LATENT_AXES} | {"num_qo_heads": "num_heads"}
"""Const axis -> a plan's parameter."""
_RAGGED_PLAN_NAMES = {
    "num_qo_heads": "num_qo_heads",
    "num_kv_heads": "num_kv_heads",
    "qk_dim": "head_dim_qk",
    "vo_dim": "head_dim_vo",
}
_RAGGED_ROLES = {
    "heads": "num_qo_heads",
    "kv_heads": "num_kv_heads",
    "qk": "qk_dim",
    "vo": "vo_dim",
}
_RAGGED_AXES = {
    "num_qo_heads": "Query heads of one rank.",
    "num_kv_heads": "Key-value heads of one rank, as many as query heads.",
    "qk_dim": "Dimension of a query or key (qk_nope_head_dim + qk_rope_head_dim).",
    "vo_dim": "Dimension of a value (v_head_dim).",
}
_NAME = "h{num_qo_heads}_ckv{head_dim_ckv}_kpe{head_dim_kpe}_ps{page_size}"
_SCALE = "Softmax scale, from the dimensions before the projections are absorbed."


def latent_heads(model: ModelConfig, serving: Serving) -> int | NotProduced:
    """Return the query heads of one rank."""
    if model.num_heads % serving.tp:
        return NotProduced(
            f"latent attention at tp={serving.tp}",
            f"tp={serving.tp} does not divide {model.num_heads} heads",
        )
    return model.num_heads // serving.tp


def latent_axes(model: ModelConfig, heads: int, page_size: int) -> dict[str, int]:
    """Return the const axes of attention over the latent cache."""
    return {
        "num_qo_heads": heads,
        "head_dim_ckv": model.fields.required_size("kv_lora_rank"),
        "head_dim_kpe": model.fields.required_size("qk_rope_head_dim"),
        "page_size": page_size,
    }


def latent_inputs(rows: str) -> Json:
    """Return the inputs that attention over the latent cache begins with."""
    query, cache = [rows, "num_qo_heads"], ["num_pages", "page_size"]
    return {
        "q_nope": tensor([*query, "head_dim_ckv"], "bfloat16", "Queries, key projection absorbed."),
        "q_pe": tensor([*query, "head_dim_kpe"], "bfloat16", "Rotary part of the queries."),
        "ckv_cache": tensor(
            [*cache, "head_dim_ckv"], "bfloat16", "Paged cache of compressed keys and values."
        ),
        "kpe_cache": tensor(
            [*cache, "head_dim_kpe"], "bfloat16", "Paged cache of the keys' rotary part."
        ),
    }


def latent_outputs(rows: str) -> Json:
    """Return the outputs of attention over the latent cache."""
    query = [rows, "num_qo_heads"]
    return {
        "output": tensor(
            [*query, "head_dim_ckv"], "bfloat16", "Output, value projection not yet applied."
        ),
        "lse": tensor(query, "float32", "2-based log-sum-exp of the logits."),
    }


def latent_scale() -> Json:
    """Return the input that scales the logits."""
    return scalar("float32", _SCALE)


def softmax_scale(model: ModelConfig) -> Scalar:
    """Return the attention scale, YaRN's magnitude correction included.

    sglang/srt/configs/model_config.py: compute_mla_mscale_scaling, yarn_get_mscale.
    """
    nope = model.fields.required_size("qk_nope_head_dim")
    rope = model.fields.required_size("qk_rope_head_dim")
    scale = 1 / math.sqrt(nope + rope)
    source = f"1/sqrt(qk_nope_head_dim + qk_rope_head_dim) with config.json {nope} + {rope}"
    name = model.fields.has("rope_scaling", "rope_parameters")
    scaling = model.fields.nested(name) if name else None
    mscale = _yarn_mscale(scaling) if scaling else 1.0
    if mscale != 1.0:
        source += f", times mscale^2 = {mscale:.6g}^2 from {name}.factor and mscale_all_dim"
    return Scalar(value=scale * mscale * mscale, source=source)


def _yarn_mscale(scaling: Fields) -> float:
    if scaling.text("rope_type", "type") == "default" or not scaling.raw.get("mscale_all_dim"):
        return 1.0
    if scaling.flag("apply_yarn_scaling") is False or scaling.flag("apply_scale") is False:
        return 1.0
    factor, mscale = scaling.number("factor") or 1.0, scaling.number("mscale_all_dim") or 0.0
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _is_dense(model: ModelConfig) -> bool:
    """Whether every token attends to all before it; `index_topk` makes it sparse (dsa.py)."""
    return model.is_mla and model.fields.has("index_topk") is None


def _origin(model: ModelConfig, serving: Serving) -> tuple[str, ...]:
    return (f"{model.num_heads} heads at tp={serving.tp} ({serving.origin})",)


def _check_stage(plan: Call, stage: str, qo_indptr: np.ndarray, evidence: Evidence) -> None:
    """Check whether a plan is of the stage; one wrapper class does both.

    Raises:
        DumpError: it is not; a decode has one query per sequence and no mask.
    """
    causal = plan.values.get("causal")
    if not isinstance(causal, bool):
        raise DumpError(f"{plan.name}: causal is {shown(causal)}, not a truth value")
    if stage == "prefill":
        check_causal(plan, evidence, paged=True)
    elif causal:
        raise DumpError(f"{plan.name}: causal is True, a decode has no mask")
    elif not np.array_equal(qo_indptr, np.arange(qo_indptr.size)):
        raise DumpError(
            f"{plan.name}: {qo_indptr[-1]} queries of {qo_indptr.size - 1} sequences, a decode "
            "has one of each"
        )


@register
class MlaPaged(OpModule):
    """Decode and causal prefill over the paged latent cache."""

    op_type = "mla_paged"
    names = {
        "decode": f"mla_paged_decode_{_NAME}",
        "prefill": f"mla_paged_prefill_causal_{_NAME}",
    }
    apis = (wrapper_api("mla", _PAGED, _PAGED_READS, layer=_LAYER),)
    reference_test = (
        f"{ATTEND_TEST}\n\n{HIDE_TEST}\n\n{PAGED_TEST}\n\n{LATENT_TEST}\n\n{_PAGED_TEST}"
    )

    def mixes(self, kind: str, model: ModelConfig) -> bool:
        """Full attention, where the cache is latent and the attention not sparse."""
        return kind == "full_attention" and _is_dense(model)

    def required(self, model: ModelConfig, serving: Serving) -> Iterator[KernelSpec | NotProduced]:
        """Both stages at each page size."""
        if not _is_dense(model):
            return
        heads = latent_heads(model, serving)
        if isinstance(heads, NotProduced):
            yield heads
            return
        for stage in ("decode", "prefill"):
            for page_size in serving.page_sizes:
                axes = latent_axes(model, heads, page_size)
                yield KernelSpec(
                    name=self.name_of(stage, axes),
                    op_type=self.op_type,
                    variant=stage,
                    axes=axes,
                    tp=(serving.tp,),
                    scalars={"sm_scale": softmax_scale(model)},
                    origin=_origin(model, serving),
                )

    def provider(self, spec: KernelSpec) -> FlashInferApi:
        """The one wrapper for both stages; SGLang always plans it with page size 1."""
        flags = list(FLAGS)
        if spec.variant == "prefill":
            flags.append(_NO_RAGGED)
        if spec.axes["page_size"] != 1:
            flags.append(f"--page-size {spec.axes['page_size']}")
        (api,) = self.apis
        # Never in a session that is to show ragged prefill: the flag turns that off.
        prefill: Literal["", "paged"] = "paged" if spec.variant == "prefill" else ""
        return dataclasses.replace(api, server_flags=tuple(flags), prefill=prefill)

    def template_call(self, spec: KernelSpec) -> TemplateCall | None:
        """Of decode only: the template knows no `qo_indptr`."""
        if spec.variant != "decode":
            return None
        axes = spec.axes
        query, cache = (8, axes["num_qo_heads"]), (64, axes["page_size"])
        return TemplateCall(
            f"flashinfer.mla:{_PAGED}.run",
            {
                "q_nope": MetaTensor((*query, axes["head_dim_ckv"]), "bfloat16"),
                "q_pe": MetaTensor((*query, axes["head_dim_kpe"]), "bfloat16"),
                "ckv_cache": MetaTensor((*cache, axes["head_dim_ckv"]), "bfloat16"),
                "kpe_cache": MetaTensor((*cache, axes["head_dim_kpe"]), "bfloat16"),
                "kv_indptr": MetaTensor((9,), "int32"),
                "kv_indices": MetaTensor((40,), "int32"),
            },
        )

    def implied(self, call: Call) -> KernelSpec | None:
        """By the plan's heads, dimensions and page size; a causal one is a prefill's."""
        causal = call.values.get("causal")
        if call.name != f"{_PAGED}.plan" or not isinstance(causal, bool):
            return None
        return planned(self, "prefill" if causal else "decode", call, _PLAN_NAMES)

    def definition(self, spec: KernelSpec) -> Json:
        """Attention of each sequence's queries over its latent pages, with the 2-based LSE."""
        axes, decode = spec.axes, spec.variant == "decode"
        paged = axes["page_size"] > 1
        rows = "batch_size" if decode else "total_q"
        inputs = latent_inputs(rows)
        if not decode:
            inputs["qo_indptr"] = tensor(["len_indptr"], "int32", "Query offsets per sequence.")
        inputs["kv_indptr"] = tensor(["len_indptr"], "int32", "Page offsets per sequence.")
        inputs["kv_indices"] = tensor(["num_kv_indices"], "int32", "Page ids, all sequences.")
        if paged:
            inputs["kv_last_page_len"] = tensor(
                ["batch_size"], "int32", "Valid tokens in each sequence's last page."
            )
        inputs["sm_scale"] = latent_scale()
        variable = {
            "num_pages": var("Pages in the KV cache."),
            "len_indptr": var("Length of the offset arrays (batch_size + 1)."),
            "num_kv_indices": var("Page ids in kv_indices."),
        }
        if decode or paged:
            variable["batch_size"] = var("Number of sequences.")
        if not decode:
            variable["total_q"] = var("Query tokens of all sequences.")
        reference = (
            _HEADER
            + _PAGED_BODY
            + (_LAST_PAGE if paged else "")
            + _PAGED_LOGITS
            + ("" if decode else _CAUSAL)
            + _ATTEND
        )
        what = "decode" if decode else "prefill, causal,"
        return {
            "description": (
                f"Batched multi-head latent attention {what} with a paged cache "
                f"(page_size={axes['page_size']})."
            ),
            "tags": [f"stage:{spec.variant}"],
            "axes": {**{a: const(axes[a], LATENT_AXES[a]) for a in axes}, **variable},
            "constraints": [
                "len_indptr == batch_size + 1" if decode else "total_q == qo_indptr[-1].item()",
                "num_kv_indices == kv_indptr[-1].item()",
            ],
            "inputs": inputs,
            "outputs": latent_outputs(rows),
            "reference": reference.format(
                arguments=", ".join(inputs),
                rows=rows,
                heads=axes["num_qo_heads"],
                ckv=axes["head_dim_ckv"],
                kpe=axes["head_dim_kpe"],
                page_size=axes["page_size"],
                span="b, b + 1" if decode else "int(qo_indptr[b]), int(qo_indptr[b + 1])",
                contraction="qhk,kd->qhd",
                values="ckv",
            ),
        }

    def rows(self, spec: KernelSpec, calls: Sequence[Call]) -> Iterator[Row | Rejected]:
        """One row per plan of the stage that is known to be run."""
        return rows_of_plans(calls, _PAGED, partial(self._row, spec))

    def _row(self, spec: KernelSpec, plan: Call, evidence: Evidence) -> Row:
        axes = spec.axes
        check_plan(plan, spec, _PLAN_NAMES)
        qo_indptr = offsets(plan, "qo_indptr")
        _check_stage(plan, spec.variant, qo_indptr, evidence)
        kv_indptr = offsets(plan, "kv_indptr")
        check_reach(plan, qo_indptr, kv_indptr)
        if not np.array_equal(lengths(plan, "kv_len_arr"), np.diff(kv_indptr)):
            raise DumpError(f"{plan.name}: kv_len_arr is not what kv_indptr says")
        stored = tables(plan, "kv_indptr", "kv_indices", axes["page_size"])
        decode = spec.variant == "decode"
        if decode:
            check_decode(plan, kv_indptr)
        row = paged_row(plan, spec, stored, None if decode else qo_indptr)
        query = (int(qo_indptr[-1]), axes["num_qo_heads"])
        cache = (None, 1)
        shapes = {
            "q_nope": (*query, axes["head_dim_ckv"]),
            "q_pe": (*query, axes["head_dim_kpe"]),
            "ckv_cache": (*cache, axes["head_dim_ckv"]),
            "kpe_cache": (*cache, axes["head_dim_kpe"]),
        }
        check_run(plan, evidence, partial(check_tensors, shapes=shapes))
        return row

    def baseline(self, spec: KernelSpec) -> str:
        """Plan and run the wrapper; it takes each sequence's length in tokens, not in pages."""
        decode = spec.variant == "decode"
        batch = "torch.arange(kv_indptr.shape[0], dtype=torch.int32, device=q_nope.device)"
        lengths = "kv_indptr.diff()"
        if spec.axes["page_size"] > 1:
            lengths = "(kv_indptr.diff() - 1).clamp(min=0) * ckv_cache.shape[1] + kv_last_page_len"
        return _PAGED_BASELINE.format(
            arguments=", ".join(self.definition(spec)["inputs"]),
            queries=batch if decode else "qo_indptr",
            lengths=lengths,
            causal=not decode,
        )


@register
class MlaRagged(OpModule):
    """Causal prefill over each head's own keys and values, which differ in dimension."""

    op_type = "mla_ragged"
    names = {"prefill": "mla_ragged_prefill_causal_h{num_qo_heads}_qk{qk_dim}_vo{vo_dim}"}
    apis = (wrapper_api("prefill", RAGGED, ("qo_indptr", "kv_indptr"), "ragged", _LAYER),)
    reference_test = f"{ATTEND_TEST}\n\n{RAGGED_TEST}"

    def mixes(self, kind: str, model: ModelConfig) -> bool:
        """Full attention, where the cache is latent and the attention not sparse."""
        return kind == "full_attention" and _is_dense(model)

    def required(self, model: ModelConfig, serving: Serving) -> Iterator[KernelSpec | NotProduced]:
        """One kernel per serving configuration."""
        if not _is_dense(model):
            return
        heads = latent_heads(model, serving)
        if isinstance(heads, NotProduced):
            yield heads
            return
        fields = model.fields
        qk = fields.required_size("qk_nope_head_dim") + fields.required_size("qk_rope_head_dim")
        if model.architecture == "MiniCPM3ForCausalLM":
            # Its config does not say: minicpm3.py takes the ordinary head dimension.
            vo = fields.size("v_head_dim") or model.head_dim
        else:
            vo = fields.required_size("v_head_dim")
        axes = {"num_qo_heads": heads, "num_kv_heads": heads, "qk_dim": qk, "vo_dim": vo}
        yield KernelSpec(
            name=self.name_of("prefill", axes),
            op_type=self.op_type,
            variant="prefill",
            axes=axes,
            tp=(serving.tp,),
            scalars={"sm_scale": softmax_scale(model)},
            origin=_origin(model, serving),
        )

    def provider(self, spec: KernelSpec) -> FlashInferApi:
        """The ragged wrapper, which SGLang uses for a prefill without a cached prefix."""
        (api,) = self.apis
        return api

    def implied(self, call: Call) -> KernelSpec | None:
        """By the plan's heads and dimensions, where keys and values differ.

        Not where it says that there is no causal mask, as for chunks of a cached prefix.
        """
        if call.name != f"{RAGGED}.plan":
            return None
        spec = planned(self, "prefill", call, _RAGGED_PLAN_NAMES)
        differ = spec and spec.axes["qk_dim"] != spec.axes["vo_dim"]
        return spec if differ and may_be_causal(call) else None

    def as_called(self, template: Json, spec: KernelSpec) -> tuple[Json, tuple[str, ...]]:
        """The template has one head dimension, which it reads from the queries."""
        axes = spec.axes
        heads = {name: axes[name] for name in ("num_qo_heads", "num_kv_heads")}
        if const_axes(template) != {**heads, "head_dim": axes["qk_dim"]}:
            return super().as_called(template, spec)
        corrected = copy.deepcopy(template)
        one = corrected["axes"].pop("head_dim")
        corrected["axes"] |= {name: {**one, "value": axes[name]} for name in ("qk_dim", "vo_dim")}
        for part, name, dim in (
            ("inputs", "q", "qk_dim"),
            ("inputs", "k", "qk_dim"),
            ("inputs", "v", "vo_dim"),
            ("outputs", "output", "vo_dim"),
        ):
            shape = corrected[part].get(name, {}).get("shape") or []
            shape[:] = [dim if axis == "head_dim" else axis for axis in shape]
        return corrected, (f"values of {axes['qk_dim']} elements, planned {axes['vo_dim']}",)

    def definition(self, spec: KernelSpec) -> Json:
        """Causal attention of each sequence's queries over its keys and values."""
        axes = spec.axes
        inputs = {
            "q": tensor(["total_q", "num_qo_heads", "qk_dim"], "bfloat16", "Queries."),
            "k": tensor(["total_kv", "num_kv_heads", "qk_dim"], "bfloat16", "Keys."),
            "v": tensor(["total_kv", "num_kv_heads", "vo_dim"], "bfloat16", "Values."),
            "qo_indptr": tensor(["len_indptr"], "int32", "Query offsets per sequence."),
            "kv_indptr": tensor(["len_indptr"], "int32", "Key-value offsets per sequence."),
            "sm_scale": latent_scale(),
        }
        output, extent = ["total_q", "num_qo_heads", "vo_dim"], ragged_extent()
        return {
            "description": "Batched multi-head latent attention prefill, causal, ragged inputs.",
            "tags": ["stage:prefill"],
            "axes": {**{a: const(axes[a], _RAGGED_AXES[a]) for a in axes}, **extent["axes"]},
            "constraints": extent["constraints"],
            "inputs": inputs,
            "outputs": {
                "output": tensor(output, "bfloat16", "Attention output."),
                "lse": tensor(output[:2], "float32", "2-based log-sum-exp of the logits."),
            },
            "reference": (_HEADER + _RAGGED_BODY + _CAUSAL + _ATTEND).format(
                arguments=", ".join(inputs),
                heads=axes["num_qo_heads"],
                qk=axes["qk_dim"],
                vo=axes["vo_dim"],
                contraction="qhk,khd->qhd",
                values="v_b",
            ),
        }

    def rows(self, spec: KernelSpec, calls: Sequence[Call]) -> Iterator[Row | Rejected]:
        """One row per ragged plan that is known to be run."""
        return rows_of_plans(calls, RAGGED, partial(self._row, spec))

    def _row(self, spec: KernelSpec, plan: Call, evidence: Evidence) -> Row:
        check_plan(plan, spec, _RAGGED_PLAN_NAMES)
        return ragged_row(plan, spec, evidence, _RAGGED_ROLES)

    def baseline(self, spec: KernelSpec) -> str:
        """Plan and run the wrapper."""
        return ragged_baseline(self.definition(spec)["inputs"])
