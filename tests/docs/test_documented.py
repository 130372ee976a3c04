"""The commands of diffusers' documentation: taken as they stand, and run on a Hub on the loopback, cut to one step."""

import importlib
import shlex
from pathlib import Path

import pytest
import wandb
from diffusers import DiffusionPipeline
from helpers import make_picture, metrics, run, save_pairs, write_config

import train_dreambooth


SD = "--pretrained_model_name_or_path=stable-diffusion-v1-5/stable-diffusion-v1-5"
SDXL = "--pretrained_model_name_or_path=stabilityai/stable-diffusion-xl-base-1.0"
VAE = "--pretrained_vae_model_name_or_path=madebyollin/sdxl-vae-fp16-fix"
NARUTO = "--dataset_name=lambdalabs/naruto-blip-captions"
CAPTIONED = (
    "--use_ema --resolution=512 --center_crop --random_flip --train_batch_size=1 --gradient_accumulation_steps=4 "
    "--gradient_checkpointing --max_train_steps=15000 --learning_rate=1e-05 --max_grad_norm=1 --lr_scheduler=constant "
    "--lr_warmup_steps=0 --output_dir=sd-naruto-model"
)
DOG = "--instance_data_dir dog --output_dir out --instance_prompt 'a photo of sks dog' --resolution 512 --push_to_hub"
DOG += " --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --train_batch_size 1"
DOG += " --lr_scheduler constant --lr_warmup_steps 0"
PRIOR = f"{DOG} --with_prior_preservation --prior_loss_weight 1.0 --class_data_dir path-to-class-images"
PRIOR += " --class_prompt 'a photo of dog' --num_class_images 200 --max_train_steps 800"
WATCHED = "--validation_prompt 'a photo of a sks dog' --num_validation_images 4 --validation_steps 100"
DREAMBOOTH = {
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
# Of several scripts of adapters; those on SDXL come after.
LORA = {
    "readme": "--dataset_name d/n --caption_column text --resolution 512 --random_flip --train_batch_size 1 --seed 42 "
    "--num_train_epochs 100 --checkpointing_steps 5000 --learning_rate 1e-04 --lr_scheduler constant "
    "--lr_warmup_steps 0 --output_dir out --validation_prompt dragon --report_to wandb",
    "guide": "--dataset_name d/n --dataloader_num_workers 8 --resolution 512 --center_crop --random_flip "
    "--train_batch_size 1 --gradient_accumulation_steps 4 --max_train_steps 15000 --learning_rate 1e-04 "
    "--max_grad_norm 1 --seed 1337 --lr_scheduler cosine --lr_warmup_steps 0 --output_dir out --push_to_hub "
    "--hub_model_id me/it --report_to wandb --checkpointing_steps 500 --validation_prompt naruto",
    "subject": "--instance_data_dir {data} --output_dir out --instance_prompt sks --resolution 512 "
    "--train_batch_size 1 --gradient_accumulation_steps 1 --checkpointing_steps 100 --learning_rate 1e-4 "
    "--report_to wandb --seed 0 --lr_scheduler constant --lr_warmup_steps 0 --max_train_steps 500 "
    "--validation_prompt sks --validation_epochs 50 --push_to_hub",
    "sdxl": "--pretrained_vae_model_name_or_path me/vae --dataset_name d/n --caption_column text --resolution 1024 "
    "--random_flip --train_batch_size 1 --num_train_epochs 2 --checkpointing_steps 500 --learning_rate 1e-04 "
    "--lr_scheduler constant --lr_warmup_steps 0 --mixed_precision fp16 --seed 42 --output_dir out "
    "--validation_prompt dragon --report_to wandb --push_to_hub",
    "sdxl-deepspeed": "--pretrained_vae_model_name_or_path me/vae --dataset_name d/n --caption_column text "
    "--resolution 1024 --train_batch_size 1 --num_train_epochs 2 --checkpointing_steps 2 --learning_rate 1e-04 "
    "--lr_scheduler constant --lr_warmup_steps 0 --mixed_precision fp16 --max_train_steps 20 --validation_epochs 20 "
    "--seed 1234 --output_dir out --validation_prompt dragon",
    "sdxl-text": "--dataset_name d/n --caption_column text --resolution 1024 --random_flip --train_batch_size 1 "
    "--num_train_epochs 2 --checkpointing_steps 500 --learning_rate 1e-04 --lr_scheduler constant "
    "--lr_warmup_steps 0 --seed 42 --output_dir out --train_text_encoder --validation_prompt dragon "
    "--report_to wandb --push_to_hub",
    "sdxl-subject": "--instance_data_dir {data} --pretrained_vae_model_name_or_path me/vae --output_dir out "
    "--mixed_precision fp16 --instance_prompt sks --resolution 1024 --train_batch_size 1 "
    "--gradient_accumulation_steps 4 --learning_rate 1e-4 --report_to wandb --lr_scheduler constant "
    "--lr_warmup_steps 0 --max_train_steps 500 --validation_prompt sks --validation_epochs 25 --seed 0 --push_to_hub "
    "--enable_xformers_memory_efficient_attention --gradient_checkpointing --use_8bit_adam --use_dora",
    # Its model is refused as it is loaded: see stable_diffusion/test_base_models.py.
    "playground": "--instance_data_dir {data} --output_dir out --mixed_precision fp16 --instance_prompt sks "
    "--resolution 1024 --train_batch_size 1 --gradient_accumulation_steps 4 --learning_rate 1e-4 --use_8bit_adam "
    "--report_to wandb --lr_scheduler constant --lr_warmup_steps 0 --max_train_steps 500 --validation_prompt sks "
    "--validation_epochs 25 --seed 0 --push_to_hub",
}
TEXTUAL_INVERSION = [
    "--pretrained_model_name_or_path=stable-diffusion-v1-5/stable-diffusion-v1-5 --train_data_dir=./cat "
    "--learnable_property=object --placeholder_token=<cat-toy> --initializer_token=toy --resolution=512 "
    "--train_batch_size=1 --gradient_accumulation_steps=4 --max_train_steps=3000 --learning_rate=5.0e-04 --scale_lr "
    "--lr_scheduler=constant --lr_warmup_steps=0 --push_to_hub --output_dir=textual_inversion_cat",
]
TEXTUAL_INVERSION += [f"{TEXTUAL_INVERSION[0]} {more}" for more in (
    "--num_vectors 5",
    "--gradient_accumulation_steps=4",
    "--validation_prompt='A <cat-toy> train' --num_validation_images=4 --validation_steps=100",
    "--gradient_checkpointing --mixed_precision fp16",
    "--enable_xformers_memory_efficient_attention",
    "--checkpointing_steps 500 --resume_from_checkpoint latest",
    # Of SDXL's script.
    "--pretrained_model_name_or_path=stabilityai/stable-diffusion-xl-base-1.0 --mixed_precision=bf16 --resolution=768 "
    "--max_train_steps=500 --save_as_full_pipeline --output_dir=./textual_inversion_cat_sdxl",
)]  # fmt: skip
FLOWERS = "--dataset_name=huggan/flowers-102-categories --output_dir=ddpm-ema-flowers-64"
POKEMON = "--dataset_name=huggan/pokemon --output_dir=ddpm-ema-pokemon-64"
USUAL = "--resolution=64 --center_crop --random_flip --train_batch_size=16 --num_epochs=100 --use_ema"
USUAL += " --gradient_accumulation_steps=1 --learning_rate=1e-4 --lr_warmup_steps=500"
UNCONDITIONAL = [
    "--mixed_precision=bf16",
    f"{FLOWERS} --mixed_precision=fp16 --push_to_hub",
    f"{FLOWERS} {USUAL} --mixed_precision=no --push_to_hub",
    f"{POKEMON} {USUAL} --mixed_precision=no --push_to_hub",
    f"{POKEMON} {USUAL} --mixed_precision=fp16 --logger=wandb",
    "--train_data_dir {data} --preserve_input_precision",
]
CONTROL = f"{SD} --output_dir=controlnet --dataset_name=fusing/fill50k --resolution=512 --learning_rate=1e-5 "
CONTROL += "--validation_image ./conditioning_image_1.png ./conditioning_image_2.png "
CONTROL += "--validation_prompt 'red circle with blue background' 'cyan circle with brown floral background'"
SMALLER = f"{CONTROL} --train_batch_size=1 --gradient_accumulation_steps=4 --push_to_hub"
CONTROLNET = [
    f"{CONTROL} --train_batch_size=4 --push_to_hub",
    SMALLER,
    f"{CONTROL} --train_batch_size=4 --mixed_precision=fp16 --tracker_project_name=controlnet-demo --report_to=wandb "
    "--push_to_hub",
    f"{SMALLER} --gradient_checkpointing --use_8bit_adam",
    f"{SMALLER} --gradient_checkpointing --use_8bit_adam --enable_xformers_memory_efficient_attention "
    "--set_grads_to_none",
    f"{SMALLER} --gradient_checkpointing --enable_xformers_memory_efficient_attention --set_grads_to_none "
    "--mixed_precision fp16",
    f"{CONTROL} {SDXL} --mixed_precision=fp16 --resolution=1024 --max_train_steps=15000 --validation_steps=100 "
    "--train_batch_size=1 --gradient_accumulation_steps=4 --report_to=wandb --seed=42 --push_to_hub",
]
EDITOR = "--enable_xformers_memory_efficient_attention --random_flip --train_batch_size=4 --max_train_steps=15000 "
EDITOR += "--gradient_accumulation_steps=4 --gradient_checkpointing --checkpointing_steps=5000 --push_to_hub "
EDITOR += "--checkpoints_total_limit=1 --learning_rate=5e-05 --lr_warmup_steps=0 --conditioning_dropout_prob=0.05 "
EDITOR += "--seed=42"
SAMPLES = "--dataset_name=fusing/instructpix2pix-1000-samples --resolution=256"
INSTRUCT_PIX2PIX = [
    f"{SD} {SAMPLES} {EDITOR} --max_grad_norm=1 --mixed_precision=fp16",
    f"{SD} {SAMPLES} {EDITOR} --max_grad_norm=1 --mixed_precision=fp16 --val_image_url={{url}} "
    "--validation_prompt='make the mountains snowy' --report_to=wandb",
    f"{SD} {SAMPLES} {EDITOR} --mixed_precision=fp16 --use_ema --resolution=512",
    f"{SDXL} {SAMPLES} {EDITOR} --use_ema --resolution=512 --val_image_url_or_path={{url}} "
    "--validation_prompt='make it in japan' --report_to=wandb",
]
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
    *(f"train_dreambooth {flags}" for flags in DREAMBOOTH.values()),
    *(f"train_lora {SDXL if 'sdxl' in name else SD} {flags}" for name, flags in LORA.items()),
    *(f"textual_inversion {flags}" for flags in TEXTUAL_INVERSION),
    *(f"train_unconditional {flags}" for flags in UNCONDITIONAL),
    *(f"train_controlnet {flags}" for flags in CONTROLNET),
    *(f"train_instruct_pix2pix {flags}" for flags in INSTRUCT_PIX2PIX),
]
IF = "--pre_compute_text_embeddings --tokenizer_max_length 77 --text_encoder_use_attention_mask"
DEEPFLOYD = {
    "IF, stage 1": f"{DOG} {IF} --use_8bit_adam --set_grads_to_none --skip_save_text_encoder "
    "--validation_scheduler DDPMScheduler",
    "IF, stage 2": f"{DOG} {IF} --validation_images dog/1.png dog/2.png --class_labels_conditioning timesteps",
}


