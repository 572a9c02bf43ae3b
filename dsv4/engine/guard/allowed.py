"""`allow(reason=...)`: the only exception to a quiet step. The certificate lists its uses."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Protocol


class Listener(Protocol):
    def allow_begins(self, reason: str) -> None: ...

    def allow_ends(self) -> None: ...


_thread = threading.local()
LISTENERS: list[Listener] = []  # the recordings under way


def reason_here() -> str | None:
    """The innermost reason on this thread."""
    reasons: list[str] = getattr(_thread, "reasons", [])
    return reasons[-1] if reasons else None


class allow:
    """`with allow(reason="the first step of a bucket captures its graph"):` what this thread does inside is reported
    as allowed, with the reason. ValueError without one.
    """

    def __init__(self, *, reason: str):
        if not reason.strip():
            raise ValueError("allow needs a reason: it is printed in the certificate")
        self.reason = reason

    def __enter__(self) -> None:
        if not hasattr(_thread, "reasons"):
            _thread.reasons = []
        _thread.reasons.append(self.reason)
        for listener in LISTENERS:
            listener.allow_begins(self.reason)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for listener in LISTENERS:
            listener.allow_ends()
        _thread.reasons.pop()
