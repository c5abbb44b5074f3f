// One call of the kernel tier for callgrind to count, on one thread: benchmarks/instructions.py.
//   kernel_count INSTRUCTION_SET forward|backward votes|pair|output|single B I D J O R
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "../csrc/cpu/routing.h"

using namespace capsroute;

namespace {

using Numbers = std::vector<float>;

// Of a fixed sequence between -scale and scale, so that every run counts the same.
Numbers numbers(int64_t count, float scale) {
  static uint32_t state = 1;
  Numbers x(count);
  for (float& value : x) {
    state = state * 1664525u + 1013904223u;
    value = scale * (float(state >> 8) / float(1 << 23) - 1);
  }
  return x;
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

const Parallel alone{1, [](int64_t parts, void (*body)(void*, int64_t), void* context) {
                       for (int64_t part = 0; part < parts; ++part) body(context, part);
                     }};

template <class Out>
std::unique_ptr<void, Free> scratch(Plan (*plan)(const Problem&, const Out&, int64_t), const Problem& p,
                                    const Out& out) {
  return std::unique_ptr<void, Free>(std::aligned_alloc(64, (plan(p, out, 1).scratch + 63) / 64 * 64));
}

}  // namespace

// callgrind counts inside this function alone.
extern "C" __attribute__((noinline)) void counted(void (*call)(void*), void* context) { call(context); }

template <class Call>
void count(bool wanted, Call call) {
  auto run = [](void* context) { (*static_cast<Call*>(context))(); };
  wanted ? counted(run, &call) : run(&call);
}

int main(int argc, char** argv) {
  const Kernels* kernels = argc == 10 ? kernels_named(argv[1]) : nullptr;
  if (!kernels) return std::fprintf(stderr, "wrong arguments, or no such instruction set here\n"), 2;
  const bool backward = !std::strcmp(argv[2], "backward");
  int64_t sizes[6];
  for (int k = 0; k < 6; ++k) sizes[k] = std::atoll(argv[4 + k]);
  Problem p{};
  p.B = sizes[0], p.I = sizes[1], p.D = sizes[2], p.J = sizes[3], p.O = sizes[4], p.R = sizes[5], p.eps = 1e-9;
  const int64_t J = p.J, O = p.O, D = p.D, outputs = p.B * J * O;
  const DType f32 = DType::float32;
  const char* names[] = {"votes", "pair", "output", "single"};
  for (int form = 0; form < 4; ++form)
    if (!std::strcmp(names[form], argv[3])) p.form = Weight(form);

  const bool votes = p.form == Weight::none;
  Numbers u = numbers(p.B * p.I * (votes ? J * O : D), 1), grad = numbers(outputs, 1), logits = numbers(p.I * J, 1);
  Numbers weight = numbers(votes ? 0 : (p.form == Weight::pair ? p.I : 1) * J * O * D, 0.3f);
  if (votes)
    p.u = {u.data(), f32, {p.I * J * O, J * O, O, 1}};
  else
    p.u = {u.data(), f32, {p.I * D, D, 1, 0}};
  if (p.form == Weight::pair) p.weight = {weight.data(), f32, {D * J * O, O, 1, J * O}};
  if (p.form == Weight::output) p.weight = {weight.data(), f32, {0, O * D, D, 1}};
  if (p.form == Weight::single) p.weight = {weight.data(), f32, {0, 0, D, 1}};
  p.logits = {logits.data(), f32, {0, J, 1, 0}};

  Numbers v(outputs), s(p.R * outputs), du(u.size()), dweight(weight.size());
  const Forward out{v.data(), s.data(), nullptr, nullptr, nullptr, p.R, nullptr, 0};
  const auto first = scratch(kernels->plan_forward, p, out);
  count(!backward, [&] { kernels->forward(p, out, first.get(), alone); });
  if (!backward) return 0;
  Backward back{};
  back.grad_v = {grad.data(), f32, {J * O, O, 1, 0}};
  back.s = s.data(), back.logits_B = 1, back.logits_I = p.I;
  back.u = du.data(), back.weight = votes ? nullptr : dweight.data();
  const auto second = scratch(kernels->plan_backward, p, back);
  count(true, [&] { kernels->backward(p, back, second.get(), alone); });
}
