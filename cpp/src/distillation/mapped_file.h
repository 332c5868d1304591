// A file descriptor and a read-only mapping, each released at the end of its scope.
#pragma once

#include <c10/util/Exception.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <system_error>

namespace rarefy::distillation {

inline std::string last_error() { return std::generic_category().message(errno); }

class Descriptor {
 public:
  Descriptor(const std::filesystem::path& path, int flags) : value_(::open(path.c_str(), flags | O_CLOEXEC, 0666)) {
    TORCH_CHECK(value_ >= 0, "[TeacherCache] cannot open ", path.string(), ": ", last_error());
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor() { ::close(value_); }
  int get() const { return value_; }

 private:
  int value_;
};

class Mapping {
 public:
  Mapping(const Descriptor& file, const std::filesystem::path& path) {
    struct stat status = {};
    TORCH_CHECK(::fstat(file.get(), &status) == 0, "[TeacherCache] cannot read ", path.string(), ": ", last_error());
    size_ = static_cast<size_t>(status.st_size);
    if (size_ > 0) {
      data_ = ::mmap(nullptr, size_, PROT_READ, MAP_SHARED, file.get(), 0);
      TORCH_CHECK(data_ != MAP_FAILED, "[TeacherCache] cannot map ", path.string(), ": ", last_error());
    }
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping() {
    if (size_ > 0) {
      ::munmap(data_, size_);
    }
  }
  const uint8_t* data() const { return static_cast<const uint8_t*>(data_); }
  size_t size() const { return size_; }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace rarefy::distillation
