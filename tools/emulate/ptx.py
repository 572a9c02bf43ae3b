"""Inline PTX by its text: the function of include/ptx.h that does the same, called with the operands in their order.

A text stands here with single spaces, none at its ends. What is only a matter of speed, or of when others see what was
written, does nothing on one processor.
"""

_NOTHING = "nothing"
FUNCTIONS = {
    "": _NOTHING,
    "griddepcontrol.wait;": _NOTHING,
    "griddepcontrol.launch_dependents;": _NOTHING,
    "prefetch.global.L2 [%0];": _NOTHING,
    "cp.async.bulk.prefetch.L2.global [%0], %1;": _NOTHING,
    "fence.mbarrier_init.release.cluster;": _NOTHING,
    "fence.proxy.async.shared::cta;": _NOTHING,
    "createpolicy.fractional.L2::evict_first.b64 %0, 1.0;": "cache_policy",
    # where a thread is
    "mov.u32 %0, %%tid.x;": "thread_index",
    "mov.u32 %0, %%ctaid.x;": "block_index",
    "mov.u32 %0, %%laneid;": "lane_index",
    "mov.u64 %0, %%globaltimer;": "timer",
    "{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }": "elect",
    # memory that others look at
    "ld.relaxed.gpu.global.u32 %0, [%1];": "load",
    "ld.acquire.gpu.global.u32 %0, [%1];": "load",
    "{.reg .b128 w; ld.relaxed.gpu.global.b128 w, [%2]; mov.b128 {%0, %1}, w;}": "load_two",
    "ld.relaxed.sys.global.u64 %0, [%1];": "load",
    "ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];": "load_two",
    "ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];": "load_four",
    "{.reg .b128 w; mov.b128 w, {%1, %2}; st.relaxed.gpu.global.b128 [%0], w;}": "store_two",
    "st.relaxed.sys.global.v2.u64 [%0], {%1, %2};": "store_two",
    "st.relaxed.sys.global.u64 [%0], %1;": "store64",
    "st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};": "store_four",
    "st.release.gpu.global.u32 [%0], %1;": "store32",
    "red.release.gpu.global.add.u32 [%0], 1;": "add_one",
    # barriers, and copies that land late
    "bar.sync 1, %0;": "named_barrier_1",
    "bar.sync %0, %1;": "named_barrier",
    "mbarrier.init.shared::cta.b64 [%0], %1;": "barrier_init",
    "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;": "arrive_expecting",
    "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; "
    "@!done bra again; }": "wait_parity",
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];": "copy_bulk",
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
    "[%0], [%1], %2, [%3], %4;": "copy_bulk",
    "cp.async.ca.shared.global [%0], [%1], 4;": "copy4",
    "cp.async.ca.shared.global [%0], [%1], 8;": "copy8",
    "cp.async.cg.shared.global [%0], [%1], 16;": "copy16",
    "cp.async.commit_group;": "commit_group",
    "cp.async.wait_group 0;": "wait_all_groups",
    "cp.async.wait_group %0;": "wait_group",
    "cp.async.wait_all;": "wait_all",
    # matrices
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
    "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};": "mma_f16",
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
    "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};": "mma_bf16",
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];": "ldmatrix",
    "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];": "ldmatrix_transposed",
    "movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;": "movmatrix",
    # numbers
    "cvt.rn.f16x2.f32 %0, %1, %2;": "f16x2_of",
    "cvt.rn.bf16x2.f32 %0, %1, %2;": "bf16x2_of",
    "cvt.rn.relu.bf16x2.f32 %0, %1, %2;": "relu_bf16x2_of",
    "cvt.rn.bf16.f32 %0, %1;": "bf16_of",
    "{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}": "floats_of_f16x2",
    "cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;": "e4m3x2_of",
    "{.reg .b32 two; .reg .b16 low, high; cvt.rn.f16x2.e4m3x2 two, %1; mov.b32 {low, high}, two; "
    "cvt.f32.f16 %0, low;}": "float_of_e4m3",
    "cvt.rn.f16x2.e4m3x2 %0, %1;": "f16x2_of_e4m3x2",
    "mul.rn.f16x2 %0, %1, %2;": "mul_f16x2",
    "mul.rn.bf16x2 %0, %1, %2;": "mul_bf16x2",
    "max.bf16x2 %0, %1, %2;": "max_bf16x2",
    "fma.rn.bf16x2 %0, %1, %2, %3;": "fma_bf16x2",
    "rcp.approx.ftz.f32 %0, %1;": "reciprocal",
    # bits
    "prmt.b32 %0, %1, 0, %2;": "permute_with_zero",
    "{.reg .b16 low, high; mov.b32 {low, high}, %2; "
    "mov.b32 %0, {low, low}; mov.b32 %1, {high, high};}": "doubled_halves",
    "mov.b64 {%0, %1}, 0; mov.b64 {%2, %3}, 0;": "zeros",
    "{.reg .pred over; add.s32 %0, %0, 1; setp.eq.s32 over, %0, %2; "
    "@over mov.s32 %0, 0; @over xor.b32 %1, %1, 1;}": "next_stage",
}
