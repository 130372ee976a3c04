"""What train_lora.py does of its own: adapters and their arithmetic, their two files, its flags, stops and resumes."""

import inspect
import json
import math
import operator
import os
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import datasets
import forked
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, make_pictures, metrics, run, same, weights
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors import safe_open
from safetensors.torch import load_file
from single_file import unet_name
from test_exact import flat, logged
from test_stop import start_ranks
from torch.nn.utils import parametrize

import train_dreambooth
import train_lora as script


SMALL = "--resolution 32 --train_batch_size 2 --max_train_steps 3 --seed 1 --learning_rate 1e-2 --lr_warmup_steps 0"
FLAGS = (*SMALL.split(), "--center_crop", "--checkpointing_steps", 0, "--report_to", "none")
FILE, KOHYA = "pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors"
ATTENTION = {"to_q", "to_k", "to_v", "to_out.0"}
# Adapters of every kind, those of SDXL by their names: flags, and what W + scale * B A has for scale.
KINDS = {
    "default": ("", 1),
    "feedforward": ("--rank 3 --lora_alpha 6 --lora_target_modules attention+feedforward", 2),
    "all": ("--rank 2 --lora_alpha 1 --lora_target_modules all --train_text_encoder", 0.5),
    "names": ("--rank 5 --lora_target_modules attn1.to_q conv1 time_emb_proj", 1),
    "rslora": ("--rank 4 --lora_alpha 3 --use_rslora --train_text_encoder", 1.5),
    "dora": ("--rank 2 --lora_alpha 3 --use_dora --lora_target_modules all --train_text_encoder", 1.5),
    "sdxl": ("--rank 3 --lora_alpha 6 --train_text_encoder", 2),
    "sdxl-all": ("--rank 2 --lora_alpha 1 --lora_target_modules all --train_text_encoder", 0.5),
}
for_each_kind = pytest.mark.parametrize("kind", KINDS)


def flags_of(model, data, out, *flags):
    """The command line of a small run, as text."""
    flags = [str(flag) for flag in flags]
    given = {"--train_data_dir", "--instance_data_dir", "--dataset_name"} & {*flags}
    places = ["--pretrained_model_name_or_path", model, "--output_dir", out]
    return [*map(str, (*FLAGS, *places, *(() if given else ("--train_data_dir", data)))), *flags]


@pytest.fixture
def train(tiny_model, pictures, tmp_path, monkeypatch):
    """A function that trains in this process, into a named folder that it returns; later flags win."""
    monkeypatch.setattr(script, "VALIDATION_STEPS", 2)

    def call(name, *flags):
        run(script, *flags_of(tiny_model, pictures, tmp_path / name, *flags))
        return tmp_path / name

    return call


@pytest.fixture(scope="module")
def made(tiny_model, tiny_sdxl_model, pictures, tmp_path_factory):
    """A function that returns base and output folder of a kind of adapters, and the models as trained in memory."""
    results = {}

    def make(kind):
        if kind not in results:
            out, models = tmp_path_factory.mktemp(kind) / "out", []
            base = tiny_sdxl_model if kind.startswith("sdxl") else tiny_model
            kohya = () if kind == "dora" else ("--output_kohya_format",)
            with pytest.MonkeyPatch.context() as patch:
                original = script.save_model
                patch.setattr(script, "save_model", lambda args, m: (models.append(m), original(args, m)))
                flags = (*KINDS[kind][0].split(), *kohya, "--checkpointing_steps", 3)
                run(script, *flags_of(base, pictures, out, *flags))
            results[kind] = SimpleNamespace(base=base, out=out, models=models[0], scale=KINDS[kind][1])
        return results[kind]

    return make


def text_encoders(pipeline):
    """A pipeline's text encoders, one or two, by name."""
    return {name: model for name, model in pipeline.components.items() if name in script.TEXT_ENCODERS}


@torch.no_grad()
def outputs(pipeline):
    """What the UNet makes of a conditioning that is always the same, and each text encoder of some tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 500, (2, 77), generator=generator)
    latents = torch.randn(2, 4, 16, 16, generator=generator)
    conditioning = torch.randn(2, 77, pipeline.unet.config.cross_attention_dim, generator=generator)
    added = {"text_embeds": torch.randn(2, 32, generator=generator), "time_ids": torch.arange(12.0).view(2, 6)}
    encoders = text_encoders(pipeline).values()
    for model in (pipeline.unet, *encoders):
        model.eval()
    result = pipeline.unet(latents, torch.tensor([10, 700]), conditioning, added_cond_kwargs=added).sample
    return [result.float(), *(encoder(ids)[0].float() for encoder in encoders)]


def picture(pipeline):
    """A picture that a pipeline draws, in float."""
    pipeline.set_progress_bar_config(disable=True)
    settings = {"height": 32, "width": 32, "num_inference_steps": 3, "output_type": "pt"}
    return pipeline("a red circle", generator=torch.Generator().manual_seed(0), **settings).images


def loaded(base, folder, **settings):
    """The base model's pipeline with the adapters of a folder."""
    pipeline = DiffusionPipeline.from_pretrained(base)
    pipeline.load_lora_weights(folder, **settings)
    return pipeline


def close(first, second, tolerance=1e-5):
    """Whether all of some tensors are close."""
    return all(torch.allclose(a, b, rtol=0, atol=tolerance) for a, b in zip(first, second))


def pairs(file):
    """The (A, B, magnitude) of every adapted layer in a file, by part and layer."""
    found = {}
    for key, tensor in load_file(file).items():
        name, what = re.fullmatch(r"(.*)\.lora_(A|B|magnitude_vector)(?:\.weight)?", key).groups()
        found.setdefault(name, {})[what] = tensor
    return {tuple(name.split(".", 1)): found[name] for name in found}


def by_hand(made):
    """The base model's pipeline with the adapters added into its weights: W + scale B A, by rows to the magnitudes."""
    pipeline = DiffusionPipeline.from_pretrained(made.base)
    for (part, name), sides in pairs(made.out / FILE).items():
        model = getattr(pipeline, part)
        layer = model.get_submodule(name if hasattr(model, name.split(".")[0]) else name.removeprefix("text_model."))
        product = sides["B"].flatten(1) @ sides["A"].flatten(1)
        weight = layer.weight.data + made.scale * product.view_as(layer.weight)
        if "magnitude_vector" in sides:  # arXiv:2402.09353, eq. 5
            norm = weight.flatten(1).norm(dim=1)
            weight = weight * (sides["magnitude_vector"].flatten() / norm).view(-1, *[1] * (weight.dim() - 1))
        layer.weight.data = weight
    return pipeline


# The adapters.


