"""Prefix tuning: trained keys and values before those of the tokens, in each layer (Li & Liang 2021, arXiv:2101.00190).

attend(q, [P_K; K], [P_V; V]),  P (n, 2 * layers * dim) trained, or computed as P = W_2 tanh(W_1 Z + b_1) + b_2

The prefix is a key/value cache that is there before the first token. Where a step keeps no cache, the layers read it
without writing to it, which also lets gradient checkpointing compute a layer twice.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from slimtune.core.config import register
from slimtune.core.delta import trainable_dtype
from slimtune.core.frozen import Frozen, Site
from slimtune.core.roles import recomputes, role_of
from slimtune.errors import ConfigError, TargetError, check_whole
from slimtune.methods.prompt.base import (
    Call,
    PromptLearningConfig,
    VirtualTokens,
    is_causal,
    own_forward,
    parameters_of,
    text_config,
    token_ids,
)
from slimtune.methods.prompt.prompt_tuning import PromptTuningInit, check_init

_KEYS = ("key", "query_key_value")
_CROSS = re.compile(r"cross|enc_?dec|encoder_at", re.IGNORECASE)


@register
@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """Prefix tuning; names, defaults and meanings are those of `peft.PrefixTuningConfig`.

    `prefix_init`, which `peft` hasn't, starts from the keys and values that the model computes for words: "TEXT", those
    of `prefix_init_text`, or "SAMPLE_VOCAB", drawn ones.

    Raises:
        ConfigError: an unknown field, a value out of range, fields that exclude each other.
    """

    in_peft: ClassVar[bool] = True
    peft_type: str | None = "PREFIX_TUNING"
    init_weights: str | None = None
    encoder_hidden_size: int | None = None
    prefix_projection: bool = False
    prefix_init: PromptTuningInit | str = PromptTuningInit.RANDOM
    prefix_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None

    learning_rate: ClassVar[float] = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_init(
            self.prefix_init,
            "prefix_init",
            self.prefix_init_text,
            self.tokenizer_name_or_path,
            self.tokenizer_kwargs,
        )
        if self.init_weights not in (None, "zero"):
            raise ConfigError(f"init_weights must be None or 'zero', found {self.init_weights!r}")
        if self.encoder_hidden_size is not None:
            check_whole("encoder_hidden_size", self.encoder_hidden_size)
        if self.prefix_init == PromptTuningInit.RANDOM:
            return
        for name, value in {"init_weights": self.init_weights, "prefix_projection": self.prefix_projection}.items():
            if value:
                raise ConfigError(
                    f"prefix_init={str(self.prefix_init)!r} sets the keys and values themselves, and {name}={value!r} "
                    "sets them otherwise; choose one of them"
                )

    def stored_fields(self) -> dict[str, Any]:
        """The fields as they are stored; those that `peft` doesn't know only where they are used."""
        fields = super().stored_fields()
        own = ("prefix_init_text", "tokenizer_name_or_path", "tokenizer_kwargs")
        unused = [name for name in own if fields[name] is None]
        if self.prefix_init == PromptTuningInit.RANDOM:
            unused.append("prefix_init")
        return {name: value for name, value in fields.items() if name not in unused}

    def delta_for(self, site: Site, autocast_adapter_dtype: bool = True) -> Prefix:
        """The prefix at the model's root. Raises: TargetError, ConfigError, BaseMismatchError."""
        model, config = site.module, text_config(site, "prefix tuning")
        _check_attentions(model)
        layers, heads, head_dim = _shape_of_keys(model, config)
        self.observe(model, heads * head_dim, heads, layers)
        width = layers * 2 * heads * head_dim
        if model.config.is_encoder_decoder and self.prefix_init != PromptTuningInit.RANDOM:
            raise ConfigError(
                f"prefix_init={str(self.prefix_init)!r} is for a decoder or an encoder alone: the layers of an encoder-"
                "decoder share their prefix, which can't be what each of them computes; use 'RANDOM'"
            )
        encoder = None
        if self.prefix_projection:
            self.encoder_hidden_size = self.encoder_hidden_size or heads * head_dim
            if not self.inference_mode:
                # For inference the file's n vectors are enough; the network that made them serves training.
                encoder = PrefixMlp(self.num_virtual_tokens, heads * head_dim, self.encoder_hidden_size, width)
        like = next(model.parameters())
        dtype = trainable_dtype(like.dtype, autocast_adapter_dtype)
        prefix = Prefix(self.num_virtual_tokens, self.num_virtual_tokens, width, like, dtype, encoder)
        prefix.layers, prefix.heads, prefix.causal = layers, heads, is_causal(model)
        prefix.stride = 2 if model.config.is_encoder_decoder else 1
        prefix.window = _window_of(model)
        return prefix


