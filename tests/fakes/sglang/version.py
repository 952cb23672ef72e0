"""The version that this stands for."""

__version__ = "0.5.17"
