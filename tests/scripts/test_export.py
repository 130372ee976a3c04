"""export.py: one file with the names that other programs look up, kohya's file, merged adapters, other precisions."""

import datetime
import json
import os
import resource
import stat

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDPMPipeline,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from helpers import KOHYA, WORD, flags_of, linux, run, write_config
from safetensors import safe_open
from safetensors.torch import load_file
from single_file import save_single_file, unet_name, vae_name

import export
import generate
import textual_inversion
import train_lora
import train_text_to_image
import train_unconditional


SHORT = ("--max_train_steps", 1, "--checkpointing_steps", 1, "--learning_rate", 1e-1)


def told_by(file):
    """What a file says of itself."""
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def picture(pipeline):
    """A picture of a pipeline, as numbers."""
    pipeline.set_progress_bar_config(disable=True)
    settings = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "np"}
    return pipeline("a red circle", generator=torch.Generator().manual_seed(0), **settings).images[0]


def in_memory(pipeline):
    """A pipeline with its weights out of its files, where they lie as they come: that changes last bits."""
    for model in (part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)):
        for weight in model.parameters():
            weight.data = weight.data.clone()
    return pipeline


@pytest.fixture(scope="module")
def results(tiny_model, pictures, tmp_path_factory):
    """Runs of the scripts: adapters, adapters with DoRA, a whole model with an average, a word, a model of pixels."""
    folder = tmp_path_factory.mktemp("results")
    lora = ("--rank", 3, "--lora_alpha", 6, "--lora_target_modules", "all", "--train_text_encoder")
    for name, more in (("lora", ()), ("dora", ("--use_dora",))):
        run(train_lora, *flags_of(tiny_model, pictures, folder / name, *SHORT, *lora, *more, "--output_kohya_format"))
    v = ("--prediction_type", "v_prediction", "--use_ema", "--max_train_steps", 2)
    run(train_text_to_image, *flags_of(tiny_model, pictures, folder / "whole", *SHORT, *v))
    word = ("--placeholder_token", WORD, "--initializer_token", "red")
    run(textual_inversion, *flags_of(tiny_model, pictures, folder / "word", *SHORT, *word))
    words = ("--model_config_name_or_path", write_config(folder / "config"), "--train_data_dir", pictures)
    words += ("--output_dir", folder / "pixels", "--resolution", 16, "--train_batch_size", 2, "--eval_batch_size", 0)
    run(train_unconditional, *words, *SHORT, "--report_to", "none")
    return folder


# One file.


@pytest.mark.parametrize("family", ["tiny_model", "tiny_sd2_model", "tiny_sdxl_model"])
def test_one_file(base, family, tmp_path):
    """It has the names and shapes of the first publications, and read by diffusers it draws the same bits."""
    run(export, base, tmp_path / "model.safetensors")
    exported = load_file(tmp_path / "model.safetensors")
    wanted = load_file(save_single_file(base, tmp_path / "by-hand"))
    marks = {"v_pred", "ztsnr"} & exported.keys()
    assert exported.keys() - marks == wanted.keys()
    assert all(torch.equal(exported[name], wanted[name]) for name in wanted)
    kind = StableDiffusionXLPipeline if "xl" in family else StableDiffusionPipeline
    read = kind.from_single_file(tmp_path / "model.safetensors", config=str(base))
    assert (picture(in_memory(read)) == picture(in_memory(kind.from_pretrained(base)))).all()


@pytest.mark.parametrize("family", ["tiny_model", "tiny_sd2_model", "tiny_sdxl_model"])
def test_what_a_file_says(base, family, tmp_path):
    """All the fields that the modelspec asks for."""
    run(export, base, tmp_path / "my-model.safetensors")
    told = told_by(tmp_path / "my-model.safetensors")
    assert told["modelspec.sai_model_spec"] == "1.0.1" and told["modelspec.title"] == "my-model"
    xl = family == "tiny_sdxl_model"
    assert told["modelspec.architecture"] == ("stable-diffusion-xl-v1-base" if xl else "stable-diffusion-v1")
    assert told["modelspec.implementation"] == "https://github.com/Stability-AI/generative-models"
    unet, vae = (json.loads((base / part / "config.json").read_text()) for part in ("unet", "vae"))
    side = unet["sample_size"] * 2 ** (len(vae["up_block_types"]) - 1)
    assert told["modelspec.resolution"] == f"{side}x{side}"
    assert told["modelspec.prediction_type"] in ("epsilon", "v") and len(told["modelspec.date"]) == 10


