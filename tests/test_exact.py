"""What train_text_to_image.py promises of its numbers: their values, what they depend on, that resuming is exact."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, make_pictures, metrics, run, same, weights
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

import train_text_to_image as script


SMALL = "--resolution 32 --train_batch_size 2 --max_train_steps 4 --seed 1 --learning_rate 1e-3 --lr_warmup_steps 0"
FLAGS = (*SMALL.split(), "--center_crop", "--checkpointing_steps", 0, "--report_to", "none")
# Whatever draws something, but for crops, which are fixed as the pictures are square.
RANDOM = ("--random_flip", "--proportion_empty_prompts", 0.3, "--use_ema")
LONG = (*RANDOM, "--max_train_steps", 12)  # long enough that latents are cached


def flags_of(model, data, out, *flags):
    """The command line of a small run, as text."""
    places = ("--pretrained_model_name_or_path", model, "--train_data_dir", data, "--output_dir", out)
    return [str(flag) for flag in (*FLAGS, *places, *flags)]


@pytest.fixture
def train(tiny_model, pictures, tmp_path, monkeypatch):
    """A function that trains in this process, into a named folder that it returns; later flags win."""
    monkeypatch.setattr(script, "VALIDATION_STEPS", 2)

    def call(name, *flags):
        run(script, *flags_of(tiny_model, pictures, tmp_path / name, *flags))
        return tmp_path / name

    return call


@pytest.fixture(scope="session")
def dropout_model(tiny_model):
    """The tiny model with dropout in its UNet, which draws from the global generator."""
    folder = shutil.copytree(tiny_model, tiny_model.with_name("tiny-dropout"))
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dropout": 0.1}))
    return folder


@pytest.fixture(scope="session")
def five_pictures(tmp_path_factory):
    """Five pictures, so that epochs end inside of steps and batches."""
    return make_pictures(tmp_path_factory.mktemp("data") / "five", count=5)


@pytest.fixture(scope="session")
def wide_pictures(tmp_path_factory):
    """Five pictures that are wider than high, so that crops are drawn."""
    folder = make_pictures(tmp_path_factory.mktemp("data") / "wide", count=5)
    for file in folder.glob("*.[jp]*g"):
        Image.open(file).resize((72, 48)).save(file)
    return folder


@pytest.fixture(scope="module")
def plain_run(tiny_model, dropout_model, pictures, tmp_path_factory):
    """One run with every kind of draw, which others are compared with."""
    out = tmp_path_factory.mktemp("plain") / "out"
    run(script, *flags_of(dropout_model, pictures, out, *LONG))
    return out


def make_samples(folder, *flags, seed=1):
    """The samples of a folder of pictures, as the script would draw them."""
    args = script.parse_args(flags_of(folder, folder, "unused", *flags))
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    records = []
    for row in rows:
        name, size = str(folder / row["file_name"]), Image.open(folder / row["file_name"]).size
        captions = [row["text"], f"again {row['text']}"]
        records.append({"name": name, "rows": None, "captions": captions, "digest": name, "size": size})
    return script.Samples(args, records, seed, (4, 16, 16), 1000)


def equal(first, second):
    """Whether two samples hold the same values under the same names."""
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


def drift(first, second, base):
    """How far apart two trained UNets are, as a fraction of how far the first has come from the base."""
    first, second, base = (weights(folder / "unet") for folder in (first, second, base))
    apart = math.fsum((first[name] - second[name]).double().square().sum() for name in base)
    come = math.fsum((first[name] - base[name]).double().square().sum() for name in base)
    return math.sqrt(apart / come)


def flat(state, prefix=""):
    """The values of nested dictionaries and lists, by path."""
    if not isinstance(state, (dict, list)):
        return {prefix: state}
    items = state.items() if isinstance(state, dict) else enumerate(state)
    return {path: leaf for name, value in items for path, leaf in flat(value, f"{prefix}/{name}").items()}


def everything(checkpoint):
    """All tensors of a checkpoint: the models', and the optimizer's with its other numbers."""
    state = flat(torch.load(checkpoint / "optimizer.bin", weights_only=True)["state"])
    assert sum(torch.is_tensor(value) for value in state.values()) > 100
    return weights(checkpoint) | {path: torch.as_tensor(v) for path, v in state.items() if not isinstance(v, str)}


def logged(out):
    """All logged numbers that are not about time or memory."""
    return [metrics(out, name) for name in ("loss", "lr", "grad_norm", "validation_loss")]


def count_calls(monkeypatch, cls, method):
    """Count the calls of a method, which still does its work; returns the growing list of their first arguments."""
    calls, original = [], getattr(cls, method)

    def counting(self, *args, **kwargs):
        calls.append(args[0] if args else kwargs)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(cls, method, counting)
    return calls


def count_steps(monkeypatch):
    """Count the forward passes that are trained on; returns the growing list of their batches."""
    batches, original = [], script.compute_loss

    def counting(models, batch, args):
        batches.append(batch)
        return original(models, batch, args)

    monkeypatch.setattr(script, "compute_loss", counting)
    return batches


def cosine(step, warmup, total):
    """The learning rate that cosine decay with linear warmup gives a step, as a fraction of the highest."""
    return step / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


# Numbers


PINNED = {"plain": [1.221938, 1.008296, 0.843361, 0.776834], "many": [0.114014, 0.223919, 0.153180, 0.018070]}


def test_pinned_losses(train, wide_pictures, tiny_v_model):
    """The first losses of two seeded runs are what they were when this was written, so no change is silent."""
    plain = train("plain")
    assert [loss for _, loss in metrics(plain, "loss")] == pytest.approx(PINNED["plain"], rel=1e-4)
    flags = ("--pretrained_model_name_or_path", tiny_v_model, "--train_data_dir", wide_pictures, "--no-center_crop")
    flags += ("--snr_gamma", 5, "--noise_offset", 0.1, "--input_perturbation", 0.1, "--gradient_accumulation_steps", 2)
    many = train("many", *RANDOM, *flags)
    assert [loss for _, loss in metrics(many, "loss")] == pytest.approx(PINNED["many"], rel=1e-4)


def test_the_loop_by_hand(train, tiny_model, monkeypatch):
    """Losses, norms, rates and weights are those of a plain loop: mean over micro-steps, clipping, AdamW, cosine."""
    batches = count_steps(monkeypatch)
    flags = (
        "--train_batch_size",
        1,
        "--gradient_accumulation_steps",
        2,
        "--max_train_steps",
        5,
        "--max_grad_norm",
        0.5,
    )
    flags += ("--adam_beta1", 0.8, "--adam_beta2", 0.95, "--adam_epsilon", 1e-6, "--adam_weight_decay", 1.0)
    out = train("out", *flags, "--lr_scheduler", "cosine", "--lr_warmup_steps", 2)
    unet = UNet2DConditionModel.from_pretrained(tiny_model / "unet").train()
    scheduler = DDPMScheduler.from_pretrained(tiny_model / "scheduler")
    scaling_factor = AutoencoderKL.from_pretrained(tiny_model / "vae").config.scaling_factor
    settings = {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 1.0}
    optimizer = torch.optim.AdamW(unet.parameters(), **settings, foreach=False, fused=False)
    losses, norms, rates = [], [], []
    for step in range(5):
        total = 0
        for batch in batches[2 * step : 2 * step + 2]:
            latents = (batch["mean"] + batch["std"] * batch["posterior_noise"]) * scaling_factor
            noisy = scheduler.add_noise(latents, batch["noise"], batch["timesteps"])
            prediction = unet(noisy, batch["timesteps"], batch["encoder_hidden_states"]).sample
            total = total + F.mse_loss(prediction, batch["noise"]) / 2
        total.backward()
        losses.append(total.item())
        norms.append(torch.nn.utils.clip_grad_norm_(unet.parameters(), 0.5).item())
        rates.append(1e-3 * cosine(step, 2, 5))
        optimizer.param_groups[0]["lr"] = rates[-1]
        optimizer.step()
        optimizer.zero_grad()
    assert min(norms) > 0.5  # else nothing was clipped
    unet.save_pretrained(out.with_name("hand") / "unet")
    for name, wanted in (("loss", losses), ("grad_norm", norms), ("lr", rates)):
        assert metrics(out, name) == [(i + 1, pytest.approx(value, rel=1e-4)) for i, value in enumerate(wanted)]
    assert len(batches) == 10
    assert drift(out, out.with_name("hand"), tiny_model) < 1e-4


@pytest.mark.parametrize("flags", [(), ("--foreach_ema",), ("--offload_ema",)], ids=["plain", "foreach", "offload"])
def test_ema_follows_its_formula(train, tiny_model, flags):
    """The average after step t has moved to the weights by 1 - (1 + t) / (10 + t), and is what the pipeline gets."""
    out = train("out", "--use_ema", "--checkpointing_steps", 1, "--max_train_steps", 5, *flags)
    average = weights(tiny_model / "unet")
    for step in range(5):
        trained, saved = (weights(out / f"checkpoint-{step + 1}" / name) for name in ("unet", "unet_ema"))
        decay = (1 + step) / (10 + step) if step else 0.0
        average = {name: decay * average[name] + (1 - decay) * trained[name] for name in trained}
        for name in average:
            torch.testing.assert_close(saved[name], average[name], rtol=1e-6, atol=1e-7)
    assert same(weights(out / "unet"), saved) and not same(saved, trained)


def test_gradients_are_clipped(train, tiny_model):
    """The norm to clip at reaches the weights, while the norm that is logged is the unclipped one."""
    clipped, free = train("clipped", "--max_grad_norm", 1e-12), train("free", "--max_grad_norm", 1.0)
    assert metrics(clipped, "grad_norm")[0] == metrics(free, "grad_norm")[0]
    assert drift(free, clipped, tiny_model) > 0.5


def test_a_picture_is_learned(train, tmp_path, tiny_model):
    """Sixty steps on a picture lower its loss on fixed noise, measured on a held-out copy and by a hand-made loop."""
    data = make_pictures(tmp_path / "one", count=1)
    shutil.copy(data / "000.png", data / "001.png")
    with open(data / "metadata.jsonl", "a") as rows:
        rows.write(json.dumps({"file_name": "001.png", "text": "a red circle 1"}) + "\n")
    flags = ("--train_data_dir", data, "--max_train_steps", 60, "--validation_samples", 1, "--validation_steps", 60)
    out = train("out", *flags)
    (first, before), (last, after) = metrics(out, "validation_loss")
    assert (first, last) == (0, 60) and after < 0.7 * before
    losses = [loss for _, loss in metrics(out, "loss")]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])


def test_accumulation_is_a_larger_batch(train, tiny_model):
    """Two accumulated batches of one are one batch of two."""
    one = train("one", "--train_batch_size", 1, "--gradient_accumulation_steps", 2)
    two = train("two", "--train_batch_size", 2, "--gradient_accumulation_steps", 1)
    assert metrics(one, "loss") == [(step, pytest.approx(loss, rel=1e-5)) for step, loss in metrics(two, "loss")]
    assert metrics(one, "lr") == metrics(two, "lr") and len(metrics(one, "loss")) == 4
    assert drift(one, two, tiny_model) < 1e-3


@pytest.mark.parametrize("scheduler", ["constant", "linear", "cosine", "constant_with_warmup"])
def test_learning_rates(train, scheduler):
    """The schedule counts optimizer steps, whatever the accumulation, and ends with the run."""
    flags = ("--lr_scheduler", scheduler, "--lr_warmup_steps", 2, "--max_train_steps", 6)
    out = train("out", *flags, "--train_batch_size", 1, "--gradient_accumulation_steps", 3)
    warm = [0.0, 0.5]
    wanted = {
        "constant": [1.0] * 6,
        "linear": warm + [1.0, 0.75, 0.5, 0.25],
        "cosine": [cosine(step, 2, 6) for step in range(6)],
        "constant_with_warmup": warm + [1.0] * 4,
    }[scheduler]
    assert metrics(out, "lr") == [(i + 1, pytest.approx(1e-3 * rate)) for i, rate in enumerate(wanted)]


def test_scale_lr(train, tiny_model):
    """--scale_lr multiplies the learning rate by the total batch size, and does nothing else."""
    flags = ("--train_batch_size", 2, "--gradient_accumulation_steps", 2, "--max_train_steps", 2)
    scaled = train("scaled", *flags, "--scale_lr", "--learning_rate", 2.5e-4)
    assert same(weights(scaled / "unet"), weights(train("given", *flags, "--learning_rate", 1e-3) / "unet"))
    assert metrics(scaled, "lr")[0] == (1, pytest.approx(1e-3))


@pytest.mark.parametrize("flags", [("--gradient_checkpointing",), ("--enable_xformers_memory_efficient_attention",)])
def test_savings_change_nothing(train, tiny_model, flags):
    """What saves memory or time changes the weights by rounding at most."""
    plain, saving = train("plain"), train("saving", *flags)
    assert drift(plain, saving, tiny_model) < 1e-3


# Resuming


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


def test_dropout_draws(train, plain_run, tiny_model):
    """Dropout is on while training, or the tests above would prove less than they say."""
    without = train("without", *LONG, "--pretrained_model_name_or_path", tiny_model)
    assert metrics(without, "loss")[0] != metrics(plain_run, "loss")[0]


def test_resuming_a_finished_run(train, monkeypatch):
    """A run that is resumed after its end takes no step, or those after its last checkpoint."""
    for name, steps, every, tail in (("at-end", 4, 2, 0), ("later", 5, 2, 1)):
        flags = (*RANDOM, "--max_train_steps", steps, "--checkpointing_steps", every)
        out = train(name, *flags)
        before, rows = weights(out / "unet"), logged(out)
        batches = count_steps(monkeypatch)
        train(name, *flags, "--resume_from_checkpoint", "latest")
        assert len(batches) == tail
        assert same(weights(out / "unet"), before) and logged(out) == rows
        assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
        monkeypatch.undo()


def test_resuming_prepares_no_picture_that_it_skips(train, monkeypatch):
    """A resumed run resizes and crops the pictures of the steps that are left, and no others."""
    flags = ("--no_encoding_cache", "--max_train_steps", 5, "--checkpointing_steps", 4)
    train("out", *flags)
    prepared = count_calls(monkeypatch, script.Samples, "pixels")
    train("out", *flags, "--resume_from_checkpoint", "latest")
    assert len(prepared) == 2  # one batch


@pytest.mark.parametrize(
    "before, after", [((), "--use_ema"), ((), "--use_8bit_adam"), (("--use_8bit_adam",), "--no-use_8bit_adam")]
)
def test_a_checkpoint_without_the_state_is_refused(train, before, after):
    """What a checkpoint has no average or moments for cannot go on from it, and is refused in a sentence."""
    train("out", *before, "--checkpointing_steps", 2)
    with pytest.raises(SystemExit, match="use_ema" if "ema" in after else "use_8bit_adam"):
        train("out", *before, after, "--max_train_steps", 6, "--resume_from_checkpoint", "latest")


# What must not matter


@pytest.mark.parametrize(
    "flags",
    [
        "--dataloader_num_workers 2",
        "--no_encoding_cache",
        "--report_to tensorboard",
        "--checkpointing_steps 3 --checkpoints_total_limit 1",
        "--validation_prompts red blue --validation_steps 5",
        "--allow_tf32",
        "--tracker_project_name other --logging_dir elsewhere",
    ],
)
def test_what_must_not_matter(train, dropout_model, plain_run, flags):
    """Workers, cache, trackers, checkpoints and validation change no bit of the weights."""
    out = train("out", "--pretrained_model_name_or_path", dropout_model, *LONG, *flags.split())
    assert same(weights(out / "unet"), weights(plain_run / "unet"))
    if "elsewhere" not in flags:
        assert logged(out) == logged(plain_run)


def test_validation_loss_changes_no_weight(train, dropout_model):
    """Measuring the held-out loss at every step or at the ends only gives the same weights, and the same numbers."""
    flags = ("--pretrained_model_name_or_path", dropout_model, *RANDOM, "--validation_samples", 2)
    often = train("often", *flags, "--validation_steps", 1, "--validation_prompts", "red")
    rarely = train("rarely", *flags, "--validation_steps", 4)
    assert same(weights(often / "unet"), weights(rarely / "unet"))
    assert [step for step, _ in metrics(often, "validation_loss")] == [0, 1, 2, 3, 4]
    assert metrics(often, "validation_loss")[::4] == metrics(rarely, "validation_loss")


def test_state_of_the_cache(train, dropout_model, plain_run, tmp_path):
    """A cold cache, a warm one, one with torn files and one that another run began give the same weights."""
    cache = tmp_path / "cache"
    flags = ("--pretrained_model_name_or_path", dropout_model, *LONG, "--encoding_cache_dir", cache)
    wanted = weights(plain_run / "unet")
    assert same(weights(train("cold", *flags) / "unet"), wanted)
    entries = {file: file.read_bytes() for part in ("latents", "prompts") for file in (cache / part).iterdir()}
    assert len(entries) > 15
    assert same(weights(train("warm", *flags) / "unet"), wanted)
    for i, (file, data) in enumerate(entries.items()):
        file.write_bytes(data[: (0, 4, -1)[i % 3]])
    assert same(weights(train("torn", *flags) / "unet"), wanted)
    assert all(file.read_bytes() == data for file, data in entries.items())
    # Another run of fewer pictures writes the same bits for what both visit.
    shutil.rmtree(cache)
    train("fewer", *flags, "--max_train_samples", 2)
    both = [file for file in entries if file.exists()]
    assert len(both) > 3 and all(file.read_bytes() == entries[file] for file in both)
    assert same(weights(train("begun", *flags) / "unet"), wanted)


def test_stale_entries_are_not_taken(train, pictures, tiny_model, tmp_path):
    """An entry is of one picture's bytes, filter, size and encoder: what changes one of them is computed anew."""
    data, model = shutil.copytree(pictures, tmp_path / "data"), shutil.copytree(tiny_model, tmp_path / "model")
    shared = ("--train_data_dir", data, "--pretrained_model_name_or_path", model, "--max_train_steps", 6)
    train("first", *shared, "--encoding_cache_dir", tmp_path / "cache")

    def change_picture():
        names = sorted(data.glob("*.png"))[:2]
        first, second = (file.read_bytes() for file in names)
        names[0].write_bytes(second)
        names[1].write_bytes(first)

    def change_weights(part):
        (file,) = (model / part).glob("*.safetensors")
        tensors = {name: tensor * 1.01 for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})

    changes = {
        "filter": (("--image_interpolation_mode", "nearest"), lambda: None),
        "resolution": (("--resolution", 48), lambda: None),
        "picture": ((), change_picture),
        "vae": ((), lambda: change_weights("vae")),
        "text": ((), lambda: change_weights("text_encoder")),
    }
    last = weights(tmp_path / "first" / "unet")
    for name, (flags, change) in changes.items():
        change()
        warm = train(f"{name}-warm", *shared, *flags, "--encoding_cache_dir", tmp_path / "cache")
        off = train(f"{name}-off", *shared, *flags, "--no_encoding_cache")
        assert same(weights(warm / "unet"), weights(off / "unet")), name
        assert not same(weights(warm / "unet"), last), name
        last = weights(warm / "unet")


