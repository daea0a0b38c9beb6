"""What a run may say outside: names without local paths, a configuration to repeat it by, and what
the base model's licence asks of those who pass on what they made of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

from gapo_lite.config import RunConfig
from gapo_lite.data.files import READERS

PUBLIC_NAMES = {"embedded:smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Where the embedded models come from."""


@dataclass(frozen=True, slots=True)
class Licence:
    """A base model's licence.

    Attributes:
        key: as the Hub's model cards name it.
        words: its name.
        model_name: what the name of a model made with it must begin with; "" for anything.
        credit: what must be displayed where such a model is used; "" for nothing.
        notice: text of the file NOTICE that must go along; "" for none.
    """

    key: str
    words: str
    model_name: str = ""
    credit: str = ""
    notice: str = ""

    @property
    def duties(self) -> str:
        """What it asks of those who pass such a model on; "" for nothing special."""
        if not self.model_name:
            return ""
        return (
            f"The {self.words} asks of whoever passes these weights on: a name that begins with "
            f"`{self.model_name}`; `{self.credit}`, displayed on a page about what is made with "
            "them; and a copy of the licence (it comes with the base model: put it into the "
            f"folder) with the file `NOTICE`, which says: {self.notice}"
        )


def _llama(version: str, credit: str, name: str, owner: str = "Llama") -> Licence:
    return Licence(
        f"llama{version}",
        f"{owner} {version} Community License",
        name,
        credit,
        f"{owner} {version} is licensed under the {owner} {version} Community License, "
        "Copyright © Meta Platforms, Inc. All Rights Reserved.",
    )


_LICENCES = {
    "smollm2": Licence("apache-2.0", "Apache License 2.0"),
    "llama-3-": _llama("3", "Built with Meta Llama 3", "Llama 3", "Meta Llama"),
    "llama-3.1-": _llama("3.1", "Built with Llama", "Llama"),
    "llama-3.2-": _llama("3.2", "Built with Llama", "Llama"),
    "llama-3.3-": _llama("3.3", "Built with Llama", "Llama"),
}
"""Start of a base model's own name, in small letters and without `meta-` → its licence."""


def licence_of(base: str) -> Licence | None:
    """The licence of a base model by its public name, None where it is not known here."""
    own = base.rpartition("/")[2].lower().removeprefix("meta-")
    return next((it for start, it in _LICENCES.items() if own.startswith(start)), None)


def has_licensed_name(name: str, licence: Licence) -> bool:
    """Whether a model may be called so; hyphens, dots and spaces between words count as the same.

    Args:
        name: of a folder or repository, without its owner.
        licence: of the base model.
    """
    plain = re.sub(r"[\W_]+", "", name).lower()
    return plain.startswith(licence.model_name.replace(" ", "").lower())


def is_local(name: str) -> bool:
    """Whether a model's or data set's name is a path of this machine."""
    if name.startswith("embedded:"):
        return False
    return (
        Path(name).is_absolute()
        or "\\" in name
        or name.startswith(("~", "."))
        or name.count("/") > 1
        or Path(name.lower().removesuffix(".gz")).suffix in READERS  # it may lie elsewhere by now
        or Path(name).exists()
    )


def public_name(name: str) -> str:
    """A model's or data set's name as others know it; of a local path the last part alone."""
    if name in PUBLIC_NAMES:
        return PUBLIC_NAMES[name]
    return printable(_last_part(name) if is_local(name) else name)


def printable(text: str) -> str:
    """One line of text, its control characters replaced, for a document that is made of it."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _last_part(name: str) -> str:
    if "\\" in name:
        return PureWindowsPath(name).name
    return Path(name).expanduser().resolve().name


def public_config(config: RunConfig) -> RunConfig:
    """The configuration that repeats a run, without what is its owner's own: of local paths the
    last part alone, no sample prompts, no report to an account."""
    data = config.data.model_copy(
        update={
            "source": _anywhere(config.data.source),
            "heldout_source": config.data.heldout_source and _anywhere(config.data.heldout_source),
        }
    )
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"name": _anywhere(config.model.name)}),
            "data": data,
            "ef": config.ef.model_copy(
                update={"bertscore_model": _anywhere(config.ef.bertscore_model)}
            ),
            "training": config.training.model_copy(update={"sample_prompts": [], "report_to": []}),
        }
    )


def left_out(config: RunConfig) -> list[str]:
    """What `public_config` takes away that a person must put back to repeat a run: setting, and
    what to put there."""
    own = {
        "model.name": config.model.name,
        "data.source": config.data.source,
        "data.heldout_source": config.data.heldout_source or "",
    }
    if config.ef.metric.startswith("bertscore_") and config.margin.source == "ef":
        own["ef.bertscore_model"] = config.ef.bertscore_model
    return [
        f"`{key}`: your copy of `{_anywhere(name)}`"
        for key, name in own.items()
        if name and is_local(name)
    ]


def _anywhere(name: str) -> str:
    """The name as gapo-lite itself takes it elsewhere: embedded names stay."""
    return name if name.startswith("embedded:") else public_name(name)
