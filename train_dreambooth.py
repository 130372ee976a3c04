"""Teaches Stable Diffusion 1.x, 2.x or XL one subject from a few pictures of it: DreamBooth (arXiv:2208.12242).

The UNet, and with --train_text_encoder the text encoder too, learn a prompt with a rare word such as "a photo of sks
dog". With --with_prior_preservation, every batch holds as many pictures of the class ("a photo of dog"), drawn by the
base model itself, and their loss keeps the class as it was. The result is a pipeline that
DiffusionPipeline.from_pretrained loads.

Start reading at run, train and compute_loss. Most functions stand word for word in the sibling scripts, so that one or
the other draw or hook has no use here.

    accelerate launch train_dreambooth.py --config configs/demo_dreambooth.yaml
    accelerate launch train_dreambooth.py --pretrained_model_name_or_path sd-legacy/stable-diffusion-v1-5 \\
        --instance_data_dir dog --instance_prompt "a photo of sks dog" --with_prior_preservation \\
        --class_data_dir dogs --class_prompt "a photo of dog" --num_class_images 200 --train_batch_size 1 \\
        --learning_rate 2e-6 --lr_warmup_steps 0 --max_train_steps 800 --train_text_encoder --output_dir my-dog
    accelerate launch train_dreambooth.py --config my-dog/train_args.yaml --resume_from_checkpoint latest
"""

import argparse
import contextlib
import copy
import csv
import ctypes
import functools
import glob
import hashlib
import inspect
import io
import json
import logging
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import yaml


DEEPFLOYD = "it is for DeepFloyd IF, which this script does not train, so leave it out"
REFUSED = {
    "--local_rank": "launchers pass the rank in the environment, so leave this flag out",
    "--tokenizer_name": "the tokenizer has to be the base model's own, so put it into that model's tokenizer folder",
    "--skip_save_text_encoder": "the result is a whole pipeline that loads, so leave this flag out",
    "--tokenizer_max_length": DEEPFLOYD,
    "--text_encoder_use_attention_mask": DEEPFLOYD,
    "--validation_images": DEEPFLOYD,
    "--class_labels_conditioning": DEEPFLOYD,
}


def bounded(text, kind, low, high=math.inf):
    """Parses a number of some kind, int or float, that is neither below low nor above high."""
    with contextlib.suppress(ValueError):
        if low <= kind(text) <= high:
            return kind(text)
    raise argparse.ArgumentTypeError(f"must be a number of type {kind.__name__} from {low} to {high}, not {text}")


positive_int = functools.partial(bounded, kind=int, low=1)
natural_int = functools.partial(bounded, kind=int, low=0)
non_negative = functools.partial(bounded, kind=float, low=0.0)
fraction = functools.partial(bounded, kind=float, low=0.0, high=1.0)
below_one = functools.partial(bounded, kind=float, low=0.0, high=0.999999)
switch = {"action": argparse.BooleanOptionalAction, "default": False}
NOISE_ALONE = "where the schedule ends in noise alone (--rescale_betas_zero_snr), take --prediction_type v_prediction"
# Flags that say the same in other words.
REPLACES = {
    "validation_steps": "validation_epochs",
    "validation_epochs": "validation_steps",
    "num_train_epochs": "max_train_steps",
}


class HelpFormatter(argparse.HelpFormatter):
    """Adds the default to a help that does not speak of it, unless there is none."""

    def _get_help_string(self, action):
        silent = action.default is None or action.default is False or "default" in action.help
        return action.help if silent or action.nargs == 0 else f"{action.help} (default: %(default)s)"


def read_config(parser, argv):
    """Returns the flags of the YAML file of --config, if there is one, and of the command line, which wins."""
    argv = sys.argv[1:] if argv is None else argv
    parser.formatter_class = HelpFormatter
    first = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    first.add_argument("--config")
    path, flags = first.parse_known_args(argv)[0].config, []
    try:
        config = dict(yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}) if path else {}
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        parser.error(f"--config {path} is not a readable file of 'flag: value' lines: {error}")
    known = parser._option_string_actions
    given = {known[flag].dest for flag in (word.split("=")[0] for word in argv) if flag in known}
    for name in given & REPLACES.keys():  # what the command line says in other words counts no more
        if REPLACES[name] not in given:
            config.pop(REPLACES[name], None)
    for name, value in config.items():
        if value is False and f"--no-{name}" not in known:
            takes_value = f"--{name}" not in known or known[f"--{name}"].nargs != 0
            flags += [f"--{name}=no"] if takes_value else []  # YAML takes a plain no for false
        elif isinstance(value, bool):
            flags += [f"--{name}" if value else f"--no-{name}"]
        elif isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        elif value is not None:
            flags += [f"--{name}={value}"]
    for flag in REFUSED.keys() & {flag.split("=")[0] for flag in flags + argv}:
        parser.error(f"{flag}: {REFUSED[flag]}")
    return flags + argv


def add_prior_flags(parser):
    """Adds the flags of prior preservation."""
    add = parser.add_argument_group("prior preservation").add_argument
    add("--with_prior_preservation", **switch, help="train on pictures of the class too, so that it stays as it was")
    add("--class_data_dir", help="folder of the class pictures; those that it lacks are drawn by the base model")
    add("--class_prompt", help="prompt of the class pictures")
    add("--num_class_images", type=positive_int, default=100, help="class pictures to train on")
    add("--sample_batch_size", type=positive_int, default=4, help="class pictures to draw at once")
    add("--prior_generation_precision", choices=["no", "fp32", "fp16", "bf16"], help="default: fp16, fp32 on a CPU")
    add("--prior_loss_weight", type=non_negative, default=1.0, help="weight of the class pictures' loss")


def add_saving_flags(parser):
    """Adds the flags that every script has of checkpoints and of the Hub."""
    add = parser.add_argument_group("checkpoints and publishing").add_argument
    add("--checkpointing_steps", type=natural_int, default=500, help="optimizer steps between checkpoints; 0: none")
    add("--checkpoints_total_limit", type=positive_int, help="checkpoints to keep, the newest")
    add("--resume_from_checkpoint", help="a checkpoint's path, or 'latest' for the newest whole one of --output_dir")
    add("--push_to_hub", **switch, help="upload the result to the Hub")
    add("--hub_model_id", help="repository to upload to (default: the name of --output_dir)")
    add("--hub_token", help="token for the upload (default: your login)")
    add("--hub_private_repo", **switch, help="create the repository private")


