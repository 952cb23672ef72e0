"""How a checkpoint's weights are stored, from the forms that configs have for it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tasks.model.fields import Fields

_UNQUANTISED_BITS = 16.0


@dataclass(frozen=True)
class Quantization:
    """A quantised checkpoint."""

    method: str
    """Who wrote it: `fp8`, `modelopt`, `compressed-tensors`, `mxfp4`, `awq`, ..."""
    width: str | None
    """`fp8`, `fp4`, `int8`, `int4`, ...; None where the config does not say."""
    bits: float | None
    """Bits of one weight, its share of the scales included."""
    expert_bits: float | None
    """The same of the experts' weights."""
    attention: bool
    """Whether attention's projections are quantised too, not only feed-forward layers."""


_METHODS = {
    "fp8": "fp8",
    "fbgemm_fp8": "fp8",
    "w8a8_fp8": "fp8",
    "modelopt_fp8": "fp8",
    "fp8_pb_wo": "fp8",
    "nvfp4": "fp4",
    "modelopt_fp4": "fp4",
    "mxfp4": "fp4",
    "awq": "int4",
    "gptq": "int4",
    "auto-round": "int4",
    "w8a8_int8": "int8",
    "experts_int8": "int8",
}
_SCALE_BITS = {4: 0.5, 8: 0.002}
"""A scale of 8 or 16 bits for 16 or 32 narrow weights; a 32-bit one for a block of 128 x 128."""
_FORMS = ("quantization_config", "compression_config", "quantization")
"""Where configs say it: transformers, early compressed-tensors, MLX."""
_LEFT_ALONE = ("ignore", "modules_to_not_convert", "exclude_modules", "ignored_layers")


def read_quantization(fields: Fields, beside: Fields | None) -> Quantization | None:
    """Read `quantization_config`, or ModelOpt's `hf_quant_config.json` that lies beside the config.

    Returns None for weights of 16 bits, also where only the KV cache is quantised.

    Raises:
        ConfigError: a field of it is of the wrong type.
    """
    own = next((found for name in _FORMS if (found := fields.nested(name))), None)
    if own is None and beside is not None:
        own = beside.nested("quantization")
    if own is None or not own.raw or _is_cache_only(own):
        return None
    algorithm = own.text("quant_algo")
    default = "mlx" if own.prefix.endswith("quantization.") and not algorithm else "modelopt"
    method = own.text("quant_method") or (default if not own.has("config_groups") else "")
    kind = _kind(own, method, algorithm)
    if kind is not None and kind[1] > 8:
        return None
    expert = _named(fields.text("expert_dtype") or "") or kind
    return Quantization(
        method=method or "compressed-tensors",
        width=kind and f"{kind[0]}{kind[1]}",
        bits=_bits(kind),
        expert_bits=_bits(expert),
        attention=not _spares_attention(own),
    )


def _is_cache_only(own: Fields) -> bool:
    """Whether it says that nothing but the KV cache is quantised."""
    if own.flag("load_in_8bit") is False and own.flag("load_in_4bit") is False:
        return True
    if own.raw.get("config_groups") == {}:
        return True
    return "quant_algo" in own.raw and own.raw["quant_algo"] is None


def _bits(kind: tuple[str, int] | None) -> float | None:
    if kind is None:
        return None
    return kind[1] + _SCALE_BITS[4 if kind[1] <= 4 else 8]


def _kind(own: Fields, method: str, algorithm: str | None) -> tuple[str, int] | None:
    """Return the number type (`fp` or `int`) and the bits of a weight."""
    groups = own.nested("config_groups")
    if groups is not None and groups.raw:
        kinds = [
            ("fp" if weights.text("type") == "float" else "int", bits)
            for name in groups.raw
            if (group := groups.nested(name))
            and (weights := group.nested("weights"))
            and (bits := weights.size("num_bits"))
        ]
        # Several groups: the narrowest is the experts', which are nearly all of the weights.
        return min(kinds, key=lambda kind: kind[1], default=None)
    if algorithm is not None:
        return _named(algorithm)
    bits = own.size("bits", "w_bit")
    known = _METHODS.get(method)
    if bits and (known is None or known.startswith("int")):
        return "int", bits
    if known:
        return _named(known)
    if method == "bitsandbytes":
        return "int", 4 if own.flag("load_in_4bit") else 8
    told = " ".join(
        value
        for name in ("fmt", "format", "weight_dtype", "quant_type")
        if isinstance(value := own.raw.get(name), str)
    )
    if isinstance(own.raw.get("global_quant_config"), Mapping):  # AMD Quark
        told += str(own.raw["global_quant_config"].get("weight"))
    return _named(f"{method} {told}")


def _named(text: str) -> tuple[str, int] | None:
    """Find a width in the name of an algorithm, such as `NVFP4`, `W4A16_AWQ`, `MIXED_PRECISION`."""
    lowered = text.lower()
    for pattern, kind in (
        (r"fp4|mixed_precision", ("fp", 4)),
        (r"w4a|int4|awq|gptq", ("int", 4)),
        (r"fp8|e4m3", ("fp", 8)),
        (r"w8a|int8", ("int", 8)),
    ):
        if re.search(pattern, lowered):
            return kind
    return None


def _spares_attention(own: Fields) -> bool:
    """Whether the modules left alone include attention's projections."""
    named: list[Any] = []
    for name in _LEFT_ALONE:
        listed = own.raw.get(name)
        named += listed if isinstance(listed, list) else []
    return any(re.search(r"attn(?!.*norm)", str(entry)) for entry in named)


def bits_of(quantization: Quantization | None, part: str) -> float | None:
    """Return the bits of one weight in `attention`, `experts` or `dense`; None if not known."""
    if quantization is None or (part == "attention" and not quantization.attention):
        return _UNQUANTISED_BITS
    return quantization.expert_bits if part == "experts" else quantization.bits
