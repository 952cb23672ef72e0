"""The scheduled flows on a server with a control worker; what they start is parked, not run."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import asyncpg
import psutil
import pytest
import tomli_w

from tasks import files, git, manifest
from tasks.discover.candidates import MODELS
from tasks.discover.cookbook import FOLDER
from tests.conftest import DATA, listening
from tests.docker.database import Database, database, why_not
from tests.docker.served import Prefect, Service, prefect_server, until
from tests.unit.test_candidates import NOW, Repository, family, model

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
]

ROOT = Path(__file__).resolve().parents[2]
BRAND, OTHER, TRENDY = "acme/Brand-New-8B", "acme/Other-7B", "acme/Trendy-7B"
_LONG_AGO = 60.0


@dataclass
class Hub:
    """What the Hub's stand-in lists; it hangs up on everyone while it is down."""

    listed: list[tuple[str, str]]
    down: bool = False


@dataclass(frozen=True)
class Office:
    """A server and a control worker, a workspace, and the remotes that it follows."""

    prefect: Prefect
    database: Database
    worker: Service
    workspace: Path
    sglang: Repository
    hub: Hub

    def runs(self, flow: str) -> list[dict[str, Any]]:
        """Return the runs of a flow."""
        asked = {"flows": {"name": {"any_": [flow]}}}
        found: list[dict[str, Any]] = self.prefect.post("/flow_runs/filter", asked)
        return found

    def onboarded(self) -> dict[str, list[str]]:
        """Return repository -> ids of the `onboard-model` runs that there are for it."""
        found: dict[str, list[str]] = {}
        for run in self.runs("onboard-model"):
            found.setdefault(run["parameters"]["request"]["hf_repo_id"], []).append(run["id"])
        return found

    def run(self, flow: str) -> str:
        """Create a run of a scheduled flow, with the parameters of its schedule: none."""
        return self.prefect.run(self.prefect.deployment(flow))

    def end(self, run: str, kind: str) -> None:
        """Have a parked run end."""
        self.prefect.post(f"/flow_runs/{run}/set_state", {"state": {"type": kind}, "force": True})

    def logged(self, run: str, line: str) -> None:
        """Wait until a run has logged something: the server has it a moment later."""
        until(line, lambda: line in self.prefect.log(run))

    def shown(self, run: str) -> str:
        """Return the artifact of a night."""
        asked = {"artifacts": {"flow_run_id": {"any_": [run]}}}
        (found,) = self.prefect.post("/artifacts/filter", asked)
        assert (found["key"], found["type"]) == ("nightly-candidates", "markdown")
        return str(found["data"])

    def links(self, run: str) -> dict[str, str]:
        """Return repository -> run, as a night's artifact links them."""
        row = re.compile(r"^\| \S+ \| (\S+) \|.*\]\(/runs/flow-run/(\S+)\) \|$", re.MULTILINE)
        return dict(row.findall(self.shown(run)))

    def kill(self, run: str) -> None:
        """Kill the process of a run, as the kernel does where memory runs out."""
        for process in psutil.Process(self.worker.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if process.environ().get("PREFECT__FLOW_RUN_ID") == run:
                    process.kill()

    @contextmanager
    def held(self, repo_id: str) -> Iterator[None]:
        """Have the server answer no start of a model while the block runs."""
        self._sql(f"INSERT INTO held VALUES ('{repo_id}@%')")
        try:
            yield
        finally:
            self._sql("DELETE FROM held")

    def prepare(self) -> None:
        """Park the models, leave crashed runs to the test, and make what `held` needs."""
        for automation in self.prefect.post("/automations/filter", {}):
            self.prefect.api.delete(f"/automations/{automation['id']}").raise_for_status()
        queue = {"name": "parked", "is_paused": True}
        self.prefect.post("/work_pools/control/queues", queue)
        path = f"/deployments/{self.prefect.deployment('onboard-model')}"
        self.prefect.api.patch(path, json={"work_queue_name": "parked"}).raise_for_status()
        self._sql("""
            CREATE TABLE held (key text);
            CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                WHILE EXISTS (SELECT FROM held WHERE NEW.idempotency_key LIKE key) LOOP
                    PERFORM pg_sleep(0.1);
                END LOOP;
                RETURN NEW;
            END $$;
            CREATE TRIGGER hold BEFORE INSERT ON flow_run FOR EACH ROW EXECUTE FUNCTION hold();
        """)

    def _sql(self, text: str) -> None:
        async def execute() -> None:
            connection = await asyncpg.connect(self.database.url.replace("+asyncpg", ""))
            try:
                await connection.execute(text)
            finally:
                await connection.close()

        asyncio.run(execute())


def publish(repository: Repository) -> None:
    """Commit what was written, now."""
    repository.commit((NOW - dt.datetime.now(dt.UTC)) / dt.timedelta(days=1))


@contextmanager
def hub_at(hub: Hub) -> Iterator[str]:
    """Serve the stand-in; yield its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            listed = [
                {"id": name, "config": {"architectures": [architecture]}}
                for name, architecture in hub.listed
                if "search=" not in self.path
            ]
            body = json.dumps(listed).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_HEAD(self) -> None:
            if not hub.down:
                self.send_response(200)
                self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with listening(Handler) as url:
        yield url


def make_remotes(folder: Path) -> dict[str, Repository]:
    """Make the sources: two models are new in SGLang and the cookbook, some are not to be used."""
    names = ("sglang", "flashinfer", "sgl_cookbook", "flashinfer_trace", "flashinfer_bench")
    made = {name: Repository(folder / name) for name in names}
    made["sglang"].write(f"{MODELS}/qwen3.py", model("Qwen3ForCausalLM"))
    made["sgl_cookbook"].write(f"{FOLDER}/v1/known.yaml", family("acme/Known-1"))
    document = DATA / "flashinfer-bench" / "docs" / "model_coverage.mdx"
    made["flashinfer_bench"].write("docs/model_coverage.mdx", document.read_bytes())
    for repository in made.values():
        repository.write("README.md", "A source.\n")
        repository.commit(_LONG_AGO)
    made["sglang"].write(f"{MODELS}/brand_new.py", model("BrandNewForCausalLM"))
    made["sglang"].write(f"{MODELS}/nameless.py", model("NamelessForCausalLM"))
    new = (BRAND, OTHER, "org-b/Other-7B", "Qwen/Qwen3-14B", "../../Escape-7B", "acme/ünï-7B")
    made["sgl_cookbook"].write(f"{FOLDER}/v1/new.yaml", family(*new))
    for name in ("sglang", "sgl_cookbook"):
        publish(made[name])
    return made


@pytest.fixture(scope="module")
def office(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Office]:
    folder = tmp_path_factory.mktemp("office")
    (folder / "secrets").mkdir()
    remotes = make_remotes(folder / "remotes")
    workspace = folder / "workspace"
    hostile = ("../../x", "acme/with space-7B", "acme/\N{SNOWMAN}-7B")
    hub = Hub([(name, "Qwen3ForCausalLM") for name in (*hostile, TRENDY)])
    with ExitStack() as stack:
        settings = {
            "remotes": {name: str(repository.path) for name, repository in remotes.items()},
            "hf_endpoint": stack.enter_context(hub_at(hub)),
        }
        files.write_text(workspace / "onboard.toml", tomli_w.dumps(settings))
        kept = stack.enter_context(database())
        prefect = stack.enter_context(prefect_server(folder, kept.url))
        shutil.copy(prefect.client_profile, folder / "secrets" / "client.toml")
        deploy = (str(ROOT / "deployments" / "bootstrap.py"), "--home", str(folder))
        subprocess.run(
            [sys.executable, *deploy, f"--control-variable=working_dir={ROOT}"],
            env=prefect.environment(PYTHONPATH=str(ROOT)),
            check=True,
            stdout=subprocess.DEVNULL,
        )
        worker = stack.enter_context(
            prefect.worker(
                "control",
                "process",
                PYTHONPATH=str(ROOT),
                ONBOARD_WORKSPACE=str(workspace),
                PREFECT_RESULTS_LOCAL_STORAGE_PATH=str(folder / "results"),
            )
        )
        made = Office(prefect, kept, worker, workspace, remotes["sglang"], hub)
        made.prepare()
        yield made


def test_an_interrupted_night_starts_every_model_once(office: Office) -> None:
    prefect = office.prefect
    with office.held(OTHER):
        night = office.run("discover-nightly")
        until("the first model", office.onboarded)
        # One that comes too early gives way...
        second = office.run("discover-nightly")
        assert "concurrency limit" in prefect.wait(second, "Cancelled")["message"].lower()
        assert list(office.onboarded()) == [BRAND]
        office.kill(night)
        # What the worker has to say of it last.
        office.logged(night, "exceeded its memory allocation")
    # ... and one that ended between two starts does the rest.
    prefect.retry(night)
    state = prefect.wait(night, "Completed", restarts=True)
    assert state["message"] == "3 models are being onboarded, 1 are left"
    runs = {name: run for name, (run,) in office.onboarded().items()}
    assert list(office.links(night).items()) == [(n, runs[n]) for n in (BRAND, OTHER, TRENDY)]
    for run in office.runs("onboard-model"):
        slug = run["parameters"]["request"]["model_name"]
        assert {"nightly", f"model:{slug}"} <= set(run["tags"])
        assert run["idempotency_key"].endswith(f"@{git.short_sha(office.sglang.path)}")
    # What is not onboarded says why.
    for row in (
        r"NamelessForCausalLM .* new model file in SGLang; nobody knows its repository",
        r"org-b/Other-7B .* variant of another: acme/Other-7B",
        r"Qwen/Qwen3-14B .* section 'Qwen3 14B' of docs/model_coverage.mdx",
        r"not a repository id: model_path \.\./\.\./Escape-7B",
        r"not a repository id: model_path acme/ünï-7B",
    ):
        assert re.search(row, office.shown(night)), row


def waiting(office: Office, slug: str, date: str, **fields: Any) -> None:
    """Write the manifest of a model that waits for SGLang."""
    entry = {
        "definition_name": "rmsnorm_h4096",
        "op_type": "rmsnorm",
        "phase1_status": "new",
        "fi_status": "fi_supported",
        "sgl_status": "sgl_missing",
        "sglang_pr_url": "https://github.com/sgl-project/sglang/pull/1",
    }
    run = {"model_slug": slug, "hf_repo_id": f"acme/{slug}", "date": date, "kernels": [entry]}
    path = office.workspace / f"onboard_{slug}_{date.replace('-', '')}.json"
    files.write_json(path, {**run, **fields})
    assert manifest.load(path)


def test_later_nights_and_what_waits(office: Office) -> None:
    """The nights go on as the models do, beside the watch over what waits for upstream."""
    prefect = office.prefect
    (brand,), (other,), (trendy,) = (office.onboarded()[name] for name in (BRAND, OTHER, TRENDY))
    now = {name: git.short_sha(office.workspace / name) for name in ("sglang", "flashinfer")}
    old = {**now, "sglang": "0000000"}
    waiting(office, "waits", "2026-11-01", repo_shas=now)
    waiting(office, "waits", "2026-11-02", repo_shas=old)
    waiting(office, "went-on", "2026-11-01", repo_shas=old)
    waiting(office, "went-on", "2026-11-02", repo_shas=old, kernels=[])
    waiting(office, "unchanged", "2026-11-01", repo_shas=now)
    waiting(office, "by-hand", "2026-11-01", repo_shas=old, hf_repo_id=None)
    waiting(office, "odd", "2026-11-01", repo_shas=old, hf_repo_id="../../odd")
    files.write_text(office.workspace / "onboard_damaged_20261101.json", "{")

    # The same night, without the Hub: what was started is found, whatever became of it.
    office.hub.down = True
    office.end(brand, "FAILED")
    night, watch = office.run("discover-nightly"), office.run("watch-upstream")
    assert prefect.wait(watch, "Completed")["message"] == "1 models go on, 3 wait"
    for line in (
        "onboard_damaged_20261101.json: the manifest is not JSON",
        "unchanged: neither SGLang nor FlashInfer has changed",
        "by-hand: its config is not on the Hub",
        "odd: --hf-repo-id: '../../odd' is not a Hugging Face repository id",
    ):
        office.logged(watch, line)
    prefect.wait(night, "Completed")
    assert office.links(night) == {BRAND: brand, OTHER: other}
    warning = "the Hugging Face Hub was not asked"
    office.logged(night, warning)
    assert warning in office.shown(night)
    before = office.onboarded()
    (waits,) = before.pop("acme/waits")
    assert before == {BRAND: [brand], OTHER: [other], TRENDY: [trendy]}
    started = prefect.api.get(f"/flow_runs/{waits}").json()
    assert {"upstream", "model:waits"} <= set(started["tags"])
    assert started["idempotency_key"] == "acme/waits@{sglang}-{flashinfer}".format(**now)

    # SGLang goes on. A model with a manifest is tracked, one whose run failed before it had one
    # is tried again; nothing is started for one whose run has not ended.
    office.hub.down = False
    waiting(office, "brand-new-8b", "2026-11-01", hf_repo_id=BRAND, repo_shas=now)
    waiting(office, "brand-new-8b", "2026-11-02", hf_repo_id=BRAND, repo_shas=now, kernels=[])
    office.end(other, "FAILED")
    office.sglang.write("README.md", "Changed.\n")
    publish(office.sglang)
    watch, night = office.run("watch-upstream"), office.run("discover-nightly")
    assert prefect.wait(watch, "Completed")["message"] == "2 models go on, 2 wait"
    prefect.wait(night, "Completed")
    after = office.onboarded()
    again = (set(after.pop(OTHER)) - {other}).pop()
    assert office.links(night) == {OTHER: again, TRENDY: trendy}
    tracked = rf"{BRAND} .* run manifest onboard_brand-new-8b_20261102.json"
    assert re.search(tracked, office.shown(night))
    assert len(after.pop("acme/unchanged")) == 1
    assert after == {BRAND: [brand], TRENDY: [trendy], "acme/waits": [waits]}
