"""What each layer of a model is made of, from the many spellings configs have for it.

A layer has token mixers (attention of some kind, a state-space model, ...) and a feed-forward part
(dense, mixture of experts, both or none). The words for mixers are those of transformers'
`layer_types`; a word that is not known here stays as it is, for an op module to claim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tasks.model.fields import LARGEST_SIZE, Fields

_MOST_LAYERS = 4096
_FULL, _SLIDING, _LINEAR, _MAMBA = (
    "full_attention",
    "sliding_attention",
    "linear_attention",
    "mamba",
)
SOFTMAX = frozenset({_FULL, _SLIDING, "chunked_attention"})
"""Mixers that are softmax attention over keys and values."""

_WORDS: dict[str, tuple[str, ...]] = {
    "attention": (_FULL,),
    "attn": (_FULL,),
    "global": (_FULL,),
    "global_attention": (_FULL,),
    "sliding": (_SLIDING,),
    "local": (_SLIDING,),
    "local_attention": (_SLIDING,),
    "sliding_window_attention": (_SLIDING,),
    "swa": (_SLIDING,),
    "linear": (_LINEAR,),
    "mamba2": (_MAMBA,),
    "hybrid": (_MAMBA, _FULL),
    "mlp": (),
    "moe": (),
    "deepseek_sparse_attention": (_FULL,),
}
_MIXER_AND_FFN_ALTERNATE = frozenset({"mlp", "moe"})
"""Words of patterns in which a layer is either a mixer or a feed-forward part (Nemotron-H)."""
_MAMBA_FIELDS = ("mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "mamba_d_state")
_NEMOTRON_H = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}

HIDDEN = ("hidden_size", "n_embd", "n_embed", "d_model", "model_dim", "embedding_dim", "dim")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_transformer_layers")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "num_query_heads")
KV_HEADS = (
    "num_key_value_heads",
    "num_kv_heads",
    "n_kv_heads",
    "n_head_kv",
    "kv_n_heads",
    "multi_query_group_num",
    "num_attention_groups",
    "num_kv_attention_heads",
)
HEAD_DIM = ("head_dim", "attention_head_dim", "kv_channels", "head_size")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_WIDTH = ("intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner", "inner_hidden_size")
_DENSE_WIDTH = ("intermediate_size_mlp", "dense_intermediate_size", "block_ff_dim")
"""Where `intermediate_size` is the experts' width, and what LFM2 once called it."""
_GATE_AND_UP = ("qwen", "molmo", "recurrent_gemma")
"""Model types whose stated width is that of gate and up together."""
_WITHOUT_ATTENTION = ("rwkv", "xlstm", "hyena")
_FOUR_TIMES_HIDDEN = frozenset(
    {"gpt2", "gptj", "gpt_bigcode", "bloom", "falcon", "RefinedWeb", "RefinedWebModel", "mpt"}
    | {"gpt_neo", "gpt_neox", "phi", "phi-msft", "codegen"}
)
"""Model types whose feed-forward width is 4 x hidden where the config does not say it."""


