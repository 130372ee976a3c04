"""Kills and stops of all scripts on all families, whose hooks write and read different files: for `make test-all`."""

import os
import random
import signal

import forked
import pytest
import torch
from helpers import flat, linux, litter, make_pictures, metrics, same, save_pairs, weights, write_config


COMMON = "--resolution 32 --train_batch_size 2 --max_train_steps 6 --seed 7 --learning_rate 1e-3 --lr_warmup_steps 2 "
COMMON += "--checkpointing_steps 1 --checkpoints_total_limit 2 --report_to none --resume_from_checkpoint latest "
COMMON += "--output_dir {here}/out --encoding_cache_dir {here}/cache --random_flip "
BASE = "--pretrained_model_name_or_path {base} "
SUBJECT = "--instance_data_dir {data} --instance_prompt sks --with_prior_preservation --class_data_dir {here}/class "
SUBJECT += "--class_prompt a --num_class_images 2 --sample_batch_size 1 --prior_generation_precision fp32 "
PAIRS = "--train_data_dir {pairs} "
FLAGS = {
    "textual_inversion": BASE
    + "--train_data_dir {data} --placeholder_token <new> --initializer_token a --save_steps 4",
    "train_controlnet": BASE + PAIRS + "--use_ema --validation_samples 1",
    "train_dreambooth": BASE + SUBJECT + "--train_text_encoder --snr_gamma 5",
    "train_instruct_pix2pix": BASE
    + PAIRS
    + "--original_image_column conditioning_image --edit_prompt_column text --use_ema "
    "--conditioning_dropout_prob 0.2 --validation_samples 1",
    "train_lora": BASE + SUBJECT + "--train_text_encoder --lora_dropout 0.1 --use_dora",
    "train_text_to_image": BASE + "--train_data_dir {data} --use_ema --validation_samples 1",
    "train_unconditional": "--model_config_name_or_path {config} --train_data_dir {data} --use_ema "
    "--eval_batch_size 0",
}
CASES = [(name, "tiny_model", seed) for name in FLAGS for seed in range(2)]
CASES += [(name, family, 0) for name in list(FLAGS)[:-1] for family in ("tiny_sd2_model", "tiny_sdxl_model")]


def beginner(name, family, request, tmp_path):
    """Returns what starts a run of a script on a family's base in a folder."""
    places = {
        "base": request.getfixturevalue(family),
        "data": make_pictures(tmp_path / "data"),
        "pairs": save_pairs(tmp_path / "pairs", wider=0),
        "config": write_config(tmp_path / "config"),
    }

    def begin(here, **options):
        here.mkdir(exist_ok=True)
        words = (COMMON + FLAGS[name]).format(here=here, **places).split()
        return forked.fork(name, words, here / "log", **options)

    return begin


def assert_same_end(whole, stopped):
    """Asserts that two runs left the same bits, and nothing else."""
    names = sorted(path.name for path in (stopped / "out").glob("checkpoint-*"))
    assert names == ["checkpoint-5", "checkpoint-6"]
    for checkpoint in names:
        states = [
            torch.load(run / "out" / checkpoint / "optimizer.bin", weights_only=True) for run in (whole, stopped)
        ]
        first, second = ({key: torch.as_tensor(v) for key, v in flat(s["state"]).items()} for s in states)
        assert first and same(first, second)
    for logged in ("loss", "lr", "grad_norm", "validation_loss"):
        assert metrics(stopped / "out", logged) == metrics(whole / "out", logged)
    assert same(weights(stopped / "out"), weights(whole / "out"))
    assert litter(stopped / "out") == []


@linux
@pytest.mark.usefixtures("server")
@pytest.mark.slow
@pytest.mark.launch
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name, family, seed", CASES)
def test_kills_do_not_matter_to_any_script(name, family, seed, request, tmp_path):
    """A run that is killed at random changes on the disk, and started again each time, ends as if nothing had been."""
    rng = random.Random(f"{name} {family} {seed}")
    begin = beginner(name, family, request, tmp_path)
    whole, killed, kills = tmp_path / "whole", tmp_path / "killed", 0
    assert begin(whole).wait() == 0, (whole / "log").read_text()
    for _ in range(12):
        process = begin(killed, watched=killed, trigger=(".", rng.randint(1, 50), ("kill", 0)))
        code = process.wait()
        assert code in (0, -signal.SIGKILL), process.output()
        kills += code != 0
    assert begin(killed).wait() == 0, (killed / "log").read_text()
    print(f"{kills} kills")
    assert kills >= 6
    assert_same_end(whole, killed)


@linux
@pytest.mark.usefixtures("server")
@pytest.mark.slow
@pytest.mark.launch
@pytest.mark.parametrize("name, family", sorted({case[:2] for case in CASES}))
def test_a_signal_does_not_matter_to_any_script(name, family, request, tmp_path):
    """A run that SIGTERM stops between two steps ends, when it goes on, as if nothing had been."""
    begin = beginner(name, family, request, tmp_path)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert begin(whole).wait() == 0, (whole / "log").read_text()
    process, log = begin(stopped), stopped / "out" / "logs" / "metrics.jsonl"
    process.until(lambda: log.exists() and '"loss"' in log.read_text())
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM, process.output()
    assert begin(stopped).wait() == 0, (stopped / "log").read_text()
    assert_same_end(whole, stopped)
