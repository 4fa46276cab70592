// The compressor in float16 and bfloat16 on tensor cores, with rows of features where attention has queries: one
// product's 16 x 8 tile is 16 rows by 8 queries, so the eight folded queries of one compressed token fill it without
// waste.
//
// The eight warps split the width: each reads its columns of a tile of rows for the scores (whose parts are summed in
// shared memory), for its part of the LayerNorm's statistics, and for the weighted sum.
#pragma once
#include "../common/tensor_core.h"
#include "arguments.cuh"

namespace lmf {

// QUERIES: 8 or 32. With 32, a weight tile and two buffers of features at width 1024 take 152 KiB, which sm_80 has.
template <int QUERIES>
struct CompressorTile {
  static constexpr int WARPS = 8, THREADS = 32 * WARPS, ROWS = 16, SLICE = 64;
  static constexpr int P_PITCH = ROWS + 8;
  // What shared memory has room for at width 1024, so that registers are not saved for more blocks than can run.
  static constexpr int BLOCKS = QUERIES == 8 ? 2 : 1;
  static size_t bytes(int width) {
    return 2 * static_cast<size_t>(width + 8) * (QUERIES + 2 * ROWS) + 2 * QUERIES * P_PITCH +
           sizeof(float) * (WARPS * ROWS * QUERIES + 2 * WARPS * ROWS + 4 * QUERIES);
  }
};

// SLICES: slices of 64 columns that a warp has, its own and then every eighth.
template <class T, int QUERIES, int SLICES>
__global__ void __launch_bounds__(CompressorTile<QUERIES>::THREADS, CompressorTile<QUERIES>::BLOCKS)
    compressor_tensor_core(Compressor<T> a) {
  using Tile = CompressorTile<QUERIES>;
  constexpr int ROWS = Tile::ROWS, WARPS = Tile::WARPS, SLICE = Tile::SLICE, P_PITCH = Tile::P_PITCH,
                OCTETS = QUERIES / 8;
  const int pitch = a.width + 8, pieces = a.width / 8, slices = a.width / SLICE, active = min(slices, WARPS);
  LMF_DYNAMIC_SHARED(memory);
  T* const weight = reinterpret_cast<T*>(memory);
  T* const buffers = weight + QUERIES * pitch;
  T* const shares = buffers + 2 * ROWS * pitch;
  float* const parts = reinterpret_cast<float*>(shares + QUERIES * P_PITCH);
  float* const moments = parts + WARPS * ROWS * QUERIES;
  float* const weight_sums = moments + 2 * WARPS * ROWS;
  float* const shrinks = weight_sums + QUERIES;
  float* const totals = shrinks + QUERIES;
  float* const shifts = totals + QUERIES;

  const Part<T> part(a, QUERIES);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int tiles = (part.end - part.begin + ROWS - 1) / ROWS;

  const auto fetch = [&](int tile) {
    for (int i = threadIdx.x; i < ROWS * pieces; i += Tile::THREADS) {
      const int row = i / pieces, column = i % pieces * 8, n = part.begin + tile * ROWS + row;
      const bool real = n < part.end;
      copy_async(buffers + (tile % 2 * ROWS + row) * pitch + column,
                 part.features + (real ? n : part.begin) * a.row + column, real);
    }
    commit_copies();
  };
  fetch(0);

  // The sums are of the rounded weights, as the scores are: their common error cancels with the mean that they
  // multiply.
  for (int query = warp; query < QUERIES; query += WARPS) {
    const bool real = part.first_query + query < a.queries;
    float sum = 0;
    for (int column = lane * 2; column < a.width; column += 64) {
      const float* const from = a.weight + static_cast<int64_t>(part.first_query + query) * a.width + column;
      const T low = from_float<T>(real ? from[0] : 0), high = from_float<T>(real ? from[1] : 0);
      weight[query * pitch + column] = low;
      weight[query * pitch + column + 1] = high;
      sum += to_float(low) + to_float(high);
    }
    sum = lanes_sum(sum);
    if (lane == 0) weight_sums[query] = sum;
  }

  // Half a warp has the softmax of a query, a lane of it one row of the tile; queries beyond 16 take turns.
  constexpr int TURNS = (QUERIES + 15) / 16;
  const int row = lane % 16, half_warp = warp * 2 + lane / 16;
  float highest[TURNS], total[TURNS], shift[TURNS];
#pragma unroll
  for (int turn = 0; turn < TURNS; turn++) {
    highest[turn] = -INFINITY;
    total[turn] = shift[turn] = 0;
  }

  float pooled[SLICES][SLICE / 16][OCTETS][4] = {};
  for (int tile = 0; tile < tiles; tile++) {
    wait_copies<0>();
    // This tile is there for all, and all are done with the other buffer and with the shares.
    __syncthreads();
    if (tile + 1 < tiles) fetch(tile + 1);
    const T* const features = buffers + tile % 2 * ROWS * pitch;

    if (warp < active) {
      float score[OCTETS][4] = {};
#pragma unroll
      for (int slice = 0; slice < SLICES; slice++) {
        const int from = (warp + slice * WARPS) * SLICE;
        if (from < a.width) {
#pragma unroll
          for (int k = 0; k < SLICE; k += 32) {
            unsigned x[2][4];
            load_matrices<4, false>(x[0], features + lane % 16 * pitch + from + k + lane / 16 * 8);
            load_matrices<4, false>(x[1], features + lane % 16 * pitch + from + k + 16 + lane / 16 * 8);
#pragma unroll
            for (int octet = 0; octet < OCTETS; octet++) {
              unsigned w[4];
              load_matrices<4, false>(w, weight + (octet * 8 + lane % 8) * pitch + from + k + lane / 8 * 8);
              mma<T>(score[octet], x[0], w[0], w[1]);
              mma<T>(score[octet], x[1], w[2], w[3]);
            }
          }
        }
      }
#pragma unroll
      for (int octet = 0; octet < OCTETS; octet++) {
#pragma unroll
        for (int e = 0; e < 4; e++)
          parts[(warp * ROWS + g + e / 2 * 8) * QUERIES + octet * 8 + 2 * t + e % 2] = score[octet][e];
      }

      // Mean and sum of squared deviations of the warp's columns: two lanes have a row, each half of every slice.
      float sum = 0, squares = 0;
      int columns = 0;
      const T* const mine = features + lane / 2 * pitch + lane % 2 * (SLICE / 2);
      for (int slice = warp; slice < slices; slice += WARPS, columns += SLICE)
        for (int k = 0; k < SLICE / 2; k += 8) {
          const Pack<T, 8> x = load<8>(mine + slice * SLICE + k);
#pragma unroll
          for (int e = 0; e < 8; e++) sum += to_float(x.at[e]);
        }
      const float mean = lanes_sum<2>(sum) / columns;
      for (int slice = warp; slice < slices; slice += WARPS)
        for (int k = 0; k < SLICE / 2; k += 8) {
          const Pack<T, 8> x = load<8>(mine + slice * SLICE + k);
#pragma unroll
          for (int e = 0; e < 8; e++) squares += (to_float(x.at[e]) - mean) * (to_float(x.at[e]) - mean);
        }
      squares = lanes_sum<2>(squares);
      if (lane % 2 == 0) {
        moments[(warp * ROWS + lane / 2) * 2] = mean;
        moments[(warp * ROWS + lane / 2) * 2 + 1] = squares;
      }
    }
    __syncthreads();

    if (warp < (QUERIES + 1) / 2) {
      // The parts' moments put together by Chan's formula, which loses nothing where the mean is far from zero.
      float mean = 0, squares = 0;
      int columns = 0;
      for (int from = 0; from < active; from++) {
        const int added = ((slices - from + WARPS - 1) / WARPS) * SLICE;
        const float apart = moments[(from * ROWS + row) * 2] - mean;
        columns += added;
        mean += apart * added / columns;
        squares += moments[(from * ROWS + row) * 2 + 1] + apart * apart * added * (columns - added) / columns;
      }
      const float scale = rsqrtf(squares / a.width + a.eps);
      const int n = part.begin + tile * ROWS + row;
#pragma unroll
      for (int turn = 0; turn < TURNS; turn++) {
        const int query = half_warp + turn * 16;
        float dot = 0, score = -INFINITY;
        for (int from = 0; from < active; from++) dot += parts[(from * ROWS + row) * QUERIES + query];
        if (n < part.end) {
          const bool real = part.first_query + query < a.queries;
          score = scale * (dot - mean * weight_sums[query]);
          if (real) {
            score += a.bias[static_cast<int64_t>(part.first_query + query) * a.rows + n];
            if (a.weights != nullptr)
              a.weights[(static_cast<int64_t>(part.frame) * a.queries + part.first_query + query) * a.rows + n] = score;
          }
        }
        // A tile has at least one row, so the maximum is finite.
        const float top = fmaxf(highest[turn], lanes_max<16>(score));
        const float shrink = expf(highest[turn] - top), p = expf(score - top);
        const T share = from_float<T>(p * scale);
        shares[query * P_PITCH + row] = share;
        highest[turn] = top;
        total[turn] = total[turn] * shrink + lanes_sum<16>(p);
        // Of the rounded shares, for the reason that the weights' sums are of rounded weights.
        shift[turn] = shift[turn] * shrink + lanes_sum<16>(to_float(share) * mean);
        if (row == 0) shrinks[query] = shrink;
      }
    }
    __syncthreads();

    unsigned p[OCTETS][2];
    float shrink[OCTETS][2];
#pragma unroll
    for (int octet = 0; octet < OCTETS; octet++) {
      load_matrices<2, false>(p[octet], shares + (octet * 8 + lane % 8) * P_PITCH + lane / 8 % 2 * 8);
      shrink[octet][0] = shrinks[octet * 8 + 2 * t];
      shrink[octet][1] = shrinks[octet * 8 + 2 * t + 1];
    }
#pragma unroll
    for (int slice = 0; slice < SLICES; slice++) {
      const int from = (warp + slice * WARPS) * SLICE;
      if (from < a.width) {
#pragma unroll
        for (int m = 0; m < SLICE / 16; m++) {
          unsigned x[4];
          load_matrices<4, true>(x, features + (lane / 16 * 8 + lane % 8) * pitch + from + m * 16 + lane / 8 % 2 * 8);
#pragma unroll
          for (int octet = 0; octet < OCTETS; octet++) {
            float (&sum)[4] = pooled[slice][m][octet];
#pragma unroll
            for (int e = 0; e < 4; e++) sum[e] *= shrink[octet][e % 2];
            mma<T>(sum, x, p[octet][0], p[octet][1]);
          }
        }
      }
    }
  }

  if (row == 0 && warp < (QUERIES + 1) / 2) {
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
      const int query = half_warp + turn * 16;
      totals[query] = a.splits == 1 ? 1 / total[turn] : 1;
      shifts[query] = shift[turn];
      if (part.first_query + query < a.queries) {
        a.statistics[part.place(a, query) * 2] = highest[turn];
        a.statistics[part.place(a, query) * 2 + 1] = total[turn];
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int slice = 0; slice < SLICES; slice++) {
    const int from = (warp + slice * WARPS) * SLICE;
    if (from < a.width) {
#pragma unroll
      for (int octet = 0; octet < OCTETS; octet++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const int query = octet * 8 + 2 * t + e % 2;
          if (part.first_query + query < a.queries) {
            float* const to = part.sums(a, query) + from + g + e / 2 * 8;
#pragma unroll
            for (int m = 0; m < SLICE / 16; m++)
              to[m * 16] = (pooled[slice][m][octet][e] - shifts[query]) * totals[query];
          }
        }
      }
    }
  }
}

}  // namespace lmf
