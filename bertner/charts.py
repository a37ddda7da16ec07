"""Charts as SVG to stand in a page: numbers in, markup out.

They are drawn by matplotlib, with a stand-in for every colour that then becomes a variable of the
page's style sheet, so that a chart follows the page into dark. Text stays text. There are no
`style` attributes, so that a page may forbid them. The same numbers give the same bytes.

matplotlib (the extra `report`) is imported when the first chart is drawn.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# What a style sheet has to give a colour to, as the variable `--NAME`. `series-…` are lines and
# marks; `kind-…` follow the kinds of errors in the order of `html_report.KINDS`.
COLOURS = (
    *("ink", "muted", "rule", "good", "bad"),
    *(f"series-{k}" for k in range(4)),
    *(f"kind-{k}" for k in range(6)),
)
_STAND_IN = {name: f"#0000{k:02x}" for k, name in enumerate(COLOURS, 1)}
_VARIABLE = {colour: f"var(--{name})" for name, colour in _STAND_IN.items()}

# All sizes are pixels of the drawing, which fits a phone; where there is room it is shown larger.
_WIDTH = 400
_SCALE = 1.15
_WIDE = 480  # is not to be shrunk to fit
_FONT_SIZE = 12
_MARKERS = "oDs^"
_DASHES = ("-", "--", "-.", ":")
_MAX_LABEL = 22  # characters


@dataclass(frozen=True)
class Line:
    """A curve.

    Attributes:
        label: For the legend.
        x: Ascending.
        y: As many.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Marks:
    """A mark in each row of an `interval_chart`.

    Attributes:
        label: For the legend.
        values: One a row.
        intervals: One a row, low and high; None where there are none.
    """

    label: str
    values: Sequence[float]
    intervals: Sequence[tuple[float, float] | None] = ()


