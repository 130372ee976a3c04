"""What is the user's stays as it is: the base, the pictures, files of other names in the output folder."""

import os
import shutil
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from helpers import linux, make_pictures, run, state_of

import train_lora
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
        assert "was not left by a run of this script" in refusal(capsys, lambda flags=flags: train("out", *flags))
    assert state_of(tmp_path / "out") == state_of(tiny_model)


def test_a_config_of_that_name_is_not_overwritten(train, tmp_path):
    """A train_args.yaml that you wrote stays; a run's own gives way to the next one's."""
    mine = tmp_path / "out" / "train_args.yaml"
    mine.parent.mkdir()
    mine.write_text("# my notes\nseed: 1\n")
    for flags in ((), ("--overwrite_output_dir",), ("--config", mine)):
        with pytest.raises(SystemExit, match="train_args.yaml was not left by a run"):
            train("out", *flags)
    assert mine.read_text() == "# my notes\nseed: 1\n"
    train("other", "--max_train_steps", 1)
    train("other", "--max_train_steps", 1, "--overwrite_output_dir")


def test_a_config_that_was_edited_is_the_runs_own(train):
    """Notes at its top do not lock their writer out of the run, nor does its absence."""
    out = train("out", "--checkpointing_steps", 2)
    settings = out / "train_args.yaml"
    settings.write_text("\ufeff# a good run\n" + settings.read_text())
    train("out", "--checkpointing_steps", 2, "--max_train_steps", 6, *LATEST)
    settings.rename(out / "kept.yaml")
    train("out", "--checkpointing_steps", 2, "--max_train_steps", 8, *LATEST)
    train("out", "--max_train_steps", 1, "--overwrite_output_dir")


@pytest.mark.parametrize("name", ["state.json", "logs/metrics.jsonl"])
def test_files_of_these_names_are_not_overwritten(name, train, tmp_path, capsys):
    """What may be another program's state or metrics is refused as a result would be."""
    file = tmp_path / "out" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    for flags in ((), ("--overwrite_output_dir",), LATEST):
        said = refusal(capsys, lambda flags=flags: train("out", *flags))
        assert f"{file} was not left by a run of this script" in said
    assert file.read_text() == "mine"


@pytest.mark.parametrize("name", ["unet", "samples"])
def test_a_file_in_the_place_of_a_folder_is_refused(name, train, tmp_path, capsys):
    """The libraries would write nothing there, and say nothing."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    assert f"{name} is a file, where a run makes a folder" in refusal(capsys, lambda: train("out"))


def test_overwriting_deletes_checkpoints_that_alone_are_left(train):
    """Else a run that goes on later would take those of the run before."""
    out = train("out", "--checkpointing_steps", 2)
    for path in out.iterdir():
        if not path.name.startswith("checkpoint-"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    train("out", "--checkpointing_steps", 2, "--max_train_steps", 2, "--overwrite_output_dir")
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_checkpoint_of_another_spelling_is_not_pruned(train):
    """A copy that was put aside stays."""
    out = train("out", "--checkpointing_steps", 2)
    (out / "checkpoint-2").rename(out / "checkpoint-02")
    train("out", "--checkpointing_steps", 2, "--max_train_steps", 8, "--checkpoints_total_limit", 1, *LATEST)
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-02", "checkpoint-8"}


def test_hidden_files_of_others_stay(train, tmp_path):
    """Only what a killed run of ours was writing is cleared away."""
    out = tmp_path / "out"
    (out / ".mywork.tmp").mkdir(parents=True)
    (out / "logs").mkdir()
    mine = (out / ".notes.tmp", out / ".mywork.tmp" / "a", out / ".draft.7.tmp", out / "logs" / ".x.tmp")
    torn = (out / ".README.md.123.tmp", out / "logs" / ".metrics.jsonl.9.tmp", out / ".checkpoint-5.tmp" / "x")
    torn += (out / "samples" / ".step-000004.png.1a.tmp",)
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


LATEST = ("--resume_from_checkpoint", "latest")


def test_a_base_with_a_part_in_the_output_folder(train, tiny_model, tmp_path, capsys):
    """A base whose UNet is a link to a run's result is not trained into that run."""
    out = train("out")
    base = shutil.copytree(tiny_model, tmp_path / "base")
    shutil.rmtree(base / "unet")
    (base / "unet").symlink_to(out / "unet")
    before = state_of(out / "unet")
    assert "--pretrained_model_name_or_path" in refusal(
        capsys, lambda: train("out", "--overwrite_output_dir", base=base)
    )
    assert state_of(out / "unet") == before


def test_a_base_whose_file_is_a_link_into_the_output_folder(train, tiny_model, tmp_path, capsys):
    """Nor is one whose weights are such a link, or that the output folder leads into."""
    out = train("out")
    base = shutil.copytree(tiny_model, tmp_path / "base")
    (weights,) = (base / "unet").glob("*.safetensors")
    weights.unlink()
    weights.symlink_to(out / "unet" / weights.name)
    before = state_of(out / "unet")
    said = refusal(capsys, lambda: train("out", "--overwrite_output_dir", base=base))
    assert "--pretrained_model_name_or_path" in said and state_of(out / "unet") == before
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "unet").symlink_to(tiny_model / "unet")
    before = state_of(tiny_model)
    assert "--pretrained_model_name_or_path" in refusal(capsys, lambda: train("new"))
    assert state_of(tiny_model) == before


