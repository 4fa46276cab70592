// What a kernel needs from its platform: nvcc's, or with -DLMF_CPU the emulation of testing/, so that one source is
// built for both. Kernels take shared memory by the two macros below and start by lmf::launch; nothing else differs.
#pragma once
#include <cstddef>

namespace lmf {

// Dynamic shared memory that a launch has without asking. A block gets 48 KiB in all: the rest is for static arrays.
constexpr size_t SHARED_WITHOUT_ASKING = 32 * 1024;

}  // namespace lmf

#ifdef LMF_CPU
#include "../testing/cuda_cpu.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>

#define LMF_SHARED(type, name, extent) __shared__ type name extent
#define LMF_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

namespace lmf {

// Starts a kernel and returns CUDA's error code, 0 for none. Allocates nothing and waits for nothing.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
           Arguments... arguments) {
  if (shared_bytes > SHARED_WITHOUT_ASKING) {
    const int code = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                          cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (code != 0) return code;
  }
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace lmf
#endif
