"""Says in numbers what pictures are worth: how well they fit their prompts, a subject, or a set of other pictures.

--images is a folder of pictures, such as generate.py leaves, with their prompts in a metadata.jsonl or metadata.csv,
or in .txt files beside them. With --compare, a second folder of the same prompts and seeds is compared with it,
picture by picture. Each figure has its 95 % interval, which takes pictures as drawn alike: the spread between prompts
widens it. Features are those of a CLIP (--clip_model): figures of two CLIPs cannot be compared.

    clip_score         how well pictures fit their prompts, up to 100
    clip_directional   how well the change from --originals to --images fits that of their captions, -1 to 1
    clip_i             how much pictures look like those of a subject, --reference, -1 to 1
    kid, cmmd          distances to the pictures of --reference, 0 is best; kid is unbiased, so it is for small sets
    frechet            such a distance, for sets of more pictures than the features are long
    fid                the same on Inception's features, by torch-fidelity (pip install torch-fidelity)

--output_dir gets metrics.json, pictures.csv with a row for each picture, and best_and_worst.png.

    accelerate launch evaluate.py --images drawn/pictures --metrics clip_score
    accelerate launch evaluate.py --images drawn/pictures --compare drawn/compare --metrics clip_score
    accelerate launch --num_processes 4 evaluate.py --images drawn/pictures --reference dog --metrics clip_i kid
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
import contextlib
import csv
import ctypes
import datetime
import difflib
import functools
import hashlib
import importlib.util
import io
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import yaml


# The flags


FOLDERS = ("images", "compare", "originals", "reference")
# What a metric takes beside the features of the pictures.
CAPTIONED = {"clip_score": ["captions of images"]}
CAPTIONED["clip_directional"] = ["captions of images", "originals", "captions of originals"]
TAKES = CAPTIONED | dict.fromkeys(("clip_i", "kid", "cmmd", "frechet", "fid"), ["reference"])
OF_EACH = {*CAPTIONED, "clip_i"}  # which give a number for each picture; the others are distances
LEAST = {"kid": 20, "cmmd": 20, "fid": 2049}  # pictures of a distance; of frechet, one more than a feature is long


def parse_args(argv):
    """Parses the command line."""
    parser = Parser(__doc__.split("\n\n    accelerate")[0])
    add = parser.add_argument
    add("--images", type=path_name, required=True, help="folder of the pictures")
    add("--compare", type=path_name, help="folder of other pictures of the same names, prompts and seeds")
    add("--reference", type=path_name, help="folder of pictures to be like; captions are not read")
    add("--originals", type=path_name, help="folder of what was edited, of the same names, with captions of its own")
    add("--metrics", nargs="+", choices=[*TAKES], default=["clip_score"], metavar="METRIC", help=", ".join(TAKES))
    add("--clip_model", default="openai/clip-vit-large-patch14", help="folder or Hub id of a CLIP of transformers")
    add("--caption_column", default="text", help="column of the metadata that holds the captions")
    add("--batch_size", type=positive_int, default=32, help="pictures at once")
    add("--encoding_cache_dir", type=path_name, help="where features are kept (~/.cache/diffusion-training)")
    add("--output_dir", type=path_name, default="evaluated", help="folder of the results")
    args = read_flags(parser, argv, refused={}, replaces={})
    for flag in ("reference", "originals"):
        takers = [metric for metric in args.metrics if flag in TAKES[metric]]
        if takers and not getattr(args, flag):
            parser.error(f"--metrics {takers[0]} needs --{flag}")
        if getattr(args, flag) and not takers:
            parser.error(f"none of --metrics {' '.join(args.metrics)} takes --{flag}")
    for flag in FOLDERS:
        folder = getattr(args, flag)
        if folder and not os.path.isdir(folder):
            parser.error(f"--{flag} {folder} is not a folder")
        if folder and os.path.realpath(folder) == os.path.realpath(args.output_dir):
            parser.error(f"--output_dir is the folder of --{flag}: its sheet would be measured with the pictures")
    for flag, folder in {"output_dir": args.output_dir, "encoding_cache_dir": cache_folder(args)}.items():
        if not is_writable(folder):
            parser.error(f"--{flag} {folder} is no folder that can be made or written to")
    if "fid" in args.metrics and importlib.util.find_spec("torch_fidelity") is None:
        parser.error("--metrics fid takes Inception's features: pip install torch-fidelity, or take kid")
    return args


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
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from filelock import Timeout
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from tqdm import tqdm
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
from transformers.utils.logging import disable_progress_bar


# The pictures


def read_folders(args):
    """Returns the pictures of each folder by their names; those of a pair are in the same order."""
    folders = {flag: read_folder(args, flag, Path(getattr(args, flag))) for flag in FOLDERS if getattr(args, flag)}
    images = folders["images"]
    for flag in [flag for flag in folders if flag in ("compare", "originals")]:
        for name in images.keys() ^ folders[flag].keys():
            lacking = flag if name in images else "images"
            raise SystemExit(f"--images and --{flag} take pictures of the same names, and --{lacking} has no {name}.")
        folders[flag] = {name: folders[flag][name] for name in images}
    for picture, other in zip(images.values(), folders.get("compare", {}).values()):
        for key in ("caption", "seed"):
            if other[key] != picture[key]:
                told = f"{other['file']} has the {key} {other[key]!r}, and {picture['file']} {picture[key]!r}"
                raise SystemExit(f"{told}: draw both with the same prompts and seeds, as generate.py --compare does.")
    return folders


def read_folder(args, flag, folder):
    """Returns the pictures of a folder by their names: the file, its caption and seed, which are None if not told."""
    if (folder / "pictures" / "metadata.jsonl").is_file():
        raise SystemExit(f"--{flag} {folder} is the folder above the pictures: give {folder / 'pictures'}.")
    rows = {} if flag == "reference" else read_metadata(folder)
    captioned = flag in ("images", "originals") and CAPTIONED.keys() & {*args.metrics}
    pictures = {}
    for file in sorted(folder.iterdir()):
        if not is_picture(file) or file.name.startswith(".") or file.is_dir():
            continue
        row, beside = rows.get(file.name, {}), file.with_suffix(".txt")
        try:
            digest = hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()
            caption = row.get(args.caption_column)
            if not caption and flag != "reference" and beside.is_file():
                caption = beside.read_text(encoding="utf-8-sig").strip()
            text_of(f"{file} {caption}")
        except (OSError, ValueError, argparse.ArgumentTypeError) as error:
            raise SystemExit(f"{file}, or its caption, cannot be read: {error}")
        if file.stem in pictures:
            raise SystemExit(f"--{flag} {folder} has two pictures named {file.stem}: rename one.")
        if captioned and not (caption and isinstance(caption, str)):
            way_out = "give a metadata.jsonl with columns file_name and text, or name another by --caption_column"
            raise SystemExit(f"--metrics {' '.join(args.metrics)} takes captions, and {file} has none: {way_out}.")
        pictures[file.stem] = {"file": file, "digest": digest, "caption": caption, "seed": str(row.get("seed"))}
    for metric in args.metrics:
        check_count(flag, pictures, metric, LEAST.get(metric, 3))
    # Not by their names, so that these change no interval.
    return dict(sorted(pictures.items(), key=lambda item: item[1]["digest"]))


def check_count(flag, pictures, metric, least):
    """Refuses a set that is too small for a metric."""
    if len(pictures) < least:
        sentence = f"--metrics {metric} takes {least} pictures or more, and the folder of --{flag} holds"
        raise SystemExit(f"{sentence} {len(pictures)}: give more, or take another metric.")


# Features


def load_clip(name, device):
    """Returns a CLIP, its digest, and its functions from pictures and from captions to features, (n, d)."""
    try:
        model = CLIPModel.from_pretrained(name, use_safetensors=True, dtype=torch.float32).to(device).eval()
        processor, tokenizer = CLIPImageProcessorPil.from_pretrained(name), CLIPTokenizer.from_pretrained(name)
        if 2 * len(tokenizer) < model.config.text_config.vocab_size:  # as without files of one
            raise ValueError(f"its tokenizer knows only {len(tokenizer)} tokens")
    except Exception as error:  # transformers raises nearly anything over files that it cannot use
        raise SystemExit(f"--clip_model {name} cannot be loaded as a CLIP of safetensors files: {error}")

    def of_pictures(pictures):
        pixels = processor(pictures, return_tensors="pt").pixel_values
        return model.get_image_features(pixel_values=pixels.to(device)).pooler_output.cpu()

    def of_captions(captions):
        longest = model.config.text_config.max_position_embeddings
        cut = sum(len(words) > longest for words in tokenizer(captions).input_ids)
        if cut:
            print(f"{cut} captions have more than {longest} tokens: their ends are not seen.")
        whole = {"padding": "max_length", "max_length": longest, "truncation": True, "return_tensors": "pt"}
        tokens = tokenizer(captions, **whole).input_ids.to(device)
        features = [model.get_text_features(part).pooler_output.cpu() for part in tokens.split(256)]
        return torch.cat(features).double()

    digest = digest_of([model], model.config.to_json_string() + processor.to_json_string())
    return model, digest, of_pictures, of_captions


def load_inception(device):
    """Returns torch-fidelity's Inception: its digest, and its function from pictures to features, (n, 2048)."""
    from torch_fidelity.utils import create_feature_extractor

    try:
        model = create_feature_extractor("inception-v3-compat", ["2048"], device.type == "cuda", verbose=False)
    except Exception as error:  # such as a download that fails
        raise SystemExit(f"torch-fidelity's Inception for --metrics fid cannot be loaded: {error}")

    def of_pictures(pictures):
        pixels = [torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].to(device) for picture in pictures]
        return torch.cat([model(one)[0].cpu() for one in pixels])

    return digest_of([model], ""), of_pictures


