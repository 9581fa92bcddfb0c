// The instructions over the lanes of a warp: what each does, how "undefined" and "read in a race" spread, what is reported.
#pragma once
#include <algorithm>
#include <limits>
#include "arithmetic.hpp"
#include "shadow.hpp"

enum Op : int {
#define X(id, name) id,
#include "opcodes.inc"
#undef X
  OPS
};

// Why a group of lanes stopped running.
enum Stop { RAN, MEMORY, WAITS, SYNCED, BARRIER, ENDED, SPLIT };

#define EACH for (int l = 0; l < 32; l++) if (m >> l & 1)

struct Executor {
  Machine& M;
  explicit Executor(Machine& machine) : M(machine) {}

  // ---- taint: lanes whose operand is undefined, or was read in a race

  u32& taint(Warp& w, int plane, i32 r) { return w.taint[plane][is_pred(r) ? M.n_regs + pred_of(r) : r]; }

  void set_taint(Warp& w, int plane, const Insn& i, u32 m, u32 t) {
    for (int k = 0; k < i.nd; k++) if (i.d[k] != SINK) { u32& x = taint(w, plane, i.d[k]); x = (x & ~m) | (t & m); }
  }

  u32 sources(Warp& w, int plane, const Insn& i) {
    u32 t = 0;
    for (int k = 0; k < i.ns; k++) t |= taint(w, plane, i.s[k]);
    return t;
  }

  void spread(Warp& w, const Insn& i, u32 m) {
    for (int plane = 0; plane < 2; plane++) {
      u32 t = sources(w, plane, i);
      if (t) switch (i.op) {  // an operand that decides alone hides the other
        case AND_PRED: case OR_PRED: {
          u32 ta = taint(w, plane, i.s[0]), tb = taint(w, plane, i.s[1]);
          u32 a = w.pm[pred_of(i.s[0])], b = w.pm[pred_of(i.s[1])];
          if (i.op == OR_PRED) a = ~a, b = ~b;
          t = (ta & tb) | (ta & b) | (tb & a);
          break;
        }
        case AND_B32: {
          u32 ta = taint(w, plane, i.s[0]), tb = taint(w, plane, i.s[1]);
          const u32 *a = (u32*)w.reg(i.s[0]), *b = (u32*)w.reg(i.s[1]);
          for (int l = 0; l < 32; l++)
            if ((!(ta >> l & 1) && !a[l]) || (!(tb >> l & 1) && !b[l])) t &= ~(1u << l);
          break;
        }
        case SELP16: case SELP32: case SELP64: {
          u32 p = w.pm[pred_of(i.s[2])];
          t = taint(w, plane, i.s[2]) | (p & taint(w, plane, i.s[0])) | (~p & taint(w, plane, i.s[1]));
          break;
        }
      }
      set_taint(w, plane, i, m, t);
    }
  }

  void check_use(Warp& w, u32 pc, i32 r, u32 m, int kind) {  // kind: of the undefined plane
    if (!M.o.check) return;
    u32 undefined = taint(w, 0, r) & m, racy = taint(w, 1, r) & m;
    int other = kind == UNDEFINED_ADDRESS ? RACY_ADDRESS : kind == UNDEFINED_BRANCH ? RACY_BRANCH : RACY_STORE;
    if (undefined) M.report(kind, pc, 0, w.id * 32 + __builtin_ctz(undefined), 0, -1, 0);
    if (racy) M.report(other, pc, 0, w.id * 32 + __builtin_ctz(racy), 0, -1, 0);
  }

  // ---- accesses.hpp

  u64 address_of(Warp& w, const Insn& i, i32 r, int l, bool shared);
  Place locate(u64 at, int n, u32 pc, int tid, bool shared);
  void count_global(const u64* at, u32 m, int n, bool write);
  void count_shared(const u64* at, u32 m, int n);
  void load(Warp& w, const Insn& i, u32 pc, u32 m, bool shared);
  void store(Warp& w, const Insn& i, u32 pc, u32 m, bool shared);
  void atomic_add(Warp& w, const Insn& i, u32 pc, u32 m);
  void copy_async(Warp& w, const Insn& i, u32 pc, u32 m);
  void touch_copied(Warp& w, const Place& p, int n, int tid, u32 pc);
  void finish(Warp& w, const Copy& c, int l);

  // ---- tensor_cores.hpp

  void load_matrix(Warp& w, const Insn& i, u32 pc, bool transposed);
  void store_matrix(Warp& w, const Insn& i, u32 pc);
  template <class F> void multiply(Warp& w, const Insn& i, F of);
  template <class F> void multiply_group(Warp& w, const Insn& i, u32 pc, F of);

  // ---- run.hpp, compute.hpp

  void shuffle(Warp& w, const Insn& i);
  template <class F> void reduce(Warp& w, const Insn& i, F f);
  Stop run(Warp& w, Group& g, i64 budget);
  void compute(Warp& w, const Insn& i, u32 pc, u32 m);
};
