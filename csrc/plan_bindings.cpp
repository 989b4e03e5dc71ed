// SPDX-License-Identifier: BSD-3-Clause
// The pybind11 module `_plan`: problems, plans, phases and CPU features for tests, `info` and `explain`. No torch here.
#include "cuda/plan_bindings.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <map>
#include <optional>
#include <sstream>
#include <stdexcept>

#include "cpu/choices.h"
#include "cpu/plan.h"
#include "cpu/ukernels.h"

namespace py = pybind11;
using namespace segpose;

namespace {

using Pair = std::array<int64_t, 2>;
using Shape = std::array<int64_t, 4>;

ConvProblem make_problem(int64_t n, int64_t h, int64_t w, int64_t c, int64_t k, int64_t r, int64_t s, Pair stride,
                         Pair padding, Pair dilation, int64_t groups, std::optional<int64_t> p,
                         std::optional<int64_t> q) {
  ConvProblem problem{n, h,         w,         c,          0,          0,           k,           r,
                      s, stride[0], stride[1], padding[0], padding[1], dilation[0], dilation[1], groups};
  if (stride[0] < 1 || stride[1] < 1 || dilation[0] < 1 || dilation[1] < 1 || groups < 1 || c % groups || k % groups) {
    throw std::invalid_argument("ConvProblem: stride, dilation and groups must be positive and groups divide c and k");
  }
  problem.p = p.value_or(conv_extent(h, r, stride[0], padding[0], dilation[0]));
  problem.q = q.value_or(conv_extent(w, s, stride[1], padding[1], dilation[1]));
  return problem;
}

ConvProblem for_conv2d(Shape input, Shape weight, Pair stride, Pair padding, Pair dilation, int64_t groups) {
  return make_problem(input[0], input[2], input[3], input[1], weight[0], weight[2], weight[3], stride, padding,
                      dilation, groups, std::nullopt, std::nullopt);
}

ConvProblem for_conv_transpose2d(Shape input, Shape weight, Pair stride, Pair padding, Pair output_padding,
                                 int64_t groups, Pair dilation) {
  const int64_t h = conv_transpose_extent(input[2], weight[2], stride[0], padding[0], output_padding[0], dilation[0]);
  const int64_t w = conv_transpose_extent(input[3], weight[3], stride[1], padding[1], output_padding[1], dilation[1]);
  return make_problem(input[0], h, w, weight[1] * groups, weight[0], weight[2], weight[3], stride, padding, dilation,
                      groups, input[2], input[3]);
}

// Rows and columns of the widest microkernel that the plan uses.
std::pair<int64_t, int64_t> tile_of(const Plan& plan) {
  if (plan.algorithm == Algorithm::split) return {2 * kTileRows, 2 * kTileColumns};
  if (plan.packs_source() && plan.pass == Pass::wgrad) {
    const TransformUkernels& kernels = transform_ukernels(plan.isa);
    const ReduceTile& tile = plan.transform.parts == 2 ? kernels.reduce_complex : kernels.reduce_real;
    return {tile.mr, tile.vectors * kernels.vector_length};
  }
  if (plan.packs_source()) {
    return {plan.transform.terms > 0 ? 2 * kTileRows : kTransformRows, plan.transform.panel_columns};
  }
  if (plan.algorithm == Algorithm::rows && plan.pass != Pass::wgrad) {
    const Panel& panel = plan.panels.front();
    const auto tallest = [&](const auto& kernels) -> int64_t {
      const auto* tile = panel.dots ? kernels.dots.tiles : kernels.rows;
      while (tile->nr != panel.nr) ++tile;
      return tile->mr;
    };
    const bool wide = plan.dtype == DType::float64;
    return {wide ? tallest(ukernels<double>(plan.isa)) : tallest(ukernels<float>(plan.isa)), panel.nr};
  }
  if (plan.panels.empty()) return {0, 0};
  const Panel& panel = plan.panels.front();
  if (plan.algorithm == Algorithm::depthwise) return {kDepthwisePixels, ukernels<float>(plan.isa).vector_length};
  const auto rows = [&](const auto& table) -> int64_t {
    if (plan.pass != Pass::wgrad) return table.gemm[panel.tile].mr;
    for (int i = 0; i < table.wgrad_tiles; ++i) {
      if (table.wgrad[i].nr == panel.nr) return table.wgrad[i].mr;
    }
    return 0;
  };
  return {plan.dtype == DType::float64 ? rows(ukernels<double>(plan.isa)) : rows(ukernels<float>(plan.isa)), panel.nr};
}

std::string problem_str(const ConvProblem& problem) {
  std::ostringstream out;
  out << "ConvProblem(n=" << problem.n << ", h=" << problem.h << ", w=" << problem.w << ", c=" << problem.c
      << ", k=" << problem.k << ", r=" << problem.r << ", s=" << problem.s << ", stride=(" << problem.stride_h << ", "
      << problem.stride_w << "), padding=(" << problem.pad_h << ", " << problem.pad_w << "), dilation=("
      << problem.dilation_h << ", " << problem.dilation_w << "), groups=" << problem.groups << ", p=" << problem.p
      << ", q=" << problem.q << ")";
  return out.str();
}

}  // namespace

