// The emulated CUDA kernels on their own, for the sanitizers: no Python, no torch, every buffer of its exact size and
// NaN before it is written. Judged by the CPU tier in float64, which is judged by kernel_test.cpp.
//
//   cuda_test               all cases, in three orders of threads and blocks
//   cuda_test --sites       for each case its number, and the meetings and bounds that it reaches, one a line
//   cuda_test N X           case N with the meeting X left out, or the bound X loosened: it should fail
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cuda/kernels.h"
#include "../../csrc/emulation/emulation.h"
#include "store.h"

extern "C" {
void __asan_poison_memory_region(const volatile void*, size_t) __attribute__((weak));
void __asan_unpoison_memory_region(const volatile void*, size_t) __attribute__((weak));
}

using namespace capsroute;

namespace {

int failures = 0;

struct Case {
  Weight form;
  int64_t B, I, D, J, O, R;
  DType dtype = DType::float32;
  int logits = 0;  // 0 none, 1 for all samples, 2 for all input capsules, 3 full
  bool bias = false, mask = false, leaky = false, over_inputs = false, detach = false, query = false;
  bool in_place = false;  // the weight lies as the kernels read it

  std::string name() const {
    char text[200];
    std::snprintf(text, sizeof(text),
                  "form%d B%ld I%ld D%ld J%ld O%ld R%ld dtype%d logits%d bias%d mask%d leaky%d in%d detach%d query%d",
                  int(form), B, I, D, J, O, R, int(dtype), logits, bias, mask, leaky, over_inputs, detach, query);
    return text;
  }
};

struct Inputs {
  Store u, weight, bias, logits, query, grad;
  std::vector<char> mask;

  // The same values in another dtype.
  Inputs to(DType dtype) const {
    Inputs other = *this;
    for (auto member : {&Inputs::u, &Inputs::weight, &Inputs::bias, &Inputs::logits, &Inputs::query, &Inputs::grad}) {
      const Store& from = this->*member;
      Store& x = other.*member = Store(dtype, from.count);
      for (int64_t k = 0; k < x.count; ++k) x.set(k, from.get(k));
    }
    return other;
  }
};

int64_t logits_B(const Case& c) { return c.logits == 1 ? 1 : c.B; }
int64_t logits_I(const Case& c) { return c.logits == 2 ? 1 : c.I; }
int64_t weights(const Case& c) {
  return c.form == Weight::pair     ? c.I * c.J * c.O * c.D
         : c.form == Weight::output ? c.J * c.O * c.D
         : c.form == Weight::single ? c.O * c.D
                                    : 0;
}

Inputs random_inputs(const Case& c) {
  std::mt19937 generator(7);
  std::normal_distribution<double> normal;
  auto fill = [&](DType dtype, int64_t count, double scale) {
    Store x(dtype, count);
    for (int64_t k = 0; k < count; ++k) x.set(k, scale * normal(generator));
    return x;
  };
  const DType wide = accumulated(c.dtype);
  Inputs x;
  x.u = fill(c.dtype, c.form == Weight::none ? c.B * c.I * c.J * c.O : c.B * c.I * c.D, 1);
  x.weight = fill(c.dtype, weights(c), 0.5);
  x.bias = fill(wide, c.bias ? c.J * c.O : 0, 0.3);
  x.logits = fill(wide, c.logits ? logits_B(c) * logits_I(c) * c.J : 0, 1);
  if (c.logits && x.logits.count > 3) x.logits.set(2, -INFINITY);
  x.query = fill(wide, c.query ? c.B * c.J * c.O : 0, 0.5);
  x.grad = fill(c.query ? wide : c.dtype, c.B * c.J * c.O, 1);
  for (int64_t k = 0; c.mask && k < c.B * c.I; ++k) x.mask.push_back(generator() % 4 != 0);
  return x;
}

Problem problem_of(const Case& c, Inputs& x) {
  Problem p{};
  p.B = c.B, p.I = c.I, p.D = c.form == Weight::none ? 0 : c.D, p.J = c.J, p.O = c.O, p.R = c.R, p.form = c.form;
  p.leaky = c.leaky, p.over_inputs = c.over_inputs, p.eps = 1e-9;
  p.u = {x.u.data(), x.u.dtype, {c.I * c.D, c.D, 1, 0}};
  if (c.form == Weight::none) p.u = {x.u.data(), x.u.dtype, {c.I * c.J * c.O, c.J * c.O, c.O, 1}};
  if (c.form == Weight::pair) p.weight = {x.weight.data(), x.u.dtype, {c.J * c.O * c.D, c.O * c.D, c.D, 1}};
  if (c.in_place) p.weight = {x.weight.data(), x.u.dtype, {c.D * c.J * c.O, c.O, 1, c.J * c.O}};
  if (c.form == Weight::output) p.weight = {x.weight.data(), x.u.dtype, {0, c.O * c.D, c.D, 1}};
  if (c.form == Weight::single) p.weight = {x.weight.data(), x.u.dtype, {0, 0, c.D, 1}};
  if (c.bias) p.bias = {x.bias.data(), x.bias.dtype, {c.O, 1, 0, 0}};
  if (c.logits)
    p.logits = {
        x.logits.data(), x.logits.dtype, {logits_B(c) == 1 ? 0 : logits_I(c) * c.J, logits_I(c) == 1 ? 0 : c.J, 1, 0}};
  if (c.mask) p.mask = {x.mask.data(), DType::float32, {c.I, 1, 0, 0}};
  if (c.query) p.query = {x.query.data(), x.query.dtype, {c.J * c.O, c.O, 1, 0}};
  return p;
}

struct Outputs {
  int64_t saved;
  Store v, s, norm, coupling, last_logits, du, dweight, dbias, dlogits, dquery;

