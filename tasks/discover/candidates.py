"""Which models may be onboarded next.

New model files of SGLang, new or changed entries of sgl-cookbook, and what is trending on the Hub,
less what is tracked already. Where a repository id is not known from the cookbook, the Hub is
asked; a candidate without one says so. What cannot be read is listed with the reason, and a source
that cannot be asked is a warning.
"""

from __future__ import annotations

import datetime as dt
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from tasks import git, manifest
from tasks.coverage_doc import PATH as COVERAGE_PATH
from tasks.coverage_doc import CoverageDocument, key, model_slug
from tasks.discover.cookbook import FOLDER as COOKBOOK
from tasks.discover.cookbook import MAX_BYTES as COOKBOOK_MAX_BYTES
from tasks.discover.cookbook import read_models, shown
from tasks.discover.history import Change, Commit, Window, git_in, open_window, parse_since
from tasks.discover.hub import Hub, HubError
from tasks.discover.syntax import MAX_BYTES as PYTHON_MAX_BYTES
from tasks.discover.syntax import entry_classes, parse
from tasks.errors import InputError, OnboardError
from tasks.settings import REPOSITORY, Settings

MODELS = "python/sglang/srt/models"
Source = Literal["sglang", "cookbook", "hub"]
State = Literal["candidate", "needs_repo_id", "tracked", "excluded"]

_NOT_ONBOARDED = (
    (
        "draft model",
        r"(^|_)(nextn|mtp|eagle\d*|dspark|dflash\d*|draft|medusa)(_|$)",
        r"NextN|MTP|Eagle|DSpark|DFlash|Draft|Medusa",
    ),
    ("reward model", r"(^|_)(rm|reward)(_|$)", r"Reward"),
    ("classification model", r"(^|_)classification(_|$)", r"Classification"),
    (
        "vision or audio part",
        r"(?!)",
        r"(Vision|Audio|ViT|CLIP|Sig[lL]ip)\w*(Model|Tower|Encoder|Transformer)$",
    ),
    # A bare `...Model` is an encoder; the language models among them end in LM, LMHead or Chat.
    (
        "embedding model",
        r"(^|_)embedding(_|$)",
        r"Embedding|Bidirectional|(?<!LM)(?<!LMHead)(?<!Chat)Model$|^Contriever$",
    ),
)
"""What is no language model of its own: reason, and what its file or its class is called."""
_HEADS = re.compile(r"(For(CausalLM|ConditionalGeneration)|LMHeadModel|ModelLM|Model)$")
_SIZE = re.compile(r"\d+(\.\d+)?[bmt]|a\d+(\.\d+)?b|\d+e|\d+x\d+b|v\d+(\.\d+)+|\d+k", re.IGNORECASE)
_ACTIVE = re.compile(r"-a\d+(\.\d+)?b(?=-|$)", re.IGNORECASE)
_LAST = 9


class Candidate(BaseModel):
    """A model that may be onboarded, or why it is not to be."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    status: State
    priority: int
    """1 comes first."""
    sources: tuple[Source, ...]
    architecture: str | None = None
    model_file: str | None = None
    """SGLang's, or the cookbook's where SGLang's is not known."""
    hf_repo_id: str | None = None
    reason: str
    date: str | None = None
    commit: str | None = None

    def line(self) -> str:
        """Say it in one line."""
        name = self.hf_repo_id or self.architecture or self.model_file or "?"
        about = (self.architecture, self.model_file)
        details = ", ".join(text for text in about if text and text != name)
        return (
            f"{self.status:13} {self.date or '-':10} {'+'.join(self.sources):15} "
            f"{name}{f' [{details}]' if details else ''}: {self.reason}"
        )


