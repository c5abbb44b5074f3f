// The kernel tier on its own: no Python, no torch, std::thread. Made to be run under Address-,
// UndefinedBehavior- and ThreadSanitizer, with every buffer of its exact size.
//
// For many problems, in float64: v against the definition written with loops that store the votes;
// the gradients against central differences along a random direction; the same bits for 1 to 5 threads;
// float32, bfloat16 and float16 storage against the float64 result.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "problem.h"

namespace capsroute::tested {
extern const Kernels kernels;
}

namespace {

std::mt19937 generator(7);
int failures = 0;
std::atomic<int64_t> asked;

void check(bool ok, const std::string& what) {
  if (ok) return;
  ++failures;
  std::printf("FAILED: %s\n", what.c_str());
}

// Divides by the sum over j, of which the leak is a part, or by the sum over i.
void normalise(const Case& c, Vector& share) {
  const int64_t lines = c.over_inputs ? c.J : c.I, length = c.over_inputs ? c.I : c.J;
  const int64_t line = c.over_inputs ? 1 : c.J, next = c.over_inputs ? c.J : 1;
  for (int64_t n = 0; n < lines; ++n) {
    double sum = c.leaky ? 1 : 0;
    for (int64_t m = 0; m < length; ++m) sum += share[n * line + m * next];
    for (int64_t m = 0; m < length && sum > 0; ++m) share[n * line + m * next] /= sum;
  }
}

// The definition, with votes stored. With `coupling` not null it is used in the last pass, as a constant.
Vector definition(const Case& c, const Values& x, Vector* made_coupling, const Vector* coupling) {
  Vector v(c.B * c.J * c.O);
  if (made_coupling) made_coupling->assign(c.B * c.I * c.J, 0);
  for (int64_t b = 0; b < c.B; ++b) {
    Vector h(c.I * c.J * c.O), logit(c.I * c.J), share(c.I * c.J);
    for (int64_t i = 0; i < c.I; ++i) {
      const bool live = !c.mask || x.mask[b * c.I + i];
      for (int64_t j = 0; live && j < c.J; ++j) {
        if (c.logits)
          logit[i * c.J + j] =
              x.logits[((c.logits_B() == 1 ? 0 : b) * c.logits_I() + (c.logits_I() == 1 ? 0 : i)) * c.J + j];
        for (int64_t o = 0; o < c.O; ++o) {
          double& vote = h[(i * c.J + j) * c.O + o];
          if (c.form == Weight::none) vote = x.u[((b * c.I + i) * c.J + j) * c.O + o];
          const int64_t row = c.form == Weight::pair     ? (i * c.J + j) * c.O + o
                              : c.form == Weight::output ? j * c.O + o
                                                         : o;
          for (int64_t d = 0; c.form != Weight::none && d < c.D; ++d)
            vote += x.weight[row * c.D + d] * x.u[(b * c.I + i) * c.D + d];
          if (c.query) logit[i * c.J + j] += vote * x.query[(b * c.J + j) * c.O + o];
        }
      }
    }
    for (int64_t k = 1; k <= c.R; ++k) {
      for (int64_t i = 0; i < c.I; ++i)
        for (int64_t j = 0; j < c.J; ++j)
          share[i * c.J + j] = (!c.mask || x.mask[b * c.I + i]) ? std::exp(logit[i * c.J + j]) : 0;
      normalise(c, share);
      if (k == c.R && coupling)
        share.assign(coupling->begin() + b * c.I * c.J, coupling->begin() + (b + 1) * c.I * c.J);
      if (k == c.R && made_coupling) std::copy(share.begin(), share.end(), made_coupling->begin() + b * c.I * c.J);
      for (int64_t j = 0; j < c.J; ++j) {
        Vector s(c.O);
        double n2 = 0;
        for (int64_t o = 0; o < c.O; ++o) {
          s[o] = c.bias ? x.bias[j * c.O + o] : 0;
          for (int64_t i = 0; i < c.I; ++i) s[o] += share[i * c.J + j] * h[(i * c.J + j) * c.O + o];
          n2 += s[o] * s[o];
        }
        const double squash = c.query ? 1 : n2 / (1 + n2) / std::sqrt(n2 + 1e-9);
        for (int64_t o = 0; o < c.O; ++o) v[(b * c.J + j) * c.O + o] = s[o] * squash;
      }
      for (int64_t i = 0; k < c.R && i < c.I; ++i)
        for (int64_t j = 0; j < c.J; ++j)
          for (int64_t o = 0; o < c.O; ++o)
            logit[i * c.J + j] += h[(i * c.J + j) * c.O + o] * v[(b * c.J + j) * c.O + o];
    }
  }
  return v;
}

// Calling the kernels, in any storage type.

Parallel threads(int64_t count) {
  return {count, [](int64_t parts, void (*body)(void*, int64_t), void* context) {
            std::vector<std::thread> running;
            for (int64_t part = 0; part < parts; ++part) running.emplace_back(body, context, part);
            for (std::thread& thread : running) thread.join();
          }};
}

struct Scratch {
  std::unique_ptr<char[]> bytes;
  void* start;
  explicit Scratch(int64_t count) : bytes(new char[count + 64]) {
    std::memset(bytes.get(), 0xff, count + 64);
    start = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(bytes.get() + 64) / 64 * 64);
  }
};

