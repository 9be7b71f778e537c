"""Axolotl: its flat keys, with the defaults that it has where a key is missing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slimtune.data.rows import MARKS, PARTIAL_MARKS
from slimtune.errors import ConfigError, listing
from slimtune.recipe.convert.rules import (
    Imported,
    Rule,
    by_hand,
    check_kinds,
    each,
    given,
    idle,
    names,
    one_of,
    refused,
    taken,
    to,
    with_fields,
)
from slimtune.recipe.convert.trainer_keys import (
    OPTIMIZER,
    REVISION,
    SCHEDULER,
    SEED,
    TRAINER_KEYS,
    hold_out,
    keep_best,
)

NAME, MODEL = "Axolotl", "base_model"

TOO_LONG = {"drop": "drop", "truncate": "truncate", "raise": "error"}
HARMLESS_PLUGINS = ("liger", "cut_cross_entropy", "kernels")

_FAST = "the same result, computed otherwise"
_VOCABULARY = "the vocabulary stays as the model has it"
_LOSSES = "this loss isn't implemented"
_EXPERTS = "experts are computed as transformers does it"
_BITS = "weights are held in few bits by model.quantize alone"

RULES: dict[str, Rule] = TRAINER_KEYS | {
    "base_model": to("model.name"),
    "sequence_len": to("data.max_length"),
    "excess_length_strategy": to("data.too_long", one_of(TOO_LONG, "way with long examples")),
    "micro_batch_size": to("training.batch_size"),
    "num_epochs": to("training.epochs"),
    "optimizer": to("training.optim", OPTIMIZER),
    "gradient_checkpointing": to("training.gradient_checkpointing", bool),
    "sample_packing": to("data.packing"),
    "lora_r": to("method.r"),
    "lora_alpha": to("method.lora_alpha"),
    "lora_fan_in_fan_out": to("method.fan_in_fan_out"),
    "lora_modules_to_save": to("method.modules_to_save"),
    "lora_target_parameters": to("method.target_parameters", names),
    "lora_rank_pattern": to("method.rank_pattern"),
    "lora_alpha_pattern": to("method.alpha_pattern"),
    "peft_use_rslora": to("method.use_rslora"),
    "peft_layers_to_transform": to("method.layers_to_transform"),
    "peft_layers_pattern": to("method.layers_pattern"),
    "peft_init_lora_weights": to("method.init_lora_weights"),
    "peft_trainable_token_indices": to("method.trainable_token_indices"),
    "rl_beta": to("preferences.beta"),
    "orpo_alpha": to("preferences.beta"),
    "kto_desirable_weight": to("preferences.desirable_weight"),
    "kto_undesirable_weight": to("preferences.undesirable_weight"),
    "wandb_project": Rule("training.report_to", lambda project: "wandb"),
    "use_wandb": Rule("training.report_to", lambda on: "wandb" if on else "none"),
    "use_tensorboard": Rule("training.report_to", lambda on: "tensorboard" if on else "none"),
    "revision_of_model": REVISION,
    "base_model_config": refused("the model's own config.json holds"),
    "tokenizer_config": refused("the model's own tokenizer is used"),
    "overrides_of_model_config": refused("the model's own config.json holds"),
    "overrides_of_model_kwargs": refused("the model is loaded as it is"),
    "lora_model_dir": refused("training begins with a new adapter; merge this one first, and tune the result"),
    "train_on_inputs": refused("only answers are learned; plain text learns everything"),
    "chat_template_jinja": refused("the tokenizer's own chat template is used"),
    "chat_template_kwargs": refused("the template's own defaults hold"),
    "default_system_message": refused("write the system message into the rows"),
    "batch_size": refused("give micro_batch_size and gradient_accumulation_steps"),
    "lr_groups": refused("all parameters learn at one rate, but for lora_plus_ratio"),
    "embedding_lr": refused("all parameters learn at one rate"),
    "embedding_lr_scale": refused("all parameters learn at one rate"),
    "lr_quadratic_warmup": refused("a warm-up rises in a line"),
    "lr_div_factor": refused("no schedule takes it here"),
    "cosine_constant_lr_ratio": refused("no schedule takes it here"),
    "optim_target_modules": refused("the optimizer is the same for all parameters"),
    "peft_layer_replication": refused("the model's layers stay as they are"),
    "peft_autocast_adapter_dtype": refused("adapters are held in float32", True),
    "bnb_config_kwargs": refused("4 bits are nf4, their scales quantized too"),
    "gptq": refused(_BITS),
    "shuffle_merged_datasets": refused("rows are drawn at random", True),
    "shuffle_before_merging_datasets": refused("rows are drawn at random once"),
    "curriculum_sampling": refused("rows are drawn at random"),
    "sample_packing_sequentially": refused("rows are packed by length"),
    "dataset_exact_deduplication": refused("rows that are twice there are learned twice; remove them"),
    "dataset_shard_num": refused("all rows are read"),
    "max_packed_sequence_len": refused("give sequence_len, with sample_packing"),
    "model_config": refused("the model's own config.json holds"),
    "cls_model_config": refused("the model's own config.json holds"),
    "eta_min": refused("give cosine_min_lr_ratio"),
    "torch_dtype": refused("give bf16 or fp16"),
    "base_model_ignore_patterns": idle("the files that are needed are loaded"),
    "accelerator_config": refused("batches are drawn as transformers does it"),
    "min_sample_len": refused("short rows are learned, too"),
    "pad_to_sequence_len": idle("padding is neither attended to nor learned"),
    "unfrozen_parameters": refused("choose a method; full tunes everything"),
    "reinit_weights": refused("weights begin as they are stored"),
    "num_labels": refused("a classifier finds its labels in the data; write a recipe for it"),
    "reward_model": refused("models of rewards aren't trained here"),
    "process_reward_model": refused("models of rewards aren't trained here"),
    "center_rewards_coefficient": refused("models of rewards aren't trained here"),
    "cpo_alpha": idle("only simpo takes it"),
    "use_eaft": refused(_LOSSES),
    "trl": refused("the settings of grpo are in preferences; write a recipe for it"),
    "vllm": refused("answers are drawn without vLLM"),
    "qat": refused("training with rounded weights isn't implemented"),
    "quantization": refused("what comes out is quantized after training, by slimtune merge"),
    "fp8": refused("products aren't computed in 8 bits"),
    "float32": to("model.dtype", lambda on: "float32" if on else "auto"),
    "processor_type": refused("models of images, sound and video aren't tuned here"),
    "processor_kwargs": refused("models of images, sound and video aren't tuned here"),
    "freeze_mm_modules": refused("models of images, sound and video aren't tuned here"),
    "eot_tokens": idle("the end of a turn is found in the chat template, and learned"),
    "loss_watchdog_threshold": idle("a loss that is not a number stops the run, a high one doesn't"),
    "strict": idle("the model is always loaded strictly"),
    "debug": idle("--debug shows where an error comes from"),
    **each(refused(_VOCABULARY), "tokens", "added_tokens_overrides", "resize_token_embeddings_to_32x",
           "shrink_embeddings", "tokenizer_use_mistral_common", "fix_untrained_tokens"),
    **each(refused("this way of tuning isn't implemented"), "relora", "relora_prune_ratio", "lisa_n_layers",
           "lisa_step_interval", "jagged_restart_steps", "use_pose", "diffusion", "ebft", "llmcompressor"),
    **each(refused(_EXPERTS), "quantize_moe_experts", "llama4_linearized_experts", "expert_parallel_size"),
    **each(refused(_BITS), "model_quantization_config", "model_quantization_config_kwargs", "use_onebitllms",
           "bfloat16", "float16"),
    **each(refused("one device trains here"), "dp_shard_size", "dp_replicate_size"),
    **each(idle(_EXPERTS), "experts_implementation", "use_scattermoe", "use_sonicmoe"),
    **each(idle(_FAST), "attn_implementation", "flash_attention", "flash_attn_cross_entropy", "flash_attn_rms_norm",
           "flash_attn_fuse_mlp", "flash_optimum", "flex_attention", "flex_attn_compile_kwargs", "sdp_attention",
           "xformers_attention", "eager_attention", "sage_attention", "fused_attn_kernel", "lora_mlp_kernel",
           "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel", "liger_rope", "liger_rms_norm",
           "liger_rms_norm_gated", "liger_glu_activation", "liger_swiglu", "liger_layer_norm",
           "liger_fused_linear_cross_entropy", "liger_cross_entropy", "cut_cross_entropy", "chunked_cross_entropy",
           "torch_compile_backend", "torch_compile_mode", "use_kernels", "unsloth_lora_mlp", "unsloth_lora_qkv",
           "unsloth_lora_o", "unsloth_cross_entropy_loss", "tiled_mlp", "gc_steps", "activation_offloading",
           "layer_offloading", "selective_checkpointing", "device_map", "max_memory", "gpu_memory_limit",
           "lora_on_cpu", "qlora_sharded_model_loading", "experimental_skip_move_to_device", "torchdistx_path",
           "gemma4_hybrid_attn_impl"),
    **each(idle("rows are packed within each batch's length, evaluation not at all"), "eval_sample_packing",
           "sample_packing_eff_est", "sample_packing_group_size", "sample_packing_bin_size", "total_num_tokens",
           "sample_packing_seq_len_multiplier", "multipack_real_batches", "eval_sequence_len",
           "pretrain_multipack_attn", "pretrain_multipack_buffer_size", "streaming_multipack_buffer_size"),
    **each(idle("rows are read and encoded anew"), "dataset_prepared_path", "dataset_processes", "dataset_num_proc",
           "dataset_keep_in_memory", "skip_prepare_dataset", "push_dataset_to_hub", "preprocess_iterable"),
    **each(idle("a tracker's own settings; set its environment variables"), "wandb_entity", "wandb_watch",
           "wandb_name", "wandb_run_id", "wandb_log_model", "wandb_mode", "mlflow_tracking_uri",
           "mlflow_experiment_name", "mlflow_run_name", "comet_project_name", "use_otel_metrics",
           "otel_metrics_host", "otel_metrics_port", "trackio_project_name", "trackio_run_name", "trackio_space_id"),
    **each(idle("held-out rows are evaluated after each epoch"), "eval_table_size",
           "eval_max_new_tokens", "do_causal_lm_eval", "eval_causal_lm_metrics", "do_bench_eval"),
    "save_first_step": idle("checkpoints are a few minutes apart"),
    **each(idle("found in the model's folder"), "tokenizer_type", "tokenizer_use_fast", "tokenizer_legacy",
           "is_llama_derived_model", "is_mistral_derived_model", "is_falcon_derived_model", "is_qwen_derived_model",
           "tokenizer_save_jinja_files"),
    **each(idle("only another key takes it"), "loss_watchdog_patience", "eaft_alpha", "eaft_k", "merge_method",
           "fsdp_version", "gptq_groupsize", "gptq_model_v1", "gptq_disable_exllama"),
    **each(by_hand(int), "evals_per_epoch", "saves_per_epoch"),
    **each(by_hand(str), "adapter", "lr_scheduler", "rl", "chat_template", "model_type", "type_of_model"),
    **each(by_hand(bool), "load_in_4bit", "load_in_8bit", "lora_target_linear", "peft_use_dora", "fp16",
           "full_finetune"),
    **each(by_hand(int, float), "cosine_min_lr_ratio", "val_set_size"),
    **each(by_hand(dict), "peft", "special_tokens"),
    **each(by_hand(list), "datasets", "test_datasets", "plugins"),
    "pretraining_dataset": by_hand(str, dict, list),
    "lora_target_modules": by_hand(str, list),
    "bf16": by_hand(str, bool),
}  # fmt: skip

RL = {"dpo": "dpo", "ipo": "dpo", "orpo": "orpo", "kto": "kto"}


def translate(values: Mapping[str, Any], folder: Path) -> Imported:
    """The recipe of these keys; raises ConfigError with every key that was refused."""
    recipe = Imported(NAME)
    check_kinds(values, RULES)
    _defaults(recipe)
    # The defaults first and the file over them: `put` keeps the last value, and only keys that the file has are
    # reported.
    for part in (_task, _method, _model, _schedule, _texts):
        part(recipe, values)
    _train_data(recipe, values)
    _held_out(recipe, values)
    # The single keys last: what several keys decide together has been taken by now, and is passed over.
    recipe.apply_rules(values, RULES)
    return recipe.done()


def _defaults(recipe: Imported) -> None:
    """What Axolotl does where nothing is said."""
    recipe.put("data.max_length", 512)
    recipe.put("data.too_long", "drop")
    run = {"epochs": 1.0, "batch_size": 1, "optim": "adamw_torch_fused", "scheduler": "cosine", "seed": SEED}
    for name, value in run.items():
        recipe.put(f"training.{name}", value)
    recipe.put("output", "./model-out")


def _task(recipe: Imported, values: Mapping[str, Any]) -> None:
    kind = taken(values, "rl")
    if not kind:
        recipe.put("task", "text")
        return
    if kind not in RL:
        recipe.refused["rl"] = f"'{kind}' isn't translated; there are {listing(RL)}"
        return
    recipe.put("task", RL[kind], "rl")
    if kind == "ipo":
        recipe.put("preferences.loss_type", "ipo", "rl")


def _method(recipe: Imported, values: Mapping[str, Any]) -> None:
    kind = taken(values, "adapter")
    if kind is None:
        recipe.put("method.name", "full", *given(values, "adapter"))
        # Noted even though nothing can be done about it: the same file trains with other rounding here than there.
        recipe.different["adapter"] = "weights that are all tuned are held in float32, theirs in 16 bits"
        unused = [key for key in values if key.startswith(("lora_", "peft_"))]
        recipe.without_effect |= dict.fromkeys(unused, "all weights are tuned")
        return
    if kind not in ("lora", "qlora"):
        recipe.refused["adapter"] = f"there is no '{kind}' to translate; lora and qlora are"
        return
    dora = bool(taken(values, "peft_use_dora"))
    recipe.put("method.name", "dora" if dora else "lora", "adapter", *given(values, "peft_use_dora"))
    # A default of ours in its place would be a rank that nobody wrote down.
    if taken(values, "lora_r") is None:
        recipe.refused["adapter"] = "lora_r is missing"
    # Before the rules: the file's own value, if it has one, is put over it.
    recipe.put("method.lora_alpha", 8)
    _targets(recipe, values)
    inner = taken(values, "peft", {})
    if set(inner) - {"loftq_config"}:
        recipe.refused["peft"] = f"of {listing(inner)} only loftq_config is translated"
    elif inner:
        recipe.put("method.loftq_config", inner["loftq_config"], "peft")
        recipe.put("method.init_lora_weights", "loftq", "peft")


def _targets(recipe: Imported, values: Mapping[str, Any]) -> None:
    keys = given(values, "lora_target_linear", "lora_target_modules")
    modules = taken(values, "lora_target_modules")
    if taken(values, "lora_target_linear"):
        recipe.put("method.target_modules", "all-linear", *keys)
    elif modules:
        recipe.put("method.target_modules", modules, *keys)
    else:
        recipe.different["lora_target_modules"] = "without targets all linear layers of the blocks are adapted here"


def _model(recipe: Imported, values: Mapping[str, Any]) -> None:
    for key in given(values, "model_type", "type_of_model"):
        kind = str(values[key])
        # Naming the class that config.json names anyway changes nothing; any other class would be another model.
        reasons = recipe.without_effect if kind.endswith("ForCausalLM") else recipe.refused
        reasons[key] = "models that write text are loaded, as config.json names them"
    four, eight = taken(values, "load_in_4bit"), taken(values, "load_in_8bit")
    if taken(values, "adapter") is None and (four or eight):
        recipe.refused["load_in_4bit" if four else "load_in_8bit"] = (
            "quantized weights can't be tuned without an adapter"
        )
    elif four or eight:
        recipe.put("model.quantize", "nf4" if four else "int8", "load_in_4bit" if four else "load_in_8bit")
    elif taken(values, "adapter") == "qlora":
        recipe.refused["adapter"] = "qlora needs load_in_4bit"
    half = bool(taken(values, "fp16"))
    # Their default is bf16: auto.
    recipe.put("model.dtype", "float16" if half else "bfloat16", *given(values, "fp16" if half else "bf16"))
    # `is False`: a missing key is auto there, and only an explicit no means full precision.
    if values.get("bf16") is False and not half:
        recipe.put("model.dtype", "float32", "bf16")


def _schedule(recipe: Imported, values: Mapping[str, Any]) -> None:
    least, name = taken(values, "cosine_min_lr_ratio"), taken(values, "lr_scheduler", "cosine")
    try:
        if least is not None and name == "cosine":
            recipe.put("training.scheduler", "cosine_with_min_lr", *given(values, "lr_scheduler"))
            recipe.put("training.scheduler_options", {"min_lr_rate": least}, "cosine_min_lr_ratio")
        else:
            recipe.put("training.scheduler", SCHEDULER(name), *given(values, "lr_scheduler"))
    except ConfigError as error:
        recipe.refused["lr_scheduler"] = str(error)
    steps, share = taken(values, "warmup_steps"), taken(values, "warmup_ratio")
    if steps is None and share is None:
        recipe.different["warmup_steps"] = "without a number 3% of the steps warm up; theirs are 100 at most"
    warmup = steps if steps is not None else 0.03 if share is None else share
    recipe.put("training.warmup", warmup, *given(values, "warmup_steps", "warmup_ratio"))
    keep_best(recipe, values)


def _texts(recipe: Imported, values: Mapping[str, Any]) -> None:
    for key, ours, what in (("evals_per_epoch", "eval_steps", "evaluated"), ("saves_per_epoch", "save_steps", "saved")):
        if (times := taken(values, key)) is not None:
            recipe.translated[key] = f"training.{ours}"
            # Once an epoch is what happens here without a setting.
            if (key, times) != ("evals_per_epoch", 1):
                recipe.different[key] = (
                    f"how many steps an epoch has isn't known here, so that it isn't {what} {times} times in one; "
                    f"set training.{ours}"
                )
    template = taken(values, "chat_template")
    if template and not str(template).startswith("tokenizer_default"):
        recipe.different["chat_template"] = f"the tokenizer's own is used, which should be the same as '{template}'"
    recipe.without_effect |= dict.fromkeys(given(values, "chat_template"), "the tokenizer's own is used")
    special = taken(values, "special_tokens", {})
    # Tokens of other names would be added to the vocabulary, and with them rows to the embeddings.
    if set(special) - {"pad_token", "bos_token", "eos_token", "unk_token"}:
        recipe.refused["special_tokens"] = f"of {listing(special)} some would be new to the vocabulary"
    elif special:
        recipe.without_effect["special_tokens"] = "the tokenizer's own are used; padding is never learned"
    if set(special) & {"bos_token", "eos_token", "unk_token"}:
        recipe.different["special_tokens"] = "the tokenizer's own are used, which should be the same ones"
    plugins = [str(name) for name in taken(values, "plugins", [])]
    # A plugin is Python that may replace the trainer; only those known to compute the same are passed over.
    strange = [name for name in plugins if not any(harmless in name for harmless in HARMLESS_PLUGINS)]
    if strange:
        recipe.refused["plugins"] = f"{listing(strange)} may change anything"
    elif plugins:
        recipe.without_effect["plugins"] = _FAST


LOADERS = ("json", "csv", "parquet", "text", "arrow")
"""Of `datasets`: with one of them as the path, data_files are the data."""
IDLE = ("ds_type", "conversation", "chat_template", "trust_remote_code", "train_on_eot", "preprocess_shards")
READ = (
    "path", "name", "type", "split", "revision", "data_files", "field", "field_messages", "message_property_mappings",
)  # fmt: skip
AS_HERE = {
    "roles_to_train": (["assistant"], ["gpt", "assistant"], ["assistant", "gpt"]),
    "train_on_eos": ("turn",),
    "message_field_training": MARKS,
    "message_field_training_detail": PARTIAL_MARKS,
}
"""Settings of a data set with the values that change nothing here; rows with marks on parts of a turn are refused."""
OPENAI = {"role": "role", "content": "content"}
SHARE_GPT = {"role": "from", "content": "value"}


def _train_data(recipe: Imported, values: Mapping[str, Any]) -> None:
    """Put the training data into the recipe."""
    plain = taken(values, "pretraining_dataset")
    if plain and taken(values, "datasets"):
        recipe.refused["pretraining_dataset"] = "give it or datasets, not both"
    elif plain:
        several = plain if isinstance(plain, list) else [plain]
        # Anything else goes on as it is, for `_put` to refuse with the message that it has for all data sets.
        entries = [_plain(entry) if isinstance(entry, str | Mapping) else entry for entry in several]
        _put(recipe, "pretraining_dataset", "data.train", entries)
        recipe.put("data.streaming", True, "pretraining_dataset")
    elif taken(values, "datasets"):
        _put(recipe, "datasets", "data.train", values["datasets"])
    else:
        recipe.refused["datasets"] = "no data is named"


def _held_out(recipe: Imported, values: Mapping[str, Any]) -> None:
    """Put what is held out into the recipe."""
    if taken(values, "test_datasets"):
        _put(recipe, "test_datasets", "data.held_out", values["test_datasets"])
    hold_out(recipe, values, "val_set_size")


def _put(recipe: Imported, key: str, place: str, entries: Any) -> None:
    try:
        if not all(isinstance(entry, Mapping) for entry in entries):
            raise ConfigError("data sets are a list of mappings with a path")
        recipe.put(place, [source for entry in entries for source in _sources(entry, recipe)], key)
    except ConfigError as error:
        recipe.refused[key] = str(error)


def _plain(entry: Any) -> dict[str, Any]:
    given = {"path": entry} if isinstance(entry, str) else dict(entry)
    column = given.pop("text_column", None)
    return given | {"type": "completion"} | ({"field": column} if column else {})


def _sources(entry: Mapping[str, Any], recipe: Imported) -> list[dict[str, Any]]:
    path = entry.get("path")
    if not path:
        raise ConfigError("a data set has no path")
    for key, value in entry.items():
        # Files are often written from a template with every key spelled out: an empty one asks for nothing.
        if key in READ or key in IDLE or value in (None, False, "", [], {}):
            continue
        if value not in AS_HERE.get(key, ()):
            raise ConfigError(f"'{key}' of {path} can't be had here; write its rows as messages")
    files = entry.get("data_files") or []
    files = [files] if isinstance(files, str) else list(files)
    if files and path not in LOADERS:
        raise ConfigError(f"data_files of {path} can't be chosen; name the files as paths of their own")
    # "json" alone would be looked for on the Hub under that name.
    if path in LOADERS and not files:
        raise ConfigError(f"'{path}' is a reader of files, and data_files names none")
    shape = _format(entry, path, recipe)
    if files:
        return [{"path": str(file)} | shape for file in files]
    revision = REVISION.read(entry.get("revision"))
    place = {"subset": entry.get("name"), "split": entry.get("split"), "revision": revision}
    place = {key: value for key, value in place.items() if value}
    return [{"path": path} | place | shape]


def _format(entry: Mapping[str, Any], path: str, recipe: Imported) -> dict[str, Any]:
    kind = entry.get("type")
    if isinstance(kind, Mapping):
        return _described(kind, path)
    if kind == "completion":
        return with_fields("text", {"text": entry.get("field") or "text"})
    if kind == "alpaca":
        recipe.different["datasets"] = (
            "alpaca rows are asked in the tokenizer's chat template where it has one, and in alpaca's words where not"
        )
        return {"format": "alpaca"}
    if kind == "sharegpt":
        return with_fields("sharegpt", {"conversations": entry.get("field_messages") or "conversations"})
    if kind == "chat_template":
        return _turns(entry, path)
    raise ConfigError(f"rows of type '{kind}' (of {path}) aren't translated; write them as messages")


def _turns(entry: Mapping[str, Any], path: str) -> dict[str, Any]:
    place, properties = entry.get("field_messages"), entry.get("message_property_mappings") or OPENAI
    if properties == OPENAI:
        return with_fields("messages", {"messages": place or "messages"})
    if properties == SHARE_GPT:
        return with_fields("sharegpt", {"conversations": place or "messages"})
    raise ConfigError(f"turns of {path} are called {listing(properties.values())}; write them as messages")


def _described(kind: Mapping[str, Any], path: str) -> dict[str, Any]:
    """A type of the user's own: columns of preferences can be renamed, prompts can't be worded."""
    fields = {key.removeprefix("field_"): column for key, column in kind.items() if column}
    if not {"chosen", "rejected"} <= fields.keys() <= {"prompt", "chosen", "rejected"}:
        raise ConfigError(f"a type with {listing(kind)} (of {path}) isn't translated; write its rows as messages")
    return with_fields("preference", fields)
