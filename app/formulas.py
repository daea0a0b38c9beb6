"""The formula of an objective with what its letters mean, as HTML."""

from __future__ import annotations

import re
from typing import Any

from app.notices import as_html
from gapo_lite.objectives import OBJECTIVES

LETTERS = {
    r"\b[aρ]_w|NLL_w|lp_w": "w chosen, l rejected",
    r"\bρ_": "ρ log-probability minus the reference's",
    r"\blp_": "lp log-probability",
    r"\ba_": "a average log-probability per token",
    r"\|y_": "|y| tokens",
    r"\bodds": "odds e^a/(1 − e^a), a the average log-probability per token",
    r"NLL": "NLL negative average log-probability per token",
    r"\bs·": "s β or 1 (margin scale)",
    r"\bz\b": "z KL divergence from the reference",
    r"M₀": "M β(ρ_w − ρ_l), M₀ its running mean",
    r"w_w·": "w_w, w_l how likely the model's own words are",
}
"""Pattern in a formula → what stands there, in words."""


def html(objective: Any) -> str:
    """Of a key of OBJECTIVES; "" for anything else."""
    if not isinstance(objective, str) or objective not in OBJECTIVES:
        return ""
    spec = OBJECTIVES[objective]
    letters = "; ".join(words for found, words in LETTERS.items() if re.search(found, spec.formula))
    number = re.fullmatch(r"\d{4}\.\d{5}", spec.source)
    source = f"arXiv {spec.source}" if number else f"OpenReview {spec.source}"
    reference = "Needs the reference: the model without its adapter."
    about = reference if spec.uses_reference else "Needs no reference model."
    return (
        f'<div class="formula"><code>{_with_indices(spec.formula)}</code>'
        f'<div class="subtle">{_with_indices(letters)}. {about} {as_html(source)}</div></div>'
    )


def _with_indices(text: str) -> str:
    """Escaped, with what follows a low line below the line."""
    return re.sub(r"_(\w)", r"<sub>\1</sub>", as_html(text))
