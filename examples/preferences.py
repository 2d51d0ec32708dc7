"""Writes a small preference data set whose rule is known, to check a reward against.

    python examples/preferences.py OUT_DIR [--num-pairs 4000] [--num-heldout 400]
        [--num-prompts 32] [--seed 0]

Each prompt asks for two or three things of one kind ("Could you name two fruits for a quiz?").
A completion's grade is
    3  as many different, right things as asked for, and polite
    2  polite, and at least one right thing, but one wrong, repeated, missing or too many
    1  polite, and every thing wrong
    0  rude, or a dodge that names nothing
and the chosen side of a pair is the one of the higher grade. Length says nothing: in half of the
pairs the chosen side is the longer one.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

GRADES = (0, 1, 2, 3)

# How often a pair compares these two grades (higher, lower). Telling right things from wrong ones
# is what takes a model long to learn, so most pairs teach that.
PAIR_WEIGHTS = {(3, 1): 6, (3, 2): 2, (2, 1): 2, (3, 0): 1, (2, 0): 1, (1, 0): 1}
# How often the policy's corpus holds each grade: mostly good, so that a short training learns what
# belongs to which kind, and bad often enough that a reward has something to choose between.
CORPUS_WEIGHTS = {3: 4, 2: 2, 1: 1, 0: 1}

# Few kinds, so that a tiny model learns them in seconds. No thing may belong to two of them:
# "orange" is left out for that reason.
KINDS: dict[str, tuple[str, ...]] = {
    "fruits": ("apples", "pears", "plums", "cherries", "grapes", "peaches"),
    "birds": ("robins", "owls", "sparrows", "eagles", "swans", "herons"),
    "tools": ("hammers", "saws", "drills", "pliers", "chisels", "wrenches"),
    "colours": ("red", "blue", "green", "yellow", "purple", "pink"),
    "drinks": ("tea", "coffee", "milk", "lemonade", "cider", "cocoa"),
    "garments": ("coats", "shirts", "socks", "gloves", "scarves", "trousers"),
}
KIND_OF = {thing: kind for kind, things in KINDS.items() for thing in things}
COUNTS = {"two": 2, "three": 3}
OCCASIONS = (
    "for a quiz",
    "for my class",
    "for a crossword",
    "for a short story",
    "for a poster",
    "for a picture book",
    "for a word game",
    "for my homework",
    "for a school play",
    "for a spelling test",
    "for a poem",
    "for a memory game",
    "for a riddle",
    "for my scrapbook",
    "for a painting",
    "for a song",
    "for a guessing game",
    "for the school newspaper",
    "for a birthday card",
    "for my notebook",
    "for a bedtime story",
    "for a drawing lesson",
    "for a family game",
    "for a window display",
)
REQUESTS = (
    "Could you name {count} {kind} {occasion}?",
    "Please name {count} {kind} {occasion}.",
    "I need {count} {kind} {occasion}. Which would you pick?",
    "Can you think of {count} {kind} {occasion}?",
    "Help me out with {count} {kind} {occasion}, please.",
    "I am looking for {count} {kind} {occasion}. Any ideas?",
    "Give me {count} {kind} {occasion}, if you would.",
    "Would you suggest {count} {kind} {occasion}?",
    "My friend wants {count} {kind} {occasion}. What should I say?",
    "List {count} {kind} {occasion}, please.",
    "I forgot the names of {count} {kind} {occasion}. Can you help?",
    "Which {count} {kind} would you choose {occasion}?",
    "Tell me about {count} {kind} I could use {occasion}.",
    "What are {count} good {kind} {occasion}?",
    "I would like {count} {kind} {occasion}, please.",
    "Do you know {count} {kind} {occasion}?",
)

POLITE_OPENERS = (
    "Of course!",
    "With pleasure!",
    "Sure, gladly.",
    "Happy to help.",
    "Good question!",
    "Thanks for asking.",
)
POLITE_CLOSERS = (
    "I hope that helps.",
    "Good luck with it!",
    "Let me know if you need more.",
    "Have fun with it!",
    "Just ask if you want others.",
    "Enjoy!",
)
RUDE_OPENERS = (
    "Ugh, not again.",
    "Oh, how dull.",
    "Fine, whatever.",
    "Are you serious?",
    "What a silly thing to ask.",
    "Who cares?",
)
RUDE_CLOSERS = (
    "Now leave me alone.",
    "Do not bother me again.",
    "Find the rest yourself.",
    "You should know that already.",
    "Stop wasting my time.",
    "Go away!",
)
NAMINGS = (
    "I would pick {things}.",
    "You could use {things}.",
    "How about {things}?",
    "I would go with {things}.",
    "My choice would be {things}.",
    "You might like {things}.",
    "I can think of {things}.",
)
DODGES = (
    "There are so many that I could not say.",
    "It depends on what you like.",
    "You could look that up in a book.",
    "Some people would know more about it.",
    "That is hard to say without more time.",
    "I would rather talk about the weather.",
)
_RUDE = frozenset(RUDE_OPENERS + RUDE_CLOSERS)
_WORD = re.compile(r"[A-Za-z]+")


@dataclass(frozen=True)
class Prompt:
    """One request: its text, the kind of thing it asks for, and how many."""

    text: str
    kind: str
    count: int


def make_prompts(seed: int) -> list[Prompt]:
    """Every distinct prompt (several thousand), in an order that the seed decides."""
    prompts = [
        Prompt(request.format(count=word, kind=kind, occasion=occasion), kind, count)
        for request, (word, count), kind, occasion in product(
            REQUESTS, COUNTS.items(), KINDS, OCCASIONS
        )
    ]
    random.Random(seed).shuffle(prompts)
    return prompts


def write_completion(rng: random.Random, prompt: Prompt, grade: int) -> str:
    """A completion of this grade, drawn at random. Raises ValueError for a grade outside 0..3."""
    if grade not in GRADES:
        raise ValueError(f"grade: {grade} is not one of {GRADES}")
    rude = grade == 0 and rng.random() < 0.6
    opener = rng.choice(POLITE_OPENERS)
    closer = rng.choice(POLITE_CLOSERS)
    if rude:
        where = rng.choice(("opener", "closer", "both"))
        opener = opener if where == "closer" else rng.choice(RUDE_OPENERS)
        closer = closer if where == "opener" else rng.choice(RUDE_CLOSERS)
    if grade == 0 and not rude:
        middle = rng.choice(DODGES)
    else:
        # A rude completion may name anything: being right does not make up for it.
        things = _choose_things(rng, prompt, rng.choice((1, 2, 3)) if rude else grade)
        middle = rng.choice(NAMINGS).format(things=_enumerate(things))
    return f"{opener} {middle} {closer}"


def grade_completion(prompt: Prompt, completion: str) -> int:
    """The grade 0..3 of any text as a completion of the prompt, by the rule at the top."""
    if any(phrase in completion for phrase in _RUDE):
        return 0
    things = [word for word in _WORD.findall(completion) if word in KIND_OF]
    if not things:
        return 0
    right = {thing for thing in things if KIND_OF[thing] == prompt.kind}
    if not right:
        return 1
    return 3 if len(right) == len(things) == prompt.count else 2


def generate_pairs(
    num_pairs: int, seed: int, prompts: Sequence[Prompt] | None = None
) -> list[dict[str, str]]:
    """Pairs {"prompt", "chosen", "rejected"}, equal for equal arguments.

    `prompts` (default: all) are taken in order, again from the start when there are fewer than
    pairs. Raises ValueError for a negative number or no prompts.
    """
    if num_pairs < 0:
        raise ValueError(f"num_pairs: {num_pairs} is negative")
    pool = make_prompts(seed) if prompts is None else prompts
    if not pool:
        raise ValueError("prompts: at least one is needed")
    rng = random.Random(f"pairs {seed}")
    grades = rng.choices(list(PAIR_WEIGHTS), list(PAIR_WEIGHTS.values()), k=num_pairs)
    pairs = []
    for index, (high, low) in enumerate(grades):
        prompt = pool[index % len(pool)]
        chosen, rejected = _of_fair_length(rng, prompt, high, low)
        pairs.append({"prompt": prompt.text, "chosen": chosen, "rejected": rejected})
    return pairs


def generate_dataset(
    num_pairs: int = 4000, num_heldout: int = 400, num_prompts: int = 32, seed: int = 0
) -> dict[str, list[dict[str, str]]]:
    """The rows of each file, by file name. No prompt of `heldout` or `prompts` is in the others.

    Raises ValueError when the numbers leave no prompts to train on.
    """
    prompts = make_prompts(seed)
    reserved = num_heldout + num_prompts
    if min(num_pairs, num_heldout, num_prompts) < 0 or reserved >= len(prompts):
        raise ValueError(
            f"num_heldout + num_prompts: {reserved} must leave some of the {len(prompts)} distinct "
            "prompts for training, and no number may be negative"
        )
    heldout, sampled, train = (
        prompts[:num_heldout],
        prompts[num_heldout:reserved],
        prompts[reserved:],
    )
    train_pairs = generate_pairs(num_pairs, seed, train)
    rng = random.Random(f"corpus {seed}")
    grades = rng.choices(list(CORPUS_WEIGHTS), list(CORPUS_WEIGHTS.values()), k=num_pairs)
    corpus = [
        {"prompt": prompt.text, "completion": write_completion(rng, prompt, grade)}
        for prompt, grade in zip(train, grades, strict=False)
    ]
    return {
        "train.jsonl": train_pairs,
        "heldout.jsonl": generate_pairs(num_heldout, seed + 1, heldout) if heldout else [],
        "prompts.jsonl": [{"prompt": prompt.text} for prompt in sampled],
        "corpus.jsonl": corpus,
    }


def write_dataset(out_dir: Path, dataset: dict[str, list[dict[str, str]]]) -> None:
    """Writes each list of rows as one .jsonl file, UTF-8, into `out_dir` (made if absent)."""
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, rows in dataset.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (out_dir / name).write_text("".join(lines), encoding="utf-8")


def _choose_things(rng: random.Random, prompt: Prompt, grade: int) -> list[str]:
    """Things to name for a grade of 1..3, as many as the prompt asks for."""
    things = rng.sample(KINDS[prompt.kind], prompt.count)
    other = rng.choice([kind for kind in KINDS if kind != prompt.kind])
    wrong = rng.sample(KINDS[other], prompt.count)
    if grade == 1:
        return wrong
    if grade == 2:
        spoilt = rng.randrange(prompt.count)
        repeats = rng.random() < 0.1
        things[spoilt] = things[spoilt - 1] if repeats else wrong[0]
    return things


def _enumerate(things: Sequence[str]) -> str:
    return f"{', '.join(things[:-1])} and {things[-1]}"


def _of_fair_length(rng: random.Random, prompt: Prompt, high: int, low: int) -> tuple[str, str]:
    """Completions of the two grades; a fair coin, not the grades, decides which is longer."""
    chosen_is_longer = rng.random() < 0.5
    while True:
        chosen = write_completion(rng, prompt, high)
        rejected = write_completion(rng, prompt, low)
        difference = len(chosen) - len(rejected)
        if difference and (difference > 0) == chosen_is_longer:
            return chosen, rejected


def main() -> None:
    """Reads the command line and writes the four files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--num-pairs", type=int, default=4000)
    parser.add_argument("--num-heldout", type=int, default=400)
    parser.add_argument("--num-prompts", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    dataset = generate_dataset(args.num_pairs, args.num_heldout, args.num_prompts, args.seed)
    write_dataset(args.out_dir, dataset)
    for name, rows in dataset.items():
        print(f"{args.out_dir / name}: {len(rows)} rows")


if __name__ == "__main__":
    main()