def parse_args(argv=None):
    """Parses and checks the command line; whatever is wrong with it is said here, before anything heavy loads."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--config", help="a YAML file of flags; the command line wins over it")

    add = parser.add_argument_group("model").add_argument
    add("--pretrained_model_name_or_path", required=True, help="base model: diffusers folder or Hub id (or a file)")
    add("--pretrained_vae_model_name_or_path", help="a VAE to use instead of the base model's: a folder or a Hub id")
    add("--single_file_config", help="folder or Hub id with the configs of a base that is a file")
    add("--revision", help="branch, tag or commit of the base model on the Hub")
    add("--variant", help="variant of the base model's weight files, such as fp16")
    add("--cache_dir", help="where downloads from the Hub are kept")

    add = parser.add_argument_group("data").add_argument
    add("--instance_data_dir", help="folder of a subject's pictures, with or without captions")
    add("--instance_prompt", help="prompt of pictures that have no caption of their own")
    add("--caption_column", default="text", help="column of the captions, each a string or a list to draw from")
    add("--max_train_samples", type=positive_int, help="train on so many pictures, drawn by the seed")
    add("--resolution", type=positive_int, help="side of the square pictures in pixels (1024 for SDXL, 512 otherwise)")
    add("--center_crop", **switch, help="crop the middle instead of a random place")
    add("--random_flip", **switch, help="mirror half of the samples")
    filters = ["lanczos", "bicubic", "bilinear", "box", "hamming", "nearest", "nearest_exact"]
    add("--image_interpolation_mode", default="lanczos", choices=filters, help="filter that resizes the pictures")
    add("--proportion_empty_prompts", type=fraction, default=0.0, help="fraction of samples that lose their caption")
    add("--pre_compute_text_embeddings", **switch, help="accepted: a frozen text encoder always runs once a prompt")
    add("--on_bad_image", default="error", choices=["error", "skip"], help="what to do about unusable pictures")
    add("--encoding_cache_dir", help="where checks, latents and embeddings are kept (~/.cache/diffusion-training)")
    add("--no_encoding_cache", **switch, help="keep none of them, and run the frozen models in every step")
    add("--dataloader_num_workers", type=natural_int, default=0, help="processes that load pictures")

    add = parser.add_argument_group("training").add_argument
    add("--output_dir", default="dreambooth-model", help="folder for the pipeline, samples, logs and checkpoints")
    add("--overwrite_output_dir", **switch, help="start anew in a folder that holds a run, deleting what it left")
    add("--train_text_encoder", **switch, help="train the text encoder too")
    add("--seed", type=natural_int, help="seed of every random draw (default: one is drawn and recorded)")
    add("--train_batch_size", type=positive_int, default=4, help="pictures per process and forward pass")
    add("--gradient_accumulation_steps", type=positive_int, default=1, help="forward passes per optimizer step")
    add("--num_train_epochs", type=positive_int, default=1, help="passes over the data, without --max_train_steps")
    add("--max_train_steps", type=positive_int, help="optimizer steps")
    add("--gradient_checkpointing", **switch, help="recompute activations: less memory, slower")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="default: as the launcher is configured")
    add("--allow_tf32", **switch, help="TF32 matrix products on Ampere GPUs and later")
    add("--enable_xformers_memory_efficient_attention", **switch, help="xformers' attention instead of PyTorch's")

    add = parser.add_argument_group("optimizer").add_argument
    add("--learning_rate", type=non_negative, default=5e-6, help="learning rate after warmup")
    add("--scale_lr", **switch, help="multiply the learning rate by the total batch size")
    shapes = ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
    add("--lr_scheduler", default="constant", choices=shapes, help="shape of the learning rate over the run")
    add("--lr_warmup_steps", type=natural_int, default=500, help="optimizer steps of linear warmup")
    add("--lr_num_cycles", type=positive_int, default=1, help="restarts of cosine_with_restarts")
    add("--lr_power", type=non_negative, default=1.0, help="power of polynomial")
    add("--use_8bit_adam", **switch, help="8-bit AdamW of bitsandbytes: a quarter of the optimizer's memory")
    add("--adam_beta1", type=below_one, default=0.9, help="decay of the gradients' mean")
    add("--adam_beta2", type=below_one, default=0.999, help="decay of the gradients' square")
    add("--adam_weight_decay", type=non_negative, default=1e-2, help="decoupled weight decay")
    add("--adam_epsilon", type=non_negative, default=1e-8, help="added to the denominator")
    add("--max_grad_norm", type=non_negative, default=1.0, help="norm to scale larger gradients down to; 0: none")
    add("--set_grads_to_none", **switch, help="accepted: gradients are always freed")

    add = parser.add_argument_group("loss").add_argument
    targets = ["epsilon", "v_prediction", "sample"]
    add("--prediction_type", choices=targets, help="what the UNet predicts (default: as the base model does)")
    add("--rescale_betas_zero_snr", **switch, help="end the noise schedule in noise alone (arXiv:2305.08891)")
    add("--snr_gamma", type=functools.partial(bounded, kind=float, low=1e-6), help="gamma of Min-SNR weights, often 5")
    add("--noise_offset", type=non_negative, default=0.0, help="scale of noise that a channel shares, such as 0.1")
    add("--offset_noise", action="store_const", const=0.1, dest="noise_offset", help="the same as --noise_offset 0.1")

    add = parser.add_argument_group("validation").add_argument
    add("--validation_prompt", help="prompt of the sample grids")
    add("--num_validation_images", type=positive_int, default=4, help="pictures in a sample grid")
    schedulers = ["DPMSolverMultistepScheduler", "DDPMScheduler"]
    add("--validation_scheduler", default=schedulers[0], choices=schedulers, help="sampler of the sample grids")
    add("--validation_samples", type=natural_int, default=0, help="pictures held out to measure the loss on")
    add("--validation_steps", type=positive_int, default=100, help="optimizer steps between validations")

    add = parser.add_argument_group("logging").add_argument
    trackers = "tensorboard wandb comet_ml aim mlflow clearml dvclive swanlab trackio all none".split()
    add("--report_to", default="tensorboard", choices=trackers, help="experiment tracker")
    add("--tracker_project_name", default="dreambooth", help="name of the project in the tracker")
    add("--logging_dir", default="logs", help="folder of metrics.jsonl and the tracker's files, in --output_dir")

    add_prior_flags(parser)
    add_saving_flags(parser)
    args = parser.parse_args(read_config(parser, argv))
    check_args(parser, args)
    return args


def lies_in(path, folder):
    """Tells whether a path is a folder, or lies somewhere in it; neither need be given."""
    return bool(path and folder) and Path(path).resolve().is_relative_to(Path(folder).resolve())


def may_be_model(path):
    """Tells whether a path is a folder or, by its form, a repository of the Hub."""
    return Path(path).is_dir() or (
        re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", path) and not path.endswith(".safetensors")
    )


def base_problems(args):
    """Lists what can be wrong with the flags that say what the base model is: (whether it is so, the sentence)."""
    base, config = args.pretrained_model_name_or_path, args.single_file_config
    vae = args.pretrained_vae_model_name_or_path
    single_file, pickled = base.endswith(".safetensors"), Path(base).suffix in (".ckpt", ".pt", ".pth", ".bin")
    on_hub = args.revision or args.variant or vars(args).get("non_ema_revision")
    flag, nowhere = "--pretrained_model_name_or_path", "is no folder in diffusers format and no Hub id"
    return [
        (pickled, f"{flag} {base} is a pickle, which can run any code as it loads: convert it to .safetensors"),
        (single_file and not Path(base).is_file(), f"{flag} {base} is not a file"),
        (not single_file and not may_be_model(base), f"{flag} {base} {nowhere}"),
        (single_file and on_hub, f"--revision, --non_ema_revision, --variant are for the Hub, and {base} is a file"),
        (config and not single_file, f"--single_file_config needs a .safetensors file, not {base}"),
        (config and not may_be_model(config), f"--single_file_config {config} {nowhere}"),
        (vae and not may_be_model(vae), f"--pretrained_vae_model_name_or_path {vae} {nowhere}"),
        (args.rescale_betas_zero_snr and args.prediction_type == "epsilon", NOISE_ALONE),
    ]


def check_args(parser, args):
    """Refuses what no flag's type can know to be wrong."""
    resume, prior = args.resume_from_checkpoint, args.with_prior_preservation
    resumable = resume in (None, "latest") or Path(resume).is_dir() or Path(args.output_dir, resume).is_dir()
    data, classes = args.instance_data_dir, args.class_data_dir
    nested = lies_in(data, classes) or lies_in(classes, data)
    precomputed = args.pre_compute_text_embeddings and args.train_text_encoder
    of_class = "--class_data_dir, a folder that may be empty, and --class_prompt"
    problems = base_problems(args) + [
        (not args.instance_data_dir, "--instance_data_dir is needed: a folder of a subject's pictures"),
        (not args.instance_prompt, "--instance_prompt is needed, such as 'a photo of sks dog'"),
        (data and not Path(data).is_dir(), f"--instance_data_dir {data} is not a folder"),
        (lies_in(args.output_dir, data), f"--output_dir lies in {data}: its samples would be trained on"),
        (prior and not (args.class_data_dir and args.class_prompt), f"--with_prior_preservation needs {of_class}"),
        (not prior and (args.class_data_dir or args.class_prompt), f"{of_class} need --with_prior_preservation"),
        (nested, "neither of --class_data_dir and --instance_data_dir may lie in the other"),
        (lies_in(args.output_dir, classes), "--output_dir lies in --class_data_dir: take one beside it"),
        (classes and Path(classes).is_file(), f"--class_data_dir {classes} is a file"),
        (precomputed, "give --train_text_encoder or --pre_compute_text_embeddings, not both"),
        (args.resolution and args.resolution % 8, f"--resolution {args.resolution} is not a multiple of 8"),
        (args.overwrite_output_dir and resume, "give --overwrite_output_dir or --resume_from_checkpoint, not both"),
        (not resumable, f"--resume_from_checkpoint {resume} is no folder, neither here nor in {args.output_dir}"),
    ]
    for problem, message in problems:
        if problem:
            parser.error(message)


if __name__ == "__main__":
    args = parse_args()  # before the slow imports, so that --help and a wrong flag answer at once

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else it asks for torchvision, which nothing here needs
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import bitsandbytes
import diffusers
import numpy as np
import psutil
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator, DistributedType
from accelerate.utils import DistributedDataParallelKwargs, gather_object, parse_flag_from_env, send_to_device
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UNet2DConditionModel,
)
from diffusers.optimization import get_scheduler
from diffusers.training_utils import compute_snr
from diffusers.utils import make_image_grid
from huggingface_hub import ModelCardData, create_repo, upload_folder
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from tqdm.auto import tqdm
from tqdm.contrib.concurrent import thread_map


PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
VALIDATION_STEPS = 25  # of the sampler
SMALL_SET = 10_000  # latents, of 131 kB at 512 x 512, that are kept even if this run meets each just once
VALIDATION_DRAWS = 4  # noises and timesteps for each held-out picture
# What is uploaded: no checkpoints, no logs, no arguments with their local paths.
PUBLISHED = "README.md model_index.json samples/* unet/* vae/* scheduler/*".split()
PUBLISHED += "text_encoder/* text_encoder_2/* tokenizer/* tokenizer_2/*".split()
PADDED = {"padding": "max_length", "truncation": True}  # UNets attend to the padding as well
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
# The families, by their pipelines, and what these are told beside where the files are.
PIPELINES = {
    "StableDiffusionPipeline": {"safety_checker": None, "requires_safety_checker": False},
    "StableDiffusionXLPipeline": {"add_watermarker": False},
}
STOP_SIGNALS = {"SIGTERM", "SIGINT", "SIGUSR1"} & {*dir(signal)}
CARD = {"pipeline_tag": "text-to-image", "tags": ["stable-diffusion", "dreambooth"]}
UNSAVED = {"config", "hub_token", "overwrite_output_dir", "resume_from_checkpoint"}


# Data


def digest(*parts):
    """Names what the parts say in 32 hexadecimal digits; bytes and arrays count as they are, the rest as text."""
    blake = hashlib.blake2b(digest_size=16)
    for part in parts:
        blake.update(part if isinstance(part, (bytes, np.ndarray)) else repr(part).encode())
        blake.update(b"\0")
    return blake.hexdigest()


def read_metadata(file, caption_column):
    """Returns the captions of a metadata.jsonl or metadata.csv by picture, None where a row has none."""
    try:
        with open(file, newline="", encoding="utf-8-sig") as lines:
            rows = list(csv.DictReader(lines) if file.suffix == ".csv" else map(json.loads, filter(str.strip, lines)))
        columns = list(dict.fromkeys(column for row in rows for column in row))
        for column in ("file_name", caption_column):
            if column not in columns:
                raise SystemExit(f"{file} has no column {column!r}, but {columns}; see --caption_column.")
        return {file.parent / row["file_name"]: row.get(caption_column) for row in rows}
    except (ValueError, TypeError, LookupError, AttributeError, csv.Error) as error:
        raise SystemExit(f"{file} cannot be read: {error}")


def list_files(folder):
    """Lists the files under a folder, sorted; hidden ones are left out, links to folders are followed."""
    return sorted(Path(file) for file in glob.glob(f"{glob.escape(str(folder))}/**", recursive=True))


