#include <rarefy/rarefy.h>
#include <sys/resource.h>
#include <torch/torch.h>

#include <csignal>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <random>

#include "catch.h"
#include "parity.h"

using namespace rarefy;
using Catch::Matchers::ContainsSubstring;

namespace {

/// A folder that is gone at the end of the test.
class Folder {
 public:
  Folder() {
    std::random_device random;
    path_ = std::filesystem::temp_directory_path() / ("rarefy_checkpoint_" + std::to_string(random()));
    std::filesystem::create_directory(path_);
  }
  ~Folder() { std::filesystem::remove_all(path_); }
  std::filesystem::path operator/(const std::string& name) const { return path_ / name; }
  size_t count() const {
    return static_cast<size_t>(
        std::distance(std::filesystem::directory_iterator(path_), std::filesystem::directory_iterator()));
  }

 private:
  std::filesystem::path path_;
};

std::string message_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const c10::Error& e) {
    return e.what_without_backtrace();
  }
  return "nothing was thrown";
}

std::string bytes_of(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

void write(const std::filesystem::path& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

std::string with_length(const std::string& header, const std::string& data = "") {
  const auto length = static_cast<uint64_t>(header.size());
  std::string bytes(sizeof(length), '\0');
  std::memcpy(bytes.data(), &length, sizeof(length));
  return bytes + header + data;
}

bool same_bits(const torch::Tensor& a, const torch::Tensor& b) {
  const auto x = a.contiguous(), y = b.contiguous();
  return a.scalar_type() == b.scalar_type() && a.sizes() == b.sizes() &&
         (x.nbytes() == 0 || std::memcmp(x.const_data_ptr(), y.const_data_ptr(), x.nbytes()) == 0);
}

struct OutImpl : torch::nn::Module {
  explicit OutImpl(const torch::Tensor& shared) : weight(register_parameter("weight", shared)) {}
  torch::Tensor weight;
};
TORCH_MODULE(Out);

/// A table of words that is the weight of the output layer too.
struct TiedImpl : torch::nn::Module {
  TiedImpl()
      : words(register_module("words", torch::nn::Embedding(5, 3))), out(register_module("out", Out(words->weight))) {}
  torch::nn::Embedding words{nullptr};
  Out out{nullptr};
};
TORCH_MODULE(Tied);

void train(Parity& model, int steps) {
  torch::optim::SGD optimizer(model->parameters(), 0.1);
  for (int i = 0; i < steps; ++i) {
    optimizer.zero_grad();
    model(torch::randn({4, 2, 6, 6})).square().mean().backward();
    optimizer.step();
  }
}

}  // namespace

TEST_CASE("tensors of every type and layout come back bit by bit", "[checkpoint]") {
  torch::manual_seed(0);
  const Folder folder;
  NamedTensors tensors;
  for (const auto type :
       {torch::kBool, torch::kUInt8, torch::kInt8, torch::kInt16, torch::kUInt16, torch::kInt32, torch::kUInt32,
        torch::kInt64, torch::kUInt64, torch::kHalf, torch::kBFloat16, torch::kFloat32, torch::kFloat64,
        torch::kFloat8_e4m3fn, torch::kFloat8_e5m2, torch::kFloat8_e4m3fnuz, torch::kFloat8_e5m2fnuz,
        torch::kFloat8_e8m0fnu, torch::kComplexFloat}) {
    auto tensor = torch::empty({3, 5}, type);
    auto* bytes = static_cast<uint8_t*>(tensor.mutable_data_ptr());
    std::mt19937 random(7);
    std::generate(bytes, bytes + tensor.nbytes(),
                  [&] { return static_cast<uint8_t>(random() % (type == torch::kBool ? 2 : 256)); });
    tensors.insert(std::string("type ") + c10::toString(type), tensor);
  }
  tensors.insert("scalar", torch::tensor(3.5));
  tensors.insert("empty", torch::empty({0, 4}));
  tensors.insert("transposed", torch::randn({4, 6}).t());
  tensors.insert("channels last", torch::randn({2, 3, 4, 5}).contiguous(at::MemoryFormat::ChannelsLast));
  tensors.insert("slice", torch::randn({10, 10}).slice(1, 2, 9, 3));
  tensors.insert("expanded", torch::randn({1, 3}).expand({4, 3}));
  tensors.insert("conjugate", torch::randn({3}, torch::kComplexFloat).conj());
  tensors.insert("quote \" backslash \\ newline \n control \x01 \xc3\xa9 \xf0\x9f\x8e\x89", torch::arange(3));
  const Metadata metadata{{"made by", "a \"test\"\n"}, {"", "\xe2\x82\xac"}};
  save_safetensors(tensors, folder / "a.safetensors", metadata);

  const auto loaded = load_safetensors(folder / "a.safetensors");
  REQUIRE(loaded.metadata == metadata);
  REQUIRE(loaded.tensors.size() == tensors.size());
  for (const auto& item : tensors) {
    INFO(item.key());
    REQUIRE(same_bits(loaded.tensors[item.key()], item.value().resolve_conj()));
  }
  REQUIRE(folder.count() == 1);
}

TEST_CASE("an empty file of tensors is a file", "[checkpoint]") {
  const Folder folder;
  save_safetensors(NamedTensors{}, folder / "none.safetensors");
  REQUIRE(bytes_of(folder / "none.safetensors") == with_length("{}      "));
  REQUIRE(load_safetensors(folder / "none.safetensors").tensors.is_empty());
}

TEST_CASE("what cannot be stored is refused, and the old file stays", "[checkpoint]") {
  const Folder folder;
  const auto path = folder / "a.safetensors";
  write(path, "old");
  const auto refused = [&](const std::string& name, const torch::Tensor& tensor, const Metadata& metadata = {}) {
    NamedTensors tensors;
    tensors.insert(name, tensor);
    return message_of([&] { save_safetensors(tensors, path, metadata); });
  };
  REQUIRE_THAT(refused("x", torch::Tensor()), ContainsSubstring("[save_safetensors] tensor 'x' must be dense"));
  REQUIRE_THAT(refused("x", torch::eye(2).to_sparse()), ContainsSubstring("tensor 'x' must be dense"));
  REQUIRE_THAT(refused("x", torch::empty({2}, torch::kMeta)), ContainsSubstring("must be dense and have values"));
  REQUIRE_THAT(refused("x", torch::ones({2}, torch::kComplexDouble)),
               ContainsSubstring("must be of a type that the format knows, got ComplexDouble"));
  REQUIRE_THAT(refused("__metadata__", torch::ones(2)), ContainsSubstring("name must not be '__metadata__'"));
  REQUIRE_THAT(refused("\xff", torch::ones(2)), ContainsSubstring("names and metadata must be UTF-8"));
  REQUIRE_THAT(refused("x", torch::ones(2), {{"k", "\xed\xa0\x80"}}), ContainsSubstring("must be UTF-8"));
  REQUIRE(bytes_of(path) == "old");
  REQUIRE(folder.count() == 1);
  REQUIRE_THAT(message_of([&] { save_safetensors(NamedTensors{}, folder / "no" / "a.safetensors"); }),
               ContainsSubstring("[save_safetensors] cannot open"));
}

TEST_CASE("a disk that is full leaves the old file and nothing else", "[checkpoint]") {
  const Folder folder;
  const auto path = folder / "a.safetensors";
  write(path, "old");
  NamedTensors tensors;
  tensors.insert("x", torch::ones({10000}));
  rlimit before{};
  REQUIRE(getrlimit(RLIMIT_FSIZE, &before) == 0);
  auto* handler = std::signal(SIGXFSZ, SIG_IGN);
  rlimit limited = before;
  limited.rlim_cur = 4096;
  REQUIRE(setrlimit(RLIMIT_FSIZE, &limited) == 0);
  const auto message = message_of([&] { save_safetensors(tensors, path); });
  REQUIRE(setrlimit(RLIMIT_FSIZE, &before) == 0);
  std::signal(SIGXFSZ, handler);
  REQUIRE_THAT(message, ContainsSubstring("[save_safetensors] cannot write " + path.string()));
  REQUIRE(bytes_of(path) == "old");
  REQUIRE(folder.count() == 1);
}

TEST_CASE("a tied tensor is written once and loads into both names", "[checkpoint]") {
  torch::manual_seed(1);
  const Folder folder;
  Tied model;
  save_safetensors(*model, folder / "tied.safetensors", {{"format", "pt"}});
  const auto loaded = load_safetensors(folder / "tied.safetensors");
  REQUIRE(loaded.tensors.keys() == std::vector<std::string>{"out.weight"});
  REQUIRE(loaded.metadata == Metadata{{"format", "pt"}, {"words.weight", "out.weight"}});

  Tied fresh;
  const auto result = load_safetensors(*fresh, folder / "tied.safetensors");
  REQUIRE((result.missing.empty() && result.unexpected.empty()));
  REQUIRE(torch::equal(fresh->words->weight, model->words->weight));
  REQUIRE(fresh->words->weight.is_same(fresh->out->weight));

  NamedTensors both;  // as a writer without sharing makes it
  both.insert("out.weight", torch::zeros({5, 3}));
  both.insert("words.weight", torch::zeros({5, 3}));
  save_safetensors(both, folder / "both.safetensors");
  load_safetensors(*fresh, folder / "both.safetensors");
  REQUIRE(fresh->out->weight.abs().sum().item<float>() == 0.0F);
  both["words.weight"].fill_(1);
  save_safetensors(both, folder / "both.safetensors");
  REQUIRE_THAT(message_of([&] { load_safetensors(*fresh, folder / "both.safetensors"); }),
               ContainsSubstring("words.weight and out.weight are one tensor of the model and must be equal"));
  REQUIRE(fresh->out->weight.abs().sum().item<float>() == 0.0F);
}

TEST_CASE("names, shapes and types must fit, and a refused file changes nothing", "[checkpoint]") {
  torch::manual_seed(2);
  const Folder folder;
  const auto path = folder / "a.safetensors";
  torch::nn::Linear model(3, 2);
  const auto weight = model->weight.detach().clone();
  NamedTensors tensors;
  tensors.insert("weight", torch::zeros({2, 3}));
  tensors.insert("other", torch::zeros({1}));
  save_safetensors(tensors, path);
  REQUIRE_THAT(message_of([&] { load_safetensors(*model, path); }),
               ContainsSubstring("missing are: bias; unexpected are: other"));
  REQUIRE(torch::equal(model->weight, weight));

  const auto result = load_safetensors(*model, path, false);
  REQUIRE(result.missing == std::vector<std::string>{"bias"});
  REQUIRE(result.unexpected == std::vector<std::string>{"other"});
  REQUIRE(model->weight.abs().sum().item<float>() == 0.0F);

  tensors["weight"] = torch::ones({3, 2});
  tensors["other"] = torch::ones({1});
  tensors.insert("bias", torch::ones({2}, torch::kInt32));
  save_safetensors(tensors, path);
  REQUIRE_THAT(message_of([&] { load_safetensors(*model, path, false); }),
               ContainsSubstring("shapes and types must be those of the model, but are not for: "
                                 "weight (Float [3, 2] into Float [2, 3]), bias (Int [2] into Float [2])"));
  REQUIRE(model->weight.abs().sum().item<float>() == 0.0F);

  tensors["weight"] = torch::full({2, 3}, 0.5, torch::kBFloat16);
  tensors["bias"] = torch::ones({2}, torch::kFloat64);
  save_safetensors(tensors, path);
  load_safetensors(*model, path, false);
  REQUIRE(torch::equal(model->weight, torch::full({2, 3}, 0.5)));
}

TEST_CASE("floating, prepared and converted models go through a file", "[checkpoint][quantization]") {
  using namespace rarefy::quantization;
  torch::manual_seed(3);
  const Folder folder;
  const auto path = folder / "a.safetensors";
  const auto x = torch::randn({4, 2, 6, 6});

  Parity trained, fresh;
  prepare_qat(*trained, QConfig::int8());
  prepare_qat(*fresh, QConfig::int8());
  const Folder other;
  save_safetensors(*fresh, other / "uncalibrated.safetensors");
  train(trained, 3);
  save_safetensors(*trained, path);
  fresh->eval();
  REQUIRE_THAT(message_of([&] { fresh(x); }), ContainsSubstring("must observe data before it quantizes"));
  const auto result = load_safetensors(*fresh, path);
  REQUIRE((result.missing.empty() && result.unexpected.empty()));
  trained->eval();
  REQUIRE(torch::equal(fresh(x), trained(x)));

  // Quantizers that go back to "nothing seen" must notice it, although they have quantized before.
  Parity back;
  prepare_qat(*back, QConfig::int8());
  train(back, 1);
  back->eval();
  back(x);
  load_safetensors(*back, other / "uncalibrated.safetensors");
  REQUIRE_THAT(message_of([&] { back(x); }), ContainsSubstring("must observe data before it quantizes"));

  // Integers: into a model that is converted, and whose packed weights are in use.
  convert(*trained);
  const auto expected = trained(x);
  save_safetensors(*trained, path);
  Parity integer;
  prepare_qat(*integer, QConfig::int8());
  train(integer, 1);
  convert(*integer);
  REQUIRE_FALSE(torch::equal(integer(x), expected));
  load_safetensors(*integer, path);
  REQUIRE(torch::equal(integer(x), expected));

  // A floating model's file has no quantizers, and integers are not weights in floating point.
  Parity floating, prepared;
  save_safetensors(*floating, folder / "float.safetensors");
  prepare_qat(*prepared, QConfig::int8());
  const auto lacking = load_safetensors(*prepared, folder / "float.safetensors", false);
  REQUIRE(lacking.unexpected.empty());
  REQUIRE(std::all_of(lacking.missing.begin(), lacking.missing.end(),
                      [](const std::string& name) { return name.find(".quant.") != std::string::npos; }));
  REQUIRE(torch::equal(prepared->fc->weight, floating->fc->weight));
  REQUIRE_THAT(message_of([&] { load_safetensors(*floating, path, false); }),
               ContainsSubstring("fc.weight (Char [3, 4] into Float [3, 4])"));
}

TEST_CASE("a broken file is refused by the rule that it breaks", "[checkpoint]") {
  const Folder folder;
  const auto path = folder / "broken.safetensors";
  const auto message = [&](const std::string& bytes) {
    write(path, bytes);
    return message_of([&] { load_safetensors(path); });
  };
  const auto of_header = [&](const std::string& header, size_t data) {
    return message(with_length(header, std::string(data, '\0')));
  };
  const std::string x = R"("x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]})";
  REQUIRE(of_header("{" + x + "}", 8) == "nothing was thrown");
  REQUIRE(of_header("{\n" + x + " , \"__metadata__\" : { } }\r\t ", 8) == "nothing was thrown");

  REQUIRE_THAT(message("abc"), ContainsSubstring("[load_safetensors] " + path.string() +
                                                 ": the file must begin with 8 bytes of header length, got 3"));
  REQUIRE_THAT(message(std::string(8, '\xff')), ContainsSubstring("must have at most 100000000 bytes, got 1844674407"));
  REQUIRE_THAT(message(std::string("\x09\0\0\0\0\0\0\0{}", 10)),
               ContainsSubstring("the header must be inside of the file"));
  REQUIRE_THAT(message(std::string(8, '\0')), ContainsSubstring("must begin with '{'"));

  const std::vector<std::tuple<std::string, size_t, std::string>> cases{
      {" {}", 0, "must begin with '{'"},
      {"[]", 0, "must begin with '{'"},
      {"{", 0, "must be JSON with '\"' at byte 1"},
      {"{}x", 0, "must end after its object, but goes on at byte 2"},
      {"{}", 1, "the tensors must cover the data, but end at 0 of 1 bytes"},
      {"{" + x + ",}", 8, "must be JSON with '\"'"},
      {"{" + x, 8, "must be JSON with '}'"},
      {"{" + x + "}", 7, "must cover the data, but end at 8 of 7 bytes"},
      {"{" + x + "," + x + "}", 8, "must not repeat the name 'x'"},
      {"{" + x + R"(,"\u0078":{"dtype":"U8","shape":[0],"data_offsets":[8,8]}})", 8, "must not repeat the name 'x'"},
      {R"({"__metadata__":{},"__metadata__":{}})", 0, "must not repeat the name '__metadata__'"},
      {R"({"__metadata__":{"a":"1","a":"2"}})", 0, "must not repeat the name 'a' in its metadata"},
      {R"({"__metadata__":{"a":1}})", 0, "must be JSON with '\"'"},
      {R"({"x":{"dtype":"F31","shape":[2],"data_offsets":[0,8]}})", 8,
       "must give a known dtype of tensor 'x', got 'F31'"},
      {R"({"x":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}})", 8, "must give tensor 'x' 12 bytes"},
      {R"({"x":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}})", 8, "got data_offsets [8, 0]"},
      {R"({"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8,9]}})", 8, "must have at most 2 numbers"},
      {R"({"x":{"dtype":"F32","shape":[2],"data_offsets":[0]}})", 8, "must give two data_offsets of tensor 'x', got 1"},
      {R"({"x":{"dtype":"F32","shape":[2]}})", 8, "must give dtype, shape and data_offsets of tensor 'x'"},
      {R"({"x":{"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]}})", 8,
       "must not repeat 'shape' of tensor 'x'"},
      {R"({"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"a":[1]}})", 8,
       "by dtype, shape and data_offsets, got 'a'"},
      {R"({"x":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}})", 8, "must have a non-negative integer"},
      {R"({"x":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}})", 8, "must have a non-negative integer"},
      {R"({"x":{"dtype":"F32","shape":[02],"data_offsets":[0,8]}})", 8, "must have a non-negative integer"},
      {R"({"x":{"dtype":"F32","shape":[2],"data_offsets":[0,18446744073709551616]}})", 8,
       "must have numbers below 2^64"},
      {R"({"x":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}})", 0,
       "a shape of fewer than 2^63 bytes"},
      {R"({"x":{"dtype":"F32","shape":[0,9223372036854775807],"data_offsets":[0,0]}})", 0,
       "a shape of fewer than 2^63 bytes"},
      {R"({"x":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"y":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}})",
       6, "tensor 'y' must begin where the one before it ends, at 4 of the data, got 2"},
      {R"({"x":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"y":{"dtype":"U8","shape":[4],"data_offsets":[6,10]}})",
       10, "tensor 'y' must begin where the one before it ends, at 4 of the data, got 6"},
      {"{\"\xff\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}", 0, "must be UTF-8"},
      {"{\"\xc0\xaf\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}", 0, "must be UTF-8"},
      {"{\"a\nb\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}", 0, "must escape control characters"},
      {R"({"\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}})", 0, "must pair its surrogates"},
      {R"({"\udc00":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}})", 0, "must pair its surrogates"},
      {R"({"\x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}})", 0, "has an unknown escape"},
      {R"({"\u12g4":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}})", 0, "must have four hexadecimal digits"},
      {R"({"x)", 0, "ends inside of a string"},
  };
  for (const auto& [header, data, rule] : cases) {
    INFO(header);
    REQUIRE_THAT(of_header(header, data), ContainsSubstring(rule));
    REQUIRE_THAT(of_header(header, data), ContainsSubstring("[load_safetensors] " + path.string()));
  }
  const std::string flag = R"({"x":{"dtype":"BOOL","shape":[1],"data_offsets":[0,1]}})";
  REQUIRE_THAT(message(with_length(flag, "\x02")), ContainsSubstring("the bytes of bool tensor 'x' must be 0 or 1"));
  REQUIRE_THAT(message_of([&] { load_safetensors(folder / "none"); }),
               ContainsSubstring("[load_safetensors] cannot open"));
  REQUIRE_THAT(message_of([&] { load_safetensors(std::filesystem::temp_directory_path()); }),
               ContainsSubstring("must be a regular file"));

  std::string shape = "1";
  for (int i = 0; i < 64; ++i) {
    shape += ",1";
  }
  REQUIRE_THAT(of_header(R"({"x":{"dtype":"U8","shape":[)" + shape + R"(],"data_offsets":[0,1]}})", 1),
               ContainsSubstring("must have at most 64 numbers in the shape of tensor 'x'"));
}

TEST_CASE("escapes of a header mean what JSON says", "[checkpoint]") {
  const Folder folder;
  write(folder / "a", with_length(R"({"__metadata__":{"\u00e9\ud83c\udf89\/\b\f\n\r\t\"\\\u20AC\u0000":"\u0041"}})"));
  const auto metadata = load_safetensors(folder / "a").metadata;
  const std::string expected("\xc3\xa9\xf0\x9f\x8e\x89/\b\f\n\r\t\"\\\xe2\x82\xac\0", 18);
  REQUIRE(metadata == Metadata{{expected, "A"}});
}
