"""Titles, bodies and branches of what is published, from a manifest entry and the staged files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import SecretStr

from tasks import files, git, ops
from tasks.coverage_doc import PATH as COVERAGE_PATH
from tasks.coverage_doc import CoverageDocument, Status
from tasks.dataset import DefinitionFiles
from tasks.errors import InputError, PublishError
from tasks.manifest import DONE, KernelEntry, RunManifest
from tasks.ops.base import FlashInferApi, KernelSpec, NoKernel, Provider
from tasks.publish.base import BODY_LIMIT, TITLE_LIMIT, Branch, Checklist, Post, marker, titled
from tasks.publish.markdown import FILTERS, fits, one_line, scrubbed, width
from tasks.publish.requested import is_public, public_address, without_request
from tasks.publish.sites import Site, sglang_site
from tasks.settings import PublishSettings, Settings

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    undefined=StrictUndefined,
    trim_blocks=True,
    autoescape=False,  # noqa: S701  the output is markdown
    keep_trailing_newline=True,
)
_TEMPLATES.filters |= FILTERS | {
    # What could pass for one of our markers, written so that the JSON stays the same.
    "definition_json": lambda value: json.dumps(value, indent=2, ensure_ascii=False).replace(
        "<!--", "\\u003c!--"
    ),
}


_NOTHING_CHECKED = Checklist()
_MOST_ROWS = 100
"""Workloads that the body lists: a row takes about 150 of its characters."""


@dataclass(frozen=True)
class Subject:
    """The kernel to publish and where its files are."""

    manifest: RunManifest
    entry: KernelEntry
    dataset: Path
    collected: Path
    """Provenance of its workloads, written by phase 3; may not exist."""
    workspace: Path
    sglang: Path
    """SGLang's clone; may not exist."""
    repositories: PublishSettings = field(default_factory=PublishSettings)
    """Where pull requests and issues go."""
    secrets: tuple[SecretStr, ...] = ()
    """Tokens that are known here: no log may have them."""

    @classmethod
    def of(cls, run: RunManifest, entry: KernelEntry, options: Settings) -> Subject:
        """Return a kernel of a run whose files are where the settings say."""
        return cls(
            manifest=run,
            entry=entry,
            dataset=options.clone("flashinfer_trace"),
            collected=options.provenance(run.model_slug, entry.definition_name),
            workspace=options.workspace,
            sglang=options.clone("sglang"),
            repositories=options.publish,
            secrets=tuple(value for _, value in options if isinstance(value, SecretStr)),
        )

    @property
    def known_secrets(self) -> tuple[str, ...]:
        """What no text may have, however it looks."""
        return tuple(secret.get_secret_value() for secret in self.secrets)

    @property
    def places(self) -> dict[str, str]:
        """Folders that are nobody's business -> what a text calls them."""
        roots = {self.workspace.absolute(), self.workspace.resolve()}
        return {**{str(root): "WORKSPACE" for root in roots}, str(Path.home()): "~"}

    def shown(self, text: Any) -> str:
        """Return a text of this machine as others may see it."""
        return scrubbed(str(text), self.known_secrets, self.places)

    @property
    def files(self) -> DefinitionFiles:
        """Its paths in the dataset."""
        return DefinitionFiles(self.entry.op_type, self.entry.definition_name)

    @property
    def model(self) -> str:
        """The model's name as people write it."""
        repo_id = self.manifest.hf_repo_id
        return repo_id.rpartition("/")[2] if repo_id else self.manifest.model_slug

    @property
    def spec(self) -> KernelSpec | None:
        """What the kernel is, if an op module knows it."""
        if self.entry.spec is None or self.entry.op_type not in ops.registry():
            return None
        return KernelSpec.model_validate(self.entry.spec)

    @property
    def provider(self) -> Provider | None:
        """What would run the kernel, if an op module knows it."""
        return ops.op_module(self.spec.op_type).provider(self.spec) if self.spec else None

    @property
    def asked_for(self) -> str:
        """Whose request an issue is (`Post.asked_for`)."""
        return f"{self.manifest.model_slug}/{self.entry.definition_name}"

    def definition(self) -> dict[str, Any]:
        """Return the staged definition, or as much as is known of it; it may lack a reference."""
        staged = self.dataset / self.files.definition
        if staged.exists():
            found = files.read_json_object(staged, "the definition")
            return {**found, "description": without_request(str(found.get("description") or ""))}
        if self.spec is None:
            return {}
        named = {"name": self.entry.definition_name, "op_type": self.entry.op_type}
        return {**named, **ops.op_module(self.spec.op_type).definition(self.spec)}


