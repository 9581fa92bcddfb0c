// Collectives, branches, and the loop over instructions.
#pragma once
#include "accesses.hpp"
#include "compute.hpp"
#include "tensor_cores.hpp"

inline void Executor::shuffle(Warp& w, const Insn& i) {
  u32 out[32], *d = (u32*)w.reg(i.d[0]), *a = (u32*)w.reg(i.s[0]), *b = (u32*)w.reg(i.s[1]);
  u32 clamp = ((u32*)w.reg(i.s[2]))[0], t[2] = {};
  for (int l = 0; l < 32; l++) {
    u32 c = clamp & 31, seg = clamp >> 8 & 31;
    int most = (l & seg) | (c & ~seg & 31), least = l & seg, j; bool in;
    switch (i.cmp) {
      case 0: j = l ^ (b[l] & 31); in = j <= most; break;                          // bfly
      case 1: j = l - (b[l] & 31); in = j >= most; break;                          // up
      case 2: j = l + (b[l] & 31); in = j <= most; break;                          // down
      default: j = least | (b[l] & 31 & ~seg); in = j <= most;                     // idx
    }
    if (!in) j = l;
    out[l] = a[j];
    for (int plane = 0; plane < 2; plane++)
      t[plane] |= ((taint(w, plane, i.s[0]) >> j | taint(w, plane, i.s[1]) >> l) & 1) << l;
  }
  memcpy(d, out, sizeof out);
  for (int plane = 0; plane < 2; plane++) set_taint(w, plane, i, FULL, t[plane]);
}

template <class F> inline void Executor::reduce(Warp& w, const Insn& i, F f) {
  i32 *d = (i32*)w.reg(i.d[0]), *a = (i32*)w.reg(i.s[0]), r = a[0];
  for (int l = 1; l < 32; l++) r = f(r, a[l]);
  for (int l = 0; l < 32; l++) d[l] = r;
  for (int plane = 0; plane < 2; plane++) set_taint(w, plane, i, FULL, taint(w, plane, i.s[0]) ? FULL : 0);
}

// Runs a group until something happens that the scheduler must see, or `budget` instructions.
inline Stop Executor::run(Warp& w, Group& g, i64 budget) {
  for (; budget > 0; budget--) {
    const Insn& i = M.code[g.pc];
    const u32 pc = g.pc;
    u32 m = g.mask;
    M.totals.instructions++; M.hits[pc]++;
    if (i.guard >= 0) {
      u32 p = w.pm[i.guard];
      m &= i.guard_neg ? ~p : p;
      check_use(w, pc, -(i.guard + 2), g.mask, UNDEFINED_BRANCH);
    }
    switch (i.op) {
      case BRA: {
        u32 rest = g.mask & ~m;
        if (!rest) { g.pc = i.target; continue; }
        if (!m) { g.pc = pc + 1; continue; }
        M.report(DIVERGENT_BRANCH, pc, 0, w.id * 32 + __builtin_ctz(m), w.id * 32 + __builtin_ctz(rest), -1, 0);
        g.mask = rest; g.pc = pc + 1;
        w.groups.push_back({(u32)i.target, m, false});  // invalidates g
        return SPLIT;
      }
      case RET:
        w.live &= ~m;
        g.mask &= ~m;
        if (g.mask) { g.pc = pc + 1; continue; }
        return ENDED;
      case BAR: case SHFL: case REDUX_ADD: case REDUX_MIN: case REDUX_MAX: case LDMATRIX: case LDMATRIX_T:
      case MMA_F16: case MMA_BF16: case BAR_WARP: case STMATRIX: case WGMMA_F16: case WGMMA_BF16: case WG_COMMIT: case WG_WAIT:
        if (g.mask != w.live) { M.totals.instructions--; M.hits[pc]--; g.wait = true; return WAITS; }
        if (i.op != BAR && w.live != FULL) { M.report(DIVERGENT_SYNC, pc, 0, w.id * 32, 0, -1, 0); M.totals.aborted = 1; return ENDED; }
        g.pc = pc + 1;
        switch (i.op) {
          case BAR: w.at_barrier = true; w.barrier_pc = pc; w.collective++; return BARRIER;
          case SHFL: shuffle(w, i); break;
          case REDUX_ADD: reduce(w, i, [](i32 a, i32 b) { return (i32)((u32)a + (u32)b); }); break;
          case REDUX_MIN: reduce(w, i, [](i32 a, i32 b) { return a < b ? a : b; }); break;
          case REDUX_MAX: reduce(w, i, [](i32 a, i32 b) { return a > b ? a : b; }); break;
          case LDMATRIX: load_matrix(w, i, pc, false); break;
          case LDMATRIX_T: load_matrix(w, i, pc, true); break;
          case STMATRIX: store_matrix(w, i, pc); break;
          case WGMMA_F16: multiply_group(w, i, pc, from_f16); break;
          case WGMMA_BF16: multiply_group(w, i, pc, from_bf16); break;
          case WG_COMMIT: w.wg_committed.push_back(std::move(w.wg_open)); w.wg_open.clear(); break;
          case WG_WAIT:
            while ((i64)w.wg_committed.size() > i.imm) {
              for (Reads& reads : w.wg_committed.front())
                for (u32 g : reads) M.shared_shadow[g].reading--;
              w.wg_committed.pop_front();
            }
            break;
          case MMA_F16: multiply(w, i, from_f16); break;
          case MMA_BF16: multiply(w, i, from_bf16); break;
        }
        w.collective++;
        if (i.op == BAR_WARP) w.ordered = w.collective;
        if (M.o.independent) return SYNCED;
        continue;
    }
    g.pc = pc + 1;
    if (!m) continue;
    switch (i.op) {
      case LD_GLOBAL: load(w, i, pc, m, false); break;
      case LD_SHARED: load(w, i, pc, m, true); break;
      case ST_GLOBAL: store(w, i, pc, m, false); break;
      case ST_SHARED: store(w, i, pc, m, true); break;
      case ATOM_ADD_U32: atomic_add(w, i, pc, m); break;
      case CP_ASYNC: copy_async(w, i, pc, m); break;
      case CP_COMMIT: EACH { w.committed[l].push_back(std::move(w.open[l])); w.open[l].clear(); } continue;
      case CP_WAIT:
        EACH while ((i64)w.committed[l].size() > i.imm) {
          for (auto& c : w.committed[l].front()) finish(w, c, l);
          w.committed[l].pop_front();
        }
        continue;
      case FENCE: continue;
      default:
        if (M.o.check) spread(w, i, m);
        compute(w, i, pc, m);
        continue;
    }
    if (M.o.order == 2 && M.o.yield_percent && (i64)(M.random() % 100) < M.o.yield_percent) return MEMORY;
  }
  return RAN;
}
