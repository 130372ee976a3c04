"""Prior preservation, on train_dreambooth.py: pairs of pictures, their losses, and how class pictures come about."""

import gc
import inspect
import os
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from helpers import (
    CLASS,
    INSTANCE,
    files_in,
    flags_of,
    in_epochs,
    litter,
    make_run,
    metrics,
    prior,
    run,
    state_of,
    watch,
)
from PIL import Image

import train_dreambooth as script
import train_lora


@pytest.fixture
def train(trainer, subject):
    """Trains two steps on a subject."""
    return trainer(script, "--max_train_steps", 2, "--instance_data_dir", subject, "--instance_prompt", INSTANCE)


def test_what_is_no_class_picture_is_counted(classes, tmp_path, capsys):
    """What stands among the class pictures and is not read is counted, before others are drawn in its place."""
    folder = shutil.copytree(classes, tmp_path / "class")
    (folder / "mine.heic").write_bytes(b"x")
    args = SimpleNamespace(class_data_dir=str(folder), class_prompt=CLASS, num_class_images=9)
    args.pretrained_model_name_or_path = "me/model"
    assert len(script.missing_class_pictures(args)) == 1
    assert capsys.readouterr().out == "passed over: 1 .heic\n"


def test_class_pictures_are_of_their_prompt(train, classes, tmp_path):
    """Those that were drawn for another are not trained on as this one's; foreign ones are what you say they are."""
    folder = tmp_path / "class"
    flags = ("--with_prior_preservation", "--class_data_dir", folder, "--num_class_images", 2)
    train("out", *flags, "--class_prompt", "a red café")
    before = state_of(folder)
    with pytest.raises(SystemExit, match="was drawn for 'a red café': give that as --class_prompt"):
        train("other", *flags, "--class_prompt", "a green square")
    train("again", *flags, "--class_prompt", "a red café")
    assert state_of(folder) == before
    train("foreign", *prior(classes))


def test_class_pictures_of_another_base_are_told_of(train, tiny_model, tiny_v_model, tmp_path, capsys):
    """They teach this one what that one knows, which may be meant."""
    flags = ("--with_prior_preservation", "--class_data_dir", tmp_path / "class", "--num_class_images", 1)
    train("out", *flags, "--class_prompt", "a red circle")
    assert "were drawn by" not in capsys.readouterr().out
    train("other", *flags, "--class_prompt", "a red circle", base=tiny_v_model)
    assert f"some of the class pictures were drawn by {tiny_model.name}\n" in capsys.readouterr().out


def test_class_pictures_are_not_drawn_after_the_end(train, tmp_path, capsys):
    """The same command says that the run has ended, also where its class pictures were tidied away."""
    flags = (*prior(tmp_path / "class"), "--num_class_images", 1, "--resume_from_checkpoint", "latest")
    train("out", *flags)
    shutil.rmtree(tmp_path / "class")
    train("out", *flags)
    assert "there is none left to take" in capsys.readouterr().out and not (tmp_path / "class").exists()


def test_a_bad_class_picture_is_skipped(train, classes, tmp_path):
    """The others are trained on, as with --on_bad_image skip the subject's would be."""
    folder = shutil.copytree(classes, tmp_path / "class")
    sorted(folder.glob("*.png"))[0].write_bytes(b"torn")
    out = train("out", *prior(folder), "--num_class_images", 4, "--on_bad_image", "skip", "--max_train_steps", 4)
    assert len(metrics(out, "prior_loss")) == 4


def test_class_pictures_that_overflow_are_refused(train, tiny_model, tmp_path):
    """In half precision a VAE can overflow, and its pictures would be black; none is written."""
    base, folder = tmp_path / "base", tmp_path / "class"
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model)
    pipeline.vae.decoder.conv_in.weight.data *= 1e30
    pipeline.save_pretrained(base)
    flags = ("--prior_generation_precision", "fp16", "--num_class_images", 1)
    with pytest.raises(SystemExit, match="give --prior_generation_precision fp32"):
        train("out", *prior(folder), *flags, base=base)
    assert list(folder.iterdir()) == []


def test_class_pictures_that_another_run_draws_meanwhile(train, tmp_path, monkeypatch):
    """Two runs draw into one folder for unlike prompts: the second does not train on what the first drew."""
    folder, draw = tmp_path / "class", script.draw_class_pictures

    def drawn_by_another(args, pipeline, names, seed):
        other = SimpleNamespace(**vars(args) | {"class_prompt": "a green square"})
        draw(other, pipeline, names, seed)

    monkeypatch.setattr(script, "draw_class_pictures", drawn_by_another)
    flags = ("--with_prior_preservation", "--class_data_dir", folder, "--num_class_images", 1)
    with pytest.raises(SystemExit, match="was drawn for 'a green square'"):
        train("out", *flags, "--class_prompt", "a red circle")


