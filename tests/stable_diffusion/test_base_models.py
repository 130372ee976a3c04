"""Base models: folders, single files and what the Hub holds; which files of them are read, and what is refused."""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from helpers import (
    ROOT,
    changed,
    flags_of,
    for_each_family,
    make_picture,
    make_pictures,
    metrics,
    refused_base,
    run,
    same,
    scale_weight,
    weights,
)
from safetensors.torch import load_file, save_file
from single_file import save_single_file
from transformers import CLIPTokenizer

import train_dreambooth
import train_lora


def test_bases_that_are_refused(tiny_model, tiny_sdxl_model, tmp_path, capsys, monkeypatch):
    """What is no base of the three families is refused in a sentence, most of it before any weights are read."""
    monkeypatch.chdir(tmp_path)
    for name in ("model.ckpt", "model.pt", "model.safetensors", "empty.safetensors"):
        Path(name).write_bytes(b"x" * 20)
    flag, data = "--pretrained_model_name_or_path", ("--train_data_dir", tiny_model)

    def sentence(base, *words):
        return refused_base(capsys, (flag, base, *data, *words))

    for name in ("model.ckpt", "model.pt", "elsewhere/model.ckpt"):
        assert "convert it to .safetensors" in sentence(name)
    assert "is not a file" in sentence("missing.safetensors")
    assert "cannot be loaded" in sentence("model.safetensors", "--single_file_config", tiny_model)
    assert "--single_file_config" in sentence(tiny_model, "--single_file_config", tiny_model)
    assert "model.safetensors is on this machine" in sentence("model.safetensors", "--revision", "main")
    assert "model.safetensors is a file" in sentence("model.safetensors", "--variant", "fp16")
    assert "--single_file_config nowhere/at/all" in sentence(
        "model.safetensors", "--single_file_config", "nowhere/at/all"
    )
    assert "model.safetensors is on" in sentence("model.safetensors", "--non_ema_revision", "non-ema")
    for vae in ("/no/where", "vae.safetensors"):
        assert f"--pretrained_vae_model_name_or_path {vae} is no" in sentence(
            tiny_model, "--pretrained_vae_model_name_or_path", vae
        )
    said = sentence(tiny_model, "--pretrained_vae_model_name_or_path", tiny_model / "unet")
    assert "--pretrained_vae_model_name_or_path" in said and "cannot be loaded" in said
    flux = changed(tiny_model, tmp_path / "flux", "model_index.json", _class_name="FluxPipeline")
    assert "is a FluxPipeline" in sentence(flux)
    inpainting = changed(tiny_sdxl_model, tmp_path / "inpainting", "unet", in_channels=9)
    assert "cannot be loaded" in sentence(inpainting) or "no text-to-image model" in sentence(inpainting)
    edm = changed(tiny_sdxl_model, tmp_path / "edm", "model_index.json", scheduler=["diffusers", "EDMEulerScheduler"])
    (edm / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "EDMEulerScheduler"}')
    assert "no text-to-image model" in sentence(edm)
    torn = sentence("model.safetensors", "--single_file_config", tiny_model)
    assert "Without a network" not in torn and "model.safetensors cannot be loaded" in torn
    refiner = changed(
        tiny_sdxl_model, tmp_path / "refiner", "model_index.json", text_encoder=[None, None], tokenizer=[None, None]
    )
    assert "no text-to-image model" in sentence(refiner)


