"""Every error dtpipe raises on purpose, each with the exit code of the command that meets it.

A message has three parts: what is wrong with the value seen, where, what to do next. The command line prints one line
for these and a traceback only for other exceptions.
"""


class DtpipeError(Exception):
    """Base of all deliberate errors; `exit_code` is what the command line returns."""

    exit_code = 1


class ConfigError(DtpipeError):
    """A flag, a config value or their combination cannot be used."""

    exit_code = 2


class PlanChangedError(ConfigError):
    """The output holds a dataset of another recipe."""


class LockHeldError(ConfigError):
    """Another live writer owns the output, or took it over."""


class ShapeError(ConfigError):
    """Two arrays or modules that must fit do not."""


class InputError(DtpipeError):
    """An input is missing or cannot be read."""

    exit_code = 3


class TeacherError(InputError):
    """A teacher checkpoint is missing, of another kind, or cannot be represented."""


class DamagedDataError(DtpipeError):
    """Stored bytes are not those that were written."""

    exit_code = 4


class ManifestError(DamagedDataError):
    """A manifest, plan, entry or index is unreadable or contradicts what lies beside it."""


class IncompleteError(DtpipeError):
    """Work is left; the same command, run again, goes on."""

    exit_code = 5


class MissingPackageError(DtpipeError):
    """An optional package is needed and not installed."""

    exit_code = 6


class ErrorBudgetError(DtpipeError):
    """More samples or shards failed than the error budget allows."""

    exit_code = 7


class StoreError(DtpipeError):
    """The store is full, unwritable or does not keep its promises."""

    exit_code = 8


class DivergedError(DtpipeError):
    """A loss or its gradient is not finite; the weights are as before the step."""


class StoppedError(DtpipeError):
    """A signal asked the run to stop and it did so cleanly."""

    exit_code = 143