def test_class_pictures_of_another_run_are_not_replaced(tiny_model, fast_drawing, tmp_path):
    """Two runs that draw into one folder keep what came first, as the other may already train on it."""
    (tmp_path / "class-00000.png").write_bytes(b"first")
    args = SimpleNamespace(class_data_dir=str(tmp_path), class_prompt=CLASS, pretrained_model_name_or_path="me/model")
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model)
    script.draw_class_pictures(args, pipeline, ["class-00000.png", "class-00001.png"], 0)
    assert (tmp_path / "class-00000.png").read_bytes() == b"first"
    assert Image.open(tmp_path / "class-00001.png").mode == "RGB"


# The loss.


@pytest.mark.parametrize(
    "bsz, gamma, target, flags",
    [(1, None, "epsilon", ()), (3, 0.01, "epsilon", ("--offset_noise",)), (2, 1.0, "v_prediction", ())],
)
def test_prior_loss_by_hand(train, classes, tiny_model, monkeypatch, bsz, gamma, target, flags):
    """Each part is the weighted mean over its own pictures under their own prompt; the loss adds them up."""
    batches = watch(monkeypatch, script).batches
    flags += ("--train_batch_size", bsz, "--max_train_steps", 1, "--prediction_type", target)
    flags += ("--prior_loss_weight", 0.3)
    out = train("out", *flags, *prior(classes), *(("--snr_gamma", gamma) if gamma else ()))
    (batch,) = batches
    unet = UNet2DConditionModel.from_pretrained(tiny_model / "unet")
    scheduler = DDPMScheduler.from_pretrained(tiny_model / "scheduler")
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model)
    assert batch["caption"] == [INSTANCE, CLASS] * bsz
    parts = {INSTANCE: [], CLASS: []}
    for i, caption in enumerate(batch["caption"]):
        latents = batch["mean"][i] + batch["std"][i] * batch["posterior_noise"][i]
        latents = latents * pipeline.vae.config.scaling_factor
        noise = batch["noise"][i]
        if "--offset_noise" in flags:
            noise = noise + 0.1 * batch["offset_noise"][i]
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
    for name, value in zip(("loss", "instance_loss", "prior_loss"), hand):
        assert metrics(out, name) == [(1, pytest.approx(value, rel=1e-4))], name
    assert abs(instance_loss - prior_loss) > 1e-3  # else mixing them up would not show


def test_plain_loss_has_no_parts(train):
    """Without prior preservation there is one loss, of the instance pictures alone."""
    out = train("out")
    assert len(metrics(out, "loss")) == 2 and metrics(out, "prior_loss") == metrics(out, "instance_loss") == []


def test_loras_loss_is_dreambooths():
    """The loss of train_lora.py is this one word for word."""
    assert inspect.getsource(train_lora.compute_loss) == inspect.getsource(script.compute_loss)


# Batches.


