"""The tests' environment, and the fixtures that more than one file takes. Nothing here needs a network."""

import atexit
import json
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path


# Before any library reads it: no network, and no file in the user's caches.
CACHE = tempfile.mkdtemp(prefix="tests-cache-")
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
os.environ.update(
    HF_HOME=f"{CACHE}/huggingface",
    HF_HUB_OFFLINE="1",
    HYPOTHESIS_STORAGE_DIRECTORY=f"{CACHE}/hypothesis",
    TOKENIZERS_PARALLELISM="false",
    WANDB_MODE="offline",
    XDG_CACHE_HOME=CACHE,
)
for name in ("HF_DATASETS_CACHE", "HF_HUB_CACHE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
    os.environ.pop(name, None)
# A shell has its background jobs ignore this, and so would every launcher that the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):  # which nohup has them ignore
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

import forked
import pytest
import torch
from helpers import CACHED, ENVIRONMENT, ROOT, finish, flags_of, make_model, make_pictures, run
from hub_server import Hub
from PIL import Image, ImageOps


torch.set_num_threads(1)

SCRIPTS = ("train_text_to_image", "train_lora", "train_dreambooth", "textual_inversion", "train_unconditional")
SCRIPTS += ("train_controlnet", "train_instruct_pix2pix")


# Models.


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A tiny SD 1.x pipeline that predicts the noise."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_v_model(tiny_model) -> Path:
    """The same weights with an SD 2.x scheduler, which predicts v."""
    folder = shutil.copytree(tiny_model, tiny_model.with_name("tiny-v"))
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "v_prediction"}))
    return folder


@pytest.fixture(scope="session")
def tiny_sd2_model(tmp_path_factory) -> Path:
    """A tiny SD 2.x pipeline, which predicts v."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny-sd2", "sd2")


@pytest.fixture(scope="session")
def tiny_sdxl_model(tmp_path_factory) -> Path:
    """A tiny SDXL pipeline of two text encoders."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny-sdxl", "sdxl")


@pytest.fixture(scope="session")
def dropout_model(tiny_model) -> Path:
    """The tiny model with dropout in its UNet and text encoder, which draws from the global generator."""
    folder = shutil.copytree(tiny_model, tiny_model.with_name("tiny-dropout"))
    for part, name, value in (("unet", "dropout", 0.1), ("text_encoder", "attention_dropout", 0.2)):
        config = folder / part / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {name: value}))
    return folder


@pytest.fixture
def base(family, request) -> Path:
    """The tiny pipeline of a family, by which the test is parametrized."""
    return request.getfixturevalue(family)


# Pictures.


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """Six captioned pictures of 48 pixels."""
    return make_pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="session")
def five_pictures(tmp_path_factory) -> Path:
    """Five pictures, so that epochs end inside of steps and batches."""
    return make_pictures(tmp_path_factory.mktemp("data") / "five", count=5)


@pytest.fixture(scope="session")
def wide_pictures(tmp_path_factory) -> Path:
    """Five pictures that are wider than high, so that crops are drawn."""
    folder = make_pictures(tmp_path_factory.mktemp("data") / "wide", count=5)
    for file in folder.glob("*.[jp]*g"):
        Image.open(file).resize((72, 48)).save(file)
    return folder


@pytest.fixture(scope="session")
def subject(tmp_path_factory) -> Path:
    """Five pictures without captions."""
    folder = make_pictures(tmp_path_factory.mktemp("data") / "subject", count=5)
    (folder / "metadata.jsonl").unlink()
    return folder


@pytest.fixture(scope="session")
def classes(tmp_path_factory) -> Path:
    """Eight pictures of a class, other ones than the subject's."""
    folder = make_pictures(tmp_path_factory.mktemp("data") / "class", count=8)
    (folder / "metadata.jsonl").unlink()
    for file in folder.iterdir():
        ImageOps.flip(Image.open(file)).save(file)
    return folder


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Nothing is known of other tests' pictures: latents, embeddings and what was checked are in tmp_path / "xdg"."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


