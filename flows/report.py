"""What a run came to: counts for exit codes, tables for the UI and the terminal."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tasks.manifest import NEEDS_REFERENCE, KernelEntry, RunManifest


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
            "op type": entry.op_type,
            "phase 1": entry.phase1_status,
            "FlashInfer": (entry.fi_status or "-").removeprefix("fi_"),
            "template": template,
            "SGLang": (entry.sgl_status or "-").removeprefix("sgl_"),
            "state": self.run.state(entry),
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

    def reason(self, entry: KernelEntry) -> str:
        """Return why a kernel goes no further, and what to do about it; empty if nothing is."""
        if self.run.state(entry) != NEEDS_REFERENCE:
            return entry.error or ""
        notes = "; ".join(entry.phase2_notes or ("nobody has written its reference",))
        return (
            f"{notes}: give one with `onboard define --manifest {self.path} --dataset "
            f"{self.path.parent / 'flashinfer-trace'} --only {entry.definition_name} "
            "--reference FILE.py`, or in the form of its paused run in the UI"
        )

    def markdown(self) -> str:
        """Return the report as the UI shows it."""
        lines = [f"# {self.run.model_slug}", "", self.counts, "", f"Manifest: `{self.path}`", ""]
        lines += ["| Kernel | State | Workloads | Links | Reason |", "|---|---|---:|---|---|"]
        for entry in self.run.kernels:
            links = ", ".join(f"[{kind}]({url})" for kind, url in self.links(entry).items())
            rows = "" if entry.workload_entries is None else str(entry.workload_entries)
            reason = self.reason(entry).replace("|", "\\|").replace("\n", " ")
            lines.append(
                f"| `{entry.definition_name}` | {self.run.state(entry)} | {rows} | {links} | "
                f"{reason} |"
            )
        if self.not_produced:
            lines += ["", "Not produced:", *(f"- {item}" for item in self.not_produced)]
        return "\n".join(lines) + "\n"
