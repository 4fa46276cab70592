// Packed q, k, v of rows, split, and q and k rotated by their positions (Llama's half-split rotary embedding).
#include "common/types.h"
#include "launchers.h"

namespace lmf {
namespace {

constexpr int THREADS = 256;

// One thread has N elements of the lower half of a head and their partners in the upper half.
template <class T, int N>
__global__ void __launch_bounds__(THREADS)
    rope_kernel(const T* packed, int64_t packed_row, const int64_t* positions, const float* table, int64_t table_row,
                T* q, T* k, T* v, int64_t rows, int heads, int kv_heads, int head_dim) {
  const int half = head_dim / 2, packs = half / N, all = heads + 2 * kv_heads;
  const int64_t work = rows * all * packs, step = static_cast<int64_t>(gridDim.x) * THREADS;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x; item < work; item += step) {
    const int column = static_cast<int>(item % packs) * N, head = static_cast<int>(item / packs % all);
    const int64_t row = item / packs / all;
    const T* from = packed + row * packed_row + static_cast<int64_t>(head) * head_dim + column;
    Pack<T, N> low = load<N>(from), high = load<N>(from + half);
    if (head < heads + kv_heads) {
      const float* turn = table + positions[row] * table_row + column;
#pragma unroll
      for (int i = 0; i < N; i++) {
        const float a = to_float(low.at[i]), b = to_float(high.at[i]), cosine = turn[i], sine = turn[half + i];
        low.at[i] = from_float<T>(a * cosine - b * sine);
        high.at[i] = from_float<T>(b * cosine + a * sine);
      }
    }
    T* to = head < heads              ? q + (row * heads + head) * head_dim
            : head < heads + kv_heads ? k + (row * kv_heads + head - heads) * head_dim
                                      : v + (row * kv_heads + head - heads - kv_heads) * head_dim;
    store(to + column, low);
    store(to + column + half, high);
  }
}

}  // namespace

int rope(int dtype, const void* packed, int64_t packed_row, const int64_t* positions, const float* table,
         int64_t table_row, void* q, void* k, void* v, int64_t rows, int heads, int kv_heads, int head_dim,
         void* stream) {
  return with_type(dtype, [&](auto one) {
    using T = decltype(one);
    const bool wide = fits_wide<T>({packed, q, k, v}, {packed_row, head_dim / 2});
    const int64_t work = rows * (heads + 2 * kv_heads) * (head_dim / 2 / (wide ? WIDE<T> : 1));
    const int64_t blocks = (work + THREADS - 1) / THREADS;
    return launch(wide ? &rope_kernel<T, WIDE<T>> : &rope_kernel<T, 1>,
                  dim3(static_cast<unsigned>(blocks < GRID_LIMIT ? blocks : GRID_LIMIT)), dim3(THREADS), 0, stream,
                  static_cast<const T*>(packed), packed_row, positions, table, table_row, static_cast<T*>(q),
                  static_cast<T*>(k), static_cast<T*>(v), rows, heads, kv_heads, head_dim);
  });
}

}  // namespace lmf
