"""What guard knows of CUDA's calls: their names, how their structures lie, what they copy."""

import ctypes

import pytest

from dsv4.engine.guard import structs
from dsv4.engine.guard.copies import Operands, operands
from dsv4.engine.guard.names import blocks, kind_of, plain

# ------------------------------------------------------------------------------------------------------------- names

KINDS = {
    "graph launch": ["cudaGraphLaunch_v10000", "cuGraphLaunch", "cuGraphLaunch_ptsz"],
    "kernel": [
        "cudaLaunchKernel_v7000", "__cudaLaunchKernel_v13000", "cudaLaunchKernelExC_v11060", "cuLaunchKernelEx",
        "cuLaunchCooperativeKernel_ptsz", "cudaLaunchCooperativeKernel_v9000", "cuLaunchGridAsync",
    ],
    "host function": ["cudaLaunchHostFunc_v10000", "cuLaunchHostFunc_ptsz", "cudaStreamAddCallback_v5000"],
    "sync": [
        "cudaDeviceSynchronize_v3020", "cudaStreamSynchronize_ptsz_v7000", "cudaEventSynchronize_v3020",
        "cuStreamSynchronize", "cuCtxSynchronize", "cuCtxSynchronize_v2", "cuEventSynchronize",
    ],
    "copy": [
        "cudaMemcpy_v3020", "cudaMemcpyAsync_v3020", "cudaMemcpy2DAsync_v3020", "cuMemcpyHtoD_v2",
        "cuMemcpyDtoHAsync_v2_ptsz", "cuMemcpyBatchAsync_v2", "cudaMemcpy3DPeerAsync_v4000",
    ],
    "memset": ["cudaMemsetAsync_v3020", "cuMemsetD8_v2", "cuMemsetD2D32Async"],
    "alloc": [
        "cudaMalloc_v3020", "cudaMallocAsync_v11020", "cudaHostAlloc_v3020", "cudaMallocHost_v3020", "cuMemAlloc_v2",
        "cuMemAllocManaged", "cuMemHostAlloc", "cuMemCreate", "cuMemMap", "cudaMallocManaged_v6000",
        "cuMemAllocFromPoolAsync", "cudaHostRegister_v4000", "cuMemHostRegister_v2", "cuMemAddressReserve",
    ],
    "free": [
        "cudaFree_v3020", "cudaFreeHost_v3020", "cuMemFree_v2", "cuMemFreeHost", "cuMemRelease", "cuMemUnmap",
        "cudaFreeAsync_v11020", "cuMemHostUnregister",
    ],
    "load": [
        "cuModuleLoadData", "cuModuleLoadDataEx", "cuLibraryLoadData", "cudaLibraryLoadData_v12060", "cuLinkComplete",
        "cuModuleUnload", "cuFuncLoad", "__cudaRegisterFatBinary_v13000",
    ],
    "graph change": [
        "cudaStreamBeginCapture_v10000", "cuStreamEndCapture", "cudaGraphInstantiateWithFlags_v11040",
        "cuGraphExecKernelNodeSetParams", "cuGraphExecUpdate", "cudaGraphAddMemcpyNode_v10000", "cuGraphDestroy",
        "cuGraphMemsetNodeSetParams", "cuGraphNodeSetEnabled", "cuGraphUpload",
    ],
    "other": [
        "cudaGetDevice_v3020", "cudaEventRecord_v3020", "cudaEventQuery_v3020", "cudaStreamWaitEvent_v3020",
        "cuModuleGetLoadingMode", "cuModuleGetFunction", "cuPointerGetAttribute", "cudaStreamIsCapturing_v10000",
        "cudaMemGetInfo_v3020", "cuGraphGetNodes", "cuGraphKernelNodeGetParams", "cuLibraryGetKernel", "cuMemGetInfo",
        "cudaStreamGetCaptureInfo_v2_v11030", "cuFuncGetParamInfo", "cuLinkDestroy", "cudaGraphDebugDotPrint_v11030",
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_is_known_by_its_name(kind):
    assert {name: kind_of(name) for name in KINDS[kind]} == dict.fromkeys(KINDS[kind], kind)


def test_versions_and_streams_are_no_part_of_a_name():
    assert plain("cudaMemcpyAsync_ptsz_v7000") == "cudaMemcpyAsync"
    assert plain("cuMemcpyBatchAsync_v2_ptsz") == "cuMemcpyBatchAsync"
    assert plain("__cudaLaunchKernel_ptsz_v13000") == "cudaLaunchKernel"
    assert plain("cuGraphExecKernelNodeSetParams_v2") == "cuGraphExecKernelNodeSetParams"


def test_a_copy_without_async_waits():
    assert blocks("cudaMemcpy_v3020") and blocks("cuMemcpyDtoH_v2") and blocks("cudaMemcpy2D_ptds_v7000")
    assert not blocks("cudaMemcpyAsync_v3020") and not blocks("cuMemcpyHtoDAsync_v2_ptsz")
    assert not blocks("cudaMalloc_v3020")


# ----------------------------------------------------------------------------------------------------------- layouts

# Offsets and sizes that gcc gives for the headers of CUDA 13.0.
LAYOUTS = {
    structs.CallbackData: (72, {"function_name": 8, "params": 16, "symbol_name": 32, "context_uid": 48,
                                "correlation_data": 56, "correlation_id": 64}),
    structs.ResourceData: (24, {"descriptor": 16}),
    structs.GraphData: (40, {"node": 16, "original_node": 24, "node_type": 32}),
    structs.KernelNode: (72, {"grid": 8, "block": 20, "shared_bytes": 32, "params": 40, "extra": 48, "kern": 56}),
    structs.Memset: (40, {"value": 16, "element_size": 20, "width": 24}),
    structs.Copy2D: (128, {"src_type": 16, "src_host": 24, "dst_type": 72, "dst_host": 80, "width": 112}),
    structs.Copy3D: (200, {"src_type": 32, "src_host": 40, "dst_type": 120, "dst_host": 128, "dst_device": 136,
                           "width": 176}),
    structs.RuntimeCopy3D: (160, {"src": 32, "dst_array": 64, "dst": 96, "extent": 128, "kind": 152}),
}  # fmt: skip


@pytest.mark.parametrize("struct", LAYOUTS, ids=lambda struct: struct.__name__)
def test_structs_lie_as_in_the_headers(struct):
    size, offsets = LAYOUTS[struct]
    assert ctypes.sizeof(struct) == size
    assert {name: getattr(struct, name).offset for name in offsets} == offsets


def words(*values: int):
    return (ctypes.c_uint64 * len(values))(*values)


def test_operands_of_flat_copies():
    flat = words(0x1000, 0x2000, 64, 1, 0)
    at = ctypes.addressof(flat)
    assert operands("cudaMemcpyAsync_v3020", at) == Operands((0x1000, 0x2000), 64)
    assert operands("cuMemcpyHtoDAsync_v2_ptsz", at) == Operands((0x1000, 0x2000), 64)
    assert operands("cudaMemcpyToSymbol_v3020", at) == Operands((0x2000,), 64)
    assert operands("cudaMemcpyFromSymbol_v3020", at) == Operands((0x1000,), 64)
    assert operands("cudaMemcpyPeerAsync_v4000", at) == Operands((), None)
    assert operands("cudaMemcpyToArray_v3020", at) is None, "a layout nobody wrote down"
    assert operands("cudaMemcpy_v3020", None) is None
    two_d = words(0x1000, 16, 0x2000, 16, 8, 4, 2)
    assert operands("cudaMemcpy2DAsync_v3020", ctypes.addressof(two_d)) == Operands((0x1000, 0x2000), 32)


def test_operands_of_copies_given_as_structs():
    copy = structs.Copy3D(
        src_type=1, src_host=0x10, src_device=0x99, dst_type=2, dst_device=0x20, dst_host=0x99, width=8
    )
    at = words(ctypes.addressof(copy))
    assert operands("cuMemcpy3DAsync_v2", ctypes.addressof(at)) == Operands((0x20, 0x10), 8)
    plane = structs.Copy2D(src_type=4, src_device=0x10, dst_type=3, dst_array=0x99, width=8, height=3)
    at = words(ctypes.addressof(plane))
    assert operands("cuMemcpy2D_v2", ctypes.addressof(at)) == Operands((0x10,), 24), "an array is device memory"
    box = structs.RuntimeCopy3D(src=0x10, dst=0x20, extent=(2, 3, 4))
    at = words(ctypes.addressof(box))
    assert operands("cudaMemcpy3DAsync_v3020", ctypes.addressof(at)) == Operands((0x20, 0x10), 24)


def test_operands_of_a_batch():
    to, source, sizes = words(1, 2), words(3, 4), words(8, 16)
    at = words(ctypes.addressof(to), ctypes.addressof(source), ctypes.addressof(sizes), 2)
    assert operands("cudaMemcpyBatchAsync_v13000", ctypes.addressof(at)) == Operands((1, 2, 3, 4), 24)
