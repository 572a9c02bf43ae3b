// RoPE of adjacent channel pairs.
#pragma once

namespace dsv4 {

// (a, b) turned by c = cos + i sin, in float32.
__device__ __forceinline__ void rotate(float& a, float& b, float2 c) {
    const float turned = a * c.x - b * c.y;
    b = a * c.y + b * c.x;
    a = turned;
}

}  // namespace dsv4