def read_folder(files, caption_column):
    """Lists the pictures among some files with the captions that metadata files or .txt files beside them give."""
    captions = {}
    for metadata in files:
        if metadata.name in ("metadata.jsonl", "metadata.csv"):
            captions |= read_metadata(metadata, caption_column)
    for file in files:
        beside = file.with_suffix(".txt")
        if file.suffix.lower() in PICTURES and captions.setdefault(file) is None and beside.is_file():
            try:
                captions[file] = beside.read_text(encoding="utf-8-sig")
            except ValueError as error:
                raise SystemExit(f"{beside} is not UTF-8 text: {error}")
    return [{"name": str(file), "rows": None, "captions": captions[file]} for file in sorted(captions)]


def caption_list(captions):
    """Returns what there is to draw from: the captions of a string, of a list, or of nothing, without empty ones."""
    captions = captions if isinstance(captions, list) else [captions]
    return [text.strip() for text in captions if isinstance(text, str) and text.strip()]


def read_records(args):
    """Lists the pictures of --instance_data_dir with their captions, or with --instance_prompt where there is none."""
    records = read_folder(list_files(args.instance_data_dir), args.caption_column)
    if not records:
        raise SystemExit(f"{args.instance_data_dir} holds no pictures {sorted(PICTURES)}.")
    return [{**record, "captions": caption_list(record["captions"]) or [args.instance_prompt]} for record in records]


def class_pictures(args):
    """Lists the pictures of --class_data_dir, --num_class_images at most."""
    files = [file for file in list_files(args.class_data_dir) if file.suffix.lower() in PICTURES]
    records = [{"name": str(file), "rows": None, "captions": [args.class_prompt]} for file in files]
    return records[: args.num_class_images]


def missing_class_pictures(args):
    """Names the class pictures that are still to be drawn."""
    Path(args.class_data_dir).mkdir(parents=True, exist_ok=True)
    there = {Path(record["name"]).name for record in class_pictures(args)}
    names = [f"class-{i:05d}.png" for i in range(args.num_class_images)]
    return [name for name in names if name not in there][: args.num_class_images - len(there)]


def draw_class_pictures(args, pipeline, names, seed):
    """Draws some class pictures, each from a seed of its own, and writes them as PNG."""
    generators = [torch.Generator().manual_seed(int(digest(seed, name)[:8], 16)) for name in names]
    images = pipeline([args.class_prompt] * len(names), generator=generators).images
    for name, image in zip(names, images):
        png = io.BytesIO()
        image.save(png, "png")
        replace_file(Path(args.class_data_dir, name), png.getvalue())


def fill_class_pictures(accelerator, args, seed, stop):
    """Has the base model draw the class pictures that --class_data_dir lacks; ranks take turns."""
    folder, batch_size = args.class_data_dir, args.sample_batch_size
    names = agree(folder, accelerator.is_main_process, missing_class_pictures, args)
    if not names:
        return
    usual = "fp32" if accelerator.device.type == "cpu" else "fp16"
    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16}
    # The base draws as it was trained, whatever it is to learn.
    as_trained = {"prediction_type": None, "rescale_betas_zero_snr": False}
    pipeline = load_pipeline(argparse.Namespace(**vars(args) | as_trained))
    pipeline.to(accelerator.device, dtypes.get(args.prior_generation_precision or usual, torch.float32))
    pipeline.set_progress_bar_config(disable=True)
    turns = range(0, len(names), batch_size * accelerator.num_processes)
    for first in tqdm(turns, "drawing class pictures", disable=not accelerator.is_main_process):
        mine = names[first + accelerator.process_index * batch_size :][:batch_size]
        agree(folder, bool(mine), draw_class_pictures, args, pipeline, mine, seed)
        stop.exit_if_asked()
    del pipeline
    torch.cuda.empty_cache()


def read_bytes(record):
    """Returns a record's encoded picture."""
    if record["rows"] is None:
        return Path(record["name"]).read_bytes()
    (image,) = record["rows"][record["row"]].values()
    return image["bytes"] or Path(image["path"]).read_bytes()


def open_image(data):
    """Decodes a picture upright, transparency on white, to RGB, or 16-bit or float grey to float32 in [0, 255]."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if image.mode == "F" or image.mode.startswith("I"):
        unit = 1 / 255 if image.mode == "F" else 257
        return Image.fromarray((np.asarray(image, dtype=np.float32) / unit).clip(0, 255))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def check_record(record, stop):
    """Returns the (digest, width, height) of a picture, or in words why it cannot be used."""
    if stop.signum:
        return "is unchecked"
    if not record["captions"]:
        return "has no caption"
    try:
        data = read_bytes(record)
        return (digest(data), *open_image(data).size) if data else "is empty (0 bytes)"
    except FileNotFoundError:
        return "is named in the metadata but is not there"
    except UnidentifiedImageError:
        return "is not a picture"
    except Exception as error:  # Pillow raises nearly anything over a broken file
        return f"cannot be decoded: {error}"


def stamp(record):
    """Names a picture's state without reading it: by its file's size and time, or its data set's fingerprint."""
    file = Path(record["name"])
    if record["rows"] is not None:
        state = (record["rows"]._fingerprint, record["row"])
    else:
        state = (str(file.absolute()), *((file.stat().st_size, file.stat().st_mtime_ns) if file.is_file() else ()))
    return digest(*state, bool(record["captions"]))


