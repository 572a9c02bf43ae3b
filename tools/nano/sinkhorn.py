"""Sinkhorn normalisation of 4x4 matrices, forward and backward in one CUDA kernel each: 20 iterations would be
hundreds of launches.

The CPU path below is the definition; the kernel source is plain C, and the test compiles it for the CPU and compares
both.
"""

from __future__ import annotations

import torch
from torch import Tensor

SOURCE = r"""
__device__ static void half_step(float* c, int columns, float eps) {
    for (int a = 0; a < 4; ++a) {
        float s = eps;
        for (int b = 0; b < 4; ++b) s += c[columns ? 4 * b + a : 4 * a + b];
        for (int b = 0; b < 4; ++b) c[columns ? 4 * b + a : 4 * a + b] /= s;
    }
}

__device__ static void softmax_rows(const float* x, float* c) {
    for (int a = 0; a < 4; ++a) {
        float m = fmaxf(fmaxf(x[4 * a], x[4 * a + 1]), fmaxf(x[4 * a + 2], x[4 * a + 3])), s = 0.f;
        for (int b = 0; b < 4; ++b) { c[4 * a + b] = expf(x[4 * a + b] - m); s += c[4 * a + b]; }
        for (int b = 0; b < 4; ++b) c[4 * a + b] /= s;
    }
}

extern "C" __global__ void sinkhorn_forward(const float* x, float* y, int n, int iterations, double epsilon) {
    int row = blockIdx.x * blockDim.x + threadIdx.x;
    float eps = (float)epsilon;  // the launcher passes Python floats as double
    if (row >= n) return;
    float c[16];
    softmax_rows(x + 16 * row, c);
    for (int i = 0; i < 16; ++i) c[i] += eps;
    half_step(c, 1, eps);
    for (int k = 1; k < iterations; ++k) { half_step(c, 0, eps); half_step(c, 1, eps); }
    for (int i = 0; i < 16; ++i) y[16 * row + i] = c[i];
}

// c holds the input of a half step, g the gradient of its output; g becomes the gradient of its input.
__device__ static void half_step_backward(const float* c, float* g, int columns, float eps) {
    for (int a = 0; a < 4; ++a) {
        float s = eps, dot = 0.f;
        for (int b = 0; b < 4; ++b) {
            int i = columns ? 4 * b + a : 4 * a + b;
            s += c[i];
            dot += g[i] * c[i];
        }
        for (int b = 0; b < 4; ++b) {
            int i = columns ? 4 * b + a : 4 * a + b;
            g[i] = (g[i] - dot / s) / s;
        }
    }
}

extern "C" __global__ void sinkhorn_backward(
    const float* x, const float* gy, float* gx, int n, int iterations, double epsilon) {
    int row = blockIdx.x * blockDim.x + threadIdx.x;
    float eps = (float)epsilon;  // the launcher passes Python floats as double
    if (row >= n) return;
    float soft[16], saved[40][16], c[16], g[16];
    softmax_rows(x + 16 * row, soft);
    for (int i = 0; i < 16; ++i) { c[i] = soft[i] + eps; g[i] = gy[16 * row + i]; }
    int steps = 2 * iterations - 1;
    for (int k = 0; k < steps; ++k) {
        for (int i = 0; i < 16; ++i) saved[k][i] = c[i];
        half_step(c, k % 2 == 0, eps);
    }
    for (int k = steps - 1; k >= 0; --k) half_step_backward(saved[k], g, k % 2 == 0, eps);
    for (int a = 0; a < 4; ++a) {
        float dot = 0.f;
        for (int b = 0; b < 4; ++b) dot += g[4 * a + b] * soft[4 * a + b];
        for (int b = 0; b < 4; ++b) gx[16 * row + 4 * a + b] = soft[4 * a + b] * (g[4 * a + b] - dot);
    }
}
"""

_kernels: dict[str, object] = {}


def kernel(name: str):
    if name not in _kernels:
        _kernels[name] = torch.cuda._compile_kernel(SOURCE, name)
    return _kernels[name]


class CudaSinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, iterations: int, eps: float) -> Tensor:
        kernel("sinkhorn_backward")  # compiled now: the backward pass may run inside a graph capture
        x = x.contiguous()
        y = torch.empty_like(x)
        n = x.numel() // 16
        kernel("sinkhorn_forward")(
            grid=((n + 127) // 128, 1, 1), block=(128, 1, 1), args=[x, y, n, iterations, float(eps)]
        )
        ctx.save_for_backward(x)
        ctx.iterations, ctx.eps = iterations, eps
        return y

    @staticmethod
    def backward(ctx, gy: Tensor):
        (x,) = ctx.saved_tensors
        gy, gx, n = gy.contiguous(), torch.empty_like(x), x.numel() // 16
        kernel("sinkhorn_backward")(
            grid=((n + 127) // 128, 1, 1), block=(128, 1, 1), args=[x, gy, gx, n, ctx.iterations, float(ctx.eps)]
        )
        return gx, None, None


def plain(x: Tensor, iterations: int, eps: float) -> Tensor:
    """Row softmax + eps, columns, then iterations - 1 times rows and columns (SPEC 2.3, step 4)."""
    c = torch.softmax(x, -1) + eps
    c = c / (c.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        c = c / (c.sum(-1, keepdim=True) + eps)
        c = c / (c.sum(-2, keepdim=True) + eps)
    return c


def normalise(x: Tensor, iterations: int, eps: float) -> Tensor:
    """x [..., 4, 4] float32."""
    return CudaSinkhorn.apply(x, iterations, eps) if x.is_cuda else plain(x, iterations, eps)
