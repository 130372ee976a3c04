"""What is the user's stays as it is: the base, the pictures, files of other names in the output folder."""

import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from helpers import make_pictures, run, state_of

import train_text_to_image as script


def refusal(capsys, call):
    """The sentence in which a run is refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        call()
    return f"{end.value.code} {capsys.readouterr().err.split('error: ')[-1]}"


@pytest.mark.parametrize("overwrite", [(), ("--overwrite_output_dir",)])
@pytest.mark.parametrize("place", [".", "..", "new"])
def test_a_base_is_not_trained_into(train, tiny_model, tmp_path, capsys, place, overwrite):
    """A base that is the output folder, or lies in it, or holds it, is refused and stays as it was."""
    base = shutil.copytree(tiny_model, tmp_path / "models" / "base")
    before = state_of(tmp_path / "models")
    said = refusal(capsys, lambda: train("unused", *overwrite, "--output_dir", base / place, base=base))
    assert "--pretrained_model_name_or_path" in said and "--output_dir" in said
    assert state_of(tmp_path / "models") == before


def test_another_vae_is_not_trained_into(train, tiny_model, tmp_path, capsys):
    """So it is with a VAE of its own."""
    vae = shutil.copytree(tiny_model / "vae", tmp_path / "out" / "vae")
    flags = ("--pretrained_vae_model_name_or_path", vae, "--overwrite_output_dir")
    assert "--pretrained_vae_model_name_or_path" in refusal(capsys, lambda: train("out", *flags))
    assert state_of(vae) == state_of(tiny_model / "vae")


def test_a_pipeline_of_others_is_not_overwritten(train, tiny_model, tmp_path, capsys):
    """A folder with a model that no run of ours left is refused, and --overwrite_output_dir does not help."""
    shutil.copytree(tiny_model, tmp_path / "out")
    for flags in ((), ("--overwrite_output_dir",)):
        assert "which no run of this script left" in refusal(capsys, lambda flags=flags: train("out", *flags))
    assert state_of(tmp_path / "out") == state_of(tiny_model)


def test_hidden_files_of_others_stay(train, tmp_path):
    """Only what a killed run of ours was writing is cleared away."""
    out = tmp_path / "out"
    (out / ".mywork.tmp").mkdir(parents=True)
    (out / "logs").mkdir()
    mine = (out / ".notes.tmp", out / ".mywork.tmp" / "a", out / ".draft.7.tmp", out / "logs" / ".x.tmp")
    torn = (out / ".README.md.123.tmp", out / "logs" / ".metrics.jsonl.9.tmp", out / ".checkpoint-5.tmp" / "x")
    for file in (*mine, *torn):
        file.parent.mkdir(exist_ok=True)
        file.write_text("x")
    train("out")
    assert all(file.read_text() == "x" for file in mine)
    assert not any(file.exists() for file in torn)


def test_pictures_in_the_output_folder_are_not_overwritten(tiny_model, train, tmp_path, capsys):
    """Where overwriting would delete the pictures that are trained on, it is refused."""
    out = train("out")
    pictures = make_pictures(out / "samples" / "mine")
    before = state_of(pictures)
    flags = ("--train_data_dir", pictures, "--overwrite_output_dir")
    assert "--train_data_dir" in refusal(capsys, lambda: train("out", *flags))
    assert state_of(pictures) == before
    run(script, *flags[:2], "--pretrained_model_name_or_path", tiny_model, "--resolution", 16, "--max_train_steps", 1,
        "--train_batch_size", 1, "--report_to", "none", "--output_dir", tmp_path / "other")  # fmt: skip
    assert state_of(pictures) == before


@pytest.mark.parametrize("refused", ["disk", "base", "data"])
def test_a_refused_run_overwrites_nothing(refused, train, tiny_model, tmp_path, monkeypatch):
    """What --overwrite_output_dir deletes stays until nothing is left that may refuse the run."""
    out = train("out", "--checkpointing_steps", 2)
    flags, base = ["--overwrite_output_dir", "--checkpointing_steps", 2], tiny_model
    if refused == "disk":
        full = SimpleNamespace(total=10, used=10, free=0)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    if refused == "base":
        base = shutil.copytree(tiny_model, tmp_path / "base")
        (base / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"torn")
    if refused == "data":
        flags += ["--validation_samples", 6]
    before = state_of(out)
    del before[".lock"]
    with pytest.raises(SystemExit):
        train("out", *flags, base=base)
    after = state_of(out)
    del after[".lock"]
    assert after == before


def test_two_writers_of_one_file(tmp_path, monkeypatch):
    """Two runs that write the same cache entry at once, in containers with the same process number, both succeed."""
    barrier, replace = threading.Barrier(2, timeout=20), os.replace

    def at_once(source, target):
        barrier.wait()
        replace(source, target)

    monkeypatch.setattr(os, "replace", at_once)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda data: script.replace_file(tmp_path / "entry", data), (b"first", b"other")))
    assert [file.name for file in tmp_path.iterdir()] == ["entry"]
    assert (tmp_path / "entry").read_bytes() in (b"first", b"other")
