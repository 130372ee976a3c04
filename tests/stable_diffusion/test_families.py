"""SD 1.x, SD 2.x and SDXL in one script: sizes and crops, text, the VAE, resolution, resuming."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from helpers import (
    changed,
    count_calls,
    encode,
    for_each_family,
    load,
    make_run,
    metrics,
    parse,
    same,
    samples_of,
    save_ramp,
    weights,
)
from PIL import Image

import train_text_to_image as script


# Sizes and crops.


@pytest.mark.parametrize("width, height", [(40, 16), (16, 40)])
@pytest.mark.parametrize("flip", [False, True])
def test_time_ids_say_the_crop_that_was_made(tmp_path, width, height, flip):
    """Left and top are where the sample's first pixel stands in the picture, as it was mirrored."""
    save_ramp(tmp_path / "x", width, height)
    samples = samples_of(tmp_path / "x", "--resolution", 16, *(["--random_flip"] if flip else []))
    corners, mirrored = set(), set()
    for epoch in range(40):
        sample = samples[epoch, 0]
        pixels = ((sample["pixel_values"] + 1) * 127.5 / 4).round().int()
        first, second = pixels[0, 0, :2].tolist()
        left = width - 1 - first if second < first else first
        assert sample["time_ids"].tolist() == [height, width, pixels[1, 0, 0], left, 16, 16]
        corners.add((int(pixels[1, 0, 0]), left))
        mirrored.add(second < first)
    assert len(corners) > 8 and mirrored == ({False, True} if flip else {False})


@pytest.mark.parametrize("size", [(64, 32), (33, 90), (8, 8)])
def test_time_ids_keep_the_size_of_the_file(tmp_path, size):
    """The original size is the file's, upright, and the crop's corner counts pixels of the resized picture."""
    save_ramp(tmp_path / "x", *size)
    samples = samples_of(tmp_path / "x", "--resolution", 16, "--center_crop")
    width, height = (round(length * 16 / min(size)) for length in size)
    expected = [size[1], size[0], (height - 16) // 2, (width - 16) // 2, 16, 16]
    assert samples[0, 0]["time_ids"].tolist() == pytest.approx(expected, abs=1)
    assert samples[0, 0]["time_ids"].tolist()[:2] == [size[1], size[0]]
    assert samples[0, 0]["time_ids"].dtype == np.float32


def test_time_ids_of_a_turned_picture(tmp_path):
    """A picture that its EXIF turns is measured upright."""
    exif = Image.Exif()
    exif[274] = 6  # a quarter turn
    save_ramp(tmp_path / "x", 40, 16, exif=exif)
    assert samples_of(tmp_path / "x", "--resolution", 16)[0, 0]["time_ids"][:2].tolist() == [40, 16]


# Text.


@for_each_family
def test_conditioning_is_the_pipelines(base):
    """Embeddings, and SDXL's pooled ones, are what the pipeline itself makes of a prompt."""
    models, prompts = load(base), ["a red circle", "something longer than that"]
    with torch.no_grad():
        conditioning = encode(script, models, prompts)
        if base.name == "tiny-sdxl":
            wanted, _, pooled, _ = models.pipeline.encode_prompt(
                prompts, device="cpu", do_classifier_free_guidance=False
            )
            torch.testing.assert_close(conditioning.pop("text_embeds"), pooled)
            assert pooled.shape == (2, 32)
        else:
            wanted, _ = models.pipeline.encode_prompt(prompts, "cpu", 1, False)
    torch.testing.assert_close(conditioning.pop("encoder_hidden_states"), wanted)
    assert conditioning == {}


@pytest.mark.parametrize("zeros", [True, False])
def test_dropped_captions_are_the_pipelines(tiny_sdxl_model, tmp_path, zeros):
    """A caption that is dropped becomes what the pipeline takes where it is given no negative prompt."""
    base = changed(tiny_sdxl_model, tmp_path / "base", "model_index.json", force_zeros_for_empty_prompt=zeros)
    models = load(base)
    with torch.no_grad():
        both = encode(script, models, ["a cat", ""])
        alone = encode(script, models, ["a cat"])
        _, negative, _, pooled = models.pipeline.encode_prompt("a cat", device="cpu", do_classifier_free_guidance=True)
    torch.testing.assert_close(both["encoder_hidden_states"][1:], negative)
    torch.testing.assert_close(both["text_embeds"][1:], pooled)
    assert not both["text_embeds"][1].any() == zeros
    assert all(torch.equal(both[name][:1], alone[name]) for name in alone)


# The VAE.


@pytest.mark.parametrize(
    "family, upcast, full",
    [("tiny_sdxl_model", True, True), ("tiny_sdxl_model", False, False), ("tiny_model", True, False)],
)
def test_vae_precision(base, upcast, full, train, tmp_path):
    """SDXL's VAE runs in float32 under bf16, in caching and in sampling, unless its config says that half will do."""
    base, dtypes = changed(base, tmp_path / "base", "vae", force_upcast=upcast), {}
    forward = torch.nn.Conv2d.forward

    def spy(self, x):
        out = forward(self, x)
        for end, channels in (("encoder", self.in_channels), ("decoder", self.out_channels)):
            if channels == 3:
                dtypes.setdefault(end, set()).add(out.dtype)
        return out

    flags = ("--mixed_precision", "bf16", "--center_crop", "--validation_prompts", "a cat", "--max_train_steps", 1)
    flags += ("--encoding_cache_dir", tmp_path / "cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Conv2d, "forward", spy)
        out = train("out", *flags, base=base)
    assert dtypes == dict.fromkeys(("encoder", "decoder"), {torch.float32 if full else torch.bfloat16})
    assert (out / "samples" / "step-000001.png").exists()
    assert json.loads((out / "vae" / "config.json").read_text())["force_upcast"] == upcast


def test_another_vae(tiny_sdxl_model, pictures, train, tmp_path):
    """--pretrained_vae_model_name_or_path takes the place of the base's VAE, in training and in the result."""
    torch.manual_seed(5)
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(tiny_sdxl_model / "vae") | {"force_upcast": False})
    vae.save_pretrained(tmp_path / "vae")
    flags = ("--pretrained_vae_model_name_or_path", tmp_path / "vae", "--max_train_steps", 1)
    out, plain = (
        train("out", *flags, base=tiny_sdxl_model),
        train("plain", "--max_train_steps", 1, base=tiny_sdxl_model),
    )
    assert same(weights(out / "vae"), weights(tmp_path / "vae"))
    assert not same(weights(out / "vae"), weights(tiny_sdxl_model / "vae"))
    assert metrics(out, "loss") != metrics(plain, "loss")


# Resolution and resuming.


@for_each_family
def test_resolution_by_the_family(base):
    """SDXL trains at 1024 pixels unless told otherwise, the others at 512."""
    for words, expected in (((), 1024 if "sdxl" in base.name else 512), (("--resolution", 64), 64)):
        begun = make_run(script, parse(base, "--pretrained_model_name_or_path", base, *words))
        script.load_models(begun)
        assert begun.resolution == expected


@pytest.mark.parametrize("family", ["tiny_sd2_model", "tiny_sdxl_model"])
@pytest.mark.parametrize("step", [2, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 3))])
def test_resuming_is_exact_in_every_family(base, train, step):
    """A run that was stopped ends with the bits of one that was not, in the families beside SD 1.x."""
    flags = "--use_ema --random_flip --proportion_empty_prompts 0.3 --snr_gamma 5 --validation_samples 1".split()
    flags += ["--no-center_crop", "--checkpointing_steps", step]
    whole = train("whole", *flags, base=base)
    train("out", *flags, "--max_train_steps", step, base=base)
    resumed = train("out", *flags, "--resume_from_checkpoint", "latest", base=base)
    assert same(weights(resumed), weights(whole)) and metrics(resumed, "loss") == metrics(whole, "loss")
    assert not same(weights(resumed / "unet"), weights(base / "unet"))


