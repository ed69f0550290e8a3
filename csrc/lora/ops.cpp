// The low-rank updates of a linear layer, added in place to what its base gave, and their gradients.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "core/cpu_level.h"
#include "core/matrix_rows.h"
#include "core/parallel.h"
#include "lora/ops_adapters.h"
#include "lora/ops_few.h"
#include "lora/ops_routing.h"
#include "lora/ops_tiles.h"

namespace fastweights::lora {
namespace {

constexpr const char* op = "lora_linear";  // what people call

// Kernels only read what they call in.
Matrix matrix_of(const MatrixRows& rows, int64_t columns) {
  return {const_cast<void*>(rows.data), rows.stride, columns};
}

void run_update(const Adapters& adapters, const Routing& routing, UpdateArgs& args) {
  const bool tiles = goes_by_tiles(args.element, routing);
  const std::vector<Block> blocks = tiles ? routing.blocks(2, 16) : routing.blocks(8, 8);
  const std::vector<Part> parts = adapters.parts(routing);
  args.blocks = blocks.data();
  args.parts = parts.data();
  args.parts_of_block = routing.groups.empty() ? 0 : int64_t(parts.size() / routing.groups.size());
  args.order = routing.order_data();
  if (blocks.empty()) return;
  const double flops = 2.0 * double(blocks[0].count * blocks[0].ranks * (args.in.columns + args.out.columns));
  if (tiles) {
    const int64_t in_features = args.backward ? args.out.columns : args.in.columns;
    const TileOperands operands(adapters, routing, parts, in_features, args.backward);
    args.down_tiles = operands.down.data();
    args.up_tiles = operands.up.data();
    parallel_tasks(int64_t(blocks.size()), flops,
                   [&](int64_t begin, int64_t end) { FW_KERNEL(update_tiles)(args, begin, end); });
  } else {
    parallel_tasks(int64_t(blocks.size()), flops,
                   [&](int64_t begin, int64_t end) { FW_KERNEL(update)(args, begin, end); });
  }
}

void run_gradient(const Routing& routing, const std::vector<Block>& groups, const std::vector<int64_t>& c_columns,
                  GradientArgs args) {
  if (groups.empty()) return;
  args.groups = groups.data();
  args.c_columns = c_columns.data();
  args.order = routing.order_data();
  args.strips = (args.in.columns + kGradientColumns - 1) / kGradientColumns;
  const double rows = double(routing.M) / double(groups.size());
  const double flops = 2.0 * rows * double(routing.width * kGradientColumns);
  const auto run = [&](auto kernel) { parallel_tasks(args.strips * int64_t(groups.size()), flops, kernel); };
  if (!goes_by_tiles(args.element, routing)) {
    return run([&](int64_t begin, int64_t end) { FW_KERNEL(gradient)(args, begin, end); });
  }
  const ColumnTiles tiles(args.c, args.order, groups, c_columns);
  args.c_tiles = tiles.of_groups.data();
  run([&](int64_t begin, int64_t end) { FW_KERNEL(gradient_tiles)(args, begin, end); });
}

// dB of one projection after another: args.in is dy.
void run_gradients_of_b(const Adapters& adapters, const Routing& routing, const GradientArgs& args,
                        int64_t element_size) {
  const std::vector<Part> parts = adapters.parts(routing);
  if (parts.empty()) return;
  const size_t projections = size_t(adapters.projections()), each = parts.size() / routing.groups.size();
  for (size_t p = 0; p < projections; ++p) {
    std::vector<Block> groups;
    std::vector<int64_t> c_columns;
    GradientArgs of_part = args;
    for (size_t i = p; i < parts.size(); i += projections) {
      const Block& g = routing.groups[i / each];
      groups.push_back({g.first, g.count, g.rank + parts[i].rank, parts[i].ranks, 0});
      c_columns.push_back(parts[i].rank);
      of_part.in.data = static_cast<char*>(args.in.data) + parts[i].begin * element_size;
      of_part.in.columns = parts[i].columns;
    }
    run_gradient(routing, groups, c_columns, of_part);
  }
}

// The update of y, its arguments checked.
class Update {
 public:
  Update(Tensor& y, const Tensor& x, const Tensors& lora_a, const Tensors& lora_b, const Tensor& scale,
         const OptionalTensor& segments, const OptionalTensor& indices, double dropout, const OptionalTensor& seed,
         const std::vector<int64_t>& split)
      : D_(row_size(op, "x", x, "in_features")),
        O_(row_size(op, "y", y, "out_features")),
        element_(element_of(x.scalar_type())),
        y_(y),
        input_(matrix_rows_of(x)),
        adapters(op, x, D_, O_, lora_a, lora_b, scale, split),
        routing(op, x, adapters.first, adapters.projections(), segments, indices),
        dropout_(dropout_of(op, dropout, seed)) {
    check_rows_of(op, "y", y, x);
    check_contiguous(op, "y", y);
  }

