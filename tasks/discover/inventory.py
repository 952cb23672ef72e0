"""The kernels a model needs, each classified with its reasons."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tasks import ops
from tasks.discover.sources import FlashInferIndex, SglangIndex
from tasks.errors import ConfigError
from tasks.manifest import KernelEntry
from tasks.model import ModelConfig, Serving
from tasks.ops.base import FlashInferApi, KernelSpec, NoKernel, NotProduced, TorchOnly


@dataclass(frozen=True)
class Sources:
    """The indexes and the dataset that classification is made against."""

    flashinfer: FlashInferIndex
    sglang: SglangIndex
    shas: Mapping[str, str]
    published: Mapping[str, str]
    """Definition name -> op type of what the dataset has."""


def check_architecture(model: ModelConfig, sglang: SglangIndex, sha: str) -> str:
    """Return where the model class lives, for the evidence.

    Raises:
        ConfigError: neither SGLang nor an op module knows the architecture.
    """
    path = sglang.architectures.get(model.architecture)
    if path:
        return f"{model.architecture}: {path}"
    if any(model.architecture in module.architectures for module in ops.registry().values()):
        return f"{model.architecture}: no model class in SGLang {sha}"
    raise ConfigError(
        f"{model.source}: field architectures: {model.architecture!r} is unknown, neither "
        f"SGLang {sha} nor an op module has it"
    )


def required_kernels(
    model: ModelConfig, servings: Iterable[Serving]
) -> tuple[list[KernelSpec], list[NotProduced]]:
    """Return the distinct kernels of a model under its serving configurations, by op type and name.

    Parts for which no definition is produced are listed with their reasons.
    """
    found: dict[str, KernelSpec] = {}
    missing = [
        NotProduced(f"layers that {field} describes", "no op module reads it")
        for field in model.unread
    ]
    for serving in servings:
        for module in ops.registry().values():
            for item in module.required(model, serving):
                if isinstance(item, NotProduced):
                    missing.append(item)
                elif item.name in found:
                    found[item.name] = found[item.name].merged(item)
                else:
                    found[item.name] = item
    kernels = sorted(found.values(), key=lambda spec: (spec.op_type, spec.name))
    return kernels, list(dict.fromkeys(missing))


def classify(spec: KernelSpec, sources: Sources) -> KernelEntry:
    """Decide existing/new, FlashInfer availability, trace template and SGLang integration."""
    if spec.name in sources.published:
        return KernelEntry(
            definition_name=spec.name, op_type=spec.op_type, phase1_status="existing"
        )
    evidence = list(spec.origin)
    provider = ops.op_module(spec.op_type).provider(spec)
    entry = KernelEntry(
        definition_name=spec.name,
        op_type=spec.op_type,
        phase1_status="new",
        spec=spec.model_dump(mode="json"),
    )
    if isinstance(provider, NoKernel):
        _no_kernel(entry, provider, sources, evidence)
    elif isinstance(provider, TorchOnly):
        entry.fi_status, entry.fi_trace_template, entry.sgl_status = "fi_supported", False, "n/a"
        evidence.append(provider.reason)
    else:
        _flashinfer_api(entry, provider, sources, evidence)
    entry.evidence = evidence
    return entry


def _no_kernel(
    entry: KernelEntry, provider: NoKernel, sources: Sources, evidence: list[str]
) -> None:
    entry.fi_status, entry.fi_trace_template, entry.sgl_status = "fi_missing", False, "n/a"
    similar = [api for api in sources.flashinfer.apis if provider.keyword in api.lower()]
    evidence.append(
        f"FlashInfer {sources.shas['flashinfer']}: {provider.reason}; of "
        f"{len(sources.flashinfer.apis)} APIs {', '.join(similar) or 'none'} named like "
        f"{provider.keyword!r}"
    )
    if provider.sglang_file:
        evidence.append(f"SGLang {sources.shas['sglang']}: {provider.sglang_file}")


def _flashinfer_api(
    entry: KernelEntry, provider: FlashInferApi, sources: Sources, evidence: list[str]
) -> None:
    api = sources.flashinfer.find(provider.path, provider.method)
    flashinfer_sha, sglang_sha = sources.shas["flashinfer"], sources.shas["sglang"]
    if api is None:
        entry.fi_status, entry.fi_trace_template, entry.sgl_status = "fi_missing", False, "n/a"
        evidence.append(f"FlashInfer {flashinfer_sha}: no API {provider.path}")
        return
    entry.fi_status, entry.fi_trace_template = "fi_supported", api.has_template
    template = "with" if api.has_template else "without"
    evidence.append(
        f"FlashInfer {flashinfer_sha}: {provider.path} at {api.file}:{api.line}, "
        f"{template} a trace template"
    )
    defined = sources.flashinfer.resolve(provider.path)
    sites = [
        site
        for origin, places in sorted(sources.sglang.references.items())
        if sources.flashinfer.resolve(origin) == defined
        for site in places
    ]
    entry.sgl_status = "sgl_integrated" if sites else "sgl_missing"
    if sites:
        flags = f", with {' '.join(provider.server_flags)}" if provider.server_flags else ""
        evidence.append(f"SGLang {sglang_sha}: called at {sites[0]}{flags}")
    else:
        evidence.append(f"SGLang {sglang_sha}: no call of {provider.path}")
