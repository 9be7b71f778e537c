"""What scripts written for peft reach for: names, keywords and views, each beside peft's own."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from torch import nn
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import slimtune
from slimtune.core.config import TargetedConfig, methods
from slimtune.errors import BaseMismatchError, ConfigError, MergeError
from tensors import adapter_tensors, assert_near, assert_same, copies, predict, randomize
from zoo import GPT2, LLAMA, Specimen

LIBRARIES = (slimtune, peft)


def lora(library: Any, specimen: Specimen = LLAMA, **options: Any) -> Any:
    return library.LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", **specimen.options(**options)})


def pair(specimen: Specimen = LLAMA, **options: Any) -> tuple[Any, Any]:
    """The same adapter on the same base, ours and peft's."""
    made = [library.get_peft_model(specimen.model(), lora(library, specimen, **options)) for library in LIBRARIES]
    return tuple(randomize(library, model) for library, model in zip(LIBRARIES, made, strict=True))


def layer(model: Any, specimen: Specimen = LLAMA) -> Any:
    inside = model.base_model.model
    return inside.transformer.h[0].attn.c_attn if specimen is GPT2 else inside.model.layers[0].self_attn.q_proj


# -- Views of a layer and a model.


@pytest.mark.parametrize("specimen", [LLAMA, GPT2], ids=lambda specimen: specimen.name)
def test_a_layer_shows_its_adapter_as_peft_s_does(specimen: Specimen) -> None:
    ours, theirs = (layer(model, specimen) for model in pair(specimen))
    for name in ("lora_A", "lora_B"):
        own, its = getattr(ours, name), getattr(theirs, name)
        assert list(own) == list(its) == ["default"]
        assert torch.equal(own["default"].weight, its["default"].weight)
        assert (own["default"].in_features, own["default"].out_features) == (
            its["default"].in_features,
            its["default"].out_features,
        )
    assert ours.scaling["default"] == theirs.scaling["default"]
    assert ours.r["default"] == theirs.r["default"]
    assert ours.lora_alpha["default"] == theirs.lora_alpha["default"]
    assert type(ours.lora_dropout["default"]) is type(theirs.lora_dropout["default"])
    assert torch.equal(ours.base_layer.weight, theirs.base_layer.weight)
    assert type(ours.get_base_layer()) is type(theirs.get_base_layer())
    x = torch.randn(2, 3, ours.base_layer.weight.shape[0 if specimen is GPT2 else 1])
    assert_near(ours.base_layer(x), theirs.base_layer(x))
    assert_near(ours.get_delta_weight("default"), theirs.get_delta_weight("default"))
    assert (ours.active_adapters, ours.merged_adapters, ours.merged, ours.disable_adapters) == (
        theirs.active_adapters,
        theirs.merged_adapters,
        theirs.merged,
        theirs.disable_adapters,
    )
    with pytest.raises(KeyError):
        ours.lora_A["other"]
    assert not hasattr(ours, "ia3_l")
    assert not hasattr(ours.base_layer, "lora_A")


def test_what_is_written_into_a_view_changes_the_adapter() -> None:
    models = pair()
    with torch.no_grad():
        for model in models:
            layer(model).lora_B["default"].weight.fill_(0.3)
            nn.init.ones_(layer(model).lora_A["default"].weight)
            layer(model).scaling["default"] *= 2
    assert_near(predict(models[0], LLAMA.batch()), predict(models[1], LLAMA.batch()))


@pytest.mark.parametrize(
    ("name", "method", "options"),
    [
        ("ia3_l", "IA3Config", {"target_modules": ["v_proj"], "feedforward_modules": []}),
        ("hada_w1_a", "LoHaConfig", {"target_modules": ["v_proj"], "r": 2}),
        ("lokr_w1", "LoKrConfig", {"target_modules": ["v_proj"], "r": 2}),
        ("vera_lambda_b", "VeraConfig", {"target_modules": ["v_proj"], "r": 4}),
    ],
)
def test_other_methods_have_their_tensors_by_name(name: str, method: str, options: dict[str, Any]) -> None:
    shown = []
    for library in LIBRARIES:
        model = library.get_peft_model(LLAMA.model(), getattr(library, method)(**options, task_type="CAUSAL_LM"))
        randomize(library, model)
        shown.append(getattr(model.base_model.model.model.layers[0].self_attn.v_proj, name)["default"])
    assert torch.equal(shown[0], shown[1])


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("names", ["default", ["other"], ["default", "other"]], ids=str)
def test_a_layer_s_adapters_are_chosen_and_trained_as_in_peft(names: str | list[str], inference: bool) -> None:
    shown = []
    for library, model in zip(LIBRARIES, pair(), strict=True):
        model.add_adapter("other", lora(library))
        site = layer(model)
        site.set_adapter(names, inference_mode=inference)
        trained = {name: site.lora_A[name].weight.requires_grad for name in ("default", "other")}
        shown.append((site.active_adapters, trained))
    assert shown[0] == shown[1]


