// LEANATTN_HD marks functions that the kernels, the CPU implementation and the tests share.
#pragma once

#if defined(__CUDACC__)
#define LEANATTN_HD __host__ __device__ __forceinline__
#else
#define LEANATTN_HD inline
#endif

// The architecture that kernel code is compiled for, 0 on the host. tests/emulator runs the kernel on a
// CPU and says which it is to be.
#if defined(LEANATTN_EMULATED_ARCH)
#define LEANATTN_ARCH LEANATTN_EMULATED_ARCH
#elif defined(__CUDA_ARCH__)
#define LEANATTN_ARCH __CUDA_ARCH__
#else
#define LEANATTN_ARCH 0
#endif

// Whether that architecture has wgmma: sm_90a alone.
#if defined(LEANATTN_EMULATED_ARCH) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define LEANATTN_HAS_WGMMA 1
#else
#define LEANATTN_HAS_WGMMA 0
#endif

// Of a function of the kernel whose code must not lie in the way of what runs every time.
#if defined(__CUDACC__)
#define LEANATTN_OUT_OF_LINE __device__ __noinline__
#else
#define LEANATTN_OUT_OF_LINE __attribute__((noinline))
#endif

// Before a loop that runs once as a rule: unrolled copies would only be fetched for nothing.
#if defined(__CUDA_ARCH__)
#define LEANATTN_KEEP_ROLLED _Pragma("unroll 1")
#else
#define LEANATTN_KEEP_ROLLED
#endif

namespace leanattn {

template <class T>
LEANATTN_HD constexpr T min_of(T a, T b) {
  return b < a ? b : a;
}

template <class T>
LEANATTN_HD constexpr T max_of(T a, T b) {
  return a < b ? b : a;
}

template <class T>
LEANATTN_HD constexpr T clamp_to(T x, T low, T high) {
  return min_of(max_of(x, low), high);
}

template <class T>
LEANATTN_HD constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

}  // namespace leanattn
