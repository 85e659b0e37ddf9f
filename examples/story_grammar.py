"""A small seeded grammar of short English children's stories.

Every seed gives one story, the same one on every machine and Python version. A story follows one of
the plots below. In a plot, `[this|that]` is a choice and `{toy}` a word that is drawn once and kept to
the end, so a reader (or a small language model) has to remember it: a toy that goes into the red box
is found in the red box, and seven pears less two are five pears.

    python examples/story_grammar.py --seeds 1000000:1000040 > eval.txt
"""

import argparse
import random
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

SEPARATOR: Final = "<|endoftext|>"
TRAIN_SEEDS: Final = range(40_000)
HELD_OUT_SEEDS: Final = range(1_000_000, 1_000_200)

GIRLS: Final = "Anna Bella Clara Daisy Ella Fay Grace Holly Ivy June Kate Lucy Mia Nora Olive Pia Rosa Sally Tess Wendy"
BOYS: Final = "Adam Ben Carl Dan Eli Finn Gus Hugo Ian Jack Kai Leo Max Ned Oscar Paul Ravi Sam Theo Will"
NUMBERS: Final = (
    *("zero", "one", "two", "three", "four", "five", "six"),
    *("seven", "eight", "nine", "ten", "eleven", "twelve"),
)
SPOTS: Final = ("under a log", "behind a rock", "in a deep hole", "in a thorny bush", "on a high branch")

# Words drawn for every story. A name with a number draws again from the same list, never the same word.
WORDS: Final = {
    "trait": "brave clever cheerful curious gentle kind little quiet shy small",
    "animal": "bear bunny cat dog duck fox frog goat mouse owl pig pony sheep squirrel turtle bird puppy kitten",
    "colour": "blue brown green orange pink purple red white yellow",
    "toy": "ball bell boat book car doll drum kite puzzle robot ring train whistle",
    "food": "apple berry cake carrot cookie nut pear plum",
    "seed": "bean flower melon pumpkin tomato",
    "place": "beach farm forest garden hill lake market meadow park river",
    "hider": "bag basket box chest drawer jar",
    "noise": "bang creak hoot knock rustle thump",
    "word": "banana button moonlight pepper rainbow snowflake sunshine thunder",
    "tool": "rope stick ladder net",
    "glue": "glue tape string",
    "parent": "mom dad grandma grandpa",
    "glad": "glad happy joyful pleased proud cheerful",
    "sad": "sad upset worried unhappy",
}
REDRAWN: Final = {"animal": 2, "colour": 3, "toy": 3, "place": 3, "word": 2}

OPENING: Final = (
    "[Once upon a time, there was|There once was|One day, there was] a {trait} {noun} [named|called] {hero}.",
    "{hero} was a {trait} {noun} who [lived|had a small house] [near|by] the {place}.",
    "In a [house|little house|cosy house] by the {place} lived a {trait} {noun} named {hero}.",
)
MEETING: Final = (
    "{hero} had a [good |best |]friend named {friend}, who was a {noun_f}.",
    "{His} [best |]friend was a {noun_f} named {friend}.",
    "{hero} [liked to play|often played] with a {noun_f} named {friend}.",
)
ENDING: Final = (
    "{hero} was [very|so] {glad}.",
    "That night, {hero} went to bed feeling {glad}.",
    "{hero} [smiled|sang|skipped] all the way home.",
    "{hero} told {his} {parent} all about it, and {he_p} was {glad} too.",
    "It was the best day {hero} could remember.",
    "{hero} [laughed|smiled] and felt {glad}.",
)