def test_modules_that_are_trained_whole_have_their_copies() -> None:
    ours, theirs = (model.base_model.model.lm_head for model in pair(modules_to_save=["lm_head"]))
    assert list(ours.modules_to_save) == list(theirs.modules_to_save)
    assert torch.equal(ours.modules_to_save["default"].weight, theirs.modules_to_save["default"].weight)
    assert torch.equal(ours.original_module.weight, theirs.original_module.weight)


def test_a_name_of_the_module_s_own_comes_first() -> None:
    class Odd(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.scaling = 3.0
            self.lora_A = nn.Linear(1, 1)

    host = nn.Sequential(Odd())
    own = host[0].lora_A
    model: Any = slimtune.get_peft_model(host, slimtune.LoraConfig(r=2, target_modules=["0"]))
    assert model[0].scaling == 3.0
    assert model[0].lora_A is own


def test_the_base_model_is_reached_as_in_peft() -> None:
    for specimen in (LLAMA, GPT2):
        model: Any = slimtune.get_peft_model(specimen.model(), lora(slimtune, specimen))
        assert model.base_model.model is model
        assert model.base_model.peft_config is model.peft_config
        assert model.get_decoder() is getattr(model, model.base_model_prefix)
        assert model.base_model == getattr(model, model.base_model_prefix)
        assert model.base_model.config is model.config
        model.base_model.merge_adapter()
        assert model.merged_adapters if hasattr(model, "merged_adapters") else model.adapter_state.merged
    plain: Any = slimtune.get_peft_model(nn.Sequential(nn.Linear(3, 3)), slimtune.LoraConfig(r=2, target_modules=["0"]))
    assert plain.base_model.model is plain
    x = torch.randn(2, 3)
    assert torch.equal(plain.base_model(x), plain(x))


STATUS = ("enabled", "active_adapters", "merged_adapters", "requires_grad", "available_adapters", "devices")


@pytest.mark.parametrize("change", ["none", "second", "merged", "disabled", "frozen"])
def test_statuses_are_those_of_peft(change: str) -> None:
    layers, wholes = [], []
    for library, model in zip(LIBRARIES, pair(), strict=True):
        if change == "second":
            model.add_adapter("other", lora(library, r=2))
        elif change == "merged":
            model.merge_adapter()
        elif change == "disabled":
            model.base_model.disable_adapter_layers()
            # peft also switches the gradients off, and on again for all when it enables them.
            model.set_requires_grad("default", requires_grad=False)
        elif change == "frozen":
            model.set_requires_grad("default", requires_grad=False)
        found = [dataclasses.asdict(status) for status in library.get_layer_status(model)]
        names = [status["name"] for status in found]
        # peft's path begins at the tuner around the base.
        names = names if library is slimtune else [name.removeprefix("model.") for name in names]
        layers.append([{key: status[key] for key in STATUS} for status in found] + [{"names": names}])
        whole = dataclasses.asdict(model.get_model_status())
        wholes.append({k: v for k, v in whole.items() if k not in ("adapter_model_type", "trainable_params")})
    assert layers[0] == layers[1]
    assert wholes[0] == wholes[1]


def test_statuses_of_a_model_without_adapters_are_an_error() -> None:
    with pytest.raises(ConfigError, match="no adapter"):
        slimtune.get_layer_status(LLAMA.model())


# -- Names.


def test_the_classes_by_task_attach_and_tell() -> None:
    for name in ("PeftModelForCausalLM", "PeftMixedModel"):
        kin = getattr(slimtune, name)
        model = kin(LLAMA.model(), slimtune.LoraConfig(r=4, **LLAMA.options()))
        assert isinstance(model, slimtune.PeftModel)
        assert isinstance(model, kin)
    assert isinstance(slimtune.PeftModelForCausalLM(LLAMA.model(), lora(slimtune)), slimtune.PeftModelForCausalLM)
    assert not isinstance(slimtune.get_peft_model(LLAMA.model(), lora(slimtune)), slimtune.PeftModelForSeq2SeqLM)
    assert not isinstance(LLAMA.model(), slimtune.PeftMixedModel)


def test_methods_are_named_by_an_enum_of_strings() -> None:
    assert slimtune.LoraConfig().peft_type == slimtune.PeftType.LORA == peft.PeftType.LORA.value
    assert slimtune.PEFT_TYPE_TO_CONFIG_MAPPING[slimtune.PeftType.IA3] is slimtune.IA3Config
    fields = {"peft_type": "LORA", "r": 3, "target_modules": ["q_proj"]}
    assert slimtune.get_peft_config(fields).r == peft.get_peft_config(dict(fields)).r == 3


def test_an_adapter_is_injected_and_its_weights_are_read(tmp_path: Path) -> None:
    model = slimtune.inject_adapter_in_model(lora(slimtune), LLAMA.model())
    randomize(slimtune, model).save_pretrained(tmp_path)
    assert_same(slimtune.load_peft_weights(str(tmp_path)), peft.utils.load_peft_weights(str(tmp_path), device="cpu"))
    assert slimtune.PeftConfig.from_json_file(tmp_path / "adapter_config.json")["r"] == 4
    again = slimtune.inject_adapter_in_model(
        slimtune.LoraConfig(r=4), LLAMA.model(), state_dict=slimtune.load_peft_weights(str(tmp_path))
    )
    assert again.targeted_module_names == model.targeted_module_names


def test_the_base_s_own_tensors(tmp_path: Path) -> None:
    model = randomize(slimtune, slimtune.get_peft_model(LLAMA.model(), lora(slimtune, modules_to_save=["lm_head"])))
    expected = copies(LLAMA.model().state_dict())
    assert_same(copies(slimtune.get_base_model_state_dict(model)), expected)
    model.merge_adapter()
    assert_same(copies(slimtune.get_base_model_state_dict(model)), expected)


def test_the_scale_is_changed_for_a_while() -> None:
    answers = []
    for library, model in zip(LIBRARIES, pair(), strict=True):
        rescale = slimtune.rescale_adapter_scale if library is slimtune else peft.helpers.rescale_adapter_scale
        before = predict(model, LLAMA.batch())
        with rescale(model, 0.5):
            answers.append(predict(model, LLAMA.batch()))
        assert torch.equal(predict(model, LLAMA.batch()), before)
    assert_near(*answers)


def test_precision_is_cast_as_in_peft() -> None:
    dtypes = []
    for library, model in zip(LIBRARIES, pair(), strict=True):
        cast = slimtune.cast_mixed_precision_params if library is slimtune else peft.cast_mixed_precision_params
        cast(model, torch.bfloat16)
        dtypes.append(sorted((str(p.dtype), p.numel()) for p in model.parameters()))
    assert dtypes[0] == dtypes[1]


def test_a_model_card_is_written_and_its_text_kept(tmp_path: Path) -> None:
    model = slimtune.get_peft_model(LLAMA.model(), lora(slimtune, base_model_name_or_path="someone/llama"))
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.base_model == "someone/llama"
    assert card.data.pipeline_tag == "text-generation"
    assert {"lora", "base_model:adapter:someone/llama"} <= set(card.data.tags)
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags: [mine]\n---\nMy own words.\n")
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert "My own words." in card.text
    assert card.data.license == "mit"
    assert {"mine", "lora"} <= set(card.data.tags)


# -- Loading.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pair()[1].save_pretrained(tmp_path, save_embedding_layers=False)
    return tmp_path


KEYWORDS: dict[str, Any] = {
    "torch_dtype": torch.float16, "dtype": torch.float16, "device_map": {"": "cpu"}, "torch_device": "cpu",
    "use_safetensors": True, "max_memory": {"cpu": "4GB"}, "offload_folder": "x", "low_cpu_mem_usage": True,
    "ephemeral_gpu_offload": False, "key_mapping": None, "ignore_mismatched_sizes": True, "trust_remote_code": True,
    "revision": None, "local_files_only": True,
}  # fmt: skip


@pytest.mark.parametrize("name", KEYWORDS)
def test_keywords_of_peft_load_what_peft_loads(name: str, folder: Path, recwarn: pytest.WarningsRecorder) -> None:
    options = {name: KEYWORDS[name]}
    ours = slimtune.PeftModel.from_pretrained(LLAMA.model(), folder, **options)
    theirs = peft.PeftModel.from_pretrained(LLAMA.model(), folder, **options)
    assert_near(predict(ours, LLAMA.batch()), predict(theirs, LLAMA.batch()))
    told = [str(warning.message) for warning in recwarn if f"{name} has no effect" in str(warning.message)]
    without_effect = ("torch_dtype", "dtype", "device_map", "torch_device", "max_memory", "offload_folder")
    assert len(told) == (name in (*without_effect, "trust_remote_code"))


def test_an_unknown_keyword_is_an_error(folder: Path) -> None:
    with pytest.raises(ConfigError, match="no argument 'revison'; did you mean 'revision'"):
        slimtune.PeftModel.from_pretrained(LLAMA.model(), folder, revison="main")
    with pytest.raises(ConfigError, match="pickle"):
        slimtune.PeftModel.from_pretrained(LLAMA.model(), folder, use_safetensors=False)


def test_keys_are_mapped_as_the_caller_says(folder: Path) -> None:
    tensors = slimtune.load_peft_weights(str(folder))
    expected = predict(slimtune.PeftModel.from_pretrained(LLAMA.model(), folder), LLAMA.batch())
    renamed = {name.replace("model.layers", "old.blocks"): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "adapter_model.safetensors")
    with pytest.raises(BaseMismatchError, match="old"):
        slimtune.PeftModel.from_pretrained(LLAMA.model(), folder)
    mapping = {r"^old\.blocks": "model.layers"}
    model = slimtune.PeftModel.from_pretrained(LLAMA.model(), folder, key_mapping=mapping)
    assert torch.equal(predict(model, LLAMA.batch()), expected)
    mapping = {r"^old\.blocks\.(\d+)": r"model.layers.\1"}
    model = slimtune.PeftModel.from_pretrained(LLAMA.model(), folder, key_mapping=mapping)
    assert torch.equal(predict(model, LLAMA.batch()), expected)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrappers_are_taken_off_at_reading(prefix: str, folder: Path) -> None:
    expected = slimtune.load_peft_weights(str(folder))
    wrapped = {
        prefix + name.replace("layers.1.", "layers.1._checkpoint_wrapped_module."): t for name, t in expected.items()
    }
    save_file(wrapped, folder / "adapter_model.safetensors")
    model = slimtune.PeftModel.from_pretrained(LLAMA.model(), folder)
    assert_same(copies(adapter_tensors(slimtune, model)), expected)


def test_wrappers_never_reach_a_file(tmp_path: Path) -> None:
    expected = pair()[0]
    base: Any = LLAMA.model()
    base.model.layers[0] = torch.compile(base.model.layers[0], backend="eager")
    model = randomize(slimtune, slimtune.get_peft_model(base, lora(slimtune)))
    assert_same(copies(adapter_tensors(slimtune, model)), copies(adapter_tensors(slimtune, expected)))
    model.save_pretrained(tmp_path / "layer")
    torch.compile(model, backend="eager").save_pretrained(tmp_path / "model")
    for name in ("layer", "model"):
        reread = slimtune.PeftModel.from_pretrained(LLAMA.model(), tmp_path / name)
        assert_near(predict(reread, LLAMA.batch()), predict(expected, LLAMA.batch()))


TINY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def llava() -> Any:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(**TINY, image_size=16, patch_size=8)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=LlamaConfig(vocab_size=50, **TINY))
    )


