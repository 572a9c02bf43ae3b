"""The registry of synthetic tasks: a task makes one question-answer pair from a random generator; a template is one way to ask it.

A fifth of the templates is held out (never trained on), chosen by a hash of their text, so that "follows the template" can be told from
"has seen the template".
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from corpus import fraction
from synth_phrasings import PHRASINGS

Fill = tuple[dict[str, object], str, str]  # (fields of the template, thinking text, answer)


@dataclass(frozen=True)
class Task:
    name: str
    weight: float
    templates: tuple[str, ...]
    make: Callable[[random.Random], Fill]

    def split(self, held: bool) -> tuple[str, ...]:
        """The templates to train on, or the held-out ones; a task with a single template is always trained on."""
        if len(self.templates) < 3:
            return () if held else self.templates
        out = tuple(t for t in self.templates[1:] if fraction(f"template/{self.name}/{t}") < 0.3)
        return out if held else tuple(t for t in self.templates if t not in out)


TASKS: dict[str, Task] = {}


def task(
    *templates: str, weight: float = 1.0
) -> Callable[[Callable[[random.Random], Fill]], Callable[[random.Random], Fill]]:
    def add(make: Callable[[random.Random], Fill]) -> Callable[[random.Random], Fill]:
        TASKS[make.__name__] = Task(make.__name__, weight, templates + PHRASINGS.get(make.__name__, ()), make)
        return make

    return add


@dataclass
class Conversation:
    """What the renderer needs: messages and tools as in an OpenAI request, and the thinking mode."""

    name: str
    messages: list[dict[str, object]]
    thinking_mode: str
    tools: list[dict[str, object]] = field(default_factory=list)
    answer: str = ""
    effort: str | None = None


WORDS = """apple anchor arrow autumn badge banana basket beacon berry bicycle blanket bottle bridge bronze bucket butter button cabin
camera candle canyon carbon carpet castle cedar cherry circle cloud clover copper coral cotton crater crystal dancer desert diamond dolphin
dragon eagle early echo elbow ember engine falcon feather fern field finger flame forest fossil fountain garden ginger glacier globe
granite grape guitar hammer harbor hazel helmet honey horizon island ivory jacket jungle kernel kettle kitten ladder lagoon lantern laptop
lemon letter library lily lizard lotus magnet mango maple marble meadow melon memory mirror monkey mountain needle nickel night north oasis
ocean olive onion orange orchid otter oyster paper parrot pebble pencil pepper piano pilot planet pocket poem pond prairie puzzle quartz
queen rabbit radio raven ribbon river robot rocket saddle salmon sand scarf shadow silver spider spring square stone storm sugar summer
sunset table temple thread thunder tiger tomato tower tree tulip tunnel turtle umbrella valley velvet violin walnut water whale window
winter wizard yellow zebra zipper""".split()
NAMES = "Ada Alan Anna Ben Carla Chen Dora Emma Felix Grace Hugo Ines Ivan Jan Kai Lara Leo Lin Maria Max Mia Nora Omar Paul Rosa Sam Tara Uma Vera Zoe".split()
CITIES = "Rome Paris London Berlin Madrid Vienna Oslo Cairo Tokyo Delhi Lima Quito Dublin Athens Prague Lisbon Warsaw Boston Milan Turin".split()


def word(rng: random.Random) -> str:
    """A noun, or now and then a made-up word, so that a string task cannot be answered from memory."""
    if rng.random() < 0.7:
        return rng.choice(WORDS)
    return "".join(rng.choice("bcdfghklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(2, 4)))


def words(rng: random.Random, n: int) -> list[str]:
    out: list[str] = []
    while len(out) < n:
        w = word(rng)
        if w not in out:
            out.append(w)
    return out
