// What both tests of kernels share: cases, their random values, and their inputs and outputs in any storage type.
#pragma once

#include <cstdio>
#include <random>
#include <string>

#include "store.h"

using namespace capsroute;

struct Shape {
  Weight form;
  int64_t B, I, D, J, O, R;
};

struct Options {
  DType dtype = DType::float32;
  int logits = 0;  // 0 none, 1 for all samples, 2 for all input capsules, 3 full
  bool bias = false, mask = false, leaky = false, over_inputs = false, detach = false;
  bool query = false;     // one pass from a query, without squash: then s is the result
  bool in_place = false;  // a weight for each pair lies as the kernels read it
};

struct Case : Shape, Options {
  std::string name() const {
    char text[200];
    std::snprintf(text, sizeof(text),
                  "form%d B%ld I%ld D%ld J%ld O%ld R%ld dtype%d logits%d bias%d mask%d leaky%d in%d detach%d query%d",
                  int(form), B, I, D, J, O, R, int(dtype), logits, bias, mask, leaky, over_inputs, detach, query);
    return text;
  }
  int64_t logits_B() const { return logits == 1 ? 1 : B; }
  int64_t logits_I() const { return logits == 2 ? 1 : I; }
  int64_t inputs() const { return form == Weight::none ? B * I * J * O : B * I * D; }
  int64_t weights() const {
    return form == Weight::pair     ? I * J * O * D
           : form == Weight::output ? J * O * D
           : form == Weight::single ? O * D
                                    : 0;
  }
};

inline Vector normal(std::mt19937& generator, int64_t count, double scale = 1) {
  std::normal_distribution<double> distribution(0, scale);
  Vector x(count);
  for (double& value : x) value = distribution(generator);
  return x;
}

struct Values {
  Vector u, weight, bias, logits, query, grad;  // weight in its logical order, o before d
  std::vector<uint8_t> mask;

  Values(const Case& c, std::mt19937& generator)
      : u(normal(generator, c.inputs())),
        weight(normal(generator, c.weights(), 0.5)),
        bias(normal(generator, c.bias ? c.J * c.O : 0, 0.3)),
        logits(normal(generator, c.logits ? c.logits_B() * c.logits_I() * c.J : 0)),
        query(normal(generator, c.query ? c.B * c.J * c.O : 0, 0.5)),
        grad(normal(generator, c.B * c.J * c.O)) {
    for (int64_t k = 0; c.mask && k < c.B * c.I; ++k) mask.push_back(generator() % 4 != 0);
  }
};

struct Inputs {
  Store u, weight, bias, logits, query, grad;
  std::vector<uint8_t> mask;

  Inputs(const Case& c, const Values& x, DType dtype)
      : u(dtype, x.u),
        weight(dtype, x.weight),
        bias(accumulated(dtype), x.bias),
        logits(accumulated(dtype), x.logits),
        query(accumulated(dtype), x.query),
        grad(c.query ? accumulated(dtype) : dtype, x.grad),
        mask(x.mask) {}

  // The same values in another dtype.
  Inputs to(DType dtype) const {
    Inputs other = *this;
    for (auto member : {&Inputs::u, &Inputs::weight, &Inputs::bias, &Inputs::logits, &Inputs::query, &Inputs::grad})
      other.*member = Store(dtype, (this->*member).all());
    return other;
  }

