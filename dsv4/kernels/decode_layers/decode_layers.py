"""All layers of a decode step of a few rows in one launch."""

from torch import Tensor

from dsv4.errors import KernelError
from dsv4.kernels.decode_layers.decode_layers_ref import decode_layers_ref
from dsv4.kernels.decode_layers.program import Program
from dsv4.kernels.loader import Kernel
from dsv4.kernels.op import op

_KERNEL = Kernel("decode_layers", "ppppppiiiiii")


@op("decode_layers", ref=decode_layers_ref, shapes={"h": "T M D : bf16"})
def decode_layers(h: Tensor, program: Program, *, times: Tensor | None = None) -> Tensor:
    """Everything between entering the first layer and leaving the last: every phase of `program` in its order.

    h [T, M, D] bf16, T = 1 to 8: the streams that entered, which with all else that is read and written lie in the
    program's own buffers -> the last sublayer's output y [T, D], bf16, or f32 of several ranks this one's part of it.
    Each phase leaves the bits that its op leaves. times [phases, blocks, 2] i64, on a GPU: when each block began and
    ended each phase, in ns.

    On a GPU one launch that takes all processors: launches of a device must follow one another.
    """
    tables = program.tables
    if tables is None or h.data_ptr() != program.h.data_ptr():
        raise KernelError("decode_layers: 'h' is not where the program was made to find it; give program.h itself")
    if times is not None and times.shape != (tables.count, tables.grid, 2):
        raise KernelError(
            f"decode_layers: 'times' is {list(times.shape)}; this program has {tables.count} phases on {tables.grid} "
            "blocks, two times each"
        )
    tensors = tables.phases, tables.segments, tables.starts, tables.state, tables.words, times
    sizes = tables.count, len(h), tables.needs, tables.grid, tables.stages, tables.work_bytes
    _KERNEL(h.device, *tensors, *sizes)
    return program.y