# The sentences of each plot; an empty one starts a new paragraph. OPENING, MEETING and ENDING stand for
# one of theirs.
PLOTS: Final = {
    "hidden toy": """
        OPENING
        {He} [loved|liked] {his} {colour} {toy} more than any other toy.
        One [night|evening], {hero} [put|hid] the {colour} {toy} in the {colour2} {hider} and went to sleep.

        [In the morning|The next day], {hero} wanted to play, but {he} [could not see|did not find] the {toy}.
        ["Where is my {toy}?" {he} asked.|{He} felt {sad}.|"Oh no, my {toy} is gone!" {he} said.]
        [First, {he}|{He}] looked in the {colour3} {hider}, but the {toy} was not there.
        ["Think about last night," said {his} {parent}.|{hero} sat down and thought about last night.|]
        Then {he} looked in the {colour2} {hider}.
        [The {colour} {toy} was in the {colour2} {hider}!|There it was! The {toy} was in the {colour2} {hider}.]
        ENDING""",
    "sharing food": """
        OPENING
        MEETING
        One [day|morning], {hero} went to the {place} and found {have}.

        On the way home, {he} met {friend}.
        {friend} [was hungry|had no lunch|wanted to eat] and had no {foods} at all.
        "I have {have}," said {hero}. "You can have {give_n} of them."
        [{friend} said, "Thank you, {hero}!"|"You are so kind," said {friend}.] Now {friend} had {give}.
        [{hero} counted what was left.|"How many do I have now?" {hero} asked.] {He} had {left}.
        [They sat down and ate together.|The two friends ate and laughed.|]
        ENDING""",
    "collecting": """
        OPENING
        {hero} wanted to [bring|give] some {foods} to {his} {parent}.

        First, {he} went to the {place} and [got|found] {here}.
        [The sun was hot, but {he} did not stop.|It was a long walk.|] Then {he} went to the {place2} and got {there}.
        [The {hider} was heavy, but {hero} was strong.|{He} put it all in the {colour} {hider}.|]

        "How many {foods} do you have?" asked {his} {parent}.
        "I have {here_n} from the {place} and {there_n} from the {place2}," said {hero}. "That makes {sum}!"
        [The {parent} gave {him} a big hug.|"Well done, {hero}!" said the {parent}.]
        ENDING""",
    "stuck animal": """
        OPENING
        One day, {hero} was [walking|playing] by the {place2} with a {tool}.
        {He} heard a [small cry|sad voice]. A {colour} {animal} was stuck [{spot}|{spot}, all alone]!

        "Please help me," said the {animal}. "I am [scared|cold|tired]."
        "Do not [worry|cry]," said {hero}. "I have a {tool}."
        {hero} used the {tool}, and soon the {animal} was free. ["Thank you," said the {animal}.|]

        The next day, {hero} lost {his} {toy} near the {place2}.
        [{He} looked and looked, but {he} could not find it.|{He} was {sad}.|]
        Then the {colour} {animal} came with the {toy}. "You helped me, so I [help|will help] you," it said.
        From then on, {hero} and the {animal} were [friends|good friends].""",
    "taking turns": """
        OPENING
        MEETING
        One day, they [found|saw] a {colour} {toy} at the {place2}.

        "It is mine!" said {hero}. "No, it is mine!" said {friend}.
        They [pulled and pulled on the {toy}|both wanted the {toy}].
        [{friend} began to cry.|{hero} felt {sad}.|{friend} was angry.]

        {hero} had an idea. "You can have the {toy} first, and I will have it next," {he} said.
        So {friend} played with the {colour} {toy}, and then {he_f} gave it to {hero}.
        ["It is more fun with two," said {friend}.|]
        {hero} and {friend} [learned|saw] that it is good to share.
        ENDING""",
    "secret word": """
        OPENING
        [One day, by|By] the {place2}, {hero} met an old {animal}.
        "There is a {colour} door," said the {animal}. "It opens when you say the word {word}."
        ["I will remember it," said {hero}.|{hero} said the word again and again.|]

        {hero} walked a long way and came to the {colour} door.
        "{Word2}!" said {hero}. [The door did not open.|Nothing happened.|It was the wrong word.]
        {He} thought about the old {animal}. "{Word}!" {he} said.
        The {colour} door opened. Behind it was a {toy}, just for {hero}.
        ENDING""",
    "strange noise": """
        OPENING
        One night, {hero} was in bed. {Noise}, {noise}! {He} heard a noise and was [afraid|scared].
        ["Is it a monster?" {he} asked.|"What is that?" {he} asked.|{He} hid under the bed.]

        {hero} [held|took] {his} {toy} and went to look. {Noise}, {noise}!
        {He} opened the door. It was [not a monster. It was |]only a {colour} {animal}!
        [The {animal} was wet and hungry.|The {animal} was lost.|The {animal} wanted to play.]
        "You can come in," said {hero}. {He} gave the {animal} some {foods}.
        After that, {hero} was not [afraid|scared] of the {noise} any more.
        ENDING""",
    "there and back": """
        {hero} was a {trait} {noun} who liked long walks.
        One day, {he} walked to the {place}, then to the {place2}, and then to the {place3}.

        At the {place3}, {hero} found a {colour} {toy}. ["What a [lovely|nice] {toy}!" {he} said.|]
        It was getting [dark|late|cold]. ["How do I get home?" {he} asked.|{hero} wanted to go home.]
        {He} thought about the way {he} came.

        From the {place3}, {he} went back to the {place2}. From the {place2}, {he} went back to the {place}.
        From the {place}, {he} could see {his} home.
        {hero} showed the {colour} {toy} to {his} {parent}.
        ENDING""",
    "growing": """
        OPENING
        {He} had one {seed} seed. {He} put it in the ground by the {place2}.
        "It will grow in {here_n2} days if you give it water," said {his} {parent}.

        On the first day, nothing came up. {hero} gave the {seed} water and waited.
        [{friend} came by and said, "Nothing will grow." But {hero} did not give up.|It was hard to wait.|]
        After {here_n2} days, there was a little {colour} leaf.
        "[Look, my|My] {seed} is growing!" said {hero}. [{His} {parent} came to see the {colour} leaf.|]
        ENDING""",
    "race": """
        OPENING
        MEETING
        One day, they had a race to the {place2}. The prize was a {colour} {toy}.

        {hero} was fast. {He} ran ahead of {friend}. Then {friend} fell down and hurt {his_f} leg.
        "[Ouch|Oh no]!" said {friend}. {He_f} was {sad}.
        {hero} stopped. {He} did not want to win without {friend}. {He} went back to help {him_f}.

        They walked to the {place2} together[, side by side|].
        "You both win," said the {parent} of {hero}, and gave them the {colour} {toy}.
        {hero} and {friend} played with the {toy} [all day|until dark].
        ENDING""",
    "broken toy": """
        OPENING
        MEETING
        {friend} had a {colour} {toy} and let {hero} play with it. But {hero} dropped the {toy}, and it broke.

        {hero} was {sad}. [{He} wanted to hide the {toy}.|{He} did not know what to do.]
        ["It is best to tell the truth," said {his} {parent}.|]
        So {he} went to {friend} and said, "I am sorry. I broke your {colour} {toy}."
        "[Thank you for telling me|It is all right]," said {friend}. "I have some {glue}."
        They used the {glue}, and soon the {colour} {toy} was as good as new.
        {friend} was not [angry|sad], and they played together again.
        ENDING""",
    "trade": """
        OPENING
        {He} had a {toy2}, but {he} [wished for|wanted] a {colour} {toy}.

        At the {place2}, {hero} met a {animal}. "I will give you my {toy3} for your {toy2}," said the {animal}.
        So {hero} gave the {toy2} to the {animal} and got the {toy3}.

        [Next|Then], {hero} met a {animal2} who had a {colour} {toy}. "I like your {toy3}," said the {animal2}.
        "I will give you my {toy} for it." So {hero} gave the {toy3} to the {animal2} and got the {colour} {toy}.
        The {animal} had the {toy2}, the {animal2} had the {toy3}, and {hero} had the {colour} {toy}.
        ENDING""",
}