def encode(args, state, stop, encoder, of_pictures, pictures):
    """Returns the features of pictures, (n, d), of which each rank takes its share from the cache or the model.

    Each is kept as it is made, by the encoder's digest and its own, so that a signal or a broken picture loses none.
    """
    cache = cache_folder(args) / "features" / encoder
    mine = [*pictures.values()][state.process_index :: state.num_processes]
    features = {}
    for picture in mine:
        with contextlib.suppress(OSError, SafetensorError, KeyError):  # there is none yet, or it is torn
            features[picture["digest"]] = load_file(cache / picture["digest"])["features"]
    missing = [picture for picture in mine if picture["digest"] not in features]
    idle = not (state.is_main_process and missing)
    with ending_together(args, state, stop):
        for batch in tqdm(batches_of(missing, args.batch_size), "encoding", disable=idle):
            rows = of_pictures([open_picture(picture["file"]) for picture in batch])
            for picture, row in zip(batch, rows):
                features[picture["digest"]] = row.clone()  # no view, which would be sent with its batch
                with contextlib.suppress(OSError):  # such as a full disk
                    replace_file(cache / picture["digest"], save({"features": row.clone()}))
            if stop.signum:
                break
    features = dict(gather_object([*features.items()]))
    return torch.stack([features[picture["digest"]] for picture in pictures.values()]).double()


