"""mamba_ssu: one decode step of a Mamba-2 layer, the selective state update.

Per head (Mamba-2, arXiv 2405.21060): with dt = softplus(dt + dt_bias), state <- exp(A *
dt) * state + dt * x B^T; output = state C + D * x. B and C belong to groups of consecutive heads.

Sharding is SGLang's (sglang/srt/layers/attention/mamba/mamba.py: MambaMixer2): tp must divide the
heads; it divides the groups too, or there is one group, which every rank gets (not for quantised
models).

The kernel takes one value per head of dt, A, D and dt_bias, spread over their other axes by strides
of 0, and refuses all else; the published definition has the axes, of which random values would
differ. Rows therefore store these four, in which a head's values are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress

import numpy as np

from tasks.model import Fields, ModelConfig, Serving
from tasks.ops.arguments import (
    bound_axes,
    check_range,
    check_setting,
    check_without,
    stored,
    tensor_of,
)
from tasks.ops.base import (
    Call,
    DumpError,
    FlashInferApi,
    Json,
    KernelSpec,
    NotProduced,
    OpModule,
    Rejected,
    Requirement,
    Row,
    Unmapped,
    const,
    register,
    rows_of,
    tensor,
    var,
)

_STATE = ("ssm_state_size", "mamba_d_state", "state_size")
_GROUPS = ("mamba_n_groups", "n_groups")
"""Spellings: Nemotron-H (sglang/srt/configs/nemotron_h.py) has mamba_num_heads, mamba_head_dim,
ssm_state_size and n_groups; Falcon-H1 and Granite-4 (falcon_h1.py, granitemoehybrid.py) have
mamba_n_heads, mamba_d_head, mamba_d_state and mamba_n_groups. transformers' Mamba2Config has no
prefix: num_heads, head_dim, state_size, n_groups."""
_TIME_STEP_RANK = ("mamba_dt_rank", "time_step_rank")

_REFERENCE = """\
import torch
import torch.nn.functional as F


