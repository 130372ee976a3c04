"""Resuming: to the same bits at any step, from the newest whole checkpoint, and only the run that it was."""

import json
import os
import re
import shutil
import stat
import sys
import zlib
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers import (
    RANDOM,
    assert_equal,
    changed,
    count_calls,
    everything,
    files_in,
    litter,
    logged,
    losses,
    metrics,
    run,
    same,
    state_of,
    watch,
    weights,
    whole_checkpoints,
)
from safetensors.torch import load_file, save_file

import train_text_to_image as script


# Exactly.


RESUMED = {
    # Latents are cached at first, and no more by a run that is resumed at the last step.
    "adamw": (*RANDOM, "--lr_scheduler", "cosine", "--lr_warmup_steps", 2, "--max_train_samples", 3),
    "8bit": ("--use_8bit_adam", "--no-center_crop", "--snr_gamma", 5, "--noise_offset", 0.1, "--dream_training"),
    "uncached": (*RANDOM, "--no_encoding_cache", "--validation_samples", 1, "--validation_steps", 2),
}


@pytest.mark.parametrize("kind", RESUMED)
def test_resuming_is_exact_at_every_step(train, dropout_model, five_pictures, wide_pictures, kind):
    """Whatever step a run is resumed at, it ends with the same bits of weights, average, optimizer and log."""
    data = wide_pictures if kind == "8bit" else five_pictures
    flags = ("--pretrained_model_name_or_path", dropout_model, "--train_data_dir", data, "--max_train_steps", 6)
    flags += ("--train_batch_size", 1, "--gradient_accumulation_steps", 2, "--checkpointing_steps", 1, *RESUMED[kind])
    whole = train("whole", *flags)
    assert len({loss for _, loss in metrics(whole, "loss")}) == 6
    for step in (1, 5) if kind == "uncached" else (1, 2, 3, 4, 5):
        begun = whole.with_name(f"from-{step}") / f"checkpoint-{step}"
        shutil.copytree(whole / begun.name, begun)
        resumed = train(begun.parent.name, *flags, "--resume_from_checkpoint", "latest")
        for later in range(step + 1, 7):
            name = f"checkpoint-{later}"
            assert same(everything(resumed / name), everything(whole / name)), f"{name}, resumed at step {step}"
        assert logged(resumed) == logged(whole), f"resumed at step {step}"
        assert same(weights(resumed / "unet"), weights(whole / "unet")), f"resumed at step {step}"


LATEST = ("--resume_from_checkpoint", "latest")


@pytest.mark.parametrize("steps, every", [(4, 2), (5, 2), (3, 500), (3, 0)])
def test_the_same_command_after_the_end(train, monkeypatch, capsys, steps, every):
    """A run that has ended takes no step again, with or without checkpoints, and says so."""
    flags = (*RANDOM, "--max_train_steps", steps, "--checkpointing_steps", every, *LATEST)
    out = train("out", *flags)
    before, watched = state_of(out), watch(monkeypatch, script)
    capsys.readouterr()
    train("out", *flags)
    assert f"{out} has ended after {steps} steps: there is none left to take." in capsys.readouterr().out
    assert watched.models is None and state_of(out) == before


def test_a_checkpoint_beyond_the_last_step_is_refused(train):
    """A run of fewer steps does not become the result of more."""
    out = train("out", "--max_train_steps", 3, "--checkpointing_steps", 3)
    (out / "state.json").unlink()  # as if it had been stopped
    before = state_of(out)
    with pytest.raises(SystemExit, match="checkpoint-3 is beyond the 2 steps that are asked for"):
        train("out", "--max_train_steps", 2, *LATEST)
    assert state_of(out) == before


