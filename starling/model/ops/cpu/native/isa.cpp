#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace {

struct InstructionSet {
  const char* name;
  bool usable;
  bool refused = false;
};

#if defined(__x86_64__)
// Linux lets a process use tiles only after it asks; the permission also covers threads that exist already.
bool tiles_allowed() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

struct Cpu {
  bool avx2 = false, avxvnni = false, avx512 = false, avx512vnni = false, amx = false, amx_refused = false;
  Cpu() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return;
    const bool fma = c >> 12 & 1, osxsave = c >> 27 & 1, f16c = c >> 29 & 1;
    if (!osxsave || !fma || !f16c) return;
    unsigned low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low & 0x6) != 0x6) return;               // the system saves ymm registers
    const bool zmm = (low & 0xe6) == 0xe6;        // and zmm
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    avx2 = b >> 5 & 1;
    avx512 = avx2 && zmm && (b >> 16 & 1) && (b >> 17 & 1) && (b >> 30 & 1) && (b >> 31 & 1);  // F DQ BW VL
    avx512vnni = avx512 && (c >> 11 & 1);
    const bool tiles = (low & 0x60000) == 0x60000;  // the system saves tile configuration and data
    const bool has_amx = avx512vnni && tiles && (d >> 24 & 1) && (d >> 25 & 1);
    amx = has_amx && tiles_allowed();
    amx_refused = has_amx && !amx;
    if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) avxvnni = avx2 && (a >> 4 & 1);
  }
};
#endif

const InstructionSet* sets() {
#if defined(__x86_64__)
  static const Cpu cpu;
  static const InstructionSet all[] = {
      {"amx", cpu.amx, cpu.amx_refused},
      {"avx512vnni", cpu.avx512vnni},
      {"avxvnni", cpu.avxvnni},
      {"avx512", cpu.avx512},
      {"avx2", cpu.avx2},
      {"portable", true},
      {nullptr, false},
  };
#elif defined(__aarch64__)
#if defined(__linux__)
  const bool dot = getauxval(AT_HWCAP) >> 20 & 1;              // HWCAP_ASIMDDP
  const bool i8mm = dot && (getauxval(AT_HWCAP2) >> 13 & 1);  // HWCAP2_I8MM
#else
  const bool dot = true;  // every Apple chip that runs macOS
  int found = 0;
  size_t size = sizeof found;
  const bool i8mm = sysctlbyname("hw.optional.arm.FEAT_I8MM", &found, &size, nullptr, 0) == 0 && found;
#endif
  static const InstructionSet all[] = {
      {"neoni8mm", i8mm},
      {"neondot", dot},
      {"portable", true},
      {nullptr, false},
  };
#else
  static const InstructionSet all[] = {{"portable", true}, {nullptr, false}};
#endif
  return all;
}

}  // namespace

const char* starling_usable_isa(int i) {
  for (const InstructionSet* set = sets(); set->name; set++)
    if (set->usable && i-- == 0) return set->name;
  return nullptr;
}

const char* starling_refused_isa() {
  for (const InstructionSet* set = sets(); set->name; set++)
    if (set->refused) return set->name;
  return nullptr;
}