class Discovery(BaseModel):
    """All candidates since a day, the first to onboard first."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    since: str
    candidates: list[Candidate]
    excluded: dict[str, int]
    """Reason -> how many are excluded for it."""
    warnings: list[str]


def exclusion(stem: str, architecture: str) -> str | None:
    """Return why a model class is not onboarded, None for a language model.

    Args:
        stem: the name of its file, without suffix.
        architecture: the class.
    """
    for reason, file_name, class_name in _NOT_ONBOARDED:
        if re.search(file_name, stem) or re.search(class_name, architecture):
            return reason
    return None


def _registered(source: bytes) -> list[str] | None:
    """Return the classes a model file registers; None for what is not Python."""
    tree = parse(source)
    return None if tree is None else list(entry_classes(tree))


def _core(name: str) -> str:
    """Reduce a model's name to its generation: `Qwen/Qwen3-Next-80B-A3B` -> `qwen3next`."""
    words = re.split(r"[-_ ]", model_slug(name))
    return key("".join(word for word in words if not _SIZE.fullmatch(word)))


def _cores(architecture: str, model_file: str) -> set[str]:
    """Return the names a model class may be known by."""
    name = _HEADS.sub("", architecture)
    stem = Path(model_file).stem
    return {_core(name), _core(re.sub(r"(?i)moe$", "", name)), _core(stem)} - {""}


class _Sglang:
    """SGLang's model files at HEAD, and what came since a day."""

    def __init__(self, window: Window) -> None:
        self.window = window
        self._files = {path: blob for path, blob in window.files(MODELS).items() if _is_model(path)}
        self._sources = window.read(self._files.values(), PYTHON_MAX_BYTES)
        self.warnings: list[str] = [window.warning] if window.warning else []

    def declared(self, architecture: str, without: Iterable[str] = ()) -> str | None:
        """Return the file that registers an architecture, looking only outside some files."""
        for path in sorted(set(self._files) - set(without)):
            source = self._sources.get(self._files[path], b"")
            if architecture.encode() in source and architecture in (_registered(source) or ()):
                return path
        return None

    def candidates(self) -> Iterator[Candidate]:
        """Yield the architectures of the added files, those that are not onboarded with reasons."""
        changes, warning = self.window.changes("python/sglang")
        self.warnings += [warning] if warning else []
        added = [c for c in changes if c.kind in "AC" and _is_model(c.path)]
        commits = self.window.commits(MODELS, added=True) if added else {}
        gone = self._gone(changes)
        for change in added:
            commit = commits.get(change.path)
            for architecture, reason in self._architectures(change, added, gone):
                yield Candidate(
                    status="excluded" if reason else "needs_repo_id",
                    priority=_LAST if reason else 3,
                    sources=("sglang",),
                    architecture=architecture,
                    model_file=shown(change.path),
                    reason=reason or "new model file in SGLang",
                    date=commit.date if commit else None,
                    commit=commit.sha if commit else None,
                )

    def _gone(self, changes: list[Change]) -> dict[str, str]:
        """Return architecture -> file of the model files that were removed."""
        removed = [c for c in changes if c.kind == "D" and _is_model(c.path)]
        if not removed:
            return {}
        try:
            sources = self.window.read([c.old_blob for c in removed], PYTHON_MAX_BYTES)
        except git.GitError as error:
            self.warnings.append(f"removed model files cannot be read ({error})")
            return {}
        return {
            architecture: change.path
            for change in removed
            for architecture in _registered(sources.get(change.old_blob, b"")) or ()
        }

    def _architectures(
        self, change: Change, added: list[Change], gone: dict[str, str]
    ) -> Iterator[tuple[str | None, str | None]]:
        """Yield the architectures of an added file, each with the reason not to onboard it."""
        stem = Path(change.path).stem
        source = self._sources.get(change.new_blob) if change.regular else None
        classes = _registered(source) if source is not None else None
        if not change.regular:
            yield None, "not a regular file"
        elif source is None:
            yield None, f"unreadable: larger than {PYTHON_MAX_BYTES} bytes"
        elif classes is None:
            yield None, "unreadable: not Python 3"
        elif not classes:
            yield None, exclusion(stem, "") or "helper module: registers no model"
        for architecture in dict.fromkeys(classes or ()):
            elsewhere = self.declared(architecture, [c.path for c in added])
            elsewhere = elsewhere or gone.get(architecture)
            reason = exclusion(stem, architecture)
            if not reason and elsewhere:
                reason = f"not new: registered by {shown(elsewhere)} before"
            yield shown(architecture), reason


def _is_model(path: str) -> bool:
    return path.endswith(".py") and str(Path(path).parent) == MODELS


