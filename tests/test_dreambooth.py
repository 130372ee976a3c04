"""What train_dreambooth.py adds: the prior's loss and pictures, a trained text encoder, captions, its own flags."""

import fnmatch
import gc
import json
import os
import shlex
import shutil
import signal
from types import SimpleNamespace

import forked
import numpy as np
import pytest
import torch
from conftest import make_pictures, metrics, run, same, weights
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageOps
from safetensors.torch import load_file
from test_exact import count_calls, drift, everything
from test_stop import finish, linux, litter, losses, whole_checkpoints
from transformers import CLIPTextModel

import train_dreambooth as script


SMALL = "--resolution 32 --train_batch_size 2 --max_train_steps 2 --seed 1 --learning_rate 1e-3 --lr_warmup_steps 0"
FLAGS = (*SMALL.split(), "--center_crop", "--checkpointing_steps", 0, "--report_to", "none")
INSTANCE, CLASS = "a photo of sks thing", "a photo of thing"
LOSSES = ("loss", "instance_loss", "prior_loss", "grad_norm", "validation_loss")
# Both models trained, prior preservation, and whatever draws or counts something.
RICH = "--train_text_encoder --train_batch_size 1 --gradient_accumulation_steps 2 --random_flip --snr_gamma 5"
RICH += " --proportion_empty_prompts 0.3 --lr_scheduler constant_with_warmup --lr_warmup_steps 2"
RICH = (*RICH.split(), "--validation_samples", 1, "--validation_steps", 2)
STEPS = ("--max_train_steps", 6, "--checkpointing_steps", 1)


@pytest.fixture(scope="session")
def subject(tmp_path_factory):
    """Five pictures without captions."""
    folder = make_pictures(tmp_path_factory.mktemp("data") / "subject", count=5)
    (folder / "metadata.jsonl").unlink()
    return folder


@pytest.fixture(scope="session")
def classes(tmp_path_factory):
    """Eight pictures of a class, other ones than the subject's."""
    folder = make_pictures(tmp_path_factory.mktemp("data") / "class", count=8)
    (folder / "metadata.jsonl").unlink()
    for file in folder.iterdir():
        ImageOps.flip(Image.open(file)).save(file)
    return folder


@pytest.fixture(scope="session")
def flags_of(tiny_model, subject, tmp_path_factory):
    """Returns the command line of a small run; later flags win."""
    cache = tmp_path_factory.mktemp("cache")

    def flags(out, *more):
        places = ("--pretrained_model_name_or_path", tiny_model, "--instance_data_dir", subject, "--output_dir", out)
        places += ("--encoding_cache_dir", cache, "--instance_prompt", INSTANCE)
        return [str(flag) for flag in (*FLAGS, *places, *more)]

    return flags


def prior(folder, count=8):
    """The flags of prior preservation."""
    words = ("--class_data_dir", folder, "--class_prompt", CLASS, "--num_class_images", count)
    return ("--with_prior_preservation", *words)


@pytest.fixture
def train(flags_of, tmp_path):
    """A function that trains in this process, into a named folder that it returns."""

    def call(name, *flags):
        run(script, *flags_of(tmp_path / name, *flags))
        return tmp_path / name

    return call


@pytest.fixture(scope="module")
def rich(flags_of, classes, tmp_path_factory):
    """A run with everything that draws or is counted, which others are compared with."""
    out = tmp_path_factory.mktemp("rich") / "out"
    run(script, *flags_of(out, *RICH, *prior(classes), *STEPS))
    return out


def logged(out):
    """All logged numbers that are not about time or memory."""
    return [metrics(out, name) for name in (*LOSSES, "lr")]


def watch_loss(monkeypatch):
    """Returns the growing list of what compute_loss gets: the models' modes, the batch and the result."""
    calls, original = [], script.compute_loss

    def watching(models, batch, args):
        modes = [model.training for model in (models.unet, *models.text_encoders)]
        result = original(models, batch, args)
        calls.append((models, modes, batch, result))
        return result

    monkeypatch.setattr(script, "compute_loss", watching)
    return calls


# Numbers


