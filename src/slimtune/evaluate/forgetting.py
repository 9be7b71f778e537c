"""Forgetting: the language loss on texts outside of the training's domain, before tuning and after.

For the texts i of a domain, with n_i tokens and the summed losses b_i before and a_i after, in nats:

before = sum_i b_i / sum_i n_i,  after = sum_i a_i / sum_i n_i,  difference = after - before

The interval is the paired bootstrap's: texts are drawn with replacement, each with both of its losses.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slimtune.console.figure import new_figure, write
from slimtune.console.progress import Watch
from slimtune.errors import DataError
from slimtune.evaluate.language_loss import Passage, Text, losses, passages, require_language_loss
from slimtune.evaluate.likelihood import LOGITS
from slimtune.evaluate.tuned import Tuned

DRAWS = 2000
"""Of the bootstrap."""
CONFIDENCE = 0.95
MAX_LENGTH = 512

Bounds = tuple[float, float] | None
"""Of which a single text has none."""


@dataclass(frozen=True)
class TextLoss:
    """What became of one text; losses in nats per token."""

    text: str
    tokens: int
    before: float
    after: float

    @property
    def rise(self) -> float:
        return self.after - self.before


@dataclass(frozen=True)
class DomainLoss:
    """What became of one domain; losses in nats per token."""

    texts: int
    tokens: int
    before: float
    after: float
    interval: Bounds
    worst: list[TextLoss]

    @property
    def difference(self) -> float:
        """after - before: above 0 where something was forgotten."""
        return self.after - self.before

    def to_dict(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        worst = [{**asdict(rise), "rise": rise.rise} for rise in self.worst]
        return {
            **asdict(self),
            "difference": self.difference,
            "perplexity_before": perplexity(self.before),
            "perplexity_after": perplexity(self.after),
            "worst": worst,
        }


@dataclass(frozen=True)
class Forgetting:
    """What became of all domains.

    Attributes:
        difference: the mean of the domains' differences, each domain counting the same.
        interval: of that mean.
    """

    domains: dict[str, DomainLoss]
    difference: float
    interval: Bounds
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        return {
            "domains": {name: change.to_dict() for name, change in self.domains.items()},
            "difference": self.difference,
            "interval": self.interval,
            "confidence": CONFIDENCE,
            "seconds": self.seconds,
        }


def measure(
    tuned: Tuned,
    domains: Mapping[str, Sequence[Text]],
    max_length: int = MAX_LENGTH,
    worst: int = 3,
    batch_tokens: int = LOGITS,
    watch: Watch = Watch(),  # noqa: B008 - it has no state
) -> Forgetting:
    """The losses of a base and of what was tuned from it, on the same texts.

    An adapter is switched off for its base's losses; for a whole model its base is loaded after it.

    Raises:
        ConfigError: the model has no language loss.
        DataError: there is no text, or one can't be scored.
    """
    began = time.monotonic()
    model, tokenizer = tuned.load()
    require_language_loss(model, tuned.source)
    positions = getattr(model.config, "max_position_embeddings", None) or max_length
    read = all_passages(domains, tokenizer, min(max_length, positions))

    def scored(chosen: Any, what: str) -> np.ndarray:
        watch.start(what, sum(len(passage.encoded.input_ids) for passage in read))
        return losses(chosen, tokenizer, read, batch_tokens, watch.step).numpy()

    after = scored(model, "reading tokens, tuned")
    if tuned.is_adapter:
        # The same model with the adapter off: no second copy, and the very same kernels for both losses.
        with model.disable_adapter():
            before = scored(model, "reading tokens, base")
    else:
        # The only reference: two whole models need not fit side by side.
        del model
        before = scored(tuned.load_base(), "reading tokens, base")
    return compare(read, before, after, worst, time.monotonic() - began)


def all_passages(domains: Mapping[str, Sequence[Text]], tokenizer: Any, max_length: int) -> list[Passage]:
    """The texts of all domains as ids; raises DataError."""
    read = [one for name, texts in domains.items() for one in passages(name, texts, tokenizer, max_length)]
    if not read:
        raise DataError("there is no text to measure forgetting on; name a domain, or pass --data with texts")
    return read


def compare(
    read: Sequence[Passage], before: np.ndarray, after: np.ndarray, worst: int = 3, seconds: float = 0.0
) -> Forgetting:
    """The changes from the summed losses of each passage, in nats."""
    tokens = np.array([passage.tokens for passage in read], dtype=np.float64)
    changes: dict[str, DomainLoss] = {}
    draws = []
    rng = np.random.default_rng(0)
    for name in dict.fromkeys(passage.domain for passage in read):
        own = np.array([index for index, passage in enumerate(read) if passage.domain == name])
        # (texts,) each: tokens and summed losses; a ratio of sums and not a mean of ratios, so that long texts weigh
        # more.
        n, b, a = tokens[own], before[own], after[own]
        drawn = _drawn_differences(a - b, n, rng)
        draws.append(drawn)
        order = np.argsort(-(a - b) / n, kind="stable")[:worst]
        rises = [TextLoss(read[int(own[i])].shown, int(n[i]), float(b[i] / n[i]), float(a[i] / n[i])) for i in order]
        changes[name] = DomainLoss(
            len(own), int(n.sum()), float(b.sum() / n.sum()), float(a.sum() / n.sum()), _interval(drawn, len(own)),
            [rise for rise in rises if rise.rise > 0],
        )  # fmt: skip
    mean = float(np.mean([change.difference for change in changes.values()]))
    # Domains are fixed and texts within them drawn: the mean over domains is taken draw by draw.
    return Forgetting(changes, mean, _interval(np.mean(draws, axis=0), len(read)), seconds)


def _drawn_differences(rises: np.ndarray, tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The difference per token in each draw of the bootstrap."""
    # (draws, texts). Numerator and denominator are drawn together, for the length of a text is chance as well.
    chosen = rng.integers(0, len(rises), (DRAWS, len(rises)))
    return rises[chosen].sum(1) / tokens[chosen].sum(1)


