"""Times the stages of train_text_to_image.py on 1,000, 10,000 and 100,000 small pictures with captions.

    python benchmarks/scale.py [1000 10000 ...] [--threads 2]

Each set is read twice, with an empty cache and with a full one, in a process of its own. A run that needs each picture
three times is stopped after 40 steps. Printed are the seconds of each stage, the median step, and the most memory. The
model is the demo's, at 32 pixels, so that what is counted is not its work.
"""

import argparse
import multiprocessing
import os
import resource
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
STAGES = "read_records check_records split_records load_models check_identity plan_cache fill_entries".split()
STAGES += ["prepare_training"]
STEPS = 40


def make_pictures(folder, count):
    """Saves pictures of 32 pixels, no two alike, a hundred a folder, with captions beside them."""
    from PIL import Image

    for i in range(count):
        place = folder / f"{i // 100:04d}"
        place.mkdir(parents=True, exist_ok=True)
        picture = Image.new("RGB", (32, 32), (i % 256, i // 256 % 256, i // 65536))
        picture.paste("white", (8, 8, 16, 24))
        picture.save(place / f"{i:06d}.png")
        (place / f"{i:06d}.txt").write_text(f"picture {i}")


def measure(data, work, out, threads):
    """Runs the script on a folder; prints what its stages took."""
    begun = time.perf_counter()
    sys.path.insert(0, str(ROOT))
    import torch

    import train_text_to_image as script

    torch.set_num_threads(threads)
    taken, steps = {"imports": time.perf_counter() - begun}, []

    def timed(name):
        function = getattr(script, name)

        def wrapper(*arguments):
            start = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                taken[name] = taken.get(name, 0) + time.perf_counter() - start

        setattr(script, name, wrapper)

    def after_step(run, models):
        steps.append(time.perf_counter())
        if len(steps) == STEPS:
            os.kill(os.getpid(), signal.SIGTERM)

    for name in STAGES:
        timed(name)
    script.after_step = after_step
    flags = f"--pretrained_model_name_or_path {ROOT}/demo/base --train_data_dir {data} --resolution 32 --center_crop "
    flags += (
        f"--train_batch_size 4 --num_train_epochs 3 --lr_warmup_steps 0 --seed 0 --report_to none --output_dir {out} "
    )
    flags += f"--checkpointing_steps 0 --encoding_cache_dir {work}/cache"
    start = time.perf_counter()
    try:
        script.main(script.parse_args(flags.split()))
    except SystemExit as end:
        assert end.code == 143, end.code
    step = statistics.median(b - a for a, b in zip(steps[5:], steps[6:]))
    whole = sum(taken.values())
    rest = steps[0] - start + taken["imports"] - whole
    stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in taken.items())
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(f"    {stages}, rest {rest:.1f} s; a step {1000 * step:.1f} ms; {memory:.0f} MiB", flush=True)


def main():
    """Measures the sets one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("counts", nargs="*", type=int, default=[1000, 10_000, 100_000])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    for count in args.counts:
        with tempfile.TemporaryDirectory() as work:
            make_pictures(Path(work, "data"), count)
            for kind in ("empty cache", "full cache"):
                print(f"{count} pictures, {kind}", flush=True)
                arguments = (f"{work}/data", work, f"{work}/{kind.split()[0]}", args.threads)
                process = multiprocessing.get_context("spawn").Process(target=measure, args=arguments)
                process.start()
                process.join()


if __name__ == "__main__":
    main()
