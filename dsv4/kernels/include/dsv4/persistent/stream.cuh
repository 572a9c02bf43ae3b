// A warp's weights: a ring of chunks in shared memory that the copy engine fills ahead of the work, across the ends of
// phases, as far as it is known what will be read.
#pragma once
#include <dsv4/bulk.cuh>
#include <dsv4/persistent/memory.cuh>

namespace dsv4::persistent {

// Every lane holds the same numbers. Chunks are read in the order in which they are asked for.
// Of the list, which begins at a multiple of 128 bytes, two halves of eight segments are in shared memory.
struct Stream {
    static constexpr unsigned HALF_BYTES = HALF * sizeof(Segment);
    static constexpr int PREFETCHED = 8192;  // more is fetched ahead: BF16, far more than the ring holds, by one warp of two
    static_assert(SEGMENTS_AT % (2 * HALF_BYTES) == 0, "a warp's segments are found by bits of their place");
    int data, full;      // where in shared memory the warp's stages and their barriers lie
    unsigned segments;   // and both halves
    int stages;
    int head = 0, held = 0;  // the stage to be read, and how many are asked for, from that one on
    uint32_t parity = 0;     // of the head's barrier
    unsigned place = 0;  // in the list, in bytes: of the segment that comes next
    const uint8_t* from = nullptr;
    int left = 0, chunk = 0;  // of the segment that is being asked for

    // As it was parked.
    __device__ __forceinline__ explicit Stream(const Program& program)
        : data(WORK_AT + program.work_bytes + warp() * program.stages * CHUNK), full(BARRIERS_AT + warp() * BARRIERS * 8),
          segments(SEGMENTS_AT + warp() * 2 * HALF_BYTES) {
        const StreamState parked = place_of().state;
        head = parked.head, held = parked.held, parity = parked.parity;
        place = parked.place, from = parked.from, left = parked.left, chunk = parked.chunk;
        stages = place_of().stages;
        __syncwarp();  // every lane has read it
    }
    // At the beginning of its list.
    __device__ __forceinline__ Stream(const Program& program, const Segment* list)
        : data(WORK_AT + program.work_bytes + warp() * program.stages * CHUNK), full(BARRIERS_AT + warp() * BARRIERS * 8),
          segments(SEGMENTS_AT + warp() * 2 * HALF_BYTES), stages(program.stages) {
        if (threadIdx.x % 32 == 0) place_of().list = list, place_of().stages = stages;
        if (threadIdx.x % 32 < BARRIERS) {
            barrier_init(shared_address(memory()) + full + threadIdx.x % 32 * 8, 1);
            barriers_ready();
        }
        __syncwarp();
        load_half(0), load_half(1);
        wait_half(0);
    }
    // Until a phase needs it again: registers are scarce.
    __device__ __forceinline__ void park() const {
        if (threadIdx.x % 32 == 0)
            place_of().state = {from, head, held, static_cast<int>(parity), static_cast<int>(place), left, chunk};
        __syncwarp();
    }

    static __device__ __forceinline__ int warp() { return threadIdx.x / 32; }
    static __device__ __forceinline__ StreamPlace& place_of() {
        return *reinterpret_cast<StreamPlace*>(memory() + PARKED_AT + warp() * sizeof(StreamPlace));
    }
    __device__ __forceinline__ uint32_t half_barrier(unsigned number) const {
        return shared_address(memory()) + full + (MAX_STAGES + number % 2) * 8;
    }
    __device__ __forceinline__ void load_half(unsigned number) const {
        const uint32_t to = shared_address(memory()) + segments + number % 2 * HALF_BYTES;
        if (elected()) bulk_load(to, place_of().list + number * HALF, HALF_BYTES, half_barrier(number));
    }
    __device__ __forceinline__ void wait_half(unsigned number) const { barrier_wait(half_barrier(number), number / 2 % 2); }

