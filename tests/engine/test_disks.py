"""Full disks: a run ends in one sentence, and what was saved before stays whole."""

import contextlib
import functools
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import ENDLESS, assert_equal, files_in, linux, litter, metrics, rows, start_ranks, whole_checkpoints
from PIL import Image
from safetensors.torch import load_file

import train_text_to_image as script


pytestmark = linux


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
@pytest.mark.parametrize("every", [3, 0])
def test_a_disk_that_something_else_fills(every, start, command, small_disk):
    """Where no row can be logged any more, the run ends in one sentence too, whether it writes checkpoints or not."""
    disk = small_disk(100)
    out = disk.here / "out"
    steps = ("--max_train_steps", 2000, "--checkpointing_steps", every)
    process = start(command(disk.there / "out", *steps), **disk.options)
    process.until(lambda: rows(out) >= 3 and whole_checkpoints(out) == ([3] if every else []))
    disk.leave(0)
    assert_says_so(process, disk.there / "out")
    assert whole_checkpoints(out) == ([3] if every else [])


@pytest.mark.launch
def test_a_full_disk_under_the_samples(start, command, tmp_path):
    """A row of pictures that does not fit ends the run in one sentence, and leaves no part of a picture."""
    out = tmp_path / "out"
    flags = command(out, "--max_train_steps", 2, "--validation_prompts", "a circle")
    process = start(flags, watched=out, trigger=(r"open .*/samples/", 1, ("limit", 4000)))
    assert_says_so(process, out)
    assert litter(out) == [] and list((out / "samples").iterdir()) == []


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
@pytest.mark.parametrize("kib", [pytest.param(40, marks=pytest.mark.slow), 120])
def test_a_full_cache(kib, start, command, small_disk, tmp_path):
    """A full cache folder ends the run in one sentence; the entries that fitted are whole."""
    disk = small_disk(10)
    disk.leave(kib / 1024)
    cache = disk.there / "cache"
    process = start(command(tmp_path / "out", *ENDLESS, "--encoding_cache_dir", cache), **disk.options)
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


def test_a_disk_without_room_for_any_result(train, monkeypatch):
    """A run that writes no checkpoint is refused at its start, too, if its result cannot fit."""
    full = SimpleNamespace(total=2**30, used=2**30, free=2**18)
    monkeypatch.setattr(script.shutil, "disk_usage", lambda path: full)
    with pytest.raises(SystemExit, match="The result needs .* GiB"):
        train("out", "--checkpointing_steps", 0)


@pytest.mark.parametrize("flags", [[], ["--use_ema"]])
def test_disk(train, monkeypatch, flags):
    """A run whose first checkpoint cannot fit on the disk is refused before its first step, and another is not."""
    output = train("out", *flags, "--checkpointing_steps", 1, "--max_train_steps", 1)
    flags = [*flags, "--checkpointing_steps", 500]
    size = sum(map(len, files_in(output / "checkpoint-1").values()))
    for factor, fits in ((0.9, False), (1.1, True)):
        disk = SimpleNamespace(total=10 * size, used=0, free=int(factor * size))
        monkeypatch.setattr(script.shutil, "disk_usage", lambda path, disk=disk: disk)
        if fits:
            assert len(metrics(train(f"fits-{fits}", *flags), "loss")) == 4
        else:
            with pytest.raises(SystemExit, match="checkpoint needs .* GiB"):
                train(f"fits-{fits}", *flags)
            assert not (output.parent / f"fits-{fits}" / "unet").exists()


@pytest.mark.launch
def test_a_full_disk_while_drawing(start, tiny_model, small_disk):
    """generate.py says so, too, and each picture that is there is whole."""
    disk = small_disk(1)
    disk.leave(0.05)
    words = ["--model", tiny_model, "--prompt", "a", "--num_images_per_prompt", 40, "--num_inference_steps", 1]
    words += ["--height", 32, "--width", 32, "--output_dir", disk.there / "out"]
    process = start(words, script="generate", **disk.options)
    assert_says_so(process, disk.there / "out")
    drawn = sorted((disk.here / "out" / "pictures").iterdir())
    assert 0 < len(drawn) < 40 and litter(disk.here) == []
    assert {Image.open(picture).convert("RGB").size for picture in drawn} == {(32, 32)}


@pytest.mark.launch
def test_drawing_on_disks_that_are_not_shared(start, tiny_model, small_disk, tmp_path):
    """If a machine does not see what another one drew, it says so, and the pictures stay."""
    disk = small_disk(10)
    words = ["--model", tiny_model, "--prompt", "a", "b", "--num_inference_steps", 1, "--height", 32, "--width", 32]
    words += ["--output_dir", disk.there / "out"]

    def begin(given, environment):
        own = disk.options if environment["RANK"] == "1" else {}
        return start(given, script="generate", environment=environment, **own)

    ranks = start_ranks(begin, words, 2)
    assert ranks[0].wait(60) == 1 and "1 pictures of other machines are not seen from here: take" in ranks[0].output()
    assert ranks[1].wait(60) in (0, 1)
    for out, name in ((disk.there, "00000-0.png"), (disk.here, "00001-0.png")):
        assert [file.name for file in (out / "out" / "pictures").iterdir()] == [name]
