"""gqa_paged and gqa_ragged: grouped-query attention over a paged or a contiguous KV cache.

Head counts are those one tensor-parallel rank sees: query heads divided by tp, KV heads divided by
tp and replicated once there are fewer than tp (sglang/srt/models: `max(1, num_kv_heads // tp)`).

SGLang prefills with the ragged wrapper unless told otherwise. It then plans the paged prefill
wrapper too, for the cached prefix of each request, and runs it without a mask and only where there
is a prefix (`flashinfer_backend.py: forward_extend`): which plans count says `plans.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Literal

from tasks.model import SOFTMAX, ModelConfig, Serving
from tasks.ops.base import (
    SLOW_REFERENCE,
    Call,
    DumpError,
    Effort,
    FlashInferApi,
    Hint,
    Json,
    KernelSpec,
    MetaTensor,
    NotProduced,
    OpModule,
    Rejected,
    Requirement,
    Row,
    Scalar,
    TemplateCall,
    Unmapped,
    const,
    const_axes,
    register,
    scalar,
    tensor,
    var,
)
from tasks.ops.plans import (
    DTYPE,
    RAGGED,
    Evidence,
    check_causal,
    check_decode,
    check_plan,
    check_reach,
    check_run,
    check_tensors,
    dtype_name,
    may_be_causal,
    offsets,
    paged_row,
    planned,
    ragged_row,
    rows_of_plans,
    shown,
    tables,
)

_UNSCALED_MODEL_TYPES = ("gemma3n", "gemma4")
"""Models that normalise q and k and do not scale (`gemma3n_causal.py`, `gemma4_causal.py`)."""
_REFUSED = {
    "gpt_oss": "SGLang serves it with other attention backends only (server_args.py: GptOss)",
    "llama4": "SGLang serves it with other attention backends only (server_args.py: Llama4)",
    "gemma4": "SGLang serves it with other attention backends only (server_args.py: Gemma4)",
}
"""Model types that SGLang 0.5.17's server arguments refuse to serve with the flashinfer backend."""
_BEYOND = {
    "attn_logit_softcapping": "logits are capped",
    "attn_logit_cap": "logits are capped",
}
"""Fields of attention that does more than the definitions, and what."""
_PAGED_PREFILL = (
    "multimodal models prefill with the paged wrapper (flashinfer_backend.py: use_ragged)"
)
_SINKS = ("gpt_oss",)
"""Model types whose softmax has a learned term that belongs to no key (`gpt_oss.py: sinks`)."""
_LAYER = "python/sglang/srt/layers/attention/flashinfer_backend.py"
FLAGS = ("--attention-backend flashinfer",)
_DECODE = "BatchDecodeWithPagedKVCacheWrapper"
_PAGED = "BatchPrefillWithPagedKVCacheWrapper"
_TABLES = {
    "decode": ("indptr", "indices"),
    "prefill": ("paged_kv_indptr", "paged_kv_indices"),
}
"""Stage -> its plan's parameters for each sequence's offset and the tokens' slots."""

_HEADER = """\
import math

import torch


@torch.no_grad()
def run({arguments}):
"""

_ATTEND = """\
        k_b = k_b.repeat_interleave(num_qo_heads // num_kv_heads, dim=1)
        v_b = v_b.repeat_interleave(num_qo_heads // num_kv_heads, dim=1)
        logits = torch.einsum("qhd,khd->qhk", q_b, k_b) * sm_scale
        lengths = torch.arange(q_b.shape[0], device=q.device) + 1 + k_b.shape[0] - q_b.shape[0]
        visible = torch.arange(k_b.shape[0], device=q.device)[None, :] < lengths[:, None]
        logits = logits.masked_fill(~visible[:, None, :], -float("inf"))
        lse[first:end] = torch.logsumexp(logits, dim=-1) / math.log(2.0)
        weights = torch.nan_to_num(torch.softmax(logits, dim=-1))
        output[first:end] = torch.einsum("qhk,khd->qhd", weights, v_b).to(output.dtype)
"""

_PAGED_BODY = """\
    {total}, num_qo_heads, head_dim = q.shape
    _, page_size, num_kv_heads, _ = k_cache.shape
    assert num_qo_heads == {heads}
    assert num_kv_heads == {kv_heads}
    assert head_dim == {dim}
    assert page_size == {page_size}

    output = torch.zeros_like(q)
    lse = torch.full(q.shape[:2], -float("inf"), dtype=torch.float32, device=q.device)
    for b in range(kv_indptr.shape[0] - 1):
        first_page, end_page = int(kv_indptr[b]), int(kv_indptr[b + 1])
        first, end = {span}
        if first_page >= end_page or first >= end:
            continue
        pages = kv_indices[first_page:end_page].to(torch.long)
        q_b = q[first:end].to(torch.float32)
        k_b = k_cache[pages].to(torch.float32).reshape(-1, num_kv_heads, head_dim)
        v_b = v_cache[pages].to(torch.float32).reshape(-1, num_kv_heads, head_dim)
"""