def all_features(args, state, stop, folders):
    """Returns the features of each folder by its flag, and the others that metrics take, by their names."""
    with ending_together(args, state, stop):
        model, encoder, of_pictures, of_captions = load_clip(args.clip_model, state.device)
        for flag in folders if "frechet" in args.metrics else ():
            check_count(flag, folders[flag], "frechet", model.config.projection_dim + 1)
        inception = load_inception(state.device) if "fid" in args.metrics else None
    features = {flag: encode(args, state, stop, encoder, of_pictures, folders[flag]) for flag in folders}
    for flag in [flag for flag in folders if inception and flag != "originals"]:
        features[f"inception of {flag}"] = encode(args, state, stop, *inception, folders[flag])
    for flag in [flag for flag in folders if flag in ("images", "originals")]:
        if state.is_main_process and CAPTIONED.keys() & {*args.metrics}:
            features[f"captions of {flag}"] = of_captions([picture["caption"] for picture in folders[flag].values()])
    return features


# The formulas. Features are tensors (n, d), with a row for each picture or caption.


def clip_score(images, captions):
    """Returns 100 max(cos, 0) of each picture and its caption, (n,): arXiv:2104.08718, eq. 1, with w = 100."""
    return 100 * F.cosine_similarity(images, captions).clip(min=0)