double worst(const Vector& a, const Vector& b) {
  double difference = 0;
  for (size_t k = 0; k < a.size(); ++k)
    difference = std::isnan(a[k] - b[k]) ? INFINITY : std::max(difference, std::fabs(a[k] - b[k]));
  return difference;
}

int64_t size_of(const Case& c, char letter) {
  return letter == 'I' ? c.I : letter == 'J' ? c.J : letter == 'O' ? c.O : c.D;
}

// Numbers from one to the next along a dimension of a weight of each pair, which lies in an order, given by letters.
int64_t stride_of(const Case& c, const std::string& order, char letter) {
  int64_t stride = 1;
  for (size_t n = order.find(letter) + 1; n < 4; ++n) stride *= size_of(c, order[n]);
  return stride;
}

// Such a weight or its gradient from one order to another.
Vector reordered(const Case& c, const Vector& weight, const std::string& from, const std::string& to) {
  Vector moved(weight.size());
  for (int64_t k = 0; k < int64_t(moved.size()); ++k) {
    int64_t at = 0;
    for (char letter : to) at += k / stride_of(c, to, letter) % size_of(c, letter) * stride_of(c, from, letter);
    moved[k] = weight[at];
  }
  return moved;
}

// With the weight in another order, each in its turn, and its gradient too, all results have the same bits.
void check_order(const Case& c, Inputs& inputs, const Outputs& expected, const Parallel& parallel) {
  constexpr std::pair<Order, const char*> orders[] = {{Order::IDJO, "IDJO"},
                                                      {Order::IJDO, "IJDO"},
                                                      {Order::JIDO, "JIDO"},
                                                      {Order::IJOD, "IJOD"},
                                                      {Order::JIOD, "JIOD"}};
  static int turn = 0;
  const auto& [order, name] = orders[turn++ % 5];
  Store weight(inputs.weight.dtype, reordered(c, inputs.weight.all(), "IJOD", name));
  Problem p = inputs.problem(c);
  p.weight.data = weight.data();
  for (int n = 0; n < 4; ++n) p.weight.stride[n] = stride_of(c, name, "IJOD"[n]);
  Outputs found(c, inputs, expected.votes.count);
  const Forward out = found.forward();
  Scratch forward(tested::kernels.plan_forward(p, out, parallel.threads).scratch);
  tested::kernels.forward(p, out, forward.start, parallel);
  p = found.backward_problem(c, p);
  Backward back = found.backward(c, inputs);
  back.order = order;
  Scratch backward(tested::kernels.plan_backward(p, back, parallel.threads).scratch);
  tested::kernels.backward(p, back, backward.start, parallel);
  found.dweight = Store(found.dweight.dtype, reordered(c, found.dweight.all(), name, "IDJO"));
  for (auto [what, member] : kResults)
    check((expected.*member).bytes == (found.*member).bytes, c.name() + ": other bits of " + what + ", W as " + name);
}

Outputs run(const Case& c, const Values& x, DType dtype, int64_t thread_count) {
  Inputs inputs(c, x, dtype);
  Problem p = inputs.problem(c);
  // for votes of few samples and one group of input capsules, in vectors of up to 16 numbers
  Outputs outputs(c, inputs, c.R > 1 && !c.detach ? c.B * 64 * (c.J * ((c.O + 15) / 16 * 16) + 16) : 0);
  const Forward out = outputs.forward();
  const Parallel parallel = threads(thread_count);
  Scratch forward(tested::kernels.plan_forward(p, out, thread_count).scratch);
  tested::kernels.forward(p, out, forward.start, parallel);
  if (!c.query) {  // as for inference, where v alone is wanted
    Store alone(dtype, outputs.v.count);
    const Forward least{alone.data()};
    Scratch own(tested::kernels.plan_forward(p, least, thread_count).scratch);
    tested::kernels.forward(p, least, own.start, parallel);
    check(worst(alone.all(), outputs.v.all()) < 0.02, c.name() + ": v alone is another");
  }

  p = outputs.backward_problem(c, p);
  Backward back = outputs.backward(c, inputs);
  // As if dW were new memory: each part is asked for once, before it is written, so that NaN there does not last.
  asked = 0;
  auto ask = [](void* start, int64_t bytes) { asked += bytes, std::memset(start, 0xff, bytes); };
  if (thread_count > 1) back.ask_for_pages = ask;
  Scratch backward(tested::kernels.plan_backward(p, back, thread_count).scratch);
  tested::kernels.backward(p, back, backward.start, parallel);
  check(asked == (thread_count > 1 && c.form == Weight::pair ? outputs.dweight.count * outputs.dweight.size() : 0),
        c.name() + ": pages of dW were asked for " + std::to_string(asked) + " bytes");
  if (c.form == Weight::pair) check_order(c, inputs, outputs, parallel);
  return outputs;
}

