"""Training batches whose rows begin alike: what they share is computed once, by any causal model of transformers.

The texts of packed rows attend apart in the same way, in place of all tokens of a row to all others under a mask.

Hooks around the decoder turn a batch into a `PrefixTree` and its hidden states back into rows. Losses, output layers,
trainers see the same batch as before. Models attend through transformers' registry of attention functions, in which an
entry of ours passes a tree to the model's own function, family by family, and everything else through.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from slimtune.core.frozen import deltas_of
from slimtune.errors import ConfigError
from slimtune.methods.prompt.base import VirtualTokens
from slimtune.methods.prompt.prefix_tuning import Prefix, ReadOnlyUpdate
from slimtune.models.shared_encodings import shared_encodings
from slimtune.ops.autograd import is_traced
from slimtune.ops.cross_entropy import IGNORED
from slimtune.ops.prefix_tree import Family, PrefixTree, prefix_tree, tree_attention

WORTHWHILE = 0.9
"""A batch stays as it is where its tree has more than this share of its tokens."""
WORTHWHILE_PAIRS = 0.5
"""Packed rows stay under a mask where their texts have more than this share of its queries times keys."""
_ATTENTION = ", shared prefixes"
"""What the name of an attention ends with that reads trees."""
_TREE = "prefix_tree"
_KNOWN_LAYERS = {"full_attention", "sliding_attention"}


@dataclass
class SharedTokens:
    """How many tokens the batches had, padding included, and how many were computed.

    Attributes:
        masked_pairs: queries times keys of packed rows under a mask, which computes all of them.
        pairs: of those, the ones that are computed where each text attends by itself.
    """

    given: int = 0
    computed: int = 0
    masked_pairs: int = 0
    pairs: int = 0

    @classmethod
    def of(cls, tree: PrefixTree, rows: int, columns: int) -> SharedTokens:
        """Those of a batch (rows, columns) as a tree."""
        given = rows * columns
        if tree.texts <= rows:
            # One text a row: without padding attention needs no mask, and skips half of the pairs by itself.
            return cls(given, len(tree.tokens))
        return cls(given, len(tree.tokens), given * columns, tree.pairs)

    def of_tokens_alone(self) -> SharedTokens:
        """The same where no mask is saved."""
        return SharedTokens(self.given, self.computed)

    def add(self, other: SharedTokens) -> None:
        """Count another batch in."""
        for name, count in vars(other).items():
            setattr(self, name, getattr(self, name) + count)

    @property
    def ratio(self) -> float:
        """How many times fewer tokens were computed; 1 where there were none."""
        return self.given / self.computed if self.computed else 1.0

    @property
    def attend_apart(self) -> bool:
        """Whether texts of packed rows are worth attending by themselves."""
        return 0 < self.pairs <= WORTHWHILE_PAIRS * self.masked_pairs

    @property
    def pays(self) -> bool:
        """Whether so much less is computed that sharing is worth its calls."""
        return 0 < self.computed <= WORTHWHILE * self.given or self.attend_apart


@contextmanager
def shared_prefixes(model: Any, always: bool = False, left_padded: bool = False) -> Iterator[SharedTokens]:
    """Within it, a model computes what the rows of a batch share once; an encoder-decoder encodes equal rows once.

    A soft prompt or a trained prefix in front of the rows is shared, too. Left as they are: batches that share too
    little, passes with a key-value cache, with embeddings in place of tokens, with hidden states or attention weights
    asked for, or with adapters by row.

    Args:
        always: batches that share little, too.
        left_padded: batches padded on the left without positions, too, by a model that `counts_columns`.

    Raises: ConfigError, for a kind of model that can't; whether this one can is for `check_shares` to say.
    """
    tokens = SharedTokens()
    if is_encoded(model):
        with shared_encodings(model, tokens):
            yield tokens
        return
    config = check_kind(model)
    own, decoder = config._attn_implementation, decoder_of(model)
    flatten = _Flatten(model, decoder, tokens, always, left_padded)
    hooks = [
        model.register_forward_pre_hook(flatten.note_text, with_kwargs=True),
        decoder.register_forward_pre_hook(flatten, with_kwargs=True),
        decoder.register_forward_hook(_unflatten, with_kwargs=True),
    ]
    # For the whole training and not for the forward pass alone: checkpointing runs layers again in the backward pass.
    config._attn_implementation = _registered(own)
    try:
        yield tokens
    finally:
        config._attn_implementation = own
        for hook in hooks:
            hook.remove()


def is_encoded(model: Any) -> bool:
    """Whether an encoder reads the rows, all tokens of a row at once, so that only equal rows are shared."""
    return bool(getattr(model.config, "is_encoder_decoder", False)) and hasattr(model, "get_encoder")


def masks_packed_rows(model: Any) -> bool:
    """Whether packed rows have a mask; flash attention finds their texts by itself."""
    config = model.get_decoder().config if hasattr(model, "get_decoder") else model.config
    return "flash" not in (getattr(config, "_attn_implementation", None) or "")


def prompt_of(model: Any) -> VirtualTokens | None:
    """The virtual tokens that are in effect in front of a model's rows."""
    state, deltas = vars(model).get("adapter_state"), deltas_of(model)
    names = () if state is None else (name for name in state.applied if name in deltas)
    return next((deltas[name] for name in names if isinstance(deltas[name], VirtualTokens)), None)


