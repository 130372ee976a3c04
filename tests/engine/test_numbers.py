"""What a run promises of its numbers: their values, what they depend on, and what must not matter."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from helpers import (
    CACHED,
    RANDOM,
    cosine,
    drift,
    everything,
    logged,
    make_pictures,
    make_run,
    metrics,
    same,
    watch,
    weights,
)
from safetensors.torch import load_file, save_file

import train_text_to_image as script


PINNED = {"plain": [1.117903, 0.936722, 0.939690, 0.915768], "many": [0.127725, 0.278031, 0.207311, 0.312904]}


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
    batches = watch(monkeypatch, script).batches
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


def test_polynomial_decay_ends_near_zero(train):
    """Its floor is 1e-7, as in the example scripts, whatever the rate it starts from."""
    flags = ("--lr_scheduler", "polynomial", "--learning_rate", 1e-3, "--max_train_steps", 1000)
    end = [rate for step, rate in metrics(train("out", *flags, "--lr_power", 50, "--max_train_steps", 8), "lr")]
    assert end[-1] == pytest.approx(1e-7, rel=1e-3)


def test_a_warmup_that_never_ends_is_told(train, capsys):
    """The default of 500 steps is more than a short run has."""
    train("out", "--lr_scheduler", "cosine", "--lr_warmup_steps", 500)
    assert "does not end before the run does: --lr_warmup_steps" in capsys.readouterr().out


def test_scale_lr(train, tiny_model):
    """--scale_lr multiplies the learning rate by the total batch size, and does nothing else."""
    flags = ("--train_batch_size", 2, "--gradient_accumulation_steps", 2, "--max_train_steps", 2)
    scaled = train("scaled", *flags, "--scale_lr", "--learning_rate", 2.5e-4)
    assert same(weights(scaled / "unet"), weights(train("given", *flags, "--learning_rate", 1e-3) / "unet"))
    assert metrics(scaled, "lr")[0] == (1, pytest.approx(1e-3))


# What must not matter.


@pytest.mark.parametrize("flags", [("--gradient_checkpointing",), ("--enable_xformers_memory_efficient_attention",)])
def test_savings_change_nothing(train, tiny_model, flags):
    """What saves memory or time changes the weights by rounding at most."""
    plain, saving = train("plain"), train("saving", *flags)
    assert drift(plain, saving, tiny_model) < 1e-3


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
    out = train("out", "--pretrained_model_name_or_path", dropout_model, *CACHED, *flags.split())
    assert same(weights(out / "unet"), weights(plain_run / "unet"))
    if "elsewhere" not in flags:
        assert logged(out) == logged(plain_run)


def test_dropout_draws(train, plain_run, tiny_model):
    """Dropout is on while training, or the tests above would prove less than they say."""
    without = train("without", *CACHED, "--pretrained_model_name_or_path", tiny_model)
    assert metrics(without, "loss")[0] != metrics(plain_run, "loss")[0]


def test_validation_loss_changes_no_weight(train, dropout_model):
    """Measuring the held-out loss at every step or at the ends only gives the same weights, and the same numbers."""
    flags = ("--pretrained_model_name_or_path", dropout_model, *RANDOM, "--validation_samples", 2)
    often = train("often", *flags, "--validation_steps", 1, "--validation_prompts", "red")
    rarely = train("rarely", *flags, "--validation_steps", 4)
    assert same(weights(often / "unet"), weights(rarely / "unet"))
    assert [step for step, _ in metrics(often, "validation_loss")] == [0, 1, 2, 3, 4]
    assert metrics(often, "validation_loss")[::4] == metrics(rarely, "validation_loss")


# Precision.


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


def test_bf16_trains_alike(train, tiny_model, capsys):
    """bf16 rounds, so its first loss is near float32's but not equal, and its weights go the same way."""
    full = train("full")
    assert "no GPU" not in capsys.readouterr().out
    half = train("half", "--mixed_precision", "bf16")
    assert "there is no GPU, so bf16 runs on the CPU" in capsys.readouterr().out
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
    assert "# mixed_precision: bf16\n" in (configured / "train_args.yaml").read_text()


def test_precision_of_the_launcher_in_capitals(train, monkeypatch, capsys):
    """It is the same, and the header does not say otherwise."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "BF16")
    monkeypatch.setenv("RANK", "0")
    train("out", "--max_train_steps", 1)
    assert "precision bf16" in capsys.readouterr().out


def test_fp16_takes_no_fused_step(tiny_model, pictures, tmp_path):
    """A fused AdamW skips an overflow by itself, which accelerate cannot see, so under a scaler it is not fused."""
    flags = ("--pretrained_model_name_or_path", tiny_model, "--train_data_dir", pictures, "--output_dir", tmp_path)
    args = script.parse_args([*map(str, flags), "--resolution", "16", "--report_to", "none"])
    for scaler, fused in ((None, True), (torch.amp.GradScaler("cpu"), False)):
        begun = make_run(script, args)
        begun.accelerator.scaler = scaler
        optimizer = script.prepare_training(begun, script.load_models(begun))
        assert optimizer.defaults["fused"] is fused


# Losses that are no numbers, and models in memory.


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
    keys = script.step_keys(0, total_batch_size=2, sizes=(6, 0), seed=1)
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


def test_models_are_loaded_once(train, monkeypatch):
    """Validation and the result take the models that are there: none is loaded beside them."""
    loaded, original = [], AutoencoderKL.from_pretrained
    monkeypatch.setattr(AutoencoderKL, "from_pretrained", lambda *a, **kw: loaded.append(a) or original(*a, **kw))
    out = train("out", "--use_ema", "--validation_prompts", "red", "--validation_steps", 1, "--max_train_steps", 2)
    assert len(loaded) == 1 and len(list((out / "samples").iterdir())) == 3
