// Draws problems, and has the CPU kernels solve them in every instruction set of this processor.
//
//   driver CASES [SEED]       problems of all kinds; prints what is wrong, and exits with 1
//   driver overrun            writes beyond the end of a tensor: AddressSanitizer must see it
//   driver misaligned         writes a float to an odd address: UndefinedBehaviorSanitizer must
//   driver race               two calls write the same tensor: ThreadSanitizer must
//
// Memory is of exactly the size that is asked for, and full of NaN until something is written.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>

#include "cpu/dispatch.h"
#include "cpu/geometry.h"
#include "oracle.h"
#if defined(LSLPN_OWN_THREADS)
#include "threads.h"
#endif

namespace {

using lslpn::Axis;
using lslpn::BFloat16;
using lslpn::DType;
using lslpn::Features;
using lslpn::Half;
using oracle::Numbers;

std::mt19937 generator;

int draw(int low, int high) {
  return std::uniform_int_distribution<int>(low, high)(generator);
}
bool one_in(int n) {
  return draw(1, n) == 1;
}
double normal() {
  return std::normal_distribution<double>()(generator);
}

Numbers normals(std::int64_t count) {
  Numbers out(count);
  for (double& value : out) value = normal();
  return out;
}

// ---- memory -----------------------------------------------------------------------------------

std::int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::float64:
      return 8;
    case DType::float32:
      return 4;
    default:
      return 2;
  }
}

double get(const char* at, DType dtype) {
  if (dtype == DType::float64) {
    double value;
    std::memcpy(&value, at, sizeof value);
    return value;
  }
  if (dtype == DType::float32) {
    float value;
    std::memcpy(&value, at, sizeof value);
    return value;
  }
  std::uint16_t bits;
  std::memcpy(&bits, at, sizeof bits);
  const int digits = dtype == DType::float16 ? 10 : 7, bias = dtype == DType::float16 ? 15 : 127;
  const int exponent = (bits & 0x7fff) >> digits, rest = bits & ((1 << digits) - 1);
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == 2 * bias + 1) {
    return rest ? std::numeric_limits<double>::quiet_NaN()
                : sign * std::numeric_limits<double>::infinity();
  }
  const int whole = exponent ? rest + (1 << digits) : rest;
  return sign * std::ldexp(whole, (exponent ? exponent : 1) - bias - digits);
}

void set(char* at, DType dtype, double value) {
  if (dtype == DType::float64) {
    std::memcpy(at, &value, 8);
  } else if (dtype == DType::float32) {
    const float single = static_cast<float>(value);
    std::memcpy(at, &single, 4);
  } else if (dtype == DType::float16) {
    Half half;
    lslpn::narrow(static_cast<float>(value), half);
    std::memcpy(at, &half.bits, 2);
  } else {
    BFloat16 half;
    lslpn::narrow(static_cast<float>(value), half);
    std::memcpy(at, &half.bits, 2);
  }
}

// `before` elements of T are left out at the front, so that not all memory is aligned.
template <class T>
struct Buffer {
  std::unique_ptr<char, void (*)(void*)> memory{nullptr, std::free};
  T* data = nullptr;
  std::int64_t size = 0;

  Buffer() = default;
  explicit Buffer(std::int64_t count, int before = draw(0, 1)) : size(count) {
    const std::size_t bytes = (count + before) * sizeof(T);
    memory.reset(static_cast<char*>(std::malloc(bytes)));
    std::memset(memory.get(), 0xff, bytes);
    data = reinterpret_cast<T*>(memory.get()) + before;
  }
  explicit Buffer(const Numbers& values) : Buffer(static_cast<std::int64_t>(values.size())) {
    for (std::int64_t i = 0; i < size; ++i) data[i] = static_cast<T>(values[i]);
  }
  Numbers numbers() const { return Numbers(data, data + size); }
};

template <class T>
bool same(const Buffer<T>& a, const Buffer<T>& b) {
  return a.size == b.size && std::memcmp(a.data, b.data, a.size * sizeof(T)) == 0;
}

// Features [B, N, D, h, w] in some layout. Elements are `char`s here.
struct FeatureBuffer {
  Buffer<char> bytes;
  Features view{};

