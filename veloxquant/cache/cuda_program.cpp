#include "veloxquant/cache/cuda_program.h"

#include <dlfcn.h>
#include <fmt/format.h>

#include <cstdlib>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <variant>

#include "mlx/backend/cuda/cuda.h"
#include "mlx/device.h"
#include "mlx/version.h"
#include "veloxquant/core/file.h"
#include "veloxquant/core/hash.h"
#include "veloxquant/kernels/cuda/sources.h"

namespace veloxquant {
namespace {

namespace fs = std::filesystem;

// NVRTC's C interface, of a library that is there where MLX's CUDA back end is: nothing of CUDA is needed to build.
class Compiler {
 public:
  static const Compiler& instance() {
    static const Compiler compiler;
    return compiler;
  }

  explicit operator bool() const { return library_ != nullptr; }

  std::string version() const {
    int major = 0, minor = 0;
    version_(&major, &minor);
    return fmt::format("{}.{}", major, minor);
  }

  std::string compile(const std::string& source, const std::vector<std::string>& options) const {
    Program program = nullptr;
    check(create_(&program, source.c_str(), "veloxquant.cu", 0, nullptr, nullptr), "nvrtcCreateProgram");
    const std::unique_ptr<void, std::function<void(void*)>> destroyed(program, [this](void* of) { destroy_(&of); });
    std::vector<const char*> arguments;
    for (const auto& option : options) arguments.push_back(option.c_str());
    if (const int status = compile_(program, static_cast<int>(arguments.size()), arguments.data()); status != 0) {
      std::string log = text(program, log_size_, log_);
      throw std::runtime_error(fmt::format("[cuda] a kernel was not compiled ({}): {}", error_(status), log));
    }
    return text(program, cubin_size_, cubin_);
  }

 private:
  using Program = void*;
  using SizeOf = int (*)(Program, std::size_t*);
  using TextOf = int (*)(Program, char*);

  Compiler() {
    for (const char* name : {"libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"})
      if (library_ = dlopen(name, RTLD_NOW | RTLD_LOCAL); library_) break;
    const auto find = [&](auto& function, const char* name) {
      if (library_) function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library_, name));
      if (library_ && !function) library_ = nullptr;
    };
    find(version_, "nvrtcVersion"), find(create_, "nvrtcCreateProgram"), find(destroy_, "nvrtcDestroyProgram");
    find(compile_, "nvrtcCompileProgram"), find(error_, "nvrtcGetErrorString");
    find(log_size_, "nvrtcGetProgramLogSize"), find(log_, "nvrtcGetProgramLog");
    find(cubin_size_, "nvrtcGetCUBINSize"), find(cubin_, "nvrtcGetCUBIN");
  }

  void check(int status, const char* what) const {
    if (status != 0) throw std::runtime_error(fmt::format("[cuda] {}: {}", what, error_(status)));
  }

  std::string text(Program program, SizeOf size_of, TextOf text_of) const {
    std::size_t size = 0;
    check(size_of(program, &size), "NVRTC");
    std::string text(size, '\0');
    check(text_of(program, text.data()), "NVRTC");
    return text;
  }

  void* library_ = nullptr;
  int (*version_)(int*, int*) = nullptr;
  int (*create_)(Program*, const char*, const char*, int, const char* const*, const char* const*) = nullptr;
  int (*destroy_)(Program*) = nullptr;
  int (*compile_)(Program, int, const char* const*) = nullptr;
  const char* (*error_)(int) = nullptr;
  SizeOf log_size_ = nullptr, cubin_size_ = nullptr;
  TextOf log_ = nullptr, cubin_ = nullptr;
};

std::size_t device_number(const char* name) {
  const auto& info = mx::device_info(mx::Device::gpu);
  const auto found = info.find(name);
  const auto* value = found == info.end() ? nullptr : std::get_if<std::size_t>(&found->second);
  return value ? *value : 0;
}

// Of the driver, which is there where a GPU is; `otherwise` where it does not answer.
int device_attribute(int attribute, int otherwise) {
  void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  const auto get = driver ? reinterpret_cast<int (*)(int*, int, int)>(dlsym(driver, "cuDeviceGetAttribute")) : nullptr;
  int value = 0;
  return get && get(&value, attribute, 0) == 0 && value > 0 ? value : otherwise;
}

std::string architecture() {
  return fmt::format("sm_{}{}", device_number("compute_capability_major"), device_number("compute_capability_minor"));
}

// Where the CUDA headers are that kernels include: where MLX looks for them, beside its library and in a toolkit.
std::vector<std::string> include_options() {
  std::vector<fs::path> folders;
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(&mx::cu::is_available), &info) && info.dli_fname) {
    const fs::path root = fs::path(info.dli_fname).parent_path().parent_path();
    for (const char* name : {"cu13", "cuda_runtime"}) folders.push_back(root.parent_path() / "nvidia" / name / "include");
    folders.push_back(root / "include" / "cccl");
  }
  for (const char* name : {"CUDA_HOME", "CUDA_PATH"})
    if (const char* home = std::getenv(name)) folders.push_back(fs::path(home) / "include");
  folders.push_back("/usr/local/cuda/include");
  folders.push_back("/usr/local/cuda/include/cccl");
  std::vector<std::string> options;
  for (const auto& folder : folders)
    if (std::error_code error; fs::is_directory(folder, error)) options.push_back("--include-path=" + folder.string());
  return options;
}