  Outputs(const Case& c, const Inputs& x) {
    const DType dtype = x.u.dtype, wide = accumulated(dtype);
    saved = c.detach ? 1 : c.R, last_logits = Store(wide, c.detach ? c.B * c.I * c.J : 0);
    v = Store(dtype, c.query ? 0 : c.B * c.J * c.O), s = Store(wide, saved * c.B * c.J * c.O);
    norm = Store(wide, c.over_inputs ? 2 * saved * c.B * c.J : 0), coupling = Store(dtype, c.B * c.I * c.J);
    du = Store(dtype, x.u.count), dweight = Store(dtype, x.weight.count), dbias = Store(x.bias.dtype, x.bias.count);
    dlogits = Store(x.logits.dtype, c.detach ? 0 : x.logits.count), dquery = Store(x.query.dtype, x.query.count);
  }
  Forward forward() {
    return {v.data(), s.data(), norm.data(), coupling.data(), last_logits.data(), saved, nullptr, 0};
  }
  // The problem of the backward: with a constant coupling one pass from the last logits.
  Problem backward_problem(const Case& c, Problem p) {
    if (c.detach) p.R = 1, p.logits = {last_logits.data(), last_logits.dtype, {c.I * c.J, c.J, 1, 0}};
    return p;
  }
  Backward backward(const Case& c, Inputs& x) {
    Backward back{};
    (c.query ? back.grad_s : back.grad_v) = {x.grad.data(), x.grad.dtype, {c.J * c.O, c.O, 1, 0}};
    back.s = s.data(), back.norm = norm.data();
    back.logits_B = logits_B(c), back.logits_I = logits_I(c);
    back.u = du.data(), back.weight = dweight.data(), back.bias = dbias.data();
    back.logits = dlogits.data(), back.query = dquery.data();
    return back;
  }
};

constexpr int64_t kAlignment = 256;

// Scratch that is nobody's until the launcher gives out its parts.
template <class Out>
void run_emulated(const Problem& p, const Out& out, int64_t (*kernel)(const Problem&, const Out&, void*, void*)) {
  const size_t bytes = size_t(kernel(p, out, nullptr, nullptr) + kAlignment - 1) / kAlignment * kAlignment;
  void* scratch = std::aligned_alloc(kAlignment, bytes);
  if (__asan_poison_memory_region) __asan_poison_memory_region(scratch, bytes);
  kernel(p, out, scratch, nullptr);
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(scratch, bytes);
  std::free(scratch);
}

template <class Out>
void run_cpu(const Problem& p, const Out& out, Plan (*plan)(const Problem&, const Out&, int64_t),
             void (*kernel)(const Problem&, const Out&, void*, const Parallel&)) {
  const Parallel alone{1, [](int64_t parts, void (*body)(void*, int64_t), void* context) {
                         for (int64_t part = 0; part < parts; ++part) body(context, part);
                       }};
  const size_t bytes = size_t(plan(p, out, 1).scratch + 63) / 64 * 64;
  void* scratch = std::aligned_alloc(64, bytes + 64);
  kernel(p, out, scratch, alone);
  std::free(scratch);
}

void compare(const Case& c, const char* what, const Store& found, const Store& expected) {
  double error = 0, largest = 1;
  for (int64_t k = 0; k < found.count; ++k) {
    const double x = found.get(k), y = expected.get(k);
    error = std::isnan(x) || std::isnan(y) ? INFINITY : std::max(error, std::fabs(x - y));
    largest = std::max(largest, std::fabs(y));
  }
  const double tolerance = found.dtype == DType::float64    ? 1e-10
                           : found.dtype == DType::float32  ? 1e-4
                           : found.dtype == DType::bfloat16 ? 0.05
                                                            : 0.01;
  if (error <= tolerance * largest) return;
  ++failures;
  std::printf("FAILED: %s: %s: error %g\n", c.name().c_str(), what, error);
}

void check_case(const Case& c) {
  Inputs x = random_inputs(c), exact = x.to(DType::float64);
  Outputs found(c, x), expected(c, exact);
  const Problem p = problem_of(c, x), q = problem_of(c, exact);
  const Kernels& cpu = kernels();
  run_cpu(q, expected.forward(), cpu.plan_forward, cpu.forward);
  run_cpu(expected.backward_problem(c, q), expected.backward(c, exact), cpu.plan_backward, cpu.backward);
  const cuda::Kernels& emulated = cuda::kernels_of(c.dtype);
  run_emulated(p, found.forward(), emulated.forward);
  run_emulated(found.backward_problem(c, p), found.backward(c, x), emulated.backward);
  compare(c, "v", found.v, expected.v);
  compare(c, "s", found.s, expected.s);
  compare(c, "coupling", found.coupling, expected.coupling);
  compare(c, "du", found.du, expected.du);
  compare(c, "dweight", found.dweight, expected.dweight);
  compare(c, "dbias", found.dbias, expected.dbias);
  compare(c, "dlogits", found.dlogits, expected.dlogits);
  compare(c, "dquery", found.dquery, expected.dquery);
}

// Each way through the kernels: one tile and two; one launch and chunks of i; one group of j and several; one slice
// and several; features in one stage and in several; whole rows and rows that end within a slice.
std::vector<Case> cases() {
  const DType f64 = DType::float64, bf16 = DType::bfloat16, f16 = DType::float16;
  std::vector<Case> all;
  for (Weight form : {Weight::pair, Weight::output, Weight::single, Weight::none}) {
    all.push_back({.form = form,
                   .B = 3,
                   .I = 5,
                   .D = 3,
                   .J = 3,
                   .O = 5,
                   .R = 3,
                   .logits = 3,
                   .bias = true,
                   .mask = true,
                   .leaky = true});
    all.push_back({.form = form, .B = 33, .I = 7, .D = 9, .J = 2, .O = 17, .R = 2, .logits = 1, .mask = true});
    all.push_back({.form = form, .B = 2, .I = 67, .D = 17, .J = 18, .O = 3, .R = 2, .logits = 2, .bias = true});
    all.push_back(
        {.form = form, .B = 2, .I = 5, .D = 17, .J = 7, .O = 20, .R = 2, .dtype = f64, .bias = true, .leaky = true});
    all.push_back({.form = form,
                   .B = 3,
                   .I = 66,
                   .D = 5,
                   .J = 3,
                   .O = 18,
                   .R = 3,
                   .logits = 3,
                   .bias = true,
                   .mask = true,
                   .over_inputs = true});
    all.push_back({.form = form,
                   .B = 3,
                   .I = 5,
                   .D = 5,
                   .J = 13,
                   .O = 5,
                   .R = 2,
                   .logits = 3,
                   .over_inputs = true,
                   .detach = true});
    all.push_back(
        {.form = form, .B = 3, .I = 5, .D = 5, .J = 4, .O = 6, .R = 1, .dtype = bf16, .logits = 3, .query = true});
    all.push_back({.form = form,
                   .B = 3,
                   .I = 70,
                   .D = 5,
                   .J = 4,
                   .O = 6,
                   .R = 1,
                   .dtype = f16,
                   .mask = true,
                   .over_inputs = true,
                   .query = true});
    all.push_back({.form = form, .B = 40, .I = 3, .D = 8, .J = 2, .O = 16, .R = 2, .bias = true, .detach = true});
    all.push_back({.form = form, .B = 2, .I = 3, .D = 8, .J = 3, .O = 5, .R = 1, .query = true});
  }
  all.push_back(
      {.form = Weight::pair, .B = 33, .I = 5, .D = 8, .J = 3, .O = 16, .R = 3, .dtype = bf16, .in_place = true});
  all.push_back({.form = Weight::pair, .B = 2, .I = 9, .D = 10, .J = 17, .O = 16, .R = 2, .in_place = true});
  return all;
}

}  // namespace

int main(int count, char** arguments) {
  using emulation::Order;
  const std::vector<Case> all = cases();
  try {
    if (count == 2) {  // --sites
      for (size_t k = 0; k < all.size(); ++k) {
        check_case(all[k]);
        std::printf("case %zu\n%s", k, emulation::take_sites().c_str());
      }
    } else if (count == 3) {
      emulation::mutate(arguments[2]);
      check_case(all.at(std::stoul(arguments[1])));
    } else {
      for (Order order : {Order::forward, Order::backward, Order::random}) {
        emulation::set_order(order);
        for (const Case& c : all) check_case(c);
      }
    }
  } catch (const std::exception& error) {
    ++failures;
    std::printf("FAILED: %s\n", error.what());
  }
  std::printf("%d failures\n", failures);
  return failures > 0;
}