@pytest.mark.parametrize(
    "bsz, gamma, target, flags",
    [(1, None, "epsilon", ()), (3, 0.01, "epsilon", ("--offset_noise",)), (2, 1.0, "v_prediction", ())],
)
def test_prior_loss_by_hand(train, classes, tiny_model, monkeypatch, bsz, gamma, target, flags):
    """Each part is the weighted mean over its own pictures under their own prompt; the loss adds them up."""
    calls = watch_loss(monkeypatch)
    flags += ("--train_batch_size", bsz, "--max_train_steps", 1, "--prediction_type", target)
    flags += ("--prior_loss_weight", 0.3)
    out = train("out", *flags, *prior(classes), *(("--snr_gamma", gamma) if gamma else ()))
    ((_, _, batch, _),) = calls
    unet = UNet2DConditionModel.from_pretrained(tiny_model / "unet")
    scheduler = DDPMScheduler.from_pretrained(tiny_model / "scheduler")
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model)
    assert batch["caption"] == [INSTANCE, CLASS] * bsz
    parts = {INSTANCE: [], CLASS: []}
    for i, caption in enumerate(batch["caption"]):
        latents = batch["mean"][i] + batch["std"][i] * batch["posterior_noise"][i]
        latents = latents * pipeline.vae.config.scaling_factor
        noise = batch["noise"][i] + ("--offset_noise" in flags) * 0.1 * batch["offset_noise"][i]
        alpha = scheduler.alphas_cumprod[batch["timesteps"][i]]
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        wanted = {"epsilon": noise, "v_prediction": alpha.sqrt() * noise - (1 - alpha).sqrt() * latents}[target]
        with torch.no_grad():
            embedding = pipeline.encode_prompt(caption, "cpu", 1, False)[0]
            prediction = unet(noisy[None], batch["timesteps"][i], embedding).sample[0]
        snr = (alpha / (1 - alpha)).item()
        weight = min(snr, gamma) / (snr + (target == "v_prediction")) if gamma else 1
        parts[caption].append(weight * (prediction - wanted).square().mean().item())
    instance_loss, prior_loss = (np.mean(parts[caption]) for caption in (INSTANCE, CLASS))
    hand = (instance_loss + 0.3 * prior_loss, instance_loss, prior_loss)
    for name, value in zip(LOSSES, hand):
        assert metrics(out, name) == [(1, pytest.approx(value, rel=1e-4))], name
    assert abs(instance_loss - prior_loss) > 1e-3  # else mixing them up would not show


def test_plain_loss_has_no_parts(train):
    """Without prior preservation there is one loss, of the instance pictures alone."""
    out = train("out")
    assert len(metrics(out, "loss")) == 2 and metrics(out, "prior_loss") == metrics(out, "instance_loss") == []


def test_accumulation_is_a_larger_batch(train, classes, rich, tiny_model):
    """Two accumulated batches of one pair are one of two pairs, in each part of the loss and in both models."""
    out = train("out", *RICH, *prior(classes), *STEPS, "--train_batch_size", 2, "--gradient_accumulation_steps", 1)
    for name in LOSSES:
        assert metrics(out, name) == [(step, pytest.approx(value, rel=1e-4)) for step, value in metrics(rich, name)]
    for step, loss in metrics(out, "loss"):
        parts = dict(metrics(out, "instance_loss"))[step] + dict(metrics(out, "prior_loss"))[step]
        assert loss == pytest.approx(parts, rel=1e-6)
    assert drift(rich, out, tiny_model) < 1e-3