# Pictures.


@for_each_family
@pytest.mark.parametrize("idle", [True, False])
def test_a_validation_picture_is_the_pipelines_own(base, idle, pictures, tmp_path, monkeypatch):
    """It is what the whole pipeline would draw, whether text encoders lie idle or not, which then encode once."""
    monkeypatch.setattr(script, "SAMPLER_STEPS", 2)
    flags = ("--pretrained_model_name_or_path", base, "--resolution", 32, "--output_dir", tmp_path)
    begun = make_run(script, parse(pictures, *flags))
    models = script.load_models(begun)
    models.idle = [*models.text_encoders, models.vae] if idle else []
    encoded = count_calls(monkeypatch, type(models.pipeline.text_encoder), "forward")
    scheduler = models.pipeline.scheduler
    with torch.no_grad():
        drawn = [
            script.draw_picture(begun, models, "a cat", torch.Generator().manual_seed(seed), scheduler)
            for seed in (0, 1)
        ]
        taken = len(encoded)
        whole = models.pipeline(
            "a cat", height=32, width=32, num_inference_steps=2, generator=torch.Generator().manual_seed(1)
        ).images[0]
    assert np.array_equal(np.asarray(drawn[1]), np.asarray(whole))
    assert not np.array_equal(np.asarray(drawn[0]), np.asarray(whole))
    of_a_picture = len(encoded) - taken
    assert taken == (of_a_picture if idle else 2 * of_a_picture)
    assert not models.vae.use_tiling  # else the next crop that is encoded would be another one
