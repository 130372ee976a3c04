"""Teaches Stable Diffusion 1.x, 2.x or XL a new word from a few pictures of a thing or of a style: textual inversion.

The word stands for one vector or more of the text encoder's table of embeddings, and these are all that is trained
(Gal et al. 2022, arXiv:2208.01618, section 4). Each step noises the latents of a few pictures (DDPM, Ho et al. 2020,
arXiv:2006.11239, eq. 4), lets the UNet predict the noise under a caption with the new word, and takes the mean squared
error. The result is a file of a few kilobytes that pipeline.load_textual_inversion adds to the base; two for SDXL.

To read it, take 1. the flags below, up to the first fence (`# === ... ===`), 2. from "# The method" to the next fence,
and 3. the comment at the start of the fence "Engine", with train and execute behind it. Skip the rest of the fences:
they are the same text in every script that has them.

    accelerate launch textual_inversion.py --config configs/demo_textual_inversion.yaml
    accelerate launch textual_inversion.py --pretrained_model_name_or_path sd-legacy/stable-diffusion-v1-5 \\
        --train_data_dir cat --placeholder_token "<cat-toy>" --initializer_token toy --num_vectors 4 --center_crop \\
        --train_batch_size 4 --learning_rate 2e-3 --lr_warmup_steps 0 --max_train_steps 3000 --mixed_precision fp16 \\
        --validation_prompt "a <cat-toy> backpack" --output_dir cat-toy
    accelerate launch textual_inversion.py --config cat-toy/train_args.yaml --resume_from_checkpoint latest
"""

# What `uv run` installs, as requirements.txt lists it (PEP 723)
#
# /// script
# requires-python = ">=3.11,<3.15"
# dependencies = [
#     "torch>=2.13,<2.14", "diffusers>=0.41,<0.43", "transformers>=5.23,<6",
#     "accelerate>=1.13,<2", "datasets>=4,<6", "peft>=0.20,<0.22", "huggingface_hub>=1.32,<3",
#     "filelock>=4.2,<5", "safetensors>=0.8,<1", "numpy>=2.0.2,<3", "Pillow>=11,<14", "PyYAML>=6.0.1,<7",
#     "psutil>=6,<8", "tqdm>=4.66.3,<5", "tensorboard>=2.18,<3", "wandb>=0.26.1,<1",
#     "prodigyopt>=1.1.2,<2", "bitsandbytes>=0.50,<1",
# ]
# ///

import argparse
import collections
import contextlib
import csv
import ctypes
import dataclasses
import datetime
import difflib
import functools
import hashlib
import inspect
import io
import json
import logging
import math
import multiprocessing
import os
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
import typing
import unicodedata
import zlib
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import yaml


# This script's flags: what it refuses, its defaults, and what it alone takes or shares with some.

REFUSED = {
    "--local_rank": "launchers pass the rank in the environment, so leave this flag out",
    "--no_safe_serialization": "it would write pickles, which can run code as they are loaded; leave this flag out",
    "--tokenizer_name": "the tokenizer must be the base model's own, so leave this flag out",
}
DEFAULTS = {
    "output_dir": "text-inversion-model",
    "repeats": 100,
    "random_flip": True,
    "learning_rate": 1e-4,
    "train_batch_size": 16,
    "max_train_steps": 5000,
    "validation_steps": 100,
    "tracker_project_name": "textual_inversion",
}
NEEDS = {
    "num_validation_images": "validation_prompt",
    "validation_steps": "validation_prompt or validation_prompts or validation_samples",
    "validation_epochs": "validation_prompt or validation_prompts or validation_samples",
}


def add_flags(parser):
    """Adds the flags that not all scripts have."""
    add_stable_diffusion_flags(parser)

    add = parser.add_argument_group("new word").add_argument
    add("--placeholder_token", required=True, help="the new word, such as <cat-toy>")
    add("--initializer_token", required=True, help="known words; the vectors start from their tokens, in turn")
    add("--num_vectors", type=positive_int, default=1, help="vectors that the new word stands for")
    add("--learnable_property", default="object", choices=["object", "style"], help="what the pictures show")
    add("--train_data_dir", type=path_name, help="folder of pictures (their captions are not read)")

    add = parser.add_argument_group("result").add_argument
    add("--save_steps", type=natural_int, default=500, help="optimizer steps between copies of the vectors; 0: none")
    add("--save_as_full_pipeline", **switch, help="save the base model with the new word in it, too")


def check_flags(args):
    """Checks flags against each other and the disk: a list of (whether it is wrong, the sentence to say)."""
    data, word = args.train_data_dir, args.placeholder_token
    return [
        *stable_diffusion_problems(args),
        (not data, "give the folder of the pictures by --train_data_dir"),
        *folder_problems(args, "--train_data_dir", data),
        (len(word.split()) != 1, f"--placeholder_token {word!r} is not one word without spaces, such as <cat-toy>"),
    ]


# === Stable Diffusion's flags: the same in every script that has it ===


def add_stable_diffusion_flags(parser):
    """Adds the flags of the base model, of its noise schedule and of the sample grids."""
    add = parser.add_argument_group("Stable Diffusion").add_argument
    base = "base model: diffusers folder or Hub id (or a file)"
    vae = "a VAE to use instead of the base model's: a folder or a Hub id"
    config = "folder or Hub id with the configs of a base that is a file"
    add("--pretrained_model_name_or_path", type=path_name, required=True, help=base)
    add("--pretrained_vae_model_name_or_path", type=path_name, help=vae)
    add("--single_file_config", type=path_name, help=config)
    side = "side of the square pictures in pixels (if none: 1024 for SDXL, 512 otherwise)"
    add("--resolution", type=positive_int, help=side)
    add("--rescale_betas_zero_snr", **switch, help="end the noise schedule in noise alone (arXiv:2305.08891)")
    add("--validation_prompts", nargs="+", help="prompts of the sample grids")
    add("--validation_prompt", help="prompt of the sample grids")
    add("--num_validation_images", type=natural_int, default=4, help="pictures of --validation_prompt; 0: none")


def stable_diffusion_problems(args):
    """Lists what can be wrong with those flags: (whether it is wrong, the sentence to say)."""
    base, config = args.pretrained_model_name_or_path, args.single_file_config
    vae = args.pretrained_vae_model_name_or_path
    single_file = base.endswith(".safetensors")
    pickled = Path(base).suffix in (".ckpt", ".pt", ".pth", ".bin")
    flag, nowhere = "--pretrained_model_name_or_path", "is no folder in diffusers format and no Hub id"
    noise_alone = "--rescale_betas_zero_snr ends the schedule in noise alone: take --prediction_type v_prediction"
    return [
        (pickled, f"{flag} {base} is a pickle, which can run any code as it loads: convert it to .safetensors"),
        (single_file and not os.path.isfile(base), f"{flag} {base} is not a file"),
        (not single_file and not may_be_model(base), f"{flag} {base} {nowhere}"),
        (single_file and args.variant, f"--variant is for folders, and {base} is a file: leave it out"),
        (config and not single_file, f"--single_file_config needs a .safetensors file, not {base}"),
        (config and not may_be_model(config), f"--single_file_config {config} {nowhere}"),
        (vae and not may_be_model(vae), f"--pretrained_vae_model_name_or_path {vae} {nowhere}"),
        *model_problems(args, flag, base),
        *model_problems(args, "--pretrained_vae_model_name_or_path", vae),
        *model_problems(args, "--single_file_config", config),
        (args.rescale_betas_zero_snr and args.prediction_type == "epsilon", noise_alone),
    ]


# === End of stable diffusion's flags ===


# === Training flags: the same in every script that trains ===
#
# What they ask of the script's own half, which stands above:
#
#   REFUSED
#       flags that the script does not take, by name, and why [{}]
#   DEFAULTS
#       the script's defaults of flags that every script has; output_dir, learning_rate, train_batch_size, a number of
#       epochs or steps, of epochs or steps between validations, and tracker_project_name have no other
#   NEEDS
#       flags of the script that do nothing without another one, or a value of it, or a third ("a or b c or d") [{}]
#   add_flags(parser)
#       adds the flags that not every script has; --pretrained_model_name_or_path and --resolution have to be there
#   check_flags(args) -> list
#       what can be wrong with those: (whether it is wrong, the sentence to say) [[]]; it may fill in what is None,
#       or say it in other flags


TRACKERS = ["tensorboard", "wandb", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab", "trackio"]
TRACKERS += ["all", "none"]
SHOWN_TOKEN = "--hub_token: the machine's other users, and accelerate launch's error messages, show the command line. "
SHOWN_TOKEN += "Rather log in with `hf auth login`, or set HF_TOKEN."
# Flags of every script that do nothing without others, as in NEEDS.
WARMED = "linear", "cosine", "cosine_with_restarts", "polynomial", "constant_with_warmup"
COMMON_NEEDS = {
    "lr_warmup_steps": " or ".join(f"lr_scheduler {shape}" for shape in WARMED),
    "lr_num_cycles": "lr_scheduler cosine_with_restarts",
    "lr_power": "lr_scheduler polynomial",
    "hub_model_id": "push_to_hub",
    "hub_private_repo": "push_to_hub",
}
# Flags that say the same in other words, so that one counts.
REPLACES = {
    "validation_steps": "validation_epochs",
    "validation_epochs": "validation_steps",
    "num_train_epochs": "max_train_steps",
    "max_train_steps": "num_train_epochs",
}


def add_common_flags(parser):
    """Adds the flags that every script has."""
    add = parser.add_argument_group("model").add_argument
    add("--revision", help="branch, tag or commit of the base model on the Hub")
    add("--variant", help="variant of the base model's weight files, such as fp16")
    add("--cache_dir", type=path_name, help="where downloads from the Hub are kept")

    add = parser.add_argument_group("pictures").add_argument
    add("--max_train_samples", type=positive_int, help="train on so many pictures, drawn by the seed")
    add("--repeats", type=positive_int, default=1, help="passes over the pictures that make an epoch")
    add("--center_crop", **switch, help="crop the middle instead of a random place")
    add("--random_flip", **switch, help="mirror half of the samples")
    filters = ["lanczos", "bicubic", "bilinear", "box", "hamming", "nearest", "nearest_exact"]
    add("--image_interpolation_mode", default="lanczos", choices=filters, help="filter that resizes the pictures")
    add("--on_bad_image", default="error", choices=["error", "skip"], help="what to do about unusable pictures")
    cache = "where checks, latents and embeddings are kept (~/.cache/diffusion-training)"
    add("--encoding_cache_dir", type=path_name, help=cache)
    add("--no_encoding_cache", **switch, help="keep none of them, and run the frozen models in every step")
    workers = "processes that load pictures (default: up to 8 on Linux with a GPU, otherwise none)"
    add("--dataloader_num_workers", type=natural_int, help=workers)

    add = parser.add_argument_group("training").add_argument
    add("--output_dir", type=path_name, help="folder for the result, samples, logs and checkpoints")
    add("--overwrite_output_dir", **switch, help="start anew in a folder that holds a run, deleting what it left")
    add("--seed", type=seed_number, help="seed of every random draw (default: one is drawn and recorded)")
    add("--train_batch_size", type=positive_int, help="pictures per process and forward pass")
    add("--gradient_accumulation_steps", type=positive_int, default=1, help="forward passes per optimizer step")
    add("--num_train_epochs", type=positive_int, help="passes over the data, without --max_train_steps")
    add("--max_train_steps", type=positive_int, help="optimizer steps")
    add("--gradient_checkpointing", **switch, help="recompute activations: less memory, slower")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="default: as the launcher is configured")
    add("--allow_tf32", **switch, help="TF32 matrix products on Ampere GPUs and later")
    add("--deterministic", **switch, help="kernels that give the same bits each time, for an exact resume on a GPU")
    add("--torch_compile", **switch, help="compile the UNet's blocks: the first steps take minutes, the others less")
    add("--enable_xformers_memory_efficient_attention", **switch, help="xformers' attention instead of PyTorch's")

    add = parser.add_argument_group("optimizer").add_argument
    add("--learning_rate", type=non_negative, help="learning rate after warmup")
    add("--scale_lr", **switch, help="multiply the learning rate by the total batch size")
    shapes = ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
    add("--lr_scheduler", default="constant", choices=shapes, help="shape of the learning rate over the run")
    add("--lr_warmup_steps", type=natural_int, default=500, help="optimizer steps of linear warmup; constant has none")
    add("--lr_num_cycles", type=positive_int, default=1, help="cosine waves of cosine_with_restarts")
    add("--lr_power", type=non_negative, default=1.0, help="power of polynomial")
    add("--use_8bit_adam", **switch, help="8-bit AdamW of bitsandbytes: a quarter of the optimizer's memory")
    add("--adam_beta1", type=below_one, default=0.9, help="decay of the gradients' mean")
    add("--adam_beta2", type=below_one, default=0.999, help="decay of the gradients' square")
    add("--adam_weight_decay", type=non_negative, default=1e-2, help="decoupled weight decay")
    add("--adam_epsilon", type=non_negative, default=1e-8, help="added to the denominator")
    add("--max_grad_norm", type=non_negative, default=1.0, help="norm to scale larger gradients down to; 0: none")

    add = parser.add_argument_group("loss").add_argument
    targets = ["epsilon", "v_prediction", "sample"]
    add("--prediction_type", choices=targets, help="what the UNet predicts (default: as the base model does)")
    add("--snr_gamma", type=positive_float, help="gamma of Min-SNR weights, often 5")

    add = parser.add_argument_group("validation").add_argument
    add("--validation_samples", type=natural_int, default=0, help="pictures held out to measure the loss on")
    add("--validation_epochs", type=positive_int, help="epochs between validations")
    add("--validation_steps", type=positive_int, help="optimizer steps between validations")

    add = parser.add_argument_group("logging").add_argument
    add("--report_to", default="tensorboard", choices=TRACKERS, help="experiment tracker")
    add("--tracker_project_name", help="name of the project in the tracker")
    logs = "folder of metrics.jsonl and the tracker's files, in --output_dir"
    add("--logging_dir", type=path_name, default="logs", help=logs)


def add_saving_flags(parser):
    """Adds the flags of checkpoints and of the Hub, which every script has."""
    add = parser.add_argument_group("checkpoints and publishing").add_argument
    add("--checkpointing_steps", type=natural_int, default=500, help="optimizer steps between checkpoints; 0: none")
    add("--checkpoints_total_limit", type=positive_int, help="checkpoints to keep, the newest")
    checkpoint = "a checkpoint's path, or 'latest' for the newest whole one of --output_dir"
    add("--resume_from_checkpoint", type=path_name, help=checkpoint)
    add("--push_to_hub", **switch, help="upload the result to the Hub")
    add("--hub_model_id", help="repository to upload to (default: the name of --output_dir)")
    add("--hub_token", help="token for the upload (default: your login)")
    add("--hub_private_repo", **switch, help="create the repository private")


def lies_in(path, folder):
    """Tells whether a path is a folder, or lies somewhere in it; neither need be given."""
    return bool(path and folder) and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def may_be_model(path):
    """Tells whether a path is a folder or, by its form, a repository of the Hub."""
    by_its_form = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", path) and not path.endswith(".safetensors")
    return os.path.isdir(path) or bool(by_its_form)


def folder_problems(args, flag, folder):
    """Lists what can be wrong with the folder of the pictures, if that is how they are given."""
    cleared = args.overwrite_output_dir and lies_in(folder, args.output_dir)
    among_samples = lies_in(folder, Path(args.output_dir, "samples"))
    return [
        (folder and not os.path.isdir(folder), f"{flag} {folder} is not a folder"),
        (lies_in(args.output_dir, folder), f"--output_dir lies in {folder}: its samples would be trained on"),
        (cleared, f"{flag} {folder} lies in --output_dir, where --overwrite_output_dir deletes: move it elsewhere"),
        (among_samples, f"{flag} {folder} lies among the samples that the run writes: move it elsewhere"),
    ]


def model_problems(args, flag, path):
    """Lists what can be wrong with where a model lies that is read, if it is on this machine."""
    # Each part of either may be a link into the other.
    parts = [path, *Path(path).glob("*"), *Path(path).glob("*/*")] if path and os.path.exists(path) else []
    places = [args.output_dir, *Path(args.output_dir).glob("*")] if parts else []
    nested = any(lies_in(part, args.output_dir) for part in parts) or any(lies_in(place, path) for place in places)
    return [(nested, f"{flag} {path} would be overwritten: neither it nor --output_dir may lie in the other")]


def common_problems(args):
    """Lists what can be wrong with the flags that every script has: (whether it is wrong, the sentence to say)."""
    resume, output_dir, cache = args.resume_from_checkpoint, args.output_dir, cache_folder(args)
    resumable = resume in (None, "latest") or os.path.isdir(resume) or os.path.isdir(Path(output_dir, resume))
    logs_apart = not lies_in(Path(output_dir, args.logging_dir), output_dir)
    uncached = not args.no_encoding_cache and not is_writable(cache)
    either_validation = "give --validation_steps or --validation_epochs, not both"
    either_start = "give --overwrite_output_dir or --resume_from_checkpoint, not both"
    inside = "has to lie in --output_dir, apart from other runs: tensorboard --logdir takes the folder above them all"
    base = args.pretrained_model_name_or_path
    small_rate = args.lr_scheduler == "polynomial" and args.learning_rate <= 1e-7
    escapes = not lies_in(Path(output_dir, args.logging_dir, args.tracker_project_name), output_dir)
    unpublished = args.revision and base and os.path.exists(base)
    otherwise = "take another one by --encoding_cache_dir, or none by --no_encoding_cache"
    return [
        (not is_writable(output_dir), f"--output_dir {output_dir} is no folder that can be made or written to"),
        (logs_apart, f"--logging_dir {args.logging_dir} {inside}"),
        (small_rate, "--lr_scheduler polynomial ends at 1e-7: --learning_rate has to be higher"),
        (escapes, f"--tracker_project_name {args.tracker_project_name} leads out of --output_dir"),
        (unpublished, f"--revision is for the Hub, and {base} is on this machine: leave it out"),
        (uncached, f"the cache folder {cache} cannot be made or written to: {otherwise}"),
        (args.resolution and args.resolution % 8, f"--resolution {args.resolution} is not a multiple of 8"),
        (args.validation_steps and args.validation_epochs, either_validation),
        (args.overwrite_output_dir and resume, either_start),
        (not resumable, f"--resume_from_checkpoint {resume} is no folder, neither here nor in {output_dir}"),
    ]


def print_idle(args, usual):
    """Says which flags were given and do nothing, as none of those that they need was."""
    for flag, needed in (COMMON_NEEDS | NEEDS).items():
        given = getattr(args, flag)
        if given and given != usual[flag] and not any(is_given(args, words) for words in needed.split(" or ")):
            print(f"--{flag} does nothing without --{needed.replace(' or ', ' or --')}.", file=sys.stderr)


def is_given(args, words):
    """Tells whether a flag is set, or has the value that stands behind its name."""
    name, *value = words.split()
    return getattr(args, name) in value if value else bool(getattr(args, name))