@pytest.mark.parametrize("total, sizes", [(2, (5, 8)), (3, (5, 2)), (1, (1, 3))])
def test_pairs(total, sizes):
    """Instance and class pictures take turns, each kind in whole passes of its own; neither starves."""
    steps = [script.paired_keys(step, total, sizes, 1) for step in range(sizes[0] * sizes[1])]
    assert all(len(keys) == 2 * total for keys in steps)
    for first, size in ((0, sizes[0]), (1, sizes[1])):
        stream = [key for keys in steps for key in keys[first::2]]
        for epoch in range(len(stream) // size):
            indices = range(first * sizes[0], first * sizes[0] + size)
            assert sorted(stream[epoch * size :][:size]) == [(epoch, index) for index in indices]
    alone = script.paired_keys(3, total, (sizes[0], 0), 1)
    assert alone == script.step_keys(3, total, sizes[0], 1)


@pytest.mark.parametrize("with_prior, steps", [(False, 3), (True, 4)])
def test_an_epoch_meets_every_picture(flags_of, classes, tmp_path, with_prior, steps):
    """--num_train_epochs counts passes over the larger of the two kinds: 5 pictures, or 8, in batches of 2."""
    words = flags_of(tmp_path / "out", *(prior(classes) if with_prior else ()))
    place = words.index("--max_train_steps")
    run(script, *words[:place], *words[place + 2 :])
    assert len(metrics(tmp_path / "out", "loss")) == steps


@pytest.mark.parametrize(
    "flags, rates",
    [
        ("--lr_scheduler polynomial --lr_power 2", [1, 0.5625, 0.25, 0.0625]),
        ("--lr_scheduler cosine_with_restarts --lr_num_cycles 2", [1, 0.5, 1, 0.5]),
    ],
)
def test_learning_rates(train, flags, rates):
    """--lr_power and --lr_num_cycles shape the learning rate; polynomial ends at 1e-7."""
    out = train("out", *flags.split(), "--max_train_steps", 4)
    assert [rate for _, rate in metrics(out, "lr")] == [pytest.approx(1e-3 * rate, rel=2e-3) for rate in rates]


# Class pictures


@pytest.fixture
def fast_drawing(monkeypatch):
    """Two sampler steps instead of fifty; returns the growing list of the calls' prompts."""
    calls, original = [], StableDiffusionPipeline.__call__

    def fast(self, prompt, **settings):
        calls.append(prompt)
        return original(self, prompt, **{"num_inference_steps": 2, **settings})

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", fast)
    return calls


def state_of(folder):
    """Bytes and times of a folder's files."""
    return {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()}


def test_class_pictures_are_drawn_once(train, fast_drawing, monkeypatch, tmp_path):
    """Missing ones are drawn as PNG, all different; what is there stays and counts; the drawing model is freed."""
    folder = tmp_path / "new" / "class"
    live, load_models = [], script.load_models

    def counting(args):
        live.append(sum(isinstance(thing, UNet2DConditionModel) for thing in gc.get_objects()))
        return load_models(args)

    gc.collect()
    before = sum(isinstance(thing, UNet2DConditionModel) for thing in gc.get_objects())
    monkeypatch.setattr(script, "load_models", counting)
    revisions, from_pretrained = [], StableDiffusionPipeline.from_pretrained
    watched = lambda base, **how: revisions.append(how["revision"]) or from_pretrained(base, **how)  # noqa: E731
    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", watched)
    train("first", *prior(folder, 3), "--sample_batch_size", 2, "--revision", "tag")
    assert revisions == ["tag", "tag"]  # of the model that draws, and of the one that is trained
    assert fast_drawing == [[CLASS, CLASS], [CLASS]] and live == [before]
    first = state_of(folder)
    assert sorted(first) == ["class-00000.png", "class-00001.png", "class-00002.png"]
    assert all(data.startswith(b"\x89PNG") for data, _ in first.values())
    assert len({data for data, _ in first.values()}) == 3 and litter(folder) == []
    assert {Image.open(file).size for file in folder.iterdir()} == {(48, 48)}
    fast_drawing.clear()
    train("again", *prior(folder, 3))
    assert fast_drawing == [] and state_of(folder) == first
    Image.new("RGB", (50, 40), "red").save(folder / "mine.jpg")
    (folder / "class-00001.png").unlink()
    kept = state_of(folder)
    train("more", *prior(folder, 5))
    assert [len(prompts) for prompts in fast_drawing] == [2]
    assert sorted(state_of(folder)) == [*(f"class-0000{i}.png" for i in range(4)), "mine.jpg"]
    assert kept.items() <= state_of(folder).items()
    assert state_of(folder)["class-00001.png"][0] != state_of(folder)["class-00003.png"][0]


def test_a_stop_while_drawing_keeps_what_is_drawn(train, monkeypatch, fast_drawing, tmp_path):
    """SIGTERM in the second of three turns ends after it; the next run draws only the rest, the same pictures."""
    flags = ("--sample_batch_size", 2, "--num_class_images", 6)
    train("whole", *prior(tmp_path / "whole-class"), *flags)
    fast_drawing.clear()
    drawing = StableDiffusionPipeline.__call__

    def interrupted(self, *arguments, **settings):
        if len(fast_drawing) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return drawing(self, *arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(StableDiffusionPipeline, "__call__", interrupted)
        with pytest.raises(SystemExit) as end:
            train("stopped", *prior(tmp_path / "class"), *flags)
    assert end.value.code == 128 + signal.SIGTERM
    drawn = state_of(tmp_path / "class")
    assert sorted(drawn) == [f"class-0000{i}.png" for i in range(4)]
    train("stopped", *prior(tmp_path / "class"), *flags, "--resume_from_checkpoint", "latest")
    assert [len(prompts) for prompts in fast_drawing] == [2, 2, 2]
    assert drawn.items() <= state_of(tmp_path / "class").items()
    whole, stopped = (state_of(tmp_path / name) for name in ("whole-class", "class"))
    assert {name: data for name, (data, _) in whole.items()} == {name: data for name, (data, _) in stopped.items()}
    assert metrics(tmp_path / "whole", "loss") == metrics(tmp_path / "stopped", "loss")


def test_only_so_many_class_pictures(train, classes, monkeypatch):
    """Of more pictures than --num_class_images, the first are trained on; captions beside them do not count."""
    calls = watch_loss(monkeypatch)
    folder = shutil.copytree(classes, classes.with_name("captioned"))
    for file in list(folder.iterdir()):
        file.with_suffix(".txt").write_text("something else")
    train("out", *prior(folder, 1), "--no_encoding_cache")
    pixels = [batch["pixel_values"][1::2] for _, _, batch, _ in calls]
    assert len({picture.numpy().tobytes() for pictures in pixels for picture in pictures}) == 1
    assert {caption for _, _, batch, _ in calls for caption in batch["caption"]} == {INSTANCE, CLASS}


# The text encoder


def test_a_frozen_text_encoder_runs_once_a_prompt(train, classes, monkeypatch, tiny_model, tmp_path):
    """The instance prompt is encoded once in a run, the class prompt too, and by the next run neither."""
    texts = count_calls(monkeypatch, CLIPTextModel, "forward")
    images = count_calls(monkeypatch, AutoencoderKL, "encode")
    flags = ("--max_train_steps", 4, "--encoding_cache_dir", tmp_path / "cache")
    out = train("alone", *flags)
    assert (len(texts), len(images)) == (1, 5)
    train("with-class", *flags, *prior(classes))
    assert (len(texts), len(images)) == (2, 5 + 8)
    again = train("again", *flags, "--pre_compute_text_embeddings", "--set_grads_to_none")
    assert (len(texts), len(images)) == (2, 5 + 8)
    assert same(weights(out), weights(again))
    for part in ("vae", "text_encoder"):
        assert same(weights(out / part), weights(tiny_model / part))
    assert not same(weights(out / "unet"), weights(tiny_model / "unet"))


def test_a_trained_text_encoder_is_saved(rich, tiny_model):
    """Both models leave changed in float32 and the VAE as it came; result and last checkpoint draw the same."""
    for part in ("unet", "text_encoder"):
        trained, base = weights(rich / part), weights(tiny_model / part)
        assert trained.keys() == base.keys() and not any(torch.equal(trained[name], base[name]) for name in base)
        assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
        assert same(trained, weights(rich / "checkpoint-6" / part))
    assert same(weights(rich / "vae"), weights(tiny_model / "vae"))
    unet = UNet2DConditionModel.from_pretrained(rich / "checkpoint-6" / "unet")
    text_encoder = CLIPTextModel.from_pretrained(rich / "checkpoint-6" / "text_encoder")
    checkpoint = StableDiffusionPipeline.from_pretrained(tiny_model, unet=unet, text_encoder=text_encoder)
    pictures = []
    for pipeline in (checkpoint, StableDiffusionPipeline.from_pretrained(rich)):
        pipeline.set_progress_bar_config(disable=True)
        settings = {"generator": torch.Generator().manual_seed(0), "output_type": "np", "num_inference_steps": 2}
        pictures.append(pipeline(INSTANCE, height=32, width=32, **settings).images[0])
    assert np.array_equal(*pictures) and pictures[0].std() > 0


def test_what_is_published_is_whole(rich, tmp_path):
    """The files that go to the Hub are those of a pipeline, with its card; the card says how to draw the subject."""
    for file in (path for path in rich.rglob("*") if path.is_file()):
        name = str(file.relative_to(rich))
        if any(fnmatch.fnmatch(name, pattern) for pattern in script.PUBLISHED):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, tmp_path / name)
    parts = {"unet", "vae", "text_encoder", "tokenizer", "scheduler"}
    assert {path.name for path in tmp_path.iterdir()} == parts | {"README.md", "model_index.json"}
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path)
    assert same(pipeline.text_encoder.state_dict(), CLIPTextModel.from_pretrained(rich / "text_encoder").state_dict())
    card = (tmp_path / "README.md").read_text()
    assert f"prompt = {INSTANCE!r}" in card and "- dreambooth" in card and "| prior_loss_weight | 1.0 |" in card