class _Cookbook:
    """The cookbook's entries at HEAD, and which are new or changed since a day."""

    def __init__(self, window: Window) -> None:
        self.window = window
        self.warnings: list[str] = [window.warning] if window.warning else []
        self.damaged: dict[str, str] = {}
        self._before = self._entries(before=True)
        self.damaged.clear()  # What was damaged then is no news.
        self._now = self._entries(before=False)

    def _entries(self, *, before: bool) -> list[tuple[str, dict[str, Any]]]:
        files = {
            path: blob
            for path, blob in self.window.files(COOKBOOK, before=before).items()
            if path.endswith(".yaml")
        }
        try:
            contents = self.window.read(files.values(), COOKBOOK_MAX_BYTES)
        except git.GitError as error:
            # A clone without old blobs, and no remote: what is unchanged is there nevertheless.
            self.warnings.append(f"changed entries are listed as new, with their files ({error})")
            present = set(self.window.files(COOKBOOK).values())
            files = {path: blob for path, blob in files.items() if blob in present}
            contents = self.window.read(files.values(), COOKBOOK_MAX_BYTES)
        found = []
        for path, blob in sorted(files.items()):
            if blob not in contents:
                self.damaged[path] = f"larger than {COOKBOOK_MAX_BYTES} bytes"
                continue
            try:
                found += [(path, model) for model in read_models(contents[blob], shown(path))]
            except InputError as error:
                self.damaged[path] = str(error)
        return found

    def repo_ids(self) -> list[str]:
        """Return the repository ids it serves now, the shortest first."""
        paths = [model.get("model_path") for _, model in self._now]
        ids = {path for path in paths if isinstance(path, str) and REPOSITORY.fullmatch(path)}
        return sorted(ids, key=lambda repo_id: (len(repo_id), repo_id))

    def candidates(self) -> Iterator[Candidate]:
        """Yield the entries that are new or changed, and what cannot be read."""
        commits = self.window.commits(COOKBOOK)
        old = {_canonical(model) for _, model in self._before}
        known = {str(model.get("model_path")) for _, model in self._before}
        news: dict[str, tuple[str, dict[str, Any]]] = {}
        for path, model in self._now:
            if _canonical(model) not in old:
                news.setdefault(str(model.get("model_path")), (path, model))
        for path, damage in sorted(self.damaged.items()):
            if path in commits:
                yield self._candidate(path, commits, None, f"unreadable: {damage}")
        for name, (path, model) in sorted(news.items()):
            attributes = model.get("attributes")
            usable = isinstance(model.get("model_path"), str) and REPOSITORY.fullmatch(name)
            reason: str | None = None
            if not usable:
                reason = f"not a repository id: model_path {shown(name[:80])}"
            elif isinstance(attributes, dict) and attributes.get("diffusion"):
                reason = "diffusion model"
            found = self._candidate(path, commits, name if usable else None, reason)
            if not reason and name in known:
                found = found.model_copy(
                    update={"priority": 4, "reason": "changed entry in sgl-cookbook"}
                )
            yield found

    @staticmethod
    def _candidate(
        path: str, commits: dict[str, Commit], repo_id: str | None, excluded: str | None
    ) -> Candidate:
        commit = commits.get(path)
        return Candidate(
            status="excluded" if excluded else "candidate",
            priority=_LAST if excluded else 2,
            sources=("cookbook",),
            model_file=shown(path),
            hf_repo_id=repo_id,
            reason=excluded or "new entry in sgl-cookbook",
            date=commit.date if commit else None,
            commit=commit.sha if commit else None,
        )


def _canonical(model: dict[str, Any]) -> str:
    try:
        return json.dumps(model, sort_keys=True, default=str)
    except (TypeError, ValueError):  # Keys of several kinds cannot be sorted.
        return repr(model)