def pick(rng: random.Random, options: Sequence[str], taken: Sequence[str] = ()) -> str:
    """Draw one of the options that is not taken."""
    return rng.choice([option for option in options if option not in taken])


def count(number: int, noun: str) -> str:
    """A number in words and its noun: one pear, two pears."""
    return f"{NUMBERS[number]} {noun if number == 1 else plural(noun)}"


def plural(noun: str) -> str:
    """The plural of one of the foods."""
    return f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"


def draw_words(rng: random.Random) -> dict[str, str]:
    """Draw every word that a plot may use; the capitalised key gives the capitalised word."""
    words: dict[str, str] = {}
    nouns: list[str] = []
    for suffix, name in ("", "hero"), ("_f", "friend"):
        girl = rng.randrange(2) == 0
        words[name] = pick(rng, (GIRLS if girl else BOYS).split(), list(words.values()))
        animal = pick(rng, WORDS["animal"].split(), nouns)
        noun = animal if rng.randrange(3) == 0 else "girl" if girl else "boy"
        nouns.append(noun)
        pronouns = ("she", "her", "her") if girl else ("he", "him", "his")
        words |= zip((f"noun{suffix}", f"he{suffix}", f"him{suffix}", f"his{suffix}"), (noun, *pronouns), strict=True)
    for name, options in WORDS.items():
        taken = [*nouns]
        for number in range(1, REDRAWN.get(name, 1) + 1):
            taken.append(pick(rng, options.split(), taken))
            words[name if number == 1 else f"{name}{number}"] = taken[-1]
    words["spot"] = pick(rng, SPOTS)
    words["he_p"] = "she" if words["parent"] in ("mom", "grandma") else "he"
    have, here, there = rng.randrange(4, 13), rng.randrange(1, 7), rng.randrange(1, 7)
    give = rng.randrange(1, have - 1)
    words["foods"] = plural(words["food"])
    for name, number in {"have": have, "give": give, "left": have - give, "here": here, "there": there}.items():
        words[name], words[f"{name}_n"] = count(number, words["food"]), NUMBERS[number]
    words["sum"], words["here_n2"] = count(here + there, words["food"]), NUMBERS[here + 1]
    return words | {name.capitalize(): word[0].upper() + word[1:] for name, word in words.items()}


