"""Writes what a training script left as other programs take it: one file for A1111, ComfyUI, kohya and Civitai.

A whole model of Stable Diffusion 1.x, 2.x or XL becomes one .safetensors file with the names of the
original code, or a folder of diffusers in another precision. Adapters (LoRA) become kohya's file, or with --merge_lora
part of their base. The result is a folder, a file or a Hub id: a whole pipeline, adapters, or a checkpoint. What
adapters and checkpoints go on is found in the run's train_args.yaml, in the model card, or by --base.

    python export.py my-model my-model.safetensors --dtype fp16
    python export.py my-model/checkpoint-500 averaged.safetensors --use_ema --dtype fp16
    python export.py my-lora for-comfyui.safetensors
    python export.py my-lora merged-model --merge_lora --lora_scale 0.8
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
import datetime
import difflib
import functools
import inspect
import logging
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import yaml


# The flags


EXPORTED = ["StableDiffusionPipeline", "StableDiffusionXLPipeline", "DDPMPipeline"]


def parse_args(argv):
    """Parses the command line."""
    parser = Parser(__doc__.split("\n\n    python")[0])
    add = parser.add_argument
    add("result", help="what a training script left: a folder, a file or a Hub id")
    add("output", help="the file to write, if it ends in .safetensors, or else the folder")
    add("--base", help="what adapters or a checkpoint go on, if the run does not say; of a single file, its configs")
    add("--dtype", choices=["fp32", "fp16", "bf16"], default="fp32", help="precision of the weights that are written")
    add("--use_ema", **switch, help="of a checkpoint, take the average of the weights, unet_ema/")
    add("--merge_lora", **switch, help="add adapters to the weights of their base, and write that")
    add("--lora_scale", type=real_number, default=1.0, help="strength of adapters")
    args = read_flags(parser, argv, refused={}, replaces={})
    output = Path(args.output)
    if os.path.lexists(args.output):
        parser.error(f"{output} is there already: name another output, or take that away")
    if not is_writable(output.parent):
        parser.error(f"the folder {output.parent} cannot be made or written to")
    if output.suffix.lower() in (".ckpt", ".pt", ".bin"):
        parser.error("such files are pickles, which can run code: take .safetensors, which the same programs read")
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
import torch
import transformers
from huggingface_hub import HfApi, ModelCard, snapshot_download
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.conversion_mapping import get_model_conversion_mapping


# The names of the original code (CompVis, Stability AI); those of UNets stand in a fence below.


VAE = {
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "mid_block.attentions.0": "mid.attn_1",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "down_blocks": "down",
    "resnets": "block",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPENCLIP = {
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "encoder.layers": "transformer.resblocks",
    "final_layer_norm": "ln_final",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "fc1": "c_fc",
    "fc2": "c_proj",
    "self_attn": "attn",
    "text_projection.weight": "text_projection",
}


def vae_weights(vae):
    """Returns a VAE's weights: the decoder's blocks are counted from the picture, attention is 1x1 convolutions."""
    last, weights = len(vae.config.up_block_types) - 1, {}
    for name, weight in vae.state_dict().items():
        name = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{last - int(found[1])}", name)
        if ".attentions." in name:
            name = renamed(name, VAE_ATTENTION)
        weights[renamed(name, VAE)] = weight[:, :, None, None] if weight.ndim == 2 else weight
    return weights


def text_weights(encoder):
    """Returns a text encoder's weights as CLIP has them, or, if it is one of OpenCLIP's, as OpenCLIP has them."""
    weights = {name.removeprefix("text_model."): weight for name, weight in encoder.state_dict().items()}
    if encoder.config.hidden_act != "gelu":  # which all of OpenCLIP's have, and the first CLIP not
        return {f"transformer.text_model.{name}": weight for name, weight in weights.items()}
    for name in [name for name in weights if ".q_proj." in name]:  # query, key and value are one matrix there
        parts = [weights.pop(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
        weights[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    if "text_projection.weight" in weights:
        weights["text_projection.weight"] = weights["text_projection.weight"].T
    return {f"model.{renamed(name, OPENCLIP)}": weight for name, weight in weights.items()}


def single_file_weights(pipeline):
    """Returns a pipeline's weights, with the marks of v-prediction and of a schedule that ends in noise alone."""
    unet, schedule = pipeline.unet, pipeline.scheduler.config
    tensors = {f"model.diffusion_model.{sgm_name(name, unet.config)}": w for name, w in unet.state_dict().items()}
    tensors |= {f"first_stage_model.{name}": weight for name, weight in vae_weights(pipeline.vae).items()}
    encoders = {"cond_stage_model": pipeline.text_encoder}
    if hasattr(pipeline, "text_encoder_2"):
        encoders = {
            "conditioner.embedders.0": pipeline.text_encoder,
            "conditioner.embedders.1": pipeline.text_encoder_2,
        }
    for prefix, encoder in encoders.items():
        tensors |= {f"{prefix}.{name}": weight for name, weight in text_weights(encoder).items()}
    if schedule.prediction_type == "v_prediction":
        tensors["v_pred"] = torch.tensor([])
    if schedule.get("rescale_betas_zero_snr"):
        tensors["ztsnr"] = torch.tensor([])
    return tensors


