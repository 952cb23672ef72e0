"""A model's `config.json` as the op modules read it, and one way of serving the model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tasks import files
from tasks.errors import ConfigError

_MAX_CONFIG_BYTES = 4 * 1024 * 1024
_SCORING = {"llama4": "sigmoid", "llama4_text": "sigmoid", "nemotron_h": "sigmoid"}
"""Routers that SGLang's model files score so although the config has no `scoring_func`."""
_LARGEST_SIZE = 1 << 28
"""No dimension of a model comes near it; what does is a damaged or hostile config."""


@dataclass(frozen=True)
class Moe:
    """The mixture-of-experts part of a model."""

    num_experts: int
    top_k: int
    intermediate_size: int
    """Width of one expert's feed-forward layer."""
    num_groups: int | None
    """`n_group`: expert groups for group-limited routing, None where the router has none."""
    topk_group: int | None
    scoring: str
    """`softmax` or `sigmoid`."""
    renormalize: bool
    """Whether the weights of the chosen experts are made to add up to one."""
    routed_scaling_factor: float | None


@dataclass(frozen=True)
class ModelConfig:
    """The dimensions that decide which kernels a model needs.

    All sizes are elements, unsharded. `raw` is the (text part of the) config, for what only one op
    module asks; `source` names the file in error messages.
    """

    source: str
    architecture: str
    model_type: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    intermediate_size: int | None
    rms_norm_eps: float | None
    moe: Moe | None
    quantization: str | None
    raw: Mapping[str, Any] = field(repr=False, compare=False)

    @property
    def is_mla(self) -> bool:
        """Whether attention is multi-head latent attention (a compressed KV cache)."""
        return self.raw.get("kv_lora_rank") is not None

    @property
    def linear_attention_layers(self) -> int:
        """How many layers use linear instead of softmax attention (MiniMax's `attn_type_list`)."""
        return sum(1 for kind in self.raw.get("attn_type_list") or () if kind == 0)

    @property
    def has_softmax_attention(self) -> bool:
        """Whether any layer uses ordinary attention."""
        return self.linear_attention_layers < self.num_layers

    @property
    def unread(self) -> list[str]:
        """What the config says about single layers that nothing here reads yet."""
        fields = ("block_configs", "hybrid_override_pattern", "linear_num_value_heads")
        found = [field for field in fields if self.raw.get(field)]
        if self.raw.get("swa_num_key_value_heads") not in (None, self.num_kv_heads):
            found.append("swa_num_key_value_heads")
        return found

    @property
    def moe_layers(self) -> int:
        """How many layers are mixtures of experts."""
        if self.moe is None:
            return 0
        dense = set(self.raw.get("mlp_only_layers") or ())
        first = self.raw.get("first_k_dense_replace") or 0
        step = self.raw.get("decoder_sparse_step") or 1
        return sum(
            1
            for layer in range(self.num_layers)
            if layer not in dense and layer >= first and (layer + 1) % step == 0
        )

    def weight_bytes(self) -> int:
        """Estimate the bytes of the weights, from the dimensions and the quantisation.

        Counts embeddings, attention projections and feed-forward layers (three matrices each, as
        in SwiGLU); norms and biases are under one per cent and left out.
        """
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        dense = 3 * self.hidden_size * (self.intermediate_size or 0)
        experts = 0
        if self.moe:
            experts = 3 * self.hidden_size * self.moe.intermediate_size * self.moe.num_experts
        parameters = (
            2 * self.vocab_size * self.hidden_size
            + self.num_layers * attention
            + (self.num_layers - self.moe_layers) * dense
            + self.moe_layers * experts
        )
        bits = {None: 16, "fp8": 8, "int8": 8, "fp4": 4, "int4": 4}[self.quantization]
        return parameters * bits // 8


@dataclass(frozen=True)
class Serving:
    """One way the model is served: what shards its kernels."""

    tp: int
    """Tensor-parallel size as attention sees it (tp / dp under data-parallel attention)."""
    ep: int
    """Expert-parallel size."""
    origin: str
    """Where this configuration was read, or why it was assumed."""


class _Fields:
    """Typed access to a config object, with errors that name file, field and value."""

    def __init__(self, source: str, raw: Mapping[str, Any], prefix: str = "") -> None:
        self.source, self.raw, self.prefix = source, raw, prefix

    def fail(self, name: str, reason: str) -> ConfigError:
        return ConfigError(f"{self.source}: field {self.prefix}{name}: {reason}")

    def size(self, *names: str) -> int | None:
        """Return the first of `names` that is there, as a positive integer."""
        for name in names:
            value = self.raw.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise self.fail(name, f"{value!r} is not an integer")
            if not 0 < value <= _LARGEST_SIZE:
                raise self.fail(name, f"{value} is not between 1 and {_LARGEST_SIZE}")
            return value
        return None

    def required_size(self, *names: str) -> int:
        value = self.size(*names)
        if value is None:
            raise self.fail(" or ".join(names), "missing")
        return value

    def number(self, name: str) -> float | None:
        value = self.raw.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(name, f"{value!r} is not a number")
        if not math.isfinite(value) or value <= 0:
            raise self.fail(name, f"{value} is not a positive finite number")
        return float(value)

    def text(self, name: str) -> str | None:
        value = self.raw.get(name)
        if value is not None and not isinstance(value, str):
            raise self.fail(name, f"{value!r} is not a string")
        return value


