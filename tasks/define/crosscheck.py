"""Compare our definitions with those FlashInfer dumped by itself in a serving run.

An automatic dump reads a template's const axes at fixed dimensions of whatever the caller passed,
and SGLang passes its KV pool without the page dimension: shapes come out wrong. What a call really
was, its own arguments say (the plan's, for wrappers). So each dumped definition is corrected by the
op module as those arguments say, repaired by the rules that hold for any template, and must then
have our axes, inputs, outputs and constraints.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from tasks import files, manifest, ops
from tasks.define.compare import differences
from tasks.define.repair import fi_api, finish, harvested
from tasks.define.repair.answer import read_answer
from tasks.errors import DefinitionError, InputError
from tasks.ops.base import Call, FlashInferApi, KernelSpec, OpModule

Json = dict[str, Any]


class Verdict(BaseModel):
    """What came of one dumped definition."""

    dumped: str
    """The file, below the folder of dumped definitions."""
    verdict: Literal["agrees", "disagrees", "not compared"]
    definition: str | None = None
    """Our definition of the kernel that was called."""
    corrected: list[str] = []
    """What the dumped definition had wrong and the call's own arguments put right."""
    reasons: list[str] = []
    """Where the two disagree, or why they were not compared."""

    def line(self) -> str:
        """Say it in one line."""
        ours = f" with {self.definition}" if self.definition else ""
        told = f"{self.dumped}: {self.verdict}{ours}"
        if self.corrected:
            told += f"; corrected: {', '.join(self.corrected)}"
        return told + "".join(f"; {reason}" for reason in self.reasons)


class Crosscheck(BaseModel):
    """What came of all of them."""

    agree: int
    disagree: int
    not_compared: int
    verdicts: list[Verdict]


def crosscheck(traces: Path, calls: Iterable[Call]) -> Crosscheck:
    """Compare every definition dumped below `traces` with ours.

    Args:
        traces: folder of FlashInfer's dumped definitions (FLASHINFER_TRACE_DUMP_DIR).
        calls: the same run's dumped calls.

    Raises:
        InputError: there is no definition in the folder.
    """
    paths = sorted(traces.rglob("*.json"))
    if not paths:
        raise InputError(f"{traces}: no dumped definitions (*.json) there")
    called = _called(calls)
    verdicts = [_verdict(path, path.relative_to(traces).as_posix(), called) for path in paths]
    counts = [
        sum(item.verdict == verdict for item in verdicts)
        for verdict in ("agrees", "disagrees", "not compared")
    ]
    return Crosscheck(
        agree=counts[0], disagree=counts[1], not_compared=counts[2], verdicts=verdicts
    )


def record(found: Crosscheck, run_manifest: Path) -> None:
    """Make every disagreement the failure of its kernel, where the run has that.

    Raises:
        ManifestError: the manifest is damaged.
    """
    known = {entry.definition_name for entry in manifest.load(run_manifest).kernels}
    for item in found.verdicts:
        if item.verdict == "disagrees" and item.definition in known:
            reasons = "; ".join(item.reasons)
            text = f"{item.definition}: disagrees with {item.dumped}, dumped on a GPU: {reasons}"
            manifest.record_error(run_manifest, str(item.definition), text)


def _called(calls: Iterable[Call]) -> dict[str, list[KernelSpec]]:
    """Return the kernels that were called, by the public path of their API."""
    found: dict[str, list[KernelSpec]] = {}
    for call in calls:
        for module in ops.registry().values():
            spec = module.implied(call)
            if spec is None or not module.crosschecked:
                continue
            provider = module.provider(spec)
            if isinstance(provider, FlashInferApi):
                known = found.setdefault(provider.path, [])
                if spec not in known:
                    known.append(spec)
    return found


def _verdict(path: Path, shown: str, called: dict[str, list[KernelSpec]]) -> Verdict:
    try:
        dumped = files.read_json_object(path, "the dumped definition")
        api = fi_api(dumped)
    except (InputError, DefinitionError) as error:
        return Verdict(dumped=shown, verdict="not compared", reasons=[str(error)])
    if not any(api == known.path for module in ops.registry().values() for known in module.apis):
        reason = f"no op module has the API {api}"
        return Verdict(dumped=shown, verdict="not compared", reasons=[reason])
    specs = called.get(api, [])
    if not specs:
        reason = f"no call of {api} is among the dumps"
        return Verdict(dumped=shown, verdict="not compared", reasons=[reason])
    verdicts = [_compared(shown, dumped, spec) for spec in specs]
    # One process dumps a definition once per name: it may stand for any of the calls.
    return min(verdicts, key=lambda item: (item.verdict != "agrees", len(item.reasons)))


def _compared(shown: str, dumped: Json, spec: KernelSpec) -> Verdict:
    module: OpModule = ops.op_module(spec.op_type)
    own = module.definition(spec)
    corrected: tuple[str, ...] = ()
    try:
        read_answer(dumped)  # its form is checked before anything else reads it
        theirs, corrected = module.as_called(dumped, spec)
        # Helpers that an older FlashInfer left out of the reference change nothing here.
        repaired = harvested(theirs).definition
    except DefinitionError as error:
        return Verdict(
            dumped=shown, verdict="disagrees", definition=spec.name, reasons=[str(error)]
        )
    ours = finish(own, spec, module.provider(spec), "crosscheck")
    reasons = [
        f"{field}: ours {mine}, dumped {other}"
        for field, mine, other in differences(ours, repaired)
    ]
    return Verdict(
        dumped=shown,
        verdict="disagrees" if reasons else "agrees",
        definition=spec.name,
        corrected=list(corrected),
        reasons=reasons,
    )
