#if defined(__linux__)
#include <elf.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <cstdint>
#include <string_view>

#include "bindings.h"

extern "C" void cblas_sgemm(int order, int transpose_a, int transpose_b, int m, int n, int k, float alpha, const float* a, int lda,
                            const float* b, int ldb, float beta, float* c, int ldc);

namespace veloxquant::python {

#if defined(__linux__) && defined(__LP64__)
namespace {

struct Relocations {
  const Elf64_Rela* entries = nullptr;
  std::size_t bytes = 0;
};

// Points the slot that an entry fills to ours; slots may lie in memory that the loader has made read-only.
bool redirect(const dl_phdr_info& library, const Elf64_Rela& entry) {
  const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto slot = static_cast<std::uintptr_t>(library.dlpi_addr) + entry.r_offset;
  if (mprotect(reinterpret_cast<void*>(slot & ~(page - 1)), page, PROT_READ | PROT_WRITE) != 0) return false;
  __atomic_store_n(reinterpret_cast<void**>(slot), reinterpret_cast<void*>(&cblas_sgemm), __ATOMIC_RELEASE);
  return true;
}

// Of dl_iterate_phdr: 1 ends it.
int visit(dl_phdr_info* library, std::size_t, void* found) {
  if (!std::string_view(library->dlpi_name).ends_with("/libmlx.so")) return 0;
  const Elf64_Dyn* dynamic = nullptr;
  for (int i = 0; i < library->dlpi_phnum; ++i)
    if (library->dlpi_phdr[i].p_type == PT_DYNAMIC)
      dynamic = reinterpret_cast<const Elf64_Dyn*>(library->dlpi_addr + library->dlpi_phdr[i].p_vaddr);
  Relocations calls, pointers;
  const Elf64_Sym* symbols = nullptr;
  const char* names = nullptr;
  for (; dynamic && dynamic->d_tag != DT_NULL; ++dynamic) {
    switch (dynamic->d_tag) {
      case DT_JMPREL:
        calls.entries = reinterpret_cast<const Elf64_Rela*>(dynamic->d_un.d_ptr);
        break;
      case DT_PLTRELSZ:
        calls.bytes = dynamic->d_un.d_val;
        break;
      case DT_RELA:
        pointers.entries = reinterpret_cast<const Elf64_Rela*>(dynamic->d_un.d_ptr);
        break;
      case DT_RELASZ:
        pointers.bytes = dynamic->d_un.d_val;
        break;
      case DT_SYMTAB:
        symbols = reinterpret_cast<const Elf64_Sym*>(dynamic->d_un.d_ptr);
        break;
      case DT_STRTAB:
        names = reinterpret_cast<const char*>(dynamic->d_un.d_ptr);
        break;
      default:
        break;
    }
  }
  if (!symbols || !names) return 1;
  for (const auto& table : {calls, pointers})
    for (std::size_t i = 0; table.entries && i < table.bytes / sizeof(Elf64_Rela); ++i)
      if (std::string_view(names + symbols[ELF64_R_SYM(table.entries[i].r_info)].st_name) == "cblas_sgemm")
        *static_cast<bool*>(found) |= redirect(*library, table.entries[i]);
  return 1;
}

}  // namespace

bool take_mlx_products() {
  bool found = false;
  dl_iterate_phdr(visit, &found);
  return found;
}
#else
bool take_mlx_products() {
  return false;
}
#endif

}  // namespace veloxquant::python