def read_manifest(file):
    """Returns what is known of checked pictures, by their stamps."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):  # there is none yet, or it is torn
        return {}


def check_records(accelerator, args, records, stop):
    """Decodes every picture once, lists all bad ones, and returns the good ones with their "digest" and "size" (w, h).

    A manifest of names, sizes and modification times in the cache folder spares unchanged files the next time.
    """
    rows, folder = records[0]["rows"], str(Path(records[0]["name"]).absolute().parent)
    manifest = cache_folder(args) / "checked" / digest(folder if rows is None else rows._fingerprint)
    stamps = gather_object([[stamp(record) for record in records]])[0]  # rank 0's: its copies may have other times
    known = agree(manifest.parent, accelerator.is_main_process, read_manifest, manifest)
    new = [i for i in range(len(records)) if stamps[i] not in known]
    mine = new[accelerator.process_index :: accelerator.num_processes]
    quiet = not mine or not accelerator.is_main_process
    found = thread_map(check_record, [records[i] for i in mine], [stop] * len(mine), desc="checking", disable=quiet)
    found = dict(gather_object(list(zip(mine, found))))
    bad = {i: found[i] for i in sorted(found) if isinstance(found[i], str)}
    known.update({stamps[i]: result for i, result in found.items() if i not in bad})
    if not args.no_encoding_cache:
        text = json.dumps({key: known[key] for key in stamps if key in known})
        agree(manifest.parent, accelerator.is_main_process, replace_file, manifest, text.encode())
    stop.exit_if_asked()
    if bad:
        listing = "".join(f"\n  {records[i]['name']} {reason}" for i, reason in bad.items())
        listing = f"{len(bad)} of {len(records)} pictures cannot be used:{listing}"
        if args.on_bad_image == "error" or len(bad) == len(records):
            raise SystemExit(f"{listing}\nMend or remove them, or leave them out by --on_bad_image skip.")
        accelerator.print(listing)
    good = [i for i in range(len(records)) if i not in bad]
    return [{**records[i], "digest": known[stamps[i]][0], "size": known[stamps[i]][1:]} for i in good]


def split_records(args, records, seed):
    """Returns the pictures to train on, --max_train_samples at most, and --validation_samples held-out ones."""
    chosen = sorted(permutation(seed, 0, len(records))[: args.max_train_samples])
    if args.validation_samples >= len(chosen):
        raise SystemExit(f"--validation_samples {args.validation_samples} leaves none of {len(chosen)} to train on.")
    held_out = {chosen[i * len(chosen) // args.validation_samples] for i in range(args.validation_samples)}
    return [records[i] for i in chosen if i not in held_out], [records[i] for i in sorted(held_out)]


@functools.lru_cache(maxsize=2)
def permutation(seed, epoch, size):
    """The order of one pass over the data."""
    # The fourth word keeps this apart from the samples' (seed, epoch, index).
    return np.random.default_rng((seed, epoch, size, 1)).permutation(size)


def step_keys(step, total_batch_size, size, seed):
    """The (epoch, index) keys of an optimizer step, cut from one endless stream of shuffled passes over the data."""
    places = range(step * total_batch_size, (step + 1) * total_batch_size)
    return [(place // size, int(permutation(seed, place // size, size)[place % size])) for place in places]


def paired_keys(step, total_batch_size, sizes, seed):
    """The keys of a step: instance and, if there are any, class pictures by turns; sizes counts both kinds."""
    keys = step_keys(step, total_batch_size, sizes[0], seed)
    if not sizes[1]:
        return keys
    class_keys = [(epoch, sizes[0] + i) for epoch, i in step_keys(step, total_batch_size, sizes[1], seed)]
    return [key for pair in zip(keys, class_keys) for key in pair]


class Samples(torch.utils.data.Dataset):
    """Samples by key (epoch, index), each a function of seed, key and picture, whatever the batch, worker or flags.

    A sample holds float32 arrays of the latents' shape (4, h, w): "noise", "perturbation" and "posterior_noise";
    "offset_noise" (4, 1, 1); "timesteps"; "caption" and its cached embeddings; the latents' cached "mean" and "std",
    or else "pixel_values" (3, resolution, resolution) in [-1, 1]; and for SDXL "time_ids" (6,), in pixels: the file's
    height and width, the crop's top and left, the sample's height and width.
    """

    def __init__(self, args, records, seed, latent_shape, num_train_timesteps):
        self.args, self.records, self.seed = args, records, seed
        self.latent_shape, self.num_train_timesteps = latent_shape, num_train_timesteps
        self.proportion_empty = vars(args).get("proportion_empty_prompts", 0)  # what has no captions has no such flag
        self.cached = {}  # files of variants' latents and captions' embeddings, filled by fill_cache

    def __len__(self):
        return len(self.records)

    def place(self, key):
        """Draws crop, flip and caption; returns the generator for the draws that follow, the variant, the caption."""
        epoch, index = key
        rng = np.random.default_rng((self.seed, epoch, index))
        # Always all draws, in one order, so that a flag that is off shifts nothing.
        left, top, flip, choice, drop = rng.random(5)
        side, record = self.args.resolution, self.records[index]
        width, height = (max(side, round(length * side / min(record["size"]))) for length in record["size"])
        if self.args.center_crop:
            left = top = 0.5
        corner = (int(left * (width - side + 1)), int(top * (height - side + 1)))
        variant = (index, (width, height), corner, bool(self.args.random_flip and flip < 0.5))
        caption = record["captions"][int(choice * len(record["captions"]))]
        return rng, variant, "" if drop < self.proportion_empty else caption

    def pixels(self, variant):
        """Resizes, crops and flips a picture to float32 in [-1, 1], shape (3, resolution, resolution)."""
        index, size, (left, top), flip = variant
        resample = Image.Resampling[self.args.image_interpolation_mode.removesuffix("_exact").upper()]
        image = open_image(read_bytes(self.records[index])).resize(size, resample)
        image = image.crop((left, top, left + self.args.resolution, top + self.args.resolution))
        image = np.array(ImageOps.mirror(image) if flip else image, dtype=np.float32).clip(0, 255)
        image = image if image.ndim == 3 else np.stack([image] * 3, axis=-1)
        return torch.from_numpy(image).permute(2, 0, 1).contiguous() / 127.5 - 1

    def __getitem__(self, key):
        rng, variant, caption = self.place(key)
        index, (width, _), (left, top), flip = variant
        side = self.args.resolution
        # Of the picture as it was mirrored, since the crop shows its other side then (arXiv:2307.01952, section 2.2).
        corner = (top, width - side - left if flip else left)
        time_ids = np.array([*self.records[index]["size"][::-1], *corner, side, side], dtype=np.float32)
        example = {"caption": caption, "time_ids": time_ids}
        for name in ("posterior_noise", "noise", "perturbation"):
            example[name] = rng.standard_normal(self.latent_shape, dtype=np.float32)
        example["offset_noise"] = rng.standard_normal((self.latent_shape[0], 1, 1), dtype=np.float32)
        example["timesteps"] = rng.integers(self.num_train_timesteps)
        if variant not in self.cached:
            example["pixel_values"] = self.pixels(variant)
        for file in {variant, caption} & self.cached.keys():
            example.update(load_file(self.cached[file]))
        return example


# Models and what the frozen ones make of the data


def weights_digest(model):
    """Names a model by its layers and the values of its weights."""
    return digest(repr(model), *(tensor.contiguous().numpy() for tensor in model.state_dict().values()))


def open_pipeline(args, variant):
    """Opens the base model in float32 as the pipeline that its model_index.json, or a single file's names, ask for."""
    base, files = args.pretrained_model_name_or_path, {"cache_dir": args.cache_dir, "dtype": torch.float32}
    if base.endswith(".safetensors"):
        with safe_open(base, "pt") as file:
            keys = {*file.keys()}
        xl = any(key.startswith("conditioner.") for key in keys)
        name = "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline"
    else:
        name = DiffusionPipeline.load_config(base, revision=args.revision, cache_dir=args.cache_dir)["_class_name"]
        if name not in PIPELINES:
            raise SystemExit(f"{base} is a {name}, and this script trains {' and '.join(PIPELINES)}.")
    parts = PIPELINES[name] | {"feature_extractor": None}
    if vae := args.pretrained_vae_model_name_or_path:
        try:
            parts["vae"] = AutoencoderKL.from_pretrained(vae, use_safetensors=True, **files)
        except (OSError, ValueError) as error:
            raise SystemExit(f"--pretrained_vae_model_name_or_path {vae} cannot be loaded: {error}")
    if not base.endswith(".safetensors"):
        files |= {"revision": args.revision, "variant": variant, "use_safetensors": True}
        return getattr(diffusers, name).from_pretrained(base, **files, **parts)
    pipeline = getattr(diffusers, name).from_single_file(base, config=args.single_file_config, **files, **parts)
    encoders = [model for part, model in pipeline.components.items() if part in TEXT_ENCODERS and model]
    if any(weights.is_meta for model in encoders for weights in model.parameters()):
        raise ValueError("it lacks weights of a text encoder")
    if "v_pred" in keys:  # these two are all that a single file can say of its scheduler
        pipeline.scheduler.register_to_config(prediction_type="v_prediction")
    if "ztsnr" in keys:
        pipeline.scheduler.register_to_config(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    return pipeline


def set_schedule(args, pipeline):
    """Has a pipeline's scheduler sample as the UNet will be trained: by --prediction_type, and from noise alone."""
    scheduler, config = type(pipeline.scheduler), dict(pipeline.scheduler.config)
    config["prediction_type"] = args.prediction_type or config["prediction_type"]
    if args.rescale_betas_zero_snr:
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if config.get("rescale_betas_zero_snr"):
        if config["prediction_type"] == "epsilon":
            raise SystemExit(f"{args.pretrained_model_name_or_path}: {NOISE_ALONE}.")
        # Not all, such as the PNDM of SD 1.x, can sample from noise alone.
        able = "rescale_betas_zero_snr" in inspect.signature(scheduler).parameters
        scheduler = scheduler if able else EulerDiscreteScheduler
    pipeline.scheduler = scheduler.from_config(config)


def load_pipeline(args):
    """Loads the base model's pipeline, from files in half precision if it has no others.

    Sets args.resolution to the usual one of its family unless it is given.
    """
    base, error = args.pretrained_model_name_or_path, None
    single_file = base.endswith(".safetensors")
    for variant in [args.variant] if args.variant or single_file else [None, "fp16"]:
        try:
            pipeline = open_pipeline(args, variant)
            break
        except Exception as caught:  # diffusers raises nearly anything over files that it cannot use
            error = error or caught
    else:
        missing = single_file and not args.single_file_config
        hint = " Without a network, and for SD 2.x, a single file needs --single_file_config." if missing else ""
        raise SystemExit(f"{base} cannot be loaded as a Stable Diffusion model of safetensors files: {error}{hint}")
    unet = pipeline.unet.config
    foreign = {unet.in_channels, pipeline.vae.config.latent_channels} != {4} or pipeline.text_encoder is None
    foreign |= unet.addition_embed_type not in (None, "text_time") or "EDM" in type(pipeline.scheduler).__name__
    if foreign:
        raise SystemExit(
            f"{base} is no text-to-image model of Stable Diffusion 1.x, 2.x or XL; this script trains those."
        )
    set_schedule(args, pipeline)
    for part in (pipeline, pipeline.unet, pipeline.vae):  # their files would name a folder of this machine
        part.register_to_config(_name_or_path=Path(base).resolve().name if Path(base).exists() else base)
    args.resolution = args.resolution or (1024 if unet.addition_embed_type else 512)
    return pipeline


def in_float32(method, tensor, **settings):
    """Calls a method of the VAE outside of autocast."""
    with torch.autocast(tensor.device.type, enabled=False):
        return method(tensor.float(), **settings)


def name_parts(pipeline):
    """Returns a pipeline's models by the names that training gives them, all of them frozen so far."""
    models = SimpleNamespace(pipeline=pipeline, vae=pipeline.vae, unet=pipeline.unet, ema_unet=None)
    names, parts = [name for name in TEXT_ENCODERS if name in pipeline.components], pipeline.components
    models.text_encoders = [parts[name] for name in names]
    models.tokenizers = [parts[name.replace("text_encoder", "tokenizer")] for name in names]
    for model in (models.vae, models.unet, *models.text_encoders):
        model.requires_grad_(False)
    upcast = len(models.text_encoders) > 1 and models.vae.config.force_upcast  # SDXL's overflows in half precision
    if upcast:
        for name in ("encode", "decode"):
            setattr(models.vae, name, functools.partial(in_float32, getattr(models.vae, name)))
    zeros = pipeline.config.get("force_zeros_for_empty_prompt")
    models.vae_digest = digest(upcast, weights_digest(models.vae))
    models.text_digest = digest(zeros, *map(weights_digest, models.text_encoders))
    models.noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    models.idle = []  # frozen models that no step needs, kept in CPU memory
    return models


def load_models(args):
    """Loads the base model: its UNet is trained, and its text encoder if --train_text_encoder asks for it."""
    models = name_parts(load_pipeline(args))
    models.trained = [models.unet, *(models.text_encoders if args.train_text_encoder else [])]
    models.params_to_optimize = [parameter for model in models.trained for parameter in model.parameters()]
    for parameter in models.params_to_optimize:
        parameter.requires_grad_(True)
    return models


def encode_pixels(vae, pixel_values):
    """Returns "mean" and "std" of the latents' posterior, each (bsz, 4, h, w) in float32."""
    # One picture a forward pass: a batch-mate changes the last bits.
    posteriors = [vae.encode(pixels[None]).latent_dist for pixels in pixel_values]
    return {name: torch.cat([getattr(p, name) for p in posteriors]).float() for name in ("mean", "std")}


def encode_prompts(models, prompts):
    """Returns the conditioning of some prompts, as a dict of float32 tensors.

    "encoder_hidden_states" (bsz, tokens, dim), and for SDXL the pooled "text_embeds" (bsz, dim).
    """
    hidden_states, xl = [], len(models.text_encoders) > 1
    for tokenizer, text_encoder in zip(models.tokenizers, models.text_encoders):
        ids = tokenizer(prompts, return_tensors="pt", **PADDED).input_ids
        # One prompt a forward pass, as with pictures, unless gradients have to flow back through a single one.
        rows = ids.to(text_encoder.device).split(len(ids) if text_encoder.training else 1)
        outputs = [text_encoder(row, output_hidden_states=xl) for row in rows]
        # SDXL takes both encoders' last layer but one (arXiv:2307.01952, section 2.1).
        hidden_states.append(torch.cat([out.hidden_states[-2] if xl else out[0] for out in outputs]).float())
    conditioning = {"encoder_hidden_states": torch.cat(hidden_states, dim=-1)}
    if xl:  # the second one's
        conditioning["text_embeds"] = torch.cat([out.text_embeds for out in outputs]).float()
    zeros = models.pipeline.config.get("force_zeros_for_empty_prompt")  # SDXL's stand-in for a prompt not given
    if zeros and not all(prompts):
        for tensor in conditioning.values():
            tensor[[not prompt for prompt in prompts]] = 0
    return conditioning


def cache_folder(args):
    """Where this machine keeps checked pictures, latents and embeddings between runs."""
    home = os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")
    return Path(args.encoding_cache_dir or Path(home, "diffusion-training"))


def replace_file(path, data):
    """Writes bytes beside the path and renames, so that the file is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_bytes(data)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def fill_entry(models, file, samples, what):
    """Computes the cache entry of a variant, or of a caption, unless it is there and whole."""
    try:
        load_file(file)
    except (OSError, SafetensorError):  # there is none yet, or it is torn
        if isinstance(what, str):
            tensors = encode_prompts(models, [what])
        else:
            tensors = encode_pixels(models.vae, samples.pixels(what)[None].to(models.vae.device))
        replace_file(file, save({name: tensor[0].cpu().contiguous() for name, tensor in tensors.items()}))


@torch.no_grad()
def fill_cache(accelerator, args, models, visits, stop):
    """Runs the frozen encoders once for each input that this run will meet and that no cache entry holds yet.

    visits: pairs of Samples and the keys that the run will take from them; ranks take turns, one input each.
    """
    frozen = [model for model in (*models.text_encoders, models.vae) if model not in models.trained]
    for model in frozen:
        model.to(accelerator.device, memory_format=torch.channels_last)
    if args.no_encoding_cache:
        accelerator.print("cache      off")
        return
    # The name of an entry says all that its bits depend on.
    device = accelerator.device.type
    setting = [accelerator.mixed_precision, device, torch.get_num_threads() if device == "cpu" else args.allow_tf32]
    setting += [version(library) for library in ("torch", "diffusers", "transformers", "Pillow")]
    prompts_setting = (*setting, models.text_digest)
    latents_setting = (*setting, models.vae_digest, args.resolution, args.image_interpolation_mode)
    models.idle = frozen
    jobs = {}
    for samples, keys in visits:
        plan = tqdm(keys, "planning", delay=5, disable=not accelerator.is_main_process)
        met = Counter(samples.place(key)[1:] for key in plan)
        variants = {variant for variant, _ in met}
        # An entry that is met less than twice costs more than it spares, unless the next run will meet it again.
        again = args.center_crop and len(variants) <= SMALL_SET
        if met.total() < 2 * len(variants) and not again:
            models.idle = [model for model in frozen if model is not models.vae]
            variants = set()
        for _, caption in met if models.text_encoders[0] in frozen else ():
            ids = [tokenizer(caption, **PADDED).input_ids for tokenizer in models.tokenizers]
            name = digest(*prompts_setting, ids)
            samples.cached[caption] = cache_folder(args) / "prompts" / name
        for variant in variants:
            name = digest(*latents_setting, samples.records[variant[0]]["digest"], *variant[1:])
            samples.cached[variant] = cache_folder(args) / "latents" / name
        jobs.update({file: (file, samples, what) for what, file in samples.cached.items()})
    jobs = [jobs[file] for file in sorted(jobs)]
    # Machines need not share a disk, so each fills its own.
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    with accelerator.autocast():
        for first in tqdm(range(0, len(jobs), ranks_here), "caching", disable=not accelerator.is_main_process):
            mine = first + accelerator.local_process_index
            job = jobs[mine] if mine < len(jobs) else ()
            agree(cache_folder(args), bool(job), fill_entry, models, *job)
            stop.exit_if_asked()
    size = sum(file.stat().st_size for file, *_ in jobs) / 2**30
    why = "" if models.vae in models.idle else "; latents are not cached, as the run meets most crops just once"
    accelerator.print(f"cache      {size:.3f} GiB in {cache_folder(args)}{why}")
    for model in models.idle:
        model.to("cpu")
    torch.cuda.empty_cache()


def encode_batch(models, batch):
    """Returns a batch's latents (bsz, 4, h, w), embeddings (bsz, tokens, dim) and, for SDXL, added_cond_kwargs."""
    if "mean" not in batch:
        batch = batch | encode_pixels(models.vae, batch["pixel_values"])
    if "encoder_hidden_states" not in batch:
        batch = batch | encode_prompts(models, batch["caption"])
    # Every step draws anew from the posterior, also where its mean and std are cached.
    latents = (batch["mean"] + batch["std"] * batch["posterior_noise"]) * models.vae.config.scaling_factor
    return latents, batch["encoder_hidden_states"], {name: batch.get(name) for name in ("text_embeds", "time_ids")}


# Objective


def snr_weights(noise_scheduler, timesteps, snr_gamma):
    """Min-SNR weights (bsz,) of the samples' losses for what the UNet predicts: arXiv:2303.09556, section 3.4."""
    if snr_gamma is None:
        return torch.ones_like(timesteps, dtype=torch.float32)
    snr = compute_snr(noise_scheduler, timesteps)
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[noise_scheduler.config.prediction_type]
    return snr.clamp(max=snr_gamma) / divisor


def compute_loss(models, batch, args):
    """Returns the "loss" of a batch, and with prior preservation the "instance_loss" and "prior_loss" it adds up."""
    latents, encoder_hidden_states, added_cond_kwargs = encode_batch(models, batch)
    timesteps, noise_scheduler = batch["timesteps"], models.noise_scheduler
    noise = batch["noise"] + args.noise_offset * batch["offset_noise"]
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    velocity = noise_scheduler.get_velocity(latents, noise, timesteps)
    targets = {"epsilon": noise, "v_prediction": velocity, "sample": latents}
    target = targets[noise_scheduler.config.prediction_type]
    unet = functools.partial(models.unet, added_cond_kwargs=added_cond_kwargs)
    model_pred = unet(noisy_latents, timesteps, encoder_hidden_states).sample
    loss = F.mse_loss(model_pred.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))
    loss = loss * snr_weights(noise_scheduler, timesteps, args.snr_gamma)
    if not args.with_prior_preservation or len(loss) == 1:  # a held-out picture comes alone, pairs never
        return {"loss": loss.mean()}
    instance_loss, prior_loss = loss[0::2].mean(), loss[1::2].mean()  # by turns, as paired_keys has them
    total = instance_loss + args.prior_loss_weight * prior_loss  # arXiv:2208.12242, eq. 2
    return {"loss": total, "instance_loss": instance_loss, "prior_loss": prior_loss}


