"""Errors that a person can act on.

    GapoError
    ├── ConfigError   a setting is unknown, out of range or contradicts another
    ├── DataError     a file, row or column cannot be used
    ├── ModelError    a model, tokenizer or adapter cannot be loaded or does not fit
    └── RunError      a run folder, checkpoint, device or disk is not as it should be

The message says what happened (with value and place), why it matters and what to do. The command
line prints it without a traceback and exits with code 2. Anything else that is raised is a bug of
ours and keeps its traceback.
"""

from __future__ import annotations


class GapoError(Exception):
    """Base of all errors that are a person's to mend, not a bug."""


class ConfigError(GapoError):
    """A setting is unknown, out of range, or contradicts another one."""


class DataError(GapoError):
    """A data source, row or column cannot be used."""


class ModelError(GapoError):
    """A model, tokenizer or adapter cannot be loaded, or does not fit what it is used for."""


class RunError(GapoError):
    """A run folder, checkpoint, device or disk is not as it should be."""
