// Draws problems, and has the tiled kernels solve them as the plain ones do.
//
//   driver CASES [SEED]
//
//   driver break RULE
//
// For the sanitizers: memory of exactly the size that is asked for, in all layouts and types.
// Prints what differs, if anything does.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "device.h"
#include "launch.h"

using namespace lslpn;
using namespace lslpn::cuda;

namespace {

std::mt19937 generator;

int draw(int low, int high) {
  return std::uniform_int_distribution<int>(low, high)(generator);
}
float normal() {
  return std::normal_distribution<float>()(generator);
}

using Bytes = std::vector<char>;

std::int64_t size_of(DType dtype) {
  return dtype == DType::float32 ? 4 : dtype == DType::float64 ? 8 : 2;
}

float get(const Bytes& bytes, DType dtype, std::int64_t i) {
  const char* at = bytes.data() + i * size_of(dtype);
  if (dtype == DType::float32) {
    float value;
    std::memcpy(&value, at, sizeof value);
    return value;
  }
  std::uint16_t bits;
  std::memcpy(&bits, at, sizeof bits);
  return dtype == DType::float16 ? widen(Half{bits}) : widen(BFloat16{bits});
}

void set(Bytes& bytes, DType dtype, std::int64_t i, float value) {
  char* at = bytes.data() + i * size_of(dtype);
  if (dtype == DType::float32) {
    std::memcpy(at, &value, sizeof value);
  } else if (dtype == DType::float16) {
    Half half;
    narrow(value, half);
    std::memcpy(at, &half.bits, 2);
  } else {
    BFloat16 half;
    narrow(value, half);
    std::memcpy(at, &half.bits, 2);
  }
}

Bytes floats(std::int64_t count) {
  return Bytes(count * 4, '\xff');
}  // NaN

Bytes normals(std::int64_t count) {
  Bytes bytes(count * 4);
  for (std::int64_t i = 0; i < count; ++i) set(bytes, DType::float32, i, normal());
  return bytes;
}

Axis draw_axis() {
  Axis a{};
  a.cells = draw(1, 14);
  a.pixels = draw(0, 3) ? draw(1, 60) : a.cells;
  a.window = draw(1, a.pixels);
  if (draw(0, 1)) a.window = std::max(1, a.pixels / draw(1, 8));
  a.step = std::max(1, a.window / draw(1, 4));
  a.windows = (a.pixels - a.window + a.step - 1) / a.step + 1;
  return a;
}

// Some layout, with memory to go with it.
Features draw_features(const Axis& y, const Axis& x, Bytes& bytes, DType dtype) {
  Features f;
  f.dtype = dtype;
  f.B = draw(1, 2);
  f.N = draw(1, 2);
  f.D = draw(0, 2) ? draw(2, 40) : 8 * draw(1, 10);
  f.h = y.cells;
  f.w = x.cells;
  const std::int64_t size[5] = {f.B, f.N, f.D, f.h, f.w};
  const int orders[3][5] = {{0, 1, 2, 3, 4}, {0, 1, 3, 4, 2}, {1, 4, 0, 2, 3}};
  const int* order = orders[draw(0, 2)];
  const int gap = draw(0, 3) == 0;  // between neighbours of the slowest but one
  std::int64_t stride = 1;
  for (int i = 4; i >= 0; --i) {
    f.stride[order[i]] = stride;
    stride = stride * size[order[i]] + (i == 1 ? gap : 0);
  }
  bytes.assign(stride * size_of(dtype), '\0');
  // With few channels signed features cancel to next to nothing, and single precision with them.
  for (std::int64_t i = 0; i < stride; ++i) {
    const float value = normal();
    set(bytes, dtype, i, f.D < 8 ? 0.1f + std::abs(value) : value);
  }
  f.data = bytes.data();
  return f;
}

int failures = 0;

void compare(const char* what, int index, const Bytes& tiled, const Bytes& plain, DType dtype,
             double tolerance) {
  double difference = 0, norm = 0;
  const std::int64_t count = static_cast<std::int64_t>(plain.size()) / size_of(dtype);
  for (std::int64_t i = 0; i < count; ++i) {
    const double a = get(tiled, dtype, i), b = get(plain, dtype, i);
    difference += (a - b) * (a - b);
    norm += b * b;
  }
  if (std::sqrt(difference) <= tolerance * (std::sqrt(norm) + 1e-3)) return;  // not for NaN
  std::printf("case %d: %s differs by %g of %g\n", index, what, std::sqrt(difference),
              std::sqrt(norm));
  ++failures;
}

void require(int index, const std::string& error) {
  if (error.empty()) return;
  std::printf("case %d: %s\n", index, error.c_str());
  ++failures;
}

// Whether the tiled kernels had anything to do.
bool run_case(int index) {
  const Axis y = draw_axis(), x = draw_axis();
  const DType dtypes[3] = {DType::float32, DType::float16, DType::bfloat16};
  const DType dtype = dtypes[draw(0, 2)];
  const double half = dtype == DType::float32 ? 2e-5 : dtype == DType::float16 ? 1e-3 : 8e-3;
  Bytes data, gradient[3];
  const Features f = draw_features(y, x, data, dtype);
  const std::int64_t C = draw(1, 5), windows = y.windows * static_cast<std::int64_t>(x.windows);
  const std::int64_t pixels = y.pixels * static_cast<std::int64_t>(x.pixels);
  bool tiled = false;
  const auto workspace = [](std::int64_t bytes) { return Bytes(bytes, '\xff'); };

  Pool pool;
  pool.features = f;
  pool.y = y;
  pool.x = x;
  pool.masks.C = C;
  if (C > 1 && draw(0, 1)) pool.masks.kind = MaskKind::foreground;
  const std::int64_t stored = pool.masks.kind == MaskKind::foreground ? C - 1 : C;
  Bytes masks(f.B * f.N * stored * pixels);
  if (draw(0, 1)) {
    for (char& m : masks) m = static_cast<char>(draw(0, 2) == 0);
    pool.masks.dtype = DType::uint8;
  } else {
    masks = normals(static_cast<std::int64_t>(masks.size()));
    pool.masks.dtype = DType::float32;
    for (std::int64_t i = 0; i < static_cast<std::int64_t>(masks.size()) / 4; ++i) {
      set(masks, DType::float32, i, std::abs(get(masks, DType::float32, i)));
    }
  }
  pool.masks.data = masks.data();
  if (pool_is_tiled(pool)) {
    tiled = true;
    Bytes prototypes[3], factor[3];
    for (int run = 0; run < 3; ++run) {  // twice tiled, then plain
      const bool plain = run == 2;
      Bytes memory = workspace(pool_workspace(pool, false, plain));
      prototypes[run] = floats(f.B * C * windows * f.D);
      factor[run] = floats(f.B * f.N * C * windows);
      pool.prototypes = prototypes[run].data();
      pool.factor = factor[run].data();
      pool.workspace = memory.data();
      require(index, pool_forward(pool, nullptr, plain));
    }
    compare("prototypes", index, prototypes[0], prototypes[2], DType::float32, 2e-5);
    compare("factor", index, factor[0], factor[2], DType::float32, 2e-5);
    if (prototypes[0] != prototypes[1]) require(index, "prototypes change from run to run");
    Bytes grad = normals(f.B * C * windows * f.D);
    pool.prototypes = grad.data();
    pool.factor = factor[2].data();
    for (int run = 0; run < 3; ++run) {
      const bool plain = run == 2;
      Bytes memory = workspace(pool_workspace(pool, true, plain));
      gradient[run].assign(data.size(), '\0');
      pool.features.data = gradient[run].data();
      pool.workspace = memory.data();
      require(index, pool_backward(pool, nullptr, plain));
    }
    compare("gradient of pooled features", index, gradient[0], gradient[2], dtype, half);
    if (gradient[0] != gradient[1]) require(index, "gradients change from run to run");
  }

  Match match;
  match.features = f;
  match.y = y;
  match.x = x;
  match.C = C;
  match.mean = draw(0, 3) == 0;
  int overlap_x = 1, overlap_y = 1;
  for (int i = 0; i < x.pixels; ++i) {
    overlap_x = std::max(overlap_x, x.covering(i).last - x.covering(i).first + 1);
  }
  for (int i = 0; i < y.pixels; ++i) {
    overlap_y = std::max(overlap_y, y.covering(i).last - y.covering(i).first + 1);
  }
  match.overlap_x = overlap_x;
  match.wide_winners = draw(0, 1) || overlap_x * overlap_y > 256;
  Bytes prototypes = normals(f.B * C * windows * f.D);
  if (draw(0, 1)) std::memset(prototypes.data(), 0, 4 * f.D);
  match.prototypes = prototypes.data();
  Bytes scores[2], winners(f.B * f.N * C * pixels * (match.wide_winners ? 4 : 1));
  Bytes gram = floats(f.B * f.N * kGramMaps * f.h * f.w);
  match.gram = gram.data();
  for (int run = 1; run >= 0; --run) {  // the tiled kernels' winners and Gram maps stay
    std::memset(gram.data(), 0xff, gram.size());
    scores[run] = floats(f.B * f.N * C * pixels);
    match.scores = scores[run].data();
    match.winners = match.mean ? nullptr : winners.data();
    require(index, match_forward(match, nullptr, run == 1));
  }
  compare("scores", index, scores[0], scores[1], DType::float32, 2e-5);
  match.scores = scores[1].data();
  Bytes grad = normals(f.B * f.N * C * pixels), grad_prototypes[3];
  match.grad = grad.data();
  match.grad_features = f;
  match.grad_features.data = gradient[0].data();
  if (match_is_tiled(match)) {
    tiled = true;
    for (int run = 0; run < 3; ++run) {
      const bool plain = run == 2;
      gradient[run].assign(data.size(), '\0');
      match.grad_features.data = gradient[run].data();
      grad_prototypes[run] = floats(f.B * C * windows * f.D);
      match.grad_prototypes = grad_prototypes[run].data();
      Bytes memory = workspace(match_workspace(match, true, plain));
      match.workspace = memory.data();
      require(index, match_backward(match, nullptr, plain));
    }
    compare("gradient of matched features", index, gradient[0], gradient[2], dtype, half);
    compare("gradient of prototypes", index, grad_prototypes[0], grad_prototypes[2], DType::float32,
            1e-4);
    if (gradient[0] != gradient[1]) require(index, "gradients change from run to run");
  }
  return tiled;
}

// Kernels that break a rule, to see that the emulation tells.
struct Nothing {
  int* memory;
};
void race(const Nothing) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  shared[thread_index()] = thread_index();
  warp_barrier();  // where all of the block should wait
  shared[thread_index() ^ 32] += 1;
}
void blocks_race(const Nothing p) {
  p.memory[thread_index() % 2] = thread_index();
}
void overflow(const Nothing) {
  if (thread_index() == 63) shared_memory()[64 * 4 + 8] = 1;
}
void stuck(const Nothing) {
  if (thread_index() < 32) block_barrier();
}
void early(const Nothing p) {
  copy_async(shared_memory() + 16 * thread_index(), p.memory);
  block_barrier();  // in place of waiting for the copy
  if (shared_memory()[16 * thread_index()] != '\0') p.memory[4] = 1;
  copy_wait();
}

int break_rule(const char* rule) {
  alignas(16) int memory[8] = {};
  const Nothing p{memory};
  const auto run = [&](const char* name, void (*kernel)(Nothing), std::size_t shared) {
    if (std::strcmp(rule, name)) return;
    const std::string error = launch(kernel, 2, 1, 64, shared, nullptr, p);
    std::printf("%s%s\n", error.c_str(), memory[4] ? "read before it arrived" : "");
  };
  run("race", race, 64 * 4);
  run("blocks_race", blocks_race, 0);
  run("overflow", overflow, 64 * 4);
  run("stuck", stuck, 0);
  run("early", early, 64 * 16);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && !std::strcmp(argv[1], "break")) return break_rule(argc > 2 ? argv[2] : "");
  const int cases = argc > 1 ? std::atoi(argv[1]) : 10;
  const int seed = argc > 2 ? std::atoi(argv[2]) : 0;
  int tiled = 0;
  for (int i = 0; i < cases; ++i) {
    generator.seed(static_cast<unsigned>(1000003 * seed + i));
    tiled += run_case(i) ? 1 : 0;
  }
  std::printf("%d cases, %d of them tiled, %d failures\n", cases, tiled, failures);
  return failures > 0 || 2 * tiled < cases;
}
