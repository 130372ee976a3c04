"""What textual_inversion.py leaves: vectors that load in diffusers, whole pipelines, the card."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from helpers import WORD, encode, files_of, flags_of, make_run, optimizer_state, run, same, vectors, watch, weights
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTokenizer

import textual_inversion as script


WORDS = ("--placeholder_token", WORD, "--initializer_token", "red", "--num_vectors", 3)
FLAGS = (*WORDS, "--learning_rate", 1e-2, "--save_steps", 0)


@pytest.fixture
def train(trainer):
    """Trains three vectors on six pictures."""
    return trainer(script, *FLAGS)


@pytest.fixture
def seen(monkeypatch):
    """What runs load and train on."""
    return watch(monkeypatch, script)


@pytest.fixture(scope="module")
def finished(tiny_model, pictures, tmp_path_factory):
    """The output folder of a run with the whole pipeline in it, in bf16."""
    out = tmp_path_factory.mktemp("finished") / "out"
    flags = ("--save_as_full_pipeline", "--mixed_precision", "bf16", "--checkpointing_steps", 2, "--save_steps", 3)
    run(script, *flags_of(tiny_model, pictures, out, *FLAGS, *flags, "--learning_rate", 0.1))
    return out


def load_files(base, folder, files):
    """The base model's pipeline with the vectors of a folder's files, each in the text encoder of its number."""
    pipeline = DiffusionPipeline.from_pretrained(base)
    for name in files:
        if "_xl" not in name:  # which is for other programs
            part = "_2" if "_2" in name else ""
            parts = {kind: getattr(pipeline, f"{kind}{part}") for kind in ("text_encoder", "tokenizer")}
            pipeline.load_textual_inversion(folder, weight_name=name, **parts)
    return pipeline


def draw(pipeline, prompt):
    """A small picture from a fixed seed, as numbers."""
    pipeline.set_progress_bar_config(disable=True)
    settings = {"height": 32, "width": 32, "num_inference_steps": 3, "output_type": "pt"}
    return pipeline(prompt, generator=torch.Generator().manual_seed(0), **settings).images[0]


def test_the_result_loads_in_diffusers(finished, tiny_model):
    """The file, a checkpoint and the whole pipeline give the word its vectors, and other words what they had."""
    base = StableDiffusionPipeline.from_pretrained(tiny_model)
    plain, unknown = draw(base, "a red one"), draw(base, f"a {WORD}")
    loaded = StableDiffusionPipeline.from_pretrained(tiny_model)
    loaded.load_textual_inversion(finished)
    whole = StableDiffusionPipeline.from_pretrained(finished)
    for pipeline in (loaded, whole):
        assert torch.equal(draw(pipeline, "a red one"), plain)
        assert not torch.equal(draw(pipeline, f"a {WORD}"), unknown)
        ids = pipeline.tokenizer(pipeline.maybe_convert_prompt(f"a {WORD} b", pipeline.tokenizer)).input_ids
        rows = pipeline.text_encoder.get_input_embeddings().weight[ids]
        assert torch.equal(rows[2:5], vectors(finished)) and len(ids) == 7
    assert torch.equal(draw(loaded, f"a {WORD}"), draw(whole, f"a {WORD}"))
    for folder, name in ((finished / "checkpoint-4", None), (finished, "learned_embeds-steps-3.safetensors")):
        pipeline = StableDiffusionPipeline.from_pretrained(tiny_model)
        pipeline.load_textual_inversion(folder, weight_name=name)
        same_as_last = torch.equal(draw(pipeline, f"a {WORD}"), draw(loaded, f"a {WORD}"))
        assert same_as_last == (name is None)
    assert {file.suffix for file in (finished / "checkpoint-4").iterdir()} == {
        ".json",
        ".jsonl",
        ".bin",
        ".safetensors",
    }


@pytest.mark.parametrize("model", ["tiny_model", "tiny_sdxl_model"])
def test_training_sees_what_the_pipeline_makes(train, seen, request, model):
    """A caption's embeddings are those that diffusers gives the prompt with the word in it."""
    base = request.getfixturevalue(model)
    out = train("out", "--learning_rate", 0.1, "--pretrained_model_name_or_path", base)
    models = seen.models
    pipeline = load_files(base, out, files_of(model))
    caption, prompt = (f"a picture of {tokens}" for tokens in (f"{WORD} {WORD}_1 {WORD}_2", WORD))
    settings = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    with torch.no_grad():
        trained = encode(script, models, [caption])
        for each in (pipeline, models.pipeline):
            states, _, *pooled = each.encode_prompt(prompt, **settings)
            torch.testing.assert_close(trained["encoder_hidden_states"], states)
            assert len(pooled) == 2 * (model == "tiny_sdxl_model")
            if pooled:
                torch.testing.assert_close(trained["text_embeds"], pooled[0])