def can_draw() -> bool:
    """Whether matplotlib is installed, and can be imported."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def line_chart(
    name: str, title: str, description: str, lines: Sequence[Line], *, x_label: str, y_label: str
) -> str:
    """Curves over a common axis.

    Args:
        name: The chart's id in its page.
        title: Its name for those who do not see it.
        description: What it shows, for the same.
        lines: The curves.
        x_label: Name of the horizontal axis.
        y_label: Name of the vertical axis.
    """
    from matplotlib.ticker import MaxNLocator

    # Of a very small quantity, as a rate is, the power of ten stands beside the axis.
    highest = max(abs(value) for line in lines for value in line.y)
    exponent = math.floor(math.log10(highest)) if 0 < highest < 0.01 else 0
    with _drawing(name, _WIDTH, 270) as figure:
        axes = figure.subplots()
        for k, line in enumerate(lines):
            values = [value / 10**exponent for value in line.y]
            marker = _MARKERS[k] if len(line.x) <= 12 else ""
            colour = _STAND_IN[f"series-{k}"]
            style: dict[str, Any] = {"color": colour, "linestyle": _DASHES[k], "linewidth": 1.8}
            style |= {"marker": marker, "clip_on": False}
            axes.plot(line.x, values, label=_label(line.label), **style)
        axes.set_xlim(left=0)
        if highest > 1:
            axes.set_ylim(bottom=0)
        axes.grid(axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(_thousands)
        axes.yaxis.set_major_formatter(_thousands)
        axes.set_xlabel(x_label)
        axes.set_ylabel(f"{y_label} (1e{exponent})" if exponent else y_label)
        if len(lines) > 1:
            _legend(axes, 2 if len(lines) > 3 else len(lines))
        return _markup(figure, name, title, description)


def interval_chart(
    name: str,
    title: str,
    description: str,
    rows: Sequence[str],
    series: Sequence[Marks],
    *,
    x_label: str,
    zero: bool = False,
) -> str:
    """Scores, a row for each thing scored, with intervals where there are any.

    Args:
        name: The chart's id in its page.
        title: Its name for those who do not see it.
        description: What it shows, for the same.
        rows: Names of the rows, from above.
        series: At most three marks in each row, one below the other.
        x_label: Name of the axis.
        zero: The values are differences: draw a line at zero. Else they are shares, up to 1.
    """
    from matplotlib.ticker import MaxNLocator

    step = 0.25 if len(series) > 1 else 0.0
    row_height = 46 if len(series) > 1 else 30
    with _drawing(name, _WIDTH, 72 + row_height * len(rows)) as figure:
        axes = figure.subplots()
        ends: list[float] = []
        for k, marks in enumerate(series):
            offset = (k - (len(series) - 1) / 2) * step
            colour = _STAND_IN[f"series-{k}"]
            y = [row + offset for row in range(len(rows))]
            style: dict[str, Any] = {"color": colour, "linestyle": "none", "markersize": 6.5}
            style |= {"marker": _MARKERS[k], "clip_on": False}
            axes.plot(marks.values, y, label=_label(marks.label), **style)
            ends += marks.values
            for row, interval in zip(y, marks.intervals, strict=False):
                if interval is not None:
                    axes.plot(interval, [row, row], color=colour, linewidth=2, marker="")
                    ends += interval
        if zero:
            reach = max([abs(end) for end in ends if math.isfinite(end)], default=0) or 0.01
            axes.set_xlim(-1.1 * reach, 1.1 * reach)
            axes.axvline(0, color=_STAND_IN["muted"], linewidth=1)
        else:
            low = math.floor(10 * min(ends, default=0) - 0.2) / 10
            axes.set_xlim(min(max(low, 0.0), 0.9), 1.005)
        _name_rows(axes, rows)
        for row in range(1, len(rows)):
            axes.axhline(row - 0.5, color=_STAND_IN["rule"], linewidth=0.8)
        axes.grid(axis="x")
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.set_xlabel(x_label)
        if len(series) > 1:
            _legend(axes, len(series))
        return _markup(figure, name, title, description)


def stacked_bars(
    name: str,
    title: str,
    description: str,
    rows: Sequence[str],
    parts: Mapping[str, Sequence[int]],
    colours: Sequence[str],
    *,
    x_label: str,
) -> str:
    """Counts, a bar for each row, made of parts; its sum stands at its end.

    Args:
        name: The chart's id in its page.
        title: Its name for those who do not see it.
        description: What it shows, for the same.
        rows: Names of the rows, from above.
        parts: By name, a count for each row.
        colours: One of `COLOURS` for each part.
        x_label: Name of the axis.
    """
    from matplotlib.ticker import MaxNLocator

    with _drawing(name, _WIDTH, 96 + 30 * len(rows)) as figure:
        axes = figure.subplots()
        ends = [0] * len(rows)
        for (part, counts), colour in zip(parts.items(), colours, strict=True):
            style: dict[str, Any] = {"color": _STAND_IN[colour], "height": 0.62}
            axes.barh(range(len(rows)), counts, left=ends, label=_label(part), **style)
            ends = [end + count for end, count in zip(ends, counts, strict=True)]
        for row, end in enumerate(ends):
            axes.annotate(f"{end:,}", (end, row), (5, 0), textcoords="offset points", va="center")
        axes.set_xlim(0, 1.12 * max([*ends, 1]))
        _name_rows(axes, rows)
        axes.grid(axis="x")
        axes.xaxis.set_major_formatter(_thousands)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel(x_label)
        _legend(axes, 3)
        return _markup(figure, name, title, description)


def heat_map(
    name: str,
    title: str,
    description: str,
    labels: Sequence[str],
    counts: Sequence[Sequence[int]],
) -> str:
    """Counts of gold types (rows) predicted as types (columns).

    What lies on the diagonal is right, and faint: the eye is for the rest, which is darker the
    more there is of it.

    Args:
        name: The chart's id in its page.
        title: Its name for those who do not see it.
        description: What it shows, for the same.
        labels: Of rows and columns; the last stands for no entity.
        counts: As many rows of as many.
    """
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Rectangle

    size = len(labels)
    cell = max(26.0, min(52.0, 320 / size))
    worst = max([counts[i][j] for i in range(size) for j in range(size) if i != j], default=0)
    names = [_label(label) for label in labels]
    longest = 7.5 * max(map(len, names))
    is_steep = longest > cell
    width = 50 + longest + cell * size
    height = 50 + (0.8 * longest if is_steep else 15) + max(28.0, cell * 0.72) * size
    cells, paints = [], []
    with _drawing(name, width, height) as figure:
        axes = figure.subplots()
        for i in range(size):
            for j in range(size):
                count = counts[i][j]
                if i == j == size - 1:  # neither annotated nor predicted: not an entity
                    continue
                cells.append(Rectangle((j - 0.47, i - 0.46), 0.94, 0.92))
                colour, strength = ("good", 0.22) if i == j else ("bad", 0.6 * count / (worst or 1))
                paints.append(to_rgba(_STAND_IN[colour], strength if count else 0.04))
                if count:
                    fits = len(f"{count:,}") * 7 < cell
                    text = f"{count:,}" if fits else f"{count / 1000:.0f}k"
                    axes.text(j, i, text, ha="center", va="center", fontsize=11)
        axes.add_collection(PatchCollection(cells, facecolors=paints, linewidths=0))
        axes.set_xticks(range(size), names)
        if is_steep:
            axes.tick_params(axis="x", labelrotation=45)
            for label in axes.get_xticklabels():
                label.set_horizontalalignment("left")
        axes.set_xlim(-0.5, size - 0.5)
        _name_rows(axes, labels)
        axes.xaxis.tick_top()
        axes.xaxis.set_label_position("top")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("predicted")
        axes.set_ylabel("gold")
        return _markup(figure, name, title, description)


def reliability_diagram(
    name: str, title: str, description: str, bins: Sequence[Mapping[str, float]]
) -> str:
    """Share of correct entities against confidence, and how many there are, by bins of confidence.

    Args:
        name: The chart's id in its page.
        title: Its name for those who do not see it.
        description: What it shows, for the same.
        bins: With `low`, `high`, `count`, `confidence` (mean) and `precision`.
    """
    with _drawing(name, _WIDTH, 430) as figure:
        above, below = figure.subplots(2, sharex=True, gridspec_kw={"height_ratios": [3, 1]})
        above.plot([0, 1], [0, 1], color=_STAND_IN["muted"], linestyle="--", linewidth=1)
        colour = _STAND_IN["series-0"]
        for bin_ in bins:
            interval = wilson_interval(bin_["precision"], bin_["count"])
            x = bin_["confidence"]
            above.plot([x, x], interval, color=colour, linewidth=2)
        x_values = [bin_["confidence"] for bin_ in bins]
        style: dict[str, Any] = {
            "color": colour,
            "marker": "o",
            "linewidth": 1.2,
            "markersize": 6.5,
        }
        above.plot(x_values, [bin_["precision"] for bin_ in bins], **style)
        above.set_ylim(-0.02, 1.02)
        above.set_xlim(-0.02, 1.02)
        above.grid()
        above.set_ylabel("share correct")
        widths = [0.92 * (bin_["high"] - bin_["low"]) for bin_ in bins]
        middles = [(bin_["low"] + bin_["high"]) / 2 for bin_ in bins]
        below.bar(middles, [bin_["count"] for bin_ in bins], widths, color=_STAND_IN["muted"])
        below.grid(axis="y")
        below.yaxis.set_major_formatter(_thousands)
        below.set_ylabel("entities")
        below.set_xlabel("confidence")
        return _markup(figure, name, title, description)


def wilson_interval(share: float, count: float, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share of `count` independent cases (Wilson 1927)."""
    if count <= 0:
        return 0.0, 1.0
    centre = share + z * z / (2 * count)
    reach = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - reach) / scale), min(1.0, (centre + reach) / scale)


