// fastweights._C: what an op schema cannot carry. Tensors never pass here; they go through torch.ops.fastweights.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>

#include "core/cpu_level.h"
#include "core/probe.h"

namespace py = pybind11;

namespace fastweights::probe {
namespace {

using Floats = py::array_t<float, py::array::c_style>;

Function function_named(const std::string& name) {
  constexpr const char* names[] = {"exp", "log", "sigmoid", "softplus", "tanh"};
  for (int i = 0; i < 5; ++i) {
    if (name == names[i]) return static_cast<Function>(i);
  }
  throw py::value_error("vmath: expected exp, log, sigmoid, softplus or tanh, got '" + name + "'");
}

py::array vmath(const std::string& name, const py::array& x) {
  const bool f64 = py::isinstance<py::array_t<double>>(x);
  if (!f64 && !py::isinstance<py::array_t<float>>(x)) {
    throw py::type_error("vmath: expected x of dtype float32 or float64, got " + std::string(py::str(x.dtype())));
  }
  const py::array in = f64 ? py::array(py::array_t<double, py::array::c_style>(x)) : py::array(Floats(x));
  py::array out(in.dtype(), in.size());
  MathArgs args{function_named(name), f64 ? Element::f64 : Element::f32, in.data(), out.mutable_data(), in.size()};
  FW_KERNEL(math)(args, 0, 1);
  return out;
}

py::array convert_array(const std::string& half, const py::array& x) {
  if (half != "bfloat16" && half != "float16") {
    throw py::value_error("convert: expected bfloat16 or float16, got '" + half + "'");
  }
  const bool to_float = py::isinstance<py::array_t<uint16_t>>(x);
  if (!to_float && !py::isinstance<py::array_t<float>>(x)) {
    throw py::type_error("convert: expected x of dtype uint16 (bits) or float32, got " +
                         std::string(py::str(x.dtype())));
  }
  const py::array in = to_float ? py::array(py::array_t<uint16_t, py::array::c_style>(x)) : py::array(Floats(x));
  py::array out(to_float ? py::dtype::of<float>() : py::dtype::of<uint16_t>(), in.size());
  ConvertArgs args{half == "bfloat16" ? Element::bf16 : Element::f16, to_float, in.data(), out.mutable_data(),
                   in.size()};
  FW_KERNEL(convert)(args, 0, 1);
  return out;
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double peak_flops(bool bf16, int64_t rounds) {
  if (rounds < 1) throw py::value_error("peak_flops: expected rounds >= 1, got " + std::to_string(rounds));
  double flops = 0;
  float sink = 0;
  PeakArgs args{bf16, rounds, &flops, &sink};
  py::gil_scoped_release release;
  const auto start = std::chrono::steady_clock::now();
  FW_KERNEL(peak)(args, 0, 1);
  return flops / seconds_since(start);
}

constexpr std::align_val_t kCacheLine{64};

// Ones, as floats; as pairs of bfloat16 they are ordinary numbers too.
class AlignedFloats {
 public:
  explicit AlignedFloats(int64_t n)
      : data_(static_cast<float*>(::operator new(size_t(n) * sizeof(float), kCacheLine))) {
    std::fill_n(data_, n, 1.0f);
  }
  ~AlignedFloats() { ::operator delete(data_, kCacheLine); }
  AlignedFloats(const AlignedFloats&) = delete;
  AlignedFloats& operator=(const AlignedFloats&) = delete;
  float* get() const { return data_; }

 private:
  float* data_;
};

double gemm_flops(bool bf16, int64_t M, int64_t N, int64_t K, int64_t repeats) {
  if (M < 1 || N < 1 || K < 1 || repeats < 1 || N % 16 != 0 || (bf16 && K % 2 != 0) || M > 4096 || N > 4096 ||
      K > 4096) {
    throw py::value_error("gemm_flops: expected 1 <= M, N, K <= 4096, N a multiple of 16, K even for bf16");
  }
  // As the kernels' own scratch memory is: aligned to cache lines.
  const AlignedFloats a(M * K), b(K * N), c(M * N);
  GemmArgs args{bf16, M, N, K, repeats, a.get(), b.get(), c.get()};
  py::gil_scoped_release release;
  const auto start = std::chrono::steady_clock::now();
  FW_KERNEL(gemm_tile)(args, 0, 1);
  return 2.0 * double(M * N * K) * double(repeats) / seconds_since(start);
}

// C = A B by the register tile, for the tests of core/gemm.h.
Floats gemm_product(const Floats& a, const Floats& b) {
  if (a.ndim() != 2 || b.ndim() != 2 || a.shape(1) != b.shape(0) || b.shape(1) % 16 != 0) {
    throw py::value_error("gemm: expected a [M, K] and b [K, N] with N a multiple of 16");
  }
  Floats c({a.shape(0), b.shape(1)});
  GemmArgs args{false, a.shape(0), b.shape(1), a.shape(1), 1, a.data(), b.data(), c.mutable_data()};
  FW_KERNEL(gemm_tile)(args, 0, 1);
  return c;
}

Floats gemm_bf16_product(const py::array_t<uint32_t, py::array::c_style>& a,
                         const py::array_t<uint32_t, py::array::c_style>& b) {
  if (a.ndim() != 2 || b.ndim() != 2 || a.shape(1) != b.shape(0) || b.shape(1) % 16 != 0) {
    throw py::value_error("gemm_bf16: expected pairs a [M, K/2] and b [K/2, N] with N a multiple of 16");
  }
  Floats c({a.shape(0), b.shape(1)});
  GemmArgs args{true, a.shape(0), b.shape(1), 2 * a.shape(1), 1, a.data(), b.data(), c.mutable_data()};
  FW_KERNEL(gemm_tile)(args, 0, 1);
  return c;
}

double stream_seconds(const std::string& kind, Floats& x, Floats& y, int64_t begin, int64_t end) {
  if (kind != "read" && kind != "copy" && kind != "update") {
    throw py::value_error("stream_seconds: expected read, copy or update, got '" + kind + "'");
  }
  if (begin < 0 || end < begin || end > x.size() || (kind == "copy" && end > y.size())) {
    throw py::value_error("stream_seconds: expected 0 <= begin <= end <= the length of x (and y)");
  }
  const Stream stream_kind = kind == "read" ? Stream::read : kind == "copy" ? Stream::copy : Stream::update;
  float sink = 0;
  StreamArgs args{stream_kind, x.mutable_data(), y.mutable_data(), x.size(), &sink};
  py::gil_scoped_release release;
  const auto start = std::chrono::steady_clock::now();
  FW_KERNEL(stream)(args, begin, end);
  return seconds_since(start);
}

py::dict build_facts() {
  py::dict facts;
  facts["compiler"] = FW_COMPILER;
  facts["build_type"] = FW_BUILD_TYPE;
  facts["torch"] = FW_TORCH_VERSION;
  py::list levels;
  for (const char* name : kCpuLevelNames) levels.append(name);
  facts["cpu_levels"] = levels;
  return facts;
}

}  // namespace
}  // namespace fastweights::probe

PYBIND11_MODULE(_C, m) {
  using namespace fastweights;
  m.doc() = "CPU level, build facts and measurements of fastweights. The ops are in torch.ops.fastweights.";
  if (const char* forced = std::getenv("FASTWEIGHTS_CPU_LEVEL"); forced && *forced) set_cpu_level(forced);
  m.def("cpu_level", [] { return kCpuLevelNames[static_cast<int>(cpu_level())]; });
  m.def("best_cpu_level", [] { return kCpuLevelNames[static_cast<int>(best_cpu_level())]; });
  m.def("set_cpu_level", [](const std::string& name) { set_cpu_level(name.c_str()); }, py::arg("name"));
  m.def("build_facts", &probe::build_facts);
  m.def("vmath", &probe::vmath, py::arg("function"), py::arg("x"));
  m.def("convert", &probe::convert_array, py::arg("half"), py::arg("x"));
  m.def("peak_flops", &probe::peak_flops, py::arg("bf16") = false, py::arg("rounds") = 20'000'000);
  m.def("gemm_flops", &probe::gemm_flops, py::arg("bf16") = false, py::arg("M") = 128, py::arg("N") = 128,
        py::arg("K") = 128, py::arg("repeats") = 200);
  m.def("gemm", &probe::gemm_product, py::arg("a"), py::arg("b"));
  m.def("gemm_bf16", &probe::gemm_bf16_product, py::arg("a"), py::arg("b"));
  m.def("stream_seconds", &probe::stream_seconds, py::arg("kind"), py::arg("x"), py::arg("y"), py::arg("begin"),
        py::arg("end"));
}