def test_a_sample_is_its_keys(wide_pictures):
    """A sample is a function of seed and key: not of what was drawn before, nor of its batch-mates or the worker."""
    flags = ("--random_flip", "--no-center_crop", "--proportion_empty_prompts", 0.3)
    samples, keys = make_samples(wide_pictures, *flags), [(epoch, index) for epoch in range(4) for index in range(5)]
    alone = {key: samples[key] for key in keys}
    fresh = make_samples(wide_pictures, *flags)
    assert all(equal(fresh[key], alone[key]) for key in reversed(keys))
    loader = torch.utils.data.DataLoader(samples, batch_sampler=[keys[3:14:5], keys[::-1]], num_workers=1)
    for batch, names in zip(loader, (keys[3:14:5], keys[::-1])):
        for i, key in enumerate(names):
            assert equal({name: values[i] for name, values in batch.items()}, alone[key])
    # Every draw differs between keys, between seeds, and from the sample's other draws.
    other = make_samples(wide_pictures, *flags, seed=2)
    for name in ("noise", "perturbation", "posterior_noise", "offset_noise"):
        drawn = {sample[name].tobytes() for sample in (*alone.values(), *(other[key] for key in keys))}
        assert len(drawn) == 40, name
    assert len({sample["timesteps"] for sample in alone.values()}) > 15
    assert len({alone[0, 0][name].tobytes() for name in ("noise", "perturbation", "posterior_noise")}) == 3


