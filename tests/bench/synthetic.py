"""Dump folders as FlashInfer writes them at level 10, with what is truly in them.

One serving step of a Llama-3.1-8B: plan, then per layer two norms and a run, then sampling. Three
of four steps decode, one prefills. Activations are zeros that take no disk: holes in the files.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

HEADS, KV_HEADS, DIM, HIDDEN, VOCABULARY = 32, 8, 128, 4096, 128256
EPS = 1e-5
DECODE = "BatchDecodeWithPagedKVCacheWrapper"
PREFILL = "BatchPrefillWithPagedKVCacheWrapper"
DEFINITIONS = {
    DECODE: "gqa_paged_decode_h32_kv8_d128_ps1",
    PREFILL: "gqa_paged_prefill_causal_h32_kv8_d128_ps1",
    "rmsnorm": "rmsnorm_h4096",
    "fused_add_rmsnorm": "fused_add_rmsnorm_h4096",
    "top_k_top_p_sampling_from_probs": "top_k_top_p_sampling_from_probs_v128256",
}
_SIGNATURES = {
    f"{DECODE}.plan": "(self, indptr: torch.Tensor, indices: torch.Tensor, last_page_len: "
    "torch.Tensor, num_qo_heads: int, num_kv_heads: int, head_dim: int, page_size: int, "
    "*deprecated_positional_args: Any, **kwargs: Any) -> None",
    f"{PREFILL}.plan": "(self, qo_indptr: torch.Tensor, paged_kv_indptr: torch.Tensor, "
    "paged_kv_indices: torch.Tensor, paged_kv_last_page_len: torch.Tensor, num_qo_heads: int, "
    "num_kv_heads: int, head_dim_qk: int, page_size: int, causal: bool = False) -> None",
    f"{DECODE}.run": "(self, q: torch.Tensor, paged_kv_cache: Any, *args) -> torch.Tensor",
    f"{PREFILL}.run": "(self, q: torch.Tensor, paged_kv_cache: Any, *args) -> torch.Tensor",
    "rmsnorm": "(input: torch.Tensor, weight: torch.Tensor, eps: float = 1e-06) -> torch.Tensor",
    "fused_add_rmsnorm": "(input: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, "
    "eps: float = 1e-06) -> None",
    "top_k_top_p_sampling_from_probs": "(probs: torch.Tensor, top_k: torch.Tensor, top_p: "
    "torch.Tensor) -> torch.Tensor",
}
_BATCHES = (1, 2, 3, 4, 7, 8, 12, 16, 24, 32, 48, 64)
_MODULES = {"rms": "flashinfer.norm", "fused": "flashinfer.norm", "top_k": "flashinfer.sampling"}
_CODES = {"int32": ("I32", 4), "float32": ("F32", 4), "bfloat16": ("BF16", 2)}


@dataclass(frozen=True)
class Zeros:
    """A tensor whose values do not matter."""

    shape: tuple[int, ...]
    dtype: str = "bfloat16"


Argument = np.ndarray | Zeros | int | float | bool | str


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray | Zeros]) -> None:
    """Write a safetensors file, zeros as a hole at its end."""
    header, end, data = {}, 0, b""
    for name, tensor in sorted(tensors.items(), key=lambda item: isinstance(item[1], Zeros)):
        dtype = tensor.dtype if isinstance(tensor, Zeros) else tensor.dtype.name
        code, width = _CODES[dtype]
        size = int(np.prod(tensor.shape, dtype=np.int64)) * width
        header[name] = {
            "dtype": code,
            "shape": list(tensor.shape),
            "data_offsets": [end, end + size],
        }
        end += size
        if isinstance(tensor, np.ndarray):
            data += tensor.tobytes()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    os.truncate(path, 8 + len(text) + end)


def _details(tensor: np.ndarray | Zeros) -> dict[str, Any]:
    dtype = tensor.dtype if isinstance(tensor, Zeros) else tensor.dtype.name
    return {"shape": list(tensor.shape), "dtype": f"torch.{dtype}", "device": "cuda:0"}


def digest(values: np.ndarray) -> str:
    """Return a hash of an index tensor's bytes."""
    return hashlib.sha256(values.tobytes()).hexdigest()


