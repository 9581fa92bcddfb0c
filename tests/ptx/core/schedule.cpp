// Blocks one after the other; the warps of a block, and lanes of a warp, in the order that the options ask for.
#include "run.hpp"

static void split_lanes(Machine& M, Warp& w) {
  std::vector<Group> lanes;
  for (auto& g : w.groups)
    for (int l = 0; l < 32; l++) if (g.mask >> l & 1) lanes.push_back({g.pc, 1u << l, false});
  if (M.o.order == 1) std::vector<Group>(lanes.rbegin(), lanes.rend()).swap(lanes);
  if (M.o.order == 2) for (size_t k = lanes.size(); k > 1; k--) std::swap(lanes[k - 1], lanes[M.random() % k]);
  w.groups.swap(lanes);
}

// Groups at the same instruction become one, where lanes run together or where all of them wait.
static void merge(Warp& w) {
  for (size_t a = 0; a < w.groups.size(); a++)
    for (size_t b = w.groups.size(); b-- > a + 1;)
      if (w.groups[a].pc == w.groups[b].pc) {
        w.groups[a].mask |= w.groups[b].mask;
        w.groups.erase(w.groups.begin() + b);
        w.groups[a].wait = false;
      }
}

// Runs a warp until it meets a barrier, ends, or yields.
static void run_warp(Machine& M, Executor& x, Warp& w) {
  for (u64 spent = 0; !M.totals.aborted; spent++) {
    if (spent > M.o.budget) { M.report(HANG, w.groups.empty() ? 0 : w.groups[0].pc, 0, w.id * 32, 0, -1, 0); M.totals.aborted = 1; return; }
    if (w.groups.empty()) return;
    if (!M.o.independent && w.groups.size() > 1) merge(w);
    size_t chosen = w.groups.size();
    if (M.o.independent) {
      std::vector<size_t> ready;
      for (size_t k = 0; k < w.groups.size(); k++) if (!w.groups[k].wait) ready.push_back(k);
      if (!ready.empty()) chosen = ready[M.o.order == 2 ? M.random() % ready.size() : 0];
    } else {
      for (size_t k = 0; k < w.groups.size(); k++)
        if (!w.groups[k].wait && (chosen == w.groups.size() || w.groups[k].pc < w.groups[chosen].pc)) chosen = k;
    }
    if (chosen == w.groups.size()) {  // all wait
      merge(w);
      if (w.groups.size() > 1) {
        M.report(DIVERGENT_SYNC, w.groups[0].pc, w.groups[1].pc, w.id * 32, 0, -1, 0);
        M.totals.aborted = 1;
        return;
      }
      w.groups[0].wait = false;
      chosen = 0;
    }
    i64 budget = !M.o.independent && w.groups.size() > 1 ? 1 : (i64)std::min<u64>(1 << 24, M.o.budget);
    Stop stop = x.run(w, w.groups[chosen], budget);
    switch (stop) {
      case ENDED: w.groups.erase(w.groups.begin() + chosen); break;
      case BARRIER: return;
      case MEMORY: return;
      case SYNCED: split_lanes(M, w); break;
      case RAN: spent += budget; break;
      default: break;
    }
  }
}

