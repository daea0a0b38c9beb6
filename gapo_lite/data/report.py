"""Report: what a source held and what was wrong with it, in words for a person; prints nothing."""

from __future__ import annotations

from collections.abc import Sequence

from gapo_lite.types import LoadedPairs, Problem


def describe_counts(loaded: LoadedPairs) -> str:
    """One line: how many pairs of which shape, and what is noteworthy about them."""
    parts = [f"{_counted(len(loaded.pairs), 'pair')} ({loaded.shape})"]
    if loaded.problems:
        parts.append(f"{_counted(len(loaded.problems), 'row')} unusable")
    if loaded.num_duplicates:
        parts.append(f"{_counted(loaded.num_duplicates, 'duplicate')}")
    if loaded.num_equal:
        parts.append(f"{loaded.num_equal:,} with the same text as chosen and rejected")
    return f"{loaded.source}: {', '.join(parts)}"


def describe_problems(loaded: LoadedPairs, limit: int = 5) -> str:
    """The first unusable rows, one a line, and how many more there are; "" if all are usable."""
    return problem_lines(loaded.source, loaded.problems, limit)


def problem_lines(source: str, problems: Sequence[Problem], limit: int) -> str:
    """`source:line: field: reason`, one a line."""
    lines = [describe_problem(source, problem) for problem in problems[:limit]]
    if len(problems) > limit:
        lines.append(f"… and {len(problems) - limit:,} more")
    return "\n".join(lines)


def describe_problem(source: str, problem: Problem) -> str:
    """One unusable row, in the form in which compilers name a place."""
    place = f"{source}:{problem.line}"
    return ": ".join(part for part in (place, problem.field, problem.reason) if part)


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