# Validation


def picture_prompts(args):
    """Returns the prompts of the validation pictures, one each."""
    return [args.validation_prompt] * args.num_validation_images if args.validation_prompt else []


def sample_picture(args, models, prompt, generator):
    """Draws a validation picture."""
    scheduler = {"DDPMScheduler": DDPMScheduler}.get(args.validation_scheduler, DPMSolverMultistepScheduler)
    pipeline = copy.copy(models.pipeline)  # whose own scheduler is saved
    pipeline.scheduler = scheduler.from_config(models.pipeline.scheduler.config)
    settings = {"height": args.resolution, "width": args.resolution, "num_inference_steps": VALIDATION_STEPS}
    return pipeline(prompt, generator=generator, **settings).images[0]


def weights_to_save(models):
    """The weights are saved as they are: such short runs take no average of them."""
    return contextlib.nullcontext()


def after_step(accelerator, args, models, state):
    """Nothing follows an optimizer step, as there is no average of the weights."""


def validation_keys(held_out):
    """The keys under which the held-out pictures are measured: the same noises and timesteps every time."""
    return [(draw, index) for draw in range(VALIDATION_DRAWS) for index in range(len(held_out))]


@torch.no_grad()
def log_validation(accelerator, args, models, held_out, state, stop):
    """Logs the held-out loss and a row of pictures; ranks take turns at both."""
    for model in (*models.idle, *models.trained):
        model.to(accelerator.device).eval()
    models.pipeline.set_progress_bar_config(disable=True)
    turns = slice(accelerator.process_index, None, accelerator.num_processes)
    prompts = list(enumerate(picture_prompts(args)))
    losses, images = [], []
    with weights_to_save(models), accelerator.autocast():
        for key in validation_keys(held_out)[turns]:
            if stop.signum:
                break
            batch = send_to_device(torch.utils.data.default_collate([held_out[key]]), accelerator.device)
            losses.append(compute_loss(models, batch, args)["loss"].item())
        for i, prompt in tqdm(prompts[turns], "sampling", leave=False, disable=not accelerator.is_main_process):
            if stop.signum:
                break
            images.append((i, sample_picture(args, models, prompt, torch.Generator().manual_seed(i))))
    for model in models.trained:
        model.train()
    for model in models.idle:
        model.to("cpu")
    losses = gather_object(losses)
    if losses and len(losses) == len(validation_keys(held_out)):
        log_row(accelerator, args, {"step": state.global_step, "validation_loss": math.fsum(losses) / len(losses)})
    images = [image for _, image in sorted(gather_object(images), key=lambda pair: pair[0])]
    if accelerator.is_main_process and images and len(images) == len(prompts):
        grid = Path(args.output_dir, "samples", f"step-{state.global_step:06d}.png")
        make_image_grid(images, 1, len(images)).save(grid)
        for tracker in accelerator.trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"validation": np.stack(images)}, step=state.global_step, **layout)


def log_row(accelerator, args, row):
    """Appends a row of numbers to metrics.jsonl and sends it to the trackers."""
    if accelerator.is_main_process:
        with open(Path(args.output_dir, args.logging_dir, "metrics.jsonl"), "a") as metrics:
            metrics.write(json.dumps(row) + "\n")
    accelerator.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])


