"""Draws pictures with a model that a training script left, or with any other that diffusers loads.

The model is a folder, a file or a Hub id: a whole pipeline, adapters, a new word, or a checkpoint's unet or unet_ema.
What adapters, a word or a UNet go on is found in the run's train_args.yaml, in the model card, or by --base. Each
picture has a generator of its own, from its seed, its prompt and its number. So the pictures are the same on any
number of processes (on CPUs, of as many threads each), and in any order. Those that are there are not drawn again.

--output_dir gets pictures/ with a metadata.jsonl that the training scripts read, and grid.png. The second model's
pictures, with --compare, are in compare/.

    accelerate launch generate.py --model my-lora --prompt "a photo of sks dog" --num_images_per_prompt 8
    accelerate launch --num_processes 4 generate.py --model my-model --prompts prompts.jsonl --output_dir drawn
    accelerate launch generate.py --model my-model --compare my-base --prompt "a cat" --output_dir side-by-side
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
import datetime
import difflib
import functools
import hashlib
import inspect
import io
import json
import logging
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import yaml


# The flags


NUMBERS = ("num_inference_steps", "guidance_scale", "image_guidance_scale", "height", "width")
SETTINGS = ("prompt", "negative_prompt", "image", "seed", *NUMBERS)
COLUMNS = ("text", *SETTINGS)  # of a file of prompts; text is a prompt, too


def side(words):
    """Takes a height or a width in pixels."""
    if positive_int(words) % 8:
        raise argparse.ArgumentTypeError(f"must be a multiple of 8, not {words}")
    return int(words)


def parse_args(argv):
    """Parses the command line."""
    parser = Parser(__doc__.split("\n\n    accelerate")[0])
    add = parser.add_argument
    add("--model", nargs="+", required=True, help="what to draw with; adapters and words after it go onto it")
    add("--base", help="what adapters, a word or a UNet go on, if the run does not say; of a single file, its configs")
    add("--compare", nargs="+", help="a second model, which draws the same from the same noise")
    add("--lora_scale", type=real_number, nargs="+", default=[1.0], help="strength of adapters: one, or one for each")
    add("--prompt", nargs="+", help="prompts, if the model takes any")
    add("--prompts", help="a .txt with a prompt a line, or .jsonl, .csv, .parquet with columns " + ", ".join(COLUMNS))
    add("--negative_prompt", help="what not to draw")
    add("--image", help="picture to start from, or to be controlled by, if the model takes one")
    add("--num_images_per_prompt", type=positive_int, default=1, help="pictures of each prompt")
    add("--seed", type=seed_number, default=0, help="names, with prompt and number, the noise of a picture")
    add("--num_inference_steps", type=positive_int, help="default: the pipeline's")
    add("--guidance_scale", type=non_negative, help="default: the pipeline's")
    add("--image_guidance_scale", type=non_negative, help="of an editor, how near to --image; default: the pipeline's")
    add("--height", type=side, help="in pixels; default: the run's --resolution, or the pipeline's")
    add("--width", type=side, help="in pixels; default: the run's --resolution, or the pipeline's")
    add("--scheduler", help="a sampler of diffusers, such as DPMSolverMultistepScheduler; default: the model's")
    add("--dtype", choices=["fp32", "fp16", "bf16"], help="default: fp16 on a GPU, fp32 on a CPU")
    add("--batch_size", type=positive_int, default=1, help="pictures at once; this changes their last bits")
    add("--vae_tiling", **switch, help="decode large pictures in parts, which takes less memory")
    add("--torch_compile", **switch, help="compile the UNet's blocks, for hundreds of pictures")
    add("--output_dir", type=path_name, default="generated", help="folder of what is drawn")
    args = read_flags(parser, argv, refused={}, replaces={"prompt": "prompts", "prompts": "prompt"})
    if args.prompt and args.prompts:
        parser.error("give --prompt or --prompts, not both")
    if not is_writable(args.output_dir):
        parser.error(f"--output_dir {args.output_dir} is no folder that can be made or written to")
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

import diffusers
import numpy as np
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env
from filelock import FileLock, Timeout
from huggingface_hub import HfApi, ModelCard, snapshot_download
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from safetensors import safe_open
from tqdm import tqdm


# The jobs: one for each picture


def read_prompts(file):
    """Returns the rows of a file of prompts: dictionaries of some of COLUMNS, each with a prompt."""
    kinds = {"seed": seed_number, "num_inference_steps": positive_int, "height": side, "width": side}
    kinds |= {"guidance_scale": non_negative, "image_guidance_scale": non_negative}
    rows = read_rows(Path(file))
    if not rows:
        raise SystemExit(f"--prompts {file} holds no prompt.")
    known = []
    for number, row in enumerate(rows, 1):
        row["prompt"] = row.get("prompt") or row.get("text")
        if not row["prompt"]:
            raise SystemExit(f"--prompts {file}: row {number} has no column prompt or text, or nothing in it.")
        checked = {}
        for name in [name for name in COLUMNS if row.get(name) not in (None, "")]:
            value = row[name]
            if name in kinds:
                value = str(value).removesuffix(".0")  # as tables have whole numbers
            try:
                checked[name] = kinds.get(name, text_of)(value)
            except (argparse.ArgumentTypeError, TypeError) as error:
                raise SystemExit(f"--prompts {file}: {name} of row {number} {error}.")
        known.append(checked)
    if others := {name for row in rows for name in row} - {*COLUMNS}:
        PartialState().print(f"--prompts {file}: {', '.join(sorted(others))} is not read, but {', '.join(COLUMNS)}.")
    return known


def make_jobs(args):
    """Returns a job for each picture: its file's name, settings, and number.

    Of prompts that are given several times with one seed, the number tells the pictures apart.
    """
    rows = read_prompts(args.prompts) if args.prompts else [{"prompt": prompt} for prompt in args.prompt or [""]]
    jobs = []
    earlier = collections.Counter()
    for place, row in enumerate(rows):
        settings = {name: row.get(name, getattr(args, name)) for name in SETTINGS}
        if settings["image"] and not os.path.isfile(settings["image"]):
            raise SystemExit(f"There is no picture {settings['image']}.")
        first = 10**6 * earlier[settings["prompt"], settings["seed"]]  # so that more pictures change no number
        earlier[settings["prompt"], settings["seed"]] += 1
        for copy in range(args.num_images_per_prompt):
            jobs.append({"file_name": f"{place:05d}-{copy}.png", **settings, "number": first + copy})
    return jobs


def usual_size(pipeline):
    """Returns the side of the pictures that a pipeline's model was made for, or None if it does not say."""
    model = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    side = getattr(pipeline, "default_sample_size", None) or (model and model.config.get("sample_size"))
    return side and side * pipeline.vae_scale_factor