// A file holds a SHA-256 of the code, in hex, then the code: a damaged one is as good as none.
constexpr std::size_t kHashLength = 64, kMostBytes = std::size_t{64} << 20;

std::string read_cached(const fs::path& path) {
  std::error_code error;
  if (!fs::is_regular_file(path, error)) return {};
  try {
    const std::string file = read_file(path, kMostBytes);
    if (file.size() <= kHashLength || sha256(std::string_view(file).substr(kHashLength)) != file.substr(0, kHashLength)) return {};
    return file.substr(kHashLength);
  } catch (const std::exception&) {
    return {};
  }
}

// That it cannot be written changes nothing but how long the next process waits.
void write_cached(const fs::path& path, const std::string& code) {
  std::error_code error;
  fs::create_directories(path.parent_path(), error);
  try {
    write_file_atomically(path, sha256(code) + code);
  } catch (const std::exception&) {
  }
}

// Where MLX keeps what it compiled.
fs::path mlx_cache_folder() {
  if (const char* folder = std::getenv("MLX_PTX_CACHE_DIR")) return folder;
  std::error_code error;
  return fs::temp_directory_path(error) / "mlx" / mx::version() / "ptx";
}

// What MLX is told for code.  It copies and hashes that for every call, which for code of 50 KB takes 20 µs, as long as several
// operations; but it looks for a file by that hash first.  So a file of MLX's own form has the code, and what is handed over is its
// name.  This holds for the release that is pinned; for others, and where no file can be written, the code itself is.
std::string handle_of(const std::string& name, const std::string& code) {
  if (std::string_view(mx::version()) != "0.32.4") return code;
  const std::string handle = "veloxquant " + sha256(code);
  const auto module = fmt::format("{}_{:x}", name, std::hash<std::string>{}(handle));
  const auto folder = mlx_cache_folder();
  std::error_code error;
  fs::create_directories(folder, error);
  try {
    write_file_atomically(folder / (module + ".txt"), name + '\t' + name + '\n');
    write_file_atomically(folder / (module + ".ptx"), code);
  } catch (const std::exception&) {
    return code;
  }
  return handle;
}

}  // namespace

std::string cuda_cache_folder() {
  const auto variable = [](const char* name) -> std::string {
    const char* value = std::getenv(name);
    return value ? value : "";
  };
  if (const auto folder = variable("VELOXQUANT_CACHE_DIR"); !folder.empty()) return folder;
  if (const auto folder = variable("XDG_CACHE_HOME"); !folder.empty()) return folder + "/veloxquant";
  if (const auto folder = variable("HOME"); !folder.empty()) return folder + "/.cache/veloxquant";
  return {};
}

std::string cuda_refusal() {
  if (mx::default_device() != mx::Device::gpu || !mx::cu::is_available()) return "not on a CUDA GPU";
  if (device_number("compute_capability_major") < 8)
    return fmt::format("a GPU of {}: sm_80 and later are served", architecture());
  if (!Compiler::instance()) return "the library libnvrtc is not found";
  return {};
}

int most_shared_bytes() {
  static const int bytes = device_attribute(97, 99 * 1024);  // CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
  return bytes;
}

int cuda_processors() {
  static const int count = device_attribute(16, 132);  // CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
  return count;
}

CudaProgram::CudaProgram(std::string_view entry, std::string_view kind, const std::vector<std::string>& more) {
  std::string lower(entry);
  for (char& c : lower) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  name_ = fmt::format("veloxquant_{}_{}", lower, kind);
  std::vector<std::string> options = {"--std=c++17", "--gpu-architecture=" + architecture(),
                                      fmt::format("--define-macro=VELOXQUANT_{}=1", entry),
                                      fmt::format("--define-macro=VELOXQUANT_KIND={}", kind)};
  for (const auto& definition : more) options.push_back("--define-macro=" + definition);
  std::string key = kCudaSource;
  for (const auto& option : options) key += '\n' + option;
  key = sha256(key + Compiler::instance().version());

  // Layers share what they call.
  static std::mutex mutex;
  static std::map<std::string, std::shared_ptr<const std::string>> compiled;
  const std::lock_guard lock(mutex);
  auto& code = compiled[key];
  if (!code) {
    const auto folder = cuda_cache_folder();
    const auto path = fs::path(folder) / "kernels" / (key + ".cubin");
    std::string found = folder.empty() ? "" : read_cached(path);
    if (found.empty()) {
      for (auto& option : include_options()) options.push_back(std::move(option));
      found = Compiler::instance().compile(kCudaSource, options);
      if (!folder.empty()) write_cached(path, found);
    }
    code = std::make_shared<const std::string>(handle_of(name_, found));
  }
  code_ = code;
}

std::vector<mx::array> CudaProgram::operator()(const std::vector<mx::array>& inputs, const std::vector<mx::Shape>& shapes,
                                               const std::vector<mx::Dtype>& types,
                                               const std::vector<mx::fast::ScalarArg>& numbers, std::tuple<int, int, int> blocks,
                                               int threads, int shared_bytes) const {
  const auto [x, y, z] = blocks;
  return mx::fast::precompiled_cuda_kernel(name_, *code_, inputs, shapes, types, numbers, {x * threads, y, z}, {threads, 1, 1},
                                           shared_bytes, std::nullopt, true);
}

}  // namespace veloxquant
