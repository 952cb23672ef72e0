"""lightning_attn: MiniMax's linear attention, whose state decays per head.

For each head with decay s and token t (MiniMax-01 report, arXiv 2501.08313, section 2.2):
state_t = exp(-s) * state_{t-1} + k_t^T v_t and output_t = q_t state_t.
"""

from __future__ import annotations

from collections.abc import Iterator

from tasks.model import ModelConfig, Serving
from tasks.ops.base import (
    Json,
    KernelSpec,
    NoKernel,
    NotProduced,
    OpModule,
    Requirement,
    const,
    register,
    tensor,
    var,
)

_DECODE = """\
import torch


@torch.no_grad()
def run(q, k, v, state, slope):
    batch_size, num_heads, head_dim = q.shape
    assert num_heads == {heads}
    assert head_dim == {dim}

    decay = torch.exp(-slope.to(torch.float32)).view(1, num_heads, 1, 1)
    added = k.to(torch.float32).unsqueeze(-1) * v.to(torch.float32).unsqueeze(-2)
    new_state = decay * state + added
    output = torch.einsum("bhd,bhde->bhe", q.to(torch.float32), new_state)
    return output.to(q.dtype), new_state
"""

_PREFILL = """\
import torch


@torch.no_grad()
def run(q, k, v, qo_indptr, state, slope):
    total_q, num_heads, head_dim = q.shape
    assert num_heads == {heads}
    assert head_dim == {dim}

    decay = torch.exp(-slope.to(torch.float32)).view(num_heads, 1, 1)
    output = torch.zeros_like(q)
    new_state = state.clone()
    for b in range(qo_indptr.shape[0] - 1):
        for t in range(int(qo_indptr[b]), int(qo_indptr[b + 1])):
            added = k[t].to(torch.float32).unsqueeze(-1) * v[t].to(torch.float32).unsqueeze(-2)
            new_state[b] = decay * new_state[b] + added
            output[t] = torch.einsum("hd,hde->he", q[t].to(torch.float32), new_state[b]).to(q.dtype)
    return output, new_state
"""


_TEST = '''\
def sequences(*lengths):
    generator = seeded(len(lengths))
    heads, size = CONST["num_heads"], CONST["head_dim"]
    inputs = {name: random(generator, sum(lengths), heads, size) for name in "qkv"}
    if VARIANT == "prefill":
        inputs["qo_indptr"] = offsets(lengths)
    inputs["state"] = 4 * random(generator, len(lengths), heads, size, size, dtype="float32")
    # From heads that forget hardly anything to heads that forget most of it at once.
    inputs["slope"] = torch.logspace(-2, 0.2, heads)
    return inputs


CASES = {
    "decode": {
        "three sequences": lambda: sequences(1, 1, 1),
        "one sequence": lambda: sequences(1),
    },
    "prefill": {
        "three sequences, one empty": lambda: sequences(1, 0, 11),
        "one token": lambda: sequences(1),
    },
}[VARIANT]


def attend(q, k, v, state, slope):
    """Return one sequence's output and last state by the quadratic form, without a recurrence.

    o_t = sum over s <= t of exp(-slope (t - s)) (q_t . k_s) v_s, and q_t times the initial state
    decayed t + 1 times. Tensors are [head, token, ...] and [head, key, value].
    """
    length = v.shape[1]
    passed = torch.arange(length + 1).double()
    between = (-slope[:, None, None] * (passed[:-1, None] - passed[:-1])).exp().tril()
    since = (-slope[:, None] * passed).exp()[..., None]
    output = (between * (q @ k.mT)) @ v + since[:, 1:] * (q @ state)
    left = since[:, :-1].flip(1)
    return output, since[:, -1:] * state + (left * k).mT @ v


def check(inputs, outputs, kernel):
    lengths = [1] * len(inputs["state"])
    if VARIANT == "prefill":
        lengths = inputs["qo_indptr"].diff().tolist()
    parts = [inputs[name].double().transpose(0, 1).split(lengths, dim=1) for name in "qkv"]
    slope = inputs["slope"].double()
    results = [
        attend(q, k, v, state, slope)
        for q, k, v, state in zip(*parts, inputs["state"].double(), strict=True)
    ]
    expected = {
        "output": torch.cat([output for output, _ in results], dim=1).transpose(0, 1),
        "new_state": torch.stack([state for _, state in results]),
    }
    # Sums of values as large as the largest ones. A kernel may use bfloat16 on the way, with which
    # some roundings of 2^-8 add up.
    for name, values in expected.items():
        size = values.abs().max().item()
        assert_close(outputs[name], values, kernel, loose=2.0**-6, size=size)
'''