PYBIND11_MODULE(_plan, m) {
  m.doc() = "Host-only view of the kernels: problems, plans, phases and CPU features.";
  py::class_<ConvProblem>(m, "ConvProblem", "One convolution: x [N, H, W, C], w [K, R, S, C/groups], y [N, P, Q, K].")
      .def(py::init(&make_problem), py::arg("n"), py::arg("h"), py::arg("w"), py::arg("c"), py::arg("k"), py::arg("r"),
           py::arg("s"), py::arg("stride") = Pair{1, 1}, py::arg("padding") = Pair{0, 0},
           py::arg("dilation") = Pair{1, 1}, py::arg("groups") = 1, py::arg("p") = std::nullopt,
           py::arg("q") = std::nullopt)
      .def_static("for_conv2d", &for_conv2d, py::arg("input_shape"), py::arg("weight_shape"),
                  py::arg("stride") = Pair{1, 1}, py::arg("padding") = Pair{0, 0}, py::arg("dilation") = Pair{1, 1},
                  py::arg("groups") = 1)
      .def_static("for_conv_transpose2d", &for_conv_transpose2d, py::arg("input_shape"), py::arg("weight_shape"),
                  py::arg("stride") = Pair{1, 1}, py::arg("padding") = Pair{0, 0},
                  py::arg("output_padding") = Pair{0, 0}, py::arg("groups") = 1, py::arg("dilation") = Pair{1, 1})
      .def_readonly("n", &ConvProblem::n)
      .def_readonly("h", &ConvProblem::h)
      .def_readonly("w", &ConvProblem::w)
      .def_readonly("c", &ConvProblem::c)
      .def_readonly("p", &ConvProblem::p)
      .def_readonly("q", &ConvProblem::q)
      .def_readonly("k", &ConvProblem::k)
      .def_readonly("r", &ConvProblem::r)
      .def_readonly("s", &ConvProblem::s)
      .def_readonly("groups", &ConvProblem::groups)
      .def_property_readonly("flops", &ConvProblem::flops)
      .def_property_readonly("numbers", &numbers_of)
      .def("__repr__", &problem_str);
  py::class_<Phase>(m, "Phase", "Destination pixels that use the same taps.")
      .def_readonly("oh", &Phase::oh)
      .def_readonly("ow", &Phase::ow)
      .def_readonly("rows", &Phase::rows)
      .def_readonly("cols", &Phase::cols)
      .def_readonly("ostep_h", &Phase::ostep_h)
      .def_readonly("ostep_w", &Phase::ostep_w)
      .def_readonly("istep_h", &Phase::istep_h)
      .def_readonly("istep_w", &Phase::istep_w)
      .def_property_readonly("taps", [](const Phase& phase) {
        std::vector<Shape> taps;
        for (const Tap& tap : phase.taps) taps.push_back({tap.r, tap.s, tap.off_h, tap.off_w});
        return taps;
      });
  py::class_<Plan>(m, "Plan", "How one pass of a problem runs on the CPU.")
      .def_readonly("problem", &Plan::problem)
      .def_property_readonly("op", [](const Plan& plan) { return pass_name(plan.pass); })
      .def_property_readonly("algorithm", [](const Plan& plan) { return algorithm_name(plan.algorithm); })
      .def_property_readonly("isa", [](const Plan& plan) { return isa_name(plan.isa); })
      .def_property_readonly("dtype", [](const Plan& plan) { return dtype_name(plan.dtype); })
      .def_property_readonly("tile", &tile_of)
      .def_property_readonly("panels",
                             [](const Plan& plan) {
                               std::vector<std::array<int64_t, 3>> panels;
                               for (const Panel& panel : plan.panels) {
                                 panels.push_back({panel.column, panel.columns, panel.nr});
                               }
                               return panels;
                             })
      .def_readonly("phases", &Plan::phases)
      .def_readonly("block_m", &Plan::block_m)
      .def_readonly("k_chunk", &Plan::k_chunk)
      .def_readonly("splits", &Plan::splits)
      .def_readonly("cycles", &Plan::cycles)
      .def_readonly("flops", &Plan::flops)
      .def_readonly("bytes", &Plan::bytes)
      .def("__str__", &Plan::str);
  m.def(
      "plan",
      [](const ConvProblem& problem, const std::string& op, const std::string& dtype, std::optional<std::string> isa,
         const std::string& precision, const std::string& algorithm, bool prepared, int64_t threads) {
        return plan_conv(problem, parse_pass(op), parse_dtype(dtype), isa ? parse_isa(*isa) : selected_isa(),
                         {parse_precision(precision), parse_algorithm(algorithm), prepared, threads});
      },
      py::arg("problem"), py::arg("op") = "fprop", py::arg("dtype") = "float32", py::arg("isa") = std::nullopt,
      py::arg("precision") = "highest", py::arg("algorithm") = "", py::arg("prepared") = false, py::arg("threads") = 1,
      "The plan of one pass (fprop, dgrad, wgrad).");
  m.def("phases", &dgrad_phases, py::arg("problem"), "The dgrad phases of a problem, heaviest first.");
  cuda::bind_plans(m);
  m.def("cpu_features", [] {
    std::map<std::string, bool> features;
    for (const auto& [name, present] : cpu_features()) features[name] = present;
    return features;
  });
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const Isa isa : available_isas()) names.emplace_back(isa_name(isa));
    return names;
  });
  m.def("selected_isa", [] { return std::string(isa_name(selected_isa())); });
  m.def("compiler", [] {
#if defined(__clang__)
    return std::string("Clang ") + __clang_version__;
#else
    return std::string("GCC ") + __VERSION__;
#endif
  });
}
