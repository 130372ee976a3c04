"""Stopping works: a signal, to whichever process, ends a run with a checkpoint from which it goes on."""

import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import psutil
import pytest
from diffusers import UNet2DConditionModel
from helpers import (
    ENDLESS,
    assert_equal,
    finish,
    linux,
    litter,
    make_pictures,
    rows,
    same,
    start_ranks,
    weights,
    whole_checkpoints,
)
from safetensors.torch import load_file

import train_text_to_image as script


pytestmark = linux
BIN = Path(sys.executable).parent


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


@pytest.mark.launch
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_process_that_waits_for_others_can_be_stopped(name, start, command, tmp_path):
    """One whose peers never start is stopped by a signal, though it waits inside of torch."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    world |= {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    process = start(command(tmp_path / "out"), environment=world)
    process.until(lambda: port in {one.laddr.port for one in psutil.Process(process.pid).net_connections()})
    time.sleep(0.5)  # by then it waits
    os.kill(process.pid, getattr(signal, name))
    assert process.wait(20) != 0 and not (tmp_path / "out").exists()


@pytest.mark.launch
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_a_signal_ends_a_run_with_a_checkpoint(name, start, command, goes_on, tmp_path):
    """The step is finished, a checkpoint written, the exit code 128 + signal, and the run can go on."""
    signum = getattr(signal, name)
    process = start(command(tmp_path / "out", *ENDLESS))
    process.until(lambda: rows(tmp_path / "out") >= 2)
    os.kill(process.pid, signum)
    assert process.wait(30) == 128 + signum, process.output()
    said = process.output()
    assert "Traceback" not in said
    step = goes_on(tmp_path / "out")
    assert step >= 2 and f"Stopped after step {step}, and saved: --resume_from_checkpoint latest goes on." in said


def test_nohup_is_obeyed():
    """A terminal that closes does not stop a run that was started to outlive it."""
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    others = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        stop = script.StopFlag()
        stop.listen()
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.signum == 0
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        stop = script.StopFlag()
        stop.listen()
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.signum == signal.SIGHUP
    finally:
        for number, former in {**others, signal.SIGHUP: handler}.items():
            signal.signal(number, former)


def test_a_shell_is_no_launcher(monkeypatch):
    """What is started without accelerate's launcher outlives its parent, whatever stands in the environment."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    handlers = {name: signal.getsignal(getattr(signal, name)) for name in script.STOP_SIGNALS}
    asked, PR_GET_PDEATHSIG = ctypes.c_int(-1), 2
    try:
        script.StopFlag().listen()
    finally:
        for name, handler in handlers.items():
            signal.signal(getattr(signal, name), handler)
    ctypes.CDLL(None).prctl(PR_GET_PDEATHSIG, ctypes.byref(asked))
    assert asked.value == 0


@pytest.mark.launch
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_download_can_be_stopped(start, command, tmp_path, name):
    """A base that comes slowly from the Hub does not keep a signal waiting."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hub = {"HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}", "HF_HUB_OFFLINE": "0"}
        base = ("--pretrained_model_name_or_path", "me/model")
        process = start(command(tmp_path / "out", *base), [sys.executable], hub)
        silent.settimeout(60)
        connection, _ = silent.accept()
        time.sleep(0.5)
        os.kill(process.pid, getattr(signal, name))
        assert process.wait(5) == 128 + getattr(signal, name)
        connection.close()


# Through launchers.


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
    process = start(command(tmp_path / "out", *ENDLESS), launcher)
    process.until(lambda: rows(tmp_path / "out") >= 2)
    (child,) = psutil.Process(process.pid).children()
    (os.killpg if to_group else os.kill)(process.pid, signum)
    assert process.wait(30) in (-signum, 128 + signum)
    # An orphan takes its launcher's end for a SIGTERM, which may meet it as Python shuts down, all work done.
    codes = {143, -signal.SIGTERM} | ({128 + signum} if to_group else set())
    assert wait_for_orphan(child.pid) in codes, process.output()
    goes_on(tmp_path / "out")


@pytest.mark.launch
@pytest.mark.parametrize("to_group", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_signal_to_torchrun(to_group, start, command, goes_on, tmp_path):
    """Both ranks stop at the same step, well within the 30 s that torchrun gives them."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    process = start(command(tmp_path / "out", *ENDLESS), launcher, environment={"ACCELERATE_USE_CPU": "true"})
    process.until(lambda: rows(tmp_path / "out") >= 2)
    (os.killpg if to_group else os.kill)(process.pid, signal.SIGTERM)
    assert process.wait(25) == 1, process.output()  # torchrun's way
    goes_on(tmp_path / "out", ranks=2)


