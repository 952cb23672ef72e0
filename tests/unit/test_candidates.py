"""Candidates, from real git repositories with known histories."""

from __future__ import annotations

import datetime as dt
import json
import os
import shutil
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from tasks.discover.candidates import (
    MODELS,
    Candidate,
    Discovery,
    discover,
    exclusion,
)
from tasks.discover.cookbook import FOLDER
from tasks.discover.history import open_window, parse_since
from tasks.discover.syntax import entry_classes, parse
from tasks.errors import InputError
from tasks.git import AUTHOR, git
from tasks.settings import Settings
from tests.conftest import DATA, listening

NOW = dt.datetime(2026, 11, 20, tzinfo=dt.UTC)


def days_ago(days: float) -> str:
    return (NOW - dt.timedelta(days=days)).isoformat()


class Repository:
    """A repository whose commits have given ages."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True)
        git("init", "--quiet", "--initial-branch=main", cwd=path)

    def write(self, name: str | bytes, content: str | bytes) -> None:
        path = self.path / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    def commit(self, age: float, *args: str) -> None:
        date = days_ago(age)
        env = {**AUTHOR, "GIT_AUTHOR_DATE": date, "GIT_COMMITTER_DATE": date}
        git("add", "--all", cwd=self.path)
        git(*(args or ("commit", "--quiet", "-m", "some\nlines")), cwd=self.path, env=env)


def model(*classes: str) -> str:
    bodies = "".join(f"class {name}:\n    layers = {len(name)}\n\n\n" for name in classes)
    entries = classes[0] if len(classes) == 1 else f"[{', '.join(classes)}]"
    return f"import torch\n\n\n{bodies}EntryClass = {entries}\n"


def family(*paths: str, tp: int = 1) -> str:
    engine = f"{{configurations: [{{engine: {{tp: {tp}}}}}]}}"
    models = ", ".join(f"{{model_path: {path}, hardware: {{H200: {engine}}}}}" for path in paths)
    return f"families: [{{models: [{models}]}}]\n"


@pytest.fixture
def sglang(tmp_path: Path) -> Repository:
    repository = Repository(tmp_path / "sglang")
    for name, classes in {
        "qwen3.py": ["Qwen3ForCausalLM"],
        "old_name.py": ["RenamedForCausalLM"],
        "registry.py": [],
    }.items():
        text = model(*classes) if classes else "import os\n"
        repository.write(f"{MODELS}/{name}", text + "".join(f"# {i} {name}\n" for i in range(30)))
    repository.commit(60)
    return repository


@pytest.fixture
def cookbook(tmp_path: Path) -> Repository:
    repository = Repository(tmp_path / "sgl-cookbook")
    repository.write(f"{FOLDER}/v1/known.yaml", family("acme/Known-1", "acme/Known-2"))
    repository.write(f"{FOLDER}/v1/broken.yaml", "a: [")
    repository.commit(60)
    return repository


@pytest.fixture
def bench(tmp_path: Path) -> Repository:
    repository = Repository(tmp_path / "flashinfer-bench")
    text = (DATA / "flashinfer-bench" / "docs" / "model_coverage.mdx").read_bytes()
    repository.write("docs/model_coverage.mdx", text)
    repository.commit(60)
    return repository


def run(folder: Path, since: str = "30d") -> Discovery:
    found = discover(Settings(workspace=folder), since, now=NOW, ask_hub=False)
    assert Discovery.model_validate_json(found.model_dump_json()) == found
    return found


def by_name(found: Discovery) -> dict[str, Candidate]:
    return {c.hf_repo_id or c.architecture or c.model_file or "?": c for c in found.candidates}


@pytest.mark.parametrize(
    ("text", "day"), [("30d", "2026-10-21"), ("2w", "2026-11-06"), ("2026-10-01", "2026-10-01")]
)
def test_since(text: str, day: str) -> None:
    assert f"{parse_since(text, NOW):%Y-%m-%d}" == day


@pytest.mark.parametrize(
    "text",
    ["", "30", "d", "-3d", "0d", "3 d", "3m", "2026-13-01", "2026-02-30", "2027-01-01", "٣d"],
)
def test_wrong_since(text: str) -> None:
    with pytest.raises(InputError, match="--since"):
        parse_since(text, NOW)


@pytest.mark.parametrize(
    ("source", "classes"),
    [
        (b"EntryClass = A\n", ["A"]),
        (b"EntryClass = [A, B]\n", ["A", "B"]),
        (b"EntryClass: list = (A, B)\n", ["A", "B"]),
        (b"\xef\xbb\xbfif True:\n    EntryClass = A\n", ["A"]),
        (b"def f():\n    EntryClass = A\n", []),
        (b"EntryClass\n", []),
        (b"class (", None),
        (b"\x00", None),
    ],
)
def test_entry_classes(source: bytes, classes: list[str] | None) -> None:
    tree = parse(source)
    assert (None if tree is None else list(entry_classes(tree))) == classes


@pytest.mark.parametrize(
    ("stem", "architecture", "reason"),
    [
        ("qwen3_next_mtp", "Qwen3NextForCausalLMMTP", "draft model"),
        ("deepseek_nextn", "DeepseekV3ForCausalLMNextN", "draft model"),
        ("gemma4_mtp", "Gemma4AssistantForCausalLM", "draft model"),
        ("kimi_k25_eagle3", "Eagle3DeepseekV2ForCausalLM", "draft model"),
        ("qwen2_rm", "Qwen2ForRewardModel", "reward model"),
        ("llama_classification", "LlamaForClassification", "classification model"),
        ("qwen3_embedding", "Qwen3Model", "embedding model"),
        ("pixtral", "PixtralVisionModel", "vision or audio part"),
        ("chatglm", "ChatGLMModel", None),
        ("internvl", "InternVLChatModel", None),
        ("gpt2", "GPT2LMHeadModel", None),
        ("sarashina2_vision", "Sarashina2VisionForCausalLM", None),
        ("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration", None),
    ],
)
def test_exclusion(stem: str, architecture: str, reason: str | None) -> None:
    assert exclusion(stem, architecture) == reason


def test_new_model_files(sglang: Repository, cookbook: Repository, bench: Repository) -> None:
    sglang.write(f"{MODELS}/brand_new.py", model("BrandNewForCausalLM"))
    sglang.write(f"{MODELS}/brand_new_nextn.py", model("BrandNewForCausalLMNextN"))
    sglang.write(f"{MODELS}/helper.py", "import os\n")
    sglang.write(f"{MODELS}/broken.py", "class (")
    sglang.write(f"{MODELS}/common/inside.py", model("InsideForCausalLM"))
    git("mv", f"{MODELS}/old_name.py", f"{MODELS}/new_name.py", cwd=sglang.path)
    shutil.copy(sglang.path / MODELS / "qwen3.py", sglang.path / MODELS / "qwen3_copy.py")
    (sglang.path / MODELS / "link.py").symlink_to("qwen3.py")
    sglang.commit(5)
    sglang.write(f"{MODELS}/short_lived.py", model("ShortLivedForCausalLM"))
    sglang.commit(4)
    (sglang.path / MODELS / "short_lived.py").unlink()
    sglang.commit(3)
    found = run(sglang.path.parent)
    assert {name: (c.status, c.reason) for name, c in by_name(found).items()} == {
        "BrandNewForCausalLM": ("needs_repo_id", "new model file in SGLang"),
        "BrandNewForCausalLMNextN": ("excluded", "draft model"),
        "Qwen3ForCausalLM": ("excluded", f"not new: registered by {MODELS}/qwen3.py before"),
        f"{MODELS}/broken.py": ("excluded", "unreadable: not Python 3"),
        f"{MODELS}/helper.py": ("excluded", "helper module: registers no model"),
        f"{MODELS}/link.py": ("excluded", "not a regular file"),
    }
    assert found.excluded["draft model"] == 1
    assert found.candidates[0].date == "2026-11-15"
    assert found.candidates[0].commit == git("rev-parse", "HEAD~2", cwd=sglang.path)
    assert run(sglang.path.parent, "4d").candidates == []
    assert found.warnings == []


def test_a_renamed_and_rewritten_file_is_not_new(
    sglang: Repository, cookbook: Repository, bench: Repository
) -> None:
    (sglang.path / MODELS / "old_name.py").unlink()
    sglang.write(f"{MODELS}/rewritten.py", model("RenamedForCausalLM") + "# other\n" * 200)
    sglang.commit(1)
    (only,) = run(sglang.path.parent).candidates
    assert (only.status, only.reason) == (
        "excluded",
        f"not new: registered by {MODELS}/old_name.py before",
    )


def test_a_merged_branch_is_as_new_as_its_merge(
    sglang: Repository, cookbook: Repository, bench: Repository
) -> None:
    git("checkout", "--quiet", "-b", "branch", cwd=sglang.path)
    sglang.write(f"{MODELS}/merged.py", model("MergedForCausalLM"))
    sglang.commit(50)
    git("checkout", "--quiet", "main", cwd=sglang.path)
    sglang.write("README", "x")
    sglang.commit(40)
    sglang.commit(2, "merge", "--quiet", "--no-ff", "-m", "merge", "branch")
    (only,) = run(sglang.path.parent).candidates
    assert (only.architecture, only.date) == ("MergedForCausalLM", "2026-11-18")
    assert only.commit == git("rev-parse", "HEAD", cwd=sglang.path)


def test_hostile_file_names(sglang: Repository, cookbook: Repository, bench: Repository) -> None:
    names = [b"-rf.py", b'a\n"quoted".py', b"\xff\xfe.py", b"\x01abc 2026.py", b"\n:0 0 0 0 A.py"]
    for number, name in enumerate(names):
        sglang.write(MODELS.encode() + b"/" + name, model(f"Odd{number}ForCausalLM"))
    sglang.commit(1)
    found = run(sglang.path.parent)
    assert {c.architecture for c in found.candidates} == {f"Odd{n}ForCausalLM" for n in range(5)}
    assert {c.date for c in found.candidates} == {"2026-11-19"}
    assert all(c.line().isprintable() for c in found.candidates)


def test_new_and_changed_cookbook_entries(
    sglang: Repository, cookbook: Repository, bench: Repository
) -> None:
    cookbook.write(f"{FOLDER}/v1/known.yaml", family("acme/Known-1") + "# a comment\n")
    cookbook.write(f"{FOLDER}/v2/known.yaml", family("acme/Known-2", tp=8))
    cookbook.write(f"{FOLDER}/v2/new.yaml", family("acme/New-8B", "acme/New-8B-Instruct-FP8"))
    cookbook.write(f"{FOLDER}/v2/tracked.yaml", family("Qwen/Qwen3-14B-FP8", "acme/Ours-1"))
    cookbook.write(f"{FOLDER}/v2/bad.yaml", "a: [")
    cookbook.write(f"{FOLDER}/v2/odd.yaml", family("[1, 2]"))
    image = "families: [{models: [{model_path: acme/Image, attributes: {diffusion: {x: 1}}}]}]"
    cookbook.write(f"{FOLDER}/v2/image.yaml", image)
    cookbook.commit(7)
    manifest = {"model_slug": "ours-1", "hf_repo_id": None, "date": "2026-11-01", "kernels": []}
    workspace = sglang.path.parent
    (workspace / "onboard_ours-1_20261101.json").write_text(json.dumps(manifest))
    (workspace / "onboard_bad_20261101.json").write_text("{")
    found = run(workspace)
    assert [(c.status, c.hf_repo_id, c.reason.split(" (")[0]) for c in found.candidates] == [
        ("candidate", "acme/New-8B", "new entry in sgl-cookbook"),
        ("candidate", "acme/Known-2", "changed entry in sgl-cookbook"),
        ("tracked", "Qwen/Qwen3-14B-FP8", "section 'Qwen3 14B' of docs/model_coverage.mdx"),
        ("tracked", "acme/Ours-1", "run manifest onboard_ours-1_20261101.json"),
        ("excluded", "acme/Image", "diffusion model"),
        ("excluded", "acme/New-8B-Instruct-FP8", "variant of another: acme/New-8B"),
        ("excluded", None, f"unreadable: {FOLDER}/v2/bad.yaml: not a readable YAML file"),
        ("excluded", None, "not a repository id: model_path [1, 2]"),
    ]
    assert len(found.warnings) == 1
    assert "onboard_bad_20261101.json" in found.warnings[0]


def test_the_repository_comes_from_the_cookbook(
    sglang: Repository, cookbook: Repository, bench: Repository
) -> None:
    sglang.write(f"{MODELS}/fancy_v2.py", model("FancyV2MoeForCausalLM"))
    sglang.commit(3)
    cookbook.write(f"{FOLDER}/v2/fancy.yaml", family("acme/Fancy-V2-30B-A3B-Instruct"))
    cookbook.commit(2)
    (only,) = run(sglang.path.parent).candidates
    assert (only.status, only.priority, only.sources) == ("candidate", 1, ("sglang", "cookbook"))
    assert only.hf_repo_id == "acme/Fancy-V2-30B-A3B-Instruct"
    assert only.architecture == "FancyV2MoeForCausalLM"


def test_shallow_clone(
    sglang: Repository, cookbook: Repository, bench: Repository, tmp_path: Path
) -> None:
    for number in range(3):
        sglang.write(f"{MODELS}/new{number}.py", model(f"New{number}ForCausalLM"))
        sglang.commit(10 - number)
    workspace = tmp_path / "shallow"
    git("clone", "--quiet", "--depth=2", sglang.path.as_uri(), str(workspace / "sglang"))
    for other in (cookbook, bench):
        shutil.copytree(other.path, workspace / other.path.name)
    found = run(workspace)
    assert [c.architecture for c in found.candidates] == ["New2ForCausalLM"]
    assert "shallow clone; what changed before 2026-11-11 is not known" in found.warnings[0]


def test_clones_without_old_blobs_and_without_remotes(
    sglang: Repository, cookbook: Repository, bench: Repository, tmp_path: Path
) -> None:
    (sglang.path / MODELS / "old_name.py").unlink()
    sglang.write(f"{MODELS}/fresh.py", model("FreshForCausalLM"))
    sglang.commit(3)
    cookbook.write(f"{FOLDER}/v1/known.yaml", family("acme/Known-1", "acme/Known-3"))
    cookbook.write(f"{FOLDER}/v1/broken.yaml", family("acme/Mended"))
    cookbook.commit(3)
    workspace = tmp_path / "partial"
    for repository in (sglang, cookbook, bench):
        git("config", "uploadpack.allowFilter", "true", cwd=repository.path)
        clone = workspace / repository.path.name
        git("clone", "--quiet", "--filter=blob:none", repository.path.as_uri(), str(clone))
    whole = run(workspace)
    assert {"FreshForCausalLM", "acme/Known-3", "acme/Mended"} == set(by_name(whole))
    assert whole.warnings == []
    shutil.rmtree(workspace)
    for repository in (sglang, cookbook, bench):
        clone = workspace / repository.path.name
        git("clone", "--quiet", "--filter=blob:none", repository.path.as_uri(), str(clone))
        repository.path.rename(tmp_path / f"gone-{repository.path.name}")
    offline = run(workspace)
    assert set(by_name(offline)) == {*by_name(whole), "acme/Known-1"}
    reasons = " ".join(offline.warnings)
    assert "only exact renames known" in reasons
    assert "changed entries are listed as new" in reasons


def test_a_repository_younger_than_the_window(
    cookbook: Repository, bench: Repository, tmp_path: Path
) -> None:
    young = Repository(tmp_path / "sglang")
    young.write(f"{MODELS}/first.py", model("FirstForCausalLM"))
    young.commit(1)
    (only,) = run(tmp_path).candidates
    assert (only.architecture, only.date) == ("FirstForCausalLM", "2026-11-19")


def test_unusable_clones(sglang: Repository, tmp_path: Path) -> None:
    inside = sglang.path / "inside"
    inside.mkdir()
    empty = Repository(tmp_path / "empty")
    since = parse_since("30d", NOW)
    for folder, message in (
        (inside, "is not a git repository"),
        (empty.path, "has no commit"),
        (tmp_path / "nowhere", "is not a folder"),
    ):
        with pytest.raises(InputError, match=message):
            open_window(folder, since)
    with pytest.raises(InputError, match=r"sglang.* is not a folder.*sgl-cookbook"):
        run(tmp_path / "nothing")
    found = run(tmp_path)
    assert found.candidates == []
    assert [w.partition(": ")[2].split(" (")[0] for w in found.warnings] == [
        "is not a folder; clone it first",
        "models with coverage are not known",
    ]


@pytest.fixture
def hub() -> Iterator[str]:
    """A Hub with one trending model, and one to be found by its architecture."""

    def listed(name: str, architecture: str) -> dict[str, object]:
        return {"id": name, "config": {"architectures": [architecture]}}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = [listed("acme/Trendy-7B", "Qwen3ForCausalLM"), {"id": "../../x"}]
            if "search=" in self.path:
                answer = [
                    listed("fan/Lonely-GGUF", "Other"),
                    listed("acme/Lonely", "LonelyForCausalLM"),
                ]
            body = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with listening(Handler) as url:
        yield url


def test_the_hub(sglang: Repository, cookbook: Repository, bench: Repository, hub: str) -> None:
    sglang.write(f"{MODELS}/lonely.py", model("LonelyForCausalLM"))
    sglang.commit(3)
    options = Settings(workspace=sglang.path.parent, hf_endpoint=hub)
    found = discover(options, now=NOW)
    assert [(c.hf_repo_id, c.status, c.priority, c.sources) for c in found.candidates] == [
        ("acme/Lonely", "candidate", 1, ("sglang",)),
        ("acme/Trendy-7B", "candidate", 5, ("hub",)),
    ]
    assert found.candidates[1].model_file == f"{MODELS}/qwen3.py"
    assert found.warnings == []


def test_no_hub_is_a_warning(sglang: Repository, cookbook: Repository, bench: Repository) -> None:
    sglang.write(f"{MODELS}/lonely.py", model("LonelyForCausalLM"))
    sglang.commit(3)
    options = Settings(workspace=sglang.path.parent, hf_endpoint="http://127.0.0.1:9")
    found = discover(options, now=NOW)
    assert [c.status for c in found.candidates] == ["needs_repo_id"]
    assert found.warnings == ["the Hugging Face Hub was not asked (ConnectError)"]