def _thousands(value: float, _position: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


def _label(text: str) -> str:
    """Text that fits beside a chart, and into XML."""
    short = text if len(text) <= _MAX_LABEL else text[: _MAX_LABEL - 1] + "…"
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in short)


def _name_rows(axes: Axes, rows: Sequence[str]) -> None:
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0, labelcolor=_STAND_IN["ink"])


def _legend(axes: Axes, columns: int) -> None:
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        ncols=columns,
        handlelength=1.6,
        columnspacing=1.4,
        borderaxespad=0.2,
    )


@contextmanager
def _drawing(name: str, width: float, height: float) -> Iterator[Figure]:
    """An empty figure, and the settings under which it is drawn."""
    import matplotlib
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "text.parse_math": False,  # a type may have dollars in its name
        "font.size": _FONT_SIZE,
        "axes.labelsize": _FONT_SIZE,
        "axes.edgecolor": _STAND_IN["rule"],
        "axes.facecolor": "none",
        "axes.labelcolor": _STAND_IN["muted"],
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.facecolor": "none",
        "grid.color": _STAND_IN["rule"],
        "legend.frameon": False,
        "legend.fontsize": _FONT_SIZE,
        "legend.labelcolor": _STAND_IN["ink"],
        "lines.markersize": 5.0,
        "text.color": _STAND_IN["ink"],
        "xtick.color": _STAND_IN["rule"],
        "xtick.labelcolor": _STAND_IN["muted"],
        "ytick.color": _STAND_IN["rule"],
        "ytick.labelcolor": _STAND_IN["muted"],
    }
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()  # whatever the user's own settings are
        matplotlib.rcParams.update(settings)
        # The reader's fonts may have what ours, of which only widths are taken, has not.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")


