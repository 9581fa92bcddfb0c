// Tensor cores (PTX ISA 9.7.14): fragments of m16n8k16, matrices of ldmatrix and stmatrix, wgmma.
#pragma once
#include "executor.hpp"

inline void Executor::load_matrix(Warp& w, const Insn& i, u32 pc, bool transposed) {
  u32 m = FULL;
  check_use(w, pc, i.s[0], m, UNDEFINED_ADDRESS);
  const u32* rows = (u32*)w.reg(i.s[0]);
  for (int k = 0; k < i.nd; k++) {
    u64 at[32];
    for (int l = 8 * k; l < 8 * k + 8; l++) at[l] = rows[l] + (u32)i.imm;
    count_shared(at, 0xFFu << 8 * k, 16);
  }
  u32 out[4][32], undefined[4] = {}, racy[4] = {};
  for (int k = 0; k < i.nd; k++)
    for (int l = 0; l < 32; l++)
      for (int half = 0; half < 2; half++) {
        int row = transposed ? 2 * (l % 4) + half : l / 4, column = transposed ? l / 4 : 2 * (l % 4) + half;
        int source = 8 * k + row;
        u32 at = rows[source] + (u32)i.imm;
        if (at % 16) M.report(MISALIGNED, pc, 0, w.id * 32 + source, 0, SHARED, at);
        Place p = shared_place(M, at + 2 * column, 2, pc, w.id * 32 + source);
        u16 v = 0xDBDB;
        if (p.host) {
          u8 t = access(M, w, p, 2, w.id * 32 + source, pc, false, false, nullptr, 0);
          memcpy(&v, p.host, 2);
          if (t & UNDEFINED) undefined[k] |= 1u << l;
          if (t & RACY) racy[k] |= 1u << l;
        }
        ((u16*)&out[k][l])[half] = v;
      }
  for (int k = 0; k < i.nd; k++) {
    memcpy(w.reg(i.d[k]), out[k], 128);
    taint(w, 0, i.d[k]) = undefined[k]; taint(w, 1, i.d[k]) = racy[k];
  }
}

template <class F> inline void Executor::multiply(Warp& w, const Insn& i, F of) {
  static thread_local float a[16][16], b[16][8], c[16][8];
  auto halves = [&](i32 r, int l) { return ((u32*)w.reg(r))[l]; };
  for (int l = 0; l < 32; l++) {
    int g = l / 4, t = l % 4;
    for (int k = 0; k < 4; k++) {
      u32 v = halves(i.s[k], l);
      int row = g + 8 * (k & 1), column = 2 * t + 8 * (k >> 1);
      a[row][column] = of((u16)v); a[row][column + 1] = of((u16)(v >> 16));
    }
    for (int k = 0; k < 2; k++) {
      u32 v = halves(i.s[4 + k], l);
      b[2 * t + 8 * k][g] = of((u16)v); b[2 * t + 8 * k + 1][g] = of((u16)(v >> 16));
    }
    for (int k = 0; k < 4; k++) c[g + 8 * (k >> 1)][2 * t + (k & 1)] = ((float*)w.reg(i.s[6 + k]))[l];
  }
  for (int r = 0; r < 16; r++) {
    double sum[8];
    for (int n = 0; n < 8; n++) sum[n] = c[r][n];
    for (int k = 0; k < 16; k++)
      for (int n = 0; n < 8; n++) sum[n] += (double)a[r][k] * (double)b[k][n];
    for (int n = 0; n < 8; n++) c[r][n] = (float)sum[n];
  }
  for (int l = 0; l < 32; l++)
    for (int k = 0; k < 4; k++) ((float*)w.reg(i.d[k]))[l] = c[l / 4 + 8 * (k >> 1)][2 * (l % 4) + (k & 1)];
  for (int plane = 0; plane < 2; plane++) set_taint(w, plane, i, FULL, sources(w, plane, i) ? FULL : 0);
}

inline void Executor::store_matrix(Warp& w, const Insn& i, u32 pc) {  // one 8 x 8 matrix: row r goes where lane r says
  const u32 *rows = (u32*)w.reg(i.s[0]), *value = (u32*)w.reg(i.s[1]);
  u64 starts[32];
  for (int l = 0; l < 8; l++) starts[l] = rows[l] + (u32)i.imm;
  count_shared(starts, 0xFF, 16);
  for (int l = 0; l < 32; l++) {
    u32 at = rows[l / 4] + (u32)i.imm;
    if (at % 16) M.report(MISALIGNED, pc, 0, w.id * 32 + l / 4, 0, SHARED, at);
    Place p = shared_place(M, at + 4 * (l % 4), 4, pc, w.id * 32 + l / 4);
    if (!p.host) continue;
    u8 stored = (taint(w, 0, i.s[1]) >> l & 1 ? UNDEFINED : 0) | (taint(w, 1, i.s[1]) >> l & 1 ? RACY : 0);
    access(M, w, p, 4, w.id * 32 + l / 4, pc, true, false, (const u8*)&value[l], stored);
    memcpy(p.host, &value[l], 4);
  }
}

