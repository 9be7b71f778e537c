"""The next tokens of many answers at once, each by its own settings.

Penalties, temperature, filters and draws run over (answers, vocabulary) in one go; an answer's draws come from a
generator of its own, so that a seed gives the same answer whatever runs beside it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from slimtune.engine.request import SamplingParams, TokenConstraint
from slimtune.errors import first_line

MOST_LIKELY = 256
"""So many candidates are looked at first; where they hold less than top_p together, the whole vocabulary is sorted."""


NO_NUMBERS = "the model's logits are not finite"


class SampledToken(NamedTuple):
    """A chosen token, with its log probability and the likeliest tokens' where they are asked for."""

    token: int
    logprob: float | None
    alternatives: tuple[tuple[int, float], ...]


@dataclass
class Sampler:
    """What the choices of one answer depend on besides its logits."""

    params: SamplingParams
    prompt: frozenset[int]

    def __post_init__(self) -> None:
        self.counts: Counter[int] = Counter()
        # Python's own generator: its state is small, and it draws one number a token.
        self.random = random.Random(self.params.seed)

    @property
    def penalizes(self) -> bool:
        p = self.params
        return (p.presence_penalty, p.frequency_penalty, p.repetition_penalty) != (0.0, 0.0, 1.0)

    @property
    def filters(self) -> bool:
        p = self.params
        return (p.top_k, p.top_p, p.min_p) != (0, 1.0, 0.0)

    def accept(self, token: int) -> None:
        """Note a token that was chosen."""
        self.counts[token] += 1
        if self.params.constraint is not None:
            self.params.constraint.accept(token)

    def penalize(self, logits_V: Tensor) -> None:
        """Take the penalties off, in place."""
        p, device = self.params, logits_V.device
        if p.repetition_penalty != 1.0:
            seen = torch.tensor([*(self.prompt | self.counts.keys())], device=device)
            # A positive logit is divided and a negative one multiplied, so that both fall; the paper (Keskar et al.
            # 2019, arXiv:1909.05858) divides alone.
            own = logits_V[seen]
            changed = torch.where(own > 0, own / p.repetition_penalty, own * p.repetition_penalty)
            logits_V[seen] = _in_range(changed, own)
        if self.counts:
            tokens = torch.tensor([*self.counts], device=device)
            times = torch.tensor([*self.counts.values()], device=device, dtype=logits_V.dtype)
            own = logits_V[tokens]
            logits_V[tokens] = _in_range(own - (p.presence_penalty + p.frequency_penalty * times), own)


def _in_range(changed: Tensor, own: Tensor) -> Tensor:
    """Logits that were finite before a penalty, as finite ones; of others it is told that they aren't."""
    limits = torch.finfo(changed.dtype)
    return changed.clamp(limits.min, limits.max).where(own.isfinite(), own)


def sample(logits_NV: Tensor, samplers: Sequence[Sampler]) -> list[SampledToken | str]:
    """The next token of each answer, or why there is none."""
    params = [sampler.params for sampler in samplers]
    changes = any(s.penalizes or s.params.constraint is not None or s.params.temperature > 0 for s in samplers)
    reports = any(p.logprobs is not None for p in params)
    if changes or reports:
        # Greedy rows without a report are spared this: the greatest of 16-bit logits is the greatest.
        logits_NV = logits_NV.float()
    # What the model itself says, before penalties and temperature.
    logprobs_NV = logits_NV.log_softmax(-1) if reports else None
    if changes:
        logits_NV = logits_NV.clone()
    failed: dict[int, str] = {}
    for row, sampler in enumerate(samplers):
        if sampler.penalizes:
            sampler.penalize(logits_NV[row])
        if sampler.params.constraint is not None:
            failed |= _constrain(logits_NV[row], sampler.params.constraint, row)
    best = logits_NV.max(-1)
    failed |= {row: NO_NUMBERS for row, ok in enumerate(best.values.isfinite().tolist()) if not (ok or row in failed)}
    tokens = best.indices.tolist()
    drawing = [row for row, p in enumerate(params) if p.temperature > 0 and row not in failed]
    # Apart, because the filters draw in the order of likelihood: a row must not depend on whether others are filtered.
    for is_filtered in (False, True):
        rows = [row for row in drawing if samplers[row].filters == is_filtered]
        drawn = _draw(logits_NV[rows], [samplers[row] for row in rows], is_filtered) if rows else []
        for row, token in zip(rows, drawn, strict=True):
            tokens[row] = token
    reported = _reported(logprobs_NV, tokens, params) if logprobs_NV is not None else [(None, ())] * len(tokens)
    return [
        failed.get(row) or SampledToken(token, *report)
        for row, (token, report) in enumerate(zip(tokens, reported, strict=True))
    ]