double dot(const Vector& a, const Vector& b) {
  double sum = 0;
  for (size_t k = 0; k < a.size(); ++k) sum += a[k] * b[k];
  return sum;
}

void check_gradients(const Case& c, const Values& x, const Outputs& result) {
  Vector coupling;
  definition(c, x, &coupling, nullptr);
  const Vector* constant = c.detach ? &coupling : nullptr;
  Vector dweight = result.dweight.all();
  if (c.form == Weight::pair) dweight = reordered(c, dweight, "IDJO", "IJOD");
  struct Direction {
    const char* name;
    Vector Values::* member;
    Vector gradient;
  } directions[] = {{"u", &Values::u, result.du.all()},
                    {"weight", &Values::weight, dweight},
                    {"bias", &Values::bias, result.dbias.all()},
                    {"logits", &Values::logits, result.dlogits.all()},
                    {"query", &Values::query, result.dquery.all()}};
  for (const Direction& d : directions) {
    if (d.gradient.empty()) continue;
    const Vector along = normal(generator, d.gradient.size());
    const double step = 1e-4;
    double difference = 0;  // of fourth order
    for (auto [at, factor] : {std::pair{1, 8.0}, {-1, -8.0}, {2, -1.0}, {-2, 1.0}}) {
      Values moved = x;
      for (size_t k = 0; k < along.size(); ++k) (moved.*d.member)[k] += at * step * along[k];
      difference += factor * dot(definition(c, moved, nullptr, constant), x.grad) / (12 * step);
    }
    const double found = dot(d.gradient, along);
    check(std::fabs(found - difference) <= 1e-6 * (1 + std::fabs(difference)),
          c.name() + ": gradient of " + d.name + ": " + std::to_string(found) + " for " + std::to_string(difference));
  }
}

void check_case(const Case& c) {
  const Values x(c, generator);
  const Outputs exact = run(c, x, DType::float64, 1);
  const Vector result = (c.query ? exact.s : exact.v).all();
  Vector coupling;
  check(worst(definition(c, x, &coupling, nullptr), result) < 1e-12, c.name() + ": v");
  check(worst(coupling, exact.coupling.all()) < 1e-12, c.name() + ": coupling");
  check_gradients(c, x, exact);
  for (int64_t count : {2, 3, 5}) {
    const Outputs other = run(c, x, DType::float64, count);
    for (auto [name, member] : kResults)
      check((exact.*member).bytes == (other.*member).bytes,
            c.name() + ": other bits of " + name + " on " + std::to_string(count) + " threads");
  }
  for (auto [dtype, tolerance] : {std::pair{DType::float32, 1e-4}, {DType::bfloat16, 0.1}, {DType::float16, 0.05}}) {
    const Outputs low = run(c, x, dtype, 2);
    const std::string in_dtype = " in dtype " + std::to_string(int(dtype));
    const double largest = worst(result, Vector(result.size()));  // squashed at most 1, the sum of a pass may be more
    check(worst(result, (c.query ? low.s : low.v).all()) < tolerance * std::max(1.0, largest),
          c.name() + ": v" + in_dtype);
    for (auto member : {&Outputs::du, &Outputs::dweight, &Outputs::dbias, &Outputs::dlogits, &Outputs::dquery})
      check(std::isfinite(dot((low.*member).all(), (low.*member).all())),
            c.name() + ": a gradient was not written" + in_dtype);
  }
}

}  // namespace

int main() {
  const Weight forms[] = {Weight::pair, Weight::output, Weight::single, Weight::none};
  const int64_t shapes[][5] = {{1, 1, 1, 1, 1},     {2, 3, 4, 5, 6},    {5, 9, 3, 3, 8},   {4, 64, 8, 2, 16},
                               {9, 17, 5, 7, 5},    {3, 130, 2, 4, 17}, {17, 33, 7, 3, 4}, {1, 200, 8, 10, 16},
                               {19, 130, 1, 2, 17}, {2, 5, 28, 3, 16},  {1, 6, 21, 3, 10}};
  int cases = 0;
  for (const auto& s : shapes)
    for (Weight form : forms)
      for (int64_t R : {1, 2, 3}) {
        for (bool over_inputs : {false, true}) {
          const unsigned draw = generator();
          const bool query = R == 1 && draw / 256 % 2;
          check_case({{form, s[0], s[1], s[2], s[3], s[4], R},
                      {.logits = form == Weight::single && !query ? 1 + int(draw / 16 % 3) : int(draw / 16 % 4),
                       .bias = draw & 1 && !query,
                       .mask = bool(draw & 2),
                       .leaky = draw & 4 && !over_inputs,
                       .over_inputs = over_inputs,
                       .detach = draw / 64 % 4 == 0 && !query,
                       .query = query}});
          ++cases;
        }
      }
  std::printf("%d cases, %d failures\n", cases, failures);
  return failures != 0;
}
