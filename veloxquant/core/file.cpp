#include "veloxquant/core/file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "veloxquant/core/error.h"

namespace veloxquant {
namespace {

class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }

 private:
  int fd_;
};

struct OpenedFile {
  Descriptor descriptor;
  std::size_t size;
};

OpenedFile open_regular(const std::filesystem::path& path) {
  // O_NONBLOCK, since opening a pipe would otherwise wait for its writer before it could be refused.
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) throw_failure("read", "{}: {}", path.string(), std::strerror(errno));
  struct stat status {};
  if (::fstat(fd, &status) != 0 || !S_ISREG(status.st_mode)) {
    ::close(fd);
    throw_failure("read", "{}: not a regular file", path.string());
  }
  return {Descriptor(fd), static_cast<std::size_t>(status.st_size)};
}

std::filesystem::path folder_of(const std::filesystem::path& path) {
  return path.has_parent_path() ? path.parent_path() : std::filesystem::path(".");
}

// Only what is not there yet or a regular file may be replaced: a device or a pipe would be lost.
void check_replaceable(const std::filesystem::path& path) {
  if (!path.has_filename()) throw_failure("write", "\"{}\": expected the name of a file", path.string());
  std::error_code error;
  const auto status = std::filesystem::status(path, error);
  if (!std::filesystem::status_known(status)) throw_failure("write", "{}: {}", path.string(), error.message());
  if (std::filesystem::is_directory(status)) throw_failure("write", "{}: is a folder", path.string());
  if (std::filesystem::exists(status) && !std::filesystem::is_regular_file(status))
    throw_failure("write", "{}: expected a regular file or none, got a device, pipe or socket", path.string());
}

// The file that symbolic links lead to, there or not, so that they stay; links in a circle have been refused by now.
std::filesystem::path follow_links(std::filesystem::path path) {
  while (std::filesystem::is_symlink(path)) path = folder_of(path) / std::filesystem::read_symlink(path);
  return path;
}

// The temporary file that becomes `path`; removed again unless it was committed.
class TemporaryFile {
 public:
  explicit TemporaryFile(const std::filesystem::path& path) {
    check_replaceable(path);
    path_ = follow_links(path);
    name_ = (folder_of(path_) / ("." + path_.filename().string() + ".XXXXXX")).string();
    fd_ = ::mkostemp(name_.data(), O_CLOEXEC);
    if (fd_ < 0) throw_failure("write", "{}: {}", path.string(), std::strerror(errno));
  }
  ~TemporaryFile() {
    if (fd_ >= 0) ::close(fd_);
    if (!name_.empty()) ::unlink(name_.c_str());
  }
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;

  void write(std::string_view contents) {
    while (!contents.empty()) {
      const ssize_t written = ::write(fd_, contents.data(), contents.size());
      if (written < 0 && errno == EINTR) continue;
      if (written < 0) fail();
      contents.remove_prefix(static_cast<std::size_t>(written));
    }
  }

  void commit() {
    const mode_t mask = ::umask(0);
    ::umask(mask);
    if (::fchmod(fd_, 0666 & ~mask) != 0 || ::fsync(fd_) != 0 || ::close(std::exchange(fd_, -1)) != 0) fail();
    if (::rename(name_.c_str(), path_.c_str()) != 0) fail();
    name_.clear();
  }

 private:
  [[noreturn]] void fail() const { throw_failure("write", "{}: {}", path_.string(), std::strerror(errno)); }

  std::filesystem::path path_;
  std::string name_;
  int fd_ = -1;
};

}  // namespace

std::string read_file(const std::filesystem::path& path, std::size_t max_bytes) {
  const OpenedFile file = open_regular(path);
  if (file.size > max_bytes) throw_failure("read", "{}: {} bytes, at most {} are accepted", path.string(), file.size, max_bytes);
  std::string contents(file.size, '\0');
  for (std::size_t done = 0; done < contents.size();) {
    const ssize_t got = ::read(file.descriptor.get(), contents.data() + done, contents.size() - done);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) throw_failure("read", "{}: {}", path.string(), std::strerror(errno));
    if (got == 0) throw_failure("read", "{}: ended after {} of {} bytes", path.string(), done, contents.size());
    done += static_cast<std::size_t>(got);
  }
  return contents;
}

void write_file_atomically(const std::filesystem::path& path, std::string_view contents) {
  TemporaryFile file(path);
  file.write(contents);
  file.commit();
}

void check_writable(const std::filesystem::path& path) {
  TemporaryFile file(path);
}

MappedFile::MappedFile(const std::filesystem::path& path) {
  const OpenedFile file = open_regular(path);
  if (file.size == 0) return;
  void* data = ::mmap(nullptr, file.size, PROT_READ, MAP_PRIVATE, file.descriptor.get(), 0);
  if (data == MAP_FAILED) throw_failure("read", "{}: {}", path.string(), std::strerror(errno));
  bytes_ = {static_cast<const std::byte*>(data), file.size};
}

MappedFile::~MappedFile() {
  if (!bytes_.empty()) ::munmap(const_cast<std::byte*>(bytes_.data()), bytes_.size());
}

MappedFile::MappedFile(MappedFile&& other) noexcept : bytes_(std::exchange(other.bytes_, {})) {}

}  // namespace veloxquant