# Flags whose value stands under another name.
NAMES = {"num_epochs": "num_train_epochs", "logger": "report_to", "val_image_url": "val_image_url_or_path"}
NAMES[("train_controlnet", "validation_prompt")] = "validation_prompts"


def save_controls(folder):
    """Saves the pictures that the commands name."""
    for i in (1, 2):
        make_picture(folder / f"conditioning_image_{i}.png")


@pytest.mark.parametrize("command", COMMANDS)
def test_documented_command_is_taken(command, tmp_path, monkeypatch):
    """Each is taken as it stands, and every value arrives."""
    monkeypatch.chdir(tmp_path)
    for name in ("dog", "cat"):
        (tmp_path / name).mkdir()
    save_controls(tmp_path)
    script, *words = shlex.split(command.format(data="dog", url="http://127.0.0.1/mountain.png"))
    parts = [part for word in words for part in word.split("=", 1)]
    # The one that names no data is a fragment, and takes some.
    data = (
        () if {"--dataset_name", "--train_data_dir", "--instance_data_dir"} & {*parts} else ("--train_data_dir", "dog")
    )
    args = vars(importlib.import_module(script).parse_args([*words, *data]))
    given = {flag[2:]: value for flag, value in zip(parts, [*parts[1:], "--"]) if flag.startswith("--")}
    for flag, value in given.items():  # of a flag that is repeated, the last
        taken = args[NAMES.get((script, flag)) or NAMES.get(flag, flag)]
        if isinstance(taken, list):  # of pictures, and of prompts, four for each
            assert taken[0] == value and len(taken) in (2, 8), flag
        else:
            assert taken == (True if value.startswith("--") else type(taken)(value)), flag


@pytest.mark.parametrize("name", DEEPFLOYD)
def test_documented_command_is_refused(name, tmp_path, monkeypatch, capsys):
    """Those for DeepFloyd IF are refused with a reason."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dog").mkdir()
    with pytest.raises(SystemExit):
        train_dreambooth.parse_args(shlex.split(DEEPFLOYD[name]))
    said = capsys.readouterr().err
    assert any(f"{flag}: {reason}\n" in said for flag, reason in train_dreambooth.REFUSED.items())


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
    save_controls(tmp_path)
    hub.add_folder("datasets/fusing/fill50k", save_pairs(tmp_path / "pairs"))
    edits = save_pairs(tmp_path / "edits", "edited_image_file_name", "input_image", "edit_prompt")
    hub.add_folder("datasets/fusing/instructpix2pix-1000-samples", edits)
    url = f"{hub.url}/datasets/fusing/fill50k/resolve/main/pictures/0.png"
    served = len(hub.repos)
    name, *words = shlex.split(command.format(data="dog", url=url))
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
    monkeypatch.setattr(script, "SAMPLER_STEPS", 2, raising=False)
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
