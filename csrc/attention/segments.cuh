// What both attention kernels know of their arguments: where rows lie and which of them a block works on.
#pragma once
#include "../common/types.h"

namespace lmf {

// Rows of heads: `outer` from segment to segment or frame to frame, all strides in elements.
template <class T>
struct Rows {
  const T* data;
  int64_t outer, row, head;
};

template <class T>
struct Attention {
  Rows<T> q, k, v, prefix_k, prefix_v;
  T* out;
  const int* starts;
  const int* slots;
  int group, kv_heads, longest, prefix;
  float scale;
};

// One block's segment and key head. The queries of one key head's group are rows of one tile, so that keys and values
// are read once for all of them: packed row i is query i / group of head i % group of the group.
template <class T>
struct Segment {
  const T *q, *k, *v, *prefix_k, *prefix_v;
  T* out;
  int packed, prefix, group;
  int64_t k_row, v_row, prefix_k_row, prefix_v_row, q_row, q_head, out_row;

  __device__ Segment(const Attention<T>& a, int segment, int kv_head, int head_dim) {
    const int start = a.starts ? a.starts[segment] : segment * a.longest;
    const int length = a.starts ? a.starts[segment + 1] - start : a.longest;
    const int slot = a.slots ? a.slots[segment] : segment;
    const auto own = [&](const Rows<T>& rows, int head) {
      const int64_t offset = a.starts ? start * rows.row : segment * rows.outer;
      return rows.data + offset + head * rows.head;
    };
    q = own(a.q, kv_head * a.group);
    k = own(a.k, kv_head);
    v = own(a.v, kv_head);
    prefix_k = a.prefix_k.data + slot * a.prefix_k.outer + kv_head * a.prefix_k.head;
    prefix_v = a.prefix_v.data + slot * a.prefix_v.outer + kv_head * a.prefix_v.head;
    out_row = static_cast<int64_t>(a.kv_heads) * a.group * head_dim;
    out = a.out + start * out_row + static_cast<int64_t>(kv_head) * a.group * head_dim;
    packed = length * a.group;
    prefix = a.prefix;
    group = a.group;
    q_row = a.q.row;
    q_head = a.q.head;
    k_row = a.k.row;
    v_row = a.v.row;
    prefix_k_row = a.prefix_k.row;
    prefix_v_row = a.prefix_v.row;
  }

  __device__ const T* query(int i) const { return q + i / group * q_row + i % group * q_head; }
  __device__ const T* key(int j) const { return j < prefix ? prefix_k + j * prefix_k_row : k + (j - prefix) * k_row; }
  __device__ const T* value(int j) const { return j < prefix ? prefix_v + j * prefix_v_row : v + (j - prefix) * v_row; }
  __device__ T* result(int i, int head_dim) const { return out + i / group * out_row + i % group * head_dim; }

  // The last key that packed row i sees.
  __device__ int last_key(int i) const { return prefix + i / group; }

  // Keys that packed rows first .. first + rows - 1 look at.
  __device__ int keys(int first, int rows) const { return last_key(min(first + rows, packed) - 1) + 1; }
};

}  // namespace lmf
