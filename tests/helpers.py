"""What the tests share: tiny models and pictures, small runs, and what a run left. The fixtures stand in conftest."""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file


ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}  # of the processes that tests start
COLOURS = ["red", "green", "blue", "yellow", "purple", "orange"]
# Of a small run of any script; later flags win.
SMALL = "--resolution 32 --train_batch_size 2 --max_train_steps 4 --seed 1 --learning_rate 1e-3 --lr_warmup_steps 0"
SMALL += " --center_crop --checkpointing_steps 0 --report_to none"
# Whatever draws something, but for crops, which are fixed as the pictures are square.
RANDOM = ("--random_flip", "--proportion_empty_prompts", 0.3, "--use_ema")
CACHED = (*RANDOM, "--max_train_steps", 12)  # long enough that latents are cached
ENDLESS = ("--max_train_steps", 2000, "--checkpointing_steps", 1000)  # longer than any test waits

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's process calls")
for_each_family = pytest.mark.parametrize("family", ["tiny_model", "tiny_sd2_model", "tiny_sdxl_model"])


# Pictures and models.


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


def save_pairs(folder, own="file_name", other="conditioning_image", caption="text", count=4, wider=8):
    """Saves noise pictures in a folder, and others that go with them, with metadata; each is wider than the last."""
    rows, rng = [], np.random.default_rng(0)
    for i in range(count):
        for kind in ("pictures", "others"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (48, 48 + wider * i, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / kind / f"{i}.png")
        rows.append({own: f"pictures/{i}.png", f"{other}_file_name": f"others/{i}.png", caption: f"number {i}"})
    write_metadata(folder, *rows)
    return folder


def make_picture(path, size=(16, 16), colour="red", **settings):
    """Saves a picture of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **settings)
    return path


def write_metadata(folder, *rows):
    """Writes metadata.jsonl, a row a line."""
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def save_ramp(folder, width, height, **settings):
    """A picture whose red is 4 x the column and whose green is 4 x the row."""
    folder.mkdir(exist_ok=True)
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0], pixels[..., 1] = 4 * np.arange(width), 4 * np.arange(height)[:, None]
    Image.fromarray(pixels).save(folder / "a.png", **settings)
    (folder / "a.txt").write_text("a ramp")


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
    file = folder / "text_encoder" / "model.safetensors"  # renamed as all that was published before transformers 5.6
    tensors = {f"text_model.{name}": tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def changed(base, folder, part, **settings):
    """A copy of a pipeline's folder with other settings in a part's config."""
    shutil.copytree(base, folder)
    file = folder / part if part.endswith(".json") else folder / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


def scale_weight(folder, part):
    """Scales one tensor of a part of a model."""
    (file,) = (folder / part).glob("*.safetensors")
    tensors = load_file(file)
    name = max(tensors, key=lambda name: tensors[name].numel())
    save_file({**tensors, name: tensors[name] * 1.1}, file, metadata={"format": "pt"})


# A tiny UNet without prompts.
UNET = {
    "_class_name": "UNet2DModel",
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}


def write_config(folder, **changes):
    """Writes the config of a tiny UNet into a folder, and returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(UNET | changes))
    return folder


# Runs.


def run(script, *flags) -> None:
    """Run a script's main in this process, as a fresh process would: nothing is left of earlier runs."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    streams = sys.stdout, sys.stderr
    try:
        script.main(script.parse_args([str(flag) for flag in flags]))
    finally:
        sys.stdout, sys.stderr = streams
        for number, handler in handlers.items():
            signal.signal(number, handler)


def flags_of(base, data, out, *flags):
    """The command line of a small run, as text; the data are left out if the flags name others."""
    named = {"--train_data_dir", "--instance_data_dir", "--dataset_name"} & {*flags}
    places = ("--pretrained_model_name_or_path", base, *(() if named else ("--train_data_dir", data)))
    return [str(flag) for flag in (*SMALL.split(), *places, "--output_dir", out, *flags)]


def in_epochs(words):
    """A command line without its number of steps, which then follows from its number of epochs."""
    place = words.index("--max_train_steps")
    return words[:place] + words[place + 2 :]


def count_calls(monkeypatch, cls, method):
    """Counts the calls of a method, which still does its work; returns the growing list of their first arguments."""
    calls, original = [], getattr(cls, method)

    def counting(self, *args, **kwargs):
        calls.append(args[0] if args else kwargs)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(cls, method, counting)
    return calls


def watch(monkeypatch, script):
    """Watches a script's runs: the models that they load, and the batches that they take losses of, in which modes."""
    seen = SimpleNamespace(models=None, batches=[], modes=[], losses=[], dtypes=set())
    load_models, compute_loss = script.load_models, script.compute_loss

    def load(run):
        seen.models = load_models(run)
        return seen.models

    def compute(models, batch, args):
        seen.batches.append(batch)
        seen.modes.append([model.training for model in (models.unet, *getattr(models, "text_encoders", ()))])
        seen.dtypes |= {parameter.dtype for parameter in models.unet.parameters()}
        seen.losses.append(compute_loss(models, batch, args))
        return seen.losses[-1]

    monkeypatch.setattr(script, "load_models", load)
    monkeypatch.setattr(script, "compute_loss", compute)
    return seen


