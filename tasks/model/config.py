"""Reading a `config.json` as it is in the wild."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tasks import files
from tasks.errors import ConfigError
from tasks.model.architectures import is_mapped
from tasks.model.fields import Fields
from tasks.model.layers import (
    EXPERTS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    Attention,
    Layer,
    read_layers,
)
from tasks.model.quantization import Quantization, read_quantization

_MAX_CONFIG_BYTES = 4 * 1024 * 1024
_TEXT_PARTS = (
    "text_config",
    "llm_config",
    "language_config",
    "thinker_config",
    "decoder_config",
    "llm_cfg",
)
"""Where multimodal models nest the language model's config."""
_FLATTENED = ("ffn_config", "attn_config")
"""Parts of the language model's own config that only some nest (DBRX, MPT)."""

_CLASS_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        "vocab_size": 262208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "rms_norm_eps": 1e-6,
    },
    "llama": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
        "rms_norm_eps": 1e-6,
    },
    "mistral": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "rms_norm_eps": 1e-6,
    },
    "qwen2": {
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 151936,
        "rms_norm_eps": 1e-6,
    },
}
"""What transformers' config classes hold where a *nested* config is silent: of a nested config only
the differences to its class's defaults are saved (`PretrainedConfig.to_diff_dict`)."""

_EXPERT_HIDDEN = ("moe_latent_size", "routed_expert_hidden_size")
_RMS_EPS = ("rms_norm_eps", "rms_norm_epsilon")
_OTHER_EPS = ("norm_eps", "norm_epsilon", "layernorm_epsilon", "layer_norm_epsilon")
_RMS_MODEL_TYPES = (
    "nemotron_h",
    "mimo_v2",
    "qwen",
    "exaone",
    "lfm2",
    "mamba",
    "falcon_mamba",
    "chatglm",
    "internlm",
    "bailing",
    "openelm",
)
"""Model types (or what they begin with) whose epsilon is spelled as a layer norm's, or not at all,
although SGLang's and the publishers' model files build RMSNorm."""
_LAYER_NORM_MODEL_TYPES = frozenset({"phimoe", "orion"})
"""The reverse: layer norms with an epsilon that is spelled `rms_norm_eps`."""
_UNGATED_MODEL_TYPES = frozenset(
    {"gpt2", "gptj", "gpt_neox", "gpt_bigcode", "bloom", "falcon", "RefinedWeb", "RefinedWebModel"}
    | {"mpt", "opt", "phi", "phi-msft", "starcoder2", "nemotron", "persimmon", "arcee", "apertus"}
)
"""Model types whose feed-forward layers are two matrices with an activation between."""


@dataclass(frozen=True)
class Moe:
    """The mixture-of-experts part of a model."""

    num_experts: int
    top_k: int
    intermediate_size: int
    """Width of one expert's feed-forward layer."""
    hidden_size: int
    """Width of what the experts read and write: the model's, or a latent one (Nemotron 3)."""
    num_groups: int | None
    """`n_group`: expert groups for group-limited routing, None where the router has none."""
    topk_group: int | None