def clip_directional(images, captions, originals, original_captions):
    """Returns the cos between the changes of each picture and of its caption, (n,): arXiv:2108.00946, eq. 2."""
    changes = F.normalize(images) - F.normalize(originals)
    caption_changes = F.normalize(captions) - F.normalize(original_captions)
    return F.cosine_similarity(changes, caption_changes)


def clip_i(images, references):
    """Returns each picture's mean cos with all references, (n,): arXiv:2208.12242, section 4.2."""
    return F.normalize(images) @ F.normalize(references).mean(0)


def frechet(x, y):
    """Returns |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of means and covariances: arXiv:1706.08500, eq. 6."""
    means = (x.mean(0) - y.mean(0)).square().sum()
    # With S = R'R, the trace of the root is the sum of the singular values of R1 R2'.
    r, s = (torch.linalg.qr((z - z.mean(0)) / math.sqrt(len(z) - 1), mode="r").R for z in (x, y))
    return means + r.square().sum() + s.square().sum() - 2 * torch.linalg.svdvals(r @ s.T).sum()


def mean_kernel(kernel, x, y):
    """Returns the mean of a kernel over all pairs of rows, which are taken in parts that fit in memory."""
    return sum(kernel(part, y).sum() for part in x.split(4096)) / (len(x) * len(y))


def mean_of_others(kernel, x):
    """Returns the mean of a kernel over all pairs of a row with another one."""
    own = sum(kernel(part, part).diagonal().sum() for part in x.split(4096)) / len(x)
    return (len(x) * mean_kernel(kernel, x, x) - own) / (len(x) - 1)


def kid(x, y):
    """Returns the squared maximum mean discrepancy under (x.y / d + 1)^3, unbiased: arXiv:1801.01401, section 4."""

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    return mean_of_others(kernel, x) + mean_of_others(kernel, y) - 2 * mean_kernel(kernel, x, y)


def cmmd(x, y):
    """Returns 1000 times that of unit vectors under exp(-|x - y|^2 / 200): arXiv:2401.09603, section 4.

    It counts pictures with themselves, as the authors' code does, so small sets of one law are apart.
    """

    def kernel(a, b):
        return (-torch.cdist(a, b).square() / 200).exp()

    x, y = F.normalize(x), F.normalize(y)
    return 1000 * (mean_kernel(kernel, x, x) + mean_kernel(kernel, y, y) - 2 * mean_kernel(kernel, x, y))


FORMULAS = {"clip_score": clip_score, "clip_directional": clip_directional, "clip_i": clip_i}
FORMULAS |= {"kid": kid, "cmmd": cmmd, "frechet": frechet, "fid": frechet}


def values_of(metric, features, flag, rows=slice(None), others=slice(None)):
    """Returns a metric of some pictures of a folder: rows are their numbers, others those of --reference to take."""
    encoder = "inception of " if metric == "fid" else ""
    names = [flag, *TAKES[metric]]
    return FORMULAS[metric](*[features[encoder + name][others if name == "reference" else rows] for name in names])


# Intervals


def student_quantile(freedom):
    """Returns the 97.5 % quantile of Student's t, within 1 % from 2 degrees of freedom on."""
    terms = (1.959964, 2.372271, 2.822499, 2.555850, 1.589534)  # Abramowitz and Stegun 1972, eq. 26.7.5
    return sum(term / freedom**power for power, term in enumerate(terms))


def intervals(statistics, most, *counts):
    """Returns statistics of samples of so many rows, each with the ends of its 95 % interval.

    statistics takes the numbers of the rows to count, a tensor for each sample, and returns a list of numbers. The
    jackknife leaves out each row, or of many rows each of so many groups, most (Efron and Tibshirani 1993, chapter
    11). If each row is left out, the interval of a mean is Student's.
    """
    all_rows = [torch.arange(count) for count in counts]
    values = np.array(statistics(*all_rows))
    variances = np.zeros_like(values)
    for i, rows in enumerate(all_rows):
        groups = min(len(rows), most)
        without = [statistics(*all_rows[:i], rows[rows % groups != g], *all_rows[i + 1 :]) for g in range(groups)]
        variances += (groups - 1) * np.var(without, axis=0)
    reaches = student_quantile(min(most, *counts) - 1) * np.sqrt(variances)
    return [{"value": v, "low": v - r, "high": v + r} for v, r in zip(values.tolist(), reaches.tolist())]


