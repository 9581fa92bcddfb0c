// Loads, stores, atomics and asynchronous copies.
#pragma once
#include "executor.hpp"

// The bytes that lane l accesses: checked for bounds and alignment; host is null where they lie nowhere.
inline Place Executor::locate(u64 at, int n, u32 pc, int tid, bool shared) {
  if (at % n) M.report(MISALIGNED, pc, 0, tid, 0, shared ? SHARED : (int)(at >> 40), at & ((1ull << 40) - 1));
  return shared ? shared_place(M, at, n, pc, tid) : global_place(M, at, n, pc, tid);
}

// Sectors of 32 bytes that a warp instruction touches in global memory, each counted once.
inline void Executor::count_global(const u64* at, u32 m, int n, bool write) {
  u64 sectors[64];
  int many = 0;
  EACH for (u64 s = at[l] >> 5; s <= (at[l] + n - 1) >> 5 && many < 64; s++)
    if (!many || sectors[many - 1] != s) sectors[many++] = s;
  if (!std::is_sorted(sectors, sectors + many)) std::sort(sectors, sectors + many);
  u64 distinct = std::unique(sectors, sectors + many) - sectors;
  (write ? M.totals.sectors_written : M.totals.sectors_read) += distinct;
}

// Passes over the 32 banks of 4 bytes: 128 bytes of lanes go at a time; lanes that want other words of a bank wait.
inline void Executor::count_shared(const u64* at, u32 m, int n) {
  int together = n <= 4 ? 32 : 128 / n;
  for (int first = 0; first < 32; first += together) {
    u32 words[32][32];
    int depth[32] = {}, most = 0;
    for (int l = first; l < first + together; l++) if (m >> l & 1)
      for (u32 word = (u32)at[l] >> 2; word <= ((u32)at[l] + n - 1) >> 2; word++) {
        int bank = word % 32, k = 0;
        while (k < depth[bank] && words[bank][k] != word) k++;
        if (k == depth[bank] && k < 32) words[bank][depth[bank]++] = word, most = std::max(most, depth[bank]);
      }
    M.totals.shared_passes += most;
    if (most > 1) M.totals.conflicts += most - 1;
  }
}

inline u64 Executor::address_of(Warp& w, const Insn& i, i32 r, int l, bool shared) {
  return shared ? (u64)(u32)(((u32*)w.reg(r))[l] + (u32)i.imm) : w.reg(r)[l] + (u64)i.imm;
}

inline void put(Warp& w, i32 r, int l, int size, const u8* from, int n) {
  u64 v = 0;
  memcpy(&v, from, n);
  if (size == 2) ((u16*)w.reg(r))[l] = (u16)v;
  else if (size == 4) ((u32*)w.reg(r))[l] = (u32)v;
  else w.reg(r)[l] = v;
}

inline const u8* lane_of(Warp& w, i32 r, int l, int size) { return (const u8*)w.reg(r) + (size_t)size * l; }

inline void Executor::load(Warp& w, const Insn& i, u32 pc, u32 m, bool shared) {
  check_use(w, pc, i.s[0], m, UNDEFINED_ADDRESS);
  int n = i.vec * i.esize;
  u32 undefined = 0, racy = 0;
  u64 at[32];
  EACH {
    at[l] = address_of(w, i, i.s[0], l, shared);
    int tid = w.id * 32 + l;
    Place p = locate(at[l], n, pc, tid, shared);
    u8 garbage[16], *from = p.host;
    if (!from) {
      memset(garbage, 0xDB, sizeof garbage);
      from = garbage;
      undefined |= 1u << l;
    } else {
      u8 t = access(M, w, p, n, tid, pc, false, false, nullptr, 0);
      if (t & UNDEFINED) undefined |= 1u << l;
      if (t & RACY) racy |= 1u << l;
    }
    for (int k = 0; k < i.vec; k++)
      if (i.d[k] != SINK) put(w, i.d[k], l, i.rsize, from + k * i.esize, i.esize);
  }
  shared ? count_shared(at, m, n) : count_global(at, m, n, false);
  set_taint(w, 0, i, m, undefined | taint(w, 0, i.s[0]));
  set_taint(w, 1, i, m, racy | taint(w, 1, i.s[0]));
}

