"""The child process that drafts definitions: `python -m tasks.define.child REQUEST FOLDER`.

It is the only place that imports torch, FlashInfer and FlashInfer-Bench, once for all kernels.
Templates are called on meta tensors, so it needs no GPU and allocates nothing; references run in
forks of it that may do nothing but compute (`jail.py`). Each kernel's answer is a file of its own,
written as soon as it is known. Without the bench extra nothing can be proved.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from functools import reduce
from importlib.metadata import version
from multiprocessing import connection
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

from tasks import files, ops
from tasks.define import jail, proof
from tasks.define.check import check_definition
from tasks.define.draft import Draft, NeedsReferenceError, Order
from tasks.define.reference_test import render
from tasks.define.repair import finish, repair
from tasks.define.supplied import Supplied
from tasks.errors import DefinitionError
from tasks.ops.base import FlashInferApi, MetaTensor, OpModule, TemplateCall
from tasks.sandbox import die_with_parent

Json = dict[str, Any]
_NOBODY = "op type {!r}: nobody has written a reference, and no trace template is trusted"
_FORKED = multiprocessing.get_context("fork")
_MOST_FORKS = 4
"""Proofs of large kernels need some GB of memory each."""
_PACKAGES = ("flashinfer-python", "flashinfer-bench", "torch")


@dataclass(frozen=True)
class Bench:
    """The packages of the bench extra, imported, or why they cannot be had."""

    missing: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls) -> Bench:
        """Import them, without a network."""
        try:
            jail.deny_network()
            import flashinfer  # noqa: F401  for all forks, as the next one
            import flashinfer_bench.data  # noqa: F401
            import torch

            # As many forks as there are cores will share them, and what they load late.
            torch.set_num_threads(1)
            jail.warm_up()
        except Exception as error:  # FlashInfer runs device code at import on some hosts
            return cls(missing=f"{type(error).__name__}: {error}")
        return cls(versions={name: version(name) for name in _PACKAGES})


def _meta(value: Any) -> Any:
    import torch

    if isinstance(value, MetaTensor):
        return torch.empty(value.shape, dtype=getattr(torch, value.dtype), device="meta")
    if isinstance(value, tuple):
        return tuple(_meta(item) for item in value)
    return value


def call_template(call: TemplateCall) -> Json:
    """Call `api.fi_trace(...)` on meta tensors.

    Raises:
        DefinitionError: there is no such API or template, or it fails.
    """
    module, _, name = call.api.partition(":")
    try:
        api = reduce(getattr, name.split("."), importlib.import_module(module))
        answer = api.fi_trace(**{k: _meta(v) for k, v in call.arguments.items()})
    except Exception as error:  # a template is FlashInfer's code
        raise DefinitionError(f"template {call.api}: {type(error).__name__}: {error}") from error
    return dict(answer)


@dataclass(frozen=True)
class Drafting:
    """How the kernels of one request are drafted."""

    bench: Bench
    model_slug: str
    seconds: float | None
    """What one call of a reference may take; nothing is proved if not set."""

    def draft(self, order: Order) -> Draft:
        """Draft one definition: from a trace template, else from the op module.

        Raises:
            DefinitionError: it cannot be, or its reference is wrong.
            NeedsReferenceError: nobody has written one.
        """
        spec, module = order.spec, ops.family(order.spec.op_type)
        provider, own = module.provider(spec), module.definition(spec)
        notes: list[str] = []
        if order.supplied is not None:
            supplied = Supplied.parse(order.supplied, own, module.reference_test)
            return self._proved(order, supplied.body, "supplied", supplied.family, notes)
        call = module.template_call(spec) if order.has_template else None
        if call is not None:
            try:
                return self._harvested(order, call, own, module)
            except DefinitionError as error:
                notes.append(f"trace template not used: {error}")
        elif isinstance(provider, FlashInferApi):
            has = "no trace template is trusted for this kernel"
            notes.append(has if order.has_template else "FlashInfer has no trace template for it")
        if "reference" not in own:
            raise NeedsReferenceError(_NOBODY.format(spec.op_type))
        return self._proved(order, own, "op_module", module.reference_test, notes)

    def _harvested(self, order: Order, call: TemplateCall, own: Json, module: OpModule) -> Draft:
        if self.bench.missing:
            raise DefinitionError(self.bench.missing)
        body = repair(call_template(call), order.spec, own)
        return self._proved(order, body, "trace_template", module.reference_test, [])

    def _proved(
        self, order: Order, body: Json, method: str, family: str, notes: list[str]
    ) -> Draft:
        """Check a definition's form, render its test, and run the reference against it.

        Raises:
            DefinitionError: something does not hold.
        """
        module = ops.family(order.spec.op_type)
        definition = finish(body, order.spec, module.provider(order.spec), self.model_slug)
        check_definition(definition)
        test = render(order.spec, family)
        proved: list[str] = []
        if not self.bench.missing:
            from flashinfer_bench.data import Definition

            try:
                Definition.model_validate(definition)
            except ValueError as error:
                said = " | ".join(line.strip() for line in str(error).splitlines()[1:3])
                raise DefinitionError(f"flashinfer_bench.data.Definition: {said}") from error
        if self.seconds and self.bench.missing:
            raise DefinitionError(
                f"cannot be proved here ({self.bench.missing}); the extra `bench` has what it needs"
            )
        if self.seconds:
            limits = jail.Limits(seconds=self.seconds)
            if family == module.reference_test:
                proved = proof.prove(definition, test, limits)
            else:
                embedded = render(order.spec, family, embedded=definition)
                proved = proof.prove_supplied(embedded, limits)
        return Draft(
            definition=definition,
            method=method,
            notes=notes,
            test=test,
            proof=proved,
            versions=self.bench.versions,
        )


def _answer(drafting: Drafting, order: Order, path: Path) -> None:
    """Draft one kernel and write what came of it; its failure is its own answer."""
    die_with_parent()
    try:
        answer = drafting.draft(order).model_dump(mode="json")
    except NeedsReferenceError as error:
        answer = {"needs_reference": str(error)}
    except DefinitionError as error:
        answer = {"error": str(error)}
    except Exception as error:  # one kernel's is not the others'
        answer = {"error": f"unexpected {type(error).__name__}: {error}"}
    files.write_json(path, answer)


@dataclass(frozen=True)
class Fork:
    """A process that drafts one kernel."""

    process: ForkProcess
    answer: Path
    deadline: float

    def ended(self) -> bool:
        """Whether it has ended, or had to be ended; its answer is there then."""
        late = time.monotonic() > self.deadline
        if self.process.is_alive() and not late:
            return False
        self.process.kill()
        self.process.join()
        if not self.answer.exists():
            status = self.process.exitcode or 0
            how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"status {status}"
            error = "took too long" if late else f"its process ended ({how})"
            files.write_json(self.answer, {"error": f"drafting: {error}"})
        return True


def main(request_path: str, folder: str) -> None:
    """Draft every kernel of the request, each in a fork, a few at a time."""
    request = json.loads(Path(request_path).read_text())
    drafting = Drafting(Bench.load(), request["model_slug"], request["seconds"])
    waiting = [Order.model_validate(item) for item in reversed(request["orders"])]
    most = min(len(os.sched_getaffinity(0)), _MOST_FORKS)
    forks: list[Fork] = []
    while waiting or forks:
        while waiting and len(forks) < most:
            order = waiting.pop()
            answer = Path(folder, f"{order.spec.name}.json")
            process = _FORKED.Process(target=_answer, args=(drafting, order, answer))
            process.start()
            deadline = time.monotonic() + request["seconds_per_kernel"]
            forks.append(Fork(process, answer, deadline))
        connection.wait([fork.process.sentinel for fork in forks], timeout=1)
        forks = [fork for fork in forks if not fork.ended()]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
