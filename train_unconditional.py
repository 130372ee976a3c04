"""Trains a diffusion model of pixels on pictures without captions, from scratch or from weights.

Each step noises a few pictures (DDPM, Ho et al. 2020, arXiv:2006.11239, eq. 4), lets a UNet predict the noise, the
picture or the velocity (Salimans and Ho 2022, arXiv:2202.00512), and takes the mean squared error, plain or with
Min-SNR weights (Hang et al. 2023, arXiv:2303.09556). The result is a pipeline that DDPMPipeline.from_pretrained loads.

Start reading at run, train and compute_loss. Most functions stand word for word in the sibling scripts, so that one or
the other draw or hook has no use here.

    accelerate launch train_unconditional.py --config configs/demo_unconditional.yaml
    accelerate launch train_unconditional.py --dataset_name huggan/flowers-102-categories --resolution 64 \\
        --center_crop --random_flip --num_epochs 100 --use_ema --mixed_precision fp16 --output_dir my-model
    accelerate launch train_unconditional.py --config my-model/train_args.yaml --resume_from_checkpoint latest
"""

import argparse
import contextlib
import ctypes
import functools
import glob
import hashlib
import io
import itertools
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


REFUSED = {"--local_rank": "launchers pass the rank in the environment, so leave this flag out"}


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
    add("--pretrained_model_name_or_path", help="base model: diffusers folder or Hub id")
    add("--model_config_name_or_path", help="config.json, its folder or a Hub id: a new UNet of that kind, instead")
    add("--revision", help="branch, tag or commit of the base model on the Hub")
    add("--variant", help="variant of the base model's weight files, such as fp16")
    add("--cache_dir", help="where downloads from the Hub are kept")

    add = parser.add_argument_group("data").add_argument
    add("--dataset_name", help="a data set on the Hub, or whatever else datasets.load_dataset takes")
    add("--dataset_config_name", help="configuration of that data set")
    add("--train_data_dir", help="folder of pictures (or of parquet files; captions are not read)")
    add("--image_column", default="image", help="column of the pictures (Hub and parquet)")
    add("--max_train_samples", type=positive_int, help="train on so many pictures, drawn by the seed")
    add("--resolution", type=positive_int, default=64, help="side of the square pictures in pixels (a multiple of 8)")
    add("--center_crop", **switch, help="crop the middle instead of a random place")
    add("--random_flip", **switch, help="mirror half of the samples")
    filters = ["lanczos", "bicubic", "bilinear", "box", "hamming", "nearest", "nearest_exact"]
    add("--image_interpolation_mode", default="lanczos", choices=filters, help="filter that resizes the pictures")
    add("--preserve_input_precision", **switch, help="accepted: 16-bit and float grey always keep theirs")
    add("--on_bad_image", default="error", choices=["error", "skip"], help="what to do about unusable pictures")
    add("--encoding_cache_dir", help="where checks, latents and embeddings are kept (~/.cache/diffusion-training)")
    add("--no_encoding_cache", **switch, help="keep none of them, and run the frozen models in every step")
    add("--dataloader_num_workers", type=natural_int, default=0, help="processes that load pictures")

    add = parser.add_argument_group("training").add_argument
    add("--output_dir", default="ddpm-model-64", help="folder for the pipeline, samples, logs and checkpoints")
    add("--overwrite_output_dir", **switch, help="start anew in a folder that holds a run, deleting what it left")
    add("--seed", type=natural_int, help="seed of every random draw (default: one is drawn and recorded)")
    add("--train_batch_size", type=positive_int, default=16, help="pictures per process and forward pass")
    add("--gradient_accumulation_steps", type=positive_int, default=1, help="forward passes per optimizer step")
    epochs = {"type": positive_int, "default": 100, "help": "passes over the data, without --max_train_steps"}
    add("--num_train_epochs", "--num_epochs", **epochs)
    add("--max_train_steps", type=positive_int, help="optimizer steps")
    add("--gradient_checkpointing", **switch, help="recompute activations: less memory, slower")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="default: as the launcher is configured")
    add("--allow_tf32", **switch, help="TF32 matrix products on Ampere GPUs and later")
    add("--enable_xformers_memory_efficient_attention", **switch, help="xformers' attention instead of PyTorch's")

    add = parser.add_argument_group("optimizer").add_argument
    add("--learning_rate", type=non_negative, default=1e-4, help="learning rate after warmup")
    add("--scale_lr", **switch, help="multiply the learning rate by the total batch size")
    shapes = ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
    add("--lr_scheduler", default="cosine", choices=shapes, help="shape of the learning rate over the run")
    add("--lr_warmup_steps", type=natural_int, default=500, help="optimizer steps of linear warmup")
    add("--use_8bit_adam", **switch, help="8-bit AdamW of bitsandbytes: a quarter of the optimizer's memory")
    add("--adam_beta1", type=below_one, default=0.95, help="decay of the gradients' mean")
    add("--adam_beta2", type=below_one, default=0.999, help="decay of the gradients' square")
    add("--adam_weight_decay", type=non_negative, default=1e-6, help="decoupled weight decay")
    add("--adam_epsilon", type=non_negative, default=1e-8, help="added to the denominator")
    add("--max_grad_norm", type=non_negative, default=1.0, help="norm to scale larger gradients down to; 0: none")
    add("--use_ema", **switch, help="average the weights over the run; the average is validated and saved")
    positive = functools.partial(bounded, kind=float, low=1e-6)
    add("--ema_inv_gamma", type=positive, default=1.0, help="gamma of the average's decay 1 - (1 + step/gamma)^-p")
    add("--ema_power", type=non_negative, default=0.75, help="power p of that decay")
    add("--ema_max_decay", type=fraction, default=0.9999, help="the most that decay grows to")
    add("--foreach_ema", **switch, help="update the average in one call: faster, more memory")
    add("--offload_ema", **switch, help="keep the average in CPU memory between steps")

    add = parser.add_argument_group("loss").add_argument
    targets = ["epsilon", "v_prediction", "sample"]
    add("--prediction_type", choices=targets, help="what the UNet predicts (default: as the base model does)")
    add("--snr_gamma", type=positive, help="gamma of Min-SNR weights, often 5")
    add("--ddpm_num_steps", type=positive_int, help="timesteps of the noise (default: as the base has, or 1000)")
    schedules = ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"]
    add("--ddpm_beta_schedule", choices=schedules, help="rise of the noise (default: as the base has, or linear)")

    add = parser.add_argument_group("validation").add_argument
    add("--eval_batch_size", type=natural_int, default=16, help="pictures in a sample grid; 0: no grids")
    add("--ddpm_num_inference_steps", type=positive_int, default=50, help="sampling steps of a picture in the grids")
    add("--validation_samples", type=natural_int, default=0, help="pictures held out to measure the loss on")
    epochs = {"type": positive_int, "help": "epochs between validations"}
    add("--validation_epochs", "--save_images_epochs", **epochs)
    add("--validation_steps", type=positive_int, help="optimizer steps between validations")

    add = parser.add_argument_group("logging").add_argument
    trackers = "tensorboard wandb comet_ml aim mlflow clearml dvclive swanlab trackio all none".split()
    add("--report_to", "--logger", default="tensorboard", choices=trackers, help="experiment tracker")
    add("--tracker_project_name", default="train_unconditional", help="name of the project in the tracker")
    add("--logging_dir", default="logs", help="folder of metrics.jsonl and the tracker's files, in --output_dir")
    add("--save_model_epochs", type=natural_int, default=10, help="epochs between pipelines; 0: at the end only")

    add_saving_flags(parser)
    args = parser.parse_args(read_config(parser, argv))
    check_args(parser, args)
    return args


