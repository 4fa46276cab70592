// Element types, 16-byte packs and reductions that the kernels share.
#pragma once
#include "platform.h"

namespace lmf {

// Codes of element types, as ops/cuda.py passes them.
enum Dtype { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };

// What a launcher answers to an argument that it was not built for: cudaErrorInvalidValue.
constexpr int INVALID_VALUE = 1;

// Most blocks of a grid-stride kernel: enough to fill any device many times over.
constexpr int64_t GRID_LIMIT = 65535;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half(x);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16(x);
}

// Elements in one 16-byte access.
template <class T>
constexpr int WIDE = 16 / sizeof(T);

// N elements that are read or written in one access.
template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
  T at[N];
};

template <int N, class T>
__device__ inline Pack<T, N> load(const T* from) {
  return *reinterpret_cast<const Pack<T, N>*>(from);
}

template <class T, int N>
__device__ inline void store(T* to, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

constexpr unsigned WARP = 0xffffffffu;

// Sum or maximum over WIDTH neighbouring lanes, given to all of them.
template <int WIDTH = 32>
__device__ inline float lanes_sum(float x) {
#pragma unroll
  for (int step = WIDTH / 2; step > 0; step /= 2) x += __shfl_xor_sync(WARP, x, step);
  return x;
}

template <int WIDTH = 32>
__device__ inline float lanes_max(float x) {
#pragma unroll
  for (int step = WIDTH / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(WARP, x, step));
  return x;
}

// True when every pointer and every stride (in elements) allows 16-byte accesses.
template <class T>
inline bool fits_wide(std::initializer_list<const void*> pointers, std::initializer_list<int64_t> strides) {
  for (const void* pointer : pointers)
    if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) return false;
  for (int64_t stride : strides)
    if (stride % WIDE<T> != 0) return false;
  return true;
}

// Calls run(T{}) with the element type of a code; INVALID_VALUE for another code.
template <class Run>
int with_type(int dtype, Run run) {
  switch (dtype) {
    case FLOAT32:
      return run(float{});
    case FLOAT16:
      return run(__half{});
    case BFLOAT16:
      return run(__nv_bfloat16{});
    default:
      return INVALID_VALUE;
  }
}

inline unsigned ceil_div(int64_t a, int64_t b) { return static_cast<unsigned>((a + b - 1) / b); }

}  // namespace lmf
