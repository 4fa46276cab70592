// The runtime of cuda_cpu.h. It is compiled without sanitizers even where the kernels are compiled with them: its own
// bookkeeping is none of theirs. -DLMF_TSAN tells ThreadSanitizer about the fibers, with an order between two threads
// only where CUDA promises one (__syncthreads, __syncwarp, the start and the end of a grid), so that it reports races
// of the kernels; -DLMF_ASAN tells AddressSanitizer about their stacks.
#include "../common/platform.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <utility>
#include <vector>

#ifdef LMF_TSAN
extern "C" {
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void* __tsan_get_current_fiber();
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void __tsan_read1(void* address);
void __tsan_write1(void* address);
}
#endif
#ifdef LMF_ASAN
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
}
#endif

namespace lmf {
namespace cpu {
namespace {

constexpr int WARP_SIZE = 32;
constexpr size_t STACK = 128 << 10, SLOT = 64, UNASKED_LIMIT = 48 << 10, SHARED_LIMIT = 227 << 10;
constexpr int MOST_COPIES = 256, MOST_ARRAYS = 32;
// ThreadSanitizer has about 8000 fibers; a grid that needs fewer keeps them all, so that races between blocks are seen.
constexpr size_t MOST_KEPT_FIBERS = 7000;

enum class State { READY, AT_WARP, AT_BLOCK, DONE };

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  bool copy;
  int group;
};

struct Fiber {
  void* resume[5];
  ucontext_t start;
  bool started;
  unsigned char* stack;
  State state;
  const char* site;
  dim3 index;
  int linear, slot, barriers;
  alignas(16) unsigned char slots[2][SLOT];
  Copy copies[MOST_COPIES];
  int copying, group;
  void* tsan;
#ifdef LMF_ASAN
  void* fake_stack;
#endif
};

std::vector<Fiber> fibers;
Fiber* current;
void* scheduler[5];
dim3 block_now, grid, block;
const std::function<void()>* body;
std::mt19937 draw;
unsigned char* dynamic_memory;
size_t dynamic_bytes, static_bytes;
struct {
  const char* key;
  unsigned char* memory;
} arrays[MOST_ARRAYS];
int array_count;

[[noreturn]] void die(const char* what) {
  fprintf(stderr, "cuda_cpu: %s (block %u,%u,%u, thread %d, at %s)\n", what, block_now.x, block_now.y, block_now.z,
          current ? current->linear : -1, current && current->site ? current->site : "no barrier yet");
  abort();
}

// Loops over volatile bytes: calls to memcpy and memset would be seen by the sanitizers even from here.
void raw_copy(void* to, const void* from, size_t bytes) {
  for (size_t i = 0; i < bytes; i++)
    static_cast<volatile unsigned char*>(to)[i] = static_cast<const unsigned char*>(from)[i];
}

void raw_fill(void* to, unsigned char value, size_t bytes) {
  for (size_t i = 0; i < bytes; i++) static_cast<volatile unsigned char*>(to)[i] = value;
}

#ifdef LMF_TSAN
char block_order[2], warp_order[2][SHARED_LIMIT / WARP_SIZE], end_order;
void* main_fiber;
std::vector<void*> kept_fibers;
bool keep_fibers;
unsigned char* arena;

void note_read(const void* from, size_t bytes) {
  for (size_t i = 0; i < bytes; i++) __tsan_read1(static_cast<unsigned char*>(const_cast<void*>(from)) + i);
}
void note_write(void* to, size_t bytes) {
  for (size_t i = 0; i < bytes; i++) __tsan_write1(static_cast<unsigned char*>(to) + i);
}
#else
void note_read(const void*, size_t) {}
void note_write(void*, size_t) {}
#endif

// Addresses are checked by the runtime where no sanitizer sees the access (the asynchronous ones): one byte read from
// an instrumented place would do, but a read of the whole by ASan's own function says more.
#ifdef LMF_ASAN
extern "C" void __asan_loadN(void* address, size_t bytes);
extern "C" void __asan_storeN(void* address, size_t bytes);
void check_read(const void* from, size_t bytes) { __asan_loadN(const_cast<void*>(from), bytes); }
void check_write(void* to, size_t bytes) { __asan_storeN(to, bytes); }
#else
void check_read(const void*, size_t) {}
void check_write(void*, size_t) {}
#endif

// GCC's own setjmp keeps no signal mask, so a change of fibers costs no system call; and no sanitizer intercepts it.
[[noreturn]] __attribute__((noinline)) void jump(void** to) { __builtin_longjmp(to, 1); }

void enter();

__attribute__((noinline)) void run_fiber(Fiber& fiber) {
  current = &fiber;
#ifdef LMF_TSAN
  __tsan_switch_to_fiber(fiber.tsan, 1);
#endif
#ifdef LMF_ASAN
  void* fake_stack;
  __sanitizer_start_switch_fiber(&fake_stack, fiber.stack, STACK);
#endif
  if (__builtin_setjmp(scheduler) == 0) {
    if (fiber.started) jump(fiber.resume);
    fiber.started = true;
    setcontext(&fiber.start);
  }
#ifdef LMF_ASAN
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

__attribute__((noinline)) void suspend(State state, const char* site) {
  Fiber& fiber = *current;
  fiber.state = state;
  fiber.site = site;
#ifdef LMF_TSAN
  __tsan_switch_to_fiber(main_fiber, 1);
#endif
#ifdef LMF_ASAN
  __sanitizer_start_switch_fiber(state == State::DONE ? nullptr : &fiber.fake_stack, nullptr, 0);
#endif
  if (__builtin_setjmp(fiber.resume) == 0) jump(scheduler);
#ifdef LMF_ASAN
  __sanitizer_finish_switch_fiber(current->fake_stack, nullptr, nullptr);
#endif
}

void enter() {
#ifdef LMF_ASAN
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  (*body)();
  if (current->copying != 0) die("a thread ended without waiting for its asynchronous copies");
#ifdef LMF_TSAN
  __tsan_release(&end_order);
#endif
  suspend(State::DONE, "the end");
}

void sync(State state, const char* site) {
#ifdef LMF_TSAN
  // Two objects by turns: a thread that is already at the next barrier must not be ordered before one still leaving
  // this.
  char* order = state == State::AT_BLOCK ? &block_order[current->barriers & 1]
                                         : &warp_order[current->barriers & 1][current->linear / WARP_SIZE];
  if (state == State::AT_BLOCK) current->barriers++;
  __tsan_release(order);
#endif
  suspend(state, site);
#ifdef LMF_TSAN
  __tsan_acquire(order);
#endif
}

void prepare(Fiber& fiber) {
#ifdef LMF_TSAN
  // Fresh pages have no history: one block's stacks must not race with those of the block before.
  mmap(fiber.stack, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
#endif
  fiber.started = false;
  fiber.state = State::READY;
  fiber.site = nullptr;
  fiber.slot = fiber.barriers = fiber.copying = fiber.group = 0;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack;
  fiber.start.uc_stack.ss_size = STACK;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, enter, 0);
}

// Lets one warp run until all its lanes wait, and on if they wait for one another alone. The lanes take turns in an
// order of their own. Partial warps and masks are not emulated: all lanes must wait at one place, or have ended.
void run_warp(int warp) {
  Fiber* lanes = &fibers[warp * WARP_SIZE];
  const unsigned start = draw(), step = draw() & 1 ? 1 : WARP_SIZE - 1;
  for (unsigned i = 0; i < WARP_SIZE; i++) run_fiber(lanes[(start + i * step) % WARP_SIZE]);
  for (int i = 1; i < WARP_SIZE; i++) {
    current = &lanes[i];
    if (lanes[i].state != lanes[0].state || strcmp(lanes[i].site, lanes[0].site) != 0)
      die("the lanes of a warp wait in different places");
  }
  if (lanes[0].state == State::AT_WARP)
    for (int i = 0; i < WARP_SIZE; i++) lanes[i].state = State::READY;
}

void run_block() {
  for (Fiber& fiber : fibers) prepare(fiber);
#ifdef LMF_TSAN
  std::vector<int> order(fibers.size());
  for (size_t i = 0; i < order.size(); i++) order[i] = static_cast<int>(i);
  std::shuffle(order.begin(), order.end(), draw);
  for (int i : order) fibers[i].tsan = __tsan_create_fiber(0);
#endif
  const int warps = static_cast<int>(fibers.size()) / WARP_SIZE;
  std::vector<unsigned> priority(warps);
  auto redraw = [&] { std::generate(priority.begin(), priority.end(), std::ref(draw)); };
  redraw();
  for (;;) {
    int best = -1, done = 0;
    for (int warp = 0; warp < warps; warp++) {
      const State state = fibers[warp * WARP_SIZE].state;
      done += state == State::DONE;
      if (state == State::READY && (best < 0 || priority[warp] > priority[best])) best = warp;
    }
    if (done == warps) break;
    if (best >= 0) {
      run_warp(best);
      // Mostly one warp runs as far as it can, which shows most races; now and then another is let in.
      if (draw() % 16 == 0) redraw();
      continue;
    }
    for (Fiber& fiber : fibers) {
      current = &fiber;
      if (fiber.state == State::DONE) die("a thread has ended while others wait at __syncthreads");
      if (strcmp(fiber.site, fibers[0].site) != 0) die("threads wait at different __syncthreads");
      fiber.state = State::READY;
    }
    redraw();
  }
#ifdef LMF_TSAN
  for (Fiber& fiber : fibers) {
    if (keep_fibers)
      kept_fibers.push_back(fiber.tsan);
    else
      __tsan_destroy_fiber(fiber.tsan);
  }
#endif
}

unsigned char* shared_block(size_t bytes) {
#ifdef LMF_TSAN
  // Out of the arena, which the main fiber has mapped: an allocation here would count as a write of this thread.
  unsigned char* memory = arena + static_bytes + dynamic_bytes;
  memory += -reinterpret_cast<uintptr_t>(memory) & 127;
#else
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, bytes) != 0) die("out of memory");
#endif
  raw_fill(memory, 0xff, bytes);
  return static_cast<unsigned char*>(memory);
}

}  // namespace