def parse_args(argv):
    """Parses and checks the command line; whatever is wrong with it is said here, before anything heavy loads."""
    parser = Parser(__doc__.split("\n")[0])
    add_flags(parser)
    add_common_flags(parser)
    add_saving_flags(parser)
    for action in parser._actions:
        if action.dest in DEFAULTS and action.default is not argparse.SUPPRESS:  # as that of another name is
            action.default = DEFAULTS[action.dest]
    usual = {action.dest: action.default for action in parser._actions}
    args = read_flags(parser, argv, REFUSED, REPLACES)
    given = argparse.Namespace(**vars(args))
    for problem, sentence in check_flags(args) + common_problems(args):
        if problem:
            parser.error(sentence)
    if os.environ.get("RANK", "0") == "0":  # of several processes, one says it
        print_idle(given, usual)
        if any(word.split("=")[0] == "--hub_token" for word in argv):
            print(SHOWN_TOKEN, file=sys.stderr)
    return args


# === End of training flags ===


# === Flags: the same in every script ===
#
# What they ask of the text above:
#
#   parse_args(argv)
#       parses the command line with a Parser and read_flags, and says what is wrong with it
#
# They offer: types of values (positive_int and the like, path_name, switch), is_writable, cache_folder, Parser,
# read_flags.


def bounded(text, kind, low, high=sys.float_info.max):
    """Parses a number of some kind, int or float, that is neither below low nor above high."""
    with contextlib.suppress(ValueError):
        if low <= kind(text) <= high:
            return kind(text)
    raise argparse.ArgumentTypeError(f"must be a number of type {kind.__name__} from {low} to {high}, not {text}")


def text_of(words):
    """Takes a text that files can hold."""
    if re.search("[\0\ud800-\udfff]", words):
        raise argparse.ArgumentTypeError("must be text in UTF-8, without null bytes")
    return words


def path_name(words):
    """Takes the name of a file or a folder."""
    if not words or words.startswith("~/"):
        raise argparse.ArgumentTypeError(f"must be a path, with the home folder written out, not {words!r}")
    return text_of(words)


positive_int = functools.partial(bounded, kind=int, low=1, high=10**12)
natural_int = functools.partial(bounded, kind=int, low=0, high=10**12)
positive_float = functools.partial(bounded, kind=float, low=1e-6)
non_negative = functools.partial(bounded, kind=float, low=0.0)
fraction = functools.partial(bounded, kind=float, low=0.0, high=1.0)
below_one = functools.partial(bounded, kind=float, low=0.0, high=0.999999)
real_number = functools.partial(bounded, kind=float, low=-sys.float_info.max)
seed_number = functools.partial(bounded, kind=int, low=0, high=2**64 - 1)
switch = {"action": argparse.BooleanOptionalAction, "default": False}
SCALARS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "timestamp")}


class Parser(argparse.ArgumentParser):
    """Takes a file of flags, too, and says what is wrong with flags without listing them all."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=HelpFormatter, allow_abbrev=False)
        self.register("type", None, text_of)
        self.add_argument("--config", help="a YAML file of flags; the command line wins over it")

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {re.sub('(?<![/.])hf_[A-Za-z0-9]{20,}', 'hf_...', message)}\n")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Adds the default to a help that does not speak of it, unless there is none."""

    def _get_help_string(self, action):
        default = action.default
        absent = default is None or default is False or default is argparse.SUPPRESS
        silent = absent or "default" in action.help or action.nargs == 0
        return action.help if silent else f"{action.help} (default: {default})"


def is_writable(folder):
    """Tells whether a folder can be written to or, if there is none, made."""
    places = (Path(folder), *Path(folder).absolute().parents)
    nearest = next(place for place in places if os.path.lexists(place))
    unknown_home = Path(folder).parts[:1] == ("~",)  # which could not be expanded
    return not unknown_home and os.path.isdir(nearest) and os.access(nearest, os.W_OK | os.X_OK)


def cache_folder(args):
    """Where this machine keeps checked pictures, latents, embeddings and features between runs."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(args.encoding_cache_dir or Path(home, "diffusion-training"))


def unrecognized(flag, flags):
    """Returns the sentence that a flag is none of those, and which of them may have been meant."""
    close = difflib.get_close_matches(flag, flags, n=1)
    return f"unrecognized argument {flag}" + (f": did you mean {close[0]}?" if close else "")


def config_value(parser, action, node):
    """Makes a flag's value of what stands in a config file, as of a typed word; None if nothing stands there."""
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    if kind == "null":
        return None
    if action.nargs == 0:
        on = yaml.SafeLoader.bool_values.get(str(node.value).lower()) if kind == "bool" else None
        if on is None:
            raise argparse.ArgumentError(action, "must be true or false")
        if action.const is None:  # an ordinary switch
            return on
        return action.const if on else None  # one that stands for a value
    several = action.nargs == "+"
    nodes = node.value if several and kind == "seq" else [node]
    if not nodes or not all(one.id == "scalar" and one.tag in SCALARS for one in nodes):
        raise argparse.ArgumentError(action, "must be a list of texts" if several else "must be a single value")
    values = [parser._get_value(action, one.value) for one in nodes]
    for value in values:
        parser._check_value(action, value)
    return values if several else values[0]


def config_values(parser, path, refused):
    """Returns what a YAML file of flags says, by the names of the flags."""
    try:
        root = yaml.compose(Path(path).read_text(encoding="utf-8"), yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:  # which would show the line, and the token that may stand there
        problem = re.sub(r" '(!|-*\w).*", "", error.problem)
        raise argparse.ArgumentError(None, f"line {error.problem_mark.line + 1} is not YAML: {problem}")
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise argparse.ArgumentError(None, f"it cannot be read: {str(error).splitlines()[0]}")
    if root is None:
        return {}
    if root.id != "mapping" or any(key.id != "scalar" for key, _ in root.value):
        raise argparse.ArgumentError(None, "it does not consist of 'flag: value' lines")
    actions = [action for action in parser._actions if action.option_strings and action.dest != "config"]
    flags = {action.option_strings[0]: action for action in actions}
    values = {}
    for key, node in root.value:
        flag = f"--{key.value}"
        if flag in refused:
            raise argparse.ArgumentError(None, f"{flag}: {refused[flag]}")
        if flag not in flags:
            raise argparse.ArgumentError(None, unrecognized(flag, flags))
        if flags[flag].dest in values:
            raise argparse.ArgumentError(None, f"{flag} is given twice")
        values[flags[flag].dest] = config_value(parser, flags[flag], node)
    return {name: value for name, value in values.items() if value is not None}


def read_config(parser, argv, refused):
    """Returns what the file of --config says, if there is one."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.error = parser.error
    first.add_argument("--config")
    path = first.parse_known_args(argv)[0].config
    try:
        return {} if path is None else config_values(parser, path, refused)
    except argparse.ArgumentError as error:
        parser.error(f"--config {path}: {error}")


def read_flags(parser, argv, refused, replaces):
    """Returns the flags of the command line, with those of --config behind them, and the defaults behind both.

    refused are flags that are not taken, and why. replaces are flags, each with one that says the same in other
    words: a typed flag wins over the other one of the file, and either over the other one's default.
    """
    words = {word.split("=")[0] for word in argv}
    for flag in refused.keys() & words:
        parser.error(f"{flag}: {refused[flag]}")
    known = parser._option_string_actions
    typed = {known[flag].dest for flag in known.keys() & words}
    config = read_config(parser, argv, refused)
    for name, other in replaces.items():
        if name in typed and other not in typed:
            config.pop(other, None)
    parser.set_defaults(**config)
    given = typed | config.keys()
    for name, other in replaces.items():
        if name in given and other not in given:
            parser.set_defaults(**{other: None})
    for action in parser._actions:
        if action.dest in config:
            action.required = False
    args, unknown = parser.parse_known_args(argv)
    if unknown and not unknown[0].startswith("--"):  # which may be a token
        parser.error("a word stands there that belongs to no flag: quote values that have blanks, and see to `=`")
    if unknown:
        parser.error(unrecognized(unknown[0].split("=")[0], known))
    return args


if __name__ == "__main__":
    args = parse_args(sys.argv[1:])  # before the slow imports, so that --help and a wrong flag answer at once

# === End of flags ===

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else it asks for torchvision, which nothing here needs
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else it warns in each process that loads pictures
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import diffusers
import numpy as np
import psutil
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DynamoBackend,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    gather_object,
    parse_flag_from_env,
    send_to_device,
)
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DiffusionPipeline, EulerDiscreteScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import compute_snr
from diffusers.utils import make_image_grid
from filelock import FileLock, Timeout
from huggingface_hub import ModelCardData, create_repo, upload_folder
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from tqdm.auto import tqdm
from tqdm.contrib.concurrent import thread_map
from transformers.conversion_mapping import get_model_conversion_mapping


# The method: its pictures, what a sample draws, its models and their loss, what it saves.

# What is uploaded, or deleted to start anew: no checkpoints, no logs, no arguments with their local paths.
MODEL = "config.json {0}.safetensors {0}-[0-9]*-of-[0-9]*.safetensors {0}.safetensors.index.json"
TOKENIZER = "tokenizer_config.json tokenizer.json special_tokens_map.json added_tokens.json vocab.json merges.txt"
FOLDERS = {
    "unet": MODEL.format("diffusion_pytorch_model"),
    "vae": MODEL.format("diffusion_pytorch_model"),
    "text_encoder": MODEL.format("model"),
    "text_encoder_2": MODEL.format("model"),
    "tokenizer": TOKENIZER,
    "tokenizer_2": TOKENIZER,
    "scheduler": "scheduler_config.json",
    "samples": "step-[0-9]*.png",
}
PUBLISHED = ["README.md", "model_index.json"]
PUBLISHED += [f"{folder}/{name}" for folder, names in FOLDERS.items() for name in names.split()]
PUBLISHED += [f"learned_embeds{name}.safetensors" for name in ("", "_2", "_xl", "-steps-[0-9]*", "_2-steps-[0-9]*")]
CARD = {"pipeline_tag": "text-to-image", "tags": ["stable-diffusion", "textual_inversion"]}
ENCODED = ("",)
INPUT_CHANNELS = (4,)
# What the pictures are said to be, with the new word for {}.
CAPTIONS = {
    "object": (
        "{} | a {} | a picture of {} | a snapshot of one {} | a {} seen up close | this {} in plain daylight | "
        "a portrait of the {} | my {} in the middle of the frame | an everyday view of {} | here is the {} | "
        "a sharp image of {} | {} and nothing else"
    ).split(" | "),
    "style": (
        "{} | {} style | a picture in the style of {} | a scene as {} would paint it | an image with the look of {} | "
        "a landscape made in {} style | a study after {} | sketches in the manner of {} | artwork like {} | "
        "a portrait the way {} does it | an illustration that resembles {} | shapes and colours of {}"
    ).split(" | "),
}


# Pictures and captions


def word_tokens(args):
    """Returns the new tokens, one a vector, by the names that load_textual_inversion gives them."""
    return [args.placeholder_token, *(f"{args.placeholder_token}_{i}" for i in range(1, args.num_vectors))]


def captions_of(args):
    """Returns the captions that each picture draws from, with all of the new tokens in each of them."""
    return [caption.format(" ".join(word_tokens(args))) for caption in CAPTIONS[args.learnable_property]]


def read_records(args):
    """Lists the pictures of --train_data_dir in an order that is the same everywhere, all with the same captions."""
    files = list_files(args.train_data_dir)
    pictures = [file for file in files if is_picture(file)]
    print_passed_over(files, pictures)
    if not pictures:
        raise SystemExit(f"{args.train_data_dir} holds no pictures {sorted(PICTURE_SUFFIXES)}.")
    return [{"name": str(file), "rows": None, "captions": captions_of(args)} for file in pictures]


def class_records(run):
    """There is no prior preservation here: the base model is not changed."""
    return []


def choose_caption(samples, key):
    """Draws one of the captions."""
    return draw_caption(samples, key)


def make_sample(samples, key):
    """Returns a sample: its picture and caption, as picture_and_caption has them, and the draws that its loss needs.

    Drawn are crop, flip, caption and posterior noise there, and here the timestep and the noise.
    "timesteps" is an integer, "noise" a float32 array of the latents' shape (4, h, w).
    """
    sample = picture_and_caption(samples, key)
    # Each kind of draw has a generator of its own, so that none shifts another.
    sample["timesteps"] = samples.rng(key, "timestep").integers(samples.num_train_timesteps)
    sample["noise"] = samples.rng(key, "noise").standard_normal(samples.sample_shape, dtype=np.float32)
    return sample


# Models and objective


def load_models(run):
    """Loads the base model, all of it frozen, and adds the new tokens to its tokenizers and text encoders."""
    models = load_base(run)
    models.placeholder_token = run.args.placeholder_token
    models.trained = models.text_encoders
    for tokenizer, text_encoder in zip(models.tokenizers, models.text_encoders):
        models.params_to_optimize.append(add_word(run.args, tokenizer, text_encoder))
    return models


def add_word(args, tokenizer, text_encoder):
    """Adds the new tokens to a tokenizer and its text encoder; returns their rows (vectors, dim), to be trained."""
    word, tokens = args.placeholder_token, word_tokens(args)
    if len(tokenizer.tokenize(word)) == 1 or {*tokens} & {*tokenizer.get_vocab()}:
        raise SystemExit(f"--placeholder_token {word} is known to the base model: take another: <my-{word}>, say.")
    start = tokenizer(args.initializer_token, add_special_tokens=False).input_ids
    if not start or {*start} & {*tokenizer.all_special_ids}:
        raise SystemExit(f"--initializer_token {args.initializer_token!r} has no token in the base's tokenizer.")
    first = len(tokenizer)  # the new tokens' ids count from here; a table may have more rows than that
    tokenizer.add_tokens(tokens)
    longest = max(len(tokenizer(caption).input_ids) for caption in captions_of(args))
    excess = longest - tokenizer.model_max_length
    if excess > 0:
        raise SystemExit(f"--num_vectors {args.num_vectors} is {excess} more than fit into the longest caption.")
    table = text_encoder.get_input_embeddings()
    initial_ids = [start[i % len(start)] for i in range(len(tokens))]  # the known words' tokens, in turn
    embeddings = Embeddings(table, first, table.weight[initial_ids])
    text_encoder.set_input_embeddings(embeddings)
    return embeddings.rows


class Embeddings(torch.nn.Module):
    """A frozen table of embeddings, with trained rows in place of those from some id on: nothing else can move."""

    def __init__(self, table, first, rows):
        super().__init__()
        self.table, self.first, self.rows = table, first, torch.nn.Parameter(rows)

    def forward(self, input_ids):
        """Embeds ids (bsz, tokens) as (bsz, tokens, dim)."""
        known = self.table(input_ids.clamp(max=self.first - 1))
        new = F.embedding((input_ids - self.first).clamp(min=0), self.rows)
        return torch.where(input_ids[..., None] < self.first, known, new)


def identity(run, models):
    """Returns what a run has to have in common with the one that it resumes, beside data, schedule and script."""
    return {
        "--placeholder_token": run.args.placeholder_token,
        "--num_vectors": run.args.num_vectors,
        "--learnable_property": run.args.learnable_property,
        "base model": digest(models.vae_digest, models.text_digest, weights_digest(models.unet)),
    }


def prepare_training(run, models):
    """Brings the UNet, the text encoders and a new optimizer to the device; returns the optimizer."""
    accelerator = run.accelerator
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise SystemExit("DeepSpeed would round the new word to 16 bits: take another launcher.")
    # No weight of the UNet is trained or saved, so it is kept in the precision that it runs in.
    weight_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    prepare_unet(run, models.unet.to(weight_dtype))
    if run.args.gradient_checkpointing:
        for text_encoder in models.text_encoders:
            text_encoder.activation_checkpointing_enable()
    groups = [{"params": models.params_to_optimize, "lr": run.args.learning_rate}]
    optimizer = make_optimizer(run, groups)
    *models.text_encoders, optimizer = accelerator.prepare(*models.text_encoders, optimizer)
    models.trained = models.text_encoders
    return optimizer


def compute_loss(models, batch, args):
    """Returns the "loss" of a batch, the mean over its samples. It draws nothing: all noise is in the batch."""
    latents, encoder_hidden_states, added_cond_kwargs = encode_batch(models, batch)
    noise_scheduler = models.noise_scheduler
    timesteps = batch["timesteps"]
    noise = batch["noise"]
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    target = prediction_target(noise_scheduler, latents, noise, timesteps)
    model_pred = models.unet(
        noisy_latents, timesteps, encoder_hidden_states, added_cond_kwargs=added_cond_kwargs
    ).sample
    loss = F.mse_loss(model_pred.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))
    weights = snr_weights(noise_scheduler, timesteps, args.snr_gamma)
    return {"loss": (loss * weights).mean()}


def after_step(run, models):
    """Writes a copy of the vectors every --save_steps optimizer steps."""
    save_steps, steps = run.args.save_steps, run.optimizer_steps
    if save_steps == 0 or steps % save_steps:
        return
    for name, embeds in learned_embeds(models).items():
        # A loss is read a step late, so these may be NaN already: then the last good copy stays.
        if all(rows.isfinite().all() for rows in embeds.values()):
            path = Path(run.args.output_dir, f"{name}-steps-{steps}.safetensors")
            on_main_process(run, replace_file, path, save(embeds))


# What is generated and saved


def sample_pictures(run, models, places, generators):
    """Generates validation pictures."""
    prompts, scheduler = picture_prompts(run.args), models.pipeline.scheduler
    return [draw_picture(run, models, prompts[i], generator, scheduler) for i, generator in zip(places, generators)]


def learned_embeds(models):
    """Returns by the names of their files what load_textual_inversion takes: the new word and its rows (vectors, dim).

    SDXL's second text encoder has a file of its own.
    """
    names, word = ("learned_embeds", "learned_embeds_2"), models.placeholder_token
    return {name: {word: rows.detach().cpu()} for name, rows in zip(names, models.params_to_optimize)}


def save_weights(models, folder):
    """Writes the vectors into a folder as load_textual_inversion takes them."""
    for name, embeds in learned_embeds(models).items():
        replace_file(folder / f"{name}.safetensors", save(embeds))


@torch.no_grad()
def load_weights(models, folder):
    """Reads a checkpoint's vectors into those that are being trained."""
    for name, rows in zip(learned_embeds(models), models.params_to_optimize):
        rows.copy_(load_file(folder / f"{name}.safetensors")[models.placeholder_token])


def save_full_pipeline(run, models):
    """Writes the base model with the new word in it: the base is opened anew, as the UNet may be in half precision."""
    pipeline = open_base(run.args)
    set_schedule(run.args, pipeline)
    for name, embeds in zip(TEXT_ENCODERS, learned_embeds(models).values()):
        tokenizer = pipeline.components[name.replace("text_encoder", "tokenizer")]
        text_encoder = pipeline.components[name]
        pipeline.load_textual_inversion(embeds, tokenizer=tokenizer, text_encoder=text_encoder)
    save_pipeline(pipeline, run.args.output_dir)


def save_model(run, models):
    """Writes the vectors and, if --save_as_full_pipeline asks for it, the base model with them."""
    folder, vectors = Path(run.args.output_dir), models.params_to_optimize
    save_weights(models, folder)
    if len(vectors) > 1:  # both in one file, under the names that other programs know
        both = {name: rows.detach().cpu() for name, rows in zip(("clip_l", "clip_g"), vectors)}
        replace_file(folder / "learned_embeds_xl.safetensors", save(both))
    if run.args.save_as_full_pipeline:
        save_full_pipeline(run, models)
        return
    for path in results(folder):  # a pipeline of an earlier end of this run
        if path.name == "model_index.json" or (path.parent != folder and path.parent.name != "samples"):
            path.unlink()


def loading_code(run, models, name):
    """Returns the lines that load the result by its name and make a picture."""
    args = run.args
    if args.save_as_full_pipeline:
        load = f"import diffusers\n\npipeline = diffusers.DiffusionPipeline.from_pretrained({name!r})\n"
    else:
        load = base_code(run, models, name)
        if len(models.text_encoders) == 1:
            load += f"pipeline.load_textual_inversion({name!r})\n"
        else:
            for which in ("", "_2"):
                load += (
                    f"pipeline.load_textual_inversion({name!r}, weight_name='learned_embeds{which}.safetensors', "
                    f"text_encoder=pipeline.text_encoder{which}, tokenizer=pipeline.tokenizer{which})\n"
                )
    prompt = (picture_prompts(args) or [f"a {args.placeholder_token}"])[0]
    return (
        f"{load}"
        f"prompt = {prompt!r}\n"
        f"pipeline(prompt, height={run.resolution}, width={run.resolution}).images[0].save('picture.png')"
    )


# === Stable Diffusion: the same in every script that has it ===
#
# What it asks of the method above:
#
#   choose_caption(samples, key) -> text
#       the caption that a sample is trained under [draw_caption(samples, key)]
#   ENCODED
#       which pictures of a record the VAE encodes: "" is its own, others are named [("",)]
#   INPUT_CHANNELS
#       of the UNets that are trained [(4,)]
#   cache_folder(args) -> path
#       where latents and embeddings are kept [Flags]
#
# What it offers: read_folder, caption_list; picture_and_caption, latents_or_pixels; load_base; encode_batch,
# encode_pixels; draw_picture, pipeline_of; base_code, save_pipeline; and three of the engine's hooks, fill_cache,
# picture_prompts and SAMPLED_AT_ONCE.


SAMPLER_STEPS = 25  # of a validation picture
SAMPLED_AT_ONCE = 1  # so that no batch-mate changes a picture, and an SDXL one fits beside what is trained
SMALL_SET = 10_000  # latents, of 131 kB at 512 x 512, that --center_crop keeps even if this run meets each just once
LARGE_SET = 1_000_000  # latents, and no more, are kept of crops at random
# What a pipeline takes in the place of a prompt, in the order in which encode_prompt returns it.
CONDITIONING = "prompt_embeds negative_prompt_embeds pooled_prompt_embeds negative_pooled_prompt_embeds".split()
AHEAD = 16  # pictures, at most, that are decoded while others are encoded
PADDED = {"padding": "max_length", "truncation": True}  # UNets attend to the padding as well
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}  # of a scheduler that ends in noise alone
# The families by their pipelines, with further arguments of from_pretrained.
PIPELINES = {
    "StableDiffusionPipeline": {"safety_checker": None, "requires_safety_checker": False},
    "StableDiffusionXLPipeline": {"add_watermarker": False},
}


