"""gdn: gated delta networks, the linear attention of Qwen3-Next and Qwen3.5.

Each value head keeps a state that maps keys to values. A token decays it, corrects what it holds
for the token's key, and reads it with the token's query (the gated delta rule, arXiv 2412.06464):
with decay g and step beta, state <- g * state; state <- state + beta * (v - state k)
k^T; output = scale * state q. Here g = exp(-exp(A_log) * softplus(a + dt_bias)), beta = sigmoid(b).

`k_last` is the layout of the state, [value, key], which SGLang keeps for FlashInfer
(sglang/srt/layers/attention/linear/kernels/gdn_flashinfer.py: "K-last"). At decode it is that of
`gated_delta_rule_decode_pretranspose`; `gated_delta_rule_decode` has the other, and no caller.

The definitions take q and k as they are, as the published ones do. SGLang's prefill normalises them
before the call; its decode and its verification let the kernel do it (`use_qk_l2norm`), which is
another function, of which no definition is published: such calls are no rows.

Where tokens follow each other, rows store the keys. A token multiplies the state by
g (1 - beta k k^T): for keys of length one, as calls have them, nothing grows; random keys are
longer, and the states of most heads overflow within some hundred tokens. (Published rows store q,
v, states and gates too. Nothing needs that: gates are between 0 and 1 whatever they are made of.)

Key and value heads are sharded by tp, which must divide both (sglang/srt/models/qwen3_next.py:
`num_k_heads // attn_tp_size`, `num_v_heads // attn_tp_size`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from tasks.model import ModelConfig, Serving
from tasks.ops.arguments import (
    bound_axes,
    check_offsets,
    check_range,
    check_setting,
    check_without,
    default_scale,
    stored,
    tensor_of,
    value_of,
)
from tasks.ops.base import (
    SLOW_REFERENCE,
    Call,
    DumpError,
    Effort,
    FlashInferApi,
    Json,
    KernelSpec,
    NotProduced,
    OpModule,
    Rejected,
    Row,
    Scalar,
    const,
    register,
    rows_of,
    scalar,
    tensor,
    var,
)

_FLAGS = ("--linear-attn-backend flashinfer",)
_NORM = "use_qk_l2norm"
"""What the names of the setting begin with by which the kernel normalises q and k."""

_HEADER = """\
import math

import torch
import torch.nn.functional as F


def _gates(A_log, a, dt_bias, b):
    decay = torch.exp(-torch.exp(A_log.float()) * F.softplus(a.float() + dt_bias.float()))
    return decay, torch.sigmoid(b.float())


