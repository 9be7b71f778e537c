"""`slimtune export`: what it writes is taken by those that it is for, and what they can't take is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import slimtune
from cli.conftest import invoke
from denoisers import ATTENTION, DENOISERS
from export.llama_cpp import LlamaCpp, greedy
from slimtune import LoraConfig, PeftModel, get_peft_model
from slimtune.export.ollama import chat_format
from small_text_model import save_base, tiny_tokenizer
from tensors import assert_near, randomize

PROMPT = [5, 6, 7, 300, 44, 90, 91]
CONVOLUTIONS = ["conv1", "conv_out"]
ROPE = {"rope_type": "default", "rope_theta": 50_000.0}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def export(source: Any, to: str, output: Path, *options: Any) -> dict[str, Any]:
    result = invoke("export", source, "--to", to, "--output", output, *options, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refused(source: Any, to: str, output: Path, *options: Any) -> str:
    result = invoke("export", source, "--to", to, "--output", output, *options)
    assert result.exit_code in (1, 2), result.output
    assert not output.exists() or output.is_file() or any(output.iterdir())
    return result.stderr


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("models") / "base")


def adapter(base: Path, folder: Path, **options: Any) -> Path:
    """An adapter on the base, drawn so that it changes the answers."""
    settings = {"r": 4, "target_modules": LINEARS, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**settings | options))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def model_of(base: Path, folder: Path) -> Any:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()


def test_an_adapter_is_merged_into_the_gguf_that_llama_cpp_answers_from(base: Path, tmp_path: Path) -> None:
    tuned = adapter(base, tmp_path / "tuned", use_dora=True)
    written = export(tuned, "gguf", tmp_path / "gguf", "--type", "F32")
    assert written["check"].startswith("read again: KL")
    engine = LlamaCpp(tmp_path / "gguf" / "model.gguf")
    assert engine.greedy(PROMPT, 8) == greedy(model_of(base, tuned), PROMPT, 8)
    assert engine.greedy(PROMPT, 8) != greedy(AutoModelForCausalLM.from_pretrained(base), PROMPT, 8)


def test_llama_cpp_lays_a_lora_of_any_scales_over_its_base(base: Path, tmp_path: Path) -> None:
    options = {"use_rslora": True, "alpha_pattern": {"q_proj": 3}, "rank_pattern": {"down_proj": 2}}
    tuned = adapter(base, tmp_path / "tuned", **options)
    export(base, "gguf", tmp_path / "base-gguf", "--type", "F32")
    export(tuned, "gguf-lora", tmp_path / "lora")
    engine = LlamaCpp(tmp_path / "base-gguf" / "model.gguf", tmp_path / "lora" / "adapter.gguf")
    assert engine.greedy(PROMPT, 8) == greedy(model_of(base, tuned), PROMPT, 8)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"use_dora": True}, "llama.cpp has no DoRA"),
        ({"bias": "all"}, "also has"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight"),
        ({"trainable_token_indices": [4, 5]}, "token_adapter"),
    ],
)
def test_what_an_adapter_file_of_llama_cpp_has_no_place_for_is_named(
    options: dict[str, Any], why: str, base: Path, tmp_path: Path
) -> None:
    if "bias" in options:
        base = save_base(tmp_path / "biased", attention_bias=True)
    error = refused(adapter(base, tmp_path / "tuned", **options), "gguf-lora", tmp_path / "lora")
    assert why in error
    assert "--to gguf" in error
    assert not (tmp_path / "lora").exists()


def test_an_adapter_of_a_tied_head_is_refused_beside_its_base(tmp_path: Path) -> None:
    tied = save_base(tmp_path / "tied", tie_word_embeddings=True)
    tuned = adapter(tied, tmp_path / "tuned", target_modules=["q_proj", "lm_head"])
    assert "one tensor where they are tied" in refused(tuned, "gguf-lora", tmp_path / "lora")


def test_ollama_gets_a_template_stop_words_and_the_model(base: Path, tmp_path: Path) -> None:
    written = export(base, "ollama", tmp_path / "Shop", "--type", "Q8_0", "--max-kl", "1")
    lines = (tmp_path / "Shop" / "Modelfile").read_text()
    assert lines.startswith("FROM ./model.gguf\nTEMPLATE ")
    assert 'PARAMETER stop "<|im_end|>"' in lines
    assert written["use"].startswith("ollama create shop -f ")
    assert (tmp_path / "Shop" / "model.gguf").is_file()


def test_a_chat_template_that_does_more_than_put_words_around_is_none() -> None:
    tokenizer = tiny_tokenizer()
    plain = chat_format(tokenizer)
    assert plain is not None
    assert plain.around["user"] == ("<|im_start|>user\n", "<|im_end|>\n")
    assert plain.answer == "<|im_start|>assistant\n"
    assert '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n' in plain.to_go()
    tokenizer.chat_template = "{{ messages | length }}" + tokenizer.chat_template
    assert chat_format(tokenizer) is None


def test_vllm_and_peft_get_the_adapter_as_it_is(base: Path, tmp_path: Path) -> None:
    tuned = adapter(base, tmp_path / "tuned", r=24)
    assert "--max-lora-rank 32" in export(tuned, "vllm", tmp_path / "vllm")["use"]
    export(tuned, "peft", tmp_path / "peft")
    for name in ("vllm", "peft"):
        file = "adapter_model.safetensors"
        assert (tmp_path / name / file).read_bytes() == (tuned / file).read_bytes()


def test_what_vllm_refuses_is_merged_for_it(base: Path, tmp_path: Path) -> None:
    tuned = adapter(base, tmp_path / "tuned", use_dora=True)
    written = export(tuned, "vllm", tmp_path / "vllm")
    assert "DoRA is refused" in written["notes"][0]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "vllm")
    assert greedy(merged, PROMPT, 8) == greedy(model_of(base, tuned), PROMPT, 8)


def test_an_architecture_that_gguf_is_not_known_for_is_named_with_the_way_out(tmp_path: Path) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                           num_attention_heads=2, max_position_embeddings=64)  # fmt: skip
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "neox")
    tiny_tokenizer().save_pretrained(tmp_path / "neox")
    error = refused(tmp_path / "neox", "gguf", tmp_path / "out")
    assert "GGUF of a GPTNeoXForCausalLM is not known here" in error
    assert "--converter" in error


def test_a_converter_of_the_users_own_is_run_on_the_merged_model(base: Path, tmp_path: Path) -> None:
    script = tmp_path / "convert.py"
    script.write_text(
        "import sys, pathlib, json\nfolder = pathlib.Path(sys.argv[1])\nassert (folder / 'tokenizer.json').is_file()\n"
        "pathlib.Path(sys.argv[3]).write_bytes(b'GGUF' + sys.argv[5].encode())\n"
    )
    written = export(base, "gguf", tmp_path / "out", "--converter", script)
    assert (tmp_path / "out" / "model.gguf").read_bytes() == b"GGUFf16"
    assert written["check"] == "not compared"
    script.write_text("raise SystemExit('no such architecture')")
    assert "convert.py failed (exit code 1): no such architecture" in refused(
        base, "gguf", tmp_path / "failed", "--converter", script
    )


def test_mistakes_are_told_before_anything_is_loaded(base: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    full = tmp_path / "full"
    full.mkdir()
    (full / "a.txt").write_text("mine")
    tuned = adapter(base, tmp_path / "tuned")
    for source, to, output, options, why in (
        (base, "ggufs", tmp_path / "out", (), "did you mean 'gguf'?"),
        (base, "gguf", full, (), "already holds 1 file ("),
        (base, "gguf", tmp_path / "out", ("--type", "Q4_K_M"), "llama-quantize, which is not on the PATH"),
        (base, "gguf", tmp_path / "out", ("--type", "Q8_1"), "did you mean 'Q8_0'?"),
        (base, "gguf-lora", tmp_path / "out", (), "is no adapter folder"),
        (base, "hf", tmp_path / "out", (), "a model of transformers already"),
        (tuned, "onnx", tmp_path / "out", (), "optimum, which is not installed"),
        (tuned, "peft", tmp_path / "out", ("--type", "F16"), "--type is for GGUF"),
        (base, "gguf", tmp_path / "out", ("--converter", tmp_path / "none.py"), "no converter"),
    ):
        assert why in refused(source, to, output, *options)
    assert (full / "a.txt").read_text() == "mine"


def test_a_drift_beyond_the_bound_is_refused(base: Path, tmp_path: Path) -> None:
    error = refused(base, "gguf", tmp_path / "out", "--type", "Q4_0", "--max-kl", "0.0001")
    assert "the model in Q4_0, written and read again, strays" in error
    assert not (tmp_path / "out").exists()


def test_kohyas_names_and_back(tmp_path: Path) -> None:
    fields = {"unet.r": 4, "unet.lora_alpha": 8, "unet.target_modules": ["to_q"], "unet.use_dora": True}
    name = "unet.down_blocks.0.attentions.1.to_q"
    tensors = {
        f"{name}.lora_A.weight": torch.randn(4, 16),
        f"{name}.lora_B.weight": torch.randn(8, 4),
        f"{name}.lora_magnitude_vector": torch.rand(8),
    }
    (tmp_path / "in").mkdir()
    save_file(tensors, tmp_path / "in" / "pytorch_lora_weights.safetensors",
              metadata={"lora_adapter_metadata": json.dumps(fields)})  # fmt: skip
    export(tmp_path / "in", "kohya", tmp_path / "kohya")
    kohya = load_file(tmp_path / "kohya" / "lora.safetensors")
    there = "lora_unet_down_blocks_0_attentions_1_to_q"
    assert kohya[f"{there}.alpha"] == 8
    assert kohya[f"{there}.dora_scale"].shape == (8, 1)
    export(tmp_path / "kohya", "diffusers", tmp_path / "back")
    back = load_file(tmp_path / "back" / "pytorch_lora_weights.safetensors")
    assert torch.equal(back[f"{name}.lora_A.weight"], tensors[f"{name}.lora_A.weight"])
    assert torch.equal(back[f"{name}.lora_B.weight"], 2 * tensors[f"{name}.lora_B.weight"])
    assert back[f"{name}.lora_magnitude_vector"].shape == (8,)


@pytest.mark.parametrize("part", ["unet", "sd3"])
@pytest.mark.parametrize("options", [{"use_rslora": True}, {"use_dora": True}])
def test_kohyas_file_without_metadata_is_named_by_its_pipeline(
    part: str, options: dict[str, Any], tmp_path: Path
) -> None:
    denoiser = DENOISERS[part]
    torch.manual_seed(0)
    targets = [*ATTENTION, *CONVOLUTIONS] if part == "unet" else ATTENTION
    model = get_peft_model(denoiser.model(), LoraConfig(r=4, target_modules=targets, **options))
    expected = denoiser.predict(randomize(slimtune, model).eval())
    slimtune.save_diffusers_lora(tmp_path / "in", **{denoiser.part: model})
    export(tmp_path / "in", "kohya", tmp_path / "kohya")
    file = tmp_path / "kohya" / "lora.safetensors"
    tensors = load_file(file)
    assert all(name.startswith(f"lora_{denoiser.part}_") for name in tensors)
    save_file(tensors, file)
    assert "pass the folder of its pipeline by --base" in refused(file, "diffusers", tmp_path / "back")
    assert "no pipeline of diffusers" in refused(file, "diffusers", tmp_path / "back", "--base", tmp_path)

    denoiser.model().save_pretrained(tmp_path / "pipeline" / denoiser.part)
    export(file, "diffusers", tmp_path / "back", "--base", tmp_path / "pipeline")
    read = denoiser.model()
    read.load_lora_adapter(tmp_path / "back", prefix=denoiser.part, weight_name="pytorch_lora_weights.safetensors")
    assert_near(denoiser.predict(read.eval()), expected, 1e-5)
    again = denoiser.model()
    slimtune.load_diffusers_lora(tmp_path / "back", **{denoiser.part: again})
    assert_near(denoiser.predict(again.eval()), expected, 1e-5)
    if denoiser.part == "unet" and "use_dora" not in options:
        # diffusers reads kohya's own layout, too.
        names, alphas = StableDiffusionPipeline.lora_state_dict(file)
        other = denoiser.model()
        StableDiffusionPipeline.load_lora_into_unet(names, alphas, other)
        assert_near(denoiser.predict(other.eval()), expected, 1e-5)

    save_file(tensors | {"lora_unet_elsewhere.lora_down.weight": torch.ones(4, 4)}, file)
    error = refused(file, "diffusers", tmp_path / "more", "--base", tmp_path / "pipeline")
    assert "is for lora_unet_elsewhere" in error


@pytest.mark.soak
@pytest.mark.skipif(shutil.which("optimum-cli") is None, reason="optimum-cli is not on the PATH")
def test_onnxruntime_answers_as_the_model_does(tmp_path: Path) -> None:
    tuned = adapter(save_base(tmp_path / "base", rope_parameters=ROPE), tmp_path / "tuned", use_dora=True)
    written = export(tuned, "onnx", tmp_path / "onnx")
    assert written["check"].startswith("run by onnxruntime: KL")
    assert not {"plain", "given.npz", "got.npz"} & {path.name for path in (tmp_path / "onnx").iterdir()}
    # An encoder, by its hidden states.
    export("minilm-l6-v2", "onnx", tmp_path / "encoder")


@pytest.mark.soak
@pytest.mark.skipif(shutil.which("llama-quantize") is None, reason="llama-quantize is not on the PATH")
@pytest.mark.parametrize("kind", ["Q4_K_M", "Q6_K"])
def test_llama_cpps_own_program_makes_k_quants(kind: str, tmp_path: Path) -> None:
    # Blocks of K-quants have 256 numbers.
    base = save_base(tmp_path / "base", hidden_size=256, intermediate_size=512)
    written = export(base, "gguf", tmp_path / "out", "--type", kind, "--max-kl", "5")
    assert any("quantized by " in note for note in written["notes"])
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    assert kinds & {"Q4_K", "Q6_K"}
    assert len(LlamaCpp(tmp_path / "out" / "model.gguf").greedy(PROMPT, 4)) == 4


def test_the_real_model_answers_token_by_token(smollm2: Any, smollm2_tokenizer: Any, tmp_path: Path) -> None:
    """In F16 the packaged model's bfloat16 weights are as they were."""
    export("smollm2-135m-instruct", "gguf", tmp_path / "real", "--dtype", "float32")
    engine = LlamaCpp(tmp_path / "real" / "model.gguf")
    for text in ("The capital of France is", "def fibonacci(n):"):
        ids = smollm2_tokenizer(text)["input_ids"]
        assert engine.tokenize(text) == ids
        assert engine.greedy(ids, 12) == greedy(smollm2, ids, 12)
