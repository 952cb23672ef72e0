"""What a run came to: counts for exit codes, tables for the UI and the terminal."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from tasks.manifest import NEEDS_REFERENCE, KernelEntry, Route, RunManifest, Upstream
from tasks.publish.markdown import cell, code, fenced, one_line, prose, without_credentials

_WEB = re.compile(r"https?://[^\s()<>\[\]\\|`\"']+")
_NUMBERED = re.compile(r"/(?:discussions|pull|issues)/([1-9][0-9]{0,9})/?$", re.ASCII)
_BEGINS_LINK = re.compile(r"(?<=\])(?=\()|(?<=<)")
REFUSED = {
    "rejected": "was closed without being merged",
    "changes_requested": "is to be changed",
}
"""What reviewers have refused -> how to say it."""
_DONE_WITH = ("merged", "closed")
_SOMEBODY = ("waiting", NEEDS_REFERENCE, *REFUSED)
"""States in which a kernel goes on when somebody has done something."""


@dataclass(frozen=True)
class Report:
    """The state of every kernel of a run."""

    run: RunManifest
    path: Path

    @property
    def states(self) -> Counter[str]:
        """How many kernels are in each state."""
        return Counter(self.run.state(entry) for entry in self.run.kernels)

    @property
    def counts(self) -> str:
        """Say the states in a line."""
        return ", ".join(f"{count} {state}" for state, count in sorted(self.states.items()))

    @property
    def exit_code(self) -> int:
        """0 done, 1 some kernel failed, 3 some kernel waits for upstream or for somebody."""
        if self.states["failed"]:
            return 1
        return 3 if any(self.states[state] for state in _SOMEBODY) else 0

    @property
    def not_produced(self) -> list[str]:
        """Return what phase 1 has no kernel for, with the reasons: unmapped, then impossible."""
        items = (*(self.run.unmapped or ()), *(self.run.rejected or ()))
        return [f"{item.get('what')}: {item.get('reason')}" for item in items]

    def row(self, entry: KernelEntry) -> dict[str, str]:
        """Return one kernel's line of the inventory."""
        template = {True: "yes", False: "no", None: "-"}[entry.fi_trace_template]
        return {
            "definition": entry.definition_name,
            "state": self.run.state(entry),
            "phase 1": entry.phase1_status,
            "FlashInfer": (entry.fi_status or "-").removeprefix("fi_"),
            "SGLang": (entry.sgl_status or "-").removeprefix("sgl_"),
            "template": template,
            "op type": entry.op_type,
        }

    def inventory(self) -> list[dict[str, str]]:
        """Return a line per kernel, with the reasons of its classification."""
        return [
            {
                "model": self.run.model_slug,
                **self.row(entry),
                "server flags": " ".join(entry.server_flags or ()),
                "why": "; ".join(entry.evidence or ()),
            }
            for entry in self.run.kernels
        ]

    def data(self) -> dict[str, Any]:
        """Return all that is known, as JSON data."""
        return {
            "manifest": str(self.path),
            "model_slug": self.run.model_slug,
            "states": dict(self.states),
            "kernels": [
                {
                    **row,
                    "links": self.links(entry),
                    "upstream": {
                        kind: known.model_dump(mode="json", exclude_none=True)
                        for kind, known in self.upstream(entry).items()
                    },
                    "error": entry.error,
                }
                for row, entry in zip(self.inventory(), self.run.kernels, strict=True)
            ],
        }

    def links(self, entry: KernelEntry) -> dict[str, str]:
        """Return what was published for a kernel, by kind."""
        return self.run.links(entry)

    def upstream(self, entry: KernelEntry) -> dict[str, Upstream]:
        """Return what has become of what was published for a kernel, by kind, where it is known."""
        found = {kind: self.run.upstream_of(url) for kind, url in self.links(entry).items()}
        return {kind: known for kind, known in found.items() if known}

    def standing(self, entry: KernelEntry) -> dict[str, str]:
        """Return how far a kernel's pull requests and requests have come, in a word or two each."""
        known = self._became(entry)
        became = {
            kind: f"{_number(url)}{known.get(kind, 'unknown')}"
            for kind, url in self.links(entry).items()
        }
        pair = {f"{kind} PR": became.pop(kind, "-") for kind in ("dataset", "coverage")}
        asked = ", ".join(f"{kind}: {state}" for kind, state in became.items())
        return {**pair, "requests": asked or "-"}

    def status(self) -> list[dict[str, str]]:
        """Return a line per kernel that is new or of which anything was published."""
        return [
            {
                "definition": entry.definition_name,
                "state": self.run.state(entry),
                **self.standing(entry),
            }
            for entry in self.run.kernels
            if entry.route is not Route.NOTHING or self.links(entry)
        ]

    def reason(self, entry: KernelEntry, say: Callable[[str], str] = str) -> str:
        """Return why a kernel goes no further, and what to do about it; empty if nothing is.

        Args:
            entry: the kernel.
            say: makes what others wrote fit for where it is shown.
        """
        state = self.run.state(entry)
        if state in REFUSED:
            return "; ".join(self._refusals(entry, say))
        if state != NEEDS_REFERENCE:
            return say(entry.error or "")
        notes = "; ".join(entry.phase2_notes or ("nobody has written its reference",))
        command = (
            f"onboard define --manifest {self.path} --dataset "
            f"{self.path.parent / 'flashinfer-trace'} --only {entry.definition_name} "
            "--reference FILE.py"
        )
        form = "or in the form of its paused run in the UI"
        return f"{say(notes)}: give one with {code(command)}, {form}"

    def _refusals(self, entry: KernelEntry, say: Callable[[str], str]) -> Iterator[str]:
        """Yield which pull requests were refused, in whose words, and how to go on."""
        for kind, known in self.upstream(entry).items():
            if known.state not in REFUSED:
                continue
            goes_on = "reopen it there to go on with it"
            if known.state == "changes_requested":
                renew = code(f"onboard publish --definitions {entry.definition_name}")
                goes_on = f"push what is wanted to its branch, or stage it and {renew}"
            elif kind == "SGLang":
                goes_on = "reopen it there, or name another one with --sglang-pr"
            words = f" ({say(known.said)})" if known.said else ""
            where = say(self.links(entry)[kind])
            yield f"{kind} {where} {REFUSED[known.state]}{words}: {goes_on}"

    def summary(self, entry: KernelEntry) -> str:
        """Return what a kernel waits for, or what was published for it, in a line."""
        if self.run.state(entry) == "waiting":
            known = self.run.upstream_of(entry.sglang_pr_url)
            merged = known is not None and known.state == "merged"
            what = "sources that have what is merged: " if merged else ""
            return f"waits for {what}{entry.sglang_pr_url}"
        return self.reason(entry, printed) or ", ".join(self._links(entry, "{} {}".format))

    def _became(self, entry: KernelEntry) -> dict[str, str]:
        """Return the states of what was published for a kernel, by kind, where they are known."""
        known = self.upstream(entry)
        return {kind: found.state.replace("_", " ") for kind, found in known.items()}

    def _links(self, entry: KernelEntry, show: Callable[[str, str], str]) -> list[str]:
        """Return what was published, shown by kind and URL, with what has become of it."""
        became = {kind: f" ({state})" for kind, state in self._became(entry).items()}
        return [show(kind, url) + became.get(kind, "") for kind, url in self.links(entry).items()]

    def words(self, entry: KernelEntry) -> dict[str, str]:
        """Return the reviewers' last words about what is not done with, by kind."""
        return {
            kind: known.said
            for kind, known in self.upstream(entry).items()
            if known.said and known.state not in _DONE_WITH
        }

    def _words(self, entry: KernelEntry) -> list[str]:
        return [f"{kind}: {prose(said)}" for kind, said in self.words(entry).items()]

    def table(self) -> list[dict[str, str]]:
        """Return the inventory as the UI shows it, with what has become of what was published."""
        rows = zip(self.inventory(), map(self.standing, self.run.kernels), strict=True)
        return [
            {
                column: plain(value)
                for column, value in {**row, **standing}.items()
                if column != "model"
            }
            for row, standing in rows
        ]

    def markdown(self) -> str:
        """Return the report as the UI shows it."""
        lines = [f"# {prose(self.run.model_slug)}", "", self.counts, ""]
        lines += ["| Kernel | State | Workloads |", "|---|---|---:|"]
        worked = [entry for entry in self.run.kernels if entry.route is not Route.NOTHING]
        for entry in worked:
            rows = "" if entry.workload_entries is None else str(entry.workload_entries)
            lines.append(f"| {code(entry.definition_name)} | {self.run.state(entry)} | {rows} |")
        reasons = {entry.definition_name: self.reason(entry, prose) for entry in worked}
        lines += _section("Why", _named(reasons))
        kernels = {entry.definition_name: entry for entry in self.run.kernels}
        links = {name: ", ".join(self._links(entry, link)) for name, entry in kernels.items()}
        lines += _section("Published and asked for", _named(links))
        words = {name: "; ".join(self._words(entry)) for name, entry in kernels.items()}
        lines += _section("Said upstream", _named(words))
        others = [entry for entry in self.run.kernels if entry.route is Route.NOTHING]
        lines += _section("In the dataset already", (code(e.definition_name) for e in others))
        lines += _section("Not produced", map(prose, self.not_produced))
        lines += ["", f"Manifest: {code(self.path)}"]
        return "\n".join(lines) + "\n"

    def page(self, entry: KernelEntry) -> str:
        """Return all that is known about one kernel, as the UI shows it."""
        facts: dict[str, Any] = {
            "state": self.run.state(entry),
            "model": " ".join(filter(None, (self.run.model_slug, self.run.hf_repo_id))),
            **self.row(entry),
            "server flags": " ".join(entry.server_flags or ()),
            "phase 2": ", ".join(filter(None, (entry.phase2_status, entry.phase2_method))),
            "made with": ", ".join(f"{k} {v}" for k, v in (entry.phase2_versions or {}).items()),
            "phase 3": entry.phase3_status,
            "workloads": entry.workload_entries,
            "baseline": entry.baseline_status,
        }
        del facts["definition"]
        lines = [f"# `{entry.definition_name}`", "", "| | |", "|---|---|"]
        lines += [f"| {name} | {cell(value)} |" for name, value in facts.items() if value]
        if self.run.state(entry) == "failed":
            lines += ["", "## Error", "", fenced(str(entry.error), "")]
        elif reason := self.reason(entry, prose):
            waits = self.run.state(entry) == NEEDS_REFERENCE
            lines += ["", f"## {'Waits for a reference' if waits else 'Refused'}", "", reason]
        lines += _section("Links", self._links(entry, link))
        lines += _section("Said upstream", self._words(entry))
        lines += _section("Why it is classified so", map(prose, entry.evidence or ()))
        lines += _section("Notes on its definition", map(prose, entry.phase2_notes or ()))
        lines += _section("Proof of its reference", map(prose, entry.phase2_proof or ()))
        lines += ["", f"Manifest: {code(self.path)}"]
        return "\n".join(lines) + "\n"


