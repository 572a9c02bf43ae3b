"""C structures of CUDA 13.0 that the guard reads: cupti_callbacks.h, cuda.h and driver_types.h, 64-bit."""

from __future__ import annotations

import ctypes
from ctypes import c_char_p, c_int, c_size_t, c_uint, c_uint32, c_void_p


class CallbackData(ctypes.Structure):
    """CUpti_CallbackData: what a callback of the runtime and driver domains is given."""

    _fields_ = (
        ("site", c_int),  # 0 enter, 1 exit
        ("function_name", c_char_p),
        ("params", c_void_p),  # the call's arguments as a struct
        ("return_value", c_void_p),
        ("symbol_name", c_char_p),  # of a launched kernel
        ("context", c_void_p),
        ("context_uid", c_uint32),
        ("correlation_data", c_void_p),
        ("correlation_id", c_uint32),
    )


class ResourceData(ctypes.Structure):
    """CUpti_ResourceData. `descriptor` points at GraphData for callbacks about graph nodes."""

    _fields_ = (("context", c_void_p), ("handle", c_void_p), ("descriptor", c_void_p))


class GraphData(ctypes.Structure):
    """The head of CUpti_GraphData."""

    _fields_ = (
        ("graph", c_void_p),
        ("original_graph", c_void_p),
        ("node", c_void_p),
        ("original_node", c_void_p),
        ("node_type", c_int),
    )


class KernelNode(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS_v2."""

    _fields_ = (
        ("func", c_void_p),
        ("grid", c_uint * 3),
        ("block", c_uint * 3),
        ("shared_bytes", c_uint),
        ("params", ctypes.POINTER(c_void_p)),
        ("extra", ctypes.POINTER(c_void_p)),
        ("kern", c_void_p),
        ("context", c_void_p),
    )


class Memset(ctypes.Structure):
    """CUDA_MEMSET_NODE_PARAMS_v1."""

    _fields_ = (
        ("dst", c_void_p),
        ("pitch", c_size_t),
        ("value", c_uint),
        ("element_size", c_uint),
        ("width", c_size_t),
        ("height", c_size_t),
    )


class Copy2D(ctypes.Structure):
    """CUDA_MEMCPY2D_v2."""

    _fields_ = (
        ("src_x", c_size_t),
        ("src_y", c_size_t),
        ("src_type", c_int),
        ("src_host", c_void_p),
        ("src_device", c_void_p),
        ("src_array", c_void_p),
        ("src_pitch", c_size_t),
        ("dst_x", c_size_t),
        ("dst_y", c_size_t),
        ("dst_type", c_int),
        ("dst_host", c_void_p),
        ("dst_device", c_void_p),
        ("dst_array", c_void_p),
        ("dst_pitch", c_size_t),
        ("width", c_size_t),
        ("height", c_size_t),
    )


class Copy3D(ctypes.Structure):
    """CUDA_MEMCPY3D_v2, also of a graph's memcpy node."""

    _fields_ = (
        ("src_x", c_size_t),
        ("src_y", c_size_t),
        ("src_z", c_size_t),
        ("src_lod", c_size_t),
        ("src_type", c_int),
        ("src_host", c_void_p),
        ("src_device", c_void_p),
        ("src_array", c_void_p),
        ("reserved0", c_void_p),
        ("src_pitch", c_size_t),
        ("src_height", c_size_t),
        ("dst_x", c_size_t),
        ("dst_y", c_size_t),
        ("dst_z", c_size_t),
        ("dst_lod", c_size_t),
        ("dst_type", c_int),
        ("dst_host", c_void_p),
        ("dst_device", c_void_p),
        ("dst_array", c_void_p),
        ("reserved1", c_void_p),
        ("dst_pitch", c_size_t),
        ("dst_height", c_size_t),
        ("width", c_size_t),
        ("height", c_size_t),
        ("depth", c_size_t),
    )


class RuntimeCopy3D(ctypes.Structure):
    """cudaMemcpy3DParms."""

    _fields_ = (
        ("src_array", c_void_p),
        ("src_position", c_size_t * 3),
        ("src", c_void_p),
        ("src_pitch", c_size_t * 3),
        ("dst_array", c_void_p),
        ("dst_position", c_size_t * 3),
        ("dst", c_void_p),
        ("dst_pitch", c_size_t * 3),
        ("extent", c_size_t * 3),
        ("kind", c_int),
    )