def fill_in(jobs, pipeline, resolution):
    """Gives jobs the settings that were left open: the run's resolution, if it is known, and the pipeline's own.

    What is drawn from a picture has its shape, with the resolution as the shorter side, or else its size. The second
    model of --compare draws with what the first one filled in.
    """
    parameters = inspect.signature(pipeline.__call__).parameters
    defaults = {name: parameters[name].default for name in NUMBERS if name in parameters}
    if "height" in parameters:
        size = resolution or defaults["height"] or usual_size(pipeline)
        defaults |= {"height": size, "width": size}
    for job in jobs:
        own = defaults
        if job["image"]:
            width, height = open_picture(job["image"]).size
            scale = resolution / min(width, height) if resolution else 1
            width, height = (max(8, round(length * scale / 8) * 8) for length in (width, height))
            own = defaults | {"width": width, "height": height}
        job.update({name: value for name, value in own.items() if job[name] is None})


def noise_seed(job):
    """Returns the seed of a picture's noise, from its seed, prompt and number: 32 bits, as torch keeps no more."""
    named = json.dumps([job["seed"], job["prompt"], job["number"]])
    return int(hashlib.blake2b(named.encode(), digest_size=4).hexdigest(), 16)


def settings_of(file):
    """Returns the settings that this program left in a picture, or nothing of another one."""
    try:
        with Image.open(file) as image:
            return dict(json.loads(image.info["settings"]))
    except Exception:  # Pillow raises nearly anything
        return {}


