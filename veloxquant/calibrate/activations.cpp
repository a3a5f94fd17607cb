#include "veloxquant/calibrate/activations.h"

#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <utility>

#include "mlx/ops.h"
#include "mlx/transforms.h"
#include "veloxquant/core/error.h"

namespace veloxquant {
namespace {

std::filesystem::path folder() {
  return std::filesystem::temp_directory_path();
}

[[noreturn]] void fail(const char* what, int error) {
  throw_failure("activations", "{}: could not {} a temporary file: {} (TMPDIR chooses another folder)", folder().string(), what,
                std::strerror(error));
}

// Calls transfer(done), which returns the bytes moved as pread and pwrite do, until all are.
template <class Transfer>
void move_all(std::size_t bytes, const char* what, Transfer transfer) {
  for (std::size_t done = 0; done < bytes;) {
    const ssize_t moved = transfer(done);
    if (moved < 0 && errno == EINTR) continue;
    if (moved <= 0) fail(what, moved < 0 ? errno : EIO);
    done += static_cast<std::size_t>(moved);
  }
}

}  // namespace

Activations::Activations(Activations&& other) noexcept
    : slots_(std::move(other.slots_)),
      memory_limit_(other.memory_limit_),
      memory_(other.memory_),
      file_size_(other.file_size_),
      file_(std::exchange(other.file_, -1)) {}

Activations::~Activations() {
  if (file_ >= 0) ::close(file_);
}

void Activations::open_file() {
  std::string name = (folder() / "veloxquant.XXXXXX").string();
  file_ = ::mkstemp(name.data());
  if (file_ < 0) fail("make", errno);
  ::unlink(name.c_str());
}

void Activations::write(const InFile& place, const mx::array& x) {
  const char* bytes = reinterpret_cast<const char*>(x.data<float>());
  move_all(x.nbytes(), "write", [&](std::size_t done) {
    return ::pwrite(file_, bytes + done, x.nbytes() - done, static_cast<off_t>(place.offset + done));
  });
}

mx::array Activations::read(const mx::Shape& shape, std::size_t offset) const {
  std::size_t count = 1;
  for (const int size : shape) count *= static_cast<std::size_t>(size);
  std::vector<float> values(count);
  char* bytes = reinterpret_cast<char*>(values.data());
  move_all(count * sizeof(float), "read", [&](std::size_t done) {
    return ::pread(file_, bytes + done, count * sizeof(float) - done, static_cast<off_t>(offset + done));
  });
  return mx::array(values.data(), shape);
}

void Activations::add(const mx::array& x) {
  if (memory_ + x.nbytes() <= memory_limit_) {
    memory_ += x.nbytes();
    mx::eval(x);
    slots_.push_back(x);
    return;
  }
  if (file_ < 0) open_file();
  slots_.push_back(InFile{x.shape(), file_size_});
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
  return read(place.shape, place.offset);
}

mx::array Activations::get_row(std::size_t index, int row) const {
  const auto& slot = slots_.at(index);
  if (const auto* held = std::get_if<mx::array>(&slot)) {
    mx::Shape begin(held->ndim(), 0), end = held->shape();
    begin[0] = row;
    end[0] = row + 1;
    return mx::slice(*held, begin, end);
  }
  const auto& place = std::get<InFile>(slot);
  mx::Shape shape = place.shape;
  shape[0] = 1;
  std::size_t bytes = sizeof(float);
  for (const int size : shape) bytes *= static_cast<std::size_t>(size);
  return read(shape, place.offset + bytes * static_cast<std::size_t>(row));
}

}  // namespace veloxquant
