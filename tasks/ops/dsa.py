"""dsa_paged: DeepSeek sparse attention, a latent attention that reads only chosen tokens.

A small indexer scores every cached token for each query and keeps the best `index_topk`; the sparse
attention then reads only those from the latent cache (DeepSeek-V3.2, GLM-5).

Query heads are sharded as in mla.py. The indexer's are not: its projections are replicated
(sglang/srt/layers/attention/dsa/dsa_indexer.py: Indexer, `self.n_heads = index_n_heads`), and its
cache has pages of 64 tokens whatever the serving options (`assert page_size == 64` there and in
sglang/srt/mem_cache/memory_pool.py: DSATokenToKVPool).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress

import numpy as np

from tasks.model import ModelConfig, Serving
from tasks.ops.arguments import (
    check_range,
    check_setting,
    check_without,
    exact,
    integer_of,
    scalar_of,
    tensor_of,
)
from tasks.ops.base import (
    Call,
    DumpError,
    FlashInferApi,
    Json,
    KernelSpec,
    NoKernel,
    NotProduced,
    OpModule,
    Provider,
    Rejected,
    Row,
    check_axes,
    const,
    register,
    rows_of,
    tensor,
    var,
)
from tasks.ops.gqa import ATTEND_TEST, HIDE_TEST
from tasks.ops.mla import (
    LATENT_AXES,
    LATENT_TEST,
    latent_axes,
    latent_heads,
    latent_inputs,
    latent_outputs,
    latent_scale,
    softmax_scale,
)

_DUMPED = "trtllm_batch_decode_with_kv_cache_mla"
_UNUSED = -1
_EXTRAS = (
    "sinks",
    "cum_seq_lens_q",
    "skip_softmax_threshold_scale_factor",
    "sparse_mla_top_k_lens",
)

_LAYER = "python/sglang/srt/layers/attention/dsa_backend.py"
_INDEXER = "python/sglang/srt/layers/attention/dsa/dsa_indexer.py"
_INDEX_PAGE = 64
_INDEX_HEAD_DIM = 128
_SCALE_BYTES = 4
"""A token's key has one float32 scale: SGLang quantises blocks of 128, which is the whole key
(memory_pool.py: DSATokenToKVPool, `quant_block_size`, `assert index_head_dim == 128`)."""

_SPARSE = """\
import math

import torch


@torch.no_grad()
def run(q_nope, q_pe, ckv_cache, kpe_cache, sparse_indices, sm_scale):
    num_tokens, num_qo_heads, head_dim_ckv = q_nope.shape
    _, page_size, head_dim_kpe = kpe_cache.shape
    assert num_qo_heads == {num_qo_heads}
    assert head_dim_ckv == {head_dim_ckv}
    assert head_dim_kpe == {head_dim_kpe}
    assert page_size == {page_size}
    assert sparse_indices.shape == (num_tokens, {topk})

    # An index counts tokens, page after page; -1 fills up.
    ckv_tokens, kpe_tokens = ckv_cache.flatten(0, 1), kpe_cache.flatten(0, 1)
    output = torch.zeros_like(q_nope)
    lse = torch.full(q_nope.shape[:2], -float("inf"), dtype=torch.float32, device=q_nope.device)
    for t in range(num_tokens):
        chosen = sparse_indices[t][sparse_indices[t] != -1].to(torch.long)
        if chosen.numel() == 0:
            continue
        ckv = ckv_tokens[chosen].to(torch.float32)
        logits = q_nope[t].to(torch.float32) @ ckv.T
        logits += q_pe[t].to(torch.float32) @ kpe_tokens[chosen].to(torch.float32).T
        logits *= sm_scale
        lse[t] = torch.logsumexp(logits, dim=-1) / math.log(2.0)
        output[t] = (torch.softmax(logits, dim=-1) @ ckv).to(output.dtype)
    return output, lse
"""

_TOPK_INDEXER = """\
import torch


