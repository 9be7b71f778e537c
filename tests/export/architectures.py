"""Tiny models of each architecture that GGUF is written of, with a tokenizer of the kind that such models have."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from slimtune.data.demo_orders import make_orders
from small_text_model import tiny_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip
GEMMA_ROPE = {
    "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}


def seeded(build: Callable[[], Any]) -> Any:
    """The model with every vector (norms and biases too) away from the value that it starts at."""
    torch.manual_seed(0)
    model = build().float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED, attention_bias=True)),
    "llama3": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**GROUPED, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True)
    ),
    "mistral": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**GROUPED, head_dim=32, sliding_window=128)
    ),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**GROUPED)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**GROUPED, head_dim=32)),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2)
    ),
    "qwen3moe": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            **GROUPED, head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True
        )
    ),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(
            **GROUPED | {"num_hidden_layers": 7}, head_dim=32, query_pre_attn_scalar=32, sliding_window=4,
            rope_parameters=GEMMA_ROPE,
        )
    ),
    "phi2": lambda: transformers.PhiForCausalLM(transformers.PhiConfig(**SIZES, partial_rotary_factor=0.5)),
    "phi3": lambda: transformers.Phi3ForCausalLM(transformers.Phi3Config(**GROUPED)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=512, n_embd=64, n_layer=3, n_head=4, n_positions=512, initializer_range=0.2, bos_token_id=1,
            eos_token_id=2,
        )
    ),
}  # fmt: skip


def bert() -> Any:
    return seeded(
        lambda: transformers.BertModel(transformers.BertConfig(**SIZES | {"pad_token_id": 0, "hidden_act": "gelu_new"}))
    )


def texts() -> list[str]:
    return [turn["content"] for example in make_orders(60, 1)[0] for turn in example.messages()]


def byte_level_tokenizer() -> Any:
    return tiny_tokenizer()


def sentencepiece_tokenizer() -> Any:
    """As Llama 2 and Gemma have it: spaces are letters, what is unknown is bytes, a start before each text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(  # type: ignore[attr-defined]
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(  # type: ignore[attr-defined]
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{number:02X}>" for number in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts(), trainer)
    import json

    stored = json.loads(tokenizer.to_str())
    stored["added_tokens"] = [token for token in stored["added_tokens"] if token["id"] < 3]
    tokenizer = Tokenizer.from_str(json.dumps(stored))
    tokenizer.add_special_tokens([AddedToken("<|turn|>", special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[attr-defined]
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


CHARSMAP = zlib.decompress(base64.b85decode(
    r"c-ke?WvtL;6bIlxjJ%Wx(j_9@-7N}=ba!`mgVGWzsURqQN$Kt$-QC^Y`CNFnXTP1D^Wkh~ZxA5}f)qgzHEIxqL=3`S|4<oTMpi^ZD~LigLWn"
    r"_hViA+rd_f$(<SXJ5pLirB0f|XOQj(CIWPJU3h2R@f@-3-ILu%5ImJFmP6B)@uX0nl$9AqaKImttA@{yMU<fjk?DMDe2QIrxC=Q~RBJ*6nk5"
    r"Bx|O%JLKC_?ZfnrxF#ZLS?E^l^Rs17B#6uZR$~%2Gpk!4QWDSn$eUNG^Z6UX+vw;(UuOhrxP9NLT9?sl^%4b7d`1iZ~D=f0bxhySAJm-0~x|"
    r"#hB1`i7|uvWFq%>P!S9UWPsTBp35@42CNhb?`G?6&WeWfCFVmUEOlB~fS%fl&dCX-2^I60~7V|$#S;BIbv62<6W)*8$!+O@SkqvBS6I<EBcD"
    r"AvT9qeWod%|WWh70z|y&Paahd9U)4s(p7oZvX8ILR4KbB?oI;5?VO$Q3SgjjP<?I=8sV9d2`vyFB1Nk9f!v9`lT+yx=*nc*z@H^NzQC;Qgn+"
    r"*ChA|we5m_"
))  # fmt: skip
"""A table of sentencepiece that makes a space of a line break and of a tab, and an e of one with an accent."""


def unigram_tokenizer(charsmap: bytes = b"") -> Any:
    """As sentencepiece's Unigram reads in transformers: runs of spaces are one, and a space is before each text."""
    tokenizer = Tokenizer(models.Unigram())
    spaces = [normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), "\u2581")]
    table = [normalizers.Precompiled(charsmap)] if charsmap else []
    tokenizer.normalizer = normalizers.Sequence([*table, *spaces])  # type: ignore[attr-defined]
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # type: ignore[attr-defined]
    tokenizer.decoder = decoders.Metaspace()  # type: ignore[attr-defined]
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[attr-defined]
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def word_piece_tokenizer() -> Any:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)  # type: ignore[attr-defined]
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[attr-defined]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[attr-defined]
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]",
    )  # fmt: skip
