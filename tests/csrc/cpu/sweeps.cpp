// A forward and a backward sweep of one cell in two directions, chunk by chunk, with the gradients
// of its weights, on numbers from the standard input. It prints all results in the order in which
// `Sweeps::print` has them.
//
//   sweeps CELL FORMAT STORAGE LAYOUT RECURRENCES SEQUENCES UNITS T B I H < numbers
//
// FORMAT, STORAGE and LAYOUT are numbers of the enumerations; RECURRENCES, SEQUENCES and UNITS
// those of threads. The numbers are x, and for each recurrence its weights, biases, parameters and
// initial states; then the gradients of y and of the last states.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cpu/contract.h"
#include "threads.h"

extern "C" fastrnn::CompiledCells fastrnn_cells_baseline();

namespace {

using namespace fastrnn;

constexpr int kDirections = 2;
constexpr int64_t kChunk = 3;  // steps of a chunk

double next_number() {
  double value = 0;
  if (std::scanf("%lf", &value) != 1) std::exit(1);
  return value;
}

// A type of 16 bits, of numbers that it holds exactly.
struct Bfloat16 {
  uint16_t bits = 0;
  Bfloat16() = default;
  Bfloat16(double value) {
    const auto whole = static_cast<float>(value);
    uint32_t all;
    std::memcpy(&all, &whole, sizeof all);
    bits = static_cast<uint16_t>(all >> 16);
  }
  operator double() const {
    const uint32_t all = uint32_t{bits} << 16;
    float value;
    std::memcpy(&value, &all, sizeof value);
    return value;
  }
};

// Stored numbers are of type S, computed ones of type T.
template <class T, class S>
class Sweeps {
 public:
  Sweeps(const CompiledCell& cell, Format format, Storage storage, const CpuPlan& plan,
         const int64_t* sizes)
      : cell_(cell), format_(index_of(format)), plan_(plan) {
    args_.rows.steps = sizes[0];
    args_.rows.batch = sizes[1];
    args_.inputs = sizes[2];
    args_.hidden = args_.recurrent = sizes[3];
    args_.recurrences = kDirections;
    args_.storage = storage;
    plan_.chunk_rows = kChunk * sizes[1];
  }

  bool run() {
    read();
    return forward() && backward();
  }

  void print() const {
    show(y_);
    show(last_);
    show(dx_);
    for (const auto* each : {&dw_ih_, &dw_hh_, &db_ih_}) show(*each);
    show(cell_.summed + 1 == 1u << cell_.gates ? db_ih_ : db_hh_);
    // Of each parameter the sum over the sequences.
    for (int64_t p = 0; p < kDirections; ++p)
      for (int64_t k = 0; k < N() * H(); ++k) {
        double sum = 0;
        for (int64_t b = 0; b < B(); ++b) sum += dp_[(p * B() + b) * N() * H() + k];
        std::printf("%.17g\n", sum);
      }
    show(ds_);
  }

 private:
  int64_t steps() const { return args_.rows.steps; }
  int64_t B() const { return args_.rows.batch; }
  int64_t I() const { return args_.inputs; }
  int64_t H() const { return args_.hidden; }
  int64_t G() const { return cell_.gates; }
  int64_t N() const { return cell_.params; }
  int64_t states() const { return cell_.states; }
  int64_t rows() const { return steps() * B(); }
  int64_t state_numbers() const { return B() * H(); }

  template <class N>
  static std::vector<N> read(int64_t count) {
    std::vector<N> numbers;
    for (int64_t k = 0; k < count; ++k) numbers.push_back(static_cast<N>(next_number()));
    return numbers;
  }
  template <class N>
  static void show(const std::vector<N>& numbers) {
    for (const N& each : numbers) std::printf("%.17g\n", static_cast<double>(each));
  }
  // An array for each recurrence, one behind the other.
  template <class N>
  static std::vector<void*> parts(std::vector<N>& numbers, int64_t count, int64_t each) {
    numbers.assign(count * each, N{});
    std::vector<void*> at;
    for (int64_t k = 0; k < count; ++k) at.push_back(numbers.data() + k * each);
    return at;
  }

  void read() {
    x_ = read<S>(rows() * I());
    for (int64_t p = 0; p < kDirections; ++p) {
      const auto keep = [&](int64_t count) {
        weights_.push_back(read<T>(count));
        return weights_.back().data();
      };
      Recurrence& one = recurrence_[p];
      one.reverse = p == 1;
      one.w_ih = keep(G() * H() * I());
      one.w_hh = keep(G() * H() * H());
      one.b_ih = keep(G() * H());
      one.b_hh = keep(G() * H());
      if (N() > 0) one.params = keep(N() * H());
      for (int64_t s = 0; s < states(); ++s) {
        states_.push_back(read<S>(state_numbers()));
        one.s0[s] = states_.back().data();
      }
    }
    dy_ = read<S>(rows() * kDirections * H());
    dlast_ = read<T>(kDirections * states() * state_numbers());
    args_.recurrence = recurrence_;
  }

