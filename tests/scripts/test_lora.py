"""The adapters of train_lora.py: their arithmetic, which layers have them, and their two files."""

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from helpers import KOHYA, LORA, flags_of, pairs, run
from safetensors import safe_open
from safetensors.torch import load_file
from single_file import unet_name

import train_lora as script


# Of a small run, beside those of every small run.
FLAGS = ("--max_train_steps", 3, "--learning_rate", 1e-2)
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


@pytest.fixture
def train(trainer):
    """Trains adapters on six captioned pictures."""
    return trainer(script, *FLAGS)


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
                patch.setattr(script, "save_model", lambda run, m: (models.append(m), original(run, m)))
                flags = (*KINDS[kind][0].split(), *kohya, "--checkpointing_steps", 3)
                run(script, *flags_of(base, pictures, out, *FLAGS, *flags))
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


def by_hand(made):
    """The base model's pipeline with the adapters added into its weights: W + scale B A, by rows to the magnitudes."""
    pipeline = DiffusionPipeline.from_pretrained(made.base)
    for (part, name), sides in pairs(made.out / LORA).items():
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
    flags = script.parse_args(flags_of(result.base, result.base, "out", *FLAGS, *KINDS[kind][0].split()))
    unet = UNet2DConditionModel.from_pretrained(result.base / "unet")
    layers = {name for name, m in unet.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))}
    ends = {"names": {"attn1.to_q", "conv1", "time_emb_proj"}, "all": layers, "sdxl-all": layers, "dora": layers}
    ends = (ends | {"feedforward": ATTENTION | {"ff.net.0.proj", "ff.net.2"}}).get(kind, ATTENTION)
    wanted = {("unet", name) for name in layers if any(f".{name}".endswith(f".{end}") for end in ends)}
    if flags.train_text_encoder:
        projections = [f"self_attn.{side}_proj" for side in ("q", "k", "v", "out")]
        encoders, levels = text_encoders(result.models.pipeline), ("encoder.layers.0", "encoder.layers.1")
        wanted |= {(part, f"text_model.{i}.{p}") for part in encoders for i in levels for p in projections}
    found = pairs(result.out / LORA)
    assert found.keys() == wanted and len(wanted) >= 7
    assert {sides["A"].shape[0] for sides in found.values()} == {flags.rank}
    assert {sides["B"].shape[1] for sides in found.values()} == {flags.rank}
    with safe_open(result.out / LORA, "pt") as file:
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


@pytest.mark.parametrize("name", ["nonsense", "norm1", "q"])
def test_unknown_layers_are_refused(train, name):
    """A name that no layer has is refused by itself, also beside one that layers have."""
    with pytest.raises(SystemExit, match=rf"^--lora_target_modules {name}: [^\n]*$"):
        train("out", "--lora_target_modules", "to_q", name)
    with pytest.raises(SystemExit, match=r"^--lora_target_modules attention stands alone"):
        train("out", "--lora_target_modules", name, "attention")


@for_each_kind
def test_the_base_stays(made, kind):
    """Nothing but the adapters moves: the base's weights are in memory as they were on the disk."""
    pipeline = made(kind).models.pipeline
    for part in ("unet", "vae", *text_encoders(pipeline)):
        now = {name.replace(".base_layer", ""): t for name, t in getattr(pipeline, part).state_dict().items()}
        now = {name: tensor for name, tensor in now.items() if ".lora_" not in name}
        (file,) = (made(kind).base / part).glob("*.safetensors")
        before = load_file(file)
        before, now = ({name.removeprefix("text_model."): t for name, t in one.items()} for one in (before, now))
        assert before.keys() - now.keys() <= {"embeddings.position_ids"}
        for name, tensor in now.items():
            assert torch.equal(tensor, before[name]), name
    trained = {part: m for part, m in pipeline.components.items() if hasattr(m, "peft_config")}
    moving = [name for m in trained.values() for name, p in m.named_parameters() if p.requires_grad]
    assert moving and all(".lora_" in name for name in moving)
    for part, model in trained.items():
        still = {
            name.split(".self_attn")[0] for name, p in model.named_parameters() if "lora_B" in name and not p.any()
        }
        # SDXL takes the first text encoder's states before the last layer, which therefore learns nothing.
        assert still == ({"encoder.layers.1"} if part == "text_encoder" and kind.startswith("sdxl") else set())


# kohya's file.


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
    modules = {kohya_name(*place, pipeline.unet.config) for place in pairs(result.out / LORA)}
    assert names == {f"{m}.{end}" for m in modules for end in ("lora_up.weight", "lora_down.weight", "alpha")}
    wanted = {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_v2": "False", "ss_seed": "1"}
    version, kind = ("sdxl_base_v1-0", "xl-v1-base") if kind.startswith("sdxl") else ("sd_v1", "v1")
    wanted |= {"ss_base_model_version": version, "ss_output_name": "out", "ss_learning_rate": "0.01"}
    wanted |= {"modelspec.architecture": f"stable-diffusion-{kind}/lora", "modelspec.title": "out"}
    assert wanted.items() <= told.items()
    assert float(told["ss_network_alpha"]) == pytest.approx(result.scale * rank)
    whole, last = load_file(result.out / KOHYA), load_file(result.out / "checkpoint-3" / KOHYA)
    assert whole.keys() == last.keys() and all(torch.equal(whole[name], last[name]) for name in whole)


def test_kohya_of_a_checkpoint(train, tiny_model):
    """Each checkpoint has kohya's file of its own step, and its manifest names it."""
    out = train("out", "--output_kohya_format", "--checkpointing_steps", 1)
    draws = []
    for step in (1, 2, 3):
        checkpoint = out / f"checkpoint-{step}"
        assert KOHYA in json.loads((checkpoint / "manifest.json").read_text())
        draws.append(picture(loaded(tiny_model, checkpoint, weight_name=KOHYA)))
        assert close(draws[-1:], [picture(loaded(tiny_model, checkpoint))])
    assert not close(draws[:1], draws[1:2], 1e-3) and not close(draws[1:2], draws[2:], 1e-3)


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
    assert {name: script.sgm_name(name, unet.config) for name in layers} == wanted and len({*wanted.values()}) == 794


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
    wanted = {"ss_v2": "True", "ss_base_model_version": "sd_v2_v"}
    assert wanted.items() <= told.items() and told["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