def file_metadata(args, pipeline, flags, suffix=""):
    """Returns what a file says of itself: the modelspec's fields. An adapter's architecture has the suffix "/lora"."""
    resolution = flags.get("resolution") or pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    fields = modelspec(pipeline, Path(args.output).stem, resolution, suffix)
    if flags.get("instance_prompt"):
        fields["modelspec.trigger_phrase"] = flags["instance_prompt"]
    return fields


def kohya_file(args, pipeline, flags, adapter):
    """Returns the tensors and the metadata of kohya's file of an adapter, by its name."""
    models = {part: pipeline.components.get(part) for part in ("unet", "text_encoder", "text_encoder_2")}
    tensors = kohya_tensors({part: model for part, model in models.items() if model is not None}, adapter)
    ranks = {len(weight) for name, weight in tensors.items() if name.endswith("lora_down.weight")}
    alphas = {weight.item() for name, weight in tensors.items() if name.endswith("alpha")}
    family = kohya_family(pipeline)[0]
    if any(name.endswith("dora_scale") for name in tensors):
        print("These adapters have DoRA: ComfyUI comes near to it, A1111 and kohya do not. --merge_lora is exact.")
    metadata = file_metadata(args, pipeline, flags, "/lora") | {
        "ss_network_module": "networks.lora",
        "ss_network_dim": ranks.pop() if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": alphas.pop() if len(alphas) == 1 else "Dynamic",
        "ss_base_model_version": family,
        "ss_v2": family.startswith("sd_v2"),
        "ss_output_name": Path(args.output).stem,
    }
    return tensors, metadata


# The program


def write_file(tensors, metadata, output):
    """Writes a safetensors file, beside its place first."""
    tensors = {name: weight.contiguous() for name, weight in tensors.items()}
    beside = output.with_name(f".{output.name}.{os.urandom(4).hex()}.tmp")  # two of them may be at work
    try:
        beside.touch()
        mode = beside.stat().st_mode  # of new files; safetensors makes its own their owner's alone
        save_file(tensors, beside, {name: str(value) for name, value in metadata.items()})
        with contextlib.suppress(OSError):  # a shared disk may know no modes
            beside.chmod(mode)
        os.replace(beside, output)
    finally:
        beside.unlink(missing_ok=True)


def write_folder(pipeline, output):
    """Writes a folder of diffusers, beside its place first, with files that programs of older libraries read."""
    with tempfile.TemporaryDirectory(dir=output.absolute().parent, prefix=f".{output.name}.") as beside:
        folder = Path(beside, "whole")
        for part in (pipeline, *pipeline.components.values()):  # which would name a folder of this machine
            if hasattr(part, "register_to_config"):
                part.register_to_config(_name_or_path=output.name)
        if "text_encoder" in pipeline.components:  # with the names that it has in all published folders
            encoder = pipeline.text_encoder
            encoder._weight_conversions = get_model_conversion_mapping(encoder, add_legacy=False)
        pipeline.save_pretrained(folder)
        for part in ("tokenizer", "tokenizer_2"):
            if part in pipeline.components:
                tokenizer = pipeline.components[part]
                tokenizer.backend_tokenizer.model.save(str(folder / part))  # vocab.json and merges.txt
        with contextlib.suppress(OSError):
            for file in folder.rglob("*.safetensors"):  # which else are their owner's alone
                shutil.copymode(folder / "model_index.json", file)
        os.replace(folder, output)


