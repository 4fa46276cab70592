// Tensor-core instructions, loads of their fragments and asynchronous copies: all inline assembly of the project.
// Fragments lie as the PTX manual draws them for m16n8k16, with g = lane / 4 and t = lane % 4:
//   a[0..3]  rows g, g + 8, g, g + 8; columns 2t, 2t + 1 for the first two, 8 further for the others
//   b[0..1]  rows 2t, 2t + 1, and 8 further; column g
//   d[0..3]  row g, columns 2t and 2t + 1; row g + 8, the same columns
#pragma once
#include "types.h"

namespace lmf {

// Two floats rounded to T, the first in the lower half.
template <class T>
__device__ inline unsigned pack_pair(float low, float high);

template <>
__device__ inline unsigned pack_pair<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  unsigned bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}

template <>
__device__ inline unsigned pack_pair<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  unsigned bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}

// d += a * b in float32, a (16, 16) by rows and b (16, 8) by columns.
template <class T>
__device__ inline void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);

// COUNT (2 or 4) matrices of 8 x 8 16-bit elements out of shared memory: lane l gives the address of row l % 8 of
// matrix l / 8.
template <int COUNT, bool TRANSPOSED>
__device__ inline void load_matrices(unsigned (&to)[COUNT], const void* row);

// Starts copying 16 bytes to shared memory, or writing zeros there when there is nothing to copy (`from` isn't read
// then).
__device__ inline void copy_async(void* to, const void* from, bool copy);

// Ends a group of copies; wait_copies<N> waits for this thread's groups but the N youngest.
__device__ inline void commit_copies();
template <int N>
__device__ inline void wait_copies();

#ifdef LMF_CPU

template <>
inline void mma<__half>(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  cpu::mma(cpu::half_value, d, a, b0, b1);
}

template <>
inline void mma<__nv_bfloat16>(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  cpu::mma(cpu::bfloat16_value, d, a, b0, b1);
}

template <int COUNT, bool TRANSPOSED>
inline void load_matrices(unsigned (&to)[COUNT], const void* row) {
  cpu::load_matrices(to, COUNT, TRANSPOSED, row);
}

inline void copy_async(void* to, const void* from, bool copy) { cpu::copy_async(to, from, copy); }
inline void commit_copies() { cpu::commit_copies(); }
template <int N>
inline void wait_copies() {
  cpu::wait_copies(N);
}

#else

template <>
__device__ inline void mma<__half>(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ inline void mma<__nv_bfloat16>(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <int COUNT, bool TRANSPOSED>
__device__ inline void load_matrices(unsigned (&to)[COUNT], const void* row) {
  static_assert(COUNT == 2 || COUNT == 4, "ldmatrix loads 2 or 4 matrices here");
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (COUNT == 4 && TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  } else if constexpr (COUNT == 4) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  } else if constexpr (TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(address)
                 : "memory");
  }
}

__device__ inline void copy_async(void* to, const void* from, bool copy) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  const int bytes = copy ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
}

__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int N>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

#endif

}  // namespace lmf
