// GPU memory handed to an MPI that takes it (pretended, both of them): what comes out, bit for bit;
// what went over the wire, and from where; who agrees on it; and ranks that fail in the middle,
// while a device is at work and messages are under way.
#include <cuda_runtime.h>

#include "gpu_ranks.h"
#include "kernel_values.h"
#include "net/wire.h"

namespace ringreduce {
namespace {

bool is_on_device(const void* data) {
  cudaPointerAttributes attributes;
  require_cuda(cudaPointerGetAttributes(&attributes, data));
  return attributes.type == cudaMemoryTypeDevice;
}

using Hosts = std::vector<std::string>;

/// Every host has a device of its own, which its ranks share.
void run_on(const Hosts& hosts, const std::function<void(Rank&)>& body,
            bool (*takes)(const void*) = is_on_device) {
  const auto on_its_device = [&](Rank& self) {
    device_number = hosts[static_cast<size_t>(self.rank)][0] - 'a';
    body(self);
  };
  run_ranks(static_cast<int>(hosts.size()), {}, on_its_device, hosts, takes);
  graveyard.clear();
}

size_t sent_from_device(const Rank& self) {
  return self.network->bytes_sent_from_device(self.rank);
}

/// What this rank sends of one allreduce that goes directly, by the formulas of the ring.
size_t expected_bytes(const Rank& self, Dtype dtype, size_t count) {
  const Core& core = self.comm->core();
  const Cluster& cluster = *core.cluster;
  if (!cluster.carries()) return 0;
  const size_t chunk = core.tuner.direct_chunk(count, cluster.shape(), dtype);
  require(chunk > 0, "too small to be sent from a device");
  const size_t shard =
      Rails{cluster.rails(), count, count, line_bytes}.shard(0, core.group.rank()).length;
  const Blocks blocks = Blocks::even(shard, cluster.nodes(), line_bytes);
  return ring_allreduce_cost(blocks, chunk, cluster.node()).moved.bytes(dtype);
}

template <class T>
void sums(Rank& self, size_t count, int salt, bool direct) {
  Device device;
  const std::vector<T> mine = input_of<T>(self.rank, count, salt);
  const std::vector<T> sum = reduced<T>(Op::sum, self.size, count, salt);
  T* const input = device.copy_of(mine);
  T* const output = device.empty<T>(count);
  const size_t before = sent_from_device(self);
  self.run(on(device, Kind::allreduce, input, output, {length(count)}));
  require_equal(device.get(output, count).data(), sum, "sum");
  require_equal(device.get(input, count).data(), mine, "the input of a sum");
  const size_t expected = direct ? expected_bytes(self, Element<T>::dtype, count) : 0;
  require(sent_from_device(self) - before == expected,
          "rank " + std::to_string(self.rank) + " sent " +
              std::to_string(sent_from_device(self) - before) + " bytes from its device, not " +
              std::to_string(expected));
  self.run(on(device, Kind::allreduce, input, input, {length(count)}, Op::max));
  require_equal(device.get(input, count).data(), reduced<T>(Op::max, self.size, count, salt),
                "in place");
  self.run(on(device, Kind::broadcast, output, output, {length(count)}, Op::sum, 1));
  require_equal(device.get(output, count).data(), sum, "a broadcast");
}

void results(Rank& self) {
  sums<float>(self, 1000, 1, false);  // small: the host is sooner
  for (const size_t count : {size_t{300'007}, size_t{1'000'000}}) {
    sums<float>(self, count, 2, true);
    sums<bf16>(self, count, 3, true);
    sums<int64_t>(self, count, 4, true);
    self.barrier();
  }
}

/// Every dtype, and of the ops one or two: small integers, which are combined alike in any order.
void dtypes(Rank& self) {
  Device device;
  cuda::Random random(7);
  for (int number = 0; number < num_dtypes * num_ops; number += 3) {
    const auto dtype = static_cast<Dtype>(number / num_ops);
    const auto op = static_cast<Op>(number % num_ops);
    if (!supports(op, dtype)) continue;
    const size_t count = 600'000 / size_of(dtype) + 1;
    std::vector<std::vector<char>> values;
    for (int rank = 0; rank < self.size; ++rank) {
      values.push_back(cuda::small_integers(dtype, count, random));
    }
    char* const data = device.copy_of(values[static_cast<size_t>(self.rank)]);
    Call call;
    call.kind = Kind::allreduce;
    call.op = op;
    call.dtype = dtype;
    const Layout layout{{length(count)}, {}, size_of(dtype)};
    call.tensors = {{data, data, layout, layout}};
    call.device = device_number;
    call.stream = device.stream();
    const size_t before = sent_from_device(self);
    self.run(call);
    const std::string what = std::string(name_of(op)) + " of " + name_of(dtype);
    require(sent_from_device(self) - before == expected_bytes(self, dtype, count),
            what + " went by another way");
    require(cuda::same(dtype, device.get(data, count * size_of(dtype)),
                       cuda::expected(dtype, op, count, values)),
            what + " is wrong");
  }
}

/// Means of 16-bit floats are rounded once: 1 + 2^-8 is lost in a bfloat16, twice that is not.
void means(Rank& self) {
  Device device;
  const size_t count = 300'000;
  const bf16 one = to_bf16(1.0f), little = to_bf16(0x1p-8f);
  const std::vector<bf16> mine(count, self.rank == self.size - 1 ? one : little);
  bf16* const data = device.copy_of(mine);
  self.run(on(device, Kind::allreduce, data, data, {length(count)}, Op::avg));
  require(sent_from_device(self) == expected_bytes(self, Dtype::bf16, count), "by another way");
  const auto size = static_cast<float>(self.size);
  const bf16 mean = to_bf16((1.0f + (size - 1) * 0x1p-8f) / size);
  require_equal(device.get(data, count).data(), std::vector<bf16>(count, mean), "a mean");
}

/// More 16-bit floats than can be widened at once.
void large(Rank& self) {
  Device device;
  const size_t count = 8'500'000;
  bf16* const data = device.copy_of(input_of<bf16>(self.rank, count, 1));
  self.run(on(device, Kind::allreduce, data, data, {length(count)}));
  require_equal(device.get(data, count).data(), reduced<bf16>(Op::sum, self.size, count, 1),
                "a large sum");
}

/// Floats whose sum depends on the order: all ranks have the same bits, and again the next time.
void bits(Rank& self) {
  Device device;
  const size_t count = 300'001;
  std::vector<float> values(count);
  for (float& value : values) {
    value = std::ldexp(static_cast<float>(self.below(1 << 20)), self.below(30) - 15);
  }
  float* const input = device.copy_of(values);
  // Not at the start of a pack.
  float* const output = device.empty<float>(count + 1) + 1;
  std::string first;
  for (size_t round = 0; round < 2; ++round) {
    self.run(on(device, Kind::allreduce, input, output, {length(count)}));
    require(sent_from_device(self) == (round + 1) * expected_bytes(self, Dtype::f32, count),
            "by another way");
    const std::vector<float> sum = device.get(output, count);
    const std::string text(reinterpret_cast<const char*>(sum.data()), count * sizeof(float));
    for (const std::string& theirs : self.exchange(text)) {
      require(theirs == text, "other bits on another rank");
    }
    require(first.empty() || first == text, "other bits in another run");
    first = text;
  }
}

/// The input comes late on the caller's stream, and the output is overwritten at once afterwards.
void stream_order(Rank& self) {
  Device device;
  const size_t count = 150'000, bytes = count * sizeof(float);
  float* const values = device.copy_of(input_of<float>(self.rank, count, 5));
  float* const zeros = device.copy_of(std::vector<float>(count));
  float* const data = device.copy_of(std::vector<float>(count, 99.0f));
  float* const kept = device.empty<float>(count);
  const auto copy = [&](float* to, const float* from) {
    require_cuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, device.stream()));
  };
  require_cuda(cudaLaunchHostFunc(device.stream(), [](void*) { usleep(20'000); }, nullptr));
  copy(data, values);
  self.run(on(device, Kind::allreduce, data, data, {length(count)}));
  copy(kept, data);
  copy(data, zeros);
  require_equal(device.get(kept, count).data(), reduced<float>(Op::sum, self.size, count, 5),
                "in the order of the stream");
}

void asynchronous(Rank& self) {
  Device device;
  std::vector<std::pair<float*, size_t>> values;
  std::vector<std::shared_ptr<Work>> works;
  for (int index = 0; index < 6; ++index) {
    const size_t count = index % 3 == 2 ? 500 : 150'000 + static_cast<size_t>(index);
    float* const data = device.copy_of(input_of<float>(self.rank, count, index));
    values.push_back({data, count});
    Call call = on(device, Kind::allreduce, data, data, {length(count)});
    if (index != 4) call.after = cuda::record(device_number, device.stream());
    works.push_back(index == 4 ? self.run(call) : self.start(std::move(call)));
  }
  for (size_t index = 0; index < works.size(); ++index) {
    self.finish(*works[index]);
    if (works[index]->event) works[index]->event->hold_back(device.stream());
    const auto [data, count] = values[index];
    require_equal(device.get(data, count).data(),
                  reduced<float>(Op::sum, self.size, count, static_cast<int>(index)),
                  "asynchronous");
  }
}

/// Two communicators of the same ranks, and what is left of one when the other is closed.
void several(Rank& self) {
  Device device;
  const size_t count = 150'000;
  std::unique_ptr<Communicator> other = self.open();
  std::vector<float*> values;
  std::vector<std::pair<Communicator*, std::shared_ptr<Work>>> works;
  const auto start = [&](Communicator& comm) {
    const auto salt = static_cast<int>(values.size());
    values.push_back(device.copy_of(input_of<float>(self.rank, count, salt)));
    Call call = on(device, Kind::allreduce, values.back(), values.back(), {length(count)});
    call.after = cuda::record(device_number, device.stream());
    self.dawdle();
    works.emplace_back(&comm, comm.start(std::move(call)));
  };
  const auto finish = [&] {
    for (const auto& [comm, work] : works) {
      comm->wait(*work, Deadline::never(), {});
      work->event->hold_back(device.stream());
    }
    works.clear();
    for (size_t salt = 0; salt < values.size(); ++salt) {
      require_equal(device.get(values[salt], count).data(),
                    reduced<float>(Op::sum, self.size, count, static_cast<int>(salt)),
                    "with several communicators");
    }
  };
  for (int round = 0; round < 3; ++round) {
    start(*self.comm);
    start(*other);
  }
  finish();
  other->close();
  start(*self.comm);
  finish();
}

/// Nothing is sent before all ranks mean the same.
void mismatches(Rank& self) {
  Device device;
  const size_t count = 150'000;
  const std::vector<float> input = input_of<float>(self.rank, count, 1);
  float* const data = device.copy_of(input);
  self.run(on(device, Kind::allreduce, data, data, {length(count)}, Op::min));
  device.put(data, input);
  const size_t before = sent_from_device(self);
  Call call = on(device, Kind::allreduce, data, data, {length(count)});
  if (self.rank == 1) call.op = Op::prod;
  error_of(ErrorCode::mismatch, [&] { self.run(call); });
  require_equal(device.get(data, count).data(), input, "the operand of a mismatch");
  require(sent_from_device(self) == before, "data were sent before the ranks agreed");
  self.run(on(device, Kind::allreduce, data, data, {length(count)}));
  require_equal(device.get(data, count).data(), reduced<float>(Op::sum, self.size, count, 1),
                "after a mismatch");
}

void capture(Rank& self) {
  Device device;
  float* const data = device.copy_of(std::vector<float>(100));
  self.run(on(device, Kind::allreduce, data, data, {100}));
  require_cuda(cudaStreamBeginCapture(device.stream(), cudaStreamCaptureModeThreadLocal));
  const Call call = on(device, Kind::allreduce, data, data, {100});
  require_in("several nodes", error_of(ErrorCode::invalid, [&] { self.run(call); }));
  cudaGraph_t graph = nullptr;
  require_cuda(cudaStreamEndCapture(device.stream(), &graph));
  require_cuda(cudaGraphDestroy(graph));
}

// ---- Who agrees.

/// An MPI that does not take device memory, over one that would.
class Plain final : public Mpi {
 public:
  explicit Plain(std::shared_ptr<Mpi> mpi) : Mpi(mpi->max_tag), mpi_(std::move(mpi)) {}
  void isend(const void* data, size_t bytes, int to, int tag, Request& request) override {
    require(!is_on_device(data), "device memory for an MPI that does not take it");
    mpi_->isend(data, bytes, to, tag, request);
  }
  void irecv(void* data, size_t bytes, int from, int tag, Request& request) override {
    require(!is_on_device(data), "device memory for an MPI that does not take it");
    mpi_->irecv(data, bytes, from, tag, request);
  }
  bool test(Request& request, size_t* bytes) override { return mpi_->test(request, bytes); }
  bool cancel(Request& request) noexcept override { return mpi_->cancel(request); }

 private:
  const std::shared_ptr<Mpi> mpi_;
};

/// One rank's MPI is enough to keep all from it.
void one_is_plain(Rank& self) {
  if (self.rank == 1) {
    self.open_network = [&self] {
      return Network{std::make_shared<Plain>(self.network->rank(self.rank)), self.rank};
    };
  }
  self.comm->close();
  self.comm = self.open();
  sums<float>(self, 150'003, 1, false);
}

/// Rank 1 has no such device: its host tells the others, and all can try again.
void one_has_no_device(Rank& self) {
  {
    Device device;
    float* const data = device.copy_of(std::vector<float>(100));
    Call call = on(device, Kind::allreduce, data, data, {100});
    if (self.rank == 1) call.device = 7;
    self.exchange("all have their streams");
    // Communicators of before may still be going.
    const auto ranks = static_cast<size_t>(self.comm->core().size);
    while (fake_cuda::num_streams() != ranks) std::this_thread::yield();
    self.exchange("and there are no others");
    const std::string text = error_of(ErrorCode::resource, [&] { self.run(call); });
    require_in(self.rank == 0 ? "another host" : "no device cuda:7", text);
    self.exchange("all have failed");
    require(fake_cuda::num_streams() == ranks, "streams are left");
    self.exchange("and left none");
  }
  sums<float>(self, 150'003, 1, self.network->rank(self.rank)->takes_device_memory);
}

/// On host b kernels do not reach each other's memory: host a follows.
void one_host_has_no_path(Rank& self) {
  device_number = self.rank;
  sums<float>(self, 150'003, 1, false);
  require(self.comm->core().accelerator()->direct() == nullptr, "only some go directly");
}

/// A collective is traced under the number of its meeting, whatever steps of its own follow: in the
/// first one the ranks agree on the way, and a broadcast goes through the host.
void traced(Rank& self) {
  self.comm->close();
  self.options.trace = std::make_shared<Trace>();  // of this rank alone
  self.comm = self.open();
  self.options.trace->start();
  sums<float>(self, 150'003, 1, true);
  std::vector<uint64_t> numbers;
  for (const TraceRecord& record : self.options.trace->stop().records) {
    numbers.push_back(record.sequence);
  }
  require(numbers == std::vector<uint64_t>{1, 3, 4}, "collectives under other numbers");
  require(self.comm->core().sequence == 5, "steps that have no numbers");
}

// ---- The end.

/// All that a communicator had of the device has come back; in a process of several ranks, for the
/// next one.
void come_and_go(Rank& self) {
  size_t before = 0;
  for (int round = 0; round < 3; ++round) {
    sums<float>(self, 150'003, round, true);
    const std::weak_ptr<Core> core = self.comm->core().weak_from_this();
    self.comm->close();
    self.exchange("all have closed");
    require(self.network->num_pending() == 0, "messages are left");
    self.comm.reset();
    while (!core.expired()) std::this_thread::yield();
    self.exchange("all is torn down");
    if (self.rank == 0) graveyard.clear();
    self.exchange("and buried");
    if (round > 0) require(fake_cuda::allocated_bytes() == before, "device memory is left");
    before = fake_cuda::allocated_bytes();
    self.exchange("and counted");
    self.comm = self.open();
  }
}

enum class Failure { aborts, broken, interrupted };

/// Rank 0's device is busy with something else when the ranks have met and it has been given its
/// part, so the others are waiting for its data. Then rank 0 gives up, or rank 1's MPI breaks.
void fails(Rank& self, Failure failure) {
  Device device;
  const size_t count = 150'000;
  float* const data = device.copy_of(input_of<float>(self.rank, count, 1));
  self.run(on(device, Kind::allreduce, data, data, {length(count)}));
  device.synchronize();
  const size_t before = self.network->bytes_sent_from_device(1);
  self.barrier();
  const Call call = on(device, Kind::allreduce, data, data, {length(count)});
  const auto others_wait = [&] {
    return self.network->bytes_sent_from_device(1) > before &&
           fake_cuda::num_queued(device.stream()) > 0;
  };
  std::atomic<bool> busy{self.rank == 0};
  std::thread trouble;
  if (self.rank == 0) {
    const auto stay = [](void* flag) {
      while (static_cast<std::atomic<bool>*>(flag)->load()) usleep(100);
    };
    require_cuda(cudaLaunchHostFunc(device.stream(), stay, &busy));
    trouble = std::thread([&] {
      while (!others_wait()) usleep(100);
      if (failure == Failure::aborts) self.comm->abort("rank 0 has had enough");
      if (failure == Failure::broken) self.network->break_calls_of(1);
    });
  }
  const Interrupted ask = [&] { return failure == Failure::interrupted && others_wait(); };
  const bool broken_here = failure == Failure::broken && self.rank == 1;
  const ErrorCode code = broken_here ? ErrorCode::resource
                         : failure == Failure::interrupted && self.rank == 0
                             ? ErrorCode::interrupted
                             : ErrorCode::peer_failed;
  const std::string text = error_of(code, [&] {
    self.run(call, self.rank == 0 ? ask : Interrupted{});
    // Whoever carries nothing has only its kernels to wait for.
    require(!self.comm->core().cluster->carries(), "a collective that cannot end did");
    device.synchronize();
    while (!self.comm->core().group.aborted()) std::this_thread::yield();
    self.comm->check();
  });
  require_in(failure == Failure::aborts   ? "has had enough"
             : failure == Failure::broken ? "broken on purpose"
             : self.rank == 0             ? "interrupted"
                                          : "rank 0 was interrupted",
             text);
  if (trouble.joinable()) trouble.join();
  require(!busy || !self.comm->core().accelerator()->gpu().idle(), "what runs is forgotten");
  busy.store(false);
  device.synchronize();
}

/// Rank 0 has done its part and leaves, while others' devices are still at work.
void departures(Rank& self) {
  Device device;
  const size_t count = 150'000;
  float* const data = device.copy_of(input_of<float>(self.rank, count, 1));
  self.run(on(device, Kind::allreduce, data, data, {length(count)}));
  if (self.rank == 0) self.comm->close();
  require_equal(device.get(data, count).data(), reduced<float>(Op::sum, self.size, count, 1),
                "after a departure");
}

void run_all() {
  const Hosts pair = {"a", "b"}, unequal = {"a", "b", "b"}, square = {"a", "b", "a", "b"};
  for (const Hosts& hosts : {pair, unequal, square, Hosts{"a", "b", "c"}}) {
    announce("direct", static_cast<int>(hosts.size()));
    run_on(hosts, results);
    run_on(hosts, dtypes);
    run_on(hosts, means);
    run_on(hosts, bits);
  }
  for (const Hosts& hosts : {pair, unequal}) {
    announce("order, mismatches, ends", static_cast<int>(hosts.size()));
    run_on(hosts, stream_order);
    run_on(hosts, asynchronous);
    run_on(hosts, mismatches);
    run_on(hosts, capture);
    run_on(hosts, traced);
    run_on(hosts, departures);
    run_on(hosts, come_and_go);
    for (const Failure failure : {Failure::aborts, Failure::broken, Failure::interrupted}) {
      run_on(hosts, [failure](Rank& self) { fails(self, failure); });
    }
  }
  run_on(pair, several);
  run_on({"a", "b", "c"}, several);
  run_on(unequal, one_has_no_device);
  announce("large", 3);
  run_on(unequal, large);
  announce("not direct", 3);
  run_on(pair, [](Rank& self) { sums<float>(self, 150'003, 1, false); }, nullptr);
  run_on(unequal, one_is_plain);
  run_on(unequal, one_has_no_device, nullptr);
  fake_cuda::machine().peers = false;
  run_on(unequal, one_host_has_no_path);
}

}  // namespace
}  // namespace ringreduce

#ifdef __SANITIZE_ADDRESS__
/// What an abort leaves to MPI is never freed, and that is meant.
extern "C" __attribute__((visibility("default"))) const char* __lsan_default_suppressions() {
  return "leak:ringreduce::Links::find";
}
#endif

int main() {
  alarm(ringreduce::limit_s);
  ringreduce::pin_to_two_cores();
  fake_cuda::machine().devices = 3;
  ringreduce::run_all();
}
