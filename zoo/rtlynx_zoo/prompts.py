"""The prompts of the zoo: every caption with its category, and three disjoint lists in a fixed order.

The emoji models have been trained on all of them. What the lists keep apart is calibration (a sparse model is
fitted on some captions) and what is measured and shown (others).
"""

import json
from functools import cache
from pathlib import Path

ASSETS = Path(__file__).parent / "assets" / "flux-emoji"

# Chosen by eye: told apart at a glance, varied in colour and form; the first eight are the show window.
DEMO_PROMPTS = (
    "red heart", "hot dog", "rocket", "fox", "sunflower", "octopus", "birthday cake",
    "smiling face with sunglasses",
    "watermelon", "penguin", "rainbow", "guitar", "flag of Canada", "cactus", "tropical fish", "pizza",
    "soccer ball", "owl", "hamburger", "snowman", "bicycle", "ghost", "crown", "strawberry",
    "butterfly", "alarm clock", "robot", "avocado", "sailboat", "lion", "mushroom", "trophy",
    "panda", "doughnut", "volcano", "key", "unicorn", "vertical traffic light", "cherries", "umbrella",
    "astronaut", "jack-o-lantern", "honeybee", "telephone", "grapes", "frog", "fire engine", "tulip",
    "turtle", "crescent moon", "ice cream", "police car", "pineapple", "anchor", "whale", "books",
    "carrot", "light bulb", "pig face", "airplane", "tomato", "thumbs up", "flag of Japan", "skull",
)  # fmt: skip

# Fashion-MNIST's classes by label: all that flux-fashion draws.
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


@cache
def _table() -> dict:
    return json.loads((ASSETS / "prompts.json").read_text(encoding="utf-8"))


def _first(name: str, n: int | None) -> list[str]:
    prompts = _table()[name]
    if n is None:
        return list(prompts)
    if not 0 < n <= len(prompts):
        raise ValueError(f"there are {len(prompts)} {name} prompts; asked for {n}")
    return prompts[:n]


def demo_prompts(n: int | None = None) -> list[str]:
    """The first `n` (all 64 if None) of the prompts that are measured and shown.

    Raises ValueError if n is not in 1..64.
    """
    return _first("demo", n)


def calibration_prompts(n: int | None = None) -> list[str]:
    """The first `n` (all 1,024 if None) prompts to calibrate on; none is a demo or evaluation prompt.

    Raises ValueError if n is not in 1..1024.
    """
    return _first("calibration", n)


def evaluation_prompts(n: int | None = None) -> list[str]:
    """The first `n` (all if None) prompts held out from calibration and demo, for choices and for KID.

    Raises ValueError if n is out of range.
    """
    return _first("evaluation", n)


def fashion_prompts(n: int) -> list[str]:
    """`n` prompts for flux-fashion: its classes in turn."""
    return [FASHION_CLASSES[i % len(FASHION_CLASSES)] for i in range(n)]


def all_prompts() -> list[str]:
    """Every caption the model was trained on, in the order of the shipped tables."""
    return [entry["prompt"] for entry in _table()["emoji"]]


def category(prompt: str) -> str:
    """The Unicode group of a known prompt, such as 'Food & Drink'. Raises ValueError for any other prompt."""
    return _entry(prompt)["category"]


def emoji(prompt: str) -> str:
    """The emoji itself, as text, of a known prompt. Raises ValueError for any other prompt."""
    return _entry(prompt)["emoji"]


@cache
def rows() -> dict[str, int]:
    """Lower-case caption, or the emoji itself, -> row of the shipped tables."""
    table = {}
    for row, entry in enumerate(_table()["emoji"]):
        table[entry["prompt"].lower()] = row
        table[entry["emoji"]] = row
    return table


def _entry(prompt: str) -> dict:
    row = rows().get(prompt.lower())
    if row is None:
        raise ValueError(f"unknown emoji name {prompt!r}; rtlynx_zoo.prompts.all_prompts() lists them")
    return _table()["emoji"][row]