def test_a_flag_that_is_off_shifts_nothing(wide_pictures):
    """Crops, flips and caption dropout change their own part of a sample, and no other draw."""
    keys = [(epoch, index) for epoch in range(6) for index in range(5)]
    plain = {key: make_samples(wide_pictures)[key] for key in keys}
    changed = {
        ("--random_flip",): {"pixel_values"},
        ("--no-center_crop",): {"pixel_values", "time_ids"},
        ("--proportion_empty_prompts", 0.5): {"caption"},
        ("--noise_offset", 0.1, "--input_perturbation", 0.1): set(),
    }
    for flags, names in changed.items():
        bent = {key: make_samples(wide_pictures, *flags)[key] for key in keys}
        differing = {
            name for key in keys for name in plain[key] if not np.array_equal(bent[key][name], plain[key][name])
        }
        assert differing == names, flags
    flipped, dropped = (
        {key: make_samples(wide_pictures, *flags)[key] for key in keys} for flags in list(changed)[::2]
    )
    mirrored = [key for key in keys if not np.array_equal(flipped[key]["pixel_values"], plain[key]["pixel_values"])]
    assert all(torch.equal(flipped[key]["pixel_values"].flip(2), plain[key]["pixel_values"]) for key in mirrored)
    assert 8 <= len(mirrored) <= 22
    empty = [key for key in keys if dropped[key]["caption"] == ""]
    assert 8 <= len(empty) <= 22 and set(empty) != set(mirrored)
    assert all(dropped[key]["caption"] == plain[key]["caption"] for key in keys if key not in empty)
    assert {plain[key]["caption"].startswith("again") for key in keys} == {True, False}