def test_a_base_model_of_fp16_files_only(train, tiny_model, tmp_path, capsys):
    """A base with nothing but .fp16 files loads, with and without --variant, and trains in float32; a line says so."""
    model = tmp_path / "model"
    StableDiffusionPipeline.from_pretrained(tiny_model).to(torch.float16).save_pretrained(model, variant="fp16")
    assert {file.name.split(".")[-2] for file in model.rglob("*.safetensors")} == {"fp16"}
    assert {tensor.dtype for tensor in weights(model).values()} <= {torch.float16, torch.int64}
    out = train("found", "--pretrained_model_name_or_path", model)
    assert "The base is of files in half precision, as it has no others" in capsys.readouterr().out
    named = train("named", "--pretrained_model_name_or_path", model, "--variant", "fp16")
    assert "half precision" not in capsys.readouterr().out
    assert same(weights(out), weights(named))
    assert {tensor.dtype for tensor in weights(out).values() if tensor.is_floating_point()} == {torch.float32}
    assert not any(".fp16." in file.name for file in out.rglob("*.safetensors"))
    assert not all(torch.equal(tensor, tensor.half().float()) for tensor in weights(out / "unet").values())


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_torn_file_is_not_passed_over(train, tiny_model, tmp_path, part):
    """A base whose file is torn is refused, though it has another one in half precision."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    StableDiffusionPipeline.from_pretrained(tiny_model).to(torch.float16).save_pretrained(model, variant="fp16")
    (file,) = (path for path in (model / part).glob("*.safetensors") if ".fp16" not in path.name)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(SystemExit, match="model cannot be loaded as a Stable Diffusion model"):
        train("out", "--pretrained_model_name_or_path", model)


def without_weight(base, folder, part):
    """A copy of a pipeline whose part lacks the first of its tensors."""
    shutil.copytree(base, folder)
    (file,) = (folder / part).glob("*.safetensors")
    tensors = load_file(file)
    tensors.pop(min(tensors))
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_a_base_that_lacks_weights_is_refused(part, tiny_sdxl_model, tmp_path, capsys):
    """A library would fill them in with random ones, and say nothing."""
    model = without_weight(tiny_sdxl_model, tmp_path / "model", part)
    said = refused_base(capsys, ("--pretrained_model_name_or_path", model, "--train_data_dir", tiny_sdxl_model))
    assert "model cannot be loaded as a Stable Diffusion model" in said
    assert f"it lacks weights, such as {part}'s " in said


def test_weights_of_other_names_are_none(tiny_model, tmp_path, capsys):
    """A text encoder whose weights have other names would be random as a whole; so would another VAE's."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    file = model / "text_encoder" / "model.safetensors"
    save_file({f"clip.{name}": tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    flags = ("--train_data_dir", tiny_model, "--pretrained_model_name_or_path")
    assert "it lacks weights, such as text_encoder's" in refused_base(capsys, (*flags, model))
    vae = without_weight(tiny_model, tmp_path / "other", "vae") / "vae"
    said = refused_base(capsys, (*flags, tiny_model, "--pretrained_vae_model_name_or_path", vae))
    assert "it lacks weights, such as vae's" in said


@pytest.mark.parametrize("files", ["vocab.json merges.txt tokenizer.json", "*"])
def test_a_base_without_a_vocabulary_is_refused(files, tiny_model, tmp_path, capsys):
    """A tokenizer of no words would make all captions alike."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    for name in files.split():
        for file in (model / "tokenizer").glob(name):
            file.unlink()
    said = refused_base(capsys, ("--pretrained_model_name_or_path", model, "--train_data_dir", tiny_model))
    assert "model cannot be loaded as a Stable Diffusion model" in said


def test_a_base_whose_weights_are_not_finite_is_refused(tiny_model, tmp_path, capsys):
    """Even where no step would notice, as in the VAE's decoder."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (file,) = (model / "vae").glob("*.safetensors")
    tensors = load_file(file)
    tensors["decoder.conv_out.bias"][0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    said = refused_base(capsys, ("--pretrained_model_name_or_path", model, "--train_data_dir", tiny_model))
    assert "AutoencoderKL with weights that are not finite" in said


def test_fp16_files_on_the_hub(train, hub, tiny_model, tmp_path, capsys):
    """A base of the Hub that has nothing but .fp16 files loads too."""
    model = tmp_path / "model"
    StableDiffusionPipeline.from_pretrained(tiny_model).to(torch.float16).save_pretrained(model, variant="fp16")
    hub.add_folder("me/half", model)
    train("out", "--max_train_steps", 1, base="me/half")
    assert "The base is of files in half precision" in capsys.readouterr().out


def test_a_base_model_of_pickles_is_refused(train, tiny_model, tmp_path):
    """A base with nothing but .bin files is refused in a sentence: they are pickles."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    for file in model.rglob("*.safetensors"):
        name = "pytorch_model.bin" if file.parent.name == "text_encoder" else "diffusion_pytorch_model.bin"
        torch.save(load_file(file), file.with_name(name))
        file.unlink()
    with pytest.raises(SystemExit, match="Error no file named .*safetensors") as end:
        train("out", "--pretrained_model_name_or_path", model)
    assert "fp16" not in str(end.value)  # which nobody asked for


# On the Hub.


def test_revision_is_of_every_part(train, hub, tiny_model, tiny_v_model, tmp_path):
    """--revision is that of all parts, scheduler and tokenizer too; --non_ema_revision is the UNet's."""
    old = shutil.copytree(tiny_v_model, tmp_path / "old")
    for part in ("vae", "text_encoder", "unet"):
        scale_weight(old, part)
    tokenizer = old / "tokenizer" / "tokenizer_config.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | {"model_max_length": 70}))
    hub.add_folder("me/model", tiny_model)
    hub.add_folder("me/model@old", old)
    data = make_pictures(tmp_path / "pictures")
    for flags, source in ((["--revision", "old"], old), ([], tiny_model)):
        out = train(f"of-{source.name}", "--train_data_dir", data, *flags, "--learning_rate", 0, base="me/model")
        for part in ("vae", "text_encoder", "unet"):
            assert same(weights(out / part), weights(source / part)), part
        for name in ("scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"):
            values = [json.loads((folder / name).read_text()) for folder in (out, source)]
            keys = ("prediction_type", "model_max_length")
            assert [values[0].get(key) for key in keys] == [values[1].get(key) for key in keys], name
    flags = ["--non_ema_revision", "old", "--learning_rate", 0]
    out = train("mixed", "--train_data_dir", data, *flags, base="me/model")
    assert same(weights(out / "unet"), weights(old / "unet")) and same(
        weights(out / "vae"), weights(tiny_model / "vae")
    )


@pytest.mark.launch
def test_offline(hub, tiny_model, pictures, tmp_path):
    """With HF_HUB_OFFLINE=1, what `hf download` fetched trains by its Hub id, and the Hub is not asked."""
    hub.add_folder("me/model", tiny_model)
    settings = {"check": True, "capture_output": True, "text": True, "timeout": 120}
    online, hf = {**hub.env, "HF_HOME": str(tmp_path / "shared")}, Path(sys.executable).parent / "hf"
    parts = ["--include", "*.json", "--include", "*.txt", "--include", "*/*.safetensors"]  # as docs/cluster.md says
    subprocess.run([hf, "download", "me/model", *parts], env=online, **settings)
    asked = len(hub.requests)
    assert asked > 5
    flags = flags_of("me/model", pictures, tmp_path / "out", "--validation_prompts", "a")
    command = [sys.executable, ROOT / "train_text_to_image.py", *flags]
    subprocess.run([str(word) for word in command], env=online | {"HF_HUB_OFFLINE": "1"}, **settings)
    assert len(hub.requests) == asked and len(metrics(tmp_path / "out", "loss")) == 4


# Single files.


@pytest.mark.parametrize(
    "model, pipeline_class",
    [
        ("tiny_model", StableDiffusionPipeline),
        ("tiny_sd2_model", StableDiffusionPipeline),
        ("tiny_sdxl_model", StableDiffusionXLPipeline),
    ],
)
def test_a_single_file_gives_back_every_weight(request, tmp_path, model, pipeline_class):
    """What the tests' converter writes is what diffusers reads."""
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


@for_each_family
def test_a_single_file_trains_as_its_folder(base, family, train, tmp_path):
    """A base in one .safetensors file gives the same bits as its folder, without a network."""
    configs = shutil.copytree(base, tmp_path / "configs", ignore=shutil.ignore_patterns("*.safetensors"))
    file = save_single_file(base, tmp_path / "model.safetensors")
    flags = ("--single_file_config", configs, "--center_crop", "--max_train_steps", 2)
    single, folder = train("out", *flags, base=file), train("folder", *flags[2:], base=base)
    assert same(weights(single), weights(folder)) and metrics(single, "loss") == metrics(folder, "loss")
    pipeline = DiffusionPipeline.from_pretrained(single)
    assert type(pipeline).__name__ == type(DiffusionPipeline.from_pretrained(base)).__name__
    saved = [path for path in single.rglob("*.json") if path.name != "state.json"]  # of a checkpoint, never uploaded
    assert saved and str(tmp_path) not in "".join(path.read_text() for path in saved)


@for_each_family
def test_older_programs_read_a_result(base, family, train, trainer, tmp_path):
    """Tokenizers have their two files and text encoders the published names, also if the base has other ones."""
    file, flags = save_single_file(base, tmp_path / "model.safetensors"), ("--single_file_config", base)
    newer = shutil.copytree(base, tmp_path / "newer")
    weights = load_file(newer / "text_encoder" / "model.safetensors")
    weights = {name.removeprefix("text_model."): tensor for name, tensor in weights.items()}
    save_file(weights, newer / "text_encoder" / "model.safetensors", {"format": "pt"})
    subject = make_picture(tmp_path / "subject" / "a.png").parent
    words = ("--instance_data_dir", subject, "--instance_prompt", "sks", "--train_text_encoder")
    trained = trainer(train_dreambooth, *words, *flags, "--checkpointing_steps", 4)("trained", base=file)
    frozen = (train("of a file", *flags, base=file), train("of a folder", base=newer))
    for place in (*frozen, trained, trained / "checkpoint-4"):
        for part in sorted(base.glob("text_encoder*")):
            names = load_file(place / part.name / "model.safetensors").keys()
            assert names == load_file(part / "model.safetensors").keys()
            projection = {"text_projection.weight"} if part.name == "text_encoder_2" else set()
            assert projection == {name for name in names if not name.startswith("text_model.")}
            ends = ("embeddings.token_embedding", "encoder.layers.0.self_attn.q_proj", "final_layer_norm")
            assert {f"text_model.{end}.weight" for end in ends} <= names
    for part in sorted(base.glob("tokenizer*")):
        vocabulary = CLIPTokenizer.from_pretrained(part).get_vocab()
        for place in (*frozen, trained):
            assert json.loads((place / part.name / "vocab.json").read_text()) == vocabulary
            assert (place / part.name / "merges.txt").read_text().startswith("#version")


def test_a_single_file_without_configs_offline(tiny_model, tmp_path, capsys):
    """Without a network and without configs, the sentence says what could not be loaded."""
    file = save_single_file(tiny_model, tmp_path / "model.safetensors")
    sentence = refused_base(capsys, ("--pretrained_model_name_or_path", file, "--train_data_dir", tmp_path))
    assert "cannot be loaded" in sentence and "--single_file_config" in sentence


@pytest.mark.parametrize("marks", [(), ("v_pred",), ("v_pred", "ztsnr")])
def test_what_a_single_file_says_of_its_schedule(tiny_sdxl_model, train, tmp_path, marks):
    """A file that is marked as a v-prediction model, of zero terminal SNR or not, is trained and sampled as one."""
    file = save_single_file(tiny_sdxl_model, tmp_path / "model.safetensors")
    save_file(load_file(file) | {name: torch.zeros(0) for name in marks}, file)
    out = train("out", "--single_file_config", tiny_sdxl_model, "--max_train_steps", 1, base=file)
    config = DiffusionPipeline.from_pretrained(out).scheduler.config
    assert config.prediction_type == ("v_prediction" if marks else "epsilon")
    assert config.rescale_betas_zero_snr == ("ztsnr" in marks)


def test_a_refiner_in_one_file(tiny_sdxl_model, tmp_path, capsys):
    """A refiner's file, whose config has one text encoder, is refused as its folder is."""
    nothing = {"text_encoder": [None, None], "tokenizer": [None, None]}
    configs = changed(tiny_sdxl_model, tmp_path / "configs", "model_index.json", **nothing)
    file = save_single_file(tiny_sdxl_model, tmp_path / "model.safetensors")
    flags = ("--pretrained_model_name_or_path", file, "--single_file_config", configs)
    assert "no text-to-image model" in refused_base(capsys, (*flags, "--train_data_dir", tmp_path))


def test_a_single_file_that_lacks_weights(tiny_sdxl_model, tmp_path, capsys):
    """A file without some weights of a text encoder, which diffusers would pass over, is refused."""
    file = save_single_file(tiny_sdxl_model, tmp_path / "model.safetensors")
    tensors = load_file(file)
    del tensors["conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight"]
    save_file(tensors, file)
    flags = ("--pretrained_model_name_or_path", file, "--single_file_config", tiny_sdxl_model)
    assert "lacks weights" in refused_base(capsys, (*flags, "--train_data_dir", tmp_path))


# What is printed loads them.


def test_adapters_of_a_single_file(tiny_sdxl_model, pictures, tmp_path, capsys):
    """What the run prints loads the file with its configs, and the adapters onto it, to draw as its marks say."""
    file = save_single_file(tiny_sdxl_model, tmp_path / "model.safetensors")
    save_file(load_file(file) | {"v_pred": torch.zeros(0)}, file)
    run(train_lora, *flags_of(file, pictures, tmp_path / "out", "--single_file_config", tiny_sdxl_model))
    code = capsys.readouterr().out.split("To load it:")[1]
    assert f"StableDiffusionXLPipeline.from_single_file({str(file)!r}, config={str(tiny_sdxl_model)!r})" in code
    found = {}
    exec(code[: code.index("prompt = ")], found)
    assert found["pipeline"].scheduler.config.prediction_type == "v_prediction"
    assert found["pipeline"].get_active_adapters()


@pytest.mark.parametrize("name", ["train_lora", "textual_inversion"])
def test_what_is_printed_draws_as_it_was_trained(name, tiny_model, pictures, tmp_path, monkeypatch, capsys):
    """The lines for a result without a scheduler and a VAE of its own bring those that it was trained with."""
    monkeypatch.chdir(tmp_path)
    script = importlib.import_module(name)
    torch.manual_seed(5)
    AutoencoderKL.from_config(AutoencoderKL.load_config(tiny_model / "vae")).save_pretrained("vae")
    flags = "--prediction_type v_prediction --rescale_betas_zero_snr --pretrained_vae_model_name_or_path vae"
    word = ("--placeholder_token", "<x>", "--initializer_token", "a") if name == "textual_inversion" else ()
    run(script, *flags_of(tiny_model, pictures, "out", *word, *flags.split()))
    code = capsys.readouterr().out.split("To load it:")[1]
    found = {}
    exec(code[: code.index("prompt = ")], found)
    config = found["pipeline"].scheduler.config
    assert config.prediction_type == "v_prediction" and config.rescale_betas_zero_snr
    assert config.timestep_spacing == "trailing"
    vae = {
        f"diffusion_pytorch_model.safetensors:{key}": value
        for key, value in found["pipeline"].vae.state_dict().items()
    }
    assert same(vae, weights(Path("vae")))
    card = Path("out", "README.md").read_text()
    assert str(tmp_path) not in card and "v_prediction" in card
