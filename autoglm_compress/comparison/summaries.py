"""A comparison for people (a table, Markdown) and for machines (JSON, JUnit XML)."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from rich.markup import escape
from rich.table import Table

from autoglm_compress.comparison.compare import Comparison
from autoglm_compress.comparison.measure import Accuracy, Gate, Measure, Unit
from autoglm_compress.comparison.verdict import Verdict
from autoglm_compress.errors import UserError

COLUMNS = ("base", "new", "change", "between", "verdict")


@dataclass(frozen=True)
class Style:
    """Formats for values of a unit and for their changes, in a table and in a sentence that names the unit."""

    value: Callable[[float], str]
    change: Callable[[float], str]
    precise: Callable[[float], str]
    unit: str
    counted: str


STYLE_OF = {
    Unit.percent_right: Style("{:.1f}%".format, "{:+.1f}".format, "{:+.2f}".format, "points", "questions"),
    Unit.perplexity: Style("{:.2f}".format, "{:+.1f}%".format, "{:+.2f}".format, "%", "rows"),
    Unit.nats: Style("{:.4f}".format, "{:+.4f}".format, "{:+.4f}".format, "nats", "rows"),
    Unit.percent_of_tokens: Style("{:.1f}%".format, "{:+.1f}".format, "{:+.2f}".format, "%", "rows"),
    Unit.own: Style("{:.4f}".format, "{:+.4f}".format, "{:+.4f}".format, "", "documents"),
}
STYLES = {Verdict.passed: "green", Verdict.failed: "red", Verdict.undecided: "yellow"}


def comparison_table(comparison: Comparison) -> Table:
    """The table that `compare` prints, which fits 80 columns."""
    table = Table(box=None, pad_edge=False, padding=(0, 0, 0, 2), header_style="bold")
    table.add_column("")
    for heading in COLUMNS:
        table.add_column(heading, justify="right")
    for measure in _shown(comparison):
        style = STYLES[measure.gate.verdict] if measure.gate else None
        table.add_row(escape(measure.name), *_cells(measure), style=style)
    return table


def conclusions(comparison: Comparison) -> list[str]:
    """One sentence for each gated measure, for tasks that were not compared, and for the meaning of the bounds."""
    percent = f"{100 * comparison.limits.confidence:g} %"
    lines = [
        f"{measure.name}: {gate.verdict.value}: {_reason(measure, gate, percent)}" for measure, gate in comparison.gated
    ]
    if comparison.not_compared:
        lines.append(f"not compared, since only one file has them: {', '.join(comparison.not_compared)}")
    absolute = any(measure.absolute for measure in comparison.measures)
    of = "of the true change" + (" (of divergence and agreement, of the new model's value)" if absolute else "")
    lines.append(f"between: the bounds {of}, each of which holds with {percent} confidence")
    return lines


def as_data(comparison: Comparison) -> dict[str, Any]:
    """Plain data: accuracies and agreement in percent, their changes in points, changes of perplexity in percent."""
    return {
        "verdict": comparison.verdict.value,
        "base": str(comparison.base.path),
        "new": str(comparison.new.path),
        "limits": asdict(comparison.limits),
        "measures": [asdict(measure) for measure in comparison.measures],
        "not_compared": list(comparison.not_compared),
    }


def as_json(comparison: Comparison) -> str:
    """`as_data` as text."""
    return json.dumps(as_data(comparison), indent=2, ensure_ascii=False) + "\n"


def as_markdown(comparison: Comparison) -> str:
    """A summary for the page of a CI job."""
    rows = [("", *COLUMNS), ("---", *["---:"] * len(COLUMNS))]
    rows += [(measure.name.replace("|", "\\|"), *_cells(measure)) for measure in _shown(comparison)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    sentences = "\n".join(f"- {line}" for line in conclusions(comparison))
    title = f"### {comparison.verdict.value}: {comparison.new.path} against {comparison.base.path}"
    return f"{title}\n\n{table}\n\n{sentences}\n"


def as_junit(comparison: Comparison) -> str:
    """A test case for each gated measure; an undecided one counts as skipped."""
    verdicts = [gate.verdict for _, gate in comparison.gated]
    suite = ElementTree.Element(
        "testsuite",
        name="autoglm-compress compare",
        tests=str(len(verdicts)),
        failures=str(verdicts.count(Verdict.failed)),
        errors="0",
        skipped=str(verdicts.count(Verdict.undecided)),
    )
    percent = f"{100 * comparison.limits.confidence:g} %"
    for measure, gate in comparison.gated:
        case = ElementTree.SubElement(suite, "testcase", classname=str(comparison.new.path), name=measure.name)
        outcome = {Verdict.failed: "failure", Verdict.undecided: "skipped"}.get(gate.verdict)
        if outcome:
            ElementTree.SubElement(case, outcome, message=_reason(measure, gate, percent))
    suites = ElementTree.Element("testsuites")
    suites.append(suite)
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def write_summary(path: Path, text: str) -> None:
    """Write one of the summaries.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot write there: {error.strerror or error}. Give another file.") from None


