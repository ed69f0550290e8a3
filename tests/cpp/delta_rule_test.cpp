#include "delta_rule/kernel.h"

#include <algorithm>

#include "recurrence_test.h"

namespace fastweights::delta_rule {

using R = self_test::Recurrent;
using Numbers = std::vector<float>;

struct Delta : R {
  static constexpr int64_t kSize = K * V;
  const Gate gate;
  const int64_t gates;  // for each head: one, or one a channel
  Numbers beta = self_test::normal(N * T * H, 6);

  explicit Delta(Gate gate) : gate(gate), gates(gate == Gate::channel ? K : 1) {
    for (float& x : k) x /= 5;  // short keys, so that no state grows
    for (float& x : beta) x = 1 / (1 + std::exp(-x));
  }

  Problem problem(Form form) {
    Problem p = R::problem<Problem>(form);
    p.gate = gate, p.g = rows(g, gates), p.beta = rows(beta, 1);
    return p;
  }

  double decay(int64_t row, int64_t i) const { return std::exp(double(g[row * gates + i % gates])); }

  // S <- diag(exp g) S,  d = beta (v - S^T k),  S <- S + k d^T
  void write(int64_t row, double* S, double* d) const {
    for (int64_t i = 0; i < kSize; ++i) S[i] *= decay(row, i / V);
    for (int64_t j = 0; j < V; ++j) {
      d[j] = v[row * V + j];
      for (int64_t i = 0; i < K; ++i) d[j] -= S[i * V + j] * k[row * K + i];
      d[j] *= beta[row];
      for (int64_t i = 0; i < K; ++i) S[i * V + j] += k[row * K + i] * d[j];
    }
  }
};

static void check_forward(const char* level, decltype(&baseline::forward) forward) {
  for (Gate gate : {Gate::token, Gate::channel}) {
    Delta in(gate);
    const auto problem = [&](Form form) { return in.problem(form); };
    self_test::check_forward(level, forward, in, problem, [&](int64_t row, double* S, double* o) {
      double d[R::V];
      in.write(row, S, d);
      for (int64_t i = 0; i < R::K; ++i)
        for (int64_t j = 0; j < R::V; ++j) o[j] += R::kScale * S[i * R::V + j] * in.q[row * R::K + i];
    });
  }
}

FW_TEST(delta_rule_forward_in_both_forms) {
  FW_AT_LEVELS(forward, check_forward)
}

// Gradients of sum(grad_o o) + sum(grad_final S), and what the forward keeps for them.
struct Backward {
  const Delta& in;
  Numbers grad_o = self_test::normal(in.v.size(), 7), grad_final = self_test::normal(in.initial.size(), 8);
  Numbers states = Numbers((R::N * R::T / kSegment + R::N) * R::H * in.kSize), corrections = Numbers(in.v.size());
  std::vector<double> dq, dk, dv, dbeta, dg, dinitial;

  explicit Backward(const Delta& in)
      : in(in),
        dq(in.q.size()),
        dk(in.k.size()),
        dv(in.v.size()),
        dbeta(in.beta.size()),
        dg(in.beta.size() * in.gates),
        dinitial(grad_final.begin(), grad_final.end()) {
    for (int64_t n = 0; n < R::N; ++n)
      for (int64_t h = 0; h < R::H; ++h) add(n, h);
  }

  // One head of a sequence: all its tokens, then from the last to the first.
  void add(int64_t n, int64_t h) {
    const int64_t first = (n * R::H + h) * in.kSize, slot = n * R::T / kSegment + n;
    std::vector<double> S(&in.initial[first], &in.initial[first] + in.kSize), all, d(R::T * R::V);
    for (int64_t t = 0; t < R::T; ++t) {
      const int64_t row = (n * R::T + t) * R::H + h;
      if (t % kSegment == 0) {
        std::copy(S.begin(), S.end(), &states[((slot + t / kSegment) * R::H + h) * in.kSize]);
      }
      in.write(row, S.data(), &d[t * R::V]);
      std::copy_n(&d[t * R::V], R::V, &corrections[row * R::V]);
      all.insert(all.end(), S.begin(), S.end());
    }
    for (int64_t t = R::T - 1; t >= 0; --t)
      add_token((n * R::T + t) * R::H + h, &all[t * in.kSize], &d[t * R::V], &dinitial[first]);
  }

  // From dS after the token to dS before it.
  void add_token(int64_t row, const double* S, const double* d, double* dS) {
    for (int64_t j = 0; j < R::V; ++j) {
      const double seed = R::kScale * grad_o[row * R::V + j], beta = in.beta[row];
      double dd = 0;
      for (int64_t i = 0; i < R::K; ++i) {
        const int64_t key = row * R::K + i, at = i * R::V + j;
        dq[key] += seed * S[at];
        dS[at] += seed * in.q[key];
        dk[key] += dS[at] * d[j];
        dd += dS[at] * in.k[key];
      }
      dv[row * R::V + j] = beta * dd;
      dbeta[row] += dd * d[j] / beta;
      for (int64_t i = 0; i < R::K; ++i) {
        const int64_t key = row * R::K + i, at = i * R::V + j;
        const double decayed = S[at] - in.k[key] * d[j];
        dk[key] -= beta * dd * decayed;
        dS[at] -= beta * dd * in.k[key];
        dg[row * in.gates + i % in.gates] += dS[at] * decayed;
        dS[at] *= in.decay(row, i);
      }
    }
  }
};

static void check_backward(const char* level, decltype(&baseline::backward) backward) {
  for (Gate gate : {Gate::token, Gate::channel}) {
    Delta in(gate);
    Backward expected(in);
    const auto like = [](const std::vector<double>& x) { return Numbers(x.size(), NAN); };
    Numbers dq = like(expected.dq), dk = like(expected.dk), dv = like(expected.dv);
    Numbers dbeta = like(expected.dbeta), dg = like(expected.dg), dinitial = like(expected.dinitial);
    BackwardArgs args{};
    args.p = in.problem(Form::chunked);
    args.states = expected.states.data(), args.corrections = R::rows(expected.corrections, R::V);
    args.grad_o = R::rows(expected.grad_o, R::V), args.grad_final = R::states(expected.grad_final);
    args.dq = R::rows(dq, R::K), args.dk = R::rows(dk, R::K), args.dv = R::rows(dv, R::V);
    args.dbeta = R::rows(dbeta, 1), args.dg = R::rows(dg, in.gates), args.grad_initial = R::states(dinitial);
    backward(args, 0, R::N * R::H);
    const auto same = [&](const Numbers& got, const std::vector<double>& wanted) {
      for (size_t i = 0; i < got.size(); ++i) self_test::near(level, got[i], wanted[i], 1e-4);
    };
    same(dq, expected.dq), same(dk, expected.dk), same(dv, expected.dv);
    same(dbeta, expected.dbeta), same(dg, expected.dg), same(dinitial, expected.dinitial);
  }
}

FW_TEST(delta_rule_backward) {
  FW_AT_LEVELS(backward, check_backward)
}

}  // namespace fastweights::delta_rule
