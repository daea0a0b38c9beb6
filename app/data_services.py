"""What the Data tab may call: which data may be opened, and what is known of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app import curves, forms, gaps, measures
from app.browser import BrowsedPair, browse
from app.downloads import text_file
from app.gaps import GapView
from app.pairs import PairSet, PairSets
from app.places import Places
from gapo_lite.config import RunConfig
from gapo_lite.ef import EVALUATION_FACTORS
from gapo_lite.embedded import EMBEDDED_DATA, EMBEDDED_MODELS
from gapo_lite.errors import ConfigError, DataError, GapoError

BASE_MODEL = "embedded:smollm2-135m-instruct"
PAPERS_MODEL = "meta-llama/Meta-Llama-3-8B-Instruct"
FEW_PAIRS = 5000
"""So many pairs are tokenised in seconds, and compared in no time."""


@dataclass(frozen=True, slots=True)
class OpenedData:
    """What the form holds for data that were opened; "" for what it leaves empty."""

    source: str
    split: str
    heldout_source: str
    heldout_split: str


@dataclass(frozen=True, slots=True)
class DataServices:
    """The data side of one server.

    Attributes:
        places: which data and models may be opened.
        pair_sets: data that were looked at last.
    """

    places: Places
    pair_sets: PairSets

    def source_choices(self) -> list[str]:
        """Embedded sets, then files of the data folder, newest first."""
        return [*(name for name in EMBEDDED_DATA if "heldout" not in name), *self.places.files()]

    def model_choices(self) -> list[str]:
        """The embedded model, the paper's, and local ones of the models folder."""
        return [BASE_MODEL, PAPERS_MODEL, *self.places.models()]

    def open_data(self, name: str, split: str) -> OpenedData:
        """Loads what a browser named, and says what the form should hold for it.

        Raises:
            DataError: it may not be opened, or holds no usable row.
        """
        source = self.places.check_source(name.strip() if isinstance(name, str) else name)
        split = (split.strip() if isinstance(split, str) else "") or "train"
        self.pair_sets.load(source, split)
        heldout = f"{source}-heldout"
        return OpenedData(source, split, heldout if heldout in EMBEDDED_DATA else "", "test")

    def keep_upload(self, path: str) -> str:
        """Puts an uploaded file below the data folder; returns its name as a source.

        Raises:
            GapoError: it is no data file, or the disk is full.
        """
        file = uploaded(path)
        return self.places.keep_upload(file, file.name)

    def data_config(self, values: Mapping[str, Any]) -> RunConfig:
        """What a form says of data and margins, whatever else in it is not usable yet.

        Raises:
            GapoError: one of these settings is not usable, or names data or models that are not.
        """
        about = ("model", "data", "ef", "margin", "objective")
        some = {key: value for key, value in values.items() if key.partition(".")[0] in about}
        return self.places.check_config(forms.config_of(some))

    def pair_set(self, config: RunConfig) -> PairSet:
        """The pairs of a configuration; those on the Hub must have been opened by someone.

        Raises:
            DataError: they cannot be read, or would have to be downloaded.
        """
        source, split = config.data.source, config.data.split
        is_here = source in EMBEDDED_DATA or Path(source).exists()
        if not is_here and not self.pair_sets.is_open(source, split):
            raise DataError(f"{source} is on the Hub: press Load in the Data tab to look at it.")
        return self.pair_sets.load(source, split, config.data.rating_columns)

    def measure_lexical(self, config: RunConfig) -> Iterator[tuple[int, int]]:
        """(done, total) while all lexical metrics are measured, which takes one pass.

        Raises:
            GapoError: the data are not usable.
        """
        for name, factor in EVALUATION_FACTORS.items():
            if factor.family == "lexical":
                yield from measures.measure_scores(self.pair_set(config), name, config)

    def measure_bertscore(self, config: RunConfig) -> Iterator[tuple[int, int]]:
        """(done, total) while the configuration's BERTScore is measured, by a process of its own.

        Raises:
            GapoError: another metric is chosen, or data or encoder are not usable.
        """
        metric = config.ef.metric
        if EVALUATION_FACTORS[metric].family != "semantic":
            raise ConfigError(
                f"{metric} is measured already. Choose a BERTScore as EF metric first."
            )
        return measures.measure_scores(self.pair_set(config), metric, config)

    def gaps(self, config: RunConfig) -> GapView | None:
        """Gaps and margins; None while the metric has to be measured.

        Raises:
            GapoError: data or settings are not usable.
        """
        return gaps.gaps(self.pair_set(config), config)

    def lengths(self, config: RunConfig) -> Any:
        """(N, 3) tokens of prompt, chosen and rejected, or None while they are not counted."""
        return measures.lengths(self.pair_set(config), config.model.name, config.model.revision)

    def measure_lengths(self, config: RunConfig) -> Iterator[tuple[int, int]]:
        """(done, total) while tokens are counted.

        Raises:
            GapoError: data or tokenizer are not usable.
        """
        return measures.measure_lengths(
            self.pair_set(config), config.model.name, config.model.revision
        )

    def counts_tokens_unasked(self, config: RunConfig) -> bool:
        """Whether counting takes no time or download that somebody should ask for."""
        small = len(self.pair_set(config)) <= FEW_PAIRS
        return small and config.model.name in EMBEDDED_MODELS and self.lengths(config) is None

    def browse(self, config: RunConfig, query: str, sort: str, index: int) -> BrowsedPair | None:
        """One pair of those that hold the query; see browser.browse. Pairs that no margins can be
        made of are in the order of the file.

        Raises:
            GapoError: there is no such order, or the data are not usable.
        """
        query = query[:1000] if isinstance(query, str) else ""
        pair_set = self.pair_set(config)
        try:
            view = gaps.gaps(pair_set, config)
        except DataError:  # which stands where the margins would
            view = None
        return browse(pair_set, view, query=query, sort=sort, index=index)

    def margins_csv(self, values: Mapping[str, Any]) -> str:
        """A file with EF, gap and target margin of each pair.

        Raises:
            GapoError: data or settings are not usable, or the metric is not measured yet.
        """
        config = self.data_config(values)
        view = self.gaps(config)
        if view is None:
            raise DataError(f"{config.ef.metric} has not been measured on these pairs yet.")
        return text_file("margins.csv", gaps.to_csv(self.pair_set(config), view))

    def margin_line(self, config: RunConfig) -> str:
        """What γ and β come to: the average target margin, where the data say it."""
        if config.margin.source is None:
            return f"{config.objective.name} has no target margin."
        try:
            config = self.places.check_config(config)
            is_scored = config.margin.source == "ef"
            if is_scored and len(self.pair_set(config)) <= FEW_PAIRS:
                list(self.measure_lexical(config))
            pair_set = self.pair_set(config)
        except GapoError:
            return "Average target margin: known once the pairs are opened (Data tab)."
        try:
            view = gaps.gaps(pair_set, config)
        except GapoError:
            return "Average target margin: there is none; the Data tab says why."
        if view is None:
            return "Average target margin: known once the pairs are scored (Data tab)."
        line = f"Average target margin **{view.mean_reward_margin:.3g} reward units**"
        if view.gamma_beta_ratio is not None:
            return f"{line} (SimPO's γ/β: {view.gamma_beta_ratio:.3g})"
        is_plain = not curves.asks_for_margin(config)
        return f"{line}: plain {config.objective.name}" if is_plain else line


def uploaded(path: Any) -> Path:
    """Where Gradio, which has checked it, has put an upload.

    Raises:
        ConfigError: nothing was sent.
    """
    if not isinstance(path, str) or not path:
        raise ConfigError("no file was sent: choose one, then upload it again.")
    return Path(path)
