// Appending to the caches, and RoPE on the way: a CTA does one new token, all its heads of q, k and
// v. The work of a token is cut into chunks of kWidth numbers, or of kWidth pairs where they are
// rotated, so that whoever reads a pair writes it, which lets q be rotated in place.
//
// One token a sequence is the case that must be short: the new rows are asked for before what says
// where they go, so that the two ways through memory overlap.
#include "append.h"

#include <climits>
#include <type_traits>

#include "kernel/rope.h"
#include "launch_grid.h"

namespace leanattn {
namespace {

constexpr int kMaxThreads = 512;
constexpr int kVectorWidth = 8;  // 16 bytes of q, k and v

// A token's chunks: those of q, then of k, then of v.
struct Chunks {
  FastDivisor q_per_row, k_per_row, v_per_row;
  int q, k, v;
};

// x as it stands in the cache. Equal types are copied bit for bit.
template <class Cache, class Value>
__device__ __forceinline__ Cache convert(Value x, float scale) {
  if constexpr (std::is_same_v<Cache, Value>) {
    return x;
  } else if constexpr (sizeof(Cache) == 1) {
    return from_float<Cache>(to_float(x) / scale);
  } else {
    return from_float<Cache>(to_float(x));
  }
}

// Stride 1 wherever kWidth is more than 1.
template <int kWidth, class T>
__device__ __forceinline__ Vector<T, kWidth> load_strided(const T* row, int64_t stride, int dim) {
  return load_vector<kWidth>(row + (kWidth == 1 ? dim * stride : dim));
}

template <int kWidth, class T>
__device__ __forceinline__ void store_strided(T* row, int64_t stride, int dim,
                                              const Vector<T, kWidth>& vector) {
  store_vector(row + (kWidth == 1 ? dim * stride : dim), vector);
}

template <class Element, int kWidth>
__device__ __forceinline__ void load_table(const Rope& rope, const RopeTable& table, int position,
                                           int pair, float (&values)[kWidth]) {
  const int64_t offset = position * table.position_stride;
  if (rope.tables_are_float32) {
    const auto loaded = load_strided<kWidth>(static_cast<const float*>(table.data) + offset,
                                             table.dim_stride, pair);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) values[i] = loaded.element[i];
  } else {
    const auto loaded = load_strided<kWidth>(static_cast<const Element*>(table.data) + offset,
                                             table.dim_stride, pair);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) values[i] = to_float(loaded.element[i]);
  }
}

// kWidth pairs of a row, from pair `pair` on, in the two vectors that hold them: with NeoX's pairs
// the first members and the second members, with GPT-J's 2 * kWidth neighbours.
template <class Element, int kWidth>
struct Pairs {
  int dim[2];  // where the vectors begin
  Vector<Element, kWidth> loaded[2];
  float rotated[2][kWidth];

  __device__ __forceinline__ Pairs(const Rope& rope, const Element* row, int64_t stride, int pair) {
    dim[0] = rope.interleaved ? 2 * pair : pair;
    dim[1] = rope.interleaved ? dim[0] + kWidth : pair + rope.num_pairs;
#pragma unroll
    for (int i = 0; i < 2; ++i) loaded[i] = load_strided<kWidth>(row, stride, dim[i]);
  }

  __device__ __forceinline__ void rotate_by(const Rope& rope, int64_t position, int pair) {
    const int at = rope_position(rope, position);
    float cos[kWidth], sin[kWidth];
    load_table<Element, kWidth>(rope, rope.cos, at, pair, cos);
    load_table<Element, kWidth>(rope, rope.sin, at, pair, sin);
    rotate_pairs(loaded, rope.interleaved, cos, sin, rotated);
  }
};

// Chunk `chunk` of a row of q: of its pairs, or behind those of what is not rotated.
template <class Element, int kWidth>
__device__ __forceinline__ void rotate_query_chunk(const AppendParams& p, const NewToken& token,
                                                   int head, int chunk) {
  const Element* row = static_cast<const Element*>(p.q.data) + row_offset(p.q, token, head);
  Element* to = static_cast<Element*>(p.q_out.data) + row_offset(p.q_out, token, head);
  const int pair = chunk * kWidth;
  if (pair >= p.rope.num_pairs) {
    const int dim = pair + p.rope.num_pairs;
    store_strided(to, p.q_out.dim_stride, dim, load_strided<kWidth>(row, p.q.dim_stride, dim));
    return;
  }
  Pairs<Element, kWidth> pairs(p.rope, row, p.q.dim_stride, pair);
  pairs.rotate_by(p.rope, position_of(p, token), pair);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    Vector<Element, kWidth> result;
#pragma unroll
    for (int d = 0; d < kWidth; ++d) result.element[d] = from_float<Element>(pairs.rotated[i][d]);
    store_strided(to, p.q_out.dim_stride, pairs.dim[i], result);
  }
}

