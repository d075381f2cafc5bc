"""A corpus of short reviews made by a seeded grammar: the embedded text data. No download, no real person's words.

Every review has an opening and one or two opinions, each about one thing. Two opinions always disagree, and the label
is that of the one that counts: the last in most frames ("..., but ..."), the first in one ("... even if ..."). A good
opinion is a good word or a negated bad one. So which words occur says nothing about the label of a review of two
opinions; their order does. Three reviews in five are of that kind: who ignores order is right in 70 % at most.
"""

import csv
import io
import random
from pathlib import Path

from utils.errors import UserError
from utils.files import write_text

CONTRAST = 0.6  # share of reviews with two opinions
NEGATED = 0.2  # share of opinions that say it by negation


def _words(text: str) -> list[str]:
    return text.split()


GOOD = _words(
    "good great lovely tasty fresh friendly warm clean quick charming superb excellent generous tender crisp "
    "polite helpful pleasant delightful cosy cheerful spotless memorable honest creamy fragrant attentive "
    "splendid"
)
BAD = _words(
    "bad awful dirty bland stale rude cold slow noisy greasy terrible horrible tiny tough soggy careless "
    "unhelpful unpleasant dreadful cramped gloomy sticky forgettable overpriced watery burnt inattentive mediocre"
)
THINGS = _words(
    "soup bread pasta salad steak curry dessert coffee wine breakfast sauce fish rice pizza cake menu waiter "
    "waitress kitchen terrace bathroom garden music service room bed lobby view staff chef manager porter pool "
    "shower window"
)
PLACES = _words(
    "restaurant hotel cafe bistro bakery diner tavern hostel inn pub canteen brasserie guesthouse resort steakhouse"
)
TOWNS = _words(
    "london paris rome lisbon vienna prague dublin oslo athens madrid berlin cairo boston kyoto quebec havana "
    "lima porto"
)
PEOPLE = _words(
    "sister brother mother father cousin friend boss neighbour aunt uncle teacher husband wife colleague grandmother"
)
DAYS = _words("monday tuesday wednesday thursday friday saturday sunday")
TIMES = _words("morning evening afternoon night weekend holiday birthday anniversary")
WEATHER = _words("rainy sunny windy snowy foggy stormy freezing humid")
DEGREES = _words("really very quite rather truly simply so absolutely surprisingly")
OPENINGS = (
    "we went to this {place} in {town} on a {weather} {day} with my {person}",
    "my {person} and i stayed at a {place} near {town} last {day} {time}",
    "i booked the {place} in {town} for my {person} 's {time}",
    "after a {weather} {time} in {town} my {person} chose this {place}",
    "this {place} outside {town} was full on {day} {time}",
    "on {day} my {person} took us to the old {place} of {town}",
    "visited the {place} by the river in {town} one {weather} {time}",
)
FRAMES = (  # with the place of the opinion that counts
    ("{0} , but {1}", 1),
    ("{0} ; in the end {1}", 1),
    ("although {0} , {1}", 1),
    ("{0} , and yet {1}", 1),
    ("they say that {0} , but in truth {1}", 1),
    ("{0} even if {1}", 0),
)


def review(rng: random.Random, good: bool) -> str:
    """Return a review of 13 to 36 words and signs, in lower case; good: its label."""
    words = {"place": PLACES, "town": TOWNS, "weather": WEATHER, "day": DAYS, "person": PEOPLE, "time": TIMES}
    opening = rng.choice(OPENINGS).format(**{key: rng.choice(choices) for key, choices in words.items()})
    first, second = rng.sample(THINGS, 2)
    if rng.random() >= CONTRAST:
        return f"{opening} . {opinion(rng, first, good)} ."
    frame, counts = rng.choice(FRAMES)
    polarities = [good, not good] if counts == 0 else [not good, good]
    return f"{opening} . {frame.format(*map(opinion, (rng, rng), (first, second), polarities))} ."


def opinion(rng: random.Random, thing: str, good: bool) -> str:
    """Return a clause such as 'the soup was really fresh', or 'the soup was not stale'."""
    negated = rng.random() < NEGATED
    adjective = rng.choice(GOOD if good != negated else BAD)
    return f"the {thing} was {'not ' if negated else ''}{rng.choice(DEGREES)} {adjective}"


def write_reviews(folder: Path, train: int = 6000, val: int = 1000, seed: int = 0) -> None:
    """Write train.csv and val.csv with the columns label (good, bad) and text; no review is in both.

    Raises UserError where a file of that name holds something else: that one stays.
    """
    rng, seen = random.Random(seed), set()
    folder.mkdir(parents=True, exist_ok=True)
    for split, number in (("train", train), ("val", val)):
        file, path = io.StringIO(), folder / f"{split}.csv"
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["label", "text"])
        for place in range(number):
            text = review(rng, place % 2 == 0)
            while text in seen:
                text = review(rng, place % 2 == 0)
            seen.add(text)
            writer.writerow(["good" if place % 2 == 0 else "bad", text])
        if path.exists() and path.read_bytes() != file.getvalue().encode():
            raise UserError(f"'{path}' holds something else than is to be written: move it, or choose another --output")
        write_text(path, file.getvalue())
