"""SD 1.x, SD 2.x and SDXL in the same scripts: conditioning, VAE, noise schedule, single files, resuming."""

import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import metrics, run, same, weights
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, PNDMScheduler, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from single_file import save_single_file

import train_dreambooth
import train_lora
import train_text_to_image as script


SMALL = "--resolution 16 --train_batch_size 2 --max_train_steps 4 --seed 1 --learning_rate 1e-3 --lr_warmup_steps 0"
SMALL = (*SMALL.split(), "--report_to", "none", "--checkpointing_steps", 2)
FAMILIES = ("tiny_model", "tiny_sd2_model", "tiny_sdxl_model")

for_each_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture
def base(family, request):
    """The folder of a family's tiny pipeline."""
    return request.getfixturevalue(family)


@pytest.fixture
def train(pictures, tmp_path):
    """Run train_text_to_image.py on a base; returns the output folder."""

    def train(base, *flags, out="out"):
        data = ("--pretrained_model_name_or_path", base, "--train_data_dir", pictures)
        cache = ("--encoding_cache_dir", tmp_path / "cache", "--output_dir", tmp_path / out)
        run(script, *data, *cache, *SMALL, *flags)
        return tmp_path / out

    return train


def parse(base, *flags):
    """The arguments of a run on a base."""
    words = ("--pretrained_model_name_or_path", base, "--train_data_dir", base, *flags)
    return script.parse_args([str(word) for word in words])


def load(base, *flags):
    """The base's models as training loads them."""
    return script.load_models(parse(base, *flags))


def samples_of(folder, *flags):
    """The samples of a folder's pictures, as a run makes them, for a VAE that halves the resolution."""
    args = parse(folder, "--train_data_dir", folder, *flags)
    records = script.read_records(args)
    for record in records:
        record["size"] = script.open_image(Path(record["name"]).read_bytes()).size
    side = args.resolution // 2
    return script.Samples(args, records, 0, (4, side, side), 1000)


def changed(base, folder, part, **settings):
    """A copy of a pipeline's folder with other settings in a part's config."""
    shutil.copytree(base, folder)
    file = folder / part if part.endswith(".json") else folder / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


# Sizes and crops.


def save_ramp(folder, width, height, **settings):
    """A picture whose red is 4 x the column and whose green is 4 x the row."""
    folder.mkdir(exist_ok=True)
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0], pixels[..., 1] = 4 * np.arange(width), 4 * np.arange(height)[:, None]
    Image.fromarray(pixels).save(folder / "a.png", **settings)
    (folder / "a.txt").write_text("a ramp")


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
        conditioning = script.encode_prompts(models, prompts)
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
        both = script.encode_prompts(models, ["a cat", ""])
        alone = script.encode_prompts(models, ["a cat"])
        _, negative, _, pooled = models.pipeline.encode_prompt("a cat", device="cpu", do_classifier_free_guidance=True)
    torch.testing.assert_close(both["encoder_hidden_states"][1:], negative)
    torch.testing.assert_close(both["text_embeds"][1:], pooled)
    assert not both["text_embeds"][1].any() == zeros
    assert all(torch.equal(both[name][:1], alone[name]) for name in alone)


def test_caches_do_not_mix_up_empty_prompts(tiny_sdxl_model, tmp_path, train):
    """Two bases that differ in what an empty prompt is share no entry for it."""
    other = changed(tiny_sdxl_model, tmp_path / "base", "model_index.json", force_zeros_for_empty_prompt=False)
    flags = ("--proportion_empty_prompts", 1, "--max_train_steps", 1)
    losses = [metrics(train(tiny_sdxl_model, *flags, out="zeros"), "loss")]
    losses += [metrics(train(other, *flags, out=name), "loss") for name in ("words", "again")]
    assert losses[0] != losses[1] == losses[2]


# The loss.