def lies_in(path, folder):
    """Tells whether a path is a folder, or lies somewhere in it; neither need be given."""
    return bool(path and folder) and Path(path).resolve().is_relative_to(Path(folder).resolve())


def check_args(parser, args):
    """Refuses what no flag's type can know to be wrong."""
    base, config = args.pretrained_model_name_or_path, args.model_config_name_or_path
    data, resume = args.train_data_dir, args.resume_from_checkpoint
    hub_id = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
    resumable = resume in (None, "latest") or Path(resume).is_dir() or Path(args.output_dir, resume).is_dir()
    base_is_there = base is None or hub_id.fullmatch(base) or Path(base).is_dir()
    config_is_there = config is None or hub_id.fullmatch(config) or Path(config).exists()
    problems = [
        (bool(args.dataset_name) == bool(data), "give the pictures by either --train_data_dir or --dataset_name"),
        (data and not Path(data).is_dir(), f"--train_data_dir {data} is not a folder"),
        (lies_in(args.output_dir, data), f"--output_dir lies in {data}: its samples would be trained on"),
        (args.resolution % 8, f"--resolution {args.resolution} is not a multiple of 8"),
        (base and config, "give --pretrained_model_name_or_path or --model_config_name_or_path, not both"),
        (not base_is_there, f"--pretrained_model_name_or_path {base} is no folder and no Hub id"),
        (not config_is_there, f"--model_config_name_or_path {config} is no file, no folder and no Hub id"),
        (args.validation_steps and args.validation_epochs, "give --validation_steps or --validation_epochs, not both"),
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
import datasets
import diffusers
import numpy as np
import psutil
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator, DistributedType
from accelerate.utils import DistributedDataParallelKwargs, gather_object, parse_flag_from_env, send_to_device
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, compute_snr
from diffusers.utils import make_image_grid
from huggingface_hub import ModelCardData, create_repo, upload_folder
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm.auto import tqdm
from tqdm.contrib.concurrent import thread_map


PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
VALIDATION_DRAWS = 4  # noises and timesteps for each held-out picture
# What is uploaded: no checkpoints, no logs, no arguments with their local paths.
PUBLISHED = "README.md model_index.json samples/* unet/* scheduler/*".split()
STOP_SIGNALS = {"SIGTERM", "SIGINT", "SIGUSR1"} & {*dir(signal)}
CARD = {"pipeline_tag": "unconditional-image-generation", "tags": ["ddpm"]}
# The UNet of a run that gives neither weights nor a config: 113.7 million weights.
NEW_UNET = {
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": (*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4),
}
UNSAVED = {"config", "hub_token", "overwrite_output_dir", "resume_from_checkpoint"}


# Data


def digest(*parts):
    """Names what the parts say in 32 hexadecimal digits; bytes and arrays count as they are, the rest as text."""
    blake = hashlib.blake2b(digest_size=16)
    for part in parts:
        blake.update(part if isinstance(part, (bytes, np.ndarray)) else repr(part).encode())
        blake.update(b"\0")
    return blake.hexdigest()


def list_files(folder):
    """Lists the files under a folder, sorted; hidden ones are left out, links to folders are followed."""
    return sorted(Path(file) for file in glob.glob(f"{glob.escape(str(folder))}/**", recursive=True))


def read_rows(args, files, columns):
    """Lists the rows of a Hub or parquet data set; the pictures stay encoded.

    columns: the names of the columns of pictures and, if there are any, of captions, by the flags that gave them.
    """
    try:
        parquet = {"path": "parquet", "data_files": {"train": [str(file) for file in files]}}
        source = {"path": args.dataset_name, "name": args.dataset_config_name} if args.dataset_name else parquet
        rows = datasets.load_dataset(**source, split="train", cache_dir=args.cache_dir)
    except Exception as error:  # anything, from an unknown name to a broken file
        raise SystemExit(f"The data set {args.dataset_name or files[0].parent} cannot be loaded: {error}")
    for flag, column in columns.items():
        if column not in rows.column_names:
            raise SystemExit(f"{flag} {column} is not among the data set's columns {', '.join(rows.column_names)}.")
    image_column, *caption_column = columns.values()
    captions = rows[caption_column[0]][:] if caption_column else [None] * len(rows)
    rows = rows.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
    return [{"name": f"row {i}", "rows": rows, "row": i, "captions": captions[i]} for i in range(len(rows))]


def read_records(args):
    """Lists the pictures of --dataset_name or --train_data_dir in an order that is the same everywhere."""
    files = [] if args.dataset_name else list_files(args.train_data_dir)
    parquet = [file for file in files if file.suffix == ".parquet"]
    if args.dataset_name or parquet:
        records = read_rows(args, parquet, {"--image_column": args.image_column})
    else:
        pictures = [file for file in files if file.suffix.lower() in PICTURES]
        records = [{"name": str(file), "rows": None} for file in pictures]
    if not records:
        raise SystemExit(f"{args.dataset_name or args.train_data_dir} holds no pictures {sorted(PICTURES)}.")
    return [{**record, "captions": [""]} for record in records]


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


# Models


def weights_digest(model):
    """Names a model by its layers and the values of its weights."""
    return digest(repr(model), *(tensor.contiguous().numpy() for tensor in model.state_dict().values()))


def load_base(args):
    """Loads the UNet and the scheduler of the base model, a pipeline or a UNet alone, in float32."""
    base, problems = args.pretrained_model_name_or_path, []
    files = {"revision": args.revision, "cache_dir": args.cache_dir, "use_safetensors": True, "dtype": torch.float32}
    variants = [args.variant] if args.variant else [None, "fp16"]  # of files in half precision if it has no others
    for kind, variant in itertools.product((DDPMPipeline, UNet2DModel), variants):
        try:
            loaded = kind.from_pretrained(base, variant=variant, **files)
            break
        except (OSError, ValueError) as caught:
            problems.append(f"\n  {kind.__name__}: {caught}")
    else:
        listing = "".join(dict.fromkeys(problems))
        raise SystemExit(f"{base} cannot be loaded from safetensors files, neither as a pipeline nor alone:{listing}")
    unet, scheduler = (loaded.unet, loaded.scheduler) if kind is DDPMPipeline else (loaded, DDPMScheduler())
    if not isinstance(unet, UNet2DModel):
        raise SystemExit(f"{base} is no unconditional model of pixels: its UNet is a {type(unet).__name__}.")
    unet.register_to_config(_name_or_path=Path(base).resolve().name if Path(base).exists() else base)
    return unet, scheduler


def new_unet(args):
    """Builds a UNet of random weights, drawn from the global generator, as --model_config_name_or_path says."""
    path, config = args.model_config_name_or_path, NEW_UNET
    try:
        if path:
            config = UNet2DModel.load_config(path, revision=args.revision, cache_dir=args.cache_dir)
        if (kind := config.get("_class_name", "UNet2DModel")) != "UNet2DModel":
            raise ValueError(f"it is of a {kind}")
        config = {name: value for name, value in config.items() if not name.startswith("_")}
        unet, unknown = UNet2DModel.from_config(config, return_unused_kwargs=True)
        if unknown:
            raise ValueError(f"such a model has no {', '.join(unknown)}")
    except Exception as error:  # anything, from a missing file to numbers that do not fit together
        raise SystemExit(f"--model_config_name_or_path {path} makes no UNet2DModel: {error}")
    return unet


def load_models(args):
    """Loads the base model's UNet and noise schedule, or makes new ones; keeps an average if --use_ema asks for it."""
    base = args.pretrained_model_name_or_path
    unet, scheduler = load_base(args) if base else (new_unet(args), DDPMScheduler())
    multiple = 2 ** (len(unet.config.down_block_types) - 1)
    if args.resolution % multiple:
        raise SystemExit(f"--resolution {args.resolution} is not a multiple of {multiple}, as this UNet needs it.")
    if (unet.config.in_channels, unet.config.out_channels, unet.class_embedding) != (3, 3, None):
        raise SystemExit("The UNet has to take 3 channels of a picture, give 3, and know no classes.")
    unet.register_to_config(sample_size=args.resolution)  # the size of the pictures that a pipeline makes with it
    given = {"num_train_timesteps": args.ddpm_num_steps, "beta_schedule": args.ddpm_beta_schedule}
    given["prediction_type"] = args.prediction_type
    given = {name: value for name, value in given.items() if value is not None}
    scheduler = DDPMScheduler.from_config(scheduler.config, **given)
    args.ddpm_num_inference_steps = min(args.ddpm_num_inference_steps, scheduler.config.num_train_timesteps)

    models = SimpleNamespace(pipeline=DDPMPipeline(unet=unet, scheduler=scheduler), unet=unet)
    config = [(n, v) for n, v in sorted(unet.config.items()) if not n.startswith("_") and n != "sample_size"]
    models.base_digest = weights_digest(unet) if base else digest(config)
    models.noise_scheduler = DDPMScheduler.from_config(scheduler.config)  # sampling changes the pipeline's
    models.ema_unet = None
    if args.use_ema:
        decay = {"decay": args.ema_max_decay, "inv_gamma": args.ema_inv_gamma, "power": args.ema_power}
        config = {"model_cls": UNet2DModel, "model_config": unet.config, "use_ema_warmup": True}
        models.ema_unet = EMAModel(unet.parameters(), foreach=args.foreach_ema, **decay, **config)
    models.trained, models.params_to_optimize, models.idle = [unet], list(unet.parameters()), []
    return models


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


# Objective


def snr_weights(noise_scheduler, timesteps, snr_gamma):
    """Min-SNR weights (bsz,) of the samples' losses for what the UNet predicts: arXiv:2303.09556, section 3.4."""
    if snr_gamma is None:
        return torch.ones_like(timesteps, dtype=torch.float32)
    snr = compute_snr(noise_scheduler, timesteps)
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[noise_scheduler.config.prediction_type]
    return snr.clamp(max=snr_gamma) / divisor


def compute_loss(models, batch, args):
    """Returns the "loss" of a batch, the mean over its samples: of their noise in the batch, and of nothing else."""
    timesteps, noise_scheduler = batch["timesteps"], models.noise_scheduler
    clean_images, noise = batch["pixel_values"], batch["noise"]
    # In float32 whatever the mixed precision: in 16 bits the first timesteps' little noise would be rounded away.
    noisy_images = noise_scheduler.add_noise(clean_images, noise, timesteps)
    velocity = noise_scheduler.get_velocity(clean_images, noise, timesteps)
    targets = {"epsilon": noise, "v_prediction": velocity, "sample": clean_images}
    target = targets[noise_scheduler.config.prediction_type]
    model_pred = models.unet(noisy_images, timesteps).sample
    loss = F.mse_loss(model_pred.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))
    return {"loss": (loss * snr_weights(noise_scheduler, timesteps, args.snr_gamma)).mean()}


