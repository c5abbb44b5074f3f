// The op layer that every C++ tier shares: reads tensors, allocates outputs, calls the tier. Built on the LibTorch
// stable ABI alone, so that one library serves every later torch. Arguments were checked in Python; what is checked
// here is what a wrong direct call to the private ops could crash on.
//
// A tier is a class with
//   static Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype);
//   static void forward(const Problem&, const Forward&, const Tensor& u);
//   static void backward(const Problem&, const Backward&, const Tensor& u);
//   static bool writes(Order);  // whether its backward knows that order of dW
//   static auto pages_of(const Tensor& weight);  // Backward::ask_for_pages
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/routing.h"

namespace capsroute::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

inline DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::Double: return DType::float64;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Half: return DType::float16;
    default: STD_TORCH_CHECK(false, "capsroute: unsupported dtype"); return DType::float32;
  }
}

inline int64_t size_of(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

inline ScalarType accumulation_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Strides of the last dimensions of x, from place `at` on; 0 where x has size 1 and so broadcasts.
inline Array array_of(const Tensor& x, int at = 0) {
  Array array;
  array.data = x.const_data_ptr();  // null would say that there is none
  STD_TORCH_CHECK(array.data || x.numel() == 0, "capsroute: a tensor has no memory; its storage was resized to 0");
  const auto sizes = x.sizes(), strides = x.strides();
  for (int64_t d = 0; d < x.dim(); ++d) array.stride[at + d] = sizes[d] == 1 ? 0 : strides[d];
  return array;
}

inline Array float_array(const Tensor& x, int at = 0) {
  Array array = array_of(x, at);
  array.dtype = dtype_of(x);
  return array;
}

inline Array parameter_array(const Tensor& x, const Tensor& u) {
  STD_TORCH_CHECK(x.scalar_type() == u.scalar_type() || x.scalar_type() == ScalarType::Float,
                  "capsroute: bias and logits must have the dtype of u or float32");
  return float_array(x);
}

// u, weight, logits and mask, which every op has.
inline Problem stream_of(const Tensor& u, const Optional& weight, const Optional& outputs, const Optional& logits,
                         const Optional& mask, bool over_inputs, bool leaky) {
  STD_TORCH_CHECK(u.dim() == (weight ? 3 : 4), "capsroute: u must be [B, I, D], or the votes [B, I, J, O]");
  STD_TORCH_CHECK(!(leaky && over_inputs), "capsroute: leaky is for a softmax over j");
  Problem p{};
  p.B = u.size(0), p.I = u.size(1), p.R = 1, p.over_inputs = over_inputs, p.leaky = leaky;
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
    STD_TORCH_CHECK(dims > 2 || logits || outputs, "capsroute: weight [O, D] needs another tensor to know J");
    p.J = dims > 2 ? weight->size(dims - 3) : logits ? logits->size(2) : outputs->size(outputs->dim() - 2);
  } else {
    p.form = Weight::none;
    p.J = u.size(2), p.O = u.size(3);
  }
  STD_TORCH_CHECK(p.J >= 1 && p.O >= 1 && (!weight || p.D >= 1), "capsroute: D, J and O must be at least 1");
  // A tensor that is expanded may have any size; what is computed of sizes must not overflow.
  auto at_least_one = [](int64_t size) { return double(size > 0 ? size : 1); };
  STD_TORCH_CHECK(double(p.B) * at_least_one(p.I) * at_least_one(p.D) * double(p.J) * double(p.O) < double(1LL << 50),
                  "capsroute: B I D J O must be less than 2^50");
  auto broadcasts = [](int64_t have, int64_t want) { return have == want || have == 1; };
  if (logits) {
    STD_TORCH_CHECK(logits->dim() == 3 && broadcasts(logits->size(0), p.B) && broadcasts(logits->size(1), p.I) &&
                        logits->size(2) == p.J,
                    "capsroute: logits must be [B or 1, I or 1, J]");
    p.logits = parameter_array(*logits, u);
  }
  if (mask) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->dim() == 2 && broadcasts(mask->size(0), p.B) &&
                        broadcasts(mask->size(1), p.I),
                    "capsroute: mask must be a bool [B or 1, I or 1]");
    p.mask = array_of(*mask);
  }
  return p;
}

inline Problem route_of(const Tensor& u, const Optional& weight, const Optional& bias, const Optional& logits,
                        const Optional& mask, int64_t iterations, bool over_inputs, bool leaky, double eps) {
  STD_TORCH_CHECK(iterations >= 1 && iterations < int64_t(1) << 31, "capsroute: iterations must be from 1 to 2^31 - 1");
  Problem p = stream_of(u, weight, bias, logits, mask, over_inputs, leaky);
  p.R = iterations, p.eps = eps;
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 2 && bias->size(0) == p.J && bias->size(1) == p.O, "capsroute: bias must be [J, O]");
    p.bias = parameter_array(*bias, u);
  }
  return p;
}

