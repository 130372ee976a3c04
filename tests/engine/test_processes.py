"""Several processes: they train as one does, one of them writes, and launches that cannot work are refused."""

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    ENDLESS,
    ENVIRONMENT,
    RANDOM,
    ROOT,
    cosine,
    drift,
    everything,
    files_in,
    finish,
    flags_of,
    in_epochs,
    launch,
    logged,
    make_run,
    metrics,
    run,
    same,
    start_ranks,
    weights,
)
from PIL import Image

import train_text_to_image as script


@pytest.mark.launch
def test_two_processes_are_one(tiny_model, five_pictures, tmp_path):
    """Two processes train as one does: own noise, summed gradients, steps from epochs, grids."""
    flags = ("--train_data_dir", five_pictures, *RANDOM, "--gradient_accumulation_steps", 2, "--num_train_epochs", 5)
    flags += ("--lr_scheduler", "cosine", "--lr_warmup_steps", 2, "--validation_samples", 1, "--validation_steps", 3)
    flags += ("--validation_prompts", "red", "green", "blue")
    one, two = tmp_path / "one", tmp_path / "two"
    run(script, *in_epochs(flags_of(tiny_model, five_pictures, one, *flags, "--train_batch_size", 2)))
    said = launch(2, *in_epochs(flags_of(tiny_model, five_pictures, two, *flags, "--train_batch_size", 1)))
    assert [step for step, _ in metrics(two, "validation_loss")] == [0, 3, 5]
    for grid in ("step-000000.png", "step-000003.png", "step-000005.png"):
        first, second = (np.asarray(Image.open(out / "samples" / grid), dtype=int) for out in (one, two))
        assert np.abs(first - second).max() <= (0 if grid == "step-000000.png" else 3), grid
    for name in ("loss", "grad_norm", "validation_loss"):
        assert metrics(two, name) == [(step, pytest.approx(value, rel=1e-4)) for step, value in metrics(one, name)]
    rates = [(i + 1, pytest.approx(1e-3 * cosine(i, 2, 5))) for i in range(5)]
    assert metrics(one, "lr") == rates and metrics(two, "lr") == rates
    assert drift(one, two, tiny_model) < 1e-3
    assert said.count("The result is in") == 1