  std::int64_t at(std::int64_t index) const {  // of an element, counted row by row
    const std::int64_t size[5] = {view.B, view.N, view.D, view.h, view.w};
    std::int64_t offset = 0;
    for (int i = 4; i >= 0; --i) {
      offset += index % size[i] * view.stride[i];
      index /= size[i];
    }
    return offset * size_of(view.dtype);
  }
  std::int64_t count() const { return view.B * view.N * view.D * view.h * view.w; }
  void set_all(const Numbers& values) {
    for (std::int64_t i = 0; i < count(); ++i) set(view.data + at(i), view.dtype, values[i]);
  }
  Numbers numbers() const {
    Numbers out(count());
    for (std::int64_t i = 0; i < count(); ++i) out[i] = get(view.data + at(i), view.dtype);
    return out;
  }
  // Whether all memory between the elements is as it was.
  bool gaps_untouched() const {
    std::vector<bool> mine(bytes.size, false);
    const std::int64_t size = size_of(view.dtype);
    for (std::int64_t i = 0; i < count(); ++i) {
      const std::int64_t start = view.data - bytes.data + at(i);
      for (std::int64_t k = 0; k < size; ++k) mine[start + k] = true;
    }
    for (std::int64_t i = 0; i < bytes.size; ++i) {
      if (!mine[i] && bytes.data[i] != '\xff') return false;
    }
    return true;
  }
};

// How features lie in memory.
struct Layout {
  int order[5] = {0, 1, 2, 3, 4};  // the dimensions, the slowest first
  int gap[5] = {};                 // elements between neighbours along a dimension
  bool expanded[5] = {};           // of stride 0
  int before = 0;                  // elements in front

  static Layout any(bool may_expand) {
    Layout out;
    const int kind = draw(0, 3);
    if (kind == 1) {
      const int channels_last[5] = {0, 1, 3, 4, 2};
      std::copy(channels_last, channels_last + 5, out.order);
    } else if (kind >= 2) {
      std::shuffle(out.order, out.order + 5, generator);
    }
    if (kind == 3 || one_in(4)) {
      for (int& gap : out.gap) gap = one_in(3) ? draw(1, 3) : 0;
    }
    if (may_expand && one_in(6)) out.expanded[draw(0, 4)] = true;
    out.before = one_in(3) ? draw(1, 3) : 0;
    return out;
  }
};

FeatureBuffer lay_out(const Layout& layout, DType dtype, const std::int64_t (&size)[5]) {
  FeatureBuffer out;
  Features& f = out.view;
  f.dtype = dtype;
  f.B = size[0];
  f.N = size[1];
  f.D = size[2];
  f.h = size[3];
  f.w = size[4];
  std::int64_t stride = 1, reach = 1;
  for (int k = 4; k >= 0; --k) {
    const int i = layout.order[k];
    if (layout.expanded[i]) continue;
    stride += layout.gap[i];
    f.stride[i] = stride;
    reach += (size[i] - 1) * stride;
    stride *= size[i];
  }
  out.bytes = Buffer<char>((reach + layout.before) * size_of(dtype), 0);
  f.data = out.bytes.data + layout.before * size_of(dtype);
  return out;
}

// ---- what is wrong ----------------------------------------------------------------------------

int failures = 0;
std::string where;

void fail(const std::string& what) {
  if (++failures <= 20) std::printf("%s: %s\n", where.c_str(), what.c_str());
}

void require(bool good, const char* what) {
  if (!good) fail(what);
}

// |got - want| <= absolute + relative |want|, of every number. NaN only where it is wanted.
void compare(const char* what, const Numbers& got, const Numbers& want, double absolute,
             double relative = 0) {
  for (std::size_t i = 0; i < want.size(); ++i) {
    if (std::isnan(want[i]) && std::isnan(got[i])) continue;
    if (std::abs(got[i] - want[i]) <= absolute + relative * std::abs(want[i])) continue;
    char text[200];
    std::snprintf(text, sizeof text, "%s[%zu of %zu] is %.9g, should be %.9g (within %.2g)", what,
                  i, want.size(), got[i], want[i], absolute + relative * std::abs(want[i]));
    return fail(text);
  }
  if (got.size() != want.size()) fail(std::string(what) + " has another size");
}

// ---- problems ---------------------------------------------------------------------------------

Axis axis(int pixels, int cells, int window, int step) {
  return {pixels, cells, window, step, (pixels - window + step - 1) / step + 1};
}

Axis any_axis() {
  const int pixels = draw(1, 60), cells = one_in(4) ? pixels : draw(1, 14);
  int window = std::max(1, pixels / draw(1, 8));
  if (one_in(4)) window = draw(1, pixels);
  return axis(pixels, cells, window, std::max(1, window / draw(1, 4)));
}

struct Case {
  const char* name;
  Axis y, x;
  std::int64_t B, N, C, D;
};

