"""What a run promises of its numbers: their values, what they depend on, and what must not matter."""

import json
import math
import os
import shutil
import time
import traceback
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMPipeline, DDPMScheduler, UNet2DConditionModel, UNet2DModel
from diffusers.training_utils import EMAModel
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
    optimizer_state,
    same,
    watch,
    weights,
    write_config,
)
from safetensors.torch import load_file, save_file

import train_lora
import train_text_to_image as script
import train_unconditional


LATEST = ("--resume_from_checkpoint", "latest")
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


@pytest.mark.parametrize("flags", [(), ("--offload_ema",)], ids=["plain", "offload"])
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


@pytest.fixture
def scaled(monkeypatch):
    """scaled(**settings) has runs train in fp16 on the CPU, with a scaler of such settings."""
    make_accelerator = script.make_accelerator

    def of(**settings):
        def make(args):
            accelerator = make_accelerator(args)
            accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
            accelerator.scaler = torch.amp.GradScaler("cpu", **settings)
            return accelerator

        monkeypatch.setattr(script, "make_accelerator", make)

    return of


def test_steps_that_overflow_are_skipped(train, scaled, tiny_model):
    """A step that the scaler skips moves nothing and counts for nothing; metrics, card and resuming hold."""
    scaled(init_scale=2.0**24)
    flags = ("--use_ema", "--lr_scheduler", "linear", "--max_train_steps", 10, "--checkpointing_steps", 1)
    out = train("out", *flags)
    norms = [norm for _, norm in metrics(out, "grad_norm")]
    skipped = norms.count(None)
    assert 0 < skipped < 8 and None not in norms[skipped:]
    base, average = weights(tiny_model / "unet"), weights(out / f"checkpoint-{skipped}" / "unet_ema")
    assert same(weights(out / f"checkpoint-{skipped}" / "unet"), base) and same(average, base)
    assert not same(weights(out / f"checkpoint-{skipped + 1}" / "unet"), base)
    rates = [rate for _, rate in metrics(out, "lr")]
    assert rates[: skipped + 1] == [1e-3] * (skipped + 1) and rates[skipped + 1] < 1e-3
    assert json.loads((out / "checkpoint-10" / "state.json").read_text())["optimizer_steps"] == 10 - skipped
    assert "10 steps. Loss from" in (out / "README.md").read_text()
    for step in (skipped - 1, skipped + 1):
        folder = out.with_name(f"resumed-{step}")
        shutil.copytree(out / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        assert same(weights(train(folder.name, *flags, *LATEST) / "unet"), weights(out / "unet"))
        assert logged(folder) == logged(out)


def test_a_loss_that_is_not_finite_ends_a_run_in_fp16(train, scaled, monkeypatch):
    """The scaler scales gradients alone: no skipped step mends a forward pass that overflows."""
    scaled()
    compute_loss = script.compute_loss
    overflow = lambda *given: {"loss": compute_loss(*given)["loss"] / 0}  # noqa: E731
    monkeypatch.setattr(script, "compute_loss", overflow)
    with pytest.raises(SystemExit, match="Step 1 has loss inf"):
        train("out")


def test_another_precision_goes_on(train, scaled, monkeypatch, capsys):
    """A run goes on in fp16, and back: the optimizer's state is alike, and on the device of its weights."""
    usual = script.make_accelerator
    out = train("out", "--checkpointing_steps", 2)
    scaled()
    train("out", "--checkpointing_steps", 2, "--max_train_steps", 6, *LATEST)
    assert "--mixed_precision was no and is now fp16" in capsys.readouterr().out
    monkeypatch.setattr(script, "make_accelerator", usual)
    train("out", "--checkpointing_steps", 2, "--max_train_steps", 8, *LATEST)
    assert [step for step, _ in metrics(out, "loss")] == [*range(1, 9)]
    names = [{name for name in optimizer_state(out / f"checkpoint-{step}")} for step in (2, 4, 6, 8)]
    assert names[0] == names[1] == names[2] == names[3]


def test_a_run_that_skips_all_its_steps_ends(train, scaled):
    """It would never learn anything, which is said after some steps."""
    scaled(init_scale=2.0**24, backoff_factor=0.9999)
    with pytest.raises(SystemExit, match="gradients of 50 steps in a row were not finite in fp16"):
        train("out", "--max_train_steps", 60)


def test_the_precision_holds_under_deepspeed(tiny_model, pictures, tmp_path):
    """Where accelerate's own context does nothing, ours has the precision that was asked for."""
    flags = ("--pretrained_model_name_or_path", tiny_model, "--train_data_dir", pictures, "--output_dir", tmp_path)
    begun = make_run(script, script.parse_args([*map(str, flags), "--mixed_precision", "bf16"]))
    begun.accelerator.native_amp = False  # as under DeepSpeed
    with script.autocast(begun):
        assert (torch.ones(1, 1) @ torch.ones(1, 1)).dtype == torch.bfloat16


def test_processes_wait_for_hours(tiny_model, pictures, tmp_path):
    """The others do not give up while one writes or uploads: NCCL would after ten minutes."""
    flags = ("--pretrained_model_name_or_path", tiny_model, "--train_data_dir", pictures, "--output_dir", tmp_path)
    begun = make_run(script, script.parse_args([*map(str, flags)]))
    assert begun.accelerator.init_handler.timeout.total_seconds() >= 6 * 3600


def test_deterministic_kernels(train, monkeypatch):
    """--deterministic asks for them everywhere; on a CPU all are, so the weights are the same."""
    plain = train("plain")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        out = train("out", "--deterministic")
        assert torch.are_deterministic_algorithms_enabled() and "CUBLAS_WORKSPACE_CONFIG" in os.environ
        assert not torch.backends.cuda.mem_efficient_sdp_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cuda.enable_mem_efficient_sdp(True)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    assert same(weights(out / "unet"), weights(plain / "unet"))


def test_the_average_has_the_layout_of_the_weights(tiny_model, pictures, tmp_path):
    """In another, each update would walk through memory in strides."""
    flags = ("--pretrained_model_name_or_path", tiny_model, "--train_data_dir", pictures, "--output_dir", tmp_path)
    begun = make_run(script, script.parse_args([*map(str, flags), "--use_ema"]))
    models = script.load_models(begun)
    script.prepare_training(begun, models)
    strides = [weight.stride() for weight in models.params_to_optimize]
    assert [shadow.stride() for shadow in models.ema_unet.shadow_params] == strides
    assert any(not weight.is_contiguous() for weight in models.params_to_optimize)


def test_an_average_of_weights_in_half_precision():
    """It stays in float32, where small steps towards the weights are not rounded away, as under DeepSpeed."""
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    models = SimpleNamespace(ema_unet=EMAModel([torch.zeros(4)]), params_to_optimize=[weight])
    models.ema_unet.optimization_step = 10**5  # by when it moves by a ten-thousandth
    run = SimpleNamespace(
        args=SimpleNamespace(offload_ema=False), accelerator=SimpleNamespace(device=torch.device("cpu"))
    )
    script.prepare_average(run, models)
    for _ in range(10):
        script.update_average(run, models)
    (average,) = models.ema_unet.shadow_params
    torch.testing.assert_close(average, torch.full((4,), 1 - 0.9999**10))


def test_a_resumed_average_holds_no_other_model(train, monkeypatch):
    """Reading it keeps no gradient's path to the model that it was read from, which would stay in memory."""
    kept, load_average = [], script.load_average
    monkeypatch.setattr(
        script, "load_average", lambda models, folder: (load_average(models, folder), kept.append(models))
    )
    train("out", "--use_ema", "--checkpointing_steps", 2)
    train("out", "--use_ema", "--max_train_steps", 6, *LATEST)
    assert not any(shadow.requires_grad for shadow in kept[0].ema_unet.shadow_params)


class Waits(torch.utils._python_dispatch.TorchDispatchMode):
    """Lists where operations make a program wait for its device, but for the loader's and where numbers are due."""

    WAITING = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero"}
    DUE = {"load_batches", "_next_data", "read"}

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        if operation.__name__.split(".")[0] in self.WAITING:
            places = [frame.name for frame in traceback.extract_stack()]
            self.found += [] if self.DUE & {*places} else [places]
        return operation(*arguments, **keywords or {})


@pytest.mark.parametrize("flags", ["", "--snr_gamma 5 --noise_offset 0.1 --use_ema --input_perturbation 1"])
def test_no_step_waits_for_its_device(train, monkeypatch, flags):
    """Nothing reads a number from the device within a step, so a GPU is given the next one while it works."""
    training, waits = script.train, Waits()

    def watched(*arguments):
        with waits:
            training(*arguments)

    monkeypatch.setattr(script, "train", watched)
    train("out", "--max_train_steps", 3, *flags.split())
    assert waits.found == []


def test_checkpoints_that_take_long_are_told_of(train, monkeypatch, capsys):
    """Their seconds are logged, and a line at the end says what share of the time they took, and the flag."""
    out = train("quick", "--checkpointing_steps", 0)
    assert metrics(out, "checkpoint_seconds") == [] and "Checkpoints took" not in capsys.readouterr().out
    seal = script.seal_checkpoint
    monkeypatch.setattr(script, "seal_checkpoint", lambda *arguments: (time.sleep(0.5), seal(*arguments)))
    out = train("slow", "--checkpointing_steps", 2)
    assert [step for step, _ in metrics(out, "checkpoint_seconds")] == [2, 4]
    assert all(0.5 < seconds < 5 for _, seconds in metrics(out, "checkpoint_seconds"))
    assert "of the time: a higher --checkpointing_steps takes less" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("method", [script, train_lora, train_unconditional], ids=lambda method: method.__name__)
def test_compiled_blocks(method, trainer, tiny_model, pictures, tmp_path):
    """They train alike, under the same names, and a resumed run has the bits of one that was not stopped."""
    base = tiny_model
    flags = ("--max_train_steps", 4, "--checkpointing_steps", 2, "--validation_samples", 1, "--validation_steps", 2)
    if method is train_unconditional:
        base, flags = tmp_path / "base", (*flags, "--eval_batch_size", 1, "--ddpm_num_inference_steps", 2)
        DDPMPipeline(UNet2DModel.from_config(write_config(base)), DDPMScheduler()).save_pretrained(base)
    train = trainer(method, *flags)
    plain = train("plain", base=base)
    try:
        compiled = train("compiled", "--torch_compile", base=base)
        assert dict(torch._dynamo.utils.counters["frames"])["ok"] > 0
        shutil.copytree(compiled / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
        torch._dynamo.reset()
        resumed = train("resumed", "--torch_compile", *LATEST, base=base)
    finally:
        torch._dynamo.reset()
    assert metrics(compiled, "loss") == [
        (step, pytest.approx(loss, rel=1e-3)) for step, loss in metrics(plain, "loss")
    ]
    assert everything(compiled / "checkpoint-4").keys() == everything(plain / "checkpoint-4").keys()
    assert same(everything(resumed / "checkpoint-4"), everything(compiled / "checkpoint-4"))
    assert logged(resumed) == logged(compiled)


# Losses that are no numbers, and models in memory.


@pytest.mark.parametrize("shape", ["polynomial", "linear", "cosine", "cosine_with_restarts"])
def test_a_warmup_as_long_as_the_run(train, shape):
    """The last step has all of it behind it, and divides by nothing."""
    out = train("out", "--lr_scheduler", shape, "--lr_warmup_steps", 4)
    assert metrics(out, "lr") == [(i + 1, pytest.approx(1e-3 * i / 4)) for i in range(4)]


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


@pytest.mark.parametrize(
    "method, flags",
    [
        (script, "--use_ema"),
        (script, "--use_8bit_adam"),
        (train_lora, "--mixed_precision bf16"),
        (train_lora, "--optimizer prodigy --learning_rate 1"),
    ],
)
def test_the_header_counts_memory(method, flags, trainer, monkeypatch, capsys):
    """What it says of weights, gradients, optimizer and average is what they take once the run has begun."""
    kept, prepare_training = [], method.prepare_training

    def prepare(run, models):
        optimizer = prepare_training(run, models)
        kept.extend((models, optimizer, method.memory_parts(run, models)))
        return optimizer

    monkeypatch.setattr(method, "prepare_training", prepare)
    trainer(method)("out", *flags.split())
    models, optimizer, parts = kept
    parts = {name: size * 2**30 for name, size in parts.items()}
    weights = models.params_to_optimize
    assert parts["weights"] == parts["gradients"] == sum(weight.nbytes for weight in weights)
    shared = ("step", "qmap1", "qmap2")  # a number, and tables that are the same for all
    states = [state.items() for state in optimizer.state.values()]
    assert parts["optimizer"] == sum(
        value.nbytes for state in states for name, value in state if torch.is_tensor(value) and name not in shared
    )
    assert bool(parts["average"]) is ("ema" in flags)
    everyone = [weight for model in (models.unet, models.vae, *models.text_encoders) for weight in model.parameters()]
    assert parts["frozen"] == sum(weight.nbytes for weight in everyone) - parts["weights"]
    total = sum(parts.values()) / 2**30
    assert f"= {total:.2f} GiB, and activations" in capsys.readouterr().out


def test_models_are_loaded_once(train, monkeypatch):
    """Validation and the result take the models that are there: none is loaded beside them."""
    loaded, original = [], AutoencoderKL.from_pretrained
    monkeypatch.setattr(AutoencoderKL, "from_pretrained", lambda *a, **kw: loaded.append(a) or original(*a, **kw))
    out = train("out", "--use_ema", "--validation_prompts", "red", "--validation_steps", 1, "--max_train_steps", 2)
    assert len(loaded) == 1 and len(list((out / "samples").iterdir())) == 3