def log_steps(accelerator, args, samples, progress_bar, unread, keep):
    """Logs finished steps until only keep are unread; returns whether any rank was asked to stop.

    A loss that is not finite ends the run.
    """
    asked_to_stop = False
    while len(unread) > keep:
        row, keys, names, numbers = unread.pop(0)
        *losses, row["grad_norm"], skipped, asked = numbers.tolist()  # waits for the device
        row.update(zip(names, losses))
        if not skipped and not math.isfinite(row["loss"] + row["grad_norm"]):
            names = "\n  ".join(sorted({samples.records[index]["name"] for _, index in keys}))
            raise SystemExit(
                f"Step {row['step']} has loss {row['loss']} and gradient norm {row['grad_norm']}, so the run "
                f"stops; earlier checkpoints are good. Lower the learning rate, or look at its pictures:\n  {names}"
            )
        log_row(accelerator, args, row)
        progress_bar.update()
        progress_bar.set_postfix_str(f"loss {row['loss']:.4f}, {row['images_per_second']:.1f} images/s")
        asked_to_stop |= asked > 0
    return asked_to_stop


# Checkpoints and stopping


class StopFlag:
    """Remembers the first signal that asks the run to stop; a second SIGINT stops at once."""

    def __init__(self):
        self.signum = 0
        for name in STOP_SIGNALS:
            signal.signal(getattr(signal, name), self.set)
        # accelerate's launcher forwards nothing to a lone process, so a parent that vanishes counts as SIGTERM.
        if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ and "RANK" not in os.environ:
            PR_SET_PDEATHSIG = 1
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    def set(self, signum, frame):
        if signum == self.signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = self.signum or signum

    def exit_if_asked(self):
        """Ends every rank with 128 + signal if one was asked to stop; all ranks call this together."""
        if signum := max(gather_object([self.signum])):
            raise SystemExit(128 + signum)


def ignore_signals(worker):
    """Leaves signals to the main process: a loader worker that they killed would take the run with it."""
    for name in STOP_SIGNALS:
        signal.signal(getattr(signal, name), signal.SIG_IGN)


def agree(folder, here, function, *arguments):
    """Calls a function that may write to a folder where here is true; returns rank 0's result on every rank.

    If it fails on one rank, all end, and hear of it here before any waits in a barrier for the one that failed.
    """
    result, problem = None, None
    try:
        result = function(*arguments) if here else None
    except SystemExit as refusal:
        problem = str(refusal)
    except torch.cuda.OutOfMemoryError as error:
        problem = f"{function.__name__}: {error}"
    except Exception as error:
        if not isinstance(error, (OSError, RuntimeError, SafetensorError)):  # all of which are said of a full disk
            traceback.print_exc()
        existing = next(path for path in Path(folder, "_").absolute().parents if path.exists())
        free = shutil.disk_usage(existing).free / 2**30
        problem = f"{function.__name__} failed for {folder}, where {free:.2f} GiB are free: {error}"
    answers = gather_object([(result, problem)])
    if problems := [problem for _, problem in answers if problem is not None]:
        raise SystemExit(problems[0])
    return answers[0][0]


def save_weights(models, folder):
    """Writes a checkpoint's models, each in a folder that diffusers or transformers loads."""
    models.pipeline.unet.save_pretrained(folder / "unet")
    for name in TEXT_ENCODERS[: len(models.trained) - 1]:
        models.pipeline.components[name].save_pretrained(folder / name)


def load_weights(models, folder):
    """Reads a checkpoint's models into those that are being trained."""
    models.pipeline.unet.load_state_dict(UNet2DConditionModel.from_pretrained(folder / "unet").state_dict())
    for name in TEXT_ENCODERS[: len(models.trained) - 1]:
        text_encoder = models.pipeline.components[name]
        saved = type(text_encoder).from_pretrained(folder / name, dtype=torch.float32)
        text_encoder.load_state_dict(saved.state_dict())


def write_checkpoint(accelerator, args, models, state, folder):
    """Writes what a checkpoint holds: the models, the optimizer's state, the metrics so far, the run's state."""
    accelerator.save_state(folder)
    if accelerator.is_main_process:
        save_weights(models, folder)
        shutil.copy(Path(args.output_dir, args.logging_dir, "metrics.jsonl"), folder)
        (folder / "state.json").write_text(json.dumps(vars(state)))


def numbered_checkpoints(output_dir):
    """Lists a folder's checkpoints by rising number; only names checkpoint-<number> count."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def is_whole(checkpoint):
    """Tells whether all that a checkpoint's manifest names is there in full."""
    try:
        sizes = json.loads((checkpoint / "manifest.json").read_text())
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def flush(*paths):
    """Has the system write files and folders to the disk, where it lets folders be opened."""
    for path in paths if os.name == "posix" else ():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def seal_checkpoint(folder, target, limit):
    """Makes a written folder the checkpoint: manifest last, all on the disk, renamed; then prunes the older ones."""
    for pickled in folder.glob("random_states_*.pkl"):  # every draw is seeded by its step, so nothing reads these
        pickled.unlink()
    sizes = {str(file.relative_to(folder)): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    (folder / "manifest.json").write_text(json.dumps(sizes))
    flush(*folder.rglob("*"), folder)
    if target.exists():  # torn since
        shutil.rmtree(target)
    os.replace(folder, target)
    flush(target.parent)
    checkpoints = numbered_checkpoints(target.parent)
    for path in checkpoints[: checkpoints.index(target) + 1][:-limit] if limit else []:
        shutil.rmtree(path)


def save_checkpoint(accelerator, args, models, state):
    """Writes checkpoint-<global_step> beside its place and renames it, so that it is whole or not there."""
    target = Path(args.output_dir, f"checkpoint-{state.global_step}")
    folder = Path(args.output_dir, f".checkpoint-{state.global_step}.tmp")
    main_process = accelerator.is_main_process
    # DeepSpeed's ranks each hold a part of the optimizer's state; otherwise one has it all.
    writes = main_process or accelerator.distributed_type == DistributedType.DEEPSPEED
    try:
        agree(args.output_dir, writes, write_checkpoint, accelerator, args, models, state, folder)
        agree(args.output_dir, main_process, seal_checkpoint, folder, target, args.checkpoints_total_limit)
    finally:
        if main_process:
            shutil.rmtree(folder, ignore_errors=True)


def find_checkpoint(args):
    """Returns the checkpoint to resume from, or None; refuses a folder that holds another run."""
    resume, found = args.resume_from_checkpoint, numbered_checkpoints(args.output_dir)
    if resume is None and not args.overwrite_output_dir and (found or Path(args.output_dir, "README.md").exists()):
        raise SystemExit(
            f"{args.output_dir} holds another run: go on with it by --resume_from_checkpoint latest, "
            "start anew and delete what it left by --overwrite_output_dir, or choose another --output_dir."
        )
    elif resume == "latest":
        for path in reversed(found):
            if is_whole(path):
                return path
            print(f"Passing over {path}: it is not whole.")
        print(f"{args.output_dir} has no checkpoint to resume from: starting at step 0.")
    elif resume is not None:
        path = Path(resume) if Path(resume).is_dir() else Path(args.output_dir, resume)
        path = next((one for one in found if one.samefile(path)), path)
        if not is_whole(path):
            raise SystemExit(f"--resume_from_checkpoint {path} is not a whole checkpoint; 'latest' finds the newest.")
        later = found[found.index(path) + 1 :] if path in found else found
        if any(map(is_whole, later)):
            raise SystemExit(
                f"'latest' would mistake {later[-1]} for this run's; move it away or take another --output_dir."
            )
        return path


def begin_run(accelerator, args):
    """Returns the checkpoint to resume from, or None, and the run's state: seed, steps done, tracker id."""
    checkpoint = agree(args.output_dir, accelerator.is_main_process, find_checkpoint, args)
    if checkpoint is None:
        drawn = agree(args.output_dir, True, os.urandom, 4).hex()
        seed = int(drawn, 16) if args.seed is None else args.seed
        return None, SimpleNamespace(global_step=0, optimizer_steps=0, seed=seed, tracker_id=drawn)
    text = agree(args.output_dir, accelerator.is_main_process, (checkpoint / "state.json").read_text)
    state = SimpleNamespace(**json.loads(text))
    if args.seed not in (None, state.seed):
        raise SystemExit(f"{checkpoint} was trained with --seed {state.seed}, so it cannot go on with {args.seed}.")
    accelerator.print(f"Resuming from {checkpoint}.")
    return checkpoint, state


def check_resumed(accelerator, args, state, identity):
    """Refuses to go on with another script, base model or data set; lists other flags that have changed."""
    for what, now in identity.items():
        if getattr(state, "identity", identity)[what] != now:
            raise SystemExit(f"The checkpoint was trained with another {what}: use the same, or start a new run.")
    for name, before in getattr(state, "args", {}).items():
        if name != "seed" and getattr(args, name, before) != before:
            accelerator.print(f"  --{name} was {before} and is now {getattr(args, name)}")
    args.seed, state.identity = state.seed, identity
    state.args = {name: value for name, value in vars(args).items() if name not in UNSAVED}


def load_checkpoint(accelerator, models, optimizer, checkpoint):
    """Brings models and optimizer to where the checkpoint left them; given flags win over the checkpoint's."""
    flags = "lr betas eps weight_decay fused beta3 decouple use_bias_correction safeguard_warmup".split()
    given = [{name: group[name] for name in flags if name in group} for group in optimizer.param_groups]
    load_weights(models, checkpoint)
    accelerator.load_state(checkpoint)
    for group, settings in zip(optimizer.param_groups, given):
        group.update(settings, initial_lr=settings["lr"])


# Publishing


def save_model(args, models):
    """Writes the pipeline."""
    models.pipeline.save_pretrained(args.output_dir)


def loading_code(args, models, name):
    """Returns the lines that load the result by its name and make a picture."""
    return (
        "from diffusers import DiffusionPipeline\n\n"
        f"pipeline = DiffusionPipeline.from_pretrained({name!r})\n"
        f"prompt = {(args.validation_prompt or args.instance_prompt)!r}\n"
        f"pipeline(prompt, height={args.resolution}, width={args.resolution}).images[0].save('picture.png')"
    )


def write_model_card(args, models, state, repo_id):
    """Writes README.md: base, data, settings, loss curve, sample grid, and how to load the result."""
    metrics = Path(args.output_dir, args.logging_dir, "metrics.jsonl").read_text().splitlines()
    losses = [row["loss"] for row in map(json.loads, metrics) if "loss" in row]
    held_out = [row for row in map(json.loads, metrics) if "validation_loss" in row]
    points = np.array([np.mean(part) for part in np.array_split(losses, min(60, len(losses)))])
    curve = "".join("▁▂▃▄▅▆▇█"[int(height)] for height in 7 * (points - points.min()) / max(np.ptp(points), 1e-12))
    # Paths of this machine stay out of what may be published.
    given = args.pretrained_model_name_or_path, vars(args).get("dataset_name")
    base, data = (None if not name or Path(name).exists() else name for name in given)
    header = ModelCardData(base_model=base, datasets=data, library_name="diffusers", **CARD).to_yaml()
    words = ("lr_scheduler", "mixed_precision", "prediction_type")
    shown = {n: v for n, v in state.args.items() if isinstance(v, (int, float)) or n in words}
    settings = {n: v for n, v in shown.items() if v is not None and v is not False}
    base = base or (Path(given[0]).resolve().name if given[0] else "A new model")
    grid = f"samples/step-{state.global_step:06d}.png"
    card = [f"---\n{header}\n---\n\n# {repo_id}"]
    card += [f"{base}, trained on {data or 'local pictures'}."]
    card += ["The base model's licence applies."] if given[0] else []
    card += ["## Load it", f"```python\n{loading_code(args, models, repo_id)}\n```", "## Training"]
    if Path(args.output_dir, grid).exists():
        card += [f"![samples]({grid})", *(f"- {prompt}" for prompt in dict.fromkeys(picture_prompts(args)) if prompt)]
    card += [f"{state.global_step} steps. Loss from {points[0]:.4f} to {points[-1]:.4f}: `{curve}`"]
    card += [f"Held-out loss at step {row['step']}: {row['validation_loss']:.4f}" for row in held_out]
    card += ["| setting | value |\n|---|---|" + "".join(f"\n| {n} | {v} |" for n, v in settings.items()) + "\n"]
    replace_file(Path(args.output_dir, "README.md"), "\n\n".join(card).encode())


def with_retries(call, args, repo_id, **kwargs):
    """Calls the Hub, and again after passing failures, five times at most."""
    by_hand = ["hf", "upload", repo_id, args.output_dir, *(f"--include={pattern}" for pattern in PUBLISHED)]
    for wait in (1, 2, 4, 8, 0):
        try:
            return call(repo_id=repo_id, token=args.hub_token, **kwargs)
        except Exception as error:  # HTTP, connection and Xet errors have no class in common
            status = getattr(getattr(error, "response", None), "status_code", 500)
            if wait == 0 or isinstance(error, ValueError) or (status < 500 and status not in (408, 429)):
                by_hand = shlex.join(by_hand)
                raise SystemExit(f"{repo_id} on the Hub: {error}\nTo upload a finished result by hand: {by_hand}")
            time.sleep(wait)


def open_repository(args):
    """Creates the repository on the Hub, so that a wrong name or token is said before the work; returns its id."""
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    return with_retries(create_repo, args, name, private=args.hub_private_repo or None, exist_ok=True).repo_id


def publish(args, repo_id):
    """Uploads the result."""
    folder = {"folder_path": args.output_dir, "allow_patterns": PUBLISHED}
    with_retries(upload_folder, args, repo_id, commit_message="End of training", **folder)


# Training


def make_accelerator(args):
    """Builds the Accelerator; refuses a launch whose processes do not know of each other."""
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise SystemExit("FSDP is not supported: launch on several GPUs without it, or with DeepSpeed.")
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=Path(args.output_dir, args.logging_dir),
        # Otherwise DDP sorts its buckets anew after a first step, and a resumed run adds up in another order. Buffers,
        # which are constants, would be sent at every forward pass, of which ranks take unlike numbers in a validation.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)],
    )
    if int(os.environ.get("WORLD_SIZE", 1)) != accelerator.num_processes:
        raise SystemExit(
            f"The launcher started {os.environ['WORLD_SIZE']} processes, each of which would train alone. "
            "On CPUs, set ACCELERATE_USE_CPU=true; on GPUs, start no more processes than there are GPUs."
        )
    if args.report_to not in ("none", "all") and not accelerator.log_with:
        raise SystemExit(f"--report_to {args.report_to} is not installed: pip install {args.report_to}")
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise SystemExit("--mixed_precision fp16 needs a GPU; on a CPU, take bf16 or no.")
    # save_weights and load_weights do the models, so that diffusers can load them from a checkpoint.
    accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
    accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    args.mixed_precision = accelerator.mixed_precision  # the launcher may have set it
    return accelerator


