"""What each linear layer does in its block, told from the paths of models as transformers and diffusers name them."""

from __future__ import annotations

import os.path
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
import transformers as hf
from torch import nn
from transformers.models.dinov2 import modeling_dinov2

import slimtune
from denoisers import flux
from slimtune.bases import base_of
from slimtune.core.roles import role_of
from tensors import trainable

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 1, "head_dim": 8}
IMAGES: dict[str, Any] = {"image_size": 16, "patch_size": 8}
SEQ2SEQ: dict[str, Any] = {
    "vocab_size": 64, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
GPT2: dict[str, Any] = {
    "vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
HEADS: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 4,
    "num_layers": 1,
    "in_channels": 4,
    "sample_size": 8,
}

Q, K, V, QKV = "query", "key", "value", "query_key_value"
OUT, IN, DOWN = "attention_out", "feed_forward_in", "feed_forward_out"


def three(container: str, q: str, k: str, v: str, out: str) -> dict[str, str]:
    return {f"{container}.{name}": role for name, role in ((q, Q), (k, K), (v, V), (out, OUT))}


GATED = {"mlp.gate_proj": IN, "mlp.up_proj": IN, "mlp.down_proj": DOWN}
TWO = {"fc1": IN, "fc2": DOWN}
LLAMA = {**three("self_attn", "q_proj", "k_proj", "v_proj", "o_proj"), **GATED}
NEOX = {"query_key_value": QKV, "dense": OUT, "dense_h_to_4h": IN, "dense_4h_to_h": DOWN}
OPT = {**three("self_attn", "q_proj", "k_proj", "v_proj", "out_proj"), **TWO}
CROSS = three("encoder_attn", "q_proj", "k_proj", "v_proj", "out_proj")
PHI = {**three("self_attn", "q_proj", "k_proj", "v_proj", "dense"), **TWO}
BERT = {
    **three("attention", "self.query", "self.key", "self.value", "output.dense"),
    "intermediate.dense": IN,
    "layer.0.output.dense": DOWN,
    "layer.1.output.dense": DOWN,
}
BERT_CROSS = {f"cross{path}": role for path, role in BERT.items() if path.startswith("attention")}
DEBERTA_2 = {
    **three("attention", "self.query_proj", "self.key_proj", "self.value_proj", "output.dense"),
    **{path: role for path, role in BERT.items() if role in (IN, DOWN)},
}
DEBERTA = {"self.in_proj": QKV, **{path: role for path, role in BERT.items() if role in (OUT, IN, DOWN)}}
T5 = {
    **three("SelfAttention", "q", "k", "v", "o"),
    **three("EncDecAttention", "q", "k", "v", "o"),
    "DenseReluDense.wo": DOWN,
}
VIT = {**three("attention", "q_proj", "k_proj", "v_proj", "o_proj"), **TWO}
DINO = {**three("attention", "attention.query", "attention.key", "attention.value", "output.dense"), **TWO}
"""DINOv2 as transformers named its layers before it renamed them as in ViT."""
DIFFUSION = {
    **three("attn1", "to_q", "to_k", "to_v", "to_out.0"),
    "ff.net.0.proj": IN,
    "ff.net.2": DOWN,
}
DIFFUSION_CROSS = three("attn2", "to_q", "to_k", "to_v", "to_out.0")
FLUX = {
    **three("attn", "to_q", "to_k", "to_v", "to_out.0"),
    **three("attn", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    "ff.net.0.proj": IN,
    "ff.net.2": DOWN,
    "ff_context.net.0.proj": IN,
    "ff_context.net.2": DOWN,
    "proj_mlp": IN,
    "single_transformer_blocks.0.proj_out": DOWN,
}


def of(config: hf.PreTrainedConfig) -> Callable[[], nn.Module]:
    return lambda: hf.AutoModel.from_config(config)


def unet() -> nn.Module:
    return diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    )


CLIP = hf.CLIPConfig(
    text_config={**SIZES, "max_position_embeddings": 16},
    vision_config={**{k: v for k, v in SIZES.items() if "token" not in k and k != "vocab_size"}, **IMAGES},
)
VISION = {key: SIZES[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}

MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "llama": (of(hf.LlamaConfig(**GROUPED)), LLAMA),
    "mistral": (of(hf.MistralConfig(**GROUPED)), LLAMA),
    "qwen2": (of(hf.Qwen2Config(**SIZES)), LLAMA),
    "qwen3": (of(hf.Qwen3Config(**GROUPED)), LLAMA),
    "gemma3": (of(hf.Gemma3TextConfig(**GROUPED)), LLAMA),
    "gpt2": (
        of(hf.GPT2Config(**GPT2)),
        {"c_attn": QKV, "attn.c_proj": OUT, "c_fc": IN, "mlp.c_proj": DOWN},
    ),
    "gpt2-cross": (
        of(hf.GPT2Config(**GPT2, add_cross_attention=True)),
        {"c_attn": QKV, "q_attn": Q, "attn.c_proj": OUT, "crossattention.c_proj": OUT, "c_fc": IN, "mlp.c_proj": DOWN},
    ),
    "gpt-neox": (of(hf.GPTNeoXConfig(**SIZES)), NEOX),
    "falcon": (of(hf.FalconConfig(**SIZES)), NEOX),
    "opt": (of(hf.OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=8)), OPT),
    "phi": (of(hf.PhiConfig(**SIZES)), PHI),
    "phi3": (
        of(hf.Phi3Config(**SIZES)),
        {"qkv_proj": QKV, "o_proj": OUT, "gate_up_proj": IN, "down_proj": DOWN},
    ),
    "bert": (of(hf.BertConfig(**SIZES)), BERT),
    "bert-cross": (of(hf.BertConfig(**SIZES, is_decoder=True, add_cross_attention=True)), {**BERT, **BERT_CROSS}),
    "roberta": (of(hf.RobertaConfig(**SIZES)), BERT),
    "electra": (of(hf.ElectraConfig(**SIZES)), BERT),
    "deberta": (of(hf.DebertaConfig(**SIZES)), DEBERTA),
    "deberta-v2": (of(hf.DebertaV2Config(**SIZES)), DEBERTA_2),
    "distilbert": (
        of(hf.DistilBertConfig(vocab_size=64, dim=16, hidden_dim=24, n_layers=2, n_heads=2)),
        {**three("attention", "q_lin", "k_lin", "v_lin", "out_lin"), "lin1": IN, "lin2": DOWN},
    ),
    "albert": (
        of(hf.AlbertConfig(**SIZES, embedding_size=8)),
        {**three("attention", "query", "key", "value", "dense"), "ffn": IN, "ffn_output": DOWN},
    ),
    "modernbert": (
        of(hf.ModernBertConfig(**SIZES, cls_token_id=1, sep_token_id=2)),
        {"Wqkv": QKV, "attn.Wo": OUT, "Wi": IN, "mlp.Wo": DOWN},
    ),
    "t5": (
        of(hf.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)),
        {**T5, "wi": IN},
    ),
    "t5-gated": (
        of(hf.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2,
                       feed_forward_proj="gated-gelu")),
        {**T5, "wi_0": IN, "wi_1": IN},
    ),
    "bart": (of(hf.BartConfig(**SEQ2SEQ)), {**OPT, **CROSS}),
    "whisper": (of(hf.WhisperConfig(**SEQ2SEQ)), {**OPT, **CROSS}),
    "wav2vec2": (
        of(hf.Wav2Vec2Config(**SIZES, conv_dim=(8,), conv_stride=(2,), conv_kernel=(2,), num_conv_pos_embeddings=4,
                             num_conv_pos_embedding_groups=2)),
        {**three("attention", "q_proj", "k_proj", "v_proj", "out_proj"), "intermediate_dense": IN,
         "output_dense": DOWN},
    ),
    "vit": (of(hf.ViTConfig(**VISION, **IMAGES)), VIT),
    "dinov2": (
        of(hf.Dinov2Config(**VISION, **IMAGES)),
        DINO if hasattr(modeling_dinov2, "Dinov2SelfAttention") else VIT,
    ),
    "clip": (of(CLIP), OPT),
    "swin": (
        of(hf.SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1], num_heads=[2], window_size=4)),
        VIT,
    ),
    "unet": (unet, {**DIFFUSION, **DIFFUSION_CROSS}),
    "dit": (lambda: diffusers.DiTTransformer2DModel(**HEADS, norm_num_groups=4), DIFFUSION),
    "pixart": (
        lambda: diffusers.PixArtTransformer2DModel(
            **HEADS, cross_attention_dim=8, caption_channels=8, norm_num_groups=4
        ),
        {**DIFFUSION, **DIFFUSION_CROSS},
    ),
    "flux": (flux, FLUX),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_roles(name: str) -> None:
    build, suffixes = MODELS[name]
    linear = [path for path, module in build().named_modules() if base_of(module).kind == "linear"]
    expected = {path: role for path in linear for suffix, role in suffixes.items() if f".{path}".endswith(f".{suffix}")}
    assert {path: role for path in linear if (role := role_of(path))} == expected
    assert all(any(path.endswith(suffix) for path in expected) for suffix in suffixes)


