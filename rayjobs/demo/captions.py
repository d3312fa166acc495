"""Captions and class descriptions of the demo's digits: how each digit looks, in phrases with or without its name.

CLIP's captions and the sentences of the language model's file share these phrases. A caption seldom has the digit's
name, so the sentences tell CLIP more about a class than the name in a template does.
"""

import random

from rayjobs.demo.notes import NAMES

TEMPLATE = "a photo of the digit {}."

PHRASES: dict[str, tuple[str, ...]] = {
    "zero": ("one large closed ring", "an oval with an empty middle", "a big round loop and nothing else"),
    "one": ("a single upright stroke", "one straight vertical pole", "a thin line with a small flag at the top"),
    "two": ("a hook above a flat base", "a swan neck on a straight base", "a curve that ends in a flat line below"),
    "three": ("two bumps open to the left", "two half circles, one on the other", "a double curve open to the left"),
    "four": ("a cross with an open angle", "an angle crossed by an upright line", "a chair upside down"),
    "five": ("a flat top over a round belly", "a short bar, a neck and a belly", "a straight cap above an open bowl"),
    "six": (
        "a closed loop below a long stem",
        "a stem that curls into a loop below",
        "a ring at the bottom, a neck above",
    ),
    "seven": ("a flat top with a slanted leg", "a roof on a leaning line", "a straight bar above a diagonal"),
    "eight": ("two closed loops, one on the other", "a small ring above another ring", "a line that crosses itself"),
    "nine": ("a closed loop above a straight tail", "a ring at the top, a leg below", "a loop that hangs on a stem"),
}


def sample_caption(digit: int, rng: random.Random) -> str:
    """A caption for an image of the digit: a phrase in nine cases of ten, else its name, or both."""
    name = NAMES[digit]
    phrase, kind = rng.choice(PHRASES[name]), rng.random()
    if kind < 0.9:
        return f"{phrase}."
    return TEMPLATE.format(name) if kind < 0.95 else f"the digit {name}: {phrase}."


def descriptions() -> dict[str, list[str]]:
    """The class descriptions, in the format of CaFo's prompts file."""
    return {
        name: [
            TEMPLATE.format(name),
            *(f"{phrase}." for phrase in phrases),
            *(f"the digit {name}: {phrase}." for phrase in phrases),
        ]
        for name, phrases in PHRASES.items()
    }
