"""What the soft prompts share: trained vectors that a frozen model reads in front of its tokens.

The delta sits at the root and wraps the model's forward. Where nothing is cached yet the virtual tokens are put in
front, and at every call the attention mask and the positions make room for them, so that `generate` needs no word.
A row's positions follow from its mask, and pads on its left stand before its virtual tokens, so that it gives what it
gives alone, also in layers with a sliding window, which count pads like any other tokens.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from slimtune.core.config import PeftConfig, Whereabouts
from slimtune.core.delta import Delta
from slimtune.core.frozen import Site
from slimtune.core.roles import Role
from slimtune.errors import BaseMismatchError, ConfigError, TargetError, check_whole

ENCODER = "/prompt_encoder."
"""Where an encoder's own tensors stand in the file, beside the embeddings that it computes."""

PACKING = ("cu_seq_lens_q", "cu_seqlens", "seq_idx")
"""What a call says where its rows hold several examples, besides positions that begin anew."""

UNMERGEABLE = "a soft prompt is no change of weights and can't be merged; keep the adapter beside the base"


@dataclass
class PromptLearningConfig(PeftConfig):
    """What the soft prompts share; the names are those of `peft`, which has no default for `num_virtual_tokens`.

    `token_dim`, `num_layers`, `num_attention_heads` and `num_transformer_submodules` are found from the model.
    """

    num_virtual_tokens: int = 20
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: list[str] | None = None

    sizes: ClassVar[tuple[str, ...]] = ("num_virtual_tokens", "num_transformer_submodules")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("num_virtual_tokens", self.num_virtual_tokens)

    @property
    def default_targets(self) -> tuple[Role | Whereabouts, ...]:
        return ("model",)

    def observe(self, model: Any, token_dim: int, heads: int, layers: int) -> None:
        """Note what was found in the model. Raises: ConfigError, BaseMismatchError, for a prompt that doesn't fit."""
        config = model.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        # One position at least has to be left for a token.
        # Virtual tokens have positions like all others.
        if limit and self.num_virtual_tokens > limit - 1:
            raise ConfigError(
                f"num_virtual_tokens={self.num_virtual_tokens} leaves no room for text in the {limit} positions of "
                f"this model; choose at most {limit - 1}"
            )
        dimensions = {"token_dim": token_dim, "num_attention_heads": heads, "num_layers": layers}
        for name, value in dimensions.items():
            if getattr(self, name) not in (None, value):
                raise BaseMismatchError(
                    f"the prompt is made for a model with {name}={getattr(self, name)}, but this one has {value}"
                )
            setattr(self, name, value)
        if self.num_transformer_submodules is None:
            self.num_transformer_submodules = 2 if model.config.is_encoder_decoder else 1
        if self.task_type is None:
            self.task_type = task_of(model)

    def read(self, tensors: Mapping[str, Tensor], placed: list[tuple[Site, Any]], source: object) -> dict[str, Tensor]:
        """Without the encoder's tensors, which serve training alone, where it isn't to be trained.

        Raises:
            ConfigError: it is to be trained, and only what it computed is stored.
        """
        trained = next((delta for _, delta in placed if isinstance(delta, VirtualTokens) and delta.encoded), None)
        rest = {key: tensor for key, tensor in tensors.items() if not key.startswith(ENCODER.removeprefix("/"))}
        if trained and "prompt_embeddings" in rest and len(rest) == len(tensors):
            raise ConfigError(
                f"'{source}' holds the virtual tokens alone, without the network that computed them, which peft does "
                "not store: it can be used but not trained further; to go on with the tokens themselves, load it with "
                f"config={trained.direct}(num_virtual_tokens={trained.count}) and is_trainable=True"
            )
        return dict(tensors) if trained else rest

    def link_deltas(self, model: Any, drafted: Any) -> None:
        """Let heads that are trained whole be called as `peft` does, which wraps the model in no other for a prompt."""
        for i, (site, delta) in enumerate(drafted):
            # A container that is trained whole has been taken apart into its modules by now: one head each.
            if delta.holds:
                head = Head(site.name)
                head.hold_all(site)
                drafted[i] = (site, head)


class Head(Delta):
    """A module of the head, trained whole beside a prompt."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def disk_name(self, parameter: str) -> str:
        return f"/base_model.{self.path}.{super().disk_name(parameter)}"


def text_config(site: Site, method: str) -> Any:
    """The config of the text model at the root. Raises: TargetError, where there is none."""
    config = getattr(site.module, "config", None)
    if site.name or config is None or not hasattr(config, "get_text_config"):
        raise TargetError(
            f"{method} goes in front of the tokens of a whole transformers model, found a {type(site.module).__name__}"
        )
    return config.get_text_config()


def task_of(model: Any) -> str:
    """The task that a transformers model was built for, which `peft` must be told to use a prompt."""
    name = type(model).__name__
    tasks = {
        "ForSequenceClassification": "SEQ_CLS",
        "ForTokenClassification": "TOKEN_CLS",
        "ForQuestionAnswering": "QUESTION_ANS",
    }
    for ending, task in tasks.items():
        if name.endswith(ending):
            return task
    # transformers' bodies without a head say so of themselves.
    if not model.can_generate():
        return "FEATURE_EXTRACTION"
    return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"


def own_forward(module: nn.Module) -> Any:
    """The forward that the module's class had before any adapter came."""
    return getattr(type(module), "adopted_from", type(module)).forward


