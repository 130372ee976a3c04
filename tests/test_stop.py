"""Checkpoints are whole or not there, and stopping works: proofs with real processes, real signals and full disks."""

import contextlib
import ctypes
import functools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import forked
import psutil
import pytest
import torch
from conftest import ROOT, make_pictures, metrics, run, same, weights
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file


SCRIPT = "train_text_to_image"
BIN = Path(sys.executable).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
LONG = ("--max_train_steps", 2000, "--checkpointing_steps", 1000)  # longer than any test waits
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's process calls")
pytestmark = linux


# Helpers.


@pytest.fixture(scope="session", autouse=True)
def server():
    """The server that runs are forked from."""
    forked.start_server(SCRIPT)


@pytest.fixture(scope="session")
def script():
    """The script as a module, for runs in this process."""
    return __import__(SCRIPT)


@pytest.fixture(scope="session")
def command(tiny_model, pictures, tmp_path_factory):
    """Returns the flags of a small run with an average; later flags win."""
    cache = tmp_path_factory.mktemp("cache")

    def flags(output_dir, *more):
        data = ["--pretrained_model_name_or_path", tiny_model, "--train_data_dir", pictures, "--resolution", 48]
        data += ["--center_crop", "--random_flip", "--encoding_cache_dir", cache, "--output_dir", output_dir]
        return [*data, "--train_batch_size", 2, "--use_ema", "--seed", 7, "--report_to", "none", *more]

    return flags


@pytest.fixture
def start(tmp_path):
    """Starts processes that do not outlive the test: forked runs of the script, or other commands."""
    runs = []

    def begin(arguments, launcher=None, environment=None, **options):
        log = tmp_path / f"run-{len(runs)}.log"
        if launcher is None:
            runs.append(forked.fork(SCRIPT, arguments, log, environment=environment, **options))
        else:
            words = [*map(str, launcher), f"{ROOT}/{SCRIPT}.py", *map(str, arguments)]
            settings = {"env": {**ENVIRONMENT, **(environment or {})}, "start_new_session": True, **options}
            with open(log, "w") as out:
                process = subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT, **settings)
            runs.append(forked.Run(process, log))
        return runs[-1]

    yield begin
    for process in runs:
        process.end()


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


def is_whole(checkpoint):
    """Whether the sizes in a checkpoint's manifest are those of its files, all of them."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
    except (OSError, ValueError):
        return False
    files = {str(p.relative_to(checkpoint)): p.stat().st_size for p in checkpoint.rglob("*") if p.is_file()}
    del files["manifest.json"]
    return manifest == files and len(files) >= 5


def whole_checkpoints(output_dir):
    """The steps of a folder's whole checkpoints."""
    return sorted(int(path.name.split("-")[1]) for path in Path(output_dir).glob("checkpoint-*") if is_whole(path))


def losses(folder):
    """The steps, losses, gradient norms and learning rates in a checkpoint or a folder of logs."""
    rows = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
    return [tuple(row[name] for name in ("step", "loss", "grad_norm", "lr")) for row in rows if "loss" in row]


def rows(output_dir):
    """How many rows the run has logged."""
    with contextlib.suppress(OSError):
        return len((output_dir / "logs" / "metrics.jsonl").read_text().splitlines())
    return 0


def litter(folder):
    """Files and folders that were meant to be renamed or removed."""
    return [str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.name.endswith(".tmp")]


def assert_equal(checkpoint, other):
    """Asserts that two checkpoints hold the same weights, averages and losses, bit for bit."""
    assert losses(checkpoint) == losses(other)
    assert {name.split("/")[0] for name in weights(checkpoint)} >= {"unet", "unet_ema"}
    assert same(weights(checkpoint), weights(other))