def _interval(drawn: np.ndarray, texts: int) -> Bounds:
    if texts < 2:
        return None
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def perplexity(loss: float) -> float | None:
    """exp(loss), or None beyond what a number can hold."""
    return math.exp(loss) if loss < 700 else None


def in_words(interval: Bounds) -> str:
    """`+0.0123 to +0.0456`."""
    return "one text" if interval is None else f"{interval[0]:+.4f} to {interval[1]:+.4f}"


def plot_forgetting(forgetting: Forgetting, picture: Path, title: str) -> None:
    """Draw the difference of each domain as a point on its interval, and the mean below.

    Raises:
        ConfigError: another format than PNG or SVG.
        MissingDependencyError: matplotlib is not installed.
    """
    rows = [(name, change.difference, change.interval) for name, change in forgetting.domains.items()]
    rows.append(("mean", forgetting.difference, forgetting.interval))
    figure = new_figure(7, 1.4 + 0.42 * len(rows))
    axes = figure.add_subplot(xlabel="loss after - before, nats per token (above 0: forgotten)", title=title)
    for place, (name, difference, interval) in enumerate(rows):
        colour = "black" if name == "mean" else "tab:red" if _rose(interval) else "tab:blue"
        if interval:
            axes.plot(interval, (place, place), color=colour, linewidth=2, solid_capstyle="butt")
        axes.plot(difference, place, "D" if name == "mean" else "o", color=colour)
    axes.axvline(0, color="gray", linewidth=1)
    axes.axhline(len(rows) - 1.5, color="gray", linewidth=0.5, linestyle=":")
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    write(figure, picture)


def _rose(interval: Bounds) -> bool:
    return interval is not None and interval[0] > 0