def _check_attentions(model: Any) -> None:
    """Raises: TargetError, unless the layers' attention takes keys and values that are there already."""
    # An encoder's attention keeps no cache, and takes no prefix in `peft` either.
    inside = model.get_decoder() if model.config.is_encoder_decoder else model
    places = {name.rpartition(".")[0] for name, _ in inside.named_modules() if role_of(name) in _KEYS}
    attentions = [inside.get_submodule(name) for name in places if not _CROSS.search(name)]
    if not attentions or not all(_takes_cache(attention) for attention in attentions):
        raise TargetError(
            f"prefix tuning puts keys and values before those of an attention with a cache, which a "
            f"{type(model).__name__} has not; use prompt tuning or LoRA"
        )


def _takes_cache(attention: nn.Module) -> bool:
    return not {"past_key_values", "layer_past"}.isdisjoint(parameters_of(own_forward(attention)))


def _shape_of_keys(model: Any, config: Any) -> tuple[int, int, int]:
    """(layers, heads, head_dim) of the keys that are cached. Raises: TargetError, where layers differ."""
    per_layer = getattr(config, "per_layer_config", None) or [config]
    shapes = {(_heads(layer), _head_dim(layer)) for layer in per_layer}
    # P is one matrix: a row of it is cut into equal pieces, one for each layer's keys and values.
    if len(shapes) > 1 or "reuse" in (getattr(config, "kv_sharing_modes", None) or ()):
        raise TargetError(
            "prefix tuning needs layers whose keys have the same shape and are their own; this model's differ or are "
            "shared; use prompt tuning or LoRA"
        )
    # T5 and BART name the decoder's depth apart; the prefix stands in the decoder.
    layers = config.num_hidden_layers
    if model.config.is_encoder_decoder:
        named = [getattr(config, name, None) for name in ("num_decoder_layers", "decoder_layers")]
        layers = next(filter(None, named), layers)
    ((heads, head_dim),) = shapes
    return layers, heads, head_dim


def _window_of(model: Any) -> int | None:
    """How many tokens a layer sees at most, where some layer sees only the latest."""
    # A cache of the caller's own is written as ever; for a step that keeps none, this one hands the prefix over.
    cache = _empty_cache(model)
    layers = getattr(cache, "self_attention_cache", cache).layers
    return min((layer.sliding_window for layer in layers if getattr(layer, "is_sliding", False)), default=None)


def _heads(config: Any) -> int:
    names = ("num_key_value_heads", "decoder_attention_heads", "num_attention_heads")
    return next(filter(None, (getattr(config, name, None) for name in names)))


def _head_dim(config: Any) -> int:
    # Asked first: the heads of Gemma and of T5 aren't together as wide as the hidden size.
    named = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
    heads = getattr(config, "decoder_attention_heads", None) or config.num_attention_heads
    return named or config.hidden_size // heads


