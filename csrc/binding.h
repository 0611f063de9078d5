// What the bindings of all backends share: tensors as they come from Python.
//
// A tensor crosses over as a DLPack capsule, the framework-neutral description that torch hands
// out in 0.2 us. It names the memory, its shape, strides, dtype and device, so that the bindings
// can check all of these themselves, whatever Python passed; and it needs no torch header.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "core/dtype.h"
#include "core/geometry.h"
#include "core/masks.h"

namespace lslpn {

namespace py = pybind11;

// The ABI of DLPack, version 0 (stable since 2017), as far as it is read here.
namespace dlpack {
enum DeviceType : std::int32_t { kCpu = 1, kCuda = 2 };
enum TypeCode : std::uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6 };
struct Tensor {
  void* data;
  std::int32_t device_type;
  std::int32_t device_id;
  std::int32_t ndim;
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
  std::int64_t* shape;
  std::int64_t* strides;  // in elements; null for contiguous
  std::uint64_t byte_offset;
};
}  // namespace dlpack

// A tensor of at most five dimensions, borrowed for the length of a call.
struct TensorView {
  const char* name = "";
  char* data = nullptr;
  int device_type = 0;
  int device_id = 0;
  DType dtype = DType::float32;
  int rank = 0;
  std::array<std::int64_t, 5> shape{};
  std::array<std::int64_t, 5> stride{};  // in elements

  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data);
  }

  std::int64_t numel() const {
    std::int64_t n = 1;
    for (int i = 0; i < rank; ++i) n *= shape[i];
    return n;
  }

  bool contiguous() const {
    std::int64_t expected = 1;
    for (int i = rank - 1; i >= 0; --i) {
      if (shape[i] != 1 && stride[i] != expected) return false;
      expected *= shape[i];
    }
    return true;
  }
};

[[noreturn]] inline void refuse(const char* name, const std::string& what) {
  throw py::value_error(std::string(name) + " " + what);
}

inline DType dtype_of(const char* name, const dlpack::Tensor& t) {
  if (t.lanes == 1) {
    if (t.code == dlpack::kFloat && t.bits == 64) return DType::float64;
    if (t.code == dlpack::kFloat && t.bits == 32) return DType::float32;
    if (t.code == dlpack::kFloat && t.bits == 16) return DType::float16;
    if (t.code == dlpack::kBfloat && t.bits == 16) return DType::bfloat16;
    if (t.code == dlpack::kUInt && t.bits == 8) return DType::uint8;
    if (t.code == dlpack::kBool && t.bits == 8) return DType::boolean;
    if (t.code == dlpack::kInt && t.bits == 32) return DType::int32;
    if (t.code == dlpack::kInt && t.bits == 64) return DType::int64;
  }
  throw py::type_error(std::string(name) + " has a dtype that no kernel takes");
}

// Reads a capsule of `rank` dimensions, or of `or_rank`, none of them empty.
inline TensorView view(const char* name, py::handle capsule, int rank, int or_rank = -1) {
  if (!PyCapsule_IsValid(capsule.ptr(), "dltensor")) {
    throw py::type_error(std::string(name) + " must be a DLPack capsule that was not used before");
  }
  const auto& t =
      *static_cast<const dlpack::Tensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
  TensorView v;
  v.name = name;
  if (t.ndim != rank && t.ndim != or_rank) {
    refuse(name,
           "must have " + std::to_string(rank) + " dimensions, got " + std::to_string(t.ndim));
  }
  v.dtype = dtype_of(name, t);
  v.device_type = t.device_type;
  v.device_id = t.device_id;
  v.rank = t.ndim;
  std::int64_t contiguous = 1;
  for (int i = v.rank - 1; i >= 0; --i) {
    if (t.shape[i] < 1) refuse(name, "must not be empty");
    v.shape[i] = t.shape[i];
    v.stride[i] = t.strides ? t.strides[i] : contiguous;
    contiguous *= t.shape[i];
  }
  if (!t.data) refuse(name, "has no memory");
  v.data = static_cast<char*>(t.data) + t.byte_offset;
  return v;
}

inline void expect_device(const TensorView& v, int device_type, const TensorView* like = nullptr) {
  if (v.device_type != device_type || (like && v.device_id != like->device_id)) {
    refuse(v.name, "is on another device than the kernel runs on");
  }
}

inline void expect_dtype(const TensorView& v, DType dtype) {
  if (v.dtype != dtype) throw py::type_error(std::string(v.name) + " has an unexpected dtype");
}

inline void expect_shape(const TensorView& v, std::initializer_list<std::int64_t> shape) {
  int i = 0;
  for (const std::int64_t n : shape) {
    if (v.shape[i] != n) {
      refuse(v.name, "must have length " + std::to_string(n) + " in dimension " +
                         std::to_string(i) + ", got " + std::to_string(v.shape[i]));
    }
    ++i;
  }
}

inline void expect_contiguous(const TensorView& v) {
  if (!v.contiguous()) refuse(v.name, "must be contiguous");
}

// The masks of C classes in K support images of H x W pixels for each of B episodes. Their kind
// follows from their shape; see core/masks.h.
inline Masks masks_of(const TensorView& v, std::int64_t B, std::int64_t K, std::int64_t C,
                      std::int64_t H, std::int64_t W, DType floating) {
  Masks masks{v.data, MaskKind::labels, v.dtype, C};
  if (v.rank == 4) {
    expect_shape(v, {B, K, H, W});
    if (v.dtype != DType::uint8) expect_dtype(v, DType::int64);
  } else {
    const bool whole = v.shape[2] == C;
    masks.kind = whole ? MaskKind::classes : MaskKind::foreground;
    expect_shape(v, {B, K, whole ? C : C - 1, H, W});
    if (!masks_are_bytes(masks)) expect_dtype(v, floating);
  }
  expect_contiguous(v);
  return masks;
}

// An axis as Python describes it; see csrc/core/geometry.h.
inline Axis axis(std::int64_t pixels, std::int64_t cells, std::int64_t window, std::int64_t step,
                 std::int64_t windows) {
  for (const std::int64_t n : {pixels, cells, window, step, windows}) {
    if (n < 1 || n > kLongestAxis) {
      throw py::value_error("an axis must have lengths of 1 to 2^30, got " + std::to_string(n));
    }
  }
  if (window > pixels || windows != (pixels - window + step - 1) / step + 1) {
    throw py::value_error("the windows of an axis do not cover it");
  }
  return {static_cast<int>(pixels), static_cast<int>(cells), static_cast<int>(window),
          static_cast<int>(step), static_cast<int>(windows)};
}

}  // namespace lslpn