def _constrain(logits_V: Tensor, constraint: TokenConstraint, row: int) -> dict[int, str]:
    """Leave the tokens that a constraint allows, in place; why that fails, by the number of the row."""
    try:
        allowed_V = constraint.mask().to(logits_V.device)
    except Exception as error:
        # It is its request's own: the others must go on.
        return {row: f"the constraint of the answer failed: {first_line(error)}"}
    # A model's rows may be padded beyond the tokenizer's vocabulary.
    known = min(len(allowed_V), len(logits_V))
    logits_V[:known].masked_fill_(~allowed_V[:known], -torch.inf)
    logits_V[known:] = -torch.inf
    return {} if allowed_V.any() else {row: "the constraint of the answer allows no token"}


def _draw(logits_NV: Tensor, samplers: Sequence[Sampler], is_filtered: bool) -> list[int]:
    """A token of each row by its temperature and, where they filter, by top-k, top-p and min-p, in that order."""
    params = [sampler.params for sampler in samplers]

    def column(name: str) -> Tensor:
        values = [getattr(p, name) for p in params]
        return torch.tensor(values, device=logits_NV.device, dtype=torch.float64)[:, None]

    # Divided after the greatest was taken off: a temperature near zero gives zero and minus infinity, and no overflow.
    logits_NV = (logits_NV.double() - logits_NV.amax(-1, keepdim=True)) / column("temperature")
    probs_NV = logits_NV.softmax(-1)
    # One number a row from its own generator, so that no row's draw depends on how many rows there are.
    uniform = torch.tensor([s.random.random() for s in samplers], device=logits_NV.device, dtype=torch.float64)[:, None]
    if not is_filtered:
        return _by_quantile(probs_NV, uniform)
    vocabulary = probs_NV.shape[1]
    # As many as there are is all of them; more may be too large a number for a tensor.
    tops = [min(p.top_k, vocabulary) for p in params]
    most, top_k = max(MOST_LIKELY, *tops), torch.tensor(tops, device=logits_NV.device)[:, None]
    sorted_NK, order_NK = probs_NV.topk(min(most, vocabulary))
    # Rows with a small top-k need no more candidates than that, whatever top_p says.
    needed = column("top_p").where(top_k == 0, 0.0)
    if bool((sorted_NK.sum(-1, keepdim=True) < needed).any()):
        sorted_NK, order_NK = probs_NV.sort(-1, descending=True)
    rank_K = torch.arange(sorted_NK.shape[1], device=logits_NV.device)
    kept_NK = (top_k == 0) | (rank_K < top_k)
    sorted_NK = sorted_NK * kept_NK
    # Of what top-k left: those before which less than top_p of it lies. The first one always stays.
    share_NK = sorted_NK / sorted_NK.sum(-1, keepdim=True).where(top_k > 0, 1.0)
    kept_NK = (share_NK.cumsum(-1) - share_NK < column("top_p")) & (sorted_NK >= column("min_p") * sorted_NK[:, :1])
    places = _by_quantile(sorted_NK * kept_NK, uniform)
    return order_NK.gather(1, torch.tensor(places, device=logits_NV.device)[:, None])[:, 0].tolist()


def _by_quantile(weights_NV: Tensor, uniform_N1: Tensor) -> list[int]:
    """Where each row's weights sum to a share of their total that was drawn uniformly from [0, 1)."""
    sums_NV = weights_NV.cumsum(-1)
    # The first place whose sum is beyond the draw has a weight; equal sums before it have none.
    return torch.searchsorted(sums_NV, uniform_N1 * sums_NV[:, -1:], right=True)[:, 0].tolist()


def _reported(
    logprobs_NV: Tensor, tokens: Sequence[int], params: Sequence[SamplingParams]
) -> list[tuple[float | None, tuple[tuple[int, float], ...]]]:
    """The log probabilities that each row's request asks for."""
    chosen = logprobs_NV.gather(1, torch.tensor(tokens, device=logprobs_NV.device)[:, None])[:, 0].tolist()
    most = min(max(p.logprobs or 0 for p in params), logprobs_NV.shape[1])
    values_NK, indices_NK = (t.tolist() for t in logprobs_NV.topk(most))
    return [
        (None, ()) if p.logprobs is None else (own, tuple(zip(ids[: p.logprobs], values[: p.logprobs], strict=True)))
        for p, own, ids, values in zip(params, chosen, indices_NK, values_NK, strict=True)
    ]