// s[0]: address, s[1...]: values
inline void Executor::store(Warp& w, const Insn& i, u32 pc, u32 m, bool shared) {
  check_use(w, pc, i.s[0], m, UNDEFINED_ADDRESS);
  int n = i.vec * i.esize;
  u32 undefined = 0, racy = 0;
  for (int k = 0; k < i.vec; k++) {
    if (!shared) check_use(w, pc, i.s[1 + k], m, UNDEFINED_STORE);
    undefined |= taint(w, 0, i.s[1 + k]);
    racy |= taint(w, 1, i.s[1 + k]);
  }
  u64 at[32];
  EACH {
    at[l] = address_of(w, i, i.s[0], l, shared);
    int tid = w.id * 32 + l;
    Place p = locate(at[l], n, pc, tid, shared);
    if (!p.host) continue;
    u8 value[16];
    for (int k = 0; k < i.vec; k++) memcpy(value + k * i.esize, lane_of(w, i.s[1 + k], l, i.rsize), i.esize);
    u8 stored = (undefined >> l & 1 ? UNDEFINED : 0) | (racy >> l & 1 ? RACY : 0);
    access(M, w, p, n, tid, pc, true, false, value, stored);
    memcpy(p.host, value, n);
  }
  shared ? count_shared(at, m, n) : count_global(at, m, n, true);
}

inline void Executor::atomic_add(Warp& w, const Insn& i, u32 pc, u32 m) {
  check_use(w, pc, i.s[0], m, UNDEFINED_ADDRESS);
  check_use(w, pc, i.s[1], m, UNDEFINED_STORE);
  u32 undefined = 0;
  u64 at[32];
  EACH {
    at[l] = address_of(w, i, i.s[0], l, false);
    int tid = w.id * 32 + l;
    Place p = locate(at[l], 4, pc, tid, false);
    if (!p.host) continue;
    u32 old, add = ((u32*)w.reg(i.s[1]))[l];
    memcpy(&old, p.host, 4);
    if (access(M, w, p, 4, tid, pc, true, true, nullptr, 0) & UNDEFINED) undefined |= 1u << l;
    u32 sum = old + add;
    memcpy(p.host, &sum, 4);
    if (i.d[0] != SINK) ((u32*)w.reg(i.d[0]))[l] = old;
  }
  count_global(at, m, 4, false);
  count_global(at, m, 4, true);
  if (undefined) M.report(UNDEFINED_STORE, pc, 0, w.id * 32 + __builtin_ctz(undefined), 0, -1, 0);
  set_taint(w, 0, i, m, undefined);
  set_taint(w, 1, i, m, 0);
}

// ---- cp.async: s[0] in shared memory, s[1] in global memory, s[2] bytes that are read (the rest are zeros)

inline void Executor::copy_async(Warp& w, const Insn& i, u32 pc, u32 m) {
  for (int k = 0; k < i.ns; k++) check_use(w, pc, i.s[k], m, UNDEFINED_ADDRESS);
  const int n = i.vec;
  u64 to[32], of[32];
  u32 reading = 0;
  EACH {
    int tid = w.id * 32 + l;
    to[l] = ((u32*)w.reg(i.s[0]))[l] + (u32)i.imm;
    of[l] = w.reg(i.s[1])[l] + (u64)(i64)i.cmp;
    u32 real = i.ns > 2 ? ((u32*)w.reg(i.s[2]))[l] : n;
    if (to[l] % n || of[l] % n) M.report(MISALIGNED, pc, 0, tid, 0, (int)(of[l] >> 40), of[l] & ((1ull << 40) - 1));
    Copy c{(u32)to[l], (u8)n, {}, pc, 0};
    if (real) {
      reading |= 1u << l;
      Place p = global_place(M, of[l], real, pc, tid);
      if (!p.host) continue;
      c.taint = access(M, w, p, real, tid, pc, false, false, nullptr, 0);
      memcpy(c.data, p.host, real);
    }
    Place p = shared_place(M, to[l], n, pc, tid);
    if (!p.host) continue;
    if (M.o.check) touch_copied(w, p, n, tid, pc);
    if (M.o.eager_copies) memcpy(p.host, c.data, n);
    w.open[l].push_back(c);
  }
  count_global(of, reading, n, false);
  count_shared(to, m, n);
}

// The copy's write counts from when it is issued: whoever touches its bytes before the wait is told.
inline void Executor::touch_copied(Warp& w, const Place& p, int n, int tid, u32 pc) {
  for (int g = 0; g <= (n - 1) >> p.shift; g++) {
    Shadow& s = p.shadow[g];
    if (s.reading) M.report(ASYNC_PENDING, pc, 0, tid, 0, SHARED, p.offset);
    if (s.pending) M.report(ASYNC_PENDING, pc, s.w_pc, tid, s.w_tid, SHARED, p.offset);
    touch(M, w, s, tid, pc, true, false, false, SHARED, p.offset + ((i64)g << p.shift));
    s.pending++;
  }
}

inline void Executor::finish(Warp& w, const Copy& c, int l) {
  Place p = shared_place(M, c.dst, c.n, c.pc, w.id * 32 + l);
  if (!p.host) return;
  if (M.o.check)
    for (int g = 0; g <= (c.n - 1) >> p.shift; g++) p.shadow[g].pending--;
  access(M, w, p, c.n, w.id * 32 + l, c.pc, true, false, c.data, c.taint, true);
  memcpy(p.host, c.data, c.n);
}
