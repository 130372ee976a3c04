"""The stand-in for the Hub answers the real clients as the Hub does."""

import subprocess
import sys

import pytest
from huggingface_hub import HfApi, snapshot_download, upload_folder
from huggingface_hub.errors import RepositoryNotFoundError


def test_upload(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    (tmp_path / "checkpoint-5").mkdir()
    for name in ("README.md", "model.safetensors", "checkpoint-5/model.safetensors"):
        (tmp_path / name).write_text(name)
    hub.fail = [["POST .*/preupload/", 2, 503]]
    api = HfApi(token="hf_secret")
    repo_id = api.create_repo("model", private=True, exist_ok=True).repo_id
    api.create_repo("model", private=True, exist_ok=True)
    api.upload_folder(repo_id=repo_id, folder_path=tmp_path, ignore_patterns=["checkpoint-*"])
    assert hub.repos["me/model"]["private"]
    assert sorted(hub.repos["me/model"]["files"]) == ["README.md", "model.safetensors"]
    assert hub.fail[0][1] == 0
    assert api.whoami()["name"] == "me"
    with pytest.raises(RepositoryNotFoundError):
        upload_folder(repo_id="me/other", folder_path=tmp_path, token="hf_secret")


def test_download(hub, tiny_model):
    hub.add_folder("me/model", tiny_model)
    folder = snapshot_download("me/model")
    for path, data in hub.repos["me/model"]["files"].items():
        with open(f"{folder}/{path}", "rb") as file:
            assert file.read() == data


def test_load_dataset(hub, pictures):
    hub.add_folder("datasets/me/pictures", pictures)
    code = """
from datasets import load_dataset
rows = load_dataset("me/pictures", split="train")
print(list(rows["text"]), rows[0]["image"].size)
"""
    out = subprocess.run([sys.executable, "-c", code], env=hub.env, check=True, capture_output=True, text=True).stdout
    assert out.startswith("['a red circle 1', 'a green square 2', ") and out.endswith("(48, 48)\n")
