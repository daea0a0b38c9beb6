"""Which data and models a browser may name, and where uploads go.

Everything a handler is sent can be forged, so nothing is opened that has not passed here: an
embedded name, a Hub id, or a path that leads, all links followed, to something below the folder
that the server was given. The refusal is the same whether the path exists or not.
"""

from __future__ import annotations

import contextlib
import filecmp
import os
import re
import tempfile
import unicodedata
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from gapo_lite.config import RunConfig
from gapo_lite.data.files import READERS
from gapo_lite.data.sources import HUB_ID
from gapo_lite.disk import file_lock
from gapo_lite.embedded import EMBEDDED_DATA, EMBEDDED_MODELS
from gapo_lite.errors import ConfigError, DataError, GapoError, ModelError, RunError

SUFFIXES = [f"{suffix}{zipped}" for suffix in READERS for zipped in (".gz", "")]
"""How the name of a file that can be read ends."""

MAX_FILES = 500
MAX_ENTRIES_SEEN = 20_000
MAX_NAME = 100
MAX_NAME_BYTES = 200
MAGIC = {".gz": b"\x1f\x8b", ".parquet": b"PAR1"}
_PIECE = 1 << 20
_OLD_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,94}\w", re.ASCII)  # roberta-large, say


@dataclass(frozen=True, slots=True)
class Places:
    """What the page may open.

    Attributes:
        data_dir: data files and saved `datasets` folders; uploads go to its folder `uploads`.
        models_dir: local models. Neither folder need exist.
    """

    data_dir: Path
    models_dir: Path

    def check_source(self, name: str) -> str:
        """What to put into `data.source` for data that a browser named.

        Args:
            name: embedded name, Hub id, or path, relative to where the server runs or to data_dir.

        Returns:
            The name, or the path as a command typed where the server runs would take it.

        Raises:
            DataError: it is none of these, or not below data_dir.
        """
        found = _checked(name, EMBEDDED_DATA, self.data_dir)
        if found is None and _is_hub_id(name) and not _exists(Path(name)):
            found = name
        if found is None:
            raise DataError(
                f"{_shown(name)} can't be opened as data here: choose a file of the list, upload "
                "one, or give a Hub id of the form owner/name."
            )
        return found

    def check_model(self, name: str) -> str:
        """What to put into `model.name` for a model that a browser named; as check_source.

        Raises:
            ModelError: it is no embedded name, Hub id, or path below models_dir.
        """
        found = _checked(name, EMBEDDED_MODELS, self.models_dir)
        if found is None and _is_hub_id(name) and not _exists(Path(name)):
            found = name
        if found is None:
            raise _no_model(name)
        return found

    def check_encoder(self, name: str) -> str:
        """What to put into `ef.bertscore_model`; as check_model, and old Hub names without an owner
        (roberta-large).

        Raises:
            ModelError: as check_model.
        """
        is_old = isinstance(name, str) and _OLD_HUB_NAME.fullmatch(name) and ".." not in name
        return name if is_old and not _exists(Path(name)) else self.check_model(name)

    def check_config(self, config: RunConfig) -> RunConfig:
        """The configuration with its data and models as the checks return them.

        Raises:
            ConfigError: naming every setting that may not be opened.
        """
        checks: dict[str, tuple[Callable[[str], str], str | None]] = {
            "data.source": (self.check_source, config.data.source),
            "data.heldout_source": (self.check_source, config.data.heldout_source),
            "model.name": (self.check_model, config.model.name),
            "model.revision": (_check_revision, config.model.revision),
            "ef.bertscore_model": (self.check_encoder, config.ef.bertscore_model),
        }
        found: dict[str, dict[str, str]] = {"data": {}, "model": {}, "ef": {}}
        problems = []
        for key, (check, name) in checks.items():
            section, _, setting = key.partition(".")
            try:
                if name is not None:
                    found[section][setting] = check(name)
            except GapoError as error:
                problems.append(f"{key}: {error}")
        if problems:
            raise ConfigError("\n".join(problems))
        return config.model_copy(
            update={
                "data": config.data.model_copy(update=found["data"]),
                "model": config.model.model_copy(update=found["model"]),
                "ef": config.ef.model_copy(update=found["ef"]),
            }
        )

    def keep_upload(self, temp_path: str | Path, original_name: str) -> str:
        """Copies an uploaded file to where it stays, and returns what `check_source` would.

        The same file under the same name is kept once; another one gets a number (`pairs-2.csv`).
        A file is there as a whole or not at all.

        Args:
            temp_path: where the server itself has put it; the caller vouches for that.
            original_name: as the browser says.

        Raises:
            DataError: it is of no kind that can be read, or not of the kind that its name says.
            RunError: the disk is full, read-only or not this user's.
        """
        name = clean_name(original_name)
        uploads = self.data_dir / "uploads"
        try:
            uploads.mkdir(parents=True, exist_ok=True)
            with _copy_of(Path(temp_path), uploads, name) as copy:
                return _portable(_settled(copy, uploads, name).resolve())
        except OSError as error:
            raise RunError(
                f"{_shown(name)} could not be kept: {error.strerror or error}. Make room on the "
                "server's disk, or start it with another --data-dir, then upload again."
            ) from None

    def files(self) -> list[str]:
        """Data files and saved `datasets` folders below data_dir that `check_source` takes.

        Returns:
            Their names relative to data_dir, newest first, at most MAX_FILES; none hidden.
        """
        names: list[str] = []
        for path in sorted(_data_paths(self.data_dir), key=_newest_first):
            name, real = path.relative_to(self.data_dir).as_posix(), _below(path, self.data_dir)
            if real is not None and len(names) < MAX_FILES:  # else it is a link that leads out
                is_clear = _checked(name, (), self.data_dir) == _portable(real)
                names.append(name if is_clear else _portable(real))
        return names

    def models(self) -> list[str]:
        """Local models (folders with a config.json, at most two levels below models_dir), as
        `check_model` returns them."""
        found = []
        for pattern in ("*/config.json", "*/*/config.json"):
            for path in sorted(self.models_dir.glob(pattern))[:MAX_FILES]:
                with contextlib.suppress(GapoError):
                    found.append(self.check_model(str(path.parent.absolute())))
        return found


