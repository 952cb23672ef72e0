"""Group definitions into serving sessions: as few launches of SGLang as can show all their calls.

A launch serves many definitions. It is decided by what cannot be changed while a server runs:
tensor and expert parallelism, page size, which way of prefilling, the backend flags, and whether
whole calls are recorded or plans only. A definition fits a launch that agrees in what it asks for
(`FlashInferApi.server_flags`, `.prefill`, the spec's tp, ep and page size).

Recording a plan costs a few hundred bytes. A function without a plan (norms, sampling, MoE) is
recorded with its activations and weights, for every layer and step, so such calls have a launch of
their own, with short prompts and answers and with few layers: none of what their rows hold depends
on how often a layer is repeated.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from tasks import ops
from tasks.collect.session import Lengths, Mode, Session, Traffic
from tasks.collect.traffic import Limits, limits_of, waves
from tasks.errors import CollectError, InputError
from tasks.model import ModelConfig
from tasks.model.weights import weight_bytes
from tasks.ops.base import FlashInferApi, KernelSpec

_BASE = ("--attention-backend flashinfer", "--sampling-backend flashinfer")
_OVERRIDE = "--json-model-override-args"
_PAGED = {"SGLANG_FLASHINFER_USE_PAGED": "1"}
"""SGLang then prefills with the paged wrapper (`environ.py`, 0.5.9 to 0.5.23)."""
_PROMPT, _LEAST_PROMPT, _ANSWER = 1024, 4, 16
"""Tokens of a prompt, at most and at least, and of an answer where whole calls are recorded: their
rows count tokens only."""
_MOST_RECORDED = 20e9
"""Bytes of whole calls that a session records at most, by the estimate."""
_FEWEST, _FEWEST_NESTED = 2, 4
"""Layers that show all kinds of them. Of a multimodal model some kinds may be known to SGLang only:
the full attention of each fourth layer of Llama 4."""
_LOADS_ALL = frozenset(
    {"Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"}
    | {"Llama4ForCausalLM", "Llama4ForConditionalGeneration", "Qwen3NextForCausalLM"}
)
"""Models whose weights SGLang 0.5.17 does not load where the config has fewer layers than them (a
KeyError in `load_weights`); dummy weights are as many as there are layers."""
_SIZES = (1, 2, 4, 8)
"""Tensor-parallel sizes, where a kernel is the same at all of them."""
_STEP_SECONDS = 0.03
"""A decode step of a large model on one GPU, in eager mode with plans recorded; an estimate."""
_PREFILL_TOKENS_PER_SECOND = 20_000
_START_SECONDS = 120
_OURS = frozenset(
    # What sessions emit, in all its spellings,
    {text.partition(" ")[0] for text in _BASE}
    | {"--model-path", "--model", "--host", "--port", "--page-size", "--disable-radix-cache"}
    | {"--tp-size", "--tp", "--tensor-parallel-size", "--ep-size", "--ep", "--expert-parallel-size"}
    | {"--max-running-requests", "--max-total-tokens", "--skip-server-warmup"}
    | {"--skip-tokenizer-init", "--nnodes", "--node-rank", "--dist-init-addr", "--nccl-init-addr"}
    # and what would change that in another way: ranks, GPUs, kernels, who may send requests.
    | {"--dp-size", "--dp", "--data-parallel-size", "--enable-dp-attention"}
    | {"--pp-size", "--pp", "--pipeline-parallel-size", "--attn-cp-size", "--dcp-size"}
    | {"--attention-context-parallel-size", "--decode-context-parallel-size"}
    | {"--device", "--base-gpu-id", "--gpu-id-step", "--disaggregation-mode", "--config"}
    | {"--enable-torch-compile", "--api-key", "--ssl-keyfile", "--ssl-certfile"}
)
"""Arguments that a session decides."""
_OUR_GRAPHS = "cuda-graph"
"""What is in the name of every flag of CUDA graphs, which a session does without."""
_OURS_UNLESS_FLASHINFER = {"--prefill-attention-backend", "--decode-attention-backend"}
"""Arguments that may only say what a session says: some models need it said twice."""
_BYTES_PER_SECOND = 1e9
"""Written by a server and drained, seen on an H200's host with dumps in memory."""
_PLAN_BYTES = 8_000
"""Two lines of metadata and the offsets of a plan."""