def test_v_prediction_is_marked(results, tiny_model, tmp_path):
    """The two keys that A1111, ComfyUI and our own scripts read."""
    run(export, results / "whole", tmp_path / "v.safetensors")
    assert "v_pred" in load_file(tmp_path / "v.safetensors") and "ztsnr" not in load_file(tmp_path / "v.safetensors")
    assert told_by(tmp_path / "v.safetensors")["modelspec.prediction_type"] == "v"
    assert told_by(tmp_path / "v.safetensors")["modelspec.resolution"] == "32x32"  # the run's
    read, _ = generate.open_model([str(tmp_path / "v.safetensors")], str(tiny_model), [1.0])
    assert read.scheduler.config.prediction_type == "v_prediction"
    assert (picture(read) == picture(DiffusionPipeline.from_pretrained(results / "whole"))).all()


def real_unets():
    """The UNets of the three families at their real sizes, without weights, and how many weights their files have."""
    three = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    old = {"block_out_channels": (320, 640, 1280, 1280), "down_block_types": three}
    old["up_block_types"] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    yield "sd1", 686, {**old, "cross_attention_dim": 768, "attention_head_dim": 8}
    wide = {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
    yield "sd2", 686, {**old, **wide}
    xl = {"block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10)}
    xl["down_block_types"] = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    xl["up_block_types"] = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
    xl |= {"cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20), "use_linear_projection": True}
    xl |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
    yield "sdxl", 1680, {**xl, "projection_class_embeddings_input_dim": 2816}


@pytest.mark.parametrize("family, count, config", real_unets(), ids=["sd1", "sd2", "sdxl"])
def test_names_at_real_sizes(family, count, config):
    """As many weights as the published files have, each with the name that they give it."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    names = {name: export.sgm_name(name, unet.config) for name in unet.state_dict()}
    assert names == {name: unet_name(name, unet.config) for name in names}
    assert len({*names.values()}) == count
    if family == "sdxl":  # as its own configuration numbers them
        assert {"label_emb.0.0.weight", "output_blocks.8.0.skip_connection.bias", "out.0.weight"} <= {*names.values()}
        assert "middle_block.1.transformer_blocks.9.attn2.to_k.weight" in names.values()


def test_names_of_the_vae():
    """248 weights, as each published file has."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with torch.device("meta"):
        vae = AutoencoderKL(**blocks, block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4)
    weights = export.vae_weights(vae)
    assert weights.keys() == {vae_name(name, vae.config) for name in vae.state_dict()} and len(weights) == 248
    assert weights["decoder.mid.attn_1.q.weight"].shape == (512, 512, 1, 1)
    assert "decoder.up.3.block.0.conv1.weight" in weights and "encoder.down.0.downsample.conv.bias" in weights


# Checkpoints and precisions.


def test_a_checkpoint(results, tmp_path):
    """Its weights, or by a flag their average, on the base of its run."""
    checkpoint = results / "whole" / "checkpoint-2"
    for part, flags in (("unet", ()), ("unet_ema", ("--use_ema",))):
        run(export, checkpoint, tmp_path / part, *flags)
        wanted = load_file(checkpoint / part / "diffusion_pytorch_model.safetensors")
        found = load_file(tmp_path / part / "unet" / "diffusion_pytorch_model.safetensors")
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
        assert DiffusionPipeline.from_pretrained(tmp_path / part).scheduler.config.prediction_type == "v_prediction"


def test_precisions(tiny_model, tmp_path, capsys):
    """Folders and files take half the space, keep their names, and load."""
    run(export, tiny_model, tmp_path / "half", "--dtype", "fp16")
    said = capsys.readouterr().out
    run(export, tiny_model, tmp_path / "half.safetensors", "--dtype", "bf16")
    configs = [file.read_text() for file in (tmp_path / "half").rglob("*.json")]
    assert not any(str(tiny_model.parent) in text or str(tmp_path) in text for text in configs)
    for part in ("unet", "vae", "text_encoder"):
        (before,), (after,) = ([*(place / part).glob("*.safetensors")] for place in (tiny_model, tmp_path / "half"))
        weights, halves = load_file(before), load_file(after)
        assert weights.keys() == halves.keys()  # the text encoder's as all published folders have them
        assert all(torch.equal(weights[name].half(), halves[name]) for name in weights)
    assert {weight.dtype for weight in load_file(tmp_path / "half.safetensors").values()} == {torch.bfloat16}
    files = [place.rglob("*.safetensors") for place in (tiny_model, tmp_path / "half")]
    sizes = [sum(file.stat().st_size for file in some) / 1e6 for some in files]
    assert 1.9 < sizes[0] / sizes[1] < 2.1
    assert said == f"{tiny_model}, {sizes[0]:.1f} MB, became {tmp_path / 'half'}, {sizes[1]:.1f} MB in fp16.\n"
    assert {"vocab.json", "merges.txt"} <= {*os.listdir(tmp_path / "half" / "tokenizer")}
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "half").to(torch.float32)
    assert abs(picture(loaded) - picture(StableDiffusionPipeline.from_pretrained(tiny_model))).max() < 0.02


def test_a_file_becomes_a_folder(tiny_model, tmp_path):
    """With the names that all published folders have."""
    run(export, tiny_model, tmp_path / "model.safetensors")
    run(export, tmp_path / "model.safetensors", tmp_path / "folder", "--base", tiny_model)
    files = [place / "text_encoder" / "model.safetensors" for place in (tiny_model, tmp_path / "folder")]
    before, after = map(load_file, files)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_model_of_pixels(results, tmp_path):
    """A folder in another precision; there is no such file."""
    run(export, results / "pixels", tmp_path / "new" / "half", "--dtype", "fp16")
    assert isinstance(DDPMPipeline.from_pretrained(tmp_path / "new" / "half").unet, UNet2DModel)
    with pytest.raises(SystemExit, match="an unconditional model has no such file: name a folder"):
        run(export, results / "pixels", tmp_path / "half.safetensors")


# Adapters.


def test_kohyas_file(results, tmp_path):
    """That of a run is made after the fact, with the same weights."""
    for kind in ("lora", "dora"):
        run(export, results / kind, tmp_path / f"{kind}.safetensors")
        made, found = load_file(results / kind / KOHYA), load_file(tmp_path / f"{kind}.safetensors")
        assert made.keys() == found.keys() and all(torch.equal(made[name], found[name]) for name in made)
        ours, theirs = told_by(results / kind / KOHYA), told_by(tmp_path / f"{kind}.safetensors")
        own = {"modelspec.date", "modelspec.title", "ss_output_name", "ss_seed", "ss_learning_rate"}
        assert {key: ours[key] for key in ours.keys() - own} == {key: theirs.get(key) for key in ours.keys() - own}
        assert ours["modelspec.implementation"] == "diffusers" and ours["modelspec.resolution"] == "32x32"
        today = (datetime.date.today() - datetime.timedelta(days=1), datetime.date.today())  # at midnight, too
        assert all(datetime.date.fromisoformat(told["modelspec.date"]) in today for told in (ours, theirs))


def test_a_scale_is_in_kohyas_alpha(results, tmp_path):
    run(export, results / "lora", tmp_path / "half.safetensors", "--lora_scale", 0.5)
    alphas = {weight.item() for name, weight in load_file(tmp_path / "half.safetensors").items() if "alpha" in name}
    assert alphas == {3.0}


def test_dora_by_its_formula(results, tmp_path):
    """m (W + a/r B A) / |W + a/r B A|, the norm by output, as LyCORIS reads it, is what peft merges."""
    run(export, results / "dora", tmp_path / "dora.safetensors")
    run(export, results / "dora", tmp_path / "merged", "--merge_lora")
    file = load_file(tmp_path / "dora.safetensors")
    args = {"subfolder": "unet"}
    base = UNet2DConditionModel.from_pretrained(json_base(results / "dora"), **args).state_dict()
    merged = UNet2DConditionModel.from_pretrained(tmp_path / "merged", **args).state_dict()
    layers = {f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}": name for name in base}
    seen = 0
    for key in [key.removesuffix(".dora_scale") for key in file if key.endswith("dora_scale") and "unet" in key]:
        weight = base[layers[key]]
        up, down = file[f"{key}.lora_up.weight"], file[f"{key}.lora_down.weight"]
        change = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape) * file[f"{key}.alpha"] / len(down)
        total = weight + change
        norm = total.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.ndim - 1))
        assert file[f"{key}.dora_scale"].shape == norm.shape
        torch.testing.assert_close(file[f"{key}.dora_scale"] * total / norm, merged[layers[key]], atol=1e-5, rtol=1e-4)
        seen += not torch.equal(weight, merged[layers[key]])
    assert seen > 20


