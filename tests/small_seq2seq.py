"""Tiny models with an encoder and a decoder, saved to a folder, and words to translate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

WORDS = {"red": "rot", "green": "grün", "blue": "blau", "black": "schwarz", "white": "weiß", "grey": "grau"}
SIZES = {"big": "gross", "small": "klein"}


def seq2seq_tokenizer(starts: bool) -> Any:
    """Whole words, an end of sequence behind them, and a beginning in front where BART wants one."""
    special = ["<pad>", "</s>", "<s>", "<unk>"]
    words = [*special, *WORDS, *WORDS.values(), *SIZES, *SIZES.values()]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[attr-defined]
    shape = "<s> $A </s>" if starts else "$A </s>"
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[attr-defined]
        single=shape, special_tokens=[("</s>", 1), ("<s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        **({"bos_token": "<s>"} if starts else {}),
    )  # fmt: skip


def t5(seed: int = 0) -> T5ForConditionalGeneration:
    """Two layers of 32 on both sides, the same weights at each call."""
    torch.manual_seed(seed)
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=32,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            initializer_factor=3.0,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=1,
        )
    ).eval()


def bart(seed: int = 0) -> BartForConditionalGeneration:
    """Two layers of 32 on both sides, the same weights at each call."""
    torch.manual_seed(seed)
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=32,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_position_embeddings=32,
            dropout=0.0,
            init_std=0.2,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=2,
            decoder_start_token_id=1,
            forced_eos_token_id=None,
        )
    ).eval()


def save_seq2seq(folder: Path, kind: str) -> Path:
    """A model folder as `save_pretrained` writes it, of "t5" or "bart"."""
    {"t5": t5, "bart": bart}[kind]().save_pretrained(folder)
    seq2seq_tokenizer(starts=kind == "bart").save_pretrained(folder)
    return folder


def translations() -> list[dict[str, str]]:
    """A size and a colour, as prompt and completion."""
    return [
        {"prompt": f"{size} {colour}", "completion": f"{SIZES[size]} {WORDS[colour]}"}
        for colour in WORDS
        for size in SIZES
    ]
