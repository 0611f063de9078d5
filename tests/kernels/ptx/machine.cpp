// Executes translated PTX on the host, a warp at a time: an instruction is carried out for 32 lanes
// at once, in vector registers where the compiler can, so that what a warp issues is counted as
// the hardware does, divergent branches included. `program.py` translates; `machine.py` calls.
//
// Written from the PTX ISA alone, which includes the layouts of matrix fragments: nothing here may
// be taken from the kernels that are tested with it.
//
// Lanes that part at a branch run one side after the other up to its immediate postdominator.
// Blocks run one after another on each host thread, the warps of a block in turns from barrier to
// barrier. What is checked: bounds and alignment of every access, against the allocations that the
// host has named (global) or the size of the launch (shared); lanes missing at a collective or a
// barrier; and, with `checked`, shared memory that is read before it is written or without a
// barrier between, and global memory that two blocks of a launch touch and one of them writes.
#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

namespace {

using u8 = std::uint8_t;
using s8 = std::int8_t;
using u16 = std::uint16_t;
using s16 = std::int16_t;
using u32 = std::uint32_t;
using s32 = std::int32_t;
using u64 = std::uint64_t;
using s64 = std::int64_t;

constexpr int kWarp = 32;
constexpr u32 kAll = ~0u;
// Where shared and local memory lie in the generic address space; no host has addresses up there.
constexpr u64 kSharedWindow = u64(1) << 56, kLocalWindow = u64(2) << 56, kWindow = u64(1) << 32;

template <class To, class From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

struct Fault {
  std::string text;
};

// ---- programs ----

struct Warp;
struct Code;
using Handler = void (*)(Warp&, const Code&, u32 lanes);

enum Kind : int { kPlain, kBranch, kExit, kBarrier };
constexpr int kOperands = 20;

// One instruction. Operands are offsets into a warp's registers; 0 is none.
struct Code {
  Handler run;
  int kind;
  u32 predicate;
  int negated;
  int target, reconverge;  // of a branch
  int count;               // of a vector; of the operands of a collective
  int width, width2;       // bytes of the containers of destination and source
  int flag;
  u32 used;  // bytes of a load that are used: the others need not be there
  s64 immediate;
  u32 operand[kOperands];
};

struct Program {
  std::vector<Code> code;
  std::vector<std::string> names;
  std::size_t registers = 0, parameters = 0, local = 0;
  struct Constant {
    u32 at;
    int width;
    u64 value;
  };
  std::vector<Constant> constants;
  u32 special[16] = {};
};

enum Special {
  kTidX,
  kTidY,
  kTidZ,
  kNtidX,
  kNtidY,
  kNtidZ,
  kCtaX,
  kCtaY,
  kCtaZ,
  kGridX,
  kGridY,
  kGridZ,
  kLane,
  kWarpId,
  kLaneLess,
  kSpecials
};

// ---- memory ----

struct Range {
  u64 begin, end;
  std::unique_ptr<std::atomic<u8>[]> sectors;   // read 1, written 2
  std::unique_ptr<std::atomic<u64>[]> touched;  // by byte, see `global_touch`
};

// Who touched a byte of shared memory last: 1 + a warp's clock, its number and the lane, and the
// last digits of the number of its store.
struct Touch {
  u32 clock = 0;
  u8 warp = 0, lane = 0;
  u16 store = 0;
};
constexpr u8 kManyLanes = 255;
struct Shadow {
  Touch write, read, other_read;  // the last reader, and the last one of another warp
};

struct Counters {
  std::vector<u64> issued, sectors, wavefronts;
};

struct Machine {
  std::map<u64, Range> memory;  // by its begin
  int threads = 1;
  bool checked = true, truncates = false, counts_sectors = false;
} machine;

struct Frame {
  int pc, reconverge;
  u32 lanes;
};

struct Copy {
  u32 target;
  u64 source;
  int bytes, copied, lane;
};

struct Block;

struct Warp {
  Block* block = nullptr;
  int number = 0, pc = 0, reconverge = 0;
  u32 active = 0, alive = 0;
  std::vector<Frame> stack;
  std::vector<u64> storage;
  char* registers = nullptr;
  std::vector<char> local;
  std::vector<std::vector<Copy>> groups;  // of asynchronous copies; the last one is still open
  std::vector<u32> clock;                 // what is known of each warp's
  u16 stores = 0;                         // into shared memory, so far
  int waits = -1;                         // for a barrier, of so many threads
  int expected = 0;
};

struct Block {
  const Program* program = nullptr;
  const char* parameters = nullptr;
  std::vector<char> shared;
  std::vector<Shadow> shadow;
  std::vector<Warp> warps;
  Counters counters;
  const Range* last = nullptr;  // that was accessed
  const Warp* running = nullptr;
  int threads = 0;
  u32 index[3] = {}, number = 0;
  std::map<int, int> arrived;  // threads at a barrier that do not wait there
};

template <class T>
T* lanes_of(Warp& w, u32 slot) {
  return reinterpret_cast<T*>(w.registers + slot);
}
u32& predicate_of(Warp& w, u32 slot) {
  return *reinterpret_cast<u32*>(w.registers + slot);
}
void set_predicate(Warp& w, u32 slot, u32 value, u32 m) {
  if (slot) predicate_of(w, slot) = (predicate_of(w, slot) & ~m) | (value & m);
}
u64 container(Warp& w, u32 slot, int width, int lane) {
  switch (width) {
    case 2:
      return lanes_of<u16>(w, slot)[lane];
    case 4:
      return lanes_of<u32>(w, slot)[lane];
    default:
      return lanes_of<u64>(w, slot)[lane];
  }
}
void set_container(Warp& w, u32 slot, int width, int lane, u64 value) {
  switch (width) {
    case 2:
      lanes_of<u16>(w, slot)[lane] = static_cast<u16>(value);
      break;
    case 4:
      lanes_of<u32>(w, slot)[lane] = static_cast<u32>(value);
      break;
    default:
      lanes_of<u64>(w, slot)[lane] = value;
  }
}

template <class F>
inline __attribute__((always_inline)) void each(u32 m, F f) {
  if (m == kAll) {
#pragma GCC ivdep
    for (int l = 0; l < kWarp; ++l) f(l);
  } else {
    for (u32 rest = m; rest; rest &= rest - 1) f(__builtin_ctz(rest));
  }
}

[[noreturn]] void fault(const std::string& text, int lane = -1) {
  throw Fault{lane < 0 ? text : text + ", lane " + std::to_string(lane)};
}
std::string hex(u64 value) {
  char text[32];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

// ---- numbers ----

float half_to_float(u16 h) {
  const u32 sign = u32(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
  if (exponent == 31) return bits<float>(sign | 0x7f800000 | fraction << 13);
  if (exponent == 0) {
    const float value = std::ldexp(static_cast<float>(fraction), -24);
    return sign ? -value : value;
  }
  return bits<float>(sign | (exponent + 112) << 23 | fraction << 13);
}
u16 float_to_half(float f) {
  const u32 b = bits<u32>(f);
  const u16 sign = static_cast<u16>(b >> 16 & 0x8000);
  const float size = std::fabs(f);
  if (size != size) return 0x7fff;
  if (size >= 65520.f) return sign | 0x7c00;
  // In units of the last place, which std::nearbyint rounds to nearest even.
  const int exponent = std::max(-14, size == 0 ? -14 : std::ilogb(size));
  const float units = std::nearbyint(std::ldexp(size, 10 - exponent));
  return sign | static_cast<u16>(((exponent + 14) << 10) + static_cast<int>(units));
}
float bfloat_to_float(u16 h) {
  return bits<float>(u32(h) << 16);
}
u16 float_to_bfloat(float f) {
  const u32 b = bits<u32>(f);
  if (f != f) return 0x7fff;
  return static_cast<u16>((b + 0x7fff + (b >> 16 & 1)) >> 16);
}
float flushed(float x) {
  return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.f, x) : x;
}

template <class To, class From>
To saturated(From x) {  // of a rounded floating number
  if (x != x) return 0;
  if (x <= static_cast<From>(std::numeric_limits<To>::min())) return std::numeric_limits<To>::min();
  if (x >= static_cast<From>(std::numeric_limits<To>::max())) return std::numeric_limits<To>::max();
  return static_cast<To>(x);
}

// ---- handlers of plain arithmetic ----

template <class D, class A, class F>
void unary(Warp& w, const Code& c, u32 m, F f) {
  D* d = lanes_of<D>(w, c.operand[0]);
  const A* a = lanes_of<A>(w, c.operand[1]);
  each(m, [&](int l) { d[l] = f(a[l]); });
}
template <class D, class A, class B, class F>
void binary(Warp& w, const Code& c, u32 m, F f) {
  D* d = lanes_of<D>(w, c.operand[0]);
  const A* a = lanes_of<A>(w, c.operand[1]);
  const B* b = lanes_of<B>(w, c.operand[2]);
  each(m, [&](int l) { d[l] = f(a[l], b[l]); });
}
template <class D, class A, class B, class C, class F>
void ternary(Warp& w, const Code& c, u32 m, F f) {
  D* d = lanes_of<D>(w, c.operand[0]);
  const A* a = lanes_of<A>(w, c.operand[1]);
  const B* b = lanes_of<B>(w, c.operand[2]);
  const C* e = lanes_of<C>(w, c.operand[3]);
  each(m, [&](int l) { d[l] = f(a[l], b[l], e[l]); });
}

// setp: p|q, a, b, and a predicate that `flag` joins (1 and, 2 or, 3 xor).
template <class T, class F>
void compare(Warp& w, const Code& c, u32 m, F f) {
  const T* a = lanes_of<T>(w, c.operand[2]);
  const T* b = lanes_of<T>(w, c.operand[3]);
  u32 result = 0;
  for (int l = 0; l < kWarp; ++l) result |= u32(f(a[l], b[l]) ? 1 : 0) << l;
  u32 opposite = ~result;
  if (c.flag) {
    const u32 other = predicate_of(w, c.operand[4]);
    const auto join = [&](u32 x) {
      return c.flag == 1 ? x & other : c.flag == 2 ? x | other : x ^ other;
    };
    result = join(result);
    opposite = join(opposite);
  }
  set_predicate(w, c.operand[0], result, m);
  set_predicate(w, c.operand[1], opposite, m);
}

using Table = std::map<std::string, Handler>;
#define UNARY(name, D, A, expression)                                          \
  t[name] = [](Warp& w, const Code& c, u32 m) {                                \
    unary<D, A>(w, c, m, [](A a) -> D { return static_cast<D>(expression); }); \
  }
#define BINARY(name, D, A, B, expression)                                               \
  t[name] = [](Warp& w, const Code& c, u32 m) {                                         \
    binary<D, A, B>(w, c, m, [](A a, B b) -> D { return static_cast<D>(expression); }); \
  }
#define TERNARY(name, D, A, B, C, expression)                                                    \
  t[name] = [](Warp& w, const Code& c, u32 m) {                                                  \
    ternary<D, A, B, C>(w, c, m, [](A a, B b, C e) -> D { return static_cast<D>(expression); }); \
  }
#define COMPARE(name, T, expression)                                  \
  t[name] = [](Warp& w, const Code& c, u32 m) {                       \
    compare<T>(w, c, m, [](T a, T b) -> bool { return expression; }); \
  }

template <class T, class F>
void division(Warp& w, const Code& c, u32 m, F f) {
  T* d = lanes_of<T>(w, c.operand[0]);
  const T* a = lanes_of<T>(w, c.operand[1]);
  const T* b = lanes_of<T>(w, c.operand[2]);
  for (u32 rest = m; rest; rest &= rest - 1) {
    const int l = __builtin_ctz(rest);
    if (b[l] == 0) fault("a division by zero", l);
    const bool overflows = std::is_signed_v<T> && b[l] == static_cast<T>(-1);
    d[l] = f(a[l], b[l], overflows);
  }
}

// Integers of one width, signed (S) and not (U), with twice the width (SS, UU).
template <class S, class U, class SS, class UU>
void integers(Table& t, const std::string& width) {
  constexpr u32 kBits = 8 * sizeof(U);
  using W = std::conditional_t<sizeof(U) == 2, u32, U>;  // does not overflow into a signed int
  for (const std::string& type : {"s" + width, "u" + width}) {
    BINARY("add." + type, U, U, U, W(a) + W(b));
    BINARY("sub." + type, U, U, U, W(a) - W(b));
    BINARY("mul.lo." + type, U, U, U, W(a) * W(b));
    TERNARY("mad.lo." + type, U, U, U, U, W(a) * W(b) + W(e));
  }
  UNARY("neg.s" + width, U, U, W(0) - W(a));
  UNARY("abs.s" + width, U, S, a < 0 ? W(0) - W(a) : W(a));
  BINARY("mul.hi.s" + width, S, S, S, SS(a) * SS(b) >> kBits);
  BINARY("mul.hi.u" + width, U, U, U, UU(a) * UU(b) >> kBits);
  if constexpr (sizeof(U) < 8) {
    BINARY("mul.wide.s" + width, SS, S, S, SS(a) * SS(b));
    BINARY("mul.wide.u" + width, UU, U, U, UU(a) * UU(b));
    TERNARY("mad.wide.s" + width, UU, S, S, UU, UU(SS(a) * SS(b)) + e);
    TERNARY("mad.wide.u" + width, UU, U, U, UU, UU(a) * UU(b) + e);
  }
  BINARY("min.s" + width, S, S, S, a < b ? a : b);
  BINARY("min.u" + width, U, U, U, a < b ? a : b);
  BINARY("max.s" + width, S, S, S, a < b ? b : a);
  BINARY("max.u" + width, U, U, U, a < b ? b : a);
  t["div.s" + width] = [](Warp& w, const Code& c, u32 m) {
    division<S>(w, c, m, [](S a, S b, bool over) { return over ? S(W(0) - W(a)) : S(a / b); });
  };
  t["rem.s" + width] = [](Warp& w, const Code& c, u32 m) {
    division<S>(w, c, m, [](S a, S b, bool over) { return over ? S(0) : S(a % b); });
  };
  t["div.u" + width] = [](Warp& w, const Code& c, u32 m) {
    division<U>(w, c, m, [](U a, U b, bool) { return U(a / b); });
  };
  t["rem.u" + width] = [](Warp& w, const Code& c, u32 m) {
    division<U>(w, c, m, [](U a, U b, bool) { return U(a % b); });
  };
  BINARY("and.b" + width, U, U, U, a & b);
  BINARY("or.b" + width, U, U, U, a | b);
  BINARY("xor.b" + width, U, U, U, a ^ b);
  UNARY("not.b" + width, U, U, ~a);
  UNARY("mov.b" + width, U, U, a);
  BINARY("shl.b" + width, U, U, u32, b >= kBits ? W(0) : W(W(a) << b));
  BINARY("shr.u" + width, U, U, u32, b >= kBits ? W(0) : W(W(a) >> b));
  BINARY("shr.s" + width, S, S, u32, a >> (b >= kBits ? kBits - 1 : b));
  UNARY("popc.b" + width, u32, U, __builtin_popcountll(a));
  UNARY("clz.b" + width, u32, U, a ? __builtin_clzll(a) - (64 - int(kBits)) : int(kBits));
  for (const std::string& type : {"s" + width, "u" + width, "b" + width}) {
    COMPARE("setp.eq." + type, U, a == b);
    COMPARE("setp.ne." + type, U, a != b);
  }
  COMPARE("setp.lt.s" + width, S, a < b);
  COMPARE("setp.le.s" + width, S, a <= b);
  COMPARE("setp.gt.s" + width, S, a > b);
  COMPARE("setp.ge.s" + width, S, a >= b);
  using Names = std::array<std::string, 4>;
  for (const Names& names : {Names{"lt", "le", "gt", "ge"}, Names{"lo", "ls", "hi", "hs"}}) {
    COMPARE("setp." + names[0] + ".u" + width, U, a < b);
    COMPARE("setp." + names[1] + ".u" + width, U, a <= b);
    COMPARE("setp." + names[2] + ".u" + width, U, a > b);
    COMPARE("setp." + names[3] + ".u" + width, U, a >= b);
  }
  t["selp.b" + width] = [](Warp& w, const Code& c, u32 m) {
    U* d = lanes_of<U>(w, c.operand[0]);
    const U* a = lanes_of<U>(w, c.operand[1]);
    const U* b = lanes_of<U>(w, c.operand[2]);
    const u32 p = predicate_of(w, c.operand[3]);
    each(m, [&](int l) { d[l] = p >> l & 1 ? a[l] : b[l]; });
  };
}

// The larger or the smaller of two: a number where one is NaN, unless `nan`; +0 above -0.
template <bool kMax, bool kNan, class T>
T extreme(T a, T b) {
  if (a != a || b != b) return kNan ? std::numeric_limits<T>::quiet_NaN() : a != a ? b : a;
  if (a == b) return (std::signbit(a) != 0) == kMax ? b : a;
  return (a < b) == kMax ? b : a;
}

template <class T>
void floats(Table& t, const std::string& type) {
  BINARY("add." + type, T, T, T, a + b);
  BINARY("sub." + type, T, T, T, a - b);
  BINARY("mul." + type, T, T, T, a * b);
  BINARY("div." + type, T, T, T, a / b);
  TERNARY("fma." + type, T, T, T, T, std::fma(a, b, e));
  UNARY("neg." + type, T, T, -a);
  UNARY("abs." + type, T, T, std::fabs(a));
  UNARY("sqrt." + type, T, T, std::sqrt(a));
  UNARY("rcp." + type, T, T, 1 / a);
  BINARY("min." + type, T, T, T, (extreme<false, false, T>(a, b)));
  BINARY("max." + type, T, T, T, (extreme<true, false, T>(a, b)));
  BINARY("min.NaN." + type, T, T, T, (extreme<false, true, T>(a, b)));
  BINARY("max.NaN." + type, T, T, T, (extreme<true, true, T>(a, b)));
  COMPARE("setp.eq." + type, T, a == b);
  COMPARE("setp.ne." + type, T, a < b || a > b);
  COMPARE("setp.lt." + type, T, a < b);
  COMPARE("setp.le." + type, T, a <= b);
  COMPARE("setp.gt." + type, T, a > b);
  COMPARE("setp.ge." + type, T, a >= b);
  COMPARE("setp.equ." + type, T, !(a < b || a > b));
  COMPARE("setp.neu." + type, T, a != b);
  COMPARE("setp.ltu." + type, T, !(a >= b));
  COMPARE("setp.leu." + type, T, !(a > b));
  COMPARE("setp.gtu." + type, T, !(a <= b));
  COMPARE("setp.geu." + type, T, !(a < b));
  COMPARE("setp.num." + type, T, a == a && b == b);
  COMPARE("setp.nan." + type, T, a != a || b != b);
}

// Two integers in a register of 32 bits.
void pairs_of_integers(Table& t) {
  for (const char* name : {"add.s16x2", "add.u16x2"}) {
    BINARY(name, u32, u32, u32, ((a + b) & 0xffff) | ((a & 0xffff0000) + (b & 0xffff0000)));
  }
}

// Two floats in a register of 64 bits.
template <class F>
u64 both(u64 a, u64 b, u64 e, F f) {
  u64 result = 0;
  for (const int shift : {0, 32}) {
    const auto half = [&](u64 x) { return bits<float>(static_cast<u32>(x >> shift)); };
    result |= static_cast<u64>(bits<u32>(f(half(a), half(b), half(e)))) << shift;
  }
  return result;
}
void pairs_of_floats(Table& t) {
  BINARY("add.f32x2", u64, u64, u64, both(a, b, 0, [](float x, float y, float) { return x + y; }));
  BINARY("sub.f32x2", u64, u64, u64, both(a, b, 0, [](float x, float y, float) { return x - y; }));
  BINARY("mul.f32x2", u64, u64, u64, both(a, b, 0, [](float x, float y, float) { return x * y; }));
  TERNARY("fma.f32x2", u64, u64, u64, u64,
          both(a, b, e, [](float x, float y, float z) { return std::fma(x, y, z); }));
}

// Factors and summands of half the width, for GPUs of compute capability 10.0 and later.
template <float (*wide)(u16)>
void mixed_floats(Table& t, const std::string& type) {
  BINARY("add.f32." + type, float, u16, float, wide(a) + b);
  BINARY("sub.f32." + type, float, u16, float, wide(a) - b);
  TERNARY("fma.f32." + type, float, u16, u16, float, std::fma(wide(a), wide(b), e));
}

void approximations(Table& t) {
  BINARY("div.full.f32", float, float, float, a / b);
  BINARY("div.approx.f32", float, float, float, a / b);
  UNARY("rcp.approx.f32", float, float, 1 / a);
  UNARY("sqrt.approx.f32", float, float, std::sqrt(a));
  UNARY("rsqrt.approx.f32", float, float, 1 / std::sqrt(double(a)));
  UNARY("ex2.approx.f32", float, float, std::exp2(double(a)));
  UNARY("lg2.approx.f32", float, float, std::log2(double(a)));
  UNARY("rcp.approx.ftz.f32", float, float, flushed(1 / flushed(a)));
  UNARY("sqrt.approx.ftz.f32", float, float, std::sqrt(flushed(a)));
  UNARY("rsqrt.approx.ftz.f32", float, float, 1 / std::sqrt(double(flushed(a))));
  UNARY("ex2.approx.ftz.f32", float, float,
        flushed(static_cast<float>(std::exp2(double(flushed(a))))));
  UNARY("lg2.approx.ftz.f32", float, float, std::log2(double(flushed(a))));
  BINARY("add.ftz.f32", float, float, float, flushed(flushed(a) + flushed(b)));
  BINARY("sub.ftz.f32", float, float, float, flushed(flushed(a) - flushed(b)));
  BINARY("mul.ftz.f32", float, float, float, flushed(flushed(a) * flushed(b)));
  BINARY("div.full.ftz.f32", float, float, float, flushed(flushed(a) / flushed(b)));
  BINARY("div.approx.ftz.f32", float, float, float, flushed(flushed(a) / flushed(b)));
  TERNARY("fma.ftz.f32", float, float, float, float,
          flushed(std::fma(flushed(a), flushed(b), flushed(e))));
}

// ---- conversions ----

template <class D, class S, class F>
void convert(Warp& w, const Code& c, u32 m, F f) {
  if (c.width == sizeof(D) && c.width2 == sizeof(S)) {
    unary<D, S>(w, c, m, f);
    return;
  }
  // Types narrower than their registers: extended as the destination's type says.
  using Wide = std::conditional_t<std::is_signed_v<D>, s64, u64>;
  each(m, [&](int l) {
    const u64 source = container(w, c.operand[1], c.width2, l);
    S s;
    std::memcpy(&s, &source, sizeof s);
    const D d = f(s);
    u64 value = 0;
    if constexpr (std::is_integral_v<D>) {
      value = static_cast<u64>(static_cast<Wide>(d));
    } else {
      std::memcpy(&value, &d, sizeof d);
    }
    set_container(w, c.operand[0], c.width, l, value);
  });
}
#define CONVERT(name, D, S, expression)                                          \
  t[name] = [](Warp& w, const Code& c, u32 m) {                                  \
    convert<D, S>(w, c, m, [](S a) -> D { return static_cast<D>(expression); }); \
  }

template <class D, class S>
void convert_integers(Table& t, const std::string& d, const std::string& s) {
  CONVERT("cvt." + d + "." + s, D, S, a);
}
template <class I>
void convert_integer(Table& t, const std::string& name) {
  convert_integers<s8, I>(t, "s8", name);
  convert_integers<u8, I>(t, "u8", name);
  convert_integers<s16, I>(t, "s16", name);
  convert_integers<u16, I>(t, "u16", name);
  convert_integers<s32, I>(t, "s32", name);
  convert_integers<u32, I>(t, "u32", name);
  convert_integers<s64, I>(t, "s64", name);
  convert_integers<u64, I>(t, "u64", name);
  CONVERT("cvt.rn.f32." + name, float, I, a);
  CONVERT("cvt.rn.f64." + name, double, I, a);
  CONVERT("cvt.rzi." + name + ".f32", I, float, saturated<I>(std::trunc(a)));
  CONVERT("cvt.rni." + name + ".f32", I, float, saturated<I>(std::nearbyint(a)));
  CONVERT("cvt.rmi." + name + ".f32", I, float, saturated<I>(std::floor(a)));
  CONVERT("cvt.rpi." + name + ".f32", I, float, saturated<I>(std::ceil(a)));
  CONVERT("cvt.rzi." + name + ".f64", I, double, saturated<I>(std::trunc(a)));
  CONVERT("cvt.rni." + name + ".f64", I, double, saturated<I>(std::nearbyint(a)));
}

void conversions(Table& t) {
  convert_integer<s8>(t, "s8");
  convert_integer<u8>(t, "u8");
  convert_integer<s16>(t, "s16");
  convert_integer<u16>(t, "u16");
  convert_integer<s32>(t, "s32");
  convert_integer<u32>(t, "u32");
  convert_integer<s64>(t, "s64");
  convert_integer<u64>(t, "u64");
  CONVERT("cvt.f64.f32", double, float, a);
  CONVERT("cvt.rn.f32.f64", float, double, a);
  CONVERT("cvt.rzi.f32.f32", float, float, std::trunc(a));
  CONVERT("cvt.rni.f32.f32", float, float, std::nearbyint(a));
  CONVERT("cvt.rmi.f32.f32", float, float, std::floor(a));
  CONVERT("cvt.rpi.f32.f32", float, float, std::ceil(a));
  CONVERT("cvt.f32.f16", float, u16, half_to_float(a));
  CONVERT("cvt.f32.bf16", float, u16, bfloat_to_float(a));
  CONVERT("cvt.rn.f16.f32", u16, float, float_to_half(a));
  CONVERT("cvt.rn.bf16.f32", u16, float, float_to_bfloat(a));
  // To the 11 bits of a TF32, ties away from zero.
  CONVERT("cvt.rna.tf32.f32", u32, float, a == a ? (bits<u32>(a) + 0x1000) & ~0x1fffu : 0x7fffffff);
  BINARY("cvt.rn.f16x2.f32", u32, float, float, u32(float_to_half(a)) << 16 | float_to_half(b));
  BINARY("cvt.rn.bf16x2.f32", u32, float, float,
         u32(float_to_bfloat(a)) << 16 | float_to_bfloat(b));
}

// ---- bits ----

u32 permuted(u32 a, u32 b, u32 selector) {
  const u64 both = u64(b) << 32 | a;
  u32 result = 0;
  for (int i = 0; i < 4; ++i) {
    const u32 choice = selector >> (4 * i) & 15;
    u32 byte = static_cast<u8>(both >> (8 * (choice & 7)));
    if (choice & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << (8 * i);
  }
  return result;
}
u32 logic(u32 a, u32 b, u32 c, u32 table) {
  u32 result = 0;
  for (int i = 0; i < 8; ++i) {
    if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  }
  return result;
}
u32 field(u32 a, u32 position, u32 length) {
  position &= 255;
  length &= 255;
  const u32 rest = position < 32 ? a >> position : 0;
  return length >= 32 ? rest : rest & ((1u << length) - 1);
}
u32 signed_field(u32 a, u32 position, u32 length) {
  position &= 255;
  length &= 255;
  if (length == 0) return 0;
  const u32 sign = a >> std::min(position + length - 1, 31u) & 1;
  u32 result = field(a, position, length);
  const u32 there = position >= 32 ? 0 : std::min(length, 32 - position);
  if (sign && there < 32) result |= kAll << there;
  return result;
}
u32 inserted(u32 a, u32 b, u32 position, u32 length) {
  position &= 255;
  length = std::min(length & 255, 32u);
  if (position >= 32 || length == 0) return b;
  const u32 mask = (length >= 32 ? kAll : (1u << length) - 1) << position;
  return (a << position & mask) | (b & ~mask);
}

// Two numbers of 16 bits by two of 8, the latter from bit kShift on.
template <class A, class B, int kShift>
void dot_product(Warp& w, const Code& c, u32 m) {
  ternary<u32, u32, u32, u32>(w, c, m, [](u32 a, u32 b, u32 e) {
    const auto product = [&](int i) {
      return s64(static_cast<A>(a >> (16 * i))) * static_cast<B>(b >> (kShift + 8 * i));
    };
    return static_cast<u32>(e + product(0) + product(1));
  });
}
template <int kShift, class F>
void dot_products(F enter) {
  enter("u32.u32", dot_product<u16, u8, kShift>);
  enter("u32.s32", dot_product<u16, s8, kShift>);
  enter("s32.u32", dot_product<s16, u8, kShift>);
  enter("s32.s32", dot_product<s16, s8, kShift>);
}

void shuffles_of_bits(Table& t) {
  TERNARY("prmt.b32", u32, u32, u32, u32, permuted(a, b, e));
  dot_products<0>([&](const std::string& types, Handler f) { t["dp2a.lo." + types] = f; });
  dot_products<16>([&](const std::string& types, Handler f) { t["dp2a.hi." + types] = f; });
  TERNARY("bfe.u32", u32, u32, u32, u32, field(a, b, e));
  TERNARY("bfe.s32", u32, u32, u32, u32, signed_field(a, b, e));
  TERNARY("shf.l.wrap.b32", u32, u32, u32, u32, (u64(b) << 32 | a) << (e & 31) >> 32);
  TERNARY("shf.r.wrap.b32", u32, u32, u32, u32, (u64(b) << 32 | a) >> (e & 31));
  TERNARY("shf.l.clamp.b32", u32, u32, u32, u32, e >= 32 ? a : (u64(b) << 32 | a) << e >> 32);
  TERNARY("shf.r.clamp.b32", u32, u32, u32, u32, e >= 32 ? b : (u64(b) << 32 | a) >> e);
  UNARY("brev.b32", u32, u32, [](u32 x) {
    u32 r = 0;
    for (int i = 0; i < 32; ++i) r |= (x >> i & 1) << (31 - i);
    return r;
  }(a));
  t["lop3.b32"] = [](Warp& w, const Code& c, u32 m) {
    u32* d = lanes_of<u32>(w, c.operand[0]);
    const u32 *a = lanes_of<u32>(w, c.operand[1]), *b = lanes_of<u32>(w, c.operand[2]),
              *e = lanes_of<u32>(w, c.operand[3]);
    const u32 table = lanes_of<u32>(w, c.operand[4])[0];
    each(m, [&](int l) { d[l] = logic(a[l], b[l], e[l], table); });
  };
  t["bfi.b32"] = [](Warp& w, const Code& c, u32 m) {
    u32* d = lanes_of<u32>(w, c.operand[0]);
    const u32 *a = lanes_of<u32>(w, c.operand[1]), *b = lanes_of<u32>(w, c.operand[2]),
              *p = lanes_of<u32>(w, c.operand[3]), *n = lanes_of<u32>(w, c.operand[4]);
    each(m, [&](int l) { d[l] = inserted(a[l], b[l], p[l], n[l]); });
  };
  // mov of a vector into a register, and the other way round; `width` is that of the parts.
  t["pack"] = [](Warp& w, const Code& c, u32 m) {
    each(m, [&](int l) {
      u64 value = 0;
      for (int i = 0; i < c.count; ++i) {
        value |= container(w, c.operand[1 + i], c.width, l) << (8 * c.width * i);
      }
      set_container(w, c.operand[0], c.width * c.count, l, value);
    });
  };
  t["unpack"] = [](Warp& w, const Code& c, u32 m) {
    each(m, [&](int l) {
      const u64 value = container(w, c.operand[0], c.width * c.count, l);
      for (int i = 0; i < c.count; ++i) {
        if (c.operand[1 + i]) {
          set_container(w, c.operand[1 + i], c.width, l, value >> (8 * c.width * i));
        }
      }
    });
  };
}

#define PREDICATE(name, expression)                               \
  t[name] = [](Warp& w, const Code& c, u32 m) {                   \
    const u32 a = predicate_of(w, c.operand[1]);                  \
    [[maybe_unused]] const u32 b = predicate_of(w, c.operand[2]); \
    set_predicate(w, c.operand[0], expression, m);                \
  }
void predicates(Table& t) {
  PREDICATE("mov.pred", a);
  PREDICATE("not.pred", ~a);
  PREDICATE("and.pred", a & b);
  PREDICATE("or.pred", a | b);
  PREDICATE("xor.pred", a ^ b);
}

// ---- shared memory ----

// Whether a touch is ordered before what a lane does now.
bool ordered(const Touch& touch, const Warp& w, int lane) {
  if (touch.clock == 0 || touch.clock - 1 < w.clock[touch.warp]) return true;
  return touch.warp == w.number && touch.lane == lane;
}
[[noreturn]] void race(const char* what, const Touch& other, u64 at, int lane) {
  const std::string who =
      other.lane == kManyLanes ? "several lanes" : "lane " + std::to_string(other.lane);
  fault(std::string("shared byte ") + std::to_string(at) + " is " + what + " warp " +
            std::to_string(other.warp) + ", " + who + ", without a barrier between",
        lane);
}
void shared_read(Warp& w, u64 at, int bytes, int lane, u32 used) {
  if (!machine.checked) return;
  const u32 now = 1 + w.clock[w.number];
  for (int i = 0; i < bytes; ++i) {
    if (!(used >> i & 1)) continue;
    Shadow& s = w.block->shadow[at + i];
    if (s.write.clock == 0)
      fault("shared byte " + std::to_string(at + i) + " is read and was never written", lane);
    if (!ordered(s.write, w, lane)) race("read after it was written by", s.write, at + i, lane);
    if (s.read.warp == w.number && s.read.clock == now) {
      if (s.read.lane != lane) s.read.lane = kManyLanes;
      continue;
    }
    if (s.read.warp != w.number) s.other_read = s.read;
    s.read = {now, static_cast<u8>(w.number), static_cast<u8>(lane), 0};
  }
}
void shared_write(Warp& w, u64 at, const void* data, int bytes, int lane) {
  char* target = w.block->shared.data() + at;
  if (machine.checked) {
    for (int i = 0; i < bytes; ++i) {
      Shadow& s = w.block->shadow[at + i];
      // Where lanes write to one place at a time, one of them wins; and what holds the same value
      // twice may write it twice.
      const bool harmless = (s.write.warp == w.number && s.write.store == w.stores) ||
                            target[i] == static_cast<const char*>(data)[i];
      if (!harmless && !ordered(s.write, w, lane)) {
        race("written after it was written by", s.write, at + i, lane);
      }
      for (const Touch& read : {s.read, s.other_read}) {
        if (!ordered(read, w, lane)) race("written after it was read by", read, at + i, lane);
      }
      s.write = {1 + w.clock[w.number], static_cast<u8>(w.number), static_cast<u8>(lane), w.stores};
    }
  }
  std::memcpy(target, data, bytes);
}
void shared_bounds(Warp& w, u64 at, int bytes, int lane) {
  const u64 size = w.block->shared.size();
  if (at % bytes) {
    fault("a misaligned access to shared memory, " + std::to_string(bytes) + " bytes at " +
              std::to_string(at),
          lane);
  }
  if (at + bytes > size || at + bytes < at) {
    fault("an access out of bounds: shared bytes " + std::to_string(at) + " to " +
              std::to_string(at + bytes) + " of " + std::to_string(size),
          lane);
  }
}
// Wavefronts of an access: 32 banks of 4 bytes; accesses of 8 and 16 bytes go in two and four
// parts.
void count_wavefronts(Warp& w, int pc, const u64* at, u32 m, int bytes) {
  const int lanes = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
  u64 total = 0;
  for (int begin = 0; begin < kWarp; begin += lanes) {
    u64 words[kWarp * 4];
    int n = 0;
    u8 of_bank[32] = {};
    u8 most = 0;
    for (int l = begin; l < begin + lanes; ++l) {
      if (!(m >> l & 1)) continue;
      for (int i = 0; i < bytes; i += 4) {
        const u64 word = (at[l] + i) / 4;
        bool seen = false;
        for (int k = n - 1; k >= 0 && !seen; --k) seen = words[k] == word;
        if (seen) continue;
        words[n++] = word;
        most = std::max<u8>(most, ++of_bank[word % 32]);
      }
    }
    total += most;
  }
  w.block->counters.wavefronts[pc] += total;
}

// ---- global memory ----

const Range& range_of(Warp& w, u64 at, int bytes, int lane) {
  const Range* r = w.block->last;
  if (!r || at < r->begin || at + bytes > r->end) {
    auto next = machine.memory.upper_bound(at);
    if (next == machine.memory.begin()) {
      fault("an access out of bounds: " + std::to_string(bytes) + " global bytes at " + hex(at),
            lane);
    }
    r = &std::prev(next)->second;
    if (at + bytes > r->end) {
      fault("an access out of bounds: " + std::to_string(bytes) + " global bytes at " + hex(at) +
                ", " + std::to_string(s64(at + bytes - r->end)) +
                " beyond the end of an allocation of " + std::to_string(r->end - r->begin),
            lane);
    }
    w.block->last = r;
  }
  if (at % bytes) {
    fault("a misaligned access to global memory, " + std::to_string(bytes) + " bytes at " + hex(at),
          lane);
  }
  return *r;
}
// Blocks of a launch have no order, so none may touch what another one writes, but by atomic
// operations. A byte's writer is kept in the lower half, 1 + its block, and its reader in the upper
// one.
constexpr u32 kManyBlocks = ~0u;
void global_touch(Warp& w, const Range& r, u64 at, int bytes, int lane, bool writes) {
  if (!machine.checked) return;
  const u32 mine = w.block->number + 1;
  for (u64 byte = at - r.begin; byte < at - r.begin + bytes; ++byte) {
    const u64 before = r.touched[byte].load(std::memory_order_relaxed);
    u32 writer = static_cast<u32>(before), reader = static_cast<u32>(before >> 32);
    const char* how = writer && writer != mine ? "written" : nullptr;
    if (!how && writes && reader && reader != mine) how = "read";
    if (how) {
      const u32 other = writer && writer != mine ? writer : reader;
      fault(std::string("global byte ") + hex(at) + " is " + (writes ? "written" : "read") +
                " and was " + how + " by " +
                (other == kManyBlocks ? "other blocks" : "block " + std::to_string(other - 1)) +
                " of the launch",
            lane);
    }
    if (writes) {
      writer = mine;
    } else {
      reader = reader && reader != mine ? kManyBlocks : mine;
    }
    const u64 after = static_cast<u64>(reader) << 32 | writer;
    if (after != before) r.touched[byte].store(after, std::memory_order_relaxed);
  }
}
void count_sectors(Warp& w, int pc, const u64* at, u32 m, int bytes, u8 how) {
  u64 found[kWarp];  // an aligned access lies in one sector
  int n = 0;
  for (u32 rest = m; rest; rest &= rest - 1) {
    const int l = __builtin_ctz(rest);
    const u64 sector = at[l] / 32;
    bool seen = false;
    for (int k = n - 1; k >= 0 && !seen; --k) seen = found[k] == sector;
    if (seen) continue;
    found[n++] = sector;
    const Range& r = range_of(w, at[l], bytes, l);
    std::atomic<u8>& flags = r.sectors[sector - r.begin / 32];
    const u8 now = flags.load(std::memory_order_relaxed);
    if ((now & how) != how) flags.fetch_or(how, std::memory_order_relaxed);
  }
  w.block->counters.sectors[pc] += n;
}

// ---- loads and stores ----

enum Space { kGlobal, kShared, kParam, kLocal, kGeneric };

void addresses(Warp& w, const Code& c, u32 slot, int width, u32 m, u64* at) {
  each(m, [&](int l) {
    const u64 base = slot ? container(w, slot, width, l) : 0;
    at[l] = width == 4 ? u32(base + c.immediate) : base + c.immediate;
  });
}
// The space that a generic address lies in, and the address in there.
Space place(Space space, u64& at) {
  if (space != kGeneric) return space;
  for (const auto& [window, inside] : {std::pair{kSharedWindow, kShared}, {kLocalWindow, kLocal}}) {
    if (at >= window && at < window + kWindow) {
      at -= window;
      return inside;
    }
  }
  return kGlobal;
}
char* local_memory(Warp& w, u64 at, int bytes, int lane) {
  const std::size_t size = w.block->program->local;
  if (at % bytes || at + bytes > size)
    fault("a bad access to local memory at " + std::to_string(at), lane);
  return w.local.data() + lane * size + at;
}

void count_access(Warp& w, const u64* at, u32 m, Space space, int bytes, u8 how) {
  const int pc = w.pc - 1;
  u32 shared = space == kShared ? m : 0, global = space == kGlobal ? m : 0;
  u64 inside[kWarp];
  if (space == kGeneric) {
    for (u32 rest = m; rest; rest &= rest - 1) {
      const int l = __builtin_ctz(rest);
      inside[l] = at[l];
      const Space where = place(space, inside[l]);
      (where == kShared ? shared : where == kGlobal ? global : m) |= 1u << l;
    }
    at = inside;
  }
  if (shared) count_wavefronts(w, pc, at, shared, bytes);
  if (global) count_sectors(w, pc, at, global, bytes, how);
}

// T is what one element is in memory. Operands: the address, then the registers; `width` is theirs.
template <class T, Space kSpace>
void load(Warp& w, const Code& c, u32 m) {
  if (kSpace == kParam && !c.operand[0] && c.width == sizeof(T)) {  // the same for all lanes
    const u64 end = c.immediate + c.count * sizeof(T);
    if (end > w.block->program->parameters) fault("a bad access to the parameters");
    for (int i = 0; i < c.count; ++i) {
      T value;
      std::memcpy(&value, w.block->parameters + c.immediate + i * sizeof(T), sizeof(T));
      if (!c.operand[1 + i]) continue;
      T* d = lanes_of<T>(w, c.operand[1 + i]);
      each(m, [&](int l) { d[l] = value; });
    }
    return;
  }
  u64 at[kWarp];
  addresses(w, c, c.operand[0], c.width2, m, at);
  const int bytes = c.count * sizeof(T);
  for (u32 rest = m; rest; rest &= rest - 1) {
    const int l = __builtin_ctz(rest);
    u64 here = at[l];
    const char* source = nullptr;
    switch (place(kSpace, here)) {
      case kShared:
        shared_bounds(w, here, bytes, l);
        shared_read(w, here, bytes, l, c.used);
        source = w.block->shared.data() + here;
        break;
      case kParam:
        if (here + bytes > w.block->program->parameters || here % bytes)
          fault("a bad access to the parameters", l);
        source = w.block->parameters + here;
        break;
      case kLocal:
        source = local_memory(w, here, bytes, l);
        break;
      default:
        global_touch(w, range_of(w, here, bytes, l), here, bytes, l, false);
        source = reinterpret_cast<const char*>(here);
    }
    T value[8];
    std::memcpy(value, source, bytes);
    for (int i = 0; i < c.count; ++i) {
      const u32 d = c.operand[1 + i];
      if (!d) continue;
      if (c.width == sizeof(T)) {
        lanes_of<T>(w, d)[l] = value[i];
      } else {
        using Wide = std::conditional_t<std::is_signed_v<T>, s64, u64>;
        set_container(w, d, c.width, l, static_cast<u64>(static_cast<Wide>(value[i])));
      }
    }
  }
  if (machine.counts_sectors && kSpace != kParam && kSpace != kLocal)
    count_access(w, at, m, kSpace, bytes, 1);
}
template <class T, Space kSpace>
void store(Warp& w, const Code& c, u32 m) {
  u64 at[kWarp];
  addresses(w, c, c.operand[0], c.width2, m, at);
  const int bytes = c.count * sizeof(T);
  ++w.stores;
  for (u32 rest = m; rest; rest &= rest - 1) {
    const int l = __builtin_ctz(rest);
    T value[8];
    for (int i = 0; i < c.count; ++i) {
      value[i] = static_cast<T>(container(w, c.operand[1 + i], c.width, l));
    }
    u64 here = at[l];
    switch (place(kSpace, here)) {
      case kShared:
        shared_bounds(w, here, bytes, l);
        shared_write(w, here, value, bytes, l);
        break;
      case kLocal:
        std::memcpy(local_memory(w, here, bytes, l), value, bytes);
        break;
      default:
        global_touch(w, range_of(w, here, bytes, l), here, bytes, l, true);
        std::memcpy(reinterpret_cast<char*>(here), value, bytes);
    }
  }
  if (machine.counts_sectors && kSpace != kLocal) count_access(w, at, m, kSpace, bytes, 2);
}

template <Space kSpace>
void accesses(Table& t, const std::string& space) {
  t["ld" + space + ".u8"] = load<u8, kSpace>;
  t["ld" + space + ".s8"] = load<s8, kSpace>;
  t["ld" + space + ".u16"] = load<u16, kSpace>;
  t["ld" + space + ".s16"] = load<s16, kSpace>;
  t["ld" + space + ".u32"] = load<u32, kSpace>;
  t["ld" + space + ".s32"] = load<s32, kSpace>;
  t["ld" + space + ".u64"] = load<u64, kSpace>;
  if (kSpace == kParam) return;
  t["st" + space + ".u8"] = store<u8, kSpace>;
  t["st" + space + ".u16"] = store<u16, kSpace>;
  t["st" + space + ".u32"] = store<u32, kSpace>;
  t["st" + space + ".u64"] = store<u64, kSpace>;
}

// Atomic operations, `d` the old value (or none). The lanes of a warp take turns.
template <class T, Space kSpace, class F>
void atomic(Warp& w, const Code& c, u32 m, F f) {
  u64 at[kWarp];
  addresses(w, c, c.operand[1], c.width2, m, at);
  using Bits = std::conditional_t<sizeof(T) == 4, u32, u64>;
  for (u32 rest = m; rest; rest &= rest - 1) {
    const int l = __builtin_ctz(rest);
    u64 here = at[l];
    Bits* memory = nullptr;
    if (place(kSpace, here) == kShared) {
      shared_bounds(w, here, sizeof(T), l);
      memory = reinterpret_cast<Bits*>(w.block->shared.data() + here);
    } else {
      range_of(w, here, sizeof(T), l);
      memory = reinterpret_cast<Bits*>(here);
    }
    const T b = lanes_of<T>(w, c.operand[2])[l];
    const T e = c.operand[3] ? lanes_of<T>(w, c.operand[3])[l] : T();
    Bits old = __atomic_load_n(memory, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(memory, &old,
                                        bits<Bits>(static_cast<T>(f(bits<T>(old), b, e))), false,
                                        __ATOMIC_SEQ_CST, __ATOMIC_RELAXED)) {
    }
    if (c.operand[0]) lanes_of<Bits>(w, c.operand[0])[l] = old;
  }
  if (machine.counts_sectors) count_access(w, at, m, kSpace, sizeof(T), 3);
}
#define ATOMIC(name, T, expression)                                                        \
  t["atom" + space + "." + name] = [](Warp& w, const Code& c, u32 m) {                     \
    atomic<T, kSpace>(w, c, m, [](T a, T b, [[maybe_unused]] T e) { return expression; }); \
  }
template <Space kSpace>
void atomics(Table& t, const std::string& space) {
  ATOMIC("add.u32", u32, a + b);
  ATOMIC("add.s32", u32, a + b);
  ATOMIC("add.u64", u64, a + b);
  ATOMIC("add.f32", float, a + b);
  ATOMIC("add.f64", double, a + b);
  ATOMIC("min.u32", u32, a < b ? a : b);
  ATOMIC("max.u32", u32, a < b ? b : a);
  ATOMIC("min.s32", s32, a < b ? a : b);
  ATOMIC("max.s32", s32, a < b ? b : a);
  ATOMIC("and.b32", u32, a & b);
  ATOMIC("or.b32", u32, a | b);
  ATOMIC("xor.b32", u32, a ^ b);
  ATOMIC("exch.b32", u32, ((void)a, b));
  ATOMIC("exch.b64", u64, ((void)a, b));
  ATOMIC("cas.b32", u32, a == b ? e : a);
  ATOMIC("cas.b64", u64, a == b ? e : a);
}

// cp.async: shared and global address, bytes (immediate of `count`), and how many of them are read,
// the rest being zeros. They arrive when they are waited for; until then their place counts as
// never written.
void copy_async(Warp& w, const Code& c, u32 m) {
  u64 source[kWarp];
  each(m, [&](int l) { source[l] = lanes_of<u64>(w, c.operand[1])[l] + c.immediate; });
  if (w.groups.empty()) w.groups.emplace_back();
  u64 at[kWarp];
  u32 reading = 0;
  for (u32 rest = m; rest; rest &= rest - 1) {
    const int l = __builtin_ctz(rest);
    const u64 target = u32(container(w, c.operand[0], c.width2, l) + c.flag);
    at[l] = target;
    const int copied =
        c.operand[2] ? std::min<int>(c.count, lanes_of<u32>(w, c.operand[2])[l]) : c.count;
    shared_bounds(w, target, c.count, l);
    if (copied) {
      reading |= 1u << l;
      if (source[l] % c.count) fault("a misaligned asynchronous copy from " + hex(source[l]), l);
      range_of(w, source[l], copied == c.count ? c.count : 1, l);
      global_touch(w, range_of(w, source[l] + copied - 1, 1, l), source[l], copied, l, false);
    }
    if (machine.checked) {
      for (int i = 0; i < c.count; ++i) {
        Shadow& s = w.block->shadow[target + i];
        for (const Touch& touch : {s.write, s.read, s.other_read}) {
          if (!ordered(touch, w, l))
            race("overwritten by a copy after it was used by", touch, target + i, l);
        }
        s.write = {};
      }
    }
    std::memset(w.block->shared.data() + target, 0xff, c.count);
    w.groups.back().push_back({u32(target), source[l], c.count, copied, l});
  }
  if (machine.counts_sectors) {
    count_wavefronts(w, w.pc - 1, at, m, c.count);
    if (reading) count_sectors(w, w.pc - 1, source, reading, c.count, 1);
  }
}
void copies_arrive(Warp& w, std::size_t pending) {
  ++w.stores;
  std::size_t done = w.groups.size() > pending ? w.groups.size() - pending : 0;
  for (std::size_t g = 0; g < done; ++g) {
    for (const Copy& copy : w.groups[g]) {
      char data[16] = {};
      std::memcpy(data, reinterpret_cast<const char*>(copy.source), copy.copied);
      shared_write(w, copy.target, data, copy.bytes, copy.lane);
    }
  }
  w.groups.erase(w.groups.begin(), w.groups.begin() + s64(done));
}

void copies(Table& t) {
  t["cp.async"] = copy_async;
  t["cp.async.commit_group"] = [](Warp& w, const Code&, u32) {
    if (w.groups.empty()) w.groups.emplace_back();
    w.groups.emplace_back();
  };
  t["cp.async.wait_all"] = [](Warp& w, const Code&, u32) { copies_arrive(w, 0); };
  t["cp.async.wait_group"] = [](Warp& w, const Code& c, u32) {
    copies_arrive(w,
                  static_cast<std::size_t>(c.immediate) + 1);  // the open group is not one of them
  };
}

// ---- collectives ----

// All lanes of a mask that have not ended must be here.
void expect_together(Warp& w, u32 mask, u32 m) {
  if ((mask & w.alive) != m) {
    fault("lanes " + hex(m) + " of a warp are here, and lanes " + hex(mask & w.alive) +
          " should be");
  }
}

enum ShuffleMode { kUp, kDown, kXor, kIndex };
// Operands: d, p, a, b, c, mask.
template <ShuffleMode kMode>
void shuffle(Warp& w, const Code& c, u32 m) {
  const u32 *a = lanes_of<u32>(w, c.operand[2]), *b = lanes_of<u32>(w, c.operand[3]),
            *e = lanes_of<u32>(w, c.operand[4]);
  expect_together(w, lanes_of<u32>(w, c.operand[5])[__builtin_ctz(m)], m);
  u32 result[kWarp], inside = 0;
  for (u32 rest = m; rest; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    const int value = b[lane] & 31, clamp = e[lane] & 31, segment = e[lane] >> 8 & 31;
    const int last = (lane & segment) | (clamp & ~segment), first = lane & segment;
    int from = 0;
    bool valid = false;
    switch (kMode) {
      case kUp:
        from = lane - value;
        valid = from >= last;
        break;
      case kDown:
        from = lane + value;
        valid = from <= last;
        break;
      case kXor:
        from = lane ^ value;
        valid = from <= last;
        break;
      case kIndex:
        from = first | (value & ~segment);
        valid = from <= last;
        break;
    }
    if (!valid) from = lane;
    if (!(m >> from & 1))
      fault("a shuffle from lane " + std::to_string(from) + ", which is not there,", lane);
    result[lane] = a[from];
    inside |= u32(valid) << lane;
  }
  u32* d = lanes_of<u32>(w, c.operand[0]);
  each(m, [&](int l) { d[l] = result[l]; });
  set_predicate(w, c.operand[1], inside, m);
}

// Sums products as the tensor cores do: exactly, then rounded to nearest; or, where the machine
// `truncates`, in groups of `group` products (Fasi, Higham, Mikaitis, Pranesh 2021): products are
// exact, all addends are aligned to the largest and cut off `kExtraBits` below its last bit of 24;
// the sum is cut off to 24 bits. So many extra bits, and the groups, are those of the GPUs of
// 2020 and 2022. With fewer of them less is lost: what is cut off has either sign then.
constexpr int kExtraBits = 2;
float accumulated(float start, const double* products, int stride, int n, int group) {
  if (!machine.truncates) {
    double sum = start;
    for (int k = 0; k < n; ++k) sum += products[k * stride];
    return static_cast<float>(sum);
  }
  float sum = start;
  for (int begin = 0; begin < n; begin += group) {
    double largest = std::fabs(double(sum));
    bool finite = std::isfinite(sum);
    double plain = sum;
    for (int k = begin; k < begin + group; ++k) {
      const double p = products[k * stride];
      largest = std::max(largest, std::fabs(p));
      finite = finite && std::isfinite(p);
      plain += p;
    }
    if (!finite || largest == 0) {
      sum = static_cast<float>(plain);
      continue;
    }
    const double unit = std::ldexp(1.0, std::ilogb(largest) - 23 - kExtraBits);
    double units = std::trunc(sum / unit);
    for (int k = begin; k < begin + group; ++k) units += std::trunc(products[k * stride] / unit);
    const double exact = units * unit;
    float cut = static_cast<float>(exact);
    if (std::fabs(double(cut)) > std::fabs(exact)) cut = std::nextafter(cut, 0.f);
    sum = cut;
  }
  return sum;
}

struct Element {  // row and column of a lane's i-th element, PTX ISA, "Matrix Fragments for mma"
  int row, column;
};
enum Type { kHalf, kBFloat, kTf32 };
template <Type kType, int K>
Element element_a(int lane, int i) {
  const int group = lane >> 2, in_group = lane % 4;
  if (kType == kTf32) return {group + (i == 1 || i == 3 ? 8 : 0), in_group + (i >= 2 ? 4 : 0)};
  if (K == 8) return {group + (i < 2 ? 0 : 8), in_group * 2 + (i & 1)};
  return {group + (i < 2 || (i >= 4 && i < 6) ? 0 : 8), in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0)};
}
template <Type kType, int K>
Element element_b(int lane, int i) {
  const int group = lane >> 2, in_group = lane % 4;
  if (kType == kTf32) return {in_group + (i >= 1 ? 4 : 0), group};
  return {in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0), group};
}
inline Element element_c(int lane, int i) {
  return {(lane >> 2) + (i < 2 ? 0 : 8), lane % 4 * 2 + (i & 1)};
}
template <Type kType>
double number(u32 word, int i) {
  if (kType == kTf32) return bits<float>(word & ~0x1fffu);
  const u16 half = static_cast<u16>(word >> (16 * (i & 1)));
  return kType == kHalf ? half_to_float(half) : bfloat_to_float(half);
}

// c [16, 8] + a [16, K] b [K, 8]. Operands: 4 of d, those of a, those of b, 4 of c.
template <Type kType, int K>
void multiply(Warp& w, const Code& c, u32 m) {
  expect_together(w, kAll, m);
  if (m != kAll) fault("a matrix product without all 32 lanes");
  constexpr int kPacked = kType == kTf32 ? 1 : 2;
  constexpr int kA = 16 * K / 32 / kPacked, kB = 8 * K / 32 / kPacked;
  double a[16][K], b[K][8];
  for (int i = 0; i < kA * kPacked; ++i) {
    const u32* words = lanes_of<u32>(w, c.operand[4 + i / kPacked]);
    for (int l = 0; l < kWarp; ++l) {
      const Element e = element_a<kType, K>(l, i);
      a[e.row][e.column] = number<kType>(words[l], i);
    }
  }
  for (int i = 0; i < kB * kPacked; ++i) {
    const u32* words = lanes_of<u32>(w, c.operand[4 + kA + i / kPacked]);
    for (int l = 0; l < kWarp; ++l) {
      const Element e = element_b<kType, K>(l, i);
      b[e.row][e.column] = number<kType>(words[l], i);
    }
  }
  float sum[16][8];
  for (int i = 0; i < 4; ++i) {
    const float* start = lanes_of<float>(w, c.operand[4 + kA + kB + i]);
    for (int l = 0; l < kWarp; ++l) {
      const Element e = element_c(l, i);
      sum[e.row][e.column] = start[l];
    }
  }
  for (int row = 0; row < 16; ++row) {
    if (!machine.truncates) {
      double total[8];
      for (int n = 0; n < 8; ++n) total[n] = sum[row][n];
      for (int k = 0; k < K; ++k) {
        for (int n = 0; n < 8; ++n) total[n] += a[row][k] * b[k][n];
      }
      for (int n = 0; n < 8; ++n) sum[row][n] = static_cast<float>(total[n]);
      continue;
    }
    double products[K][8];
    for (int k = 0; k < K; ++k) {
      for (int n = 0; n < 8; ++n) products[k][n] = a[row][k] * b[k][n];
    }
    for (int n = 0; n < 8; ++n) {
      sum[row][n] = accumulated(sum[row][n], &products[0][n], 8, K, kType == kTf32 ? 4 : 8);
    }
  }
  for (int i = 0; i < 4; ++i) {
    float* d = lanes_of<float>(w, c.operand[i]);
    for (int l = 0; l < kWarp; ++l) {
      const Element e = element_c(l, i);
      d[l] = sum[e.row][e.column];
    }
  }
}

// ldmatrix and stmatrix: `count` matrices of 8 x 8 numbers of 16 bits, the i-th with its rows at
// the addresses of lanes 8i to 8i + 7; `flag` for transposed ones. Operands: the address, and
// the registers.
template <bool kLoads>
void matrices(Warp& w, const Code& c, u32 m) {
  if (m != kAll) fault("a matrix access without all 32 lanes");
  u64 at[kWarp];
  addresses(w, c, c.operand[0], c.width2, m, at);
  const int rows = 8 * c.count;
  ++w.stores;
  for (int l = 0; l < rows; ++l) shared_bounds(w, at[l], 16, l);
  for (int i = 0; i < c.count; ++i) {
    u32* words = lanes_of<u32>(w, c.operand[1 + i]);
    for (int l = 0; l < kWarp; ++l) {
      u32 word = 0;
      for (int e = 0; e < 2; ++e) {
        int row = l / 4, column = l % 4 * 2 + e;
        if (c.flag) std::swap(row, column);
        const u64 here = at[8 * i + row] + 2 * column;
        if (kLoads) {
          shared_read(w, here, 2, l, kAll);
          u16 half;
          std::memcpy(&half, w.block->shared.data() + here, 2);
          word |= u32(half) << (16 * e);
        } else {
          const u16 half = static_cast<u16>(words[l] >> (16 * e));
          shared_write(w, here, &half, 2, l);
        }
      }
      if (kLoads) words[l] = word;
    }
  }
  if (machine.counts_sectors) {
    count_wavefronts(w, w.pc - 1, at, rows == 32 ? kAll : (1u << rows) - 1, 16);
  }
}

template <class F>
void reduce(Warp& w, const Code& c, u32 m, F f) {  // d, a, mask
  expect_together(w, lanes_of<u32>(w, c.operand[2])[__builtin_ctz(m)], m);
  const u32* a = lanes_of<u32>(w, c.operand[1]);
  u32 result = a[__builtin_ctz(m)];
  for (u32 rest = m & (m - 1); rest; rest &= rest - 1) result = f(result, a[__builtin_ctz(rest)]);
  u32* d = lanes_of<u32>(w, c.operand[0]);
  each(m, [&](int l) { d[l] = result; });
}
#define REDUCE(name, expression)                                     \
  t["redux." name] = [](Warp& w, const Code& c, u32 m) {             \
    reduce(w, c, m, [](u32 a, u32 b) -> u32 { return expression; }); \
  }
#define VOTE(name, expression)                                               \
  t["vote." name] = [](Warp& w, const Code& c, u32 m) {                      \
    expect_together(w, lanes_of<u32>(w, c.operand[2])[__builtin_ctz(m)], m); \
    const u32 yes = predicate_of(w, c.operand[1]) & m;                       \
    set_predicate(w, c.operand[0], (expression) ? kAll : 0, m);              \
  }

void collectives(Table& t) {
  t["shfl.up.b32"] = shuffle<kUp>;
  t["shfl.down.b32"] = shuffle<kDown>;
  t["shfl.bfly.b32"] = shuffle<kXor>;
  t["shfl.idx.b32"] = shuffle<kIndex>;
  VOTE("all.pred", yes == m);
  VOTE("any.pred", yes != 0);
  VOTE("uni.pred", yes == m || yes == 0);
  t["vote.ballot.b32"] = [](Warp& w, const Code& c, u32 m) {
    expect_together(w, lanes_of<u32>(w, c.operand[2])[__builtin_ctz(m)], m);
    const u32 yes = predicate_of(w, c.operand[1]) & m;
    u32* d = lanes_of<u32>(w, c.operand[0]);
    each(m, [&](int l) { d[l] = yes; });
  };
  REDUCE("add.u32", a + b);
  REDUCE("add.s32", a + b);
  REDUCE("min.u32", a < b ? a : b);
  REDUCE("max.u32", a < b ? b : a);
  REDUCE("min.s32", s32(a) < s32(b) ? a : b);
  REDUCE("max.s32", s32(a) < s32(b) ? b : a);
  REDUCE("and.b32", a & b);
  REDUCE("or.b32", a | b);
  REDUCE("xor.b32", a ^ b);
  t["activemask.b32"] = [](Warp& w, const Code& c, u32 m) {
    u32* d = lanes_of<u32>(w, c.operand[0]);
    each(m, [&](int l) { d[l] = w.active; });
  };
  t["bar.warp"] = [](Warp& w, const Code& c, u32 m) {
    expect_together(w, lanes_of<u32>(w, c.operand[0])[__builtin_ctz(m)], m);
    ++w.clock[w.number];
  };
  const std::string mma = "mma.m16n8k";
  t[mma + "16.row.col.f32.f16.f16.f32"] = multiply<kHalf, 16>;
  t[mma + "16.row.col.f32.bf16.bf16.f32"] = multiply<kBFloat, 16>;
  t[mma + "8.row.col.f32.f16.f16.f32"] = multiply<kHalf, 8>;
  t[mma + "8.row.col.f32.bf16.bf16.f32"] = multiply<kBFloat, 8>;
  t[mma + "8.row.col.f32.tf32.tf32.f32"] = multiply<kTf32, 8>;
  t[mma + "4.row.col.f32.tf32.tf32.f32"] = multiply<kTf32, 4>;
  t["ldmatrix"] = matrices<true>;
  t["stmatrix"] = matrices<false>;
}

#define WINDOW(name, expression) UNARY("cvta." name, u64, u64, expression)
void address_spaces(Table& t) {
  WINDOW("global.u64", a);
  WINDOW("to.global.u64", a);
  WINDOW("param.u64", a);
  WINDOW("to.param.u64", a);
  WINDOW("shared.u64", a + kSharedWindow);
  WINDOW("to.shared.u64", a - kSharedWindow);
  WINDOW("local.u64", a + kLocalWindow);
  WINDOW("to.local.u64", a - kLocalWindow);
}

const Table& table() {
  static const Table all = [] {
    Table t;
    integers<s16, u16, s32, u32>(t, "16");
    integers<s32, u32, s64, u64>(t, "32");
    integers<s64, u64, __int128, unsigned __int128>(t, "64");
    floats<float>(t, "f32");
    floats<double>(t, "f64");
    pairs_of_integers(t);
    pairs_of_floats(t);
    mixed_floats<half_to_float>(t, "f16");
    mixed_floats<bfloat_to_float>(t, "bf16");
    approximations(t);
    conversions(t);
    shuffles_of_bits(t);
    predicates(t);
    accesses<kGlobal>(t, ".global");
    accesses<kShared>(t, ".shared");
    accesses<kParam>(t, ".param");
    accesses<kLocal>(t, ".local");
    accesses<kGeneric>(t, "");
    atomics<kGlobal>(t, ".global");
    atomics<kShared>(t, ".shared");
    atomics<kGeneric>(t, "");
    copies(t);
    collectives(t);
    address_spaces(t);
    for (const char* name : {"membar", "fence", "prefetch", "nanosleep", "griddepcontrol"}) {
      t[name] = [](Warp&, const Code&, u32) {};
    }
    t["trap"] = [](Warp&, const Code&, u32) { fault("a trap"); };
    for (const char* name : {"bra", "ret", "exit", "bar.sync", "bar.arrive"}) {
      t[name] = nullptr;  // see `advance`
    }
    return t;
  }();
  return all;
}

// ---- execution ----

// Goes on with lanes that were left waiting; false where none are.
bool next_frame(Warp& w) {
  while (!w.stack.empty()) {
    const Frame frame = w.stack.back();
    w.stack.pop_back();
    w.active = frame.lanes & w.alive;
    w.pc = frame.pc;
    w.reconverge = frame.reconverge;
    if (w.active) return true;
  }
  return false;
}

void branch(Warp& w, const Code& c, u32 taken) {
  const u32 stays = w.active & ~taken;
  if (!stays) {
    w.pc = c.target;
  } else if (taken) {
    if (c.reconverge != w.reconverge) w.stack.push_back({c.reconverge, w.reconverge, w.active});
    if (w.pc != c.reconverge) w.stack.push_back({w.pc, c.reconverge, stays});
    w.active = taken;
    w.pc = c.target;
    w.reconverge = c.reconverge;
  }
}

// Runs a warp up to a barrier or its end.
void advance(Warp& w, const Program& program, Counters& counters) {
  const Code* code = program.code.data();
  w.block->running = &w;
  for (;;) {
    while (w.pc == w.reconverge) next_frame(w);
    const Code& c = code[w.pc];
    ++counters.issued[w.pc];
    ++w.pc;
    u32 m = w.active;
    if (c.predicate) m &= predicate_of(w, c.predicate) ^ (c.negated ? kAll : 0);
    switch (c.kind) {
      case kPlain:
        if (m) c.run(w, c, m);
        break;
      case kBranch:
        branch(w, c, m);
        break;
      case kExit:
        w.alive &= ~m;
        w.active &= ~m;
        if (!w.active && !next_frame(w)) return;
        break;
      case kBarrier: {
        if (!m) break;
        if (m != w.alive)
          fault("lanes " + hex(m) + " of a warp are at a barrier, and lanes " + hex(w.alive) +
                " should be");
        const int barrier = c.operand[0] ? int(lanes_of<u32>(w, c.operand[0])[0]) : 0;
        const int expected =
            c.operand[1] ? int(lanes_of<u32>(w, c.operand[1])[0]) : w.block->threads;
        ++w.clock[w.number];
        if (c.flag) {  // arrives, and does not wait
          w.block->arrived[barrier] += kWarp;
          break;
        }
        w.waits = barrier;
        w.expected = expected;
        return;
      }
    }
  }
}

// Lets warps go on that have all come to a barrier. Returns whether there were any.
bool release(Block& block) {
  std::map<int, std::vector<Warp*>> at;
  for (Warp& w : block.warps) {
    if (w.waits >= 0) at[w.waits].push_back(&w);
  }
  bool any = false;
  for (auto& [barrier, warps] : at) {
    const int here = kWarp * int(warps.size()) + block.arrived[barrier];
    if (here < warps[0]->expected) continue;
    std::vector<u32> clock(block.warps.size());
    // Those that only arrived are not told apart: all warps count as ordered before.
    for (Warp& w : block.warps) {
      if (w.waits != barrier && !block.arrived[barrier]) continue;
      for (std::size_t i = 0; i < clock.size(); ++i) clock[i] = std::max(clock[i], w.clock[i]);
    }
    block.arrived[barrier] = 0;
    for (Warp* w : warps) {
      w->clock = clock;
      w->waits = -1;
    }
    any = true;
  }
  return any;
}

void run_block(Block& block) {
  const int n = int(block.warps.size());
  for (int round = 0;; ++round) {
    int alive = 0;
    for (int i = 0; i < n; ++i) {
      // Now upwards, now downwards: the order of the warps must not matter.
      Warp& w = block.warps[round % 2 ? n - 1 - i : i];
      if (w.alive && w.waits < 0) advance(w, *block.program, block.counters);
      alive += w.alive != 0;
    }
    if (!alive) return;
    if (!release(block)) {
      std::string text = "warps wait for each other:";
      for (const Warp& w : block.warps) {
        text += w.alive ? " " + std::to_string(w.number) + " at barrier " + std::to_string(w.waits)
                        : " " + std::to_string(w.number) + " has ended";
      }
      fault(text);
    }
  }
}

struct Launch {
  const Program* program;
  const char* parameters;
  u32 grid[3], block[3];
  std::size_t shared;
};

void prepare(Block& block, const Launch& launch) {
  const Program& program = *launch.program;
  block.program = &program;
  block.parameters = launch.parameters;
  block.threads = int(launch.block[0] * launch.block[1] * launch.block[2]);
  const int warps = block.threads / kWarp;
  block.warps.resize(warps);
  for (int i = 0; i < warps; ++i) {
    Warp& w = block.warps[i];
    w.block = &block;
    w.number = i;
    w.storage.assign(program.registers / 8 + 8, ~u64(0));  // registers hold NaN until they are set
    w.registers = reinterpret_cast<char*>(
        (reinterpret_cast<std::uintptr_t>(w.storage.data()) + 63) & ~std::uintptr_t(63));
    for (const Program::Constant& k : program.constants) {
      if (k.width == 1) {  // a predicate
        predicate_of(w, k.at) = k.value ? kAll : 0;
      } else {
        for (int l = 0; l < kWarp; ++l) set_container(w, k.at, k.width, l, k.value);
      }
    }
    const auto special = [&](int which, auto f) {
      if (!program.special[which]) return;
      for (int l = 0; l < kWarp; ++l)
        lanes_of<u32>(w, program.special[which])[l] = f(u32(i * kWarp + l));
    };
    const u32 x = launch.block[0], y = launch.block[1];
    special(kTidX, [&](u32 t) { return t % x; });
    special(kTidY, [&](u32 t) { return t / x % y; });
    special(kTidZ, [&](u32 t) { return t / (x * y); });
    special(kLane, [](u32 t) { return t % kWarp; });
    special(kWarpId, [](u32 t) { return t / kWarp; });
    special(kLaneLess, [](u32 t) { return (1u << (t % kWarp)) - 1; });
    for (int axis = 0; axis < 3; ++axis) {
      special(kNtidX + axis, [&](u32) { return launch.block[axis]; });
      special(kGridX + axis, [&](u32) { return launch.grid[axis]; });
    }
  }
  block.counters.issued.assign(program.code.size(), 0);
  block.counters.sectors.assign(program.code.size(), 0);
  block.counters.wavefronts.assign(program.code.size(), 0);
}

void begin(Block& block, const Launch& launch, u64 number) {
  block.number = u32(number);
  block.index[0] = u32(number % launch.grid[0]);
  block.index[1] = u32(number / launch.grid[0] % launch.grid[1]);
  block.index[2] = u32(number / launch.grid[0] / launch.grid[1]);
  block.shared.assign(launch.shared, '\xff');
  if (machine.checked) block.shadow.assign(launch.shared, Shadow());
  block.arrived.clear();
  for (Warp& w : block.warps) {
    w.pc = 0;
    w.reconverge = int(block.program->code.size());
    w.active = w.alive = kAll;
    w.stack.clear();
    w.groups.clear();
    w.clock.assign(block.warps.size(), 0);
    w.waits = -1;
    w.local.assign(block.program->local * kWarp, '\xff');
    for (int axis = 0; axis < 3; ++axis) {
      if (const u32 slot = block.program->special[kCtaX + axis]) {
        for (int l = 0; l < kWarp; ++l) lanes_of<u32>(w, slot)[l] = block.index[axis];
      }
    }
  }
}

}  // namespace