@dataclass(frozen=True)
class NodeGroup:
    """SGLang's parameters for one model over several hosts; a worker runs on each."""

    nodes: int = 1
    rank: int = 0
    address: str = ""
    """Host and port of the first node, `--dist-init-addr`."""

    @property
    def arguments(self) -> tuple[str, ...]:
        """The server's arguments."""
        if self.nodes == 1:
            return ()
        nodes, rank = str(self.nodes), str(self.rank)
        return ("--nnodes", nodes, "--node-rank", rank, "--dist-init-addr", self.address)


@dataclass(frozen=True)
class Wish:
    """What collection is asked for besides the definitions."""

    model: str
    """Hugging Face repository id, or a folder with config.json."""
    traffic: Traffic = field(default_factory=Traffic)
    flags: tuple[str, ...] = ()
    """More arguments for the server, after ours: `--load-format`, `dummy`."""
    env: Mapping[str, str] = field(default_factory=dict)
    nodes: NodeGroup = NodeGroup()
    all_layers: bool = False
    """Record whole calls with all of the model's layers too."""
    record_runs: bool = False
    """Record the attention wrappers' runs as well as their plans; the KV pool is capped then."""

    @property
    def asked(self) -> Mapping[str, str]:
        """The flags that are asked for, with their values; empty for those without."""
        return _by_name(self.flags)

    @property
    def overrides(self) -> bool:
        """Whether the model's config is changed as the user wants it."""
        return _OVERRIDE in self.asked

    @property
    def dummies(self) -> bool:
        """Whether the model's weights are made up."""
        return self.asked.get("--load-format") == "dummy"


class Estimate(BaseModel):
    """What a session will come to, roughly."""

    model_config = ConfigDict(frozen=True)

    calls: dict[str, int]
    """Dumped name -> calls of one rank."""
    seconds: float
    recorded_mb: float
    """Written in all; what lies on disk at a time is bounded by the consumer."""
    not_sent: dict[str, int] = {}
    """Why waves will not be sent -> how many; they count in nothing else."""


class Plan(BaseModel):
    """The sessions of a model, and what no session can show."""

    sessions: list[Session]
    not_collected: dict[str, str]
    """Definition -> why there is no call to record."""

    def launches_one_by_one(self, batch_sizes: int) -> int:
        """Return how many launches there would be, one per definition and batch size."""
        return batch_sizes * sum(len(session.definitions) for session in self.sessions)


@dataclass(frozen=True)
class _Launch:
    """A launch being put together: what its definitions agree on so far."""

    tp: frozenset[int]
    """Sizes that all allow; empty while any would do."""
    ep: frozenset[int]
    page_size: int | None
    prefill: str
    whole: bool
    """Whether whole calls are recorded."""
    gpu: str
    """Architecture of the only GPUs that it starts on; empty for any."""
    options: Mapping[str, str]
    kernels: tuple[tuple[KernelSpec, FlashInferApi], ...] = ()

    def joined(self, other: _Launch) -> _Launch | None:
        """Return a launch that shows both, if one can."""
        tp, ep = _common(self.tp, other.tp), _common(self.ep, other.ep)
        if tp is None or ep is None or (self.whole, self.gpu) != (other.whole, other.gpu):
            return None
        if None not in (self.page_size, other.page_size) and self.page_size != other.page_size:
            return None
        if self.prefill and other.prefill and self.prefill != other.prefill:
            return None
        shared = self.options.keys() & other.options.keys()
        if any(self.options[name] != other.options[name] for name in shared):
            return None
        if self.speculative != other.speculative:
            return None
        return replace(
            self,
            tp=tp,
            ep=ep,
            page_size=self.page_size or other.page_size,
            prefill=self.prefill or other.prefill,
            options={**self.options, **other.options},
            kernels=(*self.kernels, *other.kernels),
        )

    @property
    def speculative(self) -> Mapping[str, str]:
        """Options of speculative decoding, which changes the calls of everything else too."""
        return {name: v for name, v in self.options.items() if name.startswith("--speculative")}

    @property
    def demands(self) -> tuple[bool, bool, bool]:
        """What is hard to place comes first."""
        return (not self.prefill, self.page_size in (None, 1), not self.tp)


