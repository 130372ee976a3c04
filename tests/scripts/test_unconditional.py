"""What train_unconditional.py does of its own: loss, average, models, data, pictures; its resume, kill and signal."""

import functools
import json
import math
import os
import re
import shutil
import signal
from fnmatch import fnmatch

import datasets
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, ScoreSdeVeScheduler, UNet2DModel
from helpers import (
    SMALL,
    UNET,
    assert_equal,
    cosine,
    drift,
    everything,
    is_whole,
    litter,
    logged,
    make_pictures,
    make_run,
    metrics,
    rows,
    run,
    same,
    watch,
    weights,
    whole_checkpoints,
    write_config,
)
from PIL import Image
from safetensors.torch import load_file, save_file

import train_unconditional as script


FLAGS = ("--resolution", 16, "--save_model_epochs", 0, "--eval_batch_size", 0, "--ddpm_num_inference_steps", 2)
# Whatever draws something, and all that has a state.
RICH = ("--random_flip", "--no-center_crop", "--use_ema", "--gradient_accumulation_steps", 2, "--train_batch_size", 1)
RICH += ("--prediction_type", "v_prediction", "--snr_gamma", 5, "--lr_warmup_steps", 2, "--validation_samples", 1)
RICH += ("--ddpm_num_steps", 100, "--ddpm_beta_schedule", "squaredcos_cap_v2", "--checkpointing_steps", 1)
STILL = ("--learning_rate", 0, "--max_train_steps", 1)  # ends with the weights that it began with


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    """The folder of a tiny UNet's config."""
    return write_config(tmp_path_factory.mktemp("models") / "config")