@functools.cache
def parameters_of(forward: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a forward's arguments."""
    return tuple(inspect.signature(forward).parameters)


def is_causal(model: nn.Module) -> bool:
    """Whether tokens see only those before them, as some attention in the model says of itself."""
    return any(getattr(module, "is_causal", False) is True for module in model.modules())


def token_ids(text: str, tokenizer: str, options: Mapping[str, Any] | None, count: int) -> Tensor:
    """The ids of a text, repeated or cut to `count`. Raises: ConfigError, for a tokenizer or text that gives none."""
    from transformers import AutoTokenizer

    from slimtune.storage.source import PACKAGED, resolve

    # Of the packaged names alone: any other is a folder or a Hub id, which transformers finds.
    source = resolve(tokenizer) if tokenizer in PACKAGED else tokenizer
    try:
        loaded = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **dict(options or {}))
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ConfigError(f"the tokenizer '{tokenizer}' can't be loaded: {reason}") from error
    ids: list[int] = loaded(text)["input_ids"]
    if not ids:
        raise ConfigError(f"the text {text!r} has no tokens; give one that has")
    return torch.tensor((ids * (count // len(ids) + 1))[:count])


class VirtualTokens(Delta):
    """The trained vectors P (rows, dim), as a table or computed by an encoder while they are trained.

    Attributes:
        count: the number n of virtual tokens.
        encoder: without arguments it gives P; an adapter for inference holds P alone.
    """

    unmergeable = UNMERGEABLE
    direct: ClassVar[str]
    """The config that trains such vectors without an encoder."""

    def __init__(self, count: int, rows: int, dim: int, like: Tensor, dtype: torch.dtype, encoder: Any = None) -> None:
        super().__init__()
        self.count = count
        self.causal = False
        if encoder is None:
            self.prompt_embeddings = nn.Parameter(torch.empty(rows, dim, device=like.device, dtype=dtype))
        else:
            # No table beside it: what an encoder computes is what is used and stored.
            self.encoder = encoder.to(like.device, dtype)

    @property
    def encoded(self) -> bool:
        return "encoder" in self._modules

    def prompt(self) -> Tensor:
        """P (rows, dim)."""
        return self.encoder() if self.encoded else self.prompt_embeddings

    def excludes(self, other: Any) -> bool:
        return isinstance(other, VirtualTokens)

    def to_disk(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not self.encoded:
            return {"/prompt_embeddings": own["prompt_embeddings"]}
        inside = {name.removeprefix("encoder."): tensor for name, tensor in own.items()}
        # A copy: the tensors may be gathered ones, and dropout must not draw.
        # `own` is what is to be stored, which under FSDP isn't what the module holds.
        encoder = copy.deepcopy(self.encoder).eval()
        encoder.load_state_dict(inside)
        with torch.no_grad():
            return {"/prompt_embeddings": encoder()} | {ENCODER + name: tensor for name, tensor in inside.items()}

    def from_disk(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not self.encoded:
            return {"prompt_embeddings": stored["/prompt_embeddings"]}
        return {name: stored[ENCODER + name.removeprefix("encoder.")] for name in self.state_dict()}

    def extra_repr(self) -> str:
        return f"num_virtual_tokens={self.count}"


class Call(dict[str, Any]):
    """The arguments of one forward of a model by name, with room for n virtual tokens made in them."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.accepted = parameters_of(own_forward(module))[1:]
        super().__init__(zip(self.accepted, args, strict=False))
        # By name from here on: callers pass ids by position as often as not.
        self.update(kwargs)

    @property
    def cache(self) -> Any:
        """The key/value cache that is there already, if there is one."""
        cache = self.get("past_key_values")
        # It was allocated for the tokens alone, before anyone knew of virtual ones.
        if getattr(cache, "is_compileable", False):
            raise ConfigError(
                "a static cache has no room for virtual tokens; leave out cache_implementation, or use 'dynamic'"
            )
        return cache

    @property
    def begins(self) -> bool:
        """Whether nothing is cached yet."""
        # `generate` passes an empty cache with the first tokens.
        return self.cache is None or self.cache.get_seq_length() == 0

    def tokens(self, prefix: str = "") -> Tensor:
        """The ids or embeddings (rows, length, ...) of this call."""
        given = (self.get(f"{prefix}input_ids"), self.get(f"{prefix}inputs_embeds"))
        tokens = next((tensor for tensor in given if tensor is not None), None)
        if tokens is None:
            raise ConfigError(f"virtual tokens go in front of tokens: pass {prefix}input_ids or {prefix}inputs_embeds")
        return tokens

    def put_before(self, name: str, value: int, count: int) -> None:
        """Put `count` columns of that value before an argument, where it is given."""
        tensor = self.get(name)
        if tensor is None:
            return
        # A mask of four dimensions holds a number for each query and key, in which virtual tokens have no known place.
        if not isinstance(tensor, Tensor) or tensor.ndim != 2:
            raise ConfigError(f"virtual tokens take {name} as (rows, tokens); found {_shape(tensor)}")
        self[name] = torch.cat([tensor.new_full((len(tensor), count), value), tensor], dim=1)

    def check_not_packed(self, causal: bool) -> None:
        """Raises: ConfigError, for rows of several examples, of which the first alone would get the virtual tokens."""
        positions = self.get("position_ids")
        is_packed = any(self.get(name) is not None for name in PACKING)
        # transformers looks for examples in positions only where there is no mask.
        if causal and isinstance(positions, Tensor) and self.get("attention_mask") is None:
            is_packed = is_packed or _begin_anew(positions)
        if is_packed:
            raise ConfigError(
                "virtual tokens stand in front of a row, and this batch is packed, with several examples in a row, of "
                "which only the first would have them; leave packing (or padding_free) out, or use LoRA"
            )

    def pads_first(self, count: int, begins: bool, also_behind: bool) -> None:
        """Move the pads on the left of each row before the virtual tokens, for which there is room already.

        Args:
            also_behind: the pads on the right as well, for a model that reads the last token of a row.

        Raises:
            ConfigError: pads after the first call of a sequence, when the virtual tokens have their place.
        """
        mask_BS = self.get("attention_mask")
        if mask_BS is None:
            return
        # S = n + T: room for the n virtual tokens was made in front of the T columns of text.
        text_BT = mask_BS[:, count:]
        # Up to the first token of a row the running count is zero: those columns are the pads on its left.
        stays_BT = text_BT.bool() if also_behind else text_BT.cumsum(1) > 0
        stays_BS = torch.cat([stays_BT.new_ones(len(stays_BT), count), stays_BT], dim=1)
        # Zeros first and otherwise as it was: [pads, virtual tokens, text] in each row. A window that counts back from
        # a token then meets its text and its virtual tokens before any pad, as in the row alone.
        order_BS = stays_BS.int().argsort(dim=1, stable=True)
        self["attention_mask"] = mask_BS.gather(1, order_BS)
        if begins:
            for name in ("token_type_ids", "position_ids"):
                if self.get(name) is not None:
                    # Positions may have axes in front, as M-RoPE's (3, rows, S); rows may be one for all.
                    shape = (*self[name].shape[:-2], *order_BS.shape)
                    self[name] = self[name].expand(shape).gather(-1, order_BS.expand(shape))
            embeds_BSD = self["inputs_embeds"]
            self["inputs_embeds"] = embeds_BSD.gather(1, order_BS[..., None].expand_as(embeds_BSD))
        elif self.tokens().shape[1] > 1 and not stays_BT[:, self.cache.get_seq_length() - count :].all():
            raise ConfigError(
                "a row has pads on its left beyond what was read at first, where its virtual tokens stand by now; "
                "leave out prefill_chunk_size, or run rows of such different lengths one by one"
            )

    def shift_positions(self, count: int, also_in_front: bool, causal: bool) -> None:
        """Let positions begin after the virtual tokens; those of a causal model follow from its mask.

        Args:
            also_in_front: the virtual tokens are part of this call and have positions themselves.
        """
        given, mask = self.get("position_ids"), self.get("attention_mask")
        if given is not None:
            # 0 to n - 1 for the virtual tokens, and n more for each of the text's.
            front = torch.arange(count, device=given.device, dtype=given.dtype).expand(*given.shape[:-1], count)
            self["position_ids"] = torch.cat([front, given + count], dim=-1) if also_in_front else given + count
        elif causal and mask is not None and "position_ids" in self.accepted:
            # Of the mask with the n ones in front: text begins at n however many pads stand before it, and a pad
            # repeats the position before it, never below n - 1. transformers' own count would begin at the first column
            # (ADR 8).
            self["position_ids"] = (mask.long().cumsum(-1) - 1)[:, -self.tokens().shape[1] :]


def _begin_anew(positions: Tensor) -> bool:
    """Whether positions tell of several examples in a row; with several axes, the first one is that of the text."""
    steps = positions.diff(dim=-1)
    # Within one example positions go up by one; M-RoPE's may stand still over an image, but never go back.
    return bool((steps != 1).any()) if positions.ndim < 3 else bool((steps[0] < 0).any())


def _shape(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
