"""Theory of mind: short stories in which what someone believes and what is so may differ, and questions about both.

False belief about a place after an unseen transfer (Wimmer and Perner 1983; Baron-Cohen, Leslie and Frith 1985), about
contents (Perner, Leekam and Wimmer 1987), and about another's belief (Perner and Wimmer 1985). Controls ask for a true
belief, for what is so, and for what was so at first, about the same stories, as in ToMi (Le, Boureau and Nickel 2019):
whoever always answers with the first place, or with the last, is right in some families only.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
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


@dataclass
class Transfer:
    """An object that is moved between three places, and who believes what, kept up to date event by event.

    `a` comes and goes, `b` stays. `belief[x]`: where x takes the object to be; `nested[x, y]`: where x takes y to take
    it to be. Someone learns of a place by seeing the object put there, and of another's view by knowing that they saw.
    """

    a: str
    b: str
    thing: str
    places: tuple[str, str, str]
    room: str
    rng: random.Random
    told: list[str] = field(default_factory=list)
    at: list[str] = field(default_factory=list)
    present: set[str] = field(default_factory=set)
    belief: dict[str, str] = field(default_factory=dict)
    nested: dict[tuple[str, str], str] = field(default_factory=dict)

    def begin(self) -> None:
        self.present = {self.a, self.b}
        x, y, z = self.rng.sample(self.places, 3)
        self.tell(INTRO, x=x, y=y, z=z)
        self.aside()
        self.tell(PUT, place=self.places[0])
        self.put()

    def tell(self, templates: tuple[str, ...], **values: str) -> None:
        known = {"a": self.a, "b": self.b, "thing": self.thing, "room": self.room}
        self.told.append(self.rng.choice(templates).format(**known, **values))

    def aside(self) -> None:
        """Sometimes a sentence that has nothing to do with the object."""
        if self.rng.random() < 0.3:
            self.tell(ASIDE)

    def move(self) -> None:
        self.tell(MOVE, old=self.at[-1], place=self.places[len(self.at)])
        self.put()

    def put(self) -> None:
        """To the next of the places."""
        self.at.append(self.places[len(self.at)])
        self._seen(self.present, self.present)

    def watch(self) -> None:
        self.tell(WATCHES)

    def stay(self) -> None:
        self.tell(STAYS)

    def leave(self) -> None:
        self.tell(LEAVE)
        self.present.discard(self.a)
        self.aside()

    def come_back(self) -> None:
        self.tell(RETURN)
        self.present.add(self.a)

    def peek(self, noticed: bool = False) -> None:
        """`a`, who is away, sees the last move after all; `b` knows of it if `noticed`."""
        self.tell(NOTICED if noticed else UNNOTICED)
        both = self.present | {self.a}
        self._seen(both, both if noticed else self.present)

    def _seen(self, watchers: set[str], known: set[str]) -> None:
        for x in watchers:
            self.belief[x] = self.at[-1]
            self.nested.update({(x, y): self.at[-1] for y in known if y != x})

    def ask(self, question: str) -> Problem:
        """`question`: a or b (whose belief), ab (what a thinks that b believes), ba, reality, memory."""
        a, b, thing = self.a, self.b, self.thing
        templates: tuple[str, ...]
        if question == "reality":
            templates, answer, reason = REALITY, self.at[-1], f"The {thing} was put in the {self.at[-1]} last."
        elif question == "memory":
            templates, answer, reason = MEMORY, self.at[0], f"The {thing} was put in the {self.at[0]} first."
        elif len(question) == 1:
            templates, answer = BELIEF, self.belief[self._named(question)]
            missed = "" if answer == self.at[-1] else f" did not see where the {thing} went later and"
            reason = f"{self._named(question)}{missed} last saw the {thing} in the {answer}."
        else:
            who, other = (self._named(letter) for letter in question)
            templates, answer = NESTED, self.nested[who, other]
            unaware = "" if answer == self.belief[other] else f" does not know what {other} saw later, but"
            reason = f"{who}{unaware} knows that {other} saw the {thing} in the {answer}."
        who, other = self._named(question[0]), self._named(question[-1])
        asked = self.rng.choice(templates).format(who=who, other=other, thing=thing)
        groups = [_pair(a, b), *(f"{thing}@{place}" for place in sorted(self.places))]
        return Problem(
            f"{' '.join(self.told)} {asked}", answer, f" {reason} The answer is the {answer}", ";".join(groups)
        )

    def _named(self, letter: str) -> str:
        return {"a": self.a, "b": self.b}.get(letter, "")


def contents(question: str, looked: bool, rng: random.Random, **values: str) -> Problem:
    """A closed container whose outside promises something else than is in it; `b` has looked, `a` too if `looked`.

    `question`: a, ba, reality or memory, as in `Transfer.ask`. `values`: a, b, label, stock, pack, room.
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
    told = [LABEL, INSIDE, WITNESS if looked else NEWCOMER, templates]
    text = " ".join(rng.choice(choices).format(**values) for choices in told)
    groups = [_pair(a, b), *(f"{item}@{pack}" for item in sorted((label, stock)))]
    return Problem(text, answer, f" {reason} The answer is {answer}", ";".join(groups))