  // c: [rows, ranks that a row meets]
  void run(void* c) {
    adapters.lay_out_a(routing);
    routing.has_few_rows() ? run_few(c) : run_many(c);
  }

 private:
  template <typename Args>
  Args args(void* c) const {
    Args args{};
    args.element = element_;
    args.in = matrix_of(input_, D_);
    args.out = {y_.mutable_data_ptr(), O_, O_};
    args.c = {c, routing.width, routing.width};
    args.down = adapters.a_rows.data();
    args.order = routing.order_data();
    args.in_dropout = dropout_;
    return args;
  }

  void run_few(void* c) {
    auto given = args<FewArgs>(c);
    FewTasks(adapters, routing).run(given);
  }

  void run_many(void* c) {
    adapters.lay_out_b(routing);
    auto given = args<UpdateArgs>(c);
    given.up = adapters.b_rows.data();
    run_update(adapters, routing, given);
  }

  int64_t D_, O_;
  Element element_;
  Tensor& y_;
  MatrixRows input_;

 public:
  Adapters adapters;
  const Routing routing;

 private:
  Dropout dropout_;
};

Tensor lora_update_(Tensor y, const Tensor& x, const Tensors& lora_a, const Tensors& lora_b, const Tensor& scale,
                    const OptionalTensor& segments, const OptionalTensor& indices, double dropout,
                    const OptionalTensor& seed, const std::vector<int64_t>& split) {
  Update update(y, x, lora_a, lora_b, scale, segments, indices, dropout, seed, split);
  const std::vector<int64_t> sizes = {update.routing.M, update.routing.width};
  const ScalarType type = update.adapters.arithmetic;
  Tensor u =
      update.routing.plain() ? torch::stable::new_empty(x, sizes, type) : torch::stable::new_zeros(x, sizes, type);
  update.run(u.data_ptr());
  return u;
}

// Without u, since even one more tensor is time that a single row takes notice of.
void lora_add_(Tensor y, const Tensor& x, const Tensors& lora_a, const Tensors& lora_b, const Tensor& scale,
               const OptionalTensor& segments, const OptionalTensor& indices, double dropout,
               const OptionalTensor& seed, const std::vector<int64_t>& split) {
  Update update(y, x, lora_a, lora_b, scale, segments, indices, dropout, seed, split);
  const std::unique_ptr<char[]> u(new char[size_t(update.routing.M * update.routing.width * update.adapters.size())]);
  update.run(u.get());
}

std::tuple<Tensor, Tensor> lora_gradients(OptionalTensor dx, const Tensor& dy, const Tensor& x, const Tensor& u,
                                          const Tensors& lora_a, const Tensors& lora_b, const Tensor& scale,
                                          const OptionalTensor& segments, const OptionalTensor& indices, double dropout,
                                          const OptionalTensor& seed, const std::vector<int64_t>& split) {
  const int64_t D = row_size(op, "x", x, "in_features"), O = row_size(op, "dy", dy, "out_features");
  check_rows_of(op, "dy", dy, x);
  Adapters adapters(op, x, D, O, lora_a, lora_b, scale, split);
  const Routing routing(op, x, adapters.first, adapters.projections(), segments, indices);
  const Dropout mask = dropout_of(op, dropout, seed);
  adapters.lay_out_a(routing);
  adapters.lay_out_b(routing);
  check_cpu(op, "u", u);
  check_dtype(op, "u", u, adapters.arithmetic, " (from x)");
  check_shape(op, "u", u, {routing.M, routing.width}, "[rows, ranks]", "x and lora_a");
  check_contiguous(op, "u", u);
  if (dx) {
    check_shape_of_x(op, "dx", *dx, x);
    check_contiguous(op, "dx", *dx);
  }
  const MatrixRows input = matrix_rows_of(x), grad = matrix_rows_of(dy);
  const ScalarType type = adapters.arithmetic;
  Tensor h = torch::stable::new_empty(x, {routing.M, routing.width}, type);
  UpdateArgs args{};
  args.element = element_of(x.scalar_type());
  args.in = matrix_of(grad, O);
  args.out = {dx ? dx->mutable_data_ptr() : nullptr, D, D};
  args.down = adapters.b_rows.data();
  args.up = adapters.a_rows.data();
  args.c = {h.data_ptr(), routing.width, routing.width};
  args.out_dropout = mask;
  args.backward = true;
  run_update(adapters, routing, args);

  Tensor da = torch::stable::new_empty(x, {adapters.ranks(), D}, type);
  Tensor db_rows = torch::stable::new_empty(x, {adapters.ranks(), O + kPadding}, type);
  const std::vector<double> ones(size_t(adapters.ranks()), 1.0);
  GradientArgs of_a{};
  of_a.element = args.element;
  of_a.in = matrix_of(input, D);
  of_a.c = args.c;
  of_a.out = {da.data_ptr(), D, D};
  of_a.factors = ones.data();
  of_a.in_dropout = mask;
  run_gradient(routing, routing.groups, std::vector<int64_t>(routing.groups.size()), of_a);
  GradientArgs of_b = of_a;
  of_b.in = args.in;
  of_b.c.data = u.data_ptr();
  of_b.out = {db_rows.data_ptr(), O + kPadding, O};
  of_b.factors = adapters.factors.data();
  of_b.in_dropout = {};
  run_gradients_of_b(adapters, routing, of_b, int64_t(dy.element_size()));

  Tensor db = torch::stable::new_empty(x, {adapters.size_of_b()}, type);
  adapters.transpose_back(db_rows, db);
  return {da, db};
}

}  // namespace
}  // namespace fastweights::lora