# Validation


def picture_prompts(args):
    """Returns the prompts of the validation pictures, one each: empty ones, as there is nothing to say."""
    return [""] * args.eval_batch_size


def sample_picture(args, models, prompt, generator):
    """Draws a validation picture."""
    return models.pipeline(generator=generator, num_inference_steps=args.ddpm_num_inference_steps).images[0]


@contextlib.contextmanager
def weights_to_save(models):
    """Swaps the averaged weights in, if there are any, and the training ones back afterwards."""
    if models.ema_unet is not None:
        models.ema_unet.store(models.params_to_optimize)
        models.ema_unet.copy_to(models.params_to_optimize)
    try:
        yield
    finally:
        if models.ema_unet is not None:
            models.ema_unet.restore(models.params_to_optimize)


def after_step(accelerator, args, models, state):
    """Moves the average of the weights towards them after an optimizer step, and writes the pipeline if it is time."""
    if models.ema_unet is not None:
        models.ema_unet.to(accelerator.device)
        models.ema_unet.step(models.params_to_optimize)
        models.ema_unet.to("cpu" if args.offload_ema else accelerator.device)
    if args.save_model_steps and state.global_step % args.save_model_steps == 0:
        # A loss that is no number is only read later.
        if all(parameter.isfinite().all() for parameter in models.params_to_optimize):
            agree(args.output_dir, accelerator.is_main_process, save_model, args, models)


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
    """Writes a checkpoint's models, each in a folder that diffusers loads."""
    models.pipeline.unet.save_pretrained(folder / "unet")
    if models.ema_unet is not None:
        models.ema_unet.save_pretrained(folder / "unet_ema")