@pytest.fixture(scope="session")
def dropout_config(tmp_path_factory):
    """The same UNet with dropout, which draws from the global generator."""
    return write_config(tmp_path_factory.mktemp("models") / "dropout", dropout=0.1)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A tiny pipeline of 100 timesteps that predicts the velocity and was saved with another scheduler."""
    torch.manual_seed(2)
    unet = UNet2DModel.from_config(UNET | {"sample_size": 16})
    betas = {"num_train_timesteps": 100, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
    folder = tmp_path_factory.mktemp("models") / "base"
    DDPMPipeline(unet=unet, scheduler=DDIMScheduler(**betas)).save_pretrained(folder)
    return folder


def flags_of(config, data, out, *flags):
    """The command line of a small run, as text; later flags win."""
    model = () if "--pretrained_model_name_or_path" in flags else ("--model_config_name_or_path", config)
    words = (*SMALL.split(), *FLAGS, *model, "--train_data_dir", data, "--output_dir", out, *flags)
    return [str(word) for word in words]


@pytest.fixture
def train(config, pictures, tmp_path):
    """A function that trains in this process, into a named folder that it returns."""

    def call(name, *flags):
        run(script, *flags_of(config, pictures, tmp_path / name, *flags))
        return tmp_path / name

    return call


# Numbers.


def schedule(kind, steps):
    """The products of alphas of a noise schedule, by their formulas."""
    if kind == "linear":
        return np.cumprod(1 - np.linspace(1e-4, 0.02, steps))
    bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.cumprod(1 - np.minimum(1 - bar[1:] / bar[:-1], 0.999))


@pytest.mark.parametrize("gamma", [None, 5.0, math.inf])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("kind, steps", [("linear", 1000), ("squaredcos_cap_v2", 100)])
def test_loss_without_prompts_by_hand(config, pictures, kind, steps, prediction_type, gamma):
    """The loss is the formula's, sample by sample; an infinite gamma weights as the reference does for the picture."""
    flags = ("--ddpm_num_steps", steps, "--ddpm_beta_schedule", kind, "--prediction_type", prediction_type)
    args = script.parse_args(flags_of(config, pictures, "unused", *flags))
    args.snr_gamma = gamma
    torch.manual_seed(0)
    models = script.load_models(make_run(script, args))
    timesteps = torch.tensor([0, steps // 3, steps - 1])
    batch = {"pixel_values": torch.rand(3, 3, 16, 16) * 2 - 1, "noise": torch.randn(3, 3, 16, 16)}
    batch["timesteps"] = timesteps
    wanted = []
    for i, t in enumerate(timesteps.tolist()):
        alpha, image, noise = schedule(kind, steps)[t], batch["pixel_values"][i], batch["noise"][i]
        snr = alpha / (1 - alpha)
        noisy = alpha**0.5 * image + (1 - alpha) ** 0.5 * noise
        velocity = alpha**0.5 * noise - (1 - alpha) ** 0.5 * image
        target = {"epsilon": noise, "v_prediction": velocity, "sample": image}[prediction_type]
        known = min(snr, gamma or 1)
        weight = {"epsilon": known / snr, "v_prediction": known / (snr + 1), "sample": known}[prediction_type]
        with torch.no_grad():
            prediction = models.unet(noisy[None].float(), t).sample[0]
        wanted.append(((prediction - target) ** 2).mean().item() * (1 if gamma is None else weight))
    assert script.compute_loss(models, batch, args)["loss"].item() == pytest.approx(np.mean(wanted), rel=1e-3)


def test_the_loop_without_prompts_by_hand(train, config, monkeypatch):
    """A new model's weights are drawn by the seed, and trained by AdamW with this script's defaults and a cosine."""
    batches = watch(monkeypatch, script).batches
    out = train("out", "--max_train_steps", 5, "--lr_warmup_steps", 2, "--seed", 3)
    torch.manual_seed(3)
    unet = UNet2DModel.from_config(UNET).train()
    unet.save_pretrained(out.with_name("start") / "unet")
    optimizer = torch.optim.AdamW(unet.parameters(), betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    alphas = torch.from_numpy(schedule("linear", 1000)).float()
    losses = []
    for step, batch in enumerate(batches):
        alpha = alphas[batch["timesteps"]][:, None, None, None]
        noisy = alpha**0.5 * batch["pixel_values"] + (1 - alpha) ** 0.5 * batch["noise"]
        loss = (unet(noisy, batch["timesteps"]).sample - batch["noise"]).square().mean()
        loss.backward()
        losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 1e-3 * cosine(step, 2, 5)
        optimizer.step()
        optimizer.zero_grad()
    unet.save_pretrained(out.with_name("hand") / "unet")
    assert metrics(out, "loss") == [(i + 1, pytest.approx(loss, rel=1e-4)) for i, loss in enumerate(losses)]
    assert drift(out, out.with_name("hand"), out.with_name("start")) < 1e-3
    with open(out / "unet" / "config.json") as file:
        assert json.load(file)["sample_size"] == 16


EMA = {
    "power": ("--ema_inv_gamma", 2.0, "--ema_power", 0.5),
    "limit": ("--ema_max_decay", 0.3),
    "offload": ("--ema_power", 0.9, "--offload_ema"),
}


@pytest.mark.parametrize("kind", EMA)
def test_ema_follows_its_flags(train, config, kind):
    """The decay after step t is 1 - (1 + t / gamma)^-power, up to its limit; the pipeline gets the average."""
    steps = ("--max_train_steps", 4, "--checkpointing_steps", 1, "--learning_rate", 1e-2)
    out = train("out", "--use_ema", *steps, *EMA[kind])
    given = dict(zip(EMA[kind][::2], EMA[kind][1::2]))
    gamma, power = given.get("--ema_inv_gamma", 1.0), given.get("--ema_power", 0.75)
    average = weights(out / "checkpoint-1" / "unet")
    for step in range(4):
        trained, saved = (weights(out / f"checkpoint-{step + 1}" / name) for name in ("unet", "unet_ema"))
        decay = min(1 - (1 + step / gamma) ** -power, given.get("--ema_max_decay", 0.9999))
        average = {name: decay * average[name] + (1 - decay) * trained[name] for name in trained}
        for name in average:
            torch.testing.assert_close(saved[name], average[name], rtol=1e-5, atol=1e-6)
    assert same(weights(out / "unet"), saved) and not same(saved, trained)


def test_noise_is_added_in_float32(train, monkeypatch):
    """Under bf16 the UNet's input is that of float32, bit for bit, and weights and moments are float32."""
    inputs, batches = [], watch(monkeypatch, script).batches
    load_models = script.load_models

    def watching(run):
        models = load_models(run)
        models.unet.register_forward_pre_hook(lambda module, given: inputs.append(given[0].clone()))
        return models

    monkeypatch.setattr(script, "load_models", watching)
    out = train("out", "--mixed_precision", "bf16", "--checkpointing_steps", 4)
    assert len(inputs) == 4
    for batch, given in zip(batches, inputs):
        wanted = DDPMScheduler().add_noise(batch["pixel_values"], batch["noise"], batch["timesteps"])
        assert given.dtype == torch.float32 and torch.equal(given, wanted)
    tensors = everything(out / "checkpoint-4") | weights(out)
    assert {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()} == {torch.float32}
    assert not all(torch.equal(tensor, tensor.bfloat16().float()) for tensor in weights(out).values())


def test_a_seed_draws_the_weights(train):
    """New weights are a function of the seed, up to the highest, whatever was drawn before."""
    first = train("first", "--seed", 2**64 - 1, *STILL)
    torch.manual_seed(5)
    assert same(weights(first), weights(train("again", "--seed", 2**64 - 1, *STILL)))
    assert not same(weights(first), weights(train("other", "--seed", 4, *STILL)))


def test_no_seed(train, config, pictures, tmp_path):
    """A run that is given no seed is repeated by the one that it drew."""
    flags = flags_of(config, pictures, tmp_path / "drawn")
    i = flags.index("--seed")
    run(script, *flags[:i], *flags[i + 2 :])
    drawn = re.search(r"^# seed: (\d+)$", (tmp_path / "drawn" / "train_args.yaml").read_text(), re.MULTILINE)[1]
    assert same(weights(tmp_path / "drawn"), weights(train("given", "--seed", drawn)))


# Models.


def test_a_new_unet_by_default(pictures):
    """Without a base and a config, the UNet is the one of the documented commands."""
    with torch.device("meta"):
        unet = script.new_unet(script.parse_args(["--train_data_dir", str(pictures)]))
    assert sum(parameter.numel() for parameter in unet.parameters()) == 113_673_219
    assert unet.config.block_out_channels == (128, 128, 256, 256, 512, 512)
    assert [kind.startswith("Attn") for kind in unet.config.down_block_types] == [False] * 4 + [True, False]
    assert [kind.startswith("Attn") for kind in unet.config.up_block_types] == [False, True] + [False] * 4


def test_a_config_by_its_file(train, config):
    """A config may be given by its folder or as the file itself."""
    by_file = train("file", "--model_config_name_or_path", config / "config.json")
    assert same(weights(by_file), weights(train("folder")))


def test_a_pipeline_as_base(train, base):
    """A base's weights and noise schedule are taken, whatever its scheduler's class; flags win over its schedule."""
    out = train("out", "--pretrained_model_name_or_path", base, *STILL)
    assert same(weights(out), weights(base))
    saved = DDPMPipeline.from_pretrained(out)
    assert isinstance(saved.scheduler, DDPMScheduler) and saved.unet.config._name_or_path != str(base)
    shown = ("num_train_timesteps", "beta_schedule", "prediction_type")
    assert [saved.scheduler.config[name] for name in shown] == [100, "squaredcos_cap_v2", "v_prediction"]
    flags = ("--ddpm_num_steps", 50, "--ddpm_beta_schedule", "linear", "--prediction_type", "sample")
    bent = DDPMPipeline.from_pretrained(train("bent", "--pretrained_model_name_or_path", base, *STILL, *flags))
    assert [bent.scheduler.config[name] for name in shown] == [50, "linear", "sample"]
    assert str(base) not in "".join(file.read_text() for file in out.glob("*/*.json"))


def test_a_unet_as_base(train, base, tmp_path):
    """A checkpoint's average is a base too; its schedule is the usual one."""
    out = train("out", "--pretrained_model_name_or_path", base, "--use_ema", "--checkpointing_steps", 2)
    average = out / "checkpoint-2" / "unet_ema"
    again = train("again", "--pretrained_model_name_or_path", average, *STILL)
    assert same(weights(again / "unet"), weights(average))
    assert DDPMPipeline.from_pretrained(again).scheduler.config.num_train_timesteps == 1000


def test_a_base_of_fp16_files_only(train, base, tmp_path):
    """Files in half precision load without being asked for, and train in float32."""
    half = DDPMPipeline.from_pretrained(base).to(torch.float16)
    half.save_pretrained(tmp_path / "half", variant="fp16")
    found = train("found", "--pretrained_model_name_or_path", tmp_path / "half")
    named = train("named", "--pretrained_model_name_or_path", tmp_path / "half", "--variant", "fp16")
    assert same(weights(found), weights(named))
    assert {tensor.dtype for tensor in weights(found).values()} == {torch.float32}


def test_a_torn_file_is_not_passed_over(train, base, tmp_path):
    """A base whose file is torn is refused, though it has another one in half precision."""
    model = shutil.copytree(base, tmp_path / "model")
    DDPMPipeline.from_pretrained(base).to(torch.float16).save_pretrained(model, variant="fp16")
    file = model / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(SystemExit, match="Unable to load weights"):
        train("out", "--pretrained_model_name_or_path", model)


def test_a_base_that_lacks_weights_is_refused(train, base, tmp_path):
    """It is said which."""
    model = shutil.copytree(base, tmp_path / "model")
    file = model / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors.pop("conv_in.bias")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(SystemExit, match="model lacks weights, such as conv_in.bias"):
        train("out", "--pretrained_model_name_or_path", model)


@pytest.mark.parametrize("kind", ["LDMPipeline", "ScoreSdeVePipeline", "ConsistencyModelPipeline"])
def test_other_kinds_of_models_are_refused(train, base, tmp_path, kind):
    """What works on latents or on amounts of noise is no DDPM of pixels, though its UNet could be loaded."""
    model = shutil.copytree(base, tmp_path / "model")
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps(index | {"_class_name": kind}))
    with pytest.raises(SystemExit, match=f"model is a {kind}: this script trains DDPMPipeline"):
        train("out", "--pretrained_model_name_or_path", model)


def test_another_kind_of_noise_is_refused(train, base, tmp_path):
    """A scheduler without a DDPM's alphas adds noise in another way."""
    model = shutil.copytree(base, tmp_path / "model")
    index = json.loads((model / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "ScoreSdeVeScheduler"]
    (model / "model_index.json").write_text(json.dumps(index))
    ScoreSdeVeScheduler().save_pretrained(model / "scheduler")
    with pytest.raises(SystemExit, match="adds noise as a ScoreSdeVeScheduler does"):
        train("out", "--pretrained_model_name_or_path", model)


def test_a_checkpoints_average_knows_its_size(train, tmp_path):
    """Else no pipeline could draw with it."""
    out = train("out", "--use_ema", "--checkpointing_steps", 1, "--max_train_steps", 1)
    for part in ("unet", "unet_ema"):
        assert UNet2DModel.from_pretrained(out / "checkpoint-1" / part).config.sample_size == 16


def test_a_unet_for_amounts_of_noise_is_refused(train, tmp_path):
    """It divides by the timestep, which may be 0."""
    config = write_config(tmp_path / "config", time_embedding_type="fourier")
    with pytest.raises(SystemExit, match="cannot take timestep 0"):
        train("out", "--model_config_name_or_path", config)


def test_unusable_models_are_refused(train, tiny_model, base, tmp_path):
    """What is no UNet of three channels without classes is refused in a sentence, before anything is written."""

    def refused(message, *flags):
        with pytest.raises(SystemExit, match=message):
            train("refused", *flags)
        assert [path.name for path in (tmp_path / "refused").glob("*")] in ([], [".lock"])

    refused("is a StableDiffusionPipeline: this script trains", "--pretrained_model_name_or_path", tiny_model)
    refused("UNet2DConditionModel", "--model_config_name_or_path", tiny_model / "unet")
    wrong = {
        "channels": {"in_channels": 1, "out_channels": 1},
        "classes": {"num_class_embeds": 10},
        "chanels": {"block_out_chanels": [8, 16]},
        "NoBlock": {"down_block_types": ["NoBlock", "AttnDownBlock2D"]},
        "no UNet2DModel": {"norm_num_groups": 7},
    }
    for i, (message, change) in enumerate(wrong.items()):
        refused(message, "--model_config_name_or_path", write_config(tmp_path / str(i), **change))
    (tmp_path / "torn.json").write_text("{")
    refused("torn.json", "--model_config_name_or_path", tmp_path / "torn.json")
    deep = {
        "block_out_channels": [8] * 5,
        "down_block_types": ["DownBlock2D"] * 5,
        "up_block_types": ["UpBlock2D"] * 5,
    }
    deep = write_config(tmp_path / "deep", **deep)
    refused("multiple of 16", "--model_config_name_or_path", deep, "--resolution", 24)
    pickles = shutil.copytree(base, tmp_path / "pickles")
    (file,) = (pickles / "unet").glob("*.safetensors")
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    refused("safetensors", "--pretrained_model_name_or_path", pickles)


# Data.


def test_captions_do_not_matter(train, pictures, tmp_path, capsys):
    """Metadata, .txt and parquet files beside pictures are only counted: the pictures alone give the same weights."""
    plain, torn = tmp_path / "plain", tmp_path / "torn"
    for folder in (plain, torn):
        shutil.copytree(pictures, folder)
        (folder / "metadata.jsonl").unlink()
    (torn / "metadata.jsonl").write_text('{"file_name": "not there.png"}\n{')
    (torn / "000.txt").write_bytes(b"\xff")
    (torn / "urls.parquet").write_bytes(b"x")
    wanted = weights(train("wanted"))
    for folder in (plain, torn):
        assert same(weights(train(f"of-{folder.name}", "--train_data_dir", folder)), wanted)
    assert "passed over: 1 .txt, 1 .jsonl, 1 .parquet\n" in capsys.readouterr().out


def test_parquet_with_another_column(train, pictures, tmp_path):
    """Rows of a parquet file train as the same pictures in a folder do; a wrong column is refused by its flag."""
    files = sorted(file for file in pictures.iterdir() if file.suffix != ".jsonl")
    rows = {"scan": [{"bytes": file.read_bytes(), "path": None} for file in files]}
    (tmp_path / "rows").mkdir()
    table = datasets.Dataset.from_dict(rows, features=datasets.Features({"scan": datasets.Image()}))
    table.to_parquet(tmp_path / "rows" / "train.parquet")
    data = ("--train_data_dir", tmp_path / "rows")
    assert same(weights(train("parquet", *data, "--image_column", "scan")), weights(train("folder")))
    with pytest.raises(SystemExit, match="--image_column image is not among .* scan"):
        train("wrong", *data)


@pytest.mark.parametrize("kind", ["16-bit", "float"])
def test_fine_grey_keeps_its_precision(config, tmp_path, kind):
    """Grey of 16 bits or of floats reaches the UNet in steps finer than 8 bits, in three equal channels."""
    grey = np.linspace(0.2, 0.21, 256).reshape(16, 16)  # within three levels of 8 bits
    if kind == "16-bit":
        Image.fromarray((grey * 65535).round().astype(np.uint16)).save(tmp_path / "fine.png")
    else:
        Image.fromarray(grey.astype(np.float32)).save(tmp_path / "fine.tiff")
    args = script.parse_args(flags_of(config, tmp_path, "unused", "--preserve_input_precision"))
    (record,) = script.read_records(args)
    digest = script.digest(script.read_bytes(record))
    samples = script.Samples(args, [record | {"size": (16, 16), "digest": digest}], 0, 16, (3, 16, 16), 1000)
    pixels = samples[0, 0]["pixel_values"]
    assert pixels.shape == (3, 16, 16) and torch.equal(pixels[0], pixels[1]) and torch.equal(pixels[0], pixels[2])
    np.testing.assert_allclose(pixels[0], 2 * grey - 1, atol=2e-5)
    assert len(pixels[0].unique()) > 200


# What a run leaves.


def test_grids_without_prompts(train, config):
    """A grid holds --eval_batch_size pictures, each by its own seed, and comes every so many epochs."""
    flags = ("--eval_batch_size", 3, "--save_images_epochs", 2, "--train_batch_size", 3, "--max_train_steps", 6)
    out = train("out", *flags, "--use_ema", "--ddpm_num_inference_steps", 4)
    assert sorted(file.name for file in (out / "samples").iterdir()) == [f"step-00000{step}.png" for step in (0, 4, 6)]
    grid = np.asarray(Image.open(out / "samples" / "step-000006.png"))
    assert grid.shape == (16, 48, 3)
    pipeline = DDPMPipeline.from_pretrained(out)
    pipeline.set_progress_bar_config(disable=True)
    for i in range(3):
        image = pipeline(generator=torch.Generator().manual_seed(i), num_inference_steps=4).images[0]
        assert np.array_equal(np.asarray(image), grid[:, 16 * i : 16 * i + 16])
    assert not list((train("none") / "samples").iterdir())
    usual = train("usual", "--eval_batch_size", 1, "--max_train_samples", 2, "--max_train_steps", 12)
    assert sorted(file.name for file in (usual / "samples").iterdir()) == [f"step-{i:06d}.png" for i in (0, 10, 12)]


def test_few_timesteps(train, tmp_path, monkeypatch):
    """A schedule of fewer timesteps than the pictures' steps is sampled at all of them, and the card says so."""
    out = train("out", "--ddpm_num_steps", 3, "--ddpm_num_inference_steps", 50, "--eval_batch_size", 1)
    card = (out / "README.md").read_text()
    assert "num_inference_steps=3)" in card and "licence" not in card and "pipeline_tag: unconditional" in card
    code = card.split("```python\n")[1].split("```")[0].replace("'out'", repr(str(out)))
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert Image.open(tmp_path / "picture.png").size == (16, 16)


def test_what_is_published_without_prompts(train, base):
    """All that the result needs is uploaded, and nothing else; a base's licence is mentioned."""
    flags = ("--checkpointing_steps", 2, "--eval_batch_size", 1, "--use_ema", "--mixed_precision", "bf16")
    out = train("out", "--pretrained_model_name_or_path", base, *flags)
    files = [file.relative_to(out).as_posix() for file in out.rglob("*") if file.is_file()]
    sent = {file for file in files if any(fnmatch(file, pattern) for pattern in script.PUBLISHED)}
    wanted = {"README.md", "model_index.json", "scheduler/scheduler_config.json", "unet/config.json"}
    wanted |= {"unet/diffusion_pytorch_model.safetensors", "samples/step-000000.png", "samples/step-000004.png"}
    assert sent == wanted
    assert "The base model's licence applies." in (out / "README.md").read_text()


def test_the_pipeline_is_written_every_few_epochs(train, monkeypatch):
    """--save_model_epochs writes the average so far as a pipeline, and changes no weight of the run."""
    saved, original = [], script.save_model

    def saving(run, models):
        original(run, models)
        saved.append(weights(run.args.output_dir))

    monkeypatch.setattr(script, "save_model", saving)
    flags = ("--train_batch_size", 3, "--max_train_steps", 5, "--use_ema", "--checkpointing_steps", 1)
    often = train("often", *flags, "--save_model_epochs", 1)  # of two steps
    assert len(saved) == 3
    for step, tensors in zip((2, 4, 5), saved):
        average = weights(often / f"checkpoint-{step}" / "unet_ema")
        assert all(torch.equal(tensors[f"unet/{name}"], tensor) for name, tensor in average.items())
    saved.clear()
    assert same(weights(train("rarely", *flags)), weights(often)) and len(saved) == 1


def test_a_diverging_run_leaves_the_last_good_pipeline(train, tmp_path, monkeypatch):
    """Weights that are no numbers are not written as a pipeline, though their loss is only read a step later."""
    original = script.compute_loss

    def diverging(models, batch, args):
        return {"loss": original(models, batch, args)["loss"] * (math.nan if len(steps) == 3 else 1)}

    steps, prepare = [], script.after_step

    def counting(run, models):
        prepare(run, models)
        steps.append(run.global_step)

    monkeypatch.setattr(script, "compute_loss", diverging)
    monkeypatch.setattr(script, "after_step", counting)
    with pytest.raises(SystemExit, match="Step 4 "):
        train("out", "--train_batch_size", 3, "--save_model_epochs", 1, "--max_train_steps", 6)
    assert 4 in steps  # the pipeline was due
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "out" / "unet").values())


# Flags.


BAD = [
    ("--prediction_type x", "prediction_type"),
    ("--ddpm_beta_schedule steep", "ddpm_beta_schedule"),
    ("--ddpm_num_steps 0", "ddpm_num_steps"),
    ("--ddpm_num_inference_steps 0", "ddpm_num_inference_steps"),
    ("--ema_inv_gamma 0", "ema_inv_gamma"),
    ("--ema_power -1", "ema_power"),
    ("--ema_max_decay 1.5", "ema_max_decay"),
    ("--eval_batch_size -1", "eval_batch_size"),
    ("--save_model_epochs -1", "save_model_epochs"),
    ("--save_images_epochs 2 --validation_steps 5", "not both"),
    ("--pretrained_model_name_or_path a/b --model_config_name_or_path c/d", "not both"),
    ("--model_config_name_or_path ./nowhere.json", "--model_config_name_or_path ./nowhere.json"),
    ("--validation_prompts cat", "unrecognized"),
]


@pytest.mark.parametrize("flags, message", BAD)
def test_bad_flags(flags, message, pictures, capsys):
    """What is wrong with a flag is said in a sentence that names it."""
    with pytest.raises(SystemExit) as end:
        script.parse_args(["--train_data_dir", str(pictures), *flags.split()])
    said = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and message in said


# Stopping and going on.


def test_resuming_a_new_model_is_exact(train, dropout_config, wide_pictures):
    """A run that is resumed ends with the same bits of weights, average, optimizer and log."""
    flags = ("--model_config_name_or_path", dropout_config, "--train_data_dir", wide_pictures)
    flags += (*RICH, "--max_train_steps", 6, "--validation_steps", 2)
    whole = train("whole", *flags)
    assert len({loss for _, loss in metrics(whole, "loss")}) == 6
    for step in (2, 5):
        begun = whole.with_name(f"from-{step}") / f"checkpoint-{step}"
        shutil.copytree(whole / begun.name, begun)
        resumed = train(begun.parent.name, *flags, "--resume_from_checkpoint", "latest")
        for later in range(step + 1, 7):
            name = f"checkpoint-{later}"
            assert same(everything(resumed / name), everything(whole / name)), f"{name}, resumed at step {step}"
        assert logged(resumed) == logged(whole), f"resumed at step {step}"
        assert same(weights(resumed / "unet"), weights(whole / "unet")), f"resumed at step {step}"


def test_another_new_model_is_not_resumed(train, config, dropout_config, base, pictures, tmp_path):
    """Another model, schedule, prediction or data set is refused; a new model does not depend on its weights."""
    out = train("out", "--checkpointing_steps", 2)
    data = make_pictures(tmp_path / "data", count=5)
    further = ("--max_train_steps", 6, "--resume_from_checkpoint", "latest")
    other = {
        "base model": [("--model_config_name_or_path", dropout_config), ("--pretrained_model_name_or_path", base)],
        "noise schedule": [("--ddpm_num_steps", 900), ("--ddpm_beta_schedule", "sigmoid")],
        "prediction type": [("--prediction_type", "v_prediction")],
        "data set": [("--train_data_dir", data)],
    }
    for what, changes in other.items():
        for change in changes:
            with pytest.raises(SystemExit, match=f"another {what}"):
                train("out", *change, *further)
    trained = shutil.copytree(base, tmp_path / "trained")
    begun = train("begun", "--pretrained_model_name_or_path", trained, "--checkpointing_steps", 2)
    shutil.copytree(begun / "unet", trained / "unet", dirs_exist_ok=True)
    with pytest.raises(SystemExit, match="another base model"):
        train("begun", "--pretrained_model_name_or_path", trained, *further)
    assert whole_checkpoints(out) == [2, 4]


@pytest.mark.launch
@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM"])
def test_a_stopped_process_goes_on_exactly(how, start, train, dropout_config, wide_pictures, tmp_path):
    """A run that is killed as it writes, or told to stop, ends by the same command as if it had never stopped."""
    out, start = tmp_path / "out", functools.partial(start, script="train_unconditional")
    steps = ("--max_train_steps", 9)
    if how == "SIGTERM":
        steps = ("--max_train_steps", 2000, "--checkpointing_steps", 1000, "--lr_scheduler", "constant_with_warmup")
    flags = (*RICH, "--save_model_epochs", 1, *steps, "--resume_from_checkpoint", "latest")
    command = flags_of(dropout_config, wide_pictures, out, *flags)
    if how == "SIGKILL":
        process = start(command, watched=out, trigger=(r"checkpoint-\d+", 30, ("kill", 0)))
        assert process.wait() == -signal.SIGKILL
        assert whole_checkpoints(out) and litter(out)
    else:
        process = start(command)
        process.until(lambda: rows(out) >= 3)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(30) == 143, process.output()
        command += ["--max_train_steps", str(max(whole_checkpoints(out)) + 2), "--checkpointing_steps", "1"]
    assert start(command).wait() == 0
    last = max(whole_checkpoints(out))
    flags = ("--model_config_name_or_path", dropout_config, "--train_data_dir", wide_pictures, *RICH)
    whole = train("whole", *flags, *steps, "--max_train_steps", last, "--checkpointing_steps", 1)
    assert_equal(out / f"checkpoint-{last}", whole / f"checkpoint-{last}")
    assert same(weights(out / "unet"), weights(whole / "unet")) and logged(out) == logged(whole)
    assert all(is_whole(path) for path in out.glob("checkpoint-*")) and litter(out) == []


def test_other_names_of_flags(config, pictures, tmp_path, capsys):
    """A flag's other name sets it, in a config too; its help has no default, and the command line replaces it."""
    args = script.parse_args(flags_of(config, pictures, "out", "--num_epochs", 7, "--logger", "none"))
    assert (args.num_train_epochs, args.report_to) == (7, "none") and not hasattr(args, "num_epochs")
    (tmp_path / "flags.yaml").write_text("save_images_epochs: 5\nlogger: none\n")
    config_flags = ("--config", tmp_path / "flags.yaml")
    assert script.parse_args(flags_of(config, pictures, "out", *config_flags)).validation_epochs == 5
    args = script.parse_args(flags_of(config, pictures, "out", *config_flags, "--validation_steps", 2))
    assert (args.validation_epochs, args.validation_steps) == (None, 2)
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "the same as --num_train_epochs --save_images_epochs" in said and "(default: 10)" in said


def test_timesteps_are_those_of_the_schedule(config, tmp_path, pictures, train, monkeypatch):
    """A base whose own betas are fewer than its config says is trained on these, and on no timestep beyond."""
    torch.manual_seed(0)
    unet = UNet2DModel.from_config(UNet2DModel.load_config(config))
    scheduler = DDPMScheduler(trained_betas=np.linspace(1e-3, 0.2, 10).tolist())
    DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(tmp_path / "base")
    batches = watch(monkeypatch, script).batches
    train("out", "--pretrained_model_name_or_path", tmp_path / "base", "--max_train_steps", 6)
    drawn = [t for batch in batches for t in batch["timesteps"].tolist()]
    assert len(drawn) > 10 and max(drawn) <= 9 and len(set(drawn)) > 3