@for_each_kind
def test_loads_as_it_was_trained(made, kind):
    """The result and a checkpoint load in diffusers, and the models are those that were trained."""
    result = made(kind)
    base, wanted = outputs(DiffusionPipeline.from_pretrained(result.base)), outputs(result.models.pipeline)
    for folder in (result.out, result.out / "checkpoint-3"):
        pipeline = loaded(result.base, folder)
        assert close(outputs(pipeline), wanted)
    unet, *text = [not torch.allclose(a, b, atol=1e-4) for a, b in zip(wanted, base)]
    assert unet and {*text} == {"--train_text_encoder" in KINDS[kind][0]}
    assert len(text) == 1 + kind.startswith("sdxl")
    assert picture(pipeline).isfinite().all()
    assert sum(file.stat().st_size for file in result.out.glob("*.safetensors")) < 2**21


@for_each_kind
def test_arithmetic_by_hand(made, kind):
    """An adapted layer is W + alpha / rank * B A, or with rslora alpha / sqrt(rank), and as DoRA's paper has it."""
    assert close(outputs(by_hand(made(kind))), outputs(made(kind).models.pipeline))


@pytest.mark.parametrize("kind", ["default", "all", "dora", "sdxl", "sdxl-all"])
def test_at_scale_zero_it_is_the_base(made, kind):
    """Without the adapters, and at scale 0, the base's picture comes out to the last bit."""
    wanted = picture(DiffusionPipeline.from_pretrained(made(kind).base))
    pipeline = loaded(made(kind).base, made(kind).out, adapter_name="it")
    assert not torch.equal(picture(pipeline), wanted)
    if kind == "dora":
        pipeline.disable_lora()
    else:
        pipeline.set_adapters("it", 0.0)
    assert torch.equal(picture(pipeline), wanted)


@for_each_kind
def test_what_has_adapters(made, kind):
    """Each choice of layers adapts those and no other, at the rank, with alpha and all else in the file's metadata."""
    result = made(kind)
    flags = script.parse_args(flags_of(result.base, result.base, "out", *KINDS[kind][0].split()))
    unet = UNet2DConditionModel.from_pretrained(result.base / "unet")
    layers = {name for name, m in unet.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))}
    ends = {"names": {"attn1.to_q", "conv1", "time_emb_proj"}, "all": layers, "sdxl-all": layers, "dora": layers}
    ends = (ends | {"feedforward": ATTENTION | {"ff.net.0.proj", "ff.net.2"}}).get(kind, ATTENTION)
    wanted = {("unet", name) for name in layers if any(f".{name}".endswith(f".{end}") for end in ends)}
    if flags.train_text_encoder:
        projections = [f"self_attn.{side}_proj" for side in ("q", "k", "v", "out")]
        encoders, levels = text_encoders(result.models.pipeline), ("encoder.layers.0", "encoder.layers.1")
        wanted |= {(part, f"text_model.{i}.{p}") for part in encoders for i in levels for p in projections}
    found = pairs(result.out / FILE)
    assert found.keys() == wanted and len(wanted) >= 7
    assert {sides["A"].shape[0] for sides in found.values()} == {flags.rank}
    assert {sides["B"].shape[1] for sides in found.values()} == {flags.rank}
    with safe_open(result.out / FILE, "pt") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
    for part in {part for part, _ in wanted}:
        told = {name: settings[f"{part}.{name}"] for name in ("r", "lora_alpha", "use_rslora", "use_dora")}
        alpha = flags.lora_alpha or flags.rank
        assert told == {
            "r": flags.rank,
            "lora_alpha": alpha,
            "use_rslora": kind == "rslora",
            "use_dora": kind == "dora",
        }
        assert settings[f"{part}.target_modules"] == sorted(settings[f"{part}.target_modules"])  # in any process
    pipeline = loaded(result.base, result.out, adapter_name="it")
    for part in {part for part, _ in wanted}:
        config = getattr(pipeline, part).peft_config["it"]
        assert (config.r, config.lora_alpha, config.use_rslora) == (flags.rank, alpha, kind == "rslora")


@for_each_kind
def test_the_base_stays(made, kind):
    """Nothing but the adapters moves: the base's weights are in memory as they were on the disk."""
    pipeline = made(kind).models.pipeline
    for part in ("unet", "vae", *text_encoders(pipeline)):
        now = {name.replace(".base_layer", ""): t for name, t in getattr(pipeline, part).state_dict().items()}
        now = {name: tensor for name, tensor in now.items() if ".lora_" not in name}
        (file,) = (made(kind).base / part).glob("*.safetensors")
        before = load_file(file)
        assert {name for name in before} - {name for name in now} <= {"text_model.embeddings.position_ids"}
        for name, tensor in now.items():
            old = before.get(name, before.get(f"text_model.{name}"))
            assert torch.equal(tensor, old), name
    trained = {part: m for part, m in pipeline.components.items() if hasattr(m, "peft_config")}
    moving = [name for m in trained.values() for name, p in m.named_parameters() if p.requires_grad]
    assert moving and all(".lora_" in name for name in moving)
    for part, model in trained.items():
        still = {
            name.split(".self_attn")[0] for name, p in model.named_parameters() if "lora_B" in name and not p.any()
        }
        # SDXL takes the first text encoder's states before the last layer, which therefore learns nothing.
        assert still == ({"encoder.layers.1"} if part == "text_encoder" and kind.startswith("sdxl") else set())


def kohya_name(part, layer, config):
    """What kohya's scripts call a layer of a family, whose UNet's config is given."""
    if not config.addition_embed_type:
        return f"lora_{'unet' if part == 'unet' else 'te'}_{layer}".replace(".", "_")
    if part == "unet":
        return f"lora_unet_{unet_name(f'{layer}.weight', config).removesuffix('.weight')}".replace(".", "_")
    return f"lora_te{1 + script.TEXT_ENCODERS.index(part)}_{layer}".replace(".", "_")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dora"])