@pytest.mark.parametrize("name", MODELS)
def test_each_feed_forward_has_a_parallel_adapter_that_reads_its_input(name: str) -> None:
    config = slimtune.BottleneckConfig(placement="parallel", bottleneck_size=2)
    model = slimtune.get_peft_model(MODELS[name][0](), config)
    deltas = {path: d["default"] for path, m in model.named_modules() if (d := getattr(m, "deltas", None))}
    ends = [path for path, module in model.named_modules() if role_of(path) == DOWN]
    adapters = {path: delta for path, delta in deltas.items() if any(True for _ in delta.parameters())}
    assert sorted(adapters) == sorted(ends)
    for path, delta in adapters.items():
        (begin,) = (other for other in deltas if other not in adapters and deltas[other].noted is delta.noted)
        block = str(os.path.commonpath([path.replace(".", "/"), begin.replace(".", "/")])).replace("/", ".")
        assert [end for end in ends if end.startswith(f"{block}.")] == [path]


def test_a_projection_that_is_never_called_is_no_default_target() -> None:
    """torch's MultiheadAttention reads the weight of its `out_proj`: a change around it would have no effect."""
    torch.manual_seed(0)
    config = hf.SiglipVisionConfig(**VISION, **IMAGES)
    model = slimtune.get_peft_model(hf.SiglipVisionModel(config), slimtune.BottleneckConfig())
    adapted = {name.partition(".deltas.")[0] for name in trainable(model)}
    assert "encoder.layers.0.self_attn.out_proj" in adapted
    assert not any("head.attention" in name for name in adapted)
