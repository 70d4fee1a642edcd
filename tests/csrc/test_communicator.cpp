// The Communicator itself, without Python: every kind with every algorithm, operations that
// overlap, symmetric memory; all results exact. Built with a sanitizer it shows races and memory
// errors that no test of the Python layer could.
#include "elements.h"

namespace ringreduce {
namespace {

template <class T>
void allreduces(Rank& self, size_t count, int salt) {
  for (const Op op : {Op::sum, Op::max}) {
    const std::vector<T> expected = reduced<T>(op, self.size, count, salt);
    const std::vector<T> input = input_of<T>(self.rank, count, salt);
    std::vector<T> output(count);
    self.run(call_of(Kind::allreduce, input.data(), output.data(), {length(count)}, op));
    require_equal(output.data(), expected, "allreduce");
    output = input;
    self.run(call_of(Kind::allreduce, output.data(), output.data(), {length(count)}, op));
    require_equal(output.data(), expected, "allreduce in place");
  }
}

/// Three tensors as one message.
template <class T>
void grouped_allreduce(Rank& self, size_t count, int salt) {
  Call call;
  call.kind = Kind::allreduce;
  call.dtype = Element<T>::dtype;
  std::vector<std::vector<T>> tensors;
  const size_t counts[] = {count / 3, 1, count - count / 3};
  for (const size_t each : counts) tensors.push_back(input_of<T>(self.rank, each, salt));
  for (std::vector<T>& each : tensors) {
    call.tensors.push_back(tensor_of(each.data(), each.data(), {length(each.size())}));
  }
  self.run(std::move(call));
  for (std::vector<T>& each : tensors) {
    require_equal(each.data(), reduced<T>(Op::sum, self.size, each.size(), salt), "grouped");
  }
}

template <class T>
void reduce_scatter(Rank& self, size_t rows, int salt) {
  const size_t columns = 3;
  const std::vector<size_t> offsets = split_rows(rows, columns, self.size);
  const size_t begin = offsets[static_cast<size_t>(self.rank)];
  const size_t count = offsets[static_cast<size_t>(self.rank) + 1] - begin;
  const std::vector<T> input = input_of<T>(self.rank, rows * columns, salt);
  std::vector<T> output(count);
  Call call = call_of(Kind::reduce_scatter, input.data(), output.data(), {length(rows), 3});
  call.tensors[0].output_layout.shape[0] = length(count / columns);
  self.run(std::move(call));
  require_equal(output.data(), reduced<T>(Op::sum, self.size, count, salt, begin),
                "reduce_scatter");
}

/// Every rank has one row more than the one before it.
template <class T>
void allgather(Rank& self, size_t rows, int salt) {
  const auto rows_of = [&](int rank) { return rows + static_cast<size_t>(rank); };
  const std::vector<T> input = input_of<T>(self.rank, rows_of(self.rank) * 2, salt);
  const auto work =
      self.run(call_of<T>(Kind::allgather, input.data(), nullptr, {length(rows_of(self.rank)), 2}));
  const T* output = reinterpret_cast<const T*>(work->output.get());
  for (int rank = 0; rank < self.size; ++rank) {
    require(work->counts[static_cast<size_t>(rank)] == rows_of(rank), "counts of allgather");
    require_equal(output, input_of<T>(rank, rows_of(rank) * 2, salt), "allgather");
    output += rows_of(rank) * 2;
  }
}

template <class T>
void rooted(Rank& self, size_t count, int salt) {
  const int root = salt % self.size;
  std::vector<T> values = input_of<T>(self.rank, count, salt);
  self.run(call_of(Kind::broadcast, values.data(), values.data(), {length(count)}, Op::sum, root));
  require_equal(values.data(), input_of<T>(root, count, salt), "broadcast");
  values = input_of<T>(self.rank, count, salt);
  std::vector<T> output(count);
  T* target = self.rank == root ? output.data() : nullptr;
  self.run(call_of(Kind::reduce, values.data(), target, {length(count)}, Op::sum, root));
  if (target) require_equal(target, reduced<T>(Op::sum, self.size, count, salt), "reduce");
}

template <class T>
void every_kind(Rank& self, size_t count, int salt) {
  allreduces<T>(self, count, salt);
  grouped_allreduce<T>(self, count, salt);
  reduce_scatter<T>(self, count / 3, salt);
  allgather<T>(self, count / 8, salt);
  rooted<T>(self, count, salt);
  self.barrier();
}

void collectives(Rank& self) {
  int salt = 0;
  for (const size_t count : {size_t{0}, size_t{1}, size_t{7}, size_t{1000}, size_t{40'009}}) {
    every_kind<float>(self, count, ++salt);
    every_kind<bf16>(self, count, ++salt);
    every_kind<int64_t>(self, count, ++salt);
  }
  every_kind<float>(self, 1'500'007,
                    ++salt);  // more than the staging holds: all its slots turn over
}

// ---- Operations that overlap.

/// Asynchronous and blocking calls mixed, and waits in another order than the calls.
void asynchronous(Rank& self) {
  std::mt19937 common(4711);  // sizes: the same on all ranks
  for (int repetition = 0; repetition < 6; ++repetition) {
    std::vector<std::vector<float>> values;
    std::vector<std::shared_ptr<Work>> works;
    for (int index = 0; index < 12; ++index) {
      const size_t count = common() % 2 ? common() % 50 : common() % 60'000;
      values.push_back(input_of<float>(self.rank, count, index));
      float* data = values.back().data();
      Call call = call_of(Kind::allreduce, data, data, {length(count)});
      works.push_back(common() % 4 ? self.start(std::move(call)) : self.run(std::move(call)));
    }
    std::vector<size_t> order(works.size());
    for (size_t index = 0; index < order.size(); ++index) order[index] = index;
    std::shuffle(order.begin(), order.end(), self.random);
    for (const size_t index : order) {
      self.finish(*works[index]);
      const size_t count = values[index].size();
      require_equal(values[index].data(),
                    reduced<float>(Op::sum, self.size, count, static_cast<int>(index)), "async");
    }
  }
}

/// Nobody keeps an operation that has ended well, least of all with the result of an allgather,
/// though no blocking call comes that would look for errors.
void released(Rank& self) {
  const int64_t x = self.rank;
  for (int repetition = 0; repetition < 3; ++repetition) {
    std::shared_ptr<Work> work = self.start(call_of<int64_t>(Kind::allgather, &x, nullptr, {1}));
    self.finish(*work);
    const std::weak_ptr<Work> kept = std::exchange(work, nullptr);
    const Deadline limit = Deadline::after_s(10);
    while (!kept.expired()) {
      require(!limit.passed(now_ns()), "an operation that has ended is kept");
      std::this_thread::yield();
    }
  }
}

/// Two communicators at work at once, each on a thread of its own.
void side_by_side(Rank& self) {
  Rank other{self.rank,
             self.size,
             self.exchange,
             self.options,
             self.open_network,
             std::mt19937(self.random()),
             {}};
  other.comm = self.open();
  std::thread thread([&other] {
    for (int salt = 0; salt < 15; ++salt) allreduces<float>(other, 5'000, salt);
  });
  for (int salt = 0; salt < 15; ++salt) allreduces<int64_t>(self, 5'000, salt);
  thread.join();
}

/// Symmetric blocks: alone, beside private memory, freed at different times, used after the close.
void symmetric(Rank& self) {
  std::shared_ptr<Block> kept;
  for (int salt = 0; salt < 12; ++salt) {
    const size_t count = salt % 3 == 0 ? 300'001 : 2'000;
    const std::shared_ptr<Block> block = self.comm->allocate(count * sizeof(float), -1, {});
    const std::vector<float> input = input_of<float>(self.rank, count, salt);
    std::vector<float> other = input;
    float* data = reinterpret_cast<float*>(block->data());
    std::copy(input.begin(), input.end(), data);
    const bool only_some = salt % 4 == 3 && self.rank == 0;  // then all go through staging
    float* used = only_some ? other.data() : data;
    self.run(call_of(Kind::allreduce, used, used, {length(count)}));
    require_equal(used, reduced<float>(Op::sum, self.size, count, salt), "symmetric allreduce");
    if (self.chance(3)) kept = block;
  }
  self.comm->close();
  if (kept) std::memset(kept->data(), 1, 8);
}

/// A flag that lies idle while collectives of other kinds go on is behind, however far they come.
void idle_flag() {
  Flag flag;
  for (int bits = 0; bits < 62; ++bits) {
    const uint64_t number = uint64_t{1} << bits;
    flag.publish(number);
    require(flag.reached(number) && flag.value() == number, "a flag that was published");
    for (int later = bits; later < 62; ++later) {
      require(!flag.reached((uint64_t{1} << later) + number + 1), "an idle flag seems to be ahead");
    }
  }
}

void run_all(int size) {
  for (int algorithm = 0; algorithm < 5; ++algorithm) {
    announce(algorithm_names[algorithm], size);
    Options options;
    options.algorithm = static_cast<Algorithm>(algorithm);
    run_ranks(size, options, collectives);
    run_ranks(size, options, asynchronous);
  }
  run_ranks(size, {}, released);
  announce("side by side, symmetric", size);
  run_ranks(size, {}, side_by_side);
  run_ranks(size, {}, symmetric);
}

/// Ranks that take themselves to be on several hosts: one each, in order, mixed, unequal.
void run_across_hosts() {
  const std::vector<std::vector<std::string>> layouts = {
      {"a", "b"}, {"a", "b", "b"}, {"a", "a", "b", "b"}, {"a", "b", "c", "b", "b", "c", "c"}};
  for (const std::vector<std::string>& hosts : layouts) {
    const int size = static_cast<int>(hosts.size());
    for (const Algorithm algorithm : {Algorithm::automatic, Algorithm::ring, Algorithm::tree}) {
      announce("across hosts", size);
      Options options;
      options.algorithm = algorithm;
      run_ranks(size, options, collectives, hosts);
      run_ranks(size, options, asynchronous, hosts);
    }
    run_ranks(size, {}, side_by_side, hosts);
    run_ranks(size, {}, symmetric, hosts);
  }
}

}  // namespace
}  // namespace ringreduce

int main() {
  alarm(ringreduce::limit_s);
  ringreduce::pin_to_two_cores();
  ringreduce::idle_flag();
  for (const int size : {1, 2, 3, 4, 7}) ringreduce::run_all(size);
  ringreduce::run_across_hosts();
}