def test_loss_by_hand(tiny_sdxl_model, tmp_path):
    """SDXL's loss is that of a UNet that is told prompt, pooled prompt, size and crop as the pipeline tells it."""
    save_ramp(tmp_path / "x", 40, 16)
    models, samples = load(tiny_sdxl_model), samples_of(tmp_path / "x", "--resolution", 16, "--random_flip")
    batch = torch.utils.data.default_collate([samples[epoch, 0] for epoch in range(3)])
    pipeline, unet = models.pipeline, models.unet
    with torch.no_grad():
        loss = script.compute_loss(models, batch, samples.args)["loss"]
        expected = []
        for i in range(3):
            text, _, pooled, _ = pipeline.encode_prompt("a ramp", device="cpu", do_classifier_free_guidance=False)
            height, width, top, left, *target = batch["time_ids"][i].tolist()
            sizes = ((height, width), (top, left), tuple(target))
            ids = pipeline._get_add_time_ids(*sizes, dtype=torch.float32, text_encoder_projection_dim=32)
            posterior = models.vae.encode(batch["pixel_values"][i : i + 1]).latent_dist
            latents = (posterior.mean + posterior.std * batch["posterior_noise"][i]) * models.vae.config.scaling_factor
            noise, timestep = batch["noise"][i : i + 1], batch["timesteps"][i : i + 1]
            noisy = models.noise_scheduler.add_noise(latents, noise, timestep)
            added = {"text_embeds": pooled, "time_ids": ids}
            expected.append(F.mse_loss(unet(noisy, timestep, text, added_cond_kwargs=added).sample, noise))
        torch.testing.assert_close(loss, torch.stack(expected).mean())
        batch["time_ids"][:, 3] += 8  # or a loss that does not look at the crop would pass
        assert not torch.isclose(script.compute_loss(models, batch, samples.args)["loss"], loss, rtol=1e-6)


@pytest.mark.parametrize("flags", [(), ("--dream_training",)], ids=["plain", "dream"])
@for_each_family
def test_cached_is_uncached(base, train, flags):
    """The cache changes nothing, in any family."""
    if "sd2" in base.name and flags:
        pytest.skip("DREAM is for epsilon")
    flags = ("--center_crop", "--random_flip", "--proportion_empty_prompts", 0.4, *flags)
    cached, uncached = train(base, *flags), train(base, *flags, "--no_encoding_cache", out="uncached")
    first, second = weights(cached / "unet"), weights(uncached / "unet")
    start = weights(base / "unet")
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=1e-5)
    assert not same(first, start)
    others = [part for part in ("vae", "text_encoder", "text_encoder_2") if (base / part).exists()]
    assert all(same(weights(cached / part), weights(base / part)) for part in others)


def test_class_pictures_have_sizes_of_their_own(tiny_sdxl_model, pictures, tmp_path, monkeypatch):
    """In a batch of DreamBooth's pairs, each picture comes with its own size and crop."""
    classes = tmp_path / "classes"
    for i in range(2):
        classes.mkdir(exist_ok=True)
        Image.new("RGB", (96, 64), "red").save(classes / f"{i}.png")
    seen, loss = [], train_dreambooth.compute_loss

    def spy(models, batch, args):
        seen.append(batch["time_ids"].tolist())
        return loss(models, batch, args)

    monkeypatch.setattr(train_dreambooth, "compute_loss", spy)
    prior = "--with_prior_preservation --class_prompt a --num_class_images 2 --center_crop --prior_loss_weight 0.5"
    data = ("--instance_data_dir", pictures, "--instance_prompt", "sks", "--class_data_dir", classes)
    out = ("--output_dir", tmp_path / "out", "--encoding_cache_dir", tmp_path / "cache")
    run(train_dreambooth, "--pretrained_model_name_or_path", tiny_sdxl_model, *data, *out, *SMALL, *prior.split())
    assert seen == [[[48, 48, 0, 0, 16, 16], [64, 96, 0, 4, 16, 16]] * 2] * 4


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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Conv2d, "forward", spy)
        out = train(base, *flags)
    assert dtypes == dict.fromkeys(("encoder", "decoder"), {torch.float32 if full else torch.bfloat16})
    assert (out / "samples" / "step-000001.png").exists()
    assert json.loads((out / "vae" / "config.json").read_text())["force_upcast"] == upcast


def test_caches_do_not_mix_up_precisions(tiny_sdxl_model, train, tmp_path):
    """A VAE that now may run in half precision is not given what it encoded in float32."""
    other = changed(tiny_sdxl_model, tmp_path / "base", "vae", force_upcast=False)
    flags = ("--mixed_precision", "bf16", "--center_crop", "--max_train_steps", 1)
    full = metrics(train(tiny_sdxl_model, *flags, out="full"), "loss")
    half = metrics(train(other, *flags, out="half"), "loss")
    assert full != half == metrics(train(other, *flags, "--encoding_cache_dir", tmp_path / "new", out="new"), "loss")


