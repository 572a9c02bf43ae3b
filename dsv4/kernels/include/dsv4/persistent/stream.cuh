// A warp's weights: a ring of chunks in shared memory that the copy engine fills ahead of the work, across the ends of
// phases, as far as it is known what will be read.
#pragma once
#include <dsv4/bulk.cuh>
#include <dsv4/persistent/memory.cuh>

namespace dsv4::persistent {

// Every lane holds the same numbers. Chunks are read in the order in which they are asked for.
// Of the list, which begins at a multiple of 128 bytes, two halves of eight segments are in shared memory.
struct Stream {
    int data, full;  // where in shared memory the warp's stages and their barriers lie
    int stages;
    int head = 0, tail = 0, held = 0;  // the stage to be read, the one to be filled, and how many are asked for
    uint32_t parity = 0;               // of the head's barrier
    const Segment* list;
    int place = 0;  // in the list: of the segment that comes next
    const uint8_t* from = nullptr;
    int left = 0, chunk = 0;  // of the segment that is being asked for

    // As it was parked.
    __device__ __forceinline__ explicit Stream(const Program& program)
        : data(WORK_AT + program.work_bytes + warp() * program.stages * CHUNK), full(BARRIERS_AT + warp() * BARRIERS * 8),
          stages(program.stages) {
        const StreamState parked = *reinterpret_cast<const StreamState*>(memory() + PARKED_AT + warp() * sizeof(StreamState));
        head = parked.head, tail = parked.tail, held = parked.held, parity = parked.parity;
        list = parked.list, place = parked.place, from = parked.from, left = parked.left, chunk = parked.chunk;
        __syncwarp();  // every lane has read it
    }
    // At the beginning of its list.
    __device__ __forceinline__ Stream(const Program& program, const Segment* list)
        : data(WORK_AT + program.work_bytes + warp() * program.stages * CHUNK), full(BARRIERS_AT + warp() * BARRIERS * 8),
          stages(program.stages), list(list) {
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
            *reinterpret_cast<StreamState*>(memory() + PARKED_AT + warp() * sizeof(StreamState)) = {
                list, from, head, tail, held, static_cast<int>(parity), place, left, chunk, 0};
        __syncwarp();
    }

    static __device__ __forceinline__ int warp() { return threadIdx.x / 32; }
    __device__ __forceinline__ int segments() const { return SEGMENTS_AT + warp() * (2 * HALF * 16); }
    __device__ __forceinline__ uint32_t half_barrier(int number) const {
        return shared_address(memory()) + full + (MAX_STAGES + number % 2) * 8;
    }
    __device__ __forceinline__ void load_half(int number) const {
        const uint32_t to = shared_address(memory()) + segments() + number % 2 * (HALF * 16);
        if (elected()) bulk_load(to, list + number * HALF, HALF * 16, half_barrier(number));
    }
    __device__ __forceinline__ void wait_half(int number) const { barrier_wait(half_barrier(number), number / 2 % 2); }

    // The segment that comes next, and over it without reading it.
    __device__ __forceinline__ Segment ahead() const {
        const uint4 words = *reinterpret_cast<const uint4*>(memory() + segments() + place % (2 * HALF) * 16);
        return {reinterpret_cast<const uint8_t*>(static_cast<uint64_t>(words.y) << 32 | words.x),
                static_cast<int>(words.z), static_cast<int>(words.w)};
    }
    __device__ __forceinline__ void pass() {
        if (++place % HALF != 0) return;
        __syncwarp();  // every lane has read the half behind
        load_half(place / HALF + 1);
        wait_half(place / HALF);
    }
    // Begins to ask for these bytes; the last segment has been asked for.
    __device__ __forceinline__ void open(const uint8_t* bytes, int size, int piece) {
        from = bytes, left = size, chunk = piece;
    }
    // Begins with the next segment of the list; false if that is not known.
    __device__ __forceinline__ bool open_next() {
        const Segment segment = ahead();
        if (segment.chunk == 0) return false;
        // BF16: far more than the ring holds, and one warp of two has such a segment.
        if (segment.bytes > MAX_STAGES / 2 * segment.chunk && elected()) bulk_prefetch(segment.from, segment.bytes);
        open(segment.from, segment.bytes, segment.chunk);
        pass();
        return true;
    }
    // Asks for chunks until `most` are held. more(): opens another segment, or says that none is known.
    template <typename More>
    __device__ __forceinline__ void fill(int most, More&& more) {
        while (held < most) {
            if (left == 0 && !more()) return;
            const int now = min(left, chunk);
            const uint32_t base = shared_address(memory());
            if (elected()) bulk_load(base + data + tail * CHUNK, from, now, base + full + 8 * tail);
            from += now, left -= now, ++held;
            if (++tail == stages) tail = 0;
        }
    }
    __device__ __forceinline__ void fill() {
        fill(stages, [&] { return open_next(); });
    }

    // The chunk to be read, once it is there.
    __device__ __forceinline__ const uint8_t* wait() const {
        barrier_wait(shared_address(memory()) + full + 8 * head, parity);
        return memory() + data + head * CHUNK;
    }
    // Every lane has read it.
    __device__ __forceinline__ void release() {
        __syncwarp();
        --held;
        if (++head == stages) head = 0, parity ^= 1;
    }
};

}  // namespace dsv4::persistent
