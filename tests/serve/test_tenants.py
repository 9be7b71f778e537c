"""Keys, limits and fair shares."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import pytest

from slimtune.errors import ConfigError
from slimtune.serve.openai import ApiError
from slimtune.serve.queue import Bucket, FairQueue, Limits
from slimtune.serve.tenants import ANYBODY, BASE, Keyring, Tenant, add_key, read_tenants


def test_a_key_is_kept_by_its_hash_alone(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    key = add_key(file, "acme", {"adapters": ("acme-*",), "requests_per_minute": 5.0})
    assert key not in file.read_text()
    assert hashlib.sha256(key.encode()).hexdigest() in file.read_text()
    tenant = Keyring(file).tenant_of(f"Bearer {key}")
    assert (tenant.name, tenant.requests_per_minute, tenant.admin) == ("acme", 5.0, False)


def test_a_second_key_leaves_the_first_and_changes_what_is_given(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    first = add_key(file, "acme", {"adapters": ("a",), "queue": 3})
    other = add_key(file, "other", {})
    second = add_key(file, "acme", {"adapters": ("b",)})
    keyring = Keyring(file)
    assert keyring.tenant_of(f"Bearer {first}") == keyring.tenant_of(f"bearer {second}")
    assert keyring.tenant_of(f"Bearer {first}").adapters == ("b",)
    assert keyring.tenant_of(f"Bearer {first}").queue == 3
    assert keyring.tenant_of(f"Bearer {other}").name == "other"


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Bearer sk-wrong", "Basic abc", "Bearer \udcff"])
def test_who_has_no_key_is_refused(tmp_path: Path, header: str | None) -> None:
    file = tmp_path / "keys.yaml"
    add_key(file, "acme", {})
    with pytest.raises(ApiError) as refused:
        Keyring(file).tenant_of(header)
    assert refused.value.status == 401


def test_names_are_matched_whole() -> None:
    tenant = Tenant(name="acme", adapters=("acme-*", "shared"), base=False)
    assert [tenant.may_use(name) for name in ("acme-1", "acme-", "shared")] == [True] * 3
    assert [tenant.may_use(name) for name in ("acme", "xacme-1", "shared2", "Shared", BASE)] == [False] * 5
    assert ANYBODY.may_use("anything")
    assert Tenant(name="root", admin=True, base=False).may_use("acme-1")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        ("tenants: [a]", "tenants"),
        ("tenants: {a: {}}\nkeys: 3", "tenants"),
        ("tenants: {a: {adapter: [x]}}", "unknown field 'adapter'"),
        ("tenants: {a: {keys: [sk-plain]}}", "keys.0"),
        ("tenants: {a: {queue: -1}}", "queue"),
        ("tenants: {a: 3}", "mapping"),
        ("tenants: {a: {}, a: {}}", "twice"),
    ],
)
def test_a_mistake_in_the_file_is_named_and_the_keys_from_before_stay(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "keys.yaml"
    key = add_key(file, "acme", {})
    keyring = Keyring(file)
    file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        keyring.reload()
    assert keyring.tenant_of(f"Bearer {key}").name == "acme"


def test_one_key_belongs_to_one_tenant(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    add_key(file, "a", {})
    digest = read_tenants(file)["a"].keys[0]
    file.write_text(f"tenants: {{a: {{keys: ['{digest}']}}, b: {{keys: ['{digest}']}}}}")
    with pytest.raises(ConfigError, match="belongs to 'a' and to 'b'"):
        read_tenants(file)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_bucket_fills_evenly_and_may_be_overdrawn() -> None:
    clock = Clock()
    bucket = Bucket(60, clock)
    bucket.take(90)
    assert bucket.seconds_until(1) == 31
    clock.now = 31
    assert bucket.seconds_until(1) == 0
    clock.now = 10_000
    assert bucket.seconds_until(60) == 0
    bucket.take(60)
    assert bucket.seconds_until(1) == 1, "no more than a minute's worth was saved up"


def test_limits_are_told_with_how_long_to_wait() -> None:
    clock = Clock()
    limits, tenant = Limits(clock), Tenant(name="a", requests_per_minute=2, tokens_per_minute=600)
    limits.admit(tenant)
    limits.admit(tenant)
    with pytest.raises(ApiError) as refused:
        limits.admit(tenant)
    assert (refused.value.status, refused.value.code) == (429, "rate_limit_exceeded")
    assert refused.value.retry_after == 30
    clock.now = 30
    limits.spend(tenant, 700)
    with pytest.raises(ApiError, match="600 tokens a minute"):
        limits.admit(tenant)
    # Another tenant, and a limit that was changed, start with a full bucket.
    limits.admit(Tenant(name="b", requests_per_minute=2))
    limits.admit(Tenant(name="a", requests_per_minute=3))


def served(tenants: list[Tenant], rounds: int, slots: int, tokens: dict[str, int]) -> dict[str, int]:
    """How many turns each tenant got when all of them always want one."""
    turns = dict.fromkeys((tenant.name for tenant in tenants), 0)

    async def ask(queue: FairQueue, tenant: Tenant) -> None:
        async with queue.turn(tenant):
            if sum(turns.values()) < rounds:
                turns[tenant.name] += 1
            await asyncio.sleep(0)
            queue.charge(tenant, tokens=tokens[tenant.name])

    async def run() -> None:
        queue = FairQueue(slots, 10_000, 60)
        await asyncio.gather(*(ask(queue, tenant) for tenant in tenants for _ in range(rounds)))
        assert (queue.running, queue.waiting) == (0, 0)

    asyncio.run(run())
    return turns


def test_tenants_share_tokens_and_not_requests() -> None:
    turns = served([Tenant(name="long"), Tenant(name="short")], 60, 1, {"long": 30, "short": 10})
    assert sum(turns.values()) == 60
    assert 2.5 < turns["short"] / turns["long"] < 3.5


def test_a_flood_of_one_tenant_does_not_hold_up_another() -> None:
    order: list[str] = []

    async def ask(queue: FairQueue, name: str) -> None:
        async with queue.turn(Tenant(name=name)):
            order.append(name)
            await asyncio.sleep(0)
            queue.charge(Tenant(name=name), tokens=10)

    async def run() -> None:
        queue = FairQueue(1, 1000, 60)
        flood = [asyncio.create_task(ask(queue, "flood")) for _ in range(50)]
        await asyncio.sleep(0.01)
        await asyncio.gather(ask(queue, "one"), *flood)

    asyncio.run(run())
    assert len(order) == 51


def test_who_comes_back_has_saved_up_nothing() -> None:
    async def run() -> list[str]:
        queue, order = FairQueue(1, 1000, 60), []
        a, b = Tenant(name="a"), Tenant(name="b")

        async def ask(tenant: Tenant, tokens: int) -> None:
            async with queue.turn(tenant):
                order.append(tenant.name)
                await asyncio.sleep(0)
                queue.charge(tenant, tokens=tokens)

        # a alone is served a lot; then b comes, and both take turns at once.
        for _ in range(20):
            await ask(a, 100)
        order.clear()
        await asyncio.gather(*(ask(tenant, 100) for _ in range(6) for tenant in (a, b)))
        return order

    order = asyncio.run(run())
    assert order.count("a") == order.count("b") == 6
    assert max(order[:6].count("a"), order[:6].count("b")) <= 4


def test_a_big_request_is_not_overtaken_for_ever() -> None:
    async def run() -> int:
        queue, after = FairQueue(4, 1000, 60), 0
        big_has_run = False

        async def small(number: int) -> None:
            nonlocal after
            async with queue.turn(Tenant(name="small")):
                after += not big_has_run
                await asyncio.sleep(0)

        async def big() -> None:
            nonlocal big_has_run
            async with queue.turn(Tenant(name="big"), answers=9):
                big_has_run = True
                assert queue.running == 4, "more answers than slots, begun together, take all of them"

        await asyncio.gather(*(small(i) for i in range(4)), big(), *(small(i) for i in range(200)))
        return after

    assert asyncio.run(run()) < 30


def test_the_answers_of_one_request_share_with_other_tenants() -> None:
    async def run() -> list[str]:
        queue, order = FairQueue(2, 1000, 60), []

        async def many() -> None:
            async with queue.turn(Tenant(name="many")) as turns:
                turn = turns.first
                for _ in range(40):
                    order.append("many")
                    queue.charge(Tenant(name="many"), tokens=10)
                    await asyncio.sleep(0)
                    following = asyncio.create_task(turns.take())
                    await asyncio.sleep(0)
                    turns.give_back(turn)
                    turns.give_back(turn)  # once or again
                    turn = await following

        async def other() -> None:
            for _ in range(10):
                async with queue.turn(Tenant(name="other")):
                    order.append("other")
                    queue.charge(Tenant(name="other"), tokens=10)
                    await asyncio.sleep(0)

        await asyncio.gather(many(), many(), other())
        assert (queue.running, queue.waiting) == (0, 0)
        return order

    order = asyncio.run(run())
    last = len(order) - 1 - order[::-1].index("other")
    # Two of the first tenant's are there at any time, and one of the other's.
    assert order[:last].count("many") <= 22


def test_answers_that_begin_together_keep_to_the_limit_of_their_tenant() -> None:
    async def run() -> None:
        queue = FairQueue(8, 1000, 60)
        with pytest.raises(ApiError, match="your limit is 2 at once") as refused:
            async with queue.turn(Tenant(name="a", concurrency=2), answers=3):
                pass
        assert refused.value.status == 400
        async with queue.turn(Tenant(name="a", concurrency=2), answers=2):
            assert queue.running == 2

    asyncio.run(run())


def test_concurrency_makes_wait_and_a_full_queue_refuses() -> None:
    async def run() -> None:
        queue, tenant = FairQueue(8, 3, 60), Tenant(name="a", concurrency=1, queue=1)
        release = asyncio.Event()

        async def hold(who: Tenant) -> None:
            async with queue.turn(who):
                await release.wait()

        tasks = [asyncio.create_task(hold(tenant)) for _ in range(3)]
        await asyncio.sleep(0.01)
        assert (queue.running, queue.waiting) == (1, 1)
        assert isinstance(tasks[2].exception(), ApiError)
        assert tasks[2].exception().status == 429  # type: ignore[union-attr]
        others = [asyncio.create_task(hold(Tenant(name=f"o{i}"))) for i in range(11)]
        await asyncio.sleep(0.01)
        failed: list[Any] = [task.exception() for task in others if task.done()]
        assert [(error.status, error.retry_after) for error in failed] == [(503, 1.0)] * 2
        release.set()
        await asyncio.gather(*tasks, *others, return_exceptions=True)
        assert (queue.running, queue.waiting) == (0, 0)

    asyncio.run(run())


def test_a_wait_ends_and_who_leaves_gives_the_turn_on() -> None:
    async def run() -> None:
        queue, release = FairQueue(1, 100, 0.05), asyncio.Event()

        async def hold() -> None:
            async with queue.turn(ANYBODY):
                await release.wait()

        holder = asyncio.create_task(hold())
        await asyncio.sleep(0)
        late = asyncio.create_task(hold())
        with pytest.raises(ApiError) as refused:
            await late
        assert refused.value.status == 503
        gone = asyncio.create_task(hold())
        await asyncio.sleep(0.01)
        gone.cancel()
        release.set()
        await asyncio.gather(holder, gone, return_exceptions=True)
        assert (queue.running, queue.waiting) == (0, 0)
        async with queue.turn(ANYBODY):
            assert queue.running == 1

    asyncio.run(run())