// ---- what Python calls ----

extern "C" {

// The mnemonics that are known, one a line.
const char* machine_mnemonics() {
  static const std::string text = [] {
    std::string all;
    for (const auto& [name, handler] : table()) all += name + "\n";
    return all;
  }();
  return text.c_str();
}

// Rows of `numbers`: see machine.py. The names have been found in `machine_mnemonics`.
void* machine_program(int n, const char* const* names, const s64* numbers, int columns,
                      int constants, const s64* constant, std::size_t registers,
                      std::size_t parameters, std::size_t local, const int* special) {
  auto program = std::make_unique<Program>();
  program->registers = registers;
  program->parameters = parameters;
  program->local = local;
  for (int i = 0; i < kSpecials; ++i) program->special[i] = u32(special[i]);
  for (int i = 0; i < constants; ++i) {
    program->constants.push_back(
        {u32(constant[3 * i]), int(constant[3 * i + 1]), u64(constant[3 * i + 2])});
  }
  for (int i = 0; i < n; ++i) {
    const s64* row = numbers + i * columns;
    Code c{};
    c.run = table().at(names[i]);
    c.kind = int(row[0]);
    c.predicate = u32(row[1]);
    c.negated = int(row[2]);
    c.target = int(row[3]);
    c.reconverge = int(row[4]);
    c.count = int(row[5]);
    c.width = int(row[6]);
    c.width2 = int(row[7]);
    c.flag = int(row[8]);
    c.used = u32(row[9]);
    c.immediate = row[10];
    for (int k = 0; k < kOperands; ++k) c.operand[k] = u32(row[11 + k]);
    program->code.push_back(c);
  }
  return program.release();
}
void machine_forget_program(void* program) {
  delete static_cast<Program*>(program);
}

void machine_settings(int threads, int checked, int truncates, int counts_sectors) {
  machine.threads = threads;
  machine.checked = checked;
  machine.truncates = truncates;
  machine.counts_sectors = counts_sectors;
}

void machine_name_memory(u64 begin, u64 bytes) {
  Range range{begin, begin + bytes, nullptr, nullptr};
  // Views of one tensor may overlap.
  for (auto next = machine.memory.begin(); next != machine.memory.end();) {
    const Range& other = next->second;
    if (other.begin >= range.end || range.begin >= other.end) {
      ++next;
      continue;
    }
    range.begin = std::min(range.begin, other.begin);
    range.end = std::max(range.end, other.end);
    next = machine.memory.erase(next);
  }
  const u64 sectors = (range.end - 1) / 32 - range.begin / 32 + 1;
  range.sectors = std::make_unique<std::atomic<u8>[]>(sectors);
  machine.memory[range.begin] = std::move(range);
}
void machine_forget_memory() {
  machine.memory.clear();
}

// Counts of each instruction are added to `issued`, `sectors` and `wavefronts`; `distinct` gets the
// 32-byte sectors of global memory that were read and those that were written, each once. Returns
// an empty text, or what went wrong | block | warp | instruction.
const char* machine_run(const void* program, const char* parameters, const u32* grid,
                        const u32* block_size, u64 shared, u64* issued, u64* sectors,
                        u64* wavefronts, u64* distinct) {
  static std::string error;
  error.clear();
  Launch launch{static_cast<const Program*>(program), parameters, {}, {}, shared};
  std::copy_n(grid, 3, launch.grid);
  std::copy_n(block_size, 3, launch.block);
  const u64 blocks = u64(grid[0]) * grid[1] * grid[2];
  for (auto& [at, range] : machine.memory) {
    std::fill_n(reinterpret_cast<char*>(range.sectors.get()),
                (range.end - 1) / 32 - range.begin / 32 + 1, 0);
    range.touched.reset();
    if (machine.checked) {
      range.touched = std::make_unique<std::atomic<u64>[]>(range.end - range.begin);
    }
  }
  std::atomic<u64> next{0};
  std::atomic<bool> failed{false};
  std::vector<Counters> counters(machine.threads);
  const auto work = [&](int number) {
    Block block;
    prepare(block, launch);
    for (u64 i; !failed && (i = next++) < blocks;) {
      begin(block, launch, blocks - 1 - i);
      try {
        run_block(block);
      } catch (const Fault& f) {
        if (failed.exchange(true)) return;
        error = f.text + "|" + std::to_string(block.index[0]);
        for (const int i : {1, 2}) error += "," + std::to_string(block.index[i]);
        const Warp& w = *block.running;
        error += "|" + std::to_string(w.number) + "|" + std::to_string(w.pc - 1);
        return;
      }
    }
    counters[number] = std::move(block.counters);
  };
  const int threads = int(std::min<u64>(machine.threads, blocks));
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(work, i);
  work(0);
  for (std::thread& other : others) other.join();
  for (const Counters& c : counters) {
    for (std::size_t i = 0; i < c.issued.size(); ++i) {
      issued[i] += c.issued[i];
      sectors[i] += c.sectors[i];
      wavefronts[i] += c.wavefronts[i];
    }
  }
  distinct[0] = distinct[1] = 0;
  for (const auto& [at, range] : machine.memory) {
    for (u64 i = 0; i < (range.end - 1) / 32 - range.begin / 32 + 1; ++i) {
      const u8 flags = range.sectors[i].load(std::memory_order_relaxed);
      distinct[0] += flags & 1;
      distinct[1] += flags >> 1 & 1;
    }
  }
  return error.c_str();
}

}  // extern "C"