// wgmma.mma_async m64nNk16, A and B in shared memory, rows along K, swizzled: a warp's 16 rows of D. Computed when
// issued; the shared memory that it reads must stay until wgmma.wait_group. s: descriptors, scale-d; extra: N / 2 registers.
template <class F> inline void Executor::multiply_group(Warp& w, const Insn& i, u32 pc, F of) {
  const int n = i.cmp, tid = w.id * 32;
  const i32* d = M.extra + i.target;
  u64 da = w.reg(i.s[0])[0], db = w.reg(i.s[1])[0];
  for (int l = 1; l < 32; l++)
    if (w.reg(i.s[0])[l] != da || w.reg(i.s[1])[l] != db) M.report(DIVERGENT_SYNC, pc, 0, tid + l, 0, -1, 0);
  if (!(da >> 62) || !(db >> 62)) { fprintf(stderr, "wgmma: layouts without a swizzle are not modelled\n"); abort(); }
  Reads reads;
  bool undefined = false, racy = false;
  auto fetch = [&](u64 desc, int row, float* to) {
    u64 start = (desc & 0x3FFF) << 4, stride = (desc >> 32 & 0x3FFF) << 4;
    int swizzle = 4 - (int)(desc >> 62), pitch = 16 << swizzle;  // 3 bits and 128 bytes, 2 and 64, 1 and 32
    for (int chunk = 0; chunk < 2; chunk++) {
      u64 at = start + row / 8 * stride + row % 8 * pitch + 16 * chunk;
      at ^= (at >> 7 & ((1 << swizzle) - 1)) << 4;
      Place p = shared_place(M, at, 16, pc, tid);
      u16 v[8];
      memset(v, 0xDB, sizeof v);
      if (p.host) {
        u8 t = access(M, w, p, 16, tid, pc, false, false, nullptr, 0);
        undefined |= (t & UNDEFINED) != 0; racy |= (t & RACY) != 0;
        memcpy(v, p.host, 16);
        if (M.o.check) for (int g = 0; g <= 15 >> p.shift; g++) {
          p.shadow[g].reading++;
          reads.push_back((u32)(p.offset >> p.shift) + g);
        }
      }
      for (int k = 0; k < 8; k++) to[8 * chunk + k] = of(v[k]);
    }
  };
  static thread_local float a[16][16], b[16][256], row_of_b[16];
  for (int r = 0; r < 16; r++) fetch(da, 16 * (w.id % 4) + r, a[r]);
  for (int c = 0; c < n; c++) {
    fetch(db, c, row_of_b);
    for (int x = 0; x < 16; x++) b[x][c] = row_of_b[x];
  }
  u32 keep = w.pm[pred_of(i.s[2])];
  u32 t0 = undefined ? FULL : 0, t1 = racy ? FULL : 0;
  for (int k = 0; k < n / 2; k++)
    if (keep) { t0 |= taint(w, 0, d[k]); t1 |= taint(w, 1, d[k]); }
  // Entry (row, column) lies in register k of lane l: row = l / 4 + 8 (k / 2 % 2), column = 8 (k / 4) + 2 (l % 4) + k % 2.
  auto entry = [&](int row, int column) -> float& {
    return ((float*)w.reg(d[column / 8 * 4 + row / 8 * 2 + column % 2]))[row % 8 * 4 + column % 8 / 2];
  };
  for (int row = 0; row < 16; row++) {
    double sum[256];
    for (int c = 0; c < n; c++) sum[c] = keep >> (row % 8 * 4 + c % 8 / 2) & 1 ? entry(row, c) : 0.0f;
    for (int x = 0; x < 16; x++)
      for (int c = 0; c < n; c++) sum[c] += (double)a[row][x] * (double)b[x][c];
    for (int c = 0; c < n; c++) entry(row, c) = (float)sum[c];
  }
  for (int k = 0; k < n / 2; k++) { taint(w, 0, d[k]) = t0; taint(w, 1, d[k]) = t1; }
  w.wg_open.push_back(std::move(reads));
}