def test_draws_are_distributed_as_they_should_be(wide_pictures):
    """Noises are normal and timesteps uniform over all of the schedule, first and last included."""
    samples = make_samples(wide_pictures)
    drawn = [samples[epoch, index] for epoch in range(100) for index in range(5)]
    for name in ("noise", "perturbation", "posterior_noise", "offset_noise"):
        values = np.stack([sample[name] for sample in drawn])
        assert values.dtype == np.float32
        assert max(abs(values.mean()), abs(values.std() - 1)) < 4 / math.sqrt(values.size), name
    timesteps = np.array([sample["timesteps"] for sample in drawn])
    assert timesteps.min() >= 0 and timesteps.max() <= 999
    assert (np.histogram(timesteps, bins=10, range=(0, 1000))[0] > 25).all()
    short = make_samples(wide_pictures)
    short.num_train_timesteps = 2
    assert {int(short[epoch, 0]["timesteps"]) for epoch in range(20)} == {0, 1}


def test_encoders_take_one_input_at_a_time(tiny_model, monkeypatch):
    """Latents and embeddings are the same bits whatever else is in the call."""
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model)
    models = script.name_parts(pipeline)
    pixels = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    prompts = ["a", "a red circle", "", "something else that is rather longer than the others"]
    with torch.no_grad():
        together = script.encode_pixels(pipeline.vae, pixels)
        texts = script.encode_prompts(models, prompts)
        assert together.keys() == {"mean", "std"} and together["mean"].shape == (5, 4, 16, 16)
        for i in range(5):
            alone = script.encode_pixels(pipeline.vae, pixels[i : i + 1])
            assert all(torch.equal(alone[name][0], together[name][i]) for name in together)
        for i, prompt in enumerate(prompts):
            alone = script.encode_prompts(models, [prompt])
            assert torch.equal(alone["encoder_hidden_states"][0], texts["encoder_hidden_states"][i])
        wanted = pipeline.encode_prompt(prompts[1], "cpu", 1, False)[0]
    torch.testing.assert_close(texts["encoder_hidden_states"][1:2], wanted)


