#pragma once

#include <rarefy/checkpoint.h>
#include <rarefy/export.h>

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

// Compressed files of sparse tensors. Each is a safetensors file that any reader of the format opens: dense tensors are there
// under their names, a sparse tensor `x` as
//   x.values   its kept values in contiguous order, of its own type, [kept]
//   x.bits     which they are: a packed mask as in rarefy/ops/mask.h, uint8                        (form "bitmask")
//   x.indices  or, where each four neighbours along one axis keep one, its place among them in 2 bits: group i in bits
//              2 * (i % 4) of byte i / 4, uint8; groups in contiguous order of their first elements    (form "1:4")
// and its shape and form in the metadata, under kSparseKey:
//   {"format": 1, "rarefy": "0.1.0", "tensors": {"x": {"form": "1:4", "shape": [8, 4, 3, 3], "axis": 1, "mask": true}}}
// "mask" says that the bits are a pruner's mask, which comes back as `x_mask_bits`.
namespace rarefy::pruning {

inline constexpr const char* kSparseKey = "rarefy.sparse";

/// How a tensor lies in a compressed file: the one of fewest bytes is taken.
enum class SparseForm { dense, bitmask, one_of_four };

/// "dense", "bitmask" or "1:4".
RAREFY_API const char* name(SparseForm form);

/// One tensor of a compressed file.
struct RAREFY_API SparseFileTensor {
  std::string name;
  std::vector<int64_t> shape;
  SparseForm form = SparseForm::dense;
  int64_t elements = 0;
  int64_t kept = 0;         // values that are stored
  int64_t dense_bytes = 0;  // of all elements
  int64_t bytes = 0;        // of what is stored
};

/// What a compressed file holds, and what it saves.
struct RAREFY_API SparseFileReport {
  std::vector<SparseFileTensor> tensors;  // masks that are the bits of their tensor are not among them
  int64_t dense_bytes = 0;                // of the tensors, each in full
  int64_t bytes = 0;                      // of the file, header included

  /// bytes / dense_bytes; 1 when there is nothing.
  double ratio() const;
  /// A table with one line per tensor, and a total.
  std::string to_string() const;
  std::string to_html() const;
};

/// Writes tensors, sparse ones compressed. Values come back bit for bit, NaN and infinity too; zeros are left out, and a -0
/// among them, such as w * mask leaves where w is negative, comes back as +0. Tensors that stay dense keep theirs.
/// Where `x_mask_bits` is a pruner's mask of `x`, it is the bits of x: what the mask keeps is stored, zeros of both signs too,
/// and the mask comes back with the tensor. Any type that
/// save_safetensors() takes; no copy of more than one tensor at a time is made. Whole or not at all, as save_safetensors().
/// Throws c10::ValueError for values that a mask prunes and that are not zero (step() the pruner first), for tensors that
/// save_safetensors() refuses, and for names that clash with those of the format; c10::Error when the file cannot be written.
RAREFY_API SparseFileReport save_sparse(const NamedTensors& tensors, const std::filesystem::path& path,
                                        const Metadata& metadata = {});
/// The same for the parameters and buffers of a model. A tensor that is there under several names is written once, as
/// save_safetensors() does for a model.
RAREFY_API SparseFileReport save_sparse(const torch::nn::Module& model, const std::filesystem::path& path,
                                        const Metadata& metadata = {});

/// What save_sparse() would write. Throws as it does for what it refuses.
RAREFY_API SparseFileReport sparse_size(const NamedTensors& tensors, const Metadata& metadata = {});
RAREFY_API SparseFileReport sparse_size(const torch::nn::Module& model, const Metadata& metadata = {});

/// Reads a file: tensors as they were, dense, and pruners' masks. A safetensors file without sparse tensors is read too.
/// Every rule is checked: those of load_safetensors(); shapes; as many values as bits; padding zero; nothing missing.
/// Throws c10::ValueError that names the file and the broken rule; c10::Error when the file cannot be read.
RAREFY_API Checkpoint load_sparse(const std::filesystem::path& path);

/// Reads a file into the parameters and buffers of a model, as load_safetensors() does. Masks and other state of a pruner that
/// the model does not have yet become buffers of it, so that a pruner that is made next goes on; on a failure they do not.
RAREFY_API LoadResult load_sparse(torch::nn::Module& model, const std::filesystem::path& path, bool strict = true);

/// Whether a name is one of a pruner's state: a mask, the step counter.
RAREFY_API bool is_pruning_state(const std::string& name);

}  // namespace rarefy::pruning
