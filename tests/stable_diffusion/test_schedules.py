"""What the UNet predicts and the noise schedule: saved with the result, and zero terminal SNR."""

import json
import re
import shutil

import numpy as np
import pytest
from diffusers import DDPMScheduler, DiffusionPipeline, LCMScheduler, PNDMScheduler, StableDiffusionPipeline
from helpers import changed, for_each_family, load, metrics, refused_base, same, weights

import train_lora


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_prediction_type_is_saved(train, tiny_model, tiny_v_model, prediction_type):
    """What the UNet learns to predict stands in the saved scheduler, with all else as the base has it."""
    for model in (tiny_model, tiny_v_model):
        out = train(
            f"from-{model.name}", "--pretrained_model_name_or_path", model, "--prediction_type", prediction_type
        )
        before, after = (
            json.loads((folder / "scheduler" / "scheduler_config.json").read_text()) for folder in (model, out)
        )
        assert after == before | {"prediction_type": prediction_type}
    assert StableDiffusionPipeline.from_pretrained(out).scheduler.config.prediction_type == prediction_type
    assert same(weights(out / "unet"), weights(out.with_name("from-tiny") / "unet"))


def test_a_v_model_stays_one(train, tiny_v_model):
    """A base model that predicts v is trained and saved so without a flag, and learns."""
    flags = ("--pretrained_model_name_or_path", tiny_v_model)
    by_default, by_flag = train("default", *flags), train("flag", *flags, "--prediction_type", "v_prediction")
    assert same(weights(by_default / "unet"), weights(by_flag / "unet"))
    assert StableDiffusionPipeline.from_pretrained(by_default).scheduler.config.prediction_type == "v_prediction"
    epsilon = train("epsilon", *flags, "--prediction_type", "epsilon")
    assert not same(weights(epsilon / "unet"), weights(by_default / "unet"))


@for_each_family
def test_zero_terminal_snr(base, train, tmp_path):
    """The last timestep is noise alone, and the saved scheduler samples from there as it was trained."""
    flags = ("--rescale_betas_zero_snr", "--prediction_type", "v_prediction", "--snr_gamma", 5)
    out = train("out", *flags, "--validation_prompts", "a cat", base=base)
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


def test_a_scheduler_that_cannot_is_replaced(tiny_model, train, tmp_path):
    """PNDM, which SD 1.x comes with, cannot sample from noise alone: the result comes with a scheduler that can."""
    base = shutil.copytree(tiny_model, tmp_path / "base")
    scheduler = DiffusionPipeline.from_pretrained(tiny_model).scheduler
    PNDMScheduler.from_config(scheduler.config, skip_prk_steps=True).save_pretrained(base / "scheduler")
    index = json.loads((base / "model_index.json").read_text()) | {"scheduler": ["diffusers", "PNDMScheduler"]}
    (base / "model_index.json").write_text(json.dumps(index))
    flags = ("--prediction_type", "v_prediction", "--max_train_steps", 1)
    plain = DiffusionPipeline.from_pretrained(train("plain", *flags, base=base)).scheduler
    assert type(plain).__name__ == "PNDMScheduler" and plain.config.prediction_type == "v_prediction"
    able = DiffusionPipeline.from_pretrained(train("out", *flags, "--rescale_betas_zero_snr", base=base)).scheduler
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
        assert "v_prediction" in refused_base(capsys, flags)


def test_another_noise_schedule_is_not_resumed(tiny_sd2_model, train):
    """A run goes on with the noise schedule that it began with."""
    train("out", "--max_train_steps", 2, "--checkpointing_steps", 2, base=tiny_sd2_model)
    with pytest.raises(SystemExit, match="noise schedule"):
        train("out", "--rescale_betas_zero_snr", "--resume_from_checkpoint", "latest", base=tiny_sd2_model)


