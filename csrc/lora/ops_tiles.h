// A, B and c as the tile registers read them.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "core/bf16_tiles.h"
#include "lora/ops_adapters.h"

namespace fastweights::lora {

// Fewer rows than a tile has do not pay for the packing.
inline bool goes_by_tiles(Element element, const Routing& routing) {
  return element == Element::bf16 && routing.M >= 16 && has_bf16_tiles();
}

class TileMemory {
 public:
  uint32_t* take(int64_t words) {
    memory_.emplace_back(static_cast<uint32_t*>(std::aligned_alloc(64, size_t(words) * sizeof(uint32_t))));
    if (!memory_.back()) throw std::bad_alloc();
    return memory_.back().get();
  }

 private:
  struct Free {
    void operator()(uint32_t* p) const { std::free(p); }
  };
  std::vector<std::unique_ptr<uint32_t, Free>> memory_;
};

// What the rows of an update meet.
struct TileOperands {
  std::vector<const uint32_t*> down, up;

  TileOperands(const Adapters& adapters, const Routing& routing, const std::vector<Part>& parts, int64_t in_features,
               bool backward) {
    const size_t each = routing.groups.empty() ? 0 : parts.size() / routing.groups.size();
    for (size_t i = 0; i < routing.groups.size(); ++i) {
      const Block& g = routing.groups[i];
      const bool reached = g.count > 0;
      add(backward ? up : down, reached, {adapters.a_rows.data() + g.rank, g.ranks, in_features, backward, nullptr});
      for (size_t j = i * each; j < (i + 1) * each; ++j) {
        const Part& p = parts[j];
        const void* const* rows = adapters.b_rows.data() + g.rank + p.rank;
        add(backward ? down : up, reached, {rows, p.ranks, p.columns, !backward, nullptr});
      }
    }
  }

 private:
  void add(std::vector<const uint32_t*>& to, bool reached, TilesArgs args) {
    const int64_t words = args.up ? up_tiles_size(args.ranks, args.columns) : down_tiles_size(args.ranks, args.columns);
    args.out = reached && words ? memory_.take(words) : nullptr;
    to.push_back(args.out);
    if (!args.out) return;
    const int64_t width = args.up ? 16 : 32;
    parallel_tasks((args.columns + width - 1) / width, 64.0 * double(args.ranks * width),
                   [&](int64_t begin, int64_t end) { FW_KERNEL(pack_tiles)(args, begin, end); });
  }

  TileMemory memory_;
};

// c of each group.
struct ColumnTiles {
  std::vector<const uint32_t*> of_groups;

  ColumnTiles(const Matrix& c, const int64_t* order, const std::vector<Block>& groups,
              const std::vector<int64_t>& columns) {
    for (size_t i = 0; i < groups.size(); ++i) {
      const Block& g = groups[i];
      const int64_t words = down_tiles_size(g.ranks, g.count);
      const ColumnsArgs args{order, c, g.first, g.count, columns[i], g.ranks, words ? memory_.take(words) : nullptr};
      of_groups.push_back(args.out);
      if (!words) continue;
      parallel_tasks((g.count + 31) / 32, 64.0 * double(32 * g.ranks),
                     [&](int64_t begin, int64_t end) { FW_KERNEL(pack_c_tiles)(args, begin, end); });
    }
  }

 private:
  TileMemory memory_;
};

}  // namespace fastweights::lora