def _number(url: str) -> str:
    """Return the number by which an issue or a pull request is called; nothing if it has none."""
    found = _NUMBERED.search(url)
    return f"#{found[1]} " if found else ""


def _named(texts: Mapping[str, str]) -> Iterator[str]:
    """Yield a line for each kernel of which there is anything to say."""
    return (f"{code(name)}: {text}" for name, text in texts.items() if text)


def _section(title: str, items: Iterable[str]) -> list[str]:
    """Return the lines of a list with a heading; none if it is empty."""
    lines = [f"- {item}" for item in items]
    return ["", f"## {title}", "", *lines] if lines else []


def link(kind: str, url: str) -> str:
    """Return a link to follow; of what is no page of the web, such as a file here, its path."""
    address = without_credentials(url)
    if _WEB.fullmatch(address):
        return f"[{kind}]({address})"
    return f"{kind}: {code(unquote(address.removeprefix('file://')))}"


def plain(value: str) -> str:
    """Return text as a table artifact shows it, which is markdown in one of Prefect's two UIs."""
    return _BEGINS_LINK.sub("\N{ZERO WIDTH SPACE}", one_line(value))


def printed(value: str) -> str:
    """Return what others wrote as a line for a terminal, with nothing that it would obey."""
    return one_line("".join(c if c.isprintable() else " " for c in value))