@register
class LightningAttention(OpModule):
    """`lightning_attn_{decode|prefill}_h{heads}_d{head_dim}`, heads sharded by tp."""

    op_type = "lightning_attn"
    reference_test = _TEST
    names = {
        stage: f"lightning_attn_{stage}_h{{num_heads}}_d{{head_dim}}"
        for stage in ("decode", "prefill")
    }

    def mixes(self, kind: str, model: ModelConfig) -> bool:
        """MiniMax's linear layers."""
        return kind == "linear_attention" and model.model_type.startswith("minimax")

    def required(self, model: ModelConfig, serving: Serving) -> Iterator[Requirement]:
        """Both stages."""
        layers = model.mixers.get("linear_attention", 0)
        if not layers or not self.mixes("linear_attention", model):
            return
        if model.num_heads % serving.tp:
            yield NotProduced(
                f"linear attention at tp={serving.tp}",
                f"tp={serving.tp} does not divide {model.num_heads} heads",
            )
            return
        heads = model.num_heads // serving.tp
        for stage in ("decode", "prefill"):
            axes = {"num_heads": heads, "head_dim": model.head_dim}
            yield KernelSpec(
                name=self.name_of(stage, axes),
                op_type=self.op_type,
                variant=stage,
                axes=axes,
                tp=(serving.tp,),
                origin=(
                    f"{layers} of {model.num_layers} layers are linear attention, "
                    f"{model.num_heads} heads at tp={serving.tp} ({serving.origin})",
                ),
            )

    def provider(self, spec: KernelSpec) -> NoKernel:
        """FlashInfer has no linear attention with a constant per-head decay."""
        return NoKernel(
            reason="no linear attention with a constant decay per head",
            keyword="lightning",
            sglang_file="python/sglang/kernels/ops/attention/linear/lightning_attn.py",
        )

    def definition(self, spec: KernelSpec) -> Json:
        """The recurrence, token by token, with the state in float32."""
        axes, decode = spec.axes, spec.variant == "decode"
        rows = "batch_size" if decode else "total_q"
        qkv = [rows, "num_heads", "head_dim"]
        state = ["batch_size", "num_heads", "head_dim", "head_dim"]
        inputs = {
            "q": tensor(qkv, "bfloat16", "Queries."),
            "k": tensor(qkv, "bfloat16", "Keys."),
            "v": tensor(qkv, "bfloat16", "Values."),
        }
        variable = {"batch_size": var("Number of sequences.")}
        if not decode:
            inputs["qo_indptr"] = tensor(["len_indptr"], "int32", "Token offsets per sequence.")
            variable["total_q"] = var("Tokens of all sequences.")
            variable["len_indptr"] = var("Length of qo_indptr (batch_size + 1).")
        inputs["state"] = tensor(state, "float32", "State of each sequence, [key, value].")
        inputs["slope"] = tensor(["num_heads"], "float32", "Decay of each head, per token.")
        return {
            "description": (
                f"Lightning (linear) attention {spec.variant} with a constant decay per head."
            ),
            "tags": [f"stage:{spec.variant}"],
            "axes": {
                "num_heads": const(axes["num_heads"], "Heads of one rank."),
                "head_dim": const(axes["head_dim"], "Dimension of one head."),
                **variable,
            },
            "constraints": []
            if decode
            else ["len_indptr == batch_size + 1", "total_q == qo_indptr[-1].item()"],
            "inputs": inputs,
            "outputs": {
                "output": tensor(qkv, "bfloat16", "Attention output."),
                "new_state": tensor(state, "float32", "State after the last token."),
            },
            "reference": (_DECODE if decode else _PREFILL).format(
                heads=axes["num_heads"], dim=axes["head_dim"]
            ),
        }