class _Tracked:
    """What is tracked already: sections of the coverage document, and run manifests."""

    def __init__(self, options: Settings) -> None:
        self.warnings: list[str] = []
        self._document: CoverageDocument | None = None
        bench = options.clone("flashinfer_bench")
        try:
            text = git_in(bench, "show", f"HEAD:{COVERAGE_PATH}").decode()
            self._document = CoverageDocument.parse(text)
        except (OnboardError, UnicodeDecodeError, OSError) as error:
            self.warnings.append(f"{bench}: models with coverage are not known ({error})")
        self._runs: dict[str, str] = {}
        for path in sorted(options.workspace.glob("onboard_*_*.json")):
            try:
                run = manifest.load(path)
            except OnboardError as error:
                self.warnings.append(str(error))
                continue
            for name in (run.model_slug, run.hf_repo_id):
                if name:
                    self._runs[key(model_slug(name))] = shown(path.name)

    def reason(self, candidate: Candidate) -> str | None:
        """Return where a candidate is tracked, None if it is not."""
        repo_id = candidate.hf_repo_id
        if repo_id:
            run = self._runs.get(key(model_slug(repo_id)))
            return f"run manifest {run}" if run else self._section(repo_id)
        headings = self._document.models() if self._document else []
        names = _cores(candidate.architecture or "", candidate.model_file or "")
        same = next((heading for heading in headings if _core(heading) in names), None)
        return f"section {same!r} of {COVERAGE_PATH}" if same else None

    def _section(self, repo_id: str) -> str | None:
        try:
            heading = self._document.model(repo_id) if self._document else None
        except InputError as error:
            return str(error)
        return f"section {heading!r} of {COVERAGE_PATH}" if heading else None


def _with_repo_ids(
    found: list[Candidate], known: list[str], hub: Hub | None, warnings: list[str]
) -> list[Candidate]:
    """Give SGLang's new models their repository ids, from the cookbook or else from the Hub."""
    news = {c.hf_repo_id for c in found if c.hf_repo_id}
    classes = {c.architecture.lower() for c in found if c.architecture}
    with_experts = {name.replace("moe", "") for name in classes if "moe" in name}
    result = []
    for candidate in found:
        if candidate.status != "needs_repo_id" or not candidate.architecture:
            result.append(candidate)
            continue
        names = _cores(candidate.architecture, candidate.model_file or "")
        same = [repo_id for repo_id in known if _core(repo_id) in names]
        # `-A3B` in a name says that three billion parameters of a mixture of experts are active.
        experts = "moe" in candidate.architecture.lower()
        alike = [repo_id for repo_id in same if bool(_ACTIVE.search(repo_id)) is experts]
        same = alike or ([] if candidate.architecture.lower() in with_experts else same)
        repo_id = next((r for r in same if r in news), next(iter(same), None))
        where = "sgl-cookbook, by its name"
        if repo_id is None and hub:
            stem = Path(candidate.model_file or "").stem
            head = _HEADS.sub("", candidate.architecture)
            try:
                repo_id = hub.find(candidate.architecture, head, stem.replace("_", " "))
            except HubError as error:
                warnings.append(str(error))
                hub = None
            where = "the Hub, by its architecture"
        if repo_id:
            candidate = candidate.model_copy(  # noqa: PLW2901 - the same candidate, known better
                update={
                    "status": "candidate",
                    "priority": 1,
                    "hf_repo_id": repo_id,
                    "reason": f"{candidate.reason}; repository from {where}",
                }
            )
        result.append(candidate)
    return result


def _merged(found: list[Candidate]) -> list[Candidate]:
    """Make one of what several sources say about one model; the first to name it leads."""
    result: list[Candidate] = []
    for candidate in found:
        at = next((i for i, first in enumerate(result) if _same(first, candidate)), None)
        if at is None:
            result.append(candidate)
            continue
        first = result[at]
        result[at] = first.model_copy(
            update={
                "sources": tuple(dict.fromkeys((*first.sources, *candidate.sources))),
                "architecture": first.architecture or candidate.architecture,
                "priority": min(first.priority, candidate.priority),
                "reason": "; ".join(dict.fromkeys((first.reason, candidate.reason))),
            }
        )
    return result


def _same(one: Candidate, other: Candidate) -> bool:
    """Whether two sources mean one model: its repository, whichever of its classes they name."""
    return (
        one.hf_repo_id is not None
        and one.hf_repo_id == other.hf_repo_id
        and one.status == other.status != "excluded"
    )