def clean_name(original_name: str) -> str:
    """A file name without folders, leading dots and odd characters; letters of any script stay.

    Raises:
        DataError: its ending is of no kind that can be read.
    """
    name = unicodedata.normalize("NFC", re.split(r"[/\\]", str(original_name))[-1])
    suffix = next((end for end in SUFFIXES if name.lower().endswith(end)), None)
    if suffix is None:
        raise DataError(
            f"{_shown(original_name)} is of no kind that can be read: its name should end with "
            f"{', '.join(READERS)}, or one of these and .gz."
        )
    kept = "".join(char if _is_plain(char) else "-" for char in name[: -len(suffix)])
    stem = re.sub(r"-{2,}", "-", kept).strip("-. ")
    room = MAX_NAME_BYTES - len(suffix)
    stem = stem[: MAX_NAME - len(suffix) - len("-999")].encode()[:room].decode(errors="ignore")
    return f"{stem or 'upload'}{suffix}"


# -- names and paths --


def _checked(name: str, embedded: Collection[str], root: Path) -> str | None:
    """The name if it is embedded, the path if it leads to something below `root`."""
    if not isinstance(name, str) or not name:
        return None
    if name in embedded:
        return name
    for start in (Path(), root):
        path = _below(start / name, root)
        if path is not None:
            return _portable(path)
    return None


def _below(path: Path, root: Path) -> Path | None:
    """What `path` leads to, links followed, if it is there, below `root`, and not hidden in it."""
    try:
        real, real_root = path.expanduser().resolve(strict=True), root.resolve()
    except (OSError, ValueError, RuntimeError):  # absent, a NUL in it, links in a circle, no home
        return None
    if real == real_root or not real.is_relative_to(real_root):
        return None
    hidden = any(part.startswith(".") for part in real.relative_to(real_root).parts)
    return None if hidden else real


def _portable(path: Path) -> str:
    """Relative to the working folder where it is below it, and never to be taken for a Hub id."""
    if not path.is_relative_to(Path.cwd()):
        return str(path)
    relative = str(path.relative_to(Path.cwd()))
    is_file = relative.lower().endswith(tuple(SUFFIXES))
    is_hub_name = _is_hub_id(relative) or (_OLD_HUB_NAME.fullmatch(relative) and not is_file)
    return f"./{relative}" if is_hub_name else relative


def _exists(path: Path) -> bool:
    try:
        return os.path.lexists(path.expanduser())
    except (OSError, ValueError, RuntimeError):
        return False