def _step(state, q, k, v, decay, beta):
    # q and k belong to consecutive value heads; state is [..., value head, value, key].
    q, k = (x.float().repeat_interleave(v.shape[-2] // x.shape[-2], dim=-2) for x in (q, k))
    state = decay[..., None, None] * state
    correction = beta[..., None] * (v.float() - torch.einsum("...vk,...k->...v", state, k))
    state = state + correction[..., :, None] * k[..., None, :]
    return state, torch.einsum("...vk,...k->...v", state, q)


@torch.no_grad()
def run({arguments}):
    assert q.shape[-2] == {num_q_heads}
    assert k.shape[-2] == {num_k_heads}
    assert v.shape[-2] == {num_v_heads}
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] == {head_size}
    if scale is None or scale == 0.0:
        scale = 1.0 / math.sqrt(q.shape[-1])

    decay, beta = _gates(A_log, a, dt_bias, b)
"""

_DECODE = """\
    assert q.shape[1] == {seq_len}
    if state is None:
        state = torch.zeros(v.shape[0], *v.shape[2:], k.shape[3], device=v.device)
    state, read = _step(state.float(), q[:, 0], k[:, 0], v[:, 0], decay[:, 0], beta[:, 0])
    return (scale * read)[:, None].to(v.dtype), state
"""

_PREFILL = """\
    sequences = cu_seqlens.shape[0] - 1
    if state is None:
        state = torch.zeros(sequences, *v.shape[1:], k.shape[2], device=v.device)
    new_state = state.float().clone()
    output = torch.zeros_like(v)
    for i in range(sequences):
        for t in range(int(cu_seqlens[i]), int(cu_seqlens[i + 1])):
            new_state[i], read = _step(new_state[i], q[t], k[t], v[t], decay[t], beta[t])
            output[t] = (scale * read).to(output.dtype)
    return output, new_state
"""

_MTP = """\
    assert q.shape[1] > 1
    state = initial_state[initial_state_indices.to(torch.long)].float()
    output = torch.zeros_like(v)
    for t in range(q.shape[1]):
        state, read = _step(state, q[:, t], k[:, t], v[:, t], decay[:, t], beta[:, t])
        output[:, t] = (scale * read).to(output.dtype)
    # Which of the drafted tokens are kept is not known yet, so the pool stays as it was.
    return output, initial_state.clone()
"""

_DECODE_BASELINE = """\
import torch
from flashinfer.gdn_decode import gated_delta_rule_decode_pretranspose


def run({arguments}):
    if state is None:
        state = q.new_zeros(
            v.shape[0], v.shape[2], v.shape[3], v.shape[3], dtype=torch.float32
        )
    # The API updates the state in place, and normalises q and k unless told not to.
    return gated_delta_rule_decode_pretranspose(
        q,
        k,
        v,
        state.clone(),
        A_log,
        a,
        dt_bias,
        b,
        scale=float(scale) or None,
        use_qk_l2norm=False,
    )
"""

_PREFILL_BASELINE = """\
import torch
import torch.nn.functional as F
from flashinfer.gdn_prefill import chunk_gated_delta_rule


def run({arguments}):
    if state is None:
        state = q.new_zeros(
            cu_seqlens.shape[0] - 1, v.shape[1], v.shape[2], v.shape[2], dtype=torch.float32
        )
    decay = torch.exp(-torch.exp(A_log.float()) * F.softplus(a.float() + dt_bias.float()))
    return chunk_gated_delta_rule(
        q,
        k,
        v,
        g=decay,
        beta=torch.sigmoid(b.float()),
        scale=float(scale) or None,
        initial_state=state,
        output_final_state=True,
        cu_seqlens=cu_seqlens,
        use_qk_l2norm_in_kernel=False,
        output_state=torch.empty_like(state),
    )
"""

_MTP_BASELINE = """\
from flashinfer.gdn_decode import gated_delta_rule_mtp


def run({arguments}):
    buffer = intermediate_states_buffer
    return gated_delta_rule_mtp(
        q,
        k,
        v,
        initial_state,
        initial_state_indices,
        A_log,
        a,
        dt_bias,
        b,
        scale=float(scale) or None,
        # The API counts the buffer's rows by sequence, not by slot of the pool.
        intermediate_states_buffer=None if buffer is None else buffer[: q.shape[0]],
        disable_state_update=True,
        use_qk_l2norm=False,
    )
"""

_TEST = '''\
# Not 1/sqrt(head_size): the input must be what decides.
SCALE = 0.3


def tokens(generator, *rows):
    """Return the inputs that every stage has; keys have length one, as the model makes them."""
    keys, values, size = CONST["num_k_heads"], CONST["num_v_heads"], CONST["head_size"]
    k = torch.nn.functional.normalize(torch.randn(*rows, keys, size, generator=generator), dim=-1)
    return {
        "q": random(generator, *rows, keys, size),
        "k": k.to(torch.bfloat16),
        "v": random(generator, *rows, values, size),
        "A_log": random(generator, values, dtype="float32"),
        "a": random(generator, *rows, values),
        "dt_bias": random(generator, values, dtype="float32"),
        "b": random(generator, *rows, values),
    }


def states(generator, *shape):
    size = CONST["head_size"]
    return random(generator, *shape, CONST["num_v_heads"], size, size, dtype="float32")


def in_order(values):
    return {name: values[name] for name in DEFINITION["inputs"]}


def decode(count, state=True, scale=SCALE):
    generator = seeded(count)
    values = tokens(generator, count, 1)
    return in_order(
        {**values, "state": states(generator, count) if state else None, "scale": scale}
    )


def prefill(*lengths, scale=SCALE):
    generator = seeded(len(lengths))
    values = tokens(generator, sum(lengths))
    # Not absent: nothing else says the number of sequences, which a constraint uses.
    values["state"] = states(generator, len(lengths))
    values["cu_seqlens"] = offsets(lengths, torch.int64)
    return in_order({**values, "scale": scale})


def mtp(drafted, slots, buffer=True, scale=SCALE):
    generator, pool = seeded(drafted), len(slots) + 2
    values = tokens(generator, len(slots), drafted)
    values["initial_state"] = states(generator, pool)
    values["initial_state_indices"] = torch.tensor(slots, dtype=torch.int32)
    # What is in the scratch space must not matter.
    values["intermediate_states_buffer"] = states(generator, pool, drafted) if buffer else None
    return in_order({**values, "scale": scale})


# A scale of 0 stands for 1/sqrt(head_size), an absent state for zeros.
CASES = {
    "decode": {
        "four sequences": lambda: decode(4),
        "no state, scale 0": lambda: decode(1, state=False, scale=0.0),
    },
    "prefill": {
        "two sequences": lambda: prefill(1, 9),
        "an empty sequence": lambda: prefill(2, 0, 3),
        "scale 0": lambda: prefill(3, scale=0.0),
    },
    "mtp": {
        "slots out of order": lambda: mtp(3, slots=[3, 0]),
        "no buffer, scale 0": lambda: mtp(2, slots=[1], buffer=False, scale=0.0),
    },
}[VARIANT]


def delta_rule(q, k, v, decay, beta, state):
    """Return one sequence's output, before the scale, and its last state, without a recurrence.

    With u_t = beta_t (v_t - g_t S_{t-1} k_t), the state is S_t = sum over s <= t of D_ts u_s k_s^T,
    and D_t S_0, where D_ts is the decay from s to t and D_t that from the beginning. So all u
    solve one triangular system, as in the papers' parallel form (arXiv 2406.06484, 2412.06464).
    Tensors are [head, token, ...] and [head, value, key].
    """
    if v.shape[1] == 0:
        return v, state
    total = decay.log().cumsum(1)
    between = (total[:, :, None] - total[:, None]).exp().tril()
    since = total.exp()[..., None]
    system = beta[..., None] * between * (k @ k.mT)
    right = beta[..., None] * (v - since * (k @ state.mT))
    # The diagonal is taken to be 1, whatever it is.
    u = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    read = since * (q @ state.mT) + (between * (q @ k.mT)) @ u
    return read, since[:, -1:] * state + (between[:, -1, :, None] * u).mT @ k


def check(inputs, outputs, kernel):
    q, k, v, a, b = (inputs[name].double() for name in "qkvab")
    shared = v.shape[-2] // k.shape[-2]
    q, k = (x.repeat_interleave(shared, dim=-2) for x in (q, k))
    beta = 1 / (1 + (-b).exp())
    # Softplus is log(1 + e^x), of which e^-exp(A_log) is a power.
    decay = (1 + (a + inputs["dt_bias"].double()).exp()) ** -inputs["A_log"].double().exp()
    parts = [q, k, v, decay, beta]
    if VARIANT == "prefill":
        lengths = inputs["cu_seqlens"].diff().tolist()
        parts = [x.split(lengths) for x in parts]
    given = inputs["initial_state" if VARIANT == "mtp" else "state"]
    if given is None:
        given = torch.zeros(len(parts[0]), v.shape[-2], v.shape[-1], k.shape[-1])
    if VARIANT == "mtp":
        # Which drafted tokens are kept is not known yet: the pool stays as it was.
        assert torch.equal(outputs["final_state"], given)
        given = given[inputs["initial_state_indices"].long()]
    results = [
        delta_rule(*(x.transpose(0, 1) for x in sequence), state)
        for *sequence, state in zip(*parts, given.double(), strict=True)
    ]
    scale = inputs["scale"] or 1 / math.sqrt(CONST["head_size"])
    join = torch.cat if VARIANT == "prefill" else torch.stack
    expected = {"output": scale * join([read.transpose(0, 1) for read, _ in results])}
    if VARIANT != "mtp":
        expected["new_state"] = torch.stack([state for _, state in results])
    # Sums of values as large as the largest ones. A kernel may use bfloat16 on the way, with which
    # some roundings of 2^-8 add up.
    for name, values in expected.items():
        size = values.abs().max().item()
        assert_close(outputs[name], values, kernel, loose=2.0**-6, size=size)
'''

_AXES = {
    "seq_len": "Tokens of each sequence.",
    "num_q_heads": "Query heads of one rank, as many as key heads.",
    "num_k_heads": "Key heads of one rank.",
    "num_v_heads": "Value heads of one rank; consecutive ones share a key head.",
    "head_size": "Dimension of one head, of keys and of values.",
}
_TOKENS = ("q", "k", "v", "A_log", "a", "dt_bias", "b")
_STATE_AXES = ("num_v_heads", "head_size", "head_size")
_HEAD_CONSTRAINTS = (
    "num_v_heads >= num_q_heads",
    "num_v_heads % num_q_heads == 0",
    "num_k_heads == num_q_heads",
)


@dataclass(frozen=True)
class _Stage:
    """What differs between the three kernels."""

    what: str
    api: FlashInferApi
    body: str
    baseline: str
    rows: tuple[str, ...]
    """Axes that count the tokens."""
    states: str
    """Axis that counts the states."""
    new_state: tuple[str, str]
    """Name and description of the second output."""
    variable: Mapping[str, str]
    constraints: tuple[str, ...]
    settings: Mapping[str, tuple[bool, bool]]
    """What a call must ask for, and what it gets if it does not say: parameter -> both."""
    extras: tuple[str, ...]
    """Parameters that a call of this kernel does not pass."""
    parameters: Mapping[str, str]
    """Tensor inputs -> the API's parameters; those left out are in no call, or of another shape."""
    other_dtype: tuple[str, ...] = ()
    """Inputs that the call has in another form, of the same shape."""


def _api(
    path: str, *flags: str, reads: tuple[str, ...] = (), former: tuple[str, ...] = ()
) -> FlashInferApi:
    return FlashInferApi(
        path=path,
        former=former,
        reads=reads,
        dumps=(path.rpartition(".")[2],),
        server_flags=(*_FLAGS, *flags),
        sglang_layer="python/sglang/srt/layers/attention/linear/kernels/gdn_flashinfer.py",
    )


# Published tags name `flashinfer.gdn`, a module that FlashInfer 0.6 no longer has, and for decode
# the function of the other layout.
_STAGES = {
    "decode": _Stage(
        what="decode of one token",
        api=_api(
            "flashinfer.gdn_decode.gated_delta_rule_decode_pretranspose",
            former=("flashinfer.gdn.gated_delta_rule_decode",),
        ),
        body=_DECODE,
        baseline=_DECODE_BASELINE,
        rows=("batch_size", "seq_len"),
        states="batch_size",
        new_state=("new_state", "State after the token."),
        variable={"batch_size": "Number of sequences."},
        constraints=_HEAD_CONSTRAINTS,
        settings={"use_qk_l2norm": (False, True), "disable_state_update": (False, False)},
        # A pool of states, read through indices (SGLang on Blackwell), is another kernel.
        extras=(
            *("initial_state", "initial_state_indices", "output_state_indices"),
            "intermediate_states_buffer",
        ),
        parameters={name: name for name in (*_TOKENS, "state")},
    ),
    "prefill": _Stage(
        what="prefill",
        api=_api(
            "flashinfer.gdn_prefill.chunk_gated_delta_rule",
            former=("flashinfer.gdn.chunk_gated_delta_rule",),
            reads=("cu_seqlens", "k"),
        ),
        body=_PREFILL,
        baseline=_PREFILL_BASELINE,
        rows=("total_seq_len",),
        states="num_seqs",
        new_state=("new_state", "State after each sequence's last token."),
        variable={
            "total_seq_len": "Tokens of all sequences.",
            "num_seqs": "Number of sequences.",
            "len_cu_seqlens": "Length of cu_seqlens (num_seqs + 1).",
        },
        constraints=("len_cu_seqlens == num_seqs + 1", "total_seq_len == cu_seqlens[-1].item()"),
        settings={"use_qk_l2norm_in_kernel": (False, False), "output_final_state": (True, False)},
        extras=("state_indices",),
        # The API takes the gates ready. What they were made of is an activation and weights, which
        # are random in a row as q, k and v are: that the gates are there, one for each token and
        # head, is all that a row needs of them.
        parameters={
            **{name: name for name in "qkv"},
            "a": "g",
            "b": "beta",
            "state": "initial_state",
            "cu_seqlens": "cu_seqlens",
        },
        other_dtype=("a", "b", "cu_seqlens"),
    ),
    "mtp": _Stage(
        what="verification of drafted tokens (multi-token prediction)",
        # Drafts of one branch only (gdn_flashinfer.py: "only supports topk=1").
        api=_api(
            "flashinfer.gdn_decode.gated_delta_rule_mtp",
            "--speculative-algorithm NEXTN",
            "--speculative-eagle-topk 1",
            reads=("initial_state_indices", "k"),
        ),
        body=_MTP,
        baseline=_MTP_BASELINE,
        rows=("batch_size", "seq_len"),
        states="pool_size",
        new_state=("final_state", "The state pool, unchanged."),
        variable={
            "batch_size": "Number of sequences.",
            "seq_len": "Tokens of each sequence, more than one.",
            "pool_size": "Slots of the state pool.",
        },
        constraints=(*_HEAD_CONSTRAINTS, "seq_len > 1"),
        settings={"use_qk_l2norm": (False, True), "disable_state_update": (True, True)},
        extras=(
            *("ssm_state_indices", "output_state_indices"),
            *("replayssm_rawv", "replayssm_rawk", "replayssm_g", "replayssm_beta"),
        ),
        parameters={name: name for name in (*_TOKENS, "initial_state", "initial_state_indices")},
        other_dtype=("initial_state_indices",),
    ),
}


@register
class Gdn(OpModule):
    """`gdn_{decode|prefill|mtp}_qk{key heads}_v{value heads}_d{head dim}_k_last`."""

    op_type = "gdn"
    crosschecked = False
    names = {
        stage: f"gdn_{stage}_qk{{num_q_heads}}_v{{num_v_heads}}_d{{head_size}}_k_last"
        for stage in _STAGES
    }
    apis = tuple(stage.api for stage in _STAGES.values())
    reference_test = _TEST
    placement = frozenset({"pool_size"})

    def mixes(self, kind: str, model: ModelConfig) -> bool:
        """Linear attention of the models whose configs count its value heads."""
        return kind == "linear_attention" and model.fields.has("linear_num_value_heads") is not None

    def required(self, model: ModelConfig, serving: Serving) -> Iterator[KernelSpec | NotProduced]:
        """All three stages; mtp is what speculative decoding runs."""
        layers = model.mixers.get("linear_attention", 0)
        if not layers or not self.mixes("linear_attention", model):
            return
        fields = model.fields
        keys = fields.required_size("linear_num_key_heads")
        values = fields.required_size("linear_num_value_heads")
        key_dim = fields.required_size("linear_key_head_dim")
        value_dim = fields.required_size("linear_value_head_dim")
        reason = _impossible(keys, values, key_dim, value_dim, serving.tp)
        if reason:
            yield NotProduced(f"linear attention at tp={serving.tp}", reason)
            return
        heads = {
            "num_q_heads": keys // serving.tp,
            "num_k_heads": keys // serving.tp,
            "num_v_heads": values // serving.tp,
            "head_size": key_dim,
        }
        for stage in _STAGES:
            yield KernelSpec(
                name=self.name_of(stage, heads),
                op_type=self.op_type,
                variant=stage,
                axes={"seq_len": 1, **heads} if stage == "decode" else heads,
                tp=(serving.tp,),
                scalars={
                    "scale": Scalar(
                        value=1 / math.sqrt(key_dim),
                        source=(
                            "1/sqrt(linear_key_head_dim), FlashInfer's default: SGLang passes "
                            f"none; config.json linear_key_head_dim = {key_dim}"
                        ),
                    )
                },
                origin=(
                    f"{layers} of {model.num_layers} layers, {keys} key and {values} value heads "
                    f"at tp={serving.tp} ({serving.origin})",
                ),
            )

    def provider(self, spec: KernelSpec) -> FlashInferApi:
        """The functions that SGLang's FlashInfer backend for linear attention imports."""
        return _STAGES[spec.variant].api

    def definition(self, spec: KernelSpec) -> Json:
        """The recurrence, token by token, with the state in float32."""
        stage = _STAGES[spec.variant]
        state = [stage.states, *_STATE_AXES]
        inputs = self._inputs(spec.variant, list(stage.rows), state)
        name, text = stage.new_state
        return {
            "description": f"Gated delta network, {stage.what}, state in k-last layout.",
            "tags": [f"stage:{spec.variant}", "layout:k-last"],
            "axes": {
                **{a: const(spec.axes[a], _AXES[a]) for a in spec.axes},
                **{a: var(described) for a, described in stage.variable.items()},
            },
            "constraints": list(stage.constraints),
            "inputs": inputs,
            "outputs": {
                "output": tensor([*stage.rows, "num_v_heads", "head_size"], "bfloat16", "Output."),
                name: tensor(state, "float32", text),
            },
            "reference": (_HEADER + stage.body).format(arguments=", ".join(inputs), **spec.axes),
        }

    def _inputs(self, stage: str, rows: list[str], state: list[str]) -> Json:
        """Return the inputs, in the dataset's order."""
        gate = [*rows, "num_v_heads"]
        inputs = {
            "q": tensor([*rows, "num_q_heads", "head_size"], "bfloat16", "Queries."),
            "k": tensor([*rows, "num_k_heads", "head_size"], "bfloat16", "Keys."),
            "v": tensor([*rows, "num_v_heads", "head_size"], "bfloat16", "Values."),
        }
        if stage == "mtp":
            inputs["initial_state"] = tensor(state, "float32", "Pool of states, [value, key].")
            inputs["initial_state_indices"] = tensor(
                ["batch_size"], "int32", "Slot of each sequence's state in the pool."
            )
        else:
            inputs["state"] = {
                **tensor(state, "float32", "State of each sequence, [value, key]; zero if absent."),
                "optional": True,
            }
        inputs |= {
            "A_log": tensor(["num_v_heads"], "float32", "Logarithm of each head's decay rate."),
            "a": tensor(gate, "bfloat16", "The tokens' part of the decay, before softplus."),
            "dt_bias": tensor(["num_v_heads"], "float32", "Added to `a` before softplus."),
            "b": tensor(gate, "bfloat16", "Step of the correction, before the sigmoid."),
        }
        if stage == "prefill":
            inputs["cu_seqlens"] = tensor(
                ["len_cu_seqlens"], "int64", "Token offsets per sequence."
            )
        inputs["scale"] = scalar("float32", "Scale of the output; 0 stands for 1/sqrt(head_size).")
        if stage == "mtp":
            inputs["intermediate_states_buffer"] = {
                **tensor(
                    ["pool_size", "seq_len", *_STATE_AXES],
                    "float32",
                    "Scratch space for the state after each token; what a call leaves in it is "
                    "not an output.",
                ),
                "optional": True,
            }
        return inputs

    def implied(self, call: Call) -> KernelSpec | None:
        """By the heads of the call's tensors."""
        stage = next(
            (stage for stage, known in _STAGES.items() if call.name in known.api.dumps), ""
        )
        if not stage:
            return None
        with suppress(DumpError):
            rank = len(_STAGES[stage].rows) + 2
            (*_, q_heads, size), (*_, k_heads, _), (*_, v_heads, _) = (
                tensor_of(call, name, rank).shape for name in "qkv"
            )
            heads = {
                "num_q_heads": q_heads,
                "num_k_heads": k_heads,
                "num_v_heads": v_heads,
                "head_size": size,
            }
            spec = KernelSpec(
                name=self.name_of(stage, heads),
                op_type=self.op_type,
                variant=stage,
                axes={"seq_len": 1, **heads} if stage == "decode" else heads,
                origin=("a dumped call's tensors",),
            )
            self._axes_of(spec, self.definition(spec), call)
            return spec
        return None

    def rows(self, spec: KernelSpec, calls: Sequence[Call]) -> Iterator[Row | Rejected]:
        """One row per call that takes q and k as they are, with its offsets or slots and keys."""
        definition = self.definition(spec)
        (dumped,) = _STAGES[spec.variant].api.dumps
        return rows_of(calls, dumped, lambda call: self._row(spec, definition, call))

    def _axes_of(self, spec: KernelSpec, definition: Json, call: Call) -> dict[str, int]:
        """Check a call against a definition and return the var axes.

        Raises:
            DumpError: it is a call of another kernel.
        """
        stage = _STAGES[spec.variant]
        for name, (wanted, default) in stage.settings.items():
            if name.startswith(_NORM) and value_of(call, name, default) is True:
                raise DumpError(
                    f"{call.name}: {name} is True: the kernel normalises q and k first, the "
                    "definition takes them as they are, and none that does it is published"
                )
            check_setting(call, name, wanted, default=default)
        check_without(call, stage.extras)
        axes = bound_axes(call, definition, stage.parameters, stage.other_dtype)
        for smaller, larger in (("num_q_heads", "num_k_heads"), ("num_q_heads", "num_v_heads")):
            if spec.axes[larger] % spec.axes[smaller]:
                raise DumpError(f"{call.name}: {smaller} does not divide {larger}: {spec.axes}")
        return axes

    def _row(self, spec: KernelSpec, definition: Json, call: Call) -> Row:
        axes = self._axes_of(spec, definition, call)
        tensors = {}
        if spec.variant == "prefill":
            offsets = stored(call, definition, "cu_seqlens")
            if axes["len_cu_seqlens"] != axes["num_seqs"] + 1:
                raise DumpError(
                    f"{call.name}: {axes['len_cu_seqlens']} offsets for {axes['num_seqs']} states"
                )
            check_offsets(call, "cu_seqlens", offsets, axes["total_seq_len"])
            tensors["cu_seqlens"] = offsets
        if spec.variant == "mtp":
            slots = stored(call, definition, "initial_state_indices")
            check_range(call, "initial_state_indices", slots, 0, axes["pool_size"] - 1)
            _check_buffer(call, spec, axes)
            tensors["initial_state_indices"] = slots
            # The pool ends with the last slot used: what lies behind it is neither read nor
            # written, and can be most of a GPU's memory.
            axes["pool_size"] = int(slots.max()) + 1
        if "k" in _STAGES[spec.variant].api.reads:
            tensors["k"] = stored(call, definition, "k")
        scale = default_scale(call, spec.axes["head_size"])
        return Row(axes=axes, tensors=tensors, scalars={"scale": scale}, calls=(call.id,))

    def baseline(self, spec: KernelSpec) -> str:
        """Call the API; the model's gates are computed here where it takes them ready."""
        arguments = ", ".join(self.definition(spec)["inputs"])
        return _STAGES[spec.variant].baseline.format(arguments=arguments)

    def effort(self, spec: KernelSpec) -> Effort:
        """The reference of prefill computes token by token."""
        return SLOW_REFERENCE if spec.variant == "prefill" else Effort()


def _check_buffer(call: Call, spec: KernelSpec, axes: Mapping[str, int]) -> None:
    """Check the scratch space, of which the API counts rows by sequence, not by slot.

    Raises:
        DumpError: there is none (a row cannot leave out an input), or it does not fit the tokens.
    """
    if axes["seq_len"] < 2:
        raise DumpError(f"{call.name}: seq_len is {axes['seq_len']}, the definition has 2 or more")
    size = spec.axes["head_size"]
    wanted = (axes["seq_len"], spec.axes["num_v_heads"], size, size)
    buffer = tensor_of(call, "intermediate_states_buffer", 5)
    if buffer.shape[1:] != wanted or buffer.shape[0] < axes["batch_size"]:
        raise DumpError(
            f"{call.name}: intermediate_states_buffer has shape {buffer.shape} for "
            f"{axes['batch_size']} sequences, expected {('...', *wanted)}"
        )


def _impossible(keys: int, values: int, key_dim: int, value_dim: int, tp: int) -> str:
    """Return why these dimensions have no kernel, or nothing."""
    if key_dim != value_dim:
        return f"linear_key_head_dim {key_dim} and linear_value_head_dim {value_dim} differ"
    if values % keys:
        return f"{keys} key heads do not divide {values} value heads"
    if keys % tp or values % tp:
        return f"tp={tp} does not divide {keys} key and {values} value heads"
    return ""