def missing_jobs(folder, jobs, settings):
    """Lists what is still to be drawn; refuses a folder with a picture that was drawn in another way."""
    missing = []
    for job in jobs:
        file = folder / job["file_name"]
        if not file.exists():
            missing.append(job)
            continue
        drawn = settings_of(file)
        if not drawn:
            raise SystemExit(f"{file} is none of this program's pictures: take another --output_dir.")
        wanted = job | settings
        for name in wanted:
            if drawn.get(name) != wanted[name]:
                change = f"{name} {drawn.get(name)!r}, not {wanted[name]!r}"
                raise SystemExit(f"{file} was drawn with {change}: take another --output_dir.")
    return missing


def make_batches(jobs, batch_size):
    """Returns jobs in batches whose pictures a pipeline can draw together."""
    groups = collections.defaultdict(list)
    for job in jobs:
        alike = [job["negative_prompt"] is None, job["image"] is None]
        alike += [job[name] for name in NUMBERS]
        groups[tuple(alike)].append(job)
    return [batch for group in groups.values() for batch in batches_of(group, batch_size)]


# The pictures


def prepare(args, pipeline, device):
    """Moves a pipeline to the device, and returns the settings that each of its pictures records."""
    unconditional = isinstance(pipeline, diffusers.DDPMPipeline)  # whose noise has the precision of its UNet
    if args.scheduler:
        samplers = {sampler.__name__: sampler for sampler in pipeline.scheduler.compatibles}
        samplers.pop("EDMEulerScheduler", None)  # which has another noise schedule
        if unconditional:  # other samplers take their noise scaled
            samplers = {name: samplers[name] for name in ("DDIMScheduler", "DDPMScheduler")}
        if args.scheduler not in samplers:
            raise SystemExit(f"--scheduler {args.scheduler} is none of {', '.join(sorted(samplers))}.")
        pipeline.scheduler = samplers[args.scheduler].from_config(pipeline.scheduler.config)
    dtype = args.dtype or ("fp16" if device.type == "cuda" and not unconditional else "fp32")
    if unconditional and (dtype != "fp32" or args.vae_tiling):
        raise ValueError("an unconditional model draws in --dtype fp32, and has no VAE for --vae_tiling")
    pipeline.to(device, {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype])
    pipeline.set_progress_bar_config(disable=True)
    if args.vae_tiling:
        pipeline.vae.enable_tiling()
    if args.torch_compile:
        pipeline.unet.compile_repeated_blocks()
    parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    schedule = {name: value for name, value in pipeline.scheduler.config.items() if name[0] != "_"}
    return {
        "scheduler": type(pipeline.scheduler).__name__,
        "dtype": dtype,
        "weights": digest_of(parts, json.dumps(schedule, sort_keys=True, default=str)),
        "lora_scale": args.lora_scale,
        "vae_tiling": args.vae_tiling,
    }


def draw(pipeline, jobs):
    """Draws the pictures of a batch."""
    parameters = inspect.signature(pipeline.__call__).parameters
    first = jobs[0]
    given = {name: first[name] for name in NUMBERS if first[name] is not None}
    if "prompt" in parameters or first["prompt"]:
        given["prompt"] = [job["prompt"] for job in jobs]
    else:
        given["batch_size"] = len(jobs)
    if first["negative_prompt"] is not None:
        given["negative_prompt"] = [job["negative_prompt"] for job in jobs]
    if first["image"]:
        size = (first["width"], first["height"])
        given["image"] = [open_picture(job["image"]).resize(size, Image.Resampling.LANCZOS) for job in jobs]
        for name in {"width", "height"} - parameters.keys():  # as an editor draws in the size of its picture
            del given[name]
    if unknown := given.keys() - parameters.keys():
        raise SystemExit(f"A {type(pipeline).__name__} takes no {' and no '.join(sorted(unknown))}.")
    generators = [torch.Generator().manual_seed(noise_seed(job)) for job in jobs]
    try:
        images = pipeline(**given, generator=generators, output_type="np").images
    except ValueError as error:  # such as a size that the model cannot draw
        raise SystemExit(f"{first['file_name']} cannot be drawn: {error}")
    if not np.isfinite(images).all():
        reason = "its weights are not finite, or the guidance is too strong"
        if pipeline.dtype == torch.float16:
            reason = "half precision overflows: give --dtype fp32 or bf16"
        raise SystemExit(f"{first['file_name']} is not finite, as {reason}.")
    return pipeline.numpy_to_pil(images)


