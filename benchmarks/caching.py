"""Times how latents are cached: decoding ahead of the encoder and writing behind it, against one after the other.

    python benchmarks/caching.py [--pictures 200] [--side 1024] [--resolution 256] [--threads 2]

Both fill an empty cache in turns, three times, in one process. Printed are pictures a second, the share of the time in
which the encoder waits, and the ratio. The VAE has random weights.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace


ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import numpy as np
import torch
from PIL import Image
from side_by_side import make_model

import train_text_to_image as script


def one_after_the_other(run, models, jobs):
    """Fills the cache without a thread."""
    for encode, prepare, *arguments in jobs:
        for file, given in prepare(*arguments).items():
            with torch.no_grad():
                script.write_entry(file, encode(models, *given))


def main():
    """Makes the pictures, and fills the cache in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as work:
        make_model(Path(work, "model"))
        rng = np.random.default_rng(0)
        (Path(work) / "data").mkdir()
        for i in range(args.pictures):
            noise = rng.integers(0, 255, (args.side // 8, args.side // 8, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((args.side, args.side)).save(f"{work}/data/{i}.jpg")
            Path(work, "data", f"{i}.txt").write_text("a picture")
        flags = f"--pretrained_model_name_or_path {work}/model --train_data_dir {work}/data --output_dir {work}/out "
        flags += f"--resolution {args.resolution} --center_crop --random_flip --encoding_cache_dir {work}/cache"
        parsed = script.parse_args(flags.split())
        stop = SimpleNamespace(signum=0, exit_if_asked=lambda: None)
        run = script.Run(parsed, script.make_accelerator(parsed), stop, 0, "id")
        records = script.check_records(run, script.read_records(parsed))
        models = script.load_models(run)
        models.vae.to(memory_format=torch.channels_last)
        samples = script.Samples(parsed, records, 0, args.resolution, models.sample_shape, 1000)
        setting = script.encoder_setting(run)
        encoding = [0.0]

        def encode(models, pixels):
            start = time.perf_counter()
            try:
                return script.encode_pixels(models, pixels)
            finally:
                encoding[0] += time.perf_counter() - start

        jobs = []
        for index in range(len(samples)):
            upright = samples.choose_crop((0, index))._replace(flip=False)
            flips = {flip: upright._replace(flip=flip) for flip in (False, True)}
            files = {flip: script.latents_file(run, models, setting, samples, crop) for flip, crop in flips.items()}
            jobs.append((encode, script.crop_inputs, samples, upright, files, False))
        ways = {"one after the other": one_after_the_other, "ahead and behind": script.fill_entries}
        rates, idle = {way: [] for way in ways}, {way: [] for way in ways}
        for _ in range(3):
            for way, fill in ways.items():
                shutil.rmtree(f"{work}/cache/latents", ignore_errors=True)
                encoding[0], start = 0.0, time.perf_counter()
                fill(run, models, jobs)
                seconds = time.perf_counter() - start
                rates[way].append(2 * len(jobs) / seconds)
                idle[way].append(1 - encoding[0] / seconds)
        for way in ways:
            rate, share = statistics.median(rates[way]), statistics.median(idle[way])
            print(f"{way:20} {rate:.1f} crops a second, the encoder waits {share:.0%} of the time")
        ratios = sorted(after / before for before, after in zip(*rates.values()))
        print(f"ratio {ratios[1]:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