@dataclass(frozen=True)
class ModelConfig:
    """The dimensions that decide which kernels a model needs.

    All sizes are elements, unsharded. `fields` is the language model's part of the config, for what
    only one op module asks; `source` names the file in error messages.
    """

    source: str
    architecture: str
    mapped: bool
    """Whether the layers of this model class are known to be what the config's fields say."""
    model_type: str
    hidden_size: int
    vocab_size: int
    layers: tuple[Layer, ...]
    gated_mlp: bool
    """Whether feed-forward layers have a gate beside the up projection, as in SwiGLU."""
    rms_norm_eps: float | None
    """None where the model has no RMSNorm."""
    moe: Moe | None
    quantization: Quantization | None
    fields: Fields = field(repr=False, compare=False)

    @property
    def num_layers(self) -> int:
        """How many decoder layers there are."""
        return len(self.layers)

    @property
    def num_heads(self) -> int:
        """Query heads, where every layer has the same.

        Raises:
            ConfigError: the config does not say.
        """
        return self.fields.required_size(*HEADS)

    @property
    def num_kv_heads(self) -> int:
        """Key-value heads, where every layer has the same."""
        return self.fields.size(*KV_HEADS) or self.num_heads

    @property
    def head_dim(self) -> int:
        """Dimension of one head, where every layer has the same.

        Raises:
            ConfigError: the config neither says it nor has sizes that give it.
        """
        stated = self.fields.size(*HEAD_DIM)
        if stated is None and self.hidden_size % self.num_heads:
            raise self.fields.fail("head_dim", "missing, and not hidden_size / num_attention_heads")
        return stated or self.hidden_size // self.num_heads

    @property
    def is_mla(self) -> bool:
        """Whether attention is multi-head latent attention (a compressed KV cache)."""
        return self.fields.has("kv_lora_rank") is not None

    @cached_property
    def mixers(self) -> Mapping[str, int]:
        """How many layers have each kind of token mixer, in order of appearance."""
        return Counter(mixer for layer in self.layers for mixer in layer.mixers)

    @cached_property
    def attentions(self) -> Mapping[Attention, int]:
        """The distinct softmax attentions (not MLA), and how many layers have each."""
        return Counter(layer.attention for layer in self.layers if layer.attention)

    @cached_property
    def dense_widths(self) -> Mapping[int, int]:
        """The distinct widths of dense feed-forward layers, and how many layers have each."""
        return Counter(layer.dense_width for layer in self.layers if layer.dense_width)

    @property
    def moe_layers(self) -> int:
        """How many layers are mixtures of experts."""
        return sum(layer.has_experts for layer in self.layers)


@dataclass(frozen=True)
class Serving:
    """One way the model is served: what shards its kernels."""

    tp: int
    """Tensor-parallel size as attention sees it (tp / dp under data-parallel attention)."""
    ep: int
    """Expert-parallel size."""
    origin: str
    """Where this configuration was read, or why it was assumed."""
    page_sizes: tuple[int, ...] = (1, 64)
    """KV cache page sizes: SGLang's own (1), and the size the dataset also publishes."""


_TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
    "experts_per_token",
    "num_selected_experts",
)
_EXPERT_WIDTH = (
    "moe_intermediate_size",
    "expert_ffn_hidden_size",
    "moe_ffn_hidden_size",
    "expert_intermediate_size",
    "intermediate_size",
    "ffn_hidden_size",
)


def _moe(fields: Fields) -> Moe | None:
    experts = fields.count(*EXPERTS)
    if not experts or experts == 1 or fields.flag("enable_moe_block") is False:
        return None
    top_k = fields.required_size(*_TOP_K)
    if top_k > experts:
        raise fields.fail(str(fields.has(*_TOP_K)), f"{top_k} exceeds the {experts} experts")
    groups = fields.count("n_group", "num_expert_group") or None
    kept = fields.count("topk_group", "num_limited_groups") or None
    if groups and groups > 1:
        if experts % groups:
            raise fields.fail("n_group", f"{groups} does not divide {experts} experts")
        if kept is None:
            raise fields.fail("topk_group", f"missing although n_group is {groups}")
        if kept > groups:
            raise fields.fail("topk_group", f"{kept} exceeds n_group {groups}")
        if top_k > kept * (experts // groups):
            raise fields.fail(
                str(fields.has(*_TOP_K)), f"{top_k} exceeds the experts of {kept} groups"
            )
    return Moe(
        num_experts=experts,
        top_k=top_k,
        intermediate_size=fields.required_size(*_EXPERT_WIDTH),
        hidden_size=fields.required_size(*_EXPERT_HIDDEN, *HIDDEN),
        num_groups=groups,
        topk_group=kept,
    )


def _text_part(raw: Mapping[str, Any], source: str) -> Fields:
    """Return the language model's fields; what only the outer config says counts too.

    Raises:
        ConfigError: the part is not an object.
    """
    fields = Fields(source, dict(raw))
    while (name := fields.has(*_TEXT_PARTS)) and (nested := fields.nested(name)):
        outer = {key: value for key, value in fields.raw.items() if key != name}
        defaults = _CLASS_DEFAULTS.get(nested.text("model_type") or "", {})
        fields = Fields(source, {**outer, **defaults, **nested.raw}, nested.prefix)
    if (fields.text("model_type") or "").startswith("ernie4_5") and fields.has("vision_config"):
        # Each `moe_...` list has the language model's entry first, then the vision experts'.
        for name, value in fields.raw.items():
            if name.startswith("moe_") and isinstance(value, list) and len(value) == 2:
                fields = Fields(source, {**fields.raw, name: value[0]}, fields.prefix)
    for name in _FLATTENED:
        nested = fields.nested(name)
        if nested:
            fields = Fields(source, {**nested.raw, **fields.raw}, fields.prefix)
    return fields


def _rms_norm_eps(fields: Fields, model_type: str) -> float | None:
    if model_type in _LAYER_NORM_MODEL_TYPES or fields.raw.get("rmsnorm") is False:
        return None
    if model_type.startswith(_RMS_MODEL_TYPES):
        return fields.number(*_RMS_EPS, *_OTHER_EPS)
    return fields.number(*_RMS_EPS)


def _is_gated(fields: Fields, model_type: str) -> bool:
    activation = fields.text("mlp_hidden_act", "hidden_act", "hidden_activation")
    return activation not in ("relu2", "xielu") and model_type not in _UNGATED_MODEL_TYPES


def _architecture(raw: Mapping[str, Any], fields: Fields) -> str:
    """Return the model class; a config without one is known by its model type."""
    outer = Fields(fields.source, raw)
    name = (outer if outer.has("architectures") else fields).raw.get("architectures")
    if name is None:
        model_type = fields.text("model_type")
        if model_type is None:
            raise outer.fail("architectures", "missing, and so is model_type")
        return model_type
    if not isinstance(name, list) or not name:
        raise outer.fail("architectures", "not a non-empty list")
    if not isinstance(name[0], str):
        raise outer.fail("architectures", f"{name[0]!r} is not a string")
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,200}", name[0]):
        raise outer.fail("architectures", f"{name[0][:80]!r} is no class name")
    return name[0]


