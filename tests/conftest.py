"""The tests' environment, and the tiny models and pictures they train on. Nothing here needs a network."""

import atexit
import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path


# Before any library reads it: no network, and no file in the user's caches.
CACHE = tempfile.mkdtemp(prefix="tests-cache-")
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
os.environ.update(
    HF_HOME=f"{CACHE}/huggingface",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    WANDB_MODE="offline",
    XDG_CACHE_HOME=CACHE,
)
for name in ("HF_DATASETS_CACHE", "HF_HUB_CACHE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
    os.environ.pop(name, None)
# A shell has its background jobs ignore this, and so would every launcher that the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import pytest
import torch
from hub_server import Hub
from PIL import Image, ImageDraw
from safetensors.torch import load_file


torch.set_num_threads(1)

COLOURS = ["red", "green", "blue", "yellow", "purple", "orange"]


def make_pictures(folder: Path, count: int = 6, size: int = 48) -> Path:
    """Fill a folder with pictures of a circle or a square, half of them JPEG, and their captions."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        colour, shape = COLOURS[i % len(COLOURS)], ("circle", "square")[i % 2]
        corners = np.array([[0, 85, 170], [255, 170, 85]]) + rng.integers(-60, 60, (2, 3))
        gradient = np.linspace(corners[0], corners[1], size)[:, None].repeat(size, axis=1)
        image = Image.fromarray(gradient.clip(0, 255).astype(np.uint8))
        draw = ImageDraw.Draw(image)
        left, top = rng.integers(0, size // 2, 2).tolist()
        draw_shape = draw.ellipse if shape == "circle" else draw.rectangle
        draw_shape((left, top, left + size // 2, top + size // 2), fill=colour)
        name = f"{i:03d}.{('png', 'jpg')[i // 2 % 2]}"
        image.save(folder / name)
        rows.append({"file_name": name, "text": f"a {colour} {shape} {i + 1}"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def make_text_encoder(model_class, width: int, **settings):
    """Build a tokenizer of single letters and a tiny CLIP text encoder of random weights for it."""
    from transformers import CLIPTextConfig, CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer({token: i for i, token in enumerate(tokens)}, [], model_max_length=77)
    config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projection_dim=32,
        **settings,
    )
    return tokenizer, model_class(config)


def make_model(folder: Path, family: str = "sd1") -> Path:
    """Save a pipeline of the real classes with tiny random weights; its VAE halves the resolution.

    family: "sd1", "sd2" (OpenCLIP's kind of text encoder, linear projections, v_prediction) or "sdxl".
    """
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        EulerDiscreteScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    blocks = {
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    }
    settings = {"cross_attention_dim": 32, "attention_head_dim": 4}
    if family != "sd1":
        settings |= {"attention_head_dim": (4, 8), "use_linear_projection": True}
    if family == "sdxl":  # attends on the lower level, twice a block
        blocks = {name: types[::-1] for name, types in blocks.items()}
        settings |= {"cross_attention_dim": 32 + 48, "transformer_layers_per_block": (1, 2)}
        settings |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
        settings |= {"projection_class_embeddings_input_dim": 6 * 8 + 32}
    unet = UNet2DConditionModel(
        sample_size=24, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, **blocks, **settings
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        sample_size=48,
    )
    parts = {"unet": unet, "vae": vae}
    openclip = {"hidden_act": "gelu"}
    first = make_text_encoder(CLIPTextModel, 32, **(openclip if family == "sd2" else {}))
    parts["tokenizer"], parts["text_encoder"] = first
    if family == "sdxl":
        # Of another width, or a single file's two encoders would be taken for one.
        second = make_text_encoder(CLIPTextModelWithProjection, 48, **openclip)
        parts["tokenizer_2"], parts["text_encoder_2"] = second
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    if family == "sdxl":
        pipeline = StableDiffusionXLPipeline(**parts, scheduler=EulerDiscreteScheduler(**betas))
    else:
        ddim = {"clip_sample": False, "set_alpha_to_one": False}
        ddim |= {"prediction_type": "v_prediction"} if family == "sd2" else {}
        unused = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = StableDiffusionPipeline(**parts, scheduler=DDIMScheduler(**betas, **ddim), **unused)
    pipeline.save_pretrained(folder)
    return folder


def run(script, *flags) -> None:
    """Run a script's main in this process, as a fresh process would: nothing is left of earlier runs."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        script.main(script.parse_args([str(flag) for flag in flags]))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the safetensors files under a folder, by file and name."""
    files = sorted(Path(folder).rglob("*.safetensors"))
    return {f"{file.relative_to(folder)}:{name}": tensor for file in files for name, tensor in load_file(file).items()}


def same(first: dict, second: dict) -> bool:
    """Whether two sets of tensors are equal bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def metrics(output_dir: Path, name: str) -> list[tuple[int, float]]:
    """The logged (step, value) pairs of a quantity."""
    rows = map(json.loads, (Path(output_dir) / "logs" / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row[name]) for row in rows if name in row]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A tiny SD 1.x pipeline that predicts the noise."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_v_model(tiny_model) -> Path:
    """The same weights with an SD 2.x scheduler, which predicts v."""
    folder = shutil.copytree(tiny_model, tiny_model.with_name("tiny-v"))
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "v_prediction"}))
    return folder


@pytest.fixture(scope="session")
def tiny_sd2_model(tmp_path_factory) -> Path:
    """A tiny SD 2.x pipeline, which predicts v."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny-sd2", "sd2")


@pytest.fixture(scope="session")
def tiny_sdxl_model(tmp_path_factory) -> Path:
    """A tiny SDXL pipeline of two text encoders."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny-sdxl", "sdxl")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """Six captioned pictures of 48 pixels."""
    return make_pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture
def hub(monkeypatch):
    """A Hub on the loopback, for this process and, with env=hub.env, for others."""
    import datasets
    from huggingface_hub import constants, hf_api

    with Hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(hf_api.api, "endpoint", server.url)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.url)
        for settings in (constants, datasets.config):
            monkeypatch.setattr(settings, "HF_HUB_OFFLINE", False)
        yield server
