"""What a check of data comes to, and how it is shown."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bertner.errors import visible
from bertner.tables import format_table

SEVERITIES = ("error", "warning", "note")  # training refuses it; look at it; good to know

_SHOWN_EXAMPLES = 5
_SHOWN_TYPES = 30
_WIDTH = 100  # characters of a line, and of an example beside its place

# Keys of SplitFacts.by_training, and how the table calls them.
_BY_TRAINING = {
    "seen": "with the same type",
    "other type": "with another type",
    "unseen": "not at all",
}
# Keys of SplitFacts.lengths, likewise.
_LENGTHS = {
    "p50": "half have at most",
    "p95": "95 % have at most",
    "p99": "99 % have at most",
    "max": "the longest has",
}


@dataclass(frozen=True)
class Example:
    """Where something was found.

    Attributes:
        source: File or dataset.
        line: Line or record, from 1.
        text: What stands there.
    """

    source: str
    line: int
    text: str


@dataclass(frozen=True)
class Finding:
    """Something that was found.

    Attributes:
        severity: One of SEVERITIES.
        name: What it is, for programs.
        title: What it is, for people.
        advice: What it means, or what to do.
        count: How often it was found.
        examples: The most telling ones first; not all if they are many.
    """

    severity: str
    name: str
    title: str
    advice: str
    count: int
    examples: tuple[Example, ...] = ()


@dataclass(frozen=True)
class SplitFacts:
    """What a split holds.

    Attributes:
        source: File or dataset.
        scheme: Tag scheme.
        num_documents: Documents; a source without boundaries is one.
        num_sentences: Sentences.
        num_with_entities: Sentences that have an entity.
        num_words: Words.
        entity_counts: Number of entities of each type.
        by_training: Entities by what the training data have of them (`analysis.FAMILIARITY`); None
            for the training data themselves.
        lengths: Tokens of a sentence, with [CLS] and [SEP]: percentiles "p50" to "p99", and "max".
        num_cut: Sentences that are longer than a row.
    """

    source: str
    scheme: str
    num_documents: int
    num_sentences: int
    num_with_entities: int
    num_words: int
    entity_counts: dict[str, int]
    by_training: dict[str, int] | None
    lengths: dict[str, int]
    num_cut: int

    @property
    def num_entities(self) -> int:
        """Number of entities."""
        return sum(self.entity_counts.values())


@dataclass(frozen=True)
class DataCheck:
    """All that is to be said of the data of a run.

    Attributes:
        row_limit: Longest row in tokens, with [CLS] and [SEP].
        splits: Facts of each split, training data first.
        findings: The gravest first.
    """

    row_limit: int
    splits: dict[str, SplitFacts]
    findings: tuple[Finding, ...]


def format_check(check: DataCheck) -> str:
    """A check as text for a terminal."""
    lines = [*_table(check)]
    for finding in check.findings:
        lines += ["", *_finding_lines(finding)]
    counts = Counter(finding.severity for finding in check.findings)
    found = [f"{counts[each]} {each}{'s' * (counts[each] != 1)}" for each in SEVERITIES]
    more = any(len(finding.examples) > _SHOWN_EXAMPLES for finding in check.findings)
    hint = " (--check_data json gives more examples)" if more else ""
    return "\n".join([*lines, "", f"Found: {', '.join(found)}{hint}"])


def share(part: int, whole: int) -> str:
    """A share in percent."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _table(check: DataCheck) -> Iterator[str]:
    """The splits side by side."""
    name_width = max(map(len, check.splits))
    for name, facts in check.splits.items():
        yield f"{name:<{name_width}}  {visible(facts.source)}"
    yield ""
    rows = [
        [label, *(value if isinstance(value, str) else f"{value:,}" for value in values)]
        for label, values in _rows(check)
    ]
    yield format_table(["", *check.splits], rows)


def _rows(check: DataCheck) -> Iterator[tuple[str, Sequence[int | str]]]:
    """The table's rows: a label, and a value for each split."""
    splits = list(check.splits.values())
    nothing = [""] * len(splits)
    yield "documents", [each.num_documents for each in splits]
    yield "sentences", [each.num_sentences for each in splits]
    yield "  with entities", [share(each.num_with_entities, each.num_sentences) for each in splits]
    yield "words", [each.num_words for each in splits]
    yield "tag scheme", [each.scheme for each in splits]
    yield "entities", [each.num_entities for each in splits]
    types = sorted({kind for each in splits for kind in each.entity_counts})
    for kind in types[:_SHOWN_TYPES]:
        yield f"  {visible(kind):.30}", [each.entity_counts.get(kind, 0) for each in splits]
    if len(types) > _SHOWN_TYPES:
        yield f"  and {len(types) - _SHOWN_TYPES} types more", nothing
    if len(splits) > 1:
        yield "entities that training has", nothing
        for name, label in _BY_TRAINING.items():
            yield (
                f"  {label}",
                [
                    ""
                    if each.by_training is None
                    else share(each.by_training[name], each.num_entities)
                    for each in splits
                ],
            )
    yield "tokens of a sentence", nothing
    for name, label in _LENGTHS.items():
        yield f"  {label}", [each.lengths[name] for each in splits]
    yield f"  cut, with more than {check.row_limit}", [each.num_cut for each in splits]


def _finding_lines(finding: Finding) -> Iterator[str]:
    yield _wrap(f"{finding.severity}: {visible(finding.title)}")
    yield _wrap("  " + visible(finding.advice))
    shown = finding.examples[:_SHOWN_EXAMPLES]
    places = [visible(f"{example.source}:{example.line}") for example in shown]
    place_width = max(map(len, places), default=0)
    for place, example in zip(places, shown, strict=True):
        yield f"    {place:<{place_width}}  {shorten(visible(example.text), _WIDTH)}"
    if len(finding.examples) > len(shown):
        yield f"    and {finding.count - len(shown):,} more"


def _wrap(text: str) -> str:
    return textwrap.fill(text, _WIDTH, subsequent_indent="  ")


def shorten(text: str, width: int) -> str:
    """A text, of which no more than so many characters are shown."""
    return text if len(text) <= width else text[: width - 3] + "..."
