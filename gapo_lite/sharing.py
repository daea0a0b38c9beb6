"""An exported folder → a repository on the Hugging Face Hub.

    upload(Path("exports/demo-adapter"), "ada/demo-adapter", private=True)

Who one is there is known to huggingface_hub alone (HF_TOKEN, or `hf auth login`): the token is in
no argument, file, log or message of ours.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    XetDownloadError,
)
from huggingface_hub.utils import validate_repo_id

from gapo_lite.errors import ConfigError, GapoError, RunError
from gapo_lite.public import has_licensed_name, licence_of

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_SUFFIXES = {".json", ".jinja", ".md", ".model", ".safetensors", ".gguf", ".svg", ".txt", ".yaml"}
_NAMES = {"Modelfile", "NOTICE", "LICENSE", ".gitattributes"}
_TOKEN = re.compile(r"\bhf_\w{8,}")
_REFUSALS = {
    401: "the Hub does not know who you are. Log in with `hf auth login`, or set HF_TOKEN",
    403: "your token may not write there. Make one with write access, or choose your own name",
    409: "the repository is being changed by somebody else",
    413: "it is more than your account may hold",
    429: "the Hub asks for patience",
}


@dataclass(frozen=True, slots=True)
class Shipment:
    """What would be uploaded.

    Attributes:
        folder: where it lies.
        files: their paths in it → bytes, in order.
        base: public name of the base model, as its card says; "" for none.
        licence: the card's key of the licence; "" for none.
        duties: what the licence asks of those who pass it on; "" for nothing special.
    """

    folder: Path
    files: dict[str, int]
    base: str
    licence: str
    duties: str

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return sum(self.files.values())


def check_repository(name: str) -> str:
    """Refuses what cannot be a repository's name; returns it.

    Raises:
        ConfigError: it is not owner/name.
    """
    try:
        validate_repo_id(name)
        fits = bool(_NAME.fullmatch(name))
    except HFValidationError:
        fits = False
    if not fits:
        raise ConfigError(
            f"--to {name!r}: name a repository as owner/name, in letters, digits, '.', '_' and '-'."
        )
    return name


def check_login() -> None:
    """Refuses to begin without a token.

    Raises:
        RunError: there is none.
    """
    if get_token() is None:
        raise RunError(
            "there is no token for the Hub. Log in with `hf auth login`, or set HF_TOKEN; it needs "
            "write access."
        )


def is_exported(folder: Path) -> bool:
    """Whether a folder is one that `export` wrote, rather than a run."""
    return (
        (folder / "README.md").is_file()
        and not (folder / "config.yaml").exists()
        and any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))
    )


def look_over(folder: Path, name: str, *, private: bool) -> Shipment:
    """What an exported folder holds, after a look at whether all of it may go out.

    Args:
        folder: of `export_run`.
        name: owner/name of the repository.
        private: whether others will not see it.

    Raises:
        RunError: it is no exported folder, or holds what an export does not.
        ConfigError: the base model's licence asks for another name.
    """
    if not is_exported(folder):
        raise RunError(f"{folder} is not an exported folder: it has no model card or no model.")
    paths = sorted(path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())
    for path in paths:
        if path.is_symlink() or not (path.suffix in _SUFFIXES or path.name in _NAMES):
            raise RunError(
                f"{path} is not part of an export (a link, or another kind of file), so it may "
                "hold what is yours alone. Remove it, then try again."
            )
    card = _front_matter(folder / "README.md")
    base = str(card.get("base_model", ""))
    licence = licence_of(base)
    if licence and not private and not has_licensed_name(name.rpartition("/")[2], licence):
        raise ConfigError(
            f"--to {name}: the {licence.words} asks for a name that begins with "
            f"{licence.model_name!r} of what is passed on, such as "
            f"{name.rpartition('/')[0]}/{licence.model_name.replace(' ', '-')}-"
            f"{name.rpartition('/')[2]}. Choose one, or keep it --private."
        )
    files = {str(path.relative_to(folder)): path.stat().st_size for path in paths}
    duties = licence.duties if licence else ""
    return Shipment(folder, files, base, str(card.get("license", "")), duties)


def upload(shipment: Shipment, name: str, *, private: bool, update: bool = False) -> str:
    """Uploads a folder in one commit; returns the repository's address.

    Args:
        shipment: of `look_over`.
        name: owner/name of the repository; made where it is not there.
        private: whether a new one is, and one that is there has to be.
        update: whether one that holds files already may be added to. Files of other names stay.

    Raises:
        RunError: it holds files already or is public, the Hub refuses, or cannot be reached.
    """
    api = HfApi()
    with _explaining(name, shipment.folder):
        try:
            there: list[str] | None = api.list_repo_files(name)
        except RepositoryNotFoundError:
            there = None
        if set(there or ()) - {".gitattributes"} and not update:
            raise RunError(
                f"{name} is on the Hub already and holds {len(there or ())} files; nothing was "
                "uploaded. Choose another name, or replace what is there with --update."
            )
        if there is not None and private and api.repo_info(name).private is False:
            raise RunError(
                f"{name} is on the Hub already, and everybody may see it; nothing was uploaded. "
                "Choose another name, or say --public."
            )
        if there is None:
            api.create_repo(name, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=name, folder_path=shipment.folder, commit_message="Upload by GaPO-Lite"
        )
    return done.commit_url.partition("/commit/")[0]


def _front_matter(card: Path) -> dict[str, object]:
    _, _, rest = card.read_text(encoding="utf-8", errors="replace").partition("---\n")
    try:
        found = yaml.safe_load(rest.partition("\n---")[0])
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


@contextmanager
def _explaining(name: str, folder: Path) -> Iterator[None]:
    """Turns what the Hub and the network raise into one message, without the token."""
    try:
        yield
    except GapoError:
        raise
    except LocalTokenNotFoundError:
        why = _REFUSALS[401]
    except OfflineModeIsEnabled:
        why = "HF_HUB_OFFLINE is set, which forbids the network. Unset it"
    except HfHubHTTPError as error:
        status = error.response.status_code
        why = _REFUSALS.get(status, f"the Hub answered {status}: {_said(error)}")
    except (HTTPError, XetDownloadError) as error:
        why = f"the Hub cannot be reached ({_said(error)}). Check the network"
    except (OSError, RuntimeError) as error:
        why = f"the upload broke off ({_said(error)})"
    else:
        return
    raise RunError(
        f"{name} was not uploaded: {why}. The export is whole in {folder}; try again with "
        f"gapo-lite share {shlex.quote(str(folder))} --to {name}"
    )


def _said(error: Exception) -> str:
    """An error's words on one line, without anything that is or looks like a token."""
    text = " ".join(str(error).split()) or type(error).__name__
    if token := get_token():
        text = text.replace(token, "***")
    return _TOKEN.sub("***", text)[:300]
