// silu(gate) * up, in float32 until the one rounding at the end.
#include "common/types.h"
#include "launchers.h"

namespace lmf {
namespace {

constexpr int THREADS = 256;

template <class T, int N>
__global__ void __launch_bounds__(THREADS)
    swiglu_kernel(const T* gate_up, int64_t row_stride, T* out, int64_t rows, int width) {
  const int packs = width / N;
  const int64_t work = rows * packs, step = static_cast<int64_t>(gridDim.x) * THREADS;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x; item < work; item += step) {
    const int64_t row = item / packs;
    const int column = static_cast<int>(item % packs) * N;
    Pack<T, N> gate = load<N>(gate_up + row * row_stride + column);
    const Pack<T, N> up = load<N>(gate_up + row * row_stride + width + column);
#pragma unroll
    for (int i = 0; i < N; i++) {
      const float x = to_float(gate.at[i]);
      gate.at[i] = from_float<T>(x / (1 + expf(-x)) * to_float(up.at[i]));
    }
    store(out + row * width + column, gate);
  }
}

}  // namespace

int swiglu(int dtype, const void* gate_up, int64_t row, void* out, int64_t rows, int width, void* stream) {
  return with_type(dtype, [&](auto one) {
    using T = decltype(one);
    const bool wide = fits_wide<T>({gate_up, out}, {row, width});
    const int64_t blocks = (rows * (width / (wide ? WIDE<T> : 1)) + THREADS - 1) / THREADS;
    return launch(wide ? &swiglu_kernel<T, WIDE<T>> : &swiglu_kernel<T, 1>,
                  dim3(static_cast<unsigned>(blocks < GRID_LIMIT ? blocks : GRID_LIMIT)), dim3(THREADS), 0, stream,
                  static_cast<const T*>(gate_up), row, static_cast<T*>(out), rows, width);
  });
}

}  // namespace lmf
