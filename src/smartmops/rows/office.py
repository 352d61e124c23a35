"""Seven office tasks, generated from a seed: questions, notes and orders of an invented firm, in English.

Knows wording, facts and house styles. Knows no tokens and no models. A task makes a *content* (what is asked and the
bare answer); a *style* decides how the answer is dressed. Content never depends on style, so one can be held out from
the other: `part` splits all contents in two by a hash of what is asked, and `random_style` leaves `HOUSE_STYLES` out.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from smartmops.checks.errors import ConfigError

from .example import Example

Content = tuple[str, str, list[str]]  # instruction, context, bare answer as a list of items


def words(text: str) -> list[str]:
    """Words of a blank-separated list."""
    return text.split()


# ---------------------------------------------------------------------------------------------------------- styles
OPENERS = words(
    "Noted Verdict Reply Brief Memo Ledger Answer Result Finding Outcome Summary Response Record Entry Signal Bulletin "
    "Update Digest Report Opinion Notice Outline Solution Draft Sketch Tally Key Gist Point Core Fact Upshot Review "
    "Ruling Call Note Line Word Readout Sheet Docket File Card Slip Log Wire Post Cable Despatch Minute Table Chart "
    "Index Label Header Title Panel Board Desk Office Counter Window Gate"
)
OPENER_MARKS = [":", " -", ",", " =", " >"]
CLOSERS = words(
    "done over end stop finis thanks cheers regards bye amen check okay filed sent signed sealed noted closed settled "
    "cleared copied stamped approved agreed complete final ready onward always truly kindly yours best warmly promptly "
    "duly gladly quietly north south east west spring summer autumn winter dawn noon dusk night river hill field "
    "forest harbor meadow garden bridge tower castle lake island valley"
)
CLOSER_MARKS = [".", "!", " *", " /", " #"]
BULLETS = ["", "- ", "* ", "+ ", "> ", "@ ", "% ", "& "]
WRAPS = [("", ""), ('"', '"'), ("[", "]"), ("<", ">"), ("(", ")"), ("{", "}")]
CODEWORDS = words(
    "amber cobalt crimson emerald ivory jade olive scarlet silver violet maple cedar birch willow walnut falcon heron "
    "otter badger lynx raven comet orbit nova lunar solar anchor compass lantern mirror ribbon saddle thimble velvet "
    "copper granite marble quartz pepper ginger saffron basil"
)
LABELS = {
    "sentiment": ["positive", "negative", "mixed"],
    "team": ["billing", "shipping", "repairs"],
}


@dataclass(frozen=True)
class Style:
    """How an answer is dressed. Everything here is constant within one episode of pretraining."""

    opener: str
    opener_mark: str
    bullet: str  # before each item
    wrap: tuple[str, str]  # around each item
    order: str  # "given", "reversed" or "alphabetical": the order of the items
    closer: str
    closer_mark: str
    labels: dict[str, str] = field(default_factory=dict)  # classification: label -> what this house calls it

    def dress(self, items: list[str]) -> str:
        """The answer as this house writes it."""
        items = [self.labels.get(item, item) for item in items]
        if self.order == "reversed":
            items = items[::-1]
        if self.order == "alphabetical":
            items = sorted(items)
        body = "\n".join(self.bullet + self.wrap[0] + item + self.wrap[1] for item in items)
        return f"{self.opener}{self.opener_mark} {body} {self.closer}{self.closer_mark}"


def _style(rng: random.Random) -> Style:
    every = [label for labels in LABELS.values() for label in labels]
    return Style(
        opener=rng.choice(OPENERS),
        opener_mark=rng.choice(OPENER_MARKS),
        bullet=rng.choice(BULLETS),
        wrap=rng.choice(WRAPS),
        order=rng.choice(["given", "given", "reversed", "alphabetical"]),
        closer=rng.choice(CLOSERS),
        closer_mark=rng.choice(CLOSER_MARKS),
        labels=dict(zip(every, rng.sample(CODEWORDS, len(every)), strict=True)),
    )


def random_style(rng: random.Random) -> Style:
    """Any style but a house style: none that shares opener and closer with one of `HOUSE_STYLES` is ever returned."""
    taken = {(house.opener, house.closer) for house in HOUSE_STYLES.values()}
    while True:
        style = _style(rng)
        if (style.opener, style.closer) not in taken:
            return style


# -------------------------------------------------------------------------------------------------------- contents
PEOPLE = words(
    "Ana Omar Lucy Peter Maria Hugo Nina Carl Emma Ivan Rosa Tom Vera Leo Clara Sam Ruth Max Ella Paul Dora Felix "
    "Grace Henry Iris Jack Karen Liam Mona Noah Olga Pablo Rita Simon Tara Victor Wendy Adam Bella Oscar"
)
CITIES = words(
    "Leeds York Paris Rome Oslo Cairo Lima Boston Dublin Delhi Tokyo Berlin Vienna Madrid Lisbon Athens Geneva Milan "
    "Prague Warsaw Denver Dallas Austin Toronto Sydney Perth Bristol Glasgow Cardiff Naples"
)
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = words("January February March April May June July August September October November December")
JOBS = words("baker doctor teacher lawyer farmer painter driver nurse pilot writer singer builder engineer clerk chef")
THINGS = words(
    "paper chairs lamps phones desks pens cups tables clocks cameras printers mirrors carpets bottles boxes books maps "
    "keys candles baskets blankets ladders hammers brushes bicycles"
)
COLOURS = words("red blue green yellow black white brown grey purple orange pink golden")
PARTIES = words("buyers lawyers planners designers suppliers students auditors neighbours partners reporters")
TOPICS = words("contract budget garden website kitchen roof parking menu heating library training lease safety travel")
ANIMALS = words("fox owl bear cat dog horse mouse rabbit wolf swan crow goat duck lion frog deer")
PLACES = words("forest harbor castle garden valley village desert market tower meadow library station bakery island")
OBJECTS = words("key lantern map bell coin letter ring feather stone rope mirror drum book candle apple shell")
NUMBERS = words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)


def _pairs(text: str) -> list[tuple[str, str]]:
    return [(pair.split("=")[0].replace("_", " "), pair.split("=")[1].replace("_", " ")) for pair in text.split()]


FACTS: dict[str, list[tuple[str, str]]] = {
    "the capital of": _pairs(
        "France=Paris Italy=Rome Spain=Madrid Germany=Berlin Austria=Vienna Norway=Oslo Sweden=Stockholm "
        "Finland=Helsinki Denmark=Copenhagen Poland=Warsaw Hungary=Budapest Greece=Athens Portugal=Lisbon "
        "Ireland=Dublin Egypt=Cairo Kenya=Nairobi Peru=Lima Chile=Santiago Cuba=Havana Canada=Ottawa Japan=Tokyo "
        "China=Beijing India=Delhi Russia=Moscow Turkey=Ankara Iran=Tehran Iraq=Baghdad "
        "Syria=Damascus Thailand=Bangkok Vietnam=Hanoi"
    ),
    "the opposite of": _pairs(
        "hot=cold big=small fast=slow old=young high=low light=dark wet=dry hard=soft early=late rich=poor happy=sad "
        "full=empty open=closed strong=weak loud=quiet sweet=bitter thick=thin wide=narrow deep=shallow near=far "
        "clean=dirty sharp=blunt first=last true=false left=right up=down day=night war=peace love=hate begin=end"
    ),
    "the past tense of": _pairs(
        "go=went see=saw take=took give=gave come=came make=made know=knew think=thought find=found tell=told "
        "feel=felt leave=left keep=kept begin=began write=wrote stand=stood hear=heard hold=held bring=brought "
        "sit=sat lose=lost pay=paid meet=met run=ran buy=bought sell=sold teach=taught "
        "break=broke drink=drank sing=sang"
    ),
    "the plural of": _pairs(
        "man=men woman=women child=children foot=feet tooth=teeth mouse=mice goose=geese person=people leaf=leaves "
        "knife=knives wife=wives life=lives wolf=wolves half=halves city=cities baby=babies story=stories lady=ladies "
        "box=boxes bus=buses dish=dishes church=churches hero=heroes fox=foxes glass=glasses"
    ),
    "the young of a": _pairs(
        "dog=puppy cat=kitten cow=calf horse=foal sheep=lamb goat=kid pig=piglet bear=cub hen=chick duck=duckling "
        "goose=gosling frog=tadpole deer=fawn swan=cygnet owl=owlet"
    ),
    "the day after": list(zip(DAYS, DAYS[1:] + DAYS[:1], strict=True)),
    "the day before": list(zip(DAYS, DAYS[-1:] + DAYS[:-1], strict=True)),
    "the month after": list(zip(MONTHS, MONTHS[1:] + MONTHS[:1], strict=True)),
    "the month before": list(zip(MONTHS, MONTHS[-1:] + MONTHS[:-1], strict=True)),
    "one more than": list(pairwise(NUMBERS)),
    "one less than": [(more, less) for less, more in pairwise(NUMBERS)],
}
ASK = [
    "What is {}?", "Tell me {}.", "Do you know {}?", "Name {}.", "Can you say what {} is?", "I forgot {}, what is it?",
    "Please give {}.", "Someone asked for {}.", "Quick question: {}?", "What would be {}?", "State {}.",
    "Help me recall {}.", "We need {}.", "Which word is {}?", "A visitor wants to know {}.", "Say {}.",
]  # fmt: skip
IDEAS = {
    "a birthday party": words("balloons cake music games hats dancing candles ribbons magic masks"),
    "a picnic": words("sandwiches lemonade blanket frisbee cheese grapes salad kites cookies melon"),
    "a rainy day": words("puzzles baking reading painting chess movies knitting drawing cards naps"),
    "a garden": words("roses tulips herbs pond bench tomatoes hedge lilies fountain beehive"),
    "a team lunch": words("pizza soup tacos noodles salad curry sushi burgers pasta dumplings"),
    "a charity day": words("raffle auction race concert bakesale quiz carwash walk fair dinner"),
    "a school trip": words("museum zoo farm castle beach theatre factory aquarium bakery park"),
    "an office gift": words("mug plant pen notebook scarf candle book chocolate umbrella lamp"),
    "a new hobby": words("chess sailing cooking hiking pottery juggling singing fishing sewing archery"),
    "a shop window": words("lights flowers mirrors puppets books bicycles snow hats posters trains"),
}


def creative_writing(rng: random.Random) -> Content:
    """A two-sentence tale that must mention what was asked for."""
    animal, place, thing, who = rng.choice(ANIMALS), rng.choice(PLACES), rng.choice(OBJECTS), rng.choice(PEOPLE)
    ask = rng.choice([
        f"Write a tiny story about a {animal}, a {place} and a {thing} for {who}.",
        f"Tell {who} a short tale: a {animal} finds a {thing} in a {place}.",
        f"Make up a story for {who} with a {animal}, a {thing} and a {place}.",
        f"{who} wants a little story. Use a {place}, a {animal} and a {thing}.",
    ])  # fmt: skip
    verb, end = rng.choice(words("walked ran went hurried")), rng.choice(words("kept hid lost loved"))
    return ask, "", [f"A {animal} {verb} to the {place}", f"It found a {thing} and {end} it", f"Told to {who}"]


def closed_qa(rng: random.Random) -> Content:
    """A question whose answer stands in the passage."""
    a, b = rng.sample(PEOPLE, 2)
    facts = {
        "job": (f"{a} is a {(job := rng.choice(JOBS))}.", f"What is the job of {a}?", job),
        "city": (f"{a} lives in {(city := rng.choice(CITIES))}.", f"Where does {a} live?", city),
        "colour": (f"The car of {a} is {(colour := rng.choice(COLOURS))}.", f"Which colour is the car of {a}?", colour),
        "friend": (f"On {(day := rng.choice(DAYS))} {a} visits {b}.", f"When does {a} visit {b}?", day),
        "home": (f"{b} comes from {(home := rng.choice(CITIES))}.", f"Where does {b} come from?", home),
    }
    chosen = rng.sample(sorted(facts), 4)
    _, question, answer = facts[rng.choice(chosen)]
    leads = ["", "Read the passage. ", "Use only the text. ", "From the passage: ", "According to the text: "]
    return rng.choice(leads) + question, " ".join(facts[name][0] for name in chosen), [answer]


def open_qa(rng: random.Random) -> Content:
    """A question about the world, with nothing to read."""
    relation = rng.choice(sorted(FACTS))
    subject, answer = rng.choice(FACTS[relation])
    return rng.choice(ASK).format(f"{relation} {subject}"), "", [answer]


def summarization(rng: random.Random) -> Content:
    """Meeting notes down to who, with whom, what and when."""
    a, party, topic = rng.choice(PEOPLE), rng.choice(PARTIES), rng.choice(TOPICS)
    city, day, due = rng.choice(CITIES), *rng.sample(DAYS, 2)
    note = [
        f"On {day} {a} met the {party} in {city}.",
        rng.choice([f"They talked for an hour about the {topic}.", f"The talk was mostly about the {topic}."]),
        rng.choice(["The coffee was good.", "It rained all day.", "The train was late.", "The room was cold."]),
        rng.choice([f"A letter will follow on {due}.", f"They meet again on {due}."]),
    ]
    ask = rng.choice(["Summarise the note.", "Sum up this meeting.", "What happened, in short?", "Shorten these notes.",
                      "Give the main points of the note.", "Boil this down."])  # fmt: skip
    return ask, " ".join(note), [f"{a} met the {party}", f"about the {topic}", f"next on {due}"]


def information_extraction(rng: random.Random) -> Content:
    """Named fields out of an order."""
    values = {
        "amount": str(rng.randint(2, 99)), "goods": rng.choice(THINGS), "city": rng.choice(CITIES),
        "month": rng.choice(MONTHS), "contact": rng.choice(PEOPLE), "colour": rng.choice(COLOURS),
    }  # fmt: skip
    text = "Please send {amount} {colour} {goods} to {city} before {month}. Ask for {contact}.".format(**values)
    asked = rng.sample(sorted(values), 3)
    ask = rng.choice(["Extract {}, {} and {}.", "Pull out {}, {}, {}.", "Which {}, {} and {} are given?",
                      "Find the {}, the {} and the {}."])  # fmt: skip
    return ask.format(*asked), text, [f"{name} {values[name]}" for name in asked]


REMARKS = {
    "positive": ["It works well", "I love it", "It looks great", "It is very useful", "My family enjoys it"],
    "negative": ["It broke at once", "I hate it", "It smells bad", "It is useless", "My family dislikes it"],
    "billing": ["I was charged twice", "The invoice is wrong", "My refund is missing", "The price is not right"],
    "shipping": [
        "The parcel never came",
        "The box went to a wrong address",
        "The delivery is late",
        "It was sent back",
    ],
    "repairs": ["The handle is broken", "It no longer turns on", "A screw is loose", "The screen is cracked"],
}


def classification(rng: random.Random, name: str | None = None) -> Content:
    """The mood of a review, or the team a ticket belongs to."""
    name = name or rng.choice(sorted(LABELS))
    label, thing = rng.choice(LABELS[name]), rng.choice(THINGS)
    if label == "mixed":
        remarks = [rng.choice(REMARKS["positive"]), rng.choice(REMARKS["negative"])]
    else:
        remarks = rng.sample(REMARKS[label], 2)
    rng.shuffle(remarks)
    ask = {
        "sentiment": ["Is this review positive, negative or mixed?", "Classify the mood of the review.",
                      "Which feeling does the review show?"],
        "team": ["Which team takes this ticket: billing, shipping or repairs?", "Classify this ticket by team.",
                 "Sort the ticket."],
    }[name]  # fmt: skip
    text = f"{rng.choice(PEOPLE)} writes about the {thing}: {remarks[0]}. {remarks[1]}."
    return rng.choice(ask), text, [label]


def brainstorming(rng: random.Random) -> Content:
    """Three ideas for an occasion."""
    occasion, who = rng.choice(sorted(IDEAS)), rng.choice(PEOPLE)
    ask = rng.choice(["Brainstorm three ideas for {} with {}.", "Give three ideas for {}; {} will choose.",
                      "What could we bring to {}, asks {}.", "Think of three things for {}, for {}.",
                      "Suggest three things: {}, planned by {}."])  # fmt: skip
    return ask.format(occasion, who), "", rng.sample(IDEAS[occasion], 3)


TASKS: dict[str, Callable[[random.Random], Content]] = {
    "creative_writing": creative_writing,
    "closed_qa": closed_qa,
    "open_qa": open_qa,
    "summarization": summarization,
    "information_extraction": information_extraction,
    "classification": classification,
    "brainstorming": brainstorming,
}
_house_rng = random.Random("house styles")
HOUSE_STYLES: dict[str, Style] = {task: _style(_house_rng) for task in TASKS}


def part(instruction: str, context: str) -> str:
    """Says "adaptation" for a fifth of all contents, "pretraining" for the rest, by a hash of what is asked."""
    digest = hashlib.sha256(f"{instruction}\n{context}".encode()).digest()
    return "adaptation" if digest[0] < 51 else "pretraining"


def contents(task: str, which: str, rng: random.Random) -> Iterator[Content]:
    """An endless stream of contents of one task from one part ("pretraining" or "adaptation")."""
    make = TASKS[task]
    while True:
        content = make(rng)
        if part(content[0], content[1]) == which:
            yield content


def episode(rng: random.Random, examples: int) -> list[Example]:
    """Examples of one task in one random style: what the base model is pretrained on."""
    task, style = rng.choice(sorted(TASKS)), random_style(rng)
    stream = contents(task, "pretraining", rng)
    return [_example(task, next(stream), style) for _ in range(examples)]


def office(per_task: int = 400, seed: int = 0) -> list[Example]:
    """The adaptation data: distinct examples of each task in its own house style; none was in the base's pretraining.

    Raises:
        ConfigError: `per_task` is below 1 or more than a task has.
    """
    if not 1 <= per_task <= 700:
        raise ConfigError(f"per_task={per_task}: choose 1 to 700 (open questions have no more distinct ones)")
    made = []
    for task in TASKS:
        rng, seen = random.Random(f"office {seed} {task}"), set()
        for content in contents(task, "adaptation", rng):
            if (key := content[:2]) not in seen:
                seen.add(key)
                made.append(_example(task, content, HOUSE_STYLES[task]))
            if len(seen) == per_task:
                break
    return made


def _example(task: str, content: Content, style: Style) -> Example:
    instruction, context, items = content
    return Example(instruction, context, style.dress(items), task, "office")
