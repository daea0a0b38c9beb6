"""A sweep → report.html and report.md in its folder, at any time: while it goes on, after failures,
with one seed or none.

    html, markdown = write_report(Path("runs/table3"))

The page is one file without scripts, with nothing to fetch, in light and dark, fit for print. Both
files hold the same tables and sentences, and the same bytes for the same sweep: what they say comes
from its folder alone. They name no local path and no user.
"""

from __future__ import annotations

from pathlib import Path

from gapo_lite import report_figures as figures
from gapo_lite import report_tables as tables
from gapo_lite.outputs import whole_file
from gapo_lite.report_blocks import (
    Bullets,
    Figures,
    Paragraph,
    Section,
    Table,
    as_html,
    as_markdown,
)
from gapo_lite.report_verdict import Comparison, cautions, compare, headline, num_heldout, verdict
from gapo_lite.sweep_results import SweepResults, read_sweep_results

__all__ = ["SweepResults", "read_sweep_results", "sections_of", "write_report"]

_FOOTER = (
    "Made by gapo-lite report with GaPO-Lite, an implementation of Gap-Aware Preference "
    "Optimization (OpenReview N2sN3LESoW)."
)


def write_report(folder: Path) -> tuple[Path, Path]:
    """Writes both files of a sweep's folder; each is replaced whole or not at all.

    Returns:
        report.html and report.md.

    Raises:
        RunError: it is not a sweep's folder, or the disk is full, read-only or not this user's.
        ConfigError: its sweep.yaml is damaged.
    """
    results = read_sweep_results(folder)
    sections, title = sections_of(results), f"Sweep {results.name}"
    page, markdown = folder / "report.html", folder / "report.md"
    with whole_file(page) as part, whole_file(markdown) as other:
        part.write_text(as_html(title, sections, _FOOTER), encoding="utf-8")
        other.write_text(as_markdown(title, sections, _FOOTER), encoding="utf-8")
    return page, markdown


def sections_of(results: SweepResults) -> list[Section]:
    """All that is said, the head of the page first."""
    comparisons = compare(results)
    found = [
        _head(results, comparisons),
        _verdicts(results, comparisons),
        _results(results),
        _differences(results, comparisons),
        _quality(results),
        _pairs(results),
        _deciles(results),
        _agreement(results),
        _reading(results, comparisons),
        _making(results),
        _troubles(results),
    ]
    return [one for one in found if one]


def _head(results: SweepResults, comparisons: list[Comparison]) -> Section:
    return Section(
        "",
        (
            Paragraph(headline(results, comparisons), lead=True),
            Paragraph(f"{tables.what_was_run(results)} {tables.progress(results)}"),
        ),
    )


def _verdicts(results: SweepResults, comparisons: list[Comparison]) -> Section | None:
    held = num_heldout(results)
    told = tuple(verdict(one, len(comparisons), held) for one in comparisons)
    return Section(f"Against {results.baseline}", (Bullets(told),)) if told else None


def _results(results: SweepResults) -> Section | None:
    if not results.finished:
        return Section("Runs", (tables.results_table(results),))
    words = "Means over seeds, with ± half of the 95 % interval where there are enough of them."
    return Section("Results", (Paragraph(words), tables.results_table(results)))


def _differences(results: SweepResults, comparisons: list[Comparison]) -> Section | None:
    if not any(one.differences["accuracy"].num for one in comparisons):
        return None
    shown = figures.difference_figures(results, comparisons)
    return Section("Differences, seed by seed", (shown, tables.differences_table(comparisons)))


def _quality(results: SweepResults) -> Section | None:
    if not any(one.values("accuracy") for one in results.contenders):
        return None
    return Section("Quality, drift and length", (figures.quality_figures(results),))


def _pairs(results: SweepResults) -> Section | None:
    shown = tuple(
        one for one in (figures.ef_figures(results), figures.margin_figures(results)) if one
    )
    return Section("The pairs, and what was asked of them", shown) if shown else None


def _deciles(results: SweepResults) -> Section | None:
    blocks: list[Figures | Table] = []
    if shown := figures.decile_figures(results):
        blocks.append(shown)
    if table := tables.deciles_table(results):
        blocks.append(table)
    return Section("Accuracy by how alike a pair is", tuple(blocks)) if blocks else None


def _agreement(results: SweepResults) -> Section | None:
    table = tables.agreement_table(results.agreement) if results.agreement else None
    if table is None or results.agreement is None:
        return None
    words = str(results.agreement.get("sentence") or "")
    words += (
        " ρ is Spearman's rank correlation of a metric's gap with the judgement that the data came "
        "with, before anything was trained; in brackets its 95 % interval over prompts."
    )
    return Section("Do the gaps follow the data's judgement?", (Paragraph(words.strip()), table))


def _reading(results: SweepResults, comparisons: list[Comparison]) -> Section | None:
    if not results.finished:
        return None
    return Section("How to read this", (Bullets(cautions(results, comparisons)),))


def _making(results: SweepResults) -> Section:
    return Section("How it was made", (tables.facts(results), tables.settings_table(results)))


def _troubles(results: SweepResults) -> Section | None:
    told = tables.troubles(results)
    return Section("What went wrong", (Bullets(told),)) if told else None
