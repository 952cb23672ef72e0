"""A model's `config.json` as the op modules read it, and one way of serving the model."""

from tasks.model.config import ModelConfig, Moe, Serving, parse_config, read_config
from tasks.model.fields import Fields
from tasks.model.layers import SOFTMAX, Attention, Layer
from tasks.model.quantization import Quantization
from tasks.model.weights import weight_bytes

__all__ = [
    "SOFTMAX",
    "Attention",
    "Fields",
    "Layer",
    "ModelConfig",
    "Moe",
    "Quantization",
    "Serving",
    "parse_config",
    "read_config",
    "weight_bytes",
]
