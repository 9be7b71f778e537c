"""Conversations whose answers are learned, and texts that are learned whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from slimtune.data.batches import Objective, PackRows, pad_id_of
from slimtune.data.chat_template import use_template
from slimtune.data.encode import Prepared
from slimtune.data.mixing import exact_shares, mixed, prepare
from slimtune.data.packing import check_packs, pack
from slimtune.data.reading import Part, Parts, sources_of
from slimtune.data.settings import DataSettings
from slimtune.data.tasks.base import EncodedDataset, Remark, Report, held_out_note, sample_of
from slimtune.data.tasks.classification import positions_of
from slimtune.errors import ConfigError
from slimtune.models.load import LoadOptions, load_model


@dataclass(frozen=True)
class Conversations:
    """Conversations whose answers are learned, and texts that are learned whole."""

    parts: Parts
    settings: DataSettings
    seed: int = 0

    task = "text"
    task_type = "CAUSAL_LM"

    def load(self, source: str, *how: Any, **options: Any) -> tuple[Any, Any]:
        """A model that writes text, and its tokenizer."""
        model, tokenizer = load_model(source, "text", LoadOptions(*how, **options))
        if model.config.is_encoder_decoder:
            raise ConfigError(f"{source} has an encoder, which reads prompts on its own: train it with task=seq2seq")
        return model, tokenizer

    def encode(self, model: Any, tokenizer: Any) -> EncodedDataset:
        """The ids with what is learned of them; raises DataError, ConfigError if the model can't pack."""
        if self.settings.chat_template is not None:
            use_template(tokenizer, self.settings.chat_template)
        if self.settings.packing:
            check_packs(model)
        positions = positions_of(model)
        prepared = prepare(self.parts.train, self.settings, tokenizer, positions)
        held_out = [
            example
            for found in prepare(self.parts.held_out, self.settings, tokenizer, positions)
            for example in found.examples
        ]
        examples = mixed(self.parts.train, prepared, self.seed)
        tokens, learned = sum(len(e.input_ids) for e in examples), sum(e.learned for e in examples)
        report: Report = [
            *_sources_report(self.parts.train, prepared, self.settings),
            Remark(
                f"data: {len(examples):,} examples, {tokens:,} tokens of which {learned / tokens:.0%} are learned; "
                f"the longest has {max(len(e.input_ids) for e in examples):,}"
                + held_out_note(len(held_out), "examples ")
            ),
            sample_of(examples[0], tokenizer),
        ]
        facts = {
            "source": sources_of(self.parts.train),
            "examples": len(examples),
            "held out": len(held_out),
            "tokens": f"{tokens:,}",
            "learned": f"{learned / tokens:.0%}",
            "maximum length": self.settings.max_length,
        }
        if not self.settings.packing:
            return EncodedDataset(examples, held_out, facts, report)
        rows = pack(examples, room := self.settings.max_length)
        full = tokens / (len(rows) * room)
        report.append(Remark(f"packed into {len(rows):,} rows of at most {room:,} tokens, {full:.0%} full"))
        objective = Objective(PackRows.of(model, pad_id_of(tokenizer)))
        return EncodedDataset(rows, held_out, facts | {"packed rows": len(rows)}, report, objective)


def _sources_report(parts: Sequence[Part], prepared: Sequence[Prepared], settings: DataSettings) -> list[Remark]:
    """What each source holds, how many of it an epoch takes, and what became of long examples."""
    report, limit = [], settings.max_length
    shares = exact_shares(parts, [len(encoded.examples) for encoded in prepared])
    for part, encoded, share in zip(parts, prepared, shares, strict=True):
        weighted = ""
        if part.weight is not None:
            weighted = f"; of its {len(encoded.examples):,} examples an epoch takes {share:,} (weight {part.weight:g})"
        report.append(Remark(f"{part.name}: format {part.format}, {len(part.rows):,} rows{weighted}"))
        if encoded.apart:
            why = (
                ": the chat template rewrites earlier turns, so each answer is learned in an example that ends with it"
            )
            report.append(Remark(why, f"{encoded.apart:,} examples more than rows"))
        if encoded.dropped:
            report.append(Remark(f": no answer within {limit:,} tokens", f"{encoded.dropped:,} examples dropped"))
        if encoded.truncated:
            verb = "split" if settings.too_long == "split" else "cut"
            report.append(Remark(f" at {limit:,} tokens", f"{encoded.truncated:,} examples {verb}"))
    return report
