"""Errors a user can cause. Each says what was wrong, what was expected and what to do; commands print it and exit 2."""


class QvlmoeError(ValueError):
    """Base of every error this package raises about the user's input."""


class ConfigError(QvlmoeError):
    """A `config.json` holds a value that is missing, unsupported or contradicts another one."""


class CheckpointError(QvlmoeError):
    """A checkpoint directory is incomplete, damaged or does not match its config."""


class BatchError(QvlmoeError):
    """Model inputs disagree with each other or with the config."""


class GenerationError(QvlmoeError):
    """A generation was asked for that cannot be made: sampling values out of range, a cache too small."""


class UsageError(QvlmoeError):
    """The command line itself is wrong."""


class ProcessorError(QvlmoeError):
    """A conversation, an option or a processor file cannot be turned into model inputs."""


class MediaError(QvlmoeError):
    """A picture or a video cannot be opened, decoded or resized."""
