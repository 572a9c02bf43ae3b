"""CUDA kernels of dsv4 on a processor without a GPU: README.md says how, and what that can find."""
