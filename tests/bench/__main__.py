"""`make bench`: what the hot paths cost, each beside a named baseline measured in the same run.

Prints seconds (the best of several) and ratios; asserts nothing.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks import ops
from tasks.collect.dumps import read_calls
from tasks.collect.sanitize import sanitize
from tasks.discover.inventory import required_kernels
from tasks.discover.sources import FlashInferIndex, SglangIndex, cached, index_flashinfer
from tasks.discover.sources import index_sglang as scan_sglang
from tasks.model import Serving, read_config
from tasks.ops.base import FlashInferApi
from tasks.repos import clone
from tasks.repos.sample import make_sample
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
        for folder in (sglang / "python" / "sglang" / "srt", flashinfer / "flashinfer"):
            subprocess.run(["grep", "-rn", name, str(folder)], capture_output=True, check=False)


def read_every_line(dumps: Path) -> None:
    """The floor of reading dumps: parse the last line of every metadata file."""
    for path in dumps.rglob("metadata.jsonl"):
        json.loads(path.read_text().splitlines()[-1])


def main() -> None:
    """Measure phase 1 and phase 3 on the sample's sources and dumps."""
    with tempfile.TemporaryDirectory(prefix="onboard-bench-") as folder:
        workspace, cache = Path(folder, "workspace"), Path(folder, "cache")
        make_sample(workspace, print)
        options = load_settings(workspace)
        trees = {}
        for name in ("sglang", "flashinfer"):
            url = getattr(options.remotes, name)
            trees[name] = clone.update(name, url, options.clone(name)).path
        kernels = specs("Qwen--Qwen3-30B-A3B")
        apis = [
            provider.path.rpartition(".")[2]
            for spec in kernels.values()
            if isinstance(provider := ops.op_module(spec.op_type).provider(spec), FlashInferApi)
        ]
        grep = best(lambda: grep_each(trees["sglang"], trees["flashinfer"], apis), 2)

        def index() -> None:
            cached(cache, FlashInferIndex, "0", lambda: index_flashinfer(trees["flashinfer"]))
            cached(cache, SglangIndex, "0", lambda: scan_sglang(trees["sglang"]))

        cold = best(index, 1)
        line("phase 1: both source indexes, cold", cold, "grep per kernel", grep)
        line("phase 1: both source indexes, warm", best(index), "grep per kernel", grep)

        models = [read_config(path) for path in sorted((DATA / "configs").glob("*.json"))]
        servings = [Serving(tp=tp, ep=1, origin="bench") for tp in (1, 2, 4, 8)]
        names = best(lambda: [required_kernels(model, servings) for model in models])
        line(f"phase 1: names, {len(models)} configs x 4 tp", names, "grep per kernel", grep)

        dumps = workspace / "dumps" / "qwen3-30b-a3b"
        floor = best(lambda: read_every_line(dumps))
        line("phase 3: read 212 dumped calls", best(lambda: read_calls(dumps)), "last lines", floor)
        decode = kernels["gqa_paged_decode_h32_kv4_d128_ps1"]
        log = read_calls(dumps)
        rows = best(lambda: sanitize(decode, definition_of(decode), log, 20))
        line("phase 3: 20 of 88 decode workloads", rows, "last lines", floor)


if __name__ == "__main__":
    main()