@dataclass(frozen=True)
class _Rows:
    """What the decoder reads, by its tokens; soft prompts have ids below 0, each its own.

    Attributes:
        mask, positions: as `prefix_tree` takes them.
        front: keys in front of all rows.
    """

    ids: Tensor
    mask: Tensor | None
    positions: Tensor | None
    front: int = 0


class _Pass(NamedTuple):
    """What the root of a model was given, of which its decoder may see less.

    Attributes:
        ids, mask: the text, (B, T).
        learns_padding: whether something is to be predicted behind padding.
    """

    ids: Tensor | None = None
    mask: Tensor | None = None
    learns_padding: bool = False


class _Flatten:
    """Before the decoder: the batch as a tree of one row."""

    def __init__(self, model: Any, decoder: nn.Module, tokens: SharedTokens, always: bool, left_padded: bool) -> None:
        self.model, self.tokens, self.always, self.left_padded = model, tokens, always, left_padded
        self.signature, self.config = inspect.signature(decoder.forward), cast(Any, decoder.config)
        self.root_signature = inspect.signature(model.forward)
        # By thread, of which several may run one model; a dictionary, so that a model can be copied meanwhile.
        self.passes: dict[int, _Pass] = {}

    def note_text(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the model: keep the text, of which a soft prompt makes embeddings, and what is learned of it."""
        bound = self.root_signature.bind(*args, **kwargs).arguments
        given = {**bound.get("kwargs", {}), **bound}
        self.passes[threading.get_ident()] = _Pass(
            given.get("input_ids"), given.get("attention_mask"), _learns_padding(given)
        )

    def __call__(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # None where the decoder is called by itself.
        root = self.passes.pop(threading.get_ident(), _Pass())
        bound = self.signature.bind(*args, **kwargs)
        given = {**bound.arguments.pop("kwargs", {}), **bound.arguments}
        caches = given.get("use_cache")
        if caches is None:
            # In training nobody takes the cache that a config asks for.
            caches = self.config.use_cache and not decoder.training
        state = getattr(self.model, "adapter_state", None)
        if caches or is_traced() or (state is not None and state.call.rows is not None):
            return None
        if not self.config._attn_implementation.endswith(_ATTENTION):
            # The engine runs the model meanwhile, with its own attention: its one row is many texts.
            return None
        asked = (getattr(self.config, name, False) if given.get(name) is None else given[name] for name in _ASKED)
        if any(given.get(name) is not None for name in _APART) or any(asked):
            return None
        rows = None if root.learns_padding else self._rows(decoder, given, root)
        if rows is None:
            return None
        has_positions = rows.positions is not None or self.left_padded
        if rows.mask is not None and not has_positions and not bool(rows.mask[:, 0].all()):
            # Padding on the left: the model may count positions from the padding on, each row by its own.
            return None
        tree = prefix_tree(rows.ids, rows.mask, rows.positions)
        tree.front = rows.front
        tokens = SharedTokens.of(tree, *rows.ids.shape)
        if not masks_packed_rows(self.model):
            tokens = tokens.of_tokens_alone()
        is_worth_it = self.always or tokens.pays
        self.tokens.add(tokens if is_worth_it else SharedTokens(tokens.given, tokens.given))
        if not is_worth_it:
            return None
        if given.get("inputs_embeds") is None:
            given["input_ids"] = tree.tokens[None]
        else:
            given["inputs_embeds"] = _one_of_each(given["inputs_embeds"], tree, rows.mask)
        if rows.front:
            given["past_key_values"].update.keep_first_row()
        # A mask of four dimensions is passed on to the layers as it is; ours is for the tree to make. No attention but
        # ours takes one of this shape: layers that reentrant checkpointing runs again behind the block fail by it.
        unused = torch.ones(1, 1, 0, 0, dtype=torch.bool, device=rows.ids.device)
        # Where nothing was said of positions, the model would count on from the keys that are there.
        positions = tree.positions + (rows.front if rows.positions is None else 0)
        return (), given | {
            "attention_mask": unused, "position_ids": positions[None], "use_cache": False, _TREE: tree,
        }  # fmt: skip

    def _rows(self, decoder: nn.Module, given: dict[str, Any], root: _Pass) -> _Rows | None:
        """What stands in the rows; None where that can't be told, or isn't for a tree to compute."""
        ids, mask, positions = (given.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
        # Some models make a mask for each kind of their layers beforehand.
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2 and bool(mask.any())):
            return None
        past, embeds, prompt = given.get("past_key_values"), given.get("inputs_embeds"), prompt_of(self.model)
        if prompt is None:
            if ids is None or past is not None or embeds is not None or not _is_one_text(mask, positions):
                return None
            return _Rows(ids, mask, positions)
        if decoder is self.model:
            # The virtual tokens are still to come.
            return None
        if isinstance(prompt, Prefix):
            is_read_only = isinstance(getattr(past, "update", None), ReadOnlyUpdate)
            if ids is None or not is_read_only or prompt.window is not None:
                return None
            own = None if mask is None else mask[:, prompt.count :]
            return _Rows(ids, own, positions, prompt.count) if _is_one_text(own, positions) else None
        if embeds is None or root.ids is None or past is not None or not _is_one_text(root.mask, None):
            return None
        return _Rows(_with_virtual_tokens(root.ids, root.mask, mask, prompt.count), mask, positions)


def _is_one_text(mask: Tensor | None, positions: Tensor | None) -> bool:
    """Whether of rows with a mask each is one text between padding, as a tree takes them.

    Without a mask, positions that begin anew part the texts of a packed row, in transformers as in a tree. Under a mask
    a model attends across a hole and across such positions; a tree doesn't.
    """
    if mask is None:
        return True
    there = mask.bool()
    begins = there[:, 0].long() + (there[:, 1:] & ~there[:, :-1]).sum(1)
    if bool((begins > 1).any()):
        return False
    if positions is None:
        return True
    goes_on = positions[:, 1:] - positions[:, :-1] == 1
    return bool((goes_on | ~(there[:, 1:] & there[:, :-1])).all())


def _learns_padding(given: dict[str, Any]) -> bool:
    """Whether something is to be predicted behind padding, whose hidden states a tree doesn't compute."""
    mask = given.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return False
    is_padding = mask == 0
    labels, shifted = given.get("labels"), given.get("shift_labels")
    if isinstance(shifted, Tensor):
        return shifted.shape == mask.shape and bool(((shifted != IGNORED) & is_padding).any())
    if not isinstance(labels, Tensor) or labels.shape != mask.shape:
        return False
    return bool(((labels[:, 1:] != IGNORED) & is_padding[:, :-1]).any())


def _with_virtual_tokens(ids: Tensor, text_mask: Tensor | None, mask: Tensor | None, count: int) -> Tensor:
    """The ids (B, n + T) of rows with n virtual tokens, which are -1 to -n, in the places that a mask has for them.

    Args:
        text_mask: (B, T), without the virtual tokens.
        mask: (B, n + T), in which the padding on the left may stand in front of them.
    """
    virtual = -1 - torch.arange(count, device=ids.device).expand(len(ids), -1)
    joined = torch.cat([virtual, ids], dim=1)
    if mask is None or text_mask is None:
        return joined
    # Padding aside, the order within a row is the same: the k-th token that a mask has stands where the other has it.
    is_padding = torch.cat([torch.zeros_like(virtual), (text_mask == 0).long()], dim=1)
    tokens_first = joined.gather(1, is_padding.argsort(dim=1, stable=True))
    return tokens_first.gather(1, (mask.cumsum(1) - 1).clamp_min(0))


def _one_of_each(embeds: Tensor, tree: PrefixTree, mask: Tensor | None) -> Tensor:
    """The embeddings (1, N, features) of a tree's tokens: of each that of one row, since they are the same in all."""
    place = tree.place.flatten()
    columns = torch.arange(len(place), device=place.device)
    if mask is not None:
        columns = columns[mask.bool().flatten()]
    first = torch.empty_like(tree.tokens).index_copy_(0, place[columns], columns)
    return embeds.flatten(0, 1).index_select(0, first)[None]


_APART = ("encoder_hidden_states", "token_type_ids")
_ASKED = ("output_hidden_states", "output_attentions", "output_router_logits")


def _unflatten(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """After the decoder: the hidden states in rows again, (1, N, features) to (B, T, features)."""
    tree = kwargs.get(_TREE)
    if tree is None:
        return output
    hidden = output[0]
    # Padding gets some token's hidden state, which nobody looks at.
    rows = hidden[0].index_select(0, tree.place.flatten()).unflatten(0, tree.place.shape)
    if isinstance(output, tuple):
        return (rows, *output[1:])
    output["last_hidden_state"] = rows
    return output


def _registered(own: str) -> str:
    """The name of an attention function that passes trees to `own` family by family; registers it."""
    name = own + _ATTENTION

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any) -> Any:
        function: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        function = ALL_ATTENTION_FUNCTIONS.get_interface(own, function)
        tree = options.pop(_TREE, None)
        if tree is None:
            return function(module, query, key, value, attention_mask, **options)
        masks = functools.partial(_MASKS[own], tree)
        return tree_attention(function, tree, module, query, key, value, masks, **options), None

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[own])
    return name


