// The compressor in float32 by multiply-adds: eight rows and eight queries at a time. A warp first has one row (its
// LayerNorm, applied in place, and its eight scores), then the softmax of one query; in the weighted sum a thread has
// four columns.
#pragma once
#include "../common/tensor_core.h"
#include "arguments.cuh"

namespace lmf {

struct CompressorFma {
  static constexpr int QUERIES = 8, ROWS = 8, THREADS = 256;
  // What shared memory has room for at width 1024.
  static constexpr int BLOCKS = 2;
  static size_t bytes(int width) { return sizeof(float) * (static_cast<size_t>(width) * (QUERIES + 2 * ROWS)); }
};

__global__ void __launch_bounds__(CompressorFma::THREADS, CompressorFma::BLOCKS) compressor_fma(Compressor<float> a) {
  constexpr int QUERIES = CompressorFma::QUERIES, ROWS = CompressorFma::ROWS;
  LMF_DYNAMIC_SHARED(memory);
  LMF_SHARED(float, scores, [QUERIES][ROWS]);
  LMF_SHARED(float, shrinks, [QUERIES]);
  LMF_SHARED(float, totals, [QUERIES]);
  float* const weight = reinterpret_cast<float*>(memory);
  float* const buffers = weight + QUERIES * a.width;

  const Part<float> part(a, QUERIES);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, pieces = a.width / 4;
  const int tiles = (part.end - part.begin + ROWS - 1) / ROWS;

  const auto fetch = [&](int tile) {
    for (int i = threadIdx.x; i < ROWS * pieces; i += CompressorFma::THREADS) {
      const int row = i / pieces, column = i % pieces * 4, n = part.begin + tile * ROWS + row;
      const bool real = n < part.end;
      copy_async(buffers + (tile % 2 * ROWS + row) * a.width + column,
                 part.features + (real ? n : part.begin) * a.row + column, real);
    }
    commit_copies();
  };
  fetch(0);
  for (int i = threadIdx.x; i < QUERIES * pieces; i += CompressorFma::THREADS) {
    Pack<float, 4> four = {};
    if (part.first_query + i / pieces < a.queries)
      four = load<4>(a.weight + static_cast<int64_t>(part.first_query) * a.width + i * 4);
    store(weight + i * 4, four);
  }

  float pooled[QUERIES][4] = {}, highest = -INFINITY, total = 0;
  const int column = threadIdx.x * 4;
  const bool real_query = part.first_query + warp < a.queries;
  for (int tile = 0; tile < tiles; tile++) {
    wait_copies<0>();
    __syncthreads();
    if (tile + 1 < tiles) fetch(tile + 1);
    float* const features = buffers + tile % 2 * ROWS * a.width;

    float* const mine = features + warp * a.width;
    float sum = 0, squares = 0, dots[QUERIES] = {};
    for (int c = lane * 4; c < a.width; c += 128) {
      const Pack<float, 4> x = load<4>(mine + c);
      sum += (x.at[0] + x.at[1]) + (x.at[2] + x.at[3]);
    }
    const float mean = lanes_sum(sum) / a.width;
    for (int c = lane * 4; c < a.width; c += 128) {
      const Pack<float, 4> x = load<4>(mine + c);
#pragma unroll
      for (int e = 0; e < 4; e++) squares += (x.at[e] - mean) * (x.at[e] - mean);
    }
    const float scale = rsqrtf(lanes_sum(squares) / a.width + a.eps);
    for (int c = lane * 4; c < a.width; c += 128) {
      Pack<float, 4> x = load<4>(mine + c);
#pragma unroll
      for (int e = 0; e < 4; e++) x.at[e] = (x.at[e] - mean) * scale;
      store(mine + c, x);
#pragma unroll
      for (int query = 0; query < QUERIES; query++) {
        const Pack<float, 4> w = load<4>(weight + query * a.width + c);
        dots[query] += (x.at[0] * w.at[0] + x.at[1] * w.at[1]) + (x.at[2] * w.at[2] + x.at[3] * w.at[3]);
      }
    }
#pragma unroll
    for (int query = 0; query < QUERIES; query++) {
      const float dot = lanes_sum(dots[query]);
      if (lane == 0) scores[query][warp] = dot;
    }
    __syncthreads();

    // The warp's query now; lanes beyond the tile's rows repeat its first ones.
    const int row = lane % ROWS, n = part.begin + tile * ROWS + row;
    float score = n < part.end ? scores[warp][row] : -INFINITY;
    if (real_query && n < part.end) {
      score += a.bias[static_cast<int64_t>(part.first_query + warp) * a.rows + n];
      if (a.weights != nullptr && lane < ROWS)
        a.weights[(static_cast<int64_t>(part.frame) * a.queries + part.first_query + warp) * a.rows + n] = score;
    }
    const float top = fmaxf(highest, lanes_max<ROWS>(score)), shrink = expf(highest - top), p = expf(score - top);
    highest = top;
    total = total * shrink + lanes_sum<ROWS>(p);
    // All lanes have read the scores that the shares now replace.
    __syncwarp();
    if (lane < ROWS) scores[warp][row] = p;
    if (lane == 0) shrinks[warp] = shrink;
    __syncthreads();

    if (column < a.width) {
#pragma unroll
      for (int query = 0; query < QUERIES; query++) {
#pragma unroll
        for (int e = 0; e < 4; e++) pooled[query][e] *= shrinks[query];
      }
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        const Pack<float, 4> y = load<4>(features + r * a.width + column);
#pragma unroll
        for (int query = 0; query < QUERIES; query++) {
#pragma unroll
          for (int e = 0; e < 4; e++) pooled[query][e] += scores[query][r] * y.at[e];
        }
      }
    }
  }

  if (lane == 0) {
    totals[warp] = a.splits == 1 ? 1 / total : 1;
    if (real_query) {
      a.statistics[part.place(a, warp) * 2] = highest;
      a.statistics[part.place(a, warp) * 2 + 1] = total;
    }
  }
  __syncthreads();
  if (column < a.width) {
#pragma unroll
    for (int query = 0; query < QUERIES; query++) {
      if (part.first_query + query < a.queries) {
        Pack<float, 4> four;
#pragma unroll
        for (int e = 0; e < 4; e++) four.at[e] = pooled[query][e] * totals[query];
        store(part.sums(a, query) + column, four);
      }
    }
  }
}

}  // namespace lmf