@dataclass(frozen=True, order=True)
class Attention:
    """The dimensions of one softmax-attention layer with its own keys and values, unsharded."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int

    def heads_of_rank(self, tp: int) -> tuple[int, int] | None:
        """Return one rank's query and KV heads; None where `tp` does not divide them.

        KV heads are replicated once there are fewer than ranks (sglang/srt/models:
        `max(1, num_kv_heads // tp)`).
        """
        kv_heads = self.num_kv_heads
        if self.num_heads % tp or (kv_heads % tp and tp % kv_heads):
            return None
        return self.num_heads // tp, max(1, kv_heads // tp)


@dataclass(frozen=True)
class Layer:
    """One decoder layer."""

    mixers: tuple[str, ...]
    attention: Attention | None = None
    """None without softmax attention, and where the cache is compressed (MLA)."""
    dense_width: int | None = None
    """Width of the dense feed-forward part, None where there is none."""
    has_experts: bool = False


def read_layers(fields: Fields, *, mapped: bool = True) -> tuple[Layer, ...]:
    """Read every decoder layer of a config.

    Args:
        fields: the language model's part.
        mapped: whether attention layers are known to be what the fields say; if not, their
            dimensions are left out.

    Raises:
        ConfigError: a field is missing, wrong, or does not fit the number of layers.
    """
    number = _number(fields)
    if fields.has("block_configs"):
        return _deci_layers(fields, number)
    words = _words(fields, number)
    if fields.has(*_MAMBA_FIELDS) and not fields.has("linear_num_value_heads"):
        # transformers 5 calls Mamba layers linear attention too.
        words = [_MAMBA if _WORDS.get(word, (word,)) == (_LINEAR,) else word for word in words]
    alternate = any(word in _MIXER_AND_FFN_ALTERNATE for word in words)
    experts = _expert_layers(fields, number)
    widths = _widths(fields, number)
    layers = []
    for index, word in enumerate(words):
        mixers = _WORDS.get(word, (word,) if word else ())
        has_experts = word == "moe" if alternate else experts(index)
        has_dense = word == "mlp" if alternate else not has_experts or _is_both(fields)
        if set(mixers) == {_MAMBA} and _is_mixer_only(fields):
            has_dense = False
        softmax = next((mixer for mixer in mixers if mixer in SOFTMAX), None)
        compressed = fields.has("kv_lora_rank") is not None
        layers.append(
            Layer(
                mixers=mixers,
                attention=None
                if softmax is None or compressed or not mapped
                else _attention(fields, softmax, index, number),
                dense_width=widths[index] if has_dense and widths else None,
                has_experts=has_experts,
            )
        )
    return tuple(layers)


def _number(fields: Fields) -> int:
    """Return how many layers there are: as stated, or as many as a list of them has."""
    number = fields.size(*LAYERS)
    if number is None:
        listed = fields.raw.get(fields.has("layers_block_type", "layer_types") or "")
        number = len(listed) if isinstance(listed, list) else None
    if number is None:
        number = fields.required_size(*LAYERS)
    if not 0 < number <= _MOST_LAYERS:
        raise fields.fail(fields.has(*LAYERS) or LAYERS[0], f"{number} layers are not believable")
    return number


def _is_both(fields: Fields) -> bool:
    """Whether layers with experts have a dense feed-forward part beside them (Gemma 4, Arctic)."""
    return bool(fields.flag("enable_moe_block")) or bool(fields.raw.get("parallel_attn_mlp_res"))


def _is_mixer_only(fields: Fields) -> bool:
    """Whether Mamba layers have no feed-forward part: pure Mamba models."""
    return fields.text("model_type") in ("mamba", "mamba2", "falcon_mamba")


def _words(fields: Fields, number: int) -> list[str]:
    """Return one word per layer, from whichever field tells."""
    for name, read in _PATTERNS.items():
        if fields.has(name):
            return read(fields, name, number)
    model_type = fields.text("model_type") or ""
    if model_type in ("mamba", "mamba2", "falcon_mamba"):
        return [_MAMBA] * number
    if model_type == "falcon_h1":
        return ["hybrid"] * number
    if model_type.startswith(_WITHOUT_ATTENTION):
        return [model_type] * number
    return [_FULL] * number


def _spelled(fields: Fields, name: str, number: int) -> list[str]:
    return fields.labels(name, number)


def _nemotron_h(fields: Fields, name: str, number: int) -> list[str]:
    words = fields.labels(name, number)
    unknown = sorted(set(words) - set(_NEMOTRON_H) - set(_NEMOTRON_H.values()))
    if unknown:
        raise fields.fail(name, f"{unknown[0]!r} is no kind of layer ({', '.join(_NEMOTRON_H)})")
    return [_NEMOTRON_H.get(word, word) for word in words]


def _coded(codes: dict[str, str]) -> Callable[[Fields, str, int], list[str]]:
    """Read a list of numbers, each standing for a kind of layer."""

    def read(fields: Fields, name: str, number: int) -> list[str]:
        words = fields.labels(name, number)
        unknown = sorted(set(words) - set(codes))
        if unknown:
            raise fields.fail(name, f"{unknown[0]!r} is no kind of layer ({', '.join(codes)})")
        return [codes[word] for word in words]

    return read


def _every(other: str) -> Callable[[Fields, str, int], list[str]]:
    """Read `n`: each n-th layer is full attention, the others `other`."""

    def read(fields: Fields, name: str, number: int) -> list[str]:
        value = fields.raw[name]
        if isinstance(value, str):  # EXAONE-4 writes the repeated pattern itself, as "LLLG"
            if not value or set(value) - {"L", "G"}:
                raise fields.fail(name, f"{value!r} is not a pattern of L and G")
            return [_FULL if value[i % len(value)] == "G" else other for i in range(number)]
        step = fields.required_size(name)
        return [_FULL if (index + 1) % step == 0 else other for index in range(number)]

    return read


def _listed(other: str) -> Callable[[Fields, str, int], list[str]]:
    """Read the numbers of the layers with full attention; the others are `other`."""

    def read(fields: Fields, name: str, number: int) -> list[str]:
        listed = fields.indices(name)
        return [_FULL if index in listed else other for index in range(number)]

    return read


def _period(fields: Fields, name: str, number: int) -> list[str]:
    """Read Jamba's period and offset of attention among Mamba layers."""
    period = fields.required_size(name)
    offset = fields.count("attn_layer_offset") or 0
    return [_FULL if index % period == offset % period else _MAMBA for index in range(number)]