def _common(one: frozenset[int], other: frozenset[int]) -> frozenset[int] | None:
    if not one or not other:
        return one or other
    return one & other or None


def _alone(spec: KernelSpec, api: FlashInferApi, hosts: int) -> _Launch:
    """Return the launch that one definition asks for, on hosts that share its ranks evenly."""
    options = {}
    for text in (*_BASE, *api.server_flags):
        name, _, value = text.partition(" ")
        options[name] = value
    asked = options.pop("--page-size", None)
    return _Launch(
        tp=frozenset(size for size in spec.tp if size % hosts == 0),
        ep=frozenset(spec.ep),
        page_size=int(asked) if asked else spec.axes.get("page_size"),
        prefill=api.prefill,
        whole=not all(name.endswith(".plan") for name in api.recorded),
        gpu=api.gpu,
        options=options,
        kernels=((spec, api),),
    )


def plan_sessions(
    specs: Iterable[KernelSpec],
    model: ModelConfig,
    wish: Wish,
    flags: Collection[str],
    gpu_memory_gb: float = math.inf,
) -> Plan:
    """Group definitions into sessions.

    Args:
        specs: the kernels to collect workloads for.
        model: the model's config.
        wish: what is asked for besides.
        flags: the server flags that the SGLang that will run has, by spelling.
        gpu_memory_gb: memory of one GPU; where a launch may choose, it takes enough of them.

    Raises:
        CollectError: SGLang lacks a flag that a session needs.
        InputError: it lacks one that was asked for, or hosts cannot share a kernel's size.
    """
    specs = list(specs)
    _check_asked(wish, flags)
    _check_hosts(wish, specs)
    launches: list[_Launch] = []
    not_collected = {}
    alone = []
    for spec in specs:
        provider = ops.op_module(spec.op_type).provider(spec)
        if not isinstance(provider, FlashInferApi):
            not_collected[spec.name] = provider.reason
        elif reason := _why_not(provider, model, flags):
            not_collected[spec.name] = reason
        else:
            alone.append(_alone(spec, provider, wish.nodes.nodes))
    for launch in sorted(alone, key=lambda launch: launch.demands):
        for index, known in enumerate(launches):
            joined = known.joined(launch)
            if joined is not None:
                launches[index] = joined
                break
        else:
            launches.append(launch)
    sessions = [_session(launch, model, wish, flags, gpu_memory_gb) for launch in launches]
    return Plan(sessions=_named(sessions), not_collected=not_collected)


def _why_not(api: FlashInferApi, model: ModelConfig, flags: Collection[str]) -> str:
    """Say why no session of this model and this SGLang can show a call; empty if one can."""
    width = model.quantization.width if model.quantization else None
    if api.quantization not in ("", width):
        return (
            f"runs on {api.quantization} weights, and those of {model.source} are "
            f"{width or 'of 16 bits'}"
        )
    missing = [text for text in api.server_flags if text.partition(" ")[0] not in flags]
    if missing:
        return f"SGLang needs {missing[0]} for it, and the one that is to run has no such flag"
    return ""