@pytest.fixture(scope="session")
def uninterrupted(command, tmp_path_factory):
    """Returns checkpoint-<step> of a run, on one process or more, that nothing stopped."""
    made = {}

    def checkpoint(step, ranks=1):
        length = -(-step // 10) * 10
        if (length, ranks) not in made:
            folder = tmp_path_factory.mktemp("uninterrupted")
            counter = iter(range(ranks))

            def start(arguments, environment=None):
                return forked.fork(SCRIPT, arguments, folder / f"{next(counter)}.log", environment=environment)

            arguments = command(folder / "out", "--max_train_steps", length, "--checkpointing_steps", 1)
            finish(start, arguments, ranks)
            made[length, ranks] = folder / "out"
        return made[length, ranks] / f"checkpoint-{step}"

    return checkpoint


@pytest.fixture
def goes_on(start, command, uninterrupted):
    """Asserts that a stopped run left one checkpoint and ends from there as if it had never been stopped."""

    def check(output_dir, ranks=1, flags=()):
        steps = whole_checkpoints(output_dir)
        assert len(steps) == 1 and litter(output_dir) == []
        step = steps[0]
        assert_equal(output_dir / f"checkpoint-{step}", uninterrupted(step, ranks))
        more = ("--max_train_steps", step + 2, "--checkpointing_steps", 1, "--resume_from_checkpoint", "latest")
        said = finish(start, command(output_dir, *flags, *more), ranks)
        assert f"Resuming from {output_dir}/checkpoint-{step}." in said
        assert_equal(output_dir / f"checkpoint-{step + 2}", uninterrupted(step + 2, ranks))
        averaged = weights(output_dir / f"checkpoint-{step + 2}" / "unet_ema")
        assert same(weights(output_dir / "unet"), averaged)
        return step

    return check


# Kills.


def kill_moments(rng):
    """When to kill the attempts of one run: a word and the seconds after it, or a change, its count and the seconds.

    They stand in the order in which the run gets there.
    """
    yield "checking", rng.uniform(0, 0.05)
    yield "checking|caching", rng.uniform(0, 0.1)
    yield "caching", rng.uniform(0, 0.1)
    yield r"/(latents|prompts)/", rng.randint(1, 60), 0
    yield r"/(latents|prompts)/", rng.randint(1, 60), rng.uniform(0, 0.02)
    writing = (r"checkpoint-\d+", rng.randint(1, 40))
    beginning = (r"/\.(metrics\.jsonl|train_args\.yaml)\.", rng.randint(1, 6), 0)
    pruning = (r"(rmtree|remove|rmdir) .*/checkpoint-\d+", rng.randint(1, 8), 0)
    middle = [(*writing, 0), (*writing, 0), beginning, pruning, (r"open .*/metrics\.jsonl$", rng.randint(1, 3), 0)]
    middle += [(r"checkpoint-\d+", rng.randint(1, 40), rng.uniform(0, 0.1)) for _ in range(3)]
    yield from rng.sample(middle, len(middle))
    ending = r"/out/(unet|vae|text_encoder|tokenizer|scheduler|model_index|samples/l|\.?README)"
    yield from [(ending, rng.randint(1, 20), 0) for _ in range(3)]


@pytest.fixture(scope="session")
def killed_command(command, tmp_path_factory):
    """Returns the flags of a run whose pictures take a while to check and to cache, with a cache of its own."""
    many = make_pictures(tmp_path_factory.mktemp("many") / "pictures", count=24, size=300)

    def flags(folder):
        data = ("--train_data_dir", many, "--no-random_flip", "--encoding_cache_dir", folder / "cache")
        steps = ("--max_train_steps", 24, "--checkpointing_steps", 1, "--checkpoints_total_limit", 2)
        resume = ("--resume_from_checkpoint", "latest")
        return command(folder / "out", *data, "--train_batch_size", 4, *steps, *resume)

    return flags


@pytest.fixture(scope="session")
def never_killed(killed_command, tmp_path_factory):
    """The output of that run, when nothing kills it."""
    folder = tmp_path_factory.mktemp("never-killed")
    assert forked.fork(SCRIPT, killed_command(folder), folder / "log").wait() == 0
    return folder / "out"


def check_after_kills(out, expected):
    """Asserts that a run that was killed and ended later left what it leaves when nothing kills it."""
    assert whole_checkpoints(out) == whole_checkpoints(expected)
    assert sorted(path.name for path in out.glob("checkpoint-*")) == sorted(
        path.name for path in expected.glob("checkpoint-*")
    )
    for step in whole_checkpoints(expected):
        assert_equal(out / f"checkpoint-{step}", expected / f"checkpoint-{step}")
    assert losses(out / "logs") == losses(expected / "logs")
    for part in ("unet", "vae", "text_encoder"):
        assert same(weights(out / part), weights(expected / part))
    assert litter(out) == []


@pytest.mark.launch
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))])
def test_kills_do_not_matter(seed, start, killed_command, never_killed, tmp_path):
    """A run that is killed at any moments, and started again each time, ends as if nothing had happened."""
    kills, newest = 0, 0
    out = tmp_path / "out"
    for moment in kill_moments(random.Random(seed)):
        if len(moment) == 2:
            process = start(killed_command(tmp_path))
            process.until(lambda: re.search(moment[0], process.output()))  # noqa: B023
            time.sleep(moment[1])
            os.kill(process.pid, signal.SIGKILL)
        else:
            pattern, count, delay = moment
            trigger = (pattern, count, ("kill", delay))
            process = start(killed_command(tmp_path), watched=tmp_path, trigger=trigger)
        code = process.wait()
        assert code in (0, -signal.SIGKILL), process.output()
        kills += code != 0
        if newest:
            assert max(whole_checkpoints(out)) >= newest  # whatever was whole stays until a newer one is
        newest = max(whole_checkpoints(out), default=0)
    print(f"{kills} kills")
    assert kills >= 12
    finish(start, killed_command(tmp_path))
    check_after_kills(out, never_killed)


@pytest.mark.launch
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_kill_before_any_change_of_a_checkpoint(start, command, uninterrupted, tmp_path):
    """A kill before each single change on disk from the second step to the end leaves a run that goes on well."""
    flags = ("--max_train_steps", 3, "--checkpointing_steps", 1, "--checkpoints_total_limit", 1)
    flags += ("--resume_from_checkpoint", "latest")
    for count in range(1, 200):
        out = tmp_path / f"out-{count}"
        pattern = r"checkpoint-[23]|/out-\d+/(unet|vae|text|token|sched|model|READ|\.READ)"
        killed = start(command(out, *flags), watched=out, trigger=(pattern, count, ("kill", 0)))
        if killed.wait() == 0:
            break
        assert whole_checkpoints(out)
        finish(start, command(out, *flags))
        assert_equal(out / "checkpoint-3", uninterrupted(3))
        assert same(weights(out / "unet"), weights(out / "checkpoint-3" / "unet_ema"))
        assert litter(out) == []
        shutil.rmtree(out)
    print(f"{count - 1} kills")
    assert count > 50