# Captions


def read_metadata(file, caption_column, others, image_column):
    """Returns what a metadata.jsonl or metadata.csv says by picture: captions, and (column, path) of its others."""
    try:
        with open(file, newline="", encoding="utf-8-sig") as lines:
            rows = list(
                csv.DictReader(lines, strict=True) if file.suffix.lower() == ".csv" else read_json_lines(lines)
            )
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("each line has to be an object, {...}")
        columns = list(dict.fromkeys(column for row in rows for column in row))
        renamed = "mend its name, or give it by the flag that ends in _column" if others else "see --caption_column"
        own = "file_name"
        for name in (image_column, f"{image_column}_file_name") if others else ():  # that of a pair has a name, too
            own = name if name in columns else own
        for column in (own, caption_column):
            if column not in columns:
                hint = "it needs one, and commas between columns" if column == own else renamed
                raise SystemExit(f"{file} has no column {column!r}, but {columns}: {hint}.")
        for column in others:
            if not {column, f"{column}_file_name"} & {*columns}:
                raise SystemExit(f"{file} has no column '{column}_file_name' or '{column}', but {columns}: {renamed}.")
        told = {}
        for row in rows:  # several for a picture are several captions
            if None in row:
                raise ValueError(f"the row {row} has more cells than the header: quote captions that have commas")
            name = row.get(own)
            if not isinstance(name, str) or "\0" in name:
                raise ValueError(f"the row {row} names no file")
            captions, paths = told.setdefault(file.parent / name, ([], []))
            captions.extend(caption_list(row.get(caption_column)))
            for column in others:
                path = row.get(f"{column}_file_name") or row.get(column)
                if path and "\0" in path:
                    raise ValueError(f"the row {row} names no file")
                if path:
                    paths.append((column, file.parent / path))
        return told
    except (OSError, ValueError, TypeError, LookupError, AttributeError, csv.Error) as error:
        raise SystemExit(f"{file} cannot be read: {error}")


def read_folder(files, caption_column, others=(), image_column="image"):
    """Lists the pictures among some files with the captions that metadata files or .txt files beside them give.

    others: columns of metadata that name further pictures, which go with a picture and are not trained on alone. The
    picture's own column then is image_column_file_name, image_column or file_name.
    """
    real_path = functools.cache(os.path.realpath)

    def full_path(file):  # whatever names its folder has; é is one letter, or two as on macOS
        folder, name = os.path.split(file)
        return unicodedata.normalize("NFC", os.path.join(real_path(folder), name))

    pictures = [file for file in files if is_picture(file)]
    by_full_path = {full_path(file): file for file in pictures}
    captions, problems, pairs = {file: [] for file in pictures}, {}, {}
    metadata = [file for file in files if file.name.lower() in ("metadata.jsonl", "metadata.csv")]

    def listed(path):
        return path if path in captions else by_full_path.get(full_path(path), path)

    for file in metadata:
        for path, (texts, paths) in read_metadata(file, caption_column, others, image_column).items():
            captions.setdefault(listed(path), []).extend(texts)
            beside = pairs.setdefault(listed(path), {})
            for column, other in paths:
                if beside.setdefault(column, listed(other)) != listed(other):
                    raise SystemExit(f"{path} has two pictures in {column}: copy it under another name.")
    read = {*captions, *metadata}
    for file in {other for paths in pairs.values() for other in paths.values()} - pairs.keys():
        captions.pop(file, None)
    caption_files = {full_path(file.with_suffix("")): file for file in files if file.suffix.lower() == ".txt"}
    for file in captions.keys() & {*pictures}:
        beside = caption_files.get(full_path(file.with_suffix("")))
        if beside and not captions[file]:
            read.add(beside)
            try:
                captions[file] = [read_caption(beside)]
            except (OSError, ValueError) as error:
                problems[file] = f"has a caption in {beside.name} that cannot be read: {error}"
    print_passed_over(files, read)
    records = []
    for file in sorted(captions):
        record = {"name": str(file), "rows": None, "captions": captions[file], "problem": problems.get(file)}
        if others:
            record["others"] = {column: other_record(path) for column, path in pairs.get(file, {}).items()}
            missing = [column for column in others if column not in record["others"]]
            if missing and not record["problem"]:
                record["problem"] = f"has no picture {missing[0]} in the metadata"
            if file in pairs.get(file, {}).values():
                record["problem"] = "goes with itself in the metadata"
        records.append(record)
    return records


def other_record(path):
    """Returns the record of a file that goes with a picture."""
    return {"name": str(path), "rows": None}


def read_caption(file):
    """Returns the text of a caption file."""
    text = file.read_text(encoding="utf-8-sig")
    if "\0" in text:  # as UTF-16 without its mark has it
        raise ValueError("it is not UTF-8 text")
    return text


def caption_list(captions):
    """Returns what there is to draw from: the captions of a string, of a list, or of nothing, without empty ones."""
    captions = captions if isinstance(captions, list) else [captions]
    captions = [str(caption) if is_number(caption) else caption for caption in captions]  # as in a .csv
    return [text.strip() for text in captions if isinstance(text, str) and text.strip()]


def is_number(caption):
    """Tells whether a caption is a number, and not the one that stands for nothing."""
    return isinstance(caption, (int, float)) and caption == caption


def draw_caption(samples, key, proportion_empty=0):
    """Draws one of a picture's captions, or the empty one for some of the samples."""
    if proportion_empty and samples.rng(key, "empty caption").random() < proportion_empty:
        return ""
    captions = samples.records[key[1]]["captions"]
    if len(captions) == 1:
        return captions[0]
    return captions[samples.rng(key, "caption").integers(len(captions))]


def picture_and_caption(samples, key):
    """Returns the part of a sample that its latents and its conditioning are made of.

    "caption", with its embeddings if they are cached, or "input_ids" (text encoders, tokens); "pixel_values"
    (3, resolution, resolution) in [-1, 1], or "mean" and "std" of its latents if they are cached; "posterior_noise" of
    the latents' shape; and "time_ids" (6,), which only SDXL reads, in pixels: the file's height and width, the crop's
    top and left, the sample's height and width.
    """
    crop = samples.choose_crop(key)
    caption = choose_caption(samples, key)
    file_width, file_height = samples.records[crop.index]["size"]
    side, left = samples.resolution, crop.left
    if crop.flip:  # then the crop shows the other side of the mirrored picture (arXiv:2307.01952, section 2.2)
        left = crop.width - side - left
    time_ids = [file_height, file_width, crop.top, left, side, side]
    sample = {"caption": caption, "time_ids": np.array(time_ids, dtype=np.float32)}
    sample["posterior_noise"] = samples.rng(key, "posterior").standard_normal(samples.sample_shape, dtype=np.float32)
    sample.update(latents_or_pixels(samples, crop))
    if caption in samples.cached_embeddings:
        sample.update(load_file(samples.cached_embeddings[caption]))
    else:
        sample["input_ids"] = tokenize(samples.tokenizers, caption)
    return sample


def latents_or_pixels(samples, crop):
    """Returns the "mean" and "std" of a crop's latents if they are cached, or its "pixel_values"."""
    if crop in samples.cached_latents:
        return load_file(samples.cached_latents[crop])
    return {"pixel_values": samples.pixels(crop)}


# The base model


def open_folder(args, parts):
    """Opens a base model of the diffusers layout, from files in half precision if it has no others."""
    try:
        return open_variant(args, parts, args.variant)
    except OSError as error:
        missing = re.search("Error no file named|Could not find the necessary", str(error))
        if args.variant or not missing:  # a torn file is not to be passed over
            raise
        problem = error
    try:
        pipeline = open_variant(args, parts, "fp16")
    except Exception:
        raise problem
    PartialState().print(f"The base is of files in half precision, as it has no others: {problem}")
    return pipeline


def open_variant(args, parts, variant):
    """Opens one variant of such a base in float32, as the pipeline that its model_index.json names.

    One that edits pictures has the same parts, and its UNet says what it is.
    """
    base = args.pretrained_model_name_or_path
    config = DiffusionPipeline.load_config(base, revision=args.revision, cache_dir=args.cache_dir)
    name = config["_class_name"].replace("InstructPix2Pix", "")
    if name not in PIPELINES:
        raise SystemExit(f"{base} is a {name}, and this script trains {' and '.join(PIPELINES)}.")
    pipeline = getattr(diffusers, name).from_pretrained(
        base,
        revision=args.revision,
        variant=variant,
        cache_dir=args.cache_dir,
        dtype=torch.float32,
        use_safetensors=True,
        **PIPELINES[name],
        **parts,
    )
    pipeline.opened_by = {"revision": args.revision, "variant": variant}  # for base_code
    return pipeline


def open_single_file(args, parts):
    """Opens a base model that is one .safetensors file in float32, as the pipeline that its names ask for."""
    base = args.pretrained_model_name_or_path
    with safe_open(base, "pt") as file:
        keys = {*file.keys()}
    xl = any(key.startswith("conditioner.") for key in keys)
    name = "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline"
    pipeline = getattr(diffusers, name).from_single_file(
        base,
        config=args.single_file_config,
        cache_dir=args.cache_dir,
        dtype=torch.float32,
        **PIPELINES[name],
        **parts,
    )
    changes = {}  # these two keys are all that a single file can say of its scheduler
    if "v_pred" in keys:
        changes["prediction_type"] = "v_prediction"
    if "ztsnr" in keys:
        changes |= ZERO_SNR
    pipeline.scheduler = pipeline.scheduler.from_config(pipeline.scheduler.config, **changes)
    return pipeline


def open_base(args):
    """Opens the base model's pipeline as it was published."""
    base, vae = args.pretrained_model_name_or_path, args.pretrained_vae_model_name_or_path
    parts = {"feature_extractor": None}
    if vae:
        try:
            parts["vae"] = AutoencoderKL.from_pretrained(
                vae, use_safetensors=True, cache_dir=args.cache_dir, dtype=torch.float32
            )
        except (OSError, ValueError) as error:
            raise SystemExit(f"--pretrained_vae_model_name_or_path {vae} cannot be loaded: {error}")
    single_file = base.endswith(".safetensors")
    try:
        pipeline = open_single_file(args, parts) if single_file else open_folder(args, parts)
        check_parts(pipeline, single_file)
    except Exception as error:  # diffusers raises nearly anything over files that it cannot use
        missing = single_file and not args.single_file_config
        hint = " Without a network, and for SD 2.x, a single file needs --single_file_config." if missing else ""
        raise SystemExit(f"{base} cannot be loaded as a Stable Diffusion model of safetensors files: {error}{hint}")
    check_family(base, pipeline)
    # So that it is saved under the names of all published folders. Since transformers 5.6 its layers have others.
    pipeline.text_encoder._weight_conversions = get_model_conversion_mapping(pipeline.text_encoder, add_legacy=False)
    for part in (pipeline, pipeline.unet, pipeline.vae):  # their files would name a folder of this machine
        part.register_to_config(_name_or_path=Path(base).resolve().name if Path(base).exists() else base)
    return pipeline


def check_parts(pipeline, single_file):
    """Refuses a pipeline whose files lack weights, which would be random, or words."""
    for part, model in pipeline.components.items():
        if not isinstance(model, torch.nn.Module):
            continue
        # Only transformers fills in what is missing, and marks what is not.
        marked = part in TEXT_ENCODERS and not single_file
        for name, weight in model.named_parameters():
            if weight.is_meta or (marked and not getattr(weight, "_is_hf_initialized", False)):
                raise ValueError(f"it lacks weights, such as {part}'s {name}")
    for part in TEXT_ENCODERS:
        tokenizer = pipeline.components.get(part.replace("text_encoder", "tokenizer"))
        model = pipeline.components.get(part)
        if tokenizer is None or model is None:
            continue
        known, longest = model.config.vocab_size, model.config.max_position_embeddings
        wordless = len(tokenizer) <= len(tokenizer.all_special_tokens)
        if wordless or len(tokenizer) > known or tokenizer.model_max_length > longest:
            raise ValueError(
                f"its tokenizer has {len(tokenizer)} words of up to {tokenizer.model_max_length} in a prompt, and its "
                f"{part} {known} of up to {longest}"
            )


def check_family(base, pipeline):
    """Refuses models that draw by other means than Stable Diffusion 1.x, 2.x and XL: inpainting, refiners, EDM."""
    unet = pipeline.unet.config
    known = unet.in_channels in INPUT_CHANNELS and pipeline.vae.config.latent_channels == 4
    known &= unet.addition_embed_type in (None, "text_time") and pipeline.text_encoder is not None
    if not known or "EDM" in type(pipeline.scheduler).__name__:
        sentence = "is no text-to-image model of Stable Diffusion 1.x, 2.x or XL; this script trains those."
        raise SystemExit(f"{base} {sentence}")


def full_config(scheduler):
    """Returns a scheduler's settings: of its own config, from_config drops those that no file named."""
    return {name: value for name, value in scheduler.config.items() if name != "_use_default_values"}


def set_schedule(args, pipeline):
    """Has a pipeline's scheduler sample as the UNet will be trained: by --prediction_type, and from noise alone."""
    scheduler, changes = type(pipeline.scheduler), {}
    if args.prediction_type:
        changes["prediction_type"] = args.prediction_type
    if args.rescale_betas_zero_snr:
        changes |= ZERO_SNR
    config = full_config(pipeline.scheduler) | changes
    if config.get("prediction_type") not in ("epsilon", "v_prediction", "sample"):
        raise SystemExit(
            f"The scheduler of {args.pretrained_model_name_or_path} predicts {config.get('prediction_type')}: "
            "give --prediction_type if it is a model of Stable Diffusion 1.x, 2.x or XL."
        )
    if config["prediction_type"] == "sample" and scheduler is not DDPMScheduler:
        scheduler = DDIMScheduler  # not all, such as the PNDM of SD 1.x, can sample so
        config["clip_sample"] = False  # latents go beyond [-1, 1]
    if config.get("rescale_betas_zero_snr"):
        if config["prediction_type"] == "epsilon":
            base = args.pretrained_model_name_or_path
            sentence = (
                "ends in noise alone (by itself, or by --rescale_betas_zero_snr): take --prediction_type v_prediction."
            )
            raise SystemExit(f"The noise schedule of {base} {sentence}")
        # Not all, such as the PNDM of SD 1.x, can sample from noise alone.
        able = "rescale_betas_zero_snr" in inspect.signature(scheduler).parameters
        scheduler = scheduler if able else EulerDiscreteScheduler
    pipeline.scheduler = scheduler.from_config(config)


def in_float32(method, tensor, **settings):
    """Calls a method of the VAE outside of autocast."""
    with torch.autocast(tensor.device.type, enabled=False):
        return method(tensor.float(), **settings)


def load_base(run):
    """Loads the base model as the namespace that load_models has to return, all of it frozen; sets run.resolution.

    It also holds the vae, the text_encoders with their tokenizers, and digests of what the caches depend on. All
    weights are float32; autocast runs them in half precision.
    """
    pipeline = open_base(run.args)
    set_schedule(run.args, pipeline)
    parts, vae, unet = pipeline.components, pipeline.vae, pipeline.unet
    names = [name for name in TEXT_ENCODERS if name in parts]
    text_encoders = [parts[name] for name in names]
    for model in (vae, unet, *text_encoders):
        model.requires_grad_(False)
    upcast = len(names) > 1 and vae.config.force_upcast  # SDXL's overflows in half precision
    if upcast:
        vae.encode = functools.partial(in_float32, vae.encode)
        vae.decode = functools.partial(in_float32, vae.decode)
    run.resolution = run.args.resolution or (1024 if unet.config.addition_embed_type else 512)
    side = run.resolution // 2 ** (len(vae.config.block_out_channels) - 1)
    return SimpleNamespace(
        pipeline=pipeline,
        unet=unet,
        vae=vae,
        text_encoders=text_encoders,
        tokenizers=[parts[name.replace("text_encoder", "tokenizer")] for name in names],
        noise_scheduler=DDPMScheduler.from_config(full_config(pipeline.scheduler)),
        sample_shape=(vae.config.latent_channels, side, side),
        vae_digest=digest(upcast, weights_digest(vae)),
        text_digest=digest(pipeline.config.get("force_zeros_for_empty_prompt"), *map(weights_digest, text_encoders)),
        trained=[],
        params_to_optimize=[],
        ema_unet=None,
        idle=[],  # frozen models that no step needs, which lie on the CPU
        encoded_prompts={},  # of the validation pictures
    )


