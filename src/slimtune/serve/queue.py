"""Whose turn it is: limits per minute, and a queue in which each tenant gets its fair share."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from slimtune.serve.openai import ApiError, bad_request, unavailable
from slimtune.serve.tenants import Tenant

_PROMPT_SHARE = 0.25
"""What a token of a prompt counts beside one that is generated: many are computed in one product."""

Clock = Callable[[], float]


class Bucket:
    """A limit per minute: it fills evenly, holds a minute's worth, and may be overdrawn by what had begun."""

    def __init__(self, per_minute: float, clock: Clock = time.monotonic) -> None:
        self.per_minute, self.clock = per_minute, clock
        self.level, self.filled = per_minute, clock()

    def seconds_until(self, amount: float) -> float:
        """How long until so much is there; 0 where it is."""
        now = self.clock()
        # A bucket that fills at each look and not by a timer: idle tenants cost nothing.
        self.level = min(self.per_minute, self.level + (now - self.filled) * self.per_minute / 60)
        self.filled = now
        # More than a minute's worth is never there: such a request may start on a full bucket.
        missing = min(amount, self.per_minute) - self.level
        return max(0.0, missing * 60 / self.per_minute)

    def take(self, amount: float) -> None:
        """Draw so much, also below zero."""
        self.level -= amount


@dataclass
class _Share:
    """What the queue knows of one tenant."""

    counter: float = 0.0
    """Tokens that it was served, weighed: the Virtual Token Counter of Sheng et al. 2024."""
    running: int = 0
    waiting: deque[_Turn] = field(default_factory=deque)


@dataclass(eq=False)
class _Turn:
    tenant: Tenant
    weight: int
    number: int
    granted: asyncio.Future[None]


class Turns:
    """What one request holds of the queue: the turn that it began with, and those of its further answers.

    Attributes:
        first: the turn that it began with.
    """

    first: _Turn

    def __init__(self, queue: FairQueue, tenant: Tenant) -> None:
        self._queue, self._tenant = queue, tenant
        self._held: set[_Turn] = set()

    async def take(self, answers: int = 1, timeout: float | None = None) -> _Turn:
        """Wait for one more turn; without a timeout for as long as it takes, as the request was let in already."""
        turn = await self._queue._wait(self._tenant, answers, timeout)
        self._held.add(turn)
        return turn

    def give_back(self, turn: _Turn) -> None:
        """End a turn, once or again."""
        if turn in self._held:
            self._held.remove(turn)
            self._queue._leave(turn)

    def give_back_all(self) -> None:
        """End all that are held."""
        for turn in [*self._held]:
            self.give_back(turn)


