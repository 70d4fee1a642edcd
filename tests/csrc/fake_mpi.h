// An Mpi for ranks that are threads of one program, as unkind as the standard allows: operations
// take a random number of tests, end out of order, and a long send is copied as late as possible.
// Messages between two ranks with one tag are matched in order. Ranks can be cut off, or broken.
#pragma once

#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <tuple>

#include "base/error.h"
#include "net/mpi_api.h"

namespace ringreduce {

class FakeNetwork {
 public:
  struct Settings {
    unsigned seed = 1;
    unsigned max_delay_tests = 0;  // an operation ends after 0 to so many tests that it could end
    size_t eager_bytes = 4096;     // up to here a send ends without its receive
    int max_tag = 32767;
    bool (*is_on_device)(const void*) = nullptr;  // given: it takes a GPU's memory
  };

  FakeNetwork() : FakeNetwork(Settings{}) {}
  explicit FakeNetwork(const Settings& settings) : settings_(settings), random_(settings.seed) {}

  /// What rank `rank` calls. The network must outlive it.
  std::shared_ptr<Mpi> rank(int rank) { return std::make_shared<RankMpi>(*this, rank); }

  /// From now on nothing arrives at the rank, or from it; its calls go on without an error.
  void cut(int rank) {
    const std::lock_guard lock(mutex_);
    cut_.insert(rank);
  }

  /// From now on each of the rank's calls throws, as when MPI finds its network broken.
  void break_calls_of(int rank) {
    const std::lock_guard lock(mutex_);
    broken_.insert(rank);
  }

  /// Of the rank's messages so far, whether they have arrived or not.
  size_t bytes_sent(int rank) {
    const std::lock_guard lock(mutex_);
    return bytes_sent_[rank];
  }

  /// Of those the ones that lay on a GPU.
  size_t bytes_sent_from_device(int rank) {
    const std::lock_guard lock(mutex_);
    return device_bytes_sent_[rank];
  }

  /// Operations that were started and have neither ended nor been cancelled.
  size_t num_pending() {
    const std::lock_guard lock(mutex_);
    return operations_.size();
  }

 private:
  using Key = std::tuple<int, int, int>;  // from, to, tag

  struct Operation {
    Key key;
    bool is_send = false;
    const char* source = nullptr;  // of a send, until it is copied
    std::string copy;              // of an eager send
    char* target = nullptr;        // of a receive
    size_t size_bytes = 0;         // of the message, or of the receive's memory
    size_t received_bytes = 0;
    unsigned delay_tests = 0;
    bool done = false;                   // a send's memory is its owner's again
    std::shared_ptr<Operation> message;  // the send that a receive was matched with
  };
  using Queue = std::deque<std::shared_ptr<Operation>>;

  class RankMpi final : public Mpi {
   public:
    RankMpi(FakeNetwork& network, int rank)
        : Mpi(network.settings_.max_tag, network.settings_.is_on_device != nullptr),
          network_(network),
          rank_(rank) {}

    void isend(const void* data, size_t size_bytes, int to, int tag, Request& request) override {
      auto send = std::make_shared<Operation>();
      send->is_send = true;
      send->source = static_cast<const char*>(data);
      send->key = {rank_, to, tag};
      network_.start(rank_, size_bytes, std::move(send), request);
    }
    void irecv(void* data, size_t capacity_bytes, int from, int tag, Request& request) override {
      auto receive = std::make_shared<Operation>();
      receive->target = static_cast<char*>(data);
      receive->key = {from, rank_, tag};
      network_.start(rank_, capacity_bytes, std::move(receive), request);
    }
    bool test(Request& request, size_t* received_bytes) override {
      return network_.test(rank_, request, received_bytes);
    }
    bool cancel(Request& request) noexcept override { return network_.cancel(request); }

   private:
    FakeNetwork& network_;
    const int rank_;
  };

