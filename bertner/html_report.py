"""The HTML report: scores, errors, training curves and every sentence, on one page.

The page is a single file that opens from disk and asks the network for nothing: its policy forbids
it to, and allows no style or script but its own two. What comes from a corpus is escaped where it
stands in the page, and is data, never markup, where the script shows it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bertner import __version__, charts
from bertner.errors import visible
from bertner.figures import (
    KINDS,
    comparison_figure,
    evaluation_figures,
    format_count,
    format_difference,
    format_interval,
    format_p,
    format_share,
    level_table,
    level_type_table,
    training_figures,
)
from bertner.files import write_text

if TYPE_CHECKING:
    from jinja2 import Template

logger = logging.getLogger("bertner")

_KINDS = list(KINDS)
_PAGES = Path(__file__).parent / "pages"

Analysis = Mapping[str, Any]
Sentence = Mapping[str, Any]


def write_report(
    path: Path,
    *,
    title: str,
    evaluations: Mapping[str, tuple[Analysis, Sequence[Sentence]]],
    events: Sequence[Mapping[str, Any]] = (),
    facts: Sequence[tuple[str, str]] = (),
    comparison: Mapping[str, Any] | None = None,
    max_sentence_bytes: int = 3_000_000,
) -> None:
    """Writes the page.

    Without matplotlib it has tables in place of charts, and says so; so does the log.

    Args:
        path: The page; what is there is replaced.
        title: Its heading.
        evaluations: By name of the data (`validation`, `test`), an analysis and its sentences. A
            sentence may have the entities of another model under `other`, like `predicted`.
        events: Of the run that made the model: the lines of its `metrics.jsonl`.
        facts: Names and values for the head: model, data, date, versions, command.
        comparison: This model against another one, on the first evaluation's data: `other` (its
            name), `metric`, `difference` (this one's less the other's), `interval`, `p_value`,
            `per_type` (`difference`, `interval` and `p_value` of each), `unit` and `samples` of the
            bootstrap, `num_differ` (sentences).
        max_sentence_bytes: The most that sentences may take. If they take more, those with errors
            go first, and the page says how many were left out.

    Raises:
        StorageError: The disk fails.
    """
    if not charts.can_draw():
        logger.warning(
            "%s has tables in place of charts; for charts: pip install 'bertner[report]'",
            path.name,
        )
    types = sorted(_types_of(evaluations))
    data, num_kept = _data(evaluations, types, max_sentence_bytes)
    splits = [
        {
            "id": f"split-{k}",
            "name": name,
            "analysis": analysis,
            "figures": evaluation_figures(f"split-{k}", analysis, types),
            "levels": level_table(analysis),
            "level_types": level_type_table(analysis),
            "num_kept": num_kept[k - 1],
        }
        for k, (name, (analysis, _)) in enumerate(evaluations.items(), 1)
    ]
    style, script = style_sheet("report.css", len(types)), _page("report.js")
    text = _template().render(
        title=title,
        facts=facts,
        splits=splits,
        training=training_figures(events),
        comparison=comparison,
        comparison_figure=comparison and comparison_figure("comparison-figure", comparison),
        kinds=KINDS,
        can_draw=charts.can_draw(),
        policy=_policy(style, script),
        style=style,
        script=script,
        data=data,
        version=__version__,
    )
    write_text(path, text)


def _page(name: str) -> str:
    return (_PAGES / name).read_text(encoding="utf-8")


def _template() -> Template:
    # The template engine comes with torch, and takes a while to load.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(_PAGES),
        autoescape=True,
        undefined=StrictUndefined,
        # Whoever wrote a text, it must not turn round what stands beside it.
        finalize=lambda value: visible(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        count=format_count,
        difference=format_difference,
        interval=format_interval,
        markup=Markup,
        p=format_p,
        share=format_share,
    )
    return environment.get_template("report.html")


def style_sheet(name: str, num_types: int) -> str:
    """A style sheet of ours, with a hue for each type: neighbours in the list are far apart."""
    hues = [f".type-{k} {{ --hue: {(k * 137.508 + 210) % 360:.1f}; }}\n" for k in range(num_types)]
    return _page(name) + "".join(hues)


def _policy(style: str, script: str) -> str:
    """Forbids everything but what is in the page: no network, no style or script of others."""
    style_hash, script_hash = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for text in (style, script)
    )
    return (
        f"default-src 'none'; style-src 'sha256-{style_hash}'; script-src 'sha256-{script_hash}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def _types_of(evaluations: Mapping[str, tuple[Analysis, Sequence[Sentence]]]) -> set[str]:
    """All types that occur, also those that only the other model knows."""
    types = {t for analysis, _ in evaluations.values() for t in analysis["confusion"]["types"]}
    for _, sentences in evaluations.values():
        for name in ("gold", "predicted", "other"):
            types.update(entity[2] for s in sentences for entity in s.get(name, ()))
    return types


def _data(
    evaluations: Mapping[str, tuple[Analysis, Sequence[Sentence]]],
    types: Sequence[str],
    max_bytes: int,
) -> tuple[str, list[int]]:
    """The sentences as JSON that can stand in a page.

    Returns:
        `types`, `kinds` and `splits`, each with its `name`, `total` number of sentences, and those
        `sentences` that there is room for (see `_encode`), in order; and how many these are.
    """
    index = {name: k for k, name in enumerate(types)}
    splits, num_kept = [], []
    for k, (name, (_, sentences)) in enumerate(evaluations.items()):
        # What a split does not take of its share is for those after it.
        lines = _choose(sentences, index, max_bytes // (len(evaluations) - k))
        max_bytes -= sum(len(line.encode()) for line in lines)
        head = f'"name":{_json(visible(name))},"total":{len(sentences)}'
        body = ",\n".join(lines)
        splits.append(f'{{{head},"sentences":[\n{body}]}}')
        num_kept.append(len(lines))
    names = _json([visible(name) for name in types])
    data = f'{{"types":{names},"kinds":{_json(_KINDS)},"splits":[{",".join(splits)}]}}'
    return data, num_kept


def _choose(sentences: Sequence[Sentence], index: Mapping[str, int], max_bytes: int) -> list[str]:
    """The sentences that there is room for, encoded, in order; those with errors go first."""
    has_error = [any(kind != "correct" for *_, kind in s["matches"]) for s in sentences]
    kept = {}
    for n in sorted(range(len(sentences)), key=lambda n: not has_error[n]):
        line = _encode(n + 1, sentences[n], index)
        max_bytes -= len(line.encode())
        if max_bytes < 0:
            break
        kept[n] = line
    return [kept[n] for n in sorted(kept)]


def _encode(number: int, sentence: Sentence, index: Mapping[str, int]) -> str:
    """A sentence as JSON: number, line, document, words, gold, predicted, matches, perhaps other.

    Types and kinds are indices, a confidence has four digits.
    """

    def entities(name: str) -> list[list[Any]]:
        return [
            [start, end, index[kind], *(None if s is None else round(s, 4) for s in score)]
            for start, end, kind, *score in sentence[name]
        ]

    return _json(
        [
            *(number, sentence["line"], sentence["document"], sentence["words"]),
            *(entities("gold"), entities("predicted")),
            [
                [gold, predicted, _KINDS.index(kind)]
                for gold, predicted, kind in sentence["matches"]
            ],
            *([entities("other")] if "other" in sentence else []),
        ]
    )


def _json(value: Any) -> str:
    """JSON in which nothing ends the element that it stands in, or is anything but data there."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return re.sub("[<>&\u2028\u2029\ud800-\udfff]", lambda m: f"\\u{ord(m[0]):04x}", text)
