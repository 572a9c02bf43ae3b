"""How fast one model's steps and kernels run on the GPU at hand, beside how fast that GPU copies memory."""
