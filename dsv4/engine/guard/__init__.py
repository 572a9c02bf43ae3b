"""Who synchronised, who allocated? The guard records what a decode step does and certifies that it is quiet."""

from dsv4.engine.guard.allowed import allow

__all__ = ["allow"]
