"""Checkpoints are whole or not there: runs that are killed end as if nothing had happened."""

import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import forked
import pytest
from helpers import assert_equal, finish, linux, litter, losses, make_pictures, same, weights, whole_checkpoints


pytestmark = linux


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
def never_killed(server, killed_command, tmp_path_factory):
    """The output of that run, when nothing kills it."""
    folder = tmp_path_factory.mktemp("never-killed")
    assert forked.fork("train_text_to_image", killed_command(folder), folder / "log").wait() == 0
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
    renamed = [
        i for i, words in enumerate(changes) if words[0] == "os.rename" and words[2].startswith(f"{out}/checkpoint-")
    ]
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
