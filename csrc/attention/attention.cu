// prefix_attention and causal_attention, which is the same over the last rows of a frame with the rows before as the
// prefix.
#include "../launchers.h"
#include "fma.cuh"
#include "tensor_core.cuh"

namespace lmf {
namespace {

template <class T>
constexpr bool IS_FLOAT = sizeof(T) == sizeof(float);

template <class T, int D>
int start(Attention<T> a, int segments, void* stream) {
  const float scale = 1 / sqrtf(static_cast<float>(D));
  const auto grid = [&](int rows) {
    return dim3(ceil_div(static_cast<int64_t>(a.longest) * a.group, rows), static_cast<unsigned>(a.kv_heads),
                static_cast<unsigned>(segments));
  };
  if constexpr (IS_FLOAT<T>) {
    using Tile = FmaTile<D>;
    a.scale = scale;
    return launch(&attention_fma<D>, grid(Tile::ROWS), dim3(Tile::THREADS), Tile::BYTES, stream, a);
  } else {
    using Tile = TensorCoreTile<D>;
    // The device has exp2 and not exp: scores are kept in units of log 2.
    a.scale = scale * 1.44269504f;
    return launch(&attention_tensor_core<T, D>, grid(Tile::ROWS), dim3(Tile::THREADS), Tile::BYTES, stream, a);
  }
}

}  // namespace

int attention(int dtype, int head_dim, int group, int kv_heads, int segments, int longest, int prefix, const void* q,
              int64_t q_segment, int64_t q_row, int64_t q_head, const void* k, int64_t k_segment, int64_t k_row,
              int64_t k_head, const void* v, int64_t v_segment, int64_t v_row, int64_t v_head, const void* prefix_k,
              int64_t prefix_k_frame, int64_t prefix_k_row, int64_t prefix_k_head, const void* prefix_v,
              int64_t prefix_v_frame, int64_t prefix_v_row, int64_t prefix_v_head, void* out, const int* starts,
              const int* slots, void* stream) {
  return with_type(dtype, [&](auto one) {
    using T = decltype(one);
    const auto rows = [](const void* data, int64_t outer, int64_t row, int64_t head) {
      return Rows<T>{static_cast<const T*>(data), outer, row, head};
    };
    const Attention<T> a = {rows(q, q_segment, q_row, q_head),
                            rows(k, k_segment, k_row, k_head),
                            rows(v, v_segment, v_row, v_head),
                            rows(prefix_k, prefix_k_frame, prefix_k_row, prefix_k_head),
                            rows(prefix_v, prefix_v_frame, prefix_v_row, prefix_v_head),
                            static_cast<T*>(out),
                            starts,
                            slots,
                            group,
                            kv_heads,
                            longest,
                            prefix,
                            0};
    switch (head_dim) {
      case 32:
        return start<T, 32>(a, segments, stream);
      case 64:
        return start<T, 64>(a, segments, stream);
      case 128:
        return start<T, 128>(a, segments, stream);
      default:
        return INVALID_VALUE;
    }
  });
}

}  // namespace lmf