def _keys(pages, head_dim):
    # A page holds the keys of all its tokens, then their scales.
    data = pages.view(torch.uint8).flatten(1)
    split = pages.shape[1] * head_dim
    keys = data[:, :split].contiguous().view(torch.float8_e4m3fn).to(torch.float32)
    scales = data[:, split:].contiguous().view(torch.float32)
    return keys.reshape(-1, head_dim) * scales.reshape(-1, 1)


@torch.no_grad()
def run(q_index_fp8, k_index_cache_fp8, weights, seq_lens, block_table):
    batch_size, num_index_heads, index_head_dim = q_index_fp8.shape
    _, page_size, kv_cache_num_heads, head_dim_with_scale = k_index_cache_fp8.shape
    assert num_index_heads == {num_index_heads}
    assert index_head_dim == {index_head_dim}
    assert page_size == {page_size}
    assert kv_cache_num_heads == {kv_cache_num_heads}
    assert head_dim_with_scale == {head_dim_with_scale}
    topk = {topk}

    topk_indices = torch.full((batch_size, topk), -1, dtype=torch.int32, device=weights.device)
    for b in range(batch_size):
        length = int(seq_lens[b])
        if length == 0:
            continue
        table = block_table[b, : (length + page_size - 1) // page_size].to(torch.long)
        keys = _keys(k_index_cache_fp8[table], index_head_dim)[:length]
        scores = torch.relu(q_index_fp8[b].to(torch.float32) @ keys.T)
        best = torch.topk(weights[b] @ scores, min(topk, length)).indices
        tokens = table[best // page_size] * page_size + best % page_size
        topk_indices[b, : tokens.shape[0]] = tokens.to(torch.int32)
    return topk_indices
"""

_ATTENTION_TEST = '''\
PAGE, TOPK = CONST["page_size"], CONST["topk"]


def attention(counts):
    """Return inputs in which each query has so many chosen tokens, from anywhere in the cache."""
    generator, pages = seeded(len(counts)), math.ceil(TOPK / PAGE) + 2
    indices = torch.full((len(counts), TOPK), -1, dtype=torch.int32)
    for row, count in zip(indices, counts, strict=True):
        row[:count] = torch.randperm(pages * PAGE, generator=generator)[:count]
    given = {"sparse_indices": indices, "sm_scale": SM_SCALE}
    inputs = complete(generator, {"num_tokens": len(counts), "num_pages": pages}, given)
    return hide(inputs, indices[indices != -1].long())


def check_attention(inputs, outputs, kernel):
    q, k, v = latent(inputs)
    # Every query over the whole cache, behind a mask of what it chose. Nobody chose what is NaN.
    visible = torch.zeros(len(q), len(k), dtype=torch.bool)
    for query, tokens in enumerate(inputs["sparse_indices"].tolist()):
        visible[query, [token for token in tokens if token != -1]] = True
    expected = attend(q, k.nan_to_num(), v.nan_to_num(), visible, inputs["sm_scale"])
    assert_attention(outputs, [expected], kernel)
'''

_INDEXER_TEST = '''\
def decoded(tensor):
    """Return the numbers that FP8 (e4m3) bytes stand for: sign, 4 bits exponent, 3 of mantissa."""
    numbers = []
    for byte in range(128):
        exponent, mantissa = divmod(byte, 8)
        # The smallest exponent has no implicit leading 1.
        whole = mantissa if exponent == 0 else 8 + mantissa
        numbers.append(math.ldexp(whole, max(exponent, 1) - 10))
    numbers[127] = math.nan
    table = torch.tensor(numbers + [-number for number in numbers], dtype=torch.float64)
    return table[tensor.contiguous().view(torch.uint8).long()]


def indexer(lengths):
    """Return inputs for sequences of these lengths, in shuffled pages."""
    generator = seeded(len(lengths))
    batch, heads, dim = len(lengths), CONST["num_index_heads"], CONST["index_head_dim"]
    counts = [math.ceil(length / PAGE) for length in lengths]
    pages, width = sum(counts) + 1, max(*counts, math.ceil(TOPK / PAGE))
    *shuffled, unused = torch.randperm(pages, generator=generator).tolist()
    keys = random(generator, pages, PAGE, dim, dtype="float8_e4m3fn").view(torch.uint8)
    scales = 0.1 + torch.rand(pages, PAGE, generator=generator)
    # Where no token is, all is NaN. So is the page that stands where a sequence has no more pages.
    table = torch.full((batch, width), unused, dtype=torch.int32)
    keys[unused], scales[unused] = 0x7F, math.nan
    for row, count, length in zip(table, counts, lengths, strict=True):
        own, shuffled = shuffled[:count], shuffled[count:]
        row[:count] = torch.tensor(own, dtype=torch.int32)
        if length % PAGE:
            keys[own[-1], length % PAGE :], scales[own[-1], length % PAGE :] = 0x7F, math.nan
    # In each page the keys of all tokens, then their scales.
    packed = torch.cat([keys.flatten(1), scales.view(torch.uint8)], dim=1)
    given = {
        "q_index_fp8": random(generator, batch, heads, dim, dtype="float8_e4m3fn"),
        "k_index_cache_fp8": packed.view(torch.int8).unflatten(1, (PAGE, 1, -1)),
        # Of both signs: a token that no head finds relevant is not the worst.
        "weights": random(generator, batch, heads, dtype="float32"),
        "seq_lens": torch.tensor(lengths, dtype=torch.int32),
        "block_table": table,
    }
    return complete(generator, {}, given)


def check_choice(inputs, outputs, kernel):
    cache = inputs["k_index_cache_fp8"].flatten(1)
    split = PAGE * CONST["index_head_dim"]
    keys = decoded(cache[:, :split]).unflatten(1, (PAGE, -1))
    scales = cache[:, split:].contiguous().view(torch.float32)
    keys = (keys * scales[..., None].double()).flatten(0, 1)
    queries, weights = decoded(inputs["q_index_fp8"]), inputs["weights"].double()
    for row, length in enumerate(inputs["seq_lens"].tolist()):
        pages = inputs["block_table"][row].tolist()
        tokens = [pages[i // PAGE] * PAGE + i % PAGE for i in range(length)]
        relevance = (keys[tokens] @ queries[row].T).clamp(min=0.0) * weights[row]
        scores = dict(zip(tokens, relevance.sum(dim=1).tolist(), strict=True))

        count = min(length, TOPK)
        chosen = outputs["topk_indices"][row].tolist()
        assert chosen[count:] == [-1] * (TOPK - count)
        assert len(set(chosen[:count])) == count, "a token is chosen twice"
        assert set(chosen[:count]) <= set(scores), "a token of no sequence, or of another"
        # The order is free, and rounding may swap tokens whose scores are nearly the same.
        got = sorted(scores[token] for token in chosen[:count])
        best = sorted(scores.values())[length - count :]
        # A score is the sum of what each head adds, of both signs, in float32 for kernels too.
        size = float(relevance.abs().sum(dim=1).max()) if length else 1.0
        got, best = (torch.tensor(values, dtype=torch.float64) for values in (got, best))
        assert_close(got, best, kernel, loose=2.0**-16, size=size)


if VARIANT == "topk_indexer":
    # Nothing cached, one token, a page, fewer tokens than are chosen, as many, and more.
    LENGTHS = [2 * PAGE + 3, 0, 1, PAGE, TOPK, TOPK + 1, TOPK + 2 * PAGE + 3]
    CASES = {"one sequence": lambda: indexer([5]), "several sequences": lambda: indexer(LENGTHS)}
    check = check_choice
else:
    CASES = {
        "some tokens": lambda: attention([5, 0, 1, TOPK // 16]),
        "as many tokens as fit": lambda: attention([3, TOPK]),
    }
    check = check_attention
'''

_AXES = {
    **LATENT_AXES,
    "topk": "Tokens chosen for each query (index_topk).",
    "num_index_heads": "Heads of the indexer, the same on every rank (index_n_heads).",
    "index_head_dim": "Dimension of the indexer's heads (index_head_dim).",
    "kv_cache_num_heads": "Heads of the index cache: one key for all of the indexer's heads.",
    "head_dim_with_scale": "Bytes of one key and its float32 scale.",
}


@register
class DsaPaged(OpModule):
    """`dsa_sparse_attention_...` at each page size, and `dsa_topk_indexer_fp8_..._ps64`.

    No baseline: FlashInfer's API takes `ckv` and `kpe` as one tensor, so a wrapper would copy the
    whole cache on each call, and it does not say which base its log-sum-exp has.
    """

    op_type = "dsa_paged"
    crosschecked = False
    names = {
        "sparse_attention": (
            "dsa_sparse_attention_h{num_qo_heads}_ckv{head_dim_ckv}_kpe{head_dim_kpe}"
            "_topk{topk}_ps{page_size}"
        ),
        "topk_indexer": (
            "dsa_topk_indexer_fp8_h{num_index_heads}_d{index_head_dim}_topk{topk}_ps{page_size}"
        ),
    }
    apis = (
        FlashInferApi(
            path="flashinfer.decode.trtllm_batch_decode_with_kv_cache_mla",
            gpu="SM100",
            dumps=(_DUMPED,),
            reads=("block_tables", "seq_lens"),
            # The default on Blackwell with an FP8 cache; the definition's cache is bfloat16
            # (sglang/srt/arg_groups/overrides.py: _dsa_split_backend_resolution).
            server_flags=(
                "--dsa-prefill-backend trtllm",
                "--dsa-decode-backend trtllm",
                "--kv-cache-dtype bfloat16",
            ),
            sglang_layer=_LAYER,
        ),
    )
    reference_test = (
        f"{ATTEND_TEST}\n\n{HIDE_TEST}\n\n{LATENT_TEST}\n\n{_ATTENTION_TEST}\n\n{_INDEXER_TEST}"
    )

    def mixes(self, kind: str, model: ModelConfig) -> bool:
        """Full attention, where the cache is latent and an indexer chooses what is read."""
        return (
            kind == "full_attention" and model.is_mla and model.fields.has("index_topk") is not None
        )

    def required(self, model: ModelConfig, serving: Serving) -> Iterator[KernelSpec | NotProduced]:
        """The indexer once; the attention at each page size."""
        if not self.mixes("full_attention", model):
            return
        topk = model.fields.required_size("index_topk")
        yield self._indexer(model, topk)
        heads = latent_heads(model, serving)
        if isinstance(heads, NotProduced):
            yield heads
            return
        for page_size in serving.page_sizes:
            axes = {**latent_axes(model, heads, page_size), "topk": topk}
            yield KernelSpec(
                name=self.name_of("sparse_attention", axes),
                op_type=self.op_type,
                variant="sparse_attention",
                axes=axes,
                tp=(serving.tp,),
                scalars={"sm_scale": softmax_scale(model)},
                origin=(
                    f"{model.num_heads} heads at tp={serving.tp}, index_topk = {topk} "
                    f"({serving.origin})",
                ),
            )

    def _indexer(self, model: ModelConfig, topk: int) -> KernelSpec | NotProduced:
        heads = model.fields.required_size("index_n_heads")
        head_dim = model.fields.required_size("index_head_dim")
        if head_dim != _INDEX_HEAD_DIM:
            return NotProduced(
                "sparse attention's indexer",
                f"index_head_dim is {head_dim}; SGLang's FP8 index cache is made for "
                f"{_INDEX_HEAD_DIM}",
            )
        axes = {
            "num_index_heads": heads,
            "index_head_dim": head_dim,
            "page_size": _INDEX_PAGE,
            "topk": topk,
            "kv_cache_num_heads": 1,
            "head_dim_with_scale": head_dim + _SCALE_BYTES,
        }
        return KernelSpec(
            name=self.name_of("topk_indexer", axes),
            op_type=self.op_type,
            variant="topk_indexer",
            axes=axes,
            origin=(
                f"index_n_heads = {heads}, index_head_dim = {head_dim}, index_topk = {topk}, "
                "not sharded",
            ),
        )

    def implied(self, call: Call) -> KernelSpec | None:
        """By the shapes of the call's queries, cache and indices."""
        if call.name != _DUMPED:
            return None
        with suppress(DumpError):
            axes = _called(call)
            return KernelSpec(
                name=self.name_of("sparse_attention", axes),
                op_type=self.op_type,
                variant="sparse_attention",
                axes=axes,
                origin=("a dumped call's arguments",),
            )
        return None

    def rows(self, spec: KernelSpec, calls: Sequence[Call]) -> Iterator[Row | Rejected]:
        """One row per call of the attention, with the chosen tokens."""
        if spec.variant != "sparse_attention":
            return iter(())
        return rows_of(calls, _DUMPED, lambda call: _row(spec, call))

    def provider(self, spec: KernelSpec) -> Provider:
        """FlashInfer for the attention (Blackwell only); nothing in it scores and selects."""
        if spec.variant == "sparse_attention":
            (api,) = self.apis
            return api
        # SGLang scores with DeepGEMM (fp8_paged_mqa_logits) and selects with sglang-kernel
        # (dsa_topk_backend.py). FlashInfer's top_k_page_table_transform is the second half only.
        return NoKernel(
            reason="no kernel that scores FP8 index keys and selects the best tokens",
            keyword="indexer",
            sglang_file=_INDEXER,
        )

    def definition(self, spec: KernelSpec) -> Json:
        """The definition of either half."""
        return self._attention(spec) if spec.variant == "sparse_attention" else self._select(spec)

    def _attention(self, spec: KernelSpec) -> Json:
        axes = spec.axes
        inputs = {
            **latent_inputs("num_tokens"),
            "sparse_indices": tensor(
                ["num_tokens", "topk"],
                "int32",
                "Tokens each query attends to, as page * page_size + offset; -1 fills up.",
            ),
            "sm_scale": latent_scale(),
        }
        return {
            "description": (
                "Sparse multi-head latent attention over the top-k tokens an indexer chose "
                f"(page_size={axes['page_size']}), for prefill and decode."
            ),
            "tags": ["sparse:topk"],
            "axes": {
                **{a: const(axes[a], _AXES[a]) for a in axes},
                "num_tokens": var("Query tokens: sequences at decode, all tokens at prefill."),
                "num_pages": var("Pages in the KV cache."),
            },
            "constraints": [
                "sparse_indices.shape[0] == num_tokens",
                "sparse_indices.shape[-1] == topk",
                "ckv_cache.shape[1] == page_size",
            ],
            "inputs": inputs,
            "outputs": latent_outputs("num_tokens"),
            "reference": _SPARSE.format_map(axes),
        }

    def _select(self, spec: KernelSpec) -> Json:
        axes = spec.axes
        cache = ["num_pages", "page_size", "kv_cache_num_heads", "head_dim_with_scale"]
        inputs = {
            "q_index_fp8": tensor(
                ["batch_size", "num_index_heads", "index_head_dim"],
                "float8_e4m3fn",
                "The indexer's queries; their scale is in `weights`.",
            ),
            "k_index_cache_fp8": tensor(
                cache,
                "int8",
                "Bytes of the paged index cache: in each page the FP8 keys of all tokens, then "
                "their float32 scales (DeepGEMM's layout).",
            ),
            "weights": tensor(
                ["batch_size", "num_index_heads"], "float32", "Weight of each head's score."
            ),
            "seq_lens": tensor(["batch_size"], "int32", "Cached tokens of each sequence."),
            "block_table": tensor(
                ["batch_size", "max_num_pages"], "int32", "Pages of each sequence."
            ),
        }
        return {
            "description": (
                "Top-k indexer of DeepSeek sparse attention: scores each cached token with "
                "sum over heads of weight * relu(q . k) and returns the best."
            ),
            "tags": ["stage:indexer", "sparse:topk", "quant:fp8"],
            "axes": {
                **{a: const(axes[a], _AXES[a]) for a in axes},
                "batch_size": var("Number of queries."),
                "max_num_pages": var("Pages of the longest sequence."),
                "num_pages": var("Pages in the index cache."),
            },
            "constraints": ["topk <= max_num_pages * page_size"],
            "inputs": inputs,
            "outputs": {
                "topk_indices": tensor(
                    ["batch_size", "topk"],
                    "int32",
                    "Chosen tokens, as page * page_size + offset; -1 fills up.",
                )
            },
            "reference": _TOPK_INDEXER.format_map(axes),
        }


def _called(call: Call) -> dict[str, int]:
    """Return the const axes that a call shows; its tensors fit each other.

    Raises:
        DumpError: it is a call of another kernel, or its tensors do not fit.
    """
    check_without(call, _EXTRAS)
    check_setting(call, "bmm2_scale", 1.0, 1, default=1.0)
    topk = integer_of(call, "sparse_mla_top_k", 0, least=0)
    ckv, kpe = (integer_of(call, name) for name in ("kv_lora_rank", "qk_rope_head_dim"))
    query, indices = tensor_of(call, "query", 4), tensor_of(call, "block_tables", 3)
    cache = call.tensors.get("kv_cache")
    # One head of keys and values; the API takes the cache with and without a dimension for it.
    if cache is None or len(cache.shape) not in (3, 4) or cache.shape[1:-2] not in ((), (1,)):
        raise DumpError(f"{call.name}: kv_cache is {cache and cache.shape}, no latent cache")
    for name, rows in (("query", query), ("kv_cache", cache)):
        if rows.dtype != "bfloat16":
            raise DumpError(f"{call.name}: {name} is {rows.dtype}, the definition has bfloat16")
        if rows.shape[-1] != ckv + kpe:
            raise DumpError(
                f"{call.name}: {name} has rows of {rows.shape[-1]}, kv_lora_rank + "
                f"qk_rope_head_dim is {ckv + kpe}"
            )
    tokens, queries, heads, _ = query.shape
    if topk < 1 or queries != 1 or indices.shape != (tokens, 1, topk):
        raise DumpError(
            f"{call.name}: sparse_mla_top_k is {topk}, block_tables {indices.shape}, query "
            f"{query.shape}, expected one query and its chosen tokens in each row"
        )
    if min(*query.shape, *cache.shape) < 1:
        raise DumpError(f"{call.name}: query {query.shape} or kv_cache {cache.shape} is empty")
    return {
        "num_qo_heads": heads,
        "head_dim_ckv": ckv,
        "head_dim_kpe": kpe,
        "page_size": cache.shape[-2],
        "topk": topk,
    }


def _row(spec: KernelSpec, call: Call) -> Row:
    check_axes(call, _called(call), spec.axes)
    dumped = call.tensors["block_tables"]
    chosen = exact(call, "block_tables", dumped.load(), "int32")[:, 0]
    tokens, page_size = len(chosen), spec.axes["page_size"]
    slots = call.tensors["kv_cache"].shape[0] * page_size
    check_range(call, "block_tables", chosen, _UNUSED, slots - 1)
    counts = (chosen != _UNUSED).sum(axis=1)
    if not counts.any():
        raise DumpError(f"{call.name}: no token is chosen")
    cached = tensor_of(call, "seq_lens", 1)
    if cached.shape != counts.shape:
        raise DumpError(f"{call.name}: {cached.shape[0]} seq_lens for {tokens} queries")
    # The kernel reads as many entries as a sequence has tokens, the definition all but -1.
    lengths = exact(call, "seq_lens", cached.load(), "int64")
    wrong = int((np.minimum(lengths, spec.axes["topk"]) != counts).sum())
    if wrong:
        raise DumpError(
            f"{call.name}: {wrong} of {tokens} queries have other numbers of tokens in "
            "block_tables than seq_lens says"
        )
    scale = scalar_of(call, spec, "sm_scale", "bmm1_scale")
    # As in other paged attention, the cache ends with the last page that is read.
    pages = int(chosen.max()) // page_size + 1
    return Row(
        axes={"num_tokens": tokens, "num_pages": pages},
        tensors={"sparse_indices": np.ascontiguousarray(chosen)},
        scalars={"sm_scale": scale},
        calls=(call.id,),
    )
