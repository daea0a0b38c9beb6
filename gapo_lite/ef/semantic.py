"""BERTScore precision, recall and F1, equal to the bert-score package's (0.3.13) within 1e-5.

The naive equivalent of `bert_scores(chosen, rejected, model=…, layer=…)` is

    bert_score.score(cands=rejected, refs=chosen, model_type=…, num_layers=…)

(no idf, not rescaled), which keeps the vectors of all texts; here only one chunk's are in memory.
Where bert-score has no number, there is one here: its NaN for a text of special tokens alone is 0;
an empty text, which it cannot encode under transformers 5, scores 0 as it did under 4; a lone
surrogate is read as "?"; an encoder whose tokenizer names no limit is cut at its last position.
A negative precision or recall, too, is 0 here, and so is its F1.
bert-score means to put a space before RoBERTa's first word, but transformers 5 ignores it: equality
is with bert-score as it runs under transformers 5, so there is no space here either.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from gapo_lite.embedded import embedded_path
from gapo_lite.errors import ConfigError, ModelError

logger = logging.getLogger(__name__)

BATCHES_PER_CHUNK = 4  # of pairs; one chunk's vectors are what is in memory

TOKENS_PER_BATCH = 4096  # fills a GPU, and pads less than a full batch of long texts would

# The layers that agree best with people's judgement, from `model2layers` in bert_score/utils.py,
# version 0.3.13: its encoders that are in wide use, some under their present name on the Hub too.
# The embedded one is not in it: its last layer.
LAYERS: dict[str, int] = {
    "embedded:all-minilm-l6-v2": 6,
    "bert-base-uncased": 9,
    "bert-large-uncased": 18,
    "bert-base-multilingual-cased": 9,
    "bert-base-chinese": 8,
    "roberta-base": 10,
    "roberta-large": 17,
    "roberta-large-mnli": 19,
    "FacebookAI/roberta-base": 10,
    "FacebookAI/roberta-large": 17,
    "FacebookAI/xlm-roberta-large": 17,
    "google-bert/bert-base-uncased": 9,
    "google-bert/bert-base-multilingual-cased": 9,
    "distilroberta-base": 5,
    "distilbert-base-uncased": 5,
    "distilbert-base-multilingual-cased": 5,
    "albert-base-v2": 9,
    "albert-large-v2": 14,
    "albert-xlarge-v2": 13,
    "albert-xxlarge-v2": 8,
    "xlm-roberta-base": 9,
    "xlm-roberta-large": 17,
    "google/electra-small-discriminator": 11,
    "google/electra-base-discriminator": 9,
    "google/electra-large-discriminator": 14,
    "microsoft/deberta-base": 9,
    "microsoft/deberta-base-mnli": 9,
    "microsoft/deberta-large": 16,
    "microsoft/deberta-large-mnli": 18,
    "microsoft/deberta-xlarge": 18,
    "microsoft/deberta-xlarge-mnli": 40,
    "microsoft/deberta-v2-xlarge": 10,
    "microsoft/deberta-v2-xlarge-mnli": 17,
    "microsoft/deberta-v3-xsmall": 10,
    "microsoft/deberta-v3-small": 4,
    "microsoft/deberta-v3-base": 9,
    "microsoft/deberta-v3-large": 12,
    "microsoft/mdeberta-v3-base": 10,
    "microsoft/mpnet-base": 8,
    "allenai/scibert_scivocab_uncased": 8,
    "princeton-nlp/sup-simcse-roberta-large": 16,
}


def bert_scores(
    chosen: Sequence[str],
    rejected: Sequence[str],
    *,
    model: str,
    layer: int | None = None,
    batch_size: int = 64,
    device: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.float64]:
    """Precision, recall and F1 of the rejected (candidate) against the chosen (reference).

    Args:
        chosen: N references.
        rejected: N candidates.
        model: a key of LAYERS, another encoder on the Hub, or a local folder.
        layer: whose vectors are compared, from 1; None where LAYERS has the model.
        batch_size: the most texts that go through the encoder together, and the pairs that
            bert-score would pad to one length, by which very dissimilar tokens count a little
            differently (see _match).
        device: None takes the GPU where there is one.
        progress: called with (pairs done, N) whenever a chunk is finished.

    Returns:
        (N, 3) in [0, 1]: columns P, R and F1.

    Raises:
        ConfigError: no layer is known for the model, it has fewer, or there is no such device.
        ModelError: the encoder cannot be loaded.
    """
    if not len(chosen):
        return np.zeros((0, 3))
    matches = np.zeros((len(chosen), 2))  # P and R
    encoder = load_encoder(model, layer, device)
    num_truncated = num_empty = 0
    for start in range(0, len(chosen), BATCHES_PER_CHUNK * batch_size):
        place = slice(start, min(start + BATCHES_PER_CHUNK * batch_size, len(chosen)))
        texts = encoder.encode([*chosen[place], *rejected[place]], batch_size)
        candidates = [texts[text] for text in rejected[place]]
        references = [texts[text] for text in chosen[place]]
        matches[place] = _match(candidates, references, batch_size)
        pairs = list(zip(candidates, references, strict=True))
        num_truncated += sum(a.truncated or b.truncated for a, b in pairs)
        num_empty += sum(a.empty or b.empty for a, b in pairs)
        if progress is not None:
            progress(place.stop, len(chosen))
    _warn(len(chosen), num_truncated, num_empty, encoder.limit)
    return _with_f1(np.clip(np.nan_to_num(matches, nan=0.0), 0.0, 1.0))


@dataclass(frozen=True, slots=True)
class Encoded:
    """One text of T tokens.

    Attributes:
        vectors: (T, H), each of length 1.
        weights: (T,), 0 for the tokens that begin and end a text, 1 for all others.
        truncated: whether the text had more tokens than the encoder takes.
    """

    vectors: Tensor
    weights: Tensor
    truncated: bool

    @property
    def empty(self) -> bool:
        """Whether there is nothing between the two special tokens; such a text scores 0."""
        return len(self.weights) <= 2


@dataclass(frozen=True, slots=True)
class Encoder:
    """The first layers of an encoder with its tokenizer.

    Attributes:
        limit: the most tokens that it takes.
    """

    tokenizer: PreTrainedTokenizerBase
    network: PreTrainedModel
    limit: int

    def encode(self, texts: Sequence[str], batch_size: int) -> dict[str, Encoded]:
        """Token vectors of each different text, computed in batches of texts of like length."""
        tokens = self._tokens(list(dict.fromkeys(texts)))
        longest_first = sorted(tokens, key=lambda text: -len(tokens[text][0]))
        encoded: dict[str, Encoded] = {}
        lengths = [len(tokens[text][0]) for text in longest_first]
        for batch_of in _batches(lengths, batch_size):
            batch = longest_first[batch_of]
            ids = [torch.tensor(tokens[text][0], device=self.network.device) for text in batch]
            for text, row, vectors in zip(batch, ids, self._vectors(ids), strict=True):
                encoded[text] = Encoded(vectors, self._weights(row), tokens[text][1])
        return encoded

    def _tokens(self, texts: list[str]) -> dict[str, tuple[list[int], bool]]:
        """Token ids of each text, and whether they had to be cut."""
        clean = [text.strip().encode("utf-8", "replace").decode("utf-8") for text in texts]
        ids = self.tokenizer(clean, verbose=False)["input_ids"]
        truncated = [len(row) > self.limit for row in ids]
        for index in np.flatnonzero(truncated):
            cut = self.tokenizer(clean[index], truncation=True, max_length=self.limit)
            ids[index] = cut["input_ids"]
        return dict(zip(texts, zip(ids, truncated, strict=True), strict=True))

    @torch.inference_mode()
    def _vectors(self, ids: list[Tensor]) -> list[Tensor]:
        """Unit vectors (T, H) of each row of ids (T,)."""
        padding = self.tokenizer.pad_token_id or 0  # is masked
        padded = pad_sequence(ids, batch_first=True, padding_value=padding)
        mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        hidden = self.network(padded, attention_mask=mask).last_hidden_state
        hidden /= hidden.norm(dim=-1, keepdim=True)
        return [vectors[: len(row)] for vectors, row in zip(hidden, ids, strict=True)]

    def _weights(self, ids: Tensor) -> Tensor:
        special = [self.tokenizer.cls_token_id, self.tokenizer.sep_token_id]
        special = [token for token in special if token is not None]
        return torch.isin(ids, ids.new_tensor(special), invert=True).float()


def load_encoder(model: str, layer: int | None, device: str | None) -> Encoder:
    """The encoder up to and including `layer`, in float32.

    Raises:
        ConfigError: no layer is known for the model, it has fewer, or there is no such device.
        ModelError: the encoder cannot be loaded.
    """
    place = _device(device)
    source = _source(model)
    if layer is None and model not in LAYERS:
        raise ConfigError(
            f"No BERTScore layer is known for the model {model!r}, and scores of different layers "
            "cannot be compared. Set layer, from 1 to the model's number of layers (for "
            f"roberta-large, which has 24, bert-score takes {LAYERS['roberta-large']})."
        )
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
            _keep_layers(config, model, layer or LAYERS[model])
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            network, report = AutoModel.from_pretrained(
                source,
                config=config,
                dtype=torch.float32,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ModelError(
            f"The encoder {model!r} for BERTScore cannot be loaded ({_first_line(error)}). Give a "
            "local folder, a Hub model within reach, or model='embedded:all-minilm-l6-v2'."
        ) from error
    _check_weights(model, report["missing_keys"])
    network = network.eval().to(place)
    if place.type == "cpu":
        network = _by_onednn(network)
    return Encoder(tokenizer, network, _limit(tokenizer, config))


class _OneDnnLinear(nn.Module):
    """A linear layer by oneDNN, without gradient."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, values: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(values, self.weight, self.bias, "none", [], "")


