#include <pybind11/stl/filesystem.h>
#include <rarefy/quantization/observer.h>
#include <rarefy/quantization/statistics.h>

#include "bindings.h"

namespace rarefy::python {
namespace {

using namespace rarefy::quantization;

/// What every kind has: comparison, hash and text by its fields.
template <typename Kind>
py::class_<Kind> observer_class(py::module_& m, const char* name, const char* doc) {
  return py::class_<Kind>(m, name, doc)
      .def(py::self == py::self)
      .def("__hash__", [](const Kind& self) { return py::hash(py::str(str(Observer(self)))); })
      .def("__repr__", [](const Kind& self) { return str(Observer(self)); });
}

template <typename Kind>
Kind checked(Kind kind) {
  validate(Observer(kind));
  return kind;
}

template <typename Kind>
void define_plain(py::module_& m, const char* name, const char* doc) {
  observer_class<Kind>(m, name, doc)
      .def(py::init<>())
      .def(py::pickle([](const Kind&) { return py::tuple(); }, [](const py::tuple&) { return Kind{}; }));
}

std::optional<std::string> search_name(RangeSearch search) {
  return search == RangeSearch::none  ? std::nullopt
         : search == RangeSearch::mse ? std::optional<std::string>("mse")
                                      : std::optional<std::string>("kl");
}

Histogram make_histogram(int64_t bins, const std::optional<std::string>& search, double norm) {
  if (search.has_value() && *search != "mse" && *search != "kl") {
    throw py::value_error("[Histogram] search must be 'mse', 'kl' or None, got '" + *search + "'");
  }
  const auto kind = !search.has_value() ? RangeSearch::none : *search == "mse" ? RangeSearch::mse : RangeSearch::kl;
  return checked(Histogram{bins, kind, norm});
}

template <typename Kind>
void define_scaled(py::module_& m, const char* name, const char* doc) {
  observer_class<Kind>(m, name, doc)
      .def(py::init([](std::optional<double> gradient_scale) { return checked(Kind{gradient_scale}); }),
           py::arg("gradient_scale") = py::none())
      .def_readonly("gradient_scale", &Kind::gradient_scale)
      .def(py::pickle([](const Kind& self) { return py::make_tuple(self.gradient_scale); },
                      [](const py::tuple& state) { return Kind{state[0].cast<std::optional<double>>()}; }));
}

void define_learned(py::module_& m) {
  define_scaled<LSQ>(m, "LSQ", R"(Learned step size (Esser et al., 2020, arXiv:1902.08153): the scale is a parameter.

For weights and activations. Begins at 2 * mean|x| / sqrt(levels) where the grid is symmetric, at the range of least error
elsewhere.

gradient_scale: what the scale's gradient is multiplied with. None: 1 / sqrt(n * levels), n being the number of elements of a
    channel of a weight (of the weight, per tensor), or of one sample of an activation, and levels the integers above 0.)");
  define_scaled<LSQPlus>(m, "LSQPlus", R"(Learned step size and offset (Bhalgat et al., 2020, arXiv:2004.09576).

For asymmetric activations. The offset is rounded to the grid, so that 0 is on it and integer kernels run.

gradient_scale: of both parameters, as in LSQ.)");
  define_plain<PACT>(m, "PACT", R"(Learned clipping of activations (Choi et al., 2018, arXiv:1805.06085).

For asymmetric unsigned activations that are not negative: those after a ReLU.)");
  define_plain<TQT>(m, "TQT",
                    R"(Learned thresholds and scales that are powers of two (Jain et al., 2019, arXiv:1903.08066).

For weights and activations.)");
  observer_class<LearnedBits>(m, "LearnedBits", R"(Learned bit width and range (Uhlich et al., 2020, arXiv:1905.11452).

For symmetric weights and activations, and for asymmetric unsigned activations that are not negative. The scheme's width is the
greatest, and where training begins; the loss holds model_size_bits against it.

lowest: smallest width, 2 to 8.)")
      .def(py::init([](int64_t lowest) { return checked(LearnedBits{lowest}); }), py::arg("lowest") = 2)
      .def_readonly("lowest", &LearnedBits::lowest)
      .def(py::pickle([](const LearnedBits& self) { return py::make_tuple(self.lowest); },
                      [](const py::tuple& state) { return LearnedBits{state[0].cast<int64_t>()}; }));
}

}  // namespace

void init_observer(py::module_& parent) {
  auto m = parent.def_submodule("quantization", "Schemes and observers. rarefy.quantization is the public side.");

  define_plain<MinMax>(m, "MinMax", "Running minimum and maximum of everything seen.");
  define_plain<Latest>(m, "Latest", "The range of the latest tensor alone: what a weight wants.");

  observer_class<MovingAverage>(
      m, "MovingAverage", "Exponential moving average of the batches' ranges: min += constant * (batch_min - min).")
      .def(py::init([](double constant) { return checked(MovingAverage{constant}); }), py::arg("constant") = 0.01)
      .def_readonly("constant", &MovingAverage::constant)
      .def(py::pickle([](const MovingAverage& self) { return py::make_tuple(self.constant); },
                      [](const py::tuple& state) { return MovingAverage{state[0].cast<double>()}; }));

  observer_class<Histogram>(m, "Histogram", R"(A histogram of everything seen, and the range that a search finds in it.

bins: 16 to 65536. Their width is a power of two and grows with the range; no count is lost, and more than half are used.
search: "mse" for the least mean |x - x_hat|**norm, "kl" for the least divergence of the clipped histogram from the
    quantized one (TensorRT), None for the values seen.
norm: of "mse", in [1, 8].)")
      .def(py::init(&make_histogram), py::arg("bins") = 2048, py::arg("search") = "mse", py::arg("norm") = 2.0)
      .def_readonly("bins", &Histogram::bins)
      .def_property_readonly("search", [](const Histogram& self) { return search_name(self.search); })
      .def_readonly("norm", &Histogram::norm)
      .def(py::pickle(
          [](const Histogram& self) { return py::make_tuple(self.bins, search_name(self.search), self.norm); },
          [](const py::tuple& state) {
            return make_histogram(state[0].cast<int64_t>(), state[1].cast<std::optional<std::string>>(),
                                  state[2].cast<double>());
          }));

  observer_class<Percentile>(
      m, "Percentile",
      "The values at `percentile` and 100 - percentile percent of everything seen; of magnitudes for a symmetric range.")
      .def(py::init([](double percentile, int64_t bins) { return checked(Percentile{percentile, bins}); }),
           py::arg("percentile") = 99.99, py::arg("bins") = 2048)
      .def_readonly("percentile", &Percentile::percentile)
      .def_readonly("bins", &Percentile::bins)
      .def(py::pickle(
          [](const Percentile& self) { return py::make_tuple(self.percentile, self.bins); },
          [](const py::tuple& state) { return Percentile{state[0].cast<double>(), state[1].cast<int64_t>()}; }));

  observer_class<SQNR>(m, "SQNR", R"(The scale and offset of the greatest signal-to-noise ratio, from a histogram.

clip_weight: how many times the error of clamped values counts, at least 1 (AIMET takes 3).)")
      .def(py::init([](double clip_weight, int64_t bins) { return checked(SQNR{clip_weight, bins}); }),
           py::arg("clip_weight") = 1.0, py::arg("bins") = 2048)
      .def_readonly("clip_weight", &SQNR::clip_weight)
      .def_readonly("bins", &SQNR::bins)
      .def(py::pickle([](const SQNR& self) { return py::make_tuple(self.clip_weight, self.bins); },
                      [](const py::tuple& state) { return SQNR{state[0].cast<double>(), state[1].cast<int64_t>()}; }));

  observer_class<MeanNoOutliers>(m, "MeanNoOutliers", R"(The mean of the batches' ranges without outliers.

sigma: what is farther from the mean than so many standard deviations is left out; 3 where quantile is not set either.
quantile: what is beyond this quantile on either side is left out; in [0, 0.5).
batches: most ranges that are kept, an even number; of more batches every second, fourth, ... one counts.)")
      .def(py::init([](std::optional<double> sigma, std::optional<double> quantile, int64_t batches) {
             return checked(MeanNoOutliers{sigma, quantile, batches});
           }),
           py::arg("sigma") = py::none(), py::arg("quantile") = py::none(), py::arg("batches") = 1024)
      .def_readonly("sigma", &MeanNoOutliers::sigma)
      .def_readonly("quantile", &MeanNoOutliers::quantile)
      .def_readonly("batches", &MeanNoOutliers::batches)
      .def(
          py::pickle([](const MeanNoOutliers& self) { return py::make_tuple(self.sigma, self.quantile, self.batches); },
                     [](const py::tuple& state) {
                       return MeanNoOutliers{state[0].cast<std::optional<double>>(),
                                             state[1].cast<std::optional<double>>(), state[2].cast<int64_t>()};
                     }));

  observer_class<MSE>(m, "MSE",
                      R"(The range of a weight that gives it the least error, from a search on the weight itself.

norm: of the error |w - w_hat|**norm, in [1, 8].
steps: ranges of the first round of the search.
bins: rows of 16 * bins values and more are searched on a histogram; 0: never.)")
      .def(py::init([](double norm, int64_t steps, int64_t bins) { return checked(MSE{norm, steps, bins}); }),
           py::arg("norm") = 2.0, py::arg("steps") = 100, py::arg("bins") = 2048)
      .def_readonly("norm", &MSE::norm)
      .def_readonly("steps", &MSE::steps)
      .def_readonly("bins", &MSE::bins)
      .def(py::pickle([](const MSE& self) { return py::make_tuple(self.norm, self.steps, self.bins); },
                      [](const py::tuple& state) {
                        return MSE{state[0].cast<double>(), state[1].cast<int64_t>(), state[2].cast<int64_t>()};
                      }));

  observer_class<HalfQuadratic>(m, "HalfQuadratic",
                                R"(Scale and zero point of a weight, together, by half-quadratic splitting.

norm: of the error |w - w_hat|**norm, in (0, 1].
beta, kappa: weight of the split, and its growth per iteration.
iterations: at most so many.)")
      .def(py::init([](double norm, double beta, double kappa, int64_t iterations) {
             return checked(HalfQuadratic{norm, beta, kappa, iterations});
           }),
           py::arg("norm") = 0.7, py::arg("beta") = 10.0, py::arg("kappa") = 1.01, py::arg("iterations") = 20)
      .def_readonly("norm", &HalfQuadratic::norm)
      .def_readonly("beta", &HalfQuadratic::beta)
      .def_readonly("kappa", &HalfQuadratic::kappa)
      .def_readonly("iterations", &HalfQuadratic::iterations)
      .def(py::pickle(
          [](const HalfQuadratic& self) { return py::make_tuple(self.norm, self.beta, self.kappa, self.iterations); },
          [](const py::tuple& state) {
            return HalfQuadratic{state[0].cast<double>(), state[1].cast<double>(), state[2].cast<double>(),
                                 state[3].cast<int64_t>()};
          }));

  define_learned(m);

  m.def("averaging_constant", &averaging_constant, py::arg("observer"),
        "The averaging constant that torch.ops.rarefy.observe takes for an observer.");
  m.def("follows_latest", &follows_latest, py::arg("observer"),
        "Whether the range is that of the latest tensor alone, as a weight wants it.");
  m.def("histogram_bins", &histogram_bins, py::arg("observer"), "The bins of its histogram; None where it keeps none.");

  py::class_<QuantizerStatistics>(m, "QuantizerStatistics", "What a file of statistics holds of one quantizer.")
      .def(py::init([](std::string observer, std::string scheme, std::optional<int64_t> axis,
                       std::map<std::string, at::Tensor> tensors) {
             return QuantizerStatistics{std::move(observer), std::move(scheme), axis, std::move(tensors)};
           }),
           py::arg("observer"), py::arg("scheme"), py::arg("axis"), py::arg("tensors"))
      .def_readonly("observer", &QuantizerStatistics::observer, "How they were gathered.")
      .def_readonly("scheme", &QuantizerStatistics::scheme, "The grid that they were gathered for.")
      .def_readonly("axis", &QuantizerStatistics::axis)
      .def_readonly("tensors", &QuantizerStatistics::tensors);
  m.def("write_statistics", &write_statistics, py::arg("statistics"), py::arg("path"));
  m.def("read_statistics", &read_statistics, py::arg("path"));
  m.def("statistics_for", &statistics_for, py::arg("name"), py::arg("saved"), py::arg("observer"), py::arg("axis"),
        py::arg("rows"), "The buffers that a quantizer with an observer takes from a file's.");
}

}  // namespace rarefy::python