// In each of the four dtypes.
const Case kCases[] = {
    {"an eighth, half overlapping", axis(64, 9, 8, 4), axis(64, 9, 8, 4), 1, 2, 2, 40},
    {"as many features as pixels", axis(17, 17, 4, 2), axis(20, 20, 5, 2), 1, 1, 3, 18},
    {"more features than pixels", axis(9, 23, 3, 1), axis(7, 30, 7, 3), 2, 1, 2, 33},
    {"one pixel", axis(1, 1, 1, 1), axis(1, 1, 1, 1), 1, 1, 1, 1},
    {"one pixel, many features", axis(1, 5, 1, 1), axis(1, 7, 1, 1), 1, 2, 2, 17},
    {"one-pixel windows", axis(12, 5, 1, 1), axis(13, 4, 1, 1), 1, 1, 2, 24},
    {"324 windows over a pixel", axis(36, 6, 18, 1), axis(36, 5, 18, 1), 1, 1, 2, 16},
    {"one window", axis(50, 7, 50, 25), axis(41, 6, 41, 20), 2, 1, 2, 32},
    {"many small windows in a column", axis(200, 20, 4, 4), axis(5, 3, 2, 1), 1, 1, 2, 48},
    {"windows of many tiles", axis(90, 3, 90, 45), axis(70, 40, 70, 35), 1, 1, 2, 16},
    {"tiles of many features", axis(40, 60, 40, 20), axis(33, 35, 33, 16), 1, 1, 2, 16},
    {"one feature", axis(30, 1, 8, 4), axis(31, 1, 7, 3), 1, 2, 2, 64},
    {"one row", axis(1, 1, 1, 1), axis(64, 16, 16, 8), 2, 1, 2, 40},
    {"one column", axis(64, 16, 16, 8), axis(1, 1, 1, 1), 1, 2, 2, 40},
    {"many episodes", axis(16, 5, 4, 2), axis(16, 4, 5, 2), 10, 1, 2, 20},
    {"many images", axis(16, 5, 4, 2), axis(12, 4, 5, 2), 1, 18, 2, 20},
    {"many classes", axis(20, 5, 6, 3), axis(20, 6, 5, 2), 1, 1, 20, 20},
};

Case any_case() {
  const std::int64_t D = one_in(4) ? draw(1, 8) : draw(9, 70);
  return {"drawn", any_axis(), any_axis(), draw(1, 2), draw(1, 3), draw(1, 4), D};
}

enum class Values { booleans, bytes, floats };

// Runs a problem in one dtype, accumulated in A.
template <class A>
class Runner {
 public:
  Runner(const Case& c, DType dtype)
      : case_(c),
        dtype_(dtype),
        p_{oracle::Line(c.y), oracle::Line(c.x), c.B, c.N, c.D, c.C},
        geometry_(c.y, c.x),
        exact_(sizeof(A) == 8) {
    rounding_ = dtype == DType::float16 ? 1e-3 : dtype == DType::bfloat16 ? 8e-3 : 0;
    not_finite_ = one_in(8);
    mean_ = one_in(4);
    make_features();
    make_masks();
    make_prototypes();
  }

  void run() {
    const std::string name = where;
    std::vector<std::string> sets = lslpn::instruction_sets();
#if defined(LSLPN_OWN_THREADS)
    // Under ThreadSanitizer one of them: they share all that has to do with threads.
    sets = {sets[draw(0, static_cast<int>(sets.size()) - 1)]};
#endif
    for (const std::string& isa : sets) {
      lslpn::use_instruction_set(isa);
      where = name + ", " + isa;
      pool();
      pool_backward();
      match();
      match_backward();
      loss();
      if (one_in(4)) at_once();
    }
    where = name;
  }

  // One call of the matching, for the sanitizers' own tests.
  lslpn::Match<A> match_into(A* scores, const A* prototypes) const {
    return {tables(), features_.view, prototypes, classes(), false, scores, nullptr, true, 1};
  }
  const Buffer<A>& prototypes() const { return prototypes_; }
  std::int64_t scores_size() const { return case_.B * case_.N * case_.C * p_.pixels(); }

 private:
  static constexpr int kThreads = 4;

