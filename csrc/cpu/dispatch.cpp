// Which instruction set runs. Compiled for the baseline, as everything but kernels.cpp.
#include <cstdlib>
#include <cstring>

#include "routing.h"

namespace capsroute {

namespace baseline {
extern const Kernels kernels;
}
#ifdef __x86_64__
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}
#endif

namespace {

bool runs_here(const Kernels& table) {
#ifdef __x86_64__
  if (&table == &avx512_bf16::kernels) return __builtin_cpu_supports("avx512bf16") && runs_here(avx512::kernels);
  if (&table == &avx512::kernels)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && runs_here(avx2::kernels);
  if (&table == &avx2::kernels)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
  return true;
}

// Best first.
const Kernels* const tables[] = {
#ifdef __x86_64__
    &avx512_bf16::kernels, &avx512::kernels, &avx2::kernels,
#endif
    &baseline::kernels};

const Kernels& choose() {
  // torch's own variable; its names for the levels are "avx512", "avx2" and "default"
  const char* limit = std::getenv("ATEN_CPU_CAPABILITY");
  if (limit && !std::strcmp(limit, "default")) return baseline::kernels;
  bool allowed = !limit || !kernels_named(limit);
  for (const Kernels* table : tables) {
    allowed = allowed || !std::strcmp(limit, table->name);
    if (allowed && runs_here(*table)) return *table;
  }
  return baseline::kernels;
}

}  // namespace

const Kernels* kernels_at(int64_t n) {
  for (const Kernels* table : tables)
    if (runs_here(*table) && n-- == 0) return table;
  return nullptr;
}

const Kernels* kernels_named(const char* name) {
  for (int64_t n = 0; const Kernels* table = kernels_at(n); ++n)
    if (!std::strcmp(name, table->name)) return table;
  return nullptr;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace capsroute
