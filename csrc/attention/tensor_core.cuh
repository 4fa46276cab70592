// Attention in float16 and bfloat16 on tensor cores: online softmax over tiles of keys (as in FlashAttention-2), the
// tiles copied asynchronously into two buffers by turns. A warp has 16 packed rows and keeps their queries, scores and
// results in registers.
#pragma once
#include "../common/tensor_core.h"
#include "segments.cuh"

namespace lmf {

template <int D>
struct TensorCoreTile {
  static constexpr int WARPS = 4, THREADS = 32 * WARPS, ROWS = 16 * WARPS;
  // 32 keys at head_dim 128 let three blocks share an SM of sm_80; narrower heads have room for 64.
  static constexpr int KEYS = D == 128 ? 32 : 64;
  // A pitch of an odd number of 16-byte units: the eight rows that ldmatrix reads at once lie in different banks.
  static constexpr int PITCH = D + 8;
  static constexpr size_t BYTES = 2 * PITCH * (ROWS + 4 * KEYS);
};

template <class T, int D>
__global__ void __launch_bounds__(TensorCoreTile<D>::THREADS) attention_tensor_core(Attention<T> a) {
  using Tile = TensorCoreTile<D>;
  constexpr int KEYS = Tile::KEYS, PITCH = Tile::PITCH, PIECES = D / 8;
  LMF_DYNAMIC_SHARED(memory);
  T* const queries = reinterpret_cast<T*>(memory);
  T* const keys = queries + Tile::ROWS * PITCH;
  T* const values = keys + 2 * KEYS * PITCH;

  const Segment<T> segment(a, blockIdx.z, blockIdx.y, D);
  const int first = blockIdx.x * Tile::ROWS;
  if (first >= segment.packed) return;
  const int total = segment.keys(first, Tile::ROWS), tiles = (total + KEYS - 1) / KEYS;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;

  // Rows beyond the end are zeros: a NaN there would come through the zero weight that it gets.
  for (int i = threadIdx.x; i < Tile::ROWS * PIECES; i += Tile::THREADS) {
    const int row = i / PIECES, column = i % PIECES * 8;
    const bool real = first + row < segment.packed;
    copy_async(queries + row * PITCH + column, segment.query(real ? first + row : first) + column, real);
  }
  const auto fetch = [&](int tile) {
    T* const to_keys = keys + tile % 2 * KEYS * PITCH;
    T* const to_values = values + tile % 2 * KEYS * PITCH;
    for (int i = threadIdx.x; i < KEYS * PIECES; i += Tile::THREADS) {
      const int row = i / PIECES, column = i % PIECES * 8, j = tile * KEYS + row;
      const bool real = j < total;
      copy_async(to_keys + row * PITCH + column, segment.key(real ? j : 0) + column, real);
      copy_async(to_values + row * PITCH + column, segment.value(real ? j : 0) + column, real);
    }
    commit_copies();
  };
  fetch(0);

  unsigned query[D / 16][4];
  float result[D / 8][4] = {}, highest[2] = {-INFINITY, -INFINITY}, weight[2] = {0, 0};
  const int last[2] = {segment.last_key(first + warp * 16 + g), segment.last_key(first + warp * 16 + g + 8)};
  for (int tile = 0; tile < tiles; tile++) {
    wait_copies<0>();
    // This tile is there for all, and all are done with the buffer that the next one goes to.
    __syncthreads();
    if (tile + 1 < tiles) fetch(tile + 1);
    if (tile == 0) {
#pragma unroll
      for (int k = 0; k < D / 16; k++)
        load_matrices<4, false>(query[k], queries + (warp * 16 + lane % 16) * PITCH + k * 16 + lane / 16 * 8);
    }
    const T* const tile_keys = keys + tile % 2 * KEYS * PITCH;
    const T* const tile_values = values + tile % 2 * KEYS * PITCH;

    float score[KEYS / 8][4] = {};
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
#pragma unroll
      for (int n = 0; n < KEYS / 16; n++) {
        unsigned b[4];
        load_matrices<4, false>(b, tile_keys + (n * 16 + lane / 16 * 8 + lane % 8) * PITCH + k * 16 + lane / 8 % 2 * 8);
        mma<T>(score[2 * n], query[k], b[0], b[1]);
        mma<T>(score[2 * n + 1], query[k], b[2], b[3]);
      }
    }

    // Rows g and g + 8 of the warp, by turns. Every row sees key 0, so its maximum is finite from the first tile on.
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float top = highest[half];
#pragma unroll
      for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float& x = score[n][2 * half + e];
          x = tile * KEYS + n * 8 + 2 * t + e <= last[half] ? x * a.scale : -INFINITY;
          top = fmaxf(top, x);
        }
      }
      top = lanes_max<4>(top);
      const float shrink = exp2f(highest[half] - top);
      highest[half] = top;
      float sum = 0;
#pragma unroll
      for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float& x = score[n][2 * half + e];
          x = exp2f(x - top);
          sum += x;
        }
      }
      weight[half] = weight[half] * shrink + sum;
#pragma unroll
      for (int n = 0; n < D / 8; n++) {
        result[n][2 * half] *= shrink;
        result[n][2 * half + 1] *= shrink;
      }
    }

    // The scores lie as the products' left operand is wanted: two neighbouring tiles of 8 keys make one of 16.
#pragma unroll
    for (int k = 0; k < KEYS / 16; k++) {
      const unsigned p[4] = {pack_pair<T>(score[2 * k][0], score[2 * k][1]),
                             pack_pair<T>(score[2 * k][2], score[2 * k][3]),
                             pack_pair<T>(score[2 * k + 1][0], score[2 * k + 1][1]),
                             pack_pair<T>(score[2 * k + 1][2], score[2 * k + 1][3])};
#pragma unroll
      for (int n = 0; n < D / 16; n++) {
        unsigned b[4];
        load_matrices<4, true>(b,
                               tile_values + (k * 16 + lane / 8 % 2 * 8 + lane % 8) * PITCH + n * 16 + lane / 16 * 8);
        mma<T>(result[2 * n], p, b[0], b[1]);
        mma<T>(result[2 * n + 1], p, b[2], b[3]);
      }
    }
  }

#pragma unroll
  for (int half = 0; half < 2; half++) {
    const float whole = 1 / lanes_sum<4>(weight[half]);
    const int i = first + warp * 16 + g + 8 * half;
    if (i < segment.packed) {
      T* const to = segment.result(i, D) + 2 * t;
#pragma unroll
      for (int n = 0; n < D / 8; n++) {
        const unsigned pair = pack_pair<T>(result[n][2 * half] * whole, result[n][2 * half + 1] * whole);
        memcpy(to + n * 8, &pair, sizeof pair);
      }
    }
  }
}

}  // namespace lmf
