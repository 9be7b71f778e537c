"""Blind votes between two models: answers in random order without names, and what came of them.

FOLDER/.studio/votes/CONTEST/contest.json   the two, and their base
FOLDER/.studio/votes/CONTEST/votes.jsonl    a line a vote, with the prompt and both answers
FOLDER/.studio/votes/CONTEST/open/ID.json   two answers that nobody has judged yet; who is left is known here alone
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from slimtune.errors import ConfigError
from slimtune.metrics.intervals import interval_of_mean
from slimtune.storage.atomic import write_file
from slimtune.storage.text_files import read_json
from slimtune.studio.jobs import OWN_FOLDER

Choice = Literal["left", "right", "tie"]
_CONTEST, _VOTES, _OPEN = "contest.json", "votes.jsonl", "open"
_voting = threading.Lock()


@dataclass(frozen=True)
class Contest:
    """Two models of one base; "" is the base itself.

    Attributes:
        written: when their weights were, since an adapter that is trained again is another one.
    """

    base: str
    first: str
    second: str
    written: tuple[float, float] = (0.0, 0.0)

    @classmethod
    def between(cls, runs: Path, base: str, one: str, other: str) -> Contest:
        """The contest of two models, whichever is named first. Raises: ConfigError, for one against itself."""
        if one == other:
            raise ConfigError("a vote is between two; choose another model on one of the sides")
        first, second = sorted((one, other))
        return cls(base, first, second, (_written(runs, first), _written(runs, second)))

    @property
    def id(self) -> str:
        """The name of its folder."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Ballot:
    """Two answers to judge."""

    id: str
    prompt: str
    left: str
    right: str


@dataclass(frozen=True)
class Tally:
    """What came of a contest.

    Attributes:
        rate: how often the first one won, a tie being half a win; None without votes.
        interval: of that, 95%.
    """

    contest: Contest
    wins: int
    losses: int
    ties: int
    rate: float | None
    interval: tuple[float, float] | None

    @property
    def count(self) -> int:
        """The votes."""
        return self.wins + self.losses + self.ties

    @property
    def is_shown(self) -> bool:
        """Whether the interval leaves out that both are as good."""
        return self.interval is not None and not self.interval[0] <= 0.5 <= self.interval[1]


class Votes:
    """The votes of a folder of runs."""

    def __init__(self, runs: Path) -> None:
        self.folder = runs / OWN_FOLDER / "votes"

    def deal(self, contest: Contest, prompt: str, answers: tuple[str, str]) -> Ballot:
        """Lay out both answers, those of the first and the second model, in random order."""
        folder = self.folder / contest.id
        (folder / _OPEN).mkdir(parents=True, exist_ok=True)
        if not (folder / _CONTEST).is_file():
            write_file(folder / _CONTEST, json.dumps(asdict(contest), ensure_ascii=False))
        # Not a number that counts up: it must say nothing of the order.
        ballot_id, is_first_left = secrets.token_hex(8), bool(secrets.randbits(1))
        values = {"prompt": prompt, "answers": answers, "left": "first" if is_first_left else "second"}
        write_file(folder / _OPEN / f"{ballot_id}.json", json.dumps(values, ensure_ascii=False))
        left, right = answers if is_first_left else answers[::-1]
        return Ballot(ballot_id, prompt, left, right)

    def vote(self, contest: Contest, ballot_id: str, choice: Choice) -> None:
        """Keep a vote. Raises: ConfigError, for a ballot that isn't there or was judged already."""
        folder = self.folder / contest.id
        path = folder / _OPEN / f"{ballot_id}.json"
        with _voting:
            try:
                if not re.fullmatch(r"[0-9a-f]{16}", ballot_id):
                    raise ValueError
                values = read_json(path)
            except (OSError, ValueError):
                raise ConfigError("these answers were judged already; ask for the next ones") from None
            winner = None
            if choice != "tie":
                winner = values["left"] if choice == "left" else ({"first", "second"} - {values["left"]}).pop()
            line = {"id": ballot_id, "time": round(time.time(), 3), **values, "choice": choice, "winner": winner}
            with (folder / _VOTES).open("a", encoding="utf-8") as file:
                # Behind a line that a power cut left unfinished.
                start = "" if _ends_whole(folder / _VOTES) else "\n"
                file.write(start + json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
            # Behind the vote: killed in between, it is asked again and counts once.
            path.unlink()

    def prompts(self, contest: Contest) -> set[str]:
        """What was judged already."""
        return {str(vote.get("prompt")) for vote in self._lines(contest.id)}

    def tally(self, contest: Contest) -> Tally:
        """What came of a contest."""
        winners = [vote.get("winner") for vote in self._lines(contest.id)]
        wins, losses, ties = (winners.count(each) for each in ("first", "second", None))
        if not winners:
            return Tally(contest, 0, 0, 0, None, None)
        scores = [1.0] * wins + [0.0] * losses + [0.5] * ties
        return Tally(contest, wins, losses, ties, sum(scores) / len(scores), interval_of_mean(scores))

    def tallies(self) -> list[Tally]:
        """Those of all contests with a vote, the last judged first."""
        paths = sorted(self.folder.glob(f"*/{_VOTES}"), key=lambda path: path.stat().st_mtime, reverse=True)
        return [self.tally(contest) for path in paths if (contest := _read_contest(path.parent)) is not None]

    def _lines(self, contest_id: str) -> Iterator[dict[str, Any]]:
        path, seen = self.folder / contest_id / _VOTES, set()
        if not path.is_file():
            return
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                vote = json.loads(line)
            except ValueError:
                # Cut short by a power cut; the others are whole.
                continue
            if isinstance(vote, dict) and vote.get("id") not in seen:
                seen.add(vote.get("id"))
                yield vote


def _read_contest(folder: Path) -> Contest | None:
    try:
        values = read_json(folder / _CONTEST)
        written = tuple(float(each) for each in values["written"])
        return Contest(str(values["base"]), str(values["first"]), str(values["second"]), (written[0], written[1]))
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def _ends_whole(path: Path) -> bool:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        return file.read() in (b"", b"\n")


def _written(runs: Path, name: str) -> float:
    if not name:
        return 0.0
    return max((path.stat().st_mtime for path in (runs / name).glob("adapter_model*")), default=0.0)