def gemma3() -> Any:
    torch.manual_seed(0)
    text = {**TINY, "vocab_size": 50, "num_key_value_heads": 1, "head_dim": 8}
    vision = {**TINY, "image_size": 16, "patch_size": 8}
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))


@pytest.mark.parametrize("build", [llava, gemma3])
def test_keys_that_transformers_renamed_are_read(build: Any, tmp_path: Path) -> None:
    config = slimtune.LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj")
    model = randomize(slimtune, slimtune.get_peft_model(build(), config))
    expected = copies(adapter_tensors(slimtune, model))
    model.save_pretrained(tmp_path)
    old = {name.replace("model.language_model.", "language_model.model."): t for name, t in expected.items()}
    assert old.keys() != expected.keys()
    save_file(old, tmp_path / "adapter_model.safetensors")
    assert_same(copies(adapter_tensors(slimtune, slimtune.PeftModel.from_pretrained(build(), tmp_path))), expected)


ON_LLAVA: dict[str, dict[str, Any]] = {
    "BITFIT": {"target_modules": r".*language_model.*q_proj", "add_bias": True},
    "LN_TUNING": {"target_modules": r".*language_model.*norm"},
    "TRAINABLE_TOKENS": {"target_modules": r".*language_model.embed_tokens", "token_indices": [4]},
}
"""What a method needs there, where it isn't a linear layer."""


