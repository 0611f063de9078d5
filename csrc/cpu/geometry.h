// Tables of a grid over an image for the CPU kernels.
#pragma once

#include <memory>
#include <vector>

#include "../core/geometry.h"
#include "kernels.h"

namespace lslpn {

// Both axes of an image under a grid. Built once per geometry and kept by the caller.
class Geometry {
 public:
  Geometry(const Axis& y, const Axis& x);
  ~Geometry();

  const Axis& y() const;
  const Axis& x() const;
  template <class A>
  const Tables<A>& tables() const;

 private:
  struct Storage;
  std::unique_ptr<Storage> storage_;
};

}  // namespace lslpn