_LAST_PAGE = """\
        length = (pages.shape[0] - 1) * page_size + int(kv_last_page_len[b])
        k_b, v_b = k_b[:length], v_b[:length]
"""

_RAGGED_BODY = """\
    total_q, num_qo_heads, head_dim = q.shape
    total_kv, num_kv_heads, _ = k.shape
    assert num_qo_heads == {heads}
    assert num_kv_heads == {kv_heads}
    assert head_dim == {dim}

    output = torch.zeros_like(q)
    lse = torch.full(q.shape[:2], -float("inf"), dtype=torch.float32, device=q.device)
    for b in range(qo_indptr.shape[0] - 1):
        first, end = int(qo_indptr[b]), int(qo_indptr[b + 1])
        first_kv, end_kv = int(kv_indptr[b]), int(kv_indptr[b + 1])
        if first >= end or first_kv >= end_kv:
            continue
        q_b = q[first:end].to(torch.float32)
        k_b = k[first_kv:end_kv].to(torch.float32)
        v_b = v[first_kv:end_kv].to(torch.float32)
"""

_RETURN = "    return output, lse\n"

_WRAPPER = """\
import flashinfer
import torch

_state = {{}}


def _wrapper(device):
    if device not in _state:
        workspace = torch.empty(256 * 1024 * 1024, dtype=torch.uint8, device=device)
        _state[device] = flashinfer.{wrapper}(workspace, {layout})
    return _state[device]


"""

_DECODE_BASELINE = """\
def run({arguments}):
    wrapper = _wrapper(q.device)
    {last_page}
    wrapper.plan(
        kv_indptr,
        kv_indices,
        last_page_len,
        num_qo_heads=q.shape[1],
        num_kv_heads=k_cache.shape[2],
        head_dim=q.shape[2],
        page_size=k_cache.shape[1],
        q_data_type=q.dtype,
        kv_data_type=k_cache.dtype,
        sm_scale=float(sm_scale),
    )
    return wrapper.run(q, (k_cache, v_cache), return_lse=True)
"""

_PAGED_BASELINE = """\
def run({arguments}):
    wrapper = _wrapper(q.device)
    {last_page}
    wrapper.plan(
        qo_indptr,
        kv_indptr,
        kv_indices,
        last_page_len,
        num_qo_heads=q.shape[1],
        num_kv_heads=k_cache.shape[2],
        head_dim_qk=q.shape[2],
        page_size=k_cache.shape[1],
        causal=True,
        sm_scale=float(sm_scale),
        q_data_type=q.dtype,
        kv_data_type=k_cache.dtype,
    )
    return wrapper.run(q, (k_cache, v_cache), return_lse=True)
"""

_RAGGED_BASELINE = """\
def run({arguments}):
    wrapper = _wrapper(q.device)
    wrapper.plan(
        qo_indptr,
        kv_indptr,
        num_qo_heads=q.shape[1],
        num_kv_heads=k.shape[1],
        head_dim_qk=q.shape[2],
        head_dim_vo=v.shape[2],
        causal=True,
        sm_scale=float(sm_scale),
        q_data_type=q.dtype,
        kv_data_type=k.dtype,
    )
    return wrapper.run(q, k, v, return_lse=True)
"""

