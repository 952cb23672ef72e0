"""How many bytes a model's weights take, about: what decides on how many GPUs it fits."""

from __future__ import annotations

from tasks.model.config import ModelConfig
from tasks.model.layers import SOFTMAX, Attention
from tasks.model.quantization import bits_of


def weight_bytes(model: ModelConfig) -> int:
    """Estimate the bytes of the weights, from the dimensions and the quantisation.

    Counts embeddings (always 16 bits), projections of attention and of other mixers, and
    feed-forward layers; norms, biases and convolutions are about one per cent and left out.

    Raises:
        ConfigError: the config does not say how wide its quantised weights are.
    """
    hidden, fields = model.hidden_size, model.fields
    matrices = 3 if model.gated_mlp else 2
    dense = matrices * sum(hidden * width * count for width, count in model.dense_widths.items())
    experts = 0
    if model.moe:
        shared = fields.count("n_shared_experts", "num_shared_experts") or 0
        width = model.moe.num_experts * model.moe.hidden_size + shared * hidden
        experts = matrices * model.moe_layers * width * model.moe.intermediate_size
    tied = 1 if fields.flag("tie_word_embeddings") else 2
    total = float(tied * model.vocab_size * hidden * 16)
    parts = {"attention": _mixing(model), "dense": dense, "experts": experts}
    for part, parameters in parts.items():
        bits = bits_of(model.quantization, part)
        if parameters and bits is None:
            method = model.quantization.method if model.quantization else ""
            raise fields.fail(
                "quantization_config",
                f"{method!r} does not say how wide the weights are; give --tp-list",
            )
        total += parameters * (bits or 0)
    return int(total / 8)


def _mixing(model: ModelConfig) -> int:
    """The projections of all token mixers."""
    hidden, total = model.hidden_size, 0
    for attention, count in model.attentions.items():
        total += count * _attention(hidden, attention)
    for kind, count in model.mixers.items():
        if kind in SOFTMAX:
            if model.is_mla:
                total += count * _latent(model)
            elif not model.attentions:
                total += count * 4 * hidden * hidden
        elif kind == "mamba":
            # In: x, z and the time steps (B and C are small); out: x.
            total += count * 3 * hidden * _mamba_width(model)
        elif model.fields.has("linear_num_value_heads"):
            total += count * _gated_delta(model)
        else:
            total += count * 4 * hidden * hidden
    return total


def _attention(hidden: int, attention: Attention) -> int:
    each = attention.head_dim + attention.v_head_dim
    return hidden * each * (attention.num_heads + attention.num_kv_heads)


def _latent(model: ModelConfig) -> int:
    """One MLA layer (`deepseek_v2.py: DeepseekV2AttentionMLA`)."""
    fields, hidden, heads = model.fields, model.hidden_size, model.num_heads
    rank, rope = fields.required_size("kv_lora_rank"), fields.size("qk_rope_head_dim") or 0
    nope, value = fields.size("qk_nope_head_dim") or 0, fields.size("v_head_dim") or 0
    query_rank = fields.size("q_lora_rank")
    queries = hidden * heads * (nope + rope)
    if query_rank:
        queries = query_rank * (hidden + heads * (nope + rope))
    return queries + hidden * (rank + rope) + heads * (rank * (nope + value) + value * hidden)


def _mamba_width(model: ModelConfig) -> int:
    fields = model.fields
    stated = fields.size("mamba_d_ssm", "mamba_intermediate_size")
    heads = fields.size("mamba_num_heads", "mamba_n_heads", "n_mamba_heads")
    dim = fields.size("mamba_head_dim", "mamba_d_head")
    if stated or (heads and dim):
        return stated or (heads or 0) * (dim or 0)
    return int(model.hidden_size * (fields.number("mamba_expand", "expand") or 2))


def _gated_delta(model: ModelConfig) -> int:
    """One Gated DeltaNet layer (`qwen3_next.py: Qwen3GatedDeltaNet`): q, k, v, z and out."""
    size = model.fields.required_size
    keys = size("linear_num_key_heads") * size("linear_key_head_dim")
    values = size("linear_num_value_heads") * size("linear_value_head_dim")
    return model.hidden_size * (2 * keys + 3 * values)