def test_caches_do_not_mix_up_padding(tiny_sdxl_model, train, tmp_path):
    """The same words under another padding, which the UNet attends to, are another entry."""
    other = shutil.copytree(tiny_sdxl_model, tmp_path / "base")
    tokenizer = DiffusionPipeline.from_pretrained(other).tokenizer_2
    tokenizer.pad_token = "!</w>"
    tokenizer.save_pretrained(other / "tokenizer_2")
    losses = [
        metrics(train(base, "--max_train_steps", 1, out="out" + base.name), "loss")
        for base in (tiny_sdxl_model, other)
    ]
    new = train(other, "--max_train_steps", 1, "--encoding_cache_dir", tmp_path / "new", out="new")
    assert losses[0] != losses[1] == metrics(new, "loss")


def test_another_vae(tiny_sdxl_model, pictures, train, tmp_path):
    """--pretrained_vae_model_name_or_path takes the place of the base's VAE, in training and in the result."""
    torch.manual_seed(5)
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(tiny_sdxl_model / "vae") | {"force_upcast": False})
    vae.save_pretrained(tmp_path / "vae")
    flags = ("--pretrained_vae_model_name_or_path", tmp_path / "vae", "--max_train_steps", 1)
    out, plain = train(tiny_sdxl_model, *flags), train(tiny_sdxl_model, "--max_train_steps", 1, out="plain")
    assert same(weights(out / "vae"), weights(tmp_path / "vae"))
    assert not same(weights(out / "vae"), weights(tiny_sdxl_model / "vae"))
    assert metrics(out, "loss") != metrics(plain, "loss")


# Defaults and refusals.


@for_each_family
def test_resolution_by_the_family(base):
    """SDXL trains at 1024 pixels unless told otherwise, the others at 512."""
    for words, expected in (((), 1024 if "sdxl" in base.name else 512), (("--resolution", 64), 64)):
        args = parse(base, *words)
        script.load_pipeline(args)
        assert args.resolution == expected


def refused(capsys, words, where=script):
    """The sentence in which a run is refused, by the parser or as its base is loaded."""
    with pytest.raises(SystemExit) as end:
        where.load_pipeline(where.parse_args([str(word) for word in words]))
    return capsys.readouterr().err.split("error: ")[-1] if end.value.code == 2 else str(end.value.code)


def test_bases_that_are_refused(tiny_model, tiny_sdxl_model, tmp_path, capsys, monkeypatch):
    """What is no base of the three families is refused in a sentence, most of it before any weights are read."""
    monkeypatch.chdir(tmp_path)
    for name in ("model.ckpt", "model.pt", "model.safetensors", "empty.safetensors"):
        Path(name).write_bytes(b"x" * 20)
    flag, data = "--pretrained_model_name_or_path", ("--train_data_dir", tiny_model)

    def sentence(base, *words):
        return refused(capsys, (flag, base, *data, *words))

    for name in ("model.ckpt", "model.pt", "elsewhere/model.ckpt"):
        assert "convert it to .safetensors" in sentence(name)
    assert "is not a file" in sentence("missing.safetensors")
    assert "cannot be loaded" in sentence("model.safetensors", "--single_file_config", tiny_model)
    assert "--single_file_config" in sentence(tiny_model, "--single_file_config", tiny_model)
    for words in (("--revision", "main"), ("--variant", "fp16")):
        assert "model.safetensors is a file" in sentence("model.safetensors", *words)
    assert "--single_file_config nowhere/at/all" in sentence(
        "model.safetensors", "--single_file_config", "nowhere/at/all"
    )
    assert "model.safetensors is a file" in sentence("model.safetensors", "--non_ema_revision", "non-ema")
    for vae in ("/no/where", "vae.safetensors"):
        assert f"--pretrained_vae_model_name_or_path {vae} is no" in sentence(
            tiny_model, "--pretrained_vae_model_name_or_path", vae
        )
    said = sentence(tiny_model, "--pretrained_vae_model_name_or_path", tiny_model / "unet")
    assert "--pretrained_vae_model_name_or_path" in said and "cannot be loaded" in said
    flux = changed(tiny_model, tmp_path / "flux", "model_index.json", _class_name="FluxPipeline")
    assert "is a FluxPipeline" in sentence(flux)
    inpainting = changed(tiny_sdxl_model, tmp_path / "inpainting", "unet", in_channels=9)
    assert "cannot be loaded" in sentence(inpainting) or "no text-to-image model" in sentence(inpainting)
    edm = changed(tiny_sdxl_model, tmp_path / "edm", "model_index.json", scheduler=["diffusers", "EDMEulerScheduler"])
    (edm / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "EDMEulerScheduler"}')
    assert "no text-to-image model" in sentence(edm)
    torn = sentence("model.safetensors", "--single_file_config", tiny_model)
    assert "Without a network" not in torn and "model.safetensors cannot be loaded" in torn
    refiner = changed(
        tiny_sdxl_model, tmp_path / "refiner", "model_index.json", text_encoder=[None, None], tokenizer=[None, None]
    )
    assert "no text-to-image model" in sentence(refiner)


