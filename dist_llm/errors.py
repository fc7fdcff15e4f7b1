"""What a user can act on. Every error names the setting or file, the rule that it breaks and what would be right.

Each class carries the process exit code that schedulers act on (0 is done; see `ExitCode`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every `dist-llm` command; job scripts requeue by them."""

    DONE = 0
    BAD_DATA = 65
    PEER_LOST = 69
    BUG = 70
    IO = 74
    PREEMPTED = 75
    NUMERICS = 76
    CONFIG = 78


INTERRUPTED = 130
"""Exit code of a process ended by Ctrl-C with nothing to save, as shells count it (128 + SIGINT)."""


class DistLLMError(Exception):
    """Base of every error that is the user's to act on; printed without a traceback."""

    exit_code: ExitCode = ExitCode.BUG
    shared: bool = False
    """Whether every rank raises this same error, so that one of each node prints it."""


@dataclass(frozen=True)
class Violation:
    """One broken rule: `key=value` must `rule`; `legal` lists the nearest values that would do."""

    key: str
    value: object
    rule: str
    legal: tuple[object, ...] = ()

    def __str__(self) -> str:
        shown = "unset" if self.value is None else str(self.value)
        text = f"{self.key}={shown} {self.rule}"
        if not self.legal:
            return text
        choices = ["null" if choice is None else str(choice) for choice in self.legal]
        joined = choices[0] if len(choices) == 1 else ", ".join(choices[:-1]) + " or " + choices[-1]
        return f"{text}; use {joined}"


class ConfigError(DistLLMError):
    """The config is not one that can run; holds every violation, not the first."""

    exit_code = ExitCode.CONFIG

    def __init__(self, violations: list[Violation] | str) -> None:
        if isinstance(violations, str):
            self.violations: list[Violation] = []
            super().__init__(violations)
            return
        self.violations = list(violations)
        count = len(self.violations)
        head = f"{count} setting{'s' if count != 1 else ''} cannot be used:"
        super().__init__("\n".join([head, *(f"  {violation}" for violation in self.violations)]))


class LayoutError(ConfigError):
    """The ranks that were started do not fit the layout that the config asks for."""


class DataError(DistLLMError):
    """A corpus, tokenizer or indexed data set is damaged, empty or unreadable as what it claims to be."""

    exit_code = ExitCode.BAD_DATA


class StorageError(DistLLMError):
    """The operating system refused to read or write a file."""

    exit_code = ExitCode.IO


class CheckpointError(DistLLMError):
    """A checkpoint is damaged, incomplete or unsafe to read."""

    exit_code = ExitCode.BAD_DATA


class CheckpointMismatch(ConfigError):
    """A sound checkpoint that belongs to another model, tokenizer or data set."""


class NumericsError(DistLLMError):
    """Loss or gradients stayed non-finite for longer than the config allows."""

    exit_code = ExitCode.NUMERICS


class PeerLostError(DistLLMError):
    """Another rank, or the rendezvous store, went away; the job may be retried."""

    exit_code = ExitCode.PEER_LOST


class EngineUnavailable(DistLLMError):
    """The chosen engine cannot be used here."""

    exit_code = ExitCode.CONFIG


def exit_code_of(error: BaseException, is_peer_loss: Callable[[BaseException], bool]) -> int:
    """Return the exit code of an error: its own, 130 for Ctrl-C, 69 for a lost peer, 74 for the system's, else 70."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, DistLLMError):
        return error.exit_code
    if is_peer_loss(error):
        return ExitCode.PEER_LOST
    return ExitCode.IO if isinstance(error, OSError) else ExitCode.BUG