template <class Element, class Cache, int kWidth>
__device__ __forceinline__ void append_rotated_chunk(const AppendParams& p, const NewToken& token,
                                                     int head, int chunk) {
  const Element* row = static_cast<const Element*>(p.k.data) + row_offset(p.k, token, head);
  const int pair = chunk * kWidth;
  Pairs<Element, kWidth> pairs(p.rope, row, p.k.dim_stride, pair);
  const int64_t position = position_of(p, token);
  const CacheSlot slot = find_slot(p, token.seq, position);
  if (!slot.exists()) return;
  pairs.rotate_by(p.rope, position, pair);
  const float scale = scale_of(p.k_scale, token.seq, head);
  Cache* to = static_cast<Cache*>(p.k_cache.data) + slot_offset(p.k_cache, slot, head);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    Vector<Cache, kWidth> result;
#pragma unroll
    for (int d = 0; d < kWidth; ++d) {
      result.element[d] = convert<Cache>(pairs.rotated[i][d], scale);
    }
    store_strided(to, p.k_cache.dim_stride, pairs.dim[i], result);
  }
}

template <class Element, class Cache, int kWidth>
__device__ __forceinline__ void append_chunk(const AppendParams& p, const Rows& rows,
                                             const Rows& cache, const Scales& scales,
                                             const NewToken& token, int head, int dim) {
  const Element* row = static_cast<const Element*>(rows.data) + row_offset(rows, token, head);
  const auto values = load_strided<kWidth>(row, rows.dim_stride, dim);
  const CacheSlot slot = find_slot(p, token.seq, position_of(p, token));
  if (!slot.exists()) return;
  const float scale = scale_of(scales, token.seq, head);
  Vector<Cache, kWidth> result;
#pragma unroll
  for (int d = 0; d < kWidth; ++d) result.element[d] = convert<Cache>(values.element[d], scale);
  Cache* to = static_cast<Cache*>(cache.data) + slot_offset(cache, slot, head);
  store_strided(to, cache.dim_stride, dim, result);
}

// The token in row `row` of ragged new rows; seq is -1 if no sequence has it. By the whole CTA.
//
// Clamped to [previous entry, total], entry i is the largest of entries 0 to i. So the row belongs
// to the sequence before the first entry that is larger than it, and that begins at the largest
// before.
__device__ __forceinline__ NewToken find_ragged_token(const AppendParams& p, int row) {
  __shared__ int first_beyond_smem, begin_smem;
  if (threadIdx.x == 0) {
    first_beyond_smem = INT_MAX;
    begin_smem = 0;
  }
  __syncthreads();  // both are set
  int beyond = INT_MAX;
#pragma unroll 4
  for (int i = threadIdx.x; i <= p.batch; i += blockDim.x) {
    if (p.cu_seqlens[i * p.cu_seqlens_stride] > row) beyond = min_of(beyond, i);
  }
  beyond = __reduce_min_sync(0xffffffffu, beyond);
  if (threadIdx.x % 32 == 0) atomicMin(&first_beyond_smem, beyond);
  __syncthreads();  // every warp's is in
  const int first_beyond = first_beyond_smem;
  if (first_beyond == 0 || first_beyond == INT_MAX) return {-1, 0, 0};
  int begin = 0;
#pragma unroll 4
  for (int i = threadIdx.x; i < first_beyond; i += blockDim.x) {
    begin = max_of(begin, p.cu_seqlens[i * p.cu_seqlens_stride]);
  }
  begin = __reduce_max_sync(0xffffffffu, begin);
  if (threadIdx.x % 32 == 0) atomicMax(&begin_smem, begin);
  __syncthreads();  // every warp's is in
  return {first_beyond - 1, row - begin_smem, row};
}

// One CTA a token. kWidth is kVectorWidth, or 1 where alignment, sizes or strides forbid vectors.
template <class Element, class Cache, int kWidth>
__global__ void __launch_bounds__(kMaxThreads)
    append_kernel(const __grid_constant__ AppendParams p, const Chunks chunks) {
  const NewToken token =
      p.cu_seqlens ? find_ragged_token(p, blockIdx.x) : uniform_token(p, blockIdx.x);
  if (token.seq < 0) return;
  if (p.attended_lengths && token.index == 0 && threadIdx.x == 0) {
    p.attended_lengths[token.seq] = attended_length(p, token);
  }
  const int pair_chunks = p.rope.num_pairs / kWidth;
  for (int i = threadIdx.x; i < chunks.q + chunks.k + chunks.v; i += blockDim.x) {
    if (i < chunks.q) {
      const int head = i / chunks.q_per_row;
      rotate_query_chunk<Element, kWidth>(p, token, head, i - head * chunks.q_per_row);
    } else if (i < chunks.q + chunks.k) {
      const int index = i - chunks.q;
      const int head = index / chunks.k_per_row;
      const int chunk = index - head * chunks.k_per_row;
      if (chunk < pair_chunks) {
        append_rotated_chunk<Element, Cache, kWidth>(p, token, head, chunk);
      } else {
        // Each chunk of pairs stood for two of numbers.
        append_chunk<Element, Cache, kWidth>(p, p.k, p.k_cache, p.k_scale, token, head,
                                             (chunk + pair_chunks) * kWidth);
      }
    } else {
      const int index = i - chunks.q - chunks.k;
      const int head = index / chunks.v_per_row;
      append_chunk<Element, Cache, kWidth>(p, p.v, p.v_cache, p.v_scale, token, head,
                                           (index - head * chunks.v_per_row) * kWidth);
    }
  }
}

