"""SGLang's pull request: what makes it call the FlashInfer kernels of one op type.

One pull request for all kernels of the model's that are of the op type and wait for SGLang: they
share its branch. What somebody has named a pull request for already is left out.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from tasks import files, manifest, ops
from tasks.errors import ManifestError, PublishError
from tasks.manifest import KernelEntry, Route
from tasks.ops.base import FlashInferApi, KernelSpec, Provider
from tasks.publish.base import Branch, Post
from tasks.publish.markdown import one_line
from tasks.publish.render import Subject, render_body
from tasks.publish.requested import is_public
from tasks.publish.scaffold import (
    NothingToScaffoldError,
    Scaffold,
    read_layer,
    scaffold,
    switch,
)


@dataclass(frozen=True)
class Addition:
    """What is added for one API: to which file, and for which kernel."""

    api: FlashInferApi
    kernel: KernelEntry
    added: Scaffold
    baseline: str
    """How FlashInfer-Bench calls the API for the definition; empty if it does not."""


def sglang_pull_request(
    subject: Subject, folder: Path, elsewhere: Container[str] = ()
) -> tuple[Post, Branch]:
    """Render the draft that begins SGLang's integration of a kernel and of its siblings.

    Args:
        subject: one of the kernels.
        folder: where the edited files are written; they are to stay until the branch is made.
        elsewhere: definitions whose pull request somebody has named.

    Raises:
        NothingToScaffoldError: SGLang has all of their APIs where they would be called.
        PublishError: the kernel has no FlashInfer API, or SGLang has no such file.
    """
    together = list(_together(subject, elsewhere))
    edited: dict[str, bytes] = {}
    additions: dict[tuple[str, str], Addition] = {}
    not_begun: dict[str, list[KernelEntry]] = {}
    for kernel, spec, api in together:
        layer = api.sglang_layer
        if (layer, api.path) in additions:
            continue
        try:
            source = edited.get(layer) or read_layer(subject.sglang, layer)
            addition = _addition(subject.sglang, kernel, spec, api, source)
        except PublishError as error:
            if kernel == subject.entry and not isinstance(error, NothingToScaffoldError):
                raise
            not_begun.setdefault(subject.shown(error), []).append(kernel)
            continue
        edited[layer] = addition.added.source
        additions[layer, api.path] = addition
    if not additions:
        raise NothingToScaffoldError("; ".join(not_begun))
    made = list(additions.values())
    post = _post(subject, [kernel for kernel, _, _ in together], made, not_begun)
    paths = {PurePosixPath(layer): folder / layer for layer in edited}
    for path, file in paths.items():
        files.write_bytes(file, edited[str(path)])
    calls = "\n".join(f"- {one.api.path} from {one.api.sglang_layer}" for one in made)
    message = f"{post.title}\n\nA guarded import and a dispatch that nothing calls yet:\n{calls}\n"
    return replace(post, draft=True), Branch(_branch(subject), subject.sglang, message, paths)


def _addition(
    clone: Path, kernel: KernelEntry, spec: KernelSpec, api: FlashInferApi, source: bytes
) -> Addition:
    module = ops.op_module(spec.op_type)
    # Not the staged one: a sibling may be staged later, and the draft is to stay the same.
    definition = {"name": spec.name, **module.definition(spec)}
    selected = switch(clone, api, spec.op_type)
    added = scaffold(source, api.sglang_layer, api, definition, selected)
    return Addition(api, kernel, added, module.baseline(spec) or "")


def sglang_by_hand(subject: Subject, why: str) -> Post:
    """Render what a person has to do where nothing can be begun for them.

    Args:
        subject: the kernel.
        why: what `sglang_pull_request` said.
    """
    kernels = [kernel for kernel, _, _ in _together(subject, ())]
    return _post(subject, kernels, [], {why: kernels})


def _together(
    subject: Subject, elsewhere: Container[str]
) -> Iterator[tuple[KernelEntry, KernelSpec, FlashInferApi]]:
    """Yield the kernel and those that go into the same pull request, in the manifest's order."""
    for kernel in subject.manifest.kernels:
        itself = kernel.definition_name == subject.entry.definition_name
        waits = kernel.route is Route.AWAIT_SGLANG and kernel.op_type == subject.entry.op_type
        if not itself and (not waits or kernel.definition_name in elsewhere):
            continue
        other = replace(subject, entry=kernel)
        spec, api = other.spec, other.provider
        if spec is not None and isinstance(api, FlashInferApi):
            yield kernel, spec, api
        elif itself:
            raise PublishError(
                f"{kernel.definition_name}: has no FlashInfer API for SGLang to call"
            )


def of_another_model(subject: Subject) -> str | None:
    """Return the pull request by which another model waits for the same API, if there is one.

    SGLang is changed for all models that need an API; a second draft would be the first one again.

    Args:
        subject: a kernel that waits for SGLang.
    """
    api, own = subject.provider, subject.manifest.model_slug
    for slug, path in manifest.newest(subject.workspace).items():
        try:
            run = None if slug == own else manifest.load(path)
        except ManifestError:  # another model's trouble
            continue
        for kernel in run.kernels if run else ():
            url = kernel.sglang_pr_url
            known = run.upstream_of(url) if run and url else None
            waits = kernel.route is Route.AWAIT_SGLANG and is_public(url)
            refused = known is not None and known.state == "rejected"
            if waits and not refused and _api_of(subject, kernel) == api:
                return url
    return None


def _api_of(subject: Subject, kernel: KernelEntry) -> Provider | None:
    """Return what would run another model's kernel; nothing if its record is damaged."""
    try:
        return replace(subject, entry=kernel).provider
    except ValueError:
        return None


def _branch(subject: Subject) -> str:
    return f"feat/flashinfer-{subject.entry.op_type}-integration-{subject.manifest.model_slug}"


def _post(
    subject: Subject,
    kernels: list[KernelEntry],
    additions: list[Addition],
    not_begun: dict[str, list[KernelEntry]],
) -> Post:
    op_type = subject.entry.op_type
    body = render_body(
        "sglang_draft.md.j2",
        subject,
        kernels=kernels,
        additions=additions,
        not_begun=not_begun,
        branch=_branch(subject),
    )
    return Post(
        key=f"{op_type}.{subject.manifest.model_slug}",
        kind="sglang",
        repository=subject.repositories.sglang,
        title=f"feat: integrate FlashInfer {op_type} for {one_line(subject.model)}",
        body=body,
    )
