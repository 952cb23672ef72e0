"""What a run came to: counts for exit codes, tables for the UI and the terminal."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from tasks.manifest import NEEDS_REFERENCE, KernelEntry, Route, RunManifest
from tasks.publish.markdown import cell, code, fenced, one_line, prose, without_credentials

_WEB = re.compile(r"https?://[^\s()<>\[\]\\|`\"']+")
_BEGINS_LINK = re.compile(r"(?<=\])(?=\()|(?<=<)")


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
        """0 done, 1 some kernel failed, 3 some kernel waits for upstream or for a reference."""
        if self.states["failed"]:
            return 1
        return 3 if self.states["waiting"] or self.states[NEEDS_REFERENCE] else 0

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

    def links(self, entry: KernelEntry) -> dict[str, str]:
        """Return what was published for a kernel, by kind."""
        pulls = self.run.phase4.get(entry.definition_name)
        found = {
            "dataset": pulls.flashinfer_trace_pr if pulls else None,
            "coverage": pulls.flashinfer_bench_pr if pulls else None,
            "kernel request": entry.fi_issue_url,
            "template request": entry.fi_trace_template_request_url,
            "SGLang": entry.sglang_pr_url,
        }
        return {kind: url for kind, url in found.items() if url}

    def reason(self, entry: KernelEntry, say: Callable[[str], str] = str) -> str:
        """Return why a kernel goes no further, and what to do about it; empty if nothing is.

        Args:
            entry: the kernel.
            say: makes what others wrote fit for where it is shown.
        """
        if self.run.state(entry) != NEEDS_REFERENCE:
            return say(entry.error or "")
        notes = "; ".join(entry.phase2_notes or ("nobody has written its reference",))
        command = (
            f"onboard define --manifest {self.path} --dataset "
            f"{self.path.parent / 'flashinfer-trace'} --only {entry.definition_name} "
            "--reference FILE.py"
        )
        form = "or in the form of its paused run in the UI"
        return f"{say(notes)}: give one with {code(command)}, {form}"

    def summary(self, entry: KernelEntry) -> str:
        """Return what a kernel waits for, or what was published for it, in a line."""
        if self.run.state(entry) == "waiting":
            return f"waits for {entry.sglang_pr_url}"
        links = ", ".join(f"{kind} {url}" for kind, url in self.links(entry).items())
        return self.reason(entry) or links

    def table(self) -> list[dict[str, str]]:
        """Return the inventory as the UI shows it."""
        return [
            {column: plain(value) for column, value in row.items() if column != "model"}
            for row in self.inventory()
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
        links = {
            entry.definition_name: ", ".join(
                link(kind, url) for kind, url in self.links(entry).items()
            )
            for entry in worked
        }
        lines += _section("Published and asked for", _named(links))
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
            lines += ["", "## Waits for a reference", "", reason]
        lines += _section("Links", (link(kind, url) for kind, url in self.links(entry).items()))
        lines += _section("Why it is classified so", map(prose, entry.evidence or ()))
        lines += _section("Notes on its definition", map(prose, entry.phase2_notes or ()))
        lines += _section("Proof of its reference", map(prose, entry.phase2_proof or ()))
        lines += ["", f"Manifest: {code(self.path)}"]
        return "\n".join(lines) + "\n"


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
