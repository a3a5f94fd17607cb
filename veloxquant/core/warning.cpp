#include "veloxquant/core/warning.h"

#include <mutex>
#include <utility>

namespace veloxquant {
namespace {

std::mutex mutex;
WarningHandler handler;

}  // namespace

void set_warning_handler(WarningHandler new_handler) {
  std::lock_guard lock(mutex);
  handler = std::move(new_handler);
}

void warn(std::string_view message) {
  std::lock_guard lock(mutex);
  if (handler) handler(message);
}

}  // namespace veloxquant
