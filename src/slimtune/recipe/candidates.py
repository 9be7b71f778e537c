"""The candidates of a comparison: methods, prompts with examples, and the model as it comes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from slimtune.errors import ConfigError

BASE = "base"
QLORA = "qlora"
QUANTIZED = {QLORA: ("lora", "nf4")}
"""Names that are a method on a quantized base."""
LEARNING_RATE = "learning_rate"
"""A field of a variant that belongs to the training, not to the method's config."""
_FIELD = re.compile(r"[A-Za-z_]\w*=[^:]+")


@dataclass(frozen=True)
class Candidate:
    """One way to get answers: a method that is trained, or `shots` examples in the prompt of the model as it comes."""

    name: str
    method: str | None = None
    fields: tuple[tuple[str, str], ...] = ()
    quantize: str | None = None
    shots: int = 0
    random_labels: bool = False

    @property
    def is_trained(self) -> bool:
        """Whether it is a method; else it only prompts."""
        return self.method is not None

    @property
    def is_seeded(self) -> bool:
        """Whether another seed gives another result: weights and order of a method, examples of a prompt."""
        return self.is_trained or self.shots > 0

    def is_same_prompt(self, other: Candidate) -> bool:
        """Whether both prompt with as many examples, right answers or not."""
        return not self.is_trained and not other.is_trained and self.shots == other.shots

    @property
    def slug(self) -> str:
        """The name as part of a path."""
        # Letters, digits and dots alone, on any file system; two candidates of one slug are refused.
        return re.sub(r"[^a-z0-9.]+", "-", self.name.lower()).strip("-")

    @property
    def summary(self) -> str:
        """A phrase that describes it, for tables."""
        if self.method is None:
            return _prompted(self.shots, self.random_labels)
        settings = ", ".join(f"{name}={value}" for name, value in self.fields)
        on = f" on a base in {self.quantize.upper()}" if self.quantize else ""
        return f"tuned with {self.method}{f' ({settings})' if settings else ''}{on}"


@dataclass(frozen=True)
class Run:
    """A candidate with one seed."""

    candidate: Candidate
    seed: int

    @property
    def slug(self) -> str:
        """The name of its folder and its result."""
        return f"{self.candidate.slug}-seed-{self.seed}"

    def __str__(self) -> str:
        return f"{self.candidate.name}, seed {self.seed}"


def trained(text: str) -> Candidate:
    """The candidate of `NAME` or a variant of it, `NAME:FIELD=VALUE:FIELD=VALUE`; raises ConfigError.

    `qlora` is lora on a base in NF4. Names and fields are checked when the run's recipe is made.
    """
    name, *assignments = [part.strip() for part in text.split(":")]
    wrong = next((part for part in assignments if not _FIELD.fullmatch(part)), None)
    if not name or wrong is not None:
        raise ConfigError(f"'{text}' is no method; pass NAME or NAME:FIELD=VALUE, for example lora:r=64")
    fields = tuple((key, value) for key, _, value in (part.partition("=") for part in assignments))
    twice = {key for key, _ in fields if sum(key == other for other, _ in fields) > 1}
    if twice:
        raise ConfigError(f"'{text}' sets {', '.join(sorted(twice))} twice; set it once")
    method, quantize = QUANTIZED.get(name, (name, None))
    return Candidate(":".join([name, *(f"{key}={value}" for key, value in fields)]), method, fields, quantize)


def prompted(shots: int, random_labels: bool = False) -> Candidate:
    """The model as it comes, with `shots` examples in the prompt; raises ConfigError below 0."""
    if shots < 0:
        raise ConfigError(f"a prompt can't hold {shots} examples; pass 0 or more with --shots")
    name = BASE if shots == 0 else f"{shots}-shot{' random labels' if random_labels else ''}"
    return Candidate(name, shots=shots, random_labels=random_labels)


def candidates_of(methods: Sequence[str], shots: Sequence[int], random_labels: bool) -> list[Candidate]:
    """Prompting first (it is quick and tells most), then the methods; raises ConfigError for none, or one given twice.

    Random labels are a control of the longest prompt: do its examples teach, or only show the format?
    """
    candidates = [prompted(count) for count in shots]
    if random_labels and max(shots, default=0) > 0:
        candidates.append(prompted(max(shots), random_labels=True))
    candidates += [trained(method) for method in methods]
    # By slug, since that is the name of the folder: values that differ in "_" and "-" alone share one.
    slugs = [candidate.slug for candidate in candidates]
    twice = next((candidate.name for candidate in candidates if slugs.count(candidate.slug) > 1), None)
    if twice:
        raise ConfigError(f"'{twice}' is asked for twice; name each method and each number of shots once")
    if not candidates:
        raise ConfigError("nothing to compare; pass --methods, --shots or both")
    return candidates


def runs_of(candidates: Sequence[Candidate], seeds: int) -> list[Run]:
    """Seed by seed, so that a comparison that is cut off has something of every candidate."""
    return [
        Run(candidate, seed) for seed in range(seeds) for candidate in candidates if seed == 0 or candidate.is_seeded
    ]


def _prompted(shots: int, random_labels: bool) -> str:
    if shots == 0:
        return "the model as it comes, without examples"
    examples = "1 example" if shots == 1 else f"{shots} examples"
    return f"the model as it comes, {examples} in the prompt{' with answers dealt at random' if random_labels else ''}"
