"""A comparison for people (a table, Markdown) and for machines (JSON, JUnit XML)."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from rich.markup import escape
from rich.table import Table

from autoglm_compress.comparison.compare import Accuracy, Comparison, Measure
from autoglm_compress.comparison.verdict import Verdict
from autoglm_compress.errors import UserError

COLUMNS = ("base", "new", "change", "between", "verdict")
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
    """A sentence on each gated measure, on what was not compared, and on what the bounds are."""
    percent = f"{100 * comparison.limits.confidence:g} %"
    lines = [
        f"{measure.name}: {measure.gate.verdict.value}: {_reason(measure, percent)}" for measure in comparison.gated
    ]
    if comparison.not_compared:
        lines.append(f"not compared, for want of single answers: {', '.join(comparison.not_compared)}")
    lines.append(f"between: the bounds of the true change, each of which holds with {percent} confidence")
    return lines


def as_data(comparison: Comparison) -> dict[str, Any]:
    """Plain data: accuracies in percent, their changes in points, changes of perplexity in percent."""
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
    verdicts = [measure.gate.verdict for measure in comparison.gated if measure.gate]
    suite = ElementTree.Element(
        "testsuite",
        name="autoglm-compress compare",
        tests=str(len(verdicts)),
        failures=str(verdicts.count(Verdict.failed)),
        errors="0",
        skipped=str(verdicts.count(Verdict.undecided)),
    )
    percent = f"{100 * comparison.limits.confidence:g} %"
    for measure in comparison.gated:
        case = ElementTree.SubElement(suite, "testcase", classname=str(comparison.new.path), name=measure.name)
        outcome = {Verdict.failed: "failure", Verdict.undecided: "skipped"}.get(measure.gate.verdict)
        if outcome:
            ElementTree.SubElement(case, outcome, message=_reason(measure, percent))
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
    verdict = measure.gate.verdict.value if measure.gate else ""
    if isinstance(measure, Accuracy):
        values = f"{measure.base:.1f}%", f"{measure.new:.1f}%", f"{measure.change:+.1f}"
        return *values, f"{measure.low:+.1f} to {measure.high:+.1f}", verdict
    values = f"{measure.base:.2f}", f"{measure.new:.2f}", f"{measure.change:+.1f}%"
    return *values, f"{measure.low:+.1f}% to {measure.high:+.1f}%", verdict


def _reason(measure: Measure, percent: str) -> str:
    """Why a gated measure has its verdict."""
    gate = measure.gate
    if isinstance(measure, Accuracy):
        best, worst, allowed, unit, asked = measure.high, measure.low, -gate.limit or 0.0, "points", "questions"
        detail = (
            f"of {measure.count:,} questions {measure.lost:,} lost, {measure.won:,} won, "
            f"McNemar p = {measure.p_value:.2g}"
        )
        if measure.same:
            return f"not one log-likelihood changed; {detail}"
    else:
        best, worst, allowed, unit, asked = measure.low, measure.high, gate.limit, "%", "rows"
        detail = f"{measure.count:,} rows"
    if gate.verdict is Verdict.passed:
        return f"{worst:+.2f} {unit} at worst ({percent} confidence), within the allowed {allowed:+g}; {detail}"
    if gate.verdict is Verdict.failed:
        return f"{best:+.2f} {unit} at best ({percent} confidence), beyond the allowed {allowed:+g}; {detail}"
    more = (
        f"about {gate.needed:,} {asked} would decide it if the rest differ as these do"
        if gate.needed
        else f"more {asked} like these would not decide it"
    )
    between = f"between {worst:+.2f} and {best:+.2f} {unit} (each with {percent} confidence), {allowed:+g} is allowed"
    return f"{between}; {detail}; {more}"