@pytest.mark.parametrize("method", sorted(name for name, c in methods().items() if issubclass(c, TargetedConfig)))
def test_keys_of_every_method_are_read_by_their_older_names(method: str, tmp_path: Path) -> None:
    options = ON_LLAVA.get(method, {"target_modules": r".*language_model.*q_proj"})
    config = methods()[method](**options, modules_to_save=["post_attention_layernorm"])
    model = randomize(slimtune, slimtune.get_peft_model(llava(), config))
    expected = copies(adapter_tensors(slimtune, model))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    old = {name.replace("model.language_model.", "language_model.model."): t for name, t in expected.items()}
    assert len(old.keys() & expected.keys()) <= 2, "VeRA's projection alone stands by itself"
    save_file(old, tmp_path / "adapter_model.safetensors")
    assert_same(copies(adapter_tensors(slimtune, slimtune.PeftModel.from_pretrained(llava(), tmp_path))), expected)


def test_missing_and_unexpected_keys_are_given_back(folder: Path) -> None:
    model = slimtune.PeftModel.from_pretrained(LLAMA.model(), folder)
    assert model.load_adapter(folder, "other") == ([], [])
    tensors = dict(adapter_tensors(slimtune, model))
    lost = max(tensors)
    half = {name: torch.ones_like(tensor) for name, tensor in tensors.items() if name != lost}
    kept = tensors[lost].clone()
    with pytest.warns(UserWarning, match="lacks|besides"):
        result = slimtune.set_peft_model_state_dict(model, {**half, "base_model.model.nowhere.lora_A.weight": kept})
    assert result.missing_keys == [lost]
    assert result.unexpected_keys == ["base_model.model.nowhere.lora_A.weight"]
    now = adapter_tensors(slimtune, model)
    assert torch.equal(now[lost], kept)
    assert all(bool((tensor == 1).all()) for name, tensor in now.items() if name != lost)
    with pytest.raises(BaseMismatchError):
        slimtune.set_peft_model_state_dict(model, {"base_model.model.nowhere.lora_A.weight": kept})


