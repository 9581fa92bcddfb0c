// kv_copy_ranges (DESIGN section 5.6): dst[:, dst_row, :, start:stop] = src[:, src_row, :, start:stop] for each row
// (dst_row, src_row, start, stop) of `ranges`.
//
// dst [G, Rd, heads, S, D], src [G, Rs, heads, S', D]: any dtype, moved as bytes; unit stride along D. Bytes moved:
// 2 * G * heads * D * itemsize per position. The ranges must not write the same place twice, nor a place
// that another range reads. A range that leaves a slab is an error, raised before anything is copied.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace power_kernels {

using torch::stable::Tensor;

void kv_copy_ranges(Tensor dst, Tensor src, Tensor ranges) {
  STD_TORCH_CHECK(dst.dim() == 5 && src.dim() == 5, "dst and src must have shape [G, rows, heads, positions, D]");
  STD_TORCH_CHECK(dst.size(0) == src.size(0) && dst.size(2) == src.size(2) && dst.size(4) == src.size(4) &&
                      dst.scalar_type() == src.scalar_type(),
                  "dst and src must agree in G, heads, D and dtype");
  STD_TORCH_CHECK(ranges.dim() == 2 && ranges.size(1) == 4 && ranges.element_size() == 4,
                  "ranges must be int32 [R, 4]");
  const int64_t G = dst.size(0), heads = dst.size(2), D = dst.size(4), item = dst.element_size();
  STD_TORCH_CHECK(D <= 1 || (dst.stride(4) == 1 && src.stride(4) == 1), "dst and src must have unit stride along D");

  struct Copy {
    int64_t dst, src, positions;  // byte offsets of the first position
  };
  std::vector<Copy> copies;
  const int32_t* r = static_cast<const int32_t*>(ranges.data_ptr());
  int64_t most = 0;
  for (int64_t i = 0; i < ranges.size(0); ++i) {
    const auto at = [&](int64_t j) -> int64_t { return r[i * ranges.stride(0) + j * ranges.stride(1)]; };
    const int64_t dst_row = at(0), src_row = at(1), start = at(2), stop = at(3);
    if (stop <= start) continue;
    const bool inside = dst_row >= 0 && dst_row < dst.size(1) && src_row >= 0 && src_row < src.size(1) && start >= 0 &&
                        stop <= dst.size(3) && stop <= src.size(3);
    STD_TORCH_CHECK(inside, "kv_copy_ranges: range ", i, " = (", dst_row, ", ", src_row, ", ", start, ", ", stop,
                    ") leaves a slab of ", dst.size(1), " and ", src.size(1), " rows, ", dst.size(3), " and ",
                    src.size(3), " positions");
    copies.push_back({(dst_row * dst.stride(1) + start * dst.stride(3)) * item,
                      (src_row * src.stride(1) + start * src.stride(3)) * item, stop - start});
    most = std::max(most, stop - start);
  }
  if (copies.empty() || D == 0) return;

  const int64_t dst_group = dst.stride(0) * item, dst_head = dst.stride(2) * item, dst_position = dst.stride(3) * item;
  const int64_t src_group = src.stride(0) * item, src_head = src.stride(2) * item, src_position = src.stride(3) * item;
  const int64_t bytes = D * item;
  const bool packed = dst_position == bytes && src_position == bytes;
  char* to = static_cast<char*>(dst.data_ptr());
  const char* from = static_cast<const char*>(src.data_ptr());
  const int64_t count = static_cast<int64_t>(copies.size());
  const int64_t grain = std::max<int64_t>(1, (1 << 16) / (most * bytes));  // a thread is worth waking for 64 KB
  torch::stable::parallel_for(0, G * count * heads, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t h = i % heads, g = i / (heads * count);
      const Copy& c = copies[i / heads % count];
      char* d = to + g * dst_group + h * dst_head + c.dst;
      const char* s = from + g * src_group + h * src_head + c.src;
      if (packed) {
        std::memcpy(d, s, c.positions * bytes);
      } else {
        for (int64_t p = 0; p < c.positions; ++p) std::memcpy(d + p * dst_position, s + p * src_position, bytes);
      }
    }
  });
}

void add_kv_cache(torch::stable::detail::StableLibrary& m) { m.impl("kv_copy_ranges", TORCH_BOX(&kv_copy_ranges)); }

}  // namespace power_kernels