// --- Launch --------------------------------------------------------------------------------------

bool is_vectorizable(const Rows& rows, int head_dim, int64_t element_size) {
  const int64_t bytes = kVectorWidth * element_size;
  const int64_t alignment = min_of<int64_t>(bytes, 16);
  const auto whole = [&](int64_t stride) { return stride * element_size % alignment == 0; };
  return is_aligned(rows.data, alignment) && rows.dim_stride == 1 && head_dim % kVectorWidth == 0 &&
         whole(rows.batch_stride) && whole(rows.seq_stride) && whole(rows.head_stride);
}

bool is_vectorizable(const RopeTable& table, int64_t element_size) {
  return is_aligned(table.data, 16) && table.dim_stride == 1 &&
         table.position_stride * element_size % 16 == 0;
}

bool is_vectorizable(const AppendParams& p, int64_t cache_size) {
  constexpr int64_t kElementSize = 2;
  const Rope& rope = p.rope;
  const int64_t table_size = rope.tables_are_float32 ? 4 : kElementSize;
  const bool rope_is =
      rope.num_pairs == 0 ||
      (rope.num_pairs % kVectorWidth == 0 && is_vectorizable(rope.cos, table_size) &&
       is_vectorizable(rope.sin, table_size) && is_vectorizable(p.q, p.head_dim, kElementSize) &&
       is_vectorizable(p.q_out, p.head_dim, kElementSize));
  return rope_is && is_vectorizable(p.k, p.head_dim, kElementSize) &&
         is_vectorizable(p.v, p.head_dim_v, kElementSize) &&
         is_vectorizable(p.k_cache, p.head_dim, cache_size) &&
         is_vectorizable(p.v_cache, p.head_dim_v, cache_size);
}

template <class Element, class Cache, int kWidth>
void launch(const AppendParams& p, cudaStream_t stream) {
  const int pair_chunks = p.rope.num_pairs / kWidth;
  const int k_per_row = p.head_dim / kWidth - pair_chunks;
  // What is not rotated is copied too, if it is not there already.
  const int q_per_row = p.keeps_q() ? k_per_row : pair_chunks;
  const int v_per_row = p.head_dim_v / kWidth;
  Chunks chunks;
  chunks.q_per_row = FastDivisor(max_of(q_per_row, 1));
  chunks.k_per_row = FastDivisor(k_per_row);
  chunks.v_per_row = FastDivisor(v_per_row);
  chunks.q = p.num_heads_q * q_per_row;
  chunks.k = p.num_heads_kv * k_per_row;
  chunks.v = p.num_heads_kv * v_per_row;
  // With cu_seqlens the threads also search it.
  const int64_t wanted = max_of(chunks.q + chunks.k + chunks.v, p.cu_seqlens ? p.batch : 0);
  const int threads =
      static_cast<int>(min_of<int64_t>(ceil_div<int64_t>(wanted, 32) * 32, kMaxThreads));
  launch_grid("append_kernel", append_kernel<Element, Cache, kWidth>, p.num_tokens, threads, stream,
              p, chunks);
}

template <class Element, class Cache>
struct Launch {
  static void run(const AppendParams& p, cudaStream_t stream) {
    if (is_vectorizable(p, sizeof(Cache))) {
      launch<Element, Cache, kVectorWidth>(p, stream);
    } else {
      launch<Element, Cache, 1>(p, stream);
    }
  }

  static void load() {
    load_kernel(append_kernel<Element, Cache, kVectorWidth>);
    load_kernel(append_kernel<Element, Cache, 1>);
  }
};

template <class Element>
void launch_for_cache(const AppendParams& p, cudaStream_t stream) {
  switch (p.cache_type) {
    case CacheType::kFloat16:
      return Launch<Element, __half>::run(p, stream);
    case CacheType::kBFloat16:
      return Launch<Element, __nv_bfloat16>::run(p, stream);
    case CacheType::kFloat8E4M3:
      return Launch<Element, __nv_fp8_e4m3>::run(p, stream);
    case CacheType::kFloat8E5M2:
      return Launch<Element, __nv_fp8_e5m2>::run(p, stream);
    case CacheType::kFloat32:
      break;  // the binding refuses it on CUDA
  }
}

template <class Element>
void load_kernels() {
  Launch<Element, __half>::load();
  Launch<Element, __nv_bfloat16>::load();
  Launch<Element, __nv_fp8_e4m3>::load();
  Launch<Element, __nv_fp8_e5m2>::load();
}

}  // namespace

void launch_append(const AppendParams& params, cudaStream_t stream) {
  if (params.element_type == ElementType::kFloat16) return launch_for_cache<__half>(params, stream);
  launch_for_cache<__nv_bfloat16>(params, stream);
}

void warm_up_append() {
  load_kernels<__half>();
  load_kernels<__nv_bfloat16>();
}

}  // namespace leanattn