ATTEND_TEST = '''\
# Not 1/sqrt(dim): the input is what decides.
SM_SCALE = 0.15


def complete(generator, sizes, given):
    """Return the definition's inputs in order: those given, and random values for the others."""
    sizes = {**CONST, **sizes}
    return {
        name: given[name]
        if name in given
        else random(generator, *[sizes[axis] for axis in declared["shape"]])
        for name, declared in DEFINITION["inputs"].items()
    }


def attend(q, k, v, visible, scale):
    """Attend from `q` [queries, heads, dim] to `k` and `v` [keys, key heads, dim] in float64.

    `visible` [queries, keys] says which keys a query sees. Returns the output, 0 for a query that
    sees none, and the log-sum-exp of the logits to base 2.
    """
    queries, group = q.shape[0], q.shape[1] // k.shape[1]
    # The query heads that share a key head become further queries of that head.
    q = q.double().unflatten(1, (-1, group)).permute(1, 2, 0, 3).flatten(1, 2)
    k, v = k.double().transpose(0, 1), v.double().transpose(0, 1)
    mask = visible.repeat(group, 1)
    output = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    output[:, ~mask.any(dim=1)] = 0.0
    powers = torch.exp2(q @ k.mT * (scale * math.log2(math.e)))
    lse = torch.log2((powers * mask).sum(dim=-1, keepdim=True))
    output, lse = (
        x.unflatten(1, (group, queries)).permute(2, 0, 1, 3).flatten(1, 2) for x in (output, lse)
    )
    return output, lse[..., 0]


def causal(queries, keys):
    """Return which keys each query sees, both counted back from the sequence's last token."""
    return torch.arange(-keys, 0) <= torch.arange(-queries, 0)[:, None]


def assert_attention(outputs, expected, kernel):
    """Compare with what `attend` returned for consecutive queries."""
    output, lse = (torch.cat(parts) for parts in zip(*expected, strict=True))
    # FlashInfer's decode does not write the rows of a sequence without keys; none is ever served.
    rows = lse.isfinite().all(dim=1) if kernel else slice(None)
    # Averages of values of order 1. Kernels round the weights to bfloat16 before the average, which
    # came to 0.0023 at most on a GPU.
    assert_close(outputs["output"][rows], output[rows], kernel, loose=2.0**-6)
    # As large as the largest logit, 16 and more. Kernels keep it in float32 too, with approximate
    # powers of two: 2^-10 of 16 is 2^-6.
    assert_close(outputs["lse"][rows], lse[rows], kernel, loose=2.0**-10, size=16.0)
'''
"""In reference tests: inputs and an independent computation of softmax attention."""

HIDE_TEST = '''\
def hide(inputs, slots):
    """Overwrite the paged caches with NaN, except in these slots: nothing else is to be read."""
    for name, declared in DEFINITION["inputs"].items():
        if declared["shape"] and declared["shape"][0] == "num_pages":
            cache = inputs[name].flatten(0, 1)
            kept = cache[slots].clone()
            cache[:] = float("nan")
            cache[slots] = kept
    return inputs
'''
"""In reference tests: a paged cache of which only some slots may be read."""

PAGED_TEST = '''\
PAGE = CONST["page_size"]
# Queries and keys of each sequence: a partly filled last page, an empty sequence, one token, a page
# exactly, one token more, and keys for several tiles of a kernel whatever the page.
SEQUENCES = [(1, 2 * PAGE + 3), (1, 0), (1, 1), (1, PAGE), (1, PAGE + 1), (1, 203)]
if VARIANT == "prefill":
    # No cached prefix, an empty sequence, one token, nothing new, and queries behind a prefix.
    SEQUENCES = [(3, 3), (0, 0), (1, 1), (0, 5), (2, PAGE + 1), (4, 2 * PAGE + 3), (1, PAGE)]
    SEQUENCES.append((2, 203))


def paged(sequences):
    generator, lengths = seeded(len(sequences)), [keys for _, keys in sequences]
    queries = [count for count, _ in sequences]
    pages = [math.ceil(length / PAGE) for length in lengths]
    # Shuffled, and there are pages that no sequence has.
    shuffled = torch.randperm(sum(pages) + 3, generator=generator)[: sum(pages)]
    given = {
        "qo_indptr": offsets(queries),
        "kv_indptr": offsets(pages),
        "kv_indices": shuffled.to(torch.int32),
        "kv_last_page_len": torch.tensor(
            [(length - 1) % PAGE + 1 if length else 0 for length in lengths], dtype=torch.int32
        ),
        "sm_scale": SM_SCALE,
    }
    total = sum(queries)
    sizes = {"batch_size": total, "total_q": total, "num_pages": sum(pages) + 3}
    inputs = complete(generator, sizes, given)
    return hide(inputs, sum(slots_of(inputs), []))


CASES = {
    "one sequence": lambda: paged(SEQUENCES[:1]),
    "several sequences": lambda: paged(SEQUENCES),
}


def slots_of(inputs):
    """Return each sequence's tokens in order, counted through the cache page after page."""
    indptr, indices = inputs["kv_indptr"].tolist(), inputs["kv_indices"].tolist()
    sequences = []
    for sequence, (first, end) in enumerate(zip(indptr[:-1], indptr[1:], strict=True)):
        slots = [page * PAGE + slot for page in indices[first:end] for slot in range(PAGE)]
        if PAGE > 1 and slots:
            slots = slots[: len(slots) - PAGE + int(inputs["kv_last_page_len"][sequence])]
        sequences.append(slots)
    return sequences


def attend_all(inputs, q, k, v):
    """Attend from each sequence's queries to its tokens, gathered from the flattened caches."""
    slots = slots_of(inputs)
    lengths = inputs["qo_indptr"].diff().tolist() if VARIANT == "prefill" else [1] * len(slots)
    return [
        attend(q_b, k[own], v[own], causal(len(q_b), len(own)), inputs["sm_scale"])
        for q_b, own in zip(q.split(lengths), slots, strict=True)
    ]
'''
"""In reference tests: sequences in pages, for decode and prefill; `check` is to follow."""