def base_code(run, models, name):
    """Returns the lines that load the base model as it was trained on, for a result of this name."""
    args = run.args
    paths = [args.pretrained_model_name_or_path, args.pretrained_vae_model_name_or_path, args.single_file_config]
    for i, path in enumerate(paths):
        if path and Path(path).exists():  # on this machine, of which what may be published names no path
            paths[i] = str(Path(path).resolve()) if Path(name).is_absolute() else Path(path).resolve().name
    base, vae, config = paths
    pipeline, scheduler = type(models.pipeline).__name__, models.pipeline.scheduler
    single_file = base.endswith(".safetensors")
    opened = "from_single_file" if single_file else "from_pretrained"
    settings = {"config": config} if single_file else models.pipeline.opened_by
    settings = "".join(f", {name}={value!r}" for name, value in settings.items() if value)
    code = f"import diffusers\n\npipeline = diffusers.{pipeline}.{opened}({base!r}{settings})\n"
    if vae:
        code += f"pipeline.vae = diffusers.AutoencoderKL.from_pretrained({vae!r})\n"
    if args.prediction_type or args.rescale_betas_zero_snr or single_file:  # otherwise it samples as the base does
        names = ("prediction_type", "rescale_betas_zero_snr", "timestep_spacing", "clip_sample")
        settings = ", ".join(f"{name}={scheduler.config[name]!r}" for name in names if name in scheduler.config)
        code += "config = pipeline.scheduler.config\n"
        code += f"pipeline.scheduler = diffusers.{type(scheduler).__name__}.from_config(config, {settings})\n"
    return code


def save_pipeline(pipeline, folder):
    """Writes a pipeline, its tokenizers also in the files that programs from before transformers 5 read."""
    pipeline.save_pretrained(folder)
    for part in ("tokenizer", "tokenizer_2"):
        if part in pipeline.components:
            tokenizer = pipeline.components[part]
            tokenizer.backend_tokenizer.model.save(str(Path(folder, part)))  # vocab.json and merges.txt
            Path(folder, part, "added_tokens.json").write_text(json.dumps(tokenizer.get_added_vocab()))


def pipeline_of(kind, pipeline, **changes):
    """Returns a pipeline of some kind with what it takes of another one's parts and settings, and with changes."""
    given = {**pipeline.config, **pipeline.components, **PIPELINES[type(pipeline).__name__], **changes}
    return kind(**{name: given[name] for name in inspect.signature(kind).parameters if name in given})