# Zero terminal SNR.


@for_each_family
def test_zero_terminal_snr(base, train, tmp_path):
    """The last timestep is noise alone, and the saved scheduler samples from there as it was trained."""
    flags = ("--rescale_betas_zero_snr", "--prediction_type", "v_prediction", "--snr_gamma", 5)
    out = train(base, *flags, "--validation_prompts", "a cat")
    pipeline = DiffusionPipeline.from_pretrained(out)
    config = pipeline.scheduler.config
    assert config.rescale_betas_zero_snr and config.timestep_spacing == "trailing"
    assert config.prediction_type == "v_prediction"
    scheduler = DDPMScheduler.from_config(config)
    assert scheduler.alphas_cumprod[-1] == 0 < scheduler.alphas_cumprod[-2]
    pipeline.scheduler.set_timesteps(10)
    assert pipeline.scheduler.timesteps[0] == 999
    images = pipeline("a cat", height=16, width=16, num_inference_steps=3, output_type="np").images
    assert np.isfinite(images).all() and images.std() > 0


def test_zero_terminal_snr_by_hand(tiny_sdxl_model, tmp_path):
    """At the last timestep the UNet sees noise alone, and v is minus the latents."""
    save_ramp(tmp_path / "x", 16, 16)
    flags = ("--rescale_betas_zero_snr", "--prediction_type", "v_prediction")
    models, samples = load(tiny_sdxl_model, *flags), samples_of(tmp_path / "x", "--resolution", 16)
    batch = torch.utils.data.default_collate([samples[0, 0]])
    batch["timesteps"][:] = 999
    seen = []
    models.unet.register_forward_hook(lambda unet, inputs, output: seen.append((inputs[0], output.sample)))
    with torch.no_grad():
        loss = script.compute_loss(models, batch, samples.args)["loss"]
        latents, *_ = script.encode_batch(models, batch)
        args = parse(tmp_path, *flags, "--snr_gamma", 5)
        assert script.compute_loss(models, batch, args)["loss"] == 0  # as min(0, gamma) / (0 + 1)
    (noisy, predicted), _ = seen
    torch.testing.assert_close(noisy, batch["noise"])
    torch.testing.assert_close(loss, F.mse_loss(predicted, -latents))


def test_a_scheduler_that_cannot_is_replaced(tiny_model, train, tmp_path):
    """PNDM, which SD 1.x comes with, cannot sample from noise alone: the result comes with a scheduler that can."""
    base = shutil.copytree(tiny_model, tmp_path / "base")
    scheduler = DiffusionPipeline.from_pretrained(tiny_model).scheduler
    PNDMScheduler.from_config(scheduler.config, skip_prk_steps=True).save_pretrained(base / "scheduler")
    index = json.loads((base / "model_index.json").read_text()) | {"scheduler": ["diffusers", "PNDMScheduler"]}
    (base / "model_index.json").write_text(json.dumps(index))
    flags = ("--prediction_type", "v_prediction", "--max_train_steps", 1)
    plain = DiffusionPipeline.from_pretrained(train(base, *flags, out="plain")).scheduler
    assert type(plain).__name__ == "PNDMScheduler" and plain.config.prediction_type == "v_prediction"
    able = DiffusionPipeline.from_pretrained(train(base, *flags, "--rescale_betas_zero_snr")).scheduler
    assert type(able).__name__ == "EulerDiscreteScheduler" and able.config.rescale_betas_zero_snr
    assert able.config.beta_end == 0.012 and able.config.timestep_spacing == "trailing"


def test_zero_terminal_snr_needs_more_than_noise(tiny_model, tiny_sdxl_model, tmp_path, capsys):
    """Where the input is noise alone, to predict the noise teaches nothing: refused, by the flag or by the base."""
    for base, *words in (
        (tiny_model, "--rescale_betas_zero_snr"),
        (tiny_model, "--rescale_betas_zero_snr", "--prediction_type", "epsilon"),
        (
            changed(tiny_sdxl_model, tmp_path / "x", "scheduler/scheduler_config.json", rescale_betas_zero_snr=True),
            "--seed",
            1,
        ),
    ):
        flags = ("--pretrained_model_name_or_path", base, "--train_data_dir", base, *words)
        assert "v_prediction" in refused(capsys, flags)