def test_modes_and_validation(train, classes, rich, monkeypatch, fast_drawing):
    """Both models train in train mode and are validated in eval mode; pictures and their sampler change no weight."""
    monkeypatch.setattr(script, "VALIDATION_STEPS", 2)
    samplers = []
    original = StableDiffusionPipeline.__call__

    def watching(self, prompt, **settings):
        samplers.append((type(self.scheduler).__name__, prompt, self.text_encoder.training, self.unet.training))
        return original(self, prompt, **settings)

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", watching)
    calls = watch_loss(monkeypatch)
    flags = (*RICH, *prior(classes), *STEPS, "--max_train_steps", 2, "--validation_steps", 1)
    flags += ("--validation_prompt", "sks", "--num_validation_images", 3)
    for scheduler in ("DDPMScheduler", "DPMSolverMultistepScheduler"):
        out = train(scheduler, *flags, "--validation_scheduler", scheduler)
        assert samplers == 9 * [(scheduler, "sks", False, False)]
        samplers.clear()
    assert everything(out / "checkpoint-2").keys() == everything(rich / "checkpoint-2").keys()
    assert same(everything(out / "checkpoint-2"), everything(rich / "checkpoint-2"))
    assert metrics(out, "validation_loss")[::2] == metrics(rich, "validation_loss")[:2]
    for _, modes, batch, result in calls:
        assert modes == [len(batch["timesteps"]) > 1] * 2
        assert ("prior_loss" in result) is (len(batch["timesteps"]) > 1)
    assert Image.open(out / "samples" / "step-000002.png").size == (3 * 32, 32)
    assert Image.open(out / "samples" / "step-000000.png").size == (3 * 32, 32)
    assert StableDiffusionPipeline.from_pretrained(out).scheduler.__class__.__name__ == "DDIMScheduler"


