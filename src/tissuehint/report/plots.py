"""Training curves as inline SVG: they follow the colours of the page and weigh little."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from tissuehint.report.markup import Markup, join, tag
from tissuehint.report.record import Curves, Point, stage_title

WIDTH, HEIGHT = 520, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 40
MOST_POINTS = 300
MARKED_POINTS = 40  # so few points get a dot each


@dataclass(frozen=True)
class _Frame:
    """Data ranges of a chart and where they lie on the drawing (user units, y down)."""

    x_ticks: tuple[float, ...]
    y_ticks: tuple[float, ...]

    def x(self, value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * _share(value, self.x_ticks)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * _share(value, self.y_ticks)


def training_charts(stage: str, curves: Curves) -> list[Markup]:
    """One chart of the losses of a stage and one of its validation scores; those without values are left out."""
    title = stage_title(stage)
    losses = {name: points for name, points in curves.series.items() if "loss" in name.lower()}
    scores = {name: points for name, points in curves.series.items() if name.startswith("val_") and name not in losses}
    lost = {name: count for name, count in curves.not_finite.items() if "loss" in name or name.startswith("val_")}
    charts = []
    if losses:
        charts.append(line_chart(f"{title}: loss", losses, curves.axis, best=None))
    if scores:
        charts.append(line_chart(f"{title}: validation", scores, curves.axis, best="val_miou"))
    if lost:
        told = ", ".join(f"{name} ({count})" for name, count in lost.items())
        charts.append(tag("p", f"{title}: values that are not finite and not drawn: {told}.", class_="warning"))
    return charts


def line_chart(title: str, series: Mapping[str, Sequence[Point]], axis: str, best: str | None) -> Markup:
    """Lines over steps or epochs, with a legend and a spoken summary.

    Args:
        title: heading of the figure.
        series: name -> points (x, y), x rising; at least one point in all.
        axis: name of the x axis.
        best: the series whose highest point is marked, where it is there.
    """
    drawn = {name: _thinned(points) for name, points in series.items()}
    points = [point for line in drawn.values() for point in line]
    frame = _Frame(ticks(*_range(x for x, _ in points), whole=True), ticks(*_range(y for _, y in points)))
    body = [_grid(frame, axis)]
    body += [_line(name, line, index, frame) for index, (name, line) in enumerate(drawn.items())]
    told = [f"{name} from {line[0][1]:.3g} to {line[-1][1]:.3g}" for name, line in series.items()]
    marked = series.get(best or "")
    if marked:
        x, y = max(marked, key=lambda point: point[1])
        body.append(tag("circle", cx=_unit(frame.x(x)), cy=_unit(frame.y(y)), r=5, class_="best"))
        told.append(f"best {best} {y:.3f} at {axis} {x:g}")
    summary = "; ".join(told)
    svg = tag("svg", *body, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=f"{title}. {summary}.")
    legend = [
        tag("li", tag("span", class_=f"key series-{index % 6}"), name, _thinning(series[name]))
        for index, name in enumerate(drawn)
    ]
    if marked:
        legend.append(tag("li", tag("span", class_="key ring"), told[-1]))
    caption = tag("figcaption", tag("strong", title), tag("ul", *legend, class_="keys"))
    return tag("figure", caption, svg, class_="chart")


def ticks(low: float, high: float, count: int = 5, whole: bool = False) -> tuple[float, ...]:
    """Round numbers (1, 2 or 5 times a power of ten apart) whose span holds [low, high].

    Example:
        >>> ticks(0.13, 0.88)
        (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    """
    if high - low <= max(1e-12 * max(abs(low), abs(high)), 1e-300):
        # a flat line: room above and below
        room = max(abs(low) * 0.1, 1.0 if whole else 1e-3)
        low, high = low - room, high + room
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * (1 - 1e-9))
    step = max(step, 1.0) if whole else step
    first = math.floor(low / step + 1e-9)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    return tuple(round(index * step, _decimals(step)) for index in range(first, last + 1))


def _decimals(step: float) -> int:
    """Decimals that tell numbers one step apart."""
    return max(0, -math.floor(math.log10(step) + 1e-9))


def _tick_text(value: float, axis: tuple[float, ...]) -> str:
    decimals = _decimals(axis[1] - axis[0])
    return f"{value:.{decimals}f}" if decimals <= 6 and abs(value) < 1e9 else f"{value:.6g}"


def _grid(frame: _Frame, axis: str) -> Markup:
    parts: list[Markup] = []
    for value in frame.y_ticks:
        y = _unit(frame.y(value))
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(
            tag("text", _tick_text(value, frame.y_ticks), x=LEFT - 7, y=_unit(frame.y(value) + 4), text_anchor="end")
        )
    for value in frame.x_ticks:
        x = _unit(frame.x(value))
        parts.append(tag("line", x1=x, x2=x, y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM + 4, class_="axis"))
        parts.append(tag("text", _tick_text(value, frame.x_ticks), x=x, y=HEIGHT - BOTTOM + 17, text_anchor="middle"))
    base = HEIGHT - BOTTOM
    parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=base, y2=base, class_="axis"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(tag("text", axis, x=_unit(middle), y=HEIGHT - 6, text_anchor="middle", class_="axis-name"))
    return join(parts)


def _line(name: str, points: Sequence[Point], index: int, frame: _Frame) -> Markup:
    places = [(frame.x(x), frame.y(y)) for x, y in points]
    track = " ".join(f"{_unit(x)},{_unit(y)}" for x, y in places)
    kind = f"series-{index % 6}"
    parts = [tag("polyline", points=track, class_=f"line {kind}")]
    if len(points) <= MARKED_POINTS:
        for (x, y), (step, value) in zip(places, points, strict=True):
            told = tag("title", f"{name} {value:.4g} at {step:g}")
            parts.append(tag("circle", told, cx=_unit(x), cy=_unit(y), r=2.6, class_=f"dot {kind}"))
    return join(parts)


def _thinned(points: Sequence[Point]) -> list[Point]:
    """Means of neighbouring points, so that at most ``MOST_POINTS`` stay."""
    size = _group(points)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(fmean(x for x, _ in group), fmean(y for _, y in group)) for group in groups]


def _thinning(points: Sequence[Point]) -> str | None:
    size = _group(points)
    return f" (means of {size} logged values)" if size > 1 else None


def _group(points: Sequence[Point]) -> int:
    return max(1, math.ceil(len(points) / MOST_POINTS))


def _range(values: Iterable[float]) -> tuple[float, float]:
    numbers = list(values)
    return min(numbers), max(numbers)


def _share(value: float, axis: tuple[float, ...]) -> float:
    return (value - axis[0]) / (axis[-1] - axis[0])


def _unit(value: float) -> str:
    return f"{value:.1f}"