def megabytes(path):
    """Returns the size of a file, or of a folder's safetensors files without checkpoints and kohya's copies, in MB."""
    files = Path(path).rglob("*.safetensors") if Path(path).is_dir() else [Path(path)]
    files = [file for file in files if not re.search(r"checkpoint-|_kohya\.", str(file.relative_to(path)))]
    return sum(file.stat().st_size for file in files) / 1e6


def check_kind(args, kind):
    """Raises a ValueError that says what a result of some kind cannot become."""
    if kind == "word":
        raise ValueError("a new word needs no export: A1111 and ComfyUI read its learned_embeds.safetensors")
    if args.use_ema and not Path(args.result, "unet_ema").is_dir():
        raise ValueError("--use_ema is for a checkpoint of a run with --use_ema, which has a unet_ema/")
    if (args.merge_lora or args.lora_scale != 1) and kind != "adapters":
        raise ValueError("--merge_lora and --lora_scale are for adapters")
    if kind == "adapters" and not args.merge_lora and not args.output.endswith(".safetensors"):
        raise ValueError("adapters become a file (name one .safetensors), or with --merge_lora part of their base")


def open_result(args, result):
    """Returns the pipeline of a result, and its adapter, by name, if that is not to be merged."""
    try:
        check_kind(args, kind_of(args.result))
        pipeline, adapters = open_model([result], args.base, [args.lora_scale])
        if type(pipeline).__name__ not in EXPORTED:
            raise ValueError(f"it is a {type(pipeline).__name__}, and only {', '.join(EXPORTED)} can be exported")
        if args.output.endswith(".safetensors") and not hasattr(pipeline, "vae"):
            raise ValueError("an unconditional model has no such file: name a folder")
    except Exception as error:  # diffusers raises nearly anything over files that it cannot use
        raise SystemExit(f"{args.result} cannot be exported: {error}")
    pipeline.to(torch.float32)
    if args.merge_lora:
        pipeline.fuse_lora(adapter_names=adapters)
        pipeline.unload_lora_weights()
        adapters = []
    return pipeline, adapters[0] if adapters else None