@pytest.mark.launch
@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_signal_to_one_rank_ends_both(rank, start, command, goes_on, tmp_path):
    """Whichever rank is told to stop, both finish the same step and exit with 128 + signal."""
    ranks = start_ranks(start, command(tmp_path / "out", *ENDLESS), 2)
    ranks[0].until(lambda: rows(tmp_path / "out") >= 2)
    os.kill(ranks[rank].pid, signal.SIGTERM)
    assert [process.wait(30) for process in ranks] == [143, 143], ranks[0].output() + ranks[1].output()
    goes_on(tmp_path / "out", ranks=2)


@pytest.mark.launch
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda signum: signum.name)
def test_a_signal_to_the_group_spares_the_loader(signum, start, command, goes_on, tmp_path):
    """Worker processes that get the signal too do not take the run with them."""
    workers = ("--dataloader_num_workers", 2)
    process = start(command(tmp_path / "out", *ENDLESS, *workers))
    process.until(lambda: rows(tmp_path / "out") >= 2)
    assert len(psutil.Process(process.pid).children()) == 2
    os.killpg(process.pid, signum)
    assert process.wait(30) == 128 + signum, process.output()
    goes_on(tmp_path / "out", flags=workers)


@pytest.mark.launch
@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
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
def test_an_interrupt_after_another_signal_stops_at_once(start, command, tmp_path):
    """Ctrl-C does not wait for the step that SIGTERM lets finish."""
    flags = ("--max_train_steps", 20, "--gradient_accumulation_steps", 2000)
    process = start(command(tmp_path / "out", *flags))
    process.until(lambda: "training" in process.output())
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(15) != 143, process.output()
    assert list((tmp_path / "out").glob("*checkpoint*")) == []


@pytest.mark.launch
def test_a_crash_does_not_wait_for_the_loader(start, command, pictures, tmp_path):
    """Workers that ignore SIGTERM do not keep a run alive that an error has ended."""
    data = shutil.copytree(pictures, tmp_path / "pictures")
    flags = ("--dataloader_num_workers", 2, "--no_encoding_cache", "--train_data_dir", data)
    process = start(command(tmp_path / "out", *ENDLESS, *flags), launcher=[sys.executable])
    process.until(lambda: rows(tmp_path / "out") >= 1)
    shutil.rmtree(data)
    assert process.wait(20) == 1, process.output()
    assert "No such file" in process.output()


@pytest.mark.launch
def test_a_loader_process_that_is_killed(start, command, tmp_path):
    """As by a machine that is out of memory: the run ends in a sentence."""
    process = start(command(tmp_path / "out", *ENDLESS, "--dataloader_num_workers", 2))
    process.until(lambda: rows(tmp_path / "out") >= 2)
    psutil.Process(process.pid).children()[0].kill()
    assert process.wait(20) == 1, process.output()
    said = process.output()
    assert f"The run failed for {tmp_path / 'out'}" in said and "is killed by signal" in said
    assert "Traceback" not in said


