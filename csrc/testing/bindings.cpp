// What tests and benchmarks need of the kernel tier and the operators do not: every instruction set
// by name, on raw buffers. Built with CAPSROUTE_BUILD_TESTING=1 only.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <thread>
#include <vector>

#include "../cpu/routing.h"

namespace py = pybind11;
using namespace capsroute;

namespace {

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (int64_t n = 0; const Kernels* table = kernels_at(n); ++n) names.push_back(table->name);
  return names;
}

const Parallel kThreads{4, [](int64_t parts, void (*body)(void*, int64_t), void* context) {
                          std::vector<std::thread> threads;
                          for (int64_t part = 0; part < parts; ++part) threads.emplace_back(body, context, part);
                          for (std::thread& thread : threads) thread.join();
                        }};

template <class A>
using Buffer = py::array_t<A, py::array::c_style | py::array::forcecast>;

template <class Out>
std::vector<char> scratch_for(Plan (*plan)(const Problem&, const Out&, int64_t), const Problem& p, const Out& out) {
  return std::vector<char>(plan(p, out, kThreads.threads).scratch + 64, char(0xff));  // all NaN
}

void* aligned(std::vector<char>& bytes) {
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(bytes.data()) + 63) / 64 * 64);
}

// v [B, J, O], du, dW [I, D, J, O] of capsule_linear for u [B, I, D] and weight [I, D, J, O].
template <class A>
py::tuple route(const std::string& name, Buffer<A> u, Buffer<A> weight, Buffer<A> grad_v, int64_t iterations) {
  const Kernels* kernels = kernels_named(name.c_str());
  if (!kernels) throw py::value_error("instruction set " + name + " is not to be had here");
  Problem p{};
  p.B = u.shape(0), p.I = u.shape(1), p.D = u.shape(2), p.J = weight.shape(2), p.O = weight.shape(3);
  p.R = iterations, p.form = Weight::pair, p.eps = 1e-9;
  p.u = {u.data(), sizeof(A) == 8 ? DType::float64 : DType::float32, {p.I * p.D, p.D, 1, 0}};
  p.weight = {weight.data(), p.u.dtype, {p.D * p.J * p.O, p.O, 1, p.J * p.O}};
  Buffer<A> v({p.B, p.J, p.O}), s({p.R, p.B, p.J, p.O}), du({p.B, p.I, p.D}), dweight({p.I, p.D, p.J, p.O});
  const Forward out{v.mutable_data(), s.mutable_data(), nullptr, nullptr, nullptr, p.R, nullptr, 0};
  std::vector<char> scratch = scratch_for(kernels->plan_forward, p, out);
  kernels->forward(p, out, aligned(scratch), kThreads);
  Backward back{};
  back.grad_v = {grad_v.data(), p.u.dtype, {p.J * p.O, p.O, 1, 0}};
  back.s = s.data(), back.u = du.mutable_data(), back.weight = dweight.mutable_data();
  scratch = scratch_for(kernels->plan_backward, p, back);
  kernels->backward(p, back, aligned(scratch), kThreads);
  return py::make_tuple(v, du, dweight);
}

}  // namespace

PYBIND11_MODULE(_kernel_tier, m) {
  m.doc() = "The CPU kernel tier on raw buffers, for tests and benchmarks.";
  m.def("instruction_sets", &instruction_sets, "The instruction sets that this build and this processor have.");
  m.def("route", &route<float>, py::arg("name"), py::arg("u").noconvert(), py::arg("weight"), py::arg("grad_v"),
        py::arg("iterations"));
  m.def("route", &route<double>, py::arg("name"), py::arg("u").noconvert(), py::arg("weight"), py::arg("grad_v"),
        py::arg("iterations"));
}