inline bool is_outputs(const Tensor& x, const Problem& p, ScalarType dtype) {
  return x.scalar_type() == dtype && x.dim() == 3 && x.size(0) == p.B && x.size(1) == p.J && x.size(2) == p.O;
}

inline Problem pass_of(const Tensor& u, const Optional& weight, const Optional& query, const Optional& logits,
                       const Optional& mask, bool over_inputs, bool leaky) {
  Problem p = stream_of(u, weight, query, logits, mask, over_inputs, leaky);
  if (query) {
    STD_TORCH_CHECK(is_outputs(*query, p, accumulation_type(u)),
                    "capsroute: query must be [B, J, O] in the accumulation type");
    p.query = float_array(*query);
  }
  return p;
}

// That in which a weight of each pair lies, if dW may be written so.
inline std::optional<Order> order_of(const Problem& p) {
  constexpr std::pair<Order, const char*> orders[] = {{Order::IDJO, "IDJO"},
                                                      {Order::IJDO, "IJDO"},
                                                      {Order::JIDO, "JIDO"},
                                                      {Order::IJOD, "IJOD"},
                                                      {Order::JIOD, "JIOD"}};
  const std::string_view letters = "IJOD";
  const int64_t sizes[] = {p.I, p.J, p.O, p.D};
  for (const auto& [order, name] : orders) {
    bool same = true;
    int64_t stride = 1;
    for (int n = 3; n >= 0; --n) {
      const size_t d = letters.find(name[n]);
      same = same && (sizes[d] == 1 || p.weight.stride[d] == stride);
      stride *= sizes[d] > 0 ? sizes[d] : 1;
    }
    if (same) return order;
  }
  return std::nullopt;
}

inline void* pointer(const Tensor& x) { return x.numel() ? x.mutable_data_ptr() : nullptr; }

inline int64_t bytes(const Tensor& x) { return x.numel() * int64_t(x.element_size()); }

// Of a result for x; with `samples`, of one for each of them.
inline std::vector<int64_t> shape_of(const Optional& x, std::optional<int64_t> samples = std::nullopt) {
  if (!x) return {};
  std::vector<int64_t> shape{x->sizes().begin(), x->sizes().end()};
  if (samples) shape.insert(shape.begin(), *samples);
  return shape;
}

// What a forward returns beside its result; `saved` passes have a norm.
template <class Tier>
struct Extras {
  Tensor norm, coupling;

  Extras(const Problem& p, const Tensor& u, int64_t saved, bool return_coupling)
      : norm(saved && p.over_inputs ? Tier::empty(u, {2, saved, p.B, p.J}, accumulation_type(u))
                                    : Tier::empty(u, {0}, accumulation_type(u))),
        coupling(return_coupling ? Tier::empty(u, {p.B, p.I, p.J}, u.scalar_type())
                                 : Tier::empty(u, {0}, u.scalar_type())) {}
};

template <class Tier>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> route(const Tensor& u, const Optional& weight,
                                                                 const Optional& bias, const Optional& logits,
                                                                 const Optional& mask, int64_t iterations,
                                                                 bool over_inputs, bool leaky, double eps, int64_t save,
                                                                 int64_t room, bool return_coupling) {
  const Problem p = route_of(u, weight, bias, logits, mask, iterations, over_inputs, leaky, eps);
  STD_TORCH_CHECK(save >= 0 && save <= iterations, "capsroute: save must be from 0 to iterations");
  STD_TORCH_CHECK(room >= 0, "capsroute: room must be at least 0");
  auto accumulated = [&](bool wanted, const std::vector<int64_t>& shape) {
    return Tier::empty(u, wanted ? shape : std::vector<int64_t>{0}, accumulation_type(u));
  };
  Tensor v = Tier::empty(u, {p.B, p.J, p.O}, u.scalar_type());
  Tensor s = accumulated(save > 0, {save, p.B, p.J, p.O});
  Tensor last_logits = accumulated(save > 0 && save < iterations, {p.B, p.I, p.J});
  Tensor votes = accumulated(room > 0, {room});
  const Extras<Tier> extras(p, u, save, return_coupling);
  const Forward out{pointer(v),           pointer(s), pointer(extras.norm), pointer(extras.coupling),
                    pointer(last_logits), save,       pointer(votes),       bytes(votes)};
  if (p.B > 0) Tier::forward(p, out, u);
  return {v, s, extras.norm, last_logits, votes, extras.coupling};
}