def load_weights(models, folder):
    """Reads a checkpoint's models into those that are being trained."""
    models.pipeline.unet.load_state_dict(UNet2DModel.from_pretrained(folder / "unet").state_dict())
    if models.ema_unet is not None:
        saved = EMAModel.from_pretrained(folder / "unet_ema", UNet2DModel)
        models.ema_unet.optimization_step = saved.optimization_step
        for shadow, parameter in zip(models.ema_unet.shadow_params, saved.shadow_params):
            shadow.copy_(parameter)


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
    """Writes the pipeline, of the averaged weights if there are any."""
    with weights_to_save(models):
        models.pipeline.save_pretrained(args.output_dir)


def loading_code(args, models, name):
    """Returns the lines that load the result by its name and make a picture."""
    return (
        "from diffusers import DDPMPipeline\n\n"
        f"pipeline = DDPMPipeline.from_pretrained({name!r})\n"
        f"pipeline(num_inference_steps={args.ddpm_num_inference_steps}).images[0].save('picture.png')"
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
    """Brings the UNet, its average and a new optimizer to the device; returns the optimizer."""
    prepare_unet(accelerator, args, models.unet)
    if models.ema_unet is not None and not args.offload_ema:
        models.ema_unet.to(accelerator.device)
    groups = [{"params": models.params_to_optimize, "lr": args.learning_rate}]
    models.unet, optimizer = accelerator.prepare(models.unet, make_optimizer(accelerator, args, groups))
    models.trained = [models.unet]
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
    total = total_batch_size(accelerator, args)
    steps_per_epoch = math.ceil(len(records) / total)
    args.max_train_steps = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    keys_of = functools.partial(step_keys, total_batch_size=total, size=len(records), seed=state.seed)

    # Models.
    torch.manual_seed(state.seed % 2**64)  # new weights are a function of the seed
    models = load_models(args)
    identity = {
        "script": Path(__file__).stem,
        "base model": models.base_digest,
        "data set": digest([record["digest"] for record in records]),
        "noise schedule": digest(models.noise_scheduler.betas.numpy()),
        "prediction type": models.noise_scheduler.config.prediction_type,
        "--use_ema": args.use_ema,
        "--use_8bit_adam": args.use_8bit_adam,
    }
    check_resumed(accelerator, args, state, identity)
    args.validation_steps = args.validation_steps or (args.validation_epochs or 10) * steps_per_epoch
    args.save_model_steps = args.save_model_epochs * steps_per_epoch

    shape, num_train_timesteps = (3, args.resolution, args.resolution), len(models.noise_scheduler.betas)
    samples = Samples(args, records, state.seed, shape, num_train_timesteps)
    held_out = Samples(args, held_out_records, 0, shape, num_train_timesteps)
    agree(args.output_dir, True, start_logging, accelerator, args, state, checkpoint)
    print_header(accelerator, args, models, samples, held_out, state)

    # Training.
    optimizer = prepare_training(accelerator, args, models)
    if checkpoint:
        load_checkpoint(accelerator, models, optimizer, checkpoint)
    steps = {"num_warmup_steps": args.lr_warmup_steps, "num_training_steps": args.max_train_steps}
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