@pytest.mark.slow
@pytest.mark.launch
def test_ranks_on_two_machines(tiny_model, pictures, tmp_path):
    """Two ranks have copies of the pictures, with other times, and a cache each; they start a second time as well.

    What was checked, rank 0 knows for both. Each fills its own cache, as it shares no disk.
    """
    for rank in range(2):
        shutil.copytree(pictures, tmp_path / str(rank) / "pictures")
        for file in (tmp_path / str(rank) / "pictures").iterdir():
            os.utime(file, (rank, rank))
    wrapper = tmp_path / "wrapper.py"
    lines = ["import os, runpy, socket, sys", f"os.chdir({str(tmp_path)!r} + '/' + os.environ['RANK'])"]
    lines += ["os.environ['XDG_CACHE_HOME'] = os.getcwd()", "socket.gethostname = lambda: os.environ['RANK']"]
    wrapper.write_text(
        "\n".join([*lines, f"runpy.run_path({str(ROOT / 'train_text_to_image.py')!r}, None, '__main__')"])
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(wrapper)]
    for out in (tmp_path / "first", tmp_path / "second"):
        flags = flags_of(tiny_model, "pictures", out, "--max_train_steps", 1)
        environment = ENVIRONMENT | {"ACCELERATE_USE_CPU": "true"}
        done = subprocess.run([*command, *flags], env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
    entries = [files_in(tmp_path / str(rank) / "diffusion-training" / "prompts") for rank in range(2)]
    assert entries[0] and entries[0] == entries[1]


@pytest.mark.launch
def test_resuming_is_exact_on_three_processes(start, dropout_model, five_pictures, tmp_path):
    """Three processes that are stopped and resumed end with the bits of those that were not."""
    flags = ("--max_train_steps", 4, "--checkpointing_steps", 2, "--train_batch_size", 1, *RANDOM)
    flags += ("--gradient_accumulation_steps", 2, "--lr_scheduler", "cosine", "--validation_samples", 1)
    finish(start, flags_of(dropout_model, five_pictures, tmp_path / "whole", *flags), 3)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    flags += ("--resume_from_checkpoint", "latest")
    finish(start, flags_of(dropout_model, five_pictures, tmp_path / "resumed", *flags), 3)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert same(everything(resumed / "checkpoint-4"), everything(whole / "checkpoint-4"))
    assert same(weights(resumed / "unet"), weights(whole / "unet"))
    assert logged(resumed) == logged(whole) and len(metrics(whole, "loss")) == 4


def test_a_state_without_models(tiny_model, pictures, tmp_path):
    """Where accelerate hands the hooks no weights, as DeepSpeed makes it do, saving and loading work."""
    accelerator = make_run(script, script.parse_args(flags_of(tiny_model, pictures, tmp_path / "out"))).accelerator
    accelerator.save_state(tmp_path / "state")
    accelerator.load_state(tmp_path / "state")
    assert {file.name for file in (tmp_path / "state").iterdir()} == {"random_states_0.pkl"}


@pytest.mark.launch
def test_rank_0_alone_writes(start, command, tmp_path):
    """Of two ranks one changes the output folder, and both draw the grids."""
    out = tmp_path / "out"
    flags = ("--max_train_steps", 2, "--checkpointing_steps", 1, "--checkpoints_total_limit", 1)
    flags += ("--validation_prompts", "red", "green", "blue", "--report_to", "tensorboard")
    ranks = start_ranks(functools.partial(start, watched=out), command(out, *flags), 2)
    assert [process.wait() for process in ranks] == [0, 0], ranks[0].output() + ranks[1].output()
    first, second = (Path(f"{process.log}.changes").read_text() for process in ranks)
    assert f"shutil.rmtree {out}/checkpoint-1\n" in first and f"{out}/unet/" in first
    assert second == ""
    assert re.search(r"sampling: .* 1/2 ", ranks[0].output())  # two of the three are its own


@pytest.mark.launch
@pytest.mark.skipif(torch.cuda.is_available(), reason="there, two processes know of each other")
def test_processes_that_do_not_know_of_each_other_are_refused(start, command, tmp_path):
    """Two lone runs in one folder are refused, with the command that makes them one run."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    process = start(command(tmp_path / "out", *ENDLESS), launcher)
    assert process.wait() == 1
    assert "2 processes" in process.output() and "ACCELERATE_USE_CPU=true" in process.output()
    assert not (tmp_path / "out").exists()


# What a launcher's configuration may change.


@pytest.mark.launch
@pytest.mark.parametrize("name", ["FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_other_kinds_of_parallelism_are_refused(name, start, command, tmp_path):
    """A launcher's FSDP, under which a save by one rank waits for ever, and its like are refused at the start."""
    process = start(command(tmp_path / "out"), environment={f"ACCELERATE_USE_{name}": "true"})
    assert process.wait() == 1 and f"{name} is not supported" in process.output()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name, value",
    [
        ("ACCELERATE_MIXED_PRECISION", "half"),
        ("ACCELERATE_MIXED_PRECISION", "FP8"),
        ("ACCELERATE_DYNAMO_BACKEND", "nonsense"),
        ("ACCELERATE_USE_CPU", "maybe"),
        ("ACCELERATE_USE_DEEPSPEED", "true"),
    ],
)
def test_a_launchers_nonsense_is_refused(name, value, train, monkeypatch):
    """It is said in a sentence, before anything is loaded."""
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="The launcher's (precision|settings)"):
        train("out")


def test_deepspeed_in_bf16_is_refused(train, monkeypatch):
    """Its engine turns autocast off, and of the precisions that need it, casts inputs in fp16 alone."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(SystemExit, match="DeepSpeed .* give --mixed_precision fp16 or no"):
        train("out", "--mixed_precision", "bf16")


def test_processes_of_an_earlier_launch(train, monkeypatch, tmp_path):
    """A number of processes that is left in the environment leaves no gap in the cache."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    out = train("out", "--encoding_cache_dir", tmp_path / "cache")
    assert len(metrics(out, "loss")) == 4


@pytest.mark.launch
def test_a_launchers_fp8_is_refused(start, command, tmp_path):
    """It is told how to ask for another precision, and a flag wins."""
    fp8 = {"ACCELERATE_MIXED_PRECISION": "fp8"}
    process = start(command(tmp_path / "out"), environment=fp8)
    assert process.wait() == 1 and "--mixed_precision bf16" in process.output()
    process = start(command(tmp_path / "out", "--mixed_precision", "no", "--max_train_steps", 1), environment=fp8)
    assert process.wait() == 0 and "precision no" in process.output()


@pytest.mark.parametrize("flag, launchers", [(2, "1"), (1, "2")])
def test_the_flag_for_accumulation_wins(flag, launchers, train, monkeypatch):
    """The launcher's number of accumulated passes neither changes the weights nor the header's sentence."""
    flags = ("--gradient_accumulation_steps", flag, "--max_train_steps", 3)
    plain = weights(train("plain", *flags) / "unet")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", launchers)
    assert same(weights(train("out", *flags) / "unet"), plain)


def test_a_launchers_compiler_is_named(train, monkeypatch, capsys):
    """What torch.compile is given stands in the header."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
    train("out", "--max_train_steps", 1)
    assert "precision no, compiled by eager" in capsys.readouterr().out
