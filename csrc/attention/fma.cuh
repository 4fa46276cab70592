// Attention in float32 by multiply-adds, for exactness rather than speed: eight lanes share a packed row, each with
// four of the tile's 32 keys and an eighth of the columns.
#pragma once
#include "segments.cuh"

namespace lmf {

template <int D>
struct FmaTile {
  static constexpr int ROWS = 16, KEYS = 32, LANES = 8, THREADS = ROWS * LANES;
  // Four floats beyond the row: neighbouring keys, which neighbouring lanes read, lie in different banks.
  static constexpr int PITCH = D + 4;
  static constexpr size_t BYTES = sizeof(float) * (PITCH * (ROWS + 2 * KEYS) + ROWS * KEYS);
};

template <int D>
__global__ void __launch_bounds__(FmaTile<D>::THREADS) attention_fma(Attention<float> a) {
  using Tile = FmaTile<D>;
  constexpr int KEYS = Tile::KEYS, LANES = Tile::LANES, PITCH = Tile::PITCH;
  LMF_DYNAMIC_SHARED(memory);
  float* const queries = reinterpret_cast<float*>(memory);
  float* const keys = queries + Tile::ROWS * PITCH;
  float* const values = keys + KEYS * PITCH;
  float* const weights = values + KEYS * PITCH;

  const Segment<float> segment(a, blockIdx.z, blockIdx.y, D);
  const int first = blockIdx.x * Tile::ROWS;
  if (first >= segment.packed) return;
  const int total = segment.keys(first, Tile::ROWS);
  const int row = threadIdx.x / LANES, part = threadIdx.x % LANES, last = segment.last_key(first + row);

  for (int i = threadIdx.x; i < Tile::ROWS * D / 4; i += Tile::THREADS) {
    const int to = i / (D / 4), column = i % (D / 4) * 4;
    Pack<float, 4> four = {};
    if (first + to < segment.packed) four = load<4>(segment.query(first + to) + column);
    store(queries + to * PITCH + column, four);
  }

  float result[D / LANES] = {}, highest = -INFINITY, weight = 0;
  for (int start = 0; start < total; start += KEYS) {
    for (int i = threadIdx.x; i < KEYS * D / 4; i += Tile::THREADS) {
      const int to = i / (D / 4), column = i % (D / 4) * 4;
      Pack<float, 4> key = {}, value = {};
      if (start + to < total) {
        key = load<4>(segment.key(start + to) + column);
        value = load<4>(segment.value(start + to) + column);
      }
      store(keys + to * PITCH + column, key);
      store(values + to * PITCH + column, value);
    }
    __syncthreads();

    float score[KEYS / LANES], top = highest;
#pragma unroll
    for (int n = 0; n < KEYS / LANES; n++) {
      float sum[4] = {};
      for (int column = 0; column < D; column += 4) {
        const Pack<float, 4> x = load<4>(queries + row * PITCH + column);
        const Pack<float, 4> y = load<4>(keys + (n * LANES + part) * PITCH + column);
#pragma unroll
        for (int e = 0; e < 4; e++) sum[e] += x.at[e] * y.at[e];
      }
      const float dot = (sum[0] + sum[1]) + (sum[2] + sum[3]);
      score[n] = start + n * LANES + part <= last ? dot * a.scale : -INFINITY;
      top = fmaxf(top, score[n]);
    }
    top = lanes_max<LANES>(top);
    const float shrink = expf(highest - top);
    highest = top;
    weight *= shrink;
#pragma unroll
    for (int n = 0; n < KEYS / LANES; n++) {
      const float p = expf(score[n] - top);
      weight += p;
      weights[row * KEYS + n * LANES + part] = p;
    }
#pragma unroll
    for (int n = 0; n < D / LANES; n++) result[n] *= shrink;
    // The eight lanes of a row are of one warp.
    __syncwarp();
    for (int j = 0; j < KEYS; j++) {
      const float p = weights[row * KEYS + j];
#pragma unroll
      for (int n = 0; n < D / LANES; n++) result[n] += p * values[j * PITCH + n * LANES + part];
    }
    __syncthreads();
  }

  const float whole = 1 / lanes_sum<LANES>(weight);
  if (first + row < segment.packed) {
    float* const to = segment.result(first + row, D);
#pragma unroll
    for (int n = 0; n < D / LANES; n++) to[n * LANES + part] = result[n] * whole;
  }
}

}  // namespace lmf