_PAGED_TEST = """\
def check(inputs, outputs, kernel):
    k, v = inputs["k_cache"].flatten(0, 1), inputs["v_cache"].flatten(0, 1)
    assert_attention(outputs, attend_all(inputs, inputs["q"], k, v), kernel)
"""

RAGGED_TEST = """\
# Queries and keys of each sequence: no cached prefix, an empty sequence, one token, nothing new,
# queries behind a prefix, one of which is several tiles of a kernel long.
SEQUENCES = [(3, 3), (0, 0), (1, 1), (0, 5), (2, 9), (7, 203), (1, 8)]


def ragged(sequences):
    queries, keys = ([sequence[i] for sequence in sequences] for i in range(2))
    given = {"qo_indptr": offsets(queries), "kv_indptr": offsets(keys), "sm_scale": SM_SCALE}
    sizes = {"total_q": sum(queries), "total_kv": sum(keys)}
    return complete(seeded(len(sequences)), sizes, given)


CASES = {
    "one sequence": lambda: ragged(SEQUENCES[:1]),
    "several sequences": lambda: ragged(SEQUENCES),
}


def check(inputs, outputs, kernel):
    q, k, v = (
        inputs[name].split(inputs[lengths].diff().tolist())
        for name, lengths in (("q", "qo_indptr"), ("k", "kv_indptr"), ("v", "kv_indptr"))
    )
    expected = [
        attend(q_b, k_b, v_b, causal(len(q_b), len(k_b)), inputs["sm_scale"])
        for q_b, k_b, v_b in zip(q, k, v, strict=True)
    ]
    assert_attention(outputs, expected, kernel)
"""
"""In reference tests: consecutive sequences, and the check."""


def _shards(
    model: ModelConfig, serving: Serving
) -> Iterator[tuple[dict[str, int], Scalar, str] | NotProduced | Unmapped]:
    """Yield one rank's head counts and head_dim, the scale and the origin, per kind of layer."""
    for attention, layers in model.attentions.items():
        heads, kv_heads, dim = attention.num_heads, attention.num_kv_heads, attention.head_dim
        rank = attention.heads_of_rank(serving.tp)
        if attention.v_head_dim != dim:
            yield Unmapped(
                f"attention of {layers} layers",
                f"keys are {dim} and values {attention.v_head_dim} wide; paged and ragged GQA "
                "definitions have one head_dim",
            )
        elif rank is None:
            yield NotProduced(
                f"attention at tp={serving.tp}",
                f"tp={serving.tp} does not divide {heads} query and {kv_heads} KV heads",
            )
        else:
            axes = {"num_qo_heads": rank[0], "num_kv_heads": rank[1], "head_dim": dim}
            origin = (
                f"{heads} query and {kv_heads} KV heads at tp={serving.tp} ({serving.origin})"
                f"{_beyond(model)}"
            )
            yield axes, _softmax_scale(model, dim), origin


def _beyond(model: ModelConfig) -> str:
    """Say what the model's attention does that the definitions do not."""
    more = [what for field, what in _BEYOND.items() if model.fields.has(field)]
    if model.model_type in _SINKS:
        more.append("heads have sinks")
    return f"; beyond the definition: {', '.join(dict.fromkeys(more))}" if more else ""


def _not_served(model: ModelConfig) -> str:
    return next((why for kind, why in _REFUSED.items() if model.model_type.startswith(kind)), "")


def _softmax_scale(model: ModelConfig, head_dim: int) -> Scalar:
    """The attention scale as SGLang's model files compute it."""
    for field, power in (("query_pre_attn_scalar", -0.5), ("attention_multiplier", 1.0)):
        value = model.fields.number(field)
        if value is not None:
            return Scalar(value=value**power, source=f"config.json {field} = {value:g}")
    if model.model_type.startswith(_UNSCALED_MODEL_TYPES):
        return Scalar(value=1.0, source=f"scaling of SGLang's model file for {model.model_type}")
    return Scalar(
        value=1 / math.sqrt(head_dim),
        source=f"1/sqrt(head_dim) with config.json head_dim = {head_dim}",
    )


def _plan_names(stage: str) -> dict[str, str]:
    """Return const axis -> a plan's parameter."""
    return {
        "num_qo_heads": "num_qo_heads",
        "num_kv_heads": "num_kv_heads",
        "head_dim": "head_dim" if stage == "decode" else "head_dim_qk",
    }


