// RMSNorm of rows in Llama's cast order, with the residual add before it. One block a row.
#include "common/types.h"
#include "launchers.h"

namespace lmf {
namespace {

constexpr int THREADS = 256;

template <class T, int N>
__global__ void __launch_bounds__(THREADS)
    rms_norm_kernel(const T* x, int64_t x_row, const T* residual, int64_t residual_row, const T* weight, T* normed,
                    T* total, int width, float eps) {
  LMF_SHARED(float, sums, [THREADS / 32]);
  const int64_t row = blockIdx.x;
  const T* source = x + row * x_row;
  float squares = 0;
  for (int column = threadIdx.x * N; column < width; column += THREADS * N) {
    Pack<T, N> values = load<N>(source + column);
    if (residual != nullptr) {
      const Pack<T, N> added = load<N>(residual + row * residual_row + column);
#pragma unroll
      for (int i = 0; i < N; i++) values.at[i] = from_float<T>(to_float(values.at[i]) + to_float(added.at[i]));
      store(total + row * width + column, values);
    }
#pragma unroll
    for (int i = 0; i < N; i++) squares += to_float(values.at[i]) * to_float(values.at[i]);
  }
  squares = lanes_sum(squares);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = squares;
  __syncthreads();
  squares = 0;
#pragma unroll
  for (int i = 0; i < THREADS / 32; i++) squares += sums[i];
  const float scale = rsqrtf(squares / width + eps);
  // A thread reads back what it wrote itself (out of the cache), so that any width is taken with few registers.
  if (residual != nullptr) source = total + row * width;
  for (int column = threadIdx.x * N; column < width; column += THREADS * N) {
    Pack<T, N> values = load<N>(source + column);
    const Pack<T, N> factors = load<N>(weight + column);
#pragma unroll
    for (int i = 0; i < N; i++) {
      const T cast = from_float<T>(to_float(values.at[i]) * scale);
      values.at[i] = from_float<T>(to_float(cast) * to_float(factors.at[i]));
    }
    store(normed + row * width + column, values);
  }
}

}  // namespace

int rms_norm(int dtype, const void* x, int64_t x_row, const void* residual, int64_t residual_row, const void* weight,
             void* normed, void* total, int64_t rows, int width, float eps, void* stream) {
  return with_type(dtype, [&](auto one) {
    using T = decltype(one);
    const bool wide = fits_wide<T>({x, residual, weight, normed, total}, {x_row, residual_row, width});
    return launch(wide ? &rms_norm_kernel<T, WIDE<T>> : &rms_norm_kernel<T, 1>, dim3(static_cast<unsigned>(rows)),
                  dim3(THREADS), 0, stream, static_cast<const T*>(x), x_row, static_cast<const T*>(residual),
                  residual_row, static_cast<const T*>(weight), static_cast<T*>(normed), static_cast<T*>(total), width,
                  eps);
  });
}

}  // namespace lmf