# Runs in this process.


@pytest.fixture
def trainer(tiny_model, pictures, tmp_path, monkeypatch):
    """trainer(script, *flags) returns what runs the script into a named folder, and returns the folder.

    The flags come after those of every small run, and a call's own after them, and later ones win.
    """

    def of(script, *flags):
        monkeypatch.setattr(script, "SAMPLER_STEPS", 2, raising=False)

        def train(name, *more, base=tiny_model):
            run(script, *flags_of(base, pictures, tmp_path / name, *flags, *more))
            return tmp_path / name

        return train

    return of


@pytest.fixture
def train(trainer):
    """train("out", *flags, base=...) runs train_text_to_image.py into a folder, which it returns."""
    import train_text_to_image

    return trainer(train_text_to_image)


@pytest.fixture(scope="session")
def plain_run(dropout_model, pictures, tmp_path_factory) -> Path:
    """One run of train_text_to_image.py with every kind of draw, which others are compared with."""
    import train_text_to_image

    out = tmp_path_factory.mktemp("plain") / "out"
    run(train_text_to_image, *flags_of(dropout_model, pictures, out, *CACHED))
    return out


# Runs as processes.


@pytest.fixture(scope="session")
def server():
    """The server that runs are forked from."""
    forked.start_server(*SCRIPTS)


@pytest.fixture
def start(server, tmp_path):
    """Starts processes that do not outlive the test: forked runs of a script, or a launcher's."""
    runs = []

    def begin(arguments, launcher=None, environment=None, script="train_text_to_image", **options):
        log = tmp_path / f"run-{len(runs)}.log"
        if launcher is None:
            runs.append(forked.fork(script, arguments, log, environment=environment, **options))
        else:
            words = [*map(str, launcher), f"{ROOT}/{script}.py", *map(str, arguments)]
            settings = {"env": {**ENVIRONMENT, **(environment or {})}, "start_new_session": True, **options}
            with open(log, "w") as out:
                process = subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT, **settings)
            runs.append(forked.Run(process, log))
        return runs[-1]

    yield begin
    for process in runs:
        process.end()


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """A folder for latents and embeddings that runs share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def command(tiny_model, pictures, cache):
    """Returns the flags of a small run of train_text_to_image.py with an average; later flags win."""

    def flags(output_dir, *more):
        data = ["--pretrained_model_name_or_path", tiny_model, "--train_data_dir", pictures, "--resolution", 48]
        data += ["--center_crop", "--random_flip", "--encoding_cache_dir", cache, "--output_dir", output_dir]
        return [*data, "--train_batch_size", 2, "--use_ema", "--seed", 7, "--report_to", "none", *more]

    return flags


@pytest.fixture(scope="session")
def uninterrupted(server, command, tmp_path_factory):
    """Returns checkpoint-<step> of a run, on one process or more, that nothing stopped."""
    made = {}

    def checkpoint(step, ranks=1):
        length = -(-step // 10) * 10
        if (length, ranks) not in made:
            folder = tmp_path_factory.mktemp("uninterrupted")
            counter = iter(range(ranks))

            def start(arguments, environment=None):
                log = folder / f"{next(counter)}.log"
                return forked.fork("train_text_to_image", arguments, log, environment=environment)

            arguments = command(folder / "out", "--max_train_steps", length, "--checkpointing_steps", 1)
            finish(start, arguments, ranks)
            made[length, ranks] = folder / "out"
        return made[length, ranks] / f"checkpoint-{step}"

    return checkpoint


# The Hub.


@pytest.fixture
def hub(monkeypatch):
    """A Hub on the loopback, for this process and, with env=hub.env, for others."""
    import datasets
    from huggingface_hub import constants, hf_api

    with Hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(hf_api.api, "endpoint", server.url)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.url)
        for settings in (constants, datasets.config):
            monkeypatch.setattr(settings, "HF_HUB_OFFLINE", False)
        yield server