@pytest.fixture
def sparse_model(tiny_model, tmp_path):
    """The tiny model with SD 1.5's scheduler as it is published: PNDM, whose file leaves most settings to defaults."""
    base = shutil.copytree(tiny_model, tmp_path / "sparse")
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    settings |= {"num_train_timesteps": 1000, "skip_prk_steps": True, "set_alpha_to_one": False, "trained_betas": None}
    names = {"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "clip_sample": False}
    (base / "scheduler" / "scheduler_config.json").write_text(json.dumps(names | settings))
    index = json.loads((base / "model_index.json").read_text()) | {"scheduler": ["diffusers", "PNDMScheduler"]}
    (base / "model_index.json").write_text(json.dumps(index))
    return base


@pytest.mark.parametrize(
    "flags",
    [
        ("--prediction_type", "v_prediction"),
        ("--prediction_type", "sample"),
        ("--prediction_type", "v_prediction", "--rescale_betas_zero_snr"),
    ],
    ids=["v", "sample", "zero snr"],
)
def test_a_schedule_that_is_changed_where_the_base_has_defaults(flags, train, tiny_model, sparse_model):
    """What the flags change is trained, saved and told, whether the base's file names those settings or not."""
    wanted = train("wanted", *flags, base=tiny_model)
    out = train("out", *flags, "--validation_prompts", "a cat", base=sparse_model)
    assert metrics(out, "loss") == metrics(wanted, "loss")
    config = StableDiffusionPipeline.from_pretrained(out).scheduler.config
    assert config.prediction_type == flags[1] and not config.get("clip_sample", False)
    zero = len(flags) > 2
    assert config.get("rescale_betas_zero_snr", False) is zero
    assert not zero or config.timestep_spacing == "trailing"


def test_the_printed_lines_change_the_schedule_too(trainer, sparse_model, monkeypatch):
    """The lines that load adapters give the base the schedule that they were trained on."""
    adapters = trainer(train_lora)
    flags = ("--prediction_type", "v_prediction", "--rescale_betas_zero_snr")
    out = adapters("out", *flags, base=sparse_model)
    code = re.search(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)[1]
    monkeypatch.chdir(out.parent)
    lines = code.replace("'out'", f"'{out}'").split("pipeline.load_lora_weights")[0]
    found = {}
    exec(lines, found)
    config = found["pipeline"].scheduler.config
    settings = (config.prediction_type, config.rescale_betas_zero_snr, config.timestep_spacing)
    assert settings == ("v_prediction", True, "trailing")


def test_a_scheduler_with_other_defaults(tiny_model, tmp_path):
    """Settings that a base's file leaves to its scheduler are that scheduler's also while it is trained."""
    base = shutil.copytree(tiny_model, tmp_path / "base")
    (base / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "LCMScheduler"}')
    index = json.loads((base / "model_index.json").read_text()) | {"scheduler": ["diffusers", "LCMScheduler"]}
    (base / "model_index.json").write_text(json.dumps(index))
    models = load(base)
    assert np.allclose(models.noise_scheduler.alphas_cumprod, LCMScheduler().alphas_cumprod)


@pytest.mark.parametrize("prediction_type", ["flow_prediction", None])
def test_a_scheduler_that_predicts_something_else_is_refused(prediction_type, tiny_model, tmp_path, capsys):
    """It is not trained as if it predicted the sample."""
    base = shutil.copytree(tiny_model, tmp_path / "base")
    name = "DPMSolverMultistepScheduler" if prediction_type else "IPNDMScheduler"
    settings = {"prediction_type": prediction_type, "use_flow_sigmas": True} if prediction_type else {}
    (base / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": name} | settings))
    index = json.loads((base / "model_index.json").read_text()) | {"scheduler": ["diffusers", name]}
    (base / "model_index.json").write_text(json.dumps(index))
    words = ["--pretrained_model_name_or_path", base, "--train_data_dir", tmp_path, "--output_dir", tmp_path / "out"]
    assert f"predicts {prediction_type}" in refused_base(capsys, [*words[:2], "--dataset_name", "x", *words[4:]])