@pytest.mark.parametrize("total, sizes", [(2, (5, 8)), (3, (5, 2)), (1, (1, 3))])
def test_pairs(total, sizes):
    """Instance and class pictures take turns, each kind in whole passes of its own; neither starves."""
    steps = [script.step_keys(step, total, sizes, 1) for step in range(sizes[0] * sizes[1])]
    assert all(len(keys) == 2 * total for keys in steps)
    for first, size in ((0, sizes[0]), (1, sizes[1])):
        stream = [key for keys in steps for key in keys[first::2]]
        for epoch in range(len(stream) // size):
            indices = range(first * sizes[0], first * sizes[0] + size)
            assert sorted(stream[epoch * size :][:size]) == [(epoch, index) for index in indices]
    assert steps[2][0::2] == script.step_keys(2, total, (sizes[0], 0), 1)


@pytest.mark.parametrize("with_prior, steps", [(False, 3), (True, 4)])
def test_an_epoch_meets_every_picture(tiny_model, subject, classes, tmp_path, with_prior, steps):
    """--num_train_epochs counts passes over the larger of the two kinds: 5 pictures, or 8, in batches of 2."""
    flags = ("--instance_data_dir", subject, "--instance_prompt", INSTANCE, *(prior(classes) if with_prior else ()))
    run(script, *in_epochs(flags_of(tiny_model, None, tmp_path / "out", *flags)))
    assert len(metrics(tmp_path / "out", "loss")) == steps


def test_class_pictures_have_sizes_of_their_own(train, tiny_sdxl_model, pictures, tmp_path, monkeypatch):
    """In a batch of DreamBooth's pairs, each picture comes with its own size and crop."""
    classes = tmp_path / "classes"
    for i in range(2):
        classes.mkdir(exist_ok=True)
        Image.new("RGB", (96, 64), "red").save(classes / f"{i}.png")
    seen = watch(monkeypatch, script).batches
    train("out", "--instance_data_dir", pictures, "--resolution", 16, *prior(classes, 2), base=tiny_sdxl_model)
    assert [batch["time_ids"].tolist() for batch in seen] == [[[48, 48, 0, 0, 16, 16], [64, 96, 0, 4, 16, 16]] * 2] * 2


# Class pictures.


@pytest.fixture
def fast_drawing(monkeypatch):
    """Two sampler steps instead of fifty; returns the growing list of the calls' prompts."""
    calls, original = [], StableDiffusionPipeline.__call__

    def fast(self, prompt, **settings):
        calls.append(prompt)
        return original(self, prompt, **{"num_inference_steps": 2, **settings})

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", fast)
    return calls


def test_class_pictures_are_drawn_once(train, fast_drawing, monkeypatch, tmp_path, hub, tiny_model):
    """Missing ones are drawn as PNG, all different; what is there stays and counts; the drawing model is freed."""
    folder = tmp_path / "new" / "class"
    live, load_models = [], script.load_models

    def counting(run):
        live.append(sum(isinstance(thing, UNet2DConditionModel) for thing in gc.get_objects()))
        return load_models(run)

    gc.collect()
    before = sum(isinstance(thing, UNet2DConditionModel) for thing in gc.get_objects())
    monkeypatch.setattr(script, "load_models", counting)
    revisions, from_pretrained = [], StableDiffusionPipeline.from_pretrained
    watched = lambda base, **how: revisions.append(how["revision"]) or from_pretrained(base, **how)  # noqa: E731
    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", watched)
    hub.add_folder("me/model", tiny_model)
    hub.add_folder("me/model@tag", tiny_model)
    train("first", *prior(folder, 3), "--sample_batch_size", 2, "--revision", "tag", base="me/model")
    assert revisions == ["tag", "tag"]  # of the model that draws, and of the one that is trained
    assert fast_drawing == [[CLASS, CLASS], [CLASS]] and live == [before]
    first = state_of(folder)
    assert sorted(first) == ["class-00000.png", "class-00001.png", "class-00002.png"]
    assert all(data.startswith(b"\x89PNG") for data, *_ in first.values())
    assert len({data for data, *_ in first.values()}) == 3 and litter(folder) == []
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
    assert files_in(tmp_path / "whole-class") == files_in(tmp_path / "class")
    assert metrics(tmp_path / "whole", "loss") == metrics(tmp_path / "stopped", "loss")


def test_only_so_many_class_pictures(train, classes, monkeypatch):
    """Of more pictures than --num_class_images, the first are trained on; captions beside them do not count."""
    batches = watch(monkeypatch, script).batches
    folder = shutil.copytree(classes, classes.with_name("captioned"))
    for file in list(folder.iterdir()):
        file.with_suffix(".txt").write_text("something else")
    train("out", *prior(folder, 1), "--no_encoding_cache")
    pixels = [batch["pixel_values"][1::2] for batch in batches]
    assert len({picture.numpy().tobytes() for pictures in pixels for picture in pictures}) == 1
    assert {caption for batch in batches for caption in batch["caption"]} == {INSTANCE, CLASS}


def test_the_base_draws_as_it_was_trained(tiny_model, subject, tmp_path, monkeypatch):
    """What the UNet is to learn to predict does not change how the base draws the class."""
    drawn = []
    monkeypatch.setattr(script, "draw_class_pictures", lambda args, pipeline, names, seed: drawn.append(pipeline))
    flags = ("--instance_data_dir", subject, "--instance_prompt", INSTANCE, *prior(tmp_path / "class", 1))
    flags += ("--prediction_type", "v_prediction", "--rescale_betas_zero_snr")
    args = script.parse_args(flags_of(tiny_model, None, tmp_path / "out", *flags))
    script.fill_class_pictures(make_run(script, args))
    assert [pipeline.scheduler.config.prediction_type for pipeline in drawn] == ["epsilon"]
    assert not drawn[0].scheduler.config.rescale_betas_zero_snr
