"""Keys that both tools hand to transformers' Trainer under its own names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slimtune.recipe.convert.rules import Imported, Rule, by_hand, each, given, idle, one_of, refused, taken, to
from slimtune.recipe.optimizers import OPTIMIZERS
from slimtune.recipe.training import SCHEDULERS

OPTIMIZER = one_of({name: name for name in OPTIMIZERS} | {"adamw_hf": "adamw_torch"}, "optimizer")
SCHEDULER = one_of(SCHEDULERS, "schedule")
REVISION = to("model.revision", lambda revision: None if revision == "main" else revision)
SEED = 42
"""The default of both."""

_ONE_DEVICE = "one device trains here; remove it, and multiply the accumulation by the number of devices"
_ADAM = "the optimizer's own constants can't be set"

TRAINER_KEYS: dict[str, Rule] = {
    "streaming": to("data.streaming"),
    "lora_dropout": to("method.lora_dropout"),
    "dpo_label_smoothing": to("preferences.label_smoothing"),
    "simpo_gamma": idle("only simpo takes it"),
    "greater_is_better": idle("it follows from the score"),
    "eval_steps": to("training.eval_steps"),
    "save_steps": to("training.save_steps"),
    "lr_scheduler_kwargs": to("training.scheduler_options"),
    "metric_for_best_model": by_hand(str),
    "load_best_model_at_end": by_hand(bool),
    "warmup_ratio": by_hand(int, float),
    "warmup_steps": by_hand(int, float),
    "learning_rate": to("training.learning_rate", float),
    "weight_decay": to("training.weight_decay"),
    "max_grad_norm": to("training.max_grad_norm"),
    "gradient_accumulation_steps": to("training.gradient_accumulation"),
    # -1 means "as many as the epochs have" to the Trainer.
    "max_steps": to("training.max_steps", lambda steps: steps if steps > 0 else None),
    # The Trainer takes shares below 1 as well, of a number of steps that isn't known here.
    "logging_steps": to("training.logging_steps", lambda steps: max(1, round(steps))),
    "save_total_limit": to("training.save_total_limit"),
    "early_stopping_patience": to("training.early_stopping_patience"),
    "loraplus_lr_ratio": to("training.lora_plus_ratio"),
    "trust_remote_code": to("model.trust_remote_code"),
    "seed": to("training.seed"),
    "dataloader_num_workers": to("training.dataloader_workers"),
    "output_dir": to("output"),
    "adam_beta1": refused(_ADAM, 0.9),
    "adam_beta2": refused(_ADAM, 0.999),
    "adam_epsilon": refused(_ADAM, 1e-8),
    "adam_eps": refused(_ADAM, 1e-8),
    "optim_args": refused(_ADAM),
    "neftune_noise_alpha": refused("noise on the embeddings isn't implemented"),
    "label_smoothing_factor": refused("labels aren't smoothed in training by examples"),
    "group_by_length": refused("batches are drawn at random, not by length"),
    "train_from_scratch": refused("a model is tuned here, not trained from nothing"),
    "torch_compile": idle("the same result, computed otherwise"),
    "loraplus_lr_embedding": idle("no embeddings are adapted unless they are named"),
    **each(refused(_ONE_DEVICE), "deepspeed", "fsdp", "fsdp_config", "tensor_parallel_size", "context_parallel_size",
           "sequence_parallel_degree", "fsdp_transformer_layer_cls_to_wrap", "ray_num_workers", "use_ray"),
    **each(idle("checkpoints here are whole, a few minutes apart, and the last one is what is resumed from"),
           "save_strategy", "save_only_model", "save_safetensors", "save_on_each_node"),
    **each(idle("held-out rows are evaluated after each epoch, or every eval_steps"), "eval_strategy",
           "evaluation_strategy", "do_eval"),
    **each(idle("pass --resume on the command line"), "resume_from_checkpoint", "auto_resume_from_checkpoints"),
    **each(idle("memory and time, not the result"), "gradient_checkpointing_kwargs", "dataloader_pin_memory",
           "dataloader_prefetch_factor", "dataloader_persistent_workers", "torch_empty_cache_steps", "tf32",
           "low_cpu_mem_usage", "use_reentrant_gc", "eval_accumulation_steps", "auto_find_batch_size"),
    **each(idle("for several processes"), "ddp_timeout", "ddp_find_unused_parameters", "ddp_bucket_cap_mb",
           "ddp_broadcast_buffers", "local_rank", "world_size", "ddp"),
    **each(refused("SwanLab isn't reported to; give report_to another tracker"), "use_swanlab"),
    **each(idle("only use_swanlab takes it"), "swanlab_project", "swanlab_workspace", "swanlab_run_name",
           "swanlab_mode", "swanlab_logdir", "swanlab_experiment_name", "swanlab_description", "swanlab_log_model",
           "swanlab_log_completions", "swanlab_completion_log_interval", "swanlab_completion_max_buffer"),
    **each(idle("pass --push-to-hub REPO on the command line"), "hub_model_id", "push_to_hub", "hub_strategy",
           "hub_token", "hub_revision",
           "hub_private_repo", "hf_use_auth_token", "hf_hub_token"),
    **each(idle("evaluation runs in batches of the training's size"), "per_device_eval_batch_size", "eval_batch_size"),
    **each(idle("the columns that are needed are found"), "remove_unused_columns"),
    **each(idle("what a tracker calls the run"), "run_name", "logging_dir", "logging_first_step"),
    **each(idle("tokens are counted in any case"), "include_num_input_tokens_seen", "include_tokens_per_second",
           "include_effective_tokens_per_second", "include_tkps"),
}  # fmt: skip


def keep_best(recipe: Imported, values: Mapping[str, Any]) -> None:
    """Put into the recipe by what the best weights are kept."""
    best = str(taken(values, "metric_for_best_model", "loss")).removeprefix("eval_")
    if recipe.switch(values, "load_best_model_at_end", "training.keep_best", best):
        recipe.translated |= dict.fromkeys(given(values, "metric_for_best_model"), "training.keep_best")


def hold_out(recipe: Imported, values: Mapping[str, Any], key: str) -> None:
    """Put the share of the rows that is held out into the recipe."""
    share = taken(values, key, 0)
    if share >= 1:
        recipe.refused[key] = f"a share of the rows is held out, not a number of them; give {share} divided by all rows"
    elif share:
        recipe.put("data.held_out", share, key)
    elif key in values:
        recipe.without_effect[key] = "nothing is held out"
