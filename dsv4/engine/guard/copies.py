"""What a copy reads and writes, taken from the arguments that a callback is given."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

from dsv4.engine.guard.names import plain
from dsv4.engine.guard.structs import Copy2D, Copy3D, RuntimeCopy3D

_HOST = 1  # CU_MEMORYTYPE_HOST


@dataclass(frozen=True)
class Operands:
    """Addresses that may be host memory, and the bytes copied where the arguments say so."""

    addresses: tuple[int, ...]
    size: int | None


def _word(address: int, index: int) -> int:
    return ctypes.c_uint64.from_address(address + 8 * index).value


def _flat(*words: int, size: tuple[int, ...]) -> Callable[[int], Operands]:
    def read(params: int) -> Operands:
        product = 1
        for index in size:
            product *= _word(params, index)
        return Operands(tuple(_word(params, index) for index in words), product)

    return read


def _driver_2d(params: int) -> Operands:
    copy = Copy2D.from_address(_word(params, 0))
    return Operands(_sides(copy), copy.width * copy.height)


def _driver_3d(params: int) -> Operands:
    return of_copy(Copy3D.from_address(_word(params, 0)))


def of_copy(copy: Copy3D) -> Operands:
    """A CUDA_MEMCPY3D's: arrays are device memory and left out."""
    return Operands(_sides(copy), copy.width * max(copy.height, 1) * max(copy.depth, 1))


def _sides(copy: Copy2D | Copy3D) -> tuple[int, ...]:
    destination = copy.dst_host if copy.dst_type == _HOST else copy.dst_device
    source = copy.src_host if copy.src_type == _HOST else copy.src_device
    return tuple(address for address in (destination, source) if address)


def _runtime_3d(params: int) -> Operands:
    copy = RuntimeCopy3D.from_address(_word(params, 0))
    width, height, depth = copy.extent
    return Operands(tuple(address for address in (copy.dst, copy.src) if address), width * height * depth)


def _batch(params: int) -> Operands:
    count = _word(params, 3)
    destinations, sources, sizes = (_word(params, index) for index in range(3))
    addresses = tuple(_word(array, i) for array in (destinations, sources) for i in range(count))
    return Operands(addresses, sum(_word(sizes, i) for i in range(count)))


def _devices(params: int) -> Operands:
    return Operands((), None)


# By plain name; the layouts are those of generated_cuda_meta.h and generated_cuda_runtime_api_meta.h.
_READERS: dict[str, Callable[[int], Operands]] = {
    "cudaMemcpy": _flat(0, 1, size=(2,)),
    "cudaMemcpyToSymbol": _flat(1, size=(2,)),
    "cudaMemcpyFromSymbol": _flat(0, size=(2,)),
    "cudaMemcpy2D": _flat(0, 2, size=(4, 5)),
    "cudaMemcpy3D": _runtime_3d,
    "cudaMemcpyBatch": _batch,
    "cudaMemcpyPeer": _devices,
    "cudaMemcpy3DPeer": _devices,
    "cuMemcpy": _flat(0, 1, size=(2,)),
    "cuMemcpyHtoD": _flat(0, 1, size=(2,)),
    "cuMemcpyDtoH": _flat(0, 1, size=(2,)),
    "cuMemcpyDtoD": _flat(0, 1, size=(2,)),
    "cuMemcpy2D": _driver_2d,
    "cuMemcpy2DUnaligned": _driver_2d,
    "cuMemcpy3D": _driver_3d,
    "cuMemcpyBatch": _batch,
    "cuMemcpyPeer": _devices,
    "cuMemcpy3DPeer": _devices,
}  # fmt: skip


def operands(name: str, params: int | None) -> Operands | None:
    """The operands of the copy `name` whose argument struct lies at `params`; None where its layout is not known."""
    reader = _READERS.get(plain(name).removesuffix("Async"))
    return reader(params) if reader is not None and params else None