STABLE_TORCH_LIBRARY_FRAGMENT(fastweights, m) {
  m.def(
      "lora_update_(Tensor(a!) y, Tensor x, Tensor[] lora_a, Tensor[] lora_b, Tensor scale, Tensor? segments, "
      "Tensor? indices, float dropout, Tensor? seed, int[] split=[]) -> Tensor u");
  m.def(
      "lora_add_(Tensor(a!) y, Tensor x, Tensor[] lora_a, Tensor[] lora_b, Tensor scale, Tensor? segments=None, "
      "Tensor? indices=None, float dropout=0., Tensor? seed=None, int[] split=[]) -> ()");
  m.def(
      "lora_gradients(Tensor(a!)? dx, Tensor dy, Tensor x, Tensor u, Tensor[] lora_a, Tensor[] lora_b, Tensor scale, "
      "Tensor? segments, Tensor? indices, float dropout, Tensor? seed, int[] split=[]) -> (Tensor da, Tensor db)");
}

STABLE_TORCH_LIBRARY_IMPL(fastweights, CPU, m) {
  using namespace fastweights::lora;
  m.impl("lora_update_", TORCH_BOX(&lora_update_));
  m.impl("lora_add_", TORCH_BOX(&lora_add_));
  m.impl("lora_gradients", TORCH_BOX(&lora_gradients));
}
