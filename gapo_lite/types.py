"""The values that travel from a file to the loss, in the order of the journey. All are frozen.

    PreferencePair → TokenizedPair → PairBatch → PairLogps → LossOutput

Nothing here imports torch at run time, so that reading and scoring data stays light.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

Message = dict[str, str]
"""One chat turn: {"role": "system" | "user" | "assistant", "content": text}."""


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """One prompt with the preferred and the dispreferred response.

    Attributes:
        prompt: the conversation up to the response, never empty; its last turn is the user's.
        chosen: text of y_w, without template tokens.
        rejected: text of y_l, without template tokens.
        line: 1-based row of the source that the pair came from.
        chosen_rating, rejected_rating: the data's own scores of the responses, where it has them.
        strength: how sure the judge was, in [0, 1], where the data says so.
    """

    prompt: list[Message]
    chosen: str
    rejected: str
    line: int = 0
    chosen_rating: float | None = None
    rejected_rating: float | None = None
    strength: float | None = None

    @property
    def rating_gap(self) -> float:
        """How much better the data say the chosen response is; NaN where they say nothing."""
        if self.chosen_rating is None or self.rejected_rating is None:
            return float("nan")
        return self.chosen_rating - self.rejected_rating


@dataclass(frozen=True, slots=True)
class Problem:
    """A row that could not be used.

    Attributes:
        line: 1-based row of the file (for .jsonl the line, for .csv the record's first line, else
            the record).
        field: the column at fault, "" where it is the row as a whole.
        reason: one sentence for a person.
    """

    line: int
    field: str
    reason: str


@dataclass(frozen=True, slots=True)
class LoadedPairs:
    """What a source held.

    Attributes:
        pairs: the usable rows, in the order of the source.
        problems: the rows that could not be used.
        source: the name that a person gave for it.
        columns: the columns found.
        shape: the shape recognised (a key of data.formats.FORMATS).
        num_duplicates: pairs whose prompt, chosen and rejected all repeat an earlier pair's (kept).
        num_equal: pairs whose chosen and rejected are the same text (kept: EF = 1, margin 0).
    """

    pairs: list[PreferencePair]
    problems: list[Problem]
    source: str
    columns: list[str] = field(default_factory=list)
    shape: str = ""
    num_duplicates: int = 0
    num_equal: int = 0


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """One pair as token ids, each a (length,) int32 array.

    Attributes:
        prompt_ids: the rendered prompt, up to and including the assistant header. Never empty.
        chosen_ids: the scored tokens of the chosen response: its text and one end-of-turn token
            (which is cut off where the response had to be truncated). Never empty.
        rejected_ids: the same of the rejected response.
        margin: target margin, in the units of the objective's log-probabilities.
        reference: the reference's summed log-probabilities of chosen and rejected, for objectives
            that compare with it.
        mismatched: for objectives that estimate a divergence, another pair's responses to this
            prompt.
    """

    prompt_ids: np.ndarray
    chosen_ids: np.ndarray
    rejected_ids: np.ndarray
    margin: float
    reference: tuple[float, float] | None = None
    mismatched: TokenizedPair | None = None

    @property
    def lengths(self) -> tuple[int, int, int]:
        """Tokens of prompt, chosen and rejected."""
        return len(self.prompt_ids), len(self.chosen_ids), len(self.rejected_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens that the pair costs in the packed layout: prompt + chosen + rejected."""
        return sum(self.lengths)


@dataclass(frozen=True, slots=True)
class Segments:
    """Who may look at whom in a packed row: [prompt₀ chosen₀ rejected₀ prompt₁ …].

    Attributes:
        lengths: per pair (prompt, chosen, rejected) in tokens.
        kv_index: (Tk,) positions in the row of the keys that each of the 2B sequences sees:
            prompt₀ chosen₀, prompt₀ rejected₀, prompt₁ … (a prompt's keys appear twice, its
            queries once).
        cu_seq_q, cu_seq_k: (2B + 1,) int32 cumulative lengths of the sequences' queries and keys.
        max_q, max_k: the longest of each, in tokens.
    """

    lengths: tuple[tuple[int, int, int], ...]
    kv_index: torch.Tensor
    cu_seq_q: torch.Tensor
    cu_seq_k: torch.Tensor
    max_q: int
    max_k: int

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Segments:
        """The same on another device."""
        return _moved(self, device, non_blocking)