def test_the_whole_pipeline_is_the_base(finished, tiny_model):
    """It holds the base's float32 weights bit for bit, also after bf16, with the new rows at the end."""
    before, after = weights(tiny_model), weights(finished)
    for name, tensor in before.items():
        if name.endswith("token_embedding.weight"):
            assert torch.equal(after[name][: len(tensor)], tensor)
            assert torch.equal(after[name][len(tensor) :], vectors(finished))
        else:
            assert torch.equal(after[name], tensor), name


@pytest.fixture(scope="module")
def finished_sdxl(tiny_sdxl_model, pictures, tmp_path_factory):
    """The output folder of such a run on SDXL, and the models that it trained."""
    out, models, original = tmp_path_factory.mktemp("finished") / "out", [], script.load_models
    flags = ("--save_as_full_pipeline", "--mixed_precision", "bf16", "--checkpointing_steps", 2, "--save_steps", 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "load_models", lambda run: models.append(original(run)) or models[0])
        more = ("--learning_rate", 0.1, "--adam_weight_decay", 1)
        run(script, *flags_of(tiny_sdxl_model, pictures, out, *FLAGS, *flags, *more))
    return out, models[0]


def test_sdxls_files_load_in_diffusers(finished_sdxl, tiny_sdxl_model):
    """Each file gives its text encoder the word; both are the whole pipeline; other words keep what they had."""
    out, _ = finished_sdxl
    first, second, both = files_of(tiny_sdxl_model)
    base = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl_model)
    plain, unknown = draw(base, "a red one"), draw(base, f"a {WORD}")
    pictures = {}
    for files in ([first], [second], [first, second]):
        pipeline = load_files(tiny_sdxl_model, out, files)
        assert torch.equal(draw(pipeline, "a red one"), plain)
        pictures[len(pictures)] = draw(pipeline, f"a {WORD}")
    assert len({picture.numpy().tobytes() for picture in (unknown, *pictures.values())}) == 4
    whole = StableDiffusionXLPipeline.from_pretrained(out)
    assert torch.equal(draw(whole, f"a {WORD}"), pictures[2]) and torch.equal(draw(whole, "a red one"), plain)
    assert same(load_file(out / both), {"clip_l": vectors(out, first), "clip_g": vectors(out, second)})
    for name in (first, second):
        assert torch.equal(vectors(out / "checkpoint-4", name), vectors(out, name))
        copy = vectors(out, name.replace(".", "-steps-3."))
        assert copy.shape == vectors(out, name).shape and not torch.equal(copy, vectors(out, name))


def test_only_sdxls_vectors_move(finished_sdxl, tiny_sdxl_model):
    """Both tables and encoders stay bit for bit, in memory and in the whole pipeline; all new rows move."""
    out, models = finished_sdxl
    before, after = weights(tiny_sdxl_model), weights(out)
    for part, encoder, name in zip(script.TEXT_ENCODERS, models.text_encoders, files_of(tiny_sdxl_model)):
        (table,) = (
            f"{part}/{key}" for key in weights(tiny_sdxl_model / part) if key.endswith("token_embedding.weight")
        )
        embeddings = encoder.get_input_embeddings()
        assert torch.equal(embeddings.table.weight, before[table])
        assert torch.equal(after[table], torch.cat([before[table], vectors(out, name)]))
        assert torch.equal(embeddings.rows, vectors(out, name))
        tokenizer = CLIPTokenizer.from_pretrained(tiny_sdxl_model / part.replace("text_encoder", "tokenizer"))
        ids = tokenizer("red", add_special_tokens=False).input_ids
        assert (vectors(out, name) != before.pop(table)[ids]).any(dim=1).all()
        start = type(encoder).from_pretrained(tiny_sdxl_model / part).state_dict()
        now = {key.replace(".table.", "."): t for key, t in encoder.state_dict().items() if not key.endswith(".rows")}
        assert same(now, start), part
    assert same({name: after[name] for name in before}, before)
    held = [tensor.shape for tensor in optimizer_state(out / "checkpoint-4").values() if tensor.ndim > 1]
    assert sorted({*held}) == [(3, 32), (3, 48)]


