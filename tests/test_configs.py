"""Every recipe in configs/ parses."""

import importlib
import re

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from conftest import ROOT


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/accelerate/*.yaml")), ids=lambda path: path.name)
def test_launcher_config(path):
    config = load_config_from_file(str(path))
    wanted = yaml.safe_load(path.read_text())
    assert config.num_processes == wanted["num_processes"]
    assert config.distributed_type == wanted["distributed_type"]
    assert f"accelerate launch --config_file {path.relative_to(ROOT)} " in path.read_text().replace("\n#  ", "")


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.yaml")), ids=lambda path: path.name)
def test_recipe(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    command = path.read_text().splitlines()[0]
    script = re.search(r"(\w+)\.py --config configs/" + re.escape(path.name), command)[1]
    args = importlib.import_module(script).parse_args(["--config", str(path)])
    for key, value in yaml.safe_load(path.read_text()).items():
        assert getattr(args, key) == value