@dataclass
class Dumps:
    """A dump folder that is being written."""

    root: Path
    process: int = 41000
    written: int = 0
    truth: dict[str, set[tuple[Any, ...]]] = field(default_factory=dict)
    """Definition -> its distinct workloads: axes, and the hashes of its index tensors."""
    _clock: datetime = field(default_factory=lambda: datetime(2026, 11, 20, 9))  # noqa: DTZ001
    _calls: dict[str, int] = field(default_factory=dict)

    def call(self, name: str, *arguments: Argument, wrapper: int | None = None) -> None:
        """Write one call's folder."""
        self._clock += timedelta(milliseconds=3)
        self._calls[name] = number = self._calls.get(name, 0) + 1
        stamp = self._clock.strftime("%Y%m%d_%H%M%S_%f")[:-3]
        folder = self.root / f"{stamp}_pid{self.process}_{name}_call{number:04d}"
        folder.mkdir(parents=True)
        first = 0 if wrapper is None else 1
        named = {f"arg_{index}": value for index, value in enumerate(arguments, first)}
        tensors = {key: v for key, v in named.items() if isinstance(v, np.ndarray | Zeros)}
        values: dict[str, Any] = {key: v for key, v in named.items() if key not in tensors}
        if wrapper is not None:
            kind = name.partition(".")[0]
            values["arg_0"] = {"type": kind, "repr": f"<flashinfer.{kind} at {hex(wrapper)}>"}
        write_safetensors(folder / "inputs.safetensors", tensors)
        record = {
            "function_name": name,
            "module": next((m for k, m in _MODULES.items() if name.startswith(k)), "flashinfer"),
            "call_sequence": number,
            "timestamp": stamp,
            "process_id": self.process,
            "input_metadata": values,
            "output_metadata": {},
            "tensor_info": {"input_tensor_keys": list(tensors), "output_tensor_keys": []},
            "tensor_details": {key: _details(tensor) for key, tensor in tensors.items()},
            "tensor_format": "safetensors",
            "function_signature": _SIGNATURES[name],
            "versions": {"torch": "2.11.0", "flashinfer": "0.6.15.post1"},
            "execution_status": "inputs_saved",
            "graph_capture": False,
            **({} if wrapper is None else {"self_id": wrapper}),
        }
        lines = [
            json.dumps({**record, "execution_status": s}) for s in ("inputs_saved", "completed")
        ]
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
        self.written += 1

    def is_true(self, kernel: str, axes: Mapping[str, int], *indices: np.ndarray) -> None:
        """Note a workload that is in the dumps."""
        found = (tuple(sorted(axes.items())), *(digest(values) for values in indices))
        self.truth.setdefault(DEFINITIONS[kernel], set()).add(found)


def _offsets(lengths: Sequence[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def write_dumps(root: Path, count: int, *, layers: int = 4, sampling: bool = True) -> Dumps:
    """Write `count` calls, always the same; the last step may be incomplete."""
    chance, dumps, step = random.Random(0), Dumps(root), 0
    pool = np.random.default_rng(0)
    while dumps.written < count:
        step += 1
        _step(dumps, chance, pool, count, layers, prefill=step % 4 == 0, sampling=sampling)
    return dumps


def _step(
    dumps: Dumps,
    chance: random.Random,
    pool: np.random.Generator,
    count: int,
    layers: int,
    *,
    prefill: bool,
    sampling: bool,
) -> None:
    batch = chance.choice(_BATCHES)
    lengths = [
        max(1, min(8191 // batch, int(chance.lognormvariate(4.0, 0.8)))) for _ in range(batch)
    ]
    queries = [min(length, 48) if prefill else 1 for length in lengths]
    qo_indptr, kv_indptr, total = _offsets(queries), _offsets(lengths), sum(lengths)
    # SGLang's array of indices has room for 256 more than are meant.
    indices = np.concatenate([pool.permutation(8191)[:total] + 1, np.zeros(256)]).astype(np.int32)
    used, last = indices[:total], np.ones(batch, dtype=np.int32)
    axes = {"len_indptr": batch + 1, "num_kv_indices": total, "num_pages": int(used.max()) + 1}
    kernel, wrapper, rows = (PREFILL, 8192, sum(queries)) if prefill else (DECODE, 4096, batch)
    heads = (HEADS, KV_HEADS, DIM, 1)
    plan: tuple[Argument, ...]
    true: tuple[np.ndarray, ...]
    if prefill:
        plan = (qo_indptr, kv_indptr, indices, last, *heads, True)
        axes, true = {**axes, "total_q": rows}, (qo_indptr, kv_indptr, used)
    else:
        plan = (kv_indptr, indices, last, *heads)
        axes, true = {**axes, "batch_size": batch}, (kv_indptr, used)
    dumps.call(f"{kernel}.plan", *plan, wrapper=wrapper)
    hidden, weight = Zeros((rows, HIDDEN)), Zeros((HIDDEN,))
    for layer in range(layers):
        norms = ("fused_add_rmsnorm" if layer else "rmsnorm", "fused_add_rmsnorm")
        for norm in norms:
            if dumps.written < count:
                more = (hidden,) if norm == "fused_add_rmsnorm" else ()
                dumps.call(norm, hidden, *more, weight, EPS)
                dumps.is_true(norm, {"batch_size": rows})
        if dumps.written < count:
            dumps.call(f"{kernel}.run", Zeros((rows, HEADS, DIM)), wrapper=wrapper)
            dumps.is_true(kernel, axes, *true)
    if sampling and dumps.written < count:
        sampler = "top_k_top_p_sampling_from_probs"
        top_k, top_p = np.full(batch, 50, np.int32), np.full(batch, 0.9, np.float32)
        dumps.call(sampler, Zeros((batch, VOCABULARY), "float32"), top_k, top_p)
        dumps.is_true(sampler, {"batch_size": batch})