def _groups(fields: Fields, name: str, number: int) -> list[str]:
    """Read Ring/Ling linear's groups: the last layer of each, and a rest, is full attention.

    `bailing_moe_linear.py: decoder_attention_types`.
    """
    size = fields.required_size(name)
    whole = number // size * size
    return [
        _FULL if (index + 1) % size == 0 or index >= whole else _LINEAR for index in range(number)
    ]


def _kimi_linear(fields: Fields, name: str, number: int) -> list[str]:
    """Read Kimi-Linear's lists of layers, which count from one."""
    nested = fields.nested(name)
    kda = nested.indices("kda_layers") if nested and nested.has("kda_layers") else frozenset()
    return ["kda" if index + 1 in kda else _FULL for index in range(number)]


_PATTERNS: dict[str, Callable[[Fields, str, int], list[str]]] = {
    "hybrid_override_pattern": _nemotron_h,
    "layers_block_type": _spelled,
    "layer_types": _spelled,
    "attn_type_list": _coded({"0": _LINEAR, "1": _FULL}),
    "hybrid_layer_pattern": _coded({"0": _FULL, "1": _SLIDING}),
    "linear_attn_config": _kimi_linear,
    "full_attention_interval": _every(_LINEAR),
    "attn_layer_period": _period,
    "attn_layer_indices": _listed(_MAMBA),
    "full_attn_idxs": _listed("conv"),
    "layer_group_size": _groups,
    "sliding_window_pattern": _every(_SLIDING),
}


def _attention(fields: Fields, mixer: str, index: int, number: int) -> Attention:
    """Return the dimensions of layer `index`'s softmax attention."""
    apart = _APART.get(mixer, {})

    def pick(names: Sequence[str], own: str) -> int | None:
        key = fields.has(apart.get(own, ""), *names)
        sizes = fields.per_layer(number, key) if key else None
        return sizes[index] if sizes else None

    heads = pick(HEADS, "heads")
    if heads is None:
        raise fields.fail(HEADS[0], "missing")
    kv_heads = _kv_heads(fields, heads, pick(KV_HEADS, "kv_heads"))
    if heads % kv_heads:
        name = fields.has(apart.get("kv_heads", ""), *KV_HEADS)
        raise fields.fail(str(name), f"{kv_heads} does not divide num_attention_heads {heads}")
    head_dim = pick(HEAD_DIM, "head_dim")
    if head_dim is None:
        hidden = fields.required_size(*HIDDEN)
        if hidden % heads:
            raise fields.fail(
                "head_dim",
                f"missing, and hidden_size {hidden} is not a multiple of "
                f"num_attention_heads {heads}",
            )
        head_dim = hidden // heads
    v_head_dim = fields.size(apart.get("v_head_dim", ""), "v_head_dim")
    return Attention(heads, kv_heads, head_dim, v_head_dim or head_dim)


_APART = {
    _SLIDING: {
        "heads": "swa_num_attention_heads",
        "kv_heads": "swa_num_key_value_heads",
        "head_dim": "swa_head_dim",
        "v_head_dim": "swa_v_head_dim",
    },
    _FULL: {"kv_heads": "num_global_key_value_heads", "head_dim": "global_head_dim"},
}
"""Dimensions that only layers of one kind have: MiMo-V2's sliding, Gemma 4's global layers."""


def _kv_heads(fields: Fields, heads: int, stated: int | None) -> int:
    """Return the KV heads; multi-query models have one, whatever the number says."""
    if fields.raw.get("new_decoder_architecture") is True:
        return stated or heads
    if fields.raw.get("multi_query") is True:
        return 1
    if fields.raw.get("multi_query_attention") is False:
        return heads
    if stated is None and "num_key_value_heads" in fields.raw:
        raise fields.fail("num_key_value_heads", "null, and no other field says it per layer")
    return stated or heads