    // The segment that comes next, and over it without reading it.
    __device__ __forceinline__ Segment ahead() const {
        const uint4 words = *reinterpret_cast<const uint4*>(memory() + (segments | (place & (2 * HALF_BYTES - 1))));
        return {reinterpret_cast<const uint8_t*>(static_cast<uint64_t>(words.y) << 32 | words.x),
                static_cast<int>(words.z), static_cast<int>(words.w)};
    }
    __device__ __forceinline__ void pass() {
        place += sizeof(Segment);
        if (place % HALF_BYTES != 0) return;
        __syncwarp();  // every lane has read the half behind
        load_half(place / HALF_BYTES + 1);
        wait_half(place / HALF_BYTES);
    }
    // Begins to ask for these bytes; the last segment has been asked for.
    __device__ __forceinline__ void open(const uint8_t* bytes, int size, int piece) {
        from = bytes, left = size, chunk = piece;
    }
    // Begins with the next segment of the list; false if that is not known.
    __device__ __forceinline__ bool open_next() {
        const Segment segment = ahead();
        if (segment.chunk == 0) return false;
        if (segment.bytes > PREFETCHED && elected()) bulk_prefetch(segment.from, segment.bytes);
        open(segment.from, segment.bytes, segment.chunk);
        pass();
        return true;
    }
    // The same where that takes no more than reading what is there; false if it takes more, and nothing has changed.
    __device__ __forceinline__ bool open_quickly() {
        const Segment segment = ahead();
        place += sizeof(Segment);
        asm volatile("" : "+r"(place));  // else it would be kept twice
        from = segment.from, left = segment.bytes, chunk = segment.chunk;
        if (place % HALF_BYTES != 0 && segment.bytes - 1u < PREFETCHED) return true;
        place -= sizeof(Segment), left = 0;
        return false;
    }
    // Asks for the segment's next chunk, by the lane that is `elected`.
    __device__ __forceinline__ void ask(int stage, bool elected) {
        const int now = min(left, chunk);
        const uint32_t base = shared_address(memory());
        if (elected) bulk_load(base + data + stage * CHUNK, from, now, base + full + 8 * stage);
        from += now, left -= now;
    }
    // Asks for chunks until `most` are held. more(): opens another segment, or says that none is known.
    template <typename More>
    __device__ __forceinline__ void fill(int most, More&& more) {
        while (held < most) {
            if (left == 0 && !more()) return;
            const int tail = head + held;
            ask(tail < stages ? tail : tail - stages, elected());
            ++held;
        }
    }
    __device__ __forceinline__ void fill() {
        fill(stages, [&] { return open_next(); });
    }

    // The chunk to be read, from byte `offset` on; once it is there.
    __device__ __forceinline__ const uint8_t* byte(int offset) const { return memory() + (head * CHUNK + (data + offset)); }
    __device__ __forceinline__ const uint8_t* wait() const {
        barrier_wait(shared_address(memory()) + full + 8 * head, parity);
        return byte(0);
    }
    __device__ __forceinline__ void advance() {
        asm("{.reg .pred over; add.s32 %0, %0, 1; setp.eq.s32 over, %0, %2; @over mov.s32 %0, 0; @over xor.b32 %1, %1, 1;}"
            : "+r"(head), "+r"(parity)
            : "r"(stages));
    }
    // Every lane has read it, and another one is asked for in its place; or false, and the chunk has still to be
    // released: nothing is known to come next, or it takes longer to open. Before, all stages have been filled, as far
    // as that was possible.
    __device__ __forceinline__ bool replace() {
        __syncwarp();
        const bool one = elected();
        if (left == 0 && !open_quickly()) return false;
        ask(head, one);
        advance();
        return true;
    }
    // Every lane has read it: its place is free, and is asked for as soon as it is known what comes next.
    __device__ __forceinline__ void release() {
        __syncwarp();
        --held;
        advance();
        fill();
    }
};

}  // namespace dsv4::persistent
