"""The loss of train_text_to_image.py against formulas that are written out anew here, in float64."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from helpers import load, metrics, parse, run, samples_of, save_ramp
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

import train_text_to_image as script


TIMESTEPS = torch.tensor([1, 150, 500, 999])
BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
ALPHAS_CUMPROD = torch.from_numpy(np.cumprod(1 - BETAS))
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def make_models(tiny_model, prediction_type):
    """Load what the loss needs of the tiny model."""
    return SimpleNamespace(
        unet=UNet2DConditionModel.from_pretrained(tiny_model / "unet").eval(),
        vae=SimpleNamespace(config=SimpleNamespace(scaling_factor=0.5)),
        noise_scheduler=DDPMScheduler.from_pretrained(tiny_model / "scheduler", prediction_type=prediction_type),
    )


def make_batch():
    """Draw four samples' posteriors, noises and embeddings, as the cache and Samples give them."""
    generator = torch.Generator().manual_seed(0)
    shapes = {name: (4, 4, 8, 8) for name in ("mean", "std", "posterior_noise", "noise", "perturbation")}
    shapes |= {"offset_noise": (4, 4, 1, 1), "encoder_hidden_states": (4, 9, 32)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} | {"timesteps": TIMESTEPS}


def formula(unet, batch, prediction_type, gamma=None, offset=0.0, perturbation=0.0, dream=None):
    """Compute the samples' losses as the papers have them, in float64 but for the UNet."""
    timesteps, embeddings = batch["timesteps"], batch["encoder_hidden_states"]
    latents = batch["mean"].double() + batch["std"].double() * batch["posterior_noise"].double()
    latents = latents * batch.get("scaling_factor", 0.5)
    alpha = ALPHAS_CUMPROD[timesteps].sqrt()[:, None, None, None]
    sigma = (1 - ALPHAS_CUMPROD[timesteps]).sqrt()[:, None, None, None]
    noise = input_noise = batch["noise"].double()
    if offset:
        noise = input_noise = noise + offset * batch["offset_noise"].double()
    if perturbation:
        input_noise = noise + perturbation * batch["perturbation"].double()
    noisy = alpha * latents + sigma * input_noise
    target = {"epsilon": noise, "v_prediction": alpha * noise - sigma * latents, "sample": latents}[prediction_type]
    if dream is not None:  # arXiv:2312.00210, algorithm 1: lambda is sqrt(1 - alpha)^p
        with torch.no_grad():
            error = noise - unet(noisy.float(), timesteps, embeddings).sample.double()
        noisy, target = noisy + sigma * sigma**dream * error, target + sigma**dream * error
    loss = (unet(noisy.float(), timesteps, embeddings).sample.double() - target).square().mean(dim=(1, 2, 3))
    if gamma is None:
        return loss
    snr = (alpha / sigma).square().flatten()
    weights = {"epsilon": snr.clamp(max=gamma) / snr, "v_prediction": snr.clamp(max=gamma) / (snr + 1)}
    return loss * weights.get(prediction_type, snr.clamp(max=gamma))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(
    "flags, settings",
    [
        ((), {}),
        (("--snr_gamma", 5), {"gamma": 5.0}),
        (("--noise_offset", 0.2), {"offset": 0.2}),
        (("--input_perturbation", 0.3), {"perturbation": 0.3}),
        (
            ("--snr_gamma", 1, "--noise_offset", 0.2, "--input_perturbation", 0.3),
            {"gamma": 1.0, "offset": 0.2, "perturbation": 0.3},
        ),
    ],
    ids=["plain", "min-snr", "offset", "perturbation", "all"],
)
def test_loss_is_the_formula(tiny_model, prediction_type, flags, settings):
    """Every sample's loss is the formula's, for each thing a UNet can predict and each flag that bends it."""
    models, batch = make_models(tiny_model, prediction_type), make_batch()
    with torch.no_grad():
        args, singles = parse(tiny_model, *flags), [{k: v[[i]] for k, v in batch.items()} for i in range(4)]
        losses = [script.compute_loss(models, single, args)["loss"] for single in singles]
        expected = formula(models.unet, batch, prediction_type, **settings)
        torch.testing.assert_close(torch.stack(losses).double(), expected, rtol=5e-4, atol=0)
        mean = script.compute_loss(models, batch, args)["loss"]
    assert mean.shape == () and mean.dtype == torch.float32
    torch.testing.assert_close(mean.double(), expected.mean(), rtol=5e-4, atol=0)
    if settings:  # else a flag that does nothing would pass
        with torch.no_grad():
            assert not torch.allclose(formula(models.unet, batch, prediction_type), expected, rtol=5e-4)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_min_snr_weights(tiny_model, prediction_type):
    """The weights are min(snr, gamma) over snr, snr + 1 or 1, and 1 without gamma, at every timestep."""
    scheduler, timesteps = make_models(tiny_model, prediction_type).noise_scheduler, torch.arange(1000)
    snr = ALPHAS_CUMPROD / (1 - ALPHAS_CUMPROD)
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones(1000)}[prediction_type]
    for gamma in (1.0, 5.0, 20.0):
        weights = script.snr_weights(scheduler, timesteps, gamma).double()
        torch.testing.assert_close(weights, snr.clamp(max=gamma) / divisor, rtol=5e-4, atol=0)
    assert torch.equal(script.snr_weights(scheduler, timesteps, None), torch.ones(1000))


