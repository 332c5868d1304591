// A folder that appears whole or not at all.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

namespace rarefy {

/// Fills a new folder beside `target` by `fill` and puts it in its place, so that a failure (a full disk, a crash) leaves
/// what was there. Parents are made. The files that `fill` writes must be on the disk when it returns.
/// `known` are the names of the files that such a folder holds: one that has others is not replaced, as they would be lost.
/// Throws c10::ValueError, which begins with `context`, when the target is no folder or has files of other names; c10::Error
/// when it cannot be written; and passes on what `fill` throws.
void replace_folder(const std::filesystem::path& target, const std::vector<std::string>& known,
                    const std::function<void(const std::filesystem::path&)>& fill, const std::string& context);

/// Writes a text file to the disk. Throws c10::Error, which begins with `context`, when it cannot be written.
void write_text(const std::filesystem::path& path, const std::string& text, const std::string& context);

/// The text of a file. Throws c10::Error, which begins with `context`, when it cannot be read.
std::string read_text(const std::filesystem::path& path, const std::string& context);

/// Size and checksum of a file.
struct FileSum {
  uint64_t bytes = 0;
  uint32_t crc32 = 0;
};

/// Reads a whole file. Throws c10::Error, which begins with `context`, when it cannot be read.
FileSum sum_of_file(const std::filesystem::path& path, const std::string& context);

}  // namespace rarefy
