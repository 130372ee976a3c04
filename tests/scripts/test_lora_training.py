"""How train_lora.py trains: a step by hand, precision, rates, optimizers, dropout; resuming, stops and kills."""

import functools
import math
import operator
import os
import shutil
import signal
import sys

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from helpers import (
    LORA,
    finish,
    flags_of,
    flat,
    logged,
    make_pictures,
    metrics,
    pairs,
    rows,
    run,
    same,
    watch,
    weights,
    whole_checkpoints,
)
from safetensors.torch import load_file
from torch.nn.utils import parametrize

import train_lora as script


# Of a small run, beside those of every small run.
FLAGS = ("--max_train_steps", 3, "--learning_rate", 1e-2)


@pytest.fixture
def train(trainer):
    """Trains adapters on six captioned pictures."""
    return trainer(script, *FLAGS)


# Numbers.


class Sum(torch.nn.Module):
    """A layer's weight with the product of two low-rank factors added."""

    def __init__(self, sides, scale):
        super().__init__()
        self.a, self.b, self.scale = torch.nn.Parameter(sides["A"]), torch.nn.Parameter(sides["B"]), scale

    def forward(self, weight):
        return weight + self.scale * self.b @ self.a


@pytest.mark.parametrize(
    "flags, scale", [("--rank 3 --lora_alpha 6", 2), ("--rank 4 --use_rslora --lora_alpha 5", 2.5)]
)
def test_training_by_hand(train, tiny_model, monkeypatch, flags, scale):
    """Losses, norms and factors are those of a plain loop without peft, whose gradients are clipped."""
    start = train("start", *flags.split(), "--learning_rate", 0, "--max_train_steps", 1)
    batches = watch(monkeypatch, script).batches
    flags = (*flags.split(), "--max_grad_norm", 0.01, "--adam_weight_decay", 0.5, "--snr_gamma", 5)
    out = train("out", *flags, "--max_train_steps", 4)
    unet = UNet2DConditionModel.from_pretrained(tiny_model / "unet").requires_grad_(False).train()
    sums = {name: Sum(sides, scale) for (_, name), sides in sorted(pairs(start / LORA).items())}
    assert all(not s.b.any() and s.a.std() > 0 for s in sums.values())  # so that it starts as the base
    for name, module in sums.items():
        parametrize.register_parametrization(unet.get_submodule(name), "weight", module)
    scheduler = DDPMScheduler.from_pretrained(tiny_model / "scheduler")
    scaling = AutoencoderKL.from_pretrained(tiny_model / "vae").config.scaling_factor
    factors = [factor for module in sums.values() for factor in (module.a, module.b)]
    optimizer = torch.optim.AdamW(factors, lr=1e-2, weight_decay=0.5)
    losses, norms = [], []
    for batch in batches:
        latents = (batch["mean"] + batch["std"] * batch["posterior_noise"]) * scaling
        noisy = scheduler.add_noise(latents, batch["noise"], batch["timesteps"])
        prediction = unet(noisy, batch["timesteps"], batch["encoder_hidden_states"]).sample
        alphas = scheduler.alphas_cumprod[batch["timesteps"]]
        loss = F.mse_loss(prediction, batch["noise"], reduction="none").mean(dim=(1, 2, 3))
        loss = (loss * (5 * (1 - alphas) / alphas).clamp(max=1)).mean()
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.nn.utils.clip_grad_norm_(factors, 0.01).item())
        optimizer.step()
        optimizer.zero_grad()
    assert len(batches) == 4 and min(norms) > 0.01  # else nothing was clipped
    for name, wanted in (("loss", losses), ("grad_norm", norms)):
        assert metrics(out, name) == [(i + 1, pytest.approx(value, rel=1e-3)) for i, value in enumerate(wanted)]
    for (_, name), sides in pairs(out / LORA).items():
        torch.testing.assert_close(sides["A"], sums[name].a, rtol=0, atol=2e-4)
        torch.testing.assert_close(sides["B"], sums[name].b, rtol=0, atol=2e-4)