def _check_value_dim(call: Call, head_dim: int) -> None:
    """Check that values are as wide as keys, unless the plan leaves that to FlashInfer.

    Raises:
        DumpError: they are not.
    """
    value_dim = call.values.get("head_dim_vo")
    if value_dim not in (None, head_dim):
        raise DumpError(
            f"{call.name}: head_dim_vo is {shown(value_dim)}, the definition has {head_dim}"
        )


def _check_paged_run(run: Call, *, axes: Mapping[str, int], rows: int, pages: int) -> None:
    """Check one run of a paged wrapper against the definition and its plan.

    Raises:
        DumpError: the queries or the pool are not those of the definition, or too few.
    """
    heads, kv_heads, dim = axes["num_qo_heads"], axes["num_kv_heads"], axes["head_dim"]
    check_tensors(run, {"q": (rows, heads, dim)})
    for shape, dtype in _caches(run):
        if dtype != DTYPE:
            raise DumpError(f"{run.name}: the KV cache is {dtype}, the definition has {DTYPE}")
        # SGLang's pool is [slots, heads, dim]; with the page size of 1 that it plans, the same as
        # [slots, 1, heads, dim].
        if math.prod(shape[1:-1]) != kv_heads or shape[-1] != dim:
            raise DumpError(f"{run.name}: the KV cache is {shape}, expected [?, {kv_heads}, {dim}]")
        if shape[0] < pages:
            raise DumpError(f"{run.name}: a KV cache of {shape[0]} slots, slot {pages - 1} planned")


def _caches(run: Call) -> Iterator[tuple[list[int], str | None]]:
    """Yield shape and data type of a run's key and value cache, as far as they were dumped."""
    pair = run.values.get("paged_kv_cache")
    items = pair.get("items") if isinstance(pair, Mapping) else None
    for item in items if isinstance(items, list) else ():
        shape = item.get("shape") if isinstance(item, Mapping) else None
        if not isinstance(shape, list) or not shape or not all(type(n) is int for n in shape):
            raise DumpError(f"{run.name}: the KV cache's shape is {shown(shape)}")
        yield shape, dtype_name(item.get("dtype"))


_RAGGED_ROLES = {
    "heads": "num_qo_heads",
    "kv_heads": "num_kv_heads",
    "qk": "head_dim",
    "vo": "head_dim",
}
_NAME = "h{num_qo_heads}_kv{num_kv_heads}_d{head_dim}"
_AXES = {
    "num_qo_heads": "Query heads of one rank.",
    "num_kv_heads": "Key-value heads of one rank.",
    "head_dim": "Dimension of one head.",
    "page_size": "Tokens in one page of the KV cache.",
}


_PAGED_INSTEAD = "prefills with the paged wrapper"
_HINTS = {
    "": Hint(),
    "paged": Hint(
        text="set SGLANG_FLASHINFER_USE_PAGED=1: SGLang prefills with the ragged wrapper by default"
    ),
    "ragged": Hint(
        text="SGLang prefills multimodal models, and with piecewise CUDA graphs, with the paged "
        "wrapper",
        not_with={
            "enable_deterministic_inference": _PAGED_INSTEAD,
            "SGLANG_FLASHINFER_USE_PAGED": _PAGED_INSTEAD,
        },
    ),
}


def wrapper_api(
    module: str,
    wrapper: str,
    reads: Sequence[str],
    prefill: Literal["", "paged", "ragged"] = "",
    layer: str = _LAYER,
) -> FlashInferApi:
    """Return a batch wrapper that a flashinfer attention backend of SGLang plans and runs."""
    return FlashInferApi(
        path=f"flashinfer.{module}.{wrapper}",
        method="run",
        dumps=(f"{wrapper}.plan", f"{wrapper}.run"),
        server_flags=FLAGS,
        sglang_layer=layer,
        reads=tuple(reads),
        prefill=prefill,
        hint=_HINTS[prefill],
    )


def ragged_extent() -> Json:
    """Return the var axes and the constraints of a prefill over ragged inputs."""
    return {
        "axes": {
            "len_indptr": var("Length of the offset arrays (batch_size + 1)."),
            "total_q": var("Query tokens of all sequences."),
            "total_kv": var("Key-value tokens of all sequences."),
        },
        "constraints": ["total_q == qo_indptr[-1].item()", "total_kv == kv_indptr[-1].item()"],
    }


def ragged_baseline(inputs: Json) -> str:
    """Return the source that plans and runs the ragged wrapper; keys and values may differ."""
    head = _WRAPPER.format(wrapper=RAGGED, layout='"NHD"')
    return head + _RAGGED_BASELINE.format(arguments=", ".join(inputs))


