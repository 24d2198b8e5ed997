"""Errors a user can act on.

Every message says what was expected, what came, and what to do about it. The command line turns any
`SsdJaxError` into that one sentence on stderr and exit code 2; nothing else in the package calls
`exit`.
"""


class SsdJaxError(Exception):
    """Base of all errors this package raises on purpose."""


class ConfigError(SsdJaxError):
    """A model or engine configuration that is unsupported or contradicts itself."""


class CheckpointError(SsdJaxError):
    """A checkpoint that is absent, damaged, incomplete or of an unknown kind."""


class RequestError(SsdJaxError):
    """A prompt or a sampling option that cannot be served as asked."""


class MemoryBudgetError(SsdJaxError):
    """A request that would not fit the device's memory, refused before anything is allocated."""


class DeviceError(SsdJaxError):
    """A program that failed on its device while it was running."""