const dim3& thread_index() { return current->index; }
const dim3& block_index() { return block_now; }
const dim3& block_size() { return block; }
const dim3& grid_size() { return grid; }
int lane() { return current->linear % WARP_SIZE; }
unsigned char* dynamic_shared() { return dynamic_memory; }

void* static_shared(const char* key, size_t bytes) {
  for (int i = 0; i < array_count; i++)
    if (arrays[i].key == key) return arrays[i].memory;
  if (array_count == MOST_ARRAYS) die("too many static shared arrays");
  unsigned char* memory = shared_block(bytes);
  static_bytes += (bytes + 255) / 128 * 128;
  if (static_bytes > UNASKED_LIMIT || static_bytes + dynamic_bytes > SHARED_LIMIT) die("too much shared memory");
  if (dynamic_bytes <= SHARED_WITHOUT_ASKING && static_bytes + dynamic_bytes > UNASKED_LIMIT)
    die("shared memory that the launch did not ask for");
  arrays[array_count++] = {key, memory};
  return memory;
}

void sync_block(const char* site) { sync(State::AT_BLOCK, site); }
void sync_warp(const char* site) { sync(State::AT_WARP, site); }

void exchange(const char* site, const void* data, size_t bytes) {
  if (bytes > SLOT) die("too much data in one exchange");
  // Two slots by turns, so that a lane that has run on to the next exchange leaves this one's data for the others.
  current->slot ^= 1;
  raw_copy(current->slots[current->slot], data, bytes);
  suspend(State::AT_WARP, site);
}

