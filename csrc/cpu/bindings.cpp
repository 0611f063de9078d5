// The CPU kernels as Python functions of DLPack capsules. Everything that a kernel relies on is
// checked here, for every caller.
#include <cmath>

#include "../binding.h"
#include "dispatch.h"
#include "geometry.h"

namespace lslpn {
namespace {

using Sizes = std::array<std::int64_t, 5>;  // pixels, cells, window, step, windows

Axis axis_of(const Sizes& s) {
  return axis(s[0], s[1], s[2], s[3], s[4]);
}

int thread_count(int threads) {
  return threads < 1 ? 1 : (threads > kMaxThreads ? kMaxThreads : threads);
}

TensorView cpu_view(const char* name, py::handle capsule, int rank, int or_rank = -1) {
  const TensorView v = view(name, capsule, rank, or_rank);
  expect_device(v, dlpack::kCpu);
  return v;
}

// [B, N, D, h, w] in a floating-point dtype, of the geometry's feature size.
Features features_of(const TensorView& v, const Geometry& geometry) {
  if (!is_floating(v.dtype)) {
    throw py::type_error(std::string(v.name) + " must be floating");
  }
  expect_shape(v, {v.shape[0], v.shape[1], v.shape[2], geometry.y().cells, geometry.x().cells});
  Features f{v.data, v.dtype, v.shape[0], v.shape[1], v.shape[2], v.shape[3], v.shape[4], {}};
  for (int i = 0; i < 5; ++i) f.stride[i] = v.stride[i];
  return f;
}

// The same for writing: no two elements may share memory.
void expect_apart(const TensorView& v) {
  std::array<int, 5> order = {0, 1, 2, 3, 4};
  std::int64_t reach = 0;
  // From the smallest stride on, each stride must exceed the extent of the smaller ones.
  for (int k = 0; k < 5; ++k) {
    for (int i = k + 1; i < 5; ++i) {
      if (v.stride[order[i]] < v.stride[order[k]]) std::swap(order[i], order[k]);
    }
    const int i = order[k];
    if (v.shape[i] == 1) continue;
    if (v.stride[i] <= reach) refuse(v.name, "must not overlap itself");
    reach += (v.shape[i] - 1) * v.stride[i];
  }
}

DType accumulation(DType dtype) {
  return dtype == DType::float64 ? DType::float64 : DType::float32;
}

TensorView dense(const char* name, py::handle capsule, DType dtype,
                 std::initializer_list<std::int64_t> shape) {
  const TensorView v = cpu_view(name, capsule, 5);
  expect_dtype(v, dtype);
  expect_shape(v, shape);
  expect_contiguous(v);
  return v;
}

// [B, C, Gy, Gx, D] in the accumulation type.
TensorView prototypes_of(py::handle capsule, const Features& f, const Geometry& geometry) {
  const TensorView p = cpu_view("prototypes", capsule, 5);
  expect_dtype(p, accumulation(f.dtype));
  expect_shape(p, {f.B, p.shape[1], geometry.y().windows, geometry.x().windows, f.D});
  expect_contiguous(p);
  return p;
}

// The gradient of the features, for writing; null data if it is not needed.
Features gradient_of(const py::object& capsule, const Features& f, DType dtype,
                     const Geometry& geometry) {
  if (capsule.is_none()) {
    Features none = f;
    none.data = nullptr;
    return none;
  }
  const TensorView v = cpu_view("grad_features", capsule, 5);
  expect_dtype(v, dtype);
  expect_shape(v, {f.B, f.N, f.D, f.h, f.w});
  expect_apart(v);
  return features_of(v, geometry);
}

// The inner products of neighbouring locations [B, Q, 4, h, w], null for None.
void* gram_of(const py::object& capsule, const Features& f) {
  if (capsule.is_none()) return nullptr;
  return dense("gram", capsule, accumulation(f.dtype), {f.B, f.N, 4, f.h, f.w}).data;
}

bool winner_bytes(const TensorView& winners, const Geometry& geometry) {
  const auto& tables = geometry.tables<float>();
  if (winners.dtype == DType::int32) return false;
  expect_dtype(winners, DType::uint8);
  if (static_cast<std::int64_t>(tables.y.overlap) * tables.x.overlap > 256) {
    refuse(winners.name, "must be int32 where so many windows overlap");
  }
  return true;
}

// The masks reduced to the feature locations of each tile; see Pool.
TensorView weights_of(py::handle capsule, const Features& f, std::int64_t C,
                      const Geometry& geometry) {
  const auto& tables = geometry.tables<float>();
  return dense("weights", capsule, accumulation(f.dtype),
               {f.B, f.N, C, tables.y.locations, tables.x.locations});
}

// Runs `call` with the accumulation type of a dtype, without the GIL.
template <class F>
void without_lock(DType dtype, F call) {
  const py::gil_scoped_release released;
  if (dtype == DType::float64) {
    call(double());
  } else {
    call(float());
  }
}

void pool(const Geometry& geometry, py::handle features, py::handle masks, std::int64_t C,
          double min_pixels, py::handle prototypes, py::handle factor, py::handle weights,
          int threads) {
  const Features f = features_of(cpu_view("features", features, 5), geometry);
  const Axis &y = geometry.y(), &x = geometry.x();
  const DType dtype = accumulation(f.dtype);
  const Masks m = masks_of(cpu_view("masks", masks, 5, 4), f.B, f.N, C, y.pixels, x.pixels, dtype);
  const TensorView out =
      dense("prototypes", prototypes, dtype, {f.B, C, y.windows, x.windows, f.D});
  const TensorView scale = dense("factor", factor, dtype, {f.B, f.N, C, y.windows, x.windows});
  const TensorView kept = weights_of(weights, f, C, geometry);
  without_lock(dtype, [&](auto number) {
    using A = decltype(number);
    masked_average_pool(Pool<A>{geometry.tables<A>(), f, m, static_cast<A>(min_pixels), out.as<A>(),
                                scale.as<A>(), kept.as<A>(), thread_count(threads)});
  });
}

void pool_backward(const Geometry& geometry, py::handle grad, py::handle masks, std::int64_t C,
                   py::handle factor, const py::object& weights, py::handle grad_features,
                   int threads) {
  const TensorView written = cpu_view("grad_features", grad_features, 5);
  const Features f = features_of(written, geometry);
  expect_apart(written);
  const Axis &y = geometry.y(), &x = geometry.x();
  const DType dtype = accumulation(f.dtype);
  const Masks m = masks_of(cpu_view("masks", masks, 5, 4), f.B, f.N, C, y.pixels, x.pixels, dtype);
  const TensorView g = dense("grad", grad, dtype, {f.B, C, y.windows, x.windows, f.D});
  const TensorView scale = dense("factor", factor, dtype, {f.B, f.N, C, y.windows, x.windows});
  const void* kept = weights.is_none() ? nullptr : weights_of(weights, f, C, geometry).data;
  without_lock(dtype, [&](auto number) {
    using A = decltype(number);
    masked_average_pool(PoolBackward<A>{geometry.tables<A>(), f, m, scale.as<const A>(),
                                        static_cast<const A*>(kept), g.as<const A>(),
                                        thread_count(threads)});
  });
}

void match(const Geometry& geometry, py::handle features, py::handle prototypes, bool mean,
           py::handle scores, const py::object& winners, const py::object& gram, double logit_scale,
           int threads) {
  const Features f = features_of(cpu_view("features", features, 5), geometry);
  const Axis &y = geometry.y(), &x = geometry.x();
  const DType dtype = accumulation(f.dtype);
  const TensorView p = prototypes_of(prototypes, f, geometry);
  const std::int64_t C = p.shape[1];
  const TensorView out = dense("scores", scores, dtype, {f.B, f.N, C, y.pixels, x.pixels});
  void* winner_data = nullptr;
  bool bytes = true;
  if (!winners.is_none()) {
    const TensorView v = cpu_view("winners", winners, 5);
    bytes = winner_bytes(v, geometry);
    expect_shape(v, {f.B, f.N, C, y.pixels, x.pixels});
    expect_contiguous(v);
    winner_data = v.data;
  }
  void* gram_data = gram_of(gram, f);
  without_lock(dtype, [&](auto number) {
    using A = decltype(number);
    cosine_match(Match<A>{geometry.tables<A>(), f, p.as<const A>(), static_cast<int>(C), mean,
                          out.as<A>(), winner_data, bytes, thread_count(threads),
                          static_cast<A>(logit_scale), static_cast<A*>(gram_data)});
  });
}

void match_backward(const Geometry& geometry, py::handle grad, py::handle features,
                    py::handle prototypes, py::handle scores, const py::object& winners, bool mean,
                    const py::object& grad_features, const py::object& grad_prototypes,
                    const py::object& gram, double logit_scale, int threads) {
  if (!(std::abs(logit_scale) >= 1e-6)) throw py::value_error("logit_scale must not be 0");
  const Features f = features_of(cpu_view("features", features, 5), geometry);
  const Axis &y = geometry.y(), &x = geometry.x();
  const DType dtype = accumulation(f.dtype);
  const TensorView p = prototypes_of(prototypes, f, geometry);
  const std::int64_t C = p.shape[1];
  const TensorView g = dense("grad", grad, dtype, {f.B, f.N, C, y.pixels, x.pixels});
  const TensorView s = dense("scores", scores, dtype, {f.B, f.N, C, y.pixels, x.pixels});
  const void* winner_data = nullptr;
  bool bytes = true;
  if (!mean) {
    const TensorView v = cpu_view("winners", winners, 5);
    bytes = winner_bytes(v, geometry);
    expect_shape(v, {f.B, f.N, C, y.pixels, x.pixels});
    expect_contiguous(v);
    winner_data = v.data;
  }
  const Features df = gradient_of(grad_features, f, f.dtype, geometry);
  void* dp = nullptr;
  if (!grad_prototypes.is_none()) {
    dp = dense("grad_prototypes", grad_prototypes, dtype, {f.B, C, y.windows, x.windows, f.D}).data;
  }
  const void* gram_data = gram_of(gram, f);
  without_lock(dtype, [&](auto number) {
    using A = decltype(number);
    cosine_match(MatchBackward<A>{geometry.tables<A>(), f, p.as<const A>(), static_cast<int>(C),
                                  mean, s.as<const A>(), winner_data, bytes, g.as<const A>(), df,
                                  static_cast<A*>(dp), thread_count(threads),
                                  static_cast<A>(logit_scale), static_cast<const A*>(gram_data)});
  });
}

// The mean cross-entropy. Gradients, if needed, are written in the accumulation type.
double match_loss(const Geometry& geometry, py::handle features, py::handle prototypes,
                  py::handle labels, const py::object& weight, bool mean,
                  const py::object& grad_features, const py::object& grad_prototypes,
                  std::int32_t ignore_index, double logit_scale, int threads) {
  if (!(std::abs(logit_scale) >= 1e-6)) throw py::value_error("logit_scale must not be 0");
  const Features f = features_of(cpu_view("features", features, 5), geometry);
  const Axis &y = geometry.y(), &x = geometry.x();
  const DType dtype = accumulation(f.dtype);
  const TensorView p = prototypes_of(prototypes, f, geometry);
  const std::int64_t C = p.shape[1];
  const TensorView l = cpu_view("labels", labels, 4);
  if (l.dtype != DType::uint8) expect_dtype(l, DType::int64);
  expect_shape(l, {f.B, f.N, y.pixels, x.pixels});
  expect_contiguous(l);
  const void* weights = nullptr;
  if (!weight.is_none()) {
    const TensorView v = cpu_view("weight", weight, 1);
    expect_dtype(v, dtype);
    expect_shape(v, {C});
    expect_contiguous(v);
    weights = v.data;
  }
  const Features df = gradient_of(grad_features, f, dtype, geometry);
  void* dp = nullptr;
  if (!grad_prototypes.is_none()) {
    dp = dense("grad_prototypes", grad_prototypes, dtype, {f.B, C, y.windows, x.windows, f.D}).data;
  }
  LossResult result{};
  without_lock(dtype, [&](auto number) {
    using A = decltype(number);
    cosine_match(MatchLoss<A>{geometry.tables<A>(), f, p.as<const A>(), static_cast<int>(C), mean,
                              l.data, l.dtype == DType::uint8, ignore_index,
                              static_cast<const A*>(weights), df, static_cast<A*>(dp), &result,
                              thread_count(threads), static_cast<A>(logit_scale)});
  });
  if (!result.in_range) {
    throw py::value_error("labels must lie in 0 .. " + std::to_string(C - 1) +
                          ", the classes of the prototypes, or be ignore_index (" +
                          std::to_string(ignore_index) + "), got " + std::to_string(result.stray));
  }
  return result.loss;
}

}  // namespace

void register_cpu(py::module_& m) {
  py::class_<Geometry>(m, "Geometry", "The tables of a grid over an image.")
      .def(py::init([](const Sizes& y, const Sizes& x) {
             return std::make_unique<Geometry>(axis_of(y), axis_of(x));
           }),
           py::arg("y"), py::arg("x"))
      .def_property_readonly(
          "locations",
          [](const Geometry& g) {
            const auto& tables = g.tables<float>();
            return std::make_pair(tables.y.locations, tables.x.locations);
          },
          "Feature locations of all segments of both axes.");
  m.def("cpu_masked_average_pool", &pool);
  m.def("cpu_masked_average_pool_backward", &pool_backward);
  m.def("cpu_cosine_match", &match);
  m.def("cpu_cosine_match_backward", &match_backward);
  m.def("cpu_cosine_match_loss", &match_loss);
  m.def("cpu_instruction_sets", [] {
    py::list names;
    for (const std::string& name : instruction_sets()) names.append(name);
    return names;
  });
  m.def("cpu_instruction_set", &instruction_set);
  m.def("cpu_use_instruction_set", &use_instruction_set);
}

}  // namespace lslpn
