"""Where a sequence's past lives."""

from dsv4.kvcache.cache import KVCache
from dsv4.kvcache.plan import Plan, make_plan
from dsv4.kvcache.static import StaticPlan

__all__ = ["KVCache", "Plan", "StaticPlan", "make_plan"]
