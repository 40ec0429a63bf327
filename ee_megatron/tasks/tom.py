"""Theory-of-mind task: short stories in which someone's belief and the truth may differ, and questions about both.

False belief about a place after an unseen transfer (Wimmer and Perner 1983; Baron-Cohen, Leslie and Frith 1985), about
contents (Perner, Leekam and Wimmer 1987), and about another's belief (Perner and Wimmer 1985). Controls ask for a true
belief, for what is so, and for what was so at first, about the same stories, as in ToMi (Le, Boureau and Nickel 2019):
whoever always answers with the first place, or with the last, is right in some families only.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import combinations

from ..config.schema import TaskConfig
from ..types import Prompt
from .answers import verify_solution
from .base import ChatTemplate, Problem, ProceduralTask, Verdict, register, split_of

# fmt: off
NAMES = (
    "Ada", "Amir", "Anna", "Ben", "Bo", "Cara", "Carl", "Dan", "Dora", "Ella", "Emil", "Farah", "Finn", "Gina",
    "Hana", "Hugo", "Ivy", "Jack", "Joan", "Kate", "Kofi", "Lena", "Leo", "Mia", "Milo", "Nina", "Noah", "Olga",
    "Omar", "Paul", "Petra", "Ravi", "Rosa", "Sam", "Tara", "Tom", "Uma", "Vera", "Wei", "Yan",
)
THINGS = (
    "ball", "book", "bottle", "bracelet", "brush", "candle", "card", "coin", "compass", "cup", "doll", "glove", "hat",
    "key", "lamp", "letter", "map", "marble", "medal", "pear", "pen", "plum", "photo", "ring", "scarf", "shell",
    "spoon", "stamp", "torch", "watch",
)
PLACES = (
    "backpack", "bag", "barrel", "basket", "bin", "box", "bucket", "cabinet", "case", "chest", "closet", "crate",
    "cupboard", "drawer", "hamper", "jar", "locker", "pot", "sack", "safe", "suitcase", "trunk", "vase", "wardrobe",
)
ROOMS = (
    "attic", "cellar", "classroom", "garage", "garden shed", "hall", "kitchen", "library", "living room", "office",
    "playroom", "workshop",
)
STOCK = (
    "beads", "buttons", "crayons", "dates", "erasers", "feathers", "grapes", "leaves", "needles", "nuts", "pebbles",
    "pencils", "raisins", "ribbons", "screws", "seeds", "shells", "stickers", "straws", "toffees",
)
PACKS = (
    "bag", "bottle", "box", "can", "carton", "case", "crate", "jar", "packet", "pot", "pouch", "sachet", "tin", "tub",
)
INTRO = (
    "{a} and {b} are in the {room}, where there are a {x}, a {y} and a {z}.",
    "{a} and {b} are together in the {room}. A {x}, a {y} and a {z} stand there.",
    "In the {room} there are a {x}, a {y} and a {z}. {a} and {b} are there too.",
    "{a} meets {b} in the {room}. They see a {x}, a {y} and a {z}.",
)
PUT = (
    "{a} puts the {thing} in the {place}.", "{a} has a {thing} and puts it in the {place}.",
    "{a} places the {thing} in the {place}.", "{a} lays the {thing} into the {place} and closes it.",
)
MOVE = (
    "{b} moves the {thing} from the {old} to the {place}.",
    "{b} takes the {thing} out of the {old} and puts it in the {place}.",
    "{b} finds the {thing} in the {old} and places it in the {place}.",
)
LEAVE = ("{a} leaves the {room}.", "{a} goes out of the {room}.", "{a} walks away.", "{a} goes out for a while.")
RETURN = ("{a} comes back.", "{a} returns to the {room}.", "{a} comes in again.")
WATCHES = ("{a} watches.", "{a} sees this.", "{a} stands next to it and looks on.")
STAYS = ("{a} stays in the {room}.", "{a} does not leave the {room}.", "{a} remains there all the time.")
UNNOTICED = (
    "{a} watches this through the window, but {b} does not notice.",
    "Through a gap in the door {a} sees it, and {b} does not know that.",
    "{a} secretly looks in and sees everything; {b} does not notice {a}.",
)
NOTICED = (
    "{a} watches this through the window, and {b} sees {a} watching.",
    "Through a gap in the door {a} sees it, and {b} notices {a}.",
    "{a} looks in and sees everything, and {b} waves at {a}.",
)
ASIDE = (
    "{b} hums a song.", "{b} drinks some water.", "It is raining.", "A clock strikes four.", "{a} is in a good mood.",
    "A dog barks outside.", "{b} is a little tired.", "The sun is shining.",
)
BELIEF = (
    "Where will {who} look for the {thing} first?", "Where does {who} think the {thing} is?",
    "Where does {who} expect to find the {thing}?", "{who} wants the {thing}. Where will {who} search for it first?",
    "If {who} is asked where the {thing} is, which place will {who} name?",
)
NESTED = (
    "Where does {who} think that {other} will look for the {thing}?",
    "Where does {who} think that {other} believes the {thing} is?",
    "In which place, as {who} sees it, will {other} search for the {thing}?",
    "{who} is asked where {other} expects the {thing} to be. What does {who} say?",
)
REALITY = (
    "Where is the {thing} really?", "Where is the {thing} now?", "In which place is the {thing} at the end?",
    "Where would one have to look to find the {thing}?",
)
MEMORY = (
    "Where was the {thing} at the beginning?", "Where was the {thing} first?",
    "In which place was the {thing} put first?", "Before anyone moved it, where was the {thing}?",
)
LABEL = (
    "On the table in the {room} is a closed {pack}. The picture on it shows {label}.",
    "{b} finds a closed {pack} in the {room}. Its label says {label}.",
    "In the {room} stands a closed {pack} on which is written: {label}.",
)
INSIDE = (
    "{b} opens the {pack}, finds {stock} in it instead, and closes it again.",
    "{b} looks into the {pack}: there are no {label} in it, only {stock}. Then {b} closes it.",
    "{b} takes the {label} out of the {pack}, fills it with {stock} and closes it.",
)
NEWCOMER = (
    "Then {a} comes in, who has never looked into the {pack}.",
    "Later {a} comes in and sees the closed {pack} for the first time.",
    "Now {a} comes along and sees only the outside of the {pack}.",
)
WITNESS = (
    "{a} stands beside {b} and sees what is in the {pack}.",
    "Then {a} comes in, opens the {pack} too and looks inside.", "{b} shows {a} what is in the {pack}.",
)
CONTENTS_BELIEF = (
    "What does {who} think is in the {pack}?", "What does {who} expect to find in the {pack}?",
    "{who} is asked what the {pack} holds. What will {who} say?",
)
CONTENTS_NESTED = (
    "What does {who} think that {other} expects in the {pack}?",
    "What, as {who} sees it, does {other} believe is in the {pack}?",
)
CONTENTS_REALITY = (
    "What is really in the {pack}?", "What does the {pack} hold in fact?", "What is in the {pack} now?",
)
CONTENTS_MEMORY = (
    "What does the outside of the {pack} promise?", "What should be in the {pack}, going by its outside?",
    "What does it say or show on the {pack}?",
)
# fmt: on

VOCABULARY = frozenset(PLACES + STOCK)
"""Every possible answer."""


def transfer(
    plot: str, question: str, rng: random.Random, a: str, b: str, thing: str, places: Sequence[str], room: str
) -> Problem:
    """Story of an object that is moved between three places by `b`, who stays; `a` comes and goes.

    `plot`: events after the beginning (`PLOTS`). `question`: a or b (whose belief), ba (what b thinks that a believes),
    reality, memory. Someone learns of a place by seeing the object put there, and `b` of `a`'s view by knowing that `a`
    saw it.
    """
    story: list[str] = []
    at: list[str] = []
    present, saw, known = True, "", ""

    def tell(templates: tuple[str, ...], **values: str) -> None:
        story.append(rng.choice(templates).format(a=a, b=b, thing=thing, room=room, **values))

    for event in ("begin", *plot.split()):
        if event == "begin":
            x, y, z = rng.sample(places, 3)
            tell(INTRO, x=x, y=y, z=z)
        elif event == "move":
            tell(MOVE, old=at[-1], place=places[len(at)])
        elif event != "aside":
            tell(EVENTS[event])
        present = {"leave": False, "come_back": True}.get(event, present)
        if event in ("begin", "leave", "aside") and rng.random() < 0.3:
            tell(ASIDE)
        if event == "begin":
            tell(PUT, place=places[0])
        if event in ("begin", "move"):
            at.append(places[len(at)])
        # `a` sees the object put there, or sees it after all; where `b` does not notice, `b` doesn't know that.
        if (event in ("begin", "move") and present) or event in ("peek", "peek_noticed"):
            saw, known = at[-1], known if event == "peek" else at[-1]
    missed = "" if saw == at[-1] else f" did not see where the {thing} went later and"
    unaware = "" if known == saw else f" does not know what {a} saw later, but"
    templates, answer, reason = {
        "reality": (REALITY, at[-1], f"The {thing} was put in the {at[-1]} last."),
        "memory": (MEMORY, at[0], f"The {thing} was put in the {at[0]} first."),
        "a": (BELIEF, saw, f"{a}{missed} last saw the {thing} in the {saw}."),
        "b": (BELIEF, at[-1], f"{b} last saw the {thing} in the {at[-1]}."),
        "ba": (NESTED, known, f"{b}{unaware} knows that {a} saw the {thing} in the {known}."),
    }[question]
    query = rng.choice(templates).format(who=a if question == "a" else b, other=a, thing=thing)
    groups = [_pair(a, b), *(f"{thing}@{place}" for place in sorted(places))]
    return Problem(f"{' '.join(story)} {query}", answer, f" {reason} The answer is the {answer}", ";".join(groups))


def contents(question: str, looked: bool, rng: random.Random, **values: str) -> Problem:
    """Story of a closed container whose label is false; `b` has looked inside, `a` too if `looked`.

    `question`: a, ba, reality or memory, as in `transfer`. `values`: a, b, label, stock, pack, room.
    """
    a, b, pack, label, stock = (values[name] for name in ("a", "b", "pack", "label", "stock"))
    templates: tuple[str, ...]
    if question == "reality":
        templates, answer, reason = CONTENTS_REALITY, stock, f"{b} knows that the {pack} holds {stock}."
    elif question == "memory":
        templates, answer, reason = CONTENTS_MEMORY, label, f"The outside of the {pack} promises {label}."
    else:
        templates = CONTENTS_BELIEF if question == "a" else CONTENTS_NESTED
        answer = stock if looked else label
        reason = f"{a} has seen that the {pack} holds" if looked else f"{a} knows only the outside with"
        reason = f"{reason} {answer}."
    values |= {"who": a if question == "a" else b, "other": a}
    parts = [LABEL, INSIDE, WITNESS if looked else NEWCOMER, templates]
    text = " ".join(rng.choice(choices).format(**values) for choices in parts)
    groups = [_pair(a, b), *(f"{item}@{pack}" for item in sorted((label, stock)))]
    return Problem(text, answer, f" {reason} The answer is {answer}", ";".join(groups))


EVENTS = {
    "watch": WATCHES, "stay": STAYS, "leave": LEAVE, "come_back": RETURN, "peek": UNNOTICED, "peek_noticed": NOTICED,
}  # fmt: skip
PLOTS = {
    "unseen": "leave move aside come_back",
    "second move unseen": "move watch leave move come_back",
    "seen": "aside stay move",
    "secretly seen": "leave move peek come_back",
    "seen after return": "leave come_back move watch",
    "openly seen": "leave move peek_noticed come_back",
}
"""What happens after the beginning, by what `a` and `b` come to believe. "aside": sometimes a sentence that has nothing
to do with the object, as after the beginning and after leaving."""

Kind = tuple[str | bool, str]
"""A plot (for contents: whether `a` has looked) and a question; problems of a family take its kinds in turn."""
_ALL: tuple[str | bool, ...] = (*list(PLOTS)[:5], False, True)
FAMILIES: dict[str, tuple[Kind, ...]] = {
    "first_order": (("unseen", "a"), ("second move unseen", "a"), (False, "a")),
    "second_order": (("secretly seen", "ba"), ("unseen", "ba"), ("second move unseen", "ba"), (False, "ba")),
    "true_belief": (
        ("seen", "a"), ("unseen", "b"), ("seen after return", "a"), ("secretly seen", "a"), ("openly seen", "ba"),
        (True, "a"),
    ),
    "reality": tuple((plot, "reality") for plot in _ALL),
    "memory": tuple((plot, "memory") for plot in _ALL),
}  # fmt: skip


class Cast:
    """Names and objects of a split's stories: no pair of names, and no object with a place, belongs to two splits.

    So no whole combination does either, in whatever family or wording.
    """

    def __init__(self, seed: int, split: str) -> None:
        def ours(*parts: str) -> bool:
            return split_of(f"{seed}:{';'.join(parts)}") == split

        self.pairs = [pair for pair in combinations(NAMES, 2) if ours(*pair)]
        places = {thing: [place for place in PLACES if ours(thing, place)] for thing in THINGS}
        self.places = {thing: options for thing, options in places.items() if len(options) >= 3}
        stock = {pack: [item for item in STOCK if ours(item, pack)] for pack in PACKS}
        self.stock = {pack: options for pack, options in stock.items() if len(options) >= 2}

    def render(self, kind: Kind, rng: random.Random) -> Problem:
        a, b = rng.sample(rng.choice(self.pairs), 2)
        plot, question = kind
        room = rng.choice(ROOMS)
        if isinstance(plot, bool):
            pack = rng.choice(list(self.stock))
            label, stock = rng.sample(self.stock[pack], 2)
            return contents(question, plot, rng, a=a, b=b, label=label, stock=stock, pack=pack, room=room)
        thing = rng.choice(list(self.places))
        return transfer(PLOTS[plot], question, rng, a, b, thing, rng.sample(self.places[thing], 3), room)


_cast = cache(Cast)


@register("tom")
class ToMTask(ProceduralTask):
    """Theory of mind. `Prompt.group` lists the names and places, "Ada+Ben;ball@basket;ball@box;ball@jar"."""

    name = "tom"
    instruction = 'Explain your answer on one line and end it with "The answer is <place or thing>".'

    def __init__(self, task: TaskConfig, chat: ChatTemplate | None = None) -> None:
        super().__init__(task, FAMILIES, chat)

    def verify(self, prompt: Prompt, text: str) -> Verdict:
        """Judge an answer: "in the basket" is the basket; unmarked: the last place or content in its last line."""
        return verify_solution(prompt.answer, text, vocabulary=VOCABULARY, also=(f"in {prompt.answer}",))

    def _streams(self, family: str, split: str) -> list[Iterator[Problem]]:
        seen: set[str] = set()
        return [
            self._stream(kind, f"{self.seed}/{family}/{number}/{split}", _cast(self.seed, split), seen)
            for number, kind in enumerate(FAMILIES[family])
        ]

    def _stream(self, kind: Kind, source: str, cast: Cast, seen: set[str]) -> Iterator[Problem]:
        """Distinct problems. There are millions of each kind in every split, so a repetition is rare."""
        rng = random.Random(f"tom/{source}")
        while True:
            problem = cast.render(kind, rng)
            if problem.question not in seen:
                seen.add(problem.question)
                yield problem


def _pair(a: str, b: str) -> str:
    return "+".join(sorted((a, b)))
