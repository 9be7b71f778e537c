"""A spoken order turned into JSON: the demo's task, hard for a small base model and easy for a person to judge."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from slimtune.errors import DataError

INSTRUCTION = "Turn the spoken order into JSON with the keys name, item, size and quantity."

# fmt: off
NAMES = (
    "Aaron", "Abigail", "Ahmed", "Aisha", "Alma", "Amina", "Anton", "Astrid", "Bella", "Boris",
    "Carla", "Carlos", "Chen", "Clara", "Daniel", "Daria", "Diego", "Elena", "Elif", "Emma",
    "Erik", "Fatima", "Felix", "Fiona", "Gabriel", "Grace", "Hana", "Hector", "Hugo", "Ibrahim",
    "Ines", "Ingrid", "Ivan", "Jamal", "Jana", "Jonas", "Julia", "Kavya", "Kenji", "Lars",
    "Leila", "Liam", "Linh", "Lucia", "Magnus", "Maria", "Mateo", "Mei", "Mina", "Nadia",
    "Nikhil", "Noah", "Olga", "Omar", "Oscar", "Paula", "Pedro", "Priya", "Quentin", "Rania",
    "Ravi", "Rosa", "Samir", "Selma", "Sofia", "Stefan", "Tara", "Theo", "Uma", "Victor",
    "Wanda", "Xavier", "Yara", "Yusuf", "Zoe",
)
# fmt: on

# Spoken plurals that are not the singular with an s.
PLURALS = {"bowl of soup": "bowls of soup", "glass of water": "glasses of water", "sandwich": "sandwiches"}
ITEMS = (
    "latte",
    "cappuccino",
    "espresso",
    "flat white",
    "mocha",
    "green tea",
    "iced tea",
    "hot chocolate",
    "lemonade",
    "orange juice",
    "apple juice",
    "milkshake",
    "smoothie",
    "glass of water",
    "pizza",
    "burger",
    "salad",
    "burrito",
    "sandwich",
    "bowl of soup",
    "bagel",
    "croissant",
    "muffin",
    "cookie",
    "brownie",
    "pretzel",
    "waffle",
    "pancake",
)
SIZES = {
    "small": ("small", "little", "tiny"),
    "medium": ("medium", "regular", "normal-sized"),
    "large": ("large", "big", "huge"),
}
QUANTITIES = {
    1: ("one", "a single", "just one"),
    2: ("two", "a couple of", "a pair of"),
    3: ("three", "3"),
    4: ("four", "4"),
    5: ("five", "5"),
    6: ("six", "half a dozen"),
    7: ("seven", "7"),
    8: ("eight", "8"),
    12: ("twelve", "a dozen"),
}
# {order} is quantity, size and item in a row; the others say them one by one, some correct themselves.
PHRASINGS = (
    "hi, can i get {order} for {name}",
    "{order} please, the name is {name}",
    "hello there, {name} here, i'd like {order}",
    "could you put {order} on the list for {name}",
    "um, i think i'll take {order}, name's {name}",
    "this is {name}, i want to order {order}",
    "{name} would like {order}, thanks",
    "good morning, {order} to go, it's for {name}",
    "we need {count} {items} for {name}, {size} ones please",
    "{count} {items}, and make them {size}, under {name}",
    "for {name}: {count} {items}. what size? oh, {size}",
    "my friend {name} wants {count} {items}, {size} if you have them",
    "{other_count}, no wait, {order} for {name}",
    "let me have {count} {other_size}, sorry, {size} {items}, i'm {name}",
    "can {name} get {order}? not for {other_name}, that's a different order",
    "{count} {items} for {name}, not {other_size} but {size}",
)


@dataclass(frozen=True)
class Order:
    """What was ordered, by whom."""

    name: str
    item: str
    size: str
    quantity: int

    def to_json(self) -> str:
        """The one way in which an order is written."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Example:
    """A spoken sentence and the order it means."""

    sentence: str
    order: Order

    def question(self) -> list[dict[str, str]]:
        """The conversation up to the answer."""
        return [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": self.sentence}]

    def messages(self) -> list[dict[str, str]]:
        """The conversation with the answer."""
        return [*self.question(), {"role": "assistant", "content": self.order.to_json()}]

    def is_answered_by(self, answer: str) -> bool:
        """Whether `answer` is exactly this order as JSON, and nothing besides."""
        try:
            parsed = json.loads(answer)
        except ValueError:
            return False
        # The type as well: in Python, true equals 1.
        return parsed == asdict(self.order) and type(parsed["quantity"]) is int


def make_orders(train: int = 640, held_out: int = 100, seed: int = 0) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples, the same for the same seed; no sentence occurs twice."""
    rng = random.Random(seed)
    examples: dict[str, Example] = {}
    while len(examples) < train + held_out:
        example = _speak(rng)
        # By the sentence: two orders that sound the same would make one of them impossible to learn.
        examples.setdefault(example.sentence, example)
    # A set of sentences of their own: what is held out never occurs in training.
    everything = list(examples.values())
    return everything[:train], everything[train:]


def few_shot(question: Example, shots: Iterable[Example]) -> list[dict[str, str]]:
    """The question behind answered examples, as prompting without training does it."""
    turns = [turn for shot in shots for turn in shot.messages()[1:]]
    system, user = question.question()
    return [system, *turns, user]


def write_jsonl(path: Path, examples: Iterable[Example]) -> None:
    """Write examples as chat messages, one a line; raises DataError if the file can't be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"messages": e.messages()}) + "\n" for e in examples), encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path} can't be written: {error.strerror}; choose another folder") from error


def _speak(rng: random.Random) -> Example:
    quantity, other_quantity = rng.sample(sorted(QUANTITIES), 2)
    size, other_size = rng.sample(sorted(SIZES), 2)
    name, other_name = rng.sample(NAMES, 2)
    item = rng.choice(ITEMS)
    items = item if quantity == 1 else PLURALS.get(item, f"{item}s")
    count, spoken_size = rng.choice(QUANTITIES[quantity]), rng.choice(SIZES[size])
    sentence = rng.choice(PHRASINGS).format(
        order=f"{count} {spoken_size} {items}",
        count=count,
        items=items,
        size=spoken_size,
        name=name.lower(),
        other_count=rng.choice(QUANTITIES[other_quantity]),
        other_size=rng.choice(SIZES[other_size]),
        other_name=other_name.lower(),
    )
    return Example(sentence, Order(name, item, size, quantity))
