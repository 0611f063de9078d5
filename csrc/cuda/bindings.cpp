// The Python side of the CUDA kernels: checks arguments, and passes on pointers and sizes.
#include "binding.h"

#include <pybind11/stl.h>

#include <optional>
#include <vector>

#include "launch.h"

#include <cuda_runtime_api.h>

namespace lslpn::cuda {
namespace {

using AxisNumbers = std::array<std::int64_t, 5>;  // pixels, cells, window, step, windows

Axis axis_of(const AxisNumbers& n) {
  return axis(n[0], n[1], n[2], n[3], n[4]);
}

// Python has made the tensors' device torch's current one; this module's CUDA runtime, which is its
// own, asks the driver for the same context. Nothing is switched back: that could create a context
// on a device that the process does not use.
void make_current(int device) {
  int current = -1;
  cudaError_t error = cudaGetDevice(&current);
  if (error == cudaSuccess && current != device) error = cudaSetDevice(device);
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
  }
}

TensorView device_view(const char* name, py::handle capsule, int rank,
                       const TensorView* like = nullptr, int or_rank = -1) {
  TensorView v = view(name, capsule, rank, or_rank);
  expect_device(v, dlpack::kCuda, like);
  return v;
}

template <class T>
constexpr DType kDType = std::is_same_v<T, float> ? DType::float32 : DType::uint8;

// A contiguous array of T on the device of `like`.
template <class T>
T* array(const char* name, py::handle capsule, const TensorView& like,
         std::initializer_list<std::int64_t> shape, bool aligned = false) {
  const TensorView v = device_view(name, capsule, static_cast<int>(shape.size()), &like);
  expect_dtype(v, kDType<T>);
  expect_shape(v, shape);
  expect_contiguous(v);
  if (aligned && reinterpret_cast<std::uintptr_t>(v.data) % 16) {
    refuse(name, "must be aligned to 16 bytes");
  }
  return v.as<T>();
}

Features features_of(const TensorView& v, const Axis& y, const Axis& x) {
  if (!is_floating(v.dtype) || v.dtype == DType::float64) {
    throw py::type_error(std::string(v.name) + " must be float32, float16 or bfloat16");
  }
  if (v.shape[3] != y.cells || v.shape[4] != x.cells) refuse(v.name, "do not have the axes' sizes");
  Features f{v.data, v.dtype, v.shape[0], v.shape[1], v.shape[2], v.shape[3], v.shape[4], {}};
  for (int i = 0; i < 5; ++i) f.stride[i] = v.stride[i];
  return f;
}

// Launches a call for some episodes; returns how many. Memory comes from torch: `allocate(bytes)`
// gives DLPack capsules of uint8, which live until the kernels are queued; after that torch keeps
// the memory for this stream.
template <class Call>
std::int64_t start(const Call& call, const TensorView& features, std::uintptr_t stream,
                   std::int64_t workspace, const py::function& allocate) {
  make_current(features.device_id);
  std::vector<py::object> capsules;
  return run(
      call, workspace,
      [&](std::int64_t bytes) {
        capsules.push_back(allocate(bytes));
        return array<std::uint8_t>("workspace", capsules.back(), features, {bytes}, true);
      },
      reinterpret_cast<Stream>(stream));
}

// `features` and `prototypes`, or the gradients of both; then there is no `min_pixels`.
std::int64_t masked_average_pool(py::handle features, py::handle masks, std::int64_t C,
                                 py::handle prototypes, py::handle factor, const AxisNumbers& y,
                                 const AxisNumbers& x, const std::optional<double>& min_pixels,
                                 std::uintptr_t stream, std::int64_t workspace,
                                 const py::function& allocate, const py::object& kept) {
  Pool call;
  call.backward = !min_pixels;
  call.min_pixels = static_cast<float>(min_pixels.value_or(0));
  const TensorView v = device_view(call.backward ? "grad_features" : "features", features, 5);
  call.y = axis_of(y);
  call.x = axis_of(x);
  const Features& f = call.features = features_of(v, call.y, call.x);
  const std::int64_t Gy = call.y.windows, Gx = call.x.windows;
  call.masks = masks_of(device_view("masks", masks, 5, &v, 4), f.B, f.N, C, call.y.pixels,
                        call.x.pixels, DType::float32);
  call.prototypes = array<float>(call.backward ? "grad" : "prototypes", prototypes, v,
                                 {f.B, C, Gy, Gx, f.D}, true);
  call.factor = array<float>("factor", factor, v, {f.B, f.N, C, Gy, Gx});
  if (!kept.is_none()) {
    call.kept_bytes = device_view("kept", kept, 2, &v).shape[1];
    call.kept = array<std::uint8_t>("kept", kept, v, {f.B, call.kept_bytes}, true);
  }
  return start(call, v, stream, workspace, allocate);
}

using Labels = std::tuple<py::object, py::object, std::int64_t>;  // weight or None, ignore_index
// Of the scores or the loss, the sum of the loss's weights, of features and of prototypes.
using Gradients = std::tuple<py::object, py::object, py::object, py::object>;

// Forward and backward, with `radial` of a loss, where `scores` are the gradients of the logits.
std::int64_t cosine_match(py::handle features, py::handle prototypes, py::handle scores,
                          const py::object& winners, const py::object& gram, const AxisNumbers& y,
                          const AxisNumbers& x, std::int64_t overlap_x, bool mean,
                          double logit_scale, std::uintptr_t stream, std::int64_t workspace,
                          const py::function& allocate, const py::object& radial,
                          const std::optional<Labels>& labels,
                          const std::optional<Gradients>& grads) {
  Match call;
  Matching& m = call.matching;
  Loss& loss = m.loss;
  const TensorView v = device_view("features", features, 5);
  call.y = axis_of(y);
  call.x = axis_of(x);
  const Features& f = call.features = features_of(v, call.y, call.x);
  call.backward = grads.has_value();
  const bool has_loss = !radial.is_none();
  const std::int64_t C = call.C = device_view("prototypes", prototypes, 5).shape[1];
  const std::int64_t H = call.y.pixels, W = call.x.pixels;
  const std::initializer_list<std::int64_t> windows{f.B, C, call.y.windows, call.x.windows, f.D};
  m.prototypes = array<float>("prototypes", prototypes, v, windows, true);
  m.scores = array<float>("scores", scores, v, {f.B, f.N, has_loss ? C - 1 : C, H, W});
  if (overlap_x < 1 || overlap_x > call.x.windows) refuse("overlap_x", "is out of range");
  m.overlap_x = static_cast<int>(overlap_x);
  m.mean = mean;
  m.logit_scale = static_cast<float>(logit_scale);
  if (!winners.is_none()) {
    m.winners = array<std::uint8_t>("winners", winners, v, {f.B, f.N, C, H, W});
  }
  if (!gram.is_none()) m.gram = array<float>("gram", gram, v, {f.B, f.N, kGramMaps, f.h, f.w});
  if (has_loss) loss.radial = array<float>("radial", radial, v, {f.B, f.N, H, W});
  if (has_loss && !grads) {
    if (!labels) refuse("labels", "are needed for a loss");
    const auto& [of_pixels, weight, ignore_index] = *labels;
    const TensorView l = device_view("labels", of_pixels, 4, &v);
    loss.wide_labels = l.dtype != DType::uint8;
    if (loss.wide_labels) expect_dtype(l, DType::int64);
    expect_shape(l, {f.B, f.N, H, W});
    expect_contiguous(l);
    loss.labels = l.data;
    loss.ignore_index = ignore_index;
    if (!weight.is_none()) loss.weight = array<float>("weight", weight, v, {C});
  }
  if (grads) {
    if (!mean && !m.winners) refuse("winners", "are needed for the gradient of a maximum");
    if (!m.gram) refuse("gram", "is needed for a gradient");
    const auto& [incoming, total, of_features, of_prototypes] = *grads;
    if (has_loss) {
      loss.grad = array<float>("grad", incoming, v, {});
      loss.total = array<float>("total", total, v, {});
    } else {
      m.grad = array<float>("grad", incoming, v, {f.B, f.N, C, H, W});
    }
    const TensorView g = device_view("grad_features", of_features, 5, &v);
    expect_dtype(g, f.dtype);
    expect_shape(g, {f.B, f.N, f.D, f.h, f.w});
    call.grad_features = features_of(g, call.y, call.x);
    call.grad_prototypes = array<float>("grad_prototypes", of_prototypes, v, windows, true);
  }
  return start(call, v, stream, workspace, allocate);
}

}  // namespace
}  // namespace lslpn::cuda

namespace lslpn {

void register_cuda(py::module_& m) {
  m.def("cuda_masked_average_pool", &cuda::masked_average_pool);
  m.def("cuda_cosine_match", &cuda::cosine_match);
  m.def("cuda_probe", &cuda::probe);
#ifdef LSLPN_CUDA_ARCHS
  m.attr("cuda_archs") = LSLPN_CUDA_ARCHS;
#endif
}

}  // namespace lslpn
