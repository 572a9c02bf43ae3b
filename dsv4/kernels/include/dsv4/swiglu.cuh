// Clamped SwiGLU of one pair. A NaN stays a NaN: comparisons, not fminf, do the clamp.
#pragma once

namespace dsv4 {

__device__ __forceinline__ float swiglu(float gate, float up, float limit) {
    if (limit != 0.0f) {
        gate = gate > limit ? limit : gate;
        up = up > limit ? limit : up < -limit ? -limit : up;
    }
    return gate / (1.0f + expf(-gate)) * up;
}

}  // namespace dsv4
