"""What the command line says and shows: log lines, errors and tables. Imports no torch."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from gapo_lite.errors import RunError

if TYPE_CHECKING:
    import numpy as np

    from gapo_lite.agree import Agreement, Correlation
    from gapo_lite.compare import Comparison, EfGroup
    from gapo_lite.forecast import Forecast
    from gapo_lite.overview import RunOverview
    from gapo_lite.sharing import Shipment
    from gapo_lite.types import LoadedPairs

logger = logging.getLogger(__name__)

_HARMLESS = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}
_HARMLESS |= {0x7F: "\N{SYMBOL FOR DELETE}"}
_HARMLESS |= dict.fromkeys(range(0x80, 0xA0), "\N{REPLACEMENT CHARACTER}")
_PIPE_COLUMNS = 180  # rich takes 80 where there is no terminal, which would cut the tables


def visible(text: str) -> str:
    """Text with its control characters (ESC above all) shown, not obeyed; \\n and \\t stay."""
    return text.translate(_HARMLESS)


def is_main_process() -> bool:
    """Whether this process speaks: the only one, or the first that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def show_error(error: Exception) -> None:
    """`error: …` on stderr.

    Of several processes the first speaks, and any that can fail on its own, as when memory is out.
    """
    if is_main_process():
        print(visible(f"error: {error}"), file=sys.stderr, flush=True)
    elif isinstance(error, RunError):
        print(
            visible(f"error (process {os.environ['RANK']}): {error}"), file=sys.stderr, flush=True
        )


def note(text: str) -> None:
    """A remark on stderr, apart from the answers on stdout."""
    print(visible(text), file=sys.stderr, flush=True)


@contextlib.contextmanager
def log_to_stderr() -> Iterator[None]:
    """Shows what gapo_lite logs: every line, or warnings only on a terminal, which has bars.

    Errors are left to `show_error`: what is logged as one is raised too.
    """
    package = logging.getLogger("gapo_lite")
    handler, level = _StderrHandler(), package.level
    handler.setLevel(logging.WARNING if sys.stderr.isatty() else logging.INFO)
    handler.addFilter(lambda record: is_main_process() and record.levelno < logging.ERROR)
    handler.setFormatter(_Plain())
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)


class _StderrHandler(logging.StreamHandler):
    """To what sys.stderr is at the time: a bar replaces it, so that lines appear above the bar."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stderr


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        return visible(prefix + super().format(record))


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """A table on stdout, its first column on the left, the others on the right; no markup."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, title=Text(title) if title else None, title_justify="left")
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(visible(cell)) for cell in row))
    Console(width=None if sys.stdout.isatty() else _PIPE_COLUMNS, highlight=False).print(table)


def show_scores(
    loaded: LoadedPairs, ef: str, options: Mapping[str, Any], scores: np.ndarray
) -> None:
    """What `gapo-lite score` found: counts, the spread of the scores (N,), and unseen texts.

    Args:
        loaded: the N pairs.
        ef: a key of EVALUATION_FACTORS.
        options: of `ef`, those that are not its defaults.
        scores: (N,).
    """
    import numpy as np

    from gapo_lite.data.report import describe_counts
    from gapo_lite.ef import EVALUATION_FACTORS, check_options, find_unseen

    print(describe_counts(loaded))
    quantiles = np.quantile(scores, [0, 0.1, 0.25, 0.5, 0.75, 0.9, 1])
    names = ("least", "10%", "25%", "median", "75%", "90%", "most")
    spread = "  ".join(f"{name} {value:.4f}" for name, value in zip(names, quantiles, strict=True))
    print(f"{ef}: mean {scores.mean():.4f}  {spread}")
    print(
        f"EF = 0 (nothing in common): {(scores == 0).sum():,}  "
        f"EF = 1 (the same): {(scores == 1).sum():,}"
    )
    if EVALUATION_FACTORS[ef].family != "lexical":
        return
    unseen = find_unseen(
        [p.chosen for p in loaded.pairs],
        [p.rejected for p in loaded.pairs],
        check_options(ef, options)["tokenizer"],
    )
    remedy = "--tokenizer unicode, or --ef bertscore_f1 with a multilingual --model"
    if warning := unseen.warning(ef, remedy):
        logger.warning("%s", warning)


def show_agreement(found: Agreement) -> None:
    """Each metric's rank correlation with the judgement, that of the lengths, and what it says."""
    rows = [
        (row.metric, *_correlation_cells(row.gap), *_correlation_cells(row.at_equal_lengths))
        for row in found.metrics
    ]
    rows.append(("difference of lengths alone", *_correlation_cells(found.length), "", ""))
    interval = "95 % interval"
    title = (
        f"Spearman's ρ of gap and {found.judgement}: {found.num_pairs:,} pairs, "
        f"{found.num_prompts:,} prompts"
    )
    if found.num_unjudged:
        title += f" ({found.num_unjudged:,} pairs without a judgement are left out)"
    show_table(("gap of", "ρ", interval, "ρ at equal lengths", interval), rows, title)
    print(found.sentence)


def _correlation_cells(found: Correlation) -> tuple[str, str]:
    interval = "–" if found.low is None else f"{found.low:+.3f} to {found.high:+.3f}"
    return _number(found.rho, "+.3f"), interval


