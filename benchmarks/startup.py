"""Times a script's start, up to its first step, against a process that only imports the libraries and loads the base.

    python benchmarks/startup.py [--repeats 5]

Both are processes of their own, in turns, on the demo's base and pictures with a full cache. Printed are the lowest
times, the ratio, and the script's phases: imports, then those of its stages that take longest.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = """
import os
import accelerate, diffusers, peft, torch, transformers
pipeline = diffusers.StableDiffusionPipeline.from_pretrained("demo/base", safety_checker=None, use_safetensors=True)
os._exit(0)
"""
SCRIPT = """
import os, sys, time
begun = time.perf_counter()
import train_text_to_image as script
taken = {"imports": time.perf_counter() - begun}
def timed(name):
    function = getattr(script, name)
    def wrapper(*arguments):
        start = time.perf_counter()
        try:
            return function(*arguments)
        finally:
            taken[name] = time.perf_counter() - start
    setattr(script, name, wrapper)
for name in "make_accelerator begin_run check_records load_models fill_cache prepare_training prepare_folder".split():
    timed(name)
def train(*arguments):
    print("phases", " ".join(f"{name}={seconds:.2f}" for name, seconds in taken.items()), flush=True)
    os._exit(0)
script.train = train
script.main(script.parse_args(sys.argv[1:]))
"""


def seconds(code, *flags):
    """Runs some code in a process; returns the seconds it took, and what it printed."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *flags], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return time.perf_counter() - start, done.stdout


def main():
    """Runs both in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    os.environ["PYTHONPATH"] = str(ROOT)
    with tempfile.TemporaryDirectory() as work:
        flags = "--config configs/demo_text_to_image.yaml --overwrite_output_dir --report_to none "
        flags += f"--output_dir {work}/out --encoding_cache_dir {work}/cache"
        seconds(SCRIPT, *flags.split())
        times, phases = {"libraries": [], "script": []}, []
        for _ in range(repeats):
            times["libraries"].append(seconds(LIBRARIES)[0])
            taken, said = seconds(SCRIPT, *flags.split())
            times["script"].append(taken)
            phases.append((taken, next(line for line in said.splitlines() if line.startswith("phases"))))
    lowest = {what: min(values) for what, values in times.items()}
    print(
        f"libraries and base {lowest['libraries']:.2f} s, script to its first step {lowest['script']:.2f} s, ", end=""
    )
    print(f"ratio {lowest['script'] / lowest['libraries']:.2f}")
    print(min(phases)[1])


if __name__ == "__main__":
    main()