@pytest.mark.parametrize("flags", [(), ("--train_text_encoder",)])
def test_precision(train, tiny_model, monkeypatch, flags):
    """In bf16 the base is in half precision in memory, and the adapters and moments in float32."""
    models, original = [], script.save_model
    monkeypatch.setattr(script, "save_model", lambda run, m: (models.append(m), original(run, m)))
    validation = ("--validation_samples", 1, "--validation_prompt", "red", "--num_validation_images", 1)
    common = (*flags, *validation, "--validation_steps", 3, "--checkpointing_steps", 3)
    full, half = train("full", *common), train("half", *common, "--mixed_precision", "bf16")
    for model in [models[1].pipeline.unet, *([models[1].pipeline.text_encoder] if flags else [])]:
        kinds = {(".lora_" in name, p.dtype, p.requires_grad) for name, p in model.named_parameters()}
        assert kinds == {(True, torch.float32, True), (False, torch.bfloat16, False)}
    base, now = load_file(next((tiny_model / "unet").glob("*.safetensors"))), models[1].pipeline.unet.state_dict()
    now = {name.replace(".base_layer", ""): tensor for name, tensor in now.items()}
    assert all(torch.equal(now[name], tensor.bfloat16()) for name, tensor in base.items())
    for out in (half, half / "checkpoint-3"):
        tensors = load_file(out / LORA).values()
        assert {tensor.dtype for tensor in tensors} == {torch.float32}
        assert not all(torch.equal(tensor, tensor.bfloat16().float()) for tensor in tensors)
    state = flat(torch.load(half / "checkpoint-3" / "optimizer.bin", weights_only=True)["state"])
    assert {value.dtype for value in state.values() if torch.is_tensor(value)} == {torch.float32}
    for name in ("loss", "validation_loss"):
        first, rounded = metrics(full, name)[0][1], metrics(half, name)[0][1]
        assert first != rounded == pytest.approx(first, rel=2e-2)
    assert (half / "samples" / "step-000003.png").exists()


def test_two_rates(train):
    """--text_encoder_lr is the rate of the text encoder's adapters and of no other; without it they have the same."""
    common = ("--train_text_encoder", "--adam_weight_decay", 0)
    start = pairs(train("start", *common, "--learning_rate", 0, "--max_train_steps", 1) / LORA)
    for part, rates in {"unet": (1e-2, 0), "text_encoder": (0, 1e-2)}.items():
        now = pairs(train(part, *common, "--learning_rate", rates[0], "--text_encoder_lr", rates[1]) / LORA)
        moved = {key for key in now if not torch.equal(now[key]["B"], start[key]["B"])}
        assert moved == {key for key in start if key[0] == part} != set()
    same_rates = train("same", *common, "--text_encoder_lr", 1e-2)
    torch.manual_seed(5)  # the first weights come from --seed all the same
    assert same(load_file(same_rates / LORA), load_file(train("one", *common) / LORA))


def groups_of(out):
    """The optimizer's groups in the only checkpoint of a folder."""
    (file,) = out.glob("checkpoint-*/optimizer.bin")
    return torch.load(file, weights_only=True)["param_groups"]


def test_settings_of_the_text_encoders(train, tiny_sdxl_model):
    """--text_encoder_lr and --adam_weight_decay_text_encoder are of both text encoders and not of the UNet."""
    flags = ("--pretrained_model_name_or_path", tiny_sdxl_model, "--train_text_encoder", "--adam_weight_decay", 0.3)
    flags += ("--max_train_steps", 1, "--checkpointing_steps", 1)
    out = train("out", *flags, "--text_encoder_lr", 2e-3, "--adam_weight_decay_text_encoder", 0.1)
    parts = [part for part, _ in pairs(out / LORA)]
    sizes = [2 * parts.count(part) for part in ("unet", "text_encoder", "text_encoder_2")]
    settings = [(len(group["params"]), group["lr"], group["weight_decay"]) for group in groups_of(out)]
    assert settings == [(size, *rest) for size, rest in zip(sizes, [(1e-2, 0.3), (2e-3, 0.1), (2e-3, 0.1)])]
    alike = groups_of(train("alike", *flags))
    assert [(group["lr"], group["weight_decay"]) for group in alike] == [(1e-2, 0.3)] * 3


def test_checkpointing_reaches_the_text_encoder(train):
    """Recomputed activations give the same losses and adapters, also where the gradients pass the text encoder."""
    plain = train("plain", "--train_text_encoder", "--lora_target_modules", "all")
    saving = train("saving", "--train_text_encoder", "--lora_target_modules", "all", "--gradient_checkpointing")
    assert metrics(saving, "loss") == [(i, pytest.approx(loss, rel=1e-4)) for i, loss in metrics(plain, "loss")]
    first, second = load_file(plain / LORA), load_file(saving / LORA)
    assert all(torch.allclose(first[name], second[name], atol=2e-3) for name in first)
    assert all(tensor.any() for name, tensor in second.items() if "text_encoder" in name and "lora_B" in name)


def test_dropout(train):
    """--lora_dropout drops inputs while training, and none when the held-out loss is measured."""
    flags = ("--validation_samples", 1, "--validation_steps", 3, "--checkpointing_steps", 3)
    plain, dropped = train("plain", *flags), train("out", *flags, "--lora_dropout", 0.9)
    first, second = metrics(plain, "loss"), metrics(dropped, "loss")
    assert first[0] == second[0] and first[1] != second[1]  # B starts at 0, so it shows from the second step on
    measured = metrics(dropped, "validation_loss")
    train("out", *flags, "--lora_dropout", 0, "--resume_from_checkpoint", "latest")  # measures the same weights again
    assert metrics(dropped, "validation_loss") == measured