def _named(sessions: Sequence[Session]) -> list[Session]:
    """Number sessions whose names would be equal (their backend flags differ)."""
    seen: dict[str, int] = {}
    named = []
    for session in sessions:
        seen[session.id] = count = seen.get(session.id, 0) + 1
        name = session.id if count == 1 else f"{session.id}-{count}"
        named.append(session.model_copy(update={"id": name}))
    return named


def _session(
    launch: _Launch, model: ModelConfig, wish: Wish, flags: Collection[str], gpu_memory_gb: float
) -> Session:
    modes: dict[str, Mode] = {"paged": "paged_prefill", "ragged": "ragged_prefill"}
    mode: Mode = modes.get(launch.prefill, "decode")
    ep, page_size = min(launch.ep or {1}), launch.page_size or 1
    record = {name for _, api in launch.kernels for name in api.recorded}
    if wish.record_runs:
        record |= {name for _, api in launch.kernels for name in api.dumps}
    traffic, options = wish.traffic, dict(launch.options)
    layers, warnings = model.num_layers, list[str]()
    if launch.whole:
        asked = wish.all_layers or wish.overrides
        fewer = None if asked else few_layers(model, wish.dummies)
        if fewer is not None:
            layers = fewer
            options[_OVERRIDE] = json.dumps(_with_layers(model, layers))
        if asked:
            traffic = _brief(traffic)
        else:
            traffic = _within(_MOST_RECORDED / len(record), traffic, model, layers)
        if fewer is None and not asked:
            warnings.append(_all_served(traffic, model))
    if mode == "paged_prefill":
        # A cached prefix is what makes a paged prefill more than a ragged one.
        traffic = traffic.model_copy(update={"shared_prefix": traffic.shared_prefix or 0.5})
    else:
        options["--disable-radix-cache"] = ""
    # Experts are spread over the tensor-parallel ranks, and these evenly over hosts.
    least = math.lcm(ep, wish.nodes.nodes)
    sizes = sorted(size for size in launch.tp or _SIZES if size % least == 0) or [least]
    needed = weight_bytes(model) / 1e9 * layers / model.num_layers
    tp = next((size for size in sizes if size * gpu_memory_gb > needed), sizes[-1])
    if tp * gpu_memory_gb <= needed:
        warnings.append(
            f"the weights take about {needed:.0f} GB, and {tp} GPU{'s have' if tp > 1 else ' has'} "
            f"{tp * gpu_memory_gb:.0f} (gpu_memory_gb); its kernels are of no larger tp"
        )
    options |= {"--tp-size": str(tp), "--page-size": str(page_size)}
    if ep > 1:
        options["--ep-size"] = str(ep)
    options["--max-running-requests"] = str(max(traffic.batch_sizes))
    options |= eager_options(flags)
    _check_kept(wish, options)
    arguments = [word for name, value in options.items() for word in (name, value) if word]
    arguments += [*wish.nodes.arguments, *wish.flags]
    _check_flags(arguments, flags)
    what = "calls" if launch.whole else mode.replace("_", "-")
    return Session(
        id=f"tp{tp}-ep{ep}-ps{page_size}-{what}",
        model=wish.model,
        tp=tp,
        ep=ep,
        page_size=page_size,
        mode=mode,
        flags=tuple(arguments),
        env={**(_PAGED if mode == "paged_prefill" else {}), **wish.env},
        record=tuple(sorted(record)),
        expects={spec.name: api.recorded for spec, api in launch.kernels},
        hints={spec.name: api.hint for spec, api in launch.kernels},
        traffic=traffic,
        tp_choices=tuple(sizes),
        gpu=launch.gpu,
        warnings=tuple(warnings),
        nodes=wish.nodes.nodes,
        node_rank=wish.nodes.rank,
    )


def _brief(traffic: Traffic, prompt: int = _PROMPT, answer: int = _ANSWER) -> Traffic:
    """Return the same batches of shorter prompts with short answers, once."""
    pairs = (Lengths(isl=min(n.isl, prompt), osl=min(n.osl, answer)) for n in traffic.lengths)
    return traffic.model_copy(update={"lengths": tuple(dict.fromkeys(pairs)), "rounds": 1})