def test_a_result_that_is_gone(train, capsys):
    """The same command makes it again, if there is a checkpoint to go on from; else a sentence says what is gone."""
    flags = (*RANDOM, "--max_train_steps", 5, *LATEST)
    out = train("out", *flags, "--checkpointing_steps", 2)
    trained = weights(out / "unet")
    shutil.rmtree(out / "unet")
    train("out", *flags, "--checkpointing_steps", 2)
    assert same(weights(out / "unet"), trained)
    other = train("other", *flags)
    shutil.rmtree(other / "vae")
    capsys.readouterr()
    with pytest.raises(SystemExit, match="left no checkpoint to go on from"):
        train("other", *flags)
    assert f"{other / 'vae'}/" in capsys.readouterr().out


def test_more_steps_after_the_end(train, capsys):
    """More steps than the run had go on from its last checkpoint, or are refused if it left none."""
    whole = train("whole", *RANDOM, "--max_train_steps", 7)
    out = train("out", *RANDOM, "--max_train_steps", 5, "--checkpointing_steps", 2)
    train("out", *RANDOM, "--max_train_steps", 7, *LATEST)
    assert same(weights(out / "unet"), weights(whole / "unet")) and logged(out) == logged(whole)
    before = state_of(whole)
    with pytest.raises(SystemExit, match="has ended after 7 steps and left no checkpoint to go on from"):
        train("whole", *RANDOM, "--max_train_steps", 8, *LATEST)
    assert state_of(whole) == before
    assert "starting at step 0" not in capsys.readouterr().out


def test_a_run_that_goes_on_has_not_ended(train, monkeypatch):
    """The mark of an earlier end is gone while further steps are taken."""
    out = train("out", "--max_train_steps", 2, "--checkpointing_steps", 2)
    assert (out / "state.json").exists()
    monkeypatch.setattr(script, "save_result", lambda run, models: sys.exit("killed"))
    with pytest.raises(SystemExit, match="killed"):
        train("out", "--max_train_steps", 4, *LATEST)
    assert not (out / "state.json").exists()


def test_resuming_prepares_no_picture_that_it_skips(train, monkeypatch):
    """A resumed run resizes and crops the pictures of the steps that are left, and no others."""
    flags = ("--no_encoding_cache", "--max_train_steps", 5, "--checkpointing_steps", 4)
    train("out", *flags)
    prepared = count_calls(monkeypatch, script.Samples, "pixels")
    train("out", *flags, "--max_train_steps", 6, *LATEST)
    assert len(prepared) == 4  # two batches


# From which checkpoint.