const void* given(int lane) { return fibers[current->linear / WARP_SIZE * WARP_SIZE + lane].slots[current->slot]; }

float bfloat16_value(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  __builtin_memcpy(&value, &wide, sizeof value);
  return value;
}

uint16_t bfloat16_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  if (value != value) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

uint16_t half_bits(float value) {
  const _Float16 half = static_cast<_Float16>(value);
  uint16_t bits;
  __builtin_memcpy(&bits, &half, sizeof bits);
  return bits;
}

float half_value(uint16_t bits) {
  // A table: without F16C a conversion is a function call, and mma does many.
  static const std::vector<float> values = [] {
    std::vector<float> all(1 << 16);
    for (unsigned i = 0; i < all.size(); i++) {
      const uint16_t bits = static_cast<uint16_t>(i);
      _Float16 half;
      __builtin_memcpy(&half, &bits, sizeof half);
      all[i] = static_cast<float>(half);
    }
    return all;
  }();
  return values[bits];
}

void mma(float (*value)(uint16_t), float* d, const unsigned* a, unsigned b0, unsigned b1) {
  const unsigned mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  exchange("mma.m16n8k16", mine, sizeof mine);
  const int g = lane() / 4, t = lane() % 4;
  // Of lane 4 * group + quad: a pair of 16-bit elements of word `word`.
  auto pair = [&](int group, int quad, int word, float (&to)[2]) {
    const unsigned bits = static_cast<const unsigned*>(given(group * 4 + quad))[word];
    to[0] = value(static_cast<uint16_t>(bits));
    to[1] = value(static_cast<uint16_t>(bits >> 16));
  };
  for (int quad = 0; quad < 4; quad++) {
    for (int half = 0; half < 2; half++) {  // columns of a, and rows of b: 2 * quad + 8 * half and the next
      float upper[2], lower[2];
      pair(g, quad, 2 * half, upper);
      pair(g, quad, 2 * half + 1, lower);
      for (int column = 0; column < 2; column++) {
        float b[2];
        pair(2 * t + column, quad, 4 + half, b);
        d[column] += upper[0] * b[0] + upper[1] * b[1];
        d[2 + column] += lower[0] * b[0] + lower[1] * b[1];
      }
    }
  }
}

