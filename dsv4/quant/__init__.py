"""Numerics only, in plain PyTorch: number formats, quantisers, scale layouts and weights as stored. No model knowledge."""