def save_picture(image, file, drawn):
    """Writes a picture with its settings in it, for this program and as A1111 writes them, with the noise's seed."""
    negative = f"\nNegative prompt: {drawn['negative_prompt']}" if drawn["negative_prompt"] else ""
    notes = PngInfo()
    notes.add_itxt("settings", json.dumps(drawn))
    notes.add_itxt(
        "parameters",
        f"{drawn['prompt']}{negative}\nSteps: {drawn['num_inference_steps']}, Sampler: {drawn['scheduler']}, "
        f"CFG scale: {drawn['guidance_scale']}, Seed: {noise_seed(drawn)}, Size: {image.width}x{image.height}, "
        f"Model hash: {drawn['weights']}, Model: {drawn['model']}",
    )
    replace_file(file, png_bytes(image, pnginfo=notes))


def draw_missing(args, state, stop, models, jobs, folder):
    """Draws what a folder lacks of the jobs, ranks by turns; returns how many pictures that is."""
    with ending_together(args, state, stop):
        try:
            pipeline, _ = open_model(models, args.base, args.lora_scale)
            settings = prepare(args, pipeline, state.device)
            resolutions = [run_flags(name[0]).get("resolution") for name in (args.model, args.compare) if name]
        except Exception as error:  # diffusers raises nearly anything over files that it cannot use
            raise SystemExit(f"{' '.join(models)} cannot be loaded: {error}")
        parameters = inspect.signature(pipeline.__call__).parameters
        if "prompt" in parameters and not (args.prompt or args.prompts):
            raise SystemExit(f"{' '.join(models)} draws from prompts: give --prompt or --prompts.")
        if "image" in parameters and not all(job["image"] for job in jobs):
            raise SystemExit(f"{' '.join(models)} draws from pictures: give --image, or a column image in --prompts.")
        fill_in(jobs, pipeline, resolutions[0] or resolutions[-1])
        missing = missing_jobs(folder, jobs, settings)
    missing = broadcast_object_list([missing])[0]  # as other machines may see other pictures
    settings["model"] = " ".join(Path(model).name if os.path.exists(model) else model for model in models)
    with ending_together(args, state, stop):
        mine = make_batches(missing, args.batch_size)[state.process_index :: state.num_processes]
        for batch in tqdm(mine, "drawing", disable=not state.is_main_process):
            for job, image in zip(batch, draw(pipeline, batch)):
                save_picture(image, folder / job["file_name"], job | settings)
            if stop.signum:
                break
    return len(missing)


def write_metadata(folder):
    """Writes a row for each picture: its prompt as "text", and its settings. A text that you changed stays."""
    rows = {name: row for name, row in read_metadata(folder).items() if (folder / name).exists()}
    for file in folder.glob("*.png"):
        drawn = settings_of(file)
        row = rows.get(file.name, {})
        if drawn and row.get("prompt", drawn["prompt"]) != drawn["prompt"]:  # of a picture that was drawn anew
            row = {}
        if drawn:
            rows[file.name] = {"text": drawn["prompt"]} | row | drawn
    lines = [json.dumps(rows[name], ensure_ascii=False) + "\n" for name in sorted(rows)]
    replace_file(folder / "metadata.jsonl", "".join(lines).encode())


def finish(folders, jobs, output_dir):
    """Writes metadata.jsonl, and grid.png: 64 pictures, 8 a row, those of a second model below the first one's."""
    files = [folder / job["file_name"] for folder in folders for job in jobs]
    lost = sum(not file.exists() for file in files)
    if lost:
        way_out = "take an --output_dir that all machines share, or wait, and give the same command again"
        raise SystemExit(f"{lost} pictures of other machines are not seen from here: {way_out}.")
    for folder in folders:
        write_metadata(folder)
    shown = batches_of(jobs[:64], 8)
    rows = [[folder / job["file_name"] for job in row] for row in shown for folder in folders]
    write_sheet(rows, output_dir / "grid.png")


