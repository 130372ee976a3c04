"""A pipeline that is handed out as one file: what the tests' converter writes is what diffusers reads."""

import shutil

import pytest
import torch
from conftest import same
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from single_file import save_single_file


@pytest.mark.parametrize(
    "model, pipeline_class",
    [
        ("tiny_model", StableDiffusionPipeline),
        ("tiny_sd2_model", StableDiffusionPipeline),
        ("tiny_sdxl_model", StableDiffusionXLPipeline),
    ],
)
def test_a_single_file_gives_back_every_weight(request, tmp_path, model, pipeline_class):
    folder = shutil.copytree(request.getfixturevalue(model), tmp_path / "folder")
    for file in folder.rglob("*.safetensors"):  # fresh norms and biases are all alike, and could be swapped unseen
        save_file({name: torch.randn_like(tensor) for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    file = save_single_file(folder, tmp_path / "model.safetensors")
    # So that nothing can come from the folder but the configuration.
    config = shutil.copytree(folder, tmp_path / "config", ignore=shutil.ignore_patterns("*.safetensors"))
    loaded = pipeline_class.from_single_file(str(file), config=str(config), torch_dtype=torch.float32)
    kept = pipeline_class.from_pretrained(folder)
    for name, module in kept.components.items():
        if isinstance(module, torch.nn.Module):
            assert same(getattr(loaded, name).state_dict(), module.state_dict()), name
