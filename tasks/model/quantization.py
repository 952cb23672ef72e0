"""How a checkpoint's weights are stored, from the forms that configs have for it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tasks.model.fields import Fields

_UNQUANTISED_BITS = 16.0


@dataclass(frozen=True)
class Quantization:
    """A quantised checkpoint."""

    method: str
    """Who wrote it: `fp8`, `modelopt`, `compressed-tensors`, `mxfp4`, `awq`, ..."""
    width: str
    """`fp8`, `fp4`, `int8` or `int4`."""
    bits: float
    """Bits of one weight, its share of the scales included."""
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
_SCALE_BITS = {"fp4": 0.5, "int4": 0.5, "fp8": 0.002, "int8": 0.002}
"""A scale of 8 or 16 bits for 16 or 32 weights; a 32-bit one for a block of 128 x 128."""


def read_quantization(fields: Fields, beside: Mapping[str, Any] | None) -> Quantization | None:
    """Read `quantization_config`, or ModelOpt's `hf_quant_config.json` that lies beside the config.

    Raises:
        ConfigError: neither says how wide the weights are although one is there.
    """
    own = fields.nested("quantization_config") or fields.nested("compression_config")
    if own is None and beside is not None:
        own = Fields("hf_quant_config.json", beside).nested("quantization")
    if own is None or not own.raw:
        return None
    if own.flag("load_in_8bit") is False and own.flag("load_in_4bit") is False:
        return None
    algorithm = own.text("quant_algo")
    method = own.text("quant_method") or ("modelopt" if algorithm else "compressed-tensors")
    width = _width(own, method, algorithm)
    if width == "none":
        return None
    if width is None:
        raise own.fail("quant_method", f"{method!r}: cannot tell the width of the weights")
    bits = (4.0 if width.endswith("4") else 8.0) + _SCALE_BITS[width]
    return Quantization(method, width, bits, attention=not _spares_attention(own))


def _width(own: Fields, method: str, algorithm: str | None) -> str | None:
    groups = own.nested("config_groups")
    if groups is not None and groups.raw:
        weights = [
            inner
            for name in groups.raw
            if (group := groups.nested(name)) and (inner := group.nested("weights"))
        ]
        widths = [_typed(w.text("type") or "int", w.size("num_bits")) for w in weights]
        # Several groups: the narrowest is the experts', which are nearly all of the weights.
        return min((w for w in widths if w), key=lambda w: w[-1], default=None)
    if algorithm is not None:
        return _named(algorithm)
    found = _METHODS.get(method)
    if found and found.startswith("int") and own.has("bits", "w_bit"):
        return _typed("int", own.size("bits", "w_bit"))
    if found is None and method == "bitsandbytes":
        return "int4" if own.flag("load_in_4bit") else "int8"
    if found is None:
        text = own.text("fmt", "format", "weight_dtype", "quant_type") or ""
        found = _named(f"{method} {text}") or _typed("int", own.size("bits", "w_bit"))
    if found is None and isinstance(own.raw.get("global_quant_config"), Mapping):  # AMD Quark
        found = _named(str(own.raw["global_quant_config"].get("weight")))
    return found


def _typed(kind: str, bits: int | None) -> str | None:
    """Return the word for a number type and its bits."""
    if bits is None or bits > 8:
        return "none" if bits else None
    return f"{'fp' if kind == 'float' else 'int'}{4 if bits <= 4 else 8}"


def _named(text: str) -> str | None:
    """Find a width in the name of an algorithm, such as `NVFP4`, `W4A16_AWQ`, `MIXED_PRECISION`."""
    lowered = text.lower()
    for pattern, width in (
        (r"fp4|mixed_precision", "fp4"),
        (r"w4a|int4|awq|gptq", "int4"),
        (r"fp8|e4m3", "fp8"),
        (r"w8a|int8", "int8"),
    ):
        if re.search(pattern, lowered):
            return width
    return None


def _spares_attention(own: Fields) -> bool:
    """Whether the modules left alone include attention's projections."""
    for name in ("ignore", "modules_to_not_convert", "exclude_modules", "ignored_layers"):
        listed = own.raw.get(name)
        if isinstance(listed, Iterable) and not isinstance(listed, str):
            return any(re.search(r"attn(?!.*norm)", str(entry)) for entry in listed)
    return False


def bits_of(quantization: Quantization | None, *, attention: bool) -> float:
    """Return the bits of one weight of a linear layer."""
    if quantization is None or (attention and not quantization.attention):
        return _UNQUANTISED_BITS
    return quantization.bits
