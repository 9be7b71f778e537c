"""LLaMA-Factory: its flat keys, with the defaults that it has where a key is missing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from slimtune.data.settings import Source
from slimtune.data.sources import records
from slimtune.errors import ConfigError, SlimtuneError, did_you_mean, listing
from slimtune.recipe.convert.rules import (
    OFF,
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

NAME, MODEL = "LLaMA-Factory", "model_name_or_path"

_IMAGES = "models of images, sound and video aren't tuned here"
_OPTIMIZERS = "this optimizer isn't implemented"
_LOSSES = "this loss isn't implemented"
_SERVING = "about serving, not training"
_VOCABULARY = "the vocabulary stays as the model has it"
_LOADING = "memory and time, not the result"

RULES: dict[str, Rule] = TRAINER_KEYS | {
    "model_name_or_path": to("model.name"),
    "cutoff_len": to("data.max_length"),
    "per_device_train_batch_size": to("training.batch_size"),
    "num_train_epochs": to("training.epochs"),
    "optim": to("training.optim", OPTIMIZER),
    "lr_scheduler_type": to("training.scheduler", SCHEDULER),
    "disable_gradient_checkpointing": to("training.gradient_checkpointing", lambda off: not off),
    "early_stopping_steps": to("training.early_stopping_patience"),
    "report_to": to("training.report_to", lambda trackers: trackers if trackers not in OFF else "none"),
    "use_rslora": to("method.use_rslora"),
    "additional_target": to("method.modules_to_save", names),
    "pref_beta": to("preferences.beta"),
    "kto_chosen_weight": to("preferences.desirable_weight"),
    "kto_rejected_weight": to("preferences.undesirable_weight"),
    "do_train": refused("this file doesn't train", True),
    "model_revision": REVISION,
    "adapter_name_or_path": refused("training begins with a new adapter; merge this one first, and tune the result"),
    "adapter_folder": refused("training begins with a new adapter"),
    "train_on_prompt": refused("only answers are learned; plain text learns everything"),
    "mask_history": refused("every turn of the assistant is learned; leave the others without an answer"),
    "default_system": refused("write the system message into the rows"),
    "tool_format": refused("tools are written as the model's own template has them"),
    "enable_thinking": refused("the template's own default holds", True),
    "preserve_thinking": refused("the template's own default holds"),
    "ignore_pad_token_for_loss": refused("padding is never learned", True),
    "interleave_probs": refused("only mix_strategy with interleave takes it"),
    "split_special_tokens": refused("special tokens stay whole"),
    "use_fast_tokenizer": refused("the fast tokenizer is needed to tell answers from questions", True),
    "rope_scaling": refused("positions aren't stretched; write it into the model's config.json"),
    "shift_attn": refused("attention is the model's own"),
    "mixture_of_depths": refused("the model's layers stay as they are"),
    "moe_aux_loss_coef": refused("the model's own auxiliary loss holds"),
    "upcast_layernorm": refused("no part is cast up as a whole"),
    "upcast_lmhead_output": refused("no part is cast up as a whole"),
    "disable_shuffling": refused("rows are drawn at random"),
    "pure_bf16": refused("adapters, and weights that are all tuned, are held in float32"),
    "fp8": refused("products aren't computed in 8 bits"),
    "quantization_device_map": refused("one device trains here"),
    "tokenized_path": refused("rows are encoded here; give the rows"),
    "pref_ftx": refused(_LOSSES, 0.0),
    "pref_bco_weight": refused(_LOSSES, 0.0),
    "ld_alpha": refused(_LOSSES),
    "pissa_convert": refused("a PiSSA adapter is stored with its start"),
    "use_unsloth": idle(_LOADING),
    "plot_loss": idle("loss.png is always drawn"),
    "create_new_adapter": idle("a new adapter is always made"),
    "overwrite_output_dir": idle("pass --overwrite on the command line"),
    "predict_with_generate": idle("slimtune evaluate scores answers"),
    "do_predict": idle("slimtune evaluate scores answers"),
    "eval_on_each_dataset": idle("held-out rows are evaluated together"),
    "compute_accuracy": idle("slimtune evaluate scores answers"),
    "asft_alpha": idle("only use_asft_loss takes it"),
    "eaft_alpha": idle("only use_eaft_loss takes it"),
    "fp8_backend": idle("only fp8 takes it"),
    "fp8_enable_fsdp_float8_all_gather": idle("only fp8 takes it"),
    **each(refused(_LOSSES), "use_dft_loss", "use_asft_loss", "use_eaft_loss"),
    **each(idle("only an optimizer that was refused takes it"), "galore_target", "galore_rank",
           "galore_update_interval", "galore_scale", "galore_proj_type", "galore_layerwise", "apollo_target",
           "apollo_rank", "apollo_update_interval", "apollo_scale", "apollo_proj", "apollo_proj_type",
           "apollo_scale_type", "apollo_layerwise", "apollo_scale_front", "badam_mode", "badam_start_block",
           "badam_switch_mode", "badam_switch_interval", "badam_update_ratio", "badam_mask_mode", "badam_verbose"),
    **each(idle("only a way of tuning that was refused takes it"), "freeze_trainable_layers",
           "freeze_trainable_modules", "freeze_extra_modules", "oft_rank", "oft_block_size", "oft_target",
           "module_dropout"),
    **each(refused(_OPTIMIZERS), "use_galore", "use_apollo", "use_badam", "use_adam_mini", "use_muon"),
    **each(refused(_VOCABULARY), "resize_vocab", "add_tokens", "add_special_tokens", "new_special_tokens_config"),
    **each(refused("the model's weights stay where they are"), "use_llama_pro", "use_mca", "use_megatron_bridge",
           "use_hyper_parallel", "use_kt"),
    **each(refused(_IMAGES), "image_max_pixels", "image_min_pixels", "image_do_pan_and_scan", "crop_to_patches",
           "video_max_pixels", "video_min_pixels", "video_fps", "video_maxlen", "use_audio_in_video",
           "audio_sampling_rate", "freeze_vision_tower", "freeze_multi_modal_projector", "freeze_language_model"),
    **each(refused("the reference is the base itself"), "ref_model", "ref_model_adapters",
           "ref_model_quantization_bit"),
    **each(refused("rewards of a model aren't learned or used here"), "reward_model", "reward_model_adapters"),
    **each(idle("loaded as transformers does it"), "flash_attn", "cache_dir", "offload_folder", "init_special_tokens",
           "enable_liger_kernel", "use_unsloth_gc", "use_v1_kernels", "use_kv_cache", "print_param_status",
           "ms_hub_token", "om_hub_token"),
    **each(idle(_LOADING), "overwrite_cache", "preprocessing_num_workers", "preprocessing_batch_size", "buffer_size",
           "data_shared_file_system"),
    **each(idle(_SERVING), "infer_backend", "infer_dtype", "export_dir", "export_size", "export_device",
           "export_legacy_format", "export_hub_model_id", "max_new_tokens", "temperature", "top_p", "top_k",
           "do_sample", "num_beams", "repetition_penalty", "length_penalty", "skip_special_tokens", "max_length",
           "vllm_maxlen", "vllm_gpu_util", "vllm_enforce_eager", "vllm_config", "eval_num_beams"),
    **each(by_hand(str), "stage", "finetuning_type", "dataset", "eval_dataset", "dataset_dir", "media_dir", "template",
           "mix_strategy", "quantization_type", "quantization_method", "pref_loss"),
    **each(by_hand(bool), "packing", "neat_packing", "double_quantization", "use_dora", "pissa_init", "bf16", "fp16"),
    **each(by_hand(int), "quantization_bit", "max_samples", "pissa_iter"),
    **each(by_hand(int, float), "val_size", "lora_alpha", "lora_rank"),
    "lora_target": by_hand(str, list),
}  # fmt: skip

STAGES = {"pt": "text", "sft": "text", "dpo": "dpo", "kto": "kto"}
LOSSES = {"sigmoid": None, "hinge": "hinge", "ipo": "ipo"}


def translate(values: Mapping[str, Any], folder: Path) -> Imported:
    """The recipe of these keys; raises ConfigError with every key that was refused.

    Args:
        folder: where the file is, beside which data is looked for as well.
    """
    recipe = Imported(NAME)
    check_kinds(values, RULES)
    _defaults(recipe)
    for part in (_task, _method, _model, _run):
        part(recipe, values)
    _train_data(recipe, values, folder)
    _held_out(recipe, values, folder)
    _packing(recipe, values)
    if taken(values, "template"):
        recipe.different["template"] = "the tokenizer's own chat template is used, which should be the same one"
        recipe.without_effect["template"] = "the tokenizer's own is used"
    recipe.different["cutoff_len"] = (
        "long examples are cut at their end; theirs takes tokens from question and answer in proportion"
    )
    recipe.apply_rules(values, RULES)
    return recipe.done()


def _defaults(recipe: Imported) -> None:
    """What LLaMA-Factory does where nothing is said."""
    recipe.put("data.max_length", 2048)
    recipe.put("data.too_long", "truncate")
    run = {
        "learning_rate": 5e-5, "epochs": 3.0, "batch_size": 8, "scheduler": "linear", "warmup": 0.0,
        "gradient_checkpointing": True, "seed": SEED,
    }  # fmt: skip
    for name, value in run.items():
        recipe.put(f"training.{name}", value)


def _task(recipe: Imported, values: Mapping[str, Any]) -> None:
    stage = taken(values, "stage", "sft")
    if stage not in STAGES:
        recipe.refused["stage"] = f"'{stage}' isn't trained here; there are {listing(STAGES)}"
        return
    task, loss = STAGES[stage], taken(values, "pref_loss", "sigmoid")
    if stage == "dpo" and loss == "orpo":
        task = "orpo"
    elif stage == "dpo" and loss not in LOSSES:
        recipe.refused["pref_loss"] = f"there is no loss '{loss}' here; there are {listing([*LOSSES, 'orpo'])}"
    elif stage == "dpo" and LOSSES[loss]:
        recipe.put("preferences.loss_type", LOSSES[loss], "pref_loss")
    if "pref_loss" in values:
        recipe.translated.setdefault("pref_loss", "task")
    recipe.put("task", task, *given(values, "stage"))
    if stage == "pt":
        recipe.put("data.format", "text", "stage")


def _method(recipe: Imported, values: Mapping[str, Any]) -> None:
    kind = taken(values, "finetuning_type", "lora")
    if kind == "full":
        recipe.put("method.name", "full", *given(values, "finetuning_type"))
        recipe.without_effect |= {key: "all weights are tuned" for key in values if key.startswith("lora_")}
        return
    if kind != "lora":
        recipe.refused["finetuning_type"] = f"there is no '{kind}' here; lora and full are translated"
        return
    recipe.put("method.name", "dora" if taken(values, "use_dora") else "lora", *given(values, "finetuning_type"))
    if "use_dora" in values:
        recipe.translated["use_dora"] = "method.name"
    # Their alpha follows the rank where it isn't given, so that changing the rank alone keeps the scale at 2.
    rank = taken(values, "lora_rank", 8)
    recipe.put("method.r", rank, *given(values, "lora_rank"))
    recipe.put("method.lora_alpha", taken(values, "lora_alpha", 2 * rank), *given(values, "lora_alpha"))
    target = taken(values, "lora_target", "all")
    # "all" means the linear layers of the blocks there as well, without the head.
    everything = names(target) == ["all"]
    recipe.put(
        "method.target_modules",
        "all-linear" if everything else names(target),
        *given(values, "lora_target"),
    )
    steps = taken(values, "pissa_iter", 16)
    # -1 is the exact decomposition there, and 16 power iterations the default.
    start = "pissa" if steps == -1 else f"pissa_niter_{steps}"
    if recipe.switch(values, "pissa_init", "method.init_lora_weights", start) and "pissa_iter" in values:
        recipe.translated["pissa_iter"] = "method.init_lora_weights"


def _model(recipe: Imported, values: Mapping[str, Any]) -> None:
    for key, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        recipe.switch(values, key, "model.dtype", dtype)
    bits = taken(values, "quantization_bit")
    keys = given(values, "quantization_bit", "quantization_type", "quantization_method")
    if bits is None:
        idle_keys = [*keys, *given(values, "double_quantization")]
        recipe.without_effect |= dict.fromkeys(idle_keys, "nothing is quantized")
        return
    method = taken(values, "quantization_method", "bnb")
    if method not in ("bnb", "bitsandbytes"):
        recipe.refused["quantization_method"] = f"'{method}' isn't quantized with here; bnb is"
    if bits not in (4, 8):
        recipe.refused["quantization_bit"] = f"there are 4 and 8 bits here, not {bits}"
        return
    if bits == 4 and taken(values, "double_quantization", True) is False:
        recipe.refused["double_quantization"] = "scales of 4-bit weights are always quantized, too"
    elif "double_quantization" in values:
        recipe.without_effect["double_quantization"] = "scales of 4-bit weights are always quantized, too"
    kind = taken(values, "quantization_type", "nf4")
    recipe.put("model.quantize", one_of(("nf4", "fp4"), "type of 4 bits")(kind) if bits == 4 else "int8", *keys)


def _run(recipe: Imported, values: Mapping[str, Any]) -> None:
    # Steps win over a share there too; here one setting is either, told apart by being whole or below 1.
    steps, share = taken(values, "warmup_steps", 0), taken(values, "warmup_ratio", 0)
    recipe.put("training.warmup", steps or share, *given(values, "warmup_steps", "warmup_ratio"))
    keep_best(recipe, values)
    if taken(values, "eval_strategy") == "epoch" and "eval_steps" in values:
        recipe.without_effect["eval_steps"] = "evaluated after each epoch"


def _packing(recipe: Imported, values: Mapping[str, Any]) -> None:
    packed, neat = taken(values, "packing"), bool(taken(values, "neat_packing"))
    # Pretraining packs there unless it is told not to.
    packs = neat or (taken(values, "stage", "sft") == "pt" if packed is None else bool(packed))
    recipe.put("data.packing", packs, *given(values, "packing", "neat_packing"))
    if packs and not neat:
        recipe.different["packing"] = (
            "examples that share a row don't see each other here; theirs do without neat_packing"
        )


INFO = "dataset_info.json"
ALPACA = {
    "prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history",
}  # fmt: skip
"""Their names of the columns of alpaca rows, and ours."""
PREFERENCE = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected", "system": "system"}
MEDIA = ("images", "videos", "audios")
OPENAI_TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
SHARE_GPT_TAGS = {
    "role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt",
    "observation_tag": "observation", "function_tag": "function_call", "system_tag": "system",
}  # fmt: skip


def _train_data(recipe: Imported, values: Mapping[str, Any], folder: Path) -> None:
    """Put the training data into the recipe."""
    if not taken(values, "dataset"):
        recipe.refused["dataset"] = "no data is named"
        return
    sources = _sources(recipe, values, "dataset", folder)
    weights = taken(values, "interleave_probs")
    mixes = str(taken(values, "mix_strategy", "concat"))
    if "mix_strategy" in values:
        recipe.without_effect["mix_strategy"] = "all rows of all sources, as here"
    if mixes != "concat" and weights is not None:
        shares = [float(weight) for weight in names(weights)]
        if len(shares) != len(sources):
            raise ConfigError(f"interleave_probs has {len(shares)} weights for {len(sources)} data sets")
        for source, weight in zip(sources, shares, strict=True):
            source["weight"] = weight
        recipe.translated |= {"mix_strategy": "data.train.weight", "interleave_probs": "data.train.weight"}
        recipe.different["mix_strategy"] = "an epoch has as many rows as the sources together, drawn by weight"
    elif mixes != "concat":
        recipe.refused["mix_strategy"] = "sources are mixed by weights; give interleave_probs"
    recipe.put("data.train", sources, "dataset")


def _held_out(recipe: Imported, values: Mapping[str, Any], folder: Path) -> None:
    """Put what is held out into the recipe."""
    if taken(values, "eval_dataset"):
        recipe.put("data.held_out", _sources(recipe, values, "eval_dataset", folder), "eval_dataset")
    hold_out(recipe, values, "val_size")


def _sources(recipe: Imported, values: Mapping[str, Any], key: str, folder: Path) -> list[dict[str, Any]]:
    where = str(taken(values, "dataset_dir", "data"))
    most = taken(values, "max_samples")
    sources = []
    try:
        info = None if where == "ONLINE" else _info(where, folder, "dataset_dir" in values)
        for name in names(values[key]):
            if info is not None and name not in info[0]:
                raise ConfigError(f"'{name}' is no entry of {info[1] / INFO}{did_you_mean(name, info[0])}")
            entry = {"hf_hub_url": name} if info is None else info[0][name]
            sources.append(_source(entry, name, info[1] if info else folder, most))
    except SlimtuneError as error:
        recipe.refused[key] = str(error)
    recipe.translated |= dict.fromkeys(given(values, "dataset_dir", "media_dir", "max_samples"), "data.train")
    return sources


def _info(where: str, folder: Path, has_place: bool) -> tuple[dict[str, Any], Path]:
    """The entries, and the folder that their files are in: from where one stands, or from where their file is.

    Args:
        has_place: whether `where` was written in the file; else the file may also be right there.
    """
    beside = [] if has_place else [Path(), folder]
    # Their command runs in the root of their repository, with the file somewhere below: hence all parents of its
    # folder.
    for place in (Path(where), folder / where, *(parent / where for parent in folder.absolute().parents), *beside):
        if (place / INFO).is_file():
            try:
                info = json.loads((place / INFO).read_text(encoding="utf-8"))
            except ValueError as error:
                raise ConfigError(f"{place / INFO} is not JSON ({error})") from error
            return info, place
    raise ConfigError(f"the names of data stand in {Path(where) / INFO}, which isn't here; run where it is")


def _source(entry: Mapping[str, Any], name: str, folder: Path, most: int | None) -> dict[str, Any]:
    local = "file_name" in entry and "hf_hub_url" not in entry
    if not local and "hf_hub_url" not in entry:
        raise ConfigError(f"'{name}' is neither a file nor on the Hub, but {', '.join(sorted(entry))}")
    # First the entry's own draw, then the file's cut over all entries, as there: the smaller one is left.
    limits = [limit for limit in (entry.get("num_samples"), most) if limit]
    most = min(limits) if limits else None
    if local and most:
        _refuse_more_rows(folder / entry["file_name"], most)
    split = entry.get("split") or ("train" if not local else None)
    source: dict[str, Any] = {"path": str(folder / entry["file_name"]) if local else entry["hf_hub_url"]}
    # `datasets` reads a slice of a split from its name; a local file has none.
    source |= {"split": f"{split}[:{most}]" if most else split} if split and not local else {}
    source |= {"subset": entry["subset"]} if entry.get("subset") else {}
    if entry.get("folder"):
        raise ConfigError(f"'{name}' is a folder of a data set on the Hub, which can't be told apart here")
    return source | _format(entry, name)


def _refuse_more_rows(path: Path, most: int) -> None:
    """Of a file all rows are learned: fine, if there are no more than what was asked for."""
    if not path.exists():
        raise ConfigError(f"{path} isn't here, so whether it has more than {most} rows can't be told; run where it is")
    # One row more than allowed is enough to know; the file may have millions.
    if sum(1 for _ in islice(records(Source(str(path))), most + 1)) > most:
        raise ConfigError(f"{path} has more than {most} rows, and all would be learned; cut it, or drop max_samples")


def _format(entry: Mapping[str, Any], name: str) -> dict[str, Any]:
    columns, tags = entry.get("columns", {}), entry.get("tags", {})
    media = [key for key in MEDIA if columns.get(key)]
    if media:
        raise ConfigError(f"'{name}' has {', '.join(media)}; models of images, sound and video aren't tuned here")
    if entry.get("formatting", "alpaca") == "alpaca":
        ours, kind = (PREFERENCE, "preference") if entry.get("ranking") else (ALPACA, "alpaca")
        if columns.get("kto_tag"):
            raise ConfigError(f"'{name}' has judged answers in alpaca's columns; write its rows as messages with label")
        if kind == "preference" and columns.get("query"):
            raise ConfigError(f"'{name}' has a query beside its prompt; write both into prompt")
        return with_fields(kind, {ours[key]: column for key, column in columns.items() if key in ours and column})
    fields = {key: columns[key] for key in ("system", "tools", "chosen", "rejected") if columns.get(key)}
    fields |= {"label": columns["kto_tag"]} if columns.get("kto_tag") else {}
    place = columns.get("messages", "conversations")
    # Tags that repeat the defaults count as none.
    if {**SHARE_GPT_TAGS, **tags} == SHARE_GPT_TAGS:
        ours, kind = "conversations", "sharegpt"
    # Only the tags that these rows can have: files often name a tag for tools or observations that no row uses.
    elif {**OPENAI_TAGS, **{key: tag for key, tag in tags.items() if key in OPENAI_TAGS}} == OPENAI_TAGS:
        ours, kind = "messages", "messages"
    else:
        raise ConfigError(f"'{name}' has tags of its own ({tags}); write its rows as messages")
    if entry.get("ranking"):
        kind = "preference"
    elif "label" in fields:
        kind = "unpaired-preference"
    return with_fields(kind, fields | {ours: place})
