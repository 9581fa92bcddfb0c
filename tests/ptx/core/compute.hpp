// The instructions that only compute.
#pragma once
#include "executor.hpp"

template <class D, class A, class F> inline void unary(Warp& w, const Insn& i, u32 m, F f) {
  D* d = (D*)w.reg(i.d[0]); const A* a = (const A*)w.reg(i.s[0]);
  if (m == FULL) for (int l = 0; l < 32; l++) d[l] = f(a[l]);
  else EACH d[l] = f(a[l]);
}
template <class D, class A, class B, class F> inline void binary(Warp& w, const Insn& i, u32 m, F f) {
  D* d = (D*)w.reg(i.d[0]); const A* a = (const A*)w.reg(i.s[0]); const B* b = (const B*)w.reg(i.s[1]);
  if (m == FULL) for (int l = 0; l < 32; l++) d[l] = f(a[l], b[l]);
  else EACH d[l] = f(a[l], b[l]);
}
template <class D, class A, class C, class F> inline void ternary(Warp& w, const Insn& i, u32 m, F f) {
  D* d = (D*)w.reg(i.d[0]); const A* a = (const A*)w.reg(i.s[0]); const A* b = (const A*)w.reg(i.s[1]);
  const C* c = (const C*)w.reg(i.s[2]);
  if (m == FULL) for (int l = 0; l < 32; l++) d[l] = f(a[l], b[l], c[l]);
  else EACH d[l] = f(a[l], b[l], c[l]);
}
template <class T> inline void set_predicate(Warp& w, const Insn& i, u32 m) {
  const T* a = (const T*)w.reg(i.s[0]); const T* b = (const T*)w.reg(i.s[1]);
  u32 found = 0;
  EACH found |= (u32)compare<T>(i.cmp, a[l], b[l]) << l;
  u32& p = w.pm[pred_of(i.d[0])];
  p = (p & ~m) | (found & m);
}
template <class T> inline void select(Warp& w, const Insn& i, u32 m) {
  T* d = (T*)w.reg(i.d[0]); const T* a = (const T*)w.reg(i.s[0]); const T* b = (const T*)w.reg(i.s[1]);
  u32 p = w.pm[pred_of(i.s[2])];
  EACH d[l] = p >> l & 1 ? a[l] : b[l];
}

