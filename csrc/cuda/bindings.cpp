// The Python side of the CUDA kernels: arguments checked, pointers and sizes handed on.
#include "binding.h"

#include <pybind11/stl.h>

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

Stream stream_of(std::uintptr_t handle) {
  return reinterpret_cast<Stream>(handle);
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

void raise(const std::string& error) {
  if (!error.empty()) throw std::runtime_error("CUDA: " + error);
}

Pool pool_call(const TensorView& features, py::handle masks, std::int64_t C, const AxisNumbers& y,
               const AxisNumbers& x) {
  Pool call;
  call.features = features_of(features);
  call.y = axis_of(y);
  call.x = axis_of(x);
  const Features& f = call.features;
  expect_axes(f, call.y, call.x);
  const TensorView m = view("masks", masks, 5, 4);
  expect_device(m, kDevice, &features);
  call.masks = masks_of(m, f.B, f.N, C, call.y.pixels, call.x.pixels, accumulate(f.dtype));
  return call;
}

void masked_average_pool(py::handle features, py::handle masks, std::int64_t C,
                         py::handle prototypes, py::handle factor, const AxisNumbers& y,
                         const AxisNumbers& x, double min_pixels, std::uintptr_t stream,
                         const py::function& allocate, bool plain) {
  const TensorView v = device_view("features", features, 5);
  Pool call = pool_call(v, masks, C, y, x);
  const Features& f = call.features;
  const DType a = accumulate(f.dtype);
  const std::int64_t Gy = call.y.windows, Gx = call.x.windows;
  call.prototypes = plain_view("prototypes", prototypes, v, a, {f.B, C, Gy, Gx, f.D}).data;
  call.factor = plain_view("factor", factor, v, a, {f.B, f.N, C, Gy, Gx}).data;
  call.min_pixels = min_pixels;
  make_current(v.device_id);
  const Workspace workspace(allocate, pool_workspace(call, plain), v);
  call.workspace = workspace.data();
  raise(pool_forward(call, stream_of(stream), plain));
}

void masked_average_pool_backward(py::handle grad, py::handle masks, std::int64_t C,
                                  py::handle factor, py::handle grad_features, const AxisNumbers& y,
                                  const AxisNumbers& x, std::uintptr_t stream,
                                  const py::function& allocate, bool plain) {
  const TensorView v = device_view("grad_features", grad_features, 5);
  Pool call = pool_call(v, masks, C, y, x);
  const Features& f = call.features;
  const DType a = accumulate(f.dtype);
  const std::int64_t Gy = call.y.windows, Gx = call.x.windows;
  call.prototypes = plain_view("grad", grad, v, a, {f.B, C, Gy, Gx, f.D}).data;
  call.factor = plain_view("factor", factor, v, a, {f.B, f.N, C, Gy, Gx}).data;
  make_current(v.device_id);
  const Workspace workspace(allocate, pool_workspace(call, plain), v);
  call.workspace = workspace.data();
  raise(pool_backward(call, stream_of(stream), plain));
}

Match match_call(const TensorView& features, py::handle prototypes, py::handle scores,
                 const py::object& winners, const py::object& gram, const AxisNumbers& y,
                 const AxisNumbers& x, std::int64_t overlap_x, bool mean, double logit_scale,
                 bool has_loss) {
  Match call;
  call.has_loss = has_loss;
  call.features = features_of(features);
  call.y = axis_of(y);
  call.x = axis_of(x);
  const Features& f = call.features;
  expect_axes(f, call.y, call.x);
  const DType a = accumulate(f.dtype);
  const TensorView p = device_view("prototypes", prototypes, 5, &features);
  call.C = p.shape[1];
  expect_dtype(p, a);
  expect_shape(p, {f.B, call.C, call.y.windows, call.x.windows, f.D});
  expect_contiguous(p);
  call.prototypes = p.data;
  const std::initializer_list<std::int64_t> image{f.B, f.N, call.C, call.y.pixels, call.x.pixels};
  call.scores = plain_view(has_loss ? "slopes" : "scores", scores, features, a,
                           {f.B, f.N, call.C - has_loss, call.y.pixels, call.x.pixels})
                    .data;
  call.mean = mean;
  call.logit_scale = logit_scale;
  if (overlap_x < 1 || overlap_x > call.x.windows) refuse("overlap_x", "is out of range");
  call.overlap_x = overlap_x;
  if (!winners.is_none()) {
    const TensorView v = device_view("winners", winners, 5, &features);
    if (v.dtype != DType::uint8) expect_dtype(v, DType::int32);
    expect_shape(v, image);
    expect_contiguous(v);
    call.winners = v.data;
    call.wide_winners = v.dtype == DType::int32;
  }
  if (!gram.is_none()) {
    call.gram = plain_view("gram", gram, features, a, {f.B, f.N, kGramMaps, f.h, f.w}).data;
  }
  return call;
}

TensorView radial_view(py::handle radial, const TensorView& features, const Match& call) {
  const Features& f = call.features;
  return plain_view("radial", radial, features, accumulate(f.dtype),
                    {f.B, f.N, call.y.pixels, call.x.pixels});
}

// `loss`: None, or labels, weight or None, ignore_index and radial; see Loss.
void cosine_match(py::handle features, py::handle prototypes, py::handle scores,
                  const py::object& winners, const py::object& gram, const AxisNumbers& y,
                  const AxisNumbers& x, std::int64_t overlap_x, bool mean, double logit_scale,
                  std::uintptr_t stream, const py::function& allocate, bool plain,
                  const py::object& loss) {
  const TensorView v = device_view("features", features, 5);
  Match call = match_call(v, prototypes, scores, winners, gram, y, x, overlap_x, mean, logit_scale,
                          !loss.is_none());
  if (call.has_loss) {
    const auto [labels, weight, ignore_index, radial] =
        loss.cast<std::tuple<py::object, py::object, std::int64_t, py::object>>();
    const Features& f = call.features;
    const DType a = accumulate(f.dtype);
    const TensorView l = device_view("labels", labels, 4, &v);
    if (l.dtype != DType::uint8) expect_dtype(l, DType::int64);
    expect_shape(l, {f.B, f.N, call.y.pixels, call.x.pixels});
    expect_contiguous(l);
    call.loss.labels = l.data;
    call.loss.wide_labels = l.dtype == DType::int64;
    call.loss.ignore_index = ignore_index;
    if (!weight.is_none()) call.loss.weight = plain_view("weight", weight, v, a, {call.C}).data;
    call.loss.radial = radial_view(radial, v, call).data;
  }
  make_current(v.device_id);
  const std::int64_t bytes = match_workspace(call, false, plain);
  if (call.has_loss && bytes == 0) return;
  const Workspace workspace(allocate, bytes, v);
  call.workspace = workspace.data();
  raise(match_forward(call, stream_of(stream), plain));
}

// `grad`: of the scores; or that of the loss, the sum of its weights, and radial.
void cosine_match_backward(const py::object& grad, py::handle features, py::handle prototypes,
                           py::handle scores, const py::object& winners, const py::object& gram,
                           py::handle grad_features, py::handle grad_prototypes,
                           const AxisNumbers& y, const AxisNumbers& x, std::int64_t overlap_x,
                           bool mean, double logit_scale, std::uintptr_t stream,
                           const py::function& allocate, bool plain) {
  const TensorView v = device_view("features", features, 5);
  Match call = match_call(v, prototypes, scores, winners, gram, y, x, overlap_x, mean, logit_scale,
                          py::isinstance<py::tuple>(grad));
  const Features& f = call.features;
  const DType a = accumulate(f.dtype);
  const std::int64_t H = call.y.pixels, W = call.x.pixels;
  if (!mean && !call.winners) refuse("winners", "are needed for the gradient of a maximum");
  if (call.has_loss) {
    const auto [of_loss, total, radial] =
        grad.cast<std::tuple<py::object, py::object, py::object>>();
    call.loss.grad = plain_view("grad", of_loss, v, a, {}).data;
    call.loss.total = plain_view("total", total, v, a, {}).data;
    call.loss.radial = radial_view(radial, v, call).data;
  } else {
    call.grad = plain_view("grad", grad, v, a, {f.B, f.N, call.C, H, W}).data;
  }
  const TensorView g = device_view("grad_features", grad_features, 5, &v);
  expect_dtype(g, f.dtype);
  expect_shape(g, {f.B, f.N, f.D, f.h, f.w});
  call.grad_features = features_of(g);
  call.grad_prototypes = plain_view("grad_prototypes", grad_prototypes, v, a,
                                    {f.B, call.C, call.y.windows, call.x.windows, f.D})
                             .data;
  make_current(v.device_id);
  const std::int64_t bytes = match_workspace(call, true, plain);
  if (call.has_loss && bytes == 0) return;
  const Workspace workspace(allocate, bytes, v);
  call.workspace = workspace.data();
  raise(match_backward(call, stream_of(stream), plain));
}

}  // namespace
}  // namespace lslpn::cuda

namespace lslpn {

void register_cuda(py::module_& m) {
  m.def("cuda_masked_average_pool", &cuda::masked_average_pool);
  m.def("cuda_masked_average_pool_backward", &cuda::masked_average_pool_backward);
  m.def("cuda_cosine_match", &cuda::cosine_match);
  m.def("cuda_cosine_match_backward", &cuda::cosine_match_backward);
  m.def("cuda_probe", &cuda::probe);
#ifdef LSLPN_CUDA_ARCHS
  m.attr("cuda_archs") = LSLPN_CUDA_ARCHS;
#endif
}

}  // namespace lslpn