@register
class GqaPaged(OpModule):
    """Decode and causal prefill over a paged KV cache."""

    op_type = "gqa_paged"
    names = {
        "decode": f"gqa_paged_decode_{_NAME}_ps{{page_size}}",
        "prefill": f"gqa_paged_prefill_causal_{_NAME}_ps{{page_size}}",
    }
    apis = (
        wrapper_api("decode", _DECODE, _TABLES["decode"]),
        wrapper_api("prefill", _PAGED, ("qo_indptr", *_TABLES["prefill"]), prefill="paged"),
    )
    reference_test = f"{ATTEND_TEST}\n\n{HIDE_TEST}\n\n{PAGED_TEST}\n\n{_PAGED_TEST}"

    def mixes(self, kind: str, model: ModelConfig) -> bool:
        """Softmax attention with keys and values of its own."""
        return kind in SOFTMAX and not model.is_mla

    def required(self, model: ModelConfig, serving: Serving) -> Iterator[Requirement]:
        """Both stages at every page size, for every kind of attention layer."""
        for shard in _shards(model, serving):
            if isinstance(shard, NotProduced | Unmapped):
                yield shard
                continue
            heads, scale, origin = shard
            for stage, page_size in product(("decode", "prefill"), serving.page_sizes):
                axes = {**heads, "page_size": page_size}
                yield KernelSpec(
                    name=self.name_of(stage, axes),
                    op_type=self.op_type,
                    variant=stage,
                    axes=axes,
                    tp=(serving.tp,),
                    scalars={"sm_scale": scale},
                    origin=(origin,),
                    not_served=_not_served(model),
                )

    def provider(self, spec: KernelSpec) -> FlashInferApi:
        """The batch wrappers that SGLang's flashinfer attention backend plans and runs."""
        api = self.apis[0 if spec.variant == "decode" else 1]
        page_size = spec.axes["page_size"]
        if page_size == 1:
            return api
        return replace(api, server_flags=(*FLAGS, f"--page-size {page_size}"))

    def template_call(self, spec: KernelSpec) -> TemplateCall:
        """Caches of 64 pages."""
        axes = spec.axes
        pages = (64, axes["page_size"], axes["num_kv_heads"], axes["head_dim"])
        cache = MetaTensor(pages, "bfloat16")
        decode = spec.variant == "decode"
        rows = 8 if decode else 100
        arguments: dict[str, MetaTensor | tuple[MetaTensor, ...]] = {
            "q": MetaTensor((rows, axes["num_qo_heads"], axes["head_dim"]), "bfloat16"),
            "paged_kv_cache": (cache, cache),
            "kv_indptr": MetaTensor((9,), "int32"),
            "kv_indices": MetaTensor((40,), "int32"),
        }
        if not decode:
            arguments["qo_indptr"] = MetaTensor((9,), "int32")
        wrapper = f"decode:{_DECODE}" if decode else f"prefill:{_PAGED}"
        return TemplateCall(f"flashinfer.{wrapper}.run", arguments)

    def definition(self, spec: KernelSpec) -> Json:
        """Attention of each sequence's queries over its pages, with the 2-based log-sum-exp."""
        axes, decode = spec.axes, spec.variant == "decode"
        page_size, rows = axes["page_size"], "batch_size" if decode else "total_q"
        query = [rows, "num_qo_heads", "head_dim"]
        cache = ["num_pages", "page_size", "num_kv_heads", "head_dim"]
        inputs = {
            "q": tensor(query, "bfloat16", "Queries."),
            "k_cache": tensor(cache, "bfloat16", "Paged key cache."),
            "v_cache": tensor(cache, "bfloat16", "Paged value cache."),
        }
        if not decode:
            inputs["qo_indptr"] = tensor(["len_indptr"], "int32", "Query offsets per sequence.")
        inputs["kv_indptr"] = tensor(["len_indptr"], "int32", "Page offsets per sequence.")
        inputs["kv_indices"] = tensor(["num_kv_indices"], "int32", "Page ids, all sequences.")
        if page_size > 1:
            inputs["kv_last_page_len"] = tensor(
                ["batch_size"], "int32", "Valid tokens in each sequence's last page."
            )
        inputs["sm_scale"] = scalar("float32", "Softmax scale.")
        variable = {
            "num_pages": var("Pages in the KV cache."),
            "len_indptr": var("Length of the offset arrays (batch_size + 1)."),
            "num_kv_indices": var("Page ids in kv_indices."),
        }
        if decode or page_size > 1:
            variable["batch_size"] = var("Number of sequences.")
        if not decode:
            variable["total_q"] = var("Query tokens of all sequences.")
        constraints = ["num_kv_indices == kv_indptr[-1].item()"]
        constraints.insert(
            0, "len_indptr == batch_size + 1" if decode else "total_q == qo_indptr[-1].item()"
        )
        reference = _HEADER + _PAGED_BODY + (_LAST_PAGE if page_size > 1 else "") + _ATTEND
        what = "decode" if decode else "prefill, causal,"
        return {
            "description": (
                f"Batched grouped-query attention {what} with a paged KV cache "
                f"(page_size={page_size})."
            ),
            "tags": [f"stage:{spec.variant}"],
            "axes": {**{a: const(axes[a], text) for a, text in _AXES.items()}, **variable},
            "constraints": constraints,
            "inputs": inputs,
            "outputs": {
                "output": tensor(query, "bfloat16", "Attention output."),
                "lse": tensor(query[:2], "float32", "2-based log-sum-exp of the logits."),
            },
            "reference": (reference + _RETURN).format(
                arguments=", ".join(inputs),
                total=rows,
                heads=axes["num_qo_heads"],
                kv_heads=axes["num_kv_heads"],
                dim=axes["head_dim"],
                page_size=page_size,
                span="b, b + 1" if decode else "int(qo_indptr[b]), int(qo_indptr[b + 1])",
            ),
        }

    def implied(self, call: Call) -> KernelSpec | None:
        """By the plan's heads, head dimension and page size, unless it says no causal mask."""
        stages = {f"{_DECODE}.plan": "decode", f"{_PAGED}.plan": "prefill"}
        if call.name not in stages:
            return None
        stage = stages[call.name]
        spec = planned(self, stage, call, {**_plan_names(stage), "page_size": "page_size"})
        masked = stage == "decode" or may_be_causal(call)
        whole = spec and call.values.get("head_dim_vo") in (None, spec.axes["head_dim"])
        return spec if masked and whole else None

    def as_called(self, template: Json, spec: KernelSpec) -> tuple[Json, tuple[str, ...]]:
        """SGLang's pool is [slots, heads, head_dim], a template reads [pages, page_size, ...]."""
        axes = spec.axes
        misread = {"page_size": axes["num_kv_heads"], "num_kv_heads": axes["head_dim"]}
        if const_axes(template) != {**axes, **misread}:
            return super().as_called(template, spec)
        corrected = {name: {**template["axes"][name], "value": axes[name]} for name in misread}
        told = tuple(f"{name} {misread[name]}, planned {axes[name]}" for name in misread)
        return {**template, "axes": {**template["axes"], **corrected}}, told

    def rows(self, spec: KernelSpec, calls: Sequence[Call]) -> Iterator[Row | Rejected]:
        """One row per plan that is known to be run."""
        wrapper = _DECODE if spec.variant == "decode" else _PAGED
        return rows_of_plans(calls, wrapper, partial(self._row, spec))

    def _row(self, spec: KernelSpec, plan: Call, evidence: Evidence) -> Row:
        axes, stage = spec.axes, spec.variant
        check_plan(plan, spec, {**_plan_names(stage), "page_size": "page_size"})
        _check_value_dim(plan, axes["head_dim"])
        if stage != "decode":
            check_causal(plan, evidence, paged=True)
        stored = tables(plan, *_TABLES[stage], axes["page_size"])
        qo_indptr = None
        if stage == "decode":
            check_decode(plan, stored["kv_indptr"])
        else:
            qo_indptr = offsets(plan, "qo_indptr")
            check_reach(plan, qo_indptr, offsets(plan, _TABLES[stage][0]))
        row = paged_row(plan, spec, stored, qo_indptr)
        rows = row.axes["batch_size" if stage == "decode" else "total_q"]
        pages = row.axes["num_pages"] * axes["page_size"]
        check_run(plan, evidence, partial(_check_paged_run, axes=axes, rows=rows, pages=pages))
        return row

    def baseline(self, spec: KernelSpec) -> str:
        """Plan and run the wrapper; the workspace is allocated once per device."""
        decode = spec.variant == "decode"
        arguments = ", ".join(self.definition(spec)["inputs"])
        last = "last_page_len = kv_last_page_len"
        if spec.axes["page_size"] == 1:
            last = "last_page_len = torch.ones_like(kv_indptr[1:])"
        head = _WRAPPER.format(wrapper=_DECODE if decode else _PAGED, layout='"NHD"')
        body = _DECODE_BASELINE if decode else _PAGED_BASELINE
        return head + body.format(arguments=arguments, last_page=last)

    def effort(self, spec: KernelSpec) -> Effort:
        """The reference of prefill computes token by token, head by head."""
        return SLOW_REFERENCE if spec.variant == "prefill" else Effort()


