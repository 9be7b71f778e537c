"""LoftQ on a 4-bit base: what peft sets, what quantization lost, and what is left of it on a real model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from peft.utils import loftq_utils
from safetensors import safe_open
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import slimtune
from slimtune.bases import base_of
from slimtune.errors import ConfigError, ModelNotFoundError
from slimtune.storage.source import resolve
from tensors import assert_near, assert_same, copies, predict, randomize
from zoo import LLAMA, VOCABULARY, gpt2, llama

SMOLLM2 = "smollm2-135m-instruct"
TOKENS = {"input_ids": torch.arange(3, 19).view(2, 8)}
LOFTQ = {"r": 4, "lora_alpha": 4, "init_lora_weights": "loftq", "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in bf16, in two files."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("original")
    model: Any = llama(hidden_size=64, intermediate_size=128).to(torch.bfloat16)
    model.save_pretrained(path, max_shard_size="100KB")
    assert len(list(path.glob("*.safetensors"))) > 1
    return path


def in_4_bits(path: Path | str, double: bool = False, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.bfloat16,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=torch.bfloat16,
            **options,
        ),
    ).eval()


def original(path: Path) -> dict[str, Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).named_parameters())


def deltas(model: Any) -> dict[str, Any]:
    """The default adapter's deltas by the name of their layer."""
    return {
        name.removesuffix(".deltas.default"): module
        for name, module in model.named_modules()
        if name.endswith(".deltas.default")
    }


