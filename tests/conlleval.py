"""The rule of conlleval, the evaluation script of CoNLL-2000 to 2003, one word after another.

Written from the script's definition, slowly and with nothing shared with `bertner.labels`, to hold
the fast code against.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

# Pairs (tag before, tag here) between which the script ends or begins an entity whatever the types.
SCRIPT_ENDS = {"BB", "BO", "IB", "IO", "EE", "EI", "EO"}
SCRIPT_STARTS = {"BB", "IB", "OB", "OI", "EE", "EI", "OE"}
# The script knows B, I, E, O and the brackets [ and ], which are entities of one word; it never
# meets B beside E, nor BIOES. S is such a bracket, and these are the pairs of a mixture.
MIXED_ENDS = {"EB"}
MIXED_STARTS = {"EB", "[B", "[I", "[E"}

# A word's tag and type, ("B", "PER"); ("O", "") outside, and before and after a sentence.
Word = tuple[str, str]
OUTSIDE: Word = ("O", "")


def parse(tag: str) -> Word:
    """B-PER to ("B", "PER"), with L and U of BILOU as E and S, and S as the script's bracket."""
    if tag == "O":
        return OUTSIDE
    prefix, kind = tag.split("-", 1)
    return {"L": "E", "U": "[", "S": "["}.get(prefix, prefix), kind


def ends(before: Word, here: Word, mixed: bool = True) -> bool:
    """Whether an entity that the word before is in ends there."""
    pair = before[0] + here[0]
    end = pair in SCRIPT_ENDS or (mixed and pair in MIXED_ENDS)
    if before[0] != "O" and before[1] != here[1]:
        end = True
    if before[0] == "[":
        end = True
    return end


def starts(before: Word, here: Word, mixed: bool = True) -> bool:
    """Whether an entity begins at the word here."""
    pair = before[0] + here[0]
    start = pair in SCRIPT_STARTS or (mixed and pair in MIXED_STARTS)
    if here[0] != "O" and before[1] != here[1]:
        start = True
    if here[0] == "[":
        start = True
    return start


Entity = tuple[int, int, str]


def entities(sentences: Iterable[Sequence[str]], mixed: bool = True) -> list[Entity]:
    """(first word, word after the last, type) of each entity; words count through all sentences."""
    found: list[Entity] = []
    position = 0
    for sentence in sentences:
        before, begin = OUTSIDE, -1
        for here in [*map(parse, sentence), OUTSIDE]:
            start = starts(before, here, mixed)
            if begin >= 0 and (start or ends(before, here, mixed)):
                found.append((begin, position, before[1]))
                begin = -1
            if start:
                begin = position
            before = here
            position += 1
        position -= 1  # the word after the sentence is none
    return found


class Counts:
    """What the script counts: words with the right tag, and entities of each type."""

    def __init__(self, gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> None:
        self.num_words = self.num_right_tags = 0
        self.correct: Counter[str] = Counter()
        self.found: Counter[str] = Counter()
        self.gold: Counter[str] = Counter()
        for gold_tags, predicted_tags in zip(gold, predicted, strict=True):
            self._count_sentence(gold_tags, predicted_tags)

    def _count_sentence(self, gold: Sequence[str], predicted: Sequence[str]) -> None:
        gold_before = predicted_before = OUTSIDE
        in_correct = False
        for gold_tag, predicted_tag in [*zip(gold, predicted, strict=True), ("O", "O")]:
            gold_here, predicted_here = parse(gold_tag), parse(predicted_tag)
            gold_starts = starts(gold_before, gold_here)
            predicted_starts = starts(predicted_before, predicted_here)
            if in_correct:
                gold_ends = gold_starts or ends(gold_before, gold_here)
                predicted_ends = predicted_starts or ends(predicted_before, predicted_here)
                if gold_ends and predicted_ends and gold_before[1] == predicted_before[1]:
                    self.correct[gold_before[1]] += 1
                    in_correct = False
                elif gold_ends != predicted_ends or gold_here[1] != predicted_here[1]:
                    in_correct = False
            if gold_starts and predicted_starts and gold_here[1] == predicted_here[1]:
                in_correct = True
            self.gold[gold_here[1]] += gold_starts
            self.found[predicted_here[1]] += predicted_starts
            gold_before, predicted_before = gold_here, predicted_here
        self.num_words += len(gold)
        self.num_right_tags += sum(a == b for a, b in zip(gold, predicted, strict=True))
