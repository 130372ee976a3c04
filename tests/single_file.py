"""A pipeline as one file with the names of the first publications, as most models on the web are handed out."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
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
}


def rename(name: str, names: dict[str, str]) -> str:
    """Replace whole parts of a dotted name."""
    for old, new in names.items():
        name = re.sub(rf"\b{re.escape(old)}\b", new, name)
    return name


def unet_name(name: str, config: dict) -> str:
    """The published name of a weight of the UNet, where each layer is a block of its own."""
    match = re.match(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.+)", name)
    if not match:
        return rename(name, UNET)
    place, block, kind, layer, rest = match.groups()
    if kind == "resnets":
        rest = rename(rest, UNET_RESNET)
    part = int(kind == "attentions")
    if place == "mid":
        return f"middle_block.{2 * int(layer) + part}.{rest}"
    layers = config["layers_per_block"] + 1
    index = int(block) * layers + int(layer)
    if kind == "downsamplers":
        return f"input_blocks.{index + layers}.0.{rest.replace('conv', 'op')}"
    if kind == "upsamplers":  # the last part of the block's last layer
        part = 2 if "CrossAttn" in config["up_block_types"][int(block)] else 1
        return f"output_blocks.{index + layers - 1}.{part}.{rest}"
    return f"input_blocks.{index + 1}.{part}.{rest}" if place == "down" else f"output_blocks.{index}.{part}.{rest}"


def vae_name(name: str, config: dict) -> str:
    """The published name of a weight of the VAE, whose decoder counts its blocks from the picture."""
    last = len(config["up_block_types"]) - 1
    name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{last - int(match[1])}", name)
    return rename(rename(name, VAE), VAE_ATTENTION if ".attentions." in name else {})


def to_openclip(state: dict) -> dict:
    """The weights of a text encoder as OpenCLIP has them: query, key and value in one, the projection transposed."""
    state = dict(state)
    for name in [name for name in state if ".q_proj." in name]:
        fused = torch.cat([state.pop(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")])
        state[name.replace("q_proj.", "in_proj_")] = fused
    if "text_projection.weight" in state:
        state["text_projection"] = state.pop("text_projection.weight").T.contiguous()
    return {rename(name, OPENCLIP): tensor for name, tensor in state.items()}


def save_single_file(folder: Path, file: Path) -> Path:
    """Save a pipeline folder of diffusers as one safetensors file with the names of the first publications."""

    def load(part: str) -> tuple[dict, dict]:
        (weights,) = (folder / part).glob("*.safetensors")
        return json.loads((folder / part / "config.json").read_text()), load_file(weights)

    config, state = load("unet")
    result = {f"model.diffusion_model.{unet_name(name, config)}": tensor for name, tensor in state.items()}
    config, state = load("vae")
    for name, tensor in state.items():
        name = vae_name(name, config)
        is_linear = tensor.ndim == 2  # a convolution of 1x1 there
        result[f"first_stage_model.{name}"] = tensor[:, :, None, None] if is_linear else tensor
    parts = [part for part in ("text_encoder", "text_encoder_2") if (folder / part).is_dir()]
    for i, part in enumerate(parts):
        config, state = load(part)
        state = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
        prefix = f"conditioner.embedders.{i}." if len(parts) == 2 else "cond_stage_model."
        if config["hidden_act"] == "gelu":  # which tells OpenCLIP's from the first CLIP
            result |= {f"{prefix}model.{name}": tensor for name, tensor in to_openclip(state).items()}
        else:
            result |= {f"{prefix}transformer.text_model.{name}": tensor for name, tensor in state.items()}
    save_file(result, file)
    return file
