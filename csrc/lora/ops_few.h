// The tasks of an update of few rows.
#pragma once

#include <algorithm>
#include <vector>

#include "core/parallel.h"
#include "lora/ops_adapters.h"

namespace fastweights::lora {

class FewTasks {
 public:
  FewTasks(Adapters& adapters, const Routing& routing) {
    const int64_t pairs = adapters.pairs_of_group(routing), projections = adapters.projections();
    // Tasks point to terms and terms to ups.
    ups_.reserve(routing.groups.size() * size_t(pairs));
    terms_.reserve(routing.groups.size() * size_t(pairs));
    for (const Block& g : routing.groups) {
      if (g.count == 0 || g.ranks == 0) continue;
      for (int64_t r = 0; r < g.ranks; r += kFewRanks)
        ranks_.push_back({g.first, g.count, g.rank + r, std::min(kFewRanks, g.ranks - r), r});
      for (int64_t p = 0; p < projections; ++p) {
        const Term* terms = terms_.data() + terms_.size();
        if (projections == 1) {
          add_term(adapters, g, g.part, pairs);
        } else {
          for (int64_t i = p; i < pairs; i += projections) add_term(adapters, g, g.part + i, 1);
        }
        const int64_t term_count = terms_.data() + terms_.size() - terms, columns = adapters.outputs(p);
        for (int64_t j = 0; j < columns && term_count > 0; j += kFewOutputs) {
          outputs_.push_back(
              {g.first, g.count, adapters.start(p) + j, std::min(kFewOutputs, columns - j), j, terms, term_count});
        }
      }
    }
  }

  void run(FewArgs& args) const {
    args.ranks = ranks_.data();
    args.outputs = outputs_.data();
    if (ranks_.empty()) return;
    parallel_tasks(int64_t(ranks_.size()), 2.0 * double(ranks_[0].count * ranks_[0].ranks * args.in.columns),
                   [&](int64_t begin, int64_t end) { FW_KERNEL(shrink_few)(args, begin, end); });
    if (outputs_.empty()) return;
    parallel_tasks(int64_t(outputs_.size()),
                   2.0 * double((outputs_[0].count + 8) * kFewOutputs * outputs_[0].terms[0].ranks),
                   [&](int64_t begin, int64_t end) { FW_KERNEL(expand_few)(args, begin, end); });
  }

 private:
  // The pairs [first, first + count), whose ranks follow one another.
  void add_term(Adapters& adapters, const Block& g, int64_t first, int64_t count) {
    const auto rank = [&](int64_t pair) { return adapters.first[size_t(pair)]; };
    if (rank(first + count) == rank(first)) return;
    terms_.push_back({rank(first) - g.rank, rank(first + count) - rank(first), ups_.data() + ups_.size(), count});
    for (int64_t i = first; i < first + count; ++i) {
      ups_.push_back(adapters.up(size_t(i)));
      ups_.back().rank = rank(i) - rank(first);
    }
  }

  std::vector<Up> ups_;
  std::vector<Term> terms_;
  std::vector<RanksTask> ranks_;
  std::vector<OutputsTask> outputs_;
};

}  // namespace fastweights::lora
