// Memory: bounds, alignment, definedness, and happens-before by barrier epochs.
#pragma once
#include "machine.hpp"

constexpr int SHARED = 0;  // buffer 0 in events

// One lane's access of a granule, checked against those of other lanes and then recorded.
// Returns the taint of what is read: UNDEFINED, RACY.
inline u8 touch(Machine& m, Warp& w, Shadow& s, int tid, u32 pc, bool write, bool atomic, bool same, int buffer, i64 offset) {
  u8 racy = 0;
  auto against = [&](int other, u32 other_pc, u32 collective, bool lanes) {
    if (other / 32 == tid / 32 && collective < w.ordered) return;
    int kind = other / 32 != tid / 32 ? RACE_WARPS
      : lanes && other_pc == pc && collective == w.collective ? RACE_LANES
      : collective == w.collective ? RACE_WARP : RACE_WARP_SYNC;
    m.report(kind, pc, other_pc, tid, other, buffer, offset, lanes ? same : -1);
    if (kind == RACE_WARPS || (kind == RACE_WARP && m.o.independent)) racy = RACY;
  };
  if (s.w_epoch == m.epoch) {
    if (s.w_tid != tid && !(atomic && s.w_atomic)) against(s.w_tid, s.w_pc, s.w_collective, write);
  } else if (s.w_epoch >= m.launch_epoch && s.w_epoch && s.w_block != m.block && !(atomic && s.w_atomic)) {
    m.report(RACE_BLOCKS, pc, s.w_pc, tid, s.w_block, buffer, offset, write ? same : -1);
    racy = RACY;
  }
  if (write) {
    if (s.r_epoch == m.epoch) {
      if (s.r1_tid != tid) against(s.r1_tid, s.r1_pc, s.r1_collective, false);
      if (s.r2_tid != NOBODY && s.r2_tid != tid) against(s.r2_tid, s.r2_pc, s.r2_collective, false);
      if (s.rw_tid != NOBODY && s.rw_tid != tid) against(s.rw_tid, s.rw_pc, s.rw_collective, false);
    }
    if (s.b_epoch >= m.launch_epoch && s.b_epoch) {
      int other = s.b1 != m.block ? s.b1 : s.b2;
      if (other >= 0 && other != m.block) m.report(RACE_BLOCKS, pc, s.b_pc, tid, other, buffer, offset);
    }
    s.w_epoch = m.epoch; s.w_tid = tid; s.w_pc = pc; s.w_block = m.block; s.w_atomic = atomic;
    s.w_collective = w.collective;
    return racy;
  }
  if (s.r_epoch != m.epoch) {
    s.r_epoch = m.epoch; s.r1_tid = tid; s.r1_pc = pc; s.r1_collective = w.collective; s.r2_tid = s.rw_tid = NOBODY;
  } else if (s.r1_tid == tid) {
    s.r1_pc = pc; s.r1_collective = w.collective;
  } else if (s.r1_tid / 32 != tid / 32) {
    s.r2_tid = tid; s.r2_pc = pc; s.r2_collective = w.collective;
  } else {
    s.rw_tid = tid; s.rw_pc = pc; s.rw_collective = w.collective;
  }
  if (s.b_epoch < m.launch_epoch || !s.b_epoch) { s.b1 = m.block; s.b2 = -1; }
  else if (s.b1 != m.block) s.b2 = m.block;
  s.b_epoch = m.epoch; s.b_pc = pc;
  return racy;
}

struct Place { u8* host; Shadow* shadow; u8* flags; u8 shift; int buffer; i64 offset; };

// Where `n` bytes at an address lie; host is null when they lie nowhere.
inline Place global_place(Machine& m, u64 address, int n, u32 pc, int tid) {
  u64 index = address >> 40;
  if (index >= 1 && index <= (u64)m.n_buffers) {
    Buffer& b = m.buffers[index - 1];
    i64 offset = (i64)(address - b.base);
    if (offset >= 0 && offset + n <= (i64)b.size)
      return {b.host + offset, b.shadow + (offset >> b.shift), b.flags + (offset >> b.shift), b.shift, (int)index, offset};
    m.report(OUT_OF_BOUNDS, pc, 0, tid, 0, (int)index, offset);
    return {};
  }
  m.report(OUT_OF_BOUNDS, pc, 0, tid, 0, -1, (i64)address);
  return {};
}

inline Place shared_place(Machine& m, u64 address, int n, u32 pc, int tid) {
  i64 offset = (i64)(u32)address;
  if (offset + n > m.shared_size) { m.report(OUT_OF_BOUNDS, pc, 0, tid, 0, SHARED, offset); return {}; }
  int s = m.shared_shift;
  return {m.shared.data() + offset, m.shared_shadow.data() + (offset >> s), m.shared_flags.data() + (offset >> s),
          (u8)s, SHARED, offset};
}

// One lane's access of n bytes. Returns the taint of what it read.
inline u8 access(Machine& m, Warp& w, const Place& p, int n, int tid, u32 pc, bool write, bool atomic, const u8* value,
                 u8 stored_taint, bool completes = false) {
  if (!m.o.check) return 0;
  u8 taint = 0;
  int first = 0, last = ((p.offset & ((1 << p.shift) - 1)) + n - 1) >> p.shift;
  for (int g = first; g <= last; g++) {
    i64 at = p.offset + ((i64)g << p.shift);
    bool same = write && value && !memcmp(p.host, value, n);
    Shadow& s = p.shadow[g];
    if (write && s.reading) m.report(ASYNC_PENDING, pc, 0, tid, 0, p.buffer, at);
    if (s.pending && !completes) m.report(ASYNC_PENDING, pc, s.w_pc, tid, s.w_tid, p.buffer, at);
    taint |= touch(m, w, s, tid, pc, write, atomic, same, p.buffer, at);
    if (p.flags[g] & OUTSIDE) m.report(OUTSIDE_VIEW, pc, 0, tid, 0, p.buffer, at);
    if (write) {
      if (!atomic) p.flags[g] = (p.flags[g] & OUTSIDE) | stored_taint;
    } else {
      taint |= p.flags[g] & (UNDEFINED | RACY);
    }
    if (atomic) taint |= p.flags[g] & (UNDEFINED | RACY);
  }
  return taint;
}
