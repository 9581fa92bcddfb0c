// Block tables with reference counts (DESIGN section 5.7): block_table_fork, _extend, _commit and _rollback on the
// state of power_kernels/block_tables.py, and kv_copy_blocks, which is kv_copy_ranges within one pool.
// power_kernels/reference/paged_kv.py is the specification; every entry written here equals its.
//
// Bytes: 4 to 12 an entry of the rows that change. All of it is bookkeeping in row order on one thread.

#include "state.h"

#include <algorithm>
#include <cstdint>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace power_kernels {

using torch::stable::Tensor;

void kv_copy_ranges(Tensor dst, Tensor src, Tensor ranges);  // kv_cache.cpp

namespace {

int32_t* entries(const Tensor& tensor) { return static_cast<int32_t*>(tensor.data_ptr()); }

struct Tables {
  Tables(const Tensor& block_table, const Tensor& length, const Tensor& refcount, const Tensor& free_list,
         const Tensor& free_count, const Tensor& copies, const Tensor& status, int64_t block_size)
      : length(entries(length)),
        copies(entries(copies)),
        status(entries(status)),
        rows(block_table.size(0)),
        max_blocks(block_table.size(1)),
        block_size(block_size),
        table_(entries(block_table)),
        stride_(block_table.stride(0)),
        refcount_(entries(refcount)),
        free_list_(entries(free_list)),
        free_count_(entries(free_count)) {}

  int32_t* row(int64_t r) const { return table_ + r * stride_; }
  int64_t held(int64_t tokens) const { return (tokens + block_size - 1) / block_size; }
  bool shared(int32_t block) const { return refcount_[block] > 1; }
  void share(int32_t block) const { ++refcount_[block]; }
  int64_t available() const { return *free_count_; }

  int32_t take() const {
    const int32_t block = free_list_[--*free_count_];
    refcount_[block] = 1;
    return block;
  }

  void release(int32_t block) const {
    if (--refcount_[block] == 0) free_list_[(*free_count_)++] = block;
  }

  void set_copy(int64_t r, int32_t to, int32_t of, int64_t stop) const {
    const int32_t copy[4] = {to, of, 0, static_cast<int32_t>(stop)};
    std::copy(copy, copy + 4, copies + r * 4);
  }

  void set_status(int64_t r, BlockStatus value) const { status[r] = static_cast<int32_t>(value); }

  int32_t* const length;
  int32_t* const copies;
  int32_t* const status;
  const int64_t rows, max_blocks, block_size;

 private:
  int32_t* const table_;
  const int64_t stride_;
  int32_t* const refcount_;
  int32_t* const free_list_;
  int32_t* const free_count_;
};

}  // namespace

void block_table_fork(Tensor block_table, Tensor length, Tensor refcount, Tensor free_list, Tensor free_count,
                      Tensor copies, Tensor status, Tensor parent, Tensor tokens, int64_t block_size) {
  const Tables t(block_table, length, refcount, free_list, free_count, copies, status, block_size);
  const int32_t *parents = entries(parent), *counts = entries(tokens);
  // What a fork writes is read by no other fork of the call, except lengths.
  const std::vector<int32_t> before(t.length, t.length + t.rows);
  const int64_t available = t.available();
  int64_t asked = 0;
  for (int64_t r = 0; r < t.rows; ++r) {
    t.set_copy(r, 0, 0, 0);
    t.set_status(r, BlockStatus::OK_);
    const int64_t p = parents[r], n = counts[r];
    if (p < 0) continue;
    if (p >= t.rows || p == r) {
      t.set_status(r, BlockStatus::BAD_ROW_);
    } else if (before[r] != 0) {
      t.set_status(r, BlockStatus::NOT_EMPTY_);
    } else if (n < 0 || n > before[p]) {
      t.set_status(r, BlockStatus::BAD_TOKENS_);
    } else {
      const int64_t full = n / block_size, split = n % block_size;
      asked += split > 0;
      if (split > 0 && asked > available) {
        t.set_status(r, BlockStatus::OUT_OF_BLOCKS_);
        continue;
      }
      const int32_t* from = t.row(p);
      int32_t* to = t.row(r);
      std::copy(from, from + full, to);
      for (int64_t j = 0; j < full; ++j) t.share(from[j]);
      if (split > 0) {
        to[full] = t.take();
        t.set_copy(r, to[full], from[full], split);
      }
      t.length[r] = static_cast<int32_t>(n);
    }
  }
}

