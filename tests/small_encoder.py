"""A tiny encoder with a tokenizer of its own, saved to a folder, and texts whose label is a word in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

WORDS = ["good", "bad", "odd", "film", "plot", "cast", "the", "a", "was", "is", "very", "."]


def encoder_tokenizer() -> Any:
    """Words between [CLS] and [SEP]."""
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()  # type: ignore[attr-defined]
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[attr-defined]
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))  # type: ignore[attr-defined]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def encoder(seed: int = 0, **changes: Any) -> BertModel:
    """Two layers of 32, the same weights at each call."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": 16,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
        "initializer_range": 0.2,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return BertModel(BertConfig(**settings | changes)).eval()


def save_encoder(folder: Path, **changes: Any) -> Path:
    """A model folder as `save_pretrained` writes it, without a head."""
    encoder(**changes).save_pretrained(folder)
    encoder_tokenizer().save_pretrained(folder)
    return folder


def reviews(count: int, labels: tuple[str, ...] = ("good", "bad"), seed: int = 0) -> list[dict[str, str]]:
    """Sentences of several lengths in which the label occurs."""
    draw = torch.Generator().manual_seed(seed)

    def pick(options: Any) -> Any:
        return options[int(torch.randint(len(options), (1,), generator=draw))]

    rows = []
    for number in range(count):
        label = labels[number % len(labels)]
        text = [pick(WORDS[6:]) for _ in range(pick(range(1, 6)))] + [label, pick(WORDS[3:6]), "."]
        rows.append({"text": " ".join(text), "label": label})
    return rows
