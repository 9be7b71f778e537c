"""Quantization after training: what each method gains, on all architectures, and that others read the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import slimtune
from slimtune.bases import base_of
from slimtune.bases.int4 import LinearInt4
from slimtune.bases.integer import HoldsCodes
from slimtune.errors import ConfigError, DamagedBaseError, DataError
from slimtune.ops.grid import expand, nearest_codes, searched_scales
from slimtune.quantization.integer import quantized_linears
from slimtune.slim.awq import apply_awq, find_pairs
from slimtune.slim.calibrate import blocks_of, in_evaluation, moments_of
from slimtune.slim.gptq import gptq_codes
from slimtune.slim.quantize import BITS, METHODS, QuantizeConfig, quantize_
from small_text_model import save_base, tiny_model
from zoo import BERT, GEMMA3, GPT2, GPT_NEOX, LLAMA, QWEN2, T5, TIED_LLAMA, VIT, Specimen

pytestmark = pytest.mark.filterwarnings("ignore:.*quantiz")

ARCHITECTURES = (LLAMA, TIED_LLAMA, QWEN2, GPT_NEOX, GEMMA3, BERT, T5, VIT)
CHAINS = {"llama", "tied-llama", "qwen2", "gpt-neox", "gemma3", "bert", "vit"}
SCALED = {"llama": 3, "tied-llama": 3, "qwen2": 3, "gemma3": 3, "vit": 2}
each_architecture = pytest.mark.parametrize("specimen", ARCHITECTURES, ids=lambda s: s.name)
IDS = torch.arange(3, 60)[None]


def batches_for(specimen: Specimen, count: int = 3) -> list[dict[str, Tensor]]:
    made = []
    for seed in range(count):
        torch.manual_seed(seed)
        made.append({name: value for name, value in specimen.batch().items() if name != "attention_mask"})
    return made


def ids_batches(count: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, 500, (2, 64), generator=generator)} for _ in range(count)]


@torch.no_grad()
def answers(model: Any, batch: dict[str, Tensor]) -> Tensor:
    output = model.eval()(**batch)
    return (output.logits if hasattr(output, "logits") else output).float()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model quantized as `slimtune quantize` does by default, in bfloat16."""
    target = tmp_path_factory.mktemp("quantized") / "int4"
    model = quantize_(tiny_model().to(torch.bfloat16), QuantizeConfig(group_size=32), ids_batches())
    model.save_pretrained(target)
    return target


class TestCalibration:
    @each_architecture
    def test_blocks_are_a_chain_and_their_moments_those_of_the_whole_model(self, specimen: Specimen) -> None:
        model: Any = specimen.model().eval()
        names, batches = quantized_linears(model), batches_for(specimen)
        with torch.no_grad(), in_evaluation(model):
            blocks = blocks_of(model, batches)
            assert (len(blocks) > 1) == (specimen.name in CHAINS)
            first = moments_of(blocks[0], blocks[0].linears(names), is_full=True)
        seen: dict[str, Tensor] = {}

        def note(name: str) -> Any:
            def hook(module: nn.Module, args: Any) -> None:
                x = args[0].reshape(-1, args[0].shape[-1])
                seen[name] = seen.get(name, torch.zeros(())) + x.t() @ x

            return hook

        prefix = f"{blocks[0].path}." if blocks[0].path else ""
        handles = [
            model.get_submodule(prefix + name).register_forward_pre_hook(note(name))
            for moments in first
            for name in moments.names
        ]
        for batch in batches:
            answers(model, batch)
        for handle in handles:
            handle.remove()
        assert seen
        for moments in first:
            for name in moments.names:
                torch.testing.assert_close(moments.square, seen[name], rtol=1e-3, atol=1e-3)

    @each_architecture
    def test_the_model_is_as_before(self, specimen: Specimen) -> None:
        model: Any = specimen.model()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        keys = {name: set(vars(module)) for name, module in model.named_modules()}
        with in_evaluation(model):
            blocks = blocks_of(model, batches_for(specimen))
            moments = moments_of(blocks[0], blocks[0].linears(quantized_linears(model)), is_full=False)
            find_pairs(blocks[0], moments)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert {name: set(vars(module)) for name, module in model.named_modules()} == keys
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class TestAWQ:
    @each_architecture
    def test_scaling_leaves_the_answers_as_they_were(self, specimen: Specimen) -> None:
        model: Any = specimen.model().eval()
        # Norms that aren't all ones, as in a trained model.
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        batches, names = batches_for(specimen), quantized_linears(model)
        before = answers(model, batches[0])
        found = 0
        with torch.no_grad(), in_evaluation(model):
            for block in blocks_of(model, batches)[:1]:
                linears = block.linears(names)
                weights = {name: linear.weight.clone() for name, linear in linears.items()}
                moments = moments_of(block, linears, is_full=False)
                pairs = find_pairs(block, moments)
                apply_awq(block, moments, pairs, lambda inputs: 16, bits=4)
                found = len(pairs)
                changed = {name for name, linear in linears.items() if not torch.equal(linear.weight, weights[name])}
                assert changed >= {name for pair in pairs for name in pair.names}
        torch.testing.assert_close(answers(model, batches[0]), before, rtol=1e-4, atol=1e-4)
        assert found >= SCALED.get(specimen.name, 0)

    def test_large_inputs_get_finer_grids(self) -> None:
        from slimtune.slim.awq import search_factors

        weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
        importance = torch.ones(32)
        importance[::16] = 900.0
        s = search_factors(weight, importance, group_size=16, bits=4)
        assert s[0] > 1.2 * s[1]
        flat = search_factors(weight, torch.ones(32), group_size=16, bits=4)
        assert torch.allclose(flat, torch.ones(32))


