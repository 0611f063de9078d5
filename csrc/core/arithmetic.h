// The arithmetic of single elements, shared by every native kernel.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "macros.h"

LSLPN_BEGIN

// Vectors shorter than eps have a score of 0 and no gradient.
template <class A>
LSLPN_HD constexpr A eps_squared() {
  return A(1e-16);
}

// 1 / |v| from |v|^2, or 0 if |v| is below eps. NaN stays NaN.
template <class A>
LSLPN_HD A inverse_length(A square) {
  return square < eps_squared<A>() ? A(0) : A(1) / std::sqrt(square);
}

// Inner products of a feature location with itself and its neighbours; 0 if the neighbour is
// outside the map.
//
//   own       <F(i, j), F(i, j)>            right     <F(i, j), F(i, j + 1)>
//   below     <F(i, j), F(i + 1, j)>        diagonal  <F(i, j), F(i + 1, j + 1)>
//                                           other     <F(i, j + 1), F(i + 1, j)>
//
// |Up F(x)|^2 = w^T G w over the 4 taps of x is bilinear in the weights of rows and columns:
//   |Up F|^2 = a^2 row(i) + b^2 row(i + 1) + 2 a b between(i),      a = 1 - b, rows i and i + 1
//   row(i)     = p^2 own(i, j) + q^2 own(i, j + 1) + 2 p q right(i, j),         p = 1 - q
//   between(i) = p^2 below(i, j) + q^2 below(i, j + 1) + p q (diagonal(i, j) + other(i, j))

LSLPN_END