_COMPARED = (
    ("held-out accuracy", "rewards/accuracies", ".1%"),
    ("reward margin", "rewards/margins", ".4f"),
    ("logps chosen, average per token", "logps/chosen", ".4f"),
    ("logps rejected, average per token", "logps/rejected", ".4f"),
    ("loss", "loss", ".4f"),
)


def show_comparison(comparison: Comparison) -> None:
    """Base and tuned model side by side, then by how alike the pairs are."""
    rows = [
        (label, *_change(comparison.base[key], comparison.tuned[key], style))
        for label, key, style in _COMPARED
    ]
    same = {
        "target margin, in reward units": f"{comparison.target_reward_margin:.4f}",
        "target margin": f"{comparison.target_margin:.4f}",
        "pairs": f"{comparison.num_pairs:,}",
    }
    rows += [(label, value, value, "") for label, value in same.items()]
    title = f"{comparison.run}, step {comparison.step}: {comparison.objective}"
    if comparison.gamma is not None:
        title += f", γ {comparison.gamma:g}"
    show_table(("", "base", "tuned", "change"), rows, title)
    if comparison.by_ef:
        columns = (f"accuracy by {comparison.metric}", "base", "tuned", "change", "pairs")
        show_table(columns, [_group_cells(group) for group in comparison.by_ef])


def _group_cells(group: EfGroup) -> tuple[str, ...]:
    accuracies = _change(group.base_accuracy, group.tuned_accuracy, ".1%")
    return (f"{group.low:.3f} to {group.high:.3f}", *accuracies, f"{group.num_pairs:,}")


def _change(base: float, tuned: float, style: str) -> tuple[str, str, str]:
    return format(base, style), format(tuned, style), format(tuned - base, f"+{style}")


def show_runs(rows: Sequence[RunOverview]) -> None:
    """One line a run, and below what is wrong with damaged ones."""
    settings = ("objective", "EF", "γ", "target", "β")
    results = ("step", "accuracy", "reward margin", "started")
    show_table(("name", "state", *settings, *results), [_run_cells(row) for row in rows])
    for row in rows:
        if row.problem:
            note(f"{row.path} is damaged: {row.problem}")


def show_shipment(shipment: Shipment, name: str, *, private: bool) -> None:
    """What would be uploaded to the repository `name`: files, sizes, licence, who may see it."""
    rows = [(path, f"{size:,}") for path, size in shipment.files.items()]
    rows.append((f"{len(rows)} files", f"{shipment.num_bytes:,}"))
    show_table((f"to {name} on the Hub", "bytes"), rows)
    seen = "only you (--private)" if private else "everybody (--public)"
    licence = shipment.licence or "not known here: see the base model's page"
    note(f"base model: {shipment.base}; licence: {licence}; a new repository is seen by {seen}.")
    if shipment.duties:
        note(shipment.duties)


def show_forecast(forecast: Forecast) -> None:
    """The dials, the memory by what takes it, and the time; says which of it was measured."""
    plan, work, device, gib = forecast.plan, forecast.work, forecast.device, 2**30
    dials = plan.dials
    limits = dials.limits
    hours = f"{_short(plan.hours)} h" if plan.hours >= 1 else f"{_short(plan.hours * 60)} min"
    rows = [
        ("pairs to train on", f"{len(work.lengths):,}"),
        ("tokens a pair", f"{work.lengths.sum(axis=1).mean():,.0f}"),
        ("tokens a forward pass, at most", f"{limits.tokens:,}" if limits.tokens else "–"),
        ("pairs a forward pass, at most", f"{limits.pairs:,}" if limits.pairs else "–"),
        ("layers computed again", f"{dials.recomputed:.0%}"),
        ("their inputs in the host's memory", "yes" if dials.offloaded else "no"),
        ("layout", dials.layout),
        ("4-bit weights kept dequantised", "yes" if dials.dequantized else "no"),
        *((f"memory: {part}", f"{size / gib:.2f} GiB") for part, size in plan.parts.items()),
        ("memory at the peak", f"{plan.peak / gib:.1f} of {device.memory / gib:.0f} GiB"),
        ("pairs a second", f"{plan.pairs_per_second:.2f}"),
        ("tokens a second", f"{plan.tokens_per_second:,.0f}"),
        ("an optimizer step", f"{_short(plan.step_seconds)} s"),
        ("the whole run", hours),
    ]
    show_table(("estimated, not measured", forecast.device.name), rows)
    for name, peak, speed in forecast.measured:
        note(f"measured in the run {name}: {peak:.1f} GiB, {speed:,.0f} tokens a second.")
    if not plan.fits:
        settings = ", ".join(
            f"{key}={'null' if value is None else value}" for key, value in forecast.advice.items()
        )
        remedy = f"It would with {settings}." if settings else "Nothing here helps."
        note(f"This does not fit. {remedy}")


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _run_cells(row: RunOverview) -> list[str]:
    if row.problem:
        return [row.name, row.state, *["–"] * 9]
    return [
        row.name,
        row.state,
        row.objective or "",
        row.metric or "–",
        _number(row.gamma, "g"),
        _number(row.target_reward_margin, ".3g"),
        _number(row.beta, "g"),
        f"{row.step}/{row.total}",
        _number(row.accuracy, ".1%"),
        _number(row.reward_margin, "+.3f"),
        row.started or "",
    ]


def _number(value: float | None, style: str) -> str:
    return "–" if value is None else format(value, style)