@torch.no_grad()
def run(state, x, dt, A, B, C, D, dt_bias, state_batch_indices):
    batch_size, nheads, head_dim = x.shape
    _, ngroups, dstate = B.shape
    assert nheads == {nheads}
    assert head_dim == {head_dim}
    assert dstate == {dstate}
    assert ngroups == {ngroups}

    output = torch.zeros_like(x)
    new_state = state.clone()
    for i in range(batch_size):
        slot = int(state_batch_indices[i])
        if slot < 0:  # padding
            continue
        step = F.softplus(dt[i].float() + dt_bias.float())
        per_head = [y[i].float().repeat_interleave(nheads // ngroups, dim=0) for y in (B, C)]
        added = torch.einsum("hd,hs->hds", step * x[i].float(), per_head[0])
        updated = torch.exp(A.float() * step[..., None]) * new_state[slot].float() + added
        read = torch.einsum("hds,hs->hd", updated, per_head[1])
        output[i] = (read + D.float() * x[i].float()).to(output.dtype)
        new_state[slot] = updated.to(state.dtype)
    return output, new_state
"""

_BASELINE = """\
from flashinfer.mamba import selective_state_update


def _tied(x, axes):
    # The API takes one value per head, as models have it, spread over the other axes by stride 0.
    return x[(..., *(0,) * axes)].contiguous()[(..., *(None,) * axes)].expand(x.shape)


def run(state, x, dt, A, B, C, D, dt_bias, state_batch_indices):
    new_state = state.clone()
    output = x.new_zeros(x.shape)
    selective_state_update(
        new_state,
        x,
        _tied(dt, 1),
        _tied(A, 2),
        B,
        C,
        _tied(D, 1),
        dt_bias=_tied(dt_bias, 1),
        dt_softplus=True,
        state_batch_indices=state_batch_indices,
        pad_slot_id=-1,
        out=output,
    )
    # The API computes an output for padding too.
    output[state_batch_indices < 0] = 0
    return output, new_state
"""

_TEST = """\
def batch(slots, pool):
    generator = seeded(len(slots))
    heads, groups, state = CONST["nheads"], CONST["ngroups"], CONST["dstate"]
    rows = (len(slots), heads, CONST["head_dim"])
    # One value per head, which is all that FlashInfer's kernel takes.
    dt = 2 * random(generator, len(slots), heads, 1)
    rate = -2 * torch.rand(heads, 1, 1, generator=generator)
    share, bias = random(generator, heads, 1), random(generator, heads, 1)
    return {
        "state": random(generator, pool, *rows[1:], state),
        "x": random(generator, *rows),
        "dt": dt.expand(rows),
        "A": rate.expand(*rows[1:], state),
        "B": random(generator, len(slots), groups, state),
        "C": random(generator, len(slots), groups, state),
        "D": share.expand(rows[1:]),
        "dt_bias": bias.expand(rows[1:]),
        "state_batch_indices": torch.tensor(slots, dtype=torch.int32),
    }


CASES = {
    # -1 is padding.
    "slots out of order": lambda: batch([3, -1, 0, 4], pool=5),
    "one sequence": lambda: batch([0], pool=1),
}


def check(inputs, outputs, kernel):
    slots = inputs["state_batch_indices"].tolist()
    output = torch.zeros(inputs["x"].shape, dtype=torch.float64)
    states = {}
    for i, slot in enumerate(slots):
        if slot < 0:
            continue
        # Head h belongs to group h * ngroups // nheads.
        groups = torch.arange(CONST["nheads"]) * CONST["ngroups"] // CONST["nheads"]
        b, c = (inputs[name][i, groups].double() for name in "BC")
        x, dt = inputs["x"][i].double(), inputs["dt"][i].double()
        # The logarithm of e^0 + e^x, as softplus is defined.
        step = torch.logaddexp(dt + inputs["dt_bias"].double(), torch.zeros(()).double())
        # e^(A step) once for a head: every element of it has the same.
        kept = (inputs["A"][:, 0, 0].double() * step[:, 0]).exp()
        states[slot] = torch.baddbmm(
            kept[:, None, None] * inputs["state"][slot].double(),
            (step * x)[:, :, None],
            b[:, None],
        )
        output[i] = (states[slot] @ c[:, :, None])[..., 0] + inputs["D"].double() * x
    # Sums of values as large as the largest ones; states are bfloat16 too. A kernel may round the
    # step or the decay to bfloat16, of which some roundings of 2^-8 add up.
    size = output.abs().max().item()
    assert_close(outputs["output"], output, kernel, loose=2.0**-6, size=size)
    padding = [i for i, slot in enumerate(slots) if slot < 0]
    assert not outputs["output"][padding].any()
    for slot, state in states.items():
        size = state.abs().max().item()
        assert_close(outputs["new_state"][slot], state, kernel, loose=2.0**-6, size=size)
    unused = [slot for slot in range(len(inputs["state"])) if slot not in states]
    assert torch.equal(outputs["new_state"][unused], inputs["state"][unused])
"""

_AXES = {
    "nheads": "Heads of one rank.",
    "head_dim": "Dimension of one head.",
    "dstate": "Dimension of the state, for each element of a head.",
    "ngroups": "Groups of one rank; the heads of a group share B and C.",
}

_DUMPED = "selective_state_update"
_PADDING = -1
_TIED = {"dt": 1, "A": 2, "D": 1, "dt_bias": 1}
"""Inputs of one value per head -> how many axes follow those that it differs in."""
_INPUTS = ("state", "x", "dt", "A", "B", "C", "D", "dt_bias", "state_batch_indices")
_EXTRAS = (
    *("z", "state_scale", "rand_seed", "dst_state_batch_indices", "cu_seqlens"),
    *("intermediate_states_buffer", "intermediate_state_indices", "intermediate_state_scales"),
    "num_accepted_tokens",
)
"""Parameters of other kernels behind the same API: gated output, quantised or stochastically
rounded states, several tokens of a sequence."""


@register
class MambaSsu(OpModule):
    """`mamba_ssu_decode_h{heads}_d{head_dim}_s{state}_ng{groups}`."""

    op_type = "mamba_ssu"
    crosschecked = False
    names = {"decode": "mamba_ssu_decode_h{nheads}_d{head_dim}_s{dstate}_ng{ngroups}"}
    reference_test = _TEST
    apis = (
        FlashInferApi(
            path="flashinfer.mamba.selective_state_update",
            dumps=(_DUMPED,),
            # The definition's states are bfloat16; many configs ask SGLang for float32.
            server_flags=("--mamba-backend flashinfer", "--mamba-ssm-dtype bfloat16"),
            sglang_layer="python/sglang/kernels/ops/mamba/triton_ops/ssu_dispatch.py",
            reads=("state_batch_indices", *_TIED),
        ),
    )
    placement = frozenset({"state_cache_size"})

    def mixes(self, kind: str, model: ModelConfig) -> bool:
        """Mamba layers; of those without heads `required` says why there is no kernel."""
        return kind == "mamba"

    def required(self, model: ModelConfig, serving: Serving) -> Iterator[Requirement]:
        """One kernel per serving configuration."""
        layers = model.mixers.get("mamba", 0)
        if not layers:
            return
        fields = model.fields
        head_names, head_dim_names = _spellings(fields)
        rank = fields.has(*_TIME_STEP_RANK)
        if rank and not fields.has(*head_names):
            yield Unmapped(
                f"mamba ({layers} of {model.num_layers} layers)",
                f"Mamba-1 ({rank}): a time step for each channel, no heads",
            )
            return
        heads = fields.required_size(*head_names)
        groups = fields.required_size(*_GROUPS)
        head_dim = _head_dim(fields, heads, head_dim_names)
        reason = _impossible(heads, groups, serving.tp, quantised=model.quantization is not None)
        if reason:
            yield NotProduced(f"Mamba layers at tp={serving.tp}", reason)
            return
        axes = {
            "nheads": heads // serving.tp,
            "head_dim": head_dim,
            "dstate": fields.required_size(*_STATE),
            "ngroups": max(1, groups // serving.tp),
        }
        yield KernelSpec(
            name=self.name_of("decode", axes),
            op_type=self.op_type,
            variant="decode",
            axes=axes,
            tp=(serving.tp,),
            origin=(
                f"{layers} of {model.num_layers} layers, {heads} heads in {groups} groups at "
                f"tp={serving.tp} ({serving.origin})",
            ),
        )

    def provider(self, spec: KernelSpec) -> FlashInferApi:
        """The function behind SGLang's FlashInfer backend for state-space models."""
        (api,) = self.apis
        return api

    def definition(self, spec: KernelSpec) -> Json:
        """The recurrence for one token of each sequence, computed in float32."""
        axes = spec.axes
        heads, groups = ["nheads", "head_dim"], ["batch_size", "ngroups", "dstate"]
        state = ["state_cache_size", *heads, "dstate"]
        rows = ["batch_size", *heads]
        return {
            "description": (
                "Mamba-2 selective state update: one token of each sequence, "
                "{nheads} heads of dimension {head_dim}, state {dstate}, {ngroups} groups."
            ).format_map(axes),
            "tags": ["stage:decode"],
            "axes": {
                **{a: const(axes[a], _AXES[a]) for a in axes},
                "batch_size": var("Number of sequences."),
                "state_cache_size": var("Slots of the state cache."),
            },
            "constraints": ["nheads % ngroups == 0", "state_cache_size >= batch_size"],
            "inputs": {
                "state": tensor(state, "bfloat16", "State cache, one slot per sequence."),
                "x": tensor(rows, "bfloat16", "Input of the layer's recurrence."),
                "dt": tensor(
                    rows, "bfloat16", "Time step before bias and softplus, one value per head."
                ),
                "A": tensor(
                    [*heads, "dstate"], "float32", "Decay rate, negative, one value per head."
                ),
                "B": tensor(groups, "bfloat16", "What the input adds to the state, per group."),
                "C": tensor(groups, "bfloat16", "What the output reads of the state, per group."),
                "D": tensor(heads, "bfloat16", "Share of the input in the output, per head."),
                "dt_bias": tensor(heads, "bfloat16", "Added to dt before softplus, per head."),
                "state_batch_indices": tensor(
                    ["batch_size"], "int32", "Slot of each sequence; -1 is padding."
                ),
            },
            "outputs": {
                "output": tensor(rows, "bfloat16", "Output; 0 for padding."),
                "new_state": tensor(state, "bfloat16", "State cache after the token."),
            },
            "reference": _REFERENCE.format_map(axes),
        }

    def implied(self, call: Call) -> KernelSpec | None:
        """By the shapes of the states and of B."""
        if call.name != _DUMPED:
            return None
        with suppress(DumpError):
            _, heads, head_dim, state = tensor_of(call, "state", 4).shape
            _, groups, _ = tensor_of(call, "B", 3).shape
            axes = {"nheads": heads, "head_dim": head_dim, "dstate": state, "ngroups": groups}
            spec = KernelSpec(
                name=self.name_of("decode", axes),
                op_type=self.op_type,
                variant="decode",
                axes=axes,
                origin=("a dumped call's tensors",),
            )
            _axes_of(call, self.definition(spec))
            return spec
        return None

    def rows(self, spec: KernelSpec, calls: Sequence[Call]) -> Iterator[Row | Rejected]:
        """One row per call of one token for each sequence, with the slots and what is per head."""
        definition = self.definition(spec)
        return rows_of(calls, _DUMPED, lambda call: _row(call, definition))

    def baseline(self, spec: KernelSpec) -> str:
        """Call the API on a copy of the states: it updates them in place.

        Right only for inputs in which `dt`, `A`, `D` and `dt_bias` have one value per head.
        """
        return _BASELINE


def _axes_of(call: Call, definition: Json) -> dict[str, int]:
    """Check a call against a definition and return the var axes.

    Raises:
        DumpError: it is a call of another kernel.
    """
    check_setting(call, "dt_softplus", True, default=False)
    check_setting(call, "disable_state_update", False, default=False)
    check_setting(call, "pad_slot_id", _PADDING, default=_PADDING)
    check_without(call, _EXTRAS)
    parameters = {name: name for name in _INPUTS}
    axes = bound_axes(call, definition, parameters, ("state_batch_indices",))
    heads, groups = call.tensors["x"].shape[1], call.tensors["B"].shape[1]
    if heads % groups:
        raise DumpError(f"{call.name}: {groups} groups do not divide {heads} heads")
    return axes


def _row(call: Call, definition: Json) -> Row:
    axes = _axes_of(call, definition)
    slots = stored(call, definition, "state_batch_indices")
    check_range(call, "state_batch_indices", slots, _PADDING, axes["state_cache_size"] - 1)
    used = slots[slots != _PADDING]
    if not len(used):
        raise DumpError(f"{call.name}: all of {len(slots)} slots are padding")
    if len(np.unique(used)) != len(used):
        raise DumpError(f"{call.name}: two sequences have the same slot")
    # The cache ends with the last slot used, or where there is one for each sequence, as the
    # definition wants: what lies behind is neither read nor written, and can be most of a GPU's
    # memory.
    size = max(int(used.max()) + 1, axes["batch_size"])
    if size > axes["state_cache_size"]:
        raise DumpError(
            f"{call.name}: {axes['batch_size']} sequences, {axes['state_cache_size']} slots"
        )
    axes["state_cache_size"] = size
    tied = {name: _tied(call, definition, name) for name in _TIED}
    return Row(axes=axes, tensors={"state_batch_indices": slots, **tied}, calls=(call.id,))


def _tied(call: Call, definition: Json, name: str) -> np.ndarray:
    """Return the values of an input that has one for each head.

    FlashInfer refuses calls with others, by their strides (selective_state_update.cu). A dump does
    not have these: a copy to the host is dense.

    Raises:
        DumpError: a head has several.
    """
    values = stored(call, definition, name)
    heads = values.reshape(*values.shape[: values.ndim - _TIED[name]], -1)
    if (heads != heads[..., :1]).any():
        raise DumpError(f"{call.name}: {name} has several values for a head, FlashInfer takes one")
    return values


def _spellings(fields: Fields) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the fields that may say the number of heads, and those that may say their dimension.

    Hybrid models' `num_heads` and `head_dim` are attention's.
    """
    if fields.text("model_type") == "mamba2":
        return ("num_heads",), ("head_dim",)
    return ("mamba_num_heads", "mamba_n_heads"), ("mamba_head_dim", "mamba_d_head")


def _head_dim(fields: Fields, heads: int, names: tuple[str, ...]) -> int:
    """Return the dimension of one head; "auto" is inner width / heads (configs/falcon_h1.py)."""
    name = fields.has(*names)
    if name is None or fields.raw[name] != "auto":
        return fields.required_size(*names)
    width = fields.size("mamba_d_ssm") or (
        fields.required_size("mamba_expand") * fields.required_size("hidden_size")
    )
    if width % heads:
        raise fields.fail(name, f'"auto", and {heads} heads do not divide the width {width}')
    return width // heads


def _impossible(heads: int, groups: int, tp: int, *, quantised: bool) -> str:
    """Return why the heads cannot be sharded so, or nothing."""
    if heads % tp:
        return f"tp={tp} does not divide {heads} Mamba heads"
    replicated = groups % tp != 0
    if replicated and groups != 1:
        return f"tp={tp} does not divide {groups} Mamba groups; SGLang replicates only a single one"
    if replicated and quantised:
        return f"SGLang replicates the single Mamba group (tp={tp}) for unquantised models only"
    if heads % groups:
        return f"{groups} groups do not divide {heads} Mamba heads"
    return ""