@pytest.mark.launch
def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(start, command, tmp_path):
    """Every file is flushed before the rename, the manifest is the last to be written, and pruning comes after."""
    out = tmp_path / "out"
    steps = ("--max_train_steps", 3, "--checkpointing_steps", 1, "--checkpoints_total_limit", 1)
    process = start(command(out, *steps), watched=out)
    assert process.wait() == 0, process.output()
    changes = [line.split(" ") for line in Path(f"{process.log}.changes").read_text().splitlines()]
    renamed = [i for i, words in enumerate(changes) if words[0] == "os.rename" and "checkpoint-" in words[2]]
    assert [changes[i][2] for i in renamed] == [f"{out}/checkpoint-{step}" for step in (1, 2, 3)]
    for i in renamed:
        before, (_, beside, target) = changes[:i], changes[i]
        manifest = before.index(["open", f"{beside}/manifest.json"])
        flushed = {path.removeprefix(beside) for event, path, *_ in before[manifest:] if event == "os.fsync"}
        assert not any(event == "open" and path.startswith(beside) for event, path, *_ in before[manifest + 1 :])
        written = {str(path).removeprefix(f"{out}/checkpoint-3") for path in (out / "checkpoint-3").rglob("*")}
        assert flushed >= written | {""}
        assert not any(path.startswith(target) for _, path, *_ in before)
    for step in (1, 2):
        pruned = changes.index(["shutil.rmtree", f"{out}/checkpoint-{step}"])
        assert renamed[step] < pruned


def test_torn_cache_entries_are_computed_anew(script, command, tmp_path):
    """An entry that is cut short, empty or overwritten is recomputed, and the weights are the same."""
    cache = tmp_path / "cache"
    flags = ("--max_train_steps", 6, "--checkpointing_steps", 0, "--encoding_cache_dir", cache, "--no-random_flip")
    run(script, *command(tmp_path / "first", *flags))
    entries = sorted(path for kind in ("latents", "prompts") for path in (cache / kind).iterdir())
    before = {path: path.read_bytes() for path in entries}
    assert {path.parent.name for path in entries} == {"latents", "prompts"}
    for path in entries[::2]:
        path.write_bytes(before[path][: len(before[path]) // 2])
    entries[1].write_bytes(b"")
    entries[-1].write_bytes(random.Random(0).randbytes(len(before[entries[-1]])))
    (cache / "checked" / os.listdir(cache / "checked")[0]).write_text("{torn")
    run(script, *command(tmp_path / "second", *flags))
    assert {path: path.read_bytes() for path in entries} == before
    assert same(weights(tmp_path / "first"), weights(tmp_path / "second"))
    assert litter(cache) == []


# Signals.


@pytest.mark.launch
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda signum: signum.name)
def test_a_signal_ends_a_run_with_a_checkpoint(signum, start, command, goes_on, tmp_path):
    """The step is finished, a checkpoint written, the exit code 128 + signal, and the run can go on."""
    process = start(command(tmp_path / "out", *LONG))
    process.until(lambda: rows(tmp_path / "out") >= 2)
    os.kill(process.pid, signum)
    assert process.wait(30) == 128 + signum, process.output()
    said = process.output()
    assert "Traceback" not in said
    step = goes_on(tmp_path / "out")
    assert step >= 2 and f"Stopped after step {step}, and saved: --resume_from_checkpoint latest goes on." in said


@pytest.mark.launch
def test_a_signal_to_python(start, command, goes_on, tmp_path):
    """The same through `python script`, as a user starts it."""
    process = start(command(tmp_path / "out", *LONG), launcher=[sys.executable])
    process.until(lambda: rows(tmp_path / "out") >= 2)
    process.process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143, process.output()
    goes_on(tmp_path / "out")


@pytest.fixture
def adopt():
    """Makes this process the parent of orphans, so that it can wait for them."""
    PR_SET_CHILD_SUBREAPER = 36
    prctl = ctypes.CDLL(None).prctl
    assert prctl(PR_SET_CHILD_SUBREAPER, 1) == 0
    yield
    prctl(PR_SET_CHILD_SUBREAPER, 0)


def wait_for_orphan(pid, timeout=60):
    """Waits for a child of a parent that is gone; returns its exit code."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        with contextlib.suppress(ChildProcessError):  # its parent is not gone yet
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    raise AssertionError(f"process {pid} goes on as an orphan")


@pytest.mark.launch
@pytest.mark.parametrize(
    "signum, to_group",
    [
        (signal.SIGTERM, False),
        (signal.SIGINT, True),
        pytest.param(signal.SIGTERM, True, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, False, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_accelerate_launch(signum, to_group, start, command, goes_on, adopt, tmp_path):
    """A launcher that forwards nothing and is gone at once does not leave its script training as an orphan."""
    settings = "--num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"
    settings += " --num_cpu_threads_per_process 1"
    launcher = [BIN / "accelerate", "launch", *settings.split()]
    process = start(command(tmp_path / "out", *LONG), launcher)
    process.until(lambda: rows(tmp_path / "out") >= 2)
    (child,) = psutil.Process(process.pid).children()
    (os.killpg if to_group else os.kill)(process.pid, signum)
    assert process.wait(30) in (-signum, 128 + signum)
    # An orphan takes its launcher's end for a SIGTERM, which may meet it as Python shuts down, all work done.
    codes = {143, -signal.SIGTERM} | ({128 + signum} if to_group else set())
    assert wait_for_orphan(child.pid) in codes, process.output()
    goes_on(tmp_path / "out")


@pytest.mark.launch
@pytest.mark.parametrize("to_group", [False, True])
def test_a_signal_to_torchrun(to_group, start, command, goes_on, tmp_path):
    """Both ranks stop at the same step, well within the 30 s that torchrun gives them."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    process = start(command(tmp_path / "out", *LONG), launcher, environment={"ACCELERATE_USE_CPU": "true"})
    process.until(lambda: rows(tmp_path / "out") >= 2)
    (os.killpg if to_group else os.kill)(process.pid, signal.SIGTERM)
    assert process.wait(25) == 1, process.output()  # torchrun's way
    goes_on(tmp_path / "out", ranks=2)


@pytest.mark.launch
@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_signal_to_one_rank_ends_both(rank, start, command, goes_on, tmp_path):
    """Whichever rank is told to stop, both finish the same step and exit with 128 + signal."""
    ranks = start_ranks(start, command(tmp_path / "out", *LONG), 2)
    ranks[0].until(lambda: rows(tmp_path / "out") >= 2)
    os.kill(ranks[rank].pid, signal.SIGTERM)
    assert [process.wait(30) for process in ranks] == [143, 143], ranks[0].output() + ranks[1].output()
    goes_on(tmp_path / "out", ranks=2)


@pytest.mark.launch
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda signum: signum.name)
def test_a_signal_to_the_group_spares_the_loader(signum, start, command, goes_on, tmp_path):
    """Worker processes that get the signal too do not take the run with them."""
    workers = ("--dataloader_num_workers", 2)
    process = start(command(tmp_path / "out", *LONG, *workers))
    process.until(lambda: rows(tmp_path / "out") >= 2)
    assert len(psutil.Process(process.pid).children()) == 2
    os.killpg(process.pid, signum)
    assert process.wait(30) == 128 + signum, process.output()
    goes_on(tmp_path / "out", flags=workers)