def measure(metric, folders, features, stop):
    """Returns what each folder has of a metric, and how the second one differs, each with its interval."""
    flags = [flag for flag in ("images", "compare") if flag in folders]
    sets = ["images", "reference"] if "reference" in TAKES[metric] else ["images"]

    def figures(*rows):
        if stop.signum:
            raise SystemExit
        values = [values_of(metric, features, flag, *rows).mean().item() for flag in flags]
        return [*values, *np.diff(values)]  # which of one value is none

    most = 200 if metric in OF_EACH else 20  # as distances take their time
    found = intervals(figures, most, *[len(folders[flag]) for flag in sets])
    return dict(zip(("images", "compare", "difference"), found))


# The results


def report(args, folders, results):
    """Prints the figures, and says where the second folder differs."""
    counts = [f"{len(pictures)} {flag}" for flag, pictures in folders.items()]
    print(f"{args.clip_model}; {', '.join(counts)}")
    for metric, figures in results.items():
        for column, figure in figures.items():
            print(f"{metric:<18}{column:<12}" + "{value:.4g} ({low:.4g} to {high:.4g})".format(**figure))
        difference = figures.get("difference")
        if difference and difference["low"] <= 0 <= difference["high"]:
            print(f"{metric}: no difference is shown, as 0 lies in the interval.")
        elif difference:
            higher = difference["low"] > 0
            better = higher if metric in OF_EACH else not higher  # as less is better of distances
            way = f"{'higher' if higher else 'lower'}, which is {'better' if better else 'worse'}"
            print(f"{metric}: a difference is shown. --compare is {way}.")


def write_results(args, folders, features, results):
    """Writes metrics.json, pictures.csv, and the ten best and ten worst pictures of --images by the first metric."""
    output_dir = Path(args.output_dir)
    sheet = output_dir / "best_and_worst.png"
    sheet.unlink(missing_ok=True)  # of other pictures
    told = {flag: {"folder": getattr(args, flag), "pictures": len(pictures)} for flag, pictures in folders.items()}
    figures = {"clip_model": args.clip_model, **told, "metrics": results}
    replace_file(output_dir / "metrics.json", (json.dumps(figures, indent=1) + "\n").encode())
    metrics = [metric for metric in results if metric in OF_EACH]
    rows = [["folder", "file", "caption", *metrics]]
    for flag in [flag for flag in ("images", "compare") if flag in folders]:
        numbers = [values_of(metric, features, flag).tolist() for metric in metrics]
        pictures = zip(folders[flag].values(), *numbers)
        rows += sorted([flag, str(picture["file"]), picture["caption"], *own] for picture, *own in pictures)
    lines = io.StringIO()
    csv.writer(lines, lineterminator="\n").writerows(rows)
    replace_file(output_dir / "pictures.csv", lines.getvalue().encode())
    if metrics:
        scores = values_of(metrics[0], features, "images").tolist()
        ranked = sorted(zip(scores, [picture["file"] for picture in folders["images"].values()]), reverse=True)
        files = [file for _, file in ranked]
        count = min(10, len(files) // 2)
        write_sheet([files[:count], files[-count:]], sheet)


@torch.inference_mode()
def main(args):
    """Measures the pictures; ranks share their features, and the first one says and writes the results."""
    disable_progress_bar()
    state = start_processes()
    stop = StopFlag()
    with ending_together(args, state, stop):
        folders = read_folders(args)
        stop.listen()
    features = all_features(args, state, stop, folders)
    with ending_together(args, state, stop):
        if state.is_main_process:
            results = {metric: measure(metric, folders, features, stop) for metric in args.metrics}
            report(args, folders, results)
            write_results(args, folders, features, results)
            print(f"More is in {args.output_dir}.")
    state.destroy_process_group()


# === Programs: the same in generate.py and evaluate.py ===
#
# They ask nothing of the text above. They offer: start_processes, ending_together, digest_of, batches_of, read_rows,
# read_metadata, open_picture, png_bytes, write_sheet.


def start_processes():
    """Returns what tells one process of several from the others; they wait for each other for hours."""
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=datetime.timedelta(hours=12))
    if int(os.environ.get("WORLD_SIZE", 1)) != state.num_processes:  # each would do all
        raise SystemExit("The processes do not know of each other: on CPUs, set ACCELERATE_USE_CPU=true.")
    return state


