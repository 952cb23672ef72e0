"""`make bench`: what the hot paths cost, each beside a named baseline measured in the same run.

Prints seconds (the best of several) and ratios; asserts nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tasks import ops
from tasks.collect.dumps import read_calls
from tasks.collect.sanitize import sanitize
from tasks.define.agree import agree
from tasks.define.draft import Order, draft_definitions
from tasks.discover.inventory import requirements
from tasks.discover.phase import inventory, read_sources
from tasks.model import Serving, read_config
from tasks.ops.base import FlashInferApi
from tasks.repos import clone
from tasks.repos.sample import download, make_sample
from tasks.request import OnboardRequest
from tasks.settings import load_settings
from tests.conftest import DATA
from tests.unit.test_collect import definition_of
from tests.unit.test_ops import specs


def best(function: Callable[[], Any], times: int = 3) -> float:
    """Return the shortest of several runs, in seconds."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def line(what: str, seconds: float, baseline: str, reference: float) -> None:
    """Print one measurement beside its baseline."""
    ratio = seconds / reference
    print(f"{what:44} {seconds:8.3f} s   {ratio:9.4f} x {baseline} ({reference:.3f} s)")


def grep_each(sglang: Path, flashinfer: Path, names: list[str]) -> None:
    """The original procedure: grep both trees for every kernel's API by name."""
    for name in names:
        for folder in (sglang, flashinfer):
            subprocess.run(["grep", "-rn", name, str(folder)], capture_output=True, check=False)


def read_every_line(dumps: Path) -> None:
    """The floor of reading dumps: parse the last line of every metadata file."""
    for path in dumps.rglob("metadata.jsonl"):
        json.loads(path.read_text().splitlines()[-1])


NEWEST = {"flashinfer-python": "0.7.2.post1", "sglang": "0.5.23"}
"""Larger trees than the sample's: what the source indexes are measured on."""


def cpu(function: Callable[[], Any]) -> float:
    """Return the CPU seconds of one run."""
    start = time.process_time()
    function()
    return time.process_time() - start


def discovery(workspace: Path, cache: Path) -> None:
    """Measure phase 1: names, source indexes, a whole model."""
    kernels = specs("Qwen--Qwen3-30B-A3B")
    apis = [
        provider.path.rpartition(".")[2]
        for spec in kernels.values()
        if isinstance(provider := ops.op_module(spec.op_type).provider(spec), FlashInferApi)
    ]
    flashinfer, sglang = (download(package, version) for package, version in NEWEST.items())
    grep = best(lambda: grep_each(sglang / "sglang" / "srt", flashinfer / "flashinfer", apis), 2)
    baseline = f"{len(apis)} kernels' greps"

    shas = {"flashinfer": "0.7.2", "sglang": "0.5.23"}
    cold = cpu(lambda: read_sources(flashinfer, sglang, shas, cache))
    line("phase 1: index of 0.7.2 and 0.5.23, cold, CPU", cold, baseline, grep)
    warm = best(lambda: read_sources(flashinfer, sglang, shas, cache))
    line("phase 1: the same from the cache", warm, baseline, grep)

    configs = sorted((DATA / "configs").glob("*.json"))
    servings = [Serving(tp=tp, ep=1, origin="bench") for tp in (1, 2, 4, 8)]
    names = best(lambda: [requirements(read_config(path), servings) for path in configs])
    line(f"phase 1: names of {len(configs)} configs x 4 tp", names, baseline, grep)

    options = load_settings(workspace)
    remotes = options.remotes.model_dump()
    made = {name: clone.update(name, remotes[name], options.clone(name)) for name in clone.PHASE0}
    request = OnboardRequest(
        model_name="qwen3-30b-a3b",
        hf_repo_id="Qwen/Qwen3-30B-A3B",
        config=DATA / "configs" / "Qwen--Qwen3-30B-A3B.json",
        workspace=workspace,
    )
    clones = {name: checkout.path for name, checkout in made.items()}
    known = {name: checkout.sha for name, checkout in made.items()}
    whole = best(lambda: inventory(request, clones, known, cache, options))
    line("phase 1: all of one model, warm", whole, baseline, grep)


def definitions(drafts: Path) -> None:
    """Measure phase 2: all definitions of a model drafted and proved, and a dataset regenerated."""
    imports = [sys.executable, "-c", "import torch, flashinfer, flashinfer_bench.data"]
    alone = best(lambda: subprocess.run(imports, check=True, capture_output=True), 2)
    for config in (
        "Qwen--Qwen3-30B-A3B",
        "deepseek-ai--DeepSeek-V3.2",
        "MiniMaxAI--MiniMax-M1-80k",
    ):
        orders = [Order(spec=spec) for spec in specs(config, tp=8, ep=8).values()]
        whole = best(partial(draft_definitions, orders, "bench", drafts), 1)
        name = config.partition("--")[2]
        line(f"phase 2: {len(orders)} of {name}", whole, "its imports alone", alone)
    line("phase 2: 156 regenerated", best(lambda: agree(DATA / "mini-trace"), 1), "imports", alone)


def main() -> None:
    """Measure phases 1 to 3 on the sample's sources and dumps."""
    with tempfile.TemporaryDirectory(prefix="onboard-bench-") as folder:
        workspace, cache = Path(folder, "workspace"), Path(folder, "cache")
        make_sample(workspace, print)
        discovery(workspace, cache)
        definitions(Path(folder, "drafts"))
        kernels = specs("Qwen--Qwen3-30B-A3B")

        dumps = workspace / "dumps" / "qwen3-30b-a3b"
        floor = best(lambda: read_every_line(dumps))
        line("phase 3: read 212 dumped calls", best(lambda: read_calls(dumps)), "last lines", floor)
        decode = kernels["gqa_paged_decode_h32_kv4_d128_ps1"]
        log = read_calls(dumps)
        rows = best(lambda: sanitize(decode, definition_of(decode), log, 20))
        line("phase 3: 20 of 88 decode workloads", rows, "last lines", floor)


if __name__ == "__main__":
    main()
