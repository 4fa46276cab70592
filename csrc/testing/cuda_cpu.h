// CUDA C++ for g++: enough of the language and its runtime to run this project's kernels on a CPU, for tests.
//
// Every CUDA thread is a fiber. Fibers change places only where CUDA lets threads wait for each other, and the order is
// drawn from LMF_SEED: whole warps run ahead of others by as much as the barriers allow, so that a missing barrier
// shows. Shared memory and the targets of copies under way hold NaN until they are written. cuda_cpu.cpp has the
// runtime and says more.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

// A static array of shared memory, and the dynamic one. Each is a heap block of its own, so that AddressSanitizer sees
// its ends; the address of a static inside the lambda tells one declaration (of one instantiation) from another.
#define LMF_SHARED(type, name, extent)                                    \
  using name##_type = type extent;                                        \
  name##_type& name = *static_cast<name##_type*>(lmf::cpu::static_shared( \
      [] {                                                                \
        static char key;                                                  \
        return &key;                                                      \
      }(),                                                                \
      sizeof(name##_type)))
#define LMF_DYNAMIC_SHARED(name) unsigned char* const name = lmf::cpu::dynamic_shared()

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
struct alignas(4) __half2 {
  __half x, y;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

namespace lmf {
namespace cpu {

const dim3& thread_index();
const dim3& block_index();
const dim3& block_size();
const dim3& grid_size();
int lane();

void* static_shared(const char* key, size_t bytes);
unsigned char* dynamic_shared();

// __syncthreads and __syncwarp. `site` is where they stand: threads that wait for each other must wait at one place.
void sync_block(const char* site);
void sync_warp(const char* site);

// Gives `bytes` of data to the warp and waits until all its lanes have given theirs; `given(lane)` is then a lane's
// data, until the next exchange but one. Orders no memory, as CUDA's shuffles order none.
void exchange(const char* site, const void* data, size_t bytes);
const void* given(int lane);

float half_value(uint16_t bits);
float bfloat16_value(uint16_t bits);
uint16_t half_bits(float value);
uint16_t bfloat16_bits(float value);

// The instructions of common/tensor_core.h. A copy lands when it is waited for, and not before.
void mma(float (*value)(uint16_t), float* d, const unsigned* a, unsigned b0, unsigned b1);
void load_matrices(unsigned* to, int count, bool transposed, const void* row);
void copy_async(void* to, const void* from, bool copy);
void commit_copies();
void wait_copies(int keep);

// Runs a grid; CUDA's error code (1, an invalid value, for a grid that no device would start).
int run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread);

template <class T>
T shuffle(const char* site, T value, int source) {
  exchange(site, &value, sizeof value);
  memcpy(&value, given(source), sizeof value);
  return value;
}

}  // namespace cpu

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void*, Arguments... arguments) {
  return cpu::run(grid, block, shared_bytes, [=] { kernel(arguments...); });
}

}  // namespace lmf

#define threadIdx (lmf::cpu::thread_index())
#define blockIdx (lmf::cpu::block_index())
#define blockDim (lmf::cpu::block_size())
#define gridDim (lmf::cpu::grid_size())
#define LMF_TEXT_OF(x) #x
#define LMF_TEXT(x) LMF_TEXT_OF(x)
#define LMF_SITE __FILE__ ":" LMF_TEXT(__LINE__)
#define __syncthreads() lmf::cpu::sync_block(LMF_SITE)
#define __syncwarp() lmf::cpu::sync_warp(LMF_SITE)
#define __shfl_xor_sync(mask, value, bits) lmf::cpu::shuffle("__shfl_xor_sync", value, lmf::cpu::lane() ^ (bits))

inline float __half2float(__half x) { return lmf::cpu::half_value(x.bits); }
inline float __bfloat162float(__nv_bfloat16 x) { return lmf::cpu::bfloat16_value(x.bits); }
inline __half __float2half(float x) { return {lmf::cpu::half_bits(x)}; }
inline __nv_bfloat16 __float2bfloat16(float x) { return {lmf::cpu::bfloat16_bits(x)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half(x), __float2half(y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16(x), __float2bfloat16(y)}; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
using std::max;
using std::min;