Plot = tuple[Callable[[Transfer], None], ...]
"""What happens after the beginning. The names below say what `a` and `b` come to believe."""
UNSEEN: Plot = (Transfer.leave, Transfer.move, Transfer.aside, Transfer.come_back)
SECOND_MOVE_UNSEEN: Plot = (Transfer.move, Transfer.watch, Transfer.leave, Transfer.move, Transfer.come_back)
SEEN: Plot = (Transfer.aside, Transfer.stay, Transfer.move)
SEEN_AFTER_RETURN: Plot = (Transfer.leave, Transfer.come_back, Transfer.move, Transfer.watch)
SECRETLY_SEEN: Plot = (Transfer.leave, Transfer.move, Transfer.peek, Transfer.come_back)
OPENLY_SEEN: Plot = (Transfer.leave, Transfer.move, partial(Transfer.peek, noticed=True), Transfer.come_back)

Kind = tuple[Plot | bool, str]
"""A plot (for contents: whether `a` has looked) and a question; problems of a family take its kinds in turn."""
_ALL = (UNSEEN, SECOND_MOVE_UNSEEN, SEEN, SECRETLY_SEEN, SEEN_AFTER_RETURN, False, True)
FAMILIES: dict[str, tuple[Kind, ...]] = {
    "first_order": ((UNSEEN, "a"), (SECOND_MOVE_UNSEEN, "a"), (False, "a")),
    "second_order": ((SECRETLY_SEEN, "ba"), (UNSEEN, "ba"), (SECOND_MOVE_UNSEEN, "ba"), (False, "ba")),
    "true_belief": (
        (SEEN, "a"),
        (UNSEEN, "b"),
        (SEEN_AFTER_RETURN, "a"),
        (SECRETLY_SEEN, "a"),
        (OPENLY_SEEN, "ba"),
        (True, "a"),
    ),
    "reality": tuple((plot, "reality") for plot in _ALL),
    "memory": tuple((plot, "memory") for plot in _ALL),
}


class Cast:
    """What a split's stories may be about: no pair of names, and no object with a place, belongs to two splits.

    So no whole combination does either, in whatever family or wording.
    """

    def __init__(self, seed: int, split: str) -> None:
        def ours(*parts: str) -> bool:
            return split_of(f"{seed}:{';'.join(parts)}") == split

        self.pairs = [pair for pair in combinations(NAMES, 2) if ours(*pair)]
        places = {thing: [place for place in PLACES if ours(thing, place)] for thing in THINGS}
        self.places = {thing: found for thing, found in places.items() if len(found) >= 3}
        stock = {pack: [item for item in STOCK if ours(item, pack)] for pack in PACKS}
        self.stock = {pack: found for pack, found in stock.items() if len(found) >= 2}

    def render(self, kind: Kind, rng: random.Random) -> Problem:
        a, b = rng.sample(rng.choice(self.pairs), 2)
        plot, question = kind
        room = rng.choice(ROOMS)
        if isinstance(plot, bool):
            pack = rng.choice(list(self.stock))
            label, stock = rng.sample(self.stock[pack], 2)
            return contents(question, plot, rng, a=a, b=b, label=label, stock=stock, pack=pack, room=room)
        thing = rng.choice(list(self.places))
        first, second, third = rng.sample(self.places[thing], 3)
        story = Transfer(a, b, thing, (first, second, third), room, rng)
        story.begin()
        for step in plot:
            step(story)
        return story.ask(question)


@register("tom")
class ToMTask(ProceduralTask):
    """`Prompt.group` lists the names and the objects with their places, "Ada+Ben;ball@basket;ball@box;ball@jar"."""

    name = "tom"
    instruction = 'Explain your answer on one line and end it with "The answer is <place or thing>".'

    def __init__(self, task: TaskConfig, chat: ChatTemplate | None = None) -> None:
        super().__init__(task, FAMILIES, chat)
        self._casts: dict[str, Cast] = {}

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_casts": {}}

    def verify(self, prompt: Prompt, text: str) -> Verdict:
        """ "in the basket" is the basket; an unmarked answer is the last place or content that its last line names."""
        return verify_solution(prompt.answer, text, vocabulary=VOCABULARY, also=(f"in {prompt.answer}",))

    def _draw(self, family: str, split: str, limit: int) -> list[Problem]:
        if split not in self._casts:
            self._casts[split] = Cast(self.seed, split)
        seen: set[str] = set()
        streams = [
            self._stream(kind, f"{self.seed}/{family}/{number}/{split}", self._casts[split], seen)
            for number, kind in enumerate(FAMILIES[family])
        ]
        return [next(streams[index % len(streams)]) for index in range(limit)]

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
