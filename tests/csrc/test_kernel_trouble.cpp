// Kernels that follow each other without a pause, in graphs, and that meet with trouble: ranks that
// come with something else, late, or never.
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <thread>

#include "kernel_ranks.h"
#include "kernel_values.h"

namespace ringreduce::cuda {
namespace {

constexpr Kernel all_kernels[] = {Kernel::one_shot, Kernel::two_shot, Kernel::staged, Kernel::ring,
                                  Kernel::tree};

/// An allreduce of small integers, in place, that can be done again and again.
class Job {
 public:
  Job(KernelRanks& ranks, Kernel kernel, size_t count)
      : kernel_(kernel), calls_(ranks.calls(Dtype::i32, Op::sum, count)) {
    for (size_t rank = 0; rank < calls_.size(); ++rank) {
      buffers_.push_back(std::make_unique<Buffer>(count * sizeof(int32_t)));
    }
    for (DeviceCall& call : calls_) {
      call.input = call.output = buffers_[static_cast<size_t>(call.rank)]->data();
      for (size_t rank = 0; rank < calls_.size(); ++rank) {
        call.inputs[rank] = call.outputs[rank] = buffers_[rank]->data();
      }
    }
  }

  Kernel kernel() const { return kernel_; }
  DeviceCall& call(int rank) { return calls_[static_cast<size_t>(rank)]; }

  void fill(Random& random) {
    values_.clear();
    for (const auto& buffer : buffers_) {
      values_.push_back(random_bytes(Dtype::i32, calls_[0].count, random));
      buffer->fill(values_.back());
    }
  }
  void require_done(const std::string& what) const {
    const std::vector<char> right = expected(Dtype::i32, Op::sum, calls_[0].count, values_);
    for (const auto& buffer : buffers_) {
      require(buffer->read() == right && buffer->guards_intact(), what + ": wrong");
    }
  }
  void require_untouched(const std::string& what) const {
    for (size_t rank = 0; rank < buffers_.size(); ++rank) {
      require(buffers_[rank]->read() == values_[rank], what + ": has written");
    }
  }

