// SPDX-License-Identifier: BSD-3-Clause
#include "cpu_features.h"

#include <cstdlib>
#include <stdexcept>

namespace segpose {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::generic:
      return "generic";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
  }
  return "unknown";
}

std::vector<std::pair<std::string, bool>> cpu_features() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const auto has = [](int supported) { return supported != 0; };
  return {
      {"avx2", has(__builtin_cpu_supports("avx2"))},         {"fma", has(__builtin_cpu_supports("fma"))},
      {"f16c", has(__builtin_cpu_supports("f16c"))},         {"avx512f", has(__builtin_cpu_supports("avx512f"))},
      {"avx512bw", has(__builtin_cpu_supports("avx512bw"))}, {"avx512dq", has(__builtin_cpu_supports("avx512dq"))},
      {"avx512vl", has(__builtin_cpu_supports("avx512vl"))},
  };
#else
  return {};
#endif
}

std::vector<Isa> available_isas() {
  std::vector<Isa> isas{Isa::generic};
#if defined(__x86_64__)
  bool avx2 = true;
  bool avx512 = true;
  for (const auto& [name, present] : cpu_features()) {
    if (name.rfind("avx512", 0) == 0) {
      avx512 = avx512 && present;
    } else {
      avx2 = avx2 && present;
    }
  }
  if (avx2) isas.push_back(Isa::avx2);
  if (avx2 && avx512) isas.push_back(Isa::avx512);
#endif
  return isas;
}

Isa parse_isa(const std::string& name) {
  std::string valid;
  for (const Isa isa : available_isas()) {
    if (name == isa_name(isa)) return isa;
    valid += valid.empty() ? isa_name(isa) : std::string(", ") + isa_name(isa);
  }
  throw std::runtime_error("SEGPOSE_CPU_ISA: '" + name +
                           "' is not an instruction set of this machine and build; use one of " + valid);
}

Isa selected_isa() {
  static const Isa isa = [] {
    const char* name = std::getenv("SEGPOSE_CPU_ISA");
    return name == nullptr || *name == '\0' ? available_isas().back() : parse_isa(name);
  }();
  return isa;
}

}  // namespace segpose
