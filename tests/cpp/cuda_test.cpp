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
#include "problem.h"

extern "C" {
void __asan_poison_memory_region(const volatile void*, size_t) __attribute__((weak));
void __asan_unpoison_memory_region(const volatile void*, size_t) __attribute__((weak));
}

namespace {

int failures = 0;

// Whether the logit that is -inf is all that output capsule 2 has.
bool forbids_an_output(const Case& c) { return c.logits == 2 && c.B == 1; }

Inputs random_inputs(const Case& c) {
  std::mt19937 generator(7);
  Values x(c, generator);
  if (x.logits.size() > 3) x.logits[2] = -INFINITY;
  if (forbids_an_output(c)) std::fill_n(x.grad.begin() + 2 * c.O, c.O, NAN);  // which must reach nothing
  return Inputs(c, x, c.dtype);
}

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
    if (x == y && std::isinf(x)) continue;  // the logit of a forbidden pair
    error = std::isfinite(x) && std::isfinite(y) ? std::max(error, std::fabs(x - y)) : INFINITY;
    if (std::isfinite(y)) largest = std::max(largest, std::fabs(y));
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
  const Problem p = x.problem(c), q = exact.problem(c);
  const Kernels& cpu = kernels();
  run_cpu(q, expected.forward(), cpu.plan_forward, cpu.forward);
  run_cpu(expected.backward_problem(c, q), expected.backward(c, exact), cpu.plan_backward, cpu.backward);
  const cuda::Kernels& emulated = cuda::kernels_of(c.dtype);
  run_emulated(p, found.forward(), emulated.forward);
  run_emulated(found.backward_problem(c, p), found.backward(c, x), emulated.backward);
  for (auto [name, member] : kResults) compare(c, name, found.*member, expected.*member);
}

// Each way through the kernels: one tile and two; one launch and chunks of i; one group of j and several; one slice
// and several; features in one stage and in several; whole rows and rows that end within a slice.
std::vector<Case> cases() {
  const DType f64 = DType::float64, bf16 = DType::bfloat16, f16 = DType::float16;
  std::vector<Case> all;
  for (Weight form : {Weight::pair, Weight::output, Weight::single, Weight::none}) {
    const Case of_form[] = {
        // B, I, D, J, O, R
        {{form, 3, 5, 3, 3, 5, 3}, {.logits = 3, .bias = true, .mask = true, .leaky = true}},
        {{form, 33, 7, 9, 2, 17, 2}, {.logits = 1, .mask = true}},
        {{form, 2, 67, 17, 18, 3, 2}, {.logits = 2, .bias = true}},
        {{form, 2, 5, 17, 7, 20, 2}, {.dtype = f64, .bias = true, .leaky = true}},
        {{form, 3, 66, 5, 3, 18, 3}, {.logits = 3, .bias = true, .mask = true, .over_inputs = true}},
        {{form, 3, 5, 5, 13, 5, 2}, {.logits = 3, .over_inputs = true, .detach = true}},
        {{form, 3, 5, 5, 4, 6, 1}, {.dtype = bf16, .logits = 3, .query = true}},
        {{form, 3, 70, 5, 4, 6, 1}, {.dtype = f16, .mask = true, .over_inputs = true, .query = true}},
        {{form, 40, 3, 8, 2, 16, 2}, {.bias = true, .detach = true}},
        {{form, 2, 3, 8, 3, 5, 1}, {.query = true}},
    };
    all.insert(all.end(), std::begin(of_form), std::end(of_form));
  }
  all.push_back({{Weight::pair, 33, 5, 8, 3, 16, 3}, {.dtype = bf16, .in_place = true}});
  all.push_back({{Weight::pair, 2, 9, 10, 17, 16, 2}, {.in_place = true}});
  all.push_back({{Weight::pair, 1057, 2, 2, 2, 3, 1}, {}});  // so many tiles that their dW are summed in groups
  all.push_back({{Weight::output, 1, 8, 3, 4, 5, 2}, {.logits = 2, .mask = true, .over_inputs = true}});
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
