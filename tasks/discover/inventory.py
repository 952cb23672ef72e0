"""The kernels a model needs, each classified with its reasons."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from tasks import ops
from tasks.discover.sources import FlashInferIndex, SglangIndex, Site
from tasks.manifest import KernelEntry
from tasks.model import ModelConfig, Serving
from tasks.ops.base import (
    FlashInferApi,
    Json,
    KernelSpec,
    NoKernel,
    NotProduced,
    OpModule,
    TorchOnly,
    Unmapped,
    definition_tags,
)


@dataclass(frozen=True)
class Sources:
    """The indexes that availability is decided by."""

    flashinfer: FlashInferIndex
    sglang: SglangIndex
    shas: Mapping[str, str]
    """Short SHA (or package version) of each, under `flashinfer` and `sglang`."""


def model_class(model: ModelConfig, sglang: SglangIndex, sha: str) -> str:
    """Return where SGLang implements the model's class, for the evidence."""
    path = sglang.architectures.get(model.architecture)
    return f"{model.architecture}: {path or f'no model class in SGLang {sha}'}"


@dataclass(frozen=True)
class Requirements:
    """What a model needs under some serving configurations."""

    kernels: list[KernelSpec]
    """Distinct, by op type and name."""
    rejected: list[NotProduced]
    """Combinations that cannot be."""
    unmapped: list[Unmapped]
    """Parts of the model for which no kernel is known."""


def requirements(
    model: ModelConfig, servings: Iterable[Serving], model_file: str = ""
) -> Requirements:
    """Return every kernel of a model, and every part of it for which there is none.

    Args:
        model: the model's config.
        servings: ways to serve it.
        model_file: where SGLang implements the model's class, for what is unmapped.

    Raises:
        ConfigError: a field that an op module needs is missing or wrong.
    """
    modules = [op for op in ops.registry().values() if model.mapped or op.any_architecture]
    kernels: dict[str, KernelSpec] = {}
    others: list[NotProduced | Unmapped] = list(_unclaimed(model, modules))
    for serving in servings:
        for module in modules:
            for item in module.required(model, serving):
                if not isinstance(item, KernelSpec):
                    others.append(item)
                elif item.name in kernels:
                    kernels[item.name] = kernels[item.name].merged(item)
                else:
                    kernels[item.name] = item
    distinct = dict.fromkeys(others)
    return Requirements(
        kernels=sorted(kernels.values(), key=lambda spec: (spec.op_type, spec.name)),
        rejected=[item for item in distinct if isinstance(item, NotProduced)],
        unmapped=[
            replace(item, sglang_file=item.sglang_file or model_file)
            for item in distinct
            if isinstance(item, Unmapped)
        ],
    )


def _unclaimed(model: ModelConfig, modules: Iterable[OpModule]) -> Iterator[Unmapped]:
    """Yield the kinds of layers that no op module computes."""
    reason = "no op module computes such layers"
    if not model.mapped:
        reason = f"nobody has mapped the layers of {model.architecture} yet"
    for kind, layers in model.mixers.items():
        if not any(module.mixes(kind, model) for module in modules):
            yield Unmapped(f"{kind} ({layers} of {model.num_layers} layers)", reason)
    if model.moe_layers and not model.mapped:
        yield Unmapped(
            f"mixture of experts ({model.moe_layers} of {model.num_layers} layers)", reason
        )


@dataclass(frozen=True)
class Kernel:
    """A kernel and what is known of its availability, with the reasons.

    A status is None where what it is decided by was not at hand.
    """

    spec: KernelSpec
    phase1_status: Literal["existing", "new"] | None = None
    fi_status: Literal["fi_supported", "fi_missing"] | None = None
    fi_trace_template: bool | None = None
    sgl_status: Literal["sgl_integrated", "sgl_missing", "n/a"] | None = None
    server_flags: tuple[str, ...] = ()
    """What makes SGLang take this kernel, where it does not by default."""
    evidence: tuple[str, ...] = ()

    def entry(self) -> KernelEntry:
        """Return the manifest's entry; one that is published needs no more than its name."""
        known: Json = {
            "definition_name": self.spec.name,
            "op_type": self.spec.op_type,
            "phase1_status": self.phase1_status,
        }
        if self.phase1_status != "existing":
            known |= {
                "fi_status": self.fi_status,
                "fi_trace_template": self.fi_trace_template,
                "sgl_status": self.sgl_status,
                "spec": self.spec.model_dump(mode="json"),
                "evidence": list(self.evidence),
            }
            if self.server_flags:
                known["server_flags"] = list(self.server_flags)
        return KernelEntry.model_validate(known)

    def as_json(self, model_slug: str) -> Json:
        """Return the kernel as `onboard inventory --json` prints it."""
        module, spec = ops.op_module(self.spec.op_type), self.spec
        definition, provider = module.definition(spec), module.provider(spec)
        axes = definition["axes"]
        return {
            "definition_name": spec.name,
            "op_type": spec.op_type,
            "axes": {n: axis["value"] for n, axis in axes.items() if axis["type"] == "const"},
            "tp": list(spec.tp),
            "ep": list(spec.ep),
            "tags": definition_tags(spec, provider, definition.get("tags", []), model_slug),
            "phase1_status": self.phase1_status,
            "fi_status": self.fi_status,
            "fi_trace_template": self.fi_trace_template,
            "sgl_status": self.sgl_status,
            "server_flags": list(self.server_flags),
            "evidence": list(self.evidence),
            "spec": spec.model_dump(mode="json"),
        }


