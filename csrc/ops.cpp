// The op layer: reads tensors, allocates outputs and scratch, calls the kernel tier. Built on the
// LibTorch stable ABI alone, so that one library serves every later torch. Arguments were checked in
// Python; what is checked here is what a wrong direct call to the private ops could crash on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdlib>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/routing.h"

namespace {

using capsroute::Array;
using capsroute::DType;
using capsroute::Problem;
using capsroute::Weight;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::Double: return DType::float64;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Half: return DType::float16;
    default: STD_TORCH_CHECK(false, "capsroute: unsupported dtype"); return DType::float32;
  }
}

ScalarType accumulation_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Strides of the last dimensions of x, from place `at` on; 0 where x has size 1 and so broadcasts.
Array array_of(const Tensor& x, int at = 0) {
  Array array;
  array.data = x.const_data_ptr();
  const auto sizes = x.sizes(), strides = x.strides();
  for (int64_t d = 0; d < x.dim(); ++d) array.stride[at + d] = sizes[d] == 1 ? 0 : strides[d];
  return array;
}

Array float_array(const Tensor& x, int at = 0) {
  Array array = array_of(x, at);
  array.dtype = dtype_of(x);
  return array;
}

Problem problem_of(const Tensor& u, const Optional& weight, const Optional& bias, const Optional& logits,
                   const Optional& mask, int64_t iterations, bool leaky, double eps) {
  STD_TORCH_CHECK(u.dim() == (weight ? 3 : 4), "capsroute: u must be [B, I, D], or the votes [B, I, J, O]");
  STD_TORCH_CHECK(iterations >= 1, "capsroute: iterations must be at least 1");
  Problem p{};
  p.B = u.size(0), p.I = u.size(1), p.R = iterations, p.leaky = leaky, p.eps = eps;
  p.u = float_array(u);
  if (weight) {
    const int64_t dims = weight->dim();
    STD_TORCH_CHECK(dims >= 2 && dims <= 4, "capsroute: weight must be [I, J, O, D], [J, O, D] or [O, D]");
    STD_TORCH_CHECK(weight->scalar_type() == u.scalar_type() && weight->size(dims - 1) == u.size(2) &&
                        (dims < 4 || weight->size(0) == p.I),
                    "capsroute: weight must fit u");
    p.form = dims == 4 ? Weight::pair : dims == 3 ? Weight::output : Weight::single;
    p.weight = float_array(*weight, int(4 - dims));
    p.D = u.size(2), p.O = weight->size(dims - 2);
    STD_TORCH_CHECK(dims > 2 || logits || bias, "capsroute: weight [O, D] needs logits or a bias to know J");
    p.J = dims > 2 ? weight->size(dims - 3) : logits ? logits->size(2) : bias->size(0);
  } else {
    p.form = Weight::none;
    p.J = u.size(2), p.O = u.size(3);
  }
  STD_TORCH_CHECK(p.J >= 1 && p.O >= 1 && (!weight || p.D >= 1), "capsroute: D, J and O must be at least 1");
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 2 && bias->size(0) == p.J && bias->size(1) == p.O, "capsroute: bias must be [J, O]");
    p.bias = float_array(*bias);
  }
  auto broadcasts = [](int64_t have, int64_t want) { return have == want || have == 1; };
  if (logits) {
    STD_TORCH_CHECK(logits->dim() == 3 && broadcasts(logits->size(0), p.B) && broadcasts(logits->size(1), p.I) &&
                        logits->size(2) == p.J,
                    "capsroute: logits must be [B or 1, I or 1, J]");
    p.logits = float_array(*logits);
  }
  if (mask) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->dim() == 2 && broadcasts(mask->size(0), p.B) &&
                        broadcasts(mask->size(1), p.I),
                    "capsroute: mask must be a bool [B or 1, I or 1]");
    p.mask = array_of(*mask);
  }
  for (const Array* parameter : {&p.bias, &p.logits})
    STD_TORCH_CHECK(!parameter->data || parameter->dtype == p.u.dtype || parameter->dtype == DType::float32,
                    "capsroute: bias and logits must have the dtype of u or float32");
  return p;
}

Tensor empty(const std::vector<int64_t>& shape, ScalarType dtype) {
  return torch::stable::empty({shape.data(), shape.size()}, dtype);
}

capsroute::Parallel torch_threads() {
  return {int64_t(torch::stable::get_num_threads()), [](int64_t parts, void (*body)(void*, int64_t), void* context) {
            torch::stable::parallel_for(0, parts, 1, [body, context](int64_t begin, int64_t end) {
              for (int64_t part = begin; part < end; ++part) body(context, part);
            });
          }};
}

// Scratch is kept by the calling thread for its next call: fresh memory would cost a page fault for
// every 4 KiB. More than kKeptScratch is given back at once.
constexpr int64_t kAlignment = 64, kKeptScratch = int64_t(48) << 20;

