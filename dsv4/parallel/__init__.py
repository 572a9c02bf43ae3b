"""Several GPUs, one model: who the ranks are, which part of each weight they hold, how they add up and gather.

Two sums a layer cross ranks: after wo_b and after the experts. A rank's part of them is float32: wo_b and the shared
expert's w2 are not rounded, a routed expert's output is rounded to the model's dtype as in one process (here its part
of it), the sum of all that is not. The parts are added in the order of ranks and rounded once, where one process rounds
the output of the sublayer; in a decode step on GPUs the kernel that needs the sum adds up (mhc_seam). So in float32
ranks differ from one process by the order of sums alone; in bfloat16 also by single roundings, which is as near to
float32 as one process is. With act=nvfp4 each rank gives its columns of the inputs of wo_b and w2 a global scale of
their own; with act=fp8 groups of 128 are the same where a share is a multiple. Logits are gathered. Of many
rows each rank takes its part through the seams (Mesh.own_rows). Everything else is computed by every rank, bit for bit
alike, also the choice of tokens.

Routed experts may be divided by number instead of by width (Mesh.experts): a rank's part of the sum after the experts
is then that of its own ones, and none of their outputs is rounded in parts.
"""
