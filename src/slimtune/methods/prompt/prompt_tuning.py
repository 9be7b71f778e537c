"""Prompt tuning: trained embeddings before those of the tokens (Lester et al. 2021, arXiv:2104.08691).

h_0 = [P; E(ids)],  P (n, dim) trained, E the model's own embedding
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from slimtune.core.config import register
from slimtune.core.delta import Delta, trainable_dtype
from slimtune.core.frozen import Frozen, Site
from slimtune.core.roles import input_embeddings
from slimtune.errors import ConfigError, TargetError, did_you_mean, listing
from slimtune.methods.prompt.base import (
    UNMERGEABLE,
    Call,
    PromptLearningConfig,
    VirtualTokens,
    is_causal,
    text_config,
    token_ids,
)


class PromptTuningInit(StrEnum):
    """Where virtual tokens start: the embeddings of a text, of words drawn from the vocabulary, or normal noise."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


def check_init(init: str, field: str, text: str | None, tokenizer: str | None, options: Any) -> None:
    """Raises: ConfigError, unless a text and its tokenizer are named where they are used, and only there."""
    if init not in list(PromptTuningInit):
        near = did_you_mean(str(init).upper(), list(PromptTuningInit))
        raise ConfigError(f"{field} must be one of {listing(PromptTuningInit)}, found {init!r}{near}")
    if init == PromptTuningInit.TEXT and not tokenizer:
        raise ConfigError(f"{field}='TEXT' needs the tokenizer of the text; name it in tokenizer_name_or_path")
    if init == PromptTuningInit.TEXT and not text:
        raise ConfigError(f"{field}='TEXT' needs a text; give it in {field}_text")
    if options and init != PromptTuningInit.TEXT:
        raise ConfigError(f"tokenizer_kwargs are used with {field}='TEXT' alone, found {init!r}; leave them out")
    if options and "trust_remote_code" in options:
        raise ConfigError("tokenizer_kwargs can't hold trust_remote_code, which would let an adapter run code")


class EmbeddedPromptConfig(PromptLearningConfig):
    """What the methods share whose virtual tokens are embeddings."""

    def delta_for(self, site: Site, autocast_adapter_dtype: bool = True) -> Delta:
        """The prompt at the model's root. Raises: TargetError, ConfigError, BaseMismatchError."""
        config = text_config(site, str(self.peft_type))
        embedding = input_embeddings(site.module)
        if not isinstance(embedding, nn.Embedding):
            raise TargetError(
                f"{self.peft_type} goes in front of embedded tokens, and a {type(site.module).__name__} has no token "
                "embedding; use a method that changes modules, such as LoRA"
            )
        self.observe(site.module, embedding.embedding_dim, config.num_attention_heads, config.num_hidden_layers)
        # `peft` stores n rows for each half of an encoder-decoder, and reads the first n alone; so does `_embed`.
        rows = self.num_virtual_tokens * (self.num_transformer_submodules or 1)
        dtype = trainable_dtype(embedding.weight.dtype, autocast_adapter_dtype)
        # A stored prompt is P itself; for inference nothing has to compute it.
        encoder = None if self.inference_mode else self.encoder(rows)
        prompt = SoftPrompt(self.num_virtual_tokens, rows, embedding.embedding_dim, embedding.weight, dtype, encoder)
        if site.module.config.is_encoder_decoder:
            return CrossAttentionRoom(prompt)
        prompt.causal = is_causal(site.module)
        # Such a head reads the last token of a row that isn't a pad, and finds it by the ids, which a prompt replaces.
        prompt.pools_last = prompt.causal and type(site.module).__name__.endswith("ForSequenceClassification")
        return prompt

    def encoder(self, rows: int) -> nn.Module | None:
        """What computes the virtual tokens while they are trained, if anything."""
        return None

    def link_deltas(self, model: Any, drafted: Any) -> None:
        """Put the prompt of an encoder-decoder at its encoder, which `generate` calls by itself."""
        super().link_deltas(model, drafted)
        for site, delta in list(drafted):
            if isinstance(delta, CrossAttentionRoom):
                encoder = model.get_encoder()
                # At the encoder, because `generate` calls it by itself, once, before the decoder's first step.
                name = next(name for name, module in model.named_modules() if module is encoder)
                drafted.append((replace(site, name=name, module=encoder), delta.prompt))