def _moe_if_told(fields: Fields) -> Moe | None:
    """Read the experts of a model class that nobody has read: it may spell them its own way."""
    try:
        return _moe(fields)
    except ConfigError:
        return None


def parse_config(raw: Mapping[str, Any], source: str, beside: Fields | None = None) -> ModelConfig:
    """Read a Hugging Face `config.json`.

    The language model's part is used where the config nests it (`text_config` and the like).

    Args:
        raw: the config object.
        source: the file, for messages.
        beside: what is in `hf_quant_config.json`, where the repository has one.

    Raises:
        ConfigError: a field is missing, of the wrong type, or impossible.
    """
    fields = _text_part(raw, source)
    architecture = _architecture(raw, fields)
    mapped = is_mapped(architecture)
    model_type = fields.text("model_type") or ""
    return ModelConfig(
        source=source,
        architecture=architecture,
        mapped=mapped,
        model_type=model_type,
        hidden_size=fields.required_size(*HIDDEN),
        vocab_size=fields.size("padded_vocab_size") or fields.required_size("vocab_size"),
        layers=read_layers(fields, mapped=mapped),
        gated_mlp=_is_gated(fields, model_type),
        rms_norm_eps=_rms_norm_eps(fields, model_type),
        moe=_moe(fields) if mapped else _moe_if_told(fields),
        quantization=read_quantization(fields, beside),
        fields=fields,
    )


def read_config(path: Path, source: str | None = None) -> ModelConfig:
    """Read a `config.json` file, and `hf_quant_config.json` beside it where there is one.

    Raises:
        ConfigError: not readable, not a JSON object, too large, or a field is wrong.
    """
    name = source or str(path)
    raw = _read_object(path, name, "the model config")
    beside = path.with_name("hf_quant_config.json")
    quantization = None
    if path.name == "config.json" and beside.is_file():
        about = f"{name.removesuffix('config.json')}{beside.name}"
        quantization = Fields(about, _read_object(beside, about, "the quantisation config"))
    return parse_config(raw, name, quantization)


def _read_object(path: Path, name: str, what: str) -> dict[str, Any]:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read ({error.strerror})") from error
    if size > _MAX_CONFIG_BYTES:
        raise ConfigError(f"{name}: {size} bytes is too large for {what}")
    return files.read_json_object(path, what, ConfigError)