void load_matrices(unsigned* to, int count, bool transposed, const void* row) {
  exchange(count == 2 ? "ldmatrix.x2" : "ldmatrix.x4", &row, sizeof row);
  const int g = lane() / 4, t = lane() % 4;
  for (int matrix = 0; matrix < count; matrix++) {
    uint16_t elements[2];
    for (int e = 0; e < 2; e++) {
      const unsigned char* from = *static_cast<unsigned char* const*>(given(matrix * 8 + (transposed ? 2 * t + e : g)));
      if (reinterpret_cast<uintptr_t>(from) % 16 != 0) die("ldmatrix of an address that is not a multiple of 16");
      from += 2 * (transposed ? g : 2 * t + e);
      check_read(from, 2);
      note_read(from, 2);
      raw_copy(&elements[e], from, 2);
    }
    to[matrix] = elements[0] | static_cast<unsigned>(elements[1]) << 16;
  }
}

void copy_async(void* to, const void* from, bool copy) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || (copy && reinterpret_cast<uintptr_t>(from) % 16 != 0))
    die("cp.async of an address that is not a multiple of 16");
  if (current->copying == MOST_COPIES) die("too many asynchronous copies under way");
  check_write(to, 16);
  note_write(to, 16);
  if (copy) {
    check_read(from, 16);
    note_read(from, 16);
  }
  raw_fill(to, 0xff, 16);
  current->copies[current->copying++] = {static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), copy,
                                         current->group};
}

void commit_copies() { current->group++; }

void wait_copies(int keep) {
  int left = 0;
  for (int i = 0; i < current->copying; i++) {
    const Copy copy = current->copies[i];
    if (copy.group >= current->group - keep) {
      current->copies[left++] = copy;
      continue;
    }
    note_write(copy.to, 16);
    if (copy.copy) {
      note_read(copy.from, 16);
      raw_copy(copy.to, copy.from, 16);
    } else {
      raw_fill(copy.to, 0, 16);
    }
  }
  current->copying = left;
}

int run(dim3 grid_wanted, dim3 block_wanted, size_t shared_bytes, const std::function<void()>& thread) {
  grid = grid_wanted;
  block = block_wanted;
  const size_t threads = static_cast<size_t>(block.x) * block.y * block.z,
               blocks = static_cast<size_t>(grid.x) * grid.y * grid.z;
  if (blocks == 0 || grid.y > 65535 || grid.z > 65535 || threads == 0 || threads > 1024 || shared_bytes > SHARED_LIMIT)
    return 1;
  if (threads % WARP_SIZE != 0) die("blocks must be whole warps here");
  const char* seed = getenv("LMF_SEED");
  draw.seed(seed ? static_cast<unsigned>(atoi(seed)) : 0);
  body = &thread;
  if (fibers.size() != threads) {
    for (Fiber& fiber : fibers) munmap(fiber.stack, STACK);
    fibers = std::vector<Fiber>(threads);
    for (Fiber& fiber : fibers) {
      void* stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (stack == MAP_FAILED) die("no memory for stacks");
      fiber.stack = static_cast<unsigned char*>(stack);
    }
  }
  for (unsigned i = 0; i < threads; i++) {
    fibers[i].linear = static_cast<int>(i);
    fibers[i].index = dim3(i % block.x, i / block.x % block.y, i / block.x / block.y);
  }
  std::vector<size_t> order(blocks);
  for (size_t i = 0; i < blocks; i++) order[i] = i;
  std::shuffle(order.begin(), order.end(), draw);
#ifdef LMF_TSAN
  main_fiber = __tsan_get_current_fiber();
  keep_fibers = blocks * threads <= MOST_KEPT_FIBERS;
#endif
  for (size_t i : order) {
    block_now = dim3(static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                     static_cast<unsigned>(i / grid.x / grid.y));
    current = nullptr;
    static_bytes = dynamic_bytes = 0;
    array_count = 0;
#ifdef LMF_TSAN
    arena = static_cast<unsigned char*>(mmap(arena, 2 * SHARED_LIMIT, PROT_READ | PROT_WRITE,
                                             MAP_PRIVATE | MAP_ANONYMOUS | (arena ? MAP_FIXED : 0), -1, 0));
#endif
    dynamic_memory = shared_bytes ? shared_block(shared_bytes) : nullptr;
    dynamic_bytes = (shared_bytes + 255) / 128 * 128;
    run_block();
#ifndef LMF_TSAN
    free(dynamic_memory);
    for (int a = 0; a < array_count; a++) free(arrays[a].memory);
#endif
  }
#ifdef LMF_TSAN
  __tsan_acquire(&end_order);
  for (void* fiber : kept_fibers) __tsan_destroy_fiber(fiber);
  kept_fibers.clear();
#endif
  current = nullptr;
  return 0;
}

}  // namespace cpu
}  // namespace lmf
