"""Requests in, tokens out: parameters, continuous batching, sampling, and LLM, the whole as one object."""