template <class Tier>
std::tuple<Tensor, Tensor, Tensor> routing_pass(const Tensor& u, const Optional& weight, const Optional& query,
                                                const Optional& logits, const Optional& mask, bool over_inputs,
                                                bool leaky, bool save, bool return_coupling) {
  const Problem p = pass_of(u, weight, query, logits, mask, over_inputs, leaky);
  Tensor s = Tier::empty(u, {p.B, p.J, p.O}, accumulation_type(u));
  const Extras<Tier> extras(p, u, save, return_coupling);
  const Forward out{nullptr, pointer(s), pointer(extras.norm), pointer(extras.coupling), nullptr, 1, nullptr, 0};
  if (p.B > 0) Tier::forward(p, out, u);
  return {s, extras.norm, extras.coupling};
}

// The gradients that a backward returns: of u, the weight, the bias or query, and the logits. That of a weight or bias
// is a sum over the samples, or `per_sample` one for each.
template <class Tier>
struct Gradients {
  std::optional<int64_t> samples;  // of a weight's or bias's gradient
  std::optional<Order> order;  // the weight's own, if the tier writes that; else dW of each pair is made as I, D, J, O
  Tensor u, weight, third, logits;

  Gradients(const Problem& p, const Tensor& like_u, const Optional& like_weight, const Optional& like_third,
            const Optional& like_logits, bool per_sample, bool need_u, bool need_weight, bool need_third,
            bool need_logits)
      : samples(per_sample ? std::optional(p.B) : std::nullopt),
        order(p.form == Weight::pair ? order_of(p) : std::nullopt),
        u(output(need_u, like_u, shape_of(like_u), like_u)),
        weight(output(need_weight, like_weight, shape_of(like_weight, samples), like_u)),
        third(output(need_third, like_third,  // a query is each sample's own
                     shape_of(like_third, like_third && like_third->dim() == 3 ? std::nullopt : samples), like_u)),
        logits(output(need_logits, like_logits, shape_of(like_logits), like_u)) {
    STD_TORCH_CHECK(!per_sample || !logits.numel() || logits.size(0) == p.B,
                    "capsroute: gradients for each sample are of logits [B, I or 1, J]");
    if (order && !Tier::writes(*order)) order.reset();
  }

