// Everything that the binding exposes. Pointers are to device memory, strides count elements, `stream` is a
// cudaStream_t and `dtype` a Dtype of common/types.h. A launcher returns CUDA's error code, 0 for none; it allocates
// nothing and waits for nothing. Sizes of 0 are the caller's to catch: a grid may not be empty.
#pragma once
#include <cstdint>

namespace lmf {

// normed (rows, width) and, with a residual, total = x + residual; the strides are those of a row.
int rms_norm(int dtype, const void* x, int64_t x_row, const void* residual, int64_t residual_row, const void* weight,
             void* normed, void* total, int64_t rows, int width, float eps, void* stream);

// packed (rows, (heads + 2 * kv_heads) * head_dim) -> q, k, v, contiguous. table: (positions, head_dim) float32.
int rope(int dtype, const void* packed, int64_t packed_row, const int64_t* positions, const float* table,
         int64_t table_row, void* q, void* k, void* v, int64_t rows, int heads, int kv_heads, int head_dim,
         void* stream);

// gate_up (rows, 2 * width) -> out (rows, width), contiguous.
int swiglu(int dtype, const void* gate_up, int64_t row, void* out, int64_t rows, int width, void* stream);

// total (N, width) float32 at target[l] += times[t] * rows[t * length + l].
int add_frames(int dtype, float* total, int64_t total_row, const void* rows, int64_t rows_row, const int64_t* target,
               const float* times, int frames, int length, int width, void* stream);

// Queries of many segments, each over the `prefix` rows of its frame and causally over its own rows. Strides:
// `_segment` from segment to segment (unused where `starts` says where a segment begins), `_frame` from frame to frame,
// `_row`, `_head`. Without `starts` and `slots` every segment has `longest` rows and looks at the frame of its own
// number. out: contiguous (all rows, kv_heads * group, head_dim).
int attention(int dtype, int head_dim, int group, int kv_heads, int segments, int longest, int prefix, const void* q,
              int64_t q_segment, int64_t q_row, int64_t q_head, const void* k, int64_t k_segment, int64_t k_row,
              int64_t k_head, const void* v, int64_t v_segment, int64_t v_row, int64_t v_head, const void* prefix_k,
              int64_t prefix_k_frame, int64_t prefix_k_row, int64_t prefix_k_head, const void* prefix_v,
              int64_t prefix_v_frame, int64_t prefix_v_row, int64_t prefix_v_head, void* out, const int* starts,
              const int* slots, void* stream);

// features (frames, rows, width) pooled by weight (queries, width) and bias (queries, rows), both float32 and
// contiguous. A block goes through `rows_per_split` rows, which makes S = ceil(rows / rows_per_split) splits. pooled:
// (frames, queries, width) float32. statistics: (frames, S, queries, 2) float32 scratch. partial: (frames, S, queries,
// width) float32 scratch, null where S is 1. weights: (frames, queries, rows) float32 or null.
int compressor_attention(int dtype, const void* features, int64_t frame, int64_t row, const float* weight,
                         const float* bias, float* pooled, float* statistics, float* partial, float* weights,
                         int frames, int queries, int rows, int width, int rows_per_split, float eps, void* stream);

// Bytes of shared memory that a block of compressor_attention takes.
int compressor_shared_bytes(int dtype, int queries, int width);

// Version of the CUDA runtime that is linked in, as CUDA counts (13000 for 13.0), and of the driver, 0 where there is
// none.
int runtime_version();
int driver_version();

// CUDA's error code of asking for devices, and in `count` how many there are.
int count_devices(int* count);

// CUDA's words for an error code.
const char* error_text(int code);

}  // namespace lmf