def test_kohya(made, kind):
    """kohya's file gives the same models in diffusers, has its names, and tells its rank, alpha and family."""
    result = made(kind)
    pipeline = loaded(result.base, result.out, weight_name=KOHYA)
    assert close(outputs(pipeline), outputs(result.models.pipeline))
    assert close([picture(pipeline)], [picture(loaded(result.base, result.out))])
    with safe_open(result.out / KOHYA, "pt") as file:
        told, names = file.metadata(), {*file.keys()}
        rank = file.get_tensor(next(name for name in sorted(names) if name.endswith("lora_down.weight"))).shape[0]
        alphas = {file.get_tensor(name).item() for name in names if name.endswith(".alpha")}
    assert [*alphas] == [pytest.approx(result.scale * rank)]  # kohya scales by alpha / rank
    modules = {kohya_name(*place, pipeline.unet.config) for place in pairs(result.out / FILE)}
    assert names == {f"{m}.{end}" for m in modules for end in ("lora_up.weight", "lora_down.weight", "alpha")}
    wanted = {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_v2": "False", "ss_seed": "1"}
    version, kind = ("sdxl_base_v1-0", "xl-v1-base") if kind.startswith("sdxl") else ("sd_v1", "v1")
    wanted |= {"ss_base_model_version": version, "ss_output_name": "out", "ss_learning_rate": "0.01"}
    wanted |= {"modelspec.architecture": f"stable-diffusion-{kind}/lora", "modelspec.title": "out"}
    assert wanted.items() <= told.items()
    assert float(told["ss_network_alpha"]) == pytest.approx(result.scale * rank)


def test_names_of_sdxl():
    """All layers of SDXL at its real size have the names that its first publication gave them."""
    blocks = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10),
            down_block_types=blocks,
            up_block_types=[name.replace("Down", "Up") for name in blocks[::-1]],
            cross_attention_dim=2048,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
            attention_head_dim=(5, 10, 20),
            use_linear_projection=True,
        )
    layers = [name for name, m in unet.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    wanted = {name: unet_name(f"{name}.weight", unet.config).removesuffix(".weight") for name in layers}
    assert {name: script.sgm_name(name, 2) for name in layers} == wanted and len({*wanted.values()}) == 794


def test_sd_2(train, tiny_v_model, tmp_path):
    """A base with SD 2's widths, linear projections and v-prediction trains, and both files load."""
    base = StableDiffusionPipeline.from_pretrained(tiny_v_model)
    text_config = base.text_encoder.config.to_dict() | {"hidden_size": 1024, "num_hidden_layers": 1}
    base.text_encoder = type(base.text_encoder)(type(base.text_encoder.config).from_dict(text_config))
    wide = {"cross_attention_dim": 1024, "use_linear_projection": True, "attention_head_dim": [2, 4]}
    base.unet = UNet2DConditionModel.from_config(dict(base.unet.config) | wide)
    base.save_pretrained(tmp_path / "base")
    flags = ("--pretrained_model_name_or_path", tmp_path / "base", "--output_kohya_format", "--train_text_encoder")
    out = train("out", *flags, "--lora_target_modules", "all")
    draw = picture(loaded(tmp_path / "base", out))
    assert close([draw], [picture(loaded(tmp_path / "base", out, weight_name=KOHYA))])
    assert not close([draw], [picture(StableDiffusionPipeline.from_pretrained(tmp_path / "base"))], 1e-3)
    with safe_open(out / KOHYA, "pt") as file:
        told = file.metadata()
    wanted = {"ss_v2": "True", "ss_base_model_version": "sd_v2"}
    assert wanted.items() <= told.items() and told["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"


@pytest.mark.parametrize("name", ["nonsense", "norm1", "q", "attention"])
def test_unknown_layers_are_refused(train, name):
    """A name that no layer has is refused by itself, also beside one that layers have."""
    with pytest.raises(SystemExit, match=rf"^--lora_target_modules {name}: [^\n]*$"):
        train("out", "--lora_target_modules", "to_q", name)


# Numbers.


class Sum(torch.nn.Module):
    """A layer's weight with the product of two low-rank factors added."""

    def __init__(self, sides, scale):
        super().__init__()
        self.a, self.b, self.scale = torch.nn.Parameter(sides["A"]), torch.nn.Parameter(sides["B"]), scale

    def forward(self, weight):
        return weight + self.scale * self.b @ self.a


@pytest.mark.parametrize(
    "flags, scale", [("--rank 3 --lora_alpha 6", 2), ("--rank 4 --use_rslora --lora_alpha 5", 2.5)]
)
def test_training_by_hand(train, tiny_model, monkeypatch, flags, scale):
    """Losses, norms and factors are those of a plain loop without peft, whose gradients are clipped."""
    start = train("start", *flags.split(), "--learning_rate", 0, "--max_train_steps", 1)
    batches, original = [], script.compute_loss
    monkeypatch.setattr(script, "compute_loss", lambda m, batch, a: (batches.append(batch), original(m, batch, a))[1])
    flags = (*flags.split(), "--max_grad_norm", 0.01, "--adam_weight_decay", 0.5, "--snr_gamma", 5)
    out = train("out", *flags, "--max_train_steps", 4)
    unet = UNet2DConditionModel.from_pretrained(tiny_model / "unet").requires_grad_(False).train()
    sums = {name: Sum(sides, scale) for (_, name), sides in sorted(pairs(start / FILE).items())}
    assert all(not s.b.any() and s.a.std() > 0 for s in sums.values())  # so that it starts as the base
    for name, module in sums.items():
        parametrize.register_parametrization(unet.get_submodule(name), "weight", module)
    scheduler = DDPMScheduler.from_pretrained(tiny_model / "scheduler")
    scaling = AutoencoderKL.from_pretrained(tiny_model / "vae").config.scaling_factor
    factors = [factor for module in sums.values() for factor in (module.a, module.b)]
    optimizer = torch.optim.AdamW(factors, lr=1e-2, weight_decay=0.5)
    losses, norms = [], []
    for batch in batches:
        latents = (batch["mean"] + batch["std"] * batch["posterior_noise"]) * scaling
        noisy = scheduler.add_noise(latents, batch["noise"], batch["timesteps"])
        prediction = unet(noisy, batch["timesteps"], batch["encoder_hidden_states"]).sample
        alphas = scheduler.alphas_cumprod[batch["timesteps"]]
        loss = F.mse_loss(prediction, batch["noise"], reduction="none").mean(dim=(1, 2, 3))
        loss = (loss * (5 * (1 - alphas) / alphas).clamp(max=1)).mean()
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.nn.utils.clip_grad_norm_(factors, 0.01).item())
        optimizer.step()
        optimizer.zero_grad()
    assert len(batches) == 4 and min(norms) > 0.01  # else nothing was clipped
    for name, wanted in (("loss", losses), ("grad_norm", norms)):
        assert metrics(out, name) == [(i + 1, pytest.approx(value, rel=1e-3)) for i, value in enumerate(wanted)]
    for (_, name), sides in pairs(out / FILE).items():
        torch.testing.assert_close(sides["A"], sums[name].a, rtol=0, atol=2e-4)
        torch.testing.assert_close(sides["B"], sums[name].b, rtol=0, atol=2e-4)


@pytest.mark.parametrize("flags", [(), ("--train_text_encoder",)])
def test_precision(train, tiny_model, monkeypatch, flags):
    """In bf16 the base is in half precision in memory, and the adapters and moments in float32."""
    models, original = [], script.save_model
    monkeypatch.setattr(script, "save_model", lambda args, m: (models.append(m), original(args, m)))
    validation = ("--validation_samples", 1, "--validation_prompt", "red", "--num_validation_images", 1)
    common = (*flags, *validation, "--validation_steps", 3, "--checkpointing_steps", 3)
    full, half = train("full", *common), train("half", *common, "--mixed_precision", "bf16")
    for model in [models[1].pipeline.unet, *([models[1].pipeline.text_encoder] if flags else [])]:
        kinds = {(".lora_" in name, p.dtype, p.requires_grad) for name, p in model.named_parameters()}
        assert kinds == {(True, torch.float32, True), (False, torch.bfloat16, False)}
    base, now = load_file(next((tiny_model / "unet").glob("*.safetensors"))), models[1].pipeline.unet.state_dict()
    now = {name.replace(".base_layer", ""): tensor for name, tensor in now.items()}
    assert all(torch.equal(now[name], tensor.bfloat16()) for name, tensor in base.items())
    for out in (half, half / "checkpoint-3"):
        tensors = load_file(out / FILE).values()
        assert {tensor.dtype for tensor in tensors} == {torch.float32}
        assert not all(torch.equal(tensor, tensor.bfloat16().float()) for tensor in tensors)
    state = flat(torch.load(half / "checkpoint-3" / "optimizer.bin", weights_only=True)["state"])
    assert {value.dtype for value in state.values() if torch.is_tensor(value)} == {torch.float32}
    for name in ("loss", "validation_loss"):
        first, rounded = metrics(full, name)[0][1], metrics(half, name)[0][1]
        assert first != rounded == pytest.approx(first, rel=2e-2)
    assert (half / "samples" / "step-000003.png").exists()


def test_two_rates(train):
    """--text_encoder_lr is the rate of the text encoder's adapters and of no other; without it they have the same."""
    common = ("--train_text_encoder", "--adam_weight_decay", 0)
    start = pairs(train("start", *common, "--learning_rate", 0, "--max_train_steps", 1) / FILE)
    for part, rates in {"unet": (1e-2, 0), "text_encoder": (0, 1e-2)}.items():
        now = pairs(train(part, *common, "--learning_rate", rates[0], "--text_encoder_lr", rates[1]) / FILE)
        moved = {key for key in now if not torch.equal(now[key]["B"], start[key]["B"])}
        assert moved == {key for key in start if key[0] == part} != set()
    same_rates = train("same", *common, "--text_encoder_lr", 1e-2)
    torch.manual_seed(5)  # the first weights come from --seed all the same
    assert same(load_file(same_rates / FILE), load_file(train("one", *common) / FILE))


def groups_of(out):
    """The optimizer's groups in the only checkpoint of a folder."""
    (file,) = out.glob("checkpoint-*/optimizer.bin")
    return torch.load(file, weights_only=True)["param_groups"]


def test_settings_of_the_text_encoders(train, tiny_sdxl_model):
    """--text_encoder_lr and --adam_weight_decay_text_encoder are of both text encoders and not of the UNet."""
    flags = ("--pretrained_model_name_or_path", tiny_sdxl_model, "--train_text_encoder", "--adam_weight_decay", 0.3)
    flags += ("--max_train_steps", 1, "--checkpointing_steps", 1)
    out = train("out", *flags, "--text_encoder_lr", 2e-3, "--adam_weight_decay_text_encoder", 0.1)
    parts = [part for part, _ in pairs(out / FILE)]
    sizes = [2 * parts.count(part) for part in ("unet", "text_encoder", "text_encoder_2")]
    settings = [(len(group["params"]), group["lr"], group["weight_decay"]) for group in groups_of(out)]
    assert settings == [(size, *rest) for size, rest in zip(sizes, [(1e-2, 0.3), (2e-3, 0.1), (2e-3, 0.1)])]
    alike = groups_of(train("alike", *flags))
    assert [(group["lr"], group["weight_decay"]) for group in alike] == [(1e-2, 0.3)] * 3


def test_checkpointing_reaches_the_text_encoder(train):
    """Recomputed activations give the same losses and adapters, also where the gradients pass the text encoder."""
    plain = train("plain", "--train_text_encoder", "--lora_target_modules", "all")
    saving = train("saving", "--train_text_encoder", "--lora_target_modules", "all", "--gradient_checkpointing")
    assert metrics(saving, "loss") == [(i, pytest.approx(loss, rel=1e-4)) for i, loss in metrics(plain, "loss")]
    first, second = load_file(plain / FILE), load_file(saving / FILE)
    assert all(torch.allclose(first[name], second[name], atol=2e-3) for name in first)
    assert all(tensor.any() for name, tensor in second.items() if "text_encoder" in name and "lora_B" in name)


def test_dropout(train):
    """--lora_dropout drops inputs while training, and none when the held-out loss is measured."""
    flags = ("--validation_samples", 1, "--validation_steps", 3, "--checkpointing_steps", 3)
    plain, dropped = train("plain", *flags), train("out", *flags, "--lora_dropout", 0.9)
    first, second = metrics(plain, "loss"), metrics(dropped, "loss")
    assert first[0] == second[0] and first[1] != second[1]  # B starts at 0, so it shows from the second step on
    measured = metrics(dropped, "validation_loss")
    train("out", *flags, "--lora_dropout", 0, "--resume_from_checkpoint", "latest")  # measures the same weights again
    assert metrics(dropped, "validation_loss") == measured


def test_prodigy(train, tiny_model):
    """Prodigy starts with rate 1, takes AdamW's settings, and finds its step by itself."""
    args = script.parse_args(flags_of(tiny_model, tiny_model, "out", "--optimizer", "Prodigy", "--learning_rate", 0.5))
    assert (args.optimizer, args.learning_rate) == ("prodigy", 0.5)
    argv = ["--pretrained_model_name_or_path", str(tiny_model), "--train_data_dir", str(tiny_model)]
    assert script.parse_args([*argv, "--optimizer", "prodigy"]).learning_rate == 1.0
    flags = ("--optimizer", "prodigy", "--learning_rate", 1, "--adam_beta2", 0.998, "--adam_weight_decay", 0.02)
    out = train("out", *flags, "--checkpointing_steps", 30, "--max_train_steps", 30, "--adam_epsilon", 1e-7)
    (group,) = torch.load(out / "checkpoint-30" / "optimizer.bin", weights_only=True)["param_groups"]
    assert (group["betas"], group["weight_decay"], group["eps"]) == ((0.9, 0.998), 0.02, 1e-7)
    assert group["safeguard_warmup"] and group["use_bias_correction"]
    assert group["d"] > group["d0"] and group["k"] == 30  # it has begun to grow


def test_prodigys_flags(train):
    """Each of Prodigy's flags reaches the optimizer, by its default or as given, and also as a run goes on."""
    names = ("beta3", "decouple", "use_bias_correction", "safeguard_warmup")
    flags = ("--optimizer", "prodigy", "--learning_rate", 1, "--max_train_steps", 1, "--checkpointing_steps", 1)
    (group,) = groups_of(train("plain", *flags))
    assert [group[name] for name in names] == [None, True, True, True]
    given = {"beta3": 0.9, "decouple": False, "use_bias_correction": False, "safeguard_warmup": False}
    words = [word for name, value in given.items() for word in (f"--prodigy_{name}", str(value))]
    (group,) = groups_of(train("given", *flags, *words))
    assert {name: group[name] for name in names} == given
    flags += ("--max_train_steps", 2, "--checkpoints_total_limit", 1, "--resume_from_checkpoint", "latest")
    (group,) = groups_of(train("plain", *flags, *words))
    assert {name: group[name] for name in names} == given and group["k"] == 2


# Resuming and stopping.


RESUMED = {
    "adamw": "--train_text_encoder --lora_dropout 0.2 --lora_target_modules all --random_flip --lr_scheduler cosine "
    "--validation_samples 1 --validation_steps 2 --text_encoder_lr 1e-3 --proportion_empty_prompts 0.3",
    "prodigy": "--optimizer prodigy --learning_rate 1 --use_dora --lora_dropout 0.1",
    "8bit": "--use_8bit_adam --rank 128 --no_encoding_cache",
    "sdxl": "--train_text_encoder --lora_dropout 0.1 --text_encoder_lr 1e-3 --proportion_empty_prompts 0.3",
}


@pytest.mark.parametrize("kind", RESUMED)
def test_resuming_is_exact_at_every_step(train, tiny_model, tiny_sdxl_model, kind):
    """Whatever step a run is resumed at, it ends with the same bits of adapters, optimizer and log."""
    flags = ("--pretrained_model_name_or_path", tiny_sdxl_model if kind == "sdxl" else tiny_model)
    flags += ("--max_train_steps", 4, "--train_batch_size", 1, "--gradient_accumulation_steps", 2)
    flags += ("--checkpointing_steps", 1, *RESUMED[kind].split())
    whole = train("whole", *flags)
    state = flat(torch.load(whole / "checkpoint-4" / "optimizer.bin", weights_only=True))
    kinds = {value.dtype for value in state.values() if torch.is_tensor(value)}
    assert len({loss for _, loss in metrics(whole, "loss")}) == 4 and (torch.uint8 in kinds) == (kind == "8bit")
    for step in (1, 2, 3) if kind == "adamw" else (2,):
        begun = whole.with_name(f"from-{step}") / f"checkpoint-{step}"
        shutil.copytree(whole / begun.name, begun)
        resumed = train(begun.parent.name, *flags, "--resume_from_checkpoint", "latest")
        assert logged(resumed) == logged(whole), f"resumed at step {step}"
        assert same(weights(resumed / "checkpoint-4"), weights(whole / "checkpoint-4"))
        assert same(load_file(resumed / FILE), load_file(whole / FILE))
        after = flat(torch.load(resumed / "checkpoint-4" / "optimizer.bin", weights_only=True))
        assert after.keys() == state.keys()
        equal = {True: torch.equal, False: operator.eq}
        differ = {key for key, value in state.items() if not equal[torch.is_tensor(value)](after[key], value)}
        assert differ == set(), f"resumed at step {step}"


@pytest.mark.parametrize(
    "flags", ["--rank 8", "--use_dora", "--optimizer prodigy --learning_rate 1", "--train_text_encoder"]
)
def test_other_adapters_are_refused(train, flags):
    """A checkpoint goes on with adapters and an optimizer such as it holds, or not at all."""
    train("out", "--checkpointing_steps", 2, "--max_train_steps", 2)
    with pytest.raises(SystemExit, match="The checkpoint was trained with another"):
        train("out", *flags.split(), "--resume_from_checkpoint", "latest")


@pytest.fixture(scope="module")
def server():
    """The server that runs are forked from."""
    forked.start_server("train_lora", "train_text_to_image")


@pytest.mark.launch
def test_stops_and_kills(server, tiny_model, pictures, tmp_path):
    """A SIGTERM ends with 143 and a checkpoint, a kill -9 leaves the last one, and both go on to the same bits."""
    flags = ("--train_text_encoder", "--lora_dropout", 0.1, "--lora_target_modules", "attention+feedforward")
    flags += ("--encoding_cache_dir", tmp_path / "cache", "--resume_from_checkpoint", "latest", "--use_rslora")
    arguments = flags_of(tiny_model, pictures, tmp_path / "out", *flags, "--max_train_steps", 1000)
    runs = []

    def steps_done():
        return [int(path.name.removeprefix("checkpoint-")) for path in (tmp_path / "out").glob("checkpoint-*")]

    def rows():
        file = tmp_path / "out" / "logs" / "metrics.jsonl"
        return len(file.read_text().splitlines()) if file.exists() else 0

    try:
        runs.append(forked.fork("train_lora", arguments, tmp_path / "first.log"))
        runs[0].until(lambda: rows() >= 3)
        os.kill(runs[0].pid, signal.SIGTERM)
        assert runs[0].wait() == 143, runs[0].output()
        (stopped,) = steps_done()
        command = [sys.executable, str(ROOT / "train_lora.py"), *arguments, "--checkpointing_steps", "2"]
        # Sets come in another order in each process.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "1"}
        with open(tmp_path / "second.log", "w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        second = forked.Run(process, tmp_path / "second.log")
        runs.append(second)
        second.until(lambda: len(steps_done()) >= 3)
        os.kill(second.pid, signal.SIGKILL)
        assert second.wait() == -signal.SIGKILL
        length = max(steps_done()) + 2
    finally:
        for process in runs:
            process.end()
    assert "Resuming from" in second.output() and stopped >= 3
    for name in ("out", "whole"):
        run(script, *flags_of(tiny_model, pictures, tmp_path / name, *flags, "--max_train_steps", length))
    assert same(load_file(tmp_path / "out" / FILE), load_file(tmp_path / "whole" / FILE))
    assert logged(tmp_path / "out") == logged(tmp_path / "whole")


@pytest.mark.launch
def test_two_processes_are_one(server, train, tiny_model, pictures, tmp_path):
    """Two processes train both models as one does."""
    flags = ("--train_text_encoder", "--gradient_accumulation_steps", 2, "--validation_samples", 1)
    flags += ("--validation_steps", 2, "--lora_target_modules", "all", "--validation_prompt", "red")
    one = train("one", *flags, "--train_batch_size", 2)
    logs = iter([tmp_path / "0.log", tmp_path / "1.log"])

    def start(arguments, environment):
        return forked.fork("train_lora", arguments, next(logs), environment=environment)

    arguments = flags_of(tiny_model, pictures, tmp_path / "more", *flags, "--train_batch_size", 1)
    ranks = start_ranks(start, arguments, 2)
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].output()
    for name in ("loss", "grad_norm", "validation_loss"):
        assert metrics(tmp_path / "more", name) == [(i, pytest.approx(v, rel=1e-3)) for i, v in metrics(one, name)]
    first, second = load_file(one / FILE), load_file(tmp_path / "more" / FILE)
    assert first.keys() == second.keys()
    moved = math.fsum(t.double().square().sum() for name, t in first.items() if "lora_B" in name)
    apart = math.fsum((t - second[name]).double().square().sum() for name, t in first.items())
    assert apart < 1e-4 * moved


# The two ways.


@pytest.mark.parametrize("way", [0, 1])
def test_defaults_of_the_ways(tiny_model, pictures, tmp_path, monkeypatch, capsys, way):
    """Each way has its defaults, as the reference's two scripts have them, and says them; a given flag wins."""
    wanted = [
        dict(
            learning_rate=1e-4, train_batch_size=16, num_train_epochs=100, validation_epochs=1, caption_column="text"
        ),
        dict(learning_rate=5e-4, train_batch_size=4, num_train_epochs=1, validation_epochs=50, caption_column=None),
    ][way]
    wanted["output_dir"] = ("sd-model-finetuned-lora", "lora-dreambooth-model")[way]
    wanted["tracker_project_name"] = ("text2image-fine-tune", "dreambooth-lora")[way]
    data = (["--train_data_dir"], ["--instance_prompt", "a sks", "--instance_data_dir"])[way]
    flags = ["--pretrained_model_name_or_path", str(tiny_model), *data, str(pictures)]
    args = script.parse_args(flags)
    assert {name: getattr(args, name) for name in wanted} == wanted
    given = {"learning_rate": 0.5, "train_batch_size": 3, "output_dir": "mine", "caption_column": "text"}
    args = script.parse_args([*flags, *(word for name, v in given.items() for word in (f"--{name}", str(v)))])
    assert {name: getattr(args, name) for name in given} == given
    assert script.parse_args([*flags, "--validation_steps", "5"]).validation_epochs is None
    monkeypatch.chdir(tmp_path)
    run(script, *flags, "--max_train_steps", 1, "--train_batch_size", 1, "--resolution", 16, "--report_to", "none")
    said = capsys.readouterr().out
    assert all(f"{name} {v}" in said for name, v in wanted.items() if name != "train_batch_size")
    assert (tmp_path / wanted["output_dir"] / FILE).exists() and "train_batch_size 1," in said


class Stopped(Exception):
    """Ends a run where it would begin to train."""


@pytest.mark.parametrize("prior, epoch", [(False, 3 * 6), (True, 20)])
def test_epochs(train, tmp_path, monkeypatch, prior, epoch):
    """An epoch is --repeats passes over six pictures, or one over the class if that is longer."""
    resolved = []

    def stop(accelerator, args, *rest):
        resolved.append(args)
        raise Stopped

    monkeypatch.setattr(script, "fill_cache", stop)
    flags = ("--instance_prompt", "sks", "--num_train_epochs", 2, "--validation_epochs", 1, "--repeats", 3)
    if prior:
        made = make_pictures(tmp_path / "class", count=20)
        flags += (
            "--with_prior_preservation",
            "--class_data_dir",
            made,
            "--class_prompt",
            "a",
            "--num_class_images",
            20,
        )
    place = FLAGS.index("--max_train_steps")
    monkeypatch.setattr(sys.modules[__name__], "FLAGS", FLAGS[:place] + FLAGS[place + 2 :])
    with pytest.raises(Stopped):
        train("out", *flags)
    assert (resolved[0].max_train_steps, resolved[0].validation_steps) == (2 * epoch / 2, epoch / 2)


def captions_of(model, *flags):
    """The captions of the pictures that the flags name, in order."""
    argv = [str(flag) for flag in ("--pretrained_model_name_or_path", model, *flags)]
    return [record["captions"] for record in script.read_records(script.parse_args(argv))]


def test_captions_of_a_subject(tiny_model, tmp_path, hub):
    """Pictures without captions have --instance_prompt, in a folder, in parquet files and on the Hub."""
    folder = make_pictures(tmp_path / "folder", count=3)
    (folder / "metadata.jsonl").unlink()
    (folder / "001.txt").write_text("a sks in snow")
    prompt = ("--instance_prompt", "a sks")
    wanted = [["a sks"], ["a sks in snow"], ["a sks"]]
    for flag in ("--instance_data_dir", "--train_data_dir"):
        assert captions_of(tiny_model, flag, folder, *prompt) == wanted
    images = [{"bytes": file.read_bytes(), "path": None} for file in sorted(folder.glob("*.*g"))]
    columns = {"image": images, "text": [None, "a sks in snow", " "]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    (tmp_path / "parquet").mkdir()
    datasets.Dataset.from_dict(columns, features).to_parquet(tmp_path / "parquet" / "train.parquet")
    hub.add_folder("datasets/me/subject", tmp_path / "parquet")
    for source in (("--instance_data_dir", tmp_path / "parquet"), ("--dataset_name", "me/subject")):
        assert captions_of(tiny_model, *source, *prompt, "--caption_column", "text") == wanted
        assert captions_of(tiny_model, *source, *prompt) == [["a sks"]] * 3
    with pytest.raises(SystemExit, match="--caption_column wrong is not among"):
        captions_of(tiny_model, "--dataset_name", "me/subject", *prompt, "--caption_column", "wrong")


def test_the_loss_is_that_of_dreambooth():
    """The loss is DreamBooth's word for word, which test_dreambooth.py computes by hand."""
    assert inspect.getsource(script.compute_loss) == inspect.getsource(train_dreambooth.compute_loss)


def test_prior_preservation(train, pictures, tmp_path):
    """A subject is trained beside its class, and the loss is the sum of both."""
    made = make_pictures(tmp_path / "class", count=4)
    flags = ("--instance_data_dir", pictures, "--instance_prompt", "a sks", "--with_prior_preservation")
    flags += ("--class_data_dir", made, "--class_prompt", "a thing", "--num_class_images", 4, "--snr_gamma", 5)
    out = train("out", *flags, "--prior_loss_weight", 0.25, "--validation_samples", 1, "--train_text_encoder")
    parts = [[value for _, value in metrics(out, name)] for name in ("loss", "instance_loss", "prior_loss")]
    assert len(parts[0]) == 3
    assert all(loss == pytest.approx(mine + 0.25 * prior) for loss, mine, prior in zip(*parts))


# Flags.


MISTAKES = [
    ("--dataset_name me/data", "--train_data_dir, --dataset_name and --instance_data_dir"),
    ("--instance_data_dir {data}", "--train_data_dir, --dataset_name and --instance_data_dir"),
    ("- --dataset_name me/data --instance_data_dir {data} --instance_prompt sks", "--instance_data_dir"),
    ("-", "--train_data_dir, --dataset_name and --instance_data_dir"),
    ("- --instance_data_dir {data}", "--instance_prompt"),
    ("- --instance_data_dir nowhere --instance_prompt sks", "nowhere of --train_data_dir or --instance_data_dir"),
    ("--with_prior_preservation --class_data_dir other --class_prompt dog", "--instance_prompt"),
    ("--instance_prompt sks --with_prior_preservation --class_prompt dog", "--class_data_dir"),
    ("--instance_prompt sks --with_prior_preservation --class_data_dir other", "--class_prompt"),
    ("--instance_prompt sks --class_data_dir other", "--with_prior_preservation"),
    ("--instance_prompt sks --class_prompt dog", "--with_prior_preservation"),
    ("--instance_prompt sks --with_prior_preservation --class_prompt dog --class_data_dir {data}/class", "may lie in"),
    ("--instance_prompt sks --with_prior_preservation --class_prompt dog --class_data_dir {data}/..", "may lie in"),
    ("--train_text_encoder --pre_compute_text_embeddings", "--pre_compute_text_embeddings"),
    ("--text_encoder_lr 1e-5", "--train_text_encoder"),
    ("--optimizer prodigy --use_8bit_adam", "--use_8bit_adam"),
    ("--optimizer prodigy --train_text_encoder --text_encoder_lr 1", "--text_encoder_lr"),
    ("--optimizer prodigy --scale_lr", "--scale_lr"),
    ("--optimizer prodigy --learning_rate 1e-4", "--learning_rate"),
    ("--use_dora --output_kohya_format", "--output_kohya_format"),
    ("--resolution 500", "--resolution 500"),
    ("--rank 0", "--rank"),
    ("--lora_alpha 0", "--lora_alpha"),
    ("--lora_dropout 1", "--lora_dropout"),
    ("--lora_target_modules", "--lora_target_modules"),
    ("--optimizer sgd", "--optimizer"),
    ("--validation_steps 2 --validation_epochs 1", "--validation_epochs"),
    ("--overwrite_output_dir --resume_from_checkpoint latest", "--resume_from_checkpoint"),
    ("--resume_from_checkpoint nowhere", "nowhere"),
    ("--pretrained_model_name_or_path ./nowhere", "./nowhere"),
    ("--local_rank 0", "--local_rank"),
    ("--tokenizer_name other", "--tokenizer_name"),
    ("--do_edm_style_training", "--do_edm_style_training: it is for Playground v2.5"),
    ("--debug_loss", "--debug_loss: "),
    ("--enable_npu_flash_attention", "--enable_npu_flash_attention: "),
    ("--prodigy_decouple=maybe", "--prodigy_decouple: must be true or false, not maybe"),
    ("--prodigy_decouple=[", "--prodigy_decouple: must be true or false, not ["),
    *(
        (f"{flag} 1", f"{flag}: it is for DeepFloyd IF")
        for flag in sorted(script.REFUSED)
        if "IF" in script.REFUSED[flag]
    ),
]


@pytest.mark.parametrize("words, says", MISTAKES, ids=[words for words, _ in MISTAKES])
def test_refused(capsys, tiny_model, pictures, words, says):
    """A mistake is refused in one sentence that names the flag."""
    data = [] if words.startswith("-") and words[1:2] in ("", " ") else ["--train_data_dir", str(pictures)]
    words = words.format(data=pictures).split()
    argv = ["--pretrained_model_name_or_path", str(tiny_model), *data, *words[not data :]]
    with pytest.raises(SystemExit) as end:
        script.parse_args(argv)
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert end.value.code == 2 and says in said and len(said) < 320


@pytest.mark.parametrize(
    "words, config, wanted",
    [
        ("", "", True),
        ("--prodigy_decouple", "", True),
        ("--prodigy_decouple=False", "", False),
        ("--prodigy_decouple false --seed 1", "", False),
        ("", "prodigy_decouple: false", False),
        ("--prodigy_decouple", "prodigy_decouple: false", True),
        ("--prodigy_decouple=no", "prodigy_decouple: true", False),
    ],
)
def test_yes_or_no(tiny_model, pictures, tmp_path, words, config, wanted):
    """A flag that is on unless told otherwise is turned off as the reference's is, or by a plain no or false."""
    (tmp_path / "config.yaml").write_text(config)
    argv = ["--config", str(tmp_path / "config.yaml"), "--pretrained_model_name_or_path", str(tiny_model)]
    args = script.parse_args([*argv, "--train_data_dir", str(pictures), *words.split()])
    assert args.prodigy_decouple is wanted and args.prodigy_safeguard_warmup is True


# The flags of the reference's documented commands for its scripts of adapters, in short; those of SDXL come after.
DOCUMENTED = {
    "readme": "--dataset_name d/n --caption_column text --resolution 512 --random_flip --train_batch_size 1 --seed 42 "
    "--num_train_epochs 100 --checkpointing_steps 5000 --learning_rate 1e-04 --lr_scheduler constant "
    "--lr_warmup_steps 0 --output_dir out --validation_prompt dragon --report_to wandb",
    "guide": "--dataset_name d/n --dataloader_num_workers 8 --resolution 512 --center_crop --random_flip "
    "--train_batch_size 1 --gradient_accumulation_steps 4 --max_train_steps 15000 --learning_rate 1e-04 "
    "--max_grad_norm 1 --seed 1337 --lr_scheduler cosine --lr_warmup_steps 0 --output_dir out --push_to_hub "
    "--hub_model_id me/it --report_to wandb --checkpointing_steps 500 --validation_prompt naruto",
    "subject": "--instance_data_dir {data} --output_dir out --instance_prompt sks --resolution 512 "
    "--train_batch_size 1 --gradient_accumulation_steps 1 --checkpointing_steps 100 --learning_rate 1e-4 "
    "--report_to wandb --seed 0 --lr_scheduler constant --lr_warmup_steps 0 --max_train_steps 500 "
    "--validation_prompt sks --validation_epochs 50 --push_to_hub",
    "sdxl": "--pretrained_vae_model_name_or_path me/vae --dataset_name d/n --caption_column text --resolution 1024 "
    "--random_flip --train_batch_size 1 --num_train_epochs 2 --checkpointing_steps 500 --learning_rate 1e-04 "
    "--lr_scheduler constant --lr_warmup_steps 0 --mixed_precision fp16 --seed 42 --output_dir out "
    "--validation_prompt dragon --report_to wandb --push_to_hub",
    "sdxl-deepspeed": "--pretrained_vae_model_name_or_path me/vae --dataset_name d/n --caption_column text "
    "--resolution 1024 --train_batch_size 1 --num_train_epochs 2 --checkpointing_steps 2 --learning_rate 1e-04 "
    "--lr_scheduler constant --lr_warmup_steps 0 --mixed_precision fp16 --max_train_steps 20 --validation_epochs 20 "
    "--seed 1234 --output_dir out --validation_prompt dragon",
    "sdxl-text": "--dataset_name d/n --caption_column text --resolution 1024 --random_flip --train_batch_size 1 "
    "--num_train_epochs 2 --checkpointing_steps 500 --learning_rate 1e-04 --lr_scheduler constant "
    "--lr_warmup_steps 0 --seed 42 --output_dir out --train_text_encoder --validation_prompt dragon "
    "--report_to wandb --push_to_hub",
    "sdxl-subject": "--instance_data_dir {data} --pretrained_vae_model_name_or_path me/vae --output_dir out "
    "--mixed_precision fp16 --instance_prompt sks --resolution 1024 --train_batch_size 1 "
    "--gradient_accumulation_steps 4 --learning_rate 1e-4 --report_to wandb --lr_scheduler constant "
    "--lr_warmup_steps 0 --max_train_steps 500 --validation_prompt sks --validation_epochs 25 --seed 0 --push_to_hub "
    "--enable_xformers_memory_efficient_attention --gradient_checkpointing --use_8bit_adam --use_dora",
    # Its model is refused as it is loaded: see test_families.py.
    "playground": "--instance_data_dir {data} --output_dir out --mixed_precision fp16 --instance_prompt sks "
    "--resolution 1024 --train_batch_size 1 --gradient_accumulation_steps 4 --learning_rate 1e-4 --use_8bit_adam "
    "--report_to wandb --lr_scheduler constant --lr_warmup_steps 0 --max_train_steps 500 --validation_prompt sks "
    "--validation_epochs 25 --seed 0 --push_to_hub",
}
# All flags of the reference's four scripts of adapters: on pictures, on a subject, and those two of SDXL.
REFERENCE = """
    adam_beta1 adam_beta2 adam_epsilon adam_weight_decay adam_weight_decay_text_encoder allow_tf32 cache_dir
    caption_column center_crop checkpointing_steps checkpoints_total_limit class_data_dir class_labels_conditioning
    class_prompt dataloader_num_workers dataset_config_name dataset_name debug_loss do_edm_style_training
    enable_npu_flash_attention enable_xformers_memory_efficient_attention gradient_accumulation_steps
    gradient_checkpointing hub_model_id hub_token image_column image_interpolation_mode instance_data_dir
    instance_prompt learning_rate local_rank logging_dir lora_dropout lr_num_cycles lr_power lr_scheduler
    lr_warmup_steps max_grad_norm max_train_samples max_train_steps mixed_precision noise_offset num_class_images
    num_train_epochs num_validation_images optimizer output_dir output_kohya_format pre_compute_text_embeddings
    prediction_type pretrained_model_name_or_path pretrained_vae_model_name_or_path prior_generation_precision
    prior_loss_weight prodigy_beta3 prodigy_decouple prodigy_safeguard_warmup prodigy_use_bias_correction push_to_hub
    random_flip rank repeats report_to resolution resume_from_checkpoint revision sample_batch_size scale_lr seed
    snr_gamma text_encoder_lr text_encoder_use_attention_mask tokenizer_max_length tokenizer_name train_batch_size
    train_data_dir train_text_encoder use_8bit_adam use_dora validation_epochs validation_images validation_prompt
    variant with_prior_preservation
""".split()


@pytest.mark.parametrize("command", DOCUMENTED.values(), ids=DOCUMENTED)
def test_documented_commands(pictures, command):
    """What the reference documents for its scripts is taken, and every number arrives."""
    words = command.format(data=pictures).split()
    args = script.parse_args(["--pretrained_model_name_or_path", "owner/model", *words])
    for flag, value in zip(words, [*words[1:], "--"]):
        if flag.startswith("--"):
            got = getattr(args, flag[2:])
            assert got is True if value.startswith("--") else got == type(got)(value), flag


def test_every_flag_of_the_reference(monkeypatch):
    """Each is taken under its name, or refused with its reason."""
    assert len({*REFERENCE}) == 84
    added, original = set(), script.argparse._ActionsContainer.add_argument

    def add(self, *names, **settings):
        added.update(names)
        return original(self, *names, **settings)

    monkeypatch.setattr(script.argparse._ActionsContainer, "add_argument", add)
    with pytest.raises(SystemExit):
        script.parse_args([])
    assert {f"--{name}" for name in REFERENCE} - added == {*script.REFUSED}


def test_deepfloyd_is_refused(capsys, pictures):
    """The reference's commands for DeepFloyd IF are refused by the first flag that is of it."""
    command = "--resolution 64 --scale_lr --pre_compute_text_embeddings --tokenizer_max_length 77"
    with pytest.raises(SystemExit):
        script.parse_args(
            ["--pretrained_model_name_or_path", "a/b", "--train_data_dir", str(pictures), *command.split()]
        )
    assert "--tokenizer_max_length: it is for DeepFloyd IF" in capsys.readouterr().err


# What it leaves.


def test_what_is_published(tiny_model, pictures, tmp_path, monkeypatch, hub):
    """Both files, the card and the pictures are uploaded, none of which names a folder of this machine."""
    monkeypatch.setattr(script, "VALIDATION_STEPS", 2)
    monkeypatch.chdir(tmp_path)
    flags = ("--push_to_hub", "--hub_token", "hf_x", "--output_kohya_format", "--train_text_encoder")
    flags += ("--validation_prompt", "red", "--num_validation_images", 1, "--validation_steps", 3)
    run(script, *flags_of(tiny_model, pictures, "it", *flags))
    (files,) = [repo["files"] for repo in hub.repos.values()]
    assert files.keys() - {".gitattributes"} == {
        "README.md",
        FILE,
        KOHYA,
        *(f"samples/step-00000{i}.png" for i in (0, 3)),
    }
    for name, data in files.items():
        assert str(tmp_path).encode() not in data and str(tiny_model.parent).encode() not in data, name
        assert b"hf_x" not in data
    card = files["README.md"].decode()
    assert "\n- lora\n" in card and "| rank | 4 |" in card and "from_pretrained('tiny')" in card
    assert re.search(r"load_lora_weights\('[\w/]*it'\)", card)


@pytest.mark.parametrize("model", ["tiny_model", "tiny_sdxl_model"])
def test_the_printed_code_runs(model, request, pictures, tmp_path, monkeypatch, capsys):
    """The lines at the end of a run load base and adapters, from any folder, and draw a picture."""
    monkeypatch.chdir(tmp_path)
    base = request.getfixturevalue(model)
    run(script, *flags_of(base, pictures, "it"))
    card = (tmp_path / "it" / "README.md").read_text()  # its code is for others, who have no such folders
    assert "load_lora_weights('it')" in card and str(base.parent) not in card and str(tmp_path) not in card
    code = re.search(
        r"^import diffusers\n.*?\.save\('picture.png'\)$", capsys.readouterr().out, re.DOTALL | re.MULTILINE
    )[0]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    exec(code.replace("width=32", "width=32, num_inference_steps=2"), {})
    assert (tmp_path / "elsewhere" / "picture.png").exists()