# Outside of training.


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
    process = start(command(tmp_path / "out", *ENDLESS, *flags))
    process.until(lambda: re.search(r"checking: .* [1-9]\d*/1200", process.output()))
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(10) == 143, process.output()
    assert "Traceback" not in process.output() and not (cache / "latents").exists()
    (known,) = [json.loads(path.read_text().splitlines()[1]) for path in (cache / "checked").iterdir()]
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
        runs = start_ranks(start, command(tmp_path / "out", *ENDLESS, *flags), ranks)
        runs[0].until(lambda: len(entries()) >= len(kept) + 4)  # noqa: B023
        os.kill(runs[-1].pid, signal.SIGINT)
        assert [process.wait(10) for process in runs] == [130] * ranks, runs[0].output()
        assert kept.items() <= entries().items()  # none was computed again
        kept = entries()
        assert len(kept) < 300 and litter(cache) == []
        assert all(load_file(path)["mean"].shape == (4, 128, 128) for path in kept)
    assert list((tmp_path / "out").glob("*checkpoint*")) == []


@pytest.mark.launch
@pytest.mark.parametrize("last", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_validation_that_is_cut_short_is_made_up_for(last, start, command, tmp_path):
    """The run that goes on has the rows and pictures of one that was never stopped."""
    prompts = ("--validation_prompts", *(f"a circle {i}" for i in range(4)), "--validation_samples", 2)
    steps = ("--max_train_steps", 2 if last else 3, "--validation_steps", 2, "--checkpointing_steps", 0)
    flags = (*prompts, *steps, "--resume_from_checkpoint", "latest")
    out = tmp_path / "out"
    process = start(command(out, *flags))
    process.until(lambda: rows(out) >= 3 and re.search(r"sampling: [^\n]* [1-3]/4", process.output()[-300:]))
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(30) == 143, process.output()
    assert not (out / "state.json").exists() and whole_checkpoints(out) == [2]
    finish(start, command(out, *flags))
    finish(start, command(tmp_path / "whole", *flags))
    kept = [json.loads(line) for line in (tmp_path / "whole" / "logs" / "metrics.jsonl").read_text().splitlines()]
    made = [json.loads(line) for line in (out / "logs" / "metrics.jsonl").read_text().splitlines()]
    values = [[(row["step"], row.get("loss"), row.get("validation_loss")) for row in found] for found in (kept, made)]
    assert values[0] == values[1]
    names = [sorted(file.name for file in (folder / "samples").iterdir()) for folder in (out, tmp_path / "whole")]
    assert names[0] == names[1]


@pytest.mark.launch
def test_a_signal_while_sampling(start, command, uninterrupted, tmp_path):
    """Validation ends, half a grid is not kept, and the run goes on well."""
    prompts = ("--validation_prompts", *(f"a circle {i}" for i in range(300)))
    process = start(command(tmp_path / "out", *ENDLESS, *prompts))
    process.until(lambda: re.search(r"sampling: .* [1-9]\d*/300", process.output()))
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(15) == 143, process.output()
    assert list((tmp_path / "out" / "samples").glob("*.png")) == []
    more = ("--max_train_steps", 3, "--checkpointing_steps", 1, "--resume_from_checkpoint", "latest")
    finish(start, command(tmp_path / "out", *more))
    assert_equal(tmp_path / "out" / "checkpoint-3", uninterrupted(3))


@pytest.mark.parametrize("at, last, later", [(1, 1, 4 + 2 + 4), (5, 6, 4)])  # passes of a picture and of a step
def test_a_signal_gives_up_a_picture(train, monkeypatch, at, last, later):
    """A picture can take minutes, so it is given up before the next forward pass; a step is finished."""
    forward, passes = UNet2DConditionModel.forward, []

    def forward_with_signal(*args, **kwargs):
        passes.append(1)
        if len(passes) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(*args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", forward_with_signal)
    flags = ("--max_train_steps", 1, "--validation_prompt", "a circle", "--num_validation_images", 2)
    flags += ("--gradient_accumulation_steps", 2)
    with pytest.raises(SystemExit) as end:
        train("out", *flags)
    assert end.value.code == 143 and len(passes) == last
    out = train("out", *flags, "--resume_from_checkpoint", "latest")
    assert len(passes) == last + later
    assert len(list((out / "samples").iterdir())) == 2
