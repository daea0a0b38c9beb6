"""An OpenAI-compatible endpoint, asked patiently: retries, time limits, and replies kept on disk.

    endpoint = Endpoint.from_environment("gpt-4.1-mini")     # OPENAI_BASE_URL, OPENAI_API_KEY
    endpoint.ask([{"role": "user", "content": "What is a leap year?"}])

The key goes into one request header and nowhere else: into no message, file or command line. No
redirect is followed, since it could carry the key to another host.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import logging
import os
import random
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gapo_lite.disk import replace_text
from gapo_lite.embedded import cache_dir
from gapo_lite.errors import ConfigError, RunError
from gapo_lite.journal import digest
from gapo_lite.types import Message

logger = logging.getLogger(__name__)

OPENAI = "https://api.openai.com/v1"
MAX_BODY = 8 * 1024**2
MAX_WAIT_S = 600.0
"""The longest wait that a server may ask for."""
_BUSY = {408, 409, 425, 429}


class NonsenseError(Exception):
    """A reply that is no chat completion: no JSON, cut off, HTML, or an error; never leaves the
    package."""


class StoppedError(Exception):
    """Another request has ended all of them; never leaves the package."""


class RefusedError(Exception):
    """The server will not answer this request (400, 413, 422); never leaves the package.

    `parameter` is the field of the request that the model does not take, "" for none.
    """

    def __init__(self, text: str, parameter: str = ""):
        super().__init__(text)
        self.parameter = parameter


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model said.

    Attributes:
        text: "" where it said nothing.
        was_cut: whether max_tokens ended it.
    """

    text: str
    was_cut: bool = False


@dataclass(slots=True)
class Spent:
    """What asking has taken so far.

    Attributes:
        requests: that were sent, those that failed too.
        tokens_in, tokens_out: as the server counted; 0 where it does not say.
    """

    requests: int = 0
    tokens_in: int = 0
    tokens_out: int = 0