  const Case& case_;
  DType dtype_;
  oracle::Problem p_;
  lslpn::Geometry geometry_;
  bool exact_, not_finite_, mean_;
  double rounding_, largest_ = 0;  // of the features' dtype; the largest feature
  FeatureBuffer features_;
  Layout gradient_layout_ = Layout::any(false);
  Numbers up_;
  Values values_;
  lslpn::MaskKind mask_kind_;
  Numbers masks_;
  Buffer<unsigned char> mask_bytes_;
  Buffer<A> mask_floats_;
  Buffer<std::int64_t> mask_labels_;
  double min_pixels_;
  Numbers factor_, pooled_, pool_grad_, unpooled_;
  Buffer<A> factor_in_, pool_grad_in_;
  bool alike_ = false;  // all prototypes of a class are the same
  bool winner_bytes_;
  Buffer<A> prototypes_, scores_in_, match_grad_in_;
  Buffer<unsigned char> winners_in_;
  oracle::Matched matched_;
  oracle::MatchGradients unmatched_;

  const lslpn::Tables<A>& tables() const { return geometry_.tables<A>(); }
  int classes() const { return static_cast<int>(case_.C); }
  double tolerance(double scale) const { return (exact_ ? 1e-11 : 3e-5) * scale + 1e-30; }
  bool bytes() const { return values_ != Values::floats; }
  lslpn::Masks masks() const {
    const lslpn::DType whole = mask_labels_.data ? lslpn::DType::int64 : lslpn::DType::uint8;
    const lslpn::DType floating = exact_ ? lslpn::DType::float64 : lslpn::DType::float32;
    const void* data = mask_labels_.data ? static_cast<const void*>(mask_labels_.data)
                       : bytes()         ? static_cast<const void*>(mask_bytes_.data)
                                         : mask_floats_.data;
    return {data, mask_kind_, bytes() ? whole : floating, case_.C};
  }
  FeatureBuffer gradient() const {
    return lay_out(gradient_layout_, dtype_, {case_.B, case_.N, case_.D, p_.y.cells, p_.x.cells});
  }

  void make_features() {
    const Layout layout = Layout::any(true);
    const std::int64_t size[5] = {case_.B, case_.N, case_.D, p_.y.cells, p_.x.cells};
    features_ = lay_out(layout, dtype_, size);
    // Few channels, or one that is repeated, may cancel to next to nothing if they have signs, and
    // single precision with them.
    Numbers values = normals(features_.count());
    if (case_.D < 16 || features_.view.stride[2] == 0) {
      for (double& value : values) value = 0.1 + std::abs(value);
    }
    if (one_in(4)) {  // some locations are zero
      const std::int64_t cells = p_.cells();
      for (std::int64_t l = 0; l < cells; ++l) {
        if (!one_in(3)) continue;
        for (std::int64_t i = l; i < features_.count(); i += cells) values[i] = one_in(2) ? 0 : -0.;
      }
    }
    if (not_finite_) {
      for (int k = draw(1, 3); k > 0; --k) {
        values[draw(0, static_cast<int>(values.size()) - 1)] =
            std::numeric_limits<double>::quiet_NaN();
      }
    }
    features_.set_all(values);
    const Numbers read = features_.numbers();
    for (const double value : read) {
      if (std::abs(value) > largest_) largest_ = std::abs(value);
    }
    up_ = oracle::upsample(p_, read, case_.B * case_.N);
  }

  void make_masks() {
    values_ = static_cast<Values>(draw(0, 2));
    mask_kind_ = static_cast<lslpn::MaskKind>(draw(0, 2));
    if (mask_kind_ == lslpn::MaskKind::labels) return make_labels();
    const std::int64_t planes = case_.B * case_.N * case_.C, pixels = p_.pixels();
    masks_.resize(planes * pixels);
    for (std::int64_t plane = 0; plane < planes; ++plane) {
      if (one_in(5)) continue;  // empty
      const int much = draw(1, 4);
      for (std::int64_t i = plane * pixels; i < (plane + 1) * pixels; ++i) {
        if (!one_in(much)) continue;
        masks_[i] = values_ == Values::booleans ? 1
                    : values_ == Values::bytes  ? draw(1, 255)
                                                : static_cast<float>(draw(1, 1000)) / 1000.f;
      }
    }
    Numbers stored = masks_;
    if (mask_kind_ == lslpn::MaskKind::foreground && case_.C > 1) {
      // The planes but the first of each image, which is what they leave.
      stored.clear();
      for (std::int64_t image = 0; image < case_.B * case_.N; ++image) {
        double* const first = &masks_[image * case_.C * pixels];
        stored.insert(stored.end(), first + pixels, first + case_.C * pixels);
        for (std::int64_t i = 0; i < pixels; ++i) {
          A held = 0;  // as the kernel adds it: what is left may be next to nothing
          for (std::int64_t c = 1; c < case_.C; ++c) held += static_cast<A>(first[c * pixels + i]);
          first[i] = held > 1 ? 0 : A(1) - held;
        }
      }
    } else {
      mask_kind_ = lslpn::MaskKind::classes;
    }
    if (bytes()) {
      mask_bytes_ = Buffer<unsigned char>(stored);
    } else {
      mask_floats_ = Buffer<A>(stored);
    }
    pool_all();
  }

