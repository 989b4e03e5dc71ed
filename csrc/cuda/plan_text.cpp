// SPDX-License-Identifier: BSD-3-Clause
// What a plan says of itself.
#include <algorithm>
#include <sstream>

#include "plan_parts.h"

namespace segpose::cuda {
namespace {

const char* pass_word(Pass pass) { return pass == Pass::fprop ? "fprop" : pass == Pass::dgrad ? "dgrad" : "wgrad"; }

const char* short_name(const Plan& plan) {
  switch (plan.request.dtype) {
    case DType::float32:
      return plan.tf32() ? "tf32" : "f32";
    case DType::float64:
      return "f64";
    case DType::bfloat16:
      return "bf16";
    case DType::float16:
      return "f16";
  }
  return "";
}

}  // namespace

const char* algorithm_name(Algorithm algorithm) {
  switch (algorithm) {
    case Algorithm::depthwise:
      return "depthwise";
    case Algorithm::direct:
      return "direct";
    case Algorithm::mma:
      return "mma";
    case Algorithm::fma:
      return "fma";
  }
  return "unknown";
}

double Plan::waves() const {
  return as_double(blocks * splits) / as_double(int64_t{request.gpu.multiprocessors} * std::max(blocks_per_sm, 1));
}

std::vector<std::string> Plan::kernels() const {
  std::vector<std::string> names;
  const std::string dtype = short_name(*this);
  const std::string storage = dtype == "tf32" ? "f32" : dtype;
  const bool wgrad = request.pass == Pass::wgrad;
  const auto rows = [&](const Layout& layout, int64_t channels) {
    const bool vector = layout.rows && layout.aligned && channels % per_chunk(request.dtype) == 0;
    names.push_back((vector ? "rows_vector_" : "rows_any_") + storage);
  };
  if (copy_source)
    rows(request.source, request.pass == Pass::fprop ? request.problem.c_per_group() : request.problem.k_per_group());
  if (copy_activation) rows(request.activation, request.problem.c_per_group());
  if (pack_filter) names.push_back("pack_filter_" + dtype);
  std::string name = wgrad ? "wgrad" : "gather";
  const std::string tile_name = std::to_string(block_m) + "x" + std::to_string(block_n);
  switch (algorithm) {
    case Algorithm::depthwise:
      name = wgrad ? "depthwise_wgrad_" + dtype : "depthwise_" + dtype + (narrow ? "" : "_vector");
      break;
    case Algorithm::direct:
      name = "direct_" + dtype + "_" + std::to_string(block_n) + (narrow ? "" : "_vector");
      break;
    case Algorithm::mma:
      name += "_mma_" + dtype + "_" + tile_name + (narrow ? "_narrow" : "");
      break;
    case Algorithm::fma:
      name += "_fma_" + dtype + "_" + tile_name;
      break;
  }
  names.push_back(name);
  if (wgrad) {
    names.push_back("finish_wgrad_" + storage);
  } else if (splits > 1) {
    names.push_back("finish_gather_" + storage);
  }
  return names;
}

std::string Plan::str() const {
  std::ostringstream out;
  const std::string name = kernels()[static_cast<size_t>(pack_filter) + copy_source + copy_activation];
  out << pass_word(request.pass) << ' ' << algorithm_name(algorithm) << ' ' << dtype_name(request.dtype) << " sm_"
      << request.gpu.capability << ' ' << name << " phases=" << phases.size();
  if (shuffle) out << " shuffle";
  out << " blocks=" << blocks;
  if (splits > 1) out << " splits=" << splits;
  out << " blocks_per_sm=" << blocks_per_sm << " waves=" << waves();
  if (copy_source || copy_activation)
    out << " copied=" << (copy_source ? "source" : "") << (copy_source && copy_activation ? "+" : "")
        << (copy_activation ? "activation" : "");
  out << " gflop=" << flops * 1e-9 << " issued=" << (flops > 0 ? issued_flops / flops : 0.0)
      << "x mbytes=" << bytes * 1e-6 << " moved=" << (bytes > 0 ? moved_bytes / bytes : 0.0) << 'x';
  return out.str();
}

}  // namespace segpose::cuda
