"""How long pairs are in tokens, and what given limits would cut of them.

Counting takes the model's tokenizer and some time, and is done once; `cut` is arithmetic, so that
limits can be tried at once. Its counts are those of `batching.tokenize_pairs`, without tokens.
Importing this does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from gapo_lite.types import PreferencePair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Integer = TypeVar("Integer", bound=np.integer)

_PAIRS_A_REPORT = 256


@dataclass(frozen=True, slots=True)
class Cuts:
    """What limits do to some pairs.

    Attributes:
        num_prompts_truncated: pairs whose prompt loses tokens on the left.
        num_responses_truncated: pairs of which a response loses tokens on the right.
        num_dropped: pairs left without a scored token; they are in neither of the other two.
    """

    num_prompts_truncated: int
    num_responses_truncated: int
    num_dropped: int


def count_tokens(
    pairs: Sequence[PreferencePair],
    tokenizer: PreTrainedTokenizerBase,
    progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.int32]:
    """Tokens of each pair before any cut.

    Args:
        pairs: N pairs.
        tokenizer: with a chat template.
        progress: called with (pairs done, N) now and then.

    Returns:
        (N, 3): of the rendered prompt, of the chosen and of the rejected response; the latter two
        with their end-of-turn token.

    Raises:
        ModelError: the tokenizer has no chat template, or one without an end of turn.
        DataError: the template refuses a conversation.
    """
    from gapo_lite.batching import encode_pairs  # imports torch

    lengths = np.zeros((len(pairs), 3), dtype=np.int32)
    for index, rows in enumerate(encode_pairs(pairs, tokenizer)):
        lengths[index] = [len(row) for row in rows]
        done = index + 1
        if progress is not None and (done % _PAIRS_A_REPORT == 0 or done == len(pairs)):
            progress(done, len(pairs))
    return lengths


def cut(lengths: NDArray[np.int32], max_length: int, max_prompt_length: int) -> Cuts:
    """What these limits would do to pairs of these lengths.

    Args:
        lengths: (N, 3) as `count_tokens` returns them.
        max_length: tokens of prompt and response together.
        max_prompt_length: tokens that a prompt keeps in any case.
    """
    kept, room = _kept(lengths, max_length, max_prompt_length)
    fits = room >= 1
    return Cuts(
        num_prompts_truncated=int((fits & (kept < lengths[:, 0])).sum()),
        num_responses_truncated=int((fits & (lengths[:, 1:].max(axis=1, initial=0) > room)).sum()),
        num_dropped=int((~fits).sum()),
    )


def shortened(
    lengths: NDArray[Integer], max_length: int, max_prompt_length: int
) -> NDArray[Integer]:
    """(M, 3) the lengths after these limits, of the pairs that are left."""
    kept, room = _kept(lengths, max_length, max_prompt_length)
    responses = np.minimum(lengths[:, 1:], room[:, None])
    return np.column_stack((kept, responses))[room >= 1]


def _kept(
    lengths: NDArray[Integer], max_length: int, max_prompt_length: int
) -> tuple[NDArray[Integer], NDArray[Integer]]:
    """(N,) tokens that each prompt keeps, and how many there are then for a response."""
    prompt, longest = lengths[:, 0], lengths[:, 1:].max(axis=1, initial=0)
    kept = np.minimum(prompt, np.maximum(max_length - longest, max_prompt_length))
    return kept, max_length - kept