  void start(int rank, size_t size_bytes, std::shared_ptr<Operation> operation,
             Mpi::Request& request) {
    const std::lock_guard lock(mutex_);
    require_working(rank, "a start");
    const int tag = std::get<2>(operation->key);
    if (size_bytes > Mpi::max_message_bytes || tag < 0 || tag > settings_.max_tag) {
      throw Error(ErrorCode::invalid, "a message or a tag that not every MPI takes");
    }
    operation->size_bytes = size_bytes;
    if (operation->is_send) bytes_sent_[rank] += size_bytes;
    if (operation->is_send && settings_.is_on_device && settings_.is_on_device(operation->source)) {
      device_bytes_sent_[rank] += size_bytes;
    }
    operation->delay_tests =
        static_cast<unsigned>(random_() % (uint64_t{settings_.max_delay_tests} + 1));
    if (operation->is_send && size_bytes <= settings_.eager_bytes) {
      operation->copy.assign(operation->source, size_bytes);
      operation->source = operation->copy.data();
      operation->done = true;
    }
    Queue& others = (operation->is_send ? receives_ : sends_)[operation->key];
    if (others.empty()) {
      (operation->is_send ? sends_ : receives_)[operation->key].push_back(operation);
    } else {
      const std::shared_ptr<Operation> other = others.front();
      others.pop_front();
      (operation->is_send ? other->message : operation->message) =
          operation->is_send ? operation : other;
    }
    request.handle = ++last_handle_;
    operations_[request.handle] = std::move(operation);
  }

  bool test(int rank, Mpi::Request& request, size_t* received_bytes) {
    if (!request) return true;
    const std::lock_guard lock(mutex_);
    require_working(rank, "a test");
    const std::shared_ptr<Operation> operation = operations_.at(request.handle);
    const bool ready =
        operation->is_send ? operation->done : operation->message && !is_cut(operation->key);
    if (!ready) return false;
    if (operation->delay_tests > 0) {
      --operation->delay_tests;
      return false;
    }
    operations_.erase(request.handle);
    request = {};
    if (operation->is_send) return true;
    transfer(*operation);
    if (received_bytes != nullptr) *received_bytes = operation->received_bytes;
    return true;
  }

  bool cancel(Mpi::Request& request) {
    if (!request) return true;
    const std::lock_guard lock(mutex_);
    const std::shared_ptr<Operation> operation = operations_.at(request.handle);
    operations_.erase(request.handle);
    request = {};
    if (operation->message) {
      transfer(*operation);
      return false;
    }
    Queue& queue = receives_[operation->key];
    queue.erase(std::find(queue.begin(), queue.end(), operation));
    return true;
  }

  static void transfer(Operation& receive) {
    Operation& send = *receive.message;
    receive.received_bytes = send.size_bytes;
    const bool fits = send.size_bytes <= receive.size_bytes;
    if (fits && send.size_bytes > 0) std::memcpy(receive.target, send.source, send.size_bytes);
    send.done = true;
    if (!fits) throw Error(ErrorCode::resource, "MPI_Test failed: message truncated");
  }

  bool is_cut(const Key& key) const {
    return cut_.count(std::get<0>(key)) != 0 || cut_.count(std::get<1>(key)) != 0;
  }

  void require_working(int rank, const char* call) const {
    if (broken_.count(rank) != 0) {
      throw Error(ErrorCode::resource, std::string("MPI refused ") + call + ": broken on purpose");
    }
  }

  const Settings settings_;
  std::mutex mutex_;  // guards all below, and the copies from rank to rank
  std::mt19937_64 random_;
  std::map<Key, Queue> sends_, receives_;  // not matched yet
  std::map<uint64_t, std::shared_ptr<Operation>> operations_;
  uint64_t last_handle_ = 0;
  std::map<int, size_t> bytes_sent_, device_bytes_sent_;
  std::set<int> cut_, broken_;
};

}  // namespace ringreduce
