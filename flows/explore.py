"""The commands that look and touch nothing of a run: sources, candidates, kernels, coverage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.command import AsJson, Workspace, integers, print_table, reported
from tasks.errors import InputError, OnboardError

if TYPE_CHECKING:
    from tasks.discover.phase import Inventory


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in (repos, discover, inventory, sources, coverage):
        app.command()(command)


@reported
def repos(workspace: Workspace = None, as_json: AsJson = False) -> int:
    """Clone or update the source repositories (phase 0) and say at which commits they are."""
    from concurrent.futures import ThreadPoolExecutor

    from tasks import settings
    from tasks.repos import clone

    options = settings.load_settings(workspace)
    remotes = options.remotes.model_dump()

    def update(name: str) -> dict[str, Any]:
        try:
            made = clone.update(name, remotes[name], options.clone(name))
        except OnboardError as error:
            return {"name": name, "path": str(options.clone(name)), "error": str(error)}
        return {
            "name": name,
            "path": str(made.path),
            "sha": made.sha,
            "moved": made.moved,
            "warning": made.warning,
        }

    with ThreadPoolExecutor(len(remotes)) as pool:
        found = list(pool.map(update, remotes))
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        print_table(
            f"Repositories in {options.workspace}",
            [
                {
                    "repository": item["name"],
                    "commit": item.get("sha", "-"),
                    "moved": "yes" if item.get("moved") else "no",
                    "note": item.get("error") or item.get("warning") or "",
                }
                for item in found
            ],
        )
    failed = [item["error"] for item in found if "error" in item]
    if failed:
        raise InputError(f"{len(failed)} of {len(found)} repositories failed: {failed[0]}")
    return 0


@reported
def discover(
    *,
    since: Annotated[str, typer.Option(help="How far back: 30d, 2w or a day.")] = "30d",
    offline: Annotated[bool, typer.Option("--offline", help="Do not ask the Hub.")] = False,
    show_all: Annotated[
        bool, typer.Option("--all", help="Also list what is tracked or excluded, and why.")
    ] = False,
    workspace: Workspace = None,
    as_json: AsJson = False,
) -> int:
    """List models to onboard next: new in SGLang, in the cookbook, or trending on the Hub."""
    from tasks import settings
    from tasks.discover import candidates

    options = settings.load_settings(workspace)
    found = candidates.discover(options, since, ask_hub=not offline)
    if as_json:
        shown = {**found.model_dump(mode="json"), "workspace": str(options.workspace)}
        typer.echo(json.dumps(shown, indent=2, ensure_ascii=False))
        return 0
    for warning in found.warnings:
        typer.echo(f"onboard: warning: {warning}", err=True)
    listed = [c for c in found.candidates if show_all or c.status in ("candidate", "needs_repo_id")]
    for candidate in listed:
        typer.echo(candidate.line())
    tracked = sum(c.status == "tracked" for c in found.candidates)
    excluded = ", ".join(f"{count} {reason}" for reason, count in found.excluded.items())
    typer.echo(
        f"{len(listed)} listed since {found.since}; {tracked} tracked already; "
        f"excluded: {excluded or 'none'}"
    )
    return 0


@reported
def inventory(
    *,
    model_name: Annotated[str | None, typer.Option(help="Model slug, e.g. qwen3-8b.")] = None,
    config: Annotated[Path | None, typer.Option(help="Use this config.json.")] = None,
    hf_repo_id: Annotated[str | None, typer.Option(help="Hugging Face repository id.")] = None,
    tp_list: Annotated[
        str | None, typer.Option(help="Attention TP sizes, e.g. 1,2 [default: the cookbook's].")
    ] = None,
    ep_list: Annotated[str | None, typer.Option(help="Expert-parallel sizes, e.g. 1,8.")] = None,
    page_sizes: Annotated[str, typer.Option(help="KV cache page sizes.")] = "1,64",
    sources: Annotated[
        Path | None,
        typer.Option(help="Folder with the FlashInfer and SGLang trees, to say who has a kernel."),
    ] = None,
    dataset: Annotated[
        Path | None, typer.Option(help="Clone or folder of the dataset, to say what is new.")
    ] = None,
    gpu_memory: Annotated[
        float | None, typer.Option(help="Memory of one GPU, in GB [default: 141].")
    ] = None,
    workspace: Workspace = None,
    as_json: AsJson = False,
) -> int:
    """List every kernel a model needs, and what FlashInfer, SGLang and the dataset have of it.

    Without --sources and --dataset only names and axes are printed.
    """
    from tasks import settings
    from tasks.discover.look import Question, look

    options = settings.load_settings(workspace)
    if gpu_memory is not None:
        options.gpu_memory_gb = gpu_memory
    question = Question(
        model_name=model_name,
        hf_repo_id=hf_repo_id,
        config=config,
        tps=None if tp_list is None else integers(tp_list, "--tp-list"),
        eps=None if ep_list is None else integers(ep_list, "--ep-list"),
        page_sizes=integers(page_sizes, "--page-sizes"),
        sources=sources,
        dataset=dataset,
    )
    answer = look(question, options)
    if as_json:
        found = answer.inventory.as_json(answer.model_slug, answer.hf_repo_id)
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        _print_inventory(answer.inventory, answer.model_slug)
    return 0


def _print_inventory(found: Inventory, name: str) -> None:
    typer.echo(f"{found.model.architecture}: {found.model.source}")
    for serving in found.servings:
        typer.echo(f"serving: tp={serving.tp} ep={serving.ep} ({serving.origin})")
    classified = any(k.phase1_status or k.fi_status for k in found.kernels)
    rows = []
    for kernel in found.kernels:
        spec = kernel.spec
        row = {"definition": spec.name}
        if classified:
            template = {True: "yes", False: "no", None: "-"}[kernel.fi_trace_template]
            row |= {
                "dataset": kernel.phase1_status or "-",
                "FlashInfer": (kernel.fi_status or "-").removeprefix("fi_"),
                "template": template,
                "SGLang": (kernel.sgl_status or "-").removeprefix("sgl_"),
                "why": kernel.evidence[-1] if kernel.evidence else "",
            }
        else:
            row |= {
                "op type": spec.op_type,
                "tp": ",".join(map(str, spec.tp)) or "any",
                "ep": ",".join(map(str, spec.ep)) or "any",
                "axes": ", ".join(f"{axis}={value}" for axis, value in spec.axes.items()),
            }
        rows.append(row)
    print_table(f"Kernels of {name}", rows)
    for item in found.unmapped:
        where = f" ({item.sglang_file})" if item.sglang_file else ""
        typer.echo(f"— {item.what}: {item.reason}{where}")
    for reject in found.rejected:
        typer.echo(f"rejected: {reject.what}: {reject.reason}")


@reported
def sources(
    *,
    api: Annotated[str | None, typer.Option(help="FlashInfer API: path, name or a part.")] = None,
    op_type: Annotated[
        str | None, typer.Option(help="Op type of the dataset or of FlashInfer's templates.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model class or model file in SGLang.")] = None,
    sources: Annotated[
        Path | None, typer.Option(help="Folder with both trees [default: the workspace].")
    ] = None,
    workspace: Workspace = None,
    as_json: AsJson = False,
) -> int:
    """Say where something lives: API, template, tests, call sites, model file, server flags."""
    from tasks import settings
    from tasks.discover.lookup import Lookup, render
    from tasks.discover.phase import read_sources
    from tasks.discover.trees import find_trees

    asked = [value for value in (api, op_type, model) if value is not None]
    if len(asked) != 1:
        raise InputError("give one of --api, --op-type and --model")
    options = settings.load_settings(workspace)
    trees = find_trees(sources or options.workspace)
    found = read_sources(trees.flashinfer, trees.sglang, trees.shas, options.workspace / ".cache")
    lookup = Lookup(found.flashinfer, found.sglang, found.shas)
    if api is not None:
        places = lookup.api(api)
    elif op_type is not None:
        places = lookup.op_type(op_type)
    else:
        places = lookup.model(asked[0])
    typer.echo(json.dumps(places.as_dict(), indent=2) if as_json else render(places))
    return 0


@reported
def coverage(
    *,
    model_name: Annotated[
        str | None, typer.Option(help="Model, by slug, heading or repository id.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; exit with 1 if something would.")
    ] = False,
    document: Annotated[
        Path | None, typer.Option("--doc", help="The document [default: the workspace's clone].")
    ] = None,
    dataset: Annotated[
        Path | None,
        typer.Option(help="Clone or folder of the dataset [default: the workspace's clone]."),
    ] = None,
    workspace: Workspace = None,
    as_json: AsJson = False,
) -> int:
    """Bring a model's part of the coverage document in line with the dataset.

    With --check and no model, the counts of the whole document are checked.
    """
    from tasks import settings
    from tasks.coverage_doc import PATH, CoverageDocument, unified_diff
    from tasks.discover.coverage import refreshed

    options = settings.load_settings(workspace)
    path = document or options.clone("flashinfer_bench") / PATH
    now = CoverageDocument.read(path)
    if model_name is None:
        if not check or dataset:
            raise InputError("--model-name: give the model to refresh, or --check alone")
        result, heading = now.check(), None
        diff, findings = result.diff, result.findings
    else:
        after, heading = refreshed(
            now, model_name, options.workspace, dataset or options.clone("flashinfer_trace")
        )
        diff, findings = unified_diff(now.render(), after.render()), after.findings(heading)
        if not check and diff:
            after.write(path)
    if as_json:
        shown = {
            "document": str(path),
            "model": heading,
            "changed": bool(diff),
            "diff": diff,
            "findings": [vars(finding) for finding in findings],
        }
        typer.echo(json.dumps(shown, indent=2, ensure_ascii=False))
    else:
        typer.echo(diff or f"{path}: nothing to change", nl=not diff)
        for finding in findings:
            typer.echo(f"note: {finding}")
    return 1 if check and diff else 0
