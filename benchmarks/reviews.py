"""Rated movie-review snippets as a classification task, read from the source distribution of vaderSentiment 3.3.2.

Hutto & Gilbert 2014, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text": sentences of
film reviews (Pang & Lee 2004), each rated by twenty people from -4 to 4. To have the rows that `slimtune train` reads:

    pip download --no-binary :all: --no-deps vaderSentiment==3.3.2 -d ARCHIVE
    python -m benchmarks.reviews ARCHIVE ROWS
"""

from __future__ import annotations

import hashlib
import html
import json
import os
import subprocess
import sys
import tarfile
from dataclasses import asdict, dataclass
from pathlib import Path

ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
RATINGS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
CLEAR = 1.0
"""Ratings between -1 and 1 are left out: people don't agree on what they are."""


@dataclass(frozen=True)
class Review:
    """A sentence and whether people find it positive or negative."""

    text: str
    label: str


def read_reviews(folder: str | Path, held_out_share: float = 0.2) -> tuple[list[Review], list[Review]]:
    """The reviews to learn from and those held out, in an order and a split that are the same everywhere.

    Raises:
        FileNotFoundError: the archive is not in the folder.
    """
    lines = table_of(folder, RATINGS)
    found: dict[str, Review] = {}
    for _, rating, text in lines:
        if abs(float(rating)) >= CLEAR:
            review = Review(html.unescape(text).strip(), "positive" if float(rating) > 0 else "negative")
            found.setdefault(_place(review.text), review)
    # By a hash of the text: no generator of random numbers to agree on, and no text on both sides.
    ordered = [found[place] for place in sorted(found)]
    count = round(len(ordered) * held_out_share)
    return ordered[count:], ordered[:count]


def table_of(folder: str | Path, name: str) -> list[list[str]]:
    """The rows of a file of ratings: place, rating, text; raises FileNotFoundError where the archive is missing."""
    with tarfile.open(Path(folder) / ARCHIVE) as outer:
        inner = outer.extractfile(INNER)
        with tarfile.open(fileobj=inner) as archive:
            file = archive.extractfile(name)
            assert file is not None
            return [line.split("\t") for line in file.read().decode("utf-8").splitlines()]


def write_rows(path: Path, reviews: list[Review]) -> None:
    """The rows that `slimtune train` reads."""
    path.write_text("".join(json.dumps(asdict(review)) + "\n" for review in reviews), encoding="utf-8")


def cached_reviews() -> tuple[list[Review], list[Review]]:
    """The reviews as `read_reviews` gives them."""
    return read_reviews(cached_archive())


def cached_archive() -> Path:
    """The folder of the archive, which is fetched once into the user's cache."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slimtune" / "benchmarks"
    if not (folder / ARCHIVE).is_file():
        fetch = ("download", "--quiet", "--no-binary", ":all:", "--no-deps", "vaderSentiment==3.3.2", "-d", str(folder))
        subprocess.run([sys.executable, "-m", "pip", *fetch], check=True)
    return folder


def _place(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    target.mkdir(parents=True, exist_ok=True)
    for name, reviews in zip(("train", "held_out"), read_reviews(source), strict=True):
        write_rows(target / f"{name}.jsonl", reviews)
        print(f"{name}: {len(reviews)} reviews, {sum(r.label == 'positive' for r in reviews)} of them positive")
