"""One run at a time works in an output folder, and a process that was killed keeps nobody out."""

import os
import shutil
import signal

import pytest
from filelock import FileLock
from helpers import ENDLESS, finish, linux, metrics, rows, run, whole_checkpoints

import train_text_to_image as script


pytestmark = [linux, pytest.mark.launch]


@pytest.mark.parametrize("flags", [("--resume_from_checkpoint", "latest"), ("--overwrite_output_dir",)])
def test_a_second_run_is_refused(flags, start, command, tmp_path, capsys):
    """It is told so in a sentence, before it changes anything, and the first goes on."""
    out = tmp_path / "out"
    first = start(command(out, *ENDLESS))
    first.until(lambda: rows(out) >= 2)
    with pytest.raises(SystemExit, match=f"Another run is at work in {out}: "):
        run(script, *command(out, "--max_train_steps", 3, *flags))
    assert "starting at step 0" not in capsys.readouterr().out  # it has looked for nothing yet
    taken = rows(out)
    first.until(lambda: rows(out) > taken)
    os.kill(first.pid, signal.SIGTERM)
    assert first.wait(30) == 143 and len(whole_checkpoints(out)) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_keeps_nobody_out(workers, start, command, tmp_path):
    """Nor do its loader's processes, which live on for seconds."""
    out = tmp_path / "out"
    flags = ("--dataloader_num_workers", workers)
    killed = start(command(out, *ENDLESS, *flags))
    killed.until(lambda: rows(out) >= 2)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait(10)
    finish(start, command(out, "--max_train_steps", 2, *flags, "--resume_from_checkpoint", "latest"))


def test_a_disk_without_locks(train, monkeypatch, capsys):
    """The run goes on there, and says what it cannot see to."""

    def acquire(lock, timeout):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(FileLock, "acquire", acquire)
    out = train("out", "--max_train_steps", 1)
    assert rows(out) == 1 and f"{out} cannot be locked" in capsys.readouterr().out


def test_a_run_that_has_ended_keeps_nobody_out(train):
    """Further runs of one process take the folder one after the other."""
    out = train("out", "--max_train_steps", 1, "--checkpointing_steps", 1)
    with pytest.raises(SystemExit, match="cannot go on with"):
        train("out", "--seed", 8, "--resume_from_checkpoint", "latest")
    train("out", "--max_train_steps", 2, "--resume_from_checkpoint", "latest")
    assert rows(out) == 2


@pytest.mark.launch
def test_a_run_whose_folder_becomes_anothers_ends(start, command, train, tmp_path):
    """If its folder is removed, and made by another run, neither writes into the other's."""
    out = tmp_path / "out"
    process = start(command(out, *ENDLESS))
    process.until(lambda: rows(out) >= 2)
    shutil.rmtree(out)
    train("out", "--checkpointing_steps", 2)
    assert process.wait(60) == 1 and "was removed and is another run's by now" in process.output()
    assert whole_checkpoints(out) == [2, 4] and len(metrics(out, "loss")) == 4