@pytest.mark.parametrize("total, size", [(2, 5), (4, 5), (5, 5), (16, 5), (3, 1), (1, 7)])
def test_step_keys(total, size):
    """Steps take total_batch_size keys each from permutations that follow each other without a gap or a repeat."""
    steps = [script.step_keys(step, total_batch_size=total, size=size, seed=1) for step in range(3 * size)]
    assert all(len(keys) == total for keys in steps)
    stream = [key for keys in steps for key in keys]
    epochs = [stream[i : i + size] for i in range(0, len(stream), size)]
    assert len(epochs) == 3 * total
    for epoch, keys in enumerate(epochs):
        assert sorted(keys) == [(epoch, index) for index in range(size)]
    # The stream does not know how it is cut into steps, and so not on how many processes it is consumed.
    assert stream == [script.step_keys(i, total_batch_size=1, size=size, seed=1)[0] for i in range(len(stream))]
    if size >= 5:
        assert len({tuple(index for _, index in keys) for keys in epochs}) > 1
        assert stream != [key for i in range(3 * size) for key in script.step_keys(i, total, size, 2)]


@pytest.mark.parametrize("size, accumulation", [(7, 1), (2, 2)])
def test_batches_are_whole(train, five_pictures, monkeypatch, size, accumulation):
    """Five pictures feed batches of seven, or two batches of two a step: whole, and each as often."""
    batches = count_steps(monkeypatch)
    flags = ("--train_batch_size", size, "--gradient_accumulation_steps", accumulation, "--max_train_steps", 5)
    out = train("out", "--train_data_dir", five_pictures, *flags)
    assert [len(batch["timesteps"]) for batch in batches] == [size] * 5 * accumulation
    counts = Counter(caption for batch in batches for caption in batch["caption"])
    assert [*counts.values()] == [size * accumulation] * 5
    assert len(metrics(out, "loss")) == 5