def total_batch_size(accelerator, args):
    """Pictures in an optimizer step, over all processes."""
    return args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes


def prepare_unet(accelerator, args, unet):
    """Brings the UNet to the device, with the layout, attention and checkpointing that it will use."""
    # bitsandbytes makes the weights contiguous as it steps, so a resumed run would start in another layout.
    unet.to(accelerator.device, memory_format=torch.contiguous_format if args.use_8bit_adam else torch.channels_last)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.enable_xformers_memory_efficient_attention:
        try:
            unet.enable_xformers_memory_efficient_attention()
        except Exception as error:  # it is missing, built for another torch, or there is no GPU
            accelerator.print(f"xformers cannot be used ({error}), so PyTorch's own attention is.")


def make_optimizer(accelerator, args, groups):
    """Builds AdamW for groups of "params" and their "lr", scaled by the total batch size if --scale_lr says so."""
    settings = {"weight_decay": args.adam_weight_decay, "eps": args.adam_epsilon}
    settings["betas"] = (args.adam_beta1, args.adam_beta2)
    for group in groups:
        group["lr"] *= total_batch_size(accelerator, args) if args.scale_lr else 1
    if accelerator.distributed_type == DistributedType.DEEPSPEED:  # no prepared dataloader tells it these
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = args.train_batch_size
        config["gradient_accumulation_steps"] = args.gradient_accumulation_steps
        config["gradient_clipping"] = args.max_grad_norm
    if args.use_8bit_adam:
        return bitsandbytes.optim.AdamW8bit(groups, **settings)
    # A fused step hides from accelerate that the scaler of fp16 skipped it.
    return torch.optim.AdamW(groups, fused=accelerator.scaler is None, **settings)


def prepare_training(accelerator, args, models):
    """Brings what is trained and a new optimizer to the device; returns the optimizer."""
    if len(models.trained) > 1 and accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise SystemExit("DeepSpeed trains one model, so leave out --train_text_encoder or take another launcher.")
    prepare_unet(accelerator, args, models.unet)
    for text_encoder in models.trained[1:]:
        text_encoder.to(accelerator.device)
        if args.gradient_checkpointing:
            text_encoder.activation_checkpointing_enable()
    groups = [{"params": models.params_to_optimize, "lr": args.learning_rate}]
    optimizer = make_optimizer(accelerator, args, groups)
    *models.trained, optimizer = accelerator.prepare(*models.trained, optimizer)
    models.unet, *text_encoders = models.trained
    models.text_encoders = text_encoders or models.text_encoders
    return optimizer


def start_logging(accelerator, args, state, checkpoint):
    """Starts metrics.jsonl, or takes the checkpoint's, and the trackers; writes train_args.yaml."""
    output_dir, logging_dir = Path(args.output_dir), Path(args.output_dir, args.logging_dir)
    if accelerator.is_main_process:
        for torn in [*output_dir.glob(".*.tmp"), *logging_dir.glob(".*.tmp")]:  # a run was killed as it wrote
            shutil.rmtree(torn) if torn.is_dir() else torn.unlink()
        if args.overwrite_output_dir and (output_dir / "train_args.yaml").exists():
            results = [path for pattern in PUBLISHED for path in output_dir.glob(pattern)]
            for path in numbered_checkpoints(output_dir) + results:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        (output_dir / "samples").mkdir(parents=True, exist_ok=True)
        replace_file(logging_dir / "metrics.jsonl", (checkpoint / "metrics.jsonl").read_bytes() if checkpoint else b"")
        libraries = ("torch", "diffusers", "transformers", "accelerate", "datasets", "bitsandbytes")
        notes = "".join(f"# {library} {version(library)}\n" for library in libraries)
        with contextlib.suppress(OSError, subprocess.CalledProcessError):  # git is missing, or this is no checkout
            git = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
            notes += f"# commit {subprocess.check_output(git, text=True, stderr=subprocess.DEVNULL)}"
        replace_file(output_dir / "train_args.yaml", (notes + yaml.safe_dump(state.args, sort_keys=False)).encode())
    if args.hub_token:  # wandb keeps the command line
        sys.argv = [argument.replace(args.hub_token, "***") for argument in sys.argv]
    config = {name: v if isinstance(v, (bool, int, float, str)) else str(v) for name, v in state.args.items()}
    wandb = {"id": state.tracker_id, "resume": "allow", "dir": str(logging_dir)}
    tensorboard = {"purge_step": state.global_step + 1 if checkpoint else 0}  # hides what an earlier end logged later
    accelerator.init_trackers(args.tracker_project_name, config, {"wandb": wandb, "tensorboard": tensorboard})


