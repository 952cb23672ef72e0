"""Server, database and workers go away in the middle of a run: nothing is lost or done twice."""

from __future__ import annotations

import time
from collections import Counter

import pytest

from tasks import manifest
from tasks.git import git
from tests.docker.database import why_not
from tests.docker.house import (
    DECODE,
    NORM,
    RAGGED,
    SECONDS,
    SLUG,
    House,
)
from tests.docker.served import until

pytestmark = [
    pytest.mark.docker,
    pytest.mark.bench_extra,
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
]

_OUTAGE_SECONDS = 30.0


@pytest.mark.timeout(1200)
def test_a_run_outlives_them(house: House) -> None:
    prefect, go_on = house.prefect, house.workspace / "go-on"
    house.settings(
        server_env={"FAKE_SGLANG_FAULT": "hold_after=2", "FAKE_SGLANG_ONCE": str(go_on)},
    )
    parent = house.onboard()
    sessions = house.workspace / "collected" / SLUG / "sessions"
    until("the first answers", lambda: list(sessions.glob("*/served.json")), SECONDS)
    (container,) = house.containers()

    house.database.stop()
    time.sleep(_OUTAGE_SECONDS)
    house.database.start()
    until("the database", lambda: prefect.api.get("/ready").is_success)

    prefect.server.kill()
    prefect.server.start()
    until("the server", lambda: prefect.api.get("/ready").is_success)

    # The container is the engine's, not the worker's.
    house.workers["gpu"].kill()
    house.workers["gpu"].start()
    # What the control worker started ends with it. Nobody says so; an operator does not wait until
    # heartbeats have stayed away for long enough.
    house.workers["control"].kill()
    house.workers["control"].start()
    prefect.retry(parent)

    assert house.containers() == [container]
    go_on.touch()
    state = prefect.wait(parent, "Completed", seconds=SECONDS, restarts=True)
    assert state["message"] == "14 existing, 3 published, 1 waiting"
    assert prefect.history(parent).count("Running") == 2
    (collection,) = house.runs("collect-workloads")
    assert (collection["state_name"], collection["run_count"]) == ("Completed", 1)
    kernels = {DECODE, RAGGED, NORM}
    named = Counter(run["name"].partition("/")[2] for run in house.runs("onboard-kernel"))
    assert named == dict.fromkeys((*kernels, "top_k_sampling_from_probs_v151936"), 1)
    path = manifest.latest(house.workspace, SLUG)
    assert path is not None
    found = manifest.load(path)
    published = git("log", "--format=%s", cwd=house.workspace / "outbox")
    for name in kernels:
        assert found.kernel(name).workload_entries
        assert published.count(f"Add {name}:") == 1