def test_another_noise_schedule_is_not_resumed(tiny_sd2_model, train):
    """A run goes on with the noise schedule that it began with."""
    train(tiny_sd2_model, "--max_train_steps", 2)
    with pytest.raises(SystemExit, match="noise schedule"):
        train(tiny_sd2_model, "--rescale_betas_zero_snr", "--resume_from_checkpoint", "latest")


# Single files.


@for_each_family
def test_a_single_file_trains_as_its_folder(base, family, train, tmp_path):
    """A base in one .safetensors file gives the same bits as its folder, without a network."""
    configs = shutil.copytree(base, tmp_path / "configs", ignore=shutil.ignore_patterns("*.safetensors"))
    file = save_single_file(base, tmp_path / "model.safetensors")
    flags = ("--single_file_config", configs, "--center_crop", "--max_train_steps", 2)
    single, folder = train(file, *flags), train(base, *flags[2:], out="folder")
    assert same(weights(single), weights(folder)) and metrics(single, "loss") == metrics(folder, "loss")
    pipeline = DiffusionPipeline.from_pretrained(single)
    assert type(pipeline).__name__ == type(DiffusionPipeline.from_pretrained(base)).__name__
    saved = [path for path in single.rglob("*.json") if path.name != "state.json"]  # of a checkpoint, never uploaded
    assert saved and str(tmp_path) not in "".join(path.read_text() for path in saved)


def test_a_single_file_without_configs_offline(tiny_model, tmp_path, capsys):
    """Without a network and without configs, the sentence says what could not be loaded."""
    file = save_single_file(tiny_model, tmp_path / "model.safetensors")
    sentence = refused(capsys, ("--pretrained_model_name_or_path", file, "--train_data_dir", tmp_path))
    assert "cannot be loaded" in sentence and "--single_file_config" in sentence


@pytest.mark.parametrize("marks", [(), ("v_pred",), ("v_pred", "ztsnr")])
def test_what_a_single_file_says_of_its_schedule(tiny_sdxl_model, train, tmp_path, marks):
    """A file that is marked as a v-prediction model, of zero terminal SNR or not, is trained and sampled as one."""
    file = save_single_file(tiny_sdxl_model, tmp_path / "model.safetensors")
    save_file(load_file(file) | {name: torch.zeros(0) for name in marks}, file)
    out = train(file, "--single_file_config", tiny_sdxl_model, "--max_train_steps", 1)
    config = DiffusionPipeline.from_pretrained(out).scheduler.config
    assert config.prediction_type == ("v_prediction" if marks else "epsilon")
    assert config.rescale_betas_zero_snr == ("ztsnr" in marks)


def test_a_refiner_in_one_file(tiny_sdxl_model, tmp_path, capsys):
    """A refiner's file, whose config has one text encoder, is refused as its folder is."""
    nothing = {"text_encoder": [None, None], "tokenizer": [None, None]}
    configs = changed(tiny_sdxl_model, tmp_path / "configs", "model_index.json", **nothing)
    file = save_single_file(tiny_sdxl_model, tmp_path / "model.safetensors")
    flags = ("--pretrained_model_name_or_path", file, "--single_file_config", configs)
    assert "no text-to-image model" in refused(capsys, (*flags, "--train_data_dir", tmp_path))


def test_a_single_file_that_lacks_weights(tiny_sdxl_model, tmp_path, capsys):
    """A file without some weights of a text encoder, which diffusers would pass over, is refused."""
    file = save_single_file(tiny_sdxl_model, tmp_path / "model.safetensors")
    tensors = load_file(file)
    del tensors["conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight"]
    save_file(tensors, file)
    flags = ("--pretrained_model_name_or_path", file, "--single_file_config", tiny_sdxl_model)
    assert "lacks weights" in refused(capsys, (*flags, "--train_data_dir", tmp_path))