  // A label map; some labels are no class.
  void make_labels() {
    values_ = Values::bytes;
    const std::int64_t images = case_.B * case_.N, pixels = p_.pixels();
    masks_.resize(images * case_.C * pixels);
    Numbers labels(images * pixels);
    for (std::int64_t i = 0; i < images * pixels; ++i) {
      const int label = one_in(5) ? 255 : draw(0, static_cast<int>(case_.C));
      labels[i] = label;
      if (label >= case_.C) continue;
      masks_[(i / pixels * case_.C + label) * pixels + i % pixels] = 1;
    }
    if (one_in(2)) {
      mask_bytes_ = Buffer<unsigned char>(labels);
    } else {
      mask_labels_ = Buffer<std::int64_t>(labels);
    }
    pool_all();
  }

  void pool_all() {
    min_pixels_ = one_in(2) ? 0 : draw(1, 5) + 0.3705;  // no sum of soft masks is equal
    factor_ = oracle::factors(p_, masks_, min_pixels_);
    factor_in_ = Buffer<A>(factor_);
    pooled_ = oracle::pool(p_, up_, masks_, factor_);
    pool_grad_in_ = Buffer<A>(normals(case_.B * case_.C * p_.windows() * case_.D));
    pool_grad_ = pool_grad_in_.numbers();
    unpooled_ = oracle::pool_backward(p_, masks_, factor_, pool_grad_);
  }

  void make_prototypes() {
    const std::int64_t windows = p_.windows(), D = case_.D;
    Numbers values = normals(case_.B * case_.C * windows * D);
    if (D < 16) {
      for (double& value : values) value = 0.1 + std::abs(value);
    }
    alike_ = !not_finite_ && one_in(6);
    for (std::int64_t v = 0; v < case_.B * case_.C * windows; ++v) {
      if (alike_ && v % windows) {
        std::copy_n(&values[v / windows * windows * D], D, &values[v * D]);
      } else if (!alike_ && one_in(8)) {
        std::fill_n(&values[v * D], D, 0.);
      }
    }
    if (not_finite_ && one_in(2)) {
      values[draw(0, static_cast<int>(values.size()) - 1)] =
          std::numeric_limits<double>::quiet_NaN();
    }
    prototypes_ = Buffer<A>(values);
    matched_ = oracle::match(p_, up_, prototypes_.numbers(), mean_);
    scores_in_ = Buffer<A>(matched_.scores);
    winner_bytes_ = p_.y.overlap * p_.x.overlap <= 256 && !one_in(4);
    winners_in_ = winners();
    for (std::int64_t i = 0; i < scores_size(); ++i) {
      const std::int32_t code = matched_.winner[i];
      if (winner_bytes_) {
        winners_in_.data[i] = static_cast<unsigned char>(code);
      } else {
        std::memcpy(winners_in_.data + 4 * i, &code, 4);
      }
    }
    match_grad_in_ = Buffer<A>(normals(scores_size()));
    unmatched_ = oracle::match_backward(p_, matched_, mean_, match_grad_in_.numbers());
  }
  Buffer<unsigned char> winners() const {
    return Buffer<unsigned char>(scores_size() * (winner_bytes_ ? 1 : 4), 0);
  }

  void pool() const {
    Buffer<A> first[3];
    const lslpn::AxisTables<A>&y = tables().y, &x = tables().x;
    const std::int64_t locations = std::int64_t{y.locations} * x.locations;
    for (int threads = 1; threads <= kThreads; ++threads) {
      Buffer<A> out[3] = {Buffer<A>(static_cast<std::int64_t>(pooled_.size())),
                          Buffer<A>(static_cast<std::int64_t>(factor_.size())),
                          Buffer<A>(case_.B * case_.N * case_.C * locations)};
      lslpn::masked_average_pool(lslpn::Pool<A>{tables(), features_.view, masks(),
                                                static_cast<A>(min_pixels_), out[0].data,
                                                out[1].data, out[2].data, threads});
      if (threads > 1) {
        require(same(out[0], first[0]), "prototypes change with the number of threads");
        require(same(out[1], first[1]), "factors change with the number of threads");
        require(same(out[2], first[2]), "weights change with the number of threads");
        continue;
      }
      compare("factor", out[1].numbers(), factor_, 0, exact_ ? 1e-13 : 1e-6);
      // Whether a NaN of which a mask leaves nothing is read at all is nobody's business.
      if (!not_finite_) compare("prototypes", out[0].numbers(), pooled_, tolerance(largest_));
      pool_backward(out[2].data);
      std::move(out, out + 3, first);
    }
  }

