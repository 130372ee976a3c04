"""Every recipe in configs/ parses."""

import importlib
import re

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from helpers import ROOT


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/accelerate/*.yaml")), ids=lambda path: path.name)
def test_launcher_config(path):
    config = load_config_from_file(str(path))
    wanted = yaml.safe_load(path.read_text())
    assert config.num_processes == wanted["num_processes"]
    assert config.distributed_type == wanted["distributed_type"]
    assert f"accelerate launch --config_file {path.relative_to(ROOT)} " in path.read_text().replace("\n#  ", "")


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.yaml")), ids=lambda path: path.name)
def test_recipe(path, tmp_path, monkeypatch):
    for name in ("configs", "demo"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    wanted = yaml.safe_load(path.read_text())
    for key, value in wanted.items():
        # Folders that the reader has; what lies in the repository must be there.
        if key.endswith("_dir") and not value.startswith("demo/"):
            (tmp_path / value).mkdir(parents=True)
    command = path.read_text().splitlines()[0]
    script = re.search(r"(\w+)\.py --config configs/" + re.escape(path.name), command)[1]
    launcher = re.search(r"--config_file (\S+)", command)
    assert launcher is None or (ROOT / launcher[1]).exists()
    args = importlib.import_module(script).parse_args(["--config", str(path)])
    for key, value in wanted.items():
        assert getattr(args, key) == value


# What the documented recipes for smaller GPUs consist of, and what they cannot take.
RECIPES = {
    "16gb": ({"use_8bit_adam", "gradient_checkpointing"}, "one_gpu"),
    "12gb": (
        {"use_8bit_adam", "gradient_checkpointing", "enable_xformers_memory_efficient_attention", "set_grads_to_none"},
        "one_gpu",
    ),
    "8gb": ({"gradient_checkpointing"}, "deepspeed_zero2_offload"),
}


@pytest.mark.parametrize("size", RECIPES)
def test_dreambooth_recipe(size):
    switches, launcher = RECIPES[size]
    text = (ROOT / "configs" / f"dreambooth_{size}.yaml").read_text()
    flags = yaml.safe_load(text)
    assert {flag for flag, value in flags.items() if value is True} == switches | {"with_prior_preservation"}
    assert flags["mixed_precision"] == "fp16" and flags["train_batch_size"] == 1
    assert f"--config_file configs/accelerate/{launcher}.yaml " in text.splitlines()[0]
    if size == "8gb":
        config = yaml.safe_load((ROOT / "configs" / "accelerate" / f"{launcher}.yaml").read_text())
        assert (config["mixed_precision"], config["deepspeed_config"]["zero_stage"]) == ("fp16", 2)
        assert config["deepspeed_config"]["offload_optimizer_device"] == "cpu"