struct Scratch {
  void* start = nullptr;
  int64_t bytes = 0;

  void* reserve(int64_t wanted) {
    if (wanted > bytes) {
      release();
      bytes = (wanted + kAlignment - 1) / kAlignment * kAlignment;
      start = std::aligned_alloc(kAlignment, bytes);
      STD_TORCH_CHECK(start, "capsroute: no memory for ", bytes, " bytes of scratch");
    }
    return start;
  }
  void release() {
    std::free(start);
    start = nullptr, bytes = 0;
  }
  ~Scratch() { release(); }
};

thread_local Scratch scratch;

template <class Out>
void launch(const Problem& p, const Out& out, int64_t (*measure)(const Problem&, const Out&, int64_t),
            void (*run)(const Problem&, const Out&, void*, const capsroute::Parallel&)) {
  const capsroute::Parallel parallel = torch_threads();
  run(p, out, scratch.reserve(measure(p, out, parallel.threads)), parallel);
  if (scratch.bytes > kKeptScratch) scratch.release();
}

std::tuple<Tensor, Tensor, Tensor> route(const Tensor& u, const Optional& weight, const Optional& bias,
                                         const Optional& logits, const Optional& mask, int64_t iterations, bool leaky,
                                         double eps, bool save, bool return_coupling) {
  const Problem p = problem_of(u, weight, bias, logits, mask, iterations, leaky, eps);
  const ScalarType dtype = u.scalar_type();
  Tensor v = empty({p.B, p.J, p.O}, dtype);
  Tensor s = save ? empty({p.R, p.B, p.J, p.O}, accumulation_type(u)) : empty({0}, accumulation_type(u));
  Tensor coupling = return_coupling ? empty({p.B, p.I, p.J}, dtype) : empty({0}, dtype);
  const capsroute::Forward out{v.mutable_data_ptr(), save ? s.mutable_data_ptr() : nullptr,
                               return_coupling ? coupling.mutable_data_ptr() : nullptr};
  if (p.B > 0) launch(p, out, capsroute::kernels().forward_scratch, capsroute::kernels().forward);
  return {v, s, coupling};
}

std::vector<int64_t> shape_of(const Optional& x) {
  if (!x) return {};
  return {x->sizes().begin(), x->sizes().end()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> route_backward(const Tensor& grad_v, const Tensor& s, const Tensor& u,
                                                          const Optional& weight, const Optional& bias,
                                                          const Optional& logits, const Optional& mask,
                                                          int64_t iterations, bool leaky, double eps,
                                                          bool detach_coupling, bool need_u, bool need_weight,
                                                          bool need_bias, bool need_logits) {
  const Problem p = problem_of(u, weight, bias, logits, mask, iterations, leaky, eps);
  STD_TORCH_CHECK(s.scalar_type() == accumulation_type(u) && s.numel() == p.R * p.B * p.J * p.O && s.is_contiguous(),
                  "capsroute: s must be what route saved");
  STD_TORCH_CHECK(grad_v.scalar_type() == u.scalar_type() && grad_v.dim() == 3 && grad_v.size(0) == p.B &&
                      grad_v.size(1) == p.J && grad_v.size(2) == p.O,
                  "capsroute: grad_v must be like v");
  need_logits = need_logits && !detach_coupling;
  const ScalarType dtype = u.scalar_type();
  auto output = [&](bool need, const Optional& like, const std::vector<int64_t>& shape) {
    return need && like ? empty(shape, like->scalar_type()) : empty({0}, dtype);
  };
  const std::vector<int64_t> weight_shape =
      p.form == Weight::pair ? std::vector<int64_t>{p.I, p.D, p.J, p.O} : shape_of(weight);
  Tensor du = output(need_u, u, shape_of(u)), dweight = output(need_weight, weight, weight_shape),
         dbias = output(need_bias, bias, {p.J, p.O}), dlogits = output(need_logits, logits, shape_of(logits));
  auto pointer = [](const Tensor& x) { return x.numel() ? x.mutable_data_ptr() : nullptr; };
  const capsroute::Backward out{float_array(grad_v),
                                s.const_data_ptr(),
                                detach_coupling,
                                logits ? logits->size(0) : 0,
                                logits ? logits->size(1) : 0,
                                pointer(du),
                                pointer(dweight),
                                pointer(dbias),
                                pointer(dlogits)};
  if (p.B > 0) {
    launch(p, out, capsroute::kernels().backward_scratch, capsroute::kernels().backward);
  } else {  // a sum over no samples
    for (Tensor* x : {&dweight, &dbias, &dlogits}) torch::stable::zero_(*x);
  }
  return {du, dweight, dbias, dlogits};
}

std::string cpu_capability() { return capsroute::kernels().name; }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(capsroute, CPU, m) {
  m.impl("route", TORCH_BOX(&route));
  m.impl("route_backward", TORCH_BOX(&route_backward));
}

STABLE_TORCH_LIBRARY_IMPL(capsroute, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
}
