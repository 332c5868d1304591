#include "folder.h"

#include <c10/util/Exception.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <random>
#include <system_error>
#include <utility>

#include "checksum.h"

namespace rarefy {
namespace {

namespace fs = std::filesystem;

std::string last_error() { return std::generic_category().message(errno); }

/// A new name beside the target.
fs::path beside(const fs::path& target) {
  std::random_device random;
  return target.parent_path() / fmt::format(".{}.{:08x}{:08x}.tmp", target.filename().string(), random(), random());
}

/// A folder that is gone at the end of its scope.
class Temporary {
 public:
  explicit Temporary(fs::path path) : path_(std::move(path)) {}
  Temporary(const Temporary&) = delete;
  Temporary& operator=(const Temporary&) = delete;
  ~Temporary() {
    std::error_code unused;  // what is left of it has a name that nobody reads
    fs::remove_all(path_, unused);
  }
  const fs::path& path() const { return path_; }

 private:
  fs::path path_;
};

void sync_folder(const fs::path& path, const std::string& context) {
  const int folder = ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  const bool done = folder >= 0 && ::fsync(folder) == 0;
  const auto error = done ? "" : last_error();
  if (folder >= 0) {
    ::close(folder);
  }
  TORCH_CHECK(done, context, "cannot write ", path.string(), ": ", error);
}

/// Lets two folders change places in one step where the system can do that, and in two otherwise.
void exchange(const fs::path& made, const fs::path& target, const std::string& context) {
#ifdef RENAME_EXCHANGE
  if (::renameat2(AT_FDCWD, made.c_str(), AT_FDCWD, target.c_str(), RENAME_EXCHANGE) == 0) {
    return;
  }
  TORCH_CHECK(errno == EINVAL || errno == ENOSYS, context, "cannot replace ", target.string(), ": ", last_error());
#endif
  const auto old = beside(target);
  TORCH_CHECK(::rename(target.c_str(), old.c_str()) == 0, context, "cannot replace ", target.string(), ": ",
              last_error());
  if (::rename(made.c_str(), target.c_str()) != 0) {
    const auto error = last_error();
    TORCH_CHECK(::rename(old.c_str(), target.c_str()) == 0, context, "cannot replace ", target.string(), ": ", error,
                "; what was there is now ", old.string());
    TORCH_CHECK(false, context, "cannot replace ", target.string(), ": ", error);
  }
  fs::remove_all(old);
}

}  // namespace

void replace_folder(const fs::path& target, const std::vector<std::string>& known,
                    const std::function<void(const fs::path&)>& fill, const std::string& context) {
  TORCH_CHECK_VALUE(!target.empty(), context, "the folder must have a name, got an empty path");
  std::error_code error;
  auto place = fs::weakly_canonical(fs::absolute(target), error);  // of a link, what it leads to is replaced
  TORCH_CHECK(!error, context, "cannot write ", target.string(), ": ", error.message());
  if (!place.has_filename()) {
    place = place.parent_path();
  }
  const bool exists = fs::exists(place);
  if (exists) {
    TORCH_CHECK_VALUE(fs::is_directory(place), context, target.string(), " must be a folder, or not be there");
    for (const auto& item : fs::directory_iterator(place)) {
      const auto name = item.path().filename().string();
      TORCH_CHECK_VALUE(std::find(known.begin(), known.end(), name) != known.end(), context, target.string(),
                        " must hold no other files, which would be lost when it is replaced, got '", name, "'");
    }
  }
  fs::create_directories(place.parent_path(), error);
  TORCH_CHECK(!error, context, "cannot make ", place.parent_path().string(), ": ", error.message());
  const Temporary made(beside(place));
  TORCH_CHECK(fs::create_directory(made.path(), error) && !error, context, "cannot write beside ", target.string(),
              ": ", error.message());
  fill(made.path());
  sync_folder(made.path(), context);
  if (exists) {
    exchange(made.path(), place, context);
  } else {
    TORCH_CHECK(::rename(made.path().c_str(), place.c_str()) == 0, context, "cannot write ", target.string(), ": ",
                last_error());
  }
  sync_folder(place.parent_path(), context);
}

void write_text(const fs::path& path, const std::string& text, const std::string& context) {
  std::FILE* file = std::fopen(path.c_str(), "wbe");
  TORCH_CHECK(file != nullptr, context, "cannot write ", path.string(), ": ", last_error());
  const bool written = std::fwrite(text.data(), 1, text.size(), file) == text.size() && std::fflush(file) == 0 &&
                       ::fsync(::fileno(file)) == 0;
  const auto error = written ? "" : last_error();
  const bool closed = std::fclose(file) == 0;
  TORCH_CHECK(written && closed, context, "cannot write ", path.string(), ": ", error);
}

std::string read_text(const fs::path& path, const std::string& context) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file, context, "cannot open ", path.string(), ": ", last_error());
  std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  TORCH_CHECK(!file.bad(), context, "cannot read ", path.string(), ": ", last_error());
  return text;
}

FileSum sum_of_file(const fs::path& path, const std::string& context) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file, context, "cannot open ", path.string(), ": ", last_error());
  FileSum sum;
  std::vector<char> block(size_t{1} << 20);
  while (file) {
    file.read(block.data(), static_cast<std::streamsize>(block.size()));
    const auto count = static_cast<size_t>(file.gcount());
    sum.crc32 = checksum(block.data(), count, sum.crc32);
    sum.bytes += count;
  }
  TORCH_CHECK(!file.bad(), context, "cannot read ", path.string(), ": ", last_error());
  return sum;
}

}  // namespace rarefy
