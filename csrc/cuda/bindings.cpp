// The Python side of the CUDA kernels: arguments checked, pointers and sizes handed on.
#include "binding.h"

#include <pybind11/stl.h>

#include <optional>

#include "launch.h"

#include <cuda_runtime_api.h>

namespace lslpn::cuda {
namespace {

using AxisNumbers = std::array<std::int64_t, 5>;  // pixels, cells, window, step, windows

Axis axis_of(const AxisNumbers& n) {
  return axis(n[0], n[1], n[2], n[3], n[4]);
}

constexpr int kDevice = dlpack::kCuda;

// Python has made the tensors' device torch's current one, and this module's CUDA runtime, which is
// its own, asks the driver for the same context. So nothing is switched back here: that could
// create a context on a device that the process does not use.
void make_current(int device) {
  int current = -1;
  cudaError_t error = cudaGetDevice(&current);
  if (error == cudaSuccess && current != device) error = cudaSetDevice(device);
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
  }
}

DType accumulate(DType dtype) {
  return dtype == DType::float64 ? DType::float64 : DType::float32;
}

TensorView device_view(const char* name, py::handle capsule, int rank,
                       const TensorView* like = nullptr) {
  TensorView v = view(name, capsule, rank);
  expect_device(v, kDevice, like);
  return v;
}

TensorView plain_view(const char* name, py::handle capsule, const TensorView& like, DType dtype,
                      std::initializer_list<std::int64_t> shape) {
  TensorView v = device_view(name, capsule, static_cast<int>(shape.size()), &like);
  expect_dtype(v, dtype);
  expect_shape(v, shape);
  expect_contiguous(v);
  return v;
}

Features features_of(const TensorView& v) {
  if (!is_floating(v.dtype)) throw py::type_error(std::string(v.name) + " must be floating");
  Features f{v.data, v.dtype, v.shape[0], v.shape[1], v.shape[2], v.shape[3], v.shape[4], {}};
  for (int i = 0; i < 5; ++i) f.stride[i] = v.stride[i];
  return f;
}

void expect_axes(const Features& f, const Axis& y, const Axis& x) {
  if (f.h != y.cells || f.w != x.cells) refuse("features", "do not have the axes' sizes");
}

// Memory for a launch, from torch: `allocate(bytes)` gives a DLPack capsule of uint8. The
// capsule lives until the kernels are queued; torch keeps the memory for this stream after that.
class Workspace {
 public:
  Workspace(const py::function& allocate, std::int64_t bytes, const TensorView& like) {
    if (bytes == 0) return;
    capsule_ = allocate(bytes);
    const TensorView v = plain_view("workspace", capsule_, like, DType::uint8, {bytes});
    data_ = v.data;
    if (reinterpret_cast<std::uintptr_t>(data_) % 16) refuse("workspace", "is not aligned");
  }
  void* data() const { return data_; }