def test_prodigy(train, tiny_model):
    """Prodigy starts with rate 1, takes AdamW's settings, and finds its step by itself."""
    args = script.parse_args(
        flags_of(tiny_model, tiny_model, "out", *FLAGS, "--optimizer", "Prodigy", "--learning_rate", 0.5)
    )
    assert (args.optimizer, args.learning_rate) == ("prodigy", 0.5)
    argv = ["--pretrained_model_name_or_path", str(tiny_model), "--train_data_dir", str(tiny_model)]
    assert script.parse_args([*argv, "--optimizer", "prodigy"]).learning_rate == 1.0
    flags = ("--optimizer", "prodigy", "--learning_rate", 1, "--adam_beta2", 0.998, "--adam_weight_decay", 0.02)
    out = train("out", *flags, "--checkpointing_steps", 30, "--max_train_steps", 30, "--adam_epsilon", 1e-7)
    (group,) = torch.load(out / "checkpoint-30" / "optimizer.bin", weights_only=True)["param_groups"]
    assert (group["betas"], group["weight_decay"], group["eps"]) == ((0.9, 0.998), 0.02, 1e-7)
    assert group["safeguard_warmup"] and group["use_bias_correction"]
    assert group["d"] > group["d0"] and group["k"] == 30  # it has begun to grow


def test_prodigys_flags(train):
    """Each of Prodigy's flags reaches the optimizer, by its default or as given, and also as a run goes on."""
    names = ("beta3", "decouple", "use_bias_correction", "safeguard_warmup")
    flags = ("--optimizer", "prodigy", "--learning_rate", 1, "--max_train_steps", 1, "--checkpointing_steps", 1)
    (group,) = groups_of(train("plain", *flags))
    assert [group[name] for name in names] == [None, True, True, True]
    given = {"beta3": 0.9, "decouple": False, "use_bias_correction": False, "safeguard_warmup": False}
    words = [word for name, value in given.items() for word in (f"--prodigy_{name}", str(value))]
    (group,) = groups_of(train("given", *flags, *words))
    assert {name: group[name] for name in names} == given
    flags += ("--max_train_steps", 2, "--checkpoints_total_limit", 1, "--resume_from_checkpoint", "latest")
    (group,) = groups_of(train("plain", *flags, *words))
    assert {name: group[name] for name in names} == given and group["k"] == 2


def test_prior_preservation(train, pictures, tmp_path):
    """A subject is trained beside its class, and the loss is the sum of both."""
    made = make_pictures(tmp_path / "class", count=4)
    flags = ("--instance_data_dir", pictures, "--instance_prompt", "a sks", "--with_prior_preservation")
    flags += ("--class_data_dir", made, "--class_prompt", "a thing", "--num_class_images", 4, "--snr_gamma", 5)
    out = train("out", *flags, "--prior_loss_weight", 0.25, "--validation_samples", 1, "--train_text_encoder")
    parts = [[value for _, value in metrics(out, name)] for name in ("loss", "instance_loss", "prior_loss")]
    assert len(parts[0]) == 3
    assert all(loss == pytest.approx(mine + 0.25 * prior) for loss, mine, prior in zip(*parts))


# Resuming and stopping.


RESUMED = {
    "adamw": "--train_text_encoder --lora_dropout 0.2 --lora_target_modules all --random_flip --lr_scheduler cosine "
    "--validation_samples 1 --validation_steps 2 --text_encoder_lr 1e-3 --proportion_empty_prompts 0.3",
    "prodigy": "--optimizer prodigy --learning_rate 1 --use_dora --lora_dropout 0.1",
    "sdxl": "--train_text_encoder --lora_dropout 0.1 --text_encoder_lr 1e-3 --proportion_empty_prompts 0.3",
}


@pytest.mark.parametrize("kind", RESUMED)
def test_resuming_adapters_is_exact(train, tiny_model, tiny_sdxl_model, kind):
    """A run that is resumed ends with the same bits of adapters, optimizer and log."""
    flags = ("--pretrained_model_name_or_path", tiny_sdxl_model if kind == "sdxl" else tiny_model)
    flags += ("--max_train_steps", 4, "--train_batch_size", 1, "--gradient_accumulation_steps", 2)
    flags += ("--checkpointing_steps", 1, *RESUMED[kind].split())
    whole = train("whole", *flags)
    state = flat(torch.load(whole / "checkpoint-4" / "optimizer.bin", weights_only=True))
    assert len({loss for _, loss in metrics(whole, "loss")}) == 4
    for step in (1, 3) if kind == "adamw" else (2,):
        begun = whole.with_name(f"from-{step}") / f"checkpoint-{step}"
        shutil.copytree(whole / begun.name, begun)
        resumed = train(begun.parent.name, *flags, "--resume_from_checkpoint", "latest")
        assert logged(resumed) == logged(whole), f"resumed at step {step}"
        assert same(weights(resumed / "checkpoint-4"), weights(whole / "checkpoint-4"))
        assert same(load_file(resumed / LORA), load_file(whole / LORA))
        after = flat(torch.load(resumed / "checkpoint-4" / "optimizer.bin", weights_only=True))
        assert after.keys() == state.keys()
        equal = {True: torch.equal, False: operator.eq}
        differ = {key for key, value in state.items() if not equal[torch.is_tensor(value)](after[key], value)}
        assert differ == set(), f"resumed at step {step}"