def _sdpa_mask(tree: PrefixTree, family: Family, window: int | None, query: Tensor) -> Tensor | None:
    # Without a mask the kernel makes the triangle itself, which is faster.
    return None if family.is_plain(window) and not tree.front else tree.mask(family, window)[None, None]


def _eager_mask(tree: PrefixTree, family: Family, window: int | None, query: Tensor) -> Tensor:
    # Added to the scores: (1, 1, L, A + L).
    allowed = tree.mask(family, window)
    lowest = torch.finfo(query.dtype).min
    return torch.zeros(allowed.shape, dtype=query.dtype, device=query.device).masked_fill_(~allowed, lowest)[None, None]


# Not flash attention: transformers finds its kernel by the very name that stands in the config.
_MASKS: dict[str, Callable[..., Tensor | None]] = {"sdpa": _sdpa_mask, "eager": _eager_mask}


def check_kind(model: Any) -> Any:
    """The config of the decoder of a kind of model that may share; nothing is run.

    Raises: ConfigError, for a kind that is known not to share.
    """
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ConfigError(f"{name} can't share prefixes: it is no decoder alone")
    if model.config.get_text_config() is not model.config:
        raise ConfigError(f"{name} can't share prefixes: it reads more than text, and gives its layers embeddings")
    decoder = decoder_of(model)
    if any(getattr(module, "is_causal", True) is False for module in decoder.modules()):
        raise ConfigError(f"{name} can't share prefixes: its tokens see those behind them, as in encoders")
    config = cast(Any, decoder.config)
    own = getattr(config, "_attn_implementation", None) or ""
    if own.endswith(_ATTENTION):
        raise ConfigError(f"{name} shares prefixes already; leave the inner block out")
    if own not in _MASKS:
        raise ConfigError(f"{name} can't share prefixes with the attention {own!r}; it can with 'sdpa'")
    layers = set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYERS
    if layers:
        raise ConfigError(f"{name} can't share prefixes: it has layers of {', '.join(sorted(layers))}")
    return config


def decoder_of(model: Any) -> nn.Module:
    """The layers of a model, which have a config. Raises: ConfigError, where it doesn't say which these are."""
    try:
        decoder = model.get_decoder()
    except (AttributeError, NotImplementedError):
        decoder = None
    if not isinstance(decoder, nn.Module) or not hasattr(decoder, "config"):
        raise ConfigError(f"{type(model).__name__} can't share prefixes: it is no decoder alone")
    return decoder
