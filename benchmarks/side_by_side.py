"""Times the scripts against the diffusers example scripts: the same flags, in turns, as ratios of pairs.

    python benchmarks/side_by_side.py path/to/diffusers/examples text_to_image lora

Each side is run as a user runs it, by accelerate launch. Warm: the time per optimizer step, from the difference of a
long and a short run, after one uncounted run. Cold: a long run with every cache empty. The model has random weights,
as speed does not depend on their values. The example scripts import torchvision, so it has to be installed.
"""

import argparse
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


ROOT = Path(__file__).resolve().parent.parent
SHORT, LONG = 4, 20  # optimizer steps
LAUNCH = "-m accelerate.commands.launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"
COMMON = "--train_batch_size 4 --learning_rate 1e-4 --seed 0"
SD = f"{COMMON} --pretrained_model_name_or_path model --resolution 256 --center_crop"
TOKEN = "--placeholder_token <new> --initializer_token a --learnable_property object"
# Name: our script, theirs, and the flags that both take.
WORKLOADS = {
    "text_to_image": ("train_text_to_image", "text_to_image/train_text_to_image", f"{SD} --train_data_dir pictures"),
    "text_to_image_ema": (
        "train_text_to_image",
        "text_to_image/train_text_to_image",
        f"{SD} --train_data_dir pictures --use_ema --snr_gamma 5",
    ),
    "lora": ("train_lora", "text_to_image/train_text_to_image_lora", f"{SD} --train_data_dir pictures --rank 8"),
    "dreambooth": (
        "train_dreambooth",
        "dreambooth/train_dreambooth",
        f"{SD} --instance_data_dir plain --instance_prompt sks",
    ),
    "dreambooth_lora": (
        "train_lora",
        "dreambooth/train_dreambooth_lora",
        f"{SD} --instance_data_dir plain --instance_prompt sks --rank 8",
    ),
    "textual_inversion": (
        "textual_inversion",
        "textual_inversion/textual_inversion",
        f"{SD} --train_data_dir plain {TOKEN}",
    ),
}


def make_model(folder: Path) -> None:
    """Saves a Stable Diffusion of random weights whose UNet has 35 M parameters, with the demo's tokenizer."""
    import torch
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    base = StableDiffusionPipeline.from_pretrained(ROOT / "demo" / "base")
    config = CLIPTextConfig(**base.text_encoder.config.to_dict() | {"hidden_size": 256, "intermediate_size": 1024})
    unet = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(64, 128, 256, 256),
        cross_attention_dim=256,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(block_out_channels=(32, 64, 128, 128), layers_per_block=2, **blocks)
    parts = base.components | {"unet": unet, "vae": vae, "text_encoder": CLIPTextModel(config)}
    StableDiffusionPipeline(**parts, requires_safety_checker=False).save_pretrained(folder)


def make_pictures(folder: Path) -> None:
    """Saves 64 noisy JPEGs of 640 x 640 pixels, with captions in pictures/ and without in plain/."""
    from PIL import Image

    (folder / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for i in range(64):
        Image.fromarray(rng.integers(0, 255, (640, 640, 3), dtype=np.uint8)).save(folder / "pictures" / f"{i}.jpg")
    shutil.copytree(folder / "pictures", folder / "plain")
    rows = "".join(f'{{"file_name": "{i}.jpg", "text": "picture {i}"}}\n' for i in range(64))
    (folder / "pictures" / "metadata.jsonl").write_text(rows)


def seconds(script: Path, flags: str, steps: int, work: Path, cache: str, threads: int) -> float:
    """Runs a script once with its caches in a folder of the work folder; returns the seconds it took."""
    shutil.rmtree(work / "out", ignore_errors=True)
    home = {"HF_HOME": str(work / cache), "XDG_CACHE_HOME": str(work / cache), "HF_HUB_OFFLINE": "1"}
    launch = [*shlex.split(LAUNCH), "--num_cpu_threads_per_process", str(threads)]
    command = [sys.executable, *launch, str(script), *shlex.split(flags), "--max_train_steps", str(steps)]
    start = time.perf_counter()
    done = subprocess.run([*command, "--output_dir", "out"], cwd=work, env=os.environ | home, capture_output=True)
    if done.returncode:
        sys.exit(f"{shlex.join(command)} failed:\n{done.stderr.decode()[-3000:]}")
    return time.perf_counter() - start


def compare(name: str, examples: Path, work: Path, repeats: int, threads: int) -> None:
    """Prints the ratios of a workload: their time divided by ours, warm a step and cold a run."""
    ours, theirs, flags = WORKLOADS[name]
    scripts = {"ours": ROOT / f"{ours}.py", "theirs": examples / f"{theirs}.py"}
    warm, cold = {side: [] for side in scripts}, {side: [] for side in scripts}
    for side, script in scripts.items():
        seconds(script, flags, LONG, work, f"{name}-{side}", threads)
    for _ in range(repeats):
        for side, script in scripts.items():
            times = [seconds(script, flags, steps, work, f"{name}-{side}", threads) for steps in (SHORT, LONG)]
            warm[side].append((times[1] - times[0]) / (LONG - SHORT))
            shutil.rmtree(work / "empty", ignore_errors=True)
            cold[side].append(seconds(script, flags, LONG, work, "empty", threads))
    for what, times in (("warm step", warm), (f"cold run of {LONG}", cold)):
        ratios = sorted(b / a for a, b in zip(times["ours"], times["theirs"], strict=True))
        middle = {side: f"{statistics.median(values):.2f} s" for side, values in times.items()}
        print(f"{name:18} {what:14} {statistics.median(ratios):.2f}x ({ratios[0]:.2f} to {ratios[-1]:.2f})", middle)


def main() -> None:
    """Makes the model and the pictures, and compares the workloads one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("examples", type=Path, help="the examples folder of a diffusers checkout")
    parser.add_argument("workloads", nargs="+", choices=WORKLOADS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        make_model(Path(work, "model"))
        make_pictures(Path(work))
        for name in args.workloads:
            compare(name, args.examples.resolve(), Path(work), args.repeats, args.threads)


if __name__ == "__main__":
    main()