  bool forward() {
    ForwardArgs args;
    static_cast<Scan&>(args) = args_;
    width_ = tape_values(states() - 1 + cell_.saved, cell_.rows, sizeof(T), sizeof(S), H());
    y_.assign(rows() * kDirections * H(), S{});
    tape_.assign(rows() * kDirections * width_ * H(), S{});
    const std::vector<void*> last = parts(last_, kDirections * states(), state_numbers());
    args.x = x_.data();
    args.x_step = B() * I();
    args.x_row = I();
    args.y = y_.data();
    args.tape = tape_.data();
    args.final_states = last.data();
    return cell_.forward[format_](args, plan_);
  }

  bool backward() {
    BackwardArgs args;
    GradientArgs products;
    static_cast<Scan&>(args) = args_;
    static_cast<Scan&>(products) = args_;
    const int64_t P = kDirections, most = plan_.chunk_rows, depth = G() * H();
    std::vector<T> du, dv, h_prev, operands;
    const auto chunk = [&](std::vector<T>& to, int64_t width) {
      return parts(to, P, most * width);
    };
    const std::vector<void*> dus = chunk(du, depth), dvs = chunk(dv, depth),
                             h_prevs = chunk(h_prev, H()),
                             sites = chunk(operands, cell_.sites * H());
    const bool summed = cell_.summed + 1 == 1u << cell_.gates;
    args.du = summed ? dvs.data() : dus.data();
    args.dv = dvs.data();
    args.h_prev = h_prevs.data();
    args.operands = sites.data();
    std::vector<T> recurrent(prepacked_for_backward(args, G())),
        inputs(P * prepacked_width(I()) * depth);
    int32_t prepacked_for = 0;
    args.prepacked = recurrent.data();
    args.prepacked_for = &prepacked_for;
    args.dy = dy_.data();
    args.y = y_.data();
    args.tape = tape_.data();
    const std::vector<void*> ds = parts(ds_, P * states(), state_numbers()),
                             dp = parts(dp_, P, B() * N() * H());
    ds_.assign(dlast_.begin(), dlast_.end());  // as many numbers, so they stay where they are
    args.ds = ds.data();
    if (N() > 0) args.dp = dp.data();

    products.depth = products.recurrent_depth = depth;  // every gate has rows in both
    products.prepacked = inputs.data();
    products.x = x_.data();
    products.x_step = B() * I();
    products.x_row = I();
    products.du = args.du;
    products.dv = args.dv;
    products.h_prev = args.h_prev;
    products.operands = args.operands;
    products.sites = cell_.sites;
    products.site_of = cell_.site_of;
    products.tape = tape_.data();
    products.tape_width = width_;
    const std::vector<void*> dw_ih = parts(dw_ih_, P, depth * I()),
                             dw_hh = parts(dw_hh_, P, depth * H()), db_ih = parts(db_ih_, P, depth),
                             db_hh = parts(db_hh_, P, depth);
    dx_.assign(rows() * I(), T{});
    products.dw_ih = dw_ih.data();
    products.dw_hh = dw_hh.data();
    products.db_ih = db_ih.data();
    products.db_hh = summed ? nullptr : db_hh.data();
    products.dx = dx_.data();
    const auto gradients = fastrnn_cells_baseline().gradients[format_];
    bool late = false;
    args.late = products.late = &late;
    for (int64_t end = steps(); end > 0; end = args.begin) {
      args.begin = products.begin = end > kChunk ? end - kChunk : 0;
      args.end = products.end = end;
      // As in the binding: a team that broke up may have left weights half packed.
      const CpuPlan now = late ? plan_.on_one_thread() : plan_;
      if (!cell_.backward[format_](args, now) || !gradients(products, now)) return false;
    }
    return true;
  }

  const CompiledCell& cell_;
  const int format_;
  CpuPlan plan_;
  Scan args_;
  Recurrence recurrence_[kDirections];
  int64_t width_ = 0;
  std::vector<std::vector<T>> weights_;
  std::vector<std::vector<S>> states_;
  std::vector<S> x_, dy_, y_, tape_, last_;
  std::vector<T> dlast_, dx_, dw_ih_, dw_hh_, db_ih_, db_hh_, dp_, ds_;
};

template <class T, class S>
int run(const CompiledCell& cell, Format format, Storage storage, const CpuPlan& plan,
        const int64_t* sizes) {
  Sweeps<T, S> sweeps(cell, format, storage, plan, sizes);
  if (!sweeps.run()) return 1;
  sweeps.print();
  return 0;
}

}  // namespace

int main(int, char** argument) {
  int64_t number[10];
  for (int k = 0; k < 10; ++k) number[k] = std::atoll(argument[k + 2]);
  const auto format = static_cast<Format>(number[0]);
  const auto storage = static_cast<Storage>(number[1]);
  CpuPlan plan;
  plan.weights = static_cast<WeightLayout>(number[2]);
  plan.split_recurrences = static_cast<int32_t>(number[3]);
  plan.split_sequences = static_cast<int32_t>(number[4]);
  plan.split_units = static_cast<int32_t>(number[5]);
  const CompiledCells all = fastrnn_cells_baseline();
  for (int32_t k = 0; k < all.count; ++k) {
    const CompiledCell& cell = all.cells[k];
    if (std::strcmp(cell.name, argument[1]) != 0) continue;
    if (format == Format::kDouble)
      return run<double, double>(cell, format, storage, plan, number + 6);
    if (storage == Storage::kBfloat16)
      return run<float, Bfloat16>(cell, format, storage, plan, number + 6);
    return run<float, float>(cell, format, storage, plan, number + 6);
  }
  return 1;
}
