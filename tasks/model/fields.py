"""Typed access to a config object, with errors that name the file, the field and its value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tasks.errors import ConfigError

LARGEST_SIZE = 1 << 28
"""No dimension of a model comes near it; what does is a damaged or hostile config."""


class Fields:
    """The fields of a config; several names are spellings of one thing, in order of preference."""

    def __init__(self, source: str, raw: Mapping[str, Any], prefix: str = "") -> None:
        self.source, self.raw, self.prefix = source, raw, prefix

    def fail(self, name: str, reason: str) -> ConfigError:
        """Return (not raise) the error about one field."""
        return ConfigError(f"{self.source}: field {self.prefix}{name}: {reason}")

    def has(self, *names: str) -> str | None:
        """Return the first of `names` that is there and not null."""
        return next((name for name in names if self.raw.get(name) is not None), None)

    def size(self, *names: str) -> int | None:
        """Return the first of `names` that is there, as a positive integer.

        A list with one entry per layer is taken when all its entries are the same.

        Raises:
            ConfigError: it is not a positive integer, or too large to be a size.
        """
        name = self.has(*names)
        if name is None:
            return None
        value = self.raw[name]
        if isinstance(value, list) and value and all(entry == value[0] for entry in value):
            value = value[0]
        return self.check_size(name, value)

    def check_size(self, name: str, value: Any) -> int:
        """Return `value`, read at `name`, if it is a size.

        Raises:
            ConfigError: it is not a positive integer, or too large to be a size.
        """
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fail(name, f"{_shown(value)} is not an integer")
        if not 0 < value <= LARGEST_SIZE:
            raise self.fail(name, f"{_shown(value)} is not between 1 and {LARGEST_SIZE}")
        return value

    def required_size(self, *names: str) -> int:
        """Return the first of `names` that is there, as a positive integer.

        Raises:
            ConfigError: none is there, or it is not a size.
        """
        value = self.size(*names)
        if value is None:
            raise self.fail(names[0], "missing")
        return value

    def count(self, *names: str) -> int | None:
        """Return the first of `names` that is there, as an integer of at least zero.

        Raises:
            ConfigError: it is not one.
        """
        name = self.has(*names)
        if name is not None and self.raw[name] == 0 and not isinstance(self.raw[name], bool):
            return 0
        return self.size(*names)

    def per_layer(self, layers: int, *names: str) -> list[int] | None:
        """Return sizes, one for each layer, from a list or from one size for all.

        Raises:
            ConfigError: a list is too short, or an entry is not a size.
        """
        name = self.has(*names)
        if name is None:
            return None
        value = self.raw[name]
        if not isinstance(value, list):
            return [self.check_size(name, value)] * layers
        if len(value) < layers:
            raise self.fail(name, f"{len(value)} entries for {layers} layers")
        return [self.check_size(name, entry) for entry in value[:layers]]

    def number(self, *names: str) -> float | None:
        """Return the first of `names` that is there, as a positive finite number.

        Raises:
            ConfigError: it is not one.
        """
        name = self.has(*names)
        if name is None:
            return None
        value = self.raw[name]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(name, f"{_shown(value)} is not a number")
        if not 0 < value < math.inf:
            raise self.fail(name, f"{_shown(value)} is not a positive finite number")
        return float(value)

    def text(self, *names: str) -> str | None:
        """Return the first of `names` that is there, as text.

        Raises:
            ConfigError: it is not a string.
        """
        name = self.has(*names)
        if name is None:
            return None
        value = self.raw[name]
        if not isinstance(value, str):
            raise self.fail(name, f"{_shown(value)} is not a string")
        return value

    def flag(self, *names: str) -> bool | None:
        """Return the first of `names` that is there, as a truth value (0 and 1 are taken too).

        Raises:
            ConfigError: it is not one.
        """
        name = self.has(*names)
        if name is None:
            return None
        value = self.raw[name]
        if value not in (0, 1):
            raise self.fail(name, f"{_shown(value)} is not true or false")
        return bool(value)

    def labels(self, name: str, layers: int) -> list[str]:
        """Return a list of words or numbers, one for each layer, as words.

        Entries beyond the last layer describe next-token-prediction layers and are left out.

        Raises:
            ConfigError: not a list of such entries, or too short.
        """
        value = self.raw[name]
        if isinstance(value, str):
            value = list(value)
        plain = isinstance(value, list) and all(isinstance(entry, str | int) for entry in value)
        if not plain or len(value) < layers:
            raise self.fail(name, f"not a list of {layers} entries, one per layer")
        return [str(int(entry) if isinstance(entry, bool) else entry) for entry in value[:layers]]

    def indices(self, name: str) -> frozenset[int]:
        """Return a list of layer numbers (or a comma-separated text of them) as a set.

        Raises:
            ConfigError: it is not one.
        """
        value = self.raw.get(name)
        if isinstance(value, str):
            value = [int(part) if part.strip().isdigit() else part for part in value.split(",")]
        if not isinstance(value, list) or not all(type(entry) is int for entry in value):
            raise self.fail(name, f"{_shown(value)} is not a list of layer numbers")
        return frozenset(value)

    def nested(self, name: str) -> Fields | None:
        """Return the fields of an object inside this one.

        Raises:
            ConfigError: it is there and not an object.
        """
        value = self.raw.get(name)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.fail(name, "not an object")
        return Fields(self.source, value, f"{self.prefix}{name}.")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
