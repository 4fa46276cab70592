// Rows of many frames added to running sums in float32. A thread keeps its columns of one sum in registers and goes
// through the frames in their order, so the result doesn't depend on how the work is spread, and no two threads touch
// one sum.
#include "common/types.h"
#include "launchers.h"

namespace lmf {
namespace {

constexpr int THREADS = 128;

template <class T, int N>
__global__ void __launch_bounds__(THREADS)
    add_frames_kernel(float* total, int64_t total_row, const T* rows, int64_t rows_row, const int64_t* target,
                      const float* times, int frames, int length, int width) {
  const int column = (blockIdx.x * THREADS + threadIdx.x) * N, place = blockIdx.y;
  if (column >= width) return;
  float* sums = total + target[place] * total_row + column;
  float sum[N];
#pragma unroll
  for (int i = 0; i < N; i++) sum[i] = sums[i];
  for (int frame = 0; frame < frames; frame++) {
    const Pack<T, N> row = load<N>(rows + (static_cast<int64_t>(frame) * length + place) * rows_row + column);
    const float count = times[frame];
#pragma unroll
    for (int i = 0; i < N; i++) sum[i] += to_float(row.at[i]) * count;
  }
#pragma unroll
  for (int i = 0; i < N; i++) sums[i] = sum[i];
}

}  // namespace

int add_frames(int dtype, float* total, int64_t total_row, const void* rows, int64_t rows_row, const int64_t* target,
               const float* times, int frames, int length, int width, void* stream) {
  return with_type(dtype, [&](auto one) {
    using T = decltype(one);
    const bool wide = fits_wide<T>({rows}, {rows_row, width});
    const int per_block = THREADS * (wide ? WIDE<T> : 1);
    return launch(wide ? &add_frames_kernel<T, WIDE<T>> : &add_frames_kernel<T, 1>,
                  dim3(ceil_div(width, per_block), static_cast<unsigned>(length)), dim3(THREADS), 0, stream, total,
                  total_row, static_cast<const T*>(rows), rows_row, target, times, frames, length, width);
  });
}

}  // namespace lmf
