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
    sync();
    require(move_into_place(), "rename");
  }

  /// Both files take their places, or neither does: where `last` cannot, what this one replaced comes back.
  void commit_with(PendingFile& last) {
    sync();
    last.sync();
    const auto kept = name_beside(path_);
    std::error_code unseen;  // what cannot be looked at cannot be replaced either: the renaming below says why
    const bool replaces = std::filesystem::is_regular_file(path_, unseen);
    require(!replaces || ::rename(path_.c_str(), kept.c_str()) == 0, "rename");
    const auto restore = [&](int error) {
      if (replaces) {
        require(::rename(kept.c_str(), path_.c_str()) == 0, "restore");
      }
      errno = error;
    };
    if (!move_into_place()) {
      restore(errno);
      require(false, "rename");
    }
    if (!last.move_into_place()) {
      const auto error = errno;
      ::unlink(path_.c_str());
      restore(error);
      last.require(false, "rename");
    }
    if (replaces) {
      ::unlink(kept.c_str());
    }
  }

 private:
  void sync() const { require(::fsync(file_.get()) == 0, "write"); }

  bool move_into_place() {
    committed_ = ::rename(temporary_.c_str(), path_.c_str()) == 0;
    return committed_;
  }

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