def cosine(step, warmup, total):
    """The learning rate that cosine decay with linear warmup gives a step, as a fraction of the highest."""
    return step / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


# The insides of train_text_to_image.py.


def parse(data, *flags):
    """The arguments of a run on a folder."""
    import train_text_to_image

    words = ("--pretrained_model_name_or_path", "a/b", "--train_data_dir", data, *flags)
    return train_text_to_image.parse_args([str(word) for word in words])


def make_run(script, args):
    """A run of a script before its first stage: nothing is resumed, the seed is 0, and no signal has come."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return script.Run(args, script.make_accelerator(args), script.StopFlag(), 0, "id")


def load(base, *flags):
    """A base's models as training loads them."""
    import train_text_to_image as script

    return script.load_models(make_run(script, parse(base, "--pretrained_model_name_or_path", base, *flags)))


def encode(script, models, prompts):
    """The conditioning of some prompts."""
    ids = [script.tokenize(models.tokenizers, prompt) for prompt in prompts]
    return script.encode_prompts(models, torch.stack(ids), prompts)


def samples_of(folder, *flags, seed=0, twice=False):
    """The samples of a folder's pictures, as a run makes them for a VAE that halves the resolution.

    twice: with a second caption to each
    """
    import train_text_to_image as script

    args = parse(folder, *flags)
    records = []
    for record in script.read_records(args):
        data = Path(record["name"]).read_bytes()
        captions = record["captions"] + [f"again {caption}" for caption in record["captions"] if twice]
        records.append(
            {**record, "captions": captions, "digest": script.digest(data), "size": script.open_image(data).size}
        )
    side = args.resolution // 2
    return script.Samples(args, records, seed, args.resolution, (4, side, side), 1000)


def refused_base(capsys, words):
    """The sentence in which a run is refused, by the parser or as its base is loaded."""
    import train_text_to_image as script

    with pytest.raises(SystemExit) as end:
        script.load_models(make_run(script, script.parse_args([str(word) for word in words])))
    return capsys.readouterr().err.split("error: ")[-1] if end.value.code == 2 else str(end.value.code)


# What a run leaves.


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


def logged(out):
    """All logged numbers that are not about time or memory."""
    names = ("loss", "instance_loss", "prior_loss", "lr", "grad_norm", "validation_loss")
    return [metrics(out, name) for name in names]


def losses(folder):
    """The steps, losses, gradient norms and learning rates in a checkpoint or a folder of logs."""
    rows = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
    return [tuple(row[name] for name in ("step", "loss", "grad_norm", "lr")) for row in rows if "loss" in row]


def rows(output_dir):
    """How many rows of steps and validations the run has logged."""
    with contextlib.suppress(OSError):
        lines = (output_dir / "logs" / "metrics.jsonl").read_text().splitlines()
        return sum("checkpoint_seconds" not in line for line in lines)
    return 0


def flat(state, prefix=""):
    """The values of nested dictionaries and lists, by path."""
    if not isinstance(state, (dict, list)):
        return {prefix: state}
    items = state.items() if isinstance(state, dict) else enumerate(state)
    return {path: leaf for name, value in items for path, leaf in flat(value, f"{prefix}/{name}").items()}


def optimizer_state(checkpoint):
    """The optimizer's numbers in a checkpoint, as tensors, by their path."""
    state = flat(torch.load(checkpoint / "optimizer.bin", weights_only=True)["state"])
    assert any(torch.is_tensor(value) for value in state.values())
    return {path: torch.as_tensor(value) for path, value in state.items() if not isinstance(value, str)}