void block_table_extend(Tensor block_table, Tensor length, Tensor refcount, Tensor free_list, Tensor free_count,
                        Tensor copies, Tensor status, Tensor tokens, int64_t block_size) {
  const Tables t(block_table, length, refcount, free_list, free_count, copies, status, block_size);
  const int32_t* counts = entries(tokens);
  const int64_t available = t.available();
  int64_t asked = 0;
  for (int64_t r = 0; r < t.rows; ++r) {
    t.set_copy(r, 0, 0, 0);
    t.set_status(r, BlockStatus::OK_);
    const int64_t n = counts[r], old = t.length[r];
    if (n <= old) continue;
    const int64_t have = t.held(old), want = t.held(n), split = old % block_size;
    if (want > t.max_blocks) {
      t.set_status(r, BlockStatus::BAD_TOKENS_);
      continue;
    }
    int32_t* row = t.row(r);
    const int32_t last = split > 0 ? row[have - 1] : -1;
    const bool shared = split > 0 && t.shared(last);
    const int64_t first = have - shared;
    asked += want - first;
    if (want > first && asked > available) {
      t.set_status(r, BlockStatus::OUT_OF_BLOCKS_);
      continue;
    }
    for (int64_t j = first; j < want; ++j) row[j] = t.take();
    if (shared) {
      t.release(last);  // others hold it
      t.set_copy(r, row[first], last, split);
    }
    t.length[r] = static_cast<int32_t>(n);
  }
}

void block_table_commit(Tensor block_table, Tensor length, Tensor refcount, Tensor free_list, Tensor free_count,
                        Tensor copies, Tensor status, Tensor source, int64_t block_size) {
  const Tables t(block_table, length, refcount, free_list, free_count, copies, status, block_size);
  const int32_t* sources = entries(source);
  for (int64_t r = 0; r < t.rows; ++r) {
    t.set_status(r, BlockStatus::OK_);
    const int64_t s = sources[r];
    if (s < 0) continue;
    if (s >= t.rows || s == r || sources[s] >= 0) {
      t.set_status(r, BlockStatus::BAD_ROW_);
    } else if (t.length[s] == 0) {
      t.set_status(r, BlockStatus::EMPTY_);
    } else {
      int32_t *to = t.row(r), *from = t.row(s);
      for (int64_t j = 0; j < t.held(t.length[r]); ++j) t.release(to[j]);
      std::copy(from, from + t.held(t.length[s]), to);
      t.length[r] = t.length[s];
      t.length[s] = 0;
    }
  }
}

void block_table_rollback(Tensor block_table, Tensor length, Tensor refcount, Tensor free_list, Tensor free_count,
                          Tensor copies, Tensor status, Tensor tokens, int64_t block_size) {
  const Tables t(block_table, length, refcount, free_list, free_count, copies, status, block_size);
  const int32_t* counts = entries(tokens);
  for (int64_t r = 0; r < t.rows; ++r) {
    const int64_t n = counts[r];
    if (n < 0 || n >= t.length[r]) continue;
    for (int64_t j = t.held(n); j < t.held(t.length[r]); ++j) t.release(t.row(r)[j]);
    t.length[r] = static_cast<int32_t>(n);
  }
}

void kv_copy_blocks(Tensor pool, Tensor copies) { kv_copy_ranges(pool, pool, copies); }

void add_paged_kv(torch::stable::detail::StableLibrary& m) {
  m.impl("block_table_fork", TORCH_BOX(&block_table_fork));
  m.impl("block_table_extend", TORCH_BOX(&block_table_extend));
  m.impl("block_table_commit", TORCH_BOX(&block_table_commit));
  m.impl("block_table_rollback", TORCH_BOX(&block_table_rollback));
  m.impl("kv_copy_blocks", TORCH_BOX(&kv_copy_blocks));
}

}  // namespace power_kernels
