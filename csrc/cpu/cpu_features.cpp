// SPDX-License-Identifier: BSD-3-Clause
#include "cpu_features.h"

#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace segpose {
namespace {

#if defined(__x86_64__)
#if defined(SEGPOSE_EMULATE)
constexpr bool kEmulated = true;  // AVX-512 and AMX need AVX2 only: emulated.h
#else
constexpr bool kEmulated = false;
#endif

struct AmxFeatures {
  bool tiles, bf16, avx512_bf16;
};

AmxFeatures amx_features() {
  unsigned a = 0, b = 0, c = 0, d = 0, extended = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return {};
  const unsigned features = d;
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) extended = a;
  return {(features >> 24 & 1) != 0, (features >> 22 & 1) != 0, (extended >> 5 & 1) != 0};
}

// Linux keeps the tile registers of a process only after it has asked for them.
bool permit_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::generic:
      return "generic";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::amx:
      return "amx";
  }
  return "unknown";
}

std::vector<std::pair<std::string, bool>> cpu_features() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const auto has = [](int supported) { return supported != 0; };
  const AmxFeatures amx = amx_features();
  return {
      {"avx2", has(__builtin_cpu_supports("avx2"))},
      {"fma", has(__builtin_cpu_supports("fma"))},
      {"f16c", has(__builtin_cpu_supports("f16c"))},
      {"avx512f", has(__builtin_cpu_supports("avx512f"))},
      {"avx512bw", has(__builtin_cpu_supports("avx512bw"))},
      {"avx512dq", has(__builtin_cpu_supports("avx512dq"))},
      {"avx512vl", has(__builtin_cpu_supports("avx512vl"))},
      {"avx512_bf16", amx.avx512_bf16},
      {"amx_tile", amx.tiles},
      {"amx_bf16", amx.bf16},
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
  bool amx = true;
  for (const auto& [name, present] : cpu_features()) {
    bool& needed = name.rfind("amx", 0) == 0 || name == "avx512_bf16" ? amx
                   : name.rfind("avx512", 0) == 0                     ? avx512
                                                                      : avx2;
    needed = needed && present;
  }
  if (avx2) isas.push_back(Isa::avx2);
  avx512 = avx512 || kEmulated;
  static const bool tiles = kEmulated || (amx && permit_tiles());
  if (avx2 && avx512) isas.push_back(Isa::avx512);
  if (avx2 && avx512 && tiles) isas.push_back(Isa::amx);
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