  // Runs the backward, which writes them, the third to the member that is given, and was told all else.
  void compute(const Problem& p, Backward out, void* Backward::* member, const Tensor& s, const Tensor& norm,
               const Tensor& like, const Optional& like_logits) {
    auto saved = [&](const Tensor& x, int64_t count) {
      return x.scalar_type() == accumulation_type(like) && x.numel() == count && x.is_contiguous();
    };
    const double numbers = double(p.R) * double(p.B) * double(p.J) * double(p.O);
    STD_TORCH_CHECK(numbers < double(1LL << 50) && saved(s, p.R * p.B * p.J * p.O) &&
                        (!p.over_inputs || saved(norm, 2 * p.R * p.B * p.J)),
                    "capsroute: s and norm must be what the forward saved");
    if (p.B == 0) {  // sums over no samples
      for (Tensor* x : {&weight, &third, &logits}) torch::stable::zero_(*x);
      return;
    }
    out.s = s.const_data_ptr(), out.norm = norm.const_data_ptr();
    if (like_logits) out.logits_B = like_logits->size(0), out.logits_I = like_logits->size(1);
    out.u = pointer(u), out.weight = pointer(weight), out.logits = pointer(logits);
    out.order = order.value_or(Order::IDJO);
    out.*member = pointer(third);
    if (p.form == Weight::pair) out.ask_for_pages = Tier::pages_of(weight);
    if (!samples) return Tier::backward(p, out, like);
    for (int64_t b = 0; b < p.B; ++b) compute_sample(b, p, out, member, s, norm, like);
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor> all(const Problem& p, const Optional& like_weight) const {
    const bool of_pairs = p.form == Weight::pair && weight.dim() >= 4;
    return {u, of_pairs ? in_order_of(*like_weight, p) : weight, third, logits};
  }

 private:
  // The same for one sample, a batch of its own.
  void compute_sample(int64_t b, Problem p, Backward out, void* Backward::* member, Tensor s, Tensor norm,
                      const Tensor& like) {
    auto move = [b](Array& x, int64_t size) {
      if (x.data) x.data = static_cast<const char*>(x.data) + b * x.stride[0] * size;
    };
    move(p.mask, 1);
    for (Array* x : {&p.u, &p.logits, &p.query, &out.grad_v, &out.grad_s}) move(*x, size_of(x->dtype));
    auto part = [b, B = p.B](void* start, const Tensor& x) -> void* {
      return start ? static_cast<char*>(start) + b * (bytes(x) / B) : nullptr;
    };
    out.u = part(out.u, u), out.weight = part(out.weight, weight), out.logits = part(out.logits, logits);
    out.*member = part(out.*member, third);
    s = torch::stable::contiguous(torch::stable::narrow(s, s.dim() - 3, b, 1)), out.s = s.const_data_ptr();
    if (p.over_inputs)
      norm = torch::stable::contiguous(torch::stable::narrow(norm, 2, b, 1)), out.norm = norm.const_data_ptr();
    out.votes = nullptr, out.room = 0;
    p.B = out.logits_B = 1;
    Tier::backward(p, out, like);
  }

  // dW with the strides of the weight, as autograd would copy it for a parameter if they were others.
  Tensor in_order_of(const Tensor& like, const Problem& p) const {
    const std::vector<int64_t> kernels_own{p.D * p.J * p.O, p.O, 1, p.J * p.O};
    if (order) return in_order(weight, p, {like.strides().begin(), like.strides().end()});
    const Tensor one = torch::stable::empty_like(like);
    Tensor copy = in_order(Tier::empty(weight, {weight.numel()}, weight.scalar_type()), p,
                           {one.strides().begin(), one.strides().end()});
    return torch::stable::copy_(copy, in_order(weight, p, kernels_own));
  }

  // x as [I, J, O, D], and `samples` of it, with strides.
  Tensor in_order(const Tensor& x, const Problem& p, std::vector<int64_t> strides) const {
    std::vector<int64_t> sizes{p.I, p.J, p.O, p.D};
    if (samples) sizes.insert(sizes.begin(), *samples), strides.insert(strides.begin(), p.I * p.J * p.O * p.D);
    AtenTensorHandle view = nullptr;
    TORCH_ERROR_CODE_CHECK(
        aoti_torch__reinterpret_tensor(x.get(), int64_t(sizes.size()), sizes.data(), strides.data(), 0, &view));
    return Tensor(view);
  }

  static Tensor output(bool need, const Optional& like, const std::vector<int64_t>& shape, const Tensor& u) {
    return need && like ? Tier::empty(u, shape, like->scalar_type()) : Tier::empty(u, {0}, u.scalar_type());
  }
};

template <class Tier>
std::tuple<Tensor, Tensor, Tensor, Tensor> route_backward(const Tensor& grad_v, const Tensor& s, const Tensor& norm,
                                                          const Tensor& votes, const Tensor& u, const Optional& weight,
                                                          const Optional& bias, const Optional& logits,
                                                          const Optional& mask, int64_t iterations, bool over_inputs,
                                                          bool leaky, double eps, bool per_sample, bool need_u,
                                                          bool need_weight, bool need_bias, bool need_logits) {
  const Problem p = route_of(u, weight, bias, logits, mask, iterations, over_inputs, leaky, eps);
  STD_TORCH_CHECK(is_outputs(grad_v, p, u.scalar_type()), "capsroute: grad_v must be like v");
  Gradients<Tier> gradients(p, u, weight, bias, logits, per_sample, need_u, need_weight, need_bias, need_logits);
  Backward out{};
  out.grad_v = float_array(grad_v);
  STD_TORCH_CHECK(votes.scalar_type() == accumulation_type(u) && votes.is_contiguous(),
                  "capsroute: votes must be what the forward saved");
  out.votes = pointer(votes), out.room = bytes(votes);
  gradients.compute(p, out, &Backward::bias, s, norm, u, logits);
  return gradients.all(p, weight);
}

template <class Tier>
std::tuple<Tensor, Tensor, Tensor, Tensor> routing_pass_backward(
    const Tensor& grad_s, const Tensor& s, const Tensor& norm, const Tensor& u, const Optional& weight,
    const Optional& query, const Optional& logits, const Optional& mask, bool over_inputs, bool leaky, bool per_sample,
    bool need_u, bool need_weight, bool need_query, bool need_logits) {
  const Problem p = pass_of(u, weight, query, logits, mask, over_inputs, leaky);
  STD_TORCH_CHECK(is_outputs(grad_s, p, accumulation_type(u)), "capsroute: grad_s must be like s");
  Gradients<Tier> gradients(p, u, weight, query, logits, per_sample, need_u, need_weight, need_query, need_logits);
  Backward out{};
  out.grad_s = float_array(grad_s);
  gradients.compute(p, out, &Backward::query, s, norm, u, logits);
  return gradients.all(p, weight);
}

// Registers the four ops for a tier, in the body of STABLE_TORCH_LIBRARY_IMPL.
template <class Tier, class Library>
void implement(Library& library) {
  library.impl("route", TORCH_BOX(&route<Tier>));
  library.impl("route_backward", TORCH_BOX(&route_backward<Tier>));
  library.impl("routing_pass", TORCH_BOX(&routing_pass<Tier>));
  library.impl("routing_pass_backward", TORCH_BOX(&routing_pass_backward<Tier>));
}

}  // namespace capsroute::ops
