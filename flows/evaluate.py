"""`onboard evaluate`: run the baselines of a dataset's definitions on this host's GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.command import AsJson, named, print_table, reported
from tasks.errors import CollectError, InputError

if TYPE_CHECKING:
    from tasks.collect.evaluate import Evaluation
    from tasks.dataset import DefinitionFiles

_LONGEST_CELL = 60


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(evaluate)


@reported
def evaluate(
    *,
    dataset: Annotated[Path, typer.Option(help="Folder of the dataset; traces are written to it.")],
    definitions: Annotated[
        list[str] | None,
        typer.Option(
            help="Definition names, comma-separated or repeated "
            "[default: all with workloads and a baseline].",
            show_default=False,
        ),
    ] = None,
    timeout: Annotated[
        int | None,
        typer.Option(
            help="Seconds for one workload [default: 300, sampling 3600].",
            min=1,
            show_default=False,
        ),
    ] = None,
    iterations: Annotated[
        int | None,
        typer.Option(
            help="Timed runs of a trial [default: 50, 3 where a reference is slow].",
            min=1,
            show_default=False,
        ),
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(
            help="Trials of a workload [default: 3, 1 where a reference is slow].",
            min=1,
            show_default=False,
        ),
    ] = None,
    keep_failed: Annotated[
        Path | None, typer.Option(help="Keep traces and logs of what fails in this folder.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Evaluate baselines with flashinfer-bench on this GPU; exit 1 unless every workload PASSED."""
    from tasks.collect import evaluate as evaluation
    from tasks.ops.base import Effort
    from tasks.settings import load_settings

    names = named(definitions, "--definitions")
    places = _chosen(dataset, names)
    why = evaluation.unavailable()
    if why:
        raise CollectError(f"nothing was evaluated: {why}")
    options = load_settings().collect
    asked = Effort(row_seconds=timeout, iterations=iterations, trials=trials)
    with evaluation.leased_gpu(options, _tell, dataset.name) as gpu:
        results = evaluation.evaluate_all(
            dataset,
            places,
            effort=evaluation.effort_of(options).under(asked),
            kept=keep_failed,
            gpu=gpu,
            say=_tell,
        )
    if as_json:
        shown = [result.as_json() for result in results]
        typer.echo(json.dumps(shown, indent=2, ensure_ascii=False))
    else:
        _print(results)
    return 0 if all(result.passed for result in results) else 1


def _tell(line: str) -> None:
    typer.echo(line, err=True)


def _chosen(dataset: Path, names: list[str]) -> list[DefinitionFiles]:
    """Return the definitions to evaluate, in the order of their names.

    Raises:
        InputError: there is no such dataset, it lacks one of them or its workloads, or nothing is
            left to evaluate.
    """
    from tasks.dataset import DefinitionFiles

    if not (dataset / "definitions").is_dir():
        raise InputError(f"{dataset}: has no definitions/ folder; it should be the dataset")
    files = (dataset / "definitions").glob("*/[!.]*.json")
    known = {path.stem: DefinitionFiles(path.parent.name, path.stem) for path in sorted(files)}
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise InputError(f"--definitions: {dataset} has no {', '.join(unknown)}")
    have_rows = {name for name, place in known.items() if (dataset / place.workloads).is_file()}
    without = sorted(set(names) - have_rows)
    if without:
        raise InputError(f"--definitions: {dataset} has no workloads of {', '.join(without)}")
    chosen = set(names) or {
        name for name in have_rows if any((dataset / known[name].solutions).glob("*.json"))
    }
    if not chosen:
        raise InputError(f"{dataset}: no definition has workloads and a baseline solution")
    return [place for name, place in sorted(known.items()) if name in chosen]


def _print(results: list[Evaluation]) -> None:
    rows = [
        {
            "definition": result.definition,
            "workloads": str(result.workloads),
            "passed": str(result.statuses.get("PASSED", 0)),
            "failed": _failed(result),
            "latency ms": f"{result.latency_ms:.4f}" if result.latency_ms is not None else "",
            "speedup": f"{result.speedup:.2f}" if result.speedup is not None else "",
            "first reason": _first_reason(result)[:_LONGEST_CELL],
        }
        for result in results
    ]
    print_table("Baselines", rows)
    for result in results:
        if not result.passed:
            typer.secho(f"{result.definition}: {result}", fg="red")
    devices = sorted({result.hardware for result in results if result.hardware})
    passed = sum(result.passed for result in results)
    on = f" on {', '.join(devices)}" if devices else ""
    typer.echo(f"Evaluated{on}: {passed} of {len(results)} definitions passed")


def _failed(result: Evaluation) -> str:
    return ", ".join(f"{n} {s}" for s, n in result.statuses.items() if s != "PASSED")


def _first_reason(result: Evaluation) -> str:
    if result.not_evaluated:
        return f"not evaluated: {result.not_evaluated}"
    return result.failures[0].reason if result.failures else ""