def main(args):
    """Draws what --output_dir lacks. A signal ends it after the batch at hand, with 128 + signal."""
    state = start_processes()
    stop = StopFlag()
    output_dir = Path(args.output_dir)
    models = {output_dir / "pictures": args.model}
    if args.compare:
        models[output_dir / "compare"] = args.compare
    lock = FileLock(output_dir / ".lock")
    try:
        with ending_together(args, state, stop):
            jobs = make_jobs(args)
            output_dir.mkdir(parents=True, exist_ok=True)
            if state.is_main_process:
                take_lock(lock, output_dir)
            stop.listen()
        started = time.perf_counter()
        drawn = sum(draw_missing(args, state, stop, model, jobs, folder) for folder, model in models.items())
        seconds = time.perf_counter() - started
        with ending_together(args, state, stop):
            if state.is_main_process:
                finish([*models], jobs, output_dir)
                speed = f"{drawn / seconds:.2f} a second with loading; processes: {state.num_processes}"
                there = len(models) * len(jobs) - drawn
                print(f"{drawn} pictures drawn in {seconds:.1f} s ({speed}); {there} were there already.")
                print(f"All are in {' and '.join(map(str, models))}.")
    finally:
        lock.release()
    state.destroy_process_group()


# === Results: the same in generate.py and export.py ===
#
# They ask nothing of the text above. They offer: open_model, kind_of, run_flags.


KINDS = {  # what a folder holds, by the first of these names that is in it
    "model_index.json": "pipeline",
    "pytorch_lora_weights.safetensors": "adapters",
    "learned_embeds.safetensors": "word",
    "unet": "checkpoint",
    "controlnet": "checkpoint of a ControlNet",
    "config.json": "model",  # a UNet or a ControlNet
}
# As the training scripts open a base: the safety checker would blacken pictures.
UNCHECKED = {"safety_checker": None, "requires_safety_checker": False}


def open_model(models, base, scales):
    """Opens a model, or what it goes on, with the parts that go onto that; adapters at their scales, one or one each.

    Returns the pipeline and the names of its adapters. What is wrong is a ValueError, or whatever diffusers raises.
    """
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    kinds = [kind_of(model) for model in models]
    flags = run_flags(models[0])
    parts = list(zip(models, kinds))
    unet = models[0] if kinds[0] == "model" else Path(models[0], "unet")
    if kinds[0] in ("pipeline", "file"):
        pipeline = open_whole(models[0], {"single_file_config": base})
        parts = parts[1:]
    elif kinds[0] in ("model", "checkpoint") and class_of(unet) == "UNet2DModel":
        pipeline = open_unconditional(unet, base, flags)
        parts = parts[1:]
    else:
        pipeline = open_base(base, flags)
    adapters = []
    parts.sort(key=lambda part: part[1] in ("adapters", "word"))  # last, as they go with the models that they change
    for model, kind in parts:
        if kind == "adapters":
            adapters.append(f"adapters_{len(adapters)}")
            name = None if Path(model).is_file() else "pytorch_lora_weights.safetensors"
            pipeline.load_lora_weights(model, adapter_name=adapters[-1], weight_name=name)
        elif kind == "word":
            add_word(pipeline, model)
        else:
            pipeline = with_part(pipeline, model, kind)
    if adapters:
        scales = scales * len(adapters) if len(scales) == 1 else scales
        if len(scales) != len(adapters):
            raise ValueError(f"--lora_scale has {len(scales)} numbers, and there are {len(adapters)} adapters")
        pipeline.set_adapters(adapters, scales)
    if hasattr(pipeline, "watermark"):  # of SDXL, which the training scripts' samples do not have
        pipeline.watermark = None
    return pipeline, adapters


