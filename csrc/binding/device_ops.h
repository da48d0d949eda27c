// Small ops about the build and the device.
#pragma once

#include <string>

#include "check.h"

namespace leanattn {

// Version and architectures: "0.1.0;sm_80,sm_90a,compute_90", or "0.1.0;cpu".
std::string build_info();

// Loads every kernel on a CUDA device.
void warmup(int64_t device_index);

// How many units a call on this CUDA device has at most: what a counters tensor must hold.
int64_t max_units(int64_t device_index);

// Bytes that the library's own counters take on this CUDA device; no other memory is its own.
int64_t counter_bytes_on(int64_t device_index);

// Reads a and b once, contiguous CUDA tensors; `sink` [1] int32 is never written in practice.
void read_floor(Tensor a, Tensor b, Tensor sink);

// Reads the rows of two caches [B, S, Hkv, D] once, head after head, as decode does; fp16 or bf16 on
// sm_90 or newer, strides as decode takes them.
void read_rows_floor(Tensor k_cache, Tensor v_cache, Tensor sink);

}  // namespace leanattn
