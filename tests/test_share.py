"""Adapters on a hub: one made of folders, with the real client's signatures in front of it."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import huggingface_hub
import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import filter_repo_objects

from tests.fingerprint import Fingerprint
from tests.hosts import batch, build_llava, randomise
from vision_remember import attach_vision_remember, load_vision_remember

REPO = "someone/an-adapter"
FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]


class Hub:
    """Repositories as folders: ``root/<owner>/<name>/<revision>``, a revision for each commit and branch."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def api(self, token: str | None = None) -> Any:
        api = create_autospec(HfApi, instance=True)
        for name in ("create_repo", "create_branch", "upload_folder"):
            getattr(api, name).side_effect = getattr(self, name)
        self.calls.append(("login", {"token": token}))
        return api

    def create_repo(self, repo_id: str, **options: Any) -> None:
        (self.root / repo_id / "main").mkdir(parents=True, exist_ok=options["exist_ok"])
        self.calls.append(("create_repo", {"repo_id": repo_id, **options}))

    def create_branch(self, repo_id: str, *, branch: str, exist_ok: bool) -> None:
        (self.root / repo_id / branch).mkdir(exist_ok=exist_ok)

    def upload_folder(self, *, repo_id: str, folder_path: str, revision: str | None, **options: Any) -> Any:
        self.calls.append(("upload_folder", options))
        names = [path.name for path in Path(folder_path).iterdir()]
        sent = {n: Path(folder_path) / n for n in filter_repo_objects(names, allow_patterns=options["allow_patterns"])}
        oid = hashlib.sha1(b"".join(sent[name].read_bytes() for name in sorted(sent))).hexdigest()
        for folder in (oid, *(() if options["create_pr"] else (revision or "main",))):
            (self.root / repo_id / folder).mkdir(exist_ok=True)
            for path in sent.values():
                shutil.copy(path, self.root / repo_id / folder)
        return SimpleNamespace(commit_url=f"hub/{repo_id}/commit/{oid}", pr_url=f"hub/{repo_id}/discussions/1", oid=oid)

    def snapshot_download(self, repo_id: str, *, revision: str | None = None, allow_patterns: list[str]) -> str:
        self.calls.append(("snapshot_download", {"allow_patterns": allow_patterns}))
        response: Any = SimpleNamespace(headers={}, request=None)
        repo = self.root / repo_id
        if not repo.is_dir():
            raise RepositoryNotFoundError("404", response=response)
        if not (repo / (revision or "main")).is_dir():
            raise RevisionNotFoundError("404", response=response)
        target = self.root / "cache" / repo_id / (revision or "main")
        target.mkdir(parents=True, exist_ok=True)
        names = [path.name for path in (repo / (revision or "main")).iterdir()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            shutil.copy(repo / (revision or "main") / name, target)
        return str(target)


@pytest.fixture(name="hub")
def hub_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", hub.api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


def trained(seed: int = 1) -> tuple[Any, Any]:
    model = build_llava()
    handle = attach_vision_remember(model, [1, 3])
    randomise(handle, seed=seed)
    return model, handle


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(**batch(model)).logits


def test_what_is_pushed_comes_back(hub: Hub) -> None:
    model, handle = trained()
    url = handle.push_to_hub(REPO, private=True, token="secret", commit_message="first")
    assert url is not None
    assert url.startswith(f"hub/{REPO}/commit/")
    assert hub.calls[0] == ("login", {"token": "secret"})
    assert hub.calls[1] == ("create_repo", {"repo_id": REPO, "private": True, "exist_ok": True})
    assert sorted(path.name for path in (hub.root / REPO / "main").iterdir()) == FILES
    card = (hub.root / REPO / "main" / "README.md").read_text()
    assert f'load_vision_remember(model, "{REPO}", processor)' in card
    twin = build_llava()
    load_vision_remember(twin, REPO)
    assert torch.equal(logits(twin), logits(model))


def test_a_commit_pins_what_is_loaded(hub: Hub) -> None:
    first, handle = trained(1)
    url = handle.push_to_hub(REPO)
    assert url is not None
    second, handle = trained(2)
    handle.push_to_hub(REPO)
    pinned, newest = build_llava(), build_llava()
    load_vision_remember(pinned, REPO, revision=url.rpartition("/")[2])
    load_vision_remember(newest, REPO)
    assert torch.equal(logits(pinned), logits(first))
    assert torch.equal(logits(newest), logits(second))
    assert not torch.equal(logits(first), logits(second))


def test_a_branch_and_a_pull_request_leave_main_alone(hub: Hub) -> None:
    _, handle = trained()
    handle.push_to_hub(REPO, revision="trial")
    for revision in (None, "another"):
        assert handle.push_to_hub(REPO, revision=revision, create_pr=True) == f"hub/{REPO}/discussions/1"
    assert not (hub.root / REPO / "another").exists()
    assert not list((hub.root / REPO / "main").iterdir())
    load_vision_remember(build_llava(), REPO, revision="trial")
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config\.json"):
        load_vision_remember(build_llava(), REPO)


def test_nothing_but_json_safetensors_and_the_card_is_fetched(hub: Hub) -> None:
    _, handle = trained()
    handle.push_to_hub(REPO)
    for name in ("modeling.py", "adapter_model.bin", "weights.pkl", "notes.txt"):
        (hub.root / REPO / "main" / name).write_text("raise SystemExit('run')")
    load_vision_remember(build_llava(), REPO)
    assert sorted(path.name for path in (hub.root / "cache" / REPO / "main").iterdir()) == FILES


@pytest.mark.parametrize(
    ("repo", "revision", "message"),
    [
        ("someone/else", None, "neither a folder here nor a repository on the hub that you may see"),
        (REPO, "v9", "has no revision 'v9'"),
    ],
)
def test_what_is_not_there_is_an_error_that_changes_nothing(
    hub: Hub, repo: str, revision: str | None, message: str
) -> None:
    trained()[1].push_to_hub(REPO)
    model = build_llava()
    before = Fingerprint(model)
    with pytest.raises(FileNotFoundError, match=message):
        load_vision_remember(model, repo, revision=revision)
    before.check(model)


def test_a_folder_has_no_revisions(tmp_path: Path) -> None:
    trained()[1].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"revision='v1'.*is a folder"):
        load_vision_remember(build_llava(), tmp_path, revision="v1")


@pytest.mark.parametrize("name", ["an-adapter", "./an/adapter", "/an-adapter", "a/b/c", "a/b c", 3])
def test_a_name_that_no_repository_can_have_is_refused_before_anything_is_sent(hub: Hub, name: Any) -> None:
    with pytest.raises((ValueError, HFValidationError), match=r"repo_id|Repo id"):
        trained()[1].push_to_hub(name)
    assert not hub.calls


def test_a_detached_handle_has_nothing_to_push(hub: Hub) -> None:
    _, handle = trained()
    handle.detach()
    with pytest.raises(RuntimeError, match="detached"):
        handle.push_to_hub(REPO)
    assert not hub.calls