 private:
  Kernel kernel_;
  std::vector<DeviceCall> calls_;
  std::vector<std::unique_ptr<Buffer>> buffers_;
  std::vector<std::vector<char>> values_;
};

size_t random_count(Kernel kernel, Random& random) {
  const size_t most = kernel == Kernel::one_shot ? one_shot_largest_bytes / 4 : 40000;
  return random() % 3 == 0 ? random() % 9 : random() % most;
}

using Jobs = std::vector<std::unique_ptr<Job>>;

Jobs random_jobs(KernelRanks& ranks, int count, Random& random) {
  Jobs jobs;
  for (int i = 0; i < count; ++i) {
    const Kernel kernel = all_kernels[random() % 5];
    jobs.push_back(std::make_unique<Job>(ranks, kernel, random_count(kernel, random)));
  }
  return jobs;
}

/// Rank by rank, so that some are far ahead of others; nobody waits between two calls.
void test_many_calls(int size, Random& random) {
  KernelRanks ranks(size);
  for (int batch = 0; batch < 3; ++batch) {
    const Jobs jobs = random_jobs(ranks, 25, random);
    for (const auto& job : jobs) job->fill(random);
    for (int rank = 0; rank < size; ++rank) {
      for (const auto& job : jobs) ranks.launch(job->kernel(), job->call(rank));
    }
    ranks.wait();
    ranks.require_no_trouble("many calls");
    for (const auto& job : jobs) job->require_done("many calls");
  }
}

void test_graphs(int size, Random& random) {
  KernelRanks ranks(size);
  const Jobs jobs = random_jobs(ranks, 8, random);
  std::vector<cudaGraphExec_t> graphs;
  for (int rank = 0; rank < size; ++rank) {
    cudaGraph_t graph;
    check(cudaStreamBeginCapture(ranks[rank].stream, cudaStreamCaptureModeGlobal));
    for (const auto& job : jobs) ranks.launch(job->kernel(), job->call(rank));
    check(cudaStreamEndCapture(ranks[rank].stream, &graph));
    graphs.emplace_back();
    check(cudaGraphInstantiate(&graphs.back(), graph, 0));
    check(cudaGraphDestroy(graph));
  }
  for (int replay = 0; replay < 3; ++replay) {
    for (const auto& job : jobs) job->fill(random);
    for (int rank = 0; rank < size; ++rank) {
      check(cudaGraphLaunch(graphs[static_cast<size_t>(rank)], ranks[rank].stream));
    }
    ranks.wait();
    ranks.require_no_trouble("graphs");
    for (const auto& job : jobs) job->require_done("graphs");
  }
  for (cudaGraphExec_t graph : graphs) check(cudaGraphExecDestroy(graph));
}

/// One rank comes with another digest, and with another kernel or another length. Nobody writes,
/// everybody knows with whom there is trouble, and the next call is as good as ever.
void test_mismatch(int size, Kernel kernel, Kernel other, Random& random) {
  KernelRanks ranks(size);
  const std::string what = "mismatch of kernels " + std::to_string(static_cast<int>(kernel)) +
                           " and " + std::to_string(static_cast<int>(other));
  const int odd = static_cast<int>(random() % static_cast<unsigned>(size));
  Job many(ranks, kernel, 10000), few(ranks, other, 10);
  for (int round = 0; round < 3; ++round) {
    many.fill(random);
    few.fill(random);
    for (int rank = 0; rank < size; ++rank) {
      DeviceCall call = rank == odd ? few.call(rank) : many.call(rank);
      call.digest += rank == odd ? 1 : 0;
      ranks.launch(rank == odd ? other : kernel, call);
    }
    ranks.wait();
    many.require_untouched(what);
    few.require_untouched(what);
    for (int rank = 0; rank < size; ++rank) {
      Status& status = *ranks[rank].status;
      require(status.trouble == static_cast<uint32_t>(Trouble::mismatch), what + ": not noticed");
      require((static_cast<int>(status.peer) == odd) != (rank == odd), what + ": the wrong rank");
      status.trouble = 0;
    }
    for (int rank = 0; rank < size; ++rank) ranks.launch(kernel, many.call(rank));
    ranks.wait();
    ranks.require_no_trouble(what);
    many.require_done(what + ", the call after it");
  }
}

/// A rank that never comes is named by all others, which leave, and do nothing from then on.
void test_timeout(int size, Kernel kernel, Random& random) {
  KernelRanks ranks(size);
  const int missing = static_cast<int>(random() % static_cast<unsigned>(size));
  Job job(ranks, kernel, 5000);
  job.fill(random);
  for (int rank = 0; rank < size; ++rank) {
    job.call(rank).timeout_ns = 50 * 1000000;
    if (rank != missing) ranks.launch(kernel, job.call(rank));
  }
  ranks.wait();
  for (int rank = 0; rank < size; ++rank) ranks.launch(kernel, job.call(rank));
  ranks.wait();
  job.require_untouched("timeout");
  for (int rank = 0; rank < size; ++rank) {
    const Status& status = *ranks[rank].status;
    require(status.trouble == static_cast<uint32_t>(Trouble::timeout), "no timeout");
    if (rank == missing) continue;
    require(static_cast<int>(status.peer) == missing, "a timeout names the wrong rank");
    require(status.begun == status.left, "a kernel has not left");
  }
}

void test_abort(int size, Kernel kernel, Random& random) {
  KernelRanks ranks(size);
  Job job(ranks, kernel, 5000);
  job.fill(random);
  for (int rank = 1; rank < size; ++rank) ranks.launch(kernel, job.call(rank));
  Status& status = *ranks[1].status;
  while (std::atomic_ref(status.begun).load() == std::atomic_ref(status.left).load()) {
    std::this_thread::yield();
  }
  require(cudaStreamQuery(ranks[1].stream) == cudaErrorNotReady, "nobody waits");
  for (int rank = 0; rank < size; ++rank) {
    std::atomic_ref(ranks[rank].status->abort).store(1);
  }
  ranks.wait();
  job.require_untouched("abort");
  for (int rank = 0; rank < size; ++rank) {
    require(ranks[rank].status->trouble == 0, "an abort is no trouble");
  }
}

void test_all() {
  Random random(2);
  for (int size : {2, 3, 4, 8}) {
    test_many_calls(size, random);
    test_graphs(size, random);
  }
  for (Kernel kernel : all_kernels) {
    for (Kernel other : all_kernels) test_mismatch(3, kernel, other, random);
    test_timeout(3, kernel, random);
    test_abort(2, kernel, random);
  }
}

}  // namespace
}  // namespace ringreduce::cuda

int main() {
  alarm(300);
  setenv("FAKE_CUDA_DELAY_US", "200", 0);
  ringreduce::cuda::test_all();
  std::printf("kernels in trouble: good\n");
  return 0;
}
