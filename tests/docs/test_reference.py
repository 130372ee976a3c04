"""The flags of the example scripts are taken or refused with a reason, and no flag is read nowhere."""

import argparse
import ast
import importlib

import pytest
from helpers import ROOT

from tools.sync import find_fences, find_scripts


# All flags of the example scripts of each method, by the script that takes their place here.
REFERENCE = {
    "train_text_to_image": """
    input_perturbation pretrained_model_name_or_path revision variant dataset_name dataset_config_name train_data_dir
    image_column caption_column max_train_samples validation_prompts output_dir cache_dir seed resolution center_crop
    random_flip train_batch_size num_train_epochs max_train_steps gradient_accumulation_steps gradient_checkpointing
    learning_rate scale_lr lr_scheduler lr_warmup_steps snr_gamma dream_training dream_detail_preservation
    use_8bit_adam allow_tf32 use_ema offload_ema foreach_ema non_ema_revision dataloader_num_workers adam_beta1
    adam_beta2 adam_weight_decay adam_epsilon max_grad_norm push_to_hub hub_token prediction_type hub_model_id
    logging_dir mixed_precision report_to local_rank checkpointing_steps checkpoints_total_limit
    resume_from_checkpoint enable_xformers_memory_efficient_attention noise_offset validation_epochs
    tracker_project_name image_interpolation_mode pretrained_vae_model_name_or_path validation_prompt
    num_validation_images proportion_empty_prompts timestep_bias_strategy timestep_bias_multiplier timestep_bias_begin
    timestep_bias_end timestep_bias_portion enable_npu_flash_attention
""".split(),
    "train_controlnet": """
    adam_beta1 adam_beta2 adam_epsilon adam_weight_decay allow_tf32 cache_dir caption_column checkpointing_steps
    checkpoints_total_limit conditioning_image_column controlnet_model_name_or_path crops_coords_top_left_h
    crops_coords_top_left_w dataloader_num_workers dataset_config_name dataset_name enable_npu_flash_attention
    enable_xformers_memory_efficient_attention gradient_accumulation_steps gradient_checkpointing hub_model_id
    hub_token image_column image_interpolation_mode learning_rate local_rank logging_dir lr_num_cycles lr_power
    lr_scheduler lr_warmup_steps max_grad_norm max_train_samples max_train_steps mixed_precision
    num_train_epochs num_validation_images output_dir pretrained_model_name_or_path
    pretrained_vae_model_name_or_path proportion_empty_prompts push_to_hub report_to resolution
    resume_from_checkpoint revision scale_lr seed set_grads_to_none tokenizer_name tracker_project_name
    train_batch_size train_data_dir use_8bit_adam validation_image validation_prompt validation_steps variant
""".split(),
    "train_instruct_pix2pix": """
    adam_beta1 adam_beta2 adam_epsilon adam_weight_decay allow_tf32 cache_dir center_crop checkpointing_steps
    checkpoints_total_limit conditioning_dropout_prob crops_coords_top_left_h crops_coords_top_left_w
    dataloader_num_workers dataset_config_name dataset_name edit_prompt_column edited_image_column
    enable_xformers_memory_efficient_attention gradient_accumulation_steps gradient_checkpointing hub_model_id
    hub_token learning_rate local_rank logging_dir lr_scheduler lr_warmup_steps max_grad_norm max_train_samples
    max_train_steps mixed_precision non_ema_revision num_train_epochs num_validation_images
    original_image_column output_dir pretrained_model_name_or_path pretrained_vae_model_name_or_path push_to_hub
    random_flip report_to resolution resume_from_checkpoint revision scale_lr seed train_batch_size
    train_data_dir use_8bit_adam use_ema vae_precision val_image_url val_image_url_or_path validation_epochs
    validation_prompt validation_steps variant
""".split(),
    "train_lora": """
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
""".split(),
    "textual_inversion": """
    save_steps save_as_full_pipeline num_vectors pretrained_model_name_or_path revision variant tokenizer_name
    train_data_dir placeholder_token initializer_token learnable_property repeats output_dir seed resolution
    center_crop train_batch_size num_train_epochs max_train_steps gradient_accumulation_steps gradient_checkpointing
    learning_rate scale_lr lr_scheduler lr_warmup_steps lr_num_cycles dataloader_num_workers adam_beta1 adam_beta2
    adam_weight_decay adam_epsilon push_to_hub hub_token hub_model_id logging_dir mixed_precision allow_tf32 report_to
    validation_prompt num_validation_images validation_steps validation_epochs local_rank checkpointing_steps
    checkpoints_total_limit resume_from_checkpoint enable_xformers_memory_efficient_attention no_safe_serialization
    use_8bit_adam
""".split(),
}
SCRIPTS = sorted(path.stem for path in find_scripts(ROOT) if "Engine" in find_fences(path.read_text()))


def actions_of(script, monkeypatch):
    """The actions of a script's parser."""
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "print_help", lambda self, file=None: seen.append(self))
        with pytest.raises(SystemExit):
            script.parse_args(["--help"])
    return seen[0]._actions


@pytest.mark.parametrize("name", REFERENCE)
def test_every_flag_of_the_reference(name, monkeypatch):
    """Each is taken under its name, or refused with its reason."""
    script = importlib.import_module(name)
    taken = {flag.lstrip("-") for action in actions_of(script, monkeypatch) for flag in action.option_strings}
    missing = set(REFERENCE[name]) - taken
    refused = {flag.lstrip("-"): reason for flag, reason in script.REFUSED.items()}
    assert missing <= refused.keys() and all(len(reason) > 20 for reason in refused.values())


# Taken for others' sake.
IDLE = {
    "train_controlnet": {"foreach_ema", "set_grads_to_none"},
    "train_dreambooth": {"pre_compute_text_embeddings", "set_grads_to_none"},
    "train_instruct_pix2pix": {"foreach_ema"},
    "train_lora": {"pre_compute_text_embeddings"},
    "train_text_to_image": {"foreach_ema"},
    "train_unconditional": {"foreach_ema", "preserve_input_precision"},
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_is_used(name, monkeypatch):
    """A script reads each of its flags for more than checking it, or names it where others may lack it."""
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    checks = ("parse_args", "check_flags", "common_problems", "prior_problems", "stable_diffusion_problems")
    functions = [n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name not in checks]
    nodes = [node for function in functions for node in ast.walk(function)]
    reads = (node for node in nodes if isinstance(node, ast.Attribute))
    names = {node.value for node in nodes if isinstance(node, ast.Constant)}
    used = {node.attr for node in reads if ast.unparse(node.value).endswith("args")} | names
    flags = {action.dest for action in actions_of(importlib.import_module(name), monkeypatch)}
    assert flags - used - {"help", "config"} == IDLE.get(name, set())
