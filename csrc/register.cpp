// Registers every kernel with torch, under the namespace of the package that loads this file: a process may hold the package
// twice, under two names, each with this file beside it (power_kernels/ops/dispatch.py).

#include <torch/csrc/stable/library.h>

#include <exception>
#include <string>

namespace power_kernels {

using torch::stable::detail::StableLibrary;

void add_chain(StableLibrary&);
void add_kv_cache(StableLibrary&);
void add_lm_head(StableLibrary&);
void add_paged_kv(StableLibrary&);
void add_particles(StableLibrary&);
void add_sampling(StableLibrary&);
void add_scoring(StableLibrary&);
void add_slots(StableLibrary&);

}  // namespace power_kernels

// Returns what went wrong, or nullptr.
extern "C" __attribute__((visibility("default"))) const char* power_kernels_register(const char* name) {
  using namespace power_kernels;
  static std::string error;
  try {
    // Never deleted: that would take the kernels away again.
    auto& library = *new StableLibrary(StableLibrary::Kind::IMPL, name, "CPU", __FILE__, __LINE__);
    for (auto add : {add_chain, add_kv_cache, add_lm_head, add_paged_kv, add_particles, add_sampling, add_scoring,
                     add_slots}) {
      add(library);
    }
  } catch (const std::exception& exception) {
    error = exception.what();
    return error.c_str();
  }
  return nullptr;
}
