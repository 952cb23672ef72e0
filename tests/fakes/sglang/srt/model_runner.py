"""A model of which only the FlashInfer calls are made, as SGLang 0.5.17 makes them.

`layers/attention/flashinfer_backend.py`, `layers/layernorm.py` (through sglang-kernel) and
`layers/sampler.py`. On a CPU every call raises once its inputs were dumped, which is all that is
wanted of it.
"""

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Pool, Request

_OVERALLOCATED = 256
_GARBAGE = 2**31 - 1
_TRUE = {"true", "1", "yes", "y"}


def _call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Call a kernel of which only the inputs count."""
    with contextlib.suppress(Exception):
        function(*args, **kwargs)


def _int32(values: Sequence[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _offsets(lengths: Sequence[int]) -> torch.Tensor:
    return _int32([0, *accumulate(lengths)])


class ModelRunner:
    """Plans and runs a step's kernels."""

    def __init__(self, args: dict[str, Any]) -> None:
        self.args = args
        config = json.loads((Path(args["model_path"]) / "config.json").read_text())
        config = {**config, **config.get("text_config", {})}
        config |= json.loads(args["json_model_override_args"])
        tp = args["tp_size"]
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.architecture: str = config["architectures"][0]
        self.layers: int = config["num_hidden_layers"]
        self.hidden: int = config["hidden_size"]
        self.eps: float = config["rms_norm_eps"]
        self.vocab_size: int = config["vocab_size"]
        self.heads: int = heads // tp
        self.kv_heads: int = max(1, kv_heads // tp)
        self.head_dim: int = config.get("head_dim") or self.hidden // heads
        self.context_length = args["context_length"] or config["max_position_embeddings"]
        self.deterministic: bool = args["enable_deterministic_inference"]
        self.samples = args["sampling_backend"] == "flashinfer"
        paged = os.environ.get("SGLANG_FLASHINFER_USE_PAGED", "").lower() in _TRUE
        self.ragged = not paged and not self.deterministic
        self.decodes = (args["decode_attention_backend"] or args["attention_backend"]) == (
            "flashinfer"
        )
        self.prefills = (args["prefill_attention_backend"] or args["attention_backend"]) == (
            "flashinfer"
        )
        # Norms are FlashInfer's with any attention backend; `no_flashinfer` is without any.
        self.norms = not self.deterministic and args["attention_backend"] != "triton"
        self._make_wrappers()

    def _make_wrappers(self) -> None:
        from flashinfer import norm, sampling
        from flashinfer.decode import BatchDecodeWithPagedKVCacheWrapper as Decode
        from flashinfer.prefill import BatchPrefillWithPagedKVCacheWrapper as Paged
        from flashinfer.prefill import BatchPrefillWithRaggedKVCacheWrapper as Ragged

        # Their constructors want a GPU.
        self.decode_wrapper = Decode.__new__(Decode)
        self.paged_wrapper = Paged.__new__(Paged)
        self.ragged_wrapper = Ragged.__new__(Ragged)
        self.rmsnorm, self.fused_add_rmsnorm = norm.rmsnorm, norm.fused_add_rmsnorm
        self.sample = sampling.top_k_top_p_sampling_from_probs

    def allocate(self, tokens: int) -> None:
        """Make the KV pool, which all layers share here."""
        shape = (tokens + self.args["page_size"], self.kv_heads, self.head_dim)
        self.kv = tuple(torch.zeros(shape, dtype=torch.bfloat16) for _ in range(2))
        self.norm_weight = torch.ones(self.hidden, dtype=torch.bfloat16)

    def extend(self, batch: "list[Request]", pool: "Pool") -> None:
        """Prefill."""
        prefixes = [request.prefix for request in batch]
        new = [request.length - request.prefix for request in batch]
        if self.prefills:
            self._plan_prefill(batch, pool, prefixes, new)
        hit = any(prefixes)
        self._forward(sum(new), lambda q: self._prefill(q, hit=hit), self.prefills)
        self._sample(batch)

    def _plan_prefill(
        self, batch: "list[Request]", pool: "Pool", prefixes: list[int], new: list[int]
    ) -> None:
        heads = (self.heads, self.kv_heads, self.head_dim)
        # The ragged wrapper takes the new tokens, the paged one what is cached before them; alone,
        # the paged one takes all.
        lengths = prefixes if self.ragged else [request.length for request in batch]
        slots = [s for r, n in zip(batch, lengths, strict=True) for s in r.slots(n, pool)]
        if self.ragged:
            # The same tensor twice in SGLang: two on a CPU, where safetensors refuses that.
            _call(
                self.ragged_wrapper.begin_forward,
                _offsets(new),
                _offsets(new),
                *heads,
                q_data_type=torch.bfloat16,
            )
        _call(
            self.paged_wrapper.begin_forward,
            _offsets(new),
            _offsets(lengths),
            _int32(slots + [_GARBAGE] * _OVERALLOCATED),
            torch.ones(len(batch), dtype=torch.int32),
            *heads,
            1,
            q_data_type=torch.bfloat16,
            kv_data_type=torch.bfloat16,
            custom_mask=None,
            non_blocking=True,
            fixed_split_size=None,
            prefix_len_ptr=None,
            token_pos_in_items_ptr=None,
            token_pos_in_items_len=0,
            max_item_len_ptr=None,
        )

    def _prefill(self, q: torch.Tensor, *, hit: bool) -> None:
        scale = self.head_dim**-0.5
        if not self.ragged:
            _call(self.paged_wrapper.forward, q, self.kv, causal=True, sm_scale=scale)
            return
        k = q.new_zeros(len(q), self.kv_heads, self.head_dim)
        run = self.ragged_wrapper.forward_return_lse if hit else self.ragged_wrapper.forward
        _call(run, q, k, torch.zeros_like(k), causal=True, sm_scale=scale)
        if hit:
            paged = self.paged_wrapper.forward_return_lse
            _call(paged, q, self.kv, causal=False, sm_scale=scale)

    def decode(self, batch: "list[Request]", pool: "Pool") -> None:
        """Make a token for each."""
        if self.decodes:
            _call(
                self.decode_wrapper.begin_forward,
                _offsets([request.length for request in batch]),
                _int32([slot for request in batch for slot in request.slots(request.length, pool)]),
                torch.ones(len(batch), dtype=torch.int32),
                self.heads,
                self.kv_heads,
                self.head_dim,
                1,
                data_type=torch.bfloat16,
                q_data_type=torch.bfloat16,
                non_blocking=True,
                fixed_split_size=None,
                disable_split_kv=False,
            )
        scale = self.head_dim**-0.5
        self._forward(
            len(batch),
            lambda q: _call(self.decode_wrapper.forward, q, self.kv, sm_scale=scale),
            self.decodes,
        )
        self._sample(batch)

    def _forward(
        self, tokens: int, attend: Callable[[torch.Tensor], None], attention: bool
    ) -> None:
        """Run the layers: a norm, then attention and two norms with their residuals each."""
        hidden = torch.zeros(tokens, self.hidden, dtype=torch.bfloat16)
        query = torch.zeros(tokens, self.heads, self.head_dim, dtype=torch.bfloat16)
        if self.norms:
            _call(self.rmsnorm, hidden, self.norm_weight, self.eps, None, None)
        for _ in range(self.layers):
            if attention:
                attend(query)
            for _ in range(2 if self.norms else 0):
                residual = torch.zeros_like(hidden)
                _call(self.fused_add_rmsnorm, hidden, residual, self.norm_weight, self.eps, None)

    def _sample(self, batch: "list[Request]") -> None:
        """Sample as SGLang does: with FlashInfer above temperature 0 and with a top_k or top_p."""
        params = [request.params for request in batch]
        greedy = all(p["temperature"] == 0 or p["top_k"] == 1 for p in params)
        simple = all(p["top_k"] > self.vocab_size and p["top_p"] == 1 for p in params)
        if greedy or simple or not self.samples:
            return
        _call(
            self.sample,
            torch.full((len(batch), self.vocab_size), 1 / self.vocab_size),
            _int32([p["top_k"] for p in params]),
            torch.tensor([p["top_p"] for p in params], dtype=torch.float32),
            filter_apply_order="joint",
        )
