"""Upload and download, against a stand-in for the hub that keeps its repositories in folders."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError

import interleaf
from interleaf.errors import StoreError
from interleaf.store import push_to_hub
from tests.zoo import build, logits, randomise


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "hub"
    folder.mkdir()

    class Api:
        def __init__(self, token: str | None = None) -> None:
            self.token = token

        def create_repo(self, repo: str, private: bool, exist_ok: bool) -> None:
            if repo.startswith("stranger/"):
                raise OSError("403 Forbidden: no rights to this namespace")
            (folder / repo).mkdir(parents=True, exist_ok=exist_ok)

        def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> str:
            assert commit_message
            shutil.copytree(folder_path, folder / repo_id, dirs_exist_ok=True)
            return f"https://hub.example/{repo_id}"

    def snapshot_download(repo: str, allow_patterns: list[str]) -> str:
        if not (folder / repo).is_dir():
            raise OSError(f"404: no repository {repo}")
        assert all(any(map(path.match, allow_patterns)) for path in (folder / repo).iterdir())
        return str(folder / repo)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert issubclass(HfHubHTTPError, OSError)  # so the stand-in's errors take the hub's way
    return folder


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Path, Any]:
    model = interleaf.adapt(build("bert"))
    model.add_adapter("a", "houlsby")
    randomise(model)
    return model.save_adapter(tmp_path / "a", "a"), model


def test_an_adapter_is_pushed_and_loaded_by_its_name(hub: Path, stored: tuple[Path, Any]) -> None:
    path, model = stored
    assert push_to_hub(path, "me/a") == "https://hub.example/me/a"
    fresh = interleaf.adapt(build("bert"))
    assert fresh.load_adapter("me/a") == "a"
    assert torch.equal(logits(fresh), logits(model))


def test_what_the_hub_refuses_is_said_in_one_line(hub: Path, stored: tuple[Path, Any]) -> None:
    path, _ = stored
    with pytest.raises(StoreError, match=r"the hub did not take .* as stranger/a: 403 Forbidden"):
        push_to_hub(path, "stranger/a")
    with pytest.raises(StoreError, match=r"me/none is no folder here and could not be fetched from the hub: 404"):
        interleaf.adapt(build("bert")).load_adapter("me/none")


def test_a_damaged_adapter_is_not_pushed(hub: Path, stored: tuple[Path, Any]) -> None:
    path, _ = stored
    (path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(StoreError, match="corrupt or truncated"):
        push_to_hub(path, "me/a")
    assert not (hub / "me").exists()