@register
class GqaRagged(OpModule):
    """Causal prefill over contiguous keys and values."""

    op_type = "gqa_ragged"
    names = {"prefill": f"gqa_ragged_prefill_causal_{_NAME}"}
    apis = (wrapper_api("prefill", RAGGED, ("qo_indptr", "kv_indptr"), prefill="ragged"),)
    reference_test = f"{ATTEND_TEST}\n\n{RAGGED_TEST}"

    def mixes(self, kind: str, model: ModelConfig) -> bool:
        """Softmax attention with keys and values of its own."""
        return kind in SOFTMAX and not model.is_mla

    def required(self, model: ModelConfig, serving: Serving) -> Iterator[Requirement]:
        """One kernel for every kind of attention layer."""
        for shard in _shards(model, serving):
            if isinstance(shard, NotProduced | Unmapped):
                yield shard
                continue
            axes, scale, origin = shard
            yield KernelSpec(
                name=self.name_of("prefill", axes),
                op_type=self.op_type,
                variant="prefill",
                axes=axes,
                tp=(serving.tp,),
                scalars={"sm_scale": scale},
                origin=(origin,),
                not_served=_not_served(model)
                or (_PAGED_PREFILL if model.fields.has("vision_config", "audio_config") else ""),
            )

    def provider(self, spec: KernelSpec) -> FlashInferApi:
        """The ragged wrapper, which SGLang uses for prefill unless told otherwise."""
        return self.apis[0]

    def template_call(self, spec: KernelSpec) -> TemplateCall:
        """Queries, keys and values of 100 tokens in 8 sequences."""
        axes = spec.axes
        kv = MetaTensor((100, axes["num_kv_heads"], axes["head_dim"]), "bfloat16")
        return TemplateCall(
            f"flashinfer.prefill:{RAGGED}.run",
            {
                "q": MetaTensor((100, axes["num_qo_heads"], axes["head_dim"]), "bfloat16"),
                "k": kv,
                "v": kv,
                "qo_indptr": MetaTensor((9,), "int32"),
                "kv_indptr": MetaTensor((9,), "int32"),
            },
        )

    def definition(self, spec: KernelSpec) -> Json:
        """Causal attention of each sequence's queries over its keys and values."""
        axes = spec.axes
        query = ["total_q", "num_qo_heads", "head_dim"]
        kv = ["total_kv", "num_kv_heads", "head_dim"]
        inputs = {
            "q": tensor(query, "bfloat16", "Queries."),
            "k": tensor(kv, "bfloat16", "Keys."),
            "v": tensor(kv, "bfloat16", "Values."),
            "qo_indptr": tensor(["len_indptr"], "int32", "Query offsets per sequence."),
            "kv_indptr": tensor(["len_indptr"], "int32", "Key-value offsets per sequence."),
            "sm_scale": scalar("float32", "Softmax scale."),
        }
        constant = {a: const(axes[a], text) for a, text in _AXES.items() if a in axes}
        extent = ragged_extent()
        return {
            "description": "Batched grouped-query attention prefill, causal, ragged inputs.",
            "tags": ["stage:prefill"],
            "axes": {**constant, **extent["axes"]},
            "constraints": extent["constraints"],
            "inputs": inputs,
            "outputs": {
                "output": tensor(query, "bfloat16", "Attention output."),
                "lse": tensor(query[:2], "float32", "2-based log-sum-exp of the logits."),
            },
            "reference": (_HEADER + _RAGGED_BODY + _ATTEND + _RETURN).format(
                arguments=", ".join(inputs),
                heads=axes["num_qo_heads"],
                kv_heads=axes["num_kv_heads"],
                dim=axes["head_dim"],
            ),
        }

    def implied(self, call: Call) -> KernelSpec | None:
        """By the plan's heads and head dimension, where keys and values have one.

        Not where it says that there is no causal mask.
        """
        if call.name != f"{RAGGED}.plan":
            return None
        spec = planned(self, "prefill", call, _plan_names("prefill"))
        same = spec and call.values.get("head_dim_vo") in (None, spec.axes["head_dim"])
        return spec if same and may_be_causal(call) else None

    def rows(self, spec: KernelSpec, calls: Sequence[Call]) -> Iterator[Row | Rejected]:
        """One row per ragged plan that is known to be run."""
        return rows_of_plans(calls, RAGGED, partial(self._row, spec))

    def _row(self, spec: KernelSpec, plan: Call, evidence: Evidence) -> Row:
        check_plan(plan, spec, _plan_names("prefill"))
        _check_value_dim(plan, spec.axes["head_dim"])
        return ragged_row(plan, spec, evidence, _RAGGED_ROLES)

    def baseline(self, spec: KernelSpec) -> str:
        """Plan and run the wrapper."""
        return ragged_baseline(self.definition(spec)["inputs"])

    def effort(self, spec: KernelSpec) -> Effort:
        """The reference computes token by token, head by head."""
        return SLOW_REFERENCE