def classify(
    spec: KernelSpec, sources: Sources | None, published: Mapping[str, str] | None
) -> Kernel:
    """Decide existing/new, FlashInfer availability, trace template and SGLang integration.

    Args:
        spec: the kernel.
        sources: the indexes of FlashInfer and SGLang, if they are at hand.
        published: definition name -> op type of the dataset, if it is at hand.
    """
    kernel = Kernel(spec, evidence=spec.origin)
    if published is not None:
        status: Literal["existing", "new"] = "existing" if spec.name in published else "new"
        kernel = replace(kernel, phase1_status=status)
    provider = ops.op_module(spec.op_type).provider(spec)
    if isinstance(provider, FlashInferApi):
        kernel = replace(kernel, server_flags=provider.server_flags)
    if sources is None:
        return kernel
    if isinstance(provider, NoKernel):
        return _no_kernel(kernel, provider, sources)
    if isinstance(provider, TorchOnly):
        return replace(
            kernel,
            fi_status="fi_supported",
            fi_trace_template=False,
            sgl_status="n/a",
            evidence=(*kernel.evidence, provider.reason),
        )
    return _flashinfer_api(kernel, provider, sources)


def _no_kernel(kernel: Kernel, provider: NoKernel, sources: Sources) -> Kernel:
    similar = [api for api in sources.flashinfer.apis if provider.keyword in api.lower()]
    evidence = [
        f"FlashInfer {sources.shas['flashinfer']}: {provider.reason}; of "
        f"{len(sources.flashinfer.apis)} APIs {', '.join(similar) or 'none'} named like "
        f"{provider.keyword!r}"
    ]
    if provider.sglang_file:
        evidence.append(f"SGLang {sources.shas['sglang']}: {provider.sglang_file}")
    return replace(
        kernel,
        fi_status="fi_missing",
        fi_trace_template=False,
        sgl_status="n/a",
        evidence=(*kernel.evidence, *evidence),
    )


def _flashinfer_api(kernel: Kernel, provider: FlashInferApi, sources: Sources) -> Kernel:
    api = sources.flashinfer.find(provider.path, provider.method)
    flashinfer_sha, sglang_sha = sources.shas["flashinfer"], sources.shas["sglang"]
    if api is None:
        return replace(
            kernel,
            fi_status="fi_missing",
            fi_trace_template=False,
            sgl_status="n/a",
            evidence=(*kernel.evidence, f"FlashInfer {flashinfer_sha}: no API {provider.path}"),
        )
    template = "with" if api.has_template else "without"
    found = (
        f"FlashInfer {flashinfer_sha}: {provider.path} at {api.file}:{api.line}, "
        f"{template} a trace template"
    )
    site = _call_site(provider, sources)
    flags = f", with {' '.join(provider.server_flags)}" if provider.server_flags else ""
    called = f"called at {site}{flags}" if site else f"no call of {provider.path}"
    refused = kernel.spec.not_served
    if refused:
        called += f"; but for this model: {refused}"
    return replace(
        kernel,
        fi_status="fi_supported",
        fi_trace_template=api.has_template,
        sgl_status="sgl_integrated" if site and not refused else "sgl_missing",
        evidence=(*kernel.evidence, found, f"SGLang {sglang_sha}: {called}"),
    )


def _call_site(provider: FlashInferApi, sources: Sources) -> Site | None:
    """Return where SGLang uses the API: in the layer that should, in another, or nowhere."""
    defined = sources.flashinfer.resolve(provider.path)
    sites = [
        site
        for origin, places in sorted(sources.sglang.sites.items())
        if sources.flashinfer.resolve(origin) == defined
        for site in places
        if site.kind != "import"  # what is imported may be left unused
    ]
    layer = provider.sglang_layer.removeprefix("python/")
    return min(
        sites,
        key=lambda site: (
            not site.file.endswith(layer),
            "/srt/layers/" not in site.file,
            site.kind != "call",
        ),
        default=None,
    )