def _markup(figure: Figure, name: str, title: str, description: str) -> str:
    """The figure as an `svg` element to stand in HTML, named and described."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", metadata=nothing)
    drawn = ElementTree.fromstring(file.getvalue())
    used = set(re.findall(r"#([\w-]+)", file.getvalue()))
    width, height = map(float, drawn.attrib["viewBox"].split()[2:])
    root = ElementTree.Element(
        "svg",
        {
            "viewBox": drawn.attrib["viewBox"],
            "width": f"{width * _SCALE:.0f}",
            "height": f"{height * _SCALE:.0f}",
            "class": "chart wide" if width > _WIDE else "chart",
            "role": "img",
            "aria-labelledby": f"{name}-title {name}-description",
        },
    )
    ElementTree.SubElement(root, "title", id=f"{name}-title").text = title
    ElementTree.SubElement(root, "desc", id=f"{name}-description").text = description
    for child in drawn:
        if (kept := _plain(child, used)) is not None:
            root.append(kept)
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)


def _plain(element: ElementTree.Element, used: set[str]) -> ElementTree.Element | None:
    """An element without namespaces, style attributes, and ids that nothing refers to."""
    tag = element.tag.rpartition("}")[2]
    if tag in ("metadata", "style"):
        return None
    attributes: dict[str, str] = {}
    for key, value in element.attrib.items():
        if key == "style":
            attributes |= _presentation(value)
        elif key.endswith("}href"):
            attributes["href"] = value
        elif key == "id":
            if value in used:
                attributes["id"] = value
        elif not value.startswith("rotate(-0 "):
            attributes[key] = re.sub(r"-?\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}", value)
            attributes[key] = " ".join(attributes[key].split())
    plain = ElementTree.Element(tag, attributes)
    plain.text = (element.text or "").strip() or None
    for child in element:
        if (kept := _plain(child, used)) is not None:
            # A group of one that says nothing is its content.
            plain.append(
                kept[0] if kept.tag == "g" and not kept.attrib and len(kept) == 1 else kept
            )
    return None if tag == "g" and not len(plain) else plain


def _presentation(style: str) -> dict[str, str]:
    """The declarations of a style as attributes, colours as variables; fonts are the page's."""
    declarations = (part.partition(":")[::2] for part in style.split(";"))
    pairs = {key.strip(): value.strip() for key, value in declarations}
    return {
        key: _VARIABLE.get(value, value) for key, value in pairs.items() if key != "font-family"
    }