  // With the weights of the forward pass, or without.
  void pool_backward(const A* weights = nullptr) const {
    FeatureBuffer first;
    double scale = 0;
    for (const double value : unpooled_) scale = std::max(scale, std::abs(value));
    for (int threads = 1; threads <= kThreads; ++threads) {
      FeatureBuffer out = gradient();
      lslpn::masked_average_pool(lslpn::PoolBackward<A>{
          tables(), out.view, masks(), factor_in_.data, weights, pool_grad_in_.data, threads});
      if (threads > 1) {
        require(same(out.bytes, first.bytes), "pooled gradients change with the number of threads");
        continue;
      }
      compare("gradient of pooled features", out.numbers(), unpooled_, smallest(scale), rounding_);
      require(out.gaps_untouched(), "pooling writes between the gradient's elements");
      first = std::move(out);
    }
  }
  // What is left of the dtype's precision towards zero counts too.
  double smallest(double scale) const {
    return tolerance(scale) + (dtype_ == DType::float16 ? 6e-8 : 0);
  }

  void match() const {
    Buffer<A> first;
    Buffer<unsigned char> first_winners;
    for (int threads = 1; threads <= kThreads; ++threads) {
      Buffer<A> scores(scores_size());
      Buffer<unsigned char> winner = winners();
      lslpn::Match<A> args{tables(),    features_.view, prototypes_.data, classes(), mean_,
                           scores.data, winner.data,    winner_bytes_,    threads};
      // As it is called for "mean", and where no gradient is wanted.
      if (mean_ || threads == 3) args.winners = nullptr;
      lslpn::cosine_match(args);
      if (threads > 1) {
        require(same(scores, first), "scores change with the number of threads");
        require(!args.winners || same(winner, first_winners),
                "winners change with the number of threads");
        continue;
      }
      compare("scores", scores.numbers(), matched_.scores, tolerance(1));
      if (args.winners && !not_finite_) check_winners(winner);
      first = std::move(scores);
      first_winners = std::move(winner);
    }
  }

  void check_winners(const Buffer<unsigned char>& winners) const {
    for (std::int64_t n = 0; n < case_.B * case_.N; ++n) {
      for (std::int64_t c = 0; c < case_.C; ++c) {
        p_.for_pixels([&](std::int64_t pixel, int row, int column) {
          const std::int64_t at = (n * case_.C + c) * p_.pixels() + pixel;
          std::int32_t winner = winners.data[at];
          if (!winner_bytes_) std::memcpy(&winner, winners.data + 4 * at, 4);
          if (winner == matched_.winner[at]) return;
          // Another one may win by a rounding error; of those that are alike, none.
          double value = std::numeric_limits<double>::quiet_NaN();
          p_.for_windows(row, column, [&](std::int64_t m, int code) {
            if (code != winner) return;
            value = oracle::dot(
                &matched_.directions[(n * p_.pixels() + pixel) * case_.D],
                &matched_.q[((n / case_.N * case_.C + c) * p_.windows() + m) * case_.D], case_.D);
          });
          require(!std::isnan(value), "a winner is no window over its pixel");
          require(value >= matched_.scores[at] - tolerance(1), "a winner is not the best window");
          require(!alike_, "of equal scores not the lowest window wins");
        });
      }
    }
  }