  Problem problem(const Case& c) {
    Problem p{};
    p.B = c.B, p.I = c.I, p.D = c.form == Weight::none ? 0 : c.D, p.J = c.J, p.O = c.O, p.R = c.R, p.form = c.form;
    p.leaky = c.leaky, p.over_inputs = c.over_inputs, p.eps = 1e-9;
    p.u = {u.data(), u.dtype, {c.I * c.D, c.D, 1, 0}};
    if (c.form == Weight::none) p.u = {u.data(), u.dtype, {c.I * c.J * c.O, c.J * c.O, c.O, 1}};
    if (c.form == Weight::pair) p.weight = {weight.data(), u.dtype, {c.J * c.O * c.D, c.O * c.D, c.D, 1}};
    if (c.in_place) p.weight = {weight.data(), u.dtype, {c.D * c.J * c.O, c.O, 1, c.J * c.O}};
    if (c.form == Weight::output) p.weight = {weight.data(), u.dtype, {0, c.O * c.D, c.D, 1}};
    if (c.form == Weight::single) p.weight = {weight.data(), u.dtype, {0, 0, c.D, 1}};
    if (c.bias) p.bias = {bias.data(), bias.dtype, {c.O, 1, 0, 0}};
    const int64_t by_b = c.logits == 1 ? 0 : c.logits_I() * c.J, by_i = c.logits == 2 ? 0 : c.J;
    if (c.logits) p.logits = {logits.data(), logits.dtype, {by_b, by_i, 1, 0}};
    if (c.mask) p.mask = {mask.data(), DType::float32, {c.I, 1, 0, 0}};
    if (c.query) p.query = {query.data(), query.dtype, {c.J * c.O, c.O, 1, 0}};
    return p;
  }
};

struct Outputs {
  int64_t saved;
  Store v, s, norm, coupling, last_logits, votes, du, dweight, dbias, dlogits, dquery;

  // With room for so many numbers of votes.
  Outputs(const Case& c, const Inputs& x, int64_t room = 0) : saved(c.detach ? 1 : c.R) {
    const DType dtype = x.u.dtype, wide = accumulated(dtype);
    v = Store(dtype, c.query ? 0 : c.B * c.J * c.O), s = Store(wide, saved * c.B * c.J * c.O);
    norm = Store(wide, c.over_inputs ? 2 * saved * c.B * c.J : 0), coupling = Store(dtype, c.B * c.I * c.J);
    last_logits = Store(wide, c.detach ? c.B * c.I * c.J : 0), votes = Store(wide, room);
    du = Store(dtype, x.u.count), dweight = Store(dtype, x.weight.count), dbias = Store(x.bias.dtype, x.bias.count);
    dlogits = Store(x.logits.dtype, c.detach ? 0 : x.logits.count), dquery = Store(x.query.dtype, x.query.count);
  }

  Forward forward() {
    return {v.data(),           s.data(), norm.data(),  coupling.data(),
            last_logits.data(), saved,    votes.data(), votes.count * votes.size()};
  }
  // The problem of the backward: with a constant coupling one pass from the last logits.
  Problem backward_problem(const Case& c, Problem p) {
    if (c.detach) p.R = 1, p.logits = {last_logits.data(), last_logits.dtype, {c.I * c.J, c.J, 1, 0}};
    return p;
  }
  Backward backward(const Case& c, Inputs& x) {
    Backward back{};
    (c.query ? back.grad_s : back.grad_v) = {x.grad.data(), x.grad.dtype, {c.J * c.O, c.O, 1, 0}};
    back.s = s.data(), back.norm = norm.data(), back.votes = votes.data(), back.room = votes.count * votes.size();
    back.logits_B = c.logits_B(), back.logits_I = c.logits_I();
    back.u = du.data(), back.weight = dweight.data(), back.bias = dbias.data();
    back.logits = dlogits.data(), back.query = dquery.data();
    return back;
  }
};

// All that is judged.
struct Result {
  const char* name;
  Store Outputs::* member;
};
inline constexpr Result kResults[] = {{"v", &Outputs::v},
                                      {"s", &Outputs::s},
                                      {"norm", &Outputs::norm},
                                      {"coupling", &Outputs::coupling},
                                      {"last logits", &Outputs::last_logits},
                                      {"du", &Outputs::du},
                                      {"dweight", &Outputs::dweight},
                                      {"dbias", &Outputs::dbias},
                                      {"dlogits", &Outputs::dlogits},
                                      {"dquery", &Outputs::dquery}};