@contextlib.contextmanager
def ending_together(args, state, stop):
    """Runs a block, which all processes leave together, and ends them all if one failed or was sent a signal.

    The first one says why. In the block they may not wait for each other, as one of them may leave it early.
    """
    problem = None
    try:
        yield
    except SystemExit as error:
        problem = error.code
    except OSError as error:  # such as a full disk
        problem = failure("Writing", args.output_dir, error)
    found = gather_object([(problem, stop.signum)])
    problems = [sentence for sentence, _ in found if sentence]
    signum = max(signum for _, signum in found)
    if problems:
        raise SystemExit(problems[0] if state.is_main_process else 1)
    if signum:
        name = signal.Signals(signum).name
        state.print(f"Stopped by {name}. The same command goes on from here.", file=sys.stderr)
        raise SystemExit(128 + signum)


def digest_of(models, settings):
    """Returns a digest of models' weights, and of settings that change what they do, as text."""
    digest = hashlib.blake2b(settings.encode(), digest_size=8)
    for model in models:
        for weight in model.state_dict().values():
            digest.update(weight.cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def batches_of(items, size):
    """Returns a list in parts of so many items; the last one may be shorter."""
    return [items[first : first + size] for first in range(0, len(items), size)]


def read_rows(file):
    """Returns the rows of a .jsonl, .csv or .parquet as dictionaries, and of a .txt its lines as prompts."""
    if file.suffix not in (".txt", ".jsonl", ".csv", ".parquet"):
        raise SystemExit(f"{file} is none of .txt, .jsonl, .csv and .parquet.")
    try:
        if file.suffix == ".parquet":
            from pyarrow import parquet

            return parquet.read_table(file).to_pylist()
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix == ".txt":
            return [{"prompt": line.strip()} for line in text.split("\n") if line.strip()]
        if file.suffix == ".csv":
            rows = list(csv.DictReader(io.StringIO(text), strict=True))
        else:
            rows = list(read_json_lines(text.split("\n")))
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict):
                raise ValueError(f"row {number} is no object, {{...}}")
            if None in row:
                raise ValueError(f"row {number} has more cells than the header: quote texts that have commas")
        return rows
    except Exception as error:  # anything, from a missing file to one that is torn
        raise SystemExit(f"{file} cannot be read: {error}")


def read_metadata(folder):
    """Returns the rows of a folder's metadata.jsonl, or else of its metadata.csv, by the files that they are of."""
    for file in (folder / "metadata.jsonl", folder / "metadata.csv"):
        if file.is_file():
            return {os.path.normpath(str(row.get("file_name"))): row for row in read_rows(file)}
    return {}


def open_picture(file):
    """Opens a picture as the training scripts do, with 8 bits a color."""
    try:
        picture = open_image(Path(file).read_bytes())
    except UnidentifiedImageError:
        raise SystemExit(f"{file} does not open as a picture: Pillow knows no such format.")
    except Exception as error:  # nearly anything, over broken files
        raise SystemExit(f"{file} does not open as a picture: {error}")
    if picture.mode == "F":  # grey of 16 bits, or of floats
        picture = Image.fromarray(np.asarray(picture).round().astype(np.uint8))
    return picture.convert("RGB")


def png_bytes(image, **settings):
    """Returns a picture as a PNG."""
    data = io.BytesIO()
    image.save(data, "PNG", **settings)
    return data.getvalue()


def write_sheet(rows, file):
    """Writes a sheet with rows of pictures, by their files, each in a square."""
    side = 256
    sheet = Image.new("RGB", (side * max(map(len, rows)), side * len(rows)), "white")
    for top, pictures in enumerate(rows):
        for left, picture in enumerate(pictures):
            square = ImageOps.pad(open_picture(picture), (side, side), color="white")
            sheet.paste(square, (side * left, side * top))
    replace_file(file, png_bytes(sheet))


# === End of programs ===


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
