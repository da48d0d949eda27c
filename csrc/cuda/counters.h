// Counters of the library's own, for calls that are given none: they are zero before and after every
// launch, so that none needs a memset before it.
//
// They are slices of slabs that were zeroed once. torch's allocator would not do: what it gives inside
// a capture belongs to that graph's pool, and nothing but a memset node would ever clear it. Nor does a
// launch leave them other than zero because it failed: one that CUDA refuses has touched nothing, and
// after one that breaks off CUDA refuses all others. (Lengths that change while a launch reads them
// can: its CTAs then disagree on how many share an item, as they do with a caller's counters.)
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

namespace leanattn {

// For a launch on `stream` of the current device `device` that needs n of them. Null where there are
// none: n is large, the stream is one of very many, or the device has no memory left.
//
// The same ones serve all launches on a stream, which follow each other, and others all that one
// capture has there. So two graphs that were captured on one stream may run at once; a graph that was
// instantiated twice may not, but then the partials in its pool are shared too.
int32_t* own_counters(int n, int device, cudaStream_t stream);

// Has some ready on the current device, so that the next calls need not allocate.
void reserve_counters(int device);

// Of a device's memory, that all of them take.
int64_t counter_bytes(int device);

}  // namespace leanattn