_API = re.compile(
    r"FlashInfer \S+: (?P<api>flashinfer\.[\w.]+) at (?P<place>[\w./-]+:\d+)", re.ASCII
)
"""How the evidence says where an API is (`discover/inventory.py`)."""


def render_body(template: str, subject: Subject, **context: Any) -> str:
    """Return a template's text about a kernel.

    Args:
        template: its file's name.
        subject: the kernel.
        context: what else the template shows.
    """
    return _TEMPLATES.get_template(template).render(
        entry=subject.entry, model=subject.model, shas=subject.manifest.repo_shas, **context
    )


def dataset_pull_request(
    subject: Subject, checked: Checklist = _NOTHING_CHECKED
) -> tuple[Post, Branch]:
    """Render the pull request that adds a definition's files to the dataset.

    Where the text has no room for the whole log, the branch has it as a file.

    Args:
        subject: the kernel.
        checked: its checklist, with what the text quotes of it.

    Raises:
        PublishError: nothing is staged.
    """
    name, place = subject.entry.definition_name, subject.files
    staged = {path: subject.dataset / path for path in place.staged(subject.dataset)}
    if place.definition not in staged:
        raise PublishError(f"{name}: {subject.dataset / place.definition} is not staged")
    collected, rows = None, []
    if subject.collected.exists():
        collected = files.read_json_object(subject.collected, "the collection's provenance")
        rows = list(_workloads(subject, collected["provenance"]["workloads"]))
        for session in collected["provenance"]["sessions"]:
            if session["model"].startswith("/"):
                session["model"] = "a local folder"
    request = subject.entry.fi_issue_url
    plot = subject.collected.with_suffix(".png")
    pictures = {f"{name}.png": plot} if collected and plot.exists() else {}
    body = render_body(
        "dataset.md.j2",
        subject,
        checked=checked,
        spec=subject.spec,
        paths=_listed(staged, place),
        collected=collected,
        workloads=rows[:_MOST_ROWS],
        more_workloads=max(0, len(rows) - _MOST_ROWS),
        pictures=pictures,
        shown=subject.shown,
        repo_id=subject.manifest.hf_repo_id,
        request=public_address(request, subject.workspace) if request else "",
    )
    title = f"{titled(name)}: {_contents(staged)}"
    title = title if width(title) <= TITLE_LIMIT else titled(name)
    log, attached = checked.log, ""
    if not fits(body, log, BODY_LIMIT - width(f"\n\n{marker(name, 'dataset')}\n")):
        whole = subject.collected.with_suffix(".log")
        files.write_text(whole, f"{log.rstrip()}\n")
        path = _attached(place)
        staged[path], attached = whole, path.as_posix()
    post = Post(
        key=name,
        kind="dataset",
        repository=subject.repositories.dataset,
        title=title,
        body=body,
        pictures=pictures,
        log=log,
        attached=attached,
    )
    shas = subject.manifest.repo_shas
    message = (
        f"{title}\n\nModel: {subject.model}\nSGLang: {shas.sglang}\nFlashInfer: {shas.flashinfer}\n"
        f"Workload entries: {subject.entry.workload_entries or 0}\n"
    )
    branch = Branch(
        name=f"onboard/{name}",
        clone=subject.dataset,
        message=message,
        files=staged,
        owned=(*place.owned, _attached(place)),
    )
    return post, branch


