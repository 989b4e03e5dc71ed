// SPDX-License-Identifier: BSD-3-Clause
#include "plan_bindings.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>

#include "plan.h"
#include "tiles.h"

namespace py = pybind11;

namespace segpose::cuda {
namespace {

Gpu parse_arch(const std::string& arch, std::optional<int> multiprocessors) {
  std::string digits;
  std::copy_if(arch.begin(), arch.end(), std::back_inserter(digits), [](unsigned char c) { return std::isdigit(c); });
  const int capability = digits.empty() || digits.size() > 4 ? 0 : std::stoi(digits);
  const Gpu* found = find_gpu(capability);
  if (found == nullptr) {
    throw std::invalid_argument("arch must be an architecture from sm_80 on, such as 'sm_90', got '" + arch + "'");
  }
  Gpu gpu = *found;
  gpu.capability = capability;
  if (multiprocessors.has_value()) {
    if (*multiprocessors < 1) {
      throw std::invalid_argument("multiprocessors must be positive, got " + std::to_string(*multiprocessors));
    }
    gpu.multiprocessors = *multiprocessors;
  }
  return gpu;
}

Pass parse_pass(const std::string& name) {
  if (name == "fprop") return Pass::fprop;
  if (name == "dgrad") return Pass::dgrad;
  if (name == "wgrad") return Pass::wgrad;
  throw std::invalid_argument("op must be fprop, dgrad or wgrad, got '" + name + "'");
}

DType parse_dtype(const std::string& name) {
  for (const DType dtype : {DType::float32, DType::float64, DType::bfloat16, DType::float16}) {
    if (name == dtype_name(dtype)) return dtype;
  }
  throw std::invalid_argument("dtype must be float32, float64, bfloat16 or float16, got '" + name + "'");
}

// A dense tensor of so many channels in torch's channels_last or contiguous format.
Layout dense_layout(int64_t channels, int64_t pixels, DType dtype, bool channels_last) {
  const int64_t chunk = kChunkBytes / dtype_size(dtype);
  Layout layout;
  layout.rows = channels_last || channels == 1 || pixels == 1;
  layout.aligned = layout.rows && channels % chunk == 0;
  return layout;
}

Plan plan(const ConvProblem& problem, const std::string& op, const std::string& dtype, const std::string& arch,
          bool tf32, bool channels_last, std::optional<int> multiprocessors) {
  PlanRequest request{};
  request.problem = problem;
  request.pass = parse_pass(op);
  request.dtype = parse_dtype(dtype);
  request.tf32 = tf32;
  request.gpu = parse_arch(arch, multiprocessors);
  const Layout x = dense_layout(problem.c, problem.h * problem.w, request.dtype, channels_last);
  const Layout y = dense_layout(problem.k, problem.p * problem.q, request.dtype, channels_last);
  request.source = request.pass == Pass::fprop ? x : y;
  request.destination = request.pass == Pass::fprop ? y : x;
  request.activation = x;
  request.filter_rows = channels_last || problem.taps() == 1;
  const std::string reason = unsupported(request);
  if (!reason.empty()) throw std::invalid_argument("the cuda backend cannot run this problem: " + reason);
  return plan_conv(request);
}

}  // namespace

void bind_plans(py::module_& module) {
  py::class_<Plan>(module, "CudaPlan", "How one pass of a problem runs on a GPU; figures are predictions.")
      .def_property_readonly("problem", [](const Plan& p) { return p.request.problem; })
      .def_property_readonly(
          "op",
          [](const Plan& p) {
            return p.request.pass == Pass::fprop ? "fprop" : p.request.pass == Pass::dgrad ? "dgrad" : "wgrad";
          })
      .def_property_readonly("algorithm", [](const Plan& p) { return algorithm_name(p.algorithm); })
      .def_property_readonly("dtype", [](const Plan& p) { return dtype_name(p.request.dtype); })
      .def_property_readonly("arch", [](const Plan& p) { return "sm_" + std::to_string(p.request.gpu.capability); })
      .def_property_readonly("multiprocessors", [](const Plan& p) { return p.request.gpu.multiprocessors; })
      .def_property_readonly("kernels", &Plan::kernels)
      .def_property_readonly("tile", [](const Plan& p) { return std::pair(p.block_m, p.block_n); })
      .def_readonly("block_k", &Plan::block_k)
      .def_readonly("stages", &Plan::stages)
      .def_readonly("threads", &Plan::threads)
      .def_readonly("shared_bytes", &Plan::shared_bytes)
      .def_readonly("blocks_per_sm", &Plan::blocks_per_sm)
      .def_readonly("phases", &Plan::phases)
      .def_readonly("shuffle", &Plan::shuffle)
      .def_readonly("narrow", &Plan::narrow)
      .def_readonly("copy_source", &Plan::copy_source)
      .def_readonly("copy_activation", &Plan::copy_activation)
      .def_readonly("pack_filter", &Plan::pack_filter)
      .def_readonly("blocks", &Plan::blocks)
      .def_readonly("splits", &Plan::splits)
      .def_readonly("k_per_split", &Plan::k_per_split)
      .def_property_readonly("waves", &Plan::waves)
      .def_property_readonly(
          "workspace_bytes",
          [](const Plan& p) { return p.filter_bytes + p.rows_bytes + p.activation_bytes + p.partial_bytes; })
      .def_readonly("flops", &Plan::flops)
      .def_readonly("issued_flops", &Plan::issued_flops)
      .def_readonly("bytes", &Plan::bytes)
      .def_readonly("moved_bytes", &Plan::moved_bytes)
      .def_readonly("cycles", &Plan::cycles)
      .def("__str__", &Plan::str);
  module.def("cuda_plan", &plan, py::arg("problem"), py::arg("op") = "fprop", py::arg("dtype") = "float16",
             py::arg("arch") = "sm_80", py::arg("tf32") = true, py::arg("channels_last") = true,
             py::arg("multiprocessors") = std::nullopt,
             "The plan of one pass (fprop, dgrad, wgrad) on an architecture, for dense tensors.");
  module.def("cuda_archs", [] {
    std::vector<std::string> names;
    for (const Gpu& gpu : known_gpus()) names.push_back("sm_" + std::to_string(gpu.capability));
    return names;
  });
}

}  // namespace segpose::cuda