def test_gradient_checkpointing_changes_nothing(train, classes, rich, monkeypatch):
    """Both models recompute their activations, and the losses are the same."""
    calls = watch_loss(monkeypatch)
    out = train("out", *RICH, *prior(classes), *STEPS, "--max_train_steps", 3, "--gradient_checkpointing")
    for name in LOSSES[:-1]:
        assert metrics(out, name) == [(step, pytest.approx(loss, rel=1e-4)) for step, loss in metrics(rich, name)[:3]]
    pipeline = calls[-1][0].pipeline
    assert pipeline.unet.is_gradient_checkpointing and pipeline.text_encoder.is_gradient_checkpointing


def test_8bit_adam_and_bf16(train, classes, tiny_model):
    """8-bit AdamW under bf16 trains both models in float32, and a resumed run ends with the same bits."""
    flags = (*RICH, *prior(classes), "--use_8bit_adam", "--mixed_precision", "bf16", "--checkpointing_steps", 2)
    flags += ("--max_train_steps", 4)
    out = train("out", *flags)
    shutil.copytree(out / "checkpoint-2", out.with_name("resumed") / "checkpoint-2")
    resumed = train("resumed", *flags, "--resume_from_checkpoint", "latest")
    assert same(weights(resumed), weights(out)) and logged(resumed) == logged(out)
    for part in ("unet", "text_encoder"):
        assert not same(weights(out / part), weights(tiny_model / part))
        assert {tensor.dtype for tensor in weights(out / part).values()} == {torch.float32}
    assert any(tensor.dtype == torch.uint8 for tensor in everything(out / "checkpoint-4").values())


# Resuming


def assert_ends_alike(out, rich, step=6):
    """Asserts that a checkpoint of a resumed run holds the bits of the run that nothing stopped."""
    name = f"checkpoint-{step}"
    assert same(everything(out / name), everything(rich / name))
    assert losses(out / name) == losses(rich / name)
    assert {key.split("/")[0] for key in weights(out / name)} == {"unet", "text_encoder"}


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
def test_resuming_is_exact_at_every_step(train, classes, rich, tmp_path, step):
    """Whatever step a run is resumed at, it ends with the same bits of both models, the optimizer and the log."""
    shutil.copytree(rich / f"checkpoint-{step}", tmp_path / "out" / f"checkpoint-{step}")
    out = train("out", *RICH, *prior(classes), *STEPS, "--resume_from_checkpoint", "latest")
    for later in range(step + 1, 7):
        assert_ends_alike(out, rich, later)
    assert logged(out) == logged(rich)
    assert same(weights(out / "unet"), weights(rich / "unet"))
    assert same(weights(out / "text_encoder"), weights(rich / "text_encoder"))


def test_another_run_is_not_resumed(train, classes, rich, tmp_path, subject):
    """Another method, prompt or set of class pictures is another run, and is refused in a sentence."""
    shutil.copytree(rich / "checkpoint-2", tmp_path / "out" / "checkpoint-2")
    flags = (*RICH, *prior(classes), *STEPS, "--resume_from_checkpoint", "latest")
    fewer = shutil.copytree(classes, tmp_path / "fewer")
    (fewer / "000.png").write_bytes((fewer / "001.png").read_bytes())
    for more, what in (
        (("--no-train_text_encoder",), "--train_text_encoder"),
        (("--instance_prompt", "another"), "data set"),
        (("--class_prompt", "another"), "data set"),
        (("--num_class_images", 7), "data set"),
        (("--class_data_dir", fewer), "data set"),
    ):
        with pytest.raises(SystemExit, match=f"another {what}"):
            train("out", *flags, *more)
    with pytest.raises(SystemExit, match="another --with_prior_preservation"):
        train("out", *RICH, *STEPS, "--resume_from_checkpoint", "latest")