inline void Executor::compute(Warp& w, const Insn& i, u32 pc, u32 m) {
  const int ulps = M.o.noise; const u64 seed = M.o.seed;
  switch (i.op) {
    case MOV16: unary<u16, u16>(w, i, m, [](u16 a) { return a; }); break;
    case MOV32: unary<u32, u32>(w, i, m, [](u32 a) { return a; }); break;
    case MOV64: unary<u64, u64>(w, i, m, [](u64 a) { return a; }); break;
    case MOVP: { u32& p = w.pm[pred_of(i.d[0])]; p = (p & ~m) | (w.pm[pred_of(i.s[0])] & m); break; }
    case PACK64: binary<u64, u32, u32>(w, i, m, [](u32 a, u32 b) { return (u64)b << 32 | a; }); break;
    case PACK32: binary<u32, u16, u16>(w, i, m, [](u16 a, u16 b) { return (u32)b << 16 | a; }); break;
    case UNPACK64: EACH {
      u64 v = w.reg(i.s[0])[l];
      if (i.d[0] != SINK) ((u32*)w.reg(i.d[0]))[l] = (u32)v;
      if (i.d[1] != SINK) ((u32*)w.reg(i.d[1]))[l] = (u32)(v >> 32);
    } break;
    case UNPACK32: EACH {
      u32 v = ((u32*)w.reg(i.s[0]))[l];
      if (i.d[0] != SINK) ((u16*)w.reg(i.d[0]))[l] = (u16)v;
      if (i.d[1] != SINK) ((u16*)w.reg(i.d[1]))[l] = (u16)(v >> 16);
    } break;
    case ADD_S32: binary<u32, u32, u32>(w, i, m, [](u32 a, u32 b) { return a + b; }); break;
    case SUB_S32: binary<u32, u32, u32>(w, i, m, [](u32 a, u32 b) { return a - b; }); break;
    case MUL_LO_S32: binary<u32, u32, u32>(w, i, m, [](u32 a, u32 b) { return a * b; }); break;
    case MAD_LO_S32: ternary<u32, u32, u32>(w, i, m, [](u32 a, u32 b, u32 c) { return a * b + c; }); break;
    case ADD_S64: binary<u64, u64, u64>(w, i, m, [](u64 a, u64 b) { return a + b; }); break;
    case SUB_S64: binary<u64, u64, u64>(w, i, m, [](u64 a, u64 b) { return a - b; }); break;
    case MUL_LO_S64: binary<u64, u64, u64>(w, i, m, [](u64 a, u64 b) { return a * b; }); break;
    case MAD_LO_S64: ternary<u64, u64, u64>(w, i, m, [](u64 a, u64 b, u64 c) { return a * b + c; }); break;
    case MUL_WIDE_S32: binary<i64, i32, i32>(w, i, m, [](i32 a, i32 b) { return (i64)a * b; }); break;
    case MUL_WIDE_U32: binary<u64, u32, u32>(w, i, m, [](u32 a, u32 b) { return (u64)a * b; }); break;
    case MAD_WIDE_S32: ternary<u64, i32, u64>(w, i, m, [](i32 a, i32 b, u64 c) { return (u64)((i64)a * b) + c; }); break;
    case MAD_WIDE_U32: ternary<u64, u32, u64>(w, i, m, [](u32 a, u32 b, u64 c) { return (u64)a * b + c; }); break;
    case MUL_HI_U32: binary<u32, u32, u32>(w, i, m, [](u32 a, u32 b) { return (u32)((u64)a * b >> 32); }); break;
    case MUL_HI_S32: binary<i32, i32, i32>(w, i, m, [](i32 a, i32 b) { return (i32)((i64)a * b >> 32); }); break;
    case DIV_S32: case REM_S32: {
      bool zero = false;
      binary<i32, i32, i32>(w, i, m, [&](i32 a, i32 b) -> i32 {
        if (!b) { zero = true; return i.op == DIV_S32 ? -1 : a; }
        if (b == -1) return i.op == DIV_S32 ? (i32)(0u - (u32)a) : 0;
        return i.op == DIV_S32 ? a / b : a % b;
      });
      if (zero) M.report(DIVISION_BY_ZERO, pc, 0, w.id * 32, 0, -1, 0);
      break;
    }
    case DIV_U32: binary<u32, u32, u32>(w, i, m, [](u32 a, u32 b) { return b ? a / b : FULL; }); break;
    case REM_U32: binary<u32, u32, u32>(w, i, m, [](u32 a, u32 b) { return b ? a % b : a; }); break;
    case DIV_S64: binary<i64, i64, i64>(w, i, m, [](i64 a, i64 b) { return b == -1 ? (i64)(0 - (u64)a) : b ? a / b : -1; }); break;
    case REM_S64: binary<i64, i64, i64>(w, i, m, [](i64 a, i64 b) { return b == -1 ? 0 : b ? a % b : a; }); break;
    case NEG_S32: unary<u32, u32>(w, i, m, [](u32 a) { return 0u - a; }); break;
    case NEG_S64: unary<u64, u64>(w, i, m, [](u64 a) { return 0ull - a; }); break;
    case ABS_S32: unary<u32, i32>(w, i, m, [](i32 a) { return a < 0 ? 0u - (u32)a : (u32)a; }); break;
    case MIN_S32: binary<i32, i32, i32>(w, i, m, [](i32 a, i32 b) { return a < b ? a : b; }); break;
    case MAX_S32: binary<i32, i32, i32>(w, i, m, [](i32 a, i32 b) { return a > b ? a : b; }); break;
    case MIN_U32: binary<u32, u32, u32>(w, i, m, [](u32 a, u32 b) { return a < b ? a : b; }); break;
    case MAX_U32: binary<u32, u32, u32>(w, i, m, [](u32 a, u32 b) { return a > b ? a : b; }); break;
    case MIN_S64: binary<i64, i64, i64>(w, i, m, [](i64 a, i64 b) { return a < b ? a : b; }); break;
    case MAX_S16: binary<i16, i16, i16>(w, i, m, [](i16 a, i16 b) { return a > b ? a : b; }); break;
    case MAX_S64: binary<i64, i64, i64>(w, i, m, [](i64 a, i64 b) { return a > b ? a : b; }); break;
    case AND_B16: binary<u16, u16, u16>(w, i, m, [](u16 a, u16 b) { return a & b; }); break;
    case OR_B16: binary<u16, u16, u16>(w, i, m, [](u16 a, u16 b) { return a | b; }); break;
    case XOR_B16: binary<u16, u16, u16>(w, i, m, [](u16 a, u16 b) { return a ^ b; }); break;
    case AND_B32: binary<u32, u32, u32>(w, i, m, [](u32 a, u32 b) { return a & b; }); break;
    case OR_B32: binary<u32, u32, u32>(w, i, m, [](u32 a, u32 b) { return a | b; }); break;
    case XOR_B32: binary<u32, u32, u32>(w, i, m, [](u32 a, u32 b) { return a ^ b; }); break;
    case NOT_B32: unary<u32, u32>(w, i, m, [](u32 a) { return ~a; }); break;
    case AND_B64: binary<u64, u64, u64>(w, i, m, [](u64 a, u64 b) { return a & b; }); break;
    case OR_B64: binary<u64, u64, u64>(w, i, m, [](u64 a, u64 b) { return a | b; }); break;
    case XOR_B64: binary<u64, u64, u64>(w, i, m, [](u64 a, u64 b) { return a ^ b; }); break;
    case NOT_B64: unary<u64, u64>(w, i, m, [](u64 a) { return ~a; }); break;
    case AND_PRED: case OR_PRED: case XOR_PRED: case NOT_PRED: {
      u32 a = w.pm[pred_of(i.s[0])], b = i.ns > 1 ? w.pm[pred_of(i.s[1])] : 0;
      u32 v = i.op == AND_PRED ? a & b : i.op == OR_PRED ? a | b : i.op == XOR_PRED ? a ^ b : ~a;
      u32& p = w.pm[pred_of(i.d[0])];
      p = (p & ~m) | (v & m);
      break;
    }
    case SHL_B32: binary<u32, u32, u32>(w, i, m, [](u32 a, u32 b) { return b > 31 ? 0 : a << b; }); break;
    case SHR_U32: binary<u32, u32, u32>(w, i, m, [](u32 a, u32 b) { return b > 31 ? 0 : a >> b; }); break;
    case SHR_S32: binary<i32, i32, u32>(w, i, m, [](i32 a, u32 b) { return a >> (b > 31 ? 31 : b); }); break;
    case SHL_B64: binary<u64, u64, u32>(w, i, m, [](u64 a, u32 b) { return b > 63 ? 0 : a << b; }); break;
    case SHR_U64: binary<u64, u64, u32>(w, i, m, [](u64 a, u32 b) { return b > 63 ? 0 : a >> b; }); break;
    case SHR_S64: binary<i64, i64, u32>(w, i, m, [](i64 a, u32 b) { return a >> (b > 63 ? 63 : b); }); break;
    case SHL_B16: binary<u16, u16, u32>(w, i, m, [](u16 a, u32 b) { return (u16)(b > 15 ? 0 : a << b); }); break;
    case SHR_U16: binary<u16, u16, u32>(w, i, m, [](u16 a, u32 b) { return (u16)(b > 15 ? 0 : a >> b); }); break;
    case SHR_S16: binary<i16, i16, u32>(w, i, m, [](i16 a, u32 b) { return (i16)(a >> (b > 15 ? 15 : b)); }); break;
    case POPC_B32: unary<u32, u32>(w, i, m, [](u32 a) { return (u32)__builtin_popcount(a); }); break;
    case BFE_U32: ternary<u32, u32, u32>(w, i, m, [](u32 a, u32 b, u32 c) {
      b &= 255; c &= 255;
      u64 v = b > 31 ? 0 : a >> b;
      return (u32)(c > 31 ? v : v & ((1ull << c) - 1)); }); break;
    case BFE_S32: ternary<u32, u32, u32>(w, i, m, [](u32 a, u32 b, u32 c) -> u32 {
      b &= 255; c &= 255;
      if (!c) return 0;
      u32 top = b + c - 1 > 31 ? 31 : b + c - 1, sign = a >> top & 1, v = 0;
      for (u32 k = 0; k < 32; k++) v |= (k < c && b + k < 32 ? a >> (b + k) & 1 : sign) << k;
      return v; }); break;
    case ADD_F32: binary<float, float, float>(w, i, m, [](float a, float b) { return canonical(a + b); }); break;
    case SUB_F32: binary<float, float, float>(w, i, m, [](float a, float b) { return canonical(a - b); }); break;
    case MUL_F32: binary<float, float, float>(w, i, m, [](float a, float b) { return canonical(a * b); }); break;
    case FMA_F32: ternary<float, float, float>(w, i, m, [](float a, float b, float c) { return canonical(std::fma(a, b, c)); }); break;
    case NEG_F32: unary<u32, u32>(w, i, m, [](u32 a) { return a ^ 0x80000000u; }); break;
    case ABS_F32: unary<u32, u32>(w, i, m, [](u32 a) { return a & 0x7FFFFFFFu; }); break;
    case ABS_FTZ_F32: unary<float, float>(w, i, m, [](float a) { return std::fabs(ftz(a)); }); break;
    case MAX_F32: binary<float, float, float>(w, i, m, fmaximum<float>); break;
    case MIN_F32: binary<float, float, float>(w, i, m, fminimum<float>); break;
    case DIV_FULL_F32: binary<float, float, float>(w, i, m, [=](float a, float b) { return canonical(div_full(a, b, ulps, seed)); }); break;
    case DIV_F32: binary<float, float, float>(w, i, m, [](float a, float b) { return canonical(a / b); }); break;
    case EX2_F32: unary<float, float>(w, i, m, [=](float a) { return ex2_approx_ftz(a, ulps, seed); }); break;
    case ADD_F64: binary<double, double, double>(w, i, m, [](double a, double b) { return canonical(a + b); }); break;
    case SUB_F64: binary<double, double, double>(w, i, m, [](double a, double b) { return canonical(a - b); }); break;
    case MUL_F64: binary<double, double, double>(w, i, m, [](double a, double b) { return canonical(a * b); }); break;
    case FMA_F64: ternary<double, double, double>(w, i, m, [](double a, double b, double c) { return canonical(std::fma(a, b, c)); }); break;
    case NEG_F64: unary<u64, u64>(w, i, m, [](u64 a) { return a ^ (1ull << 63); }); break;
    case ABS_F64: unary<u64, u64>(w, i, m, [](u64 a) { return a & ~(1ull << 63); }); break;
    case MAX_F64: binary<double, double, double>(w, i, m, fmaximum<double>); break;
    case MIN_F64: binary<double, double, double>(w, i, m, fminimum<double>); break;
    case DIV_F64: binary<double, double, double>(w, i, m, [](double a, double b) { return canonical(a / b); }); break;
    case RCP_F64: unary<double, double>(w, i, m, [=](double a) { return rcp_approx_f64(a, ulps, seed); }); break;
    case CVT_F32_BF16: unary<float, u16>(w, i, m, from_bf16); break;
    case CVT_F32_F16: unary<float, u16>(w, i, m, from_f16); break;
    case CVT_F64_F16: unary<double, u16>(w, i, m, [](u16 a) { return (double)from_f16(a); }); break;
    case CVT_F64_BF16: unary<double, u16>(w, i, m, [](u16 a) { return (double)from_bf16(a); }); break;
    case CVT_F64_F32: unary<double, float>(w, i, m, [](float a) { return canonical((double)a); }); break;
    case CVT_F32_F64: unary<float, double>(w, i, m, [](double a) { return canonical((float)a); }); break;
    case CVT_F32_U32: unary<float, u32>(w, i, m, [](u32 a) { return (float)a; }); break;
    case CVT_F32_S32: unary<float, i32>(w, i, m, [](i32 a) { return (float)a; }); break;
    case CVT_F64_S32: unary<double, i32>(w, i, m, [](i32 a) { return (double)a; }); break;
    case CVT_F64_S64: unary<double, i64>(w, i, m, [](i64 a) { return (double)a; }); break;
    case CVT_F64_U64: unary<double, u64>(w, i, m, [](u64 a) { return (double)a; }); break;
    case CVT_F64_U32: unary<double, u32>(w, i, m, [](u32 a) { return (double)a; }); break;
    case CVT_RZI_S32_F32: {
      bool nan = false;
      unary<i32, float>(w, i, m, [&](float a) { nan |= a != a; return saturated<i32>(a); });
      if (nan) M.report(NAN_TO_INTEGER, pc, 0, w.id * 32, 0, -1, 0);
      break;
    }
    case CVT_RZI_S32_F64: {
      bool nan = false;
      unary<i32, double>(w, i, m, [&](double a) { nan |= a != a; return saturated<i32>(a); });
      if (nan) M.report(NAN_TO_INTEGER, pc, 0, w.id * 32, 0, -1, 0);
      break;
    }
    case CVT_RZI_F64: unary<double, double>(w, i, m, [](double a) { return std::trunc(a); }); break;
    case CVT_RMI_F32: unary<float, float>(w, i, m, [](float a) { return std::floor(ftz(a)); }); break;
    case CVT_RZI_S64_F64: {
      bool nan = false;
      unary<i64, double>(w, i, m, [&](double a) { nan |= a != a; return saturated<i64>(a); });
      if (nan) M.report(NAN_TO_INTEGER, pc, 0, w.id * 32, 0, -1, 0);
      break;
    }
    case CVT_S64_S32: unary<i64, i32>(w, i, m, [](i32 a) { return (i64)a; }); break;
    case CVT_U64_U32: unary<u64, u32>(w, i, m, [](u32 a) { return (u64)a; }); break;
    case CVT_U32_U64: unary<u32, u64>(w, i, m, [](u64 a) { return (u32)a; }); break;
    case CVT_U32_U16: unary<u32, u16>(w, i, m, [](u16 a) { return (u32)a; }); break;
    case CVT_S64_S16: unary<i64, i16>(w, i, m, [](i16 a) { return (i64)a; }); break;
    case CVT_S32_S16: unary<i32, i16>(w, i, m, [](i16 a) { return (i32)a; }); break;
    case CVT_U16_U32: unary<u16, u32>(w, i, m, [](u32 a) { return (u16)a; }); break;
    case SETP_F16: case SETP_BF16: {
      const u16 *a = (u16*)w.reg(i.s[0]), *b = (u16*)w.reg(i.s[1]);
      u32 found = 0;
      auto of = i.op == SETP_F16 ? from_f16 : from_bf16;
      EACH found |= (u32)compare<float>(i.cmp, of(a[l]), of(b[l])) << l;
      u32& p = w.pm[pred_of(i.d[0])];
      p = (p & ~m) | found;
      break;
    }
    case SETP_F32: set_predicate<float>(w, i, m); break;
    case SETP_F64: set_predicate<double>(w, i, m); break;
    case SETP_S32: set_predicate<i32>(w, i, m); break;
    case SETP_U32: set_predicate<u32>(w, i, m); break;
    case SETP_S64: set_predicate<i64>(w, i, m); break;
    case SETP_U64: set_predicate<u64>(w, i, m); break;
    case SETP_S16: set_predicate<i16>(w, i, m); break;
    case SETP_U16: set_predicate<u16>(w, i, m); break;
    case SELP16: select<u16>(w, i, m); break;
    case SELP32: select<u32>(w, i, m); break;
    case SELP64: select<u64>(w, i, m); break;
    default: fprintf(stderr, "no semantics for opcode %d\n", i.op); abort();
  }
}