def _expert_layers(fields: Fields, number: int) -> Callable[[int], bool]:
    """Return which layers are mixtures of experts."""
    if not fields.count(*EXPERTS) or fields.flag("enable_moe_block") is False:
        return lambda _index: False
    for name in ("mlp_layer_types", "moe_layer_freq"):
        if isinstance(fields.raw.get(name), list):
            listed = fields.labels(name, number)
            return lambda index: listed[index] not in ("dense", "0")
    for name in ("moe_layers", "moe_layers_enum"):
        if fields.has(name):
            chosen = fields.indices(name)
            return lambda index: index in chosen
    dense = fields.indices("mlp_only_layers") if fields.has("mlp_only_layers") else frozenset()
    first = fields.count("first_k_dense_replace", "num_dense_layers", "moe_layer_num_skipped") or 0
    start = fields.count("moe_layer_start_index") or 0
    end = fields.count("moe_layer_end_index") or number
    before = fields.count("moe_layer_freq") or 1
    after = (
        fields.count(
            "decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_interval", "moe_every_n"
        )
        or 1
    )
    period = fields.count("expert_layer_period") or 1
    offset = fields.count("expert_layer_offset") or 0
    return lambda index: (
        index not in dense
        and max(first, start) <= index <= end
        and index % before == 0
        and (index + 1) % after == 0
        and index % period == offset % period
    )


def _widths(fields: Fields, number: int) -> list[int] | None:
    """Return the width of each layer's dense feed-forward part, if it has one."""
    widths = fields.per_layer(number, *_DENSE_WIDTH, *_WIDTH)
    if widths and fields.flag("block_auto_adjust_ff_dim"):
        # As Lfm2MLP in lfm2.py does.
        scale = fields.number("block_ffn_dim_multiplier") or 1.0
        step = fields.required_size("block_multiple_of")
        scaled = [int(scale * int(2 * width / 3)) for width in widths]
        return [width + -width % step for width in scaled]
    if widths and fields.text("model_type") in _GATE_AND_UP:
        return [width // 2 for width in widths]
    if widths and fields.flag("use_double_wide_mlp"):
        # Gemma 4's last layers, which share an earlier layer's keys and values, are twice as wide.
        shared = fields.count("num_kv_shared_layers") or 0
        widths = [w * 2 if index >= number - shared else w for index, w in enumerate(widths)]
    if widths is None and fields.text("model_type") in _FOUR_TIMES_HIDDEN:
        return [4 * fields.required_size(*HIDDEN)] * number
    return widths


def _deci_layers(fields: Fields, number: int) -> tuple[Layer, ...]:
    """Read Nemotron-NAS's `block_configs`, which say every layer on its own.

    `nemotron_nas.py: DeciLMDecoderLayer`, `_ffn_mult_to_intermediate_size`.
    """
    blocks = fields.raw["block_configs"]
    if not isinstance(blocks, list) or len(blocks) != number:
        raise fields.fail("block_configs", f"not a list of {number} entries, one per layer")
    layers = []
    for index, block in enumerate(blocks):
        inner = Fields(fields.source, {"block": block}, f"{fields.prefix}block_configs[{index}].")
        inside = inner.nested("block")
        attention = inside.nested("attention") if inside else None
        ffn = inside.nested("ffn") if inside else None
        if attention is None or ffn is None:
            raise inner.fail("block", "has no attention or no ffn")
        layers.append(
            Layer(
                mixers=_deci_mixers(attention),
                attention=_deci_attention(fields, attention),
                dense_width=_deci_width(fields, ffn),
            )
        )
    return tuple(layers)


def _deci_mixers(attention: Fields) -> tuple[str, ...]:
    if attention.flag("no_op"):
        return ()
    return ("linear_layer",) if attention.flag("replace_with_linear") else (_FULL,)


def _deci_attention(fields: Fields, attention: Fields) -> Attention | None:
    if _deci_mixers(attention) != (_FULL,):
        return None
    heads = fields.required_size(*HEADS)
    group = attention.size("n_heads_in_group")
    kv_heads = attention.size("num_key_value_heads") if group is None else heads // group
    if not kv_heads or heads % kv_heads:
        raise attention.fail("n_heads_in_group", f"{group} does not divide {heads} heads")
    head_dim = fields.size(*HEAD_DIM) or fields.required_size(*HIDDEN) // heads
    return Attention(heads, kv_heads, head_dim, head_dim)


def _deci_width(fields: Fields, ffn: Fields) -> int | None:
    if ffn.flag("no_op") or ffn.flag("replace_with_linear"):
        return None
    width = ffn.size("intermediate_size")
    if width is None:
        multiple = ffn.number("ffn_mult")
        if multiple is None:
            raise ffn.fail("ffn_mult", "missing")
        if multiple > LARGEST_SIZE:
            raise ffn.fail("ffn_mult", f"{multiple:g} is not believable")
        width = int(2 * multiple * fields.required_size(*HIDDEN) / 3)
        width += -width % 256
    return ffn.check_size("ffn_mult", width)