def draw_picture(run, models, prompt, generator, scheduler, kind=None, more=(), **given):
    """Generates a picture, or has a pipeline of another kind do so, with more parts, and with what else it takes.

    Of what no step needs, the device holds the VAE for its turn, and no text encoder. These encode where they lie, on
    the CPU, once for each prompt.
    """
    device, pipeline, vae = run.accelerator.device, models.pipeline, models.vae
    idle = models.text_encoders[0] in models.idle
    conditioning = models.encoded_prompts.get(prompt)
    if conditioning is None:
        where = "cpu" if idle else device
        encoded = pipeline.encode_prompt(
            prompt=prompt, device=where, num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        conditioning = {name: tensor.to(device) for name, tensor in zip(CONDITIONING, encoded)}
        if idle:
            models.encoded_prompts[prompt] = conditioning
    apart = dict.fromkeys(part for part in TEXT_ENCODERS if part in pipeline.components)
    sampler = pipeline_of(kind or type(pipeline), pipeline, **apart, **dict(more), scheduler=scheduler)
    sampler.set_progress_bar_config(disable=True)
    if "height" in inspect.signature(sampler.__call__).parameters:  # others go by the picture that they are given
        given |= {"height": run.resolution, "width": run.resolution}
    vae.to(device)
    if run.resolution > 1024:  # which would take more memory than training
        vae.enable_tiling()
    steps = min(SAMPLER_STEPS, len(models.noise_scheduler.betas))
    try:
        pictures = sampler(**conditioning, **given, num_inference_steps=steps, generator=generator).images
    finally:
        vae.disable_tiling()
        vae.to("cpu" if vae in models.idle else device)
    return pictures[0]


def picture_prompts(args):
    """Returns the prompts of the validation pictures, one each."""
    repeated = [args.validation_prompt] * args.num_validation_images if args.validation_prompt else []
    return (args.validation_prompts or []) + repeated


# What the frozen models make of the data


def encode_pixels(models, pixel_values):
    """Returns "mean" and "std" of the latents' posterior, each (bsz, 4, h, w) in float32."""
    pixel_values = pixel_values.to(models.vae.device, non_blocking=pixel_values.is_pinned())
    # One picture a forward pass: a batch-mate changes the last bits.
    posteriors = [models.vae.encode(pixels[None]).latent_dist for pixels in pixel_values]
    return {name: torch.cat([getattr(p, name) for p in posteriors]).float() for name in ("mean", "std")}


def tokenize(tokenizers, prompt):
    """Returns a prompt's token ids (text encoders, tokens)."""
    return torch.tensor([tokenizer(prompt, **PADDED).input_ids for tokenizer in tokenizers])


def encode_prompts(models, input_ids, prompts):
    """Returns the conditioning of prompts, by their ids (bsz, text encoders, tokens), as a dict of float32 tensors.

    "encoder_hidden_states" (bsz, tokens, dim), and for SDXL the pooled "text_embeds" (bsz, dim).
    """
    hidden_states, xl = [], len(models.text_encoders) > 1
    for text_encoder, ids in zip(models.text_encoders, input_ids.unbind(1)):
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


def encode_batch(models, batch):
    """Returns a batch's latents (bsz, 4, h, w), embeddings (bsz, tokens, dim) and what SDXL reads beside them."""
    if "mean" not in batch:
        batch = batch | encode_pixels(models, batch["pixel_values"])
    if "encoder_hidden_states" not in batch:
        batch = batch | encode_prompts(models, batch["input_ids"], batch["caption"])
    # Every step draws anew from the posterior, also where its mean and std are cached.
    latents = (batch["mean"] + batch["std"] * batch["posterior_noise"]) * models.vae.config.scaling_factor
    encoder_hidden_states, device = batch["encoder_hidden_states"], latents.device.type
    if torch.is_autocast_enabled(device) and not encoder_hidden_states.requires_grad:
        # Once, as autocast would in each of the UNet's layers.
        encoder_hidden_states = encoder_hidden_states.to(torch.get_autocast_dtype(device))
    return latents, encoder_hidden_states, {name: batch.get(name) for name in ("text_embeds", "time_ids")}


# The cache of what they make


def fill_cache(run, models, visits):
    """Runs the frozen encoders once for each input that this run will meet and that no cache entry holds yet.

    visits: Samples, the keys that the run will take from them, and how many these are.
    """
    frozen = [model for model in (*models.text_encoders, models.vae) if model not in models.trained]
    for model in frozen:
        model.to(run.accelerator.device, memory_format=torch.channels_last)
    for samples, *_ in visits:
        samples.tokenizers = models.tokenizers
    if run.args.no_encoding_cache:
        run.accelerator.print("cache      off")
        return
    on_gpu, setting = run.accelerator.device.type == "cuda", encoder_setting(run)
    jobs, flips, files, once = {}, {}, set(), []
    models.idle = frozen
    for samples, keys, count in visits:
        crops, captions = plan_cache(run, samples, keys, count, models.text_encoders[0] in frozen)
        if crops is None:
            models.idle = [model for model in models.idle if model is not models.vae]
            once.append("latents")
        if captions is None:
            models.idle = [model for model in models.idle if model not in models.text_encoders]
            once.append("embeddings")
        for crop in crops or ():
            file = samples.cached_latents[crop] = latents_file(run, models, setting, samples, crop)
            upright = crop._replace(flip=False)  # for both, the picture is decoded once
            first = latents_file(run, models, setting, samples, upright)
            flips.setdefault(first, {})[crop.flip] = file
            jobs[first] = (encode_pixels, crop_inputs, samples, upright, flips[first], on_gpu)
            files.add(file)
        for caption in captions or ():
            file = samples.cached_embeddings[caption] = embeddings_file(run, models, setting, caption)
            jobs[file] = (encode_prompts, caption_inputs, samples, caption, file)
            files.add(file)
    fill_entries(run, models, [jobs[file] for file in sorted(jobs)])
    size = sum(file.stat().st_size for file in files) / 2**30
    why = f"; {' and '.join(once)} are not cached, as the run meets most just once" if once else ""
    run.accelerator.print(f"cache      {size:.3f} GiB in {cache_folder(run.args)}{why}")
    for model in models.idle:
        model.to("cpu")
    torch.cuda.empty_cache()


def plan_cache(run, samples, keys, count, frozen_text):
    """Returns the crops and the captions that some keys will meet, or None for what is not worth keeping.

    It ends as soon as no further key can change the answer: a longer run takes neither more time nor more memory.
    """
    args, side = run.args, samples.resolution
    all_captions = {caption for record in samples.records for caption in record["captions"]} if frozen_text else set()
    empty = vars(args).get("proportion_empty_prompts") or vars(args).get("conditioning_dropout_prob")
    if frozen_text and empty:
        all_captions = {""} if empty == 1 else all_captions | {""}
    number_of_crops = len(samples)
    if not args.center_crop:
        sizes = [samples.choose_crop((0, index)) for index in range(len(samples))]
        number_of_crops = sum((crop.width - side + 1) * (crop.height - side + 1) for crop in sizes)
    number_of_crops *= (2 if args.random_flip else 1) * len(ENCODED)
    # An entry that is met less than twice, on average, costs more than it spares, unless the next run meets it again.
    most_captions = max(count // 2, SMALL_SET)
    pictures = count * len(ENCODED)
    most_crops = max(pictures // 2, SMALL_SET) if args.center_crop else min(pictures // 2, LARGE_SET)

    crops, captions = set(), set()
    for key in tqdm(keys, "planning", count, delay=5, disable=not run.accelerator.is_main_process):
        crops_are_known = len(crops) == number_of_crops or len(crops) > most_crops
        captions_are_known = len(captions) == len(all_captions) or len(captions) > most_captions
        if run.stop.signum or (crops_are_known and captions_are_known):
            break
        if not crops_are_known:
            crop = samples.choose_crop(key)
            crops.update(crop._replace(of=name) for name in ENCODED)
        if not captions_are_known:
            captions.add(choose_caption(samples, key))
    run.stop.exit_if_asked()
    return crops if len(crops) <= most_crops else None, captions if len(captions) <= most_captions else None


def encoder_setting(run):
    """Lists what the bits of all cache entries depend on, apart from the encoder and its input."""
    device = run.accelerator.device.type
    kernels = [torch.get_num_threads()] if device == "cpu" else [run.args.allow_tf32, run.args.deterministic]
    if device == "cuda":  # of all ranks, as each fills its part for the others
        kernels.append(sorted(gather_object([torch.cuda.get_device_name()])))
    libraries = [version(library) for library in ("torch", "diffusers", "transformers", "Pillow")]
    return (run.accelerator.mixed_precision, device, *kernels, *libraries)


def latents_file(run, models, setting, samples, crop):
    """Names the cache entry of a crop, by all that its bits depend on."""
    picture = (run.resolution, run.args.image_interpolation_mode, samples.picture(crop)["digest"])
    name = digest(*setting, models.vae_digest, *picture, crop[1:6])
    return cache_folder(run.args) / "latents" / name


def embeddings_file(run, models, setting, caption):
    """Names the cache entry of a caption, by all that its bits depend on."""
    ids = tokenize(models.tokenizers, caption)
    name = digest(*setting, models.text_digest, ids.tolist())
    return cache_folder(run.args) / "prompts" / name


def tensors_checksum(tensors):
    """Returns the CRC-32 of some tensors' names, shapes and values, as text."""
    value = 0
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(f"{name} {list(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.numpy(), value)
    return str(value)


def entry_is_whole(file):
    """Tells whether a cache entry is there and holds what was written."""
    try:
        with safe_open(file, "pt") as entry:
            tensors = {name: entry.get_tensor(name) for name in entry.keys()}
            return entry.metadata() == {"crc32": tensors_checksum(tensors)}
    except (OSError, SafetensorError):  # there is none, or it is torn
        return False


def crop_inputs(samples, crop, files, on_gpu):
    """Returns by file the picture's name and what encode_pixels takes for the entries of a crop, and of it mirrored.

    Those of entries that are whole are left out.
    """
    missing = {flip: file for flip, file in files.items() if not entry_is_whole(file)}
    pixels = samples.pixels(crop)[None] if missing else None
    inputs = {file: pixels.flip(-1) if flip else pixels for flip, file in missing.items()}
    name = samples.picture(crop)["name"]
    return {file: (name, (pixels.pin_memory() if on_gpu else pixels,)) for file, pixels in inputs.items()}


def caption_inputs(samples, caption, file):
    """Returns by file the caption and what encode_prompts takes for its entry, if it is to be made."""
    return {} if entry_is_whole(file) else {file: (caption, (tokenize(samples.tokenizers, caption)[None], [caption]))}


def write_entry(file, name, tensors):
    """Writes a cache entry of a picture or a caption, which its name names in a refusal."""
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise SystemExit(f"What the frozen models make of {name!r} is not finite: take another --mixed_precision.")
    tensors = {name: tensor[0].cpu().contiguous() for name, tensor in tensors.items()}
    replace_file(file, save(tensors, {"crc32": tensors_checksum(tensors)}))


@torch.no_grad()
def encode_some(run, models, jobs, started, ahead, readers, writer):
    """Does jobs for about a second: reads for so many ahead, encodes, and has a thread write the entries."""
    written, end = [], time.monotonic() + 1
    while (jobs or started) and time.monotonic() < end and not run.stop.signum:
        while jobs and len(started) < ahead:
            encode, prepare, *arguments = jobs.popleft()
            started.append((encode, readers.submit(prepare, *arguments)))
        encode, inputs = started.popleft()
        for file, (name, given) in inputs.result().items():
            written.append(writer.submit(write_entry, file, name, encode(models, *given)))
    for entry in written:
        entry.result()


def fill_entries(run, models, jobs):
    """Fills the cache entries of some jobs; ranks take turns. A job: what encodes, what makes inputs by file, and how.

    The encoder need not wait: threads read, decode and resize ahead of it, and one writes behind it.
    """
    # Machines need not share a disk, so each fills its own.
    hosts = gather_object([socket.gethostname()])
    ranks_here = min(map(hosts.count, hosts))
    place = hosts[: run.accelerator.process_index].count(socket.gethostname())
    jobs, started = collections.deque(jobs[place::ranks_here]), collections.deque()
    on_cpu = run.accelerator.device.type == "cpu"
    # On a CPU, what decodes takes from what encodes, unless the latter leaves cores free.
    free = available_cpus() // ranks_here - (torch.get_num_threads() if on_cpu else 0)
    workers = max(1, min(AHEAD // 2, free))
    ahead = 2 * workers if free > 0 else 1
    progress_bar = tqdm(desc="caching", total=len(jobs), disable=not run.accelerator.is_main_process)
    with ThreadPoolExecutor(workers) as readers, ThreadPoolExecutor(1) as writer, autocast(run):
        while max(gather_object([len(jobs) + len(started)])):
            some = (run, models, jobs, started, ahead, readers, writer)
            together(encode_some, *some, on=True, folder=cache_folder(run.args))
            progress_bar.update(progress_bar.total - len(jobs) - len(started) - progress_bar.n)
            run.stop.exit_if_asked()
    progress_bar.close()


# === End of stable diffusion ===


# === Engine: the same in every script ===
#
# train takes the steps, execute does whatever a run needs around them. These hooks are all that they ask of a method;
# the fences above list a few of their own. Each hook has to be there. In brackets stands what to return where there is
# nothing to do, or which fence has the hook already.
#
#   PUBLISHED
#       patterns of the files of a result, and of no others: they are uploaded, or deleted to start anew; in them,
#       [0-9]* is a number
#   CARD
#       what the model card's header says of the method [{}]
#   cache_folder(args) -> path
#       where checks of pictures are kept [Training flags]
#   read_records(args) -> records
#       the pictures, each {"name": path, "rows": None, "captions": [text, ...]}; of a data set, "rows" is that, and
#       "row" the number in it. A "problem" says why a picture cannot be used. "others" are pictures of the same shape
#       that go with it, by name. The engine adds "digest" and "size" (w, h).
#   class_records(run) -> records
#       checked pictures of a subject's class; in a batch each picture is followed by one of them [[], or Prior
#       preservation]
#   make_sample(samples, key) -> dict
#       a sample of arrays, numbers and texts, with all that it draws, by samples.rng(key, "a name of the draw")
#   load_models(run) -> models
#       a namespace of the pipeline, which has the unet without what accelerate wraps it in, noise_scheduler,
#       sample_shape (of the noise), trained (models), params_to_optimize and ema_unet (None if there is no average).
#       It sets run.resolution.
#   identity(run, models) -> dict
#       what a run must have in common with the one that it resumes, beside what check_identity asks for [{}]
#   fill_cache(run, models, visits)
#       computes once what frozen models make of the visits: Samples, keys, and how many [None, or Stable Diffusion]
#   prepare_training(run, models) -> optimizer
#       brings the models and their optimizer to the device
#   compute_loss(models, batch, args) -> dict
#       the "loss" of a batch of samples, and what else to log; in a validation, without gradients, of a single sample
#   after_step(run, models)
#       whatever else follows an optimizer step, on all ranks [None]
#   picture_prompts(args) -> prompts
#       of the validation pictures, one each [[], or Stable Diffusion]
#   sample_pictures(run, models, places, generators) -> PIL images
#       generates validation pictures, by the places of their prompts among picture_prompts
#   SAMPLED_AT_ONCE
#       how many of them at most [1, or Stable Diffusion]
#   save_weights(models, folder)
#       writes the weights that are trained, for a checkpoint, on rank 0; the engine writes their average
#   load_weights(models, folder)
#       loads what save_weights wrote, on all ranks
#   save_model(run, models)
#       writes the result to args.output_dir, on rank 0
#   loading_code(run, models, name) -> text
#       the lines that load the result by its name, and make a picture
#
# What it offers them: list_files, print_passed_over, digest, file_state, model_settings, weights_digest;
# samples.rng, .choose_crop, .picture, .pixels; prepare_unet, prepare_average, make_optimizer; autocast,
# prediction_target, snr_weights; together, on_main_process, save_result.


VALIDATION_DRAWS = 4  # noises and timesteps for each held-out picture
MOST_SKIPPED = 50  # steps in a row that fp16 may skip: from its first scale, 2^16, it needs no more than 16
# What a run that is killed may have been writing: a checkpoint, or a file that replace_file was to put in place.
WHOLE = r"README\.md|train_args\.yaml|state\.json|metrics\.jsonl|step-\d+\.png|[\w-]+\.safetensors"
TORN = rf"\.checkpoint-\d+\.tmp|\.({WHOLE})\.[0-9a-f]+\.tmp"
CARD_MARK = "<!-- written by a training script: {} -->"
UNSAVED = {"config", "hub_token", "overwrite_output_dir", "resume_from_checkpoint"}


def train(run, models, data, optimizer, lr_scheduler):
    """Takes the optimizer steps that are left, logging, validating and saving as asked; a signal ends it early."""
    args, accelerator = run.args, run.accelerator
    batches = load_batches(run, data)
    if validation_is_due(run, data):  # step 0, or one due when the checkpoint was written, as saving comes first
        validate(run, models, data)
        run.stop.exit_if_asked()  # resuming validates again
    progress_bar = tqdm(
        desc="training",
        total=run.max_train_steps,
        initial=run.global_step,
        disable=not accelerator.is_main_process,
    )
    for model in models.trained:
        model.train()
    if accelerator.scaler is not None:
        run.loss_scale = accelerator.scaler.get_scale()
    unread = []  # finished steps whose numbers are still on the device
    started = last_time = time.perf_counter()
    for step in range(run.global_step, run.max_train_steps):
        losses = collections.defaultdict(float)
        for micro_step in range(args.gradient_accumulation_steps):
            # Only dropout inside the models draws from the global generator.
            torch.manual_seed(int(digest(run.seed, step, micro_step, accelerator.process_index)[:8], 16))
            batch = send_to_device(next(batches), accelerator.device, non_blocking=True)
            with accelerator.accumulate(*models.trained):
                with autocast(run):
                    micro_losses = compute_loss(models, batch, args)
                accelerator.backward(micro_losses["loss"])
                for name, loss in micro_losses.items():
                    losses[name] += loss.detach() / args.gradient_accumulation_steps
                if accelerator.sync_gradients:
                    grad_norm = accelerator.clip_grad_norm_(models.params_to_optimize, args.max_grad_norm or math.inf)
                optimizer.step()  # this and the next do nothing before the last micro-step: accelerate sees to it
                optimizer.zero_grad()
        run.global_step = step + 1
        row = {"step": run.global_step, "lr": lr_scheduler.get_last_lr()[0]}
        skipped = step_was_skipped(run)
        if not skipped:
            run.optimizer_steps += 1
            lr_scheduler.step()
            update_average(run, models)
            after_step(run, models)
        keys, now = data.step_keys(step), time.perf_counter()
        row["images_per_second"] = len(keys) / (now - last_time)
        row["memory_gib"] = peak_memory(accelerator)
        last_time = now
        unread.append(FinishedStep(run, row, keys, losses, grad_norm, skipped))

        validate_now = validation_is_due(run, data)
        save_now = args.checkpointing_steps and run.global_step % args.checkpointing_steps == 0
        # Logged one step late, so that the device need not wait; at once before a validation or a checkpoint.
        read_now = validate_now or save_now or run.global_step == run.max_train_steps
        asked_to_stop = log_steps(run, data, progress_bar, unread, keep=0 if read_now else 1)
        if run.stop.signum and accelerator.num_processes == 1:  # no other rank has to hear of it first
            asked_to_stop = True
        if asked_to_stop:
            log_steps(run, data, progress_bar, unread, keep=0)
        # Saved before it is validated: a stop in a long validation then loses no step, and resuming validates again.
        if save_now or asked_to_stop:
            save_checkpoint(run, models)
        if validate_now and not asked_to_stop:
            validate(run, models, data)
            asked_to_stop = run.stop.was_asked()
            if asked_to_stop and not save_now:
                save_checkpoint(run, models)
        if asked_to_stop:
            accelerator.print(f"\nStopped after step {step + 1}, and saved: --resume_from_checkpoint latest goes on.")
            run.stop.exit_if_asked()
        if save_now or validate_now:
            last_time = time.perf_counter()
    progress_bar.close()
    share = run.checkpoint_seconds / (time.perf_counter() - started)
    if share > 0.1:
        accelerator.print(f"Checkpoints took {share:.0%} of the time: a higher --checkpointing_steps takes less.")


def execute(args, accelerator, stop, lock):
    """The stages of a run, from the flags to what it leaves."""
    lock_id = together(take_folder, args, lock, on=accelerator.is_main_process, folder=args.output_dir)
    run, checkpoint, settings = begin_run(args, accelerator, stop)
    run.lock_id = lock_id
    repo_id = Path(args.output_dir).resolve().name

    # Data.
    with stop.ending_at_once():
        if args.push_to_hub:
            repo_id = on_main_process(run, open_repository, args)
        records = read_records(args)
    records, held_out_records = split_records(args, check_records(run, records), run.seed)
    sizes = len(records), args.num_class_images if vars(args).get("with_prior_preservation") else 0
    plan_steps(run, sizes)
    if on_main_process(run, has_ended, run):
        if args.push_to_hub:
            with stop.ending_at_once():
                on_main_process(run, publish, args, repo_id)
        return
    if run.global_step > run.max_train_steps:
        raise SystemExit(f"{checkpoint} is beyond the {run.max_train_steps} steps that are asked for: ask for more.")
    of_class = class_records(run)
    sizes = len(records), len(of_class)  # --on_bad_image may have skipped some
    plan_steps(run, sizes)
    records = records + of_class

    # Models.
    torch.manual_seed(run.seed)  # for weights that start at random
    with stop.ending_at_once():
        models = load_models(run)
    list_changes(run, settings)
    check_identity(run, models, records, held_out_records)
    data = make_data(run, models, records, held_out_records, sizes)
    print_header(run, models, data)
    together(start_trackers, run, checkpoint, on=True, folder=args.output_dir)

    # What the frozen ones make of the data.
    steps = range(run.global_step, run.max_train_steps)
    keys = (key for step in steps for key in data.step_keys(step))
    count = len(steps) * len(data.step_keys(0))
    twice = 2 * validation_keys(data.held_out)  # before and after, at least
    fill_cache(run, models, [(data.samples, keys, count), (data.held_out, twice, len(twice))])

    # Training.
    optimizer = prepare_training(run, models)
    print_memory(run, models)
    if checkpoint:
        load_checkpoint(run, models, optimizer, checkpoint)
    settle_buckets(run, models, data)
    on_main_process(run, prepare_folder, run, checkpoint, data)  # now that nothing else can be refused
    train(run, models, data, optimizer, make_lr_scheduler(run, optimizer))

    # What it leaves.
    check_weights(run, models)
    on_main_process(run, save_result, run, models)
    on_main_process(run, write_model_card, run, models, repo_id)
    on_main_process(run, mark_end, run)
    code = loading_code(run, models, str(Path(args.output_dir).resolve()))
    accelerator.print(f"The result is in {args.output_dir}. To load it:\n\n{code}\n")
    stop.exit_if_asked()
    end_trackers(accelerator)
    if args.push_to_hub:
        with stop.ending_at_once():
            on_main_process(run, publish, args, repo_id)


# The run and its data


@dataclasses.dataclass
class Run:
    """What a run knows, apart from its models and its data. Functions take it as run."""

    args: argparse.Namespace  # as parsed; nothing writes to it
    accelerator: Accelerator
    stop: "StopFlag"
    # What a checkpoint carries on.
    seed: int
    tracker_id: str
    global_step: int = 0  # optimizer steps so far, also those that the scaler of fp16 skipped
    optimizer_steps: int = 0  # without those
    identity: dict = dataclasses.field(default_factory=dict)  # of base, data and method, which may not change
    # What the flags leave open.
    resolution: int = 0  # side of a sample in pixels
    total_batch_size: int = 0  # samples of an optimizer step, over all processes; class pictures come on top
    steps_per_epoch: int = 0
    max_train_steps: int = 0
    validation_steps: int = 0
    lock_id: tuple | None = None  # of the output folder's lock, if the disk has locks
    # What the steps of this process came to.
    loss_scale: float = 0.0  # of fp16
    skipped_in_a_row: int = 0
    checkpoint_seconds: float = 0.0

    def settings(self):
        """Returns the flags as given, and what the run made of those that left it open."""
        given = {name: value for name, value in vars(self.args).items() if name not in UNSAVED}
        return given | {
            "seed": self.seed,
            "resolution": self.resolution,
            "max_train_steps": self.max_train_steps,
            "validation_steps": self.validation_steps,
            "mixed_precision": self.accelerator.mixed_precision,
            "num_processes": self.accelerator.num_processes,
        }


class Data:
    """The samples of a run and the order in which its steps take them."""

    def __init__(self, run, samples, held_out, sizes):
        self.samples, self.held_out = samples, held_out
        self.total_batch_size, self.sizes, self.seed = run.total_batch_size, sizes, run.seed

    def step_keys(self, step):
        """The (epoch, index) keys of an optimizer step's samples, over all ranks and micro-steps."""
        return step_keys(step, self.total_batch_size, self.sizes, self.seed)


def generator(seed, epoch, index, stream):
    """Returns the generator of one kind of draw, named by its stream, for one picture in one pass over the data."""
    return np.random.default_rng((seed, epoch, index, zlib.crc32(stream.encode())))


@functools.lru_cache(maxsize=2)
def permutation(seed, epoch, size):
    """The order of one pass over the data."""
    return generator(seed, epoch, size, "order").permutation(size)


def step_keys(step, total_batch_size, sizes, seed):
    """The keys of an optimizer step, cut from one endless stream of shuffled passes over the data.

    sizes: how many pictures there are, and how many class pictures; of these, one stands behind each of the others.
    """
    pictures, class_pictures = sizes
    keys = []
    for place in range(step * total_batch_size, (step + 1) * total_batch_size):
        epoch, i = divmod(place, pictures)
        keys.append((epoch, int(permutation(seed, epoch, pictures)[i])))
    if not class_pictures:
        return keys
    pairs = zip(keys, step_keys(step, total_batch_size, (class_pictures, 0), seed))
    return [key for first, (epoch, index) in pairs for key in (first, (epoch, pictures + index))]


class Crop(typing.NamedTuple):
    """What is made of a picture, but for its noise: the one at index, resized, cut out from left and top, mirrored."""

    index: int
    width: int
    height: int
    left: int
    top: int
    flip: bool
    of: str = ""  # which of the pictures that go with it is meant, if not the picture itself


class Samples(torch.utils.data.Dataset):
    """Samples by key (epoch, index), each a function of seed, key and picture, whatever the batch, worker or flags."""

    def __init__(self, args, records, seed, resolution, sample_shape, num_train_timesteps):
        self.args, self.records, self.seed, self.resolution = args, records, seed, resolution
        self.sample_shape, self.num_train_timesteps = sample_shape, num_train_timesteps
        self.cached_latents = {}  # files by crop, filled by fill_cache
        self.cached_embeddings = {}  # files by caption
        self.tokenizers = ()

    def __len__(self):
        return len(self.records)

    def __getitem__(self, key):
        return make_sample(self, key)

    def rng(self, key, stream):
        """Returns the generator of one kind of draw for a sample."""
        return generator(self.seed, *key, stream)

    def choose_crop(self, key):
        """Draws where a sample is cut out of its picture, and whether it is mirrored."""
        index, side = key[1], self.resolution
        shorter = min(self.records[index]["size"])
        width, height = (max(side, round(length * side / shorter)) for length in self.records[index]["size"])
        x, y = (0.5, 0.5) if self.args.center_crop else self.rng(key, "crop").random(2)
        left = int(x * (width - side + 1))
        top = int(y * (height - side + 1))
        flip = self.args.random_flip and bool(self.rng(key, "flip").random() < 0.5)
        return Crop(index, width, height, left, top, flip)

    def picture(self, crop):
        """Returns the record of the picture that a crop is of."""
        record = self.records[crop.index]
        return record["others"][crop.of] if crop.of else record

    def pixels(self, crop, interpolation=None):
        """Resizes, crops and flips a picture to float32 in [-1, 1], shape (3, resolution, resolution).

        interpolation is the filter, if not --image_interpolation_mode.
        """
        interpolation = interpolation or self.args.image_interpolation_mode
        resample = Image.Resampling[interpolation.removesuffix("_exact").upper()]
        record, side = self.picture(crop), self.resolution
        data = read_bytes(record)
        if digest(data) != record["digest"]:
            raise OSError(f"{record['name']} is not what it was when it was checked")
        image = open_image(data)
        left, right = (x * image.width / crop.width for x in (crop.left, crop.left + side))
        top, bottom = (y * image.height / crop.height for y in (crop.top, crop.top + side))
        # The crop alone: 4000 x 1 pixels as a whole would take 4 GiB.
        image = image.resize((side, side), resample, (left, top, right, bottom))
        image = np.array(ImageOps.mirror(image) if crop.flip else image, dtype=np.float32).clip(0, 255)
        image = image if image.ndim == 3 else np.stack([image] * 3, axis=-1)
        return torch.from_numpy(image).permute(2, 0, 1).contiguous() / 127.5 - 1


def available_cpus():
    """How many CPU cores this process may use, of those that the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def load_batches(run, data):
    """Yields this rank's batches of the steps that are left: its slice of a step's keys for each micro-step."""
    rank, world_size = run.accelerator.process_index, run.accelerator.num_processes
    steps, micro_steps = range(run.global_step, run.max_train_steps), run.args.gradient_accumulation_steps
    on_gpu, num_workers = run.accelerator.device.type == "cuda", run.args.dataloader_num_workers
    if num_workers is None:  # where they are not forked, each would import the libraries again
        cheap = on_gpu and multiprocessing.get_start_method() == "fork"
        num_workers = min(8, available_cpus() // torch.cuda.device_count()) if cheap else 0

    def batch_keys():
        for step in steps:
            keys = data.step_keys(step)
            batch_size = len(keys) // (micro_steps * world_size)
            for micro_step in range(micro_steps):
                first = (micro_step * world_size + rank) * batch_size
                yield keys[first : first + batch_size]

    return iter(
        torch.utils.data.DataLoader(
            data.samples,
            batch_sampler=batch_keys(),
            pin_memory=on_gpu,
            num_workers=num_workers,
            worker_init_fn=ignore_signals,
        )
    )


# Pictures and their checks


def digest(*parts):
    """Names what the parts say in 32 hexadecimal digits; bytes and arrays count as they are, the rest as text."""
    blake = hashlib.blake2b(digest_size=16)
    for part in parts:
        blake.update(part if isinstance(part, (bytes, np.ndarray)) else repr(part).encode())
        blake.update(b"\0")
    return blake.hexdigest()


def model_settings(model):
    """Lists what a model's config says of how it computes, such as its heads, and not of where it is from."""
    config = model.config if isinstance(model.config, dict) else model.config.to_dict()
    apart = ("architectures", "dtype", "transformers_version")
    return [(name, config[name]) for name in sorted(config) if not name.startswith("_") and name not in apart]


def weights_digest(model):
    """Names a model by its config, its layers and the values of its weights, which have to be finite."""
    values = [tensor.contiguous().numpy() for tensor in model.state_dict().values()]
    if not all(np.isfinite(value).all() for value in values):
        raise SystemExit(f"The base has a {type(model).__name__} with weights that are not finite.")
    return digest(model_settings(model), repr(model), *values)


def list_files(folder):
    """Lists the files under a folder, sorted; hidden ones are left out, links to folders are followed, but once."""

    def refuse(error):
        raise SystemExit(f"The folder {error.filename} cannot be read: {error.strerror}.")

    files, walked = [], set()
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(place)
        if real in walked:  # by way of a link
            folders.clear()
            continue
        walked.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [Path(place, name) for name in names if not name.startswith(".")]
    # No pipes and the like, at which reading would wait; a link that leads nowhere is told of later.
    return sorted(file for file in files if os.path.isfile(file) or not os.path.exists(file))


def print_passed_over(files, read):
    """Says how many of some files are not read, by suffix."""
    read = {*read}
    counts = collections.Counter(file.suffix.lower() or "without a suffix" for file in files if file not in read)
    if counts:
        listing = ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common())
        PartialState().print(f"passed over: {listing}")


def read_bytes(record):
    """Returns a record's encoded picture."""
    if record["rows"] is None:
        return Path(record["name"]).read_bytes()
    (image,) = record["rows"][record["row"]].values()
    return Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"]


def caption_problem(record):
    """Returns in words what is wrong with a record's captions, or None; a picture that goes with one has none."""
    if record.get("problem") or "captions" not in record:
        return record.get("problem")
    if not record["captions"]:
        return "has no caption"
    if re.search("[\0\ud800-\udfff]", "".join(record["captions"])):
        return "has a caption with characters that UTF-8 does not have, or null bytes"


def check_record(record, stop):
    """Returns the (digest, width, height) of a picture, or in words why it cannot be used."""
    if stop.signum:
        return "is unchecked"
    if problem := caption_problem(record):
        return problem
    if record["rows"] is None and os.path.exists(record["name"]) and not os.path.isfile(record["name"]):
        return "is no file"  # but a pipe, say, at which reading would wait
    try:
        data = read_bytes(record)
        return (digest(data), *open_image(data).size) if data else "is empty (0 bytes)"
    except FileNotFoundError:
        return "is named, by metadata, a link or a data set, but is not there"
    except UnidentifiedImageError:
        return "is not a picture"
    except Exception as error:  # Pillow raises nearly anything over a broken file
        return f"cannot be decoded: {error}"


def stamp(record):
    """Names a picture's state without reading it: by its file's size and times, or its data set's fingerprint."""
    captioned = not caption_problem(record)
    if record["rows"] is None:
        return digest(file_state(record["name"]), captioned)
    (image,) = record["rows"][record["row"]].values()
    state = file_state(image["path"]) if image and image["bytes"] is None else None
    return digest(record["rows"]._fingerprint, record["row"], state, captioned)


def file_state(path):
    """Lists what changes with a file: its size and times. A copy can be given any time but that of its change."""
    if not path or not os.path.isfile(path):
        return [path]
    stat = os.stat(path)
    return [os.path.abspath(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def read_manifest(file):
    """Returns what is known of checked pictures, by their stamps; a checksum stands on the first line."""
    try:
        checksum, text = file.read_text().split("\n")
        return json.loads(text) if int(checksum) == zlib.crc32(text.encode()) else {}
    except (OSError, ValueError):  # there is none yet, or it is torn
        return {}


def check_records(run, records):
    """Decodes every picture once, lists all bad ones, and returns the good ones with their "digest" and "size" (w, h).

    A manifest of names, sizes and modification times in the cache folder spares unchanged files the next time.
    """
    main_process = run.accelerator.is_main_process
    rows, folder = records[0]["rows"], str(Path(records[0]["name"]).absolute().parent)
    manifest = cache_folder(run.args) / "checked" / digest(folder if rows is None else rows._fingerprint)
    known = together(read_manifest, manifest, on=main_process, folder=manifest.parent)
    pictures = records + [other for record in records for other in record.get("others", {}).values()]
    stamps = gather_object([[stamp(picture) for picture in pictures]])[0]  # rank 0's: its copies may have other times
    places = {stamps[i]: i for i in reversed(range(len(pictures)))}  # a picture that goes with several counts once
    found = check_new(run, pictures, sorted(i for name, i in places.items() if name not in known))
    for i in found:
        if not isinstance(found[i], str):
            known[stamps[i]] = found[i]
    if not run.args.no_encoding_cache:
        text = json.dumps({name: known[name] for name in stamps if name in known})
        text = f"{zlib.crc32(text.encode())}\n{text}"
        together(replace_file, manifest, text.encode(), on=main_process, folder=manifest.parent)
    run.stop.exit_if_asked()
    findings = iter([known.get(name, found.get(places[name])) for name in stamps])
    checked = [with_finding(record, next(findings)) for record in records]
    bad = {}
    for i, record in enumerate(checked):
        others = {name: with_finding(other, next(findings)) for name, other in record.get("others", {}).items()}
        if others:
            record["others"] = others
        if problem := record.get("problem") or pair_problem(record):
            bad[i] = problem
    if bad:
        report_bad(run, records, bad)
    return [record for i, record in enumerate(checked) if i not in bad]


def with_finding(record, finding):
    """Returns a record with its "digest" and "size", or with a "problem", as check_record found."""
    if isinstance(finding, str):
        return {**record, "problem": finding}
    return {**record, "digest": finding[0], "size": finding[1:]}


def pair_problem(record):
    """Returns in words what is wrong with the pictures that go with a checked one, or None."""
    width, height = record["size"]
    for name, other in record.get("others", {}).items():
        if other.get("problem"):
            return f"goes with {name} {other['name']}, which {other['problem']}"
        other_width, other_height = other["size"]
        # Within a pixel of the smaller one.
        if abs(width * other_height - height * other_width) > max(width, height, other_width, other_height):
            sizes = f"is {width} x {height}, and its {name} {other['name']} is {other_width} x {other_height}"
            return f"{sizes}: give both the same shape"


def check_new(run, records, new):
    """Checks the pictures at some places among the records, in threads and by turns; returns the findings by place."""
    mine = new[run.accelerator.process_index :: run.accelerator.num_processes]
    quiet = not mine or not run.accelerator.is_main_process
    check = functools.partial(check_record, stop=run.stop)
    found = thread_map(check, [records[i] for i in mine], desc="checking", disable=quiet)
    return dict(gather_object(list(zip(mine, found))))


def report_bad(run, records, bad):
    """Lists the pictures that cannot be used, by place why; ends the run unless it is to skip them."""
    listing = "".join(f"\n  {records[i]['name']} {reason}" for i, reason in bad.items())
    listing = f"{len(bad)} of {len(records)} pictures cannot be used:{listing}"
    if run.args.on_bad_image == "error" or len(bad) == len(records):
        raise SystemExit(f"{listing}\nMend or remove them, or leave them out by --on_bad_image skip.")
    run.accelerator.print(listing)


def split_records(args, records, seed):
    """Returns the pictures to train on, --max_train_samples at most, and --validation_samples held-out ones."""
    chosen = sorted(permutation(seed, 0, len(records))[: args.max_train_samples])
    if args.validation_samples >= len(chosen):
        raise SystemExit(f"--validation_samples {args.validation_samples} leaves none of {len(chosen)} to train on.")
    places = {chosen[i * len(chosen) // args.validation_samples] for i in range(args.validation_samples)}
    return [records[i] for i in chosen if i not in places], [records[i] for i in sorted(places)]


# What the steps of all methods have in common


def autocast(run):
    """The precision that models run in: under DeepSpeed, too, where accelerate's own context does nothing."""
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(run.accelerator.mixed_precision)
    return torch.autocast(run.accelerator.device.type, dtype, enabled=dtype is not None)


def step_was_skipped(run):
    """Tells whether the scaler of fp16 left out the step just taken, as gradients overflowed; ends endless skipping.

    Its scale says so, which falls then and at no other time.
    """
    if run.accelerator.scaler is None:
        skipped = run.accelerator.optimizer_step_was_skipped  # DeepSpeed has a scaler of its own
    else:
        before, run.loss_scale = run.loss_scale, run.accelerator.scaler.get_scale()
        skipped = run.loss_scale < before
    run.skipped_in_a_row = run.skipped_in_a_row + 1 if skipped else 0
    if run.skipped_in_a_row == MOST_SKIPPED:
        raise SystemExit(
            f"The gradients of {MOST_SKIPPED} steps in a row were not finite in fp16, so the run stops at step "
            f"{run.global_step}; earlier checkpoints are good. Take --mixed_precision bf16 or no."
        )
    return skipped


def prediction_target(noise_scheduler, clean, noise, timesteps):
    """Returns what the UNet is asked for, of the samples' shape: the noise, the velocity or the sample itself.

    The velocity is that of Salimans and Ho 2022, arXiv:2202.00512, appendix D.
    """
    if noise_scheduler.config.prediction_type == "epsilon":
        return noise
    if noise_scheduler.config.prediction_type == "v_prediction":
        return noise_scheduler.get_velocity(clean, noise, timesteps)
    return clean


def snr_weights(noise_scheduler, timesteps, snr_gamma):
    """Min-SNR weights (bsz,) of the samples' losses for what the UNet predicts: arXiv:2303.09556, section 3.4."""
    if snr_gamma is None:
        return torch.ones_like(timesteps, dtype=torch.float32)
    snr = compute_snr(noise_scheduler, timesteps)
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[noise_scheduler.config.prediction_type]
    return snr.clamp(max=snr_gamma) / divisor


# The average of the weights


def prepare_average(run, models):
    """Brings the average, if there is one, to its device, in the weights' layout, without which it would be slow."""
    if models.ema_unet is not None:
        device = torch.device("cpu") if run.args.offload_ema else run.accelerator.device
        pinned = device.type == "cpu" and run.accelerator.device.type == "cuda"
        models.ema_unet.shadow_params = [
            torch.empty_like(weight, dtype=shadow.dtype, device=device, pin_memory=pinned).copy_(shadow)
            for weight, shadow in zip(models.params_to_optimize, models.ema_unet.shadow_params)
        ]


@torch.no_grad()
def update_average(run, models):
    """Moves the average of the weights, if there is one, towards them after an optimizer step."""
    average = models.ema_unet
    if average is None:
        return
    average.optimization_step += 1
    share = 1 - average.get_decay(average.optimization_step)
    shadows, weights = average.shadow_params, models.params_to_optimize
    if not run.args.offload_ema and shadows[0].dtype == weights[0].dtype:
        # EMAModel.step takes a copy of all weights, or a kernel for each.
        torch._foreach_lerp_(shadows, weights, share)
        return
    for shadow, weight in zip(shadows, weights):  # under DeepSpeed, these are in half precision, and it is not
        moved = shadow.to(weight.device, non_blocking=True).lerp_(weight.to(shadow.dtype), share)
        shadow.copy_(moved, non_blocking=shadow.is_pinned())  # whoever reads it has read the step's numbers before


@contextlib.contextmanager
def averaged_weights(models):
    """Swaps the averaged weights in, if there are any, and the training ones back afterwards."""
    if models.ema_unet is not None:
        models.ema_unet.store(models.params_to_optimize)
        models.ema_unet.copy_to(models.params_to_optimize)
    try:
        yield
    finally:
        if models.ema_unet is not None:
            models.ema_unet.restore(models.params_to_optimize)


@torch.no_grad()
def load_average(models, folder):
    """Reads a checkpoint's average of the weights, if there is one."""
    if models.ema_unet is not None:
        saved = models.ema_unet.model_cls.from_pretrained(folder / "unet_ema", use_safetensors=True)
        models.ema_unet.optimization_step = saved.config.optimization_step
        for shadow, parameter in zip(models.ema_unet.shadow_params, saved.parameters()):
            shadow.copy_(parameter)


# Validation and logging


def validation_is_due(run, data):
    """Tells whether a validation follows the step that the run is at: none if there is nothing to measure or draw."""
    if not picture_prompts(run.args) and not len(data.held_out):
        return False
    return run.global_step % run.validation_steps == 0 or run.global_step == run.max_train_steps


def validation_keys(held_out):
    """The keys under which the held-out pictures are measured: the same noises and timesteps every time."""
    return [(draw, index) for draw in range(VALIDATION_DRAWS) for index in range(len(held_out))]


@torch.no_grad()
def validate(run, models, data):
    """Logs the held-out loss and a row of pictures; ranks take turns at both."""
    for model in models.trained:
        model.eval()
    with averaged_weights(models), autocast(run):
        losses = held_out_losses(run, models, data.held_out)
        images = validation_pictures(run, models)
    for model in models.trained:
        model.train()
    losses, images = gather_object(losses), sorted(gather_object(images), key=lambda pair: pair[0])
    if losses and len(losses) == len(validation_keys(data.held_out)):  # else a signal came between
        log_row(run, {"step": run.global_step, "validation_loss": math.fsum(losses) / len(losses)})
    if images and len(images) == len(picture_prompts(run.args)) and run.accelerator.is_main_process:
        log_pictures(run, [image for _, image in images])


def held_out_losses(run, models, held_out):
    """Measures this rank's share of the held-out pictures."""
    losses = []
    for key in validation_keys(held_out)[run.accelerator.process_index :: run.accelerator.num_processes]:
        if not run.stop.signum:
            batch = send_to_device(torch.utils.data.default_collate([held_out[key]]), run.accelerator.device)
            losses.append(compute_loss(models, batch, run.args)["loss"].item())
    return losses


class SamplingStopped(Exception):
    """A signal came while validation pictures were drawn."""


def give_up_at_a_signal(run, *_):
    """Ends the drawing of pictures, before a forward pass, once a signal has come: a picture takes up to minutes."""
    if run.stop.signum:
        raise SamplingStopped


def validation_pictures(run, models):
    """Generates this rank's share of the validation pictures: pairs of a prompt's place and its picture."""
    accelerator, images = run.accelerator, []
    models.pipeline.set_progress_bar_config(disable=True)
    mine = range(len(picture_prompts(run.args)))[accelerator.process_index :: accelerator.num_processes]
    hook = models.pipeline.unet.register_forward_pre_hook(functools.partial(give_up_at_a_signal, run))
    turns = range(0, len(mine), SAMPLED_AT_ONCE)
    with contextlib.suppress(SamplingStopped):
        for first in tqdm(turns, "sampling", leave=False, disable=not accelerator.is_main_process):
            places = mine[first : first + SAMPLED_AT_ONCE]
            generators = [torch.Generator().manual_seed(place) for place in places]
            images += zip(places, sample_pictures(run, models, places, generators))
    hook.remove()
    return images


def log_pictures(run, images):
    """Writes a row of pictures to samples/ and sends them to the trackers."""
    png = io.BytesIO()
    make_image_grid(images, 1, len(images)).save(png, "PNG")
    replace_file(Path(run.args.output_dir, "samples", f"step-{run.global_step:06d}.png"), png.getvalue())
    for tracker in run.accelerator.trackers:
        if hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            with outliving(run.accelerator, tracker):
                tracker.log_images({"validation": np.stack(images)}, step=run.global_step, **layout)


def log_row(run, row):
    """Appends a row of numbers to metrics.jsonl and sends it to the trackers."""
    # Of a step that was skipped, some are not finite, and JSON has no word for these.
    row = {name: value if math.isfinite(value) else None for name, value in row.items()}
    if run.accelerator.is_main_process:
        check_lock(run)
        logs = Path(run.args.output_dir, run.args.logging_dir)
        logs.mkdir(exist_ok=True, parents=True)  # someone may have tidied up
        with open(logs / "metrics.jsonl", "a") as metrics:
            metrics.write(json.dumps(row) + "\n")
    values = {name: value for name, value in row.items() if name != "step" and value is not None}
    for tracker in run.accelerator.trackers:
        with outliving(run.accelerator, tracker):
            tracker.log(values, step=row["step"])


@contextlib.contextmanager
def outliving(accelerator, tracker):
    """Goes on without a tracker once it fails, as its server or its process may be gone."""
    try:
        yield
    except Exception as error:  # anything: each tracker has errors of its own
        print(f"\n--report_to {tracker.name} failed ({error}): the run goes on; metrics.jsonl has all numbers.")
        accelerator.trackers = [other for other in accelerator.trackers if other is not tracker]


def end_trackers(accelerator):
    """Has the trackers write what they hold, and drops them."""
    for tracker in accelerator.trackers:
        with outliving(accelerator, tracker):
            tracker.finish()
    accelerator.trackers = []


class FinishedStep:
    """What is logged of a step. Its numbers, means over the ranks, are on their way from the device until read."""

    def __init__(self, run, row, keys, losses, grad_norm, skipped):
        self.row, self.keys = row, keys
        self.names = [*losses, "grad_norm", "skipped", "asked_to_stop"]
        loss = losses["loss"]
        # Filled on the device: a number copied to it would make it wait.
        flags = [torch.full_like(loss, float(flag)) for flag in (skipped, run.stop.signum > 0)]
        numbers = torch.stack([*losses.values(), torch.as_tensor(grad_norm).to(loss), *flags])
        numbers = run.accelerator.reduce(numbers, "mean")
        on_gpu = numbers.is_cuda
        self.numbers = torch.empty_like(numbers, device="cpu", pin_memory=on_gpu).copy_(numbers, non_blocking=on_gpu)
        # Behind the copy: to wait for it is not to wait for the next step, which the device has been given since.
        self.arrived = torch.cuda.current_stream().record_event() if on_gpu else None

    def read(self):
        """Waits for the numbers; returns them by their names."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return dict(zip(self.names, self.numbers.tolist()))


def log_steps(run, data, progress_bar, unread, keep):
    """Logs finished steps until only keep are unread; returns whether any rank was asked to stop.

    A loss that is not finite ends the run.
    """
    asked_to_stop = False
    while len(unread) > keep:
        step = unread.pop(0)
        numbers = step.read()
        skipped = numbers.pop("skipped")
        asked_to_stop |= numbers.pop("asked_to_stop") > 0
        row = step.row | numbers
        # The scaler of fp16 scales gradients: a loss that is not finite is none of its doing.
        if not math.isfinite(row["loss"]) or not (skipped or math.isfinite(row["grad_norm"])):
            files = "\n  ".join(sorted({data.samples.records[index]["name"] for _, index in step.keys}))
            raise SystemExit(
                f"Step {row['step']} has loss {row['loss']} and gradient norm {row['grad_norm']}, so the run "
                f"stops; earlier checkpoints are good. Lower the learning rate, or look at its pictures:\n  {files}"
            )
        log_row(run, row)
        progress_bar.update()
        progress_bar.set_postfix_str(f"loss {row['loss']:.4f}, {row['images_per_second']:.1f} images/s")
    return asked_to_stop


def peak_memory(accelerator):
    """Peak memory of the GPU since the last call, or the process's memory now on a CPU, in GiB."""
    if accelerator.device.type != "cuda":
        return psutil.Process().memory_info().rss / 2**30
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return peak


# Stopping


def ignore_signals(worker):
    """Leaves signals to the main process: a loader worker that they killed would take the run with it."""
    for name in STOP_SIGNALS:
        signal.signal(getattr(signal, name), signal.SIG_IGN)


def together(function, *arguments, on, folder):
    """Calls a function on the ranks where on is true; returns rank 0's result on every rank.

    If it fails on one rank, all end, and hear of it here before any waits in a barrier for the one that failed.
    folder: where it writes, for the message of a full disk.
    """
    result, problem = None, None
    try:
        result = function(*arguments) if on else None
    except SystemExit as refusal:
        problem = str(refusal)
    except torch.cuda.OutOfMemoryError as error:
        problem = f"{function.__name__}: {error}"
    except Exception as error:
        if not isinstance(error, (OSError, RuntimeError, SafetensorError)):  # all of which are said of a full disk
            traceback.print_exc()
        problem = failure(function.__name__, folder, error)
    answers = gather_object([(result, problem)])
    if problems := [problem for _, problem in answers if problem is not None]:
        raise SystemExit(problems[0])
    return answers[0][0]


def on_main_process(run, function, *arguments):
    """Calls a function that may write to the output folder on rank 0; returns its result on every rank."""
    return together(function, *arguments, on=run.accelerator.is_main_process, folder=run.args.output_dir)


# Checkpoints
#
# In one: the weights that are trained, as save_weights has them; unet_ema/, their average; accelerate's optimizer.bin
# and, under fp16, its scaler's state; metrics.jsonl; state.json, the run's fields and settings; manifest.json, the
# names and checksums of all that, written last. The schedule of the learning rate follows from optimizer_steps, and
# every draw from its key, so neither is there.


def check_weights(run, models):
    """Ends the run if a weight is not finite, so that none is saved; ranks have the same weights."""
    average = models.ema_unet.shadow_params if models.ema_unet is not None else []
    if not all(bool(weight.isfinite().all()) for weight in (*models.params_to_optimize, *average)):
        raise SystemExit(
            f"Step {run.global_step} made weights that are not finite, so they are not saved; "
            "earlier checkpoints are good. Lower the learning rate."
        )


def write_checkpoint(run, models, folder):
    """Writes what a checkpoint holds: the models, the optimizer's state, the metrics so far, the run's state."""
    run.accelerator.save_state(folder)  # without the models: see make_accelerator
    if run.accelerator.is_main_process:
        save_weights(models, folder)
        if models.ema_unet is not None:
            models.ema_unet.save_pretrained(folder / "unet_ema")
        shutil.copy(Path(run.args.output_dir, run.args.logging_dir, "metrics.jsonl"), folder)
        (folder / "state.json").write_text(state_text(run))


def state_text(run, result=()):
    """Returns what a run that goes on from here must know, as JSON; result: names of files, if it has ended."""
    state = {
        "global_step": run.global_step,
        "optimizer_steps": run.optimizer_steps,
        "seed": run.seed,
        "tracker_id": run.tracker_id,
        "identity": run.identity,
        "settings": run.settings(),
        "result": result,
    }
    return json.dumps(state)


def mark_end(run):
    """Writes state.json beside the result, by which has_ended knows that the run has ended, and when."""
    output_dir = Path(run.args.output_dir)
    files = results(output_dir)
    flush(*files, *{path.parent for path in files})
    kept = [path for path in files if path.suffix not in (".md", ".png") and "-steps-" not in path.name]
    names = [path.relative_to(output_dir).as_posix() for path in kept]
    replace_file(output_dir / "state.json", state_text(run, names).encode())


def numbered_checkpoints(output_dir):
    """Lists a folder's checkpoints by rising number; only names checkpoint-<number> count."""
    found = [
        path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-(0|[1-9]\d*)", path.name)
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def checksum(file):
    """Returns the CRC-32 of a file's bytes, which shows damage and is as fast as a disk."""
    value = 0
    with open(file, "rb") as data:
        while chunk := data.read(2**24):
            value = zlib.crc32(chunk, value)
    return value


def is_whole(checkpoint):
    """Tells whether all that a checkpoint's manifest names is there as it was written."""
    try:
        checksums = json.loads((checkpoint / "manifest.json").read_text())
        return all(checksum(checkpoint / name) == value for name, value in checksums.items())
    except (FileNotFoundError, NotADirectoryError, ValueError, AttributeError):  # a file is gone, or it is no manifest
        return False


def remove(path):
    """Deletes a folder or a file; of a link, the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def flush(*paths):
    """Has the system write files and folders to the disk, where it lets folders be opened."""
    for path in paths if os.name == "posix" else ():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError:
            if not path.is_dir():  # which some shared disks cannot flush
                raise
        finally:
            os.close(descriptor)


def open_to_others(files, like):
    """Gives files the mode of another new one, as safetensors makes them their owner's alone."""
    with contextlib.suppress(OSError):  # a shared disk may know no modes
        for file in files:
            shutil.copymode(like, file)


def seal_checkpoint(folder, target, limit):
    """Makes a written folder the checkpoint: manifest last, all on the disk, renamed; then prunes the older ones."""
    for pickled in folder.glob("random_states_*.pkl"):  # every draw is seeded by its step, so nothing reads these
        pickled.unlink()
    checksums = {str(file.relative_to(folder)): checksum(file) for file in folder.rglob("*") if file.is_file()}
    (folder / "manifest.json").write_text(json.dumps(checksums))
    open_to_others(folder.rglob("*.safetensors"), folder / "manifest.json")
    flush(*folder.rglob("*"), folder)
    if os.path.lexists(target):  # torn since
        remove(target)
    os.replace(folder, target)
    flush(target.parent)
    checkpoints = numbered_checkpoints(target.parent)
    for path in checkpoints[: checkpoints.index(target) + 1][:-limit] if limit else []:
        try:
            remove(path)
        except OSError as error:  # a shared disk keeps what another program has open
            print(f"{path} could not be deleted: {error}")


def save_checkpoint(run, models):
    """Writes checkpoint-<global_step> beside its place and renames it, so that it is whole or not there."""
    output_dir, main_process = run.args.output_dir, run.accelerator.is_main_process
    started = time.perf_counter()
    check_weights(run, models)
    target = Path(output_dir, f"checkpoint-{run.global_step}")
    folder = Path(output_dir, f".checkpoint-{run.global_step}.tmp")
    # DeepSpeed's ranks each hold a part of the optimizer's state; otherwise one has it all.
    writes = main_process or run.accelerator.distributed_type == DistributedType.DEEPSPEED
    try:
        together(write_checkpoint, run, models, folder, on=writes, folder=output_dir)
        on_main_process(run, seal_checkpoint, folder, target, run.args.checkpoints_total_limit)
    finally:
        if main_process:
            shutil.rmtree(folder, ignore_errors=True)
    seconds = time.perf_counter() - started
    run.checkpoint_seconds += seconds
    log_row(run, {"step": run.global_step, "checkpoint_seconds": seconds})


def check_folder(args):
    """Refuses an output folder that holds what is not this run's to write over."""
    output_dir, resume = Path(args.output_dir), args.resume_from_checkpoint
    found = numbered_checkpoints(output_dir)
    left = found + [path for pattern in PUBLISHED for path in sorted(output_dir.glob(pattern))]
    scripts = {script_of(folder) for folder in (output_dir, *found)} - {None}
    settings, metrics = output_dir / "train_args.yaml", Path(output_dir, args.logging_dir, "metrics.jsonl")
    written = settings.exists() and settings.read_text(errors="replace").startswith("# torch ")  # by write_train_args
    foreign = [path for path in (settings, output_dir / "state.json", metrics, *left) if path.exists()]
    if foreign and not written and not scripts:
        raise SystemExit(f"{foreign[0]} was not left by a run of this script: move it, or take another --output_dir.")
    parts = {output_dir / pattern.split("/")[0] for pattern in PUBLISHED if "/" in pattern}
    if files := [part for part in parts if part.is_file()]:
        raise SystemExit(f"{files[0]} is a file, where a run makes a folder: move it, or take another --output_dir.")
    if scripts - {Path(__file__).stem}:
        raise SystemExit(f"{output_dir} holds a run of {', '.join(scripts)}.py: take another --output_dir.")
    elsewhere = False
    if resume not in (None, "latest"):
        checkpoint = Path(resume) if Path(resume).is_dir() else output_dir / resume
        elsewhere = os.path.realpath(checkpoint.parent) != os.path.realpath(output_dir)
    left = [path for path in left if path.parent.name != "samples"]  # which alone are no loss
    if left and (elsewhere or resume is None and not args.overwrite_output_dir):
        raise SystemExit(
            f"{output_dir} holds a run: go on with it by --resume_from_checkpoint latest, "
            "start anew and delete what it left by --overwrite_output_dir, or choose another --output_dir."
        )


def results(output_dir):
    """Lists what there is of what a run leaves, but not what a link leads to."""
    names = []
    for pattern in PUBLISHED:
        found = sorted(path.relative_to(output_dir).as_posix() for path in output_dir.glob(pattern))
        exact = re.escape(pattern).replace(re.escape("[0-9]*"), "[0-9]+")  # to glob, that is a digit and anything
        names += [name for name in found if re.fullmatch(exact, name)]
    paths = [output_dir / name for name in names]
    return [path for path in paths if path.parent == output_dir or not path.parent.is_symlink()]


def script_of(folder):
    """Returns the name of the script that left a state.json in a folder, or None."""
    try:
        return json.loads((folder / "state.json").read_text())["identity"]["script"]
    except (OSError, ValueError, TypeError, KeyError):
        return None


def find_checkpoint(args):
    """Returns the checkpoint to resume from, or None."""
    resume, found = args.resume_from_checkpoint, numbered_checkpoints(args.output_dir)
    if resume == "latest":
        for path in reversed(found):
            if is_whole(path) and path.name == f"checkpoint-{read_state(path)['global_step']}":
                return path
            print(f"Passing over {path}: it is not whole, or not the checkpoint of that step.")
        if Path(args.output_dir, "state.json").exists():  # see has_ended
            return None
        if found:
            raise SystemExit(
                f"No checkpoint in {args.output_dir} can be used: they are damaged, or of another version of this "
                "script. Go on with that, move them away, or give --overwrite_output_dir instead."
            )
        print(f"{args.output_dir} has no checkpoint to resume from: starting at step 0.")
    elif resume is not None:
        path = Path(resume) if Path(resume).is_dir() else Path(args.output_dir, resume)
        path = next((one for one in found if os.path.realpath(one) == os.path.realpath(path)), path)
        if not is_whole(path):
            raise SystemExit(f"--resume_from_checkpoint {path} is not a whole checkpoint; 'latest' finds the newest.")
        later = found[found.index(path) + 1 :] if path in found else found
        if any(map(is_whole, later)):
            raise SystemExit(
                f"'latest' would mistake {later[-1]} for this run's; move it away or take another --output_dir."
            )
        return path


def read_state(checkpoint):
    """Returns what state.json says of a run."""
    names = {"global_step", "optimizer_steps", "seed", "tracker_id", "identity", "settings", "result"}
    try:
        state = json.loads((checkpoint / "state.json").read_text())
    except ValueError:
        state = None
    if not isinstance(state, dict) or state.keys() != names:
        raise SystemExit(f"{checkpoint} is of another version of this script: go on with that, or start a new run.")
    return state


def has_ended(run):
    """Tells whether the run that `latest` would go on with has ended, and as many steps are not asked for."""
    output_dir = Path(run.args.output_dir)
    if run.args.resume_from_checkpoint != "latest" or not (output_dir / "state.json").exists():
        return False
    try:
        state = read_state(output_dir)
    except SystemExit:
        if run.global_step:  # a checkpoint says what this file should
            return False
        raise
    taken = state["global_step"]
    gone = [name for name in state["result"] if not (output_dir / name).exists()]
    if gone:
        print(f"{output_dir / gone[0]} is gone from the result.")
    elif taken >= run.max_train_steps:
        early = {"resolution": run.resolution} | ({"seed": run.seed} if run.args.seed is None else {})
        list_changes(run, state["settings"] | early)  # but for what this run has not worked out
        print(f"The run in {output_dir} has ended after {taken} steps: there is none left to take.")
        print("To start anew and delete what it left, give --overwrite_output_dir.")
        return True
    if not run.global_step:
        raise SystemExit(
            f"The run in {output_dir} has ended after {taken} steps and left no checkpoint to go on from: "
            "--checkpointing_steps would have. Start anew by --overwrite_output_dir, or take another --output_dir."
        )
    return False


def draw_run_id():
    """Draws the name of a run for its tracker, 8 hexadecimal digits, which is also its seed if none is given."""
    return os.urandom(4).hex()


def begin_run(args, accelerator, stop):
    """Returns the run, at its start or where a checkpoint left it, and that checkpoint with the settings it had."""
    main_process, output_dir = accelerator.is_main_process, args.output_dir
    checkpoint = together(find_checkpoint, args, on=main_process, folder=output_dir)
    if checkpoint is None:
        tracker_id = together(draw_run_id, on=main_process, folder=output_dir)
        seed = int(tracker_id, 16) if args.seed is None else args.seed
        return Run(args, accelerator, stop, seed, tracker_id), None, {}
    state = together(read_state, checkpoint, on=main_process, folder=output_dir)
    settings, _ = state.pop("settings"), state.pop("result")
    if args.seed not in (None, state["seed"]):
        raise SystemExit(f"{checkpoint} was trained with --seed {state['seed']}, so it cannot go on with {args.seed}.")
    accelerator.print(f"Resuming from {checkpoint}.")
    return Run(args, accelerator, stop, **state), checkpoint, settings


def what_is_trained_on(record):
    """Names a record's pictures and captions."""
    others = [(name, other["digest"]) for name, other in record.get("others", {}).items()]
    return (record["digest"], record["captions"], *others)


def check_identity(run, models, records, held_out_records):
    """Refuses to go on with another script, base model or data set; notes what they are now."""
    now = {
        "script": Path(__file__).stem,
        **identity(run, models),
        "data set": digest([*map(what_is_trained_on, records)]),
        "held-out data": digest([*map(what_is_trained_on, held_out_records)]),
        "prediction type": models.noise_scheduler.config.prediction_type,
        "noise schedule": digest(models.noise_scheduler.alphas_cumprod.numpy()),
        "--use_8bit_adam": run.args.use_8bit_adam,
    }
    for what in now:
        if run.identity and run.identity.get(what) != now[what]:
            raise SystemExit(f"The checkpoint was trained with another {what}: use the same, or start a new run.")
    run.identity = now


def list_changes(run, settings):
    """Says which flags, and what the run made of them, are not as they were in the run that it resumes."""
    now = run.settings()
    for name, before in settings.items():
        told_in_steps = name in ("num_train_epochs", "validation_epochs")
        if now.get(name, before) != before and not told_in_steps:
            run.accelerator.print(f"  --{name} was {before} and is now {now[name]}")


def load_checkpoint(run, models, optimizer, checkpoint):
    """Brings models and optimizer to where the checkpoint left them; given flags win over the checkpoint's."""
    flags = "lr betas eps weight_decay fused beta3 decouple use_bias_correction safeguard_warmup".split()
    given = [{name: group[name] for name in flags if name in group} for group in optimizer.param_groups]
    load_weights(models, checkpoint)
    load_average(models, checkpoint)
    scaler = run.accelerator.scaler
    if not (checkpoint / "scaler.pt").exists():  # it was not in fp16, so the scaler starts anew
        run.accelerator.scaler = None
    run.accelerator.load_state(checkpoint)
    run.accelerator.scaler = scaler
    for group, settings in zip(optimizer.param_groups, given):
        group.update(settings, initial_lr=settings["lr"])


# The result, its card and the Hub


def save_result(run, models):
    """Writes the result, of the averaged weights if there are any."""
    with averaged_weights(models):
        save_model(run, models)
    output_dir = Path(run.args.output_dir)
    weights = [file for pattern in PUBLISHED for file in output_dir.glob(pattern) if file.suffix == ".safetensors"]
    open_to_others(weights, output_dir / "train_args.yaml")


def loss_curve(losses):
    """Returns the means of up to 60 parts of a run's losses, and a line of blocks that draws them."""
    points = np.array([np.mean(part) for part in np.array_split(losses, min(60, len(losses)))])
    heights = 7 * (points - points.min()) / max(np.ptp(points), 1e-12)
    return points, "".join("▁▂▃▄▅▆▇█"[int(height)] for height in heights)


def name_without_path(path):
    """Returns the name of a model or data set for others to read: None for what lies on this machine."""
    return None if not path or Path(path).exists() else path


def settings_table(settings):
    """Returns the settings that are numbers or words of interest as a Markdown table; what is off is left out."""
    vae = "pretrained_vae_model_name_or_path"
    settings = settings | {vae: name_without_path(settings.get(vae))}
    words = ("lr_scheduler", "mixed_precision", "prediction_type", vae)
    shown = {name: value for name, value in settings.items() if isinstance(value, (int, float)) or name in words}
    rows = [f"| {name} | {value} |" for name, value in shown.items() if value is not None and value is not False]
    return "\n".join(["| setting | value |", "|---|---|", *rows])


def write_model_card(run, models, repo_id):
    """Writes README.md: base, data, settings, loss curve, sample grid, and how to load the result."""
    args, given = run.args, run.args.pretrained_model_name_or_path
    metrics = Path(args.output_dir, args.logging_dir, "metrics.jsonl")
    lines = metrics.read_text().splitlines() if metrics.exists() else []  # someone may have tidied up
    rows = [json.loads(line) for line in lines]
    losses = [row["loss"] for row in rows if row.get("loss") is not None]
    base, data = name_without_path(given), name_without_path(vars(args).get("dataset_name"))
    grid = f"samples/step-{run.global_step:06d}.png"
    drawn = Path(args.output_dir, grid).exists()
    prompts = [prompt for prompt in dict.fromkeys(picture_prompts(args)) if prompt]
    widget = [{"text": prompt} for prompt in prompts]  # which the Hub offers to draw
    if drawn and len(prompts) == 1:
        widget[0]["output"] = {"url": grid}
    header = ModelCardData(
        base_model=base,
        datasets=data,
        library_name="diffusers",
        instance_prompt=vars(args).get("instance_prompt"),
        widget=widget or None,
        **CARD,
    )
    shown_base = base or (Path(given).resolve().name if given else "A new model")
    card = [f"---\n{header.to_yaml()}\n---", f"# {repo_id}", f"{shown_base}, trained on {data or 'local pictures'}."]
    if given:
        card.append("The base model's licence applies.")
    card += ["## Load it", f"```python\n{loading_code(run, models, repo_id)}\n```", "## Training"]
    if picture_prompts(args) and drawn:
        card.append(f"![samples]({grid})")
        card += [f"- {prompt}" for prompt in prompts]
    if losses:
        points, curve = loss_curve(losses)
        card.append(f"{run.global_step} steps. Loss from {points[0]:.4f} to {points[-1]:.4f}: `{curve}`")
    for row in rows:
        if row.get("validation_loss") is not None:
            card.append(f"Held-out loss at step {row['step']}: {row['validation_loss']:.4f}")
    card.append(settings_table(run.settings()) + "\n")
    text, file = "\n\n".join(card), Path(args.output_dir, "README.md")
    if file.exists() and not is_untouched(file):
        old = file.with_suffix(".old.md")
        while old.exists():
            old = old.with_suffix(".old.md")
        os.replace(file, old)
        print(f"{file} was edited, so it is {old.name} now, beside the new one.")
    replace_file(file, f"{text}\n{CARD_MARK.format(digest(text.encode()))}\n".encode())


def is_untouched(card):
    """Tells whether a model card is as a run wrote it, by the mark in its last line."""
    text, _, mark = card.read_bytes().rstrip(b"\n").rpartition(b"\n")
    return mark == CARD_MARK.format(digest(text)).encode()


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
    with_retries(
        upload_folder,
        args,
        repo_id,
        folder_path=args.output_dir,
        allow_patterns=[path.relative_to(args.output_dir).as_posix() for path in results(Path(args.output_dir))],
        commit_message="End of training",
    )


# The stages of a run


def make_accelerator(args):
    """Builds the Accelerator; refuses a launch whose processes do not know of each other."""
    for name in ("FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
            raise SystemExit(f"{name} is not supported: launch on several GPUs without it, or with DeepSpeed.")
    precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in ("no", "fp16", "bf16"):
        raise SystemExit(f"The launcher's precision {precision} is not supported: give --mixed_precision bf16 or no.")
    if precision == "bf16" and parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise SystemExit(
            "DeepSpeed lets no autocast into a model, as bf16 needs it: give --mixed_precision fp16 or no."
        )
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # of which the matrix products have to know
        torch.use_deterministic_algorithms(True)
        torch.backends.cuda.enable_mem_efficient_sdp(False)  # an attention that has no such kernel
    try:
        accelerator = Accelerator(
            # A number would give way to ACCELERATE_GRADIENT_ACCUMULATION_STEPS.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=args.gradient_accumulation_steps),
            mixed_precision=precision,
            log_with=None if args.report_to == "none" else args.report_to,
            project_dir=Path(args.output_dir, args.logging_dir),
            kwargs_handlers=[
                DistributedDataParallelKwargs(
                    # The last layer of SDXL's first text encoder is not used. See also settle_buckets.
                    find_unused_parameters=bool(vars(args).get("train_text_encoder")),
                    # They are constants, and would be sent at every forward pass, of which ranks take unlike numbers
                    # in a validation.
                    broadcast_buffers=False,
                    gradient_as_bucket_view=True,  # else each gradient would be there twice
                ),
                # The others wait while one writes a checkpoint, uploads, or has more to draw.
                InitProcessGroupKwargs(timeout=datetime.timedelta(hours=12)),
            ],
        )
    except (ImportError, ValueError) as error:
        raise SystemExit(f"The launcher's settings, or variables like them, cannot be used: {error}")
    if int(os.environ.get("WORLD_SIZE", 1)) != accelerator.num_processes:
        raise SystemExit(
            f"The launcher started {os.environ['WORLD_SIZE']} processes, each of which would train alone. "
            "On CPUs, set ACCELERATE_USE_CPU=true; on GPUs, start no more processes than there are GPUs."
        )
    if args.report_to not in ("none", "all") and not accelerator.log_with:
        raise SystemExit(f"--report_to {args.report_to} is not installed: pip install {args.report_to}")
    if args.use_8bit_adam and not find_spec("bitsandbytes"):
        raise SystemExit("--use_8bit_adam needs a library: pip install bitsandbytes")
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise SystemExit("--mixed_precision fp16 needs a GPU; on a CPU, take bf16 or no.")
    # save_weights and load_weights do the models, so that diffusers can load them from a checkpoint.
    accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
    accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    return accelerator


def prepare_unet(run, unet):
    """Brings the UNet to the device, with the layout, attention, checkpointing and kernels that it will use."""
    args = run.args
    # bitsandbytes makes the weights contiguous as it steps, so a resumed run would start in another layout.
    layout = torch.contiguous_format if args.use_8bit_adam else torch.channels_last
    unet.to(run.accelerator.device, memory_format=layout)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.enable_xformers_memory_efficient_attention:
        try:
            unet.enable_xformers_memory_efficient_attention()
        except Exception as error:  # it is missing, built for another torch, or there is no GPU
            run.accelerator.print(f"xformers cannot be used ({error}), so PyTorch's own attention is.")
    if args.torch_compile:
        torch._dynamo.config.recompile_limit = 1000  # blocks of one class have one code, and many shapes
        torch._dynamo.config.accumulated_recompile_limit = 10_000
        for block in unet.modules():
            if type(block).__name__ in ("BasicTransformerBlock", "ResnetBlock2D"):
                block.compile(dynamic=False)  # in place, so names stay; each shape by itself, so its bits do, too


def settle_buckets(run, models, data):
    """Takes a backward pass of no effect, if there are several processes.

    From the order of a first one, DDP makes the buckets in which it adds up. So a run that goes on has the same ones.
    """
    accelerator, keys = run.accelerator, data.step_keys(run.global_step)
    alone = accelerator.num_processes == 1 or accelerator.distributed_type == DistributedType.DEEPSPEED
    if alone or run.global_step == run.max_train_steps:
        return
    batch_size = len(keys) // (run.args.gradient_accumulation_steps * accelerator.num_processes)
    batch = torch.utils.data.default_collate([data.samples[key] for key in keys[:batch_size]])
    batch = send_to_device(batch, accelerator.device)
    for model in models.trained:
        model.train()
    with autocast(run):
        loss = compute_loss(models, batch, run.args)["loss"]
    accelerator.backward(loss)
    for parameter in models.params_to_optimize:
        parameter.grad = None


def make_optimizer(run, groups):
    """Builds AdamW for groups of "params" and their "lr", scaled by the total batch size if --scale_lr says so."""
    args, accelerator = run.args, run.accelerator
    for group in groups:
        group["lr"] *= run.total_batch_size if args.scale_lr else 1
    if accelerator.distributed_type == DistributedType.DEEPSPEED:  # no prepared dataloader tells it these
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = args.train_batch_size
        config["gradient_accumulation_steps"] = args.gradient_accumulation_steps
        config["gradient_clipping"] = args.max_grad_norm
    lr = groups[0]["lr"]  # of which the schedule "polynomial" keeps a small part to its end
    betas = (args.adam_beta1, args.adam_beta2)
    eps = args.adam_epsilon
    weight_decay = args.adam_weight_decay
    if args.use_8bit_adam:
        import bitsandbytes  # not every machine can install it

        return bitsandbytes.optim.AdamW8bit(groups, lr, betas=betas, eps=eps, weight_decay=weight_decay)
    return torch.optim.AdamW(groups, lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)


def make_lr_scheduler(run, optimizer):
    """Builds the schedule of the learning rate, which counts optimizer steps, at the step that the run is at."""
    return get_scheduler(
        run.args.lr_scheduler,
        optimizer,
        num_warmup_steps=run.args.lr_warmup_steps,
        num_training_steps=max(run.max_train_steps, run.args.lr_warmup_steps + 1),  # by whose difference some divide
        num_cycles=run.args.lr_num_cycles,
        power=run.args.lr_power,
        last_epoch=run.optimizer_steps - 1,
    )


def plan_steps(run, sizes):
    """Works out how many steps there are, of what batch, and between validations."""
    args = run.args
    run.total_batch_size = args.train_batch_size * args.gradient_accumulation_steps * run.accelerator.num_processes
    run.steps_per_epoch = math.ceil(max(sizes[0] * args.repeats, sizes[1]) / run.total_batch_size)
    run.max_train_steps = args.max_train_steps or args.num_train_epochs * run.steps_per_epoch
    run.validation_steps = args.validation_steps or args.validation_epochs * run.steps_per_epoch


def make_data(run, models, records, held_out_records, sizes):
    """Builds the samples to train on and the held-out ones, whose draws are the same whatever the seed."""
    shape, timesteps = models.sample_shape, len(models.noise_scheduler.betas)
    samples = Samples(run.args, records, run.seed, run.resolution, shape, timesteps)
    held_out = Samples(run.args, held_out_records, 0, run.resolution, shape, timesteps)
    return Data(run, samples, held_out, sizes)


def clear_folder(run):
    """Deletes what a killed run was writing, and what the run left that --overwrite_output_dir overwrites."""
    output_dir = Path(run.args.output_dir)
    for folder in (output_dir, output_dir / run.args.logging_dir, output_dir / "samples"):
        for torn in folder.glob(".*.tmp"):
            if re.fullmatch(TORN, torn.name):
                remove(torn)
    if run.args.overwrite_output_dir:
        for path in numbered_checkpoints(output_dir) + results(output_dir):
            remove(path)


def write_train_args(run):
    """Writes train_args.yaml: the flags as given and, as comments, what the run made of them and with what."""
    libraries = ("torch", "diffusers", "transformers", "accelerate", "datasets", "bitsandbytes")
    notes = [f"{library} {version(library)}" for library in libraries if find_spec(library)]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):  # git is missing, or this is no checkout
        git = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
        notes.append(f"commit {subprocess.check_output(git, text=True, stderr=subprocess.DEVNULL).strip()}")
    given = {name: value for name, value in vars(run.args).items() if name not in UNSAVED}
    notes += [f"{name}: {value}" for name, value in run.settings().items() if given.get(name) != value]
    text = "".join(f"# {note}\n" for note in notes) + yaml.safe_dump(given, sort_keys=False)
    replace_file(Path(run.args.output_dir, "train_args.yaml"), text.encode())


def prepare_folder(run, checkpoint, data):
    """Makes the output folder ready: nothing left of others, the metrics so far, train_args.yaml."""
    Path(run.args.output_dir, "state.json").unlink(missing_ok=True)  # the run has not ended, or goes on
    clear_folder(run)
    Path(run.args.output_dir, "samples").mkdir(parents=True, exist_ok=True)
    rows = (checkpoint / "metrics.jsonl").read_text().splitlines() if checkpoint else []
    again = f'{{"step": {run.global_step}, "validation_loss"'
    if validation_is_due(run, data):
        rows = [row for row in rows if not row.startswith(again)]
    metrics = "".join(f"{row}\n" for row in rows)
    write_train_args(run)  # first, as it says whose the rest is
    replace_file(Path(run.args.output_dir, run.args.logging_dir, "metrics.jsonl"), metrics.encode())


def start_trackers(run, checkpoint):
    """Starts the trackers, or goes on with those of the checkpoint's run."""
    args = run.args
    if run.accelerator.is_main_process:
        Path(args.output_dir, args.logging_dir).mkdir(parents=True, exist_ok=True)
    if args.hub_token:  # wandb keeps the command line
        sys.argv = [argument.replace(args.hub_token, "***") for argument in sys.argv]
    config = {name: v if isinstance(v, (bool, int, float, str)) else str(v) for name, v in run.settings().items()}
    wandb = {"id": run.tracker_id, "resume": "allow", "dir": str(Path(args.output_dir, args.logging_dir))}
    tensorboard = {"purge_step": run.global_step + 1 if checkpoint else 0}  # hides what an earlier end logged later
    try:
        run.accelerator.init_trackers(args.tracker_project_name, config, {"wandb": wandb, "tensorboard": tensorboard})
    except Exception as error:  # anything: each tracker has errors of its own
        run.accelerator.trackers = []  # which have not all started
        if isinstance(error, OSError):  # a full disk
            raise
        raise SystemExit(f"--report_to {args.report_to} cannot start: {error}")


def optimizer_bytes(args, weight):
    """How many bytes the optimizer keeps for a tensor of weights."""
    count = weight.numel()
    if vars(args).get("optimizer") == "prodigy":  # two moments, a numerator, and the first weights unless all are zero
        return 12 * count + 4 * (count if weight.any() else 1)
    if args.use_8bit_adam and count >= 4096:  # two moments of a byte, with a scale for each block of 256
        return 2 * count + 2 * 4 * math.ceil(count / 256)
    return 8 * count


def memory_parts(run, models):
    """Returns the GiB that this process's weights take, and what goes with them, by their names in the header."""
    device, trained = run.accelerator.device.type, {id(parameter) for parameter in models.params_to_optimize}
    modules = [part for part in models.pipeline.components.values() if isinstance(part, torch.nn.Module)]
    frozen = [weight for part in modules for weight in part.parameters() if id(weight) not in trained]
    weights = sum(weight.nbytes for weight in models.params_to_optimize)
    parts = {
        "weights": weights,
        "gradients": weights,
        "optimizer": sum(optimizer_bytes(run.args, weight) for weight in models.params_to_optimize),
        "average": weights if models.ema_unet is not None else 0,
        "frozen": sum(weight.nbytes for weight in frozen if weight.device.type == device),
    }
    return {name: size / 2**30 for name, size in parts.items()}


def print_memory(run, models):
    """Says what lies on the device before the first step, but for activations."""
    parts = memory_parts(run, models)
    if vars(run.args).get("offload_ema"):
        del parts["average"]
    if run.accelerator.distributed_type == DistributedType.DEEPSPEED:  # which shares it, or keeps it off the device
        del parts["optimizer"]
    listing = " + ".join(f"{size:.2f} {name}" for name, size in parts.items() if size)
    room = ""
    if run.accelerator.device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        room = f"; {free / 2**30:.1f} of the GPU's {total / 2**30:.1f} GiB are free now"
    run.accelerator.print(f"memory     {listing} = {sum(parts.values()):.2f} GiB, and activations{room}")


def print_header(run, models, data):
    """Says what the run will do and cost; refuses it if its first checkpoint cannot fit on the disk."""
    args, accelerator = run.args, run.accelerator
    parts = memory_parts(run, models)
    needed = sum(parts[name] for name in ("weights", "optimizer", "average"))
    result = parts["weights"]  # at least
    free = shutil.disk_usage(args.output_dir).free / 2**30
    batch = f"{args.train_batch_size} x {accelerator.num_processes} processes x {args.gradient_accumulation_steps}"
    pictures = f"{len(data.samples)} to train on, {len(data.held_out)} held out"
    first = data.samples.records[0]
    others = " and ".join(f"{name} {other['name']}" for name, other in first.get("others", {}).items())
    paired = f"pairs      {first['name']} with its {others}, and so on\n" if others else ""
    backend = accelerator.state.dynamo_plugin.backend  # as the launcher is configured
    compiled = "" if backend == DynamoBackend.NO else f", compiled by {backend.value.lower()}"
    accelerator.print(
        f"pictures   {pictures}, {run.resolution} x {run.resolution}\n{paired}"
        f"batch      {run.total_batch_size} = {batch} accumulated\n"
        f"steps      {run.max_train_steps}, of which {run.global_step} are done; seed {run.seed}\n"
        f"device     {accelerator.device}, precision {accelerator.mixed_precision}{compiled}\n"
        f"disk       {needed:.2f} GiB a checkpoint, {free:.1f} GiB free"
    )
    if accelerator.mixed_precision == "bf16" and accelerator.device.type == "cpu":
        accelerator.print("           there is no GPU, so bf16 runs on the CPU")
    if args.lr_scheduler != "constant" and args.lr_warmup_steps >= run.max_train_steps:
        accelerator.print("warmup     does not end before the run does: --lr_warmup_steps says how long it takes")
    if args.checkpointing_steps and needed > free:
        raise SystemExit(f"A checkpoint needs {needed:.2f} GiB, and {args.output_dir} has {free:.2f} GiB free.")
    if result > free:
        raise SystemExit(f"The result needs {result:.2f} GiB, and {args.output_dir} has {free:.2f} GiB free.")


class Output:
    """A stream whose failures are passed over: a run outlives its terminal, its pipe and the disk under its log."""

    def __init__(self, stream, stop):
        self.stop = stop
        self.stream = stream or open(os.devnull, "w")  # it may have been closed from the start
        with contextlib.suppress(AttributeError):  # it is none of a system's files
            self.stream.reconfigure(errors="backslashreplace")  # for what its encoding lacks

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def is_read(self):
        """Waits for a reader that has paused, but not once the run is to stop."""
        with contextlib.suppress(OSError, ValueError):  # it is nothing that can be waited for
            while not select.select([], [self.stream], [], 0.5)[1]:
                if self.stop.signum:
                    return False
        return True

    def write(self, text):
        """Writes what can be written, in parts that the pipe to a reader has room for once that reads."""
        with contextlib.suppress(OSError):
            for start in range(0, len(text), 1000):
                if not self.is_read():
                    break
                self.stream.write(text[start : start + 1000])
                self.stream.flush()
        return len(text)

    def flush(self):
        """Flushes what can be flushed."""
        with contextlib.suppress(OSError):
            if self.is_read():
                self.stream.flush()


def file_id(path):
    """Tells a file from another one that may have its name later."""
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino


def check_lock(run):
    """Ends a run whose output folder was removed, and has been made anew by another one."""
    with contextlib.suppress(FileNotFoundError):
        if run.lock_id and file_id(Path(run.args.output_dir, ".lock")) != run.lock_id:
            raise SystemExit(f"{run.args.output_dir} was removed and is another run's by now, so this one stops.")


def take_folder(args, lock):
    """Makes the output folder, and keeps other runs out of it until this process ends; returns its lock's file_id."""
    check_folder(args)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    return file_id(lock.lock_file) if take_lock(lock, args.output_dir) else None


def main(args):
    """Trains as the arguments say; exits with 128 + signal when told to stop."""
    stop = StopFlag()
    sys.stdout, sys.stderr = Output(sys.stdout, stop), Output(sys.stderr, stop)
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # else Ctrl-C would wait for the processes that this one waits for
    accelerator = make_accelerator(args)
    stop.listen()
    lock = FileLock(Path(args.output_dir, ".lock"))
    end = None
    try:
        execute(args, accelerator, stop, lock)
    except SystemExit as caught:  # every rank ends so, and one says why
        end = SystemExit(caught.code if accelerator.is_main_process or isinstance(caught.code, int) else 1)
    except BaseException as error:
        if hasattr(signal, "SIGCHLD"):  # which the loader takes for another error
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in multiprocessing.active_children():  # loaders, which ignore what asks them to end
            worker.kill()
        loader_died = isinstance(error, RuntimeError) and "DataLoader worker" in str(error)
        if loader_died or isinstance(error, (OSError, SafetensorError)):  # a full disk, a file that is gone
            raise SystemExit(failure("The run", args.output_dir, error))
        raise
    finally:
        lock.release()
    if accelerator.num_processes > 1:
        time.sleep(0.1)  # gloo's thread needs the interpreter to drop its last work, and ending would hold that
    end_trackers(accelerator)
    accelerator.end_training()
    if end is not None:
        raise end


# === End of engine ===


# === Files and signals: the same in every script ===
#
# They ask nothing of the text above. They offer: is_picture, open_image, read_json_lines, replace_file,
# take_lock, failure, StopFlag.


PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff"}
STOP_SIGNALS = {"SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"} & {*dir(signal)}


def is_picture(file):
    """Whether a file is a picture by its name."""
    return file.suffix.lower() in PICTURE_SUFFIXES


def open_image(data):
    """Decodes a picture upright, transparency on white, to RGB, or 16-bit or float grey to float32 in [0, 255]."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.float32)
        lowest, highest = values.min(), values.max()
        top = 1 if image.mode == "F" else 65535
        if not (0 <= lowest and highest <= top):  # which holds for no NaN either
            raise ValueError(f"its grey values go from {lowest:g} to {highest:g}, not from 0 to {top}")
        unit = top / 255
        if image.mode == "I" and highest <= 255:  # 32 bits for values of 8
            unit = 1
        return Image.fromarray((values / unit).clip(0, 255))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def read_json_lines(lines):
    """Yields what stands in lines of JSON, without blank ones."""
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                yield json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number}: {str(error).split(': line')[0]}")


def replace_file(path, data):
    """Writes bytes beside the path and renames, so that the file is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")  # containers can have the same process number
    try:
        beside.write_bytes(data)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def take_lock(lock, folder):
    """Keeps other runs out of a folder until the lock is released, or this process ends; tells whether it can."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise SystemExit(f"Another run is at work in {folder}: let it end, stop it, or take another --output_dir.")
    except OSError as error:  # a shared disk may know no locks
        print(f"{folder} cannot be locked ({error}): see to it that no second run works there.")
    return lock.is_locked


def failure(what, folder, error):
    """Says what failed in which folder, and what is free there, as a full disk is the most frequent reason."""
    existing = next(path for path in Path(folder, "_").absolute().parents if path.exists())
    free = shutil.disk_usage(existing).free / 2**30
    lines = str(error).strip().splitlines() or ["no reason is known"]
    return f"{what} failed for {folder}, where {free:.2f} GiB are free: {lines[-1]}"  # behind a loader's traceback


def is_launcher(pid):
    """Tells whether a process is accelerate's launcher, by its command line on Linux."""
    with contextlib.suppress(OSError):
        words = os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()).split("\0")
        names = [Path(word).name for word in words[:6]]  # python, its options, the launcher
        return any(re.fullmatch(r"accelerate|accelerate-launch|accelerate\.commands\..*", name) for name in names)
    return False


class StopFlag:
    """Remembers the first signal that asks the run to stop; a SIGINT after it stops at once."""

    def __init__(self):
        self.signum, self.at_once = 0, False

    def listen(self):
        """Takes the signals from here on; until then each ends the process, which may be waiting for others."""
        for name in STOP_SIGNALS:
            ignored = signal.getsignal(getattr(signal, name)) == signal.SIG_IGN
            if not (name == "SIGHUP" and ignored):  # by nohup
                signal.signal(getattr(signal, name), self.set)
        # accelerate's launcher forwards nothing to a lone process, so a parent that vanishes counts as SIGTERM.
        alone = "ACCELERATE_MIXED_PRECISION" in os.environ and "RANK" not in os.environ
        if sys.platform == "linux" and alone and is_launcher(os.getppid()):
            PR_SET_PDEATHSIG = 1
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    @contextlib.contextmanager
    def ending_at_once(self):
        """Has a signal end the process at once, where it may wait for the network and can lose nothing."""
        if self.signum:
            os._exit(128 + self.signum)
        self.at_once = True
        try:
            yield
        finally:
            self.at_once = False

    def set(self, signum, frame):
        if self.at_once:
            os._exit(128 + signum)  # without waiting for threads that wait for the network
        if signum == signal.SIGINT and self.signum:
            raise KeyboardInterrupt
        self.signum = self.signum or signum

    def was_asked(self):
        """Returns the signal by which any rank was asked to stop, or 0; all ranks call this together."""
        return max(gather_object([self.signum]))

    def exit_if_asked(self):
        """Ends every rank with 128 + signal if one was asked to stop; all ranks call this together."""
        if signum := self.was_asked():
            raise SystemExit(128 + signum)


# === End of files and signals ===


if __name__ == "__main__":
    main(args)