# Processes


@pytest.fixture
def start(tmp_path):
    """Starts forked runs of the script that do not outlive the test."""
    forked.start_server("train_text_to_image", "train_dreambooth")
    runs = []

    def begin(arguments, environment=None, module="train_dreambooth", **options):
        log = tmp_path / f"run-{len(runs)}.log"
        runs.append(forked.fork(module, arguments, log, environment=environment, **options))
        return runs[-1]

    yield begin
    for process in runs:
        process.end()


@linux
@pytest.mark.launch
def test_a_kill_does_not_matter(start, flags_of, classes, rich, tmp_path):
    """A run that is killed as it writes its third checkpoint goes on from the second and ends with the same bits."""
    arguments = flags_of(tmp_path / "out", *RICH, *prior(classes), *STEPS, "--resume_from_checkpoint", "latest")
    killed = start(arguments, watched=tmp_path / "out", trigger=(r"checkpoint-3", 4, ("kill", 0)))
    assert killed.wait() == -signal.SIGKILL and whole_checkpoints(tmp_path / "out") == [1, 2]
    assert f"Resuming from {tmp_path}/out/checkpoint-2." in finish(start, arguments)
    assert whole_checkpoints(tmp_path / "out") == [1, 2, 3, 4, 5, 6] and litter(tmp_path) == []
    assert_ends_alike(tmp_path / "out", rich)
    assert same(weights(tmp_path / "out" / "text_encoder"), weights(rich / "text_encoder"))


@linux
@pytest.mark.launch
def test_sigterm_saves_both_models(start, flags_of, classes, rich, tmp_path):
    """SIGTERM ends the run with 143 after its step, whose checkpoint has both models and goes on exactly."""
    out = tmp_path / "out"
    long = flags_of(out, *RICH, *prior(classes), "--max_train_steps", 2000, "--validation_samples", 1)
    process = start([*long, "--checkpointing_steps", "1000"])
    process.until(lambda: (out / "logs" / "metrics.jsonl").exists() and metrics(out, "loss"))
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait() == 143
    (step,) = whole_checkpoints(out)
    assert step < 6, "the machine was too slow to stop it in time"
    assert_ends_alike(out, rich, step)
    finish(start, flags_of(out, *RICH, *prior(classes), *STEPS, "--resume_from_checkpoint", "latest"))
    assert_ends_alike(out, rich)


@linux
@pytest.mark.launch
def test_two_processes_are_one(start, flags_of, tiny_sdxl_model, monkeypatch, tmp_path):
    """Two processes draw the class pictures that one draws and train as it does, even if just one has to validate.

    Under SDXL, whose first text encoder has a last layer that nothing is learnt from.
    """
    (tmp_path / "few_draws.py").write_text(
        "import train_dreambooth\n\n"
        "train_dreambooth.VALIDATION_DRAWS = 1\n"
        "main, parse_args = train_dreambooth.main, train_dreambooth.parse_args\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(script, "VALIDATION_DRAWS", 1)
    flags = (*RICH, *STEPS, "--max_train_steps", 3, "--validation_steps", 1, "--sample_batch_size", 1)
    flags += ("--gradient_accumulation_steps", 2, "--pretrained_model_name_or_path", tiny_sdxl_model)
    both = [(*flags, *prior(tmp_path / f"class-{name}", 2)) for name in ("one", "two")]
    run(script, *flags_of(tmp_path / "one", *both[0], "--train_batch_size", 2))

    def begin(arguments, environment=None):
        return start(arguments, environment=environment, module="few_draws")

    said = finish(begin, flags_of(tmp_path / "two", *both[1]), 2)
    drawn = [{name: data for name, (data, _) in state_of(tmp_path / f"class-{n}").items()} for n in ("one", "two")]
    assert drawn[0] == drawn[1] and len(set(drawn[0].values())) == 2
    one, two = tmp_path / "one", tmp_path / "two"
    for name in LOSSES:
        assert metrics(two, name) == [(step, pytest.approx(value, rel=1e-4)) for step, value in metrics(one, name)]
    assert [step for step, _ in metrics(two, "validation_loss")] == [0, 1, 2, 3]
    assert drift(one, two, tiny_sdxl_model) < 1e-3 and said.count("The result is in") == 1
    for part in ("text_encoder", "text_encoder_2"):
        first, second = (load_file(folder / part / "model.safetensors") for folder in (one, two))
        for name, tensor in first.items():
            torch.testing.assert_close(tensor, second[name], rtol=0, atol=2e-5)


# Captions and flags


def parsed(*flags):
    """The arguments of a command line that gives what a run cannot do without."""
    base = ("--pretrained_model_name_or_path", "owner/model", "--instance_data_dir", ".")
    base += ("--output_dir", "../out")
    return script.parse_args([str(flag) for flag in (*base, "--instance_prompt", INSTANCE, *flags)])


def test_captions_beside_the_prompt(subject, tmp_path):
    """A picture's own caption, in a metadata file or beside it, goes before --instance_prompt."""
    folder = shutil.copytree(subject, tmp_path / "subject")
    names = sorted(file.name for file in folder.iterdir())
    rows = [{"file_name": names[0], "text": "by metadata"}, {"file_name": names[1], "text": ["one", "two"]}]
    rows += [{"file_name": names[2], "text": " "}]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / names[3]).with_suffix(".txt").write_text("by text file\n")
    (folder / "notes.txt").write_text("no caption of any picture")
    records = script.read_records(parsed("--instance_data_dir", folder))
    captions = [["by metadata"], ["one", "two"], [INSTANCE], ["by text file"], [INSTANCE]]
    assert [record["captions"] for record in records] == captions
    assert [record["name"] for record in records] == [str(folder / name) for name in names]
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="empty holds no pictures"):
        script.read_records(parsed("--instance_data_dir", tmp_path / "empty"))