class PrefixMlp(nn.Module):
    """P = W_2 tanh(W_1 Z + b_1) + b_2, with Z (n, dim) and P (n, 2 * layers * dim)."""

    def __init__(self, rows: int, dim: int, hidden: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(rows, dim)
        self.transform = nn.Sequential(nn.Linear(dim, hidden), nn.Tanh(), nn.Linear(hidden, width))

    def forward(self) -> Tensor:
        return self.transform(self.embedding.weight)


class Prefix(VirtualTokens):
    """P (n, 2 * layers * heads * head_dim) as the keys and values (rows, heads, n, head_dim) of each layer.

    Attributes:
        layers: the number of layers.
        heads: the heads of keys and values in each.
        stride: layer i reads the pair stride * i, counted around. In an encoder-decoder it is 2, as in `peft`, which
            gives every other pair to the cross-attention and then drops it, so that layers share the pairs in use.
        window: how many tokens a layer sees at most, where some layer sees only the latest.
    """

    direct = "PrefixTuningConfig"
    layers: int
    heads: int
    stride: int = 1
    window: int | None = None

    def initialise(self, config: PrefixTuningConfig, site: Site) -> None:
        if self.encoded:
            if config.init_weights == "zero":
                last = self.encoder.transform[-1]
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)
        elif config.init_weights == "zero":
            nn.init.zeros_(self.prompt_embeddings)
        elif config.prefix_init == PromptTuningInit.RANDOM:
            nn.init.normal_(self.prompt_embeddings)
        else:
            self._start_from_words(config, site.module)

    @torch.no_grad()
    def _start_from_words(self, config: PrefixTuningConfig, model: Any) -> None:
        """Set P to the keys and values that the model computes for words."""
        if config.prefix_init == PromptTuningInit.TEXT:
            tokenizer = str(config.tokenizer_name_or_path)
            ids = token_ids(str(config.prefix_init_text), tokenizer, config.tokenizer_kwargs, self.count)
        else:
            # On the CPU, for one seed to give one start on every device.
            ids = torch.randint(0, model.get_input_embeddings().num_embeddings, (self.count,))
        ids_1N = ids.to(self.prompt_embeddings.device)[None]
        # Whole: a layer with a window would keep the last words alone, and the prefix would be shorter there.
        cache = _empty_cache(model, whole=True)
        training = model.training
        with model.disable_adapter() if hasattr(model, "adapter_state") else contextlib.nullcontext():
            # What the base computes for words alone, without dropout and without other adapters.
            model.eval()(input_ids=ids_1N, past_key_values=cache)
            model.train(training)
        pairs = [tensor[0] for layer in cache.layers for tensor in (layer.keys, layer.values)]
        # 2 * layers times (heads, n, head_dim) as (n, 2 * layers, heads, head_dim), whose rows are those of P.
        words_NCHD = torch.stack(pairs).permute(2, 0, 1, 3)
        self.prompt_embeddings.copy_(words_NCHD.reshape(self.count, -1))

    def forward(self, base: Frozen, *args: Any, **kwargs: Any) -> Any:
        model = base.module
        call = Call(model, args, kwargs)
        of = "decoder_" if model.config.is_encoder_decoder else ""
        begins = call.begins
        if begins:
            call.check_not_packed(self.causal)
        if not self.causal and call.get("attention_mask") is None:
            # An encoder without a mask makes one as long as its tokens, in which the prefix has no place.
            call["attention_mask"] = call.tokens().new_ones(call.tokens().shape[:2], dtype=torch.long)
        call.put_before(f"{of}attention_mask", 1, self.count)
        call.shift_positions(self.count, also_in_front=False, causal=self.causal)
        self._check_window(call.get("attention_mask"))
        return self._begin(base, call, of) if begins else base(**call)

    def _check_window(self, mask_BS: Tensor | None) -> None:
        """Raises: ConfigError, where pads on the left would push the prefix out of a layer's window."""
        if self.window is None or mask_BS is None or mask_BS.shape[1] <= self.window:
            return
        # Column `count` is a row's first of text: a pad there means that the row is padded on its left.
        if not mask_BS[:, self.count].all():
            raise ConfigError(
                f"with a prefix a row that is padded on the left isn't what it is alone once it is longer than the "
                f"window of {self.window} tokens that some layers see, found {mask_BS.shape[1]} with the prefix; run "
                "rows of different lengths one by one, pad on the right, or use prompt tuning"
            )

    def _begin(self, base: Frozen, call: Call, of: str) -> Any:
        """The first call of a sequence, after which the prefix is in the cache like any other keys and values."""
        model, cache = base.module, call.cache
        # A checkpointed layer runs twice in a step: written to, a cache would hold each token's keys twice then.
        is_again = model.training and torch.is_grad_enabled() and recomputes(model)
        kept = not is_again and (cache is not None or self._keeps_cache(call, model))
        if cache is None or is_again:
            cache = _empty_cache(model)
        own = getattr(cache, "self_attention_cache", cache)
        self._write(own, _rows(call, of), model.dtype)
        reader = None if kept else _make_read_only(cache)
        call["past_key_values"] = cache
        with _cache_in_checkpoints(model, self.encoded) if is_again else contextlib.nullcontext():
            outputs = base(**call)
        # Some models drop a cache in training without a word, and would then train a prefix that nothing reads.
        if not (reader.used if reader else own.get_seq_length() > self.count):
            raise ConfigError(
                f"the layers of this {type(model).__name__} didn't read the prefix; switch gradient checkpointing off "
                "if it is on, or use prompt tuning"
            )
        return outputs if kept else _without(cache, outputs)

    def _keeps_cache(self, call: Call, model: Any) -> bool:
        asked = call.get("use_cache")
        return self.causal and bool(
            getattr(model.config.get_text_config(), "use_cache", False) if asked is None else asked
        )

    def _write(self, cache: Any, rows: int, dtype: torch.dtype) -> None:
        """Let the prefix be what is cached for each row."""
        device = next(self.parameters()).device.type
        if torch.is_autocast_enabled(device):
            # The layers' own keys come in autocast's dtype, and both are concatenated.
            dtype = torch.get_autocast_dtype(device)
        for i, (keys_HND, values_HND) in enumerate(self.pairs(dtype)):
            # Expanded to (rows, heads, n, head_dim): one prefix for all rows of the batch, whose gradients add up.
            cache.update(keys_HND.expand(rows, -1, -1, -1), values_HND.expand(rows, -1, -1, -1), i)

    def pairs(self, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """The keys and values of each layer, (heads, n, head_dim)."""
        prompt_NP = self.prompt().to(dtype)
        # (n, 2 * layers * heads * head_dim), as `peft` stores it, to (2 * layers, heads, n, head_dim).
        pairs_CHND = prompt_NP.view(self.count, 2 * self.layers, self.heads, -1).permute(1, 2, 0, 3)
        places = [2 * self.stride * i % (2 * self.layers) for i in range(self.layers)]
        return [(pairs_CHND[place], pairs_CHND[place + 1]) for place in places]


def _rows(call: Call, of: str) -> int:
    """The number of sequences in this call."""
    names = (f"{of}input_ids", f"{of}inputs_embeds", "labels", "input_ids", "inputs_embeds")
    tensor = next((call[name] for name in names if call.get(name) is not None), None)
    return len(call.tokens(of) if tensor is None else tensor)


def _empty_cache(model: Any, whole: bool = False) -> Any:
    """A cache as the model would make it.

    Args:
        whole: keep all keys, also where a layer's window would forget them.
    """
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    options = {} if whole else {"config": model.config}
    own = DynamicCache(**options)
    return EncoderDecoderCache(own, DynamicCache(**options)) if model.config.is_encoder_decoder else own


class ReadOnlyUpdate:
    """In place of a cache's `update`: new keys and values after the cached ones, which stay as they are.

    Attributes:
        used: whether any layer asked.
    """

    def __init__(self, cache: Any) -> None:
        self.layers = cache.layers
        self.used = False

    def keep_first_row(self) -> None:
        """Leave a row of keys and values, of which all are alike, for a batch that is read as one row."""
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[:1], layer.values[:1]

    def __call__(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.used = True
        # `update` puts longer tensors into the record of a layer; into a copy of it, so that the layer's own stay as
        # long.
        return copy.copy(self.layers[layer_idx]).update(keys, values, *args, **kwargs)


class _Forgetful(dict[int, bool]):
    """Of no layer is it ever known that its cross-attention is cached."""

    def __setitem__(self, key: int, value: bool) -> None:
        pass


def _make_read_only(cache: Any) -> ReadOnlyUpdate:
    """Let layers read a cache without writing to it."""
    own = getattr(cache, "self_attention_cache", cache)
    own.update = reader = ReadOnlyUpdate(own)
    if own is not cache:
        # Or a checkpointed layer that is computed again would take its cross-attention's keys from the first time,
        # which belong to another graph.
        cache.is_updated = _Forgetful()
        cache.cross_attention_cache.update = lambda keys, values, *args, **kwargs: (keys, values)
    return reader


@contextmanager
def _cache_in_checkpoints(model: nn.Module, encoded: bool) -> Iterator[None]:
    """Let checkpointed layers take the cache, which transformers keeps from them because they could write to it twice.

    Raises:
        ConfigError: layers that run their backward by themselves, each one through the encoder of the prefix.
    """
    changed: list[tuple[nn.Module, str, bool]] = []
    for module in model.modules():
        if hasattr(module, "_can_checkpoint_with_cache"):
            # What transformers guards against can't happen here: the layers get a cache that nothing is written to.
            changed.append((module, "_can_checkpoint_with_cache", True))
            # Reentrant checkpointing runs a backward pass for each layer, and the encoder's graph is gone after the
            # first.
            function = getattr(module, "_gradient_checkpointing_func", None)
            if encoded and getattr(function, "keywords", {}).get("use_reentrant", False):
                raise ConfigError(
                    "prefix_projection needs gradient checkpointing with use_reentrant=False: reentrant layers would "
                    "each go back through the projection"
                )
        elif getattr(module, "gradient_checkpointing", False) and _has_layers(module):
            # GPT-2's stack keeps the cache from its layers too.
            changed.append((module, "gradient_checkpointing", False))
    before = [(module, name, module.__dict__.get(name)) for module, name, _ in changed]
    for module, name, value in changed:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in before:
            # A flag that the class has and the instance hadn't.
            if value is None:
                delattr(module, name)
            else:
                setattr(module, name, value)


def _has_layers(module: nn.Module) -> bool:
    return any(hasattr(inside, "_can_checkpoint_with_cache") for inside in module.modules())


def _without(cache: Any, outputs: Any) -> Any:
    """A model's outputs without a cache that nobody asked for."""
    if isinstance(outputs, tuple):
        return tuple(value for value in outputs if value is not cache)
    return type(outputs)(**{name: value for name, value in outputs.items() if value is not cache})
