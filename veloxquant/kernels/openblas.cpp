#include "veloxquant/kernels/openblas.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>
#include <iterator>

#include "hwy/targets.h"
#include "veloxquant/core/warning.h"

// CMake sets the prefix that its library has, if any.
#define VELOXQUANT_JOINED(prefix, name) prefix##name
#define VELOXQUANT_NAME(prefix, name) VELOXQUANT_JOINED(prefix, name)
#define VELOXQUANT_OPENBLAS(name) VELOXQUANT_NAME(VELOXQUANT_OPENBLAS_PREFIX, name)

extern "C" {
void VELOXQUANT_OPENBLAS(sgemm_)(const char* transpose_a, const char* transpose_b, const int* m, const int* n, const int* k,
                                 const float* alpha, const float* a, const int* lda, const float* b, const int* ldb,
                                 const float* beta, float* c, const int* ldc);
void VELOXQUANT_OPENBLAS(sgemv_)(const char* transpose, const int* m, const int* n, const float* alpha, const float* a,
                                 const int* lda, const float* x, const int* incx, const float* beta, float* y, const int* incy);
void VELOXQUANT_OPENBLAS(dsyev_)(const char* job, const char* triangle, const int* n, double* a, const int* lda, double* w,
                                 double* work, const int* lwork, int* info);
void VELOXQUANT_OPENBLAS(dgesv_)(const int* n, const int* nrhs, double* a, const int* lda, int* pivots, double* b, const int* ldb,
                                 int* info);
void VELOXQUANT_OPENBLAS(openblas_set_num_threads)(int threads);
char* VELOXQUANT_OPENBLAS(openblas_get_config)();
char* VELOXQUANT_OPENBLAS(openblas_get_corename)();
}

namespace veloxquant::openblas {

void sgemm(char transpose_a, char transpose_b, int m, int n, int k, float alpha, const float* a, int lda, const float* b, int ldb,
           float beta, float* c, int ldc) {
  VELOXQUANT_OPENBLAS(sgemm_)(&transpose_a, &transpose_b, &m, &n, &k, &alpha, a, &lda, b, &ldb, &beta, c, &ldc);
}

void sgemv(char transpose, int m, int n, float alpha, const float* a, int lda, const float* x, int incx, float beta, float* y,
           int incy) {
  VELOXQUANT_OPENBLAS(sgemv_)(&transpose, &m, &n, &alpha, a, &lda, x, &incx, &beta, y, &incy);
}

int dsyev(int n, double* a, double* w, double* work, int work_size) {
  int info = 0;
  VELOXQUANT_OPENBLAS(dsyev_)("V", "U", &n, a, &n, w, work, &work_size, &info);
  return info;
}

int dgesv(int n, double* a, int* pivots, double* b) {
  int info = 0;
  VELOXQUANT_OPENBLAS(dgesv_)(&n, &n, a, &n, pivots, b, &n, &info);
  return info;
}

void set_num_threads(int threads) {
  VELOXQUANT_OPENBLAS(openblas_set_num_threads)(threads);
}

std::string config() {
  return VELOXQUANT_OPENBLAS(openblas_get_config)();
}

std::string core() {
  return VELOXQUANT_OPENBLAS(openblas_get_corename)();
}

namespace {

// Instruction sets by what a kernel of sgemm makes of them.
enum class Vectors { kSse, kAvx, kAvx2, kAvx512, kUnknown };

constexpr const char* kWords[] = {"SSE", "AVX", "AVX2", "AVX-512"};

// The narrowest core type that has them.  Zen 4 and 5 have AVX-512 and OpenBLAS gives them its kernels; Zen's are AVX2.
constexpr const char* kCoreOf[] = {"Prescott", "Sandybridge", "Haswell", "SkylakeX"};

Vectors vectors_of_core(std::string_view core) {
  const auto among = [core](std::initializer_list<std::string_view> names) {
    return std::find(names.begin(), names.end(), core) != names.end();
  };
  if (among({"SkylakeX", "Cooperlake", "SapphireRapids"})) return Vectors::kAvx512;
  if (among({"Haswell", "Zen"})) return Vectors::kAvx2;
  if (among({"Sandybridge", "Bulldozer", "Piledriver", "Steamroller", "Excavator"})) return Vectors::kAvx;
  if (among({"Katmai", "Coppermine", "Northwood", "Prescott", "Banias", "Atom", "Core2", "Penryn", "Dunnington", "Nehalem",
             "Athlon", "Opteron", "Opteron_SSE3", "Barcelona", "Bobcat", "Nano"}))
    return Vectors::kSse;
  return Vectors::kUnknown;  // of another architecture, or newer than this table
}

}  // namespace

std::string narrow_kernel(std::string_view core, std::string_view config, std::int64_t targets, std::string_view core_type) {
  // Elsewhere these bits stand for other instruction sets, and the core has a name that is not known here.
  const auto has = targets & (HWY_AVX3 | HWY_AVX3_DL) ? Vectors::kAvx512 : targets & HWY_AVX2 ? Vectors::kAvx2 : Vectors::kSse;
  const auto uses = vectors_of_core(core);
  if (uses >= has) return {};
  const auto word = [](Vectors vectors) { return kWords[static_cast<int>(vectors)]; };
  std::string remedy;
  if (!core_type.empty()) {
    remedy = fmt::format("unset OPENBLAS_CORETYPE, which is {}", core_type);
  } else if (config.find("DYNAMIC_ARCH") == std::string_view::npos) {
    remedy = "link an OpenBLAS with kernels for every processor, such as that of the Python package scipy-openblas32";
  } else {
    remedy = fmt::format("set OPENBLAS_CORETYPE={}, or link a newer OpenBLAS, such as that of the Python package scipy-openblas32",
                         kCoreOf[static_cast<int>(has)]);
  }
  return fmt::format(
      "OpenBLAS multiplies with {} (its kernel for {}) on a processor that has {}, which is several times slower: {}", word(uses),
      core, word(has), remedy);
}

void warn_of_narrow_kernel() {
  static const bool said = [] {
    const char* core_type = std::getenv("OPENBLAS_CORETYPE");
    const auto message = narrow_kernel(core(), config(), hwy::SupportedTargets(), core_type ? core_type : "");
    if (!message.empty()) warn(message);
    return true;
  }();
  (void)said;
}

}  // namespace veloxquant::openblas