class FairQueue:
    """Turns at so many answers at once; who was served the fewest tokens is next.

    A tenant that comes back starts at the lowest counter of those that are there, so nobody saves up turns while away
    (VTC, arXiv:2401.00588). The next turn waits until there is room for it, and nothing overtakes it, so that a request
    of many answers is not put off for ever.
    """

    def __init__(self, slots: int, most_waiting: int, timeout: float) -> None:
        self.slots, self.most_waiting, self.timeout = slots, most_waiting, timeout
        self.running = 0
        self._shares: dict[str, _Share] = {}
        self._numbers = itertools.count()

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return sum(len(share.waiting) for share in self._shares.values())

    def charge(self, tenant: Tenant, prompt_tokens: int = 0, tokens: int = 0) -> None:
        """Count what a tenant was served."""
        self._shares[tenant.name].counter += _PROMPT_SHARE * prompt_tokens + tokens

    @asynccontextmanager
    async def turn(self, tenant: Tenant, answers: int = 1) -> AsyncIterator[Turns]:
        """Wait for a turn at so many answers and have it, with what is taken besides.

        Raises:
            ApiError: 400, for more answers than the tenant may have at once; 429 or 503, for a full queue or a wait
                that is too long.
        """
        if tenant.concurrency is not None and answers > tenant.concurrency:
            raise bad_request(
                f"{answers} answers were asked for, and your limit is {tenant.concurrency} at once; lower n or ask one "
                "prompt at a time",
                "n",
            )
        turns = Turns(self, tenant)
        try:
            # No more than there can ever be: a request for more would wait for ever. Whoever begins them all together
            # has a queue of its own.
            turns.first = await turns.take(min(answers, self.slots), self.timeout)
            yield turns
        finally:
            turns.give_back_all()

    async def _wait(self, tenant: Tenant, answers: int, timeout: float | None) -> _Turn:
        """Wait for a turn, which is refused where others wait only if there is a timeout. Raises: ApiError."""
        share = self._shares.setdefault(tenant.name, _Share())
        if not share.waiting and not share.running:
            present = [other.counter for other in self._shares.values() if other.waiting or other.running]
            # Lifted, never lowered: who was served a lot and left for a second doesn't come back as a newcomer.
            share.counter = max(share.counter, min(present, default=share.counter))
        turn = _Turn(tenant, answers, next(self._numbers), asyncio.get_running_loop().create_future())
        share.waiting.append(turn)
        self._grant()
        if timeout is not None and not turn.granted.done():
            self._refuse_beyond(share, turn)
        try:
            async with asyncio.timeout(timeout):
                await turn.granted
        except TimeoutError:
            self._leave(turn)
            raise unavailable(
                f"no turn came within {timeout:g} s; try again later", retry_after=timeout or 1.0
            ) from None
        except BaseException:
            self._leave(turn)
            raise
        return turn

    def _refuse_beyond(self, share: _Share, turn: _Turn) -> None:
        """Raises: ApiError, where too many wait already."""
        own = turn.tenant.queue
        if own is not None and len(share.waiting) > own:
            share.waiting.remove(turn)
            raise ApiError(
                429, f"{own} requests of yours wait already, which is your limit", "queue_full",
                kind="rate_limit_error", retry_after=1.0,
            )  # fmt: skip
        if self.waiting > self.most_waiting:
            share.waiting.remove(turn)
            raise unavailable(f"{self.most_waiting} requests wait already; try again later")

    def _leave(self, turn: _Turn) -> None:
        share = self._shares[turn.tenant.name]
        if turn in share.waiting:
            share.waiting.remove(turn)
        elif turn.granted.done():
            # Granted, also where it was cancelled in the moment between the grant and its first step.
            share.running -= turn.weight
            self.running -= turn.weight
        self._grant()

    def _grant(self) -> None:
        while True:
            ready = [share for share in self._shares.values() if share.waiting and self._is_allowed(share)]
            if not ready:
                return
            # Ties by arrival: with equal counters the queue is first come, first served.
            share = min(ready, key=lambda share: (share.counter, share.waiting[0].number))
            turn = share.waiting[0]
            # Returned and not passed over: smaller requests behind it would starve it.
            if self.running + turn.weight > self.slots:
                return
            share.waiting.popleft()
            share.running += turn.weight
            self.running += turn.weight
            # A turn costs something at once, or a tenant would have all of them before its first token is counted.
            share.counter += turn.weight
            if not turn.granted.done():
                turn.granted.set_result(None)

    @staticmethod
    def _is_allowed(share: _Share) -> bool:
        most = share.waiting[0].tenant.concurrency
        return most is None or share.running + share.waiting[0].weight <= most


class Limits:
    """The rates of all tenants."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self.clock = clock
        self._buckets: dict[tuple[str, str], tuple[float, Bucket]] = {}

    def admit(self, tenant: Tenant) -> None:
        """Let a request in. Raises: ApiError 429, with how long to wait."""
        requests, tokens = self._bucket(tenant, "requests"), self._bucket(tenant, "tokens")
        for what, bucket in (("requests", requests), ("tokens", tokens)):
            seconds = bucket.seconds_until(1) if bucket else 0.0
            if bucket and seconds > 0:
                raise ApiError(
                    429, f"your limit of {bucket.per_minute:g} {what} a minute is reached; wait {math.ceil(seconds)} s",
                    "rate_limit_exceeded", kind="rate_limit_error", retry_after=seconds,
                )  # fmt: skip
        if requests:
            requests.take(1)

    def spend(self, tenant: Tenant, tokens: int) -> None:
        """Count tokens that a tenant was served."""
        bucket = self._bucket(tenant, "tokens")
        if bucket:
            # To fill it up to now, before it is drawn from.
            bucket.seconds_until(0)
            bucket.take(tokens)

    def _bucket(self, tenant: Tenant, what: str) -> Bucket | None:
        rate = getattr(tenant, f"{what}_per_minute")
        if rate is None:
            return None
        known = self._buckets.get((tenant.name, what))
        # A limit that was changed in the file starts anew.
        if known is None or known[0] != rate:
            known = self._buckets[tenant.name, what] = (rate, Bucket(rate, self.clock))
        return known[1]
