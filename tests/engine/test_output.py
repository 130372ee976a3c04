"""Output never ends a run: not a terminal or pipe that is gone, a full disk under a log, or an encoding."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers import ENDLESS, ENVIRONMENT, ROOT, linux, rows, whole_checkpoints

import train_text_to_image as script


pytestmark = [linux, pytest.mark.launch]
BIN = Path(sys.executable).parent
SCRIPT = f"{sys.executable} {ROOT}/train_text_to_image.py"
LAUNCHER = f"{BIN}/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"
LAUNCHER += f" --num_cpu_threads_per_process 1 {ROOT}/train_text_to_image.py"


@pytest.fixture
def shell(tmp_path):
    """Starts a line of bash in a group of its own, which does not outlive the test."""
    started = []

    def begin(line, arguments, environment=None, **options):
        words = " ".join(f"'{word}'" for word in map(str, arguments))
        line = f"set -o pipefail; {line.format(words)}"
        settings = {"cwd": tmp_path, "env": {**ENVIRONMENT, **(environment or {})}, "start_new_session": True}
        settings |= options
        started.append(subprocess.Popen(["bash", "-c", line], **settings))
        return started[-1]

    yield begin
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def until(condition, timeout=120):
    """Waits until something holds."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("launcher", [SCRIPT, LAUNCHER], ids=["script", "accelerate launch"])
@pytest.mark.parametrize("pipe", ["2>&1 | tee log", pytest.param("| tee log", marks=pytest.mark.slow)])
def test_an_interrupt_under_tee(pipe, launcher, shell, command, tmp_path):
    """Ctrl-C, which ends tee as well, leaves a checkpoint of the step at hand and the code 130."""
    out = tmp_path / "out"
    process = shell(f"{launcher} {{}} {pipe}", command(out, *ENDLESS))
    until(lambda: rows(out) >= 2 or process.poll() is not None)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) in (130, -signal.SIGINT), (tmp_path / "log").read_text()  # as a shell shows either
    until(lambda: whole_checkpoints(out) or not alive(process.pid), 30)
    (step,) = whole_checkpoints(out)
    assert step >= 2 and rows(out) == step


def alive(group):
    """Whether any process of a group is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, 0)
        return True
    return False


GONE = ["2>&1 | true", ">&- 2>&-", "> /dev/full 2>&1"]
GONE += [pytest.param(pipe, marks=pytest.mark.slow) for pipe in ("| true", "2>&1 | head -c 10")]


@pytest.mark.parametrize("pipe", GONE)
def test_a_reader_that_is_gone(pipe, shell, command, tmp_path):
    """A run whose output nobody takes ends as others do."""
    out = tmp_path / "out"
    process = shell(f"{SCRIPT} {{}} {pipe}", command(out, "--max_train_steps", 3, "--checkpointing_steps", 2))
    assert process.wait(60) == 0
    assert whole_checkpoints(out) == [2] and rows(out) == 3 and (out / "model_index.json").exists()


def at_once(path, flags):
    """Opens a file so that writing to it does not wait."""
    return os.open(path, flags | os.O_NONBLOCK)


def test_a_reader_that_pauses(shell, command, tmp_path):
    """A run waits for it, as programs do, but not once it is told to stop."""
    out = tmp_path / "out"
    ends = os.pipe()
    line = f"exec {SCRIPT} {{}} >&{ends[1]} 2>&{ends[1]}"
    process = shell(line, command(out, *ENDLESS), pass_fds=ends[1:])
    until(lambda: rows(out) >= 2)
    with open(f"/proc/self/fd/{ends[1]}", "wb", 0, opener=at_once) as pipe:
        while pipe.write(b"x"):  # until it is full
            pass
    os.close(ends[1])
    taken = -1
    while rows(out) > taken:
        taken = rows(out)
        time.sleep(1.5)
    process.terminate()
    assert process.wait(30) == 143
    os.close(ends[0])
    assert len(whole_checkpoints(out)) == 1


def test_a_long_text_for_a_reader_that_pauses():
    """It is written as the reader takes it, and not to its end once the run is told to stop."""
    stop = script.StopFlag()
    ends = os.pipe()
    output = script.Output(open(ends[1], "w"), stop)
    threading.Timer(1, stop.set, (signal.SIGTERM, None)).start()
    assert output.write("x" * 200_000) == 200_000
    output.flush()
    assert stop.signum == signal.SIGTERM
    os.close(ends[0])


@pytest.mark.parametrize("encoding", ["ascii", pytest.param("cp1252", marks=pytest.mark.slow)])
def test_an_encoding_that_lacks_letters(encoding, shell, command, tmp_path):
    """A prompt that the terminal cannot show is printed in other letters, and kept as it is."""
    out = tmp_path / "out"
    prompts = ("--validation_prompts", "a café in 東京", "--validation_steps", 100)
    process = shell(
        f"{SCRIPT} {{}} > log 2>&1",
        command(out, "--max_train_steps", 1, *prompts),
        {"PYTHONIOENCODING": encoding},
    )
    assert process.wait(60) == 0, (tmp_path / "log").read_bytes()
    assert "a café in 東京" in (out / "README.md").read_text(encoding="utf-8")
    assert "\\u6771" in (tmp_path / "log").read_text(encoding=encoding)
