// What the compressor's kernels share: arguments, and how a block leaves its results.
//
// The LayerNorm is never applied to a feature row: with y = (x - mean) / deviation,
//   weight . y = (weight . x - mean * sum of weight) / deviation
//   sum of p * y = sum of (p / deviation) * x  -  sum of (p / deviation) * mean
// so raw features go through the tensor cores, and each row is read once for all that is wanted of it.
#pragma once
#include "../common/types.h"

namespace lmf {

template <class T>
struct Compressor {
  const T* features;
  int64_t frame, row;
  const float *weight, *bias;
  float *pooled, *statistics, *partial, *weights;
  int queries, rows, width, splits, rows_per_split;
  float eps;
};

// One block's place: a split of a frame's rows, and a tile of queries.
template <class T>
struct Part {
  const T* features;
  int frame, split, begin, end, first_query;

  __device__ Part(const Compressor<T>& a, int tile) {
    split = blockIdx.x;
    first_query = blockIdx.y * tile;
    frame = blockIdx.z;
    begin = split * a.rows_per_split;
    end = min(a.rows, begin + a.rows_per_split);
    features = a.features + frame * a.frame;
  }

  // Row of (frames, splits, queries, ...) scratch; `query` counts from first_query.
  __device__ int64_t place(const Compressor<T>& a, int query) const {
    return (static_cast<int64_t>(frame) * a.splits + split) * a.queries + first_query + query;
  }

  // Where a pooled sum goes: to the result where nothing is left to combine.
  __device__ float* sums(const Compressor<T>& a, int query) const {
    return (a.splits == 1 ? a.pooled : a.partial) + place(a, query) * a.width;
  }
};

}  // namespace lmf