@register
@dataclass
class PromptTuningConfig(EmbeddedPromptConfig):
    """Prompt tuning; names, defaults and meanings are those of `peft.PromptTuningConfig`.

    Raises:
        ConfigError: an unknown field, a value out of range, fields that exclude each other.
    """

    in_peft: ClassVar[bool] = True
    peft_type: str | None = "PROMPT_TUNING"
    prompt_tuning_init: PromptTuningInit | str = PromptTuningInit.RANDOM
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None

    learning_rate: ClassVar[float] = 3e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_init(
            self.prompt_tuning_init,
            "prompt_tuning_init",
            self.prompt_tuning_init_text,
            self.tokenizer_name_or_path,
            self.tokenizer_kwargs,
        )

    def start(self, embedding: nn.Embedding, rows: int) -> Tensor:
        """The embeddings (rows, dim) that the virtual tokens start from. Raises: ConfigError."""
        device = embedding.weight.device
        if self.prompt_tuning_init == PromptTuningInit.RANDOM:
            # With deviation 1, as `nn.Embedding` draws: `peft`'s start.
            return torch.randn(rows, embedding.embedding_dim, device=device)
        if self.prompt_tuning_init == PromptTuningInit.SAMPLE_VOCAB:
            # Drawn on the CPU, so that one seed gives one start on every device.
            return embedding(torch.randint(0, embedding.num_embeddings, (rows,)).to(device))
        text, tokenizer = str(self.prompt_tuning_init_text), str(self.tokenizer_name_or_path)
        ids = token_ids(text, tokenizer, self.tokenizer_kwargs, rows)
        if int(ids.max()) >= embedding.num_embeddings:
            raise ConfigError(
                f"the tokenizer '{tokenizer}' has the token {int(ids.max())}, beyond the {embedding.num_embeddings} "
                "of this model; name the model's own tokenizer"
            )
        return embedding(ids.to(device))


class SoftPrompt(VirtualTokens):
    """h_BSD = [P_ND; embed(ids_BT)], S = N + T; P is cast to the embeddings' dtype.

    Attributes:
        pools_last: the model reads a sequence's last token, so that pads must stand on the left.
    """

    direct = "PromptTuningConfig"
    pools_last: bool = False

    def initialise(self, config: Any, site: Site) -> None:
        if not self.encoded and isinstance(config, PromptTuningConfig):
            with torch.no_grad():
                start = config.start(input_embeddings(site.module), len(self.prompt_embeddings))
                self.prompt_embeddings.copy_(start)
        elif not self.encoded:
            nn.init.normal_(self.prompt_embeddings)

    def forward(self, base: Frozen, *args: Any, **kwargs: Any) -> Any:
        call = Call(base.module, args, kwargs)
        begins = call.begins
        # Later steps of `generate` find the virtual tokens in the cache, and need room in mask and positions alone.
        if begins:
            call.check_not_packed(self.causal)
            self._embed(call, base.module)
        call.put_before("attention_mask", 1, self.count)
        call.shift_positions(self.count, also_in_front=begins, causal=self.causal)
        if self.causal:
            call.pads_first(self.count, begins, also_behind=self.pools_last)
        return base(**call)

    def _embed(self, call: Call, model: nn.Module) -> None:
        """Put the prompt before the embedded tokens, and what says nothing of it before what is known of each token."""
        length = call.tokens().shape[1]
        ids, embeds = call.pop("input_ids", None), call.pop("inputs_embeds", None)
        call["inputs_embeds"] = input_embeddings(model)(ids) if embeds is None else embeds
        tokens_BTD = call["inputs_embeds"]
        prompt_ND = self.prompt()[: self.count].to(tokens_BTD.dtype)
        # (rows, n + T, dim), in the dtype of the embeddings: P is trained in float32 and read in 16 bits.
        call["inputs_embeds"] = torch.cat([prompt_ND.expand(len(tokens_BTD), -1, -1), tokens_BTD], dim=1)
        # A virtual token belongs to the first segment, and is no label.
        call.put_before("token_type_ids", 0, self.count)
        labels = call.get("labels")
        # Labels of tokens, not those of several classes.
        if labels is not None and labels.ndim == 2 and labels.shape[1] == length and not labels.is_floating_point():
            # -100 is what torch's cross entropy ignores.
            call.put_before("labels", -100, self.count)


class CrossAttentionRoom(Delta):
    """At the root of an encoder-decoder whose encoder has the prompt: the decoder may look at the virtual tokens too.

    Attributes:
        link: the prompt, in a tuple so that it isn't a part of this delta.
    """

    unmergeable = UNMERGEABLE

    def __init__(self, prompt: SoftPrompt) -> None:
        super().__init__()
        self.link = (prompt,)

    @property
    def prompt(self) -> SoftPrompt:
        return self.link[0]

    def forward(self, base: Frozen, *args: Any, **kwargs: Any) -> Any:
        call = Call(base.module, args, kwargs)
        if call.get("encoder_outputs") is None:
            # The encoder makes room in its mask by itself, so that it must not get the decoder's.
            names = ("attention_mask", "output_attentions", "output_hidden_states")
            inputs: Mapping[str, Any] = {name: call[name] for name in names if name in call}
            given = {name: call.pop(name) for name in ("input_ids", "inputs_embeds") if name in call}
            call["encoder_outputs"] = base.module.get_encoder()(**given, **inputs, return_dict=True)
        # The encoder's states are n longer than the mask that came with the call.
        call.put_before("attention_mask", 1, self.prompt.count)
        return base(**call)
