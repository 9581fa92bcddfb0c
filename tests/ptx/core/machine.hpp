// Data of the executor: instructions, buffers, warps, what is found and what is counted.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <unordered_map>
#include <vector>

using u8 = uint8_t; using u16 = uint16_t; using u32 = uint32_t; using u64 = uint64_t;
using i16 = int16_t; using i32 = int32_t; using i64 = int64_t;
constexpr u32 FULL = 0xFFFFFFFFu;
constexpr int SINK = -1;  // operand `_`

// An operand: r >= 0 a register, r <= -2 the predicate -(r + 2).
inline bool is_pred(i32 r) { return r <= -2; }
inline int pred_of(i32 r) { return -(r + 2); }

// ---- shared with Python (native.py)

struct Insn {
  u16 op; u8 nd, ns;
  i32 guard;                        // predicate, -1: none
  u8 guard_neg, vec, esize, rsize;  // rsize: bytes of the data registers of a load or store
  i32 cmp;                          // comparison, kind of shuffle, columns of a wgmma, offset of a cp.async's source
  i32 target;                       // of a branch; where a wgmma's registers begin in `extra`
  i64 imm;                          // address offset, groups that may stay under way
  i32 d[4], s[14];
};

struct Buffer {
  u64 base, size;
  u8* host;
  struct Shadow* shadow;
  u8* flags;
  u8 shift;  // a granule, what one Shadow and one flag describe, has 1 << shift bytes
};

struct Event {
  i32 kind, pc, pc2, block, tid, tid2, buffer, same_value;
  i64 offset, count;
};

struct Options {
  i32 order;          // of warps: 0 in order, 1 reverse, 2 random
  i32 independent;    // lanes run by themselves between collectives
  i32 yield_percent;  // chance to switch after a memory operation, random order only
  i32 block_order;    // 0 in order, 1 reverse, 2 random
  i32 noise;          // last places of error of approximate instructions
  i32 check;          // races, definedness
  i32 eager_copies;   // cp.async writes when issued, not when waited for
  i32 salt;           // of the random order, not of the noise
  u64 seed, budget;   // budget: instructions that a warp may take
};

struct Totals {
  u64 instructions;                   // of warps
  u64 aborted, barriers;              // barriers: a block's, not a warp's
  u64 sectors_read, sectors_written;  // of 32 bytes, in global memory, each once a warp instruction
  u64 shared_passes, conflicts;       // passes over the banks of shared memory; those that conflicts added
};

struct Launch {
  const Insn* code; const i32* extra;
  i32 n_code, n_regs, n_preds, n_warps, shared_size, shared_shift, n_buffers;
  i32 tid_register, laneid_register, ctaid_registers[3], grid[3];  // a register that is not used: -1
  const u64* registers;   // the first value of each: constants, parameters
  const u8* widths;       // its bytes
  const u32* predicates;  // their first values
  const u32* undefined;   // registers, then predicates: all ones where there is no first value
  Buffer* buffers;
};

// ---- the core's own

enum Kind : int {
  NOTHING,
#define X(name) name,
#include "kinds.inc"
#undef X
};

enum Flag : u8 { UNDEFINED = 1, OUTSIDE = 2, RACY = 4 };

// Who touched a granule of memory last. An access counts only while its epoch is not older than the launch.
struct Shadow {
  u32 w_epoch, w_collective, w_pc; i32 w_block; u16 w_tid; u8 w_atomic, pending, reading;
  u32 r_epoch;                      // readers of that barrier epoch:
  u16 r1_tid, r2_tid, rw_tid, pad;  // the first; the first of another warp; another of r1's warp
  u32 r1_pc, r2_pc, rw_pc, r1_collective, r2_collective, rw_collective;
  u32 b_epoch, b_pc; i32 b1, b2;    // blocks that read it in this launch
};
constexpr u16 NOBODY = 0xFFFF;

struct Group { u32 pc, mask; bool wait; };  // lanes that run together
struct Copy { u32 dst; u8 n; u8 data[16]; u32 pc; u8 taint; };  // a cp.async under way
using Reads = std::vector<u32>;  // granules of shared memory that a wgmma under way reads

struct Warp {
  int id;
  u64* rf; u32* pm;  // registers, predicates
  u32* taint[2];     // of registers, then predicates: lanes where it is undefined; where it was read in a race
  u32 live; bool at_barrier; u32 barrier_pc, collective;
  u32 ordered;  // collectives up to the last bar.warp.sync, which orders the memory accesses of the warp's lanes
  std::vector<Group> groups;
  std::vector<Copy> open[32]; std::deque<std::vector<Copy>> committed[32];
  std::vector<Reads> wg_open; std::deque<std::vector<Reads>> wg_committed;
  u64* reg(i32 r) { return rf + 32 * (u64)r; }
};

struct Machine {
  const Insn* code; const i32* extra; int n_code, n_regs, n_preds, shared_size, shared_shift;
  Buffer* buffers; int n_buffers;
  std::vector<u8> shared; std::vector<Shadow> shared_shadow; std::vector<u8> shared_flags;
  std::vector<Warp> warps;
  Options o;
  u32 epoch, launch_epoch;
  int block;
  u64 rng;
  Totals totals;
  std::unordered_map<u64, Event> events;
  u32* hits;  // executions of each instruction by warps

  u64 random() { rng ^= rng << 13; rng ^= rng >> 7; rng ^= rng << 17; return rng; }
  void report(int kind, int pc, int pc2, int tid, int tid2, int buffer, i64 offset, int same = -1) {
    u64 key = ((u64)kind << 56) | ((u64)(pc & 0xFFFFFF) << 32) | ((u64)(pc2 & 0xFFFFFF) << 8) | (u64)(same + 1);
    events.try_emplace(key, Event{kind, pc, pc2, block, tid, tid2, buffer, same, offset, 0}).first->second.count++;
  }
};
