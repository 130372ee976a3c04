"""What is uploaded, what is kept secret, and what the trackers get."""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from helpers import ROOT, SMALL, files_in, flags_of, in_epochs, make_run, metrics, rows, run, same, weights
from huggingface_hub import ModelCard
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_lora
import train_text_to_image as script


TOKEN = "hf_" + "s3cret" * 5
FAST = ("--resolution", 16, "--train_batch_size", 1, "--no-center_crop", "--learning_rate", 1e-4)
FAST += ("--max_train_steps", 2, "--checkpointing_steps", 500, "--report_to", "tensorboard")
PROMPTS = ["a red circle", "a green square", 'it\'s a "blue" one']


@pytest.fixture
def train(trainer):
    """Trains a little."""
    return trainer(script, *FAST)


@pytest.fixture(scope="module")
def finished(tiny_model, pictures, tmp_path_factory):
    """A run of 5 steps that was gone on with from its checkpoint at step 3, up to step 6; and what it said."""
    output = tmp_path_factory.mktemp("finished") / "out"
    flags = [
        *flags_of(tiny_model, pictures, output, *FAST),
        "--validation_prompts",
        *PROMPTS,
        "--validation_samples",
        2,
        "--validation_steps",
        2,
        "--use_ema",
    ]
    flags += ["--learning_rate", 0.01, "--checkpointing_steps", 3]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        run(script, *flags, "--max_train_steps", 5)
        run(script, *flags, "--max_train_steps", 6, "--resume_from_checkpoint", "latest")
    return SimpleNamespace(output=output, said=said.getvalue())


@pytest.fixture
def waits(monkeypatch):
    """The seconds that anything would have waited, without waiting."""
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    return waits


def published(output):
    """The files of an output folder that are for others."""
    private = (".lock", "checkpoint-", "logs/", "state.json", "train_args.yaml")
    return {name: data for name, data in files_in(output).items() if not name.startswith(private)}


def run_code(text, folder, monkeypatch):
    """Runs the Python lines of a text in a folder; returns the picture that they save."""
    code = re.search(r"^from diffusers .*?\.save\('picture.png'\)$", text, re.DOTALL | re.MULTILINE)[0]
    monkeypatch.chdir(folder)
    exec(code, {})
    with Image.open(folder / "picture.png") as image:
        return image.copy()


# Uploading.


def test_push(hub, train, pictures, tiny_model, tmp_path, monkeypatch):
    """What is for others is uploaded, private as asked, and names neither the token nor this machine's paths."""
    flags = ["--push_to_hub", "--hub_model_id", "me/named", "--hub_token", TOKEN, "--hub_private_repo"]
    flags += ["--validation_prompts", *PROMPTS, "--checkpointing_steps", 1]
    output = train("out", *flags)
    assert list(hub.repos) == ["me/named"] and hub.repos["me/named"]["private"]
    uploaded = hub.repos["me/named"]["files"]
    assert uploaded == published(output)
    parts = {"text_encoder", "unet", "vae", "scheduler", "tokenizer", "samples", "model_index.json", "README.md"}
    assert {name.split("/")[0] for name in uploaded} == parts
    assert {name.split(".")[-1] for name in uploaded} == {"safetensors", "json", "md", "png", "txt"}
    for secret in (TOKEN, str(tmp_path), str(pictures), str(tiny_model), str(ROOT), str(Path.home()), "/tmp"):
        assert [name for name, data in uploaded.items() if secret.encode() in data] == []
    calls = [
        (path, str(headers)) for _, path, headers, _ in hub.requests if path.startswith(("/api/repos", "/api/mod"))
    ]
    assert len(calls) >= 3 and all(f"Bearer {TOKEN}" in headers for _, headers in calls)
    assert uploaded["README.md"].count(b"me/named") == 2
    assert run_code(uploaded["README.md"].decode(), tmp_path, monkeypatch).size == (16, 16)


def test_push_again(hub, train):
    """The repository is named after the output folder and public by default; a second run replaces its files."""
    train("out", "--push_to_hub", "--hub_token", TOKEN)
    first = dict(hub.repos["me/out"]["files"])
    assert list(hub.repos) == ["me/out"] and not hub.repos["me/out"]["private"]
    output = train("out", "--push_to_hub", "--hub_token", TOKEN, "--overwrite_output_dir", "--seed", 2)
    assert hub.repos["me/out"]["files"] == published(output) != first