def _quantization(raw: Mapping[str, Any]) -> str | None:
    """Reduce a `quantization_config` to the width of the weights."""
    config = raw.get("quantization_config")
    if not isinstance(config, Mapping):
        return None
    text = " ".join(
        str(config.get(key, "")) for key in ("quant_method", "quant_algo", "fmt", "format", "bits")
    ).lower()
    for word, width in (
        ("fp4", "fp4"),
        ("fp8", "fp8"),
        ("e4m3", "fp8"),
        ("4", "int4"),
        ("8", "int8"),
    ):
        if word in text:
            return width
    return None


def _moe(fields: _Fields) -> Moe | None:
    experts = fields.size("num_experts", "num_local_experts", "n_routed_experts")
    if experts is None or experts == 1:
        return None
    top_k = fields.required_size("num_experts_per_tok", "moe_topk", "num_experts_per_token")
    if top_k > experts:
        raise fields.fail("num_experts_per_tok", f"{top_k} exceeds the {experts} experts")
    scoring = fields.text("scoring_func") or _SCORING.get(
        fields.text("model_type") or "", "softmax"
    )
    renormalize = fields.raw.get("norm_topk_prob")
    return Moe(
        num_experts=experts,
        top_k=top_k,
        intermediate_size=fields.required_size("moe_intermediate_size", "intermediate_size"),
        num_groups=fields.size("n_group"),
        topk_group=fields.size("topk_group"),
        scoring=scoring,
        renormalize=renormalize is not False,
        routed_scaling_factor=fields.number("routed_scaling_factor"),
    )


def _check_layers(fields: _Fields, layers: int) -> None:
    """Check what says which layers are of which kind."""
    kinds = fields.raw.get("attn_type_list")
    if kinds is not None and (not isinstance(kinds, list) or len(kinds) != layers):
        raise fields.fail("attn_type_list", f"not a list of {layers} entries, one per layer")
    dense = fields.raw.get("mlp_only_layers")
    if dense is not None and not (isinstance(dense, list) and all(type(n) is int for n in dense)):
        raise fields.fail("mlp_only_layers", f"{dense!r} is not a list of layer numbers")
    fields.size("decoder_sparse_step")
    first = fields.raw.get("first_k_dense_replace")
    if first is not None and (type(first) is not int or first < 0):
        raise fields.fail("first_k_dense_replace", f"{first!r} is not a number of layers")


def parse_config(raw: Mapping[str, Any], source: str) -> ModelConfig:
    """Read a Hugging Face `config.json`.

    The language model's part is used where the config nests it (`text_config`).

    Args:
        raw: the config object.
        source: the file, for messages.

    Raises:
        ConfigError: a field is missing, of the wrong type, or impossible.
    """
    architectures = raw.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise ConfigError(f"{source}: field architectures: missing or not a non-empty list")
    if not isinstance(architectures[0], str):
        raise ConfigError(f"{source}: field architectures: {architectures[0]!r} is not a string")
    text, prefix = raw, ""
    nested = raw.get("text_config")
    if nested is not None:
        if not isinstance(nested, Mapping):
            raise ConfigError(f"{source}: field text_config: not an object")
        text, prefix = {**raw, **nested}, "text_config."
    fields = _Fields(source, text, prefix)
    hidden = fields.required_size("hidden_size")
    heads = fields.required_size("num_attention_heads")
    if "num_key_value_heads" in text and text["num_key_value_heads"] is None:
        raise fields.fail("num_key_value_heads", "null; configs that say it per layer are not read")
    kv_heads = fields.size("num_key_value_heads") or heads
    if heads % kv_heads:
        raise fields.fail(
            "num_key_value_heads", f"{kv_heads} does not divide num_attention_heads {heads}"
        )
    head_dim = fields.size("head_dim")
    if head_dim is None:
        if hidden % heads:
            raise fields.fail(
                "head_dim",
                f"missing, and hidden_size {hidden} is not a multiple of "
                f"num_attention_heads {heads}",
            )
        head_dim = hidden // heads
    layers = fields.required_size("num_hidden_layers")
    _check_layers(fields, layers)
    return ModelConfig(
        source=source,
        architecture=architectures[0],
        model_type=fields.text("model_type") or "",
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=fields.required_size("vocab_size"),
        intermediate_size=fields.size("intermediate_size"),
        rms_norm_eps=fields.number("rms_norm_eps"),
        moe=_moe(fields),
        quantization=_quantization(text),
        raw=text,
    )


def read_config(path: Path, source: str | None = None) -> ModelConfig:
    """Read a `config.json` file.

    Raises:
        ConfigError: not readable, not a JSON object, too large, or a field is wrong.
    """
    name = source or str(path)
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read ({error.strerror})") from error
    if size > _MAX_CONFIG_BYTES:
        raise ConfigError(f"{name}: {size} bytes is too large for a config.json")
    return parse_config(files.read_json_object(path, "the model config", ConfigError), name)
