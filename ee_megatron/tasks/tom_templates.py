"""The wording of the theory-of-mind stories: people, objects, containers, and several ways to tell each event."""

from __future__ import annotations

# fmt: off
NAMES = (
    "Ada", "Amir", "Anna", "Ben", "Bo", "Cara", "Carl", "Dan", "Dora", "Ella", "Emil", "Farah", "Finn", "Gina", "Hana",
    "Hugo", "Ivy", "Jack", "Joan", "Kate", "Kofi", "Lena", "Leo", "Mia", "Milo", "Nina", "Noah", "Olga", "Omar", "Paul",
    "Petra", "Ravi", "Rosa", "Sam", "Tara", "Tom", "Uma", "Vera", "Wei", "Yan",
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
# fmt: on

INTRO = (
    "{a} and {b} are in the {room}, where there are a {x}, a {y} and a {z}.",
    "{a} and {b} are together in the {room}. A {x}, a {y} and a {z} stand there.",
    "In the {room} there are a {x}, a {y} and a {z}. {a} and {b} are there too.",
    "{a} meets {b} in the {room}. They see a {x}, a {y} and a {z}.",
)
PUT = (
    "{a} puts the {thing} in the {place}.",
    "{a} has a {thing} and puts it in the {place}.",
    "{a} places the {thing} in the {place}.",
    "{a} lays the {thing} into the {place} and closes it.",
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
    "{b} hums a song.",
    "{b} drinks some water.",
    "It is raining.",
    "A clock strikes four.",
    "{a} is in a good mood.",
    "A dog barks outside.",
    "{b} is a little tired.",
    "The sun is shining.",
)
BELIEF = (
    "Where will {who} look for the {thing} first?",
    "Where does {who} think the {thing} is?",
    "Where does {who} expect to find the {thing}?",
    "{who} wants the {thing}. Where will {who} search for it first?",
    "If {who} is asked where the {thing} is, which place will {who} name?",
)
NESTED = (
    "Where does {who} think that {other} will look for the {thing}?",
    "Where does {who} think that {other} believes the {thing} is?",
    "In which place, as {who} sees it, will {other} search for the {thing}?",
    "{who} is asked where {other} expects the {thing} to be. What does {who} say?",
)
REALITY = (
    "Where is the {thing} really?",
    "Where is the {thing} now?",
    "In which place is the {thing} at the end?",
    "Where would one have to look to find the {thing}?",
)
MEMORY = (
    "Where was the {thing} at the beginning?",
    "Where was the {thing} first?",
    "In which place was the {thing} put first?",
    "Before anyone moved it, where was the {thing}?",
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
    "Then {a} comes in, opens the {pack} too and looks inside.",
    "{b} shows {a} what is in the {pack}.",
)
CONTENTS_BELIEF = (
    "What does {who} think is in the {pack}?",
    "What does {who} expect to find in the {pack}?",
    "{who} is asked what the {pack} holds. What will {who} say?",
)
CONTENTS_NESTED = (
    "What does {who} think that {other} expects in the {pack}?",
    "What, as {who} sees it, does {other} believe is in the {pack}?",
)
CONTENTS_REALITY = ("What is really in the {pack}?", "What does the {pack} hold in fact?", "What is in the {pack} now?")
CONTENTS_MEMORY = (
    "What does the outside of the {pack} promise?",
    "What should be in the {pack}, going by its outside?",
    "What does it say or show on the {pack}?",
)