@torch.no_grad()
def left(model: Any, weights: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
    """By layer ||W - Q|| and ||W - Q - s B A||."""
    found = {}
    for name, delta in deltas(model).items():
        layer = model.get_submodule(name)
        lost = weights[f"{name}.weight"].float() - base_of(layer).weight(layer).float()
        rest = lost - delta.scaling * delta.product()
        found[name] = float(lost.norm()), float(rest.norm())
    return found


def logits(model: Any) -> Tensor:
    ids = torch.arange(4, VOCABULARY)[None]
    with torch.no_grad():
        return model.eval()(ids).logits.float()


class OnTheCpu(TorchFunctionMode):
    """peft asks for CUDA by name."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return func(*("cpu" if arg in ("cuda", torch.device("cuda")) else arg for arg in args), **kwargs)


@pytest.mark.parametrize("double", [False, True], ids=["nf4", "nf4-double"])
def test_the_product_is_pefts(folder: Path, double: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loftq_utils, "clear_device_cache", lambda: None)
    options = {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "k_proj", "down_proj"]}
    theirs = peft.get_peft_model(in_4_bits(folder, double), peft.LoraConfig(**options))
    with OnTheCpu():
        peft.replace_lora_weights_loftq(theirs, str(folder))
    at_once = slimtune.get_peft_model(
        in_4_bits(folder, double), slimtune.LoraConfig(**options, init_lora_weights="loftq")
    )
    afterwards = slimtune.get_peft_model(in_4_bits(folder, double), slimtune.LoraConfig(**options))
    slimtune.replace_lora_weights_loftq(afterwards, folder)
    for name, delta in deltas(at_once).items():
        layer = theirs.get_submodule(f"base_model.model.{name}")
        expected = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        assert expected.norm() > 0
        assert_near(delta.product(), expected.detach(), 1e-4)
        assert_same(dict(deltas(afterwards)[name].named_parameters()), dict(delta.named_parameters()))


@pytest.mark.parametrize("options", [{"lora_alpha": 12}, {"use_rslora": True}, {"use_dora": True, "lora_alpha": 2}])
def test_the_scale_is_counted_in(folder: Path, options: dict[str, Any]) -> None:
    """With any scale the layer starts as near to the original as its rank allows; peft forgets the scale."""
    weights = original(folder)
    model = slimtune.get_peft_model(in_4_bits(folder), slimtune.LoraConfig(**{**LOFTQ, **options}))
    for name, (lost, rest) in left(model, weights).items():
        layer = model.get_submodule(name)
        residual = weights[f"{name}.weight"].float() - base_of(layer).weight(layer).float()
        best = torch.linalg.svdvals(residual.detach())[4:].norm()
        assert rest == pytest.approx(float(best), rel=1e-4)
        assert rest < lost
    if "use_dora" in options:
        # The magnitudes are those of Q + s B A, so that this is what DoRA starts from too.
        plain = slimtune.get_peft_model(in_4_bits(folder), slimtune.LoraConfig(**{**LOFTQ, "lora_alpha": 2}))
        assert_near(logits(model), logits(plain), 2e-2)


def test_base_and_file_are_those_of_a_plain_lora(folder: Path, tmp_path: Path) -> None:
    base = in_4_bits(folder)
    before = copies(dict(base.state_dict()))
    plain = slimtune.get_peft_model(in_4_bits(folder), slimtune.LoraConfig())
    # Disabled, too: where bf16 is emulated, only a product without an adapter is computed in float32.
    with plain.disable_adapter():
        untouched = logits(plain)
    model = slimtune.get_peft_model(base, slimtune.LoraConfig(**LOFTQ))
    assert_same({name: model.state_dict()[name] for name in before}, before)
    expected = logits(model)
    assert not torch.equal(expected, untouched)
    with model.disable_adapter():
        assert torch.equal(logits(model), untouched)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (stored["init_lora_weights"], stored["loftq_config"], stored["r"]) == (True, {}, 4)
    assert torch.equal(logits(slimtune.PeftModel.from_pretrained(in_4_bits(folder), tmp_path)), expected)
    theirs = peft.PeftModel.from_pretrained(in_4_bits(folder), tmp_path)
    ours = deltas(model)["model.layers.0.self_attn.q_proj"]
    layer = theirs.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert torch.equal(layer.lora_A["default"].weight, ours.lora_A)
    model.add_weighted_adapter(["default"], [1.0], "same", combination_type="cat")
    assert model.peft_config["same"].init_lora_weights is True


def test_a_callback_keeps_or_gives_back(folder: Path) -> None:
    model = slimtune.get_peft_model(in_4_bits(folder), slimtune.LoraConfig(r=4))
    before = {name: copies(dict(delta.named_parameters())) for name, delta in deltas(model).items()}
    asked = []

    def is_attention(at: Any, name: str) -> bool:
        assert at is model
        assert deltas(model)[name].lora_B.any()
        asked.append(name)
        return "self_attn" in name

    slimtune.replace_lora_weights_loftq(model, callback=is_attention)
    assert asked == list(before)
    for name, delta in deltas(model).items():
        if "self_attn" in name:
            assert delta.lora_B.any()
        else:
            assert_same(dict(delta.named_parameters()), before[name])


def test_layers_that_are_stored_transposed(tmp_path: Path) -> None:
    """GPT-2 keeps (in, out); transformers turns it while it quantizes, also where it is square."""
    torch.manual_seed(0)
    saved: Any = gpt2()
    saved.save_pretrained(tmp_path)
    weights = {
        name: parameter.t() if parameter.ndim == 2 else parameter
        for name, parameter in AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters()
    }
    model = slimtune.get_peft_model(in_4_bits(tmp_path), slimtune.LoraConfig(**LOFTQ))
    found = left(model, weights)
    assert len(found) == 8
    assert all(rest < 0.95 * lost for lost, rest in found.values())


def test_a_model_without_a_head_finds_the_weights_of_one_that_has_it(folder: Path) -> None:
    from transformers import AutoModel

    body = AutoModel.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=BitsAndBytesConfig(load_in_4bit=True)
    )
    weights = {name.removeprefix("model."): weight for name, weight in original(folder).items()}
    model = slimtune.get_peft_model(body, slimtune.LoraConfig(r=4, init_lora_weights="loftq"))
    assert all(rest < lost for lost, rest in left(model, weights).values())


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "iterations": ({"loftq_config": {"loftq_iter": 5}}, "loftq_iter must be 1, found 5"),
    "bits": ({"loftq_config": slimtune.LoftQConfig(loftq_bits=2)}, "loftq_bits must be 4, found 2"),
    "misspelt": ({"loftq_config": {"loftq_bit": 4}}, "did you mean 'loftq_bits'"),
    "another start": (
        {"init_lora_weights": True, "loftq_config": {"loftq_bits": 4}},
        "needs init_lora_weights='loftq'",
    ),
    "not in 4 bits": ({"target_modules": ["q_proj", "lm_head"]}, "'lm_head' is a Linear that isn't in them"),
    "not linear": ({"target_modules": ["embed_tokens"]}, "is for linear layers"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence(folder: Path, mistake: str) -> None:
    options, words = MISTAKES[mistake]
    with pytest.raises(ConfigError, match=words):
        slimtune.get_peft_model(in_4_bits(folder), slimtune.LoraConfig(**{**LOFTQ, **options}))


def test_originals_that_are_none(folder: Path, tmp_path: Path) -> None:
    quantized = in_4_bits(folder)
    quantized.save_pretrained(tmp_path / "quantized")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    with pytest.raises(ConfigError, match=r"is quantized itself.*model_path"):
        slimtune.get_peft_model(again, slimtune.LoraConfig(**LOFTQ))
    model = slimtune.get_peft_model(again, slimtune.LoraConfig(r=4))
    slimtune.replace_lora_weights_loftq(model, model_path=folder)
    assert all(rest < lost for lost, rest in left(model, original(folder)).values())
    torch.manual_seed(5)
    other: Any = llama(hidden_size=64, intermediate_size=128)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"was not quantized from what '.*other' has"):
        slimtune.replace_lora_weights_loftq(model, tmp_path / "other")
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        slimtune.replace_lora_weights_loftq(model, tmp_path / "nowhere")
    model.name_or_path = ""
    with pytest.raises(ConfigError, match=r"from before the model was quantized.*model_path"):
        slimtune.replace_lora_weights_loftq(model)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}")
    with pytest.raises(ConfigError, match="can't be read"):
        slimtune.replace_lora_weights_loftq(model, damaged)
    with pytest.raises(ConfigError, match="no LoRA on a layer in 4 bits"):
        slimtune.replace_lora_weights_loftq(slimtune.get_peft_model(llama(), slimtune.LoraConfig()))


@pytest.mark.parametrize(("bits", "iterations"), [(4, 1), (4, 3), (8, 1)])
def test_what_peft_trained_on_a_base_that_loftq_replaced_is_read(
    bits: int, iterations: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loftq_utils, "clear_device_cache", lambda: None)
    start = {"loftq_bits": bits, "loftq_iter": iterations}
    options = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": "loftq"}
    with OnTheCpu():
        theirs = peft.get_peft_model(LLAMA.model(), peft.LoraConfig(**options, loftq_config=start))
    expected = predict(randomize(peft, theirs).eval(), TOKENS)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    base = LLAMA.model()
    before = copies(dict(base.named_parameters()))
    ours = slimtune.PeftModel.from_pretrained(base, tmp_path / "theirs")
    assert_near(predict(ours, TOKENS), expected)
    assert_same({name: ours.get_parameter(name) for name in before}, before)
    ours.save_pretrained(tmp_path / "ours")
    fields = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert (fields["init_lora_weights"], fields["loftq_config"]) == ("loftq", start)
    again = slimtune.PeftModel.from_pretrained(LLAMA.model(), tmp_path / "ours")
    assert_near(predict(again, TOKENS), expected)
    with OnTheCpu():
        theirs = peft.PeftModel.from_pretrained(LLAMA.model(), tmp_path / "ours")
    assert_near(predict(theirs, TOKENS), expected)
    assert_near(predict(again.merge_and_unload(), TOKENS), expected, 1e-4)


def test_on_a_base_in_4_bits_what_loftq_trained_is_the_change_itself(folder: Path, tmp_path: Path) -> None:
    ours = slimtune.get_peft_model(in_4_bits(folder), slimtune.LoraConfig(**LOFTQ))
    expected = predict(ours, TOKENS)
    ours.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    as_peft = {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}}
    path.write_text(json.dumps(json.loads(path.read_text()) | as_peft))
    again = slimtune.PeftModel.from_pretrained(in_4_bits(folder), tmp_path)
    assert torch.equal(predict(again, TOKENS), expected)
    slimtune.set_peft_model_state_dict(again, slimtune.get_peft_model_state_dict(ours))
    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["init_lora_weights"] is True
    with pytest.raises(ConfigError, match="quantized otherwise than LoftQ"):
        slimtune.PeftModel.from_pretrained(slimtune.load(str(folder), quantize="int8")[0], tmp_path)


LAYERS = range(8)


@pytest.fixture(scope="module")
def smollm2_in_nf4() -> Any:
    """SmolLM2 in NF4 with LoftQ in its first layers."""
    options = {"r": 64, "lora_alpha": 128, "init_lora_weights": "loftq", "layers_to_transform": list(LAYERS)}
    model, _ = slimtune.load(SMOLLM2, dtype="bfloat16", quantize="nf4")
    return slimtune.get_peft_model(model, slimtune.LoraConfig(**options))


@pytest.mark.slow
def test_every_layer_of_smollm2_loses_less_with_every_rank(smollm2_in_nf4: Any) -> None:
    with safe_open(Path(resolve(SMOLLM2), "model.safetensors"), framework="pt") as file:
        weights = {f"{name}.weight": file.get_tensor(f"{name}.weight").float() for name in deltas(smollm2_in_nf4)}
    assert len(weights) == 7 * len(LAYERS)
    for name, delta in deltas(smollm2_in_nf4).items():
        layer = smollm2_in_nf4.get_submodule(name)
        lost = weights[f"{name}.weight"] - base_of(layer).weight(layer).float()
        assert 0.08 < lost.norm() / weights[f"{name}.weight"].norm() < 0.11
        a, b = (factor.detach() for factor in delta.pair)
        # The factors are sorted, so that the first ones are the start of a lower rank.
        rests = [float((lost - delta.scaling * b[:, :r] @ a[:r]).norm()) for r in (0, 4, 16, 64)]
        assert rests == sorted(rests, reverse=True)
        assert rests[-1] < 0.9 * rests[0]


@pytest.mark.slow
def test_smollm2_answers_more_like_its_16_bits(smollm2_in_nf4: Any) -> None:
    folder = resolve(SMOLLM2)
    text = Path(__file__).parents[2].joinpath("README.md").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids[:, :512].view(2, 256)

    def answers(model: Any) -> Tensor:
        with torch.no_grad():
            return model.eval()(ids).logits.float().log_softmax(-1)

    reference = answers(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16))

    def divergence() -> float:
        """KL(16 bits || 4 bits), the mean over tokens."""
        each = F.kl_div(answers(smollm2_in_nf4), reference, log_target=True, reduction="none")
        return float(each.sum(-1).mean())

    with smollm2_in_nf4.disable_adapter():
        alone = divergence()
    assert divergence() < alone