# Work that is done once


def test_encoders_run_once_an_input(train, monkeypatch, pictures):
    """A run encodes each variant and caption that it visits once, and the next run none of them."""
    images, texts = (
        count_calls(monkeypatch, AutoencoderKL, "encode"),
        count_calls(monkeypatch, CLIPTextModel, "forward"),
    )
    cache = pictures.parent / "cache-once"
    flags = ("--random_flip", "--max_train_steps", 15, "--encoding_cache_dir", cache)
    samples = make_samples(pictures, *flags)
    visited = [samples[key] for step in range(15) for key in script.step_keys(step, 2, 6, 1)]
    variants = {sample["pixel_values"].numpy().tobytes() for sample in visited}
    assert 6 < len(variants) < 12  # else this would not show that only what is visited is cached
    first = train("first", *flags)
    assert (len(images), len(texts)) == (len(variants), 6)
    assert all(len(pixels) == 1 for pixels in images)
    assert len(list((cache / "latents").iterdir())) == len(variants) and len(list((cache / "prompts").iterdir())) == 6
    images.clear()
    texts.clear()
    second = train("second", *flags)
    assert (images, texts) == ([], [])
    assert same(weights(first / "unet"), weights(second / "unet"))


def test_a_short_run_caches_little(train, monkeypatch, tmp_path):
    """Only what the run visits is encoded; crops that it meets once are kept only of a small set, for the next run."""
    images, texts = (
        count_calls(monkeypatch, AutoencoderKL, "encode"),
        count_calls(monkeypatch, CLIPTextModel, "forward"),
    )
    small = train("small", "--max_train_steps", 2, "--encoding_cache_dir", tmp_path / "cache")
    assert (len(images), len(texts)) == (4, 4)
    assert len(list((tmp_path / "cache" / "latents").iterdir())) == 4
    monkeypatch.setattr(script, "SMALL_SET", 3)
    large = train("large", "--max_train_steps", 2, "--encoding_cache_dir", tmp_path / "cache-2")
    assert (len(images), len(texts)) == (8, 8)
    assert not (tmp_path / "cache-2" / "latents").exists()
    assert len(list((tmp_path / "cache-2" / "prompts").iterdir())) == 4
    assert same(weights(small / "unet"), weights(large / "unet"))


def test_random_crops_are_not_cached(train, monkeypatch, wide_pictures, tmp_path, capsys):
    """Random crops are hardly met twice, so each is encoded in its step, afresh; the header says so."""
    images, texts = (
        count_calls(monkeypatch, AutoencoderKL, "encode"),
        count_calls(monkeypatch, CLIPTextModel, "forward"),
    )
    flags = ("--train_data_dir", wide_pictures, "--no-center_crop", "--encoding_cache_dir", tmp_path / "cache")
    train("out", *flags, "--max_train_steps", 8)
    assert (len(images), len(texts)) == (16, 5)
    assert len({pixels.numpy().tobytes() for pixels in images}) > 10
    assert not (tmp_path / "cache" / "latents").exists()
    assert "latents are not cached" in capsys.readouterr().out


def test_captions_that_are_dropped(train, monkeypatch, tmp_path):
    """The empty caption is encoded once, like any other."""
    texts = count_calls(monkeypatch, CLIPTextModel, "forward")
    train("out", "--proportion_empty_prompts", 1.0, "--encoding_cache_dir", tmp_path / "cache")
    assert len(texts) == 1 and len(list((tmp_path / "cache" / "prompts").iterdir())) == 1


# What is saved