def _shown(comparison: Comparison) -> list[Measure]:
    """Categories and totals, and the subjects if none is in a category."""
    grouped = any(measure.level == "category" for measure in comparison.measures)
    return [measure for measure in comparison.measures if not (grouped and measure.level == "subject")]


def _cells(measure: Measure) -> tuple[str, ...]:
    style = STYLE_OF[measure.unit]
    base = "" if measure.base is None else style.value(measure.base)
    change = "" if measure.change is None else style.change(measure.change)
    bounds = style.value if measure.absolute else style.change
    between = "" if measure.low is None or measure.high is None else f"{bounds(measure.low)} to {bounds(measure.high)}"
    return base, style.value(measure.new), change, between, measure.gate.verdict.value if measure.gate else ""


def _reason(measure: Measure, gate: Gate, percent: str) -> str:
    """Why a gated measure has its verdict."""
    style = STYLE_OF[measure.unit]
    unit = f" {style.unit}" if style.unit else ""
    bounds = f" ({percent} confidence)"
    if measure.low is None or measure.high is None:
        bounds = " (one number, nothing is known of chance)"
        worst = best = measure.new if measure.absolute or measure.change is None else measure.change
    else:
        worst, best = (measure.low, measure.high) if measure.higher_is_better else (measure.high, measure.low)
    detail = _counted(measure, style.counted)
    if isinstance(measure, Accuracy) and measure.same:
        return f"not one log-likelihood changed{detail}"
    written = "{:.4g}".format if measure.absolute else style.precise
    if measure.absolute:
        allowed = f"{gate.limit:g}"
    else:
        allowed = f"{-gate.limit or 0.0 if measure.higher_is_better else gate.limit:+g}"
    if gate.verdict is Verdict.passed:
        return f"{written(worst)}{unit} at worst{bounds}, within the allowed {allowed}{detail}"
    if gate.verdict is Verdict.failed:
        return f"{written(best)}{unit} at best{bounds}, beyond the allowed {allowed}{detail}"
    more = (
        f"about {gate.needed:,} {style.counted} would decide it if the rest differ as these do"
        if gate.needed
        else f"more {style.counted} like these would not decide it"
    )
    between = f"between {written(worst)} and {written(best)}{unit} (each with {percent} confidence)"
    return f"{between}, {allowed} is allowed{detail}; {more}"


def _counted(measure: Measure, noun: str) -> str:
    """The numbers behind the verdict."""
    if isinstance(measure, Accuracy):
        return (
            f"; of {measure.count:,} {noun} {measure.lost:,} lost, {measure.won:,} won, "
            f"McNemar p = {measure.p_value:.2g}"
        )
    return "" if measure.count is None else f"; {measure.count:,} {noun}"
