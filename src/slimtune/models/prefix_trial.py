"""Whether a model may share prefixes, by trial: rows that begin alike have the hidden states that they have apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.errors import ConfigError, first_line
from slimtune.methods.prompt.prefix_tuning import Prefix
from slimtune.models.shared_prefixes import check_kind, decoder_of, is_encoded, prompt_of, shared_prefixes

PROBED = 20
"""Tokens of each row of a trial."""
_SHORT_WINDOW = PROBED // 2
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest relative difference of hidden states that counts as rounding, by their dtype."""
ROUNDING_16_BITS = 5e-2


def check_shares(model: Any) -> None:
    """Check by trial that rows which begin alike give the hidden states that they give apart.

    Raises: ConfigError, for a model that isn't causal, that doesn't attend through transformers' registry, or whose
        layers see more than attention shows them, as in recurrent models.
    """
    if not is_encoded(model):
        check_kind(model)
    prompt = prompt_of(model)
    if isinstance(prompt, Prefix) and prompt.window is not None:
        raise ConfigError(
            f"{type(model).__name__} can't share prefixes with a trained one (PREFIX_TUNING): some of its layers see "
            f"the last {prompt.window} tokens alone; use prompt tuning or LoRA"
        )
    vocabulary = model.get_input_embeddings().num_embeddings
    drawn = torch.randint(0, vocabulary, (3, PROBED), generator=torch.Generator().manual_seed(0))
    # Two rows share most tokens, a third one none; the second one is padded.
    shared = torch.cat([drawn[0, : PROBED - 4], drawn[1, PROBED - 4 :]])
    ids = torch.stack([drawn[0], shared, drawn[2]]).to(model.device)
    if is_encoded(model):
        ids[1] = ids[2] = ids[0]
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    _check_same_states(model, ids, mask)


def counts_columns(model: Any) -> bool:
    """Whether by trial a model that gets no positions counts padding on the left among them, as most do."""
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(0, vocabulary, (3, PROBED), generator=torch.Generator().manual_seed(0))
    # Two rows that share most tokens behind as much padding, as answers to one prompt, and a longer one.
    ids[1, :-4] = ids[0, :-4]
    mask = torch.ones_like(ids)
    mask[:2, :3] = 0
    try:
        _check_same_states(model, ids.to(model.device), mask.to(model.device), left_padded=True)
    except ConfigError:
        return False
    return True


def _check_same_states(model: Any, ids: Tensor, mask: Tensor, left_padded: bool = False) -> None:
    """Raises: ConfigError, where rows computed as a tree have other hidden states than apart, or stay apart."""
    modes, width = {module: module.training for module in model.modules()}, ids.shape[1]
    # Dropout draws other masks for other layouts.
    model.eval()
    try:
        with torch.no_grad(), _short_windows(model):
            apart = _states(model, ids, mask)
            with shared_prefixes(model, always=True, left_padded=left_padded) as tokens:
                together = _states(model, ids, mask)
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        raise ConfigError(f"{type(model).__name__} can't share prefixes: {first_line(error)}") from error
    finally:
        for module, was_training in modes.items():
            module.training = was_training
    # Padding aside, whose states are some other token's here.
    difference, whole = (_of_text(x, mask, width).float() for x in (together - apart, apart))
    moved = float(difference.norm() / whole.norm().clamp_min(1e-12))
    if not moved < ROUNDING.get(apart.dtype, ROUNDING_16_BITS):
        raise ConfigError(
            f"{type(model).__name__} can't share prefixes: computed so, its hidden states differ by {moved:.1%}"
        )
    if not 0 < tokens.computed < tokens.given:
        raise ConfigError(f"{type(model).__name__} can't share prefixes: its layers don't get the rows by their tokens")


def _states(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """The hidden states of rows that enter at the root, as in training: it may give its decoder something else.

    Of an encoder-decoder those of its encoder.
    """
    if is_encoded(model):
        return model.get_encoder()(input_ids=ids, attention_mask=mask)[0]

    def leave(decoder: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        raise _Seen(output[0])

    # Behind the hooks that are there, which give the rows back; heads have nothing to say.
    hook = decoder_of(model).register_forward_hook(leave)
    try:
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    except _Seen as seen:
        return seen.states
    finally:
        hook.remove()
    raise ConfigError(f"{type(model).__name__} can't share prefixes: it doesn't run its decoder")


class _Seen(Exception):  # noqa: N818 - it ends a pass, and tells of no mistake
    """The hidden states that were asked for."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


@contextmanager
def _short_windows(model: nn.Module) -> Iterator[None]:
    """Windows of attention are so short in it that a trial by few tokens reaches beyond them.

    Some models tell their attention of the window, others mask by it alone, and what is not told a tree can't know.
    """
    holders = {id(holder): holder for module in model.modules() for holder in (module, vars(module).get("config"))}
    before = [
        (holder, name, value)
        for holder in holders.values()
        for name, value in vars(holder or object).items()
        # Not `max_window_layers`, which counts layers.
        if "window" in name and "layers" not in name and type(value) is int and value > _SHORT_WINDOW
    ]
    try:
        for holder, name, _ in before:
            setattr(holder, name, _SHORT_WINDOW)
        yield
    finally:
        for holder, name, value in before:
            setattr(holder, name, value)


def _of_text(states: Tensor, mask: Tensor, width: int) -> Tensor:
    """The states of the tokens, without padding and virtual tokens; all of those that are one for a row."""
    return states[:, -width:][mask.bool()] if states.dim() == 3 else states