@pytest.mark.parametrize(
    "flags", [(), ("--mixed_precision", "bf16"), ("--mixed_precision", "bf16", "--no_encoding_cache")]
)
def test_frozen_weights_and_precision(train, tiny_model, flags):
    """The encoders leave as they came, and all weights and moments are float32, also in bf16."""
    out = train("out", *flags, "--checkpointing_steps", 4, "--use_ema")
    for part in ("vae", "text_encoder"):
        assert same(weights(out / part), weights(tiny_model / part)), part
    tensors = everything(out / "checkpoint-4") | weights(out)
    assert {tensor.dtype for name, tensor in tensors.items() if tensor.is_floating_point()} == {torch.float32}
    trained = weights(out / "checkpoint-4" / "unet")
    changed = [name for name, tensor in weights(tiny_model / "unet").items() if not torch.equal(trained[name], tensor)]
    assert len(changed) == len(trained)
    assert not all(torch.equal(tensor, tensor.bfloat16().float()) for tensor in trained.values())


def test_bf16_trains_alike(train, tiny_model):
    """bf16 rounds, so its first loss is near float32's but not equal, and its weights go the same way."""
    full, half = train("full"), train("half", "--mixed_precision", "bf16")
    first, rounded = metrics(full, "loss")[0][1], metrics(half, "loss")[0][1]
    assert first != rounded == pytest.approx(first, rel=2e-2)
    assert drift(full, half, tiny_model) < 0.5


def test_precision_of_the_launcher(train, tmp_path, monkeypatch):
    """Mixed precision that the launcher sets does what the flag does, and leaves float32 weights."""
    typed = train("typed", "--mixed_precision", "bf16")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("RANK", "0")  # else StopFlag would tie this process to its parent's life
    configured = train("configured")
    assert same(weights(configured), weights(typed))
    assert {t.dtype for t in weights(configured).values() if t.is_floating_point()} == {torch.float32}
    assert "mixed_precision: bf16\n" in (configured / "train_args.yaml").read_text()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_prediction_type_is_saved(train, tiny_model, tiny_v_model, prediction_type):
    """What the UNet learns to predict stands in the saved scheduler, with all else as the base has it."""
    for model in (tiny_model, tiny_v_model):
        out = train(
            f"from-{model.name}", "--pretrained_model_name_or_path", model, "--prediction_type", prediction_type
        )
        before, after = (
            json.loads((folder / "scheduler" / "scheduler_config.json").read_text()) for folder in (model, out)
        )
        assert after == before | {"prediction_type": prediction_type}
    assert StableDiffusionPipeline.from_pretrained(out).scheduler.config.prediction_type == prediction_type
    assert same(weights(out / "unet"), weights(out.with_name("from-tiny") / "unet"))


def test_a_v_model_stays_one(train, tiny_v_model):
    """A base model that predicts v is trained and saved so without a flag, and learns."""
    flags = ("--pretrained_model_name_or_path", tiny_v_model)
    by_default, by_flag = train("default", *flags), train("flag", *flags, "--prediction_type", "v_prediction")
    assert same(weights(by_default / "unet"), weights(by_flag / "unet"))
    assert StableDiffusionPipeline.from_pretrained(by_default).scheduler.config.prediction_type == "v_prediction"
    epsilon = train("epsilon", *flags, "--prediction_type", "epsilon")
    assert not same(weights(epsilon / "unet"), weights(by_default / "unet"))


def test_a_nan_in_the_base_model_stops_the_run(train, tiny_model, tmp_path, pictures):
    """A loss that is no number ends the run at its step, with the pictures' names and without a checkpoint."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (file,) = (model / "unet").glob("*.safetensors")
    tensors = load_file(file)
    tensors["conv_in.bias"][0] = math.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(SystemExit) as end:
        train("out", "--pretrained_model_name_or_path", model, "--checkpointing_steps", 1)
    message = str(end.value)
    assert "Step 1 " in message and "nan" in message
    keys = script.step_keys(0, total_batch_size=2, size=6, seed=1)
    names = sorted(file for file in pictures.iterdir() if file.suffix in (".png", ".jpg"))
    assert {str(names[index]) for _, index in keys} == {str(name) for name in names if str(name) in message}
    assert not list((tmp_path / "out").glob("*checkpoint*")) and not (tmp_path / "out" / "model_index.json").exists()


@pytest.mark.parametrize("every, kept", [(1, {"checkpoint-1"}), (3, set()), (0, set())])
def test_a_diverging_run_stops(train, tmp_path, every, kept):
    """A run that diverges stops at the first loss that is no number, and saves nothing from there on."""
    with pytest.raises(SystemExit, match="Step 2 .*learning rate"):
        train("out", "--learning_rate", 1e30, "--checkpointing_steps", every, "--max_train_steps", 6)
    assert {path.name for path in (tmp_path / "out").glob("*checkpoint*")} == kept
    assert not (tmp_path / "out" / "model_index.json").exists()
    assert all(math.isfinite(loss) for _, loss in metrics(tmp_path / "out", "loss"))


def test_a_base_model_of_fp16_files_only(train, tiny_model, tmp_path):
    """A base with nothing but .fp16 files loads, with and without --variant, and trains in float32."""
    model = tmp_path / "model"
    StableDiffusionPipeline.from_pretrained(tiny_model).to(torch.float16).save_pretrained(model, variant="fp16")
    assert {file.name.split(".")[-2] for file in model.rglob("*.safetensors")} == {"fp16"}
    assert {tensor.dtype for tensor in weights(model).values()} <= {torch.float16, torch.int64}
    out = train("found", "--pretrained_model_name_or_path", model)
    named = train("named", "--pretrained_model_name_or_path", model, "--variant", "fp16")
    assert same(weights(out), weights(named))
    assert {tensor.dtype for tensor in weights(out).values() if tensor.is_floating_point()} == {torch.float32}
    assert not any(".fp16." in file.name for file in out.rglob("*.safetensors"))
    assert not all(torch.equal(tensor, tensor.half().float()) for tensor in weights(out / "unet").values())


def test_models_are_loaded_once(train, monkeypatch):
    """Validation and the result take the models that are there: none is loaded beside them."""
    loaded, original = [], AutoencoderKL.from_pretrained
    monkeypatch.setattr(AutoencoderKL, "from_pretrained", lambda *a, **kw: loaded.append(a) or original(*a, **kw))
    out = train("out", "--use_ema", "--validation_prompts", "red", "--validation_steps", 1, "--max_train_steps", 2)
    assert len(loaded) == 1 and len(list((out / "samples").iterdir())) == 3


def test_a_base_model_of_pickles_is_refused(train, tiny_model, tmp_path):
    """A base with nothing but .bin files is refused in a sentence: they are pickles."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    for file in model.rglob("*.safetensors"):
        name = "pytorch_model.bin" if file.parent.name == "text_encoder" else "diffusion_pytorch_model.bin"
        torch.save(load_file(file), file.with_name(name))
        file.unlink()
    with pytest.raises(SystemExit, match="safetensors"):
        train("out", "--pretrained_model_name_or_path", model)