def test_without_the_flag_there_is_no_pipeline(train):
    """The result is the file alone, of some hundred bytes, with its card."""
    out = train("out")
    assert {path.name for path in out.iterdir()} == {
        ".lock", "README.md", "learned_embeds.safetensors", "logs", "samples", "state.json", "train_args.yaml",
    }  # fmt: skip
    assert (out / "learned_embeds.safetensors").stat().st_size < 1000


@pytest.mark.parametrize("model", ["tiny_model", "tiny_sdxl_model"])
@pytest.mark.parametrize("flags", [(), ("--save_as_full_pipeline",)], ids=["file", "pipeline"])
def test_the_lines_that_load_it(train, seen, request, tmp_path, monkeypatch, capsys, model, flags):
    """Those printed at the end make a picture; those in the card name no folder of this machine."""
    base = request.getfixturevalue(model)
    out = train("out", *flags, "--max_train_steps", 1, "--pretrained_model_name_or_path", base)
    code = capsys.readouterr().out.split("To load it:")[1].replace("width=32", "width=32, num_inference_steps=2")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert Image.open(tmp_path / "picture.png").size == (32, 32)
    tokenizers = [part for name, part in names["pipeline"].components.items() if name.startswith("tokenizer")]
    assert len(tokenizers) == 1 + (model == "tiny_sdxl_model")
    assert [len(tokenizer.tokenize(WORD)) for tokenizer in tokenizers] == [1] * len(tokenizers)
    card = (out / "README.md").read_text()
    assert str(tmp_path.parent) not in card and (f"'{base.name}'" in card) == (not flags) and "'out'" in card
    if not flags:  # also where the folder's name is all that was given
        args = script.parse_args(["--config", str(out / "train_args.yaml"), "--output_dir", "out"])
        assert str(tmp_path.parent) not in script.loading_code(make_run(script, args), seen.models, "out")


def test_push_the_vectors(hub, train):
    """What is uploaded is the result and its card: no checkpoints, no logs, no arguments."""
    flags = ("--push_to_hub", "--hub_token", "hf_secret", "--checkpointing_steps", 2, "--save_steps", 3)
    out = train("out", *flags, "--validation_prompt", WORD, "--num_validation_images", 1)
    files = hub.repos["me/out"]["files"]
    grids = {f"samples/step-{step:06d}.png" for step in (0, 4)}
    assert {*files} - {".gitattributes"} == {
        "README.md", "learned_embeds.safetensors", "learned_embeds-steps-3.safetensors", *grids
    }  # fmt: skip
    assert files["learned_embeds.safetensors"] == (out / "learned_embeds.safetensors").read_bytes()
    assert b"load_textual_inversion('me/out')" in files["README.md"]
    whole = train("whole", *flags, "--save_as_full_pipeline")
    files = hub.repos["me/whole"]["files"]
    local = {str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file()}
    assert {*files} - {".gitattributes"} == {
        name for name in local if not name.startswith((".lock", "checkpoint-", "logs/", "state", "train_args"))
    }


def test_deepspeed_is_refused():
    """It would keep the one tensor that is trained in 16 bits."""
    accelerator = SimpleNamespace(distributed_type=script.DistributedType.DEEPSPEED)
    with pytest.raises(SystemExit, match="DeepSpeed would round the new word"):
        script.prepare_training(SimpleNamespace(accelerator=accelerator), None)


def test_a_pipeline_of_an_earlier_end_is_removed(train):
    """It would hold the vectors of then."""
    flags = ("--checkpointing_steps", 1, "--resume_from_checkpoint", "latest")
    out = train("out", *flags, "--max_train_steps", 1, "--save_as_full_pipeline", "--validation_prompt", "a")
    assert (out / "model_index.json").exists()
    train("out", *flags, "--max_train_steps", 2)
    assert not (out / "model_index.json").exists() and list(out.rglob("model.safetensors")) == []
    assert (out / "learned_embeds.safetensors").exists() and list(out.glob("samples/*.png"))