@pytest.mark.parametrize("flags", [(), LATEST, ("--overwrite_output_dir",)])
@pytest.mark.parametrize("name", ["checkpoint-1/optimizer.bin", "README.md", "unet/config.json", "samples/step-1.png"])
def test_results_of_others_are_not_overwritten(name, flags, train, tmp_path, capsys):
    """Nor are their checkpoints pruned: what no run of ours has left is refused."""
    file = tmp_path / "out" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    more = ("--checkpointing_steps", 1, "--checkpoints_total_limit", 1)
    assert "was not left by a run of this script" in refusal(capsys, lambda: train("out", *more, *flags))
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name.split("/")[0]]
    assert file.read_text() == "mine"


def test_adapters_of_others_are_not_overwritten(trainer, tmp_path, capsys):
    """The example scripts write a file of the same name."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "pytorch_lora_weights.safetensors").write_text("mine")
    adapters = trainer(train_lora)
    assert "was not left by a run of this script" in refusal(capsys, lambda: adapters("out"))
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").read_text() == "mine"


def test_a_result_is_not_overwritten_by_a_run_from_elsewhere(train, tmp_path, capsys):
    """Going on from another folder's checkpoint wants a folder without a run."""
    out, other = train("out"), train("other", "--checkpointing_steps", 2)
    before = state_of(out)
    flags = ("--resume_from_checkpoint", other / "checkpoint-2")
    assert "holds a run: go on" in refusal(capsys, lambda: train("out", *flags))
    assert state_of(out) == before
    assert train("new", *flags)


@pytest.mark.parametrize("left", ["model_index.json", "pytorch_lora_weights.safetensors"])
def test_a_killed_runs_result_is_not_overwritten(left, trainer, tmp_path, capsys):
    """One that a run wrote on its way, without a card, is another run's as well."""
    train = trainer(train_lora if "lora" in left else script)
    out = train("out")
    for file in [*out.glob("*.md"), out / "state.json"]:
        file.unlink()
    (out / left).write_text("{}")
    assert "holds a run: go on" in refusal(capsys, lambda: train("out"))


def test_another_scripts_folder_is_refused(train, trainer, capsys):
    """Also where its run has ended, and where it is to be overwritten."""
    out = train("out")
    before = state_of(out)
    for flags in (LATEST, ("--overwrite_output_dir",)):
        said = refusal(capsys, lambda flags=flags: trainer(train_lora)("out", *flags))
        assert "holds a run of train_text_to_image.py" in said
    assert state_of(out) == before


def test_overwriting_leaves_what_others_put_there(train, tmp_path):
    """Notes beside the samples and weights stay, and so does what a link leads to."""
    out = train("out", "--validation_prompts", "a cat")
    names = "samples/notes.txt samples/best/1.png samples/step-best.png unet/notes.txt unet/my_best.safetensors "
    names += "samples/step-000003-mine.png samples/step-000003-2.png samples/step-3_1.png "
    names += "text_encoder_backup/model.safetensors tokenizer_old/vocab.json text_encoder/my.json"
    mine = [out / name for name in names.split()]
    for file in mine:
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    shutil.move(out / "vae", tmp_path / "vae")
    (out / "vae").symlink_to(tmp_path / "vae")
    before = state_of(tmp_path / "vae")
    shutil.copytree(tmp_path / "vae", tmp_path / "kept")
    seen = []
    save_result, script.save_result = script.save_result, lambda run, models: seen.append(state_of(tmp_path / "vae"))
    try:
        train("out", "--overwrite_output_dir")
    finally:
        script.save_result = save_result
    assert seen == [before] and all(file.read_text() == "mine" for file in mine)
    assert not (out / "unet" / "config.json").exists()


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


def test_a_card_that_was_edited_is_kept(train, capsys):
    """People write in a result's card: a run that goes on puts theirs aside; its own it replaces."""
    flags = ("--checkpointing_steps", 1, "--resume_from_checkpoint", "latest", "--max_train_steps")
    out = train("out", *flags, 1)
    train("out", *flags, 2)
    assert not (out / "README.old.md").exists()
    with open(out / "README.md", "a") as card:
        card.write("My words.")
    edited = (out / "README.md").read_bytes()
    train("out", *flags, 3)
    assert (out / "README.old.md").read_bytes() == edited
    assert "max_train_steps | 3" in (out / "README.md").read_text()
    assert "README.md was edited, so it is README.old.md now" in capsys.readouterr().out


@linux
def test_others_can_read_what_a_run_leaves(train):
    """Weights too, as the umask says: safetensors makes its files their owner's alone."""
    before = os.umask(0o027)
    try:
        out = train("out", "--use_ema", "--max_train_steps", 1, "--checkpointing_steps", 1)
    finally:
        os.umask(before)
    modes = {str(file): stat.S_IMODE(file.stat().st_mode) for file in out.rglob("*.safetensors")}
    assert len(modes) >= 5 and {*modes.values()} == {0o640}