@pytest.mark.launch
@pytest.mark.parametrize("workers", [0, 2])
def test_a_second_interrupt_stops_at_once(workers, start, command, tmp_path):
    """One SIGINT lets a step finish, however long that takes; a second one does not."""
    flags = ("--max_train_steps", 20, "--gradient_accumulation_steps", 2000, "--dataloader_num_workers", workers)
    process = start(command(tmp_path / "out", *flags), launcher=[sys.executable])
    process.until(lambda: "training" in process.output())
    os.kill(process.pid, signal.SIGINT)
    end = time.monotonic() + 1.5
    process.until(lambda: time.monotonic() > end)  # it goes on
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(15) == -signal.SIGINT, process.output()
    assert list((tmp_path / "out").glob("*checkpoint*")) == []


@pytest.mark.launch
def test_a_crash_does_not_wait_for_the_loader(start, command, pictures, tmp_path):
    """Workers that ignore SIGTERM do not keep a run alive that an error has ended."""
    data = shutil.copytree(pictures, tmp_path / "pictures")
    flags = ("--dataloader_num_workers", 2, "--no_encoding_cache", "--train_data_dir", data)
    process = start(command(tmp_path / "out", *LONG, *flags), launcher=[sys.executable])
    process.until(lambda: rows(tmp_path / "out") >= 1)
    shutil.rmtree(data)
    assert process.wait(20) == 1, process.output()
    assert "No such file" in process.output()


@pytest.fixture(scope="session")
def large_pictures(tmp_path_factory):
    """Pictures that take tens of seconds to check."""
    folder = make_pictures(tmp_path_factory.mktemp("large") / "pictures", count=4, size=1500)
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    copies = []
    for line in map(json.loads, lines):
        for i in range(300):
            name = f"{i:03d}-{line['file_name']}"
            os.link(folder / line["file_name"], folder / name)
            copies.append(json.dumps({"file_name": name, "text": "a circle"}) + "\n")
        (folder / line["file_name"]).unlink()
    (folder / "metadata.jsonl").write_text("".join(copies))
    return folder


@pytest.mark.launch
def test_a_signal_while_checking(start, command, large_pictures, tmp_path):
    """The check of the pictures ends after those at hand, and keeps what it knows of them."""
    cache = tmp_path / "cache"
    flags = ("--train_data_dir", large_pictures, "--encoding_cache_dir", cache)
    process = start(command(tmp_path / "out", *LONG, *flags))
    process.until(lambda: re.search(r"checking: .* [1-9]\d*/1200", process.output()))
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(10) == 143, process.output()
    assert "Traceback" not in process.output() and not (cache / "latents").exists()
    (known,) = [json.loads(path.read_text()) for path in (cache / "checked").iterdir()]
    assert 0 < len(known) < 1200