MISTAKES = {
    "--instance_data_dir nowhere": "--instance_data_dir nowhere",
    "--with_prior_preservation --class_prompt x": "--class_data_dir",
    "--with_prior_preservation --class_data_dir ../class": "--class_prompt",
    "--class_data_dir ../class": "--with_prior_preservation",
    "--class_prompt x": "--with_prior_preservation",
    "--with_prior_preservation --class_prompt x --class_data_dir .": "may lie in",
    "--with_prior_preservation --class_prompt x --class_data_dir new/class": "may lie in",
    "--with_prior_preservation --class_prompt x --class_data_dir ..": "may lie in",
    "--with_prior_preservation --class_prompt x --class_data_dir ../file": "file is a file",
    "--train_text_encoder --pre_compute_text_embeddings": "not both",
    "--resolution 500": "multiple of 8",
    "--pretrained_model_name_or_path ./nowhere": "./nowhere",
    "--overwrite_output_dir --resume_from_checkpoint latest": "not both",
    "--resume_from_checkpoint nowhere": "nowhere",
    "--num_class_images 0": "--num_class_images",
    "--sample_batch_size 0": "--sample_batch_size",
    "--prior_loss_weight -1": "--prior_loss_weight",
    "--prior_generation_precision fp8": "bf16",
    "--num_validation_images 0": "--num_validation_images",
    "--validation_scheduler DDIM": "DDPMScheduler",
    "--lr_num_cycles 0": "--lr_num_cycles",
    "--lr_power nan": "--lr_power",
    **{f"{flag} 1": script.REFUSED[flag] for flag in script.REFUSED},
    **{f"{flag}=1": f"{flag}: " for flag in script.REFUSED},
}


@pytest.mark.parametrize("words", MISTAKES)
def test_refused(words, capsys, tmp_path, monkeypatch):
    """Each mistake is refused in one sentence, before anything heavy loads, and nothing is made on the disk."""
    (tmp_path / "here").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(SystemExit) as end:
        parsed(*words.split())
    sentence = capsys.readouterr().err.split(": error: ")[1]
    assert end.value.code == 2 and MISTAKES[words] in sentence and sentence.count("\n") == 1
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "here"]


def test_folders_beside_each_other_are_taken(tmp_path, monkeypatch):
    """A class folder beside the pictures' folder is none in it, however its path is written or its name begins."""
    (tmp_path / "dog").mkdir()
    monkeypatch.chdir(tmp_path)
    for folder in ("dogs", "dog/../dogs", "./dog-class"):
        words = ("--with_prior_preservation", "--class_prompt", "x", "--class_data_dir", folder)
        assert parsed("--instance_data_dir", "dog", *words).class_data_dir == folder


@pytest.mark.parametrize("flags", ["--train_text_encoder", ""])
def test_deepspeed_and_the_text_encoder(flags):
    """DeepSpeed can train one model only, which is said of the flag."""
    accelerator = SimpleNamespace(distributed_type=script.DistributedType.DEEPSPEED)
    models = SimpleNamespace(trained=[None, None] if flags else [None], unet=None)
    with pytest.raises(SystemExit if flags else AttributeError, match="--train_text_encoder" if flags else ""):
        script.prepare_training(accelerator, parsed(*flags.split()), models)


