"""The errors that a user can mend. Each is also what a caller would expect: a `ValueError`, a `FileNotFoundError`, ...

The command line says one of these in a line and exits with status 2; any other exception is a bug, and shows its
traceback. So what answers a user's mistake, or the machine's, is raised as one of these, and what checks our own code
is not. Knows no option, no file, no model.
"""

from __future__ import annotations

TOLD = 3  # of clients that cannot take part, how many an error says the reasons of


class SmartmopsError(Exception):
    """What a user can mend: the message has a line for each fault, with the value, its limit and the way out."""


class ConfigError(SmartmopsError, ValueError):
    """An option, or a combination of options, is outside its limits."""


class UnknownOption(ConfigError, TypeError):
    """There is no such option, or a required one is missing."""


class WrongType(ConfigError, TypeError):
    """An option or an argument is of another type than it takes."""


class FileTaken(ConfigError, OSError):
    """A file or folder that an option names cannot be written."""


class DataError(SmartmopsError, ValueError):
    """Data cannot be read, or are not fit for what is asked of them."""


class NoText(DataError, TypeError):
    """What is to be text is something else."""


class BaseModelError(SmartmopsError, ValueError):
    """A base model cannot be read, or its architecture or tokenizer is not supported."""


class BaseModelNotFound(BaseModelError, FileNotFoundError):
    """There is no such base model, on this machine or on the hub."""


class BaseModelUnreachable(BaseModelError, ConnectionError):
    """A base model is not on this machine, and cannot be downloaded."""


class AdapterError(SmartmopsError, ValueError):
    """An adapter cannot be read or does not fit its base, or is called with arguments it does not take."""


class ArgumentTypeError(AdapterError, TypeError):
    """An argument of a call is of another type than it takes."""


class AdapterNotFound(AdapterError, FileNotFoundError):
    """There is no adapter in a folder."""


class RunError(SmartmopsError, ValueError):
    """A run folder is damaged, or is of another run than the one asked for."""


class RunNotFound(RunError, FileNotFoundError):
    """There is no run in a folder, or it is unfinished."""


class RunExists(RunError, FileExistsError):
    """A folder that a run is to be written to holds something already."""


class NotAFolder(RunExists, NotADirectoryError):
    """A file is where a folder is to be written."""


class RunBusy(RunError, BlockingIOError):
    """Another process or thread is writing to a run folder."""


class Diverged(RunError):
    """The loss is no longer a finite number; the model holds the last state whose loss was."""


class FederationError(SmartmopsError, ValueError):
    """Server and clients do not fit each other, or a message between them is damaged."""


class ClientsRefused(FederationError):
    """Some clients cannot take part; `reasons` says why of each, by its number."""

    reasons: dict[int, str] = {}  # noqa: RUF012  never changed, only replaced

    @classmethod
    def of(cls, reasons: dict[int, str]) -> ClientsRefused:
        """The error, from why each cannot take part."""
        told = [*dict.fromkeys(reasons.values())][:TOLD]
        rest = sum(reason not in told for reason in reasons.values())
        made = cls("\n".join([*told, *([f"and {rest} more clients cannot take part"] if rest else [])]))
        made.reasons = reasons
        return made


class FederationUnreachable(FederationError, ConnectionError):
    """The other side of a federation cannot be reached, or did not start."""


class FederationTimeout(FederationError, TimeoutError):
    """The other side of a federation did not answer in time."""


class QuorumLost(FederationError, RuntimeError):
    """Too few clients answered, again and again. The last whole round is in the checkpoint."""


class MissingExtra(SmartmopsError, ImportError):
    """An optional package is not installed; the message holds the line that installs it."""


class HubError(SmartmopsError, OSError):
    """The hub cannot be reached, or does not take what is sent to it."""


class ResourceError(SmartmopsError):
    """The machine has too little of something."""


class NoRoom(ResourceError, ValueError):
    """What is to be kept is larger than the memory or the disk that is free."""


class OutOfMemory(ResourceError, MemoryError, RuntimeError):
    """The memory of the machine or of an accelerator was not enough."""


class DiskError(ResourceError, OSError):
    """A disk is full, or refuses to be written."""


class PortTaken(ResourceError, ConfigError, OSError):
    """An address or port cannot be listened at."""
