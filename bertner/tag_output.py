"""Tagged text: as JSON lines, CoNLL columns, text for a terminal, or an HTML page."""

from __future__ import annotations

import dataclasses
import html
import json
from collections import Counter
from collections.abc import Iterator, Sequence

from bertner.corpus import split_sentences
from bertner.errors import visible
from bertner.html_report import style_sheet
from bertner.predict import Entity, word_ranges
from bertner.predictions import column_of
from bertner.text_input import Item

# Of the 256 colours of terminals those that read well on black and on white.
_COLOURS = (33, 166, 35, 162, 37, 136)


class Writer:
    """Turns tagged texts into output, piece by piece.

    Args:
        format: "jsonl", "conll", "text" or "html".
        types: Entity types of the model.
        title: Of an HTML page.
        colour: Whether "text" may be coloured.
    """

    def __init__(
        self, format: str, types: Sequence[str], *, title: str = "", colour: bool = False
    ) -> None:
        self.format = format
        self.title = title
        self.colour = colour
        self._number_of = {name: number for number, name in enumerate(sorted(types))}
        self._counts: Counter[str] = Counter()
        self._num_texts = 0

    def head(self) -> str:
        """What comes before all texts."""
        if self.format != "html":
            return ""
        style = style_sheet("predictions.css", len(self._number_of))
        # Without a script: whatever is not ticked is shown as if it were not marked.
        hidden = "".join(
            f"body:has(#show-{number}:not(:checked)) mark.type-{number} {{ all: unset; }}\n"
            f"body:has(#show-{number}:not(:checked)) mark.type-{number} span {{ display: none; }}\n"
            for number in self._number_of.values()
        )
        boxes = "".join(
            f'<label class="type-{number}"><input type="checkbox" id="show-{number}" '
            f'autocomplete="off" checked> {_escaped(name)}</label>\n'
            for name, number in self._number_of.items()
        )
        title = _escaped(self.title)
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta http-equiv="Content-Security-Policy" '
            "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
            f"<title>{title}</title>\n<style>\n{style}{hidden}</style>\n</head>\n<body>\n"
            f"<main>\n<h1>{title}</h1>\n<fieldset>\n<legend>Show</legend>\n{boxes}</fieldset>\n"
        )

    def item(self, item: Item, entities: Sequence[Entity]) -> str:
        """A text and its entities."""
        if self.format == "conll":
            return self._columns(item, entities)
        if self.format == "text":
            return self._coloured(item.text.text, entities) + "\n"
        if self.format == "html":
            return self._marked(item.text.text, entities)
        record = {
            **item.record,
            "text": item.text.text,
            "entities": [dataclasses.asdict(entity) for entity in entities],
        }
        return json.dumps(record, ensure_ascii=False) + "\n"

    def foot(self) -> str:
        """What comes after all texts."""
        if self.format != "html":
            return ""
        rows = "".join(
            f'<tr><td><mark class="type-{self._number_of[name]}">{_escaped(name)}</mark></td>'
            f"<td>{count:,}</td></tr>\n"
            for name, count in sorted(self._counts.items())
        )
        return (
            f"<footer>\n<table>\n<caption>Entities in {self._num_texts:,} texts</caption>\n"
            f'<tr><th scope="col">Type</th><th scope="col">Number</th></tr>\n{rows}</table>\n'
            "</footer>\n</main>\n</body>\n</html>\n"
        )

    def _columns(self, item: Item, entities: Sequence[Entity]) -> str:
        text = item.text
        rows = item.rows or [[column_of(text.text[start:end])] for start, end in text.words]
        tags = ["O"] * len(rows)
        for entity, (first, last) in zip(entities, word_ranges(entities, text), strict=True):
            tags[first:last] = [f"I-{entity.label}"] * (last - first)
            tags[first] = f"B-{entity.label}"
        separator = (
            "\t" if any(" " in column or not column for row in rows for column in row) else " "
        )
        lines = [separator.join([*row, tag]) for row, tag in zip(rows, tags, strict=True)]
        if not item.rows:
            for first, _ in reversed(split_sentences(text.text, text.words)[1:]):
                lines.insert(first, "")
        heading = []
        if item.heading:  # conlleval wants as many columns in all lines
            missing = ["O"] * (len(rows[0]) - len(item.heading))
            heading = [separator.join([*item.heading, *missing, "O"]), ""]
        return "\n".join([*heading, *lines, "", ""])

    def _coloured(self, text: str, entities: Sequence[Entity]) -> str:
        parts = []
        for before, entity in _pieces(text, entities):
            parts.append(_visible(before))
            if entity is not None and self.colour:
                colour = _COLOURS[self._number_of[entity.label] % len(_COLOURS)]
                shown = f"{_visible(entity.text)} [{visible(entity.label)}]"
                parts.append(f"\x1b[1;38;5;{colour}m{shown}\x1b[0m")
            elif entity is not None:
                parts.append(f"[{visible(entity.label)} {_visible(entity.text)}]")
        return "".join(parts)

    def _marked(self, text: str, entities: Sequence[Entity]) -> str:
        self._num_texts += 1
        parts = []
        for before, entity in _pieces(text, entities):
            parts.append(_escaped(before))
            if entity is not None:
                self._counts[entity.label] += 1
                parts.append(
                    f'<mark class="type-{self._number_of[entity.label]}" '
                    f'title="confidence {entity.score:.2f}">{_escaped(entity.text)}'
                    # Stays beside the entity where text runs from right to left.
                    f'<span dir="ltr"> {_escaped(entity.label)}</span></mark>'
                )
        return f'<p id="text-{self._num_texts}" dir="auto">{"".join(parts)}</p>\n'


def _pieces(text: str, entities: Sequence[Entity]) -> Iterator[tuple[str, Entity | None]]:
    """What stands before each entity, and it; at last what stands after all."""
    end = 0
    for entity in entities:
        yield text[end : entity.start], entity
        end = entity.end
    yield text[end:], None


def _visible(text: str) -> str:
    lines = text.replace("\r\n", "\n").replace("\t", "    ").split("\n")
    return "\n".join(map(visible, lines))


def _escaped(text: str) -> str:
    return html.escape(_visible(text))
