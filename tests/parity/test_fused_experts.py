"""Files with a LoRA of each expert's own layers are read onto models that keep all experts in two tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import slimtune
from slimtune.errors import SlimtuneError
from tensors import assert_near, predict
from zoo import HIDDEN, LLAMA, VOCABULARY, causal_batch

EXPERTS, WIDTH = 4, 24
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "num_experts_per_tok": 2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
NAMES = {
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
    "qwen3-moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
}


BATCH = causal_batch()


def base(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(num_local_experts=EXPERTS, **SIZES)).eval()
    config = Qwen3MoeConfig(num_experts=EXPERTS, moe_intermediate_size=WIDTH, head_dim=8, **SIZES)
    return Qwen3MoeForCausalLM(config).eval()


def stored(kind: str, folder: Path, parts: tuple[int, ...] = (1, 2, 3), r: int = 2, **fields: Any) -> dict[str, Tensor]:
    """A file of the layout before the experts were fused, with the attention's query besides."""
    block, *layers = NAMES[kind]
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return 0.3 * torch.randn(shape, generator=generator)

    tensors: dict[str, Tensor] = {}
    for n in range(2):
        where = f"base_model.model.model.layers.{n}"
        sites = {f"{where}.self_attn.q_proj": (HIDDEN, 32)}
        for e in range(EXPERTS):
            for part in parts:
                name = layers[part - 1]
                sizes = (WIDTH, HIDDEN) if part == 3 else (HIDDEN, WIDTH)
                sites[f"{where}.{block}.experts.{e}.{name}"] = sizes
        for site, (rows, columns) in sites.items():
            tensors[f"{site}.lora_A.weight"] = draw(r, rows)
            tensors[f"{site}.lora_B.weight"] = draw(columns, r)
    names = [layers[part - 1] for part in parts]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": 6, "bias": "none"}
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj", *names]} | fields))
    save_file(tensors, folder / "adapter_model.safetensors")
    return tensors


def merged(kind: str, tensors: dict[str, Tensor], scale: float) -> nn.Module:
    """The base with s B A of each expert written into its part of the tensors."""
    model: Any = base(kind)
    block, first, second, _ = NAMES[kind]
    for name, a in tensors.items():
        if "lora_A" not in name:
            continue
        update = scale * tensors[name.replace("lora_A", "lora_B")] @ a
        path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight").replace(block, "mlp").split(".")
        with torch.no_grad():
            if "experts" not in path:
                model.get_submodule(".".join(path)).weight += update
                continue
            experts, expert, layer = model.get_submodule(".".join(path[:-2])), int(path[-2]), path[-1]
            if layer == first:
                experts.gate_up_proj[expert][:WIDTH] += update
            elif layer == second:
                experts.gate_up_proj[expert][WIDTH:] += update
            else:
                experts.down_proj[expert] += update
    return model


@pytest.mark.parametrize("parts", [(1, 2, 3), (1, 2), (3,), (1,)], ids=str)
@pytest.mark.parametrize("kind", NAMES)
def test_single_experts_are_put_together(kind: str, parts: tuple[int, ...], tmp_path: Path) -> None:
    tensors = stored(kind, tmp_path / "old", parts)
    expected = predict(merged(kind, tensors, 3.0), BATCH)
    model = slimtune.PeftModel.from_pretrained(base(kind), tmp_path / "old")
    assert_near(predict(model, BATCH), expected)
    model.save_pretrained(tmp_path / "new")
    for library in (slimtune, peft):
        again = library.PeftModel.from_pretrained(base(kind), tmp_path / "new")
        assert_near(predict(again, BATCH), expected)
    assert not any("experts.0" in name for name in load_file(tmp_path / "new/adapter_model.safetensors"))
    assert_near(predict(model.merge_and_unload(), BATCH), expected)


def test_peft_reads_the_same_of_it(tmp_path: Path) -> None:
    stored("mixtral", tmp_path)
    ours, theirs = (library.PeftModel.from_pretrained(base("mixtral"), tmp_path) for library in (slimtune, peft))
    assert_near(predict(ours, BATCH), predict(theirs, BATCH))


@pytest.mark.parametrize(
    ("fields", "scale"),
    [
        ({"use_rslora": True}, 6 / 2**0.5),
        ({"alpha_pattern": {"w1": 4, "w2": 4, "w3": 4, "q_proj": 4}}, 2.0),
    ],
    ids=["rslora", "alpha-pattern"],
)
def test_scales_are_kept(fields: dict[str, Any], scale: float, tmp_path: Path) -> None:
    tensors = stored("mixtral", tmp_path, **fields)
    model = slimtune.PeftModel.from_pretrained(base("mixtral"), tmp_path)
    assert_near(predict(model, BATCH), predict(merged("mixtral", tensors, scale), BATCH))


@pytest.mark.parametrize("damage", ["an expert is missing", "another width", "scales that differ", "a B is missing"])
def test_what_does_not_fit_together_is_an_error(damage: str, tmp_path: Path) -> None:
    fields = {"alpha_pattern": {"w1": 4}} if damage == "scales that differ" else {}
    tensors = stored("mixtral", tmp_path, **fields)
    experts = [name for name in tensors if ".experts.1.w1." in name]
    if damage == "another width":
        tensors = {n: t[:, :-1].contiguous() if ".w1.lora_A" in n else t for n, t in tensors.items()}
    elif damage != "scales that differ":
        lost = [name for name in experts if damage == "an expert is missing" or "lora_B" in name]
        tensors = {name: tensor for name, tensor in tensors.items() if name not in lost}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(SlimtuneError, match=r"w1|experts"):
        slimtune.PeftModel.from_pretrained(base("mixtral"), tmp_path)


def test_dropout_that_experts_can_t_have_is_told_of_where_training_goes_on(tmp_path: Path) -> None:
    stored("mixtral", tmp_path, lora_dropout=0.1)
    with pytest.warns(UserWarning, match="lora_dropout=0.1 is 0 from here on"):
        model = slimtune.PeftModel.from_pretrained(base("mixtral"), tmp_path, is_trainable=True)
    assert model.peft_config["default"].lora_dropout == 0


def test_a_model_of_other_layers_names_what_is_strange(tmp_path: Path) -> None:
    stored("mixtral", tmp_path)
    with pytest.raises(SlimtuneError, match="w1"):
        slimtune.PeftModel.from_pretrained(LLAMA.model(), tmp_path)