@pytest.mark.parametrize(
    "flags", ["--rank 8", "--use_dora", "--optimizer prodigy --learning_rate 1", "--train_text_encoder"]
)
def test_other_adapters_are_refused(train, flags):
    """A checkpoint goes on with adapters and an optimizer such as it holds, or not at all."""
    train("out", "--checkpointing_steps", 2, "--max_train_steps", 2)
    with pytest.raises(SystemExit, match="The checkpoint was trained with another"):
        train("out", *flags.split(), "--resume_from_checkpoint", "latest")


@pytest.mark.launch
def test_stops_and_kills(start, tiny_model, pictures, tmp_path):
    """A SIGTERM ends with 143 and a checkpoint, a kill -9 leaves the last one, and both go on to the same bits."""
    flags = ("--train_text_encoder", "--lora_dropout", 0.1, "--lora_target_modules", "attention+feedforward")
    flags += ("--encoding_cache_dir", tmp_path / "cache", "--resume_from_checkpoint", "latest", "--use_rslora")
    out = tmp_path / "out"
    arguments = flags_of(tiny_model, pictures, out, *FLAGS, *flags, "--max_train_steps", 1000)
    first = start(arguments, script="train_lora")
    first.until(lambda: rows(out) >= 3)
    os.kill(first.pid, signal.SIGTERM)
    assert first.wait() == 143, first.output()
    (stopped,) = whole_checkpoints(out)
    # Sets come in another order in each process.
    more = {"launcher": [sys.executable], "environment": {"PYTHONHASHSEED": "1"}, "script": "train_lora"}
    second = start([*arguments, "--checkpointing_steps", "2"], **more)
    second.until(lambda: len(whole_checkpoints(out)) >= 3)
    os.kill(second.pid, signal.SIGKILL)
    assert second.wait() == -signal.SIGKILL
    length = max(whole_checkpoints(out)) + 2
    assert "Resuming from" in second.output() and stopped >= 3
    for name in ("out", "whole"):
        run(script, *flags_of(tiny_model, pictures, tmp_path / name, *FLAGS, *flags, "--max_train_steps", length))
    assert same(load_file(tmp_path / "out" / LORA), load_file(tmp_path / "whole" / LORA))
    assert logged(tmp_path / "out") == logged(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.launch
def test_two_processes_train_adapters_as_one(start, train, tiny_model, pictures, tmp_path):
    """Two processes train both models as one does."""
    flags = ("--train_text_encoder", "--gradient_accumulation_steps", 2, "--validation_samples", 1)
    flags += ("--validation_steps", 2, "--lora_target_modules", "all", "--validation_prompt", "red")
    one = train("one", *flags, "--train_batch_size", 2)
    arguments = flags_of(tiny_model, pictures, tmp_path / "more", *FLAGS, *flags, "--train_batch_size", 1)
    finish(functools.partial(start, script="train_lora"), arguments, 2)
    for name in ("loss", "grad_norm", "validation_loss"):
        assert metrics(tmp_path / "more", name) == [(i, pytest.approx(v, rel=1e-3)) for i, v in metrics(one, name)]
    first, second = load_file(one / LORA), load_file(tmp_path / "more" / LORA)
    assert first.keys() == second.keys()
    moved = math.fsum(t.double().square().sum() for name, t in first.items() if "lora_B" in name)
    apart = math.fsum((t - second[name]).double().square().sum() for name, t in first.items())
    assert apart < 1e-4 * moved


def test_the_default_alpha_by_its_number(train):
    """To name what is the default anyway makes no other adapter."""
    out = train("out", "--checkpointing_steps", 2)
    more = ("--max_train_steps", 4, "--resume_from_checkpoint", "latest")
    train("out", "--lora_alpha", 4, *more)
    assert [step for step, _ in metrics(out, "loss")] == [1, 2, 3, 4]
    with pytest.raises(SystemExit, match="another adapter"):
        train("out", "--lora_alpha", 5, *more, "--max_train_steps", 5)