@pytest.mark.launch
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_while_caching(ranks, start, command, tmp_path):
    """Caching ends after the entry at hand, and the next run takes up the entries that there are."""
    many = make_pictures(tmp_path / "pictures", count=200)
    cache = tmp_path / "cache"
    flags = ("--train_data_dir", many, "--resolution", 256, "--encoding_cache_dir", cache)

    def entries():
        return {path: path.stat().st_mtime_ns for path in cache.glob("latents/*") if not path.name.endswith(".tmp")}

    kept = {}
    for _ in range(2):
        runs = start_ranks(start, command(tmp_path / "out", *LONG, *flags), ranks)
        runs[0].until(lambda: len(entries()) >= len(kept) + 4)  # noqa: B023
        os.kill(runs[-1].pid, signal.SIGINT)
        assert [process.wait(10) for process in runs] == [130] * ranks, runs[0].output()
        assert kept.items() <= entries().items()  # none was computed again
        kept = entries()
        assert len(kept) < 300 and litter(cache) == []
        assert all(load_file(path)["mean"].shape == (4, 128, 128) for path in kept)
    assert list((tmp_path / "out").glob("*checkpoint*")) == []


@pytest.mark.launch
def test_a_signal_while_sampling(start, command, uninterrupted, tmp_path):
    """Validation ends after the picture at hand, half a grid is not kept, and the run goes on well."""
    prompts = ("--validation_prompts", *(f"a circle {i}" for i in range(300)))
    process = start(command(tmp_path / "out", *LONG, *prompts))
    process.until(lambda: re.search(r"sampling: .* [1-9]\d*/300", process.output()))
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(15) == 143, process.output()
    assert list((tmp_path / "out" / "samples").glob("*.png")) == []
    more = ("--max_train_steps", 3, "--checkpointing_steps", 1, "--resume_from_checkpoint", "latest")
    finish(start, command(tmp_path / "out", *more))
    assert_equal(tmp_path / "out" / "checkpoint-3", uninterrupted(3))


# Full disks.


class SmallDisk:
    """A disk of some MiB at a path of a mount namespace's own; from here it is seen at another path."""

    def __init__(self, path, mib):
        unshare = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-Urm"]
        mount = f"mount -t tmpfs -o size={mib}m tmpfs '{path}' && echo mounted && exec sleep 1000"
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        path.mkdir()
        self.holder = subprocess.Popen([*unshare, "sh", "-c", mount], **pipes)
        self.works = (said := self.holder.stdout.readline()) == "mounted\n"
        self.problem = said.strip()
        self.there, self.here = path, Path(f"/proc/{self.holder.pid}/root{path}")
        self.options = {"namespace": self.holder.pid}

    def leave(self, mib):
        """Fills the disk until so much is free."""
        (self.here / "filler").unlink(missing_ok=True)
        with open(self.here / "filler", "wb") as filler:
            os.posix_fallocate(filler.fileno(), 0, max(shutil.disk_usage(self.here).free - int(mib * 2**20), 4096))


@pytest.fixture
def small_disk(tmp_path):
    """Makes small disks."""
    disks = []

    def make(mib):
        disks.append(SmallDisk(tmp_path / f"disk-{len(disks)}", mib))
        if not disks[-1].works:
            pytest.skip(f"no disk can be mounted here: {disks[-1].problem}")
        return disks[-1]

    with contextlib.ExitStack() as ends:
        ends.callback(lambda: [(disk.holder.kill(), disk.holder.wait()) for disk in disks])
        yield make


def assert_says_so(process, folder):
    """Asserts that a run ended in one sentence that names the folder and what is free."""
    assert process.wait() == 1, process.output()
    sentence = rf"[^\n\]]*{re.escape(str(folder))}\b[^\n]* \d+\.\d\d GiB[^\n]*"
    said = [text for text in re.findall(sentence, process.output()) if "free" in text]
    assert len(said) == 1, process.output()
    assert "Traceback" not in process.output()


@pytest.fixture(scope="session")
def checkpoint_mib(uninterrupted):
    """The size of a checkpoint."""
    return sum(path.stat().st_size for path in uninterrupted(1).rglob("*") if path.is_file()) / 2**20


@pytest.mark.launch
@pytest.mark.parametrize("share", [pytest.param(0.3, marks=pytest.mark.slow), 0.7, 0.98])
def test_a_full_disk_leaves_earlier_checkpoints(share, start, command, small_disk, uninterrupted, checkpoint_mib):
    """Wherever in the third checkpoint the disk is full, the first two are whole, and the run goes on with room."""
    disk = small_disk(100)
    disk.leave((2 + share) * checkpoint_mib)
    out = disk.there / "out"
    steps = ("--max_train_steps", 4, "--checkpointing_steps", 1, "--resume_from_checkpoint", "latest")
    process = start(command(out, *steps), **disk.options)
    assert_says_so(process, out)
    assert whole_checkpoints(disk.here / "out") == [1, 2] and litter(disk.here) == []
    assert shutil.disk_usage(disk.here).free > (share - 0.1) * checkpoint_mib * 2**20
    (disk.here / "filler").unlink()
    process = start(command(out, *steps), **disk.options)
    assert process.wait() == 0, process.output()
    assert_equal(disk.here / "out" / "checkpoint-4", uninterrupted(4))


@pytest.mark.launch
def test_a_full_disk_on_two_ranks(start, command, small_disk, checkpoint_mib, tmp_path):
    """The rank that does not write hears of it, and both end."""
    disk = small_disk(100)
    disk.leave(1.5 * checkpoint_mib)
    steps = ("--max_train_steps", 3, "--checkpointing_steps", 1)
    begin = functools.partial(start, **disk.options)
    ranks = start_ranks(begin, command(disk.there / "out", *steps), 2)
    assert_says_so(ranks[0], disk.there / "out")
    assert ranks[1].wait(20) == 1
    assert whole_checkpoints(disk.here / "out") == [1] and litter(disk.here) == []


