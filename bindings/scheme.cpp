#include <rarefy/quantization/format_search.h>
#include <rarefy/quantization/learned_grids.h>
#include <rarefy/quantization/packed.h>
#include <rarefy/quantization/packed_weight.h>

#include "bindings.h"

namespace rarefy::python {
namespace {

using namespace quantization;

/// Python's str.format.
template <typename... Values>
std::string filled(const char* text, Values&&... values) {
  return py::str(text).format(std::forward<Values>(values)...).template cast<std::string>();
}

const char* truth(bool value) { return value ? "True" : "False"; }

struct GranularityRepr {
  std::string operator()(const PerTensor&) const { return "PerTensor()"; }
  std::string operator()(const PerChannel& g) const { return filled("PerChannel(axis={})", g.axis); }
  std::string operator()(const PerGroup& g) const { return filled("PerGroup(size={}, axis={})", g.size, g.axis); }
  std::string operator()(const PerBlock& g) const { return filled("PerBlock(rows={}, columns={})", g.rows, g.columns); }
  std::string operator()(const PerToken&) const { return "PerToken()"; }
};

struct FormatRepr {
  std::string operator()(const Integer&) const { return "Integer()"; }
  std::string operator()(const Binary&) const { return "Binary()"; }
  std::string operator()(const Ternary& f) const { return filled("Ternary(threshold={})", f.threshold); }
  std::string operator()(const Minifloat& f) const {
    return filled("Minifloat(exponent_bits={}, mantissa_bits={}, bias={}, specials='{}', saturate={})", f.exponent_bits,
                  f.mantissa_bits, f.bias, str(f.specials), truth(f.saturate));
  }
  std::string operator()(const MX& f) const { return filled("MX(element='{}')", str(f.element)); }
  std::string operator()(const NVFP4&) const { return "NVFP4()"; }
  std::string operator()(const NF4& f) const {
    return filled("NF4(double_quantized={}, scale_block={})", truth(f.double_quantized), f.scale_block);
  }
  std::string operator()(const Codebook& f) const { return filled("Codebook(entries={})", f.entries); }
};

/// What every value type has: equality, hash and text from its repr.
template <typename Value, typename Repr>
void add_value_methods(py::class_<Value>& type, Repr repr) {
  type.def(py::self == py::self)
      .def("__hash__", [repr](const Value& self) { return py::hash(py::str(repr(self))); })
      .def("__repr__", [repr](const Value& self) { return repr(self); });
}

void init_granularities(py::module_& m) {
  auto tensor =
      py::class_<PerTensor>(m, "PerTensor", "One scale and zero point for the whole tensor: [1].")
          .def(py::init<>())
          .def(py::pickle([](const PerTensor&) { return py::tuple(); }, [](const py::tuple&) { return PerTensor{}; }));
  add_value_methods(tensor, GranularityRepr{});

  auto channel =
      py::class_<PerChannel>(m, "PerChannel", "One scale and zero point per index of `axis`: [size of axis].")
          .def(py::init([](int64_t axis) { return PerChannel{axis}; }), py::arg("axis") = 0)
          .def_readonly("axis", &PerChannel::axis)
          .def(py::pickle([](const PerChannel& self) { return py::make_tuple(self.axis); },
                          [](const py::tuple& state) { return PerChannel{state[0].cast<int64_t>()}; }));
  add_value_methods(channel, GranularityRepr{});

  auto group =
      py::class_<PerGroup>(m, "PerGroup",
                           "One scale per `size` neighbours along `axis`, the last group shorter: the shape with "
                           "ceil(n / size) in place of n.")
          .def(py::init([](int64_t size, int64_t axis) { return PerGroup{size, axis}; }), py::arg("size") = 128,
               py::arg("axis") = -1)
          .def_readonly("size", &PerGroup::size)
          .def_readonly("axis", &PerGroup::axis)
          .def(py::pickle(
              [](const PerGroup& self) { return py::make_tuple(self.size, self.axis); },
              [](const py::tuple& state) { return PerGroup{state[0].cast<int64_t>(), state[1].cast<int64_t>()}; }));
  add_value_methods(group, GranularityRepr{});

  auto block = py::class_<PerBlock>(m, "PerBlock",
                                    "One scale per block of `rows` by `columns` of the last two axes: "
                                    "[..., ceil(R / rows), ceil(C / columns)].")
                   .def(py::init([](int64_t rows, int64_t columns) { return PerBlock{rows, columns}; }),
                        py::arg("rows") = 128, py::arg("columns") = 128)
                   .def_readonly("rows", &PerBlock::rows)
                   .def_readonly("columns", &PerBlock::columns)
                   .def(py::pickle([](const PerBlock& self) { return py::make_tuple(self.rows, self.columns); },
                                   [](const py::tuple& state) {
                                     return PerBlock{state[0].cast<int64_t>(), state[1].cast<int64_t>()};
                                   }));
  add_value_methods(block, GranularityRepr{});

  auto token =
      py::class_<PerToken>(m, "PerToken",
                           "One scale per index of all axes but the last, from the tensor itself: [..., 1].")
          .def(py::init<>())
          .def(py::pickle([](const PerToken&) { return py::tuple(); }, [](const py::tuple&) { return PerToken{}; }));
  add_value_methods(token, GranularityRepr{});
}

void init_formats(py::module_& m) {
  auto integer =
      py::class_<Integer>(m, "Integer", "Integers of Scheme.bits bits with a scale and a zero point.")
          .def(py::init<>())
          .def(py::pickle([](const Integer&) { return py::tuple(); }, [](const py::tuple&) { return Integer{}; }));
  add_value_methods(integer, FormatRepr{});

  auto binary =
      py::class_<Binary>(m, "Binary", "-1 and 1, times the mean of |w| (XNOR-Net, arXiv:1603.05279). Weights alone.")
          .def(py::init<>())
          .def(py::pickle([](const Binary&) { return py::tuple(); }, [](const py::tuple&) { return Binary{}; }));
  add_value_methods(binary, FormatRepr{});

  auto ternary = py::class_<Ternary>(m, "Ternary",
                                     "-1, 0 and 1, times the mean of |w| over what is above threshold * mean |w| (TWN, "
                                     "arXiv:1605.04711). Weights alone.")
                     .def(py::init([](double threshold) { return Ternary{threshold}; }), py::arg("threshold") = 0.7)
                     .def_readonly("threshold", &Ternary::threshold)
                     .def(py::pickle([](const Ternary& self) { return py::make_tuple(self.threshold); },
                                     [](const py::tuple& state) { return Ternary{state[0].cast<double>()}; }));
  add_value_methods(ternary, FormatRepr{});

  const auto make_minifloat = [](int64_t exponent_bits, int64_t mantissa_bits, std::optional<int64_t> bias,
                                 const std::string& kind, bool saturate) {
    const bool shiftable = exponent_bits >= 1 && exponent_bits < 16;
    const int64_t usual = shiftable ? (int64_t{1} << (exponent_bits - 1)) - 1 : 0;
    return Minifloat{exponent_bits, mantissa_bits, bias.value_or(usual), specials(kind), saturate};
  };
  auto minifloat =
      py::class_<Minifloat>(m, "Minifloat",
                            R"(Floating point of at most 8 bits: a sign, an exponent, a mantissa, with denormals.

exponent_bits: 1 to 7. mantissa_bits: 0 to 6.
bias: None is 2^(exponent_bits - 1) - 1.
specials: "none" (every code is a number: FP6, FP4), "nan" (the largest code is NaN: E4M3) or "ieee" (the largest exponent
    is infinity and NaN: E5M2).
saturate: what is beyond the largest number becomes that number; otherwise infinity or NaN.)")
          .def(py::init(make_minifloat), py::arg("exponent_bits"), py::arg("mantissa_bits"),
               py::arg("bias") = py::none(), py::arg("specials") = "none", py::arg("saturate") = true)
          .def_static("e4m3", &Minifloat::e4m3, "FP8 for values: up to 448, NaN, no infinity.")
          .def_static("e5m2", &Minifloat::e5m2, "FP8 for gradients: up to 57344, NaN and infinity.")
          .def_static("e3m2", &Minifloat::e3m2, "FP6: up to 28.")
          .def_static("e2m3", &Minifloat::e2m3, "FP6: up to 7.5.")
          .def_static("e2m1", &Minifloat::e2m1, "FP4: 0, 0.5, 1, 1.5, 2, 3, 4, 6.")
          .def_readonly("exponent_bits", &Minifloat::exponent_bits)
          .def_readonly("mantissa_bits", &Minifloat::mantissa_bits)
          .def_readonly("bias", &Minifloat::bias)
          .def_property_readonly("specials", [](const Minifloat& self) { return str(self.specials); })
          .def_readonly("saturate", &Minifloat::saturate)
          .def_property_readonly("bits", &Minifloat::bits)
          .def_property_readonly("greatest", &Minifloat::greatest, "The largest number.")
          .def("__str__", &Minifloat::str)
          .def(py::pickle(
              [](const Minifloat& self) {
                return py::make_tuple(self.exponent_bits, self.mantissa_bits, self.bias, str(self.specials),
                                      self.saturate);
              },
              [make_minifloat](const py::tuple& state) {
                return make_minifloat(state[0].cast<int64_t>(), state[1].cast<int64_t>(), state[2].cast<int64_t>(),
                                      state[3].cast<std::string>(), state[4].cast<bool>());
              }));
  add_value_methods(minifloat, FormatRepr{});

  auto mx = py::class_<MX>(m, "MX", R"(Blocks whose elements share a power of two (OCP MX v1.0, arXiv:2310.10537).

element: "e4m3", "e5m2", "e3m2", "e2m3", "e2m1" or "int8".)")
                .def(py::init([](const std::string& element) { return MX{mx_element(element)}; }),
                     py::arg("element") = "e4m3")
                .def_property_readonly("element", [](const MX& self) { return str(self.element); })
                .def(py::pickle([](const MX& self) { return py::make_tuple(str(self.element)); },
                                [](const py::tuple& state) { return MX{mx_element(state[0].cast<std::string>())}; }));
  add_value_methods(mx, FormatRepr{});

  auto nvfp4 =
      py::class_<NVFP4>(m, "NVFP4", "FP4 in blocks with a scale each in E4M3, and one float32 scale for the tensor.")
          .def(py::init<>())
          .def(py::pickle([](const NVFP4&) { return py::tuple(); }, [](const py::tuple&) { return NVFP4{}; }));
  add_value_methods(nvfp4, FormatRepr{});

  auto nf4 =
      py::class_<NF4>(m, "NF4", R"(4-bit NormalFloat (QLoRA, arXiv:2305.14314): 16 quantiles of the normal distribution.

double_quantized: the scales are stored in 8 bits, in blocks of scale_block.)")
          .def(py::init([](bool twice, int64_t scale_block) { return NF4{twice, scale_block}; }),
               py::arg("double_quantized") = false, py::arg("scale_block") = 256)
          .def_readonly("double_quantized", &NF4::double_quantized)
          .def_readonly("scale_block", &NF4::scale_block)
          .def(py::pickle([](const NF4& self) { return py::make_tuple(self.double_quantized, self.scale_block); },
                          [](const py::tuple& state) { return NF4{state[0].cast<bool>(), state[1].cast<int64_t>()}; }));
  add_value_methods(nf4, FormatRepr{});

  auto codebook = py::class_<Codebook>(m, "Codebook", "The nearest of `entries` (2 to 256) values that k-means chose.")
                      .def(py::init([](int64_t entries) { return Codebook{entries}; }), py::arg("entries") = 16)
                      .def_readonly("entries", &Codebook::entries)
                      .def(py::pickle([](const Codebook& self) { return py::make_tuple(self.entries); },
                                      [](const py::tuple& state) { return Codebook{state[0].cast<int64_t>()}; }));
  add_value_methods(codebook, FormatRepr{});
}

std::string noise_repr(const Noise& self) {
  return self.uniform ? filled("Noise(share={}, uniform=True)", self.share) : filled("Noise(share={})", self.share);
}

void init_noise(py::module_& m) {
  auto noise =
      py::class_<Noise>(m, "Noise",
                        R"(What training does in place of rounding every value; everywhere else all values are rounded.

share: the part of the values, drawn anew at every forward, that is quantized; the others stay as they are, with their exact
    gradient (Quant-Noise, arXiv:2004.07320). In (0, 1]; below 1 unless uniform.
uniform: an even draw from a step's width around the value stands for its rounding (pseudo-quantization noise, arXiv:1804.10969,
    arXiv:2104.09987). Integers with an observed scale.

Random numbers are those of torch's generator: torch.manual_seed makes them repeat.)")
          .def(py::init([](double share, bool uniform) { return Noise{share, uniform}; }), py::arg("share") = 1.0,
               py::arg("uniform") = false)
          .def_readonly("share", &Noise::share)
          .def_readonly("uniform", &Noise::uniform)
          .def(
              py::pickle([](const Noise& self) { return py::make_tuple(self.share, self.uniform); },
                         [](const py::tuple& state) { return Noise{state[0].cast<double>(), state[1].cast<bool>()}; }));
  add_value_methods(noise, &noise_repr);
}

Scheme make_scheme(std::optional<int64_t> bits, bool symmetric, std::optional<bool> is_signed, bool narrow_range,
                   const std::optional<Granularity>& granularity, const Format& format, std::optional<bool> dynamic,
                   bool power_of_two, const std::string& rounding, int64_t seed, const std::string& straight_through,
                   const std::optional<Noise>& noise) {
  Scheme scheme;
  scheme.format = format;
  scheme.bits = bits.value_or(scheme.is_integer() ? 8 : element_bits(format));
  scheme.symmetric = symmetric;
  scheme.is_signed = is_signed.value_or(symmetric);
  scheme.narrow_range = narrow_range;
  const bool in_blocks = std::holds_alternative<MX>(format) || std::holds_alternative<NVFP4>(format) ||
                         std::holds_alternative<NF4>(format);
  if (granularity.has_value()) {
    scheme.granularity = *granularity;
  } else if (in_blocks) {
    scheme.granularity = PerGroup{std::holds_alternative<MX>(format)      ? 32
                                  : std::holds_alternative<NVFP4>(format) ? 16
                                                                          : 64};
  }
  scheme.dynamic =
      dynamic.value_or(in_blocks || std::holds_alternative<Binary>(format) || std::holds_alternative<Ternary>(format) ||
                       std::holds_alternative<PerToken>(scheme.granularity));
  scheme.power_of_two = power_of_two;
  if (rounding != "nearest_even" && rounding != "stochastic") {
    throw py::value_error(filled("[Scheme] rounding must be 'nearest_even' or 'stochastic', got '{}'", rounding));
  }
  scheme.rounding = rounding == "stochastic" ? Rounding::stochastic : Rounding::nearest_even;
  scheme.seed = seed;
  if (straight_through != "clipped" && straight_through != "pass") {
    throw py::value_error(filled("[Scheme] straight_through must be 'clipped' or 'pass', got '{}'", straight_through));
  }
  scheme.straight_through = straight_through == "pass" ? StraightThrough::pass : StraightThrough::clipped;
  scheme.noise = noise;
  scheme.validate();
  return scheme;
}

std::string rounding_of(const Scheme& self) {
  return self.rounding == Rounding::stochastic ? "stochastic" : "nearest_even";
}
std::string straight_through_of(const Scheme& self) {
  return self.straight_through == StraightThrough::pass ? "pass" : "clipped";
}

std::string scheme_repr(const Scheme& self) {
  std::string text = filled("Scheme(bits={}, symmetric={}, signed={}, narrow_range={}, granularity={}", self.bits,
                            truth(self.symmetric), truth(self.signed_range()), truth(self.narrow_range),
                            std::visit(GranularityRepr{}, self.granularity));
  if (!self.is_integer()) {
    text += filled(", format={}", std::visit(FormatRepr{}, self.format));
  }
  if (self.dynamic) {
    text += ", dynamic=True";
  }
  if (self.power_of_two) {
    text += ", power_of_two=True";
  }
  if (self.rounding == Rounding::stochastic) {
    text += filled(", rounding='stochastic', seed={}", self.seed);
  }
  if (self.straight_through == StraightThrough::pass) {
    text += ", straight_through='pass'";
  }
  if (self.noise.has_value()) {
    text += filled(", noise={}", noise_repr(*self.noise));
  }
  return filled("{})", text);
}

void init_packed(py::module_& m) {
  py::class_<QuantizedTensorParts>(m, "QuantizedTensorParts",
                                   R"(A tensor as a format stores it: the result of quantize_to.

tensors has "data" and, as the format wants them, "scale", "zero_point", "tensor_scale", "scale_scale", "scale_mean" and
"codebook"; rarefy/quantization/packed.h says what they hold.)")
      .def(py::init([](const Scheme& scheme, std::vector<int64_t> shape, c10::ScalarType dtype,
                       std::map<std::string, at::Tensor> tensors) {
             return QuantizedTensorParts{scheme, std::move(shape), dtype, std::move(tensors)};
           }),
           py::arg("scheme"), py::arg("shape"), py::arg("dtype"), py::arg("tensors"))
      .def_readonly("scheme", &QuantizedTensorParts::scheme)
      .def_readonly("shape", &QuantizedTensorParts::shape)
      .def_readonly("dtype", &QuantizedTensorParts::dtype)
      .def_readonly("tensors", &QuantizedTensorParts::tensors)
      .def_property_readonly("nbytes", &QuantizedTensorParts::nbytes, "Bytes of all parts.")
      .def("dequantize", &dequantize,
           "The tensor, in its shape and dtype. Raises ValueError for parts that do not fit.")
      .def("__repr__", [](const QuantizedTensorParts& self) {
        return filled("QuantizedTensorParts({}, shape={}, {} bytes)", self.scheme.str(), self.shape, self.nbytes());
      });
  m.def("part_names", &part_names, py::arg("scheme"),
        "The names of a format's parts, in the order in which torch.ops.rarefy.packed_linear and its like take them.");
  m.def(
      "quantize_to", &quantize_to, py::arg("x"), py::arg("scheme"), py::arg("scale") = py::none(),
      py::arg("zero_point") = py::none(),
      R"(A tensor in a format: codes as small as they are, and scales. dequantize() gives what simulating the format gives, bit for bit.

x: floating point, finite. scheme: rounds to nearest.
scale, zero_point: of a scheme that observes its range (for a codebook: the codebook); None: those of x itself.

Raises ValueError for values that are not finite, and whatever the operators of the format raise.)");
}

}  // namespace

void init_scheme(py::module_& m) {
  init_granularities(m);
  init_formats(m);
  init_noise(m);
  py::class_<Scheme>(
      m, "Scheme",
      R"(What a tensor is quantized to: the elements and what shares a scale, without the values of the scale.

bits: width of an element: 2 to 16 for integers (8 when None; layers with integer kernels take 2 to 8), that of the format
    otherwise.
symmetric: the zero point is fixed in the middle of the range; otherwise it follows the data. Integers alone.
signed: None means signed when symmetric, unsigned otherwise.
narrow_range: leave out the lowest integer ([-127, 127]).
granularity: PerTensor(), PerChannel(axis), PerGroup(size, axis), PerBlock(rows, columns) or PerToken(). None: per tensor, and for
    MX, NVFP4 and NF4 groups of 32, 16 and 64.
format: Integer(), Minifloat(...), MX(...), NVFP4(), NF4(...), Codebook(...), Binary(), Ternary(...).
dynamic: the scale is taken from the very tensor that is rounded. None: where the format or PerToken wants it.
power_of_two: scales are powers of two, rounded up. Integers (symmetric) and minifloats.
rounding: "nearest_even" or "stochastic" (integers and minifloats), with `seed`.
straight_through: "clipped": no gradient where the value was clamped; "pass": the gradient passes everywhere.
noise: Noise(share, uniform), what training does in place of rounding every value; convert leaves it out.

Raises ValueError, with the rule and the value, for a combination that does not exist.)")
      .def(py::init(&make_scheme), py::arg("bits") = py::none(), py::arg("symmetric") = true,
           py::arg("signed") = py::none(), py::arg("narrow_range") = false, py::arg("granularity") = py::none(),
           py::arg("format") = Format(Integer{}), py::arg("dynamic") = py::none(), py::arg("power_of_two") = false,
           py::arg("rounding") = "nearest_even", py::arg("seed") = 0, py::arg("straight_through") = "clipped",
           py::arg("noise") = py::none())
      .def_readonly("bits", &Scheme::bits)
      .def_readonly("symmetric", &Scheme::symmetric)
      .def_property_readonly("signed", &Scheme::signed_range)
      .def_readonly("narrow_range", &Scheme::narrow_range)
      .def_readonly("granularity", &Scheme::granularity)
      .def_readonly("format", &Scheme::format)
      .def_readonly("dynamic", &Scheme::dynamic)
      .def_readonly("power_of_two", &Scheme::power_of_two)
      .def_property_readonly("rounding", &rounding_of)
      .def_readonly("seed", &Scheme::seed)
      .def_property_readonly("straight_through", &straight_through_of)
      .def_readonly("noise", &Scheme::noise)
      .def_property_readonly("qmin", &Scheme::qmin, "Smallest integer. Raises ValueError for formats without integers.")
      .def_property_readonly("qmax", &Scheme::qmax, "Largest integer. Raises ValueError for formats without integers.")
      .def_property_readonly(
          "observed_range", &Scheme::observed_range,
          "The integers that an observer chooses its parameters for; (-1, 1) for formats without any.")
      .def_property_readonly("is_plain", &Scheme::is_plain,
                             "Whether it is a grid of integers with one observed scale for the tensor or each channel.")
      .def_property_readonly("needs_range", &Scheme::needs_range, "Whether a range has to be observed beforehand.")
      .def_property_readonly("axis", &Scheme::axis, "The channel axis, None unless PerChannel.")
      .def_property_readonly("block", &Scheme::block, "Sizes of what shares a scale, as torch.ops.rarefy takes them.")
      .def_property_readonly("block_axis", &Scheme::block_axis, "The axis that goes with block, None per tensor.")
      .def(
          "scale_shape", [](const Scheme& self, const std::vector<int64_t>& shape) { return self.scale_shape(shape); },
          py::arg("shape"), "The shape of the scales of a tensor.")
      .def(
          "with_granularity",
          [](Scheme self, const Granularity& granularity) {
            self.granularity = granularity;
            self.validate();
            return self;
          },
          py::arg("granularity"), "The same with other values sharing a scale. Raises ValueError as the constructor.")
      .def(
          "with_noise",
          [](Scheme self, const std::optional<Noise>& noise) {
            self.noise = noise;
            self.validate();
            return self;
          },
          py::arg("noise"), "The same with other noise, or None. Raises ValueError as the constructor.")
      .def("why_not_integer", &Scheme::why_not_integer, "Why no integer kernel computes with it, or None.")
      .def("to_json", &Scheme::to_json, "One line of JSON.")
      .def_static("from_json", &Scheme::from_json, py::arg("json"), "The scheme of to_json(). Raises ValueError.")
      .def_property_readonly(
          "dtype", &Scheme::dtype,
          "The type that stores the integers: torch.int8 or torch.uint8, torch.int16 or torch.uint16. Raises ValueError for "
          "formats without integers.")
      .def(py::self == py::self)
      .def("__hash__", [](const Scheme& self) { return py::hash(py::str(self.str())); })
      .def("__str__", &Scheme::str)
      .def("__repr__", &scheme_repr)
      .def(py::pickle([](const Scheme& self) { return py::make_tuple(self.to_json()); },
                      [](const py::tuple& state) { return Scheme::from_json(state[0].cast<std::string>()); }));
  m.def("learned_kind", &learned_kind, py::arg("observer"), "The name by which operators know a learned grid, or ''.");
  m.def("learned_names", &learned_names, py::arg("kind"), "The parameters of a learned grid.");
  m.def(
      "check_learned_scheme",
      [](const Observer& observer, const Scheme& scheme, bool is_weight) {
        check_learned_scheme("FakeQuantizer", observer, scheme, is_weight);
      },
      py::arg("observer"), py::arg("scheme"), py::arg("is_weight"),
      "Raises ValueError for a scheme that a learned grid cannot have.");
  m.def("why_not_observed", &why_not_observed, py::arg("scheme"), py::arg("observer"),
        "Why an observer cannot serve a scheme, or None.");
  init_packed(m);
}

}  // namespace rarefy::python