  void match_backward() const {
    FeatureBuffer first;
    Buffer<A> first_prototypes;
    const auto size = static_cast<std::int64_t>(unmatched_.prototypes.size());
    const Buffer<A> gram(Numbers(case_.B * case_.N * 4 * p_.cells()));
    Buffer<A> scores(scores_size());
    lslpn::Match<A> forward{tables(),  features_.view, prototypes_.data,
                            classes(), mean_,          scores.data,
                            nullptr,   true,           2};
    forward.gram = gram.data;
    lslpn::cosine_match(forward);
    for (int threads = 1; threads <= kThreads; ++threads) {
      FeatureBuffer features = gradient();
      Buffer<A> prototypes(size);
      lslpn::MatchBackward<A> args{tables(),
                                   features_.view,
                                   prototypes_.data,
                                   classes(),
                                   mean_,
                                   scores_in_.data,
                                   mean_ ? nullptr : winners_in_.data,
                                   winner_bytes_,
                                   match_grad_in_.data,
                                   features.view,
                                   prototypes.data,
                                   threads};
      if (threads % 2 == 0) args.gram = gram.data;  // with the forward pass's or its own
      // Each gradient alone is the same as with the other.
      const bool no_features = threads == 3, no_prototypes = threads == 4;
      if (no_features) args.grad_features.data = nullptr;
      if (no_prototypes) args.grad_prototypes = nullptr;
      lslpn::cosine_match(args);
      if (threads > 1) {
        require(no_features || same(features.bytes, first.bytes),
                "gradients of features change with the number of threads or what is kept");
        require(no_prototypes || same(prototypes, first_prototypes),
                "gradients of prototypes change with the number of threads or what is kept");
        continue;
      }
      if (!not_finite_) {
        compare("gradient of matched features", features.numbers(), unmatched_.features,
                smallest(unmatched_.feature_scale), rounding_);
        compare("gradient of prototypes", prototypes.numbers(), unmatched_.prototypes,
                tolerance(unmatched_.prototype_scale));
      }
      require(features.gaps_untouched(), "matching writes between the gradient's elements");
      first = std::move(features);
      first_prototypes = std::move(prototypes);
    }
  }

  // The cross-entropy of labels that are drawn, some of them ignored, and one out of range.
  void loss() const {
    const std::int64_t images = case_.B * case_.N, pixels = p_.pixels();
    const bool bytes = one_in(2), weighted = one_in(2);
    const int ignored = one_in(2) ? 255 : 0;
    Numbers label(images * pixels), weight(case_.C);
    for (double& y : label) y = one_in(5) ? ignored : draw(0, classes() - 1);
    for (double& w : weight) w = weighted ? draw(1, 8) / 4. : 1;
    const Buffer<unsigned char> as_bytes(label);
    const Buffer<std::int64_t> as_longs(label);
    const Buffer<A> weights(weight);

    constexpr double kScale = 3;
    double total = 0, wanted = 0;
    for (const double y : label) total += y == ignored ? 0 : weight[static_cast<int>(y)];
    Numbers grad(images * case_.C * pixels);
    for (std::int64_t at = 0; at < images * pixels; ++at) {
      const int y = static_cast<int>(label[at]);
      if (y == ignored) continue;
      const std::int64_t first = at / pixels * case_.C * pixels + at % pixels;
      double sum = 0;
      for (int c = 0; c < classes(); ++c) {
        sum += std::exp(kScale * matched_.scores[first + c * pixels]);
      }
      for (int c = 0; c < classes(); ++c) {
        const double p = std::exp(kScale * matched_.scores[first + c * pixels]) / sum;
        grad[first + c * pixels] = kScale * weight[y] / total * (p - (c == y));
        if (c == y) wanted -= weight[y] / total * std::log(p);
      }
    }
    if (total == 0) wanted = std::numeric_limits<double>::quiet_NaN();
    const oracle::MatchGradients gradients = oracle::match_backward(p_, matched_, mean_, grad);

    FeatureBuffer first;
    Buffer<A> first_prototypes;
    double first_loss = 0;
    for (int threads = 1; threads <= kThreads; ++threads) {
      FeatureBuffer features = lay_out(gradient_layout_, exact_ ? DType::float64 : DType::float32,
                                       {case_.B, case_.N, case_.D, p_.y.cells, p_.x.cells});
      Buffer<A> prototypes(static_cast<std::int64_t>(gradients.prototypes.size()));
      lslpn::LossResult result{};
      const void* labels = bytes ? static_cast<const void*>(as_bytes.data) : as_longs.data;
      lslpn::MatchLoss<A> args{tables(),      features_.view,  prototypes_.data,
                               classes(),     mean_,           labels,
                               bytes,         ignored,         weighted ? weights.data : nullptr,
                               features.view, prototypes.data, &result,
                               threads,       A(kScale)};
      // Each gradient alone, and the loss alone, are the same as together.
      const bool no_features = threads == 3 || threads == 4, no_prototypes = threads == 4;
      if (no_features) args.grad_features.data = nullptr;
      if (no_prototypes) args.grad_prototypes = nullptr;
      lslpn::cosine_match(args);
      require(result.in_range, "a label is said to be out of range");
      if (threads > 1) {
        require(std::memcmp(&result.loss, &first_loss, sizeof first_loss) == 0,
                "the loss changes with the number of threads, or with what is wanted");
        require(no_features || same(features.bytes, first.bytes),
                "gradients of features of the loss change with the number of threads");
        require(no_prototypes || same(prototypes, first_prototypes),
                "gradients of prototypes of the loss change with the number of threads");
        continue;
      }
      if (!not_finite_) compare("loss", {result.loss}, {wanted}, tolerance(kScale));
      if (!not_finite_ && exact_) {  // else another window may win by a rounding error
        compare("gradient of features of the loss", features.numbers(), gradients.features,
                tolerance(gradients.feature_scale));
        compare("gradient of prototypes of the loss", prototypes.numbers(), gradients.prototypes,
                tolerance(gradients.prototype_scale));
      }
      require(features.gaps_untouched(), "the loss writes between the gradient's elements");
      first = std::move(features);
      first_prototypes = std::move(prototypes);
      first_loss = result.loss;
    }
  }

