"""Numerics only, in plain PyTorch: number formats, quantisers, scale layouts, weights as stored. No model knowledge."""
