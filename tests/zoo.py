"""Tiny models of every kind that tests attach to: seeded weights, seeded inputs, built in milliseconds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from quantizers import QUANTIZERS, Quantizer
from slimtune.bases import claim

VOCABULARY = 101
HIDDEN = 32
LAYERS = 2


@dataclass(frozen=True)
class Specimen:
    """A model, an input for it, and what of it an adapter is put on."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    lora: dict[str, Any] = field(default_factory=dict)
    fresh: tuple[str, ...] = ()  # parameters outside LoRA that the adapter carries along

    def model(self) -> nn.Module:
        """The same weights at each call."""
        torch.manual_seed(0)
        model = self.build()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # biases and norms that would start at 0 and 1 and prove nothing
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return model.eval()

    def options(self, **others: Any) -> dict[str, Any]:
        """Arguments for `LoraConfig`, a copy: peft extends the lists that it is given."""
        return copy.deepcopy({**self.lora, **others})

    def batch(self) -> dict[str, Tensor]:
        torch.manual_seed(1)
        return self.inputs()


def token_ids(rows: int = 2, length: int = 7) -> Tensor:
    """Token ids without the special ones below 4."""
    return torch.randint(4, VOCABULARY, (rows, length))


def causal_batch() -> dict[str, Tensor]:
    ids = token_ids()
    return {"input_ids": ids, "labels": ids.clone()}


def seq2seq_batch() -> dict[str, Tensor]:
    return {"input_ids": token_ids(), "labels": token_ids(length=5)}


def classification_batch() -> dict[str, Tensor]:
    return {"input_ids": token_ids(), "labels": torch.tensor([0, 2])}


def image_batch() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([1, 2])}


def word_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """The words w0 to w100, one token each."""
    vocabulary = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", eos_token="w2")


def llama(**changes: Any) -> nn.Module:
    config = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**config, **changes}))


def tied_llama() -> nn.Module:
    return llama(tie_word_embeddings=True)


def qwen2() -> nn.Module:
    config = transformers.Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return transformers.Qwen2ForCausalLM(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=64,
        n_embd=HIDDEN,
        n_layer=LAYERS,
        n_head=4,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
    )
    return transformers.GPT2LMHeadModel(config)


def gpt_neox() -> nn.Module:
    config = transformers.GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return transformers.GPTNeoXForCausalLM(config)


def gemma3() -> nn.Module:
    config = transformers.Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        sliding_window=16,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return transformers.Gemma3ForCausalLM(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=HIDDEN,
        d_kv=8,
        d_ff=48,
        num_layers=LAYERS,
        num_decoder_layers=LAYERS,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return transformers.T5ForConditionalGeneration(config)


def bart(**changes: Any) -> nn.Module:
    config = {
        "vocab_size": VOCABULARY,
        "d_model": HIDDEN,
        "encoder_layers": LAYERS,
        "decoder_layers": LAYERS,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": 64,
        "dropout": 0.0,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": 2,
    }
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**{**config, **changes}))


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )
    return transformers.ViTForImageClassification(config)


class NamedLinear(nn.Linear):
    """A subclass as people write them: the arguments of its own constructor, the forward of its parent."""

    def __init__(self, features: int) -> None:
        super().__init__(features, features)


class Mixture(nn.Module):
    """One module of each kind, as in a model of one's own; `shared` is used in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.conv1d = nn.Conv1d(16, 16, kernel_size=3, padding=1)
        self.conv2d = nn.Conv2d(1, 8, kernel_size=3, padding=1, stride=2)
        self.grouped = nn.Conv2d(8, 16, kernel_size=3, padding=1, groups=4)
        self.shared = nn.Linear(16, 16)
        self.named = NamedLinear(16)
        self.out = nn.Linear(16, 5, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x_BTC = self.embedding(ids)
        x_BTC = torch.tanh(self.conv1d(x_BTC.transpose(1, 2)).transpose(1, 2))
        x_BTC = torch.tanh(self.shared(x_BTC)) + x_BTC
        image_B1HW = x_BTC.unsqueeze(1)
        features_BC = torch.tanh(self.grouped(torch.tanh(self.conv2d(image_B1HW)))).mean((2, 3))
        return self.out(torch.tanh(self.named(torch.tanh(self.shared(features_BC)))))


def mixture_batch() -> dict[str, Tensor]:
    return {"ids": token_ids(rows=3, length=8)}


MIXTURE_TARGETS = ["embedding", "conv1d", "conv2d", "grouped", "shared", "named", "out"]
LLAMA_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NEOX_LINEARS = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]

LLAMA = Specimen("llama", llama, causal_batch, {"target_modules": LLAMA_LINEARS, "task_type": "CAUSAL_LM"})
TIED_LLAMA = Specimen("tied-llama", tied_llama, causal_batch, {"target_modules": LLAMA_LINEARS})
QWEN2 = Specimen("qwen2", qwen2, causal_batch, {"target_modules": LLAMA_LINEARS, "task_type": "CAUSAL_LM"})
GPT2 = Specimen("gpt2", gpt2, causal_batch, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True})
GPT_NEOX = Specimen("gpt-neox", gpt_neox, causal_batch, {"target_modules": NEOX_LINEARS})
GEMMA3 = Specimen("gemma3", gemma3, causal_batch, {"target_modules": ["embed_tokens", "q_proj", "v_proj"]})
BERT = Specimen(
    "bert",
    bert,
    classification_batch,
    {"target_modules": ["query", "value"], "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"},
    fresh=("classifier",),
)
T5 = Specimen("t5", t5, seq2seq_batch, {"target_modules": ["q", "v", "wi", "wo"], "task_type": "SEQ_2_SEQ_LM"})
VIT = Specimen(
    "vit",
    vit,
    image_batch,
    {"target_modules": ["projection", "q_proj", "v_proj", "fc1"], "modules_to_save": ["classifier"]},
    fresh=("classifier",),
)
MIXTURE = Specimen("mixture", Mixture, mixture_batch, {"target_modules": MIXTURE_TARGETS})


def in_few_bits(quantizer: Quantizer) -> Specimen:
    """A Llama whose blocks are quantized, and ours: what its library would compute with them is no law."""

    def build() -> nn.Module:
        model = quantizer.model(llama())
        claim(model)
        return model

    return replace(LLAMA, name=f"llama-in-{quantizer}", build=build)


QUANTIZED = tuple(in_few_bits(quantizer) for quantizer in QUANTIZERS)
SPECIMENS = (LLAMA, TIED_LLAMA, QWEN2, GPT2, GPT_NEOX, GEMMA3, BERT, T5, VIT, MIXTURE)