def everything(checkpoint):
    """All tensors of a checkpoint: the models', and the optimizer's with its other numbers."""
    return weights(checkpoint) | optimizer_state(checkpoint)


def drift(first, second, base):
    """How far apart two trained UNets are, as a fraction of how far the first has come from the base."""
    first, second, base = (weights(folder / "unet") for folder in (first, second, base))
    apart = math.fsum((first[name] - second[name]).double().square().sum() for name in base)
    come = math.fsum((first[name] - base[name]).double().square().sum() for name in base)
    return math.sqrt(apart / come)


def files_in(folder):
    """The contents of all files in a folder by name."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def state_of(folder):
    """All there is to know of what a folder holds, by name: bytes, time and mode."""
    return {
        path.relative_to(folder).as_posix(): (path.is_file() and path.read_bytes(), stat.st_mtime_ns, stat.st_mode)
        for path, stat in ((path, path.stat()) for path in sorted(folder.rglob("*")))
    }


def litter(folder):
    """Files and folders that were meant to be renamed or removed."""
    return [str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.name.endswith(".tmp")]


def is_whole(checkpoint):
    """Whether the checksums in a checkpoint's manifest are those of its files, all of them."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
    except (OSError, ValueError):
        return False
    files = {name: zlib.crc32(data) for name, data in files_in(checkpoint).items() if name != "manifest.json"}
    return manifest == files and len(files) >= 4


def whole_checkpoints(output_dir):
    """The steps of a folder's whole checkpoints."""
    return sorted(int(path.name.split("-")[1]) for path in Path(output_dir).glob("checkpoint-*") if is_whole(path))


def assert_equal(checkpoint, other):
    """Asserts that two checkpoints hold the same weights, averages and losses, bit for bit."""
    assert losses(checkpoint) == losses(other)
    assert {name.split("/")[0] for name in weights(checkpoint)} >= {"unet", "unet_ema"}
    assert same(weights(checkpoint), weights(other))


# Processes.


def start_ranks(start, arguments, ranks):
    """Starts the forked processes of one run, with what torchrun would put in their environment."""
    if ranks == 1:
        return [start(arguments)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "ACCELERATE_USE_CPU": "true"}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [start(arguments, environment={**world, "RANK": str(i), "LOCAL_RANK": str(i)}) for i in range(ranks)]


def finish(start, arguments, ranks=1):
    """Runs to the end, which must be a good one; returns what rank 0 printed."""
    runs = start_ranks(start, arguments, ranks)
    codes = [process.wait() for process in runs]
    assert codes == [0] * ranks, runs[0].output()
    return runs[0].output()


def launch(processes, *flags, script=ROOT / "train_text_to_image.py"):
    """Runs a script on some processes, as torchrun starts them; returns what it printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    command += [script, *flags]
    environment = ENVIRONMENT | {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [str(part) for part in command], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


# Of DreamBooth, LoRA and textual inversion.


INSTANCE, CLASS = "a photo of sks thing", "a photo of thing"
LORA, KOHYA = "pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors"
WORD = "<pig>"


def prior(folder, count=8):
    """The flags of prior preservation."""
    words = ("--class_data_dir", folder, "--class_prompt", CLASS, "--num_class_images", count)
    return ("--with_prior_preservation", *words)


def pairs(file):
    """The (A, B, magnitude) of every adapted layer in a file, by part and layer."""
    found = {}
    for key, tensor in load_file(file).items():
        name, what = re.fullmatch(r"(.*)\.lora_(A|B|magnitude_vector)(?:\.weight)?", key).groups()
        found.setdefault(name, {})[what] = tensor
    return {tuple(name.split(".", 1)): found[name] for name in found}


def vectors(folder, name="learned_embeds.safetensors"):
    """The vectors in a folder."""
    (item,) = load_file(Path(folder, name)).items()
    assert item[0] == WORD and item[1].dtype == torch.float32
    return item[1]


def files_of(model):
    """The files that a run leaves of the vectors: one for each text encoder, and for SDXL one of both."""
    more = ["learned_embeds_2.safetensors", "learned_embeds_xl.safetensors"] if "sdxl" in str(model) else []
    return ["learned_embeds.safetensors", *more]