def test_adapters_of_a_single_file(tiny_sdxl_model, pictures, tmp_path, capsys):
    """What the run prints loads the file, and the adapters onto it, to draw as the file's marks say."""
    file = save_single_file(tiny_sdxl_model, tmp_path / "model.safetensors")
    save_file(load_file(file) | {"v_pred": torch.zeros(0)}, file)
    out = ("--output_dir", tmp_path / "out", "--encoding_cache_dir", tmp_path / "cache", "--train_data_dir", pictures)
    base = ("--pretrained_model_name_or_path", file, "--single_file_config", tiny_sdxl_model)
    run(train_lora, *base, *out, *SMALL)
    code = capsys.readouterr().out.split("To load it:")[1]
    plain = f"StableDiffusionXLPipeline.from_single_file({str(file)!r}"
    assert plain in code
    found = {}  # with the configs, which are not on this Hub
    exec(code[: code.index("prompt = ")].replace(plain, f"{plain}, config={str(tiny_sdxl_model)!r}"), found)
    assert found["pipeline"].scheduler.config.prediction_type == "v_prediction"
    assert found["pipeline"].get_active_adapters()


@pytest.mark.parametrize("name", ["train_lora", "textual_inversion"])
def test_what_is_printed_draws_as_it_was_trained(name, tiny_model, pictures, tmp_path, monkeypatch, capsys):
    """The lines for a result without a scheduler and a VAE of its own bring those that it was trained with."""
    monkeypatch.chdir(tmp_path)
    script = importlib.import_module(name)
    torch.manual_seed(5)
    AutoencoderKL.from_config(AutoencoderKL.load_config(tiny_model / "vae")).save_pretrained("vae")
    flags = "--prediction_type v_prediction --rescale_betas_zero_snr --pretrained_vae_model_name_or_path vae"
    word = ("--placeholder_token", "<x>", "--initializer_token", "a") if name == "textual_inversion" else ()
    data = ("--pretrained_model_name_or_path", tiny_model, "--train_data_dir", pictures, "--output_dir", "out")
    run(script, *data, *SMALL, *word, *flags.split(), "--encoding_cache_dir", "cache")
    code = capsys.readouterr().out.split("To load it:")[1]
    found = {}
    exec(code[: code.index("prompt = ")], found)
    config = found["pipeline"].scheduler.config
    assert config.prediction_type == "v_prediction" and config.rescale_betas_zero_snr
    assert config.timestep_spacing == "trailing"
    vae = {
        f"diffusion_pytorch_model.safetensors:{key}": value
        for key, value in found["pipeline"].vae.state_dict().items()
    }
    assert same(vae, weights(Path("vae")))
    card = Path("out", "README.md").read_text()
    assert str(tmp_path) not in card and "v_prediction" in card


# Resuming.


@for_each_family
@pytest.mark.parametrize("step", [2, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 3))])
def test_resuming_is_exact(base, train, step):
    """A run that was stopped ends with the bits of one that was not, in every family."""
    flags = "--use_ema --random_flip --proportion_empty_prompts 0.3 --snr_gamma 5 --validation_samples 1".split()
    flags += ["--checkpointing_steps", step]
    whole = train(base, *flags, out="whole")
    train(base, *flags, "--max_train_steps", step)
    resumed = train(base, *flags, "--resume_from_checkpoint", "latest")
    assert same(weights(resumed), weights(whole)) and metrics(resumed, "loss") == metrics(whole, "loss")
    assert not same(weights(resumed / "unet"), weights(base / "unet"))


def test_resuming_both_text_encoders(tiny_sdxl_model, pictures, tmp_path):
    """DreamBooth trains both of SDXL's text encoders, keeps both in a checkpoint, and goes on with their bits."""
    flags = (
        "--instance_data_dir",
        pictures,
        "--instance_prompt",
        "sks",
        "--train_text_encoder",
        "--gradient_checkpointing",
    )

    def train(out, *words):
        base = ("--pretrained_model_name_or_path", tiny_sdxl_model, "--encoding_cache_dir", tmp_path / "cache")
        run(train_dreambooth, *base, *flags, *SMALL, "--output_dir", tmp_path / out, *words)
        return tmp_path / out

    whole = train("whole")
    train("out", "--max_train_steps", 2)
    out = train("out", "--resume_from_checkpoint", "latest")
    assert same(weights(out), weights(whole)) and metrics(out, "loss") == metrics(whole, "loss")
    for part in ("unet", "text_encoder", "text_encoder_2"):
        assert not same(weights(out / part), weights(tiny_sdxl_model / part)), part
        assert (out / "checkpoint-2" / part).is_dir()
    picture = StableDiffusionXLPipeline.from_pretrained(out)("sks", height=16, width=16, num_inference_steps=2).images
    assert picture[0].size == (16, 16)
