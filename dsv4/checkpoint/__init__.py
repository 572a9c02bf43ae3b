"""Bytes on disk to the weights of the model.

names: the one table of tensor names. header, reader: files to tensors. layout, official, modelopt, compressed_tensors:
how one linear can be stored. fused: transformers' stacked experts. plan: which tensor becomes what. pack: stacks and
recasts. load: all of it in order. random: seeded weights without a file. quantize: writes NVFP4 checkpoints.
"""

from dsv4.checkpoint.load import load_model_weights
from dsv4.checkpoint.reader import Checkpoint

__all__ = ["Checkpoint", "load_model_weights"]