@pytest.mark.parametrize("logging_dir", ["tracks", "logs/", "./logs", "logs/deep"])
def test_logs_stay(hub, train, logging_dir):
    """Logs are not uploaded, however their folder is written."""
    train("out", "--push_to_hub", "--hub_token", TOKEN, "--logging_dir", logging_dir)
    names = {*hub.repos["me/out"]["files"]}
    assert "README.md" in names and not {name for name in names if "metrics" in name or "events" in name}


@pytest.mark.parametrize(
    "request_, status",
    [("repos/create", 503), ("validate-yaml", 429), ("preupload", 503), ("commit", 429), ("commit", 503)],
)
def test_passing_failure(hub, train, waits, request_, status):
    """A request that fails twice is made again."""
    hub.fail = [[f"POST /api/.*{request_}", 2, status]]
    output = train("out", "--push_to_hub", "--hub_token", TOKEN)
    assert hub.fail[0][1] == 0 and len(waits) >= 2
    assert hub.repos["me/out"]["files"] == published(output)


@pytest.mark.parametrize("request_", ["preupload", "commit"])
def test_lasting_failure(hub, train, waits, tmp_path, request_):
    """After an upload that never succeeds, the result is whole, and the command that is named uploads it."""
    hub.fail = [[f"POST /api/.*{request_}", 10**6, 500]]
    with pytest.raises(SystemExit) as end:
        train("my folder/out", "--push_to_hub", "--hub_token", TOKEN, "--checkpointing_steps", 1)
    said = end.value.code
    assert isinstance(said, str) and TOKEN not in said  # a text means exit status 1
    assert len(waits) < 60
    output = tmp_path / "my folder" / "out"
    StableDiffusionPipeline.from_pretrained(str(output))
    hub.fail = []
    command = shlex.split(re.search(r"hf upload .*", said)[0])
    subprocess.run([Path(sys.executable).parent / command[0], *command[1:]], env=hub.env, check=True, timeout=60)
    assert hub.repos["me/out"]["files"] == published(output)


@pytest.mark.parametrize("status", [401, 403])
def test_wrong_token(hub, train, waits, tmp_path, monkeypatch, status):
    """A token that the Hub refuses is said at once, before any work."""
    for name in ("read_records", "load_models"):
        monkeypatch.setattr(script, name, lambda *args: pytest.fail("works before it asks the Hub"))
    hub.fail = [["POST /api/repos/create", 10**6, status]]
    with pytest.raises(SystemExit, match="out on the Hub: .*"):
        train("out", "--push_to_hub", "--hub_token", TOKEN)
    assert [path for _, path, _, _ in hub.requests].count("/api/repos/create") == 1 and waits == []


def test_wrong_name(hub, train, waits, monkeypatch):
    """A name that no repository can have is said at once, before any work."""
    monkeypatch.setattr(script, "load_models", lambda *args: pytest.fail("loads models before it asks the Hub"))
    with pytest.raises(SystemExit, match="me/a model"):
        train("out", "--push_to_hub", "--hub_token", TOKEN, "--hub_model_id", "me/a model")
    assert waits == []


# Secrets.


@pytest.mark.launch
def test_token_is_nowhere(hub, tiny_model, pictures, tmp_path):
    """A token on the command line is in no file of any tracker, checkpoint, log or upload, nor is it printed."""
    command = ["train_text_to_image.py", *flags_of(tiny_model, pictures, "out", *FAST), "--push_to_hub"]
    command += [
        "--report_to",
        "all",
        "--max_train_steps",
        "1",
        "--checkpointing_steps",
        "1",
        "--hub_token",
        TOKEN,
        f"--hub_token={TOKEN}",
    ]
    shutil.copy(ROOT / "train_text_to_image.py", tmp_path)
    settings = {"cwd": tmp_path, "env": {**hub.env, "WANDB_DIR": str(tmp_path)}, "timeout": 120}
    done = subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True, **settings)
    files = files_in(tmp_path)
    kinds = (".wandb", "tfevents")
    assert all(any(kind in name for name in files) for kind in kinds), [*files, done.stdout, done.stderr]
    assert b"--report_to" in b"".join(data for name, data in files.items() if name.endswith(".wandb"))
    found = [name for name, data in {**files, **hub.repos["me/out"]["files"]}.items() if TOKEN.encode() in data]
    assert found == [] and TOKEN not in done.stdout + done.stderr
    assert all(TOKEN in str(headers) for _, _, headers, _ in hub.requests)