def json_base(result):
    """The base that a run names."""
    return generate.run_flags(result)["pretrained_model_name_or_path"]


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("scale", [1.0, 0.6])
def test_merged(results, tiny_model, tmp_path, kind, scale):
    """The whole model draws what base and adapters draw, from a folder and from a file."""
    for name in ("merged", "merged.safetensors"):
        run(export, results / kind, tmp_path / name, "--merge_lora", "--lora_scale", scale)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model)
    plain = picture(pipeline)
    pipeline.load_lora_weights(results / kind, adapter_name="one")
    pipeline.set_adapters("one", scale)
    wanted = picture(pipeline)
    assert abs(wanted - plain).max() > 0.01
    assert abs(picture(StableDiffusionPipeline.from_pretrained(tmp_path / "merged")) - wanted).max() < 1e-3
    read = StableDiffusionPipeline.from_single_file(tmp_path / "merged.safetensors", config=str(tiny_model))
    assert abs(picture(read) - wanted).max() < 1e-3


def test_the_files_of_a_merged_model_are_the_bases(results, tiny_model, tmp_path):
    """No name tells of adapters."""
    run(export, results / "lora", tmp_path / "merged", "--merge_lora")
    for part in ("unet", "text_encoder", "vae"):
        (before,), (after,) = ([*(place / part).glob("*.safetensors")] for place in (tiny_model, tmp_path / "merged"))
        assert load_file(before).keys() == load_file(after).keys()


