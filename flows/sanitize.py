"""`onboard sanitize`: from a folder of dumped calls to workload rows in a dataset."""

from __future__ import annotations

import dataclasses
import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.command import AsJson, named, print_table, reported
from tasks.errors import InputError, OnboardError

if TYPE_CHECKING:
    from tasks.collect.dumps import CallLog
    from tasks.collect.sanitize import Collected
    from tasks.collect.targets import ModelKernels, Target

_WIDTH = 100
_SHOWN_REASONS = 3
_THEIRS = re.compile(r"the definition has [\d.e-]+")
"""In a reason, the number in which a definition differs from the call."""
_ADVICE = "give --model-config"
"""What a reason advises where a scalar is neither in a dump nor in a model's config."""


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(sanitize)


@reported
def sanitize(
    *,
    dump_dir: Annotated[
        Path, typer.Option(help="Folder of FlashInfer level-10 dumps, or of a drained session.")
    ],
    dataset: Annotated[Path, typer.Option(help="Folder of the dataset to write the rows into.")],
    definitions: Annotated[
        list[str] | None,
        typer.Option(
            help="Definition names, comma-separated or repeated "
            "[default: all whose API was called]."
        ),
    ] = None,
    derive_definitions: Annotated[
        bool,
        typer.Option(
            "--derive-definitions",
            help="First write the definitions that calls imply and the dataset does not have.",
        ),
    ] = False,
    model_config: Annotated[
        Path | None,
        typer.Option(help="The served model's config.json: it has scalars that no call carries."),
    ] = None,
    model_name: Annotated[
        str | None,
        typer.Option(
            help="Model slug that derived definitions are tagged with [default: what the config "
            "file, or its folder, is called]."
        ),
    ] = None,
    max_workloads: Annotated[
        int,
        typer.Option(
            min=1,
            help="Workloads to choose of these calls for each definition, at most. Rows that it "
            "has stay, however many they are, unless --replace is given.",
        ),
    ] = 20,
    replace: Annotated[
        bool,
        typer.Option(
            "--replace",
            help="Drop the rows that the definitions have, where these calls give new ones.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> int:
    """Turn dumped FlashInfer calls into diverse, checked workload rows (no GPU needed).

    Exits with 1 if a named definition, or a derived one, got no rows; without names, if none did.
    """
    names = named(definitions, "--definitions")
    _check(dump_dir, dataset, names, derive=derive_definitions)
    from tasks.collect.sanitize import open_calls

    model = _kernels(model_config) if model_config else None
    slug = _slug(model_config, model_name) if derive_definitions else ""
    log = open_calls(dump_dir)
    outcomes, derived = [], []
    if derive_definitions:
        derived = _derive(log, dataset, model, slug)
    outcomes = _collect(log, dataset, names, model, max_workloads, replace=replace)
    found = Sanitized(
        dump_dir=dump_dir, dataset=dataset, log=log, outcomes=outcomes, derived=derived
    )
    if as_json:
        typer.echo(json.dumps(found.as_json(), indent=2, ensure_ascii=False))
    else:
        found.print(names)
    return found.exit_code(names)


def _check(
    dump_dir: Path,
    dataset: Path,
    names: Sequence[str],
    *,
    derive: bool,
) -> None:
    """Find what is plainly wrong before anything is read."""
    if not dump_dir.is_dir():
        raise InputError(f"--dump-dir: {dump_dir} is no folder")
    if not dataset.is_dir():
        raise InputError(f"--dataset: {dataset} is no folder")
    if not derive and not (dataset / "definitions").is_dir():
        raise InputError(
            f"--dataset: {dataset} has no definitions/ folder; give --derive-definitions to write "
            "those that the calls imply"
        )
    if names and derive:
        raise InputError("give --definitions or --derive-definitions, not both")


def _kernels(config: Path) -> ModelKernels:
    from tasks.collect.targets import ModelKernels
    from tasks.model import read_config

    return ModelKernels(read_config(config))


def _slug(config: Path | None, given: str | None) -> str:
    from tasks.coverage_doc import model_slug
    from tasks.files import safe_name

    if given is None and config is None:
        raise InputError("--model-name: missing; which model are derived definitions tagged with?")
    if given is None and config is not None:
        # `config.json` says nothing, its folder does; downloads are called {org}--{model}.json.
        stem = config.absolute().parent.name if config.stem == "config" else config.stem
        given = model_slug(stem.rsplit("--", 1)[-1])
    return safe_name(given or "", "--model-name")


@dataclass(frozen=True)
class Outcome:
    """What became of one definition."""

    name: str
    op_type: str
    collected: Collected | None = None
    added: int = 0
    """Rows that the dataset did not have."""
    total: int = 0
    """Rows that it has now."""
    error: str = ""
    """What is wrong with the definition, or with what the dataset has of it."""

    @property
    def kept(self) -> int:
        """How many rows of these calls the dataset has now."""
        return self.collected.rows if self.collected else 0

    @property
    def warnings(self) -> list[str]:
        """What looks made up in them."""
        return self.collected.realism.warnings if self.collected else []

    def why_none(self) -> str:
        """Say why there are no rows."""
        rejected = self.collected.rejected if self.collected else {}
        return self.error or f"0 rows ({_top(rejected, _SHOWN_REASONS) or 'no such call'})"

    def as_json(self) -> dict[str, Any]:
        """Return it with its reject table, provenance and realism report."""
        told: dict[str, Any] = {"definition": self.name, "op_type": self.op_type}
        if self.collected is not None:
            provenance = dict(self.collected.provenance)
            told |= {
                "calls": self.collected.calls,
                "distinct": self.collected.distinct,
                "kept": self.collected.rows,
                "added": self.added,
                "rows": self.total,
                "rejected": self.collected.rejected,
                "warnings": self.warnings,
                "realism": provenance.pop("realism"),
                "provenance": provenance,
            }
        return {**told, **({"error": self.error} if self.error else {})}


@dataclass(frozen=True)
class Sanitized:
    """What the command has to say."""

    dump_dir: Path
    dataset: Path
    log: CallLog
    outcomes: list[Outcome]
    derived: list[dict[str, Any]] = field(default_factory=list)

    def exit_code(self, names: Sequence[str]) -> int:
        """Return 0 if there are rows, of all that were named or derived, and no error; else 1."""
        if any(outcome.error for outcome in self.outcomes):
            return 1
        kept = {o.name for o in self.outcomes if o.kept}
        derived = (item for item in self.derived if item["state"] != "no rows")
        wanted = [*names, *(item["definition_name"] for item in derived)]
        return 0 if kept and kept.issuperset(wanted) else 1

    def as_json(self) -> dict[str, Any]:
        """Return everything."""
        from tasks.collect.sanitize import table

        return {
            "dump_dir": str(self.dump_dir),
            "dataset": str(self.dataset),
            "calls": len(self.log.calls),
            "unreadable": table(self.log.unreadable),
            "derived": self.derived,
            "definitions": [outcome.as_json() for outcome in self.outcomes],
        }

    def print(self, names: Sequence[str]) -> None:
        """Print a table of what got rows and, below it, what is to be noticed.

        Args:
            names: the definitions that were asked for; without them, those of a family that have no
                rows for the same reason share a line.
        """
        for item in self.derived:
            note = item.get("error") or "written, proved on CPU"
            typer.echo(f"derived: {item['definition_name']}: {note}")
        kept = [(o, o.collected) for o in self.outcomes if o.collected and o.collected.rows]
        if kept:
            print_table(f"Workloads in {self.dataset}", [_cells(*pair) for pair in kept])
        for outcome in self.outcomes:
            for warning in outcome.warnings:
                typer.secho(f"{outcome.name}: {warning}", fg="yellow")
        none = [outcome for outcome in self.outcomes if not outcome.kept]
        for line in map(_alone, none) if names else _together(none):
            typer.echo(line)
        for reason, count in self.log.unreadable.most_common(_SHOWN_REASONS):
            typer.echo(f"unreadable: {count} x {reason}")
        typer.echo(
            f"{len(self.log.calls)} calls; {sum(o.kept for o, _ in kept)} rows kept for "
            f"{len(kept)} of {len(self.outcomes)} definitions"
        )


def _cells(outcome: Outcome, collected: Collected) -> dict[str, str]:
    reason = _top(collected.rejected, 1)
    return {
        "definition": outcome.name,
        "calls": str(collected.calls),
        "distinct": str(collected.distinct),
        "kept": str(collected.rows),
        "new": str(outcome.added),
        "rejected": str(sum(collected.rejected.values())),
        "mostly because": reason if len(reason) < _WIDTH else f"{reason[:_WIDTH]}...",
    }


def _together(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Yield why there are no rows, of definitions of a family together where it is the same.

    A family's definitions differ in numbers, and calls are of one of them.
    """
    alike: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        why = _THEIRS.sub("the definitions have others", outcome.why_none())
        alike.setdefault((outcome.op_type, why), []).append(outcome)
    for (op_type, why), (first, *others) in alike.items():
        if others:
            yield f"{op_type}, {1 + len(others)} definitions: {why}"
        else:
            yield _alone(first)


def _alone(outcome: Outcome) -> str:
    return f"{outcome.name}: {outcome.why_none()}"


def _top(reasons: Mapping[str, int], count: int) -> str:
    return ", ".join(f"{n} x {reason}" for reason, n in list(reasons.items())[:count])


def _collect(
    log: CallLog,
    dataset: Path,
    names: Sequence[str],
    model: ModelKernels | None,
    max_workloads: int,
    *,
    replace: bool,
) -> list[Outcome]:
    from tasks.collect.targets import Target, targets

    outcomes = []
    for target in targets(dataset, names, {call.name for call in log.calls}, model):
        if isinstance(target, Target):
            outcome = _collect_for(target, log, dataset, max_workloads, model, replace=replace)
        else:
            outcome = Outcome(target.name, target.op_type, error=target.error)
        outcomes.append(outcome)
    return outcomes


def _collect_for(
    target: Target,
    log: CallLog,
    dataset: Path,
    max_workloads: int,
    model: ModelKernels | None,
    *,
    replace: bool,
) -> Outcome:
    from tasks.collect.rows import find
    from tasks.collect.sanitize import choose
    from tasks.collect.write import write_workloads

    name, op_type = target.form.name, target.form.op_type
    found = find(target.spec, target.form, log)
    chosen, collected = choose(target.spec, target.form, found, log, max_workloads)
    if model is not None and model.like(target.spec) is None:
        collected = _without_advice(collected, model.model.source)
    if not chosen:
        return Outcome(name, op_type, collected)
    try:
        written = write_workloads(dataset, target.definition, chosen, replace=replace)
    except OnboardError as error:
        return Outcome(name, op_type, error=str(error))
    return Outcome(
        name, op_type, collected.named(written.uuids), added=written.added, total=written.rows
    )


def _without_advice(collected: Collected, config: str) -> Collected:
    """Say of a config that was given and has no such kernel that it has none."""
    told = Counter[str]()
    for reason, count in collected.rejected.items():
        told[reason.replace(_ADVICE, f"{config} has no such kernel")] += count
    return dataclasses.replace(collected, rejected=dict(told))


def _derive(
    log: CallLog, dataset: Path, model: ModelKernels | None, slug: str
) -> list[dict[str, Any]]:
    """Write the definitions that calls imply and the dataset lacks; return what became of each.

    None is written that would have no rows: a plan that was never run implies no kernel.
    """
    from tasks.collect.sanitize import table
    from tasks.collect.targets import implied
    from tasks.define import phase
    from tasks.manifest import KernelEntry

    told, entries = [], []
    for item in implied(log.calls, dataset, model):
        spec = item.spec
        named = {"definition_name": spec.name, "op_type": spec.op_type}
        if item.rejected:
            reasons = _top(table(item.rejected), _SHOWN_REASONS)
            told.append({**named, "state": "no rows", "error": f"not written ({reasons})"})
        else:
            described = spec.model_dump(mode="json")
            entries.append(KernelEntry(**named, phase1_status="new", spec=described))
    if entries:
        with tempfile.TemporaryDirectory(prefix="onboard-derive-") as folder:
            drafts = Path(folder)
            for result in phase.draft_all(entries, slug, drafts):
                phase.stage(result, drafts, dataset, None)
                told.append(result.as_json())
    return told