def print_header(accelerator, args, models, samples, held_out, state):
    """Says what the run will do and cost; refuses it if its first checkpoint cannot fit on the disk."""
    # Four bytes a weight, four more for its average, and AdamW's two moments of four bytes, or of one.
    bytes_a_weight = 4 + 4 * (models.ema_unet is not None) + (2 if args.use_8bit_adam else 8)
    needed = sum(parameter.numel() for parameter in models.params_to_optimize) * bytes_a_weight / 2**30
    free = shutil.disk_usage(args.output_dir).free / 2**30
    batch = f"{args.train_batch_size} x {accelerator.num_processes} processes x {args.gradient_accumulation_steps}"
    accelerator.print(
        f"pictures   {len(samples)} to train on, {len(held_out)} held out, {args.resolution} x {args.resolution}\n"
        f"batch      {total_batch_size(accelerator, args)} = {batch} accumulated\n"
        f"steps      {args.max_train_steps}, of which {state.global_step} are done; seed {state.seed}\n"
        f"device     {accelerator.device}, precision {accelerator.mixed_precision}\n"
        f"disk       {needed:.2f} GiB a checkpoint, {free:.1f} GiB free"
    )
    if args.checkpointing_steps and needed > free:
        raise SystemExit(f"A checkpoint needs {needed:.2f} GiB, and {args.output_dir} has {free:.2f} GiB free.")


def peak_memory(accelerator):
    """Peak memory of the GPU since the last call, or the process's memory now on a CPU, in GiB."""
    if accelerator.device.type != "cuda":
        return psutil.Process().memory_info().rss / 2**30
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return peak


def load_batches(accelerator, args, samples, keys_of, state):
    """Yields this rank's batches of the steps that are left: its slice of a step's keys for each micro-step."""
    rank, world_size = accelerator.process_index, accelerator.num_processes
    batch_size = len(keys_of(0)) // (args.gradient_accumulation_steps * world_size)
    batch_keys = (
        keys_of(step)[(micro_step * world_size + rank) * batch_size :][:batch_size]
        for step in range(state.global_step, args.max_train_steps)
        for micro_step in range(args.gradient_accumulation_steps)
    )
    settings = {"num_workers": args.dataloader_num_workers, "worker_init_fn": ignore_signals}
    pin_memory = accelerator.device.type == "cuda"
    return iter(torch.utils.data.DataLoader(samples, batch_sampler=batch_keys, pin_memory=pin_memory, **settings))


def train(accelerator, args, models, optimizer, lr_scheduler, samples, held_out, keys_of, state, stop):
    """Takes the optimizer steps that are left, logging, validating and saving as asked; a signal ends it early.

    keys_of(step) gives the (epoch, index) keys of the samples of an optimizer step, over all ranks and micro-steps.
    """
    batches = load_batches(accelerator, args, samples, keys_of, state)
    validations = {*range(0, args.max_train_steps, args.validation_steps), args.max_train_steps}
    if not picture_prompts(args) and not len(held_out):
        validations = set()
    if state.global_step in validations:  # step 0, or one due when the checkpoint was written, as saving comes first
        log_validation(accelerator, args, models, held_out, state, stop)
    bar = {"total": args.max_train_steps, "initial": state.global_step, "disable": not accelerator.is_main_process}
    progress_bar = tqdm(desc="training", **bar)
    for model in models.trained:
        model.train()
    unread = []  # finished steps: their row, their keys, and their numbers, which are still on the device
    last_time = time.perf_counter()
    for step in range(state.global_step, args.max_train_steps):
        losses = Counter()
        for micro_step in range(args.gradient_accumulation_steps):
            # Only dropout inside the models draws from the global generator.
            torch.manual_seed(int(digest(state.seed, step, micro_step, accelerator.process_index)[:8], 16))
            batch = send_to_device(next(batches), accelerator.device, non_blocking=True)
            with accelerator.accumulate(*models.trained):
                with accelerator.autocast():
                    micro_losses = compute_loss(models, batch, args)
                accelerator.backward(micro_losses["loss"])
                for name, loss in micro_losses.items():
                    losses[name] += loss.detach() / args.gradient_accumulation_steps
                if accelerator.sync_gradients:
                    grad_norm = accelerator.clip_grad_norm_(models.params_to_optimize, args.max_grad_norm or math.inf)
                optimizer.step()  # accelerate skips this, and the next, before the last micro-step
                optimizer.zero_grad()
        row = {"step": step + 1, "lr": lr_scheduler.get_last_lr()[0]}
        skipped = accelerator.optimizer_step_was_skipped  # after an overflow that the scaler of fp16 handles
        state.global_step = step + 1
        if not skipped:
            state.optimizer_steps += 1
            lr_scheduler.step()
            after_step(accelerator, args, models, state)
        now = time.perf_counter()
        row |= {"images_per_second": len(keys_of(step)) / (now - last_time), "memory_gib": peak_memory(accelerator)}
        last_time = now
        # As log_steps takes them apart. Filled on the device: a number copied to it would make it wait.
        flags = [torch.full_like(losses["loss"], float(flag)) for flag in (skipped, stop.signum > 0)]
        numbers = torch.stack([*losses.values(), torch.as_tensor(grad_norm).to(losses["loss"]), *flags])
        unread.append((row, keys_of(step), list(losses), accelerator.reduce(numbers, "mean")))
        validate = state.global_step in validations
        save = args.checkpointing_steps and state.global_step % args.checkpointing_steps == 0
        # Read one step late, so that the device always has work, or at once where something follows from the numbers.
        read_now = validate or save or state.global_step == args.max_train_steps
        asked_to_stop = log_steps(accelerator, args, samples, progress_bar, unread, 0 if read_now else 1)
        if stop.signum and accelerator.num_processes == 1:  # no other rank has to hear of it first
            asked_to_stop = True
        if asked_to_stop:
            log_steps(accelerator, args, samples, progress_bar, unread, 0)
        # Saved before it is validated: a stop in a long validation then loses no step, and resuming validates again.
        if save or asked_to_stop:
            save_checkpoint(accelerator, args, models, state)
            last_time = time.perf_counter()
        if asked_to_stop:
            accelerator.print(f"\nStopped after step {step + 1}, and saved: --resume_from_checkpoint latest goes on.")
            stop.exit_if_asked()
        if validate:
            log_validation(accelerator, args, models, held_out, state, stop)
            last_time = time.perf_counter()
    progress_bar.close()


def run(accelerator, args, stop):
    """The stages of a run, from the flags to what it leaves."""
    checkpoint, state = begin_run(accelerator, args)
    main_process, repo_id = accelerator.is_main_process, Path(args.output_dir).resolve().name
    if args.push_to_hub:
        repo_id = agree(args.output_dir, main_process, open_repository, args)

    # Data.
    records = check_records(accelerator, args, read_records(args), stop)
    records, held_out_records = split_records(args, records, state.seed)
    sizes = (len(records), 0)
    if args.with_prior_preservation:
        fill_class_pictures(accelerator, args, state.seed, stop)
        records += check_records(accelerator, args, class_pictures(args), stop)
        sizes = (sizes[0], len(records) - sizes[0])
        accelerator.print(f"prior      {sizes[1]} pictures of the class, one beside each of the subject in a batch")
    total = total_batch_size(accelerator, args)
    args.max_train_steps = args.max_train_steps or args.num_train_epochs * math.ceil(max(sizes) / total)
    keys_of = functools.partial(paired_keys, total_batch_size=total, sizes=sizes, seed=state.seed)

    # Models.
    models = load_models(args)
    identity = {
        "script": Path(__file__).stem,
        "base model": digest(models.vae_digest, models.text_digest, [p.shape for p in models.unet.parameters()]),
        "--train_text_encoder": args.train_text_encoder,
        "--with_prior_preservation": args.with_prior_preservation,
        "data set": digest([(record["digest"], record["captions"]) for record in records]),
        "prediction type": models.noise_scheduler.config.prediction_type,
        "noise schedule": digest(models.noise_scheduler.alphas_cumprod.numpy()),
        "--use_8bit_adam": args.use_8bit_adam,
    }
    check_resumed(accelerator, args, state, identity)

    # What the frozen ones make of the data.
    side = args.resolution // 2 ** (len(models.vae.config.block_out_channels) - 1)
    settings = ((models.vae.config.latent_channels, side, side), models.noise_scheduler.config.num_train_timesteps)
    samples, held_out = Samples(args, records, state.seed, *settings), Samples(args, held_out_records, 0, *settings)
    keys = (key for step in range(state.global_step, args.max_train_steps) for key in keys_of(step))
    visits = [(samples, keys), (held_out, 2 * validation_keys(held_out))]  # at least before and after
    agree(args.output_dir, True, start_logging, accelerator, args, state, checkpoint)
    print_header(accelerator, args, models, samples, held_out, state)
    fill_cache(accelerator, args, models, visits, stop)

    # Training.
    optimizer = prepare_training(accelerator, args, models)
    if checkpoint:
        load_checkpoint(accelerator, models, optimizer, checkpoint)
    steps = {"num_warmup_steps": args.lr_warmup_steps, "num_training_steps": args.max_train_steps}
    steps |= {"num_cycles": args.lr_num_cycles, "power": args.lr_power}
    lr_scheduler = get_scheduler(args.lr_scheduler, optimizer, **steps, last_epoch=state.optimizer_steps - 1)
    train(accelerator, args, models, optimizer, lr_scheduler, samples, held_out, keys_of, state, stop)

    # What it leaves.
    agree(args.output_dir, main_process, save_model, args, models)
    agree(args.output_dir, main_process, write_model_card, args, models, state, repo_id)
    code = loading_code(args, models, args.output_dir)
    accelerator.print(f"The result is in {args.output_dir}. To load it:\n\n{code}\n")
    stop.exit_if_asked()
    agree(args.output_dir, main_process and args.push_to_hub, publish, args, repo_id)


def main(args):
    """Fine-tunes as the arguments say; exits with 128 + signal when told to stop."""
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    accelerator = make_accelerator(args)
    end = None
    try:
        run(accelerator, args, StopFlag())
    except SystemExit as caught:  # every rank ends so, and one says why
        end = SystemExit(caught.code if accelerator.is_main_process or isinstance(caught.code, int) else 1)
    except BaseException:
        for worker in multiprocessing.active_children():  # loaders, which ignore what asks them to end
            worker.kill()
        raise
    if accelerator.num_processes > 1:
        time.sleep(0.1)  # gloo's thread needs the interpreter to drop its last work, and ending would hold that
    accelerator.end_training()
    if end is not None:
        raise end


if __name__ == "__main__":
    main(args)
