// Runs kernels on small inputs in heap buffers of exactly their size, as a plain program for the sanitizers: `driver
// rms_norm`, or with no name all of them. Ends with 1 when a launcher fails and with 3 when a result is NaN, which
// outputs and scratch are filled with at the start.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "../common/types.h"
#include "../launchers.h"

namespace {

using namespace lmf;

// `count` elements of a dtype in a heap block that ends where they end.
class Buffer {
 public:
  Buffer(int dtype, int64_t count) : dtype(dtype), count(count), bytes(new unsigned char[count * size()]) {}

  static Buffer numbers(int dtype, int64_t count) {
    Buffer buffer(dtype, count);
    for (int64_t i = 0; i < count; i++) buffer.put(i, static_cast<float>(i * 37 % 101) / 50 - 1);
    return buffer;
  }

  static Buffer unwritten(int dtype, int64_t count) {
    Buffer buffer(dtype, count);
    memset(buffer.data(), 0xff, count * buffer.size());
    return buffer;
  }

  void* data() const { return bytes.get(); }
  float* floats() const { return reinterpret_cast<float*>(bytes.get()); }

  void check(const char* what) const {
    for (int64_t i = 0; i < count; i++) {
      const float value = get(i);
      if (value != value) {
        fprintf(stderr, "driver: element %lld of %s is NaN\n", static_cast<long long>(i), what);
        exit(3);
      }
    }
  }

 private:
  int size() const { return dtype == FLOAT32 ? 4 : 2; }
  void put(int64_t i, float value) {
    const uint16_t bits = dtype == FLOAT16 ? cpu::half_bits(value) : cpu::bfloat16_bits(value);
    if (dtype == FLOAT32)
      memcpy(&bytes[i * 4], &value, 4);
    else
      memcpy(&bytes[i * 2], &bits, 2);
  }
  float get(int64_t i) const {
    uint16_t bits;
    float value;
    memcpy(&bits, &bytes[i * size()], 2);
    if (dtype == FLOAT32)
      memcpy(&value, &bytes[i * 4], 4);
    else
      value = dtype == FLOAT16 ? cpu::half_value(bits) : cpu::bfloat16_value(bits);
    return value;
  }

