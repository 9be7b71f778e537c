"""What peft's own tests ask of models, layers and errors, kind by kind, each beside peft's own."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

import slimtune
from slimtune.errors import BaseMismatchError, ConfigError, MergeError
from tensors import assert_near, assert_same, predict, randomize
from zoo import LLAMA

LIBRARIES = (slimtune, peft)


def lora(library: Any, **options: Any) -> Any:
    return library.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options})


def adapted(library: Any, **options: Any) -> Any:
    return randomize(library, library.get_peft_model(LLAMA.model(), lora(library, **options)))


# -- Errors that callers catch, and read.


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_merged_adapter_is_neither_deleted_nor_harmed(library: Any) -> None:
    model = adapted(library)
    model.merge_adapter()
    merged = predict(model, LLAMA.batch())
    message = r"Cannot delete adapter\(s\) \['default'\] while they are merged. Please unmerge them first."
    with pytest.raises(ValueError, match=message):
        model.delete_adapter("default")
    assert torch.equal(predict(model, LLAMA.batch()), merged)
    model.unmerge_adapter()
    model.delete_adapter("default")


@pytest.mark.parametrize("library", LIBRARIES)
def test_an_adapter_that_is_not_there_is_named(library: Any) -> None:
    with pytest.raises(ValueError, match="Adapter other does not exist"):
        adapted(library).delete_adapter("other")


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_second_merge_is_told_of(library: Any) -> None:
    model = adapted(library)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
        model.merge_adapter()


@pytest.mark.parametrize("library", LIBRARIES)
def test_an_unknown_field_is_a_type_error(library: Any) -> None:
    # Scripts that run with several versions of peft catch it so.
    with pytest.raises(TypeError, match="lora_aplha"):
        library.LoraConfig(lora_aplha=4)


# -- Adapters without memory until a file fills them.


@pytest.mark.parametrize(
    "options", [{}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [1, 2]}], ids=str
)
@pytest.mark.parametrize("library", LIBRARIES)
def test_an_adapter_waits_on_meta_for_its_tensors(library: Any, options: dict[str, Any]) -> None:
    trained = adapted(library, **options)
    model = library.get_peft_model(LLAMA.model(), lora(library, **options), low_cpu_mem_usage=True)
    copies = {"cpu"} if "modules_to_save" in options else set()
    assert {p.device.type for name, p in model.named_parameters() if p.requires_grad} == {"meta", *copies}
    tensors = library.get_peft_model_state_dict(trained)
    library.set_peft_model_state_dict(model, tensors, low_cpu_mem_usage=True)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert torch.equal(predict(model, LLAMA.batch()), predict(trained, LLAMA.batch()))


def test_what_does_not_fill_an_adapter_leaves_it_without_values() -> None:
    tensors = slimtune.get_peft_model_state_dict(adapted(slimtune))
    model = slimtune.get_peft_model(LLAMA.model(), lora(slimtune), low_cpu_mem_usage=True)
    some = dict(list(tensors.items())[1:])
    # Filled in part, the rest would be anything.
    with pytest.raises(BaseMismatchError, match="lacks"):
        slimtune.set_peft_model_state_dict(model, some)
    assert {p.device.type for p in adapter_parameters(model)} == {"meta"}
    slimtune.set_peft_model_state_dict(model, tensors)
    assert_same(slimtune.get_peft_model_state_dict(model), tensors)


def adapter_parameters(model: Any) -> list[torch.nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if ".deltas." in name]


def test_a_start_of_the_base_is_found_again_for_an_adapter_that_waited(tmp_path: Any) -> None:
    trained = adapted(slimtune, init_lora_weights="pissa")
    model = slimtune.get_peft_model(LLAMA.model(), lora(slimtune, init_lora_weights="pissa"), low_cpu_mem_usage=True)
    slimtune.set_peft_model_state_dict(model, slimtune.get_peft_model_state_dict(trained))
    assert_near(predict(model, LLAMA.batch()), predict(trained, LLAMA.batch()))


# -- The base's own tensors, out and in again.


def test_a_base_s_tensors_go_back_under_their_plain_names() -> None:
    from peft import set_base_model_state_dict as theirs

    fresh = LLAMA.model().state_dict()
    for library, set_base in ((slimtune, slimtune.set_base_model_state_dict), (peft, theirs)):
        model = adapted(library, modules_to_save=["lm_head"])
        before = predict(model, LLAMA.batch())
        with torch.no_grad():
            for parameter in library.get_base_model_state_dict(model).values():
                parameter.add_(1.0)
        assert not torch.equal(predict(model, LLAMA.batch()), before)
        result = set_base(model, fresh)
        assert (result.missing_keys, result.unexpected_keys) == ([], [])
        assert torch.equal(predict(model, LLAMA.batch()), before)
        some = {name: tensor for name, tensor in fresh.items() if "norm" not in name} | {"other": torch.zeros(1)}
        with pytest.raises(RuntimeError, match=r"(?s)Missing key.*Unexpected key"):
            set_base(model, some)
        assert set_base(model, some, strict=False).unexpected_keys == ["other"]


def test_no_base_goes_under_a_merged_adapter() -> None:
    model = adapted(slimtune)
    model.merge_adapter()
    with pytest.raises(MergeError, match="load a base under"):
        slimtune.set_base_model_state_dict(model, LLAMA.model().state_dict())


# -- Layers.

KINDS = {
    "BaseTunerLayer": BaseTunerLayer, "LoraLayer": LoraLayer, "AuxiliaryTrainingWrapper": AuxiliaryTrainingWrapper,
    "ModulesToSaveWrapper": ModulesToSaveWrapper,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ("LoraConfig", {"modules_to_save": ["lm_head"], "trainable_token_indices": [1, 2]}),
        ("IA3Config", {"feedforward_modules": []}),
        ("VeraConfig", {"r": 4}),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_of_the_kinds_that_peft_s_are(kind: str, config: str, options: dict[str, Any]) -> None:
    places = []
    for library, asked in ((slimtune, getattr(slimtune, kind)), (peft, KINDS[kind])):
        made = getattr(library, config)(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)
        model = library.get_peft_model(LLAMA.model(), made).base_model.model
        # peft's own wrappers of tokens hold another layer inside.
        found = {
            name.removesuffix(".token_adapter") for name, module in model.named_modules() if isinstance(module, asked)
        }
        places.append(found)
    if kind == "BaseTunerLayer":
        places[1].discard("model.embed_tokens")  # whose token adapter is one, inside of its wrapper
    assert places[0] == places[1]


def test_layers_activate_and_scale_as_in_peft() -> None:
    outputs = []
    for library, kind in ((slimtune, slimtune.BaseTunerLayer), (peft, BaseTunerLayer)):
        model = adapted(library)
        model.add_adapter("other", lora(library, r=2, init_lora_weights=False))
        randomize(library, model, "other")
        layers = [module for module in model.modules() if isinstance(module, kind)]
        for layer in layers:
            layer.set_adapter(["default", "other"])
        both = predict(model, LLAMA.batch())
        for layer in layers:
            layer.scale_layer(3.0)
        scaled = predict(model, LLAMA.batch())
        for layer in layers:
            layer.unscale_layer(3.0)
            assert (layer.in_features, layer.active_adapters) == (layer.weight.shape[1], ["default", "other"])
        outputs.append((both, scaled, predict(model, LLAMA.batch())))
    for ours, theirs in zip(*outputs, strict=True):
        assert_near(ours, theirs)


def test_containers_of_a_layer_take_attributes_as_torch_s_do() -> None:
    layer = adapted(slimtune).base_model.model.model.layers[0].self_attn.q_proj
    assert layer.lora_A.default.weight is layer.lora_A["default"].weight
    with pytest.raises(AttributeError):
        _ = layer.lora_A.other


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_copy_s_layer_lists_the_adapters_that_have_one(library: Any) -> None:
    model = adapted(library)
    model.add_adapter("other", lora(library, modules_to_save=["lm_head"]))
    head = model.base_model.model.lm_head
    assert head.active_adapters == []
    assert head.modules_to_save.other.weight.requires_grad is False
    model.set_adapter("other")
    assert head.active_adapters == ["other"]
    assert head.modules_to_save.other.weight.requires_grad is True


# -- Variants of LoRA.


def test_mica_starts_at_minor_directions_and_trains_a_alone(tmp_path: Any) -> None:
    ours, theirs = (
        library.get_peft_model(LLAMA.model(), lora(library, init_lora_weights="mica")) for library in LIBRARIES
    )
    starts = [
        library.get_peft_model_state_dict(model) for library, model in zip(LIBRARIES, (ours, theirs), strict=True)
    ]
    assert starts[0].keys() == starts[1].keys()
    for name, own in starts[0].items():
        if "lora_A" in name:
            assert not own.any()
        else:
            # A singular vector is known up to its sign.
            assert_near(own @ own.T, starts[1][name] @ starts[1][name].T)
    slimtune.set_peft_model_state_dict(ours, starts[1])
    for model in (ours, theirs):
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.5)
        for _ in range(3):
            model(**LLAMA.batch()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_near(predict(ours, LLAMA.batch()), predict(theirs, LLAMA.batch()))
    assert not torch.equal(predict(ours, LLAMA.batch()), predict(LLAMA.model(), LLAMA.batch()))
    for name, tensor in slimtune.get_peft_model_state_dict(ours).items():
        assert torch.equal(tensor, starts[1][name]) == ("lora_B" in name)
    ours.save_pretrained(tmp_path)
    for library in LIBRARIES:
        loaded = library.PeftModel.from_pretrained(LLAMA.model(), tmp_path)
        assert_near(predict(loaded, LLAMA.batch()), predict(ours, LLAMA.batch()))


def test_mica_does_not_go_with_dora() -> None:
    with pytest.raises(ConfigError, match="leave out one"):
        lora(slimtune, init_lora_weights="mica", use_dora=True)


# -- Soft prompts.


@pytest.mark.parametrize("config", ["PromptTuningConfig", "PromptEncoderConfig"])
def test_a_soft_prompt_is_given_for_a_batch(config: str) -> None:
    prompts = []
    for library in LIBRARIES:
        torch.manual_seed(0)
        made = getattr(library, config)(num_virtual_tokens=5, task_type="CAUSAL_LM")
        model = randomize(library, library.get_peft_model(LLAMA.model(), made))
        prompts.append((model.get_prompt(3), model.get_prompt_embedding_to_save("default")))
    (ours, own), (theirs, its) = prompts
    assert ours.shape == theirs.shape
    assert ours.requires_grad
    assert torch.equal(ours[2], ours[0])
    assert_near(ours[0], own)
    if config == "PromptTuningConfig":  # the other one's comes out of its encoder, which is drawn
        assert_near(own, its)


def test_a_prefix_is_no_prompt() -> None:
    model = slimtune.get_peft_model(LLAMA.model(), slimtune.PrefixTuningConfig(num_virtual_tokens=2))
    with pytest.raises(ConfigError, match="is a prefix"):
        model.get_prompt(2)
    with pytest.raises(ConfigError, match="no soft prompt"):
        adapted(slimtune).get_prompt(2)