# Trackers.


def test_report_none(train):
    """Without a tracker there is metrics.jsonl, with every step's numbers, and nothing else in the logs."""
    output = train("out", "--report_to", "none", "--learning_rate", 0.5)
    assert [file.name for file in (output / "logs").iterdir()] == ["metrics.jsonl"]
    rows = [json.loads(line) for line in (output / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row.keys() == {"step", "loss", "lr", "grad_norm", "images_per_second", "memory_gib"}
        assert row["lr"] == 0.5 and all(value > 0 for value in row.values())
        assert 0.05 < row["memory_gib"] < 20


def test_tensorboard(finished):
    """Tensorboard shows each step once, also those that a run logged again after resuming, and the grids' pictures."""
    (folder,) = (finished.output / "logs").glob("*/")
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()
    names = ("loss", "lr", "grad_norm", "images_per_second", "memory_gib")
    expected = {**dict.fromkeys(names, [1, 2, 3, 4, 5, 6]), "validation_loss": [0, 2, 4, 6]}
    seconds = {"checkpoint_seconds": [3, 6]}  # of which metrics.jsonl has those since the last resume
    found = {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found == {**expected, **seconds}
    for tag in expected:
        logged = metrics(finished.output, tag)
        assert np.allclose(logged, [(event.step, event.value) for event in events.Scalars(tag)], rtol=1e-6)
    assert [event.step for event in events.Images("validation")] == [0, 2, 4, 6]
    for event in events.Images("validation"):
        with Image.open(io.BytesIO(event.encoded_image_string)) as image:
            assert image.size == (16 * len(PROMPTS), 16)


@pytest.mark.launch
@pytest.mark.parametrize("flags", [("wandb",), ("tensorboard", "--tracker_project_name", "x" * 300)])
def test_a_tracker_that_cannot_start_is_told_of(flags, start, command, tmp_path):
    """One without a login, or whose folder cannot be made, ends the run in a sentence."""
    alone = {"WANDB_MODE": "online", "HOME": str(tmp_path), "WANDB_API_KEY": ""}
    process = start(command(tmp_path / "out", "--report_to", *flags), environment=alone)
    assert process.wait() == 1 and "Traceback" not in process.output()
    assert re.search(f"--report_to {flags[0]} cannot start|start_trackers failed", process.output())
    assert "the run goes on" not in process.output()


@pytest.mark.launch
def test_a_tracker_that_dies_ends_no_run(start, command, tmp_path):
    """Its process may be killed for its memory: the run goes on, and says that metrics.jsonl has all numbers."""
    out = tmp_path / "out"
    process = start(command(out, "--report_to", "wandb", "--max_train_steps", 40))
    process.until(lambda: rows(out) > 2)
    killed = [child for child in psutil.Process(process.pid).children(recursive=True) if "wandb" in child.name()]
    for child in killed:
        child.kill()
    assert killed and process.wait() == 0, process.output()
    assert "--report_to wandb failed" in process.output() and (out / "state.json").exists()
    assert [step for step, _ in metrics(out, "loss")] == list(range(1, 41))


def test_wandb(train, monkeypatch):
    """Weights & Biases keeps its files among the logs, and a resumed run goes on with the same one."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    flags = ["--report_to", "wandb", "--checkpointing_steps", 1, "--validation_prompts", "x"]
    train("out", *flags)
    output = train("out", *flags, "--max_train_steps", 3, "--resume_from_checkpoint", "latest")
    runs = sorted((output / "logs" / "wandb").glob("offline-run-*"))
    state = json.loads((output / "checkpoint-3" / "state.json").read_text())
    assert [folder.name.split("-")[3] for folder in runs] == [state["tracker_id"]] * 2
    images = [file.name.split("_")[1] for folder in runs for file in sorted(folder.rglob("media/images/*.png"))]
    assert images == ["0", "2", "3"]
    assert b"learning_rate" in (runs[0] / f"run-{state['tracker_id']}.wandb").read_bytes()
    assert not (ROOT / "wandb").exists() and not Path("wandb").exists()


@pytest.mark.launch
def test_a_tracker_that_is_not_installed(train, tiny_model, pictures, tmp_path, monkeypatch):
    """A missing tracker is refused by name where it is asked for, and missed nowhere else."""
    paths = flags_of(tiny_model, pictures, tmp_path / "refused", *FAST, "--report_to", "wandb")
    without = (
        "import runpy, sys; sys.modules['wandb'] = None; del sys.argv[0]; runpy.run_path(sys.argv[0], {}, '__main__')"
    )
    command = [sys.executable, "-c", without, str(ROOT / "train_text_to_image.py"), *paths]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.endswith("--report_to wandb is not installed: pip install wandb\n")
    assert not (tmp_path / "refused").exists()
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "2 steps" in (train("out", "--validation_prompts", "a") / "README.md").read_text()


# What is said.


def test_header(train, capsys):
    """Before the first step, a run says how many pictures, pictures a step, steps and GiB there are."""
    flags = ["--train_batch_size", 2, "--gradient_accumulation_steps", 3, "--validation_samples", 1]
    run_flags = ["--max_train_steps", 2, "--checkpointing_steps", 1, "--report_to", "none"]
    output = train("out", *flags, *run_flags)
    said = " ".join(capsys.readouterr().out.split())
    assert "pictures 5 to train on, 1 held out, 16 x 16" in said
    assert re.search(r"batch 6 = 2 (a process )?x 1 processes x 3 accumulated", said)
    assert re.search(r"steps .*\b2\b.*seed 1\b", said) and "precision no" in said and "cpu" in said
    assert re.search(r"cache \d+\.\d+ GiB in ", said) and re.search(r"disk \d+\.\d+ GiB .*\d GiB free", said)
    shutil.rmtree(output / "checkpoint-2")
    train("out", *flags, *run_flags, "--resume_from_checkpoint", "checkpoint-1")
    said = " ".join(capsys.readouterr().out.split())
    assert f"Resuming from {output / 'checkpoint-1'}" in said and re.search(r"\b1 (are )?done", said)


def test_epochs(tiny_model, pictures, tmp_path):
    """Without --max_train_steps, an epoch of 6 pictures by 4 is 2 steps, and validation comes every 5 epochs."""
    flags = ["--train_batch_size", 4, "--validation_samples", 1]
    words = flags_of(tiny_model, pictures, tmp_path / "out", *flags, "--num_train_epochs", 6)
    output = tmp_path / "out"
    run(script, *in_epochs(words))
    assert [step for step, _ in metrics(output, "loss")] == list(range(1, 13))
    assert [step for step, _ in metrics(output, "validation_loss")] == [0, 10, 12]


# Grids and the held-out loss.


def test_grids(finished, tiny_model):
    """The untrained model's grid is step 0: what the base model draws from prompt i and seed i."""
    grids = sorted((finished.output / "samples").glob("step-*.png"))
    assert [grid.name for grid in grids] == [f"step-{step:06d}.png" for step in (0, 2, 4, 5, 6)]
    with Image.open(grids[0]) as image:
        places = [(x, y, x + 16, y + 16) for y in range(0, image.height, 16) for x in range(0, image.width, 16)]
        tiles = [np.asarray(image.crop(place), dtype=int) for place in places]
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model)
    for i, prompt in enumerate(PROMPTS):
        settings = {"num_inference_steps": 25, "height": 16, "width": 16, "output_type": "np"}
        drawn = pipeline(prompt, generator=torch.Generator().manual_seed(i), **settings).images[0] * 255
        assert np.abs(tiles[i] - drawn).max() < 2
    assert all(tile.min() == 255 for tile in tiles[len(PROMPTS) :])
    assert grids[0].read_bytes() != grids[-1].read_bytes()


def test_grid_of_another_prediction(train, tiny_model):
    """A grid is drawn as --prediction_type says, also where the base model's scheduler says otherwise."""
    flags = ["--validation_prompts", PROMPTS[0], "--max_train_steps", 1, "--report_to", "none"]
    output = train("out", *flags, "--prediction_type", "v_prediction")
    with Image.open(output / "samples" / "step-000000.png") as image:
        grid = np.asarray(image, dtype=int)
    pipeline, far = StableDiffusionPipeline.from_pretrained(tiny_model), {}
    for prediction_type in ("v_prediction", "epsilon"):
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, prediction_type=prediction_type)
        settings = {"num_inference_steps": script.SAMPLER_STEPS, "height": 16, "width": 16, "output_type": "np"}
        drawn = pipeline(PROMPTS[0], generator=torch.Generator().manual_seed(0), **settings).images[0] * 255
        far[prediction_type] = np.abs(grid - drawn).max()
    assert far["v_prediction"] < 2 < far["epsilon"]


def test_grids_are_deterministic(train):
    """Two runs draw the same grids, and with another seed the same of the untrained model."""
    flags = ["--validation_prompts", "a", "b", "--report_to", "none"]
    first, second = (files_in(train(name, *flags) / "samples") for name in ("first", "second"))
    assert first == second and len(first) == 2
    other = files_in(train("other", *flags, "--seed", 2) / "samples")
    assert [other[name] == first[name] for name in ("step-000000.png", "step-000002.png")] == [True, False]


OTHERWISE = [
    ["--seed", 2],
    ["--learning_rate", 0.5],
    ["--train_batch_size", 3, "--gradient_accumulation_steps", 2],
    ["--use_ema"],
    ["--no_encoding_cache"],
]


@pytest.mark.parametrize("flags", OTHERWISE, ids=str)
def test_held_out_loss_of_the_base(train, finished, flags):
    """The untrained model's held-out loss is the same in every run, so that runs can be compared."""
    flags = ["--validation_samples", 2, "--report_to", "none", "--max_train_steps", 1, *flags]
    (step, loss), _ = metrics(train("out", *flags), "validation_loss")
    assert step == 0 and loss == pytest.approx(metrics(finished.output, "validation_loss")[0][1], rel=1e-5)


def test_held_out_loss_is_on_fixed_noise(train):
    """A model that does not change has the same held-out loss at every step; one that does, another."""
    flags = ["--validation_samples", 2, "--validation_steps", 1, "--max_train_steps", 3, "--report_to", "none"]
    still = [loss for _, loss in metrics(train("still", *flags, "--learning_rate", 0), "validation_loss")]
    assert len(still) == 4 and len({*still}) == 1
    moving = [loss for _, loss in metrics(train("moving", *flags, "--learning_rate", 0.01), "validation_loss")]
    assert moving[0] == still[0] and len({*moving}) == 4


# The result.


def test_pipeline(finished, tiny_model, monkeypatch, capsys):
    """The result is a pipeline of safetensors that draws by the lines printed at the end; only its UNet is new."""
    names = published(finished.output)
    assert not [name for name in names if Path(name).suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]
    for part in ("vae", "text_encoder"):
        assert same(weights(finished.output / part), weights(tiny_model / part))
    assert not same(weights(finished.output / "unet"), weights(tiny_model / "unet"))
    assert same(weights(finished.output / "unet"), weights(finished.output / "checkpoint-6" / "unet_ema"))
    config = json.loads((finished.output / "scheduler" / "scheduler_config.json").read_text())
    assert config["prediction_type"] == "epsilon"
    said = finished.said.rsplit("To load it:")[-1]
    assert repr(str(finished.output)) in said
    image = run_code(said, finished.output.parent, monkeypatch)
    assert image.size == (16, 16) and image.getextrema() != ((0, 0),) * 3


def test_card(finished, tiny_model, pictures, monkeypatch):
    """The card says base, data, settings, losses and prompts, shows the last grid, and its code runs."""
    card = (finished.output / "README.md").read_text()
    assert card.startswith("---\n") and "library_name: diffusers" in card and "base_model" not in card
    assert "license" not in card  # it is the base model's, whatever that is
    assert f"\n{tiny_model.name}, trained on local pictures" in card
    assert str(tiny_model.parent) not in card and str(pictures) not in card and str(finished.output) not in card
    for setting in ("resolution | 16", "learning_rate | 0.01", "train_batch_size | 1", "seed | 1", "use_ema | True"):
        assert f"| {setting} |\n" in card
    assert "6 steps" in card and "(samples/step-000006.png)" in card
    assert all(f"- {prompt}\n" in card for prompt in PROMPTS)
    losses = [loss for _, loss in metrics(finished.output, "loss")]
    assert f"Loss from {losses[0]:.4f} to {losses[-1]:.4f}" in card
    curve = re.search(r"`([▁-█]+)`", card)[1]
    assert len(curve) == 6
    assert curve[np.argmax(losses)] == "█" == max(curve) and curve[np.argmin(losses)] == "▁"
    for step, loss in metrics(finished.output, "validation_loss"):
        assert f"Held-out loss at step {step}: {loss:.4f}" in card
    assert run_code(card, finished.output.parent, monkeypatch).size == (16, 16)


def test_card_of_hub_names(hub, tiny_model, pictures, tmp_path):
    """A base and a data set of the Hub are named in the card's header, which the Hub links to."""
    hub.add_folder("me/base", tiny_model)
    hub.add_folder("datasets/me/data", pictures)
    flags = ["--pretrained_model_name_or_path", "me/base", "--dataset_name", "me/data", "--report_to", "none"]
    run(script, *SMALL.split(), *flags, *FAST, "--max_train_steps", 1, "--output_dir", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    header = card.split("---\n")[1]
    assert "base_model: me/base\n" in header and re.search(r"datasets:\s+(- )?me/data\n", header)
    assert "widget" not in header and "instance_prompt" not in header
    assert "\nme/base, trained on me/data" in card and "samples/" not in card


def test_what_the_hub_shows(trainer):
    """A subject's prompt, adapters' tag, and the prompt to draw, with its picture if that is all that there is."""
    train = trainer(train_lora, "--max_train_steps", 1, "--validation_steps", 1, "--num_validation_images", 1)
    out = train("one", "--instance_prompt", "a sks dog", "--validation_prompt", "a sks dog: in a bucket")
    header = ModelCard.load(out / "README.md").data
    assert header.instance_prompt == "a sks dog" and "template:sd-lora" in header.tags
    picture = {"url": "samples/step-000001.png"}
    assert header.widget == [{"text": "a sks dog: in a bucket", "output": picture}] and (out / picture["url"]).exists()
    header = ModelCard.load(train("two", "--validation_prompts", "a cat", "a dog") / "README.md").data
    assert header.widget == [{"text": "a cat"}, {"text": "a dog"}] and "instance_prompt" not in header.to_dict()


@pytest.mark.parametrize("steps", [1, 200])
def test_card_of_any_length(tmp_path, steps):
    """The loss curve is drawn for one step as for many."""
    (tmp_path / "logs").mkdir()
    rows = [{"step": step + 1, "loss": 2.0 - step / 100} for step in range(steps)]
    (tmp_path / "logs" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--pretrained_model_name_or_path", "a/b", "--dataset_name", "c/d", "--output_dir", str(tmp_path)]
    begun = make_run(script, script.parse_args(flags))
    begun.global_step = steps
    script.write_model_card(begun, None, "me/x")
    card = (tmp_path / "README.md").read_text()
    assert f"{steps} steps" in card
    curve = re.search(r"`([▁-█]+)`", card)[1]
    assert len(curve) == min(steps, 60) and list(curve) == sorted(curve, reverse=True)


@pytest.mark.launch
def test_copied_alone(tiny_model, pictures, tmp_path):
    """The script alone in an empty folder trains, and leaves nothing there but the result."""
    shutil.copy(ROOT / "train_text_to_image.py", tmp_path)
    command = ["train_text_to_image.py", *flags_of(tiny_model, pictures, "out", *FAST)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    settings = {"cwd": tmp_path, "env": environment, "timeout": 120}
    done = subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True, **settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "train_text_to_image.py"]
    assert "pictures   6 to train on" in done.stdout and "To load it" in done.stdout
    assert [step for step, _ in metrics(tmp_path / "out", "loss")] == [1, 2]
    assert "Warning" not in done.stderr and "deprecated" not in done.stderr