 private:
  py::object capsule_;
  void* data_ = nullptr;
};

// Launches a call; nothing where no kernel takes it.
template <class Call>
void start(Call& call, const TensorView& features, std::uintptr_t stream,
           const py::function& allocate) {
  make_current(features.device_id);
  const std::int64_t bytes = workspace_of(call);
  if (bytes < 0) return;
  const Workspace workspace(allocate, bytes, features);
  call.workspace = workspace.data();
  const std::string error = run(call, reinterpret_cast<Stream>(stream));
  if (!error.empty()) throw std::runtime_error("CUDA: " + error);
}

// `features` and `prototypes`, or the gradients of both; then there is no `min_pixels`.
void masked_average_pool(py::handle features, py::handle masks, std::int64_t C,
                         py::handle prototypes, py::handle factor, const AxisNumbers& y,
                         const AxisNumbers& x, const std::optional<double>& min_pixels,
                         std::uintptr_t stream, const py::function& allocate, bool kept) {
  Pool call;
  call.backward = !min_pixels;
  call.kept = kept;
  const TensorView v = device_view(call.backward ? "grad_features" : "features", features, 5);
  call.features = features_of(v);
  call.y = axis_of(y);
  call.x = axis_of(x);
  const Features& f = call.features;
  expect_axes(f, call.y, call.x);
  const TensorView m = view("masks", masks, 5, 4);
  expect_device(m, kDevice, &v);
  const DType a = accumulate(f.dtype);
  call.masks = masks_of(m, f.B, f.N, C, call.y.pixels, call.x.pixels, a);
  const std::int64_t Gy = call.y.windows, Gx = call.x.windows;
  call.prototypes =
      plain_view(call.backward ? "grad" : "prototypes", prototypes, v, a, {f.B, C, Gy, Gx, f.D})
          .data;
  call.factor = plain_view("factor", factor, v, a, {f.B, f.N, C, Gy, Gx}).data;
  call.min_pixels = min_pixels.value_or(0);
  start(call, v, stream, allocate);
}

// Forward and backward. With `radial` it is about a loss, and `scores` are slopes; see Loss.
using Labels = std::tuple<py::object, py::object, std::int64_t>;  // weight or None, ignore_index
// Of scores or the loss, the sum of the loss's weights, of features and of prototypes.
using Gradients = std::tuple<py::object, py::object, py::object, py::object>;
void cosine_match(py::handle features, py::handle prototypes, py::handle scores,
                  const py::object& winners, const py::object& gram, const AxisNumbers& y,
                  const AxisNumbers& x, std::int64_t overlap_x, bool mean, double logit_scale,
                  std::uintptr_t stream, const py::function& allocate, const py::object& radial,
                  const std::optional<Labels>& labels, const std::optional<Gradients>& grads) {
  Match call;
  const TensorView v = device_view("features", features, 5);
  call.features = features_of(v);
  call.y = axis_of(y);
  call.x = axis_of(x);
  call.mean = mean;
  call.logit_scale = logit_scale;
  call.has_loss = !radial.is_none();
  call.backward = grads.has_value();
  const Features& f = call.features;
  expect_axes(f, call.y, call.x);
  const DType a = accumulate(f.dtype);
  const TensorView p = device_view("prototypes", prototypes, 5, &v);
  const std::int64_t C = call.C = p.shape[1], H = call.y.pixels, W = call.x.pixels;
  const std::initializer_list<std::int64_t> windows{f.B, C, call.y.windows, call.x.windows, f.D};
  call.prototypes = plain_view("prototypes", prototypes, v, a, windows).data;
  const std::int64_t planes = call.has_loss ? C - 1 : C;
  call.scores = plain_view("scores", scores, v, a, {f.B, f.N, planes, H, W}).data;
  if (overlap_x < 1 || overlap_x > call.x.windows) refuse("overlap_x", "is out of range");
  call.overlap_x = overlap_x;
  if (!winners.is_none()) {
    const TensorView w = device_view("winners", winners, 5, &v);
    if (w.dtype != DType::uint8) expect_dtype(w, DType::int32);
    expect_shape(w, {f.B, f.N, C, H, W});
    expect_contiguous(w);
    call.winners = w.data;
    call.wide_winners = w.dtype == DType::int32;
  }
  if (!gram.is_none()) {
    call.gram = plain_view("gram", gram, v, a, {f.B, f.N, kGramMaps, f.h, f.w}).data;
  }
  if (call.has_loss) call.loss.radial = plain_view("radial", radial, v, a, {f.B, f.N, H, W}).data;
  if (call.has_loss && !grads) {
    if (!labels) refuse("labels", "are needed for a loss");
    const auto& [of_pixels, weight, ignore_index] = *labels;
    const TensorView l = device_view("labels", of_pixels, 4, &v);
    if (l.dtype != DType::uint8) expect_dtype(l, DType::int64);
    expect_shape(l, {f.B, f.N, H, W});
    expect_contiguous(l);
    call.loss.labels = l.data;
    call.loss.wide_labels = l.dtype == DType::int64;
    call.loss.ignore_index = ignore_index;
    if (!weight.is_none()) call.loss.weight = plain_view("weight", weight, v, a, {C}).data;
  }
  if (grads) {
    if (!mean && !call.winners) refuse("winners", "are needed for the gradient of a maximum");
    const auto& [incoming, total, of_features, of_prototypes] = *grads;
    if (call.has_loss) {
      call.loss.grad = plain_view("grad", incoming, v, a, {}).data;
      call.loss.total = plain_view("total", total, v, a, {}).data;
    } else {
      call.grad = plain_view("grad", incoming, v, a, {f.B, f.N, C, H, W}).data;
    }
    const TensorView g = device_view("grad_features", of_features, 5, &v);
    expect_dtype(g, f.dtype);
    expect_shape(g, {f.B, f.N, f.D, f.h, f.w});
    call.grad_features = features_of(g);
    call.grad_prototypes = plain_view("grad_prototypes", of_prototypes, v, a, windows).data;
  }
  start(call, v, stream, allocate);
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