@pytest.mark.launch
def test_a_disk_that_something_else_fills(start, command, small_disk):
    """Where no row can be logged any more, the run ends in one sentence too."""
    disk = small_disk(100)
    out = disk.here / "out"
    process = start(command(disk.there / "out", "--max_train_steps", 2000, "--checkpointing_steps", 3), **disk.options)
    process.until(lambda: whole_checkpoints(out) == [3])
    disk.leave(0)
    assert_says_so(process, disk.there / "out")
    assert whole_checkpoints(out) == [3]


@pytest.mark.launch
def test_a_disk_without_room_for_the_result(start, command, small_disk, checkpoint_mib):
    """The last checkpoint stays when the pipeline does not fit."""
    disk = small_disk(100)
    disk.leave(checkpoint_mib + 1)
    out = disk.there / "out"
    process = start(command(out, "--max_train_steps", 2, "--checkpointing_steps", 2), **disk.options)
    assert_says_so(process, out)
    assert whole_checkpoints(disk.here / "out") == [2]


@pytest.mark.launch
def test_a_disk_without_room_for_a_checkpoint(start, command, small_disk, checkpoint_mib):
    """The header refuses what cannot fit, before the first step."""
    disk = small_disk(100)
    disk.leave(checkpoint_mib * 0.9)
    out = disk.there / "out"
    process = start(command(out, "--max_train_steps", 2, "--checkpointing_steps", 1), **disk.options)
    assert_says_so(process, out)
    assert rows(disk.here / "out") == 0 and "A checkpoint needs" in process.output()


@pytest.mark.launch
@pytest.mark.parametrize("kib", [pytest.param(40, marks=pytest.mark.slow), 120])
def test_a_full_cache(kib, start, command, small_disk, tmp_path):
    """A full cache folder ends the run in one sentence; the entries that fitted are whole."""
    disk = small_disk(10)
    disk.leave(kib / 1024)
    cache = disk.there / "cache"
    process = start(command(tmp_path / "out", *LONG, "--encoding_cache_dir", cache), **disk.options)
    assert_says_so(process, cache)
    entries = [path for kind in ("latents", "prompts") for path in (disk.here / "cache").glob(f"{kind}/*")]
    assert entries and litter(disk.here) == []
    assert all(load_file(path) for path in entries)


@pytest.mark.launch
def test_a_file_that_may_not_grow(start, command, tmp_path):
    """The same by a limit of the process, for machines where no disk can be mounted."""
    out = tmp_path / "out"
    flags = command(out, "--max_train_steps", 4, "--checkpointing_steps", 1)
    process = start(flags, watched=out, trigger=(r"\.checkpoint-3\.tmp", 1, ("limit", 2**20)))
    assert_says_so(process, out)
    assert whole_checkpoints(out) == [1, 2] and litter(out) == []


# What latest finds, and what is refused.