def _is_hub_id(name: str) -> bool:
    """What the core takes for one as data: it would look for anything else among the files here."""
    if not isinstance(name, str) or not HUB_ID.fullmatch(name) or name.startswith("buckets/"):
        return False
    is_file = Path(name).suffix.lower() in {*READERS, ".gz", ".py", ".git"}
    return not is_file and ".." not in name and "--" not in name


def _check_revision(revision: str) -> str:
    """A revision names a file in the Hub's cache, which must not be one elsewhere."""
    if not re.fullmatch(r"\w[\w./-]{0,200}", revision, re.ASCII) or ".." in revision:
        raise ModelError(f"{_shown(revision)} is no branch, tag or commit.")
    return revision


def _no_model(name: object) -> ModelError:
    return ModelError(
        f"{_shown(name)} can't be opened as a model here: choose {' or '.join(EMBEDDED_MODELS)}, "
        "give a Hub id of the form owner/name, or put it into the server's models folder."
    )


def _shown(name: object) -> str:
    return f"{name!r:.120}"


# -- uploads --


@contextlib.contextmanager
def _copy_of(source: Path, folder: Path, name: str) -> Iterator[Path]:
    """A checked copy in `folder` under a hidden name, gone afterwards if it was not renamed."""
    handle, part = tempfile.mkstemp(dir=folder, prefix=".upload-")
    try:
        with os.fdopen(handle, "wb") as target, source.open("rb") as stream:
            _check_content(stream.read(4), name)
            stream.seek(0)
            is_text = not name.endswith(tuple(MAGIC))
            while piece := stream.read(_PIECE):
                if is_text and b"\0" in piece:
                    raise _not_what_it_says(name, "a text in UTF-8, as it has NUL bytes in it")
                target.write(piece)
            target.flush()
            os.fsync(target.fileno())
        Path(part).chmod(folder.stat().st_mode & 0o666)  # mkstemp's is for this user alone
        yield Path(part)
    finally:
        Path(part).unlink(missing_ok=True)


def _check_content(start: bytes, name: str) -> None:
    if not start:
        raise DataError(f"{_shown(name)} is empty, so there is nothing to load.")
    magic = MAGIC.get(Path(name).suffix, b"")
    if not start.startswith(magic):
        raise _not_what_it_says(name, f"{Path(name).suffix}, going by how it begins")


def _not_what_it_says(name: str, kind: str) -> DataError:
    return DataError(f"{_shown(name)} is not {kind}. Save it as what its name says, and try again.")


def _settled(copy: Path, folder: Path, name: str) -> Path:
    """Renames the copy to the first of name, name-2, … that is free or holds the same."""
    suffix = next(end for end in SUFFIXES if name.endswith(end))
    stem = name.removesuffix(suffix)
    with file_lock(folder / ".lock", patience=60.0):
        for number in range(1, 1000):
            place = folder / (name if number == 1 else f"{stem}-{number}{suffix}")
            if not os.path.lexists(place):
                return copy.rename(place)
            if place.is_file() and filecmp.cmp(copy, place, shallow=False):
                return place
    raise RunError(f"there are too many files named {_shown(name)}: rename yours, then try again.")


def _is_plain(char: str) -> bool:
    return char in "._- +()" or unicodedata.category(char)[0] in "LMN"


# -- the list of files --


def _data_paths(data_dir: Path) -> Iterator[Path]:
    """Files of a kind that can be read, and folders of `save_to_disk`; looks at a bounded number
    of entries, so that a whole disk may be named as the folder."""
    seen = 0
    for folder, folders, files in os.walk(data_dir):
        here = Path(folder)
        seen += len(folders) + len(files)
        if here != data_dir and _is_dataset(files):
            folders.clear()
            yield here
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (
            here / name
            for name in files
            if name.lower().endswith(tuple(SUFFIXES)) and not name.startswith(".")
        )
        if seen > MAX_ENTRIES_SEEN:
            return


def _newest_first(path: Path) -> tuple[float, str]:
    try:
        return -path.stat().st_mtime, str(path)
    except OSError:  # gone since, or a link to nothing
        return 0.0, str(path)


def _is_dataset(files: list[str]) -> bool:
    return "dataset_dict.json" in files or {"state.json", "dataset_info.json"} <= set(files)