def _without_variants(found: list[Candidate]) -> list[Candidate]:
    """Exclude the tuned and quantised siblings of a candidate: its kernels are theirs."""
    leads: dict[str, str] = {}
    ids = {c.hf_repo_id for c in found if c.hf_repo_id and c.status == "candidate"}
    for name in sorted(ids, key=lambda name: (len(name), name)):
        leads.setdefault(model_slug(name), name)
    result = []
    for candidate in found:
        repo_id = candidate.hf_repo_id if candidate.status == "candidate" else None
        lead = leads[model_slug(repo_id)] if repo_id else None
        if lead != repo_id:  # Its slug is the same: other weights, or the same in fewer bits.
            excluded = {
                "status": "excluded",
                "priority": _LAST,
                "reason": f"variant of another: {lead}",
            }
            candidate = candidate.model_copy(update=excluded)  # noqa: PLW2901 - as it is listed
        result.append(candidate)
    return result


def _trending(hub: Hub, sglang: _Sglang | None) -> Iterator[Candidate]:
    for model in hub.trending():
        architecture = model.architectures[0] if model.architectures else None
        path = sglang.declared(architecture) if sglang and architecture else None
        reason: str | None = "its config names no architecture"
        if architecture:
            reason = exclusion("", architecture)
        if not reason and sglang and not path:
            reason = "SGLang has no such model class"
        yield Candidate(
            status="excluded" if reason else "candidate",
            priority=_LAST if reason else 5,
            sources=("hub",),
            architecture=shown(architecture) if architecture else None,
            model_file=shown(path) if path else None,
            hf_repo_id=model.repo_id,
            reason=reason or "trending on the Hub",
            date=model.created,
        )


def _order(candidate: Candidate) -> tuple[Any, ...]:
    newest_first = -int((candidate.date or "0").replace("-", ""))
    states = ("candidate", "needs_repo_id", "tracked", "excluded")
    rank = max(0, states.index(candidate.status) - 1)
    return (rank, candidate.priority, newest_first, candidate.line(), candidate.model_file or "")


def discover(
    options: Settings, since: str = "30d", *, now: dt.datetime | None = None, ask_hub: bool = True
) -> Discovery:
    """Find the models that may be onboarded next.

    Args:
        options: the workspace with the clones, and the Hub.
        since: how far to look back: `30d`, `2w` or a day.
        now: the time it is.
        ask_hub: whether to ask the Hub for trending models and missing repository ids.

    Raises:
        InputError: `since` is wrong, or neither SGLang's nor the cookbook's clone can be read.
    """
    start = parse_since(since, now or dt.datetime.now(dt.UTC))
    tracked = _Tracked(options)
    warnings: list[str] = []
    found: list[Candidate] = []
    failures: list[OnboardError] = []
    sglang: _Sglang | None = None
    cookbook: _Cookbook | None = None
    try:
        sglang = _Sglang(open_window(options.clone("sglang"), start))
        found += sglang.candidates()
    except OnboardError as error:
        failures.append(error)
    try:
        cookbook = _Cookbook(open_window(options.clone("sgl_cookbook"), start))
        found += cookbook.candidates()
    except OnboardError as error:
        failures.append(error)
    if len(failures) == 2:
        raise InputError("; ".join(map(str, failures)))
    hub = Hub(options) if ask_hub else None
    if hub:
        try:
            found += _trending(hub, sglang)
        except HubError as error:
            warnings.append(str(error))
            hub = None
    found = _with_repo_ids(found, cookbook.repo_ids() if cookbook else [], hub, warnings)
    found = _without_variants(_merged([_if_tracked(candidate, tracked) for candidate in found]))
    reasons = Counter(c.reason.partition(":")[0] for c in found if c.status == "excluded")
    for source in (sglang, cookbook):
        warnings += source.warnings if source else []
    return Discovery(
        since=f"{start:%Y-%m-%d}",
        candidates=sorted(found, key=_order),
        excluded=dict(sorted(reasons.items())),
        warnings=[*map(str, failures), *tracked.warnings, *warnings],
    )


def _if_tracked(candidate: Candidate, tracked: _Tracked) -> Candidate:
    where = tracked.reason(candidate) if candidate.status != "excluded" else None
    if where is None:
        return candidate
    return candidate.model_copy(
        update={"status": "tracked", "priority": _LAST - 1, "reason": where}
    )
