"""The loss of train_text_to_image.py against formulas that are written out anew here, in float64."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import metrics, run
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

import train_text_to_image as script


TIMESTEPS = torch.tensor([1, 150, 500, 999])
BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
ALPHAS_CUMPROD = torch.from_numpy(np.cumprod(1 - BETAS))
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def make_args(tiny_model, *flags):
    """Parse flags on top of those that the script demands."""
    data = ("--pretrained_model_name_or_path", tiny_model, "--train_data_dir", tiny_model)
    return script.parse_args([str(flag) for flag in (*data, *flags)])


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
    noise = batch["noise"].double() + offset * batch["offset_noise"].double()
    noisy = alpha * latents + sigma * (noise + perturbation * batch["perturbation"].double())
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
        args, singles = make_args(tiny_model, *flags), [{k: v[[i]] for k, v in batch.items()} for i in range(4)]
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
    args = make_args(tiny_model, "--dream_training", "--dream_detail_preservation", power, "--noise_offset", 0.1)
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

    rows = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    records = [
        {"name": str(pictures / row["file_name"]), "rows": None, "captions": [row["text"]], "size": (48, 48)}
        for row in rows
    ]
    samples = script.Samples(script.parse_args([str(flag) for flag in flags]), records, 3, (4, 16, 16), 1000)
    keys = script.step_keys(0, total_batch_size=4, size=6, seed=3)
    batch = torch.utils.data.default_collate([samples[key] for key in keys])
    images = [Image.open(records[index]["name"]).convert("RGB").resize((32, 32), Image.LANCZOS) for _, index in keys]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 127.5 - 1
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
        batch |= {"mean": posterior.mean, "std": posterior.std, "scaling_factor": vae.config.scaling_factor}
        captions = [rows[index]["text"] for _, index in keys]
        ids = tokenizer(captions, padding="max_length", max_length=77, return_tensors="pt").input_ids
        batch["encoder_hidden_states"] = text_encoder(ids)[0]
        unet = UNet2DConditionModel.from_pretrained(folder / "unet")
        expected = formula(unet, batch, prediction_type, gamma).mean().item()
    assert metrics(tmp_path / "out", "loss") == [(1, pytest.approx(expected, rel=5e-4))]