def _within(room: float, traffic: Traffic, model: ModelConfig, layers: int) -> Traffic:
    """Return it so brief that one function's whole calls take no more than `room` bytes, about.

    Where even the shortest requests are too much, the largest batches are left out. The prompts of
    a file are as long as they are.
    """

    def fits(brief: Traffic) -> bool:
        return _whole_bytes(_Volume.of(brief, limits_of(model)), model, layers) <= room

    brief, prompt, answer = _brief(traffic), _PROMPT, _ANSWER
    if traffic.kind != "random":
        return brief
    while not fits(brief) and prompt > _LEAST_PROMPT:
        prompt //= 2
        answer = max(2, min(answer, prompt // 4))
        brief = _brief(traffic, prompt, answer)
    while not fits(brief) and len(brief.batch_sizes) > 1:
        brief = brief.model_copy(update={"batch_sizes": brief.batch_sizes[:-1]})
    return brief


def _all_served(traffic: Traffic, model: ModelConfig) -> str:
    """Say that whole calls are recorded of all layers, and of which requests."""
    prompt = max(length.isl for length in traffic.lengths)
    sizes = ", ".join(map(str, traffic.batch_sizes))
    text = (
        f"all {model.num_layers} layers are recorded, so of prompts of at most {prompt} tokens, at "
        f"batch sizes {sizes}"
    )
    if model.architecture in _LOADS_ALL:
        text += "; SGLang loads fewer of this model with --server-flag='--load-format dummy' only"
    return text


def few_layers(model: ModelConfig, dummies: bool = False) -> int | None:
    """Return how many of the model's layers show every kind of it, if fewer may be served.

    None where SGLang does not load fewer layers than the weights have, and where what the layers
    are is not stated from the first on (they share keys with the last ones, or their config is
    nested twice).

    Args:
        model: the model's config.
        dummies: whether its weights are made up and not loaded.
    """
    fields = model.fields
    stated = fields.has("num_hidden_layers", "layers_block_type", "layer_types")
    shared = fields.raw.get("num_kv_shared_layers")
    loads = dummies or model.architecture not in _LOADS_ALL
    if not (stated and loads) or shared or fields.prefix.count(".") > 1:
        return None
    kinds: list[Sequence[Any]] = [
        [replace(layer, dense_width=layer.dense_width and 1) for layer in model.layers]
    ]
    for values in _listed(model).values():
        # Lists of sizes and words say what is not read here; numbers of layers do not repeat.
        words = [value for value in values[: model.num_layers] if isinstance(value, str | int)]
        if len(words) == model.num_layers > len(set(words)):
            kinds.append(words)
    last = max(known.index(kind) for known in kinds for kind in known)
    return min(model.num_layers, max(_FEWEST_NESTED if fields.prefix else _FEWEST, 1 + last))


def _listed(model: ModelConfig) -> dict[str, Any]:
    """Return what the config lists layer by layer, as a list or as a pattern of letters."""
    return {
        name: value
        for name, value in model.fields.raw.items()
        if (isinstance(value, list) or (isinstance(value, str) and "pattern" in name))
        and len(value) >= model.num_layers
    }


def _with_layers(model: ModelConfig, layers: int) -> dict[str, Any]:
    """Return what to override in the model's config so that it has fewer layers.

    What is listed layer by layer is shortened too; entries behind those of all layers belong to
    layers that predict further tokens, and stay. SGLang 0.5.17 merges a nested part into the
    config's (`hf_transformers/config.py: get_config`).
    """
    part: dict[str, Any] = {"num_hidden_layers": layers}
    for name, value in _listed(model).items():
        part[name] = value[:layers] + value[model.num_layers :]
    nested = model.fields.prefix.removesuffix(".")
    return {nested: part} if nested else part


def eager_options(flags: Collection[str]) -> dict[str, str]:
    """Return what makes this SGLang run every step eagerly, as itself and not as our request.

    A replayed CUDA graph calls no FlashInfer function, and SGLang's warm-up request is none of
    ours. Which flags there are depends on the version: `--disable-cuda-graph` turns prefill graphs
    off too from 0.5.14 on, before that they had a flag of their own, which 0.5.20 refuses.
    """
    graphs = {"--disable-cuda-graph": ""}
    if "--disable-cuda-graph" not in flags:
        graphs = {
            "--cuda-graph-backend-decode": "disabled",
            "--cuda-graph-backend-prefill": "disabled",
        }
    elif "--cuda-graph-backend-prefill" not in flags:
        graphs |= {name: "" for name in ("--disable-piecewise-cuda-graph",) if name in flags}
    return {**graphs, "--skip-server-warmup": "", "--skip-tokenizer-init": ""}


def _check_flags(arguments: Sequence[str], flags: Collection[str]) -> None:
    unknown = _unknown(arguments, flags)
    if unknown:
        raise CollectError(f"{', '.join(unknown)}: the SGLang that is to run has no such flag")


def _check_asked(wish: Wish, flags: Collection[str]) -> None:
    """Check that SGLang has the flags that were asked for besides."""
    unknown = _unknown(wish.flags, flags)
    if unknown:
        raise InputError(
            f"--server-flag: {', '.join(unknown)}: the SGLang that is to run has no such flag"
        )


def _check_kept(wish: Wish, options: Mapping[str, str]) -> None:
    """Check that nothing is asked for that a session sets otherwise for its kernels."""
    for name, value in wish.asked.items():
        if name != _OVERRIDE and options.get(name, value) != value:
            raise InputError(
                f"--server-flag: {name} is decided by the session: {options[name]} for its kernels"
            )


def _check_hosts(wish: Wish, specs: Sequence[KernelSpec]) -> None:
    """Check that each kernel has a tensor-parallel size that the hosts can share evenly."""
    nodes = wish.nodes.nodes
    for spec in specs:
        if spec.tp and all(size % nodes for size in spec.tp):
            sizes = ", ".join(map(str, spec.tp))
            raise InputError(
                f"--nnodes: {spec.name} is of tp {sizes}, which {nodes} hosts cannot share evenly; "
                "name those that they can with --definitions"
            )


def _unknown(arguments: Sequence[str], flags: Collection[str]) -> list[str]:
    return [name for name in _by_name(arguments) if name not in flags]


def _by_name(arguments: Sequence[str]) -> dict[str, str]:
    """Return flag -> value, empty for one that has none."""
    found = {}
    for word, following in zip(arguments, (*arguments[1:], "--"), strict=False):
        if word.startswith("--"):
            name, given, value = word.partition("=")
            found[name] = value if given or following.startswith("--") else following
    return found


@dataclass(frozen=True)
class _Volume:
    """How much is served, about."""

    steps: float
    """Of decoding."""
    requests: float
    prompts: float
    """Tokens of the prompts."""
    answers: float
    """Tokens of the answers."""
    indices: float
    """Entries of the page tables of all decode steps, at page size 1."""

    @classmethod
    def of(cls, traffic: Traffic, limits: Limits) -> _Volume:
        """Count what of the traffic the server has room for."""
        share = (1 + traffic.random_range_ratio) / 2
        steps = requests = prompts = answers = indices = 0.0
        for length, batch in product(traffic.lengths, traffic.batch_sizes):
            if traffic.kind == "random" and not limits.fit(length.isl, length.osl):
                continue
            wave = traffic.rounds * length.osl * share
            steps += wave
            requests += traffic.rounds * batch
            prompts += traffic.rounds * batch * length.isl * share
            answers += wave * batch
            indices += wave * batch * (length.isl + length.osl / 2) * share
        return cls(steps, requests, prompts, answers, indices)


def _whole_bytes(volume: _Volume, model: ModelConfig, layers: int) -> float:
    """Return about how many bytes one function's calls take that are recorded whole."""
    return 3 * 2 * model.hidden_size * (volume.prompts + volume.answers) * 2 * layers


def _layers_of(session: Session, model: ModelConfig) -> int:
    """Return how many layers a session serves, as far as it is told to serve fewer."""
    if _OVERRIDE not in session.flags:
        return model.num_layers
    try:
        part = json.loads(session.flags[session.flags.index(_OVERRIDE) + 1])
    except ValueError:  # of the user's own; SGLang will say so
        return model.num_layers
    for name in ("num_hidden_layers", model.fields.prefix.removesuffix(".")):
        found = part.get(name) if isinstance(part, dict) else None
        if isinstance(found, dict):
            found = found.get("num_hidden_layers")
        if type(found) is int and 0 < found < model.num_layers:
            return found
    return model.num_layers


def estimate(session: Session, model: ModelConfig) -> Estimate:
    """Estimate a session's calls, time and what it records.

    Steps are counted from the traffic; a step's time is one number for all models, so the estimate
    tells minutes from hours and no more.
    """
    traffic, limits = session.traffic, limits_of(model)
    volume, layers = _Volume.of(traffic, limits), _layers_of(session, model)
    calls = {}
    written = 0.0
    for name in session.record:
        each = volume.requests if "Prefill" in name else volume.steps
        if name.endswith(".plan"):
            held = volume.prompts if "Prefill" in name else volume.indices
            written += each * _PLAN_BYTES + (0 if "Ragged" in name else 4 * held)
        else:
            each = (volume.steps + volume.requests) * 2 * layers
            written += _whole_bytes(volume, model, layers)
        calls[name] = math.ceil(each)
    seconds = _START_SECONDS + volume.steps * _STEP_SECONDS
    seconds += volume.prompts / _PREFILL_TOKENS_PER_SECOND + written / _BYTES_PER_SECOND
    return Estimate(
        calls=calls,
        seconds=round(seconds),
        recorded_mb=round(written / 1e6, 1),
        not_sent=not_sent(traffic, limits),
    )


def not_sent(traffic: Traffic, limits: Limits, model: Path | None = None) -> dict[str, int]:
    """Return why waves will not be sent -> how many of them; arguments are those of `waves`.

    Raises:
        InputError: as `waves`.
    """
    smallest = traffic.model_copy(update={"batch_sizes": (1,), "rounds": 1})
    reasons = Counter(wave.not_sent for wave in waves(smallest, limits, model) if wave.not_sent)
    return {reason: count * len(traffic.batch_sizes) for reason, count in reasons.items()}


def read_arguments(texts: Iterable[str]) -> tuple[str, ...]:
    """Split server arguments as they were given, `--load-format dummy` or one word each.

    Raises:
        InputError: one begins with no flag, is quoted wrongly, or sets what the session decides.
    """
    try:
        words = tuple(word for text in texts for word in shlex.split(text))
    except ValueError as error:
        raise InputError(f"--server-flag: {error}") from error
    taken = [name for name, value in _by_name(words).items() if _is_ours(name, value)]
    if taken:
        raise InputError(
            f"--server-flag: {', '.join(taken)} is decided by the session: its kernels, its GPUs "
            "and its traffic rest on it"
        )
    short = [word for word in words if re.match(r"-[A-Za-z]", word)]
    if short or (words and not words[0].startswith("--")):
        raise InputError(f"--server-flag: {(short or words)[0]!r} is no flag")
    return words


def _is_ours(name: str, value: str) -> bool:
    if name in _OURS_UNLESS_FLASHINFER:
        return value != "flashinfer"
    return name in _OURS or _OUR_GRAPHS in name


def shown(session: Session, model: ModelConfig) -> dict[str, Any]:
    """Return a session as `--plan-only` prints it."""
    return {
        **session.model_dump(mode="json"),
        "estimate": estimate(session, model).model_dump(),
    }