@pytest.mark.parametrize("power", [1.0, 0.5, 3.0])
def test_dream_is_the_papers(tiny_model, power):
    """DREAM's loss and its gradient are the paper's: nothing flows back through the first forward pass."""
    models, batch = make_models(tiny_model, "epsilon"), make_batch()
    args = parse(tiny_model, "--dream_training", "--dream_detail_preservation", power, "--noise_offset", 0.1)
    parameters = list(models.unet.parameters())
    loss = script.compute_loss(models, batch, args)["loss"]
    expected = formula(models.unet, batch, "epsilon", dream=power, offset=0.1)
    torch.testing.assert_close(loss.double(), expected.mean(), rtol=5e-4, atol=0)
    assert not torch.allclose(expected, formula(models.unet, batch, "epsilon", offset=0.1), rtol=5e-4)
    gradients = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
    wanted = torch.cat([g.flatten() for g in torch.autograd.grad(expected.mean(), parameters)])
    assert (gradients - wanted).norm() < 1e-4 * wanted.norm()


@pytest.mark.parametrize("model, prediction_type", [("tiny_model", "epsilon"), ("tiny_v_model", "v_prediction")])
@pytest.mark.parametrize("flags, gamma", [((), None), (("--snr_gamma", 5, "--no_encoding_cache"), 5.0)])
def test_first_logged_loss(request, pictures, tmp_path, model, prediction_type, flags, gamma):
    """The first loss in metrics.jsonl follows by hand from pictures, captions, models and the samples' draws."""
    folder = request.getfixturevalue(model)
    flags = ("--resolution", 32, "--train_batch_size", 4, "--max_train_steps", 1, "--seed", 3, *flags)
    flags = ("--pretrained_model_name_or_path", folder, "--train_data_dir", pictures, *flags)
    run(script, *flags, "--checkpointing_steps", 0, "--report_to", "none", "--output_dir", tmp_path / "out")

    samples = samples_of(pictures, *flags, seed=3)
    records = samples.records
    keys = script.step_keys(0, total_batch_size=4, sizes=(6, 0), seed=3)
    batch = torch.utils.data.default_collate([samples[key] for key in keys])
    images = [Image.open(records[index]["name"]).convert("RGB").resize((32, 32), Image.LANCZOS) for _, index in keys]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 127.5 - 1
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
        batch |= {"mean": posterior.mean, "std": posterior.std, "scaling_factor": vae.config.scaling_factor}
        captions = [records[index]["captions"][0] for _, index in keys]
        ids = tokenizer(captions, padding="max_length", max_length=77, return_tensors="pt").input_ids
        batch["encoder_hidden_states"] = text_encoder(ids)[0]
        unet = UNet2DConditionModel.from_pretrained(folder / "unet")
        expected = formula(unet, batch, prediction_type, gamma).mean().item()
    assert metrics(tmp_path / "out", "loss") == [(1, pytest.approx(expected, rel=5e-4))]


def test_sdxls_loss_by_hand(tiny_sdxl_model, tmp_path):
    """SDXL's loss is that of a UNet that is told prompt, pooled prompt, size and crop as the pipeline tells it."""
    save_ramp(tmp_path / "x", 40, 16)
    models, samples = load(tiny_sdxl_model), samples_of(tmp_path / "x", "--resolution", 16, "--random_flip")
    samples.tokenizers = models.tokenizers
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


def test_zero_terminal_snr_by_hand(tiny_sdxl_model, tmp_path):
    """At the last timestep the UNet sees noise alone, and v is minus the latents."""
    save_ramp(tmp_path / "x", 16, 16)
    flags = ("--rescale_betas_zero_snr", "--prediction_type", "v_prediction")
    models, samples = load(tiny_sdxl_model, *flags), samples_of(tmp_path / "x", "--resolution", 16)
    samples.tokenizers = models.tokenizers
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
