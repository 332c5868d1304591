// Files that appear whole or not at all.
#pragma once

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <random>
#include <string>
#include <system_error>

namespace rarefy {

inline std::string last_error() { return std::generic_category().message(errno); }

/// A file descriptor, closed at the end of its scope.
class Descriptor {
 public:
  explicit Descriptor(int value) : value_(value) {}
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor() {
    if (value_ >= 0) {
      ::close(value_);
    }
  }
  int get() const { return value_; }

 private:
  int value_;
};

/// A new file beside `path` that takes its place on commit(), or is gone. Errors are those of `function`.
class PendingFile {
 public:
  PendingFile(const std::filesystem::path& path, const char* function)
      : path_(path),
        function_(function),
        temporary_(name_beside(path)),
        file_(::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666)) {
    require(file_.get() >= 0, "open");
  }
  PendingFile(const PendingFile&) = delete;
  PendingFile& operator=(const PendingFile&) = delete;
  ~PendingFile() {
    if (!committed_ && file_.get() >= 0) {
      ::unlink(temporary_.c_str());
    }
  }

  void write(const void* data, size_t size) {
    const auto* bytes = static_cast<const char*>(data);
    while (size > 0) {
      const auto written = ::write(file_.get(), bytes, size);
      if (written < 0 && errno == EINTR) {
        continue;
      }
      require(written >= 0, "write");
      bytes += written;
      size -= static_cast<size_t>(written);
    }
  }

  void commit() {
    require(::fsync(file_.get()) == 0, "write");
    require(::rename(temporary_.c_str(), path_.c_str()) == 0, "rename");
    committed_ = true;
  }

 private:
  static std::filesystem::path name_beside(const std::filesystem::path& path) {
    std::random_device random;
    return path.parent_path() / fmt::format(".{}.{:08x}{:08x}.tmp", path.filename().string(), random(), random());
  }

  void require(bool condition, const char* action) const {
    TORCH_CHECK(condition, "[", function_, "] cannot ", action, " ", path_.string(), ": ", last_error());
  }

  std::filesystem::path path_;
  const char* function_;
  std::filesystem::path temporary_;
  Descriptor file_;
  bool committed_ = false;
};

}  // namespace rarefy