def kind_of(model):
    """Tells what a folder, a file or a Hub id holds: one of KINDS, or "file", a whole model."""
    path = Path(model)
    if path.is_file() and path.suffix != ".safetensors":
        raise ValueError("a model of one file is a .safetensors")
    if path.is_file():
        with safe_open(path, "pt") as file:
            keys = [*file.keys()]
        if any("lora" in key for key in keys):
            return "adapters"
        return "word" if len(keys) < 3 else "file"
    if not path.exists() and (path.is_absolute() or len(path.parts) > 2):
        raise ValueError("there is no such folder or file, and a Hub id has no more than two parts")
    try:
        names = os.listdir(path) if path.is_dir() else [name.split("/")[0] for name in HfApi().list_repo_files(model)]
    except Exception as error:
        try:
            names = os.listdir(snapshot_download(model, local_files_only=True))  # which needs no network
        except Exception:
            raise ValueError(f"there is no such folder or file, and as a Hub id: {error}")
    for name, kind in KINDS.items():
        if name in names:
            return kind
    raise ValueError(f"it holds none of {', '.join(KINDS)}")


def run_flags(model):
    """Returns the flags of the run that left a model: from its train_args.yaml, or those that its card has."""
    path = Path(model)
    folders = (path, *path.absolute().parents[:2]) if path.exists() else ()  # a checkpoint's unet stands deeper
    for folder in folders:
        if (folder / "train_args.yaml").is_file():
            return yaml.safe_load((folder / "train_args.yaml").read_text(encoding="utf-8")) or {}
    try:
        card = ModelCard.load(path / "README.md" if path.is_dir() else model)
    except Exception:  # there is none
        return {}
    rows = re.findall(r"^\| (\w+) \| (.+) \|$", card.text, flags=re.MULTILINE)
    flags = {name: yaml.safe_load(value) for name, value in rows if "written by a training script" in card.text}
    return flags | {"pretrained_model_name_or_path": card.data.get("base_model")}


def open_whole(model, flags):
    """Opens a whole model: a single file, or a folder or Hub id, also one that has files in half precision alone."""
    if model.endswith(".safetensors"):
        return open_file(model, flags.get("single_file_config"))
    chosen = {"revision": flags.get("revision"), **UNCHECKED}
    try:
        return diffusers.DiffusionPipeline.from_pretrained(model, variant=flags.get("variant"), **chosen)
    except OSError as error:
        with contextlib.suppress(OSError, ValueError):
            return diffusers.DiffusionPipeline.from_pretrained(model, variant="fp16", **chosen)
        raise error


def open_file(model, config):
    """Opens a whole model of one file; config is the folder or Hub id of one of its kind."""
    with safe_open(model, "pt") as file:
        keys = {*file.keys()}
    xl = any(key.startswith("conditioner.") for key in keys)
    kind = diffusers.StableDiffusionXLPipeline if xl else diffusers.StableDiffusionPipeline
    try:
        pipeline = kind.from_single_file(model, config=config, **UNCHECKED)
    except OSError as error:
        raise ValueError(f"{error} Without a network, --base has to name a folder of its kind, for its configs.")
    set_schedule(pipeline, "v_prediction" if "v_pred" in keys else None, "ztsnr" in keys)
    return pipeline


def open_base(base, flags):
    """Opens what adapters, a word or a UNet go on: base, or else what the run's flags name, with its VAE and noise."""
    named = base or flags.get("pretrained_model_name_or_path")
    if not named:
        raise ValueError("nothing says what it goes on: give --base")
    try:
        pipeline = open_whole(named, {} if base else flags)
    except Exception as error:
        raise ValueError(f"it goes on {named}, which does not load (--base names another): {error}")
    if flags.get("pretrained_vae_model_name_or_path"):
        pipeline.vae = diffusers.AutoencoderKL.from_pretrained(flags["pretrained_vae_model_name_or_path"])
    set_schedule(pipeline, flags.get("prediction_type"), flags.get("rescale_betas_zero_snr"))
    return pipeline


