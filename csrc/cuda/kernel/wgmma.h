// wgmma with 64 rows: what of it depends on the element type and the shape, and the descriptors by
// which it finds its operands in shared memory.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cute/arch/mma_sm90_desc.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/arch/util.hpp>

namespace leanattn {

// Which elements of a fragment a lane of warp w of the four holds (PTX ISA, wgmma.m64nNk16), with
// g = lane / 4 and t = lane % 4:
//   D [64, N]   d[j][0] d[j][1] row 16w+g, cols 8j+2t 8j+2t+1    d[j][2] d[j][3] row 16w+g+8
//   A [64, 16]  a[0] row 16w+g, cols 2t 2t+1   a[1] row 16w+g+8   a[2] row 16w+g, cols 2t+8 2t+9
//               a[3] row 16w+g+8

// Describes an operand [columns / 64][rows][64] of 16-bit elements with the 128-byte swizzle, to be
// read from `smem` on: a row that is a multiple of 8, at any chunk of 16 bytes. Where the columns are
// not what the product sums over, their blocks of 64 lie `block_bytes` apart. (PTX ISA, matrix
// descriptor; CUTLASS, make_gmma_desc.)
__device__ __forceinline__ uint64_t make_operand(const uint8_t* smem, int block_bytes = 16) {
  cute::GmmaDescriptor descriptor;
  descriptor.bitfield.start_address_ = cute::cast_smem_ptr_to_uint(smem) >> 4;
  descriptor.bitfield.leading_byte_offset_ = block_bytes >> 4;
  descriptor.bitfield.stride_byte_offset_ = 8 * 128 >> 4;  // from 8 rows to the next
  descriptor.bitfield.layout_type_ = static_cast<uint8_t>(cute::SM90::GMMA::LayoutType::B128);
  return descriptor;
}

// The same operand, `bytes` further on: its address is in the lower word, which does not overflow.
__device__ __forceinline__ uint64_t advance_operand(uint64_t operand, int bytes) {
  const uint32_t low = static_cast<uint32_t>(operand) + (bytes >> 4);
  return operand >> 32 << 32 | low;
}

// The same operand, of which the compiler no longer knows that it is. Else it would have all that are counted
// from it, in registers, before the loop.
__device__ __forceinline__ uint64_t rebase_operand(uint64_t operand) {
  auto low = static_cast<uint32_t>(operand);
  asm volatile("" : "+r"(low));
  return operand >> 32 << 32 | low;
}

// The atoms for kColumns columns of D: scores have both operands in shared memory, with their depth
// contiguous; values have P in registers, or in shared memory with its tokens contiguous, and V with its columns
// contiguous; transposed ones have V as the 64 rows.
template <class Element, int kColumns>
struct WgmmaAtoms;

#define LEANATTN_WGMMA_ATOMS(Element, kColumns, kTypes)                                      \
  template <>                                                                                \
  struct WgmmaAtoms<Element, kColumns> {                                                     \
    using Scores =                                                                           \
        cute::SM90::GMMA::MMA_64x##kColumns##x16_##kTypes##_SS<cute::SM90::GMMA::Major::K,   \
                                                               cute::SM90::GMMA::Major::K>;  \
    using Values =                                                                           \
        cute::SM90::GMMA::MMA_64x##kColumns##x16_##kTypes##_RS<cute::SM90::GMMA::Major::K,   \
                                                               cute::SM90::GMMA::Major::MN>; \
    using TransposedValues =                                                                 \
        cute::SM90::GMMA::MMA_64x##kColumns##x16_##kTypes##_SS<cute::SM90::GMMA::Major::MN,  \
                                                               cute::SM90::GMMA::Major::K>;  \
    using SharedValues =                                                                     \
        cute::SM90::GMMA::MMA_64x##kColumns##x16_##kTypes##_SS<cute::SM90::GMMA::Major::K,   \
                                                               cute::SM90::GMMA::Major::MN>; \
  };
LEANATTN_WGMMA_ATOMS(__half, 16, F32F16F16)
LEANATTN_WGMMA_ATOMS(__half, 32, F32F16F16)
LEANATTN_WGMMA_ATOMS(__half, 64, F32F16F16)
LEANATTN_WGMMA_ATOMS(__half, 128, F32F16F16)
LEANATTN_WGMMA_ATOMS(__half, 256, F32F16F16)
LEANATTN_WGMMA_ATOMS(__nv_bfloat16, 16, F32BF16BF16)
LEANATTN_WGMMA_ATOMS(__nv_bfloat16, 32, F32BF16BF16)
LEANATTN_WGMMA_ATOMS(__nv_bfloat16, 64, F32BF16BF16)
LEANATTN_WGMMA_ATOMS(__nv_bfloat16, 128, F32BF16BF16)
LEANATTN_WGMMA_ATOMS(__nv_bfloat16, 256, F32BF16BF16)
#undef LEANATTN_WGMMA_ATOMS

// d = a b^T, or d += a b^T, for 16 of D: of q and k, a the one with 64 rows. By a warpgroup; done when
// wgmma_wait returns.
template <class Element, int kBlocks>
__device__ __forceinline__ void wgmma_scores(float (&d)[kBlocks][4], uint64_t a, uint64_t b,
                                             bool add) {
  [&]<size_t... i>(std::index_sequence<i...>) {
    WgmmaAtoms<Element, kBlocks * 8>::Scores::fma(
        a, b, d[i / 4][i % 4]...,
        add ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero);
  }(std::make_index_sequence<kBlocks * 4>());
}

// d += p v, for 16 tokens.
template <class Element, int kBlocks>
__device__ __forceinline__ void wgmma_values(float (&d)[kBlocks][4], const uint32_t (&p)[4],
                                             uint64_t v) {
  [&]<size_t... i>(std::index_sequence<i...>) {
    WgmmaAtoms<Element, kBlocks * 8>::Values::fma(p[0], p[1], p[2], p[3], v, d[i / 4][i % 4]...,
                                                  cute::SM90::GMMA::ScaleOut::One);
  }(std::make_index_sequence<kBlocks * 4>());
}

// The same with p in shared memory.
template <class Element, int kBlocks>
__device__ __forceinline__ void wgmma_values(float (&d)[kBlocks][4], uint64_t p, uint64_t v) {
  [&]<size_t... i>(std::index_sequence<i...>) {
    WgmmaAtoms<Element, kBlocks * 8>::SharedValues::fma(p, v, d[i / 4][i % 4]...,
                                                        cute::SM90::GMMA::ScaleOut::One);
  }(std::make_index_sequence<kBlocks * 4>());
}

// d += v^T p^T, for 16 tokens: 64 columns of v.
template <class Element, int kBlocks>
__device__ __forceinline__ void wgmma_transposed_values(float (&d)[kBlocks][4], uint64_t v,
                                                        uint64_t p) {
  [&]<size_t... i>(std::index_sequence<i...>) {
    WgmmaAtoms<Element, kBlocks * 8>::TransposedValues::fma(v, p, d[i / 4][i % 4]...,
                                                            cute::SM90::GMMA::ScaleOut::One);
  }(std::make_index_sequence<kBlocks * 4>());
}

// Around every batch of wgmma: registers that it uses stay as they are from the one to the other.
template <class T>
__device__ __forceinline__ void fence_registers(T& registers) {
  if constexpr (std::is_array_v<T>) {
    for (auto& part : registers) fence_registers(part);
  } else {
    cute::warpgroup_fence_operand(registers);
  }
}

template <class... Registers>
__device__ __forceinline__ void wgmma_begin(Registers&... registers) {
  (fence_registers(registers), ...);
  cute::warpgroup_arrive();
}

template <class... Registers>
__device__ __forceinline__ void wgmma_wait(Registers&... registers) {
  cute::warpgroup_commit_batch();
  cute::warpgroup_wait<0>();
  (fence_registers(registers), ...);
}

}  // namespace leanattn