# -- A second time.


def test_a_second_get_peft_model_takes_the_place_of_the_first() -> None:
    model = pair()[0]
    with pytest.warns(UserWarning, match="already, which the new one replaces"):
        again = slimtune.get_peft_model(model, lora(slimtune, r=2))
    assert again is model
    assert model.peft_config["default"].r == 2
    assert model.active_adapters == ["default"]
    assert_near(predict(model, LLAMA.batch()), predict(LLAMA.model(), LLAMA.batch()))


def test_loading_over_an_adapter_takes_its_config_too(tmp_path: Path) -> None:
    """The same shapes under another alpha would be another function."""
    other = randomize(slimtune, slimtune.get_peft_model(LLAMA.model(), lora(slimtune, lora_alpha=32)), seed=5)
    other.save_pretrained(tmp_path)
    model = pair()[0]
    model.load_adapter(tmp_path, "default")
    assert_near(predict(model, LLAMA.batch()), predict(other, LLAMA.batch()))
    ranked = randomize(slimtune, slimtune.get_peft_model(LLAMA.model(), lora(slimtune, r=2)), seed=5)
    ranked.save_pretrained(tmp_path / "ranked")
    slimtune.PeftModel.from_pretrained(model, tmp_path / "ranked")
    assert_near(predict(model, LLAMA.batch()), predict(ranked, LLAMA.batch()))


def test_after_the_last_adapter_another_one_is_active() -> None:
    model = pair()[0]
    model.delete_adapter("default")
    assert model.active_adapters == []
    assert_near(predict(model, LLAMA.batch()), predict(LLAMA.model(), LLAMA.batch()))
    with pytest.raises(ConfigError, match="no adapter is active"):
        _ = model.active_adapter
    model.add_adapter("next", lora(slimtune))
    assert model.active_adapters == ["next"]
    assert any(parameter.requires_grad for parameter in model.parameters())


# -- Hotswapping.


