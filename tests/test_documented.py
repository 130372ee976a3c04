"""The commands of diffusers' documentation, run: its names on a Hub on the loopback, its numbers cut to one step."""

import importlib
import shlex
from pathlib import Path

import pytest
import test_dreambooth
import test_lora
import test_textual_inversion
import test_train_unconditional
import wandb
from conftest import metrics, run
from diffusers import DiffusionPipeline
from test_train_unconditional import write_config


SD = "--pretrained_model_name_or_path=stable-diffusion-v1-5/stable-diffusion-v1-5"
SDXL = "--pretrained_model_name_or_path=stabilityai/stable-diffusion-xl-base-1.0"
VAE = "--pretrained_vae_model_name_or_path=madebyollin/sdxl-vae-fp16-fix"
NARUTO = "--dataset_name=lambdalabs/naruto-blip-captions"
CAPTIONED = (
    "--use_ema --resolution=512 --center_crop --random_flip --train_batch_size=1 --gradient_accumulation_steps=4 "
    "--gradient_checkpointing --max_train_steps=15000 --learning_rate=1e-05 --max_grad_norm=1 --lr_scheduler=constant "
    "--lr_warmup_steps=0 --output_dir=sd-naruto-model"
)
COMMANDS = [
    f"train_text_to_image {SD} {NARUTO} {CAPTIONED}",
    f"train_text_to_image {SD} --train_data_dir=dog {CAPTIONED}",
    f"train_text_to_image {SD} {NARUTO} {CAPTIONED} --enable_xformers_memory_efficient_attention --push_to_hub",
    f"train_text_to_image {SD} {NARUTO} {CAPTIONED} --snr_gamma=5.0 --mixed_precision=fp16",
    f"train_text_to_image {SDXL} {VAE} {NARUTO} --enable_xformers_memory_efficient_attention --resolution=512 "
    "--center_crop --random_flip --proportion_empty_prompts=0.2 --train_batch_size=1 --gradient_accumulation_steps=4 "
    "--gradient_checkpointing --max_train_steps=10000 --use_8bit_adam --learning_rate=1e-06 --lr_scheduler=constant "
    "--lr_warmup_steps=0 --mixed_precision=fp16 --report_to=wandb --validation_prompt='a cute Sundar Pichai creature' "
    "--validation_epochs 5 --checkpointing_steps=5000 --output_dir=sdxl-naruto-model --push_to_hub",
    *(f"train_dreambooth {flags}" for flags in test_dreambooth.DOCUMENTED.values()),
    *(f"train_lora {SDXL if 'sdxl' in name else SD} {flags}" for name, flags in test_lora.DOCUMENTED.items()),
    *(f"textual_inversion {flags}" for flags in test_textual_inversion.DOCUMENTED),
    *(f"train_unconditional {flags}" for flags in test_train_unconditional.DOCUMENTED),
]
# What would take long, or needs a GPU.
SHORT = "--resolution 16 --max_train_steps 1 --gradient_accumulation_steps 1 --train_batch_size 2"


@pytest.mark.parametrize("command", COMMANDS)
def test_documented_command_runs(command, tiny_model, tiny_sdxl_model, pictures, tmp_path, monkeypatch, hub):
    """It trains a step on what its names stand for, and leaves what loads, on the Hub too if it says so."""
    monkeypatch.chdir(tmp_path)
    for name in ("dog", "cat"):
        (tmp_path / name).symlink_to(pictures)
    hub.add_folder("stable-diffusion-v1-5/stable-diffusion-v1-5", tiny_model)
    hub.add_folder("stabilityai/stable-diffusion-xl-base-1.0", tiny_sdxl_model)
    for name in ("madebyollin/sdxl-vae-fp16-fix", "me/vae"):
        hub.add_folder(name, tiny_sdxl_model / "vae")
    for name in ("lambdalabs/naruto-blip-captions", "huggan/flowers-102-categories", "huggan/pokemon", "d/n"):
        hub.add_folder(f"datasets/{name}", pictures)
    served = len(hub.repos)
    name, *words = shlex.split(command.format(data="dog"))
    flags = {word.split("=")[0] for word in words}
    script = importlib.import_module(name)
    short = SHORT.split()
    if name == "train_unconditional":
        short += ["--model_config_name_or_path", write_config(tmp_path / "config"), "--eval_batch_size", 2]
        short += [] if {"--dataset_name", "--train_data_dir"} & flags else ["--train_data_dir", "dog"]
        short += ["--ddpm_num_inference_steps", 2]
    elif "--validation_prompt" in flags:
        short += ["--num_validation_images", 1]
    if "--num_class_images" in flags:
        short += ["--num_class_images", 1]
        monkeypatch.setattr(script, "draw_class_pictures", draw)
    if any("fp16" in word for word in words):
        short += ["--mixed_precision", "bf16"]
    monkeypatch.setattr(script, "VALIDATION_STEPS", 2, raising=False)
    run(script, *words, *short, "--encoding_cache_dir", "cache", "--cache_dir", "hub")
    wandb.teardown()  # or the processes of later tests would share this one's service
    args = script.parse_args([str(word) for word in [*words, *short]])
    out = Path(args.output_dir)
    assert len(metrics(out, "loss")) == 1
    assert (len(hub.repos) > served) == ("--push_to_hub" in flags)
    if (out / "model_index.json").exists():
        DiffusionPipeline.from_pretrained(out)
    else:
        assert list(out.glob("*.safetensors"))


def draw(args, pipeline, names, seed):
    """Draws class pictures in two steps instead of fifty."""
    for name in names:
        pipeline(args.class_prompt, num_inference_steps=2).images[0].save(Path(args.class_data_dir, name))
