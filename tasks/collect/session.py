"""What a serving session is: one launch of SGLang that serves many definitions.

These are the contracts between planning (`plan.py`), serving (`serve.py`, `engine.py`), traffic
(`traffic.py`) and the gate (`gate.py`); they are JSON on disk, so that a session goes on in another
process after a crash.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from tasks.ops.base import Hint

Mode = Literal["decode", "paged_prefill", "ragged_prefill"]

NOT_SENT = "a wave was not sent: "
"""What a text among the errors of `Served` begins with that is no request's."""


class Lengths(BaseModel):
    """Lengths of random requests, in tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    isl: int = Field(ge=1, description="Input sequence length.")
    osl: int = Field(ge=1, description="Output sequence length.")


class Traffic(BaseModel):
    """The requests of a session.

    For every pair of lengths and every batch size, `rounds` times the batch size requests are sent,
    as many at a time as the batch size says: a new one as soon as one is done.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["random", "sharegpt"] = "random"
    dataset: Path | None = None
    """ShareGPT-format file; for `sharegpt` only."""
    lengths: tuple[Lengths, ...] = (Lengths(isl=1024, osl=1024), Lengths(isl=8192, osl=1024))
    """For `random`; of `sharegpt`, `osl` of the first is the longest answer."""
    random_range_ratio: float = Field(default=0.5, gt=0, le=1)
    """Lengths are uniform between this share of `isl` (`osl`) and the whole."""
    batch_sizes: tuple[int, ...] = (1, 8, 32, 64, 128)
    rounds: int = Field(default=2, ge=1)
    seed: int = 0
    shared_prefix: float = Field(default=0.0, ge=0, lt=1)
    """Share of a random prompt that it has in common with others of its wave: a prefix hit."""
    temperature: float = Field(default=1.0, gt=0)
    """Above 0, with `top_k` and `top_p`: SGLang samples with torch, or takes the largest, else."""
    top_k: int = Field(default=50, ge=1)
    top_p: float = Field(default=0.9, gt=0, le=1)
    failures: float = Field(default=0.02, ge=0, le=1)
    """Share of requests that may fail; above it the session fails."""

    @property
    def requests(self) -> int:
        """How many requests there are in all."""
        pairs = len(self.lengths) if self.kind == "random" else 1
        return pairs * self.rounds * sum(self.batch_sizes)


class Session(BaseModel):
    """One launch of SGLang: what it is started with and what it is to show."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    """Unique within a run, safe as a folder's name."""
    model: str
    """Hugging Face repository id, or a folder with config.json."""
    sglang: str = ""
    """What names the SGLang that was planned with: its version, or its commit."""
    tp: int = Field(ge=1)
    ep: int = Field(ge=1)
    page_size: int = Field(ge=1)
    mode: Mode
    """`decode` runs in SGLang's offline Engine (on one host), the others behind its HTTP server."""
    flags: tuple[str, ...]
    """Command-line arguments of `sglang.launch_server`, without model, host and port."""
    env: dict[str, str]
    """Variables of the server's environment besides FlashInfer's own."""
    record: tuple[str, ...]
    """Names of FlashInfer calls to dump (`BatchDecodeWithPagedKVCacheWrapper.plan`, `rmsnorm`)."""
    expects: dict[str, tuple[str, ...]]
    """Definition -> the dumped names of which at least one must appear for it."""
    hints: dict[str, Hint] = {}
    """Definition -> what to look at where none of its calls appears."""
    traffic: Traffic
    tp_choices: tuple[int, ...]
    """Tensor-parallel sizes at which every one of its kernels has the same shapes."""
    gpu: str = ""
    """Architecture of the only GPUs that its kernels run on (`SM100`); empty for any."""
    warnings: tuple[str, ...] = ()
    """What its plan has to say of it."""
    nodes: int = Field(default=1, ge=1)
    """Hosts that serve it together."""
    node_rank: int = Field(default=0, ge=0)
    """Which of them this one is; the first sends the traffic."""

    @property
    def prefill(self) -> str:
        """The way of prefilling that it is made to use, if it is made to."""
        return {"paged_prefill": "paged", "ragged_prefill": "ragged"}.get(self.mode, "")

    @property
    def definitions(self) -> tuple[str, ...]:
        """The definitions that it collects for."""
        return tuple(self.expects)


class Served(BaseModel):
    """What a session's requests came to."""

    model_config = ConfigDict(extra="forbid")

    requests: int = 0
    failed: int = 0
    errors: dict[str, int] = {}
    """First line of an error -> how often."""
    output_tokens: int = 0
    seconds: float = 0.0
    waves_done: int = 0
    """Waves (a pair of lengths, a batch size) that are complete; a retry goes on behind them."""

    @property
    def not_sent(self) -> dict[str, int]:
        """Why waves were not sent -> how many."""
        return {
            text.removeprefix(NOT_SENT): count
            for text, count in self.errors.items()
            if text.startswith(NOT_SENT)
        }


class Progress(Served):
    """How far a session is, with the wave under way."""

    done: Served = Served()
    """What the complete waves came to. A retry goes on from here: it sends the wave that was under
    way again, and no request counts twice."""

    def followed_by(self, now: Served) -> Progress:
        """Return it with what has been served since."""
        same = now.waves_done == self.done.waves_done
        return Progress(**now.model_dump(), done=self.done if same else Served(**now.model_dump()))
