"""Times a step of each script against the bare work of its models, in one process and in turns.

    python benchmarks/overhead.py [train_lora ...] [--threads 2]

Bare work is forward, backward, clipping, the optimizer and the average, on a batch that is ready. It is done after
each step of a run. A step is everything between: loading, random draws, that same work, numbers, logging. Printed are
the lowest of ten, their ratio, and for one step of either kind what noise does not touch: operations of PyTorch, of
these copies, waits for the device and kernels of the optimizer, and modules called. The model has random weights.
"""

import argparse
import collections
import importlib
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch
from side_by_side import make_model, make_pictures
from torch.utils._python_dispatch import TorchDispatchMode


STEPS = 14  # of which the first two are not counted, nor is the one with counters
COUNTED_STEP = 3
SD = "--pretrained_model_name_or_path {0}/model --resolution 256 --center_crop"
FLAGS = {
    "train_text_to_image": f"{SD} --train_data_dir {{0}}/pictures --use_ema --snr_gamma 5",
    "train_lora": f"{SD} --train_data_dir {{0}}/pictures --rank 8",
    "train_dreambooth": f"{SD} --instance_data_dir {{0}}/plain --instance_prompt sks",
    "textual_inversion": f"{SD} --train_data_dir {{0}}/plain --save_steps 0 "
    "--placeholder_token <new> --initializer_token a",
    "train_unconditional": "--model_config_name_or_path {0}/unet --train_data_dir {0}/pictures --resolution 64 "
    "--eval_batch_size 0 --save_model_epochs 0 --use_ema",
}
UNCONDITIONAL = """{"_class_name": "UNet2DModel", "block_out_channels": [64, 64, 128, 128], "layers_per_block": 2,
"down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
"up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"]}"""
KINDS = {
    "operations": lambda name: True,
    "copies": lambda name: name in ("_to_copy", "copy_"),
    "waits": lambda name: name in ("_local_scalar_dense", "nonzero", "equal"),
    "optimizer kernels": lambda name: name.startswith(("_fused_adam", "_foreach_lerp")),
}


class Counter(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self):
        super().__init__()
        self.names = collections.Counter()

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        self.names[operation.__name__.split(".")[0]] += 1
        return operation(*arguments, **keywords or {})


class Turns:
    """Stands in a script's hooks: after each step of the run it does the bare work, and times both."""

    def __init__(self, script):
        self.script, self.times, self.counts, self.batch = script, {"step": [], "bare": []}, {}, None
        self.after_step, self.compute_loss = script.after_step, script.compute_loss
        self.prepare_training = script.prepare_training
        script.after_step, script.compute_loss = self.turn, self.keep_batch
        script.prepare_training = self.keep_optimizer
        self.modules, self.last, self.counter = 0, None, None
        torch.nn.modules.module.register_module_forward_hook(self.count_module)

    def count_module(self, *ignored):
        self.modules += 1

    def keep_batch(self, models, batch, args):
        self.batch = self.batch or batch
        return self.compute_loss(models, batch, args)

    def keep_optimizer(self, run, models):
        self.optimizer = self.prepare_training(run, models)
        return self.optimizer

    def bare_work(self, run, models):
        with self.script.autocast(run):
            loss = self.compute_loss(models, self.batch, run.args)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(models.params_to_optimize, run.args.max_grad_norm)
        self.optimizer.optimizer.step()
        self.optimizer.optimizer.zero_grad()
        self.script.update_average(run, models)

    def begin(self, counted):
        self.modules = 0
        self.counter = Counter() if counted else None
        if counted:
            self.counter.__enter__()
        self.last = time.perf_counter()

    def end(self, kind):
        seconds = time.perf_counter() - self.last
        if self.counter is None:
            self.times[kind].append(seconds)
        else:
            self.counter.__exit__(None, None, None)
            names = self.counter.names
            found = {what: sum(names[name] for name in names if rule(name)) for what, rule in KINDS.items()}
            self.counts[kind] = found | {"modules": self.modules}

    def turn(self, run, models):
        self.after_step(run, models)
        if run.global_step > 2:
            self.end("step")
            self.begin(run.global_step == COUNTED_STEP + 1)
            self.bare_work(run, models)
            self.end("bare")
        self.begin(run.global_step == COUNTED_STEP)


def measure(name, work, threads):
    """Prints what one script's step takes."""
    from accelerate.state import AcceleratorState, GradientState

    torch.set_num_threads(threads)
    script = importlib.import_module(name)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    turns = Turns(script)
    flags = FLAGS[name].format(work).split()
    flags += f"--train_batch_size 4 --max_train_steps {STEPS} --lr_warmup_steps 0 --seed 0 --report_to none".split()
    flags += f"--checkpointing_steps 0 --output_dir {work}/{name} --encoding_cache_dir {work}/cache".split()
    script.main(script.parse_args(flags))
    step, bare = (min(turns.times[kind]) for kind in ("step", "bare"))
    print(f"{name:20} step {step:.3f} s, bare {bare:.3f} s, ratio {step / bare:.3f}, of {len(turns.times['step'])}")
    for kind, counts in turns.counts.items():
        print(f"    {kind:5}", ", ".join(f"{count} {what}" for what, count in counts.items()))


def main():
    """Measures the scripts one after the other, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="*", default=list(FLAGS))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        make_model(Path(work, "model"))
        make_pictures(Path(work))
        Path(work, "unet").mkdir()
        Path(work, "unet", "config.json").write_text(UNCONDITIONAL)
        for name in args.scripts:
            process = multiprocessing.get_context("spawn").Process(target=measure, args=(name, work, args.threads))
            process.start()
            process.join()


if __name__ == "__main__":
    main()
