"""What can go wrong, by kind; each message says what was given, what is accepted, what to do."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class MMForgetError(Exception):
    """Base of every error a user can cause or mend; the CLI prints it and exits with 2."""


class ConfigError(MMForgetError):
    """A config names something unknown or holds a value of the wrong type or range."""

    def __init__(self, faults: str | Sequence[str]) -> None:
        self.faults = (faults,) if isinstance(faults, str) else tuple(faults)
        if len(self.faults) == 1:
            super().__init__(self.faults[0])
        else:
            listed = "\n".join(f"  - {fault}" for fault in self.faults)
            super().__init__(f"{len(self.faults)} faults in the config:\n{listed}")


class DataError(MMForgetError):
    """A data set on disk is not in its published layout, or an example cannot be read."""


class SplitError(MMForgetError):
    """Splits overlap, are empty, or a method opened one that it did not declare."""


class CheckpointError(MMForgetError):
    """A checkpoint is truncated, of another shape, or of a format that could run code."""


class MissingDependencyError(MMForgetError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed. Install it: pip install 'mmforget[{extra}]'")


class ResourceError(MMForgetError):
    """The machine ran out of memory or disk."""


class BusyError(MMForgetError):
    """Another process holds the run or cache entry."""


class CollapsedError(MMForgetError):
    """The loss is not finite; the run is recorded with status `collapsed`."""


def unknown(kind: str, given: str, accepted: Iterable[str], see: str) -> str:
    """Return the message for a name that does not exist, with close matches.

    Args:
        kind: What was named, such as "method".
        given: The name as typed.
        accepted: All names that exist.
        see: The command that lists them.
    """
    names = sorted(accepted)
    short = {name.rpartition("/")[2]: name for name in names}
    close = get_close_matches(given, names, n=3, cutoff=0.5)
    close += [short[s] for s in get_close_matches(given, list(short), n=3, cutoff=0.6)]
    unique = list(dict.fromkeys(close))
    hint = f" Close: {', '.join(unique)}." if unique else f" Accepted: {', '.join(names[:12])}."
    return f"unknown {kind} {given!r}.{hint} See: {see}"