@torch.inference_mode()
def _by_onednn(network: PreTrainedModel) -> PreTrainedModel:
    """The network with oneDNN's linear layers, which are twice as fast as torch's own on some
    processors; as it was where this torch has them not, or they say something else."""
    probe = torch.arange(5, 21).reshape(2, 8)
    linear = {name: m for name, m in network.named_modules() if type(m) is nn.Linear}
    try:
        expected = network(probe).last_hidden_state
        for name, layer in linear.items():
            network.set_submodule(name, _OneDnnLinear(layer))
        found = network(probe).last_hidden_state
        same = torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    except (RuntimeError, AttributeError, TypeError, IndexError):
        same = False
    if not same:
        for name, layer in linear.items():
            network.set_submodule(name, layer)
    return network


def _batches(lengths: list[int], batch_size: int) -> Iterator[slice]:
    """Slices of at most `batch_size` texts and TOKENS_PER_BATCH tokens; lengths must not rise."""
    start = 0
    while start < len(lengths):
        fitting = max(1, TOKENS_PER_BATCH // lengths[start])
        stop = min(start + min(fitting, batch_size), len(lengths))
        yield slice(start, stop)
        start = stop


def _match(
    candidates: list[Encoded], references: list[Encoded], batch_size: int
) -> NDArray[np.float32]:
    """P and R of each pair, (pairs, 2).

    In bert-score a text that is shorter than the longest of its kind in the batch is padded by
    tokens whose similarity to any other is 0: then a token that is dissimilar to all tokens of that
    text counts 0 instead of less. Here, too, though nothing is padded.
    """
    rows = []
    for start in range(0, len(candidates), batch_size):
        batch = slice(start, start + batch_size)
        longest_candidate = max(len(text.weights) for text in candidates[batch])
        longest_reference = max(len(text.weights) for text in references[batch])
        for candidate, reference in zip(candidates[batch], references[batch], strict=True):
            candidate_padded = len(candidate.weights) < longest_candidate
            reference_padded = len(reference.weights) < longest_reference
            rows.append(_match_pair(candidate, reference, candidate_padded, reference_padded))
    return torch.stack(rows).cpu().numpy()


def _match_pair(
    candidate: Encoded, reference: Encoded, candidate_padded: bool, reference_padded: bool
) -> Tensor:
    """(2,): P and R by matching each token with the most similar one of the other text."""
    similarity = candidate.vectors @ reference.vectors.T  # (candidate's T, reference's T)
    if candidate.empty or reference.empty:
        return similarity.new_zeros(2)
    of_candidate = similarity.amax(dim=1).clamp(min=0.0 if reference_padded else -1.0)
    of_reference = similarity.amax(dim=0).clamp(min=0.0 if candidate_padded else -1.0)
    precision = (of_candidate * candidate.weights).sum() / candidate.weights.sum()
    recall = (of_reference * reference.weights).sum() / reference.weights.sum()
    return torch.stack((precision, recall))


def _with_f1(matches: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N, 2) of P and R → (N, 3) of P, R and F1."""
    product, total = matches.prod(axis=1), matches.sum(axis=1)
    f1 = np.divide(2 * product, total, out=np.zeros(len(matches)), where=total > 0)
    return np.column_stack((matches, f1))


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # the latter where torch has no CUDA
        raise ConfigError(
            f"There is no device {name!r} to run the BERTScore encoder on ({_first_line(error)}). "
            "Use 'cpu', or leave device out."
        ) from error


def _source(model: str) -> str:
    """What transformers loads: a folder, or the name of a model on the Hub."""
    if model.startswith("embedded:"):
        return str(embedded_path(model))
    folder = Path(model).expanduser()
    if folder.is_dir():
        return str(folder)
    if folder.is_absolute() or model.startswith(".") or model.count("/") > 1:
        raise ModelError(
            f"The encoder {model!r} for BERTScore looks like a folder, but there is none at "
            f"{folder.absolute()}. Give the folder that has its config.json."
        )
    return model


def _keep_layers(config: PretrainedConfig, model: str, layer: int) -> None:
    if config.is_encoder_decoder:
        raise ModelError(
            f"{model!r} is an encoder with a decoder, which BERTScore is not prepared for here. "
            "Take an encoder, such as roberta-large."
        )
    if layer > config.num_hidden_layers:
        raise ConfigError(
            f"layer is {layer}, but the encoder {model!r} has {config.num_hidden_layers} layers. "
            f"Set layer to a number from 1 to {config.num_hidden_layers}."
        )
    config.num_hidden_layers = layer


def _check_weights(model: str, missing: set[str]) -> None:
    needed = sorted(name for name in missing if "pooler" not in name)
    if needed:
        raise ModelError(
            f"The encoder {model!r} lacks {len(needed)} weights (the first is {needed[0]}), which "
            "would be random numbers. Give the folder or name of a complete model."
        )


def _limit(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> int:
    positions = config.to_dict().get("max_position_embeddings", 512)  # none if relative
    if tokenizer.model_max_length > positions:  # 10**30 if it is not set
        return positions - 2  # RoBERTa and its kin have two positions more than they can use
    return tokenizer.model_max_length


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".") or type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar, and no table of the layers that are left out on purpose."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _warn(num_pairs: int, num_truncated: int, num_empty: int, limit: int) -> None:
    if num_truncated:
        logger.warning(
            "%d of %d pairs have a response of more than %d tokens; BERTScore compares its first "
            "%d only, as that is all its encoder can read.",
            num_truncated,
            num_pairs,
            limit,
            limit,
        )
    if num_empty:
        logger.warning(
            "%d of %d pairs have a response without any token; their BERTScore is 0.",
            num_empty,
            num_pairs,
        )