@pytest.fixture
def refused(script, command, capsys):
    """Runs in this process what must be refused; returns the refusal."""

    def refuse(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            run(script, *arguments)
        return str(end.value.code) + "".join(capsys.readouterr())

    return refuse


@pytest.fixture(scope="session")
def trained(script, command, tmp_path_factory):
    """The output of three steps with a checkpoint each."""
    out = tmp_path_factory.mktemp("trained") / "out"
    run(script, *command(out, "--max_train_steps", 3, "--checkpointing_steps", 1))
    return out


@pytest.fixture
def out(trained, tmp_path):
    """A copy of it."""
    return shutil.copytree(trained, tmp_path / "out")


RESUME = ("--checkpointing_steps", 1, "--resume_from_checkpoint")


def cut(checkpoint):
    """Cuts a byte off a checkpoint's weights."""
    with open(checkpoint / "unet" / "diffusion_pytorch_model.safetensors", "r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) - 1)


TEARS = {
    "cut": cut,
    "empty": lambda checkpoint: (checkpoint / "state.json").write_bytes(b""),
    "no manifest": lambda checkpoint: (checkpoint / "manifest.json").unlink(),
    "torn manifest": lambda checkpoint: (checkpoint / "manifest.json").write_text('{"state.json": 1'),
    "no averages": lambda checkpoint: shutil.rmtree(checkpoint / "unet_ema"),
}


@pytest.mark.parametrize("tear", TEARS)
def test_latest_passes_over_torn_checkpoints(tear, script, command, refused, out, uninterrupted, capsys):
    """The newest whole one is taken, and the torn one is named; asked for by its path, it is refused."""
    TEARS[tear](out / "checkpoint-3")
    flags = command(out, "--max_train_steps", 3, *RESUME)
    assert "not a whole checkpoint" in refused(*flags, out / "checkpoint-3")
    for name in ("checkpoint-best", "checkpoint-9.bak", "checkpoint-", ".checkpoint-8.tmp"):
        shutil.copytree(out / "checkpoint-1", out / name)
    capsys.readouterr()
    run(script, *flags, "latest")
    said = capsys.readouterr().out
    passed = [line for line in said.splitlines() if "not whole" in line]
    assert len(passed) == 1 and f"{out}/checkpoint-3" in passed[0]
    assert f"Resuming from {out}/checkpoint-2." in said
    assert_equal(out / "checkpoint-3", uninterrupted(3))
    assert same(weights(out / "unet"), weights(uninterrupted(3) / "unet_ema"))
    assert (out / "checkpoint-best").exists() and (out / "checkpoint-9.bak").exists() and litter(out) == []


def test_latest_starts_anew_where_all_are_torn(script, command, out, uninterrupted, capsys):
    """With nothing to resume from, the run starts at step 0 and says so."""
    for step in (1, 2, 3):
        (out / f"checkpoint-{step}" / "manifest.json").unlink()
    run(script, *command(out, "--max_train_steps", 2, *RESUME, "latest"))
    said = capsys.readouterr().out
    assert said.count("not whole") == 3 and "starting at step 0" in said
    assert_equal(out / "checkpoint-2", uninterrupted(2))


def test_the_limit_keeps_the_newest(script, command, tmp_path):
    """Of the checkpoints, as many as asked for stay; other folders that look like them stay as well."""
    out = tmp_path / "out"
    others = ["checkpoint-best", "checkpoint-0.old"]
    for name in others:
        (out / name).mkdir(parents=True)
    steps = ("--max_train_steps", 12, "--checkpointing_steps", 1, "--checkpoints_total_limit", 3)
    run(script, *command(out, *steps))
    assert whole_checkpoints(out) == [10, 11, 12]  # by number: 9 is no newer than 10
    assert sorted(p.name for p in out.glob("checkpoint-*")) == sorted(
        [*others, "checkpoint-10", "checkpoint-11", "checkpoint-12"]
    )


def test_a_folder_that_holds_a_run_is_refused(script, command, refused, out, uninterrupted):
    """The refusal names three ways out, and --overwrite_output_dir is one."""
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    said = refused(*command(out, "--max_train_steps", 1))
    assert all(way in said for way in ("--resume_from_checkpoint latest", "--overwrite_output_dir", "--output_dir"))
    assert "Traceback" not in said
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    (out / "checkpoint-best").mkdir()
    for stale in ("samples/step-009999.png", "unet/stale.safetensors", "notes.txt"):
        (out / stale).parent.mkdir(exist_ok=True)
        (out / stale).write_text("of the run before, or the user's own")
    run(script, *command(out, "--max_train_steps", 1, "--checkpointing_steps", 1, "--overwrite_output_dir"))
    assert whole_checkpoints(out) == [1] and (out / "checkpoint-best").exists() and (out / "notes.txt").exists()
    assert not (out / "samples" / "step-009999.png").exists() and not (out / "unet" / "stale.safetensors").exists()
    assert_equal(out / "checkpoint-1", uninterrupted(1))
    assert losses(out / "logs") == losses(uninterrupted(1))


def test_another_run_is_not_resumed(command, refused, out, pictures, tiny_model, tmp_path):
    """Another seed, base model, data set or caption is refused, in a sentence, and nothing is changed."""
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    flags = command(out, "--max_train_steps", 4, *RESUME, "latest")
    assert "--seed 7" in refused(*flags, "--seed", 8)

    model = shutil.copytree(tiny_model, tmp_path / "model")
    for part in ("vae", "text_encoder"):
        file = next((model / part).glob("*.safetensors"))
        good, tensors = file.read_bytes(), load_file(file)
        from safetensors.torch import save_file

        name = sorted(tensors)[0]
        save_file({**tensors, name: tensors[name] + 1e-3}, file, metadata={"format": "pt"})
        assert "another base model" in refused(*flags, "--pretrained_model_name_or_path", model)
        file.write_bytes(good)

    data = shutil.copytree(pictures, tmp_path / "pictures")
    captions = (data / "metadata.jsonl").read_text()
    (data / "metadata.jsonl").write_text(captions.replace("circle", "disc", 1))
    assert "another data set" in refused(*flags, "--train_data_dir", data)
    (data / "metadata.jsonl").write_text(captions.split("\n", 1)[1])
    (data / "000.png").unlink()
    assert "another data set" in refused(*flags, "--train_data_dir", data)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_base_that_predicts_something_else_is_not_resumed(command, refused, out, tiny_v_model):
    """The same weights with a scheduler for v are another base model: the loss would be another one."""
    flags = command(out, "--max_train_steps", 4, *RESUME, "latest")
    assert "another" in refused(*flags, "--pretrained_model_name_or_path", tiny_v_model)


def test_an_abandoned_end_is_not_mistaken_for_the_new_one(script, command, refused, out, tmp_path):
    """Going on before the newest checkpoint is refused where it is: `latest` would later find the old end."""
    flags = command(out, "--max_train_steps", 3, "--learning_rate", 1e-3, *RESUME)
    assert "checkpoint-3" in refused(*flags, "checkpoint-1") and whole_checkpoints(out) == [1, 2, 3]
    run(script, *flags, out / "checkpoint-1", "--output_dir", tmp_path / "branch")
    assert whole_checkpoints(tmp_path / "branch") == [2, 3] and whole_checkpoints(out) == [1, 2, 3]


def test_moved_files_are_the_same_run(script, command, out, pictures, tiny_model, uninterrupted, tmp_path):
    """Base model, pictures and checkpoint may move: what they hold counts, not where they are."""
    model = shutil.copytree(tiny_model, tmp_path / "elsewhere" / "model")
    data = shutil.copytree(pictures, tmp_path / "elsewhere" / "pictures")
    checkpoint = shutil.copytree(out / "checkpoint-2", tmp_path / "elsewhere" / "step two")
    moved = ("--pretrained_model_name_or_path", model, "--train_data_dir", data)
    run(script, *command(tmp_path / "new", "--max_train_steps", 4, *RESUME, f"{checkpoint}/", *moved))
    assert whole_checkpoints(tmp_path / "new") == [3, 4]
    assert_equal(tmp_path / "new" / "checkpoint-4", uninterrupted(4))


def test_changed_flags_are_listed_and_obeyed(script, command, out, capsys):
    """A resumed run says what has changed, and takes a new learning rate from its first step on."""
    shutil.rmtree(out / "checkpoint-3")  # else the run refuses to go back, as "latest" would mistake it
    changes = ("--learning_rate", 3e-3, "--max_grad_norm", 0.5, "--adam_weight_decay", 30.0)
    run(script, *command(out, "--max_train_steps", 4, *RESUME, "checkpoint-2", *changes))
    said = capsys.readouterr().out
    listed = set(re.findall(r"--(\w+) was (\S+) and is now (\S+)", said))
    changed = {("learning_rate", "0.0001", "0.003"), ("max_grad_norm", "1.0", "0.5"), ("max_train_steps", "3", "4")}
    changed.add(("adam_weight_decay", "0.01", "30.0"))
    assert {flag for flag in listed if flag[0] != "output_dir"} == changed
    assert metrics(out, "lr") == [(1, 1e-4), (2, 1e-4), (3, 3e-3), (4, 3e-3)]
    assert losses(out / "checkpoint-2") == losses(out / "logs")[:2]
    steps = [weights(out / f"checkpoint-{step}" / "unet") for step in (1, 2, 3)]
    moved = [max(float((b[name] - a[name]).abs().max()) for name in a) for a, b in zip(steps, steps[1:])]
    assert moved[1] > 10 * moved[0]  # Adam's steps are about as long as the learning rate
    sizes = [sum(float(tensor.abs().sum()) for tensor in step.values()) for step in steps]
    assert sizes[1] == pytest.approx(sizes[0], rel=1e-2) and sizes[2] < 0.95 * sizes[1]  # 1 - 3e-3 * 30


def test_an_ended_run_is_resumed_to_the_same_end(script, command, out, trained, uninterrupted):
    """Resuming after the end takes no step and leaves the same weights."""
    run(script, *command(out, "--max_train_steps", 3, *RESUME, "latest"))
    assert same(weights(out / "unet"), weights(trained / "unet"))
    assert losses(out / "logs") == losses(trained / "logs")
    assert_equal(out / "checkpoint-3", uninterrupted(3))


def test_a_checkpoint_loads_in_diffusers(trained):
    """The weights and their average are folders that diffusers loads as they are, and they differ."""
    parts = [UNet2DConditionModel.from_pretrained(trained / "checkpoint-3", subfolder=s) for s in ("unet", "unet_ema")]
    unet, averaged = (dict(part.named_parameters()) for part in parts)
    assert same(averaged, weights_by_name(trained / "unet")) and not same(unet, averaged)


def weights_by_name(folder):
    """The tensors of a model's folder, by name only."""
    return {name.split(":")[1]: tensor for name, tensor in weights(folder).items()}


# Launches.


@pytest.mark.launch
def test_rank_0_alone_writes(start, command, tmp_path):
    """Of two ranks one changes the output folder, and both draw the grids."""
    out = tmp_path / "out"
    flags = ("--max_train_steps", 2, "--checkpointing_steps", 1, "--checkpoints_total_limit", 1)
    flags += ("--validation_prompts", "red", "green", "blue", "--report_to", "tensorboard")
    ranks = start_ranks(functools.partial(start, watched=out), command(out, *flags), 2)
    assert [process.wait() for process in ranks] == [0, 0], ranks[0].output() + ranks[1].output()
    first, second = (Path(f"{process.log}.changes").read_text() for process in ranks)
    assert f"shutil.rmtree {out}/checkpoint-1\n" in first and f"{out}/unet/" in first
    assert second == ""
    assert re.search(r"sampling: .* 1/2 ", ranks[0].output())  # two of the three are its own


@pytest.mark.launch
@pytest.mark.skipif(torch.cuda.is_available(), reason="there, two processes know of each other")
def test_processes_that_do_not_know_of_each_other_are_refused(start, command, tmp_path):
    """Two lone runs in one folder are refused, with the command that makes them one run."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    process = start(command(tmp_path / "out", *LONG), launcher)
    assert process.wait() == 1
    assert "2 processes" in process.output() and "ACCELERATE_USE_CPU=true" in process.output()
    assert not (tmp_path / "out").exists()


@pytest.mark.launch
def test_fsdp_is_refused(start, command, tmp_path):
    """A launcher's FSDP, under which a save by one rank waits for ever, is refused before anything loads."""
    process = start(command(tmp_path / "out"), environment={"ACCELERATE_USE_FSDP": "true"})
    assert process.wait() == 1 and "FSDP is not supported" in process.output()
    assert not (tmp_path / "out").exists()
