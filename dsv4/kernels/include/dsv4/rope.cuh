// RoPE of adjacent channel pairs.
#pragma once

namespace dsv4 {

// (a, b) turned by c = cos + i sin, in float32; which product is rounded is said here, so that all kernels agree.
__device__ __forceinline__ void rotate(float& a, float& b, float2 c) {
    const float turned = fmaf(a, c.x, -__fmul_rn(b, c.y));
    b = fmaf(a, c.y, __fmul_rn(b, c.x));
    a = turned;
}

}  // namespace dsv4