  int dtype;
  int64_t count;
  std::unique_ptr<unsigned char[]> bytes;
};

void expect(int code, const char* what) {
  if (code == 0) return;
  fprintf(stderr, "driver: %s answered error %d\n", what, code);
  exit(1);
}

void drive_rms_norm(int dtype) {
  for (const int width : {520, 77}) {
    const int rows = 2;
    const bool add = width == 520;
    const Buffer x = Buffer::numbers(dtype, rows * width), residual = Buffer::numbers(dtype, add ? rows * width : 0);
    const Buffer weight = Buffer::numbers(dtype, width), normed = Buffer::unwritten(dtype, rows * width);
    const Buffer total = Buffer::unwritten(dtype, add ? rows * width : 0);
    expect(rms_norm(dtype, x.data(), width, add ? residual.data() : nullptr, width, weight.data(), normed.data(),
                    add ? total.data() : nullptr, rows, width, 1e-5f, nullptr),
           "rms_norm");
    normed.check("normed");
    total.check("total");
  }
}

void drive_rope(int dtype) {
  for (const int d : {16, 6}) {
    const int rows = 5, heads = 3, kv_heads = 2;
    const Buffer packed = Buffer::numbers(dtype, rows * (heads + 2 * kv_heads) * d),
                 table = Buffer::numbers(FLOAT32, 8 * d);
    const std::vector<int64_t> positions = {0, 7, 3, 3, 1};
    const Buffer q = Buffer::unwritten(dtype, rows * heads * d), k = Buffer::unwritten(dtype, rows * kv_heads * d);
    const Buffer v = Buffer::unwritten(dtype, rows * kv_heads * d);
    expect(rope(dtype, packed.data(), (heads + 2 * kv_heads) * d, positions.data(), table.floats(), d, q.data(),
                k.data(), v.data(), rows, heads, kv_heads, d, nullptr),
           "rope");
    q.check("q");
    k.check("k");
    v.check("v");
  }
}

void drive_swiglu(int dtype) {
  for (const int width : {40, 33}) {
    const Buffer gate_up = Buffer::numbers(dtype, 7 * 2 * width), out = Buffer::unwritten(dtype, 7 * width);
    expect(swiglu(dtype, gate_up.data(), 2 * width, out.data(), 7, width, nullptr), "swiglu");
    out.check("out");
  }
}

void drive_add_frames(int dtype) {
  for (const int width : {24, 33}) {
    const int frames = 3, length = 2;
    const Buffer total = Buffer::numbers(FLOAT32, 4 * width), rows = Buffer::numbers(dtype, frames * length * width);
    const Buffer times = Buffer::numbers(FLOAT32, frames);
    const std::vector<int64_t> target = {3, 0};
    expect(add_frames(dtype, total.floats(), width, rows.data(), width, target.data(), times.floats(), frames, length,
                      width, nullptr),
           "add_frames");
    total.check("total");
  }
}

void drive_attention(int dtype) {
  for (const int d : {32, 128}) {
    const int group = 2, kv_heads = d == 32 ? 2 : 1, heads = group * kv_heads, frames = 2, prefix = 30, longest = 35;
    const std::vector<int> starts = {0, 3, 3, 3 + longest}, slots = {1, 0, 0};
    const int rows = starts.back(), segments = static_cast<int>(slots.size());
    const Buffer q = Buffer::numbers(dtype, rows * heads * d), out = Buffer::unwritten(dtype, rows * heads * d);
    const Buffer k = Buffer::numbers(dtype, rows * kv_heads * d), v = Buffer::numbers(dtype, rows * kv_heads * d);
    const Buffer prefix_k = Buffer::numbers(dtype, frames * prefix * kv_heads * d);
    const Buffer prefix_v = Buffer::numbers(dtype, frames * prefix * kv_heads * d);
    const int64_t row = kv_heads * d, frame = prefix * row;
    expect(attention(dtype, d, group, kv_heads, segments, longest, prefix, q.data(), 0, heads * d, d, k.data(), 0, row,
                     d, v.data(), 0, row, d, prefix_k.data(), frame, row, d, prefix_v.data(), frame, row, d, out.data(),
                     starts.data(), slots.data(), nullptr),
           "attention");
    out.check("out");
  }
}

void drive_compressor_attention(int dtype) {
  const struct {
    int queries, rows, width, rows_per_split;
    bool want_weights;
  } shapes[] = {{8, 35, 640, 32, true}, {16, 35, 64, 48, false}};
  for (const auto& s : shapes) {
    const int frames = 1, splits = (s.rows + s.rows_per_split - 1) / s.rows_per_split;
    const Buffer features = Buffer::numbers(dtype, frames * s.rows * s.width);
    const Buffer weight = Buffer::numbers(FLOAT32, s.queries * s.width),
                 bias = Buffer::numbers(FLOAT32, s.queries * s.rows);
    const Buffer pooled = Buffer::unwritten(FLOAT32, frames * s.queries * s.width);
    const Buffer statistics = Buffer::unwritten(FLOAT32, frames * splits * s.queries * 2);
    const Buffer partial = Buffer::unwritten(FLOAT32, splits > 1 ? frames * splits * s.queries * s.width : 0);
    const Buffer weights = Buffer::unwritten(FLOAT32, s.want_weights ? frames * s.queries * s.rows : 0);
    expect(compressor_attention(dtype, features.data(), s.rows * s.width, s.width, weight.floats(), bias.floats(),
                                pooled.floats(), statistics.floats(), partial.floats(),
                                s.want_weights ? weights.floats() : nullptr, frames, s.queries, s.rows, s.width,
                                s.rows_per_split, 1e-5f, nullptr),
           "compressor_attention");
    pooled.check("pooled");
    weights.check("weights");
  }
}

// Few threads in all: a thread is a fiber to ThreadSanitizer, which has thousands of them and takes a while for each.
const struct {
  const char* name;
  void (*drive)(int dtype);
} DRIVES[] = {{"rms_norm", drive_rms_norm},   {"rope", drive_rope},
              {"swiglu", drive_swiglu},       {"add_frames", drive_add_frames},
              {"attention", drive_attention}, {"compressor_attention", drive_compressor_attention}};

}  // namespace

int main(int count, char** arguments) {
  for (const auto& [name, drive] : DRIVES) {
    if (count > 1 && std::string(name) != arguments[1]) continue;
    for (const int dtype : {FLOAT32, FLOAT16, BFLOAT16}) drive(dtype);
    printf("%s\n", name);
  }
}
