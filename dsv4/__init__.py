"""dsv4: DeepSeek-V4 from NVFP4 weights. `load`, `LLM` and `SamplingParams` are the public names."""

from dsv4.engine.llm import LLM
from dsv4.engine.params import SamplingParams
from dsv4.model import load

__all__ = ["LLM", "SamplingParams", "load"]
