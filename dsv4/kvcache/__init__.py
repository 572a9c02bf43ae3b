"""Where a sequence's past lives."""

from dsv4.kvcache.cache import KVCache
from dsv4.kvcache.plan import Plan, make_plan

__all__ = ["KVCache", "Plan", "make_plan"]