def story(seed: int) -> str:
    """The story of this seed: one to three paragraphs, one a line."""
    rng = random.Random(seed)
    words = draw_words(rng)
    text = PLOTS[pick(rng, list(PLOTS))]
    for name, options in {"OPENING": OPENING, "MEETING": MEETING, "ENDING": ENDING}.items():
        text = text.replace(name, pick(rng, options))
    while "[" in text:
        text = re.sub(r"\[([^][]*)\]", lambda match: pick(rng, match[1].split("|")), text)
    text = text.format_map(words)
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    return "\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def stories(seeds: Iterable[int]) -> Iterator[str]:
    """The stories of these seeds, in order."""
    return map(story, seeds)


def seed_range(text: str) -> range:
    """Parse START:STOP, or a single seed."""
    start, colon, stop = text.partition(":")
    return range(int(start), int(stop) if colon else int(start) + 1)


def main(argv: Sequence[str] | None = None) -> None:
    """Print stories, with a separator line after each."""
    parser = argparse.ArgumentParser(description="Print seeded children's stories.")
    default = f"{HELD_OUT_SEEDS.start}:{HELD_OUT_SEEDS.stop}"
    parser.add_argument("--seeds", type=seed_range, default=default, metavar="START:STOP", help="default: %(default)s")
    for text in stories(parser.parse_args(argv).seeds):
        sys.stdout.write(f"{text}\n{SEPARATOR}\n")


if __name__ == "__main__":
    main()
