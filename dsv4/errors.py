"""Every error dsv4 raises on purpose: it names what was found, what was expected and what to do."""


class Dsv4Error(Exception):
    """Base of all errors a user can cause or repair; anything else that escapes is a bug in dsv4."""


class ConfigError(Dsv4Error):
    """A config.json, a flag or an argument that does not describe a DeepSeek-V4 model we run."""


class CheckpointError(Dsv4Error):
    """Files or tensors that do not match the config; the message lists every finding, not the first."""


class RequestError(Dsv4Error):
    """A prompt, message list or sampling parameter that cannot be served as asked."""


class CapacityError(Dsv4Error):
    """No slot, page or memory for what was asked; the message gives both numbers."""


class KernelError(Dsv4Error):
    """An op that cannot run on this device, or whose inputs break its contract."""