# What is refused.


@pytest.mark.parametrize(
    "result, output, said",
    [
        ("word", "out.safetensors", "a new word needs no export"),
        ("lora", "folder", "adapters become a file .* or with --merge_lora part of their base"),
        ("whole", "folder --use_ema", "--use_ema is for a checkpoint"),
        ("whole", "folder --merge_lora", "--merge_lora and --lora_scale are for adapters"),
        ("config", "folder", "cannot be exported: "),
        ("control", "folder", "it is a StableDiffusionControlNetPipeline, and only StableDiffusionPipeline, "),
        ("nowhere", "folder", "nowhere cannot be exported: "),
    ],
)
def test_refused(results, tmp_path, result, output, said):
    """In a sentence, and nothing is written."""
    name, *flags = output.split()
    if result == "control":
        base = json_base(results / "lora")
        net = ControlNetModel.from_unet(UNet2DConditionModel.from_pretrained(base, subfolder="unet"))
        net.save_pretrained(results / "control")
        flags += ["--base", base]
    with pytest.raises(SystemExit, match=said):
        run(export, results / result, tmp_path / name, *flags)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "output, said",
    [("there", "is there already"), ("there/file/x", "cannot be made or written to"), ("a.ckpt", "pickles")],
)
def test_outputs_that_are_refused(tmp_path, capsys, output, said):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(SystemExit):
        export.parse_args(["result", str(tmp_path / output)])
    assert said in capsys.readouterr().err


def test_half_precision_that_overflows(tiny_model, tmp_path):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model)
    pipeline.unet.conv_in.bias.data += 1e5
    pipeline.save_pretrained(tmp_path / "large")
    with pytest.raises(
        SystemExit, match="The weights of unet are not finite in fp16, as they overflow: take bf16 or fp32"
    ):
        run(export, tmp_path / "large", tmp_path / "half", "--dtype", "fp16")
    assert os.listdir(tmp_path) == ["large"]


def test_a_disk_that_is_full(tiny_model, tmp_path, monkeypatch):
    """Nothing is left behind."""

    def full(*args):
        raise OSError("No space left on device")

    def half(tensors, path, metadata):
        path.write_bytes(b"half")
        full()

    monkeypatch.setattr(export, "save_file", half)
    monkeypatch.setattr(StableDiffusionPipeline, "save_pretrained", full)
    for name in ("file.safetensors", "folder"):
        with pytest.raises(SystemExit, match=f"{name} cannot be written: No space left"):
            run(export, tiny_model, tmp_path / name)
    assert os.listdir(tmp_path) == []


@linux
@pytest.mark.parametrize("name", ["out.safetensors", "folder"])
def test_a_full_disk(tiny_model, tmp_path, name):
    """It is said in a sentence, and nothing is left."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(SystemExit, match=f"{name} cannot be written: .*File too large"):
            run(export, tiny_model, tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


@linux
def test_others_can_read_it(tiny_model, tmp_path):
    """As the umask says."""
    before = os.umask(0o027)
    try:
        for name in ("out.safetensors", "folder"):
            run(export, tiny_model, tmp_path / name)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.rglob("*.safetensors")}
    assert modes == {0o640}