def main(args):
    """Writes the output, and prints sizes before and after."""
    output = Path(args.output)
    result = str(Path(args.result, "unet_ema")) if args.use_ema else args.result
    pipeline, adapter = open_result(args, result)
    pipeline.to({"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[args.dtype])
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module) and not all(w.isfinite().all() for w in part.state_dict().values()):
            reason = "they overflow: take bf16 or fp32" if args.dtype == "fp16" else "the training diverged"
            raise SystemExit(f"The weights of {name} are not finite in {args.dtype}, as {reason}.")
    flags = run_flags(result)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if adapter:
            tensors, metadata = kohya_file(args, pipeline, flags, adapter)
            write_file(tensors, metadata, output)
        elif output.suffix == ".safetensors":
            write_file(single_file_weights(pipeline), file_metadata(args, pipeline, flags), output)
        else:
            write_folder(pipeline, output)
    except (OSError, SafetensorError) as error:  # such as a full disk
        raise SystemExit(f"{output} cannot be written: {error}")
    before = f"{megabytes(result):.1f} MB, became " if Path(result).exists() else ""
    print(f"{result}, {before}{output}, {megabytes(output):.1f} MB in {args.dtype}.")


# === Kohya's format: the same in train_lora.py and export.py ===
#
# It asks nothing of the text above. It offers: sgm_name, kohya_tensors, kohya_family, modelspec.


# Layers of a UNet as the original code (CompVis, Stability AI) named them, which most programs but diffusers look for.
SGM = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
SGM_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def renamed(name, names):
    """Replaces whole words of a dotted name."""
    for ours, theirs in names.items():
        name = re.sub(rf"\b{re.escape(ours)}\b", theirs, name)
    return name


def sgm_name(name, config):
    """Names a layer of a UNet, or a weight of one, as the original code did, by the UNet's config."""
    found = re.match(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.+)", name)
    if not found:
        return renamed(name, SGM)
    # They number all layers of the way down in one row, and all of the way up.
    direction, level, kind, i, rest = found.groups()
    part = int(kind == "attentions")
    if kind == "resnets":
        rest = renamed(rest, SGM_RESNET)
    if direction == "mid":
        return f"middle_block.{2 * int(i) + part}.{rest}"
    stride = config.layers_per_block + 1
    first = int(level) * stride
    if kind == "downsamplers":
        return f"input_blocks.{first + stride}.0.{rest.replace('conv', 'op')}"
    if kind == "upsamplers":
        part = 1 + ("Attn" in config.up_block_types[int(level)])  # the last of its layer
        return f"output_blocks.{first + stride - 1}.{part}.{rest}"
    if direction == "down":
        return f"input_blocks.{first + int(i) + 1}.{part}.{rest}"  # behind conv_in
    return f"output_blocks.{first + int(i)}.{part}.{rest}"


def kohya_tensors(models, adapter):
    """Returns an adapter's weights under the names of kohya's scripts; models are a pipeline's, by part.

    Each layer has two matrices, an alpha, which divided by the rank is the factor of their product, and with DoRA a
    dora_scale of shape (out, 1) or (out, 1, 1, 1), as LyCORIS has it.
    """
    tensors, config = {}, models["unet"].config
    xl = config.addition_embed_type is not None
    prefixes = {"unet": "lora_unet", "text_encoder": "lora_te1" if xl else "lora_te", "text_encoder_2": "lora_te2"}
    for part, model in models.items():
        for name, layer in model.named_modules():
            if not isinstance(layer, LoraLayer) or adapter not in layer.lora_A:
                continue
            if part != "unet":  # as before transformers 5.6
                name = f"text_model.{name.removeprefix('text_model.')}"
            elif xl:
                name = sgm_name(name, config)
            name = f"{prefixes[part]}_{name.replace('.', '_')}"
            down, up = layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach()
            tensors[f"{name}.lora_down.weight"] = down.contiguous()
            tensors[f"{name}.lora_up.weight"] = up.contiguous()
            tensors[f"{name}.alpha"] = torch.tensor(float(layer.scaling[adapter] * layer.r[adapter]))
            if layer.use_dora[adapter]:
                magnitude = layer.lora_magnitude_vector[adapter].weight.detach()
                tensors[f"{name}.dora_scale"] = magnitude.reshape(-1, *[1] * (down.ndim - 1)).contiguous()
    return tensors


def kohya_family(pipeline):
    """Returns what kohya's scripts call a pipeline's family, and what the modelspec calls it."""
    if pipeline.unet.config.addition_embed_type:
        return "sdxl_base_v1-0", "stable-diffusion-xl-v1-base"
    v_prediction = pipeline.scheduler.config.prediction_type == "v_prediction"
    if pipeline.unet.config.cross_attention_dim != 1024:
        return "sd_v1_v" if v_prediction else "sd_v1", "stable-diffusion-v1"
    if v_prediction:
        return "sd_v2_v", "stable-diffusion-v2-768-v"
    return "sd_v2", "stable-diffusion-v2-512"


def modelspec(pipeline, title, resolution, suffix=""):
    """Returns what the modelspec (1.0.1) asks of a file: its five MUST fields, the day and the prediction type."""
    kind = kohya_family(pipeline)[1]
    diffusers_names = suffix == "/lora" and "xl" not in kind  # as kohya's own files of such adapters have
    fields = {
        "sai_model_spec": "1.0.1",
        "architecture": kind + suffix,
        "implementation": "diffusers" if diffusers_names else "https://github.com/Stability-AI/generative-models",
        "title": title,
        "resolution": f"{resolution}x{resolution}",
        "date": datetime.date.today().isoformat(),
        "prediction_type": pipeline.scheduler.config.prediction_type.removesuffix("_prediction"),
    }
    return {f"modelspec.{name}": value for name, value in fields.items()}


# === End of kohya's format ===

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


if __name__ == "__main__":
    main(args)
