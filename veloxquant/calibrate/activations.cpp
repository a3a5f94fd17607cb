#include "veloxquant/calibrate/activations.h"

#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>

#include "mlx/ops.h"
#include "mlx/transforms.h"
#include "veloxquant/core/error.h"

namespace veloxquant {
namespace {

std::filesystem::path folder() {
  return std::filesystem::temp_directory_path();
}

[[noreturn]] void fail(const char* what) {
  throw_failure("activations", "{}: could not {} a temporary file: {} (TMPDIR chooses another folder)", folder().string(), what,
                std::strerror(errno));
}

}  // namespace

Activations::~Activations() {
  if (file_ >= 0) ::close(file_);
}

void Activations::open_file() {
  std::string name = (folder() / "veloxquant.XXXXXX").string();
  file_ = ::mkstemp(name.data());
  if (file_ < 0) fail("make");
  ::unlink(name.c_str());
}

void Activations::write(const InFile& place, const mx::array& x) {
  const char* bytes = reinterpret_cast<const char*>(x.data<float>());
  for (std::size_t done = 0; done < x.nbytes();) {
    const auto written = ::pwrite(file_, bytes + done, x.nbytes() - done, static_cast<off_t>(place.offset + done));
    if (written <= 0) fail("write");
    done += static_cast<std::size_t>(written);
  }
}

void Activations::add(const mx::array& x) {
  slots_.push_back(x);
  if (memory_ + x.nbytes() <= memory_limit_) {
    memory_ += x.nbytes();
    mx::eval(x);
    return;
  }
  if (file_ < 0) open_file();
  slots_.back() = InFile{x.shape(), file_size_};
  file_size_ += x.nbytes();
  set(slots_.size() - 1, x);
}

void Activations::set(std::size_t index, const mx::array& x) {
  auto& slot = slots_.at(index);
  if (const auto* place = std::get_if<InFile>(&slot)) {
    const auto row_major = mx::contiguous(x);
    mx::eval(row_major);
    write(*place, row_major);
  } else {
    mx::eval(x);
    slot = x;
  }
}

mx::array Activations::get(std::size_t index) const {
  const auto& slot = slots_.at(index);
  if (const auto* held = std::get_if<mx::array>(&slot)) return *held;
  const auto& place = std::get<InFile>(slot);
  std::size_t count = 1;
  for (const int size : place.shape) count *= static_cast<std::size_t>(size);
  std::vector<float> values(count);
  char* bytes = reinterpret_cast<char*>(values.data());
  for (std::size_t done = 0; done < count * sizeof(float);) {
    const auto got = ::pread(file_, bytes + done, count * sizeof(float) - done, static_cast<off_t>(place.offset + done));
    if (got <= 0) fail("read");
    done += static_cast<std::size_t>(got);
  }
  return mx::array(values.data(), place.shape);
}

}  // namespace veloxquant