@dataclass(slots=True)
class Endpoint:
    """Where to ask, and how patiently; `ask` may be called from several threads.

    Attributes:
        url: up to and without /chat/completions.
        model: its name there.
        key: "" for none.
        max_tokens: longest reply.
        timeout: seconds for one request, from its start to its last byte.
        retries: how often a request that failed is sent again.
        kept_in: folder of the replies.
        stopped: set it to give up waiting, and all that is not sent yet.
        spent: by this object, in all threads.
    """

    url: str
    model: str
    key: str = field(repr=False, default="")
    max_tokens: int = 512
    timeout: float = 60.0
    retries: int = 6
    kept_in: Path = field(default_factory=lambda: cache_dir() / "judge")
    stopped: threading.Event = field(default_factory=threading.Event)
    spent: Spent = field(default_factory=Spent)
    _counting: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _asking: dict[Path, threading.Lock] = field(default_factory=dict, repr=False)
    _untaken: set[str] = field(default_factory=set, repr=False)

    @classmethod
    def from_environment(cls, model: str, **options: Any) -> Endpoint:
        """By $OPENAI_BASE_URL (else OpenAI's own) and $OPENAI_API_KEY (a local server needs none).

        Raises:
            ConfigError: a variable is no address or no key, or OpenAI's own is asked without one.
        """
        url = os.environ.get("OPENAI_BASE_URL", "").strip().rstrip("/") or OPENAI
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not _is_address(url):
            raise ConfigError(
                "OPENAI_BASE_URL is no address such as https://api.openai.com/v1 or "
                "http://127.0.0.1:8000/v1 (http or https, in ASCII, without user, password and "
                "query)."
            )
        if not re.fullmatch(r"[!-~]*", key):
            raise ConfigError("OPENAI_API_KEY holds characters that no key has. Set it again.")
        if not key and url == OPENAI:
            raise ConfigError(
                "OPENAI_API_KEY is not set. Set it, or set OPENAI_BASE_URL to the server to ask."
            )
        return cls(url, model, key, **options)

    @property
    def name(self) -> str:
        """Model and server, to be shown and stored."""
        return f"{self.model} at {urlsplit(self.url).netloc}"

    def kept(self, messages: Sequence[Message], attempt: int = 0) -> Reply | None:
        """The reply of an earlier call, which costs nothing."""
        try:
            row = json.loads(self._place(messages, attempt).read_text(encoding="utf-8"))
            return Reply(str(row["text"]), bool(row.get("was_cut")))
        except (OSError, ValueError, KeyError, TypeError):  # absent, or damaged: it is asked anew
            return None

    def ask(self, messages: Sequence[Message], attempt: int = 0) -> Reply:
        """The reply to a conversation, kept from before if there is one.

        Args:
            messages: the conversation.
            attempt: another number asks again, though the reply to this one is kept.

        Raises:
            NonsenseError: what came back is no chat completion; it is not kept.
            RefusedError: the server refuses this request, perhaps not the next.
            StoppedError: `stopped` is set.
            ConfigError: the server refuses the key, or knows no such model or address.
            RunError: it failed more often than `retries`, or asks for too long a wait.
        """
        place = self._place(messages, attempt)
        with self._asking.setdefault(place, threading.Lock()):  # the same is asked once at a time
            if reply := self.kept(messages, attempt):
                return reply
            reply, tokens_in, tokens_out = self._read(self._send_as_taken(self._body(messages)))
            with self._counting:
                self.spent.tokens_in += tokens_in or 0
                self.spent.tokens_out += tokens_out or 0
            if not (reply.text or reply.was_cut):
                return reply  # nothing is what a server says that is set up wrongly
            place.parent.mkdir(parents=True, exist_ok=True)
            row = {**asdict(reply), "tokens_in": tokens_in, "tokens_out": tokens_out}
            replace_text(place, json.dumps(row))
        return reply

    def _body(self, messages: Sequence[Message]) -> dict[str, Any]:
        return {
            "model": self.model,
            "messages": list(messages),
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }

    def _place(self, messages: Sequence[Message], attempt: int) -> Path:
        return self.kept_in / f"{digest(self.url, self._body(messages), attempt)}.json"

    def _send_as_taken(self, body: dict[str, Any]) -> bytes:
        """Sends again without what the model says that it does not take: reasoning models know
        max_tokens by another name, and no temperature."""
        while True:
            taken = {name: value for name, value in body.items() if name not in self._untaken}
            if "max_tokens" not in taken:
                taken["max_completion_tokens"] = self.max_tokens
            try:
                return self._send(taken)
            except RefusedError as error:
                if error.parameter not in ("temperature", "max_tokens") or (
                    error.parameter not in taken
                ):
                    raise
                logger.info("%s takes no %s", self.name, error.parameter)
                self._untaken.add(error.parameter)

    def _send(self, body: dict[str, Any]) -> bytes:
        for number in range(self.retries + 1):
            if self.stopped.is_set():
                raise StoppedError
            try:
                return self._send_once(body)
            except _BusyError as error:
                last = error
            if number < self.retries:
                wait = last.wait or _backoff(number)  # 0, or a date that is past here, is no wait
                logger.info("%s; asked again in %.0f s", last, wait)
                self.stopped.wait(wait)
        often = f"{self.retries + 1} times in a row; the last time" if self.retries else "once"
        raise RunError(
            f"{self.name} failed {often}: {last}. What was judged is kept: give the same command "
            "again when it is back."
        )

    def _send_once(self, body: dict[str, Any]) -> bytes:
        with self._counting:
            self.spent.requests += 1
        headers = {"Content-Type": "application/json", "User-Agent": "gapo-lite"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(
            f"{self.url}/chat/completions", json.dumps(body).encode(), headers, method="POST"
        )
        deadline = time.monotonic() + self.timeout
        try:
            with _OPENER.open(request, timeout=self.timeout) as response:
                return _read_body(response, deadline)
        except urllib.error.HTTPError as error:
            with error:
                raise self._failure(error) from None
        except TimeoutError:
            raise _BusyError(f"no reply within {self.timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            if isinstance(reason, TimeoutError):
                raise _BusyError(f"no reply within {self.timeout:g} s") from None
            what = self._harmless(str(reason)) or type(reason).__name__
            raise _BusyError(f"the connection failed ({what})") from None

    def _failure(self, error: urllib.error.HTTPError) -> Exception:
        said = parameter = ""
        with suppress(OSError, http.client.HTTPException):
            body = error.read(65536)
            said, parameter = self._harmless(_message_of(body)), _parameter_of(body)
        if error.code in _BUSY or error.code >= 500:
            return self._busy(error, said)
        if error.code in (401, 403):  # what it says may hold parts of the key
            return ConfigError(
                f"{self.name} refuses the key ({error.code}). Check OPENAI_API_KEY and "
                "OPENAI_BASE_URL."
            )
        if error.code in (400, 413, 422):
            return RefusedError(f"{error.code}: {said}" if said else str(error.code), parameter)
        return ConfigError(
            f"{self.name} answers {error.code} {said}. Check --model, and OPENAI_BASE_URL, which "
            "ends before /chat/completions."
        )

    def _busy(self, error: urllib.error.HTTPError, said: str) -> Exception:
        wait = _retry_after(error.headers.get("Retry-After"))
        if wait is not None and wait > MAX_WAIT_S:
            return RunError(
                f"{self.name} asks to wait for {wait / 60:.0f} minutes ({error.code} {said}). What "
                "was judged is kept: give the same command again then."
            )
        return _BusyError(f"{self.name} answers {error.code} {said}".strip(), wait)

    def _read(self, body: bytes) -> tuple[Reply, int | None, int | None]:
        """The reply, and the tokens that the server counted in and out."""
        try:
            found = json.loads(body)
            choice = found["choices"][0]
            text = choice["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            said = self._harmless(_error_of(body))
            raise NonsenseError(said or "the reply is no chat completion") from None
        usage = found.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        tokens_in, tokens_out = (count if isinstance(count, int) else None for count in counts)
        text = text if isinstance(text, str) and text.strip() else ""
        return Reply(text, choice.get("finish_reason") == "length"), tokens_in, tokens_out

    def _harmless(self, text: str) -> str:
        text = " ".join(text.split())
        # before it is cut, or the beginning of a key might be left at the end
        return (text.replace(self.key, "…") if self.key else text)[:300]


class _BusyError(Exception):
    """A failure that may pass; `wait` is what the server asks for, in seconds."""

    def __init__(self, text: str, wait: float | None = None):
        super().__init__(text)
        self.wait = wait


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None  # becomes an HTTPError with the redirect's code


_OPENER = urllib.request.build_opener(_NoRedirects)


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna")
        is_port = parts.port is None or parts.port > 0
    except ValueError:
        return False
    plain = re.fullmatch(r"[!-~]+", url) and not re.search(r"[@?#\\]", url)
    return bool(plain and host and is_port and parts.scheme in ("http", "https"))


def _backoff(number: int) -> float:
    """1, 2, 4 … at most 60 seconds, a little varied so that threads don't come all at once."""
    return min(60.0, 2.0**number) * (0.75 + random.random() / 2)


def _retry_after(value: str | None) -> float | None:
    """Seconds, of a number or a date."""
    if value is None:
        return None
    with suppress(ValueError):
        return max(0.0, float(value))
    with suppress(ValueError, TypeError, OverflowError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return None


def _read_body(response: http.client.HTTPResponse, deadline: float) -> bytes:
    """All of it; a server that sends a byte now and then does not outlast the deadline."""
    pieces, size = [], 0
    while piece := response.read1(65536):
        pieces.append(piece)
        size += len(piece)
        if size > MAX_BODY:
            raise NonsenseError(f"it is longer than {MAX_BODY:,} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError
    return b"".join(pieces)


def _message_of(body: bytes) -> str:
    """The server's words, from where OpenAI and its imitators put them, or as they are."""
    return _error_of(body) or re.sub(r"<[^>]*>", " ", body.decode("utf-8", "replace"))


def _error_of(body: bytes) -> str:
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        error = json.loads(body)["error"]
        return str((error["message"] if isinstance(error, dict) else error) or "")
    return ""


def _parameter_of(body: bytes) -> str:
    """The field of the request that an error is about, as OpenAI says it; "" for none."""
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        error = json.loads(body)["error"]
        if str(error["code"]).startswith("unsupported_"):
            return str(error["param"])
    return ""