@pytest.fixture
def refused(command, capsys):
    """Runs in this process what must be refused; returns the refusal."""

    def refuse(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            run(script, *arguments)
        return str(end.value.code) + "".join(capsys.readouterr())

    return refuse


@pytest.fixture(scope="session")
def trained(command, tmp_path_factory):
    """The output of three steps with a checkpoint each."""
    out = tmp_path_factory.mktemp("trained") / "out"
    run(script, *command(out, "--max_train_steps", 3, "--checkpointing_steps", 1))
    return out


@pytest.fixture
def out(trained, tmp_path):
    """A copy of it, as if the run had been killed at its end."""
    return shutil.copytree(
        trained, tmp_path / "out", ignore=lambda folder, names: {"state.json"} if folder == str(trained) else {}
    )


RESUME = ("--checkpointing_steps", 1, "--resume_from_checkpoint")


def cut(checkpoint):
    """Cuts a byte off a checkpoint's weights."""
    with open(checkpoint / "unet" / "diffusion_pytorch_model.safetensors", "r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) - 1)


def damage(file, place=-8):
    """Changes a byte of a file, whose size and time stay."""
    data, times = bytearray(file.read_bytes()), file.stat()
    data[place] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


TEARS = {
    "cut": cut,
    "a byte of the weights": lambda checkpoint: damage(checkpoint / "unet" / "diffusion_pytorch_model.safetensors"),
    "a byte of the optimizer": lambda checkpoint: damage(checkpoint / "optimizer.bin", 5000),
    "empty": lambda checkpoint: (checkpoint / "state.json").write_bytes(b""),
    "no manifest": lambda checkpoint: (checkpoint / "manifest.json").unlink(),
    "torn manifest": lambda checkpoint: (checkpoint / "manifest.json").write_text('{"state.json": 1'),
    "a manifest that is a list": lambda checkpoint: (checkpoint / "manifest.json").write_text("[1]"),
    "no averages": lambda checkpoint: shutil.rmtree(checkpoint / "unet_ema"),
}


@pytest.mark.parametrize("tear", TEARS)
def test_latest_passes_over_torn_checkpoints(tear, command, refused, out, uninterrupted, capsys):
    """The newest whole one is taken, and the torn one is named; asked for by its path, it is refused."""
    TEARS[tear](out / "checkpoint-3")
    flags = command(out, "--max_train_steps", 3, *RESUME)
    assert "not a whole checkpoint" in refused(*flags, out / "checkpoint-3")
    for name in ("checkpoint-best", "checkpoint-9.bak", "checkpoint-", ".checkpoint-8.tmp"):
        shutil.copytree(out / "checkpoint-1", out / name)
    capsys.readouterr()
    run(script, *flags, "latest")
    said = capsys.readouterr().out
    passed = [line for line in said.splitlines() if "not whole" in line]
    assert len(passed) == 1 and f"{out}/checkpoint-3" in passed[0]
    assert f"Resuming from {out}/checkpoint-2." in said
    assert_equal(out / "checkpoint-3", uninterrupted(3))
    assert same(weights(out / "unet"), weights(uninterrupted(3) / "unet_ema"))
    assert (out / "checkpoint-best").exists() and (out / "checkpoint-9.bak").exists() and litter(out) == []


def test_latest_is_refused_where_all_are_torn(command, refused, out):
    """What is left of a run is not overwritten by a new one."""
    for step in (1, 2, 3):
        (out / f"checkpoint-{step}" / "manifest.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in (out / "unet").rglob("*")}
    said = refused(*command(out, "--max_train_steps", 2, *RESUME, "latest"))
    assert said.count("not whole") == 3 and "No checkpoint in" in said and "--overwrite_output_dir" in said
    assert {path: path.stat().st_mtime_ns for path in (out / "unet").rglob("*")} == before


def test_latest_starts_where_there_is_none(command, tmp_path, uninterrupted, capsys):
    """With nothing to resume from, the run starts at step 0 and says so."""
    run(script, *command(tmp_path / "out", "--max_train_steps", 2, *RESUME, "latest"))
    assert "starting at step 0" in capsys.readouterr().out
    assert_equal(tmp_path / "out" / "checkpoint-2", uninterrupted(2))


def test_the_limit_keeps_the_newest(command, tmp_path):
    """Of the checkpoints, as many as asked for stay; other folders that look like them stay as well."""
    out = tmp_path / "out"
    others = ["checkpoint-best", "checkpoint-0.old"]
    for name in others:
        (out / name).mkdir(parents=True)
    steps = ("--max_train_steps", 12, "--checkpointing_steps", 1, "--checkpoints_total_limit", 3)
    run(script, *command(out, *steps))
    assert whole_checkpoints(out) == [10, 11, 12]  # by number: 9 is no newer than 10
    assert sorted(p.name for p in out.glob("checkpoint-*")) == sorted(
        [*others, "checkpoint-10", "checkpoint-11", "checkpoint-12"]
    )


def test_moved_files_are_the_same_run(command, out, pictures, tiny_model, uninterrupted, tmp_path):
    """Base model, pictures and checkpoint may move: what they hold counts, not where they are."""
    model = shutil.copytree(tiny_model, tmp_path / "elsewhere" / "model")
    data = shutil.copytree(pictures, tmp_path / "elsewhere" / "pictures")
    checkpoint = shutil.copytree(out / "checkpoint-2", tmp_path / "elsewhere" / "step two")
    moved = ("--pretrained_model_name_or_path", model, "--train_data_dir", data)
    run(script, *command(tmp_path / "new", "--max_train_steps", 4, *RESUME, f"{checkpoint}/", *moved))
    assert whole_checkpoints(tmp_path / "new") == [3, 4]
    assert_equal(tmp_path / "new" / "checkpoint-4", uninterrupted(4))


def test_a_checkpoint_loads_in_diffusers(trained):
    """The weights and their average are folders that diffusers loads as they are, and they differ."""
    parts = [UNet2DConditionModel.from_pretrained(trained / "checkpoint-3", subfolder=s) for s in ("unet", "unet_ema")]
    unet, averaged = (dict(part.named_parameters()) for part in parts)
    assert same(averaged, weights_by_name(trained / "unet")) and not same(unet, averaged)


def weights_by_name(folder):
    """The tensors of a model's folder, by name only."""
    return {name.split(":")[1]: tensor for name, tensor in weights(folder).items()}


# What is no continuation.


def test_a_folder_that_holds_a_run_is_refused(command, refused, out, uninterrupted):
    """The refusal names three ways out, and --overwrite_output_dir is one."""
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    said = refused(*command(out, "--max_train_steps", 1))
    assert all(way in said for way in ("--resume_from_checkpoint latest", "--overwrite_output_dir", "--output_dir"))
    assert "Traceback" not in said
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    (out / "checkpoint-best").mkdir()
    for stale in ("samples/step-009999.png", "unet/diffusion_pytorch_model-00001-of-00002.safetensors", "notes.txt"):
        (out / stale).parent.mkdir(exist_ok=True)
        (out / stale).write_text("of the run before, or the user's own")
    run(script, *command(out, "--max_train_steps", 1, "--checkpointing_steps", 1, "--overwrite_output_dir"))
    assert whole_checkpoints(out) == [1] and (out / "checkpoint-best").exists() and (out / "notes.txt").exists()
    assert (
        not (out / "samples" / "step-009999.png").exists()
        and not (out / "unet" / "diffusion_pytorch_model-00001-of-00002.safetensors").exists()
    )
    assert_equal(out / "checkpoint-1", uninterrupted(1))
    assert losses(out / "logs") == losses(uninterrupted(1))


def test_another_run_is_not_resumed(command, refused, out, pictures, tiny_model, tmp_path):
    """Another seed, base model, data set or caption is refused, in a sentence, and nothing is changed."""
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    flags = command(out, "--max_train_steps", 4, *RESUME, "latest")
    assert "--seed 7" in refused(*flags, "--seed", 8)

    model = shutil.copytree(tiny_model, tmp_path / "model")
    for part in ("vae", "text_encoder"):
        file = next((model / part).glob("*.safetensors"))
        good, tensors = file.read_bytes(), load_file(file)

        name = sorted(tensors)[0]
        save_file({**tensors, name: tensors[name] + 1e-3}, file, metadata={"format": "pt"})
        assert "another base model" in refused(*flags, "--pretrained_model_name_or_path", model)
        file.write_bytes(good)

    heads = changed(tiny_model, tmp_path / "heads", "unet", attention_head_dim=8)
    assert "another base model" in refused(*flags, "--pretrained_model_name_or_path", heads)

    data = shutil.copytree(pictures, tmp_path / "pictures")
    captions = (data / "metadata.jsonl").read_text()
    (data / "metadata.jsonl").write_text(captions.replace("circle", "disc", 1))
    assert "another data set" in refused(*flags, "--train_data_dir", data)
    (data / "metadata.jsonl").write_text(captions.split("\n", 1)[1])
    (data / "000.png").unlink()
    assert "another data set" in refused(*flags, "--train_data_dir", data)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_another_held_out_caption_is_not_resumed(command, refused, pictures, tmp_path):
    """The held-out loss of one run is measured on the same captions from its first step to its last."""
    data = shutil.copytree(pictures, tmp_path / "pictures")
    flags = ("--train_data_dir", data, "--validation_samples", 1, "--checkpointing_steps", 1)
    run(script, *command(tmp_path / "out", *flags, "--max_train_steps", 1))
    captions = (data / "metadata.jsonl").read_text()
    (data / "metadata.jsonl").write_text(captions.replace('circle 1"', 'disc 1"'))  # of the first, which is held out
    said = refused(*command(tmp_path / "out", *flags, "--max_train_steps", 2, *LATEST))
    assert "another held-out data" in said


def test_a_base_that_predicts_something_else_is_not_resumed(command, refused, out, tiny_v_model):
    """The same weights with a scheduler for v are another base model: the loss would be another one."""
    flags = command(out, "--max_train_steps", 4, *RESUME, "latest")
    assert "another" in refused(*flags, "--pretrained_model_name_or_path", tiny_v_model)


@pytest.mark.parametrize(
    "before, after", [((), "--use_ema"), ((), "--use_8bit_adam"), (("--use_8bit_adam",), "--no-use_8bit_adam")]
)
def test_a_checkpoint_without_the_state_is_refused(train, before, after):
    """What a checkpoint has no average or moments for cannot go on from it, and is refused in a sentence."""
    train("out", *before, "--checkpointing_steps", 2)
    with pytest.raises(SystemExit, match="use_ema" if "ema" in after else "use_8bit_adam"):
        train("out", *before, after, "--max_train_steps", 6, "--resume_from_checkpoint", "latest")


def test_an_abandoned_end_is_not_mistaken_for_the_new_one(command, refused, out, tmp_path):
    """Going on before the newest checkpoint is refused where it is: `latest` would later find the old end."""
    flags = command(out, "--max_train_steps", 3, "--learning_rate", 1e-3, *RESUME)
    assert "checkpoint-3" in refused(*flags, "checkpoint-1") and whole_checkpoints(out) == [1, 2, 3]
    run(script, *flags, out / "checkpoint-1", "--output_dir", tmp_path / "branch")
    assert whole_checkpoints(tmp_path / "branch") == [2, 3] and whole_checkpoints(out) == [1, 2, 3]


def test_changed_flags_are_listed_and_obeyed(command, out, capsys):
    """A resumed run says what has changed, and takes a new learning rate from its first step on."""
    shutil.rmtree(out / "checkpoint-3")  # else the run refuses to go back, as "latest" would mistake it
    changes = ("--learning_rate", 3e-3, "--max_grad_norm", 0.5, "--adam_weight_decay", 30.0)
    run(script, *command(out, "--max_train_steps", 4, *RESUME, "checkpoint-2", *changes))
    said = capsys.readouterr().out
    listed = set(re.findall(r"--(\w+) was (\S+) and is now (\S+)", said))
    changed = {("learning_rate", "0.0001", "0.003"), ("max_grad_norm", "1.0", "0.5"), ("max_train_steps", "3", "4")}
    changed.add(("adam_weight_decay", "0.01", "30.0"))
    assert {flag for flag in listed if flag[0] != "output_dir"} == changed
    assert metrics(out, "lr") == [(1, 1e-4), (2, 1e-4), (3, 3e-3), (4, 3e-3)]
    assert losses(out / "checkpoint-2") == losses(out / "logs")[:2]
    steps = [weights(out / f"checkpoint-{step}" / "unet") for step in (1, 2, 3)]
    moved = [max(float((b[name] - a[name]).abs().max()) for name in a) for a, b in zip(steps, steps[1:])]
    assert moved[1] > 10 * moved[0]  # Adam's steps are about as long as the learning rate
    sizes = [sum(float(tensor.abs().sum()) for tensor in step.values()) for step in steps]
    assert sizes[1] == pytest.approx(sizes[0], rel=1e-2) and sizes[2] < 0.95 * sizes[1]  # 1 - 3e-3 * 30


def test_what_the_run_worked_out_is_compared_too(command, out, capsys):
    """Another number of processes is listed, and so is a number of steps that another flag gives; the flag is not."""
    shutil.rmtree(out / "checkpoint-3")
    state = json.loads((out / "checkpoint-2" / "state.json").read_text())
    state["settings"]["num_processes"] = 4
    write_state(out / "checkpoint-2", json.dumps(state))
    run(script, *command(out, *RESUME, "checkpoint-2", "--num_train_epochs", 2))
    said = capsys.readouterr().out
    listed = set(re.findall(r"--(\w+) was (\S+) and is now (\S+)", said))
    assert {name for name, *_ in listed} - {"output_dir"} == {"num_processes", "max_train_steps"}
    assert ("num_processes", "4", "1") in listed


@pytest.mark.parametrize("text", ['{"global_step": 3, "args": {}}', "[]", "{", "null"])
def test_a_checkpoint_of_another_version_is_refused(text, command, refused, out):
    """A checkpoint whose state this script cannot read is refused in a sentence."""
    write_state(out / "checkpoint-3", text)
    assert "is of another version of this script" in refused(*command(out, *RESUME, "latest"))


@pytest.mark.parametrize("folder", ["unet", "unet_ema"])
def test_pickled_weights_are_not_read(folder, command, refused, out):
    """Only safetensors are: a checkpoint's .bin in their place is refused."""
    file = out / "checkpoint-3" / folder / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    seal(out / "checkpoint-3")
    said = refused(*command(out, "--max_train_steps", 4, *RESUME, "latest"))
    assert "diffusion_pytorch_model.safetensors" in said and "Traceback" not in said


def write_state(checkpoint, text):
    """Puts another state.json into a checkpoint, which stays whole."""
    (checkpoint / "state.json").write_text(text)
    seal(checkpoint)


def seal(checkpoint):
    """Writes a checkpoint's manifest anew."""
    contents = {name: data for name, data in files_in(checkpoint).items() if name != "manifest.json"}
    manifest = {name: zlib.crc32(data) for name, data in contents.items()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["checkpoint-20", "checkpoint-2"])
def test_a_renamed_checkpoint_is_passed_over(name, command, out, capsys):
    """`latest` goes by the steps that were taken, and not by a name alone."""
    shutil.rmtree(out / "checkpoint-2")
    (out / "checkpoint-1").rename(out / name)
    run(script, *command(out, "--max_train_steps", 4, *RESUME, "latest"))
    assert f"Resuming from {out}/checkpoint-3." in capsys.readouterr().out


def test_an_empty_mark_of_the_end(command, out, capsys):
    """As a power cut may leave it: the checkpoints count."""
    (out / "state.json").write_text("")
    run(script, *command(out, "--max_train_steps", 4, *RESUME, "latest"))
    assert whole_checkpoints(out) == [1, 2, 3, 4]


def test_overwriting_first_takes_away_the_mark_of_the_end(train, monkeypatch):
    """A kill while the rest is deleted leaves no run that says it has ended."""
    out = train("out")
    monkeypatch.setattr(script, "clear_folder", lambda run: sys.exit("killed"))
    with pytest.raises(SystemExit, match="killed"):
        train("out", "--overwrite_output_dir")
    assert not (out / "state.json").exists()


def test_changes_are_listed_after_the_end_too(train, capsys):
    """A flag that comes too late is named."""
    train("out")
    train("out", *LATEST, "--learning_rate", 0.5, "--seed", 2)
    said = capsys.readouterr().out
    assert "--learning_rate was 0.001 and is now 0.5" in said and "--seed was 1 and is now 2" in said
    assert "--resolution" not in said


# What is not saved.


@pytest.mark.parametrize("flags", [(), ("--checkpointing_steps", 2), ("--use_ema",)])
def test_weights_that_are_not_finite_are_not_saved(flags, train, tmp_path):
    """A learning rate that makes them infinite in the last step ends the run, without checkpoint and result."""
    with pytest.raises(SystemExit, match="Step 2 made weights that are not finite"):
        train(
            "out",
            *flags,
            "--max_train_steps",
            2,
            "--lr_scheduler",
            "linear",
            "--lr_warmup_steps",
            1,
            "--learning_rate",
            1e38,
        )
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {".lock", "logs", "samples", "train_args.yaml"}


def test_the_card_shows_no_picture_of_an_abandoned_end(train):
    """Of a run that went back and draws none, the pictures of the steps that it took back are not its own."""
    flags = ("--validation_prompts", "a cat", "--checkpointing_steps", 1)
    out = train("out", *flags, "--max_train_steps", 3, "--validation_steps", 3)
    for step in (2, 3):
        shutil.rmtree(out / f"checkpoint-{step}")
    (out / "state.json").unlink()
    train("out", "--max_train_steps", 3, *LATEST)
    assert "![samples]" not in (out / "README.md").read_text()


# Checkpoints that lie elsewhere, and disks that cannot do all.


def test_links_that_lead_nowhere(train, tmp_path):
    """Neither as the place of the next checkpoint, nor beside the one to go on from."""
    out = train("out", "--max_train_steps", 2, "--checkpointing_steps", 2)
    for step in (1, 3):
        (out / f"checkpoint-{step}").symlink_to("/nowhere")
    train("out", "--max_train_steps", 3, "--checkpointing_steps", 3, *LATEST)
    assert whole_checkpoints(out) == [2, 3]
    shutil.rmtree(out / "checkpoint-3")
    train("out", "--max_train_steps", 3, "--resume_from_checkpoint", out / "checkpoint-2")


def test_a_checkpoint_that_cannot_be_deleted(train, monkeypatch, capsys):
    """A shared disk keeps what another program has open: the run goes on."""
    remove = script.remove

    def busy(path):
        if path.name == "checkpoint-1":
            raise OSError(39, "Directory not empty")
        remove(path)

    monkeypatch.setattr(script, "remove", busy)
    out = train("out", "--max_train_steps", 3, "--checkpointing_steps", 1, "--checkpoints_total_limit", 1)
    assert whole_checkpoints(out) == [1, 3] and "checkpoint-1 could not be deleted" in capsys.readouterr().out


def test_a_disk_that_flushes_no_folders(train, monkeypatch):
    """Some shared disks refuse it; the files are flushed all the same."""
    fsync = os.fsync

    def picky(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(22, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", picky)
    assert whole_checkpoints(train("out", "--checkpointing_steps", 2)) == [2, 4]


def test_the_result_is_on_the_disk_before_the_run_has_ended(train, tmp_path, monkeypatch):
    """When state.json says that the run has ended, no part of the result is still to be written by the system."""
    out, flushed, flush = tmp_path / "out", set(), script.flush

    def note(*paths):
        if not (out / "state.json").exists():
            flushed.update(paths)
        flush(*paths)

    monkeypatch.setattr(script, "flush", note)
    train("out")
    result = {file for file in out.rglob("*") if file.is_file() and "logs" not in file.parts}
    assert result - {out / name for name in (".lock", "state.json", "train_args.yaml")} <= flushed
    assert out in flushed and (out / "state.json").exists()


def test_logs_that_are_removed_before_the_end(train, monkeypatch):
    """The result gets its card without them."""
    save_result = script.save_result

    def save(run, models):
        save_result(run, models)
        shutil.rmtree(Path(run.args.output_dir, "logs"))

    monkeypatch.setattr(script, "save_result", save)
    out = train("out")
    assert "## Load it" in (out / "README.md").read_text() and (out / "state.json").exists()


def test_logs_that_are_removed(train, monkeypatch):
    """Someone who tidies up does not end a run."""
    save_checkpoint = script.save_checkpoint

    def save(run, models):
        save_checkpoint(run, models)
        shutil.rmtree(Path(run.args.output_dir, "logs"))

    monkeypatch.setattr(script, "save_checkpoint", save)
    out = train("out", "--max_train_steps", 3, "--checkpointing_steps", 2)
    assert [step for step, _ in metrics(out, "loss")] == [3] and (out / "state.json").exists()


def test_a_linked_checkpoint_is_pruned_as_a_link(train, tmp_path):
    """A checkpoint that was moved to another disk does not end the run; the link goes, what it names stays."""
    out = train("out", "--max_train_steps", 1, "--checkpointing_steps", 1)
    shutil.move(out / "checkpoint-1", tmp_path / "moved")
    (out / "checkpoint-1").symlink_to(tmp_path / "moved")
    train("out", "--max_train_steps", 2, "--checkpointing_steps", 1, "--checkpoints_total_limit", 1, *LATEST)
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
    assert whole_checkpoints(out) == [2] and (tmp_path / "moved" / "state.json").exists()