# Several processes


def launch(processes, *flags):
    """Run the script on some processes, as torchrun starts them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    command += [ROOT / "train_text_to_image.py", *flags]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(part) for part in command], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def in_epochs(words):
    """A command line without its number of steps, which then follows from its number of epochs."""
    place = words.index("--max_train_steps")
    return words[:place] + words[place + 2 :]


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
def test_ranks_that_see_copies(tiny_model, pictures, tmp_path):
    """Two ranks whose pictures are copies with other times start a second time: rank 0 knows them all, so both do."""
    for rank in range(2):
        shutil.copytree(pictures, tmp_path / str(rank) / "pictures")
        for file in (tmp_path / str(rank) / "pictures").iterdir():
            os.utime(file, (rank, rank))
    wrapper = tmp_path / "wrapper.py"
    lines = ["import os, runpy, sys", f"os.chdir({str(tmp_path)!r} + '/' + os.environ['RANK'])"]
    wrapper.write_text(
        "\n".join([*lines, f"runpy.run_path({str(ROOT / 'train_text_to_image.py')!r}, None, '__main__')"])
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(wrapper)]
    for out in (tmp_path / "first", tmp_path / "second"):
        flags = flags_of(tiny_model, "pictures", out, "--max_train_steps", 1)
        environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, *flags], env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.launch
def test_resuming_is_exact_on_three_processes(dropout_model, five_pictures, tmp_path):
    """Three processes that are stopped and resumed end with the bits of those that were not."""
    flags = ("--max_train_steps", 4, "--checkpointing_steps", 2, "--train_batch_size", 1, *RANDOM)
    flags += ("--gradient_accumulation_steps", 2, "--lr_scheduler", "cosine", "--validation_samples", 1)
    launch(3, *flags_of(dropout_model, five_pictures, tmp_path / "whole", *flags))
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    flags += ("--resume_from_checkpoint", "latest")
    launch(3, *flags_of(dropout_model, five_pictures, tmp_path / "resumed", *flags))
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert same(everything(resumed / "checkpoint-4"), everything(whole / "checkpoint-4"))
    assert same(weights(resumed / "unet"), weights(whole / "unet"))
    assert logged(resumed) == logged(whole) and len(metrics(whole, "loss")) == 4


def test_fp16_takes_no_fused_step(tiny_model, pictures, tmp_path):
    """A fused AdamW skips an overflow by itself, which accelerate cannot see, so under a scaler it is not fused."""
    from accelerate.state import AcceleratorState

    flags = ("--pretrained_model_name_or_path", tiny_model, "--train_data_dir", pictures, "--output_dir", tmp_path)
    args = script.parse_args([*map(str, flags), "--resolution", "16", "--report_to", "none"])
    for scaler, fused in ((None, True), (torch.amp.GradScaler("cpu"), False)):
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = script.make_accelerator(args)
        accelerator.scaler = scaler
        optimizer = script.prepare_training(accelerator, args, script.load_models(args))
        assert optimizer.defaults["fused"] is fused


def test_a_state_without_models(tiny_model, pictures, tmp_path):
    """Where accelerate hands the hooks no weights, as DeepSpeed makes it do, saving and loading work."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = script.make_accelerator(script.parse_args(flags_of(tiny_model, pictures, tmp_path / "out")))
    accelerator.save_state(tmp_path / "state")
    accelerator.load_state(tmp_path / "state")
    assert {file.name for file in (tmp_path / "state").iterdir()} == {"random_states_0.pkl"}