def test_the_base_draws_as_it_was_trained(tiny_model, tmp_path, monkeypatch):
    """What the UNet is to learn to predict does not change how the base draws the class."""
    drawn = []
    monkeypatch.setattr(script, "draw_class_pictures", lambda args, pipeline, names, seed: drawn.append(pipeline))
    folder = ("--class_data_dir", tmp_path / "class", "--class_prompt", "a", "--num_class_images", 1)
    args = parsed(
        "--with_prior_preservation", *folder, "--prediction_type", "v_prediction", "--rescale_betas_zero_snr"
    )
    args.pretrained_model_name_or_path = str(tiny_model)
    script.fill_class_pictures(script.make_accelerator(args), args, 0, SimpleNamespace(exit_if_asked=lambda: None))
    assert [pipeline.scheduler.config.prediction_type for pipeline in drawn] == ["epsilon"]
    assert not drawn[0].scheduler.config.rescale_betas_zero_snr


def test_no_flag_is_read_nowhere():
    """The script reads every flag for more than checking it, but for the two that it takes for others' sake."""
    source = open(script.__file__).read()
    body = source[source.index("# Data\n") :]
    flags = {name for name in vars(parsed()) if f"args.{name}" not in body and f'"{name}"' not in body}
    assert flags == {"config", "pre_compute_text_embeddings", "set_grads_to_none"}


# The commands that the diffusers documentation gives for its script of this name, flag by flag.
DOG = "--instance_data_dir dog --output_dir out --instance_prompt 'a photo of sks dog' --resolution 512 --push_to_hub"
DOG += " --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --train_batch_size 1"
DOG += " --lr_scheduler constant --lr_warmup_steps 0"
PRIOR = f"{DOG} --with_prior_preservation --prior_loss_weight 1.0 --class_data_dir path-to-class-images"
PRIOR += " --class_prompt 'a photo of dog' --num_class_images 200 --max_train_steps 800"
WATCHED = "--validation_prompt 'a photo of a sks dog' --num_validation_images 4 --validation_steps 100"
DOCUMENTED = {
    "guide": f"{DOG} --gradient_accumulation_steps 1 --learning_rate 5e-6 --max_train_steps 400",
    "guide, bf16": f"{DOG} --mixed_precision bf16",
    "guide, Min-SNR": f"{DOG} --snr_gamma 5.0",
    "guide, validation": f"{DOG} {WATCHED}",
    "guide, text encoder": f"{DOG} --train_text_encoder",
    "prior": f"{PRIOR} --gradient_accumulation_steps 1 --learning_rate 5e-6",
    "16 GB": f"{PRIOR} --gradient_accumulation_steps 2 --gradient_checkpointing --use_8bit_adam --learning_rate 5e-6",
    "12 GB": f"{PRIOR} --gradient_accumulation_steps 1 --gradient_checkpointing --use_8bit_adam --set_grads_to_none "
    "--enable_xformers_memory_efficient_attention --learning_rate 2e-6",
    "8 GB": f"{PRIOR} --sample_batch_size 1 --gradient_accumulation_steps 1 --gradient_checkpointing "
    "--learning_rate 5e-6",
    "text encoder": f"{PRIOR} --train_text_encoder --use_8bit_adam --gradient_checkpointing --learning_rate 2e-6",
}
IF = "--pre_compute_text_embeddings --tokenizer_max_length 77 --text_encoder_use_attention_mask"
DEEPFLOYD = {
    "IF, stage 1": f"{DOG} {IF} --use_8bit_adam --set_grads_to_none --skip_save_text_encoder "
    "--validation_scheduler DDPMScheduler",
    "IF, stage 2": f"{DOG} {IF} --validation_images dog/1.png dog/2.png --class_labels_conditioning timesteps",
}


@pytest.mark.parametrize("name", [*DOCUMENTED, *DEEPFLOYD])
def test_documented_command(name, tmp_path, monkeypatch, capsys):
    """Each is taken as it stands, with the values that it gives; those for DeepFloyd IF are refused with a reason."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dog").mkdir()
    words = shlex.split({**DOCUMENTED, **DEEPFLOYD}[name])
    if name in DEEPFLOYD:
        with pytest.raises(SystemExit):
            script.parse_args(words)
        said = capsys.readouterr().err
        assert any(f"{flag}: {reason}\n" in said for flag, reason in script.REFUSED.items())
        return
    args = vars(script.parse_args(words))
    for flag, value in zip(words, [*words[1:], "--"]):
        if flag.startswith("--"):
            taken = args[flag[2:]]
            assert taken is True if value.startswith("--") else taken == type(taken)(value)
