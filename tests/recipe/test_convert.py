"""Files of LLaMA-Factory and Axolotl as recipes: each key is translated, said to change nothing, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from slimtune.errors import ConfigError
from slimtune.recipe.convert import axolotl, import_recipe, llama_factory, text_of
from slimtune.recipe.convert.rules import Imported
from slimtune.recipe.recipe import Recipe
from small_text_model import write_lines

ALPACA = {"instruction": "add", "input": "1 1", "output": "2"}
INFO = {
    "mine": {"file_name": "mine.json"},
    "chats": {"file_name": "chats.jsonl", "formatting": "sharegpt"},
    "openai": {
        "file_name": "openai.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "turns", "tools": "functions"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    },
    "renamed": {"file_name": "r.jsonl", "columns": {"prompt": "question", "response": "answer"}},
    "pairs": {
        "file_name": "pairs.jsonl",
        "ranking": True,
        "columns": {"prompt": "q", "chosen": "chosen", "rejected": "rejected"},
    },
    "hub": {"hf_hub_url": "someone/rows", "subset": "en", "split": "test"},
    "drawn": {"hf_hub_url": "someone/rows", "num_samples": 5},
    "pictures": {"file_name": "p.json", "formatting": "sharegpt", "columns": {"images": "images"}},
    "tagged": {"file_name": "t.json", "formatting": "sharegpt", "tags": {"role_tag": "who", "content_tag": "what"}},
    "talks": {"file_name": "h.json", "columns": {"prompt": "p", "response": "r", "history": "past"}},
    "ranked": {
        "file_name": "d.json",
        "formatting": "sharegpt",
        "ranking": True,
        "columns": {"messages": "talk", "chosen": "better", "rejected": "worse"},
    },
    "judged": {"file_name": "k.json", "formatting": "sharegpt", "columns": {"messages": "messages", "kto_tag": "ok"}},
    "modelscope": {"ms_hub_url": "someone/rows"},
}
LLAMA_FACTORY: dict[str, Any] = {
    "model_name_or_path": "Qwen/Qwen3-4B-Instruct-2507", "trust_remote_code": True, "stage": "sft", "do_train": True,
    "finetuning_type": "lora", "lora_rank": 8, "lora_target": "all", "dataset": "mine", "template": "qwen3",
    "cutoff_len": 1024, "preprocessing_num_workers": 16, "output_dir": "saves/qwen3", "logging_steps": 10,
    "save_steps": 500, "plot_loss": True, "overwrite_output_dir": True, "report_to": "none",
    "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "learning_rate": 1e-4,
    "num_train_epochs": 3.0, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "bf16": True,
    "ddp_timeout": 180000000, "resume_from_checkpoint": None,
}  # fmt: skip
AXOLOTL: dict[str, Any] = {
    "base_model": "NousResearch/Llama-3.2-1B", "load_in_8bit": False, "load_in_4bit": True, "adapter": "qlora",
    "datasets": [{"path": "someone/alpaca", "type": "alpaca"}], "val_set_size": 0.05, "output_dir": "./outputs/out",
    "sequence_len": 2048, "sample_packing": True, "lora_r": 32, "lora_alpha": 16, "lora_dropout": 0.05,
    "lora_target_linear": True, "wandb_project": None, "gradient_accumulation_steps": 4, "micro_batch_size": 2,
    "num_epochs": 4, "optimizer": "paged_adamw_32bit", "lr_scheduler": "cosine", "learning_rate": 0.0002,
    "bf16": "auto", "tf32": False, "gradient_checkpointing": True, "attn_implementation": "flash_attention_2",
    "warmup_ratio": 0.1, "evals_per_epoch": 4, "weight_decay": 0.0, "special_tokens": {"pad_token": "<|end_of_text|>"},
}  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where data/dataset_info.json is."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(INFO))
    (tmp_path / "data" / "mine.json").write_text(json.dumps([ALPACA] * 3))
    return tmp_path


def imported(values: dict[str, Any]) -> tuple[Imported, Recipe]:
    Path("theirs.yaml").write_text(yaml.safe_dump(values))
    found = import_recipe("theirs.yaml")
    assert set(values) == set(found.translated) | set(found.without_effect)
    Path("recipe.yaml").write_text(text_of(found, "theirs.yaml"))
    return found, Recipe.read("recipe.yaml")


def holds(recipe: Recipe, expected: dict[str, Any]) -> None:
    """That the recipe has these values in these places."""
    for place, value in expected.items():
        found: Any = recipe
        for name in place.split("."):
            found = found[name] if isinstance(found, dict) else getattr(found, name)
        assert found == value, place


def refused(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as refusal:
        imported(values)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_a_file_of_llama_factory() -> None:
    found, recipe = imported(LLAMA_FACTORY)
    assert (recipe.task, recipe.output, recipe.method.name) == ("text", "saves/qwen3", "lora")
    assert (recipe.model.name, recipe.model.dtype, recipe.model.trust_remote_code) == (
        "Qwen/Qwen3-4B-Instruct-2507", "bfloat16", True,
    )  # fmt: skip
    config = recipe.method.config()
    assert (config.r, config.lora_alpha, config.target_modules, config.lora_dropout) == (8, 16, "all-linear", 0.0)
    assert (recipe.data.max_length, recipe.data.too_long, recipe.data.packing) == (1024, "truncate", False)
    assert recipe.data.train[0].path == "data/mine.json"
    assert recipe.data.train[0].format == "alpaca"
    training = recipe.training
    assert (training.batch_size, training.gradient_accumulation, training.epochs) == (1, 8, 3)
    assert (training.learning_rate, training.scheduler, training.warmup, training.seed) == (1e-4, "cosine", 0.1, 42)
    assert training.gradient_checkpointing
    assert (training.logging_steps, training.save_steps) == (10, 500)
    assert found.without_effect["ddp_timeout"] == "for several processes"
    assert {"template", "cutoff_len"} <= found.different.keys()


def test_what_llama_factory_does_where_nothing_is_said() -> None:
    _, recipe = imported({"model_name_or_path": "m", "dataset": "mine"})
    training = recipe.training
    assert (training.learning_rate, training.epochs, training.batch_size) == (5e-5, 3, 8)
    assert (training.scheduler, training.warmup, training.seed) == ("linear", 0, 42)
    assert (recipe.data.max_length, recipe.data.too_long) == (2048, "truncate")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"finetuning_type": "full"}, {"method.name": "full"}),
        ({"use_dora": True}, {"method.name": "dora", "method.fields.r": 8}),
        ({"lora_target": "q_proj,v_proj"}, {"method.fields.target_modules": ["q_proj", "v_proj"]}),
        ({"lora_alpha": 5}, {"method.fields.lora_alpha": 5}),
        ({"use_rslora": True, "loraplus_lr_ratio": 16.0}, {"method.fields.use_rslora": True}),
        ({"pissa_init": True}, {"method.fields.init_lora_weights": "pissa_niter_16"}),
        ({"pissa_init": True, "pissa_iter": -1}, {"method.fields.init_lora_weights": "pissa"}),
        ({"additional_target": "lm_head"}, {"method.fields.modules_to_save": ["lm_head"]}),
        ({"quantization_bit": 4, "quantization_method": "bnb"}, {"model.quantize": "nf4"}),
        ({"quantization_bit": 4, "quantization_type": "fp4"}, {"model.quantize": "fp4"}),
        ({"quantization_bit": 8}, {"model.quantize": "int8"}),
        ({"fp16": True, "bf16": False}, {"model.dtype": "float16"}),
        ({"disable_gradient_checkpointing": True}, {"training.gradient_checkpointing": False}),
        ({"warmup_steps": 20}, {"training.warmup": 20}),
        ({"max_steps": -1}, {"training.max_steps": None}),
        ({"val_size": 0.1}, {"data.held_out": 0.1}),
        ({"neat_packing": True}, {"data.packing": True}),
        (
            {"stage": "dpo", "dataset": "pairs", "pref_beta": 0.2, "pref_loss": "ipo"},
            {"task": "dpo", "preferences.beta": 0.2, "preferences.loss_type": "ipo"},
        ),
        ({"stage": "dpo", "dataset": "pairs", "pref_loss": "orpo"}, {"task": "orpo", "preferences.loss_type": None}),
        ({"stage": "pt"}, {"data.packing": True, "data.format": "text"}),
        ({"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}, {"training.keep_best": "loss"}),
        ({"max_samples": 3}, {"output": "saves/qwen3"}),
        ({"optim": "adamw_8bit", "lr_scheduler_kwargs": {"a": 1}}, {"training.optim": "adamw_8bit"}),
        ({"model_revision": "v2"}, {"model.revision": "v2"}),
        ({"model_revision": "main"}, {"model.revision": None}),
    ],
    ids=str,
)
def test_keys_of_llama_factory(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    holds(imported(LLAMA_FACTORY | changes)[1], expected)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("mine,chats", [("data/mine.json", "alpaca", {}), ("data/chats.jsonl", "sharegpt", {})]),
        ("openai", [("data/openai.jsonl", "messages", {"messages": "turns", "tools": "functions"})]),
        ("renamed", [("data/r.jsonl", "alpaca", {"instruction": "question", "output": "answer"})]),
        ("hub", [("someone/rows", "alpaca", {})]),
    ],
)
def test_the_data_of_llama_factory(names: str, expected: list[Any]) -> None:
    _, recipe = imported(LLAMA_FACTORY | {"dataset": names})
    assert [(one.path, one.format, one.fields) for one in recipe.data.train] == expected


def test_parts_and_weights_of_data() -> None:
    _, recipe = imported(LLAMA_FACTORY | {"dataset": "hub", "max_samples": 7})
    assert (recipe.data.train[0].split, recipe.data.train[0].subset) == ("test[:7]", "en")
    for most, split in ((None, "train[:5]"), (7, "train[:5]"), (3, "train[:3]")):
        _, recipe = imported(LLAMA_FACTORY | {"dataset": "drawn", "max_samples": most})
        assert recipe.data.train[0].split == split
    mix = {"dataset": "mine,chats", "mix_strategy": "interleave_over", "interleave_probs": "0.7,0.3"}
    found, recipe = imported(LLAMA_FACTORY | mix)
    assert [one.weight for one in recipe.data.train] == [0.7, 0.3]
    assert "mix_strategy" in found.different


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_galore": True}, ["use_galore"]),
        ({"stage": "rm"}, ["stage: 'rm'"]),
        ({"stage": "dpo", "dataset": "pairs", "pref_loss": "simpo"}, ["simpo"]),
        ({"finetuning_type": "oft"}, ["'oft'"]),
        ({"quantization_bit": 3}, ["4 and 8 bits"]),
        ({"quantization_bit": 4, "quantization_method": "hqq"}, ["'hqq'"]),
        ({"quantization_bit": 4, "double_quantization": False}, ["double_quantization"]),
        ({"train_on_prompt": True, "mask_history": True}, ["2 keys", "train_on_prompt", "mask_history"]),
        ({"neftune_noise_alpha": 5.0}, ["neftune_noise_alpha"]),
        ({"adam_beta2": 0.95}, ["adam_beta2"]),
        ({"deepspeed": "ds_z3.json"}, ["deepspeed", "one device"]),
        ({"learnin_rate": 1}, ["learnin_rate", "did you mean 'learning_rate'?"]),
        ({"lr_scheduler_type": "cosin"}, ["lr_scheduler_type", "did you mean 'cosine'?"]),
        ({"optim": "apollo_adamw"}, ["optim", "apollo_adamw"]),
        ({"dataset": "mien"}, ["did you mean 'mine'?"]),
        ({"dataset": None}, ["no data"]),
        ({"dataset": "pictures"}, ["images"]),
        ({"dataset": "tagged"}, ["tags of its own"]),
        ({"dataset": "modelscope"}, ["ms_hub_url"]),
        ({"dataset_dir": "elsewhere"}, ["elsewhere/dataset_info.json"]),
        ({"max_samples": 2}, ["more than 2 rows"]),
        ({"val_size": 100}, ["a share"]),
        ({"image_max_pixels": 100}, ["images"]),
    ],
    ids=str,
)
def test_keys_of_llama_factory_that_are_refused(changes: dict[str, Any], said: list[str]) -> None:
    message = refused(LLAMA_FACTORY | changes)
    assert "LLaMA-Factory" in message
    for part in said:
        assert part in message


def test_a_file_of_axolotl() -> None:
    found, recipe = imported(AXOLOTL)
    assert (recipe.model.name, recipe.model.quantize, recipe.model.dtype) == (
        "NousResearch/Llama-3.2-1B", "nf4", "bfloat16",
    )  # fmt: skip
    config = recipe.method.config()
    assert (config.r, config.lora_alpha, config.lora_dropout, config.target_modules) == (32, 16, 0.05, "all-linear")
    assert (recipe.data.train[0].path, recipe.data.train[0].format) == ("someone/alpaca", "alpaca")
    assert (recipe.data.max_length, recipe.data.too_long, recipe.data.packing) == (2048, "drop", True)
    assert recipe.data.held_out == 0.05
    training = recipe.training
    assert (training.batch_size, training.gradient_accumulation, training.epochs) == (2, 4, 4)
    assert (training.optim, training.scheduler, training.warmup, training.seed) == (
        "paged_adamw_32bit", "cosine", 0.1, 42,
    )  # fmt: skip
    assert found.without_effect["wandb_project"] == "it is empty"
    assert "datasets" in found.different


def test_what_axolotl_does_where_nothing_is_said() -> None:
    least = {"base_model": "m", "datasets": [{"path": "x.jsonl", "type": "chat_template"}], "learning_rate": 1e-5}
    found, recipe = imported(least)
    assert recipe.method.name == "full"
    assert (recipe.data.max_length, recipe.data.too_long, recipe.output) == (512, "drop", "./model-out")
    training = recipe.training
    assert (training.epochs, training.batch_size, training.scheduler, training.seed) == (1, 1, "cosine", 42)
    assert {"adapter", "warmup_steps"} <= found.different.keys()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"adapter": "lora", "load_in_4bit": False, "load_in_8bit": True}, {"model.quantize": "int8"}),
        ({"adapter": "lora", "load_in_4bit": False}, {"model.quantize": None}),
        ({"lora_target_linear": None, "lora_target_modules": ["q_proj"]}, {"method.fields.target_modules": ["q_proj"]}),
        ({"peft_use_dora": True}, {"method.name": "dora"}),
        ({"lora_modules_to_save": ["lm_head"]}, {"method.fields.modules_to_save": ["lm_head"]}),
        ({"peft": {"loftq_config": {"loftq_bits": 4}}}, {"method.fields.init_lora_weights": "loftq"}),
        ({"excess_length_strategy": "raise"}, {"data.too_long": "error"}),
        ({"cosine_min_lr_ratio": 0.1}, {"training.scheduler_options": {"min_lr_rate": 0.1}}),
        ({"warmup_ratio": None, "warmup_steps": 10}, {"training.warmup": 10}),
        ({"wandb_project": "mine"}, {"training.report_to": "wandb"}),
        ({"early_stopping_patience": 3}, {"training.early_stopping_patience": 3}),
        ({"test_datasets": [{"path": "t.jsonl", "type": "alpaca"}], "val_set_size": 0}, {"output": "./outputs/out"}),
        (
            {
                "rl": "dpo",
                "rl_beta": 0.3,
                "datasets": [{"path": "x", "type": {"field_chosen": "a", "field_rejected": "b"}}],
            },
            {"task": "dpo", "preferences.beta": 0.3},
        ),
        (
            {"rl": "ipo", "datasets": [{"path": "x", "type": {"field_chosen": "a", "field_rejected": "b"}}]},
            {"preferences.loss_type": "ipo"},
        ),
        ({"fp16": True, "bf16": False}, {"model.dtype": "float16"}),
        ({"bf16": False}, {"model.dtype": "float32"}),
        ({"plugins": ["axolotl.integrations.liger.LigerPlugin"], "liger_rope": True}, {"output": "./outputs/out"}),
        ({"revision_of_model": "v2"}, {"model.revision": "v2"}),
    ],
    ids=str,
)
def test_keys_of_axolotl(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    holds(imported(AXOLOTL | changes)[1], expected)


@pytest.mark.parametrize(
    ("stage", "dataset", "expected"),
    [
        ("sft", "talks", ("alpaca", {"instruction": "p", "output": "r", "history": "past"})),
        ("dpo", "ranked", ("preference", {"conversations": "talk", "chosen": "better", "rejected": "worse"})),
        ("kto", "judged", ("unpaired-preference", {"conversations": "messages", "label": "ok"})),
    ],
)
def test_layouts_of_llama_factory(stage: str, dataset: str, expected: tuple[str, dict[str, str]]) -> None:
    source = imported(LLAMA_FACTORY | {"stage": stage, "dataset": dataset})[1].data.train[0]
    assert (source.format, source.fields) == expected


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"path": "x.jsonl", "type": "chat_template"}, ("x.jsonl", "messages", {})),
        (
            {"path": "x.jsonl", "type": "chat_template", "field_messages": "turns"},
            ("x.jsonl", "messages", {"messages": "turns"}),
        ),
        (
            {
                "path": "x", "type": "chat_template", "field_messages": "conversations", "train_on_eos": "turn",
                "roles_to_train": ["assistant"], "message_property_mappings": {"role": "from", "content": "value"},
            },
            ("x", "sharegpt", {}),
        ),
        (
            {"path": "x", "type": "chat_template", "message_field_training": "train", "roles_to_train": ["assistant"]},
            ("x", "messages", {}),
        ),
        ({"path": "x", "type": "completion", "field": "body"}, ("x", "text", {"text": "body"})),
        ({"path": "json", "data_files": "mine.jsonl", "type": "alpaca"}, ("mine.jsonl", "alpaca", {})),
    ],
    ids=str,
)  # fmt: skip
def test_the_data_of_axolotl(entry: dict[str, Any], expected: tuple[Any, ...]) -> None:
    _, recipe = imported(AXOLOTL | {"datasets": [entry]})
    source = recipe.data.train[0]
    assert (source.path, source.format, source.fields) == expected


def test_a_data_set_of_the_hub_keeps_its_place() -> None:
    entry = {"path": "someone/rows", "type": "alpaca", "name": "main", "split": "test"}
    for revision, expected in (("v2", "v2"), ("main", None)):
        source = imported(AXOLOTL | {"datasets": [entry | {"revision": revision}]})[1].data.train[0]
        assert (source.subset, source.split, source.revision) == ("main", "test", expected)


def test_plain_texts_of_axolotl() -> None:
    changes = {"pretraining_dataset": [{"path": "someone/texts", "name": "en", "text_column": "body"}], "max_steps": 9}
    _, recipe = imported({**AXOLOTL, **changes, "datasets": None, "val_set_size": 0})
    source = recipe.data.train[0]
    assert (source.format, source.subset, source.fields) == ("text", "en", {"text": "body"})
    assert (recipe.data.streaming, recipe.training.max_steps) == (True, 9)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train_on_inputs": True}, ["train_on_inputs"]),
        ({"relora": True, "neftune_noise_alpha": 5}, ["2 keys", "relora", "neftune_noise_alpha"]),
        ({"adapter": "oft"}, ["'oft'"]),
        ({"adapter": "qlora", "load_in_4bit": False}, ["load_in_4bit"]),
        ({"adapter": None}, ["without an adapter"]),
        ({"rl": "grpo"}, ["'grpo'"]),
        ({"fsdp": ["full_shard"]}, ["one device"]),
        ({"optimizer": "muon"}, ["muon"]),
        ({"lr_scheduler": "one_cycle"}, ["one_cycle"]),
        ({"special_tokens": {"additional_special_tokens": ["<x>"]}}, ["additional_special_tokens"]),
        ({"tokens": ["<x>"]}, ["vocabulary"]),
        ({"plugins": ["mine.Plugin"]}, ["mine.Plugin"]),
        ({"datasets": [{"path": "x", "type": "input_output"}]}, ["input_output"]),
        ({"datasets": [{"path": "x", "type": "alpaca", "shards": 4}]}, ["shards"]),
        ({"datasets": [{"path": "x", "data_files": ["a"], "type": "alpaca"}]}, ["data_files"]),
        ({"datasets": [{"path": "x", "type": {"field_instruction": "a", "format": "b"}}]}, ["field_instruction"]),
        ({"val_set_size": 100}, ["a share"]),
        ({"sequence_length": 5}, ["did you mean 'sequence_len'?"]),
        ({"model_type": "AutoModelForSequenceClassification"}, ["model_type"]),
        ({"lora_r": None}, ["lora_r is missing"]),
        ({"bnb_config_kwargs": {"bnb_4bit_quant_type": "fp4"}}, ["bnb_config_kwargs"]),
    ],
    ids=str,
)
def test_keys_of_axolotl_that_are_refused(changes: dict[str, Any], said: list[str]) -> None:
    message = refused(AXOLOTL | changes)
    for part in said:
        assert part in message


@pytest.mark.parametrize(
    ("tool", "least"), [(llama_factory, LLAMA_FACTORY), (axolotl, AXOLOTL)], ids=["llama-factory", "axolotl"]
)
@pytest.mark.parametrize("value", [None, True, 7, "x", ["x"], {"x": 1}], ids=str)
def test_no_key_is_dropped(tool: Any, least: dict[str, Any], value: Any) -> None:
    """Whatever a file says, each key has come to something."""
    for key in tool.RULES:
        said = told(tool, {**least, key: value})
        assert key in said or key == "dataset_dir", key


def told(tool: Any, values: dict[str, Any]) -> set[str] | str:
    """The keys of which something was made or said, or what they were refused with."""
    try:
        found = tool.translate(values, Path())
    except ConfigError as error:
        return str(error)
    return found.translated.keys() | found.without_effect.keys()


def test_files_of_other_tools_and_of_none(folder: Path) -> None:
    for text, said in (
        ("a: 1", "of no tool known here"),
        ("base_model: a\nmodel_name_or_path: b", "one of the two only"),
        ("model: {name: x}\ndata: {train: y}", "is a recipe already"),
        ("- a", "is a list"),
        ("", "is empty"),
    ):
        (folder / "theirs.yaml").write_text(text)
        with pytest.raises(ConfigError, match=said):
            import_recipe("theirs.yaml")


def test_an_imported_recipe_trains(folder: Path) -> None:
    from typer.testing import CliRunner

    from slimtune.cli import app
    from small_text_model import save_base

    base = save_base(folder / "base")
    write_lines(folder / "data" / "chats.jsonl", *({"conversations": turns()} for _ in range(8)))
    theirs = LLAMA_FACTORY | {"model_name_or_path": str(base), "dataset": "mine,chats", "trust_remote_code": False}
    theirs |= {"cutoff_len": 256, "report_to": "none", "bf16": False}
    (folder / "theirs.yaml").write_text(yaml.safe_dump(theirs))

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(app, list(arguments))

    made = run("recipe", "import", "theirs.yaml", "--output", "recipe.yaml", "--json")
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["translated"]["lora_rank"] == "method.r"
    assert run("recipe", "import", "theirs.yaml", "-o", "recipe.yaml").exit_code == 2
    shown = run("recipe", "import", "theirs.yaml", "-o", "recipe.yaml", "--overwrite")
    assert "no effect: for several processes" in shown.stdout
    assert "not quite the same: template" in shown.stdout
    trained = run("train", "recipe.yaml", "training.max_steps=1", "--json")
    assert trained.exit_code == 0, trained.output
    assert json.loads(trained.stdout)["examples"] == 11


def turns() -> list[dict[str, str]]:
    return [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]


def test_the_entries_of_llama_factory_are_found_right_beside_the_file(folder: Path) -> None:
    for name in ("dataset_info.json", "mine.json"):
        (folder / "data" / name).rename(folder / name)
    _, recipe = imported({**LLAMA_FACTORY, "dataset": "mine"})
    assert [Path(source.path).name for source in recipe.data.train] == ["mine.json"]


def test_how_often_axolotl_evaluates_and_saves_is_said_to_differ() -> None:
    found, _ = imported({**AXOLOTL, "evals_per_epoch": 4, "saves_per_epoch": 1})
    assert "isn't evaluated 4 times in one; set training.eval_steps" in found.different["evals_per_epoch"]
    assert "set training.save_steps" in found.different["saves_per_epoch"]
    assert not {"evals_per_epoch", "saves_per_epoch"} & set(found.without_effect)
    assert "evals_per_epoch" not in imported({**AXOLOTL, "evals_per_epoch": 1})[0].different