static void run_block(Machine& M, Executor& x, int block, const Launch& L) {
  M.block = block;
  M.epoch++;
  if (M.shared_size) {
    memset(M.shared.data(), 0xDB, M.shared_size);
    memset(M.shared_flags.data(), UNDEFINED, M.shared_flags.size());
    memset((void*)M.shared_shadow.data(), 0, M.shared_shadow.size() * sizeof(Shadow));
  }
  const int at[3] = {block % L.grid[0], block / L.grid[0] % L.grid[1], block / L.grid[0] / L.grid[1]};
  const size_t taints = 4 * (M.n_regs + M.n_preds);
  for (Warp& w : M.warps) {
    w.live = FULL; w.at_barrier = false; w.collective++;
    w.groups.assign(1, {0, FULL, false});
    memcpy(w.taint[0], L.undefined, taints);  // what no instruction has written yet
    memset(w.taint[1], 0, taints);
    w.wg_open.clear(); w.wg_committed.clear();
    for (int l = 0; l < 32; l++) { w.open[l].clear(); w.committed[l].clear(); }
    for (int k = 0; k < 3; k++)
      if (L.ctaid_registers[k] >= 0)
        for (int l = 0; l < 32; l++) ((i32*)w.reg(L.ctaid_registers[k]))[l] = at[k];
    if (M.o.independent) split_lanes(M, w);
  }
  while (!M.totals.aborted) {
    std::vector<int> ready;
    int waiting = 0, alive = 0;
    for (Warp& w : M.warps) {
      if (w.groups.empty()) continue;
      alive++;
      if (w.at_barrier) waiting++; else ready.push_back(w.id);
    }
    if (!alive) break;
    if (ready.empty()) {
      u32 pc = 0; bool first = true;
      for (Warp& w : M.warps) if (!w.groups.empty()) {
        if (first) pc = w.barrier_pc, first = false;
        else if (w.barrier_pc != pc) M.report(BARRIER_MISMATCH, w.barrier_pc, pc, w.id * 32, 0, -1, 0);
        w.at_barrier = false;
        if (M.o.independent) split_lanes(M, w);
      }
      if (waiting < (int)M.warps.size()) M.report(BARRIER_MISMATCH, pc, 0, 0, 0, -1, 0);
      M.epoch++;
      M.totals.barriers++;
      continue;
    }
    int who = M.o.order == 0 ? ready.front() : M.o.order == 1 ? ready.back() : ready[M.random() % ready.size()];
    run_warp(M, x, M.warps[who]);
  }
}

// What native.py declares must be laid out as here.
extern "C" int sizes(int which) {
  const int all[] = {sizeof(Insn), sizeof(Buffer), sizeof(Event), sizeof(Options), sizeof(Totals), sizeof(Launch), sizeof(Shadow)};
  return all[which];
}

// Runs every block of a launch. Returns how many events there are.
extern "C" int execute(const Launch* launch, const Options* options, Event* events, int max_events, Totals* totals, u32* hits) {
  const Launch& L = *launch;
  Machine M{};
  M.code = L.code; M.extra = L.extra; M.n_code = L.n_code; M.n_regs = L.n_regs; M.n_preds = L.n_preds;
  M.shared_size = L.shared_size; M.shared_shift = L.shared_shift; M.buffers = L.buffers; M.n_buffers = L.n_buffers;
  M.shared.resize(L.shared_size + 16);
  M.shared_flags.resize((L.shared_size >> L.shared_shift) + 16);
  M.shared_shadow.resize((L.shared_size >> L.shared_shift) + 16);
  M.o = *options;
  M.rng = (M.o.seed ^ (u64)M.o.salt << 40) * 0x9E3779B97F4A7C15ull + 88172645463325252ull;
  M.hits = hits;
  M.launch_epoch = 1;
  const size_t predicates = L.n_preds + 1, taints = L.n_regs + L.n_preds + 1;
  std::vector<u64> rf((size_t)L.n_warps * L.n_regs * 32);
  std::vector<u32> pm(L.n_warps * predicates), taint(L.n_warps * 2 * taints);
  M.warps.resize(L.n_warps);
  for (int k = 0; k < L.n_warps; k++) {
    Warp& w = M.warps[k];
    w.id = k;
    w.rf = rf.data() + (size_t)k * L.n_regs * 32;
    w.pm = pm.data() + k * predicates;
    for (int p = 0; p < 2; p++) w.taint[p] = taint.data() + (2 * k + p) * taints;
    for (int r = 0; r < L.n_regs; r++)
      for (int l = 0; l < 32; l++) {
        u64 v = r == L.tid_register ? (u64)(32 * k + l) : r == L.laneid_register ? (u64)l : L.registers[r];
        put(w, r, l, L.widths[r], (const u8*)&v, L.widths[r]);
      }
    for (int p = 0; p < L.n_preds; p++) w.pm[p] = L.predicates[p];
  }
  Executor x(M);
  const int blocks = L.grid[0] * L.grid[1] * L.grid[2];
  std::vector<int> order(blocks);
  for (int b = 0; b < blocks; b++) order[b] = M.o.block_order == 1 ? blocks - 1 - b : b;
  if (M.o.block_order == 2) for (int b = blocks; b > 1; b--) std::swap(order[b - 1], order[M.random() % b]);
  for (int b : order) {
    if (M.totals.aborted) break;
    run_block(M, x, b, L);
  }
  int n = 0;
  for (auto& [key, event] : M.events) if (n < max_events) events[n++] = event;
  *totals = M.totals;
  return n;
}