def _attached(place: DefinitionFiles) -> PurePosixPath:
    """Return where a log goes that is too long for a text.

    FlashInfer-Bench looks for JSON files in the folders that it knows, and into no other.
    """
    return PurePosixPath("logs", place.op_type, f"{place.name}.log")


def _workloads(subject: Subject, seen: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what the text says of each row."""
    text = files.read_text(subject.dataset / subject.files.workloads, "the workloads")
    for line in filter(str.strip, text.splitlines()):
        row = json.loads(line)["workload"]
        axes = ", ".join(f"{axis}={size}" for axis, size in row["axes"].items())
        calls = seen[row["uuid"]]["count"] if row["uuid"] in seen else "of another model"
        yield {"uuid": row["uuid"], "axes": axes, "calls": calls}


def _listed(staged: dict[PurePosixPath, Path], place: DefinitionFiles) -> list[str]:
    blobs = [path for path in staged if path.suffix == ".safetensors"]
    listed = [path.as_posix() for path in staged if path.suffix != ".safetensors"]
    return [*listed, *([f"{place.blobs}/ ({len(blobs)} blobs)"] if blobs else [])]


def _contents(staged: dict[PurePosixPath, Path]) -> str:
    parts = {
        "definitions": "definition",
        "tests": "reference test",
        "solutions": "baseline solution",
        "workloads": "workloads",
        "traces": "traces",
    }
    roots = {path.parts[0] for path in staged}
    return " + ".join(text for root, text in parts.items() if root in roots)


def coverage_status(entry: KernelEntry) -> Status:
    """Return the mark of a definition: with workloads, or definition only."""
    return "✅" if entry.phase3_status == DONE else "🟡"


def coverage_pull_request(
    subject: Subject, bench_clone: Path, dataset_pr: str, edited: Path
) -> tuple[Post, Branch]:
    """Render the pull request that marks the definition's row, for this model only.

    Args:
        subject: the kernel.
        bench_clone: clone of flashinfer-bench.
        dataset_pr: URL of the dataset pull request; empty if it is not open yet.
        edited: file to write the edited document to.

    Raises:
        InputError: the document is not of the known form.
    """
    name, entry = subject.entry.definition_name, subject.entry
    base = git.git("rev-parse", "HEAD", cwd=bench_clone)
    text = git.run("show", f"{base}:{COVERAGE_PATH}", cwd=bench_clone)
    try:
        document = CoverageDocument.parse(text.decode())
    except UnicodeDecodeError as error:
        raise InputError(f"{COVERAGE_PATH}: is not UTF-8 text (byte {error.start})") from error
    heading = document.model(subject.manifest.model_slug, subject.model)
    if heading is None:
        heading = subject.model
        document.add_model(heading, subject.manifest.architecture or "unknown")
    status = coverage_status(entry)
    document.mark(heading, name, entry.op_type, status)
    files.write_text(edited, document.render())
    title = f"docs: mark {name} as covered for {heading}"
    links = {"dataset_pr": dataset_pr, "fi_issue_url": entry.fi_issue_url}
    shown = {key: public_address(url, subject.workspace) for key, url in links.items() if url}
    body = render_body(
        "coverage.md.j2",
        subject,
        status=status,
        path=COVERAGE_PATH,
        **{**dict.fromkeys(links, ""), **shown},
    )
    # The row is this model's; another model that needs the kernel has a row of its own.
    key = f"{name}.{subject.manifest.model_slug}"
    post = Post(key, "coverage", subject.repositories.bench, title, body)
    message = f"{title}\n\nDataset pull request: {shown.get('dataset_pr', 'to follow')}\n"
    changed = {PurePosixPath(COVERAGE_PATH): edited}
    return post, Branch(f"feat/def-{key}", bench_clone, message, changed, base)


def kernel_request(subject: Subject) -> Post:
    """Render the issue that asks FlashInfer for a kernel it does not have.

    One per definition. Where the model needs several of an op type (decode and prefill), their
    titles name the definition too.
    """
    entry, run = subject.entry, subject.manifest
    definition, site = subject.definition(), _sglang_site(subject)
    dataset_pr = run.pull_requests(entry.definition_name).flashinfer_trace_pr
    body = render_body(
        "kernel_request.md.j2",
        subject,
        repo_id=run.hf_repo_id,
        description=definition.get("description", ""),
        axes=list(_axes(definition)),
        tensors=list(_tensors(definition)),
        reference=definition.get("reference", ""),
        definition_path=subject.files.definition,
        site=site,
        site_url=site.url(run.repo_shas.sglang) if site else "",
        model_class=run.model_class,
        # One in the outbox is nowhere that FlashInfer could look.
        dataset_pr=dataset_pr if is_public(dataset_pr) else "",
    )
    title = f"Kernel request: {entry.op_type} for {one_line(subject.model)}"
    requested = [other.op_type for other in run.kernels if other.route is entry.route]
    if requested.count(entry.op_type) > 1:
        title += f" ({entry.definition_name})"
    return Post(
        key=entry.definition_name,
        kind="kernel-request",
        repository=subject.repositories.flashinfer,
        title=title,
        body=body,
        labels=("enhancement", "kernel-request"),
        asked_for=subject.asked_for,
    )


def _sglang_site(subject: Subject) -> Site | None:
    provider, file, keyword = subject.provider, "", ""
    if isinstance(provider, NoKernel):
        file, keyword = provider.sglang_file, provider.keyword
    elif isinstance(provider, FlashInferApi):
        file, keyword = provider.sglang_layer, provider.path.rpartition(".")[2]
    return sglang_site(subject.entry.evidence or (), file, keyword, subject.sglang)


def _axes(definition: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for name, axis in (definition.get("axes") or {}).items():
        constant = axis.get("type") == "const"
        value = axis.get("value") if constant else "variable"
        yield {"name": name, "value": value, "meaning": axis.get("description") or ""}


def _tensors(definition: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for role in ("input", "output"):
        for name, spec in (definition.get(f"{role}s") or {}).items():
            yield {
                "name": name,
                "role": role,
                "shape": ", ".join(map(str, spec.get("shape") or ())) or "scalar",
                "dtype": spec.get("dtype", ""),
                "meaning": spec.get("description") or "",
            }


def template_request(subject: Subject) -> Post:
    """Render the issue that asks FlashInfer for a trace template of an API it has.

    It is about the API: other kernels and models that it runs find the issue of the first one.

    Raises:
        PublishError: nobody says which API runs the kernel.
    """
    entry, definition = subject.entry, subject.definition()
    provider, method = subject.provider, None
    tags = [str(tag) for tag in definition.get("tags") or ()]
    tagged = [tag.removeprefix("fi_api:") for tag in tags if tag.startswith("fi_api:")]
    found = [match for line in entry.evidence or () if (match := _API.search(line))]
    candidates = [*tagged, *(match["api"] for match in found)]
    if isinstance(provider, FlashInferApi):
        candidates, method = [provider.path], provider.method
    if not candidates:
        raise PublishError(
            f"{entry.definition_name}: which FlashInfer API runs it is not known; its trace "
            "template cannot be requested"
        )
    api = candidates[0]
    places = [match["place"] for match in found if match["api"] == api]
    body = render_body(
        "template_request.md.j2",
        subject,
        repo_id=subject.manifest.hf_repo_id,
        api=api,
        method=method,
        place=places[0] if places else "",
        definition=definition,
        definition_path=subject.files.definition,
    )
    return Post(
        key=api,
        kind="template-request",
        repository=subject.repositories.flashinfer,
        title=f"trace: add @flashinfer_api(trace=...) for {api}",
        body=body,
        labels=("enhancement", "flashinfer-trace"),
        asked_for=subject.asked_for,
    )