@dataclass(frozen=True, slots=True)
class PairBatch:
    """B pairs, ready for the model. Shapes of the two layouts:

                        packed                      padded
        input_ids       (1, T), T real tokens       (2B, L), chosen rows first, padded right
        position_ids    (1, T), from 0 in each      (2B, L)
                        sequence
        attention_mask  None                        (2B, L), 1 for real tokens
        segments        Segments                    None

    Attributes:
        predict_index: (N,) rows of the flattened hidden states which predict the N scored tokens.
        target_ids: (N,) the scored tokens.
        lengths: (2B,) scored tokens a response, chosen 0..B-1 then rejected 0..B-1;
            `predict_index` and `target_ids` are in that order.
        margin: (B,) float32 target margins, in the units of the objective's log-probabilities.
        num_tokens: real tokens in `input_ids`.
        reference: (2B,) float32 summed log-probabilities under the reference, in the order of
            `lengths`; None where they are not known.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    segments: Segments | None
    predict_index: torch.Tensor
    target_ids: torch.Tensor
    lengths: torch.Tensor
    margin: torch.Tensor
    num_tokens: int
    reference: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.margin)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PairBatch:
        """The same on another device."""
        return _moved(self, device, non_blocking)


@dataclass(frozen=True, slots=True)
class PairLogps:
    """Log-probabilities of B pairs, float32.

    Attributes:
        chosen, rejected: (B,) sums over the scored tokens.
        chosen_lengths, rejected_lengths: (B,) scored tokens.
        ref_chosen, ref_rejected: (B,) sums under the reference; None where they are not known.
        chosen_certainty, rejected_certainty: (B,) averages per scored token of log Σ_v p(v)², how
            sure the policy is of any token there, without gradient; None where not asked for.
    """

    chosen: torch.Tensor
    rejected: torch.Tensor
    chosen_lengths: torch.Tensor
    rejected_lengths: torch.Tensor
    ref_chosen: torch.Tensor | None = None
    ref_rejected: torch.Tensor | None = None
    chosen_certainty: torch.Tensor | None = None
    rejected_certainty: torch.Tensor | None = None

    @property
    def chosen_ratio(self) -> torch.Tensor:
        """(B,) ρ_w: how much likelier the chosen response is than under the reference, in nats."""
        assert self.ref_chosen is not None, "this objective needs the reference's logps"
        return self.chosen - self.ref_chosen

    @property
    def rejected_ratio(self) -> torch.Tensor:
        """(B,) ρ_l, the same of the rejected response."""
        assert self.ref_rejected is not None, "this objective needs the reference's logps"
        return self.rejected - self.ref_rejected

    @property
    def chosen_avg(self) -> torch.Tensor:
        """(B,) average per scored token."""
        return self.chosen / self.chosen_lengths

    @property
    def rejected_avg(self) -> torch.Tensor:
        """(B,) average per scored token."""
        return self.rejected / self.rejected_lengths


@dataclass(frozen=True, slots=True)
class LossOutput:
    """What an objective gives back for B pairs.

    Attributes:
        losses: (B,) with gradient.
        chosen_rewards, rejected_rewards: (B,) without gradient.
    """

    losses: torch.Tensor
    chosen_rewards: torch.Tensor
    rejected_rewards: torch.Tensor


def _moved(value: Any, device: torch.device | str, non_blocking: bool) -> Any:
    """A copy of a frozen value whose tensors (and Segments) lie on `device`."""
    parts = {f.name: getattr(value, f.name) for f in fields(value)}
    moved = {
        name: part
        if part is None or isinstance(part, int | tuple)
        else part.to(device, non_blocking=non_blocking)
        for name, part in parts.items()
    }
    return replace(value, **moved)
