"""What recording costs a server: `python -m tests.bench.serving --model-path DIR`, on a GPU.

The same traffic, in one run: nothing recorded, what this project records (plans), and what
FlashInfer-Bench's collect_workloads.py records for the same definitions (runs and plans). Prints
output tokens per second, ratios, and what was dumped; asserts nothing.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import NamedTuple

from tasks.collect.engine import read_served
from tasks.collect.live import installed_sglang
from tasks.collect.place import Place
from tasks.collect.plan import Wish, plan_sessions, read_arguments
from tasks.collect.serve import Host, SessionError, serve_session
from tasks.collect.session import Lengths, Session, Traffic
from tasks.discover.sources import index_sglang
from tasks.model import Serving, read_config
from tasks.ops.base import KernelSpec
from tasks.ops.gqa import GqaPaged, GqaRagged
from tasks.settings import CollectSettings

_WRAPPERS = ("BatchDecodeWithPagedKVCacheWrapper", "BatchPrefillWithRaggedKVCacheWrapper")


class Cost(NamedTuple):
    """One launch."""

    tokens_per_second: float
    dumped_mb: float
    calls: int


def serve(session: Session, model_path: Path, folder: Path) -> Cost:
    """Serve one variant."""
    options = CollectSettings(lease_dir=folder / "leases")
    model = read_config(model_path / "config.json")
    dumped, calls = 0.0, 0
    try:
        outcome = serve_session(session, model, folder, Host(options), lambda line: None)
        dumped, calls = outcome.drained_mb, sum(outcome.fired.values())
    except SessionError as error:
        if session.env.get("FLASHINFER_LOGLEVEL") != "0":  # recording nothing shows nothing
            raise error
    served = read_served(Place.of(folder, session).served)
    return Cost(served.output_tokens / served.seconds, dumped, calls)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-path", type=Path, required=True)
    parser.add_argument("--server-flag", action="append", default=[])
    parser.add_argument("--isl", type=int, default=1024)
    parser.add_argument("--osl", type=int, default=128)
    parser.add_argument("--batch-sizes", default="1,8,32")
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--no-runs", action="store_true", help="leave out what the script records")
    given = parser.parse_args()
    tree = installed_sglang(None)
    if tree is None:
        parser.error("SGLang is not installed")
    model = read_config(given.model_path / "config.json")
    serving = Serving(tp=1, ep=1, origin="bench", page_sizes=(1,))
    specs = [
        spec
        for module in (GqaPaged(), GqaRagged())
        for spec in module.required(model, serving)
        if isinstance(spec, KernelSpec) and "paged_prefill" not in spec.name
    ]
    traffic = Traffic(
        lengths=(Lengths(isl=given.isl, osl=given.osl),),
        batch_sizes=tuple(int(size) for size in given.batch_sizes.split(",")),
    )
    wish = Wish(str(given.model_path), traffic, read_arguments(given.server_flag))
    [plans] = plan_sessions(specs, model, wish, index_sglang(tree).flags).sessions
    script = tuple(f"{name}.{method}" for name in _WRAPPERS for method in ("plan", "run"))
    variants = {
        "off": plans.model_copy(update={"env": {"FLASHINFER_LOGLEVEL": "0"}}),
        "plans (ours)": plans,
        "runs and plans (the script's)": plans.model_copy(update={"record": script}),
    }
    if given.no_runs:
        variants.popitem()
    for turn in range(given.times):
        baseline = 0.0
        for name, session in variants.items():
            with tempfile.TemporaryDirectory(prefix="onboard-bench-") as folder:
                cost = serve(session, given.model_path, Path(folder))
            baseline = baseline or cost.tokens_per_second
            print(
                f"{turn + 1} {name:32} {cost.tokens_per_second:9.1f} tokens/s  "
                f"{cost.tokens_per_second / baseline:6.3f} x off  "
                f"{cost.calls:6} calls  {cost.dumped_mb:9.1f} MB dumped",
                flush=True,
            )


if __name__ == "__main__":
    main()
