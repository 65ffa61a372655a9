"""Every error that pocketlm raises on purpose.

    PocketlmError
    ├── ModelNotFoundError         a name that the catalogue does not know, a path that does not exist
    ├── DownloadError              no network, a server's refusal, a file that fails its sha256
    ├── CheckpointError            a GGUF or safetensors source that is truncated, corrupt or incomplete
    │   └── UnsupportedModelError  a sound source of a kind that pocketlm has no code for
    ├── BundleError                a bundle with a missing or altered file
    │   ├── ManifestError          a manifest that does not follow its schema or is newer than this release
    │   └── NoHiddenStatesError    a bundle that gives no embeddings (session.py)
    ├── PromptError                input that cannot become tokens (also a chat template that fails)
    │   └── ContextOverflowError   more tokens than the context holds; carries both numbers
    ├── InvalidSettingError        a setting outside its range (also a ValueError)
    ├── QualityGateError           an export that misses its quality gate
    ├── MissingExtraError          a feature whose optional packages are not installed
    ├── StorageError               a full or unwritable disk
    ├── QueueFullError             more requests than may wait (scheduler.py)
    ├── ConstraintError            a grammar that grew too complex while an answer was under way (constraint/)
    └── SavedPrefixError           a saved prefix of another bundle, or a damaged one (saved_prefix.py)

A message says what came, what was expected and what to do. The command line prints it as it is,
without a traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PocketlmError(Exception):
    """Root of everything that pocketlm raises on purpose."""


class ModelNotFoundError(PocketlmError):
    """A name that is neither in the catalogue nor a path."""


class DownloadError(PocketlmError):
    """A source could not be fetched, or what came is not what was asked for."""


class CheckpointError(PocketlmError):
    """A checkpoint is truncated, corrupt or incomplete."""


class UnsupportedModelError(CheckpointError):
    """A sound checkpoint of an architecture or a format variant that pocketlm has no code for."""


class BundleError(PocketlmError):
    """A bundle's file is missing or altered."""


class ManifestError(BundleError):
    """A manifest does not follow its schema, or a newer pocketlm wrote it."""


class PromptError(PocketlmError):
    """Input that cannot become tokens."""


class ContextOverflowError(PromptError):
    """A prompt that does not fit the context; nothing is ever cut silently."""

    def __init__(self, prompt_tokens: int, context_length: int) -> None:
        super().__init__(
            f"the prompt has {prompt_tokens:,} tokens, but the context holds {context_length:,} "
            "(and an answer needs at least one). Shorten the prompt, or load the model with a larger "
            "context_length if it was trained for one."
        )
        self.prompt_tokens = prompt_tokens
        self.context_length = context_length


class InvalidSettingError(PocketlmError, ValueError):
    """A setting outside its range."""


class QualityGateError(PocketlmError):
    """No recipe met the quality gate."""


class MissingExtraError(PocketlmError):
    """A feature needs packages that are not installed."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f'{feature} needs more packages. Install them with: pip install "pocketlm[{extra}]"')
        self.extra = extra


class StorageError(PocketlmError):
    """A file could not be written: the disk is full or the folder is not writable."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`" Did you mean a or b?"`, or the empty string if nothing in `known` is near `name`."""
    near = difflib.get_close_matches(name.lower(), list(known), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(near)}?" if near else ""
