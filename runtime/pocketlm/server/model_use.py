"""What those who use a `ModelStore` meet: leases, states and errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from pocketlm.aio import AsyncModel
from pocketlm.errors import PocketlmError, did_you_mean
from pocketlm.files import readable_size
from pocketlm.server.served_models import ServedModel

RETRY_AFTER_S = 5.0
"""For a model that has no room: answers of small models end within seconds."""


class UnknownModelError(PocketlmError):
    """A name that this server has no model for."""

    def __init__(self, name: str, known: Sequence[str]) -> None:
        shown = repr(name if len(name) <= 80 else f"{name[:79]}…")
        super().__init__(
            f"there is no model {shown} on this server.{did_you_mean(name[:80], known)} "
            f"It has: {', '.join(known)}."
        )


class ModelUnavailableError(PocketlmError):
    """A model that cannot be used now, but later: others are busy and the memory is theirs."""

    def __init__(self, message: str, retry_after_s: float = RETRY_AFTER_S) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ModelTooLargeError(PocketlmError):
    """A model that does not fit the memory budget even alone."""

    def __init__(self, model: ServedModel, budget_bytes: int) -> None:
        memory = model.memory
        rest = readable_size(memory.least_bytes - memory.slot_bytes)
        super().__init__(
            f"{model.name} takes at least {readable_size(memory.least_bytes)} ({rest}, and "
            f"{readable_size(memory.slot_bytes)} for an answer with a context of {model.context_length:,} "
            f"tokens), but the memory budget is {readable_size(budget_bytes)}. Start the server with a "
            "larger --memory-budget, a smaller --context-length or a smaller model."
        )


@dataclass(frozen=True)
class ModelState:
    """What there is to say of a served model at a moment."""

    served: ServedModel
    loaded: bool
    loading: bool  # or waiting for its turn to be
    running: int  # requests under way
    waiting: int  # requests that wait for the engine, or for the model to be loaded
    memory_bytes: int | None  # what it may grow to; None: not loaded
    expires_at: float | None  # epoch seconds; None: not loaded, in use, or kept for ever
    context_length: int  # tokens

    @property
    def name(self) -> str:
        return self.served.name


class Lease:
    """One use of a loaded model, until it is released. As a context manager it ends with the block."""

    def __init__(self, name: str, model: AsyncModel, release: Callable[[], None]) -> None:
        """`ModelStore.acquire` makes one."""
        self.name = name
        self.model = model
        self._release: Callable[[], None] | None = release

    def release(self) -> None:
        """Gives the model back. Further calls do nothing."""
        release, self._release = self._release, None
        if release is not None:
            release()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()