def set_schedule(pipeline, prediction_type, rescale_betas_zero_snr):
    """Has a pipeline sample as its UNet was trained, if that is known: by what it predicts, to zero terminal SNR."""
    sampler, changes = type(pipeline.scheduler), {}
    if prediction_type:
        changes["prediction_type"] = prediction_type
    if prediction_type == "sample":  # not all samplers, such as SD 1.x's, can do that
        sampler, changes["clip_sample"] = diffusers.DDIMScheduler, False
    if rescale_betas_zero_snr:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        if "rescale_betas_zero_snr" not in inspect.signature(sampler).parameters:
            sampler = diffusers.EulerDiscreteScheduler
    if changes:
        pipeline.scheduler = sampler.from_config(pipeline.scheduler.config, **changes)


def open_unconditional(unet, base, flags):
    """Opens an unconditional UNet with the noise schedule of its run."""
    scheduler = diffusers.DDPMScheduler()
    base = base or flags.get("pretrained_model_name_or_path")
    if base:
        scheduler = diffusers.DDPMScheduler.from_pretrained(base, subfolder="scheduler")
    changes = {
        "num_train_timesteps": flags.get("ddpm_num_steps"),
        "beta_schedule": flags.get("ddpm_beta_schedule"),
        "prediction_type": flags.get("prediction_type"),
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    scheduler = diffusers.DDPMScheduler.from_config(scheduler.config, **changes)
    return diffusers.DDPMPipeline(unet=diffusers.UNet2DModel.from_pretrained(unet), scheduler=scheduler)


def class_of(model):
    """Returns the name of the class of a model of diffusers, or None of another one."""
    return diffusers.AutoModel.load_config(model).get("_class_name")


def add_word(pipeline, model):
    """Gives a pipeline a new word: from a folder to each of its text encoders, from a file to the one that it fits."""
    encoders = [(pipeline.text_encoder, pipeline.tokenizer)]
    if hasattr(pipeline, "text_encoder_2"):
        encoders.append((pipeline.text_encoder_2, pipeline.tokenizer_2))
    names = ["learned_embeds.safetensors", "learned_embeds_2.safetensors"]
    if Path(model).is_file():
        names = [Path(model).name]
        with safe_open(model, "pt") as file:
            words = [*file.keys()]
            width = file.get_slice(words[0]).get_shape()[-1]
        if len(words) > 1:
            raise ValueError(f"{model} is for other programs: give its folder")
        encoders = [pair for pair in encoders if pair[0].config.hidden_size == width][:1]
        if not encoders:
            raise ValueError(f"the vectors of {model} fit no text encoder")
    for name, (encoder, tokenizer) in zip(names, encoders):
        pipeline.load_textual_inversion(model, weight_name=name, text_encoder=encoder, tokenizer=tokenizer)


def with_part(pipeline, model, kind):
    """Returns a pipeline with trained models in the place of its own, or with a ControlNet."""
    if kind in ("pipeline", "file"):
        raise ValueError(f"{model} is a whole model, and only the first one may be")
    place = model
    if kind == "checkpoint":
        place = Path(model, "unet")
    if kind == "checkpoint of a ControlNet":
        place = Path(model, "controlnet")
    if class_of(place) == "ControlNetModel":
        controlnet = diffusers.ControlNetModel.from_pretrained(place)
        return diffusers.AutoPipelineForText2Image.from_pipe(pipeline, controlnet=controlnet)
    if class_of(place) != type(pipeline.unet).__name__:
        raise ValueError(f"{place} is a {class_of(place)}, and no {type(pipeline.unet).__name__}")
    pipeline.unet = type(pipeline.unet).from_pretrained(place)
    if kind == "checkpoint":
        for name in {"text_encoder", "text_encoder_2"} & {*os.listdir(model)}:
            setattr(pipeline, name, type(getattr(pipeline, name)).from_pretrained(Path(model, name)))
    return with_inputs(pipeline)


def with_inputs(pipeline):
    """Returns a pipeline that gives its UNet all the channels that it takes: 8 if it edits a picture."""
    if pipeline.unet.config.in_channels != 8 or "InstructPix2Pix" in type(pipeline).__name__:
        return pipeline
    if isinstance(pipeline, diffusers.StableDiffusionXLPipeline):
        return diffusers.StableDiffusionXLInstructPix2PixPipeline.from_pipe(pipeline)
    return diffusers.StableDiffusionInstructPix2PixPipeline.from_pipe(pipeline)


# === End of results ===

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
