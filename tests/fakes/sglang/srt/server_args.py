"""The command-line flags in use, declared as SGLang 0.5.17 declares its own."""

import argparse
import dataclasses
import logging
import typing
from typing import Annotated as A  # noqa: N817  as SGLang has it

from sglang.srt.faults import fault, happened

ATTENTION_BACKEND_CHOICES = ["triton", "torch_native", "fa3", "flashinfer", "trtllm_mha"]
SAMPLING_BACKEND_CHOICES = ["flashinfer", "pytorch"]


@dataclasses.dataclass(frozen=True)
class Arg:
    """A flag's metadata."""

    help: str = ""
    choices: list[str] | None = None
    aliases: list[str] | None = None


@dataclasses.dataclass
class PhaseConfig:
    """CUDA graph settings of a phase."""

    backend: str = "disabled"
    max_bs: int | None = None
    bs: list[int] | None = None


@dataclasses.dataclass
class CudaGraphConfig:
    """CUDA graph settings."""

    decode: PhaseConfig = dataclasses.field(default_factory=PhaseConfig)
    prefill: PhaseConfig = dataclasses.field(default_factory=PhaseConfig)


@dataclasses.dataclass
class ServerArgs:
    """The arguments of a server."""

    model_path: A[str, Arg(help="The path of the model weights.", aliases=["--model"])] = ""
    host: A[str, "The host of the HTTP server."] = "127.0.0.1"
    port: A[int, "The port of the HTTP server."] = 30000
    skip_server_warmup: A[bool, "If set, skip warmup."] = False
    skip_tokenizer_init: A[bool, "If set, skip init tokenizer."] = False
    trust_remote_code: A[bool, "Whether or not to allow custom models."] = False
    load_format: A[str, "The format of the model weights to load."] = "auto"
    dtype: A[str, "Data type for model weights and activations."] = "auto"
    quantization: A[str | None, "The quantization method."] = None
    kv_cache_dtype: A[str, "Data type for kv cache storage."] = "auto"
    log_level: A[str, "The logging level of all loggers."] = "info"
    random_seed: A[int | None, "The random seed."] = None
    context_length: A[int | None, "The model's maximum context length."] = None
    mem_fraction_static: A[float | None, "The fraction of the memory used."] = None
    max_running_requests: A[int | None, "The maximum number of running requests."] = None
    max_total_tokens: A[int | None, "The maximum number of tokens in the memory pool."] = None
    chunked_prefill_size: A[int | None, "The maximum number of tokens in a chunk."] = 8192
    page_size: A[int | None, "The number of tokens in a page."] = None
    tp_size: A[
        int,
        Arg(help="The tensor parallelism size.", aliases=["--tensor-parallel-size", "--tp"]),
    ] = 1
    ep_size: A[
        int,
        Arg(help="The expert parallelism size.", aliases=["--expert-parallel-size", "--ep"]),
    ] = 1
    dp_size: A[int, "The data parallelism size."] = 1
    nnodes: A[int, "The number of nodes."] = 1
    node_rank: A[int, "The node rank."] = 0
    dist_init_addr: A[str | None, "The host address for initializing distributed backend."] = None
    json_model_override_args: A[str, "A JSON string used to override the model config."] = "{}"
    attention_backend: A[
        str | None,
        Arg(help="Choose the kernels for attention layers.", choices=ATTENTION_BACKEND_CHOICES),
    ] = None
    decode_attention_backend: A[
        str | None,
        Arg(help="The same for decode.", choices=ATTENTION_BACKEND_CHOICES),
    ] = None
    prefill_attention_backend: A[
        str | None,
        Arg(help="The same for prefill.", choices=ATTENTION_BACKEND_CHOICES),
    ] = None
    sampling_backend: A[
        str | None,
        Arg(help="Choose the kernels for sampling layers.", choices=SAMPLING_BACKEND_CHOICES),
    ] = None
    grammar_backend: A[str | None, "Choose the backend for grammar-guided decoding."] = None
    moe_runner_backend: A[str, "Choose the runner backend for MoE."] = "auto"
    linear_attn_backend: A[str, "Choose the backend for linear attention."] = "triton"
    mamba_backend: A[str, "Choose the kernel backend for Mamba SSM operations."] = "triton"
    enable_deterministic_inference: A[bool, "Enable deterministic inference mode."] = False
    disable_radix_cache: A[bool, "Disable RadixAttention for prefix caching."] = False
    disable_custom_all_reduce: A[bool, "Disable the custom all-reduce kernel."] = False
    disable_flashinfer_autotune: A[bool, "Disable FlashInfer autotuning."] = False
    flashinfer_mla_disable_ragged: A[bool, "Not using ragged prefill wrapper."] = False
    cuda_graph_backend_decode: A[str | None, "CUDA graph backend of decode."] = None
    cuda_graph_backend_prefill: A[str | None, "CUDA graph backend of prefill."] = None
    disable_cuda_graph: bool = False
    cuda_graph_config: CudaGraphConfig = dataclasses.field(default_factory=CudaGraphConfig)

    def __post_init__(self) -> None:
        """Choose what the arguments leave open, as SGLang does on an H200."""
        self.page_size = self.page_size or 1
        self.attention_backend = self.attention_backend or "fa3"
        self.sampling_backend = self.sampling_backend or "flashinfer"
        if self.enable_deterministic_inference:
            self.sampling_backend = "pytorch"
        if fault("no_flashinfer") is not None:
            happened()
            self.attention_backend, self.sampling_backend = "triton", "pytorch"
            self.decode_attention_backend = self.prefill_attention_backend = None
        backend = "disabled" if self.disable_cuda_graph else "full"
        self.cuda_graph_config.decode.backend = self.cuda_graph_backend_decode or backend

    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> None:
        """Declare the flags."""
        hints = typing.get_type_hints(ServerArgs, include_extras=True)
        for field in dataclasses.fields(ServerArgs):
            if typing.get_origin(hints[field.name]) is A:
                _declare(parser, field, hints[field.name])
        parser.add_argument("--disable-cuda-graph", action="store_true", help="Disable cuda graph.")

    @classmethod
    def from_cli_args(cls, given: argparse.Namespace) -> "ServerArgs":
        """Return the arguments of a command line."""
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in vars(given).items() if name in names})


def _declare(
    parser: argparse.ArgumentParser, field: "dataclasses.Field[object]", hint: object
) -> None:
    kind, note = typing.get_args(hint)
    note = note if isinstance(note, Arg) else Arg(help=note)
    spellings = ["--" + field.name.replace("_", "-"), *(note.aliases or [])]
    if kind is bool:
        parser.add_argument(*spellings, dest=field.name, action="store_true", help=note.help)
        return
    plain = next(t for t in (*typing.get_args(kind), kind) if t is not type(None))
    parser.add_argument(
        *spellings,
        dest=field.name,
        type=plain,
        default=field.default,
        choices=note.choices,
        help=note.help,
    )


def prepare_server_args(argv: list[str]) -> ServerArgs:
    """Read a command line; argparse refuses what it does not know, and exits with 2."""
    parser = argparse.ArgumentParser(prog="sglang serve")
    ServerArgs.add_cli_args(parser)
    if fault("bad_flag") is not None:
        happened()
        parser.error("unrecognized arguments: --disable-piecewise-cuda-graph")
    given = parser.parse_args(argv)
    logging.basicConfig(
        level=given.log_level.upper(),
        format="[%(asctime)s] %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        force=True,
    )
    return ServerArgs.from_cli_args(given)