  // Calls from several threads of the caller, at the same time.
  void at_once() const {
    Buffer<A> scores[2] = {Buffer<A>(scores_size()), Buffer<A>(scores_size())};
    const auto call = [&](A* to) {
      lslpn::cosine_match(lslpn::Match<A>{tables(), features_.view, prototypes_.data, classes(),
                                          mean_, to, nullptr, true, 2});
    };
    std::thread other(call, scores[0].data);
    call(scores[1].data);
    other.join();
    require(same(scores[0], scores[1]), "calls at the same time disturb each other");
  }
};

void run_case(const Case& c, DType dtype) {
  static const char* const names[] = {"float64", "float32", "float16", "bfloat16"};
  char text[300];
  std::snprintf(text, sizeof text, "%s (y %d %d %d %d, x %d %d %d %d, B %d N %d C %d D %d) %s",
                c.name, c.y.pixels, c.y.cells, c.y.window, c.y.step, c.x.pixels, c.x.cells,
                c.x.window, c.x.step, static_cast<int>(c.B), static_cast<int>(c.N),
                static_cast<int>(c.C), static_cast<int>(c.D), names[static_cast<int>(dtype)]);
  where = text;
  if (dtype == DType::float64) {
    Runner<double>(c, dtype).run();
  } else {
    Runner<float>(c, dtype).run();
  }
}

// ---- what the sanitizers must see ---------------------------------------------------------------

int plant(const std::string& mistake) {
  // Of one pixel no whole vectors are stored, whose addresses may be odd for all UBSan knows.
  const Case& c = kCases[mistake == "misaligned" ? 3 : 0];
  const Runner<float> runner(c, DType::float32);
  if (mistake == "overrun") {
    const Buffer<float> scores(runner.scores_size() - 1, 0);
    lslpn::cosine_match(runner.match_into(scores.data, runner.prototypes().data));
  } else if (mistake == "misaligned") {
    const Buffer<char> bytes(runner.scores_size() * 4 + 1, 0);
    auto* odd = reinterpret_cast<float*>(bytes.data + 1);
    lslpn::cosine_match(runner.match_into(odd, runner.prototypes().data));
  } else if (mistake == "race") {
    const Buffer<float> scores(runner.scores_size());
    const auto call = [&] {
      lslpn::cosine_match(runner.match_into(scores.data, runner.prototypes().data));
    };
    std::thread other(call);
    call();
    other.join();
  } else {
    std::printf("usage: driver CASES [SEED] | overrun | misaligned | race\n");
    return 2;
  }
  std::printf("nothing seen\n");
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string first = argc > 1 ? argv[1] : "10";
  if (first.find_first_not_of("0123456789") != std::string::npos) return plant(first);
  const int drawn = std::atoi(first.c_str()), seed = argc > 2 ? std::atoi(argv[2]) : 0;
  int cases = 0;
  const auto next = [&](const Case* c, DType dtype) {
    generator.seed(static_cast<unsigned>(1000003 * seed + cases++));
    run_case(c ? *c : any_case(), dtype);
  };
  const DType dtypes[] = {DType::float64, DType::float32, DType::float16, DType::bfloat16};
  for (const Case& c : kCases) {
    for (const DType dtype : dtypes) next(&c, dtype);
  }
  for (int i = 0; i < drawn; ++i) next(nullptr, dtypes[i % 4]);
  std::printf("%d cases, %d failures, instruction sets", cases, failures);
  for (const std::string& isa : lslpn::instruction_sets()) std::printf(" %s", isa.c_str());
#if defined(LSLPN_OWN_THREADS)
  std::printf(", %ld parallel regions", parallel_regions());
#endif
  std::printf("\n");
  return failures > 0;
}