@pytest.fixture
def ranks(tmp_path: Path) -> dict[str, Any]:
    """Adapters of other ranks, scales and targets in folders, with what each gives."""
    made = {}
    for seed, (name, options) in enumerate(
        {"a": {"r": 4}, "b": {"r": 2, "lora_alpha": 32}, "c": {"r": 4, "target_modules": ["q_proj"]}}.items()
    ):
        model = slimtune.get_peft_model(LLAMA.model(), lora(slimtune, **options))
        randomize(slimtune, model, seed=seed).save_pretrained(tmp_path / name)
        made[name] = (tmp_path / name, predict(model, LLAMA.batch()))
    return made


def test_adapters_take_each_other_s_place(ranks: dict[str, Any]) -> None:
    model = slimtune.PeftModel.from_pretrained(LLAMA.model(), ranks["a"][0])
    slimtune.prepare_model_for_compiled_hotswap(model, target_rank=8)
    assert_near(predict(model, LLAMA.batch()), ranks["a"][1])
    torch.compiler.reset()
    compiled: Any = torch.compile(model, backend="eager")
    predict(compiled, LLAMA.batch())
    with torch.compiler.set_stance("fail_on_recompile"):
        for name in ("b", "c", "a"):
            slimtune.hotswap_adapter(compiled, ranks[name][0], "default")
            assert_near(predict(compiled, LLAMA.batch()), ranks[name][1])
    torch.compiler.reset()


def test_what_cannot_be_swapped_changes_nothing(ranks: dict[str, Any], tmp_path: Path) -> None:
    model = slimtune.PeftModel.from_pretrained(LLAMA.model(), ranks["c"][0])
    with pytest.raises(BaseMismatchError, match="doesn't"):
        slimtune.hotswap_adapter(model, ranks["a"][0], "default")
    small = slimtune.PeftModel.from_pretrained(LLAMA.model(), ranks["b"][0])
    with pytest.raises(BaseMismatchError, match="highest rank first"):
        slimtune.hotswap_adapter(small, ranks["a"][0], "default")
    assert_near(predict(model, LLAMA.batch()), ranks["c"][1])
    assert_near(predict(small, LLAMA.batch()), ranks["b"][1])
    small.merge_adapter()
    with pytest.raises(MergeError):
        slimtune.hotswap_adapter(small, ranks["b"][0], "default")
    slimtune.get_peft_model(LLAMA.model(), slimtune.IA3Config()).save_pretrained(tmp_path / "ia3")
    with pytest.raises(ConfigError, match="takes the place of a LoRA"):
        slimtune.hotswap_adapter(copy.deepcopy(model), tmp_path / "ia3", "default")


def test_names_that_suites_of_tests_read(tmp_path: Path) -> None:
    for library, model in zip(LIBRARIES, pair(), strict=True):
        assert model.prefix == "lora_"
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert trained
        assert all(model.prefix in name for name in trained)
        assert model.base_model.active_adapter in ("default", ["default"])
        model.add_adapter("other", lora(library))
        model.base_model.set_adapter(["default", "other"])
        assert model.base_model.active_adapter == ["default", "other"]
    assert not slimtune.get_peft_model(LLAMA.model(), lora(slimtune)).supports_lora_conversion()
    plain: Any = slimtune.get_peft_model(nn.Sequential(nn.Linear(3, 3)), slimtune.LoraConfig(r=2, target_modules=["0"]))
    assert callable(plain.push_to_hub)
    plain.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert slimtune.LoraConfig().peft_type.value == peft.LoraConfig().peft_type.value == "LORA"
    assert type(slimtune.LoraConfig().to_dict()["peft_type"]) is str


def test_a_bias_of_b_is_swapped_at_its_own_scale(tmp_path: Path) -> None:
    made = []
    for seed, alpha in ((1, 8), (2, 32)):
        config = lora(slimtune, lora_bias=True, lora_alpha=alpha)
        model = slimtune.get_peft_model(LLAMA.model(), config)
        made.append(randomize(slimtune, model, seed=seed))
    made[1].save_pretrained(tmp_path)
    slimtune.hotswap_adapter(made[0], tmp_path, "default")
    assert_near(predict(made[0], LLAMA.batch()), predict(made[1], LLAMA.batch()))


def test_ranks_in_groups_are_not_padded() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    attached = slimtune.get_peft_model(model, slimtune.LoraConfig(r=2, target_modules=["0"]))
    before = copies(adapter_tensors(slimtune, attached))
    with pytest.raises(ConfigError, match="2 groups"):
        slimtune.prepare_model_for_compiled_hotswap(attached, target_rank=4)
    assert_same(copies(adapter_tensors(slimtune, attached)), before)
