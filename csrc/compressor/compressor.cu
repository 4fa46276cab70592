// compressor_attention: a kernel that leaves the sums of each split of the rows, one that puts splits together, and,
// where the attention weights are asked for, one that makes them of the scores that the first has left in their place.
#include "../launchers.h"
#include "fma.cuh"
#include "tensor_core.cuh"

namespace lmf {
namespace {

constexpr int COMBINE_THREADS = 128;

// The maximum and the sum of a query over all splits. statistics: its first split's; the others lie 2 * queries further
// on.
struct Softmax {
  float highest = -INFINITY, total = 0;

  __device__ Softmax(const float* statistics, int splits, int queries) {
    const int64_t step = 2 * static_cast<int64_t>(queries);
    for (int split = 0; split < splits; split++) highest = fmaxf(highest, statistics[split * step]);
    for (int split = 0; split < splits; split++)
      total += expf(statistics[split * step] - highest) * statistics[split * step + 1];
  }
};

// One block a query and frame.
__global__ void __launch_bounds__(COMBINE_THREADS)
    combine_kernel(const float* statistics, const float* partial, float* pooled, int splits, int queries, int width) {
  const int query = blockIdx.x, frame = blockIdx.y;
  const int64_t first = static_cast<int64_t>(frame) * splits * queries + query;
  const Softmax softmax(statistics + first * 2, splits, queries);
  for (int column = threadIdx.x; column < width; column += COMBINE_THREADS) {
    float sum = 0;
    for (int split = 0; split < splits; split++) {
      const int64_t place = first + static_cast<int64_t>(split) * queries;
      sum += expf(statistics[place * 2] - softmax.highest) * partial[place * width + column];
    }
    pooled[(static_cast<int64_t>(frame) * queries + query) * width + column] = sum / softmax.total;
  }
}

__global__ void __launch_bounds__(COMBINE_THREADS)
    weights_kernel(const float* statistics, float* weights, int splits, int queries, int rows) {
  const int query = blockIdx.x, frame = blockIdx.y;
  const Softmax softmax(statistics + (static_cast<int64_t>(frame) * splits * queries + query) * 2, splits, queries);
  float* const scores = weights + (static_cast<int64_t>(frame) * queries + query) * rows;
  for (int n = threadIdx.x; n < rows; n += COMBINE_THREADS)
    scores[n] = expf(scores[n] - softmax.highest) / softmax.total;
}

template <class T, int QUERIES>
int start_tensor_core(const Compressor<T>& a, int frames, void* stream) {
  using Tile = CompressorTile<QUERIES>;
  const dim3 grid(static_cast<unsigned>(a.splits), ceil_div(a.queries, QUERIES), static_cast<unsigned>(frames));
  return launch(a.width > Tile::WARPS * Tile::SLICE ? &compressor_tensor_core<T, QUERIES, 2>
                                                    : &compressor_tensor_core<T, QUERIES, 1>,
                grid, dim3(Tile::THREADS), Tile::bytes(a.width), stream, a);
}

}  // namespace

int compressor_attention(int dtype, const void* features, int64_t frame, int64_t row, const float* weight,
                         const float* bias, float* pooled, float* statistics, float* partial, float* weights,
                         int frames, int queries, int rows, int width, int rows_per_split, float eps, void* stream) {
  if (width % 64 != 0 || width < 64 || width > 1024 || rows < 1 || rows_per_split < 1) return INVALID_VALUE;
  const int splits = static_cast<int>(ceil_div(rows, rows_per_split));
  int code = with_type(dtype, [&](auto one) {
    using T = decltype(one);
    const Compressor<T> a = {static_cast<const T*>(features),
                             frame,
                             row,
                             weight,
                             bias,
                             pooled,
                             statistics,
                             partial,
                             weights,
                             queries,
                             rows,
                             width,
                             splits,
                             rows_per_split,
                             eps};
    if constexpr (sizeof(T) == sizeof(float)) {
      const dim3 grid(static_cast<unsigned>(splits), ceil_div(queries, CompressorFma::QUERIES),
                      static_cast<unsigned>(frames));
      return launch(&compressor_fma, grid, dim3(CompressorFma::THREADS), CompressorFma::bytes(width), stream, a);
    } else {
      return queries <= 8 ? start_tensor_core<T, 8>(a, frames, stream) : start_tensor_core<T, 32>(a, frames, stream);
    }
  });
  const dim3 each(static_cast<unsigned>(queries), static_cast<unsigned>(frames));
  if (code == 0 && splits > 1)
    code = launch(&combine_kernel, each, dim3(COMBINE_THREADS), 0, stream, statistics, partial, pooled, splits, queries,
                  width);
  if (code == 0 && weights != nullptr)
    code = launch(&weights_kernel, each, dim3(COMBINE_THREADS), 0, stream, statistics, weights, splits, queries, rows);
  return code;
}

int compressor_shared_bytes(int dtype, int queries, int width) {
  if (dtype == FLOAT32) return static_cast<int>(CompressorFma::bytes(width));
  return static_cast<int>(queries <= 8 ? CompressorTile<8>::bytes(width) : CompressorTile<32>::bytes(width));
}

}  // namespace lmf