class TestGPTQ:
    def correlated(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        mixing = torch.randn(64, 64, generator=generator)
        x = torch.randn(512, 8, generator=generator) @ mixing[:8] + 0.1 * torch.randn(512, 64, generator=generator)
        return torch.randn(48, 64, generator=generator), x

    def test_it_loses_less_of_the_output_than_rounding(self) -> None:
        weight, x = self.correlated()
        scales = searched_scales(weight, 32, 4, x.square().mean(0))

        def lost(codes: Tensor) -> float:
            return float((x @ (expand(codes, scales, torch.float32) - weight).t()).norm() / (x @ weight.t()).norm())

        assert lost(gptq_codes(weight, scales, x.t() @ x, 4)) < 0.5 * lost(nearest_codes(weight, scales, 4))

    def test_inputs_without_correlation_are_rounded_to_the_nearest(self) -> None:
        weight, _ = self.correlated()
        scales = searched_scales(weight, 32, 4)
        codes = gptq_codes(weight, scales, torch.diag(torch.rand(64) + 1), 4)
        assert torch.equal(codes, nearest_codes(weight, scales, 4))

    def test_inputs_that_were_zero_throughout_and_numbers_that_are_none(self) -> None:
        weight, x = self.correlated()
        x[:, ::5] = 0
        scales = searched_scales(weight, 32, 4)
        assert expand(gptq_codes(weight, scales, x.t() @ x, 4), scales, torch.float32).isfinite().all()
        with pytest.raises(ConfigError, match="not finite"):
            gptq_codes(weight, scales, torch.full((64, 64), torch.nan), 4)


class TestModels:
    @pytest.mark.parametrize("specimen", [*ARCHITECTURES, GPT2], ids=lambda s: s.name)
    @pytest.mark.parametrize(("scheme", "method"), [("W8A16", "rtn"), ("W8A16", "awq+gptq"), ("W8A8", "rtn")])
    def test_every_architecture_in_8_bits_answers_nearly_as_before(
        self, specimen: Specimen, scheme: str, method: str
    ) -> None:
        model: Any = specimen.model().eval()
        batches = batches_for(specimen)
        before = answers(model, batches[0])
        quantize_(model, QuantizeConfig(scheme, method), batches)
        assert any(isinstance(module, HoldsCodes) for module in model.modules())
        assert (answers(model, batches[0]) - before).norm() < 0.1 * before.norm()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_methods_that_look_at_data_lose_less(self, dtype: torch.dtype) -> None:
        lost = {}
        probe = ids_batches(6)[-1]
        for method in METHODS:
            model: Any = tiny_model().to(dtype)
            before = answers(model, probe)
            quantize_(model, QuantizeConfig(method=method, group_size=32), ids_batches())
            assert model.dtype == dtype
            assert all(m.compute_dtype == dtype for m in model.modules() if isinstance(m, HoldsCodes))
            lost[method] = float((answers(model, probe) - before).norm() / before.norm())
        assert max(lost["gptq"], lost["awq+gptq"]) < lost["rtn"], lost

    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("head", ["keep", "int8"])
    @pytest.mark.parametrize("scheme", ["W4A16", "W8A16"])
    def test_a_folder_answers_as_what_was_saved_and_is_saved_again(
        self, scheme: str, head: str, tied: bool, tmp_path: Path
    ) -> None:
        save_base(tmp_path / "base", tie_word_embeddings=tied)
        model, _ = slimtune.load(tmp_path / "base", dtype="bfloat16")
        quantize_(model, QuantizeConfig(scheme, "rtn", 32 if scheme == "W4A16" else None, head))
        expected = answers(model, {"input_ids": IDS})
        source = model
        for name in ("first", "second"):
            source.save_pretrained(tmp_path / name)
            source, _ = slimtune.load(tmp_path / name)
            assert torch.equal(answers(source, {"input_ids": IDS}), expected)
            assert (source.lm_head.weight is source.model.embed_tokens.weight) == tied
        stored = load_file(tmp_path / "second" / "model.safetensors")
        assert any(name.startswith("lm_head") for name in stored) == (not tied)
        assert slimtune.parts(source).bytes == slimtune.parts(model).bytes

    def test_tied_ends_in_int8_stay_tied_when_they_are_expanded(self, tmp_path: Path) -> None:
        model = quantize_(TIED_LLAMA.model(), QuantizeConfig("W8A16", head="int8"))
        expected = answers(model, {"input_ids": IDS % 40})
        slimtune.dequantize(model)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.config.tie_word_embeddings
        model.save_pretrained(tmp_path)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert (answers(again, {"input_ids": IDS % 40}) - expected).norm() < 1e-3 * expected.norm()

    def test_transformers_reads_the_folder_to_the_same_weights(self, folder: Path) -> None:
        """By the library that the format is from."""
        pytest.importorskip("compressed_tensors")
        own, _ = slimtune.load(folder)
        expected = answers(own, {"input_ids": IDS})
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        assert torch.equal(answers(theirs, {"input_ids": IDS}), expected)
        modules = [name for name, module in own.named_modules() if isinstance(module, LinearInt4)]
        assert len(modules) == 14
        for name in modules:
            mine = own.get_submodule(name)
            weight: Any = theirs.get_submodule(name).weight
            assert torch.equal(base_of(mine).weight(mine), weight)

    def test_an_adapter_trains_on_the_folder_and_merges_from_it(self, folder: Path, tmp_path: Path) -> None:
        model, _ = slimtune.load(folder)
        model = slimtune.get_peft_model(model, slimtune.LoraConfig(r=4, task_type="CAUSAL_LM"))
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
        losses = []
        for _ in range(5):
            loss = model.train()(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
        assert losses[-1] < losses[0]
        model.save_pretrained(tmp_path / "adapter")
        again, _ = slimtune.load(folder)
        again = slimtune.PeftModel.from_pretrained(again, tmp_path / "adapter")
        tuned = answers(model, {"input_ids": IDS})
        assert torch.equal(answers(again, {"input_ids": IDS}), tuned)
        merged = model.merge_and_unload()
        assert not any(isinstance(module, HoldsCodes) for module in merged.modules())
        merged.save_pretrained(tmp_path / "merged")
        plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert (answers(plain, {"input_ids": IDS}) - tuned).norm() < 0.05 * tuned.norm()


class TestConv1D:
    """GPT-2's linear layers, which are stored as (in, out)."""

    def made(self) -> Any:
        torch.manual_seed(0)
        config = transformers.GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=4, n_positions=64)
        return transformers.GPT2LMHeadModel(config).eval()

    @pytest.mark.parametrize("scheme", BITS)
    def test_it_is_stored_read_and_expanded(self, scheme: str, tmp_path: Path) -> None:
        model = quantize_(self.made(), QuantizeConfig(scheme, "rtn"))
        expected = answers(model, {"input_ids": IDS})
        assert sum(isinstance(module, HoldsCodes) for module in model.modules()) == 8
        model.save_pretrained(tmp_path / "codes")
        again, _ = slimtune.load(tmp_path / "codes")
        assert torch.equal(answers(again, {"input_ids": IDS}), expected)
        slimtune.dequantize(again)
        again.save_pretrained(tmp_path / "plain")
        plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
        assert (answers(plain, {"input_ids": IDS}) - expected).norm() < 0.02 * expected.norm()

    def test_it_is_rounded_as_it_is_read(self, tmp_path: Path) -> None:
        plain = self.made()
        plain.save_pretrained(tmp_path)
        read, _ = slimtune.load(tmp_path, quantize="int4")
        quantize_(plain, QuantizeConfig(method="rtn"))
        assert torch.equal(answers(read, {"input_ids": IDS}), answers(plain, {"input_ids": IDS}))

    def test_methods_that_look_at_data_lose_less(self) -> None:
        generator = torch.Generator().manual_seed(0)
        batches = [{"input_ids": torch.randint(0, 64, (4, 48), generator=generator)} for _ in range(4)]
        lost = {}
        for method in ("rtn", "gptq"):
            model = self.made()
            before = answers(model, batches[-1])
            quantize_(model, QuantizeConfig(method=method), batches[:3])
            lost[method] = float((answers(model, batches[-1]) - before).norm() / before.norm())
        assert lost["gptq"] < lost["rtn"]


class TestWhileLoading:
    def test_int4_is_rounded_as_it_is_read(self, tmp_path: Path) -> None:
        save_base(tmp_path / "base")
        plain, _ = slimtune.load(tmp_path / "base")
        read, _ = slimtune.load(tmp_path / "base", quantize=slimtune.Quantization("int4", blocksize=32))
        quantize_(plain, QuantizeConfig(method="rtn", group_size=32))
        assert torch.equal(answers(read, {"input_ids": IDS}), answers(plain, {"input_ids": IDS}))
        read.save_pretrained(tmp_path / "int4")
        again, _ = slimtune.load(tmp_path / "int4")
        assert torch.equal(answers(read, {"input_ids": IDS}), answers(again, {"input_ids": IDS}))

    def test_layers_can_be_kept(self, tmp_path: Path) -> None:
        save_base(tmp_path / "base")
        settings = slimtune.Quantization("int4", blocksize=32, keep=["down_proj"])
        model, _ = slimtune.load(tmp_path / "base", quantize=settings)
        kept = {n.rpartition(".")[2] for n, m in model.named_modules() if type(m) is nn.Linear}
        assert kept == {"down_proj", "lm_head"}
        model.save_pretrained(tmp_path / "int4")
        again, _ = slimtune.load(tmp_path / "int4")
        assert torch.equal(answers(again, {"input_ids": IDS}), answers(model, {"input_ids": IDS}))


class TestMistakes:
    @pytest.mark.parametrize(
        ("fields", "said"),
        [
            ({"scheme": "W4A15"}, "did you mean 'W4A16'"),
            ({"method": "gptqq"}, "did you mean 'gptq'"),
            ({"group_size": 48}, "found 48"),
            ({"scheme": "W8A16", "group_size": 64}, "leave group_size out"),
            ({"head": "int4"}, "keep, int8"),
            ({"ignore": "down_proj"}, "a list"),
        ],
    )
    def test_settings(self, fields: dict[str, Any], said: str) -> None:
        with pytest.raises(ConfigError, match=said):
            QuantizeConfig(**fields)

    def test_groups_that_do_not_divide_are_told_with_those_that_do(self) -> None:
        with pytest.raises(ConfigError, match=r"width 64; take groups of 32 or 64"):
            quantize_(tiny_model(), QuantizeConfig(method="rtn", group_size=128))
        with pytest.raises(ConfigError, match="width 48"):
            quantize_(LLAMA.model(), QuantizeConfig(method="rtn", group_size=32))

    def test_a_model_that_is_quantized_already(self, folder: Path) -> None:
        for model in (slimtune.load(folder)[0], quantize_(tiny_model(), QuantizeConfig("W8A16"))):
            with pytest.raises(ConfigError, match="quantized already"):
                quantize_(model, QuantizeConfig("W8A16"))

    def test_what_else_can_not_be_quantized(self) -> None:
        with pytest.raises(ConfigError, match="no linear layer"):
            quantize_(GPT2.model(), QuantizeConfig("W8A16", ignore=["c_attn", "c_proj", "c_fc"]))
        with pytest.raises(ConfigError, match="merge them first"):
            quantize_(slimtune.get_peft_model(tiny_model(), slimtune.LoraConfig(task_type="CAUSAL_LM")))
        with pytest.raises(DataError, match="pass batches"):
            quantize_(tiny_model())
        with pytest.raises(ConfigError, match="did you mean 'down_proj'"):
            quantize_(tiny_model(), QuantizeConfig("W8A16", ignore=["down_prj"]))

    @pytest.mark.parametrize("part", ["weight_packed", "weight_scale", "weight_shape"])
    def test_a_folder_that_is_damaged_names_the_weight(self, part: str, folder: Path, tmp_path: Path) -> None:
        name = f"model.layers.1.mlp.up_proj.{part}"
        tensors = load_file(folder / "model.safetensors")
        config = (folder / "config.json").read_text()
        other = torch.tensor([-1, -1]) if part == "weight_shape" else tensors[name][:7].clone()
        for number, damaged in enumerate((None, other)):
            target = tmp_path / str(number)
            target.mkdir()
            (target / "config.json").write_text(config)
            changed = {n: t for n, t in tensors.items() if n != name} | ({} if damaged is None else {name: damaged})
            save_file(changed, target / "model.safetensors", {"format": "pt"})
            with pytest.raises(DamagedBaseError, match=r"up_proj.weight' is damaged|other shapes"):
                slimtune.load(target)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"num_bits": 3}, "3 bits"),
            ({"type": "float"}, "float"),
            ({"actorder": "group"}, "activation order"),
            ({"strategy": "block"}, "strategy block"),
        ],
    )
    def test_what_others_write_and_is_not_read_here(
        self, change: dict[str, Any], said: str, folder: Path, tmp_path: Path
    ) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["config_groups"]["group_0"]["weights"] |= change
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
        with pytest.raises(ConfigError, match=said):
            slimtune.load(tmp_path)
